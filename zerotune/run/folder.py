"""The run folder: its lock, its state, and the flags of earlier starts."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from zerotune.errors import BrokenMachine, Preempted, Refused, listed
from zerotune.files import (
    disk_error_number,
    disk_is_full,
    file_sha256,
    first_damage,
    full_disk_refusal,
    is_there,
    may_pass,
    read_json,
    write_in_place,
    write_json,
    write_json_lines,
)
from zerotune.run.launch import device_name, from_rank_0
from zerotune.run.out_of_memory import is_out_of_memory, out_of_memory_refusal
from zerotune.run.process import describe_process, is_main_process, peak_memory_bytes, say, started_at
from zerotune.run.run_files import check_run_files, read_metrics_lines, read_run_record, read_state
from zerotune.run.tracker import grouped, scores, start_tracker
from zerotune.settings.groups import FREE_FLAGS, FlagRecord, RunSettings
from zerotune.terminal import say_when_slow

# Folder of an evaluation's scores until it is done.
PARTIAL_FOLDER = ".partial"
# Flags whose value is a path, or may be one.
PATH_FLAGS = ("model", "train_file", "validation_file", "test_file", "deepspeed")
# A file server keeps a dead node's lock for about a minute and a half; the requeued job waits for it.
SECONDS_FOR_DEAD_LOCKS = 100
LOCK_FILE = ".lock"
# Results that a script would overwrite or delete, written after run.json.
RESULTS = (
    "parameters.json", "metrics.jsonl", "checkpoints", "final", "eval", "report.html", "predictions.jsonl",
    "metrics.json", "submission.tsv", "summary.json", "seed-0", "predictions.json", "breakdown.json", "config.json",
    "task.json", "sweep.json",
)  # fmt: skip
# Everything that scripts write. The last two precede run.json: a start that was refused or killed may leave them.
WRITTEN = (*RESULTS, "state.json", "split.json")
LOG_ENDINGS = (".log", ".out", ".err")


def check_earlier_run(settings: RunSettings, says_finished: bool = True) -> bool:
    """Check the run folder's contents before anything is loaded.

    Returns:
        Whether the very same run is finished, so that nothing is left to do.
    Raises:
        Refused: `--resume never` for a run that exists; files of something else; a run of another script; other flags
            that change the run, each named with both values; changed data of a finished run; or a damaged record.
    """
    folder = settings.output_dir
    check_place(folder)
    held = held_results(folder)
    if not is_there(folder / "run.json"):
        if found := held or foreign_files(folder):
            raise Refused(
                f"{folder} holds {listed(found)} but no run.json, so they belong to no run: choose a new or empty "
                "--output-dir"
            )
        return False
    if settings.resume == "never":
        raise Refused(
            f"{folder} already holds a run, which is not resumed because of --resume never: choose another "
            "--output-dir, or leave the flag out"
        )
    _refuse_other_run(settings, bool(held))
    for name in ("checkpoints", "final", "eval"):
        if os.path.exists(folder / name) and not os.path.isdir(folder / name):
            raise Refused(f"{folder / name} is a file, not a folder: delete it, or use another --output-dir")
    if read_state(folder).get("state") != "finished":
        return False
    check_run_files(folder)
    if problem := _problem_of_results(folder):
        if says_finished:
            say(f"{folder} was finished, but its {problem}: it is made again from the checkpoints")
        return False
    _refuse_changed_files(folder)
    if says_finished:
        unused = "" if settings.resume == "auto" else f", and --resume {settings.resume} is not used"
        say(f"{folder} is finished{unused}; the report is {folder / 'report.html'}")
    return True


def _problem_of_results(folder: Path) -> str | None:
    """Return which result of a finished run is gone or damaged and can be made again; None if all are there.

    Raises:
        Refused: it is final/, and no checkpoint is left to make it from.
    """
    if not (is_there(folder / "parameters.json") or is_there(folder / "checkpoints")):
        return None  # a folder of an evaluation, which looks at its files itself
    has_checkpoint = bool(_whole_checkpoints(folder))
    if problem := _final_problem(folder / "final"):
        if has_checkpoint:
            return f"final/ {problem}"
        raise Refused(
            f"{folder} was finished, but its final/ {problem}, and no checkpoint is left to make it from: restore it, "
            "or use another --output-dir"
        )
    results = ("eval/final/metrics.json", "eval/final/predictions.jsonl", "report.html")
    gone = next((name for name in results if not is_there(folder / name)), None)
    return f"{gone} is gone" if gone and has_checkpoint else None


def _whole_checkpoints(folder: Path) -> list[Path]:
    """Return a run's checkpoints that have their marker, in order of step; copies that a user made are none."""
    marked = (mark.parent for mark in folder.glob("checkpoints/step-*/COMPLETE"))
    return sorted(checkpoint for checkpoint in marked if re.fullmatch(r"step-\d+", checkpoint.name))


