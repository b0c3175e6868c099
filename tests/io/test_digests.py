"""Hashes made while files are read are those of the whole files, in whatever order that is."""

import numpy as np
import pytest
import xxhash

from moejax.io import digests, lineage
from moejax.io.load import load_any
from tests.tiny_llama import BASE, tensors_of, write_llama

ORDERS = {
    "from end to end": [(0, 400), (400, 800), (800, 1000)],
    "with gaps": [(100, 200), (500, 501), (900, 950)],
    "backwards": [(600, 1000), (300, 600), (0, 300)],
    "overlapping": [(0, 500), (250, 750), (250, 400), (700, 900)],
    "not at all": [],
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_hash_is_that_of_the_file(tmp_path, monkeypatch, order):
    monkeypatch.setattr(digests, "_READ_BYTES", 64)
    content = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(content.tobytes())
    found = digests.Digests()
    for start, end in ORDERS[order]:
        for path in paths:
            found.saw(path, start, content[start:end])
    wanted = xxhash.xxh3_128(content.tobytes()).hexdigest()
    assert [found.of(path) for path in paths] == [wanted] * 2


def test_bytes_are_hashed_as_they_were_read(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    found = digests.Digests()
    found.saw(tmp_path / "a", 0, np.zeros(100, np.uint8))
    (tmp_path / "a").write_bytes(bytes([1]) * 100)
    assert found.of(tmp_path / "a") == xxhash.xxh3_128(bytes(100)).hexdigest()


def test_a_folder_that_is_read_is_hashed(tmp_path):
    folder = write_llama(tmp_path / "m", BASE, tensors_of(BASE), max_shard_bytes=20_000)
    source = load_any(folder, abstract=True).tensors
    hashed = source.hash_reads()
    assert source.hash_reads() is hashed
    for name in list(source.infos)[:-2]:
        source.read(name)[...] = 0  # who reads may write to it
    assert lineage.input_of(folder, hashed.of) == lineage.input_of(folder)
