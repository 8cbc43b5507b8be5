"""final/: a tuned model on disk, readable without zerotune, and the way back for evaluation."""

import copy
import json
import os
from pathlib import Path

import torch

from zerotune.errors import Refused
from zerotune.files import read_json
from zerotune.models.heads import SPAN_HEAD, SequenceClassifier, TunedModel, is_encoder
from zerotune.models.loading import ModelSettings, initialise_head, load_stock_model, quiet_transformers
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.models.span_head import SpanModel, backbone_renaming, has_own_class, load_stock_span_model, span_class

_README = """# {title}

{description} Trained with zerotune; what it was trained for stands in task.json.

```python
{imports}
folder = "."  # where this file is
model = {line}
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{note}
"""
_FLOAT32 = '`dtype="float32"` belongs to it: the head is float32 and loses small differences in 16 bits.'
_TITLES_AND_NOTES = {
    "classify": ("classifier", _FLOAT32),
    "generate": (
        "generator",
        "The prompt stands in task.json: ask in its words and its format, and let the model end its answer.",
    ),
    "span": (
        "span finder",
        "A row is question, then paragraph; `model(**row)` gives `start_logits` and `end_logits` of its tokens. "
        f"task.json says how long rows are and above which odds there is no answer. {_FLOAT32}",
    ),
}


