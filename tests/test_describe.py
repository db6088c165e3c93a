"""python -m eve.describe: published sizes, by the formula of the layers."""

from __future__ import annotations

import pytest

from eve.config import load_recipe
from eve.describe import PUBLISHED, main
from eve.model import count_parameters, parameter_shapes


def test_vl_moe_has_the_published_sizes() -> None:
    """1.9B and 180M. By hand: the dense twin and 31 more experts in two pools of six blocks."""
    model = load_recipe("vl_moe_base_32e").model
    count = count_parameters(model)
    expert = 2 * 768 * 3072 + 768 + 3072
    shapes = parameter_shapes(model)
    gates = sum(shape.numel() for name, shape in shapes.items() if ".router." in name)
    assert gates == 6 * 64 * 768
    assert count.encoder - count.activated == 6 * 2 * 31 * expert
    assert round(count.activated / 1e6) == 180
    assert round(count.encoder / 1e9, 1) == 1.9


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "momo_base"])
def test_every_recipe_is_near_its_published_size(name: str) -> None:
    total, activated, _ = PUBLISHED[name]
    count = count_parameters(load_recipe(name).model)
    assert total is not None
    assert count.encoder / 1e6 == pytest.approx(total, rel=0.03)
    if activated is not None:
        assert count.activated / 1e6 == pytest.approx(activated, rel=0.01)


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    table = capsys.readouterr().out
    assert "| vlmo_base | 175.4 | 175.4 |" in table
    assert main(["vl_moe_base_32e", "stages.0.steps=70000"]) == 0
    one = capsys.readouterr().out
    assert "| 11 | topk | 32 image, 32 text; pairs: 1 dense | 1 | 1.05, priority |" in one
    assert "| pretrain | 70,000 |" in one
    assert main(["no_such_recipe"]) == 2
    assert "no recipe 'no_such_recipe'" in capsys.readouterr().err
