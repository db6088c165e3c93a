"""What each operation must move and compute at least, and what the device can do: the roofline.

Bytes are those of the tensors that come in and go out, each once, and of what the backward needs and no
input holds. Intermediate results are not counted, whoever needs them. b is the size of a number of the rows,
8 that of an index, 4 of a weight or a loss.

                       forward                                        backward
    routing            4TE + TK (8 + 4 + 1 + 8 + 8)                   4TE + 4TE + TK (8 + 1 + 4)
    dispatch           (1 + K) TDb + 8TK                              the same
    combine            (1 + K) TDb + (8 + 4) TK                       (1 + 2K) TDb + (8 + 4 + 4) TK
     with residual     (2 + K) TDb + (8 + 4) TK                       the same
    expert feed-fwd.   (2ND + NF + 2EDF + EF + ED) b                  (3ND + NF + 4EDF + EF + ED) b
                       4NDF operations                                8NDF
     of tokens         (TD + ND + NF + 2EDF + EF + ED) b + 8N         (2TD + ND + NF + 4EDF + EF + ED) b + 8N
    masked text loss   (RD + VD) b + (8 + 4) R                        2 (RD + VD) b + (8 + 4) R
                       2RVD                                           4RVD
    masked pixel loss  M (C b + C + 8 + 4)                            M (2 C b + C + 8 + 4)

T tokens, K choices, E experts, N = TK rows, D width, F hidden width, R masked words, V words, M masked
patches, C pixels of a patch (bytes in the image). Kept for the backward: the experts' first product (N, F).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from kernels.benchmark.case import Case

INDEX, REAL, FLAG = 8, 4, 1

PUBLISHED = {"H200": (4.8e12, 989e12)}  # bytes/s and dense bf16 FLOP/s of the data sheet


@dataclass(frozen=True)
class Cost:
    bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Roofline:
    """Bytes and operations a second."""

    bandwidth: float
    flops: float

    def seconds(self, cost: Cost) -> float:
        """The least time."""
        return max(cost.bytes / self.bandwidth, cost.flops / self.flops)


def costs(case: Case, itemsize: int) -> tuple[Cost, Cost]:
    """Forward and backward."""
    t, k, d, e, b, n, f = (
        case.tokens, case.choices, case.width, case.experts, itemsize, case.rows, case.hidden,
    )  # fmt: skip
    if case.operation == "routing":
        forward = REAL * t * e + n * (INDEX + REAL + FLAG + INDEX + INDEX)
        return Cost(forward), Cost(2 * REAL * t * e + n * (INDEX + FLAG + REAL))
    if case.operation == "dispatch":
        moved = Cost((1 + k) * t * d * b + INDEX * n)
        return moved, moved
    if case.operation in ("combine", "combine_residual"):
        forward = (1 + k + (case.operation == "combine_residual")) * t * d * b + (INDEX + REAL) * n
        return Cost(forward), Cost((1 + 2 * k) * t * d * b + (INDEX + 2 * REAL) * n)
    if case.operation == "expert_feed_forward":
        bias = e * (f + d)
        forward = Cost((2 * n * d + n * f + 2 * e * d * f + bias) * b, 4 * n * d * f)
        return forward, Cost((3 * n * d + n * f + 4 * e * d * f + bias) * b, 8 * n * d * f)
    if case.operation == "dispatch_feed_forward":
        bias = e * (f + d)
        forward = Cost((t * d + n * d + n * f + 2 * e * d * f + bias) * b + INDEX * n, 4 * n * d * f)
        backward = (2 * t * d + n * d + n * f + 4 * e * d * f + bias) * b + INDEX * n
        return forward, Cost(backward, 8 * n * d * f)
    if case.operation == "masked_text_loss":
        v = case.words
        forward = Cost((t * d + v * d) * b + (INDEX + REAL) * t, 2 * t * v * d)
        return forward, Cost(2 * (t * d + v * d) * b + (INDEX + REAL) * t, 4 * t * v * d)
    assert case.operation == "masked_pixel_loss"
    patches, c = t * case.masked, case.pixels
    return (
        Cost(patches * (c * b + c + INDEX + REAL)),
        Cost(patches * (2 * c * b + c + INDEX + REAL)),
    )


def published(device: torch.device) -> Roofline | None:
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((Roofline(*peak) for part, peak in PUBLISHED.items() if part in name.split()), None)


def measured(device: torch.device, dtype: torch.dtype) -> Roofline:
    """By torch.clone of 1 GiB and a product of 8,192 x 8,192 matrices, the best of some. On a CPU 16 MiB,
    which its allocator keeps, and 1,024 x 1,024."""
    cuda = device.type == "cuda"
    source = torch.empty((1 << 30) if cuda else (1 << 24), dtype=torch.uint8, device=device)
    side = 8192 if cuda else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return Roofline(
        2 * source.numel() / _best(lambda: source.clone(), cuda),
        2 * side**3 / _best(lambda: a @ b, cuda),
    )


def _best(function, cuda: bool) -> float:
    def once() -> float:
        if not cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return min([once() for _ in range(13 if cuda else 7)][3:])
