#!/usr/bin/env bash
# One node's share of a job step: srun starts this once on each node, where SLURM_NODEID is the node's rank.
#
#     srun … bash slurm/on_node.sh train/sst2.py FLAGS…
# The launcher has to outlive its ranks, and a rank that still imports its libraries has to outlive the signal; the ranks
# set their own handlers. torchelastic would kill the ranks 30 s after a SIGTERM.
trap '' TERM USR1
export PET_SIGNALS_TO_HANDLE=SIGINT
trap '[ $? = 0 ] || : >>"$ZEROTUNE_FAILED_FILE"' EXIT
IN_CONTAINER=()
# shellcheck source=/dev/null
[ -e slurm/hook.sh ] && . slurm/hook.sh
set -euo pipefail

if [ "${SLURM_GPUS_ON_NODE:-$ZEROTUNE_PROCESSES_PER_NODE}" -lt "$ZEROTUNE_PROCESSES_PER_NODE" ]; then
  reason="$(hostname) has $SLURM_GPUS_ON_NODE GPUs and $ZEROTUNE_PROCESSES_PER_NODE ranks are to start on each node: ask with"
  reason+=" --gpus-per-node, or set ZEROTUNE_PROCESSES_PER_NODE to what each node has"
  echo "refused: $reason" >&2
  printf '{"state": "refused", "reason": "%s"}\n' "$reason" >"$ZEROTUNE_STATE_FILE"
  exit 2
fi
world=$((SLURM_JOB_NUM_NODES * ZEROTUNE_PROCESSES_PER_NODE))
# not the user's own file of `accelerate config`, which may name other devices
flags=(--config_file slurm/accelerate.yaml)
flags+=(--num_machines "$SLURM_JOB_NUM_NODES" --num_processes "$world" --mixed_precision no --dynamo_backend no)
if [ "$world" -gt 1 ]; then
  # --multi_gpu is how accelerate says "several processes"; without GPUs they are CPU processes
  kind=(--multi_gpu)
  case " $* " in *" --deepspeed"[\ =]*) kind=(--use_deepspeed --deepspeed_multinode_launcher standard) ;; esac
  # a launcher waits ten minutes for those of the other nodes, or less if ZEROTUNE_COLLECTIVE_TIMEOUT is less
  most=$((ZEROTUNE_COLLECTIVE_TIMEOUT < 600 ? ZEROTUNE_COLLECTIVE_TIMEOUT : 600))
  flags+=("${kind[@]}" --machine_rank "$SLURM_NODEID" --rdzv_backend static --rdzv_conf "timeout=$most"
    --main_process_ip "$ZEROTUNE_MASTER_ADDR" --main_process_port "$ZEROTUNE_PORT")
fi
"${IN_CONTAINER[@]}" "$ZEROTUNE_PYTHON" -m accelerate.commands.accelerate_cli launch \
  "${flags[@]}" "$@"
