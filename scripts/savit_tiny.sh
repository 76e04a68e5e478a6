#!/usr/bin/env bash
# SAViT: DeiT-Tiny without 23.5 % of its MACs, as published.     bash scripts/savit_tiny.sh IMAGENET DENSE.pth [more flags]
exec bash "$(dirname "$0")/savit_prune.sh" tiny 0.235 "$@"
