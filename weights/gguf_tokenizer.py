"""The tokenizer in a GGUF file -> `tokenizer.json` or `tokenizer.model`, and its settings.

GGUF has the vocabulary and the merges, but only a name for how a text is split before them, which
llama.cpp knows. Those of the models that are read here are in `PRE_TOKENIZERS`.
"""

import json
import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers import processors

from weights.folder import check, one_line, shown
from weights.pieces import byte_alphabet
from weights.tokenizer import Tokenizer as ModelTokenizer

LIMITS = {  # see `weights.folder.check`
    "tokenizer.ggml.model": str, "tokenizer.ggml.pre": str, "tokenizer.ggml.tokens": list,
    "tokenizer.ggml.merges": list, "tokenizer.ggml.add_bos_token": bool,
    "tokenizer.ggml.add_eos_token": bool, "tokenizer.ggml.add_space_prefix": bool,
    "tokenizer.chat_template": str,
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of a token
STOP = ("eos", "eot", "eom")  # end of text, of a turn, of a message

WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LONG_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
              r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DIGITS = pre.Digits(individual_digits=True)
PRE_TOKENIZERS = {  # each step splits the parts that the one before it leaves
    "smollm": [DIGITS],
    "gpt-2": [],
    "llama-bpe": [LONG_WORDS],
    "qwen2": [LONG_WORDS.replace("{1,3}", "")],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", "[0-9][0-9][0-9]"],
}
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe"}


class Vocabulary(NamedTuple):
    tokens: list
    types: list
    bos: int | None
    add_bos: bool


def token_id(metadata: dict, name: str) -> int | None:
    """The id of the token that begins a text (bos), ends it (eos), …; None if there is none."""
    key, most = f"tokenizer.ggml.{name}_token_id", len(metadata.get("tokenizer.ggml.tokens", ()))
    check(metadata, {key: (0, most - 1)}, "metadata")
    return metadata.get(key)


def stop_ids(metadata: dict) -> list[int]:
    """The ids that end an answer, each once, that of the end of the text first."""
    ids = (token_id(metadata, name) for name in STOP)
    return list(dict.fromkeys(index for index in ids if index is not None))


def check_tokenizer(metadata: dict):
    """ValueError if the tokenizer is of a kind that is not read here, before anything is made."""
    check(metadata, LIMITS, "metadata")
    if (model := metadata.get("tokenizer.ggml.model")) not in WRITERS:
        raise ValueError(f"the tokenizer {shown(model)} is not supported, only"
                         f" {' and '.join(WRITERS)}")
    if metadata.get("tokenizer.ggml.add_eos_token"):
        raise ValueError("tokenizer.ggml.add_eos_token is not supported: a prompt would be over")


def write_tokenizer(metadata: dict, folder: Path):
    """Write the tokenizer's files into `folder`. ValueError if they could not be read again."""
    WRITERS[metadata["tokenizer.ggml.model"]](metadata, read_vocabulary(metadata), folder)
    tokens = metadata["tokenizer.ggml.tokens"]
    settings = {f"{name}_token": tokens[index] for name in ("bos", "eos")
                if (index := token_id(metadata, name)) is not None}
    if template := metadata.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    ModelTokenizer(folder)


def read_vocabulary(metadata: dict) -> Vocabulary:
    tokens = metadata.get("tokenizer.ggml.tokens", [])
    types = per_token(metadata, "token_type", "iu", len(tokens))
    if len(set(tokens)) != len(tokens):
        seen = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise ValueError(f"the token {shown(twice)} is there twice")
    # What llama.cpp does where the file does not say it.
    usual = (metadata["tokenizer.ggml.model"] == "llama"
             or pre_tokenizer_name(metadata) == "llama-bpe")
    bos, add_bos = token_id(metadata, "bos"), metadata.get("tokenizer.ggml.add_bos_token", usual)
    if add_bos and (bos is None or types[bos] != CONTROL):
        raise ValueError("no token of control that could begin each text: bos_token_id is"
                         f" {shown(bos)}")
    return Vocabulary(tokens, types, bos, add_bos)


def per_token(metadata: dict, name: str, kind: str, count: int) -> list:
    """A list of one number for each token; `kind` has NumPy's letters, iu or f."""
    values = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kind or len(values) != count:
        raise ValueError(f"tokenizer.ggml.{name} is not a list of {count} numbers, one a token")
    if not np.isfinite(values).all():
        raise ValueError(f"tokenizer.ggml.{name} has numbers that are not finite")
    return values.tolist()


def pre_tokenizer_name(metadata: dict) -> str | None:
    name = metadata.get("tokenizer.ggml.pre")
    return SAME.get(name, name)


def write_bpe(metadata: dict, vocabulary: Vocabulary, folder: Path):
    """`tokenizer.json`: byte-level BPE."""
    name = pre_tokenizer_name(metadata)
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"the pre-tokenizer {shown(name)} is not supported, only"
                         f" {', '.join((*PRE_TOKENIZERS, *SAME))}")
    check_alphabet(vocabulary)
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", ())]
    if wrong := next((merge for merge in merges if len(merge) != 2), None):
        raise ValueError(f"the merge {shown(' '.join(wrong))} is not of two tokens")
    ids = {token: index for index, token in enumerate(vocabulary.tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges,
                                         ignore_merges=name == "llama-bpe"))
    except Exception as error:  # the library's own: a merge of tokens that are not there
        raise ValueError(f"the merges do not fit the tokens: {one_line(error)}") from None
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    steps = [pre.Split(Regex(step), "isolated") if isinstance(step, str) else step
             for step in PRE_TOKENIZERS[name]]
    bytes_of = pre.ByteLevel(add_prefix_space=False, use_regex=name in ("smollm", "gpt-2"))
    tokenizer.pre_tokenizer = pre.Sequence([*steps, bytes_of])
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, vocabulary)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def check_alphabet(vocabulary: Vocabulary):
    """ValueError if a token is not made of the characters that stand for bytes."""
    alphabet = byte_alphabet().keys()
    for token, kind in zip(vocabulary.tokens, vocabulary.types):
        if kind not in (CONTROL, USER_DEFINED) and not alphabet >= set(token):
            raise ValueError(f"the token {shown(token)} is not of a byte-level vocabulary")


