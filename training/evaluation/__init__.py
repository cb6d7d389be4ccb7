"""How good are generated videos? The measures of the talking-head literature, against real videos.

metric.py     what a measure is, and the files and packages that it needs
videos.py     pairs of videos, read in step and in chunks
faces.py      where the face is in every frame
pictures.py   SSIM, PSNR, LPIPS
frechet.py    FID, FVD, E-FID
identity.py   F-SIM
landmarks.py  M-LMD, F-LMD, head-motion diversity
sync.py       Sync-C, Sync-D
evaluate.py   runs them over all pairs
report.py     tables and curves
command.py    python -m training evaluate
"""

from .command import add_command
from .evaluate import METRICS, evaluate

__all__ = ["METRICS", "add_command", "evaluate"]
