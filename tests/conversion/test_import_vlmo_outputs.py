"""VLMo's layout: the imported model computes what VLMo does, written here once more in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eve.conversion.foreign.formats import import_state
from tests.conversion.official import State, vlmo_state
from tools.import_checks.trace import texts


class Plain:
    """Text before image; `fusion_from`: the first block with an expert of pairs."""

    def __init__(self, state: State, *, heads: int, depth: int, side: int, fusion_from: int, longest: int):
        self.get = {name: t.double() if t.is_floating_point() else t for name, t in state.items()}
        self.heads, self.depth, self.side, self.fusion_from = heads, depth, side, fusion_from
        self.longest = longest

    def norm(self, x: Tensor, name: str, eps: float = 1e-6) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.get[f"{name}.weight"], self.get[f"{name}.bias"], eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.get[f"{name}.weight"], self.get.get(f"{name}.bias"))

    def embed_text(self, ids: Tensor) -> Tensor:
        x = self.get["text_embeddings.word_embeddings.weight"][ids]
        x = x + self.get["text_embeddings.token_type_embeddings.weight"][0]
        if "relative_position_bias_table" not in self.get:
            x = x + self.get["text_embeddings.position_embeddings.weight"][: ids.shape[1]]
        return self.norm(x, "text_embeddings.LayerNorm", 1e-12) + self.get["token_type_embeddings.weight"][0]

    def embed_image(self, images: Tensor, row: int = 1) -> Tensor:
        weight, bias = (self.get[f"transformer.patch_embed.proj.{part}"] for part in ("weight", "bias"))
        x = F.conv2d(images.double(), weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
        x = torch.cat([self.get["transformer.cls_token"].expand(len(x), -1, -1), x], dim=1)
        return x + self.get.get("transformer.pos_embed", 0.0) + self.get["token_type_embeddings.weight"][row]

    def rows(self, num_text: int, num_image: int) -> Tensor:
        """Of the table of relative positions, for each query and key."""
        span = 2 * self.side - 1
        first_text = span * span + 3 + 2
        rows = torch.zeros(num_text + num_image, num_text + num_image, dtype=torch.int64)
        for q in range(len(rows)):
            for k in range(len(rows)):
                i, j = q - num_text, k - num_text
                if i < 0 and j < 0:
                    last = first_text + 2 * self.longest - 3
                    row = last + (0 if k else 1 if q else 2)
                    if q and k:
                        row = first_text + k - q + self.longest - 2
                elif i < 0 or j < 0:
                    row = span * span + 3 + (0 if i < 0 else 1)
                elif i and j:
                    down = (i - 1) // self.side - (j - 1) // self.side + self.side - 1
                    across = (i - 1) % self.side - (j - 1) % self.side + self.side - 1
                    row = down * span + across
                else:
                    row = span * span + (0 if j else 1 if i else 2)
                rows[q, k] = row
        return rows

    def attention(self, x: Tensor, block: int, rows: Tensor, real: Tensor) -> Tensor:
        name = f"transformer.blocks.{block}.attn"
        q_bias, v_bias = self.get[f"{name}.q_bias"], self.get[f"{name}.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        qkv = F.linear(x, self.get[f"{name}.qkv.weight"], bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        if "relative_position_bias_table" in self.get:
            table = self.get["relative_position_bias_table"]
            columns = slice(block * self.heads, (block + 1) * self.heads)
            logits = logits + table[rows][..., columns].permute(2, 0, 1)
        logits = logits.masked_fill(~real[:, None, None], -torch.inf)
        return self.linear((logits.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{name}.proj")

    def block(self, x: Tensor, block: int, kinds: list[tuple[str, slice]], *given: Tensor) -> Tensor:
        name = f"transformer.blocks.{block}"
        x = x + self.get.get(f"{name}.gamma_1", 1.0) * self.attention(
            self.norm(x, f"{name}.norm1"), block, *given
        )
        parts = []
        for kind, where in kinds:
            hidden = self.norm(x[:, where], f"{name}.norm2_{kind}")
            hidden = self.linear(
                F.gelu(self.linear(hidden, f"{name}.mlp_{kind}.fc1")), f"{name}.mlp_{kind}.fc2"
            )
            parts.append(x[:, where] + self.get.get(f"{name}.gamma_2", 1.0) * hidden)
        return torch.cat(parts, dim=1)

    def pair(self, ids: Tensor, real: Tensor, images: Tensor, row: int = 1) -> Tensor:
        x = torch.cat([self.embed_text(ids), self.embed_image(images, row)], dim=1)
        num_text = ids.shape[1]
        rows = self.rows(num_text, x.shape[1] - num_text)
        real = torch.cat([real, torch.ones(len(x), x.shape[1] - num_text, dtype=torch.bool)], dim=1)
        for block in range(self.depth):
            kinds = [("text", slice(0, num_text)), ("imag", slice(num_text, None))]
            if block >= self.fusion_from:
                kinds = [("vl", slice(None))]
            x = self.block(x, block, kinds, rows, real)
        return self.norm(x, "transformer.norm")

    def alone(self, x: Tensor, kind: str, real: Tensor) -> tuple[Tensor, Tensor]:
        """Through the experts of the modality, and in the top blocks through those of pairs."""
        rows = self.rows(x.shape[1], 0) if kind == "text" else self.rows(0, x.shape[1])
        fused = x
        for block in range(self.depth):
            top = "vl" if block >= self.fusion_from else kind
            fused = self.block(fused, block, [(top, slice(None))], rows, real)
            x = self.block(x, block, [(kind, slice(None))], rows, real)
        return self.norm(x, "transformer.norm"), self.norm(fused, "transformer.norm")

    def vector(self, x: Tensor, head: str) -> Tensor:
        return F.normalize(self.linear(x[:, 0], f"{head}.fc"), dim=-1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative": False, "layer_scale": False, "fusion_from": 0},
        {
            "width": 30,
            "heads": 3,
            "depth": 3,
            "side": 2,
            "patch": 5,
            "length": 7,
            "types": 3,
            "fusion_from": 2,
        },
    ],
)
def test_the_imported_model_computes_the_same(options: dict[str, Any]) -> None:
    state = vlmo_state(**options)
    state.put("text_embeddings.token_type_embeddings.weight", 2, options.get("width", 16))
    side, patch, length = options.get("side", 3), options.get("patch", 4), options.get("length", 6)
    sizes = {"heads": options.get("heads", 2), "depth": options.get("depth", 2)}
    plain = Plain(state, **sizes, side=side, fusion_from=options.get("fusion_from", 1), longest=9)
    imported = import_state(state, "vlmo", {"heads": sizes["heads"], "image_size": side * patch})
    model = imported.build()
    seeded = torch.Generator().manual_seed(6)
    images = torch.rand(3, 3, side * patch, side * patch, generator=seeded) * 2 - 1
    ids = torch.randint(0, 24, (3, length), generator=seeded)
    real = torch.arange(length) < torch.tensor([length, 2, 4])[:, None]
    text = texts(ids, ~real)
    with torch.no_grad():
        for row in range(1, model.config.num_types):
            pair = model.encode(images_BCHW=images, image_type=row, **text)
            expected = plain.pair(ids, real, images, row)
            close(pair.texts_ND.view(3, length, -1), expected[:, :length])
            close(pair.images_BID, expected[:, length:])
        head = model.contrast
        assert head is not None
        words, fused_words = plain.alone(plain.embed_text(ids), "text", real)
        everywhere = torch.ones(3, side * side + 1, dtype=torch.bool)
        pixels, fused_pixels = plain.alone(plain.embed_image(images), "imag", everywhere)
        found_text = model.encode(both_paths=True, **text)
        found_image = model.encode(both_paths=True, images_BCHW=images)
        close(found_text.texts_ND.view(3, length, -1), words)
        close(found_image.images_BID, pixels)
        assert found_text.fusion is not None
        assert found_image.fusion is not None
        vector = head.project_texts(found_text.fusion.text_class_BD, "fusion")
        close(vector, plain.vector(fused_words, "itc_vl_text_proj"))
        vector = head.project_images(found_image.fusion.image_class_BD, "fusion")
        close(vector, plain.vector(fused_pixels, "itc_vl_image_proj"))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)
