"""Text into blocks of tokens."""

import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from artemis import AdapterError
from artemis.cli.demo.corpus import byte_pairs
from artemis.training import load_blocks

TOKENIZER = byte_pairs()


def decode(blocks) -> list[str]:
    return [TOKENIZER.decode(block) for block in blocks.blocks]


def test_text_is_cut_into_equal_blocks_and_the_rest_is_left(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    blocks = load_blocks(path, TOKENIZER, 4)
    assert decode(blocks) == ["abcd", "efgh"]
    path.write_text("abcdefg")  # two blocks exactly, with the end of the text
    assert len(load_blocks(path, TOKENIZER, 4)) == 2
    example = blocks[1]
    assert torch.equal(example["input_ids"], blocks.blocks[1].long())
    assert torch.equal(example["input_ids"], example["labels"])


def test_documents_are_joined_by_the_end_of_text(tmp_path):
    first, second = tmp_path / "a.txt", tmp_path / "b.jsonl"
    first.write_text("abc")
    second.write_text('{"text": "de"}\n\n{"text": "f\\u2028g", "more": 1}\n')
    blocks = load_blocks([first, second], TOKENIZER, 6)
    end = TOKENIZER.eos_token
    assert decode(blocks) == [f"abc{end}de", f"{end}f\u2028g"]  # the last end fills no block


def test_no_document_begins_with_the_token_that_a_prompt_begins_with(tmp_path):
    """As Llama's tokenizer begins a prompt: a block may begin anywhere, a document within one."""
    tokenizer, path = byte_pairs(), tmp_path / "text.jsonl"
    start = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    assert tokenizer.decode(tokenizer("ab")["input_ids"]) == f"{start}ab"
    path.write_text('{"text": "abc"}\n{"text": "d"}\n')
    assert decode(load_blocks(path, tokenizer, 6)) == [f"abc{tokenizer.eos_token}d{start}"]


def test_the_mark_of_an_encoding_is_not_text(tmp_path):
    for name, content in (("a.txt", "abcd"), ("b.jsonl", '{"text": "abcd"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        blocks = load_blocks(tmp_path / name, TOKENIZER, 5)
        assert decode(blocks) == [f"abcd{TOKENIZER.eos_token}"]


def test_json_lines_are_known_by_any_spelling(tmp_path):
    path = tmp_path / "DATA.JSONL"
    path.write_text('{"text": "abcd"}')
    assert decode(load_blocks(path, TOKENIZER, 4)) == ["abcd"]


def test_any_column_may_hold_the_text(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"body": "hello", "text": "not this"}))
    assert decode(load_blocks(path, TOKENIZER, 5, text_column="body")) == ["hello"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("short.txt", b"ab", "the text is shorter than one sequence of 4 tokens"),
        ("empty.txt", b"", "shorter than one sequence"),
        ("mark.txt", b"\xef\xbb\xbfa\xff", r"mark.txt: not UTF-8 text \(byte 4\)"),
        ("latin.txt", "caf\u00e9s".encode("latin-1"), r"latin.txt: not UTF-8 text \(byte 3\)"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "bad.jsonl:2: not JSON"),
        ("digits.jsonl", b"[" + b"9" * 5000 + b"]", "digits.jsonl:1: not JSON: Exceeds the limit"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl:1: not JSON: .*recursion"),
        ("list.jsonl", b"[1]", "list.jsonl:1: expected a JSON object, got list"),
        ("column.jsonl", b'{"txt": "a"}', "column.jsonl:1: no column 'text', only txt; did you"),
        ("number.jsonl", b'{"text": 3}', "number.jsonl:1: column 'text' must be a string, got int"),
        (
            "half.jsonl",
            b'{"text": "\\ud83d\\ude42"}\n{"text": "a\\ud83d"}',
            r"half.jsonl:2: column 'text' holds half of a surrogate pair, \\ud83d",
        ),
    ],
)
def test_unusable_data_is_named_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterError, match=message):
        load_blocks(tmp_path / name, TOKENIZER, 4)


def test_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist or is not a file"):
            load_blocks(path, TOKENIZER, 4)
