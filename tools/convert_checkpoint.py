"""Moves a checkpoint to another layout, or out of all layouts, on a CPU and one tensor at a time; imports
official weights of other projects, and exports to two of their layouts.

    python -m tools.convert_checkpoint SOURCE TARGET [options]

SOURCE is a run (its last checkpoint), one of its RUN/checkpoints/step-N, or a topology-free directory; with
--from vlmo, beit, ... a file of official weights. TARGET must not exist. It becomes

    a topology-free directory, as `export` of a run          without --world-size
    a run, or a RUN/checkpoints/step-N, to go on with        with --world-size
        --resume on that many processes
    a file in the layout of another project                  with --to

    python -m tools.convert_checkpoint runs/eve_base released                       weights only
    python -m tools.convert_checkpoint runs/eve_base moved --training-state         all that training needs
    python -m tools.convert_checkpoint moved runs/wide --world-size 32 --tensor 2 --expert 8 --zero-stage 2
    python -m tools.convert_checkpoint runs/eve_base runs/wide --world-size 32      from layout to layout
    python -m tools.convert_checkpoint runs/eve_base moved --verify                 both are there: compare
    python -m tools.convert_checkpoint runs/dense start --upcycle eve_base          copies as experts
    python -m tools.convert_checkpoint vlmo_base.pt vlmo --from vlmo                the model as it is
    python -m tools.convert_checkpoint beit.pth start --from beit --recipe vlmo_base
        weights for a stage's init_from; the recipe's section `start` says what fills what
    python -m tools.convert_checkpoint runs/vlmo_base vlmo.pt --to vlmo             for the official code
    python -m tools.convert_checkpoint vqkd.pth visual --from beit2_tokenizer       for data.visual_tokenizer

Weights are those of the optimizer in fp32, not their rounded copies. Exit code 1: --verify found a
difference; 2: a mistake in the call, or a source that is not whole.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml

from eve.config import load_recipe
from eve.conversion.checkpoint import Checkpoint
from eve.conversion.foreign.checkpoint import ForeignCheckpoint, ForeignOptions, listed
from eve.conversion.foreign.formats import FORMATS as FOREIGN
from eve.conversion.foreign.formats import export_state
from eve.conversion.foreign.state_files import read_state, write_state
from eve.conversion.layout import Layout
from eve.conversion.sources import FORMATS, open_source
from eve.conversion.targets import convert_to_deepspeed, convert_to_open
from eve.conversion.upcycling import Upcycled
from eve.conversion.verification import differences
from eve.errors import UserError
from eve.visual_tokenizer.import_beit2 import read as read_visual_tokenizer
from eve.visual_tokenizer.model import save_visual_tokenizer
from tools.progress import Progress

# Differences that --verify prints.
SHOWN = 10
# VQ-KD of BEiT v2: not a model, but a visual tokenizer.
VISUAL_TOKENIZER = "beit2_tokenizer"


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_intermixed_args(arguments)
    try:
        _check(options)
        if options.format == VISUAL_TOKENIZER:
            return _import_visual_tokenizer(options)
        source = open_source(options.source, options.format, _foreign(options))
        if options.to:
            return _export(source, options)
        if options.upcycle:
            source = _upcycled(source, options)
        exists = options.target.exists()
        if not (exists and options.verify):
            _convert(source, options)
        if options.verify:
            return _verify(source, options)
    except UserError as error:
        print(f"convert_checkpoint: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nconvert_checkpoint: interrupted; nothing is left of it", file=sys.stderr)
        return 130
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together."""
    for name in ("world_size", "tensor", "expert"):
        if (number := getattr(options, name)) is not None and number < 1:
            raise UserError(f"--{name.replace('_', '-')} {number} is below 1")
    if options.overrides and not (options.upcycle or options.recipe):
        raise UserError(f"{options.overrides[0]} is for --upcycle or --recipe")
    for name in ("recipe", "tokenizer", "sizes", "ignore"):
        if getattr(options, name) and options.format not in FOREIGN:
            word = "size" if name == "sizes" else name
            raise UserError(f"--{word} is for weights of another project; say --from {'|'.join(FOREIGN)}")
    if options.upcycle and options.recipe:
        raise UserError("--upcycle and --recipe each name the recipe to convert to; give one")
    if options.to and (options.world_size is not None or options.training_state or options.upcycle):
        raise UserError("--to writes weights alone: no --world-size, no --training-state, no --upcycle")
    if options.to and options.verify:
        raise UserError("--verify compares what eve reads; convert the exported file back with --from")
    if options.training_state and options.world_size is not None:
        raise UserError(
            "--training-state is for a topology-free directory; with --world-size it is there anyway"
        )
    if options.upcycle and (options.training_state or options.world_size is not None):
        raise UserError("--upcycle gives weights for a run's init_from: no --training-state, no --world-size")
    if options.noise < 0:
        raise UserError(f"--noise {options.noise} is below 0")


