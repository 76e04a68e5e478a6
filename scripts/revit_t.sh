#!/usr/bin/env bash
# ReViT-T: embedding 176, as published.     bash scripts/revit_t.sh IMAGENET [more flags]
exec bash "$(dirname "$0")/revit.sh" 176 "$@"
