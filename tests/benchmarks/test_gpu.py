"""What runs on a GPU, on a CPU: the whole script with shrunken models, and the training of a base model."""

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import gpu_review, merge_routes, strong_base
from models.pretrained import read_initial

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_step_of_the_gpu_script_runs(tmp_path):
    command = ["bash", "benchmarks/gpu.sh", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(TINY="1"), capture_output=True, text=True)
    log = (tmp_path / "log.txt").read_text()
    assert done.returncode == 0, log
    assert log.count("-- exit code 0") == log.count("== ") == 11 and "Traceback" not in log
    for number, measure in enumerate(gpu_review.MEASURED, start=1):
        assert f"\n{number} {measure.__name__.replace('_', ' ')}\n" in log


def test_a_suspicion_that_fails_is_counted_and_the_next_runs(monkeypatch, capsys):
    def broken(case):
        raise RuntimeError("no such kernel")

    def counted(case):
        print("ran on", case.device)

    monkeypatch.setattr(gpu_review, "MEASURED", (broken, counted))
    assert gpu_review.main(gpu_review.get_args_parser().parse_args(["--tiny", "--device", "cpu"])) == 1
    out, err = capsys.readouterr()
    assert "no such kernel" in err and "ran on cpu" in out


def test_every_way_to_gather_tokens_is_the_same():
    x, index = torch.randn(3, 10, 4), torch.tensor([1, 1, 7, 0, 9])
    for name, call in merge_routes.gathers(x, index).items():
        assert name == "copy" or torch.equal(call(), x[:, index]), name


def archive(path, each=12):
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w:gz") as tar:
        for split in ("train", "val"):
            for label in range(10):
                for number in range(each):
                    buffer = io.BytesIO()
                    pixels = rng.integers(0, 25, (32, 32, 3)) + 23 * label
                    Image.fromarray(pixels.astype(np.uint8)).save(buffer, "png")
                    info = tarfile.TarInfo(f"data/{split}/class{label}/{number}.png")
                    info.size = buffer.tell()
                    tar.addfile(info, io.BytesIO(buffer.getvalue()))
    return path


def test_a_base_is_trained_resumed_and_read(tmp_path, capsys):
    words = ["--archive", str(archive(tmp_path / "data.tar.gz")), "--output", str(tmp_path / "base.pth")]
    words += ["--device", "cpu", "--width", "64", "--depth", "1", "--batch-size", "40", "--resume"]
    for minutes in ("0.02", "0.04"):
        strong_base.main(strong_base.get_args_parser().parse_args([*words, "--minutes", minutes]))
    first, second = (int(line.split()[1].strip(",")) for line in capsys.readouterr().out.splitlines() if "augm" in line)
    assert 0 < first < second
    arch, kwargs, state = read_initial(str(tmp_path / "base.pth"))
    assert (arch, kwargs["depth"], len(state["head.weight"])) == (strong_base.ARCH, 1, 10)


def test_crops_and_flips_move_whole_images():
    """Every image is moved by one shift of its own, and mirrored or not."""
    torch.manual_seed(0)
    image = torch.arange(16).reshape(1, 1, 4, 4).to(torch.uint8)
    padded = torch.nn.functional.pad(image.float(), (1,) * 4, mode="reflect")[0, 0]
    allowed = [padded[i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    allowed += [crop.flip(1) for crop in allowed]
    moved = strong_base.crop_and_flip(image.expand(64, 1, 4, 4), padding=1).float()
    seen = {next(i for i, crop in enumerate(allowed) if torch.equal(crop, each[0])) for each in moved}
    assert len(seen) > 12
