"""A run's memory by use, and whether it fits. Pure arithmetic over counts."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from zerotune.settings.deepspeed import BUCKET_SIZE
from zerotune.settings.groups import ModelSettings

GIB = 2**30
NF4_BYTES = 0.516  # half a byte and the double-quantised scales (Dettmers et al. 2023, section 3)
MOMENTS_8BIT = 0.254  # share of float32 moments: a byte each, and a float32 scale for 256 of them (bitsandbytes)
CONTEXT_BYTES = 0.5 * GIB  # assumed for CUDA's context, with torch's kernels and cuBLAS's workspace
LIVE_WEIGHTS = 1e9  # that ZeRO-3 keeps gathered, by DeepSpeed's default
USABLE = 0.95  # share of a device's memory that the allocator can use
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that one device needs at the peak of a step, by their use."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    deepspeed_buckets: float = 0.0
    cuda_context: float = 0.0

    @property
    def total(self) -> float:
        """All of it, in bytes."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Sharding:
    """How a step's memory is divided among devices.

    Attributes:
        stage: ZeRO's, 0 without DeepSpeed.
        devices: number of them.
        zero: the DeepSpeed file's section zero_optimization.
        whole_gradients: whether gradients are kept whole on each device until the step's last micro-batch.
    """

    stage: int = 0
    devices: int = 1
    zero: Mapping = field(default_factory=dict)
    whole_gradients: bool = False

    def key(self, name: str, default: float) -> float:
        """Return a number of the DeepSpeed file, else the default."""
        value = self.zero.get(name, default)
        return default if value == "auto" else value

    @property
    def on_host(self) -> frozenset[str]:
        """Which of "optimizer" and "param" are kept in host memory."""
        parts, zero = ("optimizer", "param"), self.zero
        return frozenset(part for part in parts if (zero.get(f"offload_{part}") or {}).get("device", "none") != "none")


def memory_need(
    peaks: Mapping[str, Mapping[str, float]],
    table: dict,
    largest_layer: int,
    model: ModelSettings,
    optimizer: str,
    sharding: Sharding,
    on_gpu: bool,
) -> MemoryNeed:
    """Return the memory of one device at the peak of a step.

    Args:
        peaks: bytes by kind in each phase of the step, without DeepSpeed and with an unquantised base.
        table: from `parameter_table`.
        largest_layer: weights of the largest matrix of a layer.
        optimizer: "adamw" or "adamw8bit".
    """
    if sharding.stage == 0 and sharding.devices > 1:
        # DistributedDataParallel keeps its buckets from step to step. Gradients of micro-batches that are not exchanged
        # are held beside them; in the update, gradients are views of the buckets
        kept = max(kinds["gradients"] for kinds in peaks.values())
        earlier = peaks.get("forward", {}).get("gradients", 0.0)
        held = {phase: kept + (0.0 if phase == "update" else earlier) for phase in peaks}
        peaks = {phase: {**kinds, "gradients": held[phase]} for phase, kinds in peaks.items()}
    needs = [_phase_need(kinds, table, largest_layer, model, optimizer, sharding) for kinds in peaks.values()]
    context = CONTEXT_BYTES if on_gpu else 0.0
    return replace(max(needs, key=lambda need: need.total), cuda_context=context)


def _phase_need(kinds, table, largest_layer, model: ModelSettings, optimizer: str, sharding: Sharding) -> MemoryNeed:
    need, stage, share = MemoryNeed(**kinds), sharding.stage, 1 / sharding.devices
    narrow = 4 if model.precision == "fp32" else 2
    projections = _projections(table)
    if model.method == "qlora":  # a matrix is unpacked while it multiplies
        need = replace(
            need,
            parameters=need.parameters - projections * (narrow - NF4_BYTES),
            temporary=need.temporary + largest_layer * narrow,
        )
    if optimizer == "adamw8bit":
        need = replace(need, optimizer=need.optimizer * MOMENTS_8BIT)
    if stage >= 1:  # DeepSpeed updates a float32 copy of its share
        copies = 4 * table["trainable"] if stage < 3 else 0
        need = replace(need, optimizer=(need.optimizer + copies) * share)
    if stage >= 2 and not sharding.whole_gradients:
        need = replace(need, gradients=need.gradients * share)
    if stage == 3:
        # weights are float32, and gathered in 16 bits instead of the copies that autocast keeps without DeepSpeed
        copies = projections * narrow if model.method == "full" and narrow == 2 else 0
        frozen = table["total"] - table["trainable"]
        need = replace(need, parameters=need.parameters + frozen * (4 - narrow))
        gathered = min(table["total"], sharding.key("stage3_max_live_parameters", LIVE_WEIGHTS)) * narrow
        need = replace(
            need,
            parameters=need.parameters * share,
            activations=max(0.0, need.activations - copies),
            temporary=need.temporary + gathered,
        )
    if "optimizer" in sharding.on_host:
        need = replace(need, optimizer=0.0)
    if "param" in sharding.on_host:
        need = replace(need, parameters=0.0)
    return replace(need, deepspeed_buckets=_bucket_bytes(sharding, narrow))


