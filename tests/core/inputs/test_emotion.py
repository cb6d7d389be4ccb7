"""Emotions of a voice: the networks, detection, editing, the picture."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from common import relative_l2
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.errors import AudioError, CheckpointError, EmotionError
from memo_core.inputs import emotion
from memo_core.inputs.emotion import EmotionTrack, _segment_of_frame, _segments, _smooth, detect_emotion
from memo_core.inputs.emotion_lines import parse_emotion_lines
from memo_core.nets.emotion_norm import EmotionAdaNorm
from memo_core.release import EMOTIONS

RATE = 16000
HEAD = "misc/audio_emotion_classifier"


@pytest.fixture(scope="module")
def encoder(memo_tiny: Path) -> Emotion2Vec:
    return Emotion2Vec.from_pretrained(memo_tiny / "emotion2vec")


@pytest.fixture(scope="module")
def head(memo_tiny: Path) -> EmotionHead:
    return EmotionHead.from_pretrained(memo_tiny / HEAD)


@pytest.fixture(scope="module")
def voice(expected: dict[str, Tensor]) -> Tensor:
    return expected["in.waveform"]


def varied(voice: Tensor, seconds: float) -> Tensor:
    """The fixture's voice, noise and silence in turn, so that the detector says different things."""
    generator = torch.Generator().manual_seed(3)
    parts = [voice, 0.1 * torch.randn(30000, generator=generator), torch.zeros(20000), voice.flip(0)]
    return torch.cat(parts * math.ceil(seconds))[: round(seconds * RATE)]


# ---- numbers of the reference implementation


def test_features_and_probabilities_equal_the_reference(
    encoder: Emotion2Vec, head: EmotionHead, voice: Tensor, expected: dict[str, Tensor]
) -> None:
    first = voice[: 2 * RATE]
    with torch.no_grad():
        features = encoder(F.layer_norm(first, first.shape)[None])
        probabilities = head(features.mean(dim=1)).softmax(dim=1)
    assert relative_l2(features, expected["emotion.features"]) < 1e-5
    assert relative_l2(probabilities, expected["emotion.probabilities"]) < 1e-5


def test_detected_labels_equal_the_reference(
    encoder: Emotion2Vec, head: EmotionHead, voice: Tensor, expected: dict[str, Tensor]
) -> None:
    track = detect_emotion(voice, RATE, encoder, head, num_padded_frames=80, fps=30)
    assert torch.equal(track.labels, expected["audio.emotion_labels"].long())
    assert relative_l2(track.probabilities[:1], expected["emotion.probabilities"]) < 1e-5
    assert track.segment_starts.tolist() == pytest.approx([0, 1, 1.3])


def labels_one_by_one(samples: Tensor, encoder: Emotion2Vec, head: EmotionHead, frames: int) -> Tensor:
    """The procedure as the paper's code goes about it: a label per sample, segment after segment, then nearest
    neighbour."""

    def judge(part: Tensor) -> int:
        with torch.no_grad():
            return int(head(encoder(F.layer_norm(part, part.shape)[None]).mean(dim=1)).argmax())

    labels = torch.full((len(samples),), -1.0)
    labels[:RATE] = judge(samples[: 2 * RATE])
    for middle in range(RATE, len(samples) - RATE, RATE):
        labels[middle : middle + RATE] = judge(samples[middle - RATE : middle + 2 * RATE])
    labels[-RATE:] = judge(samples[-2 * RATE :])
    return F.interpolate(labels[None, None], size=frames, mode="nearest")[0, 0].long()


