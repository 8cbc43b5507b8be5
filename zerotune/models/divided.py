"""Layers divided among the ranks, to evaluate a model that does not fit on one device."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from zerotune.models.adapters import base_settings
from zerotune.models.families import expert_size
from zerotune.models.model_files import read_record
from zerotune.models.parameters import published_table
from zerotune.run.cpu import processes_on_node
from zerotune.run.launch import on_all_ranks
from zerotune.run.process import say
from zerotune.settings.groups import ModelSettings

# A model whose weights fill up to this share of a device is evaluated whole.
EVALUATED_WHOLE = 0.8


@dataclass(frozen=True)
class EvaluatedWeights:
    """Bytes of a model's weights during evaluation, for its layers and for the rest."""

    layers: int
    rest: int
    num_layers: int

    @classmethod
    def of(cls, config, precision: str, has_lm_head: bool, is_whole: bool) -> "EvaluatedWeights":
        """Count the weights of a model that is not in 4 bits.

        Args:
            is_whole: whether it is no adapter's base. A whole model without an LM head has its linear layers in the
                precision and the rest in float32; all other models are in the precision throughout.
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
        """Return whether the layers are divided among the devices: if the weights would fill most of one."""
        return num_devices > 1 and self.layers + self.rest > EVALUATED_WHOLE * device_bytes

    def on_each(self, num_devices: int, device_bytes: int) -> float:
        """Return the bytes on each device; of divided layers, one at a time is gathered."""
        if not self.are_divided(num_devices, device_bytes):
            return self.layers + self.rest
        return self.rest + self.layers / num_devices + self.layers / self.num_layers


def divided_where_large(model: ModelSettings, config, has_lm_head: bool, accelerator) -> ModelSettings:
    """Return the settings that load a model for evaluation, with `divides_layers` if it would fill most of a device.

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
    """Return the memory of the smallest of this node's GPUs in use; None on a CPU, whose memory the ranks share.

    All ranks of a node find the same, so that they refuse together.
    """
    if not torch.cuda.is_available():
        return None
    launched = processes_on_node()
    if launched == 1:
        return torch.cuda.mem_get_info()[1]
    return min(torch.cuda.get_device_properties(number).total_memory for number in range(launched))


def onto_device(model: nn.Module, stock: nn.Module, settings: ModelSettings, device: torch.device) -> nn.Module:
    """Move a loaded model to its device; with `settings.divides_layers`, only a part of each layer to each rank's.

    Args:
        stock: the transformers model in it, or the model itself.
    """
    if settings.divides_layers:
        divide_layers(stock, device)
    return model.to(device)


def divide_layers(stock: nn.Module, device: torch.device) -> None:
    """Keep a part of every layer's weights on each rank, and gather a layer while its forward pass runs (FSDP2).

    All weights are frozen. All ranks call this together, and must then make the same number of passes. Weights outside
    the layers stay whole on each rank: embedding and head are also read between passes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    stock.requires_grad_(False)  # FSDP2 allows several types in a layer only if nothing trains
    for layer in _layers(stock):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    backbone = stock.base_model  # one root, without weights of its own: layers share streams, and gather ahead
    fully_shard(backbone, mesh=mesh, ignored_params=set(backbone.parameters()))
    stock._is_fsdp_managed_module = True  # makes generate() continue until all ranks have finished


def _layers(stock: nn.Module) -> nn.ModuleList:
    number = stock.config.num_hidden_layers
    return next(part for part in stock.modules() if isinstance(part, nn.ModuleList) and len(part) == number)
