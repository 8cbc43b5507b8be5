"""final/ gives the same logits again, through zerotune and through its README's code without it."""

import copy
import inspect
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from final_cases import logits, plain_logits, reloaded
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSequenceClassification,
)
from safetensors.torch import load_file
from tiny_models import IDS, LABELS, MASK, model_copy, move_weights, saved_record, task_record, tiny_model, tuned_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    LlamaForQuestionAnswering,
    pipeline,
)

from zerotune.errors import Refused
from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_language_model
from zerotune.models.loading import nf4_config
from zerotune.models.model_files import adapter_base, check_final, read_record
from zerotune.models.pretrained import load_tokenizer, read_model
from zerotune.models.span_head import backbone_renaming, load_span_model
from zerotune.settings.groups import ModelSettings

pytestmark = pytest.mark.usefixtures("plain_four_bits")

METHODS = ["full", "lora", "qlora"]
KINDS = {
    "classify": ["llama", "gemma2", "mistral", "qwen2", "distilbert", "bert"],
    "span": ["llama", "gemma2", "gemma3_text", "mistral", "qwen2", "distilbert", "bert", "roberta"],
    "generate": ["llama", "gemma2", "mistral"],
}
CASES = [(head, kind) for head, kinds in KINDS.items() for kind in kinds]
PROMPT = task_record("generate")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_published_classifier_with_its_labels_in_another_order(kind, method, tmp_path):
    """Its logits come in the task's order, also after training; final/ names its outputs in the checkpoint's order."""
    model, tokenizer = tuned_model(tiny_model(kind), "full")
    published, final = tmp_path / "published", tmp_path / "final"
    for folder in (published, final):
        folder.mkdir()
    save_final(model, tokenizer, published, task_record())
    (published / "task.json").unlink()
    config = json.loads((published / "config.json").read_text())
    config |= {"id2label": {"0": "POS", "1": "NEG"}, "label2id": {"POS": 0, "NEG": 1}}
    (published / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(reloaded(published)[0]), logits(model)[:, [1, 0]])
    tuned, _ = tuned_model(str(published), method)
    save_final(tuned, tokenizer, final, task_record())
    place = final if method == "full" else final / "config"
    assert json.loads((place / "config.json").read_text())["id2label"] == {"0": "positive", "1": "negative"}
    assert torch.equal(logits(reloaded(final)[0]), logits(tuned))


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("head", "kind"), [case for case in CASES if case[0] != "generate"])
def test_loaded_by_us_it_gives_the_same_logits(head, kind, method, gathered, tmp_path):
    model, tokenizer = tuned_model(tiny_model(kind), method, head)
    trained = {n: p.detach().clone() for n, p in model.model.named_parameters() if p.requires_grad}
    save_final(model, tokenizer, tmp_path, task_record(head, max_length=9), trained if gathered else None)
    again, its_tokenizer, task = reloaded(tmp_path, head)
    assert torch.equal(logits(again, head), logits(model, head))
    assert its_tokenizer.pad_token_id == tokenizer.pad_token_id
    base = tiny_model(kind)
    place = os.path.basename(base) if method == "full" else os.path.relpath(base, tmp_path)
    assert {**task, "files": None} == task_record(head, max_length=9) | {
        "method": method, "dtype": "float32", "base_model": place, "base_revision": None, "files": None,
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS["generate"])
def test_a_generator_loaded_for_evaluation_gives_the_same_logits(kind, method, tmp_path):
    """An adapter that was trained in 4 bits is evaluated in 4 bits without a flag."""
    model, tokenizer = tuned_model(tiny_model(kind), method, "generate")
    save_final(model, tokenizer, tmp_path, PROMPT)
    again = load_language_model(ModelSettings(str(tmp_path)), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits[MASK == 1], logits(model, "generate"), atol=2e-6, rtol=0)
    assert any(p.dtype == torch.uint8 for p in again.parameters()) == (method == "qlora")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("head", "kind"), CASES)
