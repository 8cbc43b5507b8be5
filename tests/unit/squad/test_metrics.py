"""Test SQuAD's scores against golden values worked out by hand, and against a slow scorer written differently."""

import re
import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zerotune.squad.metrics import (
    ANSWER_ALL,
    PredictedAnswers,
    best_threshold,
    breakdown,
    choose_threshold,
    context_length,
    normalise_answer,
    official_scores,
    oracle_scores,
    question_metrics,
    question_word,
    score_answers,
    score_intervals,
    squad_metrics,
)
from zerotune.squad.questions import GoldAnswer, Paragraph, Question

PARAGRAPH = Paragraph("Towers", 0, "context")


def question(number, *golds):
    return Question(f"q{number}", "Who?", PARAGRAPH, tuple(GoldAnswer(gold, 0) for gold in golds))


def scored(golds, predicted):
    questions = [question(number, *each) for number, each in enumerate(golds)]
    predictions = {f"q{number}": text for number, text in enumerate(predicted)}
    return questions, predictions, score_answers(questions, predictions)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Tower!", "tower"),
        ("A.D. 1240", "ad 1240"),
        ("an-other", "another"),  # punctuation goes first, so "an" is no longer a separate word
        ("theatre of the absurd", "theatre of absurd"),
        ("a–b the", "–b"),  # the dash is not ASCII punctuation, but it ends a word
        ("the", ""),
        ("«Un»", "«un»"),
        ("İ", "i̇"),
        ("x\u00a0y\u2003z", "x y z"),
        ("a_b", "ab"),
    ],
)
def test_normalised_answers(text, normalised):
    assert normalise_answer(text) == normalised


@pytest.mark.parametrize(
    ("golds", "predicted", "exact", "f1"),
    [
        (["the Tower"], "tower.", 1, 1),
        (["Hook Head tower"], "tower", 0, 0.5),  # precision 1, recall 1/3
        (["tower tower", "x"], "tower", 0, 2 / 3),  # each occurrence on both sides counts
        (["tower Hook"], "Hook tower", 0, 1),
        (["monks", "by monks of Bec"], "by monks", 0, 2 / 3),
        (["monks"], "", 0, 0),
        ([], "", 1, 1),
        ([], "the", 1, 1),
        ([], "monks", 0, 0),
        (["the", "monks"], "", 0, 0),  # a gold answer that normalises to nothing does not count
        (["the"], "", 1, 1),  # unless it is the only one: then the answer is ""
        (["the"], "monks", 0, 0),
    ],
)
def test_scores_of_one_question(golds, predicted, exact, f1):
    _, _, scores = scored([golds], [predicted])
    assert scores.exact[0] == exact
    assert scores.f1[0] == pytest.approx(f1, rel=1e-15)
    assert scores.has_answer[0] == bool(golds)


def test_the_object_of_the_official_scorer():
    _, _, scores = scored([["a b c"], ["d"], [], []], ["b", "d", "", "x"])
    assert official_scores(scores) == {
        "exact": 50.0,
        "f1": pytest.approx(100 * (2 / 3 + 2) / 4),  # "a b c" is "b c" after its article
        "total": 4,
        "HasAns_exact": 50.0,
        "HasAns_f1": pytest.approx(100 * (2 / 3 + 1) / 2),
        "HasAns_total": 2,
        "NoAns_exact": 50.0,
        "NoAns_f1": 50.0,
        "NoAns_total": 2,
    }
    _, _, answerable = scored([["a b c"]], ["b"])
    assert set(official_scores(answerable)) == {
        "exact", "f1", "total", "HasAns_exact", "HasAns_f1", "HasAns_total"
    }  # fmt: skip


# --- a scorer written the slow way: loops over words, no dictionaries of counts, no arrays ---


def slow_words(text):
    kept = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return [word for word in re.split(r"\s+", re.sub(r"\b(a|an|the)\b", " ", kept)) if word]


def slow_f1(gold, predicted):
    if not gold or not predicted:
        return int(gold == predicted)
    left, same = list(gold), 0
    for word in predicted:
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0
    precision = 1.0 * same / len(predicted)
    recall = 1.0 * same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def slow_scores(golds, predicted):
    rows = []
    for texts, text in zip(golds, predicted, strict=True):
        counted = [slow_words(gold) for gold in texts if slow_words(gold)] or [[]]
        guess = slow_words(text)
        rows.append((max(int(gold == guess) for gold in counted), max(slow_f1(gold, guess) for gold in counted)))
    found = {}
    for prefix, chosen in (
        ("", range(len(rows))),
        ("HasAns_", [row for row in range(len(rows)) if golds[row]]),
        ("NoAns_", [row for row in range(len(rows)) if not golds[row]]),
    ):
        if len(chosen):
            found[f"{prefix}exact"] = 100.0 * sum(rows[row][0] for row in chosen) / len(chosen)
            found[f"{prefix}f1"] = 100.0 * sum(rows[row][1] for row in chosen) / len(chosen)
            found[f"{prefix}total"] = len(chosen)
    return found


