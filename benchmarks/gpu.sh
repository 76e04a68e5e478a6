#!/usr/bin/env bash
# What only a GPU shows, in at most 9 minutes, the most valuable first: suspicions of a reading, latency tables and what they
# predict, the cost of pruning, tokens, one-shot pruning. Needs no data.
#     bash benchmarks/gpu.sh [OUTPUT_FOLDER]          TINY=1 bash benchmarks/gpu.sh    checks this script on a CPU
# Each step has a limit of its own and the next runs where one fails. Figures are in OUTPUT_FOLDER/log.txt as they come.
# SECONDS_IN_ALL bounds the whole run. Exit code: the number of steps that failed.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
out=${1:-runs/gpu}
total=${SECONDS_IN_ALL:-540}
failed=0
mkdir -p "$out"
: > "$out/log.txt"

step() {  # seconds, module, flags
    local limit=$1 began=$SECONDS left=$((total - SECONDS)) code
    shift
    echo "== $*" | tee -a "$out/log.txt"
    if [ "$left" -lt 5 ]; then
        echo "-- no time left" | tee -a "$out/log.txt"
        return
    fi
    PYTHONUNBUFFERED=1 timeout $((limit < left ? limit : left)) "$python" -m "$@" 2>&1 | tr '\r' '\n' | grep --line-buffered -v '%|' | tee -a "$out/log.txt"
    code=${PIPESTATUS[0]}
    [ "$code" = 0 ] || failed=$((failed + 1))
    echo "-- exit code $code after $((SECONDS - began)) s, $SECONDS s in all" | tee -a "$out/log.txt"
}

table=$out/table.json
if [ -n "${TINY:-}" ]; then
    model=deit_tiny_distilled_patch16_224
    step 120 benchmarks.gpu_review --tiny --device cpu
    step 60 benchmarks.one_shot_cost --model $model --images 4 --batch-size 4
    step 120 latency.build_table --model $model --batch-size 1 --device cpu --rounds 2 --points embed=2 heads=2 qk=2 v=2 mlp=2 --output "$table"
    step 60 benchmarks.latency "$table" --targets 0.54 0.5 --dims-dir "$out" --builds 1 --rounds 2
    step 60 latency.validate "$table" --random 2 --seed 1 --device cpu --builds 1 --rounds 2
    step 60 latency.compare $model "$out/dims_0.5.json" --device cpu --batch-size 1 --modes eager --copies 1 --rounds 2
    step 60 benchmarks.pruning_overhead --batch-size 4 --rounds 4
    step 60 benchmarks.tokens --models $model --keep_rates 0.6 --batch-size 1 --rounds 2
    step 30 benchmarks.merge_routes --batch-size 1 --rounds 2
    step 60 benchmarks.attention_routes --batch-size 1 --heads 2 --tokens 20 --rounds 2
    step 60 benchmarks.handmade --model $model --batch-size 1 --random 1 --rounds 2
    exit "$failed"
fi
model=deit_base_distilled_patch16_224
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv | tee -a "$out/log.txt"
step 110 benchmarks.gpu_review
step 60 benchmarks.one_shot_cost --model $model --images 256 --batch-size 64 --device cuda
step 150 latency.build_table --model $model --batch-size 256 --dtype bf16 --device cuda --rounds 2 --output "$table"
step 50 benchmarks.latency "$table" --dims-dir "$out" --builds 2 --rounds 5
step 50 latency.validate "$table" --random 10 --seed 1 --device cuda --builds 2 --rounds 5
step 100 latency.compare $model "$out/dims_0.5.json" "$out/dims_0.19.json" --device cuda --dtype bf16 --batch-size 1 256 --copies 1 --rounds 7
step 40 benchmarks.pruning_overhead --model $model --batch-size 128 --rounds 9 --device cuda --dtype bfloat16
step 40 benchmarks.tokens --models deit_base_patch16_224 --keep_rates 0.6 --batch-size 256 --rounds 5 --device cuda --dtype bf16
step 25 benchmarks.merge_routes --batch-size 256 --device cuda --dtype bf16
step 60 benchmarks.tokens --models deit_base_patch16_224 --keep_rates 0.6 --batch-size 256 --rounds 5 --device cuda --dtype bf16 --compile
step 30 benchmarks.attention_routes --device cuda --dtype bf16 --batch-size 64 --rounds 5
step 120 benchmarks.one_shot_cost --model vit_large_patch16_224 --images 256 --batch-size 64 --device cuda
step 40 benchmarks.handmade --model $model --device cuda --dtype bf16 --batch-size 256 --random 3 --rounds 5
exit "$failed"
