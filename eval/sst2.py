"""Evaluate a model on SST-2: a tuned final/ by its head, a causal model by the likelihood of its label words.

    python eval/sst2.py --model runs/sst2-distilbert-base-uncased-full/final
    python eval/sst2.py --model meta-llama/Llama-3.2-1B --shots 4 --calibrate contextual
    accelerate launch --num_processes 8 eval/sst2.py --model mistralai/Mistral-7B-v0.3 --load-4bit
    python eval/sst2.py --model runs/sst2-distilbert-base-uncased-full/final --dataset stanfordnlp/sst2:test

The last line predicts the unlabelled test rows and writes submission.tsv, the form of GLUE's test server.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import eval_parser
from zerotune.settings.names import is_sample_model
from zerotune.settings.resolve import eval_settings
from zerotune.tasks.sst2 import SST2


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
    settings = eval_settings(args, SST2.name)
    use_own_device(tiny_model=is_sample_model(settings.model.name))
    make_sample_model(settings.model.name)

    # Read the model's configuration, the test items and the shots, and refuse what cannot work: nothing is loaded yet.
    def read() -> tuple:
        config, tokenizer = read_model(settings.model, SST2.name, SST2.labels, needs_weights=not settings.run.plan)
        check_prompt_seeds(settings, SST2, config)
        run_split = split_of_run(settings.model.name, SST2.name)
        test, record = load_test(SST2, settings.data, run_split)
        labelled = load_shots(SST2, settings.data, run_split, test) if settings.prompt.shots else []
        evaluations = plan_evaluations(settings, SST2, labelled, record)  # one, or one for each of --prompt-seeds
        for folder, evaluation in evaluations.items():
            check_evaluation(folder, evaluation, SST2, test, config, tokenizer)
        return evaluations, SST2, test, config, tokenizer, record

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
            metrics = evaluate(folder, evaluation, SST2, test, accelerator, stop_signal, shared=shared)
            say(f"{metrics['setting']}: {accuracy_line(metrics)}; results in {folder}")
        if settings.prompt.seeds:
            summarise_seeds(run.path, settings.prompt.seeds)
        write_evaluation_report(run.path, label_parts(SST2.labels))
        run.write_json("state.json", {"state": "finished", "reason": None})


if __name__ == "__main__":
    run_script(main, eval_parser(__doc__, SST2).parse_args())
