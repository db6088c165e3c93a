"""`python -m eve.evaluate --task pretrain` from shards and an exported model to tables, in one process."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eve.config import load_recipe
from eve.data.loader import read_samples
from eve.data.shard_writer import Record, write_shards
from eve.data.tokenizer import Tokenizer
from eve.evaluate import main
from eve.model import build_model
from eve.tasks.pretrain import labelled_features
from eve.training.export import export_model, file_name, load_exported
from tools.train_tokenizer import train

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 30, 220)}
SHAPES = ("square", "stripe")
CELL = "unseen pictures"


def records(number: int, seed: int) -> list[Record]:
    """A square or a stripe in one of three colours on noise, and a sentence that says so."""
    rng = np.random.default_rng(seed)
    made = []
    for index in range(number):
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        pixels = rng.integers(160, 256, (16, 16, 3), dtype=np.uint8)
        pixels[4:12, 4 if shape == "square" else 0 : 12 if shape == "square" else 16] = COLOURS[colour]
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG")
        metadata = {"label": f"{colour} {shape}", "colour": colour}
        made.append(
            Record(f"s{seed}_{index}", png.getvalue(), "png", [f"a {colour} {shape} on noise"], metadata)
        )
    return made


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run directory with an untrained export, and its data beside it."""
    home = tmp_path_factory.mktemp("home")
    write_shards(records(60, seed=0), home / "train", 32)
    write_shards(records(40, seed=1), home / "held_out", 32)
    texts = [f"a {colour} {shape} on noise" for _ in range(20) for colour in COLOURS for shape in SHAPES]
    tokenizer = Tokenizer(train(texts, 40, "bpe"))
    recipe = load_recipe(
        "eve_tiny",
        [
            "model.image_size=16",
            "model.patch_size=4",
            "model.width=24",
            "model.heads=3",
            "model.hidden=32",
            f"model.vocab_size={tokenizer.vocab_size}",
            "model.decoder={depth: 1, width: 16, heads: 2}",
            "stages.0.streams.0.normalise_pixels=true",
            f"data.sources.pairs.mix.0.shards={home}/train/*.tar",
            f"evaluation={{shards: {{{CELL}: {home}/held_out/*.tar}}, batch_size: 16, label: colour}}",
        ],
    )
    export_model(home / "run" / "export", build_model(recipe.model, 1).state_dict(), recipe, tokenizer, {})
    (home / "run" / "tensorboard").mkdir()
    return home / "run"


def evaluate(run_dir: Path, *more: str) -> int:
    return main(["--task", "pretrain", "--checkpoint", str(run_dir), *more])


def test_tables_pictures_and_where_they_are(run_dir, capsys):
    output = run_dir / "results.json"
    assert evaluate(run_dir, "--output", str(output)) == 0
    tables = {table["title"]: table["rows"] for table in json.loads(output.read_text())}
    patches = tables["Masked patches: error in normalised patches"][0]
    assert patches["cell"] == CELL
    assert patches["pictures"] == 40
    words = tables["Masked words: accuracy (top 1) and grounding gain"][0]
    gain, low, high = words["grounding gain [95 %]"]
    assert gain == pytest.approx(words["right image"] - words["wrong image"], abs=1e-12)
    assert low <= gain <= high
    probes = tables["Probes of frozen features: accuracy for 'colour'"][0]
    # Even an untrained network passes colour on: a linear probe of the picture beats the majority.
    assert probes["image, linear"] > probes["majority"] + 0.2
    assert probes["text, linear"] == 1.0
    printed = capsys.readouterr().out
    assert "grounding gain" in printed
    assert f"tensorboard --logdir {run_dir}" in printed
    picture = Image.open(run_dir / "evaluation" / "unseen_pictures.png")
    assert picture.width > 300


def test_two_evaluations_agree_in_every_digit(run_dir, tmp_path):
    for name in ("a.json", "b.json"):
        assert evaluate(run_dir, "--max-samples", "20", "--output", str(tmp_path / name)) == 0
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def test_the_batch_size_does_not_matter(run_dir, tmp_path):
    rows = []
    for size in (3, 64):
        path = tmp_path / f"{size}.json"
        overrides = (f"evaluation.batch_size={size}", "evaluation.label=null")
        assert evaluate(run_dir, "--output", str(path), "--max-samples", "20", *overrides) == 0
        rows.append(
            [value for table in json.loads(path.read_text()) for value in table["rows"][0].values()][1:]
        )
    flat = [np.hstack([value for value in row if not isinstance(value, str)]) for row in rows]
    assert flat[0] == pytest.approx(flat[1], abs=1e-5)


def test_an_export_alone_and_other_data(run_dir, tmp_path, capsys):
    data = f"{run_dir.parent}/train/*.tar"
    table = tmp_path / "t.md"
    arguments = ("--data", data, "--max-samples", "20", "--output", str(table), "evaluation.label=null")
    assert evaluate(run_dir / "export", *arguments) == 0
    assert "Probes" not in capsys.readouterr().out
    assert data in table.read_text().replace("\\", "")


