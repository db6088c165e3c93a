"""Held-out evaluation of masked pre-training: pixels, codes, words, grounding, probes, pictures.

The yardstick is the same for every recipe: pixels with the complete text, words with the complete
image, whatever the streams of the recipe mask together. Masks come from the recipe's own masking
code, drawn from (seed, number of the sample), so two models of a recipe meet the same masks.

Shape suffixes: B sample, N packed text token, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from eve.config import Recipe, Stream
from eve.data.batch import Sample, collate
from eve.data.loader import read_samples
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel
from eve.objectives import build_objective
from eve.objectives.masked_codes import MaskedCodes
from eve.objectives.masked_image import MaskedImage
from eve.objectives.masked_text import MaskedText
from eve.tasks.checkpoint import Checkpoint
from eve.tasks.masked_codes import code_tables, measure_codes
from eve.tasks.masked_pixels import measure_pixels, pixel_tables
from eve.tasks.masked_words import grounding, measure_words, with_wrong_images, word_tables
from eve.tasks.probes import LinearProbe, majority_accuracy, nearest_neighbour_probe
from eve.tasks.report import Table, Value
from eve.training.export import file_name
from eve.training.pictures import draw_batch

# Training samples whose features the probes are fitted on.
PROBE_SAMPLES = 3000
PICTURES = 8


def check(recipe: Recipe) -> None:
    """Raises UserError where there is nothing to evaluate."""
    if not evaluation_streams(recipe):
        raise UserError("no stream of the recipe has a masked objective: there is nothing to evaluate")


def evaluation_streams(recipe: Recipe) -> list[Stream]:
    """One stream for each of masked pixels, codes and words, as the last stage that has it; a stream that
    masks both inputs at once stands for two."""
    found: dict[str, Stream] = {}
    for stage in recipe.stages:
        for stream in stage.streams:
            image = "masked_codes" if stream.image_target == "codes" else "masked_image"
            parts = (image, "masked_text") if stream.objective == "masked_pair" else (stream.objective,)
            for objective in parts:
                if objective in ("masked_image", "masked_codes", "masked_text"):
                    found[objective] = stream.model_copy(update={"objective": objective, "name": objective})
    return list(found.values())


def evaluate(checkpoint: Checkpoint, cells: dict[str, str]) -> list[Table]:
    """Measures every cell (name -> shards), draws samples of each into `pictures_dir/CELL.png`."""
    recipe, pictures_dir = checkpoint.recipe, checkpoint.pictures_dir
    model, tokenizer = checkpoint.model(), checkpoint.tokenizer()
    settings, seed = recipe.evaluation, recipe.seed
    objectives = {
        stream.name: build_objective(stream, recipe.model, visual_tokenizer=recipe.data.visual_tokenizer)
        for stream in evaluation_streams(recipe)
    }
    maskings = {name: objective.masking(tokenizer) for name, objective in objectives.items()}
    pixels, codes, words, features = {}, {}, {}, {}
    unlabelled: list[str] = []
    pictures_dir.mkdir(parents=True, exist_ok=True)
    for cell, shards in cells.items():
        samples = list(
            read_samples(
                shards,
                image_size=recipe.model.image_size,
                max_text_length=recipe.model.max_text_length,
                tokenizer=tokenizer,
                maskings=maskings,
                seed=seed,
                limit=settings.max_samples,
            )
        )
        if not samples:
            raise UserError(f"the held-out shards {shards} hold no sample that can be used")
        print(f"{cell}: {len(samples)} samples", flush=True)
        for objective in objectives.values():
            if isinstance(objective, MaskedImage):
                pixels[cell] = measure_pixels(model, objective, samples, settings.batch_size)
            elif isinstance(objective, MaskedCodes):
                codes[cell] = measure_codes(model, objective, samples, settings.batch_size)
            else:
                text = cast(MaskedText, objective)
                right, wrong = (
                    measure_words(model, text, some, settings.batch_size, tokenizer.mask_id)
                    for some in (samples, with_wrong_images(samples, seed))
                )
                words[cell] = grounding(right, wrong, len(samples), seed)
        if settings.label is not None:
            labelled = [sample for sample in samples if settings.label in sample.metadata]
            if labelled:
                features[cell] = labelled_features(model, labelled, settings.label, settings.batch_size)
            else:
                unlabelled.append(cell)
        shown = collate(samples[:PICTURES]).to(next(model.parameters()).device)
        picture = draw_batch(model, objectives, shown, tokenizer, name=cell, limit=PICTURES)
        Image.fromarray(picture.image_HWC).save(pictures_dir / f"{file_name(cell)}.png")
    tables = pixel_tables(pixels, seed) if pixels else []
    tables += code_tables(codes, seed) if codes else []
    tables += word_tables(words) if words else []
    if features or unlabelled:
        tables.append(_probes(model, recipe, tokenizer, features, unlabelled))
    return tables


def labelled_features(
    model: VisionLanguageModel, samples: Sequence[Sample], label: str, batch_size: int
) -> tuple[Tensor, Tensor, list[str]]:
    """(image features (B, D), text features (B, D), labels) of samples that all have the label, on the CPU.

    A feature is the mean over the tokens after the final norm: the patches of the image alone (without the
    class token), the tokens of the text alone.
    """
    parts = [
        _features(model, samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)
    ]
    image_BD, text_BD = (torch.cat(column) for column in zip(*parts, strict=True))
    return image_BD, text_BD, [str(sample.metadata[label]) for sample in samples]


@torch.no_grad()
def _features(model: VisionLanguageModel, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    batch = collate(samples).to(next(model.parameters()).device)
    image_BD = model.encode(images_BCHW=batch.images_BCHW).images_BID[:, 1:].float().mean(1)
    encoded = model.encode(tokens_N=batch.tokens_N, text_lengths=batch.text_lengths)
    texts = encoded.texts_ND.float().split(batch.text_lengths)
    text_BD = torch.stack([text_ND.mean(0) for text_ND in texts])
    return image_BD.cpu(), text_BD.cpu()


def _probes(
    model: VisionLanguageModel,
    recipe: Recipe,
    tokenizer: Tokenizer,
    test: dict[str, tuple[Tensor, Tensor, list[str]]],
    unlabelled: Sequence[str],
) -> Table:
    """Probes fitted on samples of the training shards, tested on every cell that has the label.

    Where a cell or the training shards lack it, or these are not at hand, a note says so instead.
    """
    label = recipe.evaluation.label
    assert label is not None
    columns = ["cell", "samples", "majority"]
    columns += [f"{kind}, {probe}" for kind in ("image", "text") for probe in ("linear", "kNN")]
    title = f"Probes of frozen features: accuracy for '{label}'"
    notes = [_no_probe(cell, label) for cell in unlabelled]
    if not test:
        return Table(title, columns, [], notes)
    try:
        samples = _training_samples(recipe, tokenizer)
    except UserError as error:
        return Table(title, columns, [], [f"Not run, the training shards are not at hand: {error}"])
    samples = [sample for sample in samples if label in sample.metadata]
    if not samples:
        keys = ", ".join(f"data.sources.{name}" for name in _training_sources(recipe))
        return Table(title, columns, [], [_no_probe(f"the training shards ({keys})", label)])
    *train_features, train_labels = labelled_features(model, samples, label, recipe.evaluation.batch_size)
    names = sorted({*train_labels, *(name for _, _, labels in test.values() for name in labels)})
    code = {name: index for index, name in enumerate(names)}
    train_B = torch.tensor([code[name] for name in train_labels])
    linear_probes = [LinearProbe(train_BD, train_B, seed=recipe.seed) for train_BD in train_features]
    rows: list[list[Value]] = []
    for cell, (*test_features, test_labels) in test.items():
        test_B = torch.tensor([code[name] for name in test_labels])
        row: list[Value] = [cell, len(test_B), majority_accuracy(train_B, test_B)]
        for linear, train_BD, test_BD in zip(linear_probes, train_features, test_features, strict=True):
            row.append(linear.accuracy(test_BD, test_B))
            row.append(nearest_neighbour_probe(train_BD, train_B, test_BD, test_B))
        rows.append(row)
    notes.append(
        f"Fitted on {len(train_B)} training samples of {len(names)} classes. Image and text alone; mean over "
        "tokens. Linear: logistic regression, L2 chosen on a fifth of the training features. kNN: 20 nearest "
        "by cosine. Majority: the most frequent training class."
    )
    return Table(title, columns, rows, notes)


def _no_probe(where: str, label: str) -> str:
    return (
        f"No probe: no sample of {where} has the metadata field '{label}'; evaluation.label=... names another"
    )


def _training_sources(recipe: Recipe) -> list[str]:
    """Sources of pairs that the last stage trains on."""
    names = {stream.source for stream in recipe.stages[-1].streams}
    return [name for name, source in recipe.data.sources.items() if name in names and source.kind == "pair"]


def _training_samples(recipe: Recipe, tokenizer: Tokenizer) -> list[Sample]:
    """The first samples of every set of pairs that the last stage trains on, by their weight."""
    sets = [shards for name in _training_sources(recipe) for shards in recipe.data.sources[name].mix]
    total = sum(shards.weight for shards in sets)
    samples: list[Sample] = []
    for shards in sets:
        samples += read_samples(
            shards.shards,
            image_size=recipe.model.image_size,
            max_text_length=recipe.model.max_text_length,
            tokenizer=tokenizer,
            maskings={},
            seed=recipe.seed,
            limit=round(PROBE_SAMPLES * shards.weight / total),
        )
    return samples