@pytest.mark.parametrize("seconds", [0.4, 1, 1.5, 2, 3, 7, 12.34])
def test_detection_in_batches_equals_one_segment_after_the_other(
    encoder: Emotion2Vec, head: EmotionHead, voice: Tensor, seconds: float
) -> None:
    samples = varied(voice, seconds)
    frames = math.ceil(seconds * 30 / 16) * 16
    calls: list[torch.Size] = []
    handle = encoder.register_forward_pre_hook(lambda _, args: calls.append(args[0].shape))
    track = detect_emotion(samples, RATE, encoder, head, frames)
    handle.remove()
    assert torch.equal(track.labels, labels_one_by_one(samples, encoder, head, frames))
    assert len(track.probabilities) == len(track.segment_starts)
    assert torch.allclose(track.probabilities.sum(dim=1), torch.ones(len(track.probabilities)), atol=1e-5)
    if seconds > 12:
        assert len(set(track.labels.tolist())) > 1, "the test needs a voice that gives different labels"
        assert len(calls) < len(track.probabilities), "segments should share calls"
        assert max(shape[0] for shape in calls) <= 8


@settings(deadline=None, max_examples=100)
@given(samples=st.integers(1, 2_000_000), frames=st.integers(1, 4000))
def test_frames_find_their_second_as_interpolation_does(samples: int, frames: int) -> None:
    starts, spans = _segments(samples)
    by_sample = torch.zeros(samples)
    for index, (start, end) in enumerate(zip(starts, [*starts[1:], samples])):
        by_sample[start:end] = index
    wanted = F.interpolate(by_sample[None, None], size=frames, mode="nearest")[0, 0].long()
    assert torch.equal(_segment_of_frame(starts, samples, frames), wanted)
    assert all(0 <= begin < end <= samples and end - begin <= 3 * RATE for begin, end in spans)


@pytest.mark.parametrize("waveform", [torch.zeros(1), torch.ones(1), torch.zeros(5 * RATE), torch.full((399,), 0.3)])
def test_silence_and_one_sample_are_judged(encoder: Emotion2Vec, head: EmotionHead, waveform: Tensor) -> None:
    track = detect_emotion(waveform, RATE, encoder, head, 16)
    assert torch.isfinite(track.probabilities).all()
    assert track.num_frames == 16


def test_bad_input_is_refused(encoder: Emotion2Vec, head: EmotionHead) -> None:
    with pytest.raises(AudioError, match="not finite"):
        detect_emotion(torch.tensor([math.nan]), RATE, encoder, head, 16)
    with pytest.raises(EmotionError, match="num_padded_frames is 0"):
        detect_emotion(torch.zeros(100), RATE, encoder, head, 0)
    with pytest.raises(EmotionError, match="reads 16 features"):
        detect_emotion(torch.zeros(100), RATE, encoder, EmotionHead(feature_dim=16, hidden_dim=8), 16)
    with pytest.raises(EmotionError, match="knows 8 classes"):
        detect_emotion(torch.zeros(100), RATE, encoder, EmotionHead(feature_dim=32, hidden_dim=8, classes=8), 16)


# ---- the track is a value


def test_editing_returns_another_track() -> None:
    track = EmotionTrack.constant("neutral", 90)
    edited = track.with_label(1, 2, "happy")
    assert track.labels.tolist() == [EMOTIONS.index("neutral")] * 90
    assert edited.labels.tolist() == [4] * 30 + [3] * 30 + [4] * 30
    assert torch.equal(edited.probabilities, track.probabilities)
    assert edited.with_label(0, 3, 6).labels.tolist() == [6] * 90
    assert edited.with_label(2.5, 3, " SAD ").labels.tolist() == [4] * 30 + [3] * 30 + [4] * 15 + [6] * 15
    with pytest.raises(dataclasses.FrozenInstanceError):
        track.labels = edited.labels  # type: ignore[misc]


def test_track_keeps_its_values_when_the_given_tensors_change() -> None:
    labels, probabilities, starts = torch.full((4,), 2), torch.full((1, 9), 1 / 9), torch.zeros(1, dtype=torch.float64)
    track = EmotionTrack(labels, probabilities, starts, 30)
    for tensor in (labels, probabilities, starts):
        tensor += 1
    assert track.labels.tolist() == [2] * 4
    assert float(track.probabilities.sum()) == pytest.approx(1)
    assert track.segment_starts.tolist() == [0]


