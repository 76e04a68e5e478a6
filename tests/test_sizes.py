"""Files have at most 300 lines, functions at most 60, a script's main at most 120."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILE, FUNCTION, MAIN = 300, 60, 120


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
    paths = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")] if path.parts[-2] not in ("tests", "runs")]
    assert not {part for path in paths for part in long_parts(path.read_text(), str(path.relative_to(ROOT)))}


def test_what_is_too_long_is_seen():
    body = "\n    pass" * FUNCTION
    assert long_parts(f"def main():{body}\ndef run():{body}\n", "a.py") == {"a.py: run"}
    assert long_parts("pass\n" * (FILE + 1), "b.py") == {"b.py"} and not long_parts("pass\n" * FILE, "b.py")
