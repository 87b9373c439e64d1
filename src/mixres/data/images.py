"""Pixels from files that nobody vouches for: upright 8-bit sRGB, or the reason why not.

Promise: an image comes back whole, turned as its EXIF says, in sRGB, or `BadImageError` is raised; sizes are checked
in the header before a pixel is decoded. Cost: one read and one full decode a call: 5 ms a megapixel and core
for a JPEG, 25 ms for a PNG.

Colour policy: an embedded ICC profile is converted to sRGB; without one RGB and gray count as sRGB, CMYK is
converted by Pillow's formula. A profile that does not fit the pixels is ignored. 16-bit gray is divided by 257. Real
transparency is laid on the background of `Limits`, unless it is to be kept. 32-bit integer, floating-point and LAB
pixels have no agreed range and are refused, and so is gray of a TIFF that is not 0 (black) to 65535 (white).
"""

import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import NamedTuple

import numpy as np
import xxhash
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from mixres.data.records import Picture
from mixres.geometry import Size

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # no other decoder is ever tried
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"})

WHITE = "white"

# Pillow's own limit is a number of the whole process and only warns up to twice its value. `_check_header` refuses
# from the header, by the user's limit, before any pixel is decoded.
Image.MAX_IMAGE_PIXELS = None

_GRAY_16 = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_PNG_DEPTH = 24  # where a PNG says how many bits a channel has
_MODES = _GRAY_16 | {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"}
# What Pillow's decoders raise on bytes that are not what they claim to be.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, EOFError, RuntimeError,
    UserWarning, struct.error, zlib.error, Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


class BadImageError(ValueError):
    """This file cannot be used; the message is the reason, without the path."""


class NoMemoryError(BadImageError):
    """It did not decode, which may be the file's fault or that of what else runs on the machine."""


@dataclass(frozen=True)
class Limits:
    """What a source image may be, and how it is read. A side ratio of `max_aspect` is still allowed."""

    max_source_pixels: int = 64_000_000
    max_bytes: int = 512 * 2**20
    max_aspect: float = 8.0
    follow_symlinks: bool = False
    first_frame: bool = False  # of several frames or pages the first is the image, instead of a problem
    background: str = WHITE  # the sRGB colour under transparent pixels, a name or #rrggbb


class ImageFacts(NamedTuple):
    """What a full decode finds in a file."""

    size: Size  # upright
    digest: str  # of its bytes
    flattened: bool  # it has transparency
    first_of_several: bool  # frames or pages


@contextmanager
def _memory() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise NoMemoryError("there was no memory to decode it; scale it down, or free some") from error


@_memory()
def read_image(path: Picture, limits: Limits, *, keep_alpha: bool = False) -> Image.Image:
    """The image as upright sRGB, mode "RGB"; with `keep_alpha` "RGBA" where something is really transparent.

    Raises:
        BadImageError: with the reason.
    """
    background = None if keep_alpha else limits.background
    return _rgb(_decode(_read_bytes(path, limits), limits)[0], background)[0]


@_memory()
def read_mask(path: Picture, limits: Limits) -> Image.Image:
    """The edit mask as mode "L", 255 = foreground. Its ICC profile is ignored. The scan compares its size.

    Raises:
        BadImageError: with the reason; real transparency and a mask of 0 and 1 are refused too.
    """
    return _mask(_decode(_read_bytes(path, limits), limits)[0])


@_memory()
def inspect_image(path: Picture, limits: Limits, *, is_mask: bool = False) -> ImageFacts:
    """Read and fully decode one image or mask; see `read_image`, `read_mask`."""
    data = _read_bytes(path, limits)
    upright, several = _decode(data, limits)
    image, flattened = (_mask(upright), False) if is_mask else _rgb(upright, limits.background)
    return ImageFacts(Size(*image.size), xxhash.xxh3_128_hexdigest(data), flattened, several)


def check_size(size: Size, limits: Limits) -> None:
    """Check a source size against the limits.

    Raises:
        BadImageError: `size` is over a limit, with both numbers.
    """
    if size.width * size.height > limits.max_source_pixels:
        raise BadImageError(
            f"{size} is {size.width * size.height} pixels, more than data.limits.max_source_pixels = "
            f"{limits.max_source_pixels}; scale it down, or raise the limit"
        )
    if min(size) < 1:
        raise BadImageError(f"{size} holds no pixel; save it again")
    if max(size) > limits.max_aspect * min(size):
        raise BadImageError(
            f"{size} has aspect {max(size) / min(size):.1f}, more than data.limits.max_aspect = {limits.max_aspect:g}; "
            "cut it, or raise the limit"
        )


def _read_bytes(path: Picture, limits: Limits) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a named pipe would block for ever
            raise BadImageError("is not a regular file; take it out")
        _check_bytes(status.st_size, limits)
        data = path.read_bytes()
        _check_bytes(len(data), limits)  # that of a row in a table is not known before
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}; make it readable") from error
    if not data:
        raise BadImageError("is empty (0 bytes); copy it again")
    return data


