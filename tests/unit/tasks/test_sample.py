"""The text and the model of `--sample`: labels follow the construction, and two processes may start at once."""

import hashlib
import itertools
import random
import subprocess
import sys
from collections import Counter

import pytest

from zerotune.errors import Refused
from zerotune.tasks import sample as samples
from zerotune.tasks import sample_text
from zerotune.tasks.sample_text import ASPECTS, BAD, FILM, GOOD, GRAMMAR


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("sample") / "models" / "tiny"
    samples.tiny_causal_model(target)
    return target


def judgements(text: str) -> Counter:
    """How many good and bad words of FILM's and the general lists a text holds, as {1: count, -1: count}."""
    lists = [FILM.mild, FILM.strong, sample_text.ANY_MILD, sample_text.ANY_STRONG, sample_text.QUALITIES]
    words = {word: sign for pair in lists for sign in (GOOD, BAD) for word in pair[sign]}
    return Counter(words[word.strip(".,?;")] for word in text.split() if word.strip(".,?;") in words)


@pytest.mark.parametrize("outcome", [GOOD, BAD])
@pytest.mark.parametrize(
    ("template", "same", "opposite"),
    [
        ("never {not mild}", 0, 1),
        ("not {not adj} but {adj}", 1, 1),
        ("a {film} without a trace of {not quality}", 0, 1),
        ("a {adj}, {adj} {film}", 2, 0),
        ("short on {not quality} and long on {quality}", 1, 1),
        ("nobody said it was {not sentence_of_one}", 1, 0),
    ],
)
def test_parts_get_the_polarity_that_the_construction_gives_them(monkeypatch, template, outcome, same, opposite):
    # A part that itself negates: two negations give the polarity of the whole back.
    double = sample_text.Construction(1, (GOOD, BAD), "never {not mild}")
    monkeypatch.setitem(samples.GRAMMAR, "sentence_of_one", [double])
    for seed in range(20):
        found = judgements(samples._expand(samples._Writer(random.Random(seed)), template, outcome))
        assert (found[outcome], found[-outcome]) == (same, opposite)


def test_one_sided_constructions_never_express_the_other_outcome():
    writer = samples._Writer(random.Random(0))
    drawn = {outcome: {writer.construction("rescue", outcome) for _ in range(200)} for outcome in (GOOD, BAD)}
    assert len(drawn[GOOD]) == len(drawn[BAD]) == 2
    assert drawn[GOOD].isdisjoint(drawn[BAD])


def test_every_construction_expands_to_clean_text():
    for name, constructions in GRAMMAR.items():
        for construction in constructions:
            for outcome in construction.outcomes:
                writer = samples._Writer(random.Random(f"{name} {construction.template}"))
                text = samples._expand(writer, construction.template, outcome)
                assert text == " ".join(text.split()), text
                assert not set("{}[]|/") & set(text), text


def test_no_word_is_both_good_and_bad():
    pairs = [FILM.mild, FILM.strong, FILM.verbs, sample_text.QUALITIES, sample_text.VERDICTS, sample_text.FEELINGS]
    pairs += [sample_text.ANY_MILD, sample_text.ANY_STRONG]
    pairs += [pair for aspect in ASPECTS for pair in (aspect.mild, aspect.strong, aspect.verbs)]
    good, bad = ({word for pair in pairs for word in pair[sign]} for sign in (GOOD, BAD))
    assert good.isdisjoint(bad)
    assert min(len(good), len(bad)) > 150
    for aspect in [FILM, *ASPECTS]:  # a word listed twice for one noun could be drawn twice in a row
        mild = aspect.mild[GOOD] + aspect.mild[BAD] + sample_text.ANY_MILD[GOOD] + sample_text.ANY_MILD[BAD]
        strong = aspect.strong[GOOD] + aspect.strong[BAD] + sample_text.ANY_STRONG[GOOD] + sample_text.ANY_STRONG[BAD]
        assert len(mild + strong) == len(set(mild + strong))


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [("goes nowhere", "go nowhere"), ("tries too hard", "try too hard"), ("loses its way", "lose its way"),
     ("fizzles", "fizzle"), ("touches a nerve", "touch a nerve"), ("cloys", "cloy")],
)  # fmt: skip
def test_plural_verb(phrase, expected):
    assert samples._plural_verb(phrase) == expected


