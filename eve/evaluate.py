"""Evaluates a trained model on held-out data.

    python -m eve.evaluate --task losses|pretrain|retrieval --checkpoint DIR [--data SHARDS]
                           [--max-samples N] [--output FILE.md|FILE.json] [section.key=value ...]

DIR is a run directory or an exported model (safetensors + recipe + tokenizer), as a run's stages/NUMBER_NAME.
losses: of every stream, of a run at its start and after each stage. pretrain: masked pixels, codes and words,
grounding, probes, pictures. retrieval: recall. Overrides change the recipe of the checkpoint, but not its
model. Exit code 2 and one sentence for a mistake of the user.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from eve.data.shards import resolve
from eve.errors import UserError, check_no_interpreter
from eve.tasks import losses, pretrain, retrieval
from eve.tasks.checkpoint import open_checkpoint
from eve.tasks.report import check_output, to_text, write

# One module for each task: check(recipe), evaluate(checkpoint, cells).
TASKS = {"losses": losses, "pretrain": pretrain, "retrieval": retrieval}


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
    overrides = list(options.overrides)
    if options.max_samples is not None:
        overrides.append(f"evaluation.max_samples={options.max_samples}")
    checkpoint = open_checkpoint(options.checkpoint, overrides)
    recipe = checkpoint.recipe
    cells = {options.data: options.data} if options.data else recipe.evaluation.shards
    task = TASKS[options.task]
    task.check(recipe)
    check_cells(cells)
    tables = task.evaluate(checkpoint, cells)
    for table in tables:
        print(f"\n{to_text(table)}")
    print(f"\npictures: {checkpoint.pictures_dir}" if options.task == "pretrain" else "")
    if (options.checkpoint / "tensorboard").is_dir():
        print(f"curves:   tensorboard --logdir {options.checkpoint}")
    if options.output is not None:
        write(options.output, tables)
        print(f"tables:   {options.output}")


def check_cells(cells: dict[str, str]) -> None:
    """Raises UserError where held-out shards are missing."""
    if not cells:
        raise UserError("the recipe names no held-out shards in evaluation.shards; give some with --data")
    for shards in cells.values():
        resolve(shards)


if __name__ == "__main__":
    sys.exit(main())
