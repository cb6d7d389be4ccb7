"""What training minimises: an objective is made of the networks and answers a batch with (loss, error), [B] each.

A new one is a file here, a line below, and a choice for `Stage.objective`.
"""

from __future__ import annotations

from torch import nn

from ..config import Stage
from ..nets import Nets
from .flow import FlowModel

OBJECTIVES = {"flow": FlowModel}


def objective_of(config: Stage, nets: Nets) -> nn.Module:
    """The objective of a stage, with the networks inside, so that an engine can wrap all of it."""
    return OBJECTIVES[config.objective](nets, config.loss)
