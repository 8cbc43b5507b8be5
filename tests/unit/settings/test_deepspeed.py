"""How DeepSpeed files and precisions resolve, and which are refused."""

import json

import pytest

from zerotune.errors import Refused
from zerotune.settings import precision
from zerotune.settings.deepspeed import fill_deepspeed_config, read_deepspeed_config, zero_stage
from zerotune.settings.precision import resolve_precision


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        monkeypatch.delenv(name, raising=False)


# --- precision: flag > DeepSpeed file > launcher > device ---

BF16_FILE, FP16_FILE = {"bf16": {"enabled": True}}, {"fp16": {"enabled": True}}


@pytest.mark.parametrize(
    ("wanted", "config", "launcher", "found"),
    [
        ("bf16", None, None, "bf16"),
        ("fp32", None, "bf16", "fp32"),
        ("fp16", None, None, "fp16"),
        ("auto", None, "fp16", "fp16"),
        ("auto", None, "no", "the device's"),
        ("auto", None, None, "the device's"),
        ("auto", BF16_FILE, "fp16", "bf16"),
        ("auto", {"bf16": {"enabled": "auto"}}, "no", "the device's"),
        ("fp32", {"bf16": {"enabled": "auto"}}, "no", "fp32"),
        ("auto", {"torch_autocast": {"enabled": True, "dtype": "torch.bfloat16"}}, None, "bf16"),
        ("bf16", {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, None, "bf16"),
    ],
)
def test_precision(wanted, config, launcher, found, monkeypatch):
    if launcher:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launcher)
    monkeypatch.setattr(precision, "default_precision", lambda: "the device's")
    assert resolve_precision(wanted, config) == found


@pytest.mark.parametrize(
    ("wanted", "config", "words"),
    [
        ("fp32", BF16_FILE, "--precision fp32 and the DeepSpeed file's bf16 disagree"),
        ("bf16", FP16_FILE, "--precision bf16 and the DeepSpeed file's fp16 disagree"),
        ("auto", FP16_FILE, "fp16 under DeepSpeed is not supported"),
        ("fp16", {}, "fp16 under DeepSpeed is not supported"),
        ("bf16", {"bf16": {"enabled": False}}, "--precision bf16 and the DeepSpeed file's fp32 disagree"),
        ("bf16", {"bf16": {"enabled": False}, "torch_autocast": {"enabled": False}}, "fp32 disagree"),
    ],
)
def test_precisions_that_are_refused(wanted, config, words):
    with pytest.raises(Refused, match=words):
        resolve_precision(wanted, config)


def test_the_device_decides_between_bf16_and_fp32():
    assert precision.default_precision() in ("bf16", "fp32")


# --- the DeepSpeed file ---


def fill(config, precision="fp32"):
    return fill_deepspeed_config({"zero_optimization": {"stage": 2}} | config, 32, 1.0, precision)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": 64}, "train_batch_size 64 and --batch-size 32 disagree"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 and --max-grad-norm 1.0 disagree"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2: .*--tokens-per-device"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4: .*--tokens-per-device"),
        ({"optimizer": {"type": "Adam"}}, 'a section "optimizer": remove it and use --optimizer, --learning-rate'),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}}, 'a section "optimizer": remove it'),
        ({"optimizer": {"type": "AdamW"}}, 'a section "optimizer": remove it'),
        ({"scheduler": {"type": "WarmupLR"}}, 'a section "scheduler": remove it and use --warmup-ratio'),
        ({"zero_optimization": {}}, "stage 0"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param goes to nvme, where checkpoints cannot read it: use cpu",
        ),
    ],
)
def test_numbers_that_contradict_the_flags_are_refused(config, words):
    with pytest.raises(Refused, match=words):
        fill(config)


