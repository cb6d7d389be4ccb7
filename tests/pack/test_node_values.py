"""What comes into the nodes by wire and by widget, in every form that other packs give it; without a host."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from common import thinned
from PIL import Image
from stand_in import PACK, InterruptProcessingException, forget, nodes_alone

from memo_core.inputs.portrait import prepare_portrait
from memo_core.inputs.speech import count_frames


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def pack(folder: Path) -> Iterator[SimpleNamespace]:
    yield nodes_alone(folder)
    forget()


# --- Sound ------------------------------------------------------------------------------------------------------------


class Lazy(Mapping):
    """Sound that is read when it is asked for, as other packs give it."""

    def __init__(self, content: dict[str, Any] | Exception) -> None:
        self.content = content

    def __getitem__(self, key: str) -> Any:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("waveform", "sample_rate"))

    def __len__(self) -> int:
        return 2


STEREO = torch.tensor([[0.5, -0.25, 0.125, 0.0], [-1.0, 0.75, 0.0, 0.25]])


def inference(tensor: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize(
    "waveform",
    [
        STEREO[None],
        STEREO,
        STEREO[0],
        STEREO[None].double(),
        STEREO[None].half(),
        STEREO[None].bfloat16(),
        (STEREO[None] * 2**15).clamp(max=2**15 - 1).short(),
        STEREO.T.contiguous().T[None],
        STEREO[None].clone().requires_grad_(),
        inference(STEREO[None]),
        STEREO[None].numpy(),
        STEREO.double().numpy(),
        np.frombuffer(STEREO[0].numpy().tobytes(), np.float32),  # nobody may write to it
        STEREO[None].numpy()[..., ::-1][..., ::-1],
        [0.5, -0.25, 0.125, 0.0],
    ],
    ids="batch channels mono float64 float16 bfloat16 int16 strided grad inference numpy numpy64 frozen reversed "
    "list".split(),
)
@pytest.mark.parametrize("kind", [dict, Lazy], ids=["dict", "lazy"])
def test_sound_comes_in_every_form(pack: SimpleNamespace, waveform: Any, kind: type) -> None:
    sound = pack.media.sound_of(kind({"waveform": waveform, "sample_rate": 44100}))
    wanted = STEREO if np.ndim(waveform) > 1 else STEREO[:1]
    assert sound.waveform.dtype == torch.float32 and torch.equal(sound.waveform, wanted)
    assert sound.sample_rate == 44100 and type(sound.sample_rate) is int


def test_float_sound_is_not_copied(pack: SimpleNamespace) -> None:
    waveform = STEREO[None].clone()
    sound = pack.media.sound_of({"waveform": waveform, "sample_rate": 16000})
    assert sound.waveform.data_ptr() == waveform.data_ptr()


@pytest.mark.parametrize("rate", [16000, 16000.0, np.int64(16000), np.float32(16000), torch.tensor(16000), "16000"])
def test_a_rate_may_be_any_kind_of_number(pack: SimpleNamespace, rate: Any) -> None:
    assert pack.media.sound_of({"waveform": STEREO[None], "sample_rate": rate}).sample_rate == 16000


@pytest.mark.parametrize("rate", [0, -1, 0.2, float("nan"), float("inf"), None, "fast", torch.tensor([1, 2]), 10**400])
def test_a_rate_that_is_none_is_refused(pack: SimpleNamespace, rate: Any) -> None:
    with pytest.raises(pack.errors.AudioError, match="the sample rate is .*; it must be a positive number of Hz"):
        pack.media.sound_of({"waveform": STEREO[None], "sample_rate": rate})


@pytest.mark.parametrize(
    ("audio", "words"),
    [
        (None, "received NoneType: is there a sound"),
        (STEREO, "received Tensor"),
        ({"waveform": STEREO[None]}, "received one without 'sample_rate'"),
        (Lazy(RuntimeError("no audio stream\nin clip.mp4")), r"cannot be read \(no audio stream in clip.mp4\)"),
        (Lazy(ZeroDivisionError()), r"cannot be read \(ZeroDivisionError\)"),
    ],
)
def test_sound_that_cannot_be_used_is_refused_in_one_sentence(pack: SimpleNamespace, audio: Any, words: str) -> None:
    with pytest.raises(pack.errors.AudioError, match=words) as caught:
        pack.media.sound_of(audio)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("waveform", "words"),
    [
        (STEREO[None].repeat(3, 1, 1), r"one recording.*received \[3, 2, 4\]"),
        (STEREO[None, None], r"one recording.*received \[1, 1, 2, 4\]"),
        (torch.tensor(0.5), r"one recording.*received \[\]"),
        (torch.zeros(1, 2, 0), "holds no sound"),
        (np.zeros((0,)), "holds no sound"),
        (STEREO[None] * float("nan"), "4 of 4 samples are NaN or infinite, the first is number 1"),
        (torch.tensor([[0, 0, 0], [0, torch.inf, 0]]), "1 of 3 samples.* number 2"),
        (torch.tensor([[1e300, 0]], dtype=torch.float64), "1 of 2 samples"),
        ("voice.wav", "a str and no tensor"),
        (torch.zeros(2, 5, dtype=torch.bool), "samples are torch.bool"),
        (torch.zeros(1, 300, 2), "300 channels"),
    ],
)
def test_a_waveform_that_cannot_be_used_is_refused(pack: SimpleNamespace, waveform: Any, words: str) -> None:
    with pytest.raises(pack.errors.AudioError, match=words):
        pack.media.sound_of({"waveform": waveform, "sample_rate": 16000})


def test_stop_stops_also_while_a_sound_is_read(pack: SimpleNamespace) -> None:
    with pytest.raises(InterruptProcessingException):
        pack.media.sound_of(Lazy(InterruptProcessingException()))


def test_lazy_sound_reaches_all_audio_inputs(pack: SimpleNamespace) -> None:
    """Six inputs, one door: each asks for what the mapping does not have."""
    broken, images = Lazy(RuntimeError("no sound in it")), torch.zeros(1, 16, 16, 3)
    model = SimpleNamespace(encode_reference=lambda *args, **more: None, default_size=(16, 16))
    emotion = SimpleNamespace(edited=lambda lines: None)
    sampling = {"steps": 1, "guidance": 1.0, "seed": 0}
    calls = [
        lambda: pack.voice.EncodeAudio.execute(model, broken, 30, "local", "off", False),
        lambda: pack.sample.TalkingVideo.execute(model, images, broken, "none", **sampling),
        lambda: pack.emotion.DetectAudioEmotion.execute(model, broken, 1.0, 0.0),
        lambda: pack.emotion.EditEmotion.execute(emotion, "", broken),
        lambda: pack.clips.ImagesToClip.execute(images, 30, audio=broken),
        lambda: pack.clips.ConcatClips.execute([0.0], [0], ["refuse"], audio=[broken], clip_1=[images]),
    ]
    for call in calls:
        with pytest.raises(pack.errors.AudioError, match=r"cannot be read \(no sound in it\)"):
            call()


# --- Transparency -----------------------------------------------------------------------------------------------------


def cut_out(height: int = 70, width: int = 90) -> Image.Image:
    """Colours under every degree of transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), np.uint8)
    pixels[: height // 3, :, 3] = 255
    pixels[-height // 3 :, :, 3] = 0
    return Image.fromarray(pixels)


def loaded(picture: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """IMAGE and MASK of the host's Load Image."""
    image = torch.from_numpy(np.array(picture.convert("RGB")).astype(np.float32) / 255)[None]
    if "A" not in picture.getbands():
        return image, torch.zeros(1, 64, 64)
    mask = 1.0 - torch.from_numpy(np.array(picture.getchannel("A")).astype(np.float32) / 255)
    return image, mask[None]


def four_channels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture).astype(np.float32) / 255)[None]


@pytest.mark.parametrize("size", [64, (64, 128)])
@pytest.mark.parametrize("given", ["mask", "mask without batch", "fourth channel", "both", "half"])
def test_a_cut_out_is_the_portrait_that_the_command_sees(pack: SimpleNamespace, given: str, size: Any) -> None:
    picture = cut_out()
    image, mask = loaded(picture)
    if given == "mask without batch":
        mask = mask[0]
    if given in ("fourth channel", "both", "half"):
        image = four_channels(picture)
    if given == "half":
        image = image.half()
    if given in ("fourth channel", "half"):
        mask = None
    ours = prepare_portrait(pack.media.one_picture(image, mask), size).pixels
    assert torch.equal(ours, prepare_portrait(picture, size).pixels)
    without = prepare_portrait(pack.media.one_picture(loaded(picture)[0]), size).pixels
    assert not torch.equal(ours, without)


@pytest.mark.parametrize("side", [64, 30])
def test_a_mask_of_zeros_is_none_whatever_its_size(pack: SimpleNamespace, side: int) -> None:
    image = torch.rand(1, 40, 50, 3)
    picture = pack.media.one_picture(image, torch.zeros(1, side, side))
    assert torch.equal(picture, pack.media.one_picture(image))


def test_opaque_pixels_keep_their_values_to_the_last_bit(pack: SimpleNamespace) -> None:
    image, mask = torch.rand(1, 8, 8, 3), torch.zeros(1, 8, 8)
    mask[0, 0, 0] = 1
    white = pack.media.opaque(image, mask)
    assert white[0, 0, 0].tolist() == [1, 1, 1]
    assert torch.equal(white.flatten(1, 2)[:, 1:], image.flatten(1, 2)[:, 1:])
    opaque = torch.cat([image, torch.ones(1, 8, 8, 1)], 3)
    assert pack.media.opaque(opaque).data_ptr() == opaque.data_ptr(), "no copy"


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 5, 8), "alpha_mask is 8x5 pixels and image 8x6"),
        (torch.ones(2, 6, 8), "2 masks and image 1 pictures"),
        (torch.full((1, 6, 8), torch.nan), "alpha_mask is .*NaN"),
        (torch.ones(8), r"alpha_mask is \[8\]"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(pack: SimpleNamespace, mask: torch.Tensor, words: str) -> None:
    with pytest.raises(pack.portrait.PortraitError, match=words):
        pack.media.one_picture(torch.rand(1, 6, 8, 3), mask)


def test_a_cut_out_is_cropped_over_white(pack: SimpleNamespace) -> None:
    image, mask = loaded(cut_out(60, 60))
    white = np.asarray(Image.alpha_composite(Image.new("RGBA", (60, 60), "white"), cut_out(60, 60)).convert("RGB"))
    place = (-1, 0.35, 0.5, 0.5, 1.0)
    for given in ({"image": image, "alpha_mask": mask}, {"image": four_channels(cut_out(60, 60))}):
        picture = given.pop("image")
        crop = pack.portrait.CropPortrait.execute(picture, *place, **given).args[0]
        assert np.array_equal((crop[0] * 255).round().numpy(), white)


def test_faces_are_cut_as_the_checkpoint_was_trained_unless_asked_otherwise(pack: SimpleNamespace) -> None:
    margins, cut_out_already = [], SimpleNamespace(pixels=torch.zeros(3, 8, 8))
    model = SimpleNamespace(
        encode_reference=lambda *_, margin, **more: margins.append(margin) or cut_out_already,
        default_size=(16, 16),
        face_analyzer=None,
        crop_margin=0.1,
    )
    for margin in (pack.portrait.AS_TRAINED, 0.35):
        pack.portrait.EncodeReference.execute(model, torch.zeros(1, 8, 8, 3), 0, "face", margin, -1)
    assert margins == [None, 0.35]
    image, face = torch.zeros(1, 100, 100, 3), torch.zeros(1, 100, 100)
    face[:, 40:60, 40:60] = 1
    cut = pack.portrait.CropPortrait.execute
    sides = [
        len(cut(image, -1, margin, 0.5, 0.5, 1.0, model=one, face_mask=face).args[0][0])
        for one, margin in ((model, -1.0), (None, -1.0), (model, 0.5))
    ]
    assert sides == [24, 34, 40]


def test_transparent_frames_are_joined_over_white(pack: SimpleNamespace) -> None:
    frames = torch.zeros(20, 16, 16, 4)
    frames[:, :8, :, 3] = 1
    clip = pack.clips.ImagesToClip.execute(frames, 30).args[0]
    for decoded in (np.stack(list(clip.frames())), (clip.to_tensor() * 255).numpy()):
        assert decoded.shape == (20, 16, 16, 3) and decoded[:, :8].max() == 0 and decoded[:, 8:].min() == 255


def test_paste_back_shows_the_picture_where_the_face_is_transparent(pack: SimpleNamespace) -> None:
    picture = torch.full((1, 32, 32, 4), 0.25)
    picture[..., 3] = 1
    picture[:, 20:, :, 3] = 0  # becomes white
    box = pack.portrait.Box(8, 8, 24, 24, 32, 32)
    face = torch.ones(3, 16, 16, 4)
    face[:, :, :8] = torch.tensor([1, 0, 1, 0])
    for clip in (face, pack.clips.ImagesToClip.execute(face, 30).args[0]):
        images = pack.portrait.PasteBack.execute(clip, picture, box, 0.0).args[0]
        assert images.shape == (3, 32, 32, 3)
        assert torch.all(images[:, 8:20, 8:16] == 0.25), "the picture"
        assert torch.all(images[:, 8:24, 16:24] == 1), "the face"
        assert torch.all(images[:, 20:] == 1), "white under the picture"


# --- Frames that hold no numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_frames_with_nan_are_refused_by_name_and_number(
    pack: SimpleNamespace, value: float, dtype: torch.dtype
) -> None:
    good = torch.rand(40, 16, 16, 3).to(dtype)
    bad = good.clone()
    bad[36, 3, 2, 1] = value
    box, still = pack.portrait.Box(0, 0, 8, 8, 16, 16), good[:1]
    calls = {
        "images": lambda: pack.clips.ImagesToClip.execute(bad, 30),
        "clip_2": lambda: pack.clips.ConcatClips.execute([0.0], [0], ["refuse"], clip_1=[good], clip_2=[bad]),
        "clips[2]": lambda: pack.clips.ConcatClips.execute([0.0], [0], ["refuse"], clips=[good, bad]),
        "clip": lambda: pack.portrait.PasteBack.execute(bad, still, box, 0.1),
        "picture": lambda: pack.portrait.PasteBack.execute(still, bad, box, 0.1),
        "image": lambda: pack.portrait.CropPortrait.execute(bad, -1, 0.35, 0.5, 0.5, 1.0),
    }
    for name, call in calls.items():
        with pytest.raises(
            pack.errors.MemoError, match=rf"^{re.escape(name)}: frame 36 of 40 \(counted from 0\) holds NaN"
        ):
            call()
    with pytest.raises(pack.errors.PortraitError, match="^image: frame 0 of 1 .*holds NaN"):
        pack.media.one_picture(bad[36:37])


