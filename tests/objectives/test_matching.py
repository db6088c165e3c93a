"""Matching: what is drawn how often, never a positive, and the loss against a loop over examples."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from eve import random
from eve.config import parse_recipe
from eve.data.batch import Batch, collate
from eve.errors import UserError
from eve.model import VisionLanguageModel, build_model
from eve.objectives import build_objective
from eve.objectives.matching import draw_negatives, excluded, negative_weights
from eve.parallel.pool import DataPool
from eve.parallel.topology import Topology
from eve.training.ds_config import plan_step
from tests.objectives.pairs import CONFIG, make_samples, stream
from tests.rank_pool import RankPool
from tests.tiny import tiny_recipe

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0, 3.0]])
EXCLUDED = torch.tensor([[False, False, False, False, True]])


def make_batch(number: int) -> Batch:
    return collate([replace(sample, masks={"pairs": {}}) for sample in make_samples(number)])


def test_weights_are_vlmos() -> None:
    """Its softmax with the pair itself set to zero, not of sum 1 again."""
    found = negative_weights(LOGITS, EXCLUDED)
    exponentials = np.exp(np.array([2.0, 1.0, 0.0, -1.0, 3.0]))
    expected = exponentials / exponentials.sum() * [1, 1, 1, 1, 0]
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6)


def test_draws_have_the_probabilities_of_the_weights() -> None:
    number = 40_000
    seeds = random.mix(torch.arange(number), 0)
    drawn, there_is = draw_negatives(LOGITS.expand(number, -1), EXCLUDED.expand(number, -1), seeds)
    shares = drawn.bincount(minlength=5).double() / number
    weights = negative_weights(LOGITS, EXCLUDED)[0].double()
    expected = weights / weights.sum()
    assert there_is.all()
    assert shares[4] == 0
    # Four standard deviations of a share.
    assert (shares - expected).abs().max() < 4 * 0.5 / number**0.5


def test_a_negative_is_found_however_small_its_weight() -> None:
    """fp32's softmax of -200 is 0."""
    drawn, there_is = draw_negatives(
        torch.tensor([[200.0, 0.0]]), torch.tensor([[True, False]]), torch.tensor([1])
    )
    assert (int(drawn), bool(there_is)) == (1, True)


def test_where_all_are_positives_there_is_none() -> None:
    _, there_is = draw_negatives(
        torch.zeros(2, 2), torch.tensor([[True, True], [True, False]]), torch.zeros(2).long()
    )
    assert there_is.tolist() == [False, True]


def test_local_negatives_are_those_of_the_own_rank() -> None:
    positive = torch.zeros(2, 6, dtype=torch.bool)
    positive[0, 2] = positive[1, 3] = True
    found = excluded(positive, 2, "local")
    assert found.tolist() == [[True, True, True, False, True, True], [True, True, False, True, True, True]]
    assert torch.equal(excluded(positive, 2, "global"), positive)


class Watched:
    """The model, and what its fused pass was given."""

    def __init__(self, model):
        self.model, self.fused = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode(self, **inputs):
        if inputs.get("images_BCHW") is not None and inputs.get("tokens_N") is not None:
            self.fused.append(inputs)
        return self.model.encode(**inputs)


