"""What a stream learns from: (model, batch) -> loss."""

from eve.config import Model, Stream
from eve.objectives.contrast import Contrast
from eve.objectives.masked_codes import MaskedCodes, PatchCodes
from eve.objectives.masked_image import MaskedImage
from eve.objectives.masked_pair import MaskedPair
from eve.objectives.masked_text import MaskedText
from eve.objectives.matching import ContrastMatching, Matching
from eve.objectives.output import Objective, ObjectiveOutput, PretrainModule
from eve.objectives.pool import Pool, WholePool

_OBJECTIVES = {"masked_image": MaskedImage, "masked_text": MaskedText}
# Those that may predict the codes of a visual tokenizer.
_CODED = {"masked_codes": MaskedCodes, "masked_pair": MaskedPair}
# Those that compare samples with one another.
_POOLED = {"contrast": Contrast, "matching": Matching, "contrast_matching": ContrastMatching}


def build_objective(
    stream: Stream, model: Model, pool: Pool | None = None, visual_tokenizer: str | None = None
) -> Objective:
    """`pool`: the samples of the other ranks; without it there are none. `visual_tokenizer`: its directory,
    for a stream that predicts codes. Raises UserError."""
    if stream.objective in _POOLED:
        return _POOLED[stream.objective](stream, model, pool or WholePool())
    if stream.objective in _CODED:
        codes = None
        if stream.image_target == "codes":
            assert visual_tokenizer is not None
            codes = PatchCodes(visual_tokenizer, model)
        return _CODED[stream.objective](stream, model, codes)
    return _OBJECTIVES[stream.objective](stream, model)


__all__ = ["Objective", "ObjectiveOutput", "Pool", "PretrainModule", "WholePool", "build_objective"]
