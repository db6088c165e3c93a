"""Expert parallelism: the experts of a learned router spread over the ranks of an expert group.

    rows sorted by expert -> all-to-all-v -> rows of the experts held here, of all ranks -> grouped products
    -> all-to-all-v back

The bank is a `deepspeed.moe.layer.MoE`, which is how DeepSpeed knows experts: their gradients are reduced
over their copies only, and they are saved one file each. Nothing of its router, dispatch or capacity is used.
Shape suffixes: N row, E expert, R row received, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from eve.moe.experts import ExpertBank
from eve.packing import permute_rows
from eve.parallel.collectives import AllToAll
from eve.parallel.deepspeed import import_deepspeed
from eve.parallel.topology import Topology

import_deepspeed()

from deepspeed.moe.layer import MoE  # noqa: E402
from deepspeed.utils import groups  # noqa: E402


def expert_group(topology: Topology) -> Any:
    """The ranks that share the experts. The first call makes the group; all ranks make it together."""
    name = f"ep_size_{topology.expert}"
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(topology.expert)
    return groups._get_expert_parallel_group(name)


class ExpertParallelBank(MoE):
    """`num_experts / topology.expert` experts of `num_experts`, stacked; called as ExpertBank."""

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        activation: str,
        topology: Topology,
        products: str = "auto",
    ):
        nn.Module.__init__(self)
        self.topology = topology
        # What DeepSpeed reads of an MoE layer.
        self.use_residual = self.enable_expert_tensor_parallelism = False
        self.ep_size = topology.expert
        self.expert_group_name = f"ep_size_{topology.expert}"
        self.num_experts = num_experts
        self.num_local_experts = num_experts // topology.expert
        bank = ExpertBank(self.num_local_experts, width, hidden, activation, products)
        for parameter in bank.parameters():
            parameter.allreduce = False  # pyright: ignore
            parameter.group_name = self.expert_group_name  # pyright: ignore
            # Experts differ over tensor ranks too: each counts in the norm.
            parameter.model_parallel = True  # pyright: ignore
        bank.register_state_dict_post_hook(_one_by_one)
        bank.register_load_state_dict_pre_hook(_stacked)
        # The path of names by which DeepSpeed finds them.
        self.deepspeed_moe = nn.ModuleDict({"experts": nn.ModuleDict({"deepspeed_experts": bank})})
        self._bank = (bank,)  # a tuple, as a module would be registered twice
        self.group: Any = None

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The engine calls it once."""
        assert not use_data_before_expert_parallel_
        self.group = expert_group(self.topology)

    def forward(self, x_ND: Tensor, offsets_E: Tensor) -> Tensor:  # pyright: ignore
        """(N, D) -> (N, D); rows past the last offset are zero."""
        (bank,) = self._bank
        counts_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)).long()
        received_E = torch.empty_like(counts_E)  # of each rank, for each expert held here
        dist.all_to_all_single(received_E, counts_E, group=self.group)
        # The one wait of the host for the device: sizes of what is sent and received.
        sends, receives = torch.stack([counts_E, received_E]).view(2, self.ep_size, -1).sum(-1).tolist()
        num_rows = sum(sends)
        dropped = x_ND.shape[0] - num_rows
        kept_ND = x_ND[:num_rows] if dropped else x_ND
        x_RD: Tensor = AllToAll.apply(kept_ND, sends, receives, self.group)  # pyright: ignore
        expert_E = torch.arange(self.num_local_experts, device=x_ND.device).repeat(self.ep_size)
        expert_R = expert_E.repeat_interleave(received_E, output_size=sum(receives))
        order_R = expert_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
        ends_E = received_E.view(self.ep_size, -1).sum(0).cumsum(0).to(torch.int32)
        y_RD = bank(permute_rows(x_RD, order_R, inverse_R), ends_E)
        y_RD = permute_rows(y_RD, inverse_R, order_R)
        y_ND: Tensor = AllToAll.apply(y_RD, receives, sends, self.group)  # pyright: ignore
        return F.pad(y_ND, (0, 0, 0, dropped)) if dropped else y_ND


def _one_by_one(bank: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name, _ in bank.named_parameters():
        for index, expert in enumerate(state.pop(prefix + name).unbind()):
            state[f"{prefix}{index}.{name}"] = expert


def _stacked(bank: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in bank.named_parameters():
        keys = [f"{prefix}{index}.{name}" for index in range(len(parameter))]
        if all(key in state for key in keys):
            state[prefix + name] = torch.stack([state.pop(key) for key in keys])
