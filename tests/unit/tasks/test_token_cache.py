"""Test the token cache between processes: one computes an entry, the others wait, and take over if it dies."""

import errno
import fcntl
import hashlib
import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from waiting import wait_until

from zerotune.errors import Refused
from zerotune.tasks.token_cache import are_rows, cached_arrays, content_key, load_arrays, save_arrays

# Writes a line to `log` when it starts to compute, and takes `seconds` to do so.
WORKER = """
import sys, time
from pathlib import Path
import numpy as np
from zerotune.tasks.token_cache import cached_arrays

path, log, ready, seconds = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])

def compute():
    with log.open("a") as file:
        file.write("computed\\n")
    time.sleep(seconds)
    return {"ids": np.arange(5)}

ready.touch()
print(cached_arrays(path, compute, lambda arrays: True)["ids"].tolist())
"""


def has_ids(arrays):
    return arrays.keys() == {"ids"}


def start(folder, name, seconds):
    arguments = [folder / "tokens" / "entry.bin", folder / "log", folder / name, seconds]
    command = [sys.executable, "-c", WORKER, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def num_computed(folder):
    return len((folder / "log").read_text().splitlines()) if (folder / "log").exists() else 0


def test_one_process_computes_and_the_others_read(tmp_path):
    workers = [start(tmp_path, f"ready-{number}", seconds=3) for number in range(4)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert outputs == ["[0, 1, 2, 3, 4]\n"] * 4
    assert num_computed(tmp_path) == 1
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == ["entry.bin"]


def test_a_process_that_dies_leaves_the_entry_to_the_next(tmp_path):
    first = start(tmp_path, "first", seconds=1000)
    wait_until(lambda: num_computed(tmp_path) == 1, "the first process computes")
    second = start(tmp_path, "second", seconds=0)
    wait_until((tmp_path / "second").exists, "the second process wants the entry")
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)  # it waits for the first
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    assert second.communicate(timeout=120)[0] == "[0, 1, 2, 3, 4]\n"
    assert num_computed(tmp_path) == 2


def test_without_locks_each_process_computes(tmp_path, monkeypatch):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "tokens" / "entry.bin"
    assert cached_arrays(path, lambda: {"ids": np.arange(3)}, has_ids)["ids"].tolist() == [0, 1, 2]
    assert cached_arrays(path, lambda: pytest.fail("computed again"), has_ids)["ids"].tolist() == [0, 1, 2]


def test_an_error_while_computing_leaves_no_entry_and_no_lock(tmp_path):
    def refuse():
        raise Refused("a text with two beginnings")

    path = tmp_path / "tokens" / "entry.bin"
    for _ in range(2):
        with pytest.raises(Refused, match="two beginnings"):
            cached_arrays(path, refuse, has_ids)
    assert list(path.parent.iterdir()) == []
    assert cached_arrays(path, lambda: {"ids": np.arange(3)}, has_ids)["ids"].tolist() == [0, 1, 2]


def test_saved_arrays_come_back(tmp_path):
    arrays = {"ids": np.arange(4, dtype=np.int32), "num_truncated": np.array(2)}
    save_arrays(tmp_path / "entry.bin", arrays)
    loaded = load_arrays(tmp_path / "entry.bin")
    assert loaded.keys() == arrays.keys() and loaded["ids"].dtype == np.int32
    assert all(np.array_equal(loaded[name], arrays[name]) for name in arrays)
    assert load_arrays(tmp_path / "b.bin") is None


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize("body", [b"", b"no arrays", b"PK\3\4 half of a zip", npy(np.arange(3))])
def test_an_entry_of_another_kind_is_made_again(tmp_path, body):
    path = tmp_path / "entry.bin"
    path.write_bytes(hashlib.sha256(body).digest() + body)
    assert cached_arrays(path, lambda: {"ids": np.arange(3)}, has_ids)["ids"].tolist() == [0, 1, 2]


def test_an_entry_of_another_shape_is_made_again(tmp_path):
    path = tmp_path / "entry.bin"
    save_arrays(path, {"tokens": np.arange(9)})
    for _ in range(2):
        assert cached_arrays(path, lambda: {"ids": np.arange(3)}, has_ids)["ids"].tolist() == [0, 1, 2]
    assert load_arrays(path).keys() == {"ids"}


@pytest.mark.parametrize(
    "offsets",
    [[0, 2], [0, 2, 4], [1, 2, 3], [0, 4, 3], [0.0, 2.0, 3.0], [[0, 2, 3]]],
    ids=["too few", "too far", "from 1", "falling", "floats", "nested"],
)
def test_offsets_that_cut_nothing_into_two_rows(offsets):
    assert are_rows(np.arange(3), np.array([0, 2, 3]), 2)
    assert not are_rows(np.arange(3), np.array(offsets), 2)


def test_a_key_tells_texts_apart_however_they_are_cut():
    keys = {content_key([1, None], texts) for texts in (["a", "b"], ["ab"], ["ab", ""], ["", "ab"], [])}
    assert len(keys | {content_key([1, "None"], ["ab"])}) == 6
