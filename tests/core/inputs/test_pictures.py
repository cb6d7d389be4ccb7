"""Portrait files as people have them, and as they should not be."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from common import ROOT
from PIL import Image, ImageOps

from memo_core.errors import PortraitError
from memo_core.inputs import pictures
from memo_core.inputs.pictures import open_picture
from memo_core.inputs.portrait import MAX_SIDE, check_size, prepare_portrait

LOSSLESS = ("PNG", "GIF", "BMP", "TIFF", "WEBP")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_pictures_of_these_kinds_are_read_whatever_their_name(tmp_path: Path, kind: str) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f"this Pillow has no {kind}")
    colours = Image.new("RGB", (40, 30), (200, 30, 90))
    colours.save(tmp_path / "portrait.xyz", kind, **({"lossless": True} if kind == "WEBP" else {}))
    picture = open_picture(tmp_path / "portrait.xyz").convert("RGB")
    assert picture.size == (40, 30)
    assert np.abs(np.asarray(picture, int) - np.asarray(colours, int)).max() <= (0 if kind in LOSSLESS else 6)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA", "ICO", "DDS", "SGI", "PCX", "IM", "MSP", "PDF"])
def test_no_other_decoder_is_started_whatever_the_name(tmp_path: Path, monkeypatch, kind: str) -> None:
    """Pillow would hand an EPS file to Ghostscript."""
    mode = "1" if kind == "MSP" else "RGB"
    Image.new(mode, (40, 40)).save(tmp_path / "portrait.jpg", kind)
    for name in ("Popen", "run", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, None)
    with pytest.raises(PortraitError, match="is not a picture of these kinds: PNG, JPEG"):
        open_picture(tmp_path / "portrait.jpg")


def test_a_text_of_many_megabytes_in_a_png_is_one_line(tmp_path: Path) -> None:
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text("comment", "x" * 100_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=about)
    with pytest.raises(PortraitError, match=r"a\.png (is damaged|cannot be read)"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("name", "said"), [("absent.png", "No such file"), ("", "Is a directory|No such file"), ("a\0b", "no file name")]
)
def test_what_is_not_there_is_one_line(tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(PortraitError, match=said):
        open_picture(f"{tmp_path}/{name}")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos")
def test_a_pipe_does_not_make_it_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "portrait.png")
    with pytest.raises(PortraitError, match="not a regular file"):
        open_picture(tmp_path / "portrait.png")


def test_a_large_photograph_is_read_smaller_and_looks_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "ENOUGH", 100)
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 8, 3), np.uint8)).resize((808, 616), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    for kind in ("JPEG", "PNG"):
        coarse.save(tmp_path / "a", kind, exif=exif, quality=95)
        picture = open_picture(tmp_path / "a")
        assert 100 <= min(picture.size) < 220
        upright = ImageOps.exif_transpose(picture)
        wanted = ImageOps.exif_transpose(Image.open(tmp_path / "a")).resize(upright.size)
        assert np.abs(np.asarray(upright, int) - np.asarray(wanted, int)).mean() < 3


def test_transparency_survives_being_made_smaller(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "ENOUGH", 64)
    clear = np.zeros((256, 256, 4), np.uint8)
    clear[:, :128] = 255, 0, 0, 255
    for kind in ("PNG", "GIF", "WEBP", "TIFF"):
        Image.fromarray(clear).save(tmp_path / "a", kind)
        pixels = prepare_portrait(open_picture(tmp_path / "a"), 64).pixels
        assert pixels[:, :, -8:].min() > 0.95, f"{kind}: white where it was transparent"
        assert pixels[0, :, :8].min() > 0.9 and pixels[1, :, :8].max() < -0.9


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path: Path) -> None:
    """13,300 x 13,300 zeros pack into 0.5 MB and would take gigabytes."""
    code = f"""
        import resource, sys
        sys.path.insert(0, {str(ROOT)!r})
        from PIL import Image
        Image.MAX_IMAGE_PIXELS = None
        Image.new("L", (13300, 13300)).save("big.png", compress_level=1)
        Image.new("L", (13300, 13300)).save("big.jpg")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        from memo_core.inputs.pictures import open_picture
        try:
            open_picture("big.png")
        except ValueError as error:
            print(error)
        print(open_picture("big.jpg").size)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    said, size, grown = result.stdout.splitlines()
    assert said == "big.png is 13300x13300 pixels; up to 120 million are read: make it smaller"
    assert size == "(6650, 6650)" and int(grown) < 200


@pytest.mark.parametrize("size", [65536, MAX_SIDE + 64, (64, 65536)])
def test_a_video_larger_than_any_is_refused_at_once(size) -> None:
    with pytest.raises(PortraitError, match=f"up to {MAX_SIDE} pixels a side"):
        check_size(size)


@pytest.mark.parametrize("size", ["512", 64.0, None, (64,), (64, 64, 64), (True, 64), [64, "x"], float("nan"), 10**400])
def test_a_size_that_is_none_is_a_typed_error(size) -> None:
    with pytest.raises(PortraitError, match="size is"):
        check_size(size)


@pytest.mark.parametrize(
    "arguments",
    [
        {"image": None},
        {"image": "portrait.png"},
        {"image": object()},
        {"image": np.zeros((4, 4, 3), complex)},
        {"margin": "wide"},
        {"margin": None},
        {"face_index": 0.5},
        {"face_index": "first"},
        {"face_box": "left"},
        {"face_box": [1, 2, 3, "x"]},
        {"face_box": [None] * 4},
        {"face_box": {}},
    ],
    ids=[f"wrong{number}" for number in range(12)],
)
def test_a_wrong_type_is_a_typed_error(arguments) -> None:
    with pytest.raises(PortraitError):
        prepare_portrait(**{"image": Image.new("RGB", (64, 64)), "size": 64} | arguments)
