"""Test the sample articles: SQuAD's format, deterministic, disjoint by article, not answerable by kind of value."""

import re
from collections import Counter

import pytest

from zerotune.files import json_sha256
from zerotune.squad.files import parse_questions
from zerotune.squad.sample import KINDS, VALUES, question_lines, sample_articles


@pytest.fixture(scope="module")
def questions():
    return parse_questions(sample_articles(3000, 1), "sample")  # this checks every offset


def test_the_same_seed_gives_the_same_articles():
    assert sample_articles(300, 1) == sample_articles(300, 1)
    assert sample_articles(300, 1) != sample_articles(300, 3)
    assert len(parse_questions(sample_articles(301, 1), "sample")) == 301


def test_the_articles_of_the_task_stay_as_they_are():
    """The published figures for `--sample` were measured on these articles."""
    assert [json_sha256(sample_articles(*size))[:16] for size in ((3000, 1), (600, 2))] == [
        "402a374062f0f026", "a4e6b01befadba37"]  # fmt: skip


def test_odd_and_even_seeds_share_no_article_and_no_context(questions):
    others = parse_questions(sample_articles(1000, 2), "sample")
    for attribute in ("article", "context"):
        sides = [{getattr(each.paragraph, attribute) for each in part} for part in (questions, others)]
        assert not sides[0] & sides[1]


def test_a_third_has_no_answer(questions):
    share = sum(not question.answers for question in questions) / len(questions)
    assert 0.3 < share < 0.36  # 1/3, standard deviation 0.009
    per_paragraph = Counter(question.paragraph for question in questions)
    assert 4 < sum(per_paragraph.values()) / len(per_paragraph) < 6


def test_the_text_is_clean(questions):
    for question in questions:
        for text in (question.text, question.paragraph.context):
            assert text == " ".join(text.split()) and not set("{}") & set(text), text
            assert not re.search(r"\ba [aeo]", text), text
        assert question.text.endswith("?")
    assert all(len(question.paragraph.context.split()) < 70 for question in questions)
    assert len({question.paragraph.context for question in questions}) == len({q.paragraph for q in questions})


def test_a_word_of_the_question_alone_does_not_tell_whether_it_has_an_answer(questions):
    """Every form of question occurs with and without an answer; most unanswerable questions are about the paragraph's
    own subject."""
    forms = {True: Counter(), False: Counter()}
    for question in questions:
        forms[bool(question.answers)][" ".join(question.text.split()[:2])] += 1
    for form, count in (forms[True] + forms[False]).items():
        if count >= 50:
            assert 0.15 < forms[False][form] / count < 0.55, form
    own = [each for each in questions if not each.answers and each.paragraph.article in each.text]
    assert len(own) > 0.6 * sum(not each.answers for each in questions)


def test_the_kind_of_value_alone_does_not_tell_the_answer(questions):
    """One answer in seven has another value of its kind in its paragraph: a year, a person or a place."""
    kinds = {value: kind for kind, values in VALUES.items() for value in values}
    beside = 0
    answerable = [question for question in questions if question.answers]
    for question in answerable:
        answer = question.answers[0].text
        values = VALUES[kinds.get(answer) or kinds[answer[0].lower() + answer[1:]]]
        beside += sum(re.search(rf"\b{value}\b", question.paragraph.context) is not None for value in values) > 1
    assert beside > 0.12 * len(answerable)


def test_facts_of_one_kind_are_told_apart_by_their_questions():
    for kind in KINDS:
        asked = [form for fact in kind["facts"] for form in fact["questions"]]
        assert len(asked) == len(set(asked))
        assert all(sentence.count("{v}") == 1 for fact in kind["facts"] for sentence in fact["sentences"])


def test_a_tokenizer_can_be_trained_on_it():
    lines = question_lines(0)
    assert len(lines) > 4000 and sum(line.endswith("Answer: unanswerable") for line in lines) > 1200
