"""Latency where torch does not run: a table's parts as ONNX files, timed by onnxruntime or by any command.

A command gets the path of an ONNX file in place of {onnx} and prints milliseconds per call; the last number that it
prints counts. TensorRT's trtexec, OpenVINO's benchmark_app or a script that runs the model on a phone can be used so.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from latency.bench import as_merged
from latency.measure import DTYPES
from latency.points import branches
from latency.whole import build_random, random_images
from models.arch import Arch
from models.dims import ViTDims
from models.vit import Attention
from runtime.device import device_name

WARM_UP, SAMPLE_SECONDS = 3, 0.02
MODEL_ROUNDS = 5
COMMAND_SECONDS = 600  # after which a command is given up
PROTOBUF_BYTES = 2_000_000_000  # an ONNX file with its weights inside can have 2 GiB
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")

Timer = Callable[[], float]  # seconds per call


class RuntimeFailed(RuntimeError):
    """A runtime or a command that gives no time; one line that says why."""


class OnnxRuntime:
    """onnxruntime in this process. Raises ValueError where it, or its support of the device, is missing."""

    def __init__(self, device: str, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ValueError("--runtime onnxruntime is the extra onnx: pip install '.[onnx]' first") from None
        self.module, self.threads = onnxruntime, threads
        self.provider = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
        if self.provider not in onnxruntime.get_available_providers():
            raise ValueError(f"--device {device}: this onnxruntime has only {onnxruntime.get_available_providers()}")
        self.name, self.device = f"onnxruntime {onnxruntime.__version__}", device_name(device)

    def session(self, path: Path) -> Callable[[Tensor], list[np.ndarray]]:
        """The model at `path` as a function of its one input. Raises RuntimeFailed, then and when called."""
        options = self.module.SessionOptions()
        options.intra_op_num_threads = self.threads

        def attempt(action: Callable, *args: Any, **kwargs: Any) -> Any:
            try:
                return action(*args, **kwargs)
            except Exception as error:  # onnxruntime's errors share no narrower class
                raise RuntimeFailed(f"{self.name}: {str(error).splitlines()[0][:200]}") from None

        session = attempt(self.module.InferenceSession, str(path), options, providers=[self.provider])
        name = session.get_inputs()[0].name
        return lambda x: attempt(session.run, None, {name: x.numpy()})

    def timer(self, path: Path, x: Tensor) -> Timer:
        """A stopwatch of the model at `path` on the input x, warmed up."""
        run = self.session(path)
        begin = time.perf_counter()
        for _ in range(WARM_UP):
            run(x)
        repeats = max(1, round(SAMPLE_SECONDS * WARM_UP / (time.perf_counter() - begin)))

        def seconds() -> float:
            begin = time.perf_counter()
            for _ in range(repeats):
                run(x)
            return (time.perf_counter() - begin) / repeats

        return seconds


class Command:
    """A command line with {onnx} in it. Raises ValueError for one that has none, or names no program."""

    def __init__(self, line: str) -> None:
        self.words = shlex.split(line)
        if not any("{onnx}" in word for word in self.words):
            raise ValueError(f"--runtime command: {line!r} has no {{onnx}}, where the file's path goes")
        if not shutil.which(self.words[0]):
            raise ValueError(f"--runtime command: there is no program {self.words[0]}")
        self.name = self.device = f"command {line}"

    def timer(self, path: Path, x: Tensor) -> Timer:
        """What the command prints for the model at `path`, as seconds."""
        words = [word.replace("{onnx}", str(path)) for word in self.words]

        def seconds() -> float:
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise RuntimeFailed(f"{self.name}: {error}") from None
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
                raise RuntimeFailed(f"{self.name} ended with {done.returncode}: {last[:200]}")
            if not (numbers := _NUMBER.findall(done.stdout)) or not float(numbers[-1]) > 0:
                raise RuntimeFailed(f"{self.name} printed no milliseconds above 0 but {done.stdout.strip()[-80:]!r}")
            return float(numbers[-1]) / 1e3

        return seconds


def export(module: nn.Module, x: Tensor, path: Path, dynamic_batch: bool = False) -> None:
    """Write a module as ONNX, with attention as it stands: the runtime chooses its own kernels.

    x: an example input (B, …); dynamic_batch: the file takes any B, else that of x. Weights beyond what one file may
    hold lie beside it. Raises RuntimeFailed where onnx or onnxscript are missing.
    """
    for child in module.modules():
        if isinstance(child, Attention):
            child.route = "fused"
    size = sum(p.numel() * p.element_size() for p in module.parameters())
    try:
        torch.onnx.export(
            module,
            (x,),
            str(path),
            dynamo=True,
            verbose=False,
            external_data=size > PROTOBUF_BYTES,
            dynamic_shapes=({0: torch.export.Dim("batch")},) if dynamic_batch else None,
        )
    except ImportError as error:
        raise RuntimeFailed(f"ONNX files need pip install onnx onnxscript ({error})") from None


class RuntimeBench:
    """The branches of one architecture at a grid of widths, each exported and timed elsewhere; see `Bench`."""

    at_once = True

    def __init__(
        self,
        arch: Arch,
        grid: dict[str, list[int]],
        batch: int,
        dtype: str,
        runtime: OnnxRuntime | Command,
    ) -> None:
        self.arch, self.batch, self.dtype, self.runtime = arch, batch, DTYPES[dtype], runtime
        self.clock: list[float] = []
        self._folder, self._numbers = tempfile.TemporaryDirectory(), count()
        self.tokens = arch.dims.blocks[0].tokens
        self._points = {key: (embed, block) for key, embed, block in branches(grid, self.tokens)}
        self._points |= {("overhead", f"EMB_{embed}"): (embed, None) for embed in grid["embed"]}

    @property
    def keys(self) -> list[tuple[str, ...]]:
        return list(self._points)

    def tick(self) -> None:
        """There is no reference: it may be another machine that measures."""
        self.clock.append(1.0)

    def _timer(self, module: nn.Module, x: Tensor) -> Timer:
        path = Path(self._folder.name) / f"{next(self._numbers)}.onnx"
        with torch.inference_mode():
            export(module.to(self.dtype), x.to(self.dtype), path)
        return self.runtime.timer(path, x.to(self.dtype))

    def samples(self, key: tuple[str, ...], times: int = 1) -> list[tuple[float, int]]:
        """(seconds, index in `clock`) of one branch, `times` times."""
        self.tick()
        embed, block = self._points[key]
        merges = key[0] == "tokens"
        built = block and (block if merges else replace(block, tokens=self.tokens))
        model = build_random(self.arch, ViTDims(embed, (built,) if block else ()), torch.device("cpu"))
        x = torch.randn(self.batch, self.tokens if merges else block.tokens, embed) if block else self._images()
        module = as_merged(self.arch, key[0], model.blocks[0], *x.shape[:2], self.tokens) if block else model
        timer = self._timer(module, x)
        return [(timer(), len(self.clock) - 1) for _ in range(times)]

    def _images(self) -> Tensor:
        return random_images(self.arch, self.batch, torch.device("cpu"))

    def measure_ratios(self, chosen: Sequence[ViTDims]) -> tuple[np.ndarray, float]:
        """(latency of every architecture over the dense model's, seconds per batch of the dense model), in turn."""
        models = (build_random(self.arch, dims, torch.device("cpu")) for dims in (None, *chosen))
        timers = [self._timer(model, self._images()) for model in models]
        rounds = np.array([[timer() for timer in timers] for _ in range(MODEL_ROUNDS)])
        return np.median(rounds[:, 1:] / rounds[:, :1], axis=0), float(np.median(rounds[:, 0]))
