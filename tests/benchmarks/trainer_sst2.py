"""Compare zerotune with transformers.Trainer on SST-2, taking turns on one CPU.

    python tests/benchmarks/trainer_sst2.py --train-file train.tsv.gz --validation-file validation.tsv.gz

Three ways train the same model on the same rows with the same learning rate, batch size and seed, each in its own
process: `ours` (train/sst2.py without the base evaluation), `default` (the Trainer as run_glue.py drives it: float32,
every text padded to 128 tokens) and `best` (the Trainer with its best flags: bf16, dynamic padding, grouped by length,
fused AdamW). With `--method lora` all train the head and adapters of the same rank around 16-bit weights, the Trainer
through peft. Examples/s count from the first step to the end of the last; imports, loading, tokenising, evaluation and
saving are in the wall seconds only. `default` is timed over --default-steps steps, because a whole epoch takes ten
minutes; --full trains the whole epoch, for its accuracy. Each round has its own seed. Accuracies are means over the
rounds, speeds are medians, and a ratio is the median of the ratios within each round, because a shared machine may be
twice as fast in one minute as in the next. Peak memory is that of the whole process: ours also saves checkpoints,
evaluates the reloaded model and writes a report; the Trainer's processes do not.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median

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

WAYS = {"ours": "zerotune", "default": "Trainer, run_glue defaults", "best": "Trainer, best flags"}
MAX_LENGTH = 128
WARMUP_RATIO, WEIGHT_DECAY = 0.06, 0.01


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id (default: the installed MiniLM)")
    parser.add_argument("--train-file", type=Path, required=True)
    parser.add_argument("--validation-file", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=6400, help="train rows, one epoch (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    parser.add_argument("--method", choices=("full", "lora"), default="full", help="default %(default)s")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="of all weights (default %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each way, alternated (default %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="default: all")
    parser.add_argument("--default-steps", type=int, default=20, help="steps that `default` is timed over")
    parser.add_argument("--full", action="store_true", help="train `default` whole in the first round")
    parser.add_argument("--output", type=Path, help="json file for the record")
    for hidden, kind in (("--way", str), ("--seed", int), ("--max-steps", int), ("--result", Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(args) -> None:
    args.model = args.model or str(minilm_folder())
    rounds = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        environment = child_environment(args.threads, Path(folder) / "cache")
        for seed in range(args.rounds):
            for way in args.ways:
                whole = way != "default" or (args.full and seed == 0)
                run = run_ours if way == "ours" else run_trainer
                result = run(args, way, seed, None if whole else args.default_steps, environment)
                rounds[way].append(result)
                print(f"round {seed + 1}, {WAYS[way]}: {_shown(result)}", flush=True)
    rows = [_summary(way, results) for way, results in rounds.items()]
    print("\n" + _table(rows, rounds))
    names = ("model", "method", "rows", "batch_size", "learning_rate", "rounds", "default_steps", "full")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"warmup_ratio": WARMUP_RATIO, "weight_decay": WEIGHT_DECAY, "max_length": MAX_LENGTH}
    record = {"conditions": conditions(args.threads), "settings": settings, "ways": rows, "rounds": rounds}
    write_record(args.output, record)


def run_ours(args, way: str, seed: int, max_steps: int | None, environment: dict) -> dict:
    """Run train/sst2.py as users do; return the figures from its run folder."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        child = run_child([sys.executable, str(REPOSITORY / "train/sst2.py"), *_flags(args, seed, run)], environment)
        require_success(child)
        timings = json.loads((run / "run.json").read_text())["timings"]
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        chosen = [line["eval_accuracy"] for line in lines if "eval_accuracy" in line]
        return {
            "examples_per_s": timings["train_examples_per_s"],
            "train_s": timings["train_s"],
            "accuracy": chosen[-1],
            "validation_accuracy": json.loads((run / "eval/final/metrics.json").read_text())["accuracy"],
            **taken(child),
        }


