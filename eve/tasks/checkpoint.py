"""What --checkpoint names: an exported model, or a run, which has the model at the end of each stage too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from eve.config import Recipe
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.model import VisionLanguageModel, build_model
from eve.training.export import (
    WEIGHTS,
    exported_recipe,
    exported_tokenizer,
    load_exported,
    load_weights,
    stage_exports,
)


@dataclass(frozen=True)
class Snapshot:
    """A model that a run has been.

    Attributes:
        stages_done: how many stages made it; None where the export does not say.
        directory: its weights; None draws them from the seed.
    """

    name: str
    stages_done: int | None
    directory: Path | None


@dataclass(frozen=True)
class Checkpoint:
    """`trained` is the recipe that made the model, `recipe` the same with overrides."""

    directory: Path
    exported: Path
    trained: Recipe
    recipe: Recipe

    @property
    def pictures_dir(self) -> Path:
        return self.directory / "evaluation"

    def tokenizer(self) -> Tokenizer:
        return exported_tokenizer(self.exported, self.trained)

    def model(self) -> VisionLanguageModel:
        """The model at its end, on the device, in evaluation mode."""
        return _ready(load_exported(self.exported)[0])

    def model_of(self, snapshot: Snapshot) -> VisionLanguageModel:
        """The same of another moment of the run."""
        model = build_model(self.trained.model, seed=self.trained.seed)
        if snapshot.directory is not None:
            load_weights(model, snapshot.directory)
        return _ready(model)

    def snapshots(self) -> list[Snapshot]:
        """Of a run its start and the end of each stage, where the weights are at hand, in this order; of an
        exported model that alone."""
        stages = self.trained.stages
        if self.exported == self.directory:
            metadata = self.exported / "metadata.json"
            about = json.loads(metadata.read_text()) if metadata.is_file() else {}
            number = about.get("stage_number")
            done = None if number is None else number + 1
            return [Snapshot(about.get("stage", self.exported.name), done, self.exported)]
        start = None if stages[0].init_from is None else Path(stages[0].init_from)
        directories = stage_exports(self.directory, self.trained) or [self.exported]
        if not _is_export(directories[-1]):
            directories[-1] = self.exported
        found = [Snapshot("start", 0, start)]
        for number, (stage, directory) in enumerate(zip(stages, directories, strict=True)):
            found.append(Snapshot(stage.name, number + 1, directory))
        return [moment for moment in found if moment.directory is None or _is_export(moment.directory)]


def open_checkpoint(directory: Path, overrides: Sequence[str] = ()) -> Checkpoint:
    """Raises UserError where it holds no model, or where the overrides change it."""
    exported = find_export(directory)
    trained = exported_recipe(exported)
    recipe = exported_recipe(exported, overrides)
    if recipe.model != trained.model:
        raise UserError("the overrides change model.*, but the model is that of the checkpoint")
    return Checkpoint(directory, exported, trained, recipe)


def find_export(directory: Path) -> Path:
    """The exported model of a run directory, or the directory itself. Raises UserError where neither."""
    for candidate in (directory, directory / "export"):
        if _is_export(candidate):
            return candidate
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory}; --checkpoint is a run directory or an exported model"
        )
    done = sorted(path for path in directory.glob("stages/*") if _is_export(path))
    raise UserError(
        f"{directory} holds no exported model (model.safetensors, or export/model.safetensors); "
        "a run exports when it ends; if it was stopped, finish it with python -m eve.pretrain ... --resume"
        + (f", or give {done[-1]}, the model after its last finished stage" if done else "")
    )


def _is_export(directory: Path) -> bool:
    return (directory / WEIGHTS).is_file()


def _ready(model: VisionLanguageModel) -> VisionLanguageModel:
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
