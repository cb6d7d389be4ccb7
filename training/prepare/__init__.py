"""The data pipeline: talking videos as they are found become training shards (MEMO section 4.4, appendix B).

  command.py    `python -m training prepare`: its arguments, what is missing
  pipeline.py   the order of the stages, what is new
  videos.py     what lies below RAW_DIR
  settings.py   thresholds, sizes, model files; the digest that says when a stage has to run again
  rows.py       one row for every clip, kept or dropped, the decision, and the table of all
first pass, over a video
  scenes.py     video -> clips between scene cuts (PySceneDetect)
  faces.py      one whole face in every picture (SCRFD), and the square around it
second pass, over a clip
  clip.py       decodes it once for all that follow
  quality.py    first picture (HyperIQA)
  sync.py       lips and sound (SyncNet)
  encode.py     VAE latents, speech features, emotions, face embedding, focus mask
  preview.py    what the review page shows
around them
  worker.py     a process that runs stages and may die
  engines.py    many of them, on one machine or through Ray Data
  review.py     a page for judging by eye, and its verdicts
  picture.py    what was dropped where
"""

from __future__ import annotations

import argparse


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `prepare` to `python -m training`."""
    from . import command  # not above: workers need none of it

    command.add_command(commands)
