"""Test the sentences and reviews of `--sample`: a sentence's construction sets its label, and a seed fixes the rows."""

import itertools
import random
from collections import Counter

import pytest

from zerotune.files import json_sha256
from zerotune.tasks import sample as samples
from zerotune.tasks.sample import ASPECTS, FILM, RULES, Writer

BAD, GOOD = 0, 1


def judgements(text: str) -> Counter:
    """Count the good and bad words for the film in a text, as {1: count, 0: count}."""
    lists = [FILM[slot] for slot in ("mild", "strong", "quality")]
    words = {word: polarity for both in lists for polarity in (GOOD, BAD) for word in both[polarity]}
    return Counter(words[word.strip(".,?;")] for word in text.split() if word.strip(".,?;") in words)


@pytest.mark.parametrize("outcome", [GOOD, BAD])
@pytest.mark.parametrize(
    ("template", "same", "opposite"),
    [
        ("never {not mild}", 0, 1),
        ("not {not adj} but {adj}", 1, 1),
        ("a {film} without a trace of {not quality}", 0, 1),
        ("a {adj}, {adj} {film}", 2, 0),
        ("short on {not quality} and long on {quality}", 1, 1),
        ("nobody said it was {not sentence_of_one}", 1, 0),
    ],
)
def test_parts_get_the_polarity_that_the_template_gives_them(monkeypatch, template, outcome, same, opposite):
    # This part negates too, so two negations restore the whole's polarity.
    monkeypatch.setitem(RULES, "sentence_of_one", [(["never {not mild}"], [1])] * 2)
    for seed in range(20):
        found = judgements(Writer(random.Random(seed)).fill(template, outcome))
        assert (found[outcome], found[1 - outcome]) == (same, opposite)


def test_one_sided_alternatives_never_express_the_other_polarity():
    bad, good = (set(templates) for templates, weights in RULES["rescue"])
    assert len(good) == len(bad) == 2
    assert good.isdisjoint(bad)
    assert "the {adj} {noun} {saves} {not np}" in good and "the {adj} {noun} {sinks} {not np}" in bad


def test_every_template_expands_to_clean_text():
    for name, of_polarity in RULES.items():
        for polarity, (templates, weights) in enumerate(of_polarity):
            assert len(templates) == len(weights) > 0
            for template in templates:
                text = Writer(random.Random(f"{name} {template}")).fill(template, polarity)
                assert text == " ".join(text.split()), text
                assert not set("{}[]|/") & set(text), text


def test_no_word_is_both_good_and_bad():
    pairs = [subject[slot] for subject in (FILM, *ASPECTS) for slot in ("mild", "strong", "verb")]
    pairs += [FILM[slot] for slot in ("quality", "verdict", "feeling")]
    good, bad = ({word for pair in pairs for word in pair[polarity]} for polarity in (GOOD, BAD))
    assert good.isdisjoint(bad)
    assert min(len(good), len(bad)) > 150
    for subject in (FILM, *ASPECTS):  # a word listed twice for one noun could be drawn twice in a row
        words = [word for slot in ("mild", "strong") for polarity in (GOOD, BAD) for word in subject[slot][polarity]]
        assert len(words) == len(set(words))


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("goes nowhere", "go nowhere"), ("tries too hard", "try too hard"), ("loses its way", "lose its way"),
     ("fizzles", "fizzle"), ("touches a nerve", "touch a nerve"), ("cloys", "cloy")],
)  # fmt: skip
def test_verb_stem(phrase, expected):
    assert samples.verb_stem(phrase) == expected


def test_rows_are_unique_balanced_lower_case_and_sized():
    rows = samples.sample_rows(2001, seed=3)
    texts = [text for text, _ in rows]
    assert len(set(texts)) == 2001
    assert Counter(label for _, label in rows) == {0: 1001, 1: 1000}
    assert all(text == text.lower() == text.strip() for text in texts)
    sizes = sorted(len(text.split()) for text in texts)
    assert sizes[0] >= 2
    assert sizes[-1] <= samples.MAX_WORDS
    assert 8 <= sizes[len(sizes) // 2] <= 14
    assert len({word.strip(".,;?") for text in texts for word in text.split()}) > 700
    # They are written alternately, then shuffled: neighbours agree about half of the time (sd 0.011 for 2,000 pairs).
    agreement = sum(a[1] == b[1] for a, b in itertools.pairwise(rows)) / 2000
    assert 0.45 < agreement < 0.55


def test_a_seed_gives_its_own_rows_and_always_the_same_ones():
    rows = samples.sample_rows(1000, seed=1)
    assert rows == samples.sample_rows(1000, seed=1)
    other = samples.sample_rows(1000, seed=2)
    assert len({text for text, _ in rows} & {text for text, _ in other}) < 50


def test_the_rows_of_the_tasks_stay_as_they_are():
    """The published figures for `--sample` were measured on these rows."""
    assert [json_sha256(samples.sample_rows(*size))[:16] for size in ((8000, 1), (1000, 2))] == [
        "6eab0de64d41ad12", "c170295e680ebbf7"]  # fmt: skip
    assert [json_sha256(samples.sample_reviews(*size))[:16] for size in ((4000, 1), (600, 2))] == [
        "0ed3be6acde38541", "8d62bcdddbffd15e"]  # fmt: skip


def test_articles():
    assert samples.correct_articles("a uneven plot, a one-note cast, a aging boxer") == (
        "an uneven plot, a one-note cast, an aging boxer"
    )
    assert not [text for text, _ in samples.sample_rows(2000, seed=4) if " a a" in f" {text}" or " an b" in f" {text}"]


def test_mixed_rows_carry_a_label_that_their_text_does_not_tell():
    marked = [
        ((judgements(text.removeprefix("by turns ").split(" and ")[0])[GOOD] > 0), label)
        for text, label in samples.sample_rows(60_000, seed=5)
        if text.startswith("by turns ")
    ]
    share = sum((label == 1) == first_is_good for first_is_good, label in marked) / len(marked)
    # Within five standard deviations of a fair coin.
    assert len(marked) > 200
    assert abs(share - 0.5) < 2.5 / len(marked) ** 0.5


def test_bag_of_words_is_well_above_chance_and_well_below_the_ceiling():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = samples.sample_rows(2000, seed=6), samples.sample_rows(1000, seed=7)
    counts = CountVectorizer()
    model = LogisticRegression(C=0.3, max_iter=500).fit(
        counts.fit_transform([text for text, _ in train]), [label for _, label in train]
    )
    accuracy = model.score(counts.transform([text for text, _ in test]), [label for _, label in test])
    # Measured 0.74 (sd 0.014); the ceiling is 1 - MIXED_SHARE / 2 = 0.975.
    assert 0.65 < accuracy < 0.85
