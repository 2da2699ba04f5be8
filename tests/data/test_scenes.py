"""Scenes: where the face crop comes from, what the target shows, and what is refused."""

import io

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from omniid.data.records import RecordError, open_records
from omniid.data.scenes import Scene, SceneBatches
from omniid.data.synthetic import write_records
from omniid.faces.align import TEMPLATE


def png(mask):
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return buffer.getvalue()


def scene_row(count=1, width=200, height=100, centre=(150, 40), **changes):
    """Dark pictures with a bright disc where the face is: eyes and nose on it, 24 pixels between the eyes."""
    y, x = np.mgrid[:height, :width]
    disc = (x - centre[0]) ** 2 + (y - centre[1]) ** 2 < 30**2
    image = np.where(disc[..., None], 220, 20).astype(np.uint8).repeat(3, axis=-1)
    landmarks = np.tile(np.array(centre, float), (66, 1))
    landmarks[:3] += (TEMPLATE - TEMPLATE.mean(0)) * 24 / 0.31
    return {
        "identity_id": "a",
        "images": [simplejpeg.encode_jpeg(image, colorspace="RGB")] * count,
        "masks": [png(disc)] * count,
        "landmarks": [landmarks.tolist()] * count,
        "pose": [[0.0, 0.0, 0.0]] * count,
        "captions": ["photo of a person looking to the left"] * count,
    } | changes


def batches(rows, num_inputs=(1, 1), num_targets=1, **more):
    return SceneBatches(rows, 64, len(rows), num_inputs, num_targets, 0, 4, **more)


def test_one_picture_gives_its_face_and_itself():
    batch = batches([scene_row()])[0]
    assert batch.inputs.shape == (1, 3, 64, 64) and batch.targets.shape == (1, 1, 3, 64, 64)
    crop, scene = batch.inputs[0, 0].float(), batch.targets[0, 0, 0].float()
    assert crop[24:40, 24:40].min() > 180  # the face fills the middle of the crop ...
    assert (scene > 128).float().mean().item() == pytest.approx(
        np.pi * 30**2 / 100**2, rel=0.05
    )  # ... not of the scene
    assert (batch.masks[0, 0] != (scene > 120)).float().mean() < 0.02


def test_the_square_holds_the_face_of_a_wide_picture():
    picture, mask, landmarks = Scene.read(scene_row(), 0).square(100)
    # Wide by 200, the square can begin at 100 at most: the face at 150, 40 lies at 50, 40 of it.
    np.testing.assert_allclose(landmarks[3], [50, 40])
    assert picture[40, 50, 0] > 200 and mask[40, 50] and not mask[90, 90]
    _, _, tall = Scene.read(scene_row(width=80, height=240, centre=(40, 120)), 0).square(40)
    np.testing.assert_allclose(tall[3], [20, 20])


def test_mirrored_scenes_mirror_all_they_hold():
    (plain,), (turned,) = ([batches([scene_row()], mirror=share)[0]] for share in (0.0, 1.0))
    assert torch.equal(plain.targets.flip(-1), turned.targets) and torch.equal(plain.masks.flip(-1), turned.masks)
    assert turned.captions == [["photo of a person looking to the right"]]
    np.testing.assert_allclose(turned.landmarks[..., 3, 0], 64 - plain.landmarks[..., 3, 0])


def test_more_inputs_come_from_the_persons_other_pictures():
    batch = batches([scene_row(count=3)], num_inputs=(5, 5), num_targets=2)[0]
    assert len(batch.inputs) == 3 and batch.targets.shape[:2] == (1, 2)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"captions": []}, "0 captions"),
        ({"images": [b"x"]}, "damaged picture"),
        ({"masks": [png(np.ones((10, 10), bool))]}, r"the mask is \(10, 10\)"),
        ({"landmarks": [np.zeros((5, 2)).tolist()]}, "damaged picture, mask or landmarks"),
        ({"landmarks": [np.zeros((66, 2)).tolist()]}, "unusable landmarks"),
    ],
    ids=str,
)
def test_damaged_scenes_are_told_apart(changes, reason):
    with pytest.raises(RecordError, match=reason):
        batches([scene_row(**changes)])[0]


def test_synthetic_scenes_show_heads_of_many_places(tmp_path):
    write_records(tmp_path, 2, 3, size=64, workers=1, scenes=True)
    rows = open_records(tmp_path, "train")
    masks = np.stack([np.asarray(Image.open(io.BytesIO(mask))) for row in rows for mask in row["masks"]])
    assert masks.mean() < 0.25  # an aligned face fills more than a third
    batch = batches(rows, num_targets=2)[0]
    assert batch.targets.shape == (2, 2, 3, 64, 64) and batch.landmarks.shape == (2, 2, 66, 2)
    with pytest.raises(ValueError, match="holds other records"):
        write_records(tmp_path, 2, 3, size=64, workers=1)
