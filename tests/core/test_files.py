"""Files are written whole or not at all, and what a killed run leaves goes when its name is written again."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save, save_file

from memo_core import tensorfile
from memo_core.checkpoint import lora
from memo_core.errors import CheckpointError
from memo_core.files import Unfinished, open_regular, replace_whole


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replace_whole(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    with replace_whole(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


def test_everyone_may_read_what_new_files_may_be_read_by(tmp_path):
    before = os.umask(0o022)
    try:
        with replace_whole(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)  # puts a file of mode 0600 in its place
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_the_next_run_removes_what_a_killed_one_left_and_says_so(tmp_path, caplog):
    path = tmp_path / "video.mp4"
    code = (
        "import sys, time; from memo_core.files import Unfinished; file = Unfinished(sys.argv[1]); "
        "print(file.temporary, flush=True); time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    left = child.stdout.readline().strip()
    with replace_whole(path) as temporary:
        temporary.write_text("beside one that is being written")
    assert os.path.exists(left), "a living run's file was removed"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    other = tmp_path / ".other.mp4.01234567.part"
    other.touch()
    with replace_whole(path) as temporary:
        temporary.write_text("done")
    assert sorted(os.listdir(tmp_path)) == [other.name, "video.mp4"]  # only what has this name
    assert left in caplog.text


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    first, second = Unfinished(tmp_path / "a"), Unfinished(tmp_path / "a")
    first.temporary.write_text("1")
    second.temporary.write_text("2")
    first.finish()
    second.finish()
    assert (tmp_path / "a").read_text() == "2" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("name", ["n" * 255, "é" * 127])
def test_the_longest_names_can_be_written(tmp_path, name):
    with replace_whole(tmp_path / name) as temporary:
        temporary.write_text("x")
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("value", ["no\0thing", "\ud800", 5, None, b"\xff/none", ""])
def test_what_is_no_file_name_is_an_oserror(value):
    with pytest.raises(OSError):
        open_regular(value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no fifos")
def test_a_pipe_or_a_folder_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=lambda: pytest.raises(OSError, open_regular, tmp_path / "pipe"), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        open_regular(tmp_path)


def test_processes_that_write_one_name_do_not_take_each_others_files(tmp_path):
    """A file that was just made, and is not locked yet, looks as if nobody had it."""
    code = (
        "import sys\n"
        "from memo_core import files\n"
        "for number in range(300):\n"
        "    files._unfinished_in.cache_clear()\n"
        "    with files.replace_whole(sys.argv[1]) as temporary:\n"
        "        temporary.write_text(str(number))\n"
    )
    children = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    said = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, said
    assert not any(said) and os.listdir(tmp_path) == ["a"]


def damaged(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize(
    "instead",
    [
        b"",
        b"short",
        b"no tensors at all",
        damaged(b"\xff"),
        damaged(b"[]"),
        damaged(b'{"net.lora_A.weight": 1}'),
        save({"other": torch.zeros(1)}),
        save({f"reference_net.x.lora_{letter}.weight": torch.zeros(1, dtype=torch.float8_e4m3fn) for letter in "AB"}),
    ],
    ids=["empty", "short", "text", "bytes", "list", "number", "other names", "other numbers"],
)
def test_a_file_that_is_replaced_while_it_is_read_is_unreadable(tmp_path, monkeypatch, instead):
    """Between the look at its header and that at its numbers."""
    path = tmp_path / "a.safetensors"
    factors = lora.Factors(torch.ones(1, 2), torch.ones(3, 1), 1.0)
    lora.Adapter(modules={"reference_net.x": factors}).save(path)
    memmap = tensorfile.np.memmap

    def replaced_first(*given):
        with replace_whole(path) as temporary:
            temporary.write_bytes(instead)
        return memmap(*given)

    monkeypatch.setattr(tensorfile.np, "memmap", replaced_first)
    with pytest.raises(CheckpointError, match="replaced"):
        lora.describe(path)
