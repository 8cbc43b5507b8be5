"""Fabricated run folders, for the tests of pages."""

import math

import numpy as np

from zerotune.files import write_json, write_json_lines
from zerotune.metrics.labels import classification_metrics

LABELS = ("negative", "positive")
NASTY = '<script>alert("1")</script> & <b>not bold</b>'


def predictions(ids, labels, accuracy, seed):
    """Return lines of predictions.jsonl: each is right with probability `accuracy`, and more confident if right."""
    rng = np.random.default_rng(seed)
    lines = []
    for identifier, label in zip(ids, labels, strict=True):
        right = rng.random() < accuracy
        prediction = int(label if right else 1 - label)
        probability = 0.5 + 0.499 * rng.beta(4 if right else 2, 1 if right else 2)
        scores = [math.log(1 - probability), math.log(probability)]
        lines.append(
            {
                "id": identifier,
                "label": int(label),
                "prediction": prediction,
                "scores": scores if prediction == 1 else scores[::-1],
            }
        )
    return lines


def write_evaluation(folder, lines, **settings):
    folder.mkdir(parents=True)
    write_json_lines(folder / "predictions.jsonl", lines)
    metrics = classification_metrics([line["label"] for line in lines], [line["prediction"] for line in lines], LABELS)
    write_json(folder / "metrics.json", {**metrics, "task": "sst2", "setting": "prompt", "seed": 0, **settings})


def write_curves(path, num_steps=2_000):
    rng = np.random.default_rng(1)
    lines = []
    for step in [1, *range(10, num_steps + 1, 10)]:
        progress = step / num_steps
        line = {"step": step, "epoch": 3 * progress, "loss": 0.12 + 0.57 * math.exp(-5 * progress)}
        line["loss"] += 0.06 * float(rng.standard_normal())
        line["learning_rate"] = 3e-5 * min(progress / 0.06, (1 - progress) / 0.94)
        line["grad_norm"] = None if step == 500 else float(rng.lognormal(0.4, 0.5))
        line |= {"tokens": 420 * step, "tokens_per_s": 13_300.5}
        lines.append(line)
        if step % 200 == 0:
            accuracy = 0.915 - 0.3 * math.exp(-9 * progress)
            scores = {"eval_loss": 0.9 - accuracy * 0.72, "eval_accuracy": accuracy}
            lines.append({"step": step, "epoch": 3 * progress, **scores})
    write_json_lines(path, lines)


RUN = {
    "task": "sst2",
    "command": "train/sst2.py --model distilbert/distilbert-base-uncased --epochs 3 --output-dir runs/sst2-full",
    "flags": {"model": "distilbert/distilbert-base-uncased", "method": "full", "output_dir": "runs/sst2-full"},
    "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "bitsandbytes": None},
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "world": {"num_processes": 2, "device": "cuda", "device_name": "NVIDIA H100 80GB HBM3", "precision": "bf16"},
    "timings": {
        "startup_s": 12.3456,
        "train_s": 431.2,
        "train_examples_per_s": 468.6,
        "train_tokens_per_s": 5_912.0,
        "peak_memory_bytes": 6_442_450_944,
    },
}
PARAMETERS = {
    "before": {"total": 66_362_880, "trainable": 66_362_880, "head": 0, "groups": {"embedding": 23_837_184}},
    "after": {"total": 66_955_010, "trainable": 66_955_010, "head": 592_130, "groups": {"adapter": 147_456}},
    "moved": {"groups": {"attention": 0.0123, "norm": 0.0004}, "layers": [0.01, 0.02, 0.03]},
}
SPLIT = {
    "task": "sst2",
    "rule": "official: the published validation set reports, whole sentences of train validate",
    "split_seed": 0,
    "splits": {
        "train": {"count": 60_112, "labels": {"negative": 26_610, "positive": 33_502}, "ids_sha256": "ab" * 32},
        "validation": {"count": 872, "labels": {"negative": 428, "positive": 444}, "ids_sha256": "cd" * 32},
        "test": {"count": 872, "labels": {"negative": 428, "positive": 444}, "ids_sha256": "ef" * 32},
    },
    "sources": {"train": {"dataset": "stanfordnlp/sst2", "rows": 67_349, "sha256": "12" * 32}},
    "notes": ["8,995 rows occur more than once", "removed 31 train rows that are also in test"],
    "settings": {"train_size": None},
    "removed_rows": {"in_test": 31, "in_choose": 6_334},
}
WORDS = ["a", "film", "that", "never", "quite", "finds", "its", "feet", "but", "keeps", "heart", "in", "plain", "sight"]


def fabricate_run(folder, num_base=500, num_items=872):
    """Make a run folder as a finished training run leaves it; returns the texts of its items."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, num_items)
    ids = [f"validation-{number}" for number in range(num_items)]
    folder.mkdir(parents=True)
    write_json(folder / "run.json", RUN)
    write_json(folder / "parameters.json", PARAMETERS)
    write_json(folder / "split.json", SPLIT)
    write_curves(folder / "metrics.jsonl")
    settings = {"model": "distilbert/distilbert-base-uncased", "method": "full"}
    base = predictions(ids[:num_base], labels[:num_base], 0.52, 2)
    write_evaluation(folder / "eval" / "base", base, setting="untrained head", **settings)
    tuned = predictions(ids, labels, 0.91, 3)
    write_evaluation(folder / "eval" / "final", tuned, setting="classifier head", **settings)
    texts = {one: " ".join(rng.choice(WORDS, int(rng.integers(4, 40)))) for one in ids}
    most_confident = max(
        (line for line in tuned if line["prediction"] != line["label"]), key=lambda line: max(line["scores"])
    )
    texts[most_confident["id"]] = NASTY
    for name, lines in (("base", base), ("final", tuned)):
        lines = [line | {"text": texts[line["id"]], "num_words": len(texts[line["id"]].split())} for line in lines]
        write_json_lines(folder / "eval" / name / "predictions.jsonl", lines)
    return texts
