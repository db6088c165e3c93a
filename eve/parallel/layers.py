"""The layers of one process of a parallel layout: what eve.model is handed."""

from __future__ import annotations

from functools import partial
from typing import Any

from eve.config import Model, MoE
from eve.model.layers import Layers, QKVLinear
from eve.model.relative_positions import RelativePositions
from eve.moe.experts import ExpertBank
from eve.moe.hard_experts import Expert
from eve.parallel.sharding import canonical
from eve.parallel.tensor import (
    HiddenParallelExpert,
    RowLinear,
    TensorTokens,
    VocabParallelEmbedding,
    VocabParallelLinear,
)
from eve.parallel.topology import Topology
from eve.parallel.weights import WeightParts


def parallel_layers(config: Model, topology: Topology, moe: MoE) -> Layers:
    """Constructors for this process's part of the model."""
    products = moe.experts_backend
    fields: dict[str, Any] = {
        "cut": WeightParts(config, topology).held,
        "name_of": canonical,
        "expert": partial(Expert, products=products),
        "routed_experts": partial(ExpertBank, products=products),
    }
    if topology.tensor > 1:
        fields |= {
            "qkv": lambda width, out, key_bias: QKVLinear(width, out // topology.tensor, key_bias),
            "row_linear": partial(RowLinear, topology=topology),
            "word_embedding": partial(VocabParallelEmbedding, topology=topology),
            "vocab_linear": partial(VocabParallelLinear, topology=topology),
            "expert": partial(HiddenParallelExpert, topology=topology, products=products),
            "relative_positions": lambda side, text, tables, heads: RelativePositions(
                side, text, tables, heads // topology.tensor
            ),
            "tokens": TensorTokens(topology),
        }
    if topology.expert > 1:
        # Imports DeepSpeed.
        from eve.parallel.experts import ExpertParallelBank

        fields["routed_experts"] = partial(ExpertParallelBank, topology=topology, products=products)
    return Layers(**fields)