def _bucket_bytes(sharding: Sharding, narrow: int) -> float:
    """Return the bytes of the buckets in which DeepSpeed collects gradients: one for each type that it exchanges.

    Below stage 3 they are float32, and doubled if communication overlaps (DeepSpeed 0.19, setup_buckets).
    """
    if not sharding.stage or not sharding.key("contiguous_gradients", True):
        return 0.0
    types = {4, narrow}
    size = sharding.key("reduce_bucket_size", BUCKET_SIZE)
    if sharding.stage == 3:
        return size * sum(types)
    return size * 4 * len(types) * (2 if sharding.key("overlap_comm", False) else 1)


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


def weight_bytes(table: dict, model: ModelSettings) -> float:
    """Return the bytes of a model's weights, which in NF4 packs its linear layers.

    Args:
        table: of `zerotune.models.parameters.published_table`.
    """
    narrow = _narrow_bytes(model)
    packed = _projections(table) if model.method == "qlora" else 0
    return table["total"] * narrow - packed * (narrow - NF4_BYTES)


def _projections(table: dict) -> int:
    return table["groups"]["attention"] + table["groups"]["mlp"]


def scoring_memory(
    config, model: ModelSettings, table: dict, num_shared: int, batches: list[tuple[int, int]]
) -> ScoringMemory:
    """Estimate the memory of one device that scores prompts with a shared prefix, one layer after the other.

    All rows attend to one copy of the prefix's keys and values.

    Args:
        table: as for `weight_bytes`.
        num_shared: tokens of the prefix.
        batches: (rows, longest row without the prefix) of each batch.
    """
    largest = max((_pass_bytes(config, model, rows, longest, longest) for rows, longest in batches), default=0.0)
    kept = config.num_hidden_layers * num_shared * _keys_and_values_bytes(config, model)
    return ScoringMemory(weight_bytes(table, model), kept, largest)


def _pass_bytes(config, model: ModelSettings, rows: int, longest: int, seen: int) -> float:
    """Estimate the bytes of a layer's pass over a batch of rows, each of which attends to `seen` tokens."""
    narrow, width = _narrow_bytes(model), _head_width(config)
    heads, hidden = config.num_attention_heads, config.hidden_size
    # input, output, queries, the MLP's two; keys and values of each row, and the same repeated for each query head
    tokens = rows * longest * (3 * hidden + heads * width + 2 * _mlp_width(config)) * narrow
    attended = rows * seen * (_keys_and_values_bytes(config, model) + 2 * heads * width * narrow)
    # eager attention, which capped scores need, keeps the scores and their float32 softmax
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return tokens + attended + (rows * heads * longest * seen * (narrow + 4) if capped else 0)


def writing_memory(
    config, model: ModelSettings, table: dict, num_shared: int, batches: list[tuple[int, int, int]]
) -> ScoringMemory:
    """Estimate the memory of one device that writes answers, and keeps a batch's keys and values in all layers.

    Args:
        table: as for `weight_bytes`.
        batches: (rows, longest row without the prefix, most tokens that are written in a row) of each batch.
    """
    one_pass = scoring_memory(config, model, table, num_shared, [])
    largest = max(_pass_bytes(config, model, rows, length, num_shared + length) for rows, length, _ in batches)
    most_kept = max(rows * (num_shared + length + written) for rows, length, written in batches)
    kept = config.num_hidden_layers * most_kept * _keys_and_values_bytes(config, model)
    return replace(one_pass, largest_batch=largest + kept)


def _narrow_bytes(model: ModelSettings) -> int:
    return 4 if model.precision == "fp32" else 2


def _mlp_width(config) -> int:
    """Return the width of the MLP; with experts, that of all experts that a token passes through."""
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
    used = [(part.name.replace("_", " "), getattr(need, part.name) / unit) for part in fields(need)]
    parts = ", ".join(f"{name} {size:.2f}" for name, size in used if size or name in ("weights", "shared prefix"))
    parts = parts.replace("deepspeed", "DeepSpeed's").replace("cuda", "CUDA")
    return f"memory per device: about {need.total / unit:.2f} {name} ({parts})"


def fits(need: MemoryNeed, device_bytes: float) -> bool:
    """Return whether a device is large enough."""
    return need.total <= USABLE * device_bytes


def why_not_fit(need: MemoryNeed, device_bytes: float, model: ModelSettings, may_shard: bool) -> str | None:
    """Return a line with the ways out that the settings leave if a device is too small; None if the run fits.

    Args:
        may_shard: whether the run may use DeepSpeed.
    """
    if fits(need, device_bytes):
        return None
    ways = {"full": ["--method lora or qlora"], "lora": ["--method qlora"], "qlora": []}[model.method]
    if not model.activation_checkpointing:
        ways.append("--activation-checkpointing")
    ways.append("a smaller --tokens-per-device")
    if may_shard and model.method != "qlora":  # ZeRO-3 cannot split it
        zero = "" if model.zero_stage == 3 else " with --deepspeed ds_configs/zero3.json"
        ways.append(f"more devices{zero}")
    return (
        f"will not fit: needs about {need.total / GIB:.1f} GiB and a device has {device_bytes / GIB:.1f} GiB: "
        f"use {' or '.join(filter(None, [', '.join(ways[:-1]), ways[-1]]))}"
    )
