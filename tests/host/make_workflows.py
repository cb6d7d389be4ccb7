"""Writes workflows/ from the descriptions below: both formats from one, so that they never disagree.

    python -m tests.host.make_workflows [--pictures [WORKFLOW ...]]

Names, order and defaults of the widgets come from a running host. --pictures takes the pictures too, also those of the
README: it runs the workflows in a browser, with all steps, which takes minutes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from .browser import Page, find_chromium
from .harness import ROOT, Host

FOLDER = ROOT / "workflows"
PICTURE_WIDTH, PICTURE_BYTES = 1400, 200_000
README_PICTURES_FOLDER = ROOT / "web" / "docs" / "pictures"
README_PICTURES = {"talking_portrait": "beginner.jpg", "two_shots_one_memory": "two_shots.jpg"}
TITLE, SLOT, WIDGET, MARGIN = 30, 20, 24, 14  # heights in pixels, as the frontend draws them
GAP_X, GAP_Y, GROUP_GAP, GROUP_TITLE, PADDING = 70, 26, 44, 44, 20
WIDTH = 280  # of a column
IN, WORK, OUT = "#3f789e", "#88AA88", "#b06634"  # groups: what comes in, what is made of it, what comes out
NOTE = {"color": "#432", "bgcolor": "#653"}  # as the frontend colours its notes
HALF = 2.67  # seconds: 80 frames, 5 whole windows
LIVE = 290  # height of the live preview and the line of progress on a node that samples
ROW = 720  # where a second row begins
ENDINGS = ("happy", "angry")

Output = tuple[int, int]  # node id and slot: a wire's beginning


class Sketch:
    """A workflow in the making: columns from left to right, nodes from top to bottom, groups around them."""

    def __init__(self, name: str, note: str, object_info: Mapping[str, Any], note_height: int) -> None:
        self.name, self._info = name, object_info
        self._note, self._note_height = note, note_height
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._groups: list[dict[str, Any]] = []
        self._prompt: dict[str, Any] = {}
        self._x = -GAP_X
        self._y = self._top = self._width = 0

    def column(self, width: int = WIDTH, y: int = 0) -> None:
        """Begin the next column, `y` pixels from the top."""
        self._x += self._width + GAP_X
        self._y = self._top = y
        self._width = width

    def down_to(self, y: int) -> None:
        """The next node lies at `y` or lower."""
        self._y = max(self._y, y)

    @contextmanager
    def group(self, title: str, color: str) -> Iterator[None]:
        """A frame around the nodes made inside."""
        first = len(self._nodes)
        if self._y > self._top:
            self._y += GROUP_GAP
        yield
        inside = self._nodes[first:]
        left, top = (min(node["pos"][axis] for node in inside) for axis in (0, 1))
        right, bottom = (max(node["pos"][axis] + node["size"][axis] for node in inside) for axis in (0, 1))
        box = [left - PADDING, top - TITLE - GROUP_TITLE, right - left + 2 * PADDING]
        box.append(bottom + PADDING - box[1])
        self._groups.append(
            {"id": len(self._groups) + 1, "title": title, "bounding": box, "color": color, "font_size": 24, "flags": {}}
        )

    def note(self) -> None:
        """What the workflow shows, in words."""
        self._y += PADDING
        self._place(
            "MarkdownNote", self._width, self._note_height, title="Read me", widgets_values=[self._note], **NOTE
        )

    def node(self, kind: str, room: int = 0, title: str | None = None, **inputs: Any) -> Callable[[str], Output]:
        """A node -> its outputs by name.

        room: pixels for the picture, video or text on it
        inputs: an output of another node, or a widget's value; the other widgets keep their defaults
        """
        about = self._info[kind]
        given = about["input"]
        specs = {name: spec for part in ("required", "optional") for name, spec in given.get(part, {}).items()}
        if strangers := inputs.keys() - specs.keys():
            raise ValueError(f"{kind} has no input {sorted(strangers)}; it has {list(specs)}")
        sockets, widgets, values, wired = [], [], [], {}
        number = len(self._nodes) + 1
        for name in [name for part in ("required", "optional") for name in given.get(part, {})]:
            type, options = (*specs[name], {})[:2]
            socket = {"localized_name": name, "name": name}
            if name in given.get("optional", {}):
                socket["shape"] = 7
            choices = type if isinstance(type, list) else options.get("options")
            type = "COMBO" if isinstance(type, list) else type
            socket["type"] = type
            if type not in ("COMBO", "INT", "FLOAT", "STRING", "BOOLEAN") or options.get("forceInput"):
                sockets.append((socket, inputs.get(name)))
                continue
            default = options.get("default", choices[0] if choices else None)
            value = inputs.get(name, default)
            if isinstance(value, tuple):
                value, wired[name] = default, value
            socket["widget"] = {"name": name}
            widgets.append((socket, wired.get(name)))
            values.append(value)
            self._prompt.setdefault(str(number), {"inputs": {}})["inputs"][name] = value
            if options.get("control_after_generate", name in ("seed", "noise_seed")):
                values.append("fixed")  # a widget that the frontend adds by itself
        outputs = [
            {"localized_name": name, "name": name, "type": type, "links": None}
            for name, type in zip(about["output_name"], about["output"])
        ]
        rows = max(len(sockets), len(outputs))
        height = SLOT * rows + WIDGET * len(values) + MARGIN + room
        node = self._place(
            kind,
            self._width,
            height,
            title=title,
            inputs=[socket | {"link": None} for socket, _ in sockets + widgets],
            outputs=outputs,
            properties={"Node name for S&R": kind},
            widgets_values=values,
        )
        call = self._prompt.setdefault(str(number), {"inputs": {}})
        call |= {"class_type": kind, "_meta": {"title": title or about["display_name"]}}
        for slot, (socket, origin) in enumerate(sockets + widgets):
            if origin is not None:
                self._link(origin, node, slot)
                call["inputs"][socket["name"]] = [str(origin[0]), origin[1]]

        def output(name: str) -> Output:
            return number, about["output_name"].index(name)

        return output

    def _place(self, kind: str, width: int, height: int, title: str | None = None, **about: Any) -> dict[str, Any]:
        number = len(self._nodes) + 1
        node = {"id": number, "type": kind, "pos": [self._x, self._y], "size": [width, height], "flags": {}}
        node |= {"order": number - 1, "mode": 0, "inputs": [], "outputs": []}
        if title:
            node["title"] = title
        node |= {"properties": {}, **about}
        self._nodes.append(node)
        self._y += height + TITLE + GAP_Y
        return node

    def _link(self, origin: Output, target: dict[str, Any], slot: int) -> None:
        number = len(self._links) + 1
        source = self._nodes[origin[0] - 1]["outputs"][origin[1]]
        source["links"] = [*(source["links"] or []), number]
        target["inputs"][slot]["link"] = number
        self._links.append([number, *origin, target["id"], slot, source["type"]])

    def graph(self) -> dict[str, Any]:
        """The frontend's own format."""
        return {
            "id": f"00000000-0000-4000-8000-{self.name.encode().hex()[:12]:0>12}",
            "revision": 0,
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": self._groups,
            "config": {},
            "extra": {},
            "version": 0.4,
        }

    def prompt(self) -> dict[str, Any]:
        """The API format."""
        return self._prompt


