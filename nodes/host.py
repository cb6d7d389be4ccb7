"""All that the nodes ask of the ComfyUI host: folders, models in memory, progress, pictures on a node."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.v0_0_2 import InputImpl, ui
from server import PromptServer
from torch import Tensor, nn

from ..memo_core import devices
from ..memo_core.budget.counting import vae_bytes
from ..memo_core.budget.plan import choose_plan, least_plan, smaller
from ..memo_core.checkpoint.layout import EMBEDDED, assets
from ..memo_core.checkpoint.load import load as load_checkpoint
from ..memo_core.checkpoint.networks import Networks
from ..memo_core.checks import shown
from ..memo_core.errors import AudioError, CheckpointError, MemoError, PortraitError, SamplingError
from ..memo_core.files import open_regular, replace_whole
from ..memo_core.nets.layers import attention_fused
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.running.options import Options
from ..memo_core.sampling.job import Job
from ..memo_core.sampling.plan import Plan
from ..memo_core.sampling.store import WindowStore
from ..memo_core.video.clips import Sound, check_finite, over_white

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("MEMO")

MODELS = "memo"  # the folder under models/, and its name in extra_model_paths.yaml
LORAS = "loras"  # the host's own folder
RELEASED = "memo"  # the checkpoint offered there whether it has been downloaded or not
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEPT_SUMS = 2**28  # bytes of memory sums that may stay between clips
LISTENING_BYTES = 2**28  # working memory of the networks that listen, besides what grows with the sound heard at once
ATTENTION = {"flash": "FLASH_ATTENTION", "memory efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
# What Windows takes for devices, in any folder and whatever suffix follows.
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$)\s*(\..*)?", re.I | re.S)


# --- Folders ----------------------------------------------------------------------------------------------------------


def register_models_folder() -> None:
    """models/memo, besides what extra_model_paths.yaml names for `memo`."""
    folders, extensions = folder_paths.folder_names_and_paths.get(MODELS, ([], set()))
    default = os.path.join(folder_paths.models_dir, MODELS)
    if default not in folders:
        folders = [*folders, default]
    folder_paths.folder_names_and_paths[MODELS] = (folders, extensions)


def checkpoints() -> dict[str, Path]:
    """Checkpoints by name: the embedded ones, the released one, and every other folder in models/memo."""
    roots = [Path(root) for root in folder_paths.get_folder_paths(MODELS)]
    found = {name: assets() / name for name in EMBEDDED}
    for root in roots:
        try:
            folders = sorted(folder for folder in root.iterdir() if folder.is_dir())
        except OSError:  # absent, or nobody may look into it
            continue
        for folder in folders:
            if not folder.name.startswith("."):
                found.setdefault(folder.name, folder)
    return found | {RELEASED: found.get(RELEASED, roots[0] / RELEASED)}


def loras() -> list[str]:
    """Names of the .safetensors files in the host's models/loras, of MEMO or not."""
    try:
        names = folder_paths.get_filename_list(LORAS)
    except KeyError:  # a host without that folder
        return []
    return [name for name in names if name.endswith(".safetensors")]


def lora_file(name: str) -> Path:
    """The file of one of `loras`; CheckpointError where it is gone."""
    path = folder_paths.get_full_path(LORAS, name) if name in loras() else None
    if path is None:
        raise CheckpointError(f"the adapter {shown(name)} is not in models/loras; press R and choose another, or none")
    return Path(path)


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """The file `name` under `root`, which need not exist.

    Raises:
        MemoError: an absolute path, one that leads out of the root (also by a link) or in a circle, a name that stands
            for a device, or one that the system cannot hold.
    """
    parts = re.split(r"[\\/]", name) if isinstance(name, str) else []
    bad = (
        not any(parts)
        or "\0" in name
        or ":" in name
        or name.startswith(("/", "\\", "~"))
        or ".." in parts
        or any(_DEVICE_NAMES.fullmatch(part.strip(" .")) for part in parts)
    )
    why = ""
    if not bad:
        try:
            name.encode()  # a lone surrogate is no character: such a file could be named by nobody
            base = Path(root).resolve()
            path = base / name
            bad = not path.resolve().is_relative_to(base)
            with suppress(FileNotFoundError, NotADirectoryError):  # a new one
                path.stat()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a circle of links, letters that do not exist
            bad, why = True, f" ({getattr(error, 'strerror', None) or error})"
    if bad:
        raise MemoError(
            f"{shown(name)} is not a file inside {Path(root).name}/{why}: give a plain name, with "
            "subfolders if you like"
        )
    return path


