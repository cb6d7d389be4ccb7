"""Fetches the released weights from the Hugging Face hub into one folder in the layout that `MemoPipeline` loads.

Nothing here runs unless it is called. Every file is fetched beside its place, compared with the hub's checksum and only
then moved into place, so a file that is there is whole. What was fetched is recorded in `memo_download.json`, and
`verify` compares the files with it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DownloadError
from ..files import open_regular, replace_whole

MANIFEST = "memo_download.json"
PARTIAL = ".download"  # folder of files on their way
_SAFETENSORS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Component:
    """A part of the release: where it comes from, what it is for, and its licence in plain words."""

    repository: str
    purpose: str
    licence: str
    required: bool = True


COMPONENTS: dict[str, Component] = {
    "memo": Component(
        "memoavatar/memo",
        "the MEMO networks and the emotion head",
        "Apache-2.0: free to use, also commercially. Its authors released it as a research preview and forbid "
        "deceiving, defaming or harming people with it.",
    ),
    "vae": Component("stabilityai/sd-vae-ft-mse", "the picture codec", "MIT: free to use, also commercially."),
    "wav2vec2": Component(
        "facebook/wav2vec2-base-960h", "the speech encoder", "Apache-2.0: free to use, also commercially."
    ),
    "emotion2vec": Component(
        "emotion2vec/emotion2vec_plus_large",
        "emotion features of the voice",
        "FunASR model licence: name its source and authors; read it before commercial use "
        "(https://github.com/modelscope/FunASR, MODEL_LICENSE).",
    ),
    "face": Component(
        "memoavatar/memo",
        "finds and describes the face (optional, wants the onnxruntime package)",
        "InsightFace models: NOT for commercial use, only for non-commercial research.",
        required=False,
    ),
    "vocal_separator": Component(
        "memoavatar/memo",
        "removes music from a recording (optional, wants the audio-separator package)",
        "Ultimate Vocal Remover models: MIT, with credit to UVR and Kimberley Jensen.",
        required=False,
    ),
}


@dataclass(frozen=True)
class ReleaseFile:
    """One file of the release.

    component: key of COMPONENTS. name: path in its repository. target: path in the checkpoint folder.
    size: bytes, rounded. sha256: where it is known beforehand; otherwise the hub's own checksum has to do.
    """

    component: str
    name: str
    target: str
    size: int
    sha256: str | None = None

    @property
    def repository(self) -> str:
        """Of its component, on the hub."""
        return COMPONENTS[self.component].repository

    @property
    def licence(self) -> str:
        """Of its component, in plain words."""
        return COMPONENTS[self.component].licence


def _same(component: str, name: str, size: int) -> ReleaseFile:
    return ReleaseFile(component, name, name, size)


# The face landmark and age models of the release are not listed: neither this nor the released code uses their results.
RELEASE_FILES: tuple[ReleaseFile, ...] = (
    _same("memo", "diffusion_net/config.json", 2_250),
    _same("memo", f"diffusion_net/{_SAFETENSORS}", 6_710_000_000),
    _same("memo", "reference_net/config.json", 1_710),
    _same("memo", f"reference_net/{_SAFETENSORS}", 3_430_000_000),
    _same("memo", "image_proj/config.json", 72),
    _same("memo", f"image_proj/{_SAFETENSORS}", 6_310_000),
    _same("memo", "audio_proj/config.json", 72),
    _same("memo", f"audio_proj/{_SAFETENSORS}", 146_000_000),
    _same("memo", "misc/audio_emotion_classifier/config.json", 85),
    _same("memo", f"misc/audio_emotion_classifier/{_SAFETENSORS}", 58_800_000),
    ReleaseFile("vae", "config.json", "vae/config.json", 547),
    ReleaseFile(
        "vae",
        _SAFETENSORS,
        f"vae/{_SAFETENSORS}",
        334_643_276,
        "a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815",
    ),
    ReleaseFile("wav2vec2", "config.json", "wav2vec2/config.json", 1_596),
    ReleaseFile("wav2vec2", "preprocessor_config.json", "wav2vec2/preprocessor_config.json", 159),
    ReleaseFile(
        "wav2vec2",
        "model.safetensors",
        "wav2vec2/model.safetensors",
        377_607_901,
        "8aa76ab2243c81747a1f832954586bc566090c83a0ac167df6f31f0fa917d74a",
    ),
    ReleaseFile("emotion2vec", "config.yaml", "emotion2vec/config.yaml", 5_552),
    ReleaseFile(
        "emotion2vec",
        "model.pt",
        "emotion2vec/model.pt",
        1_945_790_254,
        "be501a01f26fcdc7663a062dff86af839afbaef7c4de32f5e42d7e1ad2784da4",
    ),
    _same("face", "misc/face_analysis/models/scrfd_10g_bnkps.onnx", 16_900_000),
    _same("face", "misc/face_analysis/models/glintr100.onnx", 261_000_000),
    _same("vocal_separator", "misc/vocal_separator/Kim_Vocal_2.onnx", 66_800_000),
    _same("vocal_separator", "misc/vocal_separator/download_checks.json", 23_100),
    _same("vocal_separator", "misc/vocal_separator/mdx_model_data.json", 13_100),
    _same("vocal_separator", "misc/vocal_separator/vr_model_data.json", 4_380),
)


def missing_files(folder: str | os.PathLike[str], only: Iterable[str] | None = None) -> list[ReleaseFile]:
    """Files of the release that are not in `folder`, or have another size than when they were fetched.

    `only` names components (keys of COMPONENTS); None means all. Raises DownloadError for an unknown component.
    """
    folder = Path(folder).expanduser()
    recorded = _read_manifest(folder)

    def present(file: ReleaseFile) -> bool:
        path = folder / file.target
        known = recorded.get(file.target)
        return path.is_file() and (known is None or path.stat().st_size == known["size"])

    return [file for file in _chosen(only) if not present(file)]


def licences(only: Iterable[str] | None = None) -> str:
    """What each component is for and under which licence it comes, in plain words, one paragraph each."""
    names = dict.fromkeys(file.component for file in _chosen(only))
    lines = []
    for name in names:
        size = sum(file.size for file in RELEASE_FILES if file.component == name)
        part = COMPONENTS[name]
        lines.append(f"{name} ({_readable(size)}, {part.repository}): {part.purpose}.\n  Licence: {part.licence}")
    return "\n".join(lines)


def offline_instructions(folder: str | os.PathLike[str], only: Iterable[str] | None = None) -> str:
    """Says which files are missing in `folder`, where each is found and exactly where it has to be put."""
    folder = Path(folder).expanduser().absolute()
    missing = missing_files(folder, only)
    if not missing:
        return f"Nothing is missing in {folder}."
    total = _readable(sum(file.size for file in missing))
    names = dict.fromkeys(file.component for file in missing)
    lines = [
        f"{len(missing)} files ({total}) are missing in {folder}.",
        "On a computer with internet run `memo download` and copy its folder here, or fetch each file from its address",
        "and put it at the path below it:",
    ]
    for name in names:
        lines += ["", f"{name}: {COMPONENTS[name].purpose}. Licence: {COMPONENTS[name].licence}"]
        for file in missing:
            if file.component == name:
                lines += [
                    f"  {_endpoint()}/{file.repository}/resolve/main/{file.name}",
                    f"    -> {folder / file.target} ({_readable(file.size)})",
                ]
    return "\n".join(lines)


def download(folder: str | os.PathLike[str], only: Iterable[str] | None = None, progress: bool = True) -> list[Path]:
    """Fetches the missing files of the release into `folder`; what was interrupted goes on where it stopped.

    Before the first byte every file is looked up, so that a missing network, a wrong address or a full disk shows at
    once.

    Args:
        folder: the checkpoint folder; it is made if need be. Files that are there already are left alone.
        only: components to fetch (keys of COMPONENTS); None means all.
        progress: shows the hub package's progress bars.

    Returns:
        The files that were fetched.

    Raises:
        DownloadError: no network or no such file (with instructions for doing it by hand), too little room on the disk,
            a connection that broke (call again to go on), or a file whose checksum is wrong (it is thrown away).
    """
    folder = Path(folder).expanduser().absolute()
    chosen = None if only is None else tuple(only)
    missing = missing_files(folder, chosen)
    if not missing:
        return []
    sources = [_look_up(file, folder, chosen) for file in missing]
    try:
        (folder / PARTIAL).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"cannot write to {folder}: {error}") from error
    _check_room(folder, sources)
    with _progress_bars(progress):
        fetched = [_fetch(source, folder) for source in sources]
    with suppress(OSError):  # other components may have files on their way
        (folder / PARTIAL).rmdir()
    return fetched


def verify(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Reads every file of the release in `folder` again and compares it with what is known of it.

    Returns:
        For each target path "good", "changed" (its checksum is not the recorded one), "missing", or "unknown" (it was
        put there by hand and its checksum is not known beforehand).
    """
    folder = Path(folder).expanduser()
    recorded = _read_manifest(folder)
    states = {}
    for file in RELEASE_FILES:
        path = folder / file.target
        wanted = recorded[file.target]["sha256"] if file.target in recorded else file.sha256
        if not path.is_file():
            states[file.target] = "missing"
        elif wanted is None:
            states[file.target] = "unknown"
        else:
            states[file.target] = "good" if _digest(path, hashlib.sha256()) == wanted else "changed"
    return states


