"""Test how DeepSpeed files and precisions resolve, and which are refused."""

import json
from pathlib import Path

import pytest

from tests.default_settings import optimisation_settings
from zerotune.errors import Refused
from zerotune.settings import precision
from zerotune.settings.deepspeed import (
    BUCKET_SIZE,
    check_deepspeed_config,
    fill_deepspeed_config,
    read_deepspeed_config,
    zero_stage,
)
from zerotune.settings.flags import train_parser
from zerotune.settings.precision import resolve_precision
from zerotune.settings.resolve import train_settings
from zerotune.tasks.sst2 import SST2

CONFIGS = Path(__file__).parents[3] / "ds_configs"


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


def test_deepspeed_exchanges_gradients_in_its_own_type():
    flags = ["--sample", "--deepspeed", str(CONFIGS / "zero2.json"), "--gradient-exchange", "bf16"]
    with pytest.raises(Refused, match="--gradient-exchange bf16 is for runs without DeepSpeed"):
        train_settings(train_parser("", SST2).parse_args(flags), "sst2", {"epochs": 1, "learning_rate": 1e-3})


def fill(config, precision="fp32", **flags):
    config = {"zero_optimization": {"stage": 2}} | config
    check_deepspeed_config(config, optimisation_settings(**flags))
    return fill_deepspeed_config(config, 1.0, precision)


def adamw(**params):
    return {"type": "AdamW", "params": params}


def warmup(**params):
    return {"type": "WarmupDecayLR", "params": params}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"train_batch_size": 64}, "train_batch_size 64 and --batch-size 32 disagree"),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5 and --max-grad-norm 1.0 disagree"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps is 2: .*--tokens-per-device"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4: .*--tokens-per-device"),
        ({"optimizer": {"type": "Adam"}}, "optimizer type Adam and --optimizer adamw disagree"),
        ({"optimizer": {}}, "optimizer type None and --optimizer adamw disagree"),
        ({"optimizer": adamw(lr=1e-5)}, 'optimizer lr 1e-05 and --learning-rate 2e-05 disagree: write "auto", or'),
        ({"optimizer": adamw(weight_decay=0)}, "weight_decay 0 and --weight-decay 0.01 disagree"),
        (
            {"optimizer": adamw(betas=[0.8, 0.999])},
            r"betas is \[0.8, 0.999\]: zerotune always has \[0.9, 0.999\]; write",
        ),
        (
            {"optimizer": adamw(amsgrad=True)},
            'optimizer amsgrad is True: zerotune derives it from the flags; write "auto"',
        ),
        ({"optimizer": {"type": "AdamW", "params": 5}}, "optimizer params are 5, wanted a dictionary"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler type WarmupLR and --schedule linear disagree"),
        ({"scheduler": warmup(warmup_max_lr=0.1)}, "warmup_max_lr 0.1 and --learning-rate 2e-05 disagree"),
        (
            {"scheduler": warmup(warmup_num_steps=9)},
            'scheduler warmup_num_steps is 9: zerotune derives it from the flags; write "auto"',
        ),
        ({"zero_optimization": {}}, "stage 0"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "offload_param is nvme, which checkpoints cannot read: use cpu",
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            'cpu_offload is deprecated: write "offload_optimizer": {"device": "cpu"}',
        ),
    ],
)
def test_numbers_that_contradict_the_flags_are_refused(config, words):
    with pytest.raises(Refused, match=words):
        fill(config)


def test_the_files_optimizer_contradicts_another_flag():
    with pytest.raises(Refused, match="optimizer type AdamW and --optimizer adamw8bit disagree: leave the section out"):
        fill({"optimizer": {"type": "AdamW"}}, optimizer="adamw8bit")


