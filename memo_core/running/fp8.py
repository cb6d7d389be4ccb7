"""Weights kept in 8-bit floats: half the room of bf16, made whole again layer by layer when they are used."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..nets.layers import FusedLinear

FP8 = torch.float8_e4m3fn  # 3 bits of mantissa
LEAST = 2**16  # weights of a layer that is worth it


class _Fp8Layer:
    """Keeps its weight [out, ...] as float8_e4m3fn with a float32 scale per output channel."""

    def keep(self, weight: Tensor) -> None:
        self.dtype = weight.dtype
        weight = weight.float()
        scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / torch.finfo(FP8).max
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        self.kept = nn.Parameter((weight / scale).to(FP8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """In the dtype it came in."""
        return self.kept.to(self.dtype).mul_(self.scale)


# Classes, not parametrizations of torch, which make a class per layer: compiled blocks could share no graph.
class Fp8Linear(_Fp8Layer, nn.Linear):
    pass


class Fp8FusedLinear(_Fp8Layer, FusedLinear):
    pass


class Fp8Conv2d(_Fp8Layer, nn.Conv2d):
    pass


_KINDS = {nn.Linear: Fp8Linear, FusedLinear: Fp8FusedLinear, nn.Conv2d: Fp8Conv2d}


@torch.no_grad()
def keep_in_fp8(net: nn.Module, least: int = LEAST) -> None:
    """Replaces the weights of a network's linear layers and convolutions, in place, where they are at least so many;
    what changes them (adapters) comes before.

    The first convolution stays, whose weight tells the network's dtype. Products and sums are made in that dtype, as
    before. Layers of a host's own classes are left as they are.
    """
    for name, layer in net.named_modules():
        if type(layer) in _KINDS and name != "conv_in" and layer.weight.numel() >= least:
            weight = layer.weight.detach()
            del layer.weight
            layer.__class__ = _KINDS[type(layer)]
            layer.keep(weight)
