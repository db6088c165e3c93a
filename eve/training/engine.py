"""The DeepSpeed engine behind the few calls that the loop makes.

A step is several forward and backward passes (micro-batches x streams) and one update:

    loss, output = engine.forward(stream, batch, units, aux_weight)
    engine.backward(loss * weight, last=...)     # ... for each pass
    engine.step(learning_rate)

Gradients are reduced over the ranks once, with the last backward; only ZeRO stage 2 reduces them with
each, as it keeps no whole gradient. The loss of a pass is already divided by what the whole step counts,
so DeepSpeed's own division by `gradient_accumulation_steps` is switched off.
"""

from __future__ import annotations

import io
import math
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eve.config import Optimizer
from eve.data.batch import Batch
from eve.model import VisionLanguageModel
from eve.objectives import Objective, ObjectiveOutput, PretrainModule
from eve.parallel.deepspeed import import_deepspeed
from eve.parallel.sharding import canonical
from eve.parallel.tensor import partial_gradients, partial_parameters, total_norm
from eve.parallel.topology import Topology
from eve.parallel.weights import WeightParts
from eve.training.ds_config import offloads, precision, zero_stage
from eve.training.optimizer import build_optimizer

# Beside DeepSpeed's files of a checkpoint: the fp32 weights that do not learn, whole.
FROZEN = "frozen.pt"


class EngineModule(PretrainModule):
    """PretrainModule on the ranks of a layout.

    DeepSpeed hooks into the backward of tensors it finds in a tuple, and finds none in a dataclass.
    """

    def __init__(
        self, model: VisionLanguageModel, objectives: dict[str, Objective], topology: Topology
    ) -> None:
        super().__init__(model, objectives)
        self.topology = topology
        self.partial: list[tuple[nn.Module, str]] = []
        if topology.tensor > 1:
            self.partial = partial_parameters(model, topology)

    def forward(
        self, stream: str, batch: Batch, units: Tensor, aux_weight: float = 1.0
    ) -> tuple[Tensor, ObjectiveOutput]:
        summed = (
            partial_gradients(self.partial, self.topology.tensor_group) if self.partial else nullcontext()
        )
        with summed:
            output = super().forward(stream, batch, units, aux_weight)
        return output.loss, output


