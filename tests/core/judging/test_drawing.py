"""Pictures: an emotion track, a memory state."""

from __future__ import annotations

import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from memo_core import MemoryState
from memo_core.errors import AudioError, EmotionError, MemoryStateError
from memo_core.inputs.emotion import COLOURS, EmotionTrack
from memo_core.judging.drawings.canvas import BLUES, INK, PAPER, Panel, clock
from memo_core.judging.drawings.emotion import draw_emotion
from memo_core.judging.drawings.memory import draw_memory
from memo_core.release import EMOTIONS

RATE = 16000
HAPPY, NEUTRAL = COLOURS[3], COLOURS[4]
Box = tuple[int, int, int, int]


def share(picture: Image.Image, colours: str | tuple[str, ...], box: Box) -> float:
    """How much of a part of the picture is of exactly these colours."""
    pixels = np.asarray(picture.crop(box))
    found = np.zeros(pixels.shape[:2], bool)
    for colour in (colours,) if isinstance(colours, str) else colours:
        found |= (pixels == tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))).all(axis=-1)
    return float(found.mean())


def texts_of(draw, *args, **kwargs) -> tuple[Image.Image, list[str]]:
    """A picture and what is written in it, after checking that nothing is written beyond its edges."""
    written: list[tuple[str, tuple[float, float, float, float]]] = []
    original = ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, anchor=None, **more):
        written.append((text, self.textbbox(xy, text, font=font, anchor=anchor)))
        return original(self, xy, text, fill, font, anchor, **more)

    with mock.patch.object(ImageDraw.ImageDraw, "text", text):
        picture = draw(*args, **kwargs)
    for words, (left, top, right, bottom) in written:
        assert left >= 0 and top >= 0 and right <= picture.width and bottom <= picture.height, words
    return picture, [words for words, _ in written]


# ---- emotions


def test_picture_shows_labels_probabilities_and_waveform() -> None:
    waveform = torch.sin(torch.arange(3 * RATE) / 20)
    track = EmotionTrack.constant("neutral", 90).with_label(0, 1.5, "happy")
    picture, texts = texts_of(draw_emotion, track, waveform, RATE)
    assert picture.size == (1200, 440) and picture.mode == "RGB"
    assert {"happy", "neutral", "0 s", "100%"} <= set(texts) and "sad" not in texts
    assert share(picture, HAPPY, (70, 204, 610, 232)) > 0.9  # first half of the label band
    assert share(picture, NEUTRAL, (630, 204, 1170, 232)) > 0.9  # second half
    assert share(picture, NEUTRAL, (70, 265, 1170, 395)) > 0.9  # the detector was certain of neutral
    assert share(picture, INK, (70, 80, 1170, 140)) > 0.5  # a loud waveform


@pytest.mark.parametrize("strength", [0, 0.25, 0.75, 1])
def test_weak_emotions_fill_the_band_in_part(strength: float) -> None:
    track = EmotionTrack.constant("happy", 90).with_label(0, 3, "happy", strength)
    picture = draw_emotion(track, torch.zeros(3 * RATE), RATE)
    band = (70, 202, 500, 234)  # beside its name
    assert share(picture, HAPPY, band) == pytest.approx(strength, abs=0.05)
    assert share(picture, NEUTRAL, band) == pytest.approx(1 - strength, abs=0.05)


def test_picture_without_a_waveform_is_shorter() -> None:
    track = EmotionTrack.constant("sad", 90).with_label(0, 1, "angry", 0.7)
    picture, texts = texts_of(draw_emotion, track)
    assert picture.size == (1200, 290)
    assert "angry 0.7" in texts and "sad" in texts and "voice" not in texts


def test_picture_without_a_detector_shows_labels() -> None:
    track = EmotionTrack(torch.full((30,), 6), torch.zeros(0, 9), torch.zeros(0), 30)
    assert "sad" in texts_of(draw_emotion, track)[1]


def test_legend_wraps_where_it_does_not_fit() -> None:
    labels = torch.arange(len(EMOTIONS)).repeat_interleave(10)
    track = EmotionTrack(labels, torch.full((1, 9), 1 / 9), torch.zeros(1), 30)
    narrow, texts = texts_of(draw_emotion, track, torch.zeros(RATE), RATE, width=600)
    assert set(EMOTIONS) <= set(texts)
    assert (narrow.height, draw_emotion(track, torch.zeros(RATE), RATE).height) == (464, 440)


@pytest.mark.parametrize("samples", [1, 100, 50 * RATE])
@pytest.mark.parametrize("frames", [16, 200_000])
def test_picture_of_any_length_is_drawn(samples: int, frames: int) -> None:
    picture, _ = texts_of(draw_emotion, EmotionTrack.constant("sad", frames), torch.zeros(samples), RATE, width=600)
    assert picture.size == (600, 440)


