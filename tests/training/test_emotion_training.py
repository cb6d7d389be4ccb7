"""Training of the emotion detector: label tables, readers, features, split, loss, resume, report."""

import argparse
import json
import math
import os
import wave
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import torch

from memo_core.checkpoint.layout import EMOTION_HEAD, assets
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.errors import AudioError, EmotionError
from memo_core.inputs.emotion import detect_emotion
from memo_core.inputs.sound import load_audio
from memo_core.release import EMOTIONS
from training.emotion.command import add_command, fit, load_prepared, prepare
from training.emotion.features import FeatureStore, encode, encoder_digest, load_windows
from training.emotion.labels import CLASSES, DROP, LabelError, load_tables, published
from training.emotion.readers import Clip, Found, read_clips, read_csv, read_folder, write_rows
from training.emotion.report import table, write_report
from training.emotion.train import EmotionConfig, evaluate, head_loss, split, supervised_contrastive, train

SMALL = EmotionConfig(hidden_dim=32, steps=40, batch_size=32, learning_rate=2e-3, warmup=5)


@pytest.fixture(scope="module")
def encoder():
    return Emotion2Vec.from_pretrained(assets() / "toon" / "emotion2vec")


def write_wav(path: Path, seconds: float = 0.5, seed: int = 0, level: float = 0.1, offset: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = level * np.random.default_rng(seed).standard_normal(round(seconds * 16000)).clip(-3, 3) + offset
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes((samples * 10000).astype("<i2").tobytes())
    return path


def clusters(count: int = 240, width: int = 16, spread: float = 1.0) -> tuple[list[Clip], list[torch.Tensor]]:
    """Clips of two data sets of 4 speakers each, whose features lie around one point per class."""
    rng = torch.Generator().manual_seed(3)
    centres = torch.randn(8, width, generator=rng) * 2
    clips, features = [], []
    for i in range(count):
        emotion = i % 8
        clips.append(
            Clip(f"/d/{i}.wav", ("a", "b")[i % 2 if i < 200 else 0], CLASSES[emotion], emotion, f"s{i // 8 % 4}")
        )
        features.append(centres[emotion] + spread * torch.randn(1 + i % 2, width, generator=rng))
    return clips, features


def with_parts(clips: list[Clip], **options) -> list[Clip]:
    return [replace(clip, split=part) for clip, part in zip(clips, split(clips, **options))]


# Label tables


def test_every_label_of_every_set_has_one_of_the_eight_classes_or_is_dropped():
    tables = published()
    assert len(tables) >= 25
    assert {"ravdess", "ravdess_song", "crema_d", "esd", "emodb"} <= set(tables)
    for key, own in tables.items():
        assert own.name and own.language and own.url.startswith("http"), key
        for label in [*own.labels, *own.codes]:
            emotion = own.emotion(label)
            assert emotion in range(8) or own.labels[own.original(label)] == DROP, (key, label)
        heard = {own.emotion(label) for label in own.labels} - {None}
        assert len(heard) >= 3 and CLASSES.index("angry") in heard, key


def test_labels_are_read_in_any_case_and_as_codes():
    tables = published()
    assert tables["emodb"].original("W") == "Ärger"
    assert EMOTIONS[tables["emodb"].emotion("W")] == "angry"
    assert EMOTIONS[tables["msp_podcast"].emotion(" u ")] == "surprised"
    assert tables["msp_podcast"].emotion("X") is None
    assert tables["cafe"].original("COLE\u0300RE") == "colère"
    assert EMOTIONS[tables["iemocap"].emotion("EXC")] == "happy"
    with pytest.raises(LabelError, match="ravdess has no label 'bored'.*calm"):
        tables["ravdess"].emotion("bored")


@pytest.mark.parametrize(
    "text, problem",
    [
        ("mine: {labels: {a: furious}}", "'furious'; allowed are angry"),
        ("mine: {labels: {a: angry}, codes: {x: b}}", "'b', which is not among"),
        ("mine: {labels: {a: angry}, pattern: '(?P<label>'}", "no regular expression"),
        ("mine: {labels: {a: angry}, pattern: 'x'}", "no group named label"),
        ("mine: {}", "no labels"),
        ("[", "cannot be read"),
        ("5", "not a table"),
    ],
)
def test_a_bad_label_table_is_refused(tmp_path, text, problem):
    (tmp_path / "tables.yaml").write_text(text)
    with pytest.raises(LabelError, match=problem):
        load_tables(tmp_path / "tables.yaml")


# Readers


@pytest.mark.parametrize("key", [key for key, own in published().items() if own.pattern])
def test_a_set_is_read_from_files_named_as_published(tmp_path, key):
    own = published()[key]
    path, label, speaker = own.example
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / PurePosixPath(path).with_name("holiday.wav")).write_bytes(b"")
    (tmp_path / "._05-hidden.wav").write_bytes(b"")
    found = read_folder(tmp_path, own)
    wanted = own.emotion(label)
    good = [clip for clip in found.clips if clip.path == str(tmp_path / path)]
    assert good == [Clip(str(tmp_path / path), key, label, wanted, speaker, name=path)]
    if len(found.clips) == 1:  # EmoV-DB's labels are in the folder's name alone
        assert [Path(row.path).name for row in found.rejected] == ["holiday.wav"]


