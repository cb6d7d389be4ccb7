"""Every other node in a real host: what it gives, what it refuses, and that no path leaves the host's folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from memo_core.checkpoint.layout import assets
from memo_core.checkpoint.lora import Adapter, Factors
from memo_core.inputs.portrait import prepare_portrait
from memo_core.nets.weights import WEIGHTS

from .graphs import QUICK, Graph, pictures, refused, run, video, write_speech, write_wav
from .harness import Host, Run


def write_picture(host: Host, name: str, height: int, width: int, seed: int = 0) -> np.ndarray:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(host.base / "input" / name)
    return pixels


def fails(host: Host, graph: Graph) -> Run:
    done = host.wait(host.queue(graph))
    assert done.status == "error"
    return done


def text_of(host: Host, done: Run, node: str) -> str:
    """What PreviewAny shows."""
    return done.outputs[node]["text"][0]


def shown(host: Host, done: Run, node: str) -> Image.Image:
    """The picture on a node."""
    return Image.open(io.BytesIO(host.view(**done.files(node)[0])))


# --- Load MEMO --------------------------------------------------------------------------------------------------------


def test_missing_weights_name_folder_files_and_the_command(host: Host) -> None:
    graph = Graph()
    model = graph.add("MEMO_LoadMEMO", checkpoint="memo", dtype="auto", attention="auto")
    graph.add("PreviewAny", source=[model, 0])
    message = fails(host, graph).error.message
    assert str(host.base / "models" / "memo" / "memo") in message and "__main__.py download" in message
    (host.base / "models" / "memo" / "half" / "vae").mkdir(parents=True)
    graph[model]["inputs"]["checkpoint"] = "half"
    message = fails(host, graph).error.message
    assert "diffusion_net/diffusion_pytorch_model.safetensors" in message and "__main__.py download" in message


def test_checkpoints_of_extra_model_paths_are_offered(fresh_host: Callable[..., Host], tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "mine").mkdir(parents=True)
    config = tmp_path / "extra.yaml"
    config.write_text(f"other:\n    base_path: {tmp_path}\n    memo: elsewhere\n")
    host = fresh_host(args=["--extra-model-paths-config", str(config)])
    offered = json.dumps(host.object_info()["MEMO_LoadMEMO"]["input"]["required"]["checkpoint"])
    assert '"mine"' in offered and '"toon"' in offered and '"memo"' in offered


@pytest.mark.parametrize("dtype, attention", [("bf16", "math"), ("fp32", "flash")])
def test_number_format_and_attention_can_be_chosen(host: Host, dtype: str, attention: str) -> None:
    write_speech(host, "format.wav", 0.5)
    graph = Graph()
    model = [graph.add("MEMO_LoadMEMO", checkpoint="toon", dtype=dtype, attention=attention), 0]
    clip = graph.clip(model, graph.reference(model), graph.voice(model, "format.wav"))
    save = graph.pictures([clip, 0])
    frames = pictures(host, run(host, graph), save)
    assert frames.shape == (15, 64, 64, 3) and frames.std() > 10


def write_adapter(host: Host, name: str, size: float = 0.3) -> None:
    """An adapter of random numbers for the embedded checkpoint, in models/loras."""
    base = assets() / "toon" / "diffusion_net" / WEIGHTS
    torch.manual_seed(0)
    with safe_open(base, "pt") as weights:
        shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys() if key.endswith(".to_out.0.weight")}
    factors = {
        f"diffusion_net.{key.removesuffix('.weight')}": Factors(
            torch.randn(2, into) * size, torch.randn(out, 2) * size, 2.0
        )
        for key, (out, into) in shapes.items()
    }
    (host.base / "models" / "loras").mkdir(exist_ok=True)
    Adapter(modules=factors, base="0" * 16).save(host.base / "models" / "loras" / name)


def test_an_adapter_changes_the_frames_and_strength_0_does_not(host: Host) -> None:
    write_adapter(host, "random.safetensors")
    write_speech(host, "adapter.wav", 0.5)

    def frames(**adapter: object) -> np.ndarray:
        graph = Graph()
        model = graph.model()
        graph[model[0]]["inputs"] |= adapter  # left out: a graph from before there were adapters
        save = graph.pictures([graph.clip(model, graph.reference(model), graph.voice(model, "adapter.wav")), 0])
        return pictures(host, run(host, graph), save)

    plain = frames()
    assert np.array_equal(frames(lora="random.safetensors", lora_strength=0.0), plain)
    some, more = (frames(lora="random.safetensors", lora_strength=strength) for strength in (0.5, 1.0))
    assert np.abs(some.astype(int) - plain).mean() > 1 and not np.array_equal(more, some)
    assert "random.safetensors was trained on checkpoint 0000000000000000, this one is" in host.log()
    write_adapter(host, "random.safetensors", 0.1)
    assert not np.array_equal(frames(lora="random.safetensors"), more), "the file was replaced"


def test_adapters_of_other_networks_are_refused_in_one_line(host: Host) -> None:
    (host.base / "models" / "loras").mkdir(exist_ok=True)
    stranger = {"lora_unet_down_blocks_0.lora_up.weight": torch.zeros(4, 4)}
    save_file(stranger, host.base / "models" / "loras" / "anime.safetensors", {"ss_network_dim": "4"})
    graph = Graph()
    model = graph.model()
    graph[model[0]]["inputs"] |= {"lora": "anime.safetensors"}
    graph.add("PreviewAny", source=model)
    message = fails(host, graph).error.message.strip()
    assert message.startswith("anime.safetensors is not a MEMO adapter") and "\n" not in message
    graph[model[0]]["inputs"] |= {"lora": "../../input/anime.safetensors"}
    assert "is not in models/loras" in refused(host, graph, model[0])


# --- The voice --------------------------------------------------------------------------------------------------------


def test_one_sample_is_a_frame_and_none_is_refused(host: Host) -> None:
    write_wav(host, "tiny.wav", np.zeros(1, np.int16))
    graph = Graph()
    model = graph.model()
    voice = graph.voice(model, "tiny.wav")
    save = graph.pictures([graph.clip(model, graph.reference(model), voice), 0])
    assert len(pictures(host, run(host, graph), save)) == 1
    empty = graph.add("EmptyAudio", duration=0.0, sample_rate=16000, channels=2)
    graph[voice[0]]["inputs"]["audio"] = [empty, 0]
    error = fails(host, graph).error
    assert error.node == voice[0] and "holds no sound" in error.message


def test_sound_that_is_read_when_asked_for_is_sound(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    sound = graph.add("OtherPackLazySound", samples=8000)
    settings = {"fps": 30.0, "context": "local", "separate_vocals": "off", "silence_gate": False}
    voice = graph.add("MEMO_EncodeAudio", model=model, audio=[sound, 0], **settings)
    clip = graph.clip(model, graph.reference(model), [voice, 0])
    save = graph.save([clip, 0], audio=[sound, 0])
    frames, heard, rate, _ = video(host, run(host, graph), save)
    assert len(frames) == 15 and np.abs(heard).max() > 0.3
    graph[sound]["inputs"]["samples"] = 0  # a video without sound
    error = fails(host, graph).error
    assert error.node == voice and error.message.strip() == (
        "the sound cannot be read (failed to extract audio from clip.mp4: no such stream): does the video or file have "
        "one?"
    )


@pytest.mark.parametrize(("samples", "fps", "wanted"), [(8533, 24.0, 13), (8534, 30.0, 17)])
def test_a_recording_and_its_video_last_equally_long(host: Host, samples: int, fps: float, wanted: int) -> None:
    """16 frames at 30 a second are 8533 samples and a third: one more sample is one more frame."""
    write_wav(host, "length.wav", (np.sin(np.arange(samples) / 20) * 2**14).astype(np.int16))
    graph = Graph()
    model = graph.model()
    voice = graph.voice(model, "length.wav", fps=fps)
    first = graph.clip(model, graph.reference(model), voice, duration=8 / fps)
    second = graph.clip(model, graph.reference(model), voice, start=[first, 2], memory=[first, 1])
    parts = []
    for clip in (first, second):
        decoded = graph.add("MEMO_ClipToImages", clip=[clip, 0])
        parts.append([graph.add("MEMO_ImagesToClip", images=[decoded, 0], audio=[decoded, 1], fps=fps), 0])
    save = graph.save(*parts)
    done = run(host, graph)
    frames, sound, rate, found = video(host, done, save)
    assert len(frames) == wanted and found == fps
    assert sound.shape[1] / rate == pytest.approx(wanted / fps, abs=0.03)


def test_vocals_are_separated_from_a_song(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    song = graph.add("MEMO_Example", speech="song")
    settings = {"fps": 30.0, "context": "local", "silence_gate": True}
    voice = graph.add("MEMO_EncodeAudio", model=model, audio=[song, 1], separate_vocals="spectral", **settings)
    clip = graph.clip(model, graph.reference(model), [voice, 0], duration=1.0)
    save = graph.save([clip, 0])
    frames, sound, rate, _ = video(host, run(host, graph), save)
    assert len(frames) == 30 and np.abs(sound).max() > 0.05, "the viewer hears the whole song"


def test_a_long_recording_is_not_encoded_whole(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    silence = graph.add("EmptyAudio", duration=301.0, sample_rate=8000, channels=1)
    settings = {"fps": 30.0, "separate_vocals": "off", "silence_gate": False}
    voice = graph.add("MEMO_EncodeAudio", model=model, audio=[silence, 0], context="whole", **settings)
    graph.add("PreviewAny", source=[voice, 0])
    assert "set context to 'local'" in fails(host, graph).error.message


def test_the_released_separator_says_what_it_needs(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    song = graph.add("MEMO_Example", speech="song")
    settings = {"fps": 30.0, "context": "local", "silence_gate": False}
    voice = graph.add("MEMO_EncodeAudio", model=model, audio=[song, 1], separate_vocals="Kim Vocal 2", **settings)
    graph.add("PreviewAny", source=[voice, 0])
    message = fails(host, graph).error.message
    assert "Kim_Vocal_2.onnx does not exist: set separate_vocals to 'spectral'" in message


# --- The emotion ------------------------------------------------------------------------------------------------------


def emotions(host: Host, lines: str, with_track: bool = False) -> tuple[Graph, str, str]:
    graph = Graph()
    model = graph.model()
    example = graph.add("MEMO_Example", speech="voice")
    heard = graph.add("MEMO_DetectAudioEmotion", model=model, audio=[example, 1], sensitivity=1.0, smoothing=0.0)
    edited = graph.add("MEMO_EditEmotion", emotion=[heard, 0], lines=lines, audio=[example, 1])
    return graph, heard, edited


def test_emotions_are_heard_shown_and_edited(host: Host) -> None:
    graph, heard, edited = emotions(host, "0-1 angry 0.7\n1-2.5 sad  # slowly\n")
    before = graph.add("PreviewAny", source=[heard, 1])
    after = graph.add("PreviewAny", source=[edited, 1])
    done = run(host, graph)
    assert "happy" in text_of(host, done, before)
    lines = text_of(host, done, after).splitlines()
    assert lines[0].endswith("angry 0.7") and lines[1].endswith("sad")
    for node in (heard, edited):
        assert shown(host, done, node).width >= 600


@pytest.mark.parametrize(
    "lines, words", [("0-1 happy\n1-2 joyful", "line 2"), ("2-1 sad", "line 1"), ("0-1 angry 1.5", "line 1")]
)
def test_bad_lines_are_refused_before_queueing(host: Host, lines: str, words: str) -> None:
    graph, _, edited = emotions(host, lines)
    graph.add("PreviewAny", source=[edited, 1])
    message = refused(host, graph, edited)
    assert words in message


def test_lines_past_the_end_are_refused_with_the_length(host: Host) -> None:
    graph, _, edited = emotions(host, "0-20 happy")
    graph.add("PreviewAny", source=[edited, 1])
    error = fails(host, graph).error
    assert error.node == edited and "line 1" in error.message and "5.3" in error.message


# --- The memory -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def state(host: Host) -> str:
    """A saved memory state's name."""
    write_speech(host, "state.wav", 1.1)
    graph = Graph()
    model = graph.model()
    clip = graph.clip(model, graph.reference(model), graph.voice(model, "state.wav"))
    saved = graph.add("MEMO_SaveMemoryState", memory=[clip, 1], filename_prefix="memo/memory")
    name = graph.add("PreviewAny", source=[saved, 0])
    return text_of(host, run(host, graph), name)


