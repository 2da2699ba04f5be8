"""Few-to-many batches: pure functions of records, seed and step."""

import numpy as np
import pytest
import torch

from omniid.data.few_to_many import FewToManyBatches, mirrored
from omniid.data.records import RecordError, decode_image, decode_mask, open_records, read_row
from omniid.faces.landmarks import NUM_LANDMARKS, mirror_landmarks


def batches(rows, **changes):
    settings = {
        "size": 32,
        "batch_identities": 4,
        "num_inputs": (1, 3),
        "num_targets": 2,
        "seed": 5,
        "steps": 50,
    } | changes
    return FewToManyBatches(rows, **settings)


@pytest.fixture(scope="module")
def rows(records):
    return open_records(records, "train")


def assert_equal(one, other):
    for name in ("inputs", "cu_inputs", "targets", "masks"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.captions, one.identity_ids, one.places) == (other.captions, other.identity_ids, other.places)
    assert one.landmarks is None or np.array_equal(one.landmarks, other.landmarks)


def test_shapes_and_packing(rows):
    batch = batches(rows)[0].to_device(torch.device("cpu"))
    counts = batch.cu_inputs.diff()
    assert batch.cu_inputs[0] == 0 and batch.cu_inputs[-1] == len(batch.inputs)
    assert ((counts >= 1) & (counts <= 3)).all()
    assert batch.targets.shape == (4, 2, 3, 32, 32) and batch.masks.shape == (4, 2, 32, 32)
    assert batch.targets.min() >= -1 and batch.targets.max() <= 1 and batch.targets.min() < 0
    assert batch.masks.any() and not batch.masks.all()
    assert [len(texts) for texts in batch.captions] == [2, 2, 2, 2]


def test_a_step_is_reproducible_and_steps_differ(rows):
    one, again, other = batches(rows)[7], batches(rows)[7], batches(rows)[8]
    assert torch.equal(one.inputs, again.inputs) and torch.equal(one.targets, again.targets)
    assert one.identity_ids != other.identity_ids


def test_steps_may_be_asked_for_in_any_order(rows):
    asked = batches(rows)
    for step in (40, 0, 7, 0):
        assert_equal(asked[step], batches(rows)[step])


@pytest.mark.parametrize("changes", [{}, {"mirror": 0.5, "landmarks": True}], ids=["plain", "mirrored"])
def test_loader_processes_give_the_same_batches(rows, changes):
    loader = torch.utils.data.DataLoader(batches(rows, steps=3, **changes), batch_size=None, num_workers=2)
    for step, batch in enumerate(loader):
        assert_equal(batch, batches(rows, **changes)[step])


def test_rows_read_piece_by_piece_are_the_rows(rows):
    """Of a dataset in Arrow's format only what is looked at is converted."""
    lazy = read_row(rows.with_format("arrow"), 2)
    assert set(lazy) == set(rows[2]) and len(lazy) == len(rows[2])
    assert lazy["identity_id"] == rows[2]["identity_id"]
    for name in ("images", "masks", "landmarks", "pose", "captions"):
        assert list(lazy[name]) == rows[2][name], name
    assert_equal(batches(rows, landmarks=True)[1], batches(list(rows), landmarks=True)[1])


def test_an_epoch_shows_everyone_once(rows):
    seen = [name for step in range(5) for name in batches(rows, batch_identities=2)[step].identity_ids]
    assert sorted(seen) == sorted(rows["identity_id"])


def test_ranks_share_the_global_batch(rows):
    whole = batches(rows)[3]
    parts = [batches(rows, rank=rank, world_size=2)[3] for rank in range(2)]
    assert sorted(whole.identity_ids) == sorted(parts[0].identity_ids + parts[1].identity_ids)


def test_targets_are_other_photos(rows):
    for step in range(6):
        batch = batches(rows, num_inputs=(2, 2), num_targets=4)[step]
        for b in range(4):
            inputs = {image.numpy().tobytes() for image in batch.inputs[batch.cu_inputs[b] : batch.cu_inputs[b + 1]]}
            targets = {image.numpy().tobytes() for image in batch.targets[b]}
            # Records hold rolled copies of one pattern, so equal photos can occur; most differ.
            assert len(targets - inputs) >= len(targets) - 2


