"""A causal model with its own LM head, loaded for scoring or writing answers; never trained here."""

import torch
from safetensors import SafetensorError
from torch.nn import functional
from transformers import AutoModelForCausalLM

from zerotune.errors import Refused
from zerotune.models import attention_kernel, check_shapes, keep_nf4_layout, nf4_config, quiet_transformers
from zerotune.precision import compute_dtype
from zerotune.pretrained import read_config


def answer_logits(model, hidden: torch.Tensor, token_ids: list[int] | None = None) -> torch.Tensor:
    """Float32 logits of hidden states [..., dim]: [..., vocabulary], or [..., len(token_ids)] of some tokens alone.

    In bf16 two label words often tie: its numbers near 16 lie 0.125 apart.
    """
    weight = model.get_output_embeddings().weight
    logits = functional.linear(hidden.float(), (weight if token_ids is None else weight[token_ids]).float())
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def load_language_model(options, device: torch.device):
    """A causal model in eval mode on the device, its weights in the precision or in NF4.

    Args:
        options: model, revision, attention, precision, load_4bit (see zerotune.evaluation.EvalOptions).
    Raises:
        Refused: no weights can be read, or some of them are missing.
    """
    config = read_config(options.model, options.revision)
    with quiet_transformers():
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                options.model,
                revision=options.revision or "main",
                dtype=compute_dtype(options.precision),
                attn_implementation=attention_kernel(options.attention, config),
                quantization_config=nf4_config(options.precision) if options.load_4bit else None,
                ignore_mismatched_sizes=True,  # check_shapes refuses them, in one line
                output_loading_info=True,
            )
        except (OSError, SafetensorError) as error:
            raise Refused(
                f"no weights could be read for --model {options.model}: {str(error).splitlines()[0]}"
            ) from error
    check_shapes(options.model, info["mismatched_keys"])
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        raise Refused(
            f"{options.model} lacks weights of a causal model ({missing}): it can only be evaluated "
            "with the head that it was saved with"
        )
    if options.load_4bit:
        keep_nf4_layout(model)
    return (model if options.load_4bit else model.to(device)).eval()
