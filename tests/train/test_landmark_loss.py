"""The landmark loss: a face that keeps to its landmarks has a small one, wherever it lies in the picture."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from omniid.data.synthetic import Person, View, render
from omniid.evaluate.people import FIRST_UNSEEN_SEED
from omniid.faces import FaceError
from omniid.faces.align import apply
from omniid.train.landmark_loss import LandmarkLoss


@pytest.fixture(scope="module")
def loss():
    return LandmarkLoss()


@pytest.fixture(scope="module")
def faces():
    """Images (4, 3, 128, 128) in [-1, 1] of people that no training saw, landmarks (4, 66, 2) and poses (4, 3)."""
    turns = [(-30.0, 5.0), (-10.0, -8.0), (10.0, 8.0), (30.0, 0.0)]
    heads = []
    for seed, (yaw, pitch) in enumerate(turns, start=FIRST_UNSEEN_SEED):
        view = dataclasses.replace(View.sample(seed), yaw=yaw, pitch=pitch)
        heads.append(render(Person.sample(seed), view, 128))
    images = torch.from_numpy(np.stack([head.image for head in heads])).permute(0, 3, 1, 2).float() / 127.5 - 1
    poses = np.array([(head.yaw, head.pitch, head.roll) for head in heads])
    return images, np.stack([head.landmarks for head in heads]), poses


def test_a_face_is_nearer_to_its_own_landmarks_than_to_others(loss, faces):
    images, landmarks, poses = faces
    own, others = loss(images, landmarks, poses), loss(images, landmarks[::-1].copy(), poses[::-1].copy())
    assert own.shape == (4,) and (own < 0.3).all()
    assert (others > 2 * own).all()


def test_place_and_turn_in_the_picture_do_not_matter(loss, faces):
    images, landmarks, poses = faces
    pixels = ((images[0].permute(1, 2, 0).numpy() + 1) * 127.5).round().astype(np.uint8)
    canvas = Image.new("RGB", (256, 200), (128, 128, 128))
    canvas.paste(Image.fromarray(pixels), (90, 40))
    turned = canvas.rotate(-20, Image.Resampling.BICUBIC, fillcolor=(128, 128, 128))  # clockwise
    cos, sin = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    middle = np.array([128, 100])
    turn = np.column_stack([[[cos, -sin], [sin, cos]], middle - np.array([[cos, -sin], [sin, cos]]) @ middle])
    moved = apply(turn, landmarks[0] + [90, 40])
    picture = torch.from_numpy(np.array(turned)).permute(2, 0, 1)[None].float() / 127.5 - 1
    there = loss(picture, moved[None], poses[:1] + np.array([0, 0, 20]))
    assert there.item() == pytest.approx(loss(images[:1], landmarks[:1], poses[:1]).item(), abs=0.05)


def test_large_pictures_are_seen_as_small_ones(loss, faces):
    images, landmarks, poses = faces
    large = torch.nn.functional.interpolate(images, (640, 640), mode="bicubic")
    torch.testing.assert_close(loss(large, landmarks * 5, poses), loss(images, landmarks, poses), atol=0.03, rtol=0)
    noisy = large + torch.randn(
        large.shape, generator=torch.Generator().manual_seed(0)
    )  # which shrinking averages away
    torch.testing.assert_close(loss(noisy, landmarks * 5, poses), loss(images, landmarks, poses), atol=0.1, rtol=0)


def test_gradients_reach_the_picture_alone(loss, faces):
    images, landmarks, poses = faces
    images = images.clone().requires_grad_(True)
    loss(images, landmarks, poses).mean().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0
    assert all(parameter.grad is None for parameter in loss.parameters())


def test_landmarks_of_another_shape_are_refused(loss, faces):
    with pytest.raises((FaceError, ValueError), match=r"\(66, 2\)"):
        loss(faces[0], faces[1][:, :5], faces[2])
