"""Heads of tasks: from what the encoder says of a sample to the classes of a task."""

from __future__ import annotations

import torch
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


class Pooler(nn.Module):
    """LayerNorm, linear, tanh, of a class token (BEiT-3)."""

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=eps)
        self.dense = nn.Linear(width, width)

    def forward(self, class_BD: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return torch.tanh(self.dense(self.norm(class_BD)))


class BiAttention(nn.Module):
    """NLVR2 of EVE: two pairs, of one text with either image, look at each other; each is then pooled by
    attention, and both together give the classes. Its place is after the encoder's final norm."""

    def __init__(self, width: int, heads: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.left = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.right = nn.MultiheadAttention(width, heads, dropout, batch_first=True)
        self.fuse = nn.Linear(2 * width, width)
        self.score = nn.Linear(width, 1)
        self.output = nn.Linear(2 * width, num_classes)
        self.dropout = dropout

    def forward(self, left_BLD: Tensor, right_BLD: Tensor, keys_BL: Tensor) -> Tensor:
        """Tokens (B, L, D) of both pairs, where `keys_BL` (bool) are no padding -> (B, classes)."""
        parts = [
            self._pool(self._look(self.left, left_BLD, right_BLD, keys_BL), keys_BL),
            self._pool(self._look(self.right, right_BLD, left_BLD, keys_BL), keys_BL),
        ]
        return self.output(torch.cat(parts, dim=-1))

    def _look(self, attention: nn.Module, x_BLD: Tensor, other_BLD: Tensor, keys_BL: Tensor) -> Tensor:
        seen_BLD, _ = attention(x_BLD, other_BLD, other_BLD, key_padding_mask=~keys_BL, need_weights=False)
        fused_BLD = F.relu(self.fuse(torch.cat([seen_BLD, x_BLD], dim=-1)))
        return F.dropout(fused_BLD, self.dropout, self.training)

    def _pool(self, x_BLD: Tensor, keys_BL: Tensor) -> Tensor:
        score_BL = F.relu(self.score(x_BLD)).squeeze(-1).masked_fill(~keys_BL, -torch.inf)
        share_BL = F.dropout(score_BL.softmax(-1), self.dropout, self.training)
        return (share_BL[:, None] @ x_BLD).squeeze(1)
