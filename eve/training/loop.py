"""A run from its first step to its export: stages, steps, logging, checkpoints, signals.

The step of a stage is a list of streams (source, objective, weight). One step, on every rank:

    forward and backward of each pass          gradients add up, the last backward reduces them
    next samples                                while the device still works; one small all-reduce
    update                                     nothing changes where the gradient is not finite
    log, pictures, checkpoint, stop            when their step has come
"""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from eve.config import Recipe, Stage
from eve.data.batch import Batch
from eve.data.loader import bad_samples, merge_states
from eve.data.tokenizer import Tokenizer
from eve.errors import UserError
from eve.objectives import ObjectiveOutput
from eve.parallel.topology import Topology
from eve.parallel.weights import WeightParts
from eve.training.checkpoint import CheckpointStore
from eve.training.ds_config import StepPlan, precision, resolve_ds_config, state_format, zero_stage
from eve.training.engine import Engine
from eve.training.export import export_model, stage_exports
from eve.training.feed import StepData, StepFeed
from eve.training.meter import Meter
from eve.training.monitor import Monitor
from eve.training.pictures import draw_batch
from eve.training.schedule import learning_rate
from eve.training.stages import build_stage, stage_at
from eve.training.window import Window, means, router_stats


@dataclass
class TrainState:
    """What state.json of a checkpoint holds: everything of the run that the engine does not keep."""

    step: int = 0
    # Position of every source after `step`, merged over ranks.
    sources: dict[str, Any] = field(default_factory=dict)
    # Sums of the unfinished log window, of each rank.
    window: list[dict[str, Any]] = field(default_factory=list)
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    # Size of metrics.jsonl at this step: a resumed run cuts off what came after.
    metrics_bytes: int = 0
    # The layout that wrote it.
    world_size: int = 1
    tensor: int = 1
    expert: int = 1
    zero_stage: int = 0
    precision: str = "fp32"
    state_format: str = "ZeRO"


