"""Train a span head on the MiniLM encoder on SQuAD v2: zerotune against transformers.Trainer, taking turns on one CPU.

    python tests/benchmarks/span_training.py --train-file train-v2.0.json.gz --test-file dev-v2.0.json.gz

Three ways train the same model on the windows of the same questions with the same learning rate, batch size and seed,
each in its own process: `ours` (zerotune's loop), `default` (the Trainer as run_qa.py drives it: float32, every window
padded to 384 tokens) and `best` (the Trainer with its best flags: bf16, dynamic padding, grouped by length, fused
AdamW, and the quicker of two attentions in a short probe). Questions/s count the questions whose windows were trained,
from the first step to the end of the last, without evaluation and saving. `default` is timed over --default-steps
steps; --full trains the whole epoch, for its F1. Each round has its own seed. F1 and exact are the official scores of
answerable and unanswerable questions at the threshold 0, over the first --eval-questions dev questions in a random
order, computed by the same code for all ways. Ratios are taken within a round, because a shared machine may be twice as
fast in one minute as in the next.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from benchmarking import (
    child_environment,
    conditions,
    markdown_table,
    minilm_folder,
    require_success,
    run_child,
    taken,
    write_record,
)

WAYS = {"ours": "zerotune", "default": "Trainer, run_qa defaults", "best": "Trainer, best flags"}
SIDE = Path(__file__).with_name("span_training_side.py")
WANTED = {"default": 5.0, "best": 1.3}
ATTENTIONS = ("sdpa", "eager")
PROBE_STEPS = 3
PASSED_ON = (
    "model",
    "train_file",
    "test_file",
    "questions",
    "eval_questions",
    "batch_size",
    "learning_rate",
    "threads",
)


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the installed MiniLM)")
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--test-file", type=Path, required=True)
    parser.add_argument("--questions", type=int, default=2000, help="of train, one epoch (default %(default)s)")
    parser.add_argument("--eval-questions", type=int, default=1000, help="of dev (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of all weights (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each way, alternated (default %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument(
        "--default-steps", type=int, default=8, help="that `default` is timed over (default %(default)s)"
    )
    parser.add_argument("--full", action="store_true", help="train `default` whole in the first round")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args(arguments)


def main(args) -> None:
    args.model = args.model or str(minilm_folder())
    rounds = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        environment = child_environment(args.threads, Path(folder))
        attention = quicker_attention(args, environment) if "best" in args.ways else None
        for seed in range(args.rounds):
            for way in args.ways:
                whole = way != "default" or (args.full and seed == 0)
                flags = {"seed": seed, "max_steps": None if whole else args.default_steps}
                flags["attention"] = attention if way == "best" else None
                result = run_way(args, way, flags, environment)
                rounds[way].append(result)
                print(f"round {seed + 1}, {WAYS[way]}: {_shown(result)}", flush=True)
    rows = [_summary(way, results) for way, results in rounds.items()]
    print("\n" + _table(rows, rounds))
    for way, wanted in WANTED.items():
        if {"ours", way} <= rounds.keys():
            print(f"ours over {WAYS[way]}: {ratio(rounds, 'ours', way):.2f} x the questions/s, wanted {wanted} or more")
    settings = {name: value for name, value in vars(args).items() if not isinstance(value, Path)}
    record = {"conditions": conditions(args.threads), "settings": settings, "attention": attention}
    write_record(args.output, {**record, "ways": rows, "rounds": rounds})


def quicker_attention(args, environment: dict) -> str:
    """Return the attention that is quicker for `best` over a few steps."""
    flags = {"seed": 0, "max_steps": PROBE_STEPS}
    speeds = {
        name: run_way(args, "best", {**flags, "attention": name}, environment)["questions_per_s"] for name in ATTENTIONS
    }
    print("probe of the Trainer: " + ", ".join(f"{name} {speed:.1f}/s" for name, speed in speeds.items()), flush=True)
    return max(speeds, key=speeds.get)


def run_way(args, way: str, flags: dict, environment: dict) -> dict:
    """Run a training in a child, span_training_side.py."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        settings = {name: getattr(args, name) for name in PASSED_ON} | flags | {"way": way, "result": result}
        child = run_child([sys.executable, str(SIDE), json.dumps(settings, default=str)], environment)
        require_success(child)
        return json.loads(result.read_text()) | taken(child)


def ratio(rounds: dict[str, list[dict]], way: str, other: str) -> float:
    """Return the median over the rounds of one way's speed divided by another's."""
    pairs = zip(rounds[way], rounds[other], strict=True)
    return median(own["questions_per_s"] / its["questions_per_s"] for own, its in pairs)


def _shown(result: dict) -> str:
    score = "not trained whole" if result["f1"] is None else f"exact {result['exact']:.2f}, F1 {result['f1']:.2f}"
    shown = f"{result['questions_per_s']:.1f} questions/s, {score}, {result['wall_s']:.0f} s"
    return f"{shown}; other processes kept {result['other_load']:.1f} cores busy"


def _summary(way: str, results: list[dict]) -> dict:
    """Summarise a way's rounds in one row: the median speed, mean scores and the largest memory."""
    whole = [result for result in results if result["f1"] is not None]
    names = ("exact", "f1", "HasAns_f1", "NoAns_f1")
    return {
        "way": way,
        "questions_per_s": median(result["questions_per_s"] for result in results),
        **{name: mean(result[name] for result in whole) if whole else None for name in names},
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
    }


def _table(rows: list[dict], rounds: dict[str, list[dict]]) -> str:
    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    columns = {
        "way": lambda row: WAYS[row["way"]],
        "questions/s": lambda row: f"{row['questions_per_s']:.1f}",
        "to defaults": lambda row: f"{ratio(rounds, row['way'], 'default'):.2f} ×" if "default" in rounds else "–",
        "to best flags": lambda row: f"{ratio(rounds, row['way'], 'best'):.2f} ×" if "best" in rounds else "–",
        **{name: lambda row, name=name: number(row[name]) for name in ("exact", "f1", "HasAns_f1", "NoAns_f1")},
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
    }
    return markdown_table(rows, columns)


if __name__ == "__main__":
    main(parse_args())
