"""Our side of lm_eval_few_shot.py: the model and the prompts that both sides read, and our scores of them.

    python tests/benchmarks/few_shot_side.py prepare MODEL_FOLDER PROMPTS --task imdb --file test.csv.gz --items 500
    python tests/benchmarks/few_shot_side.py score MODEL_FOLDER PROMPTS RESULT

PROMPTS gets "contexts" and "answers", the strings that lm_eval_side.py reads, and the parts from which our scorer makes
the same strings. RESULT gets "seconds" and "processor_s", which leave out imports and loading the model, and
"log_likelihoods" [items][answers].
"""

import argparse
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from random_models import SMALL_LLAMA
from transformers import AutoConfig, AutoModelForCausalLM

from zerotune.evaluation.by_prompt import prompt_scorer
from zerotune.models.generator import load_language_model
from zerotune.models.pretrained import load_tokenizer
from zerotune.models.tiny import tiny_causal_model
from zerotune.randomness import random_order
from zerotune.run.launch import use_own_device
from zerotune.settings.groups import ModelSettings
from zerotune.settings.resolve import tokens_per_device
from zerotune.tasks.cutting import cut_texts, fit_shots
from zerotune.tasks.imdb import IMDB
from zerotune.tasks.prompts import Prompt, draw_shots, encode_prompts
from zerotune.tasks.sample import review_lines
from zerotune.tasks.sources import Origin
from zerotune.tasks.splits import balanced_subset, without_texts_of
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import read
from zerotune.training.batches import evaluation_batches

TASKS = {"imdb": IMDB, "sst2": SST2}
SAMPLE_ROWS = 4000


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    prepared, scored = commands.add_parser("prepare"), commands.add_parser("score")
    for command, run in ((prepared, prepare), (scored, score)):
        command.add_argument("model", type=Path)
        command.add_argument("prompts", type=Path)
        command.set_defaults(run=run)
    prepared.add_argument("--task", choices=tuple(TASKS), required=True)
    prepared.add_argument("--file", help="labelled texts (default: the sample's)")
    prepared.add_argument("--items", type=int, required=True)
    prepared.add_argument("--shots", type=int, required=True)
    prepared.add_argument("--positions", type=int, required=True, help="the model's window")
    scored.add_argument("result", type=Path)
    scored.add_argument("--whole", action="store_true", help="compute every prompt from its first token")
    return parser.parse_args()


def prepare(args) -> None:
    """Make the random Llama with the sample's tokenizer, items in random order, and shots that are not among them."""
    with tempfile.TemporaryDirectory() as sample:
        tiny_causal_model(Path(sample) / "model", review_lines)
        tokenizer = load_tokenizer(str(Path(sample) / "model"), None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(**SMALL_LLAMA, vocab_size=len(tokenizer), max_position_embeddings=args.positions)
    AutoModelForCausalLM.from_config(config).save_pretrained(args.model)
    tokenizer.save_pretrained(args.model)
    task = TASKS[args.task]
    source = {"path": args.file} if args.file else {"sample": (task.sample, SAMPLE_ROWS, 1)}
    examples, _ = read(task, Origin("test", **source), "give labelled rows")
    items = balanced_subset(examples, args.items, 0, "--items")
    items = [items[index] for index in random_order(len(items), 0, "order of items")]
    shots = draw_shots(without_texts_of(examples, items), args.shots, task.labels, 0)
    shots, num_shots_cut = fit_shots(tokenizer, shots, config.max_position_embeddings)
    template, label_words, instruction = task.wordings[0]
    solved = tuple((shot.text, shot.label) for shot in shots)
    prompt = Prompt(template, label_words, shots=solved, instruction=instruction)
    whole_texts = [item.text for item in items]
    texts = cut_texts(tokenizer, whole_texts, [task.max_length] * len(items))
    prompts = {
        "prompt": asdict(prompt),
        "texts": texts,
        "contexts": [prompt.render(tokenizer, text) for text in texts],
        "answers": prompt.answers(tokenizer),
        "num_shots_cut": num_shots_cut,
        "num_texts_cut": sum(before != after for before, after in zip(whole_texts, texts, strict=True)),
    }
    args.prompts.write_text(json.dumps(prompts))


def score(args) -> None:
    """Score as an eval script does: prompts tokenised, the prefix computed, items in batches of the default budget."""
    use_own_device(tiny_model=False)
    given = json.loads(args.prompts.read_text())
    prompt = Prompt(**given["prompt"] | {"shots": tuple(map(tuple, given["prompt"]["shots"]))})
    device, budget = torch.device("cpu"), tokens_per_device(None, on_gpu=16384)
    folder = str(args.model)
    model, tokenizer = load_language_model(ModelSettings(folder), device), load_tokenizer(folder, None)
    window = model.config.max_position_embeddings
    started, worked = time.perf_counter(), time.process_time()
    data = encode_prompts(tokenizer, prompt, given["texts"], window, window)
    if args.whole:
        data = replace(data, num_shared=0)
    scores = np.empty((len(data.lengths), data.num_labels), dtype=np.float32)
    with torch.no_grad():
        score_items = prompt_scorer(model, data, device)
        for items in evaluation_batches(data.lengths, budget):
            scores[items] = [record["log_probabilities"] for record in score_items(items)]
    taken = {"seconds": time.perf_counter() - started, "processor_s": time.process_time() - worked}
    assert data.num_truncated == 0, "the other side would see other strings"
    mean_tokens = float(np.mean([len(row) for row in data.rows]))
    found = taken | {"log_likelihoods": scores.tolist()}
    args.result.write_text(json.dumps(found | {"num_shared": data.num_shared, "mean_tokens": mean_tokens}))


if __name__ == "__main__":
    arguments = parse_args()
    arguments.run(arguments)
