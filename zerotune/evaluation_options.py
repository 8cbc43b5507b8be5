"""How a checkpoint is evaluated, and what of it is refused before a weight is loaded."""

from dataclasses import dataclass

from zerotune.errors import Refused
from zerotune.heads import is_encoder
from zerotune.models import attention_kernel
from zerotune.pretrained import check_window, is_trained_classifier
from zerotune.prompting import uses_chat
from zerotune.splits import Example


@dataclass(frozen=True)
class EvalOptions:
    """How a checkpoint is evaluated.

    Attributes:
        max_length: tokens that a text is cut to; None: what the model folder says, else the task's.
        truncation: which part of a long text a classifier head without a record sees (zerotune.encoding.TRUNCATIONS).
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
    shots: tuple[Example, ...] = ()
    wording: int = 0
    truncation: str = "head"
    seed: int = 0
    data_sha256: str | None = None


def answers_by_prompt(config) -> bool:
    """Whether a checkpoint has only an LM head to answer with."""
    return not is_trained_classifier(config) and not is_encoder(config)


def check_options(options: EvalOptions, config, tokenizer) -> None:
    """Refuse what this checkpoint would ignore or cannot do, before a weight is loaded."""
    attention_kernel(options.attention, config)
    if answers_by_prompt(config):
        uses_chat(options.prompt_format, tokenizer, options.model)
        return
    if options.max_length is not None:
        check_window(options.model, config, options.max_length)
    given = {
        "--shots": options.shots,
        "--calibrate": options.calibrate != "none",
        "--prompt-format": options.prompt_format != "auto",
    }
    ignored = [flag for flag, is_given in given.items() if is_given]
    if ignored:
        raise Refused(
            f"{options.model} answers with a classifier head, which has no use for {', '.join(ignored)}: leave it out"
        )
