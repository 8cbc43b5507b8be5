"""A model's config and tokenizer, read and judged before any weight is."""

import os
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from zerotune.errors import Refused
from zerotune.files import read_json
from zerotune.models.model_files import adapter_base

SUPPORTED = ("llama", "gemma", "gemma2", "gemma3_text", "mistral", "qwen2", "qwen3", "distilbert", "bert", "roberta")
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>")


def read_config(name: str, revision: str | None) -> PretrainedConfig:
    """The config of a hub id or folder. Raises Refused with the way out when it cannot be used here."""
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise Refused(f"--model must be a model: the folder {name} has no config.json; give one that has, or a hub id")
    try:
        raw, _ = PretrainedConfig.get_config_dict(name, revision=revision or "main")
    except TypeError:  # transformers puts keys of its own into what it has read
        raise Refused(f"the config of --model {name} cannot be read: its JSON is not an object") from None
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    if not isinstance(raw, dict):  # transformers 5.23 lets it through
        raise Refused(f"the config of --model {name} cannot be read: its JSON is not an object")
    if "auto_map" in raw:
        raise Refused(
            f"{name} needs code from its repository (auto_map in config.json), which zerotune never runs; "
            f"use a model that transformers knows: {', '.join(SUPPORTED)}"
        )
    if raw.get("model_type") not in SUPPORTED:
        raise Refused(
            f"--model must be one of {', '.join(SUPPORTED)}: {name} is {raw.get('model_type') or 'of no known type'}"
        )
    try:
        return AutoConfig.from_pretrained(name, revision=revision or "main")
    except (StrictDataclassError, ValueError, TypeError) as error:  # a value of the wrong type, or values at odds
        raise Refused(f"the config of --model {name} cannot be used: {' '.join(str(error).split())}") from error


def _unreadable(name: str, error: Exception) -> Refused:
    """What to do about a config that transformers could not read, from the chain of its causes."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes, cause = [], error
    while cause is not None:
        causes.append(cause)
        cause = cause.__cause__ or cause.__context__

    def caused_by(*types) -> bool:
        return any(isinstance(cause, types) for cause in causes)

    if caused_by(GatedRepoError):  # before RepositoryNotFoundError, of which it is one
        return Refused(
            f"{name} is gated: accept its terms at https://huggingface.co/{name}, then `hf auth login` "
            "(or set HF_TOKEN) with an account that has access"
        )
    if caused_by(HFValidationError, RepositoryNotFoundError):
        return Refused(
            f"--model {name} is neither a folder nor a model on the hub; check the spelling, "
            "or `hf auth login` if it is private"
        )
    if caused_by(RevisionNotFoundError):
        return Refused(
            f"--revision must be a branch, tag or commit of {name}; see https://huggingface.co/{name}/commits"
        )
    if caused_by(LocalEntryNotFoundError, OfflineModeIsEnabled, ConnectionError):
        return Refused(
            f"--model {name} is not a folder here and not in the cache, and the hub cannot be reached; "
            "fetch it once on a machine with network and the same HF_HOME, or give a folder"
        )
    return Refused(f"the config of --model {name} cannot be read: {str(error).splitlines()[0]}")


def most_tokens(config: PretrainedConfig) -> int | None:
    """How many tokens fit the model's positions, None where it says nothing. RoBERTa counts positions from pad + 1."""
    window = getattr(config, "max_position_embeddings", None)
    return window - config.pad_token_id - 1 if window and config.model_type == "roberta" else window


def check_window(name: str, config: PretrainedConfig, max_length: int) -> None:
    """Raises Refused for texts longer than the model's positions."""
    window = most_tokens(config)
    if window is not None and max_length > window:
        raise Refused(f"--max-length {max_length} is more than the {window} positions of {name}: use at most that")


def check_token_ids(name: str, config: PretrainedConfig, ids: np.ndarray) -> None:
    """Raises Refused for token ids without an embedding: the tokenizer belongs to another model."""
    if len(ids) and ids.max() >= config.vocab_size:
        raise Refused(
            f"the tokenizer of {name} gives token {ids.max()} and the model has {config.vocab_size} embeddings: copy "
            "the tokenizer that belongs to it"
        )


