"""Check that zerotune gives the same answers as other tools for a real model, on a CPU in float32.

    python tests/benchmarks/agreement.py choices --model MODEL --task sst2 --train-file train.tsv.gz \\
        --test-file validation.tsv.gz --items 200 --shots 0 4 --lm-eval-python lm-eval-venv/bin/python
    python tests/benchmarks/agreement.py adapter RUN
    python tests/benchmarks/agreement.py span RUN --items 200
    python tests/benchmarks/agreement.py losses --model MODEL --train-file train.tsv.gz --test-file validation.tsv.gz

choices: the choices an eval script makes by likelihood, against EleutherAI's lm-evaluation-harness given the same
strings (tests/fixtures/record_lm_eval.py says how to install it). adapter: a run of train/sst2.py or train/imdb.py with
`--method lora --head classify`, evaluated again, against its final/ in plain peft, one text at a time. span: answers
of a run of train/qa.py with `--head span`, full tuning of a family that transformers has a span model for (not Gemma),
against that model, for questions whose context fits one window; transformers 5 no longer has a question-answering
pipeline. losses: the first steps of train/sst2.py with LoRA, against a plain Trainer with the same weights, rows and
rates.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarking import REPOSITORY

SHOWN_CHOICES = 5
LOSS_FLAGS = {"method": "lora", "precision": "fp32", "learning-rate": 5e-4, "head-learning-rate": 5e-4, "epochs": 1}
WEIGHT_DECAY = 0.01  # the default of train/sst2.py


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    choices = commands.add_parser("choices")
    choices.add_argument("--task", choices=("sst2", "imdb"), required=True)
    choices.add_argument("--items", type=int, default=200, help="default %(default)s")
    choices.add_argument("--shots", type=int, nargs="+", default=[0, 4], help="default 0 4")
    choices.add_argument("--lm-eval-python", required=True, help="interpreter of an environment that has lm-eval")
    losses = commands.add_parser("losses")
    losses.add_argument("--steps", type=int, default=20, help="default %(default)s")
    losses.add_argument("--batch-size", type=int, default=32, help="default %(default)s")
    for command in (choices, losses):
        command.add_argument("--model", required=True)
        command.add_argument("--train-file", required=True)
        command.add_argument("--test-file", required=True)
    adapter, span = commands.add_parser("adapter"), commands.add_parser("span")
    span.add_argument("--items", type=int, default=200, help="questions looked at (default %(default)s)")
    for command in (adapter, span):
        command.add_argument("run_folder", type=Path, metavar="RUN")
    ways = ((choices, compare_choices), (losses, compare_losses), (adapter, compare_adapter), (span, compare_spans))
    for command, compare in ways:
        command.set_defaults(compare=compare)
    return parser.parse_args()


def run_script(script: str, flags: dict) -> None:
    """Run a script of the repository with these flags; exit with the end of its output if it fails."""
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    child = subprocess.run([sys.executable, str(REPOSITORY / script), *words], capture_output=True, text=True)
    if child.returncode:
        sys.exit(child.stdout[-2000:] + child.stderr[-2000:])


def lines_of(path: Path) -> list[dict]:
    with path.open(encoding="utf-8", newline="\n") as lines:  # not splitlines: it also splits at U+0085 in a review
        return [json.loads(line) for line in lines]


def texts_of(task_name: str, results: Path, test_file: str) -> list[str]:
    """Return the full texts of an evaluation's items from their file; predictions.jsonl has only their beginnings."""
    from zerotune.tasks.sources import Origin
    from zerotune.tasks.texts import read

    texts = {row.id: row.text for row in read(tasks()[task_name], Origin("test", path=test_file))[0]}
    return [texts[line["id"]] for line in lines_of(results / "predictions.jsonl")]


def tasks() -> dict:
    """Return the tasks that have label words, by name."""
    from zerotune.tasks.imdb import IMDB
    from zerotune.tasks.sst2 import SST2

    return {"sst2": SST2, "imdb": IMDB}


def say_agreement(what: str, ours: list, theirs: list, difference: float) -> None:
    same = sum(one == other for one, other in zip(ours, theirs, strict=True))
    print(f"{what}: {same} of {len(ours)} the same; largest difference of a score {difference:.2g}", flush=True)


# --- choices: lm-evaluation-harness ---