def test_the_lines_of_its_readme_give_the_same_logits(head, kind, method, tmp_path, monkeypatch):
    """The stock class pools by pad id, so the rows here do not end with it."""
    model, tokenizer = tuned_model(tiny_model(kind), method, head)
    save_final(model, tokenizer, tmp_path, task_record(head))
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.startswith("model = ")]) == 1
    own_class = head == "span" and kind.startswith("gemma")
    assert ("class SpanModel" in code) == own_class, "transformers has a class for the others"
    names = {}
    monkeypatch.chdir(tmp_path)
    exec(code, names)
    plain = plain_logits(names["model"], head)
    torch.testing.assert_close(plain, logits(model, head), atol=5e-6 if head == "span" else 2e-6, rtol=0)
    config = names["model"].config
    assert names["tokenizer"].pad_token_id == 3 and (head == "generate" or config.pad_token_id == 3)
    assert head != "classify" or config.id2label == dict(enumerate(LABELS))


# --- full tuning ---


def test_a_classifier_is_a_plain_float32_checkpoint(tmp_path):
    save_final(*tuned_model(tiny_model("llama"), "full"), tmp_path, task_record())
    weights = load_file(tmp_path / "model.safetensors")
    assert "score.weight" in weights and {value.dtype for value in weights.values()} == {torch.float32}
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert plain.dtype == torch.float32, "the config says float32, the default dtype follows it"


def test_a_span_model_is_a_plain_checkpoint_of_its_class(tmp_path):
    save_final(*tuned_model(tiny_model("llama"), "full", "span"), tmp_path, task_record("span"))
    weights = load_file(tmp_path / "model.safetensors")
    assert {name.partition(".")[0] for name in weights} == {"transformer", "qa_outputs"}
    assert {value.dtype for value in weights.values()} == {torch.float32}
    _, info = LlamaForQuestionAnswering.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_a_generator_is_a_plain_causal_checkpoint(kind, tmp_path):
    model, tokenizer = tuned_model(tiny_model(kind), "full", "generate")
    gathered = {name: tensor.detach().clone() for name, tensor in model.model.state_dict().items()}
    save_final(model, tokenizer, tmp_path, PROMPT, gathered)
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert plain.dtype == torch.float32 and plain.config.use_cache
    for name, parameter in model.stock_model.named_parameters():
        assert torch.equal(plain.get_parameter(name), parameter), name


