"""A model with its optimizer, with the same interface for DDP and DeepSpeed: backward, clip, update, save, load."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import release_memory
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from zerotune.models import cpu_kernels
from zerotune.models.attention import attention_kernel
from zerotune.models.classifier import load_classifier
from zerotune.models.fused import use_fused_passes
from zerotune.models.generator import load_generator
from zerotune.models.heads import TunedModel
from zerotune.models.loading import read_onto
from zerotune.models.multi_label import PROBLEM_TYPE
from zerotune.models.packed import use_packed_attention
from zerotune.models.parameters import format_table, parameter_groups, parameter_table, published_table
from zerotune.models.precision import autocast
from zerotune.models.span_head import load_span_model
from zerotune.models.used_rows import train_used_rows
from zerotune.run.cpu import give_back_memory, use_own_cores
from zerotune.run.folder import RunFolder
from zerotune.run.launch import on_all_ranks
from zerotune.run.plan import Sharding
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings, TrainSettings
from zerotune.training.data import TrainingData
from zerotune.training.snapshot import StateFile, bytes_on_node
from zerotune.training.zero_state import BYTES_A_WEIGHT, KINDS, load_zero_state, zero_state_files

# Files of plain runs; zero_state.py names those of ZeRO runs.
WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.pt"


def build_optimizer(name: str, groups: list[dict], device_type: str) -> torch.optim.Optimizer:
    """Build AdamW over parameter groups that carry their own peak `lr` and `weight_decay` (Loshchilov & Hutter 2019).

    Args:
        name: "adamw" (one fused pass over float32 state) or "adamw8bit" (bitsandbytes, state in 8 bits).
    """
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups)
    return torch.optim.AdamW(groups, fused=device_type in ("cpu", "cuda"))


def tensors_in(parts) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested dicts, lists, tuples and sets."""
    if isinstance(parts, torch.Tensor):
        yield parts
    elif isinstance(parts, dict | list | tuple | set):
        for part in parts.values() if isinstance(parts, dict) else parts:
            yield from tensors_in(part)


def model_in_training(settings: TrainSettings, config) -> ModelSettings:
    """Return the settings that the model is trained with: --engine trainer has transformers' own forward pass."""
    if settings.engine == "loop":
        return settings.model
    kernel = attention_kernel(settings.model.attention, config)
    attention = "sdpa" if kernel in cpu_kernels.KERNELS else kernel  # "auto" would pack the rows on a GPU
    return replace(settings.model, attention=attention, drop_unpooled=False)


def used_ids(settings: TrainSettings, train: TrainingData) -> np.ndarray | None:
    """Return the token ids whose embedding rows are trained: those of the training split; None: all of them.

    All are trained under ZeRO-3, which shards the embedding, in a generator, where it may be tied to the LM head, and
    with --engine trainer.
    """
    if settings.head == "generate" or settings.engine != "loop" or settings.model.zero_stage == 3:
        return None
    return np.union1d(train.token_ids, [train.pad_id])