texts = st.lists(
    st.sampled_from(["the", "an", "A", "tower", "Tower", "hook,", "of", "l'an", "–", "«x»", "\u00a0", ".", "-"]),
    max_size=6,
).map(" ".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.lists(texts.filter(bool), max_size=3), texts), min_size=1, max_size=12))
def test_scores_are_those_of_the_slow_scorer_to_the_last_digit(rows):
    golds, predicted = [list(each[0]) for each in rows], [each[1] for each in rows]
    assert official_scores(scored(golds, predicted)[2]) == slow_scores(golds, predicted)


def test_a_missing_prediction_is_an_error():
    with pytest.raises(KeyError):
        score_answers([question(0, "x")], {})


def test_intervals_hold_their_scores():
    golds = [["a b c"], ["d e"], ["f"], [], []] * 40
    _, _, scores = scored(golds, ["b", "d", "f", "", "x"] * 40)
    official, intervals = official_scores(scores), score_intervals(scores)
    names = ("exact", "f1", "HasAns_exact", "HasAns_f1", "NoAns_exact", "NoAns_f1")
    assert set(intervals) == {f"{name}_ci95" for name in names}
    for name in names:
        low, high = intervals[f"{name}_ci95"]
        assert 0 <= low < official[name] < high <= 100, name
    # A mean of scores in 0-1 varies most if they are all 0 or 1, so F1's interval must be narrower than exact's.
    widths = {name: np.ptp(intervals[f"{name}_ci95"]) for name in ("HasAns_exact", "HasAns_f1")}
    assert widths["HasAns_f1"] < widths["HasAns_exact"]
    assert squad_metrics(scores) == official | intervals


def test_overlap_is_of_the_questions_with_an_answer_and_their_distinct_golds():
    questions = [question(0, "kelp and eels", "kelp and eels", "Kelp"), question(1)]
    metrics, scores = question_metrics(questions, PredictedAnswers(["kelp", "nobody"]))
    assert metrics["rouge1"] == pytest.approx(100) and scores.has_answer.tolist() == [True, False]
    assert not {"bleu", "rouge1"} & question_metrics(questions[1:], PredictedAnswers([""]))[0].keys()


# --- thresholds ---


def thresholded(values, has_answer, null_scores, threshold):
    """Score on 0-100 when null scores above the threshold abstain: the mean of both kinds' means."""
    reached = np.where(null_scores > threshold, ~has_answer, values)
    return 100 * np.mean([reached[kind].mean() for kind in (has_answer, ~has_answer) if kind.any()])


arrays = st.integers(1, 12).flatmap(
    lambda size: st.tuples(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
        st.lists(st.booleans(), min_size=size, max_size=size),
        st.lists(st.integers(-4, 4), min_size=size, max_size=size),
    )
)


@settings(max_examples=300, deadline=None)
@given(arrays)
def test_the_chosen_threshold_is_the_best_there_is(drawn):
    values, has_answer, predicts, null_scores = (np.array(each) for each in drawn)
    null_scores = null_scores.astype(float)
    values = np.where(has_answer, np.where(predicts, values, 0.0), np.where(predicts, 0.0, 1.0))
    score, threshold = choose_threshold(values, has_answer, predicts, null_scores, True)
    assert score == pytest.approx(thresholded(values, has_answer, null_scores, threshold))
    every = [thresholded(values, has_answer, null_scores, each) for each in np.arange(-5.5, 5.5)]
    assert score == pytest.approx(max(every))
    if has_answer.sum() * 2 == len(has_answer):
        assert best_threshold(values, has_answer, predicts, null_scores)[0] >= score - 1e-9


def test_the_share_of_unanswerable_questions_moves_no_threshold():
    """One or three answerable questions for each unanswerable one give the same threshold."""
    values, has_answer = np.array([1.0, 1.0, 0.0, 0.0]), np.array([True, True, False, False])
    null_scores, predicts = np.array([0.0, 2.0, 1.0, 3.0]), np.ones(4, bool)
    found = {
        choose_threshold(*(np.repeat(each, np.where(has_answer, times, 1)) for each in arguments), True)
        for times in (1, 3)
        for arguments in [(values, has_answer, predicts, null_scores)]
    }
    assert len(found) == 1


