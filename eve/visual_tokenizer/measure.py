"""How well a visual tokenizer does on pictures it has not seen, against a predictor that has learned nothing.

Shape suffixes: B sample, P patch, F numbers of a target, K code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from eve.visual_tokenizer.model import VisualTokenizer

# Pictures -> what the teacher says of their patches (B, P, F).
Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class CodeUse:
    """`used` codes stand for at least one patch; `perplexity` is exp of the entropy of the codes: as many,
    all equally frequent, would carry as much."""

    used: int
    perplexity: float

    @staticmethod
    def of(count_K: Tensor) -> CodeUse:
        share_K = count_K.double() / count_K.sum().clamp_min(1)
        entropy = -torch.special.xlogy(share_K, share_K).sum()
        return CodeUse(int((count_K > 0).sum()), float(entropy.exp()))


@dataclass(frozen=True)
class HeldOut:
    """`error`: of the reconstruction. `trivial`: of one patch for all places, the best there is for these
    very pictures: the mean of their patches, or the mean direction of their features."""

    pictures: int
    error: float
    trivial: float
    use: CodeUse


@torch.no_grad()
def measure(tokenizer: VisualTokenizer, batches: Iterable[Tensor], teacher: Teacher | None = None) -> HeldOut:
    """`batches`: uint8 (B, 3, H, W), on the device of the tokenizer."""
    error = square = torch.zeros((), dtype=torch.float64)
    total_F = torch.zeros(tokenizer.config.target_width, dtype=torch.float64)
    count_K = torch.zeros(tokenizer.config.codes, dtype=torch.int64)
    pictures = 0
    for images_BCHW in batches:
        features_BPF = None if teacher is None else teacher(images_BCHW)
        result = tokenizer(images_BCHW, features_BPF)
        target_BPF = tokenizer.pixel_target(images_BCHW) if features_BPF is None else features_BPF
        if features_BPF is not None:
            target_BPF = F.normalize(target_BPF.float(), dim=-1)
        error = error + result.error.double().cpu() * len(images_BCHW)
        square = square + target_BPF.double().square().mean((1, 2)).sum().cpu()
        total_F += target_BPF.double().mean(1).sum(0).cpu()
        count_K += torch.bincount(result.codes_N, minlength=len(count_K)).cpu()
        pictures += len(images_BCHW)
    mean_F = total_F / pictures
    # 1 - the mean cosine with the best direction, or the mean squared deviation from the best patch.
    trivial = square / pictures - mean_F.square().mean() if teacher is None else 1 - mean_F.norm()
    return HeldOut(pictures, float(error / pictures), float(trivial), CodeUse.of(count_K))
