"""Block masks against statistics of 10,000 draws of BEiT (v1 stops early, v2 masks an exact number).

Both sides are samples: a mean may differ by six standard errors of the difference of two means, a share by as
many of two shares. So a rule that differs by a few percent is found, and chance is not.
"""

from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from eve.config import Stream, load_recipe
from eve.data.batch import Sample
from eve.errors import UserError
from eve.objectives.masking import BEIT_BLOCK_MIN, ImageMasking, block_patches, rectangles
from tests.reference import files

pytestmark = pytest.mark.fixtures

ERRORS = 6.0


def same_mean(what: str, values: np.ndarray, mean: float, std: float, draws: int) -> None:
    """`std` and `draws` are the reference's."""
    error = math.sqrt(std**2 / draws + values.var() / len(values))
    assert abs(values.mean() - mean) <= ERRORS * error + 1e-9, (
        f"{what}: {values.mean():.4f}, expected {mean:.4f}"
    )


def same_share(what: str, share: float, expected: float, draws: int, number: int) -> None:
    pooled = (share * number + expected * draws) / (number + draws)
    error = math.sqrt(pooled * (1 - pooled) * (1 / draws + 1 / number))
    # One draw more or less is no difference.
    assert abs(share - expected) <= ERRORS * error + 2 / draws, (
        f"{what}: {share:.4f}, expected {expected:.4f}"
    )


def same_histogram(what: str, values: list[int], expected: dict[str, float], draws: int) -> None:
    counts = Counter(values)
    for value in {*counts, *(int(key) for key in expected)}:
        share = counts[value] / len(values)
        same_share(f"{what} {value}", share, expected.get(str(value), 0.0), draws, len(values))


def components(masks_NHW: np.ndarray) -> np.ndarray:
    """Connected areas (of four neighbours) of each mask: the smallest number spreads over its area."""
    number, height, width = masks_NHW.shape
    none = height * width
    label = np.where(masks_NHW, np.arange(none).reshape(height, width), none)
    while True:
        padded = np.pad(label, ((0, 0), (1, 1), (1, 1)), constant_values=none)
        around = [padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], padded[:, 1:-1, :-2], padded[:, 1:-1, 2:]]
        spread = np.where(masks_NHW, np.minimum.reduce([label, *around]), none)
        if (spread == label).all():
            break
        label = spread
    first = np.arange(none).reshape(height, width)
    return (masks_NHW & (label == first)).reshape(number, -1).sum(1)


def draws_of(
    settings: dict, number: int, seed: int
) -> tuple[np.ndarray, list[list[tuple[int, int, int, int]]]]:
    """Masks, and the blocks of the same draws."""
    grid = (settings["grid"][0], settings["grid"][1])
    keys = ("min_patches", "max_patches", "min_aspect", "max_aspect")
    names = ("min_num_patches", "max_num_patches", "min_aspect", "max_aspect")
    shape = {key: settings[name] for key, name in zip(keys, names, strict=True)}
    masks, blocks = [], []
    for index in range(number):
        target, exact = settings["num_masking_patches"], settings["version"] != "v1"
        rng = np.random.Generator(np.random.Philox([seed, index]))
        masks.append(block_patches(grid, target, rng, exact=exact, **shape).reshape(grid))
        rng = np.random.Generator(np.random.Philox([seed, index]))
        blocks.append(rectangles(grid, target, rng, **shape))
    return np.stack(masks), blocks


def adjacent(masks_NHW: np.ndarray) -> np.ndarray:
    """Of each mask: pairs of masked patches side by side."""
    down, across = masks_NHW[:, 1:] & masks_NHW[:, :-1], masks_NHW[:, :, 1:] & masks_NHW[:, :, :-1]
    return down.sum((1, 2)) + across.sum((1, 2))


def drawn(side: int, number: int = 1000, **keys) -> np.ndarray:
    """Masks (N, H, W) of a stream with these keys."""
    masking = ImageMasking.of(Stream.model_validate({"name": "s", "source": "s", **keys}), side)
    masks = np.zeros((number, side * side), dtype=bool)
    for index in range(number):
        rng = np.random.Generator(np.random.Philox([3, index]))
        masks[index, masking(Sample("s", 0, 0, 0), rng)["masked_M"]] = True
    return masks.reshape(number, side, side)


@files("beit_mask_statistics")
def test_streams_of_codes_have_blocks_of_beits_least_size_and_others_of_eves(path):
    """Blocks of 4 patches at least leave masks of more edges: told apart by many standard errors."""
    for name, expected in json.loads(path.read_text())["statistics"].items():
        settings = expected["settings"]
        height, width = settings["grid"]
        if settings["version"] != "v2" or (height, settings["min_num_patches"]) != (width, BEIT_BLOCK_MIN):
            continue
        # The middle of the ratios that mask this number.
        ratio = (settings["num_masking_patches"] - 0.5) / (height * width)
        of, draws = expected["adjacent_masked_pairs"], settings["draws"]
        if (height, width) == (14, 14):
            codes = drawn(height, image_ratio=ratio, objective="masked_codes")
            assert (codes.sum((1, 2)) == settings["num_masking_patches"]).all()
            same_mean(f"{name} codes", adjacent(codes), of["mean"], of["std"], draws)
        pixels = {"image_ratio": ratio, "objective": "masked_pair", "image_masking": "block"}
        said = adjacent(drawn(height, image_block_min=settings["min_num_patches"], **pixels))
        same_mean(f"{name} said", said, of["mean"], of["std"], draws)
        smaller = adjacent(drawn(height, **pixels))
        error = math.sqrt(of["std"] ** 2 / draws + smaller.var() / len(smaller))
        assert smaller.mean() < of["mean"] - ERRORS * error


