"""What a run says: console line, `metrics.jsonl`, TensorBoard. Only rank 0 writes.

A line of `metrics.jsonl` is one JSON object: `step`, the results of that step under their own names,
and everything that the machine has a say in under `time/...`. Two runs of the same recipe on the
same topology agree in every byte once the `time/` keys are taken out; floats are written in full
(`repr`), a value that is not finite as null.

Names the console knows (others are written all the same):
    metrics  `loss/STREAM`, `lr`, `grad_norm`
    timing   `pairs_per_second`, `tokens_per_second`, `step_seconds`, `data_seconds`, `tflops`, `mfu`,
             `memory_gib`

Shape suffixes: M modality (0 image, 1 text), E expert, H height, W width, C colour.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from eve.config import Recipe
from eve.errors import UserError
from eve.moe.plan import LOSSES, RouterStats
from eve.parallel.topology import Topology

if TYPE_CHECKING:
    from eve.training.pictures import Picture

MODALITIES = ("image", "text")


class Monitor:
    """Writes the metrics of a run under `run_dir`; on every rank but 0 it does nothing.

    `start_step` is the number of steps already made: TensorBoard hides the events that an
    interrupted run wrote after it. The file `metrics.jsonl` is appended to. All ranks call everything
    but `close`, and raise UserError together where rank 0 cannot write.
    """

    def __init__(
        self,
        run_dir: Path | str,
        recipe: Recipe,
        topology: Topology,
        *,
        start_step: int = 0,
        console: TextIO | None = None,
    ) -> None:
        self.topology = topology
        self.active = topology.rank == 0
        self.run_dir = Path(run_dir)
        model = recipe.model
        # Experts of each pool of the learned routers, by layer.
        self._pools = {
            block: ff.pools
            for block in range(model.depth)
            if (ff := model.feed_forward_of(block)).router == "topk"
        }
        self.total_steps = sum(stage.steps for stage in recipe.stages)
        self._console = console or sys.stdout
        self._samples = self.run_dir / "samples"
        self.tensorboard_dir = self.run_dir / "tensorboard"
        self._pace = _Pace(start_step)
        self._on_rank_0(lambda: self._open(start_step))

    def _open(self, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._samples.mkdir(parents=True, exist_ok=True)
        self._file = open(self.run_dir / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._events = SummaryWriter(
            str(self.tensorboard_dir), purge_step=start_step + 1 if start_step else None
        )

    def log(self, step: int, metrics: Mapping[str, float], timing: Mapping[str, float]) -> None:
        """One line on the console and in `metrics.jsonl`, and a scalar each in TensorBoard.

        step: optimizer steps made so far. metrics: what the recipe and the seed decide. timing: what
        the machine decides, without the prefix `time/`.
        """
        record = {**metrics, **{f"time/{name}": value for name, value in timing.items()}}
        self._on_rank_0(lambda: self._write(step, record))
        if self.active:
            eta = self._pace.eta(step, self.total_steps)
            line = console_line(step, self.total_steps, metrics, timing, eta)
            print(line, file=self._console, flush=True)

    def log_router(self, step: int, stats: Mapping[str, Sequence[RouterStats]]) -> None:
        """Entropy, drops and losses of each router as metrics, the load of its experts as a heat map; `stats`
        by stream."""

        def write() -> None:
            calls = [call for stream in stats.values() for call in stream]
            picture = load_heat_map(calls, self._pools)
            self._events.add_image("router/expert_load", picture, step, dataformats="HWC")
            self._write(step, router_metrics(stats, self._pools))

        if stats:
            self._on_rank_0(write)

    def log_images(self, step: int, pictures: Sequence[Picture]) -> None:
        """Each picture as `samples/step-XXXXXXXX.png` (the name of its source added to all but the first),
        its image and its text in TensorBoard."""

        def write() -> None:
            for number, picture in enumerate(pictures):
                suffix = f"-{picture.name}" if number else ""
                Image.fromarray(picture.image_HWC).save(self._samples / f"step-{step:08d}{suffix}.png")
                self._events.add_image(f"samples/{picture.name}", picture.image_HWC, step, dataformats="HWC")
                if picture.text:
                    self._events.add_text(f"samples/{picture.name}", picture.text, step)
            self._events.flush()

        self._on_rank_0(write)

    def close(self) -> None:
        if self.active:
            # All that was written has been flushed: what fails here has failed, and was told, before.
            with suppress(OSError):
                self._file.close()
            with suppress(OSError):
                self._events.close()

    def _on_rank_0(self, write: Callable[[], None]) -> None:
        def told() -> None:
            try:
                write()
            except OSError as error:
                raise UserError(f"cannot write to {self.run_dir}: {error.strerror}") from None

        self.topology.on_rank_0(told)

    def _write(self, step: int, record: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()


class _Pace:
    """Remaining time from the seconds per step, smoothed over the last few logs."""

    def __init__(self, step: int) -> None:
        self.step, self.clock, self.seconds_per_step = step, time.perf_counter(), math.nan

    def eta(self, step: int, total_steps: int) -> float:
        now = time.perf_counter()
        if step > self.step:
            latest = (now - self.clock) / (step - self.step)
            # The first stretch holds compilation and the start of the workers: it counts only until the next.
            old = self.seconds_per_step
            self.seconds_per_step = latest if math.isnan(old) else 0.7 * old + 0.3 * latest
            self.step, self.clock = step, now
        return self.seconds_per_step * (total_steps - step)


def console_line(
    step: int, total_steps: int, metrics: Mapping[str, float], timing: Mapping[str, float], eta: float
) -> str:
    """`step 40/2,000 2% | masked_image 0.91 ... | lr 4.0e-04 grad 1.2 | 88 pairs/s ... | ETA 5:40`."""
    parts = [f"step {step:>{len(f'{total_steps:,}')},}/{total_steps:,} {100 * step // total_steps:>3}%"]
    # `loss/STREAM`, or `PART_loss/STREAM` of a stream with several.
    losses = {
        " ".join([stream, part.removesuffix("_loss")] if part != "loss" else [stream]): value
        for name, value in metrics.items()
        for part, _, stream in [name.partition("/")]
        if part == "loss" or part.endswith("_loss")
    }
    if losses:
        parts.append(" ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    optimizer = []
    if "lr" in metrics:
        optimizer.append(f"lr {metrics['lr']:.2e}")
    if "grad_norm" in metrics:
        optimizer.append(f"grad {metrics['grad_norm']:.3g}")
    speed = []
    if "pairs_per_second" in timing:
        speed.append(f"{timing['pairs_per_second']:.1f} pairs/s")
    if "tokens_per_second" in timing:
        speed.append(f"{timing['tokens_per_second']:,.0f} tokens/s")
    if "tflops" in timing:
        speed.append(f"{timing['tflops']:.3g} TFLOP/s")
    if "mfu" in timing:
        speed.append(f"MFU {100 * timing['mfu']:.1f}%")
    machine = []
    if "data_seconds" in timing and timing.get("step_seconds"):
        machine.append(f"data {100 * timing['data_seconds'] / timing['step_seconds']:.1f}%")
    if "memory_gib" in timing:
        machine.append(f"mem {timing['memory_gib']:.1f} GiB")
    parts += [" ".join(group) for group in (optimizer, speed, machine) if group]
    parts.append(f"ETA {clock(eta)}")
    return " | ".join(parts)


def clock(seconds: float) -> str:
    """`5:07`, `1:02:03`; `-:--` where not known."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def memory_gib(device: torch.device | str) -> float:
    """Peak memory in GiB: allocated on a CUDA device, resident in this process on a CPU."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # bytes there, KiB on Linux


def router_metrics(
    stats: Mapping[str, Sequence[RouterStats]], pools: Mapping[int, tuple[int, ...]]
) -> dict[str, float]:
    """For each layer, over all its calls: entropy per token in nats, auxiliary losses (means over the
    streams), and by modality the largest load of an expert over the mean one of its pool (1 is even, E is
    collapse) and the share of dropped choices, in all and in each stream."""
    metrics: dict[str, float] = {}
    everything = [call for calls in stats.values() for call in calls]
    for layer, calls in sorted(_by_layer(everything).items()):
        name = f"router/layer_{layer:02d}"
        tokens = sum(int(call.tokens_M.sum()) for call in calls)
        metrics[f"{name}/entropy"] = sum(float(call.entropy) for call in calls) / max(tokens, 1)
        for loss in LOSSES:
            metrics[f"{name}/{loss}"] = sum(float(getattr(call, loss)) for call in calls) / len(calls)
        for kind, choices_E, dropped in _loads(calls, pools[layer]):
            choices = choices_E.sum()
            metrics[f"{name}/dropped_{kind}"] = dropped / choices
            metrics[f"{name}/max_load_{kind}"] = float(choices_E.max() * len(choices_E) / choices)
        for stream, all_layers in stats.items() if len(stats) > 1 else ():
            here = [call for call in all_layers if call.layer == layer]
            for kind, choices_E, dropped in _loads(here, pools[layer]) if here else ():
                metrics[f"{name}/dropped_{kind}/{stream}"] = dropped / choices_E.sum()
    return metrics


def load_heat_map(stats: Sequence[RouterStats], pools: Mapping[int, tuple[int, ...]]) -> np.ndarray:
    """uint8 (H, W, C): a row for each layer and modality, a column for each expert.

    The number and the colour are the expert's share of the choices over the even share 1 / E: white is
    even, blue idle, red twice the even share and more.
    """
    rows: list[tuple[str, np.ndarray]] = []
    for layer, calls in sorted(_by_layer(stats).items()):
        for kind, choices_E, _ in _loads(calls, pools[layer]):
            rows.append((f"layer {layer} {kind}", choices_E * len(choices_E) / choices_E.sum()))
    cell, margin = 28, 100
    num_experts = max((len(load_E) for _, load_E in rows), default=0)
    picture = Image.new("RGB", (margin + cell * num_experts, cell * (len(rows) + 1)), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
    for expert in range(num_experts):
        draw.text((margin + expert * cell + 8, 8), str(expert), fill="black", font=font)
    for number, (label, load_E) in enumerate(rows, start=1):
        top = number * cell
        draw.text((4, top + 8), label, fill="black", font=font)
        for expert, load in enumerate(load_E):
            left = margin + expert * cell
            draw.rectangle((left, top, left + cell - 2, top + cell - 2), fill=_load_colour(float(load)))
            draw.text((left + 3, top + 8), f"{load:.1f}", fill="black", font=font)
    return np.asarray(picture)


def _load_colour(load: float) -> tuple[int, int, int]:
    """White at 1, through to blue at 0 and red at 2."""
    distance = min(abs(load - 1.0), 1.0)
    pale = round(255 - 175 * distance)
    return (255, pale, pale) if load > 1 else (pale, pale, 255)


def _by_layer(stats: Sequence[RouterStats]) -> dict[int, list[RouterStats]]:
    layers: dict[int, list[RouterStats]] = {}
    for call in stats:
        layers.setdefault(call.layer, []).append(call)
    return layers


def _loads(calls: Sequence[RouterStats], pools: tuple[int, ...]) -> list[tuple[str, np.ndarray, float]]:
    """Of each modality that was routed, over the calls of a layer: (its name, choices (E,) of the experts of
    its pool, dropped choices)."""
    counts_ME = torch.stack([call.counts_ME for call in calls]).sum(0).cpu().numpy()
    dropped_M = torch.stack([call.dropped_M for call in calls]).sum(0).tolist()
    loads = []
    for modality, choices_E in enumerate(counts_ME):
        if len(pools) > 1:
            choices_E = np.split(choices_E, [pools[0]])[modality]
        if choices_E.sum():
            loads.append((MODALITIES[modality], choices_E, float(dropped_M[modality])))
    return loads
