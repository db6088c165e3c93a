"""Bytes really sent in a step by 4 processes of this machine, for each layout, beside the planner's formulas.

    python -m tools.measure_traffic [--recipe eve_tiny] [--batch 32] [--steps 3] [section.key=value ...]

least     what a rank must send (eve/planning/traffic.py)
formula   what this code and DeepSpeed send, by the planner
counted   the collectives that were called: what a ring or a direct exchange sends of their tensors
on wire   what the loopback interface carried, over the number of processes. They run in a network namespace
          of their own, so nothing else is in it, but gloo's algorithms, headers and acknowledgements are; "-"
          where this user may not have a namespace

and the time of a step: computing, moving (the shortest time that any rank spent in a collective, summed over
the collectives) and waiting for other ranks. Samples are random, texts have one length; all is in fp32.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import json
import os
import socket
import statistics
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from eve.config import Recipe, load_recipe
from eve.data.batch import Batch, Sample, collate
from eve.errors import UserError
from eve.objectives.masking import ImageMasking, PairMasking, TextMasking
from eve.parallel.topology import Topology, check_degrees
from eve.planning.layout import Layout, passes_of
from eve.planning.traffic import transfers
from eve.planning.weights import ModelWeights
from eve.training.ds_config import DS_CONFIGS, plan_step, resolve_ds_config
from eve.training.engine import Engine
from eve.training.stages import build_stage

PROCESSES = 4
TEXT_LENGTH = 12
DENSE = 'model.feed_forward=[{{blocks: "0-{last}", router: modality}}]'

# (name in the table, ZeRO stage, overrides)
LAYOUTS: tuple[tuple[str, int, tuple[str, ...]], ...] = (
    ("data 4, ZeRO 0", 0, ()),
    ("data 4, ZeRO 1", 1, ()),
    ("data 4, ZeRO 2", 2, ()),
    ("data 4, ZeRO 3 (dense model)", 3, (DENSE,)),
    ("tensor 2", 1, ("parallel.tensor=2", "parallel.sequence=false")),
    ("tensor 2, sequence", 1, ("parallel.tensor=2",)),
    ("tensor 4", 1, ("parallel.tensor=4", "parallel.sequence=false")),
    ("tensor 4, sequence", 1, ("parallel.tensor=4",)),
    ("expert 2", 1, ("parallel.expert=2",)),
    ("expert 4", 1, ("parallel.expert=4",)),
    ("expert 4, ZeRO 2", 2, ("parallel.expert=4",)),
    ("tensor 2 x expert 2, sequence", 1, ("parallel.tensor=2", "parallel.expert=2")),
    (
        "the same, checkpointing",
        1,
        ("parallel.tensor=2", "parallel.expert=2", "training.activation_checkpointing=true"),
    ),
)


@dataclass
class Collectives:
    """Every collective of this process, from the methods of ProcessGroup that all others end in."""

    sent: float = 0.0
    seconds: list[float] = field(default_factory=list)

    # As they stand in the class: what getattr gives of these would no longer get the instance.
    _originals: dict[str, Any] = field(default_factory=dict)

    def watch(self) -> None:
        for name, bytes_sent in SENT.items():
            original = getattr(dist.ProcessGroup, name, None)
            if original is not None:
                self._originals[name] = vars(dist.ProcessGroup)[name]
                setattr(dist.ProcessGroup, name, self._watched(original, bytes_sent))

    def release(self) -> None:
        for name, original in self._originals.items():
            setattr(dist.ProcessGroup, name, original)

    def _watched(self, original: Callable[..., Any], bytes_sent: Callable[..., float]) -> Callable[..., Any]:
        def run(group: Any, *inputs: Any, **options: Any) -> Any:
            self.sent += bytes_sent(group.rank(), group.size(), *inputs)
            start = time.perf_counter()
            work = original(group, *inputs, **options)
            # Waited for here, so that its time is known; on a CPU nothing is computed meanwhile.
            work.wait()
            self.seconds.append(time.perf_counter() - start)
            return work

        return run

    def clear(self) -> None:
        self.sent, self.seconds = 0.0, []


def _bytes(tensors: Any) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(_bytes(tensor) for tensor in tensors)


def _all_reduce(rank: int, n: int, tensors: Any, *_: Any) -> float:
    return 2 * (n - 1) / n * _bytes(tensors)


def _gather(rank: int, n: int, outputs: Any, *_: Any) -> float:
    return (n - 1) / n * _bytes(outputs)


def _reduce_scatter(rank: int, n: int, outputs: Any, inputs: Any, *_: Any) -> float:
    return (n - 1) / n * _bytes(inputs)


def _all_to_all(
    rank: int, n: int, out: Tensor, rows: Tensor, _: list[int], splits: list[int], *__: Any
) -> float:
    if not rows.numel():
        return 0.0
    own = splits[rank] / rows.shape[0] if splits else 1 / n
    return (1 - own) * _bytes(rows)


def _reduce(rank: int, n: int, tensors: Any, *_: Any) -> float:
    return (n - 1) / n * _bytes(tensors)


def _nothing(*_: Any) -> float:
    return 0.0


# Method (older and newer torch) -> bytes that this rank sends.
SENT: dict[str, Callable[..., float]] = {
    "allreduce": _all_reduce,
    "allgather": _gather,
    "_allgather_base": _gather,
    "all_gather_single": _gather,
    "reduce_scatter": _reduce_scatter,
    "_reduce_scatter_base": _reduce_scatter,
    "reduce_scatter_single": _reduce_scatter,
    "alltoall_base": _all_to_all,
    "all_to_all_single": _all_to_all,
    "reduce": _reduce,
    "broadcast": _reduce,
    "barrier": _nothing,
}


@dataclass
class Measured:
    """Of one rank: per step the bytes counted and on the wire, and the seconds; of each collective too."""

    counted: float
    on_wire: float
    seconds: float
    collectives: list[float]


def own_network() -> bool:
    """Puts this process into a network namespace of its own, with a loopback interface."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_net, new_user = 0x40000000, 0x10000000
    if libc.unshare(new_net) and libc.unshare(new_user | new_net):
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags_of_lo = struct.pack("16sh14x", b"lo", 1)  # IFF_UP
        fcntl.ioctl(control, 0x8914, flags_of_lo)  # SIOCSIFFLAGS
    return True