class Engine:
    """`config` is a resolved configuration of ds_config.py; `module` is on the CPU or on the device."""

    def __init__(
        self, module: EngineModule, optimizer: Optimizer, config: dict[str, Any], topology: Topology
    ) -> None:
        deepspeed = import_deepspeed()
        topology.join()
        self.zero_stage = zero_stage(config)
        self.module = module
        self._offloads = offloads(config)
        self._coalesces = self.zero_stage == 3 or (self.zero_stage == 2 and self._offloads)
        self._coalescing: Any = None
        self._topology = topology
        self._parts = WeightParts(module.model.config, topology)
        self._parts.mark_cut(module.model)
        clips = self.zero_stage == 0
        self._parameters = {canonical(name): tensor for name, tensor in module.model.named_parameters()}
        learning = {name: tensor for name, tensor in self._parameters.items() if tensor.requires_grad}
        self._shapes = {name: tensor.shape for name, tensor in self._parameters.items()}
        rounds = precision(config) != "fp32"
        start = {
            name: tensor.detach().to("cpu", copy=True)
            for name, tensor in self._parameters.items()
            if rounds or name not in learning
        }
        # Mixed precision rounds what does not learn and keeps no fp32 weights of it; stage 3 cuts it up.
        self._frozen = {name: tensor for name, tensor in start.items() if name not in learning}
        module.to(topology.device)
        # DeepSpeed takes degrees and groups from it where there is one, and keeps that of the last engine.
        mpu = topology if topology.tensor > 1 else None
        deepspeed.utils.groups.mpu = mpu
        norm = partial(total_norm, topology=topology) if clips else None
        with redirect_stdout(io.StringIO()):  # it prints memory, group by group
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, optimizer, norm=norm),
                # Stage 0 has no wrapper that clips in one pass: there the optimizer does.
                config={**config, "gradient_clipping": 0.0} if clips else config,
                dist_init_required=False,
                mpu=mpu,
            )
        assert self._engine.has_moe_layers == (topology.expert > 1)
        if rounds:
            # Its fp32 weights were made from the rounded ones.
            for name, parameter in learning.items():
                value = start[name].to(topology.device)
                deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        if self.zero_stage == 3:
            # Its hooks gather a module's own parameters for the backward when they see tensors among its
            # outputs, and the encoder returns a dataclass. What is not in leaves is small: the root keeps it.
            for parent in module.model.modules():
                if any(True for _ in parent.children()):
                    for parameter in parent.parameters(recurse=False):
                        deepspeed.zero.register_external_parameter(module, parameter)
        module.train()

    def forward(
        self, stream: str, batch: Batch, units: Tensor, aux_weight: float
    ) -> tuple[Tensor, ObjectiveOutput]:
        """See PretrainModule.forward."""
        return self._engine(stream, batch, units, aux_weight)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        if self._coalesces and self._coalescing is None:
            # Reducing with each backward, stage 3 adds the gradient of a parameter that the first pass does
            # not use to that of the step before (0.19.8). So does stage 2 where it offloads, and it loses
            # that of a parameter that the last pass does not use.
            self._coalescing = self._engine.coalesce_grad_reduction()
            self._coalescing.__enter__()
        self._engine.set_gradient_accumulation_boundary(last)
        # A tensor of its own: hooks of what `forward` returned would divide by the number of passes again.
        self._engine.backward(loss * 1.0, scale_wrt_gas=False)
        if last and self._coalescing is not None:
            self._coalescing.__exit__(None, None, None)
            self._coalescing = None
            self._engine.set_gradient_accumulation_boundary(True)

    def step(self, learning_rate: float) -> bool:
        """Updates the parameters; False where the gradient was not finite and nothing was changed.

        The norm is read on the host, the one synchronisation of a step but for those of spread experts.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        applied = self._engine.was_step_applied()
        if self._offloads and self.zero_stage < 3 and not applied:
            # Those of a skipped step stay where they are summed in fp32, and the next are added (0.19.8).
            self._engine.optimizer.averaged_gradients.clear()
        return applied

    @property
    def gradient_norm(self) -> float:
        """Of the last step, before clipping, over all parameters; inf or nan where it was skipped."""
        norm = self._engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def save(self, directory: Path, tag: str) -> None:
        """Writes this rank's files below `directory/tag`. All ranks call it."""
        self._engine.save_checkpoint(str(directory), tag=tag, save_latest=False)
        frozen = self._parts.gather(self._frozen)
        if self._topology.rank == 0:
            torch.save(frozen, directory / tag / FROZEN)

    def load(self, directory: Path, tag: str) -> None:
        self._engine.load_checkpoint(str(directory), tag=tag)
        frozen = torch.load(directory / tag / FROZEN, weights_only=True)
        self._frozen = {name: self._parts.held(name, whole) for name, whole in frozen.items()}

    def held_weights(self) -> dict[str, Tensor]:
        """This process's part of the weights, fp32 on the CPU, by names of one device. All ranks call it."""
        full = import_deepspeed().utils.safe_get_full_fp32_param
        weights = {}
        for name, tensor in self._parameters.items():
            if name in self._frozen:
                weights[name] = self._frozen[name]
            else:
                value = full(tensor) if self.zero_stage > 0 else tensor.detach()
                weights[name] = value.to("cpu", torch.float32, copy=True)
            assert weights[name].shape == self._shapes[name], name
        return weights

    def weights(self) -> dict[str, Tensor]:
        """The whole weights in fp32 on the CPU, on rank 0; all ranks call it, the others get an empty one."""
        return self._parts.gather(self.held_weights())

    def close(self) -> None:
        self._engine.destroy()
