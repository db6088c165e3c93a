"""`deepspeed --hostfile` over ssh, on two hosts with two slots each: network namespaces of this machine."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eve import pretrain
from tests import hosts
from tests.hosts import Hosts
from tests.test_layouts import losses
from tests.test_rank_death import last_step, rank_processes, relaunch, until
from tests.test_resume import arguments

STEPS = 24
ZERO = ("--deepspeed_config", "ds_configs/zero1_fp32.json")


@pytest.fixture(scope="module")
def two_hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    why_not = hosts.missing()
    if why_not is not None:
        pytest.skip(why_not)
    with hosts.two_hosts(tmp_path_factory.mktemp("hosts")) as pair:
        yield pair


def deepspeed(two_hosts: Hosts, argv: list[str]) -> list[str]:
    return ["deepspeed", "--hostfile", two_hosts.hostfile(slots=2), "--module", "eve.pretrain", *argv]


def test_a_process_is_killed_then_a_host_is_lost(tiny: Path, two_hosts: Hosts, tmp_path: Path) -> None:
    """`deepspeed --hostfile` fails with the cause; the relauncher goes on with both hosts, then with one: the
    numbers are those of one process.

    ZeRO cuts the checkpoint into parts of four processes, two have to read it.
    """
    steps = (f"stages.0.steps={STEPS}", "training.checkpoint_every=4")
    run_dir, output = tmp_path / "run", tmp_path / "output"
    argv = arguments(tiny, run_dir, *ZERO, *steps)
    process = two_hosts.start(deepspeed(two_hosts, argv), output)
    until(lambda: last_step(run_dir) >= 6, process)
    first = rank_processes(run_dir)
    first[3].kill()
    for rank in first.values():
        rank.wait(60)
    assert process.wait(60) != 0
    said = output.read_text()
    assert "4 processes on cpu" in said
    assert "host-b: " in said
    assert said.count("rank 3 on host-b (process") >= 3

    # Not for the shells on the way.
    shards = f"data.sources.pairs.mix.0.shards={tiny.parent}/train/{{000000..000002}}.tar"
    command = relaunch(two_hosts.hostfile(slots=2), *argv, shards)
    process = two_hosts.start(command, output)

    def on_host_b() -> list[int]:
        return two_hosts.processes(1, "eve.pretrain")

    until(lambda: len(rank_processes(run_dir)) == 4 and last_step(run_dir) >= 12, process)
    two_hosts.disconnect(1)
    until(lambda: "host-b cannot be reached, going on without" in output.read_text(), process)
    assert not on_host_b()
    assert process.wait(180) == 0, output.read_text()
    said = output.read_text()
    assert re.search("start 1 from step [48]: 4 processes on host-a, host-b", said)
    assert "on host-b (process" in said
    assert "has not answered for 30 s" in said
    assert "from 4 processes to 2 processes on host-a" in said
    assert pretrain.main(arguments(tiny, tmp_path / "one", *steps)) == 0
    expected = losses(tmp_path / "one")
    for name, values in losses(run_dir).items():
        assert len(values) == STEPS // 2, name
        np.testing.assert_allclose(values, expected[name], rtol=1e-5)
