"""Random numbers of a training step, the same for an identity however a step is split over processes and micro-batches."""

from collections.abc import Sequence

import numpy as np
import torch


def identity_generators(seed: int, places: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for each place in the endless sequence of identities that a run sees."""
    # A generator keeps 32 bits of its seed: mixed, so that neither runs nor places share their numbers.
    return [
        torch.Generator().manual_seed(int(np.random.SeedSequence((seed, place)).generate_state(1)[0]))
        for place in places
    ]


def uniform(generators: Sequence[torch.Generator], count: int, *each: int) -> torch.Tensor:
    """(count, *each) of [0, 1); each generator draws for the same number of rows in turn."""
    return torch.cat([torch.rand(count // len(generators), *each, generator=one) for one in generators])


def normal(generators: Sequence[torch.Generator], count: int, *each: int) -> torch.Tensor:
    """As `uniform`, of mean 0 and deviation 1."""
    return torch.cat([torch.randn(count // len(generators), *each, generator=one) for one in generators])
