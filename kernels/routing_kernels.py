"""Kernels of kernels/routing.py: choose and place. Dataflow and suffixes as there.

Tables between the launches, for B blocks of BLOCK_T tokens:
    group_counts  int32 (B, G, K, E)  choices of a block's tokens; written for the groups lo..hi of the block
    counts        int32 (B, K, E)     those of own tokens that are kept
    share_sums    fp32 (B, G, E)      sums of shares over the tokens of a group; written as above
    scalar_sums   fp32 (B, G + 1)     sums of squared logsumexps, as above; last the sum of entropies
    ranges        int32 (B, 2)        lo, hi
    tallies       int32 (B, M, E + 1) choices of the tokens of each modality; last those that were dropped
"""

from __future__ import annotations

from kernels.backend import CompileCase, jit, power_of_2, tl

WARPS = 8
# A token's weights are divided by: nothing, the sum over its choices, the sum over those that are kept.
RENORMALISE = {"none": 0, "before_drops": 1, "after_drops": 2}
# fp32's: no division by less, where all choices of a token were dropped, or all its scores are 0.
EPSILON = 1.1920928955078125e-07


def tile_of(num_experts: int) -> dict[str, int]:
    """At most 4,096 pairs of token and expert: 16 for each of a program's 256 threads."""
    block_e = power_of_2(num_experts)
    return {"BLOCK_T": max(16, min(128, 4096 // block_e)), "BLOCK_E": block_e}


def blocks_of(num_experts: int) -> dict[str, int]:
    """The blocks whose counts are loaded together."""
    return {"BLOCK_B": max(8, min(32, 1024 // power_of_2(num_experts)))}


@jit
def choose_kernel(
    logits, noise, group, modality, expert, score, kept, group_counts, counts, share_sums, scalar_sums,
    ranges, tallies,
    num_tokens, num_groups, begin, end, epsilon,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    token_T, inside_T, own_T = tokens_of(block, num_tokens, begin, end, BLOCK_T)
    lane_E = tl.arange(0, BLOCK_E)
    place_TE = token_T[:, None] * E + lane_E[None, :]
    tile_TE = inside_T[:, None] & (lane_E < E)[None, :]
    logits_TE = tl.load(logits + place_TE, mask=tile_TE, other=float("-inf"))
    score_TE, share_TE, logsumexp_T = token_scores(logits_TE, tile_TE, inside_T, epsilon, SIGMOID)
    entropy_TE = tl.where(share_TE > 0, share_TE * tl.log(tl.where(share_TE > 0, share_TE, 1.0)), 0.0)
    tl.store(scalar_sums + block * (num_groups + 1) + num_groups, -tl.sum(tl.sum(entropy_TE, axis=1), axis=0))

    group_T = tl.load(group + token_T, mask=inside_T, other=-1).to(tl.int32)
    lo = tl.min(tl.where(inside_T, group_T, num_groups))
    hi = tl.max(group_T)
    tl.store(ranges + block * 2, lo)
    tl.store(ranges + block * 2 + 1, hi)
    square_T = tl.where(inside_T, logsumexp_T * logsumexp_T, 0.0)
    for g in range(lo, hi + 1):
        of_group_T = group_T == g
        share_sum_E = tl.sum(tl.where(of_group_T[:, None], share_TE, 0.0), axis=0)
        tl.store(share_sums + (block * num_groups + g) * E + lane_E, share_sum_E, mask=lane_E < E)
        tl.store(scalar_sums + block * (num_groups + 1) + g, tl.sum(tl.where(of_group_T, square_T, 0.0)))

    rank_TE = logits_TE
    free_TE = tile_TE
    for k in tl.static_range(K):
        if noise is not None and k == 1:
            rank_TE += tl.load(noise + place_TE, mask=tile_TE, other=0.0)
        # The largest of those not chosen; a NaN is never equal, and then the last expert is taken.
        best_T = tl.max(tl.where(free_TE, rank_TE, float("-inf")), axis=1)
        is_best_TE = free_TE & (rank_TE == best_T[:, None])
        expert_T = tl.min(tl.where(is_best_TE, lane_E[None, :], E - 1), axis=1)
        chosen_TE = lane_E[None, :] == expert_T[:, None]
        free_TE = free_TE & ~chosen_TE
        tl.store(expert + token_T * K + k, expert_T.to(tl.int64), mask=inside_T)
        score_T = tl.sum(tl.where(chosen_TE, score_TE, 0.0), axis=1)
        tl.store(score + token_T * K + k, score_T, mask=inside_T)
        tl.store(kept + token_T * K + k, inside_T, mask=inside_T)
        count_E = tl.sum((chosen_TE & own_T[:, None]).to(tl.int32), axis=0)
        tl.store(counts + (block * K + k) * E + lane_E, count_E, mask=lane_E < E)
        for g in range(lo, hi + 1):
            count_E = tl.sum((chosen_TE & (group_T == g)[:, None]).to(tl.int32), axis=0)
            place_E = ((block * num_groups + g) * K + k) * E + lane_E
            tl.store(group_counts + place_E, count_E, mask=lane_E < E)
    modality_T = modalities_of(modality, token_T, inside_T, BLOCK_T)
    for m in tl.static_range(M):
        taken_TE = tile_TE & ~free_TE & (modality_T == m)[:, None]
        place_E = (block * M + m) * (E + 1) + lane_E
        tl.store(tallies + place_E, tl.sum(taken_TE.to(tl.int32), axis=0), mask=lane_E < E)
        tl.store(tallies + (block * M + m) * (E + 1) + E, 0)


@jit
def tokens_of(block, num_tokens, begin, end, BLOCK_T: tl.constexpr):
    """The tokens of a block, which of them there are, and which are own."""
    token_T = block * BLOCK_T + tl.arange(0, BLOCK_T)
    return token_T, token_T < num_tokens, (token_T >= begin) & (token_T < end)


@jit
def modalities_of(modality, token_T, inside_T, BLOCK_T: tl.constexpr):
    modality_T = tl.zeros([BLOCK_T], tl.int32)
    if modality is not None:
        modality_T = tl.load(modality + token_T, mask=inside_T, other=0).to(tl.int32)
    return modality_T


@jit
def choice_of(expert, kept, token_T, inside_T, k, K: tl.constexpr):
    """Expert of the k-th choice of each token, and whether it is kept (`kept` None: all are)."""
    expert_T = tl.load(expert + token_T * K + k, mask=inside_T, other=-1).to(tl.int32)
    kept_T = inside_T
    if kept is not None:
        kept_T = tl.load(kept + token_T * K + k, mask=inside_T, other=0) != 0
    return expert_T, kept_T


@jit
def groups_overlap(ranges, block_B, there_B, lo, hi):
    """Of blocks, which hold a token of one of the groups lo..hi."""
    first_B = tl.load(ranges + block_B * 2, mask=there_B, other=0)
    last_B = tl.load(ranges + block_B * 2 + 1, mask=there_B, other=-1)
    return there_B & (first_B <= hi) & (last_B >= lo)


@jit
def token_scores(logits_TE, tile_TE, inside_T, epsilon, SIGMOID: tl.constexpr):
    largest_T = tl.where(inside_T, tl.max(logits_TE, axis=1), 0.0)
    power_TE = tl.where(tile_TE, tl.exp(logits_TE - largest_T[:, None]), 0.0)
    sum_T = tl.where(inside_T, tl.sum(power_TE, axis=1), 1.0)
    logsumexp_T = largest_T + tl.log(sum_T)
    if SIGMOID:
        score_TE = tl.where(tile_TE, 1.0 / (1.0 + tl.exp(-logits_TE)), 0.0)
        share_TE = score_TE / tl.maximum(tl.sum(score_TE, axis=1), epsilon)[:, None]
    else:
        score_TE = power_TE / sum_T[:, None]
        share_TE = score_TE
    return score_TE, share_TE, logsumexp_T


@jit
def place_kernel(
    expert, score, kept, counts, group_counts, share_sums, scalar_sums, ranges, tallies,
    weight, token_row, row_token, offsets, balance, z_loss, entropy, first_counts, token_counts,
    choices, drops,
    num_tokens, num_groups, num_blocks, begin, end, num_rows, rows_each, epsilon,
    E: tl.constexpr, K: tl.constexpr, M: tl.constexpr, ALIGN: tl.constexpr, RENORMALISE: tl.constexpr,
    BALANCED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    if program < num_blocks:
        place_rows(
            program, expert, score, kept, counts, weight, token_row, row_token, offsets, num_tokens,
            num_blocks, begin, end, num_rows, rows_each, epsilon, E, K, ALIGN, RENORMALISE, BLOCK_T, BLOCK_E,
            BLOCK_B,
        )  # fmt: skip
    else:
        sum_losses(
            program - num_blocks, group_counts, share_sums, scalar_sums, ranges, balance, z_loss, entropy,
            first_counts, token_counts, num_groups, num_blocks, E, K, BALANCED, BLOCK_E, BLOCK_B,
        )  # fmt: skip
        if program == num_blocks:
            sum_tallies(tallies, choices, drops, num_blocks, E, M, BLOCK_E, BLOCK_B)


@jit
def place_rows(
    block, expert, score, kept, counts, weight, token_row, row_token, offsets, num_tokens,
    num_blocks, begin, end, num_rows, rows_each, epsilon,
    E: tl.constexpr, K: tl.constexpr, ALIGN: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    lane_E = tl.arange(0, BLOCK_E)
    token_T, inside_T, own_T = tokens_of(block, num_tokens, begin, end, BLOCK_T)
    count_E = tl.zeros([BLOCK_E], tl.int32)
    for k in tl.static_range(K):
        count_E += sum_blocks(counts, block, num_blocks, k, K, E, BLOCK_E, BLOCK_B)[1]
    room_E = count_E + (ALIGN - count_E % ALIGN) % ALIGN
    end_E = tl.cumsum(room_E, axis=0)
    if block == 0:
        tl.store(offsets + lane_E, end_E, mask=lane_E < E)
    ahead_E = end_E - room_E
    total_T = tl.zeros([BLOCK_T], tl.float32)
    for k in tl.static_range(K):
        _, kept_T = choice_of(expert, kept, token_T, inside_T, k, K)
        counted_T = inside_T if RENORMALISE == 1 else kept_T
        total_T += tl.load(score + token_T * K + k, mask=counted_T, other=0.0)
    for k in tl.static_range(K):
        expert_T, kept_T = choice_of(expert, kept, token_T, inside_T, k, K)
        score_T = tl.load(score + token_T * K + k, mask=kept_T, other=0.0)
        if RENORMALISE != 0:
            score_T = score_T / tl.maximum(total_T, epsilon)
        tl.store(weight + token_T * K + k, score_T, mask=inside_T)
        placed_T = kept_T & own_T
        mine_TE = ((expert_T[:, None] == lane_E[None, :]) & placed_T[:, None]).to(tl.int32)
        before_E, all_E = sum_blocks(counts, block, num_blocks, k, K, E, BLOCK_E, BLOCK_B)
        queue_TE = tl.cumsum(mine_TE, axis=0) - 1 + (ahead_E + before_E)[None, :]
        row_T = tl.where(placed_T, tl.sum(tl.where(mine_TE > 0, queue_TE, 0), axis=1), -1).to(tl.int64)
        tl.store(token_row + (token_T - begin) * K + k, row_T, mask=own_T)
        tl.store(row_token + row_T, token_T - begin, mask=placed_T)
        ahead_E += all_E
    # The rows without a choice, shared among the programs: padding, and what lies past the last expert.
    filled_E = end_E - room_E + count_E
    last = tl.max(end_E)
    for step in range(0, rows_each, 64):
        row_N = block * rows_each + step + tl.arange(0, 64)
        mine_N = (row_N < (block + 1) * rows_each) & (row_N < num_rows)
        tl.store(row_token + row_N, row_N * 0, mask=mine_N & (row_N >= last))
        if ALIGN > 1:
            hole_NE = (row_N[:, None] >= filled_E[None, :]) & (row_N[:, None] < end_E[None, :])
            hole_N = tl.max((hole_NE & (lane_E < E)[None, :]).to(tl.int32), axis=1) > 0
            tl.store(row_token + row_N, row_N * 0 - 1, mask=mine_N & hole_N)


@jit
def sum_blocks(counts, block, num_blocks, k, K: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
               BLOCK_B: tl.constexpr):  # fmt: skip
    """(E,) and (E,): the counts of choice k in the blocks before `block`, and in all."""
    lane_E = tl.arange(0, BLOCK_E)
    before_BE = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
    all_BE = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block_B = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask_BE = (block_B < num_blocks)[:, None] & (lane_E < E)[None, :]
        place_BE = ((block_B * K + k) * E)[:, None] + lane_E[None, :]
        count_BE = tl.load(counts + place_BE, mask=mask_BE, other=0)
        all_BE += count_BE
        before_BE += tl.where((block_B < block)[:, None], count_BE, 0)
    return tl.sum(before_BE, axis=0), tl.sum(all_BE, axis=0)


@jit
def sum_losses(
    g, group_counts, share_sums, scalar_sums, ranges, balance, z_loss, entropy, first_counts, token_counts,
    num_groups, num_blocks,
    E: tl.constexpr, K: tl.constexpr, BALANCED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    lane_E = tl.arange(0, BLOCK_E)
    first_BE = tl.zeros([BLOCK_B, BLOCK_E], tl.int32)
    share_BE = tl.zeros([BLOCK_B, BLOCK_E], tl.float32)
    square_B = tl.zeros([BLOCK_B], tl.float32)
    entropy_B = tl.zeros([BLOCK_B], tl.float32)
    for start in range(0, num_blocks, BLOCK_B):
        block_B = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        there_B = block_B < num_blocks
        entropy_B += tl.load(scalar_sums + block_B * (num_groups + 1) + num_groups, mask=there_B, other=0.0)
        there_B = groups_overlap(ranges, block_B, there_B, g, g)
        place_B = block_B * num_groups + g
        mask_BE = there_B[:, None] & (lane_E < E)[None, :]
        for k in tl.static_range(BALANCED):
            place_BE = ((place_B * K + k) * E)[:, None] + lane_E[None, :]
            first_BE += tl.load(group_counts + place_BE, mask=mask_BE, other=0)
        share_BE += tl.load(share_sums + (place_B * E)[:, None] + lane_E[None, :], mask=mask_BE, other=0.0)
        square_B += tl.load(scalar_sums + block_B * (num_groups + 1) + g, mask=there_B, other=0.0)
    first_E = tl.sum(first_BE, axis=0).to(tl.float32) / BALANCED
    tokens = tl.maximum(tl.sum(first_BE).to(tl.float32) / BALANCED, 1.0)
    tl.store(first_counts + g * E + lane_E, first_E, mask=lane_E < E)
    tl.store(token_counts + g, tokens)
    tl.store(balance + g, E * tl.sum(first_E * tl.sum(share_BE, axis=0)) / (tokens * tokens))
    tl.store(z_loss + g, tl.sum(square_B) / tokens)
    if g == 0:
        tl.store(entropy, tl.sum(entropy_B))


@jit
def sum_tallies(tallies, choices, drops, num_blocks, E: tl.constexpr, M: tl.constexpr,
                BLOCK_E: tl.constexpr, BLOCK_B: tl.constexpr):  # fmt: skip
    lane_E = tl.arange(0, BLOCK_E)
    for m in tl.static_range(M):  # pyright: ignore
        chosen_BE = tl.zeros([BLOCK_B, BLOCK_E], tl.int64)
        dropped_B = tl.zeros([BLOCK_B], tl.int64)
        for first in range(0, num_blocks, BLOCK_B):
            block_B = (first + tl.arange(0, BLOCK_B)).to(tl.int64)
            there_B = block_B < num_blocks
            place_B = (block_B * M + m) * (E + 1)
            mask_BE = there_B[:, None] & (lane_E < E)[None, :]
            chosen_BE += tl.load(tallies + place_B[:, None] + lane_E[None, :], mask=mask_BE, other=0)
            dropped_B += tl.load(tallies + place_B + E, mask=there_B, other=0)
        tl.store(choices + m * E + lane_E, tl.sum(chosen_BE, axis=0), mask=lane_E < E)
        tl.store(drops + m, tl.sum(dropped_B))


TABLES = {
    "group_counts": "*i32",
    "counts": "*i32",
    "share_sums": "*fp32",
    "scalar_sums": "*fp32",
    "ranges": "*i32",
    "tallies": "*i32",
}
CHOICES = {"expert": "*i64", "score": "*fp32", "kept": "*i1"}
SIZES = dict.fromkeys(("num_tokens", "num_groups", "num_blocks", "begin", "end"), "i32")
COMPILED_SHAPES = ((8, 2, False), (32, 2, False), (64, 1, True))  # experts, choices, sigmoid


def _compile_cases() -> list[CompileCase]:
    losses = dict.fromkeys(("balance", "z_loss", "entropy", "first_counts", "token_counts"), "*fp32")
    tokens = {"logits": "*fp32", "group": "*i64", "modality": "*i64"}
    placed = {
        **CHOICES, **TABLES, **losses, **SIZES, "weight": "*fp32", "token_row": "*i64", "row_token": "*i64",
        "offsets": "*i32", "choices": "*i64", "drops": "*i64", "num_rows": "i32", "rows_each": "i32",
        "epsilon": "fp32",
    }  # fmt: skip
    dropless = {name: kind for name, kind in placed.items() if name != "kept"}
    sizes = {name: kind for name, kind in SIZES.items() if name != "num_blocks"} | {"epsilon": "fp32"}
    cases = []
    for num_experts, k, sigmoid in COMPILED_SHAPES:
        shape = {"E": num_experts, "K": k, "M": 2, **tile_of(num_experts)}
        weights = {"RENORMALISE": 2, "BALANCED": 1, **shape, **blocks_of(num_experts)}
        soft = {"SIGMOID": sigmoid, **shape}
        for what, kernel, types, constants in (
            ("choose", choose_kernel, {**tokens, **CHOICES, **TABLES, **sizes}, {"noise": None, **soft}),
            (
                "choose, noise",
                choose_kernel,
                {**tokens, "noise": "*fp32", **CHOICES, **TABLES, **sizes},
                soft,
            ),
            ("place", place_kernel, placed, {"ALIGN": 8, **weights}),
            ("place, dropless", place_kernel, dropless, {"kept": None, "ALIGN": 1, **weights}),
        ):
            name = f"route, {what} E={num_experts} K={k}"
            cases.append(CompileCase(name, kernel, types, constants, num_warps=WARPS))
    return cases


COMPILE_CASES = _compile_cases()
