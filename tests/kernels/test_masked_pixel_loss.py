"""The masked pixel loss against a loop over patches in fp64, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.masked_pixel_loss import masked_pixel_loss

# Images, channels, height, width, patch, masked patches of an image.
SHAPES = [
    (2, 3, 32, 48, 16, 4),
    (1, 3, 14, 28, 14, 1),  # a patch that is no power of 2, in one image, one masked
    (3, 3, 6, 9, 3, 5),  # more masked patches than a program takes, and not a multiple
    (2, 1, 4, 4, 2, 4),  # all masked, one channel
    (0, 3, 8, 8, 4, 2),  # no image
    (2, 3, 8, 8, 4, 0),  # no masked patch
]


def drawn(shape, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    b, c, height, width, p, m = shape
    generator = torch.Generator().manual_seed(height)
    images_BCHW = torch.randint(256, (b, c, height, width), generator=generator, dtype=torch.uint8)
    num_patches = (height // p) * (width // p)
    order = [torch.randperm(num_patches, generator=generator)[:m] for _ in range(b)]
    masked_BM = torch.stack(order) if b else torch.zeros(0, m, dtype=torch.long)
    pred_BMC = torch.randn(b, m, c * p * p, generator=generator).to(device, dtype).requires_grad_()
    return pred_BMC, images_BCHW.to(device), masked_BM.to(device)


def oracle(pred_BMC: Tensor, images_BCHW: Tensor, masked_BM: Tensor, p: int, normalised: bool) -> Tensor:
    """(B, M) by loops over images and patches."""
    per_line = images_BCHW.shape[3] // p
    error_BM = torch.zeros(masked_BM.shape, dtype=torch.float64)
    for b, masked_M in enumerate(masked_BM.tolist()):
        for m, patch in enumerate(masked_M):
            y, x = patch // per_line * p, patch % per_line * p
            target_C = images_BCHW[b, :, y : y + p, x : x + p].double().flatten() / 127.5 - 1
            if normalised:
                away = target_C - target_C.sum() / len(target_C)
                target_C = away / ((away**2).sum() / (len(target_C) - 1) + 1e-6) ** 0.5
            error_BM[b, m] = ((pred_BMC[b, m] - target_C) ** 2).mean()
    return error_BM


def check(
    pred_BMC: Tensor, images_BCHW: Tensor, masked_BM: Tensor, p: int, normalised: bool, tolerance
) -> None:
    """Errors, and gradients of a loss with another weight on each patch."""
    weight_BM = torch.linspace(-1, 2, masked_BM.numel(), dtype=torch.float64).view(masked_BM.shape)
    wide_BMC = pred_BMC.detach().double().cpu().requires_grad_()
    exact_BM = oracle(wide_BMC, images_BCHW.cpu(), masked_BM, p, normalised)
    if masked_BM.numel():
        (exact_BM * weight_BM).sum().backward()
    found_BM = masked_pixel_loss(pred_BMC, images_BCHW, masked_BM, p, normalised)
    assert found_BM.dtype == torch.float32
    (found_BM * weight_BM.to(found_BM)).sum().backward()
    torch.testing.assert_close(found_BM.double().cpu(), exact_BM.detach(), rtol=1e-5, atol=1e-5)
    grad_BMC = torch.zeros_like(wide_BMC) if wide_BMC.grad is None else wide_BMC.grad
    torch.testing.assert_close(pred_BMC.grad.double().cpu(), grad_BMC, **tolerance)  # pyright: ignore


@pytest.mark.filterwarnings("ignore:var_mean")  # of no patch
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_errors_and_gradients_follow_the_formula(path: str, shape, normalised: bool):
    check(*drawn(shape, path), shape[4], normalised, {"rtol": 1e-4, "atol": 1e-6})


@pytest.mark.parametrize("normalised", [False, True])
def test_bf16_predictions_within_rounding(path: str, normalised: bool):
    drawn_bf16 = drawn(SHAPES[0], path, torch.bfloat16)
    # The interpreter cuts the last bits off instead of rounding.
    check(*drawn_bf16, 16, normalised, {"rtol": 2**-7, "atol": 1e-6})


def test_shapes_that_do_not_fit(path: str):
    pred_BMC, images_BCHW, masked_BM = drawn(SHAPES[2], path)
    with pytest.raises(ValueError, match="6 x 8 is not made of patches of 3"):
        masked_pixel_loss(pred_BMC, images_BCHW[..., :8], masked_BM, 3, True)
    for pred, images, masked in (
        (pred_BMC[..., :-1], images_BCHW, masked_BM),
        (pred_BMC[:, :-1], images_BCHW, masked_BM),
        (pred_BMC, images_BCHW, masked_BM[:, 1:]),
        (pred_BMC, images_BCHW[:2], masked_BM),
        (pred_BMC, images_BCHW[:, :2], masked_BM),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            masked_pixel_loss(pred, images, masked, 3, True)


def test_a_patch_of_one_colour(path: str):
    """Its deviation is zero; the target is, too."""
    pred_BMC = torch.full((1, 1, 48), 0.5, device=path, requires_grad=True)
    images_BCHW = torch.full((1, 3, 4, 4), 77, dtype=torch.uint8, device=path)
    error_BM = masked_pixel_loss(
        pred_BMC, images_BCHW, torch.zeros(1, 1, dtype=torch.long, device=path), 4, True
    )
    torch.testing.assert_close(error_BM.cpu(), torch.tensor([[0.25]]), rtol=1e-3, atol=0)


def test_non_contiguous_inputs(path: str):
    pred_BMC, images_BCHW, masked_BM = drawn(SHAPES[2], path)
    pred_BMC = pred_BMC.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    masked_BM = masked_BM.t().contiguous().t()
    # A crop of larger images; channels last.
    large = torch.zeros(3, 3, 10, 20, dtype=torch.uint8, device=path)
    large[:, :, 2:8, 5:14] = images_BCHW
    last = images_BCHW.to(memory_format=torch.channels_last)
    for images in (large[:, :, 2:8, 5:14], last):
        check(pred_BMC, images, masked_BM, 3, True, {"rtol": 1e-4, "atol": 1e-6})
        pred_BMC.grad = None


def test_two_runs_are_bit_equal(path: str):
    runs = []
    for _ in range(2):
        pred_BMC, images_BCHW, masked_BM = drawn(SHAPES[0], path)
        error_BM = masked_pixel_loss(pred_BMC, images_BCHW, masked_BM, 16, True)
        error_BM.sum().backward()
        runs.append((error_BM, pred_BMC.grad))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_activation_checkpointing_and_compile_take_it(path: str):
    pred_BMC, images_BCHW, masked_BM = drawn(SHAPES[2], path)

    def total(pred_BMC: Tensor) -> Tensor:
        return masked_pixel_loss(pred_BMC, images_BCHW, masked_BM, 3, True).sum()

    (plain,) = torch.autograd.grad(total(pred_BMC), pred_BMC)
    again = torch.utils.checkpoint.checkpoint(total, pred_BMC, use_reentrant=False)
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")(pred_BMC)
    for other in (again, compiled):
        torch.testing.assert_close(torch.autograd.grad(other, pred_BMC)[0], plain)


def test_images_past_2_to_the_31_bytes(path: str):
    """Three that far apart, in memory that is reserved and never touched."""
    stride = 2**30 + 64
    whole = torch.empty(2 * stride + 48, dtype=torch.uint8, device=path)
    images_BCHW = whole.as_strided((3, 3, 4, 4), (stride, 16, 4, 1))
    images_BCHW.copy_(torch.arange(144, device=path).view(3, 3, 4, 4))
    pred_BMC = torch.randn(3, 1, 48, generator=torch.Generator().manual_seed(0)).to(path).requires_grad_()
    masked_BM = torch.zeros(3, 1, dtype=torch.long, device=path)
    check(pred_BMC, images_BCHW, masked_BM, 4, True, {"rtol": 1e-4, "atol": 1e-6})
