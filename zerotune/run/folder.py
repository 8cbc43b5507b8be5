"""The run folder: who may write in it, what state it is in, what it was started with."""

import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

from zerotune.errors import Preempted, Refused
from zerotune.files import disk_is_full, json_sha256, read_json, read_json_lines, write_json, write_json_lines
from zerotune.run.launch import device_name, from_rank_0
from zerotune.run.process import describe_process, is_main_process, say

# Flags that may differ when a run goes on: they do not change which numbers come out, up to rounding.
FREE_FLAGS = {
    "output_dir", "resume", "checkpoint_every", "keep_checkpoints", "log_every", "base_eval", "plan", "tracker",
    "push_to_hub", "state_file", "tokens_per_device", "scratch_dir",
}  # fmt: skip
# Where an evaluation keeps the scores that it has, until it is done.
PARTIAL_FOLDER = ".partial"
# A file server keeps the lock of a node that has died for about a minute and a half; the requeued job waits for it.
SECONDS_FOR_DEAD_LOCKS = 100
# What a script would overwrite or delete, written after run.json.
RESULTS = (
    "parameters.json", "metrics.jsonl", "checkpoints", "final", "eval", "report.html", "predictions.jsonl",
    "metrics.json", "submission.tsv", "summary.json", "seed-0", "predictions.json", "breakdown.json", "config.json",
    "task.json",
)  # fmt: skip


