"""Self-attention over packed tokens: each token sees its own sample and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.model.layers import Layers
from eve.packing import TokenLayout, from_samples, pad, to_samples, unpad


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, layers: Layers):
        super().__init__()
        self.head_width = width // heads
        self.qkv = layers.qkv(width, width)
        self.proj = layers.row_linear(width, width)
        self.tokens = layers.tokens

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        """(T, D) -> (T, D). Logits and softmax are accumulated in fp32 by the kernels."""
        qkv = self.qkv(self.tokens.to_columns(x_TD, layout))
        half = qkv.dtype in (torch.float16, torch.bfloat16)
        out = self._varlen(qkv, layout) if qkv.is_cuda and half else self._padded(qkv, layout)
        return self.tokens.from_rows(self.proj(out), layout)

    def _varlen(self, qkv_TC: Tensor, layout: TokenLayout) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # CUDA builds only

        q, k, v = to_samples(qkv_TC, layout).view(qkv_TC.shape[0], 3, -1, self.head_width).unbind(1)
        offsets, longest = layout.offsets_B1, layout.max_length
        out_THK = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        return from_samples(out_THK.flatten(1), layout)  # pyright: ignore

    def _padded(self, qkv_TC: Tensor, layout: TokenLayout) -> Tensor:
        padded = pad(qkv_TC, layout)
        q, k, v = padded.unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)  # (B, H, L, K)
        mask = None if layout.valid_BL is None else layout.valid_BL[:, None, None, :]
        out_BHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return unpad(out_BHLK.transpose(1, 2).flatten(2), layout)