def compare_choices(args) -> None:
    for shots in args.shots:
        with tempfile.TemporaryDirectory() as folder:
            results = Path(folder) / "results"
            flags = {"model": args.model, "train-file": args.train_file, "test-file": args.test_file}
            flags |= {"limit-eval": args.items, "shots": shots, "precision": "fp32", "output-dir": results}
            run_script(f"eval/{args.task}.py", flags)
            contexts, answers = strings_of(results, args)
            given, found = Path(folder) / "prompts.json", Path(folder) / "found.json"
            given.write_text(json.dumps({"contexts": contexts, "answers": answers}))
            side = str(Path(__file__).with_name("lm_eval_side.py"))
            command = [args.lm_eval_python, side, args.model, str(given), str(found)]
            subprocess.run([*command, "--batch-size", "1", "--items", str(len(contexts))], check=True)
            ours = lines_of(results / "predictions.jsonl")
            theirs = json.loads(found.read_text())["log_likelihoods"]
            gaps = [abs((a["scores"][1] - a["scores"][0]) - (b[1] - b[0])) for a, b in zip(ours, theirs, strict=True)]
            chosen = [scores.index(max(scores)) for scores in theirs]
            what = f"{args.task}, {shots} shots, choices by zerotune and lm-evaluation-harness"
            say_agreement(what, [line["prediction"] for line in ours], chosen, max(gaps))


def strings_of(results: Path, args) -> tuple[list[str], list[str]]:
    """Rebuild an evaluation's prompts as strings from its folder; return them and the answers."""
    from zerotune.models.pretrained import load_tokenizer
    from zerotune.tasks.cutting import cut_texts
    from zerotune.tasks.prompts import Prompt
    from zerotune.tasks.sources import Origin
    from zerotune.tasks.texts import read

    metrics, tokenizer = json.loads((results / "metrics.json").read_text()), load_tokenizer(args.model, None)
    if metrics["num_shots_truncated"]:
        sys.exit("some shots were cut: fewer --shots")
    rows = {row.id: row for row in read(tasks()[args.task], Origin("train", path=args.train_file))[0]}
    shots = tuple((rows[name].text, rows[name].label) for name in metrics["shot_ids"])
    prompt = Prompt(metrics["prompt"], tuple(metrics["label_words"]), shots=shots, instruction=metrics["instruction"])
    texts = texts_of(args.task, results, args.test_file)
    cut = cut_texts(tokenizer, texts, [metrics["max_length"]] * len(texts))
    return [prompt.render(tokenizer, text) for text in cut], prompt.answers(tokenizer)


# --- adapter: plain peft ---


