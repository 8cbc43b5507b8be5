"""Take steps of a tiny model with an Engine, and print what the ranks send each other, for test_exchange.py.

    counting.py NAME DEEPSPEED_JSON PRECISION MICRO_BATCHES once|each

DEEPSPEED_JSON is a filled-in configuration, or null. Rank 0 prints a line of JSON: losses and gradient norms of three
steps, for each kind of collective in the last step [operation, type, numbers, times], and the bytes of the tensors that
are left once the engine is freed, while the last outputs are still held.
"""

import collections
import functools
import gc
import json
import os
import sys

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

# The argument that holds each operation's whole tensor: the one reduced, filled by a gather, or scattered.
WHOLE = {
    "all_reduce": ("tensor", 0),
    "all_gather_into_tensor": ("output_tensor", 0),
    "reduce_scatter_tensor": ("input", 1),
}
ROWS = 8


class Model(nn.Module):
    """An embedding, which is exchanged in float32, and a linear layer, which DeepSpeed exchanges in 16 bits."""

    def __init__(self):
        super().__init__()
        self.embedding, self.layer = nn.Embedding(32, 16), nn.Linear(16, 64, bias=False)

    def forward(self, ids):
        return self.layer(self.embedding(ids))


def count_collectives(sent: list) -> None:
    for name in WHOLE:
        setattr(torch.distributed, name, functools.partial(note, sent, name, getattr(torch.distributed, name)))


def note(sent: list, name: str, operation, *args, **named):
    keyword, place = WHOLE[name]
    tensor = named[keyword] if keyword in named else args[place]
    sent.append((name, str(tensor.dtype).removeprefix("torch."), tensor.numel()))
    return operation(*args, **named)


def bytes_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def bytes_of_tensors() -> int:
    tensors = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
    return sum({each.untyped_storage().data_ptr(): bytes_of(each) for each in tensors}.values())


def main(name, deepspeed, precision, num_micro_batches, how):
    sent = []
    count_collectives(sent)
    from zerotune.run.launch import start_accelerator
    from zerotune.training.engine import Engine, build_optimizer, exchange_in_bf16

    accelerator = start_accelerator(json.loads(deepspeed))
    torch.manual_seed(0)
    model = Model()
    groups = [{"params": list(model.parameters()), "lr": 1e-2, "weight_decay": 0.0}]
    optimizer = build_optimizer("adamw", groups, "cpu")
    engine = Engine(accelerator, model, optimizer, precision, 1.0, whole_gradients=how == "once")
    rank, world, num = accelerator.process_index, accelerator.num_processes, int(num_micro_batches)
    if deepspeed == "null" and world > 1:  # DDP's own exchange in C++ cannot be counted; a hook's can
        engine.model.register_comm_hook(None, exchange_in_bf16 if name == "bf16" else allreduce_hook)
    ids = torch.randint(32, (num, ROWS))
    curve = []
    for _ in range(3):
        sent.clear()
        for number in range(num):
            is_last = number == num - 1
            with engine.gradients_stay_local(is_last):
                outputs = engine.forward(ids=ids[number, rank::world])
                engine.backward(outputs.float().square().sum() / (ROWS * num), is_last)
        engine.update(1.0)
        loss, norm = engine.take_loss_and_norm()
        exchanged = collections.Counter(each for each in sent if each[2] > 1)
        curve += [float(accelerator.reduce(loss, "sum") if world > 1 else loss), float(norm)]
    engine.free()
    left = bytes_of_tensors() - sum(map(bytes_of, (ids, outputs, loss)))
    if rank == 0:
        sent = [[*each, times] for each, times in exchanged.items()]
        print(json.dumps({"curve": curve, "sent": sent, "left": left}), flush=True)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
