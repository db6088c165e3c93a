"""A bank of experts: two-layer feed-forwards with weights stacked (E, D, F).

Rows come sorted by expert, so each layer is one grouped matrix product. Two things that
torch.nn.functional.grouped_mm leaves to us are written out here: the bias of a row's expert, and its
gradient without atomics. Shape suffixes: N row, E expert, D width, F hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ExpertBank(nn.Module):
    def __init__(self, num_experts: int, width: int, hidden: int, activation: str):
        super().__init__()
        self.num_experts = num_experts
        self.w1_EDF = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.b1_EF = nn.Parameter(torch.empty(num_experts, hidden))
        self.w2_EFD = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.b2_ED = nn.Parameter(torch.empty(num_experts, width))
        # Biases, although their shape says matrix.
        self.b1_EF.no_weight_decay = self.b2_ED.no_weight_decay = True  # pyright: ignore
        self.activation = ACTIVATIONS[activation]

    def forward(self, x_ND: Tensor, offsets_E: Tensor) -> Tensor:
        """(N, D) -> (N, D); rows past the last offset are undefined."""
        h_NF = self.activation(grouped_linear(x_ND, self.w1_EDF, self.b1_EF, offsets_E))
        return grouped_linear(h_NF, self.w2_EFD, self.output_bias(), offsets_E)

    def output_bias(self) -> Tensor:
        """What is added to the second product."""
        return self.b2_ED


class _QuickGelu(torch.autograd.Function):
    """x * sigmoid(1.702 x) = silu(1.702 x) / 1.702, so its gradient is silu'(1.702 x): one kernel each."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        scaled = x * 1.702
        ctx.save_for_backward(scaled)
        return F.silu(scaled).div_(1.702)

    @staticmethod
    def backward(ctx, grad: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        (scaled,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad, scaled)


def quick_gelu(x: Tensor) -> Tensor:
    return _QuickGelu.apply(x)  # pyright: ignore


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def grouped_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, offsets_E: Tensor) -> Tensor:
    """Row n of expert e -> x_n @ weight_e + bias_e; `offsets_E` int32 holds the end of each expert."""
    if weight_EIO.shape[0] == 1:
        return F.linear(x_NI, weight_EIO[0].t(), bias_EO[0])
    return _grouped_linear(x_NI, weight_EIO, bias_EO, offsets_E)


# Registered as operators, so that torch.compile takes them as they are: its own shape rule of
# grouped_mm refuses fp32, and the loops over experts on a CPU depend on data.
@torch.library.custom_op("eve::grouped_linear", mutates_args=())
def _grouped_linear(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, offsets_E: Tensor) -> Tensor:
    return _add_bias(F.grouped_mm(x_NI, weight_EIO, offs=offsets_E), bias_EO, offsets_E)


@_grouped_linear.register_fake
def _(x_NI: Tensor, weight_EIO: Tensor, bias_EO: Tensor, offsets_E: Tensor) -> Tensor:
    return x_NI.new_empty(x_NI.shape[0], weight_EIO.shape[2])


@torch.library.custom_op("eve::grouped_linear_backward", mutates_args=())
def _grouped_linear_backward(
    grad_NO: Tensor, x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    grad_NO = grad_NO.contiguous()
    grad_x_NI = F.grouped_mm(grad_NO, weight_EIO.transpose(-2, -1), offs=offsets_E)
    grad_weight_EIO = F.grouped_mm(x_NI.t(), grad_NO, offs=offsets_E)
    return grad_x_NI, grad_weight_EIO, _sum_groups(grad_NO, offsets_E)


@_grouped_linear_backward.register_fake
def _(grad_NO: Tensor, x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    grad_bias_EO = grad_NO.new_empty(weight_EIO.shape[0], weight_EIO.shape[2])
    return torch.empty_like(x_NI), torch.empty_like(weight_EIO), grad_bias_EO


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x_NI, weight_EIO, _, offsets_E = inputs
    ctx.save_for_backward(x_NI, weight_EIO, offsets_E)


def _backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
    return *_grouped_linear_backward(grad_NO, *ctx.saved_tensors), None


_grouped_linear.register_autograd(_backward, setup_context=_save)


def _add_bias(y_NO: Tensor, bias_EO: Tensor, offsets_E: Tensor) -> Tensor:
    if y_NO.is_cuda:
        return y_NO + bias_EO[_expert_of_row(offsets_E, y_NO.shape[0])]
    begin = 0
    for expert, end in enumerate(offsets_E.tolist()):
        y_NO[begin:end] += bias_EO[expert]
        begin = end
    return y_NO


def _sum_groups(grad_NO: Tensor, offsets_E: Tensor) -> Tensor:
    """(N, O) -> (E, O), in a fixed order: on a GPU as a product with the one-hot of the experts."""
    num_experts = offsets_E.shape[0]
    if grad_NO.is_cuda:
        expert_N = _expert_of_row(offsets_E, grad_NO.shape[0])
        computed_N = torch.arange(grad_NO.shape[0], device=grad_NO.device) < offsets_E[-1]
        one_hot_NE = F.one_hot(expert_N, num_experts) * computed_N[:, None]
        return one_hot_NE.t().to(grad_NO.dtype) @ grad_NO.where(computed_N[:, None], 0)
    ends = offsets_E.tolist()
    return torch.stack([grad_NO[begin:end].sum(0) for begin, end in zip([0, *ends[:-1]], ends, strict=True)])


def _expert_of_row(offsets_E: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=offsets_E.device, dtype=offsets_E.dtype)
    return torch.bucketize(rows, offsets_E, right=True).clamp_max(offsets_E.shape[0] - 1)
