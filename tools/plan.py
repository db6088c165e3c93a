"""What a recipe costs on so many GPUs, for each layout, and which to take. Needs no GPU.

    python -m tools.plan --recipe eve_large --gpus 256 --gpu h200 [section.key=value ...]

Prints, for each layout (data x tensor x expert parallelism, ZeRO stage, micro-batch, activation
checkpointing): memory of one GPU, bytes that it sends, the predicted time of a step; then the recommended one
in detail with its launch command, and every assumption. What an override says stays fixed (parallel.tensor,
parallel.sequence, parallel.expert, training.micro_batch_size, training.activation_checkpointing); a layout
that a run would refuse is refused here with the same sentence.

Memory and bytes follow from the model's shapes and were checked against real engines (tests/planning,
tools/measure_traffic.py). Times rest on the assumptions printed at the end: compare layouts with them, and
measure before you book.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace

from eve.config import Recipe, load_recipe
from eve.errors import UserError
from eve.planning.layout import recipe_for
from eve.planning.search import EQUAL, Fixed, Plan, Planner, best
from eve.planning.step_time import GPUS, Assumptions, gpu_named
from eve.planning.traffic import summed

_GIB = 2**30


def fixed_by(overrides: list[str], recipe: Recipe, zero_stage: int | None) -> Fixed:
    """What the overrides decide, with the values as the recipe has parsed them."""
    keys = {override.partition("=")[0] for override in overrides}

    def value(key: str, parsed):
        return parsed if key in keys else None

    return Fixed(
        tensor=value("parallel.tensor", recipe.parallel.tensor),
        sequence=value("parallel.sequence", recipe.parallel.sequence),
        expert=value("parallel.expert", recipe.parallel.expert),
        zero_stage=zero_stage,
        micro_batch=value("training.micro_batch_size", recipe.training.micro_batch_size),
        checkpointing=value("training.activation_checkpointing", recipe.training.activation_checkpointing),
    )


COLUMNS = (
    f"{'':31}micro    GiB on a GPU{'':24}MB sent a step   ms a step\n"
    "   data x tensor expert ZeRO   batch    dense experts activat.  total     in host  network   "
    "compute optim. comm.  total   samples/s"
)


def table(plans: list[Plan], chosen: Plan, rows: int) -> str:
    """The best of each (tensor, expert, ZeRO stage), those that fit first; data parallelism alone always."""
    shown: dict[tuple[int, int, int], Plan] = {}
    for plan in sorted(plans, key=lambda plan: (not plan.fits, plan.time.total)):
        layout = plan.layout
        shown.setdefault((layout.tensor, layout.expert, layout.zero_stage), plan)
    alone = [plan for (tensor, expert, _), plan in shown.items() if tensor == expert == 1]
    kept = {id(plan): plan for plan in (*list(shown.values())[:rows], chosen, *alone)}
    return "\n".join([COLUMNS, *(_line(plan, plan is chosen) for plan in kept.values())])


def _line(plan: Plan, chosen: bool) -> str:
    layout, memory, time = plan.layout, plan.memory, plan.time
    gib = (memory.dense, memory.experts, memory.activations + memory.logits, memory.total)
    dense, experts, activations, total = (size / _GIB for size in gib)
    inside = sum(t.inside_host for t in plan.transfers) / 1e6
    between = sum(t.between_hosts for t in plan.transfers) / 1e6
    computing, optimizer, communication = (
        1e3 * seconds for seconds in (time.computing, time.optimizer, time.communication)
    )
    rate = f"{plan.samples_per_second:,.0f}" if plan.fits else "too large"
    return (
        f"{'->' if chosen else '  '} {layout.data:4} x {layout.tensor:5}{'s' if layout.sequence else ' '} "
        f"{layout.expert:6} {layout.zero_stage:4} "
        f"{layout.micro_batch:6}{'c' if layout.checkpointing else ' '} "
        f"{dense:8.1f} {experts:7.1f} {activations:8.1f} {total:6.1f} {inside:11,.0f} {between:8,.0f} "
        f"{computing:9.1f} {optimizer:6.1f} {communication:5.1f} {1e3 * time.total:6.1f} {rate:>11}"
    )


def details(plan: Plan, memory_of_gpu: float) -> str:
    memory, time, weights = plan.memory, plan.time, plan.weights
    lines = [
        f"recommended: {plan.layout.describe()}",
        "",
        f"GiB on a GPU of {memory_of_gpu / _GIB:.1f}       weights  gradients  fp32 copy, moments",
    ]
    spread = plan.layout.expert > 1
    for name, number, parts in (
        ("dense" if spread else "all", weights.dense, (memory.weights, memory.gradients, memory.optimizer)),
        (
            "experts",
            weights.experts,
            (memory.expert_weights, memory.expert_gradients, memory.expert_optimizer),
        ),
    ):
        sizes = [size / _GIB for size in parts]
        if number:
            lines.append(
                f"  {name:8} {number / 1e6:7,.1f}M learn {sizes[0]:9.2f} {sizes[1]:10.2f} {sizes[2]:19.2f}"
            )
    lines += [
        f"  a pass: activations {memory.activations / _GIB:.2f}, logits of words "
        f"{memory.logits / _GIB:.2f}; or the update: {memory.step / _GIB:.2f}; "
        f"reserve {memory.reserve / _GIB:.2f}; in all {memory.total / _GIB:.2f}",
        "",
        "MB that a GPU sends a step   least possible   inside the host   over the network",
    ]
    for what, least, inside, between in summed(plan.transfers):
        lines.append(f"  {what:26} {least / 1e6:14,.1f} {inside / 1e6:17,.1f} {between / 1e6:18,.1f}")
    lines += [
        "",
        f"a step of {1e3 * time.total:.0f} ms: computing {1e3 * time.computing:.0f} "
        f"({time.model_flops / 1e12:.1f} TFLOP on a GPU, {time.hardware_flops / 1e12:.1f} with recomputation)"
        f", optimizer {1e3 * time.optimizer:.0f}, communication not hidden {1e3 * time.communication:.0f}",
        f"{plan.samples_per_second:,.0f} samples/s, "
        f"{plan.samples_per_second / plan.layout.gpus:,.1f} on a GPU",
    ]
    return "\n".join(lines)


def command(plan: Plan, recipe: Recipe, name: str, overrides: list[str], host: int) -> str:
    """What to type for this layout."""
    layout = plan.layout
    needed = recipe_for(layout, recipe, recipe.stages[0])
    keys = {
        "parallel.tensor": (layout.tensor, recipe.parallel.tensor),
        "parallel.expert": (layout.expert, recipe.parallel.expert),
        "training.micro_batch_size": (layout.micro_batch, recipe.training.micro_batch_size),
        "training.activation_checkpointing": (
            layout.checkpointing,
            recipe.training.activation_checkpointing,
        ),
        "data.num_readers": (needed.data.num_readers, recipe.data.num_readers),
    }
    if layout.tensor > 1:
        keys["parallel.sequence"] = (layout.sequence, recipe.parallel.sequence)
    given = {text.partition("=")[0] for text in overrides}
    words = [
        f"{key}={str(value).lower()}"
        for key, (value, written) in keys.items()
        if value != written and key not in given
    ]
    hosts = "--hostfile HOSTS" if layout.gpus > host else f"--num_gpus {layout.gpus}"
    lines = [
        f"deepspeed {hosts} --module eve.pretrain --recipe {name} \\",
        f"    --deepspeed_config ds_configs/{layout.ds_config}",
    ]
    if words or overrides:
        lines[-1] += " \\"
        lines.append("    " + " ".join([*words, *(shlex.quote(text) for text in overrides)]))
    if layout.gpus > host:
        lines.append(f"# HOSTS has {layout.gpus // host} lines: hostname slots={host}")
    if needed.data.num_readers != recipe.data.num_readers:
        lines.append("# another data.num_readers is another order of the data")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    given = Assumptions()
    parser = argparse.ArgumentParser(
        prog="python -m tools.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", required=True, help="name or path")
    parser.add_argument("--gpus", type=int, required=True, help="number of GPUs")
    parser.add_argument("--gpu", required=True, metavar="NAME", help=", ".join(GPUS))
    parser.add_argument("--gpus_per_host", type=int, default=8)
    parser.add_argument("--stage", type=int, default=0, help="stage of the recipe, from 0")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), help="only this ZeRO stage")
    parser.add_argument("--rows", type=int, default=12, help="layouts in the table")
    parser.add_argument(
        "--mfu", type=float, default=given.mfu, help="share of the peak that a large pass reaches"
    )
    parser.add_argument("--text_length", type=float, default=given.text_length, help="mean tokens of a text")
    parser.add_argument("--network", type=float, metavar="GBIT", help="network of one GPU in Gbit/s")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_intermixed_args(argv)
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    recipe = load_recipe(options.recipe, options.overrides)
    gpu = gpu_named(options.gpu)
    for name in ("gpus", "gpus_per_host", "rows"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1")
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu is {options.mfu}, expected a share of 1")
    if not 0 <= options.stage < len(recipe.stages):
        raise UserError(f"--stage is {options.stage}, {recipe.name} has stages 0 to {len(recipe.stages) - 1}")
    if options.network is not None:
        gpu = replace(gpu, network=options.network * 1e9 / 8)
    stage = recipe.stages[options.stage]
    given = Assumptions(mfu=options.mfu, text_length=options.text_length)
    planner = Planner(recipe, stage, gpu, options.gpus, options.gpus_per_host, given)
    plans, refused = planner.all(fixed_by(options.overrides, recipe, options.zero))
    chosen = best(plans)
    hosts = -(-options.gpus // options.gpus_per_host)
    reasons = [
        f"refused: data {layout.data} x tensor {layout.tensor}, expert {layout.expert}: {reason}\n"
        for reason, layout in list(refused.items())[:4]
    ]
    hours = stage.steps * chosen.time.total / 3600
    text = [
        f"{recipe.name}, stage {stage.name}: {planner.samples:,} samples a step on {options.gpus} "
        f"{options.gpu} in {hosts} host{'s' if hosts > 1 else ''}; {len(plans)} layouts, "
        f"{sum(plan.fits for plan in plans)} fit\n",
        table(plans, chosen, options.rows),
        "(s: with sequence parallelism; c: with activation checkpointing; the best micro-batch of each;\n"
        f"->: the plainest layout within {EQUAL:.0%} of the fastest: predictions are no better than that)\n",
        *reasons,
        details(chosen, gpu.memory),
        f"the stage of {stage.steps:,} steps: {hours:,.0f} hours, {hours * options.gpus:,.0f} GPU hours\n",
        command(chosen, recipe, options.recipe, options.overrides, options.gpus_per_host),
        f"\nassumed: {gpu.name} of {gpu.peak / 1e12:.0f} TFLOP/s (bf16, dense), {gpu.memory / _GIB:.1f} GiB "
        f"at {gpu.hbm / 1e12:.1f} TB/s, {gpu.link / 1e9:.0f} GB/s to others of its host, "
        f"{gpu.network / 1e9:.0f} GB/s over the network; {given.describe()}; ds_configs/ as they are",
    ]
    # In one piece, so that `| head` breaks no pipe.
    print("\n".join(text))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
