"""The debug folder of a pruning run: remaining widths and the state of every axis at each event, as published."""

from __future__ import annotations

from pathlib import Path

from models.masks import Masks
from models.swin_dims import Dims
from pruning.global_latency import Event

LISTS = dict(head="heads", QK="qk", V="v", MLP="mlp")


def dimension_row(dims: Dims) -> str:
    """EMB (of every stage), then all heads, all QK, all V, all MLP: 1 + 4 x depth whole numbers of a plain ViT."""
    lists = (getattr(b, axis) for axis in LISTS.values() for b in dims.blocks)
    return ",".join(map(str, [*(stage.embed for stage in dims.stages), *lists]))


def write_event(folder: Path, number: int, masks: Masks, event: Event, criterion: str) -> None:
    """`debugOutput_dimension_%08d.txt` and `debugOutput_pruning_%08d.txt` of one event."""
    folder.mkdir(exist_ok=True)
    sizes = masks.sizes()
    alive = {axis: masks.alive(axis) for axis in sizes}
    (folder / f"debugOutput_dimension_{number:08d}.txt").write_text(dimension_row(masks.dims) + "\n")
    lines = [
        f"method: {criterion}",
        f"pruned_neurons: {sum(sizes.values()) - sum(alive.values())}",
        f"pruning_iterations_done: {number}",
        f"neuron_units: {sum(alive.values())}",
        f"all_neuron_units: {sum(sizes.values())}",
        f"threshold_now: {event.groups[-1].score if event.groups else float('nan'):.6e}",
        f"latency_ratio: {event.ratio:.6f}",
        *(f"removed: {g.axis} units {g.units.tolist()} score {g.score:.6e}" for g in event.groups),
        *(f"{axis}: pruned_perc: [{size - alive[axis]}, {size}]" for axis, size in sizes.items()),
    ]
    (folder / f"debugOutput_pruning_{number:08d}.txt").write_text("\n".join(lines) + "\n")


def scalars(dims: Dims) -> dict[str, int]:
    """TensorBoard tags of the remaining widths, as published."""
    several = len(dims.stages) > 1
    named = {f"dimension/EMB{f'_{i}' * several}": stage.embed for i, stage in enumerate(dims.stages)}
    for i, block in enumerate(dims.blocks):
        named |= {f"dimension/Layer_{i}_{name}": getattr(block, axis) for name, axis in LISTS.items()}
    return named
