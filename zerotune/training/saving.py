"""Saving a run's checkpoints, and selecting the one that it resumes from."""

import time
from dataclasses import asdict
from pathlib import Path

from zerotune.errors import Refused, counted
from zerotune.run.cpu import free_memory
from zerotune.run.folder import RunFolder
from zerotune.run.launch import from_rank_0, on_all_ranks
from zerotune.run.process import is_main_process, say
from zerotune.training import checkpoints
from zerotune.training.background import BackgroundSaves, Carrier
from zerotune.training.engine import Engine
from zerotune.training.progress import Progress
from zerotune.training.scratch import Scratch
from zerotune.training.snapshot import HostMemory, Waiting

# Largest share of the host memory free at the start of training that the copy may take.
LARGEST_SNAPSHOT = 0.5


class Saver(BackgroundSaves):
    """Saves the checkpoints of a run. All ranks call every method together.

    They are copied to host memory, or with --scratch-dir to a node-local disk, and written from there in the
    background. If host memory is short, training waits until they are written.

    Raises:
        Refused: a rank cannot write in --scratch-dir.
    """

    def __init__(self, engine: Engine, run: RunFolder):
        settings = run.settings
        self.run, self.engine, self.root = run, engine, settings.output_dir / "checkpoints"
        minutes = settings.checkpoint_every.minutes
        self._seconds_between = None if minutes is None else 60 * minutes
        self._last_save = time.monotonic()
        carrier = _choose_carrier(engine, self.root, settings.scratch_dir)
        super().__init__(carrier, settings.keep_checkpoints, engine.accelerator)

    @property
    def is_due_by_clock(self) -> bool:
        """Whether --checkpoint-every is in minutes and they have passed since the last save; rank 0's clock decides."""
        if self._seconds_between is None or self.on_its_way is not None:
            return False
        return time.monotonic() - self._last_save >= self._seconds_between

    def save(self, progress: Progress, weights_alone: bool = False) -> None:
        """Save a checkpoint of this step, and delete those that are no longer kept.

        Args:
            weights_alone: leave out the optimizer's state, for a best evaluation at a step where no checkpoint is due.
        Raises:
            Refused: the disk is full. Earlier checkpoints are unchanged.
        """
        record = {
            "run_id": self.run.run_id,
            "step": progress.step,
            "progress": asdict(progress),
            "num_processes": self.accelerator.num_processes,
        }
        self.run.check_ours()
        name_folder = checkpoints.best_folder if weights_alone else checkpoints.step_folder
        target, num_bytes = name_folder(self.root, progress.step), self.engine.checkpoint_bytes(weights_alone)
        self.start(target, record, self.engine.state_files(weights_alone), num_bytes)
        if not weights_alone:
            self._last_save = time.monotonic()  # after the wait: else a slow disk would get a save after each step


def _choose_carrier(engine: Engine, root: Path, scratch_dir: Path | None) -> Carrier:
    if scratch_dir:
        return Scratch(scratch_dir, root, engine.accelerator)
    need, free = engine.snapshot_bytes(), free_memory()
    fits = need <= LARGEST_SNAPSHOT * free
    shortages = on_all_ranks(engine.accelerator, None if fits else (need, free))
    short = next((each for each in shortages if each), None)
    if short is None:
        return HostMemory()
    need_gib, free_gib = (each / 2**30 for each in short)
    say(
        f"training waits while a checkpoint is written: a copy in host memory takes {need_gib:.1f} GiB a node and "
        f"{free_gib:.1f} GiB are free; --scratch-dir with a disk of the node shortens the wait"
    )
    return Waiting()


def resume(engine: Engine, run: RunFolder, optimizer: str) -> Progress:
    """Load the checkpoint that --resume asks for; rank 0 chooses for all ranks.

    Args:
        optimizer: --optimizer, "adamw" or "adamw8bit".
    Returns:
        The run's progress; step 0 if there is no checkpoint.
    Raises:
        Refused: a checkpoint given by path belongs to another run or is damaged; or the state of adamw8bit under
            DeepSpeed was saved by a different number of processes.
        OSError: the disk cannot be read, so that no checkpoint is found.
    """
    accelerator = engine.accelerator
    root, wanted = run.path / "checkpoints", run.settings.resume
    folder, lines = from_rank_0(accelerator, lambda: _choose_checkpoint(root, wanted, run.run_id))
    for line in lines:
        say(line)
    if folder is not None and (problem := _cannot_move(folder, engine, optimizer)):
        raise Refused(problem)
    if is_main_process():
        checkpoints.delete_incomplete(root)  # if they filled the disk, it must not stay full
        # later checkpoints are damaged or abandoned: no start may resume from them, nor take best weights from them
        checkpoints.unmark_later(root, folder)
    if folder is None:
        return Progress()
    accelerator.wait_for_everyone()
    engine.load(folder)
    record = checkpoints.read_progress(folder)
    progress, saved_by = Progress.of(record["progress"]), record["num_processes"]
    now = accelerator.num_processes
    moved = f" (saved by {_processes(saved_by)}, now {now})" if saved_by != now else ""
    say(f"resumes after step {progress.step} from {folder}{moved}")
    return progress


def _processes(number: int) -> str:
    return counted(number, "process", "processes")


def _choose_checkpoint(root: Path, wanted: str, run_id: str) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to resume from or None, and lines to print."""
    checkpoints.put_back_replaced(root)
    if wanted in ("auto", "never"):
        return checkpoints.newest_whole(root, run_id)
    folder = Path(wanted)
    assert not checkpoints.holds_weights_alone(folder), "refused when the run started"
    problem = checkpoints.defect(folder, run_id)
    if problem:
        raise Refused(f"--resume {folder}: {problem}: name a whole checkpoint of this run, or use --resume auto")
    if problem := checkpoints.defect_of_best(folder, run_id):
        raise Refused(f"--resume {folder}: {problem}: restore that folder")
    return folder, []


def _cannot_move(folder: Path, engine: Engine, optimizer: str) -> str | None:
    """Return why this number of processes cannot load a checkpoint; None if it can."""
    if not (engine.deepspeed and optimizer == "adamw8bit"):
        return None
    saved_by, now = checkpoints.read_progress(folder)["num_processes"], engine.accelerator.num_processes
    if saved_by == now:
        return None
    return (
        f"{folder} was saved by {_processes(saved_by)} and this run has {now}: under DeepSpeed, adamw8bit keeps its "
        f"state in blocks that belong to one process: launch {_processes(saved_by)}"
    )
