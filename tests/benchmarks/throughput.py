"""Training speed at real model shapes, beside transformers.Trainer at its best flags in the same run.

    python tests/benchmarks/throughput.py --markdown throughput.md --output throughput.json

Weights are random and made on the device; rows are as long as SST-2's (random_models.py). For every shape and batch
size zerotune's Engine and Loop and the Trainer (bf16, dynamic padding, grouped by length, fused AdamW, workers, no NaN
filter) take turns (throughput_shape.py); the fastest round counts. Each shape runs in a process of its own under a time
limit, and what is finished is written at once. Without CUDA, or with --toy, the shapes are toys: that shows that it
works, and measures nothing.

Utilisation is useful work over what the device does in a large bf16 matrix product, measured in the same process.
Useful are 6 floating-point operations for each trained matrix weight and real token (2 forward, 2 for the gradient of
the input, 2 for that of the weight) and 4 for each frozen one (Kaplan et al. 2020, section 2.1), without embeddings,
padding and attention scores; what a faster way leaves out still counts as done.
"""

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from benchmarking import conditions, markdown_table, run_child


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="toy shapes (always without CUDA)")
    parser.add_argument("--shapes", nargs="+", metavar="NAME/METHOD", help="such as Mistral-7B/qlora (default: all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[32, 256], help="default: 32 256")
    parser.add_argument("--steps", type=int, default=30, help="timed steps, at most 50 (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each way (default %(default)s)")
    parser.add_argument("--tokens-per-device", type=int, default=16384, help="default %(default)s")
    parser.add_argument("--limit-s", type=int, default=400, help="seconds for everything (default %(default)s)")
    parser.add_argument("--note", action="append", default=[], help="line to put under the table")
    parser.add_argument("--markdown", type=Path, help="file for the table")
    parser.add_argument("--output", type=Path, help="json file for the record")
    parser.add_argument("--shape", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --- all shapes, each in a child ---


def main(args) -> None:
    from random_models import SHAPES

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread over all that it sees
    chosen = [index for index, shape in enumerate(SHAPES) if not args.shapes or _name(shape) in args.shapes]
    if not chosen:
        sys.exit(f"no such shape; there are {', '.join(_name(shape) for shape in SHAPES)}")
    deadline = time.monotonic() + args.limit_s
    record = {"conditions": conditions() | device_facts(args.toy), "notes": args.note, "failed": {}, "rows": []}
    for position, index in enumerate(chosen):
        share_s = (deadline - time.monotonic()) / (len(chosen) - position)
        found = measure_in_child(index, share_s)
        record["rows"] += found["rows"]
        if "error" in found:
            record["failed"][_name(SHAPES[index])] = found["error"]
            print(f"{_name(SHAPES[index])}: {found['error']}", flush=True)
        if args.markdown:
            args.markdown.parent.mkdir(parents=True, exist_ok=True)
            args.markdown.write_text(page(record))
        if args.output:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(record, indent=2) + "\n")
    print(page(record))


def _name(shape) -> str:
    return f"{shape.name}/{shape.method}"


def measure_in_child(index: int, limit_s: float) -> dict:
    """One shape: its rows, those that it finished before a failure or the time limit, and that as "error"."""
    if importlib.util.find_spec("bitsandbytes") is None:
        from random_models import SHAPES

        if SHAPES[index].method == "qlora":
            return {"rows": [], "error": "skipped: bitsandbytes is not installed"}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "rows.json"
        child = run_child(
            [sys.executable, *sys.argv, "--shape", str(index), "--result", str(result)], dict(os.environ), limit_s
        )
        rows = json.loads(result.read_text()) if result.exists() else []
    if child.returncode == 0:
        return {"rows": rows}
    print(child.output[-3000:], file=sys.stderr)
    return {"rows": rows, "error": child.last_line()}


def device_facts(toy: bool) -> dict:
    """The GPU, and whether the shapes are real."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cuda": torch.version.cuda if cuda else None,
        "toy": toy or not cuda,
    }


def page(record: dict) -> str:
    """The record as markdown."""
    facts, rows = record["conditions"], record["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    head = f"{facts['date']}, {facts['device']}, {versions}"
    lines = [head + (" (toy shapes: no measurement)" if facts["toy"] else ""), "", _table(rows)]
    rates = [row["matmul_flops_per_s"] for row in rows]
    if rates:
        spread = f"{min(rates) / 1e12:,.3g} to {max(rates) / 1e12:,.3g} TFLOP/s"
        lines += ["", f"bf16 matrix product of this device: {spread}."]
    lines += [f"\n{name}: {error}" for name, error in record["failed"].items()]
    return "\n".join([*lines, *(f"\n{note}" for note in record["notes"])]) + "\n"


def _table(rows: list[dict]) -> str:
    best = {(row["shape"], row["batch_size"]): row["examples_per_s"] for row in rows if row["way"] == "Trainer"}

    def ratio(row: dict) -> str:
        trainer = best.get((row["shape"], row["batch_size"]))
        return f"{row['examples_per_s'] / trainer:.2f} ×" if trainer else "–"

    columns = {
        "model": lambda row: row["shape"],
        "batch": lambda row: str(row["batch_size"]),
        "way": lambda row: row["way"],
        "real tokens/s": lambda row: f"{row['tokens_per_s']:,.0f}",
        "examples/s": lambda row: f"{row['examples_per_s']:,.0f}",
        "to Trainer": ratio,
        "padding": lambda row: f"{row['padding_ratio']:.2f} ×",
        "utilisation": lambda row: f"{row['utilisation']:.1%}",
        "peak GiB": lambda row: "–" if row["peak_memory_bytes"] is None else f"{row['peak_memory_bytes'] / 2**30:.1f}",
        "waits/step": lambda row: "–" if row["waits_per_step"] is None else f"{row['waits_per_step']:.1f}",
    }
    return markdown_table(rows, columns)


def run_measure(args) -> None:
    from throughput_shape import measure_shape

    measure_shape(args)


if __name__ == "__main__":
    arguments = parse_args()
    main(arguments) if arguments.shape is None else run_measure(arguments)
