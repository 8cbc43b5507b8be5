"""A merged adapter is a plain model with the adapter's logits, readable everywhere; otherwise nothing is written."""

import errno
import json
import re

import pytest
import torch
from final_cases import logits, plain_logits, reloaded
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_models import IDS, LABELS, MASK, model_copy, task_record, tiny_model, tuned_model
from transformers import AutoModelForCausalLM, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

from zerotune.errors import Refused
from zerotune.models import merging
from zerotune.models.final_folder import save_final
from zerotune.models.generator import load_language_model
from zerotune.models.merging import adapter_of_run, check_target, merge_adapter
from zerotune.models.model_files import check_final, read_record
from zerotune.settings.groups import ModelSettings

pytestmark = pytest.mark.usefixtures("plain_four_bits")

AUTO = {
    "classify": AutoModelForSequenceClassification,
    "span": AutoModelForQuestionAnswering,
    "generate": AutoModelForCausalLM,
}


def run_of(folder, base, method="lora", head="classify", **settings):
    """Make a run folder with only final/; return it and its model."""
    model, tokenizer = tuned_model(base, method, head, **settings)
    (folder / "final").mkdir(parents=True)
    save_final(model, tokenizer, folder / "final", task_record(head))
    return folder, model


def in_bf16(folder, kind="llama"):
    """Return a tiny checkpoint in bfloat16."""
    model_copy(folder, kind)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("head", "kind"),
    [
        ("classify", "llama"), ("classify", "bert"), ("classify", "distilbert"), ("span", "llama"), ("span", "gemma2"),
        ("span", "roberta"), ("generate", "llama"), ("generate", "gemma2"),
    ],
)  # fmt: skip
def test_the_merged_model_gives_the_adapters_logits(head, kind, tmp_path):
    run, model = run_of(tmp_path / "run", tiny_model(kind), head=head)
    target = tmp_path / "models" / "merged"  # made with its parent
    merged = merge_adapter(adapter_of_run(run), target, None)
    assert merged.dtype == "float32" and merged.merged < 1e-5 and merged.stored < 1e-5 and merged.in_4_bits is None
    wanted = logits(model, head)
    if head == "generate":
        found = plain_logits(load_language_model(ModelSettings(str(target)), torch.device("cpu")), head)
    else:
        found = logits(reloaded(target, head)[0], head)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    if kind != "gemma2" or head != "span":  # transformers has no class for it
        plain = AUTO[head].from_pretrained(target, attn_implementation="eager")  # sdpa drops Gemma-2's cap in 5.17
        torch.testing.assert_close(plain_logits(plain, head), wanted, atol=1e-5, rtol=0)
        assert plain.config.pad_token_id == 3
        assert head != "classify" or plain.config.id2label == dict(enumerate(LABELS))
    check_final(target)
    record = read_record(str(target), None)
    assert (record["method"], record["merged"], record["base_model"]) == ("full", "lora", kind)
    readme = (target / "README.md").read_text()
    assert f"A LoRA adapter merged into `{kind}`" in readme and "peft" not in readme
    assert not list(tmp_path.rglob(".writing-*"))


@pytest.mark.parametrize("kind", ["mixtral", "phi3"])
def test_merged_weights_have_the_published_names(kind, tmp_path):
    run, _ = run_of(tmp_path / "run", tiny_model(kind), head="generate")
    merge_adapter(adapter_of_run(run), tmp_path / "merged", None)
    names = [set(load_file(f"{folder}/model.safetensors")) for folder in (tmp_path / "merged", tiny_model(kind))]
    assert names[0] == names[1]


@pytest.mark.parametrize("head", ["classify", "generate"])
def test_a_qlora_adapter_is_merged_into_the_16_bit_base(head, tmp_path):
    """The logits are the adapter's on that base; the message also gives the difference that NF4 made in training."""
    run, _ = run_of(tmp_path / "run", in_bf16(tmp_path / "base"), "qlora", head, precision="bf16")
    target = tmp_path / "merged"
    merged = merge_adapter(adapter_of_run(run), target, None)
    assert merged.dtype == "bfloat16" and merged.merged < 1e-5 < merged.stored < 0.02 < merged.in_4_bits
    weights = load_file(target / "model.safetensors")
    assert {name for name, weight in weights.items() if weight.dtype == torch.float32} == (
        {"score.weight"} if head == "classify" else set()
    )
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    assert AUTO[head].from_pretrained(target).dtype == torch.bfloat16
    lines = merged.lines()
    assert [line.partition(":")[0].strip() for line in lines[1:]] == [
        "merged, in float32", "stored in bfloat16", "the adapter itself on its base in 4 bits",
    ]  # fmt: skip
    stored = float(re.search(r": (\S+) \(allowed: \S+, 6\.00%\)", lines[2])[1])
    assert stored == pytest.approx(merged.stored * merged.largest_logit, rel=0.1)
    assert merge_adapter(adapter_of_run(run), tmp_path / "whole", "float32").stored < 1e-5


