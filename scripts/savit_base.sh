#!/usr/bin/env bash
# SAViT: DeiT-Base without 50 % of its MACs, as published.     bash scripts/savit_base.sh IMAGENET DENSE.pth [more flags]
exec bash "$(dirname "$0")/savit_prune.sh" base 0.50 "$@"
