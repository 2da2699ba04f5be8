"""Computing what a stage keeps on disk of its frozen parts (`train.flow.cache_latents`, `train.control.cache_latents`)."""

import contextlib
import hashlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from omniid.data.few_to_many import Batch
from omniid.data.latent_cache import LatentCache, LatentCacheError, LatentSource
from omniid.data.records import decode_image, decode_mask, scaled_landmarks
from omniid.faces.landmarks import draw_landmarks, mirror_landmarks
from omniid.models.flux import raw_latents

STALE_S = 3600
"""Age of a temporary file whose writer must have died: a shard is written in seconds."""


def photo_picture(row: Mapping, photo: int, size: int, is_mirrored: bool) -> np.ndarray:
    """A photo as batches show it, uint8 (size, size, 3). Raises RecordError for a damaged one or a damaged mask."""
    picture = decode_image(row["images"][photo], size)
    decode_mask(row["masks"][photo], size)  # a batch that shows the photo itself would find the damage too
    return picture[:, ::-1] if is_mirrored else picture


def landmark_picture(row: Mapping, photo: int, size: int, is_mirrored: bool) -> np.ndarray:
    """The control picture of a photo's landmarks, uint8 (size, size, 3). Raises RecordError for unusable ones."""
    points = scaled_landmarks(row["landmarks"][photo], row["images"][photo], size)
    return draw_landmarks(mirror_landmarks(points, size) if is_mirrored else points, size)


PICTURES = {"latents": photo_picture, "control_latents": landmark_picture}
"""What is seen through the autoencoder, by the field of a batch that gets its latents."""


def cached_latents(
    names: tuple[str, ...],
    folder: Path,
    vae: torch.nn.Module,
    rows,
    size: int,
    mirror: float,
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager],
    rank: int = 0,
    world_size: int = 1,
    progress: bool = False,
) -> dict[str, tuple[LatentCache | None, LatentCache | None]]:
    """Complete caches of the photos in `rows`, as they are and mirrored, where `mirror` lets batches show them so.

    What is missing is computed, said aloud before where `progress`. The latents of a mirrored photo are not the mirrored
    latents, so each has its own. names: of `PICTURES`. folder: of all caches. autocast: what a step runs in.
    Raises LatentCacheError where the disk is too small, before anything is computed.
    """
    vae.to(device)

    def encode(pictures: np.ndarray) -> Tensor:
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device).float().div_(127.5).sub_(1)
        with torch.no_grad(), autocast():
            return raw_latents(vae, images)

    source = LatentSource(rows)
    one = encode(np.zeros((1, size, size, 3), np.uint8))
    encoder = _fingerprint(vae)
    ways = [way for way in (False, True) if (mirror > 0 if way else mirror < 1)]
    caches = {
        name: tuple(
            LatentCache(
                folder,
                source,
                one.shape[1:],
                one.dtype,
                {"encoder": encoder, "picture": name, "size": size, "is_mirrored": way},
            )
            if way in ways
            else None
            for way in (False, True)
        )
        for name in names
    }
    jobs = [(name, way, caches[name][way]) for name in names for way in ways]
    what = f"the latents of {source.num_photos} photos"
    check_disk(folder, [cache for _, _, cache in jobs], what, "cache_latents", progress and rank == 0)
    for name, way, cache in jobs:
        build_shards(
            cache,
            lambda row, photo, name=name, way=way: PICTURES[name](row, photo, size, way),
            encode,
            f"{name}{', mirrored' if way else ''}",
            "cache_latents",
            rank,
            world_size,
            progress,
        )
    return caches


def build_shards(
    cache: LatentCache, picture, encode, title: str, wish: str, rank: int, world_size: int, progress: bool
) -> None:
    """Makes the missing shards; processes take turns, and those that finish first help the others.

    picture, encode: as of `LatentCache.build_shard`. title: for the progress bar. wish: the setting that asks for the cache.
    Raises LatentCacheError where a shard cannot be written.
    """
    missing = cache.missing()
    if not missing:
        return
    cache.folder.mkdir(parents=True, exist_ok=True)
    for path in cache.folder.glob(".*.tmp*"):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()
    mine = missing[rank::world_size]
    for shard in tqdm([*mine, *missing], desc=title, unit="shard", disable=not (progress and rank == 0)):
        if cache.path(shard).exists():
            continue
        try:
            cache.build_shard(shard, picture, encode)
        except (OSError, SafetensorError) as error:
            raise LatentCacheError(
                f"{title} cannot be written to {cache.folder} ({error}); what is there stays usable: "
                f"make room and start again, or leave {wish} out"
            ) from error


def check_disk(folder: Path, caches: list[LatentCache], what: str, wish: str, progress: bool) -> None:
    """Raises LatentCacheError where the missing part of `caches` does not fit; otherwise says how large it is if `progress`."""
    needed = sum(cache.num_bytes(cache.missing()) for cache in caches)
    if needed == 0:
        return
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise LatentCacheError(
            f"{what} take {needed / 1e9:.3g} GB, but {folder} has {free / 1e9:.3g} GB free; "
            f"name a larger disk with cache_folder, or leave {wish} out"
        )
    if progress:
        tqdm.write(f"{what}: {needed / 1e9:.3g} GB more in {folder}", file=sys.stderr)


def _fingerprint(vae: torch.nn.Module) -> str:
    """sha256 of the encoding half of an autoencoder."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_targets(batch: Batch, vae: torch.nn.Module, device: torch.device) -> Tensor:
    """Raw latents (B, T, C, h, w) of a batch's own targets, for a batch that is kept while the encoder is let go."""
    with torch.no_grad():
        images = batch.to_device(device).targets
        return raw_latents(vae, images.flatten(0, 1)).unflatten(0, images.shape[:2])
