"""A checkpoint counts only when it is whole; after a kill at any point, the newest whole one is found."""

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from checkpoint_cases import ALONE, Usage, deaths, names, newest_after_deaths, prune, record_of, save, save_best

from zerotune.errors import Refused
from zerotune.training import checkpoints
from zerotune.training.background import BackgroundSaves
from zerotune.training.progress import Progress
from zerotune.training.snapshot import Waiting


def save_and_prune(root, step, keep=1):
    prune(save(root, step), keep)


def test_a_saved_checkpoint_is_whole_and_readable(tmp_path):
    folder = save(tmp_path, 120)
    assert folder.name == "step-00000120" and checkpoints.defect(folder) is None
    assert checkpoints.read_progress(folder) == record_of(120)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.keys() == {"weights.bin", "part/moments.bin", "progress.json"}
    assert manifest["weights.bin"]["bytes"] == 500 and len(manifest["weights.bin"]["sha256"]) == 64
    assert checkpoints.newest_whole(tmp_path) == (folder, [])
    assert names(tmp_path) == ["step-00000120"]


def test_nothing_saved_is_no_checkpoint(tmp_path):
    assert checkpoints.newest_whole(tmp_path / "absent") == (None, [])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "COMPLETE").unlink(), "no COMPLETE marker"),
        (lambda folder: (folder / "part" / "moments.bin").unlink(), "unreadable: .*moments.bin"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"short"), "weights.bin has 5 bytes, not 500"),
        (lambda folder: (folder / "weights.bin").write_bytes(b"x" * 500), "weights.bin has changed"),
        (lambda folder: (folder / "progress.json").write_text("{}"), "progress.json has 2 bytes"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "unreadable"),
        (lambda folder: (folder / "manifest.json").write_text('{"weights.bin": 7}'), "unreadable"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, damage, words):
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    damage(newer)
    found, skipped = checkpoints.newest_whole(tmp_path)
    assert found == older
    (line,) = skipped
    assert str(newer) in line and re.search(words, line)


def rewrite_progress(folder, **changes):
    """Edit progress.json and its hash in the manifest."""
    record = json.loads((folder / "progress.json").read_text())
    parts = {name: changes.pop(name) for name in list(changes) if name in record}
    record = record | parts | {"progress": record["progress"] | changes}
    (folder / "progress.json").write_text(json.dumps(record))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= checkpoints.hash_files(folder, [folder / "progress.json"])
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": 11}, "progress.json is of step 11, its progress of step 10"),
        ({"step": "10"}, "unreadable: step is '10', wanted a valid integer"),
        ({"num_processes": 0}, "unreadable: num_processes is 0, wanted greater than or equal to 1"),
        ({"run_id": None}, "unreadable: run_id is None, wanted a valid string"),
        ({"best_step": 12}, "progress.json has best_step 12 at step 10"),
        ({"evaluated_step": 12}, "progress.json has evaluated_step 12 at step 10"),
        ({"train_seconds": -1.0}, "unreadable: progress.train_seconds is -1.0, wanted greater than or equal to 0"),
        ({"stopped_early": "no"}, "unreadable: progress.stopped_early is 'no', wanted a valid boolean"),
    ],
)
def test_an_edited_progress_is_named_and_skipped(tmp_path, changes, words):
    older, newer = save(tmp_path, 9), save(tmp_path, 10)
    rewrite_progress(newer, **changes)
    found, (line,) = checkpoints.newest_whole(tmp_path)
    assert found == older and f"{newer} is skipped: {words}" in line


def test_a_checkpoint_of_another_version_is_read_as_far_as_it_is_known(tmp_path):
    folder = save(tmp_path, 10)
    record = json.loads((folder / "progress.json").read_text())
    del record["progress"]["num_tokens"]
    (folder / "progress.json").write_text(json.dumps(record))
    rewrite_progress(folder, of_another_version=1, num_examples=80)
    assert checkpoints.newest_whole(tmp_path) == (folder, [])
    assert Progress.of(checkpoints.read_progress(folder)["progress"]) == Progress(step=10, num_examples=80)


def test_a_disk_that_does_not_list_its_checkpoints_has_not_lost_them(tmp_path, monkeypatch):
    """Path.glob hides that from Python 3.12 on: a start would unmark them all and begin anew."""
    save(tmp_path, 10)

    def fail(folder):
        raise OSError(errno.EIO, "Input/output error", str(folder))

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.newest_whole(tmp_path)