def test_states_are_saved_loaded_blended_and_shown(host: Host, state: str) -> None:
    assert state == "memo/memory_00001_.safetensors [output]"
    assert (host.base / "output" / "memo" / "memory_00001_.safetensors").is_file()
    graph = Graph()
    loaded = graph.add("MEMO_MemoryState", file=state, horizon=0, silence=0.0)
    faded = graph.add("MEMO_MemoryState", file=state, horizon=1, silence=1.0)
    blended = graph.add("MEMO_BlendMemoryStates", a=[loaded, 0], b=[faded, 0], weight=0.25)
    nodes = [graph.add("MEMO_InspectMemoryState", memory=[node, 0]) for node in (loaded, faded, blended)]
    texts = [graph.add("PreviewAny", source=[node, 0]) for node in nodes]
    done = run(host, graph)
    first, second, third = (text_of(host, done, node) for node in texts)
    assert "3 seen" in first and "all past" in first
    assert "last 1 window" in second and "1 remembered" in second
    assert first != third != second
    assert all(shown(host, done, node).width >= 600 for node in nodes)


BAD_NAMES = [
    "../../etc/passwd [output]",
    "/etc/passwd [output]",
    "memo/../../secret.safetensors [output]",
    "C:\\secret.safetensors [input]",
    "link/secret.safetensors [output]",
    "CON.safetensors [input]",
    "com¹.safetensors [input]",
    "loop/state.safetensors [output]",
    "\ud800.safetensors [input]",
    f"{'x' * 300}.safetensors [input]",
    "memo/memory_00001_.safetensors [temp]",
    "memo/memory_00001_.safetensors",
    "absent.safetensors [input]",
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_no_state_is_read_outside_of_the_hosts_folders(host: Host, state: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "secret.safetensors").write_bytes(
        (host.base / "output" / "memo" / Path(state.split()[0]).name).read_bytes()
    )
    link, loop = host.base / "output" / "link", host.base / "output" / "loop"
    for path, target in ((link, tmp_path), (loop, loop)):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
    graph = Graph()
    loaded = graph.add("MEMO_MemoryState", file=name, horizon=0, silence=0.0)
    graph.add("MEMO_InspectMemoryState", memory=[loaded, 0])
    assert refused(host, graph, loaded)


@pytest.mark.parametrize(
    "prefix", ["../outside", "/tmp/outside", "memo/../../outside", "NUL", "link/outside", "~/x", "nul .txt"]
)
def test_no_state_is_written_outside_of_the_output_folder(host: Host, state: str, prefix: str, tmp_path: Path) -> None:
    link = host.base / "output" / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path)
    graph = Graph()
    loaded = graph.add("MEMO_MemoryState", file=state, horizon=0, silence=0.0)
    saved = graph.add("MEMO_SaveMemoryState", memory=[loaded, 0], filename_prefix=prefix)
    assert "not a file inside output/" in refused(host, graph, saved)
    assert not list(tmp_path.iterdir()) and not list(host.base.glob("outside*"))


