"""The documentation does what it says: snippets run, the tutorial runs from its first command to its last."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from benchmarks.one_shot_cost import table_of_macs
from models import ViTDims, load_dense
from recipes import api
from tools import api_reference

ROOT = Path(__file__).parent.parent


def blocks(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_readme_fits_and_its_snippet_runs(tmp_path, monkeypatch):
    """With a table that is not measured: beside other tests no target would be sure."""
    size = dict(img_size=16, patch_size=4, depth=2, num_heads=4)
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=32, **size)
    names = dict(model=model, images=torch.randn(64, 3, 16, 16))
    monkeypatch.setattr(api, "find_or_measure", lambda arch, *_, **__: table_of_macs(arch.dims))
    monkeypatch.chdir(tmp_path)
    for block in blocks("README.md", "python"):
        exec(block.replace("PATH_OF_THIS_PROJECT", str(ROOT)), names)
    assert load_dense(tmp_path / "half").dims == names["small"].dims != ViTDims.of(model)
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_adding_a_method_works_as_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("docs/add_a_method.md", "python"):
        exec(block, names)
    assert load_dense(tmp_path / "pruned_checkpoint.pth").dims == names["masks"].dims
    model = names["model"]
    scores = names["weight_norms"](model)
    row = model.blocks[1].mlp.fc1.weight[5].square().sum() + model.blocks[1].mlp.fc1.bias[5].square()
    column = model.blocks[1].mlp.fc2.weight[:, 5].square().sum()
    np.testing.assert_allclose(scores["blocks.1.mlp"][5], (row + column).item(), rtol=1e-5)


def test_the_api_reference_is_of_this_code():
    """Whoever changes a public name runs python -m tools.api_reference."""
    page = (ROOT / "docs" / "api.md").read_text()
    assert sys.version_info[:2] != (3, 11) or page == api_reference.reference()
    assert all(f"`{name}`" in page for names in api_reference.PUBLIC.values() for name in names)


def test_the_citation_is_valid():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= set(cited)
    assert f'version = "{cited["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert [reference["year"] for reference in cited["references"]] == [2023, 2022, 2025]


@pytest.mark.slow
def test_a_newcomers_path(tmp_path):
    """From a folder of images to a pruned model in onnxruntime, by the tutorial's own commands, in its ten minutes."""
    pytest.importorskip("onnxruntime")
    here = f"mkdir -p {tmp_path}/runs && ln -s {ROOT}/* {tmp_path} 2> /dev/null; cd {tmp_path}"
    commands = "\n".join(["set -e", *blocks("docs/tutorial.md", "bash")])
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    begin = os.times().children_user
    done = subprocess.run(
        ["bash", "-c", f"{here}\n{commands}"], env=os.environ | dict(PATH=path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert os.times().children_user - begin < 600, "seconds of computing"
    (snippet,) = blocks("docs/tutorial.md", "python")
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)
    out = tmp_path / "runs" / "tutorial"
    summary = json.loads((out / "summary.json").read_text())
    dense, pruned, tuned = (summary[name] for name in ("dense", "pruned", "finetuned"))
    assert dense["top1"] > 80 and tuned["top1"] > dense["top1"] - 3 and pruned["top1"] > dense["top1"] - 8
    assert pruned["latency_predicted"] <= 0.6 and tuned["latency_measured"] < 0.8 and (out / "report.html").exists()
    (moved,) = (out / "transfer").glob("ft_dense_*/summary.json")
    assert list(json.loads(moved.read_text())) == ["finetuned"]


@pytest.mark.slow
def test_the_notebook_runs_and_keeps_what_the_model_knows(monkeypatch, tmp_path):
    """Its code, cell by cell; what is stored with it was printed by it, and names no folder of ours."""
    text = (ROOT / "docs" / "prune_your_vit.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells[1:]) and str(Path.home()) not in text
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "agg")
    code = "\n".join("".join(cell["source"]) for cell in cells)
    code += "\nprint('LOST', *(top1(model) - top1(small) for small in sizes.values()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "docs", capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    lost = [float(word) for word in done.stdout.split("LOST")[1].split()]
    assert "the same predictions: True" in done.stdout and max(lost[:2]) <= 3 and lost[2] <= 50
