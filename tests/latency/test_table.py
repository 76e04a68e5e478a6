"""Latency tables: grammar, interpolation against an independent one, parts, clean-up, errors that name their key."""

import itertools
import json
import random

import numpy as np
import pytest

from latency.grid import LatencyTableError
from latency.table import MAX_BYTES, LatencyTable
from models.arch import Arch
from models.dims import BlockDims, ViTDims

AXES = dict(embed=(32, 64, 96), heads=(1, 3), qk=(1, 16, 32), v=(8, 32), mlp=(16, 64, 128))


def tree(axes, seconds):
    e, h, q, v, m = axes.values()
    return {
        f"EMB_{a}": {
            f"QK_{b}_{c}": {f"V_{d}": {f"MLP_{f}": seconds(a, b, c, d, f) for f in m} for d in v} for b in h for c in q
        }
        for a in e
    }


def bumpy(*widths):
    return 1e-4 + random.Random(repr(widths)).random()


def corner_sum(axes, seconds, widths):
    """Multilinear interpolation by hand: the weighted corners of the cell, the first cell extended downwards."""
    sides = []
    for points, width in zip(axes.values(), widths, strict=True):
        low, high = next(pair for pair in itertools.pairwise(points) if width <= pair[1])
        part = (width - low) / (high - low)
        sides.append([(low, 1 - part), (high, part)])
    total = 0.0
    for corner in itertools.product(*sides):
        weight = 1.0
        for _, share in corner:
            weight *= share
        total += weight * seconds(*(point for point, _ in corner))
    return max(total, 0.0)


def block(heads, qk, v, mlp):
    return BlockDims(heads, qk, v, mlp, tokens=66)


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(tree(AXES, bumpy)))
    return LatencyTable.load(path)


def test_published_grammar_gives_its_own_values_at_grid_points(published):
    for e, h, q, v, m in itertools.product(*AXES.values()):
        assert published.block_seconds(e, block(h, q, v, m)) == bumpy(e, h, q, v, m)
    assert published.meta == {}


def test_between_grid_points_equals_a_corner_sum(published):
    rng = np.random.default_rng(0)
    widths = np.stack([rng.integers(points[0], points[-1] + 1, 200) for points in AXES.values()], axis=1)
    expected = [corner_sum(AXES, bumpy, row) for row in widths.tolist()]
    np.testing.assert_allclose(published.blocks_seconds(widths), expected, rtol=1e-12)
    one = widths[7].tolist()
    assert published.block_seconds(one[0], block(*one[1:])) == pytest.approx(expected[7], rel=1e-12)


def test_below_the_grid_is_linear_and_never_negative(published):
    low = [(20, 2, 16, 16, 64), (32, 0, 1, 8, 16), (64, 1, 1, 8, 0), (10, 0, 0, 0, 0)]
    expected = [corner_sum(AXES, bumpy, row) for row in low]
    np.testing.assert_allclose(published.blocks_seconds(np.array(low)), expected, rtol=1e-9)
    steep = LatencyTable(tree(AXES, lambda e, *_: e - 31))
    assert steep.block_seconds(8, block(1, 1, 8, 16)) == 0


def test_widths_above_the_grid_name_width_and_largest(published):
    published.check_covers(ViTDims(96, (block(3, 32, 32, 128),)))
    for dims, words in [
        (ViTDims(128, (block(3, 32, 32, 128),)), "goes up to EMB_96 but the model has 128"),
        (ViTDims(96, (block(3, 32, 32, 128), block(4, 32, 32, 128))), r"goes up to QK_3_\* but the model has 4"),
        (ViTDims(96, (block(3, 48, 32, 128),)), r"goes up to QK_\*_32 but the model has 48"),
        (ViTDims(96, (block(3, 32, 33, 128),)), "goes up to V_32 but the model has 33"),
        (ViTDims(96, (block(3, 32, 32, 384),)), "goes up to MLP_128 but the model has 384"),
    ]:
        for call in (published.check_covers, published.model_seconds):
            with pytest.raises(LatencyTableError, match=words) as caught:
                call(dims)
            assert "table.json" in str(caught.value) and "\n" not in str(caught.value)


def test_an_axis_of_one_point_covers_that_width_only():
    table = LatencyTable(tree(AXES | dict(embed=(96,)), bumpy))
    assert table.block_seconds(96, block(1, 16, 8, 64)) == bumpy(96, 1, 16, 8, 64)
    for embed in (64, 97):
        with pytest.raises(LatencyTableError, match=f"holds only EMB_96 but the model has {embed}"):
            table.block_seconds(embed, block(1, 16, 8, 64))


