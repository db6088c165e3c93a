"""Error on masked patches, against predictors that have learned nothing.

Two spaces, never mixed. In the *target* space (the one the model is trained in) model and trivial
predictors are judged alike; where targets are normalised, it takes the mean and deviation of each patch
out of the question for all of them. In *pixel* space, [-1, 1], a model of normalised targets
does not say what the mean and deviation of a patch are. It is given them in two ways: estimated from the
visible patches, which is fair, and the true ones, which is not (pictures show that one).

Shape suffixes: B sample, P patch, V visible patch, M masked patch, C pixels of a patch (colour first).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eve.data.batch import Sample, collate
from eve.model import VisionLanguageModel
from eve.model.embeddings import patchify, pick, to_float
from eve.objectives.masked_image import ImagePrediction, MaskedImage
from eve.tasks.report import Table, Value
from eve.tasks.statistics import bootstrap_ratio
from kernels.masked_pixel_loss import pixel_target

# Errors of a sample, each the mean over its masked patches and their pixels.
MODEL = "model"
GLOBAL = "mean colour"
VISIBLE = "mean of visible"
MODEL_PIXELS = "model in pixels, moments of visible"
GLOBAL_PIXELS = "mean colour in pixels"
VISIBLE_PIXELS = "mean of visible in pixels"
ORACLE_MODEL_PIXELS = "model in pixels, true moments"
ORACLE_MEAN_PIXELS = "true mean of each patch in pixels"


@dataclass(frozen=True)
class Colours:
    """Mean of each colour over all patches of some pictures, fp32 (3,): in target space and in pixels."""

    target: Tensor
    pixels: Tensor


def mean_colours(samples: Sequence[Sample], patch_size: int, normalised: bool, batch_size: int) -> Colours:
    """Over all patches, masked or not."""
    totals, number = torch.zeros(2, 3, dtype=torch.float64), 0
    for start in range(0, len(samples), batch_size):
        images = collate(samples[start : start + batch_size]).images_BCHW
        assert images is not None
        raw_BPC = to_float(patchify(images, patch_size))
        for row, patches_BPC in enumerate((pixel_target(raw_BPC, normalised), raw_BPC)):
            totals[row] += patches_BPC.unflatten(-1, (3, -1)).double().mean((1, 3)).sum(0)
        number += len(images)
    target, pixels = (totals / number).float()
    return Colours(target, pixels)


def sample_errors(prediction: ImagePrediction, visible_BVC: Tensor, colours: Colours) -> dict[str, Tensor]:
    """Mean squared error of each predictor on the masked patches of each sample: name -> (B,).

    Args:
        visible_BVC: pixels of the visible patches in [-1, 1].
        colours: what the predictor of one colour for all answers.
    """
    raw_BMC, target_BMC = prediction.raw_BMC, prediction.target_BMC
    size = raw_BMC.shape[-1] // 3

    def error(pred: Tensor, true_BMC: Tensor) -> Tensor:
        return (pred - true_BMC).square().mean((1, 2))

    def flat(colours_B3: Tensor) -> Tensor:
        """(3,) or (B, 3) -> (1 or B, 1, C): patches of one colour."""
        return colours_B3.view(-1, 1, 3).repeat_interleave(size, dim=2)

    def mean_colour(patches_BVC: Tensor) -> Tensor:
        return patches_BVC.unflatten(-1, (3, -1)).mean((1, 3))

    visible_target_BVC = pixel_target(visible_BVC, prediction.normalised)
    errors = {
        MODEL: error(prediction.pred_BMC, target_BMC),
        GLOBAL: error(flat(colours.target.to(raw_BMC.device)), target_BMC),
        VISIBLE: error(flat(mean_colour(visible_target_BVC)), target_BMC),
    }
    if prediction.normalised:
        variance_BV1, mean_BV1 = torch.var_mean(visible_BVC, dim=-1, keepdim=True)
        estimated_BMC = prediction.pred_BMC * variance_BV1.sqrt().mean(1, True) + mean_BV1.mean(1, True)
        errors |= {
            MODEL_PIXELS: error(estimated_BMC, raw_BMC),
            GLOBAL_PIXELS: error(flat(colours.pixels.to(raw_BMC.device)), raw_BMC),
            VISIBLE_PIXELS: error(flat(mean_colour(visible_BVC)), raw_BMC),
            ORACLE_MODEL_PIXELS: error(prediction.to_pixels(), raw_BMC),
            ORACLE_MEAN_PIXELS: error(raw_BMC.mean(-1, keepdim=True), raw_BMC),
        }
    return errors


@torch.no_grad()
def measure_pixels(
    model: VisionLanguageModel, objective: MaskedImage, samples: Sequence[Sample], batch_size: int
) -> dict[str, np.ndarray]:
    """The errors of every sample of a cell: name -> float64 (B,)."""
    patch_size = model.config.patch_size
    device = next(model.parameters()).device
    colours = mean_colours(samples, patch_size, objective.stream.normalise_pixels, batch_size)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(samples), batch_size):
        batch = collate(samples[start : start + batch_size]).to(device)
        assert batch.images_BCHW is not None
        visible_BV = batch.masks[objective.name]["visible_V"]
        visible_BVC = to_float(pick(patchify(batch.images_BCHW, patch_size), visible_BV))
        parts.append(sample_errors(objective.predict(model, batch), visible_BVC, colours))
    return {name: torch.cat([part[name] for part in parts]).double().cpu().numpy() for name in parts[0]}


def pixel_tables(errors_of_cell: dict[str, dict[str, np.ndarray]], seed: int) -> list[Table]:
    """`errors_of_cell`: what `measure_pixels` gave for each cell."""
    normalised = all(MODEL_PIXELS in errors for errors in errors_of_cell.values())
    space = "normalised patches" if normalised else "pixels in [-1, 1]"
    rows: list[list[Value]] = []
    for cell, errors in errors_of_cell.items():
        trivial = min((GLOBAL, VISIBLE), key=lambda name, errors=errors: errors[name].mean())
        saved = bootstrap_ratio(errors[trivial] - errors[MODEL], errors[trivial], seed=seed)
        means = [float(errors[name].mean()) for name in (MODEL, GLOBAL, VISIBLE)]
        rows.append([cell, len(errors[MODEL]), *means, saved])
    about = (
        "Mean squared error on masked patches. Mean colour: of the held-out pictures of the cell themselves"
    )
    notes = [
        f"{about}, which favours it. Mean of visible: one colour a picture.",
        "Saved: 1 - model / better trivial predictor, with its 95 % bootstrap interval over pictures.",
    ]
    if normalised:
        notes.append(
            "A target is a patch minus its mean over its deviation (0 where it is flat): nobody here has to "
            "predict these two."
        )
    columns = ["cell", "pictures", MODEL, GLOBAL, VISIBLE, "saved [95 %]"]
    tables = [Table(f"Masked patches: error in {space}", columns, rows, notes)]
    if normalised:
        names = (MODEL_PIXELS, GLOBAL_PIXELS, VISIBLE_PIXELS, ORACLE_MODEL_PIXELS, ORACLE_MEAN_PIXELS)
        tables.append(
            Table(
                "Masked patches: error in pixels in [-1, 1]",
                ["cell", "model*", "mean colour", "mean of visible", "model, oracle", "patch mean, oracle"],
                [[cell, *(float(e[name].mean()) for name in names)] for cell, e in errors_of_cell.items()],
                [
                    "*The model predicts normalised patches; mean and deviation are the averages of those of "
                    "the visible patches. It was not trained for this.",
                    "Oracle: given the true mean (and deviation) of each masked patch; compare the two with "
                    "each other only.",
                ],
            )
        )
    return tables
