"""Real files of every kind: pixels come back upright in sRGB, or the reason names what is wrong with the file."""

import contextlib
import io
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from numpy.typing import NDArray
from PIL import Image, ImageCms

from mixres.data.images import BadImageError, Limits, check_size, inspect_image, read_image, read_mask
from mixres.geometry import Size

LIMITS, FIRST = Limits(), Limits(first_frame=True)
Pixels = NDArray[np.uint8]


def encode(image: Image.Image, file_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, lossless=True, exact=True, **options)  # of WEBP: the others do not know them
    return file.getvalue()


def read(folder: Path, data: bytes, limits: Limits = LIMITS) -> Pixels:
    path = folder / "image"
    path.write_bytes(data)
    image = read_image(path, limits)
    assert image.mode == "RGB"
    return np.asarray(image)


def problem(folder: Path, data: bytes, limits: Limits = LIMITS) -> str:
    with pytest.raises(BadImageError) as caught:
        read(folder, data, limits)
    return str(caught.value)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head)


PHOTO = Image.fromarray(skimage.data.coffee()).resize((120, 80))
GRAY, BITS = np.arange(256, dtype=np.uint16).reshape(16, 16), np.indices((32, 32)).sum(0) % 2 == 0
LOSSLESS: dict[str, tuple[Image.Image, list[str], Any]] = {  # image, file formats, pixels
    "RGB": (PHOTO, ["PNG", "TIFF", "BMP", "WEBP"], PHOTO),
    "opaque alpha": (PHOTO.convert("RGBA"), ["PNG"], PHOTO),
    "palette": (PHOTO.quantize(64), ["PNG", "GIF", "BMP"], PHOTO.quantize(64).convert("RGB")),
    "one bit": (Image.fromarray(BITS), ["PNG", "TIFF", "BMP"], np.where(BITS, 255, 0)[:, :, None].repeat(3, 2)),
    "16-bit gray": (Image.fromarray(GRAY * 257), ["PNG", "TIFF"], GRAY[:, :, None].repeat(3, 2)),
}


@pytest.mark.parametrize(("image", "file_formats", "expected"), LOSSLESS.values(), ids=LOSSLESS)
def test_lossless_formats_give_the_pixels_that_were_saved(
    tmp_path: Path, image: Image.Image, file_formats: list[str], expected: Any
) -> None:
    for file_format in file_formats:
        found = read(tmp_path, encode(image, file_format))
        assert np.array_equal(found, np.asarray(expected)), file_format
        assert not inspect_image(tmp_path / "image", LIMITS).flattened


UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {  # EXIF 2.3, tag 0x0112: what turns the stored image upright
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, 1),
}


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, file_format: str, orientation: int) -> None:
    plain = read(tmp_path, encode(PHOTO, file_format))
    assert np.array_equal(
        read(tmp_path, encode(PHOTO, file_format, exif=turned(orientation))), UPRIGHT[orientation](plain)
    )
    size = Size(80, 120) if orientation >= 5 else Size(120, 80)
    assert inspect_image(tmp_path / "image", LIMITS).size == size
    (tmp_path / "mask").write_bytes(encode(PHOTO.convert("L"), file_format, exif=turned(orientation)))
    assert Size(*read_mask(tmp_path / "mask", LIMITS).size) == size


def test_16_bit_colour_png_is_read_as_8_bit(tmp_path: Path) -> None:
    rows = np.asarray(PHOTO).astype(">u2") * 257
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    data = png_header(120, 80, depth=16) + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b"")
    assert np.array_equal(read(tmp_path, data), np.asarray(PHOTO))


def tiff_with(image: Image.Image, tag: int, value: int) -> bytes:
    """A gray TIFF as Pillow writes it, but for one value of its directory."""
    data, entry = encode(image, "TIFF"), struct.pack("<HHI", tag, 3, 1)
    assert data.count(entry) == 1
    at = data.index(entry) + len(entry)
    return data[:at] + struct.pack("<H", value) + data[at + 2 :]


@pytest.mark.parametrize(("tag", "value"), [(258, 12), (262, 0)], ids=["12_bits", "white_is_zero"])
def test_16_bit_gray_that_counts_in_another_way_is_refused(tmp_path: Path, tag: int, value: int) -> None:
    """Pillow hands these numbers out as they are: images that are near black, and negatives."""
    image = Image.fromarray(np.full((16, 16), 4095, np.uint16))
    assert (read(tmp_path, tiff_with(image, 258, 16)) == 16).all()
    reason = "is a TIFF whose gray is not 0 (black) to 65535 (white); save it as 8- or 16-bit PNG"
    assert problem(tmp_path, tiff_with(image, tag, value)) == reason
    negative = tiff_with(Image.fromarray(np.full((16, 16), 10, np.uint8)), 262, 0)
    assert (read(tmp_path, negative) == 245).all(), "of 8 bits it is turned the right way round"


