#!/usr/bin/env bash
# The published SAViT finetuning recipe, on 8 GPUs.
#     bash scripts/savit_finetune.sh SIZE MASKED.pth IMAGENET [more flags]        (GPUS=N for another number of processes)
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
size=$1 masked=$(realpath "$2") data_path=$(realpath "$3")
shift 3
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-8}" main_savit_deploy.py --dist-eval --resume= \
    --masked_model="$masked" --batch-size=128 --num_workers=16 --data-path="$data_path" \
    --model="deit_${size}_patch16_224_deploy" --amp --pruning_flops_percentage=0 --finetune_op=1 --epochs=300 \
    --warmup-epochs=0 --cooldown-epochs=0 --output_dir="runs/savit_${size}_finetuned" "$@"
