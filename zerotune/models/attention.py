"""The choice of an attention kernel."""

import torch
from transformers.utils import is_flash_attn_2_available

from zerotune.errors import Refused
from zerotune.models import cpu_kernels, packed
from zerotune.models.branches import FULL, layer_types
from zerotune.models.families import backbone_class, caps_scores
from zerotune.models.heads import is_encoder

# The attribute by which a class of transformers says that it supports a kernel.
_SUPPORT = {
    "sdpa": "_supports_sdpa",
    "flash_attention_2": "_supports_flash_attn",
    "flex_attention": "_supports_flex_attn",
}


def attention_kernel(wanted: str, config) -> str:
    """Return the kernel that --attention selects for a model, by its name in transformers.

    varlen is for packed rows (`packed.packs_rows`); padded rows then use sdpa or eager. sdpa can neither cap attention
    scores (Gemma-2) nor add positions to them (DeBERTa). On a CPU the default is zerotune's own kernel; the one for
    encoders does not support sliding windows (ModernBERT).

    Raises:
        Refused: the model or this machine cannot use the kernel.
    """
    is_capped = caps_scores(config)
    model_class, has_gpu = backbone_class(config), torch.cuda.is_available()
    takes_sdpa = model_class._supports_sdpa and not is_capped
    if wanted == "auto" and takes_sdpa and not has_gpu:
        if not is_encoder(config):
            return cpu_kernels.CAUSAL_ATTENTION
        if layer_types(config) == (FULL,):
            return cpu_kernels.ATTENTION
    if wanted == "varlen" and (problem := packed.why_not_packed(config)):
        raise Refused(f"--attention varlen: {problem}; use --attention auto")
    if wanted == "varlen" and has_gpu and not packed.kernel_works(is_capped):
        raise Refused("--attention varlen needs a GPU with flash attention (Ampere or newer); use --attention auto")
    if wanted in ("auto", "varlen"):
        return "sdpa" if takes_sdpa else "eager"
    if wanted == "sdpa" and is_capped:
        raise Refused(
            f"--attention sdpa cannot cap scores as {config.model_type} needs; use auto, eager or flash_attention_2"
        )
    if not getattr(model_class, _SUPPORT.get(wanted, ""), True):
        raise Refused(f"--attention {wanted} cannot compute the scores of {config.model_type}; use auto or eager")
    if wanted == "flash_attention_2" and not (has_gpu and is_flash_attn_2_available()):
        missing = packed.FLASH_ATTN if has_gpu else "a GPU, and there is none"
        raise Refused(f"--attention flash_attention_2 needs {missing}; use --attention auto")
    return wanted


def check_kernel_precision(attention: str, precision: str) -> None:
    """Refuse an attention kernel that does not compute in the precision."""
    if attention == "varlen" and precision == "fp32" and torch.cuda.is_available():
        raise Refused(
            "--attention varlen computes in 16 bits on a GPU and the precision is fp32: use --precision bf16, or "
            "--attention auto"
        )
    if attention == "flash_attention_2" and precision == "fp32":
        raise Refused(
            "--attention flash_attention_2 computes in 16 bits and the precision is fp32: use --precision bf16, on a "
            "GPU that has it (Ampere or newer), or --attention auto"
        )
