"""Flags: declared once, explained with unit and default, read by code, and spelled as published."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
from test_imports import SCRIPTS as TEST_SCRIPTS

import finetune_dense
import main_full_global_latency
import main_pm_vit
import main_savit
import main_savit_deploy
import options
import revit_scratch
from options import boolean
from recipes import nvit_files
from runtime.errors import Problems

ROOT = Path(__file__).parents[2]
SCRIPTS = dict(
    main_full_global_latency=main_full_global_latency,
    finetune_dense=finetune_dense,
    revit_scratch=revit_scratch,
    main_savit=main_savit,
    main_savit_deploy=main_savit_deploy,
    main_pm_vit=main_pm_vit,
)
NO_EFFECT = {
    "pruning_exit",
    "finetune_op",
    "pruning_per_iteration",
    "pruning_flops_threshold",
}
PRUNE = (
    "--model deit_base_distilled_patch16_224 --epochs 50 --num_workers 10 --batch-size 128 --data-path D "
    "--data-set IMNET "
    "--lr 1e-4 --output_dir save/path --amp --input-size 224 --seed 1 "
    "--pruning_config=pruning_configs/group8_m23_m09.json "
    "--prune_per_iter=32 --kl_loss_coeff=100000 --original_loss_coeff=1.0 --student_eval=True --dist-eval --pruning "
    """--prune_dict '{"Global":39000}' --interval_prune 100 --pretrained --distillation-type hard """
    "--latency_regularization 5e-4 --latency_target 0.54 --latency_look_up_table latency_head.json --pruning_exit"
)
FINETUNE = (
    "--model deit_base_distilled_patch16_224 --epochs 300 --num_workers 10 --batch-size 144 --data-path D "
    "--data-set IMNET "
    "--amp --input-size 224 --seed 1 --kl_loss_coeff=100000 --original_loss_coeff=1.0 --dist-eval --pretrained "
    "--finetune P "
    "--distillation-type hard --distillation-alpha 0.5 --distillation-tau 20.0 --lr 0.0002"
)
REVIT = (
    "--model deit_base_distilled_patch16_224 --epochs 300 --num_workers 4 --batch-size 32 --data-path D "
    "--data-set IMNET --output_dir save/path --amp --input-size 224 --seed 1 --kl_loss_coeff=0 "
    "--original_loss_coeff=1.0 --dist-eval --pretrained --distillation-type hard --distillation-alpha 0.5 "
    "--distillation-tau 1.0 --lr 0.0005 --scratch --EMB 176 --warmup-epochs 5"
)

SAVIT_PRUNE = (
    "--finetune=C --batch-size=32 --num_workers=16 --data-path=D --model=deit_base_patch16_224 "
    "--pruning_per_iteration=100 --pruning_feed_percent=0.1 --pruning_method=2 --pruning_layers=3 "
    "--pruning_flops_percentage=0.50 --pruning_flops_threshold=0.0001 --need_hessian --finetune_op=2 --epochs=1 "
    "--output_dir=O"
)
SAVIT_FINETUNE = (
    "--dist-eval --resume= --masked_model=M --teacher-path=T --batch-size=128 --num_workers=16 --data-path=D "
    "--model=deit_base_patch16_224_deploy --pruning_flops_percentage=0 --finetune_op=1 --epochs=300 "
    "--warmup-epochs=0 --cooldown-epochs=0 --output_dir=O"
)


def parse(script, line):
    return SCRIPTS[script].get_args_parser().parse_args(shlex.split(line))


def test_published_commands_parse_to_what_they_say():
    args = parse("main_full_global_latency", PRUNE)
    assert (args.latency_target, args.latency_regularization, args.prune_per_iter) == (0.54, 5e-4, 32)
    assert (args.student_eval, args.interval_prune, args.prune_dict) == (True, [100], '{"Global":39000}')
    assert (args.kl_loss_coeff, args.original_loss_coeff, args.dist_eval, args.pretrained) == (1e5, 1.0, True, True)
    for extra, expected in (("", ("", None)), (" --scratch", ("", None)), (" --resume --start_epoch 7", ("auto", 7))):
        args = parse("finetune_dense", FINETUNE + extra)
        assert (args.resume, args.start_epoch) == expected and args.scratch == ("scratch" in extra)
    args = parse("revit_scratch", REVIT)
    assert (args.EMB, args.scratch, args.warmup_epochs, args.kl_loss_coeff) == (176, True, 5, 0.0)
    for extra, folder in (("", ""), (" --pruning_pickle_from=F", "F")):
        args = parse("main_savit", SAVIT_PRUNE + extra)
        assert (args.pruning_flops_percentage, args.need_hessian, args.pruning_pickle_from) == (0.5, True, folder)
        assert (args.pruning_layers, args.pruning_method) == (("heads", "mlp", "embed"), 2)
    args = parse("main_savit_deploy", SAVIT_FINETUNE)
    assert (args.masked_model, args.resume, args.epochs, args.dist_eval, args.model_ema) == ("M", "", 300, True, False)
    args = parse("finetune_dense", "--eval --finetune C --data-path D --batch-size 256")
    assert args.eval and args.finetune == "C"


def arguments_read(source):
    """Names that code reads off the arguments: `args.NAME`, `getattr(args, "NAME")`."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and is_arguments(node.value):
            names.add(node.attr)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in ("getattr", "hasattr")
            and is_arguments(node.args[0])
        ):
            names |= {arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)}
    return names


