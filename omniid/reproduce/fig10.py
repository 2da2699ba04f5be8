"""Fig. 10: what single queries of the encoder look at in the photos of held-out people.

The paper shows pictures and says that queries settle on regions of the face and move with them. Beside pictures, both
are measured here: the share of attention that falls on the face, and how far a query's place moves when the face, or the
landmark nearest to it, moves. Crops are aligned by eyes and nose, so what is left of a turn moves these two apart.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from omniid.config import load_preset
from omniid.errors import OmniIDError
from omniid.evaluate.attention import attention_sheet, photo_attention
from omniid.evaluate.figure import weights_fingerprint
from omniid.evaluate.people import People, as_pixels, unseen_people
from omniid.files import atomic_path
from omniid.models.encoder import OmniIDEncoder, load_encoder
from omniid.reproduce.estimate import Estimate, estimate
from omniid.reproduce.held_out import held_out_people
from omniid.weights import weights_folder

NUM_SHOWN, NUM_PHOTOS, NUM_QUERIES = 2, 4, 6


@dataclass(frozen=True, slots=True)
class AttentionFigure:
    """What was found; estimates are over people."""

    sheets: list[Image.Image]
    on_face: Estimate
    """Share of the attention over patches that falls on the face."""
    face_area: Estimate
    """Share of the photo that is face: what attention without a preference gives."""
    follows: Estimate
    """Movement of a query's place between photos of a person, in units of that of the face mask's centre; 1 is with it."""
    follows_landmark: Estimate
    """The same with the landmark nearest to the query."""
    num_people: int
    weights: str

    def as_dict(self) -> dict:
        """Plain numbers, without the pictures."""
        numbers = {
            name: asdict(getattr(self, name)) for name in ("on_face", "face_area", "follows", "follows_landmark")
        }
        return numbers | {"num_people": self.num_people, "weights": self.weights}


def attention_figure(
    weights: str | Path = "mini",
    data: str | Path | None = None,
    num_people: int = 32,
    say: Callable[[str], None] = lambda text: None,
) -> AttentionFigure:
    """Measures and draws the attention of a weights folder's encoder.

    data: records whose held-out people are shown; synthetic ones that no training saw if None. Raises OmniIDError for an
    encoder without queries that look at photos.
    """
    folder = weights_folder(weights)
    encoder, size = load_encoder(folder), load_preset(folder / "preset.toml").tower.image_size
    if not isinstance(encoder, OmniIDEncoder):
        raise OmniIDError(f"{folder} holds a baseline's encoder; fig10 shows the queries of kind omniid")
    if data is None:
        say(f"rendering {num_people} people")
        people = unseen_people(num_people, 0, NUM_PHOTOS, size)
    else:
        people = held_out_people(data, num_people, 0, NUM_PHOTOS, size)
    crops = as_pixels(people.targets)
    say("measuring attention")
    maps = np.stack([photo_attention(encoder, list(photos)) for photos in crops])  # (P, L, M, G, G)
    on_face, area = face_shares(maps, people)
    return AttentionFigure(
        sheets=[attention_sheet(encoder, list(photos), NUM_QUERIES) for photos in crops[:NUM_SHOWN]],
        on_face=estimate(on_face[None]),
        face_area=estimate(area[None]),
        follows=estimate(following(maps, mask_centres(people.masks.numpy())[:, :, None])[None]),
        follows_landmark=estimate(following(maps, people.landmarks / size)[None]),
        num_people=len(crops),
        weights=weights_fingerprint(folder),
    )


def face_shares(maps: np.ndarray, people: People) -> tuple[np.ndarray, np.ndarray]:
    """(P,) shares of the attention (P, L, M, G, G) on the faces of targets, and of their area in the photos."""
    grid = maps.shape[-1]
    masks = people.masks.numpy().astype(np.float64)
    cell = masks.shape[-1] // grid
    masks = masks.reshape(*masks.shape[:2], grid, cell, grid, cell).mean((3, 5))  # (P, M, G, G)
    on_face = np.einsum("plmyx,pmyx->p", maps.astype(np.float64), masks) / maps.sum((1, 2, 3, 4))
    return on_face, masks.mean((1, 2, 3))


def mask_centres(masks: np.ndarray) -> np.ndarray:
    """(P, M, 2) x and y in 0..1 of the centres of masks (P, M, H, W)."""
    ticks = (np.arange(masks.shape[-1]) + 0.5) / masks.shape[-1]
    shares = masks / masks.sum((2, 3), keepdims=True)
    return np.stack([shares.sum(2) @ ticks, shares.sum(3) @ ticks], axis=-1)


def following(maps: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
    """(P,) least-squares factor by which queries' places move with the landmarks nearest to them.

    maps: attention (P, L, M, G, G). landmarks: (P, M, K, 2), in 0..1. A query's place in a photo is the centre of its
    attention there.
    """
    grid = maps.shape[-1]
    ticks = (np.arange(grid) + 0.5) / grid
    shares = maps / maps.sum((3, 4), keepdims=True)
    places = np.stack([shares.sum(3) @ ticks, shares.sum(4) @ ticks], axis=-1)  # (P, L, M, 2) x, y
    means, points = places.mean(2), landmarks.mean(1)  # (P, L, 2), (P, K, 2)
    nearest = np.linalg.norm(means[:, :, None] - points[:, None], axis=-1).argmin(-1)  # (P, L)
    chosen = np.take_along_axis(landmarks, nearest[:, None, :, None], axis=2).swapaxes(1, 2)  # (P, L, M, 2)
    moved, wanted = places - means[:, :, None], chosen - chosen.mean(2, keepdims=True)
    return (moved * wanted).sum((1, 2, 3)) / np.maximum((wanted**2).sum((1, 2, 3)), 1e-12)


def write_attention_figure(found: AttentionFigure, out: str | Path, preset: str, command: str) -> Path:
    """Writes `fig10_<preset>.md` and its pictures; returns the report's path."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    names = [f"fig10_{preset}_{index + 1}.png" for index in range(len(found.sheets))]
    for sheet, name in zip(found.sheets, names, strict=True):
        with atomic_path(out / name) as path:
            sheet.save(path)
    with atomic_path(out / f"fig10_{preset}.md") as path:
        path.write_text(_text(found, names, preset, command), encoding="utf-8")
    return out / f"fig10_{preset}.md"


