"""Predicted seconds of a step: computing, memory traffic of the optimizer, communication that nothing hides.

A pass takes the longer of its operations at an assumed utilisation and of the launches of its kernels: a
small micro-batch leaves a big GPU waiting for its host. Communication is awaited (ZeRO 1 reduces after the
last backward, tensor and expert collectives are in the way of what follows), but for a part of the gradients
of ZeRO 2 and 3, which are reduced beside the backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from eve.config import Model
from eve.errors import UserError
from eve.planning.layout import Layout, Pass, num_backwards
from eve.planning.traffic import Transfer
from eve.planning.weights import Weights
from eve.training.flops import blocks_flops, forward_flops, peak_flops


@dataclass(frozen=True)
class Gpu:
    """`memory` bytes that PyTorch can have. Bytes a second: `hbm` of its memory, `link` to the other GPUs of
    the host in one direction (NVLink), `network` of its own share of the host's adapters."""

    name: str
    memory: float
    hbm: float
    link: float
    network: float

    @property
    def peak(self) -> float:
        peak = peak_flops(self.name)
        assert peak is not None
        return peak


_GIB = 2**30
# Data sheets: NVLink 3 (A100), 4 (H100, H200), 5 (B200); DGX with one 200 or 400 Gbit/s adapter for each GPU.
GPUS = {
    "a100-40": Gpu("A100", 39.4 * _GIB, 1.56e12, 300e9, 25e9),
    "a100-80": Gpu("A100", 79.1 * _GIB, 2.04e12, 300e9, 25e9),
    "h100": Gpu("H100", 79.1 * _GIB, 3.35e12, 450e9, 50e9),
    "h200": Gpu("H200", 139.7 * _GIB, 4.8e12, 450e9, 50e9),
    "b200": Gpu("B200", 178.3 * _GIB, 8.0e12, 900e9, 50e9),
}


def gpu_named(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"--gpu is '{name}', expected one of {', '.join(GPUS)}")
    return GPUS[name]


@dataclass(frozen=True)
class Assumptions:
    """What a prediction rests on beside the data sheets.

    Attributes:
        mfu: share of the bf16 peak that matrix products of a large pass reach.
        launch: seconds between two kernels where the host is the bottleneck. kernels: of one block, forward.
        efficiency: share of a link's bandwidth that a collective reaches.
        latency: seconds of a small collective inside a host. network_latency: over hosts.
        overlap: share of the gradients of ZeRO 2 and 3 that is reduced beside the backward.
        text_length: mean tokens of a text, [CLS] and [SEP] included.
    """

    mfu: float = 0.35
    launch: float = 5e-6
    kernels: int = 45
    efficiency: float = 0.75
    latency: float = 15e-6
    network_latency: float = 40e-6
    overlap: float = 0.5
    text_length: float = 16.0

    def describe(self) -> str:
        return (
            f"{self.mfu:.0%} of the bf16 peak in a large pass, at least {self.kernels} kernels of "
            f"{1e6 * self.launch:.0f} us for a block forward and twice that backward, {self.efficiency:.0%} "
            f"of a link's bandwidth, {1e6 * self.latency:.0f} us a collective of two inside a host and "
            f"{1e6 * self.network_latency:.0f} us over hosts, for each doubling of ranks; "
            f"{self.overlap:.0%} of the gradients of ZeRO 2 and 3 reduced beside the backward; "
            f"texts of {self.text_length:g} tokens, experts equally "
            "used, data never late"
        )


@dataclass(frozen=True)
class StepTime:
    """Seconds; operations of one rank. `communication` is what is not hidden, `hardware_flops` has the
    recomputation of checkpointed blocks."""

    computing: float
    optimizer: float
    communication: float
    model_flops: float
    hardware_flops: float

    @property
    def total(self) -> float:
        return self.computing + self.optimizer + self.communication


def pass_flops(model: Model, layout: Layout, one: Pass) -> tuple[float, float]:
    """(model, hardware) operations of one pass, forward and backward, of a whole tensor group."""
    parts = forward_flops(
        model,
        num_samples=one.samples,
        num_visible=one.num_visible,
        text_lengths=[one.text_length] * one.samples,
        num_masked_patches=one.num_masked_patches,
        num_masked_words=one.num_masked_words,
        mask_tokens=one.mask_tokens,
        num_masked_codes=one.num_masked_codes,
    )
    if one.both_paths:
        lengths = [one.num_tokens // one.samples] * one.samples
        parts["blocks"] += blocks_flops(model, lengths, range(model.first_fusion, model.depth))
    forward = sum(parts.values())
    return 3 * forward, 3 * forward + (parts["blocks"] if layout.checkpointing else 0)


def seconds_of(transfer: Transfer, gpu: Gpu, given: Assumptions) -> float:
    """Links inside and between hosts work at the same time in a pipeline; the slower one counts."""
    crosses = transfer.between_hosts > 0
    moving = max(transfer.inside_host / gpu.link, transfer.between_hosts / gpu.network) / given.efficiency
    latency = given.network_latency if crosses else given.latency
    return moving + transfer.count * latency * math.log2(len(transfer.ranks))


def step_time(
    model: Model,
    layout: Layout,
    weights: Weights,
    passes: list[Pass],
    found: list[Transfer],
    gpu: Gpu,
    given: Assumptions,
) -> StepTime:
    computing = total_model = total_hardware = 0.0
    for one in passes:
        model_flops, hardware_flops = pass_flops(model, layout, one)
        blocks = len(one.blocks(model)) * (4 if layout.checkpointing else 3)
        if one.num_masked_patches and model.decoder:
            blocks += 3 * model.decoder.depth
        launches = blocks * given.kernels * given.launch
        rank_flops = hardware_flops / layout.tensor
        computing += one.times * max(rank_flops / (gpu.peak * given.mfu), launches)
        total_model += one.times * model_flops / layout.tensor
        total_hardware += one.times * rank_flops
    num_passes = num_backwards(passes)
    # A gradient is read and added to the accumulated one (10 bytes a number and backward), copied to a bucket
    # and scaled (16), and the optimizer reads and writes weight, moments and gradient of its part (30).
    parts = weights.dense / len(layout.data_group) + weights.experts / len(layout.copies_of_an_expert)
    if layout.zero_stage == 0:
        parts = weights.learning
    moved = (10 * num_passes + 16) * weights.learning + 30 * parts
    communication = 0.0
    for transfer in found:
        seconds = seconds_of(transfer, gpu, given)
        if layout.zero_stage >= 2 and transfer.what == "gradients":
            # The backward is two thirds of the computing.
            seconds -= min(given.overlap * seconds, 2 / 3 * computing)
        communication += seconds
    return StepTime(computing, moved / gpu.hbm, communication, total_model, total_hardware)
