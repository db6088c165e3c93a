"""A learned bias of the attention logits by relative position (BEiT, Bao et al. 2022; VLMo, Bao et al. 2022).

One table for image and text together. Its rows, for a picture of S x S patches and texts of up to L tokens:

    (2S - 1)^2    offset (rows, columns) of two patches, query minus key
    3             class token to patch, patch to class token, class token to itself
    2             text to image, image to text
    2L - 3        distance of two words, key minus query, from 2 - L on
    3             text's class token to word, word to class token, class token to itself

Shape suffixes: N place of a sequence (image class token, patches, text), L slot of a sample, B sample,
H head, R row of the table, T table.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.packing import TokenLayout


def num_rows(side: int, text_positions: int) -> int:
    return (2 * side - 1) ** 2 + 3 + 2 + 2 * text_positions


def image_index(side: int) -> Tensor:
    """int64 (1 + S * S, 1 + S * S): row of the table for each (query, key) of an image, class token first."""
    place = torch.arange(side * side)
    row, column = place // side, place % side
    rows = row[:, None] - row[None] + side - 1
    columns = column[:, None] - column[None] + side - 1
    offsets = (2 * side - 1) ** 2
    index = torch.empty(1 + side * side, 1 + side * side, dtype=torch.int64)
    index[1:, 1:] = rows * (2 * side - 1) + columns
    index[0], index[:, 0], index[0, 0] = offsets, offsets + 1, offsets + 2
    return index


def text_index(side: int, text_positions: int) -> Tensor:
    """int64 (L, L): the same of a text, class token first."""
    place = torch.arange(text_positions)
    last = num_rows(side, text_positions)
    index = place[None] - place[:, None] + text_positions - 2 + (2 * side - 1) ** 2 + 5
    index[0], index[:, 0], index[0, 0] = last - 3, last - 2, last - 1
    return index


def pair_index(side: int, text_positions: int) -> Tensor:
    """int64 (N, N) of the image class token, its patches and the text."""
    image, text = image_index(side), text_index(side, text_positions)
    across = (2 * side - 1) ** 2 + 3
    text_to_image = torch.full((text.shape[0], image.shape[0]), across)
    image_to_text = torch.full((image.shape[0], text.shape[0]), across + 1)
    return torch.cat([torch.cat([image, image_to_text], 1), torch.cat([text_to_image, text], 1)])


class RelativePositions(nn.Module):
    """`tables` is the number of blocks, or 1 where all share one; `heads` are those of this process."""

    index_NN: Tensor

    def __init__(self, side: int, text_positions: int, tables: int, heads: int):
        super().__init__()
        self.num_image = 1 + side * side
        self.table_TRH = nn.Parameter(torch.empty(tables, num_rows(side, text_positions), heads))
        self.table_TRH.no_weight_decay = True  # pyright: ignore
        self.register_buffer("index_NN", pair_index(side, text_positions), persistent=False)

    def index(self, layout: TokenLayout, visible_BV: Tensor | None) -> Tensor:
        """Rows of the table for the slots of the padded samples: (L, L), or (B, L, L) where each image shows
        other patches."""
        if visible_BV is None or not layout.num_image:
            begin = 0 if layout.num_image else self.num_image
            return self.index_NN[begin : begin + layout.max_length, begin : begin + layout.max_length]
        num_samples = layout.num_samples
        num_text = layout.max_length - 1 - visible_BV.shape[1]
        text = torch.arange(self.num_image, self.num_image + num_text, device=visible_BV.device)
        first_B1 = visible_BV.new_zeros(num_samples, 1)
        place_BL = torch.cat([first_B1, visible_BV + 1, text.expand(num_samples, -1)], dim=1)
        return self.index_NN[place_BL[:, :, None], place_BL[:, None, :]]

    def forward(self, index: Tensor, block: int) -> Tensor:
        """(H, L, L) or (B, H, L, L): the bias of a block."""
        table_RH = self.table_TRH[block if self.table_TRH.shape[0] > 1 else 0]
        # Not by index: the gradient of that is added by atomics, in another order each time.
        return F.embedding(index, table_RH).movedim(-1, -3)
