"""Test tuning a generator: its rows are the evaluation's prompts, its loss is transformers', and final/ reloads it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import CHAT_TEMPLATE, character_model, move_weights, task_record, tiny_model
from torch.nn import functional

from zerotune.errors import Refused
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_generator, load_language_model
from zerotune.models.model_files import read_record
from zerotune.models.pretrained import load_tokenizer
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.prompts import Prompt, encode_prompts, log_softmax
from zerotune.tasks.splits import Example
from zerotune.training.generation import encode_answers, end_of_answer, prompt_record

CPU = torch.device("cpu")
KINDS = ["llama", "gemma2", "mistral"]
pytestmark = pytest.mark.usefixtures("plain_four_bits")

METHODS = ["full", "lora", "qlora"]
WORDS = Prompt("the film : {text} was", ("bad", "good"))
LETTERS = Prompt("Review: {text}\nSentiment:", ("negative", "positive"))
TEXTS = ["good", "the very dull film was not good", "not bad", "a bright film", "very very good a the film"]
EXAMPLES = [Example(f"t-{number}", text, number % 2) for number, text in enumerate(TEXTS)]
ALL = np.arange(len(TEXTS))
# Like Gemma's template: a turn ends with a special token and a line break.
TURNS = (
    "<s>{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Return a model of single bytes, so label words have several tokens."""
    folder = tmp_path_factory.mktemp("letters")
    character_model(folder, CHAT_TEMPLATE)
    return str(folder)


def generator(folder, method="full", **settings):
    """Return a generator whose trainable weights have moved, and its tokenizer."""
    tokenizer = load_tokenizer(folder, None)
    model = load_generator(ModelSettings(folder, None, method, **settings), tokenizer)
    move_weights(model)
    return model.eval(), tokenizer


def loss_and_gradients(model, data, micro_batches):
    """Return the mean loss per answer token, and its gradient by parameter."""
    model.zero_grad()
    total, count = 0.0, data.num_targets(np.concatenate(micro_batches))
    for items in micro_batches:
        batch = data.batch(items, CPU)
        loss = functional.cross_entropy(model(**batch.inputs), batch.targets, reduction="sum") / count
        loss.backward()
        total += float(loss.detach())
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- rows ---


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_is_the_evaluations_prompt_with_the_own_answer_and_its_end(letters, chat):
    tokenizer = load_tokenizer(letters, None)
    prompt = Prompt(LETTERS.template, LETTERS.label_words, chat)
    data = encode_answers(tokenizer, prompt, EXAMPLES, 300, 2048)
    evaluated = encode_prompts(tokenizer, prompt, TEXTS, 300, 2048)
    for number, example in enumerate(EXAMPLES):
        row, count = data.row(number, example.label)
        place = 2 * number + example.label
        answer = evaluated.targets[place]
        assert row[:-1] == [*evaluated.rows[place], answer[-1]] and row[-1] == tokenizer.eos_token_id
        assert count == len(answer) + 1 and row.count(tokenizer.bos_token_id) == 1
        assert (
            tokenizer.decode(row[:-1])
            == "<s>" * (not chat) + prompt.render(tokenizer, example.text) + (prompt.answers(tokenizer)[example.label])
        )
    assert data.num_targets(ALL) == sum(data.row(n, e.label)[1] for n, e in enumerate(EXAMPLES))
    assert data.lengths.tolist() == [len(data.row(n, e.label)[0]) - 1 for n, e in enumerate(EXAMPLES)]


def test_one_token_answers_share_the_evaluations_row():
    tokenizer = load_tokenizer(tiny_model("llama"), None)
    data = encode_answers(tokenizer, WORDS, EXAMPLES, 40, 64)
    assert data.prompts == encode_prompts(tokenizer, WORDS, TEXTS, 40, 64) and data.prompts.single_token
    assert tokenizer.decode(data.row(0, 1)[0]) == "<s> the film <unk> good was good </s>"


def test_only_the_text_is_cut_and_the_whole_row_fits(letters):
    tokenizer = load_tokenizer(letters, None)
    long = [Example("long", "so " * 100, 1), Example("short", "so", 0)]
    for max_length, window in ((60, 2048), (300, 60)):
        data = encode_answers(tokenizer, LETTERS, long, max_length, window)
        rows = [data.row(number, example.label)[0] for number, example in enumerate(long)]
        assert len(rows[0]) == 60 and data.num_truncated == 1
        text = tokenizer.decode(rows[0])
        assert text.startswith("<s>Review: so so") and text.endswith("\nSentiment: positive</s>")


def test_a_row_without_room_for_text_is_refused(letters):
    tokenizer = load_tokenizer(letters, None)
    size = len(tokenizer(LETTERS.render(tokenizer, "") + " positive")["input_ids"])
    with pytest.raises(Refused, match=f"--max-length {size + 1} leaves a text no room beside {size} tokens"):
        encode_answers(tokenizer, LETTERS, EXAMPLES, size + 1, 2048)
    assert len(encode_answers(tokenizer, LETTERS, EXAMPLES, size + 2, 2048).row(1, 1)[0]) == size + 2