def _check_bytes(count: int, limits: Limits) -> None:
    if count > limits.max_bytes:
        fix = "save it smaller, or raise the limit"
        raise BadImageError(f"{count} bytes, more than data.limits.max_bytes = {limits.max_bytes}; {fix}")


def _decode(data: bytes, limits: Limits) -> tuple[Image.Image, bool]:
    """Header checks, full decode, then upright; and whether the image is the first of several."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            several = _check_header(image, limits)
            image.load()
            if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
                # Pillow spreads 2 and 4 bits over 8, but not the gray that is transparent.
                image.info["transparency"] *= 255 // (2 ** data[_PNG_DEPTH] - 1)
            return _upright(image), several
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(f"is not an image in a supported format ({', '.join(FORMATS)}); convert it") from error
    except _DECODE_ERRORS as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"is damaged, it does not decode: {text}; copy it again") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS as error:
        raise BadImageError("its EXIF data are damaged, so it is unknown which side is up; save it without") from error


def _check_header(image: Image.Image, limits: Limits) -> bool:
    """Whether there are frames behind the first."""
    check_size(Size(*image.size), limits)
    # The images behind the first of an MPO (many phones' JPEG) are its previews and depth maps, not frames.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1 and not limits.first_frame:
        fix = "save the one to train on as a still image, or set data.first_frame=true"
        raise BadImageError(f"has {frames} frames or pages; {fix}")
    if image.mode not in _MODES:
        fix = "save it as 8- or 16-bit RGB or gray"
        raise BadImageError(f"has pixels of mode {image.mode}, whose range is not defined; {fix}")
    if isinstance(image, TiffImageFile) and image.mode in _GRAY_16 and not _is_16_bit_black_to_white(image):
        raise BadImageError("is a TIFF whose gray is not 0 (black) to 65535 (white); save it as 8- or 16-bit PNG")
    return frames > 1


def _is_16_bit_black_to_white(image: TiffImageFile) -> bool:
    """Pillow hands out 12 bits, and white that is 0, as they stand in the file."""
    return image.tag_v2.get(BITSPERSAMPLE) == (16,) and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 1


def _rgb(image: Image.Image, background: str | None) -> tuple[Image.Image, bool]:
    """The image in sRGB, and whether it has transparency, which is laid on `background`, or kept where that is None."""
    profile = image.info.get("icc_profile")
    image = _eight_bit(image)
    if profile:
        image = _to_srgb(image, profile)
    if image.mode != "RGBA":
        return image.convert("RGB"), False
    if background is None:
        return image, True
    return on_background(image, background), True


def on_background(image: Image.Image, background: str = WHITE) -> Image.Image:
    """The image as RGB, its transparency laid on a colour."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def _mask(image: Image.Image) -> Image.Image:
    image = _eight_bit(image)
    if image.mode == "RGBA":
        raise BadImageError("is a mask with transparency; save it as gray, white where the edit is")
    mask = image.convert("RGB").convert("L")
    if np.asarray(mask).max() == 1:
        raise BadImageError("is a mask of 0 and 1, which is black; save it as 0 to 255, white where the edit is")
    return mask


def _eight_bit(image: Image.Image) -> Image.Image:
    """L, RGB or CMYK, 8 bits a channel; RGBA only where something is really transparent."""
    if image.mode in _GRAY_16:
        values = np.asarray(image)
        gray = Image.fromarray(np.rint(values.astype(np.float32) / 257).astype(np.uint8))
        hidden = values == image.info.get("transparency", -1)
        if not hidden.any():
            return gray
        gray.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
        return gray.convert("RGBA")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return rgba if np.asarray(rgba.getchannel("A")).min() < 255 else rgba.convert("RGB")
    return image if image.mode in ("RGB", "CMYK") else image.convert("L" if image.mode in ("1", "L") else "RGB")


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """RGB or RGBA in sRGB by the embedded profile; the image as it is where the profile does not fit it."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        if (source.profile.profile_description or "").startswith("sRGB"):
            return image
        space = source.profile.xcolor_space.strip()
        if (space == "CMYK") != (image.mode == "CMYK") or (space == "GRAY" and image.mode != "L"):
            return image
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGBA" if image.mode == "RGBA" else "RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image
    assert converted is not None  # None only for in-place conversion
    return converted
