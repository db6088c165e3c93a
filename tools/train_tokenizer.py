"""Trains a sentencepiece tokenizer: python tools/train_tokenizer.py SOURCE... --output tokenizer.model

A SOURCE is a directory, glob or brace pattern of local tar shards (their captions), or a text file (a text a
line). The pieces [PAD] [CLS] [SEP] [MASK] [UNK] get the ids 0 to 4. The same texts and options make the same
model on any machine. Exit code 2: a mistake in the call or in the data.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import sentencepiece

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from eve.data.manifest import parse_text, read_texts, scan_tar
from eve.data.shards import expand
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError

MAX_VOCAB_SIZE = 65536
# sentencepiece adds up counts by thread, so their number is part of the result and must not be the machine's.
NUM_THREADS = 4


@dataclass(frozen=True)
class Statistics:
    """Over a sample of the texts: share of the characters that are not [UNK], tokens and words a text."""

    texts: int
    coverage: float
    mean_tokens: float
    p95_tokens: int
    tokens_per_word: float


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        texts = sample_texts(read_sources(options.sources), options.max_texts)
        model_bytes = train(
            texts, options.vocab_size, options.type, lowercase=options.lowercase, coverage=options.coverage
        )
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_bytes(model_bytes)
    except UserError as error:
        print(f"train_tokenizer: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"train_tokenizer: {options.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    tokenizer = Tokenizer(model_bytes)
    found = measure(tokenizer, sample_texts(texts, 20_000))
    print(f"{options.output}: {tokenizer.vocab_size} pieces ({options.type}), from {len(texts):,} texts")
    print(f"characters covered {found.coverage:.4%}, tokens a word {found.tokens_per_word:.2f}")
    print(f"tokens a text with [CLS] and [SEP]: mean {found.mean_tokens:.1f}, 95 % under {found.p95_tokens}")
    return 0


def read_sources(sources: Iterable[str]) -> Iterator[str]:
    """All texts of shards and text files. Samples whose text cannot be parsed are left out, with a line on
    stderr in the end. Raises UserError where a source is missing or a text file is not UTF-8."""
    broken: list[str] = []
    for source in sources:
        if Path(source).is_file() and not source.endswith(".tar"):
            try:
                with open(source, encoding="utf-8-sig") as file:
                    yield from (line.strip() for line in file if line.strip())
            except UnicodeDecodeError:
                raise UserError(f"the text file {source} is not UTF-8") from None
            continue
        for path in expand(source):
            if not Path(path).is_file():
                raise UserError(f"the shard {path} is not a local file")
            index = scan_tar(path)
            with open(path, "rb") as file:
                for sample in index.samples:
                    try:
                        yield from parse_text(*read_texts(file, sample))[0]
                    except ValueError as error:
                        broken.append(f"{sample.key} of {path}: {error}")
    if broken:
        print(f"{len(broken)} broken samples are left out; the first is {broken[0]}", file=sys.stderr)


def sample_texts(texts: Iterable[str], limit: int) -> list[str]:
    """All texts, or those `limit` with the lowest hash of more: fair, and the same every time."""
    chosen = list(texts)
    if len(chosen) <= limit:
        return chosen
    ranks = [hashlib.blake2b(f"{i} {text}".encode(), digest_size=8).digest() for i, text in enumerate(chosen)]
    return [chosen[i] for i in sorted(sorted(range(len(chosen)), key=ranks.__getitem__)[:limit])]


def train(
    texts: list[str],
    vocab_size: int,
    kind: Literal["unigram", "bpe"] = "unigram",
    *,
    lowercase: bool = True,
    coverage: float = 0.9995,
) -> bytes:
    """The bytes of a model with exactly `vocab_size` pieces.

    `coverage`: share of the characters that become pieces, the rarest become [UNK]. Raises UserError where
    the texts are too few for so many pieces, or the characters too many for so few.
    """
    if not texts:
        raise UserError("the sources hold no text")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size,
            character_coverage=coverage,
            normalization_rule_name="nmt_nfkc_cf" if lowercase else "nmt_nfkc",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=4,
            pad_piece="[PAD]",
            bos_piece="[CLS]",
            eos_piece="[SEP]",
            unk_piece="[UNK]",
            unk_surface="[UNK]",
            control_symbols=["[MASK]"],
            max_sentence_length=1 << 16,
            num_threads=NUM_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_sentence(str(error), vocab_size, len(texts))) from None
    tokenizer = Tokenizer(model.getvalue())
    if tokenizer.vocab_size != vocab_size:
        raise UserError(_too_small(vocab_size, len(texts), tokenizer.vocab_size))
    return model.getvalue()


def measure(tokenizer: Tokenizer, texts: list[str]) -> Statistics:
    lengths: list[int] = []
    characters = unknown = words = 0
    for text in texts:
        ids = tokenizer.encode(text, 1 << 30)
        lengths.append(len(ids))
        unknown += int((ids == tokenizer.unk_id).sum())
        characters += len(text.replace(" ", ""))
        words += len(text.split())
    lengths.sort()
    tokens = sum(lengths)
    return Statistics(
        texts=len(texts),
        coverage=1 - unknown / characters,
        mean_tokens=tokens / len(texts),
        p95_tokens=lengths[int(0.95 * (len(lengths) - 1))],
        tokens_per_word=(tokens - 2 * len(texts)) / words,
    )


def _sentence(message: str, vocab_size: int, texts: int) -> str:
    if match := re.search(r"Please set it to a value <= (\d+)", message):
        return _too_small(vocab_size, texts, int(match[1]))
    if match := re.search(r"smaller than required_chars.*?(\d+) vs (\d+)", message):
        return (
            f"--vocab-size {vocab_size} is too small for the characters of the texts, which need at least "
            f"{match[2]}; raise it or lower --coverage"
        )
    return f"sentencepiece cannot train on the texts: {' '.join(message.split())}"


def _too_small(vocab_size: int, texts: int, most: int) -> str:
    return f"--vocab-size {vocab_size} is too large for {texts} texts, which give at most {most} pieces"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_tokenizer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--vocab-size", type=_vocab_size, required=True, help=f"8 to {MAX_VOCAB_SIZE}")
    parser.add_argument("--type", choices=("unigram", "bpe"), default="unigram")
    parser.add_argument(
        "--lowercase",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="NFKC with case folding (the default) or without",
    )
    parser.add_argument("--coverage", type=float, default=0.9995, help="share of characters kept (0.9995)")
    parser.add_argument("--max-texts", type=int, default=5_000_000, help="a fixed sample of more (5,000,000)")
    return parser


def _vocab_size(text: str) -> int:
    value = int(text)
    if not 8 <= value <= MAX_VOCAB_SIZE:
        raise argparse.ArgumentTypeError(f"{value} is not between 8 and {MAX_VOCAB_SIZE}")
    return value


if __name__ == "__main__":
    sys.exit(main())
