"""Run the code of final/README.md as a reader would: it prints zerotune's predictions."""

import ast
import contextlib
import io
import re

import numpy as np
import pytest
import torch
from span_cases import ask, pair_tokenizer
from tiny_models import (
    CHAT_TEMPLATE,
    LABELS,
    character_model,
    model_copy,
    move_weights,
    task_record,
    tiny_model,
)

from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_generator
from zerotune.models.pretrained import load_tokenizer
from zerotune.models.span_head import load_span_model
from zerotune.settings.groups import ModelSettings, QuestionSettings
from zerotune.squad.prompts import QuestionPrompt, question_prompt_record
from zerotune.squad.spans import span_data
from zerotune.tasks.prompts import Prompt
from zerotune.tasks.texts import joined_pair
from zerotune.training.generation import chat_record, end_of_answer, prompt_record

MANY = tuple(f"class {number}" for number in range(20))


def printed(final, **texts):
    """Run the README's code from another working directory with its texts replaced; return the printed lines."""
    (code,) = re.findall(r"```python\n(.*?)```", (final / "README.md").read_text(), re.DOTALL)
    for name, text in {"folder": str(final), **texts}.items():
        line = f"{name} = {text!r}"
        code, count = re.subn(rf'^{name} = "[^"\n]*"', lambda _, line=line: line, code, flags=re.MULTILINE)
        assert count == 1, name
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(code, {})
    return output.getvalue().splitlines()


def saved(model, tokenizer, folder, record):
    folder.mkdir()
    save_final(model, tokenizer, folder, record)
    return folder


@pytest.mark.parametrize(
    ("kind", "method", "labels"),
    [("llama", "full", ("no", "yes")), ("llama", "lora", ("a", "b", "c")), ("bert", "full", MANY)],
)
def test_a_classifier_prints_its_labels_with_probabilities(kind, method, labels, tmp_path):
    tokenizer = load_tokenizer(tiny_model(kind), None)
    model = load_classifier(ModelSettings(tiny_model(kind), None, method), labels, tokenizer)
    move_weights(model.eval())
    final = saved(model, tokenizer, tmp_path / "final", task_record(labels=list(labels), max_length=5))
    text = "a very good film was not dull"
    row = tokenizer(text, truncation=True, max_length=5, return_tensors="pt")
    with torch.no_grad():
        wanted = model(row["input_ids"], row["attention_mask"]).softmax(-1)[0]
    lines = [line.split("  ") for line in printed(final, text=text)]
    assert [label for _, label in lines] == [labels[place] for place in wanted.argsort(descending=True)]
    assert [float(probability) for probability, _ in lines] == pytest.approx(sorted(wanted.tolist())[::-1], abs=1e-4)


def test_an_encoder_prints_what_it_predicts_of_a_pair(tmp_path):
    """The two texts are separate segments."""
    tokenizer = pair_tokenizer()
    model = load_classifier(ModelSettings(tiny_model("bert"), None, "full"), ("no", "yes"), tokenizer)
    move_weights(model.eval())
    record = task_record(labels=["no", "yes"], pair_columns=["premise", "hypothesis"])
    final = saved(model, tokenizer, tmp_path / "final", record)
    row = tokenizer("a text", "the text that belongs to it", return_tensors="pt")
    assert row["token_type_ids"].any()
    with torch.no_grad():
        wanted = model(**row).softmax(-1)[0].max()
    assert float(printed(final)[0].split()[0]) == pytest.approx(float(wanted), abs=1e-4)


@pytest.mark.parametrize("head", ["classify", "generate"])
def test_a_causal_models_card_shows_a_pair_as_it_was_trained(head, tmp_path):
    tokenizer = load_tokenizer(tiny_model("llama"), None)
    settings = ModelSettings(tiny_model("llama"), None, "full")
    model = load_generator(settings, tokenizer) if head == "generate" else load_classifier(settings, LABELS, tokenizer)
    record = task_record(head, pair_columns=["premise", "hypothesis"])
    final = saved(model, tokenizer, tmp_path / "final", record)
    (line,) = re.findall(r"^text = .*", (final / "README.md").read_text(), re.MULTILINE)
    shown = joined_pair(("premise", "hypothesis"), ("a text", "the text that belongs to it"))
    assert ast.literal_eval(line.removeprefix("text = ")) == shown
    assert printed(final, text=shown)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_labels_that_do_not_exclude_each_other_have_a_probability_each(method, tmp_path):
    tokenizer = load_tokenizer(tiny_model("llama"), None)
    model = load_classifier(ModelSettings(tiny_model("llama"), None, method), ("a", "b", "c"), tokenizer)
    move_weights(model.eval())
    model.config.problem_type = "multi_label_classification"
    final = saved(model, tokenizer, tmp_path / "final", task_record(labels=["a", "b", "c"]))
    row = tokenizer("good film", return_tensors="pt")
    with torch.no_grad():
        wanted = model(row["input_ids"], row["attention_mask"]).sigmoid()[0].tolist()
    lines = [float(line.split("  ")[0]) for line in printed(final, text="good film")]
    assert lines == pytest.approx(sorted(wanted)[::-1], abs=1e-4) and sum(lines) != pytest.approx(1, abs=0.01)
    assert "none, one or several labels of: a, b, c." in (final / "README.md").read_text()


