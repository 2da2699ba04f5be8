"""Identity files: same content in both formats, safe reading of anything, combining and comparing."""

import io

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from omniid.errors import OmniIDError
from omniid.identity import FORMAT, Identity, IdentityError, IdentityFileError, PhotoRecord

SUFFIXES = [".pt", ".safetensors"]


def make_identity(seed: int = 0, num_images: int = 2, encoder: str = "a" * 64, shape: tuple = (4, 6)) -> Identity:
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    photos = [PhotoRecord(f"{i:064x}", (10.0, -5.5, 0.25), 0.75) for i in range(num_images - 1)]
    return Identity(tokens, encoder, "mini", num_images, [*photos, PhotoRecord("f" * 64)])


def write_table(path, **changes) -> None:
    buffer = io.BytesIO(make_identity()._to_torch(torch.float32))
    table = torch.load(buffer, weights_only=True)
    table.update(changes)
    torch.save({key: value for key, value in table.items() if value is not None}, path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_file_gives_back_what_was_saved(tmp_path, suffix, dtype):
    identity = make_identity()
    path = tmp_path / f"id{suffix}"
    identity.save(path, dtype)
    loaded = Identity.load(path)
    assert loaded.tokens.dtype == dtype
    assert torch.equal(loaded.tokens, identity.tokens.to(dtype))
    for name in ("encoder", "preset", "num_images", "photos", "created", "format_version"):
        assert getattr(loaded, name) == getattr(identity, name)


def test_tokens_are_stored_in_bf16_unless_asked_otherwise(tmp_path):
    make_identity().save(tmp_path / "id.pt")
    assert Identity.load(tmp_path / "id.pt").tokens.dtype == torch.bfloat16


def test_a_view_is_saved_without_the_rest_of_its_storage(tmp_path):
    big = torch.zeros(100_000, 6)
    Identity(big[:4], "a", "mini", 1).save(tmp_path / "id.pt", torch.float32)
    assert (tmp_path / "id.pt").stat().st_size < 10_000


def test_a_renamed_file_is_read_by_its_content(tmp_path):
    make_identity().save(tmp_path / "id.safetensors")
    (tmp_path / "id.safetensors").rename(tmp_path / "id.pt")
    assert Identity.load(tmp_path / "id.pt").num_images == 2


def test_saving_replaces_the_file_and_leaves_no_temporary(tmp_path):
    make_identity(0).save(tmp_path / "id.pt")
    make_identity(1).save(tmp_path / "id.pt", torch.float32)
    assert torch.equal(Identity.load(tmp_path / "id.pt").tokens, make_identity(1).tokens)
    assert [entry.name for entry in tmp_path.iterdir()] == ["id.pt"]


def test_missing_folder_or_folder_as_target_is_refused(tmp_path):
    with pytest.raises(IdentityFileError, match="does not exist; make it first"):
        make_identity().save(tmp_path / "none" / "id.pt")
    with pytest.raises(IdentityFileError, match="is a folder"):
        make_identity().save(tmp_path)


def test_missing_empty_and_folder_are_refused(tmp_path):
    with pytest.raises(IdentityFileError, match=r"none\.pt does not exist; make one with: omniid encode"):
        Identity.load(tmp_path / "none.pt")
    with pytest.raises(IdentityFileError, match="is a folder"):
        Identity.load(tmp_path)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(IdentityFileError, match="is empty"):
        Identity.load(tmp_path / "empty.pt")


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"id{suffix}"
    make_identity().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(IdentityFileError, match="make one with: omniid encode"):
        Identity.load(path)


def test_other_torch_files_and_pickles_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "model.pt")
    with pytest.raises(IdentityFileError, match="torch file with other content"):
        Identity.load(tmp_path / "model.pt")
    torch.save(make_identity, tmp_path / "code.pt")  # a function: weights_only refuses it
    with pytest.raises(IdentityFileError, match="damaged or not an identity file"):
        Identity.load(tmp_path / "code.pt")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format_version": 99}, "format version 99.*upgrade"),
        ({"tokens": torch.zeros(3)}, r"shape \(L, C\)"),
        ({"tokens": torch.full((2, 2), float("nan"))}, "NaN"),
        ({"tokens": torch.zeros(2, 2, dtype=torch.int64)}, "float32 or bfloat16"),
        ({"tokens": None}, "must be a tensor"),
        ({"encoder": None}, "lacks 'encoder'"),
        ({"num_images": 0}, "num_images"),
        ({"photos": [{"sha256": "a", "pose": [1.0], "quality": None}]}, "three finite angles"),
        ({"photos": [{"surprise": 1}]}, "not a usable identity"),
        ({"created": "yesterday"}, "ISO 8601"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_content_is_named(tmp_path, changes, text):
    write_table(tmp_path / "id.pt", **changes)
    with pytest.raises(IdentityFileError, match=text):
        Identity.load(tmp_path / "id.pt")


def test_nan_tokens_are_never_written(tmp_path):
    identity = make_identity()
    identity.tokens[0, 0] = float("nan")
    with pytest.raises(IdentityError, match="NaN"):
        identity.save(tmp_path / "id.pt")
    assert not list(tmp_path.iterdir())


def test_another_encoder_is_refused_with_both_names():
    make_identity(encoder="a" * 64).check_encoder("a" * 64)
    with pytest.raises(IdentityFileError, match=r"aaaaaaaaaaaa.*bbbbbbbbbbbb.*encode the photos again"):
        make_identity(encoder="a" * 64).check_encoder("b" * 64)


def test_merge_is_the_mean_weighted_by_photos():
    a, b = make_identity(0, num_images=1), make_identity(1, num_images=3)
    merged = Identity.merge([a, b])
    torch.testing.assert_close(merged.tokens, 0.25 * a.tokens + 0.75 * b.tokens)
    assert merged.num_images == 4
    assert merged.photos == [*a.photos, *b.photos]


def test_lerp_ends_at_both_identities():
    a, b = make_identity(0), make_identity(1)
    assert torch.equal(Identity.lerp(a, b, 0.0).tokens, a.tokens)
    torch.testing.assert_close(Identity.lerp(a, b, 1.0).tokens, b.tokens)
    with pytest.raises(IdentityError, match="finite"):
        Identity.lerp(a, b, float("nan"))


def test_compare_is_one_for_equal_and_near_zero_for_random_codes():
    a, b = make_identity(0, shape=(32, 64)), make_identity(1, shape=(32, 64))
    same, other = Identity.compare(a, a), Identity.compare(a, b)
    assert same["cosine"] == pytest.approx(1.0)
    assert same["mean_row_cosine"] == pytest.approx(1.0)
    assert same["relative_distance"] == 0.0
    assert abs(other["cosine"]) < 0.1
    assert other["relative_distance"] == pytest.approx(2**0.5, rel=0.05)


@pytest.mark.parametrize(
    "combine",
    [lambda a, b: Identity.merge([a, b]), lambda a, b: Identity.lerp(a, b, 0.5), Identity.compare],
    ids=["merge", "lerp", "compare"],
)
def test_identities_of_different_encoders_or_shapes_do_not_mix(combine):
    with pytest.raises(IdentityError, match="different encoders"):
        combine(make_identity(encoder="a"), make_identity(encoder="b"))
    with pytest.raises(IdentityError, match="different shapes"):
        combine(make_identity(shape=(4, 6)), make_identity(shape=(4, 8)))


def test_nothing_to_merge():
    with pytest.raises(IdentityError, match="at least one"):
        Identity.merge([])


ORIGINALS = {
    ".pt": make_identity()._to_torch(torch.bfloat16),
    ".safetensors": make_identity()._to_safetensors(torch.bfloat16),
}
mutation = st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8))


