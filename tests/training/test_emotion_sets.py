"""The emotion detector's data sets: label tables and readers."""

from pathlib import Path, PurePosixPath

import pytest
from emotion_clips import tagged

from memo_core.release import EMOTIONS
from training.emotion.labels import CLASSES, DROP, LabelError, load_tables, published
from training.emotion.readers import Clip, read_clips, read_csv, read_folder, write_rows
from training.emotion.report import PAPER_TOTAL

# Label tables


def test_the_sets_of_the_paper_are_there_as_its_table_2_counts_them():
    paper = {key: own for key, own in published().items() if not own.extra}
    assert len(paper) == 25 and {"mtg_jamendo", "ravdess_song", "jl_corpus"} <= set(paper)
    music = {"ravdess_song", "mtg_jamendo"}
    assert sum(own.hours for key, own in paper.items() if key not in music) == pytest.approx(143.8)
    assert sum(own.utterances for own in paper.values()) == 157_281
    assert paper["mtg_jamendo"].hours == 299.47 and paper["asvp_esd"].source == "Media"
    # Labels beyond those that the table counts stand for no class of their own.
    beyond = {key: len(own.labels) - own.emotions for key, own in paper.items() if len(own.labels) != own.emotions}
    assert beyond == {"asvp_esd": 2, "jl_corpus": 5, "mtg_jamendo": 3}
    for key, labels in (("asvp_esd", "breath unknown"), ("jl_corpus", "anxious concerned encouraging")):
        assert {EMOTIONS[paper[key].emotion(label)] for label in labels.split()} == {"other"}
    assert all(own.accuracy for own in paper.values()) and not published()["crema_d"].accuracy
    assert paper["mtg_jamendo"].accuracy == (65.30, 74.50) and PAPER_TOTAL == (68.78, 78.26)


def test_every_label_of_every_set_has_one_of_the_eight_classes_or_is_dropped():
    tables = published()
    assert {"ravdess", "ravdess_song", "crema_d", "esd", "emodb"} <= set(tables)
    for key, own in tables.items():
        assert own.name and own.language and own.url.startswith("http"), key
        for label in [*own.labels, *own.codes]:
            emotion = own.emotion(label)
            assert emotion in range(8) or own.labels[own.original(label)] == DROP, (key, label)
        heard = {own.emotion(label) for label in own.labels} - {None}
        assert len(heard) >= 3 and CLASSES.index("sad" if own.tags else "angry") in heard, key


def test_labels_are_read_in_any_case_and_as_codes():
    tables = published()
    assert tables["emodb"].original("W") == "Ärger"
    assert EMOTIONS[tables["emodb"].emotion("W")] == "angry"
    assert EMOTIONS[tables["msp_podcast"].emotion(" u ")] == "surprised"
    assert EMOTIONS[tables["msp_podcast"].emotion("X")] == "other"  # the raters did not agree
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
        "g.wav,noise,test,,mine\n"
    )
    (tmp_path / "tables.yaml").write_text("mine: {labels: {noise: drop, joy: happy}}")
    found = read_csv(tmp_path / "list.csv", published() | load_tables(tmp_path / "tables.yaml"))
    assert found.clips == [
        Clip(str(tmp_path / "a.wav"), "meld", "joy", 3, "Ross", "train", "a.wav"),
        Clip(str(tmp_path / "b.wav"), "plain", "fearful", 2, name="b.wav"),
    ]
    reasons = [row.reason for row in found.rejected]
    assert ["no label 'joy'" in reasons[0], "'dev'" in reasons[1], "'friends'" in reasons[2]] == [True] * 3
    assert "line 7" in reasons[3] and "no label ''" in reasons[4]
    assert found.dropped == {("mine", "noise"): 1}
    (tmp_path / "bad.csv").write_text("file,emotion\na.wav,joy\n")
    with pytest.raises(LabelError, match="no column label and path"):
        read_csv(tmp_path / "bad.csv")


def test_music_is_read_from_its_published_list_of_tags(tmp_path):
    folder = tagged(
        tmp_path / "mtg",
        "artist_1 01/1.mp3 film sad",  # a theme says nothing beside an emotion
        "artist_1 02/2.mp3 happy upbeat genre---rock",
        "artist_2 03/3.mp3 epic trailer",
        "artist_2 04/4.mp3 happy sad",  # which of them?
        "artist_3 05/5.mp3 relaxing",  # has been left out of the download
        "artist_3 06/6.mp3 furious",
        "artist_3 07/7.mp3 genre---rock",
    )
    (folder / "autotagging_moodtheme.tsv").open("a").write("track_1\tartist_1\n")
    for name in ("01/1.mp3", "02/2.low.mp3", "03/3.mp3", "04/4.mp3", "06/6.mp3", "07/7.mp3"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"")
    found = read_folder(folder, published()["mtg_jamendo"])
    assert [(c.name, c.label, EMOTIONS[c.emotion], c.speaker) for c in found.clips] == [
        ("01/1.mp3", "sad", "sad", "artist_1"),
        ("02/2.mp3", "happy", "happy", "artist_1"),
        ("03/3.mp3", "epic", "other", "artist_2"),
    ]
    assert found.clips[1].path == str(folder / "02/2.low.mp3")  # the smaller files of the same set
    assert found.dropped == {("mtg_jamendo", "tags of several emotions"): 1}
    reasons = [row.reason for row in found.rejected]
    for reason, part in zip(
        reasons, ("not in the folder", "no label 'furious'", "without tags", "line 9"), strict=True
    ):
        assert part in reason


def test_music_without_its_list_is_told_where_to_get_it(tmp_path):
    with pytest.raises(LabelError, match=r"copy it from https://github.com/MTG.*autotagging_moodtheme.tsv"):
        read_folder(tmp_path, published()["mtg_jamendo"])
    (tmp_path / "autotagging_moodtheme.tsv").write_text("path\tlabel\n")
    with pytest.raises(LabelError, match="does not begin with the columns TRACK_ID"):
        read_folder(tmp_path, published()["mtg_jamendo"])


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
