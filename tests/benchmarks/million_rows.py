"""Time reading and splitting a million rows, against csv.reader on its own over the same file, on a CPU.

    python tests/benchmarks/million_rows.py

The rows come from a seed: sentences whose word frequencies are as unequal as in English; a fifth are phrases of earlier
sentences, a twentieth are repeats. As tsv they go through SST-2's split (a slice of whole sentences validates), as csv
with line breaks in some texts through an 80/10/10 split with the user's own labels. Each measurement is its own
process; its seconds and memory are the whole process's, with imports. Processor seconds are compared, because other
work on the machine changes them less.
"""

import argparse
import csv
import itertools
import random
import sys
import tempfile
from pathlib import Path
from statistics import median

from benchmarking import child_environment, conditions, markdown_table, require_success, run_child, taken, write_record

NUM_WORDS, PHRASES, REPEATS = 15_000, 0.20, 0.05
QUEUES = ("billing", "shipping", "returns", "other")
SIDES = {
    "csv.reader on the tsv": "rows.tsv",
    "SST-2": "rows.tsv",
    "csv.reader on the csv": "rows.csv",
    "own": "rows.csv",
}


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="of all measurements (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    parser.add_argument("--side", choices=["make", *SIDES], help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(args) -> None:
    results = []
    with tempfile.TemporaryDirectory() as folder:
        make = [sys.executable, __file__, "--side", "make", "--file", folder, "--rows", str(args.rows)]
        # in its own process: a child's peak memory is at least what its parent held when it started the child
        require_success(run_child(make, child_environment(1, Path(folder))))
        for side, name in list(SIDES.items()) * args.rounds:
            command = [sys.executable, __file__, "--side", side, "--file", str(Path(folder) / name)]
            child = run_child(command, child_environment(1, Path(folder)))
            require_success(child)
            results.append({"side": side, **taken(child)})
            print(f"{side}: {child.wall_s:.1f} s, others {child.other_load:.1f} cores", flush=True)
    columns = {
        "side": lambda row: row["side"],
        "seconds": lambda row: f"{row['wall_s']:.1f}",
        "of processor time": lambda row: f"{row['cpu_s']:.1f}",
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
    }
    print(f"\n{markdown_table(results, columns)}\n")
    ratios = {}
    for side, baseline in (("SST-2", "csv.reader on the tsv"), ("own", "csv.reader on the csv")):
        of_side, of_baseline = ([row["cpu_s"] for row in results if row["side"] == each] for each in (side, baseline))
        ratios[side] = median(ours / theirs for ours, theirs in zip(of_side, of_baseline, strict=True))
        print(f"{side}: {ratios[side]:.1f} x the processor time of {baseline}")
    write_record(args.output, {"conditions": conditions(1), "rows": args.rows, "ratios": ratios, "sides": results})


def made_rows(num_rows: int, seed: int = 0) -> list[tuple[str, int]]:
    """Return texts with labels 0 and 1."""
    rng = random.Random(seed)
    letters = "abcdefghijklmnoprstuvwy"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 10))) for _ in range(NUM_WORDS)]
    frequencies = list(itertools.accumulate(1 / (rank + 10) for rank in range(NUM_WORDS)))
    rows = [("a first sentence", 1)]
    while len(rows) < num_rows:
        kind = rng.random()
        if kind < REPEATS:
            rows.append(rng.choice(rows))
        elif kind < REPEATS + PHRASES:
            whole = rng.choice(rows)[0].split()
            start = rng.randrange(len(whole))
            rows.append((" ".join(whole[start : start + rng.randint(1, 12)]), rng.randrange(2)))
        else:
            length = max(3, round(rng.gauss(19, 9)))
            rows.append((" ".join(rng.choices(words, cum_weights=frequencies, k=length)), rng.randrange(2)))
    return rows


def write_files(folder: Path, num_rows: int) -> None:
    rows = made_rows(num_rows)
    with open(folder / "rows.tsv", "w") as file:
        file.write("sentence\tlabel\n")
        file.writelines(f"{text}\t{label}\n" for text, label in rows)
    with open(folder / "rows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "message", "queue"])
        for number, (text, label) in enumerate(rows):
            message = f'{text}\n"as ever"' if number % 50 == 0 else text
            writer.writerow([number, message, QUEUES[2 * label + len(text) % 2]])


def run_side(side: str, file: Path) -> None:
    """Do one side's work in this process."""
    if side.startswith("csv.reader"):
        quoting = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if file.suffix == ".tsv" else {}
        with open(file, newline="") as lines:
            print(sum(1 for _ in csv.reader(lines, **quoting)), "rows")
        return
    from zerotune.settings.groups import DataSettings
    from zerotune.tasks import classify, texts
    from zerotune.tasks.sst2 import SST2

    if side == "SST-2":
        test_file = file.with_name("test.tsv")
        test_file.write_text("sentence\tlabel\na warm film\t1\na dull film\t0\n")
        splits = texts.load(SST2, DataSettings(train_file=str(file), test_file=str(test_file)))
    else:
        settings = DataSettings(train_file=str(file), text_column="message", label_column="queue")
        _, splits = classify.load(settings)
    print(splits.record["notes"])


if __name__ == "__main__":
    args = parse_args()
    if args.side == "make":
        write_files(args.file, args.rows)
    elif args.side:
        run_side(args.side, args.file)
    else:
        main(args)
