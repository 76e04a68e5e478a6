"""Write docs/api.md from the docstrings of the public names: python -m tools.api_reference [--output FILE]"""

from __future__ import annotations

import argparse
import inspect
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import hubconf
import latency
import models
import options
from recipes import api
from runtime.console import say
from runtime.folders import write_text
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
PUBLIC = {models: models.__all__, latency: latency.__all__, hubconf: ["vit_from_checkpoint"], api: api.__all__}
_QUOTED = re.compile(r"(: |-> )'([^']*)'")  # annotations, as strings
HEADING = """# API reference

What callers outside this project may rely on. Written by `python -m tools.api_reference` from the docstrings.
"""


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(__doc__, "example: python -m tools.api_reference", "tools.api_reference")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=ROOT / "docs" / "api.md",
        help="file to write (default: docs/api.md)",
    )
    return parser


def _entry(name: str, value: Any, level: str) -> str:
    call = isinstance(value, FunctionType) or (isinstance(value, type) and not issubclass(value, Exception))
    signature = _QUOTED.sub(r"\1\2", str(inspect.signature(value))) if call else ""
    text = inspect.getdoc(value) or ""
    generated = isinstance(value, type) and text.startswith(f"{value.__name__}(")  # as dataclasses without one have
    doc = "" if generated else f"\n\n{text}"
    return f"{level} `{name}`\n\n```\n{name}{signature}\n```{doc}\n"


def _methods(cls: type) -> list[tuple[str, Any]]:
    """Public methods that the class itself defines, with docstrings."""
    members = ((name, inspect.unwrap(getattr(value, "__func__", value))) for name, value in vars(cls).items())
    return [(name, f) for name, f in members if isinstance(f, FunctionType) and name[0] != "_" and inspect.getdoc(f)]


def reference() -> str:
    """The whole page."""
    parts = [HEADING]
    for module, names in PUBLIC.items():
        parts.append(f"## {module.__name__}\n\n{inspect.getdoc(module)}\n")
        for name in names:
            value = getattr(module, name)
            parts.append(_entry(name, value, "###"))
            if isinstance(value, type):
                parts += [_entry(f"{name}.{method}", f, "####") for method, f in _methods(value)]
    return "\n".join(parts)


def main(args: argparse.Namespace) -> None:
    write_text(args.output, reference())
    say(f"written: {args.output}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