def test_the_four_sets_that_everybody_has(tmp_path):
    for name in (
        "ravdess/Actor_18/03-01-05-01-02-01-18.wav",
        "ravdess/Actor_18/03-01-02-01-02-01-18.wav",
        "ravdess/Actor_18/03-02-05-01-02-01-18.wav",  # a song
        "ravdess/Actor_18/02-01-05-01-02-01-18.mp4",  # the picture of the first one
        "crema_d/AudioWAV/1001_DFA_DIS_XX.wav",
        "crema_d/AudioWAV/1001_DFA_ZZZ_XX.wav",
        "crema_d/AudioWAV/1040_ITH_SAD_X.wav",  # so the set has it
        "esd/0011/Surprise/0011_001401.wav",
        "esd/0011/Sad/evaluation/0011_001051.wav",
        "emodb/wav/16b10Lb.wav",
        "emodb/wav/03a01Nc.wav",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = {key: read_folder(tmp_path / key, published()[key]) for key in ("ravdess", "crema_d", "esd", "emodb")}
    told = {key: [(c.label, EMOTIONS[c.emotion], c.speaker) for c in f.clips] for key, f in found.items()}
    assert told == {
        "ravdess": [("calm", "neutral", "18"), ("angry", "angry", "18")],
        "crema_d": [("DIS", "disgusted", "1001"), ("SAD", "sad", "1040")],
        "esd": [("Sad", "sad", "0011"), ("Surprise", "surprised", "0011")],
        "emodb": [("neutral", "neutral", "03"), ("Langeweile", "other", "16")],
    }
    assert len(found["ravdess"].rejected) == 2
    assert "no label 'ZZZ'" in found["crema_d"].rejected[0].reason
    summary = found["ravdess"].summary().splitlines()
    assert summary[1].split()[:3] == ["ravdess", "2", "1"] and summary[1].split()[-1] == "2"
    songs = read_folder(tmp_path / "ravdess", published()["ravdess_song"])
    assert [clip.label for clip in songs.clips] == ["angry"]


def test_a_list_reads_what_folders_cannot(tmp_path):
    (tmp_path / "list.csv").write_text(
        "\ufeffpath,label,split,speaker,dataset\n"
        "a.wav,joy,train,Ross,meld\n"
        "b.wav,fearful,,,\n"
        "c.wav,joy,,,\n"
        "d.wav,joy,dev,,meld\n"
        "e.wav,joy,,,friends\n"
        ",joy,,,meld\n"
        "f.wav\n"
        "g.wav,xxx,test,,iemocap\n"
    )
    found = read_csv(tmp_path / "list.csv")
    assert found.clips == [
        Clip(str(tmp_path / "a.wav"), "meld", "joy", 3, "Ross", "train", "a.wav"),
        Clip(str(tmp_path / "b.wav"), "plain", "fearful", 2, name="b.wav"),
    ]
    reasons = [row.reason for row in found.rejected]
    assert ["no label 'joy'" in reasons[0], "'dev'" in reasons[1], "'friends'" in reasons[2]] == [True] * 3
    assert "line 7" in reasons[3] and "no label ''" in reasons[4]
    assert found.dropped == {("iemocap", "xxx"): 1}
    (tmp_path / "bad.csv").write_text("file,emotion\na.wav,joy\n")
    with pytest.raises(LabelError, match="no column label and path"):
        read_csv(tmp_path / "bad.csv")


def test_a_folder_or_set_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(LabelError, match="meld keeps its labels.*--csv"):
        read_folder(tmp_path, published()["meld"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_folder(tmp_path / "nowhere", published()["esd"])


def test_clips_come_back_from_their_list(tmp_path):
    clips = [Clip('/a "b",\n.wav', "esd", "Sad", 6, "0011", "test"), Clip("/c\udcff.wav", "esd", "Sad", 6)]
    write_rows(tmp_path / "clips.csv", Clip, clips)
    assert read_clips(tmp_path / "clips.csv") == clips
    (tmp_path / "clips.csv").write_text("path,dataset,label,emotion,speaker,split\na,b,c,8,,\n")
    with pytest.raises(LabelError, match="beyond 0 to 7"):
        read_clips(tmp_path / "clips.csv")
    with pytest.raises(LabelError, match="prepare"):
        read_clips(tmp_path / "none.csv")


# Features


def test_windows_are_of_3_s_and_the_last_one_ends_with_the_sound(tmp_path):
    path = write_wav(tmp_path / "a.wav", 7.5)
    samples = load_audio(path)[0][0]
    windows = load_windows(path)
    assert [len(window) for window in windows] == [48000] * 3
    for window, start in zip(windows, (0, 48000, 120000 - 48000)):
        torch.testing.assert_close(window, samples[start : start + 48000])
    assert [len(w) for w in load_windows(write_wav(tmp_path / "b.wav", 1.25))] == [20000]
    assert len(load_windows(write_wav(tmp_path / "c.wav", 6.0))) == 2


def test_features_are_those_that_the_detector_classifies(tmp_path, encoder):
    path = write_wav(tmp_path / "a.wav", 1.9, offset=0.5)
    head = EmotionHead(feature_dim=encoder.feature_dim, hidden_dim=8)
    waveform, rate = load_audio(path)
    said = detect_emotion(waveform, rate, encoder, head, 57).probabilities
    with torch.no_grad():
        torch.testing.assert_close(head(encode(load_windows(path), encoder)).softmax(1), said[:1], atol=1e-5, rtol=1e-4)


def test_a_file_is_encoded_once_and_a_broken_one_costs_a_row(tmp_path, encoder):
    good = [write_wav(tmp_path / f"{i}.wav", 0.4 + 0.1 * (i % 2), seed=i) for i in range(4)]
    (tmp_path / "text.wav").write_text("hello")
    (tmp_path / "empty.wav").write_bytes(b"")
    (tmp_path / "cut.wav").write_bytes(good[0].read_bytes()[:30])
    (tmp_path / "folder.wav").mkdir()
    bad = {
        tmp_path / "text.wav": "cannot be decoded",
        tmp_path / "empty.wav": "empty",
        tmp_path / "cut.wav": "",
        tmp_path / "folder.wav": "Is a directory",
        tmp_path / "gone.wav": "gone.wav",
        Path("/nul\0.wav"): "null",
        write_wav(tmp_path / "short.wav", 0.01): "at least",
        write_wav(tmp_path / "long.wav", 61): "61 s",
        write_wav(tmp_path / "silent.wav", 1, level=0): "silent",
    }
    clips = [Clip(str(path), "plain", "sad", 6) for path in [*list(bad)[:3], *good, *list(bad)[3:]]]
    with FeatureStore(tmp_path / "store.sqlite", encoder_digest(encoder)) as store:
        rejected = store.fill(clips, encoder)
        assert {row.path for row in rejected} == {str(path) for path in bad}
        for row in rejected:
            assert bad[Path(row.path)] in row.reason
        for path in good:
            torch.testing.assert_close(store.get(str(path)), encode(load_windows(path), encoder), atol=1e-5, rtol=1e-4)

    class Refuses:
        min_samples, feature_dim = encoder.min_samples, encoder.feature_dim

        def parameters(self):
            return encoder.parameters()

        def __call__(self, batch):
            raise AssertionError("encoded again")

    with FeatureStore(tmp_path / "store.sqlite", encoder_digest(encoder)) as store:
        assert store.fill(clips[3:7], Refuses()) == []
        write_wav(good[0], 0.9, seed=9)  # another recording under the same name
        with pytest.raises(AssertionError, match="encoded again"):
            store.fill(clips[3:7], Refuses())
    with FeatureStore(tmp_path / "store.sqlite", "another encoder") as store:
        assert store.get(str(good[1])) is None


def test_a_store_that_is_none_is_refused(tmp_path):
    (tmp_path / "store.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(AudioError, match="delete it"):
        FeatureStore(tmp_path / "store.sqlite", "x")


# Split


def test_each_set_is_split_3_to_1_whatever_order_and_folder_the_files_lie_in():
    clips, _ = clusters(241)
    parts = split(clips)
    for name in ("a", "b"):
        own = [part for clip, part in zip(clips, parts) if clip.dataset == name]
        assert own.count("test") == round(len(own) / 4)
    named = [replace(clip, name=Path(clip.path).name) for clip in clips]
    moved = [replace(clip, path=f"/elsewhere/x{clip.path}") for clip in reversed(named)]
    assert split(moved) == split(named)[::-1]
    assert split(clips, seed=1) != parts
    given = [replace(clips[0], split="test"), replace(clips[1], split="train"), *clips[2:]]
    assert split(given)[:2] == ["test", "train"]


def test_by_speaker_nobody_is_heard_in_both_parts():
    clips, _ = clusters()
    parts = split(clips, by="speaker")
    for name in ("a", "b"):
        sides = [
            {clip.speaker for clip, part in zip(clips, parts) if clip.dataset == name and part == side}
            for side in ("train", "test")
        ]
        assert len(sides[0]) == 3 and len(sides[1]) == 1 and not sides[0] & sides[1]
    assert set(split([replace(clip, speaker="") for clip in clips], by="speaker")) == {"train"}


# Loss


def test_the_contrastive_loss_of_a_case_worked_by_hand():
    # Unit vectors at 0, 90 and 180 degrees; the first two share a class. At temperature 1, anchor 1 has similarities 0
    # (its partner) and -1, anchor 2 has 0 (its partner) and 0; anchor 3 is alone.
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    labels = torch.tensor([4, 4, 1])
    wanted = (math.log(1 + math.exp(-1)) + math.log(2)) / 2
    assert float(supervised_contrastive(features, labels, 1.0)) == pytest.approx(wanted, abs=1e-6)
    # Two partners: their mean. Anchor 0 of three equal vectors and one opposite one, at temperature 1/2.
    features = torch.tensor([[1.0, 0.0]] * 3 + [[-1.0, 0.0]])
    wanted = math.log(2 * math.exp(2) + math.exp(-2)) - 2
    assert float(supervised_contrastive(features, torch.tensor([0, 0, 0, 1]), 0.5)) == pytest.approx(wanted, abs=1e-5)


def test_the_contrastive_loss_has_the_right_gradient_and_none_without_partners():
    torch.manual_seed(0)
    features = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 0, 2, 1, 0])
    assert torch.autograd.gradcheck(lambda x: supervised_contrastive(x, labels, 0.3), features)
    lonely = supervised_contrastive(features, torch.arange(6), 0.3)
    lonely.backward()
    assert float(lonely.detach()) == 0 and float(features.grad.abs().max()) == 0


def test_the_regulariser_brings_a_class_together():
    clips, features = clusters(spread=1.5)
    data, labels = torch.cat([f[:1] for f in features]), torch.tensor([clip.emotion for clip in clips])

    def tightness(weight):
        torch.manual_seed(0)
        head = EmotionHead(data.shape[1], 32)
        config = replace(SMALL, contrastive_weight=weight)
        optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
        for _ in range(60):
            cross_entropy, contrastive = head_loss(head, data, labels, config)
            optimizer.zero_grad()
            (cross_entropy + weight * contrastive).backward()
            optimizer.step()
        with torch.no_grad():
            return float(supervised_contrastive(head.layers[:-1](data), labels, config.temperature))

    assert tightness(1.0) < tightness(0.0) - 0.1


# Training


def test_a_run_learns_and_its_head_lies_where_a_checkpoint_has_it(tmp_path, encoder):
    clips, features = clusters(width=encoder.feature_dim)
    clips = with_parts(clips)
    untrained = evaluate(EmotionHead(encoder.feature_dim, 32), clips, features)
    config = replace(SMALL, steps=150)
    head = train(tmp_path, clips, features, config)
    result = evaluate(head, clips, features)
    assert untrained["all"]["accuracy"] < 0.4 and result["all"]["accuracy"] > 0.9
    stored = EmotionHead.from_pretrained(tmp_path / EMOTION_HEAD)
    assert (stored.feature_dim, stored.classes, len(stored.state_dict()) // 2) == (encoder.feature_dim, 9, 5)
    track = detect_emotion(torch.randn(32000), 16000, encoder, stored, 60)
    assert track.num_frames == 60
    assert EmotionConfig.load(tmp_path / "config.json") == config


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    clips, features = clusters()
    clips = with_parts(clips)
    whole = train(tmp_path / "whole", clips, features, SMALL)

    from training import run

    steps = []

    def stops(optimizer, loss, descend=run.descend):
        steps.append(1)
        if len(steps) == 17:
            raise KeyboardInterrupt
        descend(optimizer, loss)

    with monkeypatch.context() as patch:
        patch.setattr(run, "descend", stops)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "parts", clips, features, SMALL, save_every=0)
    resumed = train(tmp_path / "parts", clips, features, SMALL)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path / "parts", clips[1:], features[1:], SMALL)


def test_gradients_are_clipped_to_1():
    head = EmotionHead(4, 8)
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten() for p in head.parameters()])
    from training import run

    run.descend(optimizer, 1e4 * head(torch.randn(8, 4)).square().sum())
    after = torch.cat([p.detach().flatten() for p in head.parameters()])
    assert float((after - before).norm()) == pytest.approx(1.0, rel=1e-3)


