"""A family is supported if its tiny models pass these tests: each head and method, through final/, and every fast path.

Run as a script (PYTHONPATH=.:tests python tests/unit/models/test_families.py) it writes the table of docs/models.md.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from final_cases import reloaded
from safetensors.torch import load_file, save_file
from tiny_models import IDS, LABELS, MASK, ROWS, TEXT_PARTS, model_copy, padded, task_record, tiny_model, tuned_model
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText

from zerotune.errors import Refused
from zerotune.models import cpu_kernels
from zerotune.models.attention import attention_kernel
from zerotune.models.branches import branch_rows, can_share
from zerotune.models.classifier import load_classifier
from zerotune.models.families import (
    CAUSAL,
    ENCODERS,
    SUPPORTED,
    backbone_class,
    classifier_class,
    generic_part,
    nearest_family,
    projection_names,
    projections,
    span_class,
)
from zerotune.models.final_folder import load_final_or_base, load_final_span, save_final
from zerotune.models.generator import finish_logits, load_language_model
from zerotune.models.heads import head_module_names, stock_name
from zerotune.models.loading import check_trainable as check_can_train
from zerotune.models.parameters import model_size, parameter_table
from zerotune.models.pretrained import load_tokenizer, most_tokens, read_config
from zerotune.models.shared_prefix import keeps_keys_and_values, shared_prefix
from zerotune.settings.groups import ModelSettings

pytestmark = pytest.mark.usefixtures("plain_four_bits")

KINDS = (*SUPPORTED, *TEXT_PARTS)
WITH_EXPERTS = ("mixtral",)  # no --method qlora: it would leave the experts in 16 bits
WRITERS = (*CAUSAL, *TEXT_PARTS)
CASES = [
    (kind, head, method)
    for kind in KINDS
    for head in ("classify", "span", "generate")
    for method in ("full", "lora", "qlora")
    if (head != "generate" or kind in WRITERS) and (method != "qlora" or kind not in WITH_EXPERTS)
    if head != "span" or method != "qlora" or kind not in TEXT_PARTS  # KINDS has their parts already
]
CPU = torch.device("cpu")
PAGE = Path(__file__).parents[3] / "docs" / "models.md"
MARKS = ("<!-- table -->\n", "<!-- end of table -->")
PUBLISHED = {"gemma3": "google/gemma-3-4b-it", "mistral3": CAUSAL["ministral3"], "qwen3_5": CAUSAL["qwen3_5_text"]}


def logits(model, head, ids=IDS, mask=MASK):
    """Return the logits of the tokens that count."""
    if head == "generate":
        return model(ids, *torch.nonzero(mask, as_tuple=True))
    found = model(ids, mask)
    return found[mask == 1] if head == "span" else found


def plain_logits(model, head, ids=IDS, mask=MASK):
    """Return the same for a plain transformers or peft model."""
    output = model(input_ids=ids, attention_mask=mask)
    if head == "span":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)[mask == 1]
    return output.logits if head == "classify" else output.logits[mask == 1]


def check_trainable(model, head, method):
    """Check that full tuning trains everything, and other methods an adapter on each projection and the head."""
    trainable = {name for name, parameter in model.model.named_parameters() if parameter.requires_grad}
    if method == "full":
        assert trainable == {name for name, _ in model.model.named_parameters()}
        return
    adapted = {name.partition(".lora_")[0] for name in trainable if ".lora_" in name}
    found = {stock_name(name) for name in adapted}
    assert found == {stock_name(path) for path in projections(model.stock_model) if ".lora_" not in path}
    others = {stock_name(name).partition(".")[0] for name in trainable if ".lora_" not in name}
    backbone = {name.partition(".")[0] for name in found}
    assert bool(others) == (head != "generate") and (not others & backbone or model.config.model_type in POOLERS)


POOLERS = ("bert", "albert")  # inside the backbone


def check_step(model, head):
    """Check that a forward and backward pass reaches all trained parameters."""
    model.train()
    found = logits(model, head)
    functional.cross_entropy(found, torch.arange(len(found)) % found.shape[-1]).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    model.zero_grad()
    model.eval()


def check_narrow_layers(final, head):
    """Check that linear layers stored in 16 bits give the same bits as autocast."""
    half = {"precision": "bf16", "attention": "eager"}
    wide, narrow = reloaded(final, head, **half)[0], reloaded(final, head, **half, narrow_layers=True, device="cpu")[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(narrow, head), logits(wide, head))
    types = {type(part): set() for part in narrow.modules()}
    for part in narrow.modules():
        types[type(part)] |= {weight.dtype for weight in part.parameters(recurse=False)}
    assert torch.bfloat16 in types.pop(torch.nn.Linear)
    assert set().union(*types.values()) <= {torch.float32}


@pytest.mark.parametrize(("kind", "head", "method"), CASES)
def test_a_family(kind, head, method, tmp_path, monkeypatch):
    """2e-5: float32 sums in another order; the tiny logits are about 1."""
    folder = tiny_model(kind)
    model, tokenizer = tuned_model(folder, method, head)
    check_trainable(model, head, method)
    check_step(model, head)
    table = parameter_table(model)
    settings = ModelSettings(folder, None, method)
    assert model_size(read_config(folder, None), head, 2, settings) == (table["total"], table["trainable"])
    save_final(model, tokenizer, tmp_path, task_record(head))
    if kind in CAUSAL and (head, method) == ("generate", "full"):
        names = [load_file(place / "model.safetensors").keys() for place in (tmp_path, Path(folder))]
        assert names[0] == names[1], "other tools read the names of the published checkpoint"
    with torch.no_grad():
        found = logits(model, head)
        assert found.std() > 0.05, "the logits must differ for this to test anything"
        # reloaded by zerotune
        settings = ModelSettings(str(tmp_path))
        if head == "generate":
            again = load_language_model(settings, CPU)
            torch.testing.assert_close(plain_logits(again, head), found, atol=2e-5, rtol=0)
        else:
            again, _, _ = load_final_span(settings) if head == "span" else load_final_or_base(settings, LABELS)
            assert torch.equal(logits(again, head), found)
            if method == "full":
                check_narrow_layers(tmp_path, head)
        if method == "qlora":  # test_final_folder.py runs its README
            return
        # plain transformers and peft, through its README's code: padded, and row by row
        (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
        monkeypatch.chdir(tmp_path)
        names = {}
        exec(code, names)
        plain = names["model"].eval()
        torch.testing.assert_close(plain_logits(plain, head), found, atol=2e-5, rtol=0)
        rows = [ids[mask == 1][None] for ids, mask in zip(IDS, MASK, strict=True)]
        alone = torch.cat([plain_logits(plain, head, row, torch.ones_like(row)) for row in rows])
        torch.testing.assert_close(alone, found, atol=2e-5, rtol=0)


PREFIX = [1, 4, 6, 7, 8, 10]
TAILS = [[5, 9, 11, 4, 12], [11], [12, 13]]


@pytest.mark.parametrize("kind", WRITERS)
def test_the_fast_paths_of_a_causal_model_are_exact_or_not_taken(kind):
    """A shared prefix and branches give the logits of whole rows; windows are shorter than the prefix."""
    model, _ = tuned_model(tiny_model(kind), "full", "generate")
    stock, config = model.stock_model, model.config
    with torch.no_grad():
        wanted = [stock(torch.tensor([PREFIX + tail])).logits[0, len(PREFIX) :] for tail in TAILS]
        prefix = shared_prefix(stock, PREFIX, CPU)
        assert keeps_keys_and_values(config) == (prefix is not None)
        assert (prefix is None) == (kind in ("qwen3_5_text", "qwen3_5")), "its linear attention keeps a state"
        if prefix is not None:
            lengths = np.array([len(tail) for tail in TAILS])
            hidden = prefix.hidden(stock, TAILS, lengths, CPU)
            found = finish_logits(stock.get_output_embeddings()(hidden), config)
            torch.testing.assert_close(found, torch.cat(wanted), atol=2e-5, rtol=0)
            last = prefix.hidden(stock, TAILS, np.ones_like(lengths), CPU)
            torch.testing.assert_close(last, hidden[lengths.cumsum() - 1], atol=2e-5, rtol=0)
        shares = can_share(config, config._attn_implementation)
        assert shares == (prefix is not None)
        if shares:
            laid = branch_rows([PREFIX], [TAILS], 3)
            rows, columns = np.nonzero(laid.branches > 0)
            arrays = [laid.input_ids, rows, columns, laid.positions, laid.branches]
            found = model(*map(torch.from_numpy, arrays))
            torch.testing.assert_close(found, torch.cat(wanted), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_fast_paths_of_an_encoder_change_no_logit_and_no_gradient(kind):
    """2e-6: float32 sums in another order. Windows (ModernBERT's) are shorter than the rows."""
    tokenizer, results = load_tokenizer(tiny_model(kind), None), []
    for settings in ({}, {"attention": "eager", "drop_unpooled": False}):
        model = load_classifier(ModelSettings(tiny_model(kind), None, "full", **settings), LABELS, tokenizer).eval()
        found = model(*padded(ROWS))
        trainable = dict(model.named_parameters())
        gradients = torch.autograd.grad(found[:, 0].sum(), trainable.values())
        results.append({"logits": found, **dict(zip(trainable, gradients, strict=True))})
    torch.testing.assert_close(*results, atol=2e-6, rtol=1e-5)


def test_the_kernel_of_a_family():
    kernels = {kind: attention_kernel("auto", read_config(tiny_model(kind), None)) for kind in SUPPORTED}
    causal, encoder = (
        ("sdpa", "sdpa") if torch.cuda.is_available() else (cpu_kernels.CAUSAL_ATTENTION, cpu_kernels.ATTENTION)
    )
    others = dict.fromkeys(SUPPORTED, causal) | dict.fromkeys(ENCODERS, encoder)
    assert kernels == others | {"gemma2": "eager", "deberta-v2": "eager", "modernbert": "sdpa"}
    config = read_config(tiny_model("deberta-v2"), None)
    for wanted in ("sdpa", "flex_attention"):
        with pytest.raises(Refused, match=f"{wanted} cannot compute the scores of deberta-v2; use auto or eager"):
            attention_kernel(wanted, config)
    assert attention_kernel("eager", config) == "eager"


@pytest.mark.parametrize("kind", TEXT_PARTS)
def test_the_text_part_of_a_model_of_text_and_images_gives_the_wholes_logits(kind):
    whole = AutoModelForImageTextToText.from_pretrained(tiny_model(kind)).eval()
    part = load_language_model(ModelSettings(tiny_model(kind)), CPU)
    assert part.config.model_type == TEXT_PARTS[kind] and not any("vision" in name for name, _ in part.named_modules())
    with torch.no_grad():
        wanted = whole(input_ids=IDS, attention_mask=MASK).logits[MASK == 1]
        torch.testing.assert_close(plain_logits(part, "generate"), wanted, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", TEXT_PARTS)
def test_the_text_part_has_the_dtype_that_the_whole_names(kind, tmp_path):
    folder = model_copy(tmp_path / "m", kind)
    config = json.loads((folder / "config.json").read_text())
    for part in (config, config["text_config"]):
        for name in ("dtype", "torch_dtype"):
            part.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert read_config(str(folder), None).dtype == torch.bfloat16


def test_a_modernbert_without_local_layers_loads(tmp_path):
    layers = json.loads((Path(tiny_model("modernbert")) / "config.json").read_text())["num_hidden_layers"]
    changes = {"global_attn_every_n_layers": 1, "layer_types": ["full_attention"] * layers}
    folder = str(model_copy(tmp_path / "m", "modernbert", **changes))
    tokenizer = load_tokenizer(folder, None)
    found, wanted = (
        load_classifier(ModelSettings(folder, attention=attention), LABELS, tokenizer).eval()
        for attention in ("auto", "eager")
    )
    with torch.no_grad():
        torch.testing.assert_close(found(IDS, MASK), wanted(IDS, MASK), atol=2e-5, rtol=0)


# --- heads and projections ---


@pytest.mark.parametrize("kind", ENCODERS)
def test_the_names_of_the_projections_name_no_other_layer(kind):
    """A head may have a layer of the same name: peft skips layers in modules_to_save, but other tools may not."""
    config = read_config(tiny_model(kind), None)
    with torch.device("meta"):
        model = classifier_class(config)(config)
    linear = {path for path, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)}
    names = tuple(f".{name}" for name in projection_names(model))
    assert {path for path in linear if path.endswith(names)} == projections(model).keys() != linear


def test_what_a_checkpoint_has_of_a_head_is_kept_and_the_rest_is_drawn(tmp_path):
    """ModernBERT's masked language model has the head's first layer; the head's norm, not a matrix, starts at 1."""
    folder = model_copy(tmp_path / "m", "modernbert")
    tokenizer, settings = load_tokenizer(str(folder), None), ModelSettings(str(folder))
    weights = load_file(folder / "model.safetensors")
    head = load_classifier(settings, LABELS, tokenizer).stock_model.head
    assert torch.equal(head.dense.weight, weights["head.dense.weight"])
    save_file({n: w for n, w in weights.items() if not n.startswith("head.")}, folder / "model.safetensors")
    stock = load_classifier(settings, LABELS, tokenizer).stock_model
    assert torch.equal(stock.head.norm.weight, torch.ones(32)) and stock.head.dense.weight.std() > 0.1
    without = {n: w for n, w in weights.items() if n != "head.dense.weight"}
    save_file(without, folder / "model.safetensors")
    with pytest.raises(Refused, match=r"lacks weights that only a head may lack: .*head\.dense\.weight"):
        load_classifier(settings, LABELS, tokenizer)


@pytest.mark.parametrize("head", ["lm_predictions.lm_head.dense", "mask_predictions.classifier"])
def test_the_heads_of_pretraining_are_left_aside(head, tmp_path):
    """microsoft/deberta-v3-base has such heads."""
    folder = model_copy(tmp_path / "m", "deberta-v2")
    weights = load_file(folder / "model.safetensors") | {f"{head}.weight": torch.zeros(2, 2)}
    save_file(weights, folder / "model.safetensors")
    loaded = load_classifier(ModelSettings(str(folder)), LABELS, load_tokenizer(str(folder), None)).model.state_dict()
    backbone = [name for name in loaded if name.startswith("deberta.")]
    assert backbone and all(torch.equal(loaded[name], weights[name]) for name in backbone)


# --- what is refused ---


def test_experts_are_not_put_in_4_bits():
    config = read_config(tiny_model("mixtral"), None)
    # two layers with four experts, each with three matrices of 32 x 48
    with pytest.raises(Refused, match=r"would leave the experts of m, 36,864 weights, in 16 bits: use --method lora"):
        check_can_train(ModelSettings("m", method="qlora"), config, None)
    check_can_train(ModelSettings("m", method="lora"), config, None)


def test_activation_checkpointing_where_there_is_none():
    settings = ModelSettings("m", activation_checkpointing=True)
    for kind in SUPPORTED:
        config = read_config(tiny_model(kind), None)
        if kind != "albert":
            check_can_train(settings, config, None)
            continue
        with pytest.raises(Refused, match="--activation-checkpointing is not possible with albert: leave it out"):
            check_can_train(settings, config, None)


def test_positions_that_count_from_the_pad_id_and_those_that_change_their_meaning(tmp_path):
    assert most_tokens(read_config(tiny_model("xlm-roberta"), None)) == 64 - 3 - 1
    assert most_tokens(read_config(tiny_model("electra"), None)) == 64
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
    folder = model_copy(tmp_path / "m", "phi3", rope_parameters=rope, original_max_position_embeddings=16)
    assert most_tokens(read_config(str(folder), None)) == 16


def test_code_that_has_moved_into_transformers_is_not_run(tmp_path):
    """Phi-3's repositories name their own code."""
    auto_map = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    folder = model_copy(tmp_path / "m", "phi3", auto_map=auto_map | {"AutoTokenizer": "Xenova/gpt-4o"})
    assert type(read_config(str(folder), None)).__module__.startswith("transformers.")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoModelForCausalLM"] = "modeling_phi3.MyPhi3ForCausalLM"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(Refused, match="which zerotune never runs"):
        read_config(str(folder), None)


@pytest.mark.parametrize(
    ("kind", "nearest"),
    [
        ("gpt2", "llama"),
        ("phi", "phi3"),
        ("gemma4", "gemma3_text"),
        ("qwen3_moe", "qwen3_5_text"),
        ("deberta", "deberta-v2"),
        ("xlm-roberta-xl", "xlm-roberta"),
        ("mpnet", "modernbert"),
        (None, "llama"),
    ],
)
def test_another_family_is_refused_with_the_nearest_that_works(kind, nearest, tmp_path):
    assert nearest_family(kind) == nearest
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    known = f"is {kind}" if kind else "is of no known type"
    example = re.escape((CAUSAL | ENCODERS)[nearest])
    with pytest.raises(Refused, match=rf"{known}; the nearest that works is {nearest}, for example {example} \(all: "):
        read_config(str(tmp_path), None)


def test_a_model_of_text_and_images_whose_text_part_is_not_supported(tmp_path):
    parts = {"text_config": {"model_type": "gpt2"}, "vision_config": {"model_type": "clip_vision_model"}}
    AutoConfig.for_model("llava", **parts).save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"is llava; the nearest that works is llama"):
        read_config(str(tmp_path), None)


