"""The published files of wav2vec 2.0, emotion2vec and the emotion head, read without torch: settings and names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..checks import shown
from ..errors import CheckpointError
from ..nets.config import settings_like
from ..nets.reading import read_json, read_text
from ..release import SAMPLE_RATE

# What hidden states depend on, with wav2vec 2.0 base's values; nothing else of a configuration is looked at.
SPEECH_SETTINGS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout": 0.1,
    "activation_dropout": 0.1,
    "attention_dropout": 0.1,
    "feat_proj_dropout": 0.0,
    "final_dropout": 0.1,
    "layerdrop": 0.1,
    "layer_norm_eps": 1e-5,
    "feat_extract_norm": "group",
    "feat_extract_activation": "gelu",
    "conv_dim": (512,) * 7,
    "conv_stride": (5, 2, 2, 2, 2, 2, 2),
    "conv_kernel": (10, 3, 3, 3, 3, 2, 2),
    "conv_bias": False,
    "num_conv_pos_embeddings": 128,
    "num_conv_pos_embedding_groups": 16,
    "do_stable_layer_norm": False,
    "add_adapter": False,
    "mask_time_prob": 0.05,
    "mask_feature_prob": 0.0,
}
# Entries of published wav2vec 2.0 files that hidden states do not need: the CTC head, the pre-training
# quantiser and its projections, and the embedding that stands for masked frames.
_SPEECH_UNUSED = ("lm_head.", "quantizer.", "project_q.", "project_hid.", "masked_spec_embed")
# What is not written in a configuration, in the released form (emotion2vec base).
_EMOTION_SETTINGS = {
    "depth": 8,
    "num_heads": 12,
    "norm_eps": 1e-5,
    "encoder_dropout": 0.1,
    "post_mlp_drop": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "embed_dim": 768,
    "mlp_ratio": 4.0,
}
_EMOTION_AUDIO_SETTINGS = {
    "prenet_depth": 4,
    "prenet_dropout": 0.1,
    "num_extra_tokens": 10,
    "alibi_scale": 1.0,
    "num_alibi_heads": 12,
    "feature_encoder_spec": "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
    "conv_pos_width": 95,
    "conv_pos_groups": 16,
    "conv_pos_depth": 5,
}
# Variants of data2vec 2.0 that no released emotion2vec uses: refused rather than misread.
_EMOTION_ONLY: dict[str, Any] = {"layer_norm_first": False, "norm_affine": True}
_EMOTION_AUDIO_ONLY: dict[str, Any] = {
    "use_alibi_encoder": True,
    "learned_alibi": False,
    "learned_alibi_scale_per_head": True,
    "learned_alibi_scale_per_layer": False,
    "extractor_mode": "layer_norm",
    "conv_pos_pre_ln": False,
}
_MOST_NODES = 10_000  # values of a config.yaml; released ones have a hundred
# Entries of a model.pt that features do not need: the averaged teacher, the decoder and the heads of pre-training, and
# the classifier that the "plus" models carry.
_EMOTION_UNUSED = (
    "_ema",
    "modality_encoders.AUDIO.decoder.",
    "shared_decoder.",
    "recon_proj.",
    "cls_proj.",
    "proj.",
)


class SpeechFiles(NamedTuple):
    """What a folder says of a speech encoder: its settings, whether recordings are normalised, and its weights."""

    settings: dict[str, Any]
    normalize: bool
    weights: Path


def find_speech(folder: Path) -> SpeechFiles:
    """Reads the settings in a folder as transformers writes it, and finds its weights.

    Raises:
        CheckpointError: a file is absent, or a setting is not understood.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != "wav2vec2":
        raise CheckpointError(f"{folder}/config.json: model_type {shown(config.get('model_type'))} is not 'wav2vec2'")
    preprocessing = folder / "preprocessor_config.json"
    settings = read_json(preprocessing) if preprocessing.is_file() else {}
    if settings.get("sampling_rate", SAMPLE_RATE) != SAMPLE_RATE:
        raise CheckpointError(f"{preprocessing}: sampling_rate {shown(settings['sampling_rate'])} is not {SAMPLE_RATE}")
    path = folder / "model.safetensors"
    if not path.is_file():
        path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(f"{folder} has neither model.safetensors nor pytorch_model.bin")
    settings = settings_like(settings, {"do_normalize": True}, preprocessing)
    return SpeechFiles(settings_like(config, SPEECH_SETTINGS, folder / "config.json"), settings["do_normalize"], path)


