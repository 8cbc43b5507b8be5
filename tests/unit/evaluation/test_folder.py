"""An evaluation's folder: written once, resumed, never mixed with another evaluation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from zerotune.errors import Preempted, Refused
from zerotune.evaluation import folder as evaluation_folder
from zerotune.evaluation.folder import Items, check_earlier, evaluate_into
from zerotune.evaluation.scoring import PreparedModel
from zerotune.files import read_json, write_json_lines

ITEMS = Items("sst2", ["a-0\tgood\t1", "a-1\tdull\t0", "a-2\tfine\t1"], {"prompt": "{text}:"})
NEVER = SimpleNamespace(raise_when_noted=lambda accelerator: None)
ALONE = SimpleNamespace(
    num_processes=1, process_index=0, device=torch.device("cpu"), deepspeed_plugin=None, wait_for_everyone=int
)


@pytest.fixture(autouse=True)
def model_of_one_file(monkeypatch):
    monkeypatch.setattr(evaluation_folder, "model_identity", lambda name, revision: f"{name}@{revision}")


def settings(**changes):
    return {
        "model": "m", "revision": None, "tokens_per_device": 64, "shots": 0, "seed": 0, "dtype": "fp32"
    } | changes  # fmt: skip


class Evaluation:
    """Scores items one by one: item n gives n + 0.5. Counts loads and scored items."""

    def __init__(self, folder, numbers=None):
        self.folder, self.loads, self.scored = folder, 0, []
        self.numbers = [0.5, 1.5, 2.5] if numbers is None else numbers

    def run(self, described=None, items=ITEMS, stop_signal=NEVER, replace=False):
        described = described or settings()
        return evaluate_into(self.folder, described, items, self.prepare, self.write, ALONE, stop_signal, replace)

    def prepare(self):
        self.loads += 1
        batches = [np.array([2]), np.array([0]), np.array([1])]
        return PreparedModel(self.score, np.array([1, 1, 1]), batches, {"setting": "test", "seed": 8}, self.read)

    def score(self, items):
        self.scored += items.tolist()
        return [{"number": self.numbers[item]} for item in items]

    def read(self, records):
        return [record["number"] for record in records]

    def write(self, answers):
        write_json_lines(self.folder / "predictions.jsonl", [{"prediction": answer} for answer in answers])
        return {"count": len(answers), "sum": sum(answers)}


def test_metrics_say_task_settings_model_and_scores_in_this_order(tmp_path):
    metrics = Evaluation(tmp_path / "out").run()
    assert list(metrics.items()) == [
        ("task", "sst2"), ("model", "m"), ("revision", None), ("tokens_per_device", 64), ("shots", 0), ("seed", 8),
        ("dtype", "fp32"), ("setting", "test"), ("count", 3), ("sum", 4.5),
    ]  # fmt: skip
    assert read_json(tmp_path / "out" / "metrics.json") == metrics
    assert not (tmp_path / "out" / ".partial").exists()


def test_the_same_evaluation_is_done_once_at_any_budget(tmp_path):
    one = Evaluation(tmp_path)
    first = one.run()
    assert one.run(settings(tokens_per_device=8)) == first
    assert (one.loads, one.scored) == (1, [2, 0, 1])
    check_earlier(tmp_path, settings(), ITEMS)


@pytest.mark.parametrize(
    ("change", "items", "named"),
    [
        ({"seed": 1, "dtype": "bf16"}, ITEMS, "seed, dtype"),
        ({"model": "n"}, ITEMS, "model, model files"),
        ({}, Items("imdb", ITEMS.lines, ITEMS.more), "task"),
        ({}, Items("sst2", ITEMS.lines[:2], ITEMS.more), "items"),
        ({}, Items("sst2", ITEMS.lines, {"prompt": "{text}?"}), "prompt"),
        ({}, Items("sst2", ITEMS.lines, ITEMS.more | {"shots": [["b", "dull", 0]]}), "shots"),
    ],
)
def test_another_evaluation_is_refused_by_name_or_replaces(tmp_path, change, items, named):
    evaluation = Evaluation(tmp_path)
    before = evaluation.run()
    words = f"holds an evaluation that differs in {named}: choose another --output-dir"
    for refused in (
        lambda: evaluation.run(settings(**change), items),
        lambda: check_earlier(tmp_path, settings(**change), items),
    ):
        with pytest.raises(Refused, match=words):
            refused()
    assert evaluation.loads == 1 and read_json(tmp_path / "metrics.json") == before
    evaluation.numbers = [1.0, 2.0, 3.0]
    if len(items.lines) == 3:
        assert evaluation.run(settings(**change), items, replace=True)["sum"] == 6.0
        check_earlier(tmp_path, settings(**change), items)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metrics.json", "{", "metrics.json is damaged .*: delete the file and"),
        ("predictions.jsonl", '{"prediction": 1.5}\n', "predictions.jsonl is damaged .*: delete the file and"),
        (".fingerprint.json", '{"sha256": 7}', r".fingerprint.json is damaged \(sha256 is 7, wanted a valid string\)"),
    ],
)
def test_damaged_results_are_refused_and_made_again_once_deleted(tmp_path, name, content, words):
    first = Evaluation(tmp_path).run()
    (tmp_path / name).write_text(content)
    with pytest.raises(Refused, match=words):
        Evaluation(tmp_path).run()
    (tmp_path / name).unlink()
    assert Evaluation(tmp_path).run() == first


def test_an_interrupted_evaluation_resumes(tmp_path):
    def stop(accelerator):
        raise Preempted("asked to stop")

    interrupted, resumed = Evaluation(tmp_path), Evaluation(tmp_path)
    with pytest.raises(Preempted):
        interrupted.run(stop_signal=SimpleNamespace(raise_when_noted=stop))
    assert interrupted.scored == [2] and not (tmp_path / "metrics.json").exists()
    resumed.run()
    assert resumed.scored == [0, 1] and read_json(tmp_path / "metrics.json")["sum"] == 4.5


def test_another_budget_makes_other_batches_and_starts_again(tmp_path):
    def stop(accelerator):
        raise Preempted("asked to stop")

    with pytest.raises(Preempted):
        Evaluation(tmp_path).run(stop_signal=SimpleNamespace(raise_when_noted=stop))
    again = Evaluation(tmp_path)
    again.run(settings(tokens_per_device=8))
    assert again.scored == [2, 0, 1]


def test_numbers_that_are_not_finite_are_refused_and_forgotten(tmp_path):
    folder = tmp_path / "runs" / "out"
    with pytest.raises(Refused, match=r"m gives scores that are not finite, first for a-1: .* --precision fp32"):
        Evaluation(folder, [0.5, float("nan"), 2.5]).run()
    assert not folder.parent.exists()  # a run with another precision may use the folder next
    assert Evaluation(folder).run()["sum"] == 4.5


def test_ranks_with_different_models_or_items(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_folder, "on_all_ranks", lambda accelerator, value: [value, "another"])
    with pytest.raises(Refused, match="the ranks have different items or models"):
        Evaluation(tmp_path / "out").run()
