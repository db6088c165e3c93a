from __future__ import annotations

import json

import pytest
import torch

from eve.moe.plan import RouterStats
from eve.objectives import ObjectiveOutput
from eve.parallel.topology import Topology
from eve.training.window import Window, means, router_stats

ONE = Topology(0, 1, 0, torch.device("cpu"))


def output(total: float, count: float) -> ObjectiveOutput:
    stats = RouterStats(
        layer=3,
        counts_ME=torch.tensor([[4, 0], [1, 2]]),
        dropped_M=torch.tensor([1, 0]),
        tokens_M=torch.tensor([2, 3]),
        entropy=torch.tensor(2.0),
        load_balance=torch.tensor(1.5),
        z_loss=torch.tensor(0.5),
        importance=torch.tensor(0.25),
        load=torch.tensor(0.125),
    )
    return ObjectiveOutput(torch.zeros(()), {"loss": (torch.tensor(total), torch.tensor(count))}, [stats])


def test_a_mean_weighs_each_unit_alike() -> None:
    window = Window(ONE.device)
    window.add_output("text", output(6.0, 2.0))
    window.add_output("text", output(4.0, 8.0))
    sums = window.fetch(ONE)
    assert means(sums) == {"loss/text": 1.0}
    ((stream, (stats,)),) = router_stats(sums).items()
    assert stream == "text"
    assert stats.layer == 3
    assert stats.counts_ME.tolist() == [[8, 0], [2, 4]]
    assert (float(stats.entropy), float(stats.load_balance)) == (4.0, 1.5)
    assert window.fetch(ONE) == {}


def test_a_window_cut_by_a_checkpoint_has_the_same_bits() -> None:
    values = torch.rand(20, generator=torch.Generator().manual_seed(0)) / 3
    whole, cut = Window(ONE.device), Window(ONE.device)
    for number, value in enumerate(values):
        whole.add("x", value)
        if number == 7:
            state = json.loads(json.dumps(cut.state(ONE)))
            cut = Window(ONE.device)
            cut.load(state, ONE)
        cut.add("x", value)
    assert torch.equal(whole.fetch(ONE)["x"], cut.fetch(ONE)["x"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU copies nothing to a device")
def test_a_constant_does_not_make_the_host_wait() -> None:
    window = Window(torch.device("cuda"))
    torch.cuda.set_sync_debug_mode("error")
    window.add("x", 1.0)
    window.add("x", 2.0)
    torch.cuda.set_sync_debug_mode("default")
    assert float(window.fetch(ONE)["x"]) == 3.0


def test_the_shares_of_two_ranks_add_up_on_one() -> None:
    window = Window(ONE.device)
    window.load([{"x": 1.0, "y": [1.0, 2.0]}, {"x": 4.0, "y": [3.0, 5.0]}], ONE)
    sums = window.fetch(ONE)
    assert float(sums["x"]) == 5.0
    assert sums["y"].tolist() == [4.0, 7.0]