@dataclass(frozen=True)
class _Source:
    """What the hub says of a file. checksum: its ETag, the SHA-256 of large files and git's SHA-1 of small ones."""

    file: ReleaseFile
    url: str
    commit: str
    size: int
    checksum: str
    partial: Path


def _chosen(only: Iterable[str] | None) -> list[ReleaseFile]:
    names = set(COMPONENTS if only is None else only)
    if unknown := sorted(names - set(COMPONENTS)):
        raise DownloadError(f"unknown component {', '.join(map(repr, unknown))}; allowed are {', '.join(COMPONENTS)}")
    return [file for file in RELEASE_FILES if file.component in names]


def _look_up(file: ReleaseFile, folder: Path, only: tuple[str, ...] | None) -> _Source:
    import huggingface_hub

    try:
        metadata = huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(file.repository, file.name))
    except Exception as error:  # the hub package changed its HTTP library, and with it the exceptions, more than once
        raise DownloadError(
            f"cannot look up {file.name} of {file.repository} at {_endpoint()}: {error}\n\n"
            f"{offline_instructions(folder, only)}"
        ) from error
    if metadata.commit_hash is None or metadata.etag is None or metadata.size is None:
        raise DownloadError(f"{_endpoint()} gives no commit, checksum or size of {file.name}: not a Hugging Face hub?")
    if file.sha256 is not None and metadata.etag != file.sha256:
        raise DownloadError(
            f"{file.name} of {file.repository} has the checksum {metadata.etag} at {_endpoint()}, not {file.sha256}; "
            "it is not the released file"
        )
    # The commit in the address: what is fetched later is what was looked up, even if the repository changes meanwhile.
    url = huggingface_hub.hf_hub_url(file.repository, file.name, revision=metadata.commit_hash)
    partial = folder / PARTIAL / f"{_partial_name(file)}.{metadata.etag[:16]}"
    return _Source(file, url, metadata.commit_hash, metadata.size, metadata.etag, partial)