def test_cmyk_without_profile(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inks = rng.integers(0, 256, (40, 40, 4), dtype=np.uint8)
    found = read(tmp_path, encode(Image.fromarray(inks, "CMYK"), "TIFF"))
    light = 255.0 - inks
    expected = light[..., :3] * light[..., 3:] / 255
    assert np.abs(found - expected).max() <= 1
    jpeg = read(tmp_path, encode(PHOTO.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(jpeg.astype(int) - np.asarray(PHOTO)).mean() < 4, "inverted inks would be far off"


@pytest.mark.parametrize(
    ("file_format", "background", "colour"),
    [("PNG", "white", 255), ("TIFF", "gray", 128), ("WEBP", "white", 255), ("PNG", "#0A80fe", (10, 128, 254))],
)
def test_transparency_is_laid_on_the_background(tmp_path: Path, file_format: str, background: str, colour: Any) -> None:
    alpha = np.zeros((80, 120), np.uint8)
    alpha[:, 40:80], alpha[:, 80:] = 128, 255
    image = PHOTO.copy()
    image.putalpha(Image.fromarray(alpha))
    found = read(tmp_path, encode(image, file_format), Limits(background=background))
    opacity = alpha[:, :, None] / 255
    assert Limits().background == "white"
    assert (found[:, :40] == colour).all(), "hidden colour shows through"
    assert np.array_equal(found[:, 80:], np.asarray(PHOTO)[:, 80:]), "what is opaque stays as it is"
    assert np.abs(found - (np.asarray(PHOTO) * opacity + np.asarray(colour) * (1 - opacity))).max() <= 1
    assert inspect_image(tmp_path / "image", LIMITS).flattened


def test_gray_with_alpha_and_transparent_colours_are_laid_on_white(tmp_path: Path) -> None:
    gray = PHOTO.convert("LA")
    gray.putalpha(0)
    assert (read(tmp_path, encode(gray, "PNG")) == 255).all()
    key = PHOTO.getpixel((5, 3))
    assert tuple(read(tmp_path, encode(PHOTO, "PNG", transparency=key))[3, 5]) == (255, 255, 255)
    paletted = PHOTO.quantize(16)
    index = paletted.getpixel((5, 3))
    found = read(tmp_path, encode(paletted, "PNG", transparency=bytes([0 if i == index else 255 for i in range(16)])))
    assert (found[np.asarray(paletted) == index] == 255).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_gray_that_a_png_calls_transparent_is_white_at_every_depth(tmp_path: Path, depth: int) -> None:
    """All values of the depth in turn; number 1 is the transparent one."""
    values = np.arange(32 * 32, dtype=np.uint32).reshape(32, 32) % 2 ** min(depth, 8) * (257 if depth == 16 else 1)
    bits = values[:, :, None] >> np.arange(depth)[::-1] & 1
    raw = b"".join(b"\0" + np.packbits(row.ravel().astype(np.uint8)).tobytes() for row in bits)
    key = 257 if depth == 16 else 1
    data = png_header(32, 32, depth, colour=0) + png_chunk(b"tRNS", struct.pack(">H", key))
    found = read(tmp_path, data + png_chunk(b"IDAT", zlib.compress(raw)) + png_chunk(b"IEND", b""))
    gray = np.rint(values / (2**depth - 1) * 255)
    assert np.array_equal(found, np.repeat(np.where(values == key, 255, gray)[:, :, None], 3, axis=2))
    assert inspect_image(tmp_path / "image", LIMITS).flattened


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_a_defined_range_are_refused(tmp_path: Path, mode: str) -> None:
    reason = problem(tmp_path, encode(Image.new(mode, (32, 32)), "TIFF"))
    assert reason == f"has pixels of mode {mode}, whose range is not defined; save it as 8- or 16-bit RGB or gray"


ADOBE_RGB = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
SRGB = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
GAMMA = 563 / 256
BLUE = (54, 156, 197)  # CIELAB (60, -20, -30) of a D50 white, by CIE 15:2004


def icc_profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntrXYZ ") -> bytes:
    """A version 2 profile (ICC.1:2001-04) of the given tags; `kind` is its class and connection space."""
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
    } | tags
    table, body = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 0, b"\0" * 4, 0x02400000, kind[:4], space, kind[4:])
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">iii", 63190, 65536, 54061)
    profile = head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(profile)) + profile[4:]


