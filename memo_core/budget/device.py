"""What there is on a device for sampling."""

from __future__ import annotations

from ..checkpoint.networks import SamplingNetworks
from ..devices import free_bytes


def available_bytes(nets: SamplingNetworks) -> int | None:
    """What sampling may have on the networks' device: what is free, and what their weights there take already.

    None for the CPU, where there is no other place to wait.
    """
    free = free_bytes(nets.device)
    if nets.device.type == "cpu" or free is None:
        return None
    modules = (nets.reference_net, nets.diffusion_net, nets.image_proj, nets.audio_proj, nets.vae)
    tensors = (t for module in modules for t in (*module.parameters(), *module.buffers()))
    return free + sum(t.nbytes for t in tensors if t.device.type == nets.device.type)