def test_what_cannot_be_deleted_yet_is_said_and_deleted_later(tmp_path, monkeypatch, capsys):
    """On NFS a file that a process has open keeps its folder from being deleted."""
    save(tmp_path, 1)
    remove = shutil.rmtree

    def fail(folder, **more):
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(folder))

    with monkeypatch.context() as busy:
        busy.setattr(shutil, "rmtree", fail)
        checkpoints.delete([tmp_path / "step-00000001"])
    assert "step-00000001 cannot be deleted yet (Directory not empty); the next save" in capsys.readouterr().out
    assert checkpoints.newest_whole(tmp_path)[0] is None and shutil.rmtree is remove
    save_and_prune(tmp_path, 2)
    assert names(tmp_path) == ["step-00000002"]


@pytest.mark.parametrize("put", [shutil.copytree, lambda source, target: target.symlink_to(source)])
def test_a_checkpoint_of_another_run_is_named_and_skipped(tmp_path, put):
    """So is one whose best checkpoint is of another run. Deleting a linked checkpoint keeps the link's target."""
    ours, root = save(tmp_path / "a", 9), tmp_path / "a"
    theirs = save(tmp_path / "b", 10, run_id="theirs")
    put(theirs, root / theirs.name)
    found, lines = checkpoints.newest_whole(root, "ours")
    assert (found, lines) == (ours, [f"checkpoint {root / theirs.name} is skipped: it belongs to another run"])
    best_of_theirs = save(root, 12, best_step=10)
    assert (
        "its best checkpoint step-00000010 is damaged (it belongs to another run)"
        in (checkpoints.newest_whole(root, "ours")[1][0])
    )
    shutil.rmtree(best_of_theirs)
    save_and_prune(root, 11, keep=2)
    assert names(root) == ["step-00000009", "step-00000011"] and checkpoints.defect(theirs) is None


def test_a_checkpoint_of_another_run_is_replaced_by_our_own(tmp_path):
    theirs, root = save(tmp_path / "b", 10, run_id="theirs"), tmp_path / "a"
    root.mkdir()
    (root / theirs.name).symlink_to(theirs)
    save_and_prune(root, 10)
    assert names(root) == [theirs.name] and checkpoints.defect(root / theirs.name, "ours") is None
    assert checkpoints.defect(theirs, "theirs") is None