def test_a_generator_is_saved_without_the_bases_penalties_and_temperature(tmp_path):
    """They would change its answers; transformers 5.17 refuses to save a temperature without sampling."""
    model, tokenizer = tuned_model(tiny_model("llama"), "full", "generate")
    of_base = {"temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.3, "eos_token_id": [2, 5]}
    model.stock_model.generation_config.update(**of_base)
    save_final(model, tokenizer, tmp_path, PROMPT)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [2, 5] and not {"temperature", "top_p", "repetition_penalty"} & saved.keys()


def test_tuning_continues_from_a_final_folder(tmp_path):
    model, tokenizer = tuned_model(tiny_model("qwen2"), "full", "span")
    save_final(model, tokenizer, tmp_path, task_record("span"))
    again = load_span_model(ModelSettings(str(tmp_path), None, "lora"), tokenizer).eval()
    torch.testing.assert_close(logits(again, "span"), logits(model, "span"), atol=5e-6, rtol=0)


def test_a_16_bit_weight_is_never_saved(tmp_path):
    model, tokenizer = tuned_model(tiny_model("llama"), "full")
    with pytest.raises(AssertionError, match=r"final/ is float32.*score\.weight"):
        save_final(model, tokenizer, tmp_path, {}, {"score.weight": torch.zeros(2, 32, dtype=torch.bfloat16)})


# --- adapters ---

# transformers 5.17 does not load an adapter's head and only warns; peft loads it
READS_HEADS = "AuxiliaryTrainingWrapper" in inspect.getsource(transformers.integrations.peft)
THREE = ("down", "same", "up")


@pytest.fixture
def hub_base(own_cache, monkeypatch):
    """Return a function that puts a tiny model into an empty hub cache and returns its id; there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def put(kind: str) -> str:
        repository = own_cache / "hub" / f"models--org--{kind}"
        shutil.copytree(tiny_model(kind), repository / "snapshots" / ("c" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("c" * 40)
        return f"org/{kind}"

    return put


PLAIN = {
    "classify": (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification, "text-classification"),
    "span": (AutoModelForQuestionAnswering, AutoPeftModelForQuestionAnswering, None),  # transformers dropped its task
    "generate": (AutoModelForCausalLM, AutoPeftModelForCausalLM, "text-generation"),
}


HEADS_AND_KINDS = [
    ("classify", "llama"), ("classify", "bert"), ("span", "mistral"), ("span", "llama"), ("generate", "llama"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("head", "kind", "method", "from_hub"),
    [(*case, method, False) for case in HEADS_AND_KINDS for method in ("lora", "qlora")]
    + [("classify", "llama", "lora", True), ("span", "llama", "lora", True), ("generate", "llama", "qlora", True)],
)
def test_an_adapter_loads_by_the_plain_calls(head, kind, method, from_hub, tmp_path, hub_base):
    """Its folder is enough; label names and pad id come with its config."""
    name = hub_base(kind) if from_hub else tiny_model(kind)
    model, tokenizer = tuned_model(name, method, head)
    save_final(model, tokenizer, tmp_path, task_record(head))
    auto_class, peft_class, task = PLAIN[head]
    wanted, folder = logits(model, head), str(tmp_path)
    load = {"key_mapping": backbone_renaming(model.config)} if head == "span" else {}
    if method == "qlora":
        load["quantization_config"] = nf4_config("fp32", model.config)
    config = AutoConfig.from_pretrained(folder, subfolder="config")
    own = {"id2label": config.id2label, "label2id": config.label2id, "pad_token_id": config.pad_token_id}
    loaders = {"peft": lambda: peft_class.from_pretrained(folder, **own, **load)}
    if READS_HEADS or head == "generate":
        loaders["auto"] = lambda: auto_class.from_pretrained(folder, **load)
        loaders["auto, config"] = lambda: auto_class.from_pretrained(folder, config=copy.deepcopy(config), **load)
        if task:
            pipe = pipeline(task, model=folder, tokenizer=folder, model_kwargs={**own, **load})
            loaders["pipeline"] = lambda: pipe.model
            assert head != "classify" or pipe("good film")[0]["label"] in LABELS
    for loader, call in loaders.items():
        plain = call()
        assert any(p.dtype == torch.uint8 for p in plain.parameters()) == (method == "qlora"), loader
        torch.testing.assert_close(plain_logits(plain, head), wanted, atol=5e-6, rtol=0, msg=loader)
        assert plain.config.pad_token_id == 3
        if head == "classify" and loader != "auto":
            assert plain.config.id2label == dict(enumerate(LABELS)), loader


def test_an_encoders_span_adapter_reads_token_types_by_its_base_model(tmp_path):
    """peft's own class drops the token types."""
    model, tokenizer = tuned_model(tiny_model("bert"), "lora", "span")
    save_final(model, tokenizer, tmp_path, task_record("span"))
    ids = torch.tensor([[1, 7, 2, 5, 2]])
    types = torch.tensor([[0, 0, 0, 1, 1]])
    plain = AutoPeftModelForQuestionAnswering.from_pretrained(tmp_path).get_base_model().eval()
    with torch.no_grad():
        wanted = model(ids, torch.ones_like(ids), types)
        found = plain(input_ids=ids, token_type_ids=types)
        assert not torch.allclose(wanted, model(ids, torch.ones_like(ids)), atol=1e-3)
    found = torch.stack([found.start_logits, found.end_logits], dim=-1)
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=0)


@pytest.mark.skipif(not READS_HEADS, reason="this transformers leaves out the head of an adapter")
def test_an_adapter_with_other_than_two_labels_and_a_base_without_a_pad(tmp_path):
    """The config is needed: without it the call fails on the head's shape instead of using a random head."""
    folder, final = model_copy(tmp_path / "base", pad_token_id=None), tmp_path / "final"
    final.mkdir()
    tokenizer = load_tokenizer(str(folder), None)
    model = load_classifier(ModelSettings(str(folder), None, "lora"), THREE, tokenizer)
    move_weights(model.eval())
    save_final(model, tokenizer, final, task_record(labels=list(THREE)))
    config = AutoConfig.from_pretrained(final, subfolder="config")
    assert config.id2label == dict(enumerate(THREE)) and config.pad_token_id == 3
    plain = AutoModelForSequenceClassification.from_pretrained(final, config=config)
    torch.testing.assert_close(plain_logits(plain), logits(model), atol=2e-6, rtol=0)
    classify = pipeline("text-classification", model=plain, tokenizer=load_tokenizer(str(final), None), top_k=None)
    texts = ["good film", "bad"]  # in one batch: the model knows its pad
    assert all({answer["label"] for answer in answers} == set(THREE) for answers in classify(texts, batch_size=2))
    with pytest.raises(RuntimeError):
        AutoModelForSequenceClassification.from_pretrained(final)


