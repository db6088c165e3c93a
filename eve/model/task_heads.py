"""Heads of tasks: from what the encoder says of a sample to the classes of a task."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """linear, LayerNorm, GELU, linear: for VQA and NLVR2 in VLMo, EVE and BEiT-3, with their eps."""

    def __init__(self, width: int, hidden: int, num_classes: int, eps: float = 1e-5):
        super().__init__()
        self.dense = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.output = nn.Linear(hidden, num_classes)

    def forward(self, x_BD: Tensor) -> Tensor:
        """(B, D) -> (B, classes)."""
        return self.output(F.gelu(self.norm(self.dense(x_BD))))


class ImageClassifier(nn.Module):
    """Classes of images, from the mean of the patches, which has a norm of its own and the encoder none, or
    from the class token after the encoder's final norm (BEiT, MAE, timm)."""

    def __init__(self, width: int, num_classes: int, *, mean_pool: bool, eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps) if mean_pool else None
        self.output = nn.Linear(width, num_classes)

    def pool(self, images_BID: Tensor) -> Tensor:
        """Class token and patches (B, 1 + P, D) -> (B, D)."""
        return images_BID[:, 0] if self.norm is None else self.norm(images_BID[:, 1:].mean(1))

    def forward(self, images_BID: Tensor) -> Tensor:
        """(B, 1 + P, D) -> (B, classes)."""
        return self.output(self.pool(images_BID))
