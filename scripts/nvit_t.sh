#!/usr/bin/env bash
# NViT-T: DeiT-B distilled to 0.19 of its latency, as published.     bash scripts/nvit_t.sh IMAGENET [more flags]
exec bash "$(dirname "$0")/nvit_prune.sh" 0.19 "$@"
