"""Time cutting SQuAD v2 into windows and choosing spans, against the way of transformers' run_qa.py, on a CPU.

    python tests/benchmarks/span_pipeline.py --train-file train-v2.0.json.gz --test-file dev-v2.0.json.gz

Features: cut all train questions into windows of 384 tokens that share 128, and find the answers' positions. Theirs
maps a datasets table in batches of 1,000: both texts of every question go through the tokenizer with
truncation="only_second", overflowing tokens, offsets and padding, and a loop finds the positions. Ours tokenises a
paragraph once; the second figure reads the cache that the first has filled, and the third also builds every window's
row, padded in batches as for training. Every row and every label is compared. No figure includes imports or reading
the file; memory is the whole process's.

Selection: find the 20 best spans of every dev question from start and end logits, which are noise raised at each gold
answer. Theirs loops over questions and windows in Python, over pairs of the 20 best starts and ends; ours compares all
spans. Each measurement runs in its own process, and the two sides alternate.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
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
from run_qa_side import features_as_run_qa, select_as_run_qa

MAX_LENGTH, DOC_STRIDE, NUM_BEST, MAX_ANSWER_LENGTH = 384, 128, 20, 30
SIDES = ("features-theirs", "features-ours", "cache-ours", "selection-theirs", "selection-ours")


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id of a tokenizer (default: the installed MiniLM)")
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--test-file", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=1, help="of all measurements (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(args) -> None:
    args.model = args.model or str(minilm_folder())
    rounds = {side: [] for side in SIDES}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            environment = child_environment(args.threads, Path(folder) / f"cache-{number}")
            environment["TOKENIZERS_PARALLELISM"] = "true"
            for side in SIDES:
                result = run_side(args, side, Path(folder), environment)
                rounds[side].append(result)
                seconds = ", ".join(f"{name} {value:.2f} s" for name, value in result["seconds"].items())
                peak = result["peak_memory_bytes"] / 2**20
                print(f"{side}: {seconds}; peak {peak:.0f} MiB; others {result['other_load']:.1f} cores", flush=True)
        agreement = compare_features(Path(folder)) | compare_answers(Path(folder))
    rows = [{"side": side, **result} for side, results in rounds.items() for result in results]
    columns = {
        "side": lambda row: row["side"],
        "seconds": lambda row: ", ".join(f"{name} {value:.2f}" for name, value in row["seconds"].items()),
        "peak MiB": lambda row: f"{row['peak_memory_bytes'] / 2**20:.0f}",
    }
    print(f"\n{markdown_table(rows, columns)}\n")
    ratios = {kind: ratio(rounds, kind) for kind in ("features", "selection")}
    for kind, value in ratios.items():
        print(f"{kind}: {value:.1f} x as fast, wanted 3 or more")
    print(", ".join(f"{name.replace('_', ' ')}: {value:,}" for name, value in agreement.items()))
    write_record(args.output, {"conditions": conditions(args.threads), "ratios": ratios, **agreement, "sides": rows})


def ratio(rounds: dict[str, list[dict]], kind: str) -> float:
    """Return the median over the rounds of their seconds divided by ours."""
    pairs = zip(rounds[f"{kind}-theirs"], rounds[f"{kind}-ours"], strict=True)
    return median(theirs["seconds"][kind] / ours["seconds"][kind] for theirs, ours in pairs)


def run_side(args, side: str, folder: Path, environment: dict) -> dict:
    """Take one measurement in a child, this file with --side, which leaves its arrays in the folder."""
    result = folder / f"{side}.json"
    command = [sys.executable, __file__, "--side", side, "--result", str(result), "--model", args.model]
    command += ["--train-file", str(args.train_file), "--test-file", str(args.test_file)]
    child = run_child([*command, "--threads", str(args.threads)], environment)
    require_success(child)
    return {"seconds": json.loads(result.read_text())} | taken(child)


def compare_features(folder: Path) -> dict[str, int]:
    """Count rows and labels, and those that differ."""
    theirs, ours = (np.load(folder / f"features-{side}.npz") for side in ("theirs", "ours"))
    same_rows = len(theirs["lengths"]) == len(ours["lengths"]) and (theirs["lengths"] == ours["lengths"]).all()
    assert same_rows, "the windows differ"
    differing = (theirs["labels"] != ours["labels"]).any(axis=1).sum()
    return {
        "windows": len(ours["lengths"]),
        "differing_tokens": int((theirs["ids"] != ours["ids"]).sum()),
        "windows_with_differing_labels": int(differing),
    }


def compare_answers(folder: Path) -> dict[str, int]:
    """Count the answers that differ, and how many of those our span scores higher."""
    theirs, ours = (json.loads((folder / f"answers-{side}.json").read_text()) for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    differing = [name for name in ours if ours[name]["text"] != theirs[name]["text"]]
    better = sum(theirs[name]["score"] is None or ours[name]["score"] > theirs[name]["score"] for name in differing)
    nulls = sum(abs(ours[name]["null"] - theirs[name]["null"]) > 1e-4 for name in ours)
    return {
        "answers": len(ours),
        "differing_answers": len(differing),
        "of_them_scored_higher_by_ours": better,
        "differing_null_scores": nulls,
    }


# --- a measurement, in a process of its own ---


def measure(args) -> None:
    """Do one side's work; write its seconds to --result and its arrays next to that file."""
    import torch

    from zerotune.models.pretrained import load_tokenizer
    from zerotune.squad.files import read_questions

    torch.set_num_threads(args.threads)
    kind, side = args.side.split("-")
    questions, _ = read_questions(args.test_file if kind == "selection" else args.train_file)
    tokenizer = load_tokenizer(args.model, None)
    if kind == "selection":
        data, logits = dev_windows(questions, tokenizer)
        if side == "theirs":
            seconds, found = select_as_run_qa(questions, tokenizer, logits, NUM_BEST, MAX_ANSWER_LENGTH)
        else:
            seconds, found = select(data, torch.from_numpy(logits))
        (args.result.parent / f"answers-{side}.json").write_text(json.dumps(found))
        seconds = {"selection": seconds}
    elif side == "theirs":
        seconds, arrays = features_as_run_qa(questions, tokenizer, MAX_LENGTH, DOC_STRIDE)
        np.savez(args.result.parent / "features-theirs.npz", **arrays)
        seconds = {"features": seconds}
    else:
        seconds = features(questions, tokenizer, args.result.parent, kind)
    args.result.write_text(json.dumps(seconds))


