"""What a user may get wrong: one sentence that names it, exit code 2, no traceback, no run directory."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from eve import evaluate, pretrain
from eve.data.shard_writer import Record, write_shards
from eve.training.ds_config import DS_CONFIGS
from eve.training.run_lock import lock_run
from tests.rank_pool import RankPool, fork_server
from tests.test_resume import arguments
from tests.tiny import make_record

ROOT = Path(__file__).parents[1]


class Mistake:
    """Runs `eve.pretrain` and gives the one sentence it ended with."""

    def __init__(self, recipe: Path, directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.recipe, self.directory, self.capfd = recipe, directory, capfd
        self.run_dir = directory / "run"

    def __call__(self, *more: str, recipe: Path | str | None = None, ds: Any = None) -> str:
        argv = arguments(Path(recipe or self.recipe), self.run_dir, *more)
        if ds is not None:
            config = self.directory / "ds.json"
            config.write_text(ds if isinstance(ds, str) else json.dumps(ds))
            argv += ["--deepspeed_config", str(config)]
        self.capfd.readouterr()
        assert pretrain.main(argv) == 2
        lines = self.capfd.readouterr().err.splitlines()
        sentences = [line for line in lines if line.startswith("error: ")]
        assert len(sentences) == 1, lines
        assert not any("Traceback" in line for line in lines)
        return sentences[0].removeprefix("error: ")

    def before_anything(self, *more: str, **options: Any) -> str:
        existed = self.run_dir.exists()
        sentence = self(*more, **options)
        assert self.run_dir.exists() == existed
        return sentence


@pytest.fixture
def mistake(tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Mistake:
    return Mistake(tiny, tmp_path, capfd)


def ds_config(name: str = "zero0_fp32.json", **changes: Any) -> dict[str, Any]:
    return {**json.loads((DS_CONFIGS / name).read_text()), **changes}


def test_no_such_recipe(mistake: Mistake) -> None:
    assert "did you mean eve_tiny?" in mistake.before_anything(recipe="eve_tny")


def test_recipe_is_not_yaml(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: [1, 2\ndata: }")
    assert "bad.yaml is not readable YAML" in mistake.before_anything(recipe=tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.widht=64", "unknown key model.widht; did you mean width?"),
        ("model.width=wide", "model.width is 'wide'"),
        ("data.sources.pairs.mix=[{shards:", "mix=[{shards:' is not YAML; quote it for the shell"),
        ("training.log_every=0", "training.log_every is 0"),
        ("stages.0.steps", "'stages.0.steps' is not an override such as"),
        ("stages.3.steps=7", "'3' is not an index of a list of 1"),
        ("model.heads=5", "width 32 is not a multiple of heads 5"),
        ("model.depth=3", "feed_forward.blocks name the blocks [0, 1]"),
        ("stages.0.streams.0.source=pears", "reads the source 'pears', expected one of ['pairs']"),
        ("data.sources.pairs.batch_size=18", "batch_size 18 is not a multiple of num_readers 4"),
        ("stages.0.warmup_steps=99", "warmup_steps 99 is more than steps 12"),
        (
            "training.micro_batch_size=5",
            "16 samples, which is not a multiple of the micro-batch 5; give training.micro_batch_size=4",
        ),
        ("data.tokenizer=nowhere.model", "there is no tokenizer nowhere.model"),
        ("model.vocab_size=4000", "pieces, model.vocab_size is 4000"),
        ("data.sources.pairs.mix.0.shards=nowhere/*.tar", "nowhere/*.tar"),
        ("stages.0.init_from=nowhere", "nowhere is not an exported model"),
        ("parallel.tensor=2", "parallel.tensor 2 does not divide the 1 processes"),
        ("parallel.expert=4", "parallel.expert 4 does not divide the 1 processes"),
        ("moe.experts_backend=triton", "is triton, which needs a CUDA device; use auto on a CPU"),
        ("moe.experts_backend=megablocks", "is megablocks, which needs a CUDA device; use auto on a CPU"),
        ("model.hidden=1000000000", "no space left for checkpoints"),
    ],
)
def test_recipe_keys(override: str, sentence: str, mistake: Mistake) -> None:
    assert sentence in mistake.before_anything(override)


def test_backend_of_experts_with_a_norm_inside(mistake: Mistake) -> None:
    shape = ("model.sub_norm=true", "model.feed_forward=[{blocks: 0-1, router: modality}]")
    for backend in ("grouped_mm", "triton", "megablocks"):
        sentence = mistake.before_anything(*shape, f"moe.experts_backend={backend}")
        assert f"is {backend}, but experts with model.sub_norm take auto alone" in sentence


def test_interpreter_in_the_environment(
    mistake: Mistake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before even the recipe, or the checkpoint, is looked for."""
    for value in ("1", "true", "ON"):
        monkeypatch.setenv("TRITON_INTERPRET", value)
        sentence = mistake.before_anything(recipe="eve_tny")
        assert sentence.startswith(f"TRITON_INTERPRET is {value} in the environment")
        assert evaluate.main(["--task", "pretrain", "--checkpoint", str(tmp_path / "none")]) == 2
        assert mistake.capfd.readouterr().err == f"error: {sentence}\n"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "did you mean eve_tiny?" in mistake.before_anything(recipe="eve_tny")


