"""Labelled texts: turn a task's sources into train, validation and test rows, by the same rules for all such tasks.

A task module, such as zerotune/tasks/sst2.py, describes its data by a TextTask.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from zerotune.errors import Refused, did_you_mean, listed
from zerotune.run.process import say, say_how_far
from zerotune.settings.groups import DataSettings
from zerotune.tasks import sources
from zerotune.tasks.files import (
    CORRECT_ROW,
    Source,
    alternatives,
    clean_text,
    find_column,
    read_file,
    rows_sha256,
)
from zerotune.tasks.hub import read_hub
from zerotune.tasks.labels import numbered, parse_label, require_labels
from zerotune.tasks.sources import DRAWN_SHARES, Corpus, Origin
from zerotune.tasks.splits import Example, Splits, count_repeats, describe, stratified_split, subset, without_texts_of

# Names in GLUE's files for the row numbers that its server expects back.
INDEX_COLUMNS = ("index", "idx")


class Wording(NamedTuple):
    """How a model is asked.

    Attributes:
        template: the wording for one text, with `{text}`.
        label_words: a word for each label, in label order.
        instruction: appears once at the beginning, before the solved examples; "" for none.
    """

    template: str
    label_words: tuple[str, ...]
    instruction: str = ""


@dataclass(frozen=True, kw_only=True)
class TextTask(Corpus):
    """Labelled texts: where their rows come from, their labels, and how a model is asked for them.

    Attributes:
        labels: names of the labels, in label order.
        max_length: default of --max-length, in tokens.
        wordings: the first is the default; the others show how much a score depends on the wording.
        text_columns, label_columns: accepted names; the first one that exists is read.
        pair_column: the second text of a pair; None if a row has one text.
        pair_names: names of the two texts, if the model was tuned on other names than those of the columns.
        needs_label_column: whether rows without a column of labels are refused even where labels are not needed.
        columns_way_out: how to name other columns, as the end of a message.
        text_way_out: what to do about a text that is none.
        read_label: (value, labels, place) -> the label's index, or None for a row without one; for texts that may have
            several labels, their indices.
        label_separator: separates the labels of a text that may have several; None: a text has one.
        clean: removes parts of a text that are not text, such as markup.
        draw_validation: (train, seed, balanced size or None) -> (rest of train, validation slice, a note).
    """

    labels: tuple[str, ...]
    max_length: int
    wordings: tuple[Wording, ...]
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    pair_column: str | None = None
    pair_names: tuple[str, str] | None = None
    needs_label_column: bool = False
    columns_way_out: str = ""
    text_way_out: str = CORRECT_ROW
    read_label: Callable[[object, tuple[str, ...], str], int | tuple[int, ...] | None] = parse_label
    label_separator: str | None = None
    clean: Callable[[str], str] | None = None
    draw_validation: Callable[[list[Example], int, int | None], tuple[list[Example], list[Example], str]]

    @property
    def multi_label(self) -> bool:
        """Whether a text may have any number of labels instead of exactly one."""
        return self.label_separator is not None

    @property
    def pair_columns(self) -> tuple[str, str] | None:
        """The columns of a pair of texts; None if a row has one text."""
        return (self.text_columns[0], self.pair_column) if self.pair_column else None


def load(task: TextTask, settings: DataSettings) -> Splits:
    """Return the rows that train, validate and test.

    official: test on the data set's own split (or --test-file, or a lone --validation-file), and validate on a slice of
    train unless both files are given. 80-20: test on a fifth of train. 70-10-20: test on a fifth of all given rows and
    validate on a tenth; 80-10-10: a tenth each. Raises Refused for bad input or flags."""
    return split(task, settings, read_sources(task, settings))


def read_sources(task: TextTask, settings: DataSettings) -> dict[str, tuple[Origin, Source]]:
    """Return the rows of the task's sources, by their use as in `sources.origins`. Raises Refused."""
    return {name: (origin, read_source(origin)) for name, origin in sources.origins(task, settings).items()}


