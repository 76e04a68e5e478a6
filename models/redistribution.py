"""ReViT: the widths that NViT discovers, as a rule from the embedding width alone (NViT, section 4.4 and Table 6).

V stays 64 per head. The published code and the paper disagree; both are here under their names.
"""

from __future__ import annotations

from models.dims import BlockDims, ViTDims

V = 64
WIDE = range(3, 9)  # blocks 4 to 9 of 12, counted from 0
DEPTH = 12


def _published_widths(embed: int, block: int) -> tuple[int, int, int]:
    """Heads, qk, mlp of the published code: rounding before doubling, and 10 heads in the first and last block."""
    narrow_qk, heads = 8 * round(embed * 0.05 / 8), 2 * round(embed * 0.005)
    if block in WIDE:
        return 2 * heads, 2 * narrow_qk, 6 * embed
    if block in (0, DEPTH - 1):
        return 10, 2 * narrow_qk, 3 * embed
    return heads, narrow_qk, 3 * embed


def _paper(embed: int, block: int) -> tuple[int, int, int]:
    """Heads = eps E / 100 to the nearest even number, qk = eps E / 20 to the nearest multiple of 8, mlp = 3 eps E."""
    eps = 2 if block in WIDE else 1
    return 2 * round(eps * embed / 200), 8 * round(eps * embed / 160), 3 * eps * embed


RULES = dict(published=_published_widths, paper=_paper)


def redistribute(embed: int, tokens: int, rule: str = "published") -> ViTDims:
    """Widths of a 12-block ReViT with residual width `embed`; `rule` is a key of RULES.

    Raises ValueError for an unknown rule, or an embedding so narrow that a width rounds to 0.
    """
    if rule not in RULES:
        raise ValueError(f"redistribution rule {rule!r} is none of {', '.join(RULES)}")
    widths = [RULES[rule](embed, block) for block in range(DEPTH)]
    if embed < 1 or not all(all(w) for w in widths):
        raise ValueError(f"an embedding of {embed} is too narrow for the {rule} rule: a width rounds to 0")
    return ViTDims(embed, tuple(BlockDims(heads, qk, V, mlp, tokens) for heads, qk, mlp in widths))
