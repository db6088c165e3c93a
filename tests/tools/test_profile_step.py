"""tools/profile_step.py: the search for a batch, what is generated, and where time is said to go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from eve.data.batch import collate
from tests.objectives.test_masked_codes import TINY, make_tokenizer
from tests.tiny import tiny_recipe
from tools.benchmark_step import plain_step
from tools.kernel_groups import GROUPS, routers_named, seconds_by_group
from tools.profile_step import (
    dense_twin,
    largest_batch,
    layer_seconds,
    layer_with_inputs,
    main,
    without_routed_experts,
)
from tools.step_samples import CAPTION_TOKENS, Samples, generated_samples

CPU = torch.device("cpu")


@pytest.mark.parametrize("limit", [31, 32, 33, 100, 511, 512, 2000, 8192, 9000])
def test_the_largest_batch_is_found_to_an_eighth(limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    found = largest_batch(fits, first=32, most=8192)
    assert len(tried) == len(set(tried)) <= 13
    if limit < 32:
        assert found == 0
    else:
        assert found in tried
        assert found <= min(limit, 8192) < found + found // 8 + 1


def test_generated_samples_are_what_the_recipe_reads(tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    samples = generated_samples(recipe, range(40))
    again = generated_samples(recipe, range(20, 40))
    assert all((a.image_CHW == b.image_CHW).all() for a, b in zip(samples[20:], again, strict=True))  # pyright: ignore
    lengths = {len(sample.tokens_N) for sample in samples}  # pyright: ignore
    assert min(lengths) >= CAPTION_TOKENS[0]
    assert max(lengths) <= min(CAPTION_TOKENS[1], recipe.model.max_text_length)
    assert len(lengths) > 3
    for sample in samples:
        image, text = sample.masks["masked_image"], sample.masks["masked_text"]
        assert sorted([*image["visible_V"], *image["masked_M"]]) == list(range(16))
        assert len(image["masked_M"]) == 12
        assert (sample.tokens_N[text["position_N"]] == text["target_N"]).all()  # pyright: ignore
        assert (sample.tokens_N < recipe.model.vocab_size).all()  # pyright: ignore
    # The recipe's own step takes them, and learns.
    step, module = plain_step(recipe, CPU)
    before = [parameter.clone() for parameter in module.parameters()]
    step(collate(samples[:8]))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    assert sum(moved) > 0.8 * len(moved)


def test_real_pictures_are_taken_where_they_are(tiny: Path) -> None:
    shards = f"evaluation.shards={{held out: {tiny.parent}/train/*.tar}}"
    samples = Samples(tiny_recipe(tiny, shards), CPU)
    assert samples.real
    assert samples.kind == "90 real pairs"
    batch = samples.batch(64, number=1)  # 26 real ones, then again from the first
    assert [sample.key for sample in batch.samples[:27]] == [*(s.key for s in samples.samples[64:]), "00000"]
    generated = Samples(tiny_recipe(tiny), CPU)
    assert not generated.real
    assert "generated" in generated.kind
    assert generated.batch(3).size == 3


def test_bf16_steps_follow_fp32_steps(tiny: Path) -> None:
    """The bf16 module is the rounded fp32 copy, and that copy moves as a step in fp32 moves it."""
    recipe = tiny_recipe(tiny, "model.drop_path=0.0", "model.text_dropout=0.0")
    batch = collate(generated_samples(recipe, range(8)))
    (exact, module), (rounded, small) = plain_step(recipe, CPU), plain_step(recipe, CPU, torch.bfloat16)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    assert {parameter.dtype for parameter in small.parameters()} == {torch.bfloat16}
    for _ in range(2):
        exact(batch)
        rounded(batch)
    # Adam's steps have the size of the learning rate: signs of the moves agree but for small gradients.
    agree = total = 0
    for first, wanted, found in zip(start, module.parameters(), small.parameters(), strict=True):
        far = (wanted - first).abs() > 2.0**-8 * first.abs() + 1e-6
        agree += int(((wanted - first).sign() == (found.float() - first).sign())[far].sum())
        total += int(far.sum())
        assert torch.isfinite(found).all()
    assert agree > 0.9 * total > 0


def test_a_recipe_of_codes_is_measured_with_its_visual_tokenizer(tiny: Path, tmp_path: Path) -> None:
    codes = make_tokenizer(tmp_path, 32, 8, 12)
    streams = "stages.0.streams=[{name: codes, source: pairs, objective: masked_codes}]"
    recipe = tiny_recipe(tiny, *TINY, streams, f"data.visual_tokenizer={codes}")
    batch = collate(generated_samples(recipe, range(4)))
    assert set(batch.masks) == {"codes"}
    found = layer_seconds(recipe, batch, 1, CPU, torch.float32)
    assert found is not None
    assert {name: len(seconds) for name, seconds in found.items()} == {"routed": 1, "dense": 1}


def test_hard_routers_replace_learned_ones(tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    dense = without_routed_experts(recipe.model)
    assert [recipe.model.feed_forward_of(block).router for block in range(2)] == ["modality", "topk"]
    assert [dense.feed_forward_of(block).router for block in range(2)] == ["modality", "modality"]


def test_the_dense_layer_has_the_weights_of_the_experts_of_a_token(tiny: Path) -> None:
    recipe = tiny_recipe(tiny)
    batch = collate(generated_samples(recipe, range(4)))
    found = layer_seconds(recipe, batch, 3, CPU, torch.float32)
    assert found is not None
    assert {name: len(seconds) for name, seconds in found.items()} == {"routed": 3, "dense": 3}
    weights = {}
    for name, model in (("routed", recipe.model), ("dense", dense_twin(recipe.model, 2))):
        layer, (x_TD, *_) = layer_with_inputs(model, recipe, 1, batch, CPU, torch.float32)
        assert x_TD.shape == (4 * 17 + sum(batch.text_lengths), 32)  # image tokens with [CLS], text tokens
        parameters = layer.get_submodule("experts").named_parameters()
        weights[name] = sum(p.numel() for each, p in parameters if each.rpartition(".")[-1].startswith("w"))
    # Two products of 32 x 64 an expert, of which there are four; a token sees two.
    assert weights == {"routed": 4 * 2 * 32 * 64, "dense": 2 * 2 * 32 * 64}


def test_a_recipe_without_learned_routers_has_no_layer_to_compare(tiny: Path) -> None:
    recipe = tiny_recipe(tiny, "model.feed_forward=[{blocks: 0-1, router: shared}]")
    batch = collate(generated_samples(recipe, range(2)))
    assert layer_seconds(recipe, batch, 1, CPU, torch.float32) is None


class AnyRouter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(700, 700))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def test_the_backward_of_a_scope_belongs_to_it() -> None:
    """A router whose products take nearly all time, once named and once not."""
    module = nn.Sequential(AnyRouter(), nn.Linear(700, 1))
    x = torch.randn(700, 700, requires_grad=True)
    shares = {}
    for named in (True, False):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            if named:
                with routers_named(module):
                    y = module(x)
            else:
                y = module(x)
            y.sum().backward()
        found = seconds_by_group(profiler.events() or (), CPU)
        assert list(found.values()) == sorted(found.values(), reverse=True)
        assert found.keys() == set(GROUPS)
        shares[named] = {group: seconds / sum(found.values()) for group, seconds in found.items()}
    assert shares[True]["routing"] > 0.8  # forward alone is a third
    assert shares[True]["dense products"] < 0.15
    assert shares[False]["routing"] == 0
    assert shares[False]["dense products"] > 0.8


def test_the_optimizer_and_attention_are_groups_of_their_own() -> None:
    weight = nn.Parameter(torch.randn(400_000))
    weight.grad = torch.ones_like(weight)
    optimizer = torch.optim.AdamW([weight])
    query = torch.randn(1, 2, 64, 32)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        optimizer.step()
        nn.functional.scaled_dot_product_attention(query, query, query)
    found = seconds_by_group(profiler.events() or (), CPU)
    assert found["optimizer"] > 0
    assert found["attention"] > 0
    assert found["norms, elementwise"] == 0


def test_mistakes_get_one_sentence(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, sentence in (
        (["--recipe", str(tiny), "--device", "cpu"], "on a CPU give --batch"),
        (["--recipe", str(tiny), "--device", "cpu", "--batch", "0"], "--batch is 0, expected at least 1"),
        (["--recipe", str(tiny), "--device", "foo"], "--device is 'foo', expected cuda or cpu"),
        (["--recipe", str(tiny), "--device", "cpu", "--memory", "2"], "--memory is 2, expected a share"),
        (["--recipe", "eve_bas", "--device", "cpu", "--batch", "1"], "did you mean eve_base?"),
    ):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err