def add_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary):
    """Those that are found in a text before it is split, and the one before each text."""
    pairs = list(zip(vocabulary.tokens, vocabulary.types))
    tokenizer.add_special_tokens([AddedToken(token, special=True)
                                  for token, kind in pairs if kind == CONTROL])
    tokenizer.add_tokens([AddedToken(token, normalized=False)
                          for token, kind in pairs if kind == USER_DEFINED])
    if vocabulary.add_bos:
        bos = {"id": "BOS", "ids": [vocabulary.bos],
               "tokens": [vocabulary.tokens[vocabulary.bos]]}
        tokenizer.post_processor = processors.TemplateProcessing(
            single="BOS $A", pair="BOS $A BOS $B", special_tokens=[bos])


def write_sentencepiece(metadata: dict, vocabulary: Vocabulary, folder: Path):
    """`tokenizer.model`: a ModelProto of sentencepiece, whose types of tokens GGUF has taken over.

    The numbers are those of the fields in `sentencepiece_model.proto`.
    """
    tokens, types = vocabulary.tokens, vocabulary.types
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise ValueError("tokenizer.ggml.precompiled_charsmap is not supported")
    pieces = [message({1: token.replace(" ", "▁") if kind == USER_DEFINED else token,
                       2: score, 3: kind})
              for token, score, kind in zip(tokens, per_token(metadata, "scores", "f", len(tokens)),
                                            types)]
    trainer = {3: 2, 4: len(tokens), 35: BYTE in types}  # BPE
    unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    eos, pad = token_id(metadata, "eos"), token_id(metadata, "padding")
    bos = vocabulary.bos if vocabulary.add_bos else None  # which the library puts before a text
    absent = max(tokens, key=len) + "x"  # is no token; for an empty name the library has its own
    for field, index in {40: unknown, 41: bos, 42: eos, 43: pad}.items():
        trainer |= {field: -1 if index is None else index,
                    field + 5: absent if index is None else tokens[index]}
    # As it is, but for a space before the text and ▁ for each space.
    normalizer = {1: "identity", 3: metadata.get("tokenizer.ggml.add_space_prefix", True),
                  4: False, 5: True}
    model = b"".join(field_bytes(1, piece) for piece in pieces)
    model += message({2: message(trainer), 3: message(normalizer)})
    (folder / "tokenizer.model").write_bytes(model)


WRITERS = {"gpt2": write_bpe, "llama": write_sentencepiece}


def message(fields: dict) -> bytes:
    """A message of Protocol Buffers, field -> value.

    >>> message({1: "ab", 3: 300})
    b'\\n\\x02ab\\x18\\xac\\x02'
    """
    return b"".join(field_bytes(field, value) for field, value in fields.items())


def field_bytes(field: int, value) -> bytes:
    """A field: its number and a type of 3 bits, then an integer, 4 bytes, or a length and bytes."""
    if isinstance(value, float):
        return varint(field << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(field << 3) + varint(value % 2**64)  # two's complement
    value = value.encode() if isinstance(value, str) else value
    return varint(field << 3 | 2) + varint(len(value)) + value


def varint(value: int) -> bytes:
    """7 bits a byte, the lowest first; the top bit says that more follow."""
    parts = []
    while value >= 128:
        parts.append(value % 128 + 128)
        value //= 128
    return bytes([*parts, value])
