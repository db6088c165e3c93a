"""Contrast against a loop over pairs in plain PyTorch: values, gradients, what counts as a positive."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from eve.data.batch import collate
from eve.model import build_model
from eve.objectives import build_objective
from eve.objectives.contrast import contrast_loss, identities, positives, similarity
from tests.objectives.pairs import CONFIG, make_samples, stream

NUMBER = 6
# Of make_samples, by the field `thing`.
SAME = {(1, 3), (0, 4)}


def is_positive(i: int, j: int) -> bool:
    return i == j or (min(i, j), max(i, j)) in SAME


def by_loop(cosine, scale: float, targets: str) -> torch.Tensor:
    """The mean over pairs and directions of -log of a share of exponentials, one number at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in (cosine, cosine.t()):
        for i in range(NUMBER):
            share = {}
            for j in range(NUMBER):
                if targets != "masked" or i == j or not is_positive(i, j):
                    share[j] = torch.exp(scale * rows[i, j])
            wanted = [j for j in range(NUMBER) if is_positive(i, j)] if targets == "soft" else [i]
            whole = torch.stack(list(share.values())).sum()
            total = total - sum(torch.log(share[j] / whole) for j in wanted) / len(wanted)
    return total / (2 * NUMBER)


def encode_one_by_one(model, samples, path: str) -> torch.Tensor:
    """Cosines of every image with every text; each goes through the model in a batch of its own."""
    vectors = []
    for sample in samples:
        batch = collate([sample])
        image = model.encode(images_BCHW=batch.images_BCHW, both_paths=True)
        text = model.encode(tokens_N=batch.tokens_N, text_lengths=batch.text_lengths, both_paths=True)
        image, text = (e.fusion if path == "fusion" else e for e in (image, text))
        pair = []
        for head, x_D in ((model.contrast.image, image.x_TD[0]), (model.contrast.text, text.x_TD[0])):
            projected = head[path].weight.double() @ x_D.double()
            pair.append(projected / projected.square().sum().sqrt())
        vectors.append(pair)
    return torch.stack([torch.stack([image @ text for _, text in vectors]) for image, _ in vectors])


@pytest.mark.parametrize("targets", ["masked", "soft", "diagonal"])
def test_loss_and_gradient_are_those_of_a_loop_over_pairs(targets: str) -> None:
    samples = make_samples(NUMBER)
    found, expected = build_model(CONFIG, 1), build_model(CONFIG, 1)
    objective = build_objective(stream("contrast", targets=targets, identity="thing"), CONFIG)
    batch = collate([replace(sample, masks={"pairs": {}}) for sample in samples])
    output = objective(found, batch, objective.units(batch), 1.0)
    output.loss.backward()
    losses = []
    for path in ("modality", "fusion"):
        scale = getattr(expected.contrast, f"temperature_{path}").double().exp()[0]
        losses.append(by_loop(encode_one_by_one(expected, samples, path), scale, targets))
    loss = (losses[0] + losses[1]) / 2
    loss.backward()
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=1e-6)
    total, count = output.metrics["loss"]
    assert float(total / count) == pytest.approx(float(loss.detach()), rel=1e-6)
    learning = {name: p.grad for name, p in expected.named_parameters() if p.grad is not None}
    assert len(learning) > 40
    for name, parameter in found.named_parameters():
        if name in learning:
            torch.testing.assert_close(parameter.grad, learning[name], atol=2e-6, rtol=1e-4, msg=name)
        else:
            assert parameter.grad is None or not parameter.grad.any(), name


def test_without_equal_samples_all_targets_are_vlmos_formula() -> None:
    draw = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(5, 8, generator=draw), dim=-1) for _ in range(2))
    logits = similarity(image, text, torch.tensor(7.0))
    own = torch.arange(5)
    cross_entropy = torch.nn.functional.cross_entropy
    formula = (cross_entropy(7 * image @ text.t(), own) + cross_entropy(7 * text @ image.t(), own)) / 2
    for targets in ("masked", "soft", "diagonal"):
        torch.testing.assert_close(contrast_loss(logits, targets=targets).mean(), formula)


def test_positives_are_equal_pictures_or_equal_captions() -> None:
    samples = make_samples(NUMBER)
    for field, pairs in (("thing", SAME), (None, {(0, 4)}), ("no such field", {(0, 4)})):
        found = identities(collate(samples), field)
        expected = torch.eye(NUMBER, dtype=torch.bool)
        for i, j in pairs:
            expected[i, j] = expected[j, i] = True
        assert torch.equal(positives(found, found), expected), field


def test_a_value_and_a_key_that_read_alike_are_not_the_same() -> None:
    first, second, *_ = make_samples(2)
    named, bare = replace(first, metadata={"thing": "k1"}), replace(second, metadata={})
    found = identities(collate([named, bare]), "thing")
    assert not positives(found, found)[0, 1]


def test_metrics_count_any_positive_as_right() -> None:
    """Vectors that find the other sample of the same thing: wrong by the partner, right by the thing."""
    samples = make_samples(NUMBER)
    objective = build_objective(stream("contrast", identity="thing"), CONFIG)
    batch = collate([replace(sample, masks={"pairs": {}}) for sample in samples])
    model = build_model(CONFIG, 1).eval()
    metrics = objective(model, batch, objective.units(batch), 1.0).metrics
    cosine = encode_one_by_one(model, samples, "modality")
    right = sum(is_positive(i, int(rows[i].argmax())) for rows in (cosine, cosine.t()) for i in range(NUMBER))
    assert float(metrics["accuracy"][0]) == right / 2
    assert metrics["pool"] == (NUMBER, 1)
    assert float(metrics["temperature"][0]) == pytest.approx(0.5)


def test_temperature_as_a_divisor_is_clamped() -> None:
    contrast = CONFIG.contrast
    assert contrast is not None
    for kind in ("scale", "divisor"):
        head = contrast.model_copy(update={"temperature": kind, "clamp": (0.01, 0.4)})
        model = build_model(CONFIG.model_copy(update={"contrast": head}), 1)
        assert model.contrast is not None
        assert float(model.contrast.scale("modality").detach()) == pytest.approx(1 / 0.4)
        free = contrast.model_copy(update={"temperature": kind})
        model = build_model(CONFIG.model_copy(update={"contrast": free}), 1)
        assert model.contrast is not None
        assert math.isclose(float(model.contrast.scale("modality").detach()), 2.0, rel_tol=1e-6)
