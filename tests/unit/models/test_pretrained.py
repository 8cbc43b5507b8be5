"""Test the requirements for a model's config and tokenizer, and the refusals before a weight is read."""

import json

import numpy as np
import pytest
from huggingface_hub import errors as hub_errors
from tiny_models import (
    CAUSAL,
    ENCODERS,
    LABELS,
    SPECIAL,
    model_copy,
    saved_record,
    tiny_model,
    word_tokenizer,
)
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from zerotune.errors import Refused
from zerotune.models import pretrained
from zerotune.models.model_files import check_weight_files
from zerotune.models.pretrained import (
    answers_by_prompt,
    check_generator,
    check_labels,
    check_texts,
    check_token_ids,
    check_tuned_for,
    check_window,
    label_columns,
    load_tokenizer,
    read_config,
    read_model,
)
from zerotune.settings.groups import ModelSettings

# --- config ---


def test_models_that_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"has no config\.json"):
        read_config(str(tmp_path / "empty"), None)
    with pytest.raises(Refused, match=r"auto_map.*never runs"):
        read_config(str(model_copy(tmp_path / "llama", "llama", auto_map={"AutoConfig": "code.Config"})), None)
    with pytest.raises(
        Refused, match=r"is gpt2; the nearest that works is llama, for example meta-llama/\S+ \(all: llama, .*albert"
    ):
        read_config(str(model_copy(tmp_path / "mistral", "mistral", model_type="gpt2")), None)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"model_type": ')
    with pytest.raises(Refused, match="cannot be read"):
        read_config(str(tmp_path / "torn"), None)


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            hub_errors.GatedRepoError,
            r"a/b is gated: accept its terms at https://huggingface.co/a/b, then `hf auth login`",
        ),
        (hub_errors.RepositoryNotFoundError, "neither a folder nor a model on the hub"),
        (hub_errors.HFValidationError, "neither a folder nor a model on the hub"),
        (hub_errors.RevisionNotFoundError, "--revision must be"),
        (hub_errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (hub_errors.OfflineModeIsEnabled, "HF_HUB_OFFLINE is set, so the hub is not asked"),
    ],
)
def test_a_hub_id_that_cannot_be_read_is_one_line_with_the_way_out(cause, message, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("a message of\nseveral lines") from cause.__new__(cause)  # without a response

    monkeypatch.setattr(PretrainedConfig, "get_config_dict", fail)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1" if cause is hub_errors.OfflineModeIsEnabled else "")
    monkeypatch.setattr(pretrained, "find_file", lambda *_: "config.json")
    with pytest.raises(Refused, match=message) as caught:
        read_config("a/b", None)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_told_from_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("minilm", "runs/help/final", "runs/logs"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/help/final/config.json").write_text("{}")
    for name, message in {
        "runs/hlep": r"^no such folder: --model runs/hlep \(did you mean 'runs/help'\?\); give",
        "./mniilm/": r"^no such folder: --model \./mniilm/ \(did you mean 'minilm'\?\); give",
        "../other": r"^no such folder: --model \.\./other; give",
        "a/b/c": "^no such folder: --model a/b/c; give",
        "runs/help/final/config.json": "is a file; give the folder",
        "https://huggingface.co/org/name/tree/main": "not an address: give org/name$",
        "runs": r"the folder runs has no config.json and is not a run \(did you mean 'runs/help'\?\); give",
        "runs/logs": "the folder runs/logs has no config.json and is not a run; give",
        "org/name": "neither a folder nor a model|not a folder here and not in the cache",
    }.items():
        with pytest.raises(Refused, match=message):
            read_config(name, None)


@pytest.mark.parametrize("change", [{"num_hidden_layers": "x"}, {"num_attention_heads": 7}])
def test_configs_at_odds_with_themselves(tmp_path, change):
    with pytest.raises(Refused, match="cannot be used"):
        read_config(str(model_copy(tmp_path / "m", **change)), None)


def test_positions_that_are_counted_from_a_pad_token_need_one(tmp_path):
    with pytest.raises(Refused, match="has no pad_token_id, from which a roberta counts positions: add it"):
        read_config(str(model_copy(tmp_path / "m", "roberta", pad_token_id=None)), None)


def test_a_config_that_is_no_object(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "config.json").write_text("[1]")
    with pytest.raises(Refused, match="not an object"):
        read_config(str(folder), None)


def classifier_config(labels):
    names = dict(enumerate(labels))
    return AutoConfig.for_model("bert", id2label=names, architectures=["BertForSequenceClassification"])


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("NEGATIVE", "POSITIVE"), [0, 1]),
        (("LABEL_0", "LABEL_1"), [0, 1]),
        (LABELS, [0, 1]),
        (("neg", "pos"), [0, 1]),
        (("0", "1"), [0, 1]),
        (("POSITIVE", "NEGATIVE"), [1, 0]),
        (("Pos", "Neg"), [1, 0]),
        (("LABEL_1", "LABEL_0"), [1, 0]),
    ],
)
def test_labels_that_a_published_classifier_may_have(names, columns):
    assert label_columns(classifier_config(names), LABELS) == columns


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b"),
        ("a", "b", "c"),
        ("LABEL_0", "LABEL_1", "LABEL_2"),
        ("", "positive"),
        ("neg", "negative"),
        ("no", "pos"),
    ],
)
def test_labels_of_something_else(names):
    theirs = ", ".join(map(repr, names))
    found = f"'negative', 'positive': it was trained for {theirs}; train from its base model, or evaluate a model"
    with pytest.raises(Refused, match=found):
        label_columns(classifier_config(names), LABELS)


