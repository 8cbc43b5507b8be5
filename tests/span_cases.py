"""Questions about made-up paragraphs, and a tokenizer that joins the two as an encoder's does."""

from tiny_models import word_tokenizer
from tokenizers import processors

from zerotune.squad.questions import GoldAnswer, Paragraph, Question

NAMES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def pair_tokenizer(tokenizer=None):
    """Make an encoder's tokenizer: [CLS] question [SEP] context [SEP], with token types."""
    tokenizer = tokenizer or word_tokenizer(**NAMES)
    special = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=special
    )
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # init_kwargs are saved
    return tokenizer


def ask(context, *questions):
    """Return questions about one paragraph, each given as (text, answer or None)."""
    paragraph = Paragraph("Title", 0, context)
    asked = []
    for number, (text, answer) in enumerate(questions):
        answers = () if answer is None else (GoldAnswer(answer, context.index(answer)),)
        asked.append(Question(f"{id(paragraph)}-{number}", text, paragraph, answers))
    return asked


def make_questions(*golds):
    """Return a question about one paragraph for each list of gold answers."""
    paragraph = Paragraph("A", 0, "Hook Head tower")
    return [
        Question(f"q{number}", "Who?", paragraph, tuple(GoldAnswer(gold, 0) for gold in each))
        for number, each in enumerate(golds)
    ]
