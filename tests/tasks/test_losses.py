"""`python -m eve.evaluate --task losses`: one table of a run's stages, against losses made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from eve.data.loader import read_samples
from eve.data.seeds import generator
from eve.data.shard_writer import write_shards
from eve.data.tokenizer import Tokenizer
from eve.evaluate import main
from eve.model import VisionLanguageModel, build_model
from eve.objectives.masking import ImageMasking
from eve.training.export import export_model, load_exported, stage_exports
from tests.tiny import make_record, tiny_recipe

POOL, SAMPLES = 8, 20
WORDS = "mask_share: 1.0, random_share: 0.0"
OVERRIDES = (
    "model.feed_forward=[{blocks: 0, router: modality}, {blocks: 1, router: fusion}]",
    "model.contrast={width: 16, paths: [modality]}",
    "model.matching={}",
    "model.init_std=0.2",
    "data.sources={images: {kind: image, MIX}, texts: {kind: text, MIX, max_text_length: 8}, pairs: {MIX}}",
    "stages=[{name: the eyes, steps: 1, lr: 1.0,"
    " streams: [{name: look, source: images, objective: masked_image, normalise_pixels: false}]},"
    " {name: text, steps: 1, lr: 1.0,"
    f" streams: [{{name: read, source: texts, objective: masked_text, {WORDS}}},"
    # The same stream again, under other names.
    " {name: see, source: images, objective: masked_image, normalise_pixels: false, weight: 0.5}]},"
    " {name: pairs, steps: 1, lr: 1.0,"
    " streams: [{name: both, source: pairs, objective: contrast_matching, targets: diagonal},"
    f" {{name: read, source: pairs, objective: masked_text, {WORDS}}}]}}]",
)


@pytest.fixture(scope="module")
def run_dir(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages whose models differ, as none was trained."""
    run_dir = tmp_path_factory.mktemp("losses") / "run"
    held_out = run_dir.parent / "held_out"
    write_shards([make_record(number) for number in range(200, 200 + SAMPLES)], held_out, shard_size=8)
    mix = f"mix: [{{shards: {tiny.parent}/train/*.tar}}], batch_size: {POOL}"
    cells = f"evaluation.shards={{new: '{held_out}/*.tar'}}"
    recipe = tiny_recipe(tiny, *(override.replace("MIX", mix) for override in OVERRIDES), cells)
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    for number, directory in enumerate([*stage_exports(run_dir, recipe), run_dir / "export"]):
        model = build_model(recipe.model, seed=100 + min(number, 2))
        about = {"stage": recipe.stages[min(number, 2)].name, "stage_number": min(number, 2)}
        export_model(directory, dict(model.state_dict()), recipe, tokenizer, about)
    return run_dir


def table(task: str, checkpoint: Path, *more: str) -> list[dict[str, Any]]:
    """Rows of the last table."""
    output = checkpoint.parent / "table.json"
    assert main(["--task", task, "--checkpoint", str(checkpoint), "--output", str(output), *more]) == 0
    return json.loads(output.read_text())[-1]["rows"]


@pytest.fixture(scope="module")
def rows(run_dir: Path) -> list[dict[str, Any]]:
    return table("losses", run_dir)


def value(rows: list[dict[str, Any]], after: str, stream: str, measure: str = "loss") -> Any:
    (row,) = (r for r in rows if (r["after"], r["stream"], r["measure"]) == (after, stream, measure))
    return row["new"]


LOOK, READ = "look: masked_image of images", "read: masked_text of texts"
BOTH, READ_PAIRS = "both: contrast_matching of pairs", "read: masked_text of pairs"


def test_each_stage_measures_every_distinct_stream(rows: list[dict[str, Any]]) -> None:
    trained = {(row["after"], row["stream"]): row["trained"] for row in rows}
    expected = {"start": "no no no no", "the eyes": "here no no no", "text": "here here no no"}
    expected["pairs"] = "before before here here"
    assert list(trained) == [
        (after, stream) for after in expected for stream in (LOOK, READ, BOTH, READ_PAIRS)
    ]
    assert list(trained.values()) == " ".join(expected.values()).split()
    measures = [row["measure"] for row in rows if row["after"] == "text" and row["stream"] == BOTH]
    assert measures == ["contrast loss", "contrast accuracy", "matching loss", "matching accuracy"]
    for row in rows:
        mean, low, high = row["new"]
        assert low <= mean <= high


