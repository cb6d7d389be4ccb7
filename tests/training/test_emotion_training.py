"""Training of the emotion detector: split, losses, resume, report."""

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import pytest
import torch
from emotion_clips import SMALL, clusters, with_parts

from memo_core.checkpoint.layout import EMOTION_HEAD, assets
from memo_core.encoders.emotion2vec import Emotion2Vec
from memo_core.encoders.emotion_head import EmotionHead
from memo_core.errors import EmotionError
from memo_core.inputs.emotion import detect_emotion
from training.emotion.command import fit
from training.emotion.labels import CLASSES
from training.emotion.readers import Clip
from training.emotion.regularisers import CoreTuning, focal_contrastive, hard_pairs, mix_hard_pairs
from training.emotion.report import table, write_report
from training.emotion.train import EmotionConfig, evaluate, head_loss, split, supervised_contrastive, train


@pytest.fixture(scope="module")
def encoder():
    return Emotion2Vec.from_pretrained(assets() / "toon" / "emotion2vec")


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


@pytest.mark.parametrize("regulariser", ["supcon", "core"])
def test_the_regulariser_brings_a_class_together(regulariser):
    clips, features = clusters(spread=1.5)
    data, labels = torch.cat([f[:1] for f in features]), torch.tensor([clip.emotion for clip in clips])

    def tightness(weight):
        torch.manual_seed(0)
        head, core = EmotionHead(data.shape[1], 32), CoreTuning(32) if regulariser == "core" else None
        config, rng = replace(SMALL, contrastive_weight=weight, regulariser=regulariser), np.random.default_rng(0)
        optimizer = torch.optim.AdamW([*head.parameters(), *(core.parameters() if core else ())], lr=2e-3)
        for _ in range(60):
            cross_entropy, contrastive = head_loss(head, data, labels, config, core, rng)
            optimizer.zero_grad()
            (cross_entropy + weight * contrastive).backward()
            optimizer.step()
        with torch.no_grad():
            return float(supervised_contrastive(head.layers[:-1](data), labels, 0.1))

    assert tightness(1.0) < tightness(0.0) - 0.1


