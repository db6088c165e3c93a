"""`deepspeed --hostfile` over ssh, on two hosts with two slots each: network namespaces of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from eve import pretrain
from tests import hosts
from tests.hosts import Hosts
from tests.test_layouts import losses
from tests.test_resume import arguments

STEPS = 20
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


def test_training_over_two_hosts_is_that_of_one_process(tiny: Path, two_hosts: Hosts, tmp_path: Path) -> None:
    steps = (f"stages.0.steps={STEPS}", "training.checkpoint_every=100")
    assert pretrain.main(arguments(tiny, tmp_path / "one", *steps)) == 0
    argv = arguments(tiny, tmp_path / "run", *ZERO, *steps)
    output = tmp_path / "output"
    process = two_hosts.start(deepspeed(two_hosts, argv), output)
    assert process.wait(120) == 0, output.read_text()
    expected = losses(tmp_path / "one")
    for name, values in losses(tmp_path / "run").items():
        assert len(values) == STEPS // 2, name
        np.testing.assert_allclose(values, expected[name], rtol=1e-4 if name == "grad_norm" else 1e-5)
    said = output.read_text()
    assert "4 processes on cpu" in said
    assert "host-b: " in said