def test_rare_classes_are_drawn_as_often_as_common_ones_if_asked():
    from training.emotion.train import _draw_batch, _weights

    labels = torch.tensor([0] * 990 + [5] * 10)
    for balance, share in (("none", 0.01), ("class", 0.5)):
        drawn = labels[_draw_batch(_weights(labels, balance), 20000, torch.Generator().manual_seed(0))]
        assert float((drawn == 5).float().mean()) == pytest.approx(share, abs=0.015)


@pytest.mark.parametrize(
    "values, problem",
    [({"balance": "set"}, "none, class"), ({"test_share": 1.0}, "0.25"), ({"temperature": 0.0}, "temperature 0.0")],
)
def test_settings_that_make_no_sense_are_refused(values, problem):
    with pytest.raises(EmotionError, match=problem):
        EmotionConfig(**values)


def test_nothing_to_train_on_is_said(tmp_path):
    with pytest.raises(EmotionError, match="none of the 0 clips"):
        train(tmp_path, [], [], SMALL)


# Report


def test_accuracy_and_confusion_are_counted_per_clip():
    class Says:
        """Logits are the features themselves."""

        feature_dim = classes = 9

        def parameters(self):
            return iter([torch.zeros(1)])

        def __call__(self, features):
            return features

    def clip(name, dataset, emotion, part="test"):
        return Clip(name, dataset, CLASSES[emotion], emotion, split=part)

    says = torch.eye(9) * 4
    clips = [clip("1", "a", 0), clip("2", "a", 6), clip("3", "a", 3), clip("4", "b", 6), clip("5", "b", 6, "train")]
    # The second clip: one window is very sure of sad, two are fairly sure of angry, and so is the mean probability.
    features = [says[[0]], torch.stack([says[6] * 3, says[0], says[0]]), says[[3]], says[[8]], says[[6]]]
    result = evaluate(Says(), clips, features)
    assert result["sets"]["a"] == {"train": 0, "test": 3, "accuracy": 2 / 3, "recall": pytest.approx(2 / 3)}
    assert result["sets"]["b"] == {"train": 1, "test": 1, "accuracy": 0.0, "recall": 0.0}
    assert result["all"]["accuracy"] == 0.5 and result["mean"] == pytest.approx(1 / 3)
    assert [result["confusion"][0][0], result["confusion"][6][0], result["confusion"][6][8]] == [1, 1, 1]
    assert table(result).splitlines()[1].split() == ["a", "0", "3", "66.7", "66.7"]


