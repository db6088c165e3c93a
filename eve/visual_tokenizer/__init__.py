"""Pictures as words of a visual language: the codes that masked image modelling may predict."""

from eve.visual_tokenizer.config import Stack, VisualTokenizerConfig
from eve.visual_tokenizer.model import VisualTokenizer, load_config
from eve.visual_tokenizer.quantiser import ALONE, Quantiser, Ranks

__all__ = ["ALONE", "Quantiser", "Ranks", "Stack", "VisualTokenizer", "VisualTokenizerConfig", "load_config"]
