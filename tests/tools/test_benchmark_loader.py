"""The loader benchmark on small pictures: both pipelines run, and read the same ones."""

import re
from functools import partial

import pytest

from eve.data.shards import resolve
from tools import benchmark_loader
from tools.benchmark_loader import eve_batches, main, make_shards, plain_batches


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch) -> None:
    monkeypatch.setattr(benchmark_loader, "SIZE", (96, 64))


def test_it_makes_its_pictures_once_and_prints_both_speeds(tmp_path, capsys) -> None:
    sizes = "--num-made 8 --image-size 32 --batch-size 4 --images 8 --repeats 1"
    arguments = ["--cache", str(tmp_path), *sizes.split()]
    main(arguments)
    first = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")}
    assert len(first) == benchmark_loader.NUM_SHARDS
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.tar")} == first
    table = capsys.readouterr().out
    assert table.startswith("8 images, ")
    for name in ("eve", "plain", "ratio"):
        assert len(re.findall(rf"^  {name} +\d+\.\d+$", table, re.MULTILINE)) == 2


def test_both_pipelines_give_batches_of_the_same_shape_and_range(tmp_path) -> None:
    make_shards(tmp_path, 8)
    paths = [shard.address for shard in resolve(str(tmp_path)).shards]
    for open_batches in (
        partial(eve_batches, str(tmp_path), 32, 4, 0, True),
        partial(plain_batches, paths, 32, 4, 0),
    ):
        batches = open_batches()
        for _ in range(3):
            images = next(batches)
            assert images.shape == (4, 3, 32, 32)
            assert -1 <= images.min() < images.max() <= 1