def load_engine(
    run: RunFolder,
    settings: TrainSettings,
    config,
    tokenizer,
    labels: tuple[str, ...],
    train: TrainingData,
    whole_gradients: bool = True,
) -> "Engine":
    """Load the model with its head, write its parameter counts to parameters.json, and build the optimizer.

    Args:
        labels: names of a classifier's labels.
        whole_gradients: the result of `check_fits`.
    """
    release_memory()  # layers of bitsandbytes and FSDP2 are in reference cycles: the base evaluation's model would stay
    zero = (settings.deepspeed or {}).get("zero_optimization", {})
    if "optimizer" in Sharding(zero=zero).on_host:  # AdamW runs there; a launcher leaves it one thread
        use_own_cores()
    device = run.accelerator.device
    model_settings = read_onto(model_in_training(settings, config), device)
    model = load_tuned_model(model_settings, settings.head, labels, tokenizer)
    if train.packs:
        use_packed_attention(model.stock_model)
    fuses = settings.engine == "loop"
    passes, problem = use_fused_passes(model.stock_model, model_settings, device) if fuses else ((), None)
    if problem:
        say(problem)
    if settings.data.multi_label:
        model.config.problem_type = PROBLEM_TYPE
    before, after = published_table(config), parameter_table(model)
    run.write_json("parameters.json", {"before": before, "after": after})
    say(format_table(before, after))
    if settings.model.method != "qlora":
        model = model.to(device)
    if (used := used_ids(settings, train)) is not None:
        train_used_rows(model.stock_model, used)
    optimisation = settings.optimisation
    groups = parameter_groups(
        model, optimisation.learning_rate, optimisation.head_learning_rate, optimisation.weight_decay
    )
    optimizer = build_optimizer(optimisation.optimizer, groups, device.type)
    max_grad_norm, data_parallel = optimisation.max_grad_norm, settings.engine == "loop"
    whole_gradients = all(on_all_ranks(run.accelerator, whole_gradients))
    is_each = not whole_gradients and (settings.model.zero_stage or 0) > 1
    run.update_json(
        "run.json",
        attention=model.config._attn_implementation,
        fused_passes=passes,
        gradients_exchanged="each micro-batch" if is_each else "once a step",
    )
    engine = Engine(
        run.accelerator, model, optimizer, settings.model.precision, max_grad_norm, data_parallel, whole_gradients
    )
    if optimisation.gradient_exchange == "bf16" and isinstance(engine.model, DistributedDataParallel):
        engine.model.register_comm_hook(None, exchange_in_bf16)
    return engine


def exchange_in_bf16(group, bucket):
    """Average a bucket of gradients in bf16. DDP refuses torch's own hook, by its name, without NCCL."""
    return bf16_compress_hook(group, bucket)


def load_tuned_model(model: ModelSettings, head: str, labels: tuple[str, ...], tokenizer) -> TunedModel:
    """Load a model with the head that --head names: "classify", "span" or "generate"."""
    if head == "classify":
        return load_classifier(model, labels, tokenizer)
    return (load_span_model if head == "span" else load_generator)(model, tokenizer)


def keep_until_reduced(zero) -> None:
    """Keep the memory of each gradient until the stream that reduces it has read it, under ZeRO-2.

    DeepSpeed 0.19 drops a matrix larger than a bucket (`reduce_bucket_size`) as soon as its reduction is queued. Where
    communication overlaps, that is on another stream, and the next gradient could overwrite the memory before it is
    read.
    """
    average = zero.average_tensor

    def average_kept(tensor: torch.Tensor, *more):
        if zero.overlap_comm:
            tensor.record_stream(zero.reduction_stream)
        return average(tensor, *more)

    zero.average_tensor = average_kept