def test_bad_arguments_are_refused() -> None:
    track = EmotionTrack.constant("sad", 16)
    with pytest.raises(EmotionError, match="width is 100"):
        draw_emotion(track, torch.zeros(100), RATE, width=100)
    with pytest.raises(AudioError):
        draw_emotion(track, torch.tensor([math.nan]), RATE)
    with pytest.raises(MemoryStateError, match="width is 100"):
        draw_memory(MemoryState.empty(), width=100)
    with pytest.raises(MemoryStateError, match="fps is 0"):
        draw_memory(MemoryState.empty(), fps=0)


# ---- memory


def chain(windows: int, frames: int = 16, seed: int = 0, horizon: int | None = None) -> MemoryState:
    state, generator = MemoryState.empty(horizon), torch.Generator().manual_seed(seed)
    for _ in range(windows):
        latents = torch.randn(frames, 4, 32, 32, generator=generator)
        state = state.push(latents, torch.zeros(1, 512), "model", "reference")
    return state


def heights(picture: Image.Image) -> np.ndarray:
    """How high the bars are at each column of the panel, in pixels."""
    panel = picture.crop((64, 88, picture.width - 24, 291))
    return np.sum([[share(panel, BLUES, (x, 0, x + 1, 203)) * 203] for x in range(panel.width)], axis=1)


@pytest.mark.parametrize("width", [600, 1000])
def test_memory_says_what_it_remembers(width: int) -> None:
    picture, texts = texts_of(draw_memory, chain(12, horizon=4), width=width)
    assert picture.size == (width, 340) and picture.mode == "RGB"
    assert "12 windows seen" in texts and "now" in texts
    assert "horizon: last 4 windows    size: 1.01 MiB" in texts
    assert {"82%", "15%", "3%"} <= set(texts)  # 0.9^16 of each next: shares of the whole


def test_weights_fall_with_the_past() -> None:
    bars = heights(draw_memory(chain(3)))
    bars = bars[bars > 0]  # without the gaps between frames
    assert (np.diff(bars) >= 0).all() and bars[-1] > 195 and bars[0] < 0.4 * bars[-1]


def test_silence_is_a_gap() -> None:
    picture, texts = texts_of(draw_memory, chain(2).decayed(2))
    assert "silence 2.0 s" in texts
    bars = heights(picture)
    assert bars[len(bars) // 2 :].max() == 0  # 32 frames of past, 60 of silence
    assert bars[: len(bars) // 3].max() > 10
    assert "silence 1.0 s" in texts_of(draw_memory, chain(2).decayed(1).push(*PUSHED))[1]


PUSHED = (torch.ones(5, 4, 32, 32), torch.zeros(1, 512), "model", "reference")


def test_blended_pasts_stand_side_by_side() -> None:
    blend = MemoryState.blend(chain(3), chain(3, seed=1), 0.3)
    picture, texts = texts_of(draw_memory, blend, width=600)
    assert any("blend" in text for text in texts) and "now" not in texts
    assert (heights(picture) > 0).mean() > 0.6
    assert {"57%", "25%"} <= set(texts)


def test_empty_memory_says_so() -> None:
    for state, seen in ((MemoryState.empty(), "0 windows seen"), (chain(1).decayed(60), "1 window seen")):
        _, texts = texts_of(draw_memory, state, width=600)
        assert "empty: a new video starts from the portrait" in texts and seen in texts


def test_one_frame_is_drawn() -> None:
    picture, texts = texts_of(draw_memory, chain(1, frames=1))
    assert "100%" in texts and np.median(heights(picture)) > 195


def test_drawing_changes_nothing() -> None:
    state = chain(2)
    before = state.digest
    assert np.array_equal(draw_memory(state), draw_memory(state)) and state.digest == before


# ---- axes


def test_scales_map_their_ends_to_the_edges() -> None:
    draw = ImageDraw.Draw(Image.new("RGB", (300, 200), PAPER))
    plain = Panel(draw, (50, 10, 250, 110), (0, 4))
    assert [plain.x(0), plain.x(4), plain.y(0), plain.y(1)] == [50, 250, 110, 10]
    back = Panel(draw, (50, 10, 250, 110), (4, 0), (0.01, 1), log=True)
    assert [back.x(4), back.x(0), back.y(0.01), back.y(0.1), back.y(1)] == [50, 250, 110, 60, 10]


def test_times_read_as_people_write_them() -> None:
    assert [clock(time) for time in (0.5, 59, 60, 75, 3600)] == ["0.5 s", "59 s", "1:00", "1:15", "1:00:00"]
