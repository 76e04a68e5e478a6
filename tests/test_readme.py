"""The commands of the documentation: every one parses with the real parser, and the scripts they name exist."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import finetune_dense
import main_full_global_latency
import main_pm_vit
import main_savit
import main_savit_deploy
import revit_scratch
import run_with_submitit
from benchmarks import faults, fuzz_run, leaderboard, strong_base
from benchmarks import loader as loader_benchmark
from benchmarks import savit as savit_benchmark
from benchmarks import tokens as tokens_benchmark
from latency import build_table, compare, validate
from tools import (
    api_reference,
    convert,
    convert_importance,
    digits_folder,
    export,
    model_table,
    report,
    show_tokens,
    to_shards,
)

ROOT = Path(__file__).parent.parent
PARSERS = {
    "main_full_global_latency.py": main_full_global_latency,
    "finetune_dense.py": finetune_dense,
    "revit_scratch.py": revit_scratch,
    "latency.build_table": build_table,
    "latency.validate": validate,
    "latency.compare": compare,
    "tools.report": report,
    "tools.convert": convert,
    "run_with_submitit.py": run_with_submitit,
    "main_savit.py": main_savit,
    "main_savit_deploy.py": main_savit_deploy,
    "benchmarks.savit": savit_benchmark,
    "benchmarks.leaderboard": leaderboard,
    "benchmarks.strong_base": strong_base,
    "tools.convert_importance": convert_importance,
    "tools.export": export,
    "tools.digits_folder": digits_folder,
    "tools.api_reference": api_reference,
    "tools.model_table": model_table,
    "tools.to_shards": to_shards,
    "benchmarks.loader": loader_benchmark,
    "benchmarks.faults": faults,
    "benchmarks.fuzz_run": fuzz_run,
    "main_pm_vit.py": main_pm_vit,
    "tools.show_tokens": show_tokens,
    "benchmarks.tokens": tokens_benchmark,
}
OTHERS = {  # of pip, python, torchrun and pytest
    "--disable-pip-version-check",
    "--version",
    "--nproc_per_node",
    "--maxprocesses",
    "--dist",
    "--no-loadscope-reorder",
}


PAGES = ["README.md", "TRAINING.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


def commands():
    for name in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S):
            yield from (pytest.param(line, id=f"{name}: {line[:60]}") for line in block.splitlines() if line.strip())


@pytest.mark.parametrize("line", list(commands()))
def test_the_command_is_understood(line):
    words = shlex.split(line, comments=True)
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    if words[0] == "cp":
        return
    assert words[0] in ("python", "torchrun")
    script = next(i for i, word in enumerate(words) if word in PARSERS)
    PARSERS[words[script]].get_args_parser().parse_args(words[script + 1 :])


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, place in re.findall(r"\]\(([^)#:]+)(#[^)]*)?\)", page.read_text()):
        assert (linked := page.parent / target).exists(), target
        if place:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), re.M)
            assert place[1:] in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], place


@pytest.mark.parametrize("name", [*PAGES, "SECURITY.md"])
def test_tests_that_a_page_names_exist(name):
    page = (ROOT / name).read_text()
    for path in re.findall(r"`(tests/[\w/]+\.py)", page):
        assert (ROOT / path).is_file(), path
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"::((?:test_|Test)\w+)`", page):
        assert re.search(rf"^ *(?:def|class) {test}\b", sources, re.M), test


def test_shell_scripts_use_flags_that_exist():
    for path in (ROOT / "scripts").glob("*.sh"):
        text = path.read_text()
        known = "".join(module.get_args_parser().format_help() for module in PARSERS.values()) + "--all --quiet"
        for flag in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", text)) - OTHERS:
            assert flag in known, f"{path.name}: {flag}"


@pytest.mark.parametrize("variant", ["nvit_b", "nvit_h", "nvit_s", "nvit_t", "nvit_finetune", "revit_t", "revit_s"])
def test_a_published_variant_passes_flags_that_parse(variant, tmp_path):
    """With a Python that only prints its arguments, one a line."""
    (fake := tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    folders = [tmp_path, tmp_path] if variant == "nvit_finetune" else [tmp_path]
    command = ["bash", ROOT / "scripts" / f"{variant}.sh", *folders, "--seed", "7"]
    words = subprocess.run(
        command, env=dict(os.environ, PYTHON=str(fake), GPUS="2"), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    script = next(i for i, word in enumerate(words) if word in PARSERS)
    args = PARSERS[words[script]].get_args_parser().parse_args(words[script + 1 :])
    assert words[:script] == ["-m", "torch.distributed.run", "--nproc_per_node=2"]
    assert args.seed == 7 and args.data_path == str(tmp_path) and args.epochs in (50, 300)
    targets = dict(nvit_b=0.54, nvit_h=0.5, nvit_s=0.39, nvit_t=0.19)
    assert getattr(args, "latency_target", None) == targets.get(variant)
    assert getattr(args, "EMB", None) == dict(revit_t=176, revit_s=384).get(variant)


def flag_rows():
    """(flags, scripts, here) of the table that compares the published flags with ours."""
    section = (ROOT / "docs" / "published.md").read_text().split("## Published flags and ours")[1].split("\n## ")[0]
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0].startswith("`--"):
            yield re.findall(r"`(--[\w-]+)`", cells[0]), cells[1], cells[2]


def test_the_table_of_flags_is_true():
    scripts = dict(P=main_full_global_latency, F=finetune_dense, R=revit_scratch)
    options = {k: {o for a in m.get_args_parser()._actions for o in a.option_strings} for k, m in scripts.items()}
    seen = set()
    for flags, where, here in flag_rows():
        assert here in ("same", "accepted", "absent", "accepted, no effect")
        for flag in flags:
            assert flag not in seen, f"{flag} stands twice"
            seen.add(flag)
            for script, known in options.items():
                assert (flag in known) == (here != "absent" and script in where), (flag, script)
    assert len(seen) > 80


@pytest.mark.parametrize("size, share", [("base", 0.5), ("small", 0.3), ("tiny", 0.235)])
def test_a_published_savit_variant_passes_flags_that_parse(size, share, tmp_path):
    (fake := tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    for script, place in ((f"savit_{size}", "main_savit.py"), (f"savit_{size}_finetune", "main_savit_deploy.py")):
        command = ["bash", ROOT / "scripts" / f"{script}.sh", tmp_path, tmp_path, "--seed", "7"]
        words = subprocess.run(
            command, env=dict(os.environ, PYTHON=str(fake)), capture_output=True, text=True, check=True
        ).stdout.splitlines()
        args = PARSERS[place].get_args_parser().parse_args(words[words.index(place) + 1 :])
        assert args.seed == 7 and args.model.startswith(f"deit_{size}_patch16_224") and args.data_path == str(tmp_path)
        assert args.pruning_flops_percentage == (share if place == "main_savit.py" else 0)
