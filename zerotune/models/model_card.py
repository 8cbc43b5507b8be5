"""README.md of final/, a model card: a description of the model, and a whole prediction in transformers and peft.

The report's last step names the data, and adds scores and limits (zerotune/report/card.py).
"""

import json

from zerotune.errors import quoted
from zerotune.models.base_license import LICENSE_HEADING, base_license, hub_id
from zerotune.models.families import caps_scores, generic_part
from zerotune.models.heads import has_token_types, head_of, is_encoder
from zerotune.models.model_files import CONFIG_FOLDER
from zerotune.models.multi_label import PROBLEM_TYPE
from zerotune.models.pretrained import leading_ids, trailing_ids

_CARD = """# {title}

{description} Trained with zerotune.

```python
{imports}

{folder_line}
{loading}
tokenizer = AutoTokenizer.from_pretrained(folder)

{prediction}
```

{notes}

{license}
"""
_METHODS = {
    "full": "All weights of",
    "lora": "A LoRA adapter for",
    "qlora": "A LoRA adapter (4-bit base) for",
    "merged": "A LoRA adapter merged into",
}
_FLOAT32 = 'Keep `dtype="float32"`: the head is float32, and 16 bits would lose small differences.'
# By head: the beginning of the title, the Auto class, and the hub's pipeline tag.
_HEADS = {
    "classify": ("Classifier", "AutoModelForSequenceClassification", "text-classification"),
    "generate": ("Generator", "AutoModelForCausalLM", "text-generation"),
    "span": ("Extractive reader", "AutoModelForQuestionAnswering", "question-answering"),
}
# The line of the code that names the model's folder; an upload replaces it by one that fetches the repository.
FOLDER_LINE = 'folder = "."  # where this file is'
# The config beside an adapter, which has the labels and the pad id that the base lacks.
_ADAPTER_CONFIG = f'config=AutoConfig.from_pretrained(folder, subfolder="{CONFIG_FOLDER}")'

_NO_TYPES = ", return_token_type_ids=False"
_CLASSIFY = """{text}
row = tokenizer({read}, truncation=True, max_length={max_length}{no_types}, return_tensors="pt")
with torch.no_grad():
    logits = model.eval()(**row).logits[0]
probabilities = logits.{activation}.tolist()
labels = [model.config.id2label[column] for column in range(len(probabilities))]
for probability, label in sorted(zip(probabilities, labels), reverse=True):
    print(f"{{probability:.4f}}  {{label}}")"""

_PAIR_ROW = """row = tokenizer(
    question, context, truncation="only_second", max_length={max_length}, return_offsets_mapping=True{no_types}
)
columns = [column for column, text in enumerate(row.sequence_ids()) if text == 1]  # the context's
offsets = row.pop("offset_mapping")
places = [offsets[column] for column in columns]
null = 0  # the first token stands for "no answer" """.rstrip()

_CAUSAL_ROW = """asked = {before} + tokenizer(question + "\\n", add_special_tokens=False)["input_ids"]
read = tokenizer(context, add_special_tokens=False, return_offsets_mapping=True)
places = read["offset_mapping"][: {max_length} - len(asked) - {num_after}]
columns = range(len(asked), len(asked) + len(places))  # the context's
row = {{"input_ids": asked + read["input_ids"][: len(places)] + {after}}}
row["attention_mask"] = [1] * len(row["input_ids"])
null = len(row["input_ids"]) - 1  # the last token stands for "no answer\""""

_SPAN = """question = "Who built the tower?"
context = "The tower at Hook Head was built by monks."
{row}
with torch.no_grad():
    output = model.eval()(**{{name: torch.tensor([values]) for name, values in row.items()}})
start, end = output.start_logits[0].tolist(), output.end_logits[0].tolist()
score, first, last = max(
    (start[columns[first]] + end[columns[last]], first, last)
    for first in range(len(columns))
    for last in range(first, min(first + {max_answer_length}, len(columns)))
)
answer = context[places[first][0] : places[last][1]].strip()
odds = start[null] + end[null] - score  # the higher, the surer that the context has no answer
print(answer if odds <= {threshold} else "no answer", f"(odds of no answer: {{odds:.4f}})")"""

_GENERATE = """task = json.loads(Path(folder, "task.json").read_text(encoding="utf-8"))
{asked}
ids = {before} + tokenizer(prompt, add_special_tokens=False)["input_ids"]
row = {{"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}}
model.generation_config = type(model.generation_config)()  # without the base's penalties
written = model.eval().generate(
    **row, do_sample=False, max_new_tokens={max_new_tokens}, eos_token_id={ends}, pad_token_id=tokenizer.pad_token_id
)
answer = tokenizer.decode(written[0, row["input_ids"].shape[1] :], skip_special_tokens=True).strip()
{read}"""

_ASKED_TEXT = """
words = task["prompt"]["label_words"]
prompt = task["prompt"]["template"].replace("{text}", text)
if task["prompt"].get("instruction"):
    prompt = task["prompt"]["instruction"] + "\\n\\n" + prompt"""
