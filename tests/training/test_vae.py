"""The VAE that training encodes and shows with."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from common import FIXTURES

from memo_core.errors import CheckpointError
from memo_core.sampling.vae import decode_latents, encode_frames
from training.vae import load_vae


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_numbers_are_those_of_diffusers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = diffusers.AutoencoderKL.from_pretrained(FIXTURES / "memo_tiny/vae", low_cpu_mem_usage=False)
    theirs = theirs.to(dtype).eval()
    monkeypatch.setitem(sys.modules, "diffusers", None)  # it is not needed
    ours = load_vae(FIXTURES / "memo_tiny", dtype=dtype)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_frames(ours, pictures)
    assert latents.equal(encode_frames(theirs, pictures))
    with torch.no_grad():
        shown = [decode_latents(vae, latents.transpose(0, 1)) for vae in (ours, theirs)]
    assert shown[0].equal(shown[1]) and not any(parameter.requires_grad for parameter in ours.parameters())


def test_a_folder_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="vae"):
        load_vae(tmp_path)
