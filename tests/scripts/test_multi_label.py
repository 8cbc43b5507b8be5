"""train/classify.py and eval/classify.py with --multi-label: a run at 1 and 2 processes, evaluated, and refusals."""

import json

import pytest
from launching import FEW_TOKENS

from zerotune.tasks.sample import sample_ticket_queues


@pytest.fixture(scope="module")
def tickets(workplace):
    """Write one file of messages that belong to one or two queues, and some that belong to none."""
    path = workplace.folder / "tickets.jsonl"
    rows = [{"text": text, "queues": queues} for text, queues in sample_ticket_queues(200, 3)]
    rows += [{"text": f"Thank you, number {number}.", "queues": []} for number in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags_of(workplace, tickets, name, *more):
    return [
        *("--multi-label", "--model", workplace.model, "--train-file", tickets, "--label-column", "queues"),
        *("--method", "lora", "--max-steps", 6, "--batch-size", 16, "--log-every", 1, "--learning-rate", 1e-3),
        *("--tokens-per-device", FEW_TOKENS, "--precision", "fp32", "--output-dir", workplace.folder / name, *more),
    ]


def start(workplace, script, name, flags, world=1, expect=0):
    ended = workplace.server.start(script, flags, workplace.folder / name, world=world).wait()
    assert set(ended.codes) == {expect}, ended.text()
    return ended


@pytest.fixture(scope="module")
def run(workplace, tickets):
    return start(workplace, "train/classify.py", "sets", flags_of(workplace, tickets, "sets"))


def evaluate(workplace, name, *flags, expect=0):
    more = ["--precision", "fp32", "--output-dir", workplace.folder / name, *flags]
    return start(workplace, "eval/classify.py", name, more, expect=expect)


def test_a_run_learns_and_is_evaluated(run):
    assert run.read_json("state.json")["state"] == "finished"
    steps = losses_of(run)
    # an untrained head has ln 2 for each of the four labels; the loss is summed over them
    assert steps[0] == pytest.approx(4 * 0.693, rel=0.25) and steps[-1] < steps[0]
    assert set(run.evaluations()[-1]) >= {"eval_loss", "eval_exact_match", "eval_f1_micro", "eval_f1_macro"}
    task, metrics = run.read_json("final/task.json"), run.read_json("eval/final/metrics.json")
    assert (task["choose_by"], task["thresholds"]) == ("f1_micro", {"probability": 0.5})
    assert metrics["count"] == run.read_json("split.json")["splits"]["test"]["count"] and "f1_label_returns" in metrics
    assert "base: not evaluated" in run.text() and (run.folder / "report.html").exists()


def losses_of(run):
    return [line["loss"] for line in run.read_lines("metrics.jsonl") if "loss" in line]


def test_two_processes_take_the_same_steps(workplace, tickets, run):
    both = start(workplace, "train/classify.py", "sets-two", flags_of(workplace, tickets, "sets-two"), world=2)
    assert losses_of(both) == pytest.approx(losses_of(run), rel=1e-4)  # up to rounding


def test_class_weights_and_label_smoothing_change_the_loss(workplace, tickets, run):
    """An untrained head gives probabilities near 1/2: there smoothing changes nothing, and a weight of about 3.4 (160
    rows without a label / 47 with it) raises the loss by about half."""
    more = ["--class-weights", "balanced", "--label-smoothing", 0.1, "--max-steps", 1]
    flags = flags_of(workplace, tickets, "sets-weighted", *more)
    weighted = start(workplace, "train/classify.py", "sets-weighted", flags)
    assert 1.2 < losses_of(weighted)[0] / losses_of(run)[0] < 2
    assert "train: class weights account " in weighted.text()


def test_final_is_evaluated_as_in_its_run_and_predicts_texts_without_labels(workplace, run):
    final = run.folder / "final"
    again = evaluate(workplace, "sets-again", "--model", final, "--tokens-per-device", FEW_TOKENS)
    assert (again.folder / "predictions.jsonl").read_text() == (run.folder / "eval/final/predictions.jsonl").read_text()
    path = workplace.folder / "new.csv"
    path.write_text("text\nThe invoice is wrong.\nWhere is my parcel?\n")
    new = evaluate(workplace, "sets-new", "--model", final, "--test-file", path)
    lines = new.read_lines("predictions.jsonl")
    assert [line["label"] for line in lines] == [None, None] and all(len(line["scores"]) == 4 for line in lines)
    assert "2 predictions (the items have no labels)" in new.text()


def test_generation_and_prompts_are_refused_before_anything_is_written(workplace, tickets):
    flags = flags_of(workplace, tickets, "refused", "--head", "generate")
    ended = start(workplace, "train/classify.py", "refused", flags, expect=2)
    assert ended.refusal().startswith("--head generate writes one label") and not ended.folder.exists()
    flags = ["--multi-label", "--model", workplace.model, "--test-file", tickets, "--label-column", "queues"]
    ended = evaluate(workplace, "refused", *flags, "--shots", 2, expect=2)
    assert "--multi-label needs a classifier head" in ended.refusal() and not ended.folder.exists()