def test_more_targets_than_photos_repeat_photos(rows):
    assert batches(rows, num_targets=8)[0].targets.shape[1] == 8


def test_turned_photos_are_left_out(rows):
    turned = [dict(row) | {"pose": [[yaw, 0.0, 0.0] for yaw in (0, -40, 50, 10, -70, 80)]} for row in rows]
    batch = batches(turned, max_yaw=45.0, num_inputs=(1, 1), num_targets=2)[0]
    for b, name in enumerate(batch.identity_ids):
        row = next(row for row in turned if row["identity_id"] == name)
        allowed = {decode_image(row["images"][i], 32).tobytes() for i in (0, 1, 3)}
        shown = [*batch.inputs[batch.cu_inputs[b] : batch.cu_inputs[b + 1]], *batch.targets[b]]
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in shown} <= allowed


def test_mirrored_people_are_mirrored_as_a_whole(rows):
    plain, mirror = batches(rows)[2], batches(rows, mirror=1.0)[2]
    assert torch.equal(mirror.inputs, plain.inputs.flip(-1))
    assert torch.equal(mirror.targets, plain.targets.flip(-1))
    assert torch.equal(mirror.masks, plain.masks.flip(-1))


def test_mirrored_captions_exchange_left_and_right():
    sample = {name: np.zeros((1, 2, 2, 3)) for name in ("inputs", "targets", "masks")}
    captions = ["looking to the left, light from the right", "leftover"]
    assert mirrored(sample | {"captions": captions})["captions"] == [
        "looking to the right, light from the left",
        "leftover",
    ]


def with_landmarks(rows):
    points = np.random.default_rng(0).uniform(0, 32, (len(rows), 6, NUM_LANDMARKS, 2))
    return [dict(rows[i]) | {"landmarks": points[i].tolist()} for i in range(len(rows))], points


def test_landmarks_come_in_pixels_of_the_size_asked_for(rows):
    listed, points = with_landmarks(rows)
    batch = batches(listed, size=16, landmarks=True)[0]
    for name, found in zip(batch.identity_ids, batch.landmarks, strict=True):
        known = points[int(name.split("-")[1])] / 2
        assert all(np.isclose(one, known).all((1, 2)).any() for one in found)
    assert batches(rows)[0].landmarks is None


def test_landmarks_of_mirrored_people_are_mirrored(rows):
    listed, _ = with_landmarks(rows)
    for number, row in enumerate(listed):
        row["pose"] = [[10.0 + number, -5.0, 2.0]] * len(row["pose"])
    plain, mirror = (batches(listed, landmarks=True, mirror=share)[1] for share in (0.0, 1.0))
    np.testing.assert_allclose(mirror.landmarks, mirror_landmarks(plain.landmarks, 32))
    np.testing.assert_array_equal(mirror.poses, plain.poses * [-1, 1, -1])
    assert plain.poses.shape == (*plain.landmarks.shape[:2], 3) and (plain.poses[..., 0] >= 10).all()


@pytest.mark.parametrize("pose", [[0.0, float("nan"), 0.0], [1.0, 2.0]], ids=["no number", "two angles"])
def test_records_with_other_poses_are_damaged_only_where_landmarks_are_asked_for(rows, pose):
    listed, _ = with_landmarks(rows)
    listed[3] = listed[3] | {"pose": [pose] * len(listed[3]["pose"])}
    wide = {"batch_identities": 2, "max_yaw": 180.0}
    reported = [text for step in range(5) for text in batches(listed, **wide, landmarks=True)[step].skipped]
    assert len(reported) == 1 and reported[0].startswith("train-3: ")
    assert not any(batches(listed, **wide)[step].skipped for step in range(5))


def test_records_with_other_landmarks_are_damaged_only_where_landmarks_are_asked_for(rows):
    listed, _ = with_landmarks(rows)
    listed[3] = listed[3] | {"landmarks": [points[:5] for points in listed[3]["landmarks"]]}
    reported = [text for step in range(5) for text in batches(listed, batch_identities=2, landmarks=True)[step].skipped]
    assert len(reported) == 1 and reported[0].startswith("train-3: unusable landmarks (landmarks must be (66, 2)")
    assert not any(batches(listed, batch_identities=2)[step].skipped for step in range(5))


