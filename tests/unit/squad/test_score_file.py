"""Test reading prediction files: their contents, and one line for each way a file can be wrong."""

import json

import pytest

from zerotune.errors import Refused
from zerotune.squad.questions import Paragraph, Question
from zerotune.squad.score_file import read_predictions, require_predictions


def written(folder, value, name):
    path = folder / name
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"nothing", "not JSON"),
        ([], "no predictions|not a prediction file"),
        ({}, "no predictions"),
        (["q1"], "not a prediction file"),
        ({"q1": None}, "the prediction of 'q1' is not a string"),
        ({"q1": {"text": "monks"}}, "the prediction of 'q1' is not a string"),
        (b'{"q1": "a", "q1": "b"}', "the id 'q1' occurs twice"),
        (b'{"q1": "\\ud800"}', "half of a surrogate pair"),
        (b'{"\\ud800": "a"}', "half of a surrogate pair"),
    ],
)
def test_malformed_prediction_files_are_refused(tmp_path, value, message):
    with pytest.raises(Refused, match=message):
        read_predictions(written(tmp_path, value, "predictions.json"))


def test_predictions_are_wanted_for_every_question(tmp_path):
    paragraph = Paragraph("T", 0, "by monks")
    questions = [Question(f"q{number}", "Who?", paragraph, ()) for number in (1, 2, 3)]
    predictions, _ = read_predictions(written(tmp_path, {"q1": "monks", "q3": "", "old": "x"}, "predictions.json"))
    with pytest.raises(Refused, match=r"predictions\.json: no prediction for 1 of 3 questions, 'q2' first"):
        require_predictions(predictions, questions, "predictions.json")
    assert require_predictions(predictions | {"q2": ""}, questions, "predictions.json") == 1
