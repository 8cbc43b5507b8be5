"""final/: the best checkpoint, saved as a model that loads without zerotune."""

import shutil
from pathlib import Path

from zerotune.errors import Refused
from zerotune.files import json_sha256, sync_folder
from zerotune.models.final_folder import save_final
from zerotune.models.movement import weight_movement
from zerotune.models.used_rows import restore_whole_embedding
from zerotune.run.folder import PATH_FLAGS, RunFolder
from zerotune.run.launch import from_rank_0
from zerotune.run.process import is_main_process
from zerotune.run.run_files import read_metrics_lines, read_run_record
from zerotune.settings.groups import FREE_FLAGS, TrainSettings
from zerotune.training import checkpoints
from zerotune.training.generation import chat_record
from zerotune.training.loop import TrainingLoop


def save_best(loop: TrainingLoop, settings: TrainSettings, tokenizer, record: dict) -> Path:
    """Write final/ from the best checkpoint, to a temporary folder that is then renamed. All ranks take part.

    Args:
        record: task.json's entries about the task: task, head, prompt, labels, thresholds, how texts are cut.
    Raises:
        Refused: the best checkpoint is damaged.
    """
    engine, progress, final = loop.engine, loop.progress, loop.run.path / "final"
    if progress.best_step != progress.step:
        best = checkpoints.weights_folder(loop.saver.root, progress.best_step)
        problem = from_rank_0(loop.accelerator, lambda: checkpoints.defect(best, loop.run.run_id))
        if problem:
            raise Refused(
                f"the best checkpoint {best} is damaged ({problem}) and final/ is made from it: restore it, or "
                f"delete {loop.saver.root} and start the same command again"
            )
        engine.load(best, weights_alone=True)
    loop.apply_unused_decay(progress.best_step)
    restore_whole_embedding(engine.module.stock_model)
    state = engine.gathered_state_dict()
    if state is not None:  # names of the module, but those of its inner model are needed
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if is_main_process():
        place = final.resolve()  # final/ may be a link to another disk
        aside = place.with_name(".writing-final")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        identity = read_run_record(loop.run.path / "run.json").get("identity", {})
        record = record | {
            "seed": settings.optimisation.seed,
            "best_step": progress.best_step,
            "choose_by": settings.optimisation.choose_by,
            "engine": settings.engine,
            "training_sha256": _training_sha256(settings, loop.data.ids, identity),
        }
        if (record["prompt"] or {}).get("format") == "chat":
            record["chat"] = chat_record(tokenizer)
        save_final(engine.module, tokenizer, aside, record, state)
        sync_folder(aside)
        shutil.rmtree(place, ignore_errors=True)
        aside.rename(place)
        sync_folder(place.parent)
        loop.run.update_json(
            "parameters.json", moved=weight_movement(place, settings.model.name, settings.model.revision)
        )
    loop.accelerator.wait_for_everyone()
    return final


def _training_sha256(settings: TrainSettings, ids: list[str], identity: dict) -> str:
    """Return a hash of flags, data and base model, equal for runs that differ only in their seed or FREE_FLAGS.

    Paths are left out: `identity` has hashes of what they lead to.

    Args:
        identity: of run.json.
    """
    left_out = (*FREE_FLAGS, *PATH_FLAGS, "seed")
    flags = {name: value for name, value in settings.run.flags.values.items() if name not in left_out}
    return json_sha256([flags, ids, identity])


def logged_evaluation(run: RunFolder, step: int) -> dict:
    """Return a step's evaluation from metrics.jsonl on rank 0, {} on other ranks.

    Raises:
        Refused: the file has no evaluation of this step.
    """
    if not is_main_process():
        return {}
    rows = read_metrics_lines(run.metrics_path)
    found = [row for row in rows if row["step"] == step and "eval_loss" in row]
    if not found:
        raise Refused(f"{run.metrics_path} holds no evaluation of step {step}, the best one: restore the file")
    return found[-1]
