"""Decoding the photos of a set once, for all epochs (`train.STAGE.cache_photos`): with small pictures and a fast GPU it is the
JPEGs that a step waits for."""

import concurrent.futures
import multiprocessing
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch

from omniid.data.latent_cache import LatentCache, LatentSource
from omniid.data.records import decode_image, decode_mask
from omniid.train.latents import build_shards, check_disk


def cached_photos(
    folder: Path,
    rows,
    sizes: Iterable[int],
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> dict[int, LatentCache]:
    """A complete cache of the photos in `rows` for each of `sizes`: uint8 (4 * size * size,), the colours (size, size, 3) and
    then the face mask (size, size), so that both are copied as they lie.

    What is missing is decoded, by `workers` processes if there are more than one, and said aloud before where `progress`. A
    photo whose mask is damaged counts as damaged. folder: of all caches. Raises LatentCacheError where the disk is too small,
    before any work.
    """
    source = LatentSource(rows)
    caches = {
        size: LatentCache(folder, source, (4 * size * size,), torch.uint8, {"picture": "photo and mask", "size": size})
        for size in sorted(set(sizes))
    }
    check_disk(
        folder, list(caches.values()), f"{source.num_photos} decoded photos", "cache_photos", progress and rank == 0
    )
    for size, cache in caches.items():
        if workers < 2 or world_size > 1 or len(cache.missing()) < 2:
            _build(cache, size, rank, world_size, progress)
            continue
        # Forked: the rows need not be sent, and nothing that a child does touches the device.
        context = multiprocessing.get_context("fork")
        # One thread each, as in a loader: OpenMP's threads do not survive a fork.
        with concurrent.futures.ProcessPoolExecutor(workers, context, torch.set_num_threads, (1,)) as pool:
            parts = [pool.submit(_build, cache, size, part, workers, progress) for part in range(workers)]
            for part in parts:
                part.result()
    return caches


def _build(cache: LatentCache, size: int, rank: int, world_size: int, progress: bool) -> None:
    def picture(row: Mapping, photo: int) -> np.ndarray:
        colours, mask = decode_image(row["images"][photo], size), decode_mask(row["masks"][photo], size)
        return np.concatenate([colours.ravel(), mask.ravel()], dtype=np.uint8, casting="unsafe")

    build_shards(cache, picture, torch.from_numpy, "photos", "cache_photos", rank, world_size, progress)
