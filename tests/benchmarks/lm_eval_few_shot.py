"""Compare few-shot evaluation with EleutherAI's lm-evaluation-harness: items per second, peak memory and choices.

    python tests/benchmarks/lm_eval_few_shot.py --lm-eval-python lm-eval-venv/bin/python \\
        --imdb-file test.csv.gz --sst2-file validation.tsv.gz --lm-eval-items 100

A random Llama (6 layers, 256 wide, 8 heads) with the sample's tokenizer answers in float32 by the likelihood of the
label words: IMDB after 8 shots, SST-2 after 16, the same shots for every item. Shots and reviews are cut as in
eval/imdb.py: the shots to half of --positions together (few are cut at 8,192, the window of Llama-3 and Gemma-2; most
are at 4,096), a review to 512 tokens. Both sides get the same strings and take turns, each in its own process, timed
from those strings to the last score, without imports and without loading the model. The harness scores the first
--lm-eval-items items; we score all of them.

tests/fixtures/record_lm_eval.py says how to install the harness. Without --lm-eval-python, our way is compared with
itself computing every prompt whole. Without files, the texts are the sample's. Speeds are medians over the rounds, a
ratio is the median of the ratios within each round. On a busy machine, the ratio of processor time is the steadier one.
Peak memory is that of the whole process.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from benchmarking import child_environment, conditions, markdown_table, run_child, write_record

NUM_SHOTS = {"imdb": 8, "sst2": 16}
OURS, WHOLE = "zerotune", "zerotune, whole prompts"
OUR_SIDE, LM_EVAL_SIDE = (str(Path(__file__).with_name(name)) for name in ("few_shot_side.py", "lm_eval_side.py"))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval-python", help="interpreter of an environment that has lm-eval")
    parser.add_argument("--tasks", nargs="+", choices=tuple(NUM_SHOTS), default=list(NUM_SHOTS), help="default: both")
    parser.add_argument("--imdb-file", help="labelled reviews (default: the sample's)")
    parser.add_argument("--sst2-file", help="labelled sentences (default: the sample's)")
    parser.add_argument(
        "--positions", type=int, default=8192, help="the model's window, in tokens (default %(default)s)"
    )
    parser.add_argument("--items", type=int, default=500, help="default %(default)s")
    parser.add_argument("--lm-eval-items", type=int, help="items that the harness scores (default: all)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8], help="of the harness (default: 1 8)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, in turns (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


@dataclass(frozen=True)
class Way:
    """A way to score items: `command` comes before the model's folder, `options` after the result's path."""

    name: str
    num_items: int
    command: list[str]
    options: list[str]


def main(args) -> None:
    record = {"conditions": conditions(args.threads), "rounds": args.rounds, "tasks": {}}
    for task in args.tasks:
        with tempfile.TemporaryDirectory() as folder:
            model, prompts = Path(folder) / "model", Path(folder) / "prompts.json"
            environment = child_environment(args.threads, Path(folder) / "cache")
            command = [sys.executable, OUR_SIDE, "prepare", str(model), str(prompts), "--task", task]
            command += ["--items", str(args.items), "--shots", str(NUM_SHOTS[task]), "--positions", str(args.positions)]
            file = getattr(args, f"{task}_file")
            run_or_exit([*command, *(["--file", file] if file else [])], environment)
            ways = ways_to_score(args)
            rounds = {way.name: [] for way in ways}
            for number in range(args.rounds):
                for way in ways:
                    rounds[way.name].append(run_way(way, model, prompts, environment))
                    print(f"{task}, round {number + 1}, {way.name}: {shown(rounds[way.name][-1])}", flush=True)
            record["tasks"][task] = summary(ways, rounds, json.loads(prompts.read_text()))
    for task, found in record["tasks"].items():
        print(f"\n{task}, {page(found)}")
    write_record(args.output, record)


def ways_to_score(args) -> list[Way]:
    """Return our way to score and the ways it is compared with."""
    ours = [sys.executable, OUR_SIDE, "score"]
    if not args.lm_eval_python:
        return [Way(OURS, args.items, ours, []), Way(WHOLE, args.items, ours, ["--whole"])]
    num_items = min(args.lm_eval_items or args.items, args.items)
    theirs = [args.lm_eval_python, LM_EVAL_SIDE]
    return [Way(OURS, args.items, ours, [])] + [
        Way(f"lm-eval, batch {size}", num_items, theirs, ["--batch-size", str(size), "--items", str(num_items)])
        for size in args.batch_sizes
    ]


def run_way(way: Way, model: Path, prompts: Path, environment: dict[str, str]) -> dict:
    """Run one way in its own process; return its scores, speed and peak memory."""
    result = prompts.with_name("result.json")
    child = run_or_exit([*way.command, str(model), str(prompts), str(result), *way.options], environment)
    found = json.loads(result.read_text())
    taken = {"peak_memory_bytes": child.peak_memory_bytes, "other_load": child.other_load}
    speeds = {"items_per_s": way.num_items / found["seconds"], "items_per_cpu_s": way.num_items / found["processor_s"]}
    return found | speeds | taken


def run_or_exit(command: list[str], environment: dict[str, str]):
    """Run a child and return it; exit if it failed."""
    child = run_child(command, environment)
    if child.returncode:
        print(child.output[-4000:], file=sys.stderr)
        sys.exit(child.last_line())
    return child


def shown(result: dict) -> str:
    """Return one run in a few words."""
    peak = result["peak_memory_bytes"] / 2**20
    return f"{result['items_per_s']:.2f} items/s, {peak:,.0f} MiB, other processes {result['other_load']:.1f} cores"


def summary(ways: list[Way], rounds: dict[str, list[dict]], prompts: dict) -> dict:
    """Return a row for each way: medians over the rounds, and how its choices and margins differ from ours."""
    ours = margins(rounds[OURS][0])
    rows = []
    for way in ways:
        results = rounds[way.name]
        ratios, cpu_ratios = (
            [mine[speed] / other[speed] for mine, other in zip(rounds[OURS], results, strict=True)]
            for speed in ("items_per_s", "items_per_cpu_s")
        )
        found, expected = np.array([margins(result) for result in results]), ours[: way.num_items]
        rows.append(
            {
                "name": way.name,
                "num_items": way.num_items,
                "items_per_s": median(result["items_per_s"] for result in results),
                "our_ratio": median(ratios),
                "our_ratios": ratios,
                "our_cpu_ratio": median(cpu_ratios),
                "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
                "other_choices": int(((found > 0) != (expected > 0)).any(axis=0).sum()),
                "largest_difference": float(np.abs(found - expected).max()),
            }
        )
    return {
        "num_shots": len(prompts["prompt"]["shots"]),
        **{name: prompts[name] for name in ("num_shots_cut", "num_texts_cut")},
        **{name: rounds[OURS][0][name] for name in ("num_shared", "mean_tokens")},
        "num_chosen": [int((ours <= 0).sum()), int((ours > 0).sum())],
        "smallest_margin": float(np.abs(ours).min()),
        "ways": rows,
    }


def margins(result: dict) -> np.ndarray:
    """Return the log-likelihood of the second label minus that of the first, [items]."""
    first, second = np.array(result["log_likelihoods"]).T
    return second - first


def page(found: dict) -> str:
    """Return one task's figures as markdown."""
    columns = {
        "way": lambda row: row["name"],
        "items": lambda row: str(row["num_items"]),
        "items/s": lambda row: f"{row['items_per_s']:.2f}",
        "ours is faster": lambda row: f"{row['our_ratio']:.2f} ×",
        "by round": lambda row: ", ".join(f"{ratio:.2f}" for ratio in row["our_ratios"]),
        "in processor time": lambda row: f"{row['our_cpu_ratio']:.2f} ×",
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:,.0f}",
        "other choices": lambda row: str(row["other_choices"]),
        "largest difference": lambda row: f"{row['largest_difference']:.1e}",
    }
    return (
        f"{found['num_shots']} shots ({found['num_shots_cut']} cut, and {found['num_texts_cut']} texts): "
        f"{found['num_shared']} shared tokens of {found['mean_tokens']:.0f}; {found['num_chosen'][0]} items negative, "
        f"{found['num_chosen'][1]} positive, the closest {found['smallest_margin']:.1e} from a tie\n\n"
        + markdown_table(found["ways"], columns)
    )


if __name__ == "__main__":
    main(parse_args())