def _import_visual_tokenizer(options: argparse.Namespace) -> int:
    if options.to or options.upcycle or options.verify or options.world_size or options.training_state:
        raise UserError(f"--from {VISUAL_TOKENIZER} makes a visual tokenizer, no model: give no other option")
    if options.target.exists():
        raise UserError(f"{options.target} exists; give a directory that does not")
    config, weights = read_visual_tokenizer(read_state(options.source))
    save_visual_tokenizer(options.target, config, weights)
    print(
        f"{options.target}: {config.codes} codes of patches of {config.patch_size} pixels; the names fit, "
        "but the import is not verified against the official code's outputs"
    )
    return 0


def _convert(source: Checkpoint, options: argparse.Namespace) -> None:
    layout = _layout(options)
    if layout is not None:
        convert_to_deepspeed(source, options.target, layout, progress=_progress(source, True))
        print(
            f"{options.target}: step {source.step} for {layout.describe()}; go on with --deepspeed_config "
            f"ds_configs/zero{layout.zero_stage}_{layout.precision}{'_offload' * options.offload}.json"
        )
        return
    convert_to_open(
        source,
        options.target,
        training_state=options.training_state,
        progress=_progress(source, options.training_state),
    )
    print(f"{options.target}: step {source.step}, {len(source.parameters)} parameters")
    for note in source.notes if isinstance(source, ForeignCheckpoint) else ():
        print(f"  {note}")


def _foreign(options: argparse.Namespace) -> ForeignOptions | None:
    if options.format not in FOREIGN:
        return None
    sizes = {}
    for word in options.sizes:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"'{word}' is not a size such as heads=12")
        sizes[key] = yaml.safe_load(text)
    return ForeignOptions(
        recipe=load_recipe(options.recipe, options.overrides) if options.recipe else None,
        sizes=sizes,
        ignore=tuple(options.ignore),
        tokenizer=options.tokenizer,
    )


def _export(source: Checkpoint, options: argparse.Namespace) -> int:
    weights = {parameter.name: source.read(parameter.name, "weight") for parameter in source.parameters}
    state, left = export_state(weights, options.to, source.recipe.model)
    write_state(options.target, state)
    print(f"{options.target}: {len(state)} tensors in the layout of {FOREIGN[options.to].title}")
    if left:
        print(f"  left behind: {listed(left)}")
    return 0


def _upcycled(source: Checkpoint, options: argparse.Namespace) -> Checkpoint:
    recipe = load_recipe(options.upcycle, options.overrides)
    return Upcycled(source, recipe, options.experts_from, options.noise)


def _verify(source: Checkpoint, options: argparse.Namespace) -> int:
    result = open_source(options.target)
    both = source.run is not None and result.run is not None
    found = differences(source, result, training_state=both, progress=_progress(source, both))
    for line in found[:SHOWN]:
        print(line)
    if len(found) > SHOWN:
        print(f"and {len(found) - SHOWN} more differences; the steps are {source.step} and {result.step}")
    what = "weights, moments and counts of updates" if both else "weights"
    if not found:
        print(f"the {what} of {len(source.parameters)} parameters are the same, bit for bit")
    return 1 if found else 0


