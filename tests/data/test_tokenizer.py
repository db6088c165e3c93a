"""The tokenizer against sentencepiece itself and by hand."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from eve.data.tokenizer import SPECIALS, Tokenizer, cut
from eve.errors import UserError
from tools.train_tokenizer import train

TEXTS = [
    f"{a} {b} {c} {d}."
    for a in ("a", "the", "one")
    for b in ("dog", "cat", "Bird", "doggy", "catty")
    for c in ("runs", "sleeps", "plays", "running", "sleeping", "playing")
    for d in ("here", "there", "now")
]
VOCAB_SIZE = 30


@pytest.fixture(scope="module")
def model_bytes() -> bytes:
    return train(TEXTS, VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(model_bytes: bytes) -> Tokenizer:
    return Tokenizer(model_bytes)


def test_specials_are_found_by_name(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id, tokenizer.unk_id]
    assert [tokenizer.piece(index) for index in ids] == list(SPECIALS)
    assert np.flatnonzero(tokenizer.special_V).tolist() == sorted(ids)
    assert tokenizer.vocab_size == len(tokenizer.special_V) == len(tokenizer.word_start_V) == VOCAB_SIZE


def test_specials_may_stand_anywhere(tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(tmp_path / "texts.txt"),
        model_prefix=str(tmp_path / "other"),
        vocab_size=VOCAB_SIZE,
        unk_id=0,
        bos_id=2,
        eos_id=1,
        pad_id=4,
        unk_piece="[UNK]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        pad_piece="[PAD]",
        control_symbols=["[MASK]"],
        minloglevel=2,
    )
    other = Tokenizer.load(tmp_path / "other.model")
    assert (other.unk_id, other.sep_id, other.cls_id, other.mask_id, other.pad_id) == (0, 1, 2, 3, 4)
    assert other.fingerprint == hashlib.sha256((tmp_path / "other.model").read_bytes()).hexdigest()


def test_encode_is_sentencepiece_between_cls_and_sep(tokenizer: Tokenizer, model_bytes: bytes) -> None:
    oracle = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    for text in ["the dog plays.", "THE BIRD", "", "dog☃cat", "  a   cat  "]:
        inside = oracle.encode(text)
        whole = tokenizer.encode(text, 100)
        assert whole.dtype == np.int64
        assert whole.tolist() == [tokenizer.cls_id, *inside, tokenizer.sep_id]
        for length in (2, 3, 5):
            cut = tokenizer.encode(text, length).tolist()
            assert cut == [tokenizer.cls_id, *inside[: length - 2], tokenizer.sep_id]


def test_cut_is_encode_of_less(tokenizer: Tokenizer) -> None:
    whole_N = tokenizer.encode("the doggy sleeps there.", 100)
    for length in range(2, len(whole_N) + 2):
        expected_N = tokenizer.encode("the doggy sleeps there.", length)
        assert cut(whole_N, length).tolist() == expected_N.tolist()


def test_the_name_of_a_special_piece_in_a_text_is_ordinary_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a [MASK] [SEP] [CLS] [PAD] dog", 100)
    assert not np.isin(
        ids[1:-1], [tokenizer.mask_id, tokenizer.sep_id, tokenizer.cls_id, tokenizer.pad_id]
    ).any()


def test_word_starts_cut_a_text_into_its_words(tokenizer: Tokenizer) -> None:
    text = "the bird sleeps a dog plays"
    ids = tokenizer.encode(text, 100)[1:-1]
    starts = np.flatnonzero(tokenizer.word_start_V[ids])
    words = [tokenizer.decode(word) for word in np.split(ids, starts[1:])]
    assert starts[0] == 0
    assert words == text.split()
    assert len(ids) > len(words)
    assert not (tokenizer.word_start_V & tokenizer.special_V).any()


def test_decode_gives_the_text_back_without_specials(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("The Cat runs.", 100)
    assert tokenizer.decode(ids) == "the cat runs."
    assert tokenizer.decode([tokenizer.pad_id, *ids, tokenizer.mask_id, tokenizer.pad_id]) == "the cat runs."
    assert "[UNK]" in tokenizer.decode(tokenizer.encode("☃", 10))


def test_pickles_whole(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.fingerprint == tokenizer.fingerprint == hashlib.sha256(tokenizer.model_bytes).hexdigest()
    assert copy.encode("a dog", 9).tolist() == tokenizer.encode("a dog", 9).tolist()


def test_mistakes_are_named(tmp_path: Path, model_bytes: bytes) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(UserError, match="there is no tokenizer"):
        Tokenizer.load(path)
    for content in (b"garbage", model_bytes[: len(model_bytes) // 2]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"t\.model is not a sentencepiece model"):
            Tokenizer.load(path)
    path.write_bytes(b"")
    with pytest.raises(
        UserError, match=r"t\.model is empty, as where .* without a tokenizer; convert them again"
    ):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="cannot be read"):
        Tokenizer.load(tmp_path)
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.Train(
        input=str(tmp_path / "texts.txt"),
        model_prefix=str(tmp_path / "plain"),
        vocab_size=VOCAB_SIZE,
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"lacks the pieces \[PAD\] \[CLS\] \[SEP\] \[MASK\] \[UNK\]"):
        Tokenizer.load(tmp_path / "plain.model")
