"""Labels of the user's own, read from the rows of a file or hub data set, and GLUE's single-label tasks.

A made-up file:

    subject,body,queue
    Two invoices,"I was charged twice, for one and the same order.",billing

    --text-column subject,body --label-column queue

Two text columns are a pair. An encoder reads a pair as two segments; all other models read one text: `subject: Two
invoices` and, on the next line, `body: I was …`.

With --multi-label a row has any number of labels: `queue` may be "billing,returns", "" or, in jsonl and parquet files,
a list.
"""

from dataclasses import replace
from functools import partial
from itertools import chain

from zerotune.errors import Refused, listed
from zerotune.settings.groups import DataSettings
from zerotune.tasks import sources
from zerotune.tasks.files import OTHER_COLUMN, Source
from zerotune.tasks.labels import (
    GIVE_TWO,
    INDICATORS,
    check_given_labels,
    collect_labels,
    label_word,
    label_words,
    parse_label,
    parse_label_set,
    parse_own_label,
)
from zerotune.tasks.sample import sample_ticket_queues, sample_tickets
from zerotune.tasks.splits import Splits, draw_validation
from zerotune.tasks.texts import TextTask, Wording, label_column_of, read_source, read_sources, split

VALIDATION_SHARE = 0.1
# The flags about columns that are recorded with a tuned model.
COLUMN_FLAGS = ("text_column", "label_column", "glue", "label_separator")
LABEL_SEPARATOR = ","  # unless --label-separator says otherwise
# A prompt does not list more labels than this: the list would be longer than the text.
MOST_IN_PROMPT = 100

OWN = TextTask(
    name="classify",
    title="labels of your own",
    splits=("official", "80-10-10"),
    lone_file_split="80-10-10",
    dataset=None,
    test_split="test",
    sample=sample_tickets,
    sample_train=(3000, 1),
    sample_test=(600, 2),
    labels=(),
    max_length=256,
    wordings=(),
    text_columns=("text", "sentence", "review", "content", "message"),
    label_columns=("label", "labels", "category", "class", "sentiment"),
    columns_way_out=": name the columns with --text-column and --label-column",
    text_way_out=OTHER_COLUMN,
    read_label=parse_own_label,
    draw_validation=partial(draw_validation, share=VALIDATION_SHARE),
)


def _glue(name: str, columns: tuple[str, ...], labels: tuple[str, ...], test_split: str = "validation") -> TextTask:
    """Return one of GLUE's tasks (Wang et al. 2018), with labels in the order of their numbers.

    Published scores are on the validation rows, because the test rows have no labels."""
    return replace(
        OWN,
        title=f"GLUE's {name.upper()}",
        dataset=f"nyu-mll/glue/{name}",
        test_split=test_split,
        labels=labels,
        wordings=wordings_of(labels),
        text_columns=columns[:1],
        pair_column=columns[1] if len(columns) > 1 else None,
        label_columns=("label",),
        read_label=parse_label,
    )


def wordings_of(labels: tuple[str, ...]) -> tuple[Wording, ...]:
    """Return prompts that ask for one of the labels by its own name."""
    instruction = f"Give each text one of these labels: {', '.join(labels)}." if len(labels) <= MOST_IN_PROMPT else ""
    templates = (
        "Text: {text}\nLabel:",
        "{text}\nThe label of this text is",
        "Read this.\n{text}\nWhich label fits?\nAnswer:",
        "Input: {text}\nCategory:",
        '"{text}"\nThis belongs to:',
    )
    return tuple(Wording(template, labels, instruction) for template in templates)


