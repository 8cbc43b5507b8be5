"""Models of real shapes with random weights, made on the device, and rows as long as a task's; nothing to download."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from zerotune.models.attention import attention_kernel
from zerotune.models.heads import float32_linear, is_head_parameter, make_head_float32
from zerotune.models.loading import base_dtype, keep_nf4_layout, make_trainable, set_dropout, use_cpu_kernels
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.tokens import Encoded
from zerotune.training.classification import LabelledData

LABELS = ("negative", "positive")

# Published shapes. Biases, norms and rotary settings are the classes' own defaults.
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
GEMMA_2B = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "sliding_window": 4096,
}
MISTRAL_7B = {
    "model_type": "mistral",
    "vocab_size": 32768,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "sliding_window": None,
}
DISTILBERT = {
    "model_type": "distilbert",
    "vocab_size": 30522,
    "dim": 768,
    "hidden_dim": 3072,
    "n_layers": 6,
    "n_heads": 12,
}
ROBERTA_LARGE = {
    "model_type": "roberta",
    "vocab_size": 50265,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
}

# For measuring on a CPU. The weights' spread is wide enough that different prompts get different answers.
SMALL_LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "initializer_range": 0.1,
}
TOY_CAUSAL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
TOY_ENCODERS = {
    "distilbert": {"vocab_size": 512, "dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4},
    "roberta": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
}


@dataclass(frozen=True)
class Shape:
    """A model to measure: `sizes` are its config's fields, `method` is full, lora or qlora."""

    name: str
    method: str
    sizes: dict

    def config(self, toy: bool, all_layers: bool = False) -> PretrainedConfig:
        """Return the config for two classes; a toy has the same architecture with a few thousand weights.

        Args:
            all_layers: give the toy as many layers as the shape has instead of two.
        """
        small = TOY_ENCODERS.get(self.sizes["model_type"], TOY_CAUSAL) if toy else {}
        if all_layers:
            small = {name: size for name, size in small.items() if name not in ("num_hidden_layers", "n_layers")}
        sizes = self.sizes | small
        return AutoConfig.for_model(**sizes, num_labels=len(LABELS), pad_token_id=0, use_cache=False)


SHAPES = (
    Shape("Llama-3.2-1B", "full", LLAMA_1B),
    Shape("Llama-3.2-1B", "lora", LLAMA_1B),
    Shape("Gemma-2-2B", "lora", GEMMA_2B),
    Shape("Mistral-7B", "lora", MISTRAL_7B),
    Shape("Mistral-7B", "qlora", MISTRAL_7B),
    Shape("RoBERTa-large", "full", ROBERTA_LARGE),
    Shape("DistilBERT", "full", DISTILBERT),
)


def settings_for(shape: Shape, precision: str, **changed) -> ModelSettings:
    """Return the settings with which a train script would load the model; `changed` overrides their fields."""
    return ModelSettings(name=shape.name, revision=None, method=shape.method, precision=precision, **changed)


def random_model(config: PretrainedConfig, settings: ModelSettings, device: torch.device) -> nn.Module:
    """Make a stock or peft model as zerotune.models.classifier.load_classifier would, but with random weights."""
    model = _random_stock(AutoModelForSequenceClassification, set_dropout(config, settings), settings, device)
    make_head_float32(model)
    use_cpu_kernels(model, settings)
    return make_trainable(model, settings).to(device)


def random_language_model(
    config: PretrainedConfig, settings: ModelSettings, device: torch.device, tuned: bool = True
) -> nn.Module:
    """Make a stock or peft model as zerotune.models.generator.load_generator would, but with random weights; if not
    `tuned`, as zerotune.models.generator.load_language_model would."""
    model = _random_stock(AutoModelForCausalLM, config, settings, device)
    model.set_output_embeddings(float32_linear(model.get_output_embeddings(), cast_weights=False))
    return make_trainable(model, settings).to(device) if tuned else model


