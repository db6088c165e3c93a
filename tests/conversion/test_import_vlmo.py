"""VLMo's layout: every tensor comes back bit for bit, and what does not fit is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from eve.conversion.foreign.formats import FORMATS, Imported, import_state
from eve.errors import UserError
from tests.conversion.official import State, vlmo_state

SIZES = {"image_size": 12, "heads": 2}


def exported(imported: Imported) -> dict[str, torch.Tensor]:
    state = FORMATS["vlmo"].state
    assert state is not None
    return state({name: p.detach() for name, p in imported.build().named_parameters()}, imported.model)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"relative": False, "layer_scale": False},
        {"fusion_from": 0, "types": 3},
        {"fusion_from": 2, "relative": False, "types": 3},
        {"width": 24, "heads": 3, "depth": 4, "side": 4, "patch": 2, "length": 9},
    ],
)
def test_there_and_back_is_bit_for_bit(options: dict[str, Any]) -> None:
    official = vlmo_state(**options)
    sizes = {"heads": options.get("heads", 2)}
    if options.get("relative", True):
        sizes["image_size"] = options.get("side", 3) * options.get("patch", 4)
    imported = import_state(official, "vlmo", sizes)
    assert imported.lacking == []
    back = exported(imported)
    assert back.keys() == official.keys()
    for name, tensor in official.items():
        assert back[name].dtype == tensor.dtype, name
        assert torch.equal(back[name], tensor), name


def test_what_follows_from_names_and_shapes() -> None:
    model = import_state(vlmo_state(fusion_from=1), "vlmo", {"image_size": 12}).model
    assert [model.feed_forward_of(block).router for block in range(2)] == ["modality", "fusion"]
    assert (model.width, model.depth, model.heads, model.hidden) == (16, 2, 2, 48)
    assert (model.patch_size, model.image_size, model.vocab_size) == (4, 12, 24)
    assert (model.text_positions, model.max_text_length) == (9, 6)
    assert model.relative_positions == "blocks"
    assert not model.absolute_positions
    assert model.contrast is not None
    assert model.contrast.paths == ("modality", "fusion")


def test_the_picture_follows_from_the_official_length_of_text_or_the_buffer() -> None:
    official = vlmo_state(table_length=196)
    assert import_state(official, "vlmo").model.image_size == 12
    unusual = vlmo_state()
    with pytest.raises(UserError, match=r"has 48 rows, which is no picture.*; say image_size"):
        import_state(unusual, "vlmo")
    unusual["relative_position_index"] = torch.zeros(10, 10, dtype=torch.int64)
    model = import_state(unusual, "vlmo").model
    assert (model.image_size, model.text_positions) == (12, 9)


def test_heads_that_do_not_show_are_those_of_the_official_models() -> None:
    for width, heads in ((768, 12), (544, 16), (1024, 16), (1280, 16)):
        official = vlmo_state(relative=False, width=width, depth=1, words=8)
        assert import_state(official, "vlmo").model.heads == heads
    with pytest.raises(UserError, match="how many heads a model of width 16 has does not show; say heads"):
        import_state(vlmo_state(relative=False), "vlmo")


def test_classifiers_are_heads_of_tasks() -> None:
    official = vlmo_state(pretraining=False, classes=5)
    imported = import_state(official, "vlmo", SIZES)
    assert imported.model.contrast is None
    assert imported.model.matching is None
    assert "word_head.output.weight" in imported.lacking
    x_BD = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    layer = {key.removeprefix("vqa_classifier."): value for key, value in official.items()}
    hidden = F.layer_norm(
        x_BD @ layer["0.weight"].T + layer["0.bias"], (32,), layer["1.weight"], layer["1.bias"]
    )
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    expected = hidden @ layer["3.weight"].T + layer["3.bias"]
    torch.testing.assert_close(imported.heads["vqa"](x_BD), expected, rtol=1e-5, atol=1e-5)


def without(name: str) -> State:
    official = vlmo_state()
    del official[name]
    return official


def with_(name: str, tensor: torch.Tensor) -> State:
    official = vlmo_state()
    official[name] = tensor
    return official


@pytest.mark.parametrize(
    ("official", "sentence"),
    [
        (without("transformer.blocks.1.norm1.bias"), "has no transformer.blocks.1.norm1.bias"),
        (without("itc_image_proj.fc.weight"), "has no itc_image_proj.fc.weight"),
        (without("transformer.patch_embed.proj.weight"), "has no transformer.patch_embed.proj.weight"),
        (
            with_("transformer.blocks.0.mlp_audio.fc1.bias", torch.ones(3)),
            "unknown name .*mlp_audio.fc1.bias",
        ),
        (with_("mlm_score.bias", torch.ones(7)), r"mlm_score.bias is \(7,\), expected \(24,\)"),
        (with_("mlm_score.bias", torch.full((24,), torch.inf)), "mlm_score.bias has values that are not fin"),
        (with_("transformer.blocks.4.norm1.bias", torch.ones(16)), "has no transformer.blocks.2, but .*4"),
    ],
)
def test_names_and_shapes_that_do_not_fit_are_named(official: State, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        import_state(official, "vlmo", SIZES, where="file.pt")


def test_all_missing_names_are_told_together() -> None:
    official = vlmo_state()
    for name in ("transformer.norm.bias", "transformer.norm.weight", "pooler.dense.bias"):
        del official[name]
    with pytest.raises(
        UserError, match=r"no pooler\.dense\.bias, transformer\.norm\.bias, transformer\.norm\.weight;"
    ):
        import_state(official, "vlmo", SIZES)


def test_ignored_names_are_left_out_or_start_anew() -> None:
    official = with_("ema.decay", torch.ones(1))
    del official["transformer.blocks.0.mlp_text.fc1.bias"]
    patterns = ["ema.*", "*.0.mlp_text.*"]
    imported = import_state(official, "vlmo", SIZES, ignore=patterns)
    expert = "encoder.blocks.0.feed_forward.experts.text"
    assert imported.lacking == [f"{expert}.{part}" for part in ("w1_DF", "b1_F", "w2_FD", "b2_D")]
    model = {name: p.detach() for name, p in imported.build(seed=3).named_parameters()}
    image = model["encoder.blocks.0.feed_forward.experts.image.b1_F"]
    assert torch.equal(image, official["transformer.blocks.0.mlp_imag.fc1.bias"])
    assert not model[f"{expert}.b1_F"].count_nonzero()
    assert 0 < float(model[f"{expert}.w1_DF"].abs().max()) <= imported.model.init_std


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(UserError, match="depth is no size of the format vlmo; those are heads, image_size"):
        import_state(vlmo_state(), "vlmo", {"depth": 3})


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("activation", "quick_gelu", "model.activation is not gelu"),
        ("mask_token", True, "model.mask_token is set"),
        ("relative_positions", "shared", "model.relative_positions is shared"),
        ("relative_positions", "none", "both absolute and relative positions, or neither"),
    ],
)
def test_models_that_the_layout_has_no_place_for(key: str, value: Any, sentence: str) -> None:
    imported = import_state(vlmo_state(), "vlmo", SIZES)
    model = imported.model.model_copy(update={key: value})
    state = FORMATS["vlmo"].state
    assert state is not None
    with pytest.raises(UserError, match=sentence):
        state(imported.weights, model)
