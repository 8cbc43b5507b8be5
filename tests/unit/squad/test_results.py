"""What is made of answers: groups of questions, files, the threshold's choice, and paired tests of F1."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from zerotune.errors import Refused
from zerotune.evaluation.result_files import write_question_results
from zerotune.metrics.statistics import paired_means
from zerotune.squad.evaluation import SpanSettings, choosing_values, span_settings
from zerotune.squad.metrics import score_answers
from zerotune.squad.questions import GoldAnswer, Paragraph, Question
from zerotune.squad.results import Answers, breakdown, context_length, question_word


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Who built the tower?", "who"),
        ("By whom was the tower built, and when?", "who"),
        ("In what year did it open?", "what"),
        ("How many steps has it?", "how many"),
        ("And how was it lit?", "how"),
        ("What's the name of the tower?", "what"),
        ("Name the tower.", "other"),
        ("The whole tower fell where?", "where"),
    ],
)
def test_question_words(text, word):
    assert question_word(text) == word


def test_context_lengths():
    stretches = [context_length("word " * number) for number in (1, 74, 75, 199, 200, 900)]
    assert stretches == ["0–74 words"] * 2 + ["75–99 words", "150–199 words"] + ["200 words or more"] * 2


def questions(*golds):
    short, long = Paragraph("A", 0, "Hook Head tower"), Paragraph("A", 1, "tower " * 90)
    return [
        Question(f"q{number}", "Who?" if number % 2 else "When?", (short, long)[number % 2], tuple(
            GoldAnswer(gold, 0) for gold in each
        ))
        for number, each in enumerate(golds)
    ]  # fmt: skip


def test_a_breakdown_counts_every_question_once():
    asked = questions(["Hook"], ["tower"], [], [])
    scores = score_answers(asked, {"q0": "Hook", "q1": "sea", "q2": "", "q3": "sea"})
    found = breakdown(asked, scores)
    assert {name: (each["total"], each["exact"]) for name, each in found["question_word"].items()} == {
        "when": (2, 100.0),
        "who": (2, 0.0),
    }
    assert list(found["context_length"]) == ["0–74 words", "75–99 words"]
    low, high = found["question_word"]["who"]["exact_ci95"]
    assert low == 0 and 50 < high < 100


def test_results_are_written_and_the_oracle_is_apart(tmp_path):
    asked = questions(["Hook"], ["tower"], [], [])
    answers = Answers(
        texts=["Hook", "", "", "sea"],
        before_threshold=["Hook", "tower", "Head", "sea"],
        null_odds=np.array([-2.0, 1.0, 2.0, -1.0]),
        details={"null_odds": [-2.0, 1.0, 2.0, -1.0]},
    )
    metrics = write_question_results(tmp_path, asked, answers)
    assert (metrics["exact"], metrics["best_exact"], metrics["best_exact_thresh"]) == (50.0, 75.0, -2.0)
    assert metrics["num_abstained"] == 2 and metrics["mean_answer_words"] == 1.0
    assert json.loads((tmp_path / "predictions.json").read_text()) == {"q0": "Hook", "q1": "", "q2": "", "q3": "sea"}
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "id": "q1", "label": ["tower"], "prediction": "", "exact": 0.0, "f1": 0.0, "null_odds": 1.0
    }  # fmt: skip
    blind = [Question(each.id, each.text, each.paragraph, None) for each in asked]
    metrics = write_question_results(tmp_path, blind, Answers([""] * 4))
    assert metrics == {"count": 4, "num_abstained": 4, "abstention_share": 1.0, "mean_answer_words": None}


class FakeData:
    """Best spans and odds given; the loss is 2."""

    def __init__(self, asked, texts):
        self.questions, self.ids, self._texts = asked, [each.id for each in asked], texts

    def null_odds(self, records):
        return np.array(records)

    def answers(self, records):
        return [[SimpleNamespace(text=text)] if text else [] for text in self._texts]

    def mean_loss(self, records):
        return 2.0


def test_the_threshold_is_the_best_for_the_metric_that_chooses():
    # q1's span is half right: F1 answers it, exact would rather not risk q2's empty one beside it
    asked = questions(["Hook"], ["tower tower Hook"], [], [])
    data, records = FakeData(asked, ["Hook", "tower", "Head", ""]), [-2.0, 0.5, 0.0, 3.0]
    by_f1 = choosing_values(data, records, "f1")
    assert by_f1 == {
        "eval_loss": 2.0, "eval_exact": 75.0, "eval_f1": 75.0, "eval_threshold": -1.0, "choose_by": 75.0
    }  # fmt: skip
    assert choosing_values(data, records, "loss")["choose_by"] == -2.0
    late = [-2.0, 0.5, 1.0, 3.0]
    by_f1, by_exact = (choosing_values(data, late, name) for name in ("f1", "exact"))
    assert by_f1["eval_threshold"] == 0.75 and by_f1["eval_f1"] == pytest.approx(100 * (3 + 0.5) / 4)
    assert by_exact["eval_threshold"] == -0.75 and by_exact["eval_exact"] == 75.0


def test_flags_win_over_the_folder_and_the_folder_over_defaults():
    config = SimpleNamespace(max_position_embeddings=256, model_type="llama")
    given = SimpleNamespace(max_length=None, doc_stride=0, max_answer_length=None, n_best=3)
    assert span_settings(given, config, {"max_length": 200, "max_answer_length": 9, "head": "span"}) == SpanSettings(
        max_length=200, doc_stride=0, max_answer_length=9, n_best=3
    )
    assert span_settings(given, config).max_length == 256
    given.max_length = 257
    with pytest.raises(Refused, match="--max-length 257 is more than the model's 256 positions"):
        span_settings(given, config)


def test_paired_means_by_hand():
    """Three items differ, by 1/2 each in one direction: of 8 sign patterns 2 are as extreme."""
    first, second = np.array([0.0, 0.5, 0.25, 1.0]), np.array([0.5, 1.0, 0.75, 1.0])
    found = paired_means(first, second)
    assert (found.first, found.second) == (0.4375, 0.8125) and found.difference == 0.375
    assert found.p_value == pytest.approx(0.25, abs=0.02)  # 10,000 draws: standard error 0.004
    low, high = found.difference_ci95
    assert 0 <= low < 0.375 < high <= 0.5
    assert paired_means(first, first).p_value == 1.0