def test_a_merge_that_changes_the_logits_is_not_kept(tmp_path, monkeypatch):
    run, _ = run_of(tmp_path / "run", in_bf16(tmp_path / "base"))
    monkeypatch.setitem(merging.TOLERANCES, "bfloat16", 1e-5)
    with pytest.raises(Refused, match=r"gives other logits: in bfloat16 the difference is .*; use --dtype float32"):
        merge_adapter(adapter_of_run(run), tmp_path / "merged", None)
    monkeypatch.setattr("peft.LoraModel.merge_and_unload", lambda model: model.unload())  # forgets the adapter
    with pytest.raises(Refused, match=r"gives other logits: in float32 the difference is .*, and at most 0\.01%"):
        merge_adapter(adapter_of_run(run), tmp_path / "merged", None)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "run"}


def test_a_number_that_is_none_is_a_difference(tmp_path):
    with pytest.raises(Refused, match="gives other logits"):
        merging._check_difference(float("nan"), "float32", tmp_path)


def test_what_cannot_be_merged_is_refused_before_a_weight_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "load_adapter", None)
    base = model_copy(tmp_path / "base")
    run, _ = run_of(tmp_path / "run", str(base))
    whole, _ = run_of(tmp_path / "whole", str(base), "full")
    (tmp_path / "empty").mkdir()
    for folder, words in (
        (tmp_path / "gone", "there is no folder"),
        (tmp_path / "empty", "has none; name a run that is finished"),
        (whole, "is a whole model: copy that folder"),
        (base, "has none"),
    ):
        with pytest.raises(Refused, match=words):
            adapter_of_run(folder)
    final = adapter_of_run(run)
    assert adapter_of_run(final) == final
    monkeypatch.setattr(merging, "memory_limit", lambda: 1000)
    with pytest.raises(Refused, match=r"needs about 0\.0 GiB of memory"):
        merge_adapter(final, tmp_path / "merged", None)
    config = json.loads((base / "config.json").read_text())
    packed = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (base / "config.json").write_text(json.dumps(config | packed))
    with pytest.raises(Refused, match="is stored quantised: give the model that it was made from"):
        merge_adapter(final, tmp_path / "merged", None)
    base.rename(tmp_path / "moved")
    with pytest.raises(
        Refused, match=r"belongs to the model .*, which is not there: put it back, or correct base_model"
    ):
        merge_adapter(final, tmp_path / "merged", None)


def test_a_target_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "final").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    for target, words in (
        (run, "is not empty"),
        (run / "merged", "is inside"),
        (run / "final" / "merged", "is inside"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "merged", "file is a file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(Refused, match=f"--merge must name a.*{words}"):
            check_target(target, run)
    (tmp_path / "new").mkdir()
    check_target(tmp_path / "new", run)  # an empty folder may exist
    check_target(tmp_path / "another", run)
    check_target(tmp_path / "models" / "merged", run)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    for target in (tmp_path / "another", tmp_path / "models" / "merged"):
        with pytest.raises(Refused, match=rf"and {target} cannot \({tmp_path} is not writable\): name another one"):
            check_target(target, run)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full: {folder}/models has .*free some space"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk full: {folder}/models has"),
        (OSError(errno.EACCES, "Permission denied"), r"--merge must .* {folder}/models/merged cannot \(Permission"),
    ],
)
def test_a_target_that_turns_out_unwritable_is_named(tmp_path, monkeypatch, error, words):
    run, _ = run_of(tmp_path / "run", tiny_model("llama"))

    def fail(*arguments, **flags):
        raise error

    if getattr(error, "errno", None) == errno.EACCES:
        monkeypatch.setattr("pathlib.Path.mkdir", fail)
    else:
        monkeypatch.setattr("peft.PeftModel.save_pretrained", fail)
        monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    with pytest.raises(Refused, match=words.format(folder=tmp_path)):
        merge_adapter(adapter_of_run(run), tmp_path / "models" / "merged", None)
    assert not list(tmp_path.rglob(".writing-*"))


def test_an_empty_target_is_taken_and_a_torn_attempt_replaced(tmp_path):
    run, model = run_of(tmp_path / "run", tiny_model("llama"))
    target = tmp_path / "merged"
    target.mkdir()
    (tmp_path / ".writing-merged").mkdir()
    (tmp_path / ".writing-merged" / "torn").write_text("")
    merge_adapter(adapter_of_run(run), target, None)
    assert not (target / "torn").exists() and not (tmp_path / ".writing-merged").exists()
    plain = AutoModelForSequenceClassification.from_pretrained(target)
    with torch.no_grad():
        found = plain(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(found, logits(model), atol=1e-5, rtol=0)
