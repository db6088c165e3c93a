"""The feed-forward of a block: experts by modality, or router -> dispatch -> bank of experts -> combine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from eve.config import FeedForward
from eve.moe.dispatch import Dispatcher
from eve.moe.hard_experts import HardExperts
from eve.moe.plan import RouterOutput
from eve.moe.routers import TopKRouter
from eve.packing import TokenLayout
from eve.tokens import Tokens


class RoutedFeedForward(nn.Module):
    """`experts(num_experts, width, hidden, activation)` makes the bank of a learned router, `expert(width,
    hidden, activation)` one expert of a hard router."""

    def __init__(
        self,
        width: int,
        hidden: int,
        config: FeedForward,
        *,
        layer: int,
        activation: str,
        experts: Callable[[int, int, int, str], nn.Module],
        expert: Callable[[int, int, str], nn.Module],
        dispatcher: Dispatcher,
        tokens: Tokens,
    ):
        super().__init__()
        self.config = config
        self.dispatcher, self.tokens = dispatcher, tokens
        self.router = self.fusion = None
        if config.router == "topk":
            self.router = TopKRouter(width, config, layer, tokens)
            self.experts = experts(config.num_experts, width, hidden, activation)
            self.fusion = expert(width, hidden, activation) if config.fusion_expert else None
        else:
            self.experts = HardExperts(config.router, lambda: expert(width, hidden, activation))

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, RouterOutput | None]:
        """The rows `layout.held` -> the same rows."""
        if self.router is None:
            y_TD = self.experts(self.tokens.to_columns(x_TD, layout), layout)
            return self.tokens.from_rows(y_TD, layout), None
        if self.fusion is not None and layout.fused:
            return self.tokens.from_rows(self.fusion(self.tokens.to_columns(x_TD, layout)), layout), None
        x_TD, rows = self.tokens.own(x_TD, layout)
        output = self.router(x_TD, rows, layout)
        vector_MD, modality_T = None, None
        if self.config.modality_vector == "dispatch":
            vector_MD, modality_T = self.router.modality_vector, rows.modality_T
        x_ND = self.dispatcher.dispatch(x_TD, output.plan, vector_MD, modality_T)
        y_ND = self.experts(x_ND, output.plan.offsets_E)
        return self.tokens.give_back(self.dispatcher.combine(y_ND, output.plan), layout), output
