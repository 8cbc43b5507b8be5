"""Test texts for a classifier head: texts that spell out special tokens, and texts that end with the pad token."""

import numpy as np
import pytest
import torch
from tiny_models import LABELS, character_model, tiny_model
from tokenizers import processors
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig

from zerotune.errors import Refused
from zerotune.models.classifier import load_classifier
from zerotune.models.final_folder import load_final_or_base, save_final
from zerotune.models.pretrained import load_tokenizer, read_names_as_text
from zerotune.settings.groups import ModelSettings
from zerotune.tasks.splits import Example
from zerotune.tasks.sst2 import SST2
from zerotune.training.classification import check_last_tokens, classifier_data

TEXTS = ["a dull film <unk>", "<s> a </s> bright film", "fine"]
EXAMPLES = [Example(f"x-{number}", text, 0) for number, text in enumerate(TEXTS)]
TASK = {
    "task": "sst2", "head": "classify", "labels": list(LABELS), "prompt": None, "max_length": 60, "truncation": "head",
    "thresholds": None,
}  # fmt: skip
CPU, CONFIG = torch.device("cpu"), LlamaConfig()


def model_padded_with_unk(folder):
    character_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(folder)
    return str(folder)


def logits_of(model, tokenizer):
    data = classifier_data(SST2, tokenizer, CONFIG, EXAMPLES, 60, "head")
    with torch.no_grad():
        return model.eval()(**data.inputs(np.arange(len(TEXTS)), CPU))


def test_a_text_that_spells_special_tokens_has_one_score_in_training_evaluation_and_transformers(tmp_path):
    name = model_padded_with_unk(tmp_path / "model")
    settings, tokenizer = ModelSettings(name), load_tokenizer(name, None)
    read_names_as_text(tokenizer)
    trained = load_classifier(settings, LABELS, tokenizer)
    wanted = logits_of(trained, tokenizer)
    (tmp_path / "final").mkdir()
    save_final(trained, tokenizer, tmp_path / "final", TASK)
    folder = str(tmp_path / "final")
    evaluated, own, _ = load_final_or_base(ModelSettings(folder), LABELS)
    torch.testing.assert_close(logits_of(evaluated, own), wanted)
    plain, plain_tokenizer = (
        kind.from_pretrained(folder) for kind in (AutoModelForSequenceClassification, AutoTokenizer)
    )
    with torch.no_grad():
        found = torch.cat([plain(**plain_tokenizer(text, return_tensors="pt")).logits for text in TEXTS])
        padded = plain(**plain_tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(padded, wanted)


def test_texts_that_end_with_the_pad_token_are_refused(tmp_path):
    name = model_padded_with_unk(tmp_path / "model")
    tokenizer, config = load_tokenizer(name, None), AutoConfig.from_pretrained(name)
    as_published = classifier_data(SST2, tokenizer, CONFIG, [EXAMPLES[2], EXAMPLES[0]], 60, "head")
    with pytest.raises(
        Refused, match=r"1 of 2 texts end with '<unk>', first x-0: .*; give the tokenizer another pad_token"
    ):
        check_last_tokens(name, config, tokenizer, as_published)
    read_names_as_text(tokenizer)
    data = classifier_data(SST2, tokenizer, CONFIG, EXAMPLES, 60, "head")
    check_last_tokens(name, config, tokenizer, data)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A <unk>", special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    data = classifier_data(SST2, tokenizer, CONFIG, EXAMPLES, 60, "head")
    with pytest.raises(Refused, match="3 of 3 texts end with '<unk>'"):
        check_last_tokens(name, config, tokenizer, data)
    check_last_tokens("bert", AutoConfig.from_pretrained(tiny_model("bert")), tokenizer, data)
