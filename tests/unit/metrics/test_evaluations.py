"""Test reading evaluations back: scores and settings, paired tests on common items, and the spread over seeds."""

from pathlib import Path

import pytest

from zerotune.errors import Refused
from zerotune.metrics.evaluations import (
    Evaluation,
    as_proportions,
    common_ids,
    evaluation_settings,
    paired_accuracy,
    paired_f1,
    score_names,
    seed_spreads,
)

SQUAD = {
    "task": "squad", "model": "some/model", "seed": 3, "shots": 0, "threshold": 0.5, "count": 2, "exact": 50.0,
    "exact_ci95": [20, 80], "total": 2, "best_exact": 70.0, "uncalibrated_exact": 1.0,
    "uncalibrated_exact_ci95": [0, 2],
    "num_abstained": 1, "mean_answer_words": 1.5, "eos_rate": 1.0, "confusion": [[1]], "training_sha256": "5a",
}  # fmt: skip


def evaluation(lines, name="a", **metrics):
    return Evaluation(Path(name), metrics, {line["id"]: line for line in lines})


def answers(*columns):
    """Return lines of predictions.jsonl for answers with these (exact, f1)."""
    return [
        {"id": f"q{number}", "label": ["gold"], "prediction": "x", "exact": exact, "f1": f1}
        for number, (exact, f1) in enumerate(columns)
    ]


def test_scores_have_an_interval_and_settings_were_not_measured():
    assert score_names(SQUAD) == ["exact"]
    assert evaluation_settings(SQUAD) == {
        "task": "squad", "model": "some/model", "shots": 0, "training_sha256": "5a"
    }  # fmt: skip
    assert as_proportions(SQUAD) == SQUAD | {"exact": 0.5, "exact_ci95": [0.2, 0.8]}
    assert as_proportions({"task": "sst2", "accuracy": 0.5, "accuracy_ci95": [0, 1]})["accuracy"] == 0.5


def test_an_answer_is_right_where_it_is_exact_and_f1_is_its_own():
    first = evaluation(answers((1.0, 1.0), (0.0, 0.5), (0.0, 0.0)))
    second = evaluation(list(reversed(answers((1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.5)))), "b")
    accuracy, f1 = paired_accuracy(first, second), paired_f1(first, second)
    assert (accuracy.num_common, accuracy.only_first, accuracy.only_second) == (3, 0, 2)
    assert accuracy.p_value == 0.5  # two items differ, both favour the second: 2 × (1/2)²
    assert accuracy.accuracy_first == pytest.approx(1 / 3) and accuracy.difference == pytest.approx(2 / 3)
    assert (f1.first, f1.second, f1.difference) == (0.5, 1.0, 0.5)


def test_a_label_is_right_where_it_is_predicted():
    lines = [{"id": f"i{number}", "label": number % 2, "prediction": 1} for number in range(4)]
    unread = [line | {"prediction": None} for line in lines]
    pair = paired_accuracy(evaluation(lines), evaluation(unread, "b"))
    assert (pair.accuracy_first, pair.accuracy_second, pair.only_first, pair.only_second) == (0.5, 0.0, 2, 0)
    assert paired_f1(evaluation(lines), evaluation(unread, "b")) is None


def test_two_models_may_number_the_same_labels_differently():
    first = [{"id": "i", "label": 0, "label_name": "returns", "prediction": 0}]
    second = [{"id": "i", "label": 1, "label_name": "returns", "prediction": 0}]
    pair = paired_accuracy(evaluation(first), evaluation(second, "b"))
    assert (pair.accuracy_first, pair.accuracy_second) == (1.0, 0.0)
    with pytest.raises(Refused, match="label i as 'returns' and 'billing'"):
        common_ids(evaluation(first), evaluation([second[0] | {"label_name": "billing"}], "b"))


def test_items_of_other_data_are_not_compared():
    lines = answers((1.0, 1.0))
    with pytest.raises(Refused, match="a and b are of different data"):
        common_ids(evaluation(lines, data_sha256="x"), evaluation(lines, "b", data_sha256="y"))
    assert common_ids(evaluation(lines, data_sha256="x"), evaluation(lines, "b")) == ["q0"]


def test_questions_are_the_same_in_another_copy_of_their_file():
    """Their ids come from the data, so that a packed copy or the hub's rows have the same."""
    lines = [line | {"question": "Who?"} for line in answers((1.0, 1.0), (0.0, 0.0))]
    first = evaluation(lines, data_sha256="x")
    assert common_ids(first, evaluation(lines[1:], "b", data_sha256="y")) == ["q1"]
    for changed, said in (({"question": "When?"}, "ask q0 as 'Who\\?' and 'When\\?'"), ({"label": []}, "label q0 as")):
        with pytest.raises(Refused, match=f"one id means one item, but a and b {said}"):
            common_ids(first, evaluation([lines[0] | changed], "b", data_sha256="y"))


def test_a_spread_is_over_seeds_of_the_same_settings_and_items():
    lines = answers((1.0, 1.0))
    runs = [
        evaluation(lines, f"seed-{seed}", **SQUAD | {"seed": seed, "exact": exact})
        for seed, exact in ((0, 40.0), (1, 60.0))
    ]
    others = [
        evaluation(lines, "c", **SQUAD | {"seed": 2, "shots": 4}),
        evaluation(answers(*[(1, 1)] * 2), "d", **SQUAD),
    ]
    (spread,) = seed_spreads([*runs, *others])
    assert (spread["seeds"], spread["metrics"]) == ([0, 1], ["exact"])
    # mean 0.5; deviations of 0.1: variance 0.02 / 1
    assert spread["exact"] == {
        "mean": 0.5, "sd": pytest.approx(0.02**0.5), "low": 0.4, "high": 0.6, "values": [0.4, 0.6]
    }  # fmt: skip
