"""The flags of train/qa.py and eval/qa.py. Nothing here imports torch, so that `--help` answers at once."""

import argparse
from pathlib import Path

from zerotune.settings.argument_types import non_negative_int, positive_int
from zerotune.settings.flags import (
    add_data_flags,
    add_evaluation_flags,
    add_model_flags,
    add_optimisation_flags,
    add_prompt_format,
    add_run_flags,
    add_training_data_flags,
    add_training_method_flags,
    new_parser,
)

# In tokens: of a span head's windows (those of transformers' run_qa.py), and of a prompt with its written answer, of
# which longer ones are rare in SQuAD v2.
MAX_LENGTH, DOC_STRIDE, MAX_ANSWER_LENGTH, NUM_BEST = 384, 128, 30, 20
MAX_PROMPT_LENGTH, MAX_NEW_TOKENS = 1024, 48
RULES = ("official", "random", "80-20")
FILES = "json in SQuAD's form; also .gz"


def qa_train_parser(description: str) -> argparse.ArgumentParser:
    """The parser of train/qa.py."""
    parser = new_parser(description)
    add_model_flags(parser)
    heads = "span: two logits a token, where the answer starts and where it ends; generate: a causal model writes it"
    add_prompt_format(add_training_method_flags(parser, ("span", "generate"), heads))
    add_data_flags(parser, RULES, FILES)
    _add_length_flags(add_training_data_flags(parser), "default {}")
    add_optimisation_flags(parser, ("f1", "exact", "loss"))
    add_run_flags(parser)
    return parser


def qa_eval_parser(description: str) -> argparse.ArgumentParser:
    """The parser of eval/qa.py."""
    parser = new_parser(description)
    add_model_flags(parser)
    add_data_flags(parser, RULES, FILES, trains=False)
    group = add_evaluation_flags(parser, "of shots, of a head that is not trained, and of bootstraps")
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
        help="score a prediction file in the official form, {question id: answer}, without a model",
    )
    return parser


def _add_length_flags(group, default: str) -> None:
    """How questions are put before a model, and how long its answers are; None where a flag is not given."""
    helps = {
        "max-length": "tokens of a window, question and all; of a prompt with its answer where that is written "
        f"({default.format(f'{MAX_LENGTH}, {MAX_PROMPT_LENGTH}')})",
        "max-answer-length": f"span head: most tokens of an answer ({default.format(MAX_ANSWER_LENGTH)})",
        "n-best": f"span head: spans kept for each question ({default.format(NUM_BEST)})",
        "max-new-tokens": f"written answers: most tokens of one ({default.format(MAX_NEW_TOKENS)})",
    }
    for name, text in helps.items():
        group.add_argument(f"--{name}", type=positive_int, help=text)
    group.add_argument(
        "--doc-stride",
        type=non_negative_int,
        help=f"span head: tokens that neighbouring windows of a context share ({default.format(DOC_STRIDE)})",
    )
