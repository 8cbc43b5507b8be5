"""SQuAD's questions that train, choose and report: articles stay whole, unless a random split is asked for."""

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import dataclass

from zerotune.errors import Refused
from zerotune.randomness import random_order
from zerotune.squad import files as squad_files
from zerotune.squad.questions import TASK, Question
from zerotune.squad.sample import sample_articles
from zerotune.squad.settings import RULES
from zerotune.tasks.split_settings import Origin, Settings, settings_of, subsets
from zerotune.tasks.splits import Example, Splits, balanced_subset, describe, normalise, stratified_split
from zerotune.tasks.task_sources import (
    DRAWN_SHARES,
    TaskSources,
    origins_of,
    record_of,
    rows_for_shots,
    rule_of,
    source_notes,
)

# Of train's questions, those whose articles choose: about 6,500 of the official 130,319.
CHOOSE_SHARE = 0.05
LABELS = ("unanswerable", "answerable")


@dataclass(frozen=True, kw_only=True)
class QuestionSources(TaskSources):
    """Questions as the rows of a task: --*-size is balanced over questions with and without an answer, --limit-* keeps
    whole paragraphs."""

    @property
    def give_labels(self) -> str:
        """The way out for questions without answers."""
        return "give a file that has them"

    @property
    def predict_instead(self) -> str:
        """The way out for a run whose test questions have no answers."""
        return "a run reports on questions with answers; predict these with eval/qa.py --test-file"

    def read(self, origin: Origin, way_out: str | None) -> tuple[list[Question], dict]:
        questions, record = squad_files.read_origin(origin)
        if way_out and questions[0].answers is None:
            raise Refused(f"{record.get('path') or record['dataset']}: its questions have no answers; {way_out}")
        return questions, record

    def load(self, settings: Settings) -> Splits:
        return _load(self, settings)

    def subsets(self, settings: Settings, parts: dict[str, list], sized: tuple[str, ...]) -> dict[str, list]:
        return subsets(settings, parts, sized, _balanced, first_paragraphs)

    def describe(self, rows: list[Question]) -> dict:
        counts = {"paragraphs": len({_paragraph_key(row) for row in rows}), "articles": len(_articles(rows))}
        return describe(_as_examples(rows), LABELS) | counts


SOURCES = QuestionSources(
    task=TASK,
    title="SQuAD v2",
    rules=RULES,
    drawn_notes={
        "80-20": "a fifth of the questions reports, in articles of its own",
        "random": "a paragraph stands on both sides: not comparable",
    },
    lone_file_rule="80-20",
    dataset="rajpurkar/squad_v2",
    reporting="validation",
    sample=sample_articles,
    sample_train=(3000, 1),
    sample_test=(600, 2),
)


def load_splits(args: Namespace) -> Splits:
    """The questions that train, choose and report, by the flags in `Settings`.

    official: the data set's own split (or --test-file, or a lone --validation-file) reports, and CHOOSE_SHARE of
    train's questions, in articles that leave train, choose, unless a validation file stands beside a test file. 80-20:
    a fifth of train's questions reports, in articles of its own. random: a fifth reports, whatever its paragraphs.
    Raises Refused for bad input or flags."""
    return SOURCES.load(settings_of(args))


def load_shots_source(args: Namespace, run_split: dict | None, test: list[Question]) -> list[Question]:
    """Questions to draw few-shot examples from: `rows_for_shots`, none about a paragraph of `test`."""
    return without_contexts_of(rows_for_shots(SOURCES, args, run_split), test)


def draw_articles(
    questions: list[Question], share: float, seed: int, purpose: str
) -> tuple[list[Question], list[Question]]:
    """(rest, drawn): whole articles by seed, until the drawn ones have a share of the questions; both in their old
    order. The first one has questions with and without an answer, where two articles or more do.
    Raises Refused where fewer than two articles are there to be told apart."""
    articles = _articles(questions)
    if len(articles) < 2:
        raise Refused(
            f"the {purpose} split is drawn by article, and the questions that are left for it are of {len(articles)}; "
            "give more articles, or files by --validation-file and --test-file"
        )
    names, drawn, num_drawn = list(articles), set(), 0
    order = [names[place] for place in random_order(len(names), seed, f"{purpose} articles")]
    kinds = {(each.paragraph.article, bool(each.answers)) for each in questions}
    mixed = [name for name in order if {(name, True), (name, False)} <= kinds]
    first = mixed[0] if len(mixed) > 1 else order[0]
    for name in sorted(order, key=lambda name: name != first):
        if drawn and (num_drawn >= share * len(questions) or len(drawn) == len(names) - 1):
            break
        drawn.add(name)
        num_drawn += articles[name]
    rest = [question for question in questions if question.paragraph.article not in drawn]
    return rest, [question for question in questions if question.paragraph.article in drawn]