GLUE = {
    "cola": _glue("cola", ("sentence",), ("unacceptable", "acceptable")),
    "mnli": _glue("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), "validation_matched"),
    "mrpc": _glue("mrpc", ("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "qnli": _glue("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
    "qqp": _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
    "rte": _glue("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
}


def load(settings: DataSettings) -> tuple[TextTask, Splits]:
    """Return the task, with the labels of the training rows, and the rows that train, validate and test.

    Raises Refused for bad input or flags."""
    task = task_of(settings)
    read = read_sources(task, settings)
    if not settings.glue:
        train = read["train"][1]
        labels = labels_of(task, train)
        settings = replace(settings, **_found_columns(task, train))
        task = with_labels(task_of(settings), labels)
    return task, split(task, settings, read)


def _found_columns(task: TextTask, source: Source) -> dict[str, str]:
    """Return the columns that the training rows are read from, so that all other rows are read from the same ones."""
    text = next((name for name in task.text_columns if name in source.columns), None)
    found = {"label_column": label_column_of(task, source, needs_labels=True)}
    return found | ({"text_column": text} if text and not task.pair_column else {})


def task_of(settings: DataSettings) -> TextTask:
    """Return the task that the data flags describe: one of GLUE's, or one whose labels are still to be read.

    Raises:
        Refused: more than two text columns, or one that has the labels; flags about several labels that contradict the
            others.
    """
    task = GLUE[settings.glue] if settings.glue else OWN
    if settings.label_separator and not settings.multi_label:
        raise Refused("--label-separator separates the labels of one text: add --multi-label, or leave it out")
    if settings.multi_label:
        if settings.glue:
            raise Refused(f"--glue {settings.glue} has one label for each text: leave --multi-label out")
        separator = settings.label_separator or LABEL_SEPARATOR
        read_label = partial(parse_label_set, separator=separator)
        task = replace(task, label_separator=separator, read_label=read_label, sample=sample_ticket_queues)
    if settings.text_column:
        first, *others = named_columns(settings.text_column)
        task = replace(task, text_columns=(first,), pair_column=others[0] if others else None)
        # of the usual names, a file's first one is read as the labels
        _check_not_labels(settings.label_column or task.label_columns[0], (first, *others))
    return replace(task, label_columns=(settings.label_column,)) if settings.label_column else task


def _check_not_labels(label_column: str, text_columns: tuple[str | None, ...]) -> None:
    if label_column in text_columns:
        raise Refused(f"--text-column {label_column} is also the column of the labels: name another")


def named_columns(text_column: str) -> tuple[str, ...]:
    """Return the one or two columns that --text-column names. Raises Refused for any other number, or one twice."""
    names = tuple(name.strip() for name in text_column.split(","))
    if len(names) > 2 or not all(names):
        raise Refused(
            f"--text-column {text_column}: a text is one column, or two with a comma between them: join the others in "
            "the file"
        )
    if len(set(names)) < len(names):
        raise Refused(f"--text-column {text_column} has {names[0]} twice: name each column once")
    return names


def with_labels(task: TextTask, labels: tuple[str, ...]) -> TextTask:
    """Return the task with these labels, and prompts that ask for them."""
    return replace(task, labels=labels, wordings=wordings_of(labels))


def labels_of(task: TextTask, source: Source, way_out: str = GIVE_TWO) -> tuple[str, ...]:
    """Return the labels of some rows, in their data set's own order if it has one.

    Args:
        way_out: of `collect_labels`.
    Raises:
        Refused: the labels' column is also read as text; or as `collect_labels`.
    """
    column = label_column_of(task, source, needs_labels=True)
    text_column = next((name for name in task.text_columns if name in source.columns), None)
    _check_not_labels(column, (text_column, task.pair_column))
    rows = ((fields.get(column), source.where(row)) for row, fields in enumerate(source.rows))
    if task.multi_label:
        each = [label_words(value, task.label_separator, where) or () for value, where in rows]
        words = list(chain.from_iterable(each))
        if set(words) in INDICATORS and all(len(found) != 1 for found in each):
            raise Refused(
                f"{source.name}: every row with labels has both {listed(sorted(set(words)))}, which look like one for "
                "each of two labels: write the names of the labels that a row has"
            )
        joined = next((word for word in words if task.label_separator in word), None)
        if joined:
            raise Refused(
                f"{source.name}: the label {joined!r} holds {task.label_separator!r}, which separates labels where "
                "predictions are written: name another --label-separator"
            )
    else:
        words = [label_word(value, where) for value, where in rows]
    named = [label_word(name, source.name) for name in source.class_names.get(column) or ()]
    present = set(words)
    order = tuple(name for name in named if name in present) if named else None
    return collect_labels(words, f"{source.name}, column {column!r}", order, way_out)


def data_of_model(record: dict | None, run_split: dict | None) -> DataSettings | None:
    """Return the data settings that a model was tuned with, as far as they are known; None if it was tuned elsewhere.

    Args:
        record: task.json of the model, which has the columns even if its folder was copied or merged.
        run_split: split.json of its run.
    """
    if run_split is not None:
        return DataSettings(**run_split["settings"])
    return None if record is None else DataSettings(**(record.get("columns") or {}))


def check_number_of_texts(columns: tuple[str, ...], tuned_on: TextTask) -> None:
    """Refuse one text for a model that was tuned on pairs, and a pair for one that was not.

    Args:
        columns: of the texts that the model is given.
    """
    wanted = texts_of(tuned_on)
    if len(columns) != len(wanted):
        raise Refused(
            f"--text-column {','.join(columns)}: the model was tuned on {' and '.join(wanted)}: name "
            f"{'two columns' if len(wanted) == 2 else 'one column'}"
        )


def texts_of(task: TextTask) -> tuple[str, ...]:
    """Return the column of a row's text, or those of its pair of texts."""
    return task.pair_columns or task.text_columns[:1]


def _alike(labels: tuple[str, ...]) -> list[str]:
    return sorted(label.casefold() for label in labels)


def labels_to_choose_from(named: tuple[str, ...] | None, of_model: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Return the labels that the user names, else those of the model; None if neither is known.

    The model's own labels keep its order, on which the drawn rows depend."""
    if of_model is not None and (named is None or sorted(named) == sorted(of_model)):
        return of_model
    return named


def task_to_evaluate(
    settings: DataSettings, of_run: DataSettings | None, known_labels: tuple[str, ...] | None, multi_label: bool = False
) -> tuple[TextTask, DataSettings]:
    """Return the task that a model is evaluated on, and the data settings with the columns of the model's run.

    A pair keeps the names that it had when the model was tuned, because they are part of what the model reads.

    Args:
        of_run: the result of `data_of_model`.
        known_labels: labels that the user names, or that the model was tuned on or published with; None to read those
            of --train-file, or else of the items themselves.
        multi_label: whether the model gives a text any number of labels, as --multi-label also says.
    Raises:
        Refused: bad input or flags.
    """
    # with shots from another file, the items may be unlabelled
    needs_label_column = settings.label_column is not None and settings.train_file is None
    known = of_run or DataSettings()
    found = {name: getattr(settings, name) or getattr(known, name) for name in COLUMN_FLAGS}
    settings = replace(settings, multi_label=settings.multi_label or known.multi_label or multi_label, **found)
    task = replace(task_of(settings), needs_label_column=needs_label_column)
    if of_run is not None:
        tuned_on = task_of(replace(of_run, multi_label=settings.multi_label))
        check_number_of_texts(texts_of(task), tuned_on)
        task = replace(task, pair_names=tuned_on.pair_columns)
    if known_labels is not None:
        check_given_labels(known_labels)
    # GLUE's own labels, which a published model may name in capitals
    if task.labels and (known_labels is None or _alike(known_labels) == _alike(task.labels)):
        return task, settings
    if known_labels is None:
        train_file = replace(settings, sample=False, dataset=None) if settings.train_file else settings
        origin = sources.train_origin(task, train_file) if settings.train_file else sources.test_origin(task, settings)
        way_out = f"{task.columns_way_out}, or the labels with --labels"
        source = read_source(origin or sources.train_origin(task, settings))
        task_of_items = replace(task, columns_way_out=way_out)
        known_labels = labels_of(task_of_items, source, f"{GIVE_TWO}, or name the labels with --labels")
    read_label = task.read_label if task.multi_label else parse_own_label
    if of_run is None:
        read_label = partial(read_label, way_out="use --labels or a model that has this label")
    return with_labels(replace(task, read_label=read_label), known_labels), settings