@pytest.mark.parametrize("value", ["auto", 32])
def test_numbers_that_agree_or_are_left_to_us_are_filled_in(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = {"train_batch_size": value, "gradient_accumulation_steps": "auto", "optimizer": "auto"}
    filled = fill(given)
    # DeepSpeed wants train_batch_size = micro × accumulation × world; steps are cut by us.
    assert filled["train_batch_size"] == 4
    assert filled["gradient_accumulation_steps"] == filled["train_micro_batch_size_per_gpu"] == 1
    assert filled["gradient_clipping"] == 1.0 and "optimizer" not in filled
    assert given["train_batch_size"] == value  # the caller's is left alone


def test_an_optimizer_section_that_leaves_all_open_is_ours():
    filled = fill({"optimizer": {"type": "AdamW", "params": {"lr": "auto", "weight_decay": "auto"}}})
    assert "optimizer" not in filled


def test_an_offload_that_is_no_section_is_refused(tmp_path):
    path = tmp_path / "zero.json"
    for content, words in (
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, r"offload_optimizer of .* is 'cpu': wanted {\"device\""),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled of .* is 'true': wanted true, false or \"auto\""),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(Refused, match=words):
            read_deepspeed_config(path)


@pytest.mark.parametrize(
    ("zero", "words"),
    [
        (
            {"reduce_bucket_sizes": 1000},
            "zero_optimization.reduce_bucket_sizes is 1000: Extra inputs are not permitted",
        ),
        ({"overlap_comm": "x"}, "zero_optimization.overlap_comm is 'x': "),
        ({"offload_optimizer": {"device": "tpu"}}, "zero_optimization.offload_optimizer.device is 'tpu': "),
    ],
)
def test_what_deepspeed_does_not_know_is_refused(zero, words):
    with pytest.raises(Refused, match=words):
        fill({"zero_optimization": {"stage": 2, **zero}})


@pytest.mark.parametrize(("precision", "enabled"), [("bf16", True), ("fp32", False)])
def test_bf16_is_autocast_over_float32_parameters(precision, enabled):
    filled = fill({"bf16": {"enabled": "auto"}}, precision)
    assert filled["bf16"] == filled["fp16"] == {"enabled": False}
    assert filled["torch_autocast"] == {"enabled": enabled, "dtype": "bfloat16"}


def test_no_auto_is_left_and_zero_3_gathers_at_save():
    filled = fill({"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto", "overlap_comm": True}})
    assert filled["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": True,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert '"auto"' not in json.dumps(filled)


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
def test_deepspeed_without_zero_is_refused(config):
    with pytest.raises(Refused, match="leave --deepspeed out"):
        fill_deepspeed_config(config, 32, 1.0, "fp32")


@pytest.mark.parametrize("stage", [4, -1, "2", 1.5, True, 2.0])
def test_a_stage_that_there_is_not_is_refused(stage):
    with pytest.raises(Refused, match="wanted 1, 2 or 3"):
        zero_stage({"zero_optimization": {"stage": stage}})


def test_zero_stages():
    assert [zero_stage(config) for config in (None, {}, {"zero_optimization": {"stage": 3}})] == [None, 0, 3]


def test_a_file_is_read_or_refused(tmp_path):
    path = tmp_path / "ds.json"
    with pytest.raises(Refused, match="no such file"):
        read_deepspeed_config(path)
    for broken in ("{", ""):
        path.write_text(broken)
        with pytest.raises(Refused, match="is not JSON"):
            read_deepspeed_config(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(Refused, match="is not JSON"):
        read_deepspeed_config(path)
    with pytest.raises(Refused, match="is not JSON"):
        read_deepspeed_config(tmp_path)
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert read_deepspeed_config(path) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("content", ["[1, 2]", '"zero2"', "3", '{"zero_optimization": 2}', '{"bf16": true}'])
def test_a_file_that_is_json_but_no_configuration_is_refused(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(Refused, match="is no DeepSpeed configuration"):
        fill(read_deepspeed_config(path))


def test_without_a_file_and_a_launcher_there_is_no_deepspeed(monkeypatch):
    assert read_deepspeed_config(None) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert read_deepspeed_config(None) is None


def test_the_launchers_own_configuration_file_is_read(tmp_path, monkeypatch):
    """`accelerate launch --use_deepspeed --deepspeed_config_file FILE`."""
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert zero_stage(read_deepspeed_config(None)) == 1
