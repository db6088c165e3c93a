"""Self-attention over packed tokens: each token sees its own sample and nothing else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eve.config import Model
from eve.model.layers import Layers, ModalityNorm, Norm
from eve.packing import TokenLayout, from_samples, pad, to_samples, unpad


class ByModality(nn.Module):
    """One layer for image tokens, one for text tokens; x_TD holds the image tokens first (eve/packing.py)."""

    def __init__(self, image: nn.Module, text: nn.Module):
        super().__init__()
        self.image, self.text = image, text

    def forward(self, x_TD: Tensor, layout: TokenLayout) -> Tensor:
        image, text = x_TD.split([layout.num_image, layout.num_text])
        parts = [layer(part) for layer, part in ((self.image, image), (self.text, text)) if part.shape[0]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, config: Model, layers: Layers):
        """`config` gives the variant; width and heads may be those of the decoder."""
        super().__init__()
        self.head_width = width // heads
        self.by_modality = config.attention == "modality"
        if self.by_modality:
            self.qkv = ByModality(*(layers.qkv(width, width, config.key_bias) for _ in range(2)))
            self.proj = ByModality(*(layers.row_linear(width, width) for _ in range(2)))
        else:
            self.qkv = layers.qkv(width, width, config.key_bias)
            self.proj = layers.row_linear(width, width)
        self.sub_norm: nn.Module | None = None
        if config.sub_norm:
            norm = ModalityNorm if self.by_modality else Norm
            self.sub_norm = norm(width, eps=config.norm_eps)
        self.tokens = layers.tokens

    def forward(self, x_TD: Tensor, layout: TokenLayout, bias: Tensor | None = None) -> Tensor:
        """(T, D) -> (T, D). Logits and softmax are accumulated in fp32 by the kernels.

        `bias` (H, L, L) or (B, H, L, L) is added to the logits of the slots of each sample.
        """
        x_TD = self.tokens.to_columns(x_TD, layout)
        qkv = self.qkv(x_TD, layout) if self.by_modality else self.qkv(x_TD)
        half = qkv.dtype in (torch.float16, torch.bfloat16)
        if qkv.is_cuda and half and bias is None:
            out = self._varlen(qkv, layout)
        else:
            out = self._padded(qkv, layout, bias)
        if self.sub_norm is not None:
            out = self.sub_norm(out, layout)
        out = self.proj(out, layout) if self.by_modality else self.proj(out)
        return self.tokens.from_rows(out, layout)

    def _varlen(self, qkv_TC: Tensor, layout: TokenLayout) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn  # CUDA builds only

        q, k, v = to_samples(qkv_TC, layout).view(qkv_TC.shape[0], 3, -1, self.head_width).unbind(1)
        offsets, longest = layout.offsets_B1, layout.max_length
        out_THK = varlen_attn(q, k, v, offsets, offsets, longest, longest)
        return from_samples(out_THK.flatten(1), layout)  # pyright: ignore

    def _padded(self, qkv_TC: Tensor, layout: TokenLayout, bias: Tensor | None) -> Tensor:
        padded = pad(qkv_TC, layout)
        q, k, v = padded.unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)  # (B, H, L, K)
        mask = None if layout.keys_BL is None else layout.keys_BL[:, None, None, :]
        if bias is not None:
            mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).where(mask, -torch.inf)
        out_BHLK = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return unpad(out_BHLK.transpose(1, 2).flatten(2), layout)