def save_final(tuned: TunedModel, tokenizer, folder: str | Path, task: dict, state_dict: dict | None = None) -> None:
    """Writes the model into an existing empty folder, so that the line in its README.md loads it without zerotune.

    state_dict has the names of tuned.model's, gathered (for an adapter, what trains is enough); None takes the
    model's own. Full tuning gives a plain checkpoint, LoRA and QLoRA an adapter with its head and config. All is
    float32. One process writes; the caller puts the folder in its place.
    """
    folder = Path(folder)
    stock = tuned.stock_model
    is_adapter = tuned.model is not stock
    if is_adapter:
        _save_adapter(tuned.model, folder, state_dict)
        adapter = tuned.model.peft_config["default"]
        base, revision = adapter.base_model_name_or_path, adapter.revision
    else:
        weights = stock.state_dict() if state_dict is None else dict(state_dict)
        _check_float32(weights)
        with quiet_transformers():
            # under the names that the model's class has, not those that backbone_renaming found in its checkpoint
            stock.save_pretrained(folder, state_dict=weights, save_original_format=False)
        base, revision = _absolute(stock.config.name_or_path), None
    tokenizer.save_pretrained(folder)
    quantized = getattr(stock, "is_loaded_in_4bit", False)
    method = ("qlora" if quantized else "lora") if is_adapter else "full"
    record = {**task, "method": method, "base_model": base, "base_revision": revision, "dtype": "float32"}
    (folder / "task.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(stock, record), encoding="utf-8")


def _absolute(name: str) -> str:
    return os.path.abspath(name) if os.path.isdir(name) else name


def _check_float32(weights: dict) -> None:
    wrong = sorted(
        name for name, value in weights.items() if value.is_floating_point() and value.dtype != torch.float32
    )
    assert not wrong, f"final/ is float32, these are not: {wrong[:4]}"


def _save_adapter(model, folder: Path, state_dict: dict | None) -> None:
    """What peft's save_pretrained writes, without its model card and without its look at the hub."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    _check_float32(weights)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = copy.copy(model.peft_config["default"])
    adapter.inference_mode = True
    adapter.save_pretrained(str(folder))
    stock = model.get_base_model()
    config = copy.deepcopy(stock.config)
    config.architectures = [type(stock).__name__]
    config.dtype = "float32"
    # The quantisation is the loader's choice: with it here, transformers would take the base for a packed checkpoint.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


def _readme(stock, record: dict) -> str:
    head = "span" if hasattr(stock, SPAN_HEAD) else "classify" if stock.get_output_embeddings() is None else "generate"
    base, method = record["base_model"], record["method"]
    # transformers before 5.23 loads Gemma-2 with sdpa, which leaves out the capping of its scores
    capped = getattr(stock.config, "attn_logit_softcapping", None) is not None
    dtype = 'dtype="float32"' + (', attn_implementation="eager"' if capped else "")
    # labels and pad id stand in the config beside an adapter
    own_config = "config=AutoConfig.from_pretrained(folder)"
    model_class, imports, definition = _class_to_load(stock, head)
    if method == "full":
        line = f"{model_class}.from_pretrained(folder, {own_config + ', ' if definition else ''}{dtype})"
    else:
        arguments = [repr(base), *([] if head == "generate" else [own_config]), dtype]
        if record["base_revision"]:
            arguments.insert(1, f"revision={record['base_revision']!r}")
        if head == "span" and backbone_renaming(stock.config):
            arguments.append(f"key_mapping={backbone_renaming(stock.config)}")
        if method == "qlora":
            compute = str(stock.config.quantization_config.bnb_4bit_compute_dtype).removeprefix("torch.")
            arguments.append(
                'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
                f'bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="{compute}", '
                f"llm_int8_skip_modules={stock.config.quantization_config.llm_int8_skip_modules})"
            )
        line = f"PeftModel.from_pretrained({model_class}.from_pretrained({', '.join(arguments)}), folder)"
        imports = ["from peft import PeftModel", *imports]
    names = [name for name in ("AutoConfig", "BitsAndBytesConfig") if f"{name}." in line or f"{name}(" in line]
    names = sorted(["AutoTokenizer", *names, *([] if definition else [model_class])])
    imports.insert(1 if method != "full" else 0, f"from transformers import {', '.join(names)}")
    kind = {"full": "All weights of", "lora": "A LoRA adapter for", "qlora": "A LoRA adapter (4-bit base) for"}[method]
    title, note = _TITLES_AND_NOTES[head]
    return _README.format(
        title=f"{record.get('task', 'Text')} {title}",
        description=f"{kind} `{base}`, {_purpose(stock, record, head)}",
        imports="\n".join(imports) + definition,
        line=line,
        note=note,
    )


def _class_to_load(stock, head: str) -> tuple[str, list[str], str]:
    """The name of the class that loads a model, what else is imported for it, and its definition where it needs one."""
    if head != "span" or has_own_class(stock.config):
        own = {"generate": "CausalLM", "classify": "SequenceClassification", "span": "QuestionAnswering"}[head]
        return f"AutoModelFor{own}", [], ""
    family = span_class(stock.config).__bases__[1]
    imports = [
        "from transformers.modeling_layers import GenericForQuestionAnswering",
        f"from {family.__module__} import {family.__name__}",
    ]
    return "SpanModel", imports, f"\n\nclass SpanModel(GenericForQuestionAnswering, {family.__name__}): ...\n"


def _purpose(stock, record: dict, head: str) -> str:
    if head == "span":
        return "tuned to find the words of a paragraph that answer a question, or to say that none do."
    if head == "generate":
        words = record["prompt"].get("label_words")
        return f"tuned to answer a prompt with one of: {', '.join(words)}." if words else "tuned to answer questions."
    labels = ", ".join(stock.config.id2label[i] for i in range(stock.config.num_labels))
    return f"tuned to classify texts. Labels: {labels}."


def load_final_or_base(
    name: str,
    labels: tuple[str, ...],
    *,
    revision: str | None = None,
    precision: str = "fp32",
    attention: str = "auto",
    load_4bit: bool = False,
):
    """(SequenceClassifier in eval mode, tokenizer, task.json's dict or None) of a final/ or any classifier.

    Weights have the types that they had in training: float32 for a whole model (16-bit compute is the caller's
    autocast), the precision or NF4 for an adapter's base, float32 for adapter and head. An encoder without a head gets
    an untrained one: see pretrained.is_trained_classifier. Raises Refused for a causal model without one, and for all
    that training refuses.
    """

    def load_stock(settings: ModelSettings, tokenizer, config):
        return load_stock_model(settings, labels, tokenizer, config)

    model, tokenizer, task = _load_final(load_stock, name, revision, precision, attention, load_4bit)
    return SequenceClassifier(model).eval(), tokenizer, task


def load_final_span(
    name: str, *, revision: str | None = None, precision: str = "fp32", attention: str = "auto", load_4bit: bool = False
):
    """(SpanModel in eval mode, tokenizer, task.json's dict or None) of a final/ or any model with a span head.

    Types and refusals are those of `load_final_or_base`; an encoder without a head gets an untrained one.
    """
    model, tokenizer, task = _load_final(load_stock_span_model, name, revision, precision, attention, load_4bit)
    return SpanModel(model).eval(), tokenizer, task


def _load_final(load_stock, name: str, revision: str | None, precision: str, attention: str, load_4bit: bool):
    """(stock or peft model, tokenizer, task.json's dict or None); load_stock as models.load_stock_model."""
    config, tokenizer = read_config(name, revision), load_tokenizer(name, revision)
    task, adapter = read_record(name, revision), read_adapter_config(name, revision)
    in_4bit = load_4bit or (task or {}).get("method") == "qlora"
    settings = ModelSettings(
        name=adapter["base_model_name_or_path"] if adapter else name,
        revision=adapter.get("revision") if adapter else revision,
        method="qlora" if in_4bit else "lora" if adapter else "full",
        precision=precision,
        attention=attention,
    )
    model, missing = load_stock(settings, tokenizer, config)
    if adapter:
        model = put_adapter_on(model, name, revision)
    elif missing:
        if not is_encoder(config):
            kind = "span" if hasattr(model, SPAN_HEAD) else "classification"
            raise Refused(
                f"{name} has no {kind} head: give a tuned final/ folder, or a model that was published with one"
            )
        initialise_head(model, missing, settings.seed)
    return model, tokenizer, task


def put_adapter_on(model, name: str, revision: str | None):
    """A peft model: a base with the adapter of a folder or hub id.

    Raises:
        Refused: the adapter lacks weights, of which peft only warns and leaves them as drawn, or has some that its
            configuration has no place for, which peft passes over.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    weights = _find(name, "adapter_model.safetensors", revision)
    if weights is None:
        raise Refused(f"the adapter {name} has no adapter_model.safetensors; copy the whole folder")
    try:
        adapted = PeftModel.from_pretrained(model, name, revision=revision)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        found = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise Refused(
            f"the adapter {name} lacks weights, or its adapter_config.json does not fit them ({found}); copy the whole "
            "folder"
        ) from error
    wanted = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    with safe_open(weights, "pt") as file:
        found = set(file.keys())
    for what, names in (("lacks weights", wanted - found), ("has weights without a place", found - wanted)):
        if names:
            raise Refused(f"the adapter {name} {what}: {', '.join(sorted(names)[:4])}; copy the whole folder")
    return adapted


def read_record(name: str, revision: str | None) -> dict | None:
    """task.json of a final/ folder or hub id; None for a model that has none, or one that is not ours."""
    path = _find(name, "task.json", revision)
    record = read_json(Path(path)) if path else {}
    return record if "base_model" in record else None


def read_adapter_config(name: str, revision: str | None) -> dict | None:
    """adapter_config.json of a folder or hub id; None for a whole model."""
    path = _find(name, "adapter_config.json", revision)
    return read_json(Path(path)) if path else None


def _find(name: str, filename: str, revision: str | None) -> str | None:
    """The path of one file of a folder or hub id, None when it has no such file."""
    if os.path.isdir(name):
        path = os.path.join(name, filename)
        return path if os.path.isfile(path) else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(name, filename, revision=revision)
    except EntryNotFoundError:
        return None
