#!/bin/bash
# Trains a recipe on one node or on several, and goes on by itself after a preemption or the end of its time.
#
#     sbatch recipes/cluster/slurm.sh hh-rlhf-lora
#     sbatch --nodes=2 recipes/cluster/slurm.sh hh-rlhf-full --accelerate fsdp2
#
# The words behind the script are those of `dpo-recipes train`. The folder that you call sbatch in must be on a file
# system that all nodes share: outputs/ is written there. A sign that nothing is left to do: done.json in the run's folder.
#SBATCH --job-name=dpo-recipes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log
#SBATCH --signal=B:USR1@300
# One task a node: the launcher starts a process for each card. Five minutes before the end of the time SLURM sends USR1
# to this script, and at a preemption TERM to the training: it saves a checkpoint, and the job queues again. Give a
# partition that can be preempted a GraceTime of some minutes, so that an update and a checkpoint fit into it.

recipes() { "${DPO_RECIPES:-$SLURM_SUBMIT_DIR/.venv/bin/dpo-recipes}" "$@"; }
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MAIN=$main:$((20000 + SLURM_JOB_ID % 20000)) DPO_RECIPES
export -f recipes

trap 'scancel --signal=TERM "$SLURM_JOB_ID"' USR1 # to the training, not to this script
trap '' TERM                                       # the training has it, too

# Without a checkpoint the flag starts at step 0, so that the first start and the later ones are the same call.
srun --kill-on-bad-exit=0 bash -c '
  if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    set -- "$@" --machines "$SLURM_JOB_NUM_NODES" --rank "$SLURM_NODEID" --main "$MAIN"
  fi
  recipes train "$@" --resume_from_checkpoint true
' train "$@" &
training=$!
while kill -0 $training 2>/dev/null; do
  wait $training
  status=$?
done
# 143: stopped by TERM with a checkpoint. A job that you cancel is not running any more.
if [ "$status" -eq 143 ] && scontrol show job "$SLURM_JOB_ID" | grep -q JobState=RUNNING; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