def test_rows_are_unique_balanced_lower_case_and_sized():
    rows = samples.sample_rows(2001, seed=3)
    texts = [text for text, _ in rows]
    assert len(set(texts)) == 2001
    assert Counter(label for _, label in rows) == {0: 1001, 1: 1000}
    assert all(text == text.lower() == text.strip() for text in texts)
    sizes = sorted(len(text.split()) for text in texts)
    assert sizes[0] >= 2
    assert sizes[-1] <= samples.MAX_WORDS
    assert 8 <= sizes[len(sizes) // 2] <= 14
    assert len({word.strip(".,;?") for text in texts for word in text.split()}) > 700
    # Written alternately, then shuffled: neighbours agree about half of the time (sd 0.011 for 2,000 pairs).
    agreement = sum(a[1] == b[1] for a, b in itertools.pairwise(rows)) / 2000
    assert 0.45 < agreement < 0.55


def test_a_seed_gives_its_own_rows_and_always_the_same_ones():
    rows = samples.sample_rows(1000, seed=1)
    assert rows == samples.sample_rows(1000, seed=1)
    other = samples.sample_rows(1000, seed=2)
    assert len({text for text, _ in rows} & {text for text, _ in other}) < 50


def test_articles():
    assert samples._A_BEFORE_VOWEL.sub("an ", "a uneven plot, a one-note cast, a aging boxer") == (
        "an uneven plot, a one-note cast, an aging boxer"
    )
    assert not [text for text, _ in samples.sample_rows(2000, seed=4) if " a a" in f" {text}" or " an b" in f" {text}"]


def test_mixed_rows_carry_a_label_that_their_text_does_not_tell():
    marked = [
        ((judgements(text.removeprefix("by turns ").split(" and ")[0])[GOOD] > 0), label)
        for text, label in samples.sample_rows(60_000, seed=5)
        if text.startswith("by turns ")
    ]
    share = sum((label == 1) == first_is_good for first_is_good, label in marked) / len(marked)
    # Five standard deviations of a fair coin.
    assert len(marked) > 200
    assert abs(share - 0.5) < 2.5 / len(marked) ** 0.5


def test_bag_of_words_is_well_above_chance_and_well_below_the_ceiling():
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, test = samples.sample_rows(2000, seed=6), samples.sample_rows(1000, seed=7)
    counts = CountVectorizer()
    model = LogisticRegression(C=0.3, max_iter=500).fit(
        counts.fit_transform([text for text, _ in train]), [label for _, label in train]
    )
    accuracy = model.score(counts.transform([text for text, _ in test]), [label for _, label in test])
    # Measured 0.74 (sd 0.014); the ceiling is 1 - MIXED_SHARE / 2 = 0.975.
    assert 0.65 < accuracy < 0.85


def test_tokenizer_has_one_bos_a_pad_and_whole_label_words(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<s>", "</s>", "<pad>", "<unk>")  # fmt: skip
    prompt = "Review: the script is never dull.\nSentiment:"
    ids = tokenizer(prompt)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids[0] == tokenizer.bos_token_id
    for word in (" negative", " positive"):
        answer = tokenizer(word, add_special_tokens=False)["input_ids"]
        assert len(answer) == 1
        assert tokenizer(prompt + word)["input_ids"] == ids + answer
    strange = "naïve — 日本 \x07 🎬\n\ttabs"
    encoded = tokenizer(strange, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(encoded) == strange
    assert tokenizer.unk_token_id not in encoded


def test_model_is_a_small_llama_that_fits_its_tokenizer(folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama"
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert model.config.bos_token_id == tokenizer.bos_token_id
    assert model.num_parameters() < 500_000
    with torch.no_grad():
        logits = model(**tokenizer("a witty film", return_tensors="pt")).logits
    assert torch.isfinite(logits).all()


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_model_is_the_same_for_a_seed_and_a_complete_folder_is_left_alone(folder, tmp_path):
    import torch

    state = torch.random.get_rng_state()
    samples.tiny_causal_model(tmp_path / "again")
    assert torch.equal(state, torch.random.get_rng_state())
    assert digests(tmp_path / "again") == digests(folder)
    samples.tiny_causal_model(tmp_path / "again", seed=1)
    assert digests(tmp_path / "again") == digests(folder)
    samples.tiny_causal_model(tmp_path / "other", seed=1)
    assert digests(tmp_path / "other")["model.safetensors"] != digests(folder)["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_two_processes_at_once_leave_one_complete_folder(folder, tmp_path):
    program = "import sys, pathlib, zerotune.tasks.sample as s; s.tiny_causal_model(pathlib.Path(sys.argv[1]) / 'tiny')"
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert digests(tmp_path / "tiny") == digests(folder)


def test_losing_the_race_is_no_error(folder, tmp_path, monkeypatch):
    target = tmp_path / "tiny"
    original = samples._random_llama

    def other_process_wins(tokenizer, seed):
        folder_copy = target.with_name("copy")
        samples.shutil.copytree(folder, folder_copy)
        folder_copy.rename(target)
        return original(tokenizer, seed)

    monkeypatch.setattr(samples, "_random_llama", other_process_wins)
    samples.tiny_causal_model(target)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(Refused, match="holds something else"):
        samples.tiny_causal_model(tmp_path / "thesis")
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]
