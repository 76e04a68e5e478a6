"""The commands of README and TRAINING: every one parses with the real parser, and the scripts they name exist."""
import re
import shlex
from pathlib import Path

import pytest

import finetune_dense
import main_full_global_latency
import revit_scratch
from latency import build_table
from tools import report

ROOT = Path(__file__).parent.parent
PARSERS = {
    "main_full_global_latency.py": main_full_global_latency, "finetune_dense.py": finetune_dense,
    "revit_scratch.py": revit_scratch, "latency.build_table": build_table, "tools.report": report,
}  # fmt: skip


def commands():
    for name in ("README.md", "TRAINING.md"):
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S):
            yield from (pytest.param(line, id=f"{name}: {line[:60]}") for line in block.splitlines() if line.strip())


@pytest.mark.parametrize("line", list(commands()))
def test_the_command_is_understood(line):
    words = shlex.split(line, comments=True)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    assert words[0] == "python"
    script = next(i for i, word in enumerate(words) if word in PARSERS)
    PARSERS[words[script]].get_args_parser().parse_args(words[script + 1 :])


@pytest.mark.parametrize("name", ["README.md", "TRAINING.md"])
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / name).read_text()):
        assert (ROOT / target).exists(), target


def test_shell_scripts_use_flags_that_exist():
    for path in (ROOT / "scripts").glob("*.sh"):
        text = path.read_text()
        known = "".join(module.get_args_parser().format_help() for module in PARSERS.values()) + "--all --quiet"
        for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - {"--disable-pip-version-check", "--version"}:
            assert flag in known, f"{path.name}: {flag}"
