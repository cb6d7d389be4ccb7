"""LayerModule: what stands beside a residual block, and what others need to know of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import nn

from .conditions import Conditions

# `LayerModule.adapted` of what every transformer has: its feed-forward layers, and the ways into it and out of it.
TRANSFORMER = {"feed_forward": r".+\.(\w+_)?ff\.net\.(0\.proj|2)", "projections": r"(.+\.)?proj_(in|out)"}


class LayerModule(nn.Module):
    """A module of one layer of the Diffusion Net. Training, adapters, compilation and sharding ask it what they need
    to know, so that a new kind of layer is one file.

    Attributes:
        part: what it belongs to in training (`training.config.PARTS`).
        adapted: its linear layers and 1x1 convolutions that LoRA may change: by group (`training.lora.TARGETS`), a
            regular expression of their names inside it.
        begins_silent: training begins with its last projection (`proj_out`) at zero, where nothing has been learnt yet:
            what stands before it passes unchanged.
        recomputed: gradient checkpointing computes its activations again.
        outside_forward: methods besides `forward` that compute with its weights and are called from outside of it, for
            who gathers sharded ones.
    """

    part: ClassVar[str] = "backbone"
    adapted: ClassVar[Mapping[str, str]] = {}
    begins_silent: ClassVar[bool] = True
    recomputed: ClassVar[bool] = True
    outside_forward: ClassVar[tuple[str, ...]] = ("prepare",)

    def prepare(self, conditions: Conditions, index: int) -> Any:
        """What does not change between the steps of a window: tensors, batch axis first, in tuples; None for nothing.

        Args:
            index: number of the module's layer in the net, by which `conditions.reference` counts.
        """
        return None

    def compiled(self) -> Iterator[nn.Module]:
        """The parts that are compiled, each by itself: all of it, unless something has to be brought in between."""
        yield self
