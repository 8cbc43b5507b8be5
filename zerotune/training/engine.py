"""One optimizer step, the same for plain data parallelism and DeepSpeed: backward, clip, update, save, load."""

from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from zerotune.models.precision import autocast
from zerotune.training.zero_state import BYTES_A_WEIGHT, load_zero_state, save_zero_state

# Written by plain runs; zero_state.py names those of ZeRO.
WEIGHTS_FILE, OPTIMIZER_FILE = "model.safetensors", "optimizer.pt"


def build_optimizer(name: str, groups: list[dict], device_type: str) -> torch.optim.Optimizer:
    """AdamW over parameter groups that carry their own peak `lr` and `weight_decay` (Loshchilov & Hutter 2019).

    Args:
        name: "adamw" (one fused pass over float32 state) or "adamw8bit" (bitsandbytes, state in 8 bits).
    """
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups)
    return torch.optim.AdamW(groups, fused=device_type in ("cpu", "cuda"))


class Engine:
    """A model with its optimizer, ready for steps made of any number of micro-batches.

    All ranks call every method together: gradients, norms and DeepSpeed's files are collective.
    """

    def __init__(
        self,
        accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        precision: str,
        max_grad_norm: float | None,
    ):
        self.accelerator = accelerator
        self.precision = precision
        self.max_grad_norm = max_grad_norm
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.num_trainable = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in self.trainable)
        self.deepspeed = accelerator.deepspeed_plugin is not None
        prepared, wrapped = accelerator.prepare(model, optimizer)
        self.model = prepared
        self.optimizer = wrapped if self.deepspeed else optimizer
        scaled = precision == "fp16" and not self.deepspeed
        self.scaler = torch.amp.GradScaler(accelerator.device.type) if scaled else None

    @property
    def module(self) -> nn.Module:
        """The model as it was given, without wrappers."""
        return self.accelerator.unwrap_model(self.model)

    def forward(self, **inputs) -> torch.Tensor:
        """The model's output under the run's precision. DeepSpeed enters autocast itself."""
        if self.deepspeed:
            return self.model(**inputs)
        with autocast(self.accelerator.device.type, self.precision):
            return self.model(**inputs)

    def backward(self, loss: torch.Tensor, is_last: bool) -> None:
        """Accumulate the gradient of one micro-batch; ranks exchange gradients with the last one.

        Args:
            loss: this rank's share of the step's loss: its sum over the global count. Ranks add up to the loss.
        """
        # DDP and DeepSpeed average over ranks, and the loss is a sum over ranks
        if self.scaler:  # `step` makes the average a sum: a greater loss would overflow where one process does not
            self.scaler.scale(loss).backward()
            return
        loss = loss * self.accelerator.num_processes
        if self.deepspeed:
            self.model.set_gradient_accumulation_boundary(is_last)
            self.model.backward(loss)
        else:
            loss.backward()

    def gradients_stay_local(self, is_last: bool):
        """Context for forward and backward of one micro-batch: no exchange before the last one."""
        several = self.accelerator.num_processes > 1 and not self.deepspeed
        return self.model.no_sync() if several and not is_last else nullcontext()

    def step(self, rate_factor: float) -> torch.Tensor | float:
        """Clip, update with the peak learning rates × `rate_factor`, clear gradients.

        Returns:
            The gradient norm before clipping.
        """
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * rate_factor
        if self.deepspeed:
            self.model.step()
            return self.model.get_global_grad_norm()
        gradients = [p.grad for p in self.trainable if p.grad is not None]
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
            torch._foreach_mul_(gradients, self.accelerator.num_processes)
        norm = torch.nn.utils.get_total_norm(gradients)
        self._clip(norm)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _clip(self, norm: torch.Tensor) -> None:
        if not self.max_grad_norm:
            return
        fused = isinstance(self.optimizer, torch.optim.AdamW) and self.optimizer.defaults["fused"]
        if fused and not self.scaler:
            # the fused kernel divides gradients by grad_scale as it reads them: clipping without a pass of its own
            self.optimizer.grad_scale = (norm / self.max_grad_norm).clamp(min=1.0).float()
        else:
            torch.nn.utils.clip_grads_with_norm_(self.trainable, self.max_grad_norm, norm)

    def checkpoint_bytes(self) -> int:
        """About how many bytes `save` writes on all ranks together: weights and two float32 moments."""
        return self.num_trainable * BYTES_A_WEIGHT

    def save(self, folder: Path) -> list[Path]:
        """Write trainable weights and optimizer state into `folder`. Returns the files that this rank wrote."""
        if self.deepspeed:
            return save_zero_state(folder, self.model.optimizer, self._names(), *self._place())
        if not self.accelerator.is_main_process:
            return []
        return save_training_state(folder, self.module, {"optimizer": self.optimizer, "scaler": self.scaler})

    def load(self, folder: Path, weights_alone: bool = False) -> None:
        """Restore what any number of ranks wrote by `save`, bit for bit; under DeepSpeed with adamw8bit, as many.

        Args:
            weights_alone: leave the optimizer's state unread, for nothing is trained any more.
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
        """ZeRO-3's shards put together, complete on rank 0; of an adapter only what trains. None without shards."""
        if self.deepspeed and self.model.zero_optimization_stage() == 3:
            has_frozen = any(not parameter.requires_grad for parameter in self.module.parameters())
            return self.model._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=has_frozen)
        return None


def save_training_state(folder: Path, module: nn.Module, stateful: dict) -> list[Path]:
    """Write the weights that train and the states of some objects (None where there is none). Returns the files."""
    from safetensors.torch import save_file

    save_file(_trainable_weights(module), folder / WEIGHTS_FILE)
    states = {name: part.state_dict() if part else None for name, part in stateful.items()}
    torch.save(states, folder / OPTIMIZER_FILE)
    return [folder / WEIGHTS_FILE, folder / OPTIMIZER_FILE]


def load_training_state(folder: Path, module: nn.Module, stateful: dict) -> None:
    """Restore what `save_training_state` wrote, bit for bit: the weights, and the states of the objects given."""
    from safetensors.torch import load_file

    stored, own = load_file(folder / WEIGHTS_FILE), _trainable_weights(module)
    assert stored.keys() == own.keys(), f"{folder} holds other parameters: {sorted(stored.keys() ^ own.keys())[:4]}"
    with torch.no_grad():
        for name, tensor in stored.items():
            own[name].copy_(tensor)
    if not stateful:
        return
    # the optimizer moves its state to the parameters' device; "cpu:0", Accelerate's name of a CPU, cannot be mapped
    # what goes to a GPU is read through the file's pages, which a node's ranks share; on a CPU it would stay there
    to_gpu = next(iter(own.values())).device.type == "cuda"
    states = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True, mmap=to_gpu)
    for name, part in stateful.items():
        if part:
            part.load_state_dict(states[name])


def _trainable_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
