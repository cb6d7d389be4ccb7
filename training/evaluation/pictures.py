"""Measures that compare the pictures of a pair, frame by frame: SSIM, PSNR, LPIPS."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from memo_core.errors import CheckpointError
from memo_core.nets.weights import load_strict, read_tensors

from .metric import ALEXNET, Measure, Metric, Reading, Tools, mean_reading
from .videos import Chunk, Pair

HIGHEST_PSNR = 100.0  # dB; equal frames would be infinite


class _Pictures(Metric):
    """One value for each frame; subclasses tell which."""

    every = 1

    def start(self, pair: Pair) -> None:
        self._times: list[float] = []
        self._values: list[float] = []

    @torch.inference_mode()
    def update(self, chunk: Chunk) -> None:
        chosen = chunk.chosen(self.every)
        if chosen:
            generated, real = (frames[chosen] for frames in chunk.pictures)
            self._values += self.compare(generated, real).reshape(-1).tolist()
            self._times += [chunk.times[i] for i in chosen]

    def finish(self) -> dict[str, Reading]:
        return {self.measures[0].name: mean_reading(self._times, self._values)}

    def compare(self, generated: Tensor, real: Tensor) -> Tensor:
        """[N] of frames [N, 3, H, W] in [0, 1]."""
        raise NotImplementedError


class Ssim(_Pictures):
    measures = (
        Measure("ssim", "SSIM", "higher", "structural similarity, Gaussian window 11, sigma 1.5 (Wang et al. 2004)"),
    )
    packages = ("torchmetrics",)

    def compare(self, generated: Tensor, real: Tensor) -> Tensor:
        from torchmetrics.functional.image import structural_similarity_index_measure

        # One by one: it takes 190 MB for each frame of 512x512.
        pairs = zip(generated.split(1), real.split(1), strict=True)
        return torch.cat(
            [structural_similarity_index_measure(*pair, data_range=1.0, reduction="none").reshape(1) for pair in pairs]
        )


class Psnr(_Pictures):
    measures = (
        Measure("psnr", "PSNR", "higher", f"peak signal-to-noise ratio in dB; equal frames count {HIGHEST_PSNR:g} dB"),
    )
    packages = ("torchmetrics",)

    def compare(self, generated: Tensor, real: Tensor) -> Tensor:
        from torchmetrics.functional.image import peak_signal_noise_ratio

        values = peak_signal_noise_ratio(generated, real, data_range=1.0, reduction="none", dim=(1, 2, 3))
        return values.clamp(max=HIGHEST_PSNR)


class Lpips(_Pictures):
    measures = (
        Measure("lpips", "LPIPS", "lower", "learned perceptual distance, AlexNet, version 0.1 (Zhang et al. 2018)"),
    )
    files, packages = (ALEXNET,), ("torchvision", "lpips")

    def __init__(self, tools: Tools) -> None:
        super().__init__(tools)
        self.every = tools.every
        self._net = load_lpips(tools).to(tools.device)

    def compare(self, generated: Tensor, real: Tensor) -> Tensor:
        return self._net(generated, real, normalize=True)


def load_lpips(tools: Tools) -> Any:
    """The lpips package's network: its own linear layers, and torchvision's AlexNet from the file (never fetched)."""
    import lpips

    path = tools.need(ALEXNET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        net = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    stored = read_tensors(path)
    # It cuts the network's `features` into slices but keeps the numbers of the layers.
    names = {name: "features." + name.split(".", 1)[1] for name in net.net.state_dict()}
    absent = [name for name in names.values() if name not in stored]
    if absent:
        raise CheckpointError(f"{path} is no AlexNet of torchvision: it lacks {', '.join(absent[:3])}")
    load_strict(net.net, {name: stored[theirs] for name, theirs in names.items()}, path)
    return net.eval().requires_grad_(False)