# --- docs/models.md ---


def table() -> str:
    """Return the table of docs/models.md, read from the cases above and from tiny models."""
    lines = [
        "| family | for example | `--method` | LoRA adapts | `--head` | modules of a classifier's head | attention |",
        "|---" * 7 + "|",
    ]
    for kind in KINDS:
        config = read_config(tiny_model(kind), None)
        methods = [method for method in ("full", "lora", "qlora") if (kind, "classify", method) in CASES]
        heads = []
        for head, model_class in (("classify", classifier_class(config)), ("span", span_class(config))):
            heads.append(f"{head} (own class)" if generic_part(model_class) else head)
        heads += ["generate"] * ((kind, "generate", "full") in CASES)
        if heads[-1] == "generate" and not keeps_keys_and_values(config):
            heads[-1] += " (whole prompts)"
        with torch.device("meta"):
            backbone = backbone_class(config)(config)
        kernel = attention_kernel("auto", config)
        cells = [
            f"{kind}: its {TEXT_PARTS[kind]}" if kind in TEXT_PARTS else kind,
            (CAUSAL | ENCODERS | PUBLISHED)[kind],
            ", ".join(methods),
            " ".join(sorted({path.rpartition(".")[2] for path in projections(backbone)})),
            ", ".join(heads),
            " ".join(head_module_names(config)),
            "sdpa" if kernel in cpu_kernels.KERNELS else kernel,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def test_the_table_of_the_docs_is_that_of_this_test():
    shown = PAGE.read_text().partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert shown == table(), "run this file as a script, which writes the table"


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(before + MARKS[0] + table() + MARKS[1] + rest.partition(MARKS[1])[2])
