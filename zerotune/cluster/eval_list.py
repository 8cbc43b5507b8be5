"""A list of evaluations, as slurm/eval.sh runs it: the lines still to do, the launch of each, and their comparison.

    # model                task  shots  seed  more flags of the eval script
    runs/sst2-a/final      sst2  0      0
    google/gemma-2-2b-it   sst2  4      0     --calibrate contextual
    google/gemma-2-2b-it   imdb  4      1     --test-size 2500

    python -m zerotune.cluster.eval_list todo LIST       # or all
    python -m zerotune.cluster.eval_list line LIST NUMBER
    python -m zerotune.cluster.eval_list compare LIST

Results go to runs/eval/LIST/, a folder for each line and for each version of its model. Nothing here imports torch.
"""

import hashlib
import os
import shlex
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from zerotune.cluster.jobs import TASKS, read_flags
from zerotune.errors import EXIT_BUG, EXIT_REFUSED, Refused
from zerotune.metrics.evaluations import headline, read_metrics
from zerotune.models.model_files import cached_snapshot, model_identity
from zerotune.run.run_files import read_state
from zerotune.settings.flag_files import read_words
from zerotune.settings.names import short_name

SCRIPTS = {Path(name).stem: f"eval/{name}" for name in TASKS}
FORM = "MODEL TASK SHOTS SEED [more flags]"


@dataclass(frozen=True)
class Line:
    """One evaluation. `number` counts the list's evaluations from 1; `where` names list and line for messages."""

    number: int
    where: str
    model: str
    task: str
    shots: int
    seed: int
    more: tuple[str, ...]
    root: Path
    revision: str | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder of its results, named with hashes of the model's version and of flags beyond the four columns."""
        hashed = [_sha256(shlex.join(self.more))] if self.more else []
        hashed.append(self._model_version())
        name = f"{self.task}-{short_name(self.model)}-{self.shots}shot-seed{self.seed}"
        return self.root / "-".join([name, *(one[:6] for one in hashed)])

    def _model_version(self) -> str:
        """Hash a folder's files, or a hub id and the commit that a job without a network will find."""
        if os.path.isdir(self.model):
            return model_identity(self.model, None)
        snapshot = None if os.environ.get("ZEROTUNE_ONLINE") else cached_snapshot(self.model, self.revision)
        return _sha256(f"{self.model} {snapshot and snapshot.name}")

    @property
    def command(self) -> list[str]:
        """The eval script and its flags."""
        shots = ["--shots", str(self.shots)] if self.shots else []
        given = ["--model", self.model, *shots, "--seed", str(self.seed), *self.more]
        return [SCRIPTS[self.task], *given, "--output-dir", str(self.folder)]

    @property
    def is_done(self) -> bool:
        """Whether the evaluation is finished."""
        return read_state(self.folder).get("state") == "finished" and (self.folder / "metrics.json").exists()


def read_list(path: Path) -> list[Line]:
    """Return the evaluations of a list. Raises Refused for a malformed line, and for two that write to one folder."""
    if not os.path.isfile(path):
        raise Refused(f"{path}: no such list; wanted a file with lines {FORM}")
    lines, folders = [], {}
    for where, words in read_words(path, path.name):  # a job reads a copy
        line = _line(len(lines) + 1, words, where, Path("runs/eval") / path.stem)
        if line.folder in folders:
            raise Refused(f"{line.where} writes to {line.folder}, as {folders[line.folder]} does: remove one")
        folders[line.folder] = line.where
        lines.append(line)
    if not lines:
        raise Refused(f"{path} holds no evaluation; wanted lines {FORM}")
    return lines


def _line(number: int, words: list[str], where: str, root: Path) -> Line:
    if len(words) < 4 or not (words[2].isdecimal() and words[3].isdecimal()):
        raise Refused(f"{where}: {' '.join(words)!r}; wanted {FORM}, such as google/gemma-2-2b-it sst2 4 0")
    model, task, shots, seed, *more = words
    if task not in SCRIPTS:
        raise Refused(f"{where}: no task {task!r}; wanted one of {', '.join(SCRIPTS)}")
    if "--prompt-seeds" in {word.partition("=")[0] for word in more}:
        raise Refused(
            f"{where}: --prompt-seeds gives several scores, and a list compares single ones; write a line per SEED"
        )
    if idle := {"-h", "--help", "--plan"} & set(more):
        raise Refused(f"{where}: {min(idle)} evaluates nothing; leave it out")
    owned = {"--model", "--shots", "--seed", "--output-dir"} & {word.partition("=")[0] for word in more}
    if owned:
        raise Refused(f"{where}: {', '.join(sorted(owned))} is set by the columns or by the list's name; leave it out")
    try:
        wanted = read_flags(SCRIPTS[task], ["--model", model, "--shots", shots, "--seed", seed, *more])
    except Refused as refusal:
        raise Refused(f"{where}: {refusal}") from None
    return Line(number, where, model, task, int(shots), int(seed), tuple(more), root, wanted.revision)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def compare(lines: list[Line]) -> None:
    """Compare the evaluations of each task with each other, and print the result.

    Raises:
        Refused: some are not done; the others have been compared.
    """
    from zerotune.report.comparison import read_comparison, write_comparison

    said = []
    done = [line for line in lines if line.is_done]
    for task in dict.fromkeys(line.task for line in done):
        folders = [line.folder for line in done if line.task == task]
        if len(folders) == 1:
            said.append(f"{task}: {folders[0]} alone, nothing to compare it with")
            continue
        try:
            report = write_comparison(read_comparison(folders), lines[0].root / f"compare-{task}")
            said.append(f"{task}: {len(folders)} evaluations compared in {report}")
        except Refused as error:
            said.append(f"{task}: not compared: {error}")
    for line in done:
        try:
            metrics = read_metrics(line.folder / "metrics.json")
        except Refused as error:
            said.append(f"{line.folder.name}: {error}")
            continue
        name = headline(metrics)
        score = f"{name.replace('_', ' ')} {metrics[name]:.4f}" if name in metrics else "no labels"
        said.append(f"{line.folder.name}: {score} on {metrics['count']:,} items")
    print("\n".join(said), flush=True)
    lacking = [line for line in lines if not line.is_done]
    if lacking:
        listed = "; ".join(
            f"{line.where} ({read_state(line.folder).get('state', 'never started')})" for line in lacking
        )
        raise Refused(f"{len(lacking)} of {len(lines)} evaluations are not done: {listed}; submit the list again")


def main(arguments: list[str]) -> None:
    """Print the answer to a verb: all, todo, line or compare."""
    verb, path, *rest = arguments
    lines = read_list(Path(path))
    if verb in ("all", "todo"):
        print(",".join(str(line.number) for line in lines if verb == "all" or not line.is_done))
    elif verb == "line":
        print("\n".join(lines[int(rest[0]) - 1].command))
    elif verb == "compare":
        compare(lines)
    else:
        raise ValueError(f"no verb {verb}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Refused as error:
        print(f"refused: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(EXIT_BUG if sys.argv[1] == "compare" else EXIT_REFUSED)
