"""Combine: the weighted sum of each token's rows, and the residual on the way.

    y_TD[t] = residual_TD[t] + sum over the kept choices k of weight_TK[t, k] * y_ND[token_row_TK[t, k]]

Index tensors as in kernels/dispatch.py. A dropped choice (-1) adds nothing and reads nothing; its weight gets
gradient 0. Sums are taken in fp32, in the order of the choices.

Bytes, for T tokens of D columns in b bytes: forward reads K rows and writes one, (1 + K) T D b: 151 MB at
T 32,768, D 768, K 2, bf16. Backward needs each row's gradient w * dy and each weight's gradient <dy, row>: a
program owns whole tokens, keeps their dy in registers, reads the K rows of each and writes their gradients,
(1 + 2 K) T D b: 252 MB. A row belongs to one choice of one token, so both directions have a fixed order and
no atomics.

Shape suffixes: T token, K choice, N row, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import CompileCase, divide_up, jit, rows_of, tl, use_triton
from kernels.row_tiles import (
    PADDING_BLOCK,
    num_programs,
    row_of,
    rows_or_zero,
    tile_of,
    tokens_of,
    warps_of,
    zero_padding,
)


def combine(
    y_ND: Tensor,
    weight_TK: Tensor,
    row_token_N: Tensor,
    token_row_TK: Tensor,
    residual_TD: Tensor | None = None,
) -> Tensor:
    """(N, D) -> (T, D), in the type of the residual, without one in that of the rows. `weight_TK` is fp32.

    The gradient of a row that no choice owns is not defined, but 0 for padding.
    """
    return _combine(y_ND, weight_TK, row_token_N, token_row_TK, residual_TD)


# ---------------------------------------------------------------------------------------------- definition


def combine_definition(
    y_ND: Tensor, weight_TK: Tensor, token_row_TK: Tensor, residual_TD: Tensor | None
) -> Tensor:
    # In place wherever a gathered copy is ours: on a CPU fresh memory costs more than what is done with it.
    wide = torch.promote_types(y_ND.dtype, weight_TK.dtype)
    out_TD = rows_or_zero(y_ND, token_row_TK[:, 0]).to(wide).mul_(weight_TK[:, :1])
    for choice in range(1, token_row_TK.shape[1]):
        out_TD.addcmul_(rows_or_zero(y_ND, token_row_TK[:, choice]), weight_TK[:, choice : choice + 1])
    if residual_TD is not None:
        return out_TD.add_(residual_TD).to(residual_TD.dtype)
    return out_TD.to(y_ND.dtype)


def combine_backward_definition(
    grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_token_N: Tensor, token_row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of y_ND and of weight_TK."""
    num_rows = y_ND.shape[0]
    if grad_TD.shape[0] == 0:
        return torch.zeros_like(y_ND), torch.zeros_like(weight_TK)
    # The weight of each row; rows that nobody owns keep 0.
    weight_N = weight_TK.new_zeros(num_rows + 1)
    weight_N[torch.where(token_row_TK >= 0, token_row_TK, num_rows).flatten()] = weight_TK.flatten()
    wide = torch.promote_types(grad_TD.dtype, weight_TK.dtype)
    grad_ND = grad_TD.index_select(0, row_token_N.clamp_min(0)).to(wide).mul_(weight_N[:-1, None])
    grad_weight_TK = torch.empty_like(weight_TK, memory_format=torch.contiguous_format)
    for choice, row_T in enumerate(token_row_TK.unbind(1)):
        grad_weight_TK[:, choice] = rows_or_zero(y_ND, row_T).to(wide).mul_(grad_TD).sum(-1)
    return grad_ND.to(y_ND.dtype), grad_weight_TK


# ------------------------------------------------------------------------------------------------- kernels


