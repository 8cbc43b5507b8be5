"""Compare questions that share their paragraph's tokens with one question per row: tokens and questions per second.

    python tests/benchmarks/shared_paragraphs.py --train-file train-v2.0.json.gz --test-file dev-v2.0.json.gz

A random Llama (6 layers, 256 wide, 8 heads) with a tokenizer made of the train file's contexts trains for an epoch on
some whole paragraphs of the train file (AdamW, batches of --batch-size questions). It then answers the questions of
some paragraphs of the test file with --max-new-tokens tokens each, because it never learns to end. Both sides are
zerotune's own: the same questions, model, optimizer and limit of tokens in a micro-batch, the same writing from cached
keys and values. The side with one question per row groups by length, so it pads little, and needs no mask. The sides
take turns in one process; the first round warms up. Speeds are medians over the other rounds, a ratio is the median of
the ratios within each round. In float32 both sides write the same answers, except for near ties of the random model's
logits; in bf16 many of these go either way.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from benchmarking import conditions, markdown_table, write_record
from random_models import SMALL_LLAMA
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from zerotune.models.generator import TextGenerator
from zerotune.models.parameters import parameter_groups
from zerotune.run.launch import start_accelerator, use_own_device
from zerotune.settings.precision import resolve_precision
from zerotune.squad.files import read_questions
from zerotune.squad.generation import GenerationData, encode_questions
from zerotune.squad.prompts import QuestionPrompt
from zerotune.squad.questions import Question
from zerotune.squad.splits import first_paragraphs
from zerotune.squad.writing import greedy_writer
from zerotune.training.engine import Engine, build_optimizer

SHARED, ALONE = "shared paragraphs", "one question a row"
WANTED = {"training": (3.5, 2.5), "evaluation": (4.0, 3.0)}  # ratios of tokens and of questions per second
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
MAX_LENGTH = 1024


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train-file", type=Path, required=True, help="SQuAD's json, also .gz")
    parser.add_argument("--test-file", type=Path, required=True, help="SQuAD's json, also .gz")
    parser.add_argument("--train-questions", type=int, default=320, help="default %(default)s")
    parser.add_argument("--test-questions", type=int, default=320, help="default %(default)s")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens of the tokenizer (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="questions a step (default %(default)s)")
    parser.add_argument("--tokens-per-device", type=int, default=2048, help="default %(default)s")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of an answer (default %(default)s)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns of each side (default %(default)s)")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


def main(args) -> None:
    use_own_device(tiny_model=False)
    torch.set_num_threads(args.threads)
    args.precision = resolve_precision(args.precision, None)
    train, test = (read_questions(path)[0] for path in (args.train_file, args.test_file))
    tokenizer = make_tokenizer(train, args.vocabulary)
    train = first_paragraphs(train, args.train_questions, 0, "benchmark")
    test = first_paragraphs(test, args.test_questions, 0, "benchmark")
    sides = {
        "training": training_sides(encode(tokenizer, train, 0), args),
        "evaluation": evaluation_sides(encode(tokenizer, test, args.max_new_tokens), args),
    }
    record = {"conditions": conditions(args.threads), "flags": {k: str(v) for k, v in vars(args).items()}}
    for phase, ways in sides.items():
        seconds = {name: [] for name in ways}
        for _ in range(args.rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                way.run()
                seconds[name].append(time.perf_counter() - started)
                print(f"{phase}, {name}: {seconds[name][-1]:.2f} s", flush=True)
        record[phase] = summary(ways, {name: taken[1:] for name, taken in seconds.items()})
    for phase, wanted in WANTED.items():
        print(f"\n{page(phase, record[phase], wanted)}")
    write_record(args.output, record)


def make_tokenizer(questions: list[Question], num_tokens: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on every tenth paragraph's words."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    contexts = list(dict.fromkeys(question.paragraph.context for question in questions))
    backend.train_from_iterator(contexts[::10], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def encode(tokenizer, questions: list[Question], num_new_tokens: int) -> dict[str, GenerationData]:
    """Tokenise the same questions for both sides."""
    data = encode_questions(tokenizer, QuestionPrompt(), questions, MAX_LENGTH, MAX_LENGTH, num_new_tokens)
    return {SHARED: data, ALONE: replace(data, shares=False)}


def random_llama(data: GenerationData, args):
    """Make the model that both sides use, from one seed."""
    torch.manual_seed(0)
    vocabulary = int(-(-max(args.vocabulary, data.token_ids.max() + 1) // 64) * 64)
    config = AutoConfig.for_model(**SMALL_LLAMA, vocab_size=vocabulary, pad_token_id=3, eos_token_id=2)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")


def training_sides(by_side: dict[str, GenerationData], args) -> dict[str, SimpleNamespace]:
    """Return each side's way to train an epoch as zerotune's loop does."""
    ways = {}
    for name, data in by_side.items():
        accelerator, model = start_accelerator(None), TextGenerator(random_llama(data, args))
        optimizer = build_optimizer("adamw", parameter_groups(model, 1e-5, None, 0.01), "cpu")
        engine = Engine(accelerator, model, optimizer, args.precision, max_grad_norm=1.0)
        steps = data.epoch_steps(args.batch_size, seed=0, epoch=0)
        micro = [data.micro_batches(step, args.tokens_per_device, 1)[0] for step in steps]

        def run(data=data, engine=engine, accelerator=accelerator, steps=steps, micro=micro) -> None:
            for step, batches in zip(steps, micro, strict=True):
                for number, rows in enumerate(batches):
                    batch = data.batch(rows, accelerator.device)
                    loss = functional.cross_entropy(engine.forward(**batch.inputs), batch.targets, reduction="sum")
                    engine.backward(loss / data.num_targets(step), number == len(batches) - 1)
                engine.update(1.0)

        ways[name] = way_of(data, run, [batch for batches in micro for batch in batches], data.groups)
    return ways


def evaluation_sides(by_side: dict[str, GenerationData], args) -> dict[str, SimpleNamespace]:
    """Return each side's way to write all answers; SHARED's can also tell the share that are the same."""
    model, ways, answers = random_llama(by_side[SHARED], args).eval(), {}, {}
    for name, data in by_side.items():
        batches = data.writing_batches(args.tokens_per_device)

        def run(data=data, batches=batches, name=name) -> None:
            write = greedy_writer(model, data, [], args.max_new_tokens, torch.device("cpu"), args.precision)
            answers[name] = {row: found for batch in batches for row, found in zip(batch, write(batch), strict=True)}

        ways[name] = way_of(data, run, batches, data.prompt_groups)
    ways[SHARED].same_answers = lambda: float(
        np.mean([answers[ALONE][row] == it for row, it in answers[SHARED].items()])
    )
    return ways


def way_of(data: GenerationData, run, batches: list[np.ndarray], groups) -> SimpleNamespace:
    """Return a side with its counts; an evaluation counts the tokens of its prompts."""
    return SimpleNamespace(
        run=run,
        num_questions=len(data.ids),
        num_batches=len(batches),
        num_tokens=sum(map(groups.num_tokens, batches)),
        num_padded_tokens=sum(map(groups.num_padded_tokens, batches)),
        same_answers=None,
    )


def summary(ways: dict[str, SimpleNamespace], seconds: dict[str, list[float]]) -> dict:
    """Return a row for each side, and the ratios."""
    rows = [
        {
            "name": name,
            **{key: getattr(way, key) for key in ("num_questions", "num_batches", "num_tokens", "num_padded_tokens")},
            "seconds": seconds[name],
            "questions_per_s": way.num_questions / median(seconds[name]),
        }
        for name, way in ways.items()
    ]
    speeds = [alone / shared for shared, alone in zip(seconds[SHARED], seconds[ALONE], strict=True)]
    tokens = {name: way.num_tokens for name, way in ways.items()}
    same = ways[SHARED].same_answers
    return {
        "rows": rows,
        "fewer_tokens": tokens[ALONE] / tokens[SHARED],
        "faster": median(speeds),
        "faster_by_round": speeds,
        "same_answers": same and same(),
    }


def page(phase: str, found: dict, wanted: tuple[float, float]) -> str:
    """Return one phase's figures as markdown."""
    columns = {
        phase: lambda row: row["name"],
        "questions": lambda row: f"{row['num_questions']:,}",
        "batches": lambda row: f"{row['num_batches']:,}",
        "tokens": lambda row: f"{row['num_tokens']:,}",
        "with padding": lambda row: f"{row['num_padded_tokens'] / row['num_tokens']:.3f} ×",
        "questions/s": lambda row: f"{row['questions_per_s']:.2f}",
    }
    rounds = ", ".join(f"{ratio:.2f}" for ratio in found["faster_by_round"])
    lines = [
        markdown_table(found["rows"], columns),
        "",
        f"{found['fewer_tokens']:.2f} × fewer tokens (wanted {wanted[0]}), "
        f"{found['faster']:.2f} × the questions per second (wanted {wanted[1]}; by round {rounds})",
    ]
    if found["same_answers"] is not None:
        lines.append(f"{100 * found['same_answers']:.1f} % of the answers are the same, token for token")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parse_args())
