"""A released model: a directory with weights, recipe and tokenizer, that needs nothing else.

model.safetensors   fp32 weights under the model's own names
recipe.yaml         the whole recipe of the run
tokenizer.model
metadata.json       format version, step, parameter counts, EVE's version
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import eve
from eve.config import Model, Recipe, load_recipe
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel, build_model, parameter_shapes
from eve.model.layers import Layers

WEIGHTS = "model.safetensors"


def export_model(
    directory: Path,
    weights: dict[str, Tensor],
    recipe: Recipe,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
) -> None:
    """Writes the directory under another name first, so that a reader never finds half of it.

    While an older export of the same name is replaced there is an instant at which a reader finds none.
    """
    temporary = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        (temporary / "recipe.yaml").write_text(recipe.to_yaml())
        (temporary / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        about = {"format": 1, "eve": eve.__version__, "parameters": sum(t.numel() for t in weights.values())}
        (temporary / "metadata.json").write_text(json.dumps({**about, **metadata}, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"the model cannot be exported to {directory}: {error}") from None


def load_exported(directory: str | Path) -> tuple[VisionLanguageModel, Recipe, Tokenizer]:
    """(model on the CPU, recipe, tokenizer) of an exported directory. Raises UserError."""
    directory = Path(directory)
    recipe = exported_recipe(directory)
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.model'} has {tokenizer.vocab_size} pieces, model.vocab_size of its "
            f"recipe.yaml is {recipe.model.vocab_size}"
        )
    model = build_model(recipe.model, seed=recipe.seed)
    load_weights(model, directory)
    return model, recipe, tokenizer


def exported_recipe(directory: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of an exported directory with `section.key=value` overrides. Raises UserError."""
    path = directory / "recipe.yaml"
    if not path.is_file():
        raise UserError(f"{directory} is not an exported model: it has no recipe.yaml")
    return load_recipe(str(path), list(overrides))


@torch.no_grad()
def load_weights(model: VisionLanguageModel, directory: Path, layers: Layers | None = None) -> None:
    """Loads the weights of an exported directory, of which `layers` says what this process holds.

    Raises UserError where they are of another model.
    """
    layers = layers or Layers()
    check_weights(directory, model.config)
    with safe_open(directory / WEIGHTS, framework="pt") as file:
        for name, parameter in model.named_parameters():
            name = layers.name_of(name)
            parameter.copy_(layers.cut(name, file.get_tensor(name)))


def check_weights(directory: Path, config: Model) -> None:
    """Raises UserError where the directory does not hold the weights of such a model. Allocates nothing."""
    expected = {name: tuple(shape) for name, shape in parameter_shapes(config).items()}
    path = directory / WEIGHTS
    if not path.is_file():
        raise UserError(f"{directory} is not an exported model: it has no {WEIGHTS}")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    for name in sorted(expected.keys() | found.keys()):
        if found.get(name) != expected.get(name):
            raise UserError(
                f"{path} is of another model: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such weight')}"
            )
