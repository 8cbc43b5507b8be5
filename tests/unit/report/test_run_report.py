"""Test report.html of fabricated run folders: its content, also when pieces are missing."""

import json
import math
import re
from html.parser import HTMLParser

import pytest
from report_cases import LABELS, NASTY, RUN, fabricate_run, predictions, write_evaluation

from zerotune.evaluation.prompt_seeds import summarise_seeds
from zerotune.files import write_json, write_json_lines
from zerotune.metrics.evaluations import Evaluation, PairedAccuracy
from zerotune.metrics.labels import classification_metrics
from zerotune.report import words
from zerotune.report.curves import History
from zerotune.report.evaluation_report import write_evaluation_report
from zerotune.report.html import interval_text
from zerotune.report.item_parts import calibration_section, length_section
from zerotune.report.label_parts import label_parts
from zerotune.report.run_report import print_run_table, write_report
from zerotune.report.tables import launch_line, main_scores, next_commands


class Page(HTMLParser):
    """The tags, attributes and text of a page; checks that every opened tag is closed."""

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
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "sst2-distilbert-full"
    texts = fabricate_run(folder)
    return folder, texts


def test_headline_scores_and_paired_test(run):
    folder, _ = run
    path = write_report(folder, label_parts(LABELS))
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
    folder, _ = run
    lines = {
        name: {line["id"]: line for line in map(json.loads, (folder / f"eval/{name}/predictions.jsonl").open())}
        for name in ("base", "final")
    }
    right = {
        name: {i for i, line in side.items() if line["label"] == line["prediction"]} for name, side in lines.items()
    }
    common = lines["base"].keys() & lines["final"].keys()
    only_tuned, only_base = (len(common & (right[a] - right[b])) for a, b in (("final", "base"), ("base", "final")))
    page = read(write_report(folder, label_parts(LABELS)))
    assert f"is right on {only_tuned} of them, the base alone on {only_base};" in page.text


def test_one_file_with_nothing_to_fetch(run):
    folder, _ = run
    path = write_report(folder, label_parts(LABELS))
    page = read(path)
    assert not {"link", "img", "iframe", "object", "image"} & set(page.tags) and page.tags.count("script") == 1
    assert [value for name, value in page.attributes if name in ("src", "srcset")] == []
    links = [value for name, value in page.attributes if name == "href" and not value.startswith("#")]
    assert "eval/final/metrics.json" in links and all((folder / link).exists() for link in links)
    assert all(value.startswith("#") for name, value in page.attributes if name == "xlink:href")
    assert not re.search(r"url\((?!#)|@import", path.read_text())
    assert len(page.ids) == len(set(page.ids)), "ids of the figures differ"


def test_texts_are_escaped_and_sorted_by_confidence(run):
    folder, _ = run
    path = write_report(folder, label_parts(LABELS))
    page = read(path)
    assert NASTY in page.text and "<b>not bold" not in path.read_text()
    shown = [float(value) for value in re.findall(r"with probability (0\.\d+)", page.text)]
    shown = shown[: len(shown) // 2]  # right answers follow
    assert len(shown) == 10 and shown == sorted(shown, reverse=True)
    wrong = [
        math.exp(max(line["scores"]))
        for line in map(json.loads, (folder / "eval/final/predictions.jsonl").open())
        if line["label"] != line["prediction"]
    ]
    assert shown[0] == pytest.approx(max(wrong), abs=5e-5)


def test_curves_have_labelled_axes(run):
    folder, _ = run
    page = read(write_report(folder, label_parts(LABELS)))
    assert page.tags.count("svg") == 7  # scores, four curves, change by layer, reliability
    labels = ("optimizer step", "loss (mean cross-entropy, nats)", "learning rate", "gradient norm", "epoch")
    for label in labels:
        assert label in page.text
    assert "training step" in page.text and "validation split" in page.text


def test_data_parameters_and_run_facts(run):
    folder, _ = run
    page = read(write_report(folder, label_parts(LABELS)))
    for text in ("60,112", "6,334", "removed 31 train rows that are also in test", "66,955,010", "592,130"):
        assert text in page.text
    assert "base model this run" in page.text and "groups · adapter – 147,456" in page.text
    for text in ("NVIDIA H100 80GB HBM3", "12.3 s", "6.00 GiB", "469 per second", RUN["command"], "2.13.0"):
        assert text in page.text


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ({}, '"a text of yours"'),
        ({"text_column": "body"}, '"a text of yours"'),
        ({"text_column": "subject,body"}, "--file FILE --output predicted.csv"),
        ({"glue": "cola"}, '"a text of yours"'),
        ({"glue": "rte"}, "--file FILE --output predicted.csv"),
    ],
)
def test_the_command_that_predicts_suits_the_texts_of_the_model(flags, wanted):
    run = {
        "command": "train/classify.py --output-dir runs/a",
        "flags": {"output_dir": "runs/a", "method": "full", **flags},
    }
    assert dict(next_commands(run))["Predict"] == f"python eval/predict.py --model runs/a {wanted}"


