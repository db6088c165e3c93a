"""Grouped products against a loop over rows in fp64, on every path and with both ways of multiplying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.backend import INTERPRETED
from kernels.grouped_linear import (
    PRODUCTS,
    SMALL_TILE,
    grouped_product,
    grouped_weight_gradient,
    multiplier,
    product_kernel,
    tile_of,
)

# Rows, input and output columns, ends of the experts' rows.
CASES = {
    "one row": (1, 4, 8, [1]),
    "no row": (0, 4, 8, [0, 0]),
    "one expert": (40, 16, 24, [33]),
    "odd sizes": (37, 13, 71, [5, 5, 30, 37]),
    "more than a tile": (150, 40, 68, [0, 70, 135]),  # the last 15 rows belong to nobody
    "all rows to the last": (70, 36, 8, [0, 0, 0, 70]),
    "64 experts": (100, 8, 12, [min(100, 2 * e) for e in range(64)]),
}
BOTH = pytest.mark.parametrize("products", ["triton", "grouped_mm"])
EACH = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def drawn(case, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, inputs, outputs, ends = case
    generator = torch.Generator().manual_seed(rows)
    x_NI = torch.randn(rows, inputs, generator=generator)
    weight_EIO = torch.randn(len(ends), inputs, outputs, generator=generator) * inputs**-0.5
    bias_EO = torch.randn(len(ends), outputs, generator=generator)
    offsets_E = torch.tensor(ends, dtype=torch.int32)
    return *(t.to(device, dtype) for t in (x_NI, weight_EIO, bias_EO)), offsets_E.to(device)  # pyright: ignore


def half(products: str) -> torch.dtype:
    """Triton's interpreter multiplies the bits of bf16 as integers."""
    return torch.float16 if INTERPRETED and products == "triton" else torch.bfloat16


def expert_of(row: int, ends: list[int]) -> int:
    return next(e for e, end in enumerate(ends) if row < end)


def oracle(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, ends: list[int], activation: str) -> Tensor:
    """Of the rows that have an expert, row by row."""
    x_NI, weight_EIO, bias_EO = (t.double().cpu() for t in (x_NI, weight_EIO, bias_EO))
    out_NO = torch.zeros(ends[-1], weight_EIO.shape[2], dtype=torch.float64)
    for n in range(ends[-1]):
        e = expert_of(n, ends)
        z = x_NI[n] @ weight_EIO[e] + bias_EO[e]
        if activation == "gelu":
            z = z * torch.distributions.Normal(0.0, 1.0).cdf(z)
        if activation == "quick_gelu":
            z = z / (1 + (-1.702 * z).exp())
        out_NO[n] = z
    return out_NO


@BOTH
@EACH
@pytest.mark.parametrize("activation", ["none", "gelu", "quick_gelu"])
def test_product_bias_and_activation(path: str, case, products: str, activation: str):
    *tensors, offsets_E = drawn(case, path)
    x_NI, weight_EIO, bias_EO = tensors
    found, z_NO = grouped_product(x_NI, weight_EIO, offsets_E, bias_EO, activation, True, products)
    alone, nothing = grouped_product(x_NI, weight_EIO, offsets_E, bias_EO, activation, False, products)
    ends, last = case[3], case[3][-1]
    assert nothing is None
    assert torch.equal(alone[:last], found[:last])
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    exact = oracle(*tensors, ends, activation)
    torch.testing.assert_close(found[:last].double().cpu(), exact, **tolerance)
    exact = oracle(*tensors, ends, "none")
    torch.testing.assert_close(z_NO[:last].double().cpu(), exact, **tolerance)  # pyright: ignore


@BOTH
@EACH
def test_product_with_turned_weights_and_without_bias(path: str, case, products: str):
    x_NI, weight_EIO, _, offsets_E = drawn(case, path)
    turned = weight_EIO.transpose(1, 2).contiguous().transpose(1, 2)
    found, _ = grouped_product(x_NI, turned, offsets_E, products=products)
    last = case[3][-1]
    exact = oracle(x_NI, weight_EIO, torch.zeros(len(case[3]), case[2]), case[3], "none")
    torch.testing.assert_close(found[:last].double().cpu(), exact, rtol=1e-5, atol=1e-5)


@BOTH
@EACH
def test_weight_gradient_is_of_the_rows_of_its_expert(path: str, case, products: str):
    """And zero where there are none; rows of nobody are full of NaN."""
    x_NI, _, _, offsets_E = drawn(case, path)
    ends = case[3]
    grad_NO = torch.randn(case[0], case[2], generator=torch.Generator().manual_seed(1)).to(path)
    x_NI[ends[-1] :] = torch.nan
    grad_NO[ends[-1] :] = torch.nan
    exact_EIO = torch.zeros(len(ends), case[1], case[2], dtype=torch.float64)
    for n in range(ends[-1]):
        exact_EIO[expert_of(n, ends)] += torch.outer(x_NI[n].double().cpu(), grad_NO[n].double().cpu())
    found_EIO = grouped_weight_gradient(x_NI, grad_NO, offsets_E, products)
    torch.testing.assert_close(found_EIO.double().cpu(), exact_EIO, rtol=1e-5, atol=1e-5)


