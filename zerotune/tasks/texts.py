"""Labelled texts: from a task's sources to its train, validation and test rows, by the same rules for all such tasks.

A task module (zerotune/tasks/sst2.py) describes its data by a TextCorpus and binds these functions to it.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from zerotune.errors import Refused
from zerotune.settings.groups import DataSettings
from zerotune.tasks import sources
from zerotune.tasks.files import Source, clean_text, find_column, read_file, rows_sha256
from zerotune.tasks.hub import read_hub
from zerotune.tasks.labels import numbered, parse_label, require_labels
from zerotune.tasks.sources import DRAWN_SHARES, Corpus, Origin
from zerotune.tasks.splits import Example, Splits, count_repeats, describe, stratified_split, subset, without_texts_of

# What GLUE's files call the row numbers that its server wants back.
INDEX_COLUMNS = ("index", "idx")


@dataclass(frozen=True, kw_only=True)
class TextCorpus(Corpus):
    """A corpus of labelled texts.

    Attributes:
        labels: names of the labels, in label order.
        text_columns, label_columns: accepted names; the first one that is there is read.
        clean: takes out of a text what is no text, such as markup.
        draw_validation: (train, seed, balanced size or None) -> (rest of train, validation slice, a note).
    """

    labels: tuple[str, ...]
    text_columns: tuple[str, ...]
    label_columns: tuple[str, ...]
    clean: Callable[[str], str] | None = None
    draw_validation: Callable[[list[Example], int, int | None], tuple[list[Example], list[Example], str]]


def load(corpus: TextCorpus, settings: DataSettings) -> Splits:
    """Return the rows that train, validate and test.

    official: the data set's own split (or --test-file, or a lone --validation-file) tests, and a slice of train
    validates, unless there are a validation file and a test file. 80-20: a fifth of train tests. 70-10-20: a fifth of
    all given rows tests and a tenth validates. Raises Refused for bad input or flags."""
    labels, give_labels, rows, records = corpus.labels, _give_labels(corpus), {}, {}
    predict = f"a run reports on labelled rows; predict these with eval/{corpus.task}.py --test-file"
    for name, origin in sources.origins(corpus, settings).items():
        rows[name], records[name] = read(corpus, origin, predict if name == "test" else give_labels)
    seed, removed, notes = settings.split_seed, {}, []
    train, validation, test = rows["train"] + rows.get("more", []), rows.get("validation"), rows.get("test")
    num_rows = len(train)
    test_share, validation_share = DRAWN_SHARES.get(sources.split_rule(corpus, settings), (None, None))

    if test_share:
        train, test = stratified_split(train, test_share, seed, "test")
        require_labels(test, "test split (a fifth of the rows)", labels, "give more rows", every=False)
    train, removed["train_rows_in_test"] = _without(train, test, "train", "test")
    left = f"train, less {removed['train_rows_in_test']} rows that are also in test"
    require_labels(train, left, labels, give_labels)

    is_slice = validation is None and not validation_share
    if is_slice:
        num_before = len(train)
        train, validation, note = corpus.draw_validation(train, seed, settings.validation_size)
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
    more_rows = "give more rows, or"
    require_labels(parts["train"], "what is left to train on", labels, f"{more_rows} raise --limit-train")
    require_labels(parts["validation"], "validation split", labels, f"{more_rows} a --validation-file", every=False)
    described = {name: describe(examples, labels) for name, examples in parts.items()}
    record = sources.split_record(corpus, settings, records, described, notes)
    return Splits(**parts, record=record | {"removed_rows": removed})


_REMOVED = {
    "train_rows_in_test": "train rows that are also in test",
    "validation_rows_in_test": "validation rows that are also in test",
    "train_rows_in_validation": "train rows contained in validation rows",
}


def _without(examples: list[Example], others: list[Example], name: str, of: str) -> tuple[list[Example], int]:
    """Return the examples without the texts of others, and how many left. Raises Refused where none stays."""
    kept = without_texts_of(examples, others)
    if examples and not kept:
        raise Refused(f"all {len(examples)} {name} rows are also {of} rows: give {name} rows of their own")
    return kept, len(examples) - len(kept)


def load_test(corpus: TextCorpus, settings: DataSettings, run_split: dict | None) -> tuple[list[Example], dict]:
    """Return the examples that an eval script scores and the content of its split.json, as `sources.load_test`."""
    functions = {"load": partial(load, corpus), "read": partial(read, corpus), "subset": subset}
    describe_part = partial(describe, labels=corpus.labels)
    return sources.load_test(corpus, settings, run_split, **functions, describe=describe_part)


def load_shots(
    corpus: TextCorpus, settings: DataSettings, run_split: dict | None, test: list[Example]
) -> list[Example]:
    """Return the labelled rows of `sources.rows_for_shots` that share no text with `test`."""
    functions = {"load": partial(load, corpus), "read": partial(read, corpus, way_out=_give_labels(corpus))}
    shots = without_texts_of(sources.rows_for_shots(corpus, settings, run_split, **functions), test)
    require_labels(shots, "shots", corpus.labels, "give labelled rows that are not test items by --train-file")
    return shots


def _give_labels(corpus: TextCorpus) -> str:
    return f"give rows with a label column of {numbered(corpus.labels, 'and')}"


# --- reading ---


def read(corpus: TextCorpus, origin: Origin, way_out: str | None = None) -> tuple[list[Example], dict]:
    """Return (examples, the source's record with its duplicates and conflicts).

    With `way_out` (what to do else) all rows must have labels, and those of train every label. Raises Refused."""
    source = _read_source(origin)
    wanted = f"{_alternatives(corpus.text_columns)} and {_alternatives(corpus.label_columns)}"
    text_column, label_column = find_column(source, corpus.text_columns, wanted), None
    if way_out or any(name in source.columns for name in corpus.label_columns):
        label_column = find_column(source, corpus.label_columns, wanted)
    examples = make_examples(source, origin.prefix, text_column, label_column, corpus.labels, corpus.clean)
    if way_out:
        require_labels(examples, source.name, corpus.labels, way_out, every=origin.prefix == "train")
    return examples, {**source.record, **count_repeats(examples)}


def _read_source(origin: Origin) -> Source:
    if origin.path:
        return read_file(Path(origin.path))
    if origin.hub:
        return read_hub(*origin.hub)
    generate, num_rows, seed = origin.sample
    rows = [{"text": text, "label": label} for text, label in generate(num_rows, seed)]
    name = f"{generate.__module__}.{generate.__name__}"
    record = {"sample": name, "seed": seed, "sha256": rows_sha256(rows), "rows": len(rows)}
    return Source(f"--sample {origin.prefix} rows", rows, None, record)


def _alternatives(names: tuple[str, ...]) -> str:
    """Return "'text' (or 'review')"."""
    return f"{' (or '.join(map(repr, names))}{')' * (len(names) - 1)}"


def make_examples(
    source: Source,
    prefix: str,
    text_column: str,
    label_column: str | None,
    labels: tuple[str, ...],
    clean: Callable[[str], str] | None = None,
) -> list[Example]:
    """Return one Example per row, with ids prefix-0, prefix-1, …; without a label column all are unlabelled.

    An unlabelled row keeps its index for submission.tsv, where it has one. Raises Refused for an empty text, an unknown
    label, a source with labels in only some of its rows, and an index that is empty or occurs twice."""
    examples, index_column = [], next((name for name in INDEX_COLUMNS if name in source.columns), None)
    for row, fields in enumerate(source.rows):
        where = source.where(row)
        text = clean_text(fields.get(text_column), where)
        if clean:
            text = clean_text(clean(text), where)
        label = None if label_column is None else parse_label(fields.get(label_column), labels, where)
        index = None if index_column is None or label is not None else _index(fields.get(index_column), where)
        examples.append(Example(f"{prefix}-{row}", text, label, index))
    repeated = [index for index, count in Counter(example.index for example in examples).items() if index and count > 1]
    if repeated:
        raise Refused(f"{source.name}: the index {repeated[0]} occurs twice; give each row its own, or leave them out")
    unlabelled = [row for row, example in enumerate(examples) if example.label is None]
    if unlabelled and len(unlabelled) < len(examples):
        raise Refused(
            f"{source.where(unlabelled[0])}: no label, as in {len(unlabelled)} of {len(examples)} rows; "
            "label every row of a file or none"
        )
    return examples


def _index(value, where: str) -> str:
    """Return a row's own index as submission.tsv has it."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # as parquet files of pandas have it
    text = str(value).strip() if isinstance(value, str) or type(value) is int else ""
    if not text or not text.isprintable():
        raise Refused(
            f"{where}: the index is {value!r}, wanted a number or a word: correct it, or leave the column out"
        )
    return text