@settings(deadline=None, max_examples=50)
@given(
    frames=st.integers(1, 300),
    fps=st.sampled_from([24, 25, 29.97, 30]),
    cuts=st.lists(st.floats(0, 1), max_size=5),
    data=st.data(),
)
def test_neighbouring_edits_leave_no_gap_and_no_overlap(
    frames: int, fps: float, cuts: list[float], data: st.DataObject
) -> None:
    track = EmotionTrack.constant("unknown", frames, fps)
    times = sorted({0.0, track.seconds, *(cut * track.seconds for cut in cuts)})
    for start, end in zip(times, times[1:]):
        middles = (torch.arange(frames, dtype=torch.float64) + 0.5) / fps
        inside = ((middles >= start) & (middles < end)).nonzero().flatten().tolist()
        if not inside or end - start < 1e-6:
            continue
        before = track.labels
        track = track.with_label(start, end, data.draw(st.integers(0, 7)))
        touched = (track.labels != before).nonzero().flatten().tolist()
        assert touched == inside


@pytest.mark.parametrize(
    ("span", "label", "named"),
    [
        ((0, 1), "joyful", "'joyful'.*angry, disgusted"),
        ((0, 1), 9, "9.*0 to 8"),
        ((0, 1), True, "True"),
        ((0, 1), 1.0, "1.0"),
        ((-1, 1), "sad", "-1"),
        ((0, 4), "sad", "0 to 4 s.*0 to 3.000 s"),
        ((2, 1), "sad", "2 to 1"),
        ((1, 1), "sad", "1 to 1"),
        ((math.nan, 1), "sad", "nan"),
        ((1.001, 1.002), "sad", "no frame"),
    ],
)
def test_bad_edits_are_refused_by_name(span: tuple[float, float], label: object, named: str) -> None:
    with pytest.raises(EmotionError, match=named):
        EmotionTrack.constant("neutral", 90).with_label(*span, label)


def test_bad_tracks_are_refused() -> None:
    one, certain = torch.zeros(1), torch.zeros(1, 9)
    cases = [
        (torch.zeros(0), certain, one, 30),
        (torch.zeros(2, 2), certain, one, 30),
        (torch.tensor([9]), certain, one, 30),
        (torch.tensor([-1]), certain, one, 30),
        (one.long(), torch.zeros(1, 8), one, 30),
        (one.long(), certain, torch.zeros(2), 30),
        (one.long(), certain, one, 0),
    ]
    for case in cases:
        with pytest.raises(EmotionError):
            EmotionTrack(*case)
    with pytest.raises(EmotionError, match="num_frames is 0"):
        EmotionTrack.constant("sad", 0)


# ---- sensitivity and smoothing


class Says:
    """Stands for an encoder and a head that are not asked."""

    feature_dim, classes = 1, len(EMOTIONS)


def detected(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, float]], **kwargs: float) -> EmotionTrack:
    """A track of len(rows) seconds at 10 fps, whose detector says `rows`."""
    probabilities = torch.zeros(len(rows), len(EMOTIONS))
    for second, row in enumerate(rows):
        for name, share in row.items():
            probabilities[second, EMOTIONS.index(name)] = share
    monkeypatch.setattr(emotion, "_classify", lambda *_: probabilities)
    track = detect_emotion(torch.zeros(len(rows) * RATE), RATE, Says, Says, len(rows) * 10, 10, **kwargs)
    assert torch.equal(track.probabilities, probabilities), "what was heard stays as it was heard"
    return track


