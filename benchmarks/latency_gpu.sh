#!/usr/bin/env bash
# What a GPU is needed for, in under 9 minutes: routes through attention, DeiT-B tables at batch 256, what they predict.
#     bash benchmarks/latency_gpu.sh [OUTPUT_FOLDER]
# Each step has its own time limit and the next goes on where one fails; figures are in OUTPUT_FOLDER/log.txt as they come.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python)}
out=${1:-runs/latency_gpu}
model=deit_base_distilled_patch16_224
mkdir -p "$out"
: > "$out/log.txt"

step() {  # seconds, command
    local limit=$1 began=$SECONDS
    shift
    echo "== $*" | tee -a "$out/log.txt"
    timeout "$limit" "$python" -m "$@" 2>&1 | tr '\r' '\n' | grep -v '%|' | tee -a "$out/log.txt"
    echo "-- ${PIPESTATUS[0]} after $((SECONDS - began)) s" | tee -a "$out/log.txt"
}

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit --format=csv | tee -a "$out/log.txt"
for dtype in bf16 fp32; do
    step 25 benchmarks.attention_routes --device cuda --dtype "$dtype" --batch-size 64 --rounds 5
done
step 170 latency.build_table --model "$model" --batch-size 256 --dtype bf16 --device cuda --rounds 2 --output "$out/deit_b_bf16.json"
step 60 latency.validate "$out/deit_b_bf16.json" --random 10 --seed 1 --device cuda --builds 2 --rounds 5
step 50 benchmarks.latency "$out/deit_b_bf16.json" --dims-dir "$out" --builds 2 --rounds 5
step 40 benchmarks.handmade --model "$model" --device cuda --dtype bf16 --batch-size 256 --random 3 --rounds 5
step 110 latency.compare "$model" "$out/dims_0.5.json" "$out/dims_0.19.json" --device cuda --dtype bf16 --batch-size 1 256 --copies 1 --rounds 7
step 40 latency.compare "$model" "$out/dims_0.5.json" "$out/dims_0.19.json" --device cuda --dtype fp32 --batch-size 256 --modes eager --copies 1 --rounds 3