def _flags(args, seed: int, output_dir: Path) -> list[str]:
    """Return the flags of train/sst2.py for this comparison."""
    flags = {
        "model": args.model,
        "method": args.method,
        "train-file": args.train_file,
        "validation-file": args.validation_file,
        "limit-train": args.rows,
        "batch-size": args.batch_size,
        "learning-rate": args.learning_rate,
        "head-learning-rate": args.learning_rate,
        "warmup-ratio": WARMUP_RATIO,
        "weight-decay": WEIGHT_DECAY,
        "max-length": MAX_LENGTH,
        "epochs": 1,
        "seed": seed,
        "base-eval": "none",
        "output-dir": output_dir,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def run_trainer(args, way: str, seed: int, max_steps: int | None, environment: dict) -> dict:
    """Run the Trainer in a child: this file with --way."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--way", way, "--seed", str(seed), "--result", str(result)]
        names = ("model", "train_file", "validation_file", "method", "rows", "batch_size", "learning_rate", "threads")
        for name in names:
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        child = run_child(command + (["--max-steps", str(max_steps)] if max_steps else []), environment)
        require_success(child)
        return json.loads(result.read_text()) | taken(child)


def _shown(result: dict) -> str:
    accuracy = "not trained whole" if result["accuracy"] is None else f"accuracy {result['accuracy']:.4f}"
    shown = f"{result['examples_per_s']:.1f} examples/s, {accuracy}, {result['wall_s']:.0f} s"
    return f"{shown}; other processes kept {result['other_load']:.1f} cores busy"


def _summary(way: str, results: list[dict]) -> dict:
    """Summarise a way's rounds in one row: the median speed, mean accuracies and the largest memory."""

    def mean(name: str) -> float | None:
        values = [result[name] for result in results if result[name] is not None]
        return sum(values) / len(values) if values else None

    whole = [result for result in results if result["accuracy"] is not None]
    return {
        "way": way,
        "examples_per_s": median(result["examples_per_s"] for result in results),
        "accuracy": mean("accuracy"),
        "validation_accuracy": mean("validation_accuracy"),
        "peak_memory_bytes": max(result["peak_memory_bytes"] for result in results),
        "wall_s": min((result["wall_s"] for result in whole), default=None),
        "cpu_s": min((result["cpu_s"] for result in whole), default=None),
    }


def _table(rows: list[dict], rounds: dict[str, list[dict]]) -> str:
    def ratio(row: dict, way: str) -> str:
        if way not in rounds:
            return "–"
        pairs = zip(rounds[row["way"]], rounds[way], strict=True)
        return f"{median(own['examples_per_s'] / other['examples_per_s'] for own, other in pairs):.2f} ×"

    def number(value: float | None, digits: int) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    columns = {
        "way": lambda row: WAYS[row["way"]],
        "examples/s": lambda row: number(row["examples_per_s"], 1),
        "to defaults": lambda row: ratio(row, "default"),
        "to best flags": lambda row: ratio(row, "best"),
        "accuracy, validation split": lambda row: number(row["accuracy"], 4),
        "accuracy, test split": lambda row: number(row["validation_accuracy"], 4),
        "peak MiB": lambda row: number(row["peak_memory_bytes"] / 2**20, 0),
        "wall s": lambda row: number(row["wall_s"], 0),
        "CPU s": lambda row: number(row["cpu_s"], 0),
    }
    return markdown_table(rows, columns)


# --- the Trainer, in a process of its own ---


def train_with_trainer(args) -> None:
    """Train `default` or `best` on the rows and tokens that train/sst2.py would use; write the figures to --result."""
    import torch
    from trainer_side import Timing, training_arguments
    from transformers import Trainer

    from zerotune.files import default_cache_dir
    from zerotune.models.pretrained import load_tokenizer
    from zerotune.settings.flags import train_parser
    from zerotune.settings.resolve import data_settings
    from zerotune.tasks.sst2 import SST2
    from zerotune.tasks.texts import load
    from zerotune.tasks.tokens import encode_texts

    torch.set_num_threads(args.threads)
    flags = train_parser("", SST2).parse_args(_flags(args, args.seed, Path("unused")))
    splits = load(SST2, data_settings(flags))
    tokenizer = load_tokenizer(args.model, None)
    pads = args.way == "default"
    rows = {}
    for name in ("train", "validation", "test"):
        examples = getattr(splits, name)
        encoded = encode_texts(tokenizer, [example.text for example in examples], MAX_LENGTH, default_cache_dir())
        rows[name] = _as_features(encoded, [example.label for example in examples], tokenizer, pads)
    torch.manual_seed(args.seed)
    model = _model(args, tokenizer)
    timing = Timing()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=training_arguments(args, folder, WEIGHT_DECAY, WARMUP_RATIO),
            train_dataset=rows["train"],
            data_collator=_collator(tokenizer, pads),
            processing_class=tokenizer,
            callbacks=[timing],
        )
        trainer.train()
    seconds = timing.ended - timing.started
    num_examples = min(trainer.state.global_step * args.batch_size, len(rows["train"]))
    figures = {"examples_per_s": num_examples / seconds, "train_s": seconds, "accuracy": None}
    figures["validation_accuracy"] = None
    if args.max_steps is None:
        figures["accuracy"], figures["validation_accuracy"] = (
            _accuracy(trainer, rows[n]) for n in ("validation", "test")
        )
    args.result.write_text(json.dumps(figures))


def _model(args, tokenizer):
    """Return the stock model; with --method lora in 16 bits, with peft adapters of our default rank and scale."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification

    dtype = torch.float32 if args.method == "full" else torch.bfloat16
    model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2, dtype=dtype)
    model.config.pad_token_id = tokenizer.pad_token_id
    if args.method == "full":
        return model
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear"))


def _as_features(encoded, labels: list[int], tokenizer, pads: bool) -> list[dict]:
    """Return rows in the Trainer's format; run_glue.py pads each to the maximum length beforehand."""
    features = []
    for index, label in enumerate(labels):
        ids = encoded.row(index).tolist()
        feature = {"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": [0] * len(ids)}
        padded = tokenizer.pad(feature, padding="max_length", max_length=MAX_LENGTH) if pads else feature
        features.append({**padded, "labels": label})
    return features


def _collator(tokenizer, pads: bool):
    from transformers import DataCollatorWithPadding, default_data_collator

    return default_data_collator if pads else DataCollatorWithPadding(tokenizer)


def _accuracy(trainer, rows: list[dict]) -> float:
    output = trainer.predict(rows)  # grouped by length, so not in the order of the rows
    return float((output.predictions.argmax(axis=1) == output.label_ids).mean())


if __name__ == "__main__":
    arguments = parse_args()
    train_with_trainer(arguments) if arguments.way else main(arguments)
