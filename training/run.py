"""What every training job shares: state on disk to resume from, a progress bar, a log, an average of weights."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from memo_core.checks import number, shown, whole
from memo_core.files import open_regular, replace_whole


def read_state(path: Path) -> dict[str, Any]:
    """What `Job.save` wrote: at least its step and its seconds; ValueError for any other file."""
    try:
        with open_regular(path) as file:
            state = torch.load(file, weights_only=True)
    except Exception as error:  # whatever torch makes of bytes that nobody checked
        raise ValueError(f"{path} is no job's state; delete it to begin anew: {error}") from error
    if (
        not isinstance(state, dict)
        or whole(state.get("step")) is None
        or number(state.get("seconds"), 0) is None
        or not isinstance(state.get("modules"), dict)
    ):
        raise ValueError(f"{path} is no job's state; delete it to begin anew")
    return state


class Job:
    """A training loop that can be stopped at any step and goes on from its last save.

    Use as `for step in job.steps(): ...; job.log(loss=...)`. Saves every `save_every` seconds and at the end,
    atomically.

    Args:
        folder: where state.pt and log.jsonl go.
        total: number of steps.
        modules: saved and restored by name.
        optimizer: saved and restored.
        settings: what the steps depend on; a saved job with other settings is refused.
        generator: random numbers of the loop, saved and restored so that a resumed run draws what the whole run would
            have.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        generator: torch.Generator,
        save_every: float = 120.0,
        settings: str = "",
    ):
        self.folder, self.total, self.save_every = folder, total, save_every
        self.modules, self.optimizer, self.generator = modules, optimizer, generator
        self.step, self.seconds, self.settings = 0, 0.0, settings
        self.bar: tqdm | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if self.state_path.exists():
            state = read_state(self.state_path)
            if state.get("settings", settings) != settings:
                raise ValueError(
                    f"{folder} was begun with other settings ({shown(state['settings'])}); "
                    f"delete it to begin anew with {settings}"
                )
            try:
                for name, module in modules.items():
                    module.load_state_dict(state["modules"][name])
                optimizer.load_state_dict(state["optimizer"])
                generator.set_state(state["generator"])
            except Exception as error:  # whatever torch says of a state that is none of its own
                raise ValueError(f"{self.state_path} is of another job; delete it to begin anew: {error}") from error
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def state_path(self) -> Path:
        return self.folder / "state.pt"

    @property
    def done(self) -> bool:
        return self.step >= self.total

    def steps(self):
        self.bar = tqdm(total=self.total, initial=self.step, desc=self.folder.name, mininterval=5.0)
        saved = started = time.monotonic()
        before = self.seconds
        try:
            while not self.done:
                yield self.step
                self.step += 1
                self.bar.update()
                self.seconds = before + time.monotonic() - started
                if time.monotonic() - saved > self.save_every or self.done:
                    self.save()
                    saved = time.monotonic()
        finally:
            self.bar.close()

    def save(self) -> None:
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings,
        }
        with replace_whole(self.state_path) as temporary:
            torch.save(state, temporary)

    def log(self, **values: Any) -> None:
        """Shows the values in the bar and appends them to log.jsonl."""
        values = {k: float(v) if isinstance(v, Tensor) else v for k, v in values.items()}
        if self.bar is not None:
            self.bar.set_postfix(
                {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in values.items()}, refresh=False
            )
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **values}) + "\n")


class Average(nn.Module):
    """Exponential moving average of a module's parameters; short runs warm it up so that it forgets the start."""

    def __init__(self, module: nn.Module, decay: float = 0.999):
        super().__init__()
        import copy

        self.decay, self.updates = decay, 0
        self.module = copy.deepcopy(module).requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        mine, theirs = list(self.module.parameters()), [p.detach() for p in module.parameters()]
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.updates)

    def set_extra_state(self, state: Tensor) -> None:
        self.updates = int(state)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step down the gradient of `loss`, clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()


def warmup_cosine(step: int, total: int, warmup: int, floor: float = 0.05) -> float:
    """Learning-rate factor: linear warm-up, then a cosine down to `floor`."""
    import math

    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def numpy_rng(generator: torch.Generator):
    """A numpy generator seeded from a torch one, for libraries that draw with numpy."""
    import numpy as np

    return np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))


def sheet(images: Tensor, columns: int) -> Tensor:
    """uint8 [N, 3, H, W] pictures, row by row, as one picture [3, rows * H, columns * W]."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    whole = torch.zeros(3, rows * height, columns * width, dtype=torch.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        whole[:, y * height : (y + 1) * height, x * width : (x + 1) * width] = image
    return whole


def save_picture(picture: Tensor, path: Path) -> None:
    """Writes uint8 [3, H, W] as a PNG, whole or not at all."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_whole(path) as temporary:
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(temporary, "PNG")


def contact_sheet(images: Tensor, columns: int, path: Path) -> None:
    """Writes uint8 [N, 3, H, W] pictures as one PNG, row by row."""
    save_picture(sheet(images, columns), path)


def bar(name: str, total: int, done: int, shown: bool) -> tqdm:
    """A progress bar of steps."""
    return tqdm(total=total, initial=done, desc=name, mininterval=5.0, disable=not shown)


def hardware() -> str:
    """The accelerator's name, or the processor's and how many cores of it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"


def to_signed(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(images: Tensor) -> Tensor:
    """float [-1, 1] -> uint8 [0, 255]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
