"""The light decoder of masked image modelling (MAE, He et al. 2022): narrow blocks over all patches,
mask tokens where nothing was seen, fixed sine-cosine positions, pixels out.

Shape suffixes: B sample, P patch, V visible, M masked, I image token, D width, W decoder width, C pixels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.config import Decoder as DecoderConfig
from eve.config import FeedForward, Model
from eve.model.block import Block
from eve.model.layers import Layers, Norm
from eve.packing import TokenLayout


def sine_cosine_positions(side: int, width: int) -> Tensor:
    """(1 + side * side, width): zeros for the class token, then the 2-D table of MAE.

    The first half of a row encodes the column of the patch, the second half its row, each as
    sines then cosines of width / 4 frequencies 10000^(-i / (width / 4)).
    """
    quarter = width // 4
    frequency = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angle_SQ = torch.arange(side, dtype=torch.float64)[:, None] * frequency
    table_SW = torch.cat([angle_SQ.sin(), angle_SQ.cos()], dim=1)
    columns = table_SW[None].expand(side, side, -1)
    rows = table_SW[:, None].expand(side, side, -1)
    grid = torch.cat([columns, rows], dim=-1).reshape(side * side, width)
    return torch.cat([grid.new_zeros(1, width), grid]).float()


_PLAIN = {
    "activation": "gelu",
    "layer_scale": None,
    "attention": "shared",
    "key_bias": False,
    "sub_norm": False,
}


class Decoder(nn.Module):
    positions: Tensor

    def __init__(self, config: Model, decoder: DecoderConfig, layers: Layers):
        super().__init__()
        self.embedding = nn.Linear(config.width, decoder.width)
        self.mask_token = nn.Parameter(torch.empty(decoder.width))
        positions = sine_cosine_positions(config.image_size // config.patch_size, decoder.width)
        if decoder.positions == "learned":
            self.positions = nn.Parameter(torch.empty_like(positions))  # pyright: ignore
            self.positions.no_weight_decay = True  # pyright: ignore
        else:
            self.register_buffer("positions", positions, persistent=False)
        shared = FeedForward(blocks=tuple(range(decoder.depth)), router="shared")
        # Blocks of MAE, whatever those of the encoder are.
        plain = config.model_copy(update=_PLAIN)
        self.blocks = nn.ModuleList(
            Block(
                decoder.width,
                decoder.heads,
                decoder.hidden_width,
                shared,
                index=index,
                config=plain,
                layers=layers,
            )
            for index in range(decoder.depth)
        )
        self.norm = Norm(decoder.width, eps=config.norm_eps)
        self.tokens = layers.tokens
        self.prediction = nn.Linear(decoder.width, 3 * config.patch_size**2)

    def forward(
        self, images_BID: Tensor, visible_BV: Tensor | None, masked_BM: Tensor, visible_too: bool = False
    ) -> Tensor:
        """Encoded class token and visible patches (B, 1 + V, D) -> pixels of the masked patches (B, M, C).

        Without `visible_BV` all patches were encoded, with mask tokens in the encoder: none is added here.
        With it and `visible_too` the pixels of the visible patches come before them, (B, V + M, C).
        """
        if visible_BV is None:
            x_BIW = self._blocks(self.embedding(images_BID) + self.positions.to(images_BID.dtype))
            place_BMW = masked_BM[..., None].expand(-1, -1, x_BIW.shape[-1])
            return self.prediction(self.norm(x_BIW[:, 1:].gather(1, place_BMW)))
        seen_BIW = self.embedding(images_BID)
        num_samples, num_seen, _ = seen_BIW.shape
        num_masked = masked_BM.shape[1]
        mask_BMW = self.mask_token.expand(num_samples, num_masked, -1).to(seen_BIW.dtype)
        # Attention does not care for order: seen tokens, then masked ones, each with its position.
        place_BI = torch.cat([visible_BV.new_zeros(num_samples, 1), visible_BV + 1, masked_BM + 1], dim=1)
        x_BIW = torch.cat([seen_BIW, mask_BMW], dim=1) + F.embedding(place_BI, self.positions).to(
            seen_BIW.dtype
        )
        return self.prediction(self.norm(self._blocks(x_BIW)[:, 1 if visible_too else num_seen :]))

    def _blocks(self, x_BIW: Tensor) -> Tensor:
        num_samples, length, _ = x_BIW.shape
        layout = TokenLayout.build([length] * num_samples, [0] * num_samples, x_BIW.device)
        x_TW, layout = self.tokens.split(x_BIW.flatten(0, 1), layout)
        for block in self.blocks:
            x_TW, _ = block(x_TW, layout, None)
        return self.tokens.join(x_TW, layout).view_as(x_BIW)
