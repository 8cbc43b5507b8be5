"""Memory and arithmetic of one training step, counted by PyTorch on fake tensors before a weight is loaded.

The step (forward, backward, update) is counted for a few layers, and again with one more layer of each kind. The
difference is added for each remaining layer, so a model of any depth is counted in the time of a shallow one.
"""

import copy
import math
import re
import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.nn import functional
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from zerotune.models.attention import attention_kernel
from zerotune.models.boundary import quiet_transformers
from zerotune.models.classifier import SequenceClassifier
from zerotune.models.fake import chosen_attention, fake_gpu, fake_tensors, make_fake
from zerotune.models.families import classifier_class, projections, span_class
from zerotune.models.generator import TextGenerator
from zerotune.models.heads import TunedModel, float32_linear, make_head_float32
from zerotune.models.loading import base_dtype, make_trainable, set_dropout, use_cpu_kernels
from zerotune.models.packed import pack, packs_rows, use_packed_attention
from zerotune.models.parameters import parameter_groups, parameter_table
from zerotune.models.precision import autocast
from zerotune.models.span_head import SpanModel
from zerotune.models.used_rows import train_used_rows
from zerotune.settings.groups import ModelSettings
from zerotune.training.engine import build_optimizer

# MemTracker's kinds -> this module's. The forward pass keeps activations; the backward pass creates temporary tensors.
_KINDS = {
    "Parameter": "parameters",
    "Buffer": "parameters",
    "Gradient": "gradients",
    "Optstate": "optimizer",
    "Activation": "activations",
    "Other": "activations",
    "Temp": "temporary",
}


