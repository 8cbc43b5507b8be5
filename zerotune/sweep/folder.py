"""Check and open the parent folder of several runs; sweep.json lists them before the first one starts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from zerotune.errors import Refused, listed
from zerotune.files import disk_error_number, full_disk_refusal, write_json
from zerotune.run.folder import check_place, foreign_files, held_results
from zerotune.run.run_files import SWEEP_RECORD, SweepRecord, read_state, read_sweep
from zerotune.settings.flag_files import flag_name
from zerotune.settings.sweeps import Member, Runs


def check_folder(runs: Runs) -> None:
    """Refuse a folder that holds anything other than runs of the same script and shared flags.

    Values and seeds may be added, and a command may name only some of a folder's runs: the others are kept.
    """
    folder = runs.folder
    check_place(folder)
    if (folder / "run.json").exists():
        raise Refused(f"{folder} holds a single run, and several need a folder of their own: name another --output-dir")
    held = held_results(folder) or foreign_files(folder)  # before the record, which another task may write meanwhile
    if not (folder / SWEEP_RECORD).exists():
        if held:
            raise Refused(f"{folder} holds {listed(held)} but no {SWEEP_RECORD}: choose a new or empty --output-dir")
        return
    earlier = read_sweep(folder)
    wanted = _record(runs)
    found = [f"{name} was {earlier[name]}, is {wanted[name]}" for name in ("script",) if earlier[name] != wanted[name]]
    # a flag that a later version has added is none of an earlier command's, unless it is typed
    names = dict.fromkeys((*earlier["flags"], *(name for name in wanted["flags"] if name in runs.typed)))
    if bool(earlier["seeds"]) != bool(wanted["seeds"]):
        were, are = ("with", "without") if earlier["seeds"] else ("without", "with")
        found.append(f"its runs were started {were} --seeds, and this command is {are}")
        names.pop("seed", None)  # only one of them has it
    found += [
        f"--{name.replace('_', '-')} was {earlier['flags'].get(name)}, is {wanted['flags'].get(name)}"
        for name in names
        if earlier["flags"].get(name) != wanted["flags"].get(name)
    ]
    if list(earlier["sweep"]) != list(wanted["sweep"]):  # their order is in the names of the folders
        found.append(f"--sweep had {listed(earlier['sweep']) or 'none'}, has {listed(wanted['sweep']) or 'none'}")
    for name, flags in earlier["runs"].items():
        # short names depend on whether another value is alike
        is_named_otherwise = flags in wanted["runs"].values() and name not in wanted["runs"]
        if is_named_otherwise or wanted["runs"].get(name, flags) != flags:
            found.append(f"{name} was {' '.join(flags)}")
    if found:
        raise Refused(f"{folder} holds other runs ({', '.join(found)}): use the same flags, or another --output-dir")


def make_folder(runs: Runs) -> None:
    """Make the folder. Raises Refused as `check_folder` does, or if it cannot be written."""
    check_folder(runs)
    with _writing_into(runs.folder):
        runs.folder.mkdir(parents=True, exist_ok=True)


def write_record(runs: Runs) -> None:
    """Write sweep.json into the folder, which no other command is using. Raises Refused as `make_folder` does."""
    check_folder(runs)
    with _writing_into(runs.folder):
        write_json(runs.folder / SWEEP_RECORD, _record(all_runs_of_folder(runs)))


@contextmanager
def _writing_into(folder: Path) -> Iterator[None]:
    """Turn an error of the disk inside the block into a refusal."""
    try:
        yield
    except OSError as error:
        if disk_error_number(error) is not None:
            raise Refused(full_disk_refusal(folder, error)) from None
        raise Refused(f"--output-dir {folder} cannot be written ({error.strerror}): name another folder") from None


def _record(runs: Runs) -> SweepRecord:
    return {
        "script": runs.script,
        "flags": dict(runs.flags),
        "sweep": {name: list(values) for name, values in runs.sweep.items()},
        "seeds": list(runs.seeds),
        "runs": {member.name: list(member.flags) for member in runs.members},
    }


def all_runs_of_folder(runs: Runs) -> Runs:
    """Return a command's runs with those that its folder holds besides: seeds that were added later, or earlier."""
    if not (runs.folder / SWEEP_RECORD).exists():
        return runs
    earlier = [_member(name, flags) for name, flags in read_sweep(runs.folder)["runs"].items()]
    members = tuple({member.name: member for member in (*earlier, *runs.members)}.values())
    return replace(
        runs,
        members=members,
        seeds=tuple(dict.fromkeys(member.seed for member in members if member.seed is not None)),
        sweep={name: tuple(dict.fromkeys(member.setting[name] for member in members)) for name in runs.sweep},
    )


def _member(name: str, flags: Sequence[str]) -> Member:
    """Return a run from its folder's name and its words of sweep.json."""
    values = {flag_name(flag): value for flag, value in zip(flags[::2], flags[1::2], strict=True)}
    seed = values.pop("seed", None)
    return Member(name, values, None if seed is None else int(seed), tuple(flags))


def is_finished(folder: Path) -> bool:
    """Return whether a run's folder holds its final scores and model; else its own command makes them again."""
    try:
        has_results = all((folder / name).exists() for name in ("eval/final/metrics.json", "final/task.json"))
        return has_results and read_state(folder).get("state") == "finished"
    except Refused:
        return False  # the run itself says what is damaged


def describe_member(runs: Runs, member: Member) -> str:
    """Return a line about a run: its folder, its flags, and its state."""
    try:
        state = read_state(runs.folder / member.name).get("state", "not started")
    except Refused:
        state = "damaged state.json"
    return f"  {member.name}: {' '.join(member.flags)} ({state})"