@pytest.mark.parametrize("calm", ["neutral", "other", "unknown"])
def test_sensitivity_leaves_neutral_sooner(monkeypatch: pytest.MonkeyPatch, calm: str) -> None:
    rows = [{calm: 0.6, "happy": 0.4}, {calm: 0.45, "sad": 0.55}]
    for sensitivity, wanted in ((1, f"{calm} sad"), (2, "happy sad"), (0.5, f"{calm} {calm}")):
        track = detected(monkeypatch, rows, sensitivity=sensitivity)
        assert [EMOTIONS[i] for i in track.labels[::10].tolist()] == wanted.split()


def test_smoothing_is_a_moving_average_over_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"happy": 1.0}] * 3 + [{"sad": 1.0}] + [{"happy": 1.0}] * 3
    blip = [EMOTIONS.index("happy")] * 30 + [EMOTIONS.index("sad")] * 10 + [EMOTIONS.index("happy")] * 30
    assert detected(monkeypatch, rows, smoothing=1).labels.tolist() == blip  # no longer than a segment
    assert set(detected(monkeypatch, rows, smoothing=3).labels.tolist()) == {EMOTIONS.index("happy")}
    starts = torch.arange(7, dtype=torch.float64)
    smooth = _smooth(F.one_hot(torch.tensor([0, 0, 0, 1, 0, 0, 0])).float(), starts, 7.0, 3.0)
    assert torch.allclose(smooth[:, 1], torch.tensor([0, 0, 1, 1, 1, 0, 0]) / 3)
    ends = _smooth(torch.eye(2), torch.tensor([0.0, 1.0], dtype=torch.float64), 1.5, 100.0)
    assert torch.allclose(ends, torch.tensor([[2 / 3, 1 / 3]] * 2))  # only where there is sound, by its length


def test_defaults_are_as_released_and_settings_have_bounds(
    encoder: Emotion2Vec, head: EmotionHead, voice: Tensor
) -> None:
    samples = varied(voice, 7)
    plain = detect_emotion(samples, RATE, encoder, head, 224)
    same = detect_emotion(samples, RATE, encoder, head, 224, sensitivity=1.0, smoothing=0.0)
    assert torch.equal(plain.labels, same.labels) and torch.equal(plain.probabilities, same.probabilities)
    eager = detect_emotion(samples, RATE, encoder, head, 224, sensitivity=3, smoothing=2)
    assert torch.equal(plain.probabilities, eager.probabilities)
    for bad in ({"sensitivity": 0}, {"sensitivity": 11}, {"sensitivity": math.nan}, {"smoothing": -1}):
        with pytest.raises(EmotionError, match=next(iter(bad))):
            detect_emotion(samples, RATE, encoder, head, 224, **bad)


# ---- strengths


def test_strength_is_kept_frame_by_frame() -> None:
    track = EmotionTrack.constant("neutral", 90).with_label(1, 2, "angry", 0.7)
    assert track.strengths.tolist() == pytest.approx([1] * 30 + [0.7] * 30 + [1] * 30)
    assert track.with_label(1, 2, "angry").strengths.tolist() == [1] * 90
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(EmotionError, match="strength"):
            track.with_label(1, 2, "angry", bad)
    given = torch.full((90,), 0.5)
    held = EmotionTrack(track.labels, track.probabilities, track.segment_starts, 30, given)
    given += 1
    assert held.strengths.tolist() == [0.5] * 90
    for bad in (torch.ones(89), torch.full((90,), 1.5), torch.full((90,), math.nan)):
        with pytest.raises(EmotionError, match="strengths"):
            EmotionTrack(track.labels, track.probabilities, track.segment_starts, 30, bad)


def test_full_strength_conditions_by_label_as_released() -> None:
    track = EmotionTrack.constant("neutral", 32).with_label(0.2, 0.7, "happy")
    window, frame = (track.conditioning(torch.arange(4, 20), per) for per in ("window", "frame"))
    assert window.dtype == frame.dtype == torch.int64
    assert window.tolist() == track.labels[4:20].mode().values[None].tolist() == [3]
    assert torch.equal(frame, track.labels[4:20])
    assert track.conditioning(torch.arange(30, 46), "frame").tolist() == [4] * 16  # the last label holds


