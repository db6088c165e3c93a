"""The global batches do not depend on ranks or workers; a state goes on anywhere; no sample is lost."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from eve.config import Data, Source
from eve.data.batch import Sample
from eve.data.loader import SourceStream, bad_samples, merge_states, read_samples
from eve.data.manifest import describe_shard, write_manifest
from eve.errors import UserError

COUNTS = [11, 7, 1, 12]
# 12 readers: 3 whole workers even on 4 ranks; more readers than shards; 31 samples do not divide.
NUM_READERS = 12
BATCH = 12


class LettersTokenizer:
    """Picklable, needs no model file: [CLS] 1, letters, [SEP] 2."""

    def encode(self, text: str, max_length: int) -> np.ndarray:
        return np.array([1, *map(ord, text[: max_length - 2]), 2], dtype=np.int64)


def mask_pixels(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"masked_P": rng.random(9) < 0.5}


def mask_words(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    return {"masked_N": rng.random(len(sample.tokens_N)) < 0.5}


def picture(rng: np.random.Generator) -> bytes:
    pixels = rng.integers(0, 256, size=(24, 32, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def make_shards(directory: Path, counts: list[int], prefix: str = "") -> list[str]:
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    keys = []
    for number, count in enumerate(counts):
        with tarfile.open(directory / f"{number:03d}.tar", "w") as archive:
            for i in range(count):
                key = f"{prefix}{number}-{i}"
                captions = {"captions": [f"{key} {letter}" for letter in "abc"], "label": i}
                for extension, content in (("png", picture(rng)), ("json", json.dumps(captions).encode())):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
                keys.append(key)
    write_manifest(directory, [describe_shard(path) for path in sorted(directory.glob("*.tar"))])
    return keys


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    directory = tmp_path_factory.mktemp("shards")
    return directory, make_shards(directory, COUNTS)


def make_stream(directory, rank=0, ranks=1, workers=0, **changes) -> SourceStream:
    source = {"kind": "pair", "mix": [{"shards": str(directory)}], "batch_size": BATCH}
    data = {"tokenizer": "-", "num_readers": NUM_READERS, "shuffle_buffer": 5}
    options = {"seed": 3, "maskings": {"image": mask_pixels, "text": mask_words}}
    for name, value in changes.items():
        place = next((d for d in (source, data, options) if name in d), data)
        place[name] = value
    return SourceStream(
        Source.model_validate(source),
        Data.model_validate({**data, "sources": {"pairs": source}}),
        image_size=16,
        max_text_length=12,
        tokenizer=LettersTokenizer(),
        rank=rank,
        num_ranks=ranks,
        num_workers=workers,
        **options,
    )


def describe(sample: Sample) -> tuple:
    masks = [(s, n, a.tobytes()) for s, arrays in sample.masks.items() for n, a in arrays.items()]
    image = sample.image_CHW.tobytes()
    return (
        sample.key,
        sample.epoch,
        sample.index,
        sample.seed,
        sample.text,
        image,
        sample.tokens_N.tobytes(),
        masks,
    )


def run(directory, ranks, workers, steps, state=None, **changes):
    """(global batches, merged state after each step), all ranks stepped in one process."""
    streams = [make_stream(directory, rank, ranks, workers, **changes) for rank in range(ranks)]
    if state is not None:
        for stream in streams:
            stream.load_state(json.loads(json.dumps(state)))
    iterators = [iter(stream) for stream in streams]
    batches, states = [], []
    for _ in range(steps):
        parts = [next(iterator) for iterator in iterators]
        batches.append([describe(sample) for samples, _ in parts for sample in samples])
        states.append(merge_states([state for _, state in parts]))
    for iterator in iterators:
        iterator.close()
    return batches, states


STEPS = -(-3 * sum(COUNTS) // BATCH) + 1


@pytest.fixture(scope="module")
def reference(shards):
    return run(shards[0], 1, 0, STEPS)


def test_each_sample_once_an_epoch_over_three_epochs(shards, reference):
    seen = Counter((epoch, key) for batch in reference[0] for key, epoch, *_ in batch)
    assert all(count == 1 for count in seen.values())
    assert {key for epoch, key in seen if epoch == 0} == set(shards[1])
    for epoch in (1, 2):
        assert {key for e, key in seen if e == epoch} == set(shards[1])
    assert all(len(batch) == BATCH for batch in reference[0])


@pytest.mark.parametrize(
    ("ranks", "workers"), [(1, 1), (1, 3), (2, 0), (2, 1), (2, 3), (4, 0), (4, 1), (4, 3)]
)
def test_global_batches_do_not_depend_on_ranks_and_workers(shards, reference, ranks, workers):
    """Keys, crops, captions, masks and states, bit for bit, over three epochs."""
    batches, states = run(shards[0], ranks, workers, STEPS)
    assert batches == reference[0]
    assert states == reference[1]


@pytest.mark.parametrize(("saved", "loaded"), [((2, 1), (1, 3)), ((1, 0), (4, 0)), ((4, 0), (2, 1))])
def test_a_state_goes_on_with_other_ranks_and_workers(shards, reference, saved, loaded):
    for cut in (1, 5, 9):
        batches, states = run(shards[0], *saved, steps=cut)
        assert batches == reference[0][:cut]
        assert run(shards[0], *loaded, STEPS - cut, state=states[-1])[0] == reference[0][cut:]


def test_batch_size_may_change_between_states(shards, reference):
    """Twice as many of each reader: what two steps would have had of each, brought together."""
    _, states = run(shards[0], 1, 0, 2)
    (batch,), _ = run(shards[0], 2, 0, 1, state=states[-1], batch_size=2 * BATCH)
    assert batch == [sample for both in zip(*reference[0][2:4], strict=True) for sample in both]


@pytest.mark.parametrize("counts", [[1], [2, 1], [13]])
def test_few_samples_and_one_shard(tmp_path, counts):
    keys = make_shards(tmp_path, counts)
    steps = 3 * sum(counts)
    batches, _ = run(tmp_path, 2, 0, steps)
    seen = Counter((epoch, key) for batch in batches for key, epoch, *_ in batch)
    assert set(seen.values()) == {1}
    whole = range(3 * BATCH - 1)
    assert all((epoch, key) in seen for epoch in whole for key in keys)


def test_all_captions_are_used_in_turn(shards, reference):
    captions: dict[str, set[str]] = {}
    for batch in reference[0]:
        for key, epoch, _, _, text, *_ in batch:
            if epoch < 3:
                captions.setdefault(key, set()).add(text)
    assert all(texts == {f"{key} {letter}" for letter in "abc"} for key, texts in captions.items())


def test_another_seed_is_another_order(shards, reference):
    other, _ = run(shards[0], 1, 0, 2, seed=4)
    assert [s[0] for s in other[0]] != [s[0] for s in reference[0][0]]


def test_crops_differ_between_epochs(reference):
    images: dict[str, set[bytes]] = {}
    for batch in reference[0]:
        for sample in batch:
            images.setdefault(sample[0], set()).add(sample[5])
    assert np.mean([len(pictures) for pictures in images.values()]) > 2.5


def test_mistakes_are_named(shards, tmp_path):
    directory = shards[0]
    with pytest.raises(UserError, match=r"num_readers 12 is not a multiple of the number of ranks, 5"):
        make_stream(directory, 0, 5)
    _, (state,) = run(directory, 1, 0, 1)
    with pytest.raises(UserError, match=r"saved with seed 3, this run has 5"):
        make_stream(directory, seed=5).load_state(state)
    with pytest.raises(UserError, match=r"saved with num_readers 12, this run has 2"):
        make_stream(directory, num_readers=2).load_state(state)
    with pytest.raises(UserError, match=r"saved with shuffle_buffer 5, this run has 9"):
        make_stream(directory, shuffle_buffer=9).load_state(state)
    make_shards(tmp_path, [3, 4])
    with pytest.raises(UserError, match=r"4 shards with 31 samples .* 2 with 7"):
        make_stream(tmp_path).load_state(state)
    _, part = next(iter(make_stream(directory, 0, 2)))
    with pytest.raises(UserError, match=r"lacks the readers \[6, 7"):
        make_stream(directory).load_state(part)


def raise_in_worker(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    raise ArithmeticError("of ours")


@pytest.mark.parametrize("workers", [1, 3])
def test_what_fails_in_a_worker_is_told(shards, workers):
    stream = iter(make_stream(shards[0], workers=workers, maskings={"image": raise_in_worker}))
    with pytest.raises(RuntimeError, match=r"ArithmeticError: of ours"):
        next(stream)
    stream.close()


def exit_worker(sample: Sample, rng: np.random.Generator) -> dict[str, np.ndarray]:
    raise SystemExit(7)


def test_a_worker_that_is_gone_is_noticed(shards):
    stream = iter(make_stream(shards[0], workers=1, maskings={"image": exit_worker}))
    with pytest.raises(RuntimeError, match=r"exit code 7"):
        next(stream)
    stream.close()


SCRIPT = """
import os, sys, time
sys.path.insert(0, {root!r})
from tests.data.test_loader import make_stream

