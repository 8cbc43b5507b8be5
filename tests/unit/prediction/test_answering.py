"""Test turning scores into answers and probabilities, and how a model's folder determines its way to answer."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from tiny_models import character_model, model_copy, task_record, tiny_model, tuned_model

from zerotune.errors import Refused
from zerotune.models.final_folder import save_final
from zerotune.prediction.answering import answer_chunk, answerer_of, label_columns, label_set_columns, span_columns
from zerotune.prediction.inputs import Item
from zerotune.prediction.settings import InputSettings, PredictSettings
from zerotune.settings.groups import DataSettings, ModelSettings
from zerotune.tasks.row_stream import Row

CPU = torch.device("cpu")


def settings(model, **changes):
    values = {
        "source": InputSettings(texts=("a",)),
        "labels": None,
        "max_length": None,
        "prompt_format": "auto",
        "output": None,
        "top_k": 1,
        "prefix": "",
        "tokens_per_device": 2048,
    }
    return PredictSettings(ModelSettings(str(model)), **values | changes)


def answers(model, items, **changes):
    """Return a model's answers to items (tuples of texts)."""
    answerer = answerer_of(settings(model, **changes))
    items = [Item(texts, f"row {number}") for number, texts in enumerate(items)]
    answerer.check(items)
    return answer_chunk(answerer.load(CPU)(items), CPU, lambda: False)


# --- arithmetic ---


def test_labels_are_ranked_by_probability():
    scores = np.log(np.array([[0.2, 0.5, 0.3], [0.4, 0.2, 0.4]], np.float32))
    first, second = label_columns(scores, ("a", "b", "c"), 2)
    top = [{"label": "b", "probability": 0.5}, {"label": "c", "probability": 0.3}]
    assert first == {"prediction": "b", "probability": 0.5, "top_k": top}
    assert [each["label"] for each in second["top_k"]] == ["a", "c"]  # a tie goes to the first label
    assert label_columns(scores, ("a", "b", "c"), 1)[0] == {"prediction": "b", "probability": 0.5}


def test_labels_that_are_decided_one_by_one():
    scores = np.log(np.array([[0.9, 0.6, 0.1], [0.4, 0.5, 0.2]], np.float32))
    several, none = label_set_columns(scores, ("a", "b", "c"), 2, ";", 0.5)
    assert several["prediction"] == "a;b" and several["probability"] == pytest.approx(0.9 * 0.6 * 0.9, abs=1e-6)
    assert [each["label"] for each in several["top_k"]] == ["a", "b"]
    assert none["prediction"] == "" and none["probability"] == pytest.approx(0.6 * 0.5 * 0.8, abs=1e-6)


def test_no_answer_competes_with_the_spans():
    spans = [{"text": "x", "start": 4, "score": 2.0}, {"text": "y", "start": 9, "score": 1.0}]
    total = math.exp(3.0) + math.exp(2.0) + math.exp(1.0)
    none, best, other = (round(math.exp(score) / total, 6) for score in (3.0, 2.0, 1.0))
    abstaining = span_columns(3.0, spans, True, 2)
    assert (abstaining["prediction"], abstaining["probability"], abstaining["no_answer_probability"]) == (
        "",
        none,
        none,
    )
    assert [(each["answer"], each["start"], each["probability"]) for each in abstaining["top_k"]] == [
        ("x", 4, best),
        ("y", 9, other),
    ]
    assert span_columns(3.0, spans, False, 1) == {"prediction": "x", "probability": best, "no_answer_probability": none}
    assert span_columns(-5.0, [], False, 1) == {"prediction": "", "probability": 1.0, "no_answer_probability": 1.0}


def test_a_written_answer_has_the_likelihood_of_its_tokens(tmp_path):
    """So has "no answer", for two questions about one context and one about another."""
    from transformers import AutoModelForCausalLM

    from zerotune.models.pretrained import read_config
    from zerotune.prediction.answering import _questions
    from zerotune.squad.evaluation import QuestionEvaluation, plan_writing
    from zerotune.squad.questions import GoldAnswer

    character_model(tmp_path / "model")
    items = [("Who?", "A good man came."), ("When?", "A good man came."), ("Why?", "It was late then.")]
    evaluation = settings(tmp_path / "model", source=InputSettings(question="q", context="c"))
    answerer = answerer_of(evaluation)
    answering = answerer.load(CPU)([Item(item, "") for item in items])
    with torch.no_grad():
        records = answering.score(np.array([2, 0, 1]))
    rows = answering.read(records)
    plan = plan_writing(answerer.evaluation, read_config(str(tmp_path / "model"), None))
    assert isinstance(answerer.evaluation, QuestionEvaluation)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()

    def likelihood(question, answer):
        gold = (GoldAnswer(answer, 0),) if answer else ()
        data = plan.encode([type(question)(question.id, question.text, question.paragraph, gold)])
        prompt, own = data.prompt_tokens(0), list(data.answers[0])
        assert plan.tokenizer.decode(own[-1:]) == "\n"  # an untuned model ends a plain answer so
        with torch.no_grad():
            logits = model(torch.tensor([prompt + own])).logits[0].log_softmax(-1)
        return sum(logits[len(prompt) - 1 + place, token].item() for place, token in enumerate(own))

    first, second, third = _questions([Item(item, "") for item in items])
    for question, record, row in zip((third, first, second), records, rows, strict=True):
        assert -record["no_answer_loss"] == pytest.approx(likelihood(question, ""), abs=1e-3)
        assert -record["loss"] == pytest.approx(likelihood(question, row["prediction"]), abs=1e-3)
        assert row["probability"] == round(math.exp(-record["loss"]), 6)


# --- what a folder says ---


