"""What sampling needs: bytes on the device and in host memory, estimated before anything is computed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .checkpoint import Networks
from .clips import WINDOW
from .sampling import vae_batch

# Feature maps of the finest level that are alive at once in the Diffusion Net: skips, the hidden state, the gated
# feed-forward layer (8 widths and 4 more), queries, keys and values.
_LIVE_MAPS = 28
_VAE_MAPS = 17  # maps of the VAE decoder's finest level alive at once: what ComfyUI reserves for Stable Diffusion's


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Bytes on the device.

    weights: the four MEMO networks and the VAE. sums: the resident memory. working: what a step or a decoded frame
    takes besides.
    """

    weights: int
    sums: int
    working: int

    @property
    def least(self) -> int:
        """What is needed even when weights wait in host memory."""
        return self.sums + self.working


def sampling_budget(nets: Networks, height: int, width: int, guided: bool = True) -> Budget:
    """Device memory to sample at height x width pixels; weights as they are, the rest estimated from the sizes."""
    h, w, rows = height // 8, width // 8, 2 if guided else 1
    number = nets.diffusion_net.conv_in.weight.element_size()
    modules = (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj, nets.vae)
    finest = rows * WINDOW * h * w * nets.diffusion_net.conv_in.weight.shape[0] * number
    return Budget(
        weights=sum(module_bytes(module) for module in modules),
        sums=rows * nets.diffusion_net.memory_numbers(h, w) * number,
        working=max(_LIVE_MAPS * finest, vae_bytes(nets, height, width)),
    )


def vae_bytes(nets: Networks, height: int, width: int) -> int:
    """Bytes that the VAE takes while it codes as many frames at once as it does at this size."""
    number = nets.vae.decoder.conv_in.weight.element_size()
    finest = nets.vae.config.block_out_channels[0] * height * width * number
    return vae_batch(height, width) * _VAE_MAPS * finest


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
