#!/usr/bin/env bash
# A training job on a Slurm cluster: one process a GPU, started by srun itself. Submit it from the repository's root:
#
#   sbatch --nodes 4 --gpus-per-node 8 --ntasks-per-node 8 --time 24:00:00 launch/slurm.sh configs/runs/X.yaml [key=value ...]
#
# Partition, account and the like are options of sbatch, too; those below are defaults. Two minutes before its time is up, and
# when it is preempted (give the partition a GraceTime), the job saves a checkpoint, ends with 75, and goes back into the queue
# by itself; the next start resumes from there. Any other exit code ends it.
#
#SBATCH --job-name=braid
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --signal=USR1@120
#SBATCH --requeue
set -uo pipefail

PREEMPTED=75

if [ $# -eq 0 ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "usage: sbatch [options of sbatch] launch/slurm.sh configs/runs/X.yaml [key=value ...]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?}" || exit 1 # sbatch runs a copy of this file that lies elsewhere
if [ ! -f pretrain/main.py ]; then
  echo "error: $PWD is not the root of the repository; submit the job from there" >&2
  exit 2
fi
[ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not share a port
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MASTER_ADDR MASTER_PORT OMP_NUM_THREADS

# Without torchrun in between, signals reach the processes directly and their exit codes come back: srun's is the highest.
# Ranks of a node are neighbours (block): the mesh puts the ranks that talk most next to each other. Every process sees all GPUs
# of its node and takes the one of its local rank, so do not bind GPUs to tasks. A process that fails leaves the others
# waiting; --wait ends them.
# shellcheck disable=SC2016  (the variables are those of each task)
task='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=${SLURM_TASKS_PER_NODE%%[(,]*}
exec python -u pretrain/main.py --config "$@"'

trap : TERM USR1 # in case they reach this shell as well: it waits for srun all the same, and goes on
srun --distribution=block --kill-on-bad-exit=0 --wait=60 bash -c "$task" task "$@"
code=$?

if [ "$code" -eq "$PREEMPTED" ]; then
  echo "saved; back into the queue"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
