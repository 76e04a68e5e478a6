"""The quickstart as a newcomer runs it, from another directory."""

import json
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timeout(1800)  # three minutes on an idle machine, and it measures until latencies settle
def test_the_quickstart_shows_speed_ups_at_the_same_accuracy(tmp_path):
    done = subprocess.run(["bash", ROOT / "scripts" / "quickstart.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    out = ROOT / "runs" / "quickstart"
    content = json.loads((out / "one_shot" / "sizes.json").read_text())
    dense = content["top1_dense"]
    assert dense >= 92 and [size["target"] for size in content["sizes"]] == [0.7, 0.5, 0.3]
    for size, lost in zip(content["sizes"], (1.5, 2.5, 6), strict=True):
        assert size["top1"] >= dense - lost and size["latency_measured"] <= size["target"]
    tuned = out / "nvit" / "finetuned"
    summary = json.loads((tuned / "summary.json").read_text())
    assert list(summary) == ["dense", "pruned", "finetuned"]
    assert summary["pruned"]["latency_measured"] <= 0.5 and summary["finetuned"]["top1"] >= dense - 5
    masked = (out / "nvit" / "pruned_checkpoint.pth").stat().st_size
    assert (tuned / "ft_checkpoint.pth").stat().st_size < masked / 2
    assert (out / "one_shot" / "pareto.png").stat().st_size > 10_000 and (out / "report.html").exists()
    *_, page, yours = done.stdout.splitlines()
    assert page == f"report: {(out / 'report.html').as_uri()}" and "D finetuned" in done.stdout
    assert yours.startswith("your own model: ") and "--one_shot --model" in yours
