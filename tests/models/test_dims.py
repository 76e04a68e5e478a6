"""The architecture as a value: conversions are exact, and what is wrong with a value is named."""

import json
from dataclasses import FrozenInstanceError, replace

import pytest
import timm

from models import BlockDims, DimsError, ModelError, ViTDims, build_vit, macs, skeleton
from models.swin_dims import SwinDims

BLOCK = dict(heads=3, qk=16, v=20, mlp=40, tokens=18)
DIMS = ViTDims(48, (BlockDims(**BLOCK), BlockDims(0, 0, 0, 7, 18)))


def test_dict_round_trip_through_json():
    data = json.loads(json.dumps(DIMS.to_dict()))
    assert data == dict(embed=48, blocks=[BLOCK, dict(heads=0, qk=0, v=0, mlp=7, tokens=18)])
    assert ViTDims.from_dict(data) == DIMS


def test_published_spelling_round_trip():
    dim = json.loads(json.dumps(DIMS.to_dim()))
    assert dim == {"EMB": 48, "head": [3, 0], "QK": [16, 0], "V": [20, 0], "MLP": [40, 7]}
    assert ViTDims.from_dim(dim, tokens=18) == DIMS
    per_block = ViTDims.from_dim(dim, tokens=[18, 9])
    assert [b.tokens for b in per_block.blocks] == [18, 9]


def test_of_reads_timm_and_our_models(family):
    arch, kwargs = family["arch"], {k: v for k, v in family.items() if k != "arch"}
    prefix = {"deit_tiny_distilled_patch16_224": 2}.get(arch, int(kwargs.get("class_token", True)))
    tokens = 16 + prefix + kwargs.get("reg_tokens", 0)
    expected = ViTDims(36, (BlockDims(4, 9, 9, 144, tokens),) * 2)
    assert ViTDims.of(timm.create_model(arch, **kwargs)) == expected
    assert ViTDims.of(build_vit(**family)) == expected
    dims = ViTDims(48, tuple(replace(b, tokens=tokens) for b in DIMS.blocks))
    assert ViTDims.of(build_vit(arch, dims, **kwargs)) == dims


def test_values_are_frozen_hashable_and_hold_tuples():
    with pytest.raises(FrozenInstanceError):
        DIMS.embed = 1
    with pytest.raises(FrozenInstanceError):
        DIMS.blocks[0].qk = 1
    assert hash(DIMS) == hash(ViTDims(48, list(DIMS.blocks)))


def test_sizes_are_keyed_by_axis():
    assert DIMS.sizes() == {
        "embed": 48,
        "blocks.0.heads": 3,
        "blocks.0.qk": 16,
        "blocks.0.v": 20,
        "blocks.0.mlp": 40,
        "blocks.1.heads": 0,
        "blocks.1.qk": 0,
        "blocks.1.v": 0,
        "blocks.1.mlp": 7,
    }


@pytest.mark.parametrize(
    "field, value, complaint",
    [
        ("heads", -1, "heads must be at least 0, not -1"),
        ("qk", 0, "qk must be at least 1, not 0"),
        ("v", 0, "v must be at least 1, not 0"),
        ("mlp", -4, "mlp must be at least 0, not -4"),
        ("tokens", 0, "tokens must be at least 1, not 0"),
        ("heads", 2.0, r"heads must be a whole number, not 2\.0"),
        ("mlp", "8", "mlp must be a whole number, not '8'"),
        ("qk", True, "qk must be a whole number, not True"),
        ("v", None, "v must be a whole number, not None"),
    ],
)
def test_bad_widths_are_named(field, value, complaint):
    with pytest.raises(DimsError, match=complaint):
        BlockDims(**BLOCK | {field: value})
    with pytest.raises(DimsError, match=f"block 1.*{complaint}"):
        ViTDims.from_dict(dict(embed=48, blocks=[BLOCK, BLOCK | {field: value}]))


@pytest.mark.parametrize("embed", [0, -8, 2.5, "8", None, True])
def test_bad_embed_is_named(embed):
    with pytest.raises(DimsError, match="embed must be"):
        ViTDims.from_dict(dict(embed=embed, blocks=[BLOCK]))


