"""Rates as functions of the step."""

from itertools import pairwise

import pytest

from omniid.train.schedule import ema_decay, learning_rate

SETTINGS = {"lr": 2.0, "warmup_steps": 10, "steps": 110, "min_lr_ratio": 0.1}


def test_warm_up_is_linear_and_never_zero():
    assert [learning_rate(step, **SETTINGS) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])


def test_cosine_falls_to_its_end_and_stays():
    values = [learning_rate(step, **SETTINGS) for step in range(10, 130)]
    assert values[0] == pytest.approx(2.0) and values[50] == pytest.approx(1.1)
    assert values[100:] == pytest.approx([0.2] * 20)
    assert all(a >= b for a, b in pairwise(values))


def test_ema_starts_short():
    assert ema_decay(0, 0.999) == pytest.approx(0.1)
    assert ema_decay(10**6, 0.999) == 0.999