def loopback_bytes() -> int:
    with open("/proc/self/net/dev") as file:
        fields = next(line for line in file if line.strip().startswith("lo:")).split(":")[1].split()
    return int(fields[8])


def random_samples(recipe: Recipe, number: int) -> list[Sample]:
    """Pairs with the masks of every stream, the same on every rank."""
    rng = np.random.default_rng(0)
    model = recipe.model
    special_V = np.arange(model.vocab_size) < 5
    samples = []
    for index in range(number):
        pixels = rng.integers(0, 256, (3, model.image_size, model.image_size), dtype=np.uint8)
        tokens = rng.integers(5, model.vocab_size, TEXT_LENGTH)
        sample = Sample(str(index), 0, index, index, image_CHW=pixels, tokens_N=tokens)
        for stream in recipe.stages[0].streams:
            side = model.image_size // model.patch_size
            image = ImageMasking(side, stream.image_ratio, "random")
            text = TextMasking(stream.text_ratio, "token", 0.8, 0.1, 3, special_V, ~special_V)
            masking = {"masked_image": image, "masked_text": text, "masked_pair": PairMasking(image, text)}
            sample.masks[stream.name] = masking[stream.objective](sample, rng)
        samples.append(sample)
    return samples


def ds_tree(zero_stage: int) -> dict[str, Any]:
    return json.loads((DS_CONFIGS / f"zero{zero_stage}_fp32.json").read_text())


def measure(recipe: Recipe, zero_stage: int, steps: int, collectives: Collectives) -> Measured:
    """On this rank, together with all others."""
    topology = Topology.from_environment().arranged(recipe.parallel, recipe.model).connected()
    stage = recipe.stages[0]
    config, plan = resolve_ds_config(
        ds_tree(zero_stage), recipe, stage, topology.data, cuda=False, where=f"zero{zero_stage}_fp32.json"
    )
    engine = Engine(build_stage(recipe, stage, None, topology), recipe.optimizer, config, topology)
    source = stage.streams[0].source
    share, micro = plan.share[source], plan.micro_batch[source]
    samples = random_samples(recipe, share * topology.data)[topology.data_rank * share :][:share]
    cut = [collate(samples[i : i + micro]) for i in range(0, share, micro)]
    passes = [(stream.name, batch) for batch in cut for stream in stage.streams]
    one_step(engine, passes)
    seconds = []
    dist.barrier()
    collectives.clear()
    before = loopback_bytes()
    for _ in range(steps):
        start = time.perf_counter()
        one_step(engine, passes)
        seconds.append(time.perf_counter() - start)
    sent, each = collectives.sent / steps, collectives.seconds
    dist.barrier()
    on_wire = (loopback_bytes() - before) / steps / topology.world_size
    engine.close()
    return Measured(sent, on_wire, statistics.mean(seconds), [second / steps for second in each])


