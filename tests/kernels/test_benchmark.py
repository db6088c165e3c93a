"""kernels.benchmark: what it counts, that it compares before it times, that one failure is one row.

Runs real peers at small sizes on a CPU. Numbers are checked against plain counts in Python.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels.benchmark import rows as row_peers
from kernels.benchmark.__main__ import BY_NAME, main, measure
from kernels.benchmark.case import OPERATIONS, Case, cases, logits
from kernels.benchmark.cost import Cost, Roofline, costs
from kernels.benchmark.losses import Words
from kernels.benchmark.measure import Row, Step, compare, peak_bytes, run_case
from kernels.benchmark.peer import Call, Peer, Unavailable
from kernels.benchmark.report import Machine, case_table, shares
from tests.kernels.rows import placed

CPU = torch.device("cpu")
TINY = Case("dispatch", 60, width=32, choices=2, experts=8, words=90, image=32, patch=8)


# ----------------------------------------------------------------------------------------------- the formulas


def test_bytes_of_dispatch_and_combine_are_those_of_a_walk_over_the_rows() -> None:
    """Each number that a loop over tokens and choices touches counts once."""
    tokens, experts, choices, width, itemsize = 7, 3, 2, 5, 2
    _, token_row_TK, _ = placed(tokens, experts, choices)
    touched: dict[str, Counter] = {
        "dispatch": Counter(),
        "combine": Counter(),
        "gradients of combine": Counter(),
    }
    for t in range(tokens):
        for k in range(choices):
            row = int(token_row_TK[t, k])
            for walk in touched.values():
                walk["index", t, k] = 8
            touched["combine"]["weight", t, k] = 4
            touched["gradients of combine"]["weight", t, k] = 4
            touched["gradients of combine"]["weight gradient", t, k] = 4
            for d in range(width):
                touched["dispatch"]["token", t, d] = touched["dispatch"]["row", row, d] = itemsize
                touched["combine"]["row", row, d] = touched["combine"]["out", t, d] = itemsize
                for what in ("row", "row gradient"):
                    touched["gradients of combine"][what, row, d] = itemsize
                touched["gradients of combine"]["token gradient", t, d] = itemsize
    case = Case("dispatch", tokens, width, choices, experts)
    assert costs(case, itemsize) == (Cost(touched["dispatch"].total()),) * 2
    combine = replace(case, operation="combine")
    assert costs(combine, itemsize) == (
        Cost(touched["combine"].total()),
        Cost(touched["gradients of combine"].total()),
    )
    # The residual is read once more; its gradient is that of the result, which nobody copies.
    residual = tokens * width * itemsize
    assert costs(replace(case, operation="combine_residual"), itemsize) == (
        Cost(touched["combine"].total() + residual),
        Cost(touched["gradients of combine"].total()),
    )


@pytest.mark.parametrize(
    "operation", ["expert_feed_forward", "dispatch_feed_forward", "masked_text_loss", "masked_pixel_loss"]
)
def test_bytes_are_those_of_the_tensors_that_come_and_go(operation: str) -> None:
    """Inputs and the result forward; inputs, gradients of all leaves and the result's backward."""
    case = replace(TINY, operation=operation)
    inputs = BY_NAME[operation].inputs(case, CPU, torch.float32)
    call = BY_NAME[operation].peers[0].make(inputs)

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    leaves = size(*call.leaves.values())
    forward, backward = costs(case, 4)
    if operation.endswith("feed_forward"):
        rows, hidden = 60 * 2, 128
        result, kept = rows * 32 * 4, rows * hidden * 4
        biases = 8 * (hidden + 32) * 4
        index = rows * 8 * operation.startswith("dispatch")
        assert forward.bytes == leaves + result + kept + index
        # Biases are not read again.
        assert backward.bytes == (leaves - biases) + leaves + result + kept + index
    elif operation == "masked_text_loss":
        target, loss = size(inputs.target_K), 60 * 4
        assert forward.bytes == leaves + target + loss
        assert backward.bytes == 2 * leaves + target + loss
    else:
        masked, pixels = 12, 3 * 8 * 8  # three of four of 16 patches
        read = size(inputs.masked_BM) + 60 * masked * pixels
        assert inputs.masked_BM.shape == (60, masked)
        assert forward.bytes == leaves + read + 60 * masked * 4
        assert backward.bytes == 2 * leaves + read + 60 * masked * 4


