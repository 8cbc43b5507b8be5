"""Ask a model about texts, or questions, of your own: one on the command line, or a file of any size.

    python eval/predict.py --model runs/tickets "my invoice is wrong"
    python eval/predict.py --model runs/tickets --file new.csv --output predicted.csv --top-k 3
    accelerate launch --num_processes 8 eval/predict.py --model runs/tickets --file all.jsonl.gz --output all.parquet
    python eval/predict.py --model meta-llama/Llama-3.2-1B "win a prize now" --labels spam ham
    python eval/predict.py --model runs/squad --question "When was it built?" --context "The tower was built in 1240."

A model is a run's folder, a final/, an adapter, or a classifier or question answering model of the hub. The same
command resumes a file that was interrupted.
"""

from zerotune.prediction.settings import predict_parser, predict_settings
from zerotune.run.process import run_script


def main(args) -> None:
    settings = predict_settings(args)

    from zerotune.prediction.answering import answerer_of
    from zerotune.prediction.job import Job
    from zerotune.prediction.output import take_standard_output
    from zerotune.prediction.rounds import answer_round, rounds
    from zerotune.run.launch import from_rank_0, start_accelerator, use_own_device
    from zerotune.run.process import is_main_process
    from zerotune.run.stopping import StopSignal

    stop_signal = StopSignal()
    use_own_device(tiny_model=False)
    printed = None if settings.output else take_standard_output()

    # Read the model's configuration and the first rows, and refuse what cannot work: nothing is loaded yet.
    answerer = answerer_of(settings)
    job = Job(settings, answerer, printed) if is_main_process() else None  # rank 0 reads and writes

    accelerator = start_accelerator(None)
    answer = answerer.load(accelerator.device)
    from_rank_0(accelerator, lambda: job.start())
    stop_signal.can_save = settings.resumes
    for chunks in rounds(accelerator, job):  # one for each rank; all ranks take part
        answers, stopped = answer_round(accelerator, answer, chunks, stop_signal)
        from_rank_0(accelerator, lambda: job.write(chunks, answers))  # noqa: B023, called at once
        if stopped:
            raise from_rank_0(accelerator, lambda: job.stop(stop_signal))
    from_rank_0(accelerator, lambda: job.finish())


if __name__ == "__main__":
    run_script(main, predict_parser(__doc__).parse_args())
