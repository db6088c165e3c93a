"""Masked codes against plain PyTorch on one sample at a time, and on several ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eve.config import ClassTokenHead, Decoder, FeedForward, Model, Stream
from eve.data.batch import Batch, Sample, collate
from eve.errors import UserError
from eve.model import VisionLanguageModel, build_model
from eve.objectives import Objective, build_objective
from eve.visual_tokenizer import Stack, VisualTokenizer, VisualTokenizerConfig
from tests.objectives.test_objectives import Words
from tests.rank_pool import RankPool
from tests.steps import OVERRIDES, engine_steps, plain_steps
from tests.tiny import tiny_recipe

CODES = 10
CONFIG = Model(
    image_size=12,
    patch_size=4,
    width=24,
    depth=3,
    heads=3,
    hidden=40,
    vocab_size=50,
    max_text_length=12,
    text_positions=16,
    init_std=0.2,
    drop_path=0.0,
    text_dropout=0.0,
    activation="gelu",
    relative_positions="shared",
    mask_token=True,
    visual_codes=CODES,
    decoder=Decoder(depth=0, width=16, heads=2),
    feed_forward=(FeedForward(blocks=(0, 1, 2), router="modality"),),
)
WITH_HEAD = CONFIG.model_copy(update={"class_token_head": ClassTokenHead(early=1, depth=1)})
OWN_HEAD = CONFIG.model_copy(update={"class_token_head": ClassTokenHead(early=2, depth=1, shared=False)})


def make_tokenizer(directory: Path, image_size: int, patch_size: int, codes: int) -> Path:
    """Untrained: codes of vectors that no step has moved."""
    small = Stack(depth=1, width=16, heads=2, hidden=16)
    config = VisualTokenizerConfig(
        image_size=image_size,
        patch_size=patch_size,
        codes=codes,
        code_width=4,
        encoder=small,
        decoder=small,
        init_std=0.3,
    )
    tokenizer = VisualTokenizer(config, seed=1)
    generator = torch.Generator().manual_seed(0)
    size = (20, 3, image_size, image_size)
    tokenizer.begin(torch.randint(0, 256, size, generator=generator, dtype=torch.uint8))
    tokenizer.save(directory)
    return directory


@pytest.fixture(scope="module")
def visual_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tokenizer(tmp_path_factory.mktemp("visual"), 12, 4, CODES))


def make_batch(objective: Objective, number: int = 5) -> Batch:
    rng = np.random.default_rng(0)
    samples = []
    for i in range(number):
        image = rng.integers(0, 256, (3, 12, 12), dtype=np.uint8)
        tokens = np.concatenate([[1], rng.integers(5, 50, rng.integers(2, 9)), [2]])
        sample = Sample(str(i), 0, i, int(rng.integers(1 << 60)), image, tokens)
        masks = {objective.name: objective.masking(Words)(sample, rng)}  # pyright: ignore
        samples.append(dataclasses.replace(sample, masks=masks))
    return collate(samples)


def hidden_states(model: VisionLanguageModel, sample: Sample, stream: str) -> tuple[torch.Tensor, ...]:
    """(after the norm, early, last) of the image tokens of one pair, its blocks called one by one."""
    encoder, config = model.encoder, model.config
    pixels = torch.from_numpy(sample.image_CHW)[None].float() / 127.5 - 1
    embedding = encoder.image_embedding
    weight = embedding.projection.weight.view(-1, 3, 4, 4)
    patches = F.conv2d(pixels, weight, embedding.projection.bias, stride=4)[0].flatten(1).t()
    assert embedding.mask_token is not None
    masked = set(sample.masks[stream]["masked_M"].tolist())
    rows = [embedding.mask_token if i in masked else patch for i, patch in enumerate(patches)]
    image = torch.stack([embedding.class_token, *rows]) + encoder.type_embedding[0]
    image = image + embedding.position  # pyright: ignore
    both = model.encode(
        images_BCHW=torch.from_numpy(sample.image_CHW)[None],
        tokens_N=torch.from_numpy(sample.tokens_N),
        text_lengths=[len(sample.tokens_N)],  # pyright: ignore
    )
    tokens = torch.from_numpy(sample.tokens_N)
    text = encoder.text_embedding(tokens, both.layout) + encoder.type_embedding[1]
    x = encoder.embedding_norm(torch.cat([image, text]))  # pyright: ignore
    index = encoder.relative_positions.index(both.layout, None)  # pyright: ignore
    states = [x]
    for number, block in enumerate(encoder.blocks):
        x, _ = block(x, both.layout, None, encoder.relative_positions(index, number))  # pyright: ignore
        states.append(x)
    early = 1 if config.class_token_head is None else config.class_token_head.early
    return tuple(state[:10] for state in (encoder.norm(x, both.layout), states[early], x))


@pytest.mark.parametrize("config", [CONFIG, WITH_HEAD, OWN_HEAD], ids=["plain", "shared head", "own head"])
def test_the_loss_is_the_mean_over_masked_patches_of_both_heads(config: Model, visual_tokenizer: str) -> None:
    stream = Stream(name="codes", source="pairs", objective="masked_codes")
    assert (stream.image_ratio, stream.image_masking, stream.image_input) == (0.4, "block", "mask_token")
    objective = build_objective(stream, config, visual_tokenizer=visual_tokenizer)
    batch, model = make_batch(objective), build_model(config, 1)
    output = objective(model, batch, objective.units(batch), 1.0)
    output.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    tokenizer = VisualTokenizer.load(visual_tokenizer)
    assert batch.images_BCHW is not None
    codes = tokenizer.encode(batch.images_BCHW)
    assert len(codes.unique()) > 2
    nats, again, hits = [], [], 0
    assert model.code_head is not None
    for i, sample in enumerate(batch.samples):
        normed, early, last = hidden_states(model, sample, "codes")
        assert len(sample.masks["codes"]["masked_M"]) == 4
        logits = normed @ model.code_head.weight.t() + model.code_head.bias
        second = None
        if config.class_token_head is not None:
            head = model.class_token_head
            assert head is not None
            bias = model.encoder.relative_positions  # pyright: ignore
            layout = model.encode(images_BCHW=batch.images_BCHW[:1]).layout
            x = torch.cat([last[:1], early[1:]])
            x, _ = head.blocks[0](x, layout, None, bias(bias.index_NN[:10, :10], 0))  # pyright: ignore
            x = (head.norm or model.encoder.norm)(x, layout)
            second = (head.codes or model.code_head)(x)
        for patch in sample.masks["codes"]["masked_M"]:
            target = int(codes[i, patch])
            nats.append(-logits[1 + patch].log_softmax(-1)[target])
            hits += int(logits[1 + patch].argmax() == target)
            if second is not None:
                again.append(-second[1 + patch].log_softmax(-1)[target])
    loss = torch.stack(nats).mean()
    assert float(output.metrics["loss"][0] / output.metrics["loss"][1]) == pytest.approx(
        float(loss.detach()), rel=1e-5
    )
    assert int(output.metrics["accuracy"][0]) == hits
    if again:
        loss = loss + torch.stack(again).mean()
    torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert "encoder.image_embedding.mask_token" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("objective", ["masked_codes", "masked_image", "masked_pair"])
def test_what_a_mask_token_stands_for_is_not_seen(objective: str, visual_tokenizer: str) -> None:
    """Other pixels under the mask leave what the encoder makes of the picture as it is."""
    target = "pixels" if objective == "masked_image" else "codes"
    stream = Stream.model_validate(
        {"name": "s", "source": "pairs", "objective": objective, "image_input": "mask_token"}
        | {"image_target": target, "image_ratio": 0.5, "image_masking": "random"}
    )
    built = build_objective(stream, WITH_HEAD, visual_tokenizer=visual_tokenizer)
    batch = make_batch(built, 3)
    changed = []
    for sample in batch.samples:
        assert sample.image_CHW is not None
        image = sample.image_CHW.copy()
        for patch in sample.masks["s"]["masked_M"]:
            row, column = divmod(int(patch), 3)
            image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
        changed.append(dataclasses.replace(sample, image_CHW=image))
    model = build_model(WITH_HEAD, 1).eval()
    states = []
    model.encoder.register_forward_hook(lambda module, inputs, output: states.append(output))
    for some in (batch, collate(changed)):
        built(model, some, built.units(some), 1.0)
    assert torch.equal(states[0].x_TD, states[1].x_TD)
    assert states[0].images_BID.shape[1] == 10, "all patches are encoded"


def test_pixels_from_mask_tokens_are_a_linear_map_of_the_masked_places() -> None:
    stream = Stream(name="s", source="pairs", objective="masked_image", image_input="mask_token")
    objective = build_objective(stream, CONFIG)
    batch, model = make_batch(objective), build_model(CONFIG, 1).eval()
    prediction = objective.predict(model, batch)  # pyright: ignore
    decoder = model.decoder
    assert decoder is not None
    for i, sample in enumerate(batch.samples):
        normed, *_ = hidden_states(model, sample, "s")
        x = decoder.embedding(normed) + decoder.positions
        expected = decoder.prediction(decoder.norm(x))[1:][torch.from_numpy(sample.masks["s"]["masked_M"])]
        torch.testing.assert_close(prediction.pred_BMC[i], expected, atol=1e-5, rtol=1e-4)


def test_a_masked_pair_of_codes_is_the_sum_of_the_two_means(visual_tokenizer: str) -> None:
    stream = Stream(name="s", source="pairs", objective="masked_pair", image_target="codes")
    assert (stream.text_ratio, stream.image_ratio, stream.image_masking) == (0.5, 0.4, "block")
    objective = build_objective(stream, CONFIG, visual_tokenizer=visual_tokenizer)
    batch, model = make_batch(objective), build_model(CONFIG, 1)
    units = objective.units(batch)
    assert units.tolist() == [20, sum(len(s.masks["s"]["target_N"]) for s in batch.samples)]
    output = objective(model, batch, units, 1.0)
    mean = {name: float(value / count) for name, (value, count) in output.metrics.items()}
    assert float(output.loss.detach()) == pytest.approx(mean["image_loss"] + mean["text_loss"], rel=1e-5)
    assert {"image_accuracy", "text_accuracy"} <= mean.keys()


TINY = (
    "model.mask_token=true",
    "model.visual_codes=12",
    "model.decoder={depth: 0, width: 16, heads: 2}",
    "model.class_token_head={early: 1, depth: 1}",
    "model.relative_positions=shared",
    *OVERRIDES,
)
STREAMS = (
    "stages.0.streams=[{name: codes, source: pairs, objective: masked_codes},"
    " {name: pair, source: pairs, objective: masked_pair, image_target: codes},"
    " {name: pixels, source: pairs, objective: masked_image, image_input: mask_token}]"
)


@pytest.mark.parametrize("more", [(), ("parallel.tensor=2",)], ids=["data 2", "tensor 2, sequence"])
def test_two_ranks_make_the_steps_of_one(
    more: tuple[str, ...], tiny: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    directory = make_tokenizer(tmp_path, 32, 8, 12)
    overrides = (*TINY, STREAMS, f"data.visual_tokenizer={directory}")
    plain = plain_steps(tiny_recipe(tiny, *overrides), 4, 2e-3)
    steps = two_ranks.run(engine_steps, tiny, (*overrides, *more), "zero1_fp32.json", 4, 2e-3)
    assert max(steps[0].difference(plain)) < 1e-5


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("model.mask_token=false",), "has image_input mask_token, but model.mask_token is false"),
        (("model.visual_codes=null", "model.class_token_head=null"), "but model.visual_codes is null"),
        (("data.visual_tokenizer=null",), "predicts codes, but data.visual_tokenizer is null"),
        (("model.relative_positions=blocks",), "needs model.relative_positions shared or none"),
        (("stages.0.streams.0.image_input=visible",), "codes are predicted from mask_token"),
        (("stages.0.streams.0.image_target=pixels",), "image_target is pixels, but masked_codes has codes"),
        (("stages.0.streams.2.image_input=visible",), "model.decoder.depth is 0"),
        (("model.decoder=null",), "predicts pixels, but model.decoder is null"),
    ],
)
def test_recipes_that_cannot_be_are_told(overrides: tuple[str, ...], sentence: str, tiny: Path) -> None:
    good = (*TINY, STREAMS, "data.visual_tokenizer=anywhere")
    tiny_recipe(tiny, *good)
    with pytest.raises(UserError, match=sentence):
        tiny_recipe(tiny, *good, *overrides)


def test_a_tokenizer_of_other_sizes_is_told(visual_tokenizer: str, tmp_path: Path) -> None:
    stream = Stream(name="codes", source="pairs", objective="masked_codes")
    with pytest.raises(UserError, match=r"has 10 codes, model.visual_codes is 11"):
        build_objective(
            stream, CONFIG.model_copy(update={"visual_codes": 11}), visual_tokenizer=visual_tokenizer
        )
    other = CONFIG.model_copy(update={"image_size": 24, "patch_size": 8})
    with pytest.raises(UserError, match=r"12 pixels in patches of 4, the model for images of 24 in patches"):
        build_objective(stream, other, visual_tokenizer=visual_tokenizer)
    with pytest.raises(UserError, match="is not a visual tokenizer"):
        build_objective(stream, CONFIG, visual_tokenizer=str(tmp_path))
