"""The feed-forward of experts: rows sorted by expert -> product, bias, activation -> product, bias.

    forward    grouped product    x_ND W1 + b1 -> z_NF, and its activation a_NF, which is not kept
               grouped product    a_NF W2 + b2 -> y_ND
    backward   grouped product    dy W2^T -> da_NF
               one pass           z, da -> dz, a again, and the sums of dz over tiles of rows; of dy alike
               a small pass       these sums -> db1, db2
               grouped products   dW2 = a^T dy, dW1 = x^T dz, dx = dz W1^T

Kept from forward to backward: x and z. The activation would be as much again as z, 403 MB at N = 65,536 rows
and F = 3,072 in bf16; written once more it costs 0.08 ms of an H200's 4.8 TB/s, in a pass of 4 x 403 MB,
0.34 ms, that is needed anyhow. Sums over rows have a fixed order: tiles of 256 rows of an expert, then its
tiles. None of these times is measured yet.

The rows may be tokens that the first product reads by index, instead of rows that dispatch has written. That
saves dispatch, (1 + K) T D b bytes, and keeps T rows of x and not K T: 151 MB less moved, 50 MB less kept at
T 32,768, D 768, K 2, bf16, or 0.03 ms of 2.6 ms of products. Only the kernel in Triton can do it. So it pays
where Triton multiplies anyhow, and never is a reason to give up a faster product: 2 % slower ones cost more.
In the gradient of W1 the index stands before each load of rows, and the compiler keeps two tiles in flight
instead of three. None of it is measured yet.

A CPU takes the experts in turn and keeps no more: fresh memory is dear there, for the kernel clears each page
of it, which took longer than the activation did. So the activation, its gradient and the gradient of z are
written into room for the rows of one expert.

Shape suffixes: N row, E expert, D width, F hidden width, O any of these two, R tile of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import megablocks_products
from kernels.backend import CompileCase, divide_up, jit, power_of_2, rows_of, tl, use_triton
from kernels.dispatch import dispatch_backward
from kernels.grouped_linear import (
    ACTIVATIONS,
    activate,
    activated,
    check_names,
    grouped_product,
    grouped_weight_gradient,
    ranges,
    rows_of_tile,
)
from kernels.row_tiles import rows_or_zero

SUM_TILE = {"BLOCK_N": 256, "LINES": 8, "BLOCK_O": 256}

# ---------------------------------------------------------------------------------------------- definition


def feed_forward_definition(
    x_ND: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor, offsets_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y_ND, z_NF)."""
    rows_E = ranges(offsets_E)
    z_NF = x_ND.new_empty(x_ND.shape[0], w1_EDF.shape[2])
    y_ND = x_ND.new_empty(x_ND.shape[0], w2_EFD.shape[2])
    room_NF = _room_for_one(z_NF, rows_E)
    for e, rows in enumerate(rows_E):
        z, a = z_NF[rows], room_NF[: rows.stop - rows.start]
        torch.addmm(b1_EF[e], x_ND[rows], w1_EDF[e], out=z)
        torch.addmm(b2_ED[e], _activate_into(a, z, activation), w2_EFD[e], out=y_ND[rows])
    return y_ND, z_NF


