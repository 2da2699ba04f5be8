"""Identity records of re-rendered people: real ones and blends, held-out people apart, written as Parquet shards.

What is written depends on the arguments alone, not on workers or interruptions: every identity, blend and view has a
seed of its own, and complete shards are kept.
"""

import contextlib
import dataclasses
import functools
import hashlib
import multiprocessing
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import simplejpeg

from omniid.data.synthetic.dataset import SCHEMA, encode_mask
from omniid.data.synthetic.view import View
from omniid.errors import OmniIDError
from omniid.files import atomic_path, sha256_of_file

from .blend import Recipe, blend
from .errors import RerenderError
from .face_model import MODEL_FILE, FaceModel, load_face_model
from .likeness import Likeness, make_likeness
from .matte import PersonMask
from .photos import PhotoReader, fingerprint, group_by_person
from .render import render

VERSION = 3
"""Of what is made from photos and arguments: raise it when pictures change, so that kept files are made anew."""
SHARD_SIZE = 50
"""Identities in a file."""
CACHE = ".people"
"""Folder beside the shards, of likenesses made from photos."""
_JPEG_QUALITY = 93


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What to make."""

    face_model: Path
    nets: Path
    images: int = 12
    size: int = 256
    seed: int = 0
    yaw_range: float = 36.0
    blend: int = 0
    """Identities to make of two or three people."""
    hold_out: tuple[str, ...] = ()
    """People who go, with blends of them alone, to `hold_out_split`; nobody else's blend contains them."""
    hold_out_blend: int = 0
    hold_out_split: str = "validation"
    split: str = "train"
    attribution: str = ""
    """Credit that the photos' licence asks for: part of every row's source and of the shards' metadata."""
    workers: int = 2

    def __post_init__(self) -> None:
        for name, least in (
            ("images", 1),
            ("size", 32),
            ("seed", 0),
            ("blend", 0),
            ("hold_out_blend", 0),
            ("workers", 1),
        ):
            if getattr(self, name) < least:
                raise RerenderError(f"{name} is {getattr(self, name)}, expected at least {least}")
        if not 0 <= self.yaw_range <= 90:
            raise RerenderError(f"yaw_range is {self.yaw_range} degrees, expected 0 to 90")
        for split in (self.split, self.hold_out_split):
            if not split or "/" in split or "-" in split:
                raise RerenderError(f"split is {split!r}, expected a plain word such as train")
        if self.hold_out and self.split == self.hold_out_split:
            raise RerenderError(
                f"people held out go to another split than {self.split!r}; name one with --hold-out-split"
            )


@dataclasses.dataclass(slots=True)
class Written:
    files: list[Path]
    identities: dict[str, int]
    """By split."""
    skipped: list[str]
    """Photos that could not be used, with the reason."""


