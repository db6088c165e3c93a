"""From pixels and word ids to packed tokens.

Image: visible patches are picked before they are projected, so a masked image costs what is seen of
it. Text: word -> LayerNorm -> dropout -> + position + type, as EVE has it; BERT's order is an option.
Shape suffixes: B sample, P patch, V visible patch, N text token, C pixels of a patch, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve import random
from eve.config import Model
from eve.model.layers import Layers
from eve.packing import TokenLayout


def patchify(images_BCHW: Tensor, patch_size: int) -> Tensor:
    """(B, 3, H, W) -> (B, P, 3 * p * p); pixels of a patch in the order (channel, row, column), the
    order of a convolution's weights."""
    b, c, height, width = images_BCHW.shape
    p = patch_size
    x = images_BCHW.view(b, c, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), c * p * p)


def unpatchify(patches_BPC: Tensor, patch_size: int) -> Tensor:
    """The inverse, for square images: (B, P, 3 * p * p) -> (B, 3, H, W)."""
    b, num_patches, _ = patches_BPC.shape
    side, p = int(num_patches**0.5), patch_size
    x = patches_BPC.view(b, side, side, 3, p, p).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, 3, side * p, side * p)


def to_float(pixels: Tensor) -> Tensor:
    """uint8 -> fp32 in [-1, 1] (mean = std = 0.5); floating-point pixels are taken to lie there."""
    if pixels.is_floating_point():
        return pixels.float()
    return pixels.float().div_(127.5).sub_(1.0)


def pick(x_BPC: Tensor, index_BM: Tensor) -> Tensor:
    """(B, P, C) -> (B, M, C): the patches of that index."""
    return x_BPC.gather(1, index_BM[..., None].expand(-1, -1, x_BPC.shape[-1]))


class ImageEmbedding(nn.Module):
    def __init__(self, config: Model):
        super().__init__()
        self.patch_size = config.patch_size
        self.projection = nn.Linear(3 * config.patch_size**2, config.width)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.mask_token = nn.Parameter(torch.empty(config.width)) if config.mask_token else None
        self.position = _positions(config.num_patches + 1, config)

    def forward(
        self, images_BCHW: Tensor, visible_BV: Tensor | None, masked_BP: Tensor | None = None
    ) -> Tensor:
        """(B, 3, H, W) uint8 -> (B * (1 + V), D): class token, then visible patches, of each sample.

        Where `masked_BP` (bool) is true the mask token stands for what the patch shows (BEiT)."""
        patches = patchify(images_BCHW, self.patch_size)
        if visible_BV is not None:
            patches = pick(patches, visible_BV)
        x_BVD = self.projection(to_float(patches).to(self.projection.weight.dtype))
        if masked_BP is not None:
            assert self.mask_token is not None
            assert visible_BV is None
            x_BVD = torch.where(masked_BP[..., None], self.mask_token.to(x_BVD.dtype), x_BVD)
        first_D = self.class_token
        if self.position is not None:
            position_BVD = self.position[1:]
            if visible_BV is not None:
                # Not by index: the gradient of that is added by atomics, in another order each time.
                position_BVD = F.embedding(visible_BV, position_BVD)
            x_BVD = x_BVD + position_BVD
            first_D = first_D + self.position[0]
        first_B1D = first_D.expand(x_BVD.shape[0], 1, -1)
        return torch.cat([first_B1D, x_BVD], dim=1).flatten(0, 1)


class TextEmbedding(nn.Module):
    def __init__(self, config: Model, layers: Layers):
        super().__init__()
        self.dropout = config.text_dropout
        self.word = layers.word_embedding(config.vocab_size, config.width)
        self.position = _positions(config.text_positions, config)
        eps = config.text_norm_eps or config.norm_eps
        self.norm = None if config.text_norm == "none" else nn.LayerNorm(config.width, eps=eps)
        self.positions_first = config.text_norm == "after_positions"

    def forward(self, tokens_N: Tensor, layout: TokenLayout) -> Tensor:
        """(N,) -> (N, D). Without `layout.seed_B` there is no dropout."""
        x_ND = self.word(tokens_N)
        position_N = layout.text_position_N
        position_ND = None if self.position is None else F.embedding(position_N, self.position)
        if position_ND is not None and self.positions_first:
            x_ND = x_ND + position_ND
        if self.norm is not None:
            x_ND = self.norm(x_ND)
        if self.dropout and layout.seed_B is not None:
            sample_N = layout.sample_T[layout.num_image :]
            seed_N = random.mix(layout.seed_B[sample_N], position_N)
            columns_D = torch.arange(x_ND.shape[1], device=x_ND.device)
            x_ND = x_ND * random.keep_scale(seed_N[:, None], columns_D, self.dropout).to(x_ND.dtype)
        return x_ND if position_ND is None or self.positions_first else x_ND + position_ND


def _positions(number: int, config: Model) -> nn.Parameter | None:
    if not config.absolute_positions:
        return None
    position = nn.Parameter(torch.empty(number, config.width))
    position.no_weight_decay = True  # pyright: ignore
    return position
