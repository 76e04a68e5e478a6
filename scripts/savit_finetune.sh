#!/usr/bin/env bash
# The published SAViT finetuning recipe, on 8 GPUs.
#     bash scripts/savit_finetune.sh SIZE MASKED.pth IMAGENET [more flags]        (GPUS=N for another number of processes)
set -euo pipefail
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
size=$1 masked=$(realpath "$2") data_path=$(realpath "$3")
shift 3
source "$(dirname "$0")/environment.sh"
output_dir=runs/savit_${size}_finetuned
for ((i = 1; i <= $#; i++)); do # the last one counts
    case "${!i}" in
    --output_dir=*) output_dir=${!i#*=} ;;
    --output_dir) next=$((i + 1)) output_dir=${!next:-} ;;
    esac
done
resume= # started again, it goes on
for name in ft_checkpoint.pth checkpoint.pth; do
    if [ -f "$output_dir/$name" ]; then resume=$output_dir/$name; fi
done
launch "${GPUS:-8}" main_savit_deploy.py --dist-eval --resume="$resume" \
    --masked_model="$masked" --batch-size=128 --num_workers=16 --data-path="$data_path" \
    --model="deit_${size}_patch16_224_deploy" --amp --pruning_flops_percentage=0 --finetune_op=1 --epochs=300 \
    --warmup-epochs=0 --cooldown-epochs=0 --output_dir="$output_dir" "$@"
