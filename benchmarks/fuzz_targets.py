"""What the fuzzers call: readers of files and of argument lists, each given anything at all.

A target takes bytes (or a list of arguments) and returns; the errors that users see as one line are its normal end.
Whatever else comes out of it is a bug. `STRATEGIES` makes inputs for hypothesis: valid ones, with something odd inside
(`benchmarks.fuzz_inputs`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import pickle
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

import options
from benchmarks.fuzz_inputs import WORDS, odd, texts, torn
from files import checkpoint
from latency.table import LatencyTable
from models import ViTDims, build_vit, load_dense
from models.pretrained import read_dims
from pruning.config import PruningConfig, load_config
from recipes import nvit_options, pm_vit_options, savit
from runtime.errors import Problems

SCRIPTS = {
    name: importlib.import_module(name)
    for name in (
        "main_full_global_latency",
        "finetune_dense",
        "revit_scratch",
        "main_savit",
        "main_savit_deploy",
        "main_pm_vit",
    )
}
ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, num_classes=3)


@contextlib.contextmanager
def _file(data: bytes) -> Any:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        path = Path(folder) / "x"
        path.write_bytes(data)
        yield path


def table(data: bytes) -> None:
    """A latency table, and a lookup in it."""
    with _file(data) as path, contextlib.suppress(ValueError):
        LatencyTable.load(path).model_seconds(ViTDims.from_dict(DIMS))


def dims(data: bytes) -> None:
    """A dims.json, in this project's spelling and the published one."""
    with _file(data) as path:
        with contextlib.suppress(ValueError):
            read_dims(str(path))
        with contextlib.suppress(ValueError):
            ViTDims.from_dim(json.loads(data), 17)


def config(data: bytes) -> None:
    """A pruning config, and the groups it makes."""
    with _file(data) as path, contextlib.suppress(ValueError):
        pruning_config, _ = load_config(path)
        pruning_config.group_sizes(ViTDims.from_dict(DIMS))


def checkpoints(data: bytes) -> None:
    """A checkpoint, as a model."""
    with _file(data) as path, contextlib.suppress(ValueError):
        load_dense(path)


def arguments(words: bytes | list[str]) -> None:
    """The flags of every script; bytes are split at line ends."""
    if isinstance(words, bytes):
        words = words.decode(errors="replace").splitlines()
    for name, script in SCRIPTS.items():
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            try:
                args = script.get_args_parser().parse_args(words)
            except SystemExit as end:
                assert end.code in (0, 2)
                continue
            problems = Problems()
            if name == "main_pm_vit":
                pm_vit_options.check_flags(args, problems)
                continue
            options.check_values(args, problems)
            if check := dict(main_savit=savit.check_flags).get(name, getattr(script, "_check_flags", None)):
                check(args, problems)
            if name == "main_full_global_latency":
                problems.attempt(nvit_options.parse_prune_dict, args.prune_dict)


TARGETS = dict(table=table, dims=dims, config=config, checkpoint=checkpoints, arguments=arguments)

# ---------------------------------------------------------------- inputs
DIMS = dict(embed=8, blocks=[dict(heads=2, qk=4, v=4, mlp=32, tokens=6)])
DIM = dict(EMB=8, head=[2], QK=[4], V=[4], MLP=[32])
STAGES = dict(stages=[DIMS | dict(blocks=2 * DIMS["blocks"]), DIMS])
TABLE = {
    "EMB_4": {"QK_1_1": {"V_1": {"MLP_1": 1e-6, "MLP_32": 2e-6}, "V_4": {"MLP_1": 1e-6, "MLP_32": 2e-6}}},
    "EMB_8": {"QK_1_1": {"V_1": {"MLP_1": 1e-6, "MLP_32": 2e-6}, "V_4": {"MLP_1": 1e-6, "MLP_32": 2e-6}}},
    "_meta": dict(device="x", batch=4, tokens=6),
    "_overhead": {"EMB_8": 1e-6},
}
TOKENS = {"TOK_4": {"EMB_8": TABLE["EMB_8"]}, "TOK_6": {"EMB_8": TABLE["EMB_8"]}}


@cache
def valid_checkpoint() -> dict[str, Any]:
    """A finetuned one, of a model of one block."""
    torch.manual_seed(0)
    model = build_vit(ARCH, **KWARGS)
    return dict.fromkeys(checkpoint.KEYS) | dict(
        format=dict(checkpoint.FORMAT),
        arch=dict(name=ARCH, kwargs=KWARGS),
        dims=model.dims.to_dict(),
        dim=model.dims.to_dim(),
        model=dict(model.state_dict()),
        epoch=1,
        step=9,
        metrics=dict(acc1=50.0),
        masks={axis: torch.ones(n, dtype=torch.bool) for axis, n in model.dims.sizes().items()},
        args=dict(lr=0.1, initial_checkpoint="x.pth"),
        optimizer=dict(state={0: dict(step=1)}, param_groups=[]),
    )


def _bytes(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _with_pickle(data: bytes, change: Any) -> bytes:
    """A torch file with another pickle inside."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, change(content) if name.endswith("data.pkl") else content)
    return out.getvalue()


@st.composite
def files(draw: Any) -> bytes:
    """A checkpoint with other values, and a checksum that fits; with a torn pickle; or torn itself."""
    content = dict(valid_checkpoint())
    how = draw(st.sampled_from(("values", "values", "pickle", "code", "bytes")))
    if how == "values":
        for _ in range(draw(st.integers(0, 3))):
            content = draw(odd(content))
    data = _bytes(_sign(content))
    if how == "pickle":
        return _with_pickle(data, lambda inside: draw(torn(inside)))
    if how == "code":
        return _with_pickle(data, lambda _: draw(st.binary(max_size=60).map(lambda b: pickle.dumps(b)[:-1] + b + b".")))
    return draw(torn(data)) if how == "bytes" else data


def _sign(content: Any) -> Any:
    with contextlib.suppress(Exception):  # not even of the right shape
        content["format"] = content["format"] | dict(sha256=checkpoint.digest(content))
    return content


@cache
def _flags() -> list[str]:
    return sorted(
        {
            flag
            for script in SCRIPTS.values()
            for action in script.get_args_parser()._actions
            for flag in action.option_strings
            if flag not in ("-h", "--help")
        }
    )


@st.composite
def lists(draw: Any) -> list[str]:
    """Known flags with odd values."""
    words = []
    for _ in range(draw(st.integers(0, 6))):
        flag = draw(st.sampled_from(_flags()) | st.text(max_size=6))
        values = draw(st.lists(WORDS | st.text(max_size=8), max_size=2))
        words += [f"{flag}={values[0]}"] if values and draw(st.booleans()) else [flag, *values]
    return words


CONFIGS = [
    dict(criterion="taylor_sq", momentum=0.9, group_size=PruningConfig().group_size),
    dict(method=23, pruning_momentum=0.9, group_size=16),
]
STRATEGIES = dict(
    table=texts([TABLE, TOKENS]),
    dims=texts([DIMS, DIM, STAGES]),
    config=texts(CONFIGS),
    checkpoint=files(),
    arguments=lists(),
)


def seeds(name: str) -> list[bytes]:
    """Valid inputs of a target."""
    if name == "checkpoint":
        return [_bytes(_sign(dict(valid_checkpoint())))]
    if name == "arguments":
        return ["\n".join(words).encode() for words in ([flag, "1"] for flag in _flags())]
    valid = dict(table=[TABLE, TOKENS], dims=[DIMS, DIM, STAGES], config=CONFIGS)[name]
    return [json.dumps(value).encode() for value in valid]