def user_folder() -> Path:
    """Where this pack keeps what outlives a run, inside the host's user directory."""
    return Path(folder_paths.get_user_directory()) / MODELS


@lru_cache(maxsize=1)
def window_store() -> WindowStore | None:
    """Finished windows, kept in the host's user directory. One for all runs: it remembers that a disk is full."""
    return WindowStore.default(user_folder() / "windows")


def temporary_video() -> Path:
    """A new file name in the host's temporary folder."""
    folder = Path(folder_paths.get_temp_directory())
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"memo_{uuid.uuid4().hex}.mp4"


_written: list[Path] = []


def video_of(path: Path) -> InputImpl.VideoFromFile:
    """The host's VIDEO of a temporary file."""
    _written.append(path)
    return InputImpl.VideoFromFile(str(path))


def lost_videos() -> int:
    """How many temporary videos are gone: a number that changes when the host's cache names files that vanished."""
    return sum(not path.exists() for path in _written)


# --- Models -----------------------------------------------------------------------------------------------------------


class MEMO(nn.ModuleDict):
    """The MEMO networks; its name is what the host prints."""


class MEMOPictures(nn.ModuleDict):
    """The VAE, by itself: looking at a clip needs nothing else."""


class MEMOListeners(nn.ModuleDict):
    """The speech encoder, the emotion encoder and the emotion head."""