def test_strength_conditions_by_class_weights() -> None:
    track = EmotionTrack.constant("sad", 16, 10).with_label(0, 0.6, "angry", 0.5).with_label(0.6, 1.2, "angry", 0.9)
    weights = track.conditioning(torch.arange(16), "window")
    assert weights.shape == (1, 10) and weights.dtype == torch.float32
    assert weights[0].tolist() == pytest.approx([0.7, 0, 0, 0, 0.3, 0, 0, 0, 0, 0])  # the mean over the angry frames
    frames = track.conditioning(torch.arange(16), "frame")
    assert frames.shape == (16, 10)
    assert frames[0].tolist() == pytest.approx([0.5, 0, 0, 0, 0.5, 0, 0, 0, 0, 0])
    assert frames[15].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert track.conditioning(torch.arange(12, 16), "window").dtype == torch.int64  # no weak frame among these
    calm = EmotionTrack.constant("neutral", 4).with_label(0, 0.1, "neutral", 0.2)
    assert calm.conditioning(torch.arange(4), "window")[0, 4] == 1
    for frames, per in ((torch.arange(4), "second"), (torch.arange(0), "frame")):
        with pytest.raises(EmotionError):
            calm.conditioning(frames, per)


class Caster(torch.nn.Embedding):
    """A layer whose weight is cast and patched when it is called, as hosts have them."""

    def forward(self, labels: Tensor) -> Tensor:
        return F.embedding(labels, 2 * self.weight.float())


def test_class_weights_mix_the_labels_embeddings() -> None:
    torch.manual_seed(0)
    norm = EmotionAdaNorm(12)
    x, labels = torch.randn(6, 5, 12), torch.tensor([3, 9])

    def under(emotion: Tensor, x: Tensor = x) -> Tensor:
        return norm(x, norm.modulation(emotion, x.dtype))

    certain = F.one_hot(labels, 10).float()
    assert torch.equal(under(labels), under(certain))
    per_frame = (each.repeat_interleave(3, dim=0) for each in (labels, certain))
    assert torch.equal(*map(under, per_frame))
    mixed = torch.zeros(1, 10)
    mixed[0, 0], mixed[0, 4] = 0.7, 0.3
    table = norm.class_embedder.embedding_table.weight
    shift, scale = norm.adaLN_modulation[1](F.silu(0.7 * table[0] + 0.3 * table[4])).chunk(2)
    assert torch.allclose(under(mixed), F.layer_norm(x, (12,)) * (1 + scale) + shift, atol=1e-6)
    caster = Caster(10, 12).bfloat16()
    norm.class_embedder.embedding_table = caster
    assert torch.equal(under(labels), under(certain))
    norm.bfloat16()
    assert under(mixed, x.bfloat16()).dtype == torch.bfloat16


# ---- another frame rate


def test_track_fits_another_rate_and_length() -> None:
    track = EmotionTrack.constant("neutral", 30, 30).with_label(0.5, 1, "sad", 0.4)
    assert track.fit(30, 30) is track
    half = track.fit(15, 15)
    assert (half.fps, half.num_frames) == (15, 15)
    assert half.labels.tolist() == [4] * 7 + [6] * 8  # the frame across 0.5 s has its middle there
    double = track.fit(60, 80)
    assert double.labels.tolist() == [4] * 30 + [6] * 50
    assert double.strengths[29:31].tolist() == pytest.approx([1, 0.4]) and torch.equal(
        double.probabilities, track.probabilities
    )
    assert track.fit(30, 4).labels.tolist() == [4] * 4
    for bad in ((0, 4), (math.inf, 4), (30, 0)):
        with pytest.raises(EmotionError):
            track.fit(*bad)


# ---- edits in words


