"""How much disk a run's checkpoints take, and whether there is that much."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .config import Stage
from .learning import moments


class DiskError(RuntimeError):
    """There is no room for a checkpoint, or it could not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSize:
    """Bytes of a checkpoint: what a run goes on from, and beside it the weights as others read them."""

    weights: int  # of all networks, as they learn
    optimizer: int
    average: int
    export: int  # in the released layout, or an adapter; without the encoders, which are linked

    @property
    def state(self) -> int:
        return self.weights + self.optimizer + self.average

    def __str__(self) -> str:
        parts = {"weights": self.weights, "optimiser": self.optimizer, "average": self.average}
        listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)
        return f"{gigabytes(self.state)} to go on from ({listed}), exported {gigabytes(self.export)} more"


def checkpoint_size(nets: nn.Module, learning: Iterable[nn.Parameter], config: Stage) -> CheckpointSize:
    """Of a stage's networks, also of those without memory.

    Args:
        nets: all of them, adapters included.
        learning: the parameters that learn.
        config: of the stage.
    """
    learning = list(learning)
    numbers = sum(parameter.numel() for parameter in learning)
    state = nets.state_dict().values()
    return CheckpointSize(
        weights=sum(value.nbytes for value in state),
        optimizer=sum(moments(parameter.numel(), config.optimizer.bits) for parameter in learning),
        average=4 * numbers if config.engine.ema and not config.lora.rank else 0,
        export=4 * (numbers if config.lora.rank else sum(value.numel() for value in state)),
    )


def most(size: CheckpointSize, config: Stage, always: bool = False) -> int:
    """Bytes of a run's folder when it is fullest: all checkpoints that are kept, and the one being written.

    Args:
        size: of a checkpoint.
        config: of the stage.
        always: every checkpoint is exported, not only the last.
    """
    together = config.engine.keep + 1
    every = config.engine.export_every
    exports = together if always else 1 + (config.steps // every if every else 0)
    return together * size.state + exports * size.export


def plan(size: CheckpointSize, config: Stage, out: Path, always: bool = False) -> str:
    """What `most` comes to, as text."""
    needed, room = most(size, config, always), free(out)
    return (
        f"a checkpoint takes {size}; {config.engine.keep} kept and one being written take up to {gigabytes(needed)}; "
        f"{gigabytes(room)} are free for {out}" + (", which is too little" if room < needed else "")
    )


def require_room(needed: int, out: Path, remedy: str) -> None:
    """DiskError where less than `needed` bytes are free for the folder `out`."""
    if free(out) < needed:
        raise DiskError(f"{gigabytes(needed)} are needed for {out} and {gigabytes(free(out))} are free: {remedy}")


def free(folder: Path) -> int:
    """Free bytes for a folder, which need not be there yet."""
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def taken(folders: Iterable[Path]) -> int:
    """Bytes of all files below these folders that are not linked elsewhere, too."""
    files = [path.stat() for folder in folders for path in folder.rglob("*") if path.is_file()]
    return sum(file.st_size for file in files if file.st_nlink == 1)


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
