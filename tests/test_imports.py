"""Imports point one way: models <- latency <- pruning <- scripts; engine, losses, datasets, utils know none of them."""
import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = (".", "models", "latency", "pruning", "tools", "benchmarks", "scripts")
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in PATHS}
PACKAGES = {"models", "latency", "pruning"}
MAY_IMPORT = {"models": {"models", "checkpoint"}, "latency": {"models", "latency", "schema"},
              "pruning": PACKAGES | {"schema"}}  # fmt: skip
SCRIPTS = {name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text()}


def imports(source: str, package: str = "") -> set[str]:
    """Dotted names of every module that a file imports, inside functions too; a relative one is inside `package`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}  # a name may be a submodule
    return found


def roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_reader_sees_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from .g import h\n"
    assert imports(source, "p") == {"a.b", "c", "c.d", "p", "p.e", "p.g", "p.g.h"}


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way(name):
    package = name.split(".")[0] if "." in name else ""
    found = imports(FILES[name].read_text(), package)
    ours = {n for n in found if n.split(".")[0] in {f.split(".")[0] for f in FILES}}
    assert not found & SCRIPTS, "imports a script"
    if name not in SCRIPTS:
        assert "argparse" not in roots(found) or name in ("options", "console"), "only these and scripts know argparse"
        assert roots(ours) <= MAY_IMPORT.get(package, roots(ours))
    if name in ("engine", "losses", "datasets", "utils", "checkpoint", "schema", "archive"):
        assert not roots(ours) & PACKAGES
    if name in ("latency.table", "latency.grid"):
        assert all(n.startswith(("models.dims", "latency")) for n in ours - {"models"}), ours
