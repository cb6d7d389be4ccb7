"""The memory state: what the video so far has been, as a wire and as a file."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.v0_0_2 import io

from ..memo_core.checks import shown
from ..memo_core.errors import MemoError
from ..memo_core.memory.state import MemoryState
from .host.folders import inside
from .host.media import preview, to_image
from .wires import CATEGORY, MemoMemory

EMPTY = "empty"
SUFFIX = ".safetensors"
_ROOTS = {"output": folder_paths.get_output_directory, "input": folder_paths.get_input_directory}
_STATES = "memo"  # the subfolder of output/ that is looked through


class LoadMemoryState(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_MemoryState",
            display_name="Memory State",
            category=CATEGORY,
            description="What the talking head remembers when a clip begins: nothing (a new video), or a saved state, "
            "to resume a video later.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=[EMPTY, *saved_states()],
                    default=EMPTY,
                    tooltip="empty: a new video. Otherwise a file that Save Memory State wrote into output/memo, or "
                    "that lies in input/.",
                ),
                io.Int.Input(
                    "horizon",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="Remember only the last so many windows; 0 remembers all the past. A loaded "
                    "state keeps its own unless this is set.",
                ),
                io.Float.Input(
                    "silence",
                    default=0.0,
                    min=0.0,
                    max=3600.0,
                    step=0.1,
                    tooltip="Let the memory fade as if so many seconds of silence had passed; after 7 s it is empty.",
                ),
            ],
            outputs=[MemoMemory.Output(display_name="memory", tooltip="For the memory input of MEMO Sample Clip.")],
        )

    @classmethod
    def validate_inputs(cls, file: str = EMPTY) -> bool | str:
        try:
            if file != EMPTY and not state_file(file).is_file():
                return f"there is no memory state {file!r}"
        except MemoError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file: str = EMPTY, **_: object) -> str:
        try:
            about = state_file(file).stat()
        except (OSError, MemoError):
            return file
        return f"{about.st_mtime_ns} {about.st_size}"

    @classmethod
    def execute(cls, file: str, horizon: int, silence: float) -> io.NodeOutput:
        state = MemoryState.empty() if file == EMPTY else MemoryState.load(state_file(file))
        if horizon:
            state = state.with_horizon(horizon)
        return io.NodeOutput(state.decayed(silence) if silence else state)


class SaveMemoryState(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_SaveMemoryState",
            display_name="Save Memory State",
            category=CATEGORY,
            description="Writes the memory after a clip into the output folder, so that the video can be resumed on "
            "another day.",
            inputs=[
                MemoMemory.Input("memory", tooltip="From MEMO Sample Clip."),
                io.String.Input(
                    "filename_prefix",
                    default="memo/memory",
                    tooltip="Folder and beginning of the file's name, inside output/. Memory State lists output/memo.",
                ),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="The file's name, for Memory State.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix: str = "memo/memory") -> bool | str:
        try:
            check_prefix(filename_prefix)
        except MemoError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, memory: MemoryState, filename_prefix: str) -> io.NodeOutput:
        check_prefix(filename_prefix)
        root = folder_paths.get_output_directory()
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(filename_prefix, root)
        except OSError as error:  # a file where a folder should be, or nobody may write there
            raise MemoError(f"cannot write {filename_prefix!r} into {Path(root).name}/: {error.strerror}") from error
        file = f"{name}_{counter:05}_{SUFFIX}"
        memory.save(Path(folder, file))
        annotated = f"{subfolder}/{file}" if subfolder else file
        return io.NodeOutput(f"{annotated} [output]")


class BlendMemoryStates(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_BlendMemoryStates",
            display_name="Blend Memory States",
            category=CATEGORY,
            description="Mixes two memories of the same portrait, for example to lead from one take into another.",
            inputs=[
                MemoMemory.Input("a", tooltip="A memory."),
                MemoMemory.Input("b", tooltip="Another memory of the same portrait and checkpoint."),
                io.Float.Input(
                    "weight",
                    default=0.5,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="0 is all a, 1 is all b.",
                ),
            ],
            outputs=[MemoMemory.Output(display_name="memory", tooltip="The mixture.")],
        )

    @classmethod
    def execute(cls, a: MemoryState, b: MemoryState, weight: float) -> io.NodeOutput:
        return io.NodeOutput(MemoryState.blend(a, b, weight))


class InspectMemoryState(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MEMO_InspectMemoryState",
            display_name="Inspect Memory State",
            category=CATEGORY,
            description="Shows what a memory holds: how many windows it has seen, how much each past moment weighs.",
            inputs=[MemoMemory.Input("memory", tooltip="Any memory.")],
            outputs=[
                io.String.Output(display_name="text", tooltip="Windows, horizon, weights and digests."),
                io.Image.Output(display_name="picture", tooltip="The weight of each past second."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, memory: MemoryState) -> io.NodeOutput:
        from ..memo_core.judging.drawings.memory import draw_memory

        picture = to_image(draw_memory(memory))
        return io.NodeOutput(memory.inspect(), picture, ui=preview(picture, cls))


def saved_states() -> list[str]:
    """Names of the states in output/memo and in input/, newest first, as the host writes file names: `name [root]`."""
    found = []
    for root, folder in (
        ("output", Path(folder_paths.get_output_directory(), _STATES)),
        ("input", Path(_ROOTS["input"]())),
    ):
        base = Path(_ROOTS[root]())
        for path in folder.glob(f"*{SUFFIX}") if folder.is_dir() else ():
            name = f"{path.relative_to(base).as_posix()} [{root}]"
            try:
                name.encode()  # or the browser could not name it
                found.append((path.stat().st_mtime, name))
            except (OSError, UnicodeEncodeError):
                continue
    return [name for _, name in sorted(found, reverse=True)]


def check_prefix(prefix: str) -> None:
    """MemoError unless files whose names begin so can lie inside output/."""
    root = folder_paths.get_output_directory()
    inside(root, prefix)
    inside(root, f"{prefix}_{1:05}_{SUFFIX}")  # which is longer


def state_file(name: str) -> Path:
    """Where a state of this name lies: inside input/ or output/, and nowhere else."""
    if not isinstance(name, str):
        raise MemoError(f"{shown(name)} is not the name of a memory state")
    plain, _, root = name.removesuffix("]").rpartition(" [")
    if root not in _ROOTS or not plain.endswith(SUFFIX):
        raise MemoError(
            f"{shown(name)} is not a saved memory state; a name such as 'memo/memory_00001_.safetensors [output]' is"
        )
    return inside(_ROOTS[root](), plain)
