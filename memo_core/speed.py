"""Speed presets, where they were before version 0.2: import from `memo_core.sampling.settings`."""

from .sampling.settings import PRESETS, Speed

__all__ = ["PRESETS", "Speed"]
