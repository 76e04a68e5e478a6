"""Latency on the user's device: tables, and the measurements they come from."""
from latency.grid import LatencyTableError
from latency.measure import Ratio, Timing, device_name, interleaved, ratio
from latency.table import LatencyTable, MonotoneReport

__all__ = [
    "LatencyTable", "LatencyTableError", "MonotoneReport", "Ratio", "Timing", "device_name", "interleaved", "ratio",
]  # fmt: skip