def split(task: TextTask, settings: DataSettings, read: dict[str, tuple[Origin, Source]]) -> Splits:
    """Return the same as `load`, from rows already read. Empties `read`, to free rows that have become examples."""
    labels, give_labels, rows, records = task.labels, _give_labels(task), {}, {}
    predict = f"a run reports on labelled rows; predict these with eval/{task.name}.py --test-file"
    for name in list(read):
        way_out = predict if name == "test" else give_labels
        rows[name], records[name] = label_rows(task, *read.pop(name), way_out)
    seed, removed, notes = settings.split_seed, {}, []
    train, validation, test = rows["train"] + rows.get("more", []), rows.get("validation"), rows.get("test")
    num_rows = len(train)
    test_share, validation_share = DRAWN_SHARES.get(sources.split_rule(task, settings), (None, None))

    if test_share:
        train, test = stratified_split(train, test_share, seed, "test")
        require_labels(test, "test split", labels, "give more rows", every=False)
    train, removed["train_rows_in_test"] = _without(train, test, "train", "test")
    left = f"train, less {removed['train_rows_in_test']} rows that are also in test"
    require_labels(train, left, labels, give_labels)

    is_slice = validation is None and not validation_share
    if is_slice:
        num_before = len(train)
        train, validation, note = task.draw_validation(train, seed, settings.validation_size)
        removed["train_rows_in_validation"] = num_before - len(train) - len(validation)
        notes.append(note)
    else:
        if validation_share:
            train, validation = stratified_split(train, validation_share * num_rows / len(train), seed, "choose")
        validation, removed["validation_rows_in_test"] = _without(validation, test, "validation", "test")
        left = f"validation split, less {removed['validation_rows_in_test']} rows that are also in test"
        require_labels(validation, left, labels, give_labels, every=False)
        train, removed["train_rows_in_validation"] = _without(train, validation, "train", "validation")
    notes += [f"removed {number} {_REMOVED[name]}" for name, number in removed.items() if number]

    parts = {"train": train, "validation": validation, "test": test}
    for name, examples in parts.items():
        parts[name] = subset(settings, name, examples, is_sized=is_slice and name == "validation")
    limits = (("--train-size", settings.train_size), ("--limit-train", settings.limit_train))
    more_rows = ", or raise ".join(["give more rows", *(flag for flag, size in limits if size is not None)])
    require_labels(parts["train"], "what is left to train on", labels, more_rows)
    give_file = "give more rows, or a --validation-file"
    require_labels(parts["validation"], "validation split", labels, give_file, every=False)
    described = {name: describe(examples, labels) for name, examples in parts.items()}
    record = sources.split_record(task, settings, records, described, notes)
    return Splits(**parts, record=record | {"removed_rows": removed})


_REMOVED = {
    "train_rows_in_test": "train rows that are also in test",
    "validation_rows_in_test": "validation rows that are also in test",
    "train_rows_in_validation": "train rows contained in validation rows",
}


def _without(examples: list[Example], others: list[Example], name: str, of: str) -> tuple[list[Example], int]:
    """Return the examples whose texts are not in `others`, and how many were removed. Raises Refused if none remain."""
    kept = without_texts_of(examples, others)
    if examples and not kept:
        raise Refused(f"all {len(examples)} {name} rows are also {of} rows: give {name} rows of their own")
    return kept, len(examples) - len(kept)


def load_test(task: TextTask, settings: DataSettings, run_split: dict | None) -> tuple[list[Example], dict]:
    """Return the examples that an eval script scores and the content of its split.json, as `sources.load_test`."""
    functions = {"load": partial(load, task), "read": partial(read, task), "subset": subset}
    describe_part = partial(describe, labels=task.labels)
    return sources.load_test(task, settings, run_split, **functions, describe=describe_part)


def load_shots(task: TextTask, settings: DataSettings, run_split: dict | None, test: list[Example]) -> list[Example]:
    """Return the labelled rows of `sources.rows_for_shots` that share no text with `test`."""
    functions = {"load": partial(load, task), "read": partial(read, task, way_out=_give_labels(task))}
    shots = without_texts_of(sources.rows_for_shots(task, settings, run_split, **functions), test)
    require_labels(shots, "shots", task.labels, "give labelled rows that are not test items with --train-file")
    return shots


def _give_labels(task: TextTask) -> str:
    named = numbered(task.labels, "and") if task.read_label is parse_label else listed(task.labels)
    return f"give rows with a label column of {named}"


# --- reading ---


def read(task: TextTask, origin: Origin, way_out: str | None = None) -> tuple[list[Example], dict]:
    """Return (examples, the source's record with its duplicates and conflicts).

    With `way_out` (advice for messages) all rows must have labels, and train rows every label. Raises Refused."""
    return label_rows(task, origin, read_source(origin), way_out)


def label_rows(task: TextTask, origin: Origin, source: Source, way_out: str | None) -> tuple[list[Example], dict]:
    """Return the same as `read`, from rows already read."""
    examples = make_examples(task, source, origin.prefix, needs_labels=way_out is not None)
    if way_out:
        require_labels(examples, source.name, task.labels, way_out, every=origin.prefix == "train")
    return examples, {**source.record, **count_repeats(examples)}


