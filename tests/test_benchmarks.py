"""Benchmarks run and print what they promise."""
import re

from benchmarks import pruning_overhead


def test_pruning_overhead_prints_ratios(capsys):
    pruning_overhead.main(pruning_overhead.get_args_parser().parse_args(["--batch-size", "2", "--rounds", "3"]))
    printed = capsys.readouterr().out
    assert len(re.findall(r"removed[^:]*: \d\.\d{3} x a step without pruning", printed)) == 2
    assert re.search(r"one selection: \d+\.\d ms", printed)
