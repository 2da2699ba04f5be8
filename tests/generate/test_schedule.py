"""Strength over steps and blocks."""

import pytest

from omniid.generate import GenerateError, Schedule
from omniid.generate.schedule import Window, block_scales
from omniid.models.flux import FluxLayout

LAYOUT = FluxLayout(num_double_blocks=2, num_single_blocks=3, num_heads=1, head_dim=8)


@pytest.mark.parametrize(
    ("values", "num_steps", "expected"),
    [
        ((0.8,), 3, [0.8, 0.8, 0.8]),
        ((1.0, 0.0), 5, [1.0, 0.75, 0.5, 0.25, 0.0]),
        ((3.0, 1.0, 2.0), 3, [3.0, 1.0, 2.0]),
        ((3.0, 1.0, 2.0), 1, [3.0]),
        ((0.0, 2.0, 0.0), 2, [0.0, 0.0]),
    ],
)
def test_values_are_spread_over_the_steps(values, num_steps, expected):
    assert [Schedule(values).at(step, num_steps) for step in range(num_steps)] == pytest.approx(expected)


@pytest.mark.parametrize("values", [(), (1.0, float("nan")), (float("inf"),)])
def test_schedules_that_cannot_be(values):
    with pytest.raises(GenerateError, match="must be finite"):
        Schedule(values)


def test_the_window_takes_whole_steps():
    assert [Window(0.25, 0.75).contains(step, 4) for step in range(4)] == [False, True, True, False]
    assert not any(Window(0.5, 0.5).contains(step, 4) for step in range(4))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [1, 1, 1, 1, 1]),
        ("double=0.5", [0.5, 0.5, 1, 1, 1]),
        ("single=2, 4=0", [1, 1, 2, 2, 0]),
        ("0-4=0,1-2=-1", [0, -1, -1, 0, 0]),
    ],
)
def test_blocks_are_named(text, expected):
    assert block_scales(text, LAYOUT) == expected


@pytest.mark.parametrize("text", ["single", "single=", "single=x", "triple=1", "3-5=1", "2-1=1", "double=nan"])
def test_blocks_that_are_not_there(text):
    with pytest.raises(GenerateError, match=r"blocks from 0 to 4"):
        block_scales(text, LAYOUT)
