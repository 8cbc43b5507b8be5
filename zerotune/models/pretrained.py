"""A model's config and tokenizer, read and checked before any weights are read."""

import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import transformers
from huggingface_hub import errors as hub_errors
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from zerotune.errors import Refused, first_line, listed
from zerotune.models.boundary import reading
from zerotune.models.families import (
    CAUSAL,
    ENCODERS,
    SUPPORTED,
    counts_positions_from_pad,
    nearest_family,
    projection_shapes,
    text_part,
)
from zerotune.models.heads import is_encoder
from zerotune.models.model_files import (
    CONFIG_FOLDER,
    adapter_base,
    check_adapter,
    check_final,
    check_weight_files,
    find_file,
    is_hub_id,
    missing_folder,
    no_hub,
    read_record,
)
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings

_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "[PAD]", "<|pad|>", "<|padding|>")
MOST_LAYERS = 1000
_QUESTIONS = "squad"  # the one task without labels


def read_model(settings: ModelSettings, task: str, labels: tuple[str, ...] = (), needs_weights: bool = True) -> tuple:
    """Return the config and tokenizer of a model, after all checks that do not load weights.

    Args:
        task: "sst2", "imdb", "classify" or "squad".
        labels: of a classifier.
        needs_weights: check that its weight files are there and undamaged.
    Raises:
        Refused: one of them cannot be read or used, weight files are missing or cut short, or the model was tuned for
            another kind of task or other labels.
    """
    name, revision = settings.name, settings.revision
    is_folder = os.path.isdir(name)
    check_revision(name, revision)
    if is_folder:  # an adapter may have no config but its base's
        check_base(name, revision)
    config = read_config(name, revision)
    if not is_folder:
        check_base(name, revision)
    check_tuned_for(name, revision, task)
    if labels:
        check_labels(name, config, labels)
    check_adapter(name, revision)
    if needs_weights:
        check_weight_files(name)
        check_final(name)
    tokenizer = load_tokenizer(name, revision)
    check_pad_token(name, config, tokenizer)
    return config, tokenizer


def check_revision(name: str, revision: str | None) -> None:
    """Refuse a revision of a folder."""
    if revision and os.path.isdir(name):
        raise Refused(f"--revision {revision} chooses a version of a hub model, and {name} is a folder: leave it out")


def check_base(name: str, revision: str | None) -> None:
    """Refuse an adapter whose base model cannot be read, naming both."""
    base = adapter_base(name, revision)
    if base is None:
        return
    place = (
        "base_model in task.json" if read_record(name, revision) else "base_model_name_or_path in adapter_config.json"
    )
    way_out = f"put it back, or correct {place}"
    if not os.path.isdir(base[0]) and not is_hub_id(base[0]):
        raise Refused(f"the adapter {name} belongs to the model {base[0]}, which is not there: {way_out}")
    try:
        read_config(*base)
    except Refused as refusal:
        problem = str(refusal).removeprefix("--model ")
        raise Refused(f"the adapter {name} belongs to the model {base[0]}: {problem}") from refusal


def read_config(name: str, revision: str | None) -> PretrainedConfig:
    """Return the config of a hub id or folder; for a model of text and images, its text part's.

    An adapter's config is in its folder config/, or is its base's if another tool saved the adapter. Raises Refused
    with the way out if the config cannot be used here.
    """
    raw, place = _raw_config(name, revision)
    if place is None:
        return read_config(*adapter_base(name, revision))
    if raw.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise _unsupported(name, raw.get("model_type"))
    with reading("the config", f"--model {name}", "correct config.json, or copy the model again"):
        whole = AutoConfig.from_pretrained(name, revision=revision or "main", subfolder=place, trust_remote_code=False)
        config = text_part(whole)
        if config.model_type not in SUPPORTED:
            raise _unsupported(name, config.model_type)
        check_architecture(config)
    _check_quantisation(name, config)
    config._attn_implementation = "eager"  # a kernel that the file names is never loaded; --attention decides
    # zerotune also chooses what the model returns and how it computes
    config.return_dict, config.output_attentions, config.output_hidden_states = True, False, False
    config.chunk_size_feed_forward = 0
    return config


def is_text_part(name: str, revision: str | None, config: PretrainedConfig) -> bool:
    """Return whether a config from `read_config` describes only the text part of a model of text and images."""
    raw, _ = _raw_config(name, revision)
    return raw.get("model_type", config.model_type) != config.model_type


