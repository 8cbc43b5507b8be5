"""Out-of-memory errors, in all their forms, and the ways out."""

import re
from collections.abc import Mapping

from zerotune.errors import Refused

# Messages on a GPU besides torch.OutOfMemoryError: of CUDA and its driver, which NCCL repeats ("CUDA error: out of
# memory"), of cuBLAS (CUBLAS_STATUS_ALLOC_FAILED), of cuDNN (the same, and …_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED).
_ON_DEVICE = re.compile(r"out of memory|_STATUS_(\w+_)?ALLOC(ATION)?_FAILED|cudaErrorMemoryAllocation")
# torch's allocator on a CPU, in its two forms
_ON_HOST = re.compile(r"can't allocate memory|not enough memory: you tried to allocate")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the device or the host had no memory left."""
    on_host = isinstance(error, RuntimeError) and _ON_HOST.search(str(error))
    return isinstance(error, MemoryError) or bool(on_host) or is_out_of_device_memory(error)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Return whether an error says that a GPU had no memory left."""
    return isinstance(error, RuntimeError) and (
        type(error).__name__ == "OutOfMemoryError" or reports_full_device_memory(str(error))
    )


def reports_full_device_memory(text: str) -> bool:
    """Return whether a library's message says that a GPU had no memory left."""
    return bool(_ON_DEVICE.search(text))


def out_of_memory_refusal(error: BaseException, flags: Mapping[str, object]) -> Refused:
    """Return the refusal of a run that has run out of memory, with the ways out that its flags leave.

    Args:
        flags: values by name, as in run.json.
    """
    smaller = {"full": ["--method lora or qlora"], "lora": ["--method qlora"]}.get(flags.get("method"), [])
    ways = ["a smaller --tokens-per-device"] if "tokens_per_device" in flags else []
    ways += ["--activation-checkpointing"] if flags.get("activation_checkpointing") is False else []
    ways += ["--load-4bit"] if flags.get("load_4bit") is False else []
    ways += [*smaller, "or a device with more memory" if smaller or ways else "a device with more memory"]
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said = ". ".join(said.split(". ")[:2])  # a paragraph of torch's figures may follow
    return Refused(f"out of memory ({said[:200]}): use {', '.join(ways)}")
