"""Saving a run's checkpoints, and selecting the one that it resumes from."""

from dataclasses import asdict
from pathlib import Path

from zerotune.errors import Refused
from zerotune.run.folder import RunFolder
from zerotune.run.launch import from_rank_0
from zerotune.run.process import is_main_process, say
from zerotune.training import checkpoints
from zerotune.training.engine import Engine
from zerotune.training.progress import Progress
from zerotune.training.scratch import ScratchSaves


class Saver:
    """The checkpoints of a run. All ranks call every method together.

    With --scratch-dir, a checkpoint is first written to a node-local disk and moved in the background.

    Raises:
        Refused: a rank cannot write in --scratch-dir.
    """

    def __init__(self, engine: Engine, run: RunFolder):
        settings = run.settings
        self.run, self.engine, self.accelerator = run, engine, engine.accelerator
        self.root = settings.output_dir / "checkpoints"
        self._keep = settings.keep_checkpoints
        self._scratch = None
        if settings.scratch_dir:
            self._scratch = ScratchSaves(settings.scratch_dir, self.root, self._keep, self.accelerator)

    @property
    def moving_step(self) -> int | None:
        """The step of a checkpoint that is on its way from scratch; None without one."""
        return self._scratch.step if self._scratch else None

    @property
    def has_moved(self) -> bool:
        """Whether this rank's files of that checkpoint are in the run folder."""
        return self._scratch is not None and self._scratch.has_arrived

    def save(self, progress: Progress) -> None:
        """Save a checkpoint of this step, and delete those that are no longer kept.

        Raises:
            Refused: the disk is full. Earlier checkpoints are as they were.
        """
        record = {
            "run_id": self.run.run_id,
            "step": progress.step,
            "progress": asdict(progress),
            "num_processes": self.accelerator.num_processes,
        }
        self.run.check_ours()
        num_bytes = self.engine.checkpoint_bytes()
        if self._scratch:
            self._scratch.start(record, self.engine.save, num_bytes)
            return
        checkpoints.save(self.root, record, self.engine.save, num_bytes, self.accelerator)
        if is_main_process():
            checkpoints.prune(self.root, self._keep, progress.step)

    def finish_move(self) -> None:
        """Make a checkpoint whose files all ranks have moved from scratch count."""
        self._scratch.finish()

    def close(self) -> None:
        """Wait for a checkpoint that is on its way from scratch; no further ones are saved."""
        if self._scratch:
            self._scratch.close()


def resume(engine: Engine, run: RunFolder, optimizer: str) -> Progress:
    """Load the checkpoint that --resume means; rank 0 chooses for all ranks.

    Args:
        optimizer: --optimizer, "adamw" or "adamw8bit".
    Returns:
        The run's progress: step 0 where there is no checkpoint.
    Raises:
        Refused: a checkpoint that was asked for by path belongs to another run or is damaged; the state of adamw8bit
            under DeepSpeed was saved by another number of processes.
    """
    accelerator = engine.accelerator
    root, wanted = run.path / "checkpoints", run.settings.resume
    folder, lines, problem = from_rank_0(accelerator, lambda: _choose_checkpoint(root, wanted, run.run_id))
    for line in lines:
        say(line)
    if folder is not None:
        problem = problem or _cannot_move(folder, engine, optimizer)
    if problem:
        raise Refused(problem)
    if folder is None:
        return Progress()
    if wanted != "auto" and is_main_process():
        # the run resumes before these: killed now, it must come back to `folder`
        checkpoints.unmark_later(folder)
    accelerator.wait_for_everyone()
    engine.load(folder)
    record = checkpoints.read_progress(folder)
    progress, saved_by = Progress(**record["progress"]), record["num_processes"]
    now = accelerator.num_processes
    moved = f" (saved by {saved_by} processes, now {now})" if saved_by != now else ""
    say(f"resumes after step {progress.step} from {folder}{moved}")
    return progress


def _choose_checkpoint(root: Path, wanted: str, run_id: str) -> tuple[Path | None, list[str], str | None]:
    """Return the checkpoint to resume from, lines to print, and the reason to refuse it, None without one."""
    checkpoints.put_back_replaced(root)
    if wanted in ("auto", "never"):
        return *checkpoints.newest_whole(root, run_id), None
    folder = Path(wanted)
    if folder.resolve().parent != root.resolve():
        return None, [], f"--resume {folder} is no checkpoint of this run: name one in {root}, or use --resume auto"
    problem = checkpoints.defect(folder, run_id)
    if problem:
        return None, [], f"--resume {folder}: {problem}: name a whole checkpoint of this run, or use --resume auto"
    return folder, [], None


def _cannot_move(folder: Path, engine: Engine, optimizer: str) -> str | None:
    """Return why a checkpoint cannot be loaded by this number of processes; None where it can."""
    if not (engine.deepspeed and optimizer == "adamw8bit"):
        return None
    saved_by, now = checkpoints.read_progress(folder)["num_processes"], engine.accelerator.num_processes
    if saved_by == now:
        return None
    return (
        f"{folder} was saved by {saved_by} processes and this run has {now}: under DeepSpeed, adamw8bit keeps its "
        f"state in blocks of one process, which cannot move; launch {saved_by}"
    )
