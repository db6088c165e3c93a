"""A plain ViT over the patches of a picture: the encoder and the decoder of a visual tokenizer.

Shape suffixes: B sample, P patch, I class token and patches, T token, C numbers of a patch, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eve.config import Model
from eve.model.block import Block
from eve.model.layers import Layers, Norm
from eve.packing import TokenLayout


class PatchTransformer(nn.Module):
    """A linear map of what each patch holds, a class token, learned positions, blocks, and a norm."""

    def __init__(self, in_width: int, config: Model):
        super().__init__()
        self.projection = nn.Linear(in_width, config.width)
        self.class_token = nn.Parameter(torch.empty(config.width))
        self.position = nn.Parameter(torch.empty(config.num_patches + 1, config.width))
        self.position.no_weight_decay = True  # pyright: ignore
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.hidden,
                config.feed_forward_of(index),
                index=index,
                config=config,
                layers=Layers(),
            )
            for index in range(config.depth)
        )
        self.norm = Norm(config.width, eps=config.norm_eps)

    def forward(self, patches_BPC: Tensor) -> Tensor:
        """(B, P, C) -> (B, P, D)."""
        x_BPD = self.projection(patches_BPC)
        num_samples, num_patches, width = x_BPD.shape
        first_B1D = self.class_token.expand(num_samples, 1, -1)
        x_BID = torch.cat([first_B1D, x_BPD], dim=1) + self.position
        layout = TokenLayout.build([1 + num_patches] * num_samples, [0] * num_samples, x_BID.device)
        x_TD = x_BID.flatten(0, 1)
        for block in self.blocks:
            x_TD, _ = block(x_TD, layout, None)
        return self.norm(x_TD.view(num_samples, 1 + num_patches, width)[:, 1:])
