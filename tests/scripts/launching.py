"""Start the project's scripts with the real launchers, or quickly through warm_server.py."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SECONDS_TO_HANG = 300
# Padded tokens of a micro-batch: steps of 16 rows are cut into 2 to 5 micro-batches.
FEW_TOKENS = 96
# if all ranks refuse or are preempted, they end within moments of each other
SECONDS_TO_FOLLOW = 5


@dataclass(frozen=True)
class Launch:
    """A launch that has ended: each rank's exit status and log file, and the folder it was asked to write."""

    folder: Path
    codes: tuple[int, ...]
    logs: tuple[Path, ...]

    def text(self, rank: int = 0) -> str:
        """Return a rank's output, stdout and stderr."""
        return self.logs[rank].read_text()

    def read_json(self, name: str):
        """Read a JSON file of the folder."""
        return json.loads((self.folder / name).read_text())

    def read_lines(self, name: str) -> list[dict]:
        """Read a JSON-lines file of the folder."""
        return [json.loads(line) for line in (self.folder / name).read_text().splitlines()]

    def evaluations(self) -> list[dict]:
        """Return the lines of metrics.jsonl about evaluations of the validation split."""
        return [row for row in self.read_lines("metrics.jsonl") if "eval_loss" in row]

    def refusal(self) -> str:
        """Return the one line that a refused launch ends with on rank 0."""
        assert self.codes[0] == 2, self.text()
        *_, last = self.text().splitlines()
        assert last.startswith("refused: "), self.text()
        return last.removeprefix("refused: ")


class Job:
    """Running ranks of one launch."""

    def __init__(self, server: "WarmServer", folder: Path, pids: list[int], logs: list[Path]):
        self.server, self.folder, self.pids, self.logs = server, folder, pids, logs

    def kill(self, number: int = signal.SIGKILL, rank: int | None = None) -> None:
        """Send a signal to a rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            os.kill(pid, number)

    def wait(self) -> Launch:
        """Wait for all ranks. If one dies or fails, kill the others, as torchrun does; if they hang, kill them all."""
        codes: dict[int, int | None] = dict.fromkeys(self.pids)
        give_up = time.monotonic() + SECONDS_TO_HANG
        while None in codes.values():
            for pid in [pid for pid, code in codes.items() if code is None]:
                codes[pid] = self.server.ask({"ask": pid})
            if any(codes.values()):
                give_up = min(give_up, time.monotonic() + SECONDS_TO_FOLLOW)
            if time.monotonic() > give_up:
                for pid in [pid for pid, code in codes.items() if code is None]:
                    os.kill(pid, signal.SIGKILL)
                give_up = float("inf")
            time.sleep(0.02)
        return Launch(self.folder, tuple(codes.values()), tuple(self.logs))


class WarmServer:
    """A process that has already imported what the scripts import, and forks to become one of them."""

    def __init__(self, environment: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("warm_server.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            cwd=REPOSITORY,
            env=environment,
        )
        while (line := self.process.stdout.readline()) != '"ready"\n':
            assert line, "the warm server did not start: run tests/scripts/warm_server.py to see why"

    def ask(self, request: dict):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self,
        script: str,
        flags: list,
        folder: Path,
        world: int = 1,
        on_event: dict | None = None,
        rank: int = 0,
        cwd: Path = REPOSITORY,
    ) -> Job:
        """Start a script on `world` ranks, with the variables that torchrun sets; one rank gets `on_event`."""
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
        pids, logs = [], []
        for number in range(world):
            place = {} if world == 1 else {**common, "RANK": str(number), "LOCAL_RANK": str(number)}
            logs.append(folder.with_name(f"{folder.name}.rank-{number}.log"))
            logs[-1].unlink(missing_ok=True)
            request = {
                "argv": [script, *map(str, flags)],
                "cwd": str(cwd),
                "environment": place,
                "output": str(logs[-1]),
                "on_event": on_event if number == rank else None,
            }
            pids.append(self.ask({"start": request}))
        return Job(self, folder, pids, logs)

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(launcher: list, script: str, flags: list, folder: Path, environment: dict[str, str]) -> Launch:
    """Start a script as a user does, with a launcher's full command line, and wait for it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as file:
        ended = subprocess.run(
            [*map(str, launcher), script, *map(str, flags)],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=REPOSITORY,
            env=environment,
            timeout=SECONDS_TO_HANG,
        )
    return Launch(folder, (ended.returncode,), (log,))


PYTHON = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
