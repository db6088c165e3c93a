"""The feed-forward of experts beside its peers: gelu, biases, rows in the order of their experts.

Once over rows that lie there, and once over tokens: dispatch and feed-forward, or a first product that reads
tokens by index.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.benchmark.case import Case, logits
from kernels.benchmark.peer import Call, Peer, module, on_gpu
from kernels.dispatch import dispatch
from kernels.expert_feed_forward import expert_feed_forward
from kernels.routing import Routing, route


@dataclass(frozen=True)
class Bank:
    case: Case
    x_ND: Tensor
    w1_EDF: Tensor
    b1_EF: Tensor
    w2_EFD: Tensor
    b2_ED: Tensor
    offsets_E: Tensor

    def leaves(self) -> dict[str, Tensor]:
        return {
            "x": self.x_ND, "w1": self.w1_EDF, "b1": self.b1_EF, "w2": self.w2_EFD, "b2": self.b2_ED,
        }  # fmt: skip


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Bank:
    group_T = torch.zeros(case.tokens, dtype=torch.int64, device=device)
    routing = route(logits(case, device), case.choices, group_T=group_T, num_groups=1)
    e, d, f = case.experts, case.width, case.hidden
    generator = torch.Generator(device).manual_seed(2)

    def leaf(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, device=device)
        return (values * scale).to(dtype).requires_grad_()

    return Bank(
        case, leaf(case.rows, d), leaf(e, d, f, scale=d**-0.5), leaf(e, f), leaf(e, f, d, scale=f**-0.5),
        leaf(e, d), routing.offsets_E,
    )  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    bank: Bank
    x_TD: Tensor
    routing: Routing

    def leaves(self) -> dict[str, Tensor]:
        return {**self.bank.leaves(), "x": self.x_TD}

    @property
    def offsets_E(self) -> Tensor:
        return self.routing.offsets_E


def tokens(case: Case, device: torch.device, dtype: torch.dtype) -> Tokens:
    group_T = torch.zeros(case.tokens, dtype=torch.int64, device=device)
    routing = route(logits(case, device), case.choices, group_T=group_T, num_groups=1)
    generator = torch.Generator(device).manual_seed(5)
    x_TD = torch.randn(case.tokens, case.width, generator=generator, device=device)
    return Tokens(inputs(case, device, dtype), x_TD.to(dtype).requires_grad_(), routing)


def call(given: Bank | Tokens, function: Callable[..., Tensor]) -> Call:
    """Of a function of (x, w1, b1, w2, b2, offsets)."""
    leaves = given.leaves()
    return Call(
        lambda: function(*leaves.values(), given.offsets_E), leaves, lambda y_ND: {"rows": y_ND}
    )  # fmt: skip


def ours(given: Bank) -> Call:
    return call(given, expert_feed_forward)


def our_products(given: Bank) -> Call:
    on_gpu(given.x_ND)
    return call(given, lambda *tensors: expert_feed_forward(*tensors, products="triton"))


def our_megablocks(given: Bank) -> Call:
    module("grouped_gemm")
    on_gpu(given.x_ND)
    return call(given, lambda *tensors: expert_feed_forward(*tensors, products="megablocks"))


def with_products(product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The feed-forward by somebody's grouped product of (rows, weights, ends).

    Biases are a product with the one-hot of the experts: indexing would sum their gradients in bf16, which
    stands still at some hundreds.
    """

    def function(x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED, offsets_E) -> Tensor:
        row_N = torch.arange(x_ND.shape[0], device=x_ND.device)
        expert_N = torch.searchsorted(offsets_E, row_N, right=True)
        one_hot_NE = F.one_hot(expert_N, offsets_E.shape[0]).to(x_ND.dtype)
        h_NF = F.gelu(product(x_ND, w1_EDF, offsets_E) + one_hot_NE @ b1_EF)
        return product(h_NF, w2_EFD, offsets_E) + one_hot_NE @ b2_ED

    return function


