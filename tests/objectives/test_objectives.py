"""Losses against formulas on a whole batch; micro-batches and ranks add up to it."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eve.config import Decoder, FeedForward, Model, Stream
from eve.data.batch import Sample, collate
from eve.model import build_model
from eve.objectives import PretrainModule, build_objective


class Words:
    """The facts of a tokenizer that masking asks for."""

    mask_id = 3
    special_V = np.arange(50) < 5
    word_start_V = np.ones(50, dtype=bool)


CONFIG = Model(
    image_size=12,
    patch_size=4,
    width=24,
    depth=2,
    heads=3,
    hidden=40,
    vocab_size=50,
    max_text_length=12,
    text_positions=16,
    init_std=0.2,
    drop_path=0.2,
    decoder=Decoder(depth=1, width=16, heads=2),
    feed_forward=(
        FeedForward(blocks=(0,), router="modality"),
        FeedForward(blocks=(1,), router="topk", num_experts=4, load_balance_weight=0.0),
    ),
)
STREAMS = [
    Stream(name="image", source="pairs", objective="masked_image"),
    Stream(name="raw", source="pairs", objective="masked_image", normalise_pixels=False),
    Stream(name="text", source="pairs", objective="masked_text"),
    Stream(name="both", source="pairs", objective="masked_pair"),
]


def make_samples(number=6):
    rng = np.random.default_rng(0)
    objectives = {s.name: build_objective(s, CONFIG) for s in STREAMS}
    samples = []
    for i in range(number):
        image = rng.integers(0, 256, (3, 12, 12), dtype=np.uint8)
        tokens = np.concatenate([[1], rng.integers(5, 50, rng.integers(2, 9)), [2]])
        sample = Sample(str(i), 0, i, int(rng.integers(1 << 60)), image, tokens)
        masks = {name: objective.masking(Words)(sample, rng) for name, objective in objectives.items()}
        samples.append(dataclasses.replace(sample, masks=masks))
    return objectives, samples


@pytest.mark.parametrize("stream", [s.name for s in STREAMS])
def test_micro_batches_add_up_to_the_whole_batch(stream):
    objectives, samples = make_samples()
    gradients, losses = [], []
    for cuts in ([0, 6], [0, 1, 4, 6]):
        module = PretrainModule(build_model(CONFIG, 1), objectives).train()
        batches = [collate(samples[a:b]) for a, b in itertools.pairwise(cuts)]
        units = sum(objectives[stream].units(batch) for batch in batches)
        outputs = [module(stream, batch, units) for batch in batches]
        torch.stack([output.loss for output in outputs]).sum().backward()
        losses.append(sum(output.loss.item() for output in outputs))
        gradients.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("stream", ["image", "raw"])
def test_masked_image_loss_is_the_mean_over_masked_patches(stream):
    objectives, samples = make_samples()
    model, batch = build_model(CONFIG, 1).eval(), collate(samples)
    objective = objectives[stream]
    output = objective(model, batch, objective.units(batch), 1.0)
    prediction = objective.predict(model, batch)
    errors = []
    for b, sample in enumerate(samples):
        patches = F.unfold(torch.from_numpy(sample.image_CHW)[None].float() / 127.5 - 1, 4, stride=4)[0].t()
        for m, patch in enumerate(sample.masks[stream]["masked_M"]):
            target = patches[patch]
            if stream == "image":
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append(((prediction.pred_BMC[b, m] - target) ** 2).mean())
            torch.testing.assert_close(prediction.raw_BMC[b, m], patches[patch], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.loss, torch.stack(errors).mean(), atol=1e-5, rtol=1e-5)


def test_perfect_prediction_gives_the_true_pixels_back():
    objectives, samples = make_samples(2)
    prediction = objectives["image"].predict(build_model(CONFIG, 1).eval(), collate(samples))
    perfect = dataclasses.replace(prediction, pred_BMC=prediction.target_BMC)
    torch.testing.assert_close(perfect.to_pixels(), prediction.raw_BMC, atol=1e-4, rtol=1e-4)


def test_masked_text_loss_is_the_mean_over_masked_words():
    objectives, samples = make_samples()
    model, batch = build_model(CONFIG, 1).eval(), collate(samples)
    objective = objectives["text"]
    output = objective(model, batch, objective.units(batch), 1.0)
    prediction = objective.predict(model, batch)
    labels, owners = [], []
    for b, sample in enumerate(samples):
        for position in sample.masks["text"]["position_N"]:
            labels.append(int(sample.tokens_N[position]))
            owners.append(b)
    assert prediction.labels_K.tolist() == labels
    assert prediction.sample_K.tolist() == owners
    log_p = prediction.logits_KV.log_softmax(-1)
    expected = -torch.stack([row[label] for row, label in zip(log_p, labels, strict=True)]).mean()
    torch.testing.assert_close(output.loss, expected)


def test_smoothing_and_z_loss_are_in_the_loss_and_not_in_the_metric():
    objectives, samples = make_samples()
    model, batch = build_model(CONFIG, 1).eval(), collate(samples)
    stream = STREAMS[2].model_copy(update={"label_smoothing": 0.2, "z_loss_weight": 0.01})
    objective = build_objective(stream, CONFIG)
    output = objective(model, batch, objective.units(batch), 1.0)
    prediction = objectives["text"].predict(model, batch)
    logits, labels = prediction.logits_KV, prediction.labels_K
    nats = F.cross_entropy(logits, labels)
    smooth = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(output.loss, smooth + 0.01 * logits.logsumexp(-1).square().mean())
    total, count = output.metrics["loss"]
    torch.testing.assert_close(total / count, nats)
    hits, count = output.metrics["accuracy"]
    assert hits / count == (logits.argmax(-1) == labels).float().mean()


def test_hidden_pixels_and_words_are_not_seen():
    """Another picture under the mask, another word under [MASK]: the prediction stays as it is."""
    objectives, samples = make_samples(2)
    model = build_model(CONFIG, 1).eval()
    changed = []
    for sample in samples:
        image = sample.image_CHW.copy()
        for patch in sample.masks["image"]["masked_M"]:
            row, column = divmod(int(patch), 3)
            image[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] ^= 255
        changed.append(dataclasses.replace(sample, image_CHW=image))
    before = objectives["image"].predict(model, collate(samples)).pred_BMC
    assert torch.equal(objectives["image"].predict(model, collate(changed)).pred_BMC, before)
    changed = []
    for sample in samples:
        tokens = sample.tokens_N.copy()
        tokens[sample.masks["text"]["position_N"]] = 7
        changed.append(dataclasses.replace(sample, tokens_N=tokens))
    before = objectives["text"].predict(model, collate(samples)).logits_KV
    assert torch.equal(objectives["text"].predict(model, collate(changed)).logits_KV, before)
