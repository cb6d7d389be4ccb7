"""Load MEMO: from a folder of weights to a model on a wire."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..memo_core.errors import CheckpointError
from . import host
from .wires import CATEGORY, MemoModel, one_of


class LoadMEMO(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_LoadMEMO",
            display_name="Load MEMO",
            category=CATEGORY,
            description="Loads a MEMO checkpoint for talking heads, lip sync and avatars. 'toon' comes with this pack; "
            "the released weights belong into models/memo/memo.",
            inputs=[
                io.Combo.Input(
                    "checkpoint",
                    options=list(host.checkpoints()),
                    default="toon",
                    tooltip="A folder in models/memo, or 'toon': a small cartoon model that needs no download.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *host.DTYPES],
                    default="auto",
                    tooltip="Number format of the weights. auto takes what is fastest on this machine.",
                ),
                io.Combo.Input(
                    "attention",
                    options=["auto", *host.ATTENTION],
                    default="auto",
                    tooltip="Attention kernel. auto lets PyTorch choose; math always works and is slowest. The video "
                    "is the same but for rounding: windows in the store stay.",
                ),
            ],
            outputs=[MemoModel.Output(display_name="model", tooltip="The loaded networks.")],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str = "toon", dtype: str = "auto", attention: str = "auto") -> bool | str:
        return one_of(
            checkpoint=(checkpoint, host.checkpoints()),
            dtype=(dtype, ["auto", *host.DTYPES]),
            attention=(attention, ["auto", *host.ATTENTION]),
        )

    @classmethod
    def execute(cls, checkpoint: str, dtype: str, attention: str) -> io.NodeOutput:
        folder = host.checkpoints().get(checkpoint)
        if folder is None:
            raise CheckpointError(f"the checkpoint {checkpoint!r} is gone; there are {', '.join(host.checkpoints())}")
        return io.NodeOutput(host.HostPipeline.load(folder, dtype, attention))
