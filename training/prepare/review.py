"""A page for judging clips by eye, most doubtful first; it works from the disk, without a server or the network."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from memo_core.checks import shown as readable
from memo_core.files import open_regular, replace_whole

from ..reading import parse_json
from .rows import PrepareError, Row, decide
from .settings import Settings

PAGE = "review.html"
CLIPS = 960  # on a page; the next ones are on review-2.html and so on
VERDICTS = ("verdicts.json", "verdicts.csv")
SHOWN = ("id", "source", "start", "end", "quality", "sync_confidence", "sync_distance", "sync_offset")
SHOWN += ("decision", "detail")  # as the scores alone have it


def doubt(row: Row, settings: Settings) -> float:
    """How near the nearest score lies to its threshold, relative to that; smaller is more doubtful. 1 unmeasured."""
    scores = ((row.quality, settings.min_quality), (row.sync_confidence, settings.min_confidence))
    return min([1.0, *(abs(score - least) / max(abs(least), 1e-6) for score, least in scores if score is not None)])


def write_page(out: Path, rows: Mapping[str, Row], settings: Settings) -> None:
    """Writes review.html and the pages after it: every clip that was looked at closely, CLIPS on each, most doubtful
    first, with pictures, preview, scores and a choice. Each page saves the verdicts of all.
    """
    order, verdicts = [], {}
    for row in rows.values():
        if row.box is not None and row.stage not in ("scenes", "faces"):  # of those there is no preview
            order.append((doubt(row, settings), row.id))
            if row.verdict:
                verdicts[row.id] = row.verdict
    order.sort()
    # The browser keeps what was judged in it under this, until other verdicts are read.
    digest = hashlib.sha256(json.dumps(sorted(verdicts.items())).encode()).hexdigest()[:16]
    pages = [page_name(number) for number in range(max(1, -(-len(order) // CLIPS)))]
    common = {"quality": settings.min_quality, "sync": settings.min_confidence, "offset": settings.max_offset}
    common |= {"digest": digest, "verdicts": verdicts, "pages": pages}
    for number, name in enumerate(pages):
        clips = [_shown(rows[id], settings) for _, id in order[CLIPS * number : CLIPS * (number + 1)]]
        # "<" is written as a code, so that no name can end the script.
        data = json.dumps(common | {"clips": clips, "page": number}).replace("<", "\\u003c")
        with replace_whole(out / name) as temporary:
            temporary.write_text(_PAGE.replace("DATA", data), encoding="utf-8")
    for path in out.glob(page_name("*")):
        if path.name not in pages:
            path.unlink()


def page_name(number: int | str) -> str:
    """The file of a page, counted from 0."""
    return PAGE if number == 0 else PAGE.replace(".", f"-{number + 1 if isinstance(number, int) else number}.")


def _shown(row: Row, settings: Settings) -> dict:
    alone = decide(replace(row, verdict=""), settings)
    clip = {name: _readable(getattr(alone, name)) for name in SHOWN}
    return clip | {"verdict": row.verdict, "doubt": round(doubt(row, settings), 4)}


def _readable(value):
    """Text without the lone surrogates that stand for bytes of a file's name that are no text."""
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def read_verdicts(out: Path, path: Path | None = None) -> dict[str, str] | None:
    """Verdicts by clip id, keep or drop: from `path`, or the newest of verdicts.json and .csv in OUT_DIR; None if there
    is none.

    JSON is {"verdicts": {id: verdict}} or the inner object; CSV has the columns id and verdict. An empty verdict takes
    back another.

    Raises:
        PrepareError: the file is not there, cannot be read, or holds another verdict.
    """
    if path is None:
        found = [out / name for name in VERDICTS if (out / name).is_file()]
        if not found:
            return None
        path = max(found, key=lambda path: path.stat().st_mtime)
    try:
        with open_regular(path) as file:
            text = file.read().decode("utf-8-sig")
        if path.suffix.lower() == ".csv":
            verdicts = {line["id"]: (line["verdict"] or "").strip() for line in csv.DictReader(text.splitlines())}
        else:
            verdicts = parse_json(text)
            verdicts = dict(verdicts.get("verdicts", verdicts))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise PrepareError(f"{path} holds no verdicts: {type(error).__name__}: {error}") from error
    wrong = [(id, verdict) for id, verdict in verdicts.items() if verdict not in ("keep", "drop", "")]
    if wrong:
        id, verdict = wrong[0]
        told = f"the verdict on {readable(id)} is {readable(verdict)}"
        raise PrepareError(f"{path}: {told}; keep, drop or nothing is allowed")
    return verdicts


