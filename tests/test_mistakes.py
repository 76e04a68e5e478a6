"""What a user reads after the forty most likely mistakes, word for word: tests/golden/mistakes.txt.

`UPDATE_GOLDEN=1 pytest tests/test_mistakes.py` writes the file anew; look at what has changed.
"""

import json
import os
import pickle
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import table_file
from PIL import Image

import finetune_dense
import main_full_global_latency
import main_pm_vit
import main_savit
import main_savit_deploy
import revit_scratch
from files import checkpoint
from models import Masks, build_vit
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "mistakes.txt"
ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=10)
DATA = "--data-set DIGITS --num_workers 0 --device cpu"
GOOD = dict(  # {} is the folder of the fixture below
    prune=(
        main_full_global_latency,
        DATA + " --initial-checkpoint {}/dense.pth --latency_look_up_table {}/table.json "
        "--pruning --latency_target 0.6 --original_loss_coeff 1 --output_dir {}/out",
    ),
    tune=(finetune_dense, DATA + " --finetune {}/pruned --kl_loss_coeff 0 --original_loss_coeff 1"),
    dense=(finetune_dense, DATA + " --kl_loss_coeff 0 --original_loss_coeff 1 --output_dir {}/out"),
    revit=(
        revit_scratch,
        DATA + f" --scratch --model {ARCH} --model-kwargs img_size=16 patch_size=4 "
        "--kl_loss_coeff 0 --original_loss_coeff 1 --output_dir {}/out",
    ),
    savit=(main_savit, DATA + " --output_dir {}/out"),
    deploy=(main_savit_deploy, DATA + " --output_dir {}/out"),
)
MISTAKES = """
prune --data-set IMNET --data-path {}/nowhere
prune --data-set IMNET --data-path {}/pruned
prune --data-set IMNET --data-path {}/uneven
prune --data-set IMNET --data-path {}/empty
prune --data-set IMNET
prune --data-set CIFAR10 --data-path {}/pruned
prune --data-set IMNET --data-path {}/two
prune --model deit_tiny_distiled_patch16_224 --initial-checkpoint ''
prune --model resnet18 --initial-checkpoint ''
prune --model vit_tiny_patch16_224
prune --initial-checkpoint {}/none.pth
prune --initial-checkpoint {}/notes.txt
prune --initial-checkpoint {}/half.pth
prune --initial-checkpoint {}/code.pth
prune --align --initial-checkpoint {}/pruned/pruned_checkpoint.pth
prune --initial-checkpoint ''
prune --input-size 32
prune --model-kwargs depth
prune --latency_look_up_table {}/none.json
prune --latency_look_up_table {}/notes.txt
prune --latency_look_up_table {}/narrow.json
prune --latency_target 54
prune --latency_target 0.0001
prune --prune_dict Global:39000
prune --prune_per_iter 8
prune --pruning_config {}/notes.txt
prune --pruning_config {}/config.json
prune --batch-size 2000 --mixup 0 --cutmix 0
prune --batch-size 63
prune --opt adamv
prune --original_loss_coeff 0
prune --output_dir {}/notes.txt/out
prune --resume
prune --latency-target 0.5
tune --finetune {}/nowhere
tune --finetune {}/dense.pth
tune --use-ema
dense --eval
revit --dims {}/dims.json
savit --finetune {}/dense.pth --pruning_flops_percentage 50
""".strip().splitlines()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A good dense model, a pruned one, a table; and what goes wrong with each."""
    root = tmp_path_factory.mktemp("mistakes")
    torch.manual_seed(0)
    model = build_vit(ARCH, **KWARGS)
    torch.save(dict(arch=ARCH, kwargs=KWARGS, model=model.state_dict()), root / "dense.pth")
    (root / "half.pth").write_bytes((root / "dense.pth").read_bytes()[:9000])
    torch.save(dict(model=pickle.Pickler), root / "code.pth")
    masks = Masks(model.dims)
    masks.remove("embed", torch.arange(8))
    masks.install_(model)
    (root / "pruned").mkdir()
    checkpoint.save(
        root / "pruned" / "pruned_checkpoint.pth",
        arch=dict(name=ARCH, kwargs=KWARGS),
        args={},
        dims=masks.dims.to_dict(),
        masks=masks.keep,
        model=model.state_dict(),
    )
    table = json.loads(table_file(root / "table.json").read_text())
    (root / "narrow.json").write_text(json.dumps({"EMB_4": table["EMB_4"]}))
    (root / "notes.txt").write_text("hello\n")
    (root / "config.json").write_text('{"criterion": "taylor_sq", "momentun": 0.9}')
    (root / "dims.json").write_text(json.dumps(dict(embed=32, blocks=[dict(heads=-4, qk=8, v=8, mlp=128, tokens=18)])))
    for folder, classes in dict(two=("ant", "bee"), uneven=("ant", "bee"), empty=("ant", "bee")).items():
        for split in ("train", "val"):
            for name in classes:
                inner = root / folder / split / (name if (folder, split, name) != ("uneven", "val", "bee") else "cat")
                inner.mkdir(parents=True)
                if (folder, name) != ("empty", "bee"):
                    for i in range(40):
                        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(inner / f"{i}.png")
    return root


def message(place, mistake, capsys):
    """The command as a user gives it, and all lines that it ends with."""
    name, *flags = shlex.split(mistake.replace("{}", str(place)))
    script, good = GOOD[name]
    words = [*shlex.split(good.replace("{}", str(place))), *flags]
    with pytest.raises(SystemExit) as end:
        run_script(script.main, script.get_args_parser().parse_args(words))
    said = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    said = [line[line.index("error: ") :] for line in said]  # argparse puts its program's name before
    assert end.value.code == 2 and said
    return "\n".join([f"{Path(script.__file__).name}: … {mistake.partition(' ')[2]}", *said])


@pytest.mark.parametrize("script", [main_full_global_latency, main_pm_vit, main_savit])
def test_the_example_in_the_help_is_no_mistake(place, script, tmp_path, monkeypatch):
    for name in ("dense.pth", "table.json"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    text = script.get_args_parser().epilog.partition(": ")[2].partition("\n     ")[0]
    args = script.get_args_parser().parse_args([*shlex.split(text)[2:], "--device", "cpu", "--num_workers", "0"])
    if hasattr(args, "pruning_config"):
        args.pruning_config = str(ROOT / args.pruning_config)
    script.check_args(args)  # raises BadArguments


def test_what_the_user_reads(place, capsys):
    assert len(MISTAKES) == 40
    before = sorted(place.rglob("*"))
    found = [message(place, mistake, capsys).replace(str(place), "{}") for mistake in MISTAKES]
    assert sorted(place.rglob("*")) == before, "a mistake wrote something"
    text = "\n\n".join(found) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    for ours, golden in zip(text.split("\n\n"), GOLDEN.read_text().split("\n\n"), strict=True):
        assert ours.strip() == golden.strip()