def test_files_among_the_checkpoints_are_left_alone(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "step-00000002").touch()
    assert checkpoints.newest_whole(tmp_path)[0].name == "step-00000001"
    save_and_prune(tmp_path, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_copies_beside_the_checkpoints_are_left_alone(tmp_path):
    """They are neither resumed from nor counted nor deleted."""
    copy = shutil.copytree(save(tmp_path, 5), tmp_path / "step-00000005.bak")
    save_and_prune(tmp_path, 10)
    assert names(tmp_path) == [copy.name, "step-00000010"] and (copy / checkpoints.MARKER).exists()
    assert checkpoints.newest_whole(tmp_path)[0].name == "step-00000010"


def test_a_skipped_checkpoint_is_replaced_by_the_next_save_of_its_step(tmp_path):
    folder = save(tmp_path, 3)
    (folder / "weights.bin").write_bytes(b"")
    (folder / "stray").write_text("from an earlier version")
    assert checkpoints.defect(save(tmp_path, 3)) is None
    assert not (folder / "stray").exists()


# --- death at every single operation ---


def test_after_death_anywhere_in_a_save_the_newest_whole_checkpoint_is_right(tmp_path):
    for _, found, step in newest_after_deaths(tmp_path, lambda root: save_and_prune(root, 2)):
        assert (found / "weights.bin").read_bytes() == f"{step:03d} 0".encode() * 100


def test_after_death_while_a_damaged_checkpoint_is_replaced_an_older_one_is_left(tmp_path):
    def replace(root):
        save(root, 2)

    for root in deaths(tmp_path, lambda root: (damaged_second(root), replace(root))):
        found, _ = checkpoints.newest_whole(root)
        assert checkpoints.read_progress(found)["step"] in (1, 2)


def test_after_death_while_a_whole_checkpoint_is_saved_again_one_of_them_counts(tmp_path):
    found_best = []
    for root in deaths(tmp_path, lambda root: save(root, 1, best_step=1)):
        checkpoints.put_back_replaced(root)
        found, skipped = checkpoints.newest_whole(root)
        assert found == root / "step-00000001" and skipped == []
        found_best.append(checkpoints.read_progress(found)["progress"]["best_step"])
        save_and_prune(root, 1)
        assert names(root) == ["step-00000001"]
    assert found_best[0] is None and found_best[-1] == 1


def damaged_second(root):
    folder = root / "step-00000002"
    folder.mkdir()
    (folder / "weights.bin").write_text("torn")


def test_a_run_that_went_back_stays_there(tmp_path):
    folders = [save(tmp_path, step) for step in (2, 4, 6)]
    checkpoints.unmark_later(tmp_path, folders[0])
    assert checkpoints.newest_whole(tmp_path)[0] == folders[0]


# --- what is kept ---


@pytest.mark.parametrize(
    ("keep", "best_step", "left"),
    [(1, None, [5]), (2, None, [4, 5]), (1, 2, [2, 5]), (2, 4, [4, 5]), (2, 1, [1, 4, 5]), (9, 3, [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_are_kept(tmp_path, keep, best_step, left):
    for step in range(1, 6):
        save(tmp_path, step, best_step=best_step if best_step and step >= best_step else None)
    prune(checkpoints.step_folder(tmp_path, 5), keep)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]
    assert all(checkpoints.defect(path) is None for path in tmp_path.iterdir())


def test_the_best_that_an_older_kept_checkpoint_knew_is_kept(tmp_path):
    """If the newest is torn, the run resumes from the older one, which needs the checkpoint that was best then."""
    for step, best_step in ((2, 2), (4, 2), (6, 6)):
        save(tmp_path, step, best_step=best_step)
    prune(checkpoints.step_folder(tmp_path, 6), 2)
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_checkpoint_whose_best_is_damaged_is_skipped(tmp_path):
    for step, best_step in ((2, 2), (4, 4), (6, 4)):
        save(tmp_path, step, best_step=best_step)
    (tmp_path / "step-00000004" / "weights.bin").write_bytes(b"")
    found, lines = checkpoints.newest_whole(tmp_path)
    assert found.name == "step-00000002"
    assert "step-00000006 is skipped: its best checkpoint step-00000004 is damaged" in lines[0]


def test_whole_checkpoints_whose_best_is_lost_are_not_replaced(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step, best_step=2)
    shutil.rmtree(tmp_path / "step-00000002")
    with pytest.raises(
        Refused, match=r"step-00000006 is whole, but its best checkpoint best-00000002 .*: restore that"
    ):
        checkpoints.newest_whole(tmp_path)


def test_weights_alone_are_kept_while_a_checkpoint_knows_them_as_the_best(tmp_path):
    """No run resumes from them: --keep-checkpoints 1 keeps the newest whole checkpoint and the best it records."""
    kept = []

    def note(last):
        prune(last, 1)
        kept.append(names(tmp_path))
        newest, _ = checkpoints.newest_whole(tmp_path)
        assert newest == (None if len(kept) == 1 else newest) and all(path.suffix == "" for path in tmp_path.iterdir())

    note(save_best(tmp_path, 2))
    note(save(tmp_path, 3, best_step=2))
    note(save_best(tmp_path, 4))
    note(save_best(tmp_path, 5))  # if killed here, the run resumes after step 3, whose best is step 2
    note(save(tmp_path, 6, best_step=5))
    note(save(tmp_path, 7, best_step=7))
    assert [" ".join(f"{name[0]}{int(name[5:])}" for name in each) for each in kept] == [
        "b2",
        "b2 s3",
        "b2 b4 s3",
        "b2 b5 s3",
        "b5 s6",
        "s7",
    ]


def test_a_checkpoint_whose_best_weights_are_damaged_is_skipped(tmp_path):
    older, best = save(tmp_path, 3), save_best(tmp_path, 5)
    newer = save(tmp_path, 6, best_step=5)
    assert checkpoints.newest_whole(tmp_path) == (newer, []) and checkpoints.best_of(newer) == best
    (best / "weights.bin").write_bytes(b"")
    found, (line,) = checkpoints.newest_whole(tmp_path)
    assert found == older and "its best checkpoint best-00000005 is damaged (weights.bin has 0 bytes" in line


def test_after_death_anywhere_in_a_save_of_weights_alone_the_run_resumes_as_before(tmp_path):
    """Step 1 is its own best; the better weights of step 2 count only once a checkpoint records them."""
    for root in deaths(tmp_path, lambda root: prune(save_best(root, 2), 1)):
        checkpoints.put_back_replaced(root)
        found, lines = checkpoints.newest_whole(root)
        assert found == root / "step-00000001" and lines == []
        save_and_prune(root, 3)
        assert names(root) == ["step-00000003"]


def test_a_disk_that_cannot_be_read_does_not_count_as_damage(tmp_path, monkeypatch):
    """An older checkpoint is used instead; where none is left, a new start would replace those on the disk."""
    folders, broken, hash_file = [save(tmp_path, step) for step in (1, 2)], {"step-00000002"}, checkpoints.file_sha256

    def read(path):
        if path.parent.name in broken:
            raise OSError(5, "Input/output error", str(path))
        return hash_file(path)

    monkeypatch.setattr(checkpoints, "file_sha256", read)
    found, (line,) = checkpoints.newest_whole(tmp_path)
    assert found == folders[0] and "step-00000002 is skipped: unreadable: [Errno 5] Input/output error" in line
    broken.add("step-00000001")
    with pytest.raises(OSError, match="Input/output error"):
        checkpoints.newest_whole(tmp_path)


def test_a_marker_that_cannot_be_looked_at_is_no_leftover(tmp_path, monkeypatch):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "COMPLETE").unlink()
    stat = Path.stat

    def look(path, **more):
        if path.parent.name == "step-00000002":
            raise OSError(116, "Stale file handle", str(path))
        return stat(path, **more)

    monkeypatch.setattr(Path, "stat", look)
    assert checkpoints.newest_whole(tmp_path)[0].name == "step-00000001"
    checkpoints.delete_incomplete(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_leftovers_of_kills_are_deleted(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    save_best(tmp_path, 4)
    for name in ("step-00000002", "best-00000004"):
        (tmp_path / name / "COMPLETE").unlink()
    (tmp_path / ".writing-step-00000005").mkdir()
    checkpoints.delete_incomplete(tmp_path)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_what_was_skipped_does_not_count_as_kept(tmp_path):
    """A folder without a marker, and a damaged one of a later step, do not count among the checkpoints to keep."""
    for step in (4, 5, 6, 9):
        save(tmp_path, step)
    (tmp_path / "step-00000005" / "COMPLETE").unlink()
    (tmp_path / "step-00000009" / "weights.bin").write_bytes(b"")
    (tmp_path / ".writing-step-00000007").mkdir()
    prune(checkpoints.step_folder(tmp_path, 6), 2)
    assert names(tmp_path) == ["step-00000004", "step-00000006"]


# --- a full disk ---


def test_a_save_that_would_not_fit_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    folder = save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 2**40 - 2**27, 2**27))
    too_much = 2**27 - checkpoints.SPARE_BYTES + 1
    with pytest.raises(Refused, match=r"disk full: .* has 128 MiB free; a checkpoint takes about 64 MiB") as refusal:
        save(tmp_path, 2, too_much)
    assert "\n" not in str(refusal.value)
    assert names(tmp_path) == ["step-00000001"] and checkpoints.newest_whole(tmp_path) == (folder, [])
    save(tmp_path, 2, too_much - 1)
    assert checkpoints.newest_whole(tmp_path)[0].name == "step-00000002"


def test_a_deletion_in_progress_makes_room(tmp_path, monkeypatch):
    free = [2**20]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(2**40, 0, free[0]))
    target = checkpoints.step_folder(tmp_path, 1)
    with pytest.raises(Refused, match="disk full"):
        checkpoints.prepare(target, 1000, ALONE, lambda: None)
    checkpoints.prepare(target, 1000, ALONE, lambda: free.append(free.pop() * 1024))
    assert free == [2**30] and names(tmp_path) == [".writing-step-00000001"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(122, "Disk quota exceeded")])
def test_a_disk_that_fills_during_a_save_leaves_the_earlier_checkpoint(tmp_path, error):
    def fill(folder):
        (folder / "weights.bin").write_bytes(b"half")
        raise error

    folder, saves = save(tmp_path, 1), BackgroundSaves(Waiting(), 1, ALONE)
    with pytest.raises(Refused, match=r"disk full|disk quota exceeded"):
        saves.start(checkpoints.step_folder(tmp_path, 2), record_of(2), [SimpleNamespace(write=fill)], 1000)
    assert names(tmp_path) == ["step-00000001"] and checkpoints.newest_whole(tmp_path) == (folder, [])


def test_another_error_of_a_writer_is_not_taken_for_a_full_disk(tmp_path):
    def fail(folder):
        raise RuntimeError("a bug")

    saves = BackgroundSaves(Waiting(), 1, ALONE)
    with pytest.raises(RuntimeError, match="a bug"):
        saves.start(checkpoints.step_folder(tmp_path, 2), record_of(2), [SimpleNamespace(write=fail)], 1000)


def test_step_folders_sort_by_step():
    folders = [checkpoints.step_folder(Path("root"), step) for step in (2, 10, 99999999)]
    assert folders == sorted(folders)
