"""The flags of train/qa.py and eval/qa.py. Nothing here imports torch, so that `--help` answers at once."""

import argparse
from pathlib import Path

from zerotune.argument_types import non_negative_int, positive_int
from zerotune.arguments import (
    add_data_flags,
    add_evaluation_flags,
    add_model_flags,
    add_optimisation_flags,
    add_run_flags,
    add_training_data_flags,
    add_training_method_flags,
    new_parser,
)

MAX_LENGTH, DOC_STRIDE, MAX_ANSWER_LENGTH, NUM_BEST = 384, 128, 30, 20
RULES = ("official", "random", "80-20")
FILES = "json in SQuAD's form; also .gz"


def qa_train_parser(description: str) -> argparse.ArgumentParser:
    """The parser of train/qa.py."""
    parser = new_parser(description)
    add_model_flags(parser)
    add_training_method_flags(parser, ("span",), "span: two logits a token, where the answer starts and where it ends")
    add_data_flags(parser, RULES, FILES)
    group = add_training_data_flags(parser)
    _add_span_flags(group, "default {}")
    add_optimisation_flags(parser, ("f1", "exact", "loss"))
    add_run_flags(parser)
    return parser


def qa_eval_parser(description: str) -> argparse.ArgumentParser:
    """The parser of eval/qa.py."""
    parser = new_parser(description)
    add_model_flags(parser)
    add_data_flags(parser, RULES, FILES)
    group = add_evaluation_flags(parser, "of a head that is not trained, and of bootstraps")
    _add_span_flags(group, "default: the model folder's, else {}")
    group.add_argument(
        "--score",
        type=Path,
        metavar="FILE",
        help="score a prediction file in the official form, {question id: answer}, without a model",
    )
    return parser


def _add_span_flags(group, default: str) -> None:
    """How questions are put before a span head; None where the flag is not given."""
    group.add_argument(
        "--max-length", type=positive_int, help=f"tokens of a window, question and all ({default.format(MAX_LENGTH)})"
    )
    group.add_argument(
        "--doc-stride",
        type=non_negative_int,
        help=f"tokens that neighbouring windows of a context share ({default.format(DOC_STRIDE)})",
    )
    group.add_argument(
        "--max-answer-length",
        type=positive_int,
        help=f"most tokens of an answer ({default.format(MAX_ANSWER_LENGTH)})",
    )
    group.add_argument("--n-best", type=positive_int, help=f"spans kept for each question ({default.format(NUM_BEST)})")
