#!/usr/bin/env bash
# SAViT: finetune what savit_small.sh pruned, as published.     bash scripts/savit_small_finetune.sh MASKED.pth IMAGENET [more flags]
exec bash "$(dirname "$0")/savit_finetune.sh" small "$@"