def _text(found: AttentionFigure, names: list[str], preset: str, command: str) -> str:
    prefers = {1: "look at faces more than chance", -1: "look at faces less than chance", 0: "do not prefer faces"}
    ratio = Estimate(*(getattr(found.on_face, name) - found.face_area.value for name in ("value", "low", "high")))
    follows = {1: "move with the face", -1: "move against the face", 0: "do not measurably move with the face"}
    with_landmark = {1: "too", -1: "in the opposite direction", 0: "not measurably"}
    lines = [
        f"# Fig. 10: attention of single queries, preset {preset}",
        f"`{command}`; weights `{found.weights[:12]}`, {found.num_people} people with {NUM_PHOTOS} photos each, 90 % intervals "
        "over people.",
        *(f"![people {index + 1}]({name})" for index, name in enumerate(names)),
        "| | value |\n|---|---|\n"
        f"| attention on the face | {_number(found.on_face)} |\n"
        f"| area of the face | {_number(found.face_area)} |\n"
        f"| movement of a query with the face's centre (1: with it) | {_number(found.follows)} |\n"
        f"| movement of a query with the nearest landmark | {_number(found.follows_landmark)} |",
        "The paper says that queries settle on regions of the face and move with them. Here the queries "
        f"{prefers[ratio.sign]}, and {follows[found.follows.sign]}"
        + (", though by less than half of its way. " if 0 < found.follows.value < 0.5 else ". ")
        + f"Single landmarks they follow {with_landmark[found.follows_landmark.sign]}.",
    ]
    return "\n\n".join(lines) + "\n"


def _number(one: Estimate) -> str:
    return f"{one.value:.3f} [{one.low:.3f}, {one.high:.3f}]"