def test_a_file_that_is_no_state_is_refused(host: Host) -> None:
    (host.base / "input" / "fake.safetensors").write_bytes(b"\x80\x04cposix\nsystem\n" * 100)  # a pickle's beginning
    graph = Graph()
    loaded = graph.add("MEMO_MemoryState", file="fake.safetensors [input]", horizon=0, silence=0.0)
    graph.add("MEMO_InspectMemoryState", memory=[loaded, 0])
    assert "not a readable memory state" in fails(host, graph).error.message


def test_a_huge_file_is_not_read(host: Host) -> None:
    with (host.base / "input" / "huge.safetensors").open("wb") as file:
        file.truncate(2**40)  # sparse
    graph = Graph()
    loaded = graph.add("MEMO_MemoryState", file="huge.safetensors [input]", horizon=0, silence=0.0)
    graph.add("MEMO_InspectMemoryState", memory=[loaded, 0])
    message = fails(host, graph).error.message
    assert "not a readable memory state: it has 1099511627776 bytes, at most" in message


# --- The portrait -----------------------------------------------------------------------------------------------------


def test_a_face_is_cut_out_talks_and_is_laid_back(host: Host) -> None:
    """Two speakers of one picture, one after the other; whoever has nothing to say keeps still."""
    write_speech(host, "one.wav", 1.0)
    write_speech(host, "two.wav", 0.5, start=1.0)
    pixels = write_picture(host, "wide.png", 150, 321)
    graph = Graph()
    model = graph.model()
    whole = graph.add("LoadImage", image="wide.png")
    images = [whole, 0]
    for file, x in (("one.wav", 0.2), ("two.wav", 0.8)):
        place = {"face_index": -1, "margin": 0.35, "center_x": x, "center_y": 0.5, "scale": 0.6}
        cut = graph.add("MEMO_CropPortrait", image=[whole, 0], **place)
        reference = graph.reference(model, [cut, 0], crop="none")
        clip = graph.clip(model, reference, graph.voice(model, file))
        images = [graph.add("MEMO_PasteBack", clip=[clip, 0], picture=images, box=[cut, 1], feather=0.1), 0]
    save = graph.add("SaveImage", images=images, filename_prefix="memo/pasted")
    frames = pictures(host, run(host, graph), save)
    assert frames.shape == (30, 150, 321, 3)
    left, right = slice(64 - 45, 64 + 45), slice(257 - 45, 257 + 45)
    outside = np.ones((150, 321), bool)
    for columns in (left, right):
        outside[30:120, columns] = False
    assert np.array_equal(frames[:, outside], np.broadcast_to(pixels[outside], (30, outside.sum(), 3)))
    for columns, talks in ((left, 30), (right, 15)):
        moving = np.abs(np.diff(frames[:, 30:120, columns].astype(int), axis=0)).mean(axis=(1, 2, 3)) > 0
        assert moving[: talks - 1].all() and not moving[talks - 1 :].any()