@pytest.mark.parametrize("objective_name", ["matching", "contrast_matching"])
def test_loss_is_that_of_a_loop_over_examples(objective_name: str) -> None:
    """Each example through the model alone; negatives are what the fused pass was given, and no positives."""
    number = 6
    batch = make_batch(number)
    model, expected = build_model(CONFIG, 1), build_model(CONFIG, 1)
    watched = Watched(model)
    objective = build_objective(stream(objective_name, identity="thing", matching_weight=0.5), CONFIG)
    output = objective(watched, batch, objective.units(batch), 1.0)  # pyright: ignore
    (fused,) = watched.fused
    texts = [text.tolist() for text in fused["tokens_N"].split(fused["text_lengths"])]
    own = [sample.tokens_N.tolist() for sample in batch.samples]  # pyright: ignore
    images = fused["images_BCHW"]
    assert torch.equal(images[:number], batch.images_BCHW)  # pyright: ignore
    assert torch.equal(images[2 * number :], batch.images_BCHW)  # pyright: ignore
    assert texts[: 2 * number] == own * 2
    nats = []
    for x in range(3 * number):
        i, part = x % number, x // number
        if part == 1:
            shown = next(j for j in range(number) if torch.equal(images[x], batch.images_BCHW[j]))  # pyright: ignore
            assert (min(i, shown), max(i, shown)) not in {(1, 3), (0, 4)}
            assert shown != i
        elif part == 2:
            assert texts[x] != own[i]
            assert not (texts[x] in (own[1], own[3]) and i in (1, 3))
        ids = torch.tensor(texts[x])
        encoded = expected.encode(images_BCHW=images[x : x + 1], tokens_N=ids, text_lengths=[len(ids)])
        first = encoded.x_TD[10]  # after the class token and nine patches
        pooled = torch.tanh(expected.matching.pooler(first))  # pyright: ignore
        logits = expected.matching.output(pooled)  # pyright: ignore
        nats.append(logits.logsumexp(-1) - logits[1 if part == 0 else 0])
    loss = torch.stack(nats).mean()
    prefix = "" if objective_name == "matching" else "matching_"
    total, count = output.metrics[f"{prefix}loss"]
    assert int(count) == 3 * number
    assert float(total / count) == pytest.approx(float(loss.detach()), rel=1e-5)
    if objective_name == "matching":
        assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-5)
        output.loss.backward()
        loss.backward()
        for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, atol=2e-6, rtol=1e-4, msg=name)
    else:
        contrast, pairs = output.metrics["contrast_loss"]
        whole = float(contrast / pairs) + 0.5 * float(loss.detach())
        assert float(output.loss.detach()) == pytest.approx(whole, rel=1e-5)


def test_examples_without_a_negative_are_left_out_and_counted() -> None:
    """All show the same: only the true pairs are left, and the loss is their mean."""
    samples = [replace(s, metadata={"thing": 1}, masks={"pairs": {}}) for s in make_samples(4)]
    batch, model = collate(samples), build_model(CONFIG, 1)
    objective = build_objective(stream("matching", identity="thing"), CONFIG)
    output = objective(model, batch, objective.units(batch), 1.0)
    assert model.matching is not None
    encoded = model.encode(
        images_BCHW=batch.images_BCHW, tokens_N=batch.tokens_N, text_lengths=batch.text_lengths
    )
    nats = -model.matching(encoded.text_class_BD).log_softmax(-1)[:, 1]
    torch.testing.assert_close(output.loss, nats.mean())
    assert output.metrics["left_out"] == (8, 12)