# --- The workflows ----------------------------------------------------------------------------------------------------

SWAP = (
    "**Make it yours:** put *Load Image* and *Load Audio* in the place of *MEMO Example*. For photographs of people "
    "choose the released checkpoint in *Load MEMO*; `toon`, a small cartoon model, comes with the pack."
)


def talking_portrait(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "talking_portrait",
        "# Talking portrait\n\nA portrait and a recording become a talking video, in one node. Press *Run*; the video "
        "appears in *Save Video*.\n\n" + SWAP,
        info,
        240,
    )
    sketch.column(340)
    with sketch.group("1  Portrait and voice", IN):
        example = sketch.node("MEMO_Example")
        model = sketch.node("MEMO_LoadMEMO")
    sketch.note()
    sketch.column()
    with sketch.group("2  Talk", WORK):
        talk = sketch.node(
            "MEMO_TalkingVideo", room=LIVE, model=model("model"), image=example("portrait"), audio=example("audio")
        )
    sketch.column(360)
    with sketch.group("3  The video", OUT):
        sketch.node("SaveVideo", room=350, video=talk("video"), filename_prefix="memo/talking_portrait")
    return sketch


def _inputs(sketch: Sketch, speech: str = "voice", separate_vocals: str = "off") -> tuple[Callable, ...]:
    """Two columns that most workflows begin with -> example, model, reference, voice."""
    sketch.column(340)
    with sketch.group("1  Portrait and voice", IN):
        example = sketch.node("MEMO_Example", speech=speech)
        model = sketch.node("MEMO_LoadMEMO")
    sketch.note()
    sketch.column()
    with sketch.group("2  Encode", IN):
        reference = sketch.node("MEMO_EncodeReference", room=200, model=model("model"), image=example("portrait"))
        voice = sketch.node(
            "MEMO_EncodeAudio", model=model("model"), audio=example("audio"), separate_vocals=separate_vocals
        )
    return example, model, reference, voice


