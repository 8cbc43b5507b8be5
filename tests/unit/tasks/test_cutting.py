"""Test cutting texts in the middle, and shots to their half of the window: counted in tokens, at whole characters."""

import pytest
from tiny_models import character_model
from transformers import AutoTokenizer

from zerotune.errors import Refused
from zerotune.tasks.cutting import cut_texts, fit_shots
from zerotune.tasks.splits import Example


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """Return a tokenizer of single bytes."""
    folder = tmp_path_factory.mktemp("characters")
    character_model(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("most", [0, 1, 5, 6, 7, 8, 30, 31])
def test_no_text_keeps_more_tokens_than_it_may(characters, most):
    texts = ["an unhurried film that", "x" * 31, "é" * 12, "😀 " * 5, "fine"]
    for before, after in zip(texts, cut_texts(characters, texts, [most] * 5), strict=True):
        num_before, num_after = (
            len(characters(text, add_special_tokens=False)["input_ids"]) for text in (before, after)
        )
        assert num_after <= most
        assert after == before if num_before <= most else num_after > most - 8, (before, after)


def test_shots_are_cut_to_half_of_the_window_the_longest_first(characters):
    """Half of a window of 200 holds 20 + 40 + 40 bytes: the short shot stays whole, the others share 80."""
    shots = [Example(str(size), "x" * size, 0) for size in (90, 20, 70)]
    fitted, num_cut = fit_shots(characters, shots, 200)
    assert [len(shot.text) for shot in fitted] == [40, 20, 40] and num_cut == 2
    assert [shot.id for shot in fitted] == ["90", "20", "70"] and fitted[0].text.count(" ... ") == 1
    assert fit_shots(characters, shots, 400) == (shots, 0) and fit_shots(characters, [], 10) == ([], 0)


def test_shots_of_which_too_little_would_be_left_are_refused(characters):
    shots = [Example(str(number), "x" * 90, 0) for number in range(4)]
    with pytest.raises(Refused, match=r"--shots 4 do not fit: .* window of 120 each would be cut to 15 tokens"):
        fit_shots(characters, shots, 120)
