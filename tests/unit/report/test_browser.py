"""Open the pages in headless Chromium: no script fails, and nothing is wider than the window."""

import html
import json
import re
import shutil
import subprocess

import pytest
from report_cases import LABELS, PARAMETERS, fabricate_run, write_evaluation

from zerotune.evaluation.prompt_seeds import summarise_seeds
from zerotune.files import read_json_lines, write_json
from zerotune.report.comparison import read_comparison, write_comparison
from zerotune.report.evaluation_report import write_evaluation_report
from zerotune.report.label_parts import label_parts
from zerotune.report.run_report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (320, 768, 1280)
NOTE_ERRORS = "<script>window.failed = []; onerror = (message) => failed.push(message);</script>"
# The widths are of frames, because Chromium's windows have a minimum width.
MEASURE = """<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map((frame) => {
    const page = frame.contentDocument, window = frame.contentWindow;
    for (const button of page.querySelectorAll("button.copy")) button.click();
    const cut = [...page.querySelectorAll(".card .value")].filter((one) => one.scrollWidth > one.clientWidth);
    return {name: frame.name, wide: page.documentElement.scrollWidth, errors: window.failed, cut: cut.length,
            dark: window.matchMedia("(prefers-color-scheme: dark)").matches,
            paper: window.getComputedStyle(page.body).backgroundColor, buttons: page.querySelectorAll("button").length};
  });
  document.body.textContent = "FOUND" + JSON.stringify(found) + "END";
};
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write the pages of a run with long unbroken names, an evaluation, prompt seeds and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    run = folder / ("a_run_whose_name_has_no_break_in_it_" * 3)
    fabricate_run(run)
    write_json(run / "parameters.json", PARAMETERS | {"a_key_without_any_break" * 4: {"value" * 20: "x" * 90}})
    lines = read_json_lines(run / "eval/final/predictions.jsonl")
    lines[0]["text"] = "unbroken" * 80
    for number in range(2):
        prompt = {"prompt": "{text}" + "w" * 200, "label_words": ["no", "yes"], "shot_ids": ["train-1"], "seed": number}
        write_evaluation(folder / f"prompts/seed-{number}", lines[number:], model="org/m", **prompt)
    summarise_seeds(folder / "prompts", 2)
    comparison = read_comparison([run / "eval/base", run, folder / "prompts"])
    return [
        write_report(run, label_parts(LABELS)),
        write_evaluation_report(run / "eval/final", label_parts(LABELS)),
        write_evaluation_report(folder / "prompts", label_parts(LABELS)),
        write_comparison(comparison, folder / "compared"),
    ]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium or Chrome on the path")
@pytest.mark.parametrize("is_dark", [False, True])
def test_no_page_is_wider_than_its_window(pages, tmp_path, is_dark):
    frames = ""
    for number, page in enumerate(pages):
        content = html.escape(page.read_text().replace("<head>", "<head>" + NOTE_ERRORS))
        for width in WIDTHS:
            style = f"width: {width}px; height: 900px; border: 0; color-scheme: {'dark' if is_dark else 'light'}"
            frames += f'<iframe name="{number} {width}" style="{style}" srcdoc="{content}"></iframe>'
    harness = tmp_path / "harness.html"
    harness.write_text(f"<!doctype html><meta charset=utf-8><body>{MEASURE}{frames}</body>")
    scheme = f"--blink-settings=preferredColorScheme={0 if is_dark else 1}"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        scheme,
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--virtual-time-budget=20000", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = json.loads(html.unescape(re.search("FOUND(.*)END", done.stdout, re.DOTALL)[1]))
    assert len(found) == len(pages) * len(WIDTHS)
    too_wide = {one["name"]: one["wide"] for one in found if one["wide"] > int(one["name"].split()[1])}
    assert not too_wide
    assert [one["name"] for one in found if one["errors"] or one["cut"]] == []
    assert {one["dark"] for one in found} == {is_dark} and sum(one["buttons"] for one in found) >= 3 * 4
    assert {one["paper"] for one in found} == {"rgb(20, 22, 26)" if is_dark else "rgb(251, 250, 248)"}
