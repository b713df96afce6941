#!/bin/bash
# Set a cluster up, once, where there is a network: the environment and DVC's cache, in $FIRSTSIGHT_SCRATCH.
#
#     bash slurm/setup.sh
#
# python3 makes the environment; where it is too old, one that conda fetches.

cd "$(dirname "$0")/.." || exit
source slurm/site.sh # first, because `module` does not everywhere bear what follows
set -euo pipefail

mkdir -p "$FIRSTSIGHT_SCRATCH"
python=python3
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    command -v conda > /dev/null || {
        echo "error: slurm/site.sh: expected python3 of 3.11 or newer, or conda, found neither; load a module" >&2
        exit 1
    }
    python=$FIRSTSIGHT_SCRATCH/python/bin/python
    [ -x "$python" ] || conda create --quiet --yes --prefix "$FIRSTSIGHT_SCRATCH/python" python=3.11
fi
make setup PYTHON="$python" VENV="$FIRSTSIGHT_SCRATCH/venv"
dvc cache dir --local "$FIRSTSIGHT_SCRATCH/dvc-cache"
