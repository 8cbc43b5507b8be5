"""Each shape that plans know has the published number of parameters."""

import pytest

from zerotune.models.families import SUPPORTED
from zerotune.models.parameters import published_table
from zerotune.models.shapes import config_to_plan, known_shape, shape_config, shapes


@pytest.mark.parametrize("short", shapes())
def test_a_shape_has_the_published_parameters(short):
    config = shape_config(short)
    assert config.model_type in SUPPORTED
    assert published_table(config)["total"] == shapes()[short]["parameters"]


def test_a_shape_is_found_by_short_name_and_hub_id():
    assert known_shape("llama-3.1-8b") == known_shape("meta-llama/Llama-3.1-8B-Instruct") == "Llama-3.1-8B"
    assert known_shape("org/Llama-3.1-8B-mine") is None


def test_a_file_that_is_there_is_read_instead(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = shape_config("Llama-3.1-8B")
    small.num_hidden_layers = 3
    small.save_pretrained("Llama-3.1-8B")
    config, shape = config_to_plan("Llama-3.1-8B", None)
    assert (config.num_hidden_layers, shape) == (3, None)
