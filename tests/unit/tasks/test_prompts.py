"""Test prompts: drawing and cutting, calibration by hand, and the two forms of scoring against each other."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import CHAT_TEMPLATE, byte_tokenizer, character_model, tiny_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from zerotune.errors import Refused
from zerotune.models.shared_prefix import SharedRows
from zerotune.tasks.prompts import (
    Prompt,
    PromptData,
    answers_overlap,
    calibrate,
    draw_shots,
    encode_prompts,
    log_softmax,
    uses_chat,
)
from zerotune.tasks.splits import Example

TEMPLATE = "Review: {text}\nSentiment:"
WORDS = ("negative", "positive")
CPU = torch.device("cpu")
# Log-likelihoods of float32 sums in another order: some units of the last place, which is 1e-6 of a value near 10.
SAME = {"rtol": 1e-6, "atol": 2e-6}


def shared_rows(rows):
    found = SharedRows()
    for row in rows:
        found.append(row)
    return found


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """Return tokenizer and model of single bytes."""
    folder = tmp_path_factory.mktemp("characters")
    character_model(folder, CHAT_TEMPLATE)
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def words():
    """Return tokenizer and model of whole words."""
    folder = tiny_model("llama")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()


# --- the wording ---


def test_a_plain_prompt_with_shots():
    prompt = Prompt(TEMPLATE, WORDS, shots=(("dull .", 0), ("a joy .", 1)))
    assert prompt.render(None, "fine .") == (
        "Review: dull .\nSentiment: negative\n\nReview: a joy .\nSentiment: positive\n\nReview: fine .\nSentiment:"
    )
    assert prompt.answers(None) == [" negative", " positive"]


def test_braces_in_a_text_are_text():
    assert Prompt(TEMPLATE, WORDS).render(None, "{text} {0}") == "Review: {text} {0}\nSentiment:"


def test_a_chat_prompt_with_shots_has_turns_and_a_pinned_date(characters):
    prompt = Prompt(TEMPLATE, WORDS, chat=True, shots=(("dull .", 0),))
    assert prompt.render(characters[0], "fine .") == (
        "<s>26 Jul 2024\n[user]Review: dull .\nSentiment:\n[assistant]negative\n"
        "[user]Review: fine .\nSentiment:\n[assistant]"
    )
    assert prompt.answers(characters[0]) == ["negative", "positive"]


@pytest.mark.parametrize(
    ("opening", "asked_with", "space"),
    [(" ", "", " "), ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n", ""), ("\nSay: ", "\nSay:", " ")],
)  # Mistral's, Qwen3's, and one that opens with both
def test_a_prompt_ends_where_the_templates_answers_begin(characters, opening, asked_with, space):
    """Then only the label word is trained, scored, written and read."""
    tokenizer = copy.deepcopy(characters[0])
    tokenizer.chat_template = (
        "<s>{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }}[/INST]{% else %}{{ '"
        + opening.replace("\n", "\\n")
        + "' }}{{ turn.content }}</s>{% endif %}{% endfor %}"
    )
    prompt = Prompt(TEMPLATE, WORDS, chat=True)
    asked = "<s>[INST] Review: fine\nSentiment:[/INST]" + asked_with
    assert prompt.render(tokenizer, "fine") == asked
    assert prompt.answers(tokenizer) == [space + "negative", space + "positive"]
    data = encode_prompts(tokenizer, prompt, ["fine"], 50, 2048)
    assert tokenizer.decode(data.context(0)) == asked
    assert [decode(tokenizer, target) for target in data.targets] == prompt.answers(tokenizer)


def test_a_text_is_put_in_and_the_template_is_never_formatted():
    prompt = Prompt("{0.__class__} {text:>90000000000} {text}", WORDS, shots=(("dull", 0),))
    assert prompt.render(None, "{x}") == (
        "{0.__class__} {text:>90000000000} dull negative\n\n{0.__class__} {text:>90000000000} {x}"
    )


@pytest.mark.parametrize("chat", [False, True])
def test_a_tokenizer_that_adds_eos_adds_none_to_prompts(characters, chat):
    tokenizer = copy.deepcopy(characters[0])
    prompt = Prompt(TEMPLATE, WORDS, chat)
    wanted = encode_prompts(tokenizer, prompt, ["fine .", "dull"], 50, 2048)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert tokenizer("fine .")["input_ids"][-1] == tokenizer.eos_token_id
    data = encode_prompts(tokenizer, prompt, ["fine .", "dull"], 50, 2048)
    assert [list(row) for row in data.rows] == [list(row) for row in wanted.rows] and data.targets == wanted.targets


def test_label_words_that_the_tokenizer_cannot_tell_apart_are_refused(words):
    with pytest.raises(Refused, match="gives the label words 'negative' and 'positive' the same tokens"):
        encode_prompts(words[0], Prompt(TEMPLATE, WORDS), ["film"], 50, 64)


def test_a_label_word_that_changes_the_prompts_tokens_is_refused(words):
    """If a template ends with a letter, its last word and the label word merge."""
    tokenizer = copy.deepcopy(words[0])
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    with pytest.raises(Refused, match="merges the label word 'good' with the end of the prompt"):
        encode_prompts(tokenizer, Prompt("{text} was", ("good", "bad"), chat=True), ["film"], 50, 64)


@pytest.mark.parametrize("chat", [False, True])
def test_exactly_one_bos(characters, chat):
    tokenizer, _ = characters
    data = encode_prompts(tokenizer, Prompt(TEMPLATE, WORDS, chat), ["fine ."], 50, 2048)
    assert [row.count(tokenizer.bos_token_id) for row in data.rows] == [1, 1]
    assert all(row[0] == tokenizer.bos_token_id for row in data.rows)
    assert [decode(tokenizer, target) for target in data.targets] == Prompt(TEMPLATE, WORDS, chat).answers(tokenizer)


@pytest.mark.parametrize(
    ("wanted", "name", "has_template", "chat"),
    [
        ("auto", "google/gemma-2-2b-it", True, True),
        ("auto", "mistralai/Mistral-7B-Instruct-v0.3", True, True),
        ("auto", "org/model_chat", True, True),
        ("auto", "meta-llama/Llama-3.2-1B", True, False),
        ("auto", "org/switch-it-up", False, False),
        ("auto", "org/kit", True, False),
        ("chat", "meta-llama/Llama-3.2-1B", True, True),
        ("plain", "google/gemma-2-2b-it", True, False),
    ],
)
def test_who_gets_a_chat_prompt(wanted, name, has_template, chat):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE if has_template else None
    assert uses_chat(wanted, tokenizer, name) is chat


def test_a_chat_prompt_without_a_template_is_refused():
    with pytest.raises(Refused, match="the tokenizer of org/base has no chat template: use --prompt-format plain"):
        uses_chat("chat", SimpleNamespace(chat_template=None), "org/base")


# --- shots ---

ROWS = [Example(str(number), f"text {number}", int(number % 3 == 0)) for number in range(60)]


@given(num_shots=st.integers(0, 24), seed=st.integers(0, 1000))
def test_shots_are_balanced_distinct_and_the_same_for_a_seed(num_shots, seed):
    shots = draw_shots(ROWS, num_shots, ("a", "b"), seed)
    assert shots == draw_shots(ROWS, num_shots, ("a", "b"), seed)
    assert len(shots) == len(set(shots)) == num_shots
    assert abs(sum(shot.label for shot in shots) - num_shots / 2) <= 0.5
    assert set(shots) <= set(ROWS)


def test_seeds_differ_in_shots_in_their_order_and_in_the_odd_label():
    drawn = [draw_shots(ROWS, 5, ("a", "b"), seed) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert {sum(shot.label for shot in shots) for shots in drawn} == {2, 3}
    assert len({shots[0].label for shots in drawn}) == 2


def test_too_few_examples_of_a_label_are_refused():
    with pytest.raises(Refused, match="--shots 42 needs 21 examples of label 'b' and there are 20"):
        draw_shots(ROWS, 42, ("a", "b"), 0)


# --- calibration ---


def test_calibration_by_hand():
    """p(content-free) is the mean of (0.8, 0.2) and (0.6, 0.4): (0.7, 0.3). An item of (0.7, 0.3) is then a tie, and
    one of (0.5, 0.5) becomes (1/0.7, 1/0.3) / (1/0.7 + 1/0.3) = (0.3, 0.7)."""
    content_free = np.log([[0.8, 0.2], [0.6, 0.4]])
    items = np.log([[0.7, 0.3], [0.5, 0.5], [0.9, 0.1]])
    expected = [[0.5, 0.5], [0.3, 0.7], [0.9 / 0.7 / (0.9 / 0.7 + 0.1 / 0.3), 0.1 / 0.3 / (0.9 / 0.7 + 0.1 / 0.3)]]
    np.testing.assert_allclose(np.exp(calibrate(items, content_free)), expected, rtol=1e-12)


def test_calibration_does_not_see_what_both_labels_share():
    """Word likelihoods are not distributions over the labels: a common factor in a row means nothing."""
    items, content_free = np.log([[0.1, 0.2]]), np.log([[0.3, 0.1]])
    np.testing.assert_allclose(calibrate(items - 7, content_free - 30), calibrate(items, content_free), rtol=1e-9)


def test_calibration_of_a_label_that_is_far_less_likely_than_another():
    items, content_free = np.float32([[0, -200], [-200, 0]]), np.float32([[0, -150], [0, -160]])
    np.testing.assert_allclose(calibrate(items, content_free), [[0, -49.3069], [-350.693, 0]], rtol=1e-4, atol=1e-9)


def test_normalise_is_a_log_softmax_that_does_not_overflow():
    scores = np.array([[0.0, 0.0], [-1000.0, -1001.0], [800.0, 0.0]])
    expected = torch.tensor(scores).log_softmax(-1).numpy()
    np.testing.assert_allclose(log_softmax(scores), expected)


# --- what fits ---


def decode(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True)


def test_a_long_text_loses_its_middle_to_the_wanted_tokens(characters):
    tokenizer, _ = characters
    data = encode_prompts(tokenizer, Prompt(TEMPLATE, WORDS), ["abcdefghijklm", "abc"], 10, 2048)
    assert data.num_truncated == 1
    assert decode(tokenizer, data.rows[0]) == "Review: abc ... lm\nSentiment: negativ"
    assert decode(tokenizer, data.rows[2]) == "Review: abc\nSentiment: negativ"


def test_a_text_is_cut_to_the_window_and_the_shots_are_not(characters):
    tokenizer, _ = characters
    prompt = Prompt(TEMPLATE, WORDS, shots=(("dull .", 0),))
    empty = len(tokenizer(prompt.render(tokenizer, "") + " positive")["input_ids"])
    data = encode_prompts(tokenizer, prompt, ["x" * 500, "short"], 400, empty + 9)
    assert data.num_truncated == 1
    # One token less than the window, because the answer's last token is not an input.
    assert len(data.rows[0]) == empty + 9 - 1
    assert decode(tokenizer, data.rows[1]) == prompt.render(tokenizer, "xx ... xx") + " positiv"
    assert decode(tokenizer, data.rows[3]) == prompt.render(tokenizer, "short") + " positiv"


def test_shots_that_do_not_fit_are_refused(characters):
    tokenizer, _ = characters
    prompt = Prompt(TEMPLATE, WORDS, shots=(("dull .", 0),) * 3)
    with pytest.raises(Refused, match=r"the prompt with 3 shots takes \d+ tokens .* window is 100: use fewer --shots"):
        encode_prompts(tokenizer, prompt, ["text"], 50, 100)


def test_an_instruction_that_does_not_fit_is_refused_without_talk_of_shots(characters):
    tokenizer, _ = characters
    with pytest.raises(
        Refused, match=r"the prompt for 2 labels takes \d+ tokens .* is 20: use fewer or shorter labels"
    ):
        encode_prompts(tokenizer, Prompt(TEMPLATE, WORDS), ["text"], 50, 20)


# --- scores ---


def test_one_token_answers_take_one_row_an_item(words):
    tokenizer, _ = words
    data = encode_prompts(tokenizer, Prompt("a film : {text} was", ("bad", "good")), ["the film", "dull"], 20, 64)
    assert data.single_token and len(data.rows) == 2
    assert data.targets[0] == tokenizer.convert_tokens_to_ids(["bad", "good"])
    assert data.num_shared == 4, "<s> a film :"
    assert data.lengths.tolist() == [len(row) - 4 for row in data.rows]


def test_several_token_answers_take_a_row_for_each_label(characters):
    tokenizer, _ = characters
    data = encode_prompts(tokenizer, Prompt(TEMPLATE, ("bad", "good")), ["x", "yy"], 20, 2048)
    assert not data.single_token and len(data.rows) == 4
    assert [decode(tokenizer, target) for target in data.targets] == [" bad", " good"] * 2
    shared = data.num_shared
    assert decode(tokenizer, data.rows[0][:shared]).endswith("Review: ")
    assert data.lengths.tolist() == [2 * (len(data.rows[row]) - shared) for row in (1, 3)]


def test_both_forms_of_scoring_agree(words):
    """A model of whole words scores with one row per item, then with one row per label."""
    tokenizer, model = words
    texts = ["the film", "dull", "not very bright a a a a"]
    data = encode_prompts(tokenizer, Prompt("a film : {text} was", ("bad", "good")), texts, 20, 64)
    several = PromptData(
        rows=shared_rows(row for row in data.rows for _ in range(2)),
        targets=[[token] for answers in data.targets for token in answers],
        num_labels=2,
        single_token=False,
        pad_id=data.pad_id,
        num_shared=data.num_shared,
        num_truncated=0,
    )
    items = np.array([2, 0, 1])
    with torch.no_grad():
        once, twice = (form.log_likelihoods(model, items, CPU) for form in (data, several))
    # with one row per item, the label words are compared only with each other
    np.testing.assert_allclose(log_softmax(once), log_softmax(twice), atol=1e-6)
    assert once.shape == (3, 2) and np.ptp(once) > 0.01


@pytest.mark.parametrize("kind", ["words", "characters"])
def test_a_batch_scores_as_its_rows_alone(kind, request):
    tokenizer, model = request.getfixturevalue(kind)
    texts = ["the film was good", "dull", "a very very very very bright film"]
    data = encode_prompts(tokenizer, Prompt("a film : {text} was", ("bad", "good")), texts, 60, 64 * 4)
    with torch.no_grad():
        together = data.log_likelihoods(model, np.arange(3), CPU)
        alone = [data.log_likelihoods(model, np.array([item]), CPU)[0] for item in range(3)]
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_an_answer_of_several_tokens_by_hand(characters):
    """log p("bad" after the prompt) is the sum over its four tokens, from one unpadded forward pass."""
    tokenizer, model = characters
    data = encode_prompts(tokenizer, Prompt(TEMPLATE, ("bad", "good")), ["fine"], 60, 2048)
    ids = tokenizer("Review: fine\nSentiment: bad")["input_ids"]
    with torch.no_grad():
        steps = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = data.log_likelihoods(model, np.array([0]), CPU)
    by_hand = sum(float(steps[place - 1, ids[place]]) for place in range(len(ids) - 4, len(ids)))
    assert found[0, 0] == pytest.approx(by_hand, abs=1e-5)


# --- shared prefixes ---


@pytest.mark.parametrize("label_words", [("bad", "good"), ("not bad", "not good")])
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3"])
def test_a_shared_prefix_gives_the_likelihoods_of_whole_prompts(kind, label_words, words):
    """Mistral and half of Gemma's layers see only 8 tokens, a part of the shots. SAME: sums in another order."""
    tokenizer, _ = words
    window = {"sliding_window": 8} if kind in ("mistral", "gemma2", "gemma3_text") else {}
    if kind == "gemma3_text":
        window["layer_types"] = ["sliding_attention", "full_attention"]
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), **window).eval()
    assert getattr(model.config, "sliding_window", None) == window.get("sliding_window")
    prompt = Prompt("a film : {text} was", label_words, shots=(("dull", 0), ("bright a very", 1)) * 3)
    texts = ["the film", "dull", "not very bright a a a a a a a a a a"]
    data = encode_prompts(tokenizer, prompt, texts, 20, 128)
    assert data.single_token == (label_words[0] == "bad") and data.num_shared > 30
    with torch.no_grad():
        prefix = data.prefix(model, CPU)
        whole = data.log_likelihoods(model, np.arange(3), CPU)
        shared = data.log_likelihoods(model, np.array([2, 0, 1]), CPU, prefix)
        again = data.log_likelihoods(model, np.array([1]), CPU, prefix)
    np.testing.assert_allclose(shared, whole[[2, 0, 1]], **SAME)
    np.testing.assert_allclose(again, whole[[1]], **SAME)
    assert (shared.argmax(axis=1) == whole[[2, 0, 1]].argmax(axis=1)).all()
    assert np.ptp(whole[:, 0] - whole[:, 1]) > 1e-4, "the items must differ for this to test anything"
    if window:
        model = AutoModelForCausalLM.from_pretrained(tiny_model(kind), **window | {"sliding_window": 64}).eval()
        with torch.no_grad():
            assert np.abs(data.log_likelihoods(model, np.arange(3), CPU) - whole).max() > 1e-4, "the window must matter"


