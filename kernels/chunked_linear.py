"""Logits of many words, a chunk of rows at a time: the products around a loss that makes gradients of logits.

    logits = W h + b for some rows -> `visit(logits, rows)`: losses, and in place the gradient G of the logits
    -> dx = G W, dW = G^T x, db = sum over rows of G

The loss of a row has an upstream gradient g, which the forward pass does not know. Two ways to do without:

    one chunk holds all rows   G is kept; the backward scales the narrow sides, dx = g (G W), dW = G^T (g x),
                               and G is only read. Any g, not a FLOP more than without the loss
    several chunks             dx, dW and db are made in the forward pass for g = 1, and the backward scales
                               them. Not a FLOP more where all rows have one g, as under a sum. Else the
                               backward makes all of them again from the logits: twice the FLOPs

A GPU knows that all rows have one g only by strides of 0, as the gradient of `.sum()` has them, also times a
number. That of `.mean()` is written row by row and does not count: write `.sum() / K` instead.

To make the logits again always would be simpler and cost a third more FLOPs, 0.36 ms at 2,560 rows, 64,000
words, width 768 and 700 TFLOP/s. To scale dW instead costs a read and a write of it, 197 MB in bf16, 0.04 ms
of an H200's 4.8 TB/s (neither is measured). dW is summed over chunks in fp32, 197 MB, which every chunk but
the first reads and writes in 0.08 ms: a chunk of fewer than 2 D rows would be smaller than that sum, and save
nothing. On a CPU a chunk is 128 MB, 524 rows of 64,000 words in fp32, enough for products at full speed.

Shape suffixes: K row, D width, V word.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, divide_up, jit, tl, use_triton

# ------------------------------------------------------------------------------------------------- column sum


@jit
def _column_sum_kernel(x, scale, out, num_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, num_rows, ROWS):
        k = first + tl.arange(0, ROWS).to(tl.int64)
        inside = (k[:, None] < num_rows) & (column[None, :] < width)
        part = tl.load(x + k[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(scale + k, mask=k < num_rows, other=0.0)[:, None]
    tl.store(out + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def column_sum(x_KV: Tensor, scale_K: Tensor) -> Tensor:
    """sum over k of scale_k x_k, in fp32 (of fp64 in fp64, which the kernel sums in fp32)."""
    num_rows, width = x_KV.shape
    exact = torch.promote_types(x_KV.dtype, torch.float32)
    if not use_triton(x_KV):
        return scale_K.to(exact) @ x_KV.to(exact)
    out_V = x_KV.new_empty(width, dtype=exact)
    _column_sum_kernel[(divide_up(width, 128),)](
        x_KV, scale_K.contiguous(), out_V, num_rows, width, ROWS=32, COLUMNS=128, num_warps=4
    )
    return out_V


# ----------------------------------------------------------------------------------------------------- chunks

MAX_LOGIT_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}

# What the forward pass leaves to the backward, in this order: the gradient of the logits; that of x, of W, of
# b, for upstream gradients of one. What is not left has no rows.
Left = tuple[Tensor, Tensor, Tensor, Tensor]
Visit = Callable[[Tensor, slice], None]


def rows_of_chunk(weight_VD: Tensor, max_logit_bytes: int | None) -> int:
    limit = MAX_LOGIT_BYTES[weight_VD.device.type] if max_logit_bytes is None else max_logit_bytes
    return max(1, limit // max(1, weight_VD.shape[0] * weight_VD.element_size()))


def plan(num_rows: int, chunk: int, *inputs: Tensor | None) -> str:
    """What to leave: "logits" (their gradient), "sums", or "nothing" where no input needs a gradient."""
    if not (torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in inputs)):
        return "nothing"
    return "logits" if num_rows <= chunk else "sums"


def empty_left(x_KD: Tensor, weight_VD: Tensor, leaves: str) -> Left:
    num_rows, (num_words, width) = x_KD.shape[0], weight_VD.shape
    logits, sums = leaves == "logits", leaves == "sums"
    return (
        x_KD.new_empty(num_rows * logits, num_words),
        x_KD.new_empty(num_rows * sums, width),
        weight_VD.new_empty(num_words * sums, width),
        weight_VD.new_empty(num_words * sums),
    )


def forward(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk: int, leaves: str, visit: Visit
) -> Left:
    """`visit` writes the losses of the rows it is given, and turns logits into gradients unless nothing is
    left to the backward."""
    if leaves == "logits":
        logits_KV = F.linear(x_KD, weight_VD, bias_V)
        visit(logits_KV, slice(0, x_KD.shape[0]))
        return logits_KV, *empty_left(x_KD, weight_VD, "nothing")[1:]
    nothing = empty_left(x_KD, weight_VD, "nothing")
    if leaves == "nothing":
        for logits_KV, rows in _chunks(x_KD, weight_VD, bias_V, chunk):
            visit(logits_KV, rows)
        return nothing
    return nothing[0], *_sums(x_KD, weight_VD, bias_V, None, chunk, visit)


def backward(
    grad_K: Tensor,
    x_KD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    left: Sequence[Tensor],
    chunk: int,
    visit: Visit,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, W and b. `visit` turns logits into gradients once more."""
    grad_KV, *sums = left
    if grad_KV.shape[0] == x_KD.shape[0]:
        grad_K1 = grad_K[:, None]
        grad_x_KD = ((grad_KV @ weight_VD) * grad_K1).to(x_KD.dtype)
        grad_weight_VD = grad_KV.t() @ (x_KD * grad_K1).to(x_KD.dtype)
        return grad_x_KD, grad_weight_VD, column_sum(grad_KV, grad_K).to(weight_VD.dtype)
    if _is_one_number(grad_K):
        grad_x_KD, grad_weight_VD, grad_bias_V = ((each * grad_K[0]).to(each.dtype) for each in sums)
        return grad_x_KD, grad_weight_VD, grad_bias_V
    return _sums(x_KD, weight_VD, bias_V, grad_K, chunk, visit)