def test_numbered_labels_cannot_be_put_in_another_order_than_the_tasks(capsys):
    numbered = classifier_config(("LABEL_0", "LABEL_1"))
    check_labels("org/name", numbered, LABELS, ("Negative", "positive"))
    assert "LABEL_0 is 'negative', LABEL_1 is 'positive'" in capsys.readouterr().out
    with pytest.raises(Refused, match="the labels of org/name are only numbers, and --glue reads them in the order"):
        check_labels("org/name", numbered, LABELS, ("positive", "negative"))
    check_labels("org/name", classifier_config(("POSITIVE", "NEGATIVE")), LABELS, ("positive", "negative"))


def test_beginnings_that_fit_two_labels_mean_neither():
    assert label_columns(classifier_config(("refu", "repl")), ("refund", "reply")) == [0, 1]
    with pytest.raises(Refused, match="it was trained for 're', 'reply'"):
        label_columns(classifier_config(("re", "reply")), ("refund", "reply"))


def test_a_model_without_a_classifier_has_the_labels_of_the_task():
    assert label_columns(AutoConfig.for_model("llama"), ("one", "two", "three")) == [0, 1, 2]


@pytest.mark.parametrize("base", ["./base", "../gone/base", "{folder}/gone"])
def test_an_adapter_whose_base_is_gone_is_named_with_it(tmp_path, base):
    base = base.format(folder=tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"}))
    with pytest.raises(Refused, match=rf"the adapter {tmp_path} belongs to the model {base}, which is not there: put"):
        read_model(ModelSettings(str(tmp_path)), "sst2", LABELS)


def test_an_adapter_whose_base_is_not_in_the_cache_is_named_with_it(tmp_path):
    adapter = {"base_model_name_or_path": "no-such-org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises(Refused, match=f"the adapter {tmp_path} belongs to the model no-such-org/base: no-such-org"):
        read_model(ModelSettings(str(tmp_path)), "sst2", LABELS)


@pytest.mark.parametrize(
    ("task", "head", "wanted", "script"),
    [("sst2", "classify", "squad", "eval/sst2.py"), ("squad", "generate", "sst2", "eval/qa.py")],
)
def test_a_model_that_was_tuned_for_something_else_is_refused(tmp_path, task, head, wanted, script):
    record = saved_record(head, task=task)
    (tmp_path / "task.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match=f"was tuned for {task}, and this is {wanted}: evaluate it with {script}"):
        check_tuned_for(str(tmp_path), None, wanted)
    check_tuned_for(str(tmp_path), None, task)
    (tmp_path / "task.json").write_text('{"task": "text-generation"}')  # another tool's file
    check_tuned_for(str(tmp_path), None, wanted)


@pytest.mark.parametrize(("kind", "most"), [("bert", 64), ("roberta", 60), ("llama", 64)])
def test_texts_longer_than_the_positions(kind, most):
    config = read_config(tiny_model(kind), None)
    check_window("m", config, most)
    with pytest.raises(Refused, match=f"more than the {most} positions"):
        check_window("m", config, most + 1)


def test_token_ids_without_an_embedding():
    config = AutoConfig.for_model("llama", vocab_size=10)
    check_token_ids("m", config, np.array([3, 9]))
    with pytest.raises(Refused, match="gives token 10 and the model has 10"):
        check_token_ids("m", config, np.array([3, 10]))


def test_a_pad_token_without_an_embedding(tmp_path):
    folder = str(model_copy(tmp_path / "m"))
    tokenizer = load_tokenizer(folder, None)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"vocab_size": len(tokenizer) - 1}))
    with pytest.raises(Refused, match=r"the pad token must have an embedding: '\[PAD\]' is id 14 but .* has 14"):
        read_model(ModelSettings(folder), "sst2", LABELS)


