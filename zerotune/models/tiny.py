"""A random Llama of about 0.2M weights with its own tokenizer, for `--sample` and tests."""

import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import disk_is_full

MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
MAX_LENGTH = 512


def tiny_causal_model(folder: Path, lines: Callable[[int], list[str]], seed: int = 0) -> None:
    """Write the model and its tokenizer, trained on `lines(seed)`, to a folder for from_pretrained.

    A complete folder is left alone, even with another seed. Several processes may start at once: each writes a folder
    of its own, and the first to rename it wins. Raises Refused if the folder holds something else or cannot be written.
    """
    if _is_complete(folder):
        return
    from zerotune.models.boundary import quiet_transformers  # imports transformers

    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tokenizer = _train_tokenizer(lines(seed))
        tokenizer.save_pretrained(aside)
        with quiet_transformers():
            _random_llama(tokenizer, seed).save_pretrained(aside)
        os.rename(aside, folder)
    except Exception as error:  # tokenizers raises a plain Exception for a full disk
        if not (isinstance(error, OSError) or disk_is_full(folder.parent, error)):
            raise
        if _is_complete(folder):
            return
        reason = f"the sample model cannot be written to {folder} ({error}): set ZEROTUNE_CACHE elsewhere"
        if folder.exists():
            problem = f"the sample model needs a new or empty folder, but {folder} holds something else"
            reason = f"{problem}: delete it or name another"
        raise Refused(reason) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in MODEL_FILES)


def _train_tokenizer(lines: list[str]):
    """Train a byte-level BPE tokenizer, to which no text is unknown; it puts one `<s>` in front."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=list(special.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=MAX_LENGTH, **special)


def _random_llama(tokenizer, seed: int):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
