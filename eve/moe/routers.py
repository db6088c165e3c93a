"""Routers: which expert a token goes to. A router returns; it never stashes.

`shared`, `modality` and `fusion` need no gate: eve/moe/hard_experts.py. `topk` learns:
g(x) = softmax(W (x + b_modality)), the k largest (EVE, section "modality-aware routing"), of equals the
expert of the lower index. Shape suffixes: T token, S token of a pool, D width,
E expert, K choice, N row, M modality, G group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve import random
from eve.config import FeedForward
from eve.moe.losses import importance, load
from eve.moe.plan import LOSSES, RouterOutput, RouterStats, RoutingPlan
from eve.packing import Rows, TokenLayout
from eve.tokens import Tokens
from kernels.routing import Routing, route

# Of the random numbers of layer 0: far below those of DropPath (eve/model/encoder.py).
_COUNTER = -(1 << 32)


class TopKRouter(nn.Module):
    """A learned gate over one pool of experts, or one over each of two pools (`experts_by_modality`).

    Two pools are one bank: the logits of a token for the experts of the other pool are -inf, and the tokens
    of each modality are groups of their own. A pool of one expert is dense: it has no gate and no losses, its
    weight is 1, and it drops nothing.

    Balance and capacity are those of groups of `group_size` samples (GShard, section 3.2), so that they do
    not depend on how a batch was cut into micro-batches and over devices.
    """

    def __init__(self, width: int, config: FeedForward, layer: int, tokens: Tokens):
        super().__init__()
        self.config = config
        self.layer = layer
        self.tokens = tokens
        # Rows of the gate: the experts of pools of more than one, pool after pool.
        self.weight = nn.Parameter(torch.empty(sum(size for size in config.pools if size > 1), width))
        self.modality_vector: nn.Parameter | None = None
        if config.modality_vector != "none":
            self.modality_vector = nn.Parameter(torch.empty(2, width))
            self.modality_vector.no_weight_decay = True  # pyright: ignore

    def forward(self, x_TD: Tensor, rows: Rows, layout: TokenLayout) -> RouterOutput:
        """`x_TD` are the tokens `rows` of the layout; the plan is for them, losses and counts are of all."""
        # Devices that share the batch each treat all logits alike, as a group may lie on several.
        logits_TE = self.tokens.gather_own(self._logits(x_TD, rows), layout)
        return self.route(logits_TE, self.noise(layout), rows, layout)

    def route(
        self, logits_TE: Tensor, noise_TE: Tensor | None, rows: Rows, layout: TokenLayout
    ) -> RouterOutput:
        """The plan of the tokens `rows`, from what the gate says of all.

        Args:
            logits_TE: fp32; -inf for the experts of the other pool.
            noise_TE: what is added to them, of the kind that the recipe names; None adds none.
        """
        config = self.config
        num_groups = -(-layout.num_samples // config.group_size)
        group_T = layout.sample_T // config.group_size
        pools = config.pools
        noisy_TE, later_TE = logits_TE, noise_TE
        if config.noise == "gaussian" and noise_TE is not None:
            noisy_TE, later_TE = logits_TE + noise_TE, None
        # Two pools: all groups of the image tokens, then all of the text tokens, as the tokens lie.
        queue_T = group_T if len(pools) == 1 else layout.modality_T * num_groups + group_T
        capacity_G = self._capacity(queue_T, num_groups)
        order, priority_T = ("sequence", None) if capacity_G is None else self._order(layout)
        own = slice(rows.begin, rows.begin + rows.num_image + rows.num_text)
        found = route(
            noisy_TE,
            config.k,
            group_T=queue_T,
            num_groups=num_groups * len(pools),
            modality_T=layout.modality_T,
            num_modalities=2,
            capacity_G=capacity_G,
            noise_TE=later_TE,
            priority_T=priority_T,
            order=order,
            renormalise="after_drops" if config.renormalise else "none",
            own=(own.start, own.stop - own.start),
        )
        plan = RoutingPlan(found.offsets_E, found.row_token_N, found.token_row_TK, found.weight_TK[own])
        aux_loss, means = self._losses(found, logits_TE, noisy_TE, group_T, num_groups, layout)
        stats = RouterStats(
            layer=self.layer,
            counts_ME=found.counts_ME,
            dropped_M=found.dropped_M,
            tokens_M=found.counts_ME.sum(-1) // config.k,
            entropy=found.entropy,
            **{name: value.detach() for name, value in means.items()},
        )
        return RouterOutput(plan, aux_loss, stats, logits_TE, found)

    def noise(self, layout: TokenLayout) -> Tensor | None:
        """(T, E), the same for a token on any layout of the batch; None outside training."""
        config = self.config
        seed_T1 = None if config.noise == "none" else self._seeds(layout)
        if seed_T1 is None:
            return None
        expert_E = torch.arange(config.num_experts, device=seed_T1.device)
        if config.noise == "gumbel":
            return random.gumbel(seed_T1, expert_E)
        scale_E = torch.where(expert_E < config.pools[0], 1 / config.pools[0], 1 / config.pools[-1])
        return random.normal(seed_T1, expert_E) * (config.noise_std * scale_E)

    def _order(self, layout: TokenLayout) -> tuple[str, Tensor | None]:
        """Of the queues: `order` and `priority_T` of kernels.routing.route."""
        if self.config.drop_order == "priority":
            return "priority", None
        seed_T1 = self._seeds(layout) if self.config.drop_order == "random" else None
        if seed_T1 is not None:
            return "priority", random.uniform(seed_T1, -1)[:, 0]
        if len(self.config.pools) == 1 and layout.num_image and layout.num_text:
            # The batch in order is sample after sample, image before text; rows are all images first.
            return "priority", -layout.unsorted_T.float()
        return "sequence", None

    def _seeds(self, layout: TokenLayout) -> Tensor | None:
        """(T, 1): of (sample, layer, place of the token in its sample)."""
        if layout.seed_B is None:
            return None
        seed_B = random.mix(layout.seed_B, _COUNTER - self.layer)
        place_T = layout.unsorted_T - layout.offsets_B1[layout.sample_T]
        return random.mix(seed_B[layout.sample_T], place_T)[:, None]

    def _logits(self, x_TD: Tensor, rows: Rows) -> Tensor:
        """fp32 whatever the precision of the model: near-ties decide where a token goes."""
        weight_ED, x_TD = self.weight.float(), x_TD.float()
        split = [rows.num_image, rows.num_text]
        if len(self.config.pools) == 2:
            parts, begin, row = [], 0, 0
            for x_SD, size in zip(x_TD.split(split), self.config.pools, strict=True):
                logits_SE = x_SD.new_zeros(len(x_SD), 1)
                if size > 1:
                    logits_SE = F.linear(x_SD, weight_ED[row : row + size])
                    row += size
                others = (begin, self.config.num_experts - begin - size)
                parts.append(F.pad(logits_SE, others, value=float("-inf")))
                begin += size
            return torch.cat(parts)
        logits_TE = F.linear(x_TD, weight_ED)
        if self.modality_vector is not None:
            # W (x + b) = W x + W b: two vectors of E numbers instead of T x D additions.
            shift_ME = F.linear(self.modality_vector.float(), weight_ED)
            image, text = logits_TE.split(split)
            logits_TE = torch.cat([image + shift_ME[0], text + shift_ME[1]])
        return logits_TE

    def _capacity(self, queue_T: Tensor, num_groups: int) -> Tensor | None:
        """int64, slots of each expert for the groups of each pool; None drops nothing."""
        config = self.config
        factor = config.capacity_factor if self.training else config.capacity_factor_eval
        if factor == 0:
            return None
        zeros_G = queue_T.new_zeros(num_groups * len(config.pools))
        tokens_G = zeros_G.scatter_add_(0, queue_T, torch.ones_like(queue_T))
        return torch.cat(
            [
                tokens_g
                if size == 1
                else capacity(tokens_g, size, config.k, factor, config.capacity_rule, config.min_capacity)
                for tokens_g, size in zip(tokens_G.split(num_groups), config.pools, strict=True)
            ]
        )

    def _losses(
        self,
        found: Routing,
        logits_TE: Tensor,
        noisy_TE: Tensor,
        group_T: Tensor,
        num_groups: int,
        layout: TokenLayout,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted sum of the losses of all pools, and each loss as RouterStats has it."""
        config, pools = self.config, self.config.pools
        total = logits_TE.new_zeros(())
        means: dict[str, Tensor] = dict.fromkeys(LOSSES, total)
        rows = [layout.num_image, layout.num_text] if len(pools) == 2 else [layout.num_tokens]
        learned = sum(size > 1 and num > 0 for size, num in zip(pools, rows, strict=True))
        first, begin = 0, 0
        for pool, (size, num) in enumerate(zip(pools, rows, strict=True)):
            if size > 1 and num > 0:
                of_groups = slice(pool * num_groups, (pool + 1) * num_groups)
                of_pool = (slice(first, first + num), slice(begin, begin + size))
                group_S = group_T[of_pool[0]]
                losses = {
                    # The kernel multiplies by the experts of both pools.
                    "load_balance": found.balance_G[of_groups].mean() * (size / config.num_experts),
                    "z_loss": found.z_loss_G[of_groups].mean(),
                }
                if _of(config.importance_weight, pool):
                    gate_SE = torch.softmax(logits_TE[of_pool], dim=-1)
                    losses["importance"] = importance(gate_SE, group_S, num_groups).mean()
                if noisy_TE is not logits_TE and _of(config.load_weight, pool):
                    threshold_S = noisy_TE.gather(1, found.expert_TK[:, -1:])[of_pool[0], 0]
                    std = config.noise_std / size
                    losses["load"] = load(logits_TE[of_pool], threshold_S, std, group_S, num_groups).mean()
                for name, value in losses.items():
                    means[name] = means[name] + value / learned
                    if weight := _of(getattr(config, f"{name}_weight"), pool):
                        total = total + weight * value
            first, begin = first + num, begin + size
        return total, means


def _of(weight: float | tuple[float, float], pool: int) -> float:
    return weight[pool] if isinstance(weight, tuple) else weight


def capacity(
    tokens_G: Tensor,
    num_experts: int,
    k: int,
    factor: float,
    rule: str,
    min_capacity: int = 1,
    multiple: int = 4,
) -> Tensor:
    """(G,) int64, slots of an expert for T tokens of a group, each rule in the arithmetic of its authors.

    gshard: max(min_capacity, ceil(T / E * (factor k))) in fp32 (DeepSpeed, EVE).
    vmoe: ceil(T k factor / E) in fp64, rounded up to a multiple.
    tutel: k int(factor ceil(T / E)).
    """
    if rule == "gshard":
        slots_G = (tokens_G.double() / num_experts).float() * (factor * k)
        return slots_G.ceil().long().clamp_min(min_capacity)
    if rule == "vmoe":
        slots_G = ((tokens_G * k).double() * factor / num_experts).ceil().long()
        return -(-slots_G // multiple) * multiple
    assert rule == "tutel", rule
    return k * ((-(-tokens_G // num_experts)).double() * factor).floor().long()
