"""What dispatch and combine share: tiles of whole tokens, the rows of their choices, and rows of padding.

A program owns whole tokens and all columns: `tile_of` says how many. Where rows are padded, more programs
follow those of the tokens, each of which looks through PADDING_BLOCK rows and writes 0 to those of padding.

Shape suffixes: T token, K choice, N row, D width.
"""

from __future__ import annotations

from torch import Tensor

from kernels.backend import divide_up, jit, power_of_2, tl

PADDING_BLOCK = 64  # rows that one program looks through for padding
ELEMENTS = 4096  # of a program's tile: 32 for each of its 128 threads, four 16-byte accesses in bf16


def tile_of(width: int, elements: int = ELEMENTS) -> dict[str, int]:
    """A program's tile: whole rows, as many as make `elements`."""
    block_d = power_of_2(width)
    return {"BLOCK_T": max(1, elements // block_d), "BLOCK_D": block_d}


def warps_of(tile: dict[str, int]) -> int:
    """32 elements a thread, 4 to 16 warps."""
    return min(max(tile["BLOCK_T"] * tile["BLOCK_D"] // 1024, 4), 16)


def is_padded(row_token_N: Tensor, token_row_TK: Tensor) -> bool:
    return row_token_N.shape[0] != token_row_TK.numel()


def num_programs(row_token_N: Tensor, token_row_TK: Tensor, tile: dict[str, int]) -> int:
    """Of the tokens, and of the rows that may be padding."""
    programs = divide_up(token_row_TK.shape[0], tile["BLOCK_T"])
    if is_padded(row_token_N, token_row_TK):
        programs += divide_up(row_token_N.shape[0], PADDING_BLOCK)
    return programs


def rows_or_zero(y_ND: Tensor, row_T: Tensor) -> Tensor:
    """The rows of that index; zero for -1. No product with a mask: an undefined row may hold NaN."""
    if y_ND.shape[0] == 0:
        return y_ND.new_zeros(row_T.shape[0], y_ND.shape[1])
    return y_ND.index_select(0, row_T.clamp_min(0)).masked_fill_((row_T < 0)[:, None], 0)


@jit
def tokens_of(block, num_tokens, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """(token_T, whether there is such a token, column_D, whether there is such a column, both as a tile)."""
    # int64 before any product: an offset may pass 2^31 elements.
    token_T = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    column_D = tl.arange(0, BLOCK_D)
    inside_T, inside_D = token_T < num_tokens, column_D < D
    return token_T, inside_T, column_D, inside_D, inside_T[:, None] & inside_D[None, :]


@jit
def row_of(token_row, token_T, inside_T, choice, K: tl.constexpr):
    """int64, -1 where the choice was dropped or the token does not exist."""
    return tl.load(token_row + token_T * K + choice, mask=inside_T, other=-1).to(tl.int64)


@jit
def zero_padding(rows, row_token, block, num_rows, D: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes 0 to those of BLOCK_N rows that are padding."""
    row_N = block * BLOCK_N + tl.arange(0, BLOCK_N)
    padding_N = tl.load(row_token + row_N, mask=row_N < num_rows, other=0) < 0
    if tl.max(padding_N.to(tl.int32)) > 0:
        for begin in range(0, D, 64):
            column_D = begin + tl.arange(0, 64)
            mask_ND = padding_N[:, None] & (column_D < D)[None, :]
            zero_ND = tl.zeros([BLOCK_N, 64], rows.dtype.element_ty)
            tl.store(rows + row_N[:, None] * D + column_D[None, :], zero_ND, mask=mask_ND)
