"""SAViT: prune heads, MLP and embedding (QK and V widths too) together, down to a share of the model's MACs."""

from __future__ import annotations

import argparse
from pathlib import Path

import options
from engine import evaluate
from files import checkpoint
from models import compact
from models.arch import Arch
from models.vit import TokenLogits
from options.ranges import ABOVE_0, SHARE_ABOVE_0, SHARE_BELOW_1
from pruning.gates import COMPONENTS
from pruning.interaction import FORMS
from pruning.macs_search import SEARCHES
from pruning.savit import FORMULAS, METHODS
from recipes import importance_files, savit_log, savit_scoring
from recipes import savit as steps
from runtime.console import say, warn
from runtime.errors import Problems
from runtime.folders import make_folder
from runtime.processes import start_processes
from runtime.ranks import is_main
from runtime.script import run_script
from runtime.seeds import rng_state
from training import provenance, results
from training.parts import load_data, make_precision
from training.preparing import settle
from training.sources import Teacher
from training.teachers import load_cnn


def components(text: str) -> tuple[str, ...]:
    """SAViT's --pruning_layers: 3 for heads, mlp and embed (0, 1, 2), or a list of names or numbers."""
    if text == "3":
        return COMPONENTS[:3]
    names = [COMPONENTS[int(word)] if word in ("0", "1", "2") else word for word in text.split(",")]
    if odd := [name for name in names if name not in COMPONENTS]:
        raise argparse.ArgumentTypeError(f"{odd[0]!r} is no component: 0 to 3, or a list of {', '.join(COMPONENTS)}")
    if len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"{text} names a component twice")
    return tuple(name for name in COMPONENTS if name in names)


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python main_savit.py --finetune dense.pth --data-set DIGITS --need_hessian "
        "--pruning_flops_percentage 0.5\n  --output_dir runs/savit",
    )
    options.add_model_args(parser, drops=False)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_cnn_args(parser)
    options.add_tau_arg(parser, "of soft CNN distillation")
    options.add_run_args(parser, "the run's folder; required", trains=False)
    _add_pruning_args(parser)
    group = parser.add_argument_group("accepted, no effect")
    group.add_argument("--epochs", type=int, default=1, help="nothing is trained here (default: %(default)s)")
    group.add_argument(
        "--finetune_op", type=int, choices=(2,), default=2, help="2 prunes and ends (default: %(default)s)"
    )
    group.add_argument(
        "--pruning_per_iteration", type=int, default=100, help="one-shot pruning only (default: %(default)s)"
    )
    group.add_argument(
        "--pruning_flops_threshold",
        type=float,
        default=0.001,
        help="the budget is met to the last unit (default: %(default)s)",
    )
    return parser


def _add_pruning_args(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--finetune",
        metavar="FILE",
        default="",
        help="weights to start from, a pruned checkpoint included (default: --initial-checkpoint)",
        path=True,
    )
    group.add_argument(
        "--pruning_flops_percentage",
        metavar="SHARE",
        type=float,
        default=0.5,
        help="share of the starting model's MACs to remove, in (0, 1) (default: %(default)s)",
    )
    group.add_argument(
        "--pruning_layers",
        metavar="COMPONENTS",
        type=components,
        default="3",
        help="0 heads, 1 mlp, 2 embed, 3 all three; or a list such as heads,mlp,embed,qk,v (default: %(default)s)",
    )
    group.add_argument(
        "--pruning_method",
        type=int,
        choices=tuple(METHODS),
        default=2,
        help="scores from 2 the batches' or 3 the images' gradients, squared (default: %(default)s)",
    )
    group.add_argument(
        "--pruning_feed_percent",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="share of the training batches to score on, in (0, 1] (default: %(default)s)",
        check=SHARE_ABOVE_0,
    )
    group.add_argument(
        "--pruning_protect",
        metavar="BOOL",
        type=options.boolean,
        default=True,
        help="keep the best units of every block and component, up to --pruning_floor (default: True)",
    )
    group.add_argument(
        "--pruning_floor",
        metavar="SHARE",
        type=float,
        default=0.05,
        help="share of them to keep, at least one unit, in [0, 1) (default: %(default)s)",
        check=SHARE_BELOW_1,
    )
    _add_score_args(group)
    _add_importance_args(group)


def _add_score_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--width_multiple",
        metavar="N",
        type=int,
        default=1,
        help="embedding, QK, V and MLP lose units in groups of so many, so that their widths end at multiples; take 8 "
        "on a GPU (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--pruning_normalize_by_layer",
        action="store_true",
        help="divide the scores of every block and component by their norm (default: off)",
    )
    group.add_argument(
        "--pruning_normalize_by_layer_type",
        type=int,
        choices=(1, 2),
        default=2,
        help="which: 1 for L1, 2 for L2 (default: %(default)s)",
    )


