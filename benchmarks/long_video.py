"""Ten minutes in a real ComfyUI: memory, the queue's own share of the time, one node against ten, and the store.

`python -m benchmarks.long_video [minutes]`; needs what tests/host needs. The embedded checkpoint at 64 x 64, one step
without guidance: what is measured is everything around the networks. Takes about a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from pathlib import Path

from tests.host.graphs import Graph, preflights, run, write_speech
from tests.host.harness import Host

FPS, PART = 30, 64  # seconds of a part: 120 whole windows
RESULT = Path(__file__).parent / "long_video.json"

# A node that tells whether two clips are equal, frame by frame, without making 18,000 pictures of each.
DIGEST = """
import hashlib

class Digest:
    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "run", "test", True
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}, "optional": {f"clip_{i:02}": ("MEMO_CLIP",) for i in range(20)}}
    def run(self, **clips):
        digest = hashlib.sha256()
        for name in sorted(clips):
            for frame in range(clips[name].num_frames):
                digest.update(clips[name].latents[:, frame].contiguous().numpy().tobytes())
        return {"ui": {"digest": [digest.hexdigest()], "frames": [sum(c.num_frames for c in clips.values())]}}

NODE_CLASS_MAPPINGS = {"Digest": Digest}
"""
PACKS = {"digest": {"__init__.py": DIGEST}}


def graph_of(file: str, parts: int, saved: bool = True) -> tuple[Graph, str]:
    """A graph that samples the whole file in so many wired nodes; the last of `parts` takes what is left."""
    graph = Graph()
    model = graph.model()
    reference, voice = graph.reference(model), graph.voice(model, file)
    clips = [graph.clip(model, reference, voice, duration=PART if parts > 1 else 0)]
    for number in range(1, parts):
        wires = {"start": [clips[-1], 2], "memory": [clips[-1], 1]}
        clips.append(graph.clip(model, reference, voice, duration=PART if number < parts - 1 else 0, **wires))
    if saved:
        graph.save(*([clip, 0] for clip in clips))
    return graph, graph.add("Digest", **{f"clip_{number:02}": [clip, 0] for number, clip in enumerate(clips)})


def main(minutes: float = 10) -> None:
    seconds = round(60 * minutes)
    parts = -(-seconds // PART)
    result: dict[str, object] = {"machine": f"{platform.machine()}, Python {platform.python_version()}"}
    with tempfile.TemporaryDirectory() as folder:
        one, one_digest = measure_one(Path(folder, "one"), seconds, parts)
        ten, ten_digest = measure_wired(Path(folder, "ten"), seconds, parts)
    result |= one | ten | {"frames of both equal": one_digest == ten_digest}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, value in result.items():
        print(f"{name:<48} {value}")


def measure_one(folder: Path, seconds: int, parts: int) -> tuple[dict[str, object], str]:
    """The whole in one node; then again, and in wired nodes, from the store."""
    host = Host(folder, packs=PACKS)
    try:
        write_speech(host, "short.wav", 30)
        write_speech(host, "long.wav", seconds)
        run(host, graph_of("short.wav", 1)[0])
        short = host.peak_rss()
        graph, digest = graph_of("long.wav", 1)
        done = run(host, graph, timeout=7200)
        long, (frames, windows, _) = host.peak_rss(), preflights(host)[-1]
        own = done.seconds - sum(done.node_seconds.values())
        host.free()
        again = run(host, graph_of("long.wav", 1, saved=False)[0], timeout=7200)
        again_stored, before = preflights(host)[-1][2], len(preflights(host))
        wired = run(host, graph_of("long.wav", parts, saved=False)[0], timeout=7200)
        wired_stored = sum(stored for _, _, stored in preflights(host)[before:])
    finally:
        host.stop()
    return {
        "seconds of sound": seconds,
        "frames": frames,
        "windows": windows,
        "peak memory of 30 s, MB": round(short / 1e6),
        "peak memory of all, MB": round(long / 1e6),
        "growth, MB": round((long - short) / 1e6),
        "one node, seconds": round(done.seconds, 1),
        "the queue's own share, %": round(100 * own / done.seconds, 3),
        "one node again, seconds": round(again.seconds, 1),
        "one node again, windows from the store": again_stored,
        f"{parts} wired nodes after it, seconds": round(wired.seconds, 1),
        f"{parts} wired nodes after it, windows from the store": wired_stored,
    }, done.outputs[digest]["digest"][0]


def measure_wired(folder: Path, seconds: int, parts: int) -> tuple[dict[str, object], str]:
    """The whole in wired nodes, with a store of its own; then again from it."""
    host = Host(folder, packs=PACKS)
    try:
        write_speech(host, "long.wav", seconds)
        graph, digest = graph_of("long.wav", parts, saved=False)
        done = run(host, graph, timeout=7200)
        computed = len(preflights(host))
        host.free()
        again = run(host, graph, timeout=7200)
        stored = sum(stored for _, _, stored in preflights(host)[computed:])
    finally:
        host.stop()
    return {
        f"{parts} wired nodes, seconds": round(done.seconds, 1),
        f"{parts} wired nodes again, seconds": round(again.seconds, 1),
        f"{parts} wired nodes again, windows from the store": stored,
    }, done.outputs[digest]["digest"][0]


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
