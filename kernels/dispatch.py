"""Dispatch: packed tokens -> rows in the order of their experts, and the modality vector on the way.

    x_ND[token_row_TK[t, k]] = x_TD[t] + vector_MD[modality_T[t]]        for each kept choice k of token t
    x_ND[n] = 0                                                          where row_token_N[n] is -1

Index tensors (kernels/routing.py makes them):
    row_token_N   int64 (N,)    token of each row; -1 for a row of alignment padding; N is T * K without it
    token_row_TK  int64 (T, K)  row of each choice, no row twice; -1 where the choice was dropped
    modality_T    int64 (T,)    line of vector_MD that is added to the token

A row that no choice owns and that is no padding is past the last expert's rows: nothing is written to it and
nobody may read it. Padding rows lie inside an expert's rows, where the product over rows (the gradient of a
weight) reads them: they must be 0.

Bytes, for T tokens of D columns in b bytes: a program owns whole tokens, reads each once and writes its K
rows, so forward moves (1 + K) T D b: 151 MB at T 32,768, D 768, K 2, bf16. Going by rows would read a token K
times. Backward gathers a token's K rows and sums them in fp32 in the order of the choices: as many bytes, no
atomics. The gradient of the vector is summed in the same pass, by programs that each walk over many tokens.

Shape suffixes: T token, K choice, N row, D width, M modality, P program.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, divide_up, jit, power_of_2, rows_of, tl, use_triton
from kernels.row_tiles import (
    ELEMENTS,
    PADDING_BLOCK,
    is_padded,
    num_programs,
    row_of,
    rows_or_zero,
    tile_of,
    tokens_of,
    warps_of,
    zero_padding,
)

MAX_PROGRAMS = 1056  # that sum the gradient of the vector: 8 for each of an H200's processors


def dispatch(
    x_TD: Tensor,
    row_token_N: Tensor,
    token_row_TK: Tensor,
    vector_MD: Tensor | None = None,
    modality_T: Tensor | None = None,
) -> Tensor:
    """(T, D) -> (N, D) of the same type. `modality_T` is needed with `vector_MD`."""
    if (vector_MD is None) != (modality_T is None):
        raise ValueError("dispatch takes vector_MD and modality_T together")
    return _dispatch(x_TD, row_token_N, token_row_TK, vector_MD, modality_T)


# ---------------------------------------------------------------------------------------------- definition


def dispatch_definition(
    x_TD: Tensor,
    row_token_N: Tensor,
    token_row_TK: Tensor,
    vector_MD: Tensor | None,
    modality_T: Tensor | None,
) -> Tensor:
    if vector_MD is not None:
        x_TD = (x_TD + vector_MD[modality_T]).to(x_TD.dtype)
    if not is_padded(row_token_N, token_row_TK):
        return x_TD.index_select(0, row_token_N)
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(row_token_N.shape[0], x_TD.shape[1])
    return x_TD.index_select(0, row_token_N.clamp_min(0)).masked_fill_((row_token_N < 0)[:, None], 0)


def dispatch_backward_definition(
    grad_ND: Tensor, token_row_TK: Tensor, num_vectors: int, modality_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of x_TD in its type, and of vector_MD in fp32 (no row where `num_vectors` is 0)."""
    wide = torch.promote_types(grad_ND.dtype, torch.float32)
    grad_TD = rows_or_zero(grad_ND, token_row_TK[:, 0]).to(wide)
    for choice in range(1, token_row_TK.shape[1]):
        grad_TD += rows_or_zero(grad_ND, token_row_TK[:, choice])
    if modality_T is None:
        return grad_TD.to(grad_ND.dtype), grad_TD.new_empty(0, grad_TD.shape[1])
    one_hot_TM = F.one_hot(modality_T, num_vectors).to(wide)
    return grad_TD.to(grad_ND.dtype), one_hot_TM.t() @ grad_TD


# ------------------------------------------------------------------------------------------------- kernels


