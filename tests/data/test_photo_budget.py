"""Windows of identities that hold a number of photos: nobody lost, nobody twice, found without counting from the start."""

import itertools

import numpy as np
import pytest

from omniid.data.photo_budget import PhotoBudget


@pytest.mark.parametrize("num_inputs", [(1, 3), (1, 8), (3, 3), (2, 5), (1, 1)], ids=str)
@pytest.mark.parametrize("photos", [8, 13, 64])
def test_windows_take_every_identity_once_and_hold_their_photos(num_inputs, photos):
    budget, (low, high) = PhotoBudget(num_inputs, photos, seed=3), num_inputs
    windows = [budget.window(w) for w in range(60)]
    places = [place for places, _ in windows for place in places]
    sizes = [size for _, sizes in windows for size in sizes]
    assert places == list(range(len(places)))
    assert all(places for places, _ in windows)
    assert all(photos - high < sum(sizes) < photos + high for _, sizes in windows)
    # What a window exceeds the next one lacks.
    assert 0 <= sum(sizes) - 60 * photos < high
    kinds = high - low + 1
    runs = [sizes[i : i + kinds] for i in range(0, len(sizes) - kinds + 1, kinds)]
    assert all(sorted(run) == list(range(low, high + 1)) for run in runs)


def test_a_window_is_found_without_those_before_it():
    budget = PhotoBudget((1, 8), 256, seed=0)
    far = budget.window(10**9)
    assert far == PhotoBudget((1, 8), 256, seed=0).window(10**9)
    assert 256 - 8 < sum(far[1]) < 256 + 8
    following = budget.window(10**9 + 1)
    assert following[0][0] == far[0][-1] + 1


def test_sizes_are_drawn_uniformly_and_by_the_seed():
    places, sizes = PhotoBudget((1, 4), 10_000, seed=1).window(5)
    assert np.bincount(sizes, minlength=5)[1:] == pytest.approx([len(places) / 4] * 4, abs=1)
    assert [int(size) for size in sizes[:40]] != PhotoBudget((1, 4), 10_000, seed=2).window(5)[1][:40]


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_of_a_window_are_the_window(parts):
    whole, part = PhotoBudget((1, 3), 24, seed=0), PhotoBudget((1, 3), 24 // parts, seed=0)
    for number in (0, 7, 1000):
        pieces = [part.window(number * parts + i) for i in range(parts)]
        assert whole.window(number) == tuple([*itertools.chain(*lists)] for lists in zip(*pieces, strict=True))


def test_a_budget_below_one_identity_is_refused():
    with pytest.raises(ValueError, match="2 photos cannot hold an identity of 3"):
        PhotoBudget((1, 3), 2, seed=0)
