from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eve.errors import UserError
from eve.parallel.topology import Topology
from eve.training.checkpoint import CheckpointStore, is_complete

ONE = Topology(0, 1, 0, torch.device("cpu"))


def save(store: CheckpointStore, step: int, content: str = "weights") -> Path:
    return store.save(
        step,
        lambda directory: (directory / "rank_0.bin").write_text(content) and None,
        lambda directory: (directory / "state.json").write_text("{}") and None,
    )


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints", ONE, keep=2)
    assert store.latest() is None
    for step in (5, 10, 15):
        assert save(store, step) == store.latest()
    assert names(store) == ["step-00000010", "step-00000015"]


@pytest.mark.parametrize("harm", ["rank_0.bin", "state.json", "complete.json"])
def test_a_checkpoint_that_lacks_a_byte_is_not_complete(harm: str, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ONE, keep=2)
    save(store, 5)
    file = save(store, 10) / harm
    file.write_bytes(file.read_bytes()[:-1])
    assert store.latest() == tmp_path / "step-00000005"
    store.clean()
    assert names(store) == ["step-00000005"]


def test_clean_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ONE, keep=1)
    save(store, 5)
    (tmp_path / "writing-00000010").mkdir()
    (tmp_path / "deleting-00000001").mkdir()
    (tmp_path / "mine").mkdir()
    store.clean()
    assert names(store) == ["mine", "step-00000005"]


def test_a_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    """A crash between taking the old one away and giving its name to the new one would leave none."""
    store = CheckpointStore(tmp_path, ONE, keep=1)
    save(store, 5, "old")
    with pytest.raises(UserError, match="cannot be written"):
        save(store, 5, "new")
    assert (tmp_path / "step-00000005" / "rank_0.bin").read_text() == "old"
    assert names(store) == ["step-00000005"]


def test_a_failed_write_leaves_the_one_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, ONE, keep=1)
    save(store, 5)

    def full(directory: Path) -> None:
        (directory / "rank_0.bin").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot be written to .*: No space left on device; the last"):
        store.save(10, full, lambda directory: None)
    assert names(store) == ["step-00000005"]
    assert is_complete(tmp_path / "step-00000005")


def test_a_defect_is_no_user_error(tmp_path: Path) -> None:
    def defect(directory: Path) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        CheckpointStore(tmp_path, ONE, keep=1).save(1, defect, lambda directory: None)
