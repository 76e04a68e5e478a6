"""Which units of a model survive. In every mask, True is keep and False is remove."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.axes import Axis, Dim, branch_of
from models.norms import MASKED
from models.patch_grid import spread_order
from models.swin_dims import Dims
from models.tokens import around, by_content, spread_merge


class Masks:
    """One bool vector per axis (`embed`, `blocks.3.heads`, …) over the units of the full-size model `dims`.

    A masked model is a full-size one whose removed units are exact zeros and whose norms run over the survivors:
    it computes the same function as the compact model (DESIGN: masked equals compact).

    grid: rows and columns of patches; then every block has an axis of them too (`blocks.3.tokens`), and a patch that is
    removed from it is merged into the nearest survivor on the grid: the masked model computes on fewer tokens already.
    """

    def __init__(self, dims: Dims, device: torch.device | str = "cpu", grid: tuple[int, int] | None = None) -> None:
        self.full, self.grid = dims, grid
        patches = grid[0] * grid[1] if grid else 0
        self.prefix = max(b.tokens for b in dims.blocks) - patches if grid else 0  # tokens that are never merged
        sizes = dims.sizes() | {str(Axis("tokens", i)): patches for i in range(len(dims.blocks)) if grid}
        self.keep = {axis: torch.ones(n, dtype=torch.bool, device=device) for axis, n in sizes.items()}
        self._alive = sizes  # survivors per axis, on the host: no device synchronisation to read a width
        self._factors: dict[str, list[Tensor] | None] = {}  # of parameters, until a unit is removed

    def fresh(self) -> Masks:
        """Masks over the same axes that keep everything."""
        return Masks(self.full, next(iter(self.keep.values())).device, self.grid)

    def narrow_(self) -> None:
        """Become masks over what is left, of which nothing is removed: those of the compact model."""
        self.__init__(self.dims, next(iter(self.keep.values())).device)

    def sizes(self) -> dict[str, int]:
        """Units of every axis, removed ones too."""
        return {axis: len(keep) for axis, keep in self.keep.items()}

    @classmethod
    def first(
        cls, full: Dims, dims: Dims, device: torch.device | str = "cpu", grid: tuple[int, int] | None = None
    ) -> Masks:
        """Keep the first units of every axis: for a model whose units are sorted by importance.

        Of patches, those that are spread evenly over the grid.
        """
        masks = cls(full, device, grid)
        for axis, alive in masks.units(dims).items():
            order = torch.arange(len(masks.keep[axis]))
            if (parts := Axis.parse(axis)).kind == "tokens":
                order = spread_order(grid, parts.block)
            masks.remove(axis, order[alive:].to(device))
        return masks

    def units(self, dims: Dims) -> dict[str, int]:
        """Units that an architecture has of every axis."""
        tokens = {str(Axis("tokens", i)): b.tokens - self.prefix for i, b in enumerate(dims.blocks) if self.grid}
        return dims.sizes() | tokens

    def remove(self, axis: str, units: Tensor) -> None:
        """Remove units (indices, int64) from an axis."""
        self.keep[axis][units] = False
        self._alive[axis] = int(self.keep[axis].sum())
        self._factors.clear()

    def alive(self, axis: str) -> int:
        return self._alive[axis]

    @property
    def dims(self) -> Dims:
        """The architecture that is left."""
        left = self.full.resized({a: n for a, n in self._alive.items() if Axis.parse(a).kind != "tokens"})
        if not self.grid:
            return left
        used = [str(Axis("tokens", i)) for i, b in enumerate(left.blocks) if b.heads or b.mlp]  # empty: as they were
        return left.resized({axis: self.prefix + self._alive[axis] for axis in used})

    def _keep_along(self, dim: Dim) -> Tensor:
        """Survivors along one dimension of a parameter: products of axes, concatenated."""
        segments = []
        for segment in dim:
            keep = self.keep[segment[0]]
            for axis in segment[1:]:
                keep = torch.outer(keep, self.keep[axis]).flatten()
            segments.append(keep)
        return torch.cat(segments)

    def _is_cut(self, dim: Dim) -> bool:
        return any(self._alive[axis] < len(self.keep[axis]) for segment in dim for axis in segment)

    def _branch_is_gone(self, parameter: str) -> bool:
        branch = branch_of(parameter)
        return branch is not None and not self._alive[branch]

    def _factors_of(self, parameter: str) -> list[Tensor] | None:
        """What to multiply a parameter by, each along one of its dimensions; None where its branch is gone."""
        if parameter not in self._factors:
            dims, factors = self.full.axes_of(parameter), []
            for position, dim in enumerate(dims):
                if self._is_cut(dim):
                    factors.append(self._keep_along(dim).view([-1 if i == position else 1 for i in range(len(dims))]))
            self._factors[parameter] = None if self._branch_is_gone(parameter) else factors
        return self._factors[parameter]

    @torch.no_grad()
    def zero_all_(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Zero the removed units of parameters, or of tensors of their shapes, by name, in place.

        Nothing is computed of the masks unless a unit was removed since, and two calls hand all of it to the device.
        """
        gone, cut, factors = [], [], []
        for name, tensor in tensors:
            own = self._factors_of(name)
            if own is None:
                gone.append(tensor)
            else:
                cut += [tensor] * len(own)
                factors += own
        if gone:
            torch._foreach_zero_(gone)
        if cut:
            torch._foreach_mul_(cut, factors)

    def zero_(self, parameter: str, tensor: Tensor) -> None:
        """Zero the removed units of a parameter, or of a tensor of its shape, in place."""
        self.zero_all_([(parameter, tensor)])

    def kept(self, parameter: str, position: int) -> Tensor:
        """Indices of the survivors along one dimension of a parameter, int64."""
        return self._keep_along(self.full.axes_of(parameter)[position]).nonzero().flatten()

    def cut(self, parameter: str, tensor: Tensor) -> Tensor:
        """The surviving part of a parameter, as the compact model holds it."""
        for position, dim in enumerate(self.full.axes_of(parameter)):
            if self._is_cut(dim):
                tensor = tensor.index_select(position, self.kept(parameter, position))
        return tensor

    def paste(self, parameter: str, small: Tensor, full: Tensor) -> Tensor:
        """The inverse of `cut`: `small` at the survivors' places in a tensor like `full`, zeros elsewhere."""
        places = [
            self.kept(parameter, position) if self._is_cut(dim) else torch.arange(length, device=full.device)
            for position, (dim, length) in enumerate(zip(self.full.axes_of(parameter), full.shape, strict=True))
        ]
        pasted = torch.zeros_like(full)
        pasted[torch.meshgrid(*places, indexing="ij")] = small
        return pasted

    def zero_weights_(self, model: nn.Module) -> None:
        """Zero every removed weight: after each optimizer step, so that a removed unit stays removed."""
        self.zero_all_(model.named_parameters())

    def drop_gradients_(self, model: nn.Module) -> None:
        """No gradients for branches that are gone: their last bias would get some, though it stays zero."""
        if all(self._alive.values()):
            return
        for name, parameter in model.named_parameters():
            if self._branch_is_gone(name):
                parameter.grad = None

    def install_(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Make `model` the masked model: zero weights, zero moments of the optimizer, norms over survivors, and
        patches merged around the survivors."""
        self.install_tokens_(model)
        self.zero_weights_(model)
        for name, module in model.named_modules():
            if isinstance(module, MASKED) and (dim := self.full.axes_of(f"{name}.weight")[0]):
                module.set_mask(self._keep_along(dim))
        for name, parameter in model.named_parameters():
            for value in (optimizer.state.get(parameter, {}) if optimizer else {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    self.zero_(name, value)

    def install_tokens_(self, model: nn.Module) -> None:
        """Only the token compression of `install_`, in place of what blocks have."""
        if not self.grid:
            return
        reference = next(model.parameters())
        for i, (block, left) in enumerate(zip(model.blocks, self.dims.blocks, strict=True)):
            keep = self.keep[str(Axis("tokens", i))].cpu()
            merged = left.tokens < self.prefix + len(keep)
            if merged and by_content(model):
                tokens = spread_merge(int(keep.sum()), self.grid, i, self.prefix, content=True)
            else:
                tokens = around(keep, self.grid, self.prefix) if merged else None
            block.tokens = tokens and tokens.to(reference)

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.keep)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ValueError when the axes or their sizes are not those of this model."""
        sizes = {axis: len(keep) for axis, keep in self.keep.items()}
        given = {axis: t.numel() if t.dtype == torch.bool and t.dim() == 1 else t.dtype for axis, t in state.items()}
        if given != sizes:
            odd = next(axis for axis in [*sizes, *given] if sizes.get(axis) != given.get(axis))
            raise ValueError(f"masks do not fit the model: axis {odd} has {given.get(odd)} units, not {sizes.get(odd)}")
        for axis, keep in state.items():
            self.keep[axis].copy_(keep)
            self._alive[axis] = int(keep.sum())
        self._factors.clear()
