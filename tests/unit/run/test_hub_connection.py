"""The hub's client is set offline if nothing answers, and left alone if something does or there is a proxy."""

import socket

import pytest
from huggingface_hub import constants

from zerotune.run.hub_connection import is_offline_on_request, stay_offline_without_network


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_offline_where_nothing_answers(monkeypatch, listening):
    port = listening.getsockname()[1]
    listening.close()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    stay_offline_without_network()
    assert constants.HF_HUB_OFFLINE and not is_offline_on_request()


def test_online_where_something_answers(monkeypatch, listening):
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{listening.getsockname()[1]}")
    stay_offline_without_network()
    assert not constants.HF_HUB_OFFLINE


def test_a_proxy_is_left_to_the_client(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    stay_offline_without_network()
    assert not constants.HF_HUB_OFFLINE


def test_offline_by_wish(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert is_offline_on_request()
