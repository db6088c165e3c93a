"""What an encoder computes on the way, as the official codes lay it out: sample by sample, image before text.

Shape suffixes: B sample, I image token, L token of a sample, D width, E block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eve.model import VisionLanguageModel
from eve.model.encoder import EncoderOutput
from eve.packing import pad


class Trace:
    """One pass of the encoder; all samples have the same number of tokens.

    Attributes:
        encoded: what Encoder.forward returns.
        embedded_BLD: what goes into the first block. features_BLD: after the final norm.
        hidden_EBLD: after each block.
        routed_in_EBLD, routed_out_EBLD: of the feed-forwards with a learned router; None without one.
    """

    def __init__(self, model: VisionLanguageModel, **inputs: Any) -> None:
        """`inputs` are those of Encoder.forward."""
        embedded: list[Tensor] = []
        hidden: list[Tensor] = []
        routed: list[tuple[Tensor, Tensor]] = []
        blocks = list(model.encoder.blocks)
        hooks = [
            # Last of its kind: it sees what other hooks made of the input.
            blocks[0].register_forward_pre_hook(lambda _, given: embedded.append(given[0])),
            *(block.register_forward_hook(lambda _, __, made: hidden.append(made[0])) for block in blocks),
            *(
                block.feed_forward.register_forward_hook(  # pyright: ignore
                    lambda _, given, made: routed.append((given[0], made[0]))
                )
                for block in blocks
                if block.feed_forward.router is not None  # pyright: ignore
            ),
        ]
        self.encoded: EncoderOutput = model.encode(**inputs)
        for hook in hooks:
            hook.remove()
        layout = self.encoded.layout
        self.embedded_BLD = pad(embedded[0], layout)
        self.features_BLD = pad(self.encoded.x_TD, layout)
        self.hidden_EBLD = torch.stack([pad(x_TD, layout) for x_TD in hidden])
        self.routed_in_EBLD = self.routed_out_EBLD = None
        if routed:
            into, out = zip(*routed, strict=True)
            self.routed_in_EBLD = torch.stack([pad(x_TD, layout) for x_TD in into])
            self.routed_out_EBLD = torch.stack([pad(x_TD, layout) for x_TD in out])


def texts(ids_BN: Tensor, padding_BN: Tensor) -> dict[str, Any]:
    """Texts for Encoder.forward, their padding (bool) among the tokens but hidden."""
    return {
        "tokens_N": ids_BN.flatten(),
        "text_lengths": [ids_BN.shape[1]] * ids_BN.shape[0],
        "padding_N": padding_BN.bool().flatten(),
    }
