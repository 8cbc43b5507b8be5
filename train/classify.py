"""Fine-tune a model to tell labels of your own apart, and compare it with itself before training.

    python train/classify.py --sample
    python train/classify.py --train-file tickets.csv --text-column subject,body --label-column queue
    python train/classify.py --dataset org/name --model FacebookAI/roberta-base --epochs 5
    python train/classify.py --glue mrpc --model microsoft/deberta-v3-base
    accelerate launch --num_processes 8 train/classify.py --train-file tickets.csv \\
        --model mistralai/Mistral-7B-v0.3 --method qlora --head generate
    python train/classify.py --multi-label --train-file tickets.jsonl --label-column queues

Labels are words or numbers, two or more of them, read from the training rows. With --multi-label a text has none, one
or several of them. Without files for validation and test a tenth of the rows validates and a tenth tests. The same
command starts a run, resumes it, or says that it is finished.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import LABEL_METRICS, LABEL_SET_METRICS, train_parser
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import train_settings
from zerotune.tasks.classify import GLUE, OWN, load

CHOOSE_BY = tuple(dict.fromkeys((*LABEL_METRICS, *LABEL_SET_METRICS)))
# How the tiny model of --sample is trained; flags on the command line override this.
SAMPLE = {"epochs": 3, "learning_rate": 1e-3}


def main(args) -> None:
    if args.runs:  # --seeds, --sweep: a process for each run
        from zerotune.sweep.run import run_all

        return run_all(args.runs)

    from functools import partial

    from torch.nn import functional

    from zerotune.evaluation.text import evaluate_base, evaluate_final
    from zerotune.evaluation.validation import validate_label_sets, validate_labels
    from zerotune.models.loading import check_trainable
    from zerotune.models.pretrained import read_model
    from zerotune.models.upload import upload_run
    from zerotune.report.label_parts import label_parts, label_set_parts
    from zerotune.report.run_report import print_run_table, write_report
    from zerotune.run.folder import RunFolder, check_earlier_run
    from zerotune.run.launch import start_accelerator, use_own_device
    from zerotune.run.stopping import StopSignal
    from zerotune.tasks.labels import count_line
    from zerotune.tasks.sample import make_sample_model
    from zerotune.training.engine import load_engine
    from zerotune.training.final import save_best
    from zerotune.training.loop import TrainingLoop
    from zerotune.training.plan import check_fits, plan_training
    from zerotune.training.schedule import plan_schedule
    from zerotune.training.start import check_run_flags, start_run
    from zerotune.training.text import check_head, task_record, tokenise, tokenise_for_plan

    stop_signal = StopSignal()
    settings = train_settings(args, OWN.name, SAMPLE)
    if settings.run.plan:
        make_sample_model(settings.model.name)
        say(plan_training(settings, lambda: load(settings.data), partial(tokenise_for_plan, settings)))
        return
    if check_earlier_run(settings.run):
        upload_run(settings.run)
        return

    # Read the data and the model's configuration, and refuse what cannot work: nothing is loaded or written yet.
    check_run_flags(settings.run)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    task, splits = load(settings.data)
    say(count_line(splits.record["splits"]["train"]["labels"]))
    make_sample_model(settings.model.name)
    config, tokenizer = read_model(settings.model, task.name, task.labels)
    check_trainable(settings.model, config, settings.text.max_length)
    check_head(settings, config, tokenizer)
    data = tokenise(settings, task, splits, config, tokenizer)
    whole_gradients = check_fits(settings, config, data["train"], len(task.labels))

    accelerator = start_accelerator(settings.deepspeed)
    with RunFolder(settings.run, accelerator) as run:
        stop_signal.raise_when_noted(accelerator, "preparation")
        start_run(run, settings, splits, data)
        evaluate_base(run, settings, task, splits, stop_signal)

        engine = load_engine(run, settings, config, tokenizer, task.labels, data["train"], whole_gradients)
        schedule = plan_schedule(settings.optimisation, settings.run, len(splits.train), len(splits.validation))

        def validate() -> dict[str, float]:
            measure = validate_label_sets if task.multi_label else validate_labels
            return measure(engine, data["validation"], settings.optimisation.tokens_per_device, stop_signal)

        smoothing = settings.optimisation.label_smoothing
        loop = TrainingLoop(run, engine, data["train"], schedule, settings.optimisation, validate, stop_signal)
        for step in loop:  # resumes; between two steps it logs, validates, saves and stops
            for batch in step:  # this rank's micro-batches
                logits = engine.forward(**batch.inputs)  # of labels or of answers' tokens: [targets, classes]
                if task.multi_label:  # each label of a text is a decision of its own: [texts, labels]
                    targets = batch.targets * (1 - smoothing) + smoothing / 2
                    losses = functional.binary_cross_entropy_with_logits(logits.float(), targets, reduction="none")
                else:
                    losses = functional.cross_entropy(
                        logits.float(), batch.targets, label_smoothing=smoothing, reduction="none"
                    )
                engine.backward((losses * batch.target_weights).sum() * batch.weight, batch.is_last)
            engine.update(step.rate_factor)

        final = save_best(loop, settings, tokenizer, task_record(settings, task, data["train"]))
        engine.free()
        evaluate_final(run, settings, final, task, splits, stop_signal)
        parts = (label_set_parts if task.multi_label else label_parts)(task.labels)
        print_run_table(run.path, parts)
        run.finish(loop.progress, lambda: write_report(run.path, parts))
    upload_run(settings.run)


if __name__ == "__main__":
    run_script(main, train_parser(__doc__, OWN, CHOOSE_BY, GLUE).parse_args())