def _add_importance_args(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--pruning_pickle_from",
        metavar="DIR",
        default="",
        help="importance files of an earlier run, in place of scoring (default: none)",
    )
    group.add_argument("--pruning_silent", action="store_true", help="write no importance files (default: off)")
    group.add_argument(
        "--need_hessian",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="interactions between components decide the ratios (default: off, or as the files of "
        "--pruning_pickle_from have them); without, the units' scores alone",
    )
    group.add_argument(
        "--hessian_formula",
        choices=FORMULAS,
        default="joint",
        help="joint weighs units by importance, paper takes them as a random sample, published has "
        "that code's weights (default: %(default)s)",
    )
    group.add_argument(
        "--hessian_embed",
        metavar="F",
        type=float,
        default=6.0,
        help="divides the embedding's interactions, of the published formula (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--hessian_form",
        choices=FORMS,
        default="exact",
        help="second derivatives, or finite differences in half the memory (default: %(default)s)",
    )
    group.add_argument(
        "--hessian_error",
        metavar="SHARE",
        type=float,
        default=0.1,
        help="relative standard error of every interaction to stop measuring at (default: %(default)s)",
        check=ABOVE_0,
    )
    group.add_argument(
        "--linear_term",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="with interactions, the units' own gradients count too (default: off)",
    )
    group.add_argument(
        "--search",
        choices=tuple(SEARCHES),
        default="grid",
        help="deterministic grid, or the published evolutionary search (default: %(default)s)",
    )


def check_args(args: argparse.Namespace) -> steps.Setup:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    options.check_values(args, problems)
    steps.check_flags(args, problems)
    device = problems.attempt(start_processes, args)
    full = problems.attempt(steps.read_full, args)
    problems.raise_if_any()
    preparation = problems.attempt(settle, args, full)
    problems.raise_if_any()
    data = problems.attempt(load_data, args, preparation, train=not args.pruning_pickle_from)
    problems.raise_if_any()
    full = full.for_data(data)
    model = problems.attempt(steps.build, full)
    cnn = problems.attempt(load_cnn, Teacher.of(args), data, device)
    problems.raise_if_any()
    setup = steps.Setup(device, full, data, model, cnn)
    problems.attempt(steps.check_target, args, model)
    if args.pruning_pickle_from:
        setup.importance = problems.attempt(importance_files.read_for, args, model)
    else:
        problems.attempt(steps.check_scoring, args, model, len(data.train.dataset))
    problems.raise_if_any()
    setup.folder = problems.attempt(make_folder, Path(args.output_dir))
    problems.raise_if_any()
    model.to(device)
    return setup


def main(args: argparse.Namespace, effort: results.Effort = results.EFFORT) -> None:
    # ---------------------------------------------------------------- parts
    setup = check_args(args)
    model, start = setup.model, setup.model.dims
    precision = make_precision(args, setup.device)
    before = evaluate(TokenLogits(model), setup.data.val, precision, args.dist_eval)["acc1"]
    say(f"before: top-1 {before:.2f}, {savit_log.complexity(Arch.of_model(model), start)}")
    steps.start_anew(args, setup)
    provenance.record(args, setup.folder, setup.device, setup.data, {})

    # ---------------------------------------------------------------- score
    importance = setup.importance
    if importance is None:
        importance, data = savit_scoring.measure(args, model, setup.data.train.dataset.dataset, setup.cnn, setup.device)
        if is_main() and not args.pruning_silent:
            importance_files.save(setup.folder, importance, importance_files.model_record(model), data)
    if importance.hessian is None:
        warn("no interactions (--need_hessian): the units' scores alone decide how much of each component goes")

    # ---------------------------------------------------------------- prune
    masks, problem = steps.select(args, model, importance, setup.device)
    masks.install_(model)
    small = compact(model, masks).eval()
    results.check_compact(model, small)
    after = evaluate(TokenLogits(small), setup.data.val, precision, args.dist_eval)["acc1"]

    # ---------------------------------------------------------------- result
    if not is_main():
        return
    savit_log.write(setup.folder / "logs", model, masks, problem)
    say(savit_log.lines(model, masks, problem)[-1])
    dims = masks.dims
    checkpoint.save(
        setup.folder / "pruned_checkpoint.pth",
        arch=setup.full.arch.record,
        dims=dims.to_dict(),
        dim=dims.to_dim(),
        masks=masks.state_dict(),
        model=model.state_dict(),
        rng=rng_state(),
        metrics=dict(acc1=after),
        data_config=setup.data.preparation.record,
        args=vars(args) | dict(initial_checkpoint=setup.full.path, class_names=list(setup.data.names)),
    )
    conditions = results.Conditions(args.batch_size)
    report = results.Report(setup.folder, setup.full, setup.device, conditions, effort)
    steps.conclude(args, report, start, dims, (before, after))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
