"""The flags of eval/predict.py, and the settings that they resolve to. Imports no torch, so that `--help` is fast."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

from zerotune.errors import Refused
from zerotune.prediction.output import check_output
from zerotune.settings.argument_types import non_empty, positive_int
from zerotune.settings.flag_parser import FlagParser
from zerotune.settings.flags import add_model_flags, add_prompt_format
from zerotune.settings.groups import ModelSettings
from zerotune.settings.names import check_names_model, final_of_run
from zerotune.settings.precision import resolve_precision
from zerotune.settings.resolve import EVAL_TOKENS, tokens_per_device
from zerotune.tasks.classify import named_columns
from zerotune.tasks.files import reading_file
from zerotune.tasks.row_stream import STANDARD_INPUT, STREAM_KINDS


@dataclass(frozen=True)
class InputSettings:
    """Input of predictions: texts, or one question and its context, or the rows of a file.

    Attributes:
        file: a path, or "-" for standard input.
        kind: one of STREAM_KINDS; None: by the file's name.
        columns: of the text, of a pair of texts, or of question and context; None: the model's.
    """

    texts: tuple[str, ...] = ()
    question: str | None = None
    context: str | None = None
    file: str | None = None
    kind: str | None = None
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class PredictSettings:
    """The settings of eval/predict.py.

    Attributes:
        labels: those that a causal model without a head chooses from; None: the model's own.
        max_length: in tokens; None: the model folder's, else the default.
        output: None: standard output.
        top_k: how many answers a row gets; above 1, they have a column of their own.
        prefix: put before the names of the new columns.
        tokens_per_device: most padded tokens in one forward pass on one device.
    """

    model: ModelSettings
    source: InputSettings
    labels: tuple[str, ...] | None
    max_length: int | None
    prompt_format: str
    output: Path | None
    top_k: int
    prefix: str
    tokens_per_device: int

    @property
    def resumes(self) -> bool:
        """Whether the same command continues where an earlier one was interrupted."""
        return self.output is not None and is_read_again(self.source)


def predict_parser(description: str) -> FlagParser:
    """Build the parser of eval/predict.py."""
    parser = FlagParser(description)
    add_model_flags(parser, None)
    group = parser.add_argument_group("model, prediction")
    group.add_argument("--load-4bit", action="store_true", help="load the backbone in NF4 (bitsandbytes)")
    group.add_argument(
        "--labels", nargs="+", type=non_empty, metavar="LABEL", help="labels for a causal model without a head"
    )
    add_prompt_format(group)
    group.add_argument(
        "--max-length",
        type=positive_int,
        help="most tokens of a text, or of a question's window or prompt (default: the model folder's, else 256; for "
        "questions 384, or 1024 if the answer is written)",
    )
    group.add_argument(
        "--tokens-per-device",
        type=positive_int,
        help="most padded tokens in one forward pass on one device (default: 16384, on a CPU 2048)",
    )
    group = parser.add_argument_group("input")
    group.add_argument("texts", nargs="*", metavar="TEXT", help="texts to predict")
    group.add_argument("--question", help="a question, for a model that answers questions")
    group.add_argument("--context", help="the text that the question is about")
    group.add_argument(
        "--file",
        type=non_empty,
        help="txt (a text per line), csv, tsv, jsonl, each also .gz, or parquet; -: standard input",
    )
    group.add_argument(
        "--format", choices=STREAM_KINDS, help="of --file (default: by its name; txt for standard input)"
    )
    group.add_argument(
        "--text-column",
        type=non_empty,
        metavar="A[,B]",
        help="column of the texts; two of a pair, or of question and context (default: the model's)",
    )
    group = parser.add_argument_group("output")
    group.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="csv, tsv, jsonl, each also .gz, or parquet (default: print jsonl, or readable lines for the texts of the "
        "command line)",
    )
    group.add_argument(
        "--top-k", type=positive_int, default=1, help="likeliest answers of each row (default %(default)s)"
    )
    group.add_argument("--prefix", default="", help="put before the names of the new columns (default: nothing)")
    return parser


def predict_settings(args: argparse.Namespace) -> PredictSettings:
    """Resolve the flags.

    Raises:
        Refused: the model is missing or its run not finished, there is not exactly one input, the input does not exist,
            the output does, or the precision is not available.
    """
    check_names_model(args.model)
    source = _input_settings(args)
    if args.output is not None:
        check_output(args.output)  # the job checks an earlier start's partial output
    return PredictSettings(
        model=ModelSettings(
            final_of_run(args.model),
            args.revision,
            "qlora" if args.load_4bit else "full",
            attention=args.attention,
            precision=resolve_precision(args.precision, None),
        ),
        source=source,
        labels=args.labels and tuple(args.labels),
        max_length=args.max_length,
        prompt_format=args.prompt_format,
        output=args.output,
        top_k=args.top_k,
        prefix=args.prefix,
        tokens_per_device=tokens_per_device(args.tokens_per_device, EVAL_TOKENS),
    )


def _input_settings(args: argparse.Namespace) -> InputSettings:
    asks = args.question is not None or args.context is not None
    given = {"texts": bool(args.texts), "--question": asks, "--file": args.file is not None}
    named = [name for name, is_given in given.items() if is_given]
    if len(named) != 1:
        found = f"{' and '.join(named)} are given" if named else "none is given"
        found += " (texts go before --labels)" if args.labels and not named else ""
        raise Refused(f'give one input: texts ("a text"), --question with --context, or --file; {found}')
    if args.texts and all(os.path.isfile(text) for text in args.texts):
        raise Refused(f"{args.texts[0]} is a file: give it with --file")
    if asks and (args.question is None or args.context is None):
        missing = "--context" if args.context is None else "--question"
        raise Refused(f"a question is about a context: {missing} is missing")
    if args.file is None:
        unused = [flag for flag, value in (("--format", args.format), ("--text-column", args.text_column)) if value]
        if unused:
            raise Refused(f"{' and '.join(unused)} needs --file, and there is none: leave it out")
    columns = named_columns(args.text_column) if args.text_column else None
    if args.file not in (None, STANDARD_INPUT):
        with reading_file(Path(args.file)):
            Path(args.file).stat()
    return InputSettings(tuple(args.texts), args.question, args.context, args.file, args.format, columns)


def is_read_again(source: InputSettings) -> bool:
    """Return whether the same command finds the same rows again, unlike those of standard input or another pipe."""
    return source.file is None or (source.file != STANDARD_INPUT and Path(source.file).is_file())