def one_step(engine: Engine, passes: list[tuple[str, Batch]]) -> None:
    for number, (stream, batch) in enumerate(passes):
        units = engine.module.objectives[stream].units(batch)
        loss, _ = engine.forward(stream, batch, units, 1.0)
        engine.backward(loss, last=number == len(passes) - 1)
    engine.step(1e-4)


def rank_of(
    rank: int, port: int, recipes: list[tuple[Recipe, int]], steps: int, connection: Connection
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    collectives = Collectives()
    collectives.watch()
    for recipe, zero_stage in recipes:
        connection.send(measure(recipe, zero_stage, steps, collectives))
    Topology.leave()


def predicted(recipe: Recipe, zero_stage: int) -> tuple[float, float]:
    """(least, formula): bytes of a rank and step. Raises UserError where a run would be refused."""
    stage, parallel = recipe.stages[0], recipe.parallel
    check_degrees(parallel, recipe.model, PROCESSES)
    layout = Layout(
        gpus=PROCESSES,
        tensor=parallel.tensor,
        sequence=parallel.sequence and parallel.tensor > 1,
        expert=parallel.expert,
        zero_stage=zero_stage,
        precision="fp32",
        checkpointing=recipe.training.activation_checkpointing,
    )
    plan = plan_step(ds_tree(zero_stage), recipe, stage, layout.data, "")
    layout = replace(layout, micro_batch=plan.micro_batch[stage.streams[0].source])
    found = transfers(
        recipe.model,
        layout,
        ModelWeights(recipe, stage).count(layout),
        passes_of(layout, recipe, stage, TEXT_LENGTH),
    )
    return sum(t.least for t in found), sum(t.sent for t in found)


HEADER = """\
| layout | least MB | formula | counted | on wire | step ms | computing | moving | waiting |
|---|---:|---:|---:|---:|---:|---:|---:|---:|"""


def row(name: str, least: float, formula: float, ranks: list[Measured], private: bool) -> str:
    counted = statistics.mean(rank.counted for rank in ranks)
    wire = f"{ranks[0].on_wire / 1e6:.2f}" if private else "-"
    step = statistics.mean(rank.seconds for rank in ranks)
    inside = statistics.mean(sum(rank.collectives) for rank in ranks)
    moving = sum(map(min, zip(*(rank.collectives for rank in ranks), strict=True)))
    times = [step, step - inside, moving, inside - moving]
    cells = [f"{value / 1e6:.2f}" for value in (least, formula, counted)] + [wire]
    return f"| {name} | " + " | ".join([*cells, *(f"{1e3 * value:.0f}" for value in times)]) + " |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.measure_traffic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipe", default="eve_tiny")
    parser.add_argument("--batch", type=int, default=32, help="samples of a step over all processes")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", help="layouts whose name holds this")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    try:
        return run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    for name in ("batch", "steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1")
    base = [*options.overrides, "training.micro_batch_size=null"]
    depth = load_recipe(options.recipe, base).model.depth
    recipes, names = [], []
    for name, zero_stage, more in LAYOUTS:
        if options.only is None or options.only in name:
            overrides = [*base, *(text.format(last=depth - 1) for text in more)]
            recipe = load_recipe(options.recipe, overrides)
            sources = {
                key: source.model_copy(update={"batch_size": options.batch})
                for key, source in recipe.data.sources.items()
            }
            data = recipe.data.model_copy(update={"sources": sources})
            recipes.append((recipe.model_copy(update={"data": data}), zero_stage))
            names.append(name)
    if not names:
        raise UserError(f"--only is '{options.only}', expected a part of one of {[x[0] for x in LAYOUTS]}")
    expected = [predicted(*recipe) for recipe in recipes]
    private = own_network()
    # Nobody resolves names in a namespace of its own, and torch says so for each connection.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(PROCESSES)]
    processes = [
        context.Process(target=rank_of, args=(rank, port, recipes, options.steps, pipes[rank][1]))
        for rank in range(PROCESSES)
    ]
    for process, (_, there) in zip(processes, pipes, strict=True):
        process.start()
        there.close()
    print(
        f"{options.recipe}, {options.batch} samples a step, {PROCESSES} processes, {os.cpu_count()} cores\n"
    )
    print(HEADER)
    try:
        for name, (least, formula) in zip(names, expected, strict=True):
            print(row(name, least, formula, [here.recv() for here, _ in pipes], private), flush=True)
    except EOFError:
        print("error: a process ended before its time; what it said is above", file=sys.stderr)
        return 1
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
