"""Grounding gain on outcomes that can be checked by hand, and on a model that has to look."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eve.config import FeedForward, Model, Stream
from eve.data.batch import Sample, collate
from eve.errors import UserError
from eve.model import build_model
from eve.objectives.masked_text import MaskedText
from eve.objectives.masking import TextMasking
from eve.tasks.masked_words import WordOutcomes, grounding, measure_words, with_wrong_images, word_tables

MASK = 3
CONFIG = Model(
    image_size=8,
    patch_size=4,
    width=32,
    depth=2,
    heads=2,
    hidden=64,
    vocab_size=16,
    max_text_length=8,
    text_positions=8,
    drop_path=0.0,
    text_dropout=0.0,
    feed_forward=(FeedForward(blocks=(0, 1), router="modality"),),
    decoder=None,
)
OBJECTIVE = MaskedText(Stream(name="s", source="pairs", objective="masked_text"), CONFIG)


def outcomes(hits, losses, labels, samples) -> WordOutcomes:
    return WordOutcomes(np.array(hits, float), np.array(losses, float), np.array(labels), np.array(samples))


def test_gain_by_hand():
    """Five words of three samples: 4 right with the right image, 1 with a wrong one."""
    labels, samples = [7, 7, 8, 9, 7], [0, 0, 1, 2, 2]
    right = outcomes([1, 1, 1, 0, 1], [0.1, 0.1, 0.2, 2.0, 0.1], labels, samples)
    wrong = outcomes([1, 0, 0, 0, 0], [0.1, 1.1, 1.2, 2.0, 1.1], labels, samples)
    found = grounding(right, wrong, 3, seed=0)
    assert found.num_words == 5
    assert (found.accuracy, found.accuracy_wrong_image) == (0.8, 0.2)
    assert found.gain.value == pytest.approx(0.6)
    assert found.gain_nats.value == pytest.approx(0.6)
    assert found.unigram_accuracy == 0.6
    assert found.unigram_loss == pytest.approx(-(0.6 * math.log(0.6) + 0.4 * math.log(0.2)))
    # Each sample gains half a word or a word of its words: resamples lie between 1/2 and 1.
    assert found.gain.low == pytest.approx(0.5)
    assert found.gain.high == pytest.approx(1.0)


def test_a_blind_model_gains_nothing():
    same = outcomes([1, 0, 1], [0.5, 1.0, 0.2], [5, 6, 7], [0, 0, 1])
    found = grounding(same, same, 2, seed=0)
    assert (found.gain.value, found.gain.low, found.gain.high) == (0, 0, 0)
    assert (found.gain_nats.value, found.gain_nats.low, found.gain_nats.high) == (0, 0, 0)


def make(index: int, image: np.ndarray, words: list[int], label=None) -> Sample:
    """All words are chosen; four of five read [MASK]."""
    special_V = np.arange(16) < 5
    masking = TextMasking(0.99, "token", 0.8, 0.1, MASK, special_V, ~special_V)
    tokens = np.array([1, *words, 2])
    metadata = {} if label is None else {"label": label}
    sample = Sample(str(index), 0, index, index, image_CHW=image, tokens_N=tokens, metadata=metadata)
    sample.masks["s"] = masking(sample, np.random.default_rng(index))
    return sample


def coloured(number: int, offset: int = 0) -> list[Sample]:
    """One of four colours, and a text of one word that names it: 5, 6, 7 or 8."""
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)
    rng = np.random.default_rng(offset)
    samples = []
    for index in range(number):
        colour = int(rng.integers(4))
        image = np.broadcast_to(colours[colour][:, None, None], (3, 8, 8)).copy()
        samples.append(make(offset + index, image, [5 + colour], label=colour))
    return samples


def test_wrong_images_show_another_label_and_leave_texts_and_masks_alone():
    samples = coloured(40)
    for before, after in zip(samples, with_wrong_images(samples, seed=1), strict=True):
        assert not np.array_equal(before.image_CHW, after.image_CHW)  # images are equal where labels are
        assert before.tokens_N is after.tokens_N
        assert before.masks is after.masks
    unlabelled = [make(i, np.full((3, 8, 8), i, dtype=np.uint8), [5]) for i in range(7)]
    moved = with_wrong_images(unlabelled, seed=1)
    assert sorted(int(s.image_CHW[0, 0, 0]) for s in moved) == list(range(7))
    assert all(int(s.image_CHW[0, 0, 0]) != i for i, s in enumerate(moved))


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_outcomes_are_those_of_each_word_that_reads_mask(batch_size):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    samples = [make(i, image, rng.integers(5, 16, 1 + i % 5).tolist()) for i, image in enumerate(images)]
    model = build_model(CONFIG, seed=0).eval()
    found = measure_words(model, OBJECTIVE, samples, batch_size, MASK)
    expected = []
    for index, sample in enumerate(samples):
        mask = sample.masks["s"]
        encoded = model.encode(
            images_BCHW=torch.from_numpy(sample.image_CHW)[None],
            tokens_N=torch.from_numpy(mask["input_N"]),
            text_lengths=[len(sample.tokens_N)],
        )
        for position in mask["position_N"]:
            if mask["input_N"][position] == MASK:
                logits = model.word_head(encoded.texts_ND[position])
                label = int(sample.tokens_N[position])
                loss = F.cross_entropy(logits, torch.tensor(label)).item()
                expected.append((float(logits.argmax() == label), loss, label, index))
    rows = list(zip(found.hit_K, found.loss_K, found.label_K, found.sample_K, strict=True))
    assert len(rows) == len(expected) > 10
    assert np.array(rows) == pytest.approx(np.array(expected), abs=1e-5)


def test_a_model_that_learned_to_look_gains_everything():
    """The only word of a text is the colour of its picture: right with the right image, always wrong with an
    image of another colour."""
    model = build_model(CONFIG, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(60):
        batch = collate(coloured(32, offset=1000 + 32 * step))
        optimizer.zero_grad()
        OBJECTIVE(model, batch, OBJECTIVE.units(batch), 1.0).loss.backward()
        optimizer.step()
    model.eval()
    samples = coloured(80)
    right, wrong = (
        measure_words(model, OBJECTIVE, some, 32, MASK) for some in (samples, with_wrong_images(samples, 0))
    )
    found = grounding(right, wrong, len(samples), seed=0)
    assert found.accuracy == 1.0
    assert found.accuracy_wrong_image == 0.0
    assert found.gain.low == 1.0
    assert found.gain_nats.low > 1.0
    assert 0.2 < found.unigram_accuracy < 0.45
    tables = word_tables({"colours": found})
    assert tables[0].rows[0][-1] == found.gain


def test_texts_without_a_hidden_word_are_refused():
    sample = make(0, np.zeros((3, 8, 8), np.uint8), [5])
    sample.masks["s"]["input_N"] = sample.tokens_N.copy()
    with pytest.raises(UserError, match="mask_share"):
        measure_words(build_model(CONFIG, 0).eval(), OBJECTIVE, [sample], 4, MASK)
