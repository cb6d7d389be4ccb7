"""Load MEMO: from a folder of weights to a model on a wire."""

from __future__ import annotations

from comfy_api.v0_0_2 import io

from ..memo_core.checks import shown
from ..memo_core.errors import CheckpointError
from .host.folders import checkpoints, lora_file, loras
from .host.placement import ATTENTION, DTYPES, load_model
from .wires import CATEGORY, MemoModel, one_of

NO_LORA = "none"


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
                    options=list(checkpoints()),
                    default="toon",
                    tooltip="A folder in models/memo, or 'toon': a small cartoon model that needs no download.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=["auto", *DTYPES],
                    default="auto",
                    tooltip="Number format of the weights. auto takes what is fastest on this machine.",
                ),
                io.Combo.Input(
                    "attention",
                    options=["auto", *ATTENTION],
                    default="auto",
                    tooltip="Attention kernel. auto lets PyTorch choose; math always works and is slowest. The video "
                    "is the same but for rounding: windows in the store stay.",
                ),
                # Optional and last: graphs from before there were adapters still load.
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *loras()],
                    default=NO_LORA,
                    optional=True,
                    tooltip="An adapter trained for MEMO, from models/loras, merged into the weights. Those of Stable "
                    "Diffusion and others do not fit.",
                ),
                io.Float.Input(
                    "lora_strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much of the adapter: 1 as trained, 0 nothing, below 0 the opposite.",
                ),
            ],
            outputs=[MemoModel.Output(display_name="model", tooltip="The loaded networks.")],
        )

    @classmethod
    def validate_inputs(
        cls, checkpoint: str = "toon", dtype: str = "auto", attention: str = "auto", lora: str = NO_LORA
    ) -> bool | str:
        if lora != NO_LORA and lora not in loras():  # too many to list
            return f"lora is {shown(lora)}, which is not in models/loras; after adding a file press R"
        return one_of(
            checkpoint=(checkpoint, checkpoints()),
            dtype=(dtype, ["auto", *DTYPES]),
            attention=(attention, ["auto", *ATTENTION]),
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str = NO_LORA, **_: object) -> str:
        """Another one when the adapter's file was replaced, as training does again and again."""
        try:
            about = lora_file(lora).stat()
        except (OSError, CheckpointError):
            return lora
        return f"{about.st_mtime_ns} {about.st_size}"

    @classmethod
    def execute(
        cls, checkpoint: str, dtype: str, attention: str, lora: str = NO_LORA, lora_strength: float = 1.0
    ) -> io.NodeOutput:
        folder = checkpoints().get(checkpoint)
        if folder is None:
            raise CheckpointError(f"the checkpoint {checkpoint!r} is gone; there are {', '.join(checkpoints())}")
        adapters = [] if lora == NO_LORA else [(lora_file(lora), lora_strength)]
        return io.NodeOutput(load_model(folder, dtype, attention, adapters))
