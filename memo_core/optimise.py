"""Options, where they were before version 0.2: import from `memo_core.running.options`."""

from .running.options import Options, optimise

__all__ = ["Options", "optimise"]