class Engine:
    """A model with its optimizer, ready for steps made of any number of micro-batches.

    All ranks call every method together: gradients, norms and DeepSpeed's files are collective.

    Args:
        data_parallel: False if something else, such as the Trainer, exchanges gradients between the ranks.
        whole_gradients: whether ZeRO-2 and 3 keep whole gradients on each rank and exchange them once, with a step's
            last micro-batch; otherwise they exchange with every micro-batch. Must be the same on all ranks.
    """

    def __init__(
        self,
        accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str,
        max_grad_norm: float | None,
        data_parallel: bool = True,
        whole_gradients: bool = True,
    ):
        self.accelerator = accelerator
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.whole_gradients = whole_gradients
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_trainable = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.trainable)
        self.deepspeed = accelerator.deepspeed_plugin is not None
        prepared, wrapped = accelerator.prepare(model, optimizer) if data_parallel else (model, optimizer)
        self.model = prepared
        self.optimizer = wrapped if self.deepspeed else optimizer
        if self.deepspeed and accelerator.device.type == "cuda" and prepared.zero_optimization_stage() == 2:
            keep_until_reduced(prepared.optimizer)
        scaled = precision == "fp16" and not self.deepspeed
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if scaled else None
        self._loss = self._zero()
        self._norm: torch.Tensor | float | None = None

    def _zero(self) -> torch.Tensor:
        return torch.zeros((), device=self.accelerator.device)

    @property
    def module(self) -> nn.Module:
        """The model as it was given, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def forward(self, **inputs) -> torch.Tensor:
        """Return the model's output under the run's precision. DeepSpeed enters autocast itself."""
        if self.deepspeed:
            return self.model(**inputs)
        with autocast(self.accelerator.device.type, self.precision):
            return self.model(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate the gradient of one micro-batch; ranks exchange gradients with the last one.

        Args:
            loss: a share of the step's loss: a sum of losses divided by the global count. The shares of all
                micro-batches and ranks add up to the step's loss.
        """
        self.note_loss(loss)
        # DDP and DeepSpeed average gradients over ranks, but the loss is a sum over ranks
        if self.scaler:  # `update` turns the average into a sum: a loss multiplied here could overflow in fp16
            self.scaler.scale(loss).backward()
            return
        loss = loss * self.accelerator.num_processes
        if self.deepspeed:
            if self.whole_gradients and self.model.zero_optimization_stage() > 1:
                # as DeepSpeed's coalesce_grad_reduction, but exchanging during the last backward pass, not after it
                self.model.inside_no_sync_ctxt = self.model.optimizer._coalesce_grad_reduction = not is_last
            self.model.set_gradient_accumulation_boundary(is_last)
            self.model.backward(loss)
        else:
            loss.backward()

    def gradients_stay_local(self, is_last: bool):
        """Return the context for a micro-batch's forward and backward; only the last one exchanges gradients."""
        several = self.accelerator.num_processes > 1 and not self.deepspeed
        return self.model.no_sync() if several and not is_last else nullcontext()

    def update(self, rate_factor: float) -> None:
        """Clip gradients, update with the peak learning rates × `rate_factor`, and clear gradients."""
        self.set_rates(rate_factor)
        if self.deepspeed:
            self.model.step()
            self.note_norm(self.model.get_global_grad_norm())
            return
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
            torch._foreach_mul_(gradients, self.accelerator.num_processes)
        norm = torch.nn.utils.get_total_norm(gradients)
        self.note_norm(norm)
        self._clip(norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def set_rates(self, rate_factor: float) -> None:
        """Set each group's learning rate to its peak × `rate_factor`."""
        self.rate_factor = rate_factor
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * rate_factor

    def note_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of the step's mean loss."""
        self._loss += loss.detach()

    def note_norm(self, norm: torch.Tensor | float) -> None:
        """Note the step's gradient norm before clipping."""
        self._norm = norm

    def take_loss_and_norm(self) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Return and reset this rank's share of the step's mean loss, float32 [], and the norm before clipping."""
        assert self._norm is not None, "every step must end with engine.update"
        taken = self._loss, self._norm
        self._loss, self._norm = self._zero(), None
        return taken

    def _clip(self, norm: torch.Tensor) -> None:
        if not self.max_grad_norm:
            return
        fused = isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]
        if fused and not self.scaler:
            # the fused kernel divides gradients by grad_scale as it reads them: clipping without another pass
            self.optimizer.grad_scale = (norm / self.max_grad_norm).clamp(min=1.0).float()
        else:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.max_grad_norm, norm)

    def free(self) -> None:
        """Free the memory of model and optimizer. The engine is unusable afterwards.

        Tensors are emptied, because the graph of the script's last logits and DeepSpeed's globals still refer to them.
        """
        held = list(self._tensors())
        self.model = self.optimizer = self.scaler = None
        self.trainable = []
        self.accelerator.free_memory()
        for tensor in held:
            tensor.data = tensor.data.new_empty(0)
        del held
        release_memory()
        if self.accelerator.device.type == "cpu":
            give_back_memory(at_once=True)

    def _tensors(self) -> Iterator[torch.Tensor]:
        """Yield all tensors of the model and its optimizer: weights, ZeRO-3's shards, gradients, moments, buffers."""
        of_zero = vars(self.model.optimizer) if self.deepspeed else {}
        parts = [self.optimizer.param_groups, self.optimizer.state, of_zero]
        for tensor in chain(self.module.parameters(), self.module.buffers(), tensors_in(parts)):
            more = (tensor.grad if tensor.is_leaf else None, getattr(tensor, "ds_tensor", None))
            yield from (each for each in (tensor, *more) if each is not None)

    def checkpoint_bytes(self, weights_alone: bool = False) -> int:
        """Estimate a checkpoint's bytes over all ranks: float32 weights, and two moments unless `weights_alone`."""
        return self.num_trainable * (BYTES_A_WEIGHT // len(KINDS) if weights_alone else BYTES_A_WEIGHT)

    def snapshot_bytes(self) -> int:
        """Estimate the bytes of a checkpoint's files from this node's ranks; 0 on ranks that write none."""
        has_files = self.deepspeed or self.accelerator.is_main_process
        return bytes_on_node(self.checkpoint_bytes(), self.deepspeed) if has_files else 0

    def state_files(self, weights_alone: bool = False) -> list[StateFile]:
        """Return this rank's files of a checkpoint: trainable weights and optimizer state.

        They refer to the live state, not to a copy: write or copy them before the next step.

        Args:
            weights_alone: leave out the optimizer's state.
        """
        if self.deepspeed:
            return zero_state_files(self.model.optimizer, self._names(), *self._place(), weights_alone)
        if not self.accelerator.is_main_process:
            return []
        stateful = {} if weights_alone else {"optimizer": self.optimizer, "scaler": self.scaler}
        return training_state_files(self.module, stateful)

    def load(self, folder: Path, weights_alone: bool = False) -> None:
        """Restore written `state_files`, bit for bit, on any number of ranks (with adamw8bit and DeepSpeed the same).

        Args:
            weights_alone: skip the optimizer's state, because training is over.
        """
        if self.deepspeed:
            load_zero_state(folder, self.model.optimizer, self._names(), *self._place(), weights_alone)
            return
        stateful = {} if weights_alone else {"optimizer": self.optimizer, "scaler": self.scaler}
        load_training_state(folder, self.module, stateful)

    def _place(self) -> tuple[int, int]:
        return self.accelerator.process_index, self.accelerator.num_processes

    def _names(self) -> dict[nn.Parameter, str]:
        return {parameter: name for name, parameter in self.module.named_parameters() if parameter.requires_grad}

    def gathered_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Gather ZeRO-3's shards on rank 0, for an adapter only the trainable ones. Returns None without ZeRO-3."""
        if self.deepspeed and self.model.zero_optimization_stage() == 3:
            has_frozen = any(not parameter.requires_grad for parameter in self.module.parameters())
            return self.model._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=has_frozen)
        return None


def training_state_files(module: nn.Module, stateful: dict) -> list[StateFile]:
    """Return the files of the trainable weights and of the states of some objects, which may be None."""
    files = [StateFile(WEIGHTS_FILE, _trainable_weights(module))]
    if stateful:
        states = {name: part.state_dict() if part else None for name, part in stateful.items()}
        files.append(StateFile(OPTIMIZER_FILE, states))
    return files


def load_training_state(folder: Path, module: nn.Module, stateful: dict) -> None:
    """Restore the weights and the states of the given objects from `training_state_files`, bit for bit."""
    from safetensors.torch import load_file

    stored, own = load_file(folder / WEIGHTS_FILE), _trainable_weights(module)
    assert stored.keys() == own.keys(), f"{folder} holds other parameters: {sorted(stored.keys() ^ own.keys())[:4]}"
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)
    if not stateful:
        return
    # load to "cpu": the optimizer moves its state to the parameters' device; Accelerate's "cpu:0" cannot be mapped to
    # mmap for a GPU: a node's ranks share the file's pages; on a CPU the tensors would keep using the file
    to_gpu = next(iter(own.values())).device.type == "cuda"
    states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=to_gpu)
    for name, part in stateful.items():
        if part:
            part.load_state_dict(states[name])


def _trainable_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
