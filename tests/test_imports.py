"""Imports point down: which package may import which, for every file of the project, and no two modules in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOWER = {"losses", "files", "runtime", "models", "loading", "engine", "datasets", "options", "latency"}
MAY_IMPORT = {  # the floors, from the ground up; a package may always import from itself
    "losses": set(),
    "files": set(),
    "runtime": {"files"},
    "models": {"files"},
    "loading": {"files", "runtime"},
    "engine": {"runtime"},
    "datasets": {"loading", "runtime"},
    "options": {"datasets", "loading", "runtime"},
    "latency": {"files", "models", "runtime"},
    "pruning": {"files", "latency", "models"},
    "training": LOWER,
    "recipes": LOWER | {"pruning", "training"},
    "hubconf": LOWER | {"pruning", "recipes"},
    "tools": LOWER | {"hubconf", "pruning", "training", "recipes"},
    "scripts": LOWER | {"pruning", "training", "recipes"},
    "benchmarks": LOWER | {"pruning", "training", "recipes", "tools", "scripts"},
}
PACKAGES = {path.parent.name for path in ROOT.glob("[a-z]*/*.py")} - {"tests"}
FOLDERS = (".", *sorted(PACKAGES))
PATHS = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PATHS}
PARTS_OF_SCRIPTS = {"latency.table_plan"}  # which read arguments
SCRIPTS = {name for name, path in FILES.items() if '__name__ == "__main__"' in path.read_text()}


def floor(name: str) -> str:
    """The package of a module, or of an entry script in the root "scripts"."""
    top = name.partition(".")[0]
    return top if top in MAY_IMPORT else "scripts"


def imports(source: str, package: str = "") -> set[str]:
    """Dotted names of every module that a file imports, inside functions too; a relative one is inside `package`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= names if names <= {*FILES} else {base} | names  # a name may be a submodule
    return found


def of(name: str) -> set[str]:
    """The project's modules that a module imports."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    return imports(FILES[name].read_text(), package) & set(FILES) - {name}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another in a circle, [] where there is none."""
    done: set[str] = set()

    def walk(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        found = next((c for other in sorted(graph[name]) if (c := walk(other, [*path, name]))), [])
        done.add(name)
        return found

    return next((c for name in graph if (c := walk(name, []))), [])


def odd_imports(name: str, imported: set[str]) -> set[str]:
    """Those of a module's imports that its floor does not allow."""
    allowed = MAY_IMPORT[floor(name)] | {floor(name)}
    if name in SCRIPTS | PARTS_OF_SCRIPTS and floor(name) == "latency":
        allowed = allowed | {"options"}
    return {other for other in imported if floor(other) not in allowed}


def test_the_reader_sees_every_form():
    source = "import a.b\nfrom c import d\ndef f():\n    from . import e\n    from .g import h\n"
    assert imports(source, "p") == {"a.b", "c", "c.d", "p", "p.e", "p.g", "p.g.h"}


def test_every_package_has_a_floor():
    assert PACKAGES == {*MAY_IMPORT} - {"losses", "engine", "datasets", "hubconf", "scripts"}
    assert len(list(ROOT.glob("*.py"))) <= 11


@pytest.mark.parametrize("name", FILES)
def test_imports_point_down(name):
    imported = of(name)
    assert not odd_imports(name, imported)
    if floor(name) != "benchmarks":
        assert not imported & SCRIPTS, "imports a script"
    if name not in SCRIPTS and floor(name) != "options":
        assert "argparse" not in imports(FILES[name].read_text()), "only scripts and options know argparse"


def test_an_import_that_points_up_is_seen():
    assert odd_imports("files.checkpoint", {"files.schema", "models.dims"}) == {"models.dims"}
    assert odd_imports("pruning.savit", {"models.dims", "recipes.savit"}) == {"recipes.savit"}
    assert odd_imports("latency.table", {"options"}) == {"options"}
    assert not odd_imports("latency.validate", {"options"})
    assert odd_imports("losses", {"engine"}) and odd_imports("tools.report", {"finetune_dense"})


def test_no_modules_import_one_another():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({name: of(name) for name in FILES}) == []
