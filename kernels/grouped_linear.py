"""Products of rows with the weights of their expert, y_n = activation(x_n W_e + b_e).

Rows lie expert after expert; `offsets_E` (int32, on the device) holds the end of each. Of several experts,
rows past the last offset are neither read nor written. The host reads nothing: the grid is as large as the
offsets can make it, N / BLOCK_N + E tiles of rows, each of one expert, which a program finds by a running sum
over the experts; tiles that do not exist end at once.

    grouped_product           tiles of rows x columns, fp32 sums; bias and activation before they are stored.
                              Columns vary fastest: programs of one time share an expert's weights
    grouped_weight_gradient   a program sums a tile of x^T dy over all rows of its expert, in their order

One expert is no grouped product: cuBLAS multiplies, whatever `products` says, and the host waits for nothing.
Rows past its end are multiplied, too.

Of several, `products` says what multiplies: "triton", or torch's "grouped_mm" and then one pass for bias and
activation, or the products of "megablocks" and then that pass (kernels/megablocks_products.py). `multiplier`
has the rule of "auto".

At N = 65,536 rows, 768 -> 3,072, bf16, the product is 0.31 TFLOP, 0.44 ms at 700 TFLOP/s. Bias and activation
in its epilogue write z and the activation, 805 MB, under the product; after grouped_mm one pass
reads 403 MB more, 0.25 ms of an H200's 4.8 TB/s. As operations of PyTorch (a gather of biases, a sum, an
activation) they move 2.4 GB, 0.5 ms. None of these times is measured yet.

Shape suffixes: N row, E expert, I input column, O output column.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import megablocks_products
from kernels.backend import (
    CompileCase,
    check_interpreter,
    divide_up,
    jit,
    power_of_2,
    rows_of,
    tl,
    use_triton,
)
from kernels.row_tiles import rows_or_zero

ACTIVATIONS = {"none": 0, "gelu": 1, "quick_gelu": 2}

# ---------------------------------------------------------------------------------------------- definition


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "gelu":
        return F.gelu(z)
    return F.silu(1.702 * z).div_(1.702) if activation == "quick_gelu" else z


# ------------------------------------------------------------------------------------------------- kernels


@jit
def rows_of_tile(offsets, tile, num_experts, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, first row, end of the expert's rows, whether there is such a tile)."""
    e = tl.arange(0, BLOCK_E)
    end = tl.load(offsets + e, mask=e < num_experts, other=0)
    begin = tl.load(offsets + e - 1, mask=(e > 0) & (e < num_experts), other=0)
    tiles = tl.where(e < num_experts, (end - begin + BLOCK_N - 1) // BLOCK_N, 0)
    last = tl.cumsum(tiles, 0)
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, begin, 0), 0).to(tl.int64)
    first += (tile - tl.sum(tl.where(mine, last - tiles, 0), 0)).to(tl.int64) * BLOCK_N
    return expert.to(tl.int64), first, tl.sum(tl.where(mine, end, 0), 0), tile < tl.sum(tiles, 0)