def test_a_recipe_that_masks_both_at_once_is_judged_alike(run_dir, tmp_path):
    both = "stages.0.streams=[{name: both, source: pairs, objective: masked_pair}]"
    path = tmp_path / "both.json"
    assert evaluate(run_dir, "--max-samples", "20", "--output", str(path), "evaluation.label=null", both) == 0
    titles = [table["title"] for table in json.loads(path.read_text())]
    assert any("patches" in title for title in titles)
    assert any("grounding" in title for title in titles)


def test_missing_training_shards_cost_only_the_probes(run_dir, capsys):
    missing = "data.sources.pairs.mix.0.shards=nowhere/*.tar"
    assert evaluate(run_dir, "--max-samples", "10", missing) == 0
    assert "Not run, the training shards are not at hand" in capsys.readouterr().out


def test_a_label_that_no_sample_has_costs_only_the_probes(run_dir, tmp_path, capsys):
    cells = f"evaluation.shards={{a: {run_dir.parent}/held_out/*.tar, b: {run_dir.parent}/train/*.tar}}"
    assert evaluate(run_dir, "--max-samples", "10", "evaluation.label=size", cells) == 0
    said = capsys.readouterr().out
    for cell in "ab":
        sentence = f"No probe: no sample of {cell} has the metadata field 'size'; evaluation.label=... names"
        assert sentence in said
    assert "grounding gain" in said
    # One cell without the field, then the training shards without it.
    plain = tmp_path / "plain"
    unlabelled = [Record(r.key, r.image_bytes, "png", r.captions, {}) for r in records(12, seed=2)]
    write_shards(unlabelled, plain, 32)
    cells = f"evaluation.shards={{a: {run_dir.parent}/held_out/*.tar, b: {plain}/*.tar}}"
    table = tmp_path / "t.json"
    assert evaluate(run_dir, "--max-samples", "10", cells, "--output", str(table)) == 0
    probes = json.loads(table.read_text())[-1]
    assert [row["cell"] for row in probes["rows"]] == ["a"]
    assert "no sample of b has" in probes["notes"][0]
    assert evaluate(run_dir, "--max-samples", "10", f"data.sources.pairs.mix.0.shards={plain}/*.tar") == 0
    assert "no sample of the training shards (data.sources.pairs) has" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "results.txt"], "'.txt'"),
        (["--data", "nowhere/*.tar"], "nowhere"),
        (["model.width=48"], "model of the checkpoint|model is that of the checkpoint"),
        (["evaluation.shards={}"], "--data"),
        (["evaluation.shard={}"], "did you mean"),
        (["--max-samples", "0"], "max_samples"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(run_dir, capsys, arguments, sentence):
    assert evaluate(run_dir, *arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
    assert any(part in error for part in sentence.split("|"))


def test_a_directory_without_a_model_is_refused(tmp_path, capsys):
    assert evaluate(tmp_path) == 2
    error = capsys.readouterr().err
    assert "no exported model" in error
    assert "finish it with python -m eve.pretrain ... --resume" in error
    assert evaluate(tmp_path / "nowhere") == 2
    assert "no directory" in capsys.readouterr().err


def test_an_export_whose_parts_do_not_fit_together_is_refused(run_dir, tmp_path, capsys):
    export = shutil.copytree(run_dir / "export", tmp_path / "export")
    (export / "tokenizer.model").write_bytes(train(["a b c d e f"] * 9, 14, "bpe"))
    assert evaluate(export) == 2
    assert (
        "tokenizer.model has 14 pieces, model.vocab_size of its recipe.yaml is 40" in capsys.readouterr().err
    )
    (export / "recipe.yaml").unlink()
    assert evaluate(export) == 2
    assert "is not an exported model: it has no recipe.yaml" in capsys.readouterr().err


def test_features_are_means_over_the_tokens_of_each_sample_alone(run_dir):
    model, recipe, tokenizer = load_exported(run_dir / "export")
    samples = list(
        read_samples(
            recipe.evaluation.shards[CELL],
            image_size=16,
            max_text_length=6,
            tokenizer=tokenizer,
            maskings={},
            seed=1,
            limit=5,
        )
    )
    image_BD, text_BD, labels = labelled_features(model.eval(), samples, "colour", 2)
    assert labels == [sample.metadata["colour"] for sample in samples]
    for index, sample in enumerate(samples):
        image = model.encode(images_BCHW=torch.from_numpy(sample.image_CHW)[None]).x_TD
        text = model.encode(
            tokens_N=torch.from_numpy(sample.tokens_N), text_lengths=[len(sample.tokens_N)]
        ).x_TD
        assert image_BD[index] == pytest.approx(image[1:].mean(0).detach().numpy(), abs=1e-5)
        assert text_BD[index] == pytest.approx(text.mean(0).detach().numpy(), abs=1e-5)


def test_file_names_of_cells():
    assert file_name("unseen concept, seen style") == "unseen_concept_seen_style"
    assert file_name("data/dev/*.tar") == "data_dev_tar"