class HostPipeline(MemoPipeline):
    """A pipeline whose networks the host moves on and off the device.

    Attributes:
        patcher: the MEMO networks, as the host manages them.
        pictures: the VAE.
        listeners: speech and emotion networks; on the device only while they listen.
    """

    def __init__(self, nets: Networks, attention: str = "auto"):
        super().__init__(nets)
        nets.device = management.get_torch_device()
        if nets.device.type == "cpu":  # where threads that share an operation would wait for each other under load
            nets.options = Options(channels_last=False, fuse_qkv=False, rows_on_threads=True)
        self._attention = attention
        _cast_on_the_fly(nets.vae)
        patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)

        def managed(group: type[nn.ModuleDict], *names: str) -> comfy.model_patcher.ModelPatcher:
            modules = group({name: getattr(nets, name) for name in names})
            return patcher(modules, management.get_torch_device(), management.unet_offload_device())

        self.patcher = managed(MEMO, "reference_net", "diffusion_net", "image_proj", "audio_proj")
        self.pictures = managed(MEMOPictures, "vae")
        self.listeners = managed(MEMOListeners, "speech_encoder", "emotion_encoder", "emotion_head")

    @classmethod
    def load(cls, folder: Path, dtype: str, attention: str, lora: Sequence[tuple[Path, float]] = ()) -> HostPipeline:
        """Loads a checkpoint onto the host's offload device.

        Args:
            dtype: a key of DTYPES, or "auto": what the host finds fastest on its device.
            attention: a key of ATTENTION, or "auto".
            lora: adapters to merge, each a file and its strength.
        """
        import comfy.ops

        device = management.get_torch_device()
        if dtype == "auto":
            half = "fp16" if management.should_use_fp16(device) else "fp32"
            dtype = "bf16" if management.should_use_bf16(device) else half
        ops = comfy.ops.manual_cast
        nets = load_checkpoint(folder, management.unet_offload_device(), DTYPES[dtype], ops=ops, lora=lora)
        return cls(nets, attention)

    def to_device(self, working: int) -> None:
        """Has the host load all that samples and keep `working` bytes free besides."""
        management.load_models_gpu([self.patcher, self.pictures], memory_required=working)

    def plan(self, job: Job) -> Plan:
        """How to sample within what is free and what the host can free. Weights need not fit: it streams them.

        Raises:
            SamplingError: not even the smallest plan fits into all there is.
        """
        height, width = job.reference.pixels.shape[1:]
        device = self.nets.device
        share = 0.9 if device.type == "cpu" else 1  # the clip itself lies there, too
        most = int(0.95 * total_bytes(device)) - kept_by_host(device)
        room = min(int(share * free_bytes(device)) - kept_by_host(device), most)
        how = {"host_moves_weights": True, "streamed_weights": self._streamed_weights(most)}
        with self.attention():
            try:
                return choose_plan(self.nets, height, width, job.settings, room, **how)
            except SamplingError:  # others may let go of some
                choose_plan(self.nets, height, width, job.settings, most, **how)
                return least_plan(self.nets, height, width, job.settings, **how)

    def _streamed_weights(self, room: int) -> int:
        """Bytes of weights that the host leaves on the device even where it brings the others layer by layer."""
        share = getattr(management, "MIN_WEIGHT_MEMORY_RATIO", 0.0)
        least = min(share * room, room - management.minimum_inference_memory())
        weights = sum(patcher.model_size() for patcher in (self.patcher, self.pictures))
        return int(min(weights, max(2**27, least)))

    def smaller_plan(self, job: Job, than: Plan) -> Plan | None:
        """The next plan that takes less; None after the last."""
        height, width = job.reference.pixels.shape[1:]
        with self.attention():
            how = {"host_moves_weights": True, "streamed_weights": self._streamed_weights(than.peak)}
            return smaller(self.nets, height, width, job.settings, than, **how)

    def encode_reference(self, image: Any, *args: Any, size: Any = None, **more: Any) -> Any:
        side = size if isinstance(size, int) else max(size or self.default_size)
        management.load_models_gpu([self.pictures], memory_required=vae_bytes(self.nets, side, side))
        return super().encode_reference(image, *args, size=size, **more)

    def decode(self, latents: Tensor) -> Tensor:
        height, width = (8 * side for side in latents.shape[2:])
        management.load_models_gpu([self.pictures], memory_required=vae_bytes(self.nets, height, width))
        return super().decode(latents).cpu()

    def sample_windows(self, *args: Any, **more: Any) -> Iterator[Any]:
        windows = super().sample_windows(*args, **more)
        while True:
            with self.attention():
                window = next(windows, None)
            if window is None:
                return
            yield window

    def attention(self) -> Any:
        """A context in which the chosen attention kernel runs, and a slower one where it cannot."""
        if self._attention == "auto":
            return nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        names = list(ATTENTION.values())
        names = names[list(ATTENTION).index(self._attention) :]  # and after it the slower ones, which run everywhere
        context = ExitStack()
        context.enter_context(sdpa_kernel([getattr(SDPBackend, name) for name in names]))
        dtype = self.nets.diffusion_net.conv_in.weight.dtype
        fused = tuple(names[:-1])
        runs = bool(fused) and devices.attention_runs(self.nets.device, dtype, fused)
        context.enter_context(attention_fused(runs))
        return context

    def release(self) -> None:
        """Gives up the resident memory sums where they are large: the host does not know of them and other nodes want
        their room. The next clip builds them again from the state."""
        if self._sums.nbytes > KEPT_SUMS:
            self._sums.clear()
            management.soft_empty_cache()

    def forget(self) -> None:
        """Frees what can be made again: the resident memory sums, and other models on the device."""
        self._sums.clear()
        management.free_memory(2**62, self.nets.device, keep_loaded=[])
        management.soft_empty_cache(True)

    def _listen(self, seconds: float) -> None:
        needed = LISTENING_BYTES + self.nets.speech_encoder.working_bytes(seconds)
        management.load_models_gpu([self.listeners], memory_required=needed, force_full_load=True)

    def _stop_listening(self) -> None:
        """The host sends them off when it needs their room."""


def _cast_on_the_fly(module: nn.Module) -> None:
    """Gives the layers of a library's network the host's classes, so that their weights may wait in host memory."""
    from comfy.ops import manual_cast

    for layer in module.modules():
        for kind in ("Linear", "Conv2d", "GroupNorm"):
            if type(layer) is getattr(nn, kind):
                layer.__class__ = getattr(manual_cast, kind)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, counting what the host could free; of the machine for the CPU."""
    free = int(management.get_free_memory(device))
    if device.type == "cpu":
        return free
    loaded = (model for model in management.current_loaded_models if model.model is not None and model.device == device)
    return free + int(sum(model.model_loaded_memory() for model in loaded))


def kept_by_host(device: torch.device) -> int:
    """Bytes of a device that the host keeps free whatever is asked of it: weights for which they would be needed would
    stay in main memory, and be copied at every step."""
    extra = getattr(management, "extra_reserved_memory", None)
    return int(extra()) if extra is not None and device.type != "cpu" else 0


def total_bytes(device: torch.device) -> int:
    return int(management.get_total_memory(device))


def refuse_without_room(bytes_needed: int, what: str) -> None:
    """MemoError where host memory cannot hold what a node is about to make."""
    free = free_bytes(torch.device("cpu"))
    if bytes_needed > 0.95 * free:
        raise MemoError(
            f"{what} take {bytes_needed / 2**30:.1f} GB of memory and {free / 2**30:.1f} GB are free: "
            "work on shorter clips (MEMO Sample Clip: duration), or join clips with Concat Clips, which streams them"
        )


# --- Errors, interrupts, progress -------------------------------------------------------------------------------------

OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def stop_if_interrupted() -> None:
    """Raises the host's exception when the user has pressed stop."""
    management.throw_exception_if_processing_interrupted()