def test_the_run_of_a_copied_script_is_evaluated_by_the_scripts_of_its_task():
    run = {"command": "my_qa.py --output-dir a", "task": "squad", "flags": {"output_dir": "a", "method": "lora"}}
    assert dict(next_commands(run))["Evaluate it on other items"].startswith("python eval/qa.py --model a/final")
    evaluation = {"command": "eval/sst2.py --output-dir a", "task": "sst2", "flags": {"output_dir": "a"}}
    assert list(dict(next_commands(evaluation))) == ["Compare it with another evaluation"]


def test_same_folder_same_bytes(run):
    folder, _ = run
    assert (
        write_report(folder, label_parts(LABELS)).read_bytes() == write_report(folder, label_parts(LABELS)).read_bytes()
    )
    assert [path.name for path in folder.glob(".*")] == []


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("eval/base", "This run has no base evaluation."),
        ("eval/final", "This run has no final evaluation yet."),
        ("eval/final/metrics.json", "eval/final holds no metrics.json, so it is no evaluation"),
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


def test_sentences_say_what_the_tables_show(tmp_path):
    folder = tmp_path / "run"
    fabricate_run(folder, num_base=872)
    lines = [json.loads(line) for line in (folder / "eval/base/predictions.jsonl").open()]
    write_evaluation(tmp_path / "other", [line | {"prediction": 1} for line in lines], setting="zero-shot prompt")
    for name in ("predictions.jsonl", "metrics.json"):
        (tmp_path / "other" / name).rename(folder / "eval/base" / name)
    (folder / "final").mkdir()
    write_json(folder / "final/task.json", {"best_step": 1800})
    page = read(write_report(folder, label_parts(LABELS)))
    text = page.text.replace("\u00a0", " ")
    assert "The base model answers positive to nearly everything: it gives that answer to 100.0 % of the items" in text
    assert re.search(
        r"Training raised accuracy by \d+\.\d points, from .*: more than chance explains \(p < 0.0001\)", text
    )
    assert "Training moved the attention weights by 1.23 % of their norm, the norm weights by 0.04 %." in text
    assert "The base model is not shown to be better than always answering" in text
    assert "By length" in text and re.search(r"tuned: (over|under)-confident.* ECE \d", text)
    assert "6 more scores" in text  # four rows, the rest folded
    rows = re.findall(r"\b([123]) (?:600|1,200|1,800|2,000) – ", text)
    assert rows == ["1", "2", "3"] and "All 10 evaluations" in text
    assert "python train/sst2.py" not in text and "accelerate launch --num_processes 2 train/sst2.py" in text


def test_answers_of_labels_in_words():
    labels = [0, 1, 2] * 20
    metrics = classification_metrics(labels, [0] * 60, ("a, b", "login", "other")) | {"setting": "classifier head"}
    first, second = [sentence.replace("\u00a0", " ") for sentence in words.answers_of_labels("base", metrics)]
    assert first == (
        'Base answers "a, b" to nearly everything: it gives that answer to 100.0 % of the items, and 33.3 % have it.'
    )
    assert second == (
        "Base is not shown to be better than giving every item the same answer, which would be right on 33.3 %."
    )
    (untrained,) = words.answers_of_labels("base", metrics | {"setting": "untrained head"})
    assert untrained == "Base has a new head that has not been trained: its answers are guesses, whatever they score."


def test_processes_on_a_cpu_are_launched_by_torchrun():
    assert launch_line(RUN).startswith("accelerate launch --num_processes 2 train/sst2.py")
    on_cpu = RUN | {"world": {"num_processes": 2, "device": "cpu"}}
    assert launch_line(on_cpu).startswith("torchrun --nproc_per_node 2 train/sst2.py")


def test_written_answers_have_no_probability_to_sort_by(tmp_path):
    lines = predictions(["a", "b", "c"], [0, 1, 1], 0.5, 3)
    written = [{name: value for name, value in line.items() if name != "scores"} for line in lines]
    for name, given, said in (("scored", lines, "the highest probability first."), ("written", written, "by id.")):
        write_evaluation(tmp_path / name, given)
        write_evaluation_report(tmp_path / name, label_parts(LABELS))
        text = read(tmp_path / name / "report.html").text
        num_wrong = sum(line["label"] != line["prediction"] for line in lines)
        assert f"Wrong: {num_wrong} of 3 items. Shown: {num_wrong}, {said}" in text
        assert ("most and least sure" in text) is (name == "scored")


