#!/usr/bin/env bash
# The quickstart's job on CIFAR-10: prune a trained model to half of its latency on this machine, finetune two epochs.
#     bash scripts/cifar10.sh DATA_FOLDER DENSE.pth [more flags for both training scripts]
# DATA_FOLDER has train/ and val/ class folders; DENSE.pth has the keys arch, kwargs and model.
set -euo pipefail
[ $# -ge 2 ] || { sed -n 2,4p "$0" >&2; exit 2; }
data_path=$(realpath "$1") dense=$(realpath "$2")
shift 2
source "$(dirname "$0")/environment.sh"
out=runs/cifar10
rm -rf "$out"
mkdir -p "$out"
data=(--data-set IMNET --data-path "$data_path" --initial-checkpoint "$dense" --num_workers 2 --seed 0)
light=(--mixup 0 --cutmix 0 --aa "" --color-jitter 0 --reprob 0 --drop-path 0)

"$PYTHON" -m latency.build_table --initial-checkpoint "$dense" --batch-size 64 --dtype fp32 --output "$out/latency.json"
"$PYTHON" main_full_global_latency.py "${data[@]}" "${light[@]}" --output_dir "$out" --pruning \
    --latency_look_up_table "$out/latency.json" --latency_target 0.5 --latency_regularization 5e-4 \
    --prune_per_iter 32 --interval_prune 8 --student_eval True --batch-size 128 --epochs 5 --lr 2e-3 \
    --kl_loss_coeff 10000 --original_loss_coeff 1 "$@"
pruned=("$out"/global_prune_*)
"$PYTHON" finetune_dense.py --finetune "${pruned[0]}" "${data[@]}" "${light[@]}" --batch-size 128 --epochs 2 --lr 4e-3 \
    --warmup-epochs 0 --kl_loss_coeff 10000 --original_loss_coeff 1 --no-model-ema "$@"
finetuned=("${pruned[0]}"/ft_dense_*)
"$PYTHON" -m tools.report "${finetuned[0]}" --output "$out"
