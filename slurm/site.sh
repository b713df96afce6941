# shellcheck shell=bash
# What this cluster has and how it calls it: the one file to edit. In the root of the clone:
#
#     source slurm/site.sh
#
# The other scripts read it too, on every node. No secret belongs here: `hf auth login` keeps its token in your home.

# What gives you python3 (3.11 or newer, or conda) and git.
# module load python cuda

# sbatch reads these itself. A job of a short time starts sooner; one that is not done by then queues itself, and goes
# on. Under an hour, starting up and saving is most of what it does.
# export SBATCH_ACCOUNT=my-project
# export SBATCH_PARTITION=gpu
# export SBATCH_MEM_PER_NODE=64G
export SBATCH_GPUS_PER_NODE=1
export SBATCH_CPUS_PER_GPU=8
export SBATCH_TIMELIMIT=12:00:00

# A folder that every node sees and that is large and fast: the environment, DVC's cache, weights as they are fetched,
# checkpoints, and a sweep's clones. What a site deletes here after a while has to be computed again.
export FIRSTSIGHT_SCRATCH=${SCRATCH:-$HOME/scratch}/firstsight

export HF_HUB_CACHE=$FIRSTSIGHT_SCRATCH/hub
export PATH=$FIRSTSIGHT_SCRATCH/venv/bin:$PATH
