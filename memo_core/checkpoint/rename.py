"""Names of weights in files from before they were renamed."""

from __future__ import annotations

from typing import Any

# Stable Diffusion's VAE was saved before diffusers renamed the layers of its attention block.
_VAE_RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def current_vae_keys(weights: dict[str, Any]) -> dict[str, Any]:
    """The VAE's tensors, or arrays, under the names that they have today."""
    renamed = {}
    for key, tensor in weights.items():
        if ".mid_block.attentions." in key:
            for old, new in _VAE_RENAMED.items():
                key = key.replace(old, new)
            tensor = tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor
        renamed[key] = tensor
    return renamed
