"""Latency on the user's device: tables, and the measurements they come from."""

from latency.grid import LatencyTableError
from latency.measure import Ratio, Timing, interleaved, ratio
from latency.table import LatencyTable, MonotoneReport
from runtime.device import device_name

__all__ = [
    "LatencyTable",
    "LatencyTableError",
    "MonotoneReport",
    "Ratio",
    "Timing",
    "device_name",
    "interleaved",
    "ratio",
]
