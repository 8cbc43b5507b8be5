"""Evaluate a model on SST-2: a tuned final/ by its head, a causal model by the likelihood of its label words.

    python eval/sst2.py --model runs/sst2-distilbert-base-uncased-full/final
    python eval/sst2.py --model meta-llama/Llama-3.2-1B --shots 4 --calibrate contextual
    accelerate launch --num_processes 8 eval/sst2.py --model mistralai/Mistral-7B-v0.3 --load-4bit
    python eval/sst2.py --model runs/sst2-distilbert-base-uncased-full/final --dataset stanfordnlp/sst2:test

The last line predicts the unlabelled test rows and writes submission.tsv, the form of GLUE's test server.
"""

from pathlib import Path

from zerotune.arguments import eval_parser
from zerotune.runs import RunFolder, check_earlier_run, describe_process, recorded_flags, run_script, say, short_name


def main(args):
    from zerotune import cpu, evaluation, launch, preflight, results, sst2, training
    from zerotune.precision import resolve_precision
    from zerotune.prompting import draw_shots
    from zerotune.stopping import StopSignal

    args.model = args.model or (str(preflight.sample_model_folder()) if args.sample else preflight.DEFAULT_MODEL)
    args.output_dir = args.output_dir or Path("runs") / f"eval-{sst2.TASK}-{short_name(args.model)}"
    stop_signal = StopSignal()
    check_earlier_run(args.output_dir, args, says_finished=False)
    cpu.use_whole_cpu(tiny_model=args.sample)
    config, tokenizer = preflight.read_model_folder(args, sst2.LABELS)
    run_split = preflight.split_of_run(args.model)
    test, record = sst2.load_test(args, run_split)
    shots = ()
    if args.shots:
        shots = draw_shots(sst2.load_shots_source(args, run_split, test), args.shots, len(sst2.LABELS), args.seed)
    options = evaluation.EvalOptions(
        model=args.model,
        revision=args.revision,
        attention=args.attention,
        precision=resolve_precision(args.precision, None),
        max_length=args.max_length,
        tokens_per_device=cpu.tokens_per_device(args.tokens_per_device, on_gpu=16384),
        load_4bit=args.load_4bit,
        prompt_format=args.prompt_format,
        calibrate=args.calibrate,
        shots=shots,
        seed=args.seed,
        data_sha256=results.test_source_sha256(record),
    )
    evaluation.check_options(options, config, tokenizer)
    accelerator = launch.start_accelerator(None)

    with RunFolder(args.output_dir, accelerator) as run:
        run.write_json("split.json", record)
        world = {"num_processes": accelerator.num_processes, "device": training.device_name(accelerator.device)}
        run.write_json("run.json", {**describe_process(), "flags": recorded_flags(args), "world": world})
        metrics = evaluation.evaluate_checkpoint(run.path, options, sst2, test, accelerator, stop_signal)
        run.write_json("state.json", {"state": "finished", "reason": None})
        say(f"{metrics['setting']}: {results.accuracy_line(metrics)}; results in {run.path}")


if __name__ == "__main__":
    run_script(main, eval_parser(__doc__).parse_args())