@torch.no_grad()
def pixel_error(model: VisionLanguageModel, shards: str, seed: int) -> float:
    """Of raw masked patches, picture by picture."""
    samples = read_samples(
        shards,
        image_size=32,
        max_text_length=1,
        tokenizer=None,
        maskings={},
        seed=0,
        limit=None,
        kind="image",
    )
    decoder = model.eval().decoder
    assert isinstance(decoder, nn.Module)
    errors = []
    for sample in samples:
        pixels = torch.from_numpy(sample.image_CHW)[None]
        mask = ImageMasking(4, 0.75, "random")(
            sample, generator(seed, 0, sample.index, "mask", "masked_image")
        )
        visible, masked = (torch.from_numpy(mask[name])[None] for name in ("visible_V", "masked_M"))
        encoded = model.encode(images_BCHW=pixels, visible_BV=visible)
        predicted = decoder(encoded.images_BID, visible, masked)[0]
        patches = F.unfold(pixels / 127.5 - 1, kernel_size=8, stride=8)[0].t()
        errors.append((predicted - patches[masked[0]]).square().mean())
    assert len(errors) == SAMPLES
    return float(torch.stack(errors).mean())


def test_the_loss_of_pictures_by_hand(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    last, recipe, _ = load_exported(run_dir / "export")
    first = build_model(recipe.model, recipe.seed)
    (shards,) = recipe.evaluation.shards.values()
    for after, model in (("start", first), ("pairs", last)):
        assert value(rows, after, LOOK)[0] == pytest.approx(pixel_error(model, shards, recipe.seed), rel=1e-4)


def test_the_contrast_of_whole_pools_by_hand(run_dir: Path, rows: list[dict[str, Any]]) -> None:
    model, recipe, tokenizer = load_exported(run_dir / "stages" / "1_text")
    (shards,) = recipe.evaluation.shards.values()
    samples = list(
        read_samples(
            shards, image_size=32, max_text_length=16, tokenizer=tokenizer, maskings={}, seed=3, limit=None
        )
    )
    model.eval()
    head = model.contrast
    assert head is not None
    images, texts = [], []
    with torch.no_grad():
        for sample in samples:
            pixels, words = torch.from_numpy(sample.image_CHW)[None], torch.from_numpy(sample.tokens_N)
            images.append(head.image["modality"](model.encode(images_BCHW=pixels).image_class_BD))
            texts.append(
                head.text["modality"](model.encode(tokens_N=words, text_lengths=[len(words)]).text_class_BD)
            )
        losses = []
        for start in (0, POOL):
            vectors = (F.normalize(torch.cat(some[start : start + POOL])) for some in (images, texts))
            image, text = vectors
            logits = image @ text.t() * head.scale("modality")
            own = torch.arange(POOL)
            losses.append((F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2)
    expected = float(torch.stack(losses).mean())
    assert value(rows, "text", BOTH, "contrast loss")[0] == pytest.approx(expected, rel=1e-4)


def test_words_are_those_of_the_other_task_and_a_stage_is_taken_alone(
    run_dir: Path, rows: list[dict[str, Any]]
) -> None:
    """All chosen words read [MASK], so both tasks count the same ones."""
    stage = run_dir / "stages" / "1_text"
    (words,) = table("pretrain", stage)
    assert value(rows, "text", READ_PAIRS)[0] == pytest.approx(words["right image"], rel=1e-5)
    assert table("retrieval", stage)[0]["images"] == SAMPLES
    assert table("losses", stage) == [row for row in rows if row["after"] == "text"]


def test_small_cells_have_no_interval_and_smaller_ones_no_number(run_dir: Path) -> None:
    export = run_dir / "export"
    one_pool = table("losses", export, f"--max-samples={POOL + 1}")
    assert isinstance(value(one_pool, "pairs", BOTH, "matching accuracy"), float)
    none = table("losses", export, "--max-samples=10", "data.sources.pairs.batch_size=12")
    assert value(none, "pairs", BOTH) is None
    assert len(value(none, "pairs", READ)) == 3
    # The stage that trained it had other pools.
    assert [row["trained"] for row in none if row["stream"] == BOTH] == ["here"]