def torch_product(x_NI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    return F.grouped_mm(x_NI, weight_EIO, offs=offsets_E)


def torch_grouped(given: Bank) -> Call:
    return call(given, with_products(torch_product))


def torch_compiled(given: Bank) -> Call:
    return call(given, torch.compile(with_products(torch_product), dynamic=False))


def one_by_one(given: Bank) -> Call:
    """Expert after expert; the host waits for the numbers of rows."""

    def function(x_ND, w1_EDF, b1_EF, w2_EFD, b2_ED, offsets_E) -> Tensor:
        ends = offsets_E.tolist()
        parts = x_ND.split([end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)])
        return torch.cat(
            [
                torch.addmm(b2_ED[e], F.gelu(torch.addmm(b1_EF[e], x, w1_EDF[e])), w2_EFD[e])
                for e, x in enumerate(parts)
            ]
        )

    return call(given, function)


def dense(given: Bank) -> Call:
    """All rows through the first expert: the same operations as one feed-forward, which nobody routes."""
    leaves = {
        name: leaf if name == "x" else leaf[0].detach().requires_grad_()
        for name, leaf in given.leaves().items()
    }
    x_ND, w1_DF, b1_F, w2_FD, b2_D = leaves.values()
    return Call(lambda: torch.addmm(b2_D, F.gelu(torch.addmm(b1_F, x_ND, w1_DF)), w2_FD), leaves)


def deepspeed_products(given: Bank) -> Call:
    product = module("deepspeed", "deepspeed.ops.triton_ops.group_gemm_triton").group_gemm_triton
    on_gpu(given.x_ND)
    return call(given, with_products(product))


def megablocks_products(given: Bank) -> Call:
    """MegaBlocks' grouped path multiplies by the package grouped_gemm, which wants the sizes on the host; the
    rest of megablocks is not needed for that."""
    product: Any = module("grouped_gemm").ops.gmm
    on_gpu(given.x_ND)
    sizes_E = given.offsets_E.diff(prepend=given.offsets_E.new_zeros(1)).long().cpu()
    return call(given, with_products(lambda rows, weight, ends: product(rows, weight, sizes_E)))


# --------------------------------------------------------------------------------------------- over tokens


def dispatched(given: Tokens, products: str = "auto") -> Call:
    plan = given.routing

    def function(x_TD: Tensor, *others: Any) -> Tensor:
        x_ND = dispatch(x_TD, plan.row_token_N, plan.token_row_TK)
        return expert_feed_forward(x_ND, *others, products=products)

    return call(given, function)


def gathered(given: Tokens, products: str = "auto") -> Call:
    plan = given.routing
    places = {"row_token_N": plan.row_token_N, "token_row_TK": plan.token_row_TK}
    return call(given, lambda *tensors: expert_feed_forward(*tensors, products=products, **places))


def dispatched_to_triton(given: Tokens) -> Call:
    on_gpu(given.x_TD)
    return dispatched(given, "triton")


def gathered_by_triton(given: Tokens) -> Call:
    """Here alone nothing is copied: other products are given rows (kernels/grouped_linear.py)."""
    on_gpu(given.x_TD)
    return gathered(given, "triton")


def torch_selected(x_TD: Tensor, row_token_N: Tensor, *others: Tensor) -> Tensor:
    return with_products(torch_product)(x_TD.index_select(0, row_token_N), *others)


def selected(given: Tokens) -> Call:
    return call(given, lambda x_TD, *others: torch_selected(x_TD, given.routing.row_token_N, *others))


def selected_compiled(given: Tokens) -> Call:
    function = torch.compile(torch_selected, dynamic=False)
    return call(given, lambda x_TD, *others: function(x_TD, given.routing.row_token_N, *others))


DISPATCH_FEED_FORWARD = (
    Peer("ours", dispatched),
    Peer("ours, gathered by the product", gathered),
    Peer("ours, Triton products", dispatched_to_triton),
    Peer("ours, gathered by Triton products", gathered_by_triton),
    Peer("torch index_select, grouped_mm", selected),
    Peer("torch index_select, grouped_mm, compiled", selected_compiled, compiles=True),
)
EXPERT_FEED_FORWARD = (
    Peer("ours", ours),
    Peer("ours, Triton products", our_products),
    Peer("ours, MegaBlocks products", our_megablocks),
    Peer("one dense feed-forward", dense),
    Peer("torch grouped_mm", torch_grouped),
    Peer("torch grouped_mm, compiled", torch_compiled, compiles=True),
    Peer("torch, expert after expert", one_by_one),
    Peer("DeepSpeed Triton products", deepspeed_products),
    Peer("MegaBlocks grouped products", megablocks_products),
)
