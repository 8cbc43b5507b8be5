"""Run the measurements of measurements.py and the GPU tests, rewriting the tables after each of them.

A parent process without torch starts a worker that measures one row after another. A measurement that fails leaves a
row with its error; a worker that hangs or dies is replaced by one that continues. measure.sh says how to run it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import tables
from benchmarking import conditions

PARTS = ("before_tests", "after_tests")  # functions of measurements.py
START_LIMIT_S = 90  # for a worker to start: imports from a cold disk
TESTS_LIMIT_S = 180
LEAST_S = 12  # with less time left, nothing new starts
MORE_TO_DO = 3  # exit code of a worker that leaves the rest to a new process


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds-total", type=float, default=500, help="for everything (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="measurements whose names contain one of these")
    parser.add_argument("--no-tests", action="store_true", help="leave the GPU tests out")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the parent ---


class Run:
    """A folder with rows.jsonl, and measure.md made from it."""

    def __init__(self, args):
        self.args, self.folder = args, args.output
        self.deadline = time.time() + args.seconds_total
        self.notes: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in ("rows.jsonl", "measure.md", "tests.log", "worker.log", "now.json"):
            (self.folder / name).unlink(missing_ok=True)

    def render(self) -> None:
        """Write measure.md."""
        aside = self.folder / ".measure.md"
        aside.write_text(tables.page(conditions(), read_rows(self.folder), self.notes))
        aside.rename(self.folder / "measure.md")

    def measure(self, part: str) -> None:
        """Start workers until every measurement of a part has a row, or time is up."""
        starts_in_vain = 0
        while time.time() < self.deadline - LEAST_S and starts_in_vain < 2:
            before = len(read_rows(self.folder))
            code = self._work(part)
            rows, now = read_rows(self.folder), read_now(self.folder)
            if code == 0:
                break
            if code != MORE_TO_DO and now and now["name"] not in {row["name"] for row in rows}:
                why = "it took too long" if code < 0 else self._last_line()
                append_row(self.folder, {"name": now["name"], "error": f"the process ended with {code}: {why}"})
            starts_in_vain = starts_in_vain + 1 if len(read_rows(self.folder)) == before else 0
        if starts_in_vain:
            self.notes.append(f"The measurements could not start: {self._last_line()}")
        self.render()

    def _work(self, part: str) -> int:
        """Run a worker until it ends, hangs, or time is up. Returns its exit code, negative if it was killed."""
        command = [sys.executable, *sys.argv, "--part", part, "--deadline", str(self.deadline)]
        (self.folder / "now.json").unlink(missing_ok=True)
        with (self.folder / "worker.log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        begun, now, num_rows = time.time(), None, len(read_rows(self.folder))
        try:
            while process.poll() is None:
                time.sleep(0.2)
                if (newest := read_now(self.folder)) != now:
                    begun, now = time.time(), newest
                limit_s = now["limit_s"] if now else START_LIMIT_S
                if time.time() > min(begun + limit_s, self.deadline):
                    break
                if len(rows := read_rows(self.folder)) > num_rows:
                    for row in rows[num_rows:]:
                        print(tables.line(row), flush=True)
                    num_rows = len(rows)
                    self.render()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # with its compilers and data loaders
                process.wait()
        return process.returncode

    def _last_line(self) -> str:
        lines = (self.folder / "worker.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no output"

    def test(self) -> int:
        """Run the GPU tests in the time left. Returns pytest's exit code, 124 if the time was too short."""
        limit_s = min(TESTS_LIMIT_S, self.deadline - time.time() - LEAST_S)
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", "-p", "no:cacheprovider"]
        started = time.time()
        with (self.folder / "tests.log").open("w") as log:
            try:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=max(1, limit_s)).returncode
            except subprocess.TimeoutExpired:
                code = 124
        lines = (self.folder / "tests.log").read_text(errors="replace").strip().splitlines() or ["no output"]
        found = f"stopped after {limit_s:.0f} s: {lines[-1]}" if code == 124 else lines[-1].strip("= ")
        self.notes.append(f"GPU tests, {time.time() - started:.0f} s: {found}")
        self.notes += [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))]
        print("\n".join(lines[-15:]), flush=True)
        self.render()
        return code


def read_rows(folder: Path) -> list[dict]:
    """Return all complete rows."""
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def append_row(folder: Path, row: dict) -> None:
    """Append a line to rows.jsonl."""
    with (folder / "rows.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_now(folder: Path) -> dict | None:
    """Return the worker's measurement: {"name", "limit_s"}; None before the first one."""
    path = folder / "now.json"
    return json.loads(path.read_text()) if path.exists() else None


def write_now(folder: Path, measurement) -> None:
    """Write the file that `read_now` reads."""
    aside = folder / ".now.json"
    aside.write_text(json.dumps({"name": measurement.name, "limit_s": measurement.limit_s}))
    aside.rename(folder / "now.json")


def main(args) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that the worker is killed first
    run = Run(args)
    run.measure("before_tests")
    code = 0 if args.no_tests else run.test()
    run.measure("after_tests")
    print((run.folder / "measure.md").read_text())
    return code


# --- a worker ---


def work(args) -> int:
    """Take the measurements that have no row yet, one after another. Returns the exit code."""
    import measurements
    import torch
    from bench import Bench, Skipped

    has_row = {row["name"] for row in read_rows(args.output)}
    wanted = [one for one in getattr(measurements, args.part)() if one.name not in has_row]
    if args.only:
        wanted = [one for one in wanted if any(text in one.name for text in args.only)]
    bench, is_used, was_alone = Bench(), False, False
    for measurement in wanted:
        if is_used and (measurement.own_process or was_alone):
            return MORE_TO_DO
        write_now(args.output, measurement)
        started = time.time()
        try:
            if started > args.deadline - LEAST_S:
                raise Skipped("no time was left")
            row = measurement.run(bench=bench)
        except Skipped as reason:
            row = {"skipped": str(reason)}
        except Exception as error:
            traceback.print_exc()
            message = str(error).strip().splitlines() or [""]
            row = {"error": f"{type(error).__name__}: {message[0]}"[:300]}
        append_row(args.output, {"name": measurement.name, "taken_s": round(time.time() - started, 2)} | row)
        if "skipped" not in row:
            is_used, was_alone = True, measurement.own_process
        if "error" in row:
            bench.release()
            if bench.device.type == "cuda":
                torch.cuda.synchronize()  # raises if a fault broke this process: a new one continues
    return 0


if __name__ == "__main__":
    arguments = parse_args()
    sys.exit(work(arguments) if arguments.part else main(arguments))
