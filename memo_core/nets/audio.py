"""What audio modules share: a transformer in which the frames of a layer hear their audio tokens.

A kind of it is the class of its block, with what it prepares and how it is called.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from .conditions import Conditions
from .module import TRANSFORMER, LayerModule


class AudioLayer(LayerModule):
    """Audio module at one layer of the Diffusion Net.

    Args:
        dim: channels of the frames at this layer.
        inner_dim: working width; in the released net the channels that *enter* the block on the way down, and those of
            the next finer level on the way up, not `dim`.
        audio_dim: width of an audio token.
        heads: attention heads.
        groups: of the group norm.
        final: the net's last audio module, whose audio tokens nobody reads.
        ops: namespace of layer classes.

    Attributes:
        block: class of its transformer block, made of (inner_dim, audio_dim, heads, final, ops).
    """

    transformer_blocks: Any

    part = "audio"
    adapted = TRANSFORMER | {"emotion": r".+\.adaLN_modulation\.1"}
    block: ClassVar[type[nn.Module]]

    def __init__(
        self, dim: int, inner_dim: int, audio_dim: int, heads: int, groups: int, final: bool = False, ops: Any = nn
    ):
        super().__init__()
        self.norm = ops.GroupNorm(groups, dim, eps=1e-6)
        self.proj_in = ops.Conv2d(dim, inner_dim, 1)
        self.transformer_blocks = nn.ModuleList([self.block(inner_dim, audio_dim, heads, final, ops)])
        self.proj_out = ops.Conv2d(inner_dim, dim, 1)

    def prepare(self, conditions: Conditions, index: int) -> Any:
        """As `LayerModule.prepare`; None without an emotion, where the module is left out."""
        raise NotImplementedError

    def begin(self, audio: Tensor, prepared: Any) -> Any:
        """What the net's first audio module makes of the sound before it sees a frame: once a window.

        Args:
            audio: [B * F, tokens, audio_dim].
            prepared: from `prepare`.

        Returns:
            A tensor, or a tuple of tensors, batch axis first, for `forward`.
        """
        return audio

    def forward(self, x: Tensor, audio: Any, prepared: Any) -> tuple[Tensor, Any]:
        """Args:
            x: [B * F, C, h, w].
            audio: what `begin` made of it, or the module before this one.
            prepared: from `prepare`.

        Returns:
            The frames with the module's contribution added, and the audio for the next module; None after the last.
        """
        raise NotImplementedError
