"""Checksums of bytes and fingerprints of meaning."""

import hashlib

import pytest
import xxhash

from vlm_distill_cache.common.files.hashing import checksum, file_checksum, file_digests, fingerprint, sha256_hex


def test_digests_are_pinned():
    assert checksum(b"") == "99aa06d3014798d86001c324468d497f"
    assert checksum(b"teacher") == xxhash.xxh3_128(b"teacher").hexdigest()
    assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    # A changed fingerprint would refuse every cache that exists.
    assert fingerprint({"b": [1, 2.5, None], "a": "é"}) == checksum(rb'{"a":"\u00e9","b":[1,2.5,null]}')


def test_file_digests_equal_those_of_the_bytes(tmp_path):
    data = bytes(range(256)) * 9000  # more than one read
    path = tmp_path / "file"
    path.write_bytes(data)
    assert file_digests(path) == (checksum(data), hashlib.sha256(data).hexdigest(), len(data))
    assert file_checksum(path) == checksum(data)


def test_fingerprint_ignores_key_order_and_sequence_type_only():
    assert fingerprint({"a": 1, "b": (1, 2)}) == fingerprint({"b": [1, 2], "a": 1})
    different = [{"a": 1}, {"a": 1.0}, {"a": "1"}, {"a": True}, {"a": None}, {"a": [1]}, {}, []]
    assert len({fingerprint(value) for value in different}) == len(different)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_fingerprint_refuses_numbers_that_are_not_finite(value):
    with pytest.raises(ValueError, match="not a finite number"):
        fingerprint(value)


@pytest.mark.parametrize(
    ("value", "message"), [({1: 2}, "key 1 is not a string"), ({"a": {2}}, r"value\.a: set is not JSON")]
)
def test_fingerprint_refuses_what_is_not_json(value, message):
    with pytest.raises(TypeError, match=message):
        fingerprint(value)
