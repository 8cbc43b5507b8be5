"""Several runs from one command: --seeds, and --sweep with a file of flags and their values.

# two rates × two batch sizes: four runs, or four for each of the --seeds
--learning-rate 1e-5 2e-5
--batch-size 16 32
"""

import argparse
import hashlib
import itertools
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import Refused
from zerotune.settings.flag_files import FlagLine, flag_name, read_flag_file
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.groups import FREE_FLAGS
from zerotune.settings.names import default_run_folder, model_or_default

# Flags that all runs of a sweep must share, since they are ranked by one score on the same validation split.
_SAME_ROWS = "the runs are ranked on the same validation rows"
SHARED = {
    "--choose-by": "the runs are ranked by one metric",
    **dict.fromkeys(("--test-file", "--test-size"), "the runs report on the same test rows"),
    **dict.fromkeys(("--dataset", "--glue", "--label-column", "--validation-file"), _SAME_ROWS),
    **dict.fromkeys(("--split", "--split-seed", "--validation-size", "--limit-eval", "--label-separator"), _SAME_ROWS),
    "--preset": "give it on the command line, or sweep its flags",
    "--seed": "a seed is not a setting to choose; give --seeds on the command line",
    "--help": "it is for the command line",
    "-h": "it is for the command line",
}
# Flags that change what the validation loss is an average of, by head: of windows or of an answer's tokens.
_LOSS_FLAGS = {
    "span": ("max_length", "doc_stride", "model", "revision"),
    "generate": ("model", "revision", "prompt_format"),
}
# Flags for all runs together, with the number of words that follow: none, one, or (None) all up to the next flag.
OF_ALL_RUNS = {"--seeds": None, "--sweep": 1, "--launcher": 1, "--output-dir": 1, "--state-file": 1, "--plan": 0}
MOST_CHARACTERS = 40  # of a value in a folder's name
MOST_IN_NAME = 180


@dataclass(frozen=True)
class Member:
    """One of several runs.

    Attributes:
        name: of its folder, such as learning_rate-2e-5_seed-1.
        setting: its value of each swept flag, as text; runs that differ only in the seed have the same.
        flags: the words of its command line that differ from the other runs'.
    """

    name: str
    setting: Mapping[str, str]
    seed: int | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Runs:
    """The runs of --seeds and --sweep.

    Attributes:
        folder: the parent of the runs' folders.
        words: the command line that all runs share.
        flags: all flags that change the runs' numbers, except those in which they differ, as plain values.
        sweep: the values of each flag of the sweep; {} without --sweep.
        launcher: the words that start a run; () for this Python.
        plan: whether --plan was given.
        typed: names of the flags on the command line and in the preset.
    """

    script: str
    folder: Path
    words: tuple[str, ...]
    flags: Mapping[str, object]
    sweep: Mapping[str, tuple[str, ...]]
    seeds: tuple[int, ...]
    members: tuple[Member, ...]
    launcher: tuple[str, ...]
    plan: bool
    typed: frozenset[str] = frozenset()

    def command(self, member: Member) -> list[str]:
        """Return the flags of one run as words of a command line."""
        return [*self.words, *member.flags, "--output-dir", str(self.folder / member.name)]


def plan_runs(parser, given: Sequence[str], parsed: argparse.Namespace) -> Runs | None:
    """Return the runs of --seeds and --sweep; None where neither is given.

    Args:
        parser: the script's TrainParser.
        given: the words of the command line.
        parsed: the flags, those of a preset included.
    Raises:
        Refused: a flag cannot be used with several runs, or the sweep's file is wrong.
    """
    if parsed.seeds is None and parsed.sweep is None:
        if parsed.launcher is not None:
            raise Refused("--launcher starts the runs of --seeds or --sweep, and neither is given: leave it out")
        return None
    _refuse_flags_of_one_run(parsed, given)
    sweep = {} if parsed.sweep is None else _read_sweep(parsed.sweep, parser, given)
    if parsed.choose_by == "loss" and (unlike := changes_loss(map(flag_name, sweep), parsed.head)):
        raise Refused(
            f"{parsed.sweep}: --{unlike[0].replace('_', '-')} cannot be swept with --choose-by loss, since its values "
            "give losses of different quantities: choose by another metric"
        )
    seeds = tuple(parsed.seeds or ())
    members = [_member(setting, seed) for setting in _settings(sweep) for seed in seeds or (None,)]
    differing = {flag_name(flag) for flag in sweep} | {"typed", "preset_line"} | FREE_FLAGS
    differing |= {"seed"} if seeds else set()
    plain = {
        name: value if value is None or isinstance(value, bool | int | float) else str(value)
        for name, value in sorted(vars(parsed).items())
        if name not in differing
    }
    return Runs(
        script=parser.script,
        folder=parsed.output_dir or _default_folder(parser.task_name, parsed),
        words=tuple(_words_of_each(given)),
        flags=plain,
        sweep={flag_name(flag): tuple(value for value, _ in values) for flag, values in sweep.items()},
        seeds=seeds,
        members=tuple(members),
        launcher=tuple(_split_launcher(parsed.launcher)),
        plan=parsed.plan,
        typed=parsed.typed,
    )


def changes_loss(swept: Iterable[str], head: str) -> list[str]:
    """Return the swept flags whose values give validation losses that cannot be compared."""
    return [name for name in swept if name in ("head", *_LOSS_FLAGS.get(head, ()))]