def test_what_ended_the_training_is_what_may_help():
    history = History([], [{"step": 2, "eval_loss": 0.7}, {"step": 4, "eval_loss": 0.6}])
    assert words.history_sentences(history, 4) == [
        "Validation loss was still falling at the end: more epochs may help."
    ]
    assert "more steps than --max-steps 4 may help." in words.history_sentences(history, 4, 4)[0]
    assert "more epochs may help." in words.history_sentences(history, 4, 1000)[0]


def test_a_page_is_called_after_the_model_and_a_file_of_ones_own(tmp_path):
    for model, name in (("../minilm", "minilm"), ("runs/help/final", "help"), ("org/name", "org/name")):
        write_json(tmp_path / "run.json", {"flags": {"model": model, "method": "full"}})
        sources = {"train": {"sha256": "0", "path": "tickets.csv"}}
        write_json(tmp_path / "split.json", {"task": "classify", "sources": sources})
        page = read(write_report(tmp_path, label_parts(LABELS)))
        assert f"{name}, full fine-tuning on tickets.csv" in page.text and "zerotune · own labels" in page.text


def test_probabilities_far_below_the_share_of_right_answers_have_a_likely_cause():
    lines = {
        str(number): {"label": 0, "prediction": 0, "scores": [math.log(0.45), -1.0], "num_words": 10}
        for number in range(40)
    }
    one = Evaluation(None, {}, lines)
    assert "logits are still small: usually few steps" in calibration_section({"tuned": one})
    assert ">10 words<" in length_section({"tuned": one}, "accuracy")


def test_a_change_that_chance_explains_is_said_so():
    test = PairedAccuracy(100, 0.8, 0.81, 0.01, (-0.05, 0.07), 3, 4, 1.0)
    assert "no more than chance explains on 100 items" in words.training_sentence(test, "accuracy", "items")
    assert words.training_sentence(test, "accuracy", "items").startswith("Training raised accuracy by 1.0 points")


def test_an_unbalanced_task_shows_more_rows():
    balanced = classification_metrics([0, 1] * 10, [0, 1] * 10, LABELS)
    rare = classification_metrics([0] * 18 + [1, 1], [0] * 20, LABELS)
    assert main_scores(balanced) == ("accuracy", "f1", "accuracy_negative", "accuracy_positive")
    assert len(main_scores(rare)) == 7


def test_an_evaluation_has_a_page(tmp_path, capsys):
    fabricate_run(tmp_path / "run", num_base=20, num_items=40)
    folder = tmp_path / "run/eval/final"
    page = read(write_evaluation_report(folder, label_parts(LABELS)))
    assert "distilbert-base-uncased" in page.text and "Calibration" in page.text and "Right answers" in page.text
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    lines = [{"id": "a", "label": None, "prediction": 1, "prediction_name": "positive", "text": NASTY}]
    write_json_lines(folder / "predictions.jsonl", lines)
    write_json(folder / "metrics.json", {"task": "sst2", "setting": "classifier head", "count": 1})
    text = read(write_evaluation_report(folder, label_parts(LABELS))).text
    assert "1 items without labels: there are no scores." in text and NASTY in text and "positive · a" in text


def test_prompt_seeds_have_a_page(tmp_path):
    lines = predictions([f"test-{number}" for number in range(30)], [0, 1] * 15, 0.8, 1)
    for number in range(3):
        prompt = {"prompt": "Is {text} good?", "label_words": ["no", "yes"], "shot_ids": ["train-1"], "seed": number}
        write_evaluation(tmp_path / f"seed-{number}", lines[number:], model="org/m", **prompt)
    summarise_seeds(tmp_path, 3)
    page = read(write_evaluation_report(tmp_path, label_parts(LABELS)))
    assert "Over 3 prompts, accuracy is" in page.text and "Is {text} good? no, yes train-1" in page.text
    assert ("href", "seed-2/report.html") in page.attributes and (tmp_path / "seed-2/report.html").exists()


def test_one_prompt_shows_no_spread():
    said = words.seeds_sentence("accuracy", 0.5, None, 0.5, 0.5, 1).replace("\u00a0", " ")
    assert said == "Accuracy is 50.0 % with one prompt; others may differ much."
    said = words.seeds_sentence("accuracy", 0.5, 0.1, 0.4, 0.6, 3)
    assert "50.0 ± 10.0 %" in said and "the prompt alone moves it by 20.0 points" in said
