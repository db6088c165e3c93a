"""Dispatch, forward and backward, against loops over tokens in fp64."""

import pytest
import torch
import torch.nn.functional as F

from kernels.backend import INTERPRETED
from kernels.dispatch import dispatch
from tests.kernels.rows import SHAPES, placed


def by_hand(x_TD, token_row_TK, vector_MD, modality_T, num_rows, grad_ND):
    """In fp64: rows, which of them are defined, gradients of x and of the vector."""
    x, grad = x_TD.double(), grad_ND.double()
    rows, owned = torch.zeros(num_rows, x.shape[1], dtype=torch.float64), set()
    grad_x = torch.zeros_like(x)
    grad_vector = None if vector_MD is None else torch.zeros(vector_MD.shape, dtype=torch.float64)
    for t, places in enumerate(token_row_TK.tolist()):
        for row in places:
            if row < 0:
                continue
            owned.add(row)
            rows[row] = x[t] if vector_MD is None else x[t] + vector_MD[modality_T[t]].double()
            grad_x[t] += grad[row]
            if grad_vector is not None:
                grad_vector[modality_T[t]] += grad[row]
    return rows, owned, grad_x, grad_vector


def run(path, x_TD, row_token_N, token_row_TK, vector_MD, modality_T, grad_ND):
    x = x_TD.detach().to(path).requires_grad_()
    vector = None if vector_MD is None else vector_MD.detach().to(path).requires_grad_()
    modality = None if modality_T is None else modality_T.to(path)
    out = dispatch(x, row_token_N.to(path), token_row_TK.to(path), vector, modality)
    out.backward(grad_ND.to(path))
    assert out.dtype == x.dtype
    return out.detach().cpu(), x.grad.cpu(), None if vector is None else vector.grad.cpu()


@pytest.mark.parametrize(
    ("drop", "align", "skew"), [(0.0, 1, False), (0.4, 1, False), (0.3, 8, False), (0, 4, True)]
)
@pytest.mark.parametrize("with_vector", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_loop_over_tokens(path, shape, dtype, with_vector, drop, align, skew):
    num_tokens, num_experts, num_choices, width = shape
    row_token_N, token_row_TK, _ = placed(
        num_tokens, num_experts, num_choices, drop=drop, align=align, skew=skew
    )
    torch.manual_seed(1)
    x = torch.randn(num_tokens, width).to(dtype)
    vector = torch.randn(3, width).to(dtype) if with_vector else None
    modality = torch.randint(3, (num_tokens,)) if with_vector else None
    grad = torch.randn(row_token_N.shape[0], width).to(dtype)
    found = run(path, x, row_token_N, token_row_TK, vector, modality, grad)
    rows, owned, grad_x, grad_vector = by_hand(x, token_row_TK, vector, modality, len(row_token_N), grad)
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-2, "rtol": 8e-3}
    for row in range(len(row_token_N)):
        if row in owned:
            torch.testing.assert_close(found[0][row].double(), rows[row], **tolerance)
        elif row_token_N[row] < 0:
            assert not found[0][row].any()
    torch.testing.assert_close(found[1].double(), grad_x, **tolerance)
    if with_vector:
        torch.testing.assert_close(found[2].double(), grad_vector, atol=10 * tolerance["atol"], rtol=8e-3)
    again = run(path, x, row_token_N, token_row_TK, vector, modality, grad)
    mine = sorted(owned)
    assert torch.equal(found[0][mine], again[0][mine])
    assert torch.equal(found[1], again[1])
    assert not with_vector or torch.equal(found[2], again[2])


