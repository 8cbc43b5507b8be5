"""Cut saves short: at each operation on a file, and by a full disk."""

import os
import shutil
import signal
import sys
from collections import namedtuple
from dataclasses import asdict
from types import SimpleNamespace

from zerotune.training import checkpoints
from zerotune.training.progress import Progress

ALONE = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)


WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir")

Usage = namedtuple("Usage", "total used free")


def write(step):
    """Write one file in the folder and one below it."""

    def write_state(folder):
        (folder / "part").mkdir()
        paths = [folder / "weights.bin", folder / "part" / "moments.bin"]
        for number, path in enumerate(paths):
            path.write_bytes(f"{step:03d} {number}".encode() * 100)
        return paths

    return write_state


def record_of(step, best_step=None, run_id="ours"):
    """Return a CheckpointRecord."""
    progress = asdict(Progress(step=step, best_step=best_step))
    return {"run_id": run_id, "step": step, "progress": progress, "num_processes": 1}


def save(root, step, num_bytes=1000, best_step=None, run_id="ours"):
    return _save(checkpoints.step_folder(root, step), record_of(step, best_step, run_id), step, num_bytes)


def save_best(root, step):
    """Save only a step's weights, as the best so far."""
    return _save(checkpoints.best_folder(root, step), record_of(step, step), step, 1000)


def _save(target, record, step, num_bytes):
    aside = checkpoints.prepare(target, num_bytes, ALONE, lambda: None)
    entries = checkpoints.hash_files(aside, write(step)(aside))
    return checkpoints.publish(target, record, entries, None, num_bytes, ALONE)


def prune(last, keep):
    checkpoints.delete_leftovers(last.parent)
    checkpoints.delete(checkpoints.superseded(last, keep))


def names(root):
    return sorted(path.name for path in root.iterdir())


def die_at(number, action):
    """Run an action in a forked process that kills itself before its nth file operation. Returns its exit status."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    num_seen = 0

    def hook(event, arguments):
        nonlocal num_seen
        if event in WATCHED:
            num_seen += 1
            if num_seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    action()
    os._exit(0)


def deaths(tmp_path, action):
    """Yield a root after a process has died at each of an action's file operations, until it survives."""
    template = tmp_path / "template"
    save(template, 1)
    for number in range(1, 200):
        root = tmp_path / f"death-{number}"
        shutil.copytree(template, root)
        status = die_at(number, lambda root=root: action(root))
        yield root
        if status == 0:
            assert number > 20, "every file operation is a place to die"
            return
        assert status == -signal.SIGKILL
    raise AssertionError("more than 200 operations in one save")


def newest_after_deaths(tmp_path, save_second):
    """Yield a root, its newest whole checkpoint and its step after each death while saving step 2 after step 1.

    After each death the run resumes and saves again, which must remove all leftovers.
    """
    found_steps = []
    for root in deaths(tmp_path, save_second):
        found, _ = checkpoints.newest_whole(root)
        found_steps.append(checkpoints.read_progress(found)["step"])
        yield root, found, found_steps[-1]
        save_second(root)
        assert checkpoints.newest_whole(root) == (root / "step-00000002", [])
        assert names(root) == ["step-00000002"]
    assert found_steps == sorted(found_steps) and set(found_steps) == {1, 2}
