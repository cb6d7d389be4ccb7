"""Figures on disk: what was measured on which machine, written after every part so that nothing is lost."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch


def hardware(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The machine and the versions that the figures belong to."""
    facts = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    if hasattr(os, "getloadavg"):
        facts["load before"] = round(os.getloadavg()[0], 2)
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "gpu memory, GB": round(properties.total_memory / 1e9, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
        try:
            import triton

            facts["triton"] = triton.__version__
        except ImportError:
            facts["triton"] = None
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _driver() -> str | None:
    """The version of NVIDIA's driver, None where nobody says."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


UNFINISHED = "unfinished"  # the error of a part that is being measured


class Results:
    """A JSON file of measured parts by name.

    Args:
        path: the file; what is in it stays, part by part, until it is measured again.
        device: what is measured; parts of another machine are not kept. None: everything in the file is, and no device
            is touched.
    """

    def __init__(self, path: Path, device: torch.device | str | None = "cpu"):
        self.path, self.measured = path, {}
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if device is None and kept is not None:
            self.hardware, self.measured = kept["hardware"], kept["measured"]
            return
        self.hardware = hardware(device or "cpu")
        mine = {name: self.hardware.get(name) for name in ("cpu", "gpu", "torch")}
        if kept is not None and all(kept["hardware"].get(name) == value for name, value in mine.items()):
            self.measured = kept["measured"]

    def has(self, part: str) -> bool:
        """Whether a part has been measured without an error."""
        return part in self.measured and "error" not in self.measured[part]

    def add(self, part: str, measure: Callable[[], dict[str, Any] | Iterator[dict[str, Any]]]) -> dict[str, Any]:
        """Measures a part and writes it down, rounded; what fails is written down, too, and does not stop the rest.

        Args:
            measure: gives the figures, or one after the other what is known of them so far: that is written, as
                unfinished, and stays if the rest fails.
        """
        found: dict[str, Any] = {}
        try:
            made = measure()
            if isinstance(made, dict):
                found = made
            else:
                for found in made:
                    self.put(part, {**found, "error": UNFINISHED})
        except Exception as error:  # out of memory, a missing compiler, a typo: the other parts go on
            traceback.print_exc()
            found = {**found, "error": described(error)}
        self.put(part, found)
        return self.measured[part]

    def put(self, part: str, found: dict[str, Any]) -> None:
        self.measured[part] = rounded(found)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"hardware": self.hardware, "measured": self.measured}, indent=1)
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def described(error: Exception) -> str:
    """An error's kind and the beginning of what it says."""
    return f"{type(error).__name__}: {str(error)[:500]}"


def rounded(value: Any, digits: int = 5) -> Any:
    """Floats to so many significant digits, in dictionaries and lists, too."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    return [rounded(item, digits) for item in value] if isinstance(value, (list, tuple)) else value
