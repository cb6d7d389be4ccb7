"""Weights kept in 8-bit floats: half the room of bf16, made whole again layer by layer when they are used."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nets.layers import FusedLinear

FP8 = torch.float8_e4m3fn  # 3 bits of mantissa
LEAST = 2**16  # weights of a layer that is worth it


class Fp8Layer(nn.Module):
    """A layer whose weight [out, ...] is kept as float8_e4m3fn with a float32 scale per output channel.

    Args:
        layer: whose weight is taken, rounded, and whose bias, as it is.
    """

    bias: nn.Parameter | None

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight = layer.get_parameter("weight").detach()
        self.dtype = weight.dtype
        weight = weight.float()
        scale = weight.abs().amax(dim=tuple(range(1, weight.ndim)), keepdim=True) / torch.finfo(FP8).max
        scale = scale.clamp_min(torch.finfo(torch.float32).tiny)
        self.register_parameter("bias", dict(layer.named_parameters()).get("bias"))
        self.kept = nn.Parameter((weight / scale).to(FP8), requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """In the dtype it came in."""
        return self.kept.to(self.dtype).mul_(self.scale)


# A class for each kind, not parametrizations of torch, which make one per layer: compiled blocks could share no graph.
class Fp8Linear(Fp8Layer):
    """`nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight, self.bias)


class Fp8FusedLinear(Fp8Layer):
    """`FusedLinear`."""

    def __init__(self, layer: FusedLinear):
        super().__init__(layer)
        self.names, self.widths = layer.names, layer.widths

    forward = FusedLinear.forward


class Fp8Conv2d(Fp8Layer):
    """`nn.Conv2d`, with zeros around the map."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        self.stride, self.dilation, self.groups = layer.stride, layer.dilation, layer.groups
        self.padding: Any = layer.padding  # numbers, or the name of a rule

    def forward(self, x: Tensor) -> Tensor:
        """[R, in, h, w] -> [R, out, h', w']."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


_KINDS: dict[type[nn.Module], type[Fp8Layer]]
_KINDS = {nn.Linear: Fp8Linear, FusedLinear: Fp8FusedLinear, nn.Conv2d: Fp8Conv2d}


@torch.no_grad()
def keep_in_fp8(net: nn.Module, least: int = LEAST) -> None:
    """Puts layers with rounded weights in the places of a network's linear layers and convolutions.

    Those with at least so many weights; what changes them (adapters) comes before. The first convolution stays, whose
    weight tells the network's dtype. Products and sums are made in that dtype, as before. Layers of a host's own
    classes are left as they are.
    """
    for name, layer in list(net.named_modules()):
        kind = _KINDS.get(type(layer))
        if kind is not None and name != "conv_in" and layer.get_parameter("weight").numel() >= least:
            parent, _, child = name.rpartition(".")
            setattr(net.get_submodule(parent), child, kind(layer))