def xyz(*values: float) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in values))


def curve(gamma: int) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, gamma)


def adobe_rgb() -> bytes:
    columns = {name: xyz(*ADOBE_RGB[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    return icc_profile(b"RGB ", columns | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve(563)))


def srgb_encode(linear: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_embedded_rgb_profile_is_converted_to_srgb(tmp_path: Path, mode: str) -> None:
    image = PHOTO.convert(mode)
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 0))
    found = read(tmp_path, encode(image, "PNG", icc_profile=adobe_rgb()))
    linear = (np.asarray(image.convert("RGB")) / 255) ** GAMMA
    difference = np.abs(found - srgb_encode(linear @ (np.linalg.inv(SRGB) @ ADOBE_RGB).T))[1:]
    assert difference.max() <= 2.5 and difference.mean() < 0.5


def test_embedded_gray_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8), (32, 1))
    profile = icc_profile(b"GRAY", {b"kTRC": curve(461)})  # gamma 1.8
    found = read(tmp_path, encode(Image.fromarray(ramp), "PNG", icc_profile=profile))
    assert np.abs(found - srgb_encode((ramp[:, :, None] / 255) ** (461 / 256))).max() <= 2.5


def test_embedded_cmyk_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    """A press that is none, on yellowish paper: whose colours all make one blue, and black covers it."""
    clut = bytes([*(153, 108, 98), *(0, 128, 128)]) * 8
    identity = struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + clut + bytes(range(256)) * 3
    profile = icc_profile(b"CMYK", {b"A2B0": table, b"wtpt": xyz(0.8, 0.8, 0.5)}, kind=b"prtrLab ")
    image = Image.fromarray(np.array([[[0, 0, 0, 0], [255, 9, 0, 0], [0, 0, 0, 255]]], np.uint8).repeat(16, 0), "CMYK")
    found = read(tmp_path, encode(image, "TIFF", icc_profile=profile))
    assert np.abs(found - [(255, 255, 255), BLUE, (0, 0, 0)]).max() <= 2.5


FITS_NOT = {"garbage": b"garbage", "cut off": adobe_rgb()[:200], "gray": icc_profile(b"GRAY", {b"kTRC": curve(256)})}
SRGB_PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@pytest.mark.parametrize("profile", [SRGB_PROFILE, *FITS_NOT.values()], ids=["sRGB", *FITS_NOT])
def test_srgb_and_a_profile_that_does_not_fit_change_no_pixel(tmp_path: Path, profile: bytes) -> None:
    assert np.array_equal(read(tmp_path, encode(PHOTO, "PNG", icc_profile=profile)), np.asarray(PHOTO))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_wherever_a_file_ends_it_is_whole_or_refused(tmp_path: Path, file_format: str) -> None:
    data = encode(PHOTO.resize((24, 16)), file_format)
    whole = read(tmp_path, data)
    reasons = []
    lengths = {*range(0, len(data), 9), *range(len(data) - 40, len(data))}
    for length in lengths:
        try:
            assert np.array_equal(read(tmp_path, data[:length]), whole), length
        except BadImageError as error:
            reasons.append(str(error))
    damaged = "is damaged, it does not decode: ", "is not an image in a supported format", "is empty"
    assert all(reason.startswith(damaged) and reason.isprintable() for reason in reasons)
    assert len(reasons) > len(lengths) - 30, "what may be missing is the mark of the end"


NO_IMAGE = {
    "html": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "ppm": b"P6\n32 32\n255\n" + bytes(32 * 32 * 3),
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n(x) print\n",
    "no pixel": png_header(0, 5) + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b""),
}


def test_what_is_no_image_and_damaged_empty_absent_and_odd_files_are_refused(tmp_path: Path) -> None:
    reasons = "is not an image in a supported format (JPEG, PNG, ", "0x5 holds no pixel; save it again"
    for name, data in NO_IMAGE.items():
        assert problem(tmp_path, data).startswith(reasons), name
    reason = "its EXIF data are damaged, so it is unknown which side is up; save it without"
    assert problem(tmp_path, encode(PHOTO, "PNG", exif=b"Exif\0\0no TIFF header")) == reason
    assert problem(tmp_path, b"") == "is empty (0 bytes); copy it again"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BadImageError, match="cannot be read: No such file or directory; make it readable"):
        read_image(tmp_path / "none", LIMITS)
    with pytest.raises(BadImageError, match="is not a regular file; take it out"):
        read_image(tmp_path / "pipe", LIMITS)


