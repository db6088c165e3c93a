"""The feed-forward slot of a block: router -> dispatch -> bank of experts -> combine."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from eve.config import FeedForward
from eve.moe.dispatch import Dispatcher
from eve.moe.plan import RouterOutput, RoutingPlan
from eve.moe.routers import TopKRouter, fusion_plan, modality_plan, shared_plan
from eve.packing import TokenLayout
from eve.tokens import Tokens

NUM_EXPERTS_OF_HARD_ROUTERS = {"shared": 1, "modality": 2, "fusion": 3}
HARD_PLANS = {"shared": shared_plan, "modality": modality_plan, "fusion": fusion_plan}


class RoutedFeedForward(nn.Module):
    """`experts(num_experts, width, hidden, activation)` makes the bank, `hard_experts` that of a hard router."""

    def __init__(
        self,
        width: int,
        hidden: int,
        config: FeedForward,
        *,
        layer: int,
        activation: str,
        experts: Callable[[int, int, int, str], nn.Module],
        hard_experts: Callable[[int, int, int, str], nn.Module],
        dispatcher: Dispatcher,
        tokens: Tokens,
    ):
        super().__init__()
        self.config = config
        self.dispatcher, self.tokens = dispatcher, tokens
        self.router = TopKRouter(width, config, layer, tokens) if config.router == "topk" else None
        num_experts = NUM_EXPERTS_OF_HARD_ROUTERS.get(config.router, config.num_experts)
        make = hard_experts if self.router is None else experts
        self.experts = make(num_experts, width, hidden, activation)
        self.fusion = hard_experts(1, width, hidden, activation) if config.fusion_expert else None

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> tuple[Tensor, RouterOutput | None]:
        """The rows `layout.held` -> the same rows."""
        if self.fusion is not None and layout.fused:
            return self._hard(self.fusion, shared_plan(layout), x_TD, layout), None
        if self.router is None:
            return self._hard(self.experts, HARD_PLANS[self.config.router](layout), x_TD, layout), None
        x_TD, rows = self.tokens.own(x_TD, layout)
        output = self.router(x_TD, rows, layout)
        vector_MD, modality_T = None, None
        if self.config.modality_vector == "dispatch":
            vector_MD, modality_T = self.router.modality_vector, rows.modality_T
        x_ND = self.dispatcher.dispatch(x_TD, output.plan, vector_MD, modality_T)
        y_ND = self.experts(x_ND, output.plan.offsets_E)
        return self.tokens.give_back(self.dispatcher.combine(y_ND, output.plan), layout), output

    def _hard(self, bank: nn.Module, plan: RoutingPlan, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """Rows that already lie in the order of their experts."""
        y_TD = bank(self.tokens.to_columns(x_TD, layout), plan.offsets_E)
        return self.tokens.from_rows(y_TD, layout)
