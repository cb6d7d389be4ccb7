"""Emotions of a voice over time: detection, editing, a picture (MEMO section 3.3)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .audio import SAMPLE_RATE, prepare_waveform
from .errors import EmotionError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from .nets.emotion2vec import Emotion2Vec
    from .nets.emotion_head import EmotionHead

EMOTIONS = ("angry", "disgusted", "fearful", "happy", "neutral", "other", "sad", "surprised", "unknown")
# One colour per emotion, in their order.
COLOURS = ("#d1495b", "#7a8b3c", "#7b5ea7", "#f2a93b", "#9aa5b1", "#a0785a", "#3f7cac", "#2a9d8f", "#5c6370")
_BATCH = 8  # segments of 3 s encoded at once


@dataclass(frozen=True, eq=False)
class EmotionTrack:
    """Emotion labels per video frame, and the evidence behind them. A value: editing returns another track.

    Attributes:
        labels: [F] int64, indices into EMOTIONS.
        probabilities: [S, 9] float32, what the detector said of each segment of the recording. Editing labels leaves
            them.
        segment_starts: [S] float64 seconds; a segment lasts until the next one starts.
        fps: frames a second.
    """

    labels: Tensor
    probabilities: Tensor
    segment_starts: Tensor
    fps: float

    def __post_init__(self) -> None:
        labels, probabilities, starts = self.labels, self.probabilities, self.segment_starts
        if labels.ndim != 1 or not len(labels):
            raise EmotionError(f"labels have shape {tuple(labels.shape)}; [frames] with at least one frame is expected")
        if int(labels.min()) < 0 or int(labels.max()) >= len(EMOTIONS):
            raise EmotionError(
                f"labels span {int(labels.min())} to {int(labels.max())}; 0 to {len(EMOTIONS) - 1} are allowed"
            )
        if tuple(probabilities.shape) != (len(starts), len(EMOTIONS)) or starts.ndim != 1:
            raise EmotionError(
                f"probabilities {tuple(probabilities.shape)} and segment_starts {tuple(starts.shape)} do not form "
                f"[segments, {len(EMOTIONS)}] and [segments]"
            )
        if not 0 < self.fps < math.inf:
            raise EmotionError(f"fps is {self.fps!r}; it must be a positive number")
        # Clones: nobody who holds the tensors given here can change the track through them.
        object.__setattr__(self, "labels", labels.to("cpu", torch.int64, copy=True))
        object.__setattr__(self, "probabilities", probabilities.to("cpu", torch.float32, copy=True))
        object.__setattr__(self, "segment_starts", starts.to("cpu", torch.float64, copy=True))
        object.__setattr__(self, "fps", float(self.fps))

    @property
    def num_frames(self) -> int:
        """F."""
        return len(self.labels)

    @property
    def seconds(self) -> float:
        """F / fps."""
        return self.num_frames / self.fps

    @classmethod
    def constant(cls, label: str | int, num_frames: int, fps: float = 30) -> EmotionTrack:
        """One emotion throughout, as if detected with certainty. EmotionError for an unknown label or no frames."""
        index = emotion_index(label)
        if num_frames < 1:
            raise EmotionError(f"num_frames is {num_frames}; at least 1 is needed")
        certain = F.one_hot(torch.tensor([index]), len(EMOTIONS))
        return cls(torch.full((num_frames,), index), certain, torch.zeros(1), fps)

    def with_label(self, start: float, end: float, label: str | int) -> EmotionTrack:
        """A copy where the frames from `start` to `end` (seconds; frames whose middle lies between) carry `label`.

        Raises EmotionError for an unknown label, or a span that is empty, not of numbers, or outside the track.
        """
        index = emotion_index(label)
        tolerance = 0.5 / self.fps
        if not (-tolerance <= start < end <= self.seconds + tolerance):
            raise EmotionError(
                f"the span {start!r} to {end!r} s does not lie within the track, 0 to {self.seconds:.3f} s"
            )
        first, last = (min(max(math.ceil(time * self.fps - 0.5), 0), self.num_frames) for time in (start, end))
        if first == last:
            raise EmotionError(f"the span {start!r} to {end!r} s holds no frame at {self.fps:g} fps")
        labels = self.labels.clone()
        labels[first:last] = index
        return replace(self, labels=labels)

    def window_labels(self, window_frames: int = 16) -> Tensor:
        """The most frequent label of each window, the lower among equals: [ceil(F / window_frames)] int64."""
        if window_frames < 1:
            raise EmotionError(f"window_frames is {window_frames}; at least 1 is needed")
        return torch.stack([window.mode().values for window in self.labels.split(window_frames)])


def emotion_index(label: str | int) -> int:
    """The index of an emotion given by name (any case) or index. Raises EmotionError for any other."""
    if isinstance(label, str) and label.strip().lower() in EMOTIONS:
        return EMOTIONS.index(label.strip().lower())
    if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(EMOTIONS):
        return label
    raise EmotionError(
        f"unknown emotion {label!r}; allowed are {', '.join(EMOTIONS)} or their indices 0 to {len(EMOTIONS) - 1}"
    )


def detect_emotion(
    waveform: Tensor | np.ndarray,
    sample_rate: float,
    encoder: Emotion2Vec,
    head: EmotionHead,
    num_padded_frames: int,
    fps: float = 30,
) -> EmotionTrack:
    """Detects the emotion of a voice, second by second.

    As released, every second is judged by the 3 s around it, the first and the last one by the 2 s at that end; each of
    these segments is layer-normalised, its features averaged over time. The seconds' labels are then spread over the
    frames by nearest neighbour. Since the released code does this over the *padded* number of frames, the labels of a
    short recording lie later in the video than in the sound, by up to the length of the padding at its end; this is
    kept for equal numbers. (It listens to the first channel only; here channels are averaged, as for the speech
    embeddings.)

    Args:
        waveform: [T] or [channels, T]; see `audio.prepare_waveform`.
        sample_rate: in Hz.
        num_padded_frames: length of the track, `AudioTrack.num_padded_frames`.
        fps: frames a second.

    Raises:
        AudioError: a bad recording.
        EmotionError: no frames, or encoder and head that do not fit each other.
    """
    if num_padded_frames < 1:
        raise EmotionError(f"num_padded_frames is {num_padded_frames}; at least 1 is needed")
    if encoder.feature_dim != head.feature_dim or head.classes != len(EMOTIONS):
        raise EmotionError(
            f"the emotion head reads {head.feature_dim} features and knows {head.classes} classes; expected are "
            f"{encoder.feature_dim} and {len(EMOTIONS)}"
        )
    samples = prepare_waveform(waveform, sample_rate)
    starts, spans = _segments(len(samples))
    probabilities = _classify([samples[begin:end] for begin, end in spans], encoder, head)
    labels = probabilities.argmax(dim=1)[_segment_of_frame(starts, len(samples), num_padded_frames)]
    return EmotionTrack(labels, probabilities, torch.tensor(starts, dtype=torch.float64) / SAMPLE_RATE, fps)


def _segments(num_samples: int) -> tuple[list[int], list[tuple[int, int]]]:
    """The samples at which each label starts, and the span of samples that it is judged by."""
    second = SAMPLE_RATE
    starts, spans = [0], [(0, min(2 * second, num_samples))]
    for start in range(second, num_samples - second, second):
        starts.append(start)
        spans.append((start - second, min(start + 2 * second, num_samples)))
    if num_samples > second:
        starts.append(num_samples - second)
        spans.append((max(0, num_samples - 2 * second), num_samples))
    return starts, spans


def _segment_of_frame(starts: list[int], num_samples: int, num_frames: int) -> Tensor:
    """For each frame the segment that its nearest sample lies in; float32, as torch's interpolation computes it."""
    scale = torch.tensor(num_samples, dtype=torch.float32) / num_frames
    nearest = (torch.arange(num_frames, dtype=torch.float32) * scale).long().clamp_max(num_samples - 1)
    return torch.searchsorted(torch.tensor(starts), nearest, right=True) - 1


