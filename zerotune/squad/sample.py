"""Short encyclopedic articles of our own with questions, for `--sample`: SQuAD's form, about a third without an answer.

    The Harwick Bridge is a bridge near Selby. It was designed by Agnes Calder. The walls are of local granite.

Every article is about one subject and has two paragraphs with different facts. A question asks for a fact by its
relation: who designed it, not who owns it, where both are people. Questions without an answer ask for a fact that the
paragraph leaves out or for one of another subject, in words that the answerable ones have too.
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from zerotune.squad.questions import INSTRUCTION, NO_ANSWER, TEMPLATE
from zerotune.squad.sample_text import BEGINNINGS, ENDINGS, KINDS, VALUES, Fact, Kind

UNANSWERABLE_SHARE = 1 / 3
# Of questions without an answer, those about another subject; the others ask for a fact that the paragraph lacks.
OTHER_SUBJECT_SHARE = 0.25
_A_BEFORE_VOWEL = re.compile(r"\ba (?=[aeo])")


@dataclass(frozen=True)
class _Subject:
    kind: Kind
    title: str
    noun: str

    @property
    def name(self) -> str:
        """The subject as a sentence names it."""
        return self.title if self.kind.is_person else f"the {self.title}"

    def mention(self, rng: random.Random) -> str:
        """The subject after its first mention."""
        if self.kind.is_person:
            return rng.choice((self.title, self.title.split()[-1], f"the {self.noun}"))
        return rng.choice(("it", "it", f"the {self.noun}", self.name))


def sample_articles(num_questions: int, seed: int) -> dict:
    """`num_questions` questions in SQuAD's form, the same for the same seed. Seeds of which one is odd and the other
    even share no article. A file has at most some 20,000 questions before titles run out."""
    rng, articles, titles, num_written = random.Random(f"articles {seed}"), [], set(), 0
    while num_written < num_questions:
        subject, other = _subject(rng, seed), _subject(rng, seed)
        if subject.title in titles or other.title == subject.title:
            continue
        titles.add(subject.title)
        paragraphs = []
        for context, qas in _paragraphs(rng, subject, other):
            kept = qas[: num_questions - num_written]
            num_written += len(kept)
            for number, qa in enumerate(kept):
                qa["id"] = f"sample-{seed}-{len(articles)}-{len(paragraphs)}-{number}"
            if kept:
                paragraphs.append({"context": context, "qas": kept})
        articles.append({"title": subject.title, "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def sample_lines(seed: int) -> list[str]:
    """Sample questions in a generator's prompts with their answers, for training a tokenizer."""
    lines = [INSTRUCTION]
    for article in sample_articles(4000, seed)["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                asked = TEMPLATE.format(context=paragraph["context"], question=qa["question"])
                lines.append(f"{asked} {qa['answers'][0]['text'] if qa['answers'] else NO_ANSWER}")
    return lines


def _subject(rng: random.Random, seed: int) -> _Subject:
    """A subject whose title belongs to seeds of this parity."""
    while True:
        kind = rng.choice(KINDS)
        noun = rng.choice(kind.nouns)
        if kind.is_person:
            title = f"{rng.choice(VALUES['person']).split()[0]} {_coined(rng)}"
        else:
            title = f"{_coined(rng)} {noun}"
        if zlib.crc32(title.encode()) % 2 == seed % 2:
            return _Subject(kind, title, noun.lower())


def _coined(rng: random.Random) -> str:
    return rng.choice(BEGINNINGS) + rng.choice(ENDINGS)


def _paragraphs(rng: random.Random, subject: _Subject, other: _Subject) -> Iterator[tuple[str, list[dict]]]:
    """(context, questions without ids) of each paragraph of an article; no fact is told twice."""
    facts = rng.sample(subject.kind.facts, len(subject.kind.facts))
    cut = len(facts) // 2 + rng.randint(0, 1)
    for told in (facts[:cut], facts[cut:]):
        untold = [fact for fact in facts if fact not in told]
        context, answers = _context(rng, subject, told)
        qas = [_qa(rng, fact, subject, [answer]) for fact, answer in zip(told, answers, strict=True)]
        share = UNANSWERABLE_SHARE / (1 - UNANSWERABLE_SHARE) * len(qas)
        for _ in range(int(share) + (rng.random() < share % 1)):
            if rng.random() < OTHER_SUBJECT_SHARE:
                qas.append(_qa(rng, rng.choice(other.kind.facts), other, []))
            elif untold:
                qas.append(_qa(rng, untold.pop(rng.randrange(len(untold))), subject, []))
        rng.shuffle(qas)
        yield context, qas


def _context(rng: random.Random, subject: _Subject, told: list[Fact]) -> tuple[str, list[dict]]:
    """A paragraph that states these facts, and the answer that each of them is."""
    opening = rng.choice(subject.kind.openings).format(
        S=_capital(subject.name), noun=subject.noun, place=rng.choice(VALUES["place"])
    )
    text, answers, used = _A_BEFORE_VOWEL.sub("an ", opening), [], set()
    for fact in told:
        value = rng.choice([value for value in VALUES[fact.value] if value not in used])
        used.add(value)
        before, _, after = rng.choice(fact.sentences).partition("{v}")
        mention = subject.mention(rng)
        before = before.format(It=_capital(mention), it=mention)
        shown = value if before else _capital(value)
        answers.append({"text": shown, "answer_start": len(text) + 1 + len(before)})
        text = f"{text} {before}{shown}{after.format(it=mention)}"
    return text, answers


def _qa(rng: random.Random, fact: Fact, subject: _Subject, answers: list[dict]) -> dict:
    question = rng.choice(fact.questions).format(s=subject.name)
    return {"id": "", "question": question, "answers": answers, "is_impossible": not answers}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
