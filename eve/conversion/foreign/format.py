"""What a module for an official layout gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from eve.config import Model
from eve.conversion.foreign.names import Names

Sizes = dict[str, Any]


@dataclass(frozen=True)
class Format:
    """Attributes:
    title: for people.
    sizes: what neither names nor shapes tell, with the values of the official models; None: as said in
        `read_model`'s docstring.
    buffers: patterns of names that say nothing.
    read_model: keys of eve.config.Model that follow from names, shapes and sizes.
    weights: under our names, in fp32; a head that the source lacks is left out.
    heads: of tasks, by name.
    state: the official layout of weights of ours; None: no export.
    """

    title: str
    sizes: Sizes
    read_model: Callable[[Names, Sizes], dict[str, Any]]
    weights: Callable[[Names, Model], dict[str, Tensor]]
    buffers: tuple[str, ...] = ()
    heads: Callable[[Names, Model], dict[str, nn.Module]] | None = None
    state: Callable[[dict[str, Tensor], Model], dict[str, Tensor]] | None = None
