"""Compute the logits of tuned tiny models: of ours, of one reloaded from its final/, and of a plain one."""

import torch
from tiny_models import IDS, LABELS, MASK

from zerotune.models.final_folder import load_final_or_base, load_final_span
from zerotune.settings.groups import ModelSettings


def logits(model, head="classify"):
    """Return the logits of the tokens that count."""
    with torch.no_grad():
        if head == "generate":
            return model(IDS, *torch.nonzero(MASK, as_tuple=True))
        found = model(IDS, MASK)
        return found[MASK == 1] if head == "span" else found


def plain_logits(model, head="classify"):
    """Return the logits of a stock or peft model, as `logits` does."""
    with torch.no_grad():
        output = model.eval()(input_ids=IDS, attention_mask=MASK)
    if head == "span":
        return torch.stack([output.start_logits, output.end_logits], dim=-1)[MASK == 1]
    return output.logits if head == "classify" else output.logits[MASK == 1]


def reloaded(folder, head="classify", **settings):
    """Return (model, tokenizer, task.json) of a final/ with a classification or span head."""
    settings = ModelSettings(str(folder), **settings)
    return load_final_span(settings) if head == "span" else load_final_or_base(settings, LABELS)
