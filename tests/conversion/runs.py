"""Runs of the tiny recipe in many layouts, and what of their checkpoints can be compared."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from eve import pretrain
from eve.config import Recipe
from eve.conversion.layout import Layout
from eve.data.tokenizer import Tokenizer
from eve.model import build_model
from eve.training.export import export_model
from eve.training.loop import TrainState
from tests.rank_pool import RankPool

# ZeRO stage 3 is for recipes without a learned router.
DENSE = ("model.feed_forward.1.router=modality", "model.feed_forward.1.num_experts=2")


def train(
    pool: RankPool, recipe: Path, run_dir: Path, layout: Layout, *more: str, config: str | None = None
) -> None:
    """A run, with a file of ds_configs/, or that of the layout."""
    argv = [
        *("--recipe", str(recipe), "--run_dir", str(run_dir), *config_of(layout, config)),
        f"parallel.tensor={layout.tensor}",
        f"parallel.expert={layout.expert}",
        *more,
    ]
    assert pool.run(pretrain_as_first, argv) == [0] * pool.num_ranks


def resume(pool: RankPool, run_dir: Path, layout: Layout, config: str | None = None) -> None:
    """What is left of a run; its recipe has the degrees of its layout."""
    argv = ["--recipe", str(run_dir / "recipe.yaml"), "--resume", *config_of(layout, config)]
    assert pool.run(pretrain_as_first, argv) == [0] * pool.num_ranks


def config_of(layout: Layout, config: str | None) -> list[str]:
    config = config or f"zero{layout.zero_stage}_{layout.precision}.json"
    return ["--deepspeed_config", str(Path("ds_configs", config))]


def pretrain_as_first(argv: list[str]) -> int:
    """DeepSpeed keeps the expert groups of a process's runs and takes the largest for the names of files."""
    from deepspeed.utils import groups

    for known in (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP):
        known.clear()
    return pretrain.main(argv)


def options(layout: Layout) -> list[str]:
    """The command line's words for a layout."""
    words = ["--world-size", layout.world_size, "--tensor", layout.tensor, "--expert", layout.expert]
    words += ["--zero-stage", layout.zero_stage, "--precision", layout.precision]
    return [str(word) for word in words]


def last_step(run_dir: Path) -> Path:
    return max((run_dir / "checkpoints").glob("step-*"))


def engine_tensors(step: Path) -> dict[str, torch.Tensor]:
    """Every tensor of every file of the engine, by file and place in it."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted((step / "engine").iterdir()):
        for place, tensor in tensors(torch.load(path, map_location="cpu", weights_only=False)):
            found[f"{path.name}{place}"] = tensor
    return found


def tensors(tree: Any, place: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield place, tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield from tensors(value, f"{place}/{key}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            yield from tensors(value, f"{place}/{number}")


def assert_same_files(ours: Path, engines: Path) -> None:
    """Both have the same tensors, bit for bit, at the same places of the same files."""
    found, expected = engine_tensors(ours), engine_tensors(engines)
    # With experts, stage 0 puts moments into the files of the model and of the experts; the latter are read.
    copies = {name for name in expected if "/optimizer/" in name and name not in found}
    assert all("model_states" in name for name in copies)
    assert found.keys() == expected.keys() - copies
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def losses(run_dir: Path) -> dict[str, list[float]]:
    """What a run has logged, also what a run that it was moved from had."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss/masked_image", "loss/masked_text", "grad_norm")
    return {name: [line[name] for line in lines if name in line] for name in names}


def write_trained(recipe: Recipe, directory: Path, step: int = 4) -> None:
    """A topology-free directory with training state as if a run had been there, written by other means."""
    model = build_model(recipe.model, seed=recipe.seed)
    weights = dict(model.state_dict())
    export_model(directory, weights, recipe, Tokenizer.load(recipe.data.tokenizer), {"step": step})
    generator = torch.Generator().manual_seed(0)
    for kind in ("exp_avg", "exp_avg_sq"):
        moments = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in weights.items()}
        save_file(moments, directory / f"{kind}.safetensors")
    counters = {"global_steps": step, "global_samples": 16 * step, "skipped_steps": 0}
    steps = {name: step for name, _ in model.named_parameters()}
    state = {"run": vars(TrainState(step=step)), "counters": counters, "steps": steps}
    (directory / "state.json").write_text(json.dumps(state))
