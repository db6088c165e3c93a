"""Pre-trains a recipe.

    deepspeed [--hostfile HOSTS] --module eve.pretrain --recipe eve_base \\
              --deepspeed_config ds_configs/zero1_bf16.json [section.key=value ...]
    torchrun --nproc-per-node 8 -m eve.pretrain --recipe eve_base ...
    srun --ntasks-per-node 8 python -m eve.pretrain --recipe eve_base ...
    python -m eve.pretrain --recipe eve_tiny

Writes runs/NAME/ (or --run_dir): recipe, metrics.jsonl, TensorBoard events, samples, checkpoints and, at the
end, export/. `--resume` goes on from the last complete checkpoint, or starts where there is none, so
a script that is relaunched may always say it. SIGTERM and SIGINT save one and end with 128 + the
signal's number (143, 130). A mistake that the user can mend ends with one sentence and exit code 2,
where possible before the model is built.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from eve.config import Recipe, load_recipe
from eve.data.shards import resolve
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError, check_no_interpreter
from eve.model import count_parameters
from eve.objectives.masked_codes import check_visual_tokenizer
from eve.parallel.launcher import Console, read_environment
from eve.parallel.topology import Topology
from eve.parallel.watchdog import Watchdog
from eve.training.checkpoint import CheckpointStore, directory_size
from eve.training.ds_config import (
    DS_CONFIGS,
    check_deepspeed_version,
    describe,
    precision,
    read_ds_config,
    resolve_ds_config,
    state_format,
    zero_stage,
)
from eve.training.export import stage_exports
from eve.training.loop import Run, TrainState
from eve.training.run_lock import lock_run
from eve.training.stages import check_experts_backend, check_stage

# What a resumed run may change in the recipe: how it runs (what of it changes results is compared apart), and
# where its data lie (their content is compared: the tokenizer's bytes, names and counts of the shards).
FREE_KEYS = re.compile(
    r"training\..*|moe\..*|parallel\..*|evaluation\..*|data\.tokenizer|data\.sources\..*\.shards"
)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    topology = None
    try:
        topology = Topology.from_environment()
        return pretrain(options, topology)
    except UserError as error:
        if topology is None or topology.rank == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eve.pretrain", description="Pre-trains a recipe.")
    parser.add_argument("--recipe", required=True, help="name in eve/recipes/ or path of a YAML file")
    parser.add_argument(
        "--deepspeed_config", help="ds_configs/zero1_bf16.json, or zero0_fp32.json without CUDA"
    )
    parser.add_argument(
        "--run_dir", type=Path, help="default: runs/NAME of the recipe; with --resume of RUN/recipe.yaml, RUN"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last complete checkpoint; without one, start (for scripts that relaunch)",
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the recipe")
    return parser.parse_intermixed_args(argv)


def pretrain(options: argparse.Namespace, topology: Topology) -> int:
    """Checks everything, then trains. Raises UserError on all ranks together."""
    prepared, error = None, None
    try:
        prepared = prepare(options, topology)
    except UserError as mistake:
        error = mistake
    topology.raise_together(error)
    assert prepared is not None
    topology = prepared["topology"] = prepared["topology"].connected()
    run_dir, state = prepared["run_dir"], prepared["state"]
    is_new = not run_dir.exists()
    with ExitStack() as held:

        def begin() -> None:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                lock = lock_run(run_dir)
                if lock is not None:
                    held.enter_context(lock)
                begin_run_dir(prepared, topology, resume=options.resume)
            except OSError as mistake:
                raise UserError(f"cannot write to {run_dir}: {mistake.strerror}") from None

        try:
            topology.on_rank_0(begin)
            return Run(**prepared).train()
        except BaseException:
            # A run that made no step leaves no directory in the way of the next try.
            if topology.rank == 0 and is_new and state.step == 0:
                shutil.rmtree(run_dir, ignore_errors=True)
            raise


def prepare(options: argparse.Namespace, topology: Topology) -> dict[str, Any]:
    """What Run needs; every check that needs no model. Writes nothing."""
    check_no_interpreter()
    check_deepspeed_version()
    recipe = load_recipe(options.recipe, options.overrides)
    topology = topology.arranged(recipe.parallel, recipe.model)
    run_dir = options.run_dir or default_run_dir(options, recipe)
    store = CheckpointStore(run_dir / "checkpoints", topology, recipe.training.keep_checkpoints)
    checkpoint = check_run_dir(run_dir, store, resume=options.resume)
    if checkpoint is not None:
        check_same_recipe(checkpoint, recipe, run_dir)
    cuda = topology.device.type == "cuda"
    default = DS_CONFIGS / ("zero1_bf16.json" if cuda else "zero0_fp32.json")
    where = str(options.deepspeed_config or default)
    ds_tree = read_ds_config(where)
    for stage in recipe.stages:
        resolve_ds_config(ds_tree, recipe, stage, topology.data, cuda=cuda, where=where)
        check_stage(recipe, stage, ds_tree, where)
    check_experts_backend(recipe, ds_tree, cuda=cuda, where=where)
    try:
        tokenizer = load_data(recipe)
    except UserError as error:
        differing = [] if checkpoint is None else differing_keys(checkpoint, recipe)
        moved = [pair for pair in differing if pair[0].startswith("data.")]
        if not moved:
            raise
        raise UserError(f"{error}; {_shown(moved)}; {_own_recipe(run_dir)}") from None
    state = TrainState()
    if checkpoint is not None:
        state = read_state(checkpoint, recipe, tokenizer, ds_tree, where, topology)
    check_disk(run_dir, store, recipe)
    return {
        "topology": topology,
        "recipe": recipe,
        "ds_tree": ds_tree,
        "ds_where": where,
        "tokenizer": tokenizer,
        "run_dir": run_dir,
        "store": store,
        "state": state,
        "checkpoint": checkpoint,
    }


def default_run_dir(options: argparse.Namespace, recipe: Recipe) -> Path:
    """runs/NAME; to resume the recipe that a run wrote, that run: it may have had --run_dir."""
    written = Path(options.recipe)
    if options.resume and written.name == "recipe.yaml" and (written.parent / "checkpoints").is_dir():
        return written.parent
    return Path("runs") / recipe.name


def load_data(recipe: Recipe) -> Tokenizer:
    """The tokenizer; raises UserError where it, the visual one or shards are missing or do not fit."""
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    if tokenizer.vocab_size != recipe.model.vocab_size:
        raise UserError(
            f"the tokenizer {recipe.data.tokenizer} has {tokenizer.vocab_size} pieces, "
            f"model.vocab_size is {recipe.model.vocab_size}"
        )
    streams = [stream for stage in recipe.stages for stream in stage.streams]
    if any(stream.image_target == "codes" for stream in streams):
        assert recipe.data.visual_tokenizer is not None
        check_visual_tokenizer(recipe.data.visual_tokenizer, recipe.model)
    for source in sorted({stream.source for stream in streams}):
        for shards in recipe.data.sources[source].mix:
            resolve(shards.shards)
    return tokenizer


def check_run_dir(run_dir: Path, store: CheckpointStore, *, resume: bool) -> Path | None:
    """The checkpoint to start from; None starts at step 0, also to resume a run that has none yet."""
    if not resume and run_dir.exists():
        raise UserError(f"the run directory {run_dir} exists; go on with --resume or give another --run_dir")
    return store.latest() if resume else None


def check_same_recipe(checkpoint: Path, recipe: Recipe, run_dir: Path) -> None:
    """Raises UserError where the recipe is not that of the checkpoint, but for the keys that are free."""
    differing = [pair for pair in differing_keys(checkpoint, recipe) if not FREE_KEYS.fullmatch(pair[0])]
    if differing:
        raise UserError(
            f"the checkpoint {checkpoint} is of another recipe: {_shown(differing)}; {_own_recipe(run_dir)}"
        )


def differing_keys(checkpoint: Path, recipe: Recipe) -> list[tuple[str, str]]:
    """(key, `KEY is OURS, was THEIRS`) of all keys that the recipe of the checkpoint has otherwise."""
    theirs = flatten(yaml.safe_load((checkpoint / "recipe.yaml").read_text()))
    ours = flatten(recipe.model_dump(mode="json"))
    return [
        (key, f"{key} is {ours.get(key)!r}, was {theirs.get(key)!r}")
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]


def _shown(differing: list[tuple[str, str]]) -> str:
    more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
    return "; ".join(text for _, text in differing[:4]) + more


def _own_recipe(run_dir: Path) -> str:
    return f"that of the run is --recipe {run_dir / 'recipe.yaml'}"


def read_state(
    checkpoint: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    ds_tree: dict[str, Any],
    where: str,
    topology: Topology,
) -> TrainState:
    """The state of a checkpoint, which must be of this tokenizer and layout."""
    state = TrainState(**json.loads((checkpoint / "state.json").read_text()))
    if (checkpoint / "tokenizer.model").read_bytes() != tokenizer.model_bytes:
        raise UserError(
            f"the tokenizer {recipe.data.tokenizer} is not the one of the checkpoint {checkpoint}; "
            "its copy is tokenizer.model in there"
        )
    layout = {
        "ZeRO stage": (zero_stage(ds_tree), state.zero_stage),
        "precision": (precision(ds_tree), state.precision),
        "optimizer states in the format of": (state_format(ds_tree), state.state_format),
        "parallel.tensor": (topology.tensor, state.tensor),
        "parallel.expert": (topology.expert, state.expert),
    }
    if state.zero_stage > 0 or state.tensor > 1 or state.expert > 1:
        layout["number of processes"] = topology.world_size, state.world_size
    for name, (found, expected) in layout.items():
        if found != expected:
            raise UserError(
                f"the checkpoint {checkpoint} has {name} {expected}, this run has {found}; "
                "move it with python -m tools.convert_checkpoint"
            )
    return state


def check_disk(run_dir: Path, store: CheckpointStore, recipe: Recipe) -> None:
    """fp32 weights and two moments of each parameter, as often as checkpoints are kept, and once more; the
    weights alone of each export, the last of which is one with that of its stage."""
    size = 12 * count_parameters(recipe.model).total
    stages = stage_exports(run_dir, recipe) if recipe.training.export_stages else []
    exports = max(1, sum(not directory.exists() for directory in stages))
    existing = sum(directory_size(path) for path in store.completed())
    need = size * (recipe.training.keep_checkpoints + 1) + size // 3 * exports - existing
    place = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if free < need:
        raise UserError(
            f"no space left for checkpoints in {run_dir}: about {need / 2**30:.1f} GiB needed for "
            f"training.keep_checkpoints {recipe.training.keep_checkpoints}, {free / 2**30:.1f} GiB free"
        )


def begin_run_dir(prepared: dict[str, Any], topology: Topology, *, resume: bool) -> None:
    """Makes the directory, cuts off what a killed run wrote after its checkpoint, prints what will run."""
    recipe, run_dir, state = prepared["recipe"], prepared["run_dir"], prepared["state"]
    prepared["store"].clean()
    metrics = run_dir / "metrics.jsonl"
    if metrics.exists():
        os.truncate(metrics, min(state.metrics_bytes, metrics.stat().st_size))
    (run_dir / "recipe.yaml").write_text(recipe.to_yaml())
    config, plan = resolve_ds_config(
        prepared["ds_tree"],
        recipe,
        recipe.stages[0],
        topology.data,
        cuda=topology.device.type == "cuda",
        where=prepared["ds_where"],
    )
    (run_dir / "ds_config.json").write_text(json.dumps(config, indent=2) + "\n")
    count = count_parameters(recipe.model)
    print(
        f"recipe {recipe.name}: {count.total:,} parameters, {count.active:,} active per token in the blocks"
    )
    print(f"device: {topology.describe()}")
    print(f"DeepSpeed: {describe(config, plan, recipe.stages[0])}; in full: {run_dir / 'ds_config.json'}")
    if topology.tensor > 1 and topology.expert == 1 and count.routed_experts:
        print(
            "note: the gradients of all experts cross the tensor ranks in every pass; "
            f"parallel.expert={topology.tensor} spreads the experts instead"
        )
    if prepared["checkpoint"] is not None:
        print(f"resuming {prepared['checkpoint']} at step {state.step}", flush=True)
    else:
        nothing = " at step 0, there is no checkpoint to resume" if resume else ""
        print(f"starting {run_dir}{nothing}", flush=True)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}, "c": [2]} -> {"a.b": 1, "c.0": 2}."""
    if isinstance(tree, dict):
        items = list(tree.items())
    elif isinstance(tree, list):
        items = list(enumerate(tree))
    else:
        return {prefix[:-1]: tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}{key}.")
    return flat


def program() -> None:
    """`main` as the whole of a process."""
    # DeepSpeed calls them in every step, and each line would hide what a process says when it dies.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    Console.install()
    read_environment()
    watchdog = Watchdog.start()
    try:
        code = main()
        Topology.leave()
    except Exception as error:
        # A defect, maybe on this rank alone: the others end once this process is gone, so no thread,
        # process group or exit handler may keep it.
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        watchdog.report(error)
    watchdog.stop(code)
    sys.exit(code)


if __name__ == "__main__":
    program()
