"""The flags of train/qa.py and eval/qa.py that belong to one head: what they mean, and where they are refused."""

from dataclasses import asdict

from zerotune.checks.run_checks import check_generator
from zerotune.errors import Refused
from zerotune.models.attention import attention_kernel
from zerotune.models.pretrained import check_window, most_tokens
from zerotune.settings.squad_flags import MAX_NEW_TOKENS, MAX_PROMPT_LENGTH
from zerotune.squad.evaluation import answers_by_span, span_settings
from zerotune.tasks.prompts import uses_chat

OF_SPANS = ("doc_stride", "max_answer_length", "n_best")
OF_WRITING = ("max_new_tokens", "prompt_format", "shots")


def check_training_flags(args, config, tokenizer) -> None:
    """Raises Refused for a head that the model cannot have, and for flags of the other head."""
    _refuse_given(args, OF_WRITING if args.head == "span" else OF_SPANS, f"--head {args.head}")
    if args.head == "generate":
        check_generator(args.model, config, args.head_learning_rate, "span")
        uses_chat(args.prompt_format, tokenizer, args.model)
    training_lengths(args, config)


def training_lengths(args, config) -> dict[str, int]:
    """How long windows or prompts and answers are, in tokens, by the names of task.json. Raises Refused where the
    model's positions are fewer."""
    if args.head == "span":
        return asdict(span_settings(args, config))
    window = most_tokens(config) or MAX_PROMPT_LENGTH
    check_window(args.model, config, args.max_length or 1)
    max_length = args.max_length or min(MAX_PROMPT_LENGTH, window)
    return {"max_length": max_length, "max_new_tokens": args.max_new_tokens or MAX_NEW_TOKENS}


def check_evaluation_flags(args, config, tokenizer, record: dict | None) -> None:
    """Refuse what this model would ignore or cannot do.

    Args:
        record: content of its task.json, None without.
    """
    attention_kernel(args.attention, config)
    if answers_by_span(config, args.model, args.revision):
        _refuse_given(args, OF_WRITING, f"{args.model}, which answers with a span head,")
        span_settings(args, config, record)
        return
    _refuse_given(args, OF_SPANS, f"{args.model}, which writes its answers,")
    if record is None:
        uses_chat(args.prompt_format, tokenizer, args.model)
    elif args.shots or args.prompt_format not in ("auto", record["prompt"]["format"]):
        raise Refused(
            f"{args.model} was tuned on a prompt of its own, without shots and in the {record['prompt']['format']} "
            "format: leave --shots and --prompt-format out"
        )


def _refuse_given(args, names: tuple[str, ...], what: str) -> None:
    defaults = {"prompt_format": "auto", "shots": 0}
    values = {name: getattr(args, name, defaults.get(name)) for name in names}
    given = [f"--{name.replace('_', '-')}" for name, value in values.items() if value != defaults.get(name)]
    if given:
        raise Refused(f"{what} has no use for {', '.join(given)}: leave it out")