def _refuse_changed_files(folder: Path) -> None:
    """Refuse a finished run whose data files hold something else by now, as after a correction."""
    path = folder / "split.json"
    sources = read_json(path).get("sources", {}) if path.exists() else {}
    if "train" not in sources:  # an evaluation's, which compares its items itself
        return
    for source in sources.values():
        file = Path(source.get("path") or "")
        if file.is_file() and file_sha256(file) != source["sha256"]:
            raise Refused(
                f"{folder} is finished, and {file} has changed since: restore it, or use another --output-dir"
            )


def _refuse_other_run(settings: RunSettings, holds_results: bool) -> None:
    folder = settings.output_dir
    state = read_state(folder).get("state")
    # the contents of a finished run's files are not compared
    changed = changed_flags(settings.flags, folder / "run.json", files_may_move=state != "finished")
    # a run that was refused before it had results may start again with the flags that the refusal asked for
    if not holds_results and state == "refused":
        return
    try:
        words = shlex.split(read_run_record(folder / "run.json").get("command", ""))
    except ValueError:  # edited
        words = []
    earlier, now = _script_of(words), _script_of(sys.argv)
    if earlier and now and Path(earlier).name != Path(now).name:
        raise Refused(f"{folder} is a run of {earlier}, and this is {now}: use another --output-dir")
    if changed:
        named = ", ".join(f"{_flag(name)} was {was}, is {now}" for name, (was, now) in changed.items())
        raise Refused(
            f"{folder} holds a run with other flags ({named}): use the same to resume it, or another folder: "
            f"--output-dir {_free_folder(folder, changed)}"
        )


def _script_of(words: list[str]) -> str | None:
    """Return the script that a command starts, as "train/sst2.py" or "my_sst2.py"; None if it is not known."""
    if not words or not words[0].endswith(".py"):
        return None
    script = Path(words[0])
    return "/".join(script.parts[-2:]) if script.parent.name in ("train", "eval") else script.name


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _free_folder(folder: Path, changed: dict[str, tuple[object, object]]) -> Path:
    """Return a folder that does not exist yet, named after the first flag that differs: runs/sst2-m-full-epochs-5."""
    name, (_, value) = next(iter(changed.items()))
    word = Path(str(value)).name if isinstance(value, str) else "" if value is True or value is None else str(value)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{folder.name}-{name.replace('_', '-')}-{word}"[:100]).strip("-").lower()
    numbers = (f"{name}-{number}" for number in itertools.count(2))
    return next(place for place in map(folder.with_name, itertools.chain([name], numbers)) if not place.exists())


def _final_problem(final: Path) -> str | None:
    """Return why a finished run's final/ cannot be used; None if its files are unchanged."""
    if not (final / "task.json").exists():
        return "is gone"
    try:
        with say_when_slow(f"checking the files of {final}"):
            damage = first_damage(final, read_json(final / "task.json").get("files") or {})
        return f"is damaged ({': '.join(damage)})" if damage else None
    except (Refused, AttributeError, KeyError, TypeError):
        return "is damaged (task.json)"


