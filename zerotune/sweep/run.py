"""Start several runs one after the other, each as a process of its own; the same command continues where it stopped."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from zerotune.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_PREEMPTED, Interrupted, Preempted, Refused
from zerotune.files import (
    disk_error_number,
    full_disk_refusal,
    hold_lock,
    read_json,
    write_in_place,
    write_json,
)
from zerotune.run.cpu import parent_command, threads_were_asked_for
from zerotune.run.folder import LOCK_FILE
from zerotune.run.process import say
from zerotune.run.run_files import State, read_state
from zerotune.run.stopping import hang_up
from zerotune.settings.sweeps import Member, Runs
from zerotune.sweep.folder import check_folder, describe_member, is_finished, make_folder, write_record
from zerotune.sweep.summary import summarise

# Variables by which a launcher's processes find each other: a run started here is a launch of its own.
LAUNCHER_VARIABLES = re.compile(
    r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|ROLE_NAME|GROUP_WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None  # loaded before a fork
PR_SET_PDEATHSIG = 1  # of Linux's prctl.h


class SignalRelay:
    """Notes stop signals and passes each one to the run in progress, which then saves itself."""

    def __init__(self):
        self.noted: str | None = None
        self._process, self._is_launcher = None, False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, *hang_up()):
            signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        self.noted = self.noted or signal.Signals(number).name
        self._send(number)

    def _send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            if self._process is None:
                return
            if self._is_launcher:  # some do not pass signals on
                os.killpg(self._process.pid, number)
            else:
                self._process.send_signal(number)

    def run(self, command: list[str], environment: dict[str, str], is_launcher: bool) -> int:
        """Run a command to its end and return its status.

        The command has its own process group, so that Ctrl-C reaches it only once, from here. It gets SIGTERM when this
        process is killed.
        """
        self._is_launcher = is_launcher
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_end_with_parent
        )
        if self.noted:  # the signal came before the process was known
            self._send(signal.Signals[self.noted])
        try:
            return self._process.wait()
        finally:
            self._process = None

    def raise_when_noted(self) -> None:
        """Raise Preempted, or Interrupted after Ctrl-C, if a signal has come."""
        if self.noted:
            kind = Interrupted if self.noted == "SIGINT" else Preempted
            raise kind(f"stopped by {self.noted}: the same command continues with the runs that are not finished")


def run_all(runs: Runs) -> None:
    """Start each run that is not finished, one after the other, and summarise them.

    A run that is refused or fails is named at the end; the others still run.

    Raises:
        Refused: before any run starts, if this process is one of several or the folder holds something else. At the
            end, if no run finished, results cannot be summarised, or all runs that did not finish were refused.
        SystemExit: at the end, if a run failed otherwise.
        Preempted: a signal came, and the run in progress has saved itself.
    """
    _check_launch(os.environ)
    if runs.plan:
        _print_plan(runs)
        return
    relay = SignalRelay()
    make_folder(runs)
    with sole_user(runs.folder):
        write_record(runs)
        write_json(runs.folder / "state.json", {"state": "running", "reason": None})
        try:
            failed = _run_each(runs, relay)
            report = summarise(runs, failed)
        except Preempted as error:
            write_json(runs.folder / "state.json", {"state": "preempted", "reason": str(error)})
            raise
        except Refused as error:
            write_json(runs.folder / "state.json", {"state": "refused", "reason": str(error)})
            raise
        except OSError as error:
            if disk_error_number(error) is None:
                raise
            line = full_disk_refusal(runs.folder, error)
            write_in_place(runs.folder / "state.json", {"state": "refused", "reason": line})
            raise Refused(line) from None
        reason = "; ".join(f"{name} {why}" for name, why in failed.items()) or None
        write_json(runs.folder / "state.json", {"state": "refused" if failed else "finished", "reason": reason})
    say(f"report: {report}")
    if failed:
        line = f"{len(failed)} of {len(runs.members)} runs are not finished: {reason}; the same command tries again"
        if all(why.startswith("was refused") for why in failed.values()):
            raise Refused(line)
        print(line, file=sys.stderr, flush=True)
        sys.exit(EXIT_BUG)


def _check_launch(environment: Mapping[str, str]) -> None:
    """Refuse a launch of several processes; the message has the command to use instead."""
    launcher = re.search(r"(accelerate launch|torchrun)\b.*", parent_command().partition(f" {sys.argv[0]} ")[0])
    wanted = re.search(r"--(?:num[_-]processes|nproc[_-]per[_-]node)[ =](\d+)", launcher[0] if launcher else "")
    num_processes = max(int(environment.get("WORLD_SIZE", "1")), int(wanted[1]) if wanted else 1)
    if num_processes == 1:
        return
    line = launcher[0].strip() if launcher else f"accelerate launch --num_processes {num_processes}"
    raise Refused(
        f"--seeds and --sweep launch their runs one after the other, and cannot from inside {num_processes} processes: "
        f"start python {sys.argv[0]} with the same flags and --launcher {shlex.quote(line)}"
    )


def _end_with_parent() -> None:
    """Ask Linux to send this process SIGTERM when its parent dies."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def sole_user(folder: Path) -> AbstractContextManager:
    """Hold the folder's lock. Raises Refused if another process has it."""
    busy = f"another job is working in {folder}: wait for it, or use another --output-dir"
    return hold_lock(folder / LOCK_FILE, or_refuse=busy)


