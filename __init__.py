"""ComfyUI's door: registers the nodes, nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.v0_0_2 import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI asks a pack for."""
    from .nodes import MemoExtension

    return MemoExtension()
