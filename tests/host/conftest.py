"""One ComfyUI for all tests here, and fresh ones on request; without ComfyUI all is skipped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .harness import Host, find_host, find_python

# A pack like many others: it has a top-level `nodes`, and puts its folder first on the path, where a module waits
# for whoever imports memo_core by its absolute name. Its sound is read when it is asked for.
OTHER_PACK = {
    "__init__.py": """
import os, sys
sys.path.insert(0, os.path.dirname(__file__))
from .nodes import NODE_CLASS_MAPPINGS
""",
    "nodes/__init__.py": """
class Other:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = ("INT",), "run", "other", True
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": ("INT", {"default": 1})}}
    def run(self, value):
        return {"ui": {"text": [str(value)]}, "result": (value,)}

from collections.abc import Mapping
import torch

class Sound(Mapping):
    def __init__(self, samples):
        self.samples = samples
    def __getitem__(self, key):
        if not self.samples:
            raise Exception("failed to extract audio from clip.mp4:\\nno such stream")
        return {"waveform": torch.sin(torch.arange(self.samples) / 20)[None, None] / 2, "sample_rate": 16000}[key]
    def __iter__(self):
        return iter(("waveform", "sample_rate"))
    def __len__(self):
        return 2

class LazySound:
    RETURN_TYPES, FUNCTION, CATEGORY = ("AUDIO",), "run", "other"
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"samples": ("INT", {"default": 1})}}
    def run(self, samples):
        return (Sound(samples),)

NODE_CLASS_MAPPINGS = {"OtherPackNode": Other, "OtherPackLazySound": LazySound}
""",
    "memo_core.py": "raise ImportError('imported the memo_core of another pack')\n",
}


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist asks for groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Run by one worker, and so with one host, where several run tests (`--dist loadgroup`).

    Without ComfyUI all tests here are left out but one, whose skip says so: one line.
    """
    here = [item for item in items if item.path.is_relative_to(Path(__file__).parent)]
    for item in here:
        item.add_marker(pytest.mark.xdist_group("host"))
    try:
        folder = find_host()
        if folder is not None and find_python(folder) is not None:
            return
    except FileNotFoundError as error:
        raise pytest.UsageError(str(error)) from None
    reason = "no ComfyUI host at COMFYUI_PATH or ~/comfy/ComfyUI; tests/host skipped"
    if folder is not None:
        reason = f"no Python that runs {folder}: set COMFYUI_PYTHON; tests/host skipped"
    for item in here[:1]:
        item.add_marker(pytest.mark.skip(reason=reason))
    items[:] = [item for item in items if item not in here[1:]]
    config.hook.pytest_deselected(items=here[1:])


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """One host for all tests, with another pack beside ours."""
    host = Host(tmp_path_factory.mktemp("host"), packs={"other-pack": OTHER_PACK})
    yield host
    _put_away(host)


@pytest.fixture
def fresh_host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Host]]:
    """fresh_host(**options of Host) -> a host with empty folders, stopped at the end of the test."""
    hosts = []

    def start(**options) -> Host:
        hosts.append(Host(tmp_path_factory.mktemp("host"), **options))
        return hosts[-1]

    yield start
    for host in hosts:
        _put_away(host)


def _put_away(host: Host) -> None:
    host.stop()
    shutil.rmtree(host.base / "custom_nodes")  # tens of MB each, which pytest would keep
