"""timm's MLPs with any number of hidden units, and what lies between their first and last layers.

A unit of a gated MLP is a pair of rows, its gate and its value, and passes on act(gate) value: `GluMlp` holds the pairs
in one layer, `fc1`, `SwiGLU` in two, `fc1_g` and `fc1_x`. Whatever else holds for a unit of a plain `Mlp` holds for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from torch import Tensor, nn

MLPS = (Mlp, GluMlp, SwiGLU)
FIRST = ("fc1", "fc1_g", "fc1_x")


def sized_mlp(layer: Callable[..., nn.Module], embed: int, units: int, **kwargs: Any) -> nn.Module:
    """timm's MLP `layer` of `units` hidden units; kwargs: its other arguments."""
    packed = getattr(layer, "func", layer) is GluMlp  # whose width counts both rows of a pair
    return layer(embed, 2 * units if packed else units, **kwargs)


def first_layers(mlp: nn.Module) -> dict[str, nn.Linear]:
    """The layers of an MLP that read the residual stream, by name."""
    return {name: getattr(mlp, name) for name in FIRST if hasattr(mlp, name)}


def between(mlp: nn.Module) -> Callable[[Tensor], Tensor]:
    """What an MLP in eval mode makes of its first layers' outputs, side by side: (…, rows) -> (…, units)."""
    if isinstance(mlp, Mlp):
        return lambda x: mlp.norm(mlp.act(x))

    def gate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        if getattr(mlp, "gate_last", False):
            first, second = second, first
        return mlp.norm(mlp.act(first) * second)

    return gate
