"""Small random states in official layouts, by the names and shapes that those projects document."""

from __future__ import annotations

import torch
from torch import Tensor


class State(dict[str, Tensor]):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def put(self, name: str, *shape: int) -> None:
        self[name] = torch.randn(shape, generator=self._generator) * 0.5

    def layer(self, name: str, *shape: int) -> None:
        self.put(f"{name}.weight", *shape)
        self.put(f"{name}.bias", shape[0])


def _block(
    state: State, name: str, kinds: dict[str, str], width: int, hidden: int, layer_scale: bool
) -> None:
    """`kinds`: feed-forwards and the norm before each."""
    state.layer(f"{name}.norm1", width)
    state.put(f"{name}.attn.q_bias", width)
    state.put(f"{name}.attn.v_bias", width)
    state.put(f"{name}.attn.qkv.weight", 3 * width, width)
    state.layer(f"{name}.attn.proj", width, width)
    for mlp, norm in kinds.items():
        state.layer(f"{name}.{norm}", width)
        state.layer(f"{name}.{mlp}.fc1", hidden, width)
        state.layer(f"{name}.{mlp}.fc2", width, hidden)
    if layer_scale:
        state.put(f"{name}.gamma_1", width)
        state.put(f"{name}.gamma_2", width)


def vlmo_state(
    *,
    relative: bool = True,
    fusion_from: int = 1,
    layer_scale: bool = True,
    types: int = 2,
    width: int = 16,
    depth: int = 2,
    heads: int = 2,
    side: int = 3,
    patch: int = 4,
    words: int = 24,
    length: int = 6,
    table_length: int = 9,
    pretraining: bool = True,
    classes: int = 0,
) -> State:
    """VLMo of `depth` blocks, with experts of pairs from `fusion_from` on; what has no place of its own here
    (VLMo's docstring) is zero."""
    state, hidden = State(), 3 * width
    state.put("transformer.cls_token", 1, 1, width)
    state.put("transformer.patch_embed.proj.weight", width, 3, patch, patch)
    state.put("transformer.patch_embed.proj.bias", width)
    for block in range(depth):
        kinds = {"mlp_text": "norm2_text", "mlp_imag": "norm2_imag"}
        if block >= fusion_from:
            kinds["mlp_vl"] = "norm2_vl"
        _block(state, f"transformer.blocks.{block}", kinds, width, hidden, layer_scale)
    state.layer("transformer.norm", width)
    state["text_embeddings.position_ids"] = torch.arange(length)[None]
    state.put("text_embeddings.word_embeddings.weight", words, width)
    state.put("text_embeddings.position_embeddings.weight", length, width)
    state["text_embeddings.token_type_embeddings.weight"] = torch.zeros(2, width)
    state.layer("text_embeddings.LayerNorm", width)
    state.put("token_type_embeddings.weight", types, width)
    if relative:
        state.put("relative_position_bias_table", (2 * side - 1) ** 2 + 5 + 2 * table_length, heads * depth)
        state["text_embeddings.position_embeddings.weight"].zero_()
    else:
        state.put("transformer.pos_embed", 1, side * side + 1, width)
    if pretraining:
        state.put("logit_scale")
        state.put("logit_vl_scale")
        for name in ("itc_text_proj", "itc_image_proj", "itc_vl_text_proj", "itc_vl_image_proj"):
            state.put(f"{name}.fc.weight", width, width)
        state.layer("pooler.dense", width, width)
        state.layer("itm_score.fc", 2, width)
        state.put("mlm_score.bias", words)
        state.layer("mlm_score.transform.dense", width, width)
        state.layer("mlm_score.transform.LayerNorm", width)
        state.put("mlm_score.decoder.weight", words, width)
    if classes:
        state.layer("vqa_classifier.0", 2 * width, width)
        state.layer("vqa_classifier.1", 2 * width)
        state.layer("vqa_classifier.3", classes, 2 * width)
    return state


def beit_state(
    *,
    positions: str = "shared",
    absolute: bool = False,
    layer_scale: bool = True,
    codes: int = 0,
    classes: int = 0,
    mean_pool: bool = True,
    width: int = 16,
    depth: int = 2,
    heads: int = 2,
    side: int = 3,
    patch: int = 4,
) -> State:
    """BEiT with one table of relative positions (`shared`), one for each block (`blocks`), or `none`; with a
    head for visual codes, or of classes."""
    state, hidden, rows = State(1), 3 * width, (2 * side - 1) ** 2 + 3
    state.put("cls_token", 1, 1, width)
    state.put("patch_embed.proj.weight", width, 3, patch, patch)
    state.put("patch_embed.proj.bias", width)
    if absolute:
        state.put("pos_embed", 1, side * side + 1, width)
    if positions == "shared":
        state.put("rel_pos_bias.relative_position_bias_table", rows, heads)
    for block in range(depth):
        _block(state, f"blocks.{block}", {"mlp": "norm2"}, width, hidden, layer_scale)
        if positions == "blocks":
            state.put(f"blocks.{block}.attn.relative_position_bias_table", rows, heads)
            size = side * side + 1
            state[f"blocks.{block}.attn.relative_position_index"] = torch.zeros(size, size, dtype=torch.int64)
    if codes:
        state.put("mask_token", 1, 1, width)
        state.layer("lm_head", codes, width)
    if codes or not mean_pool:
        state.layer("norm", width)
    if classes:
        state.layer("head", classes, width)
        if mean_pool:
            state.layer("fc_norm", width)
    return state
