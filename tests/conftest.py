from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: small tensors are faster on one thread, and the machine is shared.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.rank_pool import RankPool
from tests.tiny import write_tiny


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a recipe whose shards and tokenizer lie beside it."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))
