"""Fine-tune a model to tell positive from negative sentences (SST-2), and compare it with itself before training.

    python train/sst2.py --sample
    python train/sst2.py --model distilbert/distilbert-base-uncased
    accelerate launch --num_processes 8 train/sst2.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    python train/sst2.py --model mistralai/Mistral-7B-v0.3 --method qlora --tokens-per-device 2048
    python train/sst2.py --model google/gemma-2-2b-it --method lora --head generate

The same command starts a run, resumes it, or says that it is finished.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import train_parser
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import train_settings
from zerotune.tasks.sst2 import SST2

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
    settings = train_settings(args, SST2.name, SAMPLE)
    if settings.run.plan:
        make_sample_model(settings.model.name)
        say(plan_training(settings, lambda: (SST2, load(SST2, settings.data)), partial(tokenise_for_plan, settings)))
        return
    if check_earlier_run(settings.run):
        upload_run(settings.run)
        return

    # Read the data and the model's configuration, and refuse what cannot work: nothing is loaded or written yet.
    check_run_flags(settings.run)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    splits = load(SST2, settings.data)
    make_sample_model(settings.model.name)
    config, tokenizer = read_model(settings.model, SST2.name, SST2.labels)
    check_trainable(settings.model, config, settings.text.max_length)
    check_head(settings, config, tokenizer)
    data = tokenise(settings, SST2, splits, config, tokenizer)
    whole_gradients = check_fits(settings, config, data["train"], len(SST2.labels))

    accelerator = start_accelerator(settings.deepspeed)
    with RunFolder(settings.run, accelerator) as run:
        stop_signal.raise_when_noted(accelerator, "preparation")
        start_run(run, settings, splits, data)
        evaluate_base(run, settings, SST2, splits, stop_signal)

        engine = load_engine(run, settings, config, tokenizer, SST2.labels, data["train"], whole_gradients)
        schedule = plan_schedule(settings.optimisation, settings.run, len(splits.train), len(splits.validation))

        def validate() -> dict[str, float]:
            return validate_labels(engine, data["validation"], settings.optimisation.tokens_per_device, stop_signal)

        smoothing = settings.optimisation.label_smoothing
        loop = TrainingLoop(run, engine, data["train"], schedule, settings.optimisation, validate, stop_signal)
        for step in loop:  # resumes; between two steps it logs, validates, saves and stops
            for batch in step:  # this rank's micro-batches
                logits = engine.forward(**batch.inputs)  # of labels or of answers' tokens: [targets, classes]
                losses = functional.cross_entropy(
                    logits.float(), batch.targets, label_smoothing=smoothing, reduction="none"
                )
                engine.backward((losses * batch.target_weights).sum() * batch.weight, batch.is_last)
            engine.update(step.rate_factor)

        final = save_best(loop, settings, tokenizer, task_record(settings, SST2, data["train"]))
        engine.free()
        evaluate_final(run, settings, final, SST2, splits, stop_signal)
        parts = label_parts(SST2.labels)
        print_run_table(run.path, parts)
        run.finish(loop.progress, lambda: write_report(run.path, parts))
    upload_run(settings.run)


if __name__ == "__main__":
    run_script(main, train_parser(__doc__, SST2).parse_args())