def damaged(rows, *places):
    """The rows as a list, with the images at the given places cut off."""
    listed = [dict(rows[i]) for i in range(len(rows))]
    for place in places:
        listed[place] = listed[place] | {"images": [data[:40] for data in listed[place]["images"]]}
    return listed


def test_a_damaged_record_is_replaced_and_reported(rows):
    bad = damaged(rows, 3)
    reported = [text for step in range(5) for text in batches(bad, batch_identities=2)[step].skipped]
    assert len(reported) == 1 and reported[0].startswith("train-3: damaged JPEG")


def test_what_was_read_of_a_damaged_record_is_gone(rows):
    """The last photo is damaged: others were decoded when that is found."""
    listed = [dict(row) for row in rows]
    listed[3]["images"] = [*listed[3]["images"][:5], b""]
    for batch in (batches(listed, num_targets=6)[step] for step in range(3)):
        for b, name in enumerate(batch.identity_ids):
            row = next(row for row in listed if row["identity_id"] == name)
            allowed = {decode_image(data, 32).tobytes() for data in row["images"]}
            shown = [*batch.inputs[batch.cu_inputs[b] : batch.cu_inputs[b + 1]], *batch.targets[b]]
            assert {image.permute(1, 2, 0).numpy().tobytes() for image in shown} <= allowed


def test_a_record_without_images_is_damaged(tmp_path, rows):
    import datasets

    listed = [dict(row) for row in rows]
    listed[3]["images"] = None
    datasets.Dataset.from_list(listed).to_parquet(str(tmp_path / "train-00000.parquet"))
    asked = batches(open_records(tmp_path, "train"), batch_identities=2)
    reported = [text for step in range(5) for text in asked[step].skipped]
    assert len(reported) == 1 and "found 0 images, 6 masks" in reported[0]


def test_only_damaged_records_end_the_run(rows):
    with pytest.raises(RecordError, match="records in a row are damaged"):
        batches(damaged(rows, *range(10)))[0]


def test_batch_must_split_evenly(rows):
    with pytest.raises(RecordError, match="not a multiple of the 3 processes"):
        batches(rows, world_size=3)


def test_missing_folder_and_split(records, tmp_path):
    with pytest.raises(RecordError, match="omniid data synth"):
        open_records(tmp_path, "train")
    with pytest.raises(RecordError, match="'test'"):
        open_records(records, "test")


def test_damaged_shard(tmp_path):
    (tmp_path / "train-00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RecordError, match="cannot be read"):
        open_records(tmp_path, "train")


@pytest.mark.parametrize("size", [16, 32, 40])
def test_images_come_in_the_size_asked_for(rows, size):
    assert decode_image(rows[0]["images"][0], size).shape == (size, size, 3)
    mask = decode_mask(rows[0]["masks"][0], size)
    assert mask.shape == (size, size) and mask.dtype == np.bool_


@pytest.mark.parametrize("size", [16, 32, 40])
def test_images_are_decoded_in_place(rows, size):
    out = np.zeros((2, size, size, 3), np.uint8)
    decode_image(rows[0]["images"][0], size, out[1])
    assert np.array_equal(out[1], decode_image(rows[0]["images"][0], size)) and not out[0].any()


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"plain text"])
def test_bytes_that_are_no_image(data):
    with pytest.raises(RecordError, match="damaged JPEG"):
        decode_image(data, 32)
    with pytest.raises(RecordError, match="damaged mask"):
        decode_mask(data, 32)


def test_single_image_reconstruction_and_inputs_of_another_size(records):
    rows = open_records(records, "train")
    batch = FewToManyBatches(rows, 32, 3, (1, 1), 2, seed=0, steps=1, input_size=16, reconstruct_inputs=True)[0]
    assert batch.inputs.shape == (3, 3, 16, 16) and batch.targets.shape == (3, 2, 3, 32, 32)
    assert torch.equal(batch.targets[:, 0], batch.targets[:, 1])
    same = FewToManyBatches(rows, 32, 3, (1, 1), 1, seed=0, steps=1, reconstruct_inputs=True)[0]
    assert torch.equal(same.inputs, same.targets[:, 0])
