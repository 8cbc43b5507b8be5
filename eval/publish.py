"""Make a plain model of a run's adapter: LoRA or QLoRA merged into its base, for programs that do not know peft.

    python eval/publish.py runs/sst2-llama-3.2-1b-lora --merge models/sst2-merged

It compares the logits of the merged model with the adapter's, in float32 on the CPU (4 bytes of memory a weight), and
writes the folder only where they agree. A QLoRA adapter is merged into its base as published, not in 4 bits.
"""

from zerotune.run.process import run_script, say
from zerotune.settings.flags import publish_parser


def main(args) -> None:
    from zerotune.models.merging import adapter_of_run, check_target, merge_adapter

    final = adapter_of_run(args.run)
    check_target(args.merge, args.run)
    merged = merge_adapter(final, args.merge, None if args.dtype == "auto" else args.dtype)
    for line in merged.lines():
        say(line)
    say(f"merged model: {args.merge}; its README.md shows a whole prediction")


if __name__ == "__main__":
    run_script(main, publish_parser(__doc__).parse_args())
