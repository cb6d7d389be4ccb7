"""`python -m training emotion`: label tables, features, training and report of the emotion detector."""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from memo_core.checkpoint.layout import EMOTION_HEAD, assets
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead

from ..reading import read_json
from .features import FeatureStore, encoder_digest, segments
from .labels import LabelError, LabelTable, load_tables, published
from .readers import Clip, Found, Rejected, read_clips, read_csv, read_folder, text_table, without_repeats, write_rows
from .report import check_packages, table, write_report
from .toon import make_toon_sets
from .train import JOB, EmotionConfig, evaluate, split, train, write_json

TOON = EmotionConfig(hidden_dim=64, steps=600, batch_size=128, learning_rate=1e-3, warmup=60, split_by="speaker")
TOON_RUNS = {
    "core": TOON,
    "supcon": replace(TOON, regulariser="supcon", temperature=0.1),
    "none": replace(TOON, regulariser="none"),
    "linear": replace(TOON.linear(), learning_rate=1e-2),
}
ACCURACY = "accuracy.json"  # of `toon`: percent by kind of run, set and seed
BASELINE = "baseline"  # folder of the linear baseline, in that of a run


def add_command(commands: argparse._SubParsersAction) -> None:
    """Adds `emotion` and what it does."""
    parser = commands.add_parser("emotion", help="train the emotion detector", description=__doc__)
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    sets = actions.add_parser("sets", help="list the label tables")
    sets.add_argument("--labels", action="store_true", help="with every label and its class")
    sets.set_defaults(run=lambda args: print(describe_sets(published(), args.labels)))

    make = actions.add_parser("prepare", help="read data sets and compute their features")
    make.add_argument("out", type=Path, help="gets clips.csv, rejected.csv and features.sqlite")
    make.add_argument("--encoder", type=Path, required=True, help="folder of emotion2vec: model.pt and config.yaml")
    make.add_argument("--set", action="append", default=[], metavar="KEY=FOLDER", help="a data set; may be repeated")
    make.add_argument("--csv", action="append", default=[], type=Path, metavar="FILE", help="a list: path,label,...")
    make.add_argument("--tables", type=Path, metavar="FILE", help="more label tables, in the form of datasets.yaml")
    make.add_argument("--device", default="cpu", help="where emotion2vec runs (%(default)s)")
    make.add_argument("--workers", type=int, default=2, help="threads that decode sound (%(default)s)")
    make.set_defaults(run=_prepare)

    learn = actions.add_parser("train", help="train the head on what prepare made, and report")
    learn.add_argument("out", type=Path, help="what prepare wrote; gets config.json, the head in misc/ and the report")
    learn.add_argument("--device", default="cpu", help="where the head is trained (%(default)s)")
    learn.add_argument(
        "--baseline", action=argparse.BooleanOptionalAction, default=True, help="train a linear layer, too, to compare"
    )
    for item in fields(EmotionConfig):  # what a run was begun with is its own default
        kind, name = type(item.default), f"--{item.name.replace('_', '-')}"
        learn.add_argument(name, type=kind, help=f"({item.default})")
    learn.set_defaults(run=_train)

    show = actions.add_parser("report", help="accuracy per data set of a trained head")
    show.add_argument("out", type=Path, help="what train wrote")
    show.add_argument("--head", type=Path, help="another head to measure on the same clips, which is only printed")
    show.set_defaults(run=_report)

    toon = actions.add_parser("toon", help="all of it on toon voices, with each regulariser and with none")
    toon.add_argument("out", type=Path, nargs="?", default=Path("runs/emotion_toon"), help="(%(default)s)")
    toon.add_argument("--seeds", type=int, default=3, help="runs of each kind (%(default)s)")
    toon.set_defaults(run=lambda args: print(show_toon(args.out, args.seeds)))


def describe_sets(tables: dict[str, LabelTable], labels: bool = False) -> str:
    """A table of the data sets: what the paper tells of them, licence, and how they are read."""
    rows: list[list[object]] = [
        [
            key,
            t.name,
            t.source or "-",
            t.language,
            t.emotions or len(t.labels),
            t.utterances or "-",
            t.hours or "-",
            "no" if t.extra else "yes",
            t.licence or "not known",
            "folder" if t.pattern or t.tags else "csv",
        ]
        for key, t in tables.items()
    ]
    heads = ["key", "name", "source", "language", "emotions", "utterances", "hours", "in paper", "licence", "read from"]
    text = text_table(heads, rows)
    if labels:
        merged = [f"{k}: " + ", ".join(f"{own} -> {name}" for own, name in t.labels.items()) for k, t in tables.items()]
        text = "\n".join([text, "", *merged])
    return text


