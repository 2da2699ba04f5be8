"""Photos of every kind are opened upright as 8-bit RGB, or refused with a sentence that names the file."""

import io
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from omniid.faces import FaceError, open_photo, photos_in

RED, WHITE = (200, 30, 30), (255, 255, 255)


def left_half_red(mode: str = "RGB", size: tuple[int, int] = (64, 32)) -> Image.Image:
    image = Image.new("RGB", size, WHITE)
    image.paste(RED, (0, 0, size[0] // 2, size[1]))
    return image.convert(mode)


def close(pixel: tuple, wanted: tuple, tolerance: int = 12) -> bool:
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, wanted, strict=True))


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("RGB", "a.jpg"), ("RGB", "a.png"), ("RGB", "a.webp"), ("RGBA", "a.png"), ("P", "a.gif")),
        *(("CMYK", "a.tif"), ("CMYK", "a.jpg"), ("YCbCr", "a.jpg"), ("LAB", "a.tif")),
    ],
)
def test_colour_modes_become_rgb(tmp_path, mode, name):
    path = tmp_path / name
    image = left_half_red(mode)
    image.save(path)
    photo = open_photo(path)
    assert photo.image.mode == "RGB"
    tolerance = 40 if mode == "P" else 12  # the web palette
    assert close(photo.image.getpixel((8, 16)), RED, tolerance)
    assert close(photo.image.getpixel((56, 16)), WHITE, tolerance)
    assert len(photo.sha256) == 64


def test_transparency_is_laid_on_white(tmp_path):
    image = left_half_red("RGBA")
    image.paste((0, 0, 0, 0), (32, 0, 64, 32))
    image.save(tmp_path / "a.png")
    photo = open_photo(tmp_path / "a.png").image
    assert close(photo.getpixel((8, 16)), RED)
    assert close(photo.getpixel((56, 16)), WHITE)


def test_palette_transparency_is_laid_on_white(tmp_path):
    image = Image.new("P", (32, 32), 0)
    image.putpalette([0, 0, 0, *RED])
    image.paste(1, (0, 0, 16, 32))
    image.save(tmp_path / "a.png", transparency=0)
    photo = open_photo(tmp_path / "a.png").image
    assert close(photo.getpixel((8, 16)), RED)
    assert close(photo.getpixel((24, 16)), WHITE)


@pytest.mark.parametrize(
    ("kind", "suffix"), [("uint16", "tif"), ("uint16", "png"), ("int32", "tif"), ("float01", "tif")]
)
def test_deep_gray_keeps_its_range(tmp_path, kind, suffix):
    ramp = np.tile(np.linspace(0, 1, 64), (32, 1))
    array = {"uint16": ramp * 65535, "int32": ramp * 65535, "float01": ramp}[kind].astype(
        {"uint16": np.uint16, "int32": np.int32, "float01": np.float32}[kind]
    )
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(array).save(path)
    photo = np.asarray(open_photo(path).image)
    assert photo[0, 0].max() <= 1
    assert photo[0, -1].min() >= 254
    assert abs(int(photo[0, 32, 0]) - 129) <= 2


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def test_16_bits_a_colour_become_8(tmp_path):
    colours = np.tile(np.array(RED, ">u2") * 257, (32, 32, 1))
    rows = b"".join(b"\0" + row.tobytes() for row in colours)
    header = (32).to_bytes(4, "big") * 2 + b"\x10\x02\0\0\0"  # 16 bits, RGB
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks))
    assert open_photo(tmp_path / "a.png").image.getpixel((8, 16)) == RED


