"""Which parts of which photos single queries of the encoder look at, as overlays on the photos (Fig. 10)."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from omniid.contact_sheet import contact_sheet
from omniid.models.encoder import OmniIDEncoder

_STRENGTH = 0.65  # of the heat over the photo


def photo_attention(encoder: OmniIDEncoder, crops: Sequence[np.ndarray]) -> np.ndarray:
    """(L, M, G, G) float32 attention of each query over the G x G patches of each of one person's crops.

    crops: M aligned crops, uint8 (H, H, 3) of the tower's size. The mean over heads in the last cross block; the class
    tokens' part is left out, so a query's values sum to at most 1.
    """
    images = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 127.5 - 1
    attention = encoder.attention_to_photos(images.to(encoder.queries.device))[..., 1:]
    grid = encoder.tower_config.image_size // encoder.tower_config.patch_size
    return attention.unflatten(-1, (grid, grid)).float().cpu().numpy()


def photo_shares(attention: np.ndarray) -> np.ndarray:
    """(L, M) how a query's attention (L, M, G, G) is spread over the photos; rows sum to 1."""
    totals = attention.sum((2, 3))
    return totals / totals.sum(1, keepdims=True)


def telling_queries(attention: np.ndarray, count: int) -> list[int]:
    """`count` queries to show: the most concentrated first, each at another place of the face than those before.

    attention: (L, M, G, G). The place of a query is the centre of its attention, all photos laid over each other.
    """
    num_queries, _, grid, _ = attention.shape
    maps = attention.sum(1) / attention.sum((1, 2, 3), keepdims=False)[:, None, None]
    y, x = np.mgrid[:grid, :grid] / grid
    places = np.stack([(maps * x).sum((1, 2)), (maps * y).sum((1, 2))], axis=1)
    spread = -(maps * np.log(maps + 1e-12)).sum((1, 2))
    chosen = [int(spread.argmin())]
    while len(chosen) < min(count, num_queries):
        distances = np.linalg.norm(places[:, None] - places[None, chosen], axis=-1).min(1)
        distances[chosen] = -np.inf
        # Distance first; of places about as far away, the sharper.
        chosen.append(int((distances - 0.05 * spread).argmax()))
    return chosen


def overlay(crop: np.ndarray, attention: np.ndarray, top: float) -> Image.Image:
    """The crop with its attention (G, G) as heat; `top` is what counts as full heat."""
    size = crop.shape[0]
    heat = Image.fromarray(np.clip(attention / max(top, 1e-12), 0, 1).astype(np.float32))
    heat = np.clip(np.asarray(heat.resize((size, size), Image.Resampling.BICUBIC)), 0, 1)[..., None]
    gray = crop.mean(-1, keepdims=True).repeat(3, axis=-1)
    # Black over red to yellow, as a thermal camera's.
    colour = (
        np.concatenate([np.clip(3 * heat, 0, 1), np.clip(3 * heat - 1, 0, 1), np.clip(3 * heat - 2, 0, 1)], -1) * 255
    )
    blend = _STRENGTH * np.sqrt(heat)
    return Image.fromarray(((1 - blend) * gray + blend * colour).round().astype(np.uint8))


def attention_sheet(
    encoder: OmniIDEncoder, crops: Sequence[np.ndarray], queries: Sequence[int] | int = 6, names: Sequence[str] = ()
) -> Image.Image:
    """The photos in the first column and, in each further one, the attention of one query over them: Fig. 10.

    queries: which ones, or how many `telling_queries`. A query's heat has one scale over all photos.
    """
    attention = photo_attention(encoder, crops)
    shown = telling_queries(attention, queries) if isinstance(queries, int) else list(queries)
    columns = {"photo": [Image.fromarray(crop) for crop in crops]}
    for query in shown:
        top = float(attention[query].max())
        columns[f"query {query}"] = [overlay(crop, one, top) for crop, one in zip(crops, attention[query], strict=True)]
    return contact_sheet(columns, names or [f"photo {index + 1}" for index in range(len(crops))])
