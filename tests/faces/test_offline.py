"""The offline face backend on real photos: every face found and aligned, the recogniser tells people apart."""

import dataclasses
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from omniid.data.synthetic import Person, View, render
from omniid.evaluate.people import FIRST_UNSEEN_SEED
from omniid.faces import FaceError, SeveralFacesWarning, analyzer
from omniid.faces.align import TEMPLATE, apply, similarity_to_template
from omniid.faces.mediapipe_mesh import mesh_landmarks

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
needs_photos = pytest.mark.skipif(
    not (DATA / "london").is_dir(), reason=f"no real photos at {DATA}; set OMNIID_TEST_DATA"
)


@pytest.fixture(scope="module")
def finder():
    return analyzer("offline")


@pytest.fixture(scope="module")
def london(finder):
    """Name -> (Face, crop of 128 px) of all photos."""
    faces = {path.stem: finder.analyze(path) for path in sorted((DATA / "london").glob("*.jpg"))}
    return {name: (face, finder.crop(face, 128)) for name, face in faces.items()}


@pytest.fixture
def portrait() -> Image.Image:
    return Image.open(DATA / "london" / "002_neutral.jpg").convert("RGB")


def eye_distance(face) -> float:
    return float(np.linalg.norm(face.points[1] - face.points[0]))


@needs_photos
def test_every_london_photo_shows_one_face_upright_and_frontal(london):
    assert len(london) == 116
    assert all(face.num_faces == 1 for face, _ in london.values())
    yaw, pitch, roll = np.array([face.pose for face, _ in london.values()]).T
    assert abs(yaw).max() < 15
    assert abs(roll).max() < 8
    assert abs(np.median(pitch)) < 8
    assert all(0.5 < face.quality <= 1 for face, _ in london.values())


@needs_photos
def test_points_agree_with_the_annotated_landmarks(london):
    annotated = np.load(DATA / "london" / "landmarks478.npz")
    errors = []
    for name, (face, _) in london.items():
        points = annotated[name][:, :2]
        # Corners of the person's right and left eye in the 478-point order.
        eyes = np.stack([points[[33, 133]].mean(0), points[[362, 263]].mean(0)])
        errors.append(np.linalg.norm(face.points[:2] - eyes, axis=1).mean() / eye_distance(face))
    assert np.median(errors) < 0.04
    assert np.max(errors) < 0.1


@needs_photos
@pytest.mark.parametrize("path", sorted((DATA / "casual").glob("*.jpg")), ids=lambda path: path.stem)
def test_casual_photos_show_a_face_whose_points_land_on_the_template(finder, path):
    face = finder.analyze(path)
    landed = apply(similarity_to_template(face.points, 128), face.points)
    # Roll, place and size are taken out; what is left is the proportion of this face.
    assert np.abs(landed - TEMPLATE * 128).max() < 10
    assert finder.crop(face, 96).shape == (96, 96, 3)


@needs_photos
def test_descriptors_tell_people_apart(finder, london):
    names = list(london)
    codes = finder.descriptors([crop for _, crop in london.values()])
    assert codes.shape == (116, 128)
    assert codes.dtype == np.float32
    distance = np.linalg.norm(codes[:, None] - codes[None], axis=2)
    person = np.array([name.split("_")[0] for name in names])
    upper = np.triu(np.ones_like(distance, bool), 1)
    same = distance[upper & (person[:, None] == person[None])]
    other = distance[upper & (person[:, None] != person[None])]
    assert (same[:, None] < other[None]).mean() > 0.999
    assert same.mean() < 0.35
    assert other.mean() > 0.7


@needs_photos
def test_the_chip_of_a_crop_is_the_one_dlib_would_cut(finder, london):
    import dlib

    for face, crop in list(london.values())[:8]:
        pixels = np.asarray(face.image)
        shape = finder._predictor(pixels, dlib.rectangle(*(round(v) for v in face.box)))
        chip = dlib.get_face_chip(pixels, shape, 150, 0.25)
        (own,) = finder._recognise([chip])
        # The same person in two photos differs by .22 on average.
        assert np.linalg.norm(finder.descriptor(crop) - own) < 0.2


@needs_photos
def test_descriptors_do_not_depend_on_the_size_of_the_crop_or_the_batch(finder, london):
    face, crop = london["003_smiling"]
    alone = finder.descriptor(crop)
    together = finder.descriptors([london["004_neutral"][1], crop])[1]
    np.testing.assert_allclose(alone, together, atol=1e-4)
    large = finder.descriptor(finder.crop(face, 512))
    assert np.linalg.norm(alone - large) < 0.25
    assert finder.descriptors([]).shape == (0, 128)


