#!/bin/bash
# Run a grid of parameters, a job a point. In the root of the clone:
#
#     bash slurm/sweep.sh train.temperature=1.5,2,4 train.alpha=0.5,0.9
#     dvc exp show --only-changed    as the jobs end
#
# Each job has a clone of its own, because in one clone DVC lets one run at a time; the clones share this one's DVC
# cache. What all points have in common is best there before they start: let slurm/repro.sbatch run, and commit.

cd "$(dirname "$0")/.." || exit
source slurm/site.sh # first, because `module` does not everywhere bear what follows
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 1
}
[ $# -gt 0 ] || fail "expected parameters, such as train.temperature=1.5,2,4"
[ -z "$(git status --porcelain --untracked-files=no)" ] ||
    fail "expected everything committed, because the points start from the last commit; git commit --all"
if ! author=$(git config user.name) || ! email=$(git config user.email); then
    fail "expected git to know you, because DVC commits results; git config --global user.name NAME, user.email ADDRESS"
fi

points=("")
for axis in "$@"; do
    [[ $axis == *?=?* ]] || fail "$axis: expected KEY=VALUE,VALUE"
    [[ $axis != *[][{}]* ]] || fail "$axis: expected single values, found a list; set it in params.yaml"
    IFS=, read -r -a values <<< "${axis#*=}"
    longer=()
    for point in "${points[@]}"; do
        for value in "${values[@]}"; do longer+=("$point ${axis%%=*}=$value"); done
    done
    points=("${longer[@]}")
done

# The parameters of every point are checked before the first is submitted.
files=$(mktemp -d)
trap 'rm -rf "$files"' EXIT
names=()
for point in "${points[@]}"; do
    name=$(echo "$point" | sed 's/^ //; s/ /_/g; s/[^A-Za-z0-9._-]/-/g')
    [[ " ${names[*]-} " != *" $name "* ]] || fail "$name: expected each point once, found it again"
    cp params.yaml "$files/$name.yaml"
    # shellcheck disable=SC2086 # a word an assignment
    python -m slurm.set_params "$files/$name.yaml" $point
    names+=("$name")
done

folder=$FIRSTSIGHT_SCRATCH/sweep/$(git rev-parse --short HEAD)
mkdir -p "$folder"
cache=$(dvc cache dir)
for name in "${names[@]}"; do
    clone=$folder/$name
    [ ! -e "$clone" ] || fail "$clone: expected no such folder, found one; remove it, if no job is at work there"
    git clone --quiet --config user.name="$author" --config user.email="$email" . "$clone"
    if [ -e .dvc/config.local ]; then cp .dvc/config.local "$clone/.dvc"; fi
    (cd "$clone" && dvc cache dir --local "$cache")
    # Models as they came are not in the run cache (persist in dvc.yaml): from the cache, not from the hub.
    (cd "$clone" && dvc checkout --quiet) || true # what the cache does not have is made by the job
    mv "$files/$name.yaml" "$clone/params.yaml"
    sbatch --chdir="$clone" --job-name="$name" --output="$PWD/slurm-%j.out" \
        --export="ALL,FIRSTSIGHT_EXPERIMENT=$name" slurm/repro.sbatch
done
