"""Test pieces of the pages: cells, numbers, titles, and that all text is escaped."""

from zerotune.metrics.labels import classification_metrics
from zerotune.report.html import (
    confusion_table,
    example_list,
    flattened,
    interval_text,
    isolated,
    metric_title,
    p_value_text,
    percent,
    plain,
    score_cell,
    table,
)

NASTY = '<script>alert("1")</script> & <b>not bold</b>'


def test_scores_of_nothing_are_not_numbers():
    metrics = classification_metrics([0, 0, 0], [0, 0, 0], ("negative", "positive"))
    assert score_cell(metrics, "precision") == ("undefined", "0 of 0")
    assert score_cell(metrics, "accuracy")[0] == "100.0\u00a0%"
    assert score_cell({}, "accuracy") == "–"


def test_words_and_numbers():
    titles = {
        "f1": "F1", "f1_macro": "F1, macro", "accuracy_negative": "accuracy on negative", "HasAns_f1": "HasAns F1",
        "accuracy_login_macro": "accuracy on login_macro", "rougeL": "ROUGE-L", "precision_macro": "precision, macro",
    }  # fmt: skip
    assert {name: metric_title(name) for name in titles} == titles
    assert [plain(value) for value in (None, True, 9999, 66955010, 3e-05, 131072.4, [], [1, "a"])] == [
        "–", "yes", "9,999", "66,955,010", "3e-05", "131,072", "none", "1, a",
    ]  # fmt: skip
    texts = [p_value_text(0.04999), p_value_text(9e-5), interval_text((-0.012, 0.3), signed=True)]
    texts += [interval_text(bounds) for bounds in ((0.99961, 1.0), (0.0, 0.0004))]
    assert [text.replace("\u00a0", " ") for text in texts] == [
        "p = 0.049990", "p < 0.0001", "[−1.2, +30.0]", "[99.96, 100.00]", "[0.00, 0.04]",
    ]  # fmt: skip
    shares = [percent(value).replace("\u00a0", " ") for value in (1.0, 0.9996, 0.9994, 0.99996, 0.0, 0.0004)]
    assert shares == ["100.0 %", "99.96 %", "99.9 %", "99.996 %", "0.0 %", "0.04 %"]
    matthews = {"matthews": -0.0371, "matthews_ci95": [-0.173, 0.107]}
    assert metric_title("matthews") == "Matthews' correlation"
    assert score_cell(matthews, "matthews") == ("−0.037", "[−0.173,\u00a00.107]")
    rows = flattened({"a_b": {"c": 1, "d": [{"e": 2}]}, "f": {}})
    assert rows == [("a b · c", "1"), ("a b · d · 1 · e", "2"), ("f", "none")]


def test_only_right_to_left_words_are_isolated():
    texts = ["tower (1250)", "塔", "", "the מגדל, 1250"]
    assert [isolated(text) for text in texts] == [*texts[:3], f"\u2068{texts[3]}\u2069"]


def test_tables_escape_every_cell():
    html = table([NASTY], [[NASTY], [(NASTY, NASTY)]]) + confusion_table(NASTY, [[0, 0], [1, 3]], [NASTY, NASTY])
    html += example_list([(NASTY, NASTY), (NASTY, NASTY, NASTY)])
    assert "<script" not in html and "<b>" not in html
    assert "25.0%" in html and "0.0%" in html
