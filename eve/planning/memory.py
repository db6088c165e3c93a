"""Bytes on one device: what DeepSpeed keeps of the weights, and what a pass keeps for its backward.

Weights, gradients, moments of N numbers on a rank that ZeRO cuts over n ranks, L of them in the largest
parameter; w = 2 bytes in bf16, 4 in fp32:

    ZeRO       weights    gradients          fp32 copy    Adam's moments
    0          4 N        4 N                -            8 N
    1 fp32     4 N        4 N                4 N / n      8 N / n
    1 bf16     2 N        4 N + 2 N          4 N / n      8 N / n      accumulated in fp32 beside bf16
    2          w N        w (N / n + L)      4 N / n      8 N / n      those that a cut goes through whole
    3          w N / n    w (N + N / n)      4 N / n      8 N / n      reduced with the last backward only

On top, while a step is made: the copy that the engine reduces (up to 500M numbers in fp32; ZeRO 0 and 1
bf16), or buckets of 50M numbers in fp32 (`reduce_bucket_size`; one and a copy at stage 1 fp32, with
overlap one more) and the fp32 gradient of the rank's own part. At stage 3 a pass also has up to 1,000M
gathered weights.

Activations, per token of a pass over t tensor ranks, in numbers (D width, F hidden, k experts a token; s is t
with sequence parallelism, else 1):

    attention                   D / s (norm's input) + D (its output) + 5 D / t (query, key, value, result,
                                and that permuted for the projection) + D / s (what LayerScale multiplies)
    hard-routed feed-forward    D / s + D + F / t (before the activation) + D / s
    learned feed-forward        D / s + D / t in fp32 (input of the gate) + k (2 D + F) / t + D / s,
                                and its logits in fp32
    block of the decoder        as hard-routed, without what LayerScale multiplies
    checkpointed block          D / s, its input; and all of one block at a time

Sum for a hard-routed block on one device: 11 D + F.
"""

from __future__ import annotations

from dataclasses import dataclass

from eve.config import Model
from eve.planning.layout import Layout, Pass, routed_blocks
from eve.planning.weights import Weights
from kernels.chunked_linear import MAX_LOGIT_BYTES

