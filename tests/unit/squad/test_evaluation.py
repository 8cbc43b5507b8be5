"""A span head's evaluation: the threshold it chooses."""

from types import SimpleNamespace

import numpy as np
import pytest

from zerotune.squad.evaluation import choosing_values
from zerotune.squad.questions import GoldAnswer, Paragraph, Question


def make_questions(*golds):
    paragraph = Paragraph("A", 0, "Hook Head tower")
    return [
        Question(f"q{number}", "Who?", paragraph, tuple(GoldAnswer(gold, 0) for gold in each))
        for number, each in enumerate(golds)
    ]


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
    asked = make_questions(["Hook"], ["tower tower Hook"], [], [])
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