@jit
def combine_kernel(
    y,
    weight,
    token_row,
    residual,
    out,
    num_tokens,
    y_stride,
    residual_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token_T, inside_T, column_D, inside_D, tile_TD = tokens_of(
        tl.program_id(0), num_tokens, D, BLOCK_T, BLOCK_D
    )
    sum_TD = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for choice in tl.static_range(K):
        row_T = row_of(token_row, token_T, inside_T, choice, K)
        weight_T = tl.load(weight + token_T * K + choice, mask=inside_T, other=0.0).to(tl.float32)
        kept_TD = (row_T >= 0)[:, None] & inside_D[None, :]
        y_TD = tl.load(y + row_T[:, None] * y_stride + column_D[None, :], mask=kept_TD, other=0.0)
        sum_TD += weight_T[:, None] * y_TD.to(tl.float32)
    if residual is not None:
        place_TD = token_T[:, None] * residual_stride + column_D[None, :]
        sum_TD += tl.load(residual + place_TD, mask=tile_TD, other=0.0).to(tl.float32)
    tl.store(out + token_T[:, None] * D + column_D[None, :], sum_TD.to(out.dtype.element_ty), mask=tile_TD)


@jit
def combine_backward_kernel(
    grad,
    y,
    weight,
    token_row,
    row_token,
    grad_y,
    grad_weight,
    num_tokens,
    num_rows,
    grad_stride,
    y_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    num_token_blocks = tl.cdiv(num_tokens, BLOCK_T)
    if program < num_token_blocks:
        token_T, inside_T, column_D, inside_D, tile_TD = tokens_of(program, num_tokens, D, BLOCK_T, BLOCK_D)
        place_TD = token_T[:, None] * grad_stride + column_D[None, :]
        grad_TD = tl.load(grad + place_TD, mask=tile_TD, other=0.0).to(tl.float32)
        for choice in tl.static_range(K):
            row_T = row_of(token_row, token_T, inside_T, choice, K)
            weight_T = tl.load(weight + token_T * K + choice, mask=inside_T, other=0.0).to(tl.float32)
            kept_TD = (row_T >= 0)[:, None] & inside_D[None, :]
            y_TD = tl.load(y + row_T[:, None] * y_stride + column_D[None, :], mask=kept_TD, other=0.0)
            product_T = tl.sum(grad_TD * y_TD.to(tl.float32), axis=1)
            tl.store(grad_weight + token_T * K + choice, product_T, mask=inside_T)
            grad_y_TD = (weight_T[:, None] * grad_TD).to(grad_y.dtype.element_ty)
            tl.store(grad_y + row_T[:, None] * D + column_D[None, :], grad_y_TD, mask=kept_TD)
    else:
        zero_padding(grad_y, row_token, program - num_token_blocks, num_rows, D, BLOCK_N)


# ------------------------------------------------------------------------------------------------ operator


@torch.library.custom_op("eve_kernels::combine", mutates_args=())
def _combine(
    y_ND: Tensor, weight_TK: Tensor, row_token_N: Tensor, token_row_TK: Tensor, residual_TD: Tensor | None
) -> Tensor:
    if not use_triton(y_ND):
        return combine_definition(y_ND, weight_TK, token_row_TK, residual_TD)
    (num_tokens, num_choices), width = token_row_TK.shape, y_ND.shape[1]
    y_ND = rows_of(y_ND)
    residual_TD = None if residual_TD is None else rows_of(residual_TD)
    out_TD = (y_ND if residual_TD is None else residual_TD).new_empty(num_tokens, width)
    tile = tile_of(width)
    if out_TD.numel():
        combine_kernel[(divide_up(num_tokens, tile["BLOCK_T"]),)](
            y_ND,
            weight_TK.contiguous(),
            token_row_TK.contiguous(),
            residual_TD,
            out_TD,
            num_tokens,
            y_ND.stride(0),
            0 if residual_TD is None else residual_TD.stride(0),
            D=width,
            K=num_choices,
            **tile,
            num_warps=warps_of(tile),
        )
    return out_TD


@_combine.register_fake
def _(y_ND, weight_TK, row_token_N, token_row_TK, residual_TD) -> Tensor:
    like = y_ND if residual_TD is None else residual_TD
    return like.new_empty(token_row_TK.shape[0], y_ND.shape[1])


@torch.library.custom_op("eve_kernels::combine_backward", mutates_args=())
def _combine_backward(
    grad_TD: Tensor, y_ND: Tensor, weight_TK: Tensor, row_token_N: Tensor, token_row_TK: Tensor
) -> tuple[Tensor, Tensor]:
    if not use_triton(grad_TD):
        return combine_backward_definition(grad_TD, y_ND, weight_TK, row_token_N, token_row_TK)
    (num_tokens, num_choices), (num_rows, width) = token_row_TK.shape, y_ND.shape
    grad_TD, y_ND = rows_of(grad_TD), rows_of(y_ND)
    grad_ND = y_ND.new_empty(num_rows, width)
    grad_weight_TK = torch.empty_like(weight_TK, memory_format=torch.contiguous_format)
    tile = tile_of(width)
    programs = num_programs(row_token_N, token_row_TK, tile)
    if programs and width:
        combine_backward_kernel[(programs,)](
            grad_TD,
            y_ND,
            weight_TK.contiguous(),
            token_row_TK.contiguous(),
            row_token_N.contiguous(),
            grad_ND,
            grad_weight_TK,
            num_tokens,
            num_rows,
            grad_TD.stride(0),
            y_ND.stride(0),
            D=width,
            K=num_choices,
            BLOCK_N=PADDING_BLOCK,
            **tile,
            num_warps=warps_of(tile),
        )
    return grad_ND, grad_weight_TK


@_combine_backward.register_fake
def _(grad_TD, y_ND, weight_TK, row_token_N, token_row_TK) -> tuple[Tensor, Tensor]:
    return y_ND.new_empty(y_ND.shape), weight_TK.new_empty(weight_TK.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *saved, residual_TD = inputs
    ctx.has_residual = residual_TD is not None
    ctx.save_for_backward(*saved)


def _backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
    grad_ND, grad_weight_TK = _combine_backward(grad_TD, *ctx.saved_tensors)
    return grad_ND, grad_weight_TK, None, None, grad_TD if ctx.has_residual else None


_combine.register_autograd(_backward, setup_context=_save)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for width in (768, 1024):
        for num_choices in (1, 2):
            constants = {"D": width, "K": num_choices, **tile_of(width)}
            rows = {"y": "*bf16", "weight": "*fp32", "token_row": "*i64"}
            name = f"D={width} K={num_choices}"
            cases += [
                CompileCase(
                    f"combine {name}",
                    combine_kernel,
                    {**rows, "out": "*bf16", "num_tokens": "i32", "y_stride": "i32"},
                    {"residual": None, "residual_stride": 0} | constants,
                    aligned=("y_stride",),
                ),
                CompileCase(
                    f"combine + residual {name}",
                    combine_kernel,
                    {**rows, "residual": "*bf16", "out": "*bf16"}
                    | {"num_tokens": "i32", "y_stride": "i32", "residual_stride": "i32"},
                    constants,
                    aligned=("y_stride", "residual_stride"),
                ),
                CompileCase(
                    f"combine backward {name}",
                    combine_backward_kernel,
                    {"grad": "*bf16", **rows, "row_token": "*i64", "grad_y": "*bf16", "grad_weight": "*fp32"}
                    | {"num_tokens": "i32", "num_rows": "i32", "grad_stride": "i32", "y_stride": "i32"},
                    {"BLOCK_N": PADDING_BLOCK} | constants,
                    aligned=("grad_stride", "y_stride"),
                ),
            ]
    return cases


COMPILE_CASES = _compile_cases()