def _raw_config(name: str, revision: str | None) -> tuple[dict, str | None]:
    """Return the content of config.json and its `_config_place`; for an adapter without one, ({}, None).

    Raises:
        Refused: it cannot be read, or needs code from its repository.
    """
    try:
        place = _config_place(name, revision)
        if place is None:
            return {}, None
        raw, _ = PretrainedConfig.get_config_dict(name, revision=revision or "main", subfolder=place)
    except Refused:
        raise
    except (TypeError, RecursionError):  # transformers adds its own keys to a config that it has read
        raw = None
    except (OSError, ValueError) as error:
        raise _unreadable(name, error) from error
    if not isinstance(raw, dict):  # transformers 5.23 lets a list through
        raise Refused(f"the config of --model {name} cannot be read: its JSON is not an object")
    architectures = raw.get("architectures") or []
    if not (isinstance(architectures, list) and all(isinstance(each, str) for each in architectures)):
        raise Refused(f"the config of --model {name} has architectures {architectures!r}: wanted a list of class names")
    if not _is_known_code(raw.get("auto_map") or {}):
        raise Refused(
            f"{name} needs code from its repository (auto_map in config.json), which zerotune never runs; "
            f"use a model that transformers knows: {', '.join(SUPPORTED)}"
        )
    return raw, place


def _is_known_code(auto_map) -> bool:
    """Return whether all classes that a config takes from its repository are in transformers too (Phi-3's are)."""
    if not isinstance(auto_map, dict):
        return False
    names = [str(place).rpartition(".")[2] for part, place in auto_map.items() if part != "AutoTokenizer"]
    return all(hasattr(transformers, name) for name in names)


def _unsupported(name: str, model_type: str | None) -> Refused:
    """Return the refusal of an unsupported family, with the nearest supported one and an example model."""
    nearest = nearest_family(model_type)
    return Refused(
        f"--model must be of a family that zerotune is tested with: {name} is {model_type or 'of no known type'}; the "
        f"nearest that works is {nearest}, for example {(CAUSAL | ENCODERS)[nearest]} (all: {', '.join(SUPPORTED)})"
    )


def _config_place(name: str, revision: str | None) -> str | None:
    """Return the folder of config.json inside a model: "", or for an adapter CONFIG_FOLDER, or None if it has none.

    Raises:
        OSError: there is no such model, or it cannot be reached.
        Refused: a folder is neither a model nor an adapter.
    """
    if find_file(name, "config.json", revision):
        return ""
    if find_file(name, "adapter_config.json", revision):
        return CONFIG_FOLDER if find_file(name, f"{CONFIG_FOLDER}/config.json", revision) else None
    if os.path.isdir(name):
        raise Refused(
            f"--model must be a model or a run: the folder {name} has no config.json and is not a run"
            f"{_models_below(Path(name))}; give one that is, or a hub id"
        )
    return ""


def _models_below(folder: Path) -> str:
    """Name the models and runs in a folder: " (in it: 'a', 'b')", for one " (did you mean 'b'?)", for none ""."""
    marks = ("config.json", "adapter_config.json", "final/config.json", "final/adapter_config.json")
    found = sorted(str(each) for each in folder.iterdir() if any((each / mark).is_file() for mark in marks))
    if len(found) == 1:
        return f" (did you mean {found[0]!r}?)"
    return f" (in it: {listed(found)})" if found else ""


def _check_quantisation(name: str, config: PretrainedConfig) -> None:
    """Refuse checkpoints that were quantised by anything but bitsandbytes."""
    packed = getattr(config, "quantization_config", None)
    method = packed.get("quant_method") if isinstance(packed, dict) else getattr(packed, "quant_method", None)
    if packed is not None and str(getattr(method, "value", method)) != "bitsandbytes":
        raise Refused(
            f"{name} is quantised already ({getattr(method, 'value', method)}): give the model it was made from; "
            "--load-4bit and --method qlora quantise it while it is loaded"
        )


