"""The seam between the blocks and the devices that share them.

A block's matrices may be cut over several devices (eve/parallel), and so may the tokens between them.
The model says where its rows pass from one to the other; on one device nothing happens there.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from eve.packing import Rows, TokenLayout


class Tokens(Protocol):
    """Moves rows of x_TD; `layout.held` says which a process holds between the layers."""

    def split(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        """All rows -> those held between the layers, and the layout that says so."""
        ...

    def join(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """The inverse of split."""
        ...

    def to_columns(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """Held rows -> all rows, for a layer whose outputs are cut over the devices."""
        ...

    def from_rows(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """All rows, of a layer whose inputs were cut -> held rows of the sum over the devices."""
        ...

    def own(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, Rows]:
        """Held rows -> the rows of this device alone, for a layer with whole weights."""
        ...

    def give_back(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """The inverse of own."""
        ...

    def gather_own(self, x_TE: Tensor, layout: TokenLayout) -> Tensor:
        """A device's own rows -> all rows, of something small that all devices then treat alike."""
        ...


class WholeTokens:
    """One device holds everything."""

    def split(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, TokenLayout]:
        return x_TD, layout

    def join(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return x_TD

    def to_columns(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return x_TD

    def from_rows(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return x_TD

    def own(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, Rows]:
        return x_TD, layout.held

    def give_back(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return x_TD

    def gather_own(self, x_TE: Tensor, layout: TokenLayout) -> Tensor:
        return x_TE
