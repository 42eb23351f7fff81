"""Two copies of a layer, one for the tokens of either kind in a sequence."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import fx, nn

from bincompile.errors import ConfigError, InputError


class MultiwayNetwork(nn.Module):
    """Layer `A` on what stands before `split_position`, and its sibling `B` on the rest.

    Args:
        module: becomes `A`; `B` is a copy with parameters drawn anew.
        dim: the axis that is split.

    Attributes:
        split_position: -1 (all to `A`), 0 (all to `B`), or how many go to `A`.

    Raises:
        ConfigError (a ValueError): the module has no reset_parameters.

    Source: Image as a Foreign Language (BEiT-3, arXiv:2208.10442). Names are torchscale's.

    Example:
        >>> layer = MultiwayNetwork(nn.Linear(4, 2)).apply(set_split_position(3))
        >>> layer(torch.ones(1, 5, 4)).shape
        torch.Size([1, 5, 2])
    """

    def __init__(self, module: nn.Module, dim: int = 1) -> None:
        super().__init__()
        reset = getattr(type(module), "reset_parameters", None)
        if reset is None:
            raise ConfigError(f"MultiwayNetwork({type(module).__name__})",
                              "a module with reset_parameters", "the module argument")
        self.dim, self.split_position = dim, -1
        self.A = module
        self.B = copy.deepcopy(module)
        reset(self.B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layers' results in the order of x; x has the split axis at `dim`.

        Raises:
            InputError: x is shorter than split_position.
        """
        if self.split_position == -1:
            return self.A(x)
        if self.split_position == 0:
            return self.B(x)
        first, second = _split(x, self.split_position, self.dim)
        return torch.cat([self.A(first), self.B(second)], self.dim)

    def extra_repr(self) -> str:
        """Where it splits."""
        return f"split_position={self.split_position}, dim={self.dim}"


@fx.wrap
def _split(x: torch.Tensor, position: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = x.shape[dim]
    if position > size:
        raise InputError(f"{size} tokens with split_position={position}",
                         f"a split_position of at most {size}", "set_split_position")
    return x.narrow(dim, 0, position), x.narrow(dim, position, size - position)


def set_split_position(position: int) -> Callable[[nn.Module], None]:
    """What `model.apply` takes to set the split position of every multiway layer in a model.

    Args:
        position: -1 (all to `A`), 0 (all to `B`), or how many go to `A`.

    Raises:
        ConfigError (a ValueError): not such an int.

    Example:
        >>> model = nn.Sequential(MultiwayNetwork(nn.Linear(4, 4)))
        >>> model.apply(set_split_position(2))[0].split_position
        2
    """
    if isinstance(position, bool) or not isinstance(position, int) or position < -1:
        raise ConfigError(f"set_split_position({position!r})", "an int of at least -1",
                          "the position argument")

    def apply(module: nn.Module) -> None:
        if isinstance(module, MultiwayNetwork):
            module.split_position = position

    return apply


def ways(module: nn.Module) -> tuple[nn.Module, ...]:
    """The layers that a multiway network chooses from; any other module is its only way."""
    return (module.A, module.B) if isinstance(module, MultiwayNetwork) else (module,)
