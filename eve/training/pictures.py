"""What the model sees and what it makes of it: original | masked | reconstruction, and captions.

Shape suffixes: B sample, M masked patch, P patch, C pixels of a patch, K masked word, V vocabulary,
N text token, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eve.data.batch import Batch, collate
from eve.data.tokenizer import Tokenizer
from eve.model import VisionLanguageModel
from eve.model.embeddings import patchify, unpatchify
from eve.objectives import Objective
from eve.objectives.masked_codes import MaskedCodes
from eve.objectives.masked_image import ImagePrediction, MaskedImage
from eve.objectives.masked_text import MaskedText, TextPrediction
from eve.training.drawing import BLACK, GREEN, GREY, RED, Cell, Colour, Line, draw_sheet

_HIDDEN = 128  # the grey of a masked patch
_BLANK = " ____"


@dataclass(frozen=True)
class Picture:
    """A sheet of samples: uint8 (H, W, 3), and its captions as Markdown."""

    name: str
    image_HWC: np.ndarray
    text: str


def draw_batch(
    model: VisionLanguageModel,
    objectives: Mapping[str, Objective],
    batch: Batch,
    tokenizer: Tokenizer | None,
    *,
    name: str,
    limit: int = 8,
) -> Picture:
    """Draws the first `limit` samples of a batch as the streams that have masks in it see them.

    The model predicts in evaluation mode and is put back into the mode it was in. Streams that mask both
    inputs at once (the ablation) are left out.
    """
    few = collate(batch.samples[:limit]).to(batch.seed_B.device)
    image: ImagePrediction | None = None
    captions: list[Caption] = []
    training = model.training
    model.eval()
    for stream in few.masks:
        objective = objectives[stream]
        if isinstance(objective, MaskedImage) and image is None:
            image = objective.predict(model, few)
        elif isinstance(objective, MaskedCodes) and image is None:
            image = objective.predict_pixels(model, few)
        elif isinstance(objective, MaskedText) and not captions:
            assert tokenizer is not None
            captions = captions_of(few, stream, objective.predict(model, few), tokenizer)
    model.train(training)
    pictures = image_rows(few, image, model.config.patch_size)
    cells = [
        Cell(pictures[i] if pictures else (), captions[i].lines() if captions else ())
        for i in range(few.size)
    ]
    text = "\n".join(f"- `{caption.key}` {caption.markdown()}" for caption in captions)
    return Picture(name, draw_sheet(cells, footnote=footnote(image)), text)


def footnote(image: ImagePrediction | None) -> str:
    if image is None:
        return ""
    note = "Reconstruction: visible patches as they are, masked patches as predicted"
    if image.normalised:
        note += ", with the true mean and standard deviation of each patch (the model predicts neither)"
    return note + "."


def image_rows(
    batch: Batch, prediction: ImagePrediction | None, patch_size: int
) -> list[list[tuple[str, np.ndarray]]]:
    """For each sample (title, uint8 (H, W, 3)): original, and where there is a prediction masked and
    reconstruction. Empty where the batch has no images."""
    if batch.images_BCHW is None:
        return []
    columns = [("original", batch.images_BCHW)]
    if prediction is not None:
        patches_BPC = patchify(batch.images_BCHW, patch_size)
        hidden_BMC = torch.full_like(prediction.pred_BMC, _HIDDEN)
        predicted_BMC = prediction.to_pixels().add(1.0).mul(127.5).round().clamp(0, 255)
        columns += [
            ("masked", unpatchify(_replace(patches_BPC, prediction.masked_BM, hidden_BMC), patch_size)),
            (
                "reconstruction",
                unpatchify(_replace(patches_BPC, prediction.masked_BM, predicted_BMC), patch_size),
            ),
        ]
    arrays = [(title, images.permute(0, 2, 3, 1).cpu().numpy()) for title, images in columns]
    return [[(title, array[i]) for title, array in arrays] for i in range(batch.size)]


def _replace(patches_BPC: Tensor, masked_BM: Tensor, new_BMC: Tensor) -> Tensor:
    """The masked patches replaced, the visible ones untouched."""
    index_BMC = masked_BM[..., None].expand(-1, -1, patches_BPC.shape[-1])
    return patches_BPC.scatter(1, index_BMC, new_BMC.to(patches_BPC.dtype))


@dataclass(frozen=True)
class Place:
    """A token: its text, what the model read there, what it predicts (None where it was not chosen)."""

    true: str
    read: str
    guess: str | None


@dataclass(frozen=True)
class Caption:
    """A text, some tokens of which were masked and predicted ([CLS] and [SEP] left out)."""

    key: str
    places: Sequence[Place]

    def lines(self) -> list[Line]:
        """What the model read, and what it says where words were masked: green right, red wrong, with the
        true word behind a wrong one."""
        read: list[tuple[str, Colour]] = []
        said: list[tuple[str, Colour]] = []
        for place in self.places:
            read.append((place.read, BLACK))
            if place.guess is None:
                said.append((place.true, GREY))
            elif place.guess == place.true:
                said.append((place.guess, GREEN))
            else:
                said += [(place.guess, RED), (f" ({place.true.strip()})", GREY)]
        return [Line("read:", read), Line("said:", said)]

    def markdown(self) -> str:
        """`a **dog** on ~~wet~~ **green** grass`: bold was masked, struck through is a wrong prediction."""
        parts: list[str] = []
        for place in self.places:
            if place.guess is None:
                parts.append(place.true)
            elif place.guess == place.true:
                parts.append(f" **{place.true.strip()}**")
            else:
                parts.append(f" ~~{place.guess.strip()}~~ **{place.true.strip()}**")
        return "".join(parts).strip()


def captions_of(batch: Batch, stream: str, prediction: TextPrediction, tokenizer: Tokenizer) -> list[Caption]:
    """A caption for each sample of the batch, with the most likely word at each masked place."""

    def shown(index: int) -> str:
        return _BLANK if index == tokenizer.mask_id else tokenizer.piece(index).replace("\u2581", " ")

    best_K = iter(prediction.logits_KV.argmax(-1).tolist())  # in the order of the samples and places
    captions = []
    for sample in batch.samples:
        assert sample.tokens_N is not None
        mask = sample.masks[stream]
        guesses = {position: shown(next(best_K)) for position in mask["position_N"].tolist()}
        inside = range(1, len(sample.tokens_N) - 1)
        places = [Place(shown(sample.tokens_N[i]), shown(mask["input_N"][i]), guesses.get(i)) for i in inside]
        captions.append(Caption(sample.key, places))
    return captions
