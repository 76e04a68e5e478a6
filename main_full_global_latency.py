"""NViT: prune a pretrained ViT over embedding, heads, QK, V and MLP at once, until a latency target is reached."""

from __future__ import annotations

import argparse
import copy
from functools import partial

from torch import Tensor, nn

import options
from engine import Progress, evaluate, train_one_epoch
from latency.table import LatencyTable
from loading.loaders import start_epoch
from loading.preparation import Preparation
from models import Masks
from models.tokens import can_be_lean
from models.vit import TokenLogits
from pruning.config import load_config
from pruning.shrink import Student
from recipes import backbone, calibration, dry_run, nvit_options, one_shot, one_shot_options, tables
from recipes.nvit import PruningSteps, Setup, make_pruner
from recipes.nvit_files import CHECKPOINT, State, conclude, make_report, read_resumed, restore, run_folder, save
from runtime.console import say, warn
from runtime.errors import FailedTogether, Problems
from runtime.folders import append_log, make_folder
from runtime.precision import Precision
from runtime.processes import start_processes
from runtime.script import run_script
from training import provenance, results, resuming
from training.full_model import FullModel, freeze, read_full_model
from training.keeper import Keeper
from training.parts import (
    LossWeights,
    drop_rate_kwargs,
    images_per_update,
    load_data,
    make_loss,
    make_mixup,
    make_optimizer,
    make_precision,
)
from training.preparing import settle
from training.sources import Source, Teacher
from training.teachers import load_cnn

KL_TEMPERATURE = 3.0  # published, fixed while pruning


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python main_full_global_latency.py --data-set DIGITS --initial-checkpoint dense.pth --pruning "
        "--latency_look_up_table table.json\n  --latency_target 0.5 --latency_regularization 5e-4 "
        "--original_loss_coeff 1 --output_dir runs/digits",
    )
    options.add_model_args(parser)
    options.add_data_args(parser)
    options.add_augmentation_args(parser)
    options.add_optimizer_args(parser)
    options.add_distillation_args(parser)
    options.add_tau_arg(parser, "of soft CNN distillation; the full model's KL is at 3, as published")
    options.add_run_args(parser, "where the run's folder is made (default: %(default)s)", output_dir="runs", named=True)
    options.add_resume_args(parser, CHECKPOINT)
    nvit_options.add_pruning_args(parser)
    one_shot_options.add_one_shot_args(parser)
    group = parser.add_argument_group("accepted, no effect")
    group.add_argument("--pruning_exit", action="store_true", help="the published code never reads it")
    return parser


def _check_flags(args: argparse.Namespace, problems: Problems) -> None:
    if 0 < args.prune_per_iter < args.group_size:
        problems.add(f"--prune_per_iter {args.prune_per_iter} is less than one group of --group_size {args.group_size}")
    if len(args.interval_prune) != 1 or args.interval_prune[0] <= 0:
        problems.add(f"--interval_prune takes one number of steps above 0, not {args.interval_prune}")
    if args.one_shot:
        one_shot_options.check_flags(args, problems)
    else:
        one_shot_options.check_without(args, problems)
        nvit_options.check(args, problems)
    if args.pruning and not args.one_shot and not args.original_loss_coeff:
        problems.add(
            "--original_loss_coeff must be above 0: until the first event the student equals the full model, "
            "so that its KL ranks nothing"
        )
    if not args.output_dir:
        problems.add("--output_dir names no folder")
    if args.start_epoch and not args.resume:
        problems.add("--start_epoch goes with --resume")


def _settle_preparation(args: argparse.Namespace, full: FullModel, named: tuple[str, int]) -> Preparation:
    resumed = None if args.one_shot else resuming.find(args, run_folder(args, full, *named), CHECKPOINT)
    return settle(args, full, resumed=resumed)


def _say_first(
    args: argparse.Namespace, full: FullModel, table: LatencyTable, dead: list[str], differences: list[str]
) -> None:
    """What a user should know before anything is computed. differences: of the table's conditions from the run's."""
    if dead:
        warn(f"{args.pruning_config}: as in the published code, these keys have no effect: {', '.join(dead)}")
    for difference in differences:
        warn(difference)
    for axis, reason in full.arch.left_alone.items():
        say(f"{full.arch.name}: {axis} is left alone: {reason}")
    if (cleaned := table.monotone_report()).raised:
        say(
            f"latency table: {cleaned.raised} of {cleaned.values} values lie below that of a narrower layer, by up to "
            f"{cleaned.largest_change:.1%}; selection counts such a step as free"
        )