def test_the_report_has_a_table_figures_and_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    clips, features = clusters(60)
    clips = with_parts(clips) + [Clip("/lonely.wav", "untested", "sad", 6, split="train")]
    result = evaluate(EmotionHead(16, 8), clips, [*features, torch.zeros(1, 16)])
    write_report(tmp_path, result)
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(result))
    assert [line.split()[0] for line in (tmp_path / "report.txt").read_text().splitlines()][1:4] == [
        "a",
        "b",
        "untested",
    ]
    for name in ("accuracy.png", "confusion.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


# All of it


def test_toon_voices_from_files_to_a_head_that_knows_them_better_than_chance(tmp_path, encoder):
    pytest.importorskip("matplotlib")
    from training.emotion.toon import make_toon_sets

    lists, tables = make_toon_sets(tmp_path / "sets", share=0.05)
    (tmp_path / "sets" / "toon_four" / "00_Wut_0.wav").write_text("broken")
    found = read_csv(lists, load_tables(tables))
    clips, rejected, features = prepare(tmp_path / "out", found, encoder)
    assert {clip.dataset for clip in clips} == {"toon_full", "toon_four", "toon_codes"}
    assert {clip.label for clip in clips if clip.dataset == "toon_four"} == {"Wut", "Freude", "Trauer", "sachlich"}
    assert found.dropped == {("toon_codes", "XXX"): 4} and [Path(row.path).name for row in rejected] == ["00_Wut_0.wav"]
    again, same = load_prepared(tmp_path / "out")
    assert again == clips and all(torch.equal(a, b) for a, b in zip(same, features))
    result = fit(tmp_path / "out", clips, features, replace(SMALL, steps=150))
    assert result["all"]["accuracy"] > 0.4  # 8 classes
    assert [clip.split for clip in read_clips(tmp_path / "out" / "splits.csv")].count("test") == result["all"]["test"]


def test_a_split_does_not_depend_on_where_a_set_lies(tmp_path):
    parts = []
    for root in ("one", "two/deeper", "three"):
        for i in range(24):
            path = tmp_path / root / f"10{i:02}_DFA_ANG_XX.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        if root == "three":  # by a list
            lines = [f"10{i:02}_DFA_ANG_XX.wav,ANG,crema_d" for i in range(24)]
            (tmp_path / root / "list.csv").write_text("\n".join(["path,label,dataset", *lines]))
            clips = read_csv(tmp_path / root / "list.csv").clips
        else:
            clips = read_folder(tmp_path / root, published()["crema_d"]).clips
        write_rows(tmp_path / "clips.csv", Clip, clips)
        parts.append(split(read_clips(tmp_path / "clips.csv")))
    assert parts[0] == parts[1] == parts[2] and parts[0].count("test") == 6


def test_a_pipe_costs_its_row_and_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "x.wav")
    with pytest.raises(AudioError, match="not a regular file|Is a directory"):
        load_windows(tmp_path / "x.wav")


