"""Codes of masked patches, against always saying the most frequent one.

Shape suffixes: B sample, K masked patch, V code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from eve.data.batch import Sample, collate
from eve.model import VisionLanguageModel
from eve.objectives.masked_codes import MaskedCodes
from eve.tasks.masked_words import WordOutcomes
from eve.tasks.report import Table, Value
from eve.tasks.statistics import bootstrap_ratio, sum_by_sample


@torch.no_grad()
def measure_codes(
    model: VisionLanguageModel, objective: MaskedCodes, samples: Sequence[Sample], batch_size: int
) -> WordOutcomes:
    """What became of every masked patch of all samples."""
    device = next(model.parameters()).device
    parts: list[tuple[np.ndarray, ...]] = []
    for start in range(0, len(samples), batch_size):
        prediction = objective.predict(model, collate(samples[start : start + batch_size]).to(device))
        logits_KV, label_K = prediction.logits_BMV.flatten(0, 1), prediction.labels_BM.flatten()
        hit_K = (logits_KV.argmax(-1) == label_K).double()
        loss_K = F.cross_entropy(logits_KV, label_K, reduction="none").double()
        num_samples, num_masked = prediction.masked_BM.shape
        sample_K = torch.arange(start, start + num_samples).repeat_interleave(num_masked)
        parts.append(tuple(tensor.cpu().numpy() for tensor in (hit_K, loss_K, label_K, sample_K)))
    return WordOutcomes(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def code_tables(of_cell: dict[str, WordOutcomes], seed: int) -> list[Table]:
    """`of_cell`: what `measure_codes` gave for each cell."""
    rows: list[list[Value]] = []
    for cell, found in of_cell.items():
        number = int(found.sample_K.max()) + 1
        patches_B = sum_by_sample(np.ones(len(found.hit_K)), found.sample_K, number)
        hits_B = sum_by_sample(found.hit_K, found.sample_K, number)
        share_V = np.bincount(found.label_K) / len(found.label_K)
        used_V = share_V[share_V > 0]
        rows.append(
            [
                cell,
                number,
                bootstrap_ratio(hits_B, patches_B, seed=seed),
                float(share_V.max()),
                float(found.loss_K.mean()),
                float(-(used_V * np.log(used_V)).sum()),
                len(used_V),
            ]
        )
    columns = ["cell", "pictures", "accuracy [95 %]", "unigram", "nats", "unigram nats", "codes seen"]
    notes = [
        "Top 1 of all codes, and cross-entropy. Unigram: always the most frequent code of the masked patches "
        "of the cell itself, and their entropy. Intervals: bootstrap over pictures.",
    ]
    return [Table("Codes of masked patches", columns, rows, notes)]
