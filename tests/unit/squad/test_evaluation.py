"""Test answering questions from a model folder: as published, with shots, in 4 bits, and tuned."""

import numpy as np
import pytest
import torch
from squad_cases import make_questions
from tiny_models import CHAT_TEMPLATE, character_model, task_record, tiny_model

from zerotune.errors import Refused
from zerotune.evaluation.generation import end_tokens, write_answers
from zerotune.evaluation.scoring import BackOff
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_generator, load_language_model
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.groups import ModelSettings, PromptSettings, QuestionSettings
from zerotune.squad.evaluation import QuestionEvaluation, check_evaluation, prepare_writing, span_reader
from zerotune.squad.generation import encode_questions
from zerotune.squad.prompts import QuestionPrompt, SolvedQuestion, question_prompt_record
from zerotune.squad.questions import Paragraph, Question
from zerotune.squad.spans import SpanData
from zerotune.squad.writing import first_line, writing_scorer

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("plain_four_bits")

NEW, QUESTIONS = 8, make_questions()
SHOTS = (
    SolvedQuestion("s", "The door is blue.", "What is blue?", "The door"),
    SolvedQuestion("t", "The sea is wide.", "Who swims?", ""),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("letters")
    character_model(path, CHAT_TEMPLATE)
    return str(path)


def evaluation_of(folder, method="full", prompt_format="auto", shots=(), max_length=None):
    return QuestionEvaluation(
        model=ModelSettings(folder, method=method),
        questions=QuestionSettings(max_length, max_new_tokens=NEW),
        prompt=PromptSettings(len(shots), format=prompt_format),
        tokens_per_device=400,
        shots=shots,
    )


def written(folder, evaluation):
    """Return the written answers, and those that transformers' own generation gives one prompt at a time."""
    models = []

    def load(*args):
        models.append(load_language_model(*args))
        return models[0]

    ready = prepare_writing(evaluation, QUESTIONS, read_config(folder, None), CPU, load)
    assert sorted(np.concatenate(ready.batches).tolist()) == list(range(len(QUESTIONS))) and len(ready.batches) > 1
    by_item = {}
    for batch in ready.batches:
        by_item |= dict(zip(batch.tolist(), ready.score(batch), strict=True))
    tokenizer = load_tokenizer(folder, None)
    prompt = QuestionPrompt(ready.description["prompt_format"] == "chat", evaluation.shots)
    data = encode_questions(tokenizer, prompt, QUESTIONS, 1024, 2048, NEW)
    rows = [data.prompt_tokens(row) for row in range(len(QUESTIONS))]
    ends = end_tokens(models[0], tokenizer, prompt.wording)
    whole = [write_answers(models[0], [row], data.pad_id, ends, NEW, CPU)[0] for row in rows]
    expected = [first_line(tokenizer, tokens) for tokens in whole]
    return ready, [by_item[number] for number in range(len(QUESTIONS))], [{"tokens": tokens} for tokens in expected]


@pytest.mark.parametrize("settings", [{}, {"method": "qlora"}, {"prompt_format": "chat"}, {"shots": SHOTS}])
def test_answers_are_those_of_transformers_generation(folder, settings):
    ready, found, expected = written(folder, evaluation_of(folder, **settings))
    assert found == expected
    assert ready.description["setting"] == ("2-shot prompt" if "shots" in settings else "zero-shot prompt")
    assert ready.description["shares_paragraphs"] and ready.description["max_length"] == 1024
    assert len(ready.read(found).texts) == len(QUESTIONS)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_tuned_model_is_asked_as_it_was_trained(folder, method, tmp_path):
    tokenizer = load_tokenizer(folder, None)
    model = load_generator(ModelSettings(folder, None, method), tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    record = {
        "task": "squad",
        "head": "generate",
        "prompt": question_prompt_record(QuestionPrompt()),
        "seed": 0,
        "training_sha256": "x",
        "max_length": 400,
        "labels": None,
        "thresholds": None,
    }
    save_final(model.eval(), tokenizer, tmp_path, record)
    ready = prepare_writing(evaluation_of(str(tmp_path)), QUESTIONS, read_config(folder, None), CPU)
    assert (ready.description["setting"], ready.description["method"]) == ("tuned generator", method)
    assert ready.description["max_length"] == 400
    data = encode_questions(tokenizer, QuestionPrompt(), QUESTIONS, 400, 2048, NEW)
    expected = writing_scorer(model.stock_model, data, tokenizer, NEW, CPU)
    for batch in ready.batches:
        assert ready.score(batch) == expected(batch)


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_parts(folder):
    ready = prepare_writing(evaluation_of(folder), QUESTIONS, read_config(folder, None), CPU)
    batch = max(ready.batches, key=len)

    def score(rows):
        if len(rows) > 1:
            raise MemoryError
        return ready.score(rows)

    assert BackOff(score, ready.costs)(batch) == ready.score(batch)


def test_what_does_not_fit_is_refused_before_a_weight_is_loaded(folder):
    def load(*_):
        raise AssertionError("a weight was loaded")

    config = read_config(folder, None)
    with pytest.raises(Refused, match="use fewer --shots"):
        prepare_writing(evaluation_of(folder, shots=SHOTS * 100), QUESTIONS, config, CPU, load)
    with pytest.raises(Refused, match="raise --max-length"):
        prepare_writing(evaluation_of(folder, max_length=100), QUESTIONS, config, CPU, load)


# --- settings, flags, and the answers of a span head ---


def test_the_settings_as_metrics_json_has_them():
    evaluation = evaluation_of("m", "qlora", "plain", SHOTS, max_length=300)
    assert evaluation.described() == {
        "model": "m", "revision": None, "attention": "auto", "dtype": "fp32", "load_4bit": True, "seed": 0,
        "tokens_per_device": 400, "max_length": 300, "doc_stride": None, "max_answer_length": None, "n_best": None,
        "max_new_tokens": NEW, "prompt_format": "plain", "shots": 2, "data_sha256": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "questions", "prompt", "said"),
    [
        ("llama", {"n_best": 3}, {}, "llama, which writes its answers, has no use for --n-best: leave it out"),
        ("bert", {}, {"shots": 2}, "bert, which answers with a span head, has no use for --shots: leave it out"),
        ("bert", {"max_length": 999}, {}, "--max-length 999 is more than the model's"),
        ("llama", {}, {"format": "chat"}, "has no chat template"),
    ],
)
def test_flags_that_a_model_cannot_use_are_refused(tmp_path, kind, questions, prompt, said):
    folder = tiny_model(kind)
    evaluation = QuestionEvaluation(
        model=ModelSettings(folder),
        questions=QuestionSettings(**questions),
        prompt=PromptSettings(**prompt),
        tokens_per_device=400,
    )
    with pytest.raises(Refused, match=said):
        check_evaluation(tmp_path, evaluation, QUESTIONS, read_config(folder, None), load_tokenizer(folder, None))


def test_a_tuned_generator_has_its_own_prompt(folder, tmp_path):
    tokenizer = load_tokenizer(folder, None)
    prompt = question_prompt_record(QuestionPrompt())
    record = task_record("generate", task="squad", labels=None, prompt=prompt)
    save_final(load_generator(ModelSettings(folder), tokenizer), tokenizer, tmp_path, record)
    config = read_config(folder, None)
    for given in ({"shots": SHOTS}, {"prompt_format": "chat"}):
        with pytest.raises(Refused, match="a prompt of its own, without shots and in the plain format"):
            check_evaluation(tmp_path, evaluation_of(str(tmp_path), **given), QUESTIONS, config, tokenizer)


def test_a_span_head_abstains_above_its_threshold():
    paragraph = Paragraph("T", 0, "Hook Head tower")
    asked = [Question(f"q{number}", "Who?", paragraph, ()) for number in range(4)]
    spans = [[2.0, 0, 4], [1.0, 5, 9]]
    records = [{"null": null, "spans": spans[:count]} for null, count in ((2.5, 2), (2.6, 1), (9.0, 2), (1.0, 0))]
    predicted = span_reader(SpanData(asked, None, 0, 20, 30), threshold=0.55)(records)
    assert predicted.texts == ["Hook", "", "", ""] and predicted.before_threshold == ["Hook", "Hook", "Hook", ""]
    assert predicted.details["null_odds"][:3] == pytest.approx([0.5, 0.6, 7.0]) and predicted.null_odds[3] > 1e29
    assert predicted.details["n_best"][1] == [{"text": "Hook", "start": 0, "score": 2.0}]
    assert [len(each) for each in predicted.details["n_best"]] == [2, 1, 2, 0]
