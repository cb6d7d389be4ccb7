"""The shipped workflows in the host's own frontend, in a headless Chromium."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .browser import Page, find_chromium
from .harness import Host
from .make_workflows import FOLDER, PICTURE_BYTES, PICTURE_WIDTH, WORKFLOWS

NAMES = [draw.__name__ for draw in WORKFLOWS]
RUNS = "talking_portrait"  # the workflow that is run from the page
RED = """({
    nodes: app.graph.nodes.filter(node => node.has_errors || node.bgcolor === LiteGraph.NODE_ERROR_COLOUR).length,
    missing: app.graph.nodes.filter(node => !(node.type in LiteGraph.registered_node_types)).map(node => node.type),
    dialogs: [...document.querySelectorAll('.p-dialog, .comfy-modal')].filter(box => box.checkVisibility()).length,
    toasts: [...document.querySelectorAll('.p-toast-message-error, .p-toast-message-warn')].map(box => box.innerText)
})"""


@pytest.fixture(scope="module")
def chromium() -> str:
    """Path of the browser."""
    path = find_chromium()
    if path is None:
        pytest.skip("no Chromium at CHROMIUM or on the PATH")
    return path


@pytest.fixture(scope="module")
def page(chromium: str, host: Host, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with Page(chromium, host.port, host.base, tmp_path_factory.mktemp("browser")) as page:
        yield page


def file_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


# --- Opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_with_nothing_missing_and_nothing_red(page: Page, name: str) -> None:
    graph = file_of(name)
    page.open_workflow(graph)
    time.sleep(0.3)  # dialogs open a little later
    assert page.run(RED) == {"nodes": 0, "missing": [], "dialogs": 0, "toasts": []}
    shown = page.run("app.graph.serialize()")
    assert {tuple(link) for link in shown["links"]} == {tuple(link) for link in graph["links"]}
    ends = "[link.id, link.origin_id, link.origin_slot, link.target_id, link.target_slot]"
    whole = page.run(
        "[...app.graph.links.values()].filter(link => "
        "app.graph.getNodeById(link.origin_id).outputs[link.origin_slot].links.includes(link.id) && "
        f"app.graph.getNodeById(link.target_id).inputs[link.target_slot].link === link.id).map(link => {ends})"
    )
    assert sorted(whole) == [link[:5] for link in graph["links"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_frontend_would_write_the_same_file(page: Page, name: str) -> None:
    """Names, order and types of inputs and outputs, sizes, titles, and the widgets' values."""
    graph = file_of(name)
    page.open_workflow(graph)
    shown = page.run("app.graph.serialize()")
    for node in shown["nodes"]:
        node.pop("order")
    for node in graph["nodes"]:
        node.pop("order")
    assert sorted(shown["nodes"], key=lambda node: node["id"]) == graph["nodes"]
    assert shown["groups"] == graph["groups"]


@pytest.mark.parametrize("name", NAMES)
def test_its_widgets_show_the_values_of_the_file(page: Page, name: str) -> None:
    graph = file_of(name)
    page.open_workflow(graph)
    shown = page.run("app.graph.nodes.map(node => [node.id, (node.widgets ?? []).map(widget => widget.value)])")
    assert dict(shown) == {node["id"]: node["widgets_values"] for node in graph["nodes"]}


@pytest.mark.parametrize("name", NAMES)
def test_what_it_queues_is_the_api_file(page: Page, name: str) -> None:
    page.open_workflow(file_of(name))
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert page.run("(await app.graphToPrompt()).output") == api


@pytest.mark.parametrize("name", [RUNS, "two_shots_one_memory"])
def test_a_file_from_before_there_were_speeds_opens_as_exact(page: Page, name: str) -> None:
    """Its nodes that sample have neither the input nor a value for the widget, which is therefore the last one."""
    graph = file_of(name)
    samplers = [node for node in graph["nodes"] if node["type"] in ("MEMO_SampleClip", "MEMO_TalkingVideo")]
    for node in samplers:
        assert node["inputs"].pop()["name"] == "speed" and node["widgets_values"].pop() == "exact"
    assert samplers
    page.open_workflow(graph)
    time.sleep(0.3)  # dialogs open a little later
    assert page.run(RED) == {"nodes": 0, "missing": [], "dialogs": 0, "toasts": []}
    api = json.loads((FOLDER / "api" / f"{name}.json").read_text(encoding="utf-8"))
    assert page.run("(await app.graphToPrompt()).output") == api


