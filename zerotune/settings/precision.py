"""Which precision a run computes in: bf16, fp16 or fp32."""

import os

from zerotune.errors import Refused

PRECISIONS = ("bf16", "fp16", "fp32")
NAMES = {"bfloat16": "bf16", "float16": "fp16"}


def resolve_precision(wanted: str, deepspeed_config: dict | None, begun_with: str | None = None) -> str:
    """Choose bf16, fp16 or fp32: by the flag, the DeepSpeed file, the launcher, the run's first start, the device.

    Plain `accelerate launch` exports mixed_precision=no, which does not mean that the user wants float32.

    Raises:
        Refused: flag and DeepSpeed file disagree, or fp16 under DeepSpeed.
    """
    in_file = _precision_of_file(deepspeed_config or {})
    if in_file and wanted not in ("auto", in_file):
        raise Refused(
            f'--precision {wanted} and the DeepSpeed file\'s {in_file} disagree: drop one, or write "auto" in the file'
        )
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if wanted == "auto":
        wanted = in_file or (launcher if launcher in ("bf16", "fp16") else None) or begun_with
        wanted = wanted or default_precision()
    if wanted == "fp16" and deepspeed_config is not None:
        raise Refused(
            "fp16 under DeepSpeed is not supported: use --precision bf16 or fp32, or launch without DeepSpeed"
        )
    return wanted


def _precision_of_file(config: dict) -> str | None:
    for name in ("bf16", "fp16"):
        if config.get(name, {}).get("enabled") is True:
            return name
    autocast_section = config.get("torch_autocast", {})
    if autocast_section.get("enabled") is True:
        return NAMES.get(str(autocast_section.get("dtype", "")).removeprefix("torch."))
    said = [config[name].get("enabled") for name in ("bf16", "fp16", "torch_autocast") if name in config]
    return "fp32" if said and all(each is False for each in said) else None


def default_precision() -> str:
    """Return bf16 where the device computes it natively, else fp32."""
    import torch

    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if torch.cpu.get_capabilities().get("avx512_bf16") else "fp32"
