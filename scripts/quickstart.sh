#!/usr/bin/env bash
# Train a small DeiT on handwritten digits, make it faster on this machine in two ways, and show what that cost.
# On a terminal every stage shows its progress alone, and its lines go to runs/quickstart/log.txt.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # this model is too small to share out
out=runs/quickstart
rm -rf "$out"
mkdir -p "$out"
data=(--data-set DIGITS --num_workers 1 --seed 0)
plain=(--mixup 0 --cutmix 0 --aa "" --color-jitter 0 --reprob 0 --drop-path 0)
model=(--model deit_tiny_distilled_patch16_224)
size=(--model-kwargs img_size=16 patch_size=4 embed_dim=96 depth=6 num_heads=3)

stage() {  # stage TITLE SCRIPT FLAGS…
    echo "== $1"
    if [ -t 1 ]; then
        "$PYTHON" "${@:2}" >>"$out/log.txt" || { tail -n 20 "$out/log.txt" >&2; exit 1; }
    else
        "$PYTHON" "${@:2}"
    fi
}

stage "1/5 train a dense model" finetune_dense.py --scratch "${model[@]}" "${size[@]}" "${data[@]}" "${plain[@]}" \
    --epochs 26 --batch-size 32 --lr 1.6e-2 --warmup-epochs 2 --cooldown-epochs 0 --kl_loss_coeff 0 \
    --original_loss_coeff 1 --no-model-ema --output_dir "$out" --run_name dense

stage "2/5 measure this machine, and prune one-shot to three latencies" main_full_global_latency.py --one_shot \
    --initial-checkpoint "$out/dense/ft_checkpoint.pth" "${data[@]}" --calib_images 512 --latency_target 0.7 0.5 0.3 \
    --latency_batch_size 64 --table_cache "$out/tables" --output_dir "$out" --run_name one_shot

stage "3/5 prune to half of the latency while training, by NViT's rule" main_full_global_latency.py --pruning \
    --initial-checkpoint "$out/dense/ft_checkpoint.pth" "${data[@]}" "${plain[@]}" --latency_look_up_table "$out/one_shot/latency.json" \
    --latency_target 0.5 --latency_regularization 5e-4 --prune_per_iter 128 --interval_prune 5 --student_eval True \
    --epochs 30 --batch-size 64 --lr 4e-3 --kl_loss_coeff 10000 --original_loss_coeff 1 --output_dir "$out" \
    --run_name nvit

stage "4/5 finetune that model" finetune_dense.py --finetune "$out/nvit" "${data[@]}" "${plain[@]}" \
    --epochs 4 --batch-size 32 --lr 8e-3 --kl_loss_coeff 10000 --original_loss_coeff 1 --no-model-ema \
    --run_name finetuned

echo "== 5/5 result"
"$PYTHON" -m tools.report "$out"/one_shot/target_{0.7,0.5,0.3} "$out/nvit/finetuned" --output "$out"
echo "your own model: $PYTHON main_full_global_latency.py --one_shot --model deit_small_patch16_224 --pretrained" \
    "--data-path FOLDER_OF_IMAGES --latency_target 0.5 --output_dir runs"
