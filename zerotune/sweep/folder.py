"""Check and open the parent folder of several runs; sweep.json lists them before the first one starts."""

from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from zerotune.errors import Refused, listed
from zerotune.files import read_json, write_json
from zerotune.run.folder import check_place, foreign_files, held_results
from zerotune.run.run_files import read_state
from zerotune.settings.sweeps import Member, Runs

RECORD = "sweep.json"


class SweepRecord(TypedDict):
    """sweep.json: the script, the flags that all runs share, and the flags of each run by its folder's name."""

    script: str
    flags: dict[str, Any]
    sweep: dict[str, list[str]]
    seeds: list[int]
    runs: dict[str, list[str]]


def check_folder(runs: Runs) -> None:
    """Refuse a folder that holds anything other than some or all of these runs.

    Values and seeds may be added to a sweep: existing runs are kept.
    """
    folder = runs.folder
    check_place(folder)
    if (folder / "run.json").exists():
        raise Refused(f"{folder} holds a single run, and several need a folder of their own: name another --output-dir")
    if not (folder / RECORD).exists():
        if held := held_results(folder) or foreign_files(folder):
            raise Refused(f"{folder} holds {listed(held)} but no {RECORD}: choose a new or empty --output-dir")
        return
    earlier = read_json(folder / RECORD, SweepRecord)
    wanted = _record(runs)
    found = [f"{name} was {earlier[name]}, is {wanted[name]}" for name in ("script",) if earlier[name] != wanted[name]]
    names = dict.fromkeys((*earlier["flags"], *wanted["flags"]))
    found += [
        f"--{name.replace('_', '-')} was {earlier['flags'].get(name)}, is {wanted['flags'].get(name)}"
        for name in names
        if earlier["flags"].get(name) != wanted["flags"].get(name)
    ]
    lacking = [name for name, flags in earlier["runs"].items() if wanted["runs"].get(name) != flags]
    if not found and lacking:
        found.append(f"its runs {listed(lacking)} are none of these")
    if found:
        raise Refused(f"{folder} holds other runs ({', '.join(found)}): use the same flags, or another --output-dir")


def open_folder(runs: Runs) -> None:
    """Make the folder and write sweep.json. Raises Refused as `check_folder` does, or if it cannot be written."""
    check_folder(runs)
    try:
        runs.folder.mkdir(parents=True, exist_ok=True)
        write_json(runs.folder / RECORD, _record(runs))
    except OSError as error:
        raise Refused(
            f"--output-dir {runs.folder} cannot be written ({error.strerror}): name a folder that can"
        ) from None


def _record(runs: Runs) -> SweepRecord:
    return {
        "script": runs.script,
        "flags": dict(runs.flags),
        "sweep": {name: list(values) for name, values in runs.sweep.items()},
        "seeds": list(runs.seeds),
        "runs": {member.name: list(member.flags) for member in runs.members},
    }


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