def test_the_least_block_of_codes_follows_the_grid():
    stream = Stream.model_validate({"name": "s", "source": "s", "objective": "masked_codes"})
    assert [ImageMasking.of(stream, side).block_min for side in (4, 14, 28)] == [4, 16, 64]
    other = stream.model_copy(update={"image_block_min": 9})
    assert ImageMasking.of(other, 14).block_min == 9
    with pytest.raises(ValidationError, match="image_block_min is set, but image_masking is random"):
        Stream(name="s", source="s", objective="masked_image", image_block_min=9)
    blocks = ["stages.0.streams.0.image_masking=block", "stages.0.streams.0.image_block_min=148"]
    with pytest.raises(UserError, match="image_block_min 148, more than the 147 patches that it masks"):
        load_recipe("eve_base", blocks)


@files("beit_mask_statistics")
def test_block_masks_are_those_of_beit(path):
    for name, expected in json.loads(path.read_text())["statistics"].items():
        settings = expected["settings"]
        draws, number = settings["draws"], 10000
        masks, blocks = draws_of(settings, number, seed=5)
        target = settings["num_masking_patches"]

        of = expected["masked_count"]
        counts = masks.reshape(number, -1).sum(1)
        same_mean(f"{name} masked", counts, of["mean"], of["std"], draws)
        same_histogram(f"{name} masked", counts.tolist(), of["histogram"], draws)
        same_share(f"{name} full", (counts == target).mean(), of["fraction_equal_to_target"], draws, number)
        assert counts.max() <= target

        of = expected["blocks_per_mask"]
        lengths = np.array([len(placed) for placed in blocks])
        same_mean(f"{name} blocks", lengths, of["mean"], of["std"], draws)
        same_histogram(f"{name} blocks", lengths.tolist(), of["histogram"], draws)

        added, areas, short = [], [], 0
        for placed in blocks:
            mask = np.zeros(settings["grid"], dtype=bool)
            for top, left, height, width in placed:
                before = int(mask.sum())
                mask[top : top + height, left : left + width] = True
                added.append(int(mask.sum()) - before)
                areas.append(height * width)
            short += int(mask.sum()) < target
        stopped = expected["draws_stopped_by_failure"] / draws
        same_share(f"{name} stopped", short / number, stopped, draws, number)
        for what, values in (("new_patches_per_block", added), ("rectangle_area_per_block", areas)):
            of = expected[what]
            values = np.array(values)
            # Blocks of one mask hang together: as many independent numbers as masks, not as blocks.
            values_per_mask = len(values) / number
            error_scale = math.sqrt(values_per_mask)
            same_mean(f"{name} {what}", values, of["mean"], of["std"] * error_scale, draws * values_per_mask)
            assert abs(values.std() / of["std"] - 1) < 0.05, what
            for percent, quantile in of["quantiles"].items():
                below, upto = (values < quantile).mean(), (values <= quantile).mean()
                assert below - 0.02 <= float(percent) / 100 <= upto + 0.02, f"{name} {what} {percent} %"

        of = expected["first_block"]
        firsts = np.array([placed[0][2:] for placed in blocks if placed])
        area = firsts.prod(1)
        same_mean(f"{name} first area", area, of["area_mean"], of["area_std"], draws)
        assert abs(area.std() / of["area_std"] - 1) < 0.05
        for percent, quantile in of["area_quantiles"].items():
            below, upto = (area < quantile).mean(), (area <= quantile).mean()
            assert below - 0.02 <= float(percent) / 100 <= upto + 0.02, f"{name} first area {percent} %"
        for axis, what in enumerate(("height_mean", "width_mean")):
            same_mean(f"{name} first {what}", firsts[:, axis], of[what], float(firsts[:, axis].std()), draws)
            assert firsts[:, axis].max() < settings["grid"][axis]
        aspect = np.log(firsts[:, 0] / firsts[:, 1])
        same_mean(f"{name} first aspect", aspect, of["log_aspect_mean"], of["log_aspect_std"], draws)
        assert abs(aspect.std() / of["log_aspect_std"] - 1) < 0.05

        of = expected["connected_components_4"]
        areas_of_masks = components(masks)
        same_mean(f"{name} components", areas_of_masks, of["mean"], of["std"], draws)
        same_histogram(f"{name} components", areas_of_masks.tolist(), of["histogram"], draws)
        of = expected["adjacent_masked_pairs"]
        same_mean(f"{name} neighbours", adjacent(masks), of["mean"], of["std"], draws)

        position = masks.mean(0)
        for (row, column), share in np.ndenumerate(np.array(expected["position_frequency"]["map"])):
            same_share(f"{name} at {row}, {column}", position[row, column], share, draws, number)
