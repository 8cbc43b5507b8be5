"""The flags of train/qa.py and eval/qa.py that belong to one head: what they mean, and where they are refused."""

from dataclasses import asdict

from zerotune.errors import Refused
from zerotune.models.attention import attention_kernel
from zerotune.models.pretrained import check_generator, most_tokens
from zerotune.settings.groups import PromptSettings, QuestionSettings
from zerotune.squad.evaluation import answers_by_span
from zerotune.squad.settings import refuse_other_heads_flags, resolve_questions
from zerotune.tasks.prompts import uses_chat


def check_training_flags(args, config, tokenizer) -> None:
    """Raises Refused for a head that the model cannot have, and for flags of the other head."""
    refuse_other_heads_flags(_questions(args), _prompt(args), args.head == "span", f"--head {args.head}")
    if args.head == "generate":
        check_generator(args.model, config, args.head_learning_rate, "span")
        uses_chat(args.prompt_format, tokenizer, args.model)
    training_lengths(args, config)


def training_lengths(args, config) -> dict[str, int]:
    """How long windows or prompts and answers are, in tokens, by the names of task.json. Raises Refused where the
    model's positions are fewer."""
    resolved = resolve_questions(_questions(args), args.head == "span", most_tokens(config))
    return {name: value for name, value in asdict(resolved).items() if value is not None}


def check_evaluation_flags(args, config, tokenizer, record: dict | None) -> None:
    """Refuse what this model would ignore or cannot do.

    Args:
        record: content of its task.json, None without.
    """
    attention_kernel(args.attention, config)
    if answers_by_span(config, args.model, args.revision):
        refuse_other_heads_flags(
            _questions(args), _prompt(args), True, f"{args.model}, which answers with a span head,"
        )
        resolve_questions(_questions(args), True, most_tokens(config), record)
        return
    refuse_other_heads_flags(_questions(args), _prompt(args), False, f"{args.model}, which writes its answers,")
    if record is None:
        uses_chat(args.prompt_format, tokenizer, args.model)
    elif args.shots or args.prompt_format not in ("auto", record["prompt"]["format"]):
        raise Refused(
            f"{args.model} was tuned on a prompt of its own, without shots and in the {record['prompt']['format']} "
            "format: leave --shots and --prompt-format out"
        )


def _questions(args) -> QuestionSettings:
    return QuestionSettings(args.max_length, args.doc_stride, args.max_answer_length, args.n_best, args.max_new_tokens)


def _prompt(args) -> PromptSettings:
    return PromptSettings(shots=getattr(args, "shots", 0), format=args.prompt_format)
