from dataclasses import dataclass
import numpy as np


@dataclass(frozen=True)
class Picture:
    """A drawing for the samples folder and TensorBoard, with the same captions as Markdown text."""

    name: str
    image_HWC: np.ndarray
    text: str
