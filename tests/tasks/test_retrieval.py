"""Retrieval: recalls of the official codes and by counting, what is right, the whole evaluation."""

from __future__ import annotations

import json
from math import comb
from pathlib import Path

import numpy as np
import pytest
import torch

from eve.data.loader import read_captions
from eve.data.shard_writer import Record, write_shards
from eve.data.tokenizer import Tokenizer
from eve.evaluate import main
from eve.model import build_model
from eve.tasks.retrieval import (
    best_ranks,
    chance,
    read_candidates,
    recalls,
    relevant,
    score_by_contrast,
    score_by_matching,
)
from eve.training.export import export_model, load_exported
from tests.reference import Reference, files
from tests.tiny import make_record, tiny_recipe


@pytest.mark.fixtures
@files("retrieval_metrics")
def test_recalls_are_those_of_the_official_codes(path: Path) -> None:
    reference = Reference(path)
    scores, owner = reference.input["scores_i2t"], reference.input["caption_image"]
    right = torch.arange(len(scores))[:, None] == owner[None]
    for prefix, images in (("same", scores.t()), ("separate", reference.input["scores_t2i"])):
        means = []
        for name, score, right_QK in (("txt", scores, right), ("img", images, right.t())):
            found = {k: 100 * hit.double().mean().float() for k, hit in recalls(score, right_QK).items()}
            for k, value in found.items():
                reference.equal(f"{prefix}_{name}_r{k}", value)
            means.append(sum(found.values()) / 3)
            reference.equal(f"{prefix}_{name}_r_mean", means[-1])
        reference.equal(f"{prefix}_r_mean", sum(means) / 2)
    reference.equal("same_i2t_rank", best_ranks(scores, right))
    reference.equal("same_t2i_rank", best_ranks(scores.t(), right.t()))
    reference.done()


def test_ranks_are_those_of_counting() -> None:
    draw = np.random.default_rng(0)
    score, right = draw.normal(size=(40, 12)), draw.random((40, 12)) < 0.2
    right[:, 3] |= ~right.any(1)
    expected = []
    for row, wanted in zip(score, right, strict=True):
        order = sorted(range(12), key=lambda k: -row[k])
        expected.append(next(place for place, k in enumerate(order) if wanted[k]))
    assert best_ranks(torch.from_numpy(score), torch.from_numpy(right)).tolist() == expected


@pytest.mark.parametrize("said", [0.0, float("nan")])
def test_a_model_that_says_nothing_finds_nothing(said: float) -> None:
    right = torch.eye(12, dtype=torch.bool)
    assert not any(hit.any() for hit in recalls(torch.full((12, 12), said), right).values())


def test_chance_is_the_mean_over_all_orders() -> None:
    right = torch.zeros(2, 30, dtype=torch.bool)
    right[0, :3], right[1, 7] = True, True
    found = chance(right)
    for k in (1, 5, 10):
        exact = [1 - comb(30 - r, k) / comb(30, k) for r in (3, 1)]
        assert found[k] == pytest.approx(sum(exact) / 2)
    assert chance(torch.ones(1, 6, dtype=torch.bool)) == {1: 1.0, 5: 1.0, 10: 1.0}