@pytest.mark.parametrize("head", ["classify", "generate"])
def test_an_adapter_in_the_cache_of_the_hub_is_read_as_its_folder_is(head, tmp_path, hub_base, own_cache):
    model, tokenizer = tuned_model(hub_base("llama"), "lora", head)
    snapshot = own_cache / "hub" / "models--org--tuned" / "snapshots" / ("d" * 40)
    snapshot.mkdir(parents=True)
    save_final(model, tokenizer, snapshot, task_record(head))
    reference = snapshot.parent.parent / "refs" / "main"
    reference.parent.mkdir()
    reference.write_text("d" * 40)
    read_model(ModelSettings("org/tuned"), "sst2", LABELS)
    if head == "classify":
        assert torch.equal(logits(reloaded("org/tuned")[0]), logits(model))
    else:
        again = load_language_model(ModelSettings("org/tuned"), torch.device("cpu"))
        with torch.no_grad():
            torch.testing.assert_close(again(IDS).logits[MASK == 1], logits(model, head), atol=2e-6, rtol=0)


def test_an_adapter_of_before_with_its_config_beside_it_is_read(tmp_path):
    model, tokenizer = tuned_model(tiny_model("llama"), "lora")
    save_final(model, tokenizer, tmp_path, task_record())
    (tmp_path / "config" / "config.json").rename(tmp_path / "config.json")
    assert torch.equal(logits(reloaded(tmp_path)[0]), logits(model))


def test_where_a_local_base_is_recorded(tmp_path, monkeypatch):
    """No file contains a path of this machine; other libraries find the base from the run's working directory."""
    folder = Path(tiny_model("llama"))
    monkeypatch.chdir(folder.parent)
    tokenizer = load_tokenizer("llama", None)
    for method in ("full", "lora"):
        final = tmp_path / method
        final.mkdir()
        model = load_classifier(ModelSettings("llama", None, method), LABELS, tokenizer)
        save_final(model, tokenizer, final, task_record())
        assert not [path.name for path in final.rglob("*.*") if str(folder).encode() in path.read_bytes()]
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == "llama"
    assert json.loads((tmp_path / "full" / "task.json").read_text())["base_model"] == "llama"
    monkeypatch.chdir("/")
    assert adapter_base(final) == (str(folder), None)
    assert torch.equal(logits(reloaded(final)[0]), logits(model.eval()))
    assert "quantization_config" not in json.loads((final / "config" / "config.json").read_text())


def test_an_adapter_that_was_moved_with_its_base(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    model_copy(before / "models" / "llama")
    (before / "runs" / "final").mkdir(parents=True)
    model, tokenizer = tuned_model(str(before / "models" / "llama"), "lora")
    save_final(model, tokenizer, before / "runs" / "final", task_record())
    before.rename(after)
    final = after / "runs" / "final"
    read_model(ModelSettings(str(final)), "sst2", LABELS)
    assert adapter_base(final) == (str(after / "models" / "llama"), None)
    assert torch.equal(logits(reloaded(final)[0]), logits(model))
    (after / "models").rename(tmp_path / "elsewhere")  # move the base again: task.json says where
    record = json.loads((final / "task.json").read_text())
    (final / "task.json").write_text(json.dumps(record | {"base_model": "../../../elsewhere/llama"}))
    read_model(ModelSettings(str(final)), "sst2", LABELS)
    assert adapter_base(final) == (str(tmp_path / "elsewhere" / "llama"), None)


@pytest.mark.parametrize("read_through_link", [True, False])
def test_the_base_of_an_adapter_is_found_through_a_link_to_another_disk(read_through_link, tmp_path):
    """runs/ is often a link to the scratch disk, and the target's ".." is not the link's."""
    folder = Path(tiny_model("llama"))
    (tmp_path / "disk" / "deep" / "runs").mkdir(parents=True)
    runs = tmp_path / "runs"
    runs.symlink_to(tmp_path / "disk" / "deep" / "runs")
    tokenizer = load_tokenizer(str(folder), None)
    model = load_classifier(ModelSettings(str(folder), None, "lora"), LABELS, tokenizer)
    save_final(model, tokenizer, runs, task_record())
    read_from = runs if read_through_link else runs.resolve()
    assert adapter_base(read_from) == (str(folder), None)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("head", "kind"), [("classify", "llama"), ("span", "gemma2")])
