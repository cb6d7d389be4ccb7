"""Whether two revisions compute the same bits on this machine: `python -m benchmarks.same_bits REV`, 3 minutes.

What is checked out is compared with the revision: speech and emotion features, the portrait's latents, latents, frames
and the memory of three chained windows of the small random checkpoint, guided, and of two windows of the embedded one
by every preset, the last window a partial one. Ends with 1 where anything differs, and prints by how much.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from memo_core.inputs.sound import load_audio

ROOT = Path(__file__).parents[1]
DTYPES = ("float32", "bfloat16")
CHECKPOINTS = ("random", "toon")
_PRESETS = {"random": ("exact", "balanced"), "toon": ("exact", "balanced", "draft")}


def render(tree: Path, checkpoint: str, dtype: str) -> dict[str, torch.Tensor]:
    """Everything that is compared, by name, as the `memo_core` that is first on the path computes it.

    Args:
        tree: the checkout, of which its files are used.
        checkpoint: one of CHECKPOINTS.
    """
    # Nothing but what has been public from the first version on: any revision must be able to run this.
    from memo_core import MemoPipeline

    folder = tree / "tests" / "fixtures" / "memo_tiny"
    path = str(folder) if checkpoint == "random" else str(tree / "assets" / "toon")
    pipe = MemoPipeline.from_pretrained(path, dtype=getattr(torch, dtype))
    if checkpoint == "random":
        given = load_file(folder / "expected.safetensors")
        waveform, rate = given["in.waveform"], 16000
        reference = pipe.encode_reference(given["in.reference_image"][0], given["in.face_embedding"])
        frames, settings = 40, {"steps": 4}
    else:
        from PIL import Image

        waveform, rate = load_audio(tree / "assets" / "voice.wav")
        reference = pipe.encode_reference(Image.open(tree / "assets" / "portrait.png"))
        frames, settings = 24, {}
    track = pipe.encode_audio(waveform, rate)
    emotion = pipe.detect_emotion(waveform, rate, track.num_padded_frames)
    found = {"speech": track.embeddings, "emotion": emotion.probabilities, "portrait": reference.latents}
    for speed in _PRESETS[checkpoint]:
        clip, memory = pipe.sample_clip(reference, track, emotion, num_frames=frames, speed=speed, **settings)
        found[f"{speed}, latents"] = clip.latents
        found[f"{speed}, frames"] = clip.to_tensor()
        found[f"{speed}, memory"] = torch.cat([entry.latents.float() for entry in memory.entries])
    return {name: tensor.detach().contiguous() for name, tensor in found.items()}


def compare(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    """A line for everything that differs."""
    lines = [f"{name}: only in one of them" for name in sorted(before.keys() ^ after.keys())]
    for name in sorted(before.keys() & after.keys()):
        a, b = before[name], after[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            lines.append(f"{name}: {list(a.shape)} {a.dtype}, then {list(b.shape)} {b.dtype}")
        elif not torch.equal(a, b):
            error = (a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-300)
            lines.append(f"{name}: relative difference {float(error):.2e}")
    return lines


def _rendered(tree: Path, checkpoint: str, dtype: str, folder: Path) -> dict[str, torch.Tensor]:
    """`render` with the code of that checkout, in a process of its own."""
    out = folder / "rendered.safetensors"
    subprocess.run(
        [sys.executable, str(Path(__file__).resolve()), "--render", str(tree), checkpoint, dtype, str(out)],
        cwd=tree,
        check=True,
    )
    return load_file(out)


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["--render"]:
        tree, checkpoint, dtype, out = given[1:]
        sys.path[0] = tree  # in place of this file's folder
        save_file(render(Path(tree), checkpoint, dtype), out)
        return 0
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_bits", description=__doc__)
    parser.add_argument("revision", metavar="REV", help="what to compare with, as git names it")
    parser.add_argument(
        "--dtype", choices=DTYPES, default=DTYPES[0], help="number format of the networks (%(default)s)"
    )
    parser.add_argument("--only", choices=CHECKPOINTS, help="one checkpoint alone")
    args = parser.parse_args(given)
    differences = 0
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary, "tree")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), args.revision], check=True)
        try:
            for checkpoint in CHECKPOINTS if args.only is None else (args.only,):
                before, after = (_rendered(at, checkpoint, args.dtype, Path(temporary)) for at in (tree, ROOT))
                lines = compare(before, after)
                differences += len(lines)
                same = len(before.keys() & after.keys()) - len(lines)
                print(f"{checkpoint}, {args.dtype}: {same} of {len(before)} equal to the bit", *lines, sep="\n  ")
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
