"""The whole pre-training model: the encoder and the heads of the objectives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from eve.config import Model
from eve.model.decoder import Decoder
from eve.model.encoder import Encoder, EncoderOutput
from eve.model.heads import ClassTokenHead, CodeHead, ContrastHead, MatchingHead, WordHead
from eve.model.initialisation import initialise
from eve.model.layers import Layers


class VisionLanguageModel(nn.Module):
    def __init__(self, config: Model, layers: Layers):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config, layers)
        self.decoder = None if config.decoder is None else Decoder(config, config.decoder, layers)
        eps = config.text_norm_eps or config.norm_eps
        self.word_head = WordHead(config.width, config.vocab_size, eps, layers)
        self.contrast = None if config.contrast is None else ContrastHead(config.width, config.contrast)
        self.matching = None if config.matching is None else MatchingHead(config.width, config.matching)
        self.code_head = None if config.visual_codes is None else CodeHead(config)
        self.class_token_head = None
        if config.class_token_head is not None:
            self.class_token_head = ClassTokenHead(config, config.class_token_head, layers)

    def encode(self, **inputs: Any) -> EncoderOutput:
        """See Encoder.forward."""
        return self.encoder(**inputs)

    def class_token_hidden(self, encoded: EncoderOutput) -> Tensor:
        """(B, 1 + P, D): what the class-token head makes of images that were encoded with
        `early=config.class_token_head.early`, for `class_token_codes`."""
        assert self.class_token_head is not None
        assert encoded.early_TD is not None
        assert encoded.last_TD is not None
        early_BID = encoded.images_of(encoded.early_TD)
        relative, bias = self.encoder.relative_positions, None
        if relative is not None:
            length = early_BID.shape[1]
            bias = relative(relative.index_NN[:length, :length], 0)
        class_BD = encoded.images_of(encoded.last_TD)[:, 0]
        return self.class_token_head(class_BD, early_BID, bias, self.encoder.norm)

    @property
    def class_token_codes(self) -> CodeHead:
        """Its own code head, or that of the encoder."""
        assert self.class_token_head is not None
        head = self.class_token_head.codes or self.code_head
        assert head is not None
        return head

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, encoder first."""
        heads = [head for head in (self.decoder, self.class_token_head) if head is not None]
        return [*self.encoder.blocks, *(block for head in heads for block in head.blocks)]

    def compile_blocks(self) -> None:
        """torch.compile of each block on its own: one graph for all of a kind, quick to build."""
        for block in self.blocks:
            block.compile(dynamic=True)

    def enable_checkpointing(self) -> None:
        """Recompute the encoder's blocks in the backward instead of keeping what they computed."""
        self.encoder.checkpointing = True


def build_model(
    config: Model, seed: int, device: torch.device | str = "cpu", layers: Layers | None = None
) -> VisionLanguageModel:
    """The model with its initial weights: the same for a seed on any device and layout."""
    layers = layers or Layers()
    model = VisionLanguageModel(config, layers)
    initialise(
        {layers.name_of(name): parameter for name, parameter in model.named_parameters()},
        parameter_shapes(config),
        layers.cut,
        seed=seed,
        std=config.init_std,
        rescale=config.rescale_init,
    )
    return model.to(device)


def parameter_shapes(config: Model) -> dict[str, torch.Size]:
    """Of the whole model, by name. Allocates nothing."""
    with torch.device("meta"):
        model = VisionLanguageModel(config, Layers())
    return {name: parameter.shape for name, parameter in model.named_parameters()}


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: all. encoder: embeddings, blocks and final norm: what is kept for downstream tasks.
        routed_experts: experts of learned routers.
        activated: of the encoder all but the experts that no token of a pair chooses, were all to choose the
            same: the "activated parameters" of VL-MoE.
        active: matrix weights of the encoder's blocks that one token passes (mean over the
            modalities), embeddings and norms left out.
    """

    total: int
    encoder: int
    routed_experts: int
    activated: int
    active: int


def count_parameters(config: Model) -> ParameterCount:
    """Counted on the meta device: nothing is allocated."""
    with torch.device("meta"):
        model = VisionLanguageModel(config, Layers())
    encoder = sum(p.numel() for p in model.encoder.parameters())
    routed = active = idle = 0
    for block in cast(list[Any], model.encoder.blocks):
        for linear in (block.attention.qkv, block.attention.proj):
            weights = [p.numel() for name, p in linear.named_parameters() if name.endswith("weight")]
            active += sum(weights) // len(weights)
        slot = block.feed_forward
        if slot.router is None:
            active += 2 * config.width * config.hidden
            continue
        bank = sum(p.numel() for p in slot.experts.parameters())
        routed += bank
        active += 2 * config.width * config.hidden * slot.config.k
        pools: tuple[int, ...] = slot.config.pools
        idle += bank * sum(size - slot.config.k for size in pools) // sum(pools)
    return ParameterCount(
        total=sum(p.numel() for p in model.parameters()),
        encoder=encoder,
        routed_experts=routed,
        activated=encoder - idle,
        active=active,
    )
