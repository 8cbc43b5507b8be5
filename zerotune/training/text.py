"""Training on labelled text: the parts that are specific to a classifier's head and a generator's."""

from dataclasses import replace

from zerotune.errors import Refused
from zerotune.models.multi_label import check_multi_label
from zerotune.models.packed import packs_rows
from zerotune.models.pretrained import answers_by_prompt, check_generator, check_texts, most_tokens, read_names_as_text
from zerotune.run.process import say
from zerotune.settings.flags import LABEL_METRICS, LABEL_SET_METRICS
from zerotune.settings.groups import DataSettings, TrainSettings
from zerotune.tasks.classify import COLUMN_FLAGS, OWN
from zerotune.tasks.prompts import Prompt, uses_chat
from zerotune.tasks.splits import Splits
from zerotune.training.class_weights import balanced_weights, positive_weights
from zerotune.training.classification import THRESHOLD, LabelledData, check_last_tokens, classifier_data
from zerotune.training.engine import model_in_training
from zerotune.training.generation import AnswerData, encode_answers, format_in_training, prompt_record


def check_head(settings: TrainSettings, config, tokenizer) -> None:
    """Refuse a head that the model cannot have, and flags of the other head."""
    name, prompt_format = settings.model.name, format_in_training(settings.prompt.format, settings.model)
    _check_labels(settings, config)
    if settings.head == "generate":
        check_generator(name, config, settings.optimisation.head_learning_rate, "classify")
        if settings.text.truncation != "head":
            raise Refused(
                f"--truncation {settings.text.truncation} is for a classifier: a prompt's text is cut in the middle"
            )
    elif prompt_format != "auto" and not answers_by_prompt(config):
        raise Refused(f"--prompt-format {prompt_format}: {name} is never given a prompt: leave it out")
    uses_chat(prompt_format, tokenizer, name)


def _check_labels(settings: TrainSettings, config) -> None:
    """Refuse flags and models for a single label with --multi-label, and those for several labels without it."""
    multi_label, choose_by = settings.data.multi_label, settings.optimisation.choose_by
    if multi_label and settings.head == "generate":
        raise Refused("--head generate writes one label, and --multi-label gives any number: use --head classify")
    fitting, other = (LABEL_SET_METRICS, LABEL_METRICS) if multi_label else (LABEL_METRICS, LABEL_SET_METRICS)
    if choose_by in {*other} - {*fitting}:
        flag = "with" if multi_label else "without"
        raise Refused(f"--choose-by {choose_by} is not measured {flag} --multi-label: choose {' or '.join(fitting)}")
    check_multi_label(settings.model, config, multi_label)


def tokenise(
    settings: TrainSettings, task, splits: Splits, config, tokenizer
) -> dict[str, LabelledData] | dict[str, AnswerData]:
    """Tokenise the training and validation splits for the run's head; a classifier's tokens are cached.

    The test split's tokens are only checked. The training split gets the class weights.

    Args:
        task: zerotune.tasks.texts.TextTask; a generator's prompt is the first of its wordings.
    Raises:
        Refused: a token has no embedding; also as `encode_texts` and `encode_answers`.
    """
    texts = (example.text for part in (splits.train, splits.validation, splits.test) for example in part)
    check_texts(settings.model.name, config, tokenizer, texts)
    parts = {"train": splits.train, "validation": splits.validation}
    max_length = settings.text.max_length
    if settings.head == "classify":
        read_names_as_text(tokenizer)
        if tokenizer.pad_token_id in (tokenizer.unk_token_id, tokenizer.eos_token_id):  # texts may end with it
            parts["test"] = splits.test
        data = {
            name: classifier_data(task, tokenizer, config, examples, max_length, settings.text.truncation)
            for name, examples in parts.items()
        }
        for part in data.values():
            check_last_tokens(settings.model.name, config, tokenizer, part)
    else:
        template, label_words, instruction = task.wordings[0]
        wanted = format_in_training(settings.prompt.format, settings.model)
        chat = uses_chat(wanted, tokenizer, settings.model.name)
        prompt = Prompt(template, label_words, chat, instruction=instruction)
        window = most_tokens(config)
        data = {
            name: encode_answers(tokenizer, prompt, examples, max_length, window) for name, examples in parts.items()
        }
    train = data["train"]
    if settings.optimisation.class_weights == "balanced":
        if task.multi_label:
            weights = positive_weights(train.labels)
        else:
            weights = balanced_weights(train.labels, len(task.labels))
        train = replace(train, class_weights=weights)
        shown = (f"{label} {weight:.4g}" for label, weight in zip(task.labels, train.class_weights, strict=True))
        say(f"train: class weights {', '.join(shown)}")
    packs = packs_rows(model_in_training(settings, config), config, trains=True)
    return {"train": replace(train, packs=packs), "validation": replace(data["validation"], packs=packs)}


def tokenise_for_plan(settings: TrainSettings, task, splits: Splits, config, tokenizer) -> dict:
    """Call `tokenise` after `check_head`."""
    check_head(settings, config, tokenizer)
    return tokenise(settings, task, splits, config, tokenizer)


def _columns(data: DataSettings, task) -> dict[str, str | None]:
    """Return the columns that rows were read from, as flags: those that were named, else those that were found."""
    named = {name: getattr(data, name) for name in COLUMN_FLAGS}
    if data.glue:
        return named
    text = data.text_column or task.text_columns[0]
    return named | {"label_column": task.label_columns[0], "text_column": text}


def task_record(settings: TrainSettings, task, train: LabelledData | AnswerData) -> dict:
    """Return task.json's entries about the task."""
    return {
        "task": task.name,
        "head": settings.head,
        "prompt": prompt_record(train.prompt) if settings.head == "generate" else None,
        "labels": list(task.labels),
        "max_length": settings.text.max_length,
        "truncation": settings.text.truncation,
        "thresholds": {"probability": THRESHOLD} if task.multi_label else None,
        "columns": _columns(settings.data, task) if task.name == OWN.name else None,
        "pair_columns": task.pair_columns,
    }
