"""Checkpoints, either complete or ignored: written to a temporary folder, hashed, renamed, marked COMPLETE last.

checkpoints/step-00000120/   …state files…  progress.json  manifest.json  COMPLETE
checkpoints/best-00000100/   the same for a best evaluation, without optimizer state: no run can resume from it
"""

import os
import re
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from annotated_types import Ge
from typing_extensions import TypedDict

from zerotune.errors import Refused
from zerotune.files import (
    disk_is_full,
    file_record,
    file_sha256,
    full_disk_refusal,
    parse_record,
    sync_folder,
    write_json,
)
from zerotune.records import Count, FileRecord
from zerotune.run.launch import on_all_ranks
from zerotune.run.process import say
from zerotune.training.progress import ProgressRecord

MARKER, MANIFEST, PROGRESS = "COMPLETE", "manifest.json", "progress.json"
# Prefix of an old checkpoint while its step is saved again, for example after an interrupted evaluation.
REPLACED = ".replaced-"
# A save must leave this much for logs and reports.
SPARE_BYTES = 64 * 2**20


class CheckpointRecord(TypedDict):
    """progress.json: the run's progress, its run_id from run.json, and the number of processes that saved it."""

    run_id: str
    step: Count
    progress: ProgressRecord
    num_processes: Annotated[int, Ge(1)]


def step_folder(root: Path, step: int) -> Path:
    """Return the folder of one optimizer step's checkpoint."""
    return root / f"step-{step:08d}"


def best_folder(root: Path, step: int) -> Path:
    """Return the folder for a step's weights without optimizer state."""
    return root / f"best-{step:08d}"


def weights_folder(root: Path, step: int) -> Path:
    """Return the folder with an evaluated step's weights: its full checkpoint if complete, else its best folder."""
    whole = step_folder(root, step)
    return whole if _is_marked(whole) else best_folder(root, step)


def _is_marked(folder: Path) -> bool:
    """Return whether a folder has its marker. Raises OSError if the disk cannot tell."""
    try:
        (folder / MARKER).stat()
    except FileNotFoundError:
        return False
    return True


def holds_weights_alone(folder: Path) -> bool:
    """Return whether a folder is a `best_folder`, from which no run can resume."""
    return folder.resolve().name.startswith("best-")


def prepare(target: Path, num_bytes: int, accelerator, make_room: Callable[[], None]) -> Path:
    """Create the temporary folder for a checkpoint; all ranks take part. Raises Refused if the disk is full.

    Args:
        target: `step_folder` or `best_folder` of the step.
        num_bytes: approximate bytes that all ranks write.
        make_room: waits for pending deletions; rank 0 calls it if the disk seems too full.
    """
    aside = _aside(target)
    agree(accelerator, _make_aside(aside, num_bytes, make_room) if accelerator.is_main_process else None)
    return aside


def publish(target: Path, progress: dict, entries: dict, problem: str | None, num_bytes: int, accelerator) -> Path:
    """Turn the folder from `prepare` into a complete checkpoint; all ranks take part.

    Args:
        target, num_bytes: as for `prepare`.
        progress: a CheckpointRecord.
        entries: manifest entries of the files that this rank wrote.
        problem: why this rank could not write its files, or None.
    Raises:
        Refused: a rank has a problem, or the disk is full by now. No partial files are left.
    """
    aside = _aside(target)
    problems, manifest = on_all_ranks(accelerator, problem), {}
    for part in on_all_ranks(accelerator, entries):
        assert not manifest.keys() & part.keys(), "a file belongs to one rank"
        manifest |= part
    if accelerator.is_main_process:
        problem = next((line for line in problems if line), None) or _finish(
            aside, target, manifest, progress, num_bytes
        )
        if problem:
            shutil.rmtree(aside, ignore_errors=True)
    agree(accelerator, problem)
    return target


def _finish(aside: Path, target: Path, manifest: dict, progress: dict, num_bytes: int) -> str | None:
    try:
        write_json(aside / PROGRESS, progress)
        manifest |= hash_files(aside, [aside / PROGRESS])
        write_json(aside / MANIFEST, manifest)
        _rename(aside, target)
    except OSError as error:
        return full_disk_line(target.parent, num_bytes, error)
    return None


def _aside(target: Path) -> Path:
    return target.with_name(f".writing-{target.name}")


