"""A released model: a directory with weights, recipe and tokenizer, that needs nothing else.

model.safetensors   fp32 weights under the model's own names
recipe.yaml         the whole recipe of the run
tokenizer.model
metadata.json       format version, step, stage, parameter counts, EVE's version

A run writes export/ when it ends; one of several stages also writes stages/NUMBER_NAME/ at the end of each.
"""

from __future__ import annotations

import json
import os
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
from eve.training.checkpoint import fsync_directory

WEIGHTS = "model.safetensors"


def export_model(
    directory: Path,
    weights: dict[str, Tensor],
    recipe: Recipe,
    tokenizer: Tokenizer,
    metadata: dict[str, Any],
    same_as: Path | None = None,
) -> None:
    """Writes the directory under another name first, so that a reader never finds half of it.

    `same_as`: an export of these weights, which the two then share as one file where the disk can. While an
    older export of the same name is replaced there is an instant at which a reader finds none.
    """
    temporary = directory.with_name(f".{directory.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        if same_as is None or not _link(same_as / WEIGHTS, temporary / WEIGHTS):
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, temporary / WEIGHTS)
        (temporary / "recipe.yaml").write_text(recipe.to_yaml())
        (temporary / "tokenizer.model").write_bytes(tokenizer.model_bytes)
        about = {"format": 1, "eve": eve.__version__, "parameters": sum(t.numel() for t in weights.values())}
        (temporary / "metadata.json").write_text(json.dumps({**about, **metadata}, indent=1) + "\n")
        # A run that goes on from a later checkpoint cannot make it again.
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        shutil.rmtree(directory, ignore_errors=True)
        temporary.rename(directory)
        fsync_directory(directory.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"the model cannot be exported to {directory}: {error}") from None


def _link(file: Path, link: Path) -> bool:
    """A hard link; False on a disk that has none."""
    try:
        os.link(file, link)
    except OSError:
        return False
    return True


def stage_exports(run_dir: Path, recipe: Recipe) -> list[Path]:
    """Where a run leaves the model at the end of each stage; nowhere if it has one, as that is export/."""
    if len(recipe.stages) == 1:
        return []
    names = (f"{number}_{file_name(stage.name)}" for number, stage in enumerate(recipe.stages))
    return [run_dir / "stages" / name for name in names]


def file_name(title: str) -> str:
    """`unseen concept, seen style` -> `unseen_concept_seen_style`."""
    return "_".join("".join(c if c.isalnum() else " " for c in title).split())


def load_exported(directory: str | Path) -> tuple[VisionLanguageModel, Recipe, Tokenizer]:
    """(model on the CPU, recipe, tokenizer) of an exported directory. Raises UserError."""
    directory = Path(directory)
    recipe = exported_recipe(directory)
    tokenizer = exported_tokenizer(directory, recipe)
    model = build_model(recipe.model, seed=recipe.seed)
    load_weights(model, directory)
    return model, recipe, tokenizer


def exported_tokenizer(directory: Path, recipe: Recipe) -> Tokenizer:
    """That of an exported directory with this recipe. Raises UserError where it does not fit."""
    tokenizer = Tokenizer.load(directory / "tokenizer.model")
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.model'} has {tokenizer.vocab_size} pieces, model.vocab_size of its "
            f"recipe.yaml is {recipe.model.vocab_size}"
        )
    return tokenizer


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
        hint = f"; did you mean {directory / 'export'}?" if (directory / "export" / WEIGHTS).is_file() else ""
        raise UserError(f"{directory} is not an exported model: it has no {WEIGHTS}{hint}")
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
