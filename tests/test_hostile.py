"""Files from strangers: refused in one line, before anything runs or is allocated."""

import io
import json
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks.fuzz_targets import ARCH, DIMS, KWARGS, TABLE, valid_checkpoint
from files import archive, checkpoint, schema
from files.checkpoint import CheckpointError, DamagedError
from latency.table import LatencyTable, LatencyTableError
from models import load_dense
from models.pretrained import read_dims, read_initial
from pruning.config import ConfigError, load_config

ROOT = Path(__file__).parent.parent


def written(path, **changes):
    """A checkpoint with other values, and a checksum that fits them."""
    content = valid_checkpoint() | changes
    content["format"] = dict(checkpoint.FORMAT)
    content["format"]["sha256"] = checkpoint.digest(content)
    torch.save(content, path)
    return path


def rewritten(path, change=lambda name, data: (name, data), **options):
    """A torch file with records renamed, changed or compressed."""
    source = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", **options) as target:
        for name in source.namelist():
            target.writestr(*change(name, source.read(name)))
    return path


def one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


def test_the_valid_one_is_valid(tmp_path):
    assert load_dense(written(tmp_path / "x.pth")).dims.embed == 8


def kwargs(**changes):
    return dict(arch=dict(name=ARCH, kwargs=KWARGS | changes))


def block(**changes):
    return dict(dims=dict(embed=8, blocks=[DIMS["blocks"][0] | changes]))


def masks(**changes):
    return dict(masks=valid_checkpoint()["masks"] | changes)


def laughs():
    """Two references to what has two references, a hundred deep: small to write, endless to walk."""
    value = []
    for _ in range(100):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "changes, message",
    [
        (kwargs(depth=10**9), "depth=1000000000, more than 1,000"),
        (kwargs(img_size=10**7), "img_size=10000000, more than"),
        (kwargs(img_size=4000), "tokens must be at most 1,000,000, not 1000002"),
        (kwargs(patch_size=0), "no model that can be built"),
        (kwargs(checkpoint_path="evil.pth"), "'checkpoint_path', which is not part of an architecture"),
        (kwargs(pretrained=True), "'pretrained', which is not part"),
        (dict(arch=dict(name="hf-hub:someone/evil", kwargs={})), "not a timm name"),
        (dict(arch=dict(name=ARCH, kwargs=[])), "arch must hold"),
        (block(heads=-1), "heads must be at least 0, not -1"),
        (block(qk=float("nan")), "it.dims.blocks.qk is nan, which is not finite"),
        (block(mlp=10**9), "mlp must be at most 1,000,000"),
        (block(mlp=900_000) | dict(masks=None), "it has 15[0-9,]* parameters, they are [0-9,]*"),
        (block(mlp=31), "its masks keep other widths than its dims"),
        (dict(dims=dict(embed=8, blocks=[DIMS["blocks"][0]] * 2000)), "at most 1,000 blocks"),
        (dict(dims=None), "lacks dims"),
        (dict(model=[1]), "model must be a dict"),
        (dict(model=dict(w="x")), "model must hold tensors by name"),
        (masks(embed=torch.ones(8)), "masks: embed is not a vector of booleans"),
        (masks(embed=torch.ones(900_000, dtype=torch.bool)), "do not fit its architecture"),
        (dict(epoch=-7), "epoch must be a whole number"),
        (dict(metrics=dict(a=laughs())), "nested too deeply"),
        (dict(metrics=dict(a=[0] * 300_000)), "more than 200,000 values"),
        (dict(args=dict(lr=float("inf"))), "it.args.lr is inf, which is not finite"),
    ],
)
def test_values_that_no_model_has(tmp_path, changes, message):
    path = written(tmp_path / "x.pth", **changes) if "nested" not in message else tmp_path / "x.pth"
    if not path.exists():  # its checksum would take for ever, too
        torch.save(valid_checkpoint() | changes, path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_dense(path)
    one_line(error)


def test_weights_that_are_not_finite(tmp_path):
    model = dict(valid_checkpoint()["model"])
    model["blocks.0.attn.proj.bias"] = torch.full((8,), float("nan"))
    with pytest.raises(CheckpointError, match="blocks.0.attn.proj.bias in its model is not finite"):
        load_dense(written(tmp_path / "x.pth", model=model))
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=model), tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="blocks.0.attn.proj.bias is not finite"):
        read_initial(tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match="is not finite, so .* is not written"):
        checkpoint.save(tmp_path / "z.pth", model=model)
    assert not (tmp_path / "z.pth").exists()


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize(
    "code",
    [
        pickle.dumps(dict(model=Evil()), 2),
        pickle.dumps(Evil(), 0),
        pickle.dumps(Evil(), 4),
        b"cos\nsystem\n(S'true'\ntR.",
        b"(S'true'\nios\nsystem\n.",
        b"\x80\x02cbuiltins\nexec\n.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x05\x96\xff\xff\xff\xff\xff\x00\x00\x00.",
    ],
)
@pytest.mark.parametrize("kind", ["zip", "legacy", "inside"])
def test_pickles_that_call(tmp_path, code, kind):
    """`inside` a file that is otherwise whole."""
    path = tmp_path / "x.pth"
    if kind == "legacy":
        path.write_bytes(code)
    else:
        torch.save(dict(a=torch.zeros(3)) if kind == "zip" else valid_checkpoint(), path)
        rewritten(path, lambda name, data: (name, code if name.endswith("data.pkl") else data))
    with pytest.raises(CheckpointError, match="needs unpickling of code|not a torch file|damaged") as error:
        checkpoint.read(path)
    one_line(error)


