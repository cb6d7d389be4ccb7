"""Emotions of a voice over time: detection and editing (MEMO section 4.2)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import number, shown, whole
from ..errors import EmotionError
from ..release import EMOTION_LABELS, EMOTIONS, SAMPLE_RATE, WINDOW
from .emotion_lines import bad_line, frame_at, read_edits, time_of
from .sound import prepare_waveform

if TYPE_CHECKING:
    from ..encoders.emotion2vec import Emotion2Vec
    from ..encoders.emotion_head import EmotionHead

# One colour per emotion, in their order.
COLOURS = ("#d1495b", "#7a8b3c", "#7b5ea7", "#f2a93b", "#9aa5b1", "#a0785a", "#3f7cac", "#2a9d8f", "#5c6370")
_NEUTRAL = EMOTIONS.index("neutral")
_UNMOVED = [EMOTIONS.index(name) for name in ("neutral", "other", "unknown")]
_MOST_FRAMES = 2**31  # two years of video
_FULL = torch.ones(())  # strengths that are not given
_BATCH = 8  # segments of 3 s encoded at once
SECONDS_AT_ONCE = 3 * _BATCH


@dataclass(frozen=True, eq=False)
class EmotionTrack:
    """Emotion labels per video frame, and the evidence behind them. A value: editing returns another track.

    Attributes:
        labels: [F] int64, indices into EMOTIONS.
        probabilities: [S, 9] float32, what the detector said of each segment of the recording. Editing labels leaves
            them.
        segment_starts: [S] float64 seconds; a segment lasts until the next one starts.
        fps: frames a second.
        strengths: [F] float32 from 0 to 1, all 1 if not given: "angry" at 0.7 is 0.7 angry and 0.3 neutral.
    """

    labels: Tensor
    probabilities: Tensor
    segment_starts: Tensor
    fps: float
    strengths: Tensor = _FULL

    def __post_init__(self) -> None:
        labels, probabilities, starts = self.labels, self.probabilities, self.segment_starts
        strengths = _FULL if self.strengths is None else self.strengths
        for name, values in (
            ("labels", labels),
            ("probabilities", probabilities),
            ("segment_starts", starts),
            ("strengths", strengths),
        ):
            if not isinstance(values, Tensor) or values.is_complex() or values.dtype == torch.bool:
                raise EmotionError(f"{name} must be a tensor of numbers, received {shown(values)}")
        if labels.is_floating_point():
            raise EmotionError(f"labels must be whole numbers, received {labels.dtype}")
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
        fps = _fps(self.fps)
        strengths = torch.ones(len(labels)) if strengths is _FULL else strengths
        if strengths.shape != labels.shape or not ((strengths >= 0) & (strengths <= 1)).all():
            raise EmotionError(
                f"strengths {tuple(strengths.shape)}, {float(strengths.min()) if len(strengths) else 0:g} to "
                f"{float(strengths.max()) if len(strengths) else 0:g}, are not one number from 0 to 1 for each of the "
                f"{len(labels)} labels"
            )
        # Clones: nobody who holds the tensors given here can change the track through them.
        object.__setattr__(self, "labels", labels.to("cpu", torch.int64, copy=True))
        object.__setattr__(self, "probabilities", probabilities.to("cpu", torch.float32, copy=True))
        object.__setattr__(self, "segment_starts", starts.to("cpu", torch.float64, copy=True))
        object.__setattr__(self, "fps", fps)
        object.__setattr__(self, "strengths", strengths.to("cpu", torch.float32, copy=True))

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
        num_frames = _count(num_frames)
        certain = F.one_hot(torch.tensor([index]), len(EMOTIONS))
        return cls(torch.full((num_frames,), index), certain, torch.zeros(1), fps)

    def with_label(self, start: float, end: float, label: str | int, strength: float = 1.0) -> EmotionTrack:
        """A copy where the frames from `start` to `end` (seconds; frames whose middle lies between) carry `label` at
        `strength`, from 0 (neutral) to 1.

        Raises EmotionError for an unknown label, a strength out of range, or a span that is empty, not of numbers, or
        outside the track.
        """
        index = emotion_index(label)
        share = number(strength, 0, 1)
        if share is None:
            raise EmotionError(f"strength is {shown(strength)}; it goes from 0 (neutral) to 1")
        for time in (start, end):
            if number(time) is None:
                raise EmotionError(f"the span {shown(start)} to {shown(end)} s is not one of two finite numbers")
        tolerance = 0.5 / self.fps
        if not (-tolerance <= start < end <= self.seconds + tolerance):
            raise EmotionError(
                f"the span {start!r} to {end!r} s does not lie within the track, 0 to {self.seconds:.3f} s"
            )
        first, last = (min(max(frame_at(time, self.fps), 0), self.num_frames) for time in (start, end))
        if first == last:
            raise EmotionError(f"the span {start!r} to {end!r} s holds no frame at {self.fps:g} fps")
        labels, strengths = self.labels.clone(), self.strengths.clone()
        labels[first:last], strengths[first:last] = index, share
        return replace(self, labels=labels, strengths=strengths)

    def edited(self, text: str) -> EmotionTrack:
        """A copy with edits applied in their order; `parse_emotion_lines` has their syntax, `describe` writes it.

        Raises EmotionError, naming the line, for what `parse_emotion_lines` refuses and for a time beyond the track;
        an end of up to 16 frames, a released window, beyond it means its end.
        """
        track = self
        for count, line, start, end, label, strength in read_edits(text):
            if start >= self.seconds:
                raise bad_line(count, line, f"it starts after the track's end at {self.seconds:.3f} s")
            if end < math.inf and end > self.seconds + WINDOW / self.fps:
                raise bad_line(count, line, f"it ends at {end:g} s, the track at {self.seconds:.3f} s; write 'end'")
            try:
                track = track.with_label(start, min(end, self.seconds), label, strength)
            except EmotionError as error:
                raise bad_line(count, line, str(error)) from error
        return track

    def spans(self) -> list[tuple[int, int, int, float]]:
        """The runs of frames with one label and strength, in order: (first, one past the last, label, strength)."""
        changed = (self.labels[1:] != self.labels[:-1]) | (self.strengths[1:] != self.strengths[:-1])
        cuts = [0, *(changed.nonzero().flatten() + 1).tolist(), self.num_frames]
        return [(a, b, int(self.labels[a]), float(self.strengths[a])) for a, b in zip(cuts, cuts[1:])]

    def describe(self) -> str:
        """One line per span, `0.0-2.5 happy` or `2.5-4.0 angry 0.7`: as `edited` on a track of this length reads it."""
        lines = []
        for first, last, label, strength in self.spans():
            line = f"{time_of(first, self.fps)}-{time_of(last, self.fps)} {EMOTIONS[label]}"
            # The shortest decimal that is this float32.
            lines.append(line if strength == 1 else f"{line} {np.format_float_positional(np.float32(strength))}")
        return "\n".join(lines)

    def fit(self, fps: float, num_frames: int) -> EmotionTrack:
        """This track at another frame rate and length: each frame takes the label nearest in time; beyond the end the
        last label holds. The track itself where nothing changes.

        Raises EmotionError for an fps that is not a positive number, or num_frames below 1.
        """
        fps, num_frames = _fps(fps), _count(num_frames)
        if (fps, num_frames) == (self.fps, self.num_frames):
            return self
        middles = (torch.arange(num_frames, dtype=torch.float64) + 0.5) * self.fps / fps
        nearest = middles.long().clamp_max(self.num_frames - 1)
        return replace(self, labels=self.labels[nearest], strengths=self.strengths[nearest], fps=fps)

    def conditioning(self, frames: Tensor, per: str) -> Tensor:
        """What the Diffusion Net reads for one window.

        Args:
            frames: [N] int64, the window's frames, at least one; beyond the end the last one holds.
            per: "window" for the most frequent label (the lower among equals), at the mean strength of the frames that
                carry it; "frame" for each frame's own.

        Returns:
            labels, [1] or [N] int64, where the strengths of all these frames are 1; else class weights, [1, 10] or
            [N, 10] float32: what a label's strength leaves is neutral's, and the null emotion's (9) is 0.
        """
        if per not in ("window", "frame"):
            raise EmotionError(f"per must be 'window' or 'frame', received {shown(per)}")
        if not isinstance(frames, Tensor) or frames.dtype != torch.int64:
            raise EmotionError(f"frames must be an int64 tensor, received {shown(frames)}")
        if frames.ndim != 1 or not len(frames):
            raise EmotionError(f"frames have shape {tuple(frames.shape)}; [N] with at least one frame is expected")
        frames = frames.clamp(0, self.num_frames - 1)
        labels, strengths = self.labels[frames], self.strengths[frames]
        soft = bool((strengths < 1).any())
        if per == "window":
            label = labels.mode().values[None]
            labels, strengths = label, strengths[labels == label].mean()[None]
        if not soft:
            return labels
        weights = torch.zeros(len(labels), EMOTION_LABELS).scatter(1, labels[:, None], strengths[:, None])
        weights[:, _NEUTRAL] += 1 - strengths
        return weights


def emotion_index(label: str | int) -> int:
    """The index of an emotion given by name (any case) or index. Raises EmotionError for any other."""
    if isinstance(label, str) and label.strip().lower() in EMOTIONS:
        return EMOTIONS.index(label.strip().lower())
    index = whole(label, 0, len(EMOTIONS) - 1)
    if index is not None:
        return index
    raise EmotionError(
        f"unknown emotion {shown(label)}; allowed are {', '.join(EMOTIONS)} or their indices 0 to {len(EMOTIONS) - 1}"
    )


def _fps(fps: float) -> float:
    checked = number(fps, 0)
    if not checked:
        raise EmotionError(f"fps is {shown(fps)}; it must be a positive number")
    return checked


def _count(num_frames: int, name: str = "num_frames") -> int:
    checked = whole(num_frames, 1, _MOST_FRAMES)
    if checked is None:
        raise EmotionError(f"{name} is {shown(num_frames)}; at least 1 is needed, and at most {_MOST_FRAMES}")
    return checked


def detect_emotion(
    waveform: Tensor | np.ndarray,
    sample_rate: float,
    encoder: Emotion2Vec,
    head: EmotionHead,
    num_padded_frames: int,
    fps: float = 30,
    sensitivity: float = 1.0,
    smoothing: float = 0.0,
) -> EmotionTrack:
    """Detects the emotion of a voice, second by second.

    As released, every second is judged by the 3 s around it, the first and the last one by the 2 s at that end; each of
    these segments is layer-normalised, its features averaged over time. The seconds' labels are then spread over the
    frames by nearest neighbour. Since the released code does this over the *padded* number of frames, the labels of a
    short recording lie later in the video than in the sound, by up to the length of the padding at its end; this is
    kept for equal numbers. (It listens to the first channel only; here channels are averaged, as for the speech
    embeddings.)

    Args:
        waveform: [T] or [channels, T]; see `inputs.sound.prepare_waveform`.
        sample_rate: in Hz.
        num_padded_frames: length of the track, `AudioTrack.num_padded_frames`.
        fps: frames a second.
        sensitivity: from 0.1 to 10; how readily a voice leaves neutral, other and unknown, whose probabilities are
            divided by it before the most probable emotion is chosen.
        smoothing: seconds over which the probabilities are averaged, around each second, before that.

    Returns:
        the track; its probabilities are the detector's own, whatever sensitivity and smoothing are.

    Raises:
        AudioError: a bad recording.
        EmotionError: no frames, sensitivity or smoothing out of range, or encoder and head that do not fit each other.
    """
    if number(sensitivity, 0.1, 10) is None:
        raise EmotionError(f"sensitivity is {shown(sensitivity)}; 0.1 to 10 are allowed")
    if number(smoothing, 0) is None:
        raise EmotionError(f"smoothing is {shown(smoothing)} s; a finite number from 0 is expected")
    num_padded_frames, fps = _count(num_padded_frames, "num_padded_frames"), _fps(fps)
    if encoder.feature_dim != head.feature_dim or head.classes != len(EMOTIONS):
        raise EmotionError(
            f"the emotion head reads {head.feature_dim} features and knows {head.classes} classes; expected are "
            f"{encoder.feature_dim} and {len(EMOTIONS)}"
        )
    samples = prepare_waveform(waveform, sample_rate)
    starts, spans = _segments(len(samples))
    probabilities = _classify([samples[begin:end] for begin, end in spans], encoder, head)
    seconds = torch.tensor(starts, dtype=torch.float64) / SAMPLE_RATE
    heard = probabilities
    if smoothing * SAMPLE_RATE >= 1:
        heard = _smooth(probabilities, seconds, len(samples) / SAMPLE_RATE, smoothing)
    weights = torch.ones(len(EMOTIONS))
    weights[_UNMOVED] /= sensitivity
    labels = (heard * weights).argmax(dim=1)[_segment_of_frame(starts, len(samples), num_padded_frames)]
    return EmotionTrack(labels, probabilities, seconds, fps)


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


def _smooth(probabilities: Tensor, starts: Tensor, end: float, seconds: float) -> Tensor:
    """The mean of [S, 9] probabilities over `seconds` around each segment's middle, as far as there is sound."""
    values, edges = probabilities.double(), torch.cat([starts, starts.new_tensor([end])])
    sums = F.pad((values * edges.diff()[:, None]).cumsum(dim=0), (0, 0, 1, 0))[:-1]

    def integral(time: Tensor) -> Tensor:
        segment = (torch.searchsorted(starts, time, right=True) - 1).clamp_min(0)
        return sums[segment] + values[segment] * (time - starts[segment])[:, None]

    middles = (edges[1:] + edges[:-1]) / 2
    first, last = ((middles + side * seconds / 2).clamp(0, end) for side in (-1, 1))
    return ((integral(last) - integral(first)) / (last - first)[:, None]).float()


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