def check_weight_files(name: str) -> None:
    """Raises Refused where a model folder lacks weights or they are cut short; reads only headers. A hub id passes."""
    if not os.path.isdir(name):
        return
    files = sorted(file for file in os.listdir(name) if file.endswith((".safetensors", ".bin")))
    index = os.path.join(name, "model.safetensors.index.json")
    adapter = os.path.join(name, "adapter_config.json")
    wanted = set(files)
    if os.path.isfile(index):
        wanted = set(read_json(Path(index)).get("weight_map", {}).values())
    elif os.path.isfile(adapter):
        wanted = {"adapter_model.safetensors"}
        _check_adapter_base(name)
    if not files or wanted - set(files):
        missing = ", ".join(sorted(wanted - set(files))[:4]) or "model.safetensors"
        raise Refused(f"no weights could be read for --model {name}: it lacks {missing}; copy the whole folder")
    for path in (os.path.join(name, file) for file in files if file.endswith(".safetensors")):
        try:
            with safe_open(path, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise Refused(f"{path} is damaged ({error}): copy it again") from error


def _check_adapter_base(name: str) -> None:
    base, _ = adapter_base(Path(name))
    if os.path.isabs(base) and not os.path.isdir(base):
        raise Refused(
            f"the adapter {name} belongs to the model {base}, which is not there: put it back, or correct "
            "base_model_name_or_path in adapter_config.json"
        )
    check_weight_files(base)


def is_trained_classifier(config: PretrainedConfig) -> bool:
    """Whether the checkpoint was published with a sequence-classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def check_labels(config: PretrainedConfig, labels: tuple[str, ...]) -> None:
    """Raises Refused when a sequence-classification checkpoint was trained for other labels.

    Names are compared in order without case; generic names (LABEL_0 …) pass when their count agrees.
    """
    if not is_trained_classifier(config):
        return
    theirs = tuple(config.id2label[i] for i in sorted(config.id2label))
    generic = tuple(f"label_{i}" for i in range(len(labels)))
    if tuple(label.lower() for label in theirs) not in (tuple(label.lower() for label in labels), generic):
        raise Refused(
            f"the model's labels must be the task's, {', '.join(labels)}: it was trained for {', '.join(theirs)}; "
            "start from its base model instead"
        )


def load_tokenizer(name: str, revision: str | None):
    """The fast tokenizer, padding on the right with a token that it already has, and putting one BOS at most.

    Pad is the tokenizer's own, else a reserved token, else unk: nothing is added, no embedding resized. Raises Refused.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision or "main", trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        line = str(error).strip().splitlines()[0].rstrip(":")
        raise Refused(
            f"no tokenizer could be read for --model {name}: {line}; tokenizer.json and tokenizer_config.json belong "
            "beside the weights, copy them again"
        ) from error
    if not tokenizer.is_fast:
        raise Refused(f"the tokenizer must be a fast one (tokenizer.json): {name} has only {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _spare_token(tokenizer, name)
    tokenizer.padding_side = "right"
    _check_one_bos(tokenizer, name)
    return tokenizer


def _spare_token(tokenizer, name: str) -> str:
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    reserved = [token for token in special if "reserved" in token]
    for token in [*_PAD_TOKENS, *reserved, tokenizer.unk_token]:
        if token in special or (token and token == tokenizer.unk_token):
            return token
    raise Refused(f"the tokenizer of {name} has no pad, reserved or unknown token; set pad_token in its folder")


def _check_one_bos(tokenizer, name: str) -> None:
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.cls_token_id:
        return
    if tokenizer("a").input_ids.count(bos) == 0:
        tokenizer.add_bos_token = True
    count = tokenizer("a").input_ids.count(bos)
    if count != 1:
        raise Refused(f"a text must begin with one BOS: {name}'s tokenizer puts {count}; correct its post-processor")
