"""Test recognising libraries' out-of-memory errors, and the ways out that a run's flags leave."""

import pytest
import torch

from zerotune.errors import Refused
from zerotune.run.out_of_memory import is_out_of_device_memory, is_out_of_memory, out_of_memory_refusal

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 GiB is free."
ON_DEVICE = [
    torch.OutOfMemoryError(CUDA),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other call"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 'out of memory'"),
]


@pytest.mark.parametrize("error", ON_DEVICE, ids=lambda error: str(error)[:40])
def test_forms_of_a_gpu(error):
    assert is_out_of_memory(error) and is_out_of_device_memory(error)


def test_forms_of_a_cpu():
    with pytest.raises(RuntimeError) as torchs:
        torch.empty(2**60, dtype=torch.uint8)
    other = RuntimeError(
        "[enforce fail at alloc.cpp:1] . DefaultCPUAllocator: not enough memory: you tried to allocate 9"
    )
    for error in (torchs.value, other, MemoryError(), MemoryError("Unable to allocate 8.0 EiB for an array")):
        assert is_out_of_memory(error) and not is_out_of_device_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("shapes do not match"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(28, "No space left on device"),
        Refused("out of memory on a single item of 30 tokens"),
    ],
    ids=str,
)
def test_other_errors(error):
    assert not is_out_of_memory(error) and not is_out_of_device_memory(error)


@pytest.mark.parametrize(
    ("flags", "ways"),
    [
        (
            {"tokens_per_device": 8192, "activation_checkpointing": False, "method": "full"},
            "a smaller --tokens-per-device, --activation-checkpointing, --method lora or qlora, "
            "or a device with more memory",
        ),
        (
            {"tokens_per_device": 8192, "activation_checkpointing": True, "method": "lora"},
            "a smaller --tokens-per-device, --method qlora, or a device with more memory",
        ),
        (
            {"tokens_per_device": 8192, "load_4bit": False},
            "a smaller --tokens-per-device, --load-4bit, or a device with more memory",
        ),
        ({}, "a device with more memory"),
    ],
)
def test_the_ways_out_are_flags_that_the_script_has(flags, ways):
    line = str(out_of_memory_refusal(ON_DEVICE[0], flags))
    assert line == f"out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): use {ways}"
    assert str(out_of_memory_refusal(MemoryError(), {})).startswith("out of memory (MemoryError)")
