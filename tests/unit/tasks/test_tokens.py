"""Test encoding: the tokenizer's own ids, the count of truncated texts, a cache that survives torn files and races."""

import threading

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from zerotune.errors import Refused
from zerotune.files import default_cache_dir
from zerotune.tasks.tokens import encode_texts

WORDS = ["<s>", "</s>", "<unk>", "a", "warm", "dull", "film", "and", "long"]
TEXTS = ["a warm film", "a dull and long film", "film", "warm warm warm warm warm warm"]


def make_tokenizer(template: str | None = "<s> $A", **kwargs) -> PreTrainedTokenizerFast:
    """Make a word tokenizer whose ids are positions in WORDS."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if template:
        backend.post_processor = processors.TemplateProcessing(template, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>", **kwargs
    )


def cache_files(folder):
    return sorted(folder.rglob("*.bin"))


def test_golden_ids_and_truncation(tmp_path):
    encoded = encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)
    assert encoded.ids.dtype == np.int32
    assert encoded.offsets.tolist() == [0, 4, 10, 12, 18]
    assert encoded.lengths.tolist() == [4, 6, 2, 6]
    assert encoded.row(1).tolist() == [0, 3, 5, 7, 8, 6]
    # row 1 has exactly six tokens and is whole; row 3 would have seven
    assert encoded.num_truncated == 1
    assert encoded.type_ids is None


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>"])
def test_head_and_tail_of_a_long_text(template):
    """A quarter of the room for text, rounded down, comes from the head; special tokens stay where they are."""
    tokenizer = make_tokenizer(template)
    long = "a film that nobody saw nobody saw nobody saw film a"
    for max_length in range(4, 14):
        encoded = encode_texts(tokenizer, ["a film", long, "a film"], max_length, None, "head-and-tail")
        whole = tokenizer([long])["input_ids"][0]
        num_special = tokenizer.num_special_tokens_to_add(pair=False)
        opening, closing = int(template.startswith("<s>")), int(template.endswith("</s>"))
        text = whole[opening : len(whole) - closing]
        room = max_length - num_special
        head = room // 4
        if len(text) > room:
            text = text[:head] + text[len(text) - (room - head) :]
        assert encoded.row(1).tolist() == whole[:opening] + text + whole[len(whole) - closing :]
        assert encoded.num_truncated == int(len(whole) > max_length)
        assert encoded.row(0).tolist() == encoded.row(2).tolist() == tokenizer(["a film"])["input_ids"][0]


def test_head_and_tail_has_a_cache_of_its_own(tmp_path):
    for truncation in ("head", "head-and-tail", "head"):
        encode_texts(make_tokenizer(), TEXTS, 6, tmp_path, truncation)
    assert len(cache_files(tmp_path)) == 2


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>"])
def test_ids_are_those_of_the_tokenizer(template):
    tokenizer = make_tokenizer(template)
    texts = TEXTS * 700  # more than one call of the backend
    encoded = encode_texts(tokenizer, texts, 5, None)
    wanted = tokenizer(texts, truncation=True, max_length=5)["input_ids"]
    assert [encoded.row(text).tolist() for text in range(len(texts))] == wanted
    assert encoded.num_truncated == sum(len(row) > 5 for row in tokenizer(texts)["input_ids"])


def test_token_types_where_the_tokenizer_has_them(tmp_path):
    tokenizer = make_tokenizer("<s>:0 $A:0 </s>:1", model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    for _ in range(2):
        encoded = encode_texts(tokenizer, TEXTS[:2], 10, tmp_path)
        assert encoded.type_ids.dtype == np.uint8
        assert encoded.type_ids.tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]


def test_cache_is_used_and_arrays_are_read_only(tmp_path, monkeypatch):
    first = encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)
    monkeypatch.setattr("zerotune.tasks.tokens._encode", lambda *_: pytest.fail("encoded again"))
    second = encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.offsets, second.offsets)
    assert second.num_truncated == 1
    with pytest.raises(ValueError, match="read-only"):
        second.ids[0] = 3


def test_cache_name_depends_on_content_and_not_on_history(tmp_path):
    tokenizer = make_tokenizer()
    encode_texts(tokenizer, TEXTS, 6, tmp_path)
    tokenizer(TEXTS, padding=True, truncation=True, max_length=3)  # its settings stay in the backend
    encode_texts(tokenizer, TEXTS, 6, tmp_path)
    assert len(cache_files(tmp_path)) == 1
    encode_texts(tokenizer, TEXTS, 7, tmp_path)
    encode_texts(tokenizer, [*TEXTS[:-1], "dull"], 6, tmp_path)
    encode_texts(make_tokenizer("$A"), TEXTS, 6, tmp_path)
    encode_texts(make_tokenizer(truncation_side="left"), TEXTS, 6, tmp_path)
    assert len(cache_files(tmp_path)) == 5
    # the same letters, split into texts differently
    encode_texts(tokenizer, ["a", "b"], 6, tmp_path)
    encode_texts(tokenizer, ["ab"], 6, tmp_path)
    assert len(cache_files(tmp_path)) == 7


@pytest.mark.parametrize(
    "tear", [lambda data: b"", lambda data: data[:40], lambda data: data[:-1], lambda data: data + b"x"]
)
def test_torn_cache_file_is_rebuilt(tmp_path, tear):
    whole = encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)
    (path,) = cache_files(tmp_path)
    good = path.read_bytes()
    path.write_bytes(tear(good))
    again = encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)
    assert np.array_equal(again.ids, whole.ids)
    assert path.read_bytes() == good


def test_flipped_byte_is_noticed(tmp_path):
    whole = encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)
    (path,) = cache_files(tmp_path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    assert np.array_equal(encode_texts(make_tokenizer(), TEXTS, 6, tmp_path).ids, whole.ids)


def test_many_writers_leave_one_whole_file(tmp_path):
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(encode_texts(make_tokenizer(), TEXTS, 6, tmp_path)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [cache_files(tmp_path)[0].name]


def test_refusals(tmp_path):
    with pytest.raises(Refused, match=r"--max-length 2 leaves no room for text beside the special tokens \(2\)"):
        encode_texts(make_tokenizer("<s> $A </s>"), TEXTS, 2, None)
    with pytest.raises(Refused, match="text 1 itself begins with <s>"):
        encode_texts(make_tokenizer(), ["a film", "<s> a film"], 6, None)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    with pytest.raises(Refused, match=r"token cache cannot be written .* ZEROTUNE_CACHE"):
        encode_texts(make_tokenizer(), TEXTS, 6, in_the_way)


def test_no_texts(tmp_path):
    encoded = encode_texts(make_tokenizer(), [], 6, tmp_path)
    assert (len(encoded.ids), encoded.offsets.tolist(), len(encoded.lengths)) == (0, [0], 0)


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("ZEROTUNE_CACHE", str(tmp_path / "own"))
    assert default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("ZEROTUNE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "zerotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "zerotune"


def test_a_pair_is_two_segments_as_the_tokenizer_makes_them(tmp_path):
    tokenizer = make_tokenizer(None, model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    pairs = [("a warm film", "dull"), ("film", "a dull and long film"), ("warm warm warm", "film")]
    encoded = encode_texts(tokenizer, pairs, 8, tmp_path)
    wanted = tokenizer([a for a, _ in pairs], [b for _, b in pairs], truncation=True, max_length=8)
    assert [encoded.row(number).tolist() for number in range(3)] == wanted["input_ids"]
    assert encoded.type_ids.tolist() == [kind for row in wanted["token_type_ids"] for kind in row]
    assert encoded.num_truncated == 1
    joined = encode_texts(tokenizer, [f"{a} {b}" for a, b in pairs], 8, tmp_path)
    assert joined.ids.tolist() != encoded.ids.tolist()
    with pytest.raises(Refused, match="head-and-tail is for single texts"):
        encode_texts(tokenizer, pairs, 8, tmp_path, "head-and-tail")