def check_architecture(config: PretrainedConfig) -> None:
    """Refuse impossible sizes, and activations and kinds of RoPE that transformers does not know."""
    if not (isinstance(config.vocab_size, int) and config.vocab_size > 0):
        raise Refused(f"config.json has vocab_size {config.vocab_size!r}: wanted a number of embeddings, at least 1")
    layers = getattr(config, "num_hidden_layers", 1)
    if not (isinstance(layers, int) and 1 <= layers <= MOST_LAYERS):
        raise Refused(f"config.json has num_hidden_layers {layers!r}: wanted 1 to {MOST_LAYERS}")
    _check_pad_id(config)
    if is_encoder(config) and any(getattr(config, key, False) for key in ("is_decoder", "add_cross_attention")):
        raise Refused("config.json has is_decoder or add_cross_attention: wanted an encoder, which reads both ways")
    if getattr(config, "use_bidirectional_attention", None):
        raise Refused("config.json has use_bidirectional_attention: wanted a causal model, which reads one way")
    if getattr(config, "is_causal", None) is False and not is_encoder(config):
        raise Refused("config.json has is_causal false: wanted a causal model, which reads one way")
    for key, share in config.to_dict().items():
        is_share = share is None or (isinstance(share, int | float) and 0 <= share < 1)
        if key.endswith(("dropout", "dropout_prob")) and not is_share:
            raise Refused(f"config.json has {key} {share!r}: wanted a share from 0 to below 1")
    if isinstance(getattr(config, "text_config", None), dict):
        raise Refused(f"config.json has a text_config, which is no part of a {config.model_type}: remove it")
    projection_shapes(config)  # builds the backbone on the meta device, which runs the architecture's own checks


def _check_pad_id(config: PretrainedConfig) -> None:
    pad = config.pad_token_id
    if pad is None and counts_positions_from_pad(type(config)):
        raise Refused(f"config.json has no pad_token_id, from which a {config.model_type} counts positions: add it")
    if pad is not None and not (isinstance(pad, int) and 0 <= pad < config.vocab_size):
        raise Refused(
            f"the pad token must have an embedding: config.json has pad_token_id {pad!r} and the model has "
            f"{config.vocab_size} embeddings; correct it"
        )


# Reasons why transformers could not read a config, with the way out; the first that applies is used.
_CAUSES = (
    (
        (hub_errors.GatedRepoError,),  # before RepositoryNotFoundError, its base class
        "{name} is gated: accept its terms at https://huggingface.co/{name}, then `hf auth login` (or set HF_TOKEN) "
        "with an account that has access",
    ),
    (
        (hub_errors.HFValidationError, hub_errors.RepositoryNotFoundError),
        "--model {name} is neither a folder nor a model on the hub; check the spelling, or `hf auth login` if it is "
        "private",
    ),
    (
        (hub_errors.RevisionNotFoundError,),
        "--revision must be a branch, tag or commit of {name}; see https://huggingface.co/{name}/commits",
    ),
    (
        (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError),
        "--model {name} is not a folder here and not in the cache, and {no_hub}; fetch it once on a machine with "
        "network and the same HF_HOME, or give a folder",
    ),
)


def _unreadable(name: str, error: Exception) -> Refused:
    """Return the refusal of a config that transformers could not read, from the chain of the error's causes."""
    chain, cause = [], error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    is_on_hub = any(isinstance(cause, hub_errors.GatedRepoError | hub_errors.RevisionNotFoundError) for cause in chain)
    if not (is_on_hub or os.path.isdir(name)) and (refusal := missing_folder(name)):
        return refusal
    for types, message in _CAUSES:
        if any(isinstance(cause, types) for cause in chain):
            return Refused(message.format(name=name, no_hub=no_hub()))
    return Refused(f"the config of --model {name} cannot be read: {first_line(error)}")


def check_tuned_for(name: str, revision: str | None, task: str) -> None:
    """Refuse a tuned model that answers questions where labels are wanted, or the other way round."""
    record = read_record(name, revision)
    if record is None or (record["task"] == _QUESTIONS) == (task == _QUESTIONS):
        return
    script = "qa" if record["task"] == _QUESTIONS else record["task"]
    raise Refused(
        f"{name} was tuned for {record['task']}, and this is {task}: evaluate it with eval/{script}.py, and train from "
        "the model that it was made from"
    )


def is_trained_classifier(config: PretrainedConfig) -> bool:
    """Return whether the checkpoint was published with a sequence-classification head."""
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def answers_by_prompt(config: PretrainedConfig) -> bool:
    """Return whether a checkpoint has only an LM head to answer with."""
    return not is_trained_classifier(config) and not is_encoder(config)