def test_nan_pixels_are_refused(tmp_path):
    Image.fromarray(np.full((32, 32), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(FaceError, match=r"a\.tif.*NaN"):
        open_photo(tmp_path / "a.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_shows_the_same_picture(tmp_path, orientation):
    upright = Image.new("RGB", (64, 32), WHITE)
    upright.paste(RED, (0, 0, 32, 16))  # one quarter: no two orientations of it look alike
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)
    photo = open_photo(tmp_path / "a.jpg").image
    assert photo.size == (64, 32)
    corners = [photo.getpixel(place) for place in ((8, 8), (56, 8), (8, 24), (56, 24))]
    assert [close(pixel, RED) for pixel in corners] == [True, False, False, False]


def test_damaged_exif_and_profile_do_not_stop_a_photo(tmp_path):
    left_half_red().save(tmp_path / "a.jpg", exif=b"Exif\0\0nonsense", icc_profile=b"nonsense", quality=95)
    assert close(open_photo(tmp_path / "a.jpg").image.getpixel((8, 16)), RED)


def test_a_colour_profile_is_applied(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    # Red and blue primaries exchanged: the stored red is a blue.
    swapped = profile.replace(b"rXYZ", b"....", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"....", b"bXYZ", 1)
    left_half_red().save(tmp_path / "a.png", icc_profile=swapped)
    photo = open_photo(tmp_path / "a.png").image
    assert close(photo.getpixel((8, 16)), RED[::-1])
    assert close(photo.getpixel((56, 16)), WHITE)


def test_images_in_memory_are_taken_too():
    photo = open_photo(left_half_red("L"))
    assert photo.image.mode == "RGB"
    assert photo.sha256 == open_photo(left_half_red("L")).sha256
    assert photo.sha256 != open_photo(left_half_red("L", (80, 32))).sha256


def jpeg_bytes() -> bytes:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "is empty"),
        (b"hello, this is text", "not an image"),
        (jpeg_bytes()[:-500], "truncated"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC photo.*convert it to JPEG"),
    ],
    ids=["empty", "text", "truncated", "heic"],
)
def test_unusable_files_are_named(tmp_path, data, text):
    path = tmp_path / "bad photo.jpg"
    path.write_bytes(data)
    with pytest.raises(FaceError, match=rf"bad photo\.jpg.*{text}"):
        open_photo(path)


@pytest.mark.parametrize("side", [16_000, 40_000])
def test_a_decompression_bomb_is_refused_before_it_is_unpacked(tmp_path, side):
    chunk = png_chunk(b"IHDR", side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0")
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\x10IDAT")
    with pytest.raises(FaceError, match=r"bomb\.png has .*pixels.*scale the photo down"):
        open_photo(tmp_path / "bomb.png")


def test_a_photo_of_40_megapixels_is_opened(tmp_path):
    left_half_red(size=(7680, 5222)).save(tmp_path / "a.jpg", quality=50)
    photo = open_photo(tmp_path / "a.jpg").image
    assert photo.size == (7680, 5222)
    assert close(photo.getpixel((3000, 5000)), RED)


def test_missing_folder_and_tiny_photos_are_named(tmp_path):
    with pytest.raises(FaceError, match=r"none\.jpg does not exist"):
        open_photo(tmp_path / "none.jpg")
    with pytest.raises(FaceError, match="is a folder"):
        open_photo(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "tiny.png")
    with pytest.raises(FaceError, match=r"tiny\.png has only 8 x 8 pixels"):
        open_photo(tmp_path / "tiny.png")


def test_folders_give_their_photos_by_name(tmp_path):
    for name in ("b.JPG", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "inner").mkdir()
    assert photos_in([tmp_path]) == [tmp_path / "a.png", tmp_path / "b.JPG"]
    assert photos_in([tmp_path / "notes.txt"]) == [tmp_path / "notes.txt"]  # named: the reader decides
    with pytest.raises(FaceError, match="inner holds no photos"):
        photos_in([tmp_path / "inner"])
    with pytest.raises(FaceError, match=r"x\.jpg does not exist"):
        photos_in([tmp_path / "x.jpg"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), new=st.binary(min_size=1, max_size=16), cut=st.floats(0.3, 1))
def test_mutated_photos_open_or_are_refused(tmp_path, place, new, cut):
    data = bytearray(jpeg_bytes())
    start = int(place * len(data))
    data[start : start + len(new)] = new
    path = tmp_path / "fuzzed.jpg"
    path.write_bytes(bytes(data[: int(len(data) * cut)]))
    try:
        assert open_photo(path).image.mode == "RGB"
    except FaceError as error:
        assert "fuzzed.jpg" in str(error)
