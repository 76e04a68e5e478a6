#!/usr/bin/env bash
# SAViT: DeiT-Small without 30 % of its MACs, as published.     bash scripts/savit_small.sh IMAGENET DENSE.pth [more flags]
exec bash "$(dirname "$0")/savit_prune.sh" small 0.30 "$@"