def _print_plan(runs: Runs) -> None:
    check_folder(runs)
    say(f"{len(runs.members)} runs of {sys.argv[0]} in {runs.folder}, one after the other:")
    for member in runs.members:
        say(describe_member(runs, member))
    first = runs.members[0]
    say(f"the first one, {first.name}:")
    status = SignalRelay().run(_command(runs, first, ["--plan"]), _environment(runs), bool(runs.launcher))
    if status:
        raise Refused(f"the plan of {first.name} failed (status {status}): correct its flags, as the lines above say")


def _run_each(runs: Runs, relay: SignalRelay) -> dict[str, str]:
    """Run each member that is not finished. Returns, by name, why members are still not finished."""
    failed = {}
    for number, member in enumerate(runs.members, start=1):
        if is_finished(runs.folder / member.name):
            say(f"run {number} of {len(runs.members)}: {member.name} is finished")
            continue
        relay.raise_when_noted()
        say(f"run {number} of {len(runs.members)}: {member.name}")
        problem = _run_member(runs, member, relay)
        if problem:
            failed[member.name] = problem
            say(f"{member.name} {problem}")
    relay.raise_when_noted()
    return failed


def _run_member(runs: Runs, member: Member, relay: SignalRelay) -> str | None:
    """Run one member to its end. Returns why it is not finished, or None if it is.

    Raises:
        Preempted: it was stopped by a signal to this process or to the run's own.
    """
    folder, state_file = runs.folder / member.name, runs.folder / f".{member.name}.state.json"
    state_file.unlink(missing_ok=True)
    before = _written_at(folder / "state.json")
    command = _command(runs, member, ["--state-file", str(state_file)])
    status = relay.run(command, _environment(runs), bool(runs.launcher))
    if relay.noted and runs.launcher and (folder / LOCK_FILE).exists():
        with hold_lock(folder / LOCK_FILE):  # the launcher may have ended before the run had saved itself
            pass
    refused_early = state_file.exists()
    if refused_early:
        state = read_json(state_file, State)
    else:  # a state that this start did not write is from an earlier one
        state = _state(folder) if _written_at(folder / "state.json") != before else {}
    state_file.unlink(missing_ok=True)
    if is_finished(folder):
        return None
    relay.raise_when_noted()
    if status in (EXIT_PREEMPTED, EXIT_INTERRUPTED) or (status and state.get("state") == "preempted"):
        kind = Interrupted if status == EXIT_INTERRUPTED else Preempted
        raise kind(f"{member.name} was stopped: the same command continues there")
    if state.get("state") == "refused":
        return f"was refused ({state.get('reason')})"
    return f"failed with status {status}"


def _written_at(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def _state(folder: Path) -> dict:
    try:
        return read_state(folder)
    except Refused as error:
        return {"state": "refused", "reason": str(error)}


def _command(runs: Runs, member: Member, more: list[str]) -> list[str]:
    """Return the command line of a run: this script, with this Python or with --launcher."""
    return [*(runs.launcher or (sys.executable,)), sys.argv[0], *runs.command(member), *more]


def _environment(runs: Runs) -> dict[str, str]:
    """Return the environment of a run: this process's, without the variables that a launcher set for this process."""
    kept = {name: value for name, value in os.environ.items() if not LAUNCHER_VARIABLES.fullmatch(name)}
    if not threads_were_asked_for():  # `accelerate launch` sets 1 by default
        kept.pop("OMP_NUM_THREADS", None)
    if runs.launcher:
        kept = {name: value for name, value in kept.items() if not name.startswith("ACCELERATE_")}
    return kept