@pytest.mark.parametrize(
    "data, complaint",
    [
        (None, "found: NoneType"),
        ([], "found: list"),
        (dict(embed=8), "found: embed"),
        (dict(embed=8, blocks=[], depth=2), "depth"),
        (dict(embed=8, blocks=3), "blocks must be a list"),
        (dict(embed=8, blocks=[BLOCK, 5]), "block 1.*found: int"),
        (dict(embed=8, blocks=[{k: v for k, v in BLOCK.items() if k != "mlp"}]), "block 0 needs exactly the keys.*mlp"),
    ],
)
def test_bad_dicts_are_explained(data, complaint):
    with pytest.raises(DimsError, match=complaint):
        ViTDims.from_dict(data)


@pytest.mark.parametrize(
    "change, tokens, complaint",
    [
        ({"EMB": 0}, 18, "embed must be at least 1"),
        ({"QK": [16]}, 18, "different lengths.*'QK': 1"),
        ({"V": 20}, 18, "V.* must be lists"),
        ({"MLP": [40, "7"]}, 18, "mlp must be a whole number"),
        ({"EXTRA": 1}, 18, "exactly the keys"),
        ({}, [18], "2 blocks but 1 token counts"),
        ({}, 0, "tokens must be at least 1"),
    ],
)
def test_bad_published_spellings_are_explained(change, tokens, complaint):
    with pytest.raises(DimsError, match=complaint):
        ViTDims.from_dim(DIMS.to_dim() | change, tokens)


@pytest.mark.parametrize("use", [lambda axis: DIMS.width(axis), lambda axis: DIMS.resized({axis: 4})])
@pytest.mark.parametrize("axis", ["layers.0.embed", "layers.0.blocks.0.mlp"])
def test_a_stage_is_not_ignored(use, axis):
    with pytest.raises(DimsError, match=f"{axis} is an axis of a Swin Transformer"):
        use(axis)


class TestQueries:
    LEAN = ViTDims(8, (BlockDims(2, 4, 4, 16, 6), BlockDims(2, 4, 4, 16, 6, queries=1)))

    def test_they_are_left_out_where_every_token_asks(self):
        plain, lean = (block for block in self.LEAN.to_dict()["blocks"])
        assert plain == dict(heads=2, qk=4, v=4, mlp=16, tokens=6) and lean == plain | dict(queries=1)
        assert ViTDims.from_dict(self.LEAN.to_dict()) == self.LEAN
        assert ViTDims.from_dict(dict(embed=8, blocks=[plain, plain])) == self.LEAN.with_queries(None)

    def test_they_stay_when_widths_change(self):
        smaller = self.LEAN.resized({"blocks.1.mlp": 8, "embed": 4})
        assert smaller.blocks[1].queries == 1 and smaller.sizes()["blocks.1.mlp"] == 8
        assert self.LEAN.with_queries(2).blocks[1].queries == 2 and ViTDims(8, ()).with_queries(2) == ViTDims(8, ())

    @pytest.mark.parametrize(
        "queries, complaint", [(0, "at least 1"), (7, "at most the 6 tokens"), (1.0, "whole number")]
    )
    def test_bad_ones_are_refused(self, queries, complaint):
        with pytest.raises(DimsError, match=complaint):
            BlockDims(2, 4, 4, 16, 6, queries=queries)

    def test_a_swin_transformer_has_none(self):
        with pytest.raises(DimsError, match="Swin Transformer takes no `queries`"):
            SwinDims((self.LEAN,))

    def test_the_argument_and_the_dims_say_the_same(self, tiny):
        by_argument = build_vit(**tiny, lean_last=True)
        by_dims = build_vit(dims=by_argument.dims, **tiny)
        assert by_argument.dims.blocks[-1].queries == 2 and by_dims.dims == by_argument.dims
        assert by_dims.arch_kwargs == by_argument.arch_kwargs and by_dims.blocks[-1].num_queries == 2
        counts = [macs(**tiny, dims=by_dims.dims), macs(**tiny, lean_last=True)]
        assert counts[0] == counts[1] < macs(**tiny)

    @pytest.mark.parametrize("queries, block", [(3, 1), (2, 0)])
    def test_what_the_head_reads_alone_can_be_queries(self, tiny, queries, block):
        dims = ViTDims.of(skeleton(**tiny))
        blocks = list(dims.blocks)
        blocks[block] = replace(blocks[block], queries=queries)
        with pytest.raises(ModelError, match="only the 2 prefix tokens of the last block"):
            build_vit(dims=ViTDims(dims.embed, tuple(blocks)), **tiny)
