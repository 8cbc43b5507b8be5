"""Evaluate a model on labels of your own: a tuned final/ by its head, a causal model by the likelihood of the labels.

    python eval/classify.py --model runs/tickets/final
    python eval/classify.py --model runs/tickets/final --test-file new.csv
    python eval/classify.py --model meta-llama/Llama-3.2-1B --test-file new.csv --train-file tickets.csv --shots 8
    python eval/classify.py --model org/published-tagger --multi-label --test-file new.jsonl
    python eval/classify.py --model runs/mnli/final --dataset nyu-mll/glue/mnli:validation_mismatched

Rows without labels get predictions only.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import eval_parser
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import eval_settings
from zerotune.tasks.classify import GLUE, OWN, data_of_model, labels_to_choose_from, task_to_evaluate


def main(args) -> None:
    from zerotune.evaluation.by_prompt import SharedModel
    from zerotune.evaluation.plan import describe_batches, plan_evaluation
    from zerotune.evaluation.prompt_seeds import check_prompt_seeds, plan_evaluations, summarise_seeds
    from zerotune.evaluation.text import accuracy_line, check_evaluation, evaluate
    from zerotune.models.model_files import read_record
    from zerotune.models.multi_label import check_has_head, check_multi_label, is_multi_label
    from zerotune.models.pretrained import check_labels, known_labels, read_model
    from zerotune.report.evaluation_report import write_evaluation_report
    from zerotune.report.label_parts import label_parts, label_set_parts
    from zerotune.run.folder import RunFolder, check_earlier_run
    from zerotune.run.launch import start_accelerator, use_own_device
    from zerotune.run.stopping import StopSignal
    from zerotune.tasks.sample import make_sample_model
    from zerotune.tasks.split_file import split_of_run
    from zerotune.tasks.texts import load_shots, load_test

    stop_signal = StopSignal()
    settings = eval_settings(args, OWN.name)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    make_sample_model(settings.model.name)

    # Read the model's configuration, the test items and the shots, and refuse what cannot work: nothing is loaded yet.
    def read() -> tuple:
        config, tokenizer = read_model(settings.model, OWN.name, needs_weights=not settings.run.plan)
        run_split = split_of_run(settings.model.name, OWN.name)
        known = labels_to_choose_from(settings.labels, known_labels(settings.model, config))
        of_run = data_of_model(read_record(settings.model.name, settings.model.revision), run_split)
        task, data = task_to_evaluate(settings.data, of_run, known, is_multi_label(config))
        if task.multi_label:
            check_has_head(settings.model.name, config)
        check_multi_label(settings.model, config, task.multi_label)
        check_labels(settings.model.name, config, task.labels, settings.labels)
        check_prompt_seeds(settings, task, config)
        test, record = load_test(task, data, run_split)
        labelled = load_shots(task, data, run_split, test) if settings.prompt.shots else []
        evaluations = plan_evaluations(settings, task, labelled, record)  # one, or one for each of --prompt-seeds
        for folder, evaluation in evaluations.items():
            check_evaluation(folder, evaluation, task, test, config, tokenizer)
        return evaluations, task, test, config, tokenizer, record

    if settings.run.plan:
        say(plan_evaluation(settings, lambda: describe_batches(*read()[:-1])))
        return
    check_earlier_run(settings.run, says_finished=False)
    evaluations, task, test, _, tokenizer, record = read()

    accelerator = start_accelerator(None)
    with RunFolder(settings.run, accelerator) as run:
        run.describe(record)
        shared = SharedModel(tokenizer)  # all prompts use the same model
        for folder, evaluation in evaluations.items():
            metrics = evaluate(folder, evaluation, task, test, accelerator, stop_signal, shared=shared)
            say(f"{metrics['setting']}: {accuracy_line(metrics)}; results in {folder}")
        if settings.prompt.seeds:
            summarise_seeds(run.path, settings.prompt.seeds)
        write_evaluation_report(run.path, (label_set_parts if task.multi_label else label_parts)(task.labels))
        run.write_json("state.json", {"state": "finished", "reason": None})


if __name__ == "__main__":
    run_script(main, eval_parser(__doc__, OWN, GLUE).parse_args())
