#!/usr/bin/env bash
# The published Prune-and-Merge recipe: 10 % of the patches skip a block, 60 % stay tokens, on one GPU (GPUS=N for more).
#     bash scripts/pm_vit_prune.sh SIZE IMAGENET DENSE.pth [more flags]        (SIZE: base, small or tiny)
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
size=$1 data_path=$(realpath "$2") dense=$(realpath "$3")
shift 3
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-1}" main_pm_vit.py --prune --model="tmvit_${size}_patch16_224" --resume="$dense" \
    --data-path="$data_path" --batch-size=256 --prune_mode=attn --prune_rate=0.1 --keep_rate=0.6 --mixup=0 --reprob=0 \
    --cutmix=0 --output_dir="runs/pm_vit_$size" "$@"
