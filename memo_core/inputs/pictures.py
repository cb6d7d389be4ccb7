"""Picture files as they come: a fixed list of decoders, checked before they are decoded, read no larger than needed."""

from __future__ import annotations

import os

from PIL import Image

from ..errors import PortraitError
from ..files import open_regular

# What people have portraits in. Pillow knows fifty formats more, some of which start other programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "HEIF")
MAX_PIXELS = 120_000_000  # that are decoded; Pillow takes 4 bytes for each
ENOUGH = 4096  # pixels of the shorter side: no video is larger, so a larger picture is read at half its size, or less


def open_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Reads a picture: PNG, JPEG, WebP, GIF, BMP, TIFF; AVIF and HEIF where Pillow has them. Of several, the first.

    One whose shorter side is at least twice ENOUGH comes back smaller by a whole factor, JPEG without ever being
    decoded at full size. Of more than 179 million pixels Pillow opens none.

    Raises:
        PortraitError: absent, no regular file, no picture of these kinds, damaged, or larger than MAX_PIXELS.
    """
    try:
        with open_regular(path) as file:
            picture: Image.Image = Image.open(file, formats=_formats())
            full = picture.size
            picture.draft(None, _smaller(full))  # JPEG only
            if picture.width * picture.height > MAX_PIXELS:
                most = f"up to {MAX_PIXELS // 10**6} million are read"
                raise PortraitError(f"{path} is {full[0]}x{full[1]} pixels; {most}: make it smaller")
            picture.load()
    except PortraitError:
        raise
    except Image.DecompressionBombError as error:
        most = f"up to {MAX_PIXELS // 10**6} million are read"
        raise PortraitError(f"{path} has far too many pixels; {most}: make it smaller") from error
    except Image.UnidentifiedImageError as error:
        raise PortraitError(f"{path} is not a picture of these kinds: {', '.join(_formats())}") from error
    except OSError as error:
        raise PortraitError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # of a damaged file decoders raise whatever comes
        raise PortraitError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    factor = min(picture.size) // ENOUGH
    if factor > 1 and picture.mode in ("1", "P", "PA"):  # in other modes colours cannot be averaged
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    return picture.reduce(factor) if factor > 1 and not picture.mode.startswith(("I", "F")) else picture


def _smaller(size: tuple[int, int]) -> tuple[int, int]:
    """The size at which the shorter side is ENOUGH, if that is smaller."""
    scale = min(1.0, ENOUGH / min(size))
    return round(size[0] * scale), round(size[1] * scale)


def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
