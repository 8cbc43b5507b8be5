"""README.md of final/: what the model is, and the lines that load it without zerotune."""

from zerotune.models.families import generic_part
from zerotune.models.heads import head_of

_CARD = """# {title}

{description} Trained with zerotune; task.json says for which task.

```python
{imports}
folder = "."  # where this file is
model = {line}
tokenizer = AutoTokenizer.from_pretrained(folder)
```

{note}
"""
_METHODS = {"full": "All weights of", "lora": "A LoRA adapter for", "qlora": "A LoRA adapter (4-bit base) for"}
_FLOAT32 = 'Keep `dtype="float32"`: the head is float32, and 16 bits would lose small differences.'
# By head: the end of the title, the end of the Auto class's name, and a note for its users.
_HEADS = {
    "classify": ("classifier", "SequenceClassification", _FLOAT32),
    "generate": (
        "generator",
        "CausalLM",
        "The prompt is in task.json: ask in its words and its format, and let the model end its answer.",
    ),
    "span": (
        "span finder",
        "QuestionAnswering",
        "A row is question, then paragraph; `model(**row)` gives `start_logits` and `end_logits` of its tokens. "
        f"task.json says how long rows are and above which odds there is no answer. {_FLOAT32}",
    ),
}


def model_card(stock, record: dict) -> str:
    """Return the README of a tuned model.

    Args:
        stock: the transformers model, without peft's wrapper.
        record: content of task.json.
    """
    head = head_of(stock)
    title, family, note = _HEADS[head]
    imports, line = _loading_lines(stock, record, head, f"AutoModelFor{family}")
    return _CARD.format(
        title=f"{record.get('task', 'Text')} {title}",
        description=f"{_METHODS[record['method']]} `{record['base_model']}`, {_purpose(stock, record, head)}",
        imports=imports,
        line=line,
        note=note,
    )


def _loading_lines(stock, record: dict, head: str, model_class: str) -> tuple[str, str]:
    """Return the imports, with a class if transformers has none for the model, and the expression that loads it."""
    # transformers before 5.23 loads Gemma-2 with sdpa, which leaves out the capping of its scores
    is_capped = getattr(stock.config, "attn_logit_softcapping", None) is not None
    dtype = 'dtype="float32"' + (', attn_implementation="eager"' if is_capped else "")
    imports, definition = [], ""
    if generic := generic_part(type(stock)):
        backbone = type(stock).__bases__[1]
        model_class = "SpanModel" if head == "span" else "Classifier"
        imports = [
            f"from transformers.modeling_layers import {generic.__name__}",
            f"from {backbone.__module__} import {backbone.__name__}",
        ]
        definition = f"\n\nclass {model_class}({generic.__name__}, {backbone.__name__}): ...\n"
    own_config = "config=AutoConfig.from_pretrained(folder)"  # with labels and pad id, also beside an adapter
    if record["method"] == "full":
        line = f"{model_class}.from_pretrained(folder, {own_config + ', ' if definition else ''}{dtype})"
    else:
        arguments = [repr(record["base_model"])]
        if record["base_revision"]:
            arguments.append(f"revision={record['base_revision']!r}")
        arguments += [dtype] if head == "generate" and not stock.key_mapping else [own_config, dtype]
        if stock.key_mapping:
            arguments.append(f"key_mapping={stock.key_mapping}")
        if record["method"] == "qlora":
            nf4 = stock.config.quantization_config
            arguments.append(
                'quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
                "bnb_4bit_use_double_quant=True, "
                f'bnb_4bit_compute_dtype="{str(nf4.bnb_4bit_compute_dtype).removeprefix("torch.")}", '
                f"llm_int8_skip_modules={nf4.llm_int8_skip_modules})"
            )
        line = f"PeftModel.from_pretrained({model_class}.from_pretrained({', '.join(arguments)}), folder)"
    names = ["AutoTokenizer", *(name for name in ("AutoConfig", "BitsAndBytesConfig") if name in line)]
    names += [] if definition else [model_class]
    imports = [f"from transformers import {', '.join(sorted(names))}", *imports]
    if record["method"] != "full":
        imports = ["from peft import PeftModel", *imports]
    return "\n".join(imports) + definition, line


def _purpose(stock, record: dict, head: str) -> str:
    if head == "span":
        return "tuned to find the words of a paragraph that answer a question, or to say that none do."
    if head == "generate":
        words = record["prompt"].get("label_words")
        return f"tuned to answer a prompt with one of: {', '.join(words)}." if words else "tuned to answer questions."
    labels = ", ".join(stock.config.id2label[i] for i in range(stock.config.num_labels))
    return f"tuned to classify texts. Labels: {labels}."