def test_the_head_of_a_loaded_adapter_stays_float32(head, kind, method, tmp_path):
    model, tokenizer = tuned_model(tiny_model(kind), method, head, precision="bf16")
    save_final(model, tokenizer, tmp_path, task_record(head))
    name = "qa_outputs" if head == "span" else "score"
    trained = getattr(model.stock_model, name).weight
    for wanted in ("full", "qlora"):
        again, _, _ = reloaded(tmp_path, head, precision="bf16", method=wanted)
        weight = getattr(again.stock_model, name).weight
        assert weight.dtype == torch.float32 and torch.equal(weight, trained)
        assert again.stock_model.model.norm.weight.dtype == torch.bfloat16
        assert logits(again, head).dtype == torch.float32
        assert any(p.dtype == torch.uint8 for p in again.parameters()) == ("qlora" in (wanted, method))


# --- other models ---


def test_a_whole_model_in_four_bits_keeps_its_float32_head(tmp_path):
    model, tokenizer = tuned_model(tiny_model("bert"), "full")
    save_final(model, tokenizer, tmp_path, task_record())
    again, _, _ = reloaded(tmp_path, precision="bf16", method="qlora")
    own = dict(model.stock_model.named_parameters())
    for name in ("classifier.weight", "classifier.bias", "bert.pooler.dense.weight"):
        assert torch.equal(again.stock_model.get_parameter(name), own[name]), name
    assert sum(p.dtype == torch.uint8 for p in again.parameters()) == 12


@pytest.mark.parametrize(("head", "shape"), [("classify", (2, 2)), ("span", (8, 2))])
def test_checkpoints_without_a_head(head, shape):
    again, _, task = reloaded(tiny_model("distilbert"), head)
    assert task is None and logits(again, head).shape == shape
    with pytest.raises(Refused, match=f"no {'classification' if head == 'classify' else 'span'} head"):
        reloaded(tiny_model("llama"), head)


# --- damage ---


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("damage", ["emptied", "flipped", "removed"])
def test_weights_that_have_changed_are_refused(method, damage, tmp_path):
    save_final(*tuned_model(tiny_model("llama"), method), tmp_path, task_record())
    check_final(tmp_path)
    (weights,) = tmp_path.glob("*.safetensors")
    data = weights.read_bytes()
    if damage == "removed":
        weights.unlink()
    else:
        weights.write_bytes(b"" if damage == "emptied" else data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Refused, match="safetensors is damaged"):
        check_final(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_words": "x"}, "label_words is 'x'"),
        ({"label_words": ["a"]}, "label_words is"),
        ({"label_words": ["", ""]}, "label_words is"),
        ({"label_words": ["a", "a"]}, "label_words is"),
        ({"template": "no text"}, "template is 'no text'"),
        ({"template": "{text} {text}"}, "template is"),
        ({"format": "evil"}, "prompt.format"),
    ],
)
def test_a_damaged_prompt_is_refused(changes, words, tmp_path):
    record = saved_record("generate")
    record["prompt"] = record["prompt"] | changes
    (tmp_path / "task.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match=rf"task\.json is damaged \(prompt\.?.*{words.split('.')[-1]}"):
        read_record(str(tmp_path), None)


@pytest.mark.parametrize(
    "changes",
    [
        {"truncation": "evil"},
        {"labels": ["a", "b", "b"]},
        {"labels": 5},
        {"head": "x"},
        {"max_length": 0},
        {"max_length": "9"},
        {"labels": None},
    ],
)
def test_a_damaged_task_is_refused(changes, tmp_path):
    record = saved_record(**changes)
    (tmp_path / "task.json").write_text(json.dumps(record))
    with pytest.raises(Refused, match=rf"task\.json is damaged \({next(iter(changes))} is "):
        read_record(str(tmp_path), None)


def test_labels_that_the_config_beside_them_does_not_have_are_refused(tmp_path):
    save_final(*tuned_model(tiny_model("bert"), "full"), tmp_path, task_record())
    assert read_record(str(tmp_path), None)["labels"] == ["negative", "positive"]
    record = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps(record | {"labels": ["no", "yes"]}))
    words = r"labels is \['no', 'yes'\], and config.json beside it names 'negative', 'positive'\): restore"
    with pytest.raises(Refused, match=words):
        read_record(str(tmp_path), None)
