"""A causal model that learns to write answers: float32 logits at the answers' positions, and nowhere else."""

import torch

from zerotune.models.branches import Places, branch_masks, mask_dtype
from zerotune.models.heads import TunedModel
from zerotune.models.language_model import cap_logits, load_causal_model
from zerotune.models.loading import ModelSettings, check_settings, recompute_activations, tuning_config
from zerotune.models.lora import add_lora
from zerotune.models.pretrained import read_config


class AnswerGenerator(TunedModel):
    """A causal model of language_model.load_causal_model, its LM head computed at chosen positions only."""

    def forward(
        self,
        input_ids: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        positions: torch.Tensor | None = None,
        branches: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Float32 logits [N, vocabulary] of the token that follows each of N positions of a batch.

        input_ids are [B, T], padded on the right, where a causal model looks from no token of a row: they need no mask.
        rows and columns, [N] each, are the positions. positions and branches, [B, T] each, are those of
        paragraph_branches.BranchRows, for rows that hold branches which must not see each other.
        """
        stock = self.stock_model
        told = {}
        if branches is not None:
            places = Places(positions, branches)
            masks = branch_masks(stock.config, places, places, mask_dtype(stock, input_ids.device))
            told = {"position_ids": positions, "attention_mask": masks}
        hidden = stock.base_model(input_ids=input_ids, use_cache=False, **told).last_hidden_state
        return cap_logits(stock.get_output_embeddings()(hidden[rows, columns]), stock.config)


def load_generator(settings: ModelSettings, tokenizer) -> AnswerGenerator:
    """The causal model of the settings ready to be tuned, on the device that from_pretrained chooses.

    Types are those of models.load_classifier: float32 in full tuning; of LoRA a frozen base in the settings' precision,
    of QLoRA in NF4, both with float32 adapters. Raises Refused for a model or settings that cannot be trained.
    """
    check_settings(settings)
    config = tuning_config(read_config(settings.name, settings.revision), settings, tokenizer)
    model = load_causal_model(settings, config)
    if settings.method != "full":
        model = add_lora(model, settings, "CAUSAL_LM")
    return recompute_activations(AnswerGenerator(model), settings)
