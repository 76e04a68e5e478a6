# Sourced by the other scripts: goes to the project's root and sets $PYTHON, by default to the .venv there with all
# requirements in it. PYTHON=python bash scripts/… uses an environment of your own instead.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=.venv/bin/python
    if [ ! -x "$PYTHON" ]; then
        python3 -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' ||
            { echo "error: Python 3.10 to 3.14 is needed, python3 is $(python3 --version 2>&1)" >&2; exit 1; }
        python3 -m venv .venv ||
            { rm -rf .venv; echo "error: python3 -m venv failed; on Debian and Ubuntu install python3-venv" >&2; exit 1; }
    fi
    if ! cmp -s requirements.txt .venv/requirements.installed; then
        echo "installing requirements into .venv (some minutes, several GB, once)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r requirements.txt
        cp requirements.txt .venv/requirements.installed
    fi
fi

# launch N SCRIPT FLAGS…: on N processes of this machine, N GPUs where there are any; 1 needs no launcher.
launch() {
    if [ "$1" = 1 ]; then exec "$PYTHON" "${@:2}"; fi
    exec "$PYTHON" -m torch.distributed.run --nproc_per_node="$1" "${@:2}"
}
