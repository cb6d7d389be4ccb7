"""From recordings of emotional speech to a trained head: features, segments, the commands."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from emotion_clips import SMALL, clusters, tagged, write_wav

from memo_core.checkpoint.layout import EMOTION_HEAD, assets
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.errors import AudioError, EmotionError
from memo_core.inputs.emotion import detect_emotion
from memo_core.inputs.sound import load_audio
from training.emotion.command import add_command, fit, load_prepared, prepare
from training.emotion.features import FeatureStore, encode, encoder_digest, load_windows
from training.emotion.labels import LabelError, load_tables, published
from training.emotion.readers import Clip, Found, read_clips, read_csv, read_folder, write_rows
from training.emotion.train import split


@pytest.fixture(scope="module")
def encoder():
    return Emotion2Vec.from_pretrained(assets() / "toon" / "emotion2vec")


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


def test_a_song_is_judged_in_segments_of_30_s_and_none_of_them_is_on_the_other_side(tmp_path, encoder):
    songs = [f"artist_{i} {i}/{i}.wav {tag}" for i, tag in enumerate(("happy", "sad", "calm", "film"))]
    folder = tagged(tmp_path / "mtg", *songs)
    for i, seconds in enumerate((60, 61, 80, 95)):
        write_wav(folder / f"{i}/{i}.wav", seconds, seed=i)
    clips, rejected, features = prepare(tmp_path / "out", read_folder(folder, published()["mtg_jamendo"]), encoder)
    assert not rejected and [Path(clip.path).stem for clip in clips] == [*"0111222333"[:1], *"111222", *"3333"]
    assert [len(windows) for windows in features] == [20, 10, 10, 1, 10, 10, 7, 10, 10, 10, 2]
    torch.testing.assert_close(
        features[1], encode(load_windows(folder / "1/1.wav")[:10], encoder), atol=1e-5, rtol=1e-4
    )
    assert {(clip.name, clip.label) for clip in clips if clip.name[0] == "2"} == {("2/2.wav", "calm")}
    again, same = load_prepared(tmp_path / "out")
    assert again == clips and all(torch.equal(a, b) for a, b in zip(same, features))
    for seed in range(8):
        sides = {(clip.path, part) for clip, part in zip(clips, split(clips, seed=seed))}
        assert sorted(part for _, part in sides) == ["test", "train", "train", "train"]


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
    assert said.splitlines()[1].split()[:3] == ["crema_d", "9", "3"] and "linear %" in said.splitlines()[0]
    assert emotion("train", out) == said  # goes on as it was begun
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