def first_paragraphs(questions: list[Question], limit: int, seed: int, purpose: str) -> list[Question]:
    """`limit` questions (all, where there are no more) of whole paragraphs drawn by seed, the last one cut short; in
    their old order."""
    members: dict[tuple, list[int]] = {}
    for row, question in enumerate(questions):
        members.setdefault(_paragraph_key(question), []).append(row)
    groups, rows = list(members.values()), []
    for place in random_order(len(groups), seed, purpose):
        if len(rows) >= limit:
            break
        rows += groups[place]
    return [questions[row] for row in sorted(rows[:limit])]


def without_contexts_of(questions: list[Question], others: Iterable[Question]) -> list[Question]:
    """The questions about a paragraph whose normalised text is that of none of the `others`' paragraphs."""
    seen = {normalise(context) for context in {other.paragraph.context for other in others}}
    shared = {context for context in {each.paragraph.context for each in questions} if normalise(context) in seen}
    return [question for question in questions if question.paragraph.context not in shared]


def _load(task: QuestionSources, settings: Settings) -> Splits:
    rows, sources, rule, seed = {}, {}, rule_of(task, settings), settings.split_seed
    for name, origin in origins_of(task, settings).items():
        way_out = task.predict_instead if name == "test" else task.give_labels
        rows[name], sources[name] = task.read(origin, way_out)
    _require_distinct_ids(rows, sources)
    notes, train, removed = source_notes(task, settings, sources), rows["train"], {}
    if rule == "random":
        train, drawn = (_with_ids(train, part) for part in stratified_split(_as_examples(train), 0.2, seed, "test"))
        rows["test"] = drawn
    else:
        if rule in DRAWN_SHARES:
            train, rows["test"] = draw_articles(train, DRAWN_SHARES[rule][0], seed, "test")
        train, removed["train_rows_in_test"] = _without(train, rows["test"])
    if "choose" in rows:
        choose, removed["choose_rows_in_test"] = _without(rows["choose"], rows["test"])
    else:
        train, choose = draw_articles(_required(train, "the train split"), CHOOSE_SHARE, seed, "choosing")
        share = f"{len(choose) / (len(train) + len(choose)):.1%}"
        notes.append(f"{len(choose)} questions of {len(_articles(choose))} articles of train choose ({share})")
    train, removed["train_rows_in_choose"] = _without(train, choose)
    notes += [f"{number} {_REMOVALS[name]}" for name, number in removed.items() if number]
    parts = {"train": train, "choose": choose, "test": rows["test"]}
    parts = task.subsets(settings, parts, tuple(parts))
    for name, questions in parts.items():
        _required(questions, f"the {name} split")
    return Splits(**parts, record=record_of(task, settings, sources, parts, notes) | {"removed_rows": removed})


_REMOVALS = {
    "train_rows_in_test": "train questions about paragraphs that stand in test left train",
    "choose_rows_in_test": "questions of the validation file about paragraphs that stand in test do not choose",
    "train_rows_in_choose": "train questions about paragraphs of those that choose left train",
}


def _without(questions: list[Question], others: list[Question]) -> tuple[list[Question], int]:
    kept = without_contexts_of(questions, others)
    return kept, len(questions) - len(kept)


def _required(questions: list[Question], name: str) -> list[Question]:
    if not questions:
        raise Refused(f"{name}: no questions are left; give more, about other paragraphs than those that report")
    return questions


def _require_distinct_ids(rows: dict[str, list[Question]], sources: dict) -> None:
    """An id names one question over all sources, so that a split is known by its ids."""
    seen: dict[str, str] = {}
    for name, questions in rows.items():
        for question in questions:
            if question.id in seen:
                files = [sources[each].get("path") or each for each in (seen[question.id], name)]
                raise Refused(f"the id {question.id!r} occurs in {files[0]} and in {files[1]}; give each its own")
        seen |= {question.id: name for question in questions}


def _articles(questions: list[Question]) -> dict[str, int]:
    """Number of questions of each article, by title in the order of the file."""
    counts: dict[str, int] = {}
    for question in questions:
        counts[question.paragraph.article] = counts.get(question.paragraph.article, 0) + 1
    return counts


def _paragraph_key(question: Question) -> tuple[str, int]:
    return question.paragraph.article, question.paragraph.number


def _as_examples(questions: list[Question]) -> list[Example]:
    """Questions as labelled texts (1: answerable), for draws that look at ids and labels."""
    return [
        Example(each.id, each.text, None if each.answers is None else int(bool(each.answers))) for each in questions
    ]


def _balanced(questions: list[Question], size: int, seed: int, flag: str) -> list[Question]:
    return _with_ids(questions, balanced_subset(_as_examples(questions), size, seed, flag))


def _with_ids(questions: list[Question], chosen: list[Example]) -> list[Question]:
    ids = {each.id for each in chosen}
    return [question for question in questions if question.id in ids]
