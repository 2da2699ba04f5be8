"""Re-rendered people: the fit finds known heads, records are the same after a kill, held-out people stay apart."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from omniid.data.rerender import RerenderError, Wish, load_face_model, render, write_rerendered
from omniid.data.rerender.dataset import draw_recipes, plan_identities
from omniid.data.rerender.eyes import EYE_SIZE
from omniid.data.rerender.fit import Camera, fit_person
from omniid.data.rerender.likeness import Likeness
from omniid.data.rerender.matte import fill
from omniid.data.rerender.texture import TILE
from omniid.data.synthetic import CAPTION_WORDS, View

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_model = pytest.mark.skipif(
    not (DATA / "face_model").is_dir(), reason=f"no face model at {DATA}; set OMNIID_TEST_DATA"
)
needs_photos = pytest.mark.skipif(not (DATA / "london").is_dir(), reason=f"no photos at {DATA}; set OMNIID_TEST_DATA")


def photos(folder: Path, people: list[str]) -> Path:
    folder.mkdir()
    for name in people:
        os.symlink(DATA / "london" / f"{name}_neutral.jpg", folder / f"{name}_neutral.jpg")
    os.symlink(DATA / "london" / "landmarks478.npz", folder / "landmarks478.npz")
    return folder


def wish(**changes: object) -> Wish:
    few = {"images": 1, "size": 64, "workers": 1, "blend": 1, "hold_out": ("002",), "attribution": "somebody"}
    return Wish(face_model=DATA / "face_model", nets=DATA / "landmarks", **(few | changes))


@needs_model
@pytest.mark.parametrize("yaw", [-20, 0, 15])
def test_the_fit_finds_a_head_made_by_the_model(yaw: float) -> None:
    model = load_face_model(DATA / "face_model")
    rng = np.random.default_rng(yaw + 100)
    head = model.expressed(model.shape(0.7 * rng.standard_normal(20)), {"mouthSmile_L": 0.6, "mouthSmile_R": 0.6})
    turn = np.radians(yaw)
    rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    camera = Camera(rotation, 250.0, np.array([300.0, 2100.0]))
    points = np.zeros((478, 2))
    points[model.paired_points] = camera.project(head[model.paired_vertices])[:, :2]
    fit = fit_person(model, [points])
    assert fit.errors[0] < 4  # pixels, of a head 500 wide
    found = np.degrees(np.arctan2(fit.cameras[0].rotation[0, 2], fit.cameras[0].rotation[2, 2]))
    assert abs(found - yaw) < 5


@needs_model
def test_depth_of_landmarks_moves_what_a_front_view_cannot_tell() -> None:
    model = load_face_model(DATA / "face_model")
    camera = Camera(np.eye(3), 250.0, np.array([300.0, 2100.0]))
    seen = camera.project(model.neutral[model.paired_vertices])
    points = np.zeros((478, 3))
    points[model.paired_points] = seen * [1, 1, -camera.scale]
    nose = int(model.paired_vertices[list(model.paired_points).index(4)])
    tips = []
    for longer in (0.0, 0.05):
        changed = points.copy()
        changed[4, 2] -= longer * camera.scale  # towards the camera
        fit = fit_person(model, [changed])
        tips.append(model.shape(fit.identity, fit.offsets)[nose, 2])
    assert 0.01 < tips[1] - tips[0] < 0.05
    flat = fit_person(model, [points[:, :2]])
    np.testing.assert_allclose(flat.identity, fit.identity)  # x and y alone say where the camera is and who it may be


@needs_model
def test_landmarks_of_no_head_are_refused() -> None:
    model = load_face_model(DATA / "face_model")
    with pytest.raises(RerenderError, match="fit no head"):
        fit_person(model, [np.random.default_rng(0).uniform(0, 500, (478, 2))])
    with pytest.raises(RerenderError, match="468 or 478"):
        fit_person(model, [np.zeros((68, 2))])


@needs_model
@pytest.mark.parametrize("seed", range(3))
def test_no_eye_shows_through_closed_lids(seed: int) -> None:
    model = load_face_model(DATA / "face_model")
    rng = np.random.default_rng(seed)
    still = np.zeros_like(model.neutral)
    skin = np.full((TILE, 2 * TILE, 4), (200, 160, 140, 255), np.uint8)

    def picture(expression: str, strength: float, eye: int) -> np.ndarray:
        eyes = np.full((2, EYE_SIZE, EYE_SIZE, 3), eye, np.uint8)
        person = Likeness("somebody", identity, still, still, skin, eyes, None)
        view = View.sample(seed, 36.0)
        view = dataclasses.replace(view, expression=expression, strength=strength, gaze=(8.0, 12.0))
        return render(model, person, view, 96).image

    identity = rng.standard_normal(len(model.identity)).astype(np.float32)
    for strength in (0.6, 1.0):
        np.testing.assert_array_equal(picture("closed eyes", strength, 0), picture("closed eyes", strength, 255))
    assert (picture("neutral", 1.0, 0) != picture("neutral", 1.0, 255)).any()


@needs_photos
def test_held_out_people_stay_apart_and_a_killed_run_ends_the_same(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", ["002", "018", "104"])
    (folder / "999_neutral.jpg").write_bytes(b"no picture")
    whole = write_rerendered(tmp_path / "whole", [folder], wish())
    assert whole.identities == {"train": 3, "validation": 1}
    assert len(whole.skipped) == 1
    assert "999_neutral.jpg" in whole.skipped[0]

    def killed(what: str, done: int, total: int) -> None:
        if (what, done) == ("identities", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_rerendered(tmp_path / "killed", [folder], wish(), killed)
    write_rerendered(tmp_path / "killed", [folder], wish())
    for file in whole.files:
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()

    tables = {file.name: pyarrow.parquet.read_table(file) for file in whole.files}
    train, validation = tables["train-00000.parquet"], tables["validation-00000.parquet"]
    assert train.schema.metadata[b"attribution"] == b"somebody"
    assert all("002" not in name.split("-")[-1].split("+") for name in train["identity_id"].to_pylist())
    assert validation["identity_id"].to_pylist()[0].endswith("-002")
    assert "somebody" in validation["source"].to_pylist()[0]
    captions = [text for table in (train, validation) for row in table["captions"].to_pylist() for text in row]
    assert {word for text in captions for word in text.replace(",", "").split()} <= set(CAPTION_WORDS)
    with pytest.raises(RerenderError, match="other records"):
        write_rerendered(tmp_path / "whole", [folder], wish(seed=1))


def test_recipes_differ_and_do_not_depend_on_how_many_are_asked_for() -> None:
    names = [f"{k:03d}" for k in range(12)]
    recipes = draw_recipes(names, 150, np.random.default_rng(3))
    assert recipes[:40] == draw_recipes(names, 40, np.random.default_rng(3))
    assert len({frozenset(recipe.parents) for recipe in recipes}) == 150
    assert all(sum(recipe.weights) == pytest.approx(1) and len(recipe.parents) in (2, 3) for recipe in recipes)
    with pytest.raises(RerenderError, match="ask for fewer"):
        draw_recipes(names[:2], 50, np.random.default_rng(0))


def test_no_blend_contains_a_held_out_person_and_none_of_the_others_is_held_out() -> None:
    made = {f"{k:03d}": Path("unused") for k in range(58)}
    held = tuple(list(made)[::7])
    plans = plan_identities(wish(blend=1950, hold_out=held, hold_out_blend=56), made)
    assert {split: len(plan) for split, plan in plans.items()} == {
        "train": 58 - len(held) + 1950,
        "validation": len(held) + 56,
    }
    parents = {split: {name for _, recipe in plan for name in recipe.parents} for split, plan in plans.items()}
    assert parents["validation"] == set(held)
    assert parents["train"] == set(made) - set(held)


def test_missing_models_and_odd_wishes_are_told(tmp_path: Path) -> None:
    with pytest.raises(RerenderError, match=r"--face-model names a folder"):
        load_face_model(tmp_path)
    with pytest.raises(RerenderError, match="blend is -1"):
        wish(blend=-1)
    with pytest.raises(RerenderError, match="another split"):
        wish(hold_out_split="train")


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 33)])
def test_fill_keeps_what_is_known_and_continues_it(shape: tuple[int, int]) -> None:
    known = np.zeros(shape, bool)
    known[0, 0] = True
    values = np.where(known[..., None], 0.5, np.nan)
    np.testing.assert_allclose(fill(np.nan_to_num(values), known), 0.5, atol=1e-3)
