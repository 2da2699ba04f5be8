"""Records that are damaged in any way are named or passed over, by inspection and by the loader; nothing else is raised."""

import contextlib
import io

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from omniid.data.few_to_many import FewToManyBatches
from omniid.data.inspection import Inspection, check_row, inspect_records
from omniid.data.records import COLUMNS, RecordError, decode_image, decode_mask

FUZZ = settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],  # busy machines are slow
)
SIDE = 16


def encoded(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8)
    mask = np.pad(np.ones((8, 8), bool), 4)
    buffer = io.BytesIO()
    Image.fromarray(pixels if kind == "JPEG" else mask).save(buffer, kind)
    return buffer.getvalue()


JPEG, PNG = encoded("JPEG"), encoded("PNG")


def record(name: str, **changes: object) -> dict:
    row = {
        "identity_id": name,
        "images": [JPEG] * 3,
        "masks": [PNG] * 3,
        "landmarks": np.full((3, 66, 2), 5.0).tolist(),
        "pose": [[0.0, 0.0, 0.0]] * 3,
        "quality": [1.0] * 3,
        "captions": ["photo of a person"] * 3,
        "source": "test",
        "split": "train",
    }
    return {**row, **changes}


@st.composite
def mutated(draw, data: bytes) -> bytes:
    place, new = draw(st.integers(0, len(data) - 1)), draw(st.binary(max_size=12))
    return (data[:place] + new + data[place + len(new) :])[: draw(st.integers(0, len(data)))]


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4), st.binary(max_size=9)
)
junk = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


@st.composite
def damaged(draw) -> dict:
    """A record with one or two columns of nonsense, or with damaged pictures."""
    changes = {name: draw(junk) for name in draw(st.lists(st.sampled_from(COLUMNS[1:]), max_size=2))}
    if draw(st.booleans()):
        changes["images"] = [JPEG, draw(mutated(JPEG)), JPEG]
    if draw(st.booleans()):
        changes["masks"] = [PNG, draw(mutated(PNG)), PNG]
    return record("fuzzed", **changes)


@FUZZ
@given(row=damaged())
def test_inspection_names_what_is_wrong(row):
    problem = check_row(row, "shard row 0", {}, Inspection(""))
    assert problem is None or problem.startswith("shard row 0 (fuzzed)")


@FUZZ
@given(row=damaged())
def test_the_loader_takes_another_person_instead(row):
    batches = FewToManyBatches(
        [row, record("sound")], SIDE, 2, num_inputs=(1, 2), num_targets=2, seed=0, steps=1, landmarks=True
    )
    batch = batches[0]
    assert set(batch.identity_ids) <= {"fuzzed", "sound"}
    assert batch.targets.shape == (2, 2, 3, SIDE, SIDE)


@FUZZ
@given(image=mutated(JPEG), mask=mutated(PNG))
def test_damaged_pictures_decode_or_are_refused(image, mask):
    for decode, data, shape in ((decode_image, image, (SIDE, SIDE, 3)), (decode_mask, mask, (SIDE, SIDE))):
        with contextlib.suppress(RecordError):
            assert decode(data, SIDE).shape == shape


@FUZZ
@given(data=st.data())
def test_a_damaged_shard_is_a_problem_of_that_shard(tmp_path, data):
    parquet.write_table(pyarrow.Table.from_pylist([record("a"), record("b")]), tmp_path / "good.parquet")
    whole = (tmp_path / "good.parquet").read_bytes()
    (tmp_path / "good.parquet").unlink()
    folder = tmp_path / "set"
    folder.mkdir(exist_ok=True)
    (folder / "train-00000.parquet").write_bytes(data.draw(mutated(whole)))
    for problem in inspect_records(folder).problems:
        assert problem.startswith("train-00000.parquet")


def test_rows_of_another_form_are_named(tmp_path):
    parquet.write_table(pyarrow.table({name: [1, 2] for name in COLUMNS}), tmp_path / "train-00000.parquet")
    assert len(inspect_records(tmp_path).problems) == 2
    with pytest.raises(RecordError, match="records in a row are damaged"):
        FewToManyBatches([dict.fromkeys(COLUMNS, "x")], SIDE, 1, (1, 1), 1, seed=0, steps=1)[0]
