#!/usr/bin/env bash
#SBATCH --job-name=rlhf_fdiv
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
# One launcher a node: sbatch scripts/slurm.sh CONFIG [a.b=value …]
# Five minutes before its time is over SLURM sends SIGTERM, which the launchers pass on: the stage ends its step and saves.
# The same command goes on from there: submit it again, or at once a second time with --dependency=afterany:JOB.
set -euo pipefail
HEAD_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HEAD_NODE
# shellcheck disable=SC2016  # the variables are those of each node
exec srun bash -c 'exec accelerate launch --config_file configs/accelerate/multi_node.yaml \
  --machine_rank "$SLURM_PROCID" --main_process_ip "$HEAD_NODE" --num_machines "$SLURM_NNODES" \
  --num_processes $((SLURM_NNODES * 8)) -m rlhf_fdiv.stages.policy "$@"' launch "$@"
