"""Dense weights as other programs save them give the same logits; what cannot be read is said in one line."""

import argparse
import gzip
import re
import zipfile

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from files.checkpoint import CheckpointError
from models.foreign import adapt
from models.pretrained import find_initial, load_initial_
from training.full_model import load_cnn_teacher, read_full_model
from training.sources import Source, Teacher

ARCH = "vit_tiny_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4)
CLASSES = dict(num_classes=10)


@pytest.fixture
def model(randomise):
    return randomise(timm.create_model(ARCH, **KWARGS | CLASSES)).eval()


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def full_model(path, ema=False, arch=ARCH, **kwargs):
    return read_full_model(Source(arch, KWARGS | kwargs, weights=str(path), ema=ema)).with_kwargs(**CLASSES)


def saved(path, content):
    torch.save(content, path)
    return path


WRAPPED = {
    "ddp": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "both": lambda state: prefixed(state, "module._orig_mod."),
    "timm": lambda state: dict(epoch=3, arch=ARCH, state_dict=state, args=argparse.Namespace(lr=0.1), version=2),
    "tagged": lambda state: dict(arch=f"{ARCH}.augreg_in21k", state_dict=prefixed(state, "module.")),
    "lightning": lambda state: dict(state_dict=prefixed(state, "model.") | {"loss.weight": torch.ones(3)}, epoch=1),
    "lightning_compiled": lambda state: dict(state_dict=prefixed(state, "model._orig_mod.")),
    "averaged": lambda state: prefixed(state, "module.") | dict(n_averaged=torch.tensor(3)),
    "tutorial": lambda state: dict(epoch=3, model_state_dict=state, optimizer_state_dict=dict(state={})),
    "one_dict": lambda state: dict(step=3, weights=state),
    "deit": lambda state: dict(model=state, model_ema=prefixed(state, "wrong."), args=argparse.Namespace(lr=0.1)),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_wraps_the_names_is_taken_off(kind, model, images, tmp_path):
    full = full_model(saved(tmp_path / "x.pth", WRAPPED[kind](model.state_dict())))
    assert torch.equal(full.build().eval()(images), model(images))
    full.check_classifier()


def test_safetensors_are_read_whatever_their_name(model, images, tmp_path):
    for name in ("model.safetensors", "x.pth"):
        save_file(model.state_dict(), tmp_path / name)
        assert torch.equal(full_model(tmp_path / name).build().eval()(images), model(images))
    assert torch.equal(full_model(tmp_path).build().eval()(images), model(images)), "the folder of a model"
    for content in (b"", (tmp_path / "x.pth").read_bytes()[:3000]):
        (tmp_path / "half.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"half.safetensors is (empty|a damaged safetensors file)"):
            full_model(tmp_path / "half.safetensors")


@pytest.mark.parametrize("key", ["state_dict_ema", "model_ema", "ema.module", "teacher"])
def test_the_moving_average_is_taken_where_asked(key, model, randomise, images, tmp_path):
    other = randomise(timm.create_model(ARCH, **KWARGS | CLASSES)).eval()
    both = dict(state_dict=other.state_dict(), student=other.state_dict())
    both = both | {key: prefixed(model.state_dict(), "module.")}
    if "." in key:
        both = dict(state_dict=prefixed(other.state_dict(), "net.") | prefixed(model.state_dict(), f"{key}."))
    path = saved(tmp_path / "x.pth", both)
    for ema, wanted in ((True, model), (False, other)):
        assert torch.equal(full_model(path, ema).build().eval()(images), wanted(images))
    with pytest.raises(CheckpointError, match=r"--use-ema: .* holds no moving average"):
        full_model(saved(tmp_path / "y.pth", dict(state_dict=other.state_dict())), ema=True)


def test_dino_gives_its_teacher_without_a_classifier(model, images, tmp_path, capsys):
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("head")}
    projection = {"head.mlp.0.weight": torch.ones(8, 32), "head.last_layer.weight_g": torch.ones(8, 1)}
    content = dict(
        student=prefixed(prefixed(state, "backbone.") | projection, "module."),
        teacher=prefixed(state, "backbone.") | projection,
        args=argparse.Namespace(arch="vit_small"),
    )
    full = full_model(saved(tmp_path / "x.pth", content))
    built = full.build().eval()
    assert torch.equal(built.forward_features(images), model.forward_features(images))
    said = capsys.readouterr().out
    assert "teacher taken" in said and "left out head.mlp.0.weight, head.last_layer.weight_g" in said
    assert "has no classifier: head.weight, head.bias start fresh" in said
    with pytest.raises(ValueError, match=r"x.pth has no classifier \(head.weight, head.bias\): first train"):
        full.check_classifier()


def as_transformers(state, prefix, heads):
    """timm's names as Hugging Face transformers' of ViT and DeiT."""
    renamed = {}
    for name, value in state.items():
        if name.startswith("head"):
            renamed[heads[name.partition(".")[0]] + "." + name.partition(".")[2]] = value
        elif ".qkv." in name:
            i, end = name.split(".")[1], name.split(".")[-1]
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                renamed[f"{prefix}encoder.layer.{i}.attention.attention.{part}.{end}"] = rows
        else:
            for timms, theirs in (
                (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
                (r"^blocks\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
                (r"^blocks\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
                (r"^blocks\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
                (r"^blocks\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
                (r"^norm\.", "layernorm."),
                (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
                (r"^pos_embed", "embeddings.position_embeddings"),
                (r"^dist_token", "embeddings.distillation_token"),
                (r"^cls_token", "embeddings.cls_token"),
            ):
                name = re.sub(timms, theirs, name)
            renamed[prefix + name] = value
    return renamed


@pytest.mark.parametrize("prefix", ["vit.", "model.vit."])
def test_vit_of_transformers(prefix, model, images, tmp_path, capsys):
    state = as_transformers(model.state_dict(), prefix, dict(head=prefix[:-4] + "classifier"))
    state |= {f"{prefix}pooler.dense.weight": torch.ones(32, 32)}
    full = full_model(saved(tmp_path / "x.pth", state))
    assert torch.equal(full.build().eval()(images), model(images))
    assert "left out pooler.dense.weight" in capsys.readouterr().out


def test_deit_of_transformers(randomise, images, tmp_path):
    arch = "deit_tiny_distilled_patch16_224"
    model = randomise(timm.create_model(arch, **KWARGS | CLASSES)).eval()
    heads = dict(head="cls_classifier", head_dist="distillation_classifier")
    save_file(as_transformers(model.state_dict(), "deit.", heads), tmp_path / "model.safetensors")
    full = full_model(tmp_path / "model.safetensors", arch=arch)
    full.check_classifier()
    assert torch.equal(full.build().eval()(images), model(images))
    state = as_transformers(model.state_dict(), "deit.", heads)
    one = {k: v for k, v in state.items() if not k.startswith("distillation_classifier")}
    with pytest.raises(ValueError, match=r"has no classifier \(head_dist.weight, head_dist.bias\)"):
        full_model(saved(tmp_path / "one.pth", one), arch=arch).check_classifier()


def test_names_of_version_5_of_transformers(model, images, tmp_path):
    state = {
        name.replace("encoder.layer.", "layers.")
        .replace("attention.attention.query", "attention.q_proj")
        .replace("attention.attention.key", "attention.k_proj")
        .replace("attention.attention.value", "attention.v_proj")
        .replace("attention.output.dense", "attention.o_proj")
        .replace("intermediate.dense", "mlp.fc1")
        .replace(".output.dense", ".mlp.fc2"): value
        for name, value in as_transformers(model.state_dict(), "vit.", dict(head="classifier")).items()
    }
    assert "vit.layers.0.attention.q_proj.weight" in state and "vit.layers.1.mlp.fc2.bias" in state
    assert torch.equal(full_model(saved(tmp_path / "x.pth", state)).build().eval()(images), model(images))


def test_clip_of_transformers(randomise, images, tmp_path):
    """With its text model beside it; vectors where timm has tokens."""
    arch = "vit_base_patch16_clip_224"
    model = randomise(timm.create_model(arch, **KWARGS | CLASSES)).eval()
    own, state = model.state_dict(), {"text_model.embeddings.token_embedding.weight": torch.ones(4, 3)}
    theirs = (
        (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layers.\1.self_attn.out_proj"),
        (r"^blocks\.(\d+)\.norm([12])", r"encoder.layers.\1.layer_norm\2"),
        (r"^blocks\.(\d+)\.mlp", r"encoder.layers.\1.mlp"),
        (r"^norm_pre", "pre_layrnorm"),
        (r"^norm\.", "post_layernorm."),
        (r"^patch_embed\.proj", "embeddings.patch_embedding"),
        (r"^pos_embed", "embeddings.position_embedding.weight"),
        (r"^cls_token", "embeddings.class_embedding"),
    )
    for name, value in own.items():
        if match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", name):
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                state[f"vision_model.encoder.layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = rows
        elif not name.startswith("head"):
            short = name
            for pattern, to in theirs:
                short = re.sub(pattern, to, short)
            value = {"cls_token": value.flatten(), "pos_embed": value[0]}.get(name, value)
            state[f"vision_model.{short}"] = value
    built = full_model(saved(tmp_path / "x.pth", state), arch=arch).build().eval()
    assert torch.equal(built.forward_features(images), model.forward_features(images))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_of_transformers(registers, randomise, images, tmp_path):
    arch = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    model = randomise(timm.create_model(arch, **KWARGS)).eval()
    own = model.state_dict()
    scales = {
        re.sub(r"blocks\.(\d+)\.ls([12])\.gamma", r"encoder.layer.\1.layer_scale\2.lambda1", name): value
        for name, value in own.items()
        if ".ls" in name
    }
    state = as_transformers({k: v for k, v in own.items() if ".ls" not in k}, "", {})
    for theirs, dinos in (("layernorm_before", "norm1"), ("layernorm_after", "norm2")):
        state = {name.replace(theirs, dinos): value for name, value in state.items()}
    for theirs, dinos in (("intermediate.dense", "mlp.fc1"), ("0.output.dense", "0.mlp.fc2")):
        state = {name.replace(theirs, dinos): value for name, value in state.items()}
    state = {re.sub(r"layer\.(\d+)\.output\.dense", r"layer.\1.mlp.fc2", name): v for name, v in state.items()}
    state |= scales | {"embeddings.mask_token": torch.ones(1, 32)}
    if registers:  # timm adds the class token's position to the token itself
        state["embeddings.register_tokens"] = state.pop("reg_token")
        grid = state["embeddings.position_embeddings"]
        state["embeddings.position_embeddings"] = torch.cat([torch.full((1, 1, 32), 0.5), grid], 1)
        state["embeddings.cls_token"] = state["embeddings.cls_token"] - 0.5
    full = read_full_model(Source(arch, KWARGS, weights=str(saved(tmp_path / "x.pth", state))))
    built = full.arch.with_kwargs(num_classes=0).build().eval()
    assert load_initial_(built, full.state, "x.pth") == []
    torch.testing.assert_close(built(images), model(images))


def test_positions_of_another_size_are_resampled_by_timm(model, tmp_path, capsys):
    larger = timm.create_model(ARCH, **KWARGS | dict(img_size=32)).state_dict()
    full = full_model(saved(tmp_path / "x.pth", larger))
    expected = timm.models.vision_transformer.checkpoint_filter_fn(larger, model)["pos_embed"]
    assert torch.equal(full.state["pos_embed"], expected) and expected.shape == (1, 17, 32)
    assert "position embedding resampled from 65 tokens to 17 tokens" in capsys.readouterr().out
    patches = full_model(saved(tmp_path / "y.pth", model.state_dict()), patch_size=8)
    assert patches.state["patch_embed.proj.weight"].shape == (32, 3, 8, 8)
    assert "patch embedding resampled from 4x4 to 8x8" in capsys.readouterr().out


def test_positions_of_other_prefix_tokens(model, images, tmp_path, capsys):
    """A class token brings its position along where the model has none for it: the same function."""
    path = saved(tmp_path / "x.pth", model.state_dict())
    full = full_model(path, no_embed_class=True)
    assert full.state["pos_embed"].shape == (1, 16, 32)
    torch.testing.assert_close(full.build().eval()(images), model(images))
    assert "positions of 1 prefix tokens, the model has 0" in capsys.readouterr().out
    back = full_model(saved(tmp_path / "y.pth", full.state))
    torch.testing.assert_close(back.build().eval()(images), model(images))
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", **KWARGS | CLASSES).state_dict()
    plain = full_model(saved(tmp_path / "z.pth", distilled))
    kept = [0, *range(2, 18)]
    assert torch.equal(plain.state["pos_embed"], distilled["pos_embed"][:, kept])
    assert "left out dist_token, head_dist.weight, head_dist.bias" in capsys.readouterr().out


def test_a_cnn_teacher_is_read_by_the_same_rules(tmp_path, images):
    torch.manual_seed(0)
    cnn = timm.create_model("resnet18", num_classes=5).eval()
    content = dict(state_dict=prefixed(cnn.state_dict(), "model.") | {"metric.n": torch.ones(1)})
    teacher = load_cnn_teacher(Teacher("resnet18", str(saved(tmp_path / "x.ckpt", content))), 5, torch.device("cpu"))
    assert torch.equal(teacher(images), cnn(images))
    with pytest.raises(ValueError, match=r"CNN teacher resnet18: .* has no classifier .* patches of 4"):
        vit = saved(tmp_path / "vit.pth", timm.create_model(ARCH, **KWARGS, num_classes=0).state_dict())
        load_cnn_teacher(Teacher("resnet18", str(vit)), 5, torch.device("cpu"))


def test_what_does_not_fit_is_counted_and_named(model, tmp_path):
    state = model.state_dict()
    other = timm.create_model("resnet18").state_dict()
    for content, words in (
        (other, "30 missing names: cls_token, pos_embed, patch_embed.proj.weight and 27 more; .* names of a ResNet"),
        (
            {k: v for k, v in state.items() if "blocks.1" not in k},
            "12 missing names: blocks.1.norm1.weight, .* 1 blocks",
        ),
        (timm.create_model(ARCH, **KWARGS | dict(depth=3)).state_dict(), "12 names without a place: blocks.2"),
        (
            timm.create_model(ARCH, **KWARGS | dict(embed_dim=64)).state_dict(),
            "other shapes: .* embedding 64, 2 blocks",
        ),
    ):
        with pytest.raises(CheckpointError, match=words) as error:
            full_model(saved(tmp_path / "x.pth", content)).build()
        assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_several_models_in_one_file_are_refused(model, tmp_path):
    state = model.state_dict()
    two = dict(state_dict=prefixed(state, "left.") | prefixed(state, "right."))
    with pytest.raises(CheckpointError, match=r"holds several models \(left, right\)"):
        find_initial(saved(tmp_path / "x.pth", two))
    with pytest.raises(CheckpointError, match="it holds several: a, b"):
        find_initial(saved(tmp_path / "y.pth", dict(a=state, b=state)))
    with pytest.raises(CheckpointError, match="it holds epoch, loss"):
        find_initial(saved(tmp_path / "z.pth", dict(epoch=3, loss=0.5)))


def test_adapting_leaves_what_it_is_given(model):
    state = model.state_dict()
    before = dict(state)
    adapted, notes = adapt(state, model, ARCH, "x.pth")
    assert state.keys() == before.keys() == adapted.keys() and notes == []


def test_files_that_are_no_weights_say_what_they_are(model, tmp_path):
    contents = {
        "lfs.safetensors": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
        "page.pth": (b"<!DOCTYPE html><html>", "is a web page"),
        "x.pth.gz": (gzip.compress(b"weights"), "is compressed with gzip"),
        "x.onnx": (b"\x08\x07pytorch", "is an ONNX model"),
        "x.index.json": (b"{}", "is JSON"),
    }
    for name, (content, words) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match=words):
            find_initial(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as script:
        script.writestr("script/code/__torch__.py", "def forward(): pass")
    np.savez(tmp_path / "jax.npz", a=np.ones(3))
    torch.save(model, tmp_path / "whole.pth")
    words = {"script.pt": "TorchScript", "jax.npz": "NumPy archive", "whole.pth": r"save the model's state_dict\(\)"}
    for name, part in words.items():
        with pytest.raises(CheckpointError, match=part):
            find_initial(tmp_path / name)
    listed = "lfs.safetensors, page.pth, script.pt, whole.pth"
    with pytest.raises(CheckpointError, match=f"is a folder: name the file, one of {listed}"):
        find_initial(tmp_path)
    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(CheckpointError, match="holds weights in several files"):
        find_initial(tmp_path)


def test_quantised_weights_are_refused(model, tmp_path):
    state = {name: (100 * value).to(torch.int8) for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match="32 tensors of whole numbers, as if quantised: cls_token"):
        full_model(saved(tmp_path / "x.pth", state)).build()