def test_the_tokens_that_answers_follow_are_never_shared(characters):
    """A single text shares its whole prompt with itself, and label words may begin alike."""
    tokenizer, model = characters
    data = encode_prompts(tokenizer, Prompt(TEMPLATE, ("bad", "bath")), ["fine"], 60, 2048)
    assert data.num_shared == min(len(row) - len(target) for row, target in zip(data.rows, data.targets, strict=True))
    with torch.no_grad():
        whole = data.log_likelihoods(model, np.array([0]), CPU)
        shared = data.log_likelihoods(model, np.array([0]), CPU, data.prefix(model, CPU))
    np.testing.assert_allclose(shared, whole, atol=2e-6)


# --- the user's own labels ---

OVERLAPPING = Prompt("{text} is", ("art", "art history", "history"), instruction="Say what it is.")


def test_an_instruction_stands_once_before_the_solved_examples(characters):
    tokenizer, _ = characters
    shots = (("a", 0), ("b", 2))
    plain = Prompt("{text} is", OVERLAPPING.label_words, shots=shots, instruction="Say what it is.")
    assert plain.render(None, "c") == "Say what it is.\n\na is art\n\nb is history\n\nc is"
    chat = Prompt("{text} is", OVERLAPPING.label_words, True, shots, "Say what it is.").render(tokenizer, "c")
    without = Prompt("{text} is", OVERLAPPING.label_words, True, shots).render(tokenizer, "c")
    assert chat == without.replace("a is", "Say what it is.\n\na is", 1)


def test_labels_of_which_one_begins_another_are_compared_with_their_ends(characters):
    tokenizer, model = characters
    assert answers_overlap(tokenizer, OVERLAPPING) and not answers_overlap(tokenizer, Prompt("{text} is", WORDS))
    end = tokenizer("\n", add_special_tokens=False)["input_ids"]
    data = encode_prompts(tokenizer, OVERLAPPING, ["a lute"], 20, 60, end)
    with torch.no_grad():
        found = data.log_likelihoods(model, np.arange(1), CPU)[0]
    for label, word in enumerate(OVERLAPPING.label_words):
        context = tokenizer("Say what it is.\n\na lute is")["input_ids"]
        whole = [*tokenizer(f"Say what it is.\n\na lute is {word}")["input_ids"], *end]
        with torch.no_grad():
            logits = model(torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
        wanted = sum(float(logits[place - 1, whole[place]]) for place in range(len(context), len(whole)))
        assert found[label] == pytest.approx(wanted, abs=1e-4)
    without = encode_prompts(tokenizer, OVERLAPPING, ["a lute"], 20, 60)
    with torch.no_grad():
        without = without.log_likelihoods(model, np.arange(1), CPU)[0]
    assert without[0] > without[1] and found[0] < without[0]