def _fetch(source: _Source, folder: Path) -> Path:
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    file, partial = source.file, source.partial
    if _fetched(partial) > source.size:
        partial.unlink()
    try:
        # hf_hub_download forgets a file that was interrupted (since version 1); its inner part can go on.
        if _fetched(partial) < source.size or not partial.exists():
            with partial.open("ab") as stream:
                http_get(
                    source.url,
                    stream,
                    resume_size=stream.tell(),
                    headers=build_hf_headers(),
                    expected_size=source.size,
                    displayed_filename=file.target,
                )
    except Exception as error:  # see _look_up; a full disk comes here too
        raise DownloadError(
            f"{file.target} was interrupted after {_readable(_fetched(partial))} of {_readable(source.size)}: {error}. "
            "Call again to go on from there"
        ) from error
    sha256 = _digest(partial, hashlib.sha256())
    checksum = sha256
    if len(source.checksum) == 40:
        checksum = _digest(partial, hashlib.sha1(b"blob %d\0" % partial.stat().st_size))
    if checksum != source.checksum:
        partial.unlink()
        raise DownloadError(
            f"{file.target} was damaged on its way: its checksum is {checksum}, not {source.checksum}. It was thrown "
            "away; call again to fetch it anew"
        )
    target = folder / file.target
    target.parent.mkdir(parents=True, exist_ok=True)
    os.replace(partial, target)
    for outdated in (folder / PARTIAL).glob(f"{_partial_name(file)}.*"):  # of an earlier version of the file
        outdated.unlink()
    entry = {"repository": file.repository, "commit": source.commit, "size": source.size, "sha256": sha256}
    _write_manifest(folder, _read_manifest(folder) | {file.target: entry})
    return target


def _check_room(folder: Path, sources: list[_Source]) -> None:
    needed = sum(max(0, source.size - _fetched(source.partial)) for source in sources)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{_readable(needed)} are to be fetched into {folder}, but only {_readable(free)} are free there; make "
            f"room or fetch less: the components are {', '.join(COMPONENTS)}"
        )


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if not path.is_file():
        return {}
    try:
        with open_regular(path) as file:
            files = json.load(file)["files"]
        if all(isinstance(about, dict) for about in files.values()):
            return files
        error: Exception = TypeError("its files are not described by name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        error = problem
    raise DownloadError(f"cannot read {path}: {error}; delete it, then files count as put there by hand") from error


def _write_manifest(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    text = json.dumps({"files": dict(sorted(files.items()))}, indent=2) + "\n"
    with replace_whole(folder / MANIFEST) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _digest(path: Path, digest: hashlib._Hash) -> str:
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _partial_name(file: ReleaseFile) -> str:
    return file.target.replace("/", "--")


def _fetched(partial: Path) -> int:
    return partial.stat().st_size if partial.is_file() else 0


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
