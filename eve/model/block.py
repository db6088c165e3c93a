"""One pre-norm Transformer block: attention and a routed feed-forward, each with LayerScale and DropPath."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from eve.config import FeedForward, Model
from eve.model.attention import Attention
from eve.model.layers import Layers, ModalityNorm, Norm
from eve.moe.hard_experts import SubNormExpert
from eve.moe.layer import RoutedFeedForward
from eve.moe.plan import RouterOutput
from eve.packing import TokenLayout


class Block(nn.Module):
    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        feed_forward: FeedForward,
        *,
        index: int,
        config: Model,
        layers: Layers,
    ):
        """Sizes are the encoder's or the decoder's; the variant of the block is the model's."""
        super().__init__()
        eps = config.norm_eps
        self.norm1 = ModalityNorm(width, eps) if config.attention == "modality" else Norm(width, eps=eps)
        self.attention = Attention(width, heads, config, layers)
        self.norm2 = _feed_forward_norm(width, eps, feed_forward)
        self.feed_forward = RoutedFeedForward(
            width,
            hidden,
            feed_forward,
            layer=index,
            activation=config.activation,
            experts=layers.routed_experts,
            expert=partial(SubNormExpert, eps=eps) if config.sub_norm else layers.expert,
            dispatcher=layers.dispatcher,
            tokens=layers.tokens,
        )
        if config.layer_scale is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1 = nn.Parameter(torch.full((width,), config.layer_scale))
            self.gamma2 = nn.Parameter(torch.full((width,), config.layer_scale))

    def forward(
        self, x_TD: Tensor, layout: TokenLayout, keep_2T: Tensor | None, bias: Tensor | None = None
    ) -> tuple[Tensor, RouterOutput | None]:
        """x_TD are the rows `layout.held`; `keep_2T` is what DropPath multiplies the two branches of each by,
        None keeps all; `bias` is added to the logits of attention."""
        branch = self.attention(self.norm1(x_TD, layout), layout, bias)
        x_TD = _add(x_TD, branch, self.gamma1, None if keep_2T is None else keep_2T[0])
        branch, routing = self.feed_forward(self.norm2(x_TD, layout), layout)
        x_TD = _add(x_TD, branch, self.gamma2, None if keep_2T is None else keep_2T[1])
        return x_TD, routing


def _feed_forward_norm(width: int, eps: float, feed_forward: FeedForward) -> nn.Module:
    """One norm for each kind of expert, as VLMo and EVE have it."""
    kinds = {"modality": 2, "fusion": 3}.get(feed_forward.router, 1)
    if feed_forward.router == "topk" and feed_forward.experts_by_modality:
        kinds = 3 if feed_forward.fusion_expert else 2
    return Norm(width, eps=eps) if kinds == 1 else ModalityNorm(width, eps, kinds)


def _add(x_TD: Tensor, branch_TD: Tensor, gamma_D: Tensor | None, keep_T: Tensor | None) -> Tensor:
    if keep_T is not None:
        branch_TD = branch_TD * keep_T[:, None].to(branch_TD.dtype)
    return x_TD + branch_TD if gamma_D is None else torch.addcmul(x_TD, branch_TD, gamma_D)
