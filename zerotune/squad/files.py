"""Read SQuAD's json files and its rows on the hub, and refuse malformed ones with a one-line message."""

import hashlib
import json
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import json_sha256
from zerotune.squad.questions import GoldAnswer, Paragraph, Question
from zerotune.tasks.files import check_unicode, clean_text, decode_text, needs_memory, read_bytes
from zerotune.tasks.hub import read_hub
from zerotune.tasks.sources import Origin

FORMAT = '{"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'


def read_origin(origin: Origin) -> tuple[list[Question], dict]:
    """Read the questions of a file, a hub split or the sample generator; also return split.json's record of it."""
    if origin.path:
        questions, record = read_questions(Path(origin.path))
    elif origin.hub:
        questions, record = _read_hub(*origin.hub)
    else:
        generate, num_questions, seed = origin.sample
        name, data = f"{generate.__module__}.{generate.__name__}", generate(num_questions, seed)
        questions = parse_questions(data, f"--sample {origin.prefix} questions")
        record = {"sample": name, "seed": seed, "sha256": json_sha256(data), "rows": len(questions)}
    return questions, record


def read_questions(path: Path) -> tuple[list[Question], dict]:
    """Read a file in SQuAD's format, also .gz; also return its record: path, sha256 and rows.

    Questions are in the order of the file. Plausible answers are left out. `answers` is None for all questions or none.

    Raises:
        Refused: broken gzip or JSON, missing fields, empty texts, ids that occur twice, an answer that is not in the
            context at its answer_start, or answers to a question that is marked as impossible.
    """
    with needs_memory(path):
        data = read_bytes(path)
        text = decode_text(data, path)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{path}: not JSON ({error}); wanted SQuAD's format {FORMAT}") from None
        questions = parse_questions(value, str(path))
    record = {"path": str(path.absolute()), "sha256": hashlib.sha256(data).hexdigest(), "rows": len(questions)}
    return questions, record


def parse_questions(value, name: str) -> list[Question]:
    """Return the questions of parsed json in SQuAD's format, from a source called `name`.

    Raises:
        Refused: as `read_questions`.
    """
    questions, num_paragraphs = [], 0
    articles = _field(value, "data", list, name, FORMAT)
    for number, article in enumerate(articles):
        where = f"{name}: article {number}"
        for place, block in enumerate(_field(article, "paragraphs", list, where, FORMAT)):
            title = _title(article.get("title"), number)
            paragraph = _paragraph(title, num_paragraphs, block, f"{where}, paragraph {place}")
            num_paragraphs += 1
            for qa in _field(block, "qas", list, f"{where}, paragraph {place}", FORMAT):
                questions.append(_question(qa, paragraph, f"{where}, paragraph {place}"))
    return _checked(questions, name)


def _read_hub(dataset: str, split: str, revision: str | None) -> tuple[list[Question], dict]:
    """Read rows {id, title, context, question, answers: {text: [], answer_start: []}} of a hub split.

    Consecutive rows with the same title and context are about one paragraph. Without titles, each paragraph is an
    article of its own.
    """
    source = read_hub(dataset, split, revision)
    questions, paragraph, of = [], None, None
    for number, row in enumerate(source.rows):
        where = source.where(number)
        if paragraph is None or of != (row.get("title"), row.get("context")):
            of = (row.get("title"), row.get("context"))
            place = 0 if paragraph is None else paragraph.number + 1
            paragraph = _paragraph(_title(of[0], place), place, row, where)
        qa = {name: row[name] for name in ("id", "question") if name in row}
        if "answers" in row:
            qa["answers"] = _hub_answers(row["answers"], where)
        questions.append(_question(qa, paragraph, where))
    return _checked(questions, source.name), source.record


def _title(title, number: int):
    """Return an article's title, or its number if it has none."""
    return f"article {number}" if title in (None, "") else title


def _hub_answers(answers, where: str) -> list[dict]:
    texts = _field(answers, "text", list, where, '"answers": {"text": [], "answer_start": []}')
    starts = _field(answers, "answer_start", list, where, '"answers": {"text": [], "answer_start": []}')
    if len(texts) != len(starts):
        raise Refused(f"{where}: {len(texts)} answer texts but {len(starts)} answer_start; correct the row")
    return [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]


def _checked(questions: list[Question], name: str) -> list[Question]:
    """Return the questions of a whole source. Refuses an empty one, repeated ids, and answers for only some of them."""
    if not questions:
        raise Refused(f"{name} holds no questions; wanted SQuAD's format {FORMAT}")
    seen = set()
    for question in questions:
        if question.id in seen:
            raise Refused(f"{name}: the id {question.id!r} occurs twice; an id names one question: give each its own")
        seen.add(question.id)
    unanswered = [question.id for question in questions if question.answers is None]
    if unanswered and len(unanswered) < len(questions):
        raise Refused(
            f"{name}: question {unanswered[0]!r} lacks an answers field, as do {len(unanswered)} of {len(questions)}; "
            'give all questions "answers" or none ("answers": [] where the paragraph has no answer)'
        )
    return questions


def _field(value, name: str, kind: type, where: str, expected: str):
    """Return value[name]. Refuses anything that is not of type `kind`."""
    if not isinstance(value, dict) or not isinstance(value.get(name), kind):
        found = type(value.get(name)).__name__ if isinstance(value, dict) and name in value else "missing"
        raise Refused(f"{where}: not SQuAD's format: {name!r} is {found}, wanted {expected}")
    return value[name]


def _paragraph(title, number: int, block: dict, where: str) -> Paragraph:
    context = _field(block, "context", str, where, FORMAT)
    clean_text(context, f"{where}, context")
    return Paragraph(clean_text(title, f"{where}, title"), number, context)


def _question(qa, paragraph: Paragraph, where: str) -> Question:
    identifier = _field(qa, "id", str, where, FORMAT)
    where = f"{where}, question {identifier!r}"
    check_unicode(identifier, where)
    text = clean_text(_field(qa, "question", str, where, FORMAT), where)
    impossible = qa.get("is_impossible")
    if impossible is not None and not isinstance(impossible, bool):
        raise Refused(f"{where}: is_impossible is {impossible!r}, wanted true or false")
    if qa.get("answers") is None:
        return Question(identifier, text, paragraph, None)
    answers = tuple(_answer(each, paragraph, where) for each in _field(qa, "answers", list, where, FORMAT))
    if impossible and answers:
        raise Refused(f"{where}: is_impossible is true, but it has {len(answers)} answers; correct one of the two")
    if impossible is False and not answers:
        raise Refused(f"{where}: is_impossible is false, but it has no answers; correct one of the two")
    return Question(identifier, text, paragraph, answers)


def _answer(value, paragraph: Paragraph, where: str) -> GoldAnswer:
    form = '"answers": [{"text": "…", "answer_start": 0}]'
    text = _field(value, "text", str, where, form)
    start = value.get("answer_start")
    if type(start) is not int:
        raise Refused(f"{where}: answer_start is {start!r}, wanted the character at which {text[:40]!r} starts")
    if not text:
        raise Refused(f'{where}: an empty answer; where there is none, give "answers": []')
    found = paragraph.context[start : start + len(text)] if start >= 0 else ""
    if found != text:
        raise Refused(
            f"{where}: answer_start {start} disagrees with the text: the context has {found[:40]!r} there, the answer "
            f"is {text[:40]!r}; correct the offset (characters from 0, not bytes)"
        )
    return GoldAnswer(text, start)
