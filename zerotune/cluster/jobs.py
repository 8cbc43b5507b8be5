"""Answers for a SLURM job script before and after it launches a run: its folder, its progress, the items it lacks.

    python -m zerotune.cluster.jobs plan train/sst2.py --model meta-llama/Llama-3.2-1B
    python -m zerotune.cluster.jobs folder eval/sst2.py --model runs/a/final
    python -m zerotune.cluster.jobs progress runs/a
    python -m zerotune.cluster.jobs prefetch --model meta-llama/Llama-3.2-1B
    python -m zerotune.cluster.jobs members train/sst2.py --seeds 0 1 2        # and member NUMBER, summarise

Nothing here imports torch: a job script waits for each answer.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from zerotune.cluster import prefetch
from zerotune.errors import Refused, counted, listed
from zerotune.files import hold_lock
from zerotune.models.model_files import adapter_base, cached_snapshot, is_hub_id, missing_folder
from zerotune.run.folder import PARTIAL_FOLDER
from zerotune.run.process import run_script
from zerotune.run.run_files import read_state
from zerotune.settings.deepspeed import read_deepspeed_config, zero_stage
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.flags import eval_parser, train_parser, with_engine_flag
from zerotune.settings.groups import DataSettings
from zerotune.settings.names import (
    check_names_model,
    default_eval_folder,
    default_run_folder,
    final_of_run,
    model_or_default,
)
from zerotune.settings.resolve import data_settings
from zerotune.settings.sweeps import Runs
from zerotune.squad.settings import qa_eval_parser, qa_train_parser
from zerotune.sweep.folder import check_folder, describe_member, is_finished, make_folder, write_record
from zerotune.sweep.run import sole_user
from zerotune.tasks.classify import GLUE, OWN
from zerotune.tasks.imdb import IMDB
from zerotune.tasks.sst2 import SST2
from zerotune.training import checkpoints

# The task of each script, as in the names of run folders.
TASKS = {"sst2.py": "sst2", "imdb.py": "imdb", "qa.py": "squad", "classify.py": OWN.name}
PARSERS = {
    "train/sst2.py": lambda: train_parser("", SST2),
    "train/imdb.py": lambda: with_engine_flag(train_parser("", IMDB)),
    "train/classify.py": lambda: train_parser("", OWN, glue=GLUE),
    "train/qa.py": lambda: qa_train_parser(""),
    "eval/sst2.py": lambda: eval_parser("", SST2),
    "eval/imdb.py": lambda: eval_parser("", IMDB),
    "eval/classify.py": lambda: eval_parser("", OWN, GLUE),
    "eval/qa.py": lambda: qa_eval_parser(""),
}
WORDNET = prefetch.Item("wordnet")
ARRAY_LOCK = ".array.lock"  # in the parent folder of several runs; a command that makes them all holds another lock


@dataclass(frozen=True)
class Wanted:
    """The part of a script's flags that a job script needs to know.

    Attributes:
        script: "train/sst2.py", …
        task: "sst2", "imdb", "classify" or "squad".
        trains: whether it is a train script.
        model: hub id or folder, with the script's default filled in.
        folder: where it writes.
        scores_file: whether eval/qa.py only scores a prediction file.
    """

    script: str
    task: str
    trains: bool
    model: str
    revision: str | None
    folder: Path
    data: DataSettings
    deepspeed: Path | None = None
    push_to_hub: str | None = None
    shots: int = 0
    scores_file: bool = False

    @property
    def has_own_model(self) -> bool:
        """Whether the model is the tiny one of --sample."""
        return self.data.sample and self.model == model_or_default(None, True, self.task)


def read_flags(script: str, arguments: list[str]) -> Wanted:
    """Read the flags of a train or eval script with its own parser.

    Raises:
        Refused: the script is not a task's, it would refuse the flags, or a run given as --model has no final/ yet.
    """
    name, flags = _parse(script, arguments)
    task, trains = TASKS[Path(script).name], name.startswith("train/")
    if not trains and getattr(flags, "score", None) is None:
        check_names_model(flags.model, flags.sample)
    model = final_of_run(model_or_default(flags.model, flags.sample, task))
    given = {"data": data_settings(flags), "revision": flags.revision}
    if trains:
        folder = flags.output_dir or default_run_folder(task, model, flags.method, flags.head)
        given |= {"deepspeed": flags.deepspeed, "push_to_hub": flags.push_to_hub}
    else:
        folder = flags.output_dir or default_eval_folder(task, model)
        given |= {"shots": flags.shots, "scores_file": getattr(flags, "score", None) is not None}
    return Wanted(script, task, trains, model, folder=folder, **given)


def _parse(script: str, arguments: list[str]) -> tuple[str, argparse.Namespace]:
    name = "/".join(Path(script).parts[-2:])
    if name not in PARSERS:
        raise Refused(f"{script} is not a task's script: wanted one of {', '.join(PARSERS)}")
    return name, PARSERS[name]().read(arguments)


def read_each(script: str, arguments: list[str]) -> list[Wanted]:
    """Read the flags of a script for each run that --seeds and --sweep ask for. Raises Refused like `read_flags`."""
    runs = read_runs(script, arguments)
    if runs is None:
        return [read_flags(script, arguments)]
    return [read_flags(script, runs.command(member)) for member in runs.members]


def read_runs(script: str, arguments: list[str]) -> Runs | None:
    """Return the runs of --seeds and --sweep, None for a single run. Raises Refused for wrong flags or --launcher."""
    runs = getattr(_parse(script, arguments)[1], "runs", None)
    if runs is not None and runs.launcher:
        raise Refused("--launcher has no use on the cluster, where the job script launches each run: leave it out")
    return runs


def print_members(runs: Runs) -> None:
    """Write sweep.json, and print the numbers of the runs that are not finished, from 1."""
    if runs.plan:
        raise Refused(
            f"--plan starts no run: use bash slurm/{Path(runs.script).stem}.sh with the same flags, which needs no job"
        )
    make_folder(runs)
    with hold_lock(runs.folder / ARRAY_LOCK), sole_user(runs.folder):  # the tasks of an array start together
        write_record(runs)
    numbered = enumerate(runs.members, start=1)
    print(*(number for number, member in numbered if not is_finished(runs.folder / member.name)))


def print_member(runs: Runs, number: str) -> None:
    """Print the script and the flags of a run, each followed by a NUL. Raises Refused for a number that no run has."""
    if not (number.isdecimal() and 1 <= int(number) <= len(runs.members)):
        count = len(runs.members)
        raise Refused(f"there is no run {number} of {count}: submit them with sbatch --array=1-{count}")
    words = [runs.script, *runs.command(runs.members[int(number) - 1])]
    print("\0".join(words), end="\0")  # a flag's value may have lines, but no NUL


def print_summary(runs: Runs) -> None:
    """Summarise the runs that are finished. Raises Refused if some are not, except in a task of an array."""
    from zerotune.sweep.summary import summarise

    with hold_lock(runs.folder / ARRAY_LOCK):  # the last task of an array sees all others finished
        report = summarise(runs, {})
    print(f"report: {report}", flush=True)
    open_ones = [member.name for member in runs.members if not is_finished(runs.folder / member.name)]
    if open_ones and "SLURM_ARRAY_TASK_ID" not in os.environ:
        raise Refused(f"{len(open_ones)} of {len(runs.members)} runs are not finished ({listed(open_ones)})")


def progress_of(folder: Path) -> str:
    """Return a run's progress as one word, which changes whenever the run advances.

    The word has the step of the newest complete checkpoint, the number of milestones reached (base evaluation, final/,
    final evaluation, an eval script's own scores), and the bytes of scores that unfinished evaluations keep.
    """
    marks = (folder / "checkpoints").glob(f"step-[0-9]*/{checkpoints.MARKER}")
    steps = [path.parent.name.removeprefix("step-") for path in marks]
    newest = max((int(step) for step in steps if step.isdecimal()), default=0)
    milestones = ("eval/base/metrics.json", "final/task.json", "eval/final/metrics.json", "metrics.json")
    scores = [path for place in (".", "eval/*", "seed-*") for path in folder.glob(f"{place}/{PARTIAL_FOLDER}/*")]
    num_bytes = sum(path.stat().st_size for path in scores)
    return f"{newest}+{sum((folder / name).exists() for name in milestones)}+{num_bytes}"


def describe_progress(folder: Path) -> str:
    """Return whether a launch will start the run of a folder, resume it, or do nothing."""
    state = read_state(folder)
    if not state:
        return "fresh"
    if state.get("state") == "finished":
        return "finished"
    step = progress_of(folder).partition("+")[0]
    reason = f", {state['reason']}" if state.get("reason") else ""
    return f"resumed after step {step} (was {state.get('state')}{reason})"


def describe_job(wanted: Wanted, environment: dict[str, str]) -> list[str]:
    """Return the first lines of a job's log: nodes, devices, world size, ZeRO stage, run folder and its progress.

    Args:
        environment: SLURM's variables and those that the job script sets.
    Raises:
        Refused: the DeepSpeed file is missing or wrong.
    """
    num_nodes = int(environment.get("SLURM_JOB_NUM_NODES") or 1)
    processes = int(environment.get("ZEROTUNE_PROCESSES_PER_NODE", "1"))
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    stage = zero_stage(read_deepspeed_config(wanted.deepspeed))
    file = f" ({wanted.deepspeed})" if wanted.deepspeed else ""
    return [
        f"nodes: {num_nodes} ({environment.get('SLURM_JOB_NODELIST', 'this one')})",
        f"devices: {f'{gpus} GPUs' if gpus else 'CPU'} and {processes} process{'es' * (processes > 1)} a node",
        f"world size: {num_nodes * processes}",
        f"ZeRO stage: {stage}{file}" if stage else "ZeRO stage: none",
        f"run folder: {wanted.folder}: {describe_progress(wanted.folder)}",
    ]


def check_offline(wanted: Wanted) -> None:
    """Refuse a job that would miss something without a network, with the command that fetches it."""
    target = wanted.push_to_hub
    if target:
        raise Refused(
            f"--push-to-hub {target} needs a network, which jobs do not have: leave it out, and run `python "
            f"eval/publish.py {wanted.folder} {target}` on the login node when the run is finished"
        )
    for flag in ("train_file", "validation_file", "test_file"):
        path = getattr(wanted.data, flag)
        if path is not None and not os.path.exists(path):
            raise Refused(f"--{flag.replace('_', '-')} {path}: no such file on this node; put it on the shared disk")
    missing = prefetch.missing_items(items_of(wanted))
    if missing.pop(WORDNET, None):
        print("METEOR will be left out: no WordNet (bash slurm/prefetch.sh --wordnet fetches it)", flush=True)
    if missing:
        line = f"bash slurm/prefetch.sh {' '.join(item.flag for item in missing)}"
        found = "; ".join(f"{item} ({why})" for item, why in missing.items())
        raise Refused(f"not in the cache {prefetch.cache_root()}: {found}; on the login node run: {line}")


def items_of(wanted: Wanted) -> list[prefetch.Item]:
    """Return the items that a script reads from the hub or from WordNet. Raises Refused for an impossible model."""
    items = [] if wanted.scores_file or wanted.has_own_model else _models_of(wanted.model, wanted.revision)
    datasets = () if wanted.data.sample else dict.fromkeys(_datasets_of(wanted))
    items += [prefetch.Item("dataset", name, revision) for name, revision in datasets if name]
    return [*items, WORDNET] if wanted.task == "squad" else items


def _items_of_all(every: list[Wanted]) -> list[prefetch.Item]:
    return list(dict.fromkeys(item for wanted in every for item in items_of(wanted)))


def _models_of(model: str, revision: str | None) -> list[prefetch.Item]:
    """Return the model if it is on the hub, and an adapter's base if that is on the hub and known yet."""
    items, folder = [], Path(model)
    if not os.path.isdir(folder):
        if not is_hub_id(model):
            raise missing_folder(model) or Refused(f"--model {model} is neither a folder nor a hub id: correct it")
        items.append(prefetch.Item("model", model, revision))
        folder = cached_snapshot(model, revision)
    base = adapter_base(folder) if folder else None
    if base is not None and not os.path.isdir(base[0]):
        items.append(prefetch.Item("model", *base))
    return items


def _datasets_of(wanted: Wanted) -> list[tuple[str | None, str | None]]:
    """Return hub id and revision of each data set whose rows are read; zerotune/tasks/sources.py has the same rules."""
    data = wanted.data
    ours = prefetch.dataset_of(wanted.task, data.dataset or (data.glue and GLUE[data.glue].dataset))
    if wanted.trains:
        return [] if data.train_file else [ours]
    split_file = Path(wanted.model).parent / "split.json"
    is_told = data.dataset or data.split or data.glue
    found = ours if is_told or not split_file.exists() else prefetch.dataset_of_split(split_file)
    drawn_from_file = data.train_file and data.split not in (None, "official")
    reads_tests = not (data.validation_file or data.test_file or drawn_from_file)
    reads_shots = wanted.shots and not data.train_file
    return [found] if reads_tests or reads_shots else []


def prefetch_items(arguments: list[str]) -> None:
    """Do the work of slurm/prefetch.sh: fetch the items of a command line, or those named, or verify fetched ones.

    Raises:
        Refused: an item cannot be fetched, or has changed since it was fetched.
    """
    if arguments and Path(arguments[0]).name in TASKS:
        update = "--update" in arguments
        every = read_each(arguments[0], [flag for flag in arguments[1:] if flag != "--update"])
        items = _items_of_all(every)
        _fetch(items, update)
        # an adapter's base is known only now
        _fetch([item for item in _items_of_all(every) if item not in items], update)
    else:
        parser = FlagParser(prog="slurm/prefetch.sh")
        parser.add_argument("--model", action="append", default=[], metavar="ID[@REVISION]")
        parser.add_argument("--dataset", action="append", default=[], metavar="ID[@REVISION]")
        parser.add_argument("--wordnet", action="store_true", help="for METEOR")
        parser.add_argument("--update", action="store_true", help="fetch the newest commit of listed items")
        parser.add_argument("--verify", action="store_true", help="fetch nothing, hash what the manifest lists")
        flags = parser.read(arguments)
        if flags.verify:
            _verify()
            return
        named = [("model", text) for text in flags.model] + [("dataset", text) for text in flags.dataset]
        if not named and not flags.wordnet:
            raise Refused("name what to fetch: a train or eval command, --model, --dataset or --wordnet; or --verify")
        items = [prefetch.parse_item(kind, text) for kind, text in named]
        _fetch(items + ([WORDNET] if flags.wordnet else []), flags.update)
    print(f"manifest: {prefetch.cache_root() / prefetch.MANIFEST}")


def _fetch(items: list[prefetch.Item], update: bool) -> None:
    for item in items:
        entry = prefetch.fetch(item, update)
        size = sum(file["bytes"] for file in entry["files"].values())
        print(f"{item}: {len(entry['files'])} files, {size / 2**20:,.1f} MiB, commit {entry['revision']}", flush=True)


def _verify() -> None:
    items = prefetch.listed_items()
    damaged = prefetch.missing_items(items, whole=True)
    if damaged:
        found = "; ".join(f"{item}: {why}" for item, why in damaged.items())
        raise Refused(f"{found}; fetch again: bash slurm/prefetch.sh {' '.join(item.flag for item in damaged)}")
    print(f"{len(items)} items in {prefetch.cache_root()} are as they were fetched")


def print_progress(folder: Path) -> None:
    """Print state, progress and a stamp of state.json, which changes when it is written."""
    path = folder / "state.json"
    stamp = path.stat().st_mtime_ns if path.exists() else 0
    print(read_state(folder).get("state", "none"), progress_of(folder), stamp)


def print_plan(script: str, arguments: list[str]) -> None:
    """Print the plan of a job, or of each of its runs. Raises Refused if the job would miss something."""
    runs, every = read_runs(script, arguments), read_each(script, arguments)
    if runs is not None:
        check_folder(runs)
        count = len(runs.members)
        each = f"each in its own job with `sbatch --array=1-{count}`, else one after the other in one job"
        print(f"{counted(count, 'run')}: {each}")
        print(*(describe_member(runs, member) for member in runs.members), sep="\n", flush=True)
    for wanted in every:
        _print_plan(wanted)


def _print_plan(wanted: Wanted) -> None:
    for line in describe_job(wanted, dict(os.environ)):
        print(line, flush=True)
    if read_state(wanted.folder).get("state") != "finished" and not os.environ.get("ZEROTUNE_ONLINE"):
        check_offline(wanted)


def main(arguments: list[str]) -> None:
    """Print the answer to a verb: plan, folder, progress, prefetch, members, member or summarise."""
    verb, *rest = arguments
    answers = {
        "plan": lambda script, *flags: print_plan(script, list(flags)),
        "members": lambda script, *flags: print_members(read_runs(script, list(flags))),
        "member": lambda number, script, *flags: print_member(read_runs(script, list(flags)), number),
        "summarise": lambda script, *flags: print_summary(read_runs(script, list(flags))),
        "folder": lambda script, *flags: print(read_flags(script, list(flags)).folder),
        "progress": lambda folder: print_progress(Path(folder)),
        "prefetch": lambda *items: prefetch_items(list(items)),
    }
    answers[verb](*rest)


if __name__ == "__main__":
    run_script(main, sys.argv[1:])
