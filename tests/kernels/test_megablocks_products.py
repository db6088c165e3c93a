"""MegaBlocks as one of the ways to multiply: against ours, and ours against its own layer."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from kernels.expert_feed_forward import expert_feed_forward
from kernels.megablocks_products import grouped_gemm, sizes_of
from tests.kernels.test_expert_feed_forward import check, drawn

# Rows, width, hidden width, ends of the experts' rows: one expert has none, ten rows belong to nobody.
CASE = (330, 64, 128, [70, 70, 200, 320])


@pytest.fixture
def products() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    try:
        grouped_gemm()
    except ImportError as error:
        pytest.skip(str(error))


def test_rows_of_each_expert():
    offsets_E = torch.tensor([3, 3, 10, 11], dtype=torch.int32)
    sizes_E = sizes_of(offsets_E)
    assert sizes_E.tolist() == [3, 0, 7, 1]
    assert sizes_E.dtype == torch.int64


@pytest.mark.skipif(importlib.util.find_spec("grouped_gemm") is not None, reason="grouped_gemm is installed")
def test_what_is_missing_is_said_in_a_sentence():
    with pytest.raises(ImportError, match=r"grouped_gemm does not load.*; see requirements-megablocks\.txt"):
        grouped_gemm()


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_its_products_within_rounding(products: None, activation: str):
    leaves, offsets_E = drawn(CASE, "cuda", torch.bfloat16)
    with torch.no_grad():
        for leaf in leaves[1:]:
            leaf *= 0.3
    check(CASE, leaves, offsets_E, activation, "megablocks", rtol=2**-5, atol=2**-4)


@pytest.mark.gpu
@pytest.mark.parametrize("ours_by", ["grouped_mm", "triton", "megablocks"])
def test_its_layer_equals_ours_without_biases(products: None, ours_by: str):
    """GroupedMLP in the form that makes the activation again; its first weights lie (E, F, D)."""
    reason = "megablocks does not load; see requirements-megablocks.txt"
    layer = pytest.importorskip("megablocks.layers.mlp", reason=reason, exc_type=ImportError)
    last = CASE[3][-1]
    (x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED), offsets_E = drawn(CASE, "cuda", torch.bfloat16)
    x_ND = x_ND.detach()[:last].requires_grad_()
    zeros = torch.zeros_like(b1_EF), torch.zeros_like(b2_ED)
    grad_ND = torch.randn(last, CASE[1], device="cuda", dtype=torch.bfloat16)
    w1_EFD = w1_EDF.detach().transpose(1, 2).contiguous().requires_grad_()
    theirs = layer.memory_optimized_grouped_mlp(x_ND, w1_EFD, w2_EFD, sizes_of(offsets_E), F.gelu)
    # Its backward writes into the gradient that it is given.
    expected = torch.autograd.grad(theirs, (x_ND, w1_EFD, w2_EFD), grad_ND.clone())
    ours = expert_feed_forward(x_ND, w1_EDF, zeros[0], w2_EFD, zeros[1], offsets_E, "gelu", ours_by)
    found = torch.autograd.grad(ours, (x_ND, w1_EDF, w2_EFD), grad_ND)
    tolerance: dict[str, Any] = {"rtol": 2**-5, "atol": 2**-4}
    torch.testing.assert_close(ours, theirs, **tolerance)
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    torch.testing.assert_close(found[1], expected[1].transpose(1, 2), **tolerance)
    torch.testing.assert_close(found[2], expected[2], **tolerance)