def _make_aside(aside: Path, num_bytes: int, make_room: Callable[[], None]) -> str | None:
    root = aside.parent
    root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    if shutil.disk_usage(root).free < num_bytes + SPARE_BYTES:
        make_room()
        if shutil.disk_usage(root).free < num_bytes + SPARE_BYTES:
            return full_disk_line(root, num_bytes)
    aside.mkdir()
    return None


def full_disk_line(folder: Path, num_bytes: int, error: Exception | None = None) -> str:
    """Return the message for a disk without room for `num_bytes`; re-raise `error` if the disk is not its cause."""
    if error is not None and not disk_is_full(folder, error):
        raise error
    size = f"; a checkpoint takes about {num_bytes / 2**20:.0f} MiB"
    return full_disk_refusal(folder, error, size, resumes=True)


def hash_files(folder: Path, files: list[Path]) -> dict[str, dict]:
    """Flush files of a checkpoint's folder to the disk, and return their manifest entries."""
    return {str(path.relative_to(folder)): file_record(path) for path in files}


def _rename(aside: Path, target: Path) -> None:
    sync_folder(aside)
    replaced = target.with_name(f"{REPLACED}{target.name}")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        target.rename(replaced)
    aside.rename(target)
    sync_folder(target.parent)
    (target / MARKER).touch()
    sync_folder(target)
    shutil.rmtree(replaced, ignore_errors=True)


def put_back_replaced(root: Path) -> None:
    """Restore old checkpoints whose replacement was never completed. Call this from one process only."""
    for replaced in _entries(root, REPLACED):
        target = root / replaced.name.removeprefix(REPLACED)
        if _is_marked(target):
            delete([replaced])
        else:
            shutil.rmtree(target, ignore_errors=True)
            replaced.rename(target)


def unmark_later(root: Path, folder: Path | None) -> None:
    """Remove the markers of checkpoints of later steps than this one's (None: of all), so that they are ignored."""
    for later in _step_folders(root.resolve()):
        if (folder is None or later.name > folder.resolve().name) and not later.is_symlink():
            with suppress(OSError):  # unreadable
                (later / MARKER).unlink()


def agree(accelerator, problem: str | None) -> None:
    """Raise Refused on every rank if one has a problem."""
    lines = [line for line in on_all_ranks(accelerator, problem) if line]
    if lines:
        raise Refused(lines[0])


def defect(folder: Path, run_id: str | None = None) -> str | None:
    """Return what is wrong with a checkpoint, or None if it is complete. Reads and hashes every file.

    Args:
        run_id: the run that it must belong to; None for any.
    Raises:
        OSError: the disk cannot be read, which says nothing about the checkpoint.
    """
    if not _is_marked(folder):
        return f"no {MARKER} marker"
    try:
        manifest = parse_record((folder / MANIFEST).read_text(encoding="utf-8"), dict[str, FileRecord])
        if PROGRESS not in manifest:
            return f"unreadable: {MANIFEST} does not name {PROGRESS}"
        for name, expected in manifest.items():
            path = folder / name
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {expected['bytes']}"
            if file_sha256(path) != expected["sha256"]:
                return f"{name} has changed since it was written"
        record = read_progress(folder)
    except (FileNotFoundError, ValueError) as error:
        return f"unreadable: {error}"
    if run_id is not None and record["run_id"] != run_id:
        return "it belongs to another run"
    return _contradiction(record, folder)


def _contradiction(record: CheckpointRecord, folder: Path) -> str | None:
    """Return how a progress.json contradicts itself or its folder's name."""
    step, progress = record["step"], record["progress"]
    names = (step_folder(folder.parent, step).name, best_folder(folder.parent, step).name)
    if folder.name not in names or progress["step"] != step:
        return f"{PROGRESS} is of step {step}, its progress of step {progress['step']}"
    for name in ("best_step", "evaluated_step"):
        if (progress[name] or 0) > step:
            return f"{PROGRESS} has {name} {progress[name]} at step {step}"
    return None


def read_progress(folder: Path) -> CheckpointRecord:
    """Return the progress.json of a checkpoint. Raises OSError or ValueError if it is damaged."""
    return parse_record((folder / PROGRESS).read_text(encoding="utf-8"), CheckpointRecord)


def best_of(folder: Path) -> Path | None:
    """Return the folder of the best weights up to a complete checkpoint; None before the first evaluation."""
    best_step = read_progress(folder)["progress"]["best_step"]
    return None if best_step is None else weights_folder(folder.parent, best_step)


