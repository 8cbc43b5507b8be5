"""What `--sample` trains: review-like rows from our own grammar (sample_text.py), and a tiny random causal model."""

import os
import random
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import disk_is_full
from zerotune.tasks import sample_text
from zerotune.tasks.sample_text import ANY_MILD, ANY_STRONG, ASPECTS, BAD, FILM, GOOD, GRAMMAR, Aspect

# Rows that weigh one judgement against an equal one. Their label is a fair coin's, independent of the text: no model
# can be expected to exceed 1 - MIXED_SHARE / 2.
MIXED_SHARE = 0.05
MAX_WORDS = 35
# Of a review (sample_reviews): its sentences, how many differ in all reviews, the share that contradicts its label.
FEWEST_SENTENCES, MOST_SENTENCES, SENTENCE_POOL, CONTRARY_SHARE = 3, 9, 4000, 0.25
# A word's place in its list is a uniform draw to this power: the first words are the frequent ones.
SKEW = 2
# A review is about one film: after "the western", the same row says only "it" or one of these.
PLAIN_FILM = ["film", "movie", "picture"]
NEGATIVE, POSITIVE = 0, 1
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ADJECTIVE_SLOTS = ("adj", "mild", "strong", "more", "hedged", "degree")
VERB_SLOTS = ("verb", "stem", "does")

