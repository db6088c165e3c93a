"""What a stream is said to use is what autograd finds it to use."""

import dataclasses

import numpy as np
import pytest

from eve.config import FeedForward, Model, Stream
from eve.data.batch import Sample, collate
from eve.objectives import build_objective
from eve.objectives.coverage import uses
from tests.model.test_encoder import model_with_random_parameters
from tests.objectives.test_masked_codes import CODES, make_tokenizer
from tests.objectives.test_objectives import Words

POOL = {"modality_vector": "none", "renormalise": False, "k": 1}
SIZES = {
    "image_size": 12,
    "patch_size": 4,
    "width": 24,
    "depth": 4,
    "heads": 3,
    "hidden": 40,
    "vocab_size": 50,
    "max_text_length": 12,
    "text_positions": 16,
    "decoder": {"depth": 1, "width": 16, "heads": 2},
    "contrast": {"width": 8, "paths": ["modality", "fusion"]},
    "matching": {},
    "mask_token": True,
    "visual_codes": CODES,
    "class_token_head": {"early": 1, "depth": 1, "shared": False},
    "relative_positions": "shared",
}
MODELS = {
    "vlmo": (FeedForward(blocks=(0, 1), router="modality"), FeedForward(blocks=(2, 3), router="fusion")),
    "vl-moe": (
        FeedForward(blocks=(0,), router="modality"),
        FeedForward(blocks=(1,), router="topk", experts_by_modality=(2, 3), **POOL),
        FeedForward(blocks=(2,), router="fusion"),
        FeedForward(blocks=(3,), router="topk", experts_by_modality=(2, 3), fusion_expert=True, **POOL),
    ),
    "momo": (FeedForward(blocks=(0, 1, 2, 3), router="shared"),),
}
CASES = [
    ("pair", {"objective": "masked_image"}),
    ("image", {"objective": "masked_image"}),
    ("pair", {"objective": "masked_image", "image_input": "mask_token"}),
    ("pair", {"objective": "masked_text"}),
    ("text", {"objective": "masked_text"}),
    ("pair", {"objective": "masked_pair"}),
    ("pair", {"objective": "masked_pair", "image_target": "codes"}),
    ("pair", {"objective": "masked_codes"}),
    ("image", {"objective": "masked_codes"}),
    ("pair", {"objective": "contrast"}),
    ("pair", {"objective": "matching"}),
    ("pair", {"objective": "contrast_matching"}),
]


def make_batch(objective, kind):
    rng = np.random.default_rng(0)
    samples = []
    for i in range(6):
        image = rng.integers(0, 256, (3, 12, 12), dtype=np.uint8) if kind != "text" else None
        tokens = np.concatenate([[1], rng.integers(5, 50, 6), [2]]) if kind != "image" else None
        sample = Sample(str(i), 0, i, int(rng.integers(1 << 60)), image, tokens)
        samples.append(dataclasses.replace(sample, masks={"s": objective.masking(Words)(sample, rng)}))
    return collate(samples)


@pytest.fixture(scope="module")
def visual_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("visual"), 12, 4, CODES))


@pytest.mark.parametrize(("kind", "settings"), CASES)
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("feed_forward", MODELS)
def test_parameters_with_a_gradient(feed_forward, separate, kind, settings, visual_tokenizer):
    attention = {"attention": "modality", "key_bias": True} if separate else {}
    config = Model(feed_forward=MODELS[feed_forward], **SIZES, **attention)
    model = model_with_random_parameters(config).train()
    stream = Stream(name="s", source="s", **settings)
    objective = build_objective(stream, config, visual_tokenizer=visual_tokenizer)
    batch = make_batch(objective, kind)
    objective(model, batch, objective.units(batch), 1.0).loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == uses(stream, kind, config, name), name


def test_a_stage_leaves_alone_what_it_does_not_use():
    """The images' experts of the top block in a model of pairs alone."""
    config = Model(feed_forward=MODELS["vlmo"], **SIZES)
    stream = Stream(name="s", source="s", objective="masked_text")
    name = "encoder.blocks.3.feed_forward.experts.{}.w1_DF"
    assert [uses(stream, "pair", config, name.format(kind)) for kind in ("image", "text", "fusion")] == [
        False,
        False,
        True,
    ]
