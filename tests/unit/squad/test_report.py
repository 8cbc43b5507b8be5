"""Test the page and tables of a run on questions, from fabricated evaluations."""

import re

import numpy as np
import pytest

from zerotune.files import write_json
from zerotune.report.run_report import print_run_table, write_report
from zerotune.squad.metrics import ANSWER_ALL, PredictedAnswers
from zerotune.squad.questions import GoldAnswer, Paragraph, Question
from zerotune.squad.report import print_scores, question_parts, score_line, write_question_results

PARAGRAPH = Paragraph("Towers", 0, "The tower at Hook Head <was> built of stone. " * 40)
GOLDS = [["stone"], ["Hook Head"], [], ["the tower"], []]
QUESTIONS = [
    Question(f"q{number}", f"Which & what, {number}?", PARAGRAPH, tuple(GoldAnswer(gold, 0) for gold in golds))
    for number, golds in enumerate(GOLDS)
]
ALWAYS, ODDS = ["stone", "head", "sea", "lamp", "kelp"], np.array([-3.0, -1.0, 2.0, -2.0, -0.5])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "squad"
    tuned = [text if odds <= 0.25 else "" for text, odds in zip(ALWAYS, ODDS, strict=True)]
    span = PredictedAnswers(tuned, ALWAYS, ODDS, {"null_odds": ODDS.tolist()})
    written = PredictedAnswers(["", "Hook sea", "sea"], measured={"eos_rate": 0.75})
    for name, questions, predicted in (("base", QUESTIONS[:3], written), ("final", QUESTIONS, span)):
        evaluated = folder / "eval" / name
        evaluated.mkdir(parents=True)
        metrics = {"task": "squad", "setting": "span head" if name == "final" else "zero-shot prompt"}
        if name == "final":
            metrics |= {"threshold": 0.25, "training_sha256": "5a"}
        write_json(evaluated / "metrics.json", metrics | write_question_results(evaluated, questions, predicted))
    return folder


def text_of(page):
    text = re.sub(r"<svg.*?</svg>|<style>.*?</style>|<[^>]+>", " ", page.read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


def test_the_page_shows_scores_breakdown_and_worst_errors(run):
    page = write_report(run, question_parts({question.id: question for question in QUESTIONS}))
    text = text_of(page)
    assert "Tuned F1, span head 53.3 %" in text and "Base F1, zero-shot prompt 16.7 %" in text
    assert "On the 3 questions that both scored, exact match went from 0.0 % to 66.7 %" in text
    assert "F1 went from" in text
    assert "Difference +72.2 points" in text
    # number of questions, then F1, for: base; tuned on the same three; tuned
    assert "questions 3 3 5" in text and re.search(r"F1 16\.7 % \S+ \S+ 88\.9 % \S+ \S+ 53\.3 %", text)
    assert "answers that the model ended 75.0 % – –" in text and "left unanswered 33.3 % – 20.0 %" in text
    assert "By question word and context length" in text and "200 words or more 5 40.0 %" in text
    assert "Answers that share no word with a gold answer: 2." in text
    wrong, right = text.split("Right answers")
    assert "left unanswered, gold: no answer · q2" in right
    first, second = re.findall(r"(?:answered “\w*”|left unanswered), gold: .*? · q\d", wrong)
    assert (first, second) == ("answered “lamp”, gold: the tower · q3", "answered “kelp”, gold: no answer · q4")
    assert "Which &amp; what, 3?" in page.read_text() and "<was>" not in page.read_text()


def test_where_every_question_is_answered_the_surest_answers_have_the_lowest_odds_of_none(tmp_path):
    evaluated = tmp_path / "eval" / "final"
    evaluated.mkdir(parents=True)
    odds = np.array([-0.5, -1.0, -2.0])
    predicted = PredictedAnswers(["kelp"] * 3, ["kelp"] * 3, odds, {"null_odds": odds.tolist()})
    metrics = {"task": "squad", "setting": "span head", "threshold": ANSWER_ALL, "training_sha256": "5a"}
    questions = [QUESTIONS[0], QUESTIONS[1], QUESTIONS[3]]
    write_json(evaluated / "metrics.json", metrics | write_question_results(evaluated, questions, predicted))
    text = text_of(write_report(tmp_path, question_parts({})))
    assert "those with the lowest odds of no answer first, where the model is most confident" in text
    assert re.findall(r"· (q\d)", text)[:3] == ["q3", "q1", "q0"]


def test_right_to_left_answers_do_not_reorder_what_is_around_them(tmp_path):
    evaluated = tmp_path / "eval" / "final"
    evaluated.mkdir(parents=True)
    golds = ("برج", "برج حجري")
    question = Question("42", "?", PARAGRAPH, tuple(GoldAnswer(gold, 0) for gold in golds))
    metrics = {"task": "squad", "setting": "span head"}
    metrics |= write_question_results(evaluated, [question], PredictedAnswers(["منارة"]))
    write_json(evaluated / "metrics.json", metrics)
    text = text_of(write_report(tmp_path, question_parts({})))
    answer, first, second = (f"\u2068{each}\u2069" for each in ("منارة", *golds))
    assert f"answered “{answer}”, gold: {first} | {second} · 42" in text


def test_an_error_without_its_question(run):
    """predictions.jsonl has the question but not its paragraph."""
    text = text_of(write_report(run, question_parts({})))
    assert "answered “lamp”, gold: the tower · q3 Which &amp; what, 3?" in text and "Hook Head &lt;was" not in text


def test_the_run_table(run, capsys):
    print_run_table(run, question_parts({}))
    header, base, tuned, paired, remark = capsys.readouterr().out.splitlines()
    assert header.split() == ["exact", "95", "%", "interval", "f1", "HasAns_f1", "NoAns_f1", "questions"]
    assert base.split()[-4:] == ["16.67", "25.00", "0.00", "3"] and base.startswith("base, zero-shot prompt ")
    assert tuned.split()[:2] == ["tuned", "40.00"] and tuned.split()[-4:] == ["53.33", "55.56", "50.00", "5"]
    assert paired.startswith("on the 3 common questions: exact +66.67 [") and "; f1 +72.22, p = " in paired
    assert remark == (
        "1 of 5 questions are left unanswered (threshold 0.250, chosen on the validation split); answering no "
        "question would score 40.00 in exact and F1. The best threshold for these same questions, an oracle and not a "
        "result, would reach exact 60.00 and F1 73.33."
    )


def test_the_table_of_one_evaluation(tmp_path, capsys):
    metrics = write_question_results(tmp_path, QUESTIONS, PredictedAnswers(["stone", "head", "", "tower", "sea"]))
    print_scores(metrics)
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines[1:]}
    assert (rows["f1"][1], rows["f1"][-1]) == ("73.3333", "5") and rows["HasAns_f1"][-1] == rows["rouge1"][-1] == "3"
    assert rows["NoAns_exact"][1] == "50.0000" and rows["NoAns_exact"][-1] == "2"
    assert lines[-1] == (
        "1 of 5 questions are left unanswered; answering no question would score 40.00 in exact and F1."
    )
    assert re.fullmatch(r"exact 60\.00 \[.*\], f1 73\.33 \[.*\] on 5 questions", score_line(metrics))
    assert score_line({"count": 4}) == "4 predictions (the questions have no gold answers)"