_SLOT = re.compile(r"\{(not )?(\w+)(?::([^}]*))?\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_A_BEFORE_VOWEL = re.compile(r"\ba (?=[aeiou])(?!one)")


@dataclass
class _Writer:
    """The random stream of one call and the words that the row at hand already holds."""

    rng: random.Random
    used: set[str] = field(default_factory=set)

    def pick(self, words: list[str]) -> str:
        """A word that the row does not hold yet, where there is one."""
        fresh = [word for word in words if word not in self.used] or words
        word = fresh[int(self.rng.random() ** SKEW * len(fresh))]
        self.used.add(word)
        return word

    def construction(self, name: str, polarity: int) -> str:
        """A template of the nonterminal `name` that can have the outcome `polarity`, drawn by weight."""
        options = [option for option in GRAMMAR[name] if polarity in option.outcomes]
        point = self.rng.random() * sum(option.weight for option in options)
        for option in options:
            point -= option.weight
            if point < 0:
                break
        return option.template


def _plural_verb(phrase: str) -> str:
    """The plural, or stem, of a third-person verb phrase: "goes nowhere" -> "go nowhere"."""
    verb, *rest = phrase.split(" ")
    if verb.endswith("ies"):
        verb = verb[:-3] + "y"
    else:
        verb = verb[:-2] if re.search(r"(?:ss|sh|ch|zz|o)es$", verb) else verb[:-1]
    return " ".join([verb, *rest])


def _adjective(writer: _Writer, slot: str, aspect: Aspect, polarity: int) -> str:
    mild, strong = aspect.mild[polarity] + ANY_MILD[polarity], aspect.strong[polarity] + ANY_STRONG[polarity]
    if slot == "mild":
        return writer.pick(mild)
    if slot == "strong":
        return writer.pick(strong)
    if slot == "more":
        word = writer.pick(mild)
        return sample_text.COMPARATIVES.get(word, f"more {word}")
    if slot == "adj" or (slot == "degree" and writer.rng.random() < 0.4):
        return writer.pick(mild if writer.rng.random() < 0.6 else strong)
    if slot == "hedged" or writer.rng.random() < 0.4:
        return f"{writer.pick(sample_text.HEDGES[polarity])} {writer.pick(mild)}"
    grade = "mild" if writer.rng.random() < 0.6 else "strong"
    return f"{writer.pick(sample_text.INTENSIFIERS[grade])} {writer.pick(mild if grade == 'mild' else strong)}"


def _noun_phrase(writer: _Writer, polarity: int) -> str:
    aspect = ASPECTS[int(writer.rng.random() * len(ASPECTS))]
    noun, _, number = writer.pick(aspect.nouns).partition("/")
    adjectives = [_adjective(writer, "adj", aspect, polarity) for _ in range(1 + (writer.rng.random() < 0.3))]
    return f"{'' if number else 'a '}{', '.join(adjectives)} {noun}"


def _film(writer: _Writer, polarity: int) -> str:
    return writer.pick(FILM.nouns if writer.used.isdisjoint(FILM.nouns) else PLAIN_FILM)


# Slots that depend on nothing else in their template.
_PARTS: dict[str, Callable[[_Writer, int], str]] = {
    "np": _noun_phrase,
    "film": _film,
    "quality": lambda writer, polarity: writer.pick(sample_text.QUALITIES[polarity]),
    "feeling": lambda writer, polarity: writer.pick(sample_text.FEELINGS[polarity]),
    "verdict": lambda writer, polarity: writer.pick(sample_text.VERDICTS[polarity]),
    "bare_verdict": lambda writer, polarity: writer.pick(sample_text.VERDICTS[polarity]).partition(" ")[2],
    "topic": lambda writer, polarity: f"{writer.pick(sample_text.PEOPLE)} {writer.pick(sample_text.PLACES)}",
    "opener": lambda writer, polarity: writer.pick(sample_text.OPENERS),
    "dull_thing": lambda writer, polarity: writer.pick(sample_text.DULL_THINGS),
    "fine_thing": lambda writer, polarity: writer.pick(sample_text.FINE_THINGS),
}


def _expand(writer: _Writer, template: str, polarity: int) -> str:
    """Fill a template whose outcome is `polarity`; a `{not slot}` gets the opposite polarity."""
    aspect, noun, number = FILM, "", ""
    if "{noun}" in template:
        aspect = ASPECTS[int(writer.rng.random() * len(ASPECTS))]
        noun, _, number = writer.pick(aspect.nouns).partition("/")
    agreeing = {"noun": noun, "is": "are" if number == "p" else "is"}

    def fill(match: re.Match) -> str:
        negated, slot, argument = match.groups()
        sign = -polarity if negated else polarity
        if slot in GRAMMAR:
            return _expand(writer, writer.construction(slot, sign), sign)
        if slot in ADJECTIVE_SLOTS:
            return _adjective(writer, slot, aspect, sign)
        if slot in VERB_SLOTS:
            verb = writer.pick(argument.split("/") if argument else aspect.verbs[sign])
            return _plural_verb(verb) if slot == "stem" or number == "p" else verb
        return agreeing[slot] if slot in agreeing else _PARTS[slot](writer, sign)

    return _SLOT.sub(fill, _CHOICE.sub(lambda match: writer.pick(match[1].split("|")), template))


def sample_rows(num_rows: int, seed: int) -> list[tuple[str, int]]:
    """Unique lower-case sentences of 2 to MAX_WORDS words and their labels (0 negative, 1 positive), half of each.

    The same `seed` gives the same rows; two seeds share about 2 % of theirs, short ones. A label follows from how its
    sentence is built ("never dull", "a superb cast cannot save a clumsy script"), but for a share MIXED_SHARE.
    """
    writer = _Writer(random.Random(seed))
    rows: dict[str, int] = {}
    while len(rows) < num_rows:
        label = (NEGATIVE, POSITIVE)[len(rows) % 2]
        writer.used.clear()
        mixed = writer.rng.random() < MIXED_SHARE
        polarity = (GOOD if writer.rng.random() < 0.5 else BAD) if mixed else (BAD, GOOD)[label]
        text = _expand(writer, writer.construction("mixed" if mixed else "sentence", polarity), polarity)
        text = _A_BEFORE_VOWEL.sub("an ", text)
        if text not in rows and 2 <= len(text.split()) <= MAX_WORDS:
            rows[text] = label
    # Sorted by a random key: in the order of writing, every second row is positive.
    return sorted(rows.items(), key=lambda row: writer.rng.random())


def sample_reviews(num_rows: int, seed: int) -> list[tuple[str, int]]:
    """Reviews of FEWEST_SENTENCES to MOST_SENTENCES sample sentences with IMDB's markup, and labels, half of each.

    Most sentences have the review's polarity; a share CONTRARY_SHARE has the other one, but never half of them. The
    same `seed` gives the same reviews."""
    rng = random.Random(f"reviews {seed}")
    sentences: tuple[list[str], list[str]] = ([], [])
    for text, label in sample_rows(SENTENCE_POOL, seed):
        sentences[label].append(text)
    rows = []
    for number in range(num_rows):
        label = (NEGATIVE, POSITIVE)[number % 2]
        num_sentences = rng.randint(FEWEST_SENTENCES, MOST_SENTENCES)
        num_contrary = sum(rng.random() < CONTRARY_SHARE for _ in range(num_sentences))
        num_contrary = min(num_contrary, (num_sentences - 1) // 2)
        labels = [1 - label] * num_contrary + [label] * (num_sentences - num_contrary)
        rng.shuffle(labels)
        written = [rng.choice(sentences[each]).rstrip(" .").capitalize() for each in labels]
        written = [text if text[-1] in "!?" else f"{text}." for text in written]
        review = "".join(sentence + rng.choice((" ", " ", " ", "<br /><br />")) for sentence in written[:-1])
        rows.append((review + written[-1], label))
    return sorted(rows, key=lambda row: rng.random())


def review_lines(seed: int) -> list[str]:
    """Sample sentences in prompts with their labels, for training a tokenizer."""
    answers = {NEGATIVE: "negative", POSITIVE: "positive"}
    return [f"Review: {text}\nSentiment: {answers[label]}" for text, label in sample_rows(4000, seed)]


def tiny_causal_model(folder: Path, seed: int = 0, lines: Callable[[int], list[str]] = review_lines) -> None:
    """Write a random Llama of about 0.2M weights and a tokenizer of our own text to `folder`, for from_pretrained.

    The text is what `lines` gives for the seed. The tokenizer is a byte-level BPE, to which no text is unknown; it puts
    one `<s>` in front. A complete folder is left alone, whatever its seed. Several processes may start at once: each
    writes aside, and the first to rename wins.

    Raises Refused when `folder` holds something else.
    """
    if _is_complete(folder):
        return
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = _train_tokenizer(lines(seed))
        tokenizer.save_pretrained(aside)
        _random_llama(tokenizer, seed).save_pretrained(aside)
        os.rename(aside, folder)
    except Exception as error:  # tokenizers raises a plain one for a full disk
        if not (isinstance(error, OSError) or disk_is_full(folder.parent, error)):
            raise
        if not _is_complete(folder):
            if folder.exists():
                raise Refused(
                    f"the sample model needs a new or empty folder, but {folder} holds something else: "
                    "delete it or name another"
                ) from None
            raise Refused(
                f"the sample model cannot be written to {folder} ({error}): set ZEROTUNE_CACHE elsewhere"
            ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES)


def _train_tokenizer(lines: list[str]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )


def _random_llama(tokenizer, seed: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
