"""The import of DeepSpeed."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch


def import_deepspeed() -> Any:
    """DeepSpeed takes seconds to import, so no mistake of the user should have to wait for it."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Only inference uses this kernel, but training on a CPU would compile it (half a minute, a compiler).
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    return deepspeed