def save_verdicts(out: Path, verdicts: dict[str, str]) -> None:
    """Writes OUT_DIR/verdicts.json as the page does."""
    given = {id: verdict for id, verdict in verdicts.items() if verdict}
    with replace_whole(out / VERDICTS[0]) as temporary:
        temporary.write_text(json.dumps({"verdicts": given}, indent=1), encoding="utf-8")


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Review of clips</title>
<meta name="viewport" content="width=device-width">
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 0; color: #22262b; background: #f4f6f8 }
header { position: sticky; top: 0; z-index: 1; background: #fff; border-bottom: 1px solid #d5dae0; padding: 10px 20px;
  display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center }
h1 { font-size: 18px; margin: 0 } header span { color: #66707b }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(440px, 1fr)); gap: 14px; padding: 14px 20px }
article { background: #fff; border: 1px solid #d5dae0; border-left: 6px solid #9aa5b1; border-radius: 6px;
  padding: 10px }
article.keep { border-left-color: #2a9d8f } article.drop { border-left-color: #d1495b }
article:focus { outline: 2px solid #2f6690 }
img, video { width: 100%; display: block; border-radius: 3px; background: #e2e6ea; aspect-ratio: 4 / 1 }
video { aspect-ratio: 1; max-height: 420px; object-fit: contain }
.source { font-size: 13px; color: #66707b; overflow-wrap: anywhere; margin: 6px 0 }
dl { display: flex; flex-wrap: wrap; gap: 2px 18px; margin: 6px 0 } dl div { display: flex; gap: 6px }
dt { color: #66707b } dd { margin: 0; font-variant-numeric: tabular-nums } .bad { color: #d1495b; font-weight: 600 }
button, select { font: inherit; padding: 4px 12px; border: 1px solid #b8c0c9; border-radius: 4px; background: #fff;
  cursor: pointer }
button[aria-pressed=true] { background: #22262b; color: #fff; border-color: #22262b }
#save { background: #2f6690; color: #fff; border-color: #2f6690 }
.row { display: flex; gap: 6px; align-items: center; flex-wrap: wrap }
</style></head><body>
<header><h1>Review of clips</h1><span id="count"></span>
<select id="show"><option value="all">all clips</option><option value="undecided">without verdict</option>
<option value="keep">kept</option><option value="drop">dropped</option></select>
<button id="back">&larr;</button><span id="page"></span><button id="next">&rarr;</button>
<span id="pages"></span>
<button id="save">Save verdicts.json</button>
<span>Put it into this folder and run <code>prepare</code> again. Keys on a clip: K keep, D drop, A automatic, space
plays.</span></header>
<main></main>
<script id="data" type="application/json">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const {clips, quality, sync, offset, digest, pages} = data;
const PER_PAGE = 48, store = `verdicts:${location.pathname.replace(/[^/]*$/, "")}:${digest}`;
const verdicts = {...data.verdicts}, changed = {};
try { Object.assign(changed, JSON.parse(localStorage.getItem(store) || "{}")) } catch {}
Object.assign(verdicts, changed);
let page = 0;
const make = (tag, text, kind) => {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return node;
};
const decision = clip => verdicts[clip.id] || clip.decision;
function card(clip) {
  const box = make("article"), strip = make("img"), scores = make("dl"), choice = make("div", undefined, "row");
  box.tabIndex = 0;
  strip.src = "review/" + clip.id + ".jpg"; strip.loading = "lazy"; strip.alt = "four pictures of the clip";
  const play = () => {
    const video = make("video");
    video.src = "clips/" + clip.id + ".mp4"; video.controls = video.autoplay = video.loop = true;
    strip.replaceWith(video);
  };
  strip.onclick = play;
  const score = (name, value, bad) => {
    if (value === null) return;
    const pair = make("div");
    pair.append(make("dt", name), make("dd", value, bad ? "bad" : ""));
    scores.append(pair);
  };
  const round = (value, digits) => value === null ? null : value.toFixed(digits);
  score("length", (clip.end - clip.start).toFixed(1) + " s");
  score("quality", round(clip.quality, 1), clip.quality < quality);
  score("sync", round(clip.sync_confidence, 2), clip.sync_confidence < sync);
  score("distance", round(clip.sync_distance, 2));
  score("offset", clip.sync_offset, Math.abs(clip.sync_offset) > offset);
  score("doubt", clip.doubt.toFixed(2));
  const buttons = {}, said = make("span");
  const paint = () => {
    const verdict = verdicts[clip.id] || "";
    for (const [name, button] of Object.entries(buttons)) button.setAttribute("aria-pressed", name === verdict);
    box.className = decision(clip);
    said.textContent = "automatic: " + clip.decision + (clip.detail ? ", " + clip.detail : "");
  };
  const judge = verdict => {
    if (verdict) verdicts[clip.id] = verdict; else delete verdicts[clip.id];
    changed[clip.id] = verdict;
    try { localStorage.setItem(store, JSON.stringify(changed)) } catch {}
    paint(); count();
  };
  for (const [name, text] of [["keep", "Keep"], ["drop", "Drop"], ["", "Automatic"]]) {
    buttons[name] = make("button", text);
    buttons[name].onclick = () => judge(name);
    choice.append(buttons[name]);
  }
  choice.append(said);
  box.onkeydown = event => {
    const key = {k: "keep", d: "drop", a: ""}[event.key.toLowerCase()];
    if (key !== undefined) judge(key);
    else if (event.key === " " && event.target === box) { event.preventDefault(); play(); }
  };
  const place = clip.source + ", " + clip.start.toFixed(2) + " to " + clip.end.toFixed(2) + " s";
  box.append(strip, make("div", place, "source"), scores, choice);
  paint();
  return box;
}
const chosen = () => {
  const show = document.getElementById("show").value;
  return clips.filter(clip => show === "all" || (show === "undecided" ? !verdicts[clip.id] : decision(clip) === show));
};
function count() {
  const kept = clips.filter(clip => decision(clip) === "keep").length;
  document.getElementById("count").textContent =
    `${clips.length} clips, ${kept} kept, ${clips.filter(clip => verdicts[clip.id]).length} judged by hand`;
}
function draw() {
  const list = chosen(), screens = Math.max(1, Math.ceil(list.length / PER_PAGE));
  page = Math.min(Math.max(page, 0), screens - 1);
  document.getElementById("page").textContent = `page ${page + 1} of ${screens}`;
  document.querySelector("main").replaceChildren(...list.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
  count(); scrollTo(0, 0);
}
if (pages.length > 1) {
  const places = document.getElementById("pages");
  places.append(`part ${data.page + 1} of ${pages.length} `);
  for (const [text, number] of [["before", data.page - 1], ["after", data.page + 1]]) {
    if (!pages[number]) continue;
    const link = make("a", text);
    link.href = pages[number];
    places.append(" ", link);
  }
}
document.getElementById("show").onchange = () => { page = 0; draw(); };
document.getElementById("back").onclick = () => { page--; draw(); };
document.getElementById("next").onclick = () => { page++; draw(); };
document.getElementById("save").onclick = () => {
  const judged = Object.fromEntries(Object.entries(verdicts).filter(([, verdict]) => verdict));
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({verdicts: judged}, null, 1)], {type: "application/json"}));
  link.download = "verdicts.json";
  link.click();
};
draw();
</script></body></html>
"""
