"""Short encyclopedia articles with questions for `--sample` in SQuAD's format; a third of the questions have no answer.

    The Grenstead Lake lies between two ranges of hills. The lake is 88 miles long. It ends at Halden.

    Where is the mouth of the Grenstead Lake? -> Halden
    Where does the Grenstead Lake rise? -> no answer

The facts and the words are in zerotune/squad/sample.toml. Each article is about one subject; its two paragraphs state
different facts. Finding a value of the right kind is not enough: the mouth and the source are both places. Questions
without an answer are worded like the others: they ask for a fact that the paragraph leaves out, or about another
subject.
"""

import random
import tomllib
import zlib
from pathlib import Path

from zerotune.settings.names import sample_model_folder
from zerotune.squad.questions import INSTRUCTION, NO_ANSWER, TEMPLATE
from zerotune.tasks.sample import correct_articles, split_list

UNANSWERABLE_PER_ANSWERABLE = 0.5
# The share of questions without an answer that are about another subject.
OTHER_SUBJECT_SHARE = 0.25

_TEXT = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
KINDS = _TEXT["kinds"]
NAMES = {part: split_list(names) for part, names in _TEXT["names"].items()}
VALUES = {name: split_list(values) for name, values in _TEXT["values"].items()}
VALUES["person"] = [f"{first} {last}" for first in NAMES["first"] for last in NAMES["last"]]


def sample_articles(num_questions: int, seed: int) -> dict:
    """Return the content of a SQuAD file with this number of questions (at most about 20,000).

    The same seed gives the same file. An odd and an even seed share no article.
    """
    rng, articles, titles, num_left = random.Random(f"articles {seed}"), [], set(), num_questions
    while num_left:
        subject, other = _draw_subject(rng, seed), _draw_subject(rng, seed)
        if subject["title"] in titles or other["title"] == subject["title"]:
            continue
        titles.add(subject["title"])
        facts = rng.sample(subject["facts"], len(subject["facts"]))
        cut = len(facts) // 2 + rng.randint(0, 1)
        paragraphs = []
        for told, untold in ((facts[:cut], facts[cut:]), (facts[cut:], facts[:cut])):
            context, answers = _write_context(rng, subject, told)
            questions = [_ask(rng, subject, fact, answer) for fact, answer in zip(told, answers, strict=True)]
            questions += _ask_unanswerable(rng, subject, untold, other, UNANSWERABLE_PER_ANSWERABLE * len(told))
            rng.shuffle(questions)
            prefix = f"sample-{seed}-{len(articles)}-{len(paragraphs)}"
            qas = [{"id": f"{prefix}-{number}"} | each for number, each in enumerate(questions[:num_left])]
            paragraphs += [{"context": context, "qas": qas}] if qas else []
            num_left -= len(qas)
        articles.append({"title": subject["title"], "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def question_lines(seed: int) -> list[str]:
    """Return sample questions as prompts with their answers, to train a tokenizer on."""
    paragraphs = [each for article in sample_articles(4000, seed)["data"] for each in article["paragraphs"]]
    lines = [INSTRUCTION]
    for context, qa in ((each["context"], qa) for each in paragraphs for qa in each["qas"]):
        answer = qa["answers"][0]["text"] if qa["answers"] else NO_ANSWER
        lines.append(f"{TEMPLATE.format(context=context, question=qa['question'])} {answer}")
    return lines


def _draw_subject(rng: random.Random, seed: int) -> dict:
    """Return a subject: a kind with a title, a noun, its name in a sentence, and ways to mention it again.

    Half of all titles belong to odd seeds and half to even ones.
    """
    while True:
        kind = rng.choice(KINDS)
        noun = rng.choice(split_list(kind["nouns"]))
        first_name = rng.choice(VALUES["person"]).split()[0] if kind["is_person"] else ""
        coined = rng.choice(NAMES["beginnings"]) + rng.choice(NAMES["endings"])
        title = f"{first_name} {coined}" if kind["is_person"] else f"{coined} {noun}"
        if zlib.crc32(title.encode()) % 2 == seed % 2:
            break
    name = title if kind["is_person"] else f"the {title}"
    the_noun = f"the {noun.lower()}"
    mentions = [title, coined, the_noun] if kind["is_person"] else ["it", "it", the_noun, name]
    return kind | {"title": title, "noun": noun.lower(), "name": name, "mentions": mentions}


def _write_context(rng: random.Random, subject: dict, facts: list[dict]) -> tuple[str, list[dict]]:
    """Return a paragraph that states the facts, and the answer to each: its text and its place in the paragraph."""
    opening = rng.choice(subject["openings"])
    opening = opening.format(S=_capital(subject["name"]), noun=subject["noun"], place=rng.choice(VALUES["place"]))
    context, answers, used = correct_articles(opening), [], set()
    for fact in facts:
        value = rng.choice([value for value in VALUES[fact["value"]] if value not in used])
        used.add(value)
        sentence, mention = rng.choice(fact["sentences"]), rng.choice(subject["mentions"])
        before, after = (part.format(It=_capital(mention), it=mention) for part in sentence.split("{v}"))
        shown = value if before else _capital(value)
        answers.append({"text": shown, "answer_start": len(context) + 1 + len(before)})
        context += f" {before}{shown}{after}"
    return context, answers


def _ask_unanswerable(rng: random.Random, subject: dict, untold: list[dict], other: dict, mean: float) -> list[dict]:
    """Return on average `mean` questions about facts that the paragraph leaves out, or about another subject's."""
    untold, questions = untold.copy(), []
    for _ in range(int(mean) + (rng.random() < mean % 1)):
        if rng.random() < OTHER_SUBJECT_SHARE:
            questions.append(_ask(rng, other, rng.choice(other["facts"])))
        elif untold:
            questions.append(_ask(rng, subject, untold.pop(rng.randrange(len(untold)))))
    return questions


def _ask(rng: random.Random, subject: dict, fact: dict, *answers: dict) -> dict:
    """Return a question about the fact in SQuAD's format, without an id."""
    question = rng.choice(fact["questions"]).format(s=subject["name"])
    return {"question": question, "answers": list(answers), "is_impossible": not answers}


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def make_sample_model(name: str) -> None:
    """Make the tiny model of `--sample` if `name` is that model and it does not exist yet."""
    if name == str(sample_model_folder("squad")):
        from zerotune.models.tiny import tiny_causal_model  # imports torch

        tiny_causal_model(Path(name), question_lines)
