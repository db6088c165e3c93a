"""Routers: which expert a token goes to. A router returns; it never stashes.

`shared` and `modality` need no gate: their plan is a property of the token layout, built once a
batch. `topk` learns: g(x) = softmax(W (x + b_modality)), the k largest (EVE, section "modality-aware
routing"). Shape suffixes: T token, D width, E expert, K choice, N row, M modality, G group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.config import FeedForward
from eve.moe.plan import RouterOutput, RouterStats, RoutingPlan
from eve.packing import Rows, TokenLayout
from eve.tokens import Tokens
from kernels.routing import route


def shared_plan(layout: TokenLayout) -> RoutingPlan:
    """One expert takes all tokens as they lie."""
    return RoutingPlan(offsets_E=layout.ends_M[1:])


def modality_plan(layout: TokenLayout) -> RoutingPlan:
    """Expert 0 takes the image tokens, expert 1 the text tokens, as they lie."""
    return RoutingPlan(offsets_E=layout.ends_M)


def fusion_plan(layout: TokenLayout) -> RoutingPlan:
    """As `modality_plan`; of a fused layout expert 2 takes all tokens."""
    last = layout.ends_M[1:]
    first = torch.zeros_like(layout.ends_M) if layout.fused else layout.ends_M
    return RoutingPlan(offsets_E=torch.cat([first, last]))


class TopKRouter(nn.Module):
    """A learned gate over one pool of experts.

    Balance and capacity are those of groups of `group_size` samples (GShard, section 3.2), so that they do
    not depend on how a batch was cut into micro-batches and over devices.
    """

    def __init__(self, width: int, config: FeedForward, layer: int, tokens: Tokens):
        super().__init__()
        self.config = config
        self.layer = layer
        self.tokens = tokens
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.modality_vector: nn.Parameter | None = None
        if config.modality_vector != "none":
            self.modality_vector = nn.Parameter(torch.empty(2, width))
            self.modality_vector.no_weight_decay = True  # pyright: ignore

    def forward(self, x_TD: Tensor, rows: Rows, layout: TokenLayout) -> RouterOutput:
        """`x_TD` are the tokens `rows` of the layout; the plan is for them, losses and counts are of all."""
        config = self.config
        # Devices that share the batch each treat all logits alike, as a group may lie on several.
        logits_TE = self.tokens.gather_own(self._logits(x_TD, rows), layout)
        num_groups = -(-layout.num_samples // config.group_size)
        group_T = layout.sample_T // config.group_size
        own = slice(rows.begin, rows.begin + x_TD.shape[0])
        found = route(
            logits_TE,
            config.k,
            group_T=group_T,
            num_groups=num_groups,
            modality_T=layout.modality_T,
            num_modalities=2,
            capacity_G=self._capacity(group_T, num_groups),
            renormalise=config.renormalise,
            own=(own.start, own.stop - own.start),
        )
        balance, z_loss = found.balance_G.mean(), found.z_loss_G.mean()
        aux_loss = config.load_balance_weight * balance
        if config.z_loss_weight:
            aux_loss = aux_loss + config.z_loss_weight * z_loss
        stats = RouterStats(
            layer=self.layer,
            counts_ME=found.counts_ME,
            dropped_M=found.dropped_M,
            tokens_M=found.counts_ME.sum(-1) // config.k,
            entropy=found.entropy,
            load_balance=balance.detach(),
            z_loss=z_loss.detach(),
        )
        plan = RoutingPlan(found.offsets_E, found.row_token_N, found.token_row_TK, found.weight_TK[own])
        return RouterOutput(plan, aux_loss, stats)

    def _logits(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """fp32 whatever the precision of the model: near-ties decide where a token goes."""
        weight_ED = self.weight.float()
        logits_TE = F.linear(x_TD.float(), weight_ED)
        if self.modality_vector is not None:
            # W (x + b) = W x + W b: two vectors of E numbers instead of T x D additions.
            shift_ME = F.linear(self.modality_vector.float(), weight_ED)
            image, text = logits_TE.split([rows.num_image, rows.num_text])
            logits_TE = torch.cat([image + shift_ME[0], text + shift_ME[1]])
        return logits_TE

    def _capacity(self, group_T: Tensor, num_groups: int) -> Tensor | None:
        """(G,) int64: slots of each expert for a group; None drops nothing."""
        config = self.config
        factor = config.capacity_factor if self.training else config.capacity_factor_eval
        if factor == 0:
            return None
        zeros_G = torch.zeros(num_groups, dtype=torch.int64, device=group_T.device)
        tokens_G = zeros_G.scatter_add_(0, group_T, torch.ones_like(group_T))
        slots_G = tokens_G.double() * (factor * config.k / config.num_experts)
        # A product such as 1.1 * 10 is a little more than 11.
        return (slots_G - 1e-9).ceil().long().clamp_min(config.min_capacity)
