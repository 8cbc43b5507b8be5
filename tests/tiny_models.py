"""Random checkpoints of every supported architecture, a few thousand weights each, written once per test session.

Their vocabulary is ten words; `character_model` reads any text, a byte at a time.
"""

import functools
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    PreTrainedTokenizerFast,
)

# Most tests use these families; test_families.py covers all that are supported.
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
ENCODERS = ("distilbert", "bert", "roberta")
LABELS = ("negative", "positive")
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
WORDS = ["a", "the", "film", "was", "good", "bad", "not", "very", "dull", "bright"]
PAD = 3
# Rows of tokens of several lengths.
ROWS = [[1, 4, 6, 7, 8], [1, 5, 9], [1, 4, 6, 7, 10, 11, 8, 12]]
# Two rows for a model to read, and a mask of the tokens that count.
IDS = torch.tensor([[1, 4, 6, 7, 8], [1, 5, 9, 3, 3]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
_CAUSAL_SIZES = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8, "attn_implementation": "eager"}
# Windows are shorter than the rows, and each family's special features are switched on.
_OWN_SIZES = {
    "ministral": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "ministral3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1,
                                       "original_max_position_embeddings": 4}},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "olmo3": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.4,
                "logits_scaling": 4.0},
    "phi3": {"sliding_window": 4},
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "electra": {"embedding_size": 16},
    "albert": {"embedding_size": 16},
    "deberta-v2": {  # as in DeBERTa-v3
        "relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True,
        "pos_att_type": "p2c|c2p", "position_biased_input": False, "type_vocab_size": 0,
    },
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2,
                   "mask_token_id": 0},
}  # fmt: skip
# For models of which only the text part is loaded: the kind of that part.
TEXT_PARTS = {"gemma3": "gemma3_text", "mistral3": "ministral3", "qwen3_5": "qwen3_5_text"}
_VISION_SIZES = {
    "gemma3": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "image_size": 8, "patch_size": 4},
    "mistral3": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "head_dim": 8, "image_size": 8, "patch_size": 4},
    "qwen3_5": {"hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
                "patch_size": 4, "num_position_embeddings": 4},
}  # fmt: skip
_FOLDER = tempfile.TemporaryDirectory(prefix="zerotune-tiny-")


def word_tokenizer(special: tuple[str, ...] = tuple(SPECIAL), **tokens: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one id per word, `<s>` first and around the parts of a pair; `tokens` are the special-token
    arguments (unk_token="<unk>")."""
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token=special[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1 <s>:1", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


@functools.cache
def tiny_model(kind: str) -> str:
    """Make a folder like a published checkpoint: an LM with its head, or a BERT with its pooler."""
    folder = str(Path(_FOLDER.name) / kind)
    config, family = _config_and_class(kind)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    family.from_config(config).save_pretrained(folder)
    torch.set_rng_state(state)
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    word_tokenizer(**names).save_pretrained(folder)
    return folder


def _config_and_class(kind: str) -> tuple:
    """Return a tiny config, and the Auto class with which models of its kind are published."""
    from zerotune.models.families import is_encoder_family

    if kind in TEXT_PARTS:
        text, _ = _config_and_class(TEXT_PARTS[kind])
        outer = {"text_config": text.to_dict(), "vision_config": _VISION_SIZES[kind]}
        return AutoConfig.for_model(kind, **outer, pad_token_id=3), AutoModelForImageTextToText
    own = _OWN_SIZES.get(kind, {})
    if not is_encoder_family(kind):
        return AutoConfig.for_model(kind, **{**_CAUSAL_SIZES, **own}), AutoModelForCausalLM
    published = {"bert": AutoModel, "electra": AutoModelForPreTraining, "albert": AutoModelForPreTraining}
    return AutoConfig.for_model(kind, **{**_SIZES, **own}), published.get(kind, AutoModelForMaskedLM)


def model_copy(folder: Path, kind: str = "llama", **config) -> Path:
    """Copy a tiny checkpoint to a folder that does not exist yet, with some values of its config.json changed."""
    shutil.copytree(tiny_model(kind), folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return folder


def padded(rows: list[list[int]], side: str = "right") -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask [B, T] of rows, padded on one side."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    return ids, mask


# Like Llama 3.2's: it has today's date, unless the caller pins one.
CHAT_TEMPLATE = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<s>{{ date_string }}\n{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def character_model(folder: Path, chat_template: str | None = None) -> None:
    """Write a Llama of 2,048 positions whose tokens are single bytes, so every label word has several."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    sizes = {**_SIZES, "vocab_size": len(tokenizer), "max_position_embeddings": 2048, "num_key_value_heads": 2}
    state = torch.get_rng_state()
    torch.manual_seed(2)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes)).save_pretrained(folder)
    torch.set_rng_state(state)


def byte_tokenizer(words: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, of `words` (such as " good") and of their prefixes; `<s>` comes first."""
    symbols = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = {}  # in the order in which they apply
    for word in words:
        spelled = word.replace(" ", "Ġ")
        merges |= {(spelled[:end], spelled[end]): None for end in range(1, len(spelled))}
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, *map("".join, merges)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def seeded_model(kind: str, seed: int, vocab_size: int, **sizes):
    """Return a causal model in eval mode whose weights depend only on `kind`, `seed` and the sizes.

    NumPy draws one matrix after another in the order of their names, because transformers has changed its order, and
    torch's normal numbers differ in their last bits between processors.
    """
    config = AutoConfig.for_model(kind, **{**_CAUSAL_SIZES, "vocab_size": vocab_size, **sizes})
    model = AutoModelForCausalLM.from_config(config).eval()
    generator = np.random.RandomState(seed)  # NumPy never changes its numbers
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 2:
                drawn = generator.normal(0, config.initializer_range, tuple(parameter.shape))
                parameter.copy_(torch.from_numpy(drawn))
    return model


def tuned_model(folder: str, method: str, head: str = "classify", **settings) -> tuple:
    """Return a model in eval mode whose trainable weights have moved, and its tokenizer."""
    from zerotune.models.classifier import load_classifier
    from zerotune.models.generator import load_generator
    from zerotune.models.pretrained import load_tokenizer
    from zerotune.models.span_head import load_span_model
    from zerotune.settings.groups import ModelSettings

    tokenizer, settings = load_tokenizer(folder, None), ModelSettings(folder, None, method, **settings)
    if head == "classify":
        model = load_classifier(settings, LABELS, tokenizer)
    else:
        model = {"span": load_span_model, "generate": load_generator}[head](settings, tokenizer)
    move_weights(model)
    return model.eval(), tokenizer


def move_weights(model: torch.nn.Module) -> None:
    """Move all trainable weights from where they start, because LoRA's B starts at 0."""
    draws = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=draws)


def task_record(head: str = "classify", **changes) -> dict:
    """Return a run's description of its task in task.json."""
    prompt = {"template": "Review: {text}", "label_words": ["negative", "positive"], "format": "plain"}
    return {
        "task": "squad" if head == "span" else "sst2",
        "head": head,
        "prompt": prompt if head == "generate" else None,
        "labels": None if head == "span" else list(LABELS),
        "max_length": 64,
        "thresholds": None,
    } | changes


def saved_record(head: str = "classify", base: str = "org/a", **changes) -> dict:
    """Return the task.json that save_final makes from `task_record` after full tuning."""
    files = {"model.safetensors": {"bytes": 1, "sha256": "0"}}
    saved = {"method": "full", "base_model": base, "base_revision": None, "files": files}
    return task_record(head) | saved | changes
