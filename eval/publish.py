"""Publish a finished run: upload it to the Hugging Face hub, or make a plain model of its adapter, or both.

    python eval/publish.py runs/sst2-distilbert-base-uncased-full my-org/sst2-distilbert
    python eval/publish.py runs/sst2-llama-3.2-1b-lora my-org/sst2-llama-lora --base-model meta-llama/Llama-3.2-1B
    python eval/publish.py runs/sst2-llama-3.2-1b-lora --merge models/sst2-merged

An upload has final/ with its model card, report.html and eval/, without paths of this machine, as `--push-to-hub` of a
train script sends them. report.html quotes test items: a new repository is private unless --public is given.

--merge merges LoRA or QLoRA into its base, for programs that do not know peft. It compares the logits of the merged
model with the adapter's, in float32 on the CPU (4 bytes of memory a weight), and writes the folder only where they
agree. A QLoRA adapter is merged into its base as published, not in 4 bits. With ORG/NAME too, that folder is uploaded.
"""

from zerotune.errors import Refused
from zerotune.run.process import run_script, say
from zerotune.settings.flags import publish_parser


def main(args) -> None:
    from zerotune.models.model_files import final_to_publish
    from zerotune.models.upload import check_upload, upload

    final_to_publish(args.run)
    if not (args.repository or args.merge):
        raise Refused("nothing to do: give ORG/NAME to upload the run, or --merge FOLDER to merge its adapter")
    of_upload = "--public" if args.public else f"--base-model {args.base_model}" if args.base_model else None
    if of_upload and not args.repository:
        raise Refused(f"{of_upload} is for an upload, and ORG/NAME is missing: give it, or leave the flag out")
    if "dtype" in args.typed and not args.merge:
        raise Refused(f"--dtype {args.dtype} is for the weights that --merge writes: add --merge, or leave it out")
    if args.merge:
        from zerotune.models.merging import adapter_of_run, check_target, merge_adapter

        final = adapter_of_run(args.run)
        check_target(args.merge, args.run)
    if args.repository:
        check_upload(args.repository, "ORG/NAME")
    if args.merge:
        merged = merge_adapter(final, args.merge, None if args.dtype == "auto" else args.dtype)
        for line in merged.lines():
            say(line)
        say(f"merged model: {args.merge}; its README.md shows a whole prediction")
    if args.repository:
        upload(args.merge or args.run, args.repository, args.base_model, args.public)


if __name__ == "__main__":
    run_script(main, publish_parser(__doc__).parse_args())
