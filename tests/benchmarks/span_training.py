"""A span head on the MiniLM encoder: zerotune against transformers.Trainer on SQuAD v2, alternated in one run on a CPU.

    python tests/benchmarks/span_training.py --train-file train-v2.0.json.gz --test-file dev-v2.0.json.gz

Three ways train the same model on the windows of the same questions with the same learning rate, batch size and seed,
each in a process of its own: `ours` (zerotune's loop), `default` (the Trainer as run_qa.py drives it: float32, every
window padded to 384 tokens) and `best` (the Trainer at its best flags: bf16, dynamic padding, grouped by length, fused
AdamW, and the quicker of two attentions by a short probe). Questions/s count from the first step to the end of the
last: questions whose windows were trained, evaluation and saving left out. `default` is timed over --default-steps
steps; --full trains it whole, for its F1. Each round has its own seed. F1 and exact are the official ones of answerable
and unanswerable questions at the threshold 0, over the first --eval-questions dev questions of a random order, found by
the same code for all ways. A ratio is taken within a round, for a shared machine may be twice as fast in one minute as
in the next.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median
from types import SimpleNamespace

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
WANTED = {"default": 5.0, "best": 1.3}
ATTENTIONS = ("sdpa", "eager")
MAX_LENGTH, DOC_STRIDE, NUM_BEST, MAX_ANSWER_LENGTH = 384, 128, 20, 30
WARMUP_RATIO, WEIGHT_DECAY, PROBE_STEPS = 0.1, 0.01, 3
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
    for hidden, kind in (
        ("--way", str),
        ("--seed", int),
        ("--max-steps", int),
        ("--attention", str),
        ("--result", Path),
    ):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
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
    """The attention that is quicker for `best`, over few steps of each."""
    flags = {"seed": 0, "max_steps": PROBE_STEPS}
    speeds = {
        name: run_way(args, "best", {**flags, "attention": name}, environment)["questions_per_s"] for name in ATTENTIONS
    }
    print("probe of the Trainer: " + ", ".join(f"{name} {speed:.1f}/s" for name, speed in speeds.items()), flush=True)
    return max(speeds, key=speeds.get)


def run_way(args, way: str, flags: dict, environment: dict) -> dict:
    """A training in a child: this file with --way."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {name: getattr(args, name) for name in PASSED_ON} | flags
        flags |= {"way": way, "result": Path(folder) / "result.json"}
        words = [(f"--{name.replace('_', '-')}", str(value)) for name, value in flags.items() if value is not None]
        child = run_child([sys.executable, __file__, *(word for pair in words for word in pair)], environment)
        require_success(child)
        return json.loads(flags["result"].read_text()) | taken(child)


def ratio(rounds: dict[str, list[dict]], way: str, other: str) -> float:
    """Median over the rounds of one way's speed over another's."""
    pairs = zip(rounds[way], rounds[other], strict=True)
    return median(own["questions_per_s"] / its["questions_per_s"] for own, its in pairs)


def _shown(result: dict) -> str:
    score = "not trained whole" if result["f1"] is None else f"exact {result['exact']:.2f}, F1 {result['f1']:.2f}"
    shown = f"{result['questions_per_s']:.1f} questions/s, {score}, {result['wall_s']:.0f} s"
    return f"{shown}; other processes kept {result['other_load']:.1f} cores busy"


def _summary(way: str, results: list[dict]) -> dict:
    """A way's rounds in one row: the median speed, mean scores and the largest memory."""
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


# --- a training, in a process of its own ---


def train(args) -> None:
    """Train one way and write its figures to --result."""
    from zerotune import cpu

    if args.way == "ours":
        cpu.use_whole_cpu(tiny_model=False)
    import numpy as np
    import torch

    from zerotune.pretrained import load_tokenizer
    from zerotune.randomness import random_order
    from zerotune.span_data import SpanData
    from zerotune.span_features import span_features
    from zerotune.squad_files import read_questions

    torch.set_num_threads(args.threads)
    tokenizer = load_tokenizer(args.model, None)
    data = {}
    for name, path, count in (
        ("train", args.train_file, args.questions),
        ("eval", args.test_file, args.eval_questions),
    ):
        questions, _ = read_questions(path)
        chosen = [questions[place] for place in np.sort(random_order(len(questions), 0, name)[:count])]
        features = span_features(tokenizer, chosen, False, MAX_LENGTH, DOC_STRIDE, None)
        data[name] = SpanData(chosen, features, tokenizer.pad_token_id, NUM_BEST, MAX_ANSWER_LENGTH)
    torch.manual_seed(args.seed)
    model, figures = (train_ours if args.way == "ours" else train_with_trainer)(args, data["train"], tokenizer)
    scores = dict.fromkeys(("exact", "f1", "HasAns_f1", "NoAns_f1"))
    if args.max_steps is None:
        found = official_scores_of(model, data["eval"])
        scores = {name: found[name] for name in scores}
    args.result.write_text(json.dumps(figures | scores))