def prepare(
    out: Path, found: Found, encoder: Emotion2Vec, workers: int = 2
) -> tuple[list[Clip], list[Rejected], list[Tensor]]:
    """Encodes what readers found into out/features.sqlite and lists it in out/clips.csv and out/rejected.csv.

    The lists are of this call alone; features of earlier ones stay, so that going on or adding a set costs only what is
    new.

    Returns:
        the clips that have features, cut into segments where they are long, the rejected rows, and per clip its windows
        [N, C].
    """
    found = without_repeats(found)
    if not found.clips:
        reasons = "; ".join(sorted({row.reason for row in found.rejected})[:3])
        raise LabelError(f"no labelled recording was found{': ' + reasons if reasons else ''}")
    out.mkdir(parents=True, exist_ok=True)
    digest = encoder_digest(encoder)
    with FeatureStore(out / "features.sqlite", digest) as store:
        found.rejected += store.fill(found.clips, encoder, workers)
        found.clips, features = _with_features(found.clips, store)
    write_json(out / "prepared.json", {"encoder": digest})
    write_rows(out / "clips.csv", Clip, found.clips)
    write_rows(out / "rejected.csv", Rejected, found.rejected)
    print(found.summary())
    clips, features = in_segments(found.clips, features)
    return clips, found.rejected, features


def load_prepared(out: Path) -> tuple[list[Clip], list[Tensor]]:
    """The clips of out/clips.csv whose features are there, in segments, and these; as `prepare` returned them.

    Raises LabelError where prepare has not been run.
    """
    clips = read_clips(out / "clips.csv")
    path = out / "prepared.json"
    digest = read_json(path, lambda text: LabelError(f"{text}; run prepare again")).get("encoder")
    if not isinstance(digest, str):
        raise LabelError(f"{path} names no encoder; run prepare again")
    with FeatureStore(out / "features.sqlite", digest) as store:
        kept, features = _with_features(clips, store)
    if len(kept) < len(clips):
        print(f"{len(clips) - len(kept)} of {len(clips)} recordings are gone or changed since prepare; left out")
    return in_segments(kept, features)


def in_segments(clips: list[Clip], features: list[Tensor]) -> tuple[list[Clip], list[Tensor]]:
    """Long recordings as one clip for each of their `features.segments`, with the same label; others as they are."""
    pieces = [segments(windows) for windows in features]
    return [clip for clip, own in zip(clips, pieces) for _ in own], [windows for own in pieces for windows in own]


def fit(
    out: Path,
    clips: list[Clip],
    features: list[Tensor],
    config: EmotionConfig,
    device: str = "cpu",
    baseline: bool = False,
) -> dict[str, Any]:
    """Splits, trains, and writes splits.csv and the report into `out`; returns `train.evaluate`'s result.

    With `baseline` a linear layer is trained on the same clips, too, in out/baseline; its result lies under "baseline".
    """
    check_packages()
    parts = split(clips, config.test_share, config.split_by, config.seed)
    clips = [replace(clip, split=part) for clip, part in zip(clips, parts)]
    head = train(out, clips, features, config, device)
    write_rows(out / "splits.csv", Clip, clips)
    result = evaluate(head, clips, features)
    if baseline:
        linear = train(out / BASELINE, clips, features, config.linear(), device)
        result["baseline"] = evaluate(linear, clips, features)
    write_report(out, result)
    return result


