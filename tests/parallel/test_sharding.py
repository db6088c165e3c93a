"""The table of which part of a weight a process holds: parts cover the whole, once."""

from __future__ import annotations

import pytest
import torch

from eve.config import Model, Parallel, load_recipe
from eve.errors import UserError
from eve.model import parameter_shapes
from eve.parallel.sharding import EXPERT, TABLE, Kind, canonical, cut, join, padded_vocabulary, placement
from eve.parallel.topology import Topology, check_degrees

TINY = load_recipe("eve_tiny", ["model.relative_positions=blocks"]).model


@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 1), (4, 4), (1, 2)])
def test_parts_of_every_weight_make_the_whole(tensor: int, expert: int) -> None:
    shapes = parameter_shapes(TINY)
    for name, shape in shapes.items():
        where = placement(name, shapes.keys())
        whole = torch.randn(shape)
        size = expert if where.kind is Kind.EXPERT else tensor
        parts = [cut(whole, where, tensor=(r, tensor), expert=(r, expert)) for r in range(size)]
        assert torch.equal(join(parts, where, vocab_size=TINY.vocab_size), whole), name
        if size > 1 and where.kind not in (Kind.REPLICATED, Kind.ROW_BIAS):
            assert {part.numel() * size for part in parts} >= {whole.numel()} or where.kind is Kind.VOCABULARY
            assert all(part.shape == parts[0].shape for part in parts), name


def test_heads_stay_whole_in_a_fused_projection() -> None:
    """Rank 1 of 2 gets the second half of the queries, of the keys and of the values."""
    weight = torch.arange(12.0)[:, None].expand(12, 2)
    where = placement("encoder.blocks.0.attention.qkv.weight", [])
    part = cut(weight, where, tensor=(1, 2), expert=(0, 1))
    assert part[:, 0].tolist() == [2, 3, 6, 7, 10, 11]


@pytest.mark.parametrize(
    ("vocab_size", "tensor", "padded"), [(40, 1, 40), (41, 1, 41), (40, 2, 48), (64000, 4, 64000), (1, 4, 32)]
)
def test_padding_of_the_vocabulary(vocab_size: int, tensor: int, padded: int) -> None:
    assert padded_vocabulary(vocab_size, tensor) == padded


def test_a_bank_is_cut_by_experts_where_a_router_chooses_them() -> None:
    names = parameter_shapes(TINY).keys()
    assert placement("encoder.blocks.0.feed_forward.experts.text.w1_DF", names).kind is Kind.COLUMN
    assert placement("encoder.blocks.4.feed_forward.experts.w1_EDF", names) == EXPERT
    assert placement("encoder.blocks.4.feed_forward.experts.b2_ED", names) == EXPERT
    spread = "encoder.blocks.4.feed_forward.experts.deepspeed_moe.experts.deepspeed_experts.w1_EDF"
    assert canonical(spread) == "encoder.blocks.4.feed_forward.experts.w1_EDF"


def test_every_line_of_the_table_is_of_use() -> None:
    names = parameter_shapes(TINY).keys()
    for pattern, _ in TABLE:
        assert any(pattern.search(name) for name in names), pattern


@pytest.mark.parametrize(
    ("tensor", "expert", "processes", "sentence"),
    [
        (3, 1, 4, "parallel.tensor 3 does not divide the 4 processes"),
        (1, 3, 4, "parallel.expert 3 does not divide the 4 processes"),
        (4, 2, 8, "parallel.expert 2 is not a multiple of parallel.tensor 4"),
        (8, 1, 8, "model.heads 4 is not a multiple of parallel.tensor 8"),
        (1, 8, 8, "num_experts 4 is not a multiple of parallel.expert 8"),
    ],
)
def test_degrees_that_do_not_fit(tensor: int, expert: int, processes: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        check_degrees(Parallel(tensor=tensor, expert=expert), TINY, processes)


def test_experts_to_spread_are_wanted() -> None:
    tree = TINY.model_dump() | {"feed_forward": [{"blocks": "0-5", "router": "modality"}]}
    with pytest.raises(UserError, match=r"no block of model\.feed_forward has a topk router"):
        check_degrees(Parallel(expert=2), Model.model_validate(tree), 2)


def test_places_of_the_picture_in_the_docstring() -> None:
    """8 ranks, tensor 2, expert 4."""
    ranks = [Topology(r, 8, 0, torch.device("cpu"), tensor=2, expert=4) for r in range(8)]
    assert [t.data_rank for t in ranks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [t.tensor_rank for t in ranks] == [0, 1] * 4
    assert [t.expert_rank for t in ranks] == [0, 1, 2, 3] * 2
    assert ranks[3].get_data_parallel_group_ranks() == [1, 3, 5, 7]
    assert ranks[0].data == 4
    assert [t.is_counted for t in ranks] == [True, False] * 4


def test_a_share_of_the_hidden_width_fills_whole_words() -> None:
    odd = Model.model_validate(TINY.model_dump() | {"hidden": 520})
    check_degrees(Parallel(tensor=1), odd, 2)
    with pytest.raises(UserError, match=r"model\.hidden 520 over parallel\.tensor 2 is not a multiple of 8"):
        check_degrees(Parallel(tensor=2), odd, 2)
