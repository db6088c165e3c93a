"""Held-out losses of every stream of a run, at its start and at the end of each stage: what a stage teaches,
and what it makes the model forget.

The losses are the objectives' own, of a model in evaluation mode. Masks are drawn from (seed, number of the
sample), so all stages meet the same. Streams of one objective, settings and kind of sample are one, whatever
their names and weights.

Shape suffixes: G group of samples (one pass).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eve.config import Recipe, Stage, Stream
from eve.data.batch import Sample, collate
from eve.data.loader import read_samples
from eve.data.manifest import Kind
from eve.data.samples import with_masks
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel
from eve.objectives import Objective, build_objective
from eve.objectives.masked_codes import check_visual_tokenizer
from eve.tasks.checkpoint import Checkpoint, Snapshot
from eve.tasks.report import Table, Value
from eve.tasks.statistics import bootstrap_ratio

# So many groups at least, as far as the samples go: an interval over fewer is too narrow.
GROUPS = 32
# What training adds to the loss that is measured, or multiplies it by.
WEIGHTS = {"weight": 1.0, "matching_weight": 1.0, "label_smoothing": 0.0, "z_loss_weight": 0.0}


@dataclass(frozen=True)
class HeldOutStream:
    """`stream` under the name of its objective, by which masks are drawn, and without what a loss does not
    depend on. `pool`: samples that are compared with one another; None where none are."""

    stream: Stream
    kind: Kind
    max_text_length: int
    pool: int | None


@dataclass(frozen=True)
class GroupLosses:
    """Of one loss or accuracy: its sum over the units of each group, and their number."""

    sum_G: np.ndarray
    count_G: np.ndarray


def check(recipe: Recipe) -> None:
    """Raises UserError where codes are predicted, and their tokenizer is missing or of another model."""
    if any(stream.image_target == "codes" for stage in recipe.stages for stream in stage.streams):
        assert recipe.data.visual_tokenizer is not None
        check_visual_tokenizer(recipe.data.visual_tokenizer, recipe.model)


def held_out_stream(recipe: Recipe, stream: Stream) -> HeldOutStream:
    source = recipe.data.sources[stream.source]
    length = recipe.model.max_text_length
    return HeldOutStream(
        stream.model_copy(update={"name": stream.objective, "source": source.kind, **WEIGHTS}),
        source.kind,
        length if source.kind == "image" else source.max_text_length or length,
        source.batch_size if stream.is_pooled else None,
    )


def distinct_streams(recipe: Recipe) -> dict[str, HeldOutStream]:
    """By what a table calls them, in the order of the stages."""
    found: dict[str, HeldOutStream] = {}
    for stage in recipe.stages:
        for stream in stage.streams:
            held_out = held_out_stream(recipe, stream)
            if held_out in found.values():
                continue
            name = f"{stream.name}: {stream.objective} of {held_out.kind}s"
            found[name if name not in found else f"{name} as in {stage.name}"] = held_out
    return found


def evaluate(checkpoint: Checkpoint, cells: dict[str, str]) -> list[Table]:
    """Measures every cell (name -> shards) with every snapshot of the run; samples are read once."""
    recipe = checkpoint.recipe
    streams = distinct_streams(recipe)
    objectives = {
        name: build_objective(held.stream, recipe.model, visual_tokenizer=recipe.data.visual_tokenizer)
        for name, held in streams.items()
    }
    tokenizer, size = checkpoint.tokenizer(), recipe.evaluation.batch_size
    samples = _read(recipe, tokenizer, cells, list(streams.values()))
    rows: list[list[Value]] = []
    for snapshot in checkpoint.snapshots():
        print(f"after {snapshot.name}", flush=True)
        model = checkpoint.model_of(snapshot)
        for name, held in streams.items():
            wanted = ("loss",) if held.pool is None else ("loss", "accuracy")
            of_cell = {}
            for cell in cells:
                groups = cut(samples[cell, held.kind, held.max_text_length], held, size)
                of_cell[cell] = measure(model, objectives[name], tokenizer, groups, recipe.seed, wanted)
            start: list[Value] = [snapshot.name, name, _trained(checkpoint.trained, snapshot, held)]
            rows += _rows(start, of_cell, recipe.seed)
    columns = ["after", "stream", "trained", "measure", *cells]
    return [Table("Held-out losses after each stage [95 %]", columns, rows, _notes(streams))]


def _read(
    recipe: Recipe, tokenizer: Tokenizer, cells: dict[str, str], streams: Sequence[HeldOutStream]
) -> dict[tuple[str, Kind, int], list[Sample]]:
    """(cell, kind, longest text) -> samples without masks. Raises UserError where there are none."""
    wanted: set[tuple[Kind, int]] = {(held.kind, held.max_text_length) for held in streams}
    found = {}
    for cell, shards in cells.items():
        for kind, length in sorted(wanted):
            samples = read_samples(
                shards,
                image_size=recipe.model.image_size,
                max_text_length=length,
                tokenizer=tokenizer,
                maskings={},
                seed=recipe.seed,
                limit=recipe.evaluation.max_samples,
                kind=kind,
            )
            found[cell, kind, length] = list(samples)
            if not found[cell, kind, length]:
                raise UserError(f"the held-out shards {shards} hold no {kind} that can be used")
            print(f"{cell}: {len(found[cell, kind, length])} {kind}s", flush=True)
    return found


def cut(samples: Sequence[Sample], held: HeldOutStream, batch_size: int) -> list[Sequence[Sample]]:
    """The samples of each pass: whole pools; else at most `batch_size`, and fewer where that makes less than
    GROUPS groups."""
    if held.pool is not None:
        size, number = held.pool, len(samples) // held.pool * held.pool
    else:
        size, number = max(1, min(batch_size, len(samples) // GROUPS)), len(samples)
    return [samples[start : start + size] for start in range(0, number, size)]


@torch.no_grad()
def measure(
    model: VisionLanguageModel,
    objective: Objective,
    tokenizer: Tokenizer,
    groups: Sequence[Sequence[Sample]],
    seed: int,
    wanted: tuple[str, ...] = ("loss",),
) -> dict[str, GroupLosses]:
    """What the objective reports under names that end so, by these names; nothing without a group."""
    device = next(model.parameters()).device
    maskings = {objective.name: objective.masking(tokenizer)}
    found: dict[str, list[tuple[float, float]]] = {}
    for group in groups:
        batch = collate([with_masks(sample, maskings, seed) for sample in group]).to(device)
        output = objective(model, batch, objective.units(batch), 0.0)
        for name, (total, count) in output.metrics.items():
            if name.endswith(wanted):
                found.setdefault(name, []).append((float(total), float(count)))
    return {name: GroupLosses(*np.array(sums).T) for name, sums in found.items()}


def _trained(recipe: Recipe, snapshot: Snapshot, held: HeldOutStream) -> str | None:
    """Whether that stage trained the stream, one before it, or none up to there; in pools of any size."""
    if snapshot.stages_done is None:
        return None

    def has(stage: Stage) -> bool:
        found = [held_out_stream(recipe, stream) for stream in stage.streams]
        return any((other.stream, other.kind) == (held.stream, held.kind) for other in found)

    *before, here = [False, *(has(stage) for stage in recipe.stages[: snapshot.stages_done])]
    return "here" if here else "before" if any(before) else "no"


def _rows(start: list[Value], of_cell: dict[str, dict[str, GroupLosses]], seed: int) -> list[list[Value]]:
    """One for each loss and accuracy."""
    names = list(dict.fromkeys(name for found in of_cell.values() for name in found)) or ["loss"]
    return [
        [*start, name.replace("_", " "), *(_value(found.get(name), seed) for found in of_cell.values())]
        for name in names
    ]


def _value(found: GroupLosses | None, seed: int) -> Value:
    """The mean over units; one group has no interval."""
    if found is None or not found.count_G.sum():
        return None
    if len(found.sum_G) == 1:
        return float(found.sum_G[0] / found.count_G[0])
    return bootstrap_ratio(found.sum_G, found.count_G, seed=seed)


def _notes(streams: dict[str, HeldOutStream]) -> list[str]:
    notes = [
        "trained: the stream is one of that stage (here), of one before it (before), or of none so far (no). "
        "start: what the first stage began with. All rows meet the same samples and masks.",
        "Mean over masked patches (squared error of pixels, in the space of the targets; nats of codes), "
        "masked words or pairs (nats), without label smoothing, z-loss and the losses of routers.",
        f"Intervals: bootstrap over small batches, at least {GROUPS} of a cell, or over samples where it has "
        "no more.",
    ]
    pools = sorted({held.pool for held in streams.values() if held.pool is not None})
    if pools:
        notes.append(
            "Contrast and matching: within pools of the source's batch_size "
            f"({', '.join(map(str, pools))}), without the last, incomplete one; intervals over pools. One "
            "pool has no interval, a smaller cell no number. With contrast_matching the model draws its own "
            "hard negatives: a better contrast makes matching harder."
        )
    return notes
