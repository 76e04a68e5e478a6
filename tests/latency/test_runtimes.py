"""Tables from other runtimes: ONNX files of the parts, timed by onnxruntime or by a command."""

import json
import sys

import pytest
import torch

from latency import LatencyTable
from latency.build_table import get_args_parser, main
from latency.runtimes import Command, RuntimeFailed
from models import BlockDims, ViTDims

pytest.importorskip("onnxscript")
ARCH = "deit_tiny_distilled_patch16_224"
KWARGS = ["img_size=16", "patch_size=4", "embed_dim=48", "depth=2", "num_heads=3", "num_classes=10"]
POINTS = ["embed=2", "heads=2", "qk=2", "v=2", "mlp=2"]
WEIGH = """import onnx, sys
model = onnx.load(sys.argv[1])
print("input", model.graph.input[0].type.tensor_type.shape.dim[0].dim_value, "images")
print("took", 1e-3 * sum(len(t.raw_data) for t in model.graph.initializer), "ms")
"""


def build(output, *extra):
    return main(
        get_args_parser().parse_args(
            [
                "--model",
                ARCH,
                "--model-kwargs",
                *KWARGS,
                "--batch-size",
                "2",
                "--device",
                "cpu",
                "--rounds",
                "2",
                "--points",
                *POINTS,
                "--output",
                str(output),
                *extra,
            ]
        )
    )


@pytest.mark.slow
def test_onnxruntime(tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    assert build(tmp_path / "t.json", "--runtime", "onnxruntime") == 0
    table = LatencyTable.load(tmp_path / "t.json")
    dense = ViTDims(48, (BlockDims(3, 16, 16, 192, 18),) * 2)
    small = ViTDims(24, (BlockDims(1, 8, 8, 24, 18),) * 2)
    assert table.meta["runtime"].startswith("onnxruntime ") and 0 < table.ratio(small, dense) < 1


@pytest.mark.slow
def test_a_command_gets_the_file_and_its_last_number_counts(tmp_path, capsys):
    (tmp_path / "weigh.py").write_text(WEIGH)
    command = f"{sys.executable} {tmp_path / 'weigh.py'} {{onnx}}"
    assert build(tmp_path / "t.json", "--runtime", "command", command) == 0
    table = LatencyTable.load(tmp_path / "t.json")
    assert table.meta["device"] == f"command {command}"
    parts = table.data["_parts"]["mlp"]["EMB_48"]
    weights = 4 * 1e-6 * (2 * 48 * 192 + 192 + 48 + 2 * 48)  # seconds, as the command says them
    assert parts["MLP_192"] / table.meta["fit"]["factor"] == pytest.approx(weights, rel=0.02)


@pytest.mark.parametrize(
    "words, message",
    [
        (["command", "true"], "no {onnx}"),
        (["command", "no_such_program {onnx}"], "no program no_such_program"),
        (["command"], "--runtime must be"),
        (["tensorrt"], "--runtime must be"),
        (["onnxruntime", "--compile"], "--compile is torch's"),
    ],
)
def test_bad_arguments(tmp_path, capsys, words, message):
    assert build(tmp_path / "t.json", "--runtime", *words) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line, message",
    [
        ("sh -c 'echo fast' {onnx}", "printed no milliseconds above 0 but 'fast'"),
        ("sh -c 'echo -3' {onnx}", "printed no milliseconds"),
        ("sh -c 'echo no device >&2; exit 3' {onnx}", "ended with 3: no device"),
    ],
)
def test_a_command_that_fails_says_why(tmp_path, line, message):
    with pytest.raises(RuntimeFailed, match=message):
        Command(line).timer(tmp_path / "x.onnx", torch.zeros(1))()


@pytest.mark.slow
def test_a_failing_command_ends_the_build_in_one_line(tmp_path, capsys):
    assert build(tmp_path / "t.json", "--runtime", "command", "sh -c 'exit 7' {onnx}") == 1
    assert "ended with 7" in capsys.readouterr().err.splitlines()[-1]
    assert json.loads((tmp_path / "t.json.part").read_text())["_samples"] == {}
