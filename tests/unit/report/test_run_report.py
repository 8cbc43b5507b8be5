"""report.html of fabricated run folders: its content, also when pieces are missing."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from zerotune.files import write_json, write_json_lines
from zerotune.metrics.labels import classification_metrics
from zerotune.report.html import interval_text
from zerotune.report.label_parts import label_parts
from zerotune.report.run_report import print_run_table, write_report

LABELS = ("negative", "positive")
NASTY = '<script>alert("1")</script> & <b>not bold</b>'


def predictions(ids, labels, accuracy, seed):
    """Return lines of predictions.jsonl: each right with probability `accuracy`, more confident where right."""
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
    "command": "train/sst2.py --model distilbert/distilbert-base-uncased --epochs 3 --output-dir runs/sst2-full",
    "flags": {"model": "distilbert/distilbert-base-uncased", "method": "full", "seed": 0, "learning_rate": 3e-5},
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
    return texts


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that what opens also closes."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words, self.ids = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sst2-distilbert-full"
    texts = fabricate_run(folder)
    return folder, texts


def test_headline_scores_and_paired_test(run):
    folder, texts = run
    path = write_report(folder, label_parts(LABELS, texts))
    assert path == folder / "report.html"
    page = read(path)
    tuned = json.loads((folder / "eval/final/metrics.json").read_text())
    base = json.loads((folder / "eval/base/metrics.json").read_text())
    assert "SST-2" in page.text and "distilbert/distilbert-base-uncased, full fine-tuning" in page.text
    for metrics in (base, tuned):
        assert f"{100 * metrics['accuracy']:.1f} %" in page.text
        assert interval_text(metrics["f1_macro_ci95"]).replace("\u00a0", " ") in page.text
    assert "base: untrained head" in page.text and "tuned: classifier head" in page.text
    assert "On the 500 items that both scored" in page.text and "tuned, the same items" in page.text
    assert "exact McNemar test, p < 0.0001" in page.text


def test_paired_counts_in_the_page_are_those_of_the_common_items(run):
    folder, texts = run
    lines = {
        name: {line["id"]: line for line in map(json.loads, (folder / f"eval/{name}/predictions.jsonl").open())}
        for name in ("base", "final")
    }
    right = {
        name: {i for i, line in side.items() if line["label"] == line["prediction"]} for name, side in lines.items()
    }
    common = lines["base"].keys() & lines["final"].keys()
    only_tuned, only_base = (len(common & (right[a] - right[b])) for a, b in (("final", "base"), ("base", "final")))
    page = read(write_report(folder, label_parts(LABELS, texts)))
    assert f"is right on {only_tuned} of them, the base alone on {only_base};" in page.text


def test_one_file_without_scripts_or_anything_to_fetch(run):
    folder, texts = run
    path = write_report(folder, label_parts(LABELS, texts))
    page = read(path)
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(page.tags)
    assert [value for name, value in page.attributes if name in ("src", "href", "srcset")] == []
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert not re.search(r"url\((?!#)|@import", path.read_text())
    assert len(page.ids) == len(set(page.ids)), "ids of the figures differ"


def test_texts_are_escaped_and_sorted_by_confidence(run):
    folder, texts = run
    path = write_report(folder, label_parts(LABELS, texts))
    page = read(path)
    assert NASTY in page.text and "<b>not bold" not in path.read_text()
    shown = [float(value) for value in re.findall(r"with probability (0\.\d+)", page.text)]
    assert len(shown) == 12 and shown == sorted(shown, reverse=True)
    wrong = [
        math.exp(max(line["scores"]))
        for line in map(json.loads, (folder / "eval/final/predictions.jsonl").open())
        if line["label"] != line["prediction"]
    ]
    assert shown[0] == pytest.approx(max(wrong), abs=5e-5)


def test_curves_have_labelled_axes(run):
    folder, texts = run
    page = read(write_report(folder, label_parts(LABELS, texts)))
    assert page.tags.count("svg") == 6
    labels = ("optimizer step", "loss (mean cross-entropy, nats)", "learning rate", "gradient norm", "epoch")
    for label in labels:
        assert label in page.text
    assert "training step" in page.text and "validation split" in page.text


def test_data_parameters_and_run_facts(run):
    folder, texts = run
    page = read(write_report(folder, label_parts(LABELS, texts)))
    for text in ("60,112", "6334", "removed 31 train rows that are also in test", "66,955,010", "592,130"):
        assert text in page.text
    assert "as published this run" in page.text and "groups · adapter – 147,456" in page.text
    for text in ("NVIDIA H100 80GB HBM3", "12.346 s", "6.00 GiB", "468.6 per second", RUN["command"], "2.13.0"):
        assert text in page.text


def test_same_folder_same_bytes(run):
    folder, texts = run
    assert (
        write_report(folder, label_parts(LABELS, texts)).read_bytes()
        == write_report(folder, label_parts(LABELS, texts)).read_bytes()
    )
    assert [path.name for path in folder.glob(".*")] == []


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("eval/base", "This run has no base evaluation."),
        ("eval/final", "This run has no final evaluation yet."),
        ("eval/final/metrics.json", "No scores in eval/final: an evaluation folder holds metrics.json"),
        ("metrics.jsonl", "metrics.jsonl holds no logged step."),
        ("split.json", "This run has no split.json."),
        ("parameters.json", "This run has no parameters.json."),
        ("run.json", "This run has no run.json."),
    ],
)
def test_a_missing_piece_is_said_in_words(tmp_path, missing, words):
    folder = tmp_path / "run"
    fabricate_run(folder, num_base=20, num_items=40)
    path = folder / missing
    path.rename(tmp_path / "moved")
    assert words in read(write_report(folder, label_parts(LABELS))).text


def test_an_empty_folder_still_gives_a_page(tmp_path):
    page = read(write_report(tmp_path, label_parts(LABELS)))
    assert "This run has no base evaluation." in page.text and "svg" not in page.tags
    assert "%" not in page.text


def test_base_on_other_items_gives_no_paired_test(tmp_path):
    folder = tmp_path / "run"
    fabricate_run(folder, num_base=20, num_items=40)
    lines = [{**line, "id": f"other-{line['id']}"} for line in predictions(map(str, range(9)), [0, 1, 1] * 3, 0.5, 0)]
    write_json_lines(folder / "eval/base/predictions.jsonl", lines)
    metrics = classification_metrics(*([line[name] for line in lines] for name in ("label", "prediction")), LABELS)
    write_json(folder / "eval/base/metrics.json", metrics | {"setting": "prompt"})
    text = read(write_report(folder, label_parts(LABELS))).text
    assert "No paired test:" in text and "share no id" in text and "McNemar" not in text


def test_unlabelled_test_items_give_no_scores(tmp_path):
    folder = tmp_path / "run"
    fabricate_run(folder, num_base=20, num_items=40)
    lines = [{"id": "a", "label": None, "prediction": 1, "scores": [-2.0, -0.1]}]
    write_json_lines(folder / "eval/final/predictions.jsonl", lines)
    assert (
        "No scores in eval/final: a score needs labelled predictions"
        in read(write_report(folder, label_parts(LABELS))).text
    )


def test_the_run_table_shows_both_evaluations_and_their_difference(run, capsys):
    folder, _ = run
    tuned = json.loads((folder / "eval/final/metrics.json").read_text())
    print_run_table(folder, label_parts(LABELS))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["accuracy", "95", "%", "interval", "f1", "items"]
    assert lines[1].startswith("base, untrained head ") and lines[1].endswith("500")
    low, high = tuned["accuracy_ci95"]
    scores = [f"{tuned['accuracy']:.4f}", f"[{low:.4f},", f"{high:.4f}]", f"{tuned['f1']:.4f}", "872"]
    assert lines[2].split() == ["tuned", *scores]
    assert lines[3].startswith("on the 500 common items: accuracy +0.") and "McNemar p = " in lines[3]
    assert len(lines) == 4


def test_a_base_evaluation_of_all_items_adds_no_column(tmp_path):
    fabricate_run(tmp_path / "run", num_base=40, num_items=40)
    text = read(write_report(tmp_path / "run", label_parts(LABELS))).text
    assert "On the 40 items that both scored" in text and "tuned, the same items" not in text


def test_the_run_table_of_a_run_without_a_base_evaluation(tmp_path, capsys):
    fabricate_run(tmp_path / "run", num_base=20, num_items=40)
    (tmp_path / "run/eval/base").rename(tmp_path / "moved")
    print_run_table(tmp_path / "run", label_parts(LABELS))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["accuracy", "tuned"]


def test_three_labels(tmp_path):
    names = ("refund", "login", "other")
    labels, found = [0, 1, 2] * 20, [0, 1, 1] * 20
    lines = [
        {"id": f"item-{number}", "label": label, "prediction": prediction, "scores": [-1.0, -0.9, -1.5]}
        for number, (label, prediction) in enumerate(zip(labels, found, strict=True))
    ]
    folder = tmp_path / "eval" / "final"
    folder.mkdir(parents=True)
    write_json_lines(folder / "predictions.jsonl", lines)
    described = {"task": "tickets", "setting": "classifier head"}
    write_json(folder / "metrics.json", {**classification_metrics(labels, found, names), **described})
    page = read(write_report(tmp_path, label_parts(names)))
    assert "accuracy on login" in page.text and "predicted other" in page.text
    assert "login with probability 0.4066, labelled other" in page.text
