"""Train a real but tiny Llama (stories260K, 260,032 weights) on SST-2: full, LoRA and QLoRA against the majority class.

    python tests/benchmarks/tiny_llama.py --model stories260K --train-file FILE --validation-file FILE

It was trained only on children's stories, with 512 word pieces, so it will not be good. But if a way of tuning it beats
the majority class by ten points on the official validation set, that way works from the real tokenizer and weights to
the saved adapter. Each run is train/sst2.py in its own process, with the flags below.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from benchmarking import REPOSITORY, child_environment, conditions, markdown_table, run_child, write_record

FLAGS = {
    "full": "--learning-rate 5e-4 --batch-size 32 --epochs 1 --limit-train 20000",
    "lora": "--learning-rate 1e-3 --batch-size 32 --epochs 1 --limit-train 20000",
    "qlora": "--learning-rate 1e-3 --batch-size 32 --epochs 1 --limit-train 20000",
}
MARGIN = 0.10


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of stories260K")
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--validation-file", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", choices=tuple(FLAGS), default=list(FLAGS), help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="default %(default)s: more gain nothing here")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


def main(args) -> None:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        environment = child_environment(args.threads, Path(folder) / "cache")
        for method in args.methods:
            rows.append(run_method(args, method, Path(folder) / method, environment))
            print(f"{method}: accuracy {rows[-1]['accuracy']:.4f}, {rows[-1]['wall_s']:.0f} s", flush=True)
    columns = {
        "method": lambda row: row["method"],
        "trained weights": lambda row: f"{row['trainable']:,}",
        "accuracy [95 %]": lambda row: f"{row['accuracy']:.4f} [{row['low']:.4f}, {row['high']:.4f}]",
        "majority class": lambda row: f"{row['majority']:.4f}",
        "beats it by": lambda row: f"{100 * (row['accuracy'] - row['majority']):.1f} points",
        f"{100 * MARGIN:.0f} points": lambda row: "yes" if row["accuracy"] - row["majority"] >= MARGIN else "NO",
        "train s": lambda row: f"{row['train_s']:.0f}",
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        "flags": lambda row: f"`{row['flags']}`",
    }
    print("\n" + markdown_table(rows, columns))
    write_record(args.output, {"conditions": conditions(args.threads), "rows": rows})


def run_method(args, method: str, run: Path, environment: dict[str, str]) -> dict:
    """Run train/sst2.py once; return the figures it wrote."""
    command = [sys.executable, str(REPOSITORY / "train/sst2.py"), "--method", method, *FLAGS[method].split()]
    command += ["--model", str(args.model), "--train-file", str(args.train_file), "--base-eval", "none"]
    command += ["--validation-file", str(args.validation_file), "--output-dir", str(run)]
    child = run_child(command, environment)
    if child.returncode:
        print(child.output[-4000:], file=sys.stderr)
        sys.exit(child.last_line())
    metrics = json.loads((run / "eval/final/metrics.json").read_text())
    timings = json.loads((run / "run.json").read_text())["timings"]
    labels = [json.loads(line)["label"] for line in (run / "eval/final/predictions.jsonl").read_text().splitlines()]
    share = sum(labels) / len(labels)
    low, high = metrics["accuracy_ci95"]
    return {
        "method": method,
        "flags": FLAGS[method],
        "trainable": json.loads((run / "parameters.json").read_text())["after"]["trainable"],
        "accuracy": metrics["accuracy"],
        "low": low,
        "high": high,
        "majority": max(share, 1 - share),
        "train_s": timings["train_s"],
        "wall_s": child.wall_s,
        "peak_memory_bytes": child.peak_memory_bytes,
    }


if __name__ == "__main__":
    main(parse_args())