class Progress:
    """The bar on a node, a line of text under it, and a live picture.

    Args:
        node_id: of the running node.
        total: steps in all.
    """

    def __init__(self, node_id: str | None, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._node, self._total = node_id, total

    def update(self, done: int, text: str = "", picture: Tensor | None = None) -> None:
        """
        Args:
            done: steps finished.
            text: shown under the node.
            picture: [3, H, W] in [0, 1], shown on it.
        """
        preview = None if picture is None else ("JPEG", to_pil(picture.permute(1, 2, 0)), 512)
        self._bar.update_absolute(done, self._total, preview)
        if text and self._node is not None:
            PromptServer.instance.send_progress_text(text, self._node)


class SpeedBook:
    """Seconds per step of earlier runs, kept between runs, so that a new one can say how long it will take."""

    def __init__(self) -> None:
        self._path = user_folder() / "speed.json"

    def get(self, key: str) -> float | None:
        value = self._read().get(key)
        return value if isinstance(value, (int, float)) and 0 < value < math.inf else None

    def put(self, key: str, seconds: float) -> None:
        book = self._read()
        book.pop(key, None)
        book = dict([*book.items(), (key, round(seconds, 6))][-100:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replace_whole(self._path) as temporary:
                temporary.write_text(json.dumps(book))
        except OSError as error:
            logger.debug("cannot write %s: %s", self._path, error)

    def _read(self) -> dict[str, Any]:
        try:
            with open_regular(self._path) as file:
                book = json.load(file)
        except (OSError, ValueError, RecursionError):
            return {}
        return book if isinstance(book, dict) else {}


# --- Pictures and sound -----------------------------------------------------------------------------------------------


def to_pil(picture: Tensor) -> Image.Image:
    """[H, W, 3] in [0, 1] -> PIL."""
    from PIL import Image

    return Image.fromarray((picture.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())


def to_image(picture: Image.Image) -> Tensor:
    """PIL -> the host's IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255)[None]


def preview(image: Tensor, node: Any) -> ui.PreviewImage:
    """An IMAGE to be shown on the node."""
    return ui.PreviewImage(image, cls=node)


def one_picture(image: Tensor, alpha_mask: Tensor | None = None) -> Tensor:
    """The single picture of an IMAGE, over white where it is transparent: [3, H, W] in [-1, 1].

    Raises:
        PortraitError: a batch, NaN or infinite values, or a mask that does not fit; see `opaque`.
    """
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[3] not in (3, 4) or 0 in image.shape:
        raise PortraitError(
            f"the portrait must be one picture, IMAGE [1, H, W, 3]; received {list(image.shape)}. "
            "The node ImageFromBatch picks one out of several"
        )
    return opaque(image, alpha_mask)[0].permute(2, 0, 1).float().clamp(0, 1) * 2 - 1


def opaque(images: Tensor, alpha_mask: Tensor | None = None, name: str = "image") -> Tensor:
    """Pictures of an IMAGE, [F, H, W, 3], over white where they are transparent, as the command shows them.

    Args:
        images: [F, H, W, 3] or [F, H, W, 4].
        alpha_mask: MASK [H, W], [1, H, W] or [F, H, W], 1 where the pictures are transparent. Without any such place it
            counts as none, whatever its size: for opaque pictures Load Image gives 64 x 64 zeros.
        name: of the input, for errors.

    Raises:
        PortraitError: another shape, NaN or infinite values, a mask of another size.
    """
    if images.ndim != 4 or images.shape[3] not in (3, 4) or 0 in images.shape:
        raise PortraitError(f"{name} holds pictures [F, H, W, 3] or [F, H, W, 4]; received {list(images.shape)}")
    try:
        check_finite(images)
    except MemoError as error:
        raise PortraitError(f"{name}: {error}") from error
    if alpha_mask is None or not alpha_mask.any():
        return over_white(images)
    if alpha_mask.ndim < 2 or not alpha_mask.isfinite().all():
        raise PortraitError(
            f"alpha_mask is {list(alpha_mask.shape)}{' with NaN or infinite values' if alpha_mask.ndim > 1 else ''}: "
            "connect the MASK of Load Image"
        )
    masks = alpha_mask.reshape(-1, *alpha_mask.shape[-2:])
    if masks.shape[1:] != images.shape[1:3]:
        raise PortraitError(
            f"alpha_mask is {masks.shape[2]}x{masks.shape[1]} pixels and {name} {images.shape[2]}x{images.shape[1]}: "
            "connect the MASK of the Load Image that the picture comes from, scaled and cut as the picture was"
        )
    if len(masks) not in (1, len(images)):
        raise PortraitError(f"alpha_mask holds {len(masks)} masks and {name} {len(images)} pictures: one each, or one")
    return over_white(images, masks)


def sound_of(audio: Mapping[str, Any]) -> Sound:
    """The recording in the host's AUDIO: any mapping, also one that reads its file when it is asked.

    The waveform may be [samples], [channels, samples] or [1, channels, samples], a tensor or an array, of any number
    format that `memo_core.audio` understands.

    Raises:
        AudioError: a batch, no sound, samples that are not finite, a rate that is no rate, or a file that could not be
            read.
    """
    if not isinstance(audio, Mapping):
        raise AudioError(
            f"AUDIO holds a waveform and a sample rate; received {type(audio).__name__}: is there a sound?"
        )
    try:
        waveform, rate = audio["waveform"], audio["sample_rate"]
    except management.InterruptProcessingException:
        raise
    except KeyError as error:
        raise AudioError(
            f"AUDIO holds a waveform and a sample rate; received one without {error}: is there a sound?"
        ) from error
    except Exception as error:  # whatever the pack that reads the file raises
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise AudioError(f"the sound cannot be read ({reason}): does the video or file have one?") from error
    return Sound(_samples(waveform), _whole_rate(rate))


def _samples(waveform: Any) -> Tensor:
    """One recording as float32 [channels, samples] on the CPU, the same memory where it is that already."""
    from ..memo_core.inputs.sound import as_channels, to_float

    if not isinstance(waveform, Tensor):
        try:
            waveform = torch.from_numpy(np.require(waveform, requirements="CW"))
        except (TypeError, ValueError) as error:
            raise AudioError(f"the waveform is a {type(waveform).__name__} and no tensor of numbers") from error
    shape = list(waveform.shape)
    if waveform.ndim == 3 and shape[0] == 1:
        waveform = waveform[0]
    if waveform.ndim not in (1, 2):
        raise AudioError(
            f"AUDIO must hold one recording, [1, channels, samples]; received {shape}. Cut a batch into recordings, or "
            "join them one after the other (AudioConcat)"
        )
    if 0 in shape:
        raise AudioError(f"the recording holds no sound: [1, channels, samples] is expected, received {shape}")
    channels = as_channels(waveform)
    if channels.dtype != torch.float32:
        channels = torch.stack([to_float(channel) for channel in channels])
    if not all(math.isfinite(value) for value in channels.aminmax()):
        bad = ~channels.isfinite().all(0)
        raise AudioError(
            f"{int(bad.sum())} of {len(bad)} samples are NaN or infinite, the first is number "
            f"{int(bad.to(torch.uint8).argmax()) + 1}: look at the node that made the sound"
        )
    return channels


def _whole_rate(rate: Any) -> int:
    """The sample rate in whole Hz, of whatever kind of number it is."""
    try:
        hertz = round(float(rate))
    except (OverflowError, RuntimeError, TypeError, ValueError):  # no number, NaN, many
        hertz = 0
    if hertz < 1:
        raise AudioError(f"the sample rate is {shown(rate)}; it must be a positive number of Hz")
    return hertz


def audio_of(sound: Sound) -> dict[str, Any]:
    """The host's AUDIO of a recording."""
    return {"waveform": sound.waveform[None], "sample_rate": sound.sample_rate}