# --- Names of files ---------------------------------------------------------------------------------------------------

DEVICES = ["com¹", "com²", "lpt³", "conin$", "CONOUT$", "nul .txt", "aux.", "COM1", "memo/nul", "prn.tar.gz", "con\n.x"]
IMPOSSIBLE = ["loop/x", "loop", "\ud800", "a\udcffb", "a\0b", "x" * 300, "a/" * 3000 + "b", "", "/", 7, None, ["x"], {}]
OUTSIDE = ["../x", "/x", "a/../../x", "C:\\x", "out/x", "~x", "\\\\server\\x"]


@pytest.fixture(scope="module")
def links(pack: SimpleNamespace, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for root in ("input", "output"):
        (folder / root / "loop").symlink_to(folder / root / "pool")
        (folder / root / "pool").symlink_to(folder / root / "loop")
        (folder / root / "out").symlink_to(tmp_path_factory.mktemp("outside"))
        (folder / root / "file").write_text("no folder")


@pytest.mark.parametrize("name", DEVICES + IMPOSSIBLE + OUTSIDE, ids=lambda name: ascii(name)[:20])
def test_a_name_that_is_no_file_here_is_refused_and_nothing_else_is_raised(
    pack: SimpleNamespace, links: None, folder: Path, name: Any
) -> None:
    with pytest.raises(pack.errors.MemoError, match="is not a file inside output/") as caught:
        pack.folders.inside(folder / "output", name)
    assert len(str(caught.value)) < 500
    for file in (name, f"{name}.safetensors [output]", f"{name} [input]"):
        assert pack.memory.LoadMemoryState.validate_inputs(file) is not True
        assert pack.memory.LoadMemoryState.fingerprint_inputs(file) == file
    load = pack.load.LoadMEMO
    for refusal in (load.validate_inputs(checkpoint=name), load.validate_inputs(lora=name)):
        assert isinstance(refusal, str) and len(refusal) < 500
    assert load.fingerprint_inputs(lora=name) == name
    if isinstance(name, str):
        assert pack.memory.SaveMemoryState.validate_inputs(name) is not True
        with pytest.raises(pack.errors.MemoError):
            pack.memory.SaveMemoryState.execute(None, name)


@pytest.mark.parametrize(
    "name", ["memo/state", "console", "com10", "comet.x", "é ü.x", "a b/c", "auxiliary", "nulls.txt"]
)
def test_a_plain_name_is_taken(pack: SimpleNamespace, folder: Path, name: str) -> None:
    assert pack.folders.inside(folder / "output", name) == folder / "output" / name
    assert pack.memory.SaveMemoryState.validate_inputs(name) is True


def test_a_prefix_has_to_leave_room_for_the_rest_of_the_name(pack: SimpleNamespace, links: None) -> None:
    check = pack.memory.SaveMemoryState.validate_inputs
    assert check("x" * 200) is True and "is not a file inside" in str(check("x" * 250))
    with pytest.raises(pack.errors.MemoError, match="cannot write 'file/x' into output/"):
        pack.memory.SaveMemoryState.execute(None, "file/x")


def test_states_that_nobody_could_name_are_not_offered(pack: SimpleNamespace, folder: Path) -> None:
    (folder / "input" / "good.safetensors").touch()
    try:
        (Path(os.fsdecode(os.fsencode(folder / "input") + b"/\xff.safetensors"))).touch()
    except OSError:
        pytest.skip("this system has no such names")
    assert pack.memory.saved_states() == ["good.safetensors [input]"]


# --- The book of speeds -----------------------------------------------------------------------------------------------


def test_the_book_of_speeds_is_written_whole(pack: SimpleNamespace, folder: Path) -> None:
    path = folder / "user" / "memo" / "speed.json"
    for _ in range(3):
        pack.progress.SpeedBook().put("one", 0.25)
    assert pack.progress.SpeedBook().get("one") == 0.25
    assert [entry.name for entry in path.parent.iterdir()] == ["speed.json"]
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask, "as any new file"
    for text in ('{"one": Infinity, "two": NaN, "three": "x"}', "[" * 100_000, "\xff", "[1]"):
        path.write_text(text, encoding="latin-1")
        assert [pack.progress.SpeedBook().get(key) for key in ("one", "two", "three", "four")] == [None] * 4


# --- Lengths ----------------------------------------------------------------------------------------------------------

WINDOW_SAMPLES = 16 * 16000 // 30  # of 16 frames at 30 a second: 8533 and a third


def joined(
    pack: SimpleNamespace, samples: int, fps: float, off: int = 0, pieces: int = 1
) -> tuple[int, float, int, int]:
    """A recording of so many samples through the nodes, with a clip that needs no networks: frames and seconds of
    sound of the video, frames and samples of the clip."""
    wave = torch.sin(torch.arange(samples) / 20)[None, None] / 2
    sound = pack.media.sound_of({"waveform": wave, "sample_rate": 16000})
    frames = count_frames(samples, 16000, fps)  # what MEMO Encode Audio gives
    clips = []
    for number in range(pieces):
        first, last = (round(part * frames / pieces) for part in (number, number + 1))
        latents = torch.zeros(4, last - first, 2, 2)
        clip = pack.clips.Clip(latents, first, fps, lambda z: torch.zeros(z.shape[1], 3, 16, 16), sound=sound)
        images, audio, rate = pack.clips.ClipToImages.execute(clip).args
        assert rate == fps and len(images) == last - first
        heard = audio["waveform"]
        if off:  # a node between them that is not exact
            heard = heard[..., :off] if off < 0 else torch.nn.functional.pad(heard, (0, off))
        given = {"audio": {"waveform": heard, "sample_rate": audio["sample_rate"]}} if off else {"clip": clip}
        clips.append(pack.clips.ImagesToClip.execute(images, fps, **given).args[0])
    path = pack.clips.ConcatClips.execute([0.0], [0], ["refuse"], clips=clips).args[0]
    with av.open(io.BytesIO(path.read_bytes())) as file:
        shown = sum(1 for _ in file.decode(video=0))
    with av.open(io.BytesIO(path.read_bytes())) as file:
        stream = file.streams.audio[0]
        seconds = float(stream.duration * stream.time_base)
    return shown, seconds, frames, heard.shape[-1]


@pytest.mark.parametrize("fps", [24, 25, 29.97, 30])
@pytest.mark.parametrize(
    "samples",
    [*thinned([319_999, 320_001], fast=()), 160, WINDOW_SAMPLES, WINDOW_SAMPLES + 1, WINDOW_SAMPLES + 2],
)
def test_a_video_has_the_frames_of_its_sound_and_a_sound_as_long(
    pack: SimpleNamespace, samples: int, fps: float
) -> None:
    shown, seconds, frames, heard = joined(pack, samples, fps)
    assert shown == frames == max(1, int(np.ceil((samples - 0.5) / 16000 * fps - 1e-9)))
    assert heard == round(frames / fps * 16000) and count_frames(heard, 16000, fps) == frames
    assert seconds == pytest.approx(frames / fps, abs=1024 / 48000)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_times_that_come_by_wire_are_checked_too(pack: SimpleNamespace, value: float) -> None:
    voice = SimpleNamespace(track=SimpleNamespace(fps=30.0, num_frames=60, num_padded_frames=64))
    settings = {"steps": 1, "guidance": 1.0, "seed": 0, "speed": "exact"}
    for name in ("start", "duration"):
        with pytest.raises(pack.run.SamplingError, match=f"{name} is {value}; it must be a number of seconds"):
            pack.run.sample(None, None, voice, None, None, **{name: value}, **settings)
    with pytest.raises(pack.run.SamplingError, match=f"fps is {value}"):
        pack.clips.ConcatClips.execute([value], [0], ["refuse"], clip_1=[torch.zeros(1, 16, 16, 3)])


def test_what_those_lengths_are() -> None:
    """Half a sample makes no frame, a whole one does."""
    assert [count_frames(n, 16000, 30) for n in (160, WINDOW_SAMPLES, WINDOW_SAMPLES + 1, WINDOW_SAMPLES + 2)] == [
        *(1, 16, 17, 17)
    ]
    assert [count_frames(n, 16000, fps) for n in (319_999, 320_001) for fps in (24, 25, 30)] == [
        *(480, 500, 600),
        *(481, 501, 601),
    ]


@pytest.mark.parametrize("off", [-1, 1])
@pytest.mark.parametrize("fps", [25, 29.97])
def test_a_sample_too_many_or_too_few_on_the_way_changes_nothing(pack: SimpleNamespace, off: int, fps: float) -> None:
    shown, seconds, frames, _ = joined(pack, 32_001, fps, off, pieces=3)
    assert shown == frames and seconds == pytest.approx(frames / fps, abs=1024 / 48000)


def test_many_short_clips_keep_their_sound_in_time(pack: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounded clip by clip, 300 clips of a frame would drift by 100 samples."""
    written = []
    writer = f"{PACK}.memo_core.video.write.VideoWriter.write_audio"
    monkeypatch.setattr(writer, lambda self, waveform: written.append(waveform.shape[-1]))
    sound = pack.clips.Sound(torch.zeros(1, 16000 * 10), 16000)
    clips = [pack.clips.ImageClip(torch.zeros(1, 16, 16, 3), 0, 30, sound)] * 300
    pack.clips.write_video(clips)
    assert sum(written) == 160_000 and {*written} == {533, 534}