@dataclass(frozen=True)
class BatchShape:
    """The shape of one device's largest micro-batch.

    Attributes:
        rows: examples, or windows.
        longest: tokens of the longest one.
        tokens: real tokens of all, without padding.
        answers: tokens of all answers, at which a generator computes logits; 0 for other heads.
        branches: whether rows have branches that must not see each other.
        is_alone: whether a step has no other micro-batch, so that no earlier gradients are held during it.
    """

    rows: int
    longest: int
    tokens: int
    answers: int = 0
    branches: bool = False
    is_alone: bool = False

    def cut_to(self, budget: int) -> "BatchShape":
        """Return a part of it with at most `budget` tokens, padding included, but at least one row."""
        rows = max(1, min(self.rows, budget // self.longest))
        share = rows / self.rows
        tokens, answers = math.ceil(self.tokens * share), math.ceil(self.answers * share)
        return replace(self, rows=rows, tokens=tokens, answers=answers, is_alone=self.is_alone and rows == self.rows)

    @classmethod
    def of(cls, inputs: dict, is_alone: bool) -> "BatchShape":
        """Return the shape of a batch's inputs, padded or packed."""
        answers, branches = len(inputs.get("columns", ())), "branches" in inputs
        rows, longest = inputs["input_ids"].shape
        tokens = rows * longest
        if "bounds" in inputs:
            rows, longest = len(inputs["bounds"]) - 1, inputs["longest"]
        elif "attention_mask" in inputs:
            tokens = int(inputs["attention_mask"].sum())
        return cls(rows, longest, tokens, answers, branches, is_alone)


@dataclass(frozen=True)
class StepCounts:
    """The needs of one device for a step without DeepSpeed.

    Attributes:
        table: from `parameter_table`, for the model as the run trains it.
        peaks: bytes by kind at the peak of each phase of the step.
        flops: floating-point operations of the micro-batch, forward and backward; 0 if PyTorch cannot count one of the
            model's operations (Qwen3.5's states, Mixtral's experts in full tuning); `peaks` then lack activations.
        largest_layer: number of weights in the largest matrix of a layer.
    """

    table: dict
    peaks: dict[str, dict[str, float]]
    flops: float
    largest_layer: int


class Kernels(NamedTuple):
    """How attention is computed: transformers' kernel name, whether rows are packed, whether it runs on CUDA."""

    attention: str
    packs: bool
    on_gpu: bool


def count_step(
    config,
    settings: ModelSettings,
    head: str,
    num_labels: int,
    batch: BatchShape,
    on_gpu: bool,
    used_ids: np.ndarray | None = None,
) -> StepCounts:
    """Count a step of a model with its head and adapters, without DeepSpeed.

    QLoRA's base is counted unquantised, like LoRA's: zerotune/run/plan.py accounts for its 4 bits and for sharding.

    Args:
        config: of the checkpoint.
        head: "classify", "span" or "generate".
        num_labels: of a classifier.
        used_ids: token ids whose embedding rows are trained; None: all rows are.
    """
    settings = replace(settings, method="full" if settings.method == "full" else "lora", zero_stage=None)
    if on_gpu:
        kernels = Kernels(*chosen_attention(settings, config), on_gpu)
    else:
        kernels = Kernels(
            attention_kernel(settings.attention, config), packs_rows(settings, config, trains=True), on_gpu
        )
    kind = {"settings": settings, "head": head, "num_labels": num_labels, "used_ids": used_ids}
    count = partial(_count_layers, batch=batch, kernels=kernels, **kind)
    base, more = _shallow_configs(config)
    counted = count(base)
    total = counted
    for times, deeper in more:
        total = tree_map(
            lambda sum_, first, second, n=times: sum_ + n * (second - first), total, counted, count(deeper)
        )
    return StepCounts(**total)


def _shallow_configs(config) -> tuple[object, list[tuple[int, object]]]:
    """Return a config of few layers, and deeper ones with the number of times to add their difference to it."""
    kinds = getattr(config, "layer_types", None) or ["layer"] * config.num_hidden_layers
    distinct = list(dict.fromkeys(kinds))
    base = distinct if len(distinct) > 1 else distinct * 2
    if len(kinds) <= len(base) + 1:
        return config, []
    left = [(kinds.count(kind) - base.count(kind), [*base, kind]) for kind in distinct]
    return _with_layers(config, base), [(times, _with_layers(config, layers)) for times, layers in left if times]


def _with_layers(config, kinds: list[str]):
    """Return a copy of a config with layers of these kinds; other lists per layer are cut to the same length."""
    changed, depth = copy.deepcopy(config), config.num_hidden_layers
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and hasattr(changed, name):
            setattr(changed, name, kinds if name == "layer_types" else value[: len(kinds)])
    changed.num_hidden_layers = len(kinds)
    return changed


def _count_layers(config, settings, head, num_labels, used_ids, batch: BatchShape, kernels: Kernels) -> dict:
    """Count a step of the model that a config describes, with all its layers."""
    with quiet_transformers(), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = _model_on_meta(config, settings, head, num_labels, kernels.attention)
    sizes = [layer.weight.numel() for layer in projections(model).values()]
    inputs, targets = _model_inputs(batch, head, kernels.packs)
    with fake_gpu() if kernels.on_gpu else fake_tensors():
        make_fake(model)
        if kernels.packs:
            use_packed_attention(model)
        table = parameter_table(model)
        tuned = _tuned(model, head, settings)
        if used_ids is not None:
            train_used_rows(tuned.stock_model, used_ids)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # MemTracker's, about modules that another module's forward calls
            try:
                peaks, flops = _take_step(tuned.train(), settings.precision, inputs, targets, batch.is_alone)
            except RuntimeError:  # fake tensors lack an operation, or the values that it reads
                peaks, flops = _held_alone(tuned), 0
    return {"table": table, "peaks": peaks, "flops": flops, "largest_layer": max(sizes, default=0)}


def _held_alone(tuned: TunedModel) -> dict[str, dict[str, float]]:
    """Return the bytes that a device holds during an update: weights, float32 gradients and two moments."""
    held = {id(each): each.numel() * each.element_size() for each in (*tuned.parameters(), *tuned.buffers())}
    trained = sum(each.numel() for each in tuned.parameters() if each.requires_grad)
    kinds = dict.fromkeys(_KINDS.values(), 0.0) | {"parameters": sum(held.values())}
    return {"update": kinds | {"gradients": 4.0 * trained, "optimizer": 8.0 * trained}}


def _model_on_meta(config, settings: ModelSettings, head: str, num_labels: int, kernel: str) -> nn.Module:
    config = set_dropout(copy.deepcopy(config), settings)
    config.use_cache = False
    if config.pad_token_id is None:
        config.pad_token_id = 0
    if head == "generate":
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    else:
        config.num_labels = num_labels if head == "classify" else 2
        model_class = classifier_class(config) if head == "classify" else span_class(config)
    model = model_class._from_config(config, dtype=base_dtype(settings), attn_implementation=kernel)
    if head == "generate":
        model.set_output_embeddings(float32_linear(model.get_output_embeddings(), cast_weights=False))
    else:
        make_head_float32(model)
        use_cpu_kernels(model, settings)
    return make_trainable(model, settings)


def _tuned(model: nn.Module, head: str, settings: ModelSettings) -> TunedModel:
    if head == "classify":
        return SequenceClassifier(model, settings.drop_unpooled)
    return SpanModel(model) if head == "span" else TextGenerator(model)


def _model_inputs(batch: BatchShape, head: str, packs: bool) -> tuple[dict, torch.Tensor | None]:
    """Return the arguments of a model's forward for a micro-batch of this shape, and a generator's targets."""
    lengths = np.full(batch.rows, (batch.tokens - batch.longest) // max(1, batch.rows - 1))
    lengths[0] = batch.longest
    mask = (np.arange(batch.longest) < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": np.zeros_like(mask), "attention_mask": mask}
    targets = None
    if packs:
        inputs = pack(inputs)
    if head == "generate":
        owners = np.arange(batch.answers) % batch.rows
        chosen = {"rows": owners, "columns": np.zeros_like(owners)}
        targets = torch.zeros(batch.answers, dtype=torch.int64)
        if packs:
            names = {"input_ids": "input_ids", "bounds": "bounds", "longest": "longest", "position_ids": "positions"}
            inputs = {name: inputs[key] for key, name in names.items()} | chosen | {"rows": np.zeros_like(owners)}
        else:
            inputs = {"input_ids": inputs["input_ids"]} | chosen
            if batch.branches:
                inputs |= {name: np.zeros_like(mask) for name in ("positions", "branches")}
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items() if isinstance(value, np.ndarray)}
    return inputs | tensors, targets


class _PhaseTracker(MemTracker):
    """Tracks the peak memory of each phase by kind, and counts floating-point operations."""

    def __init__(self):
        super().__init__()
        self.phase, self.flops, self.workspace = "forward", 0, 0
        self.peaks: dict[str, dict[str, int]] = {}

    def _update_peak_stats(self, peak_state) -> None:
        for snapshot in self._curr_mem_snap.values():
            total = snapshot["Total"] + self.workspace
            if total > self.peaks.get(self.phase, {}).get("Total", 0):
                temporary = snapshot[_MemRefType.TEMP] + self.workspace
                self.peaks[self.phase] = {**snapshot, _MemRefType.TEMP: temporary, "Total": total}

    def _track_module_params_and_buffers(self, module: nn.Module, install_grad_hooks: bool = True) -> tuple[int, int]:
        # MemTracker would also put its hooks on frozen parameters, which torch refuses
        return super()._track_module_params_and_buffers(module, install_grad_hooks=False)

    def note_gradient(self, parameter: nn.Parameter) -> None:
        """Count a parameter's new gradient as gradient memory."""
        self._update_and_maybe_create_winfos(parameter.grad, _MemRefType.GRAD)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.workspace = _workspace(operation, args)
        result = super().__torch_dispatch__(operation, types, args, kwargs)
        self.workspace = 0
        # without the scores of packed rows: their formula reads the rows' bounds, and fake tensors have no values
        if operation._overloadpacket in flop_registry and "varlen" not in operation._schema.name:
            self.flops += flop_registry[operation._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result

    def by_kind(self) -> dict[str, dict[str, float]]:
        """Return the bytes of each kind at the peak of each phase."""
        peaks = {}
        for phase, snapshot in self.peaks.items():
            kinds = dict.fromkeys(_KINDS.values(), 0.0)
            for kind, num_bytes in snapshot.items():
                if kind != "Total":
                    kinds[_KINDS[kind.value]] += num_bytes
            peaks[phase] = kinds
        return peaks


def _workspace(operation, args: tuple) -> int:
    """Return the bytes that a kernel allocates for itself, which its fake does not.

    The backward pass of flash attention (`mha_varlen_bwd` in PyTorch's flash_api.cpp) sums the queries' gradients in
    float32, with room for 128 more tokens an example, and where heads share keys, gradients for each head.
    """
    if "varlen_attn_backward" not in operation._schema.name:
        return 0
    _, query, key, *_ = args
    (tokens, heads, size), num_examples = query.shape, args[6].shape[0] - 1
    shared = 2 * query.element_size() * tokens * heads * size if key.shape[1] < heads else 0
    return 4 * (tokens + 128 * num_examples) * heads * size + shared


def _take_step(
    tuned: TunedModel, precision: str, inputs: dict, targets: torch.Tensor | None, is_alone: bool
) -> tuple[dict[str, dict[str, float]], int]:
    """Take a step with an optimizer that already has its moments. Returns the peaks by phase, and operations."""
    optimizer = build_optimizer("adamw", parameter_groups(tuned, 1e-5, 1e-5, 0.01), "cpu")
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    if is_alone:
        optimizer.zero_grad(set_to_none=True)
    tracker = _PhaseTracker()
    tracker.track_external(tuned, optimizer)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(tracker.note_gradient)
    _mark_phases(tuned.stock_model, tracker)
    with tracker:
        with autocast("cpu", precision):
            logits = tuned(**inputs).float()
        loss = _loss(logits, targets)
        tracker.phase = "backward through the head"
        loss.backward()
        tracker.phase = "update"
        del logits, loss
        norm = torch.nn.utils.get_total_norm([each.grad for each in trained if each.grad is not None])
        optimizer.grad_scale = norm.clamp(min=1.0).float()
        optimizer.step()
    return tracker.by_kind(), tracker.flops


def _loss(logits: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
    if targets is None:  # for a span head, start and end over the tokens of each row
        classes = logits if logits.ndim == 2 else logits.transpose(1, 2).flatten(0, 1)
        logits, targets = classes, torch.zeros(len(classes), dtype=torch.int64)
    return functional.cross_entropy(logits, targets, reduction="none").sum()


def _mark_phases(stock: nn.Module, tracker: _PhaseTracker) -> None:
    """Let the tracker know when the backward pass is done with the head, and with the layers.

    Within a phase, memory rises or falls layer by layer, so each further layer raises its peak by the same amount.
    """
    layers = _layers(stock)
    if not layers:
        return

    def mark(hidden: torch.Tensor, phase: str) -> None:
        def enter(gradient: torch.Tensor) -> None:
            tracker.phase = phase

        if hidden.requires_grad:
            hidden.register_hook(enter)

    def after_last(_, __, output) -> None:
        if tracker.phase == "forward":
            mark(output[0] if isinstance(output, tuple) else output, "backward through the layers")

    def before_first(_, inputs) -> None:
        if tracker.phase == "forward" and inputs:
            mark(inputs[0], "backward through the embedding")

    layers[-1].register_forward_hook(after_last)
    layers[0].register_forward_pre_hook(before_first)


def _layers(stock: nn.Module) -> list[nn.Module]:
    """Return the repeated layers of a model in their order; [] if they share their weights (ALBERT)."""
    found = {match[0]: None for path in projections(stock) if (match := re.match(r".*?\.\d+(?=\.)", path))}
    return [stock.get_submodule(path) for path in found] if len(found) > 1 else []
