"""EVE: pre-training of vision-language Transformers with mixture-of-experts."""

__version__ = "0.1.0"