def _check_model(args: argparse.Namespace, full: FullModel, problems: Problems) -> None:
    nvit_options.check_family(args, full.arch, problems)
    nvit_options.check_start(args, full.start, problems)
    if not full.has_weights:
        problems.add("pruning starts from a trained model: give --initial-checkpoint FILE or --pretrained")


def check_args(args: argparse.Namespace) -> Setup | backbone.Setup:
    """Load everything the arguments name; everything that is wrong is reported at once. Raises BadArguments."""
    problems = Problems()
    options.check_values(args, problems)
    _check_flags(args, problems)
    named = problems.attempt(nvit_options.parse_prune_dict, args.prune_dict)
    config = problems.attempt(load_config, args.pruning_config)
    device = problems.attempt(start_processes, args)
    full = problems.attempt(read_full_model, Source.of(args), swin=True, narrower=True)
    table = problems.attempt(tables.load, args, full) if full else None
    if full and named and backbone.is_for(args, full):
        return backbone.check_args(args, problems, device, full, table, run_folder(args, full, *named))
    preparation = problems.attempt(_settle_preparation, args, full, named) if full and named else None
    data = problems.attempt(load_data, args, preparation) if preparation else None
    if full:
        _check_model(args, full, problems)
    if data and (args.one_shot or args.align or args.compensate):
        problems.attempt(calibration.check, args, len(data.train.dataset))
    if device and table:
        tables.check(args, table, device, make_precision(args, device).dtype, problems)
    problems.raise_if_any()
    full = full.for_data(data)
    problems.attempt(full.check_classifier)
    if args.tokens == "content":
        full = full.with_kwargs(content_merge=True)
    if args.tokens and args.one_shot and can_be_lean(full.arch.skeleton):
        full = full.with_kwargs(lean_last=True)
    model = problems.attempt(full.build, **drop_rate_kwargs(args))
    cnn = problems.attempt(load_cnn, Teacher.of(args), data, device)
    problems.raise_if_any()
    (config, dead), (label, cap) = config, named
    path, dtype = run_folder(args, full, label, cap), make_precision(args, device).dtype
    if table is None:
        resumed = resuming.find(args, path, CHECKPOINT)
        table = tables.find(args, full, device, dtype, resumed and resumed.parent)
    problems.attempt(table.check_covers, model.dims)
    problems.raise_if_any()
    masks = Masks(model.dims, device, model.patch_embed.grid_size if args.tokens else None)
    pruner = make_pruner(args, full, masks, table, config, cap)
    for target in () if args.one_shot else pruner.targets:  # one-shot goes below the floors of the groups
        problems.attempt(target.check_reachable, pruner.floor())
    inputs = resuming.inputs_of(data, weights=model.state_dict(), table=table.data, CNN=cnn and cnn.state_dict())
    resumed = problems.attempt(read_resumed, args, full, data, config, path, inputs)
    problems.attempt(one_shot.check_analysis, args, full.arch, pruner.group_sizes, inputs, preparation)
    problems.raise_if_any()
    folder = path if args.dry_run else problems.attempt(make_folder, path)
    problems.raise_if_any()
    if not args.dry_run:
        tables.keep(args, table, folder)
    _say_first(args, full, table, dead, results.other_conditions(table, device, dtype))
    return Setup(device, full, data, Student(model, masks), cnn, table, config, pruner, folder, resumed, inputs)


def main(args: argparse.Namespace, effort: results.Effort = results.EFFORT) -> None:
    setup = check_args(args)
    if isinstance(setup, backbone.Setup):
        backbone.run(args, setup)
    elif args.dry_run:
        dry_run.report(args, setup)
    else:
        prune(args, setup, effort)


def prune(args: argparse.Namespace, setup: Setup, effort: results.Effort) -> None:
    """Evaluate the dense model, prune it in one shot or with training, and write the results."""
    precision, report = make_precision(args, setup.device), make_report(args, setup, effort)
    images = calibration.prepare(args, setup)
    teacher = freeze(copy.deepcopy(setup.model), setup.device)
    metrics = evaluate(teacher, setup.data.val, precision, args.dist_eval)
    top1_dense = metrics["acc1"]
    say(f"dense model: top-1 {top1_dense:.2f} on {int(metrics['samples'])} images")
    if args.one_shot:
        one_shot.run_(args, setup, report, precision, top1_dense)
    elif not args.pruning:
        say("no --pruning: nothing removed")
    else:
        train(args, setup, report, precision, teacher, images, top1_dense)


