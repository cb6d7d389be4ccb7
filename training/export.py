"""A run's weights in the released layout, whenever they are wanted: from any checkpoint, exported already or not."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from memo_core.checkpoint.layout import EMBEDDED, find
from memo_core.errors import CheckpointError
from memo_core.nets.weights import WEIGHTS, load_strict, on_meta, read_json, read_tensors

from . import checkpoints, disk
from .config import ConfigError, Stage, to_json
from .nets import Nets, Sizes, check_encoders, link_encoders, sizes_of
from .reading import fits


def weights_of(start: Path | str) -> Path:
    """The folder that holds the weights of `start`: a checkpoint, exported or not, toon, or a run: its newest one.

    Raises:
        ConfigError: there are none.
    """
    found = checkpoints.latest(Path(start)) or Path(start)
    if str(found) in EMBEDDED:
        found = find(found)
    if not is_exported(found) and not (found / checkpoints.STATE / checkpoints.SIZES).is_file():
        raise ConfigError(f"no checkpoint at {found}: give a folder in the released layout, a run's folder, or toon")
    if not is_exported(found) and checkpoints.begun(found)[0].lora.rank:
        raise ConfigError(f"{found} holds adapters: give the checkpoint they belong to")
    return found


def is_exported(folder: Path) -> bool:
    """Whether a checkpoint holds the networks in the released layout."""
    return (folder / "diffusion_net").is_dir()


def read_sizes(folder: Path) -> Sizes:
    """Sizes of the networks in a folder that `weights_of` found, without reading more weights than that takes."""
    if is_exported(folder):
        configs = {name: read_json(folder / name / "config.json") for name in ("reference_net", "diffusion_net")}
        return sizes_of(configs, {name: read_tensors(folder / name / WEIGHTS) for name in ("audio_proj", "image_proj")})
    file = folder / checkpoints.STATE / checkpoints.SIZES
    values: dict[str, Any] = read_json(file)
    kinds = {"reference_net": dict, "diffusion_net": dict}
    names = Sizes.__dataclass_fields__
    if values.keys() != names.keys() or not all(fits(values[name], kinds.get(name, int)) for name in names):
        raise CheckpointError(f"{file} does not say how large the networks are: delete the checkpoint")
    return Sizes(**values)


def read_nets(folder: Path) -> Nets:
    """The networks of a folder that `weights_of` found, in float32: averages, where the run kept them.

    Raises:
        CheckpointError: files or keys are missing, extra or misshapen.
    """
    if is_exported(folder):
        return Nets.from_pretrained(folder)
    file = folder / checkpoints.STATE / checkpoints.WEIGHTS
    nets = on_meta(lambda: Nets(read_sizes(folder)), file)
    values = {name.removeprefix("nets."): value.float() for name, value in read_tensors(file).items()}
    average = folder / checkpoints.STATE / checkpoints.AVERAGE
    if average.is_file():
        learned, shadow = _learned(nets, checkpoints.begun(folder)[0]), read_tensors(average)
        if shadow.keys() != {str(number) for number in range(len(learned))}:
            raise CheckpointError(f"{average} has {len(shadow)} weights, of which {len(learned)} learned")
        values |= {name: shadow[str(number)] for number, name in enumerate(learned)}
    load_strict(nets, values, file)
    return nets


def _learned(nets: Nets, config: Stage) -> list[str]:
    """Names of the parameters that learn in a stage, in the order in which they are averaged."""
    parts = nets.parts()
    learning = {id(parameter) for name in config.train for parameter in parts[name]}
    return [name for name, parameter in nets.named_parameters() if id(parameter) in learning]


def encoders_of(folder: Path) -> Path | None:
    """The checkpoint with the VAE and encoders that complete the weights in a folder; None where there are none."""
    if is_exported(folder):
        return folder if (folder / "vae").is_dir() else None
    named = checkpoints.begun(folder)[1].get("encoders")
    return Path(named) if isinstance(named, str) and Path(named, "vae").is_dir() else None


def export(run: Path, out: Path | None = None, encoders: Path | None = None) -> Path:
    """Writes the weights of a run in the released layout, whole or not at all.

    Args:
        run: its folder, or that of one of its checkpoints.
        out: folder to write; None: `export-<step>` beside the checkpoint.
        encoders: checkpoint whose VAE and encoders complete it; None: those that the run was started with.

    Raises:
        ConfigError: `run` is none, or there is something at `out`.
        CheckpointError: the run's weights, or the encoders, are damaged.
        DiskError: there is no room.
    """
    found = weights_of(run)
    settings, record = checkpoints.begun(found)
    out = out or found.parent / f"export-{record['step']:07d}"
    if out.exists():
        raise ConfigError(f"there is {out} already: delete it, or give another --out")
    encoders = encoders or encoders_of(found)
    if encoders is not None:
        check_encoders(encoders)
    nets = read_nets(found)
    disk.require_room(sum(4 * value.numel() for value in nets.state_dict().values()), out, "give another --out")
    unfinished = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    nets.save(unfinished, torch.float32)
    if encoders is not None:
        link_encoders(encoders, unfinished)
    (unfinished / "config.json").write_text(to_json(settings), encoding="utf-8")
    shutil.copy(found / "training.json", unfinished)
    os.replace(unfinished, out)
    return out


def add_command(commands: argparse._SubParsersAction) -> None:
    """`export`."""
    command = commands.add_parser(
        "export",
        help="weights of a run as a checkpoint to generate with",
        description="Write the newest weights of a run, also of one that goes on, in the released layout.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="folder of the run, or of one of its checkpoints")
    command.add_argument("--out", type=Path, help="folder to write (export-<step> in the run's)")
    command.add_argument("--encoders", type=Path, help="checkpoint whose VAE and encoders complete it (the run's)")
    command.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> None:
    written = export(args.folder, args.out, args.encoders)
    lacking = "" if (written / "vae").is_dir() else ", without VAE and encoders: --encoders adds them"
    print(f"{written} holds the weights{lacking}")
