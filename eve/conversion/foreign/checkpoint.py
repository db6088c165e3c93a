"""An official checkpoint as the source of a conversion: as the model it is, or as the start of a recipe's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from eve.config import Recipe, parse_recipe
from eve.conversion.checkpoint import Checkpoint, Kind, Parameter
from eve.conversion.foreign.fitting import Fitting
from eve.conversion.foreign.formats import import_state
from eve.conversion.foreign.state_files import read_state
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError

# Names that a note lists.
SHOWN = 5


@dataclass(frozen=True)
class ForeignOptions:
    """Attributes:
    recipe: of the model to start; None: the checkpoint's own architecture.
    sizes: what names and shapes do not tell (Format.sizes).
    ignore: patterns of names to leave out, or to do without.
    tokenizer: a sentencepiece model; None: the recipe's.
    """

    recipe: Recipe | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    ignore: tuple[str, ...] = ()
    tokenizer: Path | None = None


class ForeignCheckpoint(Checkpoint):
    """`notes`: what to tell the user: what is new, what was left behind, what computes otherwise.

    Without a recipe there is one with the checkpoint's model; its data and stages are only examples.
    """

    step = 0
    run = None

    def __init__(self, path: Path, form: str, options: ForeignOptions) -> None:
        self.where = path
        source = import_state(read_state(path), form, options.sizes, ignore=options.ignore, where=str(path))
        self.recipe = options.recipe or _example(form, source.model.model_dump(mode="json"))
        self._fitting = Fitting(source, self.recipe.model, self.recipe.start, self.recipe.seed, str(path))
        self.parameters = tuple(
            Parameter(name, tuple(shape), 0) for name, shape in self._fitting.shapes.items()
        )
        new = self._fitting.new
        left = [*self._fitting.left_behind, *(f"the head for {task}" for task in source.heads)]
        self.notes = [
            *([f"new, from the seed {self.recipe.seed}: {listed(new)}"] if new else []),
            *([f"left behind: {listed(left)}"] if left else []),
            *self._fitting.notes,
        ]
        self.tokenizer = self._tokenizer(options.tokenizer)

    def read(self, name: str, kind: Kind) -> Tensor:
        assert kind == "weight"
        return self._fitting.read(name)

    def _tokenizer(self, path: Path | None) -> bytes:
        """Empty, with a note, where there is none to be had."""
        named = path is not None
        path = path or Path(self.recipe.data.tokenizer)
        words = self.recipe.model.vocab_size
        if not named and not path.is_file():
            self.notes.append("no tokenizer: give --tokenizer FILE for a model that reads words")
            return b""
        tokenizer = Tokenizer.load(path)
        if tokenizer.vocab_size != words:
            raise UserError(f"{path} has {tokenizer.vocab_size} pieces, the model has {words} words")
        return tokenizer.model_bytes


def _example(form: str, model: dict[str, Any]) -> Recipe:
    """A recipe around a model."""
    source = {"mix": [{"shards": "data/pairs/*.tar"}], "batch_size": 8}
    stream = {"name": "masked_text", "source": "pairs", "objective": "masked_text"}
    tree = {
        "name": f"imported_{form}",
        "model": model,
        "data": {"tokenizer": "tokenizer.model", "sources": {"pairs": source}},
        "stages": [{"name": "example", "steps": 1, "lr": 1e-4, "streams": [stream]}],
    }
    return parse_recipe(tree, where=f"the model of {form}")


def listed(names: list[str]) -> str:
    """The first of them, and how many more."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