def recorded_flags(args) -> dict:
    """The flags as plain JSON values."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in sorted(vars(args).items())}


def check_earlier_run(folder: Path, args, says_finished: bool = True) -> bool:
    """Look at what the run folder holds already, before anything is loaded.

    Returns:
        True when the very same run is finished: there is nothing left to do.
    Raises:
        Refused: `--resume never`; files of something else; or flags that change the run differ, each named with both
            values.
    """
    held = held_results(folder)
    if not os.path.exists(folder / "run.json"):  # False, where Path.exists raises: a name too long, no permission
        if held:
            raise Refused(
                f"{folder} holds {', '.join(held)} and no run.json, so that they are not of a run: choose a new or "
                "empty --output-dir"
            )
        return False
    if getattr(args, "resume", None) == "never":
        raise Refused(f"{folder} holds a run already and --resume never forbids going on: choose another --output-dir")
    ours, theirs = recorded_flags(args), read_json(folder / "run.json").get("flags")
    if not isinstance(theirs, dict):
        raise Refused(f"{folder / 'run.json'} is damaged (no flags): restore it, or use another --output-dir")
    changed = [name for name in ours if name not in FREE_FLAGS and theirs.get(name) != ours[name]]
    # a run that was refused before it had anything may begin again with the flags that the refusal wanted
    if changed and (held or read_state(folder).get("state") != "refused"):
        listed = ", ".join(f"--{name.replace('_', '-')} was {theirs.get(name)}, is {ours[name]}" for name in changed)
        raise Refused(f"{folder} holds a run with other flags ({listed}): use the same, or another --output-dir")
    finished = read_state(folder).get("state") == "finished"
    if finished and (folder / "checkpoints").exists() and not (folder / "final" / "task.json").exists():
        if says_finished:
            say(f"{folder} was finished and its final/ is gone: it is made again from the checkpoints")
        return False
    if finished and says_finished:
        say(f"{folder} is finished; the report is {folder / 'report.html'}")
    return finished


def held_results(folder: Path) -> list[str]:
    """What of RESULTS, and of scores that an unfinished evaluation keeps, a folder holds."""
    return [name for name in (*RESULTS, PARTIAL_FOLDER) if os.path.lexists(folder / name)]


def read_state(folder: Path) -> dict:
    """state.json, or {} when there is none."""
    path = folder / "state.json"
    return read_json(path) if os.path.exists(path) else {}


class RunFolder:
    """An open run folder, used as a context manager. Only rank 0 writes.

    Entering takes the folder's lock and sets state.json to "running"; leaving sets what came of it.

    Args:
        args: the script's flags, which are held against the folder's once more when the lock is taken.
    Raises:
        Refused: another process is at work in the folder, or was since `check_earlier_run` has looked.
    """

    def __init__(self, path: Path, accelerator, args=None):
        self.path, self.args = path, args
        self.metrics_path = path / "metrics.jsonl"
        self.accelerator = accelerator
        self.tracker = None
        self._lock = None

    def __enter__(self) -> "RunFolder":
        problem = from_rank_0(self.accelerator, self._open)
        if problem:
            raise Refused(problem)
        return self

    def _open(self) -> str | None:
        """Make the folder, take its lock, write "running". Returns why that cannot be, None when it is done."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            self._take_lock()
            if self.args is not None:
                check_earlier_run(self.path, self.args, says_finished=False)
            self.write_state("running", None)
        except Refused as refusal:
            return str(refusal)
        except BlockingIOError:
            return f"another job is at work in {self.path}: wait for it, or use another --output-dir"
        except OSError as error:
            return f"--output-dir {self.path} cannot be written ({error.strerror}): mend that, or name another folder"
        return None

    def _take_lock(self) -> None:
        requeued = int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0
        give_up = time.monotonic() + (SECONDS_FOR_DEAD_LOCKS if requeued else 0)
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() >= give_up:
                    raise
                time.sleep(1)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                say(f"{self.path} is on a file system without locks: do not start a second job in it")
                return

    def __exit__(self, kind, error, traceback) -> None:
        if not is_main_process():
            return
        full = None
        if isinstance(error, Refused):
            self._write_last_state("refused", str(error))
        elif isinstance(error, (Preempted, KeyboardInterrupt)):
            self._write_last_state("preempted", str(error) or "interrupted")
        elif error is not None and disk_is_full(self.path, error):
            full = Refused(
                f"disk full: {self.path} has {shutil.disk_usage(self.path).free / 2**20:.0f} MiB free ({error}); free "
                "some space and start the same command again, it goes on from the last checkpoint"
            )
            self._write_last_state("refused", str(full))
        if self.tracker is not None:
            self.tracker.finish()
        self._lock.close()
        if full is not None:
            raise full from error

    def _write_last_state(self, state: str, reason: str) -> None:
        try:
            self.write_state(state, reason)
        except OSError as error:
            if not disk_is_full(self.path, error):
                raise
            with (self.path / "state.json").open("r+") as file:  # in place, which takes no space
                file.write(json.dumps({"state": state, "reason": reason}))
                file.truncate()

    def write_state(self, state: str, reason: str | None) -> None:
        """state.json: running, preempted, refused or finished."""
        write_json(self.path / "state.json", {"state": state, "reason": reason})

    def describe(self, args, split_record: dict, **more) -> None:
        """split.json, and run.json: the command and its flags, versions, processes and device, and `more`."""
        world = {"num_processes": self.accelerator.num_processes, "device": device_name(self.accelerator.device)}
        for note in split_record["notes"]:
            say(f"data: {note}")
        self.write_json("split.json", split_record)
        described = describe_process() | {"task": split_record["task"], "flags": recorded_flags(args), "world": world}
        self.update_json("run.json", **described, **more)

    def write_json(self, name: str, value) -> None:
        """One of the folder's JSON files, on rank 0."""
        if is_main_process():
            write_json(self.path / name, value)

    def update_json(self, name: str, **values) -> None:
        """Add to one of the folder's JSON files, on rank 0."""
        if is_main_process():
            path = self.path / name
            write_json(path, (read_json(path) if path.exists() else {}) | values)

    def start_tracker(self, kind: str) -> None:
        """Send what `log` gets to TensorBoard or Weights & Biases too."""
        from accelerate.tracking import TensorBoardTracker, WandBTracker

        if kind != "none" and is_main_process():
            run_id = json_sha256(str(self.path.resolve()))[:16]
            tracker = (
                TensorBoardTracker(run_name="tensorboard", logging_dir=self.path)
                if kind == "tensorboard"
                # run_name is accelerate's word for a project; the same run goes on in the same place
                else WandBTracker("zerotune", name=self.path.name, id=run_id, resume="allow", dir=self.path)
            )
            tracker.start()
            self.tracker = tracker

    def log(self, row: dict) -> None:
        """One line of metrics.jsonl; `row` has a "step"."""
        if not is_main_process():
            return
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
        if self.tracker is not None:
            values = {name: value for name, value in row.items() if name != "step" and value is not None}
            self.tracker.log(values, step=row["step"])

    def forget_metrics_after(self, step: int) -> None:
        """Drop what a stopped run logged after its last checkpoint: those steps are done again."""
        if is_main_process() and self.metrics_path.exists():
            write_json_lines(
                self.metrics_path, [row for row in read_json_lines(self.metrics_path) if row["step"] <= step]
            )
