"""Test the lengths of windows, prompts and answers by flag, model folder and default, and the flags of each head."""

import pytest

from zerotune.errors import Refused
from zerotune.settings.groups import PromptSettings, QuestionSettings
from zerotune.squad.settings import (
    SPAN_DEFAULTS,
    WRITING_DEFAULTS,
    qa_train_parser,
    refuse_other_heads_flags,
    resolve_questions,
)


def test_flags_win_over_the_folder_and_the_folder_over_defaults():
    given = QuestionSettings(doc_stride=0, n_best=3)
    record = {"max_length": 200, "max_answer_length": 9, "head": "span"}
    assert resolve_questions(given, True, 256, record) == QuestionSettings(
        max_length=200, doc_stride=0, max_answer_length=9, n_best=3
    )
    written = resolve_questions(QuestionSettings(max_length=100), False, 256, {"max_length": 200, "max_new_tokens": 7})
    assert written == QuestionSettings(max_length=100, max_new_tokens=7)


def test_defaults_fit_the_models_positions():
    assert resolve_questions(QuestionSettings(), True, None) == SPAN_DEFAULTS
    assert resolve_questions(QuestionSettings(), False, None) == WRITING_DEFAULTS
    assert [resolve_questions(QuestionSettings(), head, 256).max_length for head in (True, False)] == [256, 256]
    with pytest.raises(Refused, match="--max-length 257 is more than the model's 256 positions"):
        resolve_questions(QuestionSettings(max_length=257), True, 256)


def test_a_head_has_no_use_for_the_other_ones_flags():
    spans, plain = QuestionSettings(max_length=9, doc_stride=0), PromptSettings()
    refuse_other_heads_flags(spans, plain, True, "m")
    refuse_other_heads_flags(QuestionSettings(max_length=9, max_new_tokens=3), PromptSettings(2), False, "m")
    with pytest.raises(Refused, match="m has no use for --doc-stride: leave it out"):
        refuse_other_heads_flags(spans, plain, False, "m")
    with pytest.raises(Refused, match="m has no use for --max-new-tokens, --prompt-format, --shots: leave it out"):
        refuse_other_heads_flags(QuestionSettings(max_new_tokens=3), PromptSettings(2, format="chat"), True, "m")


def test_questions_have_no_class_weights(capsys):
    assert qa_train_parser("").parse_args(["--label-smoothing", "0.1", "--schedule", "cosine"]).label_smoothing == 0.1
    with pytest.raises(SystemExit):
        qa_train_parser("").parse_args(["--class-weights", "balanced"])
    assert "--class-weights" in capsys.readouterr().err
