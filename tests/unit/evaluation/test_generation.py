"""Written answers match a loop without padding or cache token for token; test also which labels are read in them."""

import pytest
import torch
from tiny_models import CHAT_TEMPLATE, character_model, tiny_model
from transformers import AutoModelForCausalLM, GenerationConfig

from zerotune.evaluation.generation import answer_texts, end_tokens, parse_answer, write_answers
from zerotune.models.pretrained import load_tokenizer
from zerotune.tasks.prompts import Prompt, encode_prompts

CPU = torch.device("cpu")
WORDS = ("negative", "positive")
ROWS = [[1, 5, 7], [1, 4, 6, 8, 9, 10], [1, 12]]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("positive", 1),
        (" Negative.", 0),
        ("\nPOSITIVE\n\nReview: another", 1),
        ("positive, not negative", 1),
        ("positively", None),
        ("It is positive", None),
        ("", None),
        ("**positive**", None),
    ],
)
def test_the_word_that_an_answer_begins_with(text, label):
    assert parse_answer(text, WORDS) == label


def test_words_are_no_patterns_and_end_where_they_end():
    assert parse_answer("c++ .", ("c+", "c++")) == 1
    assert parse_answer("Art history.", ("art", "art history")) == 1
    assert parse_answer("art, history", ("art history", "art")) == 1
    assert parse_answer("ccc", ("c+", "d")) is None
    assert parse_answer("not at all", ("no", "not at all")) == 1


def one_by_one(model, row, ends, max_new_tokens):
    written = list(row)
    while len(written) - len(row) < max_new_tokens:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([written]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        written.append(token)
    return written[len(row) :]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral"])
def test_answers_are_greedy_whatever_stands_beside_them(kind):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(kind)).eval()
    model.generation_config = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=5.0, eos_token_id=2)
    free = [one_by_one(model, row, [], 6) for row in ROWS]
    ends = [free[0][3]]  # one answer ends early
    written = write_answers(model, ROWS, 3, ends, 6, CPU)
    for row, tokens in zip(ROWS, written, strict=True):
        assert tokens == one_by_one(model, row, ends, 6)
        assert write_answers(model, [row], 3, ends, 6, CPU) == [tokens]
    assert len(one_by_one(model, ROWS[0], ends, 6)) < 4
    assert model.generation_config.repetition_penalty == 5.0


def test_texts_have_no_special_tokens(tmp_path):
    character_model(tmp_path, CHAT_TEMPLATE)
    tokenizer = load_tokenizer(str(tmp_path), None)
    ids = tokenizer(" good", add_special_tokens=False)["input_ids"]
    records = [{"tokens": ids}, {"tokens": [tokenizer.pad_token_id, *ids]}, {"tokens": []}]
    assert answer_texts(tokenizer, records) == [" good", " good", ""]


@pytest.mark.parametrize("chat", [False, True])
def test_a_prompts_context_is_what_is_rendered(tmp_path, chat):
    character_model(tmp_path, CHAT_TEMPLATE)
    tokenizer = load_tokenizer(str(tmp_path), None)
    prompt = Prompt("Review: {text}\nSentiment:", WORDS, chat)
    data = encode_prompts(tokenizer, prompt, ["dull .", "fine"], 50, 2048)
    for item, text in enumerate(("dull .", "fine")):
        rendered = prompt.render(tokenizer, text)
        assert data.context(item) == tokenizer(rendered, add_special_tokens=not chat)["input_ids"]


def test_what_ends_an_answer():
    tokenizer = load_tokenizer(tiny_model("llama"), None)
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    prompt = Prompt("{text}", WORDS)
    assert end_tokens(model, tokenizer, prompt) == [2]
    model.generation_config.eos_token_id = [2, 9]
    assert end_tokens(model, tokenizer, prompt) == [2, 9]
    tokenizer.chat_template = "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}<pad>\n{% endfor %}"
    assert end_tokens(model, tokenizer, Prompt("{text}", WORDS, chat=True)) == [2, 3, 9]