@jit
def dispatch_kernel(
    x,
    vector,
    modality,
    token_row,
    row_token,
    out,
    num_tokens,
    num_rows,
    x_stride,
    vector_stride,
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
        x_TD = tl.load(x + token_T[:, None] * x_stride + column_D[None, :], mask=tile_TD)
        if vector is not None:
            modality_T = tl.load(modality + token_T, mask=inside_T, other=0).to(tl.int64)
            vector_TD = tl.load(
                vector + modality_T[:, None] * vector_stride + column_D[None, :], mask=tile_TD
            ).to(tl.float32)
            x_TD = (x_TD.to(tl.float32) + vector_TD).to(x_TD.dtype)
        for choice in tl.static_range(K):
            row_T = row_of(token_row, token_T, inside_T, choice, K)
            kept_TD = (row_T >= 0)[:, None] & inside_D[None, :]
            tl.store(out + row_T[:, None] * D + column_D[None, :], x_TD, mask=kept_TD)
    else:
        zero_padding(out, row_token, program - num_token_blocks, num_rows, D, BLOCK_N)


@jit
def gather_sum_kernel(grad, token_row, out, num_tokens, grad_stride, D: tl.constexpr, K: tl.constexpr,
                      BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    token_T, inside_T, column_D, inside_D, tile_TD = tokens_of(
        tl.program_id(0), num_tokens, D, BLOCK_T, BLOCK_D
    )
    sum_TD = gather_sum(grad, token_row, token_T, inside_T, column_D, inside_D, grad_stride, K)
    tl.store(out + token_T[:, None] * D + column_D[None, :], sum_TD.to(out.dtype.element_ty), mask=tile_TD)


@jit
def gather_sum_vector_kernel(
    grad,
    token_row,
    modality,
    out,
    vector_sums,
    num_tokens,
    grad_stride,
    blocks_each,
    D: tl.constexpr,
    K: tl.constexpr,
    M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """As above; a program takes `blocks_each` blocks of tokens and sums what goes to each vector."""
    program = tl.program_id(0).to(tl.int64)
    vector_M = tl.arange(0, BLOCK_M)
    # Elementwise over the loop; the sum over a block's tokens crosses threads and is taken once, at the end.
    sums_MTD = tl.zeros([BLOCK_M, BLOCK_T, BLOCK_D], tl.float32)
    for step in range(blocks_each):
        block = program * blocks_each + step
        token_T, inside_T, column_D, inside_D, tile_TD = tokens_of(block, num_tokens, D, BLOCK_T, BLOCK_D)
        sum_TD = gather_sum(grad, token_row, token_T, inside_T, column_D, inside_D, grad_stride, K)
        place_TD = token_T[:, None] * D + column_D[None, :]
        tl.store(out + place_TD, sum_TD.to(out.dtype.element_ty), mask=tile_TD)
        modality_T = tl.load(modality + token_T, mask=inside_T, other=-1)
        mine_MT = vector_M[:, None] == modality_T[None, :]
        sums_MTD += tl.where(mine_MT[:, :, None], sum_TD[None, :, :], 0.0)
    sums_MD = tl.sum(sums_MTD, axis=1)
    all_D = tl.arange(0, BLOCK_D)
    place_MD = (program * M + vector_M)[:, None] * D + all_D[None, :]
    tl.store(vector_sums + place_MD, sums_MD, mask=(vector_M < M)[:, None] & (all_D < D)[None, :])


@jit
def gather_sum(grad, token_row, token_T, inside_T, column_D, inside_D, grad_stride, K: tl.constexpr):
    sum_TD = tl.zeros([token_T.shape[0], column_D.shape[0]], tl.float32)
    for choice in tl.static_range(K):
        row_T = row_of(token_row, token_T, inside_T, choice, K)
        kept_TD = (row_T >= 0)[:, None] & inside_D[None, :]
        grad_TD = tl.load(grad + row_T[:, None] * grad_stride + column_D[None, :], mask=kept_TD, other=0.0)
        sum_TD += grad_TD.to(tl.float32)
    return sum_TD


# ------------------------------------------------------------------------------------------------ operator


@torch.library.custom_op("eve_kernels::dispatch", mutates_args=())
def _dispatch(
    x_TD: Tensor,
    row_token_N: Tensor,
    token_row_TK: Tensor,
    vector_MD: Tensor | None,
    modality_T: Tensor | None,
) -> Tensor:
    if not use_triton(x_TD):
        return dispatch_definition(x_TD, row_token_N, token_row_TK, vector_MD, modality_T)
    (num_tokens, width), num_rows = x_TD.shape, row_token_N.shape[0]
    x_TD = rows_of(x_TD)
    vector_MD = None if vector_MD is None else rows_of(vector_MD)
    out_ND = x_TD.new_empty(num_rows, width)
    tile = tile_of(width)
    programs = num_programs(row_token_N, token_row_TK, tile)
    if programs and width:
        dispatch_kernel[(programs,)](
            x_TD,
            vector_MD,
            None if modality_T is None else modality_T.contiguous(),
            token_row_TK.contiguous(),
            row_token_N.contiguous(),
            out_ND,
            num_tokens,
            num_rows,
            x_TD.stride(0),
            0 if vector_MD is None else vector_MD.stride(0),
            D=width,
            K=token_row_TK.shape[1],
            BLOCK_N=PADDING_BLOCK,
            **tile,
            num_warps=warps_of(tile),
        )
    return out_ND


@_dispatch.register_fake
def _(x_TD, row_token_N, token_row_TK, vector_MD, modality_T) -> Tensor:
    return x_TD.new_empty(row_token_N.shape[0], x_TD.shape[1])


@torch.library.custom_op("eve_kernels::dispatch_backward", mutates_args=())
def dispatch_backward(
    grad_ND: Tensor, token_row_TK: Tensor, num_vectors: int, modality_T: Tensor | None
) -> tuple[Tensor, Tensor]:
    if not use_triton(grad_ND):
        return dispatch_backward_definition(grad_ND, token_row_TK, num_vectors, modality_T)
    (num_tokens, num_choices), width = token_row_TK.shape, grad_ND.shape[1]
    grad_ND, token_row_TK = rows_of(grad_ND), token_row_TK.contiguous()
    grad_TD = grad_ND.new_empty(num_tokens, width)
    no_vector_MD = grad_ND.new_zeros(num_vectors, width, dtype=torch.float32)
    if num_tokens == 0 or width == 0:
        return grad_TD, no_vector_MD
    if modality_T is None:
        tile = tile_of(width)
        gather_sum_kernel[(divide_up(num_tokens, tile["BLOCK_T"]),)](
            grad_ND, token_row_TK, grad_TD, num_tokens, grad_ND.stride(0),
            D=width, K=num_choices, **tile, num_warps=warps_of(tile),
        )  # fmt: skip
        return grad_TD, no_vector_MD
    tile = tile_of(width, ELEMENTS // (2 * power_of_2(num_vectors)))
    num_blocks = divide_up(num_tokens, tile["BLOCK_T"])
    blocks_each = divide_up(num_blocks, MAX_PROGRAMS)
    programs = divide_up(num_blocks, blocks_each)
    sums_PMD = grad_ND.new_empty(programs, num_vectors, width, dtype=torch.float32)
    gather_sum_vector_kernel[(programs,)](
        grad_ND, token_row_TK, modality_T.contiguous(), grad_TD, sums_PMD, num_tokens, grad_ND.stride(0),
        blocks_each, D=width, K=num_choices, M=num_vectors, BLOCK_M=power_of_2(num_vectors), **tile,
        num_warps=warps_of(tile),
    )  # fmt: skip
    return grad_TD, sums_PMD.sum(0)


@dispatch_backward.register_fake
def _(grad_ND, token_row_TK, num_vectors, modality_T) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(grad_ND.dtype, torch.float32)
    width = grad_ND.shape[1]
    return grad_ND.new_empty(token_row_TK.shape[0], width), grad_ND.new_empty(num_vectors, width, dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, token_row_TK, vector_MD, modality_T = inputs
    ctx.vector = None if vector_MD is None else (vector_MD.shape[0], vector_MD.dtype)
    ctx.save_for_backward(token_row_TK, modality_T)


def _backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor | None, ...]:
    token_row_TK, modality_T = ctx.saved_tensors
    num_vectors, dtype = ctx.vector or (0, None)
    grad_TD, grad_MD = dispatch_backward(grad_ND, token_row_TK, num_vectors, modality_T)
    return grad_TD, None, None, None if dtype is None else grad_MD.to(dtype), None


_dispatch.register_autograd(_backward, setup_context=_save)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for width in (768, 1024):
        for num_choices in (1, 2):
            shape = {"D": width, "K": num_choices}
            tile, half = tile_of(width), tile_of(width, ELEMENTS // 4)
            name = f"D={width} K={num_choices}"
            index = {"token_row": "*i64", "row_token": "*i64", "out": "*bf16"}
            sizes = {"num_tokens": "i32", "num_rows": "i32", "x_stride": "i32"}
            vector = {"vector": "*bf16", "modality": "*i64"}
            cases += [
                CompileCase(
                    f"dispatch {name}",
                    dispatch_kernel,
                    {"x": "*bf16", **index, **sizes},
                    {"vector": None, "modality": None, "vector_stride": 0, "BLOCK_N": PADDING_BLOCK}
                    | shape
                    | tile,
                    aligned=("x_stride",),
                ),
                CompileCase(
                    f"dispatch + vector {name}",
                    dispatch_kernel,
                    {"x": "*bf16", **vector, **index, **sizes, "vector_stride": "i32"},
                    {"BLOCK_N": PADDING_BLOCK} | shape | tile,
                    aligned=("x_stride", "vector_stride"),
                ),
                CompileCase(
                    f"dispatch backward {name}",
                    gather_sum_kernel,
                    {"grad": "*bf16", "token_row": "*i64", "out": "*bf16"}
                    | {"num_tokens": "i32", "grad_stride": "i32"},
                    shape | tile,
                    aligned=("grad_stride",),
                ),
                CompileCase(
                    f"dispatch + vector backward {name}",
                    gather_sum_vector_kernel,
                    {"grad": "*bf16", "token_row": "*i64", "modality": "*i64", "out": "*bf16"}
                    | {"vector_sums": "*fp32", "num_tokens": "i32", "grad_stride": "i32"}
                    | {"blocks_each": "i32"},
                    {"M": 2, "BLOCK_M": 2} | shape | half,
                    aligned=("grad_stride",),
                ),
            ]
    return cases


COMPILE_CASES = _compile_cases()
