"""Errors that tests must notice: what becomes wrong, in which file, by which edit, and the tests that must fail."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Mutation(NamedTuple):
    """edits: texts that stand in `file` exactly once, and what takes their place; tests: pytest's names of those that
    must fail, of which the first to fail is enough."""

    name: str
    file: str
    edits: dict[str, str]
    tests: tuple[str, ...]

    def missing(self, root: Path) -> list[str]:
        """The texts to replace that are not in their file exactly once."""
        path = root / self.file
        source = path.read_text(encoding="utf-8") if path.exists() else ""
        return [old for old in self.edits if source.count(old) != 1]

    def apply_(self, root: Path) -> str:
        """Make the error in the project at `root`; returns the file as it was."""
        before = source = (root / self.file).read_text(encoding="utf-8")
        for old, new in self.edits.items():
            source = source.replace(old, new)
        (root / self.file).write_text(source, encoding="utf-8")
        return before


RANKS = (
    "tests/test_two_ranks.py::test_ranks_agree",
    "tests/test_two_ranks.py::test_ranks_find_what_one_process_finds",
)
MUTATIONS = [
    # ------------------------------------------------------------------ refit
    Mutation(
        "refit towards the dense branch",
        "pruning/refit.py",
        {
            "targets = []": "targets, before = [], list(s.dense)",
            "zip(s.dense, s.pruned, merged, strict=True)\n    missing": (
                "zip(s.dense, [c(x[..., kept]) for x, c in zip(before, merged)], merged)\n    missing"
            ),
        },
        ("tests/pruning/test_refit.py::test_a_refitted_stream_has_the_mean_of_the_dense_one",),
    ),
    Mutation(
        "LayerScale not divided out",
        "pruning/refit.py",
        {"- z) / gamma)": "- z) / 1)"},
        ("tests/pruning/test_refit.py::test_a_refitted_stream_has_the_mean_of_the_dense_one",),
    ),
    Mutation(
        "last block refitted on all tokens",
        "pruning/refit.py",
        {"read = objective.read(dense) if": "read = slice(None) if"},
        ("tests/pruning/test_refit.py::test_a_refitted_stream_has_the_mean_of_the_dense_one",),
    ),
    Mutation(
        "held-out rows fitted",
        "pruning/refit.py",
        {"sets[held].add(x, target)": "[sets[i].add(x, target) for i in {False, held}]"},
        ("tests/pruning/test_refit.py::test_held_out_images_are_not_fitted",),
    ),
    Mutation(
        "ridge judged on rows that were fitted",
        "pruning/moments.py",
        {"correct(*present, fit, ridge)": "correct(*present, fit + held, ridge)"},
        ("tests/pruning/test_moments.py::test_the_ridge_that_is_best_on_rows_not_fitted_is_used_on_all",),
    ),
    Mutation(
        "smallest ridge always",
        "pruning/moments.py",
        {"RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)": "RIDGES = (1e-5,)"},
        ("tests/pruning/test_moments.py::test_the_ridge_that_is_best_on_rows_not_fitted_is_used_on_all",),
    ),
    # -------------------------------------------------------- align and probe
    Mutation(
        "keys not centred",
        "pruning/align.py",
        {"k - k.mean(2, keepdim=True)": "k"},
        ("tests/pruning/test_align.py::test_queries_and_keys_do_not_see_what_all_keys_share",),
    ),
    Mutation(
        "probes judged on the images that fitted them",
        "pruning/probe.py",
        {"images[-max(1, len(images) // JUDGED) :]": "images[: max(1, len(images) // JUDGED)]"},
        ("tests/pruning/test_allocation.py::test_a_price_is_of_images_that_compensated_nothing",),
    ),
    # --------------------------------------------------------------- pricing
    Mutation(
        "a price without the half",
        "pruning/pricing.py",
        {"(2 * samples)": "samples"},
        ("tests/pruning/test_pricing.py::test_a_price_is_half_the_mean_square_of_what_the_outputs_change",),
    ),
    Mutation(
        "cuts priced without LayerScale",
        "pruning/cuts.py",
        {"gradient = gradient * self.branch.gamma": "pass"},
        ("tests/pruning/test_pricing.py::test_layer_scale_is_priced",),
    ),
    Mutation(
        "whole branches not measured",
        "pruning/pricing.py",
        {"prices.update(measured)": "pass"},
        ("tests/pruning/test_pricing.py::test_prices_are_those_that_are_measured",),
    ),
    Mutation(
        "the likeliest label always drawn",
        "pruning/objective.py",
        {"p.cumsum(-1), quantiles": "p.cumsum(-1), 0 * quantiles + 0.5"},
        ("tests/pruning/test_pricing.py::test_labels_are_drawn_from_the_predictions",),
    ),
    Mutation(
        "a refit judged on images that it fitted",
        "pruning/refit.py",
        {"images[: -len(unseen_of(images))], unseen": "images, unseen"},
        ("tests/pruning/test_refit.py::test_held_out_images_are_not_fitted",),
    ),
    # ------------------------------------------------- allocation and search
    Mutation(
        "qk and v priced as if all heads were left",
        "pruning/allocation.py",
        {"share = axes[0] / full.heads": "share = axes[0] / axes[0]"},
        ("tests/pruning/test_allocation.py::test_narrower_queries_and_values_cost_what_heads_are_left",),
    ),
    Mutation(
        "knapsack rounds times down",
        "pruning/allocation.py",
        {
            "np.ceil(block.seconds / unit)": "np.floor(block.seconds / unit)",
            "np.ceil(block.seconds[chosen[-1]] / unit)": "np.floor(block.seconds[chosen[-1]] / unit)",
        },
        ("tests/pruning/test_allocation.py::test_times_are_rounded_up",),
    ),
    Mutation(
        "grid of the MACs search never refined",
        "pruning/macs_search.py",
        {"low, high = np.maximum(centre - reach, 0), np.minimum(centre + reach, most)": "continue"},
        ("tests/pruning/test_macs_search.py::test_the_grid_ends_at_single_units",),
    ),
    Mutation(
        "overhead left out of the lambda-cost",
        "pruning/global_latency.py",
        {"max(outside, 0.0) +": "0.0 +"},
        ("tests/pruning/test_global_latency.py::test_the_embedding_also_costs_what_is_outside_the_blocks",),
    ),
    Mutation(
        "overhead left out of the seconds saved",
        "pruning/value.py",
        {"seconds += [self.table.overhead_seconds": "seconds += [0 * self.table.overhead_seconds"},
        ("tests/pruning/test_value.py::test_the_embedding_also_saves_what_is_outside_the_blocks",),
    ),
    # --------------------------------------------------------------- saliency
    Mutation(
        "gradient that passes a block by counted",
        "pruning/token_saliency.py",
        {"g = g - alone * out.grad": "g = g - 0 * alone * out.grad"},
        ("tests/test_token_axis.py::test_saliency_is_the_loss_along_the_way_to_the_common_mean",),
    ),
    Mutation(
        "gradients clipped before saliency is read",
        "engine.py",
        {" after_backward()": " nn.utils.clip_grad_norm_(model.parameters(), clip_grad or 1e9), after_backward()"},
        ("tests/test_engine.py::test_hooks_read_the_gradients_of_the_loss_itself",),
    ),
    Mutation(
        "gradients not unscaled",
        "engine.py",
        {"precision.scaler.unscale_(optimizer)": "pass"},
        ("tests/test_engine.py::test_hooks_read_the_gradients_of_the_loss_itself",),
    ),
    # ----------------------------------------------------- inside the training loop
    Mutation(
        "divergence from the full model never counted",
        "recipes/nvit.py",
        {"self.kl_coeff if self.events else 0.0": "0.0"},
        ("tests/recipes/test_nvit.py::test_the_divergence_from_the_full_model_counts_once_something_is_gone",),
    ),
    Mutation(
        "removed weights not zeroed after a step",
        "recipes/nvit.py",
        {"masks.zero_weights_(": "masks.keep.get("},
        ("tests/recipes/test_nvit.py::test_removed_weights_are_zero_after_every_step",),
    ),
    Mutation(
        "moving average not restarted",
        "recipes/nvit.py",
        {"saliency.forget()": "pass"},
        ("tests/recipes/test_nvit.py::test_the_moving_average_starts_anew_after_the_first_event",),
    ),
    Mutation(
        "gradients of gone branches kept",
        "recipes/nvit.py",
        {"masks.drop_gradients_(": "masks.keep.get("},
        ("tests/recipes/test_nvit.py::test_gradients_are_those_of_the_compact_model",),
    ),
    # ------------------------------------------------------------ among processes
    *(
        Mutation(f"{what} not summed over processes", file, {old: new}, RANKS)
        for what, file, old, new in (
            (
                "moments of queries and keys",
                "pruning/align.py",
                "all_reduced(self.q), all_reduced(self.k)",
                "self.q, self.k",
            ),
            ("moments of heads", "pruning/align.py", "self.outputs.all_reduce()", "self.outputs"),
            ("moments of hidden units", "pruning/align.py", "self.hidden.all_reduce()", "self.hidden"),
            ("moments of the stream", "pruning/align.py", " reader.moments.all_reduce()", " pass"),
            ("moments before the classifier", "pruning/align.py", "readers[-1].moments.all_reduce()", "pass"),
            ("shifts of moments", "pruning/moments.py", "common = all_reduced(", "common = self.shift if True else ("),
            ("moments of a refit", "pruning/refit.py", "*(moments.all_reduce() for moments in sets)", "*sets"),
            ("divergences", "pruning/objective.py", "*all_reduced(total)", "*total"),
            ("variances of features", "pruning/objective.py", "= all_reduced(total)", "= total"),
            ("moments of a probe", "pruning/probe.py", "self.moments.all_reduce()", "pass"),
            ("moments of a narrow attention", "pruning/probe.py", "moments.all_reduce(), ", "moments, "),
            ("moments of cuts", "pruning/cuts.py", "    moments.all_reduce()", "    pass"),
            ("moments of a cut attention", "pruning/cuts.py", "pairs.all_reduce()", "pairs"),
            ("prices", "pruning/pricing.py", "all_reduced(total).tolist()", "total.tolist()"),
            ("saliency of tokens", "pruning/token_saliency.py", "dist.all_reduce(total)", "pass"),
            ("saliency of gates", "pruning/gate_saliency.py", "dist.all_reduce(total)", "pass"),
            ("scores of Prune and Merge", "pruning/pm_vit.py", "dist.all_reduce(batch)", "pass"),
            ("scores of SAViT", "recipes/savit_scoring.py", "dist.all_reduce(value)", "pass"),
        )
    ),
]
