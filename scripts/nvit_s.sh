#!/usr/bin/env bash
# NViT-S: DeiT-B distilled to 0.39 of its latency, as published.     bash scripts/nvit_s.sh IMAGENET [more flags]
exec bash "$(dirname "$0")/nvit_prune.sh" 0.39 "$@"
