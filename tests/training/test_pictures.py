"""The pictures show what they say they show, pixel for pixel and word for word."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from eve.config import Decoder, FeedForward, Model, Stream
from eve.data.batch import Sample, collate
from eve.data.tokenizer import Tokenizer
from eve.model import build_model
from eve.objectives import build_objective
from eve.objectives.masked_image import ImagePrediction
from eve.objectives.masked_text import TextPrediction
from eve.training.drawing import GREEN, GREY, RED, Cell, Line, draw_sheet
from eve.training.pictures import captions_of, draw_batch, footnote, image_rows
from kernels.masked_pixel_loss import masked_pixels, pixel_target
from tools.train_tokenizer import train

IMAGE = Stream(name="image", source="pairs", objective="masked_image")
TEXT = Stream(name="text", source="pairs", objective="masked_text")
CAPTIONS = ["a red cat sits on the mat", "two dogs run over wet grass", "a bird"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train(CAPTIONS * 20, 48, "bpe"))


@pytest.fixture(scope="module")
def config(tokenizer) -> Model:
    return Model(
        image_size=16,
        patch_size=4,
        width=24,
        depth=2,
        heads=3,
        hidden=40,
        vocab_size=tokenizer.vocab_size,
        max_text_length=40,
        text_positions=40,
        feed_forward=(FeedForward(blocks=(0, 1), router="modality"),),
        decoder=Decoder(depth=1, width=16, heads=2),
    )


@pytest.fixture(scope="module")
def batch(tokenizer, config):
    rng = np.random.default_rng(0)
    objectives = [build_objective(stream, config) for stream in (IMAGE, TEXT)]
    samples = []
    for index, caption in enumerate(CAPTIONS):
        image = rng.integers(0, 256, (3, 16, 16), dtype=np.uint8)
        tokens = tokenizer.encode(caption, 40)
        sample = Sample(f"key{index}", 0, index, index, image_CHW=image, tokens_N=tokens, text=caption)
        masks = {objective.name: objective.masking(tokenizer)(sample, rng) for objective in objectives}
        samples.append(replace(sample, masks=masks))
    return collate(samples)


def perfect(batch, normalised: bool) -> ImagePrediction:
    masked = batch.masks["image"]["masked_M"]
    raw = masked_pixels(batch.images_BCHW, masked, 4)
    target = pixel_target(raw, normalised)
    return ImagePrediction(target, target, raw, masked, normalised)


def is_masked(batch, sample: int) -> np.ndarray:
    """bool (H, W) of 16 x 16 pixels, from the list of masked 4 x 4 patches, in row order."""
    masked_P = np.zeros(16, dtype=bool)
    masked_P[batch.masks["image"]["masked_M"][sample].numpy()] = True
    return np.kron(masked_P.reshape(4, 4), np.ones((4, 4), dtype=bool))


@pytest.mark.parametrize("normalised", [True, False])
def test_a_perfect_prediction_reconstructs_the_original(batch, normalised):
    for row in image_rows(batch, perfect(batch, normalised), 4):
        pictures = dict(row)
        assert np.abs(pictures["reconstruction"].astype(int) - pictures["original"]).max() <= 1


def test_visible_patches_are_kept_and_masked_ones_replaced(batch):
    black = replace(perfect(batch, False), pred_BMC=torch.full_like(perfect(batch, False).pred_BMC, -7.0))
    for index, row in enumerate(image_rows(batch, black, 4)):
        pictures, masked_HW = dict(row), is_masked(batch, index)
        assert masked_HW.mean() == 0.75
        for title in ("masked", "reconstruction"):
            assert (pictures[title][~masked_HW] == pictures["original"][~masked_HW]).all()
        assert (pictures["masked"][masked_HW] == 128).all()
        assert (pictures["reconstruction"][masked_HW] == 0).all()  # cut to the range of a pixel
        expected = batch.images_BCHW[index].permute(1, 2, 0).numpy()
        assert (pictures["original"] == expected).all()


def test_the_true_mean_and_deviation_are_admitted(batch):
    assert "true mean and standard deviation" in footnote(perfect(batch, True))
    assert "true" not in footnote(perfect(batch, False))
    assert footnote(None) == ""


def predicted(batch, tokenizer, wrong_places=()) -> TextPrediction:
    """Right at every masked place but those (counted over the batch), where it says [UNK]."""
    labels = batch.masks["text"]["target_N"].clone()
    said = labels.clone()
    said[list(wrong_places)] = tokenizer.unk_id
    samples = [i for i, sample in enumerate(batch.samples) for _ in sample.masks["text"]["position_N"]]
    logits = torch.nn.functional.one_hot(said, tokenizer.vocab_size).float()
    return TextPrediction(logits, labels, torch.tensor(samples))


def test_captions_say_what_stood_there(batch, tokenizer):
    captions = captions_of(batch, "text", predicted(batch, tokenizer), tokenizer)
    for caption, text in zip(captions, CAPTIONS, strict=True):
        assert "".join(place.true for place in caption.places).strip() == text
        assert caption.lines()[0].title == "read:"
        said = caption.lines()[1].pieces
        assert "".join(piece for piece, _ in said).strip() == text
        masked = len(batch.samples[captions.index(caption)].masks["text"]["position_N"])
        assert [colour for _, colour in said].count(GREEN) == masked
        assert "~~" not in caption.markdown()


def test_a_wrong_word_is_red_with_the_true_one_behind(batch, tokenizer):
    captions = captions_of(batch, "text", predicted(batch, tokenizer, wrong_places=[0]), tokenizer)
    first_target = tokenizer.piece(int(batch.masks["text"]["target_N"][0])).replace("▁", " ").strip()
    red = [piece for piece, colour in captions[0].lines()[1].pieces if colour == RED]
    grey = [piece for piece, colour in captions[0].lines()[1].pieces if colour == GREY]
    assert red == ["[UNK]"]
    assert f" ({first_target})" in grey
    assert f"~~[UNK]~~ **{first_target}**" in captions[0].markdown()
    assert all(RED not in [c for _, c in caption.lines()[1].pieces] for caption in captions[1:])


def test_masked_words_are_blank_in_what_was_read(batch, tokenizer):
    captions = captions_of(batch, "text", predicted(batch, tokenizer), tokenizer)
    for caption, sample in zip(captions, batch.samples, strict=True):
        blanks = sum(place.read == " ____" for place in caption.places)
        assert blanks == (sample.masks["text"]["input_N"] == tokenizer.mask_id).sum()


def test_a_drawn_batch_of_a_real_model(batch, tokenizer, config):
    model = build_model(config, seed=0)
    model.train()
    objectives = {stream.name: build_objective(stream, config) for stream in (IMAGE, TEXT)}
    picture = draw_batch(model, objectives, batch, tokenizer, name="pairs", limit=2)
    again = draw_batch(model, objectives, batch, tokenizer, name="pairs", limit=2)
    assert model.training
    assert picture.image_HWC.dtype == np.uint8
    assert picture.image_HWC.shape[2] == 3
    assert (picture.image_HWC == again.image_HWC).all()
    assert picture.text.count("\n") == 1
    assert "key0" in picture.text
    # The first sample's original stands in the upper left corner, enlarged eight times.
    original = batch.images_BCHW[0].permute(1, 2, 0).numpy()
    enlarged = np.kron(original, np.ones((8, 8, 1), dtype=np.uint8))
    top = next(y for y in range(60) if (picture.image_HWC[y : y + 128, 6:134] == enlarged).all())
    assert top > 0


def test_long_lines_are_wrapped_not_cut():
    line = Line("read:", [(f" word{i}", RED) for i in range(60)])
    sheet = draw_sheet([Cell((), [line])])
    short = draw_sheet([Cell((), [Line("read:", [(" word", RED)])])])
    assert sheet.shape[1] == short.shape[1]
    assert sheet.shape[0] > 4 * 17
    assert (sheet[:, -6:] == 255).all()
