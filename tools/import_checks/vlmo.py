"""VLMo: features of text, image and pair, contrast, matching, masked text, classes; its ways of loading."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tools.import_checks.fixture import Fixture

CHECKS: dict[str, Callable[[Fixture], dict[str, Tensor]]] = {}
