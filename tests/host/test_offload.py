"""The host may leave weights in main memory (--lowvram): every layer then has to fetch its own."""

from __future__ import annotations

import subprocess

import pytest

from .harness import ROOT, find_host, find_python

# Runs in the host's Python. "lowvram_model_memory" of one byte is what --lowvram leaves on a full card.
CODE = """
import importlib.util, sys
sys.argv = ["main.py", "--cpu"]
sys.path.insert(0, {host!r})
import comfy.options
comfy.options.enable_args_parsing()  # before anything else of the host is imported
import utils.extra_config
import torch
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
sys.modules["pack"] = pack = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
from pack.nodes.host.placement import load_model
from pack.memo_core.checkpoint.layout import assets

pipe = load_model(assets() / "toon", "fp32", "auto")
patchers = (pipe.placement.patcher, pipe.placement.pictures)
own = [name for patcher in patchers for name, layer in patcher.model.named_modules()
       if any(True for _ in layer.parameters(recurse=False)) and not hasattr(layer, "comfy_cast_weights")]
print("layers that keep their weights:", own)

torch.manual_seed(0)
picture, sound = torch.rand(3, 64, 64) * 2 - 1, torch.sin(torch.arange(16000) / 20)
def video():
    job = pipe.job(pipe.encode_reference(picture, crop="none"), pipe.encode_audio(sound, 16000), steps=1)
    clip, _ = pipe.collect(job, pipe.sample_windows(job))
    return clip.latents, clip.to_tensor()
with torch.inference_mode():
    whole = video()
    for patcher in patchers:
        patcher.detach()
        patcher.load(torch.device("cpu"), lowvram_model_memory=1)
    print("lowvram:", all(patcher.model.model_lowvram for patcher in patchers))
    print("equal:", all(torch.equal(a, b) for a, b in zip(whole, video())))
"""


@pytest.mark.slow
def test_weights_may_wait_in_main_memory() -> None:
    host = find_host()
    code = CODE.format(host=str(host), root=str(ROOT))
    done = subprocess.run([str(find_python(host)), "-c", code], cwd=host, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[-3:] == ["layers that keep their weights: []", "lowvram: True", "equal: True"], (
        done.stdout + done.stderr
    )