def load_anything(folder, data: bytes) -> None:
    path = folder / "fuzzed"
    path.write_bytes(data)
    try:
        identity = Identity.load(path)
    except IdentityFileError as error:
        assert str(path) in str(error)
        assert isinstance(error, OmniIDError)
    else:
        identity._validate()


@pytest.mark.parametrize("suffix", SUFFIXES)
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutations=st.lists(mutation, min_size=1, max_size=4), cut=st.floats(0.2, 1.0))
def test_mutated_bytes_give_an_identity_or_a_clear_refusal(tmp_path, suffix, mutations, cut):
    data = bytearray(ORIGINALS[suffix])
    for place, new in mutations:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    load_anything(tmp_path, bytes(data[: int(len(data) * cut)]))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200))
@example(data=b"PK\x03\x04")
@example(data=b"\xff\xff\xff\xff\xff\xff\xff\x7f{}")
@example(data=(2).to_bytes(8, "little") + b"{}")
@example(data=(2).to_bytes(8, "little") + b"[]")
@example(data=(40).to_bytes(8, "little") + b'{"__metadata__":{"omniid":"[[[[[[[[[[[["}')
@example(data=(20_000).to_bytes(8, "little") + b"{" * 20_000)
def test_random_bytes_are_refused(tmp_path, data):
    load_anything(tmp_path, data)


def test_format_name_is_stable():
    # Files in the world carry it.
    assert FORMAT == "omniid-identity"
