#!/usr/bin/env bash
# NViT-H: DeiT-B distilled to 0.50 of its latency, as published.     bash scripts/nvit_h.sh IMAGENET [more flags]
exec bash "$(dirname "$0")/nvit_prune.sh" 0.50 "$@"
