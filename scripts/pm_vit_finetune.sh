#!/usr/bin/env bash
# The published Prune-and-Merge finetuning recipe, on 2 GPUs.
#     bash scripts/pm_vit_finetune.sh SIZE PRUNED.pth DENSE.pth IMAGENET [more flags]        (GPUS=N for another number)
set -euo pipefail
[ $# -ge 4 ] || { sed -n 2,3p "$0" >&2; exit 2; }
size=$1 pruned=$(realpath "$2") dense=$(realpath "$3") data_path=$(realpath "$4")
shift 4
alpha=1.0
[ "$size" = tiny ] && alpha=0.8
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-2}" main_pm_vit.py --model="tmvit_${size}_patch16_224" --resume="$pruned" --data-path="$data_path" \
    --batch-size=256 --teacher-path="$dense" --teacher-model="deit_${size}_patch16_224" --distillation-type=soft \
    --prune_mode=attn --final_finetune=60 --lr=1e-4 --weight-decay=0.001 --distillation-alpha="$alpha" \
    --distillation-tau=20 --output_dir="runs/pm_vit_${size}_finetuned" "$@"