@BOTH
def test_16_bits_within_rounding(path: str, products: str):
    case = (150, 72, 264, [0, 70, 70, 140])
    *tensors, offsets_E = drawn(case, path, half(products))
    found, _ = grouped_product(tensors[0], tensors[1], offsets_E, tensors[2], "gelu", True, products)
    exact = oracle(*tensors, case[3], "gelu")
    torch.testing.assert_close(found[:140].double().cpu(), exact, rtol=2**-6, atol=2**-6)


@BOTH
def test_rows_that_are_not_contiguous(path: str, products: str):
    case = CASES["more than a tile"]
    x_NI, weight_EIO, bias_EO, offsets_E = drawn(case, path)
    wide = torch.randn(150, 64, device=path)
    wide[:, 8:48] = x_NI
    for strided in (wide[:, 8:48], x_NI.t().contiguous().t()):
        found, _ = grouped_product(strided, weight_EIO, offsets_E, bias_EO, products=products)
        exact = oracle(x_NI, weight_EIO, bias_EO, case[3], "none")
        torch.testing.assert_close(found[:135].double().cpu(), exact, rtol=1e-5, atol=1e-5)


@BOTH
@EACH
def test_rows_by_index(path: str, case, products: str):
    """Of 40 tokens, as dispatch would lay them; -1 is a row of zeros, and rows of nobody name any token."""
    _, weight_EIO, bias_EO, offsets_E = drawn(case, path)
    generator = torch.Generator().manual_seed(4)
    x_TI = torch.randn(40, case[1], generator=generator)
    index_N = torch.randint(-1, 40, (case[0],), generator=generator)
    rows_NI = torch.zeros(case[0], case[1])
    for n, token in enumerate(index_N.tolist()):
        if token >= 0:
            rows_NI[n] = x_TI[token]
    how: dict[str, Any] = {"products": products, "index_N": index_N.to(path)}
    ends, last = case[3], case[3][-1]
    found, _ = grouped_product(x_TI.to(path), weight_EIO, offsets_E, bias_EO, "gelu", **how)
    exact = oracle(rows_NI, weight_EIO, bias_EO, ends, "gelu")
    torch.testing.assert_close(found[:last].double().cpu(), exact, rtol=1e-5, atol=1e-5)
    grad_NO = torch.randn(case[0], case[2], generator=generator)
    exact_EIO = torch.zeros(len(ends), case[1], case[2], dtype=torch.float64)
    for n in range(last):
        exact_EIO[expert_of(n, ends)] += torch.outer(rows_NI[n].double(), grad_NO[n].double())
    found_EIO = grouped_weight_gradient(x_TI.to(path), grad_NO.to(path), offsets_E, **how)
    torch.testing.assert_close(found_EIO.double().cpu(), exact_EIO, rtol=1e-5, atol=1e-5)


def test_rows_past_2_to_the_31_elements(path: str):
    """Three that far apart, in memory that is reserved and never touched."""
    stride, dtype = 2**30 + 64, half("triton")
    x_NI = torch.empty(2 * stride + 8, dtype=dtype, device=path).as_strided((3, 8), (stride, 1))
    x_NI.copy_(torch.arange(24, device=path).view(3, 8))
    one = torch.eye(8, device=path, dtype=dtype)
    offsets_E = torch.tensor([1, 3], dtype=torch.int32, device=path)
    found, _ = grouped_product(x_NI, torch.stack([one, 2 * one]), offsets_E, products="triton")
    exact = torch.arange(24).view(3, 8) * torch.tensor([[1], [2], [2]])
    assert torch.equal(found.long().cpu(), exact)


def test_rows_of_nobody_are_not_written(path: str):
    if not INTERPRETED and path == "cpu":
        pytest.skip("of the kernels alone")
    x_NI, weight_EIO, bias_EO, offsets_E = drawn((40, 16, 20, [7, 7, 33]), path)
    out_NO, z_NO = torch.full((2, 40, 20), 5.0, device=path)
    tile = {**SMALL_TILE, "BLOCK_E": 4, "ACTIVATION": 1}
    product_kernel[(5,)](
        x_NI, None, weight_EIO, bias_EO, offsets_E, z_NO, out_NO, 3, 16, 20, 16, *weight_EIO.stride(),
        EVEN_I=False, **tile,
    )  # fmt: skip
    assert (out_NO[33:] == 5).all()
    assert (z_NO[33:] == 5).all()
    assert not (out_NO[:33] == 5).any()


@pytest.mark.parametrize("case", ["one row", "odd sizes"])
def test_unknown_names_are_named(path: str, case: str):
    x_NI, weight_EIO, _, offsets_E = drawn(CASES[case], path)
    with pytest.raises(ValueError, match="'grouped_mn'; choose auto, grouped_mm"):
        grouped_product(x_NI, weight_EIO, offsets_E, products="grouped_mn")
    with pytest.raises(ValueError, match="'relu'; choose none, gelu"):
        grouped_product(x_NI, weight_EIO, offsets_E, activation="relu")
    with pytest.raises(ValueError, match="'grouped_mn'"):
        grouped_weight_gradient(x_NI, x_NI, offsets_E, "grouped_mn")


