#!/bin/bash
# A run on two nodes under Slurm: sbatch configs/nodes/slurm.sh CONFIG RUN_DIR [OVERRIDES...]
# The same command continues a run that was ended. CONFIG has dpo.accelerate_config, as many machines in it as there are
# nodes here, and the run_dir RUN_DIR, on storage that all nodes share. See docs/scaling.md. Untested under Slurm.
#SBATCH --job-name=iterdpo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=iterdpo-%j.log
set -eu
export CONFIG=$1 RUN_DIR=$2
shift 2

# When the first node's task has ended, the others are ended 10 seconds later.
exec srun --wait=10 --kill-on-bad-exit=1 bash -c '
  if [ "$SLURM_NODEID" = 0 ]; then
    exec iterdpo run "$CONFIG" "$@" --no-prefect
  fi
  exec iterdpo join "$RUN_DIR" --rank "$SLURM_NODEID"
' iterdpo "$@"
