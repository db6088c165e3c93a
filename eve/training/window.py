"""Sums of what is logged, kept on the device between two log lines.

The sums of an unfinished window are part of a checkpoint: a resumed run writes the same lines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eve.moe.plan import LOSSES, RouterStats
from eve.objectives import ObjectiveOutput
from eve.parallel.topology import Topology

ROUTER_FIELDS = ("counts_ME", "dropped_M", "tokens_M", "entropy", *LOSSES)


class Window:
    """Named sums of tensors of any shape, in float64, without a host synchronisation until `fetch`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor | float) -> None:
        if isinstance(value, Tensor):
            value = value.detach().to(self.device, torch.float64)
        else:
            # Filled on the device: a copy from the host would wait for all work before it.
            value = torch.full((), value, dtype=torch.float64, device=self.device)
        known = self._sums.get(name)
        self._sums[name] = value.clone() if known is None else known + value

    def add_share(self, name: str, part: float, whole: float) -> None:
        """Logged as `name`: the sum of the parts over that of the wholes."""
        both = [torch.full((), value, dtype=torch.float64, device=self.device) for value in (part, whole)]
        self.add(f"metric/{name}", torch.stack(both))

    def add_output(self, stream: str, output: ObjectiveOutput) -> None:
        for name, (total, count) in output.metrics.items():
            self.add(f"metric/{name}/{stream}", torch.stack([total.double(), count.double()]))
        for stats in output.router_stats:
            for name in ROUTER_FIELDS:
                self.add(f"router/{stats.layer}/{stream}/{name}", getattr(stats, name))
            self.add(f"router/{stats.layer}/{stream}/calls", 1.0)

    def fetch(self, topology: Topology) -> dict[str, Tensor]:
        """Sums over data-parallel ranks, on the CPU; starts a new window. All ranks have the same names."""
        names = sorted(self._sums)
        if not names:
            return {}
        flat = torch.cat([self._sums[name].reshape(-1) for name in names])
        flat = topology.all_reduce_sum(flat if topology.is_counted else torch.zeros_like(flat)).cpu()
        parts = flat.split([self._sums[name].numel() for name in names])
        sums = {name: part.reshape(self._sums[name].shape) for name, part in zip(names, parts, strict=True)}
        self._sums = {}
        return sums

    def state(self, topology: Topology) -> list[dict[str, Any]]:
        """What every data-parallel rank holds, for `load`. All ranks call it."""
        held = topology.gather_objects({name: value.tolist() for name, value in self._sums.items()})
        return held[:: topology.tensor]

    def load(self, states: list[dict[str, Any]], topology: Topology) -> None:
        """With as many data-parallel ranks as before each gets its own, otherwise the first gets the sum."""
        self._sums = {}
        same = len(states) == topology.data
        for rank, sums in enumerate(states):
            mine = rank == topology.data_rank if same else topology.data_rank == 0
            for name, value in sums.items():
                tensor = torch.tensor(value, dtype=torch.float64)
                self.add(name, tensor if mine else torch.zeros_like(tensor))


def means(sums: dict[str, Tensor]) -> dict[str, float]:
    """The metrics of the objectives: `NAME/STREAM`."""
    return {
        name.removeprefix("metric/"): float(value[0] / value[1].clamp(min=1))
        for name, value in sums.items()
        if name.startswith("metric/")
    }


def router_stats(sums: dict[str, Tensor]) -> dict[str, list[RouterStats]]:
    """By stream, one for each layer: sums over the window, but the losses, which are means over the calls."""
    calls = [name.split("/")[1:3] for name in sums if name.startswith("router/") and name.endswith("/calls")]
    stats: dict[str, list[RouterStats]] = {}
    for layer, stream in sorted((int(layer), stream) for layer, stream in calls):
        prefix = f"router/{layer}/{stream}"
        fields = {name: sums[f"{prefix}/{name}"] for name in ROUTER_FIELDS}
        for name in LOSSES:
            fields[name] = fields[name] / sums[f"{prefix}/calls"]
        for name in ("counts_ME", "dropped_M", "tokens_M"):
            fields[name] = fields[name].long()
        stats.setdefault(stream, []).append(RouterStats(layer=layer, **fields))
    return stats
