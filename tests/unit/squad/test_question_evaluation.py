"""Answers to questions from a model folder: as published, with shots, in 4 bits, and as it was tuned."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from squad_cases import make_questions
from tiny_models import CHAT_TEMPLATE, character_model

from zerotune.errors import Refused
from zerotune.evaluation.generation import end_tokens, write_answers
from zerotune.evaluation.scoring import BackOff
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_generator, load_language_model
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.groups import ModelSettings
from zerotune.squad.generation import encode_questions
from zerotune.squad.options import QuestionOptions
from zerotune.squad.prompts import QuestionPrompt, SolvedQuestion, question_prompt_record
from zerotune.squad.question_evaluation import answers_scorer, prepare_writing

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


def options_for(folder, **settings):
    return QuestionOptions(folder, None, "auto", "fp32", 400, **settings)


def written(folder, options):
    """What is written, and what transformers' own generation gives prompt by prompt."""
    models = []

    def load(*args):
        models.append(load_language_model(*args))
        return models[0]

    ready = prepare_writing(options, NEW, QUESTIONS, read_config(folder, None), CPU, load)
    assert sorted(np.concatenate(ready.batches).tolist()) == list(range(len(QUESTIONS))) and len(ready.batches) > 1
    by_item = {}
    for batch in ready.batches:
        by_item |= dict(zip(batch.tolist(), ready.score(batch), strict=True))
    tokenizer = load_tokenizer(folder, None)
    prompt = QuestionPrompt(ready.description["prompt_format"] == "chat", options.shots)
    data = encode_questions(tokenizer, prompt, QUESTIONS, 1024, 2048, NEW)
    rows = [data.prompt_tokens(row) for row in range(len(QUESTIONS))]
    ends = end_tokens(models[0], tokenizer, prompt.wording)
    expected = [write_answers(models[0], [row], data.pad_id, ends, NEW, CPU)[0] for row in rows]
    return ready, [by_item[number] for number in range(len(QUESTIONS))], [{"tokens": tokens} for tokens in expected]


@pytest.mark.parametrize("settings", [{}, {"load_4bit": True}, {"prompt_format": "chat"}, {"shots": SHOTS}])
def test_answers_are_those_of_transformers_generation(folder, settings):
    ready, found, expected = written(folder, options_for(folder, **settings))
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
    }
    save_final(model.eval(), tokenizer, tmp_path, record)
    ready = prepare_writing(options_for(str(tmp_path)), NEW, QUESTIONS, read_config(folder, None), CPU)
    assert (ready.description["setting"], ready.description["method"]) == ("tuned generator", method)
    assert ready.description["max_length"] == 400
    data = encode_questions(tokenizer, QuestionPrompt(), QUESTIONS, 400, 2048, NEW)
    expected = answers_scorer(model.stock_model, data, tokenizer, NEW, CPU)
    for batch in ready.batches:
        assert ready.score(batch) == expected(batch)


def test_a_model_that_cannot_be_told_what_branches_see_writes_prompt_by_prompt(folder, monkeypatch):
    tokenizer, model = load_tokenizer(folder, None), load_language_model(ModelSettings(folder), CPU)
    data = encode_questions(tokenizer, QuestionPrompt(), QUESTIONS, 400, 2048, NEW)
    rows = np.array([4, 0, 2])
    expected = answers_scorer(model, data, tokenizer, NEW, CPU)(rows)
    monkeypatch.setattr("zerotune.squad.question_evaluation.can_share", lambda *_: False)
    alone = answers_scorer(model, replace(data, shares=False), tokenizer, NEW, CPU)
    assert not hasattr(alone, "in_step")
    assert alone(rows) == expected


def test_prompt_by_prompt_too_a_model_writes_in_the_runs_precision(folder, monkeypatch):
    tokenizer, model = load_tokenizer(folder, None), load_language_model(ModelSettings(folder), CPU)
    data = encode_questions(tokenizer, QuestionPrompt(), QUESTIONS, 400, 2048, NEW)
    monkeypatch.setattr("zerotune.squad.question_evaluation.can_share", lambda *_: False)
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for precision in ("bf16", "fp32"):
        answers_scorer(model, replace(data, shares=False), tokenizer, NEW, CPU, precision)(np.array([0]))
        assert set(seen) == {precision == "bf16"}
        seen.clear()


def test_an_evaluation_that_runs_out_of_memory_goes_on_in_parts(folder):
    ready = prepare_writing(options_for(folder), NEW, QUESTIONS, read_config(folder, None), CPU)
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
        prepare_writing(options_for(folder, shots=SHOTS * 100), NEW, QUESTIONS, config, CPU, load)
    with pytest.raises(Refused, match="raise --max-length"):
        prepare_writing(options_for(folder, max_length=100), NEW, QUESTIONS, config, CPU, load)