stream = iter(make_stream({directory!r}, workers=2))
next(stream)
print(*(process.pid for process in stream._workers._processes), flush=True)
if {wait}:
    time.sleep(60)
"""


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_no_worker_outlives_its_parent(shards, end):
    """Neither after kill -9 nor where the program ends without closing the stream."""
    root = str(Path(__file__).parents[2])
    script = SCRIPT.format(root=root, directory=str(shards[0]), wait=end == "kill")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        if end == "kill":
            assert all(Path(f"/proc/{pid}").exists() for pid in workers)
            parent.kill()
        assert parent.wait(timeout=30) == (-9 if end == "kill" else 0)
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_read_samples_is_every_sample_in_order(shards):
    directory, keys = shards
    options = {"image_size": 16, "max_text_length": 12, "tokenizer": LettersTokenizer(), "seed": 1}
    samples = list(read_samples(str(directory), maskings={"image": mask_pixels}, limit=None, **options))
    assert [sample.key for sample in samples] == keys
    assert [sample.index for sample in samples] == list(range(len(keys)))
    assert samples[3].metadata == {"label": 3}
    few = list(read_samples(str(directory), maskings={"image": mask_pixels}, limit=5, **options))
    assert [s.image_CHW.tobytes() for s in few] == [s.image_CHW.tobytes() for s in samples[:5]]
    pipe = f"pipe:cat {directory}/{{000..003}}.tar"
    streamed = read_samples(pipe, maskings={"image": mask_pixels}, limit=None, **options)
    assert list(map(describe, streamed)) == list(map(describe, samples))


def test_kinds_read_only_what_they_need(shards):
    for kind in ("image", "text"):
        samples, state = next(iter(make_stream(shards[0], kind=kind, maskings={})))
        assert all((sample.image_CHW is None) == (kind == "text") for sample in samples)
        assert all((sample.tokens_N is None) == (kind == "image") for sample in samples)
        assert bad_samples(state).bad == 0