def test_tokenizer_is_no_model(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a sentencepiece model")
    sentence = mistake.before_anything(f"data.tokenizer={tmp_path}/bad.model")
    assert "bad.model is not a sentencepiece model" in sentence


@pytest.mark.parametrize(
    ("ds", "sentence"),
    [
        ("{bf16: yes", "is not JSON: line 1"),
        ("[1, 2]", "holds a list, expected an object"),
        (ds_config(zero_optimisation={}), "unknown key zero_optimisation; did you mean zero_optimization?"),
        (ds_config(optimizer={"type": "Adam"}), "has the key optimizer; that belongs to the recipe"),
        (
            ds_config(gradient_clipping=1.0),
            "says gradient_clipping 1.0, the recipe and 1 processes make it 3.0",
        ),
        (ds_config(train_batch_size=64), "says train_batch_size 64, the recipe and 1 processes make it 32"),
        (ds_config(zero_optimization={"stage": 4}), "says zero_optimization.stage 4, expected 0, 1, 2 or 3"),
        (ds_config(bf16={"enabled": True}, fp16={"enabled": True}), "enables both bf16 and fp16"),
        (ds_config(bf16={"enabled": True}), "bf16 with zero_optimization.stage 0"),
        (ds_config("zero1_fp16.json"), "enables fp16, which needs a CUDA device"),
        (ds_config(zero_optimization=1), "says zero_optimization 1, expected an object"),
        (ds_config(zero_optimization=True), "says zero_optimization true, expected an object"),
        (ds_config(zero_optimization={"stage": "two"}), 'stage "two", expected 0, 1, 2 or 3'),
        (ds_config(zero_optimization={"stage": None}), "stage null, expected 0, 1, 2 or 3"),
        (ds_config(bf16=True), "says bf16 true, expected an object"),
        (ds_config(bf16={"enabled": 1}), "says bf16.enabled 1, expected a valid boolean"),
        (ds_config(train_micro_batch_size_per_gpu=0), "size_per_gpu 0, expected greater than 0"),
        (ds_config(train_micro_batch_size_per_gpu="4"), 'size_per_gpu "4", expected a number'),
        (ds_config(gradient_clipping=False), "says gradient_clipping false, expected a number"),
        (
            ds_config(zero_optimization={"stage": 1, "reduce_bucket": 5}),
            "unknown key zero_optimization.reduce_bucket; did you mean reduce_bucket_size?",
        ),
        (
            ds_config(zero_optimization={"stage": 1, "reduce_bucket_size": 0.5}),
            "zero_optimization.reduce_bucket_size 0.5, expected a valid integer",
        ),
        (
            ds_config(data_types={"grad_accum_dtype": "fp99"}),
            "data_types.grad_accum_dtype \"fp99\", expected 'fp32', 'bf16' or 'fp16'",
        ),
        (ds_config(data_types={"grad_accum_dtype": "bf16"}), "grad_accum_dtype bf16, which goes with bf16"),
        (
            ds_config(zero_optimization={"stage": 1, "offload_optimizer": {"device": "nvme"}}),
            'zero_optimization.offload_optimizer.device "nvme"; states go to the host',
        ),
        (ds_config("zero3_fp32.json"), "stage 3, which is for recipes without a topk router"),
        (
            ds_config("zero1_fp32.json", zero_optimization={"stage": 1, "overlap_comm": True}),
            "overlap_comm true with ZeRO stage 1",
        ),
    ],
)
def test_deepspeed_config(ds: Any, sentence: str, mistake: Mistake) -> None:
    assert sentence in mistake.before_anything(ds=ds)


def test_failure_before_the_first_step_leaves_nothing_in_the_way(mistake: Mistake) -> None:
    shape = ("stages.0.steps=2", "stages.0.warmup_steps=0")
    mistake.before_anything(*shape, "stages.0.trainable=['teacher.*']")
    # A script that is relaunched always says --resume.
    assert pretrain.main(arguments(mistake.recipe, mistake.run_dir, "--resume", *shape)) == 0
    said = mistake.capfd.readouterr().out
    assert f"starting {mistake.run_dir} at step 0, there is no checkpoint to resume" in said
    # What has made a step stays.
    assert "exists; go on with --resume" in mistake(*shape, "stages.0.trainable=['teacher.*']")
    assert (mistake.run_dir / "export").is_dir()


def test_options_and_overrides_in_any_order(mistake: Mistake) -> None:
    argv = ("stages.0.steps=2", "--deepspeed_config", "ds_configs/zero0_fp32.json", "model.widht=3")
    assert "unknown key model.widht" in mistake.before_anything(*argv)


def test_deepspeed_config_is_missing(mistake: Mistake) -> None:
    sentence = mistake.before_anything("--deepspeed_config", "ds_configs/fp33.json")
    assert "ds_configs/fp33.json cannot be read" in sentence
    assert "zero0_fp32.json" in sentence


def test_micro_batch_is_said_twice(mistake: Mistake) -> None:
    ds = ds_config(train_micro_batch_size_per_gpu=8)
    assert "make one of them" in mistake.before_anything("training.micro_batch_size=4", ds=ds)


def test_micro_batch_of_the_deepspeed_config_does_not_divide(mistake: Mistake) -> None:
    sentence = mistake.before_anything(ds=ds_config(train_micro_batch_size_per_gpu=12))
    assert f"; give train_micro_batch_size_per_gpu 8 in {mistake.directory}/ds.json" in sentence


def test_run_directory_below_a_file(mistake: Mistake, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    mistake.run_dir = tmp_path / "file" / "run"
    assert "Not a directory" in mistake()


def test_pattern_of_no_parameter(mistake: Mistake) -> None:
    sentence = mistake.before_anything("stages.0.trainable=['teacher.*']")
    assert "the pattern 'teacher.*', which matches no" in sentence


@pytest.fixture(scope="module")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    assert pretrain.main(arguments(tiny, run_dir, "stages.0.steps=4", "stages.0.warmup_steps=0")) == 0
    return run_dir


def test_run_directory_exists(mistake: Mistake, finished: Path) -> None:
    mistake.run_dir = finished
    assert "exists; go on with --resume" in mistake()


def test_run_directory_in_use(mistake: Mistake, finished: Path) -> None:
    mistake.run_dir = finished
    before = (finished / "metrics.jsonl").read_bytes()
    with lock_run(finished) or pytest.skip("no locks on this file system"):
        assert f"{finished} is in use by process {os.getpid()} on" in mistake(
            "--resume", "stages.0.steps=4", "stages.0.warmup_steps=0"
        )
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("more", "ds", "sentence"),
    [
        (
            ["seed=9", "optimizer.eps=1.0e-6"],
            None,
            "another recipe: optimizer.eps is 1e-06, was 1e-08; seed is 9",
        ),
        ([], ds_config("zero1_fp32.json"), "has ZeRO stage 0, this run has 1"),
    ],
)
def test_checkpoint_of_something_else(
    more: Sequence[str], ds: Any, sentence: str, mistake: Mistake, finished: Path
) -> None:
    mistake.run_dir = finished
    assert sentence in mistake("--resume", "stages.0.steps=4", "stages.0.warmup_steps=0", *more, ds=ds)


def test_resuming_without_the_overrides_of_the_run(
    mistake: Mistake, finished: Path, tiny: Path, tmp_path: Path
) -> None:
    mistake.run_dir = finished
    # The recipe comes before the data that only the overrides named.
    sentence = mistake("--resume", "data.tokenizer=nowhere.model")
    assert "of another recipe: stages.0.steps is 12, was 4; stages.0.warmup_steps is 2, was 0" in sentence
    assert sentence.endswith(f"; that of the run is --recipe {finished}/recipe.yaml")
    shape = ("stages.0.steps=4", "stages.0.warmup_steps=0")
    for override in ("data.tokenizer=nowhere.model", "data.sources.pairs.mix.0.shards=nowhere/*.tar"):
        sentence = mistake("--resume", *shape, override)
        key, value = override.split("=")
        assert "nowhere" in sentence.split("; ")[0]
        assert f"{key} is '{value}', was '{tiny.parent}/" in sentence
        assert f"--recipe {finished}/recipe.yaml" in sentence
    copy = shutil.copytree(finished, tmp_path / "copy")
    mistake.capfd.readouterr()
    assert pretrain.main(["--recipe", str(copy / "recipe.yaml"), "--resume"]) == 0
    assert f"resuming {copy}/checkpoints/step-00000004" in mistake.capfd.readouterr().out


def test_checkpoint_with_another_tokenizer(
    mistake: Mistake, finished: Path, tiny: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    model = copy / "checkpoints" / "step-00000004" / "tokenizer.model"
    model.write_bytes(b"x" * model.stat().st_size)
    mistake.run_dir = copy
    sentence = mistake("--resume", "stages.0.steps=4", "stages.0.warmup_steps=0")
    assert "is not the one of the checkpoint" in sentence


def test_weights_of_another_model(mistake: Mistake, finished: Path) -> None:
    sentence = mistake.before_anything("model.hidden=48", f"stages.0.init_from={finished}/export")
    assert "is of another model: encoder.blocks.0.feed_forward" in sentence
    assert "(64,), expected (48,)" in sentence


def test_too_many_broken_samples(mistake: Mistake, tmp_path: Path) -> None:
    records = [make_record(number) for number in range(64)]
    records[5::6] = [
        Record(f"broken{i}", b"garbage", "jpg", ["a red circle"]) for i in range(len(records[5::6]))
    ]
    write_shards(records, tmp_path / "broken", shard_size=32)
    sentence = mistake(f"data.sources.pairs.mix.0.shards={tmp_path}/broken/*.tar", "data.max_bad_share=0.02")
    assert "data.max_bad_share 0.02" in sentence
    assert "broken" in sentence


def test_no_step_could_be_made(mistake: Mistake) -> None:
    sentence = mistake("model.init_std=1.0e+30", "stages.0.steps=2", "training.max_skipped_steps=9")
    assert "none of the 2 steps was made, as no gradient was finite" in sentence
    assert not (mistake.run_dir / "export").exists()


def test_diverged(mistake: Mistake) -> None:
    sentence = mistake("stages.0.lr=1.0e+38", "training.max_skipped_steps=2", "stages.0.warmup_steps=0")
    assert "of stage pretrain is not finite and was skipped: the loss of stream masked_image" in sentence
    assert "number 3 in a row, past training.max_skipped_steps 2" in sentence


def pretrain_on_every_rank(argv: list[str]) -> tuple[int, list[str]]:
    """(exit code, sentences on stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = pretrain.main(argv)
    return code, [line for line in stderr.getvalue().splitlines() if line.startswith("error: ")]


def test_readers_do_not_divide_over_the_processes(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    odd = ("data.num_readers=5", "data.sources.pairs.batch_size=10")
    answers = two_ranks.run(pretrain_on_every_rank, arguments(tiny, tmp_path / "run", *odd))
    sentence = "error: data.num_readers 5 is not a multiple of the 2 processes"
    assert answers == [(2, [sentence]), (2, [])]


def test_data_that_breaks_on_one_process_stops_both(tiny: Path, two_ranks: RankPool, tmp_path: Path) -> None:
    """The readers of rank 1 meet the broken half of the shard; what it says, rank 0 prints."""
    records = [make_record(number) for number in range(64)]
    for number in range(32, 64):
        records[number] = Record(f"{number:05d}", b"garbage", "jpg", ["a red circle"])
    write_shards(records, tmp_path / "half", shard_size=64)
    shards = f"data.sources.pairs.mix.0.shards={tmp_path}/half/*.tar"
    argv = arguments(tiny, tmp_path / "run", shards, "data.shuffle_buffer=1", "data.max_bad_share=0.1")
    (code, sentences), other = two_ranks.run(pretrain_on_every_rank, argv)
    assert other == (2, [])
    assert code == 2
    assert len(sentences) == 1
    assert "broken" in sentences[0]
    assert "of shard 000000.tar: undecodable image" in sentences[0]


def pretrain_with_small_files(limit: int, moment: tuple[str, str], argv: list[str], stderr: str) -> None:
    """A limit on the size of a file fails a write as a full disk does. `moment`: (audit event, path)."""
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    run_dir = Path(argv[3])
    sys.addaudithook(
        lambda event, args: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            if event == moment[0] and moment[1] in str(args[0])
            else None
        )
    )
    assert not run_dir.exists()
    sys.exit(pretrain.main(argv))


@pytest.mark.parametrize("limit", [1_000, 100_000])
def test_disk_full_while_a_checkpoint_is_written(limit: int, tiny: Path, tmp_path: Path) -> None:
    run_dir, stderr = tmp_path / "run", tmp_path / "stderr"
    argv = arguments(tiny, run_dir)
    moment = ("os.mkdir", "writing-00000008")
    process = fork_server().Process(target=pretrain_with_small_files, args=(limit, moment, argv, str(stderr)))
    process.start()
    process.join(120)
    errors = [line for line in stderr.read_text().splitlines() if line.startswith("error: ")]
    assert process.exitcode == 2, stderr.read_text()
    assert len(errors) == 1
    assert "the checkpoint cannot be written to" in errors[0]
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-00000004"]
    assert pretrain.main([*argv, "--resume"]) == 0


@pytest.mark.parametrize("moment", [("os.rename", "writing-00000004"), ("open", "step-00000006.png")])
def test_disk_full_between_checkpoints(moment: tuple[str, str], tiny: Path, tmp_path: Path) -> None:
    """The first line of metrics, or the first picture, after the disk was filled."""
    run_dir, stderr = tmp_path / "run", tmp_path / "stderr"
    argv = arguments(tiny, run_dir, "training.images_every=6")
    process = fork_server().Process(target=pretrain_with_small_files, args=(500, moment, argv, str(stderr)))
    process.start()
    process.join(120)
    assert process.exitcode == 2, stderr.read_text()
    assert stderr.read_text().splitlines()[-1] == f"error: cannot write to {run_dir}: File too large"
    assert pretrain.main([*argv, "--resume"]) == 0


def test_a_defect_ends_its_process_at_once() -> None:
    """Whatever still runs in it: the other ranks wait until the launcher sees it gone."""
    program = (
        "import threading, time\n"
        "from eve import pretrain\n"
        "def defect():\n"
        "    threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "    raise RuntimeError('on purpose')\n"
        "pretrain.main = defect\n"
        "pretrain.program()\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert process.returncode == 1
    assert process.stderr.endswith("RuntimeError: on purpose\n")


@pytest.mark.parametrize("launcher", [[], ["-m", "torch.distributed.run", "--nproc-per-node", "2"]])
def test_from_the_command_line(launcher: list[str], tiny: Path, tmp_path: Path) -> None:
    argv = arguments(tiny, tmp_path / "run", "model.widht=3")
    process = subprocess.run(
        [sys.executable, *launcher, "-m", "eve.pretrain", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
    )
    # torchrun itself ends with 1 where a process failed.
    assert process.returncode == (1 if launcher else 2)
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: recipe {tiny} with overrides: unknown key model.widht; did you mean width?"]
