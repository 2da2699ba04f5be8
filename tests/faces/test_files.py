"""The face backend `files` on real photos and on rendered heads of known pose."""

import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omniid.data import rerender
from omniid.data.synthetic import Person, View, render
from omniid.data.synthetic.head_model import head_model
from omniid.data.synthetic.rest import FRAME, NEUTRAL_PITCH, frame_points, pitch_between
from omniid.faces import Face, FaceCrop, FaceError, analyzer
from omniid.faces.align import TEMPLATE
from omniid.faces.files import FILES
from omniid.faces.full import DetectedFace, FullAnalyzer, MeasuredFace, overlap
from omniid.faces.landmarks import landmark_group
from omniid.faces.mediapipe_mesh import Mesh, landmark_weights, mesh_landmarks

DATA = Path(os.environ.get("OMNIID_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(
    not (DATA / FILES["mesh"]).is_file(), reason=f"no face models at {DATA}; set OMNIID_TEST_DATA"
)
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")


@pytest.fixture(scope="module")
def finder():
    return analyzer(f"files:{DATA}")


@pytest.fixture(scope="module")
def photos() -> list[Path]:
    return sorted((DATA / "london").glob("*.jpg"))[:24]


@pytest.fixture(scope="module")
def london(finder, photos) -> list[FaceCrop]:
    return list(finder.analyze_many(photos, 192))


@pytest.fixture
def portrait(photos) -> Image.Image:
    return Image.open(photos[0]).convert("RGB")


def test_every_part_of_a_face_is_measured(london, photos):
    assert [crop.face.name for crop in london] == [str(path) for path in photos]
    for crop in london:
        assert crop.image.shape == (192, 192, 3)
        assert crop.mask.shape == (192, 192)
        assert 0.2 < crop.mask.mean() < 0.6
        assert np.abs(crop.landmarks[:2] / 192 - TEMPLATE[:2]).max() < 0.05
        assert np.linalg.norm(crop.embedding) == pytest.approx(1, abs=1e-5)
        assert 0.5 < crop.face.quality <= 1
        yaw, _, roll = crop.pose
        assert abs(yaw) < 12
        assert abs(roll) < 6
        assert crop.face.image.size == (1, 1)


def test_landmarks_agree_with_the_annotated_ones(london):
    annotated = np.load(DATA / "london" / "landmarks478.npz")
    errors = []
    for crop in london:
        points = annotated[Path(crop.face.name).stem][:, :2]
        eyes = np.stack([points[[33, 133]].mean(0), points[[362, 263]].mean(0)])
        wanted = np.vstack([eyes, points[[2, 61, 291]]])
        errors.append(np.linalg.norm(crop.face.landmarks[:5] - wanted, axis=1) / np.linalg.norm(eyes[1] - eyes[0]))
    assert np.mean(errors) < 0.04


def test_embeddings_tell_people_apart(finder, london):
    person = np.array([Path(crop.face.name).stem[:3] for crop in london])
    same = (person[:, None] == person) & ~np.eye(len(person), dtype=bool)
    other = person[:, None] != person
    exact = np.stack([crop.embedding for crop in london])
    fixed = finder.descriptors([crop.image for crop in london])
    for codes in (exact, fixed):
        cosine = codes @ codes.T
        assert cosine[same].min() > cosine[other].max()
        assert cosine[same].mean() > 0.8
        assert cosine[other].mean() < 0.15
    assert finder.descriptors([]).shape == (0, 128)
    with pytest.raises(ValueError, match=r"uint8 \(H, H, 3\)"):
        finder.descriptors([np.zeros((9, 8, 3), np.uint8)])


def heads() -> list:
    """Rendered heads: five people, each straight ahead and turned within 40 degrees of yaw."""
    turns = [(0, 0, 0), (-40, 0, 0), (40, 5, -8), (-20, -15, 12), (20, 15, 5), (0, 12, -12)]
    made = []
    for person in range(5):
        for yaw, pitch, roll in turns:
            view = View.sample(70 + person, jitter=False)
            view = dataclasses.replace(view, yaw=yaw, pitch=pitch, roll=roll, expression="neutral", distance=15.0)
            made.append(render(Person.sample(300 + person), view, 192, aligned=False))
    return made


@pytest.fixture(scope="module")
def rendered(finder) -> tuple[list, list[Face]]:
    made = heads()
    return made, [finder.find(Image.fromarray(head.image)) for head in made]


def test_pose_is_that_of_rendered_heads(rendered):
    known = np.array([[head.yaw, head.pitch, head.roll] for head in rendered[0]])
    found = np.array([face.pose for face in rendered[1]])
    # Five people at 192 px; `omniid bench faces` measures more of them, larger.
    assert np.all(np.abs(found - known).mean(0) < [3.5, 4.5, 3])


@pytest.mark.skipif(not (DATA / "face_model").is_dir(), reason="no face model")
def test_pose_is_that_of_heads_rendered_from_photos(finder, photos):
    model = rerender.load_face_model(DATA / "face_model")
    reader, person_mask = rerender.PhotoReader(DATA / "landmarks"), rerender.PersonMask(DATA / "landmarks")
    errors = []
    for photo in photos[:4:2]:
        person = rerender.make_likeness(model, person_mask, photo.stem, [reader(photo)])
        for yaw, pitch, roll in [(-34, 0, 0), (26, 6, -8), (-16, -12, 10), (5, 12, 0)]:
            view = dataclasses.replace(View.sample(70, jitter=False), yaw=yaw, pitch=pitch, roll=roll)
            view = dataclasses.replace(view, expression="neutral", distance=15.0)
            head = rerender.render(model, person, view, 256, aligned=False)
            errors.append(np.subtract(finder.find(Image.fromarray(head.image)).pose, (yaw, pitch, roll)))
    assert np.all(np.abs(errors).mean(0) < 3)


def test_zero_pitch_of_synthetic_heads_is_the_canonical_face_s():
    canonical = (landmark_weights() @ Mesh(DATA / FILES["canonical mesh"]).vertices)[FRAME]
    model = head_model()
    assert pitch_between(canonical, frame_points(model, model.vertices)) == pytest.approx(NEUTRAL_PITCH, abs=0.1)
    person = Person.sample(300)
    direct = pitch_between(canonical, frame_points(model, person.vertices))
    assert person.rest_pitch == pytest.approx(direct, abs=1.5)


def test_landmarks_and_masks_are_those_of_rendered_heads(finder, rendered):
    for head, face in zip(*rendered, strict=True):
        if abs(head.yaw) > 20:
            continue
        distance = np.linalg.norm(face.landmarks - head.landmarks, axis=1)
        inner = distance[: landmark_group("jaw line").start]
        assert inner.mean() < 0.12 * np.linalg.norm(head.landmarks[1] - head.landmarks[0])
        mask = finder.mask(face, np.eye(2, 3), 192)
        assert (mask & ~head.mask).sum() < 0.1 * mask.sum()  # no backdrop, neck or ears
        assert (mask & head.mask).sum() > 0.6 * head.mask.sum()  # the mesh ends on the forehead


@pytest.mark.parametrize("degrees", [-90, -45, 60, 90, 180])
def test_turned_photos_are_found_with_their_roll(finder, portrait, degrees):
    straight = finder.find(portrait)
    turned = finder.find(portrait.rotate(degrees, expand=True))
    wrapped = (turned.pose[2] - straight.pose[2] + degrees + 180) % 360 - 180  # roll is clockwise
    assert abs(wrapped) < 4
    assert abs(turned.pose[0] - straight.pose[0]) < 4
    crops = [finder.crop(face, 64).astype(float) for face in (straight, turned)]
    assert np.abs(crops[0] - crops[1]).mean() < 12


class Blurred(FullAnalyzer):
    """Sees a face upright and upside down, as sure as it is told."""

    def __init__(self, upright, upside_down):
        self.presence = {False: upright, True: upside_down}

    def detect(self, pixels):
        return [
            DetectedFace(
                np.array([0.0, 0, 90, 90]), np.array([[20.0, 20], [70, 20], [45, 45], [30, 70], [60, 70]]), 0.9
            )
        ]

    def measure(self, pixels, near):
        is_turned = near.points[0, 0] > near.points[1, 0]
        points = np.resize(near.points, (66, 2))
        return MeasuredFace(points, points, (0.0, 0.0, 180.0 * is_turned), near.box, self.presence[is_turned])

    mask = recognise = None  # which finding a face does not need


@pytest.mark.parametrize(
    ("upright", "upside_down", "roll"), [(0.4, 0.6, 0), (0.2, 0.6, 180), (0.55, 0.9, 0), (0.4, 0.4, 0)]
)
def test_a_face_is_upside_down_only_where_that_is_much_surer(upright, upside_down, roll):
    assert Blurred(upright, upside_down).find(Image.new("RGB", (90, 90))).pose[2] == roll


def test_a_small_face_in_a_40_megapixel_photo_is_found(finder, portrait):
    photo = Image.new("RGB", (7600, 5300), (90, 100, 80))
    photo.paste(portrait.resize((160, 160)), (5000, 3000))
    found = finder.find(photo)
    assert 5000 < found.box[0] < found.box[2] < 5160
    assert found.quality < finder.find(portrait).quality


@pytest.mark.parametrize("side", [48, 32])  # of the photo: the face is two thirds of it
def test_tiny_faces_are_measured_with_little_quality(finder, portrait, side):
    photo = Image.new("RGB", (400, 300), (90, 100, 80))
    photo.paste(portrait.resize((side, side)), (250, 120))
    face = finder.find(photo)
    straight = finder.find(portrait)
    assert np.abs(face.points[:2] - (straight.points[:2] * (side / portrait.width) + [250, 120])).max() < 0.06 * side
    np.testing.assert_allclose(face.pose, straight.pose, atol=5)
    assert face.quality < 0.2 * straight.quality


def test_faces_too_tiny_to_be_measured_are_said_not_to_be_there(finder, portrait):
    photo = Image.new("RGB", (400, 300), (90, 100, 80))
    photo.paste(portrait.resize((10, 10)), (250, 120))
    with pytest.raises(FaceError, match=r"no face found .* large"):
        finder.find(photo)


def test_a_face_that_fills_the_photo_is_found(finder, portrait):
    assert finder.find(portrait.crop((180, 150, 460, 480))).num_faces == 1


def test_one_of_several_faces_can_be_chosen(finder, portrait):
    both = Image.new("RGB", (1280, 640))
    both.paste(portrait.resize((480, 480)), (0, 100))
    both.paste(portrait, (640, 0))
    face = finder.find(both)
    assert face.index == 1
    assert "shows 2 faces; the largest was taken" in face.note
    assert finder.find(both, 0).points[0, 0] < 640
    with pytest.raises(FaceError, match="must lie between 0 and 1; got 2"):
        finder.find(both, 2)


def test_unusable_photos_are_errors_in_their_place(finder, photos, tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("not a photo")
    (tmp_path / "half.jpg").write_bytes(photos[0].read_bytes()[:9000])
    Image.new("RGB", (300, 200), (90, 90, 200)).save(tmp_path / "wall.png")
    bad = [tmp_path / name for name in ("empty.jpg", "text.jpg", "half.jpg", "wall.png", "missing.jpg")]
    results = list(finder.analyze_many([photos[0], *bad, photos[1]], 64))
    assert isinstance(results[0], FaceCrop)
    assert isinstance(results[-1], FaceCrop)
    for result, words in zip(
        results[1:-1], ("0 bytes", "not an image", "truncated", "no face", "not exist"), strict=True
    ):
        assert isinstance(result, FaceError)
        assert words in str(result)


def test_a_face_is_followed_without_detection_until_it_is_gone(finder, portrait):
    pixels = np.asarray(portrait)
    (start,) = finder.detect(pixels)
    measured = finder.measure(pixels, start)
    moved = np.roll(pixels, (12, -20), (0, 1))
    followed = finder.measure(moved, measured)
    np.testing.assert_allclose(followed.landmarks, measured.landmarks + np.array([-20, 12]), atol=8)
    assert overlap(followed.box, measured.box) > 0.7
    assert finder.measure(np.full_like(pixels, 127), measured) is None


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(FaceError, match=r"lacks detector/face_detection_yunet_2023mar.onnx, .* --faces files:FOLDER"):
        analyzer(f"files:{tmp_path}")
    for name in FILES.values():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(DATA / name, tmp_path / name)
    for name, words in (
        ("recogniser", "cannot be used as an ONNX model"),
        ("person mask", "cannot be used as a TFLite model"),
        ("canonical mesh", "is not MediaPipe's canonical face model"),
    ):
        path = tmp_path / FILES[name]
        whole = path.read_bytes()
        path.chmod(0o644)
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(FaceError, match=words):
            analyzer(f"files:{tmp_path}")
        path.write_bytes(whole)


def test_landmarks_of_the_canonical_mesh_keep_the_documented_order():
    mesh = Mesh(DATA / FILES["canonical mesh"])
    points = mesh_landmarks(mesh.vertices * [1, -1, 1])
    assert points[0, 0] < points[1, 0]
    for name in ("right eye outline", "left eye outline", "outer lips"):
        x, y = points[landmark_group(name)].T
        assert (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() > 0  # clockwise
        assert x[0] == x.min()
    jaw = points[landmark_group("jaw line")]
    assert jaw[8, 1] == jaw[:, 1].max()  # the chin
    np.testing.assert_allclose(jaw[::-1] * [-1, 1], jaw, atol=0.05)
    assert np.all(np.diff(points[landmark_group("nose bridge"), 1]) > 0)