def test_lines_are_read() -> None:
    text = """
    # a comment
    0.0-2.5 happy
    2.5\u20134   ANGRY 0.7   # an en dash
    1:04.5 - end Sad
    .5-1:00 neutral 0
    """
    assert parse_emotion_lines(text) == [
        (0.0, 2.5, "happy", 1.0),
        (2.5, 4.0, "angry", 0.7),
        (64.5, math.inf, "sad", 1.0),
        (0.5, 60.0, "neutral", 0.0),
    ]
    assert parse_emotion_lines("") == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("2.5-4 joyful", "'joyful' is not an emotion"),
        ("2.5 happy", "START-END EMOTION"),
        ("2.5-4", "START-END EMOTION"),
        ("-1-4 sad", "START-END EMOTION"),
        ("1:75-2:00 sad", "START-END EMOTION"),
        ("end-4 sad", "START-END EMOTION"),
        ("0-4 sad 0.5 0.5", "START-END EMOTION"),
        ("4-2.5 sad", "does not end after it starts"),
        ("4-4 sad", "does not end after it starts"),
        ("0-4 sad 1.5", "'1.5' is not a number from 0 to 1"),
        ("0-4 sad nan", "'nan' is not a number from 0 to 1"),
        ("0-4 sad very", "'very' is not a number from 0 to 1"),
    ],
)
def test_bad_lines_are_refused_by_number_and_text(line: str, problem: str) -> None:
    with pytest.raises(EmotionError) as caught:
        parse_emotion_lines(f"0-1 happy\n\n{line}")
    message = str(caught.value)
    assert message.startswith(f'line 3, "{line}": ') and problem in message
    assert ", ".join(EMOTIONS) in message


def test_edits_apply_in_order_and_stay_in_the_track() -> None:
    track = EmotionTrack.constant("neutral", 90)
    edited = track.edited("0-2 happy\n1-2 angry 0.7\n2.5-end sad")
    assert edited.labels.tolist() == [3] * 30 + [0] * 30 + [4] * 15 + [6] * 15
    assert edited.strengths.tolist() == pytest.approx([1] * 30 + [0.7] * 30 + [1] * 30)
    assert set(track.labels.tolist()) == {4}
    assert track.edited("2-3.5 sad").labels.tolist() == [4] * 60 + [6] * 30  # half a window beyond: the end
    for line, problem in (
        ("2-3.6 sad", "ends at 3.6 s, the track at 3.000 s"),
        ("3-end sad", "starts after the track's end at 3.000 s"),
        ("3-3.2 sad", "starts after the track's end"),
        ("1.001-1.002 sad", "holds no frame"),
    ):
        with pytest.raises(EmotionError) as caught:
            track.edited(f"0-1 happy\n{line}")
        assert str(caught.value).startswith(f'line 2, "{line}": ') and problem in str(caught.value)
        assert ", ".join(EMOTIONS) in str(caught.value)


def test_description_reads_as_it_is_edited() -> None:
    track = EmotionTrack.constant("neutral", 96).edited("0-2.5 happy\n2.5-3 angry 0.7")
    assert track.describe() == "0.0-2.5 happy\n2.5-3.0 angry 0.7\n3.0-3.2 neutral"


@settings(deadline=None, max_examples=100)
@given(
    fps=st.sampled_from([8, 23.976, 24, 25, 29.97, 30, 60, 120]),
    spans=st.lists(
        st.tuples(st.integers(1, 5000), st.integers(0, 8), st.floats(0, 1, width=32)), min_size=1, max_size=8
    ),
)
def test_description_and_edits_are_inverse(fps: float, spans: list[tuple[int, int, float]]) -> None:
    labels = torch.cat([torch.full((frames,), label) for frames, label, _ in spans])
    strengths = torch.cat([torch.full((frames,), strength) for frames, _, strength in spans])
    track = EmotionTrack(labels, torch.full((1, 9), 1 / 9), torch.zeros(1), fps, strengths)
    again = EmotionTrack.constant("other", track.num_frames, fps).edited(track.describe())
    assert torch.equal(again.labels, track.labels) and torch.equal(again.strengths, track.strengths)


