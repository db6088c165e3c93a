"""Heads on encoded tokens."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.config import ClassTokenHead as ClassTokenHeadConfig
from eve.config import Contrast, FeedForward, Matching, Model
from eve.model.block import Block
from eve.model.layers import Layers, Norm, VocabLinear
from eve.packing import TokenLayout
from kernels.masked_text_loss import TextLoss


class WordHead(nn.Module):
    """Text decoder of EVE: a two-layer MLP onto the vocabulary, of masked tokens only."""

    def __init__(self, width: int, vocab_size: int, eps: float, layers: Layers):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.output = layers.vocab_linear(width, vocab_size)

    def forward(self, x_KD: Tensor) -> Tensor:
        """(K, D) -> logits (K, V)."""
        return self.output(self._hidden(x_KD))

    def cross_entropy(
        self, x_KD: Tensor, target_K: Tensor, smoothing: float = 0.0, z_loss: float = 0.0
    ) -> TextLoss:
        """Of (K, D) encoded tokens against (K,) words; the logits are never whole in memory."""
        return self.output.cross_entropy(self._hidden(x_KD), target_K, smoothing, z_loss)  # pyright: ignore

    def _hidden(self, x_KD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x_KD)))


class ContrastHead(nn.Module):
    """Class tokens of image and text, projected to one space: projections and a temperature for each path
    through the experts of `fusion` routers (VLMo's ITC)."""

    def __init__(self, width: int, config: Contrast):
        super().__init__()
        self.config = config
        self.image = nn.ModuleDict({p: nn.Linear(width, config.width, bias=False) for p in config.paths})
        self.text = nn.ModuleDict({p: nn.Linear(width, config.width, bias=False) for p in config.paths})
        initial = config.initial_temperature
        if config.temperature == "scale":
            initial = math.log(1 / initial)
        for path in config.paths:
            temperature = nn.Parameter(torch.tensor([initial]))
            temperature.no_weight_decay = True  # pyright: ignore
            self.register_parameter(f"temperature_{path}", temperature)

    def project_images(self, class_BD: Tensor, path: str) -> Tensor:
        """(B, D) -> (B, width), of length 1, in fp32."""
        return F.normalize(self.image[path](class_BD).float(), dim=-1)

    def project_texts(self, class_BD: Tensor, path: str) -> Tensor:
        return F.normalize(self.text[path](class_BD).float(), dim=-1)

    def scale(self, path: str) -> Tensor:
        """What cosines are multiplied by: exp(scale), or 1 / temperature."""
        value = getattr(self, f"temperature_{path}").float()
        temperature = (-value).exp() if self.config.temperature == "scale" else value
        if self.config.clamp:
            temperature = temperature.clamp(*self.config.clamp)
        return 1 / temperature[0]


class MatchingHead(nn.Module):
    """Two logits, of no match and of match, from the text's class token of a fused pair (VLMo's ITM)."""

    def __init__(self, width: int, config: Matching):
        super().__init__()
        self.pooler = nn.Linear(width, width) if config.pooler else None
        self.output = nn.Linear(width, 2)

    def pool(self, class_BD: Tensor) -> Tensor:
        return class_BD if self.pooler is None else torch.tanh(self.pooler(class_BD))

    def forward(self, class_BD: Tensor) -> Tensor:
        """(B, D) -> (B, 2)."""
        return self.output(self.pool(class_BD))


class ClassTokenHead(nn.Module):
    """BEiT v2's patch aggregation (Peng et al. 2022): the last class token with patches of an early block,
    through blocks of its own, to hidden states that predict the same codes."""

    def __init__(self, model: Model, config: ClassTokenHeadConfig, layers: Layers):
        super().__init__()
        feed_forward = FeedForward(blocks=tuple(range(config.depth)), router="shared")
        self.blocks = nn.ModuleList(
            Block(model.width, model.heads, model.hidden, feed_forward, index=i, config=model, layers=layers)
            for i in range(config.depth)
        )
        self.norm = None if config.shared else Norm(model.width, eps=model.norm_eps)
        self.codes = None if config.shared or not model.visual_codes else CodeHead(model)
        self.tokens = layers.tokens

    def forward(
        self, class_BD: Tensor, early_BID: Tensor, bias: Tensor | None, shared_norm: nn.Module
    ) -> Tensor:
        """Class token after the last block (B, D) and early hidden states (B, 1 + P, D) -> (B, 1 + P, D)
        after a norm, its own or that of the encoder. `bias`: of the attention logits, as the blocks of the
        encoder with shared positions have."""
        x_BID = torch.cat([class_BD[:, None], early_BID[:, 1:]], dim=1)
        num_samples, length, _ = x_BID.shape
        layout = TokenLayout.build([length] * num_samples, [0] * num_samples, x_BID.device)
        x_TD, layout = self.tokens.split(x_BID.flatten(0, 1), layout)
        for block in self.blocks:
            x_TD, _ = block(x_TD, layout, None, bias)
        x_TD = (self.norm or shared_norm)(x_TD, layout)
        return self.tokens.join(x_TD, layout).view_as(x_BID)


class CodeHead(VocabLinear):
    """From hidden states of patches to the codes of a visual tokenizer."""

    def __init__(self, config: Model):
        super().__init__(config.width, config.visual_codes or 0)
