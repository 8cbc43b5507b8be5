"""Measure the cost of a save: written while training waits, in the background from host memory, or via --scratch-dir.

    python tests/benchmarks/checkpoint_stall.py --scratch-dir /dev/shm --output-dir runs/stall

Trains a model of DistilBERT's shape (full, random weights, on one CPU thread, so that a core is free for the writing;
--threads 2 leaves none on a machine with two cores) and saves every few steps. The ways take turns, with runs that
never save.

`stall of a save` is the time between the end of one step and the start of the next, for each save after the first,
which also makes the memory or folder that the others reuse (`of the first`); `slower steps` is the time that the steps
between saves lose to the writing, against the run without saves; `share of the wall time` is the sum of both at one
save a minute; `at the end` is the wait before the exit.
"""

import argparse
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch
from benchmarking import REPOSITORY, conditions, markdown_table, write_record
from random_models import SHAPES, random_model, random_rows, settings_for
from torch.nn import functional

from zerotune.models.classifier import SequenceClassifier
from zerotune.models.parameters import parameter_groups
from zerotune.models.used_rows import train_used_rows
from zerotune.run import launch
from zerotune.run.folder import RunFolder
from zerotune.training import checkpoints, saving
from zerotune.training.engine import Engine, build_optimizer
from zerotune.training.loop import TrainingLoop
from zerotune.training.schedule import Schedule

sys.path.append(str(REPOSITORY / "tests"))

WAYS = ("no saves", "synchronous", "background", "scratch")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch-dir", type=Path, default=Path("/dev/shm"), help="default %(default)s")
    parser.add_argument("--output-dir", type=Path, help="a folder on the disk to save to (default: a temporary one)")
    parser.add_argument("--steps", type=int, default=12, help="timed in each turn (default %(default)s)")
    parser.add_argument("--save-every", type=int, default=4, help="steps (default %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="rows (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of training on a CPU (default %(default)s)")
    parser.add_argument("--toy", action="store_true", help="a few thousand weights: to try the script")
    parser.add_argument("--output", type=Path, help="json file for the record")
    return parser.parse_args()


def main(args) -> None:
    torch.set_num_threads(args.threads)
    engine, data = build(args)
    turns = {way: [] for way in WAYS}
    run_turn(args, engine, data, "no saves")  # to warm up
    for number in range(args.rounds):
        for way in WAYS if number % 2 == 0 else reversed(WAYS):
            turns[way].append(run_turn(args, engine, data, way))
    undisturbed = median(turn["steps_s"] for turn in turns["no saves"])
    num_saves = args.steps // args.save_every
    rows = []
    for way in WAYS[1:]:
        first_s = median(turn["stalls_s"][0] for turn in turns[way])
        stall_s = median(stall for turn in turns[way] for stall in turn["stalls_s"][1:])
        slower_s = (median(turn["steps_s"] for turn in turns[way]) - undisturbed) / num_saves
        rows.append(
            {"way": way, "first_s": first_s, "stall_s": stall_s, "slower_s": slower_s, "end_s": turns[way][-1]["end_s"]}
        )
    megabytes = engine.checkpoint_bytes() / 1e6
    print(
        f"a checkpoint of {megabytes:.0f} MB every {args.save_every} steps, {args.steps} steps in {undisturbed:.1f} s"
    )
    for row in rows:
        row["share"] = (row["stall_s"] + row["slower_s"]) / 60
    columns = {
        "way": lambda row: row["way"],
        "stall of a save": lambda row: f"{row['stall_s']:.3f} s",
        "of a synchronous one": lambda row: f"{row['stall_s'] / rows[0]['stall_s']:.3f}",
        "of the first": lambda row: f"{row['first_s']:.3f} s",
        "slower steps": lambda row: f"{row['slower_s']:.3f} s",
        "share of the wall time": lambda row: f"{row['share']:.2%}",
        "at the end": lambda row: f"{row['end_s']:.3f} s",
    }
    print(markdown_table(rows, columns))
    write_record(
        args.output, {"conditions": conditions(args.threads), "bytes": megabytes * 1e6, "ways": rows, "turns": turns}
    )


def build(args) -> tuple[Engine, object]:
    """Build an engine around a model with random weights, and rows to train it on."""
    shape = next(shape for shape in SHAPES if shape.name == "DistilBERT")
    config, settings = shape.config(args.toy), settings_for(shape, "fp32")
    accelerator = launch.start_accelerator(None)
    torch.manual_seed(0)
    classifier = SequenceClassifier(random_model(config, settings, accelerator.device))
    data = random_rows(args.steps * args.batch_size, config.vocab_size, seed=0)
    train_used_rows(classifier.stock_model, np.union1d(data.encoded.ids, [data.pad_id]))
    groups = parameter_groups(classifier, 1e-5, 5e-5, 0.01)
    optimizer = build_optimizer("adamw", groups, accelerator.device.type)
    return Engine(accelerator, classifier, optimizer, settings.precision, max_grad_norm=1.0), data


def run_turn(args, engine: Engine, data, way: str) -> dict:
    """Return the seconds of all steps, of each save's gap between steps, and of the wait at the end."""
    from default_settings import optimisation_settings, run_settings

    never = 2 * args.steps
    every = never if way == "no saves" else args.save_every
    schedule = Schedule(never, args.steps, 0, eval_every=never, checkpoint_every=every, log_every=never)
    optimisation = optimisation_settings(batch_size=args.batch_size, learning_rate=1e-5)
    with tempfile.TemporaryDirectory(dir=args.output_dir) as folder:
        scratch_dir = args.scratch_dir if way == "scratch" else None
        saving.LARGEST_SNAPSHOT = 0.0 if way == "synchronous" else 1.0
        run = RunFolder(run_settings(Path(folder), keep_checkpoints=1, scratch_dir=scratch_dir), engine.accelerator)
        loop = TrainingLoop(run, engine, data, schedule, optimisation, None, SimpleNamespace(name=None))
        steps_s, stalls_s = 0.0, [0.0] * max(1, args.steps // every)
        ended = None
        for step in loop:
            started = time.perf_counter()
            if step.number > every:
                stalls_s[(step.number - 1) // every - 1] += started - ended
            if step.number > args.steps:
                break
            for batch in step:
                loss = functional.cross_entropy(engine.forward(**batch.inputs), batch.targets, reduction="sum")
                engine.backward(loss * batch.weight, batch.is_last)
            engine.update(step.rate_factor)
            ended = time.perf_counter()
            steps_s += ended - started
        started = time.perf_counter()
        loop.saver.close()
        end_s = time.perf_counter() - started
        root = loop.saver.root
        if way != "no saves":
            found, _ = checkpoints.newest_whole(root)
            assert found == checkpoints.step_folder(root, args.steps // every * every)
        shutil.rmtree(root, ignore_errors=True)
    return {"steps_s": steps_s, "stalls_s": stalls_s, "end_s": end_s}


if __name__ == "__main__":
    main(parse_args())