def known_labels(model: ModelSettings, config: PretrainedConfig) -> tuple[str, ...] | None:
    """Return the labels that a model was tuned or published for, in order; None for a model without labels."""
    record = read_record(model.name, model.revision)
    if record is not None:
        return tuple(record["labels"])
    if not is_trained_classifier(config):
        return None
    return _published_labels(config)


def _published_labels(config: PretrainedConfig) -> tuple[str, ...]:
    """Return a classifier's own names for its labels, in the order of its columns."""
    return tuple(str(config.id2label[column]) for column in sorted(config.id2label))


def label_columns(config: PretrainedConfig, labels: tuple[str, ...]) -> list[int]:
    """Return the column of a classifier's output for each of the task's labels; an untrained head has the task's order.

    A published classifier may order them differently, and abbreviate (neg), number (LABEL_0) or capitalise them.

    Raises:
        Refused: the checkpoint was trained for other labels.
    """
    if not is_trained_classifier(config):
        return list(range(len(labels)))
    theirs = dict(zip(sorted(config.id2label), _published_labels(config), strict=True))
    if sorted(theirs.values()) == sorted(labels):  # also where one label begins with another
        return [column for label in labels for column, name in theirs.items() if name == label]
    found = [
        [column for column, name in theirs.items() if _names_label(name, number, label)]
        for number, label in enumerate(labels)
    ]
    columns = [column for of_label in found for column in of_label]
    if any(len(of_label) != 1 for of_label in found) or sorted(columns) != list(theirs):
        raise Refused(
            f"the model's labels must be the task's, {listed(labels)}: it was trained for {listed(theirs.values())}; "
            "train from its base model, or evaluate a model with these labels"
        )
    return columns


def check_labels(
    name: str, config: PretrainedConfig, labels: tuple[str, ...], named: tuple[str, ...] | None = None
) -> None:
    """Refuse a classifier that was trained for other labels than the task's, as `label_columns` does.

    It prints how numbered labels (LABEL_0) are read, because only their publisher knows their order.

    Args:
        named: what --labels says of the order of numbered labels.
    """
    label_columns(config, labels)
    if not is_trained_classifier(config):
        return
    theirs = _published_labels(config)
    if sorted(theirs) != sorted(labels) and all(re.fullmatch(r"(?i)(label_)?\d+", each) for each in theirs):
        if named is not None and [each.casefold() for each in named] != [each.casefold() for each in labels]:
            raise Refused(
                f"--labels {' '.join(map(shlex.quote, named))}: the labels of {name} are only numbers, and --glue "
                f"reads them in the order {listed(labels)}: for yours leave --glue out, and name rows and columns by "
                "--dataset or --test-file, --text-column and --label-column"
            )
        read = ", ".join(f"{their} is {label!r}" for their, label in zip(theirs, labels, strict=True))
        say(f"labels of {name}, which are only numbers, are taken in this order: {read}")


def _names_label(name: str, number: int, label: str) -> bool:
    """Return whether a model's name for a label means the task's label of this number."""
    name = name.strip().casefold()
    return name in (str(number), f"label_{number}") or (name != "" and label.casefold().startswith(name))


def check_generator(name: str, config: PretrainedConfig, head_learning_rate: float | None, other_head: str) -> None:
    """Refuse --head generate for a model that cannot write, and --head-learning-rate, as there is no new head."""
    if not answers_by_prompt(config):
        kind = "an encoder" if is_encoder(config) else "published as a classifier, without an LM head"
        raise Refused(f"--head generate needs a causal model, and {name} is {kind}: use --head {other_head}")
    if head_learning_rate is not None:
        raise Refused(f"--head-learning-rate is for --head {other_head}: --head generate has no new head, leave it out")


def most_tokens(config: PretrainedConfig) -> int | None:
    """Return how many tokens fit the model's positions, None if unlimited. RoBERTa counts positions from pad + 1.

    A LongRoPE model (Phi-3) counts up to its original length: one longer row would change the meaning of positions for
    its whole batch.
    """
    window = getattr(config, "max_position_embeddings", None)
    if window is None:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        return min(window, rope["original_max_position_embeddings"])
    return window - config.pad_token_id - 1 if counts_positions_from_pad(type(config)) else window


def check_window(name: str, config: PretrainedConfig, max_length: int) -> None:
    """Refuse texts longer than the model's positions."""
    window = most_tokens(config)
    if window is not None and max_length > window:
        raise Refused(f"--max-length {max_length} is more than the {window} positions of {name}: use at most that")


