"""tools/plan.py from the outside: what it prints can be typed, and mistakes get a sentence."""

from __future__ import annotations

import shlex

import pytest

from eve.config import load_recipe
from eve.parallel.topology import check_degrees
from eve.training.ds_config import read_ds_config, resolve_ds_config
from tools.plan import main


@pytest.mark.parametrize(
    "argv",
    [
        ["--recipe", "eve_large", "--gpus", "256", "--gpu", "h200"],
        ["--recipe", "eve_base", "--gpus", "8", "--gpu", "a100-40", "training.activation_checkpointing=true"],
        ["--recipe", "eve_large", "--gpus", "64", "--gpu", "b200", "--zero", "1", "parallel.tensor=2"],
    ],
)
def test_a_run_takes_the_printed_command(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    start = out.index("deepspeed --")
    words = shlex.split(out[start:].split("\n#")[0].split("\n\n")[0].replace("\\\n", " "))
    config = words[words.index("--deepspeed_config") + 1]
    recipe = load_recipe(argv[1], [word for word in words if "=" in word])
    gpus = int(argv[3])
    check_degrees(recipe.parallel, recipe.model, gpus)
    data = gpus // recipe.parallel.tensor
    resolve_ds_config(read_ds_config(config), recipe, recipe.stages[0], data, cuda=True, where=config)
    for override in argv:
        if "=" in override:
            assert override in words
    assert ("--hostfile" in words) == (gpus > 8)
    for said in ("least possible", "assumed: ", "samples/s", "GiB on a GPU", "->"):
        assert said in out


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--gpus", "8", "--gpu", "rtx"], "--gpu is 'rtx', expected one of a100-40"),
        (["--gpus", "12", "--gpu", "h100"], "--gpus 12 is not a multiple of --gpus_per_host 8"),
        (["--gpus", "0", "--gpu", "h100"], "--gpus is 0"),
        (["--gpus", "8", "--gpu", "h100", "--mfu", "40"], "--mfu is 40.0, expected a share"),
        (["--gpus", "8", "--gpu", "h100", "--stage", "3"], "--stage is 3"),
        (["--gpus", "8", "--gpu", "h100", "parallel.expert=5"], "parallel.expert 5 does not divide"),
        (["--gpus", "8", "--gpu", "h100", "parallel.tenso=2"], "did you mean tensor?"),
        (["--gpus", "8", "--gpu", "h100", "--zero", "3"], "stage 3, which is for recipes without a topk"),
        (["--gpus", "8", "--gpu", "h100", "training.micro_batch_size=4"], "the group_size of the routers"),
        (
            ["--gpus", "1", "--gpu", "a100-40", "training.micro_batch_size=2048"],
            "no layout fits: the smallest needs",
        ),
    ],
)
def test_mistakes_get_one_sentence(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--recipe", "eve_base", *argv]) == 2
    streams = capsys.readouterr()
    assert sentence in streams.err
    assert streams.err.startswith("error: ")
    assert streams.err.count("\n") == 1
    assert not streams.out
