"""From YAML and `section.key=value` overrides to a recipe, with one sentence for a mistake."""

from __future__ import annotations

import difflib
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from eve.config.recipe import Recipe
from eve.config.sections import Section
from eve.errors import UserError

RECIPES = Path(__file__).parents[1] / "recipes"


def load_recipe(name_or_path: str, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """The recipe of that name or path with `section.key=value` overrides (values are YAML).

    Lists take an index (`stages.0.steps=100`). Of stages and streams a list may name those to keep, in that
    order, and hold new ones (`stages=[text, pairs]`). Raises UserError.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{name_or_path}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in RECIPES.glob("*.yaml"))
        near = difflib.get_close_matches(name_or_path, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no recipe '{name_or_path}' (known: {', '.join(known)}){hint}")
    try:
        tree = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds {type(tree).__name__}, expected a mapping of sections")
    for override in overrides:
        _apply_override(tree, override)
    return parse_recipe(tree, where=f"recipe {path} with overrides" if overrides else str(path))


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {sentence(error, Recipe)}") from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"'{override}' is not an override such as model.depth=6")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(
            f"the value of the override '{override}' is not YAML; quote it for the shell"
        ) from None
    node: Any = tree
    *parents, last = key.split(".")
    for depth, part in enumerate(parents):
        node = node[_index(node, part, key)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            found = ".".join(parents[: depth + 1])
            raise UserError(f"override '{override}': {found} is the value {node!r}, not a section")
    if isinstance(node, list):
        node[_index(node, last, key)] = value
    else:
        node[last] = _picked(node.get(last), value, key)


def _picked(old: Any, new: Any, key: str) -> Any:
    """`new`, its strings replaced by the entries of `old` that have that name."""
    if not (isinstance(old, list) and isinstance(new, list) and all(isinstance(e, dict) for e in old)):
        return new
    named = {entry["name"]: entry for entry in old if "name" in entry}
    for entry in new:
        if named and isinstance(entry, str) and entry not in named:
            raise UserError(f"override '{key}': there is no '{entry}', expected some of {list(named)}")
    # A copy of each, so that what is named twice and then renamed is two.
    return [deepcopy(named.get(entry, entry)) if isinstance(entry, str) else entry for entry in new]


def _index(node: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"override '{key}': '{part}' is not an index of a list of {len(node)}")
    return int(part)


def sentence(error: ValidationError, root: type[Section]) -> str:
    """The first mistake of a validation of `root` as one sentence, with the nearest known key for an unknown
    one."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _keys_at(first["loc"][:-1], root)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {where}; {hint}"
    if first["type"] == "missing":
        return f"the key {where} is missing"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where} is {first['input']!r}: {message[0].lower()}{message[1:]}"


def _keys_at(location: tuple[Any, ...], root: type[Section]) -> list[str]:
    """Field names of the section at a place of the tree, by walking the annotations."""
    section: Any = root
    for part in location:
        if isinstance(part, int) or not hasattr(section, "model_fields") or part not in section.model_fields:
            continue
        section = _section_in(section.model_fields[part].annotation) or section
    return sorted(section.model_fields)


def _section_in(annotation: Any) -> type[Section] | None:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in getattr(annotation, "__args__", ()):
        if (found := _section_in(inner)) is not None:
            return found
    return None
