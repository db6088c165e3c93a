"""Errors of the model and of the trivial predictors against loops over pixels."""

import numpy as np
import pytest
import torch

from eve.config import Decoder, FeedForward, Model, Stream
from eve.data.batch import Sample, collate
from eve.model import build_model
from eve.objectives import build_objective
from eve.tasks import masked_pixels
from eve.tasks.masked_pixels import mean_colours, measure_pixels, pixel_tables

SIZE, PATCH = 12, 4
CONFIG = Model(
    image_size=SIZE,
    patch_size=PATCH,
    width=24,
    depth=2,
    heads=3,
    hidden=40,
    vocab_size=20,
    max_text_length=8,
    text_positions=8,
    feed_forward=(FeedForward(blocks=(0, 1), router="modality"),),
    decoder=Decoder(depth=1, width=16, heads=2),
)


def objective_of(normalised: bool):
    stream = Stream(name="s", source="pairs", objective="masked_image", normalise_pixels=normalised)
    return build_objective(stream, CONFIG)


def samples_of(objective, images) -> list[Sample]:
    """Pairs with a text of three tokens, and the masks of the objective."""
    masking = objective.masking(None)
    samples = []
    for index, image in enumerate(images):
        tokens = np.array([1, 7, 2])
        sample = Sample(str(index), 0, index, index, image_CHW=image, tokens_N=tokens)
        sample.masks["s"] = masking(sample, np.random.default_rng(index))
        samples.append(sample)
    return samples


def random_images(number: int) -> list[np.ndarray]:
    """With different colours for each picture, so that the predictors differ."""
    rng = np.random.default_rng(0)
    return [
        np.clip(rng.integers(0, 256, (3, 1, 1)) + rng.normal(0, 30, (3, SIZE, SIZE)), 0, 255).astype(np.uint8)
        for _ in range(number)
    ]