@BOTH
def test_kept_without_bias_and_activation(path: str, products: str):
    case = CASES["odd sizes"]
    x_NI, weight_EIO, _, offsets_E = drawn(case, path)
    found, z_NO = grouped_product(x_NI, weight_EIO, offsets_E, keep=True, products=products)
    exact = oracle(x_NI, weight_EIO, torch.zeros(len(case[3]), case[2]), case[3], "none")
    for each in (found, z_NO):
        torch.testing.assert_close(each.double().cpu(), exact, rtol=1e-5, atol=1e-5)  # pyright: ignore


@pytest.mark.parametrize("products", PRODUCTS)
def test_one_expert_is_a_plain_product(path: str, products: str):
    """In bf16, which the interpreter cannot multiply, and without megablocks."""
    case = (33, 16, 24, [33])
    x_NI, weight_EIO, bias_EO, offsets_E = drawn(case, path, torch.bfloat16)
    found, z_NO = grouped_product(x_NI, weight_EIO, offsets_E, bias_EO, "gelu", True, products)
    tolerance = {"rtol": 2**-6, "atol": 2**-6}
    for each, activation in ((found, "gelu"), (z_NO, "none")):
        exact = oracle(x_NI, weight_EIO, bias_EO, case[3], activation)
        torch.testing.assert_close(each.double().cpu(), exact, **tolerance)  # pyright: ignore
    for all_rows in (False, True):
        found = grouped_weight_gradient(x_NI, z_NO, offsets_E, products, all_rows=all_rows)  # pyright: ignore
        exact = x_NI.double().t() @ z_NO.double()  # pyright: ignore
        torch.testing.assert_close(found[0].double(), exact, rtol=2**-6, atol=2**-4)


def test_the_interpreter_refuses_bf16(path: str):
    if not INTERPRETED:
        pytest.skip("of the interpreter alone")
    x_NI, weight_EIO, _, offsets_E = drawn(CASES["odd sizes"], path, torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bf16"):
        grouped_product(x_NI, weight_EIO, offsets_E, products="triton")
    with pytest.raises(NotImplementedError, match="bf16"):
        grouped_weight_gradient(x_NI, x_NI, offsets_E, products="triton")


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 256), (256, 64), (80, 272)])
def test_the_tiles_of_16_bits(path: str, inputs: int, outputs: int):
    """Widths that are whole tiles of inputs, and one that is not."""
    case = (140, inputs, outputs, [3, 137])
    x_NI, weight_EIO, bias_EO, offsets_E = drawn(case, path, torch.float16)
    assert tile_of(x_NI, inputs, outputs) == {
        "BLOCK_N": 128, "BLOCK_I": 64, "BLOCK_O": 256, "num_warps": 8, "num_stages": 3,
    }  # fmt: skip
    tolerance = {"rtol": 2**-8, "atol": 2**-8}
    for activation in ("none", "gelu"):
        found, _ = grouped_product(x_NI, weight_EIO, offsets_E, bias_EO, activation, products="triton")
        exact = oracle(x_NI, weight_EIO, bias_EO, case[3], activation)
        torch.testing.assert_close(found[:137].double().cpu(), exact, **tolerance)
    grad_NO = found * 0.1
    found_EIO = grouped_weight_gradient(x_NI, grad_NO, offsets_E, "triton")
    for e, rows in enumerate((slice(0, 3), slice(3, 137))):
        exact = x_NI[rows].double().t() @ grad_NO[rows].double()
        torch.testing.assert_close(found_EIO[e].double(), exact, rtol=2**-8, atol=2**-6)


class OnDevice:
    """What `multiplier` asks of rows: a device, a type, the bytes of a number."""

    is_cuda, device = True, torch.device("cuda", 0)

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def element_size(self) -> int:
        return self.dtype.itemsize


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "expected"),
    [
        ((9, 0), torch.bfloat16, 64, "grouped_mm"),
        ((10, 0), torch.bfloat16, 64, "grouped_mm"),
        ((8, 0), torch.bfloat16, 64, "triton"),
        ((12, 0), torch.bfloat16, 64, "triton"),
        ((9, 0), torch.float16, 64, "triton"),
        ((9, 0), torch.float32, 64, "triton"),
        ((9, 0), torch.bfloat16, 60, "triton"),  # rows of 120 bytes
    ],
)
def test_what_auto_chooses(monkeypatch, capability, dtype, width: int, expected: str):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert multiplier("auto", 768, width, of=OnDevice(dtype)) == expected  # pyright: ignore
    asked = "grouped_mm" if dtype == torch.bfloat16 and width == 64 else "triton"
    assert multiplier("grouped_mm", 768, width, of=OnDevice(dtype)) == asked  # pyright: ignore
    assert multiplier("megablocks", 768, width, of=OnDevice(dtype)) == "megablocks"  # pyright: ignore
