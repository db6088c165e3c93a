"""Masked text loss: rows -> words -> cross-entropy, with optional label smoothing and z-loss.

For row k with logits x = W h + b over V words, l = logsumexp(x), target t, smoothing s and z-loss weight z

    loss = (1 - s) (l - x_t) + s (l - mean(x)) + z l^2      (z-loss: ST-MoE, Zoph et al. 2022, eq. 5)
    dloss/dx_j = p_j (1 + 2 z l) - (1 - s) [j = t] - s / V

Dataflow (the logits have the type of the inputs; their softmax is fp32 and lives in registers):

    forward   cuBLAS   rows_KD @ W^T + b -> logits_KV
              Triton   a program a row, twice over it, the second time from L2: largest logit, its word, sum
                       of exponentials; then the gradient over the logits, in place
    backward  cuBLAS   dx = g (G @ W),  dW = G^T @ (g x): the gradient g_K of the loss scales the narrow
                       sides, so G is only read
              Triton   db = sum over k of g_k G_k, down the columns in a fixed order

At K = 2,560 rows, V = 64,000, D = 768, bf16: the logits are written, read, overwritten, and read for dx, dW
and db, 6 x 328 MB; W twice and dW, 295 MB. That is 2.3 GB, 0.47 ms of an H200's 4.8 TB/s; all but the
kernel's 0.14 ms and db's 0.07 ms lies under the products, 0.75 TFLOP, 1.1 ms at 700 TFLOP/s. Expected: 1.3
ms, 0.43 GB at the peak (G and dW). The naive path (fp32 copy, log-softmax, its gradient, the cast back)
moves 4.6 GB beside the products: 2.0 ms, 2.0 GB. At 512 rows the products take 0.22 ms, kernel and db 0.04
ms: 0.3 ms and 0.16 GB, against 0.4 ms and 0.4 GB. None of these times is measured yet.

Past `max_logit_bytes` the rows go in chunks: forward keeps the logsumexp only, backward makes the logits of a
chunk again (a third more FLOPs) and sums dW in fp32. Smaller chunks would save nothing: one of fewer than
2 D rows is smaller than that fp32 sum, 197 MB, which every chunk reads and writes in 0.08 ms.

Shape suffixes: K row, D width, V word, N row before the gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, divide_up, jit, tl, use_triton

MAX_LOGIT_BYTES = 512 << 20


@dataclass(frozen=True)
class TextLoss:
    """Of each row, fp32: the loss, which alone has a gradient; the plain cross-entropy in nats; whether the
    target is the most likely word (of equals the first counts)."""

    loss_K: Tensor
    nats_K: Tensor
    right_K: Tensor


# -------------------------------------------------------------------------------------- PyTorch definition


def masked_text_loss_definition(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor, smoothing: float, z_loss: float
) -> TextLoss:
    logits_KV = F.linear(x_KD, weight_VD, bias_V).float()
    right_K = logits_KV.detach().argmax(-1) == target_K
    nats_K = F.cross_entropy(logits_KV, target_K, reduction="none")
    loss_K = nats_K
    if smoothing:
        loss_K = F.cross_entropy(logits_KV, target_K, reduction="none", label_smoothing=smoothing)
    if z_loss:
        loss_K = loss_K + z_loss * logits_KV.logsumexp(-1).square()
    return TextLoss(loss_K, nats_K.detach(), right_K)


def _to_gradient_definition(
    logits_KV: Tensor, target_K: Tensor, lse_K: Tensor, begin: int, num_words: int, scale: Scale
) -> None:
    p_KV = (logits_KV.float() - lse_K[:, None]).exp_()
    p_KV.mul_(1 + 2 * scale.z_loss * lse_K[:, None]).sub_(scale.smoothing / scale.vocab_size)
    local_K = target_K - begin
    here_K = (local_K >= 0) & (local_K < num_words)
    at_K1 = local_K.clamp(0, logits_KV.shape[1] - 1)[:, None]
    p_KV.scatter_add_(1, at_K1, here_K[:, None] * (scale.smoothing - 1.0))
    p_KV[:, num_words:] = 0
    logits_KV.copy_(p_KV)


# ------------------------------------------------------------------------------------------------- kernels


@jit
def row_statistics(row, num_words, BLOCK: tl.constexpr):
    """One pass over a row: (largest, its column, sum of exp(x - largest), sum of x)."""
    largest = -float("inf")
    word = 0
    sum_exp = 0.0
    total = 0.0
    for first in range(0, num_words, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < num_words, other=-float("inf")).to(tl.float32)
        top = tl.max(x, 0)
        at = tl.min(tl.where(x == top, column, num_words), 0)
        word = tl.where(top > largest, at, word)  # of equals the first
        new = tl.maximum(largest, top)
        sum_exp = sum_exp * tl.exp(largest - new) + tl.sum(tl.exp(x - new), 0)
        total += tl.sum(tl.where(column < num_words, x, 0.0), 0)
        largest = new
    return largest, word, sum_exp, total


@jit
def _row_to_gradient(row, local, lse, on_target, per_word, z_loss, num_words, width, BLOCK: tl.constexpr):
    """One pass over a row: logits -> gradient, zero in the columns that are no words."""
    on_probability = 1.0 + 2.0 * z_loss * lse
    for first in range(0, width, BLOCK):
        column = first + tl.arange(0, BLOCK)
        x = tl.load(row + column, mask=column < num_words, other=-float("inf")).to(tl.float32)
        gradient = tl.exp(x - lse) * on_probability - per_word
        gradient = tl.where(column == local, gradient - on_target, gradient)
        gradient = tl.where(column < num_words, gradient, 0.0)
        tl.store(row + column, gradient.to(row.dtype.element_ty), mask=column < width)


@jit
def _loss_kernel(
    logits, target, loss, nats, right, lse_out, stride, num_words, smoothing, z_loss,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0).to(tl.int64)
    row = logits + k * stride
    local = tl.load(target + k)
    # Before the row is overwritten; the reductions of the first pass are a barrier between the two.
    x_target = tl.load(row + local).to(tl.float32)
    largest, word, sum_exp, total = row_statistics(row, num_words, BLOCK)
    lse = largest + tl.log(sum_exp)
    tl.store(nats + k, lse - x_target)
    smooth = smoothing * (x_target - total / num_words)
    tl.store(loss + k, lse - x_target + smooth + z_loss * lse * lse)
    tl.store(right + k, word == local)
    tl.store(lse_out + k, lse)
    if GRADIENT:
        per_word = smoothing / num_words
        _row_to_gradient(row, local, lse, 1.0 - smoothing, per_word, z_loss, num_words, num_words, BLOCK)


@jit
def _to_gradient_kernel(
    logits, target, lse, stride, begin, num_words, width, on_target, per_word, z_loss, BLOCK: tl.constexpr
):
    k = tl.program_id(0).to(tl.int64)
    local = tl.load(target + k) - begin
    row = logits + k * stride
    _row_to_gradient(row, local, tl.load(lse + k), on_target, per_word, z_loss, num_words, width, BLOCK)


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


# ------------------------------------------------------------------------------------------------ launches

BLOCK_WORDS, NUM_WARPS = 4096, 8  # 16 numbers a thread: two 16-byte accesses of bf16


@dataclass(frozen=True)
class Scale:
    smoothing: float
    z_loss: float
    vocab_size: int


def to_gradient(
    logits_KV: Tensor, target_K: Tensor, lse_K: Tensor, begin: int, num_words: int, scale: Scale
) -> None:
    """In place, of a shard."""
    if not use_triton(logits_KV):
        return _to_gradient_definition(logits_KV, target_K, lse_K, begin, num_words, scale)
    num_rows, width = logits_KV.shape
    if num_rows:
        _to_gradient_kernel[(num_rows,)](
            logits_KV, target_K, lse_K, logits_KV.stride(0), begin, num_words, width,
            1 - scale.smoothing, scale.smoothing / scale.vocab_size, scale.z_loss,
            BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip


def _column_sum(x_KV: Tensor, scale_K: Tensor) -> Tensor:
    """sum over k of scale_k x_k, in x's type."""
    num_rows, width = x_KV.shape
    if not use_triton(x_KV):
        return (scale_K @ x_KV.float()).to(x_KV.dtype)
    out_V = x_KV.new_empty(width)
    _column_sum_kernel[(divide_up(width, 128),)](
        x_KV, scale_K, out_V, num_rows, width, ROWS=32, COLUMNS=128, num_warps=4
    )
    return out_V


