"""python -m latency.validate, end to end on a two-block model."""

import json

import pytest

from latency import LatencyTable
from latency.fit import choose_models, correct, fit
from latency.validate import get_args_parser, main
from models import BlockDims, ViTDims
from runtime.device import device_name
from runtime.errors import BadArguments

ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
DENSE = ViTDims(32, (BlockDims(4, 8, 8, 128, 18),) * 2)


def linear(embed, heads, qk, v, mlp):
    return 1e-6 * embed * (heads * 2 * (qk + v) + 2 * mlp + 20)


def table_data(**meta):
    data = {
        f"EMB_{e}": {
            f"QK_{h}_{q}": {f"V_{v}": {f"MLP_{m}": linear(e, h, q, v, m) for m in (1, 128)} for v in (1, 8)}
            for h in (1, 4)
            for q in (1, 8)
        }
        for e in (4, 32)
    }
    return data | dict(_meta=dict(model=ARCH, model_kwargs=KWARGS, batch=2, tokens=18) | meta)


@pytest.fixture
def path(tmp_path):
    (file := tmp_path / "t.json").write_text(json.dumps(table_data()))
    return file


def run(*words):
    main(get_args_parser().parse_args([*map(str, words), "--device", "cpu", "--rounds", "2", "--builds", "1"]))


def test_it_prints_every_model_and_draws(path, tmp_path, capsys):
    (tmp_path / "mine.json").write_text(json.dumps(DENSE.to_dict()))
    run(path, tmp_path / "mine.json", "--random", "3", "--seed", "5")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["random", "random", "random", str(tmp_path / "mine.json")]
    assert "1.0000" in lines[5]  # predicted: the dense model itself
    assert lines[6].startswith("4 models: mean error ") and ", worst " in lines[6] and "batch 2, fp32" in lines[6]
    assert (tmp_path / "t.png").stat().st_size > 5000
    assert LatencyTable.load(path).data == table_data()  # without --fit it stays


def test_fit_corrects_the_file_and_says_so(path, capsys):
    run(path, "--random", "0", "--fit")
    table = LatencyTable.load(path)
    note = table.meta["refit"]
    assert note["models"] == 12 and note["factor"] > 0 and "fit to 12 models" in capsys.readouterr().out
    old = LatencyTable(table_data())
    assert table.model_seconds(DENSE) == pytest.approx(
        note["factor"] * old.model_seconds(DENSE) + note["constant"], rel=1e-4
    )


def test_the_fit_finds_scale_and_constant_and_shrugs_off_one_disturbed_model():
    table, chosen = LatencyTable(table_data()), choose_models(DENSE)
    assert {d.embed for d in chosen} >= {4, 32} and chosen != choose_models(DENSE, seed=1)
    dense = table.model_seconds(DENSE)

    def measure(models):
        seconds = [1.7 * table.model_seconds(d) + 0.04 * dense for d in (DENSE, *models)]
        seconds[4] *= 1.5
        return [s / seconds[0] for s in seconds[1:]], seconds[0]

    factor, constant, error = fit(table, DENSE, chosen, measure)
    assert factor == pytest.approx(1.7, rel=0.02) and constant == pytest.approx(0.04 * dense, rel=0.2)
    better = correct(table, factor, constant, refit={})
    for dims in chosen:
        assert better.model_seconds(dims) == pytest.approx(factor * table.model_seconds(dims) + constant, rel=1e-4)


@pytest.mark.parametrize(
    "meta, extra, words",
    [
        (dict(model=None), [], "does not name its model"),
        (dict(batch=None), [], "does not say its batch"),
        (dict(runtime="onnxruntime 1"), [], "measured by onnxruntime 1"),
        (dict(model="no_such_vit"), [], "no_such_vit"),
        (dict(model_kwargs=KWARGS | dict(embed_dim=64)), [], "goes up to EMB_32 but the model has 64"),
        (dict(), ["nowhere.json"], "nowhere.json is no dims.json"),
        (dict(), ["--random", "0"], "nothing to check"),
        (dict(), ["--random", "-1"], "--random must be at least 0"),
    ],
)
def test_bad_input(tmp_path, meta, extra, words):
    data = table_data()
    data["_meta"] = {k: v for k, v in (data["_meta"] | meta).items() if v is not None}
    (tmp_path / "t.json").write_text(json.dumps(data))
    with pytest.raises(BadArguments, match=words):
        run(tmp_path / "t.json", *extra)
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_dims_that_do_not_fit_the_table(path, tmp_path):
    for dims, words in (
        (ViTDims(32, DENSE.blocks[:1]), "1 blocks"),
        (ViTDims(64, DENSE.blocks), "EMB_32 but the model has 64"),
    ):
        (tmp_path / "d.json").write_text(json.dumps(dims.to_dict()))
        with pytest.raises(BadArguments, match=words):
            run(path, tmp_path / "d.json")


def test_a_table_of_another_device_warns_with_both(tmp_path, capsys):
    (tmp_path / "t.json").write_text(json.dumps(table_data(device="Tesla V100")))
    run(tmp_path / "t.json", "--random", "1")
    warning = capsys.readouterr().err
    assert "Tesla V100" in warning and device_name("cpu") in warning
