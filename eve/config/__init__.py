"""The typed recipe: everything that changes the result of a run, and nothing about the machine.

A recipe is one YAML file in eve/recipes/ (or any path) plus `section.key=value` overrides from the
command line. All models are frozen and refuse unknown keys, naming the nearest known one. What
belongs to the machine (precision, ZeRO stage, micro-batch) is in the DeepSpeed JSON of ds_configs/.
"""

from eve.config.data import Data, Shards, Source
from eve.config.loading import RECIPES, load_recipe, parse_recipe
from eve.config.model import ClassTokenHead, Contrast, Decoder, FeedForward, Matching, Model
from eve.config.recipe import Evaluation, MoE, Optimizer, Parallel, Recipe, Start, Training
from eve.config.sections import Section
from eve.config.stages import Stage, Stream

__all__ = [
    "RECIPES",
    "ClassTokenHead",
    "Contrast",
    "Data",
    "Decoder",
    "Evaluation",
    "FeedForward",
    "Matching",
    "MoE",
    "Model",
    "Optimizer",
    "Parallel",
    "Recipe",
    "Section",
    "Shards",
    "Source",
    "Stage",
    "Start",
    "Stream",
    "Training",
    "load_recipe",
    "parse_recipe",
]
