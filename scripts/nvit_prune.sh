#!/usr/bin/env bash
# The published NViT pruning recipe: DeiT-B distilled to a share of its latency, on 4 GPUs.
#     bash scripts/nvit_prune.sh TARGET IMAGENET [more flags]        (GPUS=N for another number of processes)
# latency_head.json is the table of the device to deploy on, from python -m latency.build_table.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,4p "$0" >&2; exit 2; }
target=$1 data_path=$(realpath "$2")
shift 2
source "$(dirname "$0")/environment.sh"
launch "${GPUS:-4}" main_full_global_latency.py \
    --model deit_base_distilled_patch16_224 --epochs 50 --num_workers 10 --batch-size 128 --data-path "$data_path" \
    --data-set IMNET --lr 1e-4 --output_dir save/path --amp --input-size 224 --seed 1 \
    --pruning_config=pruning_configs/group8_m23_m09.json --prune_per_iter=32 --kl_loss_coeff=100000 \
    --original_loss_coeff=1.0 --student_eval=True --dist-eval --pruning --prune_dict '{"Global":39000}' \
    --interval_prune 100 --pretrained --distillation-type hard --latency_regularization 5e-4 \
    --latency_target "$target" --latency_look_up_table latency_head.json --pruning_exit "$@"
