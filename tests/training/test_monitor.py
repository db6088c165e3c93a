"""The monitor: what was logged can be read back, from the file and from TensorBoard, number for number."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from eve.config import load_recipe
from eve.moe.plan import RouterStats
from eve.parallel.topology import Topology
from eve.training.monitor import Monitor, clock, console_line, load_heat_map, memory_gib, router_metrics
from eve.training.pictures import Picture


def topology(rank: int) -> Topology:
    return Topology(rank, 1, rank, torch.device("cpu"))


def stats_of(layer: int, counts_ME: list[list[int]], dropped_M=(0, 0), entropy=0.0) -> RouterStats:
    counts = torch.tensor(counts_ME)
    return RouterStats(
        layer=layer,
        counts_ME=counts,
        tokens_M=counts.sum(1) // 2,
        entropy=torch.tensor(entropy),
        dropped_M=torch.tensor(dropped_M),
        load_balance=torch.tensor(1.0),
        z_loss=torch.tensor(0.0),
        importance=torch.tensor(0.0),
        load=torch.tensor(0.0),
    )


def events_of(directory) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


@pytest.fixture
def recipe():
    return load_recipe("eve_tiny", ["stages.0.steps=200"])


def test_jsonl_gives_back_every_float_exactly_and_keeps_time_apart(tmp_path, recipe):
    monitor = Monitor(tmp_path, recipe, topology(0), console=io.StringIO())
    loss = 0.1 + 0.2  # 0.30000000000000004: seventeen digits
    monitor.log(10, {"loss/masked_image": loss, "lr": 1e-3}, {"step_seconds": 0.25})
    monitor.log(20, {"loss/masked_image": math.nan, "lr": 2e-3}, {"step_seconds": 0.5})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 10, "loss/masked_image": loss, "lr": 1e-3, "time/step_seconds": 0.25},
        {"step": 20, "loss/masked_image": None, "lr": 2e-3, "time/step_seconds": 0.5},
    ]


def test_tensorboard_events_read_back(tmp_path, recipe):
    monitor = Monitor(tmp_path, recipe, topology(0), console=io.StringIO())
    monitor.log(10, {"loss/masked_image": 0.5}, {"tflops": 2.0})
    monitor.log_router(10, {"a": [stats_of(4, [[3, 1], [2, 2]], entropy=2.0)]})
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    monitor.log_images(10, [Picture("pairs", image, "a *cat*")])
    monitor.close()
    events = events_of(monitor.tensorboard_dir)
    assert events.Scalars("loss/masked_image")[0].value == 0.5
    assert events.Scalars("time/tflops")[0].value == 2.0
    assert events.Scalars("router/layer_04/entropy")[0].value == 0.5  # 2 nats over 4 tokens
    assert b"a *cat*" in events.Tensors("samples/pairs/text_summary")[0].tensor_proto.string_val[0]
    shown = Image.open(io.BytesIO(events.Images("samples/pairs")[0].encoded_image_string))
    saved = Image.open(tmp_path / "samples" / "step-00000010.png")
    assert (np.asarray(shown) == image).all()
    assert (np.asarray(saved) == image).all()
    assert events.Images("router/expert_load")[0].height > 0


def test_a_resumed_run_hides_the_events_after_its_start_and_appends_to_the_file(tmp_path, recipe):
    monitor = Monitor(tmp_path, recipe, topology(0), console=io.StringIO())
    for step in (10, 20, 30):
        monitor.log(step, {"loss/a": float(step)}, {})
    monitor.close()
    resumed = Monitor(tmp_path, recipe, topology(0), start_step=10, console=io.StringIO())
    resumed.log(20, {"loss/a": -1.0}, {})
    resumed.close()
    scalars = events_of(resumed.tensorboard_dir).Scalars("loss/a")
    assert [(event.step, event.value) for event in scalars] == [(10, 10.0), (20, -1.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4


def test_other_ranks_write_nothing(tmp_path, recipe):
    console = io.StringIO()
    monitor = Monitor(tmp_path, recipe, topology(1), console=console)
    monitor.log(1, {"loss/a": 1.0}, {})
    monitor.log_router(1, {"a": [stats_of(0, [[1, 1], [0, 0]])]})
    monitor.log_images(1, [])
    monitor.close()
    assert list(tmp_path.iterdir()) == []
    assert console.getvalue() == ""


def test_router_metrics_by_hand():
    """Two calls of one layer: images choose experts 6 and 2 times, 1 dropped; texts 0 and 4 times."""
    calls = [
        stats_of(5, [[4, 0], [0, 0]], dropped_M=(1, 0), entropy=1.0),
        stats_of(5, [[2, 2], [0, 4]], dropped_M=(0, 0), entropy=2.0),
    ]
    metrics = router_metrics({"images": calls[:1], "pairs": calls[1:]}, {5: (2,)})
    assert metrics["router/layer_05/entropy"] == 3.0 / 6
    assert metrics["router/layer_05/max_load_image"] == 6 * 2 / 8
    assert metrics["router/layer_05/max_load_text"] == 2.0
    assert metrics["router/layer_05/dropped_image"] == 1 / 8
    assert metrics["router/layer_05/dropped_text"] == 0.0
    assert metrics["router/layer_05/dropped_image/images"] == 1 / 4
    assert metrics["router/layer_05/dropped_image/pairs"] == 0.0
    assert "router/layer_05/dropped_text/images" not in metrics


def test_the_load_of_a_pool_is_over_its_own_experts():
    """Two experts of images, three of texts."""
    metrics = router_metrics({"pairs": [stats_of(1, [[3, 1, 0, 0, 0], [0, 0, 1, 1, 4]])]}, {1: (2, 3)})
    assert metrics["router/layer_01/max_load_image"] == 3 * 2 / 4
    assert metrics["router/layer_01/max_load_text"] == 4 * 3 / 6


def test_heat_map_has_a_row_for_each_modality_that_was_routed():
    both = load_heat_map([stats_of(0, [[2, 2], [1, 3]])], {0: (len([[2, 2], [1, 3]][0]),)})
    image_only = load_heat_map([stats_of(0, [[2, 2], [0, 0]])], {0: (len([[2, 2], [0, 0]][0]),)})
    wide = load_heat_map(
        [stats_of(0, [[2, 2, 0, 0], [0, 0, 0, 0]])], {0: (len([[2, 2, 0, 0], [0, 0, 0, 0]][0]),)}
    )
    cell = both.shape[0] - image_only.shape[0]
    assert cell > 0
    assert wide.shape[1] - image_only.shape[1] == 2 * cell
    # The corner of a cell away from its number: white where the load is even, blue at 0, red at 2.
    corner = (2 * cell - 4, -4)
    assert tuple(
        load_heat_map([stats_of(0, [[2, 2], [0, 0]])], {0: (len([[2, 2], [0, 0]][0]),)})[corner]
    ) == (255, 255, 255)
    assert tuple(
        load_heat_map([stats_of(0, [[4, 0], [0, 0]])], {0: (len([[4, 0], [0, 0]][0]),)})[corner]
    ) == (80, 80, 255)
    assert tuple(
        load_heat_map([stats_of(0, [[0, 4], [0, 0]])], {0: (len([[0, 4], [0, 0]][0]),)})[corner]
    ) == (255, 80, 80)


def test_console_line_names_losses_speed_and_remaining_time():
    metrics = {"loss/masked_image": 0.5, "loss/masked_text": 2.0, "contrast_loss/pairs": 3.0}
    metrics |= {"contrast_accuracy/pairs": 0.5, "lr": 1e-3, "grad_norm": 1.5}
    timing = {"pairs_per_second": 88.0, "step_seconds": 0.5, "data_seconds": 0.1, "mfu": 0.25}
    line = console_line(50, 2000, metrics, timing, 307.0)
    assert line == (
        "step    50/2,000   2% | masked_image 0.5000 masked_text 2.0000 pairs contrast 3.0000 | "
        "lr 1.00e-03 grad 1.5 | 88.0 pairs/s MFU 25.0% | data 20.0% | ETA 5:07"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (math.nan, "-:--")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_memory_is_at_least_what_this_process_holds():
    block = np.ones(2**24)  # 128 MiB, written
    assert memory_gib("cpu") > block.nbytes / 2**30
