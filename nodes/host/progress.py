"""The bar on a node, the stop button, and how long earlier runs took."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import comfy.model_management as management
import comfy.model_patcher
import comfy.utils
import torch
from server import PromptServer
from torch import Tensor

from ...memo_core.files import open_regular, replace_whole
from .folders import user_folder
from .media import to_pil

logger = logging.getLogger("MEMO")


# --- Errors, interrupts, progress -------------------------------------------------------------------------------------

OutOfMemory = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


def stop_if_interrupted() -> None:
    """Raises the host's exception when the user has pressed stop."""
    management.throw_exception_if_processing_interrupted()


class Progress:
    """The bar on a node, a line of text under it, and a live picture.

    Args:
        node_id: of the running node.
        total: steps in all.
    """

    def __init__(self, node_id: str | None, total: int) -> None:
        self._bar = comfy.utils.ProgressBar(total, node_id=node_id)
        self._node, self._total = node_id, total

    def update(self, done: int, text: str = "", picture: Tensor | None = None) -> None:
        """Moves the bar.

        Args:
            done: steps finished.
            text: shown under the node.
            picture: [3, H, W] in [0, 1], shown on it.
        """
        preview = None if picture is None else ("JPEG", to_pil(picture.permute(1, 2, 0)), 512)
        self._bar.update_absolute(done, self._total, preview)
        if text and self._node is not None:
            PromptServer.instance.send_progress_text(text, self._node)


class SpeedBook:
    """Seconds per step of earlier runs, kept between runs, so that a new one can say how long it will take."""

    def __init__(self) -> None:
        self._path = user_folder() / "speed.json"

    def get(self, key: str) -> float | None:
        """Seconds per step; None where nothing that can be used was noted."""
        value = self._read().get(key)
        return value if isinstance(value, (int, float)) and 0 < value < math.inf else None

    def put(self, key: str, seconds: float) -> None:
        """Notes seconds per step, of the last 100 keys; where nothing can be written, nothing."""
        book = self._read()
        book.pop(key, None)
        book = dict([*book.items(), (key, round(seconds, 6))][-100:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replace_whole(self._path) as temporary:
                temporary.write_text(json.dumps(book))
        except OSError as error:
            logger.debug("cannot write %s: %s", self._path, error)

    def _read(self) -> dict[str, Any]:
        try:
            with open_regular(self._path) as file:
                book = json.load(file)
        except (OSError, ValueError, RecursionError):
            return {}
        return book if isinstance(book, dict) else {}
