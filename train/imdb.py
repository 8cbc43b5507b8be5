"""Fine-tune a model to tell positive from negative film reviews (IMDB), and compare it with itself before training.

    python train/imdb.py --sample
    python train/imdb.py --split 70-10-20 --output-dir runs/imdb-loop
    python train/imdb.py --split 70-10-20 --output-dir runs/imdb-trainer --engine trainer
    accelerate launch --num_processes 8 train/imdb.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    python train/imdb.py --model mistralai/Mistral-7B-Instruct-v0.3 --method qlora --head generate

The same command starts a run, resumes it, or says that it is finished.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import train_parser, with_engine_flag
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import train_settings
from zerotune.tasks.imdb import IMDB

# How the tiny model of --sample is trained; flags on the command line override this.
SAMPLE = {"epochs": 3, "learning_rate": 1e-3}


def main(args) -> None:
    if args.runs:  # --seeds, --sweep: a process for each run
        from zerotune.sweep.run import run_all

        return run_all(args.runs)

    from functools import partial

    from torch.nn import functional

    from zerotune.evaluation.text import evaluate_base, evaluate_final
    from zerotune.evaluation.validation import validate_labels
    from zerotune.models.loading import check_trainable
    from zerotune.models.pretrained import read_model
    from zerotune.models.upload import upload_run
    from zerotune.report.label_parts import label_parts
    from zerotune.report.run_report import print_run_table, write_report
    from zerotune.run.folder import RunFolder, check_earlier_run
    from zerotune.run.launch import start_accelerator, use_own_device
    from zerotune.run.stopping import StopSignal
    from zerotune.tasks.sample import make_sample_model
    from zerotune.tasks.texts import load
    from zerotune.training.engine import load_engine
    from zerotune.training.final import save_best
    from zerotune.training.loop import TrainingLoop
    from zerotune.training.plan import check_fits, plan_training
    from zerotune.training.schedule import plan_schedule
    from zerotune.training.start import check_run_flags, start_run
    from zerotune.training.text import check_head, task_record, tokenise, tokenise_for_plan

    stop_signal = StopSignal()
    settings = train_settings(args, IMDB.name, SAMPLE)
    if settings.engine == "trainer":
        from zerotune.training.trainer import TrainerOrder, check_trainer_flags, train_with_trainer

        check_trainer_flags(settings)
    if settings.run.plan:
        make_sample_model(settings.model.name)
        say(plan_training(settings, lambda: (IMDB, load(IMDB, settings.data)), partial(tokenise_for_plan, settings)))
        return
    if check_earlier_run(settings.run):
        upload_run(settings.run)
        return

    # Read the data and the model's configuration, and refuse what cannot work: nothing is loaded or written yet.
    check_run_flags(settings.run)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    splits = load(IMDB, settings.data)
    make_sample_model(settings.model.name)
    config, tokenizer = read_model(settings.model, IMDB.name, IMDB.labels)
    check_trainable(settings.model, config, settings.text.max_length)
    check_head(settings, config, tokenizer)
    data = tokenise(settings, IMDB, splits, config, tokenizer)
    whole_gradients = check_fits(settings, config, data["train"], len(IMDB.labels))

    accelerator = start_accelerator(settings.deepspeed)
    with RunFolder(settings.run, accelerator) as run:
        stop_signal.raise_when_noted(accelerator, "preparation")
        start_run(run, settings, splits, data)
        evaluate_base(run, settings, IMDB, splits, stop_signal)

        engine = load_engine(run, settings, config, tokenizer, IMDB.labels, data["train"], whole_gradients)
        schedule = plan_schedule(settings.optimisation, settings.run, len(splits.train), len(splits.validation))

        def validate() -> dict[str, float]:
            return validate_labels(engine, data["validation"], settings.optimisation.tokens_per_device, stop_signal)

        train = TrainerOrder(**vars(data["train"])) if settings.engine == "trainer" else data["train"]
        smoothing = settings.optimisation.label_smoothing
        loop = TrainingLoop(run, engine, train, schedule, settings.optimisation, validate, stop_signal)
        if settings.engine == "trainer":
            train_with_trainer(loop, settings)  # transformers.Trainer takes the steps
        else:
            for step in loop:  # resumes; between two steps it logs, validates, saves and stops
                for batch in step:  # this rank's micro-batches
                    logits = engine.forward(**batch.inputs)  # of labels or of answers' tokens: [targets, classes]
                    losses = functional.cross_entropy(
                        logits.float(), batch.targets, label_smoothing=smoothing, reduction="none"
                    )
                    engine.backward((losses * batch.target_weights).sum() * batch.weight, batch.is_last)
                engine.update(step.rate_factor)

        final = save_best(loop, settings, tokenizer, task_record(settings, IMDB, data["train"]))
        engine.free()
        evaluate_final(run, settings, final, IMDB, splits, stop_signal)
        parts = label_parts(IMDB.labels)
        print_run_table(run.path, parts)
        run.finish(loop.progress, lambda: write_report(run.path, parts))
    upload_run(settings.run)


if __name__ == "__main__":
    run_script(main, with_engine_flag(train_parser(__doc__, IMDB)).parse_args())