@torch.no_grad()
def _classify(segments: list[Tensor], encoder: Emotion2Vec, head: EmotionHead) -> Tensor:
    """Waveforms -> [segments, 9] probabilities; segments of equal length go through the encoder together."""
    weight = next(encoder.parameters())
    probabilities = torch.empty(len(segments), head.classes)
    by_length: dict[int, list[int]] = {}
    for index, segment in enumerate(segments):
        by_length.setdefault(len(segment), []).append(index)
    for length, indices in by_length.items():
        for first in range(0, len(indices), _BATCH):
            chosen = indices[first : first + _BATCH]
            batch = F.layer_norm(torch.stack([segments[i] for i in chosen]), (length,))
            pooled = encoder(batch.to(weight.device, weight.dtype)).mean(dim=1)
            head_weight = next(head.parameters())
            logits = head(pooled.to(head_weight.device, head_weight.dtype))
            probabilities[chosen] = logits.float().softmax(dim=1).cpu()
    return probabilities


def draw_emotion(
    track: EmotionTrack, waveform: Tensor | np.ndarray, sample_rate: float, width: int = 1200
) -> Image.Image:
    """A picture of a track: a legend, the waveform on bands in the colours of the frames' labels, and below it the
    detector's probabilities, stacked. Time runs in seconds of the video for the bands and of the recording for the
    rest.

    Args:
        waveform: [T] or [channels, T]; see `audio.prepare_waveform`.
        width: of the picture in pixels, at least 600; its height is 440.

    Returns:
        an RGB image. Raises AudioError for a bad recording, EmotionError for a width below 600.
    """
    from PIL import Image, ImageDraw, ImageFont

    if width < 600:
        raise EmotionError(f"width is {width}; at least 600 pixels are needed")
    samples = prepare_waveform(waveform, sample_rate)
    seconds = max(track.seconds, len(samples) / SAMPLE_RATE)
    image = Image.new("RGB", (width, 440), "white")
    draw = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    ink = "#22262b"
    left, right = 100, width - 20

    def column(time: float) -> int:
        return left + round(time / seconds * (right - left))

    seen = (track.probabilities.amax(dim=0) >= 0.03).nonzero().flatten()  # wide enough to be seen
    used = sorted({*track.labels.tolist(), *seen.tolist()})
    at = left
    for index in used:
        draw.rectangle((at, 16, at + 14, 30), fill=COLOURS[index])
        draw.text((at + 20, 23), EMOTIONS[index], fill=ink, font=font, anchor="lm")
        at += 34 + int(draw.textlength(EMOTIONS[index], font=font))

    # Labels and waveform.
    top, bottom, middle = 48, 208, 128
    changes = [0, *((track.labels[1:] != track.labels[:-1]).nonzero().flatten() + 1).tolist(), track.num_frames]
    for begin, end in zip(changes, changes[1:]):
        index = int(track.labels[begin])
        x0, x1 = column(begin / track.fps), column(end / track.fps)
        draw.rectangle((x0, top, x1, bottom), fill=_blend(COLOURS[index], 0.35))
        draw.rectangle((x0, bottom - 20, x1, bottom), fill=COLOURS[index])
        if draw.textlength(EMOTIONS[index], font=small) + 8 < x1 - x0:
            draw.text(((x0 + x1) // 2, bottom - 10), EMOTIONS[index], fill="white", font=small, anchor="mm")
    loudest = max(float(samples.abs().max()), 1e-6)
    columns = max(1, column(len(samples) / SAMPLE_RATE) - left)
    for x in range(columns):
        # One sample more than the column's own, so that the line is never broken between columns.
        part = samples[min(x * len(samples) // columns, len(samples) - 1) : (x + 1) * len(samples) // columns + 1]
        high, low = (float(value) / loudest * 56 for value in (part.max(), part.min()))
        draw.line((left + x, middle - 10 - high, left + x, middle - 10 - low), fill=ink)
    draw.text((left - 10, middle - 10), "voice", fill=ink, font=font, anchor="rm")
    draw.text((left - 10, bottom - 10), "label", fill=ink, font=font, anchor="rm")

    # Probabilities, one column per segment.
    top, bottom = 224, 384
    ends = [*track.segment_starts[1:].tolist(), max(len(samples) / SAMPLE_RATE, float(track.segment_starts[-1]))]
    for begin, end, shares in zip(track.segment_starts.tolist(), ends, track.probabilities.tolist()):
        y = float(bottom)
        for index, share in enumerate(shares):
            height = share * (bottom - top)
            if round(y) > round(y - height):
                x0 = column(begin)
                draw.rectangle((x0, round(y - height), max(x0, column(end) - 1), round(y)), fill=COLOURS[index])
            y -= height
    for share in (0.0, 0.5, 1.0):
        y = bottom - round(share * (bottom - top))
        draw.line((left - 5, y, left, y), fill=ink)
        draw.text((left - 10, y), f"{share:.0%}", fill=ink, font=small, anchor="rm")
    draw.text((left - 50, (top + bottom) // 2 + 20), "probability", fill=ink, font=small, anchor="mm")

    # The axis of time.
    step = next(
        (step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600) if seconds / step <= 14), 1800
    )
    draw.line((left, 392, right, 392), fill=ink)
    for tick in range(int(seconds / step) + 1):
        x = column(tick * step)
        draw.line((x, 392, x, 398), fill=ink)
        draw.text((x, 410), _clock(tick * step), fill=ink, font=small, anchor="mm")
    return image


def _blend(colour: str, share: float) -> tuple[int, int, int]:
    """`colour` laid over white with the given opacity."""
    return tuple(round(255 - share * (255 - int(colour[i : i + 2], 16))) for i in (1, 3, 5))


def _clock(time: float) -> str:
    """Seconds as "2.5 s" below a minute, else as "m:ss" or "h:mm:ss"."""
    if time < 60:
        return f"{time:g} s"
    minutes, secs = divmod(round(time), 60)
    return f"{minutes}:{secs:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{secs:02d}"
