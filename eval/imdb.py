"""Evaluate a model on IMDB: a tuned final/ by its head, a causal model by the likelihood of its label words.

    python eval/imdb.py --model runs/imdb-distilbert-base-uncased-full/final
    python eval/imdb.py --model google/gemma-2-2b-it --shots 4 --prompt-seeds 5 --test-size 2500
    accelerate launch --num_processes 8 eval/imdb.py --model google/gemma-2-2b-it --shots 4 --calibrate contextual
    python eval/imdb.py --sample --shots 4 --prompt-seeds 3

The last line needs neither a network nor a model.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import eval_parser
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import eval_settings
from zerotune.tasks.imdb import IMDB


def main(args) -> None:
    from zerotune.evaluation.by_prompt import SharedModel
    from zerotune.evaluation.plan import describe_batches, plan_evaluation
    from zerotune.evaluation.prompt_seeds import check_prompt_seeds, plan_evaluations, summarise_seeds
    from zerotune.evaluation.text import accuracy_line, check_evaluation, evaluate
    from zerotune.models.pretrained import read_model
    from zerotune.report.evaluation_report import write_evaluation_report
    from zerotune.report.label_parts import label_parts
    from zerotune.run.folder import RunFolder, check_earlier_run
    from zerotune.run.launch import start_accelerator, use_own_device
    from zerotune.run.stopping import StopSignal
    from zerotune.tasks.sample import make_sample_model
    from zerotune.tasks.split_file import split_of_run
    from zerotune.tasks.texts import load_shots, load_test

    stop_signal = StopSignal()
    settings = eval_settings(args, IMDB.name)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    make_sample_model(settings.model.name)

    # Read the model's configuration, the test items and the shots, and refuse what cannot work: nothing is loaded yet.
    def read() -> tuple:
        config, tokenizer = read_model(settings.model, IMDB.name, IMDB.labels, needs_weights=not settings.run.plan)
        check_prompt_seeds(settings, IMDB, config)
        run_split = split_of_run(settings.model.name, IMDB.name)
        test, record = load_test(IMDB, settings.data, run_split)
        labelled = load_shots(IMDB, settings.data, run_split, test) if settings.prompt.shots else []
        evaluations = plan_evaluations(settings, IMDB, labelled, record)  # one, or one for each of --prompt-seeds
        for folder, evaluation in evaluations.items():
            check_evaluation(folder, evaluation, IMDB, test, config, tokenizer)
        return evaluations, IMDB, test, config, tokenizer, record

    if settings.run.plan:
        say(plan_evaluation(settings, lambda: describe_batches(*read()[:-1])))
        return
    check_earlier_run(settings.run, says_finished=False)
    evaluations, _, test, _, tokenizer, record = read()

    accelerator = start_accelerator(None)
    with RunFolder(settings.run, accelerator) as run:
        run.describe(record)
        shared = SharedModel(tokenizer)  # all prompts use the same model
        for folder, evaluation in evaluations.items():
            metrics = evaluate(folder, evaluation, IMDB, test, accelerator, stop_signal, shared=shared)
            say(f"{metrics['setting']}: {accuracy_line(metrics)}; results in {folder}")
        if settings.prompt.seeds:
            summarise_seeds(run.path, settings.prompt.seeds)
        write_evaluation_report(run.path, label_parts(IMDB.labels))
        run.write_json("state.json", {"state": "finished", "reason": None})


if __name__ == "__main__":
    run_script(main, eval_parser(__doc__, IMDB).parse_args())