def test_texts_with_a_token_without_an_embedding():
    tokenizer = load_tokenizer(tiny_model("llama"), None)
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer))
    tokenizer.add_tokens(["funny"])
    check_texts("m", config, tokenizer, ["a dull film", "very good"])
    with pytest.raises(Refused, match="gives token 14 and the model has 14"):
        check_texts("m", config, tokenizer, ["a dull film", "very funny"])


# --- tokenizer ---


def test_texts_are_padded_and_cut_on_the_right_whatever_the_tokenizer_says(tmp_path):
    word_tokenizer(pad_token="<pad>", padding_side="left", truncation_side="left").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), None)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "right")


def save_tokenizer(folder, special=tuple(SPECIAL), **tokens):
    word_tokenizer(special, **tokens).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("special", "tokens", "pad"),
    [
        (SPECIAL, {"pad_token": "</s>"}, "</s>"),
        (SPECIAL, {}, "<pad>"),
        (
            ["<unk>", "<s>", "<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"],
            {},
            "<|finetune_right_pad_id|>",
        ),
        (["<unk>", "<s>", "<|reserved_special_token_0|>"], {}, "<|reserved_special_token_0|>"),
        (["<unk>", "<s>"], {"unk_token": "<unk>"}, "<unk>"),
    ],
)
def test_pad_token(special, tokens, pad, tmp_path):
    folder = save_tokenizer(tmp_path, tuple(special), bos_token="<s>", **tokens)
    size = len(AutoTokenizer.from_pretrained(folder))
    tokenizer = load_tokenizer(folder, None)
    assert (tokenizer.pad_token, tokenizer.padding_side, len(tokenizer)) == (pad, "right", size)
    assert tokenizer.pad_token_id == special.index(pad)


def test_tokenizers_that_are_refused(tmp_path):
    with pytest.raises(Refused, match="no pad, reserved or unknown token"):
        load_tokenizer(save_tokenizer(tmp_path / "nothing", ("<x>", "<s>"), bos_token="<s>"), None)
    with pytest.raises(Refused, match=r"the tokenizer of --model .* cannot be used"):
        (tmp_path / "empty").mkdir()
        load_tokenizer(str(tmp_path / "empty"), None)
    twice = model_copy(tmp_path / "qwen2", "qwen2")
    own = json.loads((twice / "tokenizer.json").read_text())
    single = own["post_processor"]["single"]
    own["post_processor"]["single"] = [single[0], *single]
    (twice / "tokenizer.json").write_text(json.dumps(own))
    with pytest.raises(Refused, match="one BOS"):
        load_tokenizer(str(twice), None)


@pytest.mark.parametrize("content", ["{}", "nonsense"])
def test_a_tokenizer_that_is_none(tmp_path, content):
    folder = model_copy(tmp_path / "m")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(Refused, match=r"the tokenizer of --model .* cannot be used"):
        load_tokenizer(str(folder), None)


@pytest.mark.parametrize("kind", CAUSAL + ENCODERS)
def test_one_bos(kind):
    ids = load_tokenizer(tiny_model(kind), None)("the film was good").input_ids
    assert ids[0] == 1 and ids.count(1) == 1


