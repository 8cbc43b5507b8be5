"""Test finding phrases inside sentences: whole words only, as in the plain definition."""

from hypothesis import given, settings
from hypothesis import strategies as st

from zerotune.tasks import phrases
from zerotune.tasks.phrases import PhraseIndex


def test_phrases_match_whole_words_only():
    index = PhraseIndex(["art", "a warm", "a warm film", "film", "warm film about art"])
    assert index.inside(["a warm film about artists"]) == {"a warm", "a warm film", "film"}
    assert index.outermost() == {"a warm film", "warm film about art"}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "ab", "a-", "é"]), min_size=1, max_size=6).map(" ".join), min_size=1)
)
def test_phrase_index_agrees_with_the_plain_definition(texts):
    distinct = set(texts)
    index = PhraseIndex(texts)
    for text in (*distinct, *(f"new {text} new b" for text in distinct)):
        assert index.inside([text]) == {other for other in distinct if f" {other} " in f" {text} "}
    assert index.inside(texts[:2]) == index.inside(texts[:1]) | index.inside(texts[:2][-1:])
    inner = {a for a in distinct for b in distinct if a != b and f" {a} " in f" {b} "}
    assert index.outermost() == distinct - inner


def test_texts_are_searched_in_batches(monkeypatch):
    texts = [f"word{number} word{number + 1} end" for number in range(30)] + ["word7 word8", "end", "word29", "word9 x"]
    expected = PhraseIndex(texts).outermost()
    assert expected == {*texts} - {"word7 word8", "end", "word29"}
    monkeypatch.setattr(phrases, "TEXTS_AT_ONCE", 3)
    assert PhraseIndex(texts[::-1]).outermost() == expected
