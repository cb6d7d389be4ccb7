"""Which parts work in float32 though the networks run in half precision: this file says it for all of them.

In bfloat16 (and float16) each window's rounding enters the next one's past: it is decoded, encoded again and read by
the Reference Net. Two things keep most of it out, and cost little (benchmarks/RESULTS.md, `benchmarks.precision`):

- the VAE's decoder has its weights in float32 and computes in it (in float16 the released one would overflow);
- hidden states of the Diffusion Net are carried from layer to layer in float32, where they are sums of some hundred
  terms; every layer reads them rounded and multiplies in the networks' own format, but for the first convolution,
  the last norm and the last convolution, which are small and where guidance multiplies rounding.

In float32 nothing differs, nor does it in training.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Network = TypeVar("Network", bound=nn.Module)

HALF = (torch.bfloat16, torch.float16)
VERSION = 2  # to be raised when windows in half precision come out differently: stored ones are then not found
_FULL = {"vae": ("decoder.", "post_quant_conv.")}  # weights by the beginnings of their names


def of_weight(net: str, name: str, dtype: torch.dtype) -> torch.dtype:
    """The number format of a weight.

    Args:
        net: name of a field of `Networks`.
        name: of the weight in it.
        dtype: what the networks run in.
    """
    return torch.float32 if dtype in HALF and name.startswith(_FULL.get(net, ())) else dtype


def set_weights(net: str, module: Network, dtype: torch.dtype) -> Network:
    """A whole network in these formats, in place. Weights that were rounded before stay so."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(of_weight(net, name, dtype))
    return module


def remembered(dtype: torch.dtype) -> torch.dtype:
    """In what latents of past frames are kept that networks in `dtype` will read: rounding them costs nothing there."""
    return dtype if dtype in HALF else torch.float32


def carried(dtype: torch.dtype) -> torch.dtype:
    """In what the Diffusion Net carries its hidden states, and gets its latents, when it runs in `dtype`."""
    return torch.float32 if dtype in HALF else dtype