def test_a_crop_of_the_wrong_kind_is_refused(finder):
    with pytest.raises(ValueError, match=r"uint8 \(H, H, 3\), got float32"):
        finder.descriptor(np.zeros((128, 128, 3), np.float32))
    with pytest.raises(ValueError, match=r"uint8 \(H, H, 3\)"):
        finder.descriptor(np.zeros((128, 100, 3), np.uint8))


@needs_photos
@pytest.mark.parametrize("degrees", [-90, -40, -15, 15, 40, 90])
def test_turned_photos_give_the_same_crop(finder, portrait, degrees):
    straight = finder.crop(finder.analyze(portrait), 64).astype(float)
    turned = portrait.rotate(degrees, expand=True, resample=Image.Resampling.BICUBIC, fillcolor=(200, 200, 200))
    face = finder.analyze(turned)
    assert abs(face.pose[2] + degrees) < 6  # roll > 0: clockwise in the picture
    difference = np.abs(finder.crop(face, 64).astype(float) - straight)[16:56, 16:48]
    assert difference.mean() < 12


@needs_photos
@pytest.mark.parametrize("side", [96, 160, 4000])
def test_small_and_huge_photos_give_the_same_place(finder, portrait, side):
    expected = finder.analyze(portrait).points / portrait.width
    found = finder.analyze(portrait.resize((side, side), Image.Resampling.LANCZOS)).points / side
    assert np.abs(found - expected).max() < 0.02


@needs_photos
def test_a_photo_filled_by_the_face_is_taken(finder, london):
    face, _ = london["005_neutral"]
    left, top, right, bottom = face.box
    finder.analyze(face.image.crop((round(left), round(top), round(right), round(bottom))))


@needs_photos
def test_a_small_face_in_a_large_photo_is_found(finder, portrait):
    wide = Image.new("RGB", (2400, 1600), (190, 190, 190))
    wide.paste(portrait.resize((320, 320)), (1700, 900))
    face = finder.analyze(wide)
    assert 1700 < face.points[0, 0] < face.points[1, 0] < 2020


@needs_photos
def test_several_faces_take_the_largest_and_say_so(finder, portrait):
    other = Image.open(DATA / "london" / "005_neutral.jpg").convert("RGB")
    both = Image.new("RGB", (1000, 640), (190, 190, 190))
    both.paste(other.resize((360, 360)), (0, 100))
    both.paste(portrait, (360, 0))
    with pytest.warns(SeveralFacesWarning, match=r"shows 2 faces; the largest was taken, number 1.*--face N"):
        face = finder.analyze(both)
    assert (face.num_faces, face.index) == (2, 1)
    assert face.points[0, 0] > 360
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = finder.analyze(both, face=0)
    assert first.points[1, 0] < 360
    with pytest.raises(FaceError, match="shows 2 faces, so --face must lie between 0 and 1; got 2"):
        finder.analyze(both, face=2)


@needs_photos
def test_blur_and_distance_lower_the_quality(finder, portrait):
    sharp = finder.analyze(portrait).quality
    assert finder.analyze(portrait.filter(ImageFilter.GaussianBlur(8))).quality < 0.5 * sharp
    assert finder.analyze(portrait.resize((120, 120))).quality < 0.8 * sharp


@needs_photos
def test_threads_share_one_analyzer(finder):
    paths = sorted((DATA / "london").glob("00*_neutral.jpg"))[:6]
    alone = [finder.analyze(path).points for path in paths]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda path: finder.analyze(path).points, paths * 2))
    np.testing.assert_array_equal(together[:6], alone)
    np.testing.assert_array_equal(together[6:], alone)


@needs_photos
def test_crops_of_many_photos_come_in_order_and_without_the_photos(finder, london):
    paths = sorted((DATA / "london").glob("00*_*.jpg"))
    found = list(finder.find_crops(paths, 128))
    assert [face.name for face, _ in found] == [london[path.stem][0].name for path in paths]
    for path, (face, crop) in zip(paths, found, strict=True):
        np.testing.assert_array_equal(crop, london[path.stem][1])
        assert face.image.size == (1, 1)


@needs_photos
def test_the_first_unusable_photo_of_many_is_named(finder, tmp_path):
    paths = sorted((DATA / "london").glob("00*_neutral.jpg"))[:2]
    Image.new("RGB", (64, 64)).save(tmp_path / "wall.png")
    with pytest.raises(FaceError, match=r"no face found in .*wall\.png"):
        list(finder.find_crops([paths[0], tmp_path / "wall.png", paths[1], "missing.jpg"], 64))
    assert not list(finder.find_crops([], 64))


@pytest.mark.parametrize("kind", ["plain", "noise"])
def test_a_photo_without_a_face_is_refused(finder, tmp_path, kind):
    pixels = np.random.default_rng(0).integers(0, 255, (240, 320, 3), dtype=np.uint8)
    if kind == "plain":
        pixels[:] = 128
    Image.fromarray(pixels).save(tmp_path / "wall.png")
    with pytest.raises(FaceError, match=r"no face found in .*wall\.png; give a photo"):
        finder.analyze(tmp_path / "wall.png")