@pytest.mark.parametrize("name", NAMES)
def test_its_nodes_lie_apart_and_inside_their_groups(page: Page, name: str) -> None:
    page.open_workflow(file_of(name))
    boxes = page.run(
        "app.graph.nodes.map(node => [node.title, node.pos[0], node.pos[1] - LiteGraph.NODE_TITLE_HEIGHT, "
        "node.size[0], Math.max(node.size[1], node.computeSize()[1]) + LiteGraph.NODE_TITLE_HEIGHT])"
    )
    groups = page.run("app.graph.groups.map(group => [group.title, ...group.pos, ...group.size])")

    def overlap(a: list, b: list) -> bool:
        return all(
            a[1 + axis] < b[1 + axis] + b[3 + axis] and b[1 + axis] < a[1 + axis] + a[3 + axis] for axis in (0, 1)
        )

    def inside(a: list, b: list) -> bool:
        return all(
            b[1 + axis] <= a[1 + axis] and a[1 + axis] + a[3 + axis] <= b[1 + axis] + b[3 + axis] for axis in (0, 1)
        )

    for several in (boxes, groups):
        assert [(a[0], b[0]) for i, a in enumerate(several) for b in several[:i] if overlap(a, b)] == []
    assert [
        (node[0], group[0]) for node in boxes for group in groups if overlap(node, group) and not inside(node, group)
    ] == []
    assert [node[0] for node in boxes if not any(inside(node, group) for group in groups)] == ["Read me"]


def test_links_run_from_left_to_right() -> None:
    for name in NAMES:
        graph = file_of(name)
        left = {node["id"]: node["pos"][0] for node in graph["nodes"]}
        assert [link for link in graph["links"] if left[link[1]] > left[link[3]]] == [], name


def test_the_page_has_no_complaint_about_the_pack(page: Page, host: Host) -> None:
    assert [line for line in page.said if host.name in line or "MEMO" in line] == []


def test_a_node_that_nobody_knows_would_have_been_seen(page: Page) -> None:
    graph = file_of(RUNS)
    graph["nodes"][0]["type"] = "MEMO_Unknown"
    page.open_workflow(graph)
    page.wait_for(f"{RED}.dialogs === 1")
    assert page.run(RED)["missing"] == ["MEMO_Unknown"]
    page.run("app.extensionManager.dialog.closeDialog?.()")
    page.reload()


# --- Templates --------------------------------------------------------------------------------------------------------


def test_the_frontend_offers_them_as_templates_with_pictures(page: Page, host: Host) -> None:
    assert sorted(json.loads(host.get("/workflow_templates"))[host.name]) == sorted(NAMES)
    page.reload()
    page.resize(1600, 2400)  # pictures out of sight are not loaded
    page.run("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    pack = "[...document.querySelectorAll('.p-dialog li')].find(item => item.textContent.trim() === name)"
    page.wait_for(f"{pack} !== undefined", name=host.name)
    page.run(f"{pack}.click()", name=host.name)
    pictures = (
        "[...document.querySelectorAll('.p-dialog img')].filter(picture => picture.naturalWidth === width).length"
    )
    page.wait_for(f"{pictures} === count", width=PICTURE_WIDTH, count=len(NAMES))
    text = page.run("document.querySelector('.p-dialog').innerText")
    assert [name for name in NAMES if name not in text] == []


@pytest.mark.parametrize("name", NAMES)
def test_its_picture_is_small(name: str) -> None:
    assert (FOLDER / f"{name}.jpg").stat().st_size < PICTURE_BYTES


# --- Running ----------------------------------------------------------------------------------------------------------


def saved_videos(host: Host, history: dict[str, Any]) -> list[Path]:
    files = [
        file
        for output in history["outputs"].values()
        for values in output.values()
        for file in (values if isinstance(values, list) else ())
        if isinstance(file, dict) and file["filename"].endswith(".mp4")
    ]
    return [host.base / file["type"] / file["subfolder"] / file["filename"] for file in files]


def test_a_saved_video_dropped_on_the_page_brings_its_workflow_back(page: Page, host: Host) -> None:
    graph = file_of(RUNS)
    for node in graph["nodes"]:
        if node["type"] == "MEMO_TalkingVideo":
            node["widgets_values"][1] = 1  # step
    page.open_workflow(graph)
    (video,) = saved_videos(host, page.press_run(host, 120))
    page.open_workflow(file_of("song"))
    page.run(
        """await (async () => {
            const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
            const dropped = new DataTransfer();
            dropped.items.add(new File([bytes], name, {type: 'video/mp4'}));
            const at = {dataTransfer: dropped, bubbles: true, cancelable: true, clientX: 5, clientY: 300};
            document.dispatchEvent(new DragEvent('drop', at));
        })()""",
        data=base64.b64encode(video.read_bytes()).decode(),
        name=video.name,
    )
    page.wait_for("app.graph.nodes.length === count", count=len(graph["nodes"]))
    shown = page.run("app.graph.serialize()")
    values = {node["id"]: node["widgets_values"] for node in shown["nodes"]}
    assert values == {node["id"]: node["widgets_values"] for node in graph["nodes"]}
    assert sorted(shown["links"]) == sorted(graph["links"])