def features(questions, tokenizer, folder: Path, kind: str) -> dict[str, float]:
    """Cut our windows, then build all rows in batches of similar length."""
    from zerotune.files import default_cache_dir
    from zerotune.squad.windows import cut_windows
    from zerotune.training.batches import evaluation_batches

    started = time.perf_counter()
    found = cut_windows(tokenizer, questions, False, MAX_LENGTH, DOC_STRIDE, default_cache_dir())
    seconds = {kind: time.perf_counter() - started}
    started = time.perf_counter()
    for batch in evaluation_batches(found.lengths, 2**14):
        found.inputs(batch, tokenizer.pad_token_id)
    seconds["rows"] = time.perf_counter() - started
    if kind == "features":
        batches = np.array_split(np.arange(len(found.lengths)), 100)
        ids = [inputs["input_ids"][inputs["attention_mask"] == 1] for inputs in (found.inputs(b, 0) for b in batches)]
        np.savez(folder / "features-ours.npz", lengths=found.lengths, labels=found.labels, ids=np.concatenate(ids))
    return seconds


def dev_windows(questions, tokenizer):
    """Return a SpanData, and logits [windows, 384, 2]: noise, raised around a random context token and at the label."""
    from zerotune.squad.spans import SpanData
    from zerotune.squad.windows import cut_windows

    found = cut_windows(tokenizer, questions, False, MAX_LENGTH, DOC_STRIDE, None)
    generator = np.random.RandomState(0)
    every, column = np.arange(len(found.lengths)), np.arange(MAX_LENGTH)
    begins, ends = found.context_columns[:, None], (found.context_columns + found.counts)[:, None]
    logits = generator.normal(0, 1, (len(every), MAX_LENGTH, 2)).astype(np.float32)
    centre = found.context_columns + generator.randint(0, np.maximum(found.counts, 1))
    logits += 4 * np.exp(np.abs(column - centre[:, None]) / -8)[..., None]  # good starts and ends are close
    logits[(column < begins) | (column >= ends)] -= 8
    for side in (0, 1):
        logits[every, found.labels[:, side], side] += generator.uniform(4, 16, len(every))
    return SpanData(questions, found, tokenizer.pad_token_id, NUM_BEST, MAX_ANSWER_LENGTH), logits


def select(data, logits) -> tuple[float, dict]:
    """Turn logits into texts with scores our way, in batches of 256 questions."""
    started = time.perf_counter()
    records = []
    for rows in np.split(np.arange(len(data.ids)), range(256, len(data.ids), 256)):
        windows = data.windows_of(rows)
        longest = data.windows.lengths[windows].max()
        records += data.span_records(logits[windows[0] : windows[-1] + 1, :longest], rows)
    n_best = data.n_best(records)
    seconds = time.perf_counter() - started
    return seconds, {
        name: {"text": spans[0]["text"], "score": spans[0]["score"], "null": record["null"]}
        for name, spans, record in zip(data.ids, n_best, records, strict=True)
    }


if __name__ == "__main__":
    arguments = parse_args()
    measure(arguments) if arguments.side else main(arguments)