def _detect(sketch: Sketch, model: Callable, voice: Callable) -> Callable[[str], Output]:
    return sketch.node("MEMO_DetectAudioEmotion", room=200, model=model("model"), audio=voice("audio"))


def _edit(sketch: Sketch, emotion: Callable, voice: Callable, lines: str) -> Callable[[str], Output]:
    return sketch.node("MEMO_EditEmotion", room=270, emotion=emotion("emotion"), audio=voice("audio"), lines=lines)


def _sample(
    sketch: Sketch, model: Callable, reference: Callable, voice: Callable, emotion: Callable, **inputs: Any
) -> Callable[[str], Output]:
    return sketch.node(
        "MEMO_SampleClip",
        room=LIVE,
        model=model("model"),
        reference=reference("reference"),
        audio=voice("audio"),
        emotion=emotion("emotion"),
        **inputs,
    )


def _save(sketch: Sketch, video: Output, prefix: str, title: str | None = None, room: int = 350) -> None:
    sketch.node("SaveVideo", room=room, title=title, video=video, filename_prefix=f"memo/{prefix}")


def two_shots_one_memory(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "two_shots_one_memory",
        "# Two shots, one memory\n\nThe second shot goes on where the first ended: *memory* carries the face and its "
        "movement across the cut, *end* the time. *Edit Emotion* changes the mood between them, one line for each "
        "shot.\n\nChange a line for the second shot and run again: the first is not rendered again.\n\n" + SWAP,
        info,
        300,
    )
    example, model, reference, voice = _inputs(sketch)
    sketch.column(420)
    with sketch.group("3  Emotion", WORK):
        heard = _detect(sketch, model, voice)
        mood = _edit(sketch, heard, voice, f"0-{HALF} happy\n{HALF}-end angry")
    sketch.column()
    with sketch.group("4  First shot", WORK):
        first = _sample(sketch, model, reference, voice, mood, title="First shot", duration=HALF)
    sketch.column(y=320)
    with sketch.group("5  Second shot", WORK):
        second = _sample(
            sketch, model, reference, voice, mood, title="Second shot", memory=first("memory"), start=first("end")
        )
    sketch.column()
    with sketch.group("6  Join", OUT):
        video = sketch.node("MEMO_ConcatClips", clip_1=first("clip"), clip_2=second("clip"))
    sketch.column(360)
    with sketch.group("7  The video", OUT):
        _save(sketch, video("video"), "two_shots_one_memory")
    return sketch


def resume_from_saved_state(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "resume_from_saved_state",
        "# Resume from a saved state\n\nThe upper row renders the first half and saves its memory as a file in "
        "`output/memo`. The lower row renders the second half from *Memory State*.\n\n"
        "1. Press *Run*. *Memory State* is `empty`, so the second half begins as a new video.\n"
        "2. Press **R**, so that the new file is listed, and choose it in *Memory State*.\n"
        "3. Press *Run* again, today or next month: the second half now goes on exactly where the first one ended.\n\n"
        "Only the second half is rendered again; the first comes from the store.\n\n" + SWAP,
        info,
        410,
    )
    example, model, reference, voice = _inputs(sketch)
    sketch.column()
    with sketch.group("3  Emotion", WORK):
        heard = _detect(sketch, model, voice)
    sketch.column()
    with sketch.group("4  First half", WORK):
        first = _sample(sketch, model, reference, voice, heard, title="First half", duration=HALF)
    sketch.down_to(ROW)
    with sketch.group("6  The memory, from the file", IN):
        state = sketch.node("MEMO_MemoryState")
    sketch.column()
    with sketch.group("5  The memory, to a file", OUT):
        sketch.node("MEMO_SaveMemoryState", memory=first("memory"), filename_prefix="memo/first_half")
        sketch.node("MEMO_InspectMemoryState", room=200, memory=first("memory"))
    sketch.down_to(ROW)
    with sketch.group("7  Second half", WORK):
        second = _sample(
            sketch, model, reference, voice, heard, title="Second half", memory=state("memory"), start=HALF
        )
    halves = (("first half", first), ("second half", second))
    sketch.column()
    videos = []
    for number, (name, clip) in enumerate(halves):
        sketch.down_to(number * ROW)
        with sketch.group(f"Join: {name}", OUT):
            videos.append(sketch.node("MEMO_ConcatClips", clip_1=clip("clip")))
    sketch.column(360)
    for number, ((name, _), video) in enumerate(zip(halves, videos)):
        sketch.down_to(number * ROW)
        with sketch.group(f"The video: {name}", OUT):
            _save(sketch, video("video"), name.replace(" ", "_"))
    return sketch


