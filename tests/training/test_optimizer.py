from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from eve.config import Optimizer
from eve.errors import UserError
from eve.parallel.tensor import total_norm
from eve.parallel.topology import Topology
from eve.training.optimizer import ClippingAdamW, build_optimizer, freeze, learning_names, parameter_groups

norm_of = partial(total_norm, topology=Topology(0, 1, 0, torch.device("cpu")))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)
        self.norm = nn.LayerNorm(3)
        self.bank = nn.Parameter(torch.randn(2, 3, 4))
        self.bank_bias = nn.Parameter(torch.randn(2, 4))
        self.bank_bias.no_weight_decay = True  # pyright: ignore
        self.gain = nn.Parameter(torch.tensor(0.5))


def test_only_matrices_decay() -> None:
    module = Small()
    decay, no_decay = parameter_groups(module, 0.1)
    assert {id(p) for p in decay["params"]} == {id(module.linear.weight), id(module.bank)}
    assert len(no_decay["params"]) == 6
    assert (decay["weight_decay"], no_decay["weight_decay"]) == (0.1, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    module = Small()
    names = [name for name, _ in module.named_parameters()]
    found = learning_names(names, ["bank*", "norm.weight"])
    assert found == ["bank", "bank_bias", "norm.weight"]
    freeze(module, found)
    assert sum(len(group["params"]) for group in parameter_groups(module, 0.1)) == 3
    assert [group["name"] for group in parameter_groups(module, 0.1)] == ["decay", "no_decay"]
    freeze(module, ["gain"])
    assert [group["name"] for group in parameter_groups(module, 0.1)] == ["no_decay"]


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(UserError, match=r"the pattern 'blocks\.\*', which matches no parameter"):
        learning_names([name for name, _ in Small().named_parameters()], ["bank", "blocks.*"])


def set_gradients(module: nn.Module, scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("scale", [1e-3, 10.0])
@pytest.mark.parametrize("clip", [1.0, None])
def test_clipping_adamw_is_adamw_after_clip_grad_norm(scale: float, clip: float | None) -> None:
    ours, theirs = Small(), None
    theirs = copy.deepcopy(ours)
    config = Optimizer(clip=clip)
    optimizer = build_optimizer(ours, config, norm=norm_of)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    matrices = {id(theirs.linear.weight), id(theirs.bank)}
    reference = torch.optim.AdamW(
        [
            {"params": [theirs.linear.weight, theirs.bank], "weight_decay": config.weight_decay},
            {"params": [p for p in theirs.parameters() if id(p) not in matrices], "weight_decay": 0.0},
        ],
        lr=0.1,
        betas=config.betas,
        eps=config.eps,
        foreach=False,
    )
    for _ in range(3):
        set_gradients(ours, scale)
        set_gradients(theirs, scale)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or float("inf"))
        optimizer.step()
        reference.step()
        torch.testing.assert_close(optimizer._global_grad_norm, norm)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(value: float) -> None:
    module = Small()
    optimizer = build_optimizer(module, Optimizer(), norm=norm_of)
    assert isinstance(optimizer, ClippingAdamW)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    set_gradients(module, 1.0)
    optimizer.step()
    before = copy.deepcopy((module.state_dict(), optimizer.state_dict()["state"]))
    set_gradients(module, 1.0)
    assert module.bank.grad is not None
    module.bank.grad[0, 0, 0] = value
    optimizer.step()
    assert optimizer.overflow
    torch.testing.assert_close((module.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)
    set_gradients(module, 1.0)
    optimizer.step()
    assert not optimizer.overflow
    assert not torch.equal(module.bank, before[0]["bank"])