def patch(image_CHW: np.ndarray, index: int) -> np.ndarray:
    """float64 (3, p, p) in [-1, 1] of the patch in row order."""
    row, column = divmod(index, SIZE // PATCH)
    rows, columns = slice(row * PATCH, (row + 1) * PATCH), slice(column * PATCH, (column + 1) * PATCH)
    return image_CHW[:, rows, columns].astype(np.float64) / 127.5 - 1


def normalise(pixels: np.ndarray) -> np.ndarray:
    return (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)


def brute_force(samples: list[Sample], space) -> tuple[list[float], list[float]]:
    """Errors of each sample: of the mean colour of all pictures, and of that of its visible patches."""
    everything = [space(patch(s.image_CHW, i)) for s in samples for i in range(9)]
    global_colour = np.mean([p.mean((1, 2)) for p in everything], axis=0)[:, None, None]
    by_global, by_visible = [], []
    for sample in samples:
        masked = [space(patch(sample.image_CHW, i)) for i in sample.masks["s"]["masked_M"]]
        visible = [space(patch(sample.image_CHW, i)) for i in sample.masks["s"]["visible_V"]]
        colour = np.mean([p.mean((1, 2)) for p in visible], axis=0)[:, None, None]
        by_global.append(np.mean([(p - global_colour) ** 2 for p in masked]))
        by_visible.append(np.mean([(p - colour) ** 2 for p in masked]))
    return by_global, by_visible


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_trivial_predictors_agree_with_brute_force(normalised, batch_size):
    objective = objective_of(normalised)
    samples = samples_of(objective, random_images(5))
    errors = measure_pixels(build_model(CONFIG, 0).eval(), objective, samples, batch_size)
    by_global, by_visible = brute_force(samples, normalise if normalised else np.asarray)
    assert errors[masked_pixels.GLOBAL] == pytest.approx(by_global, rel=1e-4)
    assert errors[masked_pixels.VISIBLE] == pytest.approx(by_visible, rel=1e-4)
    if normalised:
        by_global, by_visible = brute_force(samples, np.asarray)
        assert errors[masked_pixels.GLOBAL_PIXELS] == pytest.approx(by_global, rel=1e-4)
        assert errors[masked_pixels.VISIBLE_PIXELS] == pytest.approx(by_visible, rel=1e-4)
        own_mean = [np.mean([patch(s.image_CHW, i).var() for i in s.masks["s"]["masked_M"]]) for s in samples]
        assert errors[masked_pixels.ORACLE_MEAN_PIXELS] == pytest.approx(own_mean, rel=1e-4)


@pytest.mark.parametrize("normalised", [True, False])
def test_the_error_of_the_model_is_its_loss(normalised):
    """Mean over samples of the errors = the objective's loss: all pictures have as many masked patches."""
    objective = objective_of(normalised)
    samples = samples_of(objective, random_images(5))
    model = build_model(CONFIG, 0).eval()
    batch = collate(samples)
    loss = objective(model, batch, objective.units(batch), 0.0).loss
    errors = measure_pixels(model, objective, samples, 2)
    assert errors[masked_pixels.MODEL].mean() == pytest.approx(loss.item(), rel=1e-5)


def test_a_picture_of_one_colour_costs_its_own_visible_mean_nothing():
    images = [np.full((3, SIZE, SIZE), value, dtype=np.uint8) for value in (0, 255)]
    objective = objective_of(False)
    samples = samples_of(objective, images)
    colours = mean_colours(samples, PATCH, False, 8)
    assert colours.pixels.tolist() == pytest.approx([0, 0, 0], abs=1e-6)
    errors = measure_pixels(build_model(CONFIG, 0).eval(), objective, samples, 8)
    assert errors[masked_pixels.VISIBLE] == pytest.approx([0, 0], abs=1e-9)
    assert errors[masked_pixels.GLOBAL] == pytest.approx([1, 1], abs=1e-6)


def test_flat_patches_have_the_target_zero_and_no_infinite_error():
    images = [np.full((3, SIZE, SIZE), 77, dtype=np.uint8)] * 2
    objective = objective_of(True)
    errors = measure_pixels(build_model(CONFIG, 0).eval(), objective, samples_of(objective, images), 8)
    assert errors[masked_pixels.GLOBAL] == pytest.approx([0, 0], abs=1e-6)
    assert all(np.isfinite(values).all() for values in errors.values())


def test_tables_compare_with_the_better_trivial_predictor():
    errors = {
        masked_pixels.MODEL: np.array([0.1, 0.2]),
        masked_pixels.GLOBAL: np.array([1.0, 2.0]),
        masked_pixels.VISIBLE: np.array([0.4, 0.8]),
    }
    (table,) = pixel_tables({"held out": errors}, seed=0)
    cell, number, *means, saved = table.rows[0]
    assert (cell, number) == ("held out", 2)
    assert means == pytest.approx([0.15, 1.5, 0.6])
    assert (saved.value, saved.low, saved.high) == pytest.approx((0.75, 0.75, 0.75))
    assert "pixels" in table.title


def test_a_model_of_normalised_targets_never_gets_the_true_moments_in_the_fair_column():
    """Another picture behind the masked patches changes the oracle column's prediction, not the fair one."""
    objective = objective_of(True)
    image = random_images(1)[0]
    (sample,) = samples_of(objective, [image])
    model = build_model(CONFIG, 0).eval()
    changed = image.copy()
    row, column = divmod(int(sample.masks["s"]["masked_M"][0]), 3)
    changed[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4] = 255
    (other,) = samples_of(objective, [changed])
    before, after = (measure_pixels(model, objective, [s], 1) for s in (sample, other))
    fair_before, fair_after = (
        _fair_prediction(objective, model, sample),
        _fair_prediction(objective, model, other),
    )
    assert torch.equal(fair_before, fair_after)
    for errors, prediction, picture in ((before, fair_before, image), (after, fair_after, changed)):
        true = np.stack([patch(picture, i).ravel() for i in sample.masks["s"]["masked_M"]])
        expected = ((prediction[0].numpy() - true) ** 2).mean()
        assert errors[masked_pixels.MODEL_PIXELS][0] == pytest.approx(expected, rel=1e-4)


def _fair_prediction(objective, model, sample: Sample) -> torch.Tensor:
    visible = [patch(sample.image_CHW, i) for i in sample.masks["s"]["visible_V"]]
    mean, std = np.mean([p.mean() for p in visible]), np.mean([p.std(ddof=1) for p in visible])
    return objective.predict(model, collate([sample])).pred_BMC * std + mean