class StopRequest:
    """SIGTERM and SIGINT ask the run to save and stop; a later one gets what it would have got.

    One that follows at once is the same: launchers pass on what a terminal has sent to all.
    """

    ECHO_SECONDS = 5

    def __init__(self) -> None:
        self.signal: int | None = None
        self._asked_at = 0.0
        self._former = {
            number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._asked_at = number, time.monotonic()
        elif time.monotonic() - self._asked_at > self.ECHO_SECONDS:
            self.restore()
            os.kill(os.getpid(), number)

    def restore(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)


class Run:
    """One call of `eve.pretrain`; `state` is where it starts, `checkpoint` what it starts from."""

    def __init__(
        self,
        recipe: Recipe,
        ds_tree: dict[str, Any],
        ds_where: str,
        tokenizer: Tokenizer,
        topology: Topology,
        run_dir: Path,
        store: CheckpointStore,
        state: TrainState,
        checkpoint: Path | None,
    ) -> None:
        self.recipe, self.ds_tree, self.ds_where = recipe, ds_tree, ds_where
        self.tokenizer, self.topology, self.run_dir = tokenizer, topology, run_dir
        self.store, self.state, self.checkpoint = store, state, checkpoint
        self.window = Window(topology.device)
        self.window.load(state.window, topology)
        self.monitor = Monitor(run_dir, recipe, topology, start_step=state.step)
        self.stop = StopRequest()
        self._bad_samples = 0
        self._cut_sources: set[str] = set()

    def train(self) -> int:
        """Runs what is left of all stages. Returns the exit code: 0, or 128 + the signal that stopped it."""
        weights: dict[str, Tensor] | None = None
        first, _ = stage_at(self.recipe, self.state.step)
        try:
            for index in range(first, len(self.recipe.stages)):
                weights, finished = self._train_stage(index, weights)
                if not finished:
                    self._say_stopped()
                    return 128 + (self.stop.signal or signal.SIGTERM)
                self._export(index, weights)
            if self.topology.rank == 0:
                print(f"finished: {self.run_dir / 'export'}", flush=True)
            return 0
        finally:
            self.stop.restore()
            self.monitor.close()

    def _say_stopped(self) -> None:
        if self.topology.rank == 0:
            saved = self.store.latest()
            where = f"saved {saved}" if saved else "before any checkpoint"
            print(f"stopped at step {self.state.step}, {where}; go on with --resume", flush=True)

    def _train_stage(self, index: int, previous: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], bool]:
        """(this process's part of the weights at its end, whether it came to its end).

        A checkpoint is saved in either case.
        """
        stage = self.recipe.stages[index]
        first_step = sum(before.steps for before in self.recipe.stages[:index])
        if self.topology.rank == 0:
            name = f"stage {stage.name}, {index + 1} of {len(self.recipe.stages)}"
            print(f"{name}: steps {first_step + 1:,} to {first_step + stage.steps:,}", flush=True)
        config, plan = resolve_ds_config(
            self.ds_tree,
            self.recipe,
            stage,
            self.topology.data,
            cuda=self.topology.device.type == "cuda",
            where=self.ds_where,
        )
        module = build_stage(self.recipe, stage, previous, self.topology)
        engine = Engine(module, self.recipe.optimizer, config, self.topology)
        if self.checkpoint is not None:
            engine.load(self.checkpoint, "engine")
            self.checkpoint = None
        feed = StepFeed(
            self.recipe, stage, plan, self.tokenizer, module.objectives, self.topology, self.state.sources
        )
        try:
            finished = self._steps(stage, plan, first_step, engine, feed)
            weights = engine.held_weights() if finished else {}
        finally:
            feed.close()
        engine.close()
        return weights, finished

    def _steps(self, stage: Stage, plan: StepPlan, first_step: int, engine: Engine, feed: StepFeed) -> bool:
        state, training = self.state, self.recipe.training
        last_step = first_step + stage.steps
        saved_at = state.step
        meter = Meter(self.recipe, self.topology)
        data = current = self._next(feed, state.step - first_step) if state.step < last_step else None
        while data is not None:
            wanted, failed, differing = data.flags.tolist()
            if failed:
                self.topology.raise_together(feed.error)
            if differing:
                raise UserError(
                    f"for step {state.step + 1} the processes of {differing:.0f} of {self.topology.data} "
                    "tensor groups did not read the same samples; compare shards and bad samples of the hosts"
                )
            if wanted:
                break
            current = data
            rate = learning_rate(stage, state.step - first_step)
            outputs = self._passes(engine, plan, current)
            data = self._next(feed, state.step + 1 - first_step) if state.step + 1 < last_step else None
            applied = engine.step(rate)
            state.step += 1
            meter.count(current)

            if applied:
                state.skipped_in_a_row = 0
                self._add(outputs, current, engine.gradient_norm)
            else:
                self._skip(stage, outputs, current)
            last = state.step == last_step
            if last or state.step % training.log_every == 0:
                self._log(rate, meter, current)
            with meter.paused():
                if last or state.step % training.images_every == 0:
                    self._pictures(engine, current)
                if last or state.step % training.checkpoint_every == 0:
                    self._save(engine, current.states)
                    saved_at = state.step
        if current is not None and state.step != saved_at:
            self._save(engine, current.states)
        return state.step == last_step

    def _next(self, feed: StepFeed, step: int) -> StepData:
        return feed.next(step, stop=self.stop.signal is not None)

    def _passes(self, engine: Engine, plan: StepPlan, data: StepData) -> list[ObjectiveOutput]:
        """Forward and backward of every pass of the step."""
        outputs = []
        for number, (stream, batch) in enumerate(data.passes):
            batch = batch.to(self.topology.device)
            loss, output = engine.forward(
                stream.name, batch, data.units[stream.name], 1 / plan.micro_batches(stream.source)
            )
            # A loss that is not finite makes the gradient so, and every rank skips the step.
            finite = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)
            engine.backward(loss * (stream.weight * finite), last=number == len(data.passes) - 1)
            outputs.append(output)
        return outputs

    def _add(self, outputs: list[ObjectiveOutput], data: StepData, norm: float) -> None:
        for (stream, _), output in zip(data.passes, outputs, strict=True):
            self.window.add_output(stream.name, output)
        # The streams of a source read the same texts.
        readers: dict[str, str] = {}
        for stream, batch in data.passes:
            if batch.tokens_N is not None and readers.setdefault(stream.source, stream.name) == stream.name:
                number_cut = sum(sample.is_cut for sample in batch.samples)
                self.window.add_share(f"cut_texts/{stream.source}", number_cut, batch.size)
        # Every rank has the same norm, and the window adds over ranks.
        share = 1 / self.topology.data
        self.window.add("norm/sum", norm * share)
        self.window.add("norm/count", share)

    def _skip(self, stage: Stage, outputs: list[ObjectiveOutput], data: StepData) -> None:
        """Counts a step that was not made; names it, and stops the run after too many in a row."""
        state = self.state
        state.skipped_steps += 1
        state.skipped_in_a_row += 1
        mine = [
            (stream.name, [sample.key for sample in batch.samples])
            for (stream, batch), output in zip(data.passes, outputs, strict=True)
            if self.topology.is_counted and not bool(torch.isfinite(output.loss))
        ]
        found = [entry for entries in self.topology.gather_objects(mine) for entry in entries]
        what = f"step {state.step} of stage {stage.name} is not finite and was skipped"
        if found:
            keys = [key for name, batch_keys in found if name == found[0][0] for key in batch_keys]
            shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
            what = f"{what}: the loss of stream {found[0][0]} on the samples {shown}"
        else:
            keys = [sample.key for sample in data.passes[0][1].samples]
            what = f"{what}: the gradient, on samples from {keys[0]} to {keys[-1]}"
        if self.topology.rank == 0:
            print(what, flush=True)
        limit = self.recipe.training.max_skipped_steps
        if state.skipped_in_a_row > limit:
            raise UserError(
                f"{what}; number {state.skipped_in_a_row} in a row, past training.max_skipped_steps {limit}"
            )

    def _log(self, rate: float, meter: Meter, data: StepData) -> None:
        sums = self.window.fetch(self.topology)
        metrics = means(sums)
        if "norm/sum" in sums:
            metrics["grad_norm"] = float(sums["norm/sum"] / sums["norm/count"])
        metrics["lr"] = rate
        metrics["skipped_steps"] = float(self.state.skipped_steps)
        metrics["bad_samples"] = self._count_bad_samples(data)
        self._tell_cut_texts(metrics)
        self.monitor.log(self.state.step, metrics, meter.read())
        self.monitor.log_router(self.state.step, router_stats(sums))

    def _tell_cut_texts(self, metrics: dict[str, float]) -> None:
        """Once for each source: what is cut is not learned."""
        for name, share in metrics.items():
            kind, _, source = name.partition("/")
            if kind != "cut_texts" or not share or source in self._cut_sources:
                continue
            self._cut_sources.add(source)
            length = self.recipe.data.sources[source].max_text_length or self.recipe.model.max_text_length
            if self.topology.rank == 0:
                print(
                    f"{share:.1%} of the latest texts of source {source} are longer than {length} tokens and "
                    f"were cut; see model.max_text_length and data.sources.{source}.max_text_length",
                    flush=True,
                )

    def _count_bad_samples(self, data: StepData) -> float:
        """Of all ranks since the first step; where there are more than at the last line, some by name."""
        mine = [bad_samples(state) for state in data.states.values() if self.topology.is_counted]
        number = torch.tensor(float(sum(bad.bad for bad in mine)), device=self.topology.device)
        number = int(self.topology.all_reduce_sum(number))
        if number > self._bad_samples:
            everywhere = self.topology.gather_objects([first for bad in mine for first in bad.first])
            named = [f"{key} of {shard} ({reason})" for rank in everywhere for shard, key, reason in rank]
            if self.topology.rank == 0:
                print(f"{number} broken samples were left out so far: {', '.join(named[:8])}", flush=True)
        self._bad_samples = number
        return float(number)

    def _pictures(self, engine: Engine, data: StepData) -> None:
        """Of the first batch of each source, as the step has just seen it; the monitor keeps those of rank 0.
        All ranks run the forward passes: ZeRO stage 3 gathers weights from them."""
        first: dict[str, Batch] = {}
        for stream, batch in data.passes:
            first.setdefault(stream.source, batch)
        pictures = [
            draw_batch(
                engine.module.model,
                engine.module.objectives,
                batch.to(self.topology.device),
                self.tokenizer,
                name=source,
            )
            for source, batch in first.items()
        ]
        self.monitor.log_images(self.state.step, pictures)

    def _save(self, engine: Engine, states: dict[str, Any]) -> None:
        gathered = self.topology.gather_objects(states)[:: self.topology.tensor]
        state = self.state
        # A source that only another stage reads keeps its position.
        state.sources |= {name: merge_states([rank[name] for rank in gathered]) for name in states}
        state.window = self.window.state(self.topology)
        state.world_size = self.topology.world_size
        state.tensor, state.expert = self.topology.tensor, self.topology.expert
        state.zero_stage, state.precision = zero_stage(self.ds_tree), precision(self.ds_tree)
        state.state_format = state_format(self.ds_tree)
        metrics = self.run_dir / "metrics.jsonl"

        def write_shared(directory: Path) -> None:
            with open(metrics, "rb+") as file:
                os.fsync(file.fileno())
            state.metrics_bytes = metrics.stat().st_size
            (directory / "state.json").write_text(json.dumps(state.__dict__))
            (directory / "recipe.yaml").write_text(self.recipe.to_yaml())
            (directory / "tokenizer.model").write_bytes(self.tokenizer.model_bytes)

        self.store.save(state.step, lambda directory: engine.save(directory, "engine"), write_shared)

    def _export(self, index: int, held: dict[str, Tensor]) -> None:
        """The model at the end of a stage, from this process's part of it; after the last as export/ too.

        The checkpoint before it is of the same step and the next one comes after it, so a run that is killed
        meanwhile comes by here again.
        """
        recipe, state = self.recipe, self.state
        directories = []
        if recipe.training.export_stages:
            directories += stage_exports(self.run_dir, recipe)[index : index + 1]
        if index + 1 == len(recipe.stages):
            if state.skipped_steps == state.step:
                raise UserError(
                    f"none of the {state.step} steps was made, as no gradient was finite; "
                    "there is nothing to export"
                )
            directories.append(self.run_dir / "export")
        if not directories:
            return
        weights = WeightParts(recipe.model, self.topology).gather(held)
        about = {"step": state.step, "stage": recipe.stages[index].name, "stage_number": index}

        def write() -> None:
            first, *more = directories
            export_model(first, weights, recipe, self.tokenizer, about)
            for directory in more:
                export_model(directory, weights, recipe, self.tokenizer, about, same_as=first)

        self.topology.on_rank_0(write)
