"""Fixtures for both unit and script tests."""

import sys

import pytest


@pytest.fixture(autouse=True)
def one_thread(request):
    """Tiny matrices gain nothing from a second thread, and lose much if other processes need the core."""
    torch = sys.modules.get("torch")
    if torch is None or "benchmarks" in request.path.parts or "gpu" in request.path.parts:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def plain_four_bits(monkeypatch):
    """Switch off bitsandbytes' AVX512-BF16 path, which a plain load uses: it rounds, and the tests compare weights."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Give Hugging Face's libraries an empty cache, and hide Debian's WordNet."""
    from huggingface_hub import constants

    from zerotune.cluster import prefetch

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf" / "datasets"))
    monkeypatch.setattr(prefetch, "DEBIAN_FOLDER", tmp_path / "no-wordnet")
    return tmp_path / "hf"