def write_rerendered(
    folder: str | Path,
    photos: Iterable[str | Path],
    wish: Wish,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Written:
    """Fills a folder with `<split>-NNNNN.parquet`, people first and their blends after them.

    `progress(what, done, total)` counts people made from photos, then identities. An interrupted call is resumed by
    repeating it. Workers are spawned, so a script calls this under `if __name__ == "__main__":`. Raises RerenderError for
    arguments that make no sense, photos of which none can be used, and shards made from other arguments.
    """
    load_face_model(wish.face_model)  # an unusable one is known before any work
    groups = group_by_person(list(photos))
    missing = [name for name in wish.hold_out if name not in groups]
    if missing:
        raise RerenderError(f"no photo of {', '.join(missing)}, named with --hold-out; people are {_few(list(groups))}")
    folder = Path(folder)
    (folder / CACHE).mkdir(parents=True, exist_ok=True)
    with _pool(wish) as run:
        jobs = [(wish, name, paths, folder / CACHE) for name, paths in groups.items()]
        made, skipped = {}, []
        for number, (name, path, reasons) in enumerate(run(_prepare, jobs), 1):
            progress("people", number, len(jobs))
            skipped += reasons
            if path is not None:
                made[name] = path
        if not made:
            raise RerenderError(f"no person could be made from the photos: {'; '.join(skipped[:3])}")
        files, counts = [], {}
        total = sum(len(plan) for plan in plan_identities(wish, made).values())
        done = 0
        for split, plan in plan_identities(wish, made).items():
            counts[split] = len(plan)
            for shard, start in enumerate(range(0, len(plan), SHARD_SIZE)):
                part = plan[start : start + SHARD_SIZE]
                path = folder / f"{split}-{shard:05d}.parquet"
                made_by = _made_by(wish, split, part, made)
                if path.exists():
                    _check_shard(path, made_by)
                else:
                    rows = []
                    for row in run(_record, [(wish, split, *entry, made) for entry in part]):
                        rows.append(row)
                        progress("identities", done + len(rows), total)
                    _write_shard(path, rows, made_by, wish.attribution)
                done += len(part)
                progress("identities", done, total)
                files.append(path)
    return Written(files, counts, skipped)


@contextlib.contextmanager
def _pool(wish: Wish) -> Iterator[Callable]:
    """A function like `map` over worker processes, or over none for a single worker."""
    if wish.workers == 1:
        yield map
        return
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    try:
        os.environ |= dict.fromkeys(names, "1")  # one thread a worker: the workers fill the CPUs
        pool = multiprocessing.get_context("spawn").Pool(wish.workers)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    try:
        yield pool.imap
    finally:
        pool.terminate()
        pool.join()


def _prepare(job: tuple[Wish, str, list[Path], Path]) -> tuple[str, Path | None, list[str]]:
    """A person's likeness in the cache, made where it is not there yet: name, file (None without one), reasons."""
    wish, name, paths, cache = job
    model, reader, person_mask = _tools(wish.face_model, wish.nets)
    reasons: list[str] = []
    photos = []
    key = hashlib.sha256(f"{VERSION} {_model_key(wish.face_model)}".encode())
    for path in paths:
        try:
            key.update(fingerprint([path], reader).encode())
        except OmniIDError as error:
            reasons.append(str(error))
    file = cache / f"{name}-{key.hexdigest()[:16]}.npz"
    if file.exists() and not reasons:
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged: made again
            Likeness.load(file)
            return name, file, reasons
    reasons = []
    for path in paths:
        try:
            photos.append(reader(path))
        except OmniIDError as error:
            reasons.append(str(error))
    if not photos:
        return name, None, reasons
    try:
        make_likeness(model, person_mask, name, photos).save(file)
    except RerenderError as error:
        return name, None, [*reasons, str(error)]
    return name, file, reasons


def plan_identities(wish: Wish, made: dict[str, Path]) -> dict[str, list[tuple[int, Recipe]]]:
    """By split, the number and recipe of every identity: people as they are, then blends."""
    held = [name for name in made if name in wish.hold_out]
    kept = [name for name in made if name not in wish.hold_out]
    plans = {}
    for split, names, count in ((wish.split, kept, wish.blend), (wish.hold_out_split, held, wish.hold_out_blend)):
        if not names and not count:
            continue
        if count and len(names) < 2:
            raise RerenderError(f"{count} blends of split {split!r} need at least 2 people, there are {len(names)}")
        recipes = [Recipe((name,), (1.0,), 0, 0, 0) for name in names]
        recipes += draw_recipes(names, count, np.random.default_rng([20261, wish.seed, split == wish.split]))
        plans[split] = list(enumerate(recipes))
    return plans


def draw_recipes(names: list[str], count: int, rng: np.random.Generator) -> list[Recipe]:
    """`count` recipes of 2 or 3 of the names, no two of the same people while there are other sets, no two alike.

    Raises RerenderError when so many different ones do not exist.
    """
    recipes: list[Recipe] = []
    sets, seen = set(), set()
    while len(recipes) < count:
        for attempt in range(400):
            recipe = Recipe.sample(names, 3, rng)
            people = frozenset(recipe.parents)
            roles = (people, *(recipe.parents[k] for k in (recipe.hair, recipe.upper, recipe.lower)))
            if roles not in seen and (people not in sets or attempt >= 200):
                break
        else:
            raise RerenderError(
                f"{len(names)} people give hardly more than {len(recipes)} different blends; ask for fewer"
            )
        sets.add(people)
        seen.add(roles)
        recipes.append(recipe)
    return recipes


def _record(job: tuple[Wish, str, int, Recipe, dict[str, Path]]) -> dict:
    """One row."""
    wish, split, number, recipe, made = job
    model = _tools(wish.face_model, wish.nets)[0]
    name = "+".join(sorted(recipe.parents))
    if len(recipe.parents) == 1:
        person = Likeness.load(made[name])
    else:
        person = blend(model, [_likeness(made[parent]) for parent in recipe.parents], recipe, name)
    source = "rerendered photos" + (f": {wish.attribution}" if wish.attribution else "")
    row = {"identity_id": f"rerendered-{wish.seed}-{split}-{number:06d}-{name}", "source": source, "split": split}
    row |= {column: [] for column in ("images", "masks", "landmarks", "pose", "quality", "captions")}
    for view in _views(wish, split, number):
        face = render(model, person, view, wish.size)
        jpeg = simplejpeg.encode_jpeg(face.image, quality=_JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
        row["images"].append(jpeg)
        row["masks"].append(encode_mask(face.mask))
        row["landmarks"].append(face.landmarks.tolist())
        row["pose"].append([face.yaw, face.pitch, face.roll])
        row["quality"].append(float(np.clip(1 - view.blur * 60, 0, 1)))
        row["captions"].append(face.caption)
    return row


def _views(wish: Wish, split: str, number: int) -> Iterator[View]:
    for image in range(wish.images):
        seeds = np.random.SeedSequence([wish.seed, 20262, split == wish.split, number, image])
        yield View.sample(int(seeds.generate_state(1, np.uint64)[0] >> 1), wish.yaw_range)


@functools.lru_cache(maxsize=1)
def _tools(face_model: Path, nets: Path) -> tuple[FaceModel, PhotoReader, PersonMask]:
    return load_face_model(face_model), PhotoReader(nets), PersonMask(nets)


@functools.lru_cache(maxsize=100)
def _likeness(path: Path) -> Likeness:
    """Kept for blends, which read a few megabytes of it; drawing one would keep its textures as floats too."""
    return Likeness.load(path)


@functools.lru_cache(maxsize=1)
def _model_key(face_model: Path) -> str:
    return sha256_of_file(face_model / MODEL_FILE if face_model.is_dir() else face_model)


def _made_by(wish: Wish, split: str, part: list[tuple[int, Recipe]], made: dict[str, Path]) -> str:
    """What a shard's content depends on, in words that a changed argument changes."""
    people = {name: made[name].stem for _, recipe in part for name in recipe.parents}
    digest = hashlib.sha256(repr((part, sorted(people.items()), wish.attribution)).encode()).hexdigest()[:16]
    return (
        f"version {VERSION}, {split} {part[0][0]}-{part[-1][0]} x {wish.images}, {wish.size} px, seed {wish.seed}, "
        f"yaw {wish.yaw_range:g}, people {digest}"
    )


def _write_shard(path: Path, rows: list[dict], made_by: str, attribution: str) -> None:
    schema = SCHEMA.with_metadata({"omniid_rerendered": made_by, "attribution": attribution})
    with atomic_path(path) as temporary:
        # Pictures are compressed already; small row groups let a reader take one person without the rest.
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, temporary, compression="none", row_group_size=10)


def _check_shard(path: Path, made_by: str) -> None:
    try:
        found = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"omniid_rerendered", b"").decode()
    except (pyarrow.ArrowException, OSError) as error:
        raise RerenderError(f"{path} is damaged ({error}); remove it and run the command again") from error
    if found != made_by:
        raise RerenderError(
            f"{path} holds other records ({found or 'not re-rendered'}; wanted {made_by}); choose another folder or remove it"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
