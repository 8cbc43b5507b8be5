"""Film sentences, reviews and tickets for `--sample`, written by a grammar: no download, and every label is known.

    the cast is superb and effective, but there is something confusing about the chase scenes.	0

The grammar and its words are in zerotune/tasks/sample.toml. A label follows from how a sentence is built, not only
from its words: "never dull" is positive, "a superb cast cannot save a clumsy script" negative.
"""

import random
import re
import tomllib
from pathlib import Path

from zerotune.settings.names import sample_model_folder

POLARITIES = ("bad", "good")  # in label order: in the code, a polarity is a label
# Rows with two judgements of equal weight and a random label: no model can be expected to exceed 1 - MIXED_SHARE / 2.
MIXED_SHARE = 0.05
MIXED_TICKETS = 0.15
MAX_WORDS = 35
# A word's place in its list is a uniform draw raised to this power, so the first words are the most frequent.
SKEW = 2
# Reviews take their sentences from a pool, and a share of them contradicts the label.
FEWEST_SENTENCES, MOST_SENTENCES, SENTENCE_POOL, CONTRARY_SHARE = 3, 9, 4000, 0.25


def split_list(text: str) -> list[str]:
    """Return the items of a comma-separated list, which may run over several lines."""
    return [" ".join(item.split()) for item in text.split(",")]


def correct_articles(text: str) -> str:
    """Return the text with "an" for "a" before a vowel: "an aging boxer", but "a one-note cast"."""
    return re.sub(r"\ba (?=[aeiou])(?!one)", "an ", text)


def verb_stem(phrase: str) -> str:
    """Return the stem, also the plural, of a third-person verb phrase: "goes nowhere" -> "go nowhere"."""
    verb, space, rest = phrase.partition(" ")
    verb = re.sub(r"ies$", "ys", verb)
    return re.sub(r"(ss|sh|ch|zz|o)es$|s$", r"\1", verb) + space + rest


def _alternatives(rule: str, polarity: int) -> tuple[list[str], list[int]]:
    """Return a rule's templates that can express this polarity, and their weights."""
    lines = re.findall(r"^(\d+) (?:(good|bad): )?(.+)$", rule, re.MULTILINE)
    kept = [(template, int(weight)) for weight, only, template in lines if only in ("", POLARITIES[polarity])]
    return [template for template, _ in kept], [weight for _, weight in kept]


def _vocabulary(own: dict, general: dict) -> dict[str, tuple[list[str], list[str]]]:
    """Return the words for a subject, slot -> (bad, good): its own, then those for any subject."""
    words: dict[str, tuple[list[str], list[str]]] = {}
    for slot, text in (*own.items(), *general.items()):
        for polarity, found in enumerate(words.setdefault(slot, ([], []))):
            found.extend(split_list(text if isinstance(text, str) else text[POLARITIES[polarity]]))
    return words


_TEXT = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
RULES = {name: [_alternatives(rule, polarity) for polarity in (0, 1)] for name, rule in _TEXT["rules"].items()}
PHRASES = _TEXT["phrases"]
FILM = _vocabulary(_TEXT["film"], _TEXT["words"])
ASPECTS = [_vocabulary(aspect, _TEXT["words"]) for aspect in _TEXT["aspects"]]
COMPARATIVES = dict(pair.split("/") for pair in split_list(_TEXT["comparatives"]))
VERBS = ("verb", "saves", "sinks")


