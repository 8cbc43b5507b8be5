"""The flags of train/qa.py and eval/qa.py, and their defaults. Imports no torch, so that `--help` is fast."""

from dataclasses import fields, replace
from pathlib import Path

from zerotune.errors import Refused
from zerotune.settings.argument_types import non_negative_int, positive_int
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.flags import (
    EVAL_DEFAULT,
    TRAIN_DEFAULT,
    add_data_flags,
    add_evaluation_flags,
    add_model_flags,
    add_optimisation_flags,
    add_prompt_format,
    add_run_flags,
    add_training_data_flags,
    add_training_method_flags,
)
from zerotune.settings.groups import PromptSettings, QuestionSettings
from zerotune.settings.train_parser import TrainParser

# Defaults of a span head, from transformers' run_qa.py; lengths are in tokens.
SPAN_DEFAULTS = QuestionSettings(max_length=384, doc_stride=128, max_answer_length=30, n_best=20)
# Defaults of a model that writes its answers, in tokens: few prompts of SQuAD v2 with their answers are longer.
WRITING_DEFAULTS = QuestionSettings(max_length=1024, max_new_tokens=48)
RULES = ("official", "random", "80-20")
FILES = "json in SQuAD's format; also .gz"


def qa_train_parser(description: str) -> TrainParser:
    """Build the parser of train/qa.py."""
    parser = TrainParser("squad", description)
    add_model_flags(parser, TRAIN_DEFAULT, trains=True)
    heads = "span: two logits a token, for the answer's first and last token; generate: a causal model writes it"
    add_prompt_format(add_training_method_flags(parser, ("span", "generate"), heads))
    add_data_flags(parser, RULES, FILES)
    _add_length_flags(add_training_data_flags(parser), "default {}")
    add_optimisation_flags(parser, ("f1", "exact", "loss"))
    add_run_flags(parser)
    return parser


def qa_eval_parser(description: str) -> FlagParser:
    """Build the parser of eval/qa.py."""
    parser = FlagParser(description)
    add_model_flags(parser, EVAL_DEFAULT)
    add_data_flags(parser, RULES, FILES, trains=False)
    group = add_evaluation_flags(parser, "seed of shots, of a head that is not trained, and of bootstraps")
    _add_length_flags(group, "default: the model folder's, else {}")
    prompts = parser.add_argument_group("prompt (models that write their answers)")
    prompts.add_argument(
        "--shots", type=non_negative_int, default=0, help="solved questions in the prompt (default %(default)s)"
    )
    add_prompt_format(prompts)
    group.add_argument(
        "--score",
        type=Path,
        metavar="FILE",
        help="score a prediction file in the official format, {question id: answer}, without a model; results go to "
        "runs/score-NAME unless --output-dir names another folder",
    )
    return parser


def _add_length_flags(group, default: str) -> None:
    """Add the flags of QuestionSettings; a flag that is not given is None."""
    spans, writing = SPAN_DEFAULTS, WRITING_DEFAULTS
    helps = {
        "max-length": "tokens of a window with its question; of a prompt with its answer where that is written "
        f"({default.format(f'{spans.max_length}, {writing.max_length}')})",
        "max-answer-length": f"span head: most tokens of an answer ({default.format(spans.max_answer_length)})",
        "n-best": f"span head: spans kept for each question ({default.format(spans.n_best)})",
        "max-new-tokens": f"written answers: most tokens of one ({default.format(writing.max_new_tokens)})",
    }
    for name, text in helps.items():
        group.add_argument(f"--{name}", type=positive_int, help=text)
    group.add_argument(
        "--doc-stride",
        type=non_negative_int,
        help=f"span head: tokens that neighbouring windows of a context share ({default.format(spans.doc_stride)})",
    )


def resolve_questions(
    given: QuestionSettings, is_span_head: bool, most_tokens: int | None, record: dict | None = None
) -> QuestionSettings:
    """Fill in the lengths that the flags leave open, from the model folder's task.json or else from the defaults.

    Args:
        is_span_head: whether the model finds spans; otherwise it writes its answers.
        most_tokens: tokens that fit the model's positions; None: no limit.
        record: content of task.json, or None.
    Raises:
        Refused: --max-length is more than the model's positions.
    """
    defaults = SPAN_DEFAULTS if is_span_head else WRITING_DEFAULTS
    if most_tokens is not None:
        defaults = replace(defaults, max_length=min(defaults.max_length, most_tokens))
    names = [each.name for each in fields(QuestionSettings) if getattr(defaults, each.name) is not None]
    known = {name: value for name, value in (record or {}).items() if name in names}
    wanted = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    resolved = replace(defaults, **known | wanted)
    if most_tokens is not None and resolved.max_length > most_tokens:
        raise Refused(f"--max-length {resolved.max_length} is more than the model's {most_tokens} positions: lower it")
    return resolved


def refuse_other_heads_flags(
    questions: QuestionSettings, prompt: PromptSettings, is_span_head: bool, subject: str
) -> None:
    """Refuse the flags that only the other head uses; `subject` names this head or its model in the message."""
    if is_span_head:
        given = {
            "--max-new-tokens": questions.max_new_tokens is not None,
            "--prompt-format": prompt.format != "auto",
            "--shots": prompt.shots > 0,
        }
    else:
        given = {
            "--doc-stride": questions.doc_stride is not None,
            "--max-answer-length": questions.max_answer_length is not None,
            "--n-best": questions.n_best is not None,
        }
    unused = [flag for flag, is_given in given.items() if is_given]
    if unused:
        raise Refused(f"{subject} has no use for {', '.join(unused)}: leave it out")
