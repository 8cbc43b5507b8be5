"""An adapter merged into its base: a plain model folder that gives the same logits."""

import gc
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from zerotune.errors import Refused
from zerotune.files import disk_error_number, full_disk_refusal, sync_folder, why_not_writable
from zerotune.models.adapters import load_adapter
from zerotune.models.base_license import hub_id
from zerotune.models.boundary import quiet_transformers
from zerotune.models.classifier import load_stock_classifier
from zerotune.models.final_folder import (
    describe_final,
    forget_generation_settings,
    load_final_or_base,
    load_final_span,
)
from zerotune.models.generator import load_causal_model, load_language_model
from zerotune.models.heads import is_head_parameter
from zerotune.models.loading import tuning_config
from zerotune.models.model_files import adapter_base, final_to_publish, read_record
from zerotune.models.parameters import published_table
from zerotune.models.pretrained import check_token_ids, read_config, read_model
from zerotune.models.span_head import load_stock_span_model
from zerotune.run.cpu import memory_limit
from zerotune.settings.groups import ModelSettings
from zerotune.settings.names import folder_name

# Texts on which logits are compared; at every token, if the head gives logits there.
TEXTS = (
    "The film was good.",
    "It is not what I had hoped for: two hours, and never once did I want to know how it would end.",
    "Who built the tower? The tower at Hook Head was built by monks in the 13th century.",
    "£ 12.50 – naïve, 100 %!",
)
# Largest difference of a logit, as a share of the largest logit. Merging only changes the order of float32 sums.
# Storing rounds each weight by up to 2^-12 (float16) or 2^-9 (bfloat16) of its size: the independent errors of the 200
# matrices of a 7B model add up to 14 times that, 0.3 % and 3 %.
TOLERANCES = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
# Memory beside the float32 weights, as a share of them: the largest matrix twice, and activations.
SPARE_SHARE = 0.15


@dataclass(frozen=True)
class Merged:
    """Differences of the merged model's logits from the adapter's on the same base, as shares of the largest logit.

    Attributes:
        largest_logit: of the adapter's, on TEXTS.
        merged: difference in float32, before the weights were rounded.
        stored: difference of the written folder, read again.
        in_4_bits: difference of the adapter itself on its base in 4 bits, on which QLoRA trained it; None for LoRA.
        dtype: of the stored weights, except the head's, which are float32.
    """

    largest_logit: float
    merged: float
    stored: float
    in_4_bits: float | None
    dtype: str

    def lines(self) -> list[str]:
        """Return the lines to print: each difference, with its tolerance."""
        lines = [
            f"largest differences of a logit from the adapter's, on {len(TEXTS)} texts (largest logit "
            f"{self.largest_logit:.3g}):",
            self._line("merged, in float32", self.merged, "float32"),
        ]
        if self.dtype != "float32":
            lines.append(self._line(f"stored in {self.dtype}", self.stored, self.dtype))
        if self.in_4_bits is not None:
            lines.append(
                f"  the adapter itself on its base in 4 bits: {self.in_4_bits * self.largest_logit:.1e} (training and "
                "evaluation used that base)"
            )
        return lines

    def _line(self, what: str, found: float, dtype: str) -> str:
        share = TOLERANCES[dtype]
        return f"  {what}: {found * self.largest_logit:.1e} (allowed: {share * self.largest_logit:.1e}, {share:.2%})"


def adapter_of_run(run: Path) -> Path:
    """Return the folder of a run's tuned adapter, given the run folder or its final/.

    Raises:
        Refused: there is none, or it is a whole model.
    """
    final = final_to_publish(run)
    if adapter_base(final) is None:
        raise Refused(f"--merge is for adapters, and {final} is a whole model: copy that folder as it is")
    return final


def check_target(target: Path, run: Path) -> None:
    """Refuse a target that is a file, is not empty, lies inside the run, or cannot be written."""
    try:
        is_file = target.exists() and not target.is_dir()
        is_empty = not target.is_dir() or not any(target.iterdir())
    except OSError as error:
        raise _unwritable(target, error.strerror) from None
    if is_file:
        raise Refused(f"--merge must name a new folder: {target} is a file; name another one")
    if not is_empty:
        raise Refused(f"--merge must name a new folder: {target} is not empty; name another one, or delete it")
    if target.resolve().is_relative_to(run.resolve()):
        raise Refused(f"--merge must name a folder outside of the run: {target} is inside {run}")
    if reason := why_not_writable(target.parent):
        raise _unwritable(target, reason)


def _unwritable(target: Path, reason: str) -> Refused:
    return Refused(f"--merge must name a folder that can be written, and {target} cannot ({reason}): name another one")