def defect_of_best(folder: Path, run_id: str | None) -> str | None:
    """Return how the best weights up to a complete checkpoint are damaged, or None. Raises OSError as `defect`."""
    best = best_of(folder)
    problem = defect(best, run_id) if best not in (None, folder) else None
    return f"its best checkpoint {best.name} is damaged ({problem})" if problem else None


def newest_whole(root: Path, run_id: str | None = None) -> tuple[Path | None, list[str]]:
    """Return the newest complete checkpoint, and a message for each newer one that is skipped.

    Args:
        run_id: the run that it must belong to; None for any.
    Raises:
        OSError: the disk cannot be read, and no checkpoint is left. A new start would replace those that it may hold.
        Refused: no checkpoint is left, and one is complete except for its best weights.
    """
    skipped, unread, without_best = [], None, None
    for folder in reversed(_step_folders(root)):
        try:
            problem = defect(folder, run_id)
            if problem is None and (problem := defect_of_best(folder, run_id)):
                without_best = without_best or (folder, problem)
        except OSError as error:
            unread, problem = error, f"unreadable: {error}"
        if problem is None:
            return folder, skipped
        skipped.append(f"checkpoint {folder} is skipped: {problem}")
    if unread is not None:
        raise unread
    if without_best is not None:
        folder, problem = without_best
        raise Refused(f"{folder} is whole, but {problem}: restore that folder, or delete {root} to start again")
    return None, skipped


def superseded(last: Path, keep: int) -> list[Path]:
    """Return the folders to delete: all but the newest `keep` checkpoints, the best that each one records, and `last`.

    Checkpoints that are incomplete, of another run, or later than `last` (the run did not resume from them) are not
    kept and do not count towards `keep`.

    Args:
        last: the checkpoint just saved, in a step or best folder.
    """
    root, record = last.parent, read_progress(last)
    run_id, newest = record["run_id"], step_folder(root, record["step"])
    counted = [folder for folder in _step_folders(root) if folder <= newest and _counts(folder, run_id)]
    # if the newest is damaged, the run resumes from an older one and needs the best of that time
    protected = {last, *counted[-keep:]} | {best_of(folder) for folder in counted[-keep:]}
    return [folder for folder in [*_step_folders(root), *_folders(root, "best")] if folder not in protected]


def delete_leftovers(root: Path) -> None:
    """Delete the leftovers of interrupted saves. No save may be in progress."""
    delete(_entries(root, ".writing-"))


def delete_incomplete(root: Path) -> None:
    """Delete everything that interrupted saves and deletions left behind, before the run saves anything."""
    delete_leftovers(root)
    delete([folder for kind in ("step", "best") for folder in _folders(root, kind) if _is_unmarked(folder)])


def _is_unmarked(folder: Path) -> bool:
    """Return whether a folder has no marker; False if the disk cannot tell."""
    try:
        return not _is_marked(folder)
    except OSError:
        return False


def _counts(folder: Path, run_id: str) -> bool:
    """Return whether a checkpoint has its marker and belongs to the run, without reading its weights."""
    try:
        return _is_marked(folder) and read_progress(folder)["run_id"] == run_id
    except (OSError, ValueError):
        return False


def _step_folders(root: Path) -> list[Path]:
    """Return the folders of resumable checkpoints, complete or not, in order of step."""
    return _folders(root, "step")


def _folders(root: Path, kind: str) -> list[Path]:
    """Return the checkpoints of a kind, complete or not; copies that a user made (step-00000120.bak) are none."""
    found = [folder for folder in _entries(root, f"{kind}-") if re.fullmatch(rf"{kind}-\d+", folder.name)]
    return [folder for folder in found if _is_folder(folder)]


def _entries(root: Path, prefix: str) -> list[Path]:
    """Return the entries of a folder whose names begin with a prefix, sorted; [] without the folder.

    Raises:
        OSError: the disk cannot be read. From Python 3.12 on, Path.glob hides that, and finds nothing.
    """
    try:
        return [root / name for name in sorted(os.listdir(root)) if name.startswith(prefix)]
    except FileNotFoundError:
        return []


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:  # a link that leads nowhere
        return False


def delete(folders: list[Path]) -> None:
    """Delete checkpoints; for a link to one, only the link. Names what it cannot delete; a later save tries again."""
    for folder in folders:
        try:
            if folder.is_symlink():
                folder.unlink()
                continue
            # marker first: an interrupted deletion must not leave a folder that looks complete
            (folder / MARKER).unlink(missing_ok=True)
            shutil.rmtree(folder)
        except OSError as error:
            say(f"{folder} cannot be deleted yet ({error.strerror}); the next save tries again")