def test_a_mask_says_where_the_face_is(host: Host) -> None:
    pixels = write_picture(host, "masked.png", 200, 300)
    alpha = np.full((200, 300), 255, np.uint8)
    alpha[100:150, 200:250] = 0  # LoadImage gives MASK = 1 - alpha
    Image.fromarray(np.dstack([pixels, alpha])).save(host.base / "input" / "masked.png")
    graph = Graph()
    picture = graph.add("LoadImage", image="masked.png")
    place = {"face_index": -1, "margin": 0.0, "center_x": 0.5, "center_y": 0.5, "scale": 1.0}
    cut = graph.add("MEMO_CropPortrait", image=[picture, 0], face_mask=[picture, 1], **place)
    save = graph.add("SaveImage", images=[cut, 0], filename_prefix="memo/crop")
    frames = pictures(host, run(host, graph), save)
    assert frames.shape == (1, 50, 50, 3)


def test_a_cut_out_is_laid_over_white_as_by_the_command(host: Host) -> None:
    pixels = write_picture(host, "cutout.png", 150, 120)
    alpha = np.random.default_rng(1).integers(0, 256, (150, 120), np.uint8)
    Image.fromarray(np.dstack([pixels, alpha])).save(host.base / "input" / "cutout.png")
    write_picture(host, "opaque.png", 150, 120)
    graph = Graph()
    model = graph.model()
    place = {"face_index": -1, "margin": 0.35, "center_x": 0.5, "center_y": 0.5, "scale": 1.0}
    saves = []
    for file in ("cutout.png", "opaque.png"):
        loaded = graph.add("LoadImage", image=file)
        reference = graph.reference(model, [loaded, 0], crop="none", size=128, alpha_mask=[loaded, 1])
        cut = graph.add("MEMO_CropPortrait", image=[loaded, 0], alpha_mask=[loaded, 1], **place)
        joined = graph.add("JoinImageWithAlpha", image=[loaded, 0], alpha=[loaded, 1])
        both = graph.reference(model, [joined, 0], crop="none", size=128)
        for shown in ([reference[0], 1], [cut, 0], [both[0], 1]):
            saves.append(graph.add("SaveImage", images=shown, filename_prefix="memo/cutout"))
    done = run(host, graph)
    for file, (ours, crop, joined) in zip(("cutout.png", "opaque.png"), (saves[:3], saves[3:])):
        picture = Image.open(host.base / "input" / file)
        wanted = prepare_portrait(picture, 128, crop="none").pixels.permute(1, 2, 0)
        wanted = ((wanted + 1) * 127.5).round().to(torch.uint8).numpy()
        for save in (ours, joined):
            off = np.abs(pictures(host, done, save)[0].astype(int) - wanted)
            assert off.max() <= 1 and off.mean() < 0.2, "Save Image rounds down"
        white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA")).convert("RGB")
        assert np.array_equal(pictures(host, done, crop)[0], np.asarray(white)[15:135])