def merge_adapter(final: Path, target: Path, dtype: str | None) -> Merged:
    """Merge an adapter into its base, compare the logits, and write a plain model folder, renamed once it is complete.

    Everything is computed in float32 on the CPU; an adapter that was trained on a 4-bit base is merged into the base as
    published.

    Args:
        final: from `adapter_of_run`.
        target: checked by `check_target`; missing parents are created.
        dtype: of the stored weights, "float32", "float16" or "bfloat16"; None: the base's. A head is always float32.
    Raises:
        Refused: the adapter, its base or its tokenizer cannot be used, memory or disk is short, or the logits differ.
    """
    config, tokenizer, record = _read_adapter(final)
    rows = [tokenizer(text, return_tensors="pt")["input_ids"] for text in TEXTS]
    for ids in rows:
        check_token_ids(str(final), config, ids.flatten().numpy())
    base = adapter_base(final)
    dtype = dtype or _stored_dtype(read_config(*base))

    model = load_adapter(_load_base(base, config, tokenizer, record), str(final), None).eval()
    wanted = _logits(model, rows)
    largest = float(torch.cat([each.flatten() for each in wanted]).abs().max())

    def difference(found: list[torch.Tensor]) -> float:
        differences = [(one - other).flatten() for one, other in zip(found, wanted, strict=True)]
        return float(torch.cat(differences).abs().max()) / largest  # NaN if any logit is

    stock = model.merge_and_unload().eval()
    merged = difference(_logits(stock, rows))
    _check_difference(merged, "float32", final)
    aside = target.absolute().parent / f".writing-{target.absolute().name}"
    shutil.rmtree(aside, ignore_errors=True)
    try:
        _make_aside(aside, target)
        _round_weights(stock, dtype)
        forget_generation_settings(stock)
        with quiet_transformers():
            stock.save_pretrained(aside, save_original_format=stock.key_mapping is None)  # the published names
        name = hub_id(base[0]) or (folder_name(base[0]) if os.path.isdir(base[0]) else base[0])
        described = {**record, "method": "full", "merged": record["method"], "base_model": name}
        describe_final(aside, stock, tokenizer, described)
        model_class = type(stock)
        del model, stock
        gc.collect()
        stored = difference(_logits(_read_again(model_class, aside), rows))
        _check_difference(stored, dtype, final)
        in_4_bits = None
        if record["method"] == "qlora":
            in_4_bits = difference(_logits(_load_in_4_bits(final, record), rows))
        sync_folder(aside)
        aside.rename(target)
    except Exception as error:
        if disk_error_number(error) is None:
            raise
        raise Refused(full_disk_refusal(target.parent, error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(target.absolute().parent)
    return Merged(largest, merged, stored, in_4_bits, dtype)


def _make_aside(aside: Path, target: Path) -> None:
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        if disk_error_number(error) is not None:
            raise
        raise _unwritable(target, error.strerror) from None


def _read_adapter(final: Path) -> tuple:
    """Return an adapter's config, tokenizer and task.json, checked before any weights are loaded."""
    record = read_record(str(final), None)
    config, tokenizer = read_model(ModelSettings(str(final)), record["task"])
    base = adapter_base(final)
    if getattr(read_config(*base), "quantization_config", None) is not None:
        raise Refused(
            f"an adapter is merged into float32 or 16-bit weights, and its base {base[0]} is stored quantised: give "
            "the model that it was made from as base_model in task.json"
        )
    needed = 4 * published_table(config)["total"] * (1 + SPARE_SHARE)
    if needed > memory_limit():
        raise Refused(
            f"merging needs about {needed / 2**30:.1f} GiB of memory (float32 weights) and this machine has "
            f"{memory_limit() / 2**30:.1f}: run it on a larger one"
        )
    return config, tokenizer, record


def _stored_dtype(config) -> str:
    """Return the type in which a checkpoint stores its weights, by its config; float32 if that does not name one."""
    name = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return name if name in TOLERANCES else "float32"


def _load_base(base: tuple[str, str | None], config, tokenizer, record: dict):
    """Return the base with a head, in float32."""
    settings = ModelSettings(base[0], base[1], "lora", attention="eager", precision="fp32")
    if record["head"] == "generate":
        return load_causal_model(settings, tuning_config(config, settings, tokenizer))
    if record["head"] == "span":
        return load_stock_span_model(settings, tokenizer, config)[0]
    return load_stock_classifier(settings, tuple(record["labels"]), tokenizer, config)[0]


def _load_in_4_bits(final: Path, record: dict):
    """Return the model of an adapter on its base in 4 bits, as an evaluation loads it."""
    settings = ModelSettings(str(final))
    if record["head"] == "generate":
        return load_language_model(settings, torch.device("cpu"))
    if record["head"] == "span":
        return load_final_span(settings)[0].model
    return load_final_or_base(settings, tuple(record["labels"]))[0].model


@torch.no_grad()
def _logits(model, rows: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return a stock or peft model's logits of each row: [1, labels], or [2, 1, T] or [1, T, vocabulary]."""
    with quiet_transformers():
        outputs = [model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)) for ids in rows]
    if hasattr(outputs[0], "start_logits"):
        return [torch.stack([output.start_logits, output.end_logits]).float() for output in outputs]
    return [output.logits.float() for output in outputs]


def _check_difference(found: float, dtype: str, final: Path) -> None:
    if not (math.isfinite(found) and found <= TOLERANCES[dtype]):
        way_out = "use --dtype float32" if dtype != "float32" else "its base may have changed since it was trained"
        raise Refused(
            f"the model merged from {final} gives other logits: in {dtype} the difference is {found:.2%} of the "
            f"largest logit, and at most {TOLERANCES[dtype]:.2%} is allowed; {way_out}"
        )


def _round_weights(stock, dtype: str) -> None:
    """Cast all weights except a classification or span head's, in place: tied ones stay tied."""
    for name, parameter in stock.named_parameters():
        if not is_head_parameter(name, stock.config):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    stock.config.dtype = dtype


def _read_again(model_class, folder: Path):
    """Load a stock model in the way that its README.md does."""
    with quiet_transformers():
        model, info = model_class.from_pretrained(
            folder, dtype="float32", attn_implementation="eager", output_loading_info=True
        )
    missing = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    assert not missing, f"the merged folder does not fit its class: {missing[:4]}"
    return model
