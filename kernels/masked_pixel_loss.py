"""Masked pixel loss (MAE, He et al. 2022): mean squared error of the predicted pixels of each masked patch.

The target of a patch is its pixels in [-1, 1], u / 127.5 - 1, or of these (x - mean) / sqrt(var + 1e-6) with
the unbiased variance.

    forward    masked_BM -> patch of the image, read where it lies -> mean, variance -> error_BM
    backward   the same again, and gradient = 2 g (prediction - target) / C

A program takes four whole patches, whose pixels stay in registers: a byte and a prediction read per pixel,
and in the backward a gradient written. No target is ever stored: the backward reads the bytes again. For 64
images of 224 px, three of four patches of 16 px masked, bf16: 7.2 million pixels, 22 + 36 = 58 MB, 12 us of
an H200's 4.8 TB/s (not measured yet). PyTorch's operations (patches, pick, floats, target, difference,
square, mean and their gradients, each in memory) move 770 MB.

Shape suffixes: B sample, M masked patch, P patch, C pixel of a patch in the order (channel, row, column).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kernels.backend import CompileCase, divide_up, jit, power_of_2, tl, use_triton

EPS = 1e-6

# ---------------------------------------------------------------------------------------------- definition


def masked_pixels(images_BCHW: Tensor, masked_BM: Tensor, patch_size: int) -> Tensor:
    """Bytes -> (B, M, C) in [-1, 1], fp32."""
    b, c, height, width = images_BCHW.shape
    p = patch_size
    x = images_BCHW.view(b, c, height // p, p, width // p, p)
    patches_BPC = x.permute(0, 2, 4, 1, 3, 5).reshape(b, (height // p) * (width // p), c * p * p)
    picked_BMC = patches_BPC.gather(1, masked_BM[..., None].expand(-1, -1, c * p * p))
    return picked_BMC.float().div_(127.5).sub_(1.0)


def patch_moments(pixels_BMC: Tensor) -> tuple[Tensor, Tensor]:
    """(B, M, 1): mean, and what a normalised target is divided by."""
    variance_BM1, mean_BM1 = torch.var_mean(pixels_BMC, dim=-1, keepdim=True)
    return mean_BM1, (variance_BM1 + EPS).sqrt()


def pixel_target(pixels_BMC: Tensor, normalised: bool) -> Tensor:
    """Pixels in [-1, 1] -> the target."""
    if not normalised:
        return pixels_BMC
    mean_BM1, deviation_BM1 = patch_moments(pixels_BMC)
    return (pixels_BMC - mean_BM1) / deviation_BM1


def _loss_definition(
    pred_BMC: Tensor, images_BCHW: Tensor, masked_BM: Tensor, patch_size: int, normalised: bool
) -> Tensor:
    target_BMC = pixel_target(masked_pixels(images_BCHW, masked_BM, patch_size), normalised)
    return (pred_BMC.float() - target_BMC).square().mean(-1)


# ------------------------------------------------------------------------------------------------- kernels


@jit
def difference(
    pred, images, masked, num_rows, num_masked, per_line,
    stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, C: tl.constexpr, NORMALISED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(prediction - target of ROWS patches, their numbers, the place of each pixel, which of these exist)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < num_rows
    patch = tl.load(masked + row, mask=exists, other=0)
    corner = (row // num_masked) * stride_b
    corner += (patch // per_line) * P * stride_h + (patch % per_line) * P * stride_w
    pixel = tl.arange(0, BLOCK_C)
    channel, line, place = pixel // (P * P), pixel // P % P, pixel % P
    offset = channel.to(tl.int64) * stride_c + line.to(tl.int64) * stride_h + place.to(tl.int64) * stride_w
    inside = exists[:, None] & (pixel < C)[None, :]
    value = tl.load(images + corner[:, None] + offset[None, :], mask=inside, other=0)
    target = value.to(tl.float32) * (1 / 127.5) - 1.0
    if NORMALISED:
        mean = tl.sum(tl.where(inside, target, 0.0), 1) / C
        target = tl.where(inside, target - mean[:, None], 0.0)
        variance = tl.sum(target * target, 1) / (C - 1)
        target = target / tl.sqrt(variance + 1e-6)[:, None]
    at = row[:, None] * C + pixel[None, :]
    found = tl.load(pred + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, found - target, 0.0), row, at, inside


@jit
def forward_kernel(
    pred, images, masked, error, num_rows, num_masked, per_line,
    stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, C: tl.constexpr, NORMALISED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    away, row, _, _ = difference(
        pred, images, masked, num_rows, num_masked, per_line,
        stride_b, stride_c, stride_h, stride_w, P, C, NORMALISED, ROWS, BLOCK_C,
    )  # fmt: skip
    tl.store(error + row, tl.sum(away * away, 1) / C, mask=row < num_rows)


@jit
def backward_kernel(
    grad, pred, images, masked, grad_pred, num_rows, num_masked, per_line,
    stride_b, stride_c, stride_h, stride_w,
    P: tl.constexpr, C: tl.constexpr, NORMALISED: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    away, row, at, inside = difference(
        pred, images, masked, num_rows, num_masked, per_line,
        stride_b, stride_c, stride_h, stride_w, P, C, NORMALISED, ROWS, BLOCK_C,
    )  # fmt: skip
    scale = tl.load(grad + row, mask=row < num_rows, other=0.0) * (2.0 / C)
    tl.store(grad_pred + at, (away * scale[:, None]).to(grad_pred.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------------------------------------ operator


PATCHES = NUM_WARPS = 4  # 32 pixels a thread: 16-byte accesses of bf16


def tile_of(images_BCHW: Tensor, masked_BM: Tensor, patch_size: int, normalised: bool) -> dict[str, Any]:
    """Of both kernels: what follows the tensors."""
    num_pixels = images_BCHW.shape[1] * patch_size**2
    stride_b, stride_c, stride_h, stride_w = images_BCHW.stride()
    return {
        "num_rows": masked_BM.numel(),
        "num_masked": masked_BM.shape[1],
        "per_line": images_BCHW.shape[3] // patch_size,
        "stride_b": stride_b,
        "stride_c": stride_c,
        "stride_h": stride_h,
        "stride_w": stride_w,
        "P": patch_size,
        "C": num_pixels,
        "NORMALISED": normalised,
        "ROWS": PATCHES,
        "BLOCK_C": power_of_2(num_pixels),
        "num_warps": NUM_WARPS,
    }


@torch.library.custom_op("eve_kernels::masked_pixel_loss", mutates_args=())
def _loss(
    pred_BMC: Tensor, images_BCHW: Tensor, masked_BM: Tensor, patch_size: int, normalised: bool
) -> Tensor:
    error_BM = pred_BMC.new_empty(masked_BM.shape, dtype=torch.float32)
    if masked_BM.numel():
        forward_kernel[(divide_up(masked_BM.numel(), PATCHES),)](
            pred_BMC.contiguous(), images_BCHW, masked_BM.contiguous(), error_BM,
            **tile_of(images_BCHW, masked_BM, patch_size, normalised),
        )  # fmt: skip
    return error_BM


@_loss.register_fake
def _(pred_BMC, images_BCHW, masked_BM, patch_size, normalised) -> Tensor:
    return pred_BMC.new_empty(masked_BM.shape, dtype=torch.float32)


@torch.library.custom_op("eve_kernels::masked_pixel_loss_backward", mutates_args=())
def _loss_backward(
    grad_BM: Tensor,
    pred_BMC: Tensor,
    images_BCHW: Tensor,
    masked_BM: Tensor,
    patch_size: int,
    normalised: bool,
) -> Tensor:
    grad_pred_BMC = pred_BMC.new_empty(pred_BMC.shape)
    if masked_BM.numel():
        backward_kernel[(divide_up(masked_BM.numel(), PATCHES),)](
            grad_BM.contiguous(), pred_BMC.contiguous(), images_BCHW, masked_BM.contiguous(), grad_pred_BMC,
            **tile_of(images_BCHW, masked_BM, patch_size, normalised),
        )  # fmt: skip
    return grad_pred_BMC


@_loss_backward.register_fake
def _(grad_BM, pred_BMC, images_BCHW, masked_BM, patch_size, normalised) -> Tensor:
    return pred_BMC.new_empty(pred_BMC.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.patch_size, ctx.normalised = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad_BM: Tensor) -> tuple[Tensor | None, ...]:
    return _loss_backward(grad_BM, *ctx.saved_tensors, ctx.patch_size, ctx.normalised), *[None] * 4


_loss.register_autograd(_backward, setup_context=_save)


def masked_pixel_loss(
    pred_BMC: Tensor, images_BCHW: Tensor, masked_BM: Tensor, patch_size: int, normalised: bool
) -> Tensor:
    """Predictions of the masked patches, images (B, 3, H, W) uint8, indices of patches in reading order
    (B, M) -> (B, M) fp32: the mean squared error of each patch. Images may be strided; only the predictions
    get a gradient. H and W are multiples of the patch size; an index is one of 0..P-1."""
    b, c, height, width = images_BCHW.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height} x {width} is not made of patches of {patch_size}")
    if masked_BM.shape[:1] != (b,) or pred_BMC.shape != (*masked_BM.shape, c * patch_size**2):
        raise ValueError(
            f"predictions {tuple(pred_BMC.shape)} do not fit {tuple(masked_BM.shape)} masked patches of "
            f"{tuple(images_BCHW.shape)} images"
        )
    if use_triton(pred_BMC):
        return _loss(pred_BMC, images_BCHW, masked_BM, patch_size, normalised)
    return _loss_definition(pred_BMC, images_BCHW, masked_BM, patch_size, normalised)


_TYPES = {
    "pred": "*bf16", "images": "*u8", "masked": "*i64", "num_rows": "i32", "num_masked": "i32",
    "per_line": "i32", "stride_b": "i32", "stride_c": "i32", "stride_h": "i32",
}  # fmt: skip
_CONSTANTS = {
    "stride_w": 1, "P": 16, "C": 768, "NORMALISED": True, "ROWS": PATCHES, "BLOCK_C": 1024,
}  # fmt: skip
_ALIGNED = ("stride_b", "stride_c", "stride_h")

COMPILE_CASES = [
    CompileCase(
        name="masked_pixel_loss",
        kernel=forward_kernel,
        types={**_TYPES, "error": "*fp32"},
        constants=_CONSTANTS,
        num_warps=NUM_WARPS,
        aligned=_ALIGNED,
    ),
    CompileCase(
        name="masked_pixel_loss backward",
        kernel=backward_kernel,
        types={**_TYPES, "grad": "*fp32", "grad_pred": "*bf16"},
        constants=_CONSTANTS,
        num_warps=NUM_WARPS,
        aligned=_ALIGNED,
    ),
]