def test_a_missing_package_is_said_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    clips, features = clusters(16)
    with pytest.raises(EmotionError, match=r"matplotlib: pip install .comfyui-memo\[training\]"):
        fit(tmp_path, clips, features, SMALL)
    assert not list(tmp_path.iterdir())


def test_the_commands_do_the_same(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())

    def emotion(*words):
        args = parser.parse_args(["emotion", *map(str, words)])
        args.run(args)
        return capsys.readouterr().out

    assert "ravdess_song" in emotion("sets") and "calm -> neutral" in emotion("sets", "--labels")
    for speaker in range(1001, 1005):
        for i, label in enumerate(("ANG", "SAD", "HAP")):
            write_wav(tmp_path / "raw" / f"{speaker}_DFA_{label}_XX.wav", 0.4, seed=speaker + i)
    (tmp_path / "raw" / "1001_IEO_FEA_HI.wav").write_text("broken")
    out, encoder = tmp_path / "out", assets() / "toon" / "emotion2vec"
    said = emotion("prepare", out, "--encoder", encoder, "--set", f"crema_d={tmp_path / 'raw'}")
    assert said.splitlines()[1].split()[:3] == ["crema_d", "12", "4"] and "1 rejected" in said
    assert "1001_IEO_FEA_HI" in (out / "rejected.csv").read_text()
    said = emotion("train", out, "--steps", 5, "--hidden-dim", 16, "--split-by", "speaker", "--balance", "class")
    assert said.splitlines()[1].split()[:3] == ["crema_d", "9", "3"]
    again = emotion("report", out)
    assert again.splitlines() == said.splitlines()[:-1]
    other = emotion("report", out, "--head", assets() / "toon" / EMOTION_HEAD)
    assert other.splitlines()[0] == again.splitlines()[0]
    with pytest.raises(SystemExit, match="KEY=FOLDER"):
        emotion("prepare", out, "--encoder", encoder, "--set", "nothing")
    with pytest.raises(SystemExit, match="at least one"):
        emotion("prepare", out, "--encoder", encoder)


def test_no_recording_at_all_is_said(tmp_path, encoder):
    with pytest.raises(LabelError, match="no labelled recording"):
        prepare(tmp_path, Found(), encoder)
