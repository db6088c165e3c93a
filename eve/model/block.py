"""One pre-norm Transformer block: attention and a routed feed-forward, each with LayerScale and DropPath."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from eve.config import FeedForward
from eve.model.attention import Attention
from eve.model.layers import Layers, ModalityNorm, Norm
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
        activation: str,
        layer_scale: float | None,
        eps: float,
        layers: Layers,
    ):
        super().__init__()
        self.norm1 = Norm(width, eps=eps)
        self.attention = Attention(width, heads, layers)
        # One norm for each kind of expert, as VLMo and EVE have it.
        self.norm2 = ModalityNorm(width, eps) if feed_forward.router == "modality" else Norm(width, eps=eps)
        self.feed_forward = RoutedFeedForward(
            width,
            hidden,
            feed_forward,
            layer=index,
            activation=activation,
            experts=layers.routed_experts if feed_forward.router == "topk" else layers.experts,
            dispatcher=layers.dispatcher,
            tokens=layers.tokens,
        )
        if layer_scale is None:
            self.gamma1 = self.gamma2 = None
        else:
            self.gamma1 = nn.Parameter(torch.full((width,), layer_scale))
            self.gamma2 = nn.Parameter(torch.full((width,), layer_scale))

    def forward(
        self, x_TD: Tensor, layout: TokenLayout, keep_2T: Tensor | None
    ) -> tuple[Tensor, RouterOutput | None]:
        """x_TD are the rows `layout.held`; `keep_2T` is what DropPath multiplies the two branches of each by,
        None keeps all."""
        branch = self.attention(self.norm1(x_TD), layout)
        x_TD = _add(x_TD, branch, self.gamma1, None if keep_2T is None else keep_2T[0])
        branch, routing = self.feed_forward(self.norm2(x_TD, layout), layout)
        x_TD = _add(x_TD, branch, self.gamma2, None if keep_2T is None else keep_2T[1])
        return x_TD, routing


def _add(x_TD: Tensor, branch_TD: Tensor, gamma_D: Tensor | None, keep_T: Tensor | None) -> Tensor:
    if keep_T is not None:
        branch_TD = branch_TD * keep_T[:, None].to(branch_TD.dtype)
    return x_TD + branch_TD if gamma_D is None else torch.addcmul(x_TD, branch_TD, gamma_D)
