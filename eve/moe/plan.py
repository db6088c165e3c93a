"""What a router returns: the plan that dispatch and combine follow, and what to report.

Shape suffixes: T token, K choice, E expert, N dispatched row, M modality.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.routing import Routing

# Fields of RouterStats: auxiliary losses without their weights.
LOSSES = ("load_balance", "z_loss", "importance", "load")


@dataclass(frozen=True)
class RoutingPlan:
    """Which token goes to which row of which expert, with what weight.

    Attributes:
        offsets_E: int32, end of each expert's rows; the rows of an expert lie together. Rows past
            the last offset belong to dropped choices: no expert computes them and nobody reads them.
        row_token_N: int64, the token of each row.
        token_row_TK: int64, the row of each choice of a token, -1 where it was dropped.
        weight_TK: fp32, the weight of each choice.
    """

    offsets_E: Tensor
    row_token_N: Tensor
    token_row_TK: Tensor
    weight_TK: Tensor


@dataclass(frozen=True)
class RouterStats:
    """What one router did with one micro-batch; all tensors detached and on the device.

    Attributes:
        layer: index of the block.
        counts_ME: int64, choices of each modality that named each expert, before drops.
        dropped_M: int64, choices of each modality that found their expert full.
        tokens_M: int64, tokens of each modality.
        entropy: fp32 scalar, sum over tokens of the entropy of the gate in nats.
        load_balance, z_loss, importance, load: fp32 scalars, auxiliary losses without their weights; means
            over the groups, and over the pools that hold tokens and more than one expert. The last two are 0
            where the recipe gives them no weight.
    """

    layer: int
    counts_ME: Tensor
    dropped_M: Tensor
    tokens_M: Tensor
    entropy: Tensor
    load_balance: Tensor
    z_loss: Tensor
    importance: Tensor
    load: Tensor


@dataclass(frozen=True)
class RouterOutput:
    """What a router made of its tokens.

    Attributes:
        plan: for the tokens that are dispatched here.
        aux_loss: weighted auxiliary losses of this layer, with gradient.
        logits_TE: fp32, of the gate for all tokens, without noise.
        choices: of all tokens, dropped ones included.
    """

    plan: RoutingPlan
    aux_loss: Tensor
    stats: RouterStats
    logits_TE: Tensor
    choices: Routing