def _layout(options: argparse.Namespace) -> Layout | None:
    degrees = {
        "tensor": options.tensor,
        "expert": options.expert,
        "zero_stage": options.zero_stage,
        "precision": options.precision,
    }
    given = {name: value for name, value in degrees.items() if value is not None}
    if options.world_size is None:
        if given:
            raise UserError(
                f"--{next(iter(given)).replace('_', '-')} is for a layout; give its --world-size too"
            )
        return None
    layout = Layout(options.world_size, **given)
    if (layout.zero_stage, layout.precision, options.offload) == (1, "bf16", False):
        # ds_configs/zero1_bf16.json adds gradients up in fp32, for which DeepSpeed has an optimizer apart.
        return replace(layout, state_format="BF16_Optimizer")
    return layout


def _progress(source: Checkpoint, training_state: bool) -> Callable[[], None]:
    learning = sum(parameter.learns for parameter in source.parameters)
    total = len(source.parameters) + 2 * learning * training_state
    show, done = Progress("tensors"), 0

    def step() -> None:
        nonlocal done
        done += 1
        show(done, total)

    return step


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.convert_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument(
        "--from",
        dest="format",
        choices=[*sorted(FORMATS), *FOREIGN, VISUAL_TOKENIZER],
        help="the format of SOURCE; default: which of eve's it looks like",
    )
    parser.add_argument(
        "--to",
        choices=[name for name, form in FOREIGN.items() if form.state is not None],
        help="write the layout of another project: safetensors if TARGET ends so, else as torch.save does",
    )
    parser.add_argument(
        "--training-state",
        action="store_true",
        help="topology-free: moments of AdamW, counts of updates, data cursors and counters too",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read SOURCE and TARGET again and compare checksums, numbers of elements and of experts; "
        "where TARGET is there already, do only this",
    )
    layout = parser.add_argument_group("the layout of TARGET")
    layout.add_argument("--world-size", type=int, metavar="N", help="processes")
    layout.add_argument("--tensor", type=int, metavar="N", help="parallel.tensor; default 1")
    layout.add_argument("--expert", type=int, metavar="N", help="parallel.expert; default 1")
    layout.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), help="default 0")
    layout.add_argument("--precision", choices=("fp32", "bf16"), help="default fp32")
    layout.add_argument("--offload", action="store_true", help="for a ds_configs/*_offload.json")
    foreign = parser.add_argument_group("weights of another project (--from)")
    foreign.add_argument(
        "--recipe",
        help="start this recipe's model with them: its section `start` says which part fills which expert, "
        "positions are resized, what is missing is new by the recipe's seed; default: their own model",
    )
    foreign.add_argument(
        "--size",
        dest="sizes",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="what their names and shapes do not tell, as heads=6; the official values are the default",
    )
    foreign.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="PATTERN",
        help="names of SOURCE to leave out, or to do without; * stands for anything",
    )
    foreign.add_argument("--tokenizer", type=Path, metavar="FILE", help="default: the recipe's")
    upcycle = parser.add_argument_group(
        "other experts", "see eve/conversion/upcycling.py for what they compute"
    )
    upcycle.add_argument(
        "--upcycle",
        metavar="RECIPE",
        help="weights for this recipe: experts of its learned routers are copies of the feed-forwards (or of "
        "another number of experts) of SOURCE; routers that SOURCE lacks are new, by the recipe's seed",
    )
    upcycle.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the recipe")
    upcycle.add_argument(
        "--experts-from",
        choices=("alternate", "image", "text", "mean"),
        default="alternate",
        help="which expert of SOURCE fills which: in turn; always that of a modality; the mean (of a learned "
        "router: of the experts that fall together)",
    )
    upcycle.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of a tensor's standard deviation, added to copied experts so that they part; by the recipe's "
        "seed",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