_ASKED_QUESTION = """question = "Who built the tower?"
context = "The tower at Hook Head was built by monks."
prompt = task["prompt"]["template"].replace("{question}", question).replace("{context}", context)
prompt = task["prompt"]["instruction"] + prompt"""
_CHAT = """
chat = task["chat"]  # what the chat template writes around the prompt
prompt = chat["before"] + (prompt.strip() if chat["strips"] else prompt) + chat["after"]"""
_READ_LABEL = """answer = answer.casefold()
found = [word for word in words if re.match(re.escape(word.casefold()) + r"(?!\\w)", answer)]
print(task["labels"][words.index(max(found, key=len))] if found else f"no label: {answer!r}")"""
_READ_ANSWER = """print("no answer" if answer == task["prompt"]["no_answer"] else answer)"""


def model_card(stock, record: dict, tokenizer) -> str:
    """Return the README of a tuned model.

    Args:
        stock: the transformers model, without peft's wrapper.
        record: content of task.json.
    """
    head = head_of(stock)
    title, model_class, _ = _HEADS[head]
    is_asked = head == "span" or (head == "generate" and "label_words" not in record["prompt"])
    imports, definition, loading = _loading_lines(stock, record, head, model_class)
    needed = ["import torch"]
    if head == "generate":
        modules = ["json"] if is_asked else ["json", "re"]
        needed = [*(f"import {module}" for module in modules), "from pathlib import Path", "", "import torch"]
    made = _METHODS["merged" if "merged" in record else record["method"]]
    data = _front_matter(stock, record, head)
    body = _CARD.format(
        title=f"{title} for {'questions' if is_asked else 'texts'}",
        description=f"{made} `{record['base_model']}`, {_purpose(stock, record, head)}",
        imports="\n".join([*needed, *imports]) + definition,
        loading=loading,
        prediction=_prediction(stock, record, head, tokenizer),
        notes="\n".join(_notes(stock, record, head, model_class)),
        folder_line=FOLDER_LINE,
        license=license_section(data),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _front_matter(stock, record: dict, head: str):
    """Return the front matter of a card for the hub, as far as the model determines it: a ModelCardData."""
    from huggingface_hub import ModelCardData

    is_adapter = record["method"] != "full"
    base = stock.config.name_or_path or record["base_model"]
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers", pipeline_tag=_HEADS[head][2], tags=["zerotune"]
    )
    name_base(data, hub_id(base), is_adapter, base_license(base, record["base_revision"]))
    return data


def name_base(data, base: str | None, is_adapter: bool, found_license: dict[str, str]) -> None:
    """Set a card's base model, None if it is not on the hub, and the license that the base's card states, if any."""
    data.base_model = base
    data["base_model_relation"] = ("adapter" if is_adapter else "finetune") if base else None
    for name in ("license", "license_name", "license_link"):
        data[name] = found_license.get(name)


def license_section(data) -> str:
    """Return the card's section about its license: the base's, or a note that none is claimed."""
    if not data.license:
        said = (
            "No license is stated here, because the base model's card was not available or names none. The base "
            "model's license also applies to this model: look it up and add it as `license` above."
        )
    else:
        name = data.license_name if data.license == "other" and data.license_name else data.license
        link = f" ({data.license_link})" if data.license_link else ""
        said = f"That of the base model, as its card states it: {name}{link}. It also applies to this model."
    return f"{LICENSE_HEADING}\n\n{said}"


def _loading_lines(stock, record: dict, head: str, model_class: str) -> tuple[list[str], str, str]:
    """Return the imports, a class if transformers has none for the model, and the lines that load the model."""
    # transformers before 5.23 loads Gemma-2 with sdpa, which does not cap its scores
    dtype = 'dtype="float32"' + (', attn_implementation="eager"' if caps_scores(stock.config) else "")
    imports, definition = [], ""
    if generic := generic_part(type(stock)):
        backbone = type(stock).__bases__[1]
        model_class = "SpanModel" if head == "span" else "Classifier"
        imports = [
            f"from transformers.modeling_layers import {generic.__name__}",
            f"from {backbone.__module__} import {backbone.__name__}",
        ]
        definition = f"\n\n\nclass {model_class}({generic.__name__}, {backbone.__name__}): ...\n"
    if record["method"] == "full":
        config = "config=AutoConfig.from_pretrained(folder), " if definition else ""
        line = f"model = {model_class}.from_pretrained(folder, {config}{dtype})"
    else:
        base = record["base_model"]
        # a path relative to this folder, or a hub id
        arguments = [f"folder + {json.dumps('/' + base)}" if base.startswith("..") else json.dumps(base)]
        if record["base_revision"]:
            arguments.append(f"revision={record['base_revision']!r}")
        arguments += [dtype] if head == "generate" and not stock.key_mapping else [_ADAPTER_CONFIG, dtype]
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
        line = f"base = {model_class}.from_pretrained({', '.join(arguments)})"
        line += "\nmodel = PeftModel.from_pretrained(base, folder)"
        if head == "span" and has_token_types(stock.config):
            line += ".get_base_model()  # with the adapter; peft's wrapper would drop the token types"
    names = ["AutoTokenizer", *(name for name in ("AutoConfig", "BitsAndBytesConfig") if name in line)]
    names += [] if definition else [model_class]
    imports = [f"from transformers import {', '.join(sorted(names))}", *imports]
    if record["method"] != "full":
        imports = ["from peft import PeftModel", *imports]
    return imports, definition, line


