"""What a stream learns from: (model, batch) -> loss."""

from eve.config import Model, Stream
from eve.objectives.masked_image import MaskedImage
from eve.objectives.masked_pair import MaskedPair
from eve.objectives.masked_text import MaskedText
from eve.objectives.output import Objective, ObjectiveOutput, PretrainModule

_OBJECTIVES = {"masked_image": MaskedImage, "masked_text": MaskedText, "masked_pair": MaskedPair}


def build_objective(stream: Stream, model: Model) -> Objective:
    return _OBJECTIVES[stream.objective](stream, model)


__all__ = ["Objective", "ObjectiveOutput", "PretrainModule", "build_objective"]