def _begin(
    args: argparse.Namespace,
    setup: Setup,
    report: results.Report,
    precision: Precision,
    teacher: nn.Module,
    images: Tensor | None,
    top1_dense: float,
) -> tuple[State, Keeper]:
    """What training moves, from the start or from the resumed checkpoint, and what keeps its checkpoints."""
    progress = Progress(setup.data.updates)
    optimizer = make_optimizer(args, setup.model.to(setup.device))
    criterion = make_loss(args, LossWeights.of(args, KL_TEMPERATURE), setup.cnn, teacher, per_token=False)
    if not setup.resumed:
        resuming.start_anew(setup.folder, CHECKPOINT, resuming.PRUNED)
    compensation = calibration.Compensation(args.compensate, teacher.model, images, args.batch_size)
    measured = tables.measures_target(args, setup.table, setup.device)
    measure = partial(one_shot.measure_on_main, report) if measured else None
    steps = PruningSteps(args, setup, optimizer, criterion, precision, compensation, measure)
    state = State(steps, optimizer, precision, progress, dict(acc1=top1_dense))
    if setup.resumed:
        restore(setup, state)
    provenance.record(args, setup.folder, setup.device, setup.data, setup.inputs)
    write = partial(save, CHECKPOINT, args, setup, state)
    return state, Keeper(progress, setup.folder / CHECKPOINT, args.recovery_interval, write, args.checkpoint_errors)


def train(
    args: argparse.Namespace,
    setup: Setup,
    report: results.Report,
    precision: Precision,
    teacher: nn.Module,
    images: Tensor | None,
    top1_dense: float,
) -> None:
    """Prune with training until the target is reached. teacher: the dense model, frozen; images: to calibrate on."""
    state, keeper = _begin(args, setup, report, precision, teacher, images, top1_dense)
    steps, progress, loader = state.steps, state.progress, setup.data.train
    mixup = make_mixup(args, setup.data.classes)

    def after_step(loss: Tensor) -> bool:
        if steps.after_step(loss):
            return True
        keeper.after_step()
        return False

    dry_run.say_targets(setup.pruner)
    with keeper:
        while progress.step or (progress.epoch < args.epochs and not steps.done):
            start_epoch(loader, progress.epoch, skip=progress.step * args.grad_accum_steps)
            steps.set_phase()
            with steps.curves.training(progress, images_per_update(args)):
                stats = train_one_epoch(
                    steps.student,
                    steps.loss,
                    loader,
                    state.optimizer,
                    precision,
                    progress,
                    seed=args.seed,
                    accumulate=args.grad_accum_steps,
                    mixup=mixup,
                    clip_grad=args.clip_grad,
                    after_backward=steps.after_backward,
                    after_overflow=steps.after_overflow,
                    after_step=after_step,
                    log_interval=args.log_interval,
                )
            with keeper.evaluating():
                test = evaluate(TokenLogits(setup.model), setup.data.val, precision, args.dist_eval)
            epoch, ratio = progress.epoch, setup.pruner.ratio
            progress.next_epoch()
            state.metrics = test | dict(latency=ratio)
            line = results.log_line(stats, test)
            keeper.attempt(append_log, setup.folder, epoch=epoch, events=steps.events, latency=ratio, **line)
            keeper.attempt(steps.curves.epoch, line, epoch)
            keeper.write()
            say(f"epoch {epoch}: loss {stats['loss']:.4f}, top-1 {test['acc1']:.2f}, predicted latency {ratio:.4f}")
    _finish(args, setup, report, state, top1_dense)
    steps.curves.end(vars(args), state.metrics)


def _finish(args: argparse.Namespace, setup: Setup, report: results.Report, state: State, top1_dense: float) -> None:
    if setup.pruner.targets and not setup.pruner.reached:
        way = (
            "nothing more may be removed (floors, or the count in --prune_dict)"
            if state.steps.exhausted
            else f"continue with --resume {setup.folder / CHECKPOINT} and more --epochs"
        )
        raise FailedTogether(f"{setup.pruner.progress()}: {way}")
    conclude(args, setup, report, top1_dense, state.metrics, lambda name: save(name, args, setup, state))


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