def compare_adapter(args) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    final, record = args.run_folder / "final", json.loads((args.run_folder / "run.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        flags = {"model": args.run_folder, "precision": "fp32", "output-dir": results}
        run_script(f"eval/{record['task']}.py", flags)
        lines = lines_of(results / "predictions.jsonl")
        texts = texts_of(record["task"], results, record["flags"]["test_file"])
        max_length = json.loads((results / "metrics.json").read_text())["max_length"]
    tokenizer = AutoTokenizer.from_pretrained(final)
    config = AutoConfig.from_pretrained(final, subfolder="config")
    base, how = record["flags"]["model"], {"config": config, "dtype": torch.float32}
    stock = AutoModelForSequenceClassification.from_pretrained(base, **how)
    model = PeftModel.from_pretrained(stock, final).eval()
    scores = []
    with torch.no_grad():
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=max_length, return_tensors="pt")
            scores.append(model(**inputs).logits[0].log_softmax(-1).tolist())
    ours = torch.tensor([line["scores"] for line in lines]).log_softmax(-1)
    difference = float((ours - torch.tensor(scores)).abs().max())
    chosen = [each.index(max(each)) for each in scores]
    say_agreement("predictions of eval/ and of plain peft", [line["prediction"] for line in lines], chosen, difference)


# --- span: plain transformers ---


def compare_spans(args) -> None:
    import torch
    from transformers import AutoModelForQuestionAnswering, AutoTokenizer

    from zerotune.squad.files import read_questions

    final, record = args.run_folder / "final", json.loads((args.run_folder / "run.json").read_text())
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results"
        flags = {"model": args.run_folder, "precision": "fp32", "limit-eval": args.items, "output-dir": results}
        run_script("eval/qa.py", flags)
        lines = lines_of(results / "predictions.jsonl")
        metrics = json.loads((results / "metrics.json").read_text())
    questions = {question.id: question for question in read_questions(Path(record["flags"]["test_file"]))[0]}
    tokenizer = AutoTokenizer.from_pretrained(final)
    model = AutoModelForQuestionAnswering.from_pretrained(final, dtype=torch.float32).eval()
    ours, theirs = [], []
    for line in lines:
        question = questions[line["id"]]
        context = question.paragraph.context
        inputs = tokenizer(question.text, context, return_offsets_mapping=True, return_tensors="pt")
        if inputs["input_ids"].shape[1] > metrics["max_length"]:
            continue
        offsets, owners = inputs.pop("offset_mapping")[0].tolist(), inputs.sequence_ids(0)
        with torch.no_grad():
            output = model(**inputs)
        theirs.append(best_span(output, offsets, owners, context, metrics["max_answer_length"]))
        ours.append(line["n_best"][0]["text"])
    say_agreement("best spans of eval/qa.py and of plain transformers", ours, theirs, 0.0)


def best_span(output, offsets, owners, context: str, longest: int) -> str:
    """Return the text of the span in the context with the highest sum of start and end logits."""
    starts, ends = output.start_logits[0], output.end_logits[0]
    places = [place for place, owner in enumerate(owners) if owner == 1]
    pairs = [(first, last) for first in places for last in range(first, first + longest) if last <= places[-1]]
    first, last = max(pairs, key=lambda pair: float(starts[pair[0]] + ends[pair[1]]))
    return context[offsets[first][0] : offsets[last][1]]


# --- losses: a plain Trainer ---


def compare_losses(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        files = {"model": args.model, "train-file": args.train_file, "test-file": args.test_file}
        flags = files | LOSS_FLAGS | {"batch-size": args.batch_size, "max-steps": args.steps, "log-every": 1}
        flags |= {"base-eval": "none", "limit-eval": 10, "output-dir": run}
        run_script("train/sst2.py", flags)
        ours = [line["loss"] for line in lines_of(run / "metrics.jsonl") if "loss" in line]
        theirs = trainer_losses(args, flags, folder)
    pairs = list(zip(ours, theirs, strict=True))
    for number, (one, other) in enumerate(pairs, start=1):
        print(f"step {number}: {one:.6f} {other:.6f}")
    print(f"largest difference of {len(pairs)} losses: {max(abs(one - other) for one, other in pairs):.2g}")


def trainer_losses(args, flags: dict, folder: str) -> list[float]:
    """Return the losses of a Trainer that starts from our run's weights and reads the same rows in the same order."""
    import torch
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    from zerotune.models.pretrained import load_tokenizer, read_model
    from zerotune.settings.flags import train_parser
    from zerotune.settings.resolve import train_settings
    from zerotune.tasks.sst2 import SST2
    from zerotune.tasks.texts import load
    from zerotune.training.engine import load_tuned_model
    from zerotune.training.schedule import plan_schedule
    from zerotune.training.text import tokenise

    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    settings = train_settings(train_parser("", SST2).parse_args([*words, "--attention", "sdpa"]), SST2.name, {})
    splits, (config, tokenizer) = load(SST2, settings.data), read_model(settings.model, SST2.name, SST2.labels)
    data = tokenise(settings, SST2, splits, config, tokenizer)["train"]
    model = load_tuned_model(settings.model, "classify", SST2.labels, tokenizer).stock_model
    order = [row for step in data.epoch_steps(args.batch_size, 0, 0)[: args.steps] for row in step]
    texts = load_tokenizer(args.model, None)
    rows = [
        dict(texts(splits.train[row].text, truncation=True, max_length=256)) | {"labels": splits.train[row].label}
        for row in order
    ]
    schedule = plan_schedule(settings.optimisation, settings.run, len(splits.train))
    arguments = TrainingArguments(
        output_dir=str(Path(folder) / "trainer"),
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps,
        train_sampling_strategy="sequential",
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad],
        lr=LOSS_FLAGS["learning-rate"],
        weight_decay=WEIGHT_DECAY,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: schedule.rate_factor(done + 1))
    trainer = Trainer(model, arguments, DataCollatorWithPadding(texts), rows, optimizers=(optimizer, rates))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    arguments = parse_args()
    arguments.compare(arguments)