def _is_one_number(grad_K: Tensor) -> bool:
    """On a GPU only where the strides say so, as of a sum's gradient: the host would have to wait to look."""
    return grad_K.stride(0) == 0 or (not grad_K.is_cuda and bool((grad_K == grad_K[0]).all()))


def _chunks(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, chunk: int
) -> Iterator[tuple[Tensor, slice]]:
    """(logits, their rows), all in the same memory."""
    num_rows = x_KD.shape[0]
    buffer_KV = x_KD.new_empty(min(chunk, num_rows), weight_VD.shape[0])
    for k in range(0, num_rows, chunk):
        rows = slice(k, min(k + chunk, num_rows))
        logits_KV = buffer_KV[: rows.stop - k]
        if bias_V is None:
            torch.mm(x_KD[rows], weight_VD.t(), out=logits_KV)
        else:
            torch.addmm(bias_V, x_KD[rows], weight_VD.t(), out=logits_KV)
        yield logits_KV, rows


def _sums(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, grad_K: Tensor | None, chunk: int, visit: Visit
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, W and b for upstream gradients `grad_K` (None: one)."""
    exact = torch.promote_types(weight_VD.dtype, torch.float32)
    if grad_K is None:
        grad_K = x_KD.new_ones(x_KD.shape[0], dtype=exact)
    grad_x_KD = torch.empty_like(x_KD)
    grad_weight_VD = torch.empty_like(weight_VD, dtype=exact)
    grad_bias_V = weight_VD.new_zeros(weight_VD.shape[0], dtype=exact)
    for logits_KV, rows in _chunks(x_KD, weight_VD, bias_V, chunk):
        visit(logits_KV, rows)
        grad_K1 = grad_K[rows, None]
        grad_x_KD[rows] = (logits_KV @ weight_VD) * grad_K1
        scaled_KD = (x_KD[rows] * grad_K1).to(x_KD.dtype)
        _add_product(grad_weight_VD, logits_KV, scaled_KD, beta=0 if rows.start == 0 else 1)
        grad_bias_V += column_sum(logits_KV, grad_K[rows])
    return grad_x_KD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V.to(weight_VD.dtype)


def _add_product(total_VD: Tensor, grad_KV: Tensor, x_KD: Tensor, beta: int) -> None:
    """total = beta total + G^T x in the type of the total, which is not read where beta is 0."""
    if grad_KV.is_cuda and grad_KV.dtype != total_VD.dtype:
        torch.addmm(total_VD, grad_KV.t(), x_KD, beta=beta, out_dtype=total_VD.dtype, out=total_VD)
    else:
        total_VD.addmm_(grad_KV.t().to(total_VD.dtype), x_KD.to(total_VD.dtype), beta=beta)


COMPILE_CASES = [
    CompileCase(
        name="chunked_linear, column sum",
        kernel=_column_sum_kernel,
        types={"x": "*bf16", "scale": "*fp32", "out": "*fp32", "num_rows": "i32", "width": "i32"},
        constants={"ROWS": 32, "COLUMNS": 128},
        aligned=("width",),
    ),
]  # fmt: skip