@pytest.mark.parametrize("name", ["/etc/passwd", "../../evil", "x/../../evil", "x\\evil", "x"])
def test_paths_in_an_archive(tmp_path, name):
    path = written(tmp_path / "x.pth")
    rewritten(path, lambda old, data: (name if old.endswith("/version") else old, data))
    with pytest.raises(DamagedError, match="is not a torch file: it holds"):
        checkpoint.load(path)


def test_sizes_that_the_file_does_not_have(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(dict(a=torch.zeros(4)), path)
    claims = {  # a storage of 2^31 - 1 numbers; a tensor of as many over four; the same number a billion times
        "storage 0 has 16 bytes, not 8,589,934,588": lambda p: p.replace(b"K\x04tq", b"J\xff\xff\xff\x7ftq"),
        "a tensor of 2,147,483,647 elements over 4": lambda p: p.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
        "a tensor of 2,147,483,647 elements over": lambda p: p.replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85").replace(
            b"K\x01\x85", b"K\x00\x85"
        ),
    }
    whole = path.read_bytes()
    for message, change in claims.items():
        path.write_bytes(whole)
        rewritten(path, lambda name, data, change=change: (name, change(data) if name.endswith(".pkl") else data))
        with pytest.raises(DamagedError, match=message):
            checkpoint.read(path)
    torch.save(dict(a=torch.zeros(4)), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes().replace(b"K\x04N", b"J\xff\xff\xff\x7fN"))
    with pytest.raises(DamagedError, match="its tensors take 8,589,934,588 bytes"):
        checkpoint.read(path)
    written(path)
    rewritten(path, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(DamagedError, match="compressed"):
        checkpoint.load(path)


def test_the_header_is_the_content_without_the_tensors(tmp_path):
    path = written(tmp_path / "x.pth")
    header, content = archive.header(path), torch.load(path, weights_only=True)
    assert list(header) == list(content) and header["dims"] == content["dims"]
    for name, tensor in content["model"].items():
        assert header["model"][name].device.type == "meta" and header["model"][name].shape == tensor.shape
        assert header["model"][name].dtype == tensor.dtype


ENTRIES = 3_000_000


@pytest.mark.parametrize(
    "read, error",
    [
        (read_dims, ValueError),
        (load_config, ConfigError),
        (LatencyTable.load, LatencyTableError),
        (schema.read_json, schema.SchemaError),
    ],
)
def test_json_without_end(tmp_path, read, error):
    """Tens of millions of entries, and brackets a million deep: neither is ever parsed."""
    path = tmp_path / "x.json"
    for text in (
        "[" + "{}," * ENTRIES + "{}]",
        "[" * 1_000_000,
        '{"a":' * 50_000 + "1" + "}" * 50_000,
        f"[{'9' * 10_000}]",
    ):
        path.write_text(text)
        with pytest.raises(error) as refused:
            read(str(path))
        assert one_line(refused).count(str(path)) == 1


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1", "true", '"4"', "1e9", "1000000000000", "null", "[]"])
def test_widths_that_are_none(tmp_path, value):
    path = tmp_path / "dims.json"
    path.write_text(json.dumps(DIMS).replace('"heads": 2', f'"heads": {value}'))
    with pytest.raises(ValueError, match="dims.json is no dims.json"):
        read_dims(str(path))
    table = json.dumps(TABLE).replace("2e-06", value, 1)
    path.write_text(table)
    if value not in ("1e9", "1000000000000"):
        with pytest.raises(LatencyTableError, match="MLP_32 must be"):
            LatencyTable.load(path)


@pytest.mark.slow
def test_a_hostile_file_takes_no_memory(tmp_path):
    """It claims 8 GiB."""
    torch.save(dict(a=torch.zeros(4)), path := tmp_path / "x.pth")
    rewritten(
        path,
        lambda name, data: (
            name,
            data.replace(b"K\x04tq", b"J\xff\xff\xff\x7ftq").replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85"),
        ),
    )
    code = (
        "import resource, sys\n"
        "from files import checkpoint\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try:\n    checkpoint.read(sys.argv[1])\n"
        "except checkpoint.CheckpointError as error:\n"
        "    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - used, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert int(done.stdout.split()[0]) < 50_000, done  # KiB
