"""Intervals over people and seeds, and verdicts that follow from them."""

import numpy as np
import pytest

from omniid.evaluate.figure import interval
from omniid.reproduce.estimate import difference, estimate
from omniid.reproduce.orderings import certainty, paper_orderings, rising, summary


@pytest.fixture
def people():
    return np.random.default_rng(0).normal(size=(1, 64))


def test_one_seed_gives_the_interval_over_people(people):
    ours = estimate(people)
    low, high = interval(lambda rows: people[0][rows].mean(-1), 64)
    assert ours.value == pytest.approx(people.mean())
    assert (ours.low, ours.high) == pytest.approx((low, high), abs=0.03)


def test_seeds_that_disagree_widen_the_interval(people):
    agreeing, apart = np.repeat(people, 3, 0), people + np.array([[-1.0], [0.0], [1.0]])
    widths = [one.high - one.low for one in map(estimate, (agreeing, apart))]
    assert widths[1] > 2 * widths[0]


def test_differences_are_paired(people):
    ours = difference(people + 0.01, people)
    assert ours.low == pytest.approx(0.01) and ours.high == pytest.approx(0.01) and ours.sign == 1
    with pytest.raises(ValueError, match=r"cannot compare values of \(1, 64\) with those of \(1, 63\)"):
        difference(people, people[:, 1:])
    with pytest.raises(ValueError, match="need finite values"):
        estimate(np.full((1, 2), np.nan))


def test_verdicts_come_from_the_numbers(people):
    noise = np.random.default_rng(1).normal(size=(1, 64))
    ours = [people, people + 0.5, people + noise * 5, people - 0.5]
    labels, paper = ["A", "B", "C", "D"], [0.6, 0.7, 0.65, 0.8]
    found = {(one.higher, one.lower): one.verdict for one in paper_orderings(labels, paper, ours)}
    assert found["B", "A"] == "holds" and found["D", "A"] == "is reversed" and found["C", "A"] == "cannot be told"
    assert len(found) == 6
    text = summary("id similarity", paper_orderings(labels[:2], paper[:2], ours[:2]))
    assert (
        "of 1 ordering of the paper 1 hold, 0 are reversed" in text and "Hold: B > A (+0.500 [+0.500, +0.500])" in text
    )


def test_rows_without_a_number_and_equal_numbers_take_no_part(people):
    assert paper_orderings(["A", "B", "C"], [0.5, None, 0.5], [people] * 3) == []
    assert [one.verdict for one in rising(["1", "3"], [people, people + 1])] == ["holds"]


def test_certainty_says_how_many_seeds(people):
    assert "one training seed" in certainty(1, 64, 30) and "about 3 would" in certainty(1, 64, 30)
    assert "3 training seeds" in certainty(3, 64, 30)
