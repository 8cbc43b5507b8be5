"""The files that an evaluation on questions writes."""

import json

import numpy as np
from span_cases import make_questions

from zerotune.squad.metrics import PredictedAnswers
from zerotune.squad.questions import Question
from zerotune.squad.report import write_question_results


def test_results_are_written_and_the_oracle_is_apart(tmp_path):
    asked = make_questions(["Hook"], ["tower"], [], [])
    answers = PredictedAnswers(
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
        "id": "q1", "question": asked[1].text, "label": ["tower"], "prediction": "", "exact": 0.0, "f1": 0.0,
        "null_odds": 1.0,
    }  # fmt: skip
    blind = [Question(each.id, each.text, each.paragraph, None) for each in asked]
    metrics = write_question_results(tmp_path, blind, PredictedAnswers([""] * 4))
    assert metrics == {"count": 4, "num_abstained": 4, "abstention_share": 1.0, "mean_answer_words": None}
