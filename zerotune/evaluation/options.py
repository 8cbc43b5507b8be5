"""How a checkpoint is evaluated, and what of it is refused before a weight is loaded."""

from dataclasses import dataclass

from zerotune.errors import Refused
from zerotune.models.attention import attention_kernel, check_kernel_precision
from zerotune.models.model_files import read_record
from zerotune.models.pretrained import answers_by_prompt, check_window
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.prompts import uses_chat
from zerotune.tasks.splits import Example


@dataclass(frozen=True)
class EvalOptions:
    """How a checkpoint is evaluated.

    Attributes:
        max_length: tokens that a text is cut to; None: what the model folder says, else the task's. Of a generator's
            prompt with text and answer together.
        as_generator: a prompt is cut as a generator's, so that before and after tuning the same is asked.
        truncation: which part of a long text a classifier head without a record sees, one of
            zerotune.tasks.tokens.TRUNCATIONS.
        wording: number of the prompt among the task's WORDINGS.
        data_sha256: tells the source of the items from others, whose ids may be the same.
    """

    model: str
    revision: str | None
    attention: str
    precision: str
    tokens_per_device: int
    max_length: int | None = None
    load_4bit: bool = False
    prompt_format: str = "auto"
    calibrate: str = "none"
    answer_by: str = "likelihood"
    as_generator: bool = False
    shots: tuple[Example, ...] = ()
    wording: int = 0
    truncation: str = "head"
    seed: int = 0
    data_sha256: str | None = None


@dataclass(frozen=True)
class QuestionOptions:
    """How a checkpoint that answers SQuAD's questions is evaluated.

    Attributes:
        max_length: most tokens of a window or of a prompt with its answer; None, here and below: what the model folder
            says, else the defaults of squad_arguments.
        doc_stride, max_answer_length, n_best: of a span head's windows and answers.
        prompt_format, shots, max_new_tokens: of a model that writes its answers; shots are SolvedQuestions.
        seed: of a head that is not trained, and of bootstraps.
        data_sha256: tells the source of the questions from others, whose ids may be the same.
    """

    model: str
    revision: str | None
    attention: str
    precision: str
    tokens_per_device: int
    load_4bit: bool = False
    max_length: int | None = None
    doc_stride: int | None = None
    max_answer_length: int | None = None
    n_best: int | None = None
    prompt_format: str = "auto"
    shots: tuple = ()
    max_new_tokens: int | None = None
    seed: int = 0
    data_sha256: str | None = None


def check_options(options: EvalOptions, config, tokenizer) -> None:
    """Refuse what this checkpoint would ignore or cannot do, before a weight is loaded."""
    attention_kernel(options.attention, config)
    check_kernel_precision(options.attention, options.precision)
    if options.answer_by == "generation" and options.calibrate != "none":
        raise Refused("--calibrate is about likelihoods, which --answer-by generation does not compare: drop one")
    record = generator_record(options)
    if record is not None:
        _check_own_prompt(options, record)
        return
    if answers_by_prompt(config):
        uses_chat(options.prompt_format, tokenizer, options.model)
        return
    if options.max_length is not None:
        check_window(options.model, config, options.max_length)
    given = {
        "--shots": options.shots,
        "--calibrate": options.calibrate != "none",
        "--answer-by": options.answer_by != "likelihood",
        "--prompt-format": options.prompt_format != "auto",
    }
    ignored = [flag for flag, is_given in given.items() if is_given]
    if ignored:
        raise Refused(
            f"{options.model} answers with a classifier head, which has no use for {', '.join(ignored)}: leave it out"
        )


def loaded_model(options: EvalOptions | QuestionOptions) -> ModelSettings:
    """Return how the model is loaded."""
    return ModelSettings(
        name=options.model,
        revision=options.revision,
        method="qlora" if options.load_4bit else "full",
        attention=options.attention,
        precision=options.precision,
    )


def generator_record(options: EvalOptions | QuestionOptions) -> dict | None:
    """task.json of a model that was tuned to write its answers, None for any other."""
    record = read_record(options.model, options.revision)
    return record if record is not None and record.get("head") == "generate" else None


def trained_as(record: dict, options: EvalOptions | QuestionOptions) -> dict:
    """What metrics.json says of a model's training, by its task.json: {} for a model that zerotune did not tune."""
    return {
        "method": record.get("method"),
        "model": record.get("base_model", options.model),
        "seed": record.get("seed", options.seed),
        "training_sha256": record.get("training_sha256"),
    }


def _check_own_prompt(options: EvalOptions, record: dict) -> None:
    given = {
        "--shots": options.shots,
        "--prompt-seeds": options.wording,
        "--prompt-format": options.prompt_format not in ("auto", record["prompt"]["format"]),
    }
    others = [flag for flag, is_given in given.items() if is_given]
    if others:
        raise Refused(
            f"{options.model} was tuned on a prompt of its own, without shots and in the {record['prompt']['format']} "
            f"format: leave {', '.join(others)} out"
        )