def _add_product(total_VD: Tensor, grad_KV: Tensor, x_KD: Tensor) -> None:
    """total += G^T x in fp32."""
    if grad_KV.is_cuda and grad_KV.dtype != total_VD.dtype:
        torch.addmm(total_VD, grad_KV.t(), x_KD, out_dtype=torch.float32, out=total_VD)
    else:
        total_VD.addmm_(grad_KV.t().to(total_VD.dtype), x_KD.to(total_VD.dtype))


def products(
    grad_K: Tensor, grad_KV: Tensor, x_KD: Tensor, weight_VD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_K1 = grad_K[:, None]
    grad_x_KD = ((grad_KV @ weight_VD) * grad_K1).to(x_KD.dtype)
    return grad_x_KD, grad_KV.t() @ (x_KD * grad_K1).to(x_KD.dtype), _column_sum(grad_KV, grad_K)


# ------------------------------------------------------------------------------------------------ autograd


@torch.library.custom_op("eve_kernels::masked_text_loss", mutates_args=())
def _loss(
    x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor,
    smoothing: float, z_loss: float, chunk: int, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss_K, nats_K, right_K, logsumexp_K, and the gradient of the logits (K, V) or (0, V): not kept."""
    num_rows, num_words = x_KD.shape[0], weight_VD.shape[0]
    loss_K, nats_K, lse_K = x_KD.new_empty(3, num_rows, dtype=torch.float32).unbind()
    right_K = x_KD.new_empty(num_rows, dtype=torch.bool)
    logits_KV = x_KD.new_empty(0, num_words)
    for k in range(0, num_rows, chunk):
        part = slice(k, min(k + chunk, num_rows))
        logits_KV = F.linear(x_KD[part], weight_VD, bias_V)
        _loss_kernel[(part.stop - k,)](
            logits_KV, target_K[part], loss_K[part], nats_K[part], right_K[part], lse_K[part],
            logits_KV.stride(0), num_words, smoothing, z_loss,
            GRADIENT=keep, BLOCK=BLOCK_WORDS, num_warps=NUM_WARPS,
        )  # fmt: skip
    kept_KV = logits_KV if keep else logits_KV.new_empty(0, num_words)
    # No views of one storage leave an operator.
    return loss_K.clone(), nats_K.clone(), right_K, lse_K.clone(), kept_KV


@_loss.register_fake
def _(x_KD, weight_VD, bias_V, target_K, smoothing, z_loss, chunk, keep):  # pyright: ignore
    num_rows = x_KD.shape[0]
    loss_K, nats_K, lse_K = (x_KD.new_empty(num_rows, dtype=torch.float32) for _ in range(3))
    right_K = x_KD.new_empty(num_rows, dtype=torch.bool)
    return loss_K, nats_K, right_K, lse_K, x_KD.new_empty(num_rows if keep else 0, weight_VD.shape[0])


@torch.library.custom_op("eve_kernels::masked_text_loss_backward", mutates_args=())
def _loss_backward(
    grad_K: Tensor, x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_K: Tensor,
    lse_K: Tensor, kept_KV: Tensor, smoothing: float, z_loss: float, chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    grad_K = grad_K.contiguous()
    num_rows, num_words = x_KD.shape[0], weight_VD.shape[0]
    if kept_KV.shape[0] == num_rows:
        return products(grad_K, kept_KV, x_KD, weight_VD)
    scale = Scale(smoothing, z_loss, num_words)
    grad_x_KD = torch.empty_like(x_KD)
    grad_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
    grad_bias_V = weight_VD.new_zeros(num_words, dtype=torch.float32)
    for k in range(0, num_rows, chunk):
        part = slice(k, min(k + chunk, num_rows))
        grad_KV = F.linear(x_KD[part], weight_VD, bias_V)
        to_gradient(grad_KV, target_K[part], lse_K[part], 0, num_words, scale)
        grad_K1 = grad_K[part, None]
        grad_x_KD[part] = (grad_KV @ weight_VD) * grad_K1
        _add_product(grad_weight_VD, grad_KV, (x_KD[part] * grad_K1).to(x_KD.dtype))
        grad_bias_V += _column_sum(grad_KV, grad_K[part])
    return grad_x_KD, grad_weight_VD.to(weight_VD.dtype), grad_bias_V.to(weight_VD.dtype)


@_loss_backward.register_fake
def _(grad_K, x_KD, weight_VD, bias_V, target_K, lse_K, kept_KV, smoothing, z_loss, chunk):  # pyright: ignore
    return torch.empty_like(x_KD), torch.empty_like(weight_VD), weight_VD.new_empty(weight_VD.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_KD, weight_VD, bias_V, target_K, *ctx.options, _ = inputs
    _, *others, lse_K, kept_KV = output
    ctx.mark_non_differentiable(*others, lse_K, kept_KV)
    ctx.set_materialize_grads(False)  # else zeros of the size of the logits
    ctx.save_for_backward(x_KD, weight_VD, bias_V, target_K, lse_K, kept_KV)


def _backward(ctx: Any, grad_K: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: activation checkpointing gives them no second time
    grad_x_KD, grad_weight_VD, grad_bias_V = _loss_backward(grad_K, *saved, *ctx.options)
    return grad_x_KD, grad_weight_VD, None if saved[2] is None else grad_bias_V, *[None] * 5


_loss.register_autograd(_backward, setup_context=_save)


def masked_text_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    target_K: Tensor,
    row_K: Tensor | None = None,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> TextLoss:
    """Rows `row_K` (distinct; None: all) of x (N, D) against words `target_K` (K,) int64."""
    x_KD = x_ND if row_K is None else x_ND.index_select(0, row_K)
    if not use_triton(x_KD):
        return masked_text_loss_definition(x_KD, weight_VD, bias_V, target_K, smoothing, z_loss)
    num_rows, num_words = x_KD.shape[0], weight_VD.shape[0]
    chunk = max(1, max_logit_bytes // (num_words * x_KD.element_size()))
    parameters = [x_KD, weight_VD] if bias_V is None else [x_KD, weight_VD, bias_V]
    learns = torch.is_grad_enabled() and any(each.requires_grad for each in parameters)
    keep = learns and num_rows <= chunk
    target_K = target_K.contiguous()
    loss_K, nats_K, right_K, *_ = _loss(x_KD, weight_VD, bias_V, target_K, smoothing, z_loss, chunk, keep)
    return TextLoss(loss_K, nats_K, right_K)


COMPILE_CASES = [
    CompileCase(
        name="masked_text_loss",
        kernel=_loss_kernel,
        types={
            "logits": "*bf16", "target": "*i64", "loss": "*fp32", "nats": "*fp32", "right": "*i1",
            "lse_out": "*fp32", "stride": "i32", "num_words": "i32", "smoothing": "fp32", "z_loss": "fp32",
        },
        constants={"GRADIENT": True, "BLOCK": BLOCK_WORDS},
        num_warps=NUM_WARPS,
        aligned=("stride", "num_words"),
    ),
    CompileCase(
        name="masked_text_loss, logits -> gradient",
        kernel=_to_gradient_kernel,
        types={
            "logits": "*bf16", "target": "*i64", "lse": "*fp32", "stride": "i32", "begin": "i32",
            "num_words": "i32", "width": "i32", "on_target": "fp32", "per_word": "fp32", "z_loss": "fp32",
        },
        constants={"BLOCK": BLOCK_WORDS},
        num_warps=NUM_WARPS,
        aligned=("stride", "begin", "num_words", "width"),
    ),
    CompileCase(
        name="masked_text_loss, column sum",
        kernel=_column_sum_kernel,
        types={"x": "*bf16", "scale": "*fp32", "out": "*bf16", "num_rows": "i32", "width": "i32"},
        constants={"ROWS": 32, "COLUMNS": 128},
        aligned=("width",),
    ),
]  # fmt: skip
