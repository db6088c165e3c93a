"""Bytes that one rank sends in a step, and the least that its layout allows.

Collectives. A rank of n that holds or wants S bytes in all sends at least, and with a ring exactly
(Patarasu and Yuan 2009; Chan et al. 2007):

    all-reduce                      2 (n - 1) / n S
    all-gather, reduce-scatter        (n - 1) / n S      S is the whole tensor
    reduce to one rank                (n - 1) / n S      on average over the ranks
    all-to-all                        (n - 1) / n S      S is what one rank has for all

Of n ranks on hosts with m of them each, one in m sends over the network in a ring, so (1 / m) of the bytes
cross hosts on average; of an all-to-all, (n - m) / n of S.

Gradients and weights (N numbers averaged over n data-parallel ranks, gradients reduced in fp32 as
ds_configs/ say, weights of w bytes; Rajbhandari et al. 2020, section 7):

    ZeRO 0    least, and sent: all-reduce 4 N
    ZeRO 1    least: reduce-scatter 4 N, all-gather w N
              sent: all-reduce 4 N (each rank then drops what others own), all-gather w N
    ZeRO 2    least: as ZeRO 1.   sent: all-reduce 4 N of what a pass used after each pass, all-gather w N
              (both, but for bf16 at stage 1: reduce 4 N where `use_multi_rank_bucket_allreduce` is false)
    ZeRO 3    least: reduce-scatter 4 N, all-gather w N once.   sent, at most: reduce-scatter 4 N, and what a
              pass uses all-gathered for its forward and for its backward; what is used again soon or is
              small (`stage3_*` of ds_configs/) is kept

Experts count by themselves, with n their copies. Tensor parallelism (t ranks, T tokens of width D and e bytes
a number; Shoeybi et al. 2019, section 3; Korthikanti et al. 2022, section 4.2.2), for each pass:

    attention, hard-routed feed-forward    all-reduce T D e forward and backward; with sequence parallelism
                                           an all-gather and a reduce-scatter for each: the same bytes.
                                           Activation checkpointing: those of the forward once more
    learned feed-forward                   an all-gather T D e forward and backward; none with sequence
                                           parallelism, as the tokens are split. Gate logits: all-gather 4 T E
    word embedding                         all-reduce of the text tokens forward
    ends of encoder and decoder            sequence parallelism: all-gather T D e forward and backward
    word head, M masked words              all-reduce M D e backward; all-gather and all-reduce 8 M
    partial gradients of R numbers         all-reduce 4 R after each pass; least: once a step

Expert parallelism (x ranks, each with T / t tokens, k of E experts a token), each learned block, each pass:

    rows    4 all-to-alls (there and back, forward and backward) of k T / t D e, of which (x - 1) / x leave
            the rank where the experts are equally used; checkpointing: 2 more
    least   a token whose experts are on one rank goes there once, and their sum comes back: in place of
            k (x - 1) / x the mean number of other ranks that it needs, (x - 1) (1 - C(E - E/x, k) / C(E, k))
    counts  all-to-all of 8 E

Left out: scalars (norm, overflow, units of the loss), which cost latency and no bytes; and what contrast and
matching exchange: projections of the pool, and an image of bytes for each negative of another rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eve.config import Model
from eve.planning.layout import Layout, Pass, num_backwards, routed_blocks
from eve.planning.weights import Weights

FACTOR = {"all_reduce": 2, "reduce": 1, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in a step.

    Attributes:
        what: "gradients", "weights", "tensor", "partial gradients" or "experts".
        ranks: of the group that this rank is in. host: ranks of a host.
        size: bytes of the whole tensors of all `count` collectives (all_to_all: of one rank's rows).
        least: bytes a rank must send, see above; None where a ring sends no more than that.
    """

    what: str
    kind: str
    ranks: range
    host: int
    size: float
    count: float
    least_sent: float | None = None

    @property
    def sent(self) -> float:
        """Bytes that a rank sends."""
        n = len(self.ranks)
        return FACTOR[self.kind] * (n - 1) / n * self.size

    @property
    def least(self) -> float:
        return self.sent if self.least_sent is None else self.least_sent

    @property
    def on_a_host(self) -> int:
        """Ranks of the group that share a host."""
        return sum(rank // self.host == self.ranks[0] // self.host for rank in self.ranks)

    @property
    def between_hosts(self) -> float:
        """Of `sent`, what leaves the host, on average over ranks."""
        n, m = len(self.ranks), self.on_a_host
        if m == n:
            return 0.0
        return (n - m) / n * self.size if self.kind == "all_to_all" else self.sent / m

    @property
    def inside_host(self) -> float:
        return self.sent - self.between_hosts


def transfers(model: Model, layout: Layout, weights: Weights, passes: list[Pass]) -> list[Transfer]:
    """Everything of a step, but what stays on its rank."""
    found = _averages(layout, weights, passes) + _tensor(model, layout, weights, passes)
    found += _experts(model, layout, passes)
    return [transfer for transfer in found if len(transfer.ranks) > 1 and transfer.size]


def _averages(layout: Layout, weights: Weights, passes: list[Pass]) -> list[Transfer]:
    item, stage, found = layout.item, layout.zero_stage, []
    num_passes, num_reduced = sum(one.times for one in passes), num_backwards(passes)
    for numbers, ranks in (
        (weights.dense, layout.data_group),
        (weights.experts, layout.copies_of_an_expert),
    ):
        n = len(ranks)
        part = (n - 1) / n
        dense = numbers == weights.dense and ranks == layout.data_group
        # Numbers that all passes of a step use, and those whose gradients are reduced.
        used, reduced = numbers * num_passes, numbers * num_reduced
        if dense:
            used = sum(one.times * weights.dense_of[one.stream] for one in passes)
            reduced = sum(one.times * weights.dense_of[one.stream] for one in passes if not one.joins)
        if stage == 3:
            found.append(Transfer("gradients", "reduce_scatter", ranks, layout.host, 4 * numbers, 1, None))
            gathered = item * used * 2
            found.append(
                Transfer(
                    "weights", "all_gather", ranks, layout.host, gathered, num_passes, part * item * numbers
                )
            )
            continue
        reduced = reduced if stage == 2 else numbers
        count = num_reduced if stage == 2 else 1
        least = None if stage == 0 else part * 4 * numbers
        kind = "reduce" if layout.reduces_to_owners else "all_reduce"
        found.append(Transfer("gradients", kind, ranks, layout.host, 4 * reduced, count, least))
        if stage:
            found.append(Transfer("weights", "all_gather", ranks, layout.host, item * numbers, 1))
    return found


def _tensor(model: Model, layout: Layout, weights: Weights, passes: list[Pass]) -> list[Transfer]:
    group, host, item = layout.tensor_group, layout.host, layout.item
    # (kind, bytes, collectives) of a step.
    parts: list[tuple[str, float, float]] = []
    learned = routed_blocks(model)
    for one in passes:
        wide = one.num_tokens * model.width * item
        routed = [block for block in one.blocks(model) if block in learned]
        cut = 2 * len(one.blocks(model)) - len(routed)  # sublayers of the encoder with cut weights
        # The recomputation of a block ends where its last result would only be added.
        added = [
            block for block in one.blocks(model) if model.layer_scale is None and model.drop_path * block == 0
        ]
        again = cut - len([b for b in added if b not in learned]) if layout.checkpointing else 0
        routed_again = len([b for b in routed if b not in added]) if layout.checkpointing else 0
        narrow, cut_of_decoder = 0.0, 0
        if one.num_decoder_tokens:
            assert model.decoder is not None
            narrow = one.num_decoder_tokens * model.decoder.width * item
            cut_of_decoder = 2 * model.decoder.depth
        size = wide * 2 * cut + narrow * 2 * cut_of_decoder
        count = 2 * (cut + cut_of_decoder)
        if layout.sequence:
            ends = 2 * (wide + narrow)
            into = cut if layout.checkpointing else 0
            parts += [
                ("all_gather", (size + wide * into + ends) * one.times, (count + into + 4) * one.times),
                ("reduce_scatter", (size + wide * again) * one.times, (count + again) * one.times),
            ]
        else:
            size, count = size + wide * again, count + again
            gathers = 2 * len(routed) + routed_again
            parts += [
                ("all_reduce", size * one.times, count * one.times),
                ("all_gather", wide * gathers * one.times, gathers * one.times),
            ]
        forwards = 2 if layout.checkpointing else 1
        logits = sum(4 * one.num_tokens * model.feed_forward_of(block).num_experts for block in routed)
        parts.append(("all_gather", logits * forwards * one.times, len(routed) * forwards * one.times))
        words, times = one.num_masked_words, one.times
        parts.append(("all_reduce", one.num_text * model.width * item * times, times))
        if words:
            parts += [
                ("all_reduce", words * (model.width * item + 8) * times, 2 * times),
                ("all_gather", words * 8 * layout.tensor * times, times),
            ]
    found = []
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        size = sum(part[1] for part in parts if part[0] == kind)
        found.append(Transfer("tensor", kind, group, host, size, sum(p[2] for p in parts if p[0] == kind)))
    num_passes = num_backwards(passes)
    once = 2 * (layout.tensor - 1) / layout.tensor * 4 * weights.partial
    found.append(
        Transfer(
            "partial gradients",
            "all_reduce",
            group,
            host,
            4 * weights.partial * num_passes,
            num_passes,
            once,
        )
    )
    return found


def _experts(model: Model, layout: Layout, passes: list[Pass]) -> list[Transfer]:
    x, found = layout.expert, []
    if x == 1:
        return []
    exchanges = 6 if layout.checkpointing else 4
    forwards = exchanges // 2 - 1
    for block in routed_blocks(model):
        config = model.feed_forward_of(block)
        other = (x - 1) * (
            1
            - math.comb(config.num_experts - config.num_experts // x, config.k)
            / math.comb(config.num_experts, config.k)
        )
        for one in passes:
            calls = one.times * one.blocks(model).count(block)
            row = model.width * layout.item
            tokens = one.num_tokens / layout.tensor
            rows = exchanges * tokens * config.k * row
            counts = forwards * 8 * config.num_experts
            size, least = rows + counts, exchanges * tokens * other * row + counts * (x - 1) / x
            found.append(
                Transfer(
                    "experts",
                    "all_to_all",
                    layout.expert_group,
                    layout.host,
                    size * calls,
                    (exchanges + forwards) * calls,
                    least * calls,
                )
            )
    return found


def summed(found: list[Transfer]) -> list[tuple[str, float, float, float]]:
    """For each `what`: (what, least, inside a host, between hosts), bytes of a rank."""
    names = dict.fromkeys(transfer.what for transfer in found)
    return [
        (
            name,
            sum(t.least for t in found if t.what == name),
            sum(t.inside_host for t in found if t.what == name),
            sum(t.between_hosts for t in found if t.what == name),
        )
        for name in names
    ]
