"""The learning rate of a step."""

from __future__ import annotations

import math

from eve.config import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """The rate of step `step` (from 0) of a stage: a linear warm-up, then the stage's schedule.

    The warm-up reaches the full rate with its last step and never starts at zero; cosine and linear
    come down to zero at the (unmade) step `stage.steps`.
    """
    if step < stage.warmup_steps:
        return stage.lr * (step + 1) / stage.warmup_steps
    if stage.schedule == "constant":
        return stage.lr
    progress = (step - stage.warmup_steps) / max(1, stage.steps - stage.warmup_steps)
    if stage.schedule == "linear":
        return stage.lr * (1 - progress)
    return stage.lr * 0.5 * (1 + math.cos(math.pi * progress))