def parts_table(**meta):
    seconds = {f"overhead/EMB_{e}": e * 1e-5 for e in (32, 96)}
    for e in (32, 96):
        for h, q, v in itertools.product((1, 3), (8, 32), (8, 32)):
            seconds[f"attention/EMB_{e}/QK_{h}_{q}/V_{v}"] = e * h * (2 * q + v)
        seconds |= {f"mlp/EMB_{e}/MLP_{m}": e * m + 7 for m in (16, 64, 128)}
    return LatencyTable.of_parts(seconds, meta)


def test_parts_are_preferred_and_a_missing_branch_is_free():
    table = parts_table()
    assert table.block_seconds(64, block(2, 20, 10, 100)) == pytest.approx(64 * 2 * 50 + 64 * 100 + 7)
    assert table.block_seconds(64, block(0, 20, 10, 100)) == pytest.approx(64 * 100 + 7)
    assert table.block_seconds(64, block(2, 20, 10, 0)) == pytest.approx(64 * 2 * 50)
    assert table.block_seconds(64, block(0, 0, 0, 0)) == 0
    assert table.data["EMB_96"]["QK_3_32"]["V_8"]["MLP_16"] == pytest.approx(96 * 3 * 72 + 96 * 16 + 7)
    for branch in table.data["_parts"]["mlp"].values():
        branch |= {key: 2 * s for key, s in branch.items()}
    changed = LatencyTable(table.data)
    assert changed.block_seconds(96, block(1, 8, 8, 128)) == pytest.approx(96 * 24 + 2 * (96 * 128 + 7))


def test_model_seconds_add_blocks_and_overhead():
    table = parts_table()
    dense, small = (ViTDims(e, (block(3, 32, 32, 128), block(h, 8, 8, 16))) for e, h in ((96, 3), (64, 0)))
    blocks = sum(table.block_seconds(64, b) for b in small.blocks)
    assert table.model_seconds(small) == pytest.approx(blocks + 64e-5)
    assert table.model_seconds(ViTDims(64, ())) == pytest.approx(64e-5)
    assert table.ratio(small, dense) == pytest.approx(table.model_seconds(small) / table.model_seconds(dense))
    assert table.ratio(dense, dense) == 1


def test_a_last_block_of_which_few_tokens_ask_takes_its_share_of_macs():
    table, dims = parts_table(), ViTDims(64, (block(2, 16, 8, 100), block(3, 24, 8, 64)))
    arch = dict(name="deit_tiny_distilled_patch16_224", img_size=32, patch_size=4, embed_dim=96)
    one = ViTDims(64, dims.blocks[-1:])
    full, left = Arch.of(**arch).macs_by_part(one), Arch.of(**arch, lean_last=True).macs_by_part(one)
    attention, mlp = (table.block_seconds(64, b) for b in (block(3, 24, 8, 0), block(0, 0, 0, 64)))
    expected = attention * left["attention"] / full["attention"] + mlp * left["mlp"] / full["mlp"]
    rest = table.block_seconds(64, dims.blocks[0]) + table.overhead_seconds(64)
    assert table.model_seconds(lean := dims.with_queries(2)) == pytest.approx(rest + expected)
    assert table.ratio(lean, dims) == pytest.approx((rest + expected) / table.model_seconds(dims))
    published = LatencyTable({k: v for k, v in table.data.items() if k.startswith("EMB_")})
    share = (left["attention"] + left["mlp"]) / (full["attention"] + full["mlp"])
    row = np.array([[64, 3, 24, 8, 64, 66, np.inf], [64, 3, 24, 8, 64, 66, 2]])
    every, few = published.blocks_seconds(row)
    assert few == pytest.approx(share * every) and every == published.blocks_seconds(row[:1, :6])


def test_another_token_count_is_not_covered():
    table = parts_table(tokens=66)
    table.check_covers(ViTDims(96, (block(3, 32, 32, 128),)))
    with pytest.raises(LatencyTableError, match="66 tokens but the model has 40"):
        table.check_covers(ViTDims(96, (BlockDims(3, 32, 32, 128, tokens=40),)))


def tokens_table(merging=False):
    seconds = {f"overhead/EMB_{e}": 1e-5 for e in (32, 96)}
    if merging:
        seconds |= {f"tokens/N_{n}/EMB_{e}": 1e3 * n * e for n in (20, 65) for e in (32, 96)}
    for n, e in itertools.product((20, 66), (32, 96)):
        for h, q, v in itertools.product((1, 3), (8, 32), (8, 32)):
            seconds[f"attention/N_{n}/EMB_{e}/QK_{h}_{q}/V_{v}"] = n * e * h * (2 * q + v)
        seconds |= {f"mlp/N_{n}/EMB_{e}/MLP_{m}": n * e * m for m in (16, 128)}
    return LatencyTable.of_parts(seconds, dict(tokens=66))


