"""Test training on SQuAD: the validation split's threshold, refusals for a head, and the contents of task.json."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from default_settings import optimisation_settings, run_settings
from span_cases import make_questions
from transformers import AutoConfig

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings, ModelSettings, PromptSettings, QuestionSettings, TrainSettings
from zerotune.squad.prompts import QuestionPrompt
from zerotune.squad.spans import SpanData
from zerotune.squad.training import check_head, span_values, task_record


def records_of(odds):
    """Return records of questions answered "Hook", "tower", "Head" and not at all, with these null odds."""
    spans = [[[0.0, 0, 4]], [[0.0, 10, 15]], [[0.0, 5, 9]], []]
    return [{"null": each, "loss": 2.0, "spans": best} for each, best in zip(odds, spans, strict=True)]


def test_the_threshold_is_the_best_for_the_metric_that_chooses():
    # q1's span is half right: F1 gains by answering it, unless q2, which has no answer, would be answered before it
    asked = make_questions(["Hook"], ["tower tower Hook"], [], [])
    data = SpanData(asked, SimpleNamespace(window_offsets=range(5)), 0, 20, 30)
    records = records_of([-2.0, 0.5, 0.0, 3.0])
    expected = {"loss": 2.0, "exact": 75.0, "f1": 75.0, "threshold": -1.0}
    assert span_values(data, records, "f1", True) == span_values(data, records, "loss", True) == expected
    late = records_of([-2.0, 0.5, 1.0, 3.0])
    by_f1, by_exact = (span_values(data, late, name, True) for name in ("f1", "exact"))
    assert by_f1["threshold"] == 0.75 and by_f1["f1"] == pytest.approx(100 * (3 + 0.5) / 4)
    assert by_exact["threshold"] == 0.75 and by_exact["exact"] == 75.0, "q1 costs nothing: of equal ones, most answers"


def settings_of(head, tmp_path, questions=None, prompt=None, head_learning_rate=None):
    return TrainSettings(
        task="squad",
        head=head,
        model=ModelSettings("m"),
        data=DataSettings(),
        optimisation=optimisation_settings(head_learning_rate=head_learning_rate),
        run=run_settings(tmp_path),
        questions=questions or QuestionSettings(),
        prompt=prompt or PromptSettings(),
    )


def config_of(kind):
    return AutoConfig.for_model(kind, max_position_embeddings=256)


def test_a_head_has_the_lengths_of_its_kind(tmp_path):
    lengths = check_head(settings_of("span", tmp_path), config_of("bert"), None)
    assert lengths == QuestionSettings(max_length=256, doc_stride=128, max_answer_length=30, n_best=20)
    given = settings_of("generate", tmp_path, QuestionSettings(max_length=100, max_new_tokens=7))
    assert check_head(given, config_of("llama"), None) == QuestionSettings(max_length=100, max_new_tokens=7)


@pytest.mark.parametrize(
    ("head", "kind", "questions", "rate", "said"),
    [
        ("generate", "bert", {}, None, "needs a causal model, and m is an encoder: use --head span"),
        ("generate", "llama", {}, 0.1, "--head-learning-rate is for --head span"),
        ("generate", "llama", {"n_best": 3}, None, "--head generate has no use for --n-best"),
        ("span", "llama", {"max_new_tokens": 3}, None, "--head span has no use for --max-new-tokens"),
        ("span", "llama", {"max_length": 257}, None, "--max-length 257 is more than the model's 256 positions"),
    ],
)
def test_a_head_that_the_model_cannot_have_is_refused(tmp_path, head, kind, questions, rate, said):
    settings = settings_of(head, tmp_path, QuestionSettings(**questions), head_learning_rate=rate)
    with pytest.raises(Refused, match=said):
        check_head(settings, config_of(kind), None)


def test_written_answers_are_not_packed(tmp_path):
    settings = settings_of("generate", tmp_path)
    packed = replace(settings, model=replace(settings.model, attention="varlen"))
    with pytest.raises(Refused, match="--attention varlen is for --head span"):
        check_head(packed, config_of("llama"), None)


def test_the_record_keeps_lengths_and_threshold_or_prompt(tmp_path):
    spans = QuestionSettings(max_length=9, doc_stride=2, max_answer_length=3, n_best=4)
    assert task_record(settings_of("span", tmp_path), spans, None, {"eval_threshold": 0.5}) == {
        "task": "squad", "head": "span", "labels": None, "prompt": None, "thresholds": {"null_odds": 0.5},
        "max_length": 9, "doc_stride": 2, "max_answer_length": 3, "n_best": 4,
    }  # fmt: skip
    lengths, train = QuestionSettings(max_length=9, max_new_tokens=5), SimpleNamespace(prompt=QuestionPrompt())
    record = task_record(settings_of("generate", tmp_path), lengths, train, {})
    assert record["prompt"]["format"] == "plain" and record["thresholds"] is None
    assert (record["max_length"], record["max_new_tokens"]) == (9, 5) and "n_best" not in record