def test_a_face_that_cannot_be_found_is_not_invented(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    reference = graph.reference(model, face_index=2)
    graph.add("PreviewAny", source=reference)
    message = fails(host, graph).error.message
    assert "no face models" in message


def test_a_batch_of_portraits_is_refused(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    example = graph.add("MEMO_Example", speech="voice")
    batch = graph.add("RepeatImageBatch", image=[example, 0], amount=3)
    reference = graph.reference(model, [batch, 0])
    graph.add("PreviewAny", source=reference)
    assert "[3, " in fails(host, graph).error.message


# --- Clips ------------------------------------------------------------------------------------------------------------


def talking(host: Host, seconds: float = 1.0) -> tuple[Graph, str]:
    write_speech(host, "clip.wav", 1.0)
    graph = Graph()
    model = graph.model()
    return graph, graph.clip(model, graph.reference(model), graph.voice(model, "clip.wav"), duration=seconds)


def test_clips_go_through_an_upscaler_and_back(host: Host) -> None:
    graph, clip = talking(host)
    decoded = graph.add("MEMO_ClipToImages", clip=[clip, 0])
    larger = graph.add("ImageScaleBy", image=[decoded, 0], upscale_method="bicubic", scale_by=2.5)
    sharper = graph.add("ImageSharpen", image=[larger, 0], sharpen_radius=1, sigma=1.0, alpha=0.5)
    back = graph.add("MEMO_ImagesToClip", images=[sharper, 0], clip=[clip, 0], fps=12.0)
    save = graph.save([back, 0])
    frames, sound, rate, fps = video(host, run(host, graph), save)
    assert frames.shape == (30, 160, 160, 3) and fps == 30
    assert sound.shape[1] / rate == pytest.approx(1.0, abs=0.03) and np.abs(sound).max() > 0.05


def test_the_sound_of_a_clip_is_its_own_part(host: Host) -> None:
    samples = write_speech(host, "clip.wav", 1.0)
    graph = Graph()
    model = graph.model()
    clip = graph.clip(model, graph.reference(model), graph.voice(model, "clip.wav"), start=0.4, duration=0.5)
    decoded = graph.add("MEMO_ClipToImages", clip=[clip, 0])
    saved = graph.add("SaveAudio", audio=[decoded, 1], filename_prefix="memo/part")
    done = run(host, graph)
    import av

    with av.open(io.BytesIO(host.view(**done.files(saved)[0]))) as file:
        part = np.concatenate([frame.to_ndarray() for frame in file.decode(audio=0)], axis=1)[0]
    expected = samples[6400:14400]
    assert len(part) == 8000
    assert np.abs(part / np.abs(part).max() - expected / np.abs(expected).max()).max() < 1e-2


def test_clips_and_images_are_joined_in_their_order(host: Host) -> None:
    graph, clip = talking(host)
    write_picture(host, "still.png", 64, 64)
    still = graph.add("LoadImage", image="still.png")
    stills = graph.add("RepeatImageBatch", image=[still, 0], amount=10)
    listed = graph.add("RebatchImages", images=[stills, 0], batch_size=4)  # gives a list: 4, 4, 2
    video_node = graph.add(
        "MEMO_ConcatClips",
        **{"clip_1": [stills, 0], "clip_5": [clip, 0], "clips": [listed, 0]},
        **{"fps": 0.0, "cross_fade": 5, "sizes": "refuse"},
    )
    save = graph.add("SaveVideo", video=[video_node, 0], filename_prefix="memo/x", format="auto", codec="auto")
    parts = graph.add("GetVideoComponents", video=[video_node, 0])
    count = graph.add("PreviewAny", source=[parts, 2])
    done = run(host, graph)
    frames, sound, rate, fps = video(host, done, save)
    assert len(frames) == 50 and fps == 30 and text_of(host, done, count) == "30.0"
    assert sound.shape[1] / rate == pytest.approx(50 / 30, abs=0.03)
    quiet, loud = np.abs(sound[:, : rate // 4]).max(), np.abs(sound[:, rate // 3 : rate]).max()
    assert quiet < 0.01 < 0.05 < loud, "images are silent, the clip speaks"

    def distance(number: int, other: int) -> float:
        return np.abs(frames[number].astype(int) - frames[other]).mean()

    assert distance(10, 9) < distance(14, 9), "the first picture after a joint is still almost the last before"


def test_a_sound_for_the_whole_video_goes_before_the_clips_own(host: Host) -> None:
    graph, clip = talking(host)
    silence = graph.add("EmptyAudio", duration=0.2, sample_rate=44100, channels=2)
    save = graph.save([clip, 0], audio=[silence, 0])
    frames, sound, rate, _ = video(host, run(host, graph), save)
    assert len(frames) == 30 and rate == 44100 and np.abs(sound).max() < 0.01
    assert sound.shape[1] / rate == pytest.approx(1.0, abs=0.03)


def test_sizes_that_differ_are_refused_by_name_or_scaled(host: Host) -> None:
    graph, clip = talking(host)
    write_picture(host, "large.png", 100, 120)
    large = graph.add("LoadImage", image="large.png")
    save = graph.save([clip, 0], [large, 0])
    message = fails(host, graph).error.message
    assert "clip_2 is 120x100 and clip_1 64x64" in message and "scale to first" in message
    joined = graph[save]["inputs"]["video"][0]
    graph[joined]["inputs"]["sizes"] = "scale to first"
    frames, *_ = video(host, run(host, graph), save)
    assert frames.shape == (31, 64, 64, 3)
    # In its own proportions: 120 x 100 becomes 64 x 53, between black bars.
    assert frames[30, :4].max() < 30 and frames[30, -4:].max() < 30 and frames[30, 8:56].mean() > 80


def test_another_speed_changes_neither_duration_nor_sound(host: Host) -> None:
    graph, clip = talking(host)
    save, slow = graph.save([clip, 0]), graph.save([clip, 0], [clip, 0], fps=20.0)
    done = run(host, graph)
    frames, sound, rate, _ = video(host, done, save)
    again, double, _, fps = video(host, done, slow)
    assert len(frames) == 30 and len(again) == 40 and fps == 20
    assert double.shape[1] / rate == pytest.approx(2.0, abs=0.05)
    loudness = [np.abs(part[:, : rate * 9 // 10]).mean() for part in (sound, double, double[:, rate:])]
    assert loudness == pytest.approx([loudness[0]] * 3, rel=0.1), "each clip says what it says, once"


def test_interpolated_images_last_as_long_as_the_clip(host: Host) -> None:
    graph, clip = talking(host)
    decoded = graph.add("MEMO_ClipToImages", clip=[clip, 0])
    denser = graph.add("RepeatImageBatch", image=[decoded, 0], amount=2)  # as many as an interpolation gives
    back = graph.add("MEMO_ImagesToClip", images=[denser, 0], clip=[clip, 0], fps=30.0)
    save = graph.save([back, 0])
    frames, sound, rate, fps = video(host, run(host, graph), save)
    assert len(frames) == 60 and fps == 60 and sound.shape[1] / rate == pytest.approx(1.0, abs=0.03)


def test_odd_sizes_become_even(host: Host) -> None:
    write_picture(host, "odd.png", 101, 75)
    graph = Graph()
    picture = graph.add("LoadImage", image="odd.png")
    save = graph.save([picture, 0])
    assert video(host, run(host, graph), save)[0].shape == (1, 102, 76, 3)


def test_nothing_to_join_is_said(host: Host) -> None:
    graph = Graph()
    graph.save()
    assert "connect at least one clip" in fails(host, graph).error.message


def test_a_clip_is_inspected(host: Host) -> None:
    graph = Graph()
    model = graph.model()
    reference = graph.reference(model)
    write_speech(host, "clip.wav", 1.0)
    clip = graph.clip(model, reference, graph.voice(model, "clip.wav"))
    looked = graph.add("MEMO_InspectClip", clip=[clip, 0], reference=reference)
    shown_nodes = [graph.add("PreviewAny", source=[looked, output]) for output in (0, 2, 3, 4, 5)]
    done = run(host, graph)
    text, *numbers = (text_of(host, done, node) for node in shown_nodes)
    likeness, colour, sharpness, motion = map(float, numbers)
    assert "colour" in text.lower() and 0.2 < likeness <= 1 and 0 < colour < 35 and sharpness > 0.03 and motion > 0
    assert shown(host, done, looked).width >= 600


# --- Files ------------------------------------------------------------------------------------------------------------


def test_videos_say_that_they_were_made_by_ai(host: Host) -> None:
    import av

    graph, clip = talking(host)
    save = graph.save([clip, 0])
    done = run(host, graph)
    with av.open(io.BytesIO(host.view(**done.files(save)[0]))) as file:
        about = dict(file.metadata)
    assert "made by AI" in about["description"] and f"seed {QUICK['seed']}" in about["description"]
    assert {node: about["class_type"] for node, about in json.loads(about["prompt"]).items()} == {
        node: about["class_type"] for node, about in graph.items()
    }, "and from what"
