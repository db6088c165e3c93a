"""The masked losses beside their peers: all of them give the mean over what is masked.

As a sum divided by a number, which is how EVE adds losses: every row then has one upstream gradient, whose
strides say so, and ours need not make gradients twice (kernels/chunked_linear.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark.case import Case
from kernels.benchmark.cost import costs
from kernels.benchmark.peer import Call, Peer, clone_of, module, on_gpu
from kernels.masked_pixel_loss import masked_pixel_loss
from kernels.masked_text_loss import masked_text_loss
from kernels.vocabulary_parallel_loss import vocabulary_parallel_text_loss


@dataclass(frozen=True)
class Words:
    case: Case
    x_KD: Tensor
    weight_VD: Tensor
    target_K: Tensor


def words(case: Case, device: torch.device, dtype: torch.dtype) -> Words:
    generator = torch.Generator(device).manual_seed(3)

    def leaf(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return (values * case.width**-0.25).to(dtype).requires_grad_()

    x_KD, weight_VD = leaf(case.tokens, case.width), leaf(case.words, case.width)
    target_K = torch.randint(case.words, (case.tokens,), generator=generator, device=device)
    return Words(case, x_KD, weight_VD, target_K)


def word_call(given: Words, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    return Call(
        lambda: function(given.x_KD, given.weight_VD, given.target_K),
        {"x": given.x_KD, "weight": given.weight_VD},
        lambda loss: {"loss": loss},
    )


def our_words(given: Words) -> Call:
    def function(x_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:
        return masked_text_loss(x_KD, weight_VD, None, target_K).loss_K.sum() / given.case.tokens

    return word_call(given, function)


def our_shard(given: Words) -> Call:
    """The vocabulary-parallel form on one rank, whose gather gathers nothing."""

    def function(x_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:
        found = vocabulary_parallel_text_loss(
            x_KD, weight_VD, None, target_K, 0, given.case.words, lambda stats_5K: stats_5K[None]
        )
        return found.loss_K.sum() / given.case.tokens

    return word_call(given, function)


def cross_entropy(x_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:
    logits_KV = F.linear(x_KD, weight_VD).float()
    return F.cross_entropy(logits_KV, target_K, reduction="sum") / target_K.shape[0]


def torch_words(given: Words) -> Call:
    return word_call(given, cross_entropy)


def compiled_words(given: Words) -> Call:
    return word_call(given, torch.compile(cross_entropy, dynamic=False))


def liger(given: Words) -> Call:
    functional = module("liger_kernel", "liger_kernel.transformers.functional")
    on_gpu(given.x_KD)

    def function(x_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:
        loss = functional.liger_fused_linear_cross_entropy(x_KD, weight_VD, target_K, reduction="sum")
        return loss / target_K.shape[0]

    return word_call(given, function)


def cut_cross_entropy(given: Words) -> Call:
    """With all gradients: by default it leaves out the small ones."""
    on_gpu(given.x_KD)
    package = module("cut_cross_entropy")

    def function(x_KD: Tensor, weight_VD: Tensor, target_K: Tensor) -> Tensor:
        loss = package.linear_cross_entropy(x_KD, weight_VD, target_K, filter_eps=None, reduction="sum")
        return loss / target_K.shape[0]

    return word_call(given, function)


MASKED_TEXT_LOSS = (
    Peer("ours", our_words),
    Peer("ours, vocabulary-parallel, one rank", our_shard),
    Peer("torch cross_entropy", torch_words),
    Peer("torch cross_entropy, compiled", compiled_words, compiles=True),
    Peer("Liger fused linear", liger),
    Peer("cut-cross-entropy", cut_cross_entropy),
)


@dataclass(frozen=True)
class Pixels:
    case: Case
    pred_BMC: Tensor
    images_BCHW: Tensor
    masked_BM: Tensor


def pixels(case: Case, device: torch.device, dtype: torch.dtype) -> Pixels:
    generator = torch.Generator(device).manual_seed(4)
    images = torch.randint(
        256, (case.tokens, 3, case.image, case.image), generator=generator, device=device, dtype=torch.uint8
    )
    pred = torch.randn(case.tokens, case.masked, case.pixels, generator=generator, device=device).to(dtype)
    noise = torch.rand(case.tokens, (case.image // case.patch) ** 2, generator=generator, device=device)
    masked = noise.argsort(1)[:, : case.masked].sort(1).values
    return Pixels(case, pred.requires_grad_(), images, masked)


def pixel_call(given: Pixels, function: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Call:
    return Call(
        lambda: function(given.pred_BMC, given.images_BCHW, given.masked_BM, given.case.patch),
        {"pred": given.pred_BMC},
        lambda loss: {"loss": loss},
    )


def our_pixels(given: Pixels) -> Call:
    def function(pred: Tensor, images: Tensor, masked: Tensor, patch: int) -> Tensor:
        return masked_pixel_loss(pred, images, masked, patch, True).sum() / masked.numel()

    return pixel_call(given, function)


def all_patches(pred_BMC: Tensor, images_BCHW: Tensor, masked_BM: Tensor, patch: int) -> Tensor:
    """As most code bases have it: all patches are cut and normalised, the masked ones picked last."""
    b, c, height, width = images_BCHW.shape
    x = (images_BCHW.float() / 127.5 - 1).view(b, c, height // patch, patch, width // patch, patch)
    target_BPC = x.permute(0, 2, 4, 1, 3, 5).reshape(b, -1, c * patch**2)
    variance, mean = torch.var_mean(target_BPC, -1, keepdim=True)
    target_BPC = (target_BPC - mean) / (variance + 1e-6).sqrt()
    picked_BMC = target_BPC.gather(1, masked_BM[..., None].expand(-1, -1, target_BPC.shape[-1]))
    return (pred_BMC.float() - picked_BMC).square().mean(-1).sum() / masked_BM.numel()


def torch_pixels(given: Pixels) -> Call:
    return pixel_call(given, all_patches)


def compiled_pixels(given: Pixels) -> Call:
    return pixel_call(given, torch.compile(all_patches, dynamic=False))


def clone(given: Pixels) -> Call:
    return clone_of(*costs(given.case, given.pred_BMC.element_size()), given.pred_BMC.device)


MASKED_PIXEL_LOSS = (
    Peer("ours", our_pixels),
    Peer("torch.clone, as many bytes", clone),
    Peer("torch", torch_pixels),
    Peer("torch, compiled", compiled_pixels, compiles=True),
)
