"""Packed tokens: how the samples of a batch lie in one flat x_TD without padding.

All image tokens come first, sample by sample, then all text tokens, sample by sample:

    sample 0: I0 I1 I2 | T0 T1          x_TD rows:  I0 I1 I2 J0 J1 J2 | T0 T1 U0
    sample 1: J0 J1 J2 | U0

so a feed-forward of hard-routed modality experts and a LayerNorm with weights for each modality
work on two slices and copy nothing. Only attention needs samples together; it takes its rows
through the index tensors below (a gather each way, in sample-major order: image, then text).

Shape suffixes: T token, B sample, L longest sample, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy to a GPU that the host does not wait for: from pageable memory it would have to."""
    if torch.device(device).type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True)
class Rows:
    """A run of consecutive rows of x_TD, from `begin` on: image tokens, then text tokens."""

    begin: int
    num_image: int
    num_text: int
    modality_T: Tensor
    sample_T: Tensor


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of B samples lie. Made on the host from lengths, without a device sync.

    Attributes:
        held: the rows that this process holds between layers: all, but under sequence parallelism.
        num_samples: B.
        num_image, num_text: tokens of each modality; T is their sum.
        image_lengths, text_lengths: tokens of each sample.
        modality_T, sample_T: int64, modality (0 image, 1 text) and sample of each row.
        max_length: L, the longest sample.
        slot_T: int64, where row t stands in the (B * L) padded, sample-major order.
        row_S: int64 (B * L), the row of each padded slot; 0 where there is none.
        valid_BL: bool, the slot holds a token; None where all do.
        keys_BL: bool, the slot holds a token that others see; None where all do. It differs from `valid_BL`
            only for padding tokens, which other codes compute and hide (tools/verify_import.py).
        fused: all tokens take the third expert of `fusion` routers, instead of that of their modality.
        sorted_T, unsorted_T: int64, row of each token in sample-major order without padding, and
            the inverse.
        offsets_B1: int32 (B + 1), where each sample begins in that order.
        ends_M: int32 (2), end of the image rows and of the text rows of x_TD.
        text_position_N: int64, place of each text token in its text.
        seed_B: int64, key of each sample's random numbers (eve/random.py); None outside training.
    """

    held: Rows
    num_samples: int
    num_image: int
    num_text: int
    image_lengths: tuple[int, ...]
    text_lengths: tuple[int, ...]
    max_length: int
    modality_T: Tensor
    sample_T: Tensor
    slot_T: Tensor
    row_S: Tensor
    valid_BL: Tensor | None
    keys_BL: Tensor | None
    fused: bool
    sorted_T: Tensor
    unsorted_T: Tensor
    offsets_B1: Tensor
    ends_M: Tensor
    text_position_N: Tensor
    seed_B: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.num_image + self.num_text

    def rows(self, begin: int, end: int) -> Rows:
        """Rows begin to end (exclusive)."""
        num_image = max(0, min(end, self.num_image) - begin)
        return Rows(
            begin, num_image, end - begin - num_image, self.modality_T[begin:end], self.sample_T[begin:end]
        )

    @staticmethod
    def build(
        image_lengths: list[int],
        text_lengths: list[int],
        device: torch.device | str = "cpu",
        seed_B: Tensor | None = None,
        fused: bool = False,
        padding_N: Tensor | None = None,
    ) -> TokenLayout:
        """`padding_N` bool: text tokens that no token sees."""
        lengths = np.asarray([image_lengths, text_lengths], dtype=np.int64)
        num_samples = lengths.shape[1]
        per_sample = lengths.sum(0)
        longest = int(per_sample.max(initial=0))
        samples = [np.repeat(np.arange(num_samples), lengths[m]) for m in (0, 1)]
        sample = np.concatenate(samples)
        begin = np.cumsum(lengths, axis=1) - lengths
        within = [np.arange(lengths[m].sum()) - begin[m][samples[m]] for m in (0, 1)]
        text_position = within[1]
        # Text follows the image tokens of its sample.
        within[1] = within[1] + lengths[0][samples[1]]
        position = np.concatenate(within)
        offsets = np.concatenate([[0], np.cumsum(per_sample)])
        unsorted_ = offsets[sample] + position
        sorted_ = np.empty_like(unsorted_)
        sorted_[unsorted_] = np.arange(len(sample))
        slot = sample * longest + position
        row = np.zeros(num_samples * longest, dtype=np.int64)
        row[slot] = np.arange(len(sample))
        full = bool((per_sample == longest).all())
        valid = None if full else np.arange(longest)[None, :] < per_sample[:, None]
        keys = valid
        if padding_N is not None:
            keys = np.ones((num_samples, longest), dtype=bool) if valid is None else valid.copy()
            keys.flat[slot[lengths[0].sum() :][padding_N.numpy()]] = False

        def put(array: np.ndarray) -> Tensor:
            return to_device(torch.from_numpy(array), device)

        num_image = int(lengths[0].sum())
        modality_T = put((np.arange(len(sample)) >= num_image).astype(np.int64))
        sample_T = put(sample)
        return TokenLayout(
            held=Rows(0, num_image, len(sample) - num_image, modality_T, sample_T),
            num_samples=num_samples,
            num_image=num_image,
            num_text=len(sample) - num_image,
            image_lengths=tuple(image_lengths),
            text_lengths=tuple(text_lengths),
            max_length=longest,
            modality_T=modality_T,
            sample_T=sample_T,
            slot_T=put(slot),
            row_S=put(row),
            valid_BL=None if valid is None else put(valid),
            keys_BL=None if keys is None else put(keys),
            fused=fused,
            sorted_T=put(sorted_),
            unsorted_T=put(unsorted_),
            offsets_B1=put(offsets.astype(np.int32)),
            ends_M=put(np.asarray([num_image, len(sample)], dtype=np.int32)),
            text_position_N=put(text_position),
            seed_B=seed_B,
        )


class _Pad(torch.autograd.Function):
    """x_TW -> (B * L, W). Slots without a token hold a copy of row 0: attention masks them out, so
    no gradient comes back through them, and the backward is a plain gather."""

    @staticmethod
    def forward(ctx, x_TW: Tensor, row_S: Tensor, slot_T: Tensor) -> Tensor:
        ctx.save_for_backward(slot_T)
        return x_TW.index_select(0, row_S)

    @staticmethod
    def backward(ctx, grad_SW: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (slot_T,) = ctx.saved_tensors
        return grad_SW.index_select(0, slot_T), None, None


class _Unpad(torch.autograd.Function):
    """(B * L, W) -> x_TW. Slots without a token get a zero gradient."""

    @staticmethod
    def forward(ctx, x_SW: Tensor, slot_T: Tensor, row_S: Tensor, valid_BL: Tensor | None) -> Tensor:
        ctx.save_for_backward(row_S, valid_BL)
        return x_SW.index_select(0, slot_T)

    @staticmethod
    def backward(ctx, grad_TW: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        row_S, valid_BL = ctx.saved_tensors
        grad_SW = grad_TW.index_select(0, row_S)
        if valid_BL is not None:
            grad_SW.mul_(valid_BL.view(-1, 1))
        return grad_SW, None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward is the inverse gather instead of an atomic scatter."""

    @staticmethod
    def forward(ctx, x_TW: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_T)
        return x_TW.index_select(0, order_T)

    @staticmethod
    def backward(ctx, grad_TW: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (inverse_T,) = ctx.saved_tensors
        return grad_TW.index_select(0, inverse_T), None, None


def pad(x_TW: Tensor, layout: TokenLayout) -> Tensor:
    """(T, W) -> (B, L, W), sample-major."""
    x_SW = _Pad.apply(x_TW, layout.row_S, layout.slot_T)
    return x_SW.view(layout.num_samples, layout.max_length, -1)  # pyright: ignore


def unpad(x_BLW: Tensor, layout: TokenLayout) -> Tensor:
    """(B, L, W) -> (T, W)."""
    return _Unpad.apply(x_BLW.flatten(0, 1), layout.slot_T, layout.row_S, layout.valid_BL)  # pyright: ignore


def permute_rows(x_TW: Tensor, order_T: Tensor, inverse_T: Tensor) -> Tensor:
    """x_TW[order_T], where `inverse_T` is the inverse permutation."""
    return _Permute.apply(x_TW, order_T, inverse_T)  # pyright: ignore


def to_samples(x_TW: Tensor, layout: TokenLayout) -> Tensor:
    """Rows in sample-major order without padding, as variable-length attention wants them."""
    return permute_rows(x_TW, layout.sorted_T, layout.unsorted_T)


def from_samples(x_TW: Tensor, layout: TokenLayout) -> Tensor:
    return permute_rows(x_TW, layout.unsorted_T, layout.sorted_T)