def _random_stock(model_class, config: PretrainedConfig, settings: ModelSettings, device: torch.device) -> nn.Module:
    kernel = attention_kernel(settings.attention, config)
    with torch.device(device):
        model = model_class.from_config(config, dtype=base_dtype(settings), attn_implementation=kernel)
    if settings.method == "qlora":
        quantise_nf4(model, torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    return model


def quantise_nf4(model: nn.Module, compute_dtype: torch.dtype) -> None:
    """Quantise every linear layer except the head to bitsandbytes' 4 bits, in place, one layer at a time."""
    import bitsandbytes

    linears = [(path, layer) for path, layer in model.named_modules() if type(layer) is nn.Linear]
    for path, layer in linears:
        if is_head_parameter(f"{path}.weight", model.config):
            continue
        quantised = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=compute_dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight, bias = layer.weight.detach(), layer.bias
        layer.weight = None
        quantised.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=quantised
        ).to(weight.device)
        quantised.bias = bias
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, quantised)
    model.is_loaded_in_4bit = True  # peft asks for it
    keep_nf4_layout(model)


# Tokens of a row of SST-2's train split (67,349 rows, BERT's word pieces, special tokens included): the 0.5th, 1.5th …
# 99.5th percentile. Mean 13.3, longest 66. Measured 2026-11.
SST2_PERCENTILES = (
    [3] * 3 + [4] * 8 + [5] * 9 + [6] * 8 + [7] * 7 + [8] * 6 + [9] * 6 + [10] * 4 + [11] * 5 + [12] * 4 + [13] * 3
    + [14] * 3 + [15] * 3 + [16] * 3 + [17] * 2 + [18] * 3 + [19] * 2 + [20] * 2
    + [21, 22, 22, 23, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 34, 36, 39, 42, 48]
)  # fmt: skip
# Longer tasks follow a log-normal law: median, standard deviation of the logarithm, and the length that rows are cut
# to. Means: 168 for SQuAD (question and context), 289 for IMDB.
LENGTH_LAWS = {"squad": (155, 0.42, 384), "imdb": (265, 0.61, 512)}
# Distinct ids that training reads: counted in SST-2's rows; assumed to be three times as many for the longer tasks.
NUM_USED_IDS = {"sst2": 11_572, "squad": 34_716, "imdb": 34_716}


def random_lengths(task: str, num_rows: int, generator: np.random.Generator) -> np.ndarray:
    """Draw the lengths in tokens of random rows of a task, int64 [num_rows]."""
    if task == "sst2":
        return generator.choice(SST2_PERCENTILES, num_rows)
    median, deviation, longest = LENGTH_LAWS[task]
    return generator.lognormal(np.log(median), deviation, num_rows).astype(np.int64).clip(3, longest)


def longest_row(task: str) -> int:
    """Return the most tokens that a random row of a task can have."""
    return max(SST2_PERCENTILES) if task == "sst2" else LENGTH_LAWS[task][2]


def used_ids(task: str, vocabulary: int) -> np.ndarray:
    """Return the ids that random rows of a task can contain, and the padding's."""
    return np.arange(min(NUM_USED_IDS[task] + 1, vocabulary))


def random_ids(num_ids: int, task: str, vocabulary: int, generator: np.random.Generator) -> np.ndarray:
    """Draw token ids, int32 [num_ids]. Like words, they follow Zipf's law and leave most of a vocabulary unused."""
    frequencies = 1 / used_ids(task, vocabulary)[1:]
    return 1 + generator.choice(len(frequencies), num_ids, p=frequencies / frequencies.sum()).astype(np.int32)


def random_rows(num_rows: int, vocabulary: int, seed: int, task: str = "sst2") -> LabelledData:
    """Draw labelled rows as long as a task's."""
    generator = np.random.default_rng(seed)
    lengths = random_lengths(task, num_rows, generator)
    ids = random_ids(int(lengths.sum()), task, vocabulary, generator)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    labels = generator.integers(len(LABELS), size=num_rows)
    encoded = Encoded(ids, offsets, num_truncated=0, type_ids=None)
    return LabelledData([str(row) for row in range(num_rows)], encoded, labels, pad_id=0)
