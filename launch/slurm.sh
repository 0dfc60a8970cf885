#!/usr/bin/env bash
# A training job on a Slurm cluster: a supervisor and a torchrun on each node. Submit it from the repository's root:
#
#   sbatch --nodes 4 --gpus-per-node 8 --exclusive --mem 0 --time 24:00:00 launch/slurm.sh configs/runs/X.yaml [key=value ...]
#
# Options of this script come before the configuration:
#
#   --hardware FILE      a file of configs/hardware/: its environment for NCCL or RCCL is set. Left out: found by nvidia-smi or
#                        rocm-smi. What is in the environment already stays as it is.
#   --ranks-per-node N   processes on each node; left out: as many as the GPUs that Slurm has given
#   --preflight          each node is checked first (launch/preflight); one that fails is named, and the job does not start
#
# Partition, account and the like are options of sbatch; those below are defaults. A crash or a hang is restarted inside the
# allocation (launch/supervise.py). Two minutes before its time is up, and when it is preempted (give the partition a GraceTime),
# the job saves a checkpoint, ends with 75, and goes back into the queue by itself; the next start resumes from there. So does a
# job that has to do without one of its nodes: those in RUN/excluded_hosts are excluded first. Any other exit code ends it.
#
#SBATCH --job-name=braid
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=USR1@120
#SBATCH --requeue
set -uo pipefail

PREEMPTED=75

fail() {
  echo "error: $1" >&2
  exit "${2:-2}"
}

hardware=()
preflight=()
ranks=${SLURM_GPUS_ON_NODE:-}
while [ $# -gt 1 ]; do
  case $1 in
    --hardware) hardware=("$2") ;;
    --ranks-per-node) ranks=$2 ;;
    --preflight)
      preflight=(--preflight)
      shift
      continue
      ;;
    *) break ;;
  esac
  shift 2
done
if [ $# -eq 0 ] || [ "${1#--}" != "$1" ] || [ -z "${SLURM_JOB_ID:-}" ]; then
  echo "usage: sbatch [options of sbatch] launch/slurm.sh [--hardware FILE] [--ranks-per-node N] [--preflight] configs/runs/X.yaml [key=value ...]" >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?}" || exit 1 # sbatch runs a copy of this file that lies elsewhere
[ -f pretrain/main.py ] || fail "$PWD is not the root of the repository; submit the job from there"
[ -n "$ranks" ] || fail "Slurm has given no GPUs; ask for some (--gpus-per-node 8), or give --ranks-per-node N"
[ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ] && export PATH="$PWD/.venv/bin:$PATH"

hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 1
first=${hosts%%$'\n'*}
nodes=$(wc -l <<<"$hosts")
port=$((20000 + SLURM_JOB_ID % 20000)) # jobs that share a node must not share a port
settings=$(python -m launch.environment_of "${hardware[@]}") || exit
eval "$settings"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

command=(pretrain/main.py --config "$@")

excluded=$(python -m launch.supervise --excluded -- "${command[@]}") || exit

# Adds the excluded hosts to the job's --exclude. Slurm may allow that for jobs that wait in the queue only.
exclude() {
  local before
  before=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*ExcNodeList=\([^ ]*\).*/\1/p' | grep -v '^(null)$')
  scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=${before:+$before,}${excluded//$'\n'/,}"
}

requeue() {
  local late=
  if [ -n "$excluded" ]; then
    echo "without ${excluded//$'\n'/, }"
    exclude || late=yes
  fi
  scontrol requeue "$SLURM_JOB_ID"
  [ -z "$late" ] || exclude || echo "error: these nodes could not be excluded" >&2
  exit $PREEMPTED
}

if [ -n "$excluded" ] && grep -qxF "$excluded" <<<"$hosts"; then # one of these nodes has failed too often in this run
  # Once: a job that comes back to such a node would go round for ever.
  [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] || requeue
  fail "this allocation has nodes that are excluded from the run: ${excluded//$'\n'/, }; submit it with --exclude" 1
fi

# One supervisor a node. It alone gets the signals, and passes them to the ranks. Every rank sees all GPUs and CPUs of its node:
# GPUs are not bound to tasks, nor the one task to a core. A supervisor that is not needed any more, because the job is over,
# learns so from the others through the run folder; --wait is for the case that one does not.
trap : TERM USR1 # in case they reach this shell as well: it waits for srun all the same, and goes on
srun --nodes "$nodes" --ntasks "$nodes" --ntasks-per-node 1 --cpu-bind none --kill-on-bad-exit=0 --wait 300 \
  python -m launch.supervise --slurm "${preflight[@]}" --nnodes "$nodes" --nproc-per-node "$ranks" \
  --rdzv-endpoint "$first:$port" --rdzv-id "$SLURM_JOB_ID" -- "${command[@]}"
code=$?

if [ "$code" -eq "$PREEMPTED" ]; then
  excluded=$(python -m launch.supervise --excluded -- "${command[@]}")
  echo "back into the queue"
  requeue
fi
exit "$code"
