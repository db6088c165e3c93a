"""The paths that only a GPU takes, against the CPU: varlen attention, biases of experts by product."""

import pytest
import torch

from tests.model.test_encoder import inputs, model_with_random_parameters, tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def run(device, dtype):
    """Output and gradients of an encoder with heads 16 wide (flash attention takes multiples of 8)."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = model_with_random_parameters(tiny(width=48, heads=3, hidden=64)).to(device, dtype)
    images, tokens = inputs([3, 9, 4])
    out = model.encode(images_BCHW=images.to(device), tokens_N=tokens.to(device), text_lengths=[3, 9, 4])
    out.x_TD.float().square().sum().backward()
    gradients = {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return out.x_TD.detach().float().cpu(), gradients


def test_fp32_equals_the_cpu():
    expected, expected_gradients = run("cpu", torch.float32)
    found, gradients = run("cuda", torch.float32)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-2, rtol=1e-3, msg=name)


def test_bf16_is_within_its_rounding():
    expected, _ = run("cpu", torch.float32)
    found, gradients = run("cuda", torch.bfloat16)
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    # A near-tie of the router may send a token elsewhere; most rows must agree.
    close = ((found - expected).abs() < 0.1).all(-1).float().mean()
    assert close > 0.8