def read_source(origin: Origin) -> Source:
    """Return the rows of a file, a hub split or a sample. Raises Refused."""
    if origin.path:
        return read_file(Path(origin.path))
    if origin.hub:
        return read_hub(*origin.hub)
    generate, num_rows, seed = origin.sample
    rows = [{"text": text, "label": label} for text, label in generate(num_rows, seed)]
    name = f"{generate.__module__}.{generate.__name__}"
    record = {"sample": name, "seed": seed, "sha256": rows_sha256(rows), "rows": len(rows)}
    return Source(f"--sample {origin.prefix} rows", rows, None, record)


def label_column_of(task: TextTask, source: Source, needs_labels: bool) -> str | None:
    """Return the column of the labels, None for a source without one.

    Raises:
        Refused: there is none although `needs_labels`, or although the user has named it.
    """
    if needs_labels or task.needs_label_column or any(name in source.columns for name in task.label_columns):
        return _column(task, source, task.label_columns, "the labels")
    return None


def _column(task: TextTask, source: Source, accepted: tuple[str, ...], role: str) -> str:
    both = {"the texts": task.text_columns, "the labels": task.label_columns}
    lacking = (name for name in both if name != role and not any(each in source.columns for each in both[name]))
    more = "".join(f"; nor one for {name}, {alternatives(both[name])}" for name in lacking)
    of_others = tuple(each for name in both if name != role for each in both[name])
    return find_column(source, accepted, role, more + task.columns_way_out, of_others)


def _clean(task: TextTask, value, where: str) -> str:
    text = clean_text(value, where, task.text_way_out)
    return clean_text(task.clean(text), where) if task.clean else text


def make_examples(task: TextTask, source: Source, prefix: str, needs_labels: bool) -> list[Example]:
    """Return one Example per row, with ids prefix-0, prefix-1, …; without a label column all are unlabelled.

    With --multi-label they are also unlabelled if no row has a label. An unlabelled row keeps its index, if it has one,
    for submission.tsv. Raises Refused for an empty text, an unknown label, a source with labels in only some of its
    rows, and an index that is empty or occurs twice."""
    text_column = _column(task, source, task.text_columns, "the texts")
    pair_column = task.pair_column and _column(task, source, (task.pair_column,), "the second texts")
    label_column = label_column_of(task, source, needs_labels)
    if label_column is None and (meant := did_you_mean(task.label_columns[0], source.columns)):
        say(f"{source.name}: no column {task.label_columns[0]!r}{meant}, so its rows count as unlabelled")
    examples, index_column = [], next((name for name in INDEX_COLUMNS if name in source.columns), None)
    rows = say_how_far(source.rows, f"checking the texts of {source.name}", "rows")
    for row, fields in enumerate(rows):
        where = source.where(row)
        text, pair = _clean(task, fields.get(text_column), where), None
        if pair_column:
            pair = text, _clean(task, fields.get(pair_column), where)
            text = joined_pair(task.pair_names or (text_column, pair_column), pair)
        label = None if label_column is None else task.read_label(fields.get(label_column), task.labels, where)
        index = None if index_column is None or label is not None else _index(fields.get(index_column), where)
        examples.append(Example(f"{prefix}-{row}", text, label, index, pair))
    repeated = [index for index, count in Counter(example.index for example in examples).items() if index and count > 1]
    if repeated:
        raise Refused(f"{source.name}: the index {repeated[0]} occurs twice; give each row its own, or leave them out")
    if task.multi_label and not any(example.label for example in examples):
        examples = [replace(example, label=None) for example in examples]
    unlabelled = [row for row, example in enumerate(examples) if example.label is None]
    if unlabelled and len(unlabelled) < len(examples):
        raise Refused(
            f"{source.where(unlabelled[0])}: no label, as in {len(unlabelled)} of {len(examples)} rows; "
            "label every row of a file or none"
        )
    return examples


def joined_pair(names: tuple[str, str], pair: tuple[str, str]) -> str:
    """Return a pair of texts as one text, for models that do not read pairs."""
    return f"{names[0]}: {pair[0]}\n{names[1]}: {pair[1]}"


def _index(value, where: str) -> str:
    """Return a row's own index in the form of submission.tsv."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # pandas may write indices to parquet as floats
    text = str(value).strip() if isinstance(value, str) or type(value) is int else ""
    if not text or not text.isprintable():
        raise Refused(
            f"{where}: the index is {value!r}, wanted a number or a word: correct it, or leave the column out"
        )
    return text
