"""The encoder: embeddings, blocks, final norm. One stack for images, texts and pairs.

Shape suffixes: B sample, V visible patch, N text token, T token, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eve.config import Model
from eve import random
from eve.model.block import Block
from eve.model.embeddings import ImageEmbedding, TextEmbedding
from eve.model.layers import Layers, Norm
from eve.moe.plan import RouterOutput
from eve.packing import TokenLayout


@dataclass(frozen=True)
class EncoderOutput:
    """`x_TD` after the final norm; `routing` of the learned routers, one each."""

    x_TD: Tensor
    layout: TokenLayout
    routing: list[RouterOutput]

    @property
    def images_BID(self) -> Tensor:
        """Image tokens, class token first; all samples have the same number."""
        return self.x_TD[: self.layout.num_image].view(self.layout.num_samples, -1, self.x_TD.shape[-1])

    @property
    def texts_ND(self) -> Tensor:
        """Text tokens, packed as the batch's tokens_N."""
        return self.x_TD[self.layout.num_image :]

    def aux_loss(self) -> Tensor:
        """Mean over the learned routers of their weighted auxiliary losses."""
        if not self.routing:
            return self.x_TD.new_zeros((), dtype=torch.float32)
        return torch.stack([routing.aux_loss for routing in self.routing]).mean()


class Encoder(nn.Module):
    def __init__(self, config: Model, layers: Layers):
        super().__init__()
        self.image_embedding = ImageEmbedding(config)
        self.text_embedding = TextEmbedding(config, layers)
        self.type_embedding = nn.Parameter(torch.empty(2, config.width))
        self.type_embedding.no_weight_decay = True  # pyright: ignore
        self.embedding_norm = Norm(config.width, eps=config.norm_eps) if config.embedding_norm else None
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.hidden,
                config.feed_forward_of(index),
                index=index,
                activation=config.activation,
                layer_scale=config.layer_scale,
                eps=config.norm_eps,
                layers=layers,
            )
            for index in range(config.depth)
        )
        self.norm = Norm(config.width, eps=config.norm_eps)
        self.tokens = layers.tokens
        # DropPath rises linearly from 0 to drop_path over the depth.
        self.drop_path = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.checkpointing = False

    def forward(
        self,
        *,
        images_BCHW: Tensor | None = None,
        visible_BV: Tensor | None = None,
        tokens_N: Tensor | None = None,
        text_lengths: list[int] | None = None,
        seed_B: Tensor | None = None,
    ) -> EncoderOutput:
        """Encodes images, texts or pairs.

        Args:
            images_BCHW: uint8. visible_BV: int64 patch indices to encode; None encodes all.
            tokens_N: int64 ids of all samples one after another, with their `text_lengths` on the host.
            seed_B: int64, keys of dropout and drop path; used in training mode only.
        """
        reference = images_BCHW if images_BCHW is not None else tokens_N
        assert reference is not None, "neither images nor texts"
        num_samples = len(images_BCHW) if images_BCHW is not None else len(text_lengths or [])
        num_visible = 0
        parts = []
        if images_BCHW is not None:
            image_ID = self.image_embedding(images_BCHW, visible_BV) + self.type_embedding[0]
            num_visible = image_ID.shape[0] // num_samples
            parts.append(image_ID)
        seed_B = seed_B if self.training else None
        layout = TokenLayout.build(
            [num_visible] * num_samples, text_lengths or [0] * num_samples, reference.device, seed_B
        )
        if tokens_N is not None:
            parts.append(self.text_embedding(tokens_N, layout) + self.type_embedding[1])
        x_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.embedding_norm is not None:
            x_TD = self.embedding_norm(x_TD)
        x_TD, layout = self.tokens.split(x_TD, layout)
        routing = []
        for index, block in enumerate(self.blocks):
            keep_2T = self._keep(index, layout)
            x_TD, output = self._run(block, x_TD, layout, keep_2T)
            if output is not None:
                routing.append(output)
        return EncoderOutput(self.tokens.join(self.norm(x_TD), layout), layout, routing)

    def _keep(self, index: int, layout: TokenLayout) -> Tensor | None:
        seed_B = layout.seed_B
        if seed_B is None or self.drop_path[index] == 0:
            return None
        branch_21 = torch.arange(2, device=seed_B.device)[:, None]
        # Counters below zero: TextEmbedding uses those from zero on.
        keep_2B = random.keep_scale(seed_B[None], -2 - 2 * index - branch_21, self.drop_path[index])
        return keep_2B[:, layout.held.sample_T]

    def _run(self, block: nn.Module, *inputs: Any) -> Any:
        if self.checkpointing and self.training:
            # Re-entrant checkpointing gives wrong gradients where the encoder runs twice in a step.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)
