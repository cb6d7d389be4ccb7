"""Networks in the memory that the host manages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from torch import nn

from ...memo_core import devices
from ...memo_core.budget.counting import vae_bytes
from ...memo_core.budget.plan import choose_plan, least_plan, smaller_plan
from ...memo_core.checkpoint.load import load as load_checkpoint
from ...memo_core.checkpoint.networks import Networks
from ...memo_core.checks import shown
from ...memo_core.errors import MemoError, SamplingError
from ...memo_core.memory.cache import MemoryCache
from ...memo_core.nets.layers import attention_fused
from ...memo_core.pipeline import MemoPipeline
from ...memo_core.running.options import Options
from ...memo_core.sampling.job import Job
from ...memo_core.sampling.plan import Plan

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KEPT_SUMS = 2**28  # bytes of memory sums that may stay between clips
LISTENING_BYTES = 2**28  # working memory of the networks that listen, besides what grows with the sound heard at once
ATTENTION = {"flash": "FLASH_ATTENTION", "memory efficient": "EFFICIENT_ATTENTION", "math": "MATH"}


# --- Models -----------------------------------------------------------------------------------------------------------


class MEMO(nn.ModuleDict):
    """The MEMO networks; its name is what the host prints."""


class MEMOPictures(nn.ModuleDict):
    """The VAE, by itself: looking at a clip needs nothing else."""


class MEMOListeners(nn.ModuleDict):
    """The speech encoder, the emotion encoder and the emotion head."""


class HostPlacement:
    """Has the host move a pipeline's networks on and off the device (`memo_core.budget.placement.Placement`).

    Args:
        nets: the networks; `nets.device` becomes the host's.
        memory: the resident memory, of which the host does not know.
        attention: a key of ATTENTION, or "auto".

    Attributes:
        patcher: the MEMO networks, as the host manages them.
        pictures: the VAE.
        listeners: speech and emotion networks; on the device only while they listen.
    """

    def __init__(self, nets: Networks, memory: MemoryCache, attention: str = "auto"):
        self.nets, self.memory = nets, memory
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
        how: dict[str, Any] = {"host_moves_weights": True, "streamed_weights": self._streamed_weights(most)}
        with self.computing():
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
        with self.computing():
            how: dict[str, Any] = {"host_moves_weights": True, "streamed_weights": self._streamed_weights(than.peak)}
            return smaller_plan(self.nets, height, width, job.settings, than, **how)

    def look(self, height: int, width: int) -> None:
        """Has the host load the VAE."""
        management.load_models_gpu([self.pictures], memory_required=vae_bytes(self.nets, height, width))

    def computing(self) -> AbstractContextManager[object]:
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
        """Gives up the resident memory sums where they are large.

        The host does not know of them and other nodes want their room. The next clip builds them again from the state.
        """
        if self.memory.nbytes > KEPT_SUMS:
            self.memory.clear()
            management.soft_empty_cache()

    def forget(self) -> None:
        """Frees what can be made again: the resident memory sums, and other models on the device."""
        self.memory.clear()
        management.free_memory(2**62, self.nets.device, keep_loaded=[])
        management.soft_empty_cache(True)

    def listen(self, seconds: float) -> None:
        """Has the host load what listens."""
        needed = LISTENING_BYTES + self.nets.speech_encoder.working_bytes(seconds)
        management.load_models_gpu([self.listeners], memory_required=needed, force_full_load=True)

    def stop_listening(self) -> None:
        """The host sends them off when it needs their room."""


def load_model(folder: Path, dtype: str, attention: str, lora: Sequence[tuple[Path, float]] = ()) -> MemoPipeline:
    """Loads a checkpoint onto the host's offload device, to be placed by the host.

    Args:
        folder: in the released layout.
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
    return MemoPipeline(nets, partial(HostPlacement, attention=attention))


def placement_of(model: MemoPipeline) -> HostPlacement:
    """The host's placement of a model that `load_model` loaded."""
    if not isinstance(model.placement, HostPlacement):
        raise MemoError(f"a model is what Load MEMO gives, received {shown(model)}")
    return model.placement


def _cast_on_the_fly(module: nn.Module) -> None:
    """Puts the host's layers in the places of a library network's, so that their weights may wait in host memory."""
    for name, layer in list(module.named_modules(remove_duplicate=False)):
        hosts = _of_host(layer)
        if hosts is not None:
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, hosts)


def _of_host(layer: nn.Module) -> nn.Module | None:
    """The host's layer with the weights of one of torch's; None for any other module."""
    from comfy.ops import manual_cast

    if type(layer) is nn.Linear:
        made = manual_cast.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    elif type(layer) is nn.Conv2d:
        made = manual_cast.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
    elif type(layer) is nn.GroupNorm:
        made = manual_cast.GroupNorm(layer.num_groups, layer.num_channels, layer.eps, layer.affine, device="meta")
    else:
        return None
    made.weight, made.bias = layer.weight, layer.bias
    return made.train(layer.training)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device, counting what the host could free; of the machine for the CPU."""
    free = int(management.get_free_memory(device))
    if device.type == "cpu":
        return free
    loaded = (model for model in management.current_loaded_models if model.model is not None and model.device == device)
    return free + int(sum(model.model_loaded_memory() for model in loaded))


def kept_by_host(device: torch.device) -> int:
    """Bytes of a device that the host keeps free whatever is asked of it.

    Weights for which they would be needed would stay in main memory, and be copied at every step.
    """
    extra = getattr(management, "extra_reserved_memory", None)
    return int(extra()) if extra is not None and device.type != "cpu" else 0


def total_bytes(device: torch.device) -> int:
    """All memory of a device; of the machine for the CPU."""
    return int(management.get_total_memory(device))


def refuse_without_room(bytes_needed: int, what: str) -> None:
    """MemoError where host memory cannot hold what a node is about to make."""
    free = free_bytes(torch.device("cpu"))
    if bytes_needed > 0.95 * free:
        raise MemoError(
            f"{what} take {bytes_needed / 2**30:.1f} GB of memory and {free / 2**30:.1f} GB are free: "
            "work on shorter clips (MEMO Sample Clip: duration), or join clips with Concat Clips, which streams them"
        )
