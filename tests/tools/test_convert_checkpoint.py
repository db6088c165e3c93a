"""The command: what it refuses, compares, leaves when it is killed; how much memory it takes."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eve.config import load_recipe
from eve.conversion.checkpoint import Parameter
from eve.conversion.layout import Layout
from eve.conversion.open_directory import write_safetensors
from eve.conversion.sources import open_source
from eve.conversion.targets import convert_to_deepspeed, convert_to_open
from eve.model import VisionLanguageModel, parameter_shapes
from eve.model.layers import Layers
from eve.training.checkpoint import CheckpointStore, seal
from eve.training.optimizer import parameter_groups
from tests.conversion.runs import options, write_trained
from tests.rank_pool import fork_server
from tests.tiny import tiny_recipe
from tools.convert_checkpoint import main

STEP = "step-00000004"


@pytest.fixture
def trained(tiny: Path, tmp_path: Path) -> Path:
    """A topology-free directory with training state, alone in its own."""
    directory = tmp_path / "here" / "trained"
    directory.parent.mkdir()
    write_trained(tiny_recipe(tiny), directory)
    return directory


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--world-size", "3", "--tensor", "2"], "parallel.tensor 2 does not divide the 3 processes"),
        (["--world-size", "4", "--tensor", "4"], "model.heads 2 is not a multiple of parallel.tensor 4"),
        (["--world-size", "8", "--expert", "8"], "num_experts 4 is not a multiple of parallel.expert 8"),
        (
            ["--world-size", "2", "--zero-stage", "3"],
            "zero_optimization.stage 3, which is for recipes without",
        ),
        (["--world-size", "2", "--precision", "bf16"], "says bf16 with zero_optimization.stage 0"),
        (["--world-size", "0"], "--world-size 0 is below 1"),
        (["--zero-stage", "1"], "--zero-stage is for a layout; give its --world-size too"),
        (["--world-size", "2", "--training-state"], "--training-state is for a topology-free directory"),
        (["model.depth=3"], "model.depth=3 is for --upcycle"),
    ],
)
def test_what_does_not_go_together(
    words: list[str], sentence: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(trained), str(trained.parent / "run"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert [path.name for path in trained.parent.iterdir()] == ["trained"]


def test_sources_and_targets_are_checked(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, exists = trained.parent / "run", trained.parent / "exists"
    exists.mkdir()
    for target, source, sentence in (
        (exists, trained, "exists exists; give a path that does not"),
        (run, trained.parent / "none", "none is not a directory"),
        (run, exists, "is neither a step directory (RUN/checkpoints/step-N) nor a run directory"),
        (run / "checkpoints" / "step-00000009", trained, "so .*step-00000009 must be called step-00000004"),
    ):
        assert main([str(source), str(target), "--world-size", "1"]) == 2
        assert re.search(re.escape(sentence) if "*" not in sentence else sentence, capsys.readouterr().err)
    (exists / "checkpoints").mkdir()
    assert main([str(exists), str(run)]) == 2
    assert "has no complete checkpoint in" in capsys.readouterr().err
    assert not run.exists()


def test_a_step_directory_joins_a_run(trained: Path) -> None:
    """Its run resumes from it; sources are the newest complete checkpoint of a run."""
    run = trained.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    assert main([str(trained), str(run / "checkpoints" / STEP), "--world-size", "2"]) == 0
    assert open_source(run).where == run / "checkpoints" / STEP
    state = json.loads((run / "checkpoints" / STEP / "state.json").read_text())
    assert (state["world_size"], state["zero_stage"], state["step"]) == (2, 0, 4)
    assert load_recipe(str(run / "checkpoints" / STEP / "recipe.yaml")).parallel.tensor == 1


def test_verify_names_what_differs(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = trained.parent / "other"
    assert main([str(trained), str(other), "--training-state", "--verify"]) == 0
    assert "are the same, bit for bit" in capsys.readouterr().out
    moments = load_file(other / "exp_avg.safetensors")
    moments["decoder.mask_token"][3] += 1
    save_file(moments, other / "exp_avg.safetensors")
    state = json.loads((other / "state.json").read_text())
    state["steps"]["encoder.norm.bias"] = 7
    (other / "state.json").write_text(json.dumps(state))
    for name in ("checksums.json", "complete.json"):
        (other / name).unlink()
    seal(other)
    assert main([str(trained), str(other), "--verify"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "encoder.norm.bias had 4 updates, then 7",
        "exp_avg of decoder.mask_token has another checksum",
    ]


def test_verify_looks_at_what_ranks_compute_with(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.parent / "run"
    layout = Layout(4, tensor=2, expert=2, zero_stage=2, precision="bf16")
    assert main([str(trained), str(run), *options(layout), "--verify"]) == 0
    step = run / "checkpoints" / STEP
    path = step / "engine" / "mp_rank_01_model_states.pt"
    tree = torch.load(path, weights_only=False)
    tree["module"]["model.encoder.blocks.0.attention.qkv.v_bias"][3] = 1.0
    torch.save(tree, path)
    (step / "complete.json").unlink()
    seal(step)
    capsys.readouterr()
    assert main([str(trained), str(run), "--verify"]) == 1
    name = "encoder.blocks.0.attention.qkv.v_bias"
    assert capsys.readouterr().out == f"{step} has weights of {name} that are not the optimizer's\n"


def test_verify_counts_experts(tiny: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fewer = trained.parent / "fewer"
    assert main([str(trained), str(fewer), "--upcycle", str(tiny), "model.feed_forward.1.num_experts=2"]) == 0
    capsys.readouterr()
    assert main([str(trained), str(fewer), "--verify"]) == 1
    assert "feed_forward.experts.w1_EDF has 4 experts, then 2" in capsys.readouterr().out


def killed(hook: Callable[..., None], argv: list[str]) -> int:
    process = fork_server().Process(target=hooked, args=(hook, argv))
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def hooked(hook: Callable[..., None], argv: list[str]) -> None:
    sys.addaudithook(hook)
    sys.exit(main(argv))


def kill_in_the_engine(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and str(args[0]).endswith("zero_pp_rank_1_mp_rank_00_optim_states.pt"):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_before_the_marker(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and str(args[0]).endswith("complete.json") and "w" in str(args[1]):
        os.kill(os.getpid(), signal.SIGKILL)


def kill_before_the_rename(event: str, args: tuple[Any, ...]) -> None:
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("hook", "place"),
    [
        (kill_in_the_engine, f"run/checkpoints/{STEP}"),
        (kill_before_the_marker, f"run/checkpoints/{STEP}"),
        (kill_before_the_rename, "run"),
    ],
)
def test_killed_while_it_writes(
    hook: Callable[..., None], place: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = trained.parent / place
    argv = [str(trained), str(target), *options(Layout(2, zero_stage=2))]
    assert killed(hook, argv) == -signal.SIGKILL
    assert not target.exists()
    if target.name == STEP:
        # What a run finds and removes when it starts.
        assert [path.name for path in target.parent.iterdir()] == [STEP.replace("step", "writing")]
        assert CheckpointStore(target.parent, None, 1).latest() is None  # pyright: ignore[reportArgumentType]
    assert main([*argv, "--verify"]) == 0
    assert not [path for path in target.parent.iterdir() if "writing" in path.name]


def test_safetensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (3, 5), "a": (), "é": (2, 1, 4), "none": (0, 3), "b": (7,)}
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(tensors, tmp_path / "theirs")
    with open(tmp_path / "ours", "wb") as file:
        parameters = [Parameter(name, shape, 0) for name, shape in shapes.items()]
        write_safetensors(file, parameters, tensors.__getitem__, lambda: None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("recipe", sorted(path.stem for path in Path("eve/recipes").glob("*.yaml")))
def test_weight_decay_by_name_is_that_of_the_modules(recipe: str) -> None:
    with torch.device("meta"):
        model = VisionLanguageModel(load_recipe(recipe).model, Layers())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["name"]: group["params"] for group in parameter_groups(model, 0.1)}
    decay = {names[id(parameter)] for parameter in groups["decay"]}
    parameters = [Parameter(name, tuple(tensor.shape), 0) for name, tensor in model.named_parameters()]
    assert {parameter.name for parameter in parameters if parameter.decays} == decay
    assert len(decay) < len(parameters)


class Memory:
    """The most that the process holds within the block beside what is mapped from files, above what it held
    at its start. A thread looks all the time."""

    def __enter__(self) -> Memory:
        self.first = self.most = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.0005):
            self.most = max(self.most, self._now())

    def _now(self) -> int:
        found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return 1024 * int(found[1])

    @property
    def growth(self) -> int:
        return self.most - self.first


def convert_watched(small: Path, source: Path, directory: Path, layouts: list[Layout], answers: Any) -> None:
    """From layout to layout and out of each: the growth of memory in each conversion."""
    growths = []
    # Pages shared with the parent become its own when they are touched: once, before it counts.
    convert_to_deepspeed(open_source(small), directory / "small", layouts[0], progress=lambda: None)
    gc.collect()
    for number, layout in enumerate(layouts):
        with Memory() as memory:
            target = directory / str(number)
            convert_to_deepspeed(open_source(source), target, layout, progress=lambda: None)
        growths.append(memory.growth)
        with Memory() as memory:
            source = directory / f"{number}.open"
            convert_to_open(open_source(target), source, training_state=True, progress=lambda: None)
        growths.append(memory.growth)
    answers.send(growths)


def test_memory_is_that_of_a_few_tensors(tiny: Path, tmp_path: Path) -> None:
    wide = ("model.width=256", "model.hidden=1024", "model.depth=6", "model.feed_forward.0.blocks=0-4")
    recipe = tiny_recipe(tiny, *wide, "model.feed_forward.1.blocks=5")
    sizes = [4 * shape.numel() for shape in parameter_shapes(recipe.model).values()]
    # Weights and two moments.
    assert 3 * sum(sizes) > 20 * max(sizes)
    write_trained(recipe, tmp_path / "trained")
    write_trained(tiny_recipe(tiny), tmp_path / "tiny")
    layouts = [Layout(2, tensor=2, zero_stage=1), Layout(4, expert=4, zero_stage=2), Layout(1)]
    here, there = Pipe()
    # In a process that has held no such tensors yet: what was freed is not given back at once.
    process = fork_server().Process(
        target=convert_watched, args=(tmp_path / "tiny", tmp_path / "trained", tmp_path, layouts, there)
    )
    process.start()
    assert here.poll(120)
    growths = here.recv()
    process.join()
    assert max(growths) < 8 * max(sizes), growths
    assert max(growths) > max(sizes)
