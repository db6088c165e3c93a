"""train_tokenizer: specials, determinism, sources, statistics by hand, and its mistakes."""

import io
import random
import tarfile
from pathlib import Path

import pytest

from eve.data.shard_writer import Record, write_shards
from eve.data.tokenizer import SPECIALS, Tokenizer
from eve.errors import UserError
from tests.tools.raw_images import picture
from tools.train_tokenizer import main, measure, read_sources, sample_texts, train

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def corpus(number: int = 400) -> list[str]:
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(150)]
    return [" ".join(rng.choices(words, k=rng.randint(3, 9))).capitalize() + " ." for _ in range(number)]


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_the_model_has_the_size_and_the_specials_and_is_the_same_each_time(kind) -> None:
    first, second = (Tokenizer(train(corpus(), 150, kind)) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 150
    assert [first.piece(index) for index in range(5)] == list(SPECIALS)
    text = corpus()[7]
    assert first.decode(first.encode(text, 500)) == text.lower()
    cased = Tokenizer(train(corpus(), 150, kind, lowercase=False))
    assert cased.decode(cased.encode(text, 500)) == text


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_a_corpus_that_is_too_small_is_told_the_size_that_works(kind) -> None:
    with pytest.raises(
        UserError, match=r"--vocab-size 60000 is too large for 400 texts.* at most (\d+)"
    ) as error:
        train(corpus(), 60_000, kind)
    most = int(str(error.value).split()[-2])
    assert Tokenizer(train(corpus(), most, kind)).vocab_size == most
    with pytest.raises(UserError, match="is too large"):
        train(corpus(), most + 1, kind)


def test_a_vocabulary_smaller_than_the_alphabet_is_told_the_size_that_works() -> None:
    with pytest.raises(
        UserError, match="too small for the characters of the texts, which need at least "
    ) as error:
        train(corpus(), 10)
    least = int(str(error.value).split("at least ")[1].split(";")[0])
    assert Tokenizer(train(corpus(), least)).vocab_size == least
    with pytest.raises(UserError, match="too small"):
        train(corpus(), least - 1)


def test_shards_and_text_files_give_their_texts(tmp_path: Path) -> None:
    records = [
        Record("a", picture(0), captions=["one", "two"], metadata={"label": "not a text"}),
        Record("b", None, captions=["three"]),
        Record("c", picture(1), metadata={"label": "none"}),
    ]
    write_shards(records, tmp_path / "shards", shard_size=2)
    (tmp_path / "t.txt").write_text("four\n\n five \n")
    (tmp_path / "odd.name").write_text("six")
    sources = [str(tmp_path / name) for name in ("shards", "t.txt", "odd.name", "shards/00000{0,1}.tar")]
    shards = ["one", "two", "three"]
    assert list(read_sources(sources)) == [*shards, "four", "five", "six", *shards]


def test_broken_samples_are_left_out_counted_and_named(tmp_path: Path, capsys) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in [
            ("a.json", b'{"caption": "one"}'),
            ("b.json", b'{"caption": "\\ud800 two"}'),
            ("c.json", b"{"),
            ("d.txt", b"three"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    assert list(read_sources([str(tmp_path / "a.tar")])) == ["one", "three"]
    error = capsys.readouterr().err
    assert error.startswith(f"2 broken samples are left out; the first is b of {tmp_path}/a.tar: ")
    assert "surrogate" in error


def test_a_sample_of_the_texts_is_fair_and_keeps_their_order() -> None:
    texts = [str(i) for i in range(10_000)]
    chosen = [int(text) for text in sample_texts(texts, 1000)]
    assert chosen == sorted(set(chosen))
    assert len(chosen) == 1000
    # Tenths of the corpus each give about 100 (standard deviation 9).
    assert all(60 < sum(i // 1000 == tenth for i in chosen) < 140 for tenth in range(10))
    assert sample_texts(texts[:5], 5) == texts[:5]
    assert len(sample_texts(["same"] * 10, 4)) == 4


def test_statistics_agree_with_a_count_by_hand() -> None:
    tokenizer = Tokenizer(train(corpus(), 120))
    texts = [*corpus(40), "☃ ba"]
    found = measure(tokenizer, texts)
    pieces = [len(tokenizer.encode(text, 10_000)) - 2 for text in texts]
    assert found.texts == 41
    assert found.mean_tokens == pytest.approx(sum(pieces) / 41 + 2)
    assert found.tokens_per_word == pytest.approx(sum(pieces) / sum(len(text.split()) for text in texts))
    assert found.coverage == pytest.approx(1 - 1 / sum(len(text.replace(" ", "")) for text in texts))
    assert found.p95_tokens in [length + 2 for length in pieces]


def test_the_command_writes_a_model_and_says_what_it_is(tmp_path: Path, capsys) -> None:
    (tmp_path / "t.txt").write_text("\n".join(corpus()))
    output = tmp_path / "new" / "t.model"
    arguments = [str(tmp_path / "t.txt"), "--output", str(output), "--vocab-size", "120"]
    assert main([*arguments, "--type", "bpe"]) == 0
    assert "120 pieces (bpe), from 400 texts" in capsys.readouterr().out
    assert Tokenizer.load(output).fingerprint == Tokenizer(train(corpus(), 120, "bpe")).fingerprint


@pytest.mark.parametrize(
    ("content", "source", "message"),
    [
        (b"", "t.txt", "hold no text"),
        (b"\xff\xfe", "t.txt", "is not UTF-8"),
        (b"a few words", "t.txt", "--vocab-size 100 is too large for 1 texts"),
        (b"a", "none", "no shard"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path: Path, capsys, content, source, message) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    arguments = [str(tmp_path / source), "--output", str(tmp_path / "t.model"), "--vocab-size", "100"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "t.model").exists()
    with pytest.raises(SystemExit) as end:
        main([*arguments[:-1], "70000"])
    assert end.value.code == 2


@pytest.mark.skipif(not (SHARED / "snli").is_dir(), reason="needs SNLI in ../shared/data")
def test_real_sentences_are_covered(tmp_path: Path, capsys) -> None:
    source = SHARED / "snli" / "snli_1.0_dev.jsonl"
    arguments = [
        str(source),
        "--output",
        str(tmp_path / "t.model"),
        "--vocab-size",
        "2000",
        "--max-texts",
        "2000",
    ]
    assert main(arguments) == 0
    covered = float(capsys.readouterr().out.split("characters covered ")[1].split("%")[0])
    assert covered > 99.9
