"""Kernels of kernels/routing.py: which choices find a slot. Dataflow, suffixes and tables as there.

fit         the queue is the order of the tokens: places by counts of blocks and ranks in the block
fit_sorted  any other order: a choice counts those before it, comparing with every choice of the blocks
            that hold its group, BLOCK_T x BLOCK_O at a time. No sort: the whole is one launch, the same
            for any skew, and its T^2 / G comparisons are cheap where groups are (4,096 tokens in groups
            of 2,048 are 16 million)
"""

from __future__ import annotations

from kernels.backend import CompileCase, jit, tl
from kernels.routing_kernels import (
    CHOICES,
    COMPILED_SHAPES,
    SIZES,
    TABLES,
    WARPS,
    blocks_of,
    choice_of,
    groups_overlap,
    modalities_of,
    tile_of,
    tokens_of,
)

# Order of a queue: {name: (first choices of all tokens before second ones, of what the larger goes first)}.
TOKEN, PRIORITY, SCORE = 0, 1, 2
ORDERS = {
    "sequence": (True, TOKEN),
    "priority": (True, PRIORITY),
    "position": (False, TOKEN),
    "score": (False, SCORE),
}


@jit
def fit_kernel(
    group, modality, expert, capacity, group_counts, ranges, place, kept, counts, tallies,
    num_tokens, num_groups, num_blocks, begin, end,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token_T, inside_T, own_T = tokens_of(block, num_tokens, begin, end, BLOCK_T)
    lane_E = tl.arange(0, BLOCK_E)
    group_T = tl.load(group + token_T, mask=inside_T, other=-1).to(tl.int32)
    capacity_T = tl.load(capacity + group_T, mask=inside_T, other=0)
    lo, hi = tl.load(ranges + block * 2), tl.load(ranges + block * 2 + 1)
    dropped_T = tl.zeros([BLOCK_T], tl.int32)
    for k in tl.static_range(K):  # pyright: ignore
        expert_T = choice_of(expert, None, token_T, inside_T, k, K)[0]
        chosen_TE = expert_T[:, None] == lane_E[None, :]
        place_T = tl.zeros([BLOCK_T], tl.int32)
        for g in range(lo, hi + 1):
            ahead_E = tl.zeros([BLOCK_E], tl.int32)  # choices of this group in the queue before this block
            for first in range(0, num_blocks, BLOCK_B):
                block_B = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
                there_B = groups_overlap(ranges, block_B, block_B < num_blocks, g, g)
                for other in tl.static_range(k + 1):
                    mask_B = there_B if other < k else there_B & (block_B < block)
                    place_BE = (((block_B * num_groups + g) * K + other) * E)[:, None] + lane_E[None, :]
                    mask_BE = mask_B[:, None] & (lane_E < E)[None, :]
                    ahead_E += tl.sum(tl.load(group_counts + place_BE, mask=mask_BE, other=0), axis=0)
            mine_TE = (chosen_TE & (group_T == g)[:, None]).to(tl.int32)
            queue_TE = tl.cumsum(mine_TE, axis=0) - 1 + ahead_E[None, :]
            place_T += tl.sum(tl.where(mine_TE > 0, queue_TE, 0), axis=1)
        dropped_T += keep_choices(
            k, place_T, capacity_T, chosen_TE, block, token_T, inside_T, own_T, place, kept, counts, E, K,
            BLOCK_E,
        )  # fmt: skip
    tally_drops(dropped_T, block, token_T, inside_T, modality, tallies, E, M, BLOCK_T)


@jit
def fit_sorted_kernel(
    group, modality, expert, score, priority, capacity, ranges, place, kept, counts, tallies,
    num_tokens, num_blocks, begin, end,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ROUNDS: tl.constexpr, BY: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token_T, inside_T, own_T = tokens_of(block, num_tokens, begin, end, BLOCK_T)
    group_T = tl.load(group + token_T, mask=inside_T, other=-1).to(tl.int32)
    capacity_T = tl.load(capacity + group_T, mask=inside_T, other=0)
    lo, hi = tl.load(ranges + block * 2), tl.load(ranges + block * 2 + 1)
    # The blocks between which tokens of these groups lie.
    first, last = num_blocks, 0
    for start in range(0, num_blocks, BLOCK_B):
        block_B = start + tl.arange(0, BLOCK_B)
        there_B = groups_overlap(ranges, block_B.to(tl.int64), block_B < num_blocks, lo, hi)
        first = tl.minimum(first, tl.min(tl.where(there_B, block_B, num_blocks)))
        last = tl.maximum(last, tl.max(tl.where(there_B, block_B + 1, 0)))
    dropped_T = tl.zeros([BLOCK_T], tl.int32)
    for k in tl.static_range(K):  # pyright: ignore
        expert_T = choice_of(expert, None, token_T, inside_T, k, K)[0]
        mine_T = rank_of(score, priority, token_T, inside_T, k, K, BY)
        place_T = tl.zeros([BLOCK_T], tl.int32)
        for number in range(first, last):
            other = block * 0 + number  # 64 bits
            # Which tokens of the other block stand before one of this block, by its place in this block.
            bound = tl.where(number < block, -BLOCK_T, tl.where(number > block, BLOCK_T, 0))
            if (tl.load(ranges + other * 2) <= hi) & (tl.load(ranges + other * 2 + 1) >= lo):
                for step in tl.range(0, BLOCK_T, BLOCK_O, num_stages=1):
                    token_O = other * BLOCK_T + step + tl.arange(0, BLOCK_O)
                    inside_O = token_O < num_tokens
                    group_O = tl.load(group + token_O, mask=inside_O, other=-2).to(tl.int32)
                    same_TO = group_T[:, None] == group_O[None, :]
                    for j in tl.static_range(k + 1 if ROUNDS else K):
                        expert_O = choice_of(expert, None, token_O, inside_O, j, K)[0]
                        ahead_TO = same_TO & (expert_T[:, None] == expert_O[None, :])
                        if not ROUNDS or j == k:
                            place_O = bound + step + tl.arange(0, BLOCK_O)
                            earlier_TO = place_O[None, :] < tl.arange(0, BLOCK_T)[:, None]
                            if BY != 0:
                                theirs_O = rank_of(score, priority, token_O, inside_O, j, K, BY)
                                equal_TO = theirs_O[None, :] == mine_T[:, None]
                                earlier_TO = (theirs_O[None, :] > mine_T[:, None]) | (equal_TO & earlier_TO)
                            ahead_TO = ahead_TO & earlier_TO
                        place_T += tl.sum(ahead_TO.to(tl.int32), axis=1)
        chosen_TE = expert_T[:, None] == tl.arange(0, BLOCK_E)[None, :]
        dropped_T += keep_choices(
            k, place_T, capacity_T, chosen_TE, block, token_T, inside_T, own_T, place, kept, counts, E, K,
            BLOCK_E,
        )  # fmt: skip
    tally_drops(dropped_T, block, token_T, inside_T, modality, tallies, E, M, BLOCK_T)


@jit
def rank_of(score, priority, token_T, inside_T, k, K: tl.constexpr, BY: tl.constexpr):
    """What a choice is sorted by; a token's own priority is the score of its first choice."""
    if BY == 2:
        source_T = score + token_T * K + k
    elif priority is None:
        source_T = score + token_T * K
    else:
        source_T = priority + token_T
    return tl.load(source_T, mask=inside_T, other=0.0)


@jit
def keep_choices(
    k, place_T, capacity_T, chosen_TE, block, token_T, inside_T, own_T, place, kept, counts,
    E: tl.constexpr, K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Stores places, what is kept, and its counts; returns (T,) int32, 1 for a dropped choice."""
    lane_E = tl.arange(0, BLOCK_E)
    kept_T = inside_T & (place_T < capacity_T)
    tl.store(place + token_T * K + k, place_T, mask=inside_T)
    tl.store(kept + token_T * K + k, kept_T, mask=inside_T)
    count_E = tl.sum((chosen_TE & (kept_T & own_T)[:, None]).to(tl.int32), axis=0)
    tl.store(counts + (block * K + k) * E + lane_E, count_E, mask=lane_E < E)
    return (inside_T & ~kept_T).to(tl.int32)


@jit
def tally_drops(
    dropped_T, block, token_T, inside_T, modality, tallies,
    E: tl.constexpr, M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    modality_T = modalities_of(modality, token_T, inside_T, BLOCK_T)
    for m in tl.static_range(M):  # pyright: ignore
        dropped = tl.sum(tl.where(modality_T == m, dropped_T, 0))
        tl.store(tallies + (block * M + m) * (E + 1) + E, dropped)


def _compile_cases() -> list[CompileCase]:
    tokens = {"group": "*i64", "modality": "*i64", "expert": "*i64", "capacity": "*i64", "place": "*i32"}
    tokens |= {"kept": CHOICES["kept"]} | {name: TABLES[name] for name in ("ranges", "counts", "tallies")}
    sorted_sizes = {name: kind for name, kind in SIZES.items() if name != "num_groups"}
    cases = []
    for num_experts, k, _ in COMPILED_SHAPES:
        shape = {"E": num_experts, "K": k, "M": 2, **tile_of(num_experts), **blocks_of(num_experts)}
        name = f"E={num_experts} K={k}"
        in_order = {**tokens, "group_counts": "*i32", **SIZES}
        cases.append(CompileCase(f"route, fit {name}", fit_kernel, in_order, shape, num_warps=WARPS))
        for order, (rounds, by) in ORDERS.items():
            if order == "sequence":
                continue
            types = {**tokens, "score": "*fp32", **sorted_sizes}
            constants = {
                "priority": None,
                "ROUNDS": rounds,
                "BY": by,
                "BLOCK_O": min(32, shape["BLOCK_T"]),
                **shape,
            }
            name_of = f"route, fit by {order} {name}"
            cases.append(CompileCase(name_of, fit_sorted_kernel, types, constants, num_warps=WARPS))
    return cases


COMPILE_CASES = _compile_cases()