@pytest.mark.parametrize("value", ["auto", 32])
def test_numbers_that_agree_or_are_left_to_us_are_filled_in(value, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = {"train_batch_size": value, "gradient_accumulation_steps": "auto", "optimizer": "auto"}
    filled = fill(given)
    # DeepSpeed requires train_batch_size = micro × accumulation × world, but zerotune cuts the steps.
    assert filled["train_batch_size"] == 4
    assert filled["gradient_accumulation_steps"] == filled["train_micro_batch_size_per_gpu"] == 1
    assert filled["gradient_clipping"] == 1.0 and "optimizer" not in filled
    assert given["train_batch_size"] == value  # the caller's dictionary is unchanged


@pytest.mark.parametrize(
    ("sections", "flags"),
    [
        ({"optimizer": adamw(lr="auto", weight_decay="auto")}, {"optimizer": "adamw8bit"}),
        ({"scheduler": warmup(warmup_num_steps="auto")}, {"schedule": "cosine"}),
        ({"optimizer": {"type": "AdamW", "params": None}}, {}),
        ({"optimizer": {"type": "AdamW"}, "scheduler": {"type": "WarmupLR"}}, {"schedule": "constant"}),
        (
            {"optimizer": adamw(lr=3e-5, weight_decay=0.1, betas=[0.9, 0.999])},
            {"learning_rate": 3e-5, "weight_decay": 0.1},
        ),
        ({"scheduler": warmup(warmup_max_lr=3e-5, warmup_num_steps="auto")}, {"learning_rate": 3e-5}),
    ],
)
def test_sections_that_agree_with_the_flags_are_taken_out(sections, flags):
    assert not {"optimizer", "scheduler"} & fill(sections, **flags).keys()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], r"it is \[1, 2\], wanted a valid dictionary"),
        ("zero2", "it is 'zero2', wanted a valid dictionary"),
        ({"zero_optimization": 2}, "zero_optimization is 2, wanted a valid dictionary"),
        ({"bf16": True}, "bf16 is True, wanted a valid dictionary"),
        ({"bf16": {"enabled": "true"}}, "bf16.enabled is 'true', wanted a valid boolean or 'auto'"),
        ({"bf16": {"enabeld": True}}, "bf16.enabeld is not known"),
        ({"fp16": {"enabled": "auto", "loss_scale": "x"}}, "fp16.loss_scale is 'x', wanted a valid number or 'auto'"),
        ({"torch_autocast": {"enabled": True, "dtype": "half"}}, "torch_autocast.dtype is 'half', wanted 'bfloat16'"),
        ({"train_batch_size": "32"}, "train_batch_size is '32', wanted a valid integer or 'auto'"),
        ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu is True, wanted"),
        ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0', wanted a valid number or 'auto'"),
        ({"optimizer": 5}, "optimizer is 5, wanted"),
        ({"communication_data_type": 16}, "communication_data_type is 16, wanted 'fp32', 'bf16' or 'fp16'"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown is 'yes', wanted a valid boolean"),
        ({"steps_per_print": "x"}, "steps_per_print is 'x', wanted a valid number or 'auto'"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, "offload_optimizer is 'cpu', wanted a valid dictionary"),
        ({"zero_optimization": {"offload_optimizer": {"pin_memory": "auto"}}}, "pin_memory is 'auto', wanted a valid"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "ratio is 0.5, wanted"),
        ({"zero_optimization": {"offload_optimizer": {"super_offload": True}}}, "super_offload is True, wanted False"),
        ({"zero_optimization": {"reduce_bucket_size": 10**25}}, "reduce_bucket_size is 10+, wanted less than"),
        (
            {"zero_optimization": {"leaf_module": "x"}},
            "leaf_module is 'x', wanted a valid dictionary",
        ),
        ({"zero_optimization": {"legacy_stage1": True}}, "zero_optimization.legacy_stage1 is True, wanted False"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zero_optimization.zenflow is .* wanted None"),
        ({"zero_optimization": {"compute_grad_norm": False}}, "compute_grad_norm is False, wanted True"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights is True, wanted False"),
        ({"data_types": {"grad_accum_dtype": "fp16"}}, "data_types is not known"),
        ({"curriculum_learning": {"enabled": True}}, "curriculum_learning is not known"),
        ({"elasticity": {"enabled": True}}, "elasticity is not known"),
        ({"compression_training": {}}, "compression_training is not known"),
        ({"aio": "x"}, "aio is not known"),
        ({"sparse_gradients": True}, "sparse_gradients is not known"),
        ({"activation_checkpointing": {}}, "activation_checkpointing is not known"),
        ({"gradient_cliping": 1.0}, "gradient_cliping is not known"),
    ],
)
def test_keys_and_types_that_have_no_place_in_a_run_are_refused(tmp_path, content, words):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(content))
    with pytest.raises(Refused, match=rf"{path} is not a DeepSpeed configuration that zerotune can use \(.*{words}"):
        read_deepspeed_config(path)


@pytest.mark.parametrize("text", ['{"zero_optimization":' * 100_000, '{"gradient_clipping": NaN}', "\ufeff{}", "\0"])
def test_text_that_is_no_json_of_ours(tmp_path, text):
    path = tmp_path / "zero.json"
    path.write_text(text)
    with pytest.raises(Refused, match="is not JSON") as refusal:
        read_deepspeed_config(path)
    assert len(str(refusal.value)) < 300


def test_a_file_that_other_tools_use_is_read(tmp_path):
    content = {
        "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
        "bf16": {"enabled": "auto"},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "weight_decay": "auto"},
        },
        "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}},
        "zero_optimization": {
            "stage": 2,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
            "allgather_bucket_size": 2e8,
            "reduce_bucket_size": "auto",
        },
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "steps_per_print": 2000,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "wall_clock_breakdown": False,
    }
    path = tmp_path / "zero2.json"
    path.write_text(json.dumps(content))
    assert '"auto"' not in json.dumps(fill_deepspeed_config(read_deepspeed_config(path), 1.0, "bf16"))


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


def test_an_older_name_of_a_key_that_is_always_set_is_accepted():
    filled = fill({"zero_optimization": {"stage": 3, "stage3_gather_fp16_weights_on_model_save": True}})
    assert filled["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    assert "stage3_gather_fp16_weights_on_model_save" not in filled["zero_optimization"]


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
        "reduce_bucket_size": BUCKET_SIZE,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    assert '"auto"' not in json.dumps(filled)


@pytest.mark.parametrize(("given", "size"), [({}, BUCKET_SIZE), ({"reduce_bucket_size": 2e6}, 2e6)])
def test_buckets_have_our_size_unless_the_file_names_one(given, size):
    assert fill({"zero_optimization": {"stage": 1, **given}})["zero_optimization"]["reduce_bucket_size"] == size


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.json")), ids=lambda path: path.stem)
def test_the_shipped_files_say_how_large_buckets_are(path):
    assert read_deepspeed_config(path)["zero_optimization"]["reduce_bucket_size"] == BUCKET_SIZE


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {}}, {"zero_optimization": {"stage": 0}}])
def test_deepspeed_without_zero_is_refused(config):
    with pytest.raises(Refused, match="leave --deepspeed out"):
        check_deepspeed_config(config, optimisation_settings())


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


def test_without_a_file_and_a_launcher_there_is_no_deepspeed(monkeypatch):
    assert read_deepspeed_config(None) is None
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    assert read_deepspeed_config(None) is None


def test_the_launchers_own_configuration_file_is_read(tmp_path, monkeypatch):
    """It comes from `accelerate launch --use_deepspeed --deepspeed_config_file FILE`."""
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_CONFIG_DS_FIELDS", "deepspeed_config_file")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(path))
    assert zero_stage(read_deepspeed_config(None)) == 1