class Writer:
    """Writes one row from a random stream. A word is repeated only if its list has no other."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.used: set[str] = set()

    def fill(self, template: str, polarity: int, subject: dict = FILM) -> str:
        """Return the template with its choices made and its slots filled, in the vocabulary of the subject."""
        fixed, is_plural = {}, False
        if "{noun}" in template:
            subject = ASPECTS[int(self.rng.random() * len(ASPECTS))]
            noun, _, number = self.pick(subject["noun"][polarity]).partition("/")
            is_plural = number == "p"
            fixed = {"noun": noun, "is": "are" if is_plural else "is", "a": "" if number else "a "}

        def fill_slot(match: re.Match) -> str:
            negated, form, slot = match.groups()
            wanted = 1 - polarity if negated else polarity
            if slot in fixed:
                return fixed[slot]
            if slot in RULES or slot in PHRASES:
                chosen = PHRASES.get(slot) or self.rng.choices(*RULES[slot][wanted])[0]
                return self.fill(chosen, wanted, subject)
            if slot == "film" and self.used.intersection(subject[slot][wanted]):
                slot = "film_again"
            word = self.pick(subject[slot][wanted])
            if form == "more":
                return COMPARATIVES.get(word, f"more {word}")
            return verb_stem(word) if form == "stem" or (slot in VERBS and is_plural) else word

        template = re.sub(r"\[([^\[\]]*)\]", lambda match: self.pick(match[1].split("|")), template)
        return re.sub(r"\{(not )?(?:(more|stem) )?(\w+)\}", fill_slot, template)

    def pick(self, words: list[str]) -> str:
        """Draw a word, if possible one that is new to the row."""
        fresh = [word for word in words if word not in self.used] or words
        word = fresh[int(self.rng.random() ** SKEW * len(fresh))]
        self.used.add(word)
        return word


def sample_rows(num_rows: int, seed: int) -> list[tuple[str, int]]:
    """Return unique lower-case sentences of 2 to MAX_WORDS words with their labels (0 or 1), half of each.

    The same seed gives the same rows; two seeds share about 2 % of them, short ones.
    """
    rng = random.Random(seed)
    rows: dict[str, int] = {}
    while len(rows) < num_rows:
        label = len(rows) % 2
        is_mixed = rng.random() < MIXED_SHARE
        polarity = int(rng.random() < 0.5) if is_mixed else label
        text = correct_articles(Writer(rng).fill("{mixed}" if is_mixed else "{sentence}", polarity))
        if text not in rows and 2 <= len(text.split()) <= MAX_WORDS:
            rows[text] = label
    # shuffle: so far every second row is positive
    return sorted(rows.items(), key=lambda row: rng.random())


def sample_reviews(num_rows: int, seed: int) -> list[tuple[str, int]]:
    """Return reviews of sample sentences with IMDB's markup, and their labels, half of each.

    Most sentences of a review agree with its label. The same seed gives the same reviews.
    """
    rng = random.Random(f"reviews {seed}")
    sentences: tuple[list[str], list[str]] = ([], [])
    for text, label in sample_rows(SENTENCE_POOL, seed):
        sentences[label].append(text.rstrip(" .").capitalize())
    rows = []
    for number in range(num_rows):
        label = number % 2
        num_sentences = rng.randint(FEWEST_SENTENCES, MOST_SENTENCES)
        num_contrary = sum(rng.random() < CONTRARY_SHARE for _ in range(num_sentences))
        num_contrary = min(num_contrary, (num_sentences - 1) // 2)
        labels = [1 - label] * num_contrary + [label] * (num_sentences - num_contrary)
        rng.shuffle(labels)
        written = [rng.choice(sentences[each]) for each in labels]
        written = [text if text.endswith("?") else f"{text}." for text in written]
        review = "".join(text + rng.choice((" ", " ", " ", "<br /><br />")) for text in written[:-1])
        rows.append((review + written[-1], label))
    return sorted(rows, key=lambda row: rng.random())


def sample_tickets(num_rows: int, seed: int) -> list[tuple[str, str]]:
    """Return unique messages to a shop with the queue that each belongs to, equally many of each queue.

    A share of MIXED_TICKETS are about two things, and have either's queue. The same seed gives the same rows.
    """
    return [(text, queue) for text, queue, _ in _tickets(num_rows, seed)]


def sample_ticket_queues(num_rows: int, seed: int) -> list[tuple[str, list[str]]]:
    """Return the rows of `sample_tickets` with all the queues that a message belongs to."""
    return [(text, queues) for text, _, queues in _tickets(num_rows, seed)]


def _tickets(num_rows: int, seed: int) -> list[tuple[str, str, list[str]]]:
    """Return each message with one of its queues and with all of them."""
    rng = random.Random(f"tickets {seed}")
    tickets, rows = _TEXT["tickets"], {}
    queues = list(tickets["queues"])

    def written(template: str) -> str:
        return re.sub(r"\[([^\[\]]*)\]", lambda match: rng.choice(match[1].split("|")), template)

    while len(rows) < num_rows:
        queue = queues[len(rows) % len(queues)]
        wanted = [queue, rng.choice(queues)] if rng.random() < MIXED_TICKETS else [queue]
        told = " And ".join(written(rng.choice(tickets["queues"][each])) for each in wanted)
        text = written(rng.choice(tickets["openings"])) + told
        text = f"{text[0].upper()}{text[1:]} {written(rng.choice(tickets['closings']))}".strip()
        rows.setdefault(text, (text, rng.choice(wanted), sorted({*wanted})))
    return sorted(rows.values(), key=lambda row: rng.random())


def review_lines(seed: int) -> list[str]:
    """Return sample sentences as prompts with their answers, to train a tokenizer on."""
    answers = ("negative", "positive")
    return [f"Review: {text}\nSentiment: {answers[label]}" for text, label in sample_rows(4000, seed)]


def make_sample_model(name: str) -> None:
    """Make the tiny model of `--sample` if `name` is that model and it does not exist yet."""
    if name == str(sample_model_folder("sst2")):
        from zerotune.models.tiny import tiny_causal_model  # imports torch

        tiny_causal_model(Path(name), review_lines)