def speech_weights(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a file's weights that hidden states need, under the names of transformers' Wav2Vec2Model.

    Older files have a prefix before the bare model, and weight norm stored as weight_g and weight_v.
    """
    conv = "pos_conv_embed.conv."
    kept = {}
    for name, value in stored.items():
        name = name.removeprefix("wav2vec2.")
        if not name.startswith(_SPEECH_UNUSED):
            name = name.replace(f"{conv}weight_g", f"{conv}parametrizations.weight.original0")
            kept[name.replace(f"{conv}weight_v", f"{conv}parametrizations.weight.original1")] = value
    return kept


def emotion_settings(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of an emotion2vec encoder, and those of its audio part, from a released config.yaml or its `model_conf`.

    Raises:
        CheckpointError: for a setting that is not implemented.
    """
    conf = config.get("model_conf", config)
    modalities = conf.get("modalities") or {} if isinstance(conf, dict) else None
    audio = modalities.get("audio") or {} if isinstance(modalities, dict) else None
    if not isinstance(audio, dict):
        raise CheckpointError(f"emotion2vec: its settings are no dictionaries by name: {shown(conf)}")
    for given, only in ((conf, _EMOTION_ONLY), (audio, _EMOTION_AUDIO_ONLY)):
        for name, allowed in only.items():
            if given.get(name, allowed) != allowed:
                raise CheckpointError(
                    f"emotion2vec: {name} = {shown(given[name])} is not supported, only {allowed!r} is"
                )
    conf = {**_EMOTION_ONLY, **conf, **settings_like(conf, _EMOTION_SETTINGS, "emotion2vec")}
    audio = {**_EMOTION_AUDIO_ONLY, **audio, **settings_like(audio, _EMOTION_AUDIO_SETTINGS, "emotion2vec")}
    if conf["embed_dim"] % conf["num_heads"]:
        raise CheckpointError(f"emotion2vec: num_heads {conf['num_heads']} does not divide {conf['embed_dim']}")
    if audio["num_alibi_heads"] > conf["num_heads"]:
        raise CheckpointError(
            f"emotion2vec: num_alibi_heads {audio['num_alibi_heads']} exceeds num_heads {conf['num_heads']}"
        )
    return conf, audio


def emotion_weights(stored: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a model.pt's weights that features need.

    They may lie under "state_dict", "model_state_dict" and "model", in this order of nesting, and their names may begin
    with a prefix that the configuration's `scope_map` names, "d2v_model." or "module.".
    """
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(stored.get(key), dict):
            stored = stored[key]
    prefixes = _emotion_prefixes(config)
    named = {_strip(name, prefixes): value for name, value in stored.items() if isinstance(name, str)}
    return {name: value for name, value in named.items() if not name.startswith(_EMOTION_UNUSED)}


def head_sizes(shapes: Mapping[str, tuple[int, ...]], path: Path) -> tuple[int, int, int, int]:
    """Widths of features, hidden layers and classes, and the number of layers, of the emotion head in a file.

    Raises:
        CheckpointError: these are no emotion head's tensors.
    """
    depth = len(shapes) // 2
    first, last = shapes.get("layers.fc1.weight"), shapes.get(f"layers.fc{depth}.weight")
    if first is None or last is None or len(first) != 2 or len(last) != 2:
        raise CheckpointError(f"{path} is not an emotion head: it holds {sorted(shapes)[:10]}")
    return first[1], first[0], last[0], depth


def read_emotion_config(path: Path) -> dict[str, Any]:
    """A released emotion2vec's config.yaml; CheckpointError where it cannot be read or has no `model_conf`."""
    import yaml

    text = read_text(path)
    try:
        loader = _loader()(text)
        node = loader.get_single_node()
        if node is None or _expanded(node, {}) > _MOST_NODES:
            raise ValueError(f"it is empty, or has more than {_MOST_NODES} values")
        config = loader.construct_document(node)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {str(error)[:500]}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_conf"), dict):
        raise CheckpointError(f"{path} has no model_conf section")
    return config


@lru_cache
def _loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """As YAML 1.2, and FunASR's files, have numbers: PyYAML takes 1e-05 for a text."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )
    return Loader


def _expanded(node: Any, known: dict[int, int]) -> int:
    """How many values a YAML node stands for, with every alias written out: ten lines of aliases can be billions."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES + 1  # should it hold itself
        parts = node.value if isinstance(node.value, list) else []
        parts = [part for pair in parts for part in (pair if isinstance(pair, tuple) else (pair,))]
        known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _emotion_prefixes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes that may precede every name: `scope_map` lists pairs (prefix in the file, prefix here or "none")."""
    scope = config.get("scope_map") or []
    if not isinstance(scope, (str, list)):
        raise CheckpointError(f"emotion2vec: scope_map = {shown(scope)} must be a list of prefixes")
    scope = scope.split(",") if isinstance(scope, str) else scope
    named = [str(name) for name, here in zip(scope[::2], scope[1::2]) if str(here).lower() == "none"]
    return (*(name for name in named if name.lower() != "none"), "d2v_model.", "module.")


def _strip(name: str, prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        name = name.removeprefix(prefix)
    return name
