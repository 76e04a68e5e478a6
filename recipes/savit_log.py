"""The logs folder of a SAViT run: what went from every block, and MACs by part before and after, as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timm.models.vision_transformer import VisionTransformer

from models.arch import Arch
from models.dims import ViTDims
from models.masks import Masks
from pruning.macs_search import Problem


def complexity(arch: Arch, dims: ViTDims) -> str:
    """Parameters and GMACs of one image. Published: Attention and FC without, total with stem and classifier."""
    parts = arch.macs_by_part(dims)
    giga = {name: count / 1e9 for name, count in parts.items()}
    return (
        f"params {arch.params(dims):,}, Attention {giga['attention']:.5g}, FC {giga['mlp']:.5g}, "
        f"total {sum(giga.values()):.5g} GMACs"
    )


def summary(model: VisionTransformer, masks: Masks, problem: Problem) -> dict[str, Any]:
    """Plain values: MACs by part before and after, and units of every component, in all and per block."""
    arch = Arch.of_model(model)
    components = {}
    for ranking in problem.rankings:
        left = [masks.alive(axis) for axis in ranking.axes]
        components[ranking.component] = dict(
            units=ranking.total,
            removed=ranking.total - sum(left),
            left_per_block=left,
            removed_percent=round(100 * (1 - sum(left) / ranking.total), 3),
        )
    before, after = (arch.macs_by_part(dims) for dims in (masks.full, masks.dims))
    removed = {name: round(100 * (1 - after[name] / count), 3) if count else 0.0 for name, count in before.items()}
    removed["total"] = round(100 * (1 - sum(after.values()) / sum(before.values())), 3)
    return dict(
        components=components,
        macs_before=before,
        macs_after=after,
        macs_removed_percent=removed,
        macs_budget=problem.budget,
    )


def lines(model: VisionTransformer, masks: Masks, problem: Problem) -> list[str]:
    """The log as text; the last line is the result."""
    arch = Arch.of_model(model)
    told = summary(model, masks, problem)
    text = [f"model complexity before pruning: {complexity(arch, masks.full)}"]
    sizes = masks.full.sizes()
    for ranking in problem.rankings:
        component = told["components"][ranking.component]
        text.append(
            f"component {ranking.component}: pruned_neurons {component['removed']} "
            f"({component['removed_percent']:.2f} %), neuron_units {ranking.unit.size} that may go, "
            f"all_neuron_units {ranking.total}"
        )
        text += [
            f"  {axis}: units {masks.alive(axis)}, pruned_perc:[{sizes[axis] - masks.alive(axis)}, {sizes[axis]}]"
            for axis in ranking.axes
        ]
    text.append(f"pruned model complexity: {complexity(arch, masks.dims)}")
    removed = told["macs_removed_percent"]
    text.append(
        f"removed: attn {removed['attention']:.3f} %, ffn {removed['mlp']:.3f} %, total {removed['total']:.3f} "
        f"% of MACs; {problem.budget - sum(told['macs_after'].values()):,} below the budget"
    )
    return text


def write(folder: Path, model: VisionTransformer, masks: Masks, problem: Problem) -> None:
    """savit.log, and the same as values in savit.json."""
    folder.mkdir(exist_ok=True)
    (folder / "savit.log").write_text("\n".join(lines(model, masks, problem)) + "\n")
    (folder / "savit.json").write_text(json.dumps(summary(model, masks, problem), indent=2) + "\n")
