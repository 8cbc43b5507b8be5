"""A step is the same at any world size: one and two processes, with every shipped DeepSpeed file, have one loss curve.

The bounds and their reasons are in comparing.py.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from comparing import BF16_CURVE, WEIGHTS, assert_same_curve, differences, steps_of, weight_difference, weights_of
from launching import ACCELERATE, REPOSITORY, TORCHRUN, free_port, launch
from torch.nn import functional

from zerotune.models.classifier import load_classifier
from zerotune.models.cpu_kernels import CAUSAL_ATTENTION
from zerotune.models.final_folder import load_final_or_base
from zerotune.models.pretrained import load_tokenizer, read_config
from zerotune.settings.flags import train_parser
from zerotune.settings.groups import ModelSettings
from zerotune.settings.resolve import data_settings
from zerotune.tasks.imdb import IMDB
from zerotune.tasks.sample import sample_rows
from zerotune.tasks.sst2 import SST2
from zerotune.tasks.texts import load
from zerotune.training.batches import epoch_steps, micro_batches
from zerotune.training.classification import classifier_data

CONFIGS = REPOSITORY / "ds_configs"
FULL, LORA, QLORA = [], ["--method", "lora"], ["--method", "qlora"]
REFERENCES = {"full": FULL, "lora": LORA, "qlora": QLORA}
TWO_PROCESSES = {
    "full": [None, "zero1.json", "zero2.json", "zero3.json", "zero3_offload.json"],
    "lora": [None, "zero1.json", "zero2.json", "zero3.json"],
    "qlora": [None, "qlora.json"],
}
WEIGHTED = ["--class-weights", "balanced", "--label-smoothing", 0.1, "--schedule", "cosine"]
CASES = [(method, config) for method, configs in TWO_PROCESSES.items() for config in configs]


def name_of(method, config):
    return f"two-{method}-{Path(config or 'plain').stem}"


def two_processes(workplace, method, config, *more, name=None):
    flags = REFERENCES[method] + (["--deepspeed", CONFIGS / config] if config else []) + list(more)
    return workplace.train_once(name or name_of(method, config), *flags, world=2)


def test_the_steps_differ_in_their_cut_and_ranks_get_empty_work(workplace):
    """The comparisons below rely on this."""
    args = train_parser("", SST2).parse_args(list(map(str, workplace.train_flags("unused"))))
    tokenizer = load_tokenizer(str(workplace.model), None)
    train = load(SST2, data_settings(args)).train
    lengths = np.array([len(tokenizer(example.text)["input_ids"]) for example in train])
    cuts = [
        micro_batches(step, lengths, args.tokens_per_device, 2)
        for step in epoch_steps(lengths, args.batch_size, args.seed, 0)[: args.max_steps]
    ]
    assert len({len(ranks[0]) for ranks in cuts}) > 1
    assert any(len(micro) == 0 for ranks in cuts for micros in ranks for micro in micros)


@pytest.mark.parametrize("method", REFERENCES)
def test_training_moves_weights_and_lowers_the_loss(workplace, method):
    """The references must learn, or equal curves would mean nothing."""
    run = workplace.train_once(method, *REFERENCES[method])
    losses = [row["loss"] for row in steps_of(run)]
    assert np.isfinite(losses).all() and len(set(losses)) == len(losses) == 8
    assert all(torch.isfinite(tensor).all() and tensor.dtype == torch.float32 for tensor in weights_of(run).values())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "config"), CASES)
def test_two_processes_give_the_curve_of_one(workplace, method, config):
    reference = workplace.train_once(method, *REFERENCES[method])
    run = two_processes(workplace, method, config)
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS
    assert run.read_json("run.json")["world"]["num_processes"] == 2


def test_every_shipped_configuration_is_run_above():
    assert {path.name for path in CONFIGS.iterdir()} == {config for _, config in CASES if config}


@pytest.mark.parametrize("tokens", [40, 4096])
def test_the_token_budget_does_not_change_the_curve(workplace, tokens):
    reference = workplace.train_once("full")
    run = workplace.train(f"budget-{tokens}", "--tokens-per-device", tokens)
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS


@pytest.fixture(scope="module")
def skewed(workplace):
    """Return flags to train on rows of which one in eight is positive."""
    rows = sample_rows(600, 11)
    train = [row for row in rows if row[1] == 0][:140] + [row for row in rows if row[1] == 1][:20]
    flags = []
    for name, chosen in (("train", train), ("test", rows[500:])):
        file = workplace.folder / f"skewed-{name}.tsv"
        file.write_text("text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in chosen))
        flags += [f"--{name}-file", file]
    return [*flags, *WEIGHTED]


@pytest.mark.parametrize("task", [SST2, IMDB], ids=["sst2", "imdb"])
def test_the_training_loss_has_weights_and_smoothing_and_the_validation_loss_is_plain(workplace, skewed, task):
    if task is SST2:
        run = workplace.train_once("skewed", *skewed)
    else:
        flags, folder = workplace.train_flags("skewed-imdb", *skewed), workplace.folder / "skewed-imdb"
        run = workplace.server.start("train/imdb.py", flags, folder).wait()
        assert run.codes == (0,), run.text()
    args = train_parser("", task).parse_args(list(map(str, workplace.train_flags("unused", *skewed))))
    splits, tokenizer = load(task, data_settings(args)), load_tokenizer(str(workplace.model), None)
    config = read_config(str(workplace.model), None)
    train, validation = (
        classifier_data(task, tokenizer, config, part, args.max_length, "head")
        for part in (splits.train, splits.validation)
    )
    rows = epoch_steps(train.lengths, args.batch_size, args.seed, 0)[0]
    labels, counts = torch.from_numpy(train.labels), torch.from_numpy(np.bincount(train.labels))
    weights = (len(labels) / (2 * counts))[labels[rows]]
    assert counts[0] > 5 * counts[1] and set(labels[rows].tolist()) == {0, 1}
    with torch.no_grad():
        model = load_classifier(ModelSettings(str(workplace.model)), task.labels, tokenizer)
        logits = model(**train.inputs(rows, torch.device("cpu")))
        losses = functional.cross_entropy(logits, labels[rows], label_smoothing=0.1, reduction="none")
        assert steps_of(run)[0]["loss"] == pytest.approx(float((losses * weights).sum() / weights.sum()), rel=1e-5)

        best, _, _ = load_final_or_base(ModelSettings(str(run.folder / "final")), task.labels)
        logits = best(**validation.inputs(np.arange(len(validation.ids)), torch.device("cpu")))
        plain = functional.cross_entropy(logits, torch.from_numpy(validation.labels))
    assert run.evaluations()[-1]["eval_loss"] == pytest.approx(float(plain), rel=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_curve_of_one_with_weights_and_smoothing(workplace, skewed):
    reference, run = workplace.train_once("skewed", *skewed), workplace.train("skewed-two", *skewed, world=2)
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "flags"),
    [(None, []), (None, ["--gradient-exchange", "bf16"]), ("zero2.json", []), ("zero3.json", [])],
)
def test_bf16_curves_agree_to_bf16(workplace, config, flags):
    reference = workplace.train_once("full-bf16", "--precision", "bf16")
    run = two_processes(workplace, "full", config, "--precision", "bf16", *flags, name=f"bf16-{config}-{len(flags)}")
    assert_same_curve(run, reference, BF16_CURVE)
    record = run.read_json("run.json")
    assert (record["flags"]["gradient_exchange"] == "bf16") == bool(flags)
    assert record["gradients_exchanged"] == "once a step"
    assert {tensor.dtype for tensor in weights_of(run).values()} == {torch.float32}


@pytest.mark.slow
def test_torchrun_gives_the_same_bits_as_the_warm_launcher(workplace):
    """The other tests start ranks by forking; this one uses the launcher that users type."""
    folder = workplace.folder / "torchrun"
    run = launch(
        [*TORCHRUN, free_port()], "train/sst2.py", workplace.train_flags("torchrun"), folder, workplace.environment
    )
    assert run.codes == (0,), run.text()
    warm = two_processes(workplace, "full", None)
    assert differences(run, warm) == {"loss": 0.0, "grad_norm": 0.0}
    assert weight_difference(run, warm) == 0.0


@pytest.mark.slow
def test_deepspeed_by_accelerates_own_flags_is_the_same_as_by_file(workplace):
    folder = workplace.folder / "accelerate-deepspeed"
    flags = ["--use_deepspeed", "--num_processes", 2, "--zero_stage", 2, "--main_process_port", free_port()]
    run = launch(
        [*ACCELERATE, *flags], "train/sst2.py", workplace.train_flags(folder.name), folder, workplace.environment
    )
    assert run.codes == (0,), run.text()
    by_file = two_processes(workplace, "full", "zero2.json")
    assert_same_curve(run, by_file)
    assert weight_difference(run, by_file) <= WEIGHTS


@pytest.mark.parametrize("world", [1, 2])
def test_an_evaluation_tells_the_mean_training_loss_since_the_last_one(workplace, world):
    run = workplace.train_once(f"even-{world}", "--limit-train", 112, "--eval-every", 4, world=world)
    losses = [row["loss"] for row in steps_of(run)]
    told = [row["train_loss"] for row in run.read_lines("metrics.jsonl") if "train_loss" in row]
    assert told == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], rel=1e-6)


@pytest.mark.parametrize("flags", [[], LORA, ["--head", "generate"]], ids=["full", "lora", "generate"])
def test_packed_rows_give_the_curve_of_padded_ones(workplace, flags):
    """The steps are the same but are cut differently, because padding does not count in packed rows."""
    name = "-".join(["packed", *flags[1:]])
    reference = workplace.train(f"{name}-reference", *flags) if flags else workplace.train_once("full")
    run = workplace.train(name, "--attention", "varlen", *flags)
    assert_same_curve(run, reference)
    assert weight_difference(run, reference) <= WEIGHTS
    kernels = [each.read_json("run.json")["attention"] for each in (run, reference)]
    assert kernels == ["varlen", CAUSAL_ATTENTION]
    if not flags:
        assert_same_curve(workplace.train(f"{name}-two", "--attention", "varlen", world=2), reference)
