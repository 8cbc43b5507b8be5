"""Prompts give the recorded answers of EleutherAI's lm-evaluation-harness, with models made by the same recipe.

tests/fixtures/record_lm_eval.py repeats the recording.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import byte_tokenizer, seeded_model

from zerotune.tasks.prompts import Prompt, encode_prompts

RECORD = json.loads((Path(__file__).parents[2] / "fixtures/lm_eval.json").read_text())
CASES = RECORD["cases"]
NAMES = [f"{case['kind']}-{case['label_words'][0]}-{len(case['merged'])}-{case['num_shots']}-shots" for case in CASES]
CPU = torch.device("cpu")
# Ten float32 log-probabilities are summed in another order; the closest item is 0.057 from a tie.
TOLERANCE = 1e-4


def encoded_and_scored(case: dict, **other_sizes):
    """Return a case's prompts and their log-likelihoods [items, labels], from one batch after the shared prefix."""
    tokenizer = byte_tokenizer(tuple(case["merged"]))
    model = seeded_model(case["kind"], case["seed"], len(tokenizer), **(case["sizes"] | other_sizes))
    shots = tuple((text, label) for text, label in RECORD["shots"][: case["num_shots"]])
    prompt = Prompt(RECORD["template"], tuple(case["label_words"]), shots=shots)
    data = encode_prompts(tokenizer, prompt, RECORD["texts"], RECORD["window"], RECORD["window"])
    with torch.no_grad():
        scores = data.log_likelihoods(model, np.arange(len(RECORD["texts"])), CPU, data.prefix(model, CPU))
    return data, scores


def difference(log_likelihoods) -> np.ndarray:
    """Return the second label's score minus the first's, [items]; terms that both labels share cancel."""
    first, second = np.array(log_likelihoods).T
    return second - first


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_choices_and_log_likelihoods_are_those_of_lm_eval(case):
    data, scores = encoded_and_scored(case)
    assert data.num_truncated == 0
    assert data.single_token == bool(case["merged"])
    np.testing.assert_array_equal(scores.argmax(axis=1), case["choices"])
    np.testing.assert_allclose(difference(scores), difference(case["log_likelihoods"]), rtol=0, atol=TOLERANCE)
    if not data.single_token:
        np.testing.assert_allclose(scores, case["log_likelihoods"], rtol=0, atol=TOLERANCE)


def test_the_recording_can_tell_right_from_wrong():
    """Each case answers with both labels, no answer depends on rounding, and a mean over tokens would differ."""
    assert {(case["kind"], case["num_shots"]) for case in CASES} == {
        (kind, shots) for kind in ("llama", "mistral", "gemma2") for shots in (0, 4)
    }
    for case in CASES:
        assert set(case["choices"]) == {0, 1}
        assert np.abs(difference(case["log_likelihoods"])).min() > 100 * TOLERANCE
        lengths = [len(f" {word}") for word in case["label_words"]]
        means = np.array(case["log_likelihoods"]) / lengths
        assert (means.argmax(axis=1) == case["choices"]).all() == (lengths[0] == lengths[1])


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"sliding_window": RECORD["window"]}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
    ],
)
def test_windows_and_soft_caps_matter_to_the_recorded_answers(kind, sizes):
    for case in (case for case in CASES if case["kind"] == kind):
        _, scores = encoded_and_scored(case, **sizes)
        wrong = np.abs(difference(scores) - difference(case["log_likelihoods"]))
        assert wrong.max() > 100 * TOLERANCE
