"""Checkpoints: whole or not there, the same keys in every stage, and nothing that runs code is ever loaded."""

import pickle
import random
from argparse import Namespace

import numpy as np
import pytest
import torch

from files import checkpoint
from files.checkpoint import KEYS, CheckpointError
from models import Masks, ViTDims, build_vit, compact, load_dense
from models.pretrained import load_initial_, read_initial
from runtime.seeds import rng_state, set_rng_state


def record(model, tiny):
    return dict(
        arch=dict(name=tiny["arch"], kwargs={k: v for k, v in tiny.items() if k != "arch"}),
        dims=model.dims.to_dict(),
        dim=model.dims.to_dim(),
        model=model.state_dict(),
        args=dict(lr=0.1),
    )


def test_every_stage_has_the_same_keys_and_loads_without_code(tmp_path, tiny):
    path = tmp_path / "a.pth"
    checkpoint.save(path, **record(build_vit(**tiny), tiny))
    content = torch.load(path, weights_only=True)
    assert sorted(content) == sorted(KEYS)
    assert not list(tmp_path.glob(".a.pth.*"))
    with pytest.raises(ValueError, match="extra"):
        checkpoint.save(path, extra=1)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    checkpoint.save(path, epoch=1)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        checkpoint.save(path, epoch=lambda: 2)
    assert checkpoint.load(path)["epoch"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_load_dense_compacts_a_pruned_checkpoint(tmp_path, tiny, randomise, prune, images):
    student = randomise(build_vit(**tiny)).eval()
    masks = prune(Masks(student.dims), ("embed", "heads", "qk", "v", "mlp"))
    masks.install_(student)
    checkpoint.save(tmp_path / "p.pth", **record(student, tiny) | dict(dims=masks.dims.to_dict(), masks=masks.keep))
    dense = load_dense(tmp_path / "p.pth")
    assert dense.dims == masks.dims and not dense.training
    torch.testing.assert_close(dense(images), student(images), rtol=1e-5, atol=1e-5)
    small = compact(student, masks)
    checkpoint.save(tmp_path / "f.pth", **record(small, tiny))
    torch.testing.assert_close(load_dense(tmp_path / "f.pth")(images), dense(images), rtol=0, atol=0)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


def write_evil(path):
    torch.save(dict(model=Evil()), path)


class Smuggled:
    """A numpy scalar of objects."""

    def __reduce__(self):
        return np.float64(0).__reduce__()[0], (np.dtype("O"), b"")


def write_truncated(path):
    checkpoint.save(path, epoch=1, model=dict(w=torch.zeros(1000)))
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "does not exist"),
        (write_evil, "needs unpickling of code"),
        (lambda p: torch.save(dict(model=dict(w=Smuggled())), p), "needs unpickling of code"),
        (lambda p: torch.save(dict(best=np.arange(3)), p), "needs unpickling of code"),
        (write_truncated, "truncated"),
        (lambda p: p.write_text("hello"), "truncated or not a torch file"),
        (lambda p: p.write_text("# A page of text"), "truncated or not a torch file"),
        (lambda p: torch.save(Namespace(), p, _use_new_zipfile_serialization=False), "holds a Namespace, not a dict"),
        (lambda p: p.write_text(""), "is empty"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (lambda p: torch.save(dict(state_dict={}), p), "not written by this project"),
        (lambda p: torch.save(dict(format=checkpoint.FORMAT), p), "lacks"),
        (lambda p: torch.save(dict(format=checkpoint.FORMAT | dict(version=99)), p), "newer"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path, write, message):
    path = tmp_path / "x.pth"
    write(path)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.load(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_plain_values(tmp_path, zipped):
    """Training scripts store accuracies and learning rates as they come."""
    numbers = dict(acc=np.float32(81.5), lr=np.float64(1e-3), epoch=np.int64(3), best=np.bool_(True))
    path = tmp_path / "x.pth"
    torch.save(dict(model=dict(w=torch.ones(2))) | numbers, path, _use_new_zipfile_serialization=zipped)
    found = checkpoint.read(path)
    assert {name: found[name] for name in numbers} == numbers and torch.equal(found["model"]["w"], torch.ones(2))


def test_weights_that_do_not_fit_are_refused(tmp_path, tiny):
    model = build_vit(**tiny)
    state = record(model, tiny)
    narrower = ViTDims(model.dims.embed - 4, model.dims.blocks)
    checkpoint.save(tmp_path / "x.pth", **state | dict(dims=narrower.to_dict()))
    with pytest.raises(CheckpointError, match="do not fit"):
        load_dense(tmp_path / "x.pth")
    checkpoint.save(tmp_path / "y.pth", **state | dict(dims=dict(embed=-1, blocks=[])))
    with pytest.raises(CheckpointError, match="embed must be at least 1"):
        load_dense(tmp_path / "y.pth")


def test_initial_checkpoints_of_every_kind(tmp_path, tiny):
    model = build_vit(**tiny)
    arch, kwargs = tiny["arch"], {k: v for k, v in tiny.items() if k != "arch"}
    kinds = dict(
        ours=record(model, tiny) | dict(format=checkpoint.FORMAT, masks=None),
        bare=model.state_dict(),
        deit=dict(model=model.state_dict()),
        described=dict(arch=arch, kwargs=kwargs, model=model.state_dict()),
    )
    for kind, content in kinds.items():
        torch.save(content, tmp_path / f"{kind}.pth")
        found, found_kwargs, state = read_initial(tmp_path / f"{kind}.pth")
        assert (found, found_kwargs) == ((arch, kwargs) if kind in ("ours", "described") else (None, {})), kind
        fresh = build_vit(**tiny)
        assert load_initial_(fresh, state, kind) == []
        assert torch.equal(fresh.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    other = build_vit(**tiny | dict(num_classes=3))
    assert sorted(load_initial_(other, model.state_dict(), "x")) == [
        "head.bias",
        "head.weight",
        "head_dist.bias",
        "head_dist.weight",
    ]
    with pytest.raises(CheckpointError, match="do not fit"):
        load_initial_(build_vit(**tiny | dict(embed_dim=64)), model.state_dict(), "x")


def test_random_states_round_trip(tmp_path):
    state = rng_state()
    checkpoint.save(tmp_path / "r.pth", rng=state)
    drawn = random.random(), np.random.rand(), torch.rand(1)
    set_rng_state(checkpoint.load(tmp_path / "r.pth")["rng"])
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))
