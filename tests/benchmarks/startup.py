"""Measure how long a user waits for the first training step after a launch, and for `--help`.

    python tests/benchmarks/startup.py --train-file train.tsv.gz --validation-file validation.tsv.gz

Launches train/sst2.py with `accelerate launch`, the default base evaluation and an empty token cache, waits for the
first step's line in metrics.jsonl, then kills the run.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarking import REPOSITORY, child_environment, conditions, markdown_table, minilm_folder, write_record

FIRST_STEP_TARGET_S, HELP_TARGET_S = 20, 2
TIMEOUT_S = 600
HELP_RUNS = 3


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the installed MiniLM)")
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--validation-file", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6400, help="train rows (default %(default)s)")
    parser.add_argument("--runs", type=int, default=2, help="launches; the fastest counts (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


def main(args) -> None:
    model = args.model or str(minilm_folder())
    launches = [seconds_to_first_step(args, model) for _ in range(args.runs)]
    rows = [{"what": "launch to first step", "seconds": min(launches), "target_s": FIRST_STEP_TARGET_S}]
    for script in sorted([*REPOSITORY.glob("train/*.py"), *REPOSITORY.glob("eval/*.py")]):
        seconds = min(seconds_of_help(script) for _ in range(HELP_RUNS))
        what = f"{script.relative_to(REPOSITORY)} --help"
        rows.append({"what": what, "seconds": seconds, "target_s": HELP_TARGET_S})
    columns = {
        "what": lambda row: row["what"],
        "seconds": lambda row: f"{row['seconds']:.2f}",
        "target": lambda row: f"under {row['target_s']} s",
        "reached": lambda row: "yes" if row["seconds"] < row["target_s"] else "NO",
    }
    print(markdown_table(rows, columns))
    write_record(args.output, {"conditions": conditions(), "model": model, "launches": launches, "rows": rows})


def seconds_to_first_step(args, model: str) -> float:
    """Return the wall seconds from the launcher's start to the first step's line. Exits if there is none."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        run = Path(folder) / "run"
        command = [str(Path(sys.executable).parent / "accelerate"), "launch", str(REPOSITORY / "train/sst2.py")]
        command += ["--model", model, "--train-file", str(args.train_file), "--limit-train", str(args.rows)]
        command += ["--validation-file", str(args.validation_file), "--output-dir", str(run)]
        environment = child_environment(None, Path(folder) / "cache")
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while not _has_first_step(run / "metrics.jsonl"):
                if process.poll() is not None or time.perf_counter() - started > TIMEOUT_S:
                    output.seek(0)
                    sys.exit(f"no first step:\n{output.read()[-4000:]}")
                time.sleep(0.02)
            return time.perf_counter() - started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _has_first_step(path: Path) -> bool:
    return path.exists() and '"step": 1,' in path.read_text()


def seconds_of_help(script: Path) -> float:
    """Return the wall seconds of `python script --help`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, str(script), "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(parse_args())