def test_parts_of_several_token_counts():
    table = tokens_table()
    for n in (66, 43, 20):
        assert table.block_seconds(64, BlockDims(2, 20, 10, 100, n)) == pytest.approx(n * 64 * (2 * 50 + 100), rel=1e-5)
    table.check_covers(ViTDims(96, (BlockDims(3, 32, 32, 128, 66), BlockDims(3, 32, 32, 128, 30))))
    assert table.data["EMB_96"]["QK_3_32"]["V_8"]["MLP_16"] == pytest.approx(66 * 96 * (3 * 72 + 16), rel=1e-5)
    assert table.blocks_seconds(np.array([[96, 3, 32, 8, 16]]))[0] == pytest.approx(66 * 96 * (3 * 72 + 16), rel=1e-5)
    merging, bare = tokens_table(merging=True), BlockDims(0, 0, 0, 0, 40)
    assert merging.block_seconds(64, bare) == pytest.approx(1e3 * 40 * 64) and table.block_seconds(64, bare) == 0
    assert merging.block_seconds(64, BlockDims(0, 0, 0, 0, 66)) == 0  # of all tokens, nothing is merged
    with pytest.raises(LatencyTableError, match="goes up to N_66 but the model has 70"):
        table.check_covers(ViTDims(96, (BlockDims(3, 32, 32, 128, 70),)))


def test_token_counts_around_the_published_keys():
    def tree(n):
        return {
            f"EMB_{e}": {
                f"QK_{h}_{q}": {
                    f"V_{v}": {f"MLP_{m}": float(n * e * (h * (2 * q + v) + m)) for m in (16, 128)} for v in (8, 32)
                }
                for h, q in itertools.product((1, 3), (8, 32))
            }
            for e in (32, 96)
        }

    table = LatencyTable({f"TOK_{n}": tree(n) for n in (20, 66)})
    assert table.tokens == 66
    for n in (66, 43, 20):
        assert table.block_seconds(64, BlockDims(2, 20, 10, 100, n)) == pytest.approx(n * 64 * (2 * 50 + 100))
    assert table.blocks_seconds(np.array([[96, 3, 32, 8, 16]]))[0] == pytest.approx(66 * 96 * (3 * 72 + 16))
    with pytest.raises(LatencyTableError, match="goes up to TOK_66 but the model has 70|goes up to N_66"):
        table.block_seconds(64, BlockDims(2, 20, 10, 100, 70))
    with pytest.raises(LatencyTableError, match="EMB_32 is not a key of a latency table; expected TOK_{tokens}"):
        LatencyTable({"TOK_20": tree(20), "EMB_32": tree(66)["EMB_32"]})


def test_the_published_keys_are_a_part_of_the_points():
    seconds = {"overhead/EMB_96": 1e-5, "attention/EMB_96/QK_3_8/V_8": 2.0}
    seconds |= {f"mlp/EMB_96/MLP_{m}": float(m) for m in range(8, 168, 8)}
    table = LatencyTable.of_parts(seconds, {})
    published = table.data["EMB_96"]["QK_3_8"]["V_8"]
    assert len(table.data["_parts"]["mlp"]["EMB_96"]) == 20 and len(published) == 9
    assert published["MLP_8"] == 10 and published["MLP_160"] == 162
    assert table.block_seconds(96, block(3, 8, 8, 20)) == pytest.approx(22)


def test_monotone_lookups_never_decrease_and_raw_ones_stay_raw(published):
    def clean(row):
        return published.blocks_seconds(np.array([row]), monotone=True)[0]

    for row in itertools.product(*AXES.values()):
        assert clean(row) >= published.blocks_seconds(np.array([row]))[0]
        for column, points in enumerate(AXES.values()):
            if (i := points.index(row[column])) > 0:
                assert clean(row) >= clean((*row[:column], points[i - 1], *row[column + 1 :]))
    assert published.block_seconds(64, block(1, 1, 8, 16)) == bumpy(64, 1, 1, 8, 16)


def test_monotone_report_counts_what_it_raises():
    dip = LatencyTable(tree(AXES, lambda *w: sum(w) if w != (64, 1, 16, 8, 64) else 32 + 1 + 16 + 8 + 64 - 21))
    report = dip.monotone_report()
    assert (report.raised, report.values) == (1, 3 * 2 * 3 * 2 * 3)
    neighbours = max(32 + 1 + 16 + 8 + 64, 64 + 1 + 1 + 8 + 64, 64 + 1 + 16 + 8 + 16)
    assert report.largest_change == pytest.approx(neighbours / 100 - 1)
    assert LatencyTable(tree(AXES, lambda *w: sum(w))).monotone_report() == (0, 108, 0.0)


