"""All that the nodes ask of the ComfyUI host: folders, models in memory, progress, pictures on a node."""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
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

from ..memo_core import budget, checkpoint
from ..memo_core.clips import Sound
from ..memo_core.errors import AudioError, CheckpointError, MemoError, PortraitError, SamplingError
from ..memo_core.job import Job
from ..memo_core.pipeline import MemoPipeline
from ..memo_core.store import WindowStore

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger("MEMO")

MODELS = "memo"  # the folder under models/, and its name in extra_model_paths.yaml
LORAS = "loras"  # the host's own folder
RELEASED = "memo"  # the checkpoint offered there whether it has been downloaded or not
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEPT_SUMS = 2**28  # bytes of memory sums that may stay between clips
LISTENING_BYTES = 2**30  # working memory of the speech encoder, for minutes of sound at once
ATTENTION = {"flash": "FLASH_ATTENTION", "memory efficient": "EFFICIENT_ATTENTION", "math": "MATH"}
_DEVICE_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # what Windows takes for devices


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
    found = {name: checkpoint.assets() / name for name in checkpoint.EMBEDDED}
    for root in roots:
        for folder in sorted(root.iterdir()) if root.is_dir() else ():
            if folder.is_dir() and not folder.name.startswith("."):
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
        raise CheckpointError(f"the adapter {name!r} is not in models/loras; press R and choose another, or none")
    return Path(path)


def inside(root: str | os.PathLike[str], name: str) -> Path:
    """The file `name` under `root`.

    Raises:
        MemoError: an absolute path, one that leads out of the root (also by a link), a name that stands for a device.
    """
    base = Path(root).resolve()
    parts = re.split(r"[\\/]", name)
    bad = (
        not name
        or "\0" in name
        or ":" in name
        or name.startswith(("/", "\\", "~"))
        or ".." in parts
        or any(_DEVICE_NAMES.fullmatch(part.strip(" .")) for part in parts)
    )
    if bad or not (base / name).resolve().is_relative_to(base):
        raise MemoError(f"{name!r} is not a file inside {base.name}/: give a plain name, with subfolders if you like")
    return base / name


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

    def __init__(self, nets: checkpoint.Networks, attention: str = "auto"):
        super().__init__(nets)
        nets.device = management.get_torch_device()
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
        nets = checkpoint.load(folder, management.unet_offload_device(), DTYPES[dtype], ops=ops, lora=lora)
        return cls(nets, attention)

    def to_device(self, working: int) -> None:
        """Has the host load all that samples and keep `working` bytes free besides."""
        management.load_models_gpu([self.patcher, self.pictures], memory_required=working)

    def plan(self, job: Job) -> budget.Plan:
        """How to sample within what is free and what the host can free. Weights need not fit: it streams them.

        Raises:
            SamplingError: not even the smallest plan fits into all there is.
        """
        height, width = job.reference.pixels.shape[1:]
        device = self.nets.device
        share = 0.9 if device.type == "cpu" else 1  # the clip itself lies there, too
        room = min(int(share * free_bytes(device)), int(0.95 * total_bytes(device)))
        try:
            return budget.plan(self.nets, height, width, job.settings, room, host_moves_weights=True)
        except SamplingError:  # others may let go of some
            room = int(0.95 * total_bytes(device))
            budget.plan(self.nets, height, width, job.settings, room, host_moves_weights=True)
            return budget.least(self.nets, height, width, job.settings, host_moves_weights=True)

    def smaller_plan(self, job: Job, than: budget.Plan) -> budget.Plan | None:
        """The next plan that takes less; None after the last."""
        height, width = job.reference.pixels.shape[1:]
        return budget.smaller(self.nets, height, width, job.settings, than, host_moves_weights=True)

    def encode_reference(self, image: Any, *args: Any, size: Any = None, **more: Any) -> Any:
        side = size if isinstance(size, int) else max(size or self.default_size)
        management.load_models_gpu([self.pictures], memory_required=budget.vae_bytes(self.nets, side, side))
        return super().encode_reference(image, *args, size=size, **more)

    def decode(self, latents: Tensor) -> Tensor:
        height, width = (8 * side for side in latents.shape[2:])
        management.load_models_gpu([self.pictures], memory_required=budget.vae_bytes(self.nets, height, width))
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

        first = list(ATTENTION).index(self._attention)  # and after it the slower ones, which run everywhere
        return sdpa_kernel([getattr(SDPBackend, name) for name in list(ATTENTION.values())[first:]])

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

    def _listen(self) -> None:
        management.load_models_gpu([self.listeners], memory_required=LISTENING_BYTES, force_full_load=True)

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
        return value if isinstance(value, (int, float)) and value > 0 else None

    def put(self, key: str, seconds: float) -> None:
        book = self._read()
        book.pop(key, None)
        book = dict([*book.items(), (key, round(seconds, 6))][-100:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self._path.parent, suffix=".part", delete=False) as file:
                json.dump(book, file)
            os.replace(file.name, self._path)
        except OSError as error:
            logger.debug("cannot write %s: %s", self._path, error)

    def _read(self) -> dict[str, Any]:
        try:
            book = json.loads(self._path.read_text())
        except (OSError, ValueError):
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


def one_picture(image: Tensor) -> Tensor:
    """The single picture of an IMAGE, [3, H, W] in [-1, 1]; PortraitError for a batch."""
    if image.ndim != 4 or image.shape[0] != 1 or image.shape[3] not in (3, 4):
        raise PortraitError(
            f"the portrait must be one picture, IMAGE [1, H, W, 3]; received {list(image.shape)}. "
            "The node ImageFromBatch picks one out of several"
        )
    return image[0, :, :, :3].permute(2, 0, 1).float().clamp(0, 1) * 2 - 1


def sound_of(audio: dict[str, Any]) -> Sound:
    """The recording in the host's AUDIO; AudioError for a batch or for no sound."""
    if not isinstance(audio, dict) or "waveform" not in audio or "sample_rate" not in audio:
        raise AudioError(
            f"AUDIO holds a waveform and a sample rate; received {type(audio).__name__}: is there a sound?"
        )
    waveform = audio["waveform"]
    if waveform.ndim != 3 or waveform.shape[0] != 1:
        raise AudioError(f"AUDIO must hold one recording, [1, channels, samples]; received {list(waveform.shape)}")
    return Sound(waveform[0].detach().cpu().float(), int(audio["sample_rate"]))


def audio_of(sound: Sound) -> dict[str, Any]:
    """The host's AUDIO of a recording."""
    return {"waveform": sound.waveform[None], "sample_rate": sound.sample_rate}
