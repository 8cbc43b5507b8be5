"""Estimates of a run's memory before a weight is loaded. Pure arithmetic over counts."""

from dataclasses import dataclass, fields, replace

from zerotune.settings.groups import ModelSettings, OptimisationSettings

GIB = 2**30
# Bytes that a layer keeps of a token for its backward pass. An encoder's, a unit of hidden size, in 16 bits and without
# attention scores, which sdpa and flash kernels do not keep: Korthikanti et al. 2022, arXiv:2205.05198, equation 2.
ENCODER_BYTES = 34
# A causal model's, counted in PyTorch's saved tensors (Llama-3.2-1B, Mistral-7B, Qwen2-0.5B, Gemma-2B, Gemma-2-2B: to
# 2 % in 16 bits, 5 % in 32): a unit of hidden size by the layer's norms, which are float32, and whether they train; the
# gated MLP's four tensors; a token that a head attends to where eager attention keeps the scores.
HIDDEN_BYTES = {(2, False): 25, (2, True): 31, (4, False): 33, (4, True): 49}
NUM_MLP_TENSORS = 4
SCORE_BYTES = 8
ADAM_BYTES = {"adamw": 8, "adamw8bit": 2}
NF4_BYTES = 0.516  # half a byte and the double-quantised scales (Dettmers et al. 2023, section 3)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one device needs, by their use."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.optimizer + self.activations


def offloaded(deepspeed: dict | None) -> frozenset[str]:
    """Return which of "optimizer" and "param" a DeepSpeed configuration keeps in host memory."""
    zero = (deepspeed or {}).get("zero_optimization", {})
    parts = ("optimizer", "param")
    return frozenset(part for part in parts if (zero.get(f"offload_{part}") or {}).get("device", "none") != "none")


def memory_need(
    num_weights: int,
    num_trainable: int,
    config,
    model: ModelSettings,
    optimisation: OptimisationSettings,
    world: tuple[int, frozenset[str]],
    scored_tokens: int = 0,
) -> MemoryNeed:
    """Estimate the memory of one device at the largest micro-batch that --tokens-per-device allows.

    Args:
        num_weights: logical weights of the model with its head and adapters.
        world: number of devices, and what `offloaded` says.
        scored_tokens: the longest row, where eager attention keeps its scores; else 0.
    """
    world_size, kept_on_host = world
    stage = model.zero_stage or 0
    narrow = 4 if model.precision == "fp32" else 2
    num_frozen = num_weights - num_trainable
    frozen_bytes = {"full": 0, "lora": 4 if stage == 3 else narrow, "qlora": NF4_BYTES}[model.method]
    # autocast keeps a 16-bit copy of each float32 matrix for the length of a pass
    trained_bytes = 4 + (narrow if model.method == "full" and narrow == 2 else 0)
    weights = (num_frozen * frozen_bytes + num_trainable * trained_bytes) / (world_size if stage == 3 else 1)
    gradients = 4 * num_trainable / (world_size if stage >= 2 else 1)
    copies = 4 if stage in (1, 2) else 0  # DeepSpeed steps on a float32 copy of its share
    optimizer = (ADAM_BYTES[optimisation.optimizer] + copies) * num_trainable / (world_size if stage >= 1 else 1)
    optimizer = 0 if "optimizer" in kept_on_host else optimizer
    weights = 0 if "param" in kept_on_host else weights
    kept = _layer_bytes(config, model.method == "full", narrow, scored_tokens)
    if model.activation_checkpointing:  # one layer's, and the inputs of all; float32 from an embedding that is
        kept += config.num_hidden_layers * config.hidden_size * (4 if model.method == "full" else narrow)
    else:
        kept *= config.num_hidden_layers
    return MemoryNeed(weights, gradients, optimizer, kept * optimisation.tokens_per_device)


def _layer_bytes(config, trains_all: bool, narrow: int, scored_tokens: int) -> float:
    """Return the bytes that one layer keeps of a token for its backward pass."""
    hidden = config.hidden_size
    scores = config.num_attention_heads * scored_tokens * SCORE_BYTES
    if getattr(config, "num_key_value_heads", None) is None:
        return ENCODER_BYTES * hidden * narrow / 2 + scores
    num_norms = 4 if config.model_type.startswith(("gemma2", "gemma3")) else 2
    return HIDDEN_BYTES[num_norms, trains_all] * hidden + NUM_MLP_TENSORS * _mlp_width(config) * narrow + scores