def test_operations_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for operation, peer in (
        ("expert_feed_forward", "torch, expert after expert"),
        ("masked_text_loss", "torch cross_entropy"),
    ):
        case = replace(TINY, operation=operation)
        inputs = BY_NAME[operation].inputs(case, CPU, torch.float32)
        step = Step(next(p for p in BY_NAME[operation].peers if p.name == peer).make(inputs))
        with FlopCounterMode(display=False) as counted:
            results = step.call.forward()
        forward = counted.get_total_flops()
        with FlopCounterMode(display=False) as counted:
            step.backward(results)
        assert [cost.flops for cost in costs(case, 4)] == [forward, counted.get_total_flops()]


def test_a_roofline_is_the_slower_of_memory_and_products() -> None:
    peak = Roofline(bandwidth=100.0, flops=1000.0)
    assert peak.seconds(Cost(200, 100)) == 2.0
    assert peak.seconds(Cost(200, 3000)) == 3.0


# ---------------------------------------------------------------------------------------------- the inputs


def test_skews_are_what_they_are_called() -> None:
    def shares_of_first(skew: str) -> torch.Tensor:
        case = Case("routing", 20_000, experts=8, choices=2, skew=skew)
        return torch.bincount(logits(case, CPU).argmax(1), minlength=8) / 20_000

    assert torch.allclose(shares_of_first("uniform"), torch.full((8,), 1 / 8), atol=0.01)
    zipf = torch.tensor([1 / rank for rank in range(1, 9)])
    assert torch.allclose(shares_of_first("zipf"), zipf / zipf.sum(), atol=0.01)
    assert shares_of_first("one expert").tolist() == [1.0] + [0.0] * 7


def test_the_full_grid_holds_every_combination_once() -> None:
    grid = cases(["dispatch"], "full", cuda=True)
    assert len(set(grid)) == len(grid) == 8 * 2 * 2 * 3 * 3
    assert {case.tokens for case in grid} == {1024 * 2**n for n in range(8)}
    for sizes, cuda in (("quick", True), ("quick", False), ("full", True)):
        found = cases(OPERATIONS, sizes, cuda)
        assert len(set(found)) == len(found)
        # The first of each operation before the second of any.
        assert [case.operation for case in found[: len(OPERATIONS)]] == list(OPERATIONS)


# ------------------------------------------------------------------------------------- equality before time


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("choices", [1, 2])
def test_all_peers_that_run_on_a_cpu_compute_the_same(operation: str, choices: int) -> None:
    pytest.importorskip("deepspeed")
    if choices == 1 and operation.startswith("masked"):
        pytest.skip("has no choices")
    found = measure(replace(TINY, operation=operation, choices=choices), CPU, torch.float32, 1)
    ran = {row.peer for row in found if row.reason is None}
    assert {row.reason for row in found if row.peer not in ran} <= {
        "not installed",
        "runs on a GPU only",
        "not compiled at this size",
    }
    expected = {
        "routing": {"ours", "torch", "DeepSpeed native", "DeepSpeed AutoEP"},
        "dispatch": {"ours", "torch index_select", "DeepSpeed native", "DeepSpeed AutoEP"},
        "combine": {"ours", "torch index_add", "DeepSpeed native", "DeepSpeed AutoEP"},
        "combine_residual": {"ours", "ours, then an addition", "torch index, sum, addition"},
        "dispatch_feed_forward": {
            "ours",
            "ours, gathered by the product",
            "torch index_select, grouped_mm",
        },
        "expert_feed_forward": {"ours", "torch grouped_mm", "torch, expert after expert"},
        "masked_text_loss": {"ours", "ours, vocabulary-parallel, one rank", "torch cross_entropy"},
        "masked_pixel_loss": {"ours", "torch"},
    }
    assert expected[operation] <= ran
    for row in found:
        compared = row.peer in ran - {"ours", "torch.clone, as many bytes", "one dense feed-forward"}
        assert (row.difference is not None) == compared
        assert all(len(row.seconds[part]) == (row.peer in ran) for part in row.seconds)


