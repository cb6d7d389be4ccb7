"""How good are generated videos? The measures of the talking-head literature, against real videos.

metric.py     what a measure is, and the files and packages that it needs
videos.py     pairs of videos, read in step and in chunks
faces.py      where the face is in every frame
crop.py       parts of real pictures that match generated ones
pictures.py   SSIM, PSNR, LPIPS
frechet.py    FID, FVD, E-FID
identity.py   F-SIM
landmarks.py  M-LMD, F-LMD, head-motion diversity
sync.py       Sync-C, Sync-D
evaluate.py   runs them over all pairs
report.py     tables and curves
command.py    python -m training evaluate
crop_command.py  python -m training crop
benchmark.py  python -m training benchmark: the paper's benchmark, with any generator
clips.py      which clips it takes, and their portraits and voices
generators.py what makes videos of them
"""

import argparse

from . import benchmark, command, crop_command
from .command import add_command
from .evaluate import METRICS, evaluate

__all__ = ["METRICS", "add_command", "add_commands", "evaluate"]


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Adds the commands `evaluate`, `crop` and `benchmark`."""
    for module in (command, crop_command, benchmark):
        module.add_command(commands)
