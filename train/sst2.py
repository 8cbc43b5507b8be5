"""Fine-tune a model to tell positive from negative sentences (SST-2), and report it against itself before training.

    accelerate launch train/sst2.py --sample
    accelerate launch train/sst2.py --model distilbert/distilbert-base-uncased
    accelerate launch --num_processes 8 train/sst2.py --model meta-llama/Llama-3.2-1B --deepspeed ds_configs/zero2.json
    accelerate launch train/sst2.py --model mistralai/Mistral-7B-v0.3 --method qlora --activation-checkpointing
    accelerate launch train/sst2.py --model google/gemma-2-2b-it --method lora --head generate

The same command starts a run, goes on with it, or says that it is finished.
"""

from zerotune.arguments import train_parser
from zerotune.runs import RunFolder, check_earlier_run, is_main_process, run_script, started_at

# for the tiny model on the generated reviews; a flag that is given wins
SAMPLE_DEFAULTS = {"epochs": 3, "learning_rate": 1e-3}


def main(args):
    import time

    from zerotune import cpu, launch, preflight, results, run_checks, sst2, training
    from zerotune.loop import Loop
    from zerotune.precision import resolve_precision
    from zerotune.stopping import StopSignal

    stop_signal = StopSignal()
    preflight.settle_flags(args, sst2.TASK, SAMPLE_DEFAULTS)
    if check_earlier_run(args.output_dir, args):
        return
    run_checks.check_run_flags(args)

    # data and configuration: all that can be refused is refused here, before a weight is loaded or a file written
    cpu.use_whole_cpu(tiny_model=args.sample)
    splits = sst2.load_splits(args)
    config, tokenizer = preflight.read_model_folder(args, sst2.LABELS)
    run_checks.check_model_flags(args, config)
    run_checks.check_head(args, config, tokenizer)
    deepspeed = launch.read_deepspeed_config(args.deepspeed)
    precision = resolve_precision(args.precision, deepspeed)
    settings = preflight.model_settings(args, precision, launch.zero_stage(deepspeed))
    if is_main_process():  # the other ranks wait at the process group, then find the cache of tokens filled
        data = preflight.tokenise(args, config, tokenizer, sst2, splits)
        preflight.check_plan(args, settings, config, data["train"], len(sst2.LABELS), deepspeed)
    if args.plan:
        return
    filled = None if deepspeed is None else launch.fill_deepspeed_config(deepspeed, args, precision)
    accelerator = launch.start_accelerator(filled)

    with RunFolder(args.output_dir, accelerator) as run:
        data = preflight.tokenise(args, config, tokenizer, sst2, splits)
        training.start_run(run, args, splits, data, precision, filled)
        base_eval_s = results.evaluate_base(run, args, precision, sst2, splits, stop_signal)

        engine = training.build_engine(run, args, settings, config, tokenizer, sst2.LABELS, data["train"])
        schedule = preflight.schedule_for(args, len(splits.train))
        choose = training.choosing_evaluation(engine, data["choose"], schedule, args)
        loop = Loop(engine, data["train"], schedule, run, args, choose, stop_signal)
        training.resume(loop, args)
        startup_s = time.time() - started_at() - base_eval_s
        progress = loop.train()

        final = training.save_best(loop, args, tokenizer, sst2)
        del engine, loop, choose
        training.free_training_memory(accelerator)
        metrics = results.evaluate_final(run, args, final, precision, sst2, splits, stop_signal)
        results.print_results(run, metrics)
        results.finish(run, args, progress, splits.test, {"startup_s": startup_s, "base_eval_s": base_eval_s})


if __name__ == "__main__":
    run_script(main, train_parser(__doc__).parse_args())
