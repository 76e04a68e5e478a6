"""Hand a model over: python -m tools.export CHECKPOINT --format onnx [--output DIR]

Writes a folder, reads it back, compares its results with the model's, and measures its latency beside the model's.

safetensors   config.json and model.safetensors, for models.load_dense, torch.hub.load and the Hugging Face Hub
onnx          model.onnx, for any batch; checked and timed in onnxruntime
torch-export  model.pt2, for any batch: torch.export.load(FILE).module()
timm          for timm.create_model("local-dir:DIR", pretrained=True); narrower blocks are padded with zeros
standalone    model.py, which needs torch and timm alone, config.json and model.safetensors, to vendor
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import options
from latency.disturbance import describe
from latency.measure import interleaved
from latency.runtimes import RuntimeFailed
from models import ViTDims, is_swin, load_dense, skeleton
from models.arch import Model
from runtime.console import say, say_result
from runtime.device import device_name
from runtime.errors import Problems, RunFailed
from runtime.folders import make_folder
from runtime.script import run_script
from tools.formats import FORMATS, Call, images
from training.preparing import read_preparation

LIMIT = 1e-4  # of the relative difference that an export may have
PLAIN = ("timm", "standalone")  # formats that know plain ViTs alone
BATCHES = (1, 5)  # of the random images that it is measured on


def get_args_parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        __doc__,
        "example: python -m tools.export runs/pruned_run/ft_dense_…/ft_checkpoint.pth --format onnx --batch-size 8",
        "tools.export",
    )
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="any checkpoint of this project; a pruned one is compacted first")
    add("--format", required=True, choices=tuple(FORMATS), help="what to write")
    add(
        "--output",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder to write to (default: export_<format> beside the checkpoint)",
    )
    add("--use-ema", action="store_true", help="take the moving average of the weights (default: off)")
    add("--batch-size", metavar="N", type=int, default=1, help="images per call when measuring (default: %(default)s)")
    add(
        "--push",
        metavar="OWNER/NAME",
        default="",
        help="also upload the folder to the Hugging Face Hub, as the account logged in there (default: no upload)",
    )
    return parser


def check_args(args: argparse.Namespace) -> tuple[Model, Path]:
    """(the compact model, the folder to write). Everything wrong is reported at once; raises BadArguments."""
    problems = Problems()
    chosen = FORMATS[args.format]
    if chosen.missing:
        problems.add(f'--format {args.format} needs {", ".join(chosen.missing)}: pip install ".[{chosen.extra}]"')
    if args.batch_size < 1:
        problems.add(f"--batch-size must be at least 1, not {args.batch_size}")
    if args.push and (args.push.count("/") != 1 or not all(args.push.split("/"))):
        problems.add(f"--push takes OWNER/NAME, not {args.push}")
    model = problems.attempt(load_dense, args.checkpoint, ema=args.use_ema)
    if args.output and args.output.is_file():
        problems.add(f"--output {args.output} is a file, not a folder")
    swin = model is not None and is_swin(model.arch)
    if swin and args.format in PLAIN:
        problems.add(
            f"--format {args.format} is for plain ViTs, not for {model.arch}, a Swin Transformer; the other "
            "formats take it"
        )
    if model is not None and not swin and args.format == "timm" and has_fewer_tokens(model):
        problems.add("--format timm knows widths alone, and this model also merges tokens; the other formats take it")
    if model is not None:
        problems.attempt(read_preparation, dict(data_config=model.data_config), args.checkpoint, 0)
    problems.raise_if_any()
    beside = Path(args.checkpoint) if Path(args.checkpoint).is_dir() else Path(args.checkpoint).parent
    folder = problems.attempt(make_folder, args.output or beside / f"export_{args.format.replace('-', '_')}")
    problems.raise_if_any()
    return model, folder


def has_fewer_tokens(model: Model) -> bool:
    """Whether a block computes on fewer tokens than there are."""
    full = ViTDims.of(skeleton(model.arch, **model.arch_kwargs)).blocks[0].tokens
    return any(block.tokens != full for block in model.dims.blocks)


@torch.inference_mode()
def difference(model: Model, exported: Call) -> float:
    """The largest relative difference of the exported model's logits, over batches of random images."""
    differences = []
    for batch in BATCHES:
        expected = model(images(model, batch))
        differences.append(float((exported(images(model, batch)) - expected).norm() / expected.norm()))
    return max(differences)


class _Called(nn.Module):
    """Any function as a module without parameters, for the stopwatch."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.call = (call,)  # a module in a tuple is not registered: exported ones refuse eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.call[0](x)


def measure(args: argparse.Namespace, model: Model, exported: Call) -> str:
    """Measure the exported model and the model itself in turn; a line that says both."""
    timings = interleaved(dict(torch=model, exported=_Called(exported)), images(model, args.batch_size))
    ms = {name: f"{1e3 * t.median:.3f} ms" for name, t in timings.items()}
    threads = torch.get_num_threads()
    note = describe(threads, threads, timings["torch"].disturbed)
    return (
        f"latency at batch {args.batch_size}, fp32, {device_name('cpu')}: {ms['exported']} exported, "
        f"{ms['torch']} in torch{note and f' ({note})'}"
    )


def push(folder: Path, name: str) -> None:
    """Upload a folder to the Hugging Face Hub. Raises RunFailed."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().create_repo(name, exist_ok=True)
        HfApi().upload_folder(repo_id=name, folder_path=folder)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise RunFailed(f"{folder} is written, but the upload to {name} failed: {error}") from None
    say(f'uploaded: models.load_dense("hf-hub:{name}")')


def main(args: argparse.Namespace) -> None:
    model, folder = check_args(args)
    chosen = FORMATS[args.format]
    try:
        chosen.write(model, folder)
        exported = chosen.read(folder)
        relative = difference(model, exported)
    except (RuntimeFailed, ValueError) as error:
        raise RunFailed(f"--format {args.format}: {error}") from None
    if not relative <= LIMIT:
        raise RunFailed(
            f"{folder} computes something else than the model: relative difference {relative:.1e} on random "
            f"images, {LIMIT:.0e} is allowed"
        )
    say(f"relative difference {relative:.1e} on random images in batches of {' and '.join(map(str, BATCHES))}")
    say(measure(args, model, exported))
    if args.push:
        push(folder, args.push)
    say(f"next: {chosen.use.format(folder=str(folder), file=str(folder / chosen.result))}")
    say_result(f"written: {folder / chosen.result}, {folder / 'config.json'}")


if __name__ == "__main__":
    run_script(main, get_args_parser().parse_args())
