"""Other pixel statistics than ours. We take mean = std = 0.5, others ImageNet's; a patch projection absorbs
the difference exactly.

Shape suffixes: B sample, C colour, H row, W column, D width, K pixel of a patch (colour, row, column).
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def fold_statistics(
    weight_DK: Tensor, bias_D: Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """A projection of pixels (v - mean) / std as one of pixels (v - 0.5) / 0.5, v in [0, 1]."""
    weight_DCK = weight_DK.double().unflatten(1, (len(mean), -1))
    mean_C1, std_C1 = (torch.tensor(value, dtype=torch.float64)[:, None] for value in (mean, std))
    bias_D = bias_D.double() + (weight_DCK * ((0.5 - mean_C1) / std_C1)).sum((1, 2))
    return (weight_DCK * (0.5 / std_C1)).flatten(1).float(), bias_D.float()


def to_our_statistics(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(v - mean) / std -> (v - 0.5) / 0.5."""
    mean_C11, std_C11 = (torch.tensor(value)[:, None, None] for value in (mean, std))
    return (images_BCHW * std_C11 + mean_C11 - 0.5) / 0.5