# ---- emotion2vec on disk


@pytest.fixture
def stored(memo_tiny: Path, tmp_path: Path) -> dict[str, Tensor]:
    """The fixture's weights, with its configuration in place in tmp_path."""
    (tmp_path / "config.yaml").write_bytes((memo_tiny / "emotion2vec" / "config.yaml").read_bytes())
    return torch.load(memo_tiny / "emotion2vec" / "model.pt", weights_only=True)["model"]


@pytest.mark.parametrize("nesting", [(), ("model",), ("state_dict",), ("model_state_dict", "model")])
@pytest.mark.parametrize("prefix", ["", "d2v_model.", "module."])
def test_released_forms_of_model_pt_load(
    stored: dict[str, Tensor], tmp_path: Path, encoder: Emotion2Vec, nesting: tuple[str, ...], prefix: str
) -> None:
    content: dict = {prefix + name: value for name, value in stored.items()}
    content |= {
        prefix + "modality_encoders.AUDIO.decoder.blocks.0.0.weight": torch.zeros(3),
        "proj.weight": torch.zeros(9, 32),
        "proj.bias": torch.zeros(9),
        "_ema": {"blocks.0.norm1.weight": torch.zeros(32)},
    }
    for key in reversed(nesting):
        content = {key: content, "extra": 1}
    torch.save(content, tmp_path / "model.pt")
    again = Emotion2Vec.from_pretrained(tmp_path)
    for name, value in encoder.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_prefix_that_the_configuration_names_is_understood(stored: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({f"odd.{name}": value for name, value in stored.items()}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError):
        Emotion2Vec.from_pretrained(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config | {"scope_map": ["odd.", "none"]}))
    Emotion2Vec.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_listed(stored: dict[str, Tensor], tmp_path: Path) -> None:
    del stored["blocks.0.norm1.weight"]
    stored["blocks.1.norm1.weight"] = torch.zeros(5)
    stored |= {f"strange.{i}": torch.zeros(1) for i in range(20)}
    torch.save({"model": stored}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        Emotion2Vec.from_pretrained(tmp_path)
    message = str(caught.value)
    for part in (
        "missing blocks.0.norm1.weight",
        "blocks.1.norm1.weight has shape (5,), expected (32,)",
        "unexpected strange.0",
        "and 12 more",
    ):
        assert part in message
    fitting = {name: value for name, value in stored.items() if not name.startswith("strange.")}
    torch.save({"model": fitting | {"blocks.0.norm1.weight": "a word"}}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is a str"):
        Emotion2Vec.from_pretrained(tmp_path)


class Trap:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_never_run(stored: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"model": stored, "args": Trap(tmp_path / "sprung")}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="never run"):
        Emotion2Vec.from_pretrained(tmp_path)
    assert not (tmp_path / "sprung").exists()
    for content in (b"", b"nonsense", b"\x80\x02."):
        (tmp_path / "model.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match="model.pt"):
            Emotion2Vec.from_pretrained(tmp_path)
    torch.save([1, 2], tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="list"):
        Emotion2Vec.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "spec",
    ["__import__('os').getcwd()", "[(1, 2)]", "[]", "[(1, 1, 1)] * 101", "[(1, 1, 1)] ** 2", "(", "[(0, 1, 1)]", "5"],
)
def test_layer_specification_is_read_not_run(spec: str) -> None:
    with pytest.raises(CheckpointError, match="feature_encoder_spec"):
        Emotion2Vec.from_config({"modalities": {"audio": {"feature_encoder_spec": spec}}})


@pytest.mark.parametrize(
    "change",
    [
        {"layer_norm_first": True},
        {"modalities": {"audio": {"learned_alibi": True}}},
        {"modalities": {"audio": {"num_alibi_heads": 13}}},
    ],
)
def test_settings_that_are_not_implemented_are_refused(change: dict) -> None:
    with pytest.raises(CheckpointError, match="emotion2vec: "):
        Emotion2Vec.from_config(change)


def test_configurations_without_a_model_are_refused(stored: dict[str, Tensor], tmp_path: Path) -> None:
    for text in ("", "model: x", "model_conf: 3", "a: [", "\x00"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(CheckpointError, match="config.yaml"):
            Emotion2Vec.from_pretrained(tmp_path)


def test_numbers_are_read_as_the_published_configuration_writes_them(tmp_path: Path) -> None:
    """`norm_eps: 1e-05`: for YAML 1.1 that is a text."""
    Emotion2Vec.from_config({"model_conf": SMALL}).save_pretrained(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("model_conf:", "model_conf:\n  norm_eps: 1e-05", 1))
    assert Emotion2Vec.from_pretrained(tmp_path).config["model_conf"]["norm_eps"] == 1e-5


SMALL = {
    "embed_dim": 24,
    "depth": 1,
    "num_heads": 3,
    "modalities": {
        "audio": {
            "prenet_depth": 1,
            "num_alibi_heads": 3,
            "conv_pos_groups": 4,
            "conv_pos_width": 20,
            "feature_encoder_spec": "[(16, 10, 5)] + [(16, 8, 4)] * 2",
        }
    },
}


def test_fresh_encoder_and_head_train_everywhere_and_survive_saving_in_halves(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = Emotion2Vec.from_config(SMALL)
    head = EmotionHead.from_config({"feature_dim": encoder.feature_dim, "hidden_dim": 12, "depth": 3})
    waveform = F.layer_norm(torch.randn(2, RATE), (RATE,))
    F.cross_entropy(head(encoder.train()(waveform).mean(dim=1)), torch.tensor([1, 2])).backward()
    names = [
        name
        for module in (encoder, head)
        for name, p in module.named_parameters()
        if p.grad is None or not p.grad.any()
    ]
    assert not names

    for module, name in ((encoder.eval(), "e"), (head, "h")):
        module.save_pretrained(tmp_path / name, dtype=torch.float16)
    written = torch.load(tmp_path / "e" / "model.pt", weights_only=True)["model"]
    assert {t.dtype for t in written.values()} == {torch.float16}
    assert {t.dtype for t in load_file(tmp_path / "h" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    again, again_head = Emotion2Vec.from_pretrained(tmp_path / "e"), EmotionHead.from_pretrained(tmp_path / "h")
    assert {p.dtype for p in [*again.parameters(), *again_head.parameters()]} == {torch.float32}
    with torch.no_grad():
        wanted, found = encoder(waveform), again(waveform)
        assert 0 < relative_l2(found, wanted) < 3e-3
        assert relative_l2(again_head(wanted.mean(dim=1)), head(wanted.mean(dim=1))) < 3e-3
    half = Emotion2Vec.from_pretrained(tmp_path / "e", dtype=torch.bfloat16)
    with torch.no_grad():
        assert relative_l2(half(waveform.bfloat16()), wanted) < 3e-2


def test_slopes_of_attention_follow_alibi_for_any_number_of_heads() -> None:
    from memo_core.encoders.emotion2vec import _slopes

    assert _slopes(8) == [2**-i for i in range(1, 9)]
    assert _slopes(12)[8:] == [2 ** -(i + 0.5) for i in range(4)]
    assert _slopes(1) == [2**-8]


# ---- the head on disk


def test_head_takes_its_sizes_from_the_tensors(head: EmotionHead, tmp_path: Path) -> None:
    assert (head.feature_dim, head.classes) == (32, 9)
    tensors = head.state_dict()
    del tensors["layers.fc3.bias"]
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError):
        EmotionHead.from_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(CheckpointError, match="not an emotion head"):
        EmotionHead.from_pretrained(tmp_path)
