"""What is compared: a YAML file with a recipe, its variants and what is measured of them.

title: Soft against hard routers
recipe: eve_tiny
seeds: [1, 2, 3]
overrides: {stages.0.steps: 600}                       # of all variants
variants:
  soft: {}                                             # the first is what the others are compared with
  hard: {model.feed_forward: [{blocks: 0-5, router: modality}]}
measures:
  - {name: masked words, task: pretrain, table: Masked words, column: right image}
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from eve.config import Recipe, load_recipe
from eve.config.loading import sentence
from eve.config.sections import Section
from eve.errors import UserError
from eve.tasks.losses import distinct_streams
from eve.training.export import file_name

DEFINITIONS = Path(__file__).parent


class Measure(Section):
    """One number of a run: the mean over the cells of a table of `eve.evaluate`."""

    name: str
    task: Literal["pretrain", "retrieval", "losses"]
    # How the table's title and the column's name begin; not of `losses`, which has one table.
    table: str = ""
    column: str = ""
    # Of `losses`: how the names in its columns `stream` and `measure` begin.
    stream: str = ""
    measure: str = ""
    # Held-out cells; null is all of them.
    cells: tuple[str, ...] | None = None
    # Measured at the end of this stage; null is the end of the run.
    stage: str | None = None
    # Those that have it; null is all.
    variants: tuple[str, ...] | None = None

    @model_validator(mode="after")
    def _check(self) -> Measure:
        needed, other = ("table", "column"), ("stream", "measure")
        if self.task == "losses":
            needed, other = ("stream",), ("table", "column")
        for key in needed:
            if not getattr(self, key):
                raise ValueError(f"measure '{self.name}' of {self.task} lacks {key}")
        for key in other:
            if getattr(self, key):
                raise ValueError(f"measure '{self.name}' has {key}, which {self.task} has not")
        return self


class Budget(Section):
    """What a step costs within a memory, and for each variant as many steps as fit a time."""

    # Of a step: weights, optimizer state, batch, activations and gradients that are alive at once.
    memory_gib: float = Field(gt=0)
    # Samples of a step that are tried, ascending.
    batches: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    # Every variant trains that long at its largest batch; null trains the steps of the recipe, at its batch.
    # The batch is that of the source: other stages that read it get it too.
    minutes: float | None = Field(default=None, gt=0)
    # The stage that is measured, which reads one source of pairs; null is the first.
    stage: str | None = None
    # Rounds over the variants.
    rounds: int = Field(default=5, ge=1)
    # By variant: its time for as many pairs over that of the first variant, as the paper has it.
    published: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if list(self.batches) != sorted(set(self.batches)):
            raise ValueError(f"batches {list(self.batches)} do not ascend")
        return self


class Comparison(Section):
    title: str
    # A name in eve/recipes or a path.
    recipe: str
    seeds: tuple[int, ...] = Field(default=(1, 2, 3), min_length=1)
    # section.key: value
    overrides: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(min_length=1)
    measures: tuple[Measure, ...] = ()
    budget: Budget | None = None
    note: str = ""

    @model_validator(mode="after")
    def _check(self) -> Comparison:
        _check_different("seeds", self.seeds)
        _check_different("names of variants as directories", [file_name(name) for name in self.variants])
        _check_different("names of measures", [measure.name for measure in self.measures])
        if "" in map(file_name, self.variants):
            raise ValueError("the name of a variant has neither a letter nor a digit")
        for measure in self.measures:
            for name in measure.variants or ():
                self._check_variant(name, f"measure '{measure.name}'")
        for name in self.budget.published if self.budget else ():
            self._check_variant(name, "budget.published")
        if not self.measures and self.budget is None:
            raise ValueError("there are neither measures nor a budget: nothing would be compared")
        return self

    def _check_variant(self, name: str, where: str) -> None:
        if name not in self.variants:
            raise ValueError(f"{where} names '{name}', expected one of {', '.join(self.variants)}")


def _check_different(what: str, values: Any) -> None:
    if len(set(values)) != len(values):
        raise ValueError(f"{what} are not all different: {', '.join(map(str, values))}")


@dataclass(frozen=True)
class Variant:
    """`overrides`: `section.key=value` as eve.pretrain takes them, those of all variants first."""

    name: str
    recipe_name: str
    overrides: tuple[str, ...]
    recipe: Recipe

    @property
    def directory(self) -> str:
        return file_name(self.name)

    def stage_number(self, name: str | None) -> int:
        """Of the stage of that name, which is there; None is the first."""
        return next(n for n, stage in enumerate(self.recipe.stages) if name in (None, stage.name))

    def changed(self, *overrides: str) -> Variant:
        """With more overrides. Raises UserError."""
        return load_variant(self.name, self.recipe_name, (*self.overrides, *overrides))


def load_variant(name: str, recipe_name: str, overrides: tuple[str, ...]) -> Variant:
    try:
        return Variant(name, recipe_name, overrides, load_recipe(recipe_name, overrides))
    except UserError as error:
        raise UserError(f"variant '{name}': {error}") from None


def load_comparison(name_or_path: str) -> tuple[Comparison, list[Variant]]:
    """The definition of that name or path, and its variants, all loaded. Raises UserError."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = DEFINITIONS / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(found.stem for found in DEFINITIONS.glob("*.yaml"))
        near = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no comparison '{name_or_path}' (known: {', '.join(known)}){hint}")
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, expected title, recipe, variants, measures")
    try:
        comparison = Comparison.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{path}: {sentence(error, Comparison)}") from None
    try:
        variants = [
            load_variant(name, comparison.recipe, as_overrides(_in_order(comparison.overrides, changes)))
            for name, changes in comparison.variants.items()
        ]
        _check_stages(comparison, variants)
        _check_streams(comparison, variants)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return comparison, variants


