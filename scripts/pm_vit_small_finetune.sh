#!/usr/bin/env bash
# Finetune what pm_vit_small.sh compressed, as published.     bash scripts/pm_vit_small_finetune.sh PRUNED.pth DENSE.pth IMAGENET
exec bash "$(dirname "$0")/pm_vit_finetune.sh" small "$@"