def logit_bytes(config, model: ModelSettings, tokens_per_device: int, answers_per_token: float) -> float:
    """Return the bytes that a generator's LM head adds to the activations of its largest micro-batch.

    Of each answer's token float32 logits, their log-softmax and their gradient; and of a frozen head in 16 bits its
    float32 copy.

    Args:
        tokens_per_device: of one micro-batch.
        answers_per_token: largest share of an example's tokens at which logits are computed.
    """
    is_copied = model.method != "full" and model.precision != "fp32"
    copy = 4 * config.hidden_size * config.vocab_size if is_copied else 0
    return 3 * 4 * config.vocab_size * answers_per_token * tokens_per_device + copy


@dataclass(frozen=True)
class ScoringMemory:
    """Bytes that one device needs to score prompts, by their use."""

    weights: float
    shared_prefix: float
    largest_batch: float

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return self.weights + self.shared_prefix + self.largest_batch


def scoring_memory(
    config, model: ModelSettings, num_weights: int, num_shared: int, batches: list[tuple[int, int]]
) -> ScoringMemory:
    """Estimate the memory of one device that scores prompts with a shared prefix, one layer after the other.

    Args:
        num_shared: tokens of the prefix.
        batches: (rows, longest row without the prefix) of each batch.
    """
    narrow, width = _narrow_bytes(model), _head_width(config)
    heads, hidden = config.num_attention_heads, config.hidden_size
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    keys_and_values = _keys_and_values_bytes(config, model)
    largest = 0.0
    for rows, longest in batches:
        seen = num_shared + longest
        # input, output, queries, the MLP's two; keys and values of each row, and the same repeated for each query head
        tokens = rows * longest * (3 * hidden + heads * width + 2 * _mlp_width(config)) * narrow
        attended = rows * seen * (keys_and_values + 2 * heads * width * narrow)
        # eager attention, which capped scores need, keeps them and their softmax, which is float32
        scores = rows * heads * longest * seen * (narrow + 4) if capped else 0
        largest = max(largest, tokens + attended + scores)
    weights = num_weights * (NF4_BYTES if model.method == "qlora" else narrow)
    return ScoringMemory(weights, config.num_hidden_layers * num_shared * keys_and_values, largest)


def writing_memory(
    config, model: ModelSettings, num_weights: int, num_shared: int, batches: list[tuple[int, int, int]]
) -> ScoringMemory:
    """Return scoring_memory of a device that writes answers: it keeps keys and values of a batch in all layers.

    Args:
        batches: (rows, longest row without the prefix, tokens that are written in a row at most) of each batch.
    """
    one_pass = scoring_memory(config, model, num_weights, num_shared, [(rows, length) for rows, length, _ in batches])
    most_kept = max(rows * (num_shared + length + written) for rows, length, written in batches)
    kept = config.num_hidden_layers * most_kept * _keys_and_values_bytes(config, model)
    return replace(one_pass, largest_batch=one_pass.largest_batch + kept)


def _narrow_bytes(model: ModelSettings) -> int:
    return 4 if model.precision == "fp32" else 2


def _mlp_width(config) -> int:
    """Return the width of the MLP, with experts that of all those that a token goes through."""
    return config.intermediate_size * (getattr(config, "num_experts_per_tok", None) or 1)


def _head_width(config) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _keys_and_values_bytes(config, model: ModelSettings) -> int:
    """Return the bytes of one token's keys and values in one layer."""
    return 2 * config.num_key_value_heads * _head_width(config) * _narrow_bytes(model)


def describe_bytes(num_bytes: float) -> str:
    """Return a size in GiB, or in MiB where it is smaller than one."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.2f} MiB"


def describe_memory(need: MemoryNeed | ScoringMemory) -> str:
    """Return the estimate as one line."""
    unit, name = (GIB, "GiB") if need.total >= GIB else (2**20, "MiB")
    parts = ", ".join(f"{part.name.replace('_', ' ')} {getattr(need, part.name) / unit:.2f}" for part in fields(need))
    return f"memory a device: about {need.total / unit:.2f} {name} ({parts})"


def why_not_fit(need: MemoryNeed, device_bytes: int, method: str) -> str | None:
    """Return a line with the ways out when a device is too small; None when it fits."""
    if need.total <= device_bytes:
        return None
    smaller = {
        "full": "--method lora or qlora, ",
        "lora": "--method qlora, ",
        "qlora": "",
    }[method]
    return (
        f"will not fit: needs about {need.total / GIB:.1f} GiB and a device has {device_bytes / GIB:.1f} GiB: "
        f"use {smaller}--activation-checkpointing, a smaller --tokens-per-device, or more devices with "
        "--deepspeed ds_configs/zero3.json"
    )
