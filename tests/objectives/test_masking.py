"""What is hidden: exact counts, uniformity, whole words, BERT's shares."""

import numpy as np
import pytest

from eve.data.batch import Sample
from eve.objectives.masking import ImageMasking, TextMasking, block_patches, num_masked_patches


def generator(seed=0):
    return np.random.Generator(np.random.Philox(seed))


@pytest.mark.parametrize(("num_patches", "ratio", "masked"), [(196, 0.75, 147), (64, 0.75, 48), (2, 0.9, 1)])
def test_number_of_masked_patches(num_patches, ratio, masked):
    assert num_masked_patches(num_patches, ratio) == masked


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize(("side", "ratio"), [(14, 0.75), (14, 0.4), (3, 0.5), (2, 0.9)])
def test_image_mask_has_the_exact_number_and_covers_every_patch_once(kind, side, ratio):
    masking = ImageMasking(side, ratio, kind)
    rng = generator()
    for _ in range(50):
        mask = masking(Sample("k", 0, 0, 0), rng)
        assert len(mask["masked_M"]) == num_masked_patches(side**2, ratio)
        assert sorted([*mask["visible_V"], *mask["masked_M"]]) == list(range(side**2))


def test_random_mask_is_uniform():
    masking = ImageMasking(4, 0.5, "random")
    rng = generator()
    hits = np.zeros(16)
    for _ in range(4000):
        hits[masking(Sample("k", 0, 0, 0), rng)["masked_M"]] += 1
    assert np.abs(hits / 4000 - 0.5).max() < 0.035


def test_block_mask_is_clumped():
    """Masked neighbours of a masked patch: far more than under a random mask of the same share."""

    def neighbours(masked):
        grid = masked.reshape(14, 14)
        return (grid[1:] & grid[:-1]).sum() + (grid[:, 1:] & grid[:, :-1]).sum()

    rng = generator()
    blocks = np.mean([neighbours(block_patches((14, 14), 75, rng)) for _ in range(200)])
    random = np.mean([neighbours(rng.permutation(196) < 75) for _ in range(200)])
    assert blocks > 1.5 * random


SPECIAL = np.arange(100) < 5
WORD_START = np.arange(100) % 2 == 0


def text_masking(ratio=0.5, kind="token", mask_share=0.8, random_share=0.1):
    return TextMasking(ratio, kind, mask_share, random_share, 3, SPECIAL, WORD_START)


def sample(tokens):
    return Sample("k", 0, 0, 0, tokens_N=np.asarray([1, *tokens, 2]))


@pytest.mark.parametrize(("length", "chosen"), [(0, 0), (1, 1), (3, 2), (10, 5), (11, 6)])
def test_number_of_masked_tokens(length, chosen):
    """Python rounds halves to even: 5.5 -> 6, 1.5 -> 2."""
    tokens = list(range(10, 10 + length))
    mask = text_masking()(sample(tokens), generator())
    assert len(mask["position_N"]) == chosen
    assert all(0 < p <= length for p in mask["position_N"])
    np.testing.assert_array_equal(mask["target_N"], np.asarray([1, *tokens, 2])[mask["position_N"]])


def test_bert_shares():
    tokens = list(np.tile(np.arange(10, 60), 4))
    rng = generator()
    fates = np.zeros(3)
    for _ in range(100):
        mask = text_masking()(sample(tokens), rng)
        got = mask["input_N"][mask["position_N"]]
        fates += [
            (got == 3).sum(),
            ((got != 3) & (got != mask["target_N"])).sum(),
            (got == mask["target_N"]).sum(),
        ]
        untouched = np.setdiff1d(np.arange(202), mask["position_N"])
        np.testing.assert_array_equal(mask["input_N"][untouched], np.asarray([1, *tokens, 2])[untouched])
        assert not SPECIAL[got[got != 3]].any()
    np.testing.assert_allclose(fates / fates.sum(), [0.8, 0.1, 0.1], atol=0.02)


def test_whole_words_are_never_split():
    tokens = [10, 11, 13, 20, 22, 23, 24, 25, 27, 29, 30]  # words at even ids
    words = [{1, 2, 3}, {4}, {5, 6}, {7, 8, 9, 10}, {11}]
    rng = generator()
    for _ in range(100):
        chosen = set(text_masking(kind="word")(sample(tokens), rng)["position_N"].tolist())
        assert 0 < len(chosen) <= 6 + 2  # past the number by half of the longest word at most
        assert all(word <= chosen or not word & chosen for word in words)


def test_long_words_are_masked_as_often_as_short_ones():
    tokens = [10, 20, 22, 23, 25, 27, 29, 30, 40, 50]  # one word of five pieces, five of one
    rng = generator()
    hits = np.zeros(12)
    for _ in range(3000):
        hits[text_masking(kind="word")(sample(tokens), rng)["position_N"]] += 1
    assert np.abs(hits[1:-1] / 3000 - 0.5).max() < 0.06


def test_a_text_of_one_long_word_is_masked_whole():
    mask = text_masking(ratio=0.1, kind="word")(sample([10, 11, 13, 15]), generator())
    assert mask["position_N"].tolist() == [1, 2, 3, 4]
