"""Tables of positions for another size: against formulas written out, and what has to stay."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from eve.conversion.foreign.positions import (
    centred,
    resize_absolute,
    resize_offsets,
    resize_relative,
    resize_text,
    spline_matrix,
    spread_offsets,
)
from eve.model.relative_positions import image_index, num_rows, pair_index


@pytest.mark.parametrize("size", [5, 7, 13])
def test_the_spline_is_the_cubic_without_a_knot_near_the_ends(size: int) -> None:
    """Its conditions, each on its own: through all points, smooth to the second derivative at inner places,
    and to the third at the second and the last but one."""
    rng = np.random.default_rng(size)
    places = np.sort(rng.normal(size=size)) * 3
    values = rng.normal(size=size)

    def spline(at: np.ndarray) -> np.ndarray:
        return spline_matrix(places, at) @ values

    assert spline(places) == pytest.approx(values, abs=1e-9)
    pieces = []
    for left, right in pairwise(places):
        inside = np.linspace(left, right, 9)[1:-1]
        # Four points make the polynomial, the others say whether it is one.
        piece = np.polynomial.Polynomial.fit(inside[::2], spline(inside[::2]), 3)
        assert piece(inside) == pytest.approx(spline(inside), abs=1e-8)
        pieces.append(piece)
    for number, (before, after) in enumerate(pairwise(pieces)):
        at = places[number + 1]
        smooth = 3 if number in (0, len(pieces) - 2) else 2
        for order in range(smooth + 1):
            one, other = (p.deriv(order)(at) if order else p(at) for p in (before, after))
            assert one == pytest.approx(other, rel=1e-4, abs=1e-5), (at, order)


def test_beyond_the_ends_the_spline_keeps_its_last_value_and_few_places_have_lower_degrees() -> None:
    places = np.array([-2.0, -1, 0, 1, 2])
    matrix = spline_matrix(places, np.array([-5.0, 9.0]))
    assert matrix == pytest.approx(np.eye(5)[[0, 4]])
    parabola = spline_matrix(np.array([-1.0, 0, 1]), np.array([0.5])) @ np.array([1.0, 0, 1])
    assert parabola == pytest.approx([0.25])
    assert spline_matrix(np.zeros(1), np.array([-1.0, 2])) == pytest.approx(np.ones((2, 1)))


@pytest.mark.parametrize(("size", "over"), [(27, 47), (15, 23), (27, 59), (7, 9)])
def test_offsets_spread_in_a_geometric_progression(size: int, over: int) -> None:
    places = spread_offsets(size, over)
    assert places == pytest.approx(-places[::-1])
    assert places[size // 2] == 0
    steps = np.diff(places[size // 2 :])
    assert steps[0] == 1
    assert steps[1:] / steps[:-1] == pytest.approx(np.full(size // 2 - 1, steps[1]))
    assert places[-1] == pytest.approx(over // 2, abs=1e-3)


def test_offsets_of_patches_are_read_off_the_spline_along_both_sides() -> None:
    """A function of the offsets that a cubic spline holds exactly: a product of two cubics."""
    size, over = 9, 15

    def height(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.outer(rows**3 - 2 * rows, 0.5 * columns**2 - columns + 1)

    places = spread_offsets(size, over)
    table = torch.from_numpy(height(places, places)).reshape(1, size * size, 1)
    found = resize_offsets(table, over)
    read = np.clip(centred(over), places[0], places[-1])
    expected = torch.from_numpy(height(read, read)).reshape(1, over * over, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-7)


def test_a_table_keeps_its_rows_of_class_tokens_and_words() -> None:
    """Read through the indices of the model: what a query and a key that stay have between them."""
    side, new_side, length, new_length = 3, 5, 9, 6
    table_TRH = torch.randn(2, num_rows(side, length), 3, generator=torch.Generator().manual_seed(0))
    found_TRH = resize_relative(table_TRH, side, new_side, length, new_length)
    assert found_TRH.shape == (2, num_rows(new_side, new_length), 3)
    before, after = table_TRH[:, pair_index(side, length)], found_TRH[:, pair_index(new_side, new_length)]
    image, new_image = 1 + side**2, 1 + new_side**2
    words = slice(image, image + new_length)
    assert torch.equal(after[:, new_image:, new_image:], before[:, words, words])
    for place, new_place in ((0, 0), (image - 1, new_image - 1)):
        assert torch.equal(after[:, new_place, new_image:], before[:, place, words])
        assert torch.equal(after[:, new_image:, new_place], before[:, words, place])
    assert torch.equal(after[:, 0, :2], before[:, 0, :2])
    assert torch.equal(after[:, 1, 0], before[:, 1, 0])
    # No offset stays where it was.
    same = image_index(side)[1:, 1:]
    assert torch.equal(after[:, 1, 1], before[:, 1, 1])
    assert not torch.allclose(found_TRH[:, : same.max() + 1], table_TRH[:, : same.max() + 1])


def test_a_longer_text_has_rows_to_fill() -> None:
    table_TRH = torch.randn(1, num_rows(2, 4), 2, generator=torch.Generator().manual_seed(0))
    found_TRH = resize_relative(table_TRH, 2, 2, 4, 7)
    index, new_index = pair_index(2, 4), pair_index(2, 7)
    old = found_TRH[:, new_index[: 5 + 4, : 5 + 4]]
    assert torch.equal(old, table_TRH[:, index])
    assert int(found_TRH[0, :, 0].isnan().sum()) == 6
    assert torch.equal(resize_relative(found_TRH, 2, 2, 7, 4), table_TRH)


def keys_kernel(x: np.ndarray) -> np.ndarray:
    """Cubic convolution (Keys 1981), a = -0.75."""
    a, x = -0.75, np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@pytest.mark.parametrize("side", [3, 6, 7])
def test_absolute_positions_are_resized_bicubically(side: int) -> None:
    before, width = 4, 5
    position_ND = torch.randn(1 + before**2, width, generator=torch.Generator().manual_seed(1))
    found = resize_absolute(position_ND, side)
    matrix = np.zeros((side, before))
    for target in range(side):
        centre = (target + 0.5) * before / side - 0.5
        for source in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[target, np.clip(source, 0, before - 1)] += keys_kernel(np.array(centre - source))
    grid = position_ND[1:].double().numpy().reshape(before, before, width)
    expected = np.einsum("ai,bj,ijd->abd", matrix, matrix, grid).reshape(side**2, width)
    assert torch.equal(found[0], position_ND[0])
    assert found[1:].numpy() == pytest.approx(expected, abs=1e-5)


def test_text_positions_are_cut_or_left_to_fill() -> None:
    position_ND = torch.arange(8.0).view(4, 2)
    assert torch.equal(resize_text(position_ND, 3), position_ND[:3])
    longer = resize_text(position_ND, 6)
    assert torch.equal(longer[:4], position_ND)
    assert bool(longer[4:].isnan().all())
