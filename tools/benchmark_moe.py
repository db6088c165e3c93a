"""What a mixture-of-experts layer costs beside its grouped products alone.

    python tools/benchmark_moe.py [--rounds 9] [--tokens 4096] [--experts 8] [--k 2] [--capacity-factor 0]

A layer is router, dispatch, bank of experts and combine, forward and backward, auxiliary loss included. Its
products alone are the six grouped products of that (forward two, backward four) by torch's grouped_mm, over
the same rows. Both take turns, and so do the parts of the layer, each with its backward.

On a CPU fp32, one thread, and the CPU time of the process, so that other programs disturb little; on a GPU
bf16 and the time until it is done.

Shape suffixes: T token, N row, E expert, D width, F hidden width.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from eve.config import FeedForward
from eve.errors import UserError
from eve.moe.dispatch import LocalDispatcher
from eve.moe.experts import ExpertBank
from eve.moe.hard_experts import Expert
from eve.moe.layer import RoutedFeedForward
from eve.packing import TokenLayout
from eve.tokens import WholeTokens

SHAPES = ((256, 1024), (768, 3072))
LENGTH = 64  # tokens of an image and of a text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/benchmark_moe.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 128")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--capacity-factor", type=float, default=0.0)
    options = parser.parse_args(argv)
    try:
        check(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    print(
        f"{device}, E {options.experts}, k {options.k}, {options.tokens} tokens, {options.rounds} rounds, "
        "forward and backward; least time of all rounds"
    )
    for width, hidden in SHAPES:
        report(width, hidden, runs_of(width, hidden, options, device), options.rounds)
    return 0


def check(options: argparse.Namespace) -> None:
    """Raises UserError."""
    for name in ("rounds", "experts", "k"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} is {getattr(options, name)}, expected at least 1")
    if options.k > options.experts:
        raise UserError(f"--k is {options.k}, expected at most the {options.experts} experts")
    if options.tokens < 1 or options.tokens % (2 * LENGTH):
        raise UserError(f"--tokens is {options.tokens}, expected a multiple of {2 * LENGTH}")
    if not 0 <= options.capacity_factor < float("inf"):
        raise UserError(f"--capacity-factor is {options.capacity_factor:g}, expected 0 or more")


def report(width: int, hidden: int, runs: dict[str, Callable[[], object]], rounds: int) -> None:
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
    products = min(times["products"])
    print(f"\nwidths {width} / {hidden}")
    for name, mine in times.items():
        print(f"  {name:<20} {min(mine) * 1e3:9.2f} ms {min(mine) / products:8.1%} of the products")
    pairs = [layer / alone - 1 for layer, alone in zip(times["layer"], times["products"], strict=True)]
    print(
        f"  overhead of the layer: {min(times['layer']) / products - 1:.1%} by least times, by round median "
        f"{statistics.median(pairs):.1%} ({', '.join(f'{pair:.1%}' for pair in sorted(pairs))})"
    )


def seconds(run: Callable[[], object]) -> float:
    if not torch.cuda.is_available():
        begin = time.process_time()
        run()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def runs_of(
    width: int, hidden: int, options: argparse.Namespace, device: str
) -> dict[str, Callable[[], object]]:
    """products, layer, and the parts of the layer."""
    torch.manual_seed(0)
    how = {"device": device, "dtype": torch.bfloat16 if device == "cuda" else torch.float32}
    config = FeedForward(
        blocks=(0,),
        router="topk",
        num_experts=options.experts,
        k=options.k,
        capacity_factor=options.capacity_factor,
    )
    layer = RoutedFeedForward(
        width,
        hidden,
        config,
        layer=0,
        activation="gelu",
        experts=ExpertBank,
        expert=Expert,
        dispatcher=LocalDispatcher(),
        tokens=WholeTokens(),
    ).to(**how)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    samples = options.tokens // (2 * LENGTH)
    layout = TokenLayout.build([LENGTH] * samples, [LENGTH] * samples, torch.device(device))
    num_rows = layout.num_tokens * options.k
    x_TD, grad_TD = (torch.randn(layout.num_tokens, width, **how) for _ in range(2))
    x_ND, grad_ND = (torch.randn(num_rows, width, **how) for _ in range(2))
    h_NF, grad_NF = (torch.randn(num_rows, hidden, **how) for _ in range(2))
    bank, router = layer.experts, layer.router
    assert isinstance(bank, ExpertBank)
    assert router is not None
    plan = layer(x_TD, layout)[1].plan
    w1_EDF, w2_EFD = bank.w1_EDF.detach(), bank.w2_EFD.detach()
    weight_TK, offs = plan.weight_TK.detach(), plan.offsets_E
    one = torch.ones((), device=device)

    def products() -> None:
        F.grouped_mm(x_ND, w1_EDF, offs=offs)
        F.grouped_mm(h_NF, w2_EFD, offs=offs)
        F.grouped_mm(grad_ND, w2_EFD.transpose(1, 2), offs=offs)
        F.grouped_mm(h_NF.t(), grad_ND, offs=offs)
        F.grouped_mm(grad_NF, w1_EDF.transpose(1, 2), offs=offs)
        F.grouped_mm(x_ND.t(), grad_NF, offs=offs)

    def whole() -> None:
        layer.zero_grad()
        y_TD, output = layer(x_TD.detach().requires_grad_(), layout)
        torch.autograd.backward([y_TD, output.aux_loss], [grad_TD, one])

    def route() -> None:
        router.zero_grad()
        output = router(x_TD.detach().requires_grad_(), layout.held, layout)
        torch.autograd.backward([output.plan.weight_TK, output.aux_loss], [weight_TK, one])

    def dispatch() -> None:
        layer.dispatcher.dispatch(x_TD.detach().requires_grad_(), plan).backward(grad_ND)

    def feed_forward() -> None:
        bank.zero_grad()
        bank(x_ND.detach().requires_grad_(), offs).backward(grad_ND)

    def combine() -> None:
        weighted = replace(plan, weight_TK=weight_TK.detach().requires_grad_())
        layer.dispatcher.combine(x_ND.detach().requires_grad_(), weighted).backward(grad_TD)

    return {
        "products": products,
        "layer": whole,
        "  router": route,
        "  dispatch": dispatch,
        "  bank of experts": feed_forward,
        "  combine": combine,
    }


if __name__ == "__main__":
    raise SystemExit(main())
