#!/usr/bin/env bash
# The tests: style and the fast suite; --all adds the slow end-to-end ones. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
select=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    select=()
    shift
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
exec "$PYTHON" -m pytest "${select[@]}" "$@"