REDUCE_BUCKET = 50_000_000
# What the engine itself reduces at once.
ENGINE_BUCKET = 500_000_000
# stage3_max_live_parameters of ds_configs/.
MAX_LIVE = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank. `step` is needed at the update, `activations` and `logits` during a pass: the larger
    of the two sums counts."""

    weights: float
    gradients: float
    optimizer: float
    expert_weights: float
    expert_gradients: float
    expert_optimizer: float
    activations: float
    logits: float
    step: float
    reserve: float

    @property
    def dense(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def experts(self) -> float:
        return self.expert_weights + self.expert_gradients + self.expert_optimizer

    @property
    def total(self) -> float:
        return self.dense + self.experts + max(self.activations + self.logits, self.step) + self.reserve


def state_bytes(layout: Layout, numbers: int, largest: int, ranks: int) -> tuple[float, float, float]:
    """(weights, gradients, fp32 copy and moments) of parameters that `ranks` ranks average; see the table."""
    share, item = numbers / ranks, layout.item
    accumulated = 4 if layout.precision == "fp32" else 6
    return {
        0: (4 * numbers, 4 * numbers, 8 * numbers),
        1: (item * numbers, accumulated * numbers, 12 * share),
        2: (item * numbers, item * min(numbers, share + largest), 12 * share),
        3: (item * share, item * (numbers + share), 12 * share),
    }[layout.zero_stage]


def step_bytes(layout: Layout, weights: Weights) -> float:
    """Buckets and copies while gradients are reduced and the optimizer runs."""
    if layout.zero_stage == 0 or (layout.zero_stage, layout.precision) == (1, "bf16"):
        return 4 * min(ENGINE_BUCKET, weights.learning)
    parts = weights.dense / len(layout.data_group) + weights.experts / len(layout.copies_of_an_expert)
    return 4 * REDUCE_BUCKET * (2 if layout.zero_stage == 1 else 3) + 4 * parts


def block_numbers(width: int, hidden: int, layout: Layout, *, k: int = 0, gains: bool = True) -> float:
    """Numbers in the model's precision that a block keeps per token, those of the table in fp32 as their
    multiple; `k` experts a token of a learned router, 0 for a hard one."""
    t = layout.tensor
    between = width / (t if layout.sequence else 1)
    attention = between + width + 5 * width / t
    if k:
        feed_forward = between + 4 / layout.item * width / t + k * (2 * width + hidden) / t
    else:
        feed_forward = between + width + hidden / t
    return attention + feed_forward + (2 * between if gains else 0)


def block_bytes(model: Model, layout: Layout, one: Pass) -> list[float]:
    """What each block that the tokens pass keeps, where it is not recomputed."""
    learned, sizes = set(routed_blocks(model)), []
    for block in one.blocks(model):
        config = model.feed_forward_of(block)
        k = config.k if block in learned else 0
        numbers = block_numbers(model.width, model.hidden, layout, k=k, gains=model.layer_scale is not None)
        sizes.append(one.num_tokens * (layout.item * numbers + (4 * config.num_experts if k else 0)))
    return sizes


def pass_bytes(model: Model, layout: Layout, one: Pass) -> tuple[float, float]:
    """(activations, what the text loss has of logits) at the end of the forward of a pass."""
    item, tokens, width = layout.item, one.num_tokens, model.width
    between = width / (layout.tensor if layout.sequence else 1)
    sizes = block_bytes(model, layout, one)
    total = len(sizes) * tokens * between * item + max(sizes) if layout.checkpointing else sum(sizes)
    # Pixels of the visible patches; sum of the embeddings before its norm; last block's output.
    total += item * one.samples * one.num_visible * 3 * model.patch_size**2
    total += item * (tokens * (width + between) + 2 * one.num_text * width)
    if one.num_masked_patches:
        assert model.decoder is not None
        narrow = model.decoder.width
        numbers = block_numbers(narrow, model.decoder.hidden_width, layout, gains=False)
        total += item * one.num_decoder_tokens * (model.decoder.depth * numbers + 2 * narrow)
        # The encoder's output, an input of the decoder; normed masked patches; differences of pixels in fp32.
        total += item * tokens * width
        masked = one.samples * one.num_masked_patches
        total += masked * (narrow * item + 3 * model.patch_size**2 * 4)
    words, codes = one.num_masked_words, one.num_masked_codes
    total += 4 * words * width * item + codes * width * item
    logits = logit_bytes(layout, words, model.vocab_size / layout.tensor, width)
    return total, logits + logit_bytes(layout, codes, model.visual_codes or 0, width)


def logit_bytes(layout: Layout, rows: int, classes: float, width: int) -> float:
    """A chunk of the logits, whose gradient takes their place; of several the sum of the table's gradient."""
    logits, limit = rows * classes * layout.item, MAX_LOGIT_BYTES["cuda"]
    return logits if logits <= limit else limit + 4 * classes * width


def held_bytes(model: Model, layout: Layout, passes: list[Pass]) -> list[tuple[float, float]]:
    """`pass_bytes` before each backward, of all passes that it goes through; of these it recomputes one block
    at a time."""
    held: list[tuple[float, float]] = []
    recomputed = 0.0
    for one in passes:
        activations, logits = pass_bytes(model, layout, one)
        block = max(block_bytes(model, layout, one)) if layout.checkpointing else 0.0
        before, other = (held.pop(), recomputed) if one.joins else ((0.0, 0.0), 0.0)
        held.append((before[0] + activations - min(block, other), before[1] + logits))
        recomputed = max(block, other)
    return held


def memory_of(
    model: Model, layout: Layout, weights: Weights, passes: list[Pass], *, reserve: float = 3e9
) -> Memory:
    """`reserve`: CUDA context, NCCL's buffers; a tenth of the activations is added for fragmentation."""
    dense = state_bytes(layout, weights.dense, weights.largest, len(layout.data_group))
    experts = state_bytes(layout, weights.experts, weights.largest_expert, len(layout.copies_of_an_expert))
    activations, logits = max(held_bytes(model, layout, passes), key=sum)
    gathered = layout.item * min(MAX_LIVE, weights.learning) if layout.zero_stage == 3 else 0
    return Memory(
        weights=dense[0] + layout.item * weights.frozen,
        gradients=dense[1],
        optimizer=dense[2],
        expert_weights=experts[0],
        expert_gradients=experts[1],
        expert_optimizer=experts[2],
        activations=activations + gathered,
        logits=logits,
        step=step_bytes(layout, weights),
        reserve=reserve + 0.1 * activations,
    )
