"""The nodes without a host: only as much of ComfyUI's modules as they import, so that functions in them can be called.

pack = nodes_alone(folder)     # -> the package's modules: pack.media, pack.clips, pack.portrait, ...

What a node does in a real host is tested in tests/host.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from common import ROOT

PACK = "memo_pack"  # the pack's own copies of its modules: an error class of memo_core is another one there


class InterruptProcessingException(Exception):
    """What the host raises when its user presses stop."""


class _Node:
    hidden = SimpleNamespace(unique_id=None)


class _Output:
    """A node's outputs, `args` as in the host."""

    def __init__(self, *args: Any, ui: Any = None) -> None:
        self.args, self.ui = args, ui


class _Anything:
    """A class of the host's that is named but not used here."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.args, self.named = args, named

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **named: None


def _module(name: str, **content: Any) -> ModuleType:
    module = sys.modules[name] = ModuleType(name)
    for key, value in content.items():
        setattr(module, key, value)
    if "." in name:
        parent, _, child = name.rpartition(".")
        setattr(sys.modules[parent], child, module)
    return module


def nodes_alone(folder: Path) -> SimpleNamespace:
    """Imports nodes/ beside stand-ins of the host's modules; input, output, temp and user lie in `folder`."""
    for name in ("input", "output", "temp", "user", "models"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    directories = {
        f"get_{name}_directory": (lambda where: lambda: where)(str(folder / name))
        for name in ("input", "output", "temp", "user")
    }
    _module("comfy").__path__ = []
    _module(
        "comfy.model_management",
        InterruptProcessingException=InterruptProcessingException,
        throw_exception_if_processing_interrupted=lambda: None,
        get_free_memory=lambda device: 2**40,
    )
    _module("comfy.model_patcher", ModelPatcher=_Anything)
    _module("comfy.utils", ProgressBar=_Anything)
    _module(
        "folder_paths",
        models_dir=str(folder / "models"),
        folder_names_and_paths={},
        get_folder_paths=lambda name: [str(folder / "models" / name)],
        get_filename_list=lambda name: [],
        get_save_image_path=_save_path,
        **directories,
    )
    _module("server", PromptServer=SimpleNamespace(instance=_Anything()))
    _module("comfy_api").__path__ = []
    _module(
        "comfy_api.v0_0_2",
        ComfyExtension=object,
        InputImpl=SimpleNamespace(VideoFromFile=lambda path: Path(path)),
        ui=SimpleNamespace(PreviewImage=_Anything),
        io=SimpleNamespace(ComfyNode=_Node, NodeOutput=_Output, Custom=_Anything),
    )
    _module(PACK).__path__ = [str(ROOT)]
    host = [f"nodes.host.{name}" for name in ("folders", "media", "placement", "progress")]
    nodes = [
        f"nodes.{name}"
        for name in ("wires", "clips", "portrait", "voice", "emotion", "memory", "load", "sample", "run")
    ]
    modules = (importlib.import_module(f"{PACK}.{name}") for name in (*host, *nodes, "memo_core.errors"))
    return SimpleNamespace(**{module.__name__.rpartition(".")[2]: module for module in modules})


def _save_path(prefix: str, root: str) -> tuple[str, str, int, str, str]:
    """As the host's, but that it never counts."""
    path = Path(root, prefix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return str(path.parent), path.name, 1, str(path.parent.relative_to(root)), prefix


def forget() -> None:
    """Takes all that `nodes_alone` brought from the list of modules: others look there for a host."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("comfy", "comfy_api", "folder_paths", "server", PACK):
            del sys.modules[name]
