#!/usr/bin/env bash
# NViT-B: DeiT-B distilled to 0.54 of its latency, as published.     bash scripts/nvit_b.sh IMAGENET [more flags]
exec bash "$(dirname "$0")/nvit_prune.sh" 0.54 "$@"