def check_token_ids(name: str, config: PretrainedConfig, ids: np.ndarray) -> None:
    """Refuse token ids without an embedding: the tokenizer belongs to another model."""
    if len(ids) and ids.max() >= config.vocab_size:
        raise Refused(
            f"the tokenizer of {name} gives token {ids.max()} and the model has {config.vocab_size} embeddings: copy "
            "the tokenizer that belongs to it"
        )


def check_pad_token(name: str, config: PretrainedConfig, tokenizer) -> None:
    """Refuse a pad token without an embedding."""
    if tokenizer.pad_token_id >= config.vocab_size:
        raise Refused(
            f"the pad token must have an embedding: {tokenizer.pad_token!r} is id {tokenizer.pad_token_id} but "
            f"{name} has {config.vocab_size}; give its tokenizer another pad token"
        )


def check_texts(name: str, config: PretrainedConfig, tokenizer, texts: Iterable[str]) -> None:
    """Refuse texts with a token that has no embedding; they are tokenised only if the tokenizer has such tokens."""
    if not has_unknown_tokens(config, tokenizer):
        return
    for text in texts:
        check_token_ids(name, config, np.array(tokenizer.backend_tokenizer.encode(text).ids))


def has_unknown_tokens(config: PretrainedConfig, tokenizer) -> bool:
    """Return whether a tokenizer has tokens for which the model has no embedding."""
    return max(tokenizer.get_vocab().values()) >= config.vocab_size


def load_tokenizer(name: str, revision: str | None):
    """Return the fast tokenizer, padding and truncating on the right, with a pad token and at most one BOS.

    The pad token is its own, else a reserved one, else unk: no token is added, no embedding resized. Raises Refused.
    """
    way_out = "tokenizer.json and tokenizer_config.json belong beside the weights, copy them again"
    with reading("the tokenizer", f"--model {name}", way_out):
        config, base = None, adapter_base(name, revision)
        if base and not find_file(name, "tokenizer_config.json", revision):
            name, revision = base
        elif base:  # some classes depend on the config, which transformers looks for only beside the tokenizer
            place = _config_place(name, revision)
            (of, version), folder = (base, "") if place is None else ((name, revision), place)
            config = AutoConfig.from_pretrained(of, revision=version or "main", subfolder=folder)
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=False, config=config
        )
        tokenizer("a", truncation=True)
    if not tokenizer.is_fast:
        raise Refused(f"the tokenizer must be a fast one (tokenizer.json): {name} has only {type(tokenizer).__name__}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = _spare_token(tokenizer, name)
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    _ensure_one_bos(tokenizer, name)
    return tokenizer


def _spare_token(tokenizer, name: str) -> str:
    special = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    reserved = [token for token in special if "reserved" in token]
    for token in [*_PAD_TOKENS, *reserved, tokenizer.unk_token]:
        if token in special or (token and token == tokenizer.unk_token):
            return token
    raise Refused(f"the tokenizer of {name} has no pad, reserved or unknown token; set pad_token in its folder")


def read_names_as_text(tokenizer) -> None:
    """Make a tokenizer read the name of a special token inside a text as text, also after it is saved and loaded.

    Otherwise, if unk is the pad token, "<unk>" at a text's end is padding, and transformers pools the token before it.
    """
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True


def leading_ids(tokenizer) -> list[int]:
    """Return the special tokens that a tokenizer puts before a text: a causal model's BOS, if it has one."""
    encoding = tokenizer("a").encodings[0]
    return encoding.ids[: encoding.sequence_ids.index(0)]


def trailing_ids(tokenizer) -> list[int]:
    """Return the special tokens that a tokenizer puts after a text."""
    encoding = tokenizer("a").encodings[0]
    return encoding.ids[len(encoding.ids) - encoding.sequence_ids[::-1].index(0) :]


def _ensure_one_bos(tokenizer, name: str) -> None:
    bos = tokenizer.bos_token_id
    if bos is None or bos == tokenizer.cls_token_id:
        return
    if bos not in leading_ids(tokenizer):
        tokenizer.add_bos_token = True
    count = leading_ids(tokenizer).count(bos)
    if count != 1:
        raise Refused(f"a text must begin with one BOS: {name}'s tokenizer puts {count}; correct its post-processor")
