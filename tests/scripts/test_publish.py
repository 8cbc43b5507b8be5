"""Test eval/publish.py: its output and refusals, and that the merged model gives the same answers as the run."""
# tests/unit/models/test_upload.py tests the uploads themselves, on a fake hub.

import subprocess
import sys
import time

from huggingface_hub import ModelCard
from launching import REPOSITORY
from test_generate import GENERATE, LEARNS

SCRIPT = REPOSITORY / "eval" / "publish.py"


def test_a_merged_run_answers_as_the_run_does(workplace):
    run = workplace.train_once("generate-learns-lora", *GENERATE, *LEARNS, "--method", "lora")
    target = workplace.folder / "published"
    published = workplace.server.start("eval/publish.py", [run.folder, "--merge", target], target).wait()
    assert published.codes == (0,), published.text()
    assert "merged, in float32: " in published.text() and f"merged model: {target}" in published.text()
    flags = ["--model", target, "--test-file", workplace.test_file, "--limit-eval", 48]
    merged = workplace.evaluate("published-eval", *flags)
    answers = {line["id"]: line["prediction"] for line in run.read_lines("eval/final/predictions.jsonl")}
    again = {line["id"]: line["prediction"] for line in merged.read_lines("predictions.jsonl")}
    assert answers == again and len(answers) == 48
    refused = workplace.server.start("eval/publish.py", [run.folder, "--merge", target], target).wait()
    assert "--merge must name a new folder" in refused.refusal()
    offline = workplace.server.start("eval/publish.py", [run.folder, "org/name"], target).wait()
    assert "ORG/NAME org/name needs the hub and HF_HUB_OFFLINE is set" in offline.refusal()
    nothing = workplace.server.start("eval/publish.py", [run.folder], target).wait()
    assert nothing.refusal().startswith("nothing to do: give ORG/NAME to upload the run, or --merge FOLDER")
    for flags, words in (
        (["--merge", f"{target}-2", "--public"], "--public is for an upload, and ORG/NAME is missing"),
        (["--merge", f"{target}-2", "--base-model", "a/b"], "--base-model a/b is for an upload, and ORG/NAME is"),
        (["org/name", "--dtype", "auto"], "--dtype auto is for the weights that --merge writes: add --merge"),
    ):
        ignored = workplace.server.start("eval/publish.py", [run.folder, *flags], target).wait()
        assert words in ignored.refusal()
    card = ModelCard.load(run.folder / "final" / "README.md")
    scores = {result.metric_name.partition(" ")[0]: result.metric_value for result in card.data.eval_results}
    assert scores["accuracy"] == run.read_json("eval/final/metrics.json")["accuracy"]
    assert "## Scores" in card.text and str(workplace.folder) not in str(card)


def test_help_is_quick_and_shows_the_launch_line():
    start = time.perf_counter()
    result = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True)
    # Measured 0.1 s on a quiet machine; importing torch takes more than 2 s.
    assert time.perf_counter() - start < 2
    assert result.returncode == 0 and "python eval/publish.py runs/" in result.stdout
