#!/usr/bin/env bash
# Train a small DeiT on handwritten digits, make it twice as fast on this machine, and show what that cost.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
out=runs/quickstart
rm -rf "$out"
mkdir -p "$out"
data=(--data-set DIGITS --num_workers 0 --seed 0)
plain=(--mixup 0 --cutmix 0 --aa "" --color-jitter 0 --reprob 0 --drop-path 0)
model=(--model deit_tiny_distilled_patch16_224)
size=(--model-kwargs img_size=16 patch_size=2 embed_dim=96 depth=6 num_heads=3)

echo "== 1/5 train a dense model"
"$PYTHON" finetune_dense.py --scratch "${model[@]}" "${size[@]}" "${data[@]}" "${plain[@]}" --output_dir "$out/dense" \
    --epochs 32 --batch-size 32 --lr 1.6e-2 --warmup-epochs 3 --kl_loss_coeff 0 --original_loss_coeff 1 --no-model-ema
dense=("$out"/dense/scratch_*/ft_checkpoint.pth)

echo "== 2/5 measure this machine"
"$PYTHON" -m latency.build_table --initial-checkpoint "${dense[0]}" --batch-size 64 --dtype fp32 --output "$out/latency.json"

echo "== 3/5 prune to half of the dense model's latency"
"$PYTHON" main_full_global_latency.py --initial-checkpoint "${dense[0]}" "${data[@]}" "${plain[@]}" --output_dir "$out" \
    --pruning --pruning_config pruning_configs/group8_m23_m09.json --latency_look_up_table "$out/latency.json" \
    --latency_target 0.5 --latency_regularization 5e-4 --prune_per_iter 64 --interval_prune 5 --student_eval True \
    --epochs 30 --batch-size 64 --lr 4e-3 --kl_loss_coeff 10000 --original_loss_coeff 1
pruned=("$out"/global_prune_*)

echo "== 4/5 compact and finetune"
"$PYTHON" finetune_dense.py --finetune "${pruned[0]}" "${data[@]}" "${plain[@]}" \
    --epochs 10 --batch-size 32 --lr 8e-3 --kl_loss_coeff 10000 --original_loss_coeff 1 --no-model-ema
finetuned=("${pruned[0]}"/ft_dense_*)

echo "== 5/5 result"
"$PYTHON" -m tools.report "${finetuned[0]}" --output "$out"
