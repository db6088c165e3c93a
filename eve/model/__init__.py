"""Single-device PyTorch: embeddings, attention, blocks, encoder, decoder, heads."""

from eve.model.model import (
    ParameterCount,
    VisionLanguageModel,
    build_model,
    count_parameters,
    parameter_shapes,
)

__all__ = ["ParameterCount", "VisionLanguageModel", "build_model", "count_parameters", "parameter_shapes"]