def _prediction(stock, record: dict, head: str, tokenizer) -> str:
    """Return the lines that predict something with `model` and `tokenizer`, and print it."""
    pair_types = "" if has_token_types(stock.config) else _NO_TYPES
    if head == "classify":
        is_multi_label = getattr(stock.config, "problem_type", None) == PROBLEM_TYPE
        text, read, no_types = _example_line(record), "text", _NO_TYPES
        if record.get("pair_columns") and is_encoder(stock.config):  # two segments
            text, read = 'first, second = "a text", "the text that belongs to it"', "first, second"
            no_types = pair_types
        activation = "sigmoid()" if is_multi_label else "softmax(-1)"
        return _CLASSIFY.format(
            text=text, read=read, no_types=no_types, max_length=record["max_length"], activation=activation
        )
    if head == "span":
        max_length = record["max_length"]
        if is_encoder(stock.config):
            row = _PAIR_ROW.format(max_length=max_length, no_types=pair_types)
        else:
            after = trailing_ids(tokenizer) or [tokenizer.eos_token_id]
            row = _CAUSAL_ROW.format(
                before=leading_ids(tokenizer), max_length=max_length, after=after, num_after=len(after)
            )
        threshold = (record["thresholds"] or {}).get("null_odds") or 0.0
        return _SPAN.format(row=row, max_answer_length=record.get("max_answer_length", 30), threshold=threshold)
    names_labels, is_chat = "label_words" in record["prompt"], "chat" in record
    return _GENERATE.format(
        asked=(_example_line(record) + _ASKED_TEXT if names_labels else _ASKED_QUESTION) + (_CHAT if is_chat else ""),
        before=[] if is_chat else leading_ids(tokenizer),  # a chat template writes its own BOS
        max_new_tokens=_longest_answer(record, tokenizer),
        ends=f"[tokenizer.eos_token_id, {record['chat']['end_token']}]" if is_chat else "tokenizer.eos_token_id",
        read=_READ_LABEL if names_labels else _READ_ANSWER,
    )


def _example_line(record: dict) -> str:
    """Return the line that sets the text; for a pair, both texts after the names of their columns, as in training."""
    text = "a text to classify"
    if pair := record.get("pair_columns"):
        text = f"{pair[0]}: a text\n{pair[1]}: the text that belongs to it"
    return f"text = {json.dumps(text, ensure_ascii=False)}"


def _longest_answer(record: dict, tokenizer) -> int:
    """Return the most tokens that an answer takes, its end token included."""
    if "label_words" not in record["prompt"]:
        return record.get("max_new_tokens", 32)
    answers = [" " + word for word in record["prompt"]["label_words"]]
    return 1 + max(len(tokenizer(answer, add_special_tokens=False)["input_ids"]) for answer in answers)


def _notes(stock, record: dict, head: str, model_class: str):
    """Yield notes for users of the model."""
    if head == "classify":
        yield _FLOAT32
        yield '`pipeline("text-classification", model=model, tokenizer=tokenizer)` takes the same two.'
        if record.get("truncation") == "head-and-tail":
            yield (
                "In training, longer texts kept a quarter of their tokens from the head and the rest from the tail; "
                "here they keep the head."
            )
    elif head == "span":
        yield f"{_FLOAT32} A context that is too long is cut here; zerotune reads it in windows that overlap."
    plain = generic_part(type(stock)) is None and not stock.key_mapping
    if record["method"] != "full" and plain:
        arguments = ["folder", *([_ADAPTER_CONFIG] if head == "classify" else [])]
        arguments += ["quantization_config=… as above"] if record["method"] == "qlora" else []
        heads = "" if head == "generate" else " (not in 5.17, which leaves the head random)"
        yield f"\n`{model_class}.from_pretrained({', '.join(arguments)})` of transformers 5.23 loads it too{heads}."


def _purpose(stock, record: dict, head: str) -> str:
    if head == "span":
        return "tuned to find the words of a paragraph that answer a question, or to say that none do."
    if head == "generate":
        words = record["prompt"].get("label_words")
        return (
            f"tuned to answer a prompt with one of: {', '.join(map(quoted, words))}."
            if words
            else "tuned to answer questions."
        )
    labels = ", ".join(quoted(stock.config.id2label[i]) for i in range(stock.config.num_labels))
    if getattr(stock.config, "problem_type", None) == PROBLEM_TYPE:
        return f"tuned to give a text none, one or several labels of: {labels}."
    return f"tuned to classify texts. Labels: {labels}."