def test_the_hardest_pairs_are_the_least_like_of_a_class_and_the_most_like_of_the_others():
    angles = torch.tensor([0.0, 30.0, 80.0, 20.0, 170.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1) * torch.tensor([1.0, 9.0, 2.0, 5.0, 3.0])[:, None]
    positives, negatives = hard_pairs(features, torch.tensor([0, 0, 0, 1, 2]))
    assert positives.tolist() == [2, 2, 0, 3, 4]  # the last two are alone in their class
    assert negatives.tolist() == [3, 3, 3, 1, 2]
    assert hard_pairs(features[:2], torch.tensor([0, 0]))[1].tolist() == [0, 1]  # no other class


def test_hard_pairs_are_mixed_with_their_targets_and_a_negative_is_mostly_of_another_class():
    torch.manual_seed(0)
    labels = torch.arange(12) % 3
    features, targets = torch.randn(12, 5, requires_grad=True), torch.eye(3)[labels]
    mixed, mixed_targets = mix_hard_pairs(features, targets, labels, np.random.default_rng(0))
    hardest, nearest = hard_pairs(features, labels)
    share = mixed_targets[range(12), labels]  # of a positive: that of the hardest positive
    torch.testing.assert_close(
        mixed[:12], share[:, None] * features[hardest] + (1 - share)[:, None] * features[nearest]
    )
    torch.testing.assert_close(mixed_targets.sum(dim=1), torch.ones(24))
    assert 0.2 < share.mean() < 0.8 and share.std() > 0.15
    own = mixed_targets[range(12, 24), labels]
    assert (own <= 0.2 + 1e-6).all() and (own > 0.1).any()
    again, _ = mix_hard_pairs(features, targets, labels, np.random.default_rng(0))
    assert torch.equal(again, mixed)
    mixed.sum().backward()  # shares sum to one, and what is mixed learns
    assert float(features.grad.sum()) == pytest.approx(mixed.numel(), rel=1e-5)


def test_the_focal_contrastive_loss_of_a_case_worked_by_hand():
    # Two anchors of two classes at a right angle; each one's positive is the anchor itself, its negative at a right
    # angle to it: the softmax at temperature 1 is over 1, 0 and 0.
    anchors = torch.eye(2) * torch.tensor([[3.0], [0.5]])
    share = math.e / (math.e + 2)
    loss = focal_contrastive(anchors, torch.tensor([0, 1]), anchors, anchors.flip(0), 1.0)
    assert float(loss) == pytest.approx(-(1 - share) * math.log(share), abs=1e-6)
    # One class: each anchor has two positives, the other anchor (0) and its own mixture (1), and no negative.
    shares = [1 / (1 + math.e), math.e / (1 + math.e)]
    loss = focal_contrastive(anchors, torch.tensor([5, 5]), anchors, anchors.flip(0), 1.0)
    assert float(loss) == pytest.approx(-sum((1 - s) * math.log(s) for s in shares) / 2, abs=1e-6)


def test_core_tuning_has_finite_gradients_whatever_classes_a_batch_holds():
    torch.manual_seed(0)
    head, core = EmotionHead(6, 8), CoreTuning(8)
    for labels in ([0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1]):
        losses = head_loss(head, torch.randn(4, 6), torch.tensor(labels), SMALL, core, np.random.default_rng(0))
        sum(losses).backward()
        values = [p.grad for p in [*head.parameters(), *core.parameters()]]
        assert all(value.isfinite().all() and value.abs().max() > 0 for value in values)


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


def test_the_linear_baseline_is_one_layer_and_its_accuracy_stands_beside_the_heads(tmp_path, encoder):
    pytest.importorskip("matplotlib")
    clips, features = clusters(width=encoder.feature_dim)
    clips = [replace(clip, dataset="ravdess") if clip.dataset == "a" else clip for clip in clips]
    config = replace(SMALL, steps=150, learning_rate=1e-2)
    result = fit(tmp_path, clips, features, config, baseline=True)
    head = EmotionHead.from_pretrained(tmp_path / "baseline" / EMOTION_HEAD)
    assert [tuple(p.shape) for p in head.parameters()] == [(9, encoder.feature_dim), (9,)]
    assert detect_emotion(torch.randn(32000), 16000, encoder, head, 60).num_frames == 60
    assert result["baseline"]["all"]["accuracy"] > 0.9
    assert (tmp_path / "report.txt").read_text() == table(result) + "\n"
    result["baseline"]["sets"]["ravdess"]["accuracy"] = 0.125
    rows = [line.split() for line in table(result).splitlines()]
    assert rows[0][8:] == ["linear", "%", "paper", "%", "paper's", "linear", "%"]
    own = {row[0]: row for row in rows}
    assert own["ravdess"][5:] == ["12.5", "100.0", "82.4"]
    assert own["b"][6:] == ["-", "-"] and own["all"][-2:] == ["78.3", "68.8"]
    with pytest.raises(EmotionError, match="depth 1 has no hidden layer.*'core'"):
        replace(config, depth=1)


def test_a_run_begun_before_there_was_a_choice_of_regularisers_goes_on(tmp_path):
    clips, features = clusters(40)
    clips = with_parts(clips)
    old = replace(SMALL, regulariser="supcon", temperature=0.1)
    train(tmp_path, clips, features, old)
    stored = json.loads((tmp_path / "config.json").read_text())
    del stored["regulariser"], stored["mixup_alpha"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert EmotionConfig.load(tmp_path / "config.json") == old
    state = torch.load(tmp_path / "emotion_job" / "state.pt", weights_only=True)
    settings = ", ".join(f"{name}={value!r}" for name, value in stored.items())
    assert state["settings"].startswith(f"EmotionConfig({settings}) on ") and set(state["modules"]) == {"head"}
    train(tmp_path, clips, features, EmotionConfig.load(tmp_path / "config.json"))
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path, clips, features, replace(old, regulariser="core"))


@pytest.mark.parametrize("regulariser", ["core", "supcon"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, regulariser):
    clips, features = clusters()
    clips = with_parts(clips)
    config = replace(SMALL, regulariser=regulariser)
    whole = train(tmp_path / "whole", clips, features, config)

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
            train(tmp_path / "parts", clips, features, config, save_every=0)
    resumed = train(tmp_path / "parts", clips, features, config)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match="other settings"):
        train(tmp_path / "parts", clips[1:], features[1:], config)


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
    [
        ({"balance": "set"}, "none, class"),
        ({"test_share": 1.0}, "0.25"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"regulariser": "moco"}, "'moco'; allowed: core, supcon, none"),
        ({"mixup_alpha": 0.0}, "mixup_alpha 0.0"),
    ],
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


def test_the_table_of_regularisers_is_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "emotion.json").read_text("utf-8"))["accuracy"]
    text = (root / "training" / "README.md").read_text("utf-8")
    for name, start in (("core", "Core-tuning, `core`"), ("supcon", "Khosla's, `supcon`"), ("none", "`none`")):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
        assert " | ".join(f"{mean(v):.1f} ± {stdev(v):.1f}" for v in found[name].values()) in line