# --- both ---


def test_a_model_that_can_be_used_is_read_with_its_tokenizer():
    config, tokenizer = read_model(ModelSettings(tiny_model("llama")), "sst2", LABELS)
    assert config.model_type == "llama" and tokenizer.pad_token_id == 3


def test_a_folder_has_no_revision():
    with pytest.raises(Refused, match=r"--revision v1 chooses a version of a hub model, and .* is a folder"):
        read_model(ModelSettings(tiny_model("llama"), "v1"), "sst2")


def test_what_read_model_refuses_before_a_weight_is_read(tmp_path):
    folder = model_copy(tmp_path / "m", architectures=["LlamaForSequenceClassification"], id2label={"0": "a", "1": "b"})
    settings = ModelSettings(str(folder))
    read_model(settings, "squad")
    with pytest.raises(Refused, match="the model's labels must be the task's"):
        read_model(settings, "sst2", LABELS)
    (folder / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"the weights|lacks"):
        read_model(settings, "squad")
    record = saved_record("span")
    (folder / "task.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match="was tuned for squad, and this is sst2"):
        read_model(settings, "sst2", LABELS)


def test_only_a_causal_model_can_be_tuned_to_write():
    llama, bert = (read_config(tiny_model(kind), None) for kind in ("llama", "bert"))
    check_generator("m", llama, None, "classify")
    assert answers_by_prompt(llama) and not answers_by_prompt(bert)
    with pytest.raises(Refused, match="needs a causal model, and m is an encoder: use --head span"):
        check_generator("m", bert, None, "span")
    with pytest.raises(Refused, match="--head-learning-rate is for --head classify"):
        check_generator("m", llama, 0.1, "classify")
    llama.architectures = ["LlamaForSequenceClassification"]
    assert not answers_by_prompt(llama)
    with pytest.raises(Refused, match="published as a classifier"):
        check_generator("m", llama, None, "classify")


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"hidden_act": "no such activation"},
        {"rope_parameters": {"rope_type": "no such rope", "rope_theta": 10000.0}},
        {"pad_token_id": 10**9},
        {"vocab_size": 0},
        {"id2label": 5},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**7},
        {"architectures": [5]},
        {"hidden_size": "64"},
        {"attention_dropout": 2},
        {"attention_dropout": 1.0},
        {"attention_dropout": "x"},
        {"text_config": {"vocab_size": 3}},
        {"use_bidirectional_attention": True},
        {"is_causal": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_no_model_can_have_is_one_line(tmp_path, change):
    with pytest.raises(Refused, match="config") as refusal:
        read_config(str(model_copy(tmp_path / "m", **change)), None)
    assert "\n" not in str(refusal.value)


def test_a_config_that_is_nested_without_end(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "config.json").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}")
    with pytest.raises(Refused, match="cannot be read"):
        read_config(str(folder), None)


def test_a_tokenizer_with_a_maximum_that_is_no_number(tmp_path):
    folder = model_copy(tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": "x"}))
    with pytest.raises(Refused, match="the tokenizer of --model"):
        load_tokenizer(str(folder), None)


def test_a_git_lfs_pointer_is_named(tmp_path):
    folder = model_copy(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(Refused, match="is a Git LFS pointer"):
        check_weight_files(str(folder))


def test_a_config_chooses_no_kernel(tmp_path):
    folder = model_copy(tmp_path / "m", _attn_implementation="org/kernel", attn_implementation="org/kernel")
    assert read_config(str(folder), None)._attn_implementation == "eager"


def test_what_a_model_returns_is_not_the_configs_choice(tmp_path):
    changes = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    config = read_config(str(model_copy(tmp_path / "m", "bert", chunk_size_feed_forward=3, **changes)), None)
    assert config.return_dict and not (config.output_attentions or config.output_hidden_states)
    assert config.chunk_size_feed_forward == 0


@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention"])
def test_an_encoder_that_would_read_one_way_is_refused(tmp_path, key):
    with pytest.raises(Refused, match="wanted an encoder, which reads both ways"):
        read_config(str(model_copy(tmp_path / "m", "bert", **{key: True})), None)
