"""Files of at most 300 lines, functions of at most 60, a script's main of at most 120, but for a list to be emptied."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE, FUNCTION, MAIN = 300, 60, 120
LONG = {
    "benchmarks/fault_jobs.py",
    "benchmarks/fuzz_targets.py",
    "benchmarks/tokens.py",
    "main_savit.py: _add_pruning_args",
    "models/tokens.py",
    "options/groups.py: add_data_args",
    "options/groups.py: add_run_args",
    "options/training_groups.py: add_augmentation_args",
    "pruning/pm_vit.py",
    "recipes/nvit_options.py: add_pruning_args",
    "recipes/pm_vit_options.py: add_token_args",
}


def long_parts(source: str, name: str) -> set[str]:
    """The file and its functions that are too long: "file", "file: function"."""
    found = {name} if len(source.splitlines()) > FILE else set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            most = MAIN if node.name == "main" else FUNCTION
            if node.end_lineno - node.lineno + 1 > most:
                found.add(f"{name}: {node.name}")
    return found


def test_nothing_is_longer_than_it_may_be():
    """Exactly the list: what was made shorter leaves it in the same commit."""
    paths = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if path.parts[-2] not in ("tests", "runs")]
    found = {part for path in paths for part in long_parts(path.read_text(), str(path.relative_to(ROOT)))}
    assert not found - LONG, "too long"
    assert not LONG - found, "no longer too long: take it off the list"


def test_what_is_too_long_is_seen():
    body = "\n    pass" * FUNCTION
    assert long_parts(f"def main():{body}\ndef run():{body}\n", "a.py") == {"a.py: run"}
    assert long_parts("pass\n" * (FILE + 1), "b.py") == {"b.py"} and not long_parts("pass\n" * FILE, "b.py")
