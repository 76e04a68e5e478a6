#!/usr/bin/env bash
# The tests: style and the fast suite; --all adds the slow end-to-end ones. Other arguments go to pytest. Every core gets a worker
# with one thread, and every worker whole files: what the tests of a file share is made once. -n 0 runs them in one process.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
select=(-m "not slow")
if [ "${1:-}" = "--all" ]; then
    select=()
    shift
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check --quiet .
exec "$PYTHON" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder "${select[@]}" "$@"