def emotion_by_hand(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "emotion_by_hand",
        "# Emotion by hand\n\n*Detect Audio Emotion* hears the mood of the voice and draws it. *Edit Emotion* changes "
        "it where you want, one line each:\n\n```\n0-1.5 surprised\n1.5-3 happy 0.7\n```\n\nThe number at the end is "
        "its strength. What no line names stays as it was heard.\n\n" + SWAP,
        info,
        330,
    )
    example, model, reference, voice = _inputs(sketch)
    sketch.column(460)
    with sketch.group("3  Heard, then edited", WORK):
        heard = _detect(sketch, model, voice)
        mood = _edit(sketch, heard, voice, "0-1.6 surprised\n1.6-3.2 happy 0.7\n3.2-end sad")
    sketch.column()
    with sketch.group("4  Talk", WORK):
        clip = _sample(sketch, model, reference, voice, mood)
    sketch.column()
    with sketch.group("5  Join", OUT):
        video = sketch.node("MEMO_ConcatClips", clip_1=clip("clip"))
    sketch.column(360)
    with sketch.group("6  The video", OUT):
        _save(sketch, video("video"), "emotion_by_hand")
    return sketch


def upscale_and_sharpen(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "upscale_and_sharpen",
        "# Upscale and sharpen\n\n*MEMO Clip To Images* opens a clip to every image node: here two of ComfyUI's own, "
        "twice the size and sharper. *Images To MEMO Clip* brings its time and sound back.\n\nUse an upscale model or "
        "a face restorer in their place.\n\n" + SWAP,
        info,
        280,
    )
    example, model, reference, voice = _inputs(sketch)
    sketch.column()
    with sketch.group("3  Talk", WORK):
        heard = _detect(sketch, model, voice)
        clip = _sample(sketch, model, reference, voice, heard)
    sketch.column()
    with sketch.group("4  Upscale and sharpen", WORK):
        images = sketch.node("MEMO_ClipToImages", clip=clip("clip"))
        larger = sketch.node("ImageScaleBy", image=images("images"), upscale_method="lanczos", scale_by=2.0)
        sharper = sketch.node(
            "ImageSharpen", title="Sharpen", image=larger("IMAGE"), sharpen_radius=1, sigma=0.5, alpha=0.5
        )
        back = sketch.node("MEMO_ImagesToClip", images=sharper("IMAGE"), clip=clip("clip"))
    sketch.column()
    with sketch.group("5  Join", OUT):
        video = sketch.node("MEMO_ConcatClips", clip_1=back("clip"))
    sketch.column(420)
    with sketch.group("6  The video", OUT):
        _save(sketch, video("video"), "upscale_and_sharpen", room=410)
    return sketch


