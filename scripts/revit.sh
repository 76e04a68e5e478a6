#!/usr/bin/env bash
# The published ReViT recipe: the redistributed widths from scratch, on 8 GPUs.
#     bash scripts/revit.sh EMBEDDING IMAGENET [more flags]        (GPUS=N for another number of processes)
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,3p "$0" >&2; exit 2; }
embed=$1 data_path=$(realpath "$2")
shift 2
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-8}" revit_scratch.py \
    --model deit_base_distilled_patch16_224 --epochs 300 --num_workers 4 --batch-size 32 --data-path "$data_path" \
    --data-set IMNET --output_dir save/path --amp --input-size 224 --seed 1 --kl_loss_coeff=0 \
    --original_loss_coeff=1.0 --dist-eval --pretrained --distillation-type hard --distillation-alpha 0.5 \
    --distillation-tau 1.0 --lr 0.0005 --scratch --EMB "$embed" --warmup-epochs 5 "$@"
