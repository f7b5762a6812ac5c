"""Token shards: written once by `prepare`, read through memory maps by `TokenData`.

    DIR/manifest.json                       what is in the folder; its hash names the data
    DIR/train-00000.bin  DIR/val-00000.bin  token ids, little-endian, without a header

Documents are split by their own hash, so a document stays on its side when others are added, and
copies of one document never end on both sides. Each document ends with the tokeniser's separator.

Losses of different tokenisers compare as bits per byte: nats per token / ln 2 / bytes per token,
where a separator counts as one byte. It is measured on the validation split.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ceg_model import documents
from ceg_model.progress import ProgressFn
from ceg_model.tokenizers import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    import torch

FORMAT = "ceg-tokens"
VERSION = 1
SPLITS = ("train", "val")
MANIFEST = "manifest.json"
SHARD_TOKENS = 1 << 26
DOCUMENT_BYTES = 1 << 16
BATCH_BYTES = 1 << 22  # text handed to the tokeniser at once, so that its threads have work


@dataclass(frozen=True)
class Request:
    """What to prepare. `sources`: paths of files and folders; none and no `hf`: the built-in."""

    sources: tuple[str, ...] = ()
    hf: str | None = None  # NAME or NAME:split
    hf_config: str | None = None  # for data sets that have several
    text_field: str = "text"
    tokenizer: str = "byte"
    val_fraction: float = 0.05
    document_bytes: int = DOCUMENT_BYTES
    shard_tokens: int = SHARD_TOKENS

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1, got {self.val_fraction}")
        for name in ("document_bytes", "shard_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.sources and self.hf:
            raise ValueError(f"sources must be empty when hf is given, got {list(self.sources)}")

    def documents(self, skipped: documents.Skipped) -> Iterator[bytes]:
        """Every document of the sources, in order."""
        if self.hf:
            name, _, split = self.hf.partition(":")
            yield from documents.dataset_documents(
                name, self.text_field, split=split or "train", config=self.hf_config
            )
        elif not self.sources:
            yield from documents.stdlib_documents(self.document_bytes, skipped)
        for source in map(Path, self.sources):
            if documents.is_table(source):
                yield from documents.dataset_documents(
                    documents.TABLE_SUFFIXES[source.suffix],
                    self.text_field,
                    data_files=[str(source)],
                )
            else:
                yield from documents.text_documents(source, self.document_bytes, skipped)


def prepare(
    request: Request, out: str | Path, progress: ProgressFn | None = None
) -> dict[str, Any]:
    """Write the token shards of `request` to the folder `out` and return their manifest.

    The folder appears whole or not at all. One that exists is left as it is: the call succeeds
    when it holds the very same data, and is refused otherwise.
    """
    out = Path(out)
    tokenizer = load_tokenizer(request.tokenizer)
    existing = _existing_manifest(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        manifest = _write_all(request, tokenizer, partial, progress)
        if existing is None:
            try:
                os.rename(partial, out)
            except OSError:  # another process was faster, or this is not a matter of names at all
                if (existing := _existing_manifest(out)) is None:
                    raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if existing is not None and existing["hash"] != manifest["hash"]:
        raise ValueError(
            f"{out} must be new or hold the same data (hash {manifest['hash'][:16]}), "
            f"got data with hash {existing['hash'][:16]}; choose another folder"
        )
    return existing or manifest


def _existing_manifest(out: Path) -> dict[str, Any] | None:
    if (out / MANIFEST).is_file():
        return read_manifest(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} must be new, empty or a folder of token shards, got other files")
    return None


def _write_all(
    request: Request, tokenizer: Tokenizer, folder: Path, progress: ProgressFn | None
) -> dict[str, Any]:
    skipped = documents.Skipped()
    splits = {name: _SplitWriter(folder, name, tokenizer, request.shard_tokens) for name in SPLITS}
    read = 0
    for is_val, text in _split_documents(request.documents(skipped), request, skipped):
        splits["val" if is_val else "train"].add(text)
        read += len(text)
        if progress is not None:
            progress(read >> 20, 0, "MiB read")
    for writer in splits.values():
        writer.close()
    for name, writer in splits.items():
        if writer.tokens == 0:
            raise ValueError(
                f"the {name} split must have documents, got none: "
                f"{sum(w.documents for w in splits.values())} document(s) in all "
                f"(cut large files smaller with document_bytes, got {request.document_bytes})"
            )
    manifest = _manifest(request, tokenizer, splits, skipped)
    _write_synced(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    return manifest


def _split_documents(
    texts: Iterable[bytes], request: Request, skipped: documents.Skipped
) -> Iterator[tuple[bool, bytes]]:
    """(whether it belongs to validation, document), by the document's hash.

    When no hash falls below the fraction (few documents), the smallest one is the validation set;
    until there is a better one, that document is held back.
    """
    threshold = int(request.val_fraction * 2**64)
    held: tuple[int, bytes] | None = None
    has_val = False
    for text in texts:
        if not text.strip() or b"\0" in text:
            skipped["binary" if text.strip() else "empty"] += 1
            continue
        rank = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
        if rank < threshold:
            has_val = True
            yield True, text
        elif has_val or (held is not None and held[0] <= rank):
            yield False, text
        else:
            if held is not None:
                yield False, held[1]
            held = (rank, text)
    if held is not None:
        yield not has_val, held[1]


@dataclass
class _SplitWriter:
    """Appends documents to the shards of one split."""

    folder: Path
    name: str
    tokenizer: Tokenizer
    shard_tokens: int
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    _texts: list[bytes] = field(default_factory=list)
    _waiting: int = 0
    _ids: list[np.ndarray] = field(default_factory=list)
    _held: int = 0

    def add(self, text: bytes) -> None:
        self._texts.append(text)
        self._waiting += len(text)
        if self._waiting >= BATCH_BYTES:
            self._encode()

    def close(self) -> None:
        self._encode()
        if self._held:
            self._write_shards(1)

    def _encode(self) -> None:
        separator = np.array([self.tokenizer.separator], dtype=self.tokenizer.dtype)
        for ids in self.tokenizer.encode(self._texts):
            self._ids += [ids, separator]
            self._held += len(ids) + 1
        self.documents += len(self._texts)
        self.text_bytes += self._waiting + len(self._texts)
        self._texts, self._waiting = [], 0
        if self._held >= self.shard_tokens:
            self._write_shards(self.shard_tokens)

    def _write_shards(self, at_least: int) -> None:
        """Write full shards while `at_least` tokens are held; the last one may be short."""
        ids = np.concatenate(self._ids)
        start = 0
        while len(ids) - start >= at_least:
            part = ids[start : start + self.shard_tokens]
            start += len(part)
            raw = part.astype(_little_endian(self.tokenizer.dtype)).tobytes()
            file = f"{self.name}-{len(self.shards):05d}.bin"
            _write_synced(self.folder / file, raw)
            self.shards.append(
                {"file": file, "tokens": len(part), "sha256": hashlib.sha256(raw).hexdigest()}
            )
        self.tokens += start
        self._ids, self._held = [ids[start:]], len(ids) - start


def _manifest(
    request: Request,
    tokenizer: Tokenizer,
    splits: dict[str, _SplitWriter],
    skipped: documents.Skipped,
) -> dict[str, Any]:
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "tokenizer": tokenizer.name,
        "vocab_size": tokenizer.vocab_size,
        "separator": tokenizer.separator,
        "dtype": tokenizer.dtype,
        "val_fraction": request.val_fraction,
        "shard_tokens": request.shard_tokens,
        "bytes_per_token": splits["val"].text_bytes / splits["val"].tokens,
        "documents": {name: writer.documents for name, writer in splits.items()},
        "text_bytes": {name: writer.text_bytes for name, writer in splits.items()},
        "n_train": splits["train"].tokens,
        "n_val": splits["val"].tokens,
        "shards": {name: writer.shards for name, writer in splits.items()},
    }
    manifest["hash"] = _manifest_hash(manifest)
    # Where the text came from is for people: the same data has the same hash from any path.
    built_in = "" if request.hf or request.sources else "standard library of this Python"
    manifest["source"] = request.hf or list(request.sources) or built_in
    manifest["skipped"] = dict(sorted(skipped.items()))
    return manifest


def _manifest_hash(manifest: dict[str, Any]) -> str:
    hashed = {k: v for k, v in manifest.items() if k not in {"hash", "source", "skipped"}}
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of token shards, checked to be whole and of this version."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(
            f"data folder {folder} must hold {MANIFEST}, got none; make it with: "
            f"ceg data prepare --out {folder}"
        )
    try:
        manifest = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} must be JSON, got {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise ValueError(f"format of {path} must be {FORMAT!r}, got {found!r}")
    if manifest.get("version") != VERSION:
        raise ValueError(
            f"version of {path} must be {VERSION}, got {manifest.get('version')!r}; "
            "prepare the data again"
        )
    found = _manifest_hash(manifest)
    if manifest.get("hash") != found:
        raise ValueError(f"hash of {path} must be {found}, got {manifest.get('hash')!r}")
    return manifest


class TokenData:
    """Reads a folder of token shards.

    Opening checks every byte against the manifest (about a second per GiB); `verify=False` checks
    names and sizes only, for data that this program has just checked.
    """

    def __init__(self, folder: str | Path, *, verify: bool = True):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self._shards = {
            name: [self._open(shard, verify) for shard in self.manifest["shards"][name]]
            for name in SPLITS
        }

    @property
    def hash(self) -> str:
        return self.manifest["hash"]

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    def bits_per_byte(self, nats_per_token: float) -> float:
        return nats_per_token / math.log(2) / self.manifest["bytes_per_token"]

    def train_batch(
        self, step: int, batch: int, seq_len: int, seed: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, each (batch, seq_len) int64: random windows of the train split.

        A pure function of (seed, step): runs that share the seed see the same tokens, and a
        resumed run goes on as if it had not stopped.
        """
        places = self._places("train", seq_len)
        # raw bits, because NumPy promises their stream between versions; the modulo's bias is
        # places / 2^64
        bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64)).random_raw(batch)
        return self._windows("train", [int(b) % places for b in bits], seq_len)

    def val_batches(
        self, batch: int, seq_len: int, n: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """n batches of windows spread evenly over the validation split, always the same ones.

        They overlap when the split has fewer than n * batch * seq_len tokens.
        """
        last = self._places("val", seq_len) - 1
        count = n * batch
        starts = [i * last // max(count - 1, 1) for i in range(count)]
        for i in range(0, count, batch):
            yield self._windows("val", starts[i : i + batch], seq_len)

    def _places(self, split: str, seq_len: int) -> int:
        places = self.manifest[f"n_{split}"] - seq_len
        if places < 1:
            raise ValueError(
                f"the {split} split of {self.folder} must have more than seq_len = {seq_len} "
                f"tokens, got {self.manifest[f'n_{split}']}"
            )
        return places

    def _windows(
        self, split: str, starts: list[int], seq_len: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch  # here, so that `ceg data prepare` need not load it

        rows = np.stack([self._read(split, start, seq_len + 1) for start in starts])
        tokens = torch.from_numpy(rows)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def _read(self, split: str, start: int, length: int) -> np.ndarray:
        """`length` tokens from position `start` of a split, across shards, as int64."""
        out = np.empty(length, dtype=np.int64)
        size = self.manifest["shard_tokens"]
        filled = 0
        while filled < length:
            index, offset = divmod(start + filled, size)
            part = self._shards[split][index][offset : offset + length - filled]
            out[filled : filled + len(part)] = part
            filled += len(part)
        return out

    def _open(self, shard: dict[str, Any], verify: bool) -> np.ndarray:
        path = self.folder / shard["file"]
        if not path.is_file():
            raise FileNotFoundError(f"shard {path} must exist, got no such file")
        dtype = _little_endian(self.manifest["dtype"])
        expected = shard["tokens"] * dtype.itemsize
        size = path.stat().st_size
        if size != expected:
            raise ValueError(f"shard {path} must have {expected} bytes, got {size}")
        if verify:
            found = _sha256(path)
            if found != shard["sha256"]:
                raise ValueError(f"shard {path} must have SHA-256 {shard['sha256']}, got {found}")
        return np.memmap(path, dtype=dtype, mode="r")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _little_endian(dtype: str) -> np.dtype:
    return np.dtype(dtype).newbyteorder("<")


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