def test_save_and_load_give_the_same_table(tmp_path):
    table = parts_table(tokens=66)
    path = tmp_path / "t.json"
    path.write_text("old")
    table.save(path)
    again = LatencyTable.load(path)
    assert again.data == table.data and again.meta == {"tokens": 66}
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def edited(change):
    data = parts_table(complete=True).data
    change(data)
    return json.dumps(data)


def at(data, *path):
    for key in path:
        data = data[key]
    return data


V, M = ("EMB_96", "QK_3_8", "V_8"), "MLP_64"
BAD_FILES = {
    "empty file": ("", ["empty"]),
    "empty object": ("{}", ["empty", "EMB_{embed}"]),
    "only meta": ('{"_meta": {}}', ["EMB_{embed}"]),
    "a list": ("[1]", ["empty"]),
    "not JSON": ('{"EMB_96":\n {"QK_1_1" 3}}', ["line 2 column 12"]),
    "deep nesting": ("[" * 200_000, ["nested too deeply"]),
    "odd key": (edited(lambda d: at(d, *V[:2]).update(W_8=1)), ["EMB_96 -> QK_3_8 -> W_8", "V_{v}"]),
    "leading zero": (edited(lambda d: at(d, *V).update(MLP_064=1)), ["MLP_064", "MLP_{mlp}"]),
    "odd top key": (edited(lambda d: d.update(emb_3={})), ["emb_3", "EMB_{embed}"]),
    "unknown underscore": (edited(lambda d: d.update(_extra={})), ["_extra", "_parts"]),
    "odd meta": (edited(lambda d: d.update(_meta=[])), ["_meta must be an object"]),
    "odd parts": (edited(lambda d: d["_parts"].pop("mlp")), ["_parts", "attention and mlp"]),
    "hole": (edited(lambda d: at(d, *V).pop(M)), ["hole", "EMB_96 -> QK_3_8 -> V_8 -> MLP_64 is missing"]),
    "hole in QK": (edited(lambda d: at(d, "EMB_32").pop("QK_1_32")), ["hole", "EMB_32 -> QK_1_32"]),
    "hole in parts": (edited(lambda d: d["_parts"]["mlp"]["EMB_32"].pop(M)), ["_parts -> mlp -> EMB_32 -> MLP_64"]),
    "empty node": (edited(lambda d: d["EMB_96"].update(QK_3_8={})), ["EMB_96 -> QK_3_8", "V_{v}"]),
    "number for node": (edited(lambda d: d["EMB_96"].update(QK_3_8=3)), ["EMB_96 -> QK_3_8", "V_{v}"]),
    "overhead": (edited(lambda d: d["_overhead"].update(EMB_96=-1)), ["_overhead -> EMB_96", "above 0"]),
    "interrupted": (edited(lambda d: d["_meta"].update(complete=False)), ["incomplete", "latency.build_table again"]),
}
BAD_VALUES = {
    "negative": -0.5,
    "zero": 0,
    "nan": float("nan"),
    "inf": float("inf"),
    "bool": True,
    "text": "0.1",
    "null": None,
    "huge": 10**400,
    "node": {"MLP_1": 1.0},
}
BAD_FILES |= {
    kind: (edited(lambda d, value=value: at(d, *V).update({M: value})), ["EMB_96 -> QK_3_8 -> V_8 -> MLP_64", "second"])
    for kind, value in BAD_VALUES.items()
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_every_defect_is_one_line_that_names_file_and_key(kind, tmp_path):
    content, words = BAD_FILES[kind]
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(LatencyTableError) as caught:
        LatencyTable.load(tmp_path / "bad.json")
    message = str(caught.value)
    assert "bad.json" in message and "\n" not in message
    assert [word for word in words if word not in message] == [], message


def test_missing_binary_and_oversized_files(tmp_path, monkeypatch):
    with pytest.raises(LatencyTableError, match=r"none\.json: cannot read .*No such file.*latency\.build_table"):
        LatencyTable.load(tmp_path / "none.json")
    with pytest.raises(LatencyTableError, match="cannot read"):
        LatencyTable.load(tmp_path)
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(LatencyTableError, match="not a text file"):
        LatencyTable.load(tmp_path / "binary.json")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(LatencyTableError, match="200,000,001 bytes"):
        LatencyTable.load(tmp_path / "large.json")
    monkeypatch.setattr("latency.grid.MAX_LEAVES", 100)
    with pytest.raises(LatencyTableError, match="more than 100 values"):
        LatencyTable(tree(AXES, bumpy))


def test_zero_seconds_are_fine_where_a_width_is_zero():
    axes = AXES | dict(mlp=(0, 64))
    table = LatencyTable(tree(axes, lambda e, h, q, v, m: m * 1e-3))
    assert table.block_seconds(96, block(3, 16, 8, 32)) == pytest.approx(0.032)