def dispatch_rows(case: Case) -> row_peers.Rows:
    return row_peers.rows(case, CPU, torch.float32)


def swapped(given: row_peers.Rows) -> Call:
    """Two rows of thousands are exchanged."""
    token_N = given.order_N // given.case.choices
    token_N[[3, -1]] = token_N[[-1, 3]]
    return row_peers.dispatched(lambda: given.x_TD.index_select(0, token_N), given, given.place_TK)


def without_half_of_the_gradient(given: row_peers.Rows) -> Call:
    token_N = given.order_N // given.case.choices
    x_TD = given.x_TD
    return row_peers.dispatched(
        lambda: (x_TD / 2 + x_TD.detach() / 2).index_select(0, token_N), given, given.place_TK
    )


def not_a_number(given: row_peers.Rows) -> Call:
    token_N = given.order_N // given.case.choices
    return row_peers.dispatched(lambda: given.x_TD.index_select(0, token_N) * math.nan, given, given.place_TK)


def too_many_rows(given: row_peers.Rows) -> Call:
    token_N = given.order_N // given.case.choices
    return row_peers.dispatched(
        lambda: given.x_TD.index_select(0, token_N), given, given.place_TK.repeat(2, 1)
    )


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (swapped, "row of each choice is off"),
        (without_half_of_the_gradient, "gradient of x is off"),
        (not_a_number, "row of each choice is off"),
        (too_many_rows, r"is \(4000, 2, 8\), ours \(2000, 2, 8\)"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_peer_that_computes_something_else_is_not_timed(wrong, says: str, dtype: torch.dtype) -> None:
    case = Case("dispatch", 2000, width=8, choices=2, experts=4)
    peers = (row_peers.DISPATCH[0], Peer("wrong", wrong), Peer("right", row_peers.indexed_dispatch))
    ours, bad, good = run_case(case, peers, row_peers.rows(case, CPU, dtype), CPU, dtype, 2)
    assert bad.reason is not None
    assert bad.reason.startswith("WRONG: ")
    assert re.search(says, bad.reason)
    assert not bad.seconds["both"]
    assert ours.reason is good.reason is None
    assert len(good.seconds["both"]) == 2


@pytest.mark.parametrize("operation", ["masked_text_loss", "masked_pixel_loss"])
def test_a_wrong_gradient_of_a_mean_is_seen_however_small_it_is(operation: str) -> None:
    """Each pixel's gradient is one in hundreds of thousands of the loss's; here it is 1 % too large."""
    case = replace(TINY, operation=operation, tokens=200, words=3000)
    given = BY_NAME[operation].inputs(case, CPU, torch.float32)
    ours = BY_NAME[operation].peers[0]

    def wrong(inputs) -> Call:
        call = ours.make(inputs)

        def forward() -> torch.Tensor:
            loss = call.forward()
            return loss + 0.01 * (loss - loss.detach())

        return replace(call, forward=forward)

    _, row = run_case(case, (ours, Peer("wrong", wrong)), given, CPU, torch.float32, 1)
    assert row.reason is not None
    assert row.reason.startswith("WRONG: gradient of ")


def test_the_equality_is_of_the_operation_not_of_an_order_of_rows() -> None:
    """Ours and the index operations place rows differently where K is 2, and that is no difference."""
    given = dispatch_rows(replace(TINY, tokens=300))
    ours, theirs = row_peers.our_dispatch(given), row_peers.indexed_dispatch(given)
    assert not torch.equal(ours.forward(), theirs.forward())
    compare(theirs, ours, Row(given.case, "torch"), torch.float32)


# ---------------------------------------------------------------------------------- rounds, failures, memory


def test_rounds_alternate_and_one_failure_is_one_row() -> None:
    order: list[str] = []

    def counting(name: str, fails_at: int | None = None) -> Peer:
        def make(x: torch.Tensor) -> Call:
            def forward() -> torch.Tensor:
                order.append(name)
                if order.count(name) == fails_at:
                    raise torch.OutOfMemoryError("no memory")
                return 2 * x

            return Call(forward, {"x": x}, lambda y: {"y": y})

        return Peer(name, make)

    def missing(x: torch.Tensor) -> Call:
        raise Unavailable("not installed")

    def broken(x: torch.Tensor) -> Call:
        raise RuntimeError("no kernel image\nlong story")

    peers = (counting("a"), Peer("missing", missing), Peer("broken", broken), counting("b"), counting("c", 2))
    rows = run_case(TINY, peers, torch.ones(3, requires_grad=True), CPU, torch.float32, 4)
    assert [row.reason for row in rows] == [
        None,
        "not installed",
        "fails: RuntimeError: no kernel image",
        None,
        "out of memory",
    ]
    assert [len(row.seconds["forward"]) for row in rows] == [4, 0, 0, 4, 0]
    # In a round: forward of a (with its backward), both of a, the same of b.
    assert order[-16:] == ["a", "a", "b", "b"] * 4


def test_nothing_is_timed_where_ours_fails() -> None:
    def broken(x: torch.Tensor) -> Call:
        raise RuntimeError("broken")

    peers = (Peer("ours", broken), Peer("other", lambda x: Call(lambda: x * 1, {"x": x}, lambda y: {"y": y})))
    rows = run_case(TINY, peers, torch.ones(3, requires_grad=True), CPU, torch.float32, 1)
    assert [row.reason for row in rows] == ["fails: RuntimeError: broken", "nothing to compare with"]


def test_peak_memory_is_that_of_live_tensors() -> None:
    x = torch.ones(1000, 100, requires_grad=True)
    size = x.numel() * 4

    def forward() -> torch.Tensor:
        wide = torch.cat([x, x, x])  # 3, freed with the next line
        return wide.sum() + x.exp().sum()  # exp keeps its result

    peak = peak_bytes(Step(Call(forward, {"x": x})), CPU)
    # The result of exp, its gradient, the gradient of cat (a view of one number), and x's: at least three
    # and at most five times x.
    assert 3 * size <= peak <= 5 * size
    clone = Call(lambda: x.detach().clone(), {}, backward=lambda: None)
    assert peak_bytes(Step(clone), CPU) == size


# ------------------------------------------------------------------------------------------------ the report


def test_table_and_json_say_what_was_measured(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--device", "cpu", "--operations", "masked_pixel_loss", "--eager", "--rounds", "3"]
    assert main([*words, "--out", str(out)]) == 0
    written = json.loads((out / "kernels.json").read_text())
    assert written["machine"]["dtype"] == "torch.float32"
    rows = {row["peer"]: row for row in written["rows"]}
    table = {}
    for line in (out / "kernels.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] in rows:
            table[cells[0]] = cells
    assert table.keys() == rows.keys()
    assert rows["torch, compiled"]["reason"] == table["torch, compiled"][-1] == "not compiled at this size"
    bandwidth = written["machine"]["measured"]["bandwidth"]
    for name in ("ours", "torch", "torch.clone, as many bytes"):
        both = sorted(rows[name]["seconds"]["both"])[1]
        assert float(table[name][3]) == pytest.approx(both * 1e3, abs=6e-4)
        ours = sorted(rows["ours"]["seconds"]["both"])[1]
        assert float(table[name][5]) == pytest.approx(both / ours, abs=6e-3)
        # 4 images, 147 of 196 patches, a float and a byte a pixel, 8 + 4 bytes a patch.
        least = 4 * 147 * (768 * 5 + 12) / bandwidth
        share = least / sorted(rows[name]["seconds"]["forward"])[1]
        assert float(table[name][6].rstrip("%")) == pytest.approx(100 * share, abs=0.6)
    assert (out / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_who_stops_it_finds_the_shapes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = BY_NAME["masked_text_loss"].inputs

    def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> Words:
        if case.tokens == 64:
            raise KeyboardInterrupt
        return words(case, device, dtype)

    operation = replace(BY_NAME["masked_text_loss"], inputs=inputs)
    monkeypatch.setitem(BY_NAME, "masked_text_loss", operation)
    asked = ["--device", "cpu", "--operations", "masked_text_loss", "--eager", "--rounds", "1"]
    with pytest.raises(KeyboardInterrupt):
        main([*asked, "--out", str(tmp_path)])
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["case"]["tokens"] for row in written["rows"]} == {256}
    assert written["rows"][0]["median"]["both"] > 0
    assert written["left_out"] == ["masked_text_loss: 64 rows, V 8000, D 768"]
    assert "**256 rows, V 8000, D 768**" in (tmp_path / "kernels.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"kernels.json", "kernels.md"}


def test_a_loss_of_rows_has_one_gradient_for_all() -> None:
    """By its strides, which is what kernels/chunked_linear.py looks at on a GPU."""
    case = replace(TINY, operation="masked_text_loss")
    given = BY_NAME["masked_text_loss"].inputs(case, CPU, torch.float32)
    for peer in BY_NAME["masked_text_loss"].peers[:2]:
        last = peer.make(given).forward().grad_fn
        assert last is not None
        (inner, _), *_ = last.next_functions
        assert (last.name(), inner.name()) == ("DivBackward0", "SumBackward0")


def test_shares_and_ratios_are_of_the_medians() -> None:
    case = Case("dispatch", 100, width=10, choices=1)  # 100 * 2 * 10 * 4 + 800 = 8,800 bytes each way
    seconds = {"forward": [1.0, 4.0, 2.0], "backward": [4.0] * 3, "both": [5.0, 6.0, 8.0]}
    row = Row(case, "ours", seconds=seconds, host=[0.5], peak_bytes=2_500_000)
    slow = replace_seconds(row, 2)
    machine = Machine("a", "b", "c", "d", torch.float32, Roofline(8800, 1), Roofline(88000, 1))
    assert shares(row, machine)["measured"] == {"forward": 0.5, "backward": 0.25, "both": 2 / 6}
    assert shares(row, machine)["published"]["forward"] == pytest.approx(0.05)
    _, _, first, second = case_table([row, slow], machine)
    assert [cell.strip() for cell in first.split("|")[1:-1]] == [
        "ours", "2000.000", "4000.000", "6000.000", "25%", "1.00", "50%", "25%", "3%", "500.000", "2.5", "",
    ]  # fmt: skip
    assert second.split("|")[6].strip() == "2.00"


def replace_seconds(row: Row, factor: float) -> Row:
    return replace(row, seconds={part: [factor * s for s in row.seconds[part]] for part in row.seconds})


def test_a_time_limit_leaves_the_rest_out_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--device", "cpu", "--operations", "masked_text_loss", "--minutes", "1e-9"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "2 shapes not measured: --minutes 1e-09 had passed" in capsys.readouterr().out
    assert "- masked_text_loss: 64 rows, V 8000, D 768" in (tmp_path / "kernels.md").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "octopus"], "--device octopus"),
        (["--device", "meta"], "--device is 'meta', expected cuda or cpu"),
        (["--device", "cpu", "--rounds", "0"], "--rounds is 0, expected at least 1"),
        (["--device", "cpu", "--minutes", "0"], "--minutes is 0, expected more than 0"),
    ],
)
def test_mistakes_get_one_sentence(
    words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert error.count("\n") == 1
