"""The feed-forward of experts and its gradients against a loop over experts in fp64, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.expert_feed_forward import expert_feed_forward, grouped_activation_gradient
from kernels.grouped_linear import PRODUCTS
from tests.kernels.rows import placed
from tests.kernels.test_grouped_linear import BOTH, half
from tests.kernels.test_masked_text_loss import NoGradient

# Rows, width, hidden width, ends of the experts' rows.
CASES = {
    "one row": (1, 4, 12, [1]),
    "no row": (0, 4, 8, [0, 0]),
    "one expert": (40, 12, 20, [33]),
    "odd sizes": (37, 13, 71, [5, 5, 30, 37]),
    "more than a tile of sums": (580, 8, 12, [0, 270, 570]),  # the last 10 rows belong to nobody
    "all rows to the last": (70, 12, 40, [0, 0, 0, 70]),
    "64 experts": (100, 8, 12, [min(100, 2 * e) for e in range(64)]),
}


def drawn(case, device: str, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    rows, width, hidden, ends = case
    generator = torch.Generator().manual_seed(rows)
    shapes = [
        (rows, width),
        (len(ends), width, hidden),
        (len(ends), hidden),
        (len(ends), hidden, width),
        (len(ends), width),
    ]
    leaves = [
        torch.randn(shape, generator=generator) * shape[-2] ** -0.25 if shape[-2] else torch.zeros(shape)
        for shape in shapes
    ]
    offsets_E = torch.tensor(ends, dtype=torch.int32, device=device)
    return [leaf.to(device, dtype).requires_grad_() for leaf in leaves], offsets_E


def oracle(leaves: list[Tensor], ends: list[int], activation: str) -> Tensor:
    x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED = leaves
    parts = []
    for e, (begin, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        z = x_ND[begin:end] @ w1_EDF[e] + b1_EF[e]
        chance = torch.special.ndtr(z) if activation == "gelu" else 1 / (1 + (-1.702 * z).exp())
        parts.append((z * chance) @ w2_EFD[e] + b2_ED[e])
    return torch.cat(parts)


def check(
    case, leaves: list[Tensor], offsets_E: Tensor | None, activation: str, products: str, **tolerance: Any
) -> None:
    ends, last = case[3], case[3][-1]
    wide = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    exact = oracle(wide, ends, activation)
    found = expert_feed_forward(*leaves, offsets_E, activation, products)  # pyright: ignore
    torch.testing.assert_close(found[:last].double().cpu(), exact.detach(), **tolerance)
    grad_ND = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    exact.backward(grad_ND[:last])
    found.backward(grad_ND.to(found))
    for leaf, twin in zip(leaves, wide, strict=True):
        rows = slice(0, last) if leaf is leaves[0] else slice(None)
        torch.testing.assert_close(leaf.grad[rows].double().cpu(), twin.grad[rows], **tolerance)  # pyright: ignore


@BOTH
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_rows_and_gradients(path: str, case, products: str):
    check(case, *drawn(case, path), "gelu", products, rtol=1e-4, atol=1e-4)


@BOTH
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_tokens_read_by_index_equal_rows_of_dispatch(path: str, products: str, drop: float):
    """Padded to 8 rows an expert, against indexing in fp64."""
    row_token_N, token_row_TK, end = placed(37, 4, 2, drop=drop, align=8)
    owner_N = torch.full((len(row_token_N),), -1)
    owner_N[:end] = row_token_N[:end]
    # Rows of each expert: `placed` draws alike.
    leaves, _ = drawn((37, 16, 24, [0, 0, 0, 0]), path)
    ends = [end // 8 * 2, end // 8 * 4, end // 8 * 6, end]
    offsets_E = torch.tensor(ends, dtype=torch.int32, device=path)
    found = expert_feed_forward(  # pyright: ignore
        *leaves, offsets_E, "gelu", products, row_token_N.to(path), token_row_TK.to(path)
    )
    wide = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    rows_ND = wide[0][owner_N.clamp_min(0)] * (owner_N >= 0)[:, None]
    exact = oracle([rows_ND, *wide[1:]], ends, "gelu")
    grad_ND = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grad_ND[owner_N < 0] = 0  # as combine's backward leaves padding
    torch.testing.assert_close(found[:end].double().cpu(), exact.detach(), rtol=1e-4, atol=1e-4)
    exact.backward(grad_ND[:end])
    found.backward(grad_ND.to(found))
    for leaf, twin in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad.double().cpu(), twin.grad, rtol=1e-4, atol=1e-4)  # pyright: ignore


def test_quick_gelu(path: str):
    case = CASES["odd sizes"]
    check(case, *drawn(case, path), "quick_gelu", "triton", rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_64_bits_on_a_cpu(case, activation: str):
    """As oracles of larger parts want it."""
    leaves, offsets_E = drawn(case, "cpu", torch.float64)
    check(case, leaves, offsets_E, activation, "grouped_mm", rtol=1e-12, atol=1e-12)


@BOTH
def test_16_bits_within_rounding(path: str, products: str):
    case = (150, 24, 72, [0, 70, 70, 150])
    leaves, offsets_E = drawn(case, path, half(products))
    with torch.no_grad():
        for leaf in leaves[1:]:
            leaf *= 0.3
    check(case, leaves, offsets_E, "gelu", products, rtol=2**-5, atol=2**-4)


def test_an_expert_with_many_tiles_of_sums(path: str):
    """More than are added at once."""
    grad_NO = torch.randn(2200, 5, generator=torch.Generator().manual_seed(3)).to(path)
    offsets_E = torch.tensor([2100, 2190], dtype=torch.int32, device=path)
    *_, sums_EO = grouped_activation_gradient(grad_NO, None, offsets_E)
    exact = [grad_NO[:2100].double().sum(0), grad_NO[2100:2190].double().sum(0)]
    torch.testing.assert_close(sums_EO.double(), torch.stack(exact), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("products", PRODUCTS)
def test_one_expert_that_has_all_rows(path: str, products: str):
    """In bf16, which the interpreter cannot multiply, and without megablocks: a plain product."""
    case = (33, 16, 24, [33])
    leaves, _ = drawn(case, path, torch.bfloat16)
    check(case, leaves, None, "gelu", products, rtol=2**-5, atol=2**-3)


def test_rows_that_no_expert_has_get_no_gradient():
    """So the definition, whatever fresh memory holds; the kernels leave them undefined."""
    leaves, offsets_E = drawn(CASES["more than a tile of sums"], "cpu")
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        expert_feed_forward(*leaves, offsets_E).sum().backward()  # pyright: ignore
    finally:
        torch.use_deterministic_algorithms(False)
    assert not leaves[0].grad[570:].any()  # pyright: ignore
    assert leaves[0].grad[:570].any(1).all()  # pyright: ignore


def test_no_upstream_gradient(path: str):
    leaves, offsets_E = drawn(CASES["odd sizes"], path)
    NoGradient.apply(expert_feed_forward(*leaves, offsets_E)).sum().backward()  # pyright: ignore
    assert all(leaf.grad is None for leaf in leaves)


@pytest.mark.parametrize("name", ["relu", "none"])
def test_unknown_names_are_named(path: str, name: str):
    leaves, offsets_E = drawn(CASES["odd sizes"], path)
    with pytest.raises(ValueError, match=f"'{name}'; choose gelu, quick_gelu"):
        expert_feed_forward(*leaves, offsets_E, name)  # pyright: ignore
    with pytest.raises(ValueError, match="'grouped_mn'; choose auto"):
        expert_feed_forward(*leaves, offsets_E, products="grouped_mn")  # pyright: ignore


@pytest.mark.parametrize("leaf", range(5))
def test_widths_that_do_not_fit(path: str, leaf: int):
    leaves, offsets_E = drawn(CASES["odd sizes"], path)
    leaves[leaf] = leaves[leaf][..., :-1]
    with pytest.raises(ValueError, match="fit"):
        expert_feed_forward(*leaves, offsets_E)  # pyright: ignore


def test_as_many_offsets_as_experts(path: str):
    leaves, offsets_E = drawn(CASES["odd sizes"], path)
    for ends_E in (offsets_E[:-1], None):
        with pytest.raises(ValueError, match="4 experts"):
            expert_feed_forward(*leaves, ends_E)  # pyright: ignore


def test_two_runs_are_bit_equal(path: str):
    runs = []
    for _ in range(2):
        leaves, offsets_E = drawn(CASES["odd sizes"], path)
        y_ND = expert_feed_forward(*leaves, offsets_E)  # pyright: ignore
        y_ND.square().sum().backward()
        runs.append([y_ND, *(leaf.grad for leaf in leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_expanded_gradient(path: str):
    """What .sum() hands back: strides of 0."""
    leaves, offsets_E = drawn(CASES["all rows to the last"], path)
    expert_feed_forward(*leaves, offsets_E).sum().backward()  # pyright: ignore
    torch.testing.assert_close(leaves[4].grad[3].cpu(), torch.full((12,), 70.0))  # pyright: ignore
    assert not leaves[4].grad[:3].any()  # pyright: ignore


def test_activation_checkpointing_and_compile_take_it(path: str):
    leaves, offsets_E = drawn(CASES["odd sizes"], path)

    def total(*leaves: Tensor) -> Tensor:
        return expert_feed_forward(*leaves, offsets_E).square().sum()  # pyright: ignore

    plain = torch.autograd.grad(total(*leaves), leaves)
    again = torch.utils.checkpoint.checkpoint(total, *leaves, use_reentrant=False)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(*leaves)
    for other in (again, compiled):
        for a, b in zip(torch.autograd.grad(other, leaves), plain, strict=True):
            torch.testing.assert_close(a, b)