def show_toon(out: Path, seeds: int = 3) -> str:
    """Makes the toon sets, trains with each regulariser and with none, and tells how each did on new voices.

    The detector stays in out/core_0/misc/audio_emotion_classifier, each seed's accuracies in out/accuracy.json.
    """
    started = time.monotonic()
    lists, tables = make_toon_sets(out / "sets")
    encoder = Emotion2Vec.from_pretrained(assets() / "toon" / "emotion2vec")
    clips, _, features = prepare(out, read_csv(lists, {**published(), **load_tables(tables)}), encoder)
    scores: dict[str, list[dict[str, Any]]] = {name: [] for name in [*TOON_RUNS, "head trained with the encoder"]}
    shipped = EmotionHead.from_pretrained(assets() / "toon" / EMOTION_HEAD)
    for seed in range(seeds):
        for name, config in TOON_RUNS.items():
            scores[name].append(fit(out / f"{name}_{seed}", clips, features, replace(config, seed=seed)))
        tested = read_clips(out / f"none_{seed}" / "splits.csv")
        scores["head trained with the encoder"].append(evaluate(shipped, tested, features))
    keys = list(scores["none"][0]["sets"])
    columns = {
        name: [[100 * result["sets"][key]["accuracy"] for result in results] for key in keys]
        + [[100 * result["all"]["accuracy"] for result in results]]
        for name, results in scores.items()
    }
    heads = [*keys, "all clips"]
    write_json(out / ACCURACY, {name: dict(zip(heads, values)) for name, values in columns.items()})
    for name in ("core", "supcon", "linear"):
        pairs = zip(columns[name], columns["none"])
        columns[f"{name} - none"] = [[a - b for a, b in zip(*pair)] for pair in pairs]
    rows: list[list[object]] = [[name, *map(_spread, values)] for name, values in columns.items()]
    return "\n".join(
        [
            "seed 0 with the regulariser core, on voices that the head has not heard:",
            table(scores["core"][0]),
            f"accuracy %, mean and standard deviation of {seeds} seeds (of the split, the weights and the batches):",
            text_table(["run", *heads], rows),
            f"{time.monotonic() - started:.0f} s",
        ]
    )


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.1f} ± {deviation:.1f}"


def _prepare(args: argparse.Namespace) -> None:
    tables = dict(published())
    if args.tables:
        tables |= load_tables(args.tables)
    if not args.set and not args.csv:
        raise SystemExit("name at least one --set KEY=FOLDER or --csv FILE")
    encoder = Emotion2Vec.from_pretrained(args.encoder, device=args.device)  # a missing file is said before the work
    found = Found()
    for item in args.set:
        key, _, folder = item.partition("=")
        if key not in tables or not folder:
            raise SystemExit(f"--set {item!r} is not KEY=FOLDER; keys are {', '.join(tables)}")
        found.extend(read_folder(folder, tables[key]))
    for path in args.csv:
        found.extend(read_csv(path, tables))
    _, rejected, _ = prepare(args.out, found, encoder, args.workers)
    if rejected:
        print(f"{len(rejected)} rejected, with reasons in {args.out / 'rejected.csv'}")


def _train(args: argparse.Namespace) -> None:
    begun = (args.out / JOB / "state.pt").exists()
    config = EmotionConfig.load(args.out / "config.json") if begun else EmotionConfig()
    given = {item.name: getattr(args, item.name) for item in fields(EmotionConfig)}
    config = replace(config, **{name: value for name, value in given.items() if value is not None})
    clips, features = load_prepared(args.out)
    print(table(fit(args.out, clips, features, config, args.device, args.baseline)))
    print(f"the head lies in {args.out / EMOTION_HEAD}; copy it over that of a checkpoint to use it")


def _report(args: argparse.Namespace) -> None:
    clips, features = load_prepared(args.out)
    parts = {clip.path: clip.split for clip in read_clips(args.out / "splits.csv")}
    clips = [replace(clip, split=parts.get(clip.path, "")) for clip in clips]
    result = evaluate(EmotionHead.from_pretrained(args.head or args.out / EMOTION_HEAD), clips, features)
    if (args.out / BASELINE / EMOTION_HEAD).is_dir():
        result["baseline"] = evaluate(EmotionHead.from_pretrained(args.out / BASELINE / EMOTION_HEAD), clips, features)
    print(table(result))
    if not args.head:
        write_report(args.out, result)


def _with_features(clips: list[Clip], store: FeatureStore) -> tuple[list[Clip], list[Tensor]]:
    kept, features = [], []
    for clip in clips:
        values = store.get(clip.path)
        if values is not None:
            kept.append(clip)
            features.append(values)
    return kept, features