def two_endings(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "two_endings",
        "# Two endings\n\nA memory is a value on a wire, so it can be forked: both endings go on from the same "
        "beginning, which is rendered once. One ends happy, the other angry.\n\nEach is saved, and both side by side, "
        "put together by ComfyUI's own nodes.\n\n" + SWAP,
        info,
        270,
    )
    example, model, reference, voice = _inputs(sketch)
    sketch.column()
    with sketch.group("3  The beginning", WORK):
        heard = _detect(sketch, model, voice)
        start = _sample(sketch, model, reference, voice, heard, title="The beginning", duration=HALF)
    moods, clips, videos = [], [], []
    sketch.column(400)
    for number, feeling in enumerate(ENDINGS):
        sketch.down_to(number * ROW)
        with sketch.group(f"{4 + number}  It ends {feeling}", WORK):
            moods.append(_edit(sketch, heard, voice, f"{HALF}-end {feeling}"))
    sketch.column()
    for number, (feeling, mood) in enumerate(zip(ENDINGS, moods)):
        sketch.down_to(number * ROW)
        with sketch.group(f"The {feeling} ending", WORK):
            title = f"{feeling.capitalize()} ending"
            memory, end = start("memory"), start("end")
            clips.append(_sample(sketch, model, reference, voice, mood, title=title, memory=memory, start=end))
    sketch.column()
    for number, clip in enumerate(clips):
        sketch.down_to(number * ROW)
        with sketch.group("Join", OUT):
            videos.append(sketch.node("MEMO_ConcatClips", clip_1=start("clip"), clip_2=clip("clip")))
    sketch.column(360)
    for number, (feeling, video) in enumerate(zip(ENDINGS, videos)):
        sketch.down_to(number * ROW)
        with sketch.group(f"The video: {feeling}", OUT):
            _save(sketch, video("video"), f"ending_{feeling}")
    sketch.column(y=ROW // 2)
    with sketch.group("6  Side by side", OUT):
        left, right = (sketch.node("GetVideoComponents", video=video("video")) for video in videos)
        both = sketch.node("ImageStitch", image1=left("images"), image2=right("images"))
        video = sketch.node("CreateVideo", images=both("IMAGE"), audio=left("audio"), fps=left("fps"))
    sketch.column(560, y=ROW // 2)
    with sketch.group("Both endings", OUT):
        _save(sketch, video("VIDEO"), "two_endings", room=290)
    return sketch


def song(info: Mapping[str, Any]) -> Sketch:
    sketch = Sketch(
        "song",
        "# Song\n\n*MEMO Encode Audio* takes the music away before it listens (*separate_vocals*), so that the voice "
        "alone moves the mouth. The video keeps the whole song: it is wired into *Concat Clips*.\n\n`spectral` needs "
        "nothing and suits music that repeats; `Kim Vocal 2` suits all and needs the audio-separator package.\n\n"
        + SWAP,
        info,
        310,
    )
    example, model, reference, voice = _inputs(sketch, "song", "spectral")
    sketch.column()
    with sketch.group("3  Sing", WORK):
        heard = _detect(sketch, model, voice)
        clip = _sample(sketch, model, reference, voice, heard)
    sketch.column()
    with sketch.group("4  Join", OUT):
        video = sketch.node("MEMO_ConcatClips", clip_1=clip("clip"), audio=example("audio"))
    sketch.column(360)
    with sketch.group("5  The video", OUT):
        _save(sketch, video("video"), "song")
    return sketch


WORKFLOWS = (
    talking_portrait,
    two_shots_one_memory,
    emotion_by_hand,
    resume_from_saved_state,
    two_endings,
    upscale_and_sharpen,
    song,
)


def make(object_info: Mapping[str, Any]) -> dict[str, str]:
    """Text of every file, by its path in workflows/."""
    files = {}
    for draw in WORKFLOWS:
        sketch = draw(object_info)
        files[f"{sketch.name}.json"] = json.dumps(sketch.graph(), indent=1, ensure_ascii=False) + "\n"
        files[f"api/{sketch.name}.json"] = json.dumps(sketch.prompt(), indent=1, ensure_ascii=False) + "\n"
    return files


def take_picture(name: str, folder: Path) -> None:
    """Run a workflow in the browser and take its picture; `folder` is an empty one."""
    host = Host(folder / "host")  # a new one: what is in the store shows no live preview
    try:
        (folder / "profile").mkdir()
        with Page(find_chromium(), host.port, host.base, folder / "profile") as page:
            graph = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
            page.open_workflow(graph)
            page.press_run(host, 3600)
            videos = "[...document.querySelectorAll('video')]"
            count = sum(node["type"] == "SaveVideo" for node in graph["nodes"])
            page.wait_for(f"{videos}.filter(video => video.readyState >= 2).length === count", count=count)
            second = 4.2 if name == "two_endings" else 1.5  # the endings differ
            page.run(f"{videos}.forEach(video => {{ video.pause(); video.currentTime = second }})", second=second)
            shown = "video => !video.seeking && Math.abs(video.currentTime - second) < 0.1"
            page.wait_for(f"{videos}.every({shown})", second=second)
            picture = page.picture()
    finally:
        host.stop()
    height = round(picture.height * PICTURE_WIDTH / picture.width)
    picture = picture.resize((PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    _save_picture(picture, FOLDER / f"{name}.jpg")
    if name in README_PICTURES:
        _save_picture(picture, README_PICTURES_FOLDER / README_PICTURES[name])


def _save_picture(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for quality in range(90, 40, -5):
        picture.save(path, quality=quality, optimize=True, progressive=True)
        if path.stat().st_size < PICTURE_BYTES:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", nargs="*", metavar="WORKFLOW", help="of all workflows, or of these")
    pictures = parser.parse_args().pictures
    with tempfile.TemporaryDirectory() as folder:
        host = Host(Path(folder))
        try:
            files = make(host.object_info())
        finally:
            host.stop()
    for name, text in files.items():
        (FOLDER / name).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / name).write_text(text, encoding="utf-8")
    if pictures is not None:
        for name in pictures or [draw.__name__ for draw in WORKFLOWS]:
            with tempfile.TemporaryDirectory() as folder:
                take_picture(name, Path(folder))


if __name__ == "__main__":
    main()
