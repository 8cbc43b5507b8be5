"""From the labelled texts of a task's sources to the rows that train, choose and report: by one set of rules."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

from zerotune.tasks.split_settings import (
    Columns,
    Origin,
    Settings,
    read_origin,
    settings_of,
    subsets,
)
from zerotune.tasks.splits import Example, Splits, describe, require_labels, stratified_split, without_texts_of
from zerotune.tasks.task_sources import (
    DRAWN_SHARES,
    TaskSources,
    origins_of,
    record_of,
    rows_for_shots,
    rule_of,
    source_notes,
)


@dataclass(frozen=True, kw_only=True)
class TaskRows(TaskSources):
    """A task of labelled texts: what its rows are and how they are split.

    Attributes:
        columns: what is read of a row.
        draw_choosing: (train, seed, balanced size or None) -> rest of train, choosing slice, what to say of it.
    """

    columns: Columns
    draw_choosing: Callable[[list[Example], int, int | None], tuple[list[Example], list[Example], str]]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the labels, in label order."""
        return self.columns.labels

    @property
    def give_labels(self) -> str:
        """The way out for rows that are not labelled as they must be."""
        numbered = " and ".join(f"{index} ({name})" for index, name in enumerate(self.labels))
        return f"give rows with a label column of {numbered}"

    def read(self, origin: Origin, way_out: str | None) -> tuple[list[Example], dict]:
        return read_origin(origin, self.columns, way_out)

    def load(self, settings: Settings) -> Splits:
        return _load(self, settings)

    def subsets(self, settings: Settings, parts: dict[str, list], sized: tuple[str, ...]) -> dict[str, list]:
        return subsets(settings, parts, sized)

    def describe(self, rows: list[Example]) -> dict:
        return describe(rows, self.labels)


def load_splits(task: TaskRows, args: Namespace) -> Splits:
    """The rows that train, choose and report, by the flags in `Settings`.

    official: the data set's own split (or --test-file, or a lone --validation-file) reports, and a slice of train
    chooses, unless a validation file stands beside a test file. 80-20: a fifth of train reports. 70-10-20: a fifth of
    all rows that are given reports and a tenth chooses. Raises Refused for bad input or flags."""
    return task.load(settings_of(args))


def load_shots_source(task: TaskRows, args: Namespace, run_split: dict | None, test: list[Example]) -> list[Example]:
    """Labelled rows to draw few-shot examples from: `rows_for_shots` without those that have the text of one of `test`.

    Raises Refused for bad input."""
    shots = without_texts_of(rows_for_shots(task, args, run_split), test)
    require_labels(shots, "shots", task.labels, "give labelled rows that are not test items by --train-file")
    return shots


# --- the splits ---


def _load(task: TaskRows, settings: Settings) -> Splits:
    rows, sources = {}, {}
    for name, origin in origins_of(task, settings).items():
        way_out = task.predict_instead if name == "test" else task.give_labels
        rows[name], sources[name] = read_origin(origin, task.columns, way_out)
    notes = source_notes(task, settings, sources)
    train, seed, removed = rows["train"] + rows.pop("more", []), settings.split_seed, {}
    num_rows, (test_share, choose_share) = len(train), DRAWN_SHARES.get(rule_of(task, settings), (None, None))
    if test_share:
        train, rows["test"] = stratified_split(train, test_share, seed, "test")
        require_labels(rows["test"], "test split (a fifth of the rows)", task.labels, "give more rows", every=False)
    train, removed["train_rows_in_test"] = _without(train, rows["test"])
    left = f"train, less {removed['train_rows_in_test']} rows that stand in test"
    require_labels(train, left, task.labels, task.give_labels)
    sized = ("train", "choose", "test")
    if "choose" in rows or choose_share:
        if choose_share:
            train, rows["choose"] = stratified_split(train, choose_share * num_rows / len(train), seed, "choose")
        choose, removed["choose_rows_in_test"] = _without(rows["choose"], rows["test"])
        left = f"choosing split, less {removed['choose_rows_in_test']} rows that stand in test"
        require_labels(choose, left, task.labels, task.give_labels, every=False)
        train, removed["train_rows_in_choose"] = _without(train, choose)
    else:
        num_before = len(train)
        train, choose, note = task.draw_choosing(train, seed, settings.validation_size)
        removed["train_rows_in_choose"] = num_before - len(train) - len(choose)
        notes.append(note)
        sized = ("train", "test")
    notes += _removal_notes(removed)
    parts = subsets(settings, {"train": train, "choose": choose, "test": rows["test"]}, sized)
    require_labels(parts["train"], "what is left to train on", task.labels, "give more rows, or raise --limit-train")
    require_labels(
        parts["choose"], "choosing split", task.labels, "give more rows, or a --validation-file", every=False
    )
    return Splits(**parts, record=record_of(task, settings, sources, parts, notes) | {"removed_rows": removed})


def _without(examples: list[Example], others: list[Example]) -> tuple[list[Example], int]:
    kept = without_texts_of(examples, others)
    return kept, len(examples) - len(kept)


def _removal_notes(removed: dict) -> list[str]:
    said = {
        "train_rows_in_test": "train rows that stand in test left train",
        "choose_rows_in_test": "rows of the validation file that stand in test do not choose",
        "train_rows_in_choose": "train rows that stand in the rows that choose left train",
    }
    return [f"{removed[name]} {words}" for name, words in said.items() if removed.get(name)]
