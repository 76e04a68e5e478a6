#!/usr/bin/env bash
# ReViT-S: embedding 384, as published.     bash scripts/revit_s.sh IMAGENET [more flags]
exec bash "$(dirname "$0")/revit.sh" 384 "$@"
