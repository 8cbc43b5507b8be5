"""Few-shot evaluation with the shots computed once, against every prompt computed whole, alternated in one process.

    python tests/benchmarks/few_shot.py

A random Llama (6 layers, 256 wide, 8 heads) with the sample's tokenizer answers sample sentences behind 16 shots by the
likelihood of the label words. Both ways see the same prompts, in batches of the default token budget; `whole` plans its
own by whole lengths. The largest difference of a log-probability and the number of other choices are printed with it.
"""

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from benchmarking import conditions, markdown_table, write_record
from transformers import AutoConfig, AutoModelForCausalLM

from zerotune import sst2
from zerotune.batching import evaluation_batches
from zerotune.cpu import tokens_per_device, use_whole_cpu
from zerotune.pretrained import load_tokenizer
from zerotune.prompting import Prompt, PromptData, encode_prompts, normalise
from zerotune.samples import sample_rows, tiny_causal_model

WINDOW = 4096


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=200, help="default %(default)s")
    parser.add_argument("--shots", type=int, default=16, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, alternated (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


def main(args) -> None:
    use_whole_cpu(tiny_model=False)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, data = model_and_prompts(args.items, args.shots, device)
    ways = {"whole prompts": replace(data, num_shared=0), "shared prefix": data}
    seconds, scores = {way: [] for way in ways}, {}
    for _ in range(args.rounds):
        for way, prompts in ways.items():
            started = time.perf_counter()
            scores[way] = score(model, prompts, device)
            seconds[way].append(time.perf_counter() - started)
    speed = {way: args.items / min(taken) for way, taken in seconds.items()}
    whole, shared = scores.values()
    others = int((whole.argmax(axis=1) != shared.argmax(axis=1)).sum())
    columns = {
        "way": lambda way: way,
        "items/s": lambda way: f"{speed[way]:.1f}",
        "ratio": lambda way: f"{speed[way] / speed['whole prompts']:.2f} ×",
    }
    print(markdown_table(list(ways), columns))
    print(f"{data.num_shared} shared tokens of {np.mean([len(row) for row in data.rows]):.0f}")
    print(f"largest difference of a log-probability {np.abs(whole - shared).max():.1e}, {others} other choices")
    found = {"items_per_s": speed, "seconds": seconds, "num_shared": data.num_shared, "other_choices": others}
    write_record(args.output, {"conditions": conditions(), "items": args.items, "shots": args.shots, **found})


def model_and_prompts(num_items: int, num_shots: int, device: torch.device):
    """The random Llama and its prompts."""
    rows = sample_rows(num_items + num_shots, seed=1)
    with tempfile.TemporaryDirectory() as folder:
        tiny_causal_model(Path(folder) / "model")
        tokenizer = load_tokenizer(str(Path(folder) / "model"), None)
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        max_position_embeddings=WINDOW,
    )
    model = AutoModelForCausalLM.from_config(config).to(device).eval()
    prompt = Prompt(*sst2.WORDINGS[0], shots=tuple(rows[:num_shots]))
    return model, encode_prompts(tokenizer, prompt, [text for text, _ in rows[num_shots:]], 256, WINDOW)


def score(model, data: PromptData, device: torch.device) -> np.ndarray:
    """Log-probabilities [items, labels] of all items, as eval/sst2.py gets them."""
    scores = np.empty((len(data.lengths), data.num_labels), dtype=np.float32)
    with torch.no_grad():
        prefix = data.prefix(model, device)
        for items in evaluation_batches(data.lengths, tokens_per_device(None, on_gpu=16384)):
            scores[items] = normalise(data.log_likelihoods(model, items, device, prefix))
    return scores


if __name__ == "__main__":
    main(parse_args())
