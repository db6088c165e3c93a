from __future__ import annotations

import pytest

from eve.config import Stage
from eve.training.schedule import learning_rate


def stage(**changes) -> Stage:
    stream = {"name": "image", "source": "pairs", "objective": "masked_image"}
    return Stage(**{"name": "s", "steps": 10, "streams": [stream], "lr": 2.0, "warmup_steps": 4, **changes})


def test_warm_up_is_linear_and_ends_at_the_full_rate() -> None:
    assert [learning_rate(stage(), step) for step in range(4)] == [0.5, 1.0, 1.5, 2.0]


def test_cosine_by_hand() -> None:
    # Halfway between step 4 and step 10 the cosine is at half the rate, a sixth of the way at 0.933 of it.
    assert learning_rate(stage(), 4) == 2.0
    assert learning_rate(stage(), 5) == pytest.approx(2.0 * 0.9330127)
    assert learning_rate(stage(), 7) == pytest.approx(1.0)
    assert learning_rate(stage(), 10) == pytest.approx(0.0)


def test_linear_and_constant() -> None:
    linear, constant = stage(schedule="linear"), stage(schedule="constant")
    assert [learning_rate(linear, step) for step in (4, 7, 10)] == [2.0, 1.0, 0.0]
    assert {learning_rate(constant, step) for step in range(3, 10)} == {2.0}


def test_no_warm_up_and_nothing_but_warm_up() -> None:
    assert learning_rate(stage(warmup_steps=0), 0) == 2.0
    assert learning_rate(stage(steps=4), 3) == 2.0
