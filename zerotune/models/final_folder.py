"""final/: a tuned model on disk, readable without zerotune, and loaded again for evaluation."""

import copy
import json
import os
from functools import partial
from pathlib import Path

import torch
from transformers import GenerationConfig

from zerotune.errors import Refused
from zerotune.files import follow_umask
from zerotune.models.adapters import base_settings, load_adapter
from zerotune.models.base_license import hub_id
from zerotune.models.boundary import quiet_transformers
from zerotune.models.classifier import SequenceClassifier, load_stock_classifier
from zerotune.models.heads import TunedModel, head_of, is_encoder
from zerotune.models.model_card import model_card
from zerotune.models.model_files import CONFIG_FOLDER, file_records, read_record
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.models.span_head import SpanModel, load_stock_span_model
from zerotune.settings.groups import ModelSettings
from zerotune.settings.names import folder_name


def save_final(tuned: TunedModel, tokenizer, folder: str | Path, task: dict, state_dict: dict | None = None) -> None:
    """Write the model in float32 into an existing empty folder, with a README.md that loads it without zerotune.

    Full tuning gives a plain checkpoint. LoRA and QLoRA give an adapter with its head, and the config in config/:
    transformers would take a config.json beside an adapter for that of a whole model. One process writes; the caller
    moves the folder into place.

    Args:
        task: the task's part of task.json.
        state_dict: gathered weights by their names in tuned.model (for an adapter, at least those that train); None:
            the model's own.
    """
    folder = Path(folder)
    stock = tuned.stock_model
    if tuned.model is stock:
        method, base, revision = "full", stock.config.name_or_path, None
        base = hub_id(base) or (folder_name(base) if os.path.isdir(base) else base)
        weights = stock.state_dict() if state_dict is None else dict(state_dict)
        _check_float32(weights)
        forget_generation_settings(stock)
        with quiet_transformers():
            # with the names of the model's class, not those of a checkpoint that was read by a key_mapping
            stock.save_pretrained(folder, state_dict=weights, save_original_format=stock.key_mapping is None)
    else:
        method = "qlora" if getattr(stock, "is_loaded_in_4bit", False) else "lora"
        adapter = tuned.model.peft_config["default"]
        base, revision = _relative(adapter.base_model_name_or_path, folder), adapter.revision
        _save_adapter(tuned.model, folder, state_dict)
    record = {**task, "method": method, "base_model": base, "base_revision": revision, "dtype": "float32"}
    describe_final(folder, stock, tokenizer, record)


def forget_generation_settings(stock) -> None:
    """Keep only the special tokens of a model's generation settings, before it is saved.

    A tuned model writes greedily; the base's penalties would change its answers, and transformers 5.17 does not save
    a temperature without sampling."""
    base = getattr(stock, "generation_config", None)
    if base is not None:
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        stock.generation_config = GenerationConfig(**{name: getattr(base, name) for name in names})


def describe_final(folder: Path, stock, tokenizer, record: dict) -> None:
    """Write tokenizer, task.json and README.md beside a model's weights.

    Args:
        record: content of task.json without the files' hashes.
    """
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        follow_umask(file)
    record = record | {"files": file_records(folder)}
    (folder / "task.json").write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(model_card(stock, record, tokenizer), encoding="utf-8")


def _relative(base: str, folder: Path) -> str:
    """Return a local base model's path relative to the adapter's folder, so that both can be moved together."""
    # with links resolved, because a ".." after a link leads elsewhere
    return os.path.relpath(os.path.realpath(base), os.path.realpath(folder)) if os.path.isdir(base) else base


def _check_float32(weights: dict) -> None:
    wrong = sorted(
        name for name, value in weights.items() if value.is_floating_point() and value.dtype != torch.float32
    )
    assert not wrong, f"final/ is float32, these are not: {wrong[:4]}"


def _save_adapter(model, folder: Path, state_dict: dict | None) -> None:
    """Write the files of peft's save_pretrained, without its model card and without asking the hub.

    A local base is named by its path from the working directory, which is how peft and transformers look for it: no
    absolute path is recorded, and they find the base from the directory in which the run was started.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(model, state_dict=state_dict, save_embedding_layers=False)
    _check_float32(weights)
    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = copy.copy(model.peft_config["default"])
    adapter.inference_mode = True
    if os.path.isdir(adapter.base_model_name_or_path):
        adapter.base_model_name_or_path = os.path.relpath(adapter.base_model_name_or_path)
    adapter.save_pretrained(str(folder))
    stock = model.get_base_model()
    config = copy.deepcopy(stock.config)
    config.architectures = [type(stock).__name__]
    config.dtype = "float32"
    # The quantisation is the loader's choice: with it here, transformers would take the base for a packed checkpoint.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    config.save_pretrained(folder / CONFIG_FOLDER)


def load_final_or_base(settings: ModelSettings, labels: tuple[str, ...]) -> tuple:
    """Return (SequenceClassifier in eval mode, tokenizer, task.json or None) of a final/ or any classifier.

    Weights have the types that they had in training: float32 for a whole model (16-bit compute is the caller's
    autocast), the precision or NF4 for an adapter's base, float32 for adapter and head. An encoder without a head gets
    an untrained one, drawn by settings.seed.

    Args:
        settings: method "qlora" loads the base in NF4, as does an adapter that was trained on NF4.
    Raises:
        Refused: a causal model has no head, or training would refuse the model.
    """
    load_stock = partial(load_stock_classifier, labels=labels)
    model, tokenizer, record = _load_final(settings, load_stock)
    return SequenceClassifier(model, settings.drop_unpooled, labels).eval(), tokenizer, record


def load_final_span(settings: ModelSettings) -> tuple:
    """Return (SpanModel in eval mode, tokenizer, task.json or None), as `load_final_or_base` does."""
    model, tokenizer, record = _load_final(settings, load_stock_span_model)
    return SpanModel(model).eval(), tokenizer, record


def _load_final(settings: ModelSettings, load_stock) -> tuple:
    """Return (stock or peft model, tokenizer, task.json or None); load_stock is like `load_stock_span_model`."""
    name, revision = settings.name, settings.revision
    config, tokenizer, record = read_config(name, revision), load_tokenizer(name, revision), read_record(name, revision)
    base, is_adapter = base_settings(settings, record)
    model, missing = load_stock(base, tokenizer=tokenizer, config=config)
    if is_adapter:
        return load_adapter(model, name, revision), tokenizer, record
    if missing and not is_encoder(config):
        kind = "span" if head_of(model) == "span" else "classification"
        raise Refused(f"{name} has no {kind} head: give a tuned final/ folder, or a model that was published with one")
    return model, tokenizer, record
