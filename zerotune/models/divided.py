"""Layers divided among the ranks, to evaluate a model that does not fit a device."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from zerotune.models.adapters import base_settings
from zerotune.models.families import expert_size
from zerotune.models.model_files import read_record
from zerotune.models.parameters import published_table
from zerotune.run.launch import on_all_ranks
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings

# Share of a device up to which its weights are evaluated whole.
EVALUATED_WHOLE = 0.8


@dataclass(frozen=True)
class EvaluatedWeights:
    """Bytes of a model's weights as they are evaluated, those of its layers and those of the rest."""

    layers: int
    rest: int
    num_layers: int

    @classmethod
    def of(cls, config, precision: str, has_lm_head: bool, is_whole: bool) -> "EvaluatedWeights":
        """Count the weights of a model that is not in 4 bits.

        Args:
            is_whole: it is no adapter's base. Under another head than an LM head, it then has linear layers in the
                precision and the rest in float32; all others are in the precision.
        """
        table = published_table(config)
        groups, narrow = table["groups"], 4 if precision == "fp32" else 2
        rest = groups["embedding"] + (groups["head"] if has_lm_head else 0)
        inner = table["total"] - groups["embedding"] - groups["head"]
        is_wide = is_whole and not has_lm_head
        linear = groups["attention"] + groups["mlp"] - expert_size(config) if is_wide else inner
        layers = narrow * linear + 4 * (inner - linear)
        return cls(layers, rest * (4 if is_wide else narrow), config.num_hidden_layers)

    def are_divided(self, num_devices: int, device_bytes: int) -> bool:
        """Return whether they are divided among some devices: where they fill most of one."""
        return num_devices > 1 and self.layers + self.rest > EVALUATED_WHOLE * device_bytes

    def on_each(self, num_devices: int, device_bytes: int) -> float:
        """Return the bytes on each device; of divided layers, one at a time is whole."""
        if not self.are_divided(num_devices, device_bytes):
            return self.layers + self.rest
        return self.rest + self.layers / num_devices + self.layers / self.num_layers


def divided_where_large(model: ModelSettings, config, has_lm_head: bool, accelerator) -> ModelSettings:
    """Return how a model is loaded to be evaluated, with `divides_layers` where it fills most of a device.

    All ranks take part. A model in 4 bits stays whole, and so does one on a single device.
    """
    memory = device_bytes()
    if memory is None or accelerator.num_processes == 1:
        return model
    base, is_adapter = base_settings(model, read_record(model.name, model.revision))
    if base.method == "qlora":
        return model
    weights = EvaluatedWeights.of(config, model.precision, has_lm_head, not is_adapter)
    if not any(on_all_ranks(accelerator, weights.are_divided(accelerator.num_processes, memory))):
        return model
    say(f"evaluation: the model's layers are divided among {accelerator.num_processes} devices")
    return replace(model, divides_layers=True)


def device_bytes() -> int | None:
    """Return the memory of this process's GPU; None on a CPU, whose memory the ranks share."""
    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None


def onto_device(model: nn.Module, stock: nn.Module, settings: ModelSettings, device: torch.device) -> nn.Module:
    """Return a model that has been read, on its device; with `settings.divides_layers`, a part of it on each rank's.

    Args:
        stock: the transformers model in it, or itself.
    """
    if settings.divides_layers:
        divide_layers(stock, device)
    return model.to(device)


def divide_layers(stock: nn.Module, device: torch.device) -> None:
    """Leave each rank its part of the weights of every layer, and gather a layer while its forward pass runs (FSDP2).

    Nothing trains any more. All ranks call this together, and must make equally many passes from then on. What is
    outside of the layers stays whole on each rank: embedding and head are also read between passes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    stock.requires_grad_(False)  # a layer's weights may have several types then
    for layer in _layers(stock):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    stock._is_fsdp_managed_module = True  # generate() then writes on until all ranks have ended


def _layers(stock: nn.Module) -> nn.ModuleList:
    number = stock.config.num_hidden_layers
    return next(part for part in stock.modules() if isinstance(part, nn.ModuleList) and len(part) == number)
