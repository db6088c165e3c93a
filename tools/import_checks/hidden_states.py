"""What every block of an encoder made, sample by sample.

Shape suffixes: L block, B sample, I image token, N text token of a sample, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from eve.model import VisionLanguageModel
from eve.packing import TokenLayout


class HiddenStates:
    """Within a `with`, keeps what the encoder's blocks return; texts of a batch are padded to one length."""

    def __init__(self, model: VisionLanguageModel) -> None:
        self._model = model
        self.outputs: list[Tensor] = []

    def __enter__(self) -> HiddenStates:
        self.outputs.clear()
        self._hooks = [
            block.register_forward_hook(lambda _, __, output: self.outputs.append(output[0]))
            for block in self._model.encoder.blocks
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def images(self, layout: TokenLayout) -> Tensor:
        """(L, B, I, D)."""
        return torch.stack([_samples(x[: layout.num_image], layout) for x in self.outputs])

    def texts(self, layout: TokenLayout) -> Tensor:
        """(L, B, N, D)."""
        return torch.stack([_samples(x[layout.num_image :], layout) for x in self.outputs])


def _samples(x_TD: Tensor, layout: TokenLayout) -> Tensor:
    return x_TD.view(layout.num_samples, -1, x_TD.shape[-1])
