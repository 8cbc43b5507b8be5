"""Test how metrics.json describes an evaluation, and the flags that a model has no use for."""

import json
import shutil

import pytest
from default_settings import text_evaluation
from tiny_models import CHAT_TEMPLATE, character_model, saved_record, tiny_model

from zerotune.errors import Refused
from zerotune.evaluation.options import base_model, check_flags, training_description, tuned_model
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.splits import Example
from zerotune.training.generation import format_in_training

SHOTS = (Example("train-1", "good film", 1), Example("train-2", "dull", 0))


def check(name, **changes):
    check_flags(text_evaluation(name, **changes), read_config(name, None), load_tokenizer(name, None))


def test_the_flat_settings_of_metrics_json():
    evaluation = text_evaluation(
        "org/name",
        model={"revision": "v1", "method": "qlora", "attention": "sdpa", "precision": "bf16", "seed": 9},
        text={"max_length": 40, "truncation": "head-and-tail"},
        prompt={"format": "chat", "calibrate": "contextual", "answer_by": "generation", "shots": 2},
        tokens_per_device=512,
        seed=3,
        shots=SHOTS,
        wording=4,
        as_generator=True,
        data_sha256="abc",
    )
    assert evaluation.described() == {
        "model": "org/name", "revision": "v1", "attention": "sdpa", "tokens_per_device": 512, "max_length": 40,
        "load_4bit": True, "prompt_format": "chat", "calibrate": "contextual", "answer_by": "generation",
        "as_generator": True, "shots": 2, "wording": 4, "truncation": "head-and-tail", "seed": 3,
        "data_sha256": "abc", "dtype": "bf16",
    }  # fmt: skip


@pytest.mark.parametrize(("method", "loaded"), [("full", "full"), ("lora", "full"), ("qlora", "qlora")])
def test_a_runs_model_is_evaluated_without_adapters_and_its_final_as_it_is(method, loaded):
    trained = ModelSettings(
        "m", "v1", method, lora_rank=4, attention="eager", precision="bf16", zero_stage=3, seed=7,
        activation_checkpointing=True,
    )  # fmt: skip
    assert base_model(trained) == ModelSettings("m", "v1", loaded, attention="eager", precision="bf16", seed=7)
    assert tuned_model("runs/a/final", trained) == ModelSettings("runs/a/final", attention="eager", precision="bf16")


def test_what_metrics_json_says_of_a_models_training():
    assert training_description({}, "org/name", 4) == {
        "method": None, "model": "org/name", "seed": 4, "training_sha256": None
    }  # fmt: skip
    record = {"method": "lora", "base_model": "org/base", "seed": 1, "training_sha256": "x", "max_length": 60}
    assert training_description(record, "runs/a/final", 4) == {
        "method": "lora", "model": "org/base", "seed": 1, "training_sha256": "x"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"shots": SHOTS}, "--shots"),
        ({"prompt": {"calibrate": "contextual"}}, "--calibrate"),
        ({"prompt": {"answer_by": "generation"}}, "--answer-by"),
        ({"prompt": {"format": "plain"}}, "--prompt-format"),
        ({"shots": SHOTS, "prompt": {"calibrate": "contextual"}}, "--shots, --calibrate"),
    ],
)
def test_a_classifier_head_has_no_use_for_prompts(changes, flag):
    name = tiny_model("bert")
    check(name, text={"max_length": 64})
    with pytest.raises(Refused, match=f"answers with a classifier head, which has no use for {flag}: leave it out"):
        check(name, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text": {"max_length": 65}}, "--max-length"),
        ({"model": {"attention": "flash_attention_2"}}, "flash_attention_2"),
    ],
)
def test_lengths_and_kernels_that_the_model_does_not_have(changes, words):
    with pytest.raises(Refused, match=words):
        check(tiny_model("bert"), **changes)


def test_prompts_are_checked_for_causal_models(tmp_path):
    name = tiny_model("llama")
    check(name, shots=SHOTS, prompt={"calibrate": "contextual"})
    with pytest.raises(Refused, match="--calibrate is about likelihoods"):
        check(name, prompt={"calibrate": "contextual", "answer_by": "generation"})
    with pytest.raises(Refused, match="has no chat template"):
        check(name, prompt={"format": "chat"})
    character_model(tmp_path, CHAT_TEMPLATE)
    check(str(tmp_path), prompt={"format": "chat"})


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"shots": SHOTS}, "--shots"),
        ({"wording": 1}, "--prompt-seeds"),
        ({"prompt": {"format": "chat"}}, "--prompt-format"),
    ],
)
def test_a_tuned_generator_has_a_prompt_of_its_own(tmp_path, changes, flag):
    folder = tmp_path / "final"
    shutil.copytree(tiny_model("llama"), folder)
    record = saved_record("generate")
    (folder / "task.json").write_text(json.dumps(record))
    for prompt_format in ("auto", "plain"):
        check(str(folder), prompt={"format": prompt_format})
    words = f"tuned on a prompt of its own, without shots and in the plain format: leave {flag} out"
    with pytest.raises(Refused, match=words):
        check(str(folder), **changes)


def test_a_tuned_generator_is_trained_further_in_its_own_format(tmp_path):
    record = saved_record("generate")
    (tmp_path / "task.json").write_text(json.dumps(record | {"prompt": record["prompt"] | {"format": "chat"}}))
    model = ModelSettings(str(tmp_path))
    assert [format_in_training(wanted, model) for wanted in ("auto", "chat")] == ["chat", "chat"]
    with pytest.raises(Refused, match=r"--prompt-format plain: .* was tuned in the chat format: leave the flag out"):
        format_in_training("plain", model)
    assert format_in_training("plain", ModelSettings(tiny_model("llama"))) == "plain"
