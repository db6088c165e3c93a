"""Combine, forward and backward, against loops over tokens in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.backend import INTERPRETED
from kernels.combine import combine
from tests.kernels.rows import SHAPES, placed, poisoned


def by_hand(y_ND, weight_TK, token_row_TK, residual_TD, grad_TD):
    """In fp64: the sums, and the gradients of rows and weights."""
    y, weight, grad = y_ND.double(), weight_TK.double(), grad_TD.double()
    out = (
        torch.zeros(grad.shape, dtype=torch.float64) if residual_TD is None else residual_TD.double().clone()
    )
    grad_y, grad_weight = torch.zeros_like(y), torch.zeros_like(weight)
    for t, places in enumerate(token_row_TK.tolist()):
        for k, row in enumerate(places):
            if row >= 0:
                out[t] += weight[t, k] * y[row]
                grad_y[row] = weight[t, k] * grad[t]
                grad_weight[t, k] = grad[t] @ y[row]
    return out, grad_y, grad_weight


def run(path, y_ND, weight_TK, row_token_N, token_row_TK, residual_TD, grad_TD):
    y, weight = (tensor.detach().to(path).requires_grad_() for tensor in (y_ND, weight_TK))
    residual = None if residual_TD is None else residual_TD.detach().to(path).requires_grad_()
    out = combine(y, weight, row_token_N.to(path), token_row_TK.to(path), residual)
    assert out.dtype == (y if residual is None else residual).dtype
    out.backward(grad_TD.to(path))
    if residual is not None:
        assert torch.equal(residual.grad.cpu(), grad_TD)
    return out.detach().cpu(), y.grad.cpu(), weight.grad.cpu()


@pytest.mark.parametrize(
    ("drop", "align", "skew"), [(0.0, 1, False), (0.4, 1, False), (0.3, 8, False), (0, 4, True)]
)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_tokens(path, shape, dtype, with_residual, drop, align, skew):
    num_tokens, num_experts, num_choices, width = shape
    row_token_N, token_row_TK, _ = placed(
        num_tokens, num_experts, num_choices, drop=drop, align=align, skew=skew
    )
    torch.manual_seed(1)
    y = poisoned(torch.randn(row_token_N.shape[0], width).to(dtype), row_token_N, token_row_TK)
    weight = torch.rand(num_tokens, num_choices) * (token_row_TK >= 0)
    residual = torch.randn(num_tokens, width).to(dtype) if with_residual else None
    grad = torch.randn(num_tokens, width).to(dtype)
    found = run(path, y, weight, row_token_N, token_row_TK, residual, grad)
    expected = by_hand(y, weight, token_row_TK, residual, grad)
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 8e-3}
    torch.testing.assert_close(found[0].double(), expected[0], **tolerance)
    owned = token_row_TK[token_row_TK >= 0]
    torch.testing.assert_close(found[1][owned].double(), expected[1][owned], **tolerance)
    assert not found[1][row_token_N < 0].any()
    # Sums of products of bf16 numbers, but in fp32.
    torch.testing.assert_close(found[2].double(), expected[2], atol=1e-3, rtol=1e-4)
    again = run(path, y, weight, row_token_N, token_row_TK, residual, grad)
    assert torch.equal(found[0], again[0])
    assert torch.equal(found[1][owned], again[1][owned])
    assert torch.equal(found[2], again[2])


def test_a_residual_may_be_wider_than_the_rows(path):
    row_token_N, token_row_TK, _ = placed(12, 3, 2)
    y, residual = torch.randn(24, 16).bfloat16(), torch.randn(12, 16)
    weight, grad = torch.rand(12, 2), torch.randn(12, 16)
    found = run(path, y, weight, row_token_N, token_row_TK, residual, grad)
    expected = by_hand(y, weight, token_row_TK, residual, grad)
    assert found[1].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1].double(), expected[1], atol=1e-2, rtol=8e-3)
    torch.testing.assert_close(found[2].double(), expected[2], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["slice", "transposed", "expanded"])
def test_any_strides(path, kind):
    row_token_N, token_row_TK, _ = placed(20, 3, 2)
    make = {
        "slice": lambda n: torch.randn(n, 19)[:, 2:14],
        "transposed": lambda n: torch.randn(12, n).t(),
        "expanded": lambda n: torch.randn(1, 12).expand(n, 12),
    }[kind]
    y, residual, grad = make(40), make(20), make(20)
    weight = torch.rand(2, 20).t()
    found = run(path, y, weight, row_token_N, token_row_TK, residual, grad)
    for one, other in zip(found, by_hand(y, weight, token_row_TK, residual, grad), strict=True):
        torch.testing.assert_close(one.double(), other, atol=1e-5, rtol=1e-5)


def test_rows_past_2_to_the_31_elements(path):
    """Of these rows two are ever touched. The interpreter wants few and long ones, a GPU short ones."""
    if path == "cpu" and not INTERPRETED:
        pytest.skip("4 GB for a path that leaves offsets to PyTorch")
    width = 768 if path == "cuda" else 1 << 20
    num_rows = (1 << 31) // width + 2
    last = num_rows - 1
    token_row_TK = torch.tensor([[last], [1]])
    row_token_N = torch.zeros(num_rows, dtype=torch.int64)
    row_token_N[1] = 1
    y = torch.empty(num_rows, width, dtype=torch.bfloat16, device=path)
    y[last], y[1] = 1.0, 2.0
    weight = torch.tensor([[0.5], [4.0]], device=path, requires_grad=True)
    out = combine(y.requires_grad_(), weight, row_token_N.to(path), token_row_TK.to(path))
    assert (out[0] == 0.5).all()
    assert (out[1] == 8).all()
    grad_y, grad_weight = torch.autograd.grad(out, (y, weight), torch.ones_like(out))
    assert grad_weight.flatten().tolist() == [width, 2 * width]
    assert (grad_y[last] == 0.5).all()
    assert (grad_y[1] == 4).all()


def tensors(path):
    row_token_N, token_row_TK, _ = placed(30, 4, 2, drop=0.2)
    return (
        torch.randn(60, 24, device=path, requires_grad=True),
        torch.rand(30, 2, device=path, requires_grad=True),
        row_token_N.to(path),
        token_row_TK.to(path),
        torch.randn(30, 24, device=path, requires_grad=True),
    )


def test_compiles_whole_and_checkpoints(path):
    y, weight, row_token_N, token_row_TK, residual = tensors(path)

    def step(y, weight, residual):
        return F.gelu(combine(y.sin(), weight, row_token_N, token_row_TK, residual)).square().sum()

    def gradients(function):
        grad_y, *others = torch.autograd.grad(function(y, weight, residual), (y, weight, residual))
        return grad_y[token_row_TK[token_row_TK >= 0]], *others

    expected = gradients(step)
    checkpointed = gradients(lambda *x: torch.utils.checkpoint.checkpoint(step, *x, use_reentrant=False))
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True))
    for found in (checkpointed, compiled):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_registration(path):
    # All rows are owned: what is undefined cannot be compared.
    y, weight, _, _, residual = tensors(path)
    row_token_N, token_row_TK, _ = placed(30, 4, 2)
    arguments = (y, weight, row_token_N.to(path), token_row_TK.to(path), residual)
    torch.library.opcheck(torch.ops.eve_kernels.combine.default, arguments)
