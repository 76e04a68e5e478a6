#!/usr/bin/env bash
# Prune and Merge: the tokens of DeiT-Base, as published.     bash scripts/pm_vit_base.sh IMAGENET DENSE.pth [more flags]
exec bash "$(dirname "$0")/pm_vit_prune.sh" base "$@"
