"""Split SQuAD's questions into train, validation and test. Articles stay whole unless a random split is asked for."""

from collections import Counter
from collections.abc import Iterable
from functools import partial

from zerotune.errors import Refused
from zerotune.randomness import random_order
from zerotune.settings.groups import DataSettings
from zerotune.settings.names import DATASETS, TASK_NAMES
from zerotune.squad.files import read_origin
from zerotune.squad.questions import TASK, Question
from zerotune.squad.sample import sample_articles
from zerotune.squad.settings import RULES
from zerotune.tasks import sources
from zerotune.tasks.sources import DRAWN_SHARES, Corpus, Origin
from zerotune.tasks.splits import Example, Splits, balanced_subset, describe, normalise_text, stratified_split, subset

# Share of train's questions that validate, in whole articles: about 6,500 of the official 130,319.
VALIDATION_SHARE = 0.05
LABELS = ("unanswerable", "answerable")

CORPUS = Corpus(
    name=TASK,
    title=TASK_NAMES["squad"],
    splits=RULES,
    lone_file_split="80-20",
    split_warnings={
        "80-20": "a fifth of the questions is the test, in articles of its own",
        "random": "paragraphs are on both sides: not comparable",
    },
    dataset=DATASETS[TASK],
    test_split="validation",
    sample=sample_articles,
    sample_train=(3000, 1),
    sample_test=(600, 2),
)


def load(settings: DataSettings) -> Splits:
    """Return the questions that train, validate and test.

    official: test on the data set's own split (or --test-file, or a lone --validation-file), and validate on
    VALIDATION_SHARE of train's questions, in articles that leave train, unless both files are given. 80-20: test on a
    fifth of train's questions, in articles of their own. random: test on a fifth, whatever their paragraphs. Raises
    Refused for bad input or flags."""
    rows, records, rule, seed = {}, {}, sources.split_rule(CORPUS, settings), settings.split_seed
    predict = "a run reports on questions with answers; predict these with eval/qa.py --test-file"
    for name, origin in sources.origins(CORPUS, settings).items():
        rows[name], records[name] = read(origin, predict if name == "test" else GIVE_ANSWERS)
    _require_distinct_ids(rows, records)
    train, validation, test, notes, removed = rows["train"], rows.get("validation"), rows.get("test"), [], {}
    is_slice = validation is None
    if rule == "random":
        train, test = (_with_ids(train, part) for part in stratified_split(_as_examples(train), 0.2, seed, "test"))
    else:
        if rule in DRAWN_SHARES:
            train, test = draw_articles(train, DRAWN_SHARES[rule][0], seed, "test")
        train, removed["train_rows_in_test"] = _without(train, test)
    if is_slice:
        train, validation = draw_articles(_required(train, "train"), VALIDATION_SHARE, seed, "validation")
        num_drawn, num_articles = len(validation), len(_articles(validation))
        share = num_drawn / (len(train) + num_drawn)
        notes.append(f"{num_drawn:,} questions of {num_articles} articles leave train for validation ({share:.1%})")
    else:
        validation, removed["validation_rows_in_test"] = _without(validation, test)
    train, removed["train_rows_in_validation"] = _without(train, validation)
    notes += [f"removed {number} {_REMOVED[name]}" for name, number in removed.items() if number]
    parts = {"train": train, "validation": validation, "test": test}
    parts = {name: _subset(settings, name, _required(questions, name)) for name, questions in parts.items()}
    if is_slice and len(parts["validation"]) < num_drawn:
        notes[0] += f"; {len(parts['validation']):,} of them validate"
    described = {name: _describe(questions) for name, questions in parts.items()}
    record = sources.split_record(CORPUS, settings, records, described, notes)
    return Splits(**parts, record=record | {"removed_rows": removed})


def load_test(settings: DataSettings, run_split: dict | None) -> tuple[list[Question], dict]:
    """Return the questions that an eval script scores and the content of its split.json, as `sources.load_test`."""
    functions = {"load": load, "read": read, "subset": _subset, "describe": _describe}
    return sources.load_test(CORPUS, settings, run_split, **functions)


def load_shots(settings: DataSettings, run_split: dict | None, test: list[Question]) -> list[Question]:
    """Return the questions of `sources.rows_for_shots` that are about no paragraph of `test`."""
    read_answered = partial(read, way_out=GIVE_ANSWERS)
    rows = sources.rows_for_shots(CORPUS, settings, run_split, load=load, read=read_answered)
    return without_contexts_of(rows, test)