def test_the_threshold_of_drawn_questions_follows_their_share():
    """Nine questions of ten have an answer, all below the unanswerable one but for one: answering all is best."""
    has_answer = np.array([True] * 9 + [False])
    values, predicts = has_answer.astype(float), np.ones(10, bool)
    null_scores = np.array([0.0] * 7 + [2.0] * 2 + [1.0])
    _, equal = choose_threshold(values, has_answer, predicts, null_scores, kinds_weigh_same=True)
    best, own = choose_threshold(values, has_answer, predicts, null_scores, kinds_weigh_same=False)
    assert equal == 0.5 and own == 2.0 and best == 90.0


def test_the_chosen_threshold_is_halfway_to_the_next_question():
    both = np.array([True, True])
    assert choose_threshold(np.array([1.0, 0.0]), np.array([True, False]), both, np.array([0.0, 3.0]), True) == (
        100.0,
        1.5,
    )
    assert choose_threshold(np.array([0.0, 0.0]), np.array([True, False]), both, np.array([3.0, 2.0]), True) == (
        50.0,
        1.0,
    )


def test_of_equal_scores_the_threshold_that_answers_most_is_chosen():
    both, wrong = np.array([True, True]), np.array([0.0, 0.0])
    assert choose_threshold(wrong, np.array([True, False]), both, np.array([2.0, 3.0]), True) == (50.0, 2.5)


@pytest.mark.parametrize("values", [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.5, 0.0]])
def test_where_every_question_has_an_answer_all_are_answered(values):
    """In SQuAD 1.1, new questions are answered too, however high their null scores."""
    every = np.ones(3, bool)
    score, threshold = choose_threshold(np.array(values), every, every, np.array([-1.0, 0.0, 2.0]), True)
    assert score == pytest.approx(100 * np.mean(values)) and threshold == ANSWER_ALL


def test_the_oracle_walks_ties_one_by_one():
    """The official search goes question by question in the order of the null scores, even among equal ones."""
    values, has_answer = np.array([1.0, 0.0]), np.array([True, False])
    predicts, null_scores = np.array([True, True]), np.array([0.5, 0.5])
    assert best_threshold(values, has_answer, predicts, null_scores) == (100.0, 0.5)
    assert choose_threshold(values, has_answer, predicts, null_scores, True)[0] == 50.0


def test_oracle_scores_by_hand():
    questions, predictions, scores = scored([["a b c"], ["d"], [], []], ["b", "d", "", "x"])
    found = oracle_scores(scores, questions, predictions, np.array([-2.0, 3.0, 5.0, 1.0]))
    # Answered in the order q0 (+2/3), q3 (-1), q1 (+1), q2 (0): the first peak of F1 is after q0 and after q1.
    assert found == {
        "best_exact": 50.0,
        "best_exact_thresh": 0.0,
        "best_f1": pytest.approx(100 * (2 + 2 / 3) / 4),
        "best_f1_thresh": -2.0,
    }


# --- the breakdown by kinds of questions ---


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
        ("?", "other"),
    ],
)
def test_question_words(text, word):
    assert question_word(text) == word


def test_context_lengths():
    stretches = [context_length("word " * number) for number in (1, 74, 75, 199, 200, 900)]
    assert stretches == ["0–74 words"] * 2 + ["75–99 words", "150–199 words"] + ["200 words or more"] * 2


def test_a_breakdown_counts_every_question_once():
    short, long = Paragraph("A", 0, "Hook Head tower"), Paragraph("A", 1, "tower " * 90)
    golds = (("Hook",), ("tower",), (), ())
    asked = [
        Question(
            f"q{number}", ("When?", "Who?")[number % 2], (short, long)[number % 2], question(number, *each).answers
        )
        for number, each in enumerate(golds)
    ]
    scores = score_answers(asked, {"q0": "Hook", "q1": "sea", "q2": "", "q3": "sea"})
    found = breakdown(asked, scores)
    assert {name: (each["total"], each["exact"]) for name, each in found["question_word"].items()} == {
        "when": (2, 100.0),
        "who": (2, 0.0),
    }
    assert list(found["context_length"]) == ["0–74 words", "75–99 words"]
    low, high = found["question_word"]["who"]["exact_ci95"]
    assert low == 0 and 50 < high < 100
