"""A checkpoint being copied counts only once all of it has arrived; training does not wait for it."""

import platform
import shutil
import stat
import threading
from types import SimpleNamespace

import pytest
from checkpoint_cases import Usage, names, newest_after_deaths, record_of

from zerotune.errors import Refused
from zerotune.files import json_sha256
from zerotune.training import checkpoints, scratch
from zerotune.training.background import BackgroundSaves
from zerotune.training.scratch import Scratch

ALONE = SimpleNamespace(
    num_processes=1, process_index=0, is_main_process=True, is_local_main_process=True, wait_for_everyone=lambda: None
)
FILES = ("weights.bin", "moments.bin")


class Bytes:
    """A file of a checkpoint."""

    def __init__(self, name, content):
        self.name, self.content = name, content

    def write(self, folder):
        (folder / self.name).write_bytes(self.content)
        return folder / self.name


def files(step):
    return [Bytes(name, f"{step:03d} {number}".encode() * 100) for number, name in enumerate(FILES)]


def open_saves(tmp_path, keep=1):
    return BackgroundSaves(Scratch(tmp_path / "scratch", tmp_path / "root", ALONE), keep, ALONE)


def start(saves, root, step, files_of_step=None, num_bytes=1000):
    saves.start(checkpoints.step_folder(root, step), record_of(step), files_of_step or files(step), num_bytes)


@pytest.fixture
def held(monkeypatch):
    """Return an event; files are copied only once it is set."""
    event, copy = threading.Event(), scratch._copy
    monkeypatch.setattr(scratch, "_copy", lambda *files: (event.wait(30), copy(*files))[1])
    yield event
    event.set()


def test_training_goes_on_while_a_checkpoint_is_on_its_way(tmp_path, held):
    saves = open_saves(tmp_path)
    assert saves.on_its_way is None and not saves.has_arrived
    start(saves, tmp_path / "root", 1)
    assert saves.on_its_way == checkpoints.step_folder(tmp_path / "root", 1) and not saves.has_arrived
    assert checkpoints.newest_whole(tmp_path / "root") == (None, [])
    held.set()
    saves.finish()
    assert saves.on_its_way is None and not saves.has_arrived
    folder, skipped = checkpoints.newest_whole(tmp_path / "root")
    assert (folder.name, skipped) == ("step-00000001", [])
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        [*FILES, checkpoints.PROGRESS, checkpoints.MANIFEST, checkpoints.MARKER]
    )
    assert (folder / "weights.bin").read_bytes() == b"001 0" * 100
    assert list((tmp_path / "scratch").glob("*/*/*")) == []
    saves.close()
    assert names(tmp_path / "scratch") == []


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path):
    saves = open_saves(tmp_path, keep=2)
    for step in (1, 2, 3):
        start(saves, tmp_path / "root", step)
        assert checkpoints.newest_whole(tmp_path / "root")[0] == (
            None if step == 1 else checkpoints.step_folder(tmp_path / "root", step - 1)
        )
    saves.close()
    assert names(tmp_path / "root") == ["step-00000002", "step-00000003"]


def save_and_leave(root):
    saves = BackgroundSaves(Scratch(root.with_name(f"scratch-{root.name}"), root, ALONE), 1, ALONE)
    start(saves, root, 2)
    saves.close()


def test_after_death_anywhere_the_newest_whole_checkpoint_is_right(tmp_path):
    roots = []
    for root, found, step in newest_after_deaths(tmp_path, save_and_leave):
        assert (found / "weights.bin").read_bytes() == f"{step:03d} 0".encode() * 100
        roots.append(root)
    assert all(names(root.with_name(f"scratch-{root.name}")) == [] for root in roots)


# --- what goes wrong ---


class Full:
    def write(self, folder):
        (folder / "weights.bin").write_bytes(b"half")
        raise OSError(28, "No space left on device")


def test_a_full_scratch_disk_leaves_the_earlier_checkpoint(tmp_path):
    saves = open_saves(tmp_path)
    start(saves, tmp_path / "root", 1)
    start(saves, tmp_path / "root", 2, [Full()], 2**20)
    assert saves.has_arrived  # the copy is over, although it failed
    with pytest.raises(Refused, match=r"disk full: .*scratch.* has .*; a checkpoint takes about 1 MiB"):
        saves.finish()
    assert names(tmp_path / "root") == ["step-00000001"]


def test_a_run_folder_that_fills_meanwhile_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    saves = open_saves(tmp_path)
    start(saves, tmp_path / "root", 1)
    saves.finish()
    monkeypatch.setattr(scratch, "_copy", lambda file, copy: Full().write(copy.parent))
    start(saves, tmp_path / "root", 2)
    with pytest.raises(Refused, match=r"disk full: .*root has"):
        saves.finish()
    assert names(tmp_path / "root") == ["step-00000001"]


def test_a_run_folder_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    saves = open_saves(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**27, 2**27))
    with pytest.raises(Refused, match="disk full"):
        start(saves, tmp_path / "root", 1, num_bytes=2**27)
    assert list((tmp_path / "scratch").glob("*/*/*")) == []


def test_a_file_that_changes_on_its_way_never_counts(tmp_path, monkeypatch):
    copy = scratch._copy

    def spoil(file, target):
        found = copy(file, target)
        target.write_bytes(b"spoilt")
        return found

    monkeypatch.setattr(scratch, "_copy", spoil)
    saves = open_saves(tmp_path)
    start(saves, tmp_path / "root", 1)
    with pytest.raises(OSError, match="changed while it was copied"):
        saves.finish()
    assert checkpoints.newest_whole(tmp_path / "root")[0] is None


def test_a_scratch_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "scratch").write_text("a file")
    with pytest.raises(Refused, match=r"--scratch-dir .*scratch cannot be written"):
        open_saves(tmp_path)


@pytest.mark.parametrize("planted", ["link", "file"])
def test_a_folder_planted_on_the_scratch_disk_is_not_used(tmp_path, planted):
    root, scratch, elsewhere = (tmp_path / name for name in ("root", "scratch", "elsewhere"))
    scratch.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").touch()
    place = scratch / f"zerotune-{json_sha256(str(root.resolve()))[:12]}-{platform.node()}"
    place.symlink_to(elsewhere) if planted == "link" else place.touch()
    with pytest.raises(Refused, match="is a link or belongs to somebody else"):
        Scratch(scratch, root, ALONE)
    assert (elsewhere / "precious").exists()


def test_the_scratch_folder_is_private(tmp_path):
    saves = open_saves(tmp_path)
    assert stat.S_IMODE(saves.carrier._of_run.stat().st_mode) == 0o700
    saves.close()
