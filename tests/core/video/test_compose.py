"""A square cut out, animated and laid back leaves the rest of the picture alone; joined clips keep their length."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from memo_core.errors import ComposeError, PortraitError
from memo_core.inputs.portrait import prepare_portrait
from memo_core.video.compose import Box, centre_square, crop_square, cross_fade, face_square, paste_back, resize_frames


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def outside(box: Box) -> torch.Tensor:
    mask = torch.ones(box.height, box.width, dtype=torch.bool)
    mask[max(box.top, 0) : max(box.bottom, 0), max(box.left, 0) : max(box.right, 0)] = False
    return mask


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ((0, 0, 10, 12, 40, 30), "square"),
        ((5, 5, 5, 5, 40, 30), "square"),
        ((40, 0, 50, 10, 40, 30), "shares pixels"),
        ((-10, 0, 0, 10, 40, 30), "shares pixels"),
        ((0, 0, 1000, 1000, 40, 30), "4 times"),
        ((0.5, 0, 10, 10, 40, 30), "whole numbers"),
        ((0, 0, 10, 10, 0, 30), "0x30"),
    ],
)
def test_a_box_that_cannot_be_used_is_refused(numbers: tuple[int, ...], match: str) -> None:
    with pytest.raises(ComposeError, match=match):
        Box(*numbers)


def test_a_crop_is_the_box_and_beyond_the_picture_its_edge() -> None:
    picture = noise(30, 40, 3)
    torch.testing.assert_close(crop_square(picture, Box(7, 3, 17, 13, 40, 30)), picture[3:13, 7:17], rtol=0, atol=0)
    wide = crop_square(picture[None].repeat(2, 1, 1, 1), Box(-2, -5, 38, 35, 40, 30))
    assert wide.shape == (2, 40, 40, 3)
    assert torch.equal(wide[1, 5:35, 2:], picture[:, :38])
    assert torch.equal(wide[0, :5, 2:], picture[:1, :38].expand(5, -1, -1))
    assert torch.equal(wide[0, 5:35, :2], picture[:, :1].expand(-1, 2, -1))
    with pytest.raises(ComposeError, match="40x30 picture.*the box came from"):
        crop_square(noise(40, 30, 3), Box(0, 0, 10, 10, 40, 30))


@given(st.integers(1, 90), st.integers(1, 90), st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 1))
def test_a_centre_square_stays_inside_the_picture(
    height: int, width: int, center_x: float, center_y: float, scale: float
) -> None:
    box = centre_square((height, width), center_x, center_y, scale)
    assert box.left >= 0 and box.top >= 0 and box.right <= width and box.bottom <= height
    assert box.side == max(1, round(scale * min(height, width)))
    for start, centre, limit in ((box.left, center_x, width), (box.top, center_y, height)):
        free = centre * limit - box.side / 2  # moved no more than the border asks for
        assert abs(start - min(max(free, 0), limit - box.side)) <= 1


def test_a_face_square_is_what_the_portrait_is_cut_to() -> None:
    picture = (noise(300, 500, 3) * 255).to(torch.uint8).numpy()
    face = (200.0, 90.0, 260.0, 170.0)
    box = face_square((300, 500), face, 0.35)
    assert (box.left, box.top, box.right, box.bottom) == prepare_portrait(picture, 64, face_box=face, margin=0.35).crop
    assert box.side == 136  # 80 and 0.35 of it at either side
    mask = torch.zeros(300, 500)
    mask[90:170, 200:260] = 1
    assert face_square((300, 500), mask, 0.35) == box
    assert face_square((300, 500), (150, 0, 450, 300), 1).side == 300, "no larger than the picture allows"
    beyond = face_square((100, 500), (150, 0, 350, 100), 0)
    assert (beyond.side, beyond.top, beyond.bottom) == (200, -50, 150)
    with pytest.raises(PortraitError, match="mask without any pixel"):
        face_square((300, 500), torch.zeros(300, 500))
    with pytest.raises(ComposeError, match="margin is -1"):
        face_square((300, 500), face, -1)


@pytest.mark.parametrize("arguments", [(1.2, 0.5, 1), (0.5, float("nan"), 1), (0.5, 0.5, 0.01)])
def test_a_centre_out_of_range_is_refused(arguments: tuple[float, ...]) -> None:
    with pytest.raises(ComposeError, match="allowed is"):
        centre_square((30, 40), *arguments)


@pytest.mark.parametrize("feather", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("corner", [(8, 5), (0, 0), (-6, 12), (24, 14)], ids=str)
def test_pasting_leaves_every_pixel_outside_the_box(corner: tuple[int, int], feather: float) -> None:
    picture, (left, top) = noise(30, 40, 3), corner
    box = Box(left, top, left + 16, top + 16, 40, 30)
    (result,) = paste_back(noise(1, 64, 64, 3, seed=1), picture, box, feather)
    assert torch.equal(result[outside(box)], picture[outside(box)])
    assert not torch.equal(result, picture)
    assert result.min() >= 0 and result.max() <= 1
    (again,) = paste_back(crop_square(picture, box)[None], picture, box, feather)
    assert torch.equal(again, picture), "what was cut out goes back without a trace"


def test_the_edge_is_soft_but_not_at_the_pictures_border() -> None:
    picture, white = torch.zeros(40, 60, 3), torch.ones(1, 20, 20, 3)
    (hard,) = paste_back(white, picture, Box(10, 10, 30, 30, 60, 40), 0)
    assert bool((hard[10:30, 10:30] == 1).all())
    (soft,) = paste_back(white, picture, Box(10, 10, 30, 30, 60, 40), 0.25)
    line = soft[20, 10:30, 0]
    assert bool((line[5:15] == 1).all()) and bool((line[:5].diff() > 0).all()) and 0 < line[0] < 0.05
    torch.testing.assert_close(line, line.flip(0))
    (border,) = paste_back(white, picture, Box(0, 20, 20, 40, 60, 40), 0.25)
    assert bool((border[30, :15] == 1).all()), "left side touches"
    assert bool((border[25:, 10] == 1).all()), "lower side touches"
    assert border[20, 10, 0] < 0.05 and border[30, 19, 0] < 0.05, "the others are soft"


def test_where_a_frame_is_transparent_the_picture_shows() -> None:
    picture, box = noise(30, 40, 3), Box(5, 5, 21, 21, 40, 30)
    colours = noise(64, 64, 3, seed=1)
    (solid,) = paste_back(colours, picture, box)
    (opaque,) = paste_back(torch.cat([colours, torch.ones(64, 64, 1)], 2), picture, box)
    assert torch.equal(opaque, solid)
    (nothing,) = paste_back(torch.cat([colours, torch.zeros(64, 64, 1)], 2), picture, box)
    assert torch.equal(nothing, picture)
    # Green that nobody sees, beside white: nothing of it bleeds into the edge.
    cut = torch.ones(64, 64, 4)
    cut[:, :30] = torch.tensor([0, 1, 0, 0])
    (edge,) = paste_back(cut, torch.zeros(30, 40, 3), box, 0)
    assert float(edge.max()) <= 1 and torch.equal(edge[..., 0], edge[..., 1]), "grey, from black to white"
    levels = (cut * 255).to(torch.uint8).numpy()
    (same,) = paste_back(levels, torch.zeros(30, 40, 3), box, 0)
    torch.testing.assert_close(same, edge)


def test_the_shorter_of_clip_and_picture_holds_its_last_frame() -> None:
    box = Box(0, 0, 4, 4, 8, 8)
    grey = torch.arange(1, 6)[:, None, None, None] / 10
    clip, film = grey[:2].expand(2, 4, 4, 3), grey.expand(5, 8, 8, 3)
    pasted = list(paste_back(clip, film, box, 0))
    assert [round(float(frame[0, 0, 0]), 1) for frame in pasted] == [0.1, 0.2, 0.2, 0.2, 0.2]
    assert [round(float(frame[7, 7, 0]), 1) for frame in pasted] == [0.1, 0.2, 0.3, 0.4, 0.5]
    pasted = list(paste_back(grey.expand(5, 4, 4, 3), film[:2], box, 0))
    assert [round(float(frame[7, 7, 0]), 1) for frame in pasted] == [0.1, 0.2, 0.2, 0.2, 0.2]
    assert len(list(paste_back(grey.expand(5, 4, 4, 3), film[0], box, 0))) == 5
    pasted[0][:] = 0
    assert float(film[0, 7, 7, 0]) == pytest.approx(0.1), "what comes out is no view of what went in"


def test_two_speakers_are_pasted_in_turn() -> None:
    scene, left, right = noise(64, 128, 3), Box(8, 8, 40, 40, 128, 64), Box(80, 8, 112, 40, 128, 64)
    speaking, listening = noise(3, 32, 32, 3, seed=1), noise(1, 32, 32, 3, seed=2)
    frames = list(paste_back(listening, paste_back(speaking, scene, left, 0), right, 0))
    assert len(frames) == 3
    for frame, face in zip(frames, speaking):
        assert torch.equal(crop_square(frame, left), face) and torch.equal(crop_square(frame, right), listening[0])


def test_pasting_streams() -> None:
    drawn = []

    def frames() -> Iterator[np.ndarray]:
        for index in range(10**9):
            drawn.append(index)
            yield np.full((8, 8, 3), index, np.uint8)

    pasted = paste_back(frames(), torch.zeros(16, 16, 3), Box(4, 4, 12, 12, 16, 16), 0)
    assert drawn == []
    values = [float(next(pasted)[8, 8, 0]) for _ in range(3)]
    assert values == pytest.approx([0, 1 / 255, 2 / 255]) and drawn == [0, 1, 2]


def test_what_cannot_be_pasted_is_refused() -> None:
    box, picture = Box(0, 0, 8, 8, 16, 16), torch.zeros(16, 16, 3)
    with pytest.raises(ComposeError, match="feather is 0.7"):
        paste_back(torch.zeros(1, 8, 8, 3), picture, box, 0.7)
    for frames, below, match in (
        (torch.zeros(0, 8, 8, 3), picture, "no frames"),
        (torch.zeros(1, 8, 8, 3), torch.zeros(0, 16, 16, 3), "no picture"),
        (torch.zeros(1, 8, 8, 3), torch.zeros(20, 16, 3), "16x16 picture.*came from"),
        (torch.zeros(1, 8, 8, 5), picture, r"\[8, 8, 5\]"),
    ):
        with pytest.raises(ComposeError, match=match):
            list(paste_back(frames, below, box))


@pytest.mark.parametrize("size", [(16, 24), (100, 150)], ids=str)
def test_resizing_agrees_with_pillow(size: tuple[int, int]) -> None:
    ramp = torch.stack(torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 72), indexing="ij"), -1)
    picture = torch.cat([ramp, noise(48, 72, 1) * 0.2 + 0.4], -1)
    levels = (picture * 255).round().to(torch.uint8)
    wanted = np.asarray(Image.fromarray(levels.numpy()).resize(size[::-1], Image.Resampling.BICUBIC)).astype(int)
    ours = resize_frames(levels, *size)
    assert ours.dtype == torch.uint8
    assert np.abs(ours.numpy().astype(int) - wanted).max() <= 2
    many = resize_frames(picture[None].repeat(17, 1, 1, 1), *size)
    assert many.shape == (17, *size, 3) and many.min() >= 0 and many.max() <= 1
    assert torch.equal(many[0], many[16]) and np.abs((many[16] * 255).numpy() - wanted).max() <= 2
    assert resize_frames(picture, 48, 72) is picture


def grey_clip(value: float, count: int) -> torch.Tensor:
    return torch.full((count, 2, 2, 3), float(value))


def test_a_cross_fade_shortens_nothing_and_leaves_the_rest_alone() -> None:
    first, second = noise(6, 4, 4, 3), noise(8, 4, 4, 3, seed=1)
    joined = torch.stack(list(cross_fade([first, second], 3)))
    assert len(joined) == 14
    assert torch.equal(joined[:6], first) and torch.equal(joined[9:], second[3:])
    line = torch.stack(list(cross_fade([grey_clip(0, 2), grey_clip(1, 8)], 3)))[:, 0, 0, 0]
    assert line[:2].tolist() == [0, 0] and line[5:].tolist() == [1] * 5
    assert line[2:5].tolist() == pytest.approx([0.15625, 0.5, 0.84375])  # 3x^2 - 2x^3 at 1/4, 1/2, 3/4


def test_a_fade_longer_than_its_part_is_cut_to_it() -> None:
    parts = [grey_clip(0, 2), grey_clip(1, 1), grey_clip(0, 0), grey_clip(1, 4)]
    line = torch.stack(list(cross_fade(parts, 100)))[:, 0, 0, 0].tolist()
    assert len(line) == 7 and line[2] == 0.5, "halfway in its only frame"
    assert line == sorted(line), "and on from there, without a jump back"


def test_no_fade_hands_frames_on_as_they_are() -> None:
    frames = [np.full((2, 2, 3), value, np.uint8) for value in range(5)]
    assert all(out is frame for out, frame in zip(cross_fade([frames[:2], frames[2:]]), frames, strict=True))


def test_a_fade_keeps_the_type_of_each_part() -> None:
    levels = [np.full((2, 2, 3), 200, np.uint8)] * 3
    out = list(cross_fade([grey_clip(0, 1), levels, grey_clip(0, 1)], 1))
    assert isinstance(out[1], np.ndarray) and out[1].dtype == np.uint8 and int(out[1][0, 0, 0]) == 100
    assert out[4].dtype == torch.float32 and float(out[4][0, 0, 0]) == pytest.approx(100 / 255, abs=1e-3)


def test_joining_opens_one_part_at_a_time() -> None:
    opened = []

    def part(number: int) -> Iterator[torch.Tensor]:
        opened.append(number)
        yield from grey_clip(0.5, 4)

    joined = cross_fade((part(number) for number in range(10**9)), 2)
    for _ in range(6):
        next(joined)
    assert opened == [0, 1]


def test_clips_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ComposeError, match="clip 2 has frames of 4x2 pixels.*2x2"):
        list(cross_fade([grey_clip(0, 1), torch.zeros(1, 2, 4, 3)]))
    with pytest.raises(ComposeError, match="received -1"):
        cross_fade([], -1)


def test_only_the_clip_and_picture_at_hand_are_kept() -> None:
    alive: list[weakref.ref] = []

    def frames() -> Iterator[torch.Tensor]:
        for _ in range(40):
            frame = torch.zeros(4, 4, 3)
            alive.append(weakref.ref(frame))
            yield frame
            del frame

    most = 0
    for _ in paste_back(cross_fade([frames(), frames()], 3), torch.zeros(8, 8, 3), Box(0, 0, 4, 4, 8, 8)):
        most = max(most, sum(reference() is not None for reference in alive))
    assert len(alive) == 80 and most <= 8
