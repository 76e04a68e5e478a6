"""Tables that are measured where none is named: kept, found again, and never taken for another device or model."""

import json
import random

import pytest
import torch

from benchmarks.one_shot_cost import table_of_macs
from latency import cache, quick
from latency.disturbance import thread_count
from latency.table import LatencyTable
from models import Arch

ARCH = Arch.of("deit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5)


@pytest.fixture
def measured(monkeypatch):
    """Conditions that were measured; the seconds follow the widths."""
    calls = []

    def measure(arch, batch_size, device, dtype, by_tokens, progress, wanted):
        calls.append((arch.name, batch_size, dtype, by_tokens))
        random.random(), torch.rand(3)  # as measuring does
        meta = quick.describe_coarse(arch, batch_size, device, dtype, by_tokens) | dict(date="2031-02-03T04:05")
        return LatencyTable(table_of_macs(arch.dims).data | dict(_meta=meta | dict(complete=True)))

    monkeypatch.setattr(cache, "measure_table", measure)
    return calls


def test_a_table_is_measured_once_for_its_conditions(measured, tmp_path):
    lines = []
    state = random.getstate(), torch.get_rng_state()
    first = cache.find_or_measure(ARCH, 8, folder=tmp_path / "new", progress=lines.append)
    assert random.getstate() == state[0] and torch.equal(torch.get_rng_state(), state[1])
    second = cache.find_or_measure(ARCH, 8, folder=tmp_path / "new", progress=lines.append)
    assert first.data == second.data and len(measured) == 1
    (path,) = (tmp_path / "new").iterdir()
    assert first.name == second.name == str(path) and "deit_tiny" in path.name and "-b8-fp32-" in path.name
    assert lines[0].startswith("no latency table is named") and lines[1].endswith(f"kept for the next time in {path}")
    assert lines[2:] == [f"latency table: {path}, measured on this device on 2031-02-03"]
    for other in (
        dict(batch_size=1),
        dict(dtype="bf16"),
        dict(by_tokens=True),
        dict(arch=ARCH.with_kwargs(depth=3)),
    ):
        cache.find_or_measure(**dict(arch=ARCH, batch_size=8, folder=tmp_path / "new") | other)
    assert len(measured) == 5 and len(list((tmp_path / "new").iterdir())) == 5


def test_another_device_or_thread_count_has_a_table_of_its_own(measured, tmp_path, monkeypatch):
    def name():
        return cache.file_name(quick.describe_coarse(ARCH, 8, "cpu", "fp32"))

    with thread_count(2):
        two = name()
    assert two != name() == name()
    cache.find_or_measure(ARCH, 8, folder=tmp_path)
    monkeypatch.setattr(quick, "device_name", lambda device: "another device")
    cache.find_or_measure(ARCH, 8, folder=tmp_path)
    assert len(measured) == 2


def test_on_a_machine_of_others_the_table_is_of_fewer_threads(measured, tmp_path, monkeypatch):
    """It is found again as such, and one that was disturbed nonetheless is not kept."""
    monkeypatch.setattr("latency.steady._settle", lambda *conditions: 1)
    lines = []
    with thread_count(2):
        first = cache.find_or_measure(ARCH, 8, folder=tmp_path, progress=lines.append)
        second = cache.find_or_measure(ARCH, 8, folder=tmp_path, progress=lines.append)
        assert torch.get_num_threads() == 2
    assert first.data == second.data and first.meta["threads"] == 1 and len(measured) == 1
    assert lines[0] == "others use this machine: the latency table is measured with 1 of 2 threads"
    disturbed = LatencyTable(first.data | dict(_meta=first.meta | dict(disturbed=0.9)))
    monkeypatch.setattr(cache, "measure_table", lambda *args: disturbed)
    cache.find_or_measure(ARCH, 4, folder=tmp_path, progress=lines.append)
    assert len(list(tmp_path.iterdir())) == 1 and lines[-1].endswith("it is not kept for the next time")
    assert "90% of the samples were disturbed by other processes" in lines[-2]


def test_a_file_of_other_conditions_under_that_name_is_not_believed(measured, tmp_path):
    cache.find_or_measure(ARCH, 8, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    content["_meta"]["device"] = "somebody's GPU"
    path.write_text(json.dumps(content))
    lines = []
    table = cache.find_or_measure(ARCH, 8, folder=tmp_path, progress=lines.append)
    assert lines[0] == f"{path} is of another device: it is measured anew" and len(measured) == 2
    assert table.meta["device"] != "somebody's GPU" and LatencyTable.load(path).data == table.data
    path.write_text("half a fi")
    cache.find_or_measure(ARCH, 8, folder=tmp_path, progress=lines.append)
    assert len(measured) == 3 and any("cannot be used, it is measured anew" in line for line in lines)


def test_a_folder_that_cannot_be_written_works_without(measured, tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    for _ in range(2):
        table = cache.find_or_measure(ARCH, 8, folder=tmp_path / "file" / "tables", progress=lines.append)
        assert table.ratio(ARCH.dims, ARCH.dims) == 1
    assert len(measured) == 2 and f"it cannot be kept for the next time: {tmp_path / 'file' / 'tables'}: " in lines[1]


def test_by_default_it_is_the_users_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.default_folder() == tmp_path / "vit-compression" / "latency_tables"


@pytest.mark.parametrize(
    "arch, by_tokens, keys",
    [
        (ARCH, False, {"attention", "mlp"}),
        (ARCH, True, {"attention", "mlp", "tokens"}),
        (
            Arch.of(
                "swin_tiny_patch4_window7_224",
                img_size=32,
                patch_size=4,
                window_size=4,
                embed_dim=16,
                depths=[1, 1],
                num_heads=[2, 2],
                num_classes=5,
            ),
            False,
            None,
        ),
    ],
    ids=["plain", "tokens", "swin"],
)
def test_what_is_measured_covers_the_model(tmp_path, arch, by_tokens, keys):
    table = cache.find_or_measure(arch, 2, by_tokens=by_tokens, folder=tmp_path)
    table.check_covers(arch.dims)
    assert table.model_seconds(arch.dims) > 0 and bool(table.tokens) == by_tokens and table.is_staged == (keys is None)
    if keys:
        assert set(table.data["_parts"]) == keys
    again = cache.find_or_measure(arch, 2, by_tokens=by_tokens, folder=tmp_path)
    assert again.data == json.loads(json.dumps(table.data))