def test_a_pair_is_read_as_it_was_tuned(tmp_path):
    """A causal model's pair is one text with the run's column names, whatever the new file calls them."""
    final = tmp_path / "final"
    final.mkdir()
    save_final(*tuned_model(tiny_model("llama"), "full"), final, task_record(task="classify"))
    of_run = {"sample": False, "text_column": "subject,body", "split_seed": 0}
    record = {"task": "classify", "splits": {}, "sources": {"train": {"sha256": "0"}}}
    record["settings"] = asdict(DataSettings(**of_run))
    (tmp_path / "split.json").write_text(json.dumps(record))
    answerer = answerer_of(settings(final))
    assert answerer.wanted == (("subject",), ("body",))
    renamed = answerer_of(settings(final, source=InputSettings(file="x.csv", columns=("title", "text"))))
    assert renamed.wanted == (("title",), ("text",))
    example = renamed._example(Item(("one", "two"), "row 1"))
    assert example.text == "subject: one\nbody: two" and example.pair == ("one", "two")
    with pytest.raises(Refused, match="was tuned on subject and body: name two columns"):
        answerer_of(settings(final, source=InputSettings(file="x.csv", columns=("text",))))


def test_an_encoder_without_a_head_and_a_lone_label_are_refused(tmp_path):
    with pytest.raises(Refused, match="has no trained head"):
        answerer_of(settings(tiny_model("bert")))
    names = {"architectures": ["BertForSequenceClassification"], "problem_type": "multi_label_classification"}
    several = model_copy(tmp_path / "several", "bert", **names)
    assert answerer_of(settings(several)).task.multi_label
    one = model_copy(tmp_path / "one", "bert", architectures=["BertForSequenceClassification"], id2label={"0": "x"})
    with pytest.raises(Refused, match="wanted two or more different labels, found 'x'"):
        answerer_of(settings(one))


def test_flags_that_a_model_has_no_use_for_are_refused(tmp_path):
    character_model(tmp_path / "model")
    asked = InputSettings(question="q", context="c")
    for changes, reason in (
        ({"source": asked, "top_k": 2}, "writes one answer"),
        ({"source": asked, "labels": ("a", "b")}, "is asked questions"),
        ({"labels": ("a", "a")}, "two or more different labels"),
        ({"labels": ("a", "b"), "prompt_format": "chat"}, "has no chat template"),
        ({}, "name the labels that it chooses from"),
        ({"labels": ("a", "b"), "top_k": 3}, "more than the 2 labels"),
    ):
        with pytest.raises(Refused, match=reason):
            answerer_of(settings(tmp_path / "model", **changes))


def test_a_chunk_ends_where_the_run_is_asked_to_stop(tmp_path):
    character_model(tmp_path / "model")
    answerer = answerer_of(settings(tmp_path / "model", labels=("a", "b"), tokens_per_device=1))
    answering = answerer.load(CPU)([Item((text,), text) for text in "xyz"])
    assert len(answering.batches) == 3
    asked = iter([False, True])
    assert answer_chunk(answering, CPU, lambda: next(asked)) is None


@pytest.mark.parametrize(("kind", "method"), [("bert", "full"), ("bert", "lora"), ("llama", "lora")])
def test_a_tuned_head_answers_as_it_did_before_it_was_saved(tmp_path, kind, method):
    model, tokenizer = tuned_model(tiny_model(kind), method)
    save_final(model, tokenizer, tmp_path, task_record())
    texts = ["the film was good", "a bad film", "dull"]
    rows = answers(tmp_path, [(text,) for text in texts], top_k=2)
    for text, row in zip(texts, rows, strict=True):
        inputs = {name: torch.tensor([ids]) for name, ids in tokenizer(text).items()}
        with torch.no_grad():
            wanted = model(**inputs).softmax(-1)[0].tolist()
        found = {each["label"]: each["probability"] for each in row["top_k"]}
        assert [found["negative"], found["positive"]] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("is_tuned", [False, True])
def test_a_causal_model_answers_by_the_likelihood_of_the_labels(tmp_path, is_tuned):
    """A published model gets the prompt for the user's own labels, a tuned one the prompt in task.json."""
    character_model(tmp_path / "base")
    folder, labels, words = tmp_path / "base", ("ham", "junk mail"), ("ham", "junk mail")
    prompt = "Give each text one of these labels: ham, junk mail.\n\nText: {text}\nLabel:"
    model, tokenizer = tuned_model(str(folder), "full", "generate")
    if is_tuned:
        folder, labels, words, prompt = tmp_path / "final", None, ("negative", "positive"), "Review: {text}"
        folder.mkdir()
        save_final(model, tokenizer, folder, task_record("generate", max_length=200))
    else:
        from transformers import AutoModelForCausalLM

        model.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = ["a good film", "x"]
    rows = answers(folder, [(text,) for text in texts], labels=labels, top_k=2)
    for text, row in zip(texts, rows, strict=True):
        sums = []
        for word in words:
            before = tokenizer(prompt.replace("{text}", text))["input_ids"]
            own = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model.model(torch.tensor([before + own])).logits[0].log_softmax(-1)
            sums.append(sum(logits[len(before) - 1 + place, token] for place, token in enumerate(own)))
        found = {each["label"]: each["probability"] for each in row["top_k"]}
        assert [found[word] for word in words] == pytest.approx(torch.stack(sums).softmax(0).tolist(), abs=1e-5)


def test_a_review_loses_its_markup(tmp_path):
    save_final(*tuned_model(tiny_model("bert"), "full"), tmp_path, task_record(task="imdb"))
    reader = answerer_of(settings(tmp_path)).reader(("review",))
    assert reader.item(Row({"review": " good<br /><br />film"}, "")).texts == ("good\nfilm",)
    assert reader.item(Row({"review": "<br />"}, "")) is None
