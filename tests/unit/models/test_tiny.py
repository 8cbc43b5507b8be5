"""Test the tiny model of `--sample`: a Llama and a matching tokenizer, also if two processes write them at once."""

import hashlib
import shutil
import subprocess
import sys

import pytest

from zerotune.errors import Refused
from zerotune.models import tiny
from zerotune.models.tiny import tiny_causal_model
from zerotune.tasks.sample import review_lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("sample") / "models" / "tiny"
    tiny_causal_model(target, review_lines)
    return target


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
    tiny_causal_model(tmp_path / "again", review_lines)
    assert torch.equal(state, torch.random.get_rng_state())
    assert digests(tmp_path / "again") == digests(folder)
    tiny_causal_model(tmp_path / "again", review_lines, seed=1)
    assert digests(tmp_path / "again") == digests(folder)
    tiny_causal_model(tmp_path / "other", review_lines, seed=1)
    assert digests(tmp_path / "other")["model.safetensors"] != digests(folder)["model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "other"]


def test_two_processes_at_once_leave_one_complete_folder(folder, tmp_path):
    program = (
        "import pathlib, sys; from zerotune.models.tiny import tiny_causal_model; "
        "from zerotune.tasks.sample import review_lines; "
        "tiny_causal_model(pathlib.Path(sys.argv[1]) / 'tiny', review_lines)"
    )
    started = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)]) for _ in range(2)]
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert digests(tmp_path / "tiny") == digests(folder)


def test_losing_the_race_is_no_error(folder, tmp_path, monkeypatch):
    target = tmp_path / "tiny"
    original = tiny._random_llama

    def other_process_wins(tokenizer, seed):
        folder_copy = target.with_name("copy")
        shutil.copytree(folder, folder_copy)
        folder_copy.rename(target)
        return original(tokenizer, seed)

    monkeypatch.setattr(tiny, "_random_llama", other_process_wins)
    tiny_causal_model(target, review_lines)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("precious")
    with pytest.raises(Refused, match="holds something else"):
        tiny_causal_model(tmp_path / "thesis", review_lines)
    assert [path.name for path in tmp_path.rglob("*")] == ["thesis", "chapter.txt"]