def feed_forward_backward_definition(
    grad_ND: Tensor, x_ND: Tensor, z_NF: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, offsets_E: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, w1, b1, w2, b2. That of a row which no expert has is 0."""
    rows_E = ranges(offsets_E)
    grad_x_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
    grad_x_ND[rows_E[-1].stop :] = 0
    grad_w1_EDF = torch.empty_like(w1_EDF, memory_format=torch.contiguous_format)
    grad_w2_EFD = torch.empty_like(w2_EFD, memory_format=torch.contiguous_format)
    grad_b1_EF = x_ND.new_empty(len(rows_E), z_NF.shape[1])
    grad_b2_ED = x_ND.new_empty(len(rows_E), grad_ND.shape[1])
    room_NF, grad_room_NF = _room_for_one(z_NF, rows_E), _room_for_one(z_NF, rows_E)
    for e, rows in enumerate(rows_E):
        grad, z, a = grad_ND[rows], z_NF[rows], room_NF[: rows.stop - rows.start]
        torch.mm(_activate_into(a, z, activation).t(), grad, out=grad_w2_EFD[e])
        grad_a = torch.mm(grad, w2_EFD[e].t(), out=grad_room_NF[: rows.stop - rows.start])
        grad_z = _activation_backward(grad_a, z, activation, into=grad_a, room=a)
        torch.sum(grad, 0, out=grad_b2_ED[e])
        torch.sum(grad_z, 0, out=grad_b1_EF[e])
        torch.mm(x_ND[rows].t(), grad_z, out=grad_w1_EDF[e])
        torch.mm(grad_z, w1_EDF[e].t(), out=grad_x_ND[rows])
    return grad_x_ND, grad_w1_EDF, grad_b1_EF, grad_w2_EFD, grad_b2_ED


def _room_for_one(z_NF: Tensor, rows_E: list[slice]) -> Tensor:
    """For the rows of the expert that has most."""
    return z_NF.new_empty(max(rows.stop - rows.start for rows in rows_E), z_NF.shape[1])


def _activate_into(out: Tensor, z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return torch.ops.aten.gelu.out(z, out=out)
    return F.silu(torch.mul(z, 1.702, out=out), inplace=True).div_(1.702)


def _activation_backward(
    grad: Tensor, z: Tensor, activation: str, into: Tensor | None = None, room: Tensor | None = None
) -> Tensor:
    """Into a new tensor, or `into`, which may be `grad`; `room` is of the same size."""
    into = torch.empty_like(grad) if into is None else into
    if activation == "gelu":
        return torch.ops.aten.gelu_backward.grad_input(grad, z, grad_input=into)
    # z s(1.702 z) is silu(1.702 z) / 1.702.
    scaled = torch.mul(z, 1.702, out=room)
    return torch.ops.aten.silu_backward.grad_input(grad, scaled, grad_input=into)


# ------------------------------------------------------------------------------------------------- kernels


@jit
def slope(z, ACTIVATION: tl.constexpr):
    """Derivative of the activation."""
    if ACTIVATION == 1:
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * density
    s = tl.sigmoid(1.702 * z)
    return s * (1.0 + 1.702 * z * (1.0 - s))


@jit
def activation_gradient_kernel(
    grad, z, offsets, grad_z, again, sums, num_experts, width, grad_stride,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, LINES: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Without an activation only the sums over each tile of rows."""
    column = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_column = column < width
    _, first, end, exists = rows_of_tile(offsets, tl.program_id(0), num_experts, BLOCK_N, BLOCK_E)
    if not exists:
        return
    total = tl.zeros((LINES, BLOCK_O), tl.float32)
    for line in range(0, tl.minimum(end - first, BLOCK_N), LINES):
        row = first + line + tl.arange(0, LINES)
        inside = (row < end)[:, None] & in_column[None, :]
        part = tl.load(grad + row[:, None] * grad_stride + column[None, :], mask=inside, other=0.0)
        part = part.to(tl.float32)
        if ACTIVATION:
            at = row[:, None] * width + column[None, :]
            value = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
            part = part * slope(value, ACTIVATION)
            tl.store(grad_z + at, part.to(grad_z.dtype.element_ty), mask=inside)
            tl.store(again + at, activated(value, ACTIVATION).to(again.dtype.element_ty), mask=inside)
        total += part
    tl.store(sums + tl.program_id(0).to(tl.int64) * width + column, tl.sum(total, 0), mask=in_column)


@jit
def add_tiles_kernel(
    sums, offsets, out, num_experts, width,
    BLOCK_N: tl.constexpr, LINES: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Of each expert, the sums over its tiles of rows."""
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    e = tl.arange(0, BLOCK_E)
    end = tl.load(offsets + e, mask=e < num_experts, other=0)
    begin = tl.load(offsets + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    tiles = tl.where(e < num_experts, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    first = tl.sum(tl.where(e < expert, tiles, 0), 0)
    stop = tl.sum(tl.where(e <= expert, tiles, 0), 0)
    total = tl.zeros((LINES, BLOCK_O), tl.float32)
    for tile in range(first, stop, LINES):
        line = tile + tl.arange(0, LINES).to(tl.int64)
        inside = (line < stop)[:, None] & (column < width)[None, :]
        total += tl.load(sums + line[:, None] * width + column[None, :], mask=inside, other=0.0)
    tl.store(out + expert * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


# ------------------------------------------------------------------------------------------------ launches


def grouped_activation_gradient(
    grad_NO: Tensor, z_NO: Tensor | None, offsets_E: Tensor, activation: str = "none"
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dz, activation(z), sum of dz over the rows of each expert). Without an activation z is None, and
    dz is `grad_NO`."""
    if not use_triton(grad_NO):
        grad_z_NO = grad_NO if z_NO is None else _activation_backward(grad_NO, z_NO, activation)
        bias_EO = torch.stack([grad_z_NO[rows].sum(0) for rows in ranges(offsets_E)])
        return grad_z_NO, None if z_NO is None else activate(z_NO, activation), bias_EO
    grad_NO = rows_of(grad_NO)
    (num_rows, width), num_experts = grad_NO.shape, offsets_E.shape[0]
    block_e = power_of_2(num_experts)
    row_tiles = divide_up(num_rows, SUM_TILE["BLOCK_N"]) + num_experts
    column_tiles = divide_up(width, SUM_TILE["BLOCK_O"])
    sums_RO = grad_NO.new_empty(row_tiles, width, dtype=torch.float32)
    bias_EO = grad_NO.new_empty(num_experts, width)
    grad_z_NO = grad_NO if z_NO is None else torch.empty_like(z_NO)
    again_NO = None if z_NO is None else torch.empty_like(z_NO)
    activation_gradient_kernel[(row_tiles, column_tiles)](
        grad_NO, z_NO, offsets_E, grad_z_NO, again_NO, sums_RO, num_experts, width, grad_NO.stride(0),
        ACTIVATION=ACTIVATIONS[activation], BLOCK_E=block_e, **SUM_TILE,
    )  # fmt: skip
    add_tiles_kernel[(column_tiles, num_experts)](
        sums_RO, offsets_E, bias_EO, num_experts, width, BLOCK_E=block_e, **SUM_TILE
    )
    return grad_z_NO, again_NO, bias_EO


# ------------------------------------------------------------------------------------------------ operator


def _sizes(offsets_E: Tensor, products: str) -> Tensor | None:
    """What megablocks wants to know on the host, asked once a pass."""
    several = offsets_E.shape[0] > 1
    return megablocks_products.sizes_of(offsets_E) if products == "megablocks" and several else None


def _ends(offsets_E: Tensor | None, num_rows: int, device: torch.device) -> Tensor:
    return torch.full((1,), num_rows, dtype=torch.int32, device=device) if offsets_E is None else offsets_E


@torch.library.custom_op("eve_kernels::expert_feed_forward", mutates_args=())
def _forward(
    x_ND: Tensor, w1_EDF: Tensor, b1_EF: Tensor, w2_EFD: Tensor, b2_ED: Tensor, offsets_E: Tensor | None,
    activation: str, products: str, row_token_N: Tensor | None, token_row_TK: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    offsets_E = _ends(offsets_E, (x_ND if row_token_N is None else row_token_N).shape[0], x_ND.device)
    if not use_triton(x_ND):
        x_ND = x_ND if row_token_N is None else rows_or_zero(x_ND, row_token_N)
        return feed_forward_definition(x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED, offsets_E, activation)
    sizes_E = _sizes(offsets_E, products)
    a_NF, z_NF = grouped_product(
        x_ND, w1_EDF, offsets_E, b1_EF, activation, True, products, sizes_E, row_token_N
    )
    y_ND, _ = grouped_product(a_NF, w2_EFD, offsets_E, b2_ED, products=products, sizes_E=sizes_E)
    assert z_NF is not None
    return y_ND, z_NF


@_forward.register_fake
def _(
    x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED, offsets_E, activation, products, row_token_N, token_row_TK
) -> tuple[Tensor, Tensor]:
    num_rows = (x_ND if row_token_N is None else row_token_N).shape[0]
    return x_ND.new_empty(num_rows, w2_EFD.shape[2]), x_ND.new_empty(num_rows, w1_EDF.shape[2])


@torch.library.custom_op("eve_kernels::expert_feed_forward_backward", mutates_args=())
def _backward_operator(
    grad_ND: Tensor, x_ND: Tensor, z_NF: Tensor, w1_EDF: Tensor, w2_EFD: Tensor, offsets_E: Tensor | None,
    activation: str, products: str, row_token_N: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the rows, of tokens too: dispatch's backward sums those of a token."""
    all_rows = offsets_E is None
    offsets_E = _ends(offsets_E, grad_ND.shape[0], grad_ND.device)
    if not use_triton(grad_ND):
        x_ND = x_ND if row_token_N is None else rows_or_zero(x_ND, row_token_N)
        return feed_forward_backward_definition(grad_ND, x_ND, z_NF, w1_EDF, w2_EFD, offsets_E, activation)
    grad_ND = grad_ND.contiguous()
    how: dict[str, Any] = {"products": products, "sizes_E": _sizes(offsets_E, products)}
    grad_a_NF, _ = grouped_product(grad_ND, w2_EFD.transpose(1, 2), offsets_E, **how)
    grad_z_NF, a_NF, grad_b1_EF = grouped_activation_gradient(grad_a_NF, z_NF, offsets_E, activation)
    _, _, grad_b2_ED = grouped_activation_gradient(grad_ND, None, offsets_E)
    assert a_NF is not None
    grad_w2_EFD = grouped_weight_gradient(a_NF, grad_ND, offsets_E, **how, all_rows=all_rows)
    rows: dict[str, Any] = {"index_N": row_token_N, "all_rows": all_rows}
    grad_w1_EDF = grouped_weight_gradient(x_ND, grad_z_NF, offsets_E, **how, **rows)
    grad_x_ND, _ = grouped_product(grad_z_NF, w1_EDF.transpose(1, 2), offsets_E, **how)
    return grad_x_ND, grad_w1_EDF, grad_b1_EF, grad_w2_EFD, grad_b2_ED


@_backward_operator.register_fake
def _(grad_ND, x_ND, z_NF, w1_EDF, w2_EFD, offsets_E, activation, products, row_token_N):  # pyright: ignore
    (num_experts, width, hidden), like = w1_EDF.shape, x_ND.new_empty
    return (
        like(grad_ND.shape), like(w1_EDF.shape), like(num_experts, hidden), like(w2_EFD.shape),
        like(num_experts, width),
    )  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x_ND, w1_EDF, _, w2_EFD, _, offsets_E, ctx.activation, ctx.products, row_token_N, token_row_TK = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_ND, output[1], w1_EDF, w2_EFD, offsets_E, row_token_N, token_row_TK)


def _backward(ctx: Any, grad_ND: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_ND is None:
        return (None,) * 10
    *saved, row_token_N, token_row_TK = ctx.saved_tensors
    grad_x, *others = _backward_operator(grad_ND, *saved, ctx.activation, ctx.products, row_token_N)
    if token_row_TK is not None:
        grad_x, _ = dispatch_backward(grad_x, token_row_TK, 0, None)
    return grad_x, *others, None, None, None, None, None


_forward.register_autograd(_backward, setup_context=_save)


def expert_feed_forward(
    x_ND: Tensor,
    w1_EDF: Tensor,
    b1_EF: Tensor,
    w2_EFD: Tensor,
    b2_ED: Tensor,
    offsets_E: Tensor | None,
    activation: str = "gelu",
    products: str = "auto",
    row_token_N: Tensor | None = None,
    token_row_TK: Tensor | None = None,
) -> Tensor:
    """(N, D) -> (N, D); `offsets_E` int32 holds the end of each expert's rows (None: there is one expert, and
    it has all). Rows past the last end are undefined, and the gradient of such a row of x.

    activation: gelu or quick_gelu. products: what multiplies on a GPU (auto, grouped_mm, triton, megablocks);
    see kernels/grouped_linear.py.

    With `row_token_N` and `token_row_TK` (kernels/dispatch.py) x_ND holds the (T, D) tokens, not the rows.
    """
    if (row_token_N is None) != (token_row_TK is None):
        raise ValueError("expert_feed_forward takes row_token_N and token_row_TK together")
    check_names(activation, products, ("gelu", "quick_gelu"))
    num_experts, width, hidden = w1_EDF.shape
    if w2_EFD.shape[:2] != (num_experts, hidden) or b1_EF.shape != (num_experts, hidden):
        raise ValueError(
            f"w1 {tuple(w1_EDF.shape)} fits neither w2 {tuple(w2_EFD.shape)} nor b1 {tuple(b1_EF.shape)}"
        )
    if x_ND.shape[-1] != width or b2_ED.shape != (num_experts, w2_EFD.shape[2]):
        raise ValueError(f"x {tuple(x_ND.shape)} does not fit w1 {tuple(w1_EDF.shape)}, or b2 not w2")
    if num_experts != (1 if offsets_E is None else offsets_E.shape[0]):
        raise ValueError(f"{num_experts} experts need as many offsets")
    how = activation, products, row_token_N, token_row_TK
    return _forward(x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED, offsets_E, *how)[0]


_SUMS = {
    "grad": "*bf16", "offsets": "*i32", "sums": "*fp32", "num_experts": "i32", "width": "i32",
    "grad_stride": "i32",
}  # fmt: skip

COMPILE_CASES = [
    CompileCase(
        name="expert_feed_forward, gradient of gelu",
        kernel=activation_gradient_kernel,
        types={**_SUMS, "z": "*bf16", "grad_z": "*bf16", "again": "*bf16"},
        constants={"ACTIVATION": 1, "BLOCK_E": 32, **SUM_TILE},
        aligned=("width", "grad_stride"),
    ),
    CompileCase(
        name="expert_feed_forward, gradient of b",
        kernel=add_tiles_kernel,
        types={"sums": "*fp32", "offsets": "*i32", "out": "*bf16", "num_experts": "i32", "width": "i32"},
        constants={"BLOCK_E": 32, **SUM_TILE},
        aligned=("width",),
    ),
]  # fmt: skip
