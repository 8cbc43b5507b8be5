"""Fine-tune a model to answer questions about a paragraph, or to abstain (SQuAD v2), and compare it with itself before.

    python train/qa.py --sample
    python train/qa.py --model distilbert/distilbert-base-uncased
    accelerate launch --num_processes 8 train/qa.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    python train/qa.py --model meta-llama/Llama-3.2-1B-Instruct --method lora --head generate
    python train/qa.py --train-file train-v2.0.json --test-file dev-v2.0.json --eval-every 500

The same command starts a run, resumes it, or says that it is finished.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import train_settings
from zerotune.squad.questions import TASK
from zerotune.squad.settings import qa_train_parser

# How the tiny model of --sample is trained, by head; flags on the command line override this.
SAMPLE = {"span": {"epochs": 8, "learning_rate": 3e-3}, "generate": {"epochs": 16, "learning_rate": 3e-3}}


def main(args) -> None:
    if args.runs:  # --seeds, --sweep: a process for each run
        from zerotune.sweep.run import run_all

        return run_all(args.runs)

    from functools import partial

    from torch.nn import functional

    from zerotune.models.loading import check_trainable
    from zerotune.models.pretrained import read_model
    from zerotune.models.upload import upload_run
    from zerotune.report.run_report import print_run_table, write_report
    from zerotune.run.folder import RunFolder, check_earlier_run
    from zerotune.run.launch import start_accelerator, use_own_device
    from zerotune.run.stopping import StopSignal
    from zerotune.squad.evaluation import evaluate_base, evaluate_final
    from zerotune.squad.report import question_parts
    from zerotune.squad.sample import make_sample_model
    from zerotune.squad.spans import window_losses
    from zerotune.squad.splits import load
    from zerotune.squad.training import (
        check_head,
        task_record,
        tokenise,
        tokenise_for_plan,
        validate_spans,
        validate_written,
    )
    from zerotune.training.engine import load_engine
    from zerotune.training.final import logged_evaluation, save_best
    from zerotune.training.loop import TrainingLoop
    from zerotune.training.plan import check_fits, plan_training
    from zerotune.training.schedule import plan_schedule
    from zerotune.training.start import check_run_flags, start_run

    stop_signal = StopSignal()
    settings = train_settings(args, TASK, SAMPLE[args.head])
    if settings.run.plan:
        make_sample_model(settings.model.name)
        say(plan_training(settings, lambda: (TASK, load(settings.data)), partial(tokenise_for_plan, settings)))
        return
    if check_earlier_run(settings.run):
        upload_run(settings.run)
        return

    # Read the data and the model's configuration, and refuse what cannot work: nothing is loaded or written yet.
    check_run_flags(settings.run)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    splits = load(settings.data)
    make_sample_model(settings.model.name)
    config, tokenizer = read_model(settings.model, TASK)
    lengths = check_head(settings, config, tokenizer)
    check_trainable(settings.model, config, lengths.max_length)
    data = tokenise(settings, lengths, splits, config, tokenizer)
    whole_gradients = check_fits(settings, config, data["train"], num_labels=0)

    accelerator = start_accelerator(settings.deepspeed)
    with RunFolder(settings.run, accelerator) as run:
        stop_signal.raise_when_noted(accelerator, "preparation")
        start_run(run, settings, splits, data)
        evaluate_base(run, settings, splits, stop_signal)

        engine = load_engine(run, settings, config, tokenizer, (), data["train"], whole_gradients)
        num_validation = len(splits.validation) if settings.head == "span" else None  # written answers take long
        schedule = plan_schedule(settings.optimisation, settings.run, len(splits.train), num_validation)

        def validate() -> dict[str, float]:
            validation, optimisation = data["validation"], settings.optimisation
            if settings.head == "span":
                return validate_spans(engine, validation, splits.record["rule"], optimisation, stop_signal)
            most = lengths.max_new_tokens
            return validate_written(engine, validation, splits.validation, tokenizer, most, optimisation, stop_signal)

        smoothing = settings.optimisation.label_smoothing
        loop = TrainingLoop(run, engine, data["train"], schedule, settings.optimisation, validate, stop_signal)
        for step in loop:  # resumes; between two steps it logs, validates, saves and stops
            for batch in step:  # this rank's micro-batches
                logits = engine.forward(**batch.inputs)
                if settings.head == "span":  # start and end of every token, [windows, tokens, 2]
                    losses = window_losses(logits, batch.inputs["attention_mask"], batch.targets, smoothing)
                else:  # of the answers' tokens, [targets, vocabulary]
                    losses = functional.cross_entropy(
                        logits, batch.targets, label_smoothing=smoothing, reduction="none"
                    )
                engine.backward(losses.sum() * batch.weight, batch.is_last)
            engine.update(step.rate_factor)

        best = logged_evaluation(run, loop.progress.best_step)
        final = save_best(loop, settings, tokenizer, task_record(settings, lengths, data["train"], best))
        engine.free()
        evaluate_final(run, settings, final, splits, stop_signal)
        parts = question_parts({question.id: question for question in splits.test})
        print_run_table(run.path, parts)
        run.finish(loop.progress, lambda: write_report(run.path, parts))
    upload_run(settings.run)


if __name__ == "__main__":
    run_script(main, qa_train_parser(__doc__).parse_args())