def cosines(model: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """(B, B) of images and texts."""
    image = model.encode(images_BCHW=batch.images_BCHW)
    text = model.encode(tokens_N=batch.tokens_N, text_lengths=batch.text_lengths)
    assert model.contrast is not None
    images_BD = model.contrast.project_images(image.image_class_BD, "modality")
    return images_BD @ model.contrast.project_texts(text.text_class_BD, "modality").t()


def test_hard_negatives_are_near() -> None:
    """With a low temperature the drawn text is the nearest of all that are no positives."""
    contrast = CONFIG.contrast
    assert contrast is not None
    cold = CONFIG.model_copy(update={"contrast": contrast.model_copy(update={"initial_temperature": 1e-5})})
    batch, watched = make_batch(6), Watched(build_model(cold, 1).eval())
    objective = build_objective(stream("contrast_matching", identity="thing"), cold)
    with torch.no_grad():
        objective(watched, batch, objective.units(batch), 1.0)  # pyright: ignore
        cosine = cosines(watched.model, batch)
    for i, j in ((1, 3), (0, 4)):
        cosine[i, j] = cosine[j, i] = -2
    cosine.fill_diagonal_(-2)
    texts = watched.fused[0]["tokens_N"].split(watched.fused[0]["text_lengths"])
    for i in range(6):
        nearest = batch.samples[int(cosine[i].argmax())].tokens_N
        assert texts[12 + i].tolist() == nearest.tolist()  # pyright: ignore


def test_hardness_flattens_the_logits() -> None:
    """Spread logits, so that their half draws otherwise than a quarter of them or they."""
    contrast = CONFIG.contrast
    assert contrast is not None
    cold = CONFIG.model_copy(update={"contrast": contrast.model_copy(update={"initial_temperature": 0.02})})
    batch, watched = make_batch(6), Watched(build_model(cold, 1).eval())
    objective = build_objective(stream("contrast_matching", identity="thing", negative_hardness=0.5), cold)
    with torch.no_grad():
        objective(watched, batch, objective.units(batch), 1.0)  # pyright: ignore
        head = watched.model.contrast
        assert head is not None
        logits = cosines(watched.model, batch) * head.scale("modality")
    excluded_BN = torch.eye(6, dtype=torch.bool)
    for i, j in ((1, 3), (0, 4)):
        excluded_BN[i, j] = excluded_BN[j, i] = True
    seed_B = random.mix(batch.seed_B, (1 << 40) + 2)
    expected, _ = draw_negatives(0.5 * logits, excluded_BN, seed_B)
    others = [draw_negatives(hardness * logits, excluded_BN, seed_B)[0] for hardness in (0.25, 1.0)]
    assert all(expected.tolist() != other.tolist() for other in others)
    texts = watched.fused[0]["tokens_N"].split(watched.fused[0]["text_lengths"])
    for i in range(6):
        assert texts[12 + i].tolist() == batch.samples[int(expected[i])].tokens_N.tolist()  # pyright: ignore


def test_without_hardness_negatives_are_those_of_matching_alone() -> None:
    """The same seeds draw the same examples, whatever contrast says."""
    batch, drawn = make_batch(6), {}
    for name, more in (("contrast_matching", {"negative_hardness": 0.0}), ("matching", {})):
        watched = Watched(build_model(CONFIG, 1).eval())
        objective = build_objective(stream(name, identity="thing", **more), CONFIG)
        with torch.no_grad():
            objective(watched, batch, objective.units(batch), 1.0)  # pyright: ignore
        drawn[name] = watched.fused[0]
    assert torch.equal(drawn["matching"]["tokens_N"], drawn["contrast_matching"]["tokens_N"])
    assert torch.equal(drawn["matching"]["images_BCHW"], drawn["contrast_matching"]["images_BCHW"])


def fetch_on_a_rank(wanted: list[list[int]]) -> tuple[list[int], list[int], bool]:
    topology = Topology.from_environment()
    pool = DataPool(topology)
    rows = torch.arange(3, dtype=torch.uint8)[:, None].expand(-1, 2) + 3 * topology.rank
    weights = torch.full((3, 1), float(topology.rank + 1), requires_grad=True)
    gathered = pool.gather(weights)
    (gathered[:, 0] * torch.arange(3.0 * pool.size) * (topology.rank + 1)).sum().backward()
    ranks = sum(range(1, pool.size + 1))
    exact = torch.arange(3.0)[:, None] + 3 * topology.rank
    assert weights.grad is not None
    fetched = pool.fetch(rows, np.array(wanted))
    return fetched[:, 0].tolist(), gathered[:, 0].int().tolist(), torch.equal(weights.grad, exact * ranks)


def test_rows_of_other_ranks_come_as_asked_for(four_ranks: RankPool) -> None:
    """Any order, one row to several ranks and twice to one, none of some; gradients of all are summed."""
    wanted = [[11, 0, 5], [0, 0, 1], [6, 7, 8], [11, 10, 0]]
    for rank, (fetched, gathered, summed) in enumerate(four_ranks.run(fetch_on_a_rank, wanted)):
        assert fetched == wanted[rank]
        assert gathered == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
        assert summed


def test_a_micro_batch_below_the_share_is_refused_unless_it_is_the_pool(tiny) -> None:
    heads = ("model.contrast={width: 16}", "training.micro_batch_size=4")
    for more, good in (("", False), (", pool: micro_batch", True)):
        streams = f"stages.0.streams=[{{name: itc, source: pairs, objective: contrast{more}}}]"
        recipe = tiny_recipe(tiny, *heads, streams)
        if good:
            assert plan_step({}, recipe, recipe.stages[0], 2, "x.json").micro_batches("pairs") == 2
        else:
            with pytest.raises(UserError, match="stream itc of stage pretrain compares all 16 samples"):
                plan_step({}, recipe, recipe.stages[0], 2, "x.json")
    recipe = tiny_recipe(tiny, *heads, "stages.0.streams=[{name: itc, source: pairs, objective: contrast}]")
    assert plan_step({}, recipe, recipe.stages[0], 4, "x.json").micro_batches("pairs") == 1


@pytest.mark.parametrize(("objective", "head"), [("contrast", "contrast"), ("contrast_matching", "contrast")])
def test_a_head_that_is_not_built_is_named(tiny, objective: str, head: str) -> None:
    tree = tiny_recipe(tiny).model_dump(mode="json")
    tree["stages"][0]["streams"] = [{"name": "s", "source": "pairs", "objective": objective}]
    with pytest.raises(UserError, match=f"has the objective {objective}, but model.{head} is null"):
        parse_recipe(tree, "r.yaml")
