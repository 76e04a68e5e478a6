"""Patches spread evenly over a grid, and which of them is the nearest."""

from __future__ import annotations

import torch
from torch import Tensor


def spread_order(grid: tuple[int, int], layer: int) -> Tensor:
    """All patches (N,) in an order whose first n are spread evenly over the grid, for every n; layers differ.

    That in which the R2 low-discrepancy sequence (Roberts 2018) visits them, from a point that the layer decides.
    """
    rows, columns = grid
    plastic = 1.32471795724474602596
    steps = torch.arange(64 * rows * columns, dtype=torch.float64) + 1000 * layer
    y, x = ((0.5 + steps / plastic**power) % 1 for power in (1, 2))
    visited = ((y * rows).long() * columns + (x * columns).long()).tolist()
    return torch.tensor(list(dict.fromkeys([*visited, *range(rows * columns)])))


def spread_evenly(grid: tuple[int, int], layer: int, count: int) -> Tensor:
    """The first `count` patches of `spread_order`: (N,) bool."""
    order = spread_order(grid, layer)
    return torch.zeros(len(order), dtype=torch.bool).index_fill(0, order[:count], True)


def nearest_on_grid(centres: Tensor, grid: tuple[int, int]) -> Tensor:
    """The nearest centre in two dimensions; a tie goes to the first. (N,) bool -> index among the centres, (N,)."""
    places = torch.arange(len(centres))
    points = torch.stack([places // grid[1], places % grid[1]], 1)
    squares = (points[:, None] - points[centres]).square().sum(-1)  # exact: whole numbers
    return squares.argmin(1)
