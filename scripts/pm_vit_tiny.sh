#!/usr/bin/env bash
# Prune and Merge: the tokens of DeiT-Tiny, as published.     bash scripts/pm_vit_tiny.sh IMAGENET DENSE.pth [more flags]
exec bash "$(dirname "$0")/pm_vit_prune.sh" tiny "$@"
