"""Scores: drawn as the settings say now, and kept apart by how they were drawn."""

import dataclasses
import shutil

import numpy as np
from PIL import Image

from omniid.reproduce.held_out import held_out_people
from omniid.reproduce.scores import Judge, Judging


def test_pictures_are_drawn_by_the_settings_of_now_and_scored_anew_when_these_change(
    tiny, records, tiny_weights, tmp_path, no_faces
):
    weights = tmp_path / "run" / "weights"
    shutil.copytree(tiny_weights, weights)

    def judge(**changes) -> Judge:
        return Judge(
            people=held_out_people(records, 2, 1, 1, tiny.tower.image_size),
            judging=Judging(num_people=2, num_targets=1, recognisers=("dlib",), backend="offline"),
            num_inputs=(1,),
            is_controlled=False,
            drawing=dataclasses.replace(tiny.base, **changes),
            data="d",
            say=lambda text: None,
        )

    whole, half = judge(noise_scale=1.0), judge(noise_scale=0.5)
    whole.measure(weights, 0)
    assert whole.is_done(weights, 0) and not half.is_done(weights, 0)
    half.measure(weights, 0)
    first, second = (np.asarray(Image.open(each.scores(weights, 0).pictures[0])) for each in (whole, half))
    size = tiny.base.image_size
    assert (first[:, :size] == second[:, :size]).all()  # the target
    assert (first[:, size:] != second[:, size:]).any()