def check_place(folder: Path) -> None:
    """Refuse the root, the home and working folders, and any folder inside another run's checkpoints/ or final/."""
    place = Path(os.path.abspath(folder))
    if place == Path(place.anchor) or place in (Path.home(), Path.cwd()):
        raise Refused(f"--output-dir {folder} is {place}, which a run must not write into: name a folder below it")
    for inner in (place, *place.parents):
        if inner.name in ("checkpoints", "final") and os.path.exists(inner.parent / "run.json"):
            raise Refused(f"--output-dir {folder} is inside {inner} of another run: name a folder outside of it")


def changed_flags(flags: FlagRecord, path: Path, files_may_move: bool) -> dict[str, tuple[object, object]]:
    """Return the flags that change a run and differ from an earlier start's: (earlier value, value now) by name.

    If the user typed some of them, now or earlier, only those are returned: the others are defaults that follow.

    Args:
        files_may_move: whether `start_run` will compare the contents of files whose earlier path is gone.
    Raises:
        Refused: run.json is damaged.
    """
    earlier = read_run_record(path)
    theirs, typed = earlier["flags"], earlier.get("typed_flags", [])
    may_move = files_may_move and "identity" in earlier
    changed = {
        name: (theirs.get(name), value)
        for name, value in flags.values.items()
        if name not in FREE_FLAGS and theirs.get(name) != value
        if name in theirs or name in flags.typed  # else a flag that a later version has added
        if not (name in PATH_FLAGS and _is_same_file(theirs.get(name), value, may_move))
        if not _is_what_was_chosen(name, theirs.get(name), value, earlier.get("identity") or {})
    }
    by_user = {name: values for name, values in changed.items() if name in flags.typed or name in typed}
    return by_user or changed


def _is_what_was_chosen(name: str, earlier: object, now: object, identity: dict) -> bool:
    """Return whether a flag now gives the hub commit or precision that an earlier start without it had chosen."""
    if name == "revision":
        return earlier is None and identity.get("model_files") == f"commit {now}"
    return name == "precision" and earlier == "auto" and identity.get("precision") == now


def _is_same_file(earlier: object, now: object, may_move: bool) -> bool:
    """Return whether two paths name one file, or the earlier one is gone and its file may have moved."""
    if earlier is None or now is None or not os.path.exists(str(now)):
        return False
    if not os.path.exists(str(earlier)):
        return may_move
    return os.path.realpath(str(earlier)) == os.path.realpath(str(now))


def held_results(folder: Path) -> list[str]:
    """Return which of RESULTS a folder holds, and which scores of an unfinished evaluation."""
    return [name for name in (*RESULTS, PARTIAL_FOLDER) if os.path.lexists(folder / name)]


def foreign_files(folder: Path) -> list[str]:
    """Return the names in a folder that no script writes; hidden files and logs, which a run may have, are allowed."""
    if not os.path.isdir(folder):
        return []
    try:
        names = sorted(os.listdir(folder))
    except PermissionError:  # reported when the folder is opened
        return []
    return [name for name in names if not (name.startswith(".") or name in WRITTEN or name.endswith(LOG_ENDINGS))]


