#!/usr/bin/env bash
# SAViT: finetune what savit_base.sh pruned, as published.     bash scripts/savit_base_finetune.sh MASKED.pth IMAGENET [more flags]
exec bash "$(dirname "$0")/savit_finetune.sh" base "$@"
