"""Test BLEU, ROUGE and METEOR against their own tools, and finding METEOR's WordNet."""

import shutil

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from zerotune.metrics import text_overlap, wordnet

GOLDS = [["by the monks of Bec in 1240", "the monks of Bec"], ["a tower of white stone"], ["kelp and eels", "Kelp"]]
PREDICTED = ["the monks of Bec in the year", "tower of white stone", ""]


def overlap(golds=GOLDS, predicted=PREDICTED, **options):
    return text_overlap.overlap_scores(predicted, golds, **options)


def test_bleu_is_sacrebleus():
    streams = [[GOLDS[0][0], GOLDS[1][0], GOLDS[2][0]], [GOLDS[0][1], None, GOLDS[2][1]]]
    assert overlap()["bleu"] == pytest.approx(BLEU().corpus_score(PREDICTED, streams).score, abs=1e-9)
    again = [[*stream, stream[0]] for stream in streams]
    wanted = BLEU().corpus_score([*PREDICTED, PREDICTED[0]], again).score
    assert overlap([*GOLDS, GOLDS[0]], [*PREDICTED, PREDICTED[0]])["bleu"] == pytest.approx(wanted, abs=1e-9)


def test_rouge_by_hand():
    """q0's seven words contain the second gold's four; q1's five contain all four; q2 is empty and scores 0."""
    found = overlap()
    best = [2 * (4 / 7) / (1 + 4 / 7), 2 * (4 / 5) / (1 + 4 / 5), 0]
    assert found["rouge1"] == pytest.approx(100 * np.mean(best))
    # word pairs of q0: 3 of the 6 written, 3 of 3 in the second gold
    pairs = [2 * (3 / 6) / (1 + 3 / 6), 2 * (3 / 4) / (1 + 3 / 4), 0]
    assert found["rouge2"] == pytest.approx(100 * np.mean(pairs))
    assert found["rougeL"] <= found["rouge1"]


def test_perfect_answers_score_100_and_intervals_hold_the_scores():
    golds = [["the old stone tower of Hook"]] * 30
    found = overlap(golds, [each[0] for each in golds])
    for name in ("bleu", "rouge1", "rouge2", "rougeL"):
        assert found[name] == pytest.approx(100), name
        assert found[f"{name}_ci95"] == pytest.approx([100, 100]), name
    some = overlap(GOLDS * 20, PREDICTED * 20)
    for name in ("bleu", "rouge1", "rouge2", "rougeL"):
        low, high = some[f"{name}_ci95"]
        assert low < some[name] < high, name


def test_without_a_text_there_is_nothing_to_score():
    assert overlap([], []) == {}


def test_meteor_is_left_out_without_wordnet(monkeypatch):
    monkeypatch.setattr(text_overlap, "read_wordnet", lambda: None)
    assert "meteor" not in overlap()
    monkeypatch.undo()
    monkeypatch.setattr(wordnet, "_nltk_folder", lambda: None)
    assert wordnet.read_wordnet(wordnet.DEBIAN_FOLDER / "nowhere") is None


@pytest.mark.skipif(wordnet.read_wordnet() is None, reason="needs WordNet (Debian's package wordnet-base)")
def test_meteor_knows_synonyms():
    reader = wordnet.read_wordnet()
    assert reader.synset("dog.n.01").lemma_names() == ["dog", "domestic_dog", "Canis_familiaris"]
    assert "run" in reader.synset("run.v.01").lemma_names()
    # "car" and "auto" are one synset: two matches in one chunk of two words, 1 - 0.5 × (1/2)³
    assert overlap([["red auto"]], ["red car"])["meteor"] == pytest.approx(100 * (1 - 0.5 / 8))
    assert overlap([["red auto", "x"]], [""])["meteor"] == 0


@pytest.mark.skipif(not (wordnet.DEBIAN_FOLDER / "data.noun").exists(), reason="needs Debian's package wordnet-base")
def test_nltks_own_folder_is_read_where_debians_is_not_there(monkeypatch, tmp_path):
    """slurm/prefetch.sh copies the same files there, also without a lexnames file."""
    import nltk

    copied = tmp_path / "corpora" / "wordnet"
    copied.mkdir(parents=True)
    for path in wordnet.DEBIAN_FOLDER.iterdir():
        shutil.copyfile(path, copied / path.name)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert wordnet.read_wordnet(tmp_path / "nowhere").synset("dog.n.01").lemma_names()[0] == "dog"