class RunFolder:
    """An open run folder, used as a context manager. Only rank 0 writes.

    Entering takes the folder's lock, compares the flags with an earlier start's once more, and sets state.json to
    "running"; leaving records how the run ended.

    Raises:
        Refused: another process is working in the folder, or has worked in it since `check_earlier_run`.
    """

    def __init__(self, settings: RunSettings, accelerator):
        self.settings, self.path = settings, settings.output_dir
        self.metrics_path = self.path / "metrics.jsonl"
        self.accelerator = accelerator
        self.run_id = uuid.uuid4().hex  # an earlier start's where there is one; rank 0 writes it into every checkpoint
        self.timings: dict[str, float] = {}
        self.tracker = None
        self._lock = None

    def __enter__(self) -> "RunFolder":
        from_rank_0(self.accelerator, self._open)
        return self

    def _open(self) -> None:
        """Make the folder, take its lock, write "running"."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._open_lock()
            self._take_lock()
            for leftover in self.path.glob(".*.json.[0-9]*"):  # a write that a kill cut short
                leftover.unlink(missing_ok=True)
            check_earlier_run(self.settings, says_finished=False)
            self.run_id = self._earlier_id() or self.run_id
            self.write_state("running", None)
        except BlockingIOError:
            raise Refused(f"another job is working in {self.path}: wait for it, or use another --output-dir") from None
        except OSError as error:
            if disk_error_number(error) is not None:
                raise Refused(full_disk_refusal(self.path, error)) from error
            if may_pass(error):
                raise
            raise Refused(
                f"--output-dir {self.path} cannot be written ({error.strerror}): name a folder that can be"
            ) from error

    def _earlier_id(self) -> str | None:
        path = self.path / "run.json"
        run_id = read_run_record(path).get("run_id") if path.exists() else None
        if run_id is None and (self.path / "checkpoints").exists():
            raise Refused(f"{path} is damaged (run_id is missing): restore it, or use another --output-dir")
        return run_id

    def _open_lock(self):
        """Open the lock file without following a link and without changing its contents."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            return os.fdopen(os.open(self.path / LOCK_FILE, flags, 0o666), "r+")
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise Refused(f"{self.path / LOCK_FILE} is a link: delete it, or use another --output-dir") from None
            raise

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
        refusal = None
        if error is not None and not may_pass(error) and not self._is_ours():
            self._lock.close()
            if isinstance(error, OSError):
                raise Refused(self._lost_line()) from error
            return
        if isinstance(error, KeyboardInterrupt):
            error.args = (self._after_interrupt(),)
            self._write_last_state("preempted", f"interrupted: {error}")
        elif isinstance(error, Preempted):
            self._write_last_state("preempted", str(error))
        elif error is not None:
            refusal = self._refusal_of(error)
        if refusal is not None:
            self._write_last_state("refused", str(refusal))
        if self.tracker is not None:
            self.tracker.finish()
        self._lock.close()
        if refusal is not None and refusal is not error:
            raise refusal from error

    def _refusal_of(self, error: BaseException) -> Refused | None:
        """Return an error as a refusal if it is not a bug: it is a refusal, or memory or disk is full. Else None."""
        if isinstance(error, BrokenMachine) or may_pass(error):
            return None
        if isinstance(error, Refused):
            return error
        if is_out_of_memory(error):
            return out_of_memory_refusal(error, self.settings.flags.values)
        if not disk_is_full(self.path, error):
            return None
        return Refused(full_disk_refusal(self.path, error, f" ({error})", resumes=True))

    def _after_interrupt(self) -> str:
        if saved := _whole_checkpoints(self.path):
            return f"the same command resumes from {saved[-1]}"
        if any(any(self.path.glob(place)) for place in ("eval", PARTIAL_FOLDER, f"*/{PARTIAL_FOLDER}")):
            return "what was evaluated is kept: the same command resumes"
        return "nothing was saved yet: the same command starts again"

    def _is_ours(self) -> bool:
        """Return whether the lock that this process holds is still the folder's. Raises OSError if the disk fails."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK_FILE))
        except (FileNotFoundError, NotADirectoryError):
            return False

    def _lost_line(self) -> str:
        return (
            f"{self.path} or its {LOCK_FILE} was deleted or replaced while this run worked in it: another run may use "
            "the folder now; start the same command again"
        )

    def check_ours(self) -> None:
        """Refuse to write into a folder that was deleted or replaced under the run. On rank 0."""
        if is_main_process() and self._lock is not None and not self._is_ours():
            raise Refused(self._lost_line())

    def _write_last_state(self, state: str, reason: str) -> None:
        try:
            self.write_state(state, reason)
        except OSError as error:
            if not disk_is_full(self.path, error):
                raise
            write_in_place(self.path / "state.json", {"state": state, "reason": reason})

    def write_state(self, state: str, reason: str | None) -> None:
        """Write state.json: running, preempted, refused or finished."""
        write_json(self.path / "state.json", {"state": state, "reason": reason})

    def describe(self, split_record: dict, **more) -> None:
        """Write split.json, and run.json: the command and its flags, versions, processes and device, and `more`."""
        world = {"num_processes": self.accelerator.num_processes, "device": device_name(self.accelerator.device)}
        for note in split_record["notes"]:
            say(f"data: {note}")
        self.write_json("split.json", split_record)
        flags = self.settings.flags
        described = {"task": split_record["task"], "flags": dict(flags.values), "typed_flags": sorted(flags.typed)}
        self.update_json("run.json", run_id=self.run_id, **describe_process(), **described, world=world, **more)

    @contextlib.contextmanager
    def timed(self, name: str):
        """Record the seconds that the block takes as a timing of the run."""
        started = time.perf_counter()
        yield
        self.timings[name] = time.perf_counter() - started

    def note_training_start(self) -> None:
        """Record the seconds from the launch until now, without those of the base evaluation."""
        self.timings["startup_s"] = time.time() - started_at() - self.timings.get("base_eval_s", 0.0)

    def finish(self, progress, write_report: Callable[[], Path]) -> None:
        """Write the timings and the report, and mark the run as finished.

        Args:
            progress: zerotune.training.progress.Progress.
            write_report: writes report.html and returns its path.
        """
        if not is_main_process():
            return
        seconds = max(progress.train_seconds, 1e-9)
        timings = {
            "startup_s": self.timings["startup_s"],
            "base_eval_s": self.timings.get("base_eval_s", 0.0),
            "train_s": progress.train_seconds,
            "train_examples_per_s": progress.num_examples / seconds,
            "train_tokens_per_s": progress.num_tokens / seconds,
            "peak_memory_bytes": peak_memory_bytes(self.accelerator.device),
            "total_s": time.time() - started_at(),
        }
        self.update_json("run.json", timings=timings)
        self._track_scores(progress.step)
        report = write_report()
        self.write_state("finished", None)
        say(f"report: {report}")

    def _track_scores(self, step: int) -> None:
        """Send the test scores before training (at step 0) and after it to the tracker.

        Weights & Biases takes no step before the last one logged, so it gets both at the end.
        """
        if self.tracker is None:
            return
        for name, group in (("base", "base"), ("final", "test")):
            path = self.path / "eval" / name / "metrics.json"
            if path.exists():
                at = 0 if name == "base" and self.settings.tracker == "tensorboard" else step
                self.tracker.log(scores(read_json(path), group), step=at)

    def write_json(self, name: str, value) -> None:
        """Write one of the folder's JSON files, on rank 0."""
        if is_main_process():
            write_json(self.path / name, value)

    def update_json(self, name: str, **values) -> None:
        """Add to one of the folder's JSON files, on rank 0."""
        if is_main_process():
            path = self.path / name
            write_json(path, (read_json(path) if path.exists() else {}) | values)

    def start_tracker(self) -> None:
        """Send the flags, and every row that `log` gets, to TensorBoard or Weights & Biases too."""
        kind = self.settings.tracker
        if kind == "none" or not is_main_process():
            return
        self.tracker = start_tracker(kind, self.path, self.run_id, self.settings.flags.values)

    def log(self, row: dict) -> None:
        """Append a line to metrics.jsonl; `row` has a "step"."""
        if not is_main_process():
            return
        self.check_ours()
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")
            if any(name.startswith("eval_") for name in row):  # the next checkpoint refers to this line
                file.flush()
                os.fsync(file.fileno())
        if self.tracker is not None:
            self.tracker.log(grouped(row), step=row["step"])

    def forget_metrics_after(self, step: int, evaluated_step: int) -> None:
        """Delete the lines that a stopped run logged after its last checkpoint: those steps and evaluations follow."""
        if is_main_process() and self.metrics_path.exists():
            lines = read_metrics_lines(self.metrics_path)
            kept = [line for line in lines if line["step"] <= (evaluated_step if "eval_loss" in line else step)]
            write_json_lines(self.metrics_path, kept)
