#!/usr/bin/env bash
# The published NViT finetuning recipe, on 8 GPUs.
#     bash scripts/nvit_finetune.sh PRUNED_FOLDER IMAGENET [more flags]       (GPUS=N for another number of processes)
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,3p "$0" >&2; exit 2; }
pruned=$(realpath "$1") data_path=$(realpath "$2")
shift 2
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-8}" finetune_dense.py \
    --model deit_base_distilled_patch16_224 --epochs 300 --num_workers 10 --batch-size 144 --data-path "$data_path" \
    --data-set IMNET --amp --input-size 224 --seed 1 --kl_loss_coeff=100000 --original_loss_coeff=1.0 --dist-eval \
    --pretrained --finetune "$pruned" --distillation-type hard --distillation-alpha 0.5 --distillation-tau 20.0 \
    --lr 0.0002 "$@"
