#!/usr/bin/env bash
# A strong dense model on CIFAR-10 for benchmarks: 12 blocks of width 192. Started again, it continues where it stopped.
#     bash scripts/strong_base.sh ARCHIVE [MINUTES] [OUTPUT] [flags of benchmarks.strong_base]
set -euo pipefail
archive=$(realpath "${1:?the tar archive of images in train/CLASS and val/CLASS}")
minutes=${2:-5}
output=${3:-runs/strong_base.pth}
source "$(dirname "$0")/environment.sh"
mkdir -p "$(dirname "$output")"
exec "$PYTHON" -m benchmarks.strong_base --archive "$archive" --minutes "$minutes" --output "$output" --resume "${@:4}"
