"""Grouped products of MegaBlocks (Gale et al. 2023, arXiv 2211.15841), as one of the ways to multiply.

Of megablocks 0.10.0 the grouped path is alive with our versions: its block-sparse one refuses triton >= 3.2.
Its layer (megablocks/layers/mlp.py, GroupedMLP) is two products and an activation without biases. Ours have
biases, so its products are taken, from where that layer has them (grouped_gemm.backend), and bias, activation
and backward stay ours. The rest of megablocks, and its extension in CUDA, is not needed for that.

    gmm(a_NI, b_EIO, sizes_E)                  rows of expert e times b_e; trans_b: b_EOI
    gmm(a_NI, b_NO, sizes_E, trans_a=True)     a^T b over the rows of each expert, (E, I, O)

bf16 on a CUDA device, all contiguous. `sizes_E` is int64 on the host, which waits for the device to know it,
once in each pass; then it is a loop of cuBLAS calls over the experts.
requirements-megablocks.txt says how to install it.

Shape suffixes: N row, E expert, I input column, O output column.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def grouped_gemm() -> Callable[..., Tensor]:
    """The product. Raises ImportError, in one sentence, where it is not there or does not load."""
    try:
        return importlib.import_module("grouped_gemm.backend").gmm
    except (ImportError, OSError) as error:
        raise ImportError(
            f"grouped_gemm does not load ({' '.join(str(error).split())}); see requirements-megablocks.txt"
        ) from None


def sizes_of(offsets_E: Tensor) -> Tensor:
    """Rows of each expert, on the host."""
    return offsets_E.diff(prepend=offsets_E.new_zeros(1)).long().cpu()


def product(x_NI: Tensor, weight_EIO: Tensor, sizes_E: Tensor) -> Tensor:
    turned_EOI = weight_EIO.transpose(1, 2)
    if turned_EOI.is_contiguous():
        return grouped_gemm()(x_NI.contiguous(), turned_EOI, sizes_E, trans_b=True)
    return grouped_gemm()(x_NI.contiguous(), weight_EIO.contiguous(), sizes_E)


def weight_gradient(x_NI: Tensor, grad_NO: Tensor, sizes_E: Tensor) -> Tensor:
    """Zero where an expert has no row: what a product over no row leaves there is not said."""
    out_EIO = grouped_gemm()(x_NI.contiguous(), grad_NO.contiguous(), sizes_E, trans_a=True)
    for expert in torch.where(sizes_E == 0)[0].tolist():
        out_EIO[expert] = 0
    return out_EIO
