"""Train the MiniLM encoder on IMDB with both engines of train/imdb.py, taking turns on one CPU.

    python tests/benchmarks/imdb_encoder.py --train-file train.csv.gz --test-file test.csv.gz

Both engines train the same model on the same balanced rows of a 70/10/20 split of all 50,000 reviews, with the same
batch size, schedule and seed, and report on the test rows of that split; each run is train/imdb.py in its own process.
The Trainer runs with its best flags: `--engine trainer` always pads dynamically, groups by length and uses a fused
AdamW, and a first epoch over --probe-rows rows finds the quickest of ALTERNATIVES. Examples/s are the run's own: from
the first step to the end of the last, without start-up, evaluations and saving. Ratios are taken within a round,
because a shared machine may be twice as fast in one minute as in the next.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from benchmarking import (
    REPOSITORY,
    child_environment,
    conditions,
    markdown_table,
    minilm_folder,
    require_success,
    run_child,
    taken,
    write_record,
)

# The choices that --engine trainer leaves open: precision, attention, and one micro-batch per step or several.
ALTERNATIVES = {
    "bf16, whole steps": {"precision": "bf16", "tokens-per-device": 2**20},
    "bf16, 2,048 tokens": {"precision": "bf16", "tokens-per-device": 2048},
    "bf16, 2,048 tokens, eager": {"precision": "bf16", "tokens-per-device": 2048, "attention": "eager"},
    "fp32, 2,048 tokens": {"precision": "fp32", "tokens-per-device": 2048},
}
LOWEST_ACCURACY, LOWEST_RATIO = 0.88, 1.3
PROBE_EVALUATED = 64


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the installed MiniLM)")
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--test-file", type=Path, required=True)
    parser.add_argument("--train-size", type=int, default=10_000, help="balanced train rows (default %(default)s)")
    parser.add_argument("--validation-size", type=int, default=1000, help="rows that choose (default %(default)s)")
    parser.add_argument("--test-size", type=int, help="rows that report (default: all 10,000)")
    parser.add_argument("--max-length", type=int, default=256, help="tokens (default %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="default %(default)s")
    parser.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of all weights (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each engine, alternated (default %(default)s)")
    parser.add_argument("--probe-rows", type=int, default=640, help="an epoch of the probes (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args(arguments)


def main(args) -> None:
    args.model = args.model or str(minilm_folder())
    rounds = {"loop": [], "trainer": []}
    with tempfile.TemporaryDirectory() as folder:
        environment = child_environment(args.threads, Path(folder) / "cache")
        probes = {name: probe(args, flags, environment) for name, flags in ALTERNATIVES.items()}
        for name, result in probes.items():
            print(f"Trainer, {name}: {result['examples_per_s']:.1f} examples/s in the probe", flush=True)
        best = max(probes, key=lambda name: probes[name]["examples_per_s"])
        for seed in range(args.rounds):
            for engine, own in (("loop", {}), ("trainer", ALTERNATIVES[best])):
                result = run_training(args, engine, {"seed": seed, **own}, environment)
                rounds[engine].append(result)
                print(f"round {seed + 1}, {engine}: {_shown(result)}", flush=True)
    rows = [_summary(engine, results) for engine, results in rounds.items()]
    ratios = [ours["examples_per_s"] / theirs["examples_per_s"] for ours, theirs in zip(*rounds.values(), strict=True)]
    print(f"\n{_table(rows)}\n")
    for row in rows:
        print(f"{row['engine']}: test accuracy {row['accuracy']:.4f}, wanted {LOWEST_ACCURACY} or more")
    print(f"loop over the Trainer ({best}): {median(ratios):.2f} x the examples/s, wanted {LOWEST_RATIO} or more")
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    record = {"conditions": conditions(args.threads), "settings": settings, "trainer_flags": best, "ratios": ratios}
    write_record(args.output, {**record, "engines": rows, "rounds": rounds, "probes": probes})


def probe(args, flags: dict, environment: dict) -> dict:
    """Train the Trainer for one epoch over a few rows, to measure its speed."""
    few = {"train-size": args.probe_rows, "validation-size": PROBE_EVALUATED, "test-size": PROBE_EVALUATED, "epochs": 1}
    return run_training(args, "trainer", {**flags, **few}, environment)


def run_training(args, engine: str, own: dict, environment: dict) -> dict:
    """Run train/imdb.py as users do; return the figures from its run folder."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = {
            "model": args.model,
            "train-file": args.train_file,
            "test-file": args.test_file,
            "split": "70-10-20",
            "train-size": args.train_size,
            "validation-size": args.validation_size,
            "test-size": args.test_size,
            "max-length": args.max_length,
            "epochs": args.epochs,
            "batch-size": args.batch_size,
            "learning-rate": args.learning_rate,
            "head-learning-rate": args.learning_rate,
            "base-eval": "none",
            "engine": engine,
            "output-dir": run,
            **own,
        }
        words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
        child = run_child([sys.executable, str(REPOSITORY / "train/imdb.py"), *words], environment)
        require_success(child)
        timings = json.loads((run / "run.json").read_text())["timings"]
        metrics = json.loads((run / "eval/final/metrics.json").read_text())
        return {
            "examples_per_s": timings["train_examples_per_s"],
            "train_s": timings["train_s"],
            "accuracy": metrics["accuracy"],
            "accuracy_ci95": metrics["accuracy_ci95"],
            **taken(child),
        }


def _shown(result: dict) -> str:
    low, high = result["accuracy_ci95"]
    shown = f"{result['examples_per_s']:.1f} examples/s, accuracy {result['accuracy']:.4f} [{low:.4f}, {high:.4f}]"
    return f"{shown}, {result['wall_s']:.0f} s; other processes kept {result['other_load']:.1f} cores busy"


def _summary(engine: str, results: list[dict]) -> dict:
    """Summarise an engine's rounds in one row: median speed, mean accuracy, largest memory, shortest times."""
    return {
        "engine": engine,
        "accuracy": mean(result["accuracy"] for result in results),
        "examples_per_s": median(result["examples_per_s"] for result in results),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        **{name: min(result[name] for result in results) for name in ("train_s", "wall_s")},
    }


def _table(rows: list[dict]) -> str:
    columns = {
        "engine": lambda row: row["engine"],
        "test accuracy": lambda row: f"{row['accuracy']:.4f}",
        "examples/s": lambda row: f"{row['examples_per_s']:.1f}",
        "train s": lambda row: f"{row['train_s']:.0f}",
        "wall s": lambda row: f"{row['wall_s']:.0f}",
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
    }
    return markdown_table(rows, columns)


if __name__ == "__main__":
    main(parse_args())
