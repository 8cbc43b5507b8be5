"""A span head's evaluation: the threshold it chooses, and the settings of its windows."""

from types import SimpleNamespace

import numpy as np
import pytest

from zerotune.errors import Refused
from zerotune.squad.evaluation import SpanSettings, choosing_values, span_settings
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