def test_the_end_is_the_templates_own_where_it_has_one(letters):
    tokenizer = load_tokenizer(letters, None)
    chat = Prompt(LETTERS.template, LETTERS.label_words, chat=True)
    assert end_of_answer(tokenizer, LETTERS) == end_of_answer(tokenizer, chat) == [tokenizer.eos_token_id]
    tokenizer.chat_template = TURNS
    assert end_of_answer(tokenizer, chat) == [tokenizer.pad_token_id]
    parts_of_its_name = replace(chat, label_words=("d", "p"))
    assert end_of_answer(tokenizer, parts_of_its_name) == [tokenizer.pad_token_id]
    row, count = encode_answers(tokenizer, chat, EXAMPLES, 300, 2048).row(0, 0)
    turns = [
        {"role": "user", "content": LETTERS.template.format(text=TEXTS[0])},
        {"role": "assistant", "content": "negative"},
    ]
    assert tokenizer.decode(row) + "\n" == tokenizer.apply_chat_template(turns, tokenize=False)
    assert count == len("negative") + 1
    tokenizer.chat_template, tokenizer.eos_token = CHAT_TEMPLATE, None
    for prompt in (chat, LETTERS):
        with pytest.raises(Refused, match="no eos_token"):
            end_of_answer(tokenizer, prompt)


# --- loss ---


@pytest.mark.parametrize("kind", [*KINDS, "letters"])
def test_the_loss_is_that_of_transformers_with_the_prompt_masked(kind, letters):
    """Compute it the slow way: one row at a time, all logits, labels of -100 for the prompt."""
    folder, prompt = (letters, LETTERS) if kind == "letters" else (tiny_model(kind), WORDS)
    model, tokenizer = generator(folder)
    data = encode_answers(tokenizer, prompt, EXAMPLES, 60, 64)
    ours, gradients = loss_and_gradients(model, data, [ALL])
    model.zero_grad()
    total = 0.0
    for number, example in enumerate(EXAMPLES):
        row, count = data.row(number, example.label)
        labels = torch.tensor([[-100] * (len(row) - count) + row[-count:]])
        loss = model.stock_model(input_ids=torch.tensor([row]), labels=labels, use_cache=False).loss * count
        (loss / data.num_targets(ALL)).backward()
        total += float(loss.detach()) / data.num_targets(ALL)
    # float32 sums of about 100 terms in another order
    assert ours == pytest.approx(total, rel=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_step_does_not_depend_on_its_cut(method, letters):
    model, tokenizer = generator(letters, method)
    data = encode_answers(tokenizer, LETTERS, EXAMPLES, 60, 2048)
    whole, gradients = loss_and_gradients(model, data, [ALL])
    for cut in ([ALL[:1], ALL[1:]], [ALL[[3, 0]], ALL[[4]], ALL[[1, 2]]]):
        again, other = loss_and_gradients(model, data, cut)
        assert again == pytest.approx(whole, rel=1e-5) and other.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "letters"])
def test_the_validation_scores_are_those_of_the_prompt_evaluation(kind, letters):
    folder, prompt = (letters, LETTERS) if kind == "letters" else (tiny_model(kind), WORDS)
    model, tokenizer = generator(folder)
    data = encode_answers(tokenizer, prompt, EXAMPLES, 60, 64)
    with torch.no_grad():
        scores = [record for items in (ALL[:2], ALL[2:]) for record in data.scores(model, items, CPU)]
        wanted = data.prompts.log_likelihoods(model.stock_model, ALL, CPU)
    np.testing.assert_allclose(data.log_probabilities(scores), log_softmax(wanted), atol=1e-5)
    assert data.mean_loss(scores) == pytest.approx(loss_and_gradients(model, data, [ALL])[0], rel=1e-5)


# --- the model ---


def test_activation_checkpointing_changes_no_gradient(letters):
    found = []
    for recompute in (False, True):
        model, tokenizer = generator(letters, "lora", activation_checkpointing=recompute)
        data = encode_answers(tokenizer, LETTERS, EXAMPLES, 60, 2048)
        found.append(loss_and_gradients(model.train(), data, [ALL]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())


# --- final/ ---


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_loaded_for_evaluation_it_scores_as_it_did(kind, method, tmp_path):
    model, tokenizer = generator(tiny_model(kind), method)
    data = encode_answers(tokenizer, WORDS, EXAMPLES, 60, 64)
    with torch.no_grad():
        wanted = data.log_probabilities(data.scores(model, ALL, CPU))
    save_final(model, tokenizer, tmp_path, task_record("generate", prompt=prompt_record(WORDS)))
    settings = ModelSettings(str(tmp_path))
    with torch.no_grad():
        again = data.prompts.log_likelihoods(load_language_model(settings, CPU), ALL, CPU)
    np.testing.assert_allclose(log_softmax(again), wanted, atol=1e-5)
    assert read_record(str(tmp_path), None)["method"] == method


def test_overlapping_answers_are_trained_as_they_are_compared(letters):
    """Answers include the end token once; both the loss and the likelihood count it."""
    tokenizer = load_tokenizer(letters, None)
    prompt = Prompt("{text} is", ("art", "art history", "history"), instruction="Say what.")
    examples = [Example(f"t-{number}", text, number % 3) for number, text in enumerate(TEXTS)]
    data = encode_answers(tokenizer, prompt, examples, 90, 128)
    for item, example in enumerate(examples):
        tokens, count = data.row(item, example.label)
        word = prompt.label_words[example.label]
        assert tokenizer.decode(tokens) == f"<s>Say what.\n\n{example.text} is {word}</s>" and count == len(word) + 2
    model, _ = generator(letters)
    with torch.no_grad():
        records = data.scores(model, ALL, CPU)
    own = [record["log_likelihoods"][example.label] for record, example in zip(records, examples, strict=True)]
    assert [-value for value in own] == pytest.approx([record["loss"] for record in records], rel=1e-5)