def _refuse_flags_of_one_run(parsed: argparse.Namespace, given: Sequence[str]) -> None:
    which = "--seeds" if parsed.seeds is not None else "--sweep"
    seeds = parsed.seeds or []
    twice = [seed for number, seed in enumerate(seeds) if seed in seeds[:number]]
    if twice:
        raise Refused(f"--seeds has {twice[0]} twice: name each seed once")
    if seeds and any(word.partition("=")[0] == "--seed" for word in given):
        raise Refused("--seeds and --seed: leave one out")
    if parsed.push_to_hub is not None:
        raise Refused(f"--push-to-hub uploads one run, and {which} makes several: publish one of them later")
    if parsed.resume not in ("auto", "never"):
        raise Refused(f"--resume {parsed.resume} is for one run, and {which} makes several: leave it out, each resumes")


def _split_launcher(launcher: str | None) -> list[str]:
    try:
        return shlex.split(launcher or "")
    except ValueError as error:
        raise Refused(f"--launcher {launcher!r}: {str(error).lower()}; correct its quotes") from None


def _read_sweep(path: Path, parser, given: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the values by flag, each as text and in the form that a folder's name takes."""
    sweep = {}
    for line in read_flag_file(path, parser, parser.script):
        _check_line(line, parser, given)
        sweep[line.flag] = list(zip(line.values, _value_names(line.values), strict=True))
    if not sweep:
        raise Refused(f"{path} holds no flag; wanted lines of a flag and its values, such as --learning-rate 1e-5 2e-5")
    return sweep


def _check_line(line: FlagLine, parser, given: Sequence[str]) -> None:
    name = flag_name(line.flag)
    if line.flag in SHARED:
        raise Refused(f"{line.where}: {line.flag} cannot be swept: {SHARED[line.flag]}")
    if line.flag == "--train-file" and not {"--validation-file", "--test-file"} <= {w.partition("=")[0] for w in given}:
        raise Refused(
            f"{line.where}: --train-file cannot be swept: {_SAME_ROWS}, which would be drawn from it; give "
            "--validation-file and --test-file on the command line"
        )
    if name in FREE_FLAGS:
        raise Refused(f"{line.where}: {line.flag} does not change what a run computes; give it on the command line")
    if any(word.partition("=")[0] == line.flag for word in given):
        raise Refused(f"{line.where}: {line.flag} is on the command line too; leave it out there or here")
    if parser.takes_no_value(line.flag):
        raise Refused(f"{line.where}: {line.flag} takes no value and cannot be swept; give it on the command line")
    if len(line.values) < 2:
        found = f"has {'one value' if line.values else 'no value'}"
        raise Refused(f"{line.where}: {line.flag} {found}; wanted two or more, or give it on the command line")
    seen: dict[object, str] = {}
    for value in line.values:
        try:
            parsed = str(vars(FlagParser.read(parser, [line.flag, value]))[name])
        except Refused as refusal:
            raise Refused(f"{line.where}: {refusal}") from None
        if parsed in seen:
            other = f" (as {seen[parsed]})" if seen[parsed] != value else ""
            raise Refused(f"{line.where}: {line.flag} has {value} twice{other}; name each value once")
        seen[parsed] = value


def _value_names(values: Sequence[str]) -> list[str]:
    """Return values as parts of folder names: only letters, digits and .+-, short, and different from each other."""
    names = [re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-.") or "value" for value in values]
    folded = [name[:MOST_CHARACTERS].casefold() for name in names]  # some file systems ignore case
    return [
        f"{name[:MOST_CHARACTERS]}-{_short_hash(value)}"
        if len(name) > MOST_CHARACTERS or folded.count(short) > 1
        else name
        for name, short, value in zip(names, folded, values, strict=True)
    ]


def _settings(sweep: Mapping[str, list[tuple[str, str]]]) -> list[dict[str, tuple[str, str]]]:
    """Return each combination of values, the file's last flag changing fastest; [{}] without a sweep."""
    return [dict(zip(sweep, values, strict=True)) for values in itertools.product(*sweep.values())]


def _member(setting: Mapping[str, tuple[str, str]], seed: int | None) -> Member:
    parts = [f"{flag_name(flag)}-{name}" for flag, (_, name) in setting.items()]
    words = [word for flag, (value, _) in setting.items() for word in (flag, value)]
    if seed is not None:
        parts.append(f"seed-{seed}")
        words += ["--seed", str(seed)]
    name = "_".join(parts)
    if len(name) > MOST_IN_NAME:
        name = f"{name[:MOST_IN_NAME]}-{_short_hash(name)}"
    return Member(name, {flag_name(flag): value for flag, (value, _) in setting.items()}, seed, tuple(words))


def _default_folder(task_name: str, parsed: argparse.Namespace) -> Path:
    model = model_or_default(parsed.model, parsed.sample, task_name)
    single = default_run_folder(task_name, model, parsed.method, parsed.head)
    kind = "seeds" if parsed.sweep is None else f"sweep-{_value_names([parsed.sweep.stem])[0]}"
    return single.with_name(f"{single.name}-{kind}")


def _words_of_each(given: Sequence[str]) -> list[str]:
    """Return a command line without the flags of OF_ALL_RUNS."""
    kept, to_skip = [], 0
    for word in given:
        is_flag = word.startswith("--")
        if to_skip and not is_flag:
            to_skip -= 1
            continue
        to_skip = 0
        flag, _, value = word.partition("=")
        if flag in OF_ALL_RUNS:
            following = OF_ALL_RUNS[flag]
            to_skip = 0 if value else len(given) if following is None else following
            continue
        kept.append(word)
    return kept


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
