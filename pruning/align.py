"""Change a model's coordinates so that the first units of every axis carry the most; its function does not change.

Queries and keys of a head may be multiplied by any matrix and its inverse, and so may values and proj; MLP units and
heads may be put in any order; the residual stream may be rotated, see `helmert`. The bases follow from second moments
over calibration images, without labels or gradients. SliceGPT (arXiv 2401.15024) rotates the stream of models with
RMSNorm; here LayerNorm stays, and streams of either are rotated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from models.axes import EMBED
from models.mlps import first_layers
from models.norms import NORMS, normalise
from models.vit import Attention, Block
from pruning import streams
from pruning.moments import FLOOR, TINY, Moments, all_reduced, removal, set_
from pruning.streams import Branch


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square roots of positive semi-definite matrices (..., d, d) and their inverses, eigenvalues floored."""
    values, vectors = torch.linalg.eigh(gram)
    values = torch.maximum(values, values[..., -1:] * FLOOR).clamp_min(TINY).sqrt()
    return (vectors * values.unsqueeze(-2)) @ vectors.mT, (vectors / values.unsqueeze(-2)) @ vectors.mT


def qk_bases(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (H, d, d) to multiply queries and keys with: their products stay, the first r are the best rank r.

    q, k: second moments per head (H, d, d); keys centred within their image, as softmax ignores what all keys share.
    """
    (root_q, inverse_q), (root_k, inverse_k) = _roots(q), _roots(k)
    u, s, vt = torch.linalg.svd(root_q @ root_k)
    scale = s.clamp_min(TINY).sqrt().unsqueeze(-1)
    return scale * (u.mT @ inverse_q), scale * (vt @ inverse_k)


def v_bases(outputs: Tensor, proj: Tensor) -> tuple[Tensor, Tensor]:
    """Matrices (H, d, d) to multiply values with, and proj's columns to undo it; the first directions add the most.

    outputs: covariance of what each head passes on (H, d, d); proj: its columns of proj (H, E, d).
    """
    root, inverse = _roots(outputs)
    vectors = torch.linalg.eigh(root @ proj.mT @ proj @ root).eigenvectors.flip(-1)
    return vectors.mT @ inverse, root @ vectors


def balance_norms(change: Tensor, undo: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """`change` (H, d, d) and `undo`, rescaled so that every direction has weights of one norm on both sides.

    rows: the layer that is multiplied by `change` (H, d, E); columns: the one that undoes it (H, E, d). Without this
    weak directions have large weights before and tiny ones behind, which training moves by steps of one size.
    """
    before, after = (change @ rows).norm(dim=2), (columns @ undo).norm(dim=1)  # H d
    scale = torch.where((before > TINY) & (after > TINY), (after / before.clamp_min(TINY)).sqrt(), 1.0)
    return change * scale.unsqueeze(-1), undo / scale.unsqueeze(-2)


def _spread(moments: Moments, *layers: nn.Linear) -> Tensor:
    """Second moments of what layers read, about the mean if all of them have a bias: it takes up what is constant."""
    return moments.second_moment if any(layer.bias is None for layer in layers) else moments.covariance


class _Attention:
    """Second moments of an attention branch, and its alignment."""

    def __init__(self, branch: Branch, attention: Attention) -> None:
        heads, width = attention.num_heads, attention.qk
        self.branch, self.heads, self.width, self.inner_norm = branch, heads, width, attention.norm
        self.qk_norm = isinstance(attention.q_norm, NORMS)
        device = branch.last.weight.device
        self.q, self.k = torch.zeros(2, heads, width, width, dtype=torch.float64, device=device)
        self.outputs = Moments(heads * width, device=device)

    def see(self, qkv: Tensor, mixed: Tensor) -> None:
        B, N, _ = qkv.shape
        q, k, _ = qkv.view(B, N, 3, self.heads, self.width).permute(2, 3, 0, 1, 4)  # each H B N d
        for total, rows in ((self.q, q), (self.k, k - k.mean(2, keepdim=True))):
            rows = rows.flatten(1, 2)
            total += (rows.mT @ rows).double()
        self.outputs.add(mixed)

    def align_(self) -> None:
        H, d = self.heads, self.width
        (qkv,), proj = self.branch.readers.values(), self.branch.last
        covariance = _spread(self.outputs.all_reduce(), proj)
        columns = proj.weight.double().view(-1, H, d).transpose(0, 1)  # H E d
        of_heads = covariance.view(H, d, H, d).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        if isinstance(norm := self.inner_norm, NORMS):  # whose weights no rotation passes
            to_v = torch.stack(
                [_permutation(removal(c[None], w[None])) for c, w in zip(of_heads, columns, strict=True)]
            )
            from_v = to_v.mT
        else:
            to_v, from_v = v_bases(of_heads, columns)
            values = qkv.weight.double().view(3, H, d, -1)[2]
            to_v, from_v = balance_norms(to_v, from_v, values, columns)
        to_q, to_k = qk_bases(all_reduced(self.q), all_reduced(self.k))
        if self.qk_norm:  # a norm between qkv and softmax is of these very channels
            to_q = to_k = torch.eye(d, dtype=to_v.dtype, device=to_v.device).expand(H, d, d)
        change = torch.stack([to_q, to_k, to_v])  # 3 H d d
        order = removal(covariance[None], proj.weight[None], group=d)
        for parameter in filter(lambda p: p is not None, (qkv.weight, qkv.bias)):
            rows = change @ parameter.double().view(3, H, d, -1)
            parameter.copy_(rows[:, order].view(parameter.shape))
        proj.weight.copy_((columns @ from_v)[order].transpose(0, 1).reshape(proj.weight.shape))
        for parameter in norm.parameters():
            moved = to_v @ parameter.double().view(H, d, 1)
            parameter.copy_(moved[order].flatten())


def _permutation(order: Tensor) -> Tensor:
    """The matrix that puts what a vector has at order[i] into place i."""
    return torch.eye(len(order), dtype=torch.float64, device=order.device)[order]


class _MLP:
    """Second moments of an MLP branch's hidden units, and their order."""

    def __init__(self, branch: Branch, inner_norm: nn.Module) -> None:
        self.branch, self.inner_norm = branch, inner_norm
        self.hidden = Moments(branch.last.in_features, device=branch.last.weight.device)

    def see(self, _: Tensor, mixed: Tensor) -> None:
        self.hidden.add(mixed)

    def align_(self) -> None:
        last = self.branch.last
        order = removal(_spread(self.hidden.all_reduce(), last)[None], last.weight[None])
        for reader in self.branch.readers.values():
            for parameter in filter(lambda p: p is not None, (reader.weight, reader.bias)):
                rows = parameter.unflatten(0, (-1, len(order)))  # two segments where gates are packed with values
                parameter.copy_(rows[:, order].flatten(0, 1))
        for parameter in self.inner_norm.parameters():
            parameter.copy_(parameter[order])
        set_(last, last.weight[:, order], None)


def helmert(n: int) -> Tensor:
    """Orthonormal contrasts (n, n - 1): column j is constant down to row j, balanced by row j + 1, zero below.

    Residual streams enter a LayerNorm, which removes their mean, so only what is orthogonal to the ones vector counts.
    With principal components c in this basis, H c has mean 0 and the norm of c, as LayerNorm needs; and its first k
    entries hold the first k - 1 components and, of all others, only a shift that the k share and LayerNorm removes.
    """
    j = torch.arange(1, n, dtype=torch.float64)
    row = torch.arange(n)[:, None]
    return torch.where(row < j, 1.0, torch.where(row == j, -j, 0.0)) / (j * (j + 1)).sqrt()


class _Reader:
    """A norm of the residual stream and the linear layers behind it, with the moments of what it normalises."""

    def __init__(self, norm: nn.Module, linears: list[nn.Linear]) -> None:
        self.norm, self.linears = norm, linears
        self.moments = Moments(norm.normalized_shape[0], device=norm.weight.device)

    def see(self, x: Tensor) -> None:
        self.moments.add(normalise(self.norm, x))

    @property
    def spread(self) -> Tensor:
        """Second moments (E, E) of what the norm gives, its weights apart."""
        return _spread(self.moments, *self.linears)

    def weight(self) -> Tensor:
        """A root (E, E) of what the linear layers make of a normalised stream, relative to its size."""
        weight = torch.cat([linear.weight for linear in self.linears]).double() * self.norm.weight.double()
        metric = weight.T @ weight
        return _roots(metric / (metric * self.spread).sum().clamp_min(TINY))[0]

    def rotate_(self, change: Tensor) -> None:
        """Read a stream that was multiplied by `change`; the norm's affine goes into the linear layers."""
        shift = getattr(self.norm, "bias", None)
        for linear in self.linears:
            weight = linear.weight.double()
            bias = None if shift is None else linear.bias.double() + weight @ shift.double()
            set_(linear, weight * self.norm.weight.double() @ change.T, bias)
        self.norm.weight.fill_(1.0)
        if shift is not None:
            shift.zero_()


def _final(model: VisionTransformer) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The norm before the classifier, and what it is given of the residual stream."""
    if isinstance(model.fc_norm, NORMS):
        return model.fc_norm, model.pool
    return model.norm, lambda x: x[:, streams.read(model)]


def why_not_rotated(model: VisionTransformer) -> str | None:
    """What reads or writes the residual stream in a way that a rotation would change, or None."""
    layers = [layer for block in model.blocks for layer in (block.attn.qkv, *first_layers(block.mlp).values())]
    layers += streams.outlets(model) or [model.head]
    if any(isinstance(norm, NORMS) for norm in (model.norm_pre, model.patch_embed.norm)):
        return "a norm before the first block writes to it"
    if isinstance(model.norm, NORMS) == isinstance(model.fc_norm, NORMS):
        return "there is not one norm before the classifier"
    if model.global_pool not in ("token", "avg", "map"):
        return f"it is pooled by {model.global_pool or 'nothing'}"
    shifted = getattr(model.blocks[0].norm1, "bias", None) is not None
    if any(not isinstance(layer, nn.Linear) or shifted and layer.bias is None for layer in layers):
        return "a layer that reads it has no bias"
    return None


def _rotation(total: Tensor, centred: bool) -> Tensor:
    """The change of coordinates (E, E) to the principal components of second moments; centred: for LayerNorms."""
    E = len(total)
    if not centred:
        return torch.linalg.eigh(total).eigenvectors.flip(-1).T
    ones = torch.ones(E, E, dtype=torch.float64, device=total.device)
    components = torch.linalg.eigh(total - ones * total.trace()).eigenvectors.flip(-1)[:, : E - 1]  # ones come last
    return helmert(E).to(total.device) @ components.T


def _rotate_(model: VisionTransformer, readers: list[_Reader]) -> None:
    """Principal components first: of the normalised stream, averaged over all that read it."""
    centred = isinstance(readers[0].norm, nn.LayerNorm)
    change = _rotation(sum(reader.moments.second_moment for reader in readers), centred)
    for reader in readers:
        reader.rotate_(change)
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if (token := getattr(model, name, None)) is not None:
            token.copy_(token.double() @ change.T)
    writers = [(branch.last, branch.gamma) for block in model.blocks for branch in streams.branches(block)]
    for layer, gamma in [(model.patch_embed.proj, None), *writers]:
        scaled = change if gamma is None else change * gamma.double()
        weight = (scaled @ layer.weight.double().flatten(1)).view(layer.weight.shape)
        set_(layer, weight, None if layer.bias is None else scaled @ layer.bias.double())
        if gamma is not None:
            gamma.fill_(1.0)


def _sort_(model: VisionTransformer, readers: list[_Reader]) -> None:
    """Put the embedding channels in the order of their worth to all that read them."""
    covariances = torch.stack([reader.spread for reader in readers])
    order = removal(covariances, torch.stack([reader.weight() for reader in readers]))
    for name, parameter in model.named_parameters():
        for position, dim in enumerate(model.dims.axes_of(name)):
            if dim == EMBED:
                parameter.copy_(parameter.index_select(position, order))


def _align_block_(block: Block, stream: list[Tensor]) -> list[_Reader]:
    """Align both branches, and move the stream past the block."""
    readers = []
    for branch in streams.branches(block):
        reader = _Reader(branch.norm, [*branch.readers.values()])
        is_attention = branch.last is block.attn.proj
        seen = _Attention(branch, block.attn) if is_attention else _MLP(branch, block.mlp.norm)
        for i, x in enumerate(stream):
            first = branch.first(branch.norm(x))
            mixed = branch.mix(first)
            reader.see(x)
            seen.see(first, mixed)
            stream[i] = x + branch.write(mixed)
        seen.align_()
        reader.moments.all_reduce()
        readers.append(reader)
    return readers


@torch.no_grad()
def align_(model: VisionTransformer, batches: Sequence[Tensor], embedding: bool = True) -> list[str]:
    """Align every axis of a full-size model in eval mode, in place; returns what could not be rotated, and why.

    batches: calibration images (B, 3, H, W) on the model's device; with several processes, each gives its own.
    embedding: rotate the residual stream too.
    """
    stream = [streams.stem(model, images) for images in batches]
    readers = [reader for block in model.blocks for reader in _align_block_(block, stream)]
    if not embedding:
        return ["the embedding stays as it is"]
    norm, given = _final(model)
    if isinstance(norm, NORMS):
        readers.append(_Reader(norm, streams.outlets(model)))
        for x in stream:
            readers[-1].see(given(x))
        readers[-1].moments.all_reduce()
    if reason := why_not_rotated(model):
        _sort_(model, readers)
        return [f"embedding channels are sorted, not rotated: {reason}"]
    _rotate_(model, readers)
    return []
