"""VLMo's recipes: published sizes, and stages that train what the paper says. Nothing is allocated."""

from __future__ import annotations

import pytest
import torch

from eve.config import load_recipe
from eve.conversion.checkpoint import Parameter
from eve.model import count_parameters
from eve.model.layers import Layers
from eve.model.model import VisionLanguageModel, parameter_shapes
from eve.training.optimizer import learning_names, parameter_groups

RECIPES = ("vlmo_tiny", "vlmo_base", "vlmo_base_plus", "vlmo_large")


@pytest.mark.parametrize(
    ("name", "millions", "layers", "width"),
    [("vlmo_base", 175.4, 12, 768), ("vlmo_base_plus", 166.7, 24, 544), ("vlmo_large", 561.5, 24, 1024)],
)
def test_encoder_has_the_published_size(name: str, millions: float, layers: int, width: int) -> None:
    """175M, 167M and 562M, without the heads of the objectives."""
    model = load_recipe(name).model
    found = count_parameters(model)
    assert round(found.encoder / 1e6, 1) == millions
    # By hand: attention, its biases, two experts and three of the top blocks, norms and gains of a block.
    top = {12: 2, 24: 3}[layers]
    expert = 2 * 4 * width * width + 5 * width + 2 * width
    block = 4 * width * width + 3 * width + 2 * width + (2 * width if model.layer_scale else 0)
    text = 30522 * width + 2 * width
    image = 3 * 16 * 16 * width + 2 * width
    positions = (196 + 197) * width if model.absolute_positions else layers * model.heads * (27**2 + 5 + 392)
    by_hand = layers * (block + 2 * expert) + top * expert + text + image + positions + 2 * width + 2 * width
    assert found.encoder == by_hand


@pytest.mark.parametrize("name", RECIPES)
def test_the_text_stage_leaves_attention_and_images_alone(name: str) -> None:
    recipe = load_recipe(name)
    stages = {stage.name: stage for stage in recipe.stages}
    assert list(stages)[-2:] == ["text", "pairs"]
    names = parameter_shapes(recipe.model)
    learning = learning_names(names, stages["text"].trainable)
    frozen = {name for name in names if not name.startswith("decoder.")} - set(learning)
    others = ("image_embedding", "contrast", "matching", "decoder")
    for part in ("attention", "norm1", "gamma", "experts.image", "experts.fusion", *others):
        assert not [name for name in learning if part in name], part
    for part in ("text_embedding", "experts.text", "norm2", "word_head", "relative_positions"):
        assert not [name for name in frozen if part in name], part
    assert set(learning_names(names, stages["pairs"].trainable)) == set(names)


@pytest.mark.parametrize("name", RECIPES)
def test_a_checkpoint_is_read_with_the_groups_of_the_optimizer(name: str) -> None:
    """Both say what decays, one of modules and one of names."""
    with torch.device("meta"):
        model = VisionLanguageModel(load_recipe(name).model, Layers())
    decaying = [g["params"] for g in parameter_groups(model, 0.1) if g["weight_decay"]]
    expected = {id(parameter) for group in decaying for parameter in group}
    for parameter_name, parameter in model.named_parameters():
        found = Parameter(parameter_name, tuple(parameter.shape), step=1).decays
        assert found == (id(parameter) in expected), parameter_name


@pytest.mark.parametrize("name", RECIPES)
def test_the_pair_stage_has_vlmos_losses(name: str) -> None:
    pairs, text = load_recipe(name).stages[-1].streams
    assert (pairs.objective, pairs.weight, pairs.matching_weight) == ("contrast_matching", 1, 1)
    assert (pairs.targets, pairs.negatives, pairs.pool) == ("masked", "global", "step")
    assert (text.objective, text.text_masking) == ("masked_text", "word")
    # So few steps as those of the tiny recipe want easier negatives and more words.
    few = name == "vlmo_tiny"
    assert (text.weight, text.text_ratio) == ((1, 0.5) if few else (0.25, 0.15))
    assert pairs.negative_hardness == (0.25 if few else 1)