def _check_stages(comparison: Comparison, variants: list[Variant]) -> None:
    """Raises UserError where a stage that is named is not one of a variant, or leaves no model behind."""
    for variant in variants:
        named_by_measures = {
            m.stage for m in comparison.measures if m.variants is None or variant.name in m.variants
        }
        budget_names = {comparison.budget.stage} if comparison.budget is not None else set()
        stages = [stage.name for stage in variant.recipe.stages]
        for stage in sorted((named_by_measures | budget_names) - {None, *stages}, key=str):
            raise UserError(f"variant '{variant.name}' has no stage '{stage}', only {', '.join(stages)}")
        before_the_end = named_by_measures - {None, stages[-1]}
        if before_the_end and not variant.recipe.training.export_stages:
            raise UserError(
                f"variant '{variant.name}' is measured after {min(before_the_end, key=str)}, but "
                "training.export_stages is false"
            )


def _check_streams(comparison: Comparison, variants: list[Variant]) -> None:
    """Raises UserError where a measure of losses is of no stream of a variant."""
    for variant in variants:
        names = list(distinct_streams(variant.recipe))
        for measure in comparison.measures:
            if measure.variants is not None and variant.name not in measure.variants:
                continue
            if not any(name.startswith(measure.stream) for name in names):
                raise UserError(
                    f"measure '{measure.name}': no stream of variant '{variant.name}' begins with "
                    f"'{measure.stream}', expected one of {', '.join(names)}"
                )


def _in_order(of_all: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Those of all variants before those of one, also where both have a key."""
    return {key: value for key, value in of_all.items() if key not in changes} | changes


def as_overrides(changes: dict[str, Any]) -> tuple[str, ...]:
    """{"model.depth": 6, "stages": [{"name": "a"}]} -> ("model.depth=6", "stages=[{name: a}]")."""
    return tuple(f"{key}={flow(value)}" for key, value in changes.items())


def flow(value: Any) -> str:
    """One line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")