@pytest.mark.parametrize("file_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read_where_that_is_asked_for(tmp_path: Path, file_format: str) -> None:
    data = encode(PHOTO, file_format, save_all=True, append_images=[PHOTO.rotate(90), PHOTO.rotate(180)])
    fix = "save the one to train on as a still image, or set data.first_frame=true"
    assert problem(tmp_path, data) == f"has 3 frames or pages; {fix}"
    first = read(tmp_path, data, FIRST)
    assert inspect_image(tmp_path / "image", FIRST).first_of_several
    assert inspect_image(tmp_path / "image", FIRST, is_mask=True).first_of_several
    assert np.array_equal(first, read(tmp_path, encode(PHOTO, file_format)))
    assert not inspect_image(tmp_path / "image", FIRST).first_of_several


def test_the_previews_in_the_jpeg_of_a_phone_are_no_frames(tmp_path: Path) -> None:
    phone = encode(PHOTO, "MPO", save_all=True, append_images=[PHOTO.resize((30, 20))], quality=95)
    assert np.array_equal(read(tmp_path, phone), read(tmp_path, encode(PHOTO, "JPEG", quality=95)))


def test_a_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    zeros = zlib.compress(bytes(12_000 * (1 + 12_000 // 8)), 9)
    data = png_header(12_000, 12_000, depth=1, colour=0) + png_chunk(b"IDAT", zeros) + png_chunk(b"IEND", b"")
    limit = "data.limits.max_source_pixels = 64000000; scale it down, or raise the limit"
    for part in (data, data[:60]):  # no pixel data is needed to say so
        assert problem(tmp_path, part) == f"12000x12000 is 144000000 pixels, more than {limit}"
    large = png_header(20_000, 10_000) + png_chunk(b"IDAT", zlib.compress(b"few"))
    allowed = Limits(max_source_pixels=200_000_000)  # over the limit of Pillow
    assert problem(tmp_path, large, allowed).startswith("is damaged"), "it passes the header check and lacks data"


def test_limits_on_bytes_and_shape_are_inclusive(tmp_path: Path) -> None:
    data = encode(PHOTO, "BMP")
    assert problem(tmp_path, data, Limits(max_bytes=len(data) - 1)).startswith(f"{len(data)} bytes, more than data.lim")
    assert read(tmp_path, data, Limits(max_bytes=len(data))).shape == (80, 120, 3)
    for side, other in ((800, 100), (100, 800), (8000, 8000)):
        check_size(Size(side, other), LIMITS)
    with pytest.raises(BadImageError, match=r"801x100 has aspect 8.0, more than data.limits.max_aspect = 8; cut it"):
        check_size(Size(801, 100), LIMITS)


def test_random_damage_is_a_reason_or_an_image(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    for file_format in ("JPEG", "PNG", "WEBP", "BMP", "GIF"):
        whole = encode(PHOTO, file_format)
        for _ in range(60):
            data = np.frombuffer(whole, np.uint8).copy()
            places = rng.integers(0, min(len(data), int(rng.choice([60, len(data)]))), rng.integers(1, 8))
            data[places] = rng.integers(0, 256, len(places))
            with contextlib.suppress(BadImageError):  # any other exception is the failure looked for
                read(tmp_path, data.tobytes())


def test_mask_of_any_pixel_type_is_gray(tmp_path: Path) -> None:
    half = np.zeros((80, 120), np.uint8)
    half[:, 60:] = 255
    mask, deep = Image.fromarray(half), Image.fromarray(half.astype("u2") * 257)
    for image in (mask, mask.convert("1"), mask.convert("RGB"), mask.quantize(2), deep, Image.new("L", (120, 80))):
        (tmp_path / "mask").write_bytes(encode(image, "PNG"))
        found = read_mask(tmp_path / "mask", LIMITS)
        assert found.mode == "L"
        assert np.array_equal(np.asarray(found), half if image.getbbox() else np.zeros_like(half)), image.mode
    assert inspect_image(tmp_path / "mask", LIMITS, is_mask=True).size == (120, 80)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [(Image.new("RGBA", (120, 80), (0, 0, 0, 9)), "transparency"), (Image.new("L", (120, 80), 1), "mask of 0 and 1")],
)
def test_mask_that_cannot_be_meant_is_refused(tmp_path: Path, mask: Image.Image, reason: str) -> None:
    (tmp_path / "mask").write_bytes(encode(mask, "PNG"))
    with pytest.raises(BadImageError, match=reason):
        read_mask(tmp_path / "mask", LIMITS)