def test_captions_of_the_same_picture_and_of_the_same_words_are_right() -> None:
    """Images 0 and 2 show the same; caption 1 of image 0 has the words of caption 3 of image 1."""
    image, owner = np.array([0, 1, 0]), np.array([0, 0, 1, 1, 2])
    text = np.array([0, 1, 2, 1, 3])
    assert relevant(image, text, owner).int().tolist() == [[1, 1, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]


HEADS = ("model.contrast={width: 16, paths: [modality]}", "model.matching={}", "model.decoder=null")
STREAMS = "stages.0.streams=[{name: pairs, source: pairs, objective: contrast_matching, identity: shape}]"


@pytest.fixture(scope="module")
def export(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("retrieval")
    write_shards([make_record(number) for number in range(200, 212)], directory / "held_out", shard_size=5)
    recipe = tiny_recipe(
        tiny,
        *HEADS,
        STREAMS,
        "model.init_std=0.3",
        f"evaluation.shards={{new: '{directory}/held_out/*.tar'}}",
    )
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    model = build_model(recipe.model, seed=1)
    export_model(directory / "export", dict(model.state_dict()), recipe, tokenizer, {})
    return directory / "export"


def test_all_captions_are_read_and_scored_one_by_one(export: Path) -> None:
    model, recipe, tokenizer = load_exported(export)
    model.eval()
    (shards,) = recipe.evaluation.shards.values()
    found = read_candidates(recipe, tokenizer, shards)
    records: list[Record] = [make_record(number) for number in range(200, 212)]
    texts = [tokenizer.encode(caption, 16).tolist() for record in records for caption in record.captions]
    assert [text.tolist() for text in found.texts] == texts
    assert found.owner_C.tolist() == [i for i, record in enumerate(records) for _ in record.captions]
    shapes = [record.metadata["shape"] for record in records]
    for i, shape in enumerate(shapes):
        for c, owner in enumerate(found.owner_C):
            said = any(
                texts[c] == texts[d] for d, other in enumerate(found.owner_C) if shapes[other] == shape
            )
            assert bool(found.relevant_IC[i, c]) == (shapes[owner] == shape or said)
    score = score_by_contrast(model, found, batch_size=5)
    odds = score_by_matching(model, found, score.t(), 3, batch_size=4, by_image=False)
    assert model.contrast is not None
    assert model.matching is not None
    with torch.no_grad():
        for i, c in ((0, 0), (3, 7), (11, 2)):
            pixels, ids = torch.from_numpy(found.images[i].image_CHW)[None], torch.from_numpy(found.texts[c])
            image = model.encode(images_BCHW=pixels).image_class_BD
            text = model.encode(tokens_N=ids, text_lengths=[len(ids)]).text_class_BD
            cosine = torch.cosine_similarity(
                model.contrast.image["modality"](image), model.contrast.text["modality"](text)
            )
            torch.testing.assert_close(score[i, c], cosine[0], atol=1e-5, rtol=1e-5)
        for c in range(len(texts)):
            best = sorted(range(12), key=lambda i: -float(score[i, c]))[:3]
            assert torch.isfinite(odds[c]).nonzero().flatten().tolist() == sorted(best)
            pixels = torch.from_numpy(found.images[best[1]].image_CHW)[None]
            fused = model.encode(
                images_BCHW=pixels, tokens_N=torch.tensor(texts[c]), text_lengths=[len(texts[c])]
            )
            no, yes = model.matching(fused.text_class_BD)[0]
            torch.testing.assert_close(odds[c, best[1]], yes - no, atol=1e-5, rtol=1e-5)


def test_broken_captions_are_left_out(tiny: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tiny)
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    write_shards(
        [Record("a", b"", "png", ["a red circle", " ", "a square"], {})], tmp_path / "s", shard_size=5
    )
    ((index, captions),) = read_captions(f"{tmp_path}/s/*.tar", max_text_length=16, tokenizer=tokenizer)
    assert index == 0
    assert [text.tolist() for text in captions] == [
        tokenizer.encode(caption, 16).tolist() for caption in ("a red circle", "a square")
    ]


def test_tables_of_an_export(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "retrieval.json"
    arguments = ["--task", "retrieval", "--checkpoint", str(export), "--output", str(path)]
    assert main([*arguments, "evaluation.rerank=4"]) == 0
    assert "Retrieval by contrast" in capsys.readouterr().out
    contrast, matching, chances = json.loads(path.read_text())
    assert matching["title"] == "Retrieval by matching of the first 4 by contrast"
    for table in (contrast, matching, chances):
        (row,) = table["rows"]
        assert (row["cell"], row["images"], row["captions"]) == ("new", 12, 18)
    (row,) = contrast["rows"]
    value, low, high = row["text R@5"]
    assert 0 <= low <= value <= high <= 1
    (first,) = matching["rows"]
    # The first four are the same images, in another order.
    assert first["text R@5"][0] <= row["text R@5"][0]


def test_a_model_without_contrast_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe(tiny, "evaluation.shards={new: /nowhere.tar}")
    model = build_model(recipe.model, seed=1)
    tokenizer = Tokenizer.load(recipe.data.tokenizer)
    export_model(tmp_path / "export", dict(model.state_dict()), recipe, tokenizer, {})
    assert main(["--task", "retrieval", "--checkpoint", str(tmp_path / "export")]) == 2
    assert "model.contrast of the checkpoint is null" in capsys.readouterr().err