@jit
def activated(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == 1:
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    if ACTIVATION == 2:
        z = z * tl.sigmoid(1.702 * z)
    return z


@jit
def finish(total, bias, z, out, bias_row, at, in_row, column, num_outputs, ACTIVATION: tl.constexpr):
    """Bias and activation of a tile of sums, and the store."""
    kind = out.dtype.element_ty
    in_column = column < num_outputs
    mask = in_row[:, None] & in_column[None, :]
    if bias is not None:
        total += tl.load(bias + bias_row + column, mask=in_column, other=0.0).to(tl.float32)[None, :]
    rounded = total.to(kind)
    if z is not None:
        tl.store(z + at + column[None, :], rounded, mask=mask)
    if ACTIVATION:
        # Of the rounded sum: the backward, which has only that, finds the same activation again.
        rounded = activated(rounded.to(tl.float32), ACTIVATION).to(kind)
    tl.store(out + at + column[None, :], rounded, mask=mask)


@jit
def product_kernel(
    x, index, weight, bias, offsets, z, out, num_experts, num_inputs, num_outputs,
    x_stride, weight_e, weight_i, weight_o,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_E: tl.constexpr, EVEN_I: tl.constexpr,
):  # fmt: skip
    column_tiles = tl.cdiv(num_outputs, BLOCK_O)
    tile = tl.program_id(0) // column_tiles
    expert, first, end, exists = rows_of_tile(offsets, tile, num_experts, BLOCK_N, BLOCK_E)
    if not exists:
        return
    row = first + tl.arange(0, BLOCK_N)
    first_column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_O
    column = first_column + tl.arange(0, BLOCK_O)
    i = tl.arange(0, BLOCK_I).to(tl.int64)
    source, in_row = row, (row < end)[:, None]
    if index is not None:
        source = tl.load(index + row, mask=row < end, other=-1)
        in_row = (source >= 0)[:, None]
    x_tile = x + source[:, None] * x_stride + i[None, :]
    weight_tile = weight + expert * weight_e + i[:, None] * weight_i + column[None, :] * weight_o
    in_column = (column < num_outputs)[None, :]
    step = tl.full((), BLOCK_I, tl.int64) * weight_i
    total = tl.zeros((BLOCK_N, BLOCK_O), tl.float32)
    for begin in range(0, num_inputs, BLOCK_I):
        if EVEN_I:
            a = tl.load(x_tile, mask=in_row, other=0.0)
            b = tl.load(weight_tile, mask=in_column, other=0.0)
        else:
            inside = i < num_inputs - begin
            a = tl.load(x_tile, mask=in_row & inside[None, :], other=0.0)
            b = tl.load(weight_tile, mask=in_column & inside[:, None], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        x_tile += BLOCK_I
        weight_tile += step
    # In halves: of a whole tile, sums, rounded sums and activation do not fit in the registers.
    halves = tl.permute(tl.reshape(total, (BLOCK_N, 2, BLOCK_O // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    half = first_column + tl.arange(0, BLOCK_O // 2)
    bias_row, at = expert * num_outputs, row[:, None] * num_outputs
    finish(left, bias, z, out, bias_row, at, row < end, half, num_outputs, ACTIVATION)
    finish(right, bias, z, out, bias_row, at, row < end, half + BLOCK_O // 2, num_outputs, ACTIVATION)


@jit
def epilogue_kernel(
    product, bias, offsets, z, out, num_experts, width,
    ACTIVATION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """For products of grouped_mm; z or out may be the product."""
    expert, first, end, exists = rows_of_tile(offsets, tl.program_id(0), num_experts, BLOCK_N, BLOCK_E)
    if not exists:
        return
    row = first + tl.arange(0, BLOCK_N)
    column = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    at = row[:, None] * width
    mask = (row < end)[:, None] & (column < width)[None, :]
    total = tl.load(product + at + column[None, :], mask=mask, other=0.0).to(tl.float32)
    finish(total, bias, z, out, expert * width, at, row < end, column, width, ACTIVATION)


@jit
def weight_gradient_kernel(
    x, index, grad, offsets, out, num_inputs, num_outputs, x_stride, grad_stride,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1).to(tl.int64)
    column_tiles = tl.cdiv(num_outputs, BLOCK_O)
    i = (tl.program_id(0) // column_tiles).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    column = (tl.program_id(0) % column_tiles).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    first = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    in_i, in_column = (i < num_inputs)[:, None], (column < num_outputs)[None, :]
    total = tl.zeros((BLOCK_I, BLOCK_O), tl.float32)
    for begin in range(first, end, BLOCK_N):
        row = begin + tl.arange(0, BLOCK_N).to(tl.int64)
        in_row = row < end
        source, in_source = row, in_row
        if index is not None:
            source = tl.load(index + row, mask=in_row, other=-1)
            in_source = source >= 0
        a = tl.load(x + source[None, :] * x_stride + i[:, None], mask=in_source[None, :] & in_i, other=0.0)
        b = tl.load(
            grad + row[:, None] * grad_stride + column[None, :], mask=in_row[:, None] & in_column, other=0.0
        )
        total = tl.dot(a, b, total, input_precision="ieee")
    at = (expert * num_inputs + i[:, None]) * num_outputs + column[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=in_i & in_column)


# ------------------------------------------------------------------------------------------------ launches


SMALL_TILE = {"BLOCK_N": 64, "BLOCK_I": 32, "BLOCK_O": 64, "num_warps": 4, "num_stages": 2}


def tile_of(x: Tensor, *widths: int, activation: str = "none") -> dict[str, int]:
    """Of both products: 128 fp32 sums a thread; half of that where an activation needs registers. The small
    tile for fp32, and for widths that allow no 16-byte accesses: addresses take the registers then."""
    if x.element_size() > 2 or any(width % 16 for width in widths):
        return SMALL_TILE
    columns = 256 if activation == "none" else 128
    return {"BLOCK_N": 128, "BLOCK_I": 64, "BLOCK_O": columns, "num_warps": 8, "num_stages": 3}


EPILOGUE_TILE = {"BLOCK_N": 16, "BLOCK_O": 256}


PRODUCTS = ("auto", "grouped_mm", "triton", "megablocks")


def check_names(activation: str, products: str, activations: Iterable[str] = ACTIVATIONS) -> None:
    if activation not in activations:
        raise ValueError(f"activation is {activation!r}; choose {', '.join(activations)}.")
    if products not in PRODUCTS:
        raise ValueError(f"products is {products!r}; choose {', '.join(PRODUCTS)}.")


def multiplier(products: str, *widths: int, of: Tensor) -> str:
    """What multiplies rows like `of` with matrices of such widths: "grouped_mm", "triton" or "megablocks".

    auto is grouped_mm where torch has a kernel for it: bf16, rows of whole 16 bytes, compute capability 9 or
    10. Elsewhere torch copies the offsets to the host and loops over the experts; there auto is triton. On an
    H100 the kernel of torch is CUTLASS's, with the copy engine of that chip, which the one here does not use.
    By that reasoning and not by measurement, which waits for a GPU.
    """
    if products in ("triton", "megablocks"):
        return products
    fits = all(width * of.element_size() % 16 == 0 for width in widths)
    if of.is_cuda:
        fits = fits and of.dtype == torch.bfloat16
        if products == "auto":
            fits = fits and torch.cuda.get_device_capability(of.device)[0] in (9, 10)
    return "grouped_mm" if fits else "triton"


def ranges(offsets_E: Tensor) -> list[slice]:
    """Of the rows of each expert; on a CPU."""
    ends = offsets_E.tolist()
    return [slice(begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def grouped_product(
    x_NI: Tensor,
    weight_EIO: Tensor,
    offsets_E: Tensor,
    bias_EO: Tensor | None = None,
    activation: str = "none",
    keep: bool = False,
    products: str = "auto",
    sizes_E: Tensor | None = None,
    index_N: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(activation(z), and z if it is to be kept) with z = x W + b; any strides of the weights.

    `sizes_E`: rows of each expert on the host, for megablocks. `index_N`: int64, row n is x_NI[index_N[n]],
    or zero for -1; the kernel here reads it there, the others are given a copy.
    """
    check_names(activation, products)
    num_experts, num_inputs, num_outputs = weight_EIO.shape
    chosen = "one" if num_experts == 1 else multiplier(products, num_inputs, num_outputs, of=x_NI)
    if index_N is not None and not (chosen == "triton" and use_triton(x_NI)):
        x_NI, index_N = rows_or_zero(x_NI, index_N), None
    num_rows = (x_NI if index_N is None else index_N).shape[0]
    if not use_triton(x_NI):
        z_NO = x_NI.new_zeros(x_NI.shape[0], num_outputs)
        for e, rows in enumerate(ranges(offsets_E)):
            if bias_EO is None:
                torch.mm(x_NI[rows], weight_EIO[e], out=z_NO[rows])
            else:
                torch.addmm(bias_EO[e], x_NI[rows], weight_EIO[e], out=z_NO[rows])
        return activate(z_NO, activation), z_NO if keep else None
    x_NI = rows_of(x_NI)
    bias_EO = None if bias_EO is None else bias_EO.contiguous()
    block_e, kind = power_of_2(num_experts), ACTIVATIONS[activation]
    if not num_rows:
        return x_NI.new_empty(0, num_outputs), x_NI.new_empty(0, num_outputs) if keep else None
    if chosen != "triton":
        if chosen == "one":
            z_NO = F.linear(x_NI, weight_EIO[0].t(), None if bias_EO is None else bias_EO[0])
            bias_EO = None  # added
        elif chosen == "megablocks":
            z_NO = megablocks_products.product(x_NI, weight_EIO, _on_host(offsets_E, sizes_E))
        else:
            z_NO = F.grouped_mm(x_NI, weight_EIO, offs=offsets_E)
        if bias_EO is None and not kind:
            return z_NO, z_NO if keep else None
        out_NO = torch.empty_like(z_NO) if keep else z_NO
        row_tiles = divide_up(num_rows, EPILOGUE_TILE["BLOCK_N"]) + num_experts
        epilogue_kernel[(row_tiles, divide_up(num_outputs, EPILOGUE_TILE["BLOCK_O"]))](
            z_NO, bias_EO, offsets_E, z_NO if keep and bias_EO is not None else None, out_NO, num_experts,
            num_outputs, ACTIVATION=kind, BLOCK_E=block_e, **EPILOGUE_TILE,
        )  # fmt: skip
        return out_NO, z_NO if keep else None
    check_interpreter(x_NI)
    out_NO = x_NI.new_empty(num_rows, num_outputs)
    z_NO = torch.empty_like(out_NO) if keep else None
    tile = tile_of(x_NI, num_inputs, num_outputs, activation=activation)
    row_tiles = divide_up(num_rows, tile["BLOCK_N"]) + num_experts
    product_kernel[(row_tiles * divide_up(num_outputs, tile["BLOCK_O"]),)](
        x_NI, index_N, weight_EIO, bias_EO, offsets_E, z_NO, out_NO,
        num_experts, num_inputs, num_outputs, x_NI.stride(0), *weight_EIO.stride(),
        ACTIVATION=kind, BLOCK_E=block_e, EVEN_I=num_inputs % tile["BLOCK_I"] == 0, **tile,
    )  # fmt: skip
    return out_NO, z_NO


def _on_host(offsets_E: Tensor, sizes_E: Tensor | None) -> Tensor:
    return megablocks_products.sizes_of(offsets_E) if sizes_E is None else sizes_E


def grouped_weight_gradient(
    x_NI: Tensor,
    grad_NO: Tensor,
    offsets_E: Tensor,
    products: str = "auto",
    sizes_E: Tensor | None = None,
    index_N: Tensor | None = None,
    all_rows: bool = False,
) -> Tensor:
    """(E, I, O): x^T grad over the rows of each expert; zero where it has none. `index_N` as above.

    `all_rows`: the host knows that every row has an expert, which spares one expert a pass over both."""
    check_names("none", products)
    num_experts, num_inputs, num_outputs = offsets_E.shape[0], x_NI.shape[1], grad_NO.shape[1]
    chosen = "one" if num_experts == 1 else multiplier(products, num_inputs, num_outputs, of=x_NI)
    if index_N is not None and not (chosen == "triton" and use_triton(x_NI)):
        x_NI, index_N = rows_or_zero(x_NI, index_N), None
    if not use_triton(x_NI):
        return torch.stack([x_NI[rows].t() @ grad_NO[rows] for rows in ranges(offsets_E)])
    if chosen == "one":
        if not all_rows:  # those of nobody may hold NaN, on either side
            nobody_N1 = torch.arange(grad_NO.shape[0], device=x_NI.device)[:, None] >= offsets_E
            x_NI, grad_NO = x_NI.masked_fill(nobody_N1, 0), grad_NO.masked_fill(nobody_N1, 0)
        return (x_NI.t() @ grad_NO)[None]
    x_NI, grad_NO = rows_of(x_NI), rows_of(grad_NO)
    if x_NI.shape[0] and chosen == "megablocks":
        return megablocks_products.weight_gradient(x_NI, grad_NO, _on_host(offsets_E, sizes_E))
    if x_NI.shape[0] and chosen == "grouped_mm":
        return F.grouped_mm(x_NI.t(), grad_NO, offs=offsets_E)
    check_interpreter(x_NI)
    out_EIO = x_NI.new_empty(num_experts, num_inputs, num_outputs)
    tile = tile_of(x_NI, num_inputs, num_outputs)
    tile = {**tile, "BLOCK_N": tile["BLOCK_I"], "BLOCK_I": tile["BLOCK_N"]}
    tiles = divide_up(num_inputs, tile["BLOCK_I"]) * divide_up(num_outputs, tile["BLOCK_O"])
    weight_gradient_kernel[(tiles, num_experts)](
        x_NI, index_N, grad_NO, offsets_E, out_EIO, num_inputs, num_outputs,
        x_NI.stride(0), grad_NO.stride(0), **tile,
    )  # fmt: skip
    return out_EIO


_PRODUCT = {
    "x": "*bf16", "weight": "*bf16", "bias": "*bf16", "offsets": "*i32", "z": "*bf16", "out": "*bf16",
    "num_experts": "i32", "num_inputs": "i32", "num_outputs": "i32", "x_stride": "i32", "weight_e": "i32",
}  # fmt: skip
_WEIGHT_GRADIENT = {
    "x": "*bf16", "grad": "*bf16", "offsets": "*i32", "out": "*bf16", "num_inputs": "i32",
    "num_outputs": "i32", "x_stride": "i32", "grad_stride": "i32",
}  # fmt: skip
_BF16 = {"BLOCK_N": 128, "BLOCK_I": 64}
COMPILE_CASES = [
    CompileCase(
        name="grouped_linear, gelu, z kept",
        kernel=product_kernel,
        types={**_PRODUCT, "weight_i": "i32"},
        constants={
            "index": None, "weight_o": 1, "ACTIVATION": 1, "BLOCK_E": 32, "EVEN_I": True, "BLOCK_O": 128,
            **_BF16,
        },
        num_warps=8,
        aligned=("num_inputs", "num_outputs", "x_stride", "weight_e", "weight_i"),
    ),
    CompileCase(
        name="grouped_linear, gelu, z kept, rows by index",
        kernel=product_kernel,
        types={**_PRODUCT, "index": "*i64", "weight_i": "i32"},
        constants={"weight_o": 1, "ACTIVATION": 1, "BLOCK_E": 32, "EVEN_I": True, "BLOCK_O": 128, **_BF16},
        num_warps=8,
        aligned=("num_inputs", "num_outputs", "x_stride", "weight_e", "weight_i"),
    ),
    CompileCase(
        name="grouped_linear, gradient of W, rows by index",
        kernel=weight_gradient_kernel,
        types={**_WEIGHT_GRADIENT, "index": "*i64"},
        constants={"BLOCK_N": 64, "BLOCK_I": 128, "BLOCK_O": 256},
        num_warps=8,
        aligned=("num_inputs", "num_outputs", "x_stride", "grad_stride"),
    ),
    CompileCase(
        name="grouped_linear, bias alone",
        kernel=product_kernel,
        types={**{n: t for n, t in _PRODUCT.items() if n != "z"}, "weight_i": "i32"},
        constants={
            "index": None, "z": None, "weight_o": 1, "ACTIVATION": 0, "BLOCK_E": 32, "EVEN_I": True,
            "BLOCK_O": 256, **_BF16,
        },
        num_warps=8,
        aligned=("num_inputs", "num_outputs", "x_stride", "weight_e", "weight_i"),
    ),
    CompileCase(
        name="grouped_linear, gradient of x",
        kernel=product_kernel,
        types={**{n: t for n, t in _PRODUCT.items() if n not in ("bias", "z")}, "weight_o": "i32"},
        constants={
            "index": None, "bias": None, "z": None, "weight_i": 1, "ACTIVATION": 0, "BLOCK_E": 32,
            "EVEN_I": True, "BLOCK_O": 256, **_BF16,
        },
        num_warps=8,
        aligned=("num_inputs", "num_outputs", "x_stride", "weight_e", "weight_o"),
    ),
    CompileCase(
        name="grouped_linear, odd widths",
        kernel=product_kernel,
        types={**_PRODUCT, "weight_i": "i32"},
        constants={
            "index": None, "weight_o": 1, "ACTIVATION": 1, "BLOCK_E": 32, "EVEN_I": False,
            "BLOCK_N": 64, "BLOCK_I": 32, "BLOCK_O": 64,
        },
        num_stages=2,
    ),
    CompileCase(
        name="grouped_linear, after grouped_mm",
        kernel=epilogue_kernel,
        types={
            "product": "*bf16", "bias": "*bf16", "offsets": "*i32", "z": "*bf16", "out": "*bf16",
            "num_experts": "i32", "width": "i32",
        },
        constants={"ACTIVATION": 1, "BLOCK_E": 32, **EPILOGUE_TILE},
        aligned=("width",),
    ),
    CompileCase(
        name="grouped_linear, after the product of one expert",
        kernel=epilogue_kernel,
        types={
            "product": "*bf16", "offsets": "*i32", "out": "*bf16", "num_experts": "i32", "width": "i32",
        },
        constants={"bias": None, "z": None, "ACTIVATION": 1, "BLOCK_E": 1, **EPILOGUE_TILE},
        aligned=("width",),
    ),
    CompileCase(
        name="grouped_linear, gradient of W",
        kernel=weight_gradient_kernel,
        types=_WEIGHT_GRADIENT,
        constants={"index": None, "BLOCK_N": 64, "BLOCK_I": 128, "BLOCK_O": 256},
        num_warps=8,
        aligned=("num_inputs", "num_outputs", "x_stride", "grad_stride"),
    ),
]  # fmt: skip
