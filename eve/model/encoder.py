"""The encoder: embeddings, blocks, final norm. One stack for images, texts and pairs.

Shape suffixes: B sample, V visible patch, N text token, T token, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eve import random
from eve.config import Model
from eve.model.block import Block
from eve.model.embeddings import ImageEmbedding, TextEmbedding
from eve.model.layers import Layers, ModalityNorm, Norm
from eve.model.relative_positions import RelativePositions
from eve.moe.plan import RouterOutput
from eve.packing import TokenLayout


class _Identity(nn.Identity):
    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:  # pyright: ignore
        return x_TD


_FINAL_NORMS = {
    "shared": lambda config: Norm(config.width, eps=config.norm_eps),
    "modality": lambda config: ModalityNorm(config.width, config.norm_eps),
    "none": lambda config: _Identity(),
}


@dataclass(frozen=True)
class EncoderOutput:
    """What the encoder made of a batch.

    Attributes:
        x_TD: after the final norm.
        routing: of the learned routers, one each.
        early_TD, last_TD: hidden states after block `early` and after the last one, before the norm, where
            `early` was asked for.
        fusion: the same tokens on the path of fused pairs, where both paths were asked for.
    """

    x_TD: Tensor
    layout: TokenLayout
    routing: list[RouterOutput]
    early_TD: Tensor | None = None
    last_TD: Tensor | None = None
    fusion: EncoderOutput | None = None

    def images_of(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (B, 1 + V, D): image tokens, class token first; all samples have the same number."""
        return x_TD[: self.layout.num_image].view(self.layout.num_samples, -1, x_TD.shape[-1])

    @property
    def images_BID(self) -> Tensor:
        return self.images_of(self.x_TD)

    @property
    def texts_ND(self) -> Tensor:
        """Text tokens, packed as the batch's tokens_N."""
        return self.x_TD[self.layout.num_image :]

    @property
    def image_class_BD(self) -> Tensor:
        return self.images_BID[:, 0]

    @property
    def text_class_BD(self) -> Tensor:
        """The first token of each text."""
        lengths = np.asarray(self.layout.text_lengths)
        first_B = torch.from_numpy(np.cumsum(lengths) - lengths).to(self.x_TD.device)
        return self.texts_ND.index_select(0, first_B)

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
        # Image, text, second image of a pair of images.
        self.type_embedding = nn.Parameter(torch.empty(config.num_types, config.width))
        self.type_embedding.no_weight_decay = True  # pyright: ignore
        self.embedding_norm = Norm(config.width, eps=config.norm_eps) if config.embedding_norm else None
        self.blocks = nn.ModuleList(
            Block(
                config.width,
                config.heads,
                config.hidden,
                config.feed_forward_of(index),
                index=index,
                config=config,
                layers=layers,
            )
            for index in range(config.depth)
        )
        self.relative_positions: RelativePositions | None = None
        if config.relative_positions != "none":
            self.relative_positions = layers.relative_positions(
                config.image_size // config.patch_size,
                config.text_positions,
                config.depth if config.relative_positions == "blocks" else 1,
                config.heads,
            )
        self.norm = _FINAL_NORMS[config.final_norm](config)
        self.tokens = layers.tokens
        # DropPath rises linearly from 0 to drop_path over the depth.
        self.drop_path = [config.drop_path * i / max(1, config.depth - 1) for i in range(config.depth)]
        self.first_fusion = config.first_fusion
        self.checkpointing = False

    def forward(
        self,
        *,
        images_BCHW: Tensor | None = None,
        visible_BV: Tensor | None = None,
        masked_BP: Tensor | None = None,
        image_type: int = 0,
        tokens_N: Tensor | None = None,
        text_lengths: list[int] | None = None,
        padding_N: Tensor | None = None,
        seed_B: Tensor | None = None,
        both_paths: bool = False,
        early: int | None = None,
    ) -> EncoderOutput:
        """Encodes images, texts or pairs.

        Args:
            images_BCHW: uint8. visible_BV: int64 patch indices to encode; None encodes all.
            masked_BP: bool, patches for which the mask token stands.
            image_type: line of the type vectors; 2 for the second of two images.
            tokens_N: int64 ids of all samples one after another, with their `text_lengths` on the host.
            padding_N: bool, tokens that none sees.
            seed_B: int64, keys of dropout, drop path and router noise; used in training mode only.
            both_paths: from the first block with a `fusion` router on, also with the experts of pairs.
            early: also the hidden states after so many blocks.
        """
        reference = images_BCHW if images_BCHW is not None else tokens_N
        assert reference is not None, "neither images nor texts"
        num_samples = len(images_BCHW) if images_BCHW is not None else len(text_lengths or [])
        num_visible = 0
        parts = []
        if images_BCHW is not None:
            image_ID = self.image_embedding(images_BCHW, visible_BV, masked_BP)
            image_ID = image_ID + self.type_embedding[2 if image_type == 2 else 0]
            num_visible = image_ID.shape[0] // num_samples
            parts.append(image_ID)
        layout = TokenLayout.build(
            [num_visible] * num_samples,
            text_lengths or [0] * num_samples,
            reference.device,
            seed_B if self.training else None,
            fused=images_BCHW is not None and tokens_N is not None,
            padding_N=padding_N,
        )
        if tokens_N is not None:
            parts.append(self.text_embedding(tokens_N, layout) + self.type_embedding[1])
        x_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.embedding_norm is not None:
            x_TD = self.embedding_norm(x_TD)
        index = None if self.relative_positions is None else self.relative_positions.index(layout, visible_BV)
        x_TD, layout = self.tokens.split(x_TD, layout)
        depth, branch = len(self.blocks), self.first_fusion if both_paths else len(self.blocks)
        routing: list[RouterOutput] = []
        early_TD = None
        if early is not None:
            x_TD = self._blocks(range(early), x_TD, layout, index, routing)
            early_TD = self.tokens.join(x_TD, layout)
        x_TD = self._blocks(range(early or 0, branch), x_TD, layout, index, routing)
        fusion = None
        if both_paths:
            fused = replace(layout, fused=True)
            fusion_TD = self._blocks(range(branch, depth), x_TD, fused, index, shared := list(routing))
            fusion = EncoderOutput(self._finish(fusion_TD, fused), fused, shared)
            x_TD = self._blocks(range(branch, depth), x_TD, layout, index, routing)
        last_TD = None if early is None else self.tokens.join(x_TD, layout)
        return EncoderOutput(self._finish(x_TD, layout), layout, routing, early_TD, last_TD, fusion)

    def _blocks(
        self,
        indices: range,
        x_TD: Tensor,
        layout: TokenLayout,
        index: Tensor | None,
        routing: list[RouterOutput],
    ) -> Tensor:
        for number in indices:
            bias = None
            if self.relative_positions is not None:
                bias = self.relative_positions(index, number)
            x_TD, output = self._run(self.blocks[number], x_TD, layout, self._keep(number, layout), bias)
            if output is not None:
                routing.append(output)
        return x_TD

    def _finish(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        return self.tokens.join(self.norm(x_TD, layout), layout)

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