def train_ours(args, data, tokenizer):
    """zerotune's loop, bf16 where the processor has it, as train/qa.py builds it."""
    from zerotune.batching import num_steps_per_epoch
    from zerotune.cpu import CPU_TOKENS
    from zerotune.engine import Engine
    from zerotune.launch import start_accelerator
    from zerotune.loop import Loop
    from zerotune.models import ModelSettings
    from zerotune.precision import default_precision
    from zerotune.runs import RunFolder
    from zerotune.schedule import plan_schedule
    from zerotune.span_head import load_span_model
    from zerotune.training import optimizer_for
    from zerotune.used_rows import train_used_rows

    flags = {"learning_rate": args.learning_rate, "head_learning_rate": args.learning_rate, "optimizer": "adamw"}
    flags |= {"weight_decay": WEIGHT_DECAY, "batch_size": args.batch_size, "tokens_per_device": CPU_TOKENS, "epochs": 1}
    flags |= {"warmup_ratio": WARMUP_RATIO, "max_steps": args.max_steps, "seed": args.seed, "patience": None}
    flags |= {"eval_every": None, "checkpoint_every": 10**6, "log_every": 10, "keep_checkpoints": 1}
    own = SimpleNamespace(**flags)
    accelerator = start_accelerator(None)
    settings = ModelSettings(args.model, None, "full", precision=default_precision(), seed=args.seed)
    model = load_span_model(settings, tokenizer)
    train_used_rows(model.stock_model, data.token_ids)
    engine = Engine(accelerator, model, optimizer_for(model, own, accelerator.device), settings.precision, 1.0)
    schedule = plan_schedule(own, num_steps_per_epoch(len(data.ids), args.batch_size))
    with tempfile.TemporaryDirectory() as folder, RunFolder(Path(folder) / "run", accelerator) as run:
        no_values = {"eval_loss": 0.0, "choose_by": 0.0}
        stop_signal = SimpleNamespace(name=None)
        progress = Loop(engine, data, schedule, run, own, lambda step: dict(no_values), stop_signal).train()
    seconds = progress.train_seconds
    return model, {"questions_per_s": progress.num_examples / seconds, "train_s": seconds}


def train_with_trainer(args, data, tokenizer):
    """The Trainer over the same windows, which it shuffles and counts one by one."""
    import torch
    from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding, Trainer, default_data_collator

    from zerotune.heads import SPAN_HEAD, make_head_float32
    from zerotune.span_head import SpanModel

    pads = args.way == "default"
    rows = _as_rows(data, tokenizer, pads)
    model = AutoModelForQuestionAnswering.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation=args.attention or "sdpa"
    )
    timing = _timing_callback()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=_training_arguments(args, folder),
            train_dataset=rows,
            data_collator=default_data_collator if pads else DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            callbacks=[timing],
        )
        trainer.train()
    seconds = timing.ended - timing.started
    num_windows = min(trainer.state.global_step * args.batch_size, len(rows))
    num_questions = num_windows * len(data.ids) / len(rows)
    make_head_float32(model, (SPAN_HEAD,))  # so that all ways are evaluated alike
    return SpanModel(model), {"questions_per_s": num_questions / seconds, "train_s": seconds}


def _as_rows(data, tokenizer, pads: bool) -> list[dict]:
    """Windows as the Trainer takes them; run_qa.py pads each to the maximum length beforehand."""
    import numpy as np

    rows = []
    for window, labels in enumerate(data.features.labels):
        inputs = data.features.inputs(np.array([window]), data.pad_id)
        row = {name: values[0].tolist() for name, values in inputs.items()}
        row = dict(tokenizer.pad(row, padding="max_length", max_length=MAX_LENGTH)) if pads else row
        rows.append(row | {"start_positions": int(labels[0]), "end_positions": int(labels[1])})
    return rows


def _training_arguments(args, folder: str):
    from transformers import TrainingArguments

    best = {"bf16": True, "train_sampling_strategy": "group_by_length", "optim": "adamw_torch_fused"}
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP_RATIO,
        num_train_epochs=1,
        max_steps=args.max_steps or -1,
        seed=args.seed,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,  # they would compete with the arithmetic for the same few cores
        **(best if args.way == "best" else {}),
    )


def _timing_callback():
    from transformers import TrainerCallback

    class Timing(TrainerCallback):
        started = ended = None

        def on_step_begin(self, args, state, control, **kwargs):
            self.started = self.started or time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            self.ended = time.perf_counter()

    return Timing()


def official_scores_of(model, data) -> dict:
    """Official scores where the best span is given unless the null score is higher."""
    import numpy as np
    import torch

    from zerotune.batching import evaluation_batches
    from zerotune.precision import autocast, default_precision
    from zerotune.squad_metrics import official_scores, score_answers

    model.eval()
    found = np.zeros((len(data.ids), 2 + 3 * data.num_best), np.float32)
    with torch.no_grad(), autocast("cpu", default_precision()):
        for rows in evaluation_batches(data.scored_lengths, 4096):
            found[rows] = data.scores(model, rows, torch.device("cpu"))
    answers = zip(data.ids, data.answers(found), data.null_odds(found), strict=True)
    texts = {name: spans[0].text if spans and odds <= 0 else "" for name, spans, odds in answers}
    return official_scores(score_answers(data.questions, texts))


if __name__ == "__main__":
    arguments = parse_args()
    train(arguments) if arguments.way else main(arguments)
