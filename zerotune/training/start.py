"""Start a training run: check its flags, and compare its data and model with those of earlier starts."""

import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from zerotune.errors import Refused
from zerotune.files import json_sha256, why_not_writable
from zerotune.models.model_files import model_identity
from zerotune.models.upload import check_run_upload
from zerotune.run.folder import RunFolder, held_results
from zerotune.run.launch import device_name, on_all_ranks
from zerotune.run.process import say
from zerotune.run.run_files import read_run_record
from zerotune.settings.groups import RunSettings, TrainSettings
from zerotune.settings.names import is_sample_model
from zerotune.tasks.splits import Splits
from zerotune.training import checkpoints
from zerotune.training.data import TrainingData

# Entries of a DeepSpeed configuration that change the results and need not agree with the flags.
_DEEPSPEED_IDENTITY = ("zero_optimization", "communication_data_type")


def check_run_flags(settings: RunSettings) -> None:
    """Refuse early a --resume checkpoint, a --scratch-dir, a tracker or an upload that cannot work."""
    if settings.resume not in ("auto", "never"):
        folder, root = Path(settings.resume), settings.output_dir / "checkpoints"
        if not os.path.isfile(folder / checkpoints.MARKER):
            raise Refused(f"--resume {folder}: no {checkpoints.MARKER} marker: name a whole checkpoint, or use auto")
        if folder.resolve().parent != root.resolve():  # the best checkpoint and the logs are beside it
            raise Refused(
                f"--resume {folder} is not a checkpoint of this run: name one of {root}, or copy the other run's folder"
            )
        if checkpoints.holds_weights_alone(folder):
            raise Refused(
                f"--resume {folder} holds the weights of a best evaluation without the optimizer's state: name a "
                "step-… folder, or use --resume auto"
            )
    scratch = settings.scratch_dir
    if scratch is not None and (reason := why_not_writable(scratch)):
        raise Refused(f"--scratch-dir {scratch} cannot be written ({reason}): name another folder, or leave it out")
    if settings.tracker == "wandb" and find_spec("wandb") is None:
        raise Refused("--tracker wandb needs wandb, which is not installed: pip install -e '.[wandb]'")
    if settings.push_to_hub:
        flags = settings.flags.values
        check_run_upload(settings.push_to_hub, str(flags["model"]), str(flags["method"]))


def _way_back(changed: list[str], earlier: dict) -> str:
    """Return how to resume a run with its earlier inputs: flags that pin what it had chosen, else restoring files."""
    flags = []
    for name in changed:
        value = str(earlier.get(name))
        if name == "precision":
            flags.append(f"--precision {value}")
        if name == "model_files" and value.startswith("commit "):
            flags.append(f"--revision {value.removeprefix('commit ')}")
    return f"add {' '.join(flags)} to resume it" if len(flags) == len(changed) else "restore them"


def start_run(run: RunFolder, settings: TrainSettings, splits: Splits, data: dict[str, TrainingData]) -> None:
    """Check that all ranks and all starts of a run have the same data and model, and write run.json and split.json.

    Args:
        data: the tokenised splits by name; printed with their sizes.
    Raises:
        Refused: the ranks differ in their data, model or settings, or an earlier start of the run had others.
    """
    accelerator, deepspeed = run.accelerator, settings.deepspeed
    identity = {
        "model_files": model_identity(settings.model.name, settings.model.revision),
        "data": {name: source["sha256"] for name, source in splits.record["sources"].items()},
        "splits": splits.record["splits"],
        "precision": settings.model.precision,
        "deepspeed": {name: deepspeed.get(name) for name in _DEEPSPEED_IDENTITY} if deepspeed else None,
    }
    each = on_all_ranks(accelerator, identity)
    if differing := [name for name in identity if len({json_sha256(one[name]) for one in each}) > 1]:
        raise Refused(
            f"the ranks differ in {', '.join(differing)}: put files on a disk that all nodes share, and "
            "where the GPUs differ give --precision"
        )
    if len(set(on_all_ranks(accelerator, data["train"].packs))) > 1:
        raise Refused("the GPUs differ: only some can run the kernel for rows without padding; use --attention sdpa")
    path = run.path / "run.json"
    earlier = (read_run_record(path).get("identity") if held_results(run.path) else None) or identity
    changed = [name for name, value in identity.items() if json_sha256(earlier.get(name)) != json_sha256(value)]
    if changed:
        raise Refused(
            f"{run.path} was started with other inputs ({', '.join(changed)} changed since): "
            f"{_way_back(changed, earlier)}, or use another --output-dir"
        )
    accelerator.wait_for_everyone()  # all ranks must have read it before rank 0 writes
    run.describe(splits.record, identity=identity)
    device, processes = device_name(accelerator.device), accelerator.num_processes
    say(f"run {run.path}: on {f'{processes} × ' if processes > 1 else ''}{device}, {settings.model.precision}")
    run.start_tracker()
    if settings.data.sample and accelerator.device.type == "cpu" and not is_sample_model(settings.model.name):
        four_bits = ", and 4-bit weights are slow there: --method lora is faster" * (settings.model.method == "qlora")
        say(
            f"{settings.model.name} trains on a CPU here{four_bits}; the sample has {len(data['train'].ids):,} rows: "
            "--limit-train 500 is a quick try"
        )
    max_length = settings.text.max_length or settings.questions.max_length
    limit = f"to {max_length} tokens" if max_length else "to fit"
    for name, part in data.items():
        cut = f", {part.num_truncated:,} cut {limit}" if part.num_truncated else ""
        say(f"{name}: {len(part.ids):,} rows, {part.num_tokens(np.arange(len(part.ids))):,} tokens{cut}")
