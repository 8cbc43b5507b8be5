"""SQuAD v2: questions about paragraphs of an encyclopedia; the answer is a span of the paragraph, or there is none.

A made-up example in the data set's format:

    {"version": "v2.0", "data": [{"title": "Lighthouses", "paragraphs": [{
        "context": "The tower at Hook Head was built in the 13th century.", "qas": [
            {"id": "q1", "question": "When was the tower built?", "is_impossible": false,
             "answers": [{"text": "in the 13th century", "answer_start": 33}]},
            {"id": "q2", "question": "Who designed the tower?", "is_impossible": true, "answers": []}]}]}]}

Rajpurkar et al. 2018, arXiv:1806.03822.
"""

from collections.abc import Iterator
from dataclasses import dataclass

TASK = "squad"
# The prompt for a model that writes its answers.
INSTRUCTION = 'Answer from the context in a few of its words, or with "unanswerable".\n\n'
TEMPLATE = "Context: {context}\nQuestion: {question}\nAnswer:"
# The written answer to a question that the paragraph does not answer.
NO_ANSWER = "unanswerable"


@dataclass(frozen=True, eq=False)
class Paragraph:
    """A paragraph that questions are about. Each paragraph of a file is one object, shared by its questions.

    Attributes:
        article: title of its article.
        number: its place in the file, from 0.
    """

    article: str
    number: int
    context: str


@dataclass(frozen=True)
class GoldAnswer:
    """A span of the context: its text, and the offset of its first character."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question with all its gold answers: () if the paragraph does not answer it, None if they are not known."""

    id: str
    text: str
    paragraph: Paragraph
    answers: tuple[GoldAnswer, ...] | None


def distinct_paragraphs(questions: list[Question]) -> tuple[list[Paragraph], list[int]]:
    """Return the questions' paragraphs, in the order of their first questions, and each question's place among them."""
    places: dict[Paragraph, int] = {}
    paragraph_of = [places.setdefault(question.paragraph, len(places)) for question in questions]
    return list(places), paragraph_of


def question_texts(questions: list[Question]) -> Iterator[str]:
    """Yield all texts that a model may read: contexts, then questions."""
    for paragraph in distinct_paragraphs(questions)[0]:
        yield paragraph.context
    for question in questions:
        yield question.text