def test_programs_that_sum_many_blocks_of_tokens(path, monkeypatch):
    monkeypatch.setattr("kernels.dispatch.MAX_PROGRAMS", 2)
    row_token_N, token_row_TK, _ = placed(130, 8, 2, drop=0.3)
    torch.manual_seed(1)
    x, vector, modality = torch.randn(130, 40), torch.randn(3, 40), torch.randint(3, (130,))
    grad = torch.randn(row_token_N.shape[0], 40)
    _, *found = run(path, x, row_token_N, token_row_TK, vector, modality, grad)
    *_, grad_x, grad_vector = by_hand(x, token_row_TK, vector, modality, len(row_token_N), grad)
    torch.testing.assert_close(found[0].double(), grad_x, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(found[1].double(), grad_vector, atol=1e-3, rtol=1e-5)


def test_undefined_gradients_do_not_leak(path):
    row_token_N, token_row_TK, end = placed(40, 4, 2, drop=0.5)
    grad = torch.randn(80, 16)
    grad[end:] = float("nan")
    _, grad_x, _ = run(path, torch.randn(40, 16), row_token_N, token_row_TK, None, None, grad)
    assert torch.isfinite(grad_x).all()
    nowhere = (token_row_TK < 0).all(1)
    assert nowhere.any()
    assert not grad_x[nowhere].any()


@pytest.mark.parametrize("kind", ["slice", "transposed", "expanded"])
def test_any_strides(path, kind):
    row_token_N, token_row_TK, _ = placed(20, 3, 2)
    make = {
        "slice": lambda n: torch.randn(n, 19)[:, 2:14],
        "transposed": lambda n: torch.randn(12, n).t(),
        "expanded": lambda n: torch.randn(1, 12).expand(n, 12),
    }[kind]
    x, grad = make(20), make(40)
    found = run(path, x, row_token_N, token_row_TK, None, None, grad)
    rows, _, grad_x, _ = by_hand(x, token_row_TK, None, None, 40, grad)
    torch.testing.assert_close(found[0].double(), rows, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1].double(), grad_x, atol=1e-6, rtol=1e-6)


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
    x = torch.randn(2, width, device=path).bfloat16().requires_grad_()
    out = dispatch(x, row_token_N.to(path), token_row_TK.to(path))
    assert torch.equal(out[last], x[0])
    assert torch.equal(out[1], x[1])
    grad = torch.empty_like(out)
    grad[last], grad[1] = 3.0, 5.0
    (grad_x,) = torch.autograd.grad(out, x, grad)
    assert (grad_x[0] == 3).all()
    assert (grad_x[1] == 5).all()


def test_compiles_whole_and_checkpoints(path):
    row_token_N, token_row_TK = (index.to(path) for index in placed(30, 4, 2)[:2])
    vector = torch.randn(2, 24, device=path, requires_grad=True)
    modality = (torch.arange(30, device=path) >= 12).long()
    x = torch.randn(30, 24, device=path, requires_grad=True)

    def step(x, vector):
        return F.gelu(dispatch(x.sin(), row_token_N, token_row_TK, vector, modality)).square().sum()

    def gradients(function):
        return torch.autograd.grad(function(x, vector), (x, vector))

    expected = gradients(step)
    checkpointed = gradients(lambda x, v: torch.utils.checkpoint.checkpoint(step, x, v, use_reentrant=False))
    compiled = gradients(torch.compile(step, backend="aot_eager", fullgraph=True))
    for found in (checkpointed, compiled):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_registration(path):
    row_token_N, token_row_TK = (index.to(path) for index in placed(6, 3, 2)[:2])
    arguments = (
        torch.randn(6, 8, device=path, requires_grad=True),
        row_token_N,
        token_row_TK,
        torch.randn(2, 8, device=path, requires_grad=True),
        (torch.arange(6, device=path) > 2).long(),
    )
    torch.library.opcheck(torch.ops.eve_kernels.dispatch.default, arguments)


def test_vector_and_modality_come_together():
    row_token_N, token_row_TK, _ = placed(3, 2, 1)
    with pytest.raises(ValueError, match="together"):
        dispatch(torch.randn(3, 4), row_token_N, token_row_TK, torch.randn(2, 4))