def is_arguments(node):
    return ast.unparse(node) in ("args", "self.args", "sized")


READ = set().union(
    *(arguments_read(p.read_text()) for p in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")) if "tests" not in p.parts)
)


def test_a_flag_that_nobody_reads_is_noticed():
    """Its name in a table, in a message, or as somebody else's attribute does not count."""
    source = 'TABLE = {"quoted"}\nprint(f"--said", x.other)\nargs.written = 1\nargs.read\ngetattr(args, "got", 1)\n'
    assert arguments_read(source) == {"read", "got"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_has_help_and_is_read(name):
    parser = SCRIPTS[name].get_args_parser()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        assert action.help and len(action.help) > 5, action.dest
        quiet = action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction) or action.default in (None, "")
        assert quiet or "default" in action.help or action.help == argparse.SUPPRESS, action.dest
        assert action.dest in READ | NO_EFFECT, f"nobody reads --{action.dest}"
    assert parser.format_help()


@pytest.mark.parametrize("name", sorted(TEST_SCRIPTS))
def test_every_default_that_is_printed_is_the_default(name):
    parser = importlib.import_module(name).get_args_parser()
    for action in parser._actions:
        if not action.help or action.help == argparse.SUPPRESS:
            continue
        text = parser._get_formatter()._expand_help(action)
        for printed in re.findall(r"\(default: ([^()]*)\)", text)[-1:]:
            assert is_printed_default(printed, action.default), f"{name} {action.option_strings}: {text}"


def is_printed_default(printed, default):
    """Whether help says what the default is; of None, nothing and booleans, in a word; of many, that it is all."""
    if not default or default is True:
        return (
            printed == str(default) or not re.fullmatch(r"[\d.e+-]+", printed) and (printed != "on" or default is True)
        )
    if isinstance(default, list | tuple):
        return printed == " ".join(map(str, default)) or printed.startswith("all")
    if default in ("cuda", "cpu") and printed.startswith("cuda") and printed != default:
        return "where there is" in printed  # it depends on the machine
    return printed.removesuffix(", DeiT's") == str(default) or str(default).endswith(f"/{printed}")


def test_every_flag_is_declared_once():
    for script in (*ROOT.glob("*.py"),):
        flags = re.findall(r'add_argument\(\s*"(--[\w-]+)"', script.read_text())
        assert len(flags) == len(set(flags)), script.name


def test_what_has_no_effect_is_said_to_have_none():
    for script in (main_full_global_latency, main_savit, main_savit_deploy):
        parser = script.get_args_parser()
        text = parser.format_help().split("accepted, no effect:")[1]
        ours = NO_EFFECT & {action.dest for action in parser._actions}
        assert ours and all(f"--{name}" in text or f"--{name.replace('_', '-')}" in text for name in ours)


def test_booleans_are_real():
    assert [boolean(t) for t in ("True", "false", "1", "no")] == [True, False, True, False]
    with pytest.raises(argparse.ArgumentTypeError, match="maybe"):
        boolean("maybe")


def test_resume_takes_nothing_a_path_or_the_empty_string():
    for script in SCRIPTS.keys() - {"main_savit", "main_pm_vit"}:  # one pass, nothing to resume; and a file, always
        found = [parse(script, line).resume for line in ("", "--resume", "--resume=", "--resume x.pth")]
        assert found == ["", "auto", "", "x.pth"]


def test_savit_components():
    values = {
        "3": ("heads", "mlp", "embed"),
        "0": ("heads",),
        "1": ("mlp",),
        "2": ("embed",),
        "embed,qk,heads": ("heads", "embed", "qk"),
        "0,2": ("heads", "embed"),
    }
    assert {text: main_savit.components(text) for text in values} == values
    for text in ("4", "patch", "heads,heads", "", "0,3"):
        with pytest.raises(argparse.ArgumentTypeError):
            main_savit.components(text)
    assert parse("main_savit", "--pruning_protect False").pruning_protect is False


def test_a_run_is_named_or_named_as_published():
    tuning, pruning = (script.get_args_parser() for script in (finetune_dense, main_full_global_latency))
    words = ["--scratch", "--output_dir", "out"]
    assert finetune_dense.run_folder(tuning.parse_args(words)).name.startswith("scratch_300_lr_")
    assert finetune_dense.run_folder(tuning.parse_args([*words, "--run_name", "x"])) == Path("out", "x")
    named = pruning.parse_args(["--output_dir", "out", "--run_name", "y"])
    assert nvit_files.run_folder(named, None, "Global", 0) == Path("out", "y")
    for odd in ("a/b", "..", "/tmp", ""):
        problems = Problems()
        options.check_values(tuning.parse_args([*words, "--run_name", odd]), problems)
        assert problems.found == [f"--run_name must be the name of a folder, without a path, not {odd}"]