@pytest.mark.parametrize(
    ("kind", "method", "threshold"),
    [("llama", "lora", 1e30), ("llama", "lora", -1e30), ("gemma2", "full", None), ("bert", "lora", 1e30)],
)
def test_a_span_finder_prints_its_answer_or_that_there_is_none(kind, method, threshold, tmp_path):
    folder = tiny_model(kind)
    if kind == "bert":
        folder = str(model_copy(tmp_path / "base", kind))
        pair_tokenizer().save_pretrained(folder)
    tokenizer = load_tokenizer(folder, None)
    model = load_span_model(ModelSettings(folder, None, method), tokenizer)
    move_weights(model.eval())
    record = task_record("span", thresholds={"null_odds": threshold}, max_length=24, max_answer_length=3)
    final = saved(model, tokenizer, tmp_path / "final", record)
    context, question = "the bright film was not very good was a dull film", "was the film good"
    settings = QuestionSettings(max_length=24, doc_stride=4, max_answer_length=3, n_best=3)
    data = span_data(tokenizer, ask(context, (question, None)), settings, model.config)
    with torch.no_grad():
        records = data.scores(model, np.array([0]), torch.device("cpu"))
    (odds,), (answer,) = data.null_odds(records), data.best_texts(records)
    readme = (final / "README.md").read_text()
    assert (
        "# Extractive reader for questions\n" in readme
        and "Trained with zerotune.\n" in readme
        and "SQuAD" not in readme
    )
    (line,) = printed(final, question=question, context=context)
    assert float(re.search(r"odds of no answer: (.*)\)", line)[1]) == pytest.approx(odds, abs=1e-4)
    assert line.partition(" (odds")[0] == (answer if odds <= (threshold or 0.0) else "no answer")


def learned_by_heart(model, tokenizer, rows):
    """Train a generator until it continues the first part of each pair with the second, and stops there."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for _ in range(60):
        for before, answer in rows:
            ids = torch.tensor([before + answer])
            columns = torch.arange(len(before) - 1, ids.shape[1] - 1)
            logits = model(ids, torch.zeros_like(columns), columns)
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_generator_prints_the_label_that_it_writes(method, chat, tmp_path):
    """Label words have several tokens, one is a prefix of another, and the labels have different names."""
    folder = tmp_path / "base"
    character_model(folder, CHAT_TEMPLATE if chat else None)
    tokenizer = load_tokenizer(str(folder), None)
    model = load_generator(ModelSettings(str(folder), None, method), tokenizer)
    prompt = Prompt("Text: {text}\nKind:", ("spam", "spam, old", "ham"), chat)
    rows = []
    for text, word in (("buy", prompt.answers(tokenizer)[1]), ("hi", prompt.answers(tokenizer)[2])):
        asked = prompt.render(tokenizer, text)
        before = tokenizer(asked, add_special_tokens=not chat)["input_ids"]
        whole = tokenizer(asked + word, add_special_tokens=not chat)["input_ids"]
        rows.append((before, whole[len(before) :] + end_of_answer(tokenizer, prompt)))
    learned_by_heart(model, tokenizer, rows)
    record = task_record("generate", prompt=prompt_record(prompt), labels=["S", "O", "H"])
    final = saved(model, tokenizer, tmp_path / "final", record | ({"chat": chat_record(tokenizer)} if chat else {}))
    assert printed(final, text="buy") == ["O"] and printed(final, text="hi") == ["H"]


# Turns end with a special token that is not the tokenizer's eos; a model may write anything after it.
ENDS_TURNS = CHAT_TEMPLATE.replace("{{ turn.content }}", "{{ turn.content }}<unk>")


@pytest.mark.parametrize("template", [None, ENDS_TURNS], ids=["plain", "chat"])
def test_a_generator_prints_the_answer_to_a_question(template, tmp_path):
    folder = tmp_path / "base"
    character_model(folder, template)
    tokenizer = load_tokenizer(str(folder), None)
    model = load_generator(ModelSettings(str(folder), None, "full"), tokenizer)
    prompt = QuestionPrompt(chat=template is not None)
    end = end_of_answer(tokenizer, prompt.wording)
    assert end == [tokenizer.unk_token_id if template else tokenizer.eos_token_id]
    rows = []
    for question, answer in (("Who?", "monks"), ("Why?", "unanswerable")):
        prefix, before, after, space = prompt.parts(tokenizer)
        asked = tokenizer(f"{prefix} Built by monks.\n{before}{question}{after}", add_special_tokens=template is None)
        rows.append((asked["input_ids"], tokenizer(space + answer, add_special_tokens=False)["input_ids"] + end))
    learned_by_heart(model, tokenizer, rows)
    record = task_record("generate", task="squad", labels=None, prompt=question_prompt_record(prompt))
    record |= {"max_new_tokens": 16} | ({"chat": chat_record(tokenizer)} if template else {})
    final = saved(model, tokenizer, tmp_path / "final", record)
    assert printed(final, question="Who?", context="Built by monks.") == ["monks"]
    assert printed(final, question="Why?", context="Built by monks.") == ["no answer"]


def test_an_answer_without_a_label_is_shown(tmp_path):
    folder = tmp_path / "base"
    character_model(folder)
    tokenizer = load_tokenizer(str(folder), None)
    model = load_generator(ModelSettings(str(folder), None, "full"), tokenizer).eval()
    final = saved(model, tokenizer, tmp_path / "final", task_record("generate"))
    (line,) = printed(final, text="buy")
    assert line.startswith("no label: ")
