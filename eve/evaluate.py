"""Evaluates a trained model on held-out data.

    python -m eve.evaluate --task pretrain|retrieval --checkpoint DIR [--data SHARDS] [--max-samples N]
                           [--output FILE.md|FILE.json] [section.key=value ...]

DIR is a run directory or an exported model (safetensors + recipe + tokenizer). Overrides change the
recipe of the checkpoint, but not its model. Exit code 2 and one sentence for a mistake of the user.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from eve.config import Recipe
from eve.errors import UserError, check_no_interpreter
from eve.tasks import pretrain, retrieval
from eve.tasks.report import check_output, to_text, write
from eve.training.export import exported_recipe, load_exported

# One module for each task: check(recipe, cells), evaluate(model, recipe, tokenizer, cells, pictures_dir).
TASKS = {"pretrain": pretrain, "retrieval": retrieval}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eve.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=sorted(TASKS))
    parser.add_argument("--checkpoint", required=True, type=Path, help="run directory or exported model")
    parser.add_argument("--data", help="held-out shards instead of the recipe's evaluation.shards")
    parser.add_argument("--max-samples", type=int, help="samples of each cell")
    parser.add_argument("--output", type=Path, help="write the tables as .md or .json as well")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(arguments)
    logging.basicConfig(format="%(message)s")
    try:
        _run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(options: argparse.Namespace) -> None:
    check_no_interpreter()
    if options.output is not None:
        check_output(options.output)
    exported = find_export(options.checkpoint)
    overrides = list(options.overrides)
    if options.max_samples is not None:
        overrides.append(f"evaluation.max_samples={options.max_samples}")
    recipe = _recipe(exported, overrides)
    cells = {options.data: options.data} if options.data else recipe.evaluation.shards
    task = TASKS[options.task]
    task.check(recipe, cells)
    model, _, tokenizer = load_exported(exported)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    pictures_dir = options.checkpoint / "evaluation"
    tables = task.evaluate(model, recipe, tokenizer, cells, pictures_dir)
    for table in tables:
        print(f"\n{to_text(table)}")
    print(f"\npictures: {pictures_dir}" if pictures_dir.is_dir() else "")
    if (options.checkpoint / "tensorboard").is_dir():
        print(f"curves:   tensorboard --logdir {options.checkpoint}")
    if options.output is not None:
        write(options.output, tables)
        print(f"tables:   {options.output}")


def find_export(directory: Path) -> Path:
    """The exported model of a run directory, or the directory itself. Raises UserError where neither."""
    for candidate in (directory, directory / "export"):
        if (candidate / "model.safetensors").is_file():
            return candidate
    if not directory.is_dir():
        raise UserError(
            f"there is no directory {directory}; --checkpoint is a run directory or an exported model"
        )
    raise UserError(
        f"{directory} holds no exported model (model.safetensors, or export/model.safetensors); "
        f"a run exports when it ends; if it was stopped, finish it with python -m eve.pretrain ... --resume"
    )


def _recipe(exported: Path, overrides: list[str]) -> Recipe:
    """The recipe of the checkpoint with overrides. Raises UserError where these change the model."""
    recipe = exported_recipe(exported, overrides)
    if recipe.model != exported_recipe(exported).model:
        raise UserError("the overrides change model.*, but the model is that of the checkpoint")
    return recipe


if __name__ == "__main__":
    sys.exit(main())
