"""Safe decoding, on a corpus of difficult files made here byte by byte or by Pillow."""

import io
import os
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from data.images import STRIP_ROWS, BadImage, open_image


def encode(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def decode(content: bytes, **options) -> np.ndarray:
    image = open_image(io.BytesIO(content), **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def gradient(width: int = 40, height: int = 20) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 6, y * 12, (x + y) * 4], axis=-1).astype(np.uint8))


def png(width: int, height: int, bit_depth: int, colour_type: int, raw: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand; `raw` is the rows, each with its filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    middle = b"".join(chunk(kind, body) for kind, body in extra)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + middle
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def expect_bad(source, reason: str, match: str = ".", **options) -> BadImage:
    with pytest.raises(BadImage, match=match) as caught:
        open_image(io.BytesIO(source) if isinstance(source, bytes) else source, **options)
    assert caught.value.reason == reason
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_their_pixels(format):
    image = gradient()
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(decode(encode(image, format, **options)), np.asarray(image))


def test_jpeg_is_close():
    difference = decode(encode(gradient(), "JPEG", quality=95, subsampling=0)).astype(int) - np.asarray(
        gradient()
    ).astype(int)
    assert np.abs(difference).mean() < 3


# Orientation tag -> what a viewer must do to the stored pixels, in numpy's words.
TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", list(TURNED))
def test_exif_orientation_turns_the_image(format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    turned = decode(encode(gradient(), format, exif=exif, **options))
    expected = TURNED[orientation](np.asarray(gradient()))
    assert turned.shape == expected.shape
    np.testing.assert_allclose(turned.astype(int), expected.astype(int), atol=6 if format == "JPEG" else 0)


def test_broken_exif_leaves_the_pixels_alone():
    content = encode(gradient(), "PNG", exif=b"Exif\x00\x00MM\x00\x2a\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(decode(content), np.asarray(gradient()))


def test_rgba_is_composited_on_white():
    pixels = np.zeros((2, 2, 4), np.uint8)
    pixels[..., 0] = 255
    pixels[0, 0, 3], pixels[0, 1, 3], pixels[1, 0, 3] = 255, 0, 128
    rgb = decode(encode(Image.fromarray(pixels), "PNG"))
    assert rgb[0, 0].tolist() == [255, 0, 0]
    assert rgb[0, 1].tolist() == [255, 255, 255]
    np.testing.assert_allclose(rgb[1, 0], [255, 127, 127], atol=1)


def test_grey_with_alpha_is_composited_on_white():
    pixels = np.array([[[0, 255], [0, 0], [100, 128]]], np.uint8)
    rgb = decode(encode(Image.fromarray(pixels, "LA"), "PNG"))
    np.testing.assert_allclose(rgb[0, :, 0], [0, 255, 100 * 128 / 255 + 127], atol=1)


def test_palette_transparency_is_white():
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert decode(encode(image, "PNG", transparency=1)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert decode(encode(image, "PNG")).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparent_key_colour_is_white():
    content = png(2, 1, 8, 2, bytes([0, 9, 8, 7, 1, 2, 3]), (b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert decode(content).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_cmyk_tiff_and_adobe_inverted_jpeg():
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))  # red ink
    for content in (encode(cmyk, "TIFF"), encode(cmyk, "JPEG", quality=100)):
        np.testing.assert_allclose(decode(content)[8, 8], [255, 0, 0], atol=8)
    assert b"Adobe" in encode(cmyk, "JPEG")


def test_16_bit_grey_is_scaled_not_saturated():
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    contents = [
        encode(Image.fromarray(ramp), "PNG"),
        encode(Image.fromarray(ramp), "TIFF"),
        encode(Image.frombytes("I;16B", (16, 16), ramp.astype(">u2").tobytes()), "TIFF"),
        encode(Image.fromarray(ramp.astype(np.int32)), "TIFF"),
    ]
    for content in contents:
        assert Image.open(io.BytesIO(content)).mode in ("I;16", "I;16B", "I")
        rgb = decode(content)
        np.testing.assert_array_equal(rgb, np.repeat(expected[..., None], 3, axis=-1))


def test_16_bit_grey_with_a_transparent_value():
    content = png(2, 1, 16, 0, b"\0" + struct.pack(">HH", 257 * 80, 1234), (b"tRNS", struct.pack(">H", 1234)))
    assert decode(content)[0, :, 0].tolist() == [80, 255]


def test_16_bit_colour_keeps_its_high_byte():
    content = png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 200 * 257, 100 * 257, 7 * 257))
    assert decode(content).tolist() == [[[200, 100, 7]]]


def test_32_bit_grey_without_a_known_white_is_refused():
    wide = Image.fromarray(np.array([[0, 70000]], np.int32))
    expect_bad(encode(wide, "TIFF"), "format", "from 0 to 70000")


def test_float_grey():
    unit = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32))
    assert decode(encode(unit, "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    for values in ([[-1.0, 1.0]], [[0.0, 300.0]], [[0.0, np.nan]]):
        expect_bad(encode(Image.fromarray(np.array(values, np.float32)), "TIFF"), "format", "floating-point")


TALL = (600, 3)  # rows, columns: more than two strips of the conversion


def assert_three_alike(content: bytes, expected: np.ndarray) -> None:
    """A grey image (h, w) in all channels."""
    assert TALL[0] > 2 * STRIP_ROWS and expected.shape == TALL and len(np.unique(expected[:, 0])) > 200, "rows differ"
    np.testing.assert_array_equal(decode(content), np.repeat(expected[..., None], 3, axis=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_every_row_of_a_tall_transparent_image(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (*TALL, len(mode)), dtype=np.uint8)
    colour, alpha = pixels[..., :-1].astype(float), pixels[..., -1:] / 255
    found = decode(encode(Image.fromarray(pixels, mode), "PNG")).astype(float)
    # Pillow composites in integers: it is off by less than one.
    np.testing.assert_allclose(found, np.broadcast_to(colour * alpha + 255 * (1 - alpha), (*TALL, 3)), atol=1)


def test_every_row_of_a_tall_palette_image_with_transparency():
    generator = np.random.default_rng(0)
    indices, palette = generator.integers(0, 256, TALL, dtype=np.uint8), generator.integers(0, 256, (256, 3), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(palette.tobytes())
    palette[7] = 255
    np.testing.assert_array_equal(decode(encode(image, "PNG", transparency=7)), palette[indices])


def test_every_row_of_a_tall_16_bit_image():
    values = np.random.default_rng(0).integers(0, 65536, TALL, dtype=np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    assert_three_alike(encode(Image.fromarray(values), "PNG"), expected)
    assert_three_alike(encode(Image.fromarray(values.astype(np.int32)), "TIFF"), expected)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    content = png(TALL[1], TALL[0], 16, 0, rows, (b"tRNS", struct.pack(">H", int(values[550, 1]))))
    assert_three_alike(content, np.where(values == values[550, 1], 255, expected))


@pytest.mark.parametrize("row", [0, 300, 599])
@pytest.mark.parametrize("value", [-1, 70000])
def test_a_value_beyond_16_bits_is_found_in_any_row(row, value):
    values = np.full(TALL, 5, np.int32)
    values[row, 2] = value
    expect_bad(encode(Image.fromarray(values), "TIFF"), "format", f"from {min(5, value)} to {max(5, value)}")


def test_every_row_of_a_tall_float_image():
    values = np.random.default_rng(0).random(TALL, dtype=np.float32)
    assert_three_alike(encode(Image.fromarray(values), "TIFF"), np.rint(values.astype(np.float64) * 255).astype(np.uint8))
    values[599, 2] = 1.5
    expect_bad(encode(Image.fromarray(values), "TIFF"), "format", "floating-point")


def test_one_bit_and_grey():
    assert decode(encode(Image.fromarray(np.array([[True, False]])), "PNG"))[0, :, 1].tolist() == [255, 0]
    assert decode(encode(Image.fromarray(np.array([[3, 250]], np.uint8)), "PNG"))[0, :, 2].tolist() == [3, 250]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert getattr(Image.open(io.BytesIO(content)), "n_frames", 1) == 3
    assert (decode(content) == [255, 0, 0]).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 20000), (20000, 1)])
def test_extreme_sizes_decode(size):
    assert decode(encode(Image.new("RGB", size, (1, 2, 3)), "PNG")).shape == (size[1], size[0], 3)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_bad(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = encode(noise, format)
    with pytest.raises(BadImage) as caught:
        decode(content[: len(content) * 6 // 10])
    assert caught.value.reason in ("truncated", "unreadable")
    if format in ("JPEG", "PNG"):
        assert caught.value.reason == "truncated"


def test_pixel_cap_is_checked_before_decoding():
    # The header promises 10^8 pixels; there are none, so only a check of the header can give this message.
    expect_bad(
        png(10_000, 10_000, 8, 2, b""), "too-large", "100000000 pixels, more than the limit of 1000", max_pixels=1000
    )
    content = encode(gradient(), "PNG")
    assert decode(content, max_pixels=800).shape == (20, 40, 3)
    expect_bad(content, "too-large", max_pixels=799)


def test_decompression_bomb_is_a_bad_image_and_the_global_limit_stays():
    before = Image.MAX_IMAGE_PIXELS
    expect_bad(png(60_000, 60_000, 8, 2, b""), "too-large", max_pixels=10**12)
    assert Image.MAX_IMAGE_PIXELS == before


def test_no_warning_leaks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Between Pillow's warning (89 million) and our cap (128 million): decoded as far as it goes, without a warning.
        expect_bad(png(10_000, 10_000, 8, 2, b""), "truncated")
        decode(encode(Image.new("P", (2, 2)), "PNG", transparency=b"\0\xff"))


def test_a_multi_picture_jpeg_gives_its_first_picture():
    content = encode(
        gradient(), "MPO", save_all=True, append_images=[Image.new("RGB", (40, 20))], quality=100, subsampling=0
    )
    np.testing.assert_allclose(decode(content).astype(int), np.asarray(gradient()).astype(int), atol=6)


def test_formats_outside_the_list_are_refused():
    expect_bad(encode(gradient(), "ICO"), "format", "JPEG, PNG, WEBP, GIF, BMP, TIFF")
    expect_bad(encode(gradient(), "PPM"), "format")
    expect_bad(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "format")
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(200)
    expect_bad(heic, "format", "convert HEIC")


def test_files_that_are_no_images(tmp_path):
    expect_bad(tmp_path / "absent.jpg", "missing", "absent.jpg: no such file")
    (tmp_path / "folder.jpg").mkdir()
    expect_bad(tmp_path / "folder.jpg", "unreadable", "folder")
    (tmp_path / "zero.jpg").write_bytes(b"")
    expect_bad(tmp_path / "zero.jpg", "empty", "empty")
    (tmp_path / "text.jpg").write_text("this is not a picture\n")
    expect_bad(tmp_path / "text.jpg", "format")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    expect_bad(tmp_path / "loop.jpg", "unreadable")
    os.mkfifo(tmp_path / "pipe.jpg")
    expect_bad(tmp_path / "pipe.jpg", "unreadable", "regular file")
    expect_bad(tmp_path / "zero\0byte.jpg", "unreadable")
    assert expect_bad(tmp_path / "two\nlines.jpg", "missing").name.endswith("two\nlines.jpg")


def test_wrong_extension_is_read_by_content(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(encode(gradient(), "PNG"))
    np.testing.assert_array_equal(np.asarray(open_image(tmp_path / "photo.jpg")), np.asarray(gradient()))
    assert open_image(str(tmp_path / "photo.jpg")).size == (40, 20)


def test_random_damage_never_escapes_as_another_exception():
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"):
        content = np.frombuffer(
            encode(gradient(), format, **({} if format in ("GIF", "BMP") else {"exif": exif})), np.uint8
        )
        for _ in range(60):
            damaged = content.copy()
            places = generator.integers(0, len(damaged), 5)
            damaged[places] = generator.integers(0, 256, 5)
            try:
                assert open_image(io.BytesIO(damaged.tobytes()), max_pixels=1_000_000).mode == "RGB"
            except BadImage as bad:
                assert bad.reason in ("format", "too-large", "truncated", "unreadable")


def test_bad_image_survives_pickling():
    bad = pickle.loads(pickle.dumps(BadImage("a.jpg", "missing", "no such file")))
    assert (bad.name, bad.reason, str(bad)) == ("a.jpg", "missing", "a.jpg: no such file")