def test_an_unknown_backend_is_refused():
    with pytest.raises(FaceError, match="unknown face backend 'magic'; use one of: offline, offline:FOLDER, files"):
        analyzer("magic")
    with pytest.raises(FaceError, match=r"here holds no face_network\.safetensors; make one with omniid train faces"):
        analyzer("offline:here")


def test_another_network_measures_otherwise(finder, heads, tmp_path):
    from omniid.models.face_network import FaceNetwork

    FaceNetwork().save(tmp_path / "face_network.safetensors")
    head = Image.fromarray(heads[0].image)
    here, there = finder.find(head), analyzer(f"offline:{tmp_path}").find(head)
    np.testing.assert_array_equal(here.points, there.points)
    assert np.abs(here.landmarks - there.landmarks).max() > 1


@pytest.fixture(scope="module")
def heads():
    """Heads of people that no training saw, turned by up to 40 degrees, as a camera would see them."""
    rng = np.random.default_rng(0)
    turns = rng.uniform([-40, -15, -12], [40, 15, 12], (20, 3)).tolist()
    views = [View.sample(FIRST_UNSEEN_SEED + i, jitter=False) for i in range(len(turns))]
    return [
        render(
            Person.sample(FIRST_UNSEEN_SEED + i),
            dataclasses.replace(view, yaw=yaw, pitch=pitch, roll=roll, distance=15.0),
            256,
            aligned=False,
        )
        for i, (view, (yaw, pitch, roll)) in enumerate(zip(views, turns, strict=True))
    ]


def test_heads_are_measured(finder, heads):
    """Angles have the documented signs: they are compared with those of the renderer."""
    turns, points = [], []
    for head in heads:
        face = finder.find(Image.fromarray(head.image))
        turns.append(np.subtract(face.pose, (head.yaw, head.pitch, head.roll)))
        eyes = np.linalg.norm(head.landmarks[0] - head.landmarks[1])
        points.append(np.linalg.norm(face.landmarks - head.landmarks, axis=1).mean() / eyes)
    assert (np.abs(turns).mean(0) < 3.5).all()
    assert np.mean(points) < 0.12 and np.max(points) < 0.3


def test_a_face_is_described_as_a_record_holds_it(finder, heads):
    overlaps = []
    for head in heads[:8]:
        face = finder.find(Image.fromarray(head.image))
        crop = finder.describe(face, 64)
        assert crop.image.shape == (64, 64, 3) and crop.mask.shape == (64, 64) and crop.mask.dtype == bool
        matrix = similarity_to_template(face.points[:3], 64)
        np.testing.assert_allclose(crop.landmarks, apply(matrix, face.landmarks))
        assert np.linalg.norm(crop.embedding) == pytest.approx(1, abs=1e-5) and crop.embedding.shape == (128,)
        # Alignment takes the roll away that the eyes show.
        assert abs(crop.pose[2]) < 12 and crop.pose[:2] == face.pose[:2]
        wanted = Image.fromarray(head.mask.astype(np.uint8) * 255)
        inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        wanted = np.asarray(wanted.transform((64, 64), Image.Transform.AFFINE, inverse.ravel().tolist())) > 127
        overlaps.append((crop.mask & wanted).sum() / (crop.mask | wanted).sum())
    assert np.mean(overlaps) > 0.85


@needs_photos
def test_a_described_face_has_the_embedding_of_its_crop(finder, london):
    face, crop = london["003_neutral"]
    known = finder.descriptor(crop)
    assert finder.describe(face, 32).embedding @ (known / np.linalg.norm(known)) > 0.99


@needs_photos
def test_the_mask_follows_the_alignment_and_ends_with_the_photo(finder, london):
    face, _ = london["003_neutral"]
    template, ffhq = (finder.describe(face, 96, alignment) for alignment in ("template", "ffhq"))
    for crop in (template, ffhq):
        eyes, chin = crop.landmarks[:2].round().astype(int), crop.landmarks[-9].round().astype(int)
        assert crop.mask[eyes[:, 1], eyes[:, 0]].all() and not crop.mask[:4].any()
        assert not crop.mask[min(chin[1] + 8, 95), chin[0]] or chin[1] > 87
    assert template.mask.sum() > 1.3 * ffhq.mask.sum()


@needs_photos
def test_landmarks_of_photos_agree_with_the_annotated_ones(finder, london):
    annotated = np.load(DATA / "london" / "landmarks478.npz")
    errors = []
    for name, (face, _) in london.items():
        wanted = mesh_landmarks(annotated[name][:468, :2])
        errors.append(np.linalg.norm(face.landmarks - wanted, axis=1).mean() / eye_distance(face))
    assert np.median(errors) < 0.12 and np.max(errors) < 0.25