GIVE_ANSWERS = "give a file that has them"


def read(origin: Origin, way_out: str | None = None) -> tuple[list[Question], dict]:
    """Return (questions, the source's record). With `way_out` (advice for messages), refuse those without answers."""
    questions, record = read_origin(origin)
    if way_out and questions[0].answers is None:
        raise Refused(f"{record.get('path') or record['dataset']}: its questions have no answers; {way_out}")
    return questions, record


_REMOVED = {
    "train_rows_in_test": "train questions about paragraphs that are also in test",
    "validation_rows_in_test": "validation questions about paragraphs that are also in test",
    "train_rows_in_validation": "train questions about paragraphs that are also in validation",
}


def _without(questions: list[Question], others: list[Question]) -> tuple[list[Question], int]:
    kept = without_contexts_of(questions, others)
    return kept, len(questions) - len(kept)


def _required(questions: list[Question], part: str) -> list[Question]:
    if not questions:
        raise Refused(f"the {part} split: no questions are left; give more, about other paragraphs than the test set's")
    return questions


def _require_distinct_ids(rows: dict[str, list[Question]], records: dict) -> None:
    """Refuse ids that occur in two sources: an id must name one question, so that ids identify a split."""
    seen: dict[str, str] = {}
    for name, questions in rows.items():
        for question in questions:
            if question.id in seen:
                first = seen[question.id]
                files = [records[each].get("path") or each for each in (first, name)]
                if records[first]["sha256"] == records[name]["sha256"]:
                    raise Refused(
                        f"the {first} and the {name} questions are the same ({files[1]}): give others, or leave one "
                        "file out"
                    )
                raise Refused(f"the id {question.id!r} occurs in {files[0]} and in {files[1]}; give each its own")
        seen |= {question.id: name for question in questions}


# --- draws ---

# Purposes that seed the draws: changing one changes the splits of every user.
_PURPOSES = {"test": "test articles", "validation": "choosing articles"}


def draw_articles(
    questions: list[Question], share: float, seed: int, part: str
) -> tuple[list[Question], list[Question]]:
    """Draw whole articles by seed for "test" or "validation", until they have a share of the questions.

    The first one drawn has questions with and without an answer, if at least two articles do. Returns (rest, drawn) in
    their old order. Raises Refused if there are fewer than two articles."""
    articles = _articles(questions)
    if len(articles) < 2:
        raise Refused(
            f"the {part} split is drawn by article, and the questions that are left for it are of {len(articles)}; "
            "give more articles, or files with --validation-file and --test-file"
        )
    names, drawn, num_drawn = list(articles), set(), 0
    order = [names[place] for place in random_order(len(names), seed, _PURPOSES[part])]
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
    """Return `limit` questions (or all, if there are fewer), in their old order.

    They are drawn by seed as whole paragraphs, the last one cut short."""
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
    """Return the questions whose paragraph, normalised, is not among the paragraphs of `others`."""
    seen = {normalise_text(context) for context in {other.paragraph.context for other in others}}
    shared = {context for context in {each.paragraph.context for each in questions} if normalise_text(context) in seen}
    return [question for question in questions if question.paragraph.context not in shared]


def _describe(questions: list[Question]) -> dict:
    counts = {"paragraphs": len({_paragraph_key(each) for each in questions}), "articles": len(_articles(questions))}
    return describe(_as_examples(questions), LABELS) | counts


def _articles(questions: list[Question]) -> Counter:
    """Return the number of questions of each article, by title in the order of the file."""
    return Counter(question.paragraph.article for question in questions)


def _paragraph_key(question: Question) -> tuple[str, int]:
    return question.paragraph.article, question.paragraph.number


def _as_examples(questions: list[Question]) -> list[Example]:
    """Return questions as labelled texts (1: answerable), for draws that need only ids and labels."""
    return [
        Example(each.id, each.text, None if each.answers is None else int(bool(each.answers))) for each in questions
    ]


def _balanced(questions: list[Question], size: int, seed: int, flag: str) -> list[Question]:
    return _with_ids(questions, balanced_subset(_as_examples(questions), size, seed, flag))


# Sizes are balanced over questions with and without an answer, and limits keep whole paragraphs.
_subset = partial(subset, balanced=_balanced, limited=first_paragraphs)


def _with_ids(questions: list[Question], chosen: list[Example]) -> list[Question]:
    ids = {each.id for each in chosen}
    return [question for question in questions if question.id in ids]
