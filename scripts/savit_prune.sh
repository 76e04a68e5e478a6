#!/usr/bin/env bash
# The published SAViT pruning recipe: a DeiT without a share of its MACs, on one GPU (GPUS=N for more).
#     bash scripts/savit_prune.sh SIZE SHARE IMAGENET DENSE.pth [more flags]        (SIZE: base, small or tiny)
set -euo pipefail
[ $# -ge 4 ] || { sed -n 2,3p "$0" >&2; exit 2; }
size=$1 share=$2 data_path=$(realpath "$3") dense=$(realpath "$4")
shift 4
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-1}" main_savit.py --finetune="$dense" --batch-size=32 --num_workers=16 --data-path="$data_path" \
    --model="deit_${size}_patch16_224" --pruning_per_iteration=100 --pruning_feed_percent=0.1 --pruning_method=2 \
    --pruning_layers=3 --pruning_flops_percentage="$share" --pruning_flops_threshold=0.0001 --need_hessian \
    --finetune_op=2 --epochs=1 --output_dir="runs/savit_$size" "$@"
