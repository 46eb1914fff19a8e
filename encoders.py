"""Text to token ids, exactly as the model's own tokenizer gives them.

    spec = find_tokenizer("/models/kimi", eos_token=None)     # which files, which format, EOS, vocabulary, content hash
    encoder = load_encoder(spec)                              # in each process: the ranks or the Rust tokenizer
    tokens, lengths = encoder.encode(["a text", "another"])   # flat int32 ids without EOS, and ids per text

Two formats:
  kimi          the folder holds `tiktoken.model`. transformers loads it without remote code but cuts words by a default
                pattern, not Kimi's, and so gives silently other ids; here the encoder is tiktoken with Kimi's pattern
                and the published wrapper's cutting of long texts (`kimi_pieces`).
  transformers  everything else: `AutoTokenizer`, its own way.
Both are the reference of their format. `fastokens`, ten times as fast, may serve instead where it is installed and gives
the reference's ids on a start-up probe (`probe_texts`) and, while running, on one document in a hundred; the first
difference ends its use (`EncoderMismatch`).

Text is never parsed for special tokens: "<|im_end|>" in a document is ordinary text. Heavy libraries are imported by the
functions that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Protocol

import numpy as np

from config import UserError

KIMI_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
KIMI_RESERVED_TOKENS = 256  # ids above the ranks; those without a name are <|reserved_token_ID|>
KIMI_MAX_CHARS = 400_000  # the published wrapper hands tiktoken at most this many characters,
KIMI_MAX_RUN_CHARS = 25_000  # of which at most this many in a row are all space or all not space

CHECK_ONE_IN = 100  # texts that the fast encoder has checked while running

# what decides ids, in the order looked for; weights, chat templates and code are not fetched
TOKENIZER_FILES = (
    "tokenizer_config.json",
    "tiktoken.model",
    "tokenizer.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)


class Encoder(Protocol):
    """What a pipeline needs of an encoder. `name` is said at start, so that a log tells which one ran."""

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another (int32, no EOS) and the number of ids of each (int64 [len(texts)])."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ids, EOS not among them."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer found and understood, but not loaded: a small value that any process can load from."""

    name: str  # as the user gave it
    folder: str  # where its files lie
    format: str  # "kimi" or "transformers"
    content_hash: str  # of what decides ids; see tokenizer_hash
    vocab_size: int
    eos_token: str
    eos_token_id: int
    special_tokens: tuple[tuple[str, int], ...] = ()  # kimi only: the others' libraries keep their own
    trust_remote_code: bool = False


# ---------------------------------------------------------------------------- finding it


def tokenizer_folder(name: str, *, trust_remote_code: bool = False) -> Path:
    """The folder of a tokenizer: `name` itself if it is one, else the Hub's files in the local cache.

    Raises UserError if there is neither.
    """
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in TOKENIZER_FILES[1:]):
            raise UserError(
                f"tokenizer: {name} is a folder without tokenizer files; expected one of {', '.join(TOKENIZER_FILES[1:])}"
            )
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"tokenizer: the folder {name} does not exist; give a folder with the tokenizer's files")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*TOKENIZER_FILES, "config.json", *(["*.py"] if trust_remote_code else [])]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"tokenizer: {name!r} is no local folder and could not be fetched from the Hub ({reason}); "
            "copy the model's tokenizer files to a folder and give --tokenizer FOLDER"
        ) from None


def tokenizer_hash(name: str, *, trust_remote_code: bool = False) -> str:
    """sha256 of what decides a tokenizer's ids, equal for the same tokenizer in another folder or beside weights.

    Chat templates, truncation and padding settings do not count. Raises UserError if there is no such tokenizer.
    """
    folder = tokenizer_folder(name, trust_remote_code=trust_remote_code)
    digest = hashlib.sha256()
    if is_kimi_format(folder):
        digest.update(b"kimi\0" + hashlib.sha256((folder / "tiktoken.model").read_bytes()).digest())
        named = _kimi_named_tokens(folder)
        digest.update(json.dumps(sorted(named.items())).encode())
    elif (folder / "tokenizer.json").is_file():
        content = _read_json(folder / "tokenizer.json")
        parts = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model")}
        parts["added_tokens"] = [[token.get("id"), token.get("content")] for token in content.get("added_tokens", [])]
        digest.update(b"tokenizer.json\0" + json.dumps(parts, sort_keys=True).encode())
    else:
        for file in TOKENIZER_FILES:
            if file != "tokenizer_config.json" and (folder / file).is_file():
                digest.update(file.encode() + b"\0" + hashlib.sha256((folder / file).read_bytes()).digest())
    return digest.hexdigest()


def find_tokenizer(name: str, *, eos_token: str | None = None, trust_remote_code: bool = False) -> TokenizerSpec:
    """Find the tokenizer's files, their format, vocabulary size and document separator.

    The separator is the tokenizer's own `eos_token` unless `eos_token` names another special token. Raises UserError if
    the tokenizer cannot be found or loaded, has no EOS, or `eos_token` is not one of its special tokens.
    """
    folder = tokenizer_folder(name, trust_remote_code=trust_remote_code)
    if is_kimi_format(folder):
        kind = "kimi"
        special_ids, own_eos, vocab_size = _kimi_special_tokens(folder)
    else:
        kind = "transformers"
        special_ids, own_eos, vocab_size = _transformers_special_tokens(folder, trust_remote_code)
    eos = eos_token or own_eos
    if eos is None:
        raise UserError(
            f"tokenizer: {name} names no eos_token, and documents must end in one; give --eos_token TOKEN, "
            f"one of {_some(special_ids)}"
        )
    if eos not in special_ids:
        raise UserError(f"eos_token: {eos!r} is not a special token of {name}; it has {_some(special_ids)}")
    return TokenizerSpec(
        name=name,
        folder=str(folder),
        format=kind,
        content_hash=tokenizer_hash(name, trust_remote_code=trust_remote_code),
        vocab_size=vocab_size,
        eos_token=eos,
        eos_token_id=special_ids[eos],
        special_tokens=tuple(special_ids.items()) if kind == "kimi" else (),
        trust_remote_code=trust_remote_code,
    )


def load_encoder(spec: TokenizerSpec) -> Encoder:
    """The reference encoder of a found tokenizer, in this process."""
    if spec.format == "kimi":
        return KimiTiktokenEncoder(spec)
    return TransformersEncoder(Path(spec.folder), trust_remote_code=spec.trust_remote_code)


def choose_encoder(spec: TokenizerSpec, wish: str) -> tuple[Encoder, str]:
    """(the encoder that shall run in this process, the start-up line that says which one and why).

    `wish` is "auto", "reference" or "fast"; "fast" raises UserError where "auto" would take the reference. Every process
    proves its own encoder: on a cluster they may not all have the same libraries.
    """
    if spec.format == "kimi":
        why = (
            "tiktoken with Kimi's word pattern and its cutting of long texts, because the folder holds tiktoken.model "
            "(transformers would load it with another pattern and give other ids)"
        )
    else:
        why = "the tokenizer's own, through transformers, because the folder holds no tiktoken.model"
    reference = load_encoder(spec)
    if wish == "reference":
        return reference, why
    try:
        encoder = FastEncoder(spec, reference)
        texts = probe_texts(spec)
        for text in texts:
            encoder.check(text)
    except FastUnavailable as problem:
        if wish == "fast":
            raise UserError(f"encoder: fast was asked for, but {problem}") from None
        return reference, f"{why}; {problem}"
    except EncoderMismatch as difference:
        if wish == "fast":
            raise UserError(f"encoder: fast was asked for, but it is not exact here: {difference}") from None
        return reference, f"{why}; WARNING: fastokens is not exact here: {difference}"
    return encoder, (
        f"{encoder.name}: its ids are the reference's on {len(texts):,} probes of {sum(map(len, texts)):,} characters, and "
        f"one document in {CHECK_ONE_IN} is checked while running. Reference: {why}"
    )


def _some(tokens: dict[str, int]) -> str:
    named = [token for token in tokens if not token.startswith("<|reserved_")]
    return ", ".join(repr(token) for token in named[:12]) + (" ..." if len(named) > 12 else "") if named else "none"


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"tokenizer: {path} cannot be read as JSON ({error})") from None
    if not isinstance(values, dict):
        raise UserError(f"tokenizer: {path}: expected a JSON object, found a {type(values).__name__}")
    return values


# ---------------------------------------------------------------------------- Kimi's format


def is_kimi_format(folder: Path) -> bool:
    """Whether the folder is in Kimi's format. Raises UserError if it looks like it but ships another word pattern."""
    if not (folder / "tiktoken.model").is_file():
        return False
    for code in folder.glob("tokenization_*.py"):
        text = code.read_text(encoding="utf-8", errors="replace")
        missing = [part for part in (r"[\p{Han}]+", r"\p{Lo}\p{M}&&[^\p{Han}]", r"\p{N}{1,3}") if part not in text]
        if "pat_str" in text and missing:
            raise UserError(
                f"tokenizer: {folder} holds tiktoken.model, but {code.name} has a word pattern that is not Kimi's "
                f"({missing[0]!r} is not in it); convert it to a tokenizer.json and give that folder"
            )
    return True


def read_tiktoken_ranks(path: Path) -> dict[bytes, int]:
    """The ranks of a tiktoken.model: one `BASE64 RANK` a line. Raises UserError with the line's number."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise UserError(f"tokenizer: {path}, line {number}: {line[:60]!r} is not 'BASE64 RANK'") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise UserError(f"tokenizer: {path}: ranks must run from 0 without a gap and include all 256 bytes")
    return ranks


def _kimi_named_tokens(folder: Path) -> dict[int, str]:
    decoder = _read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
    return {int(token_id): token["content"] for token_id, token in decoder.items()}


def _kimi_special_tokens(folder: Path) -> tuple[dict[str, int], str | None, int]:
    """(special token -> id, the tokenizer's EOS, vocabulary size) of a folder in Kimi's format."""
    first = len(read_tiktoken_ranks(folder / "tiktoken.model"))
    vocab_size = first + KIMI_RESERVED_TOKENS
    named = _kimi_named_tokens(folder)
    outside = sorted(token_id for token_id in named if not first <= token_id < vocab_size)
    if outside:
        raise UserError(
            f"tokenizer: {folder / 'tokenizer_config.json'} names token {outside[0]} ({named[outside[0]]!r}), but with "
            f"{first} ranks in tiktoken.model special tokens are {first} to {vocab_size - 1}"
        )
    special = {named.get(i, f"<|reserved_token_{i}|>"): i for i in range(first, vocab_size)}
    eos = _read_json(folder / "tokenizer_config.json").get("eos_token")
    return special, eos.get("content") if isinstance(eos, dict) else eos, vocab_size


def kimi_pieces_reference(text: str) -> Iterator[str]:
    """The published wrapper's rule, character by character: the reference for `kimi_pieces`.

    Text is cut every 400,000 characters, and within such a slice wherever more than 25,000 characters in a row are all
    space or all not space; the count starts anew after each cut.
    """
    for at in range(0, len(text), KIMI_MAX_CHARS):
        part = text[at : at + KIMI_MAX_CHARS]
        begin, run, was_space = 0, 0, part[0].isspace()
        for i, character in enumerate(part):
            run = run + 1 if character.isspace() == was_space else 1
            was_space = character.isspace()
            if run > KIMI_MAX_RUN_CHARS:
                yield part[begin:i]
                begin, run = i, 1
        yield part[begin:]


_SPACE = re.compile(r"\s")  # for str exactly the characters for which str.isspace() holds
_RUN = re.compile(r"\s+|\S+")
_PROBE_CHARS = KIMI_MAX_RUN_CHARS // 2


def _may_hold_long_run(part: str) -> bool:
    """False if no run of one kind is longer than KIMI_MAX_RUN_CHARS: such a run covers one aligned block of half that.

    Each test stops at the first character of the other kind, so ordinary text costs a few comparisons per block.
    """
    for at in range(0, len(part) - _PROBE_CHARS + 1, _PROBE_CHARS):
        block = part[at : at + _PROBE_CHARS]
        if block.isspace() if block[0].isspace() else not _SPACE.search(block):
            return True
    return False


def kimi_pieces(text: str) -> Iterator[str]:
    """The pieces in which the published wrapper hands `text` to tiktoken; no word is merged across two of them."""
    for at in range(0, len(text), KIMI_MAX_CHARS):
        part = text[at : at + KIMI_MAX_CHARS]
        begin = 0
        if _may_hold_long_run(part):
            for run in _RUN.finditer(part):
                for cut in range(run.start() + KIMI_MAX_RUN_CHARS, run.end(), KIMI_MAX_RUN_CHARS):
                    yield part[begin:cut]
                    begin = cut
        yield part[begin:]


class KimiTiktokenEncoder:
    """tiktoken over Kimi's ranks with Kimi's pattern: the reference for every other encoder of this format."""

    name = "tiktoken, Kimi's pattern"

    def __init__(self, spec: TokenizerSpec):
        import tiktoken

        # encode_to_numpy parses special tokens only where it is told to, which it never is. They are given all the
        # same: with an empty set tiktoken searches the text for an empty pattern and takes 1.7 times as long.
        self._encoding = tiktoken.Encoding(
            "kimi",
            pat_str=KIMI_PATTERN,
            mergeable_ranks=read_tiktoken_ranks(Path(spec.folder) / "tiktoken.model"),
            special_tokens=dict(spec.special_tokens),
        )

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        parts, lengths = [], np.zeros(len(texts), np.int64)
        for i, text in enumerate(texts):
            for piece in kimi_pieces(text):
                ids = self._encoding.encode_to_numpy(piece, disallowed_special=())
                parts.append(ids)
                lengths[i] += len(ids)
        return _flat(parts), lengths

    def decode(self, tokens: Sequence[int]) -> str:
        return self._encoding.decode([int(token) for token in tokens])


# ---------------------------------------------------------------------------- the tokenizer's own way


def _load_transformers(folder: Path, trust_remote_code: bool):
    # one process per core: the Rust tokenizer's own threads would only fight over them
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(
            f"tokenizer: transformers cannot load {folder} ({str(error).strip().splitlines()[0]}); "
            "if it needs the folder's own Python code, and you trust it, add --trust_remote_code"
        ) from None


def _transformers_special_tokens(folder: Path, trust_remote_code: bool) -> tuple[dict[str, int], str | None, int]:
    tokenizer = _load_transformers(folder, trust_remote_code)
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    # ids of added tokens may leave gaps, so the largest id counts, not the number of tokens
    vocab_size = max(max(tokenizer.get_vocab().values()) + 1, len(tokenizer))
    return special, tokenizer.eos_token, vocab_size


class TransformersEncoder:
    """AutoTokenizer without special tokens added and with those in the text taken as text."""

    def __init__(self, folder: Path, *, trust_remote_code: bool = False):
        self._tokenizer = _load_transformers(folder, trust_remote_code)
        # documents of any length: the tokenizer's model_max_length is no limit here and warrants no warning
        self._tokenizer.model_max_length = int(1e30)
        self.name = f"transformers, {type(self._tokenizer).__name__}"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if not texts:
            return _flat([]), np.zeros(0, np.int64)
        encoded = self._tokenizer(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
        )["input_ids"]
        parts = [np.asarray(ids, dtype=np.int32) for ids in encoded]
        return _flat(parts), np.array([len(part) for part in parts], dtype=np.int64)

    def decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], clean_up_tokenization_spaces=False)


# ---------------------------------------------------------------------------- the fast one, and its proof


class FastUnavailable(Exception):
    """fastokens cannot serve this tokenizer; the text says why."""


class EncoderMismatch(Exception):
    """The fast encoder's ids are not the reference's; the text shows where."""


class FastEncoder:
    """fastokens over the same files. Checks one text in CHECK_ONE_IN against `reference` and raises EncoderMismatch."""

    def __init__(self, spec: TokenizerSpec, reference: Encoder):
        # one process per core: its own threads would only fight over them
        os.environ["RAYON_NUM_THREADS"] = "1"
        try:
            import fastokens
        except ImportError:
            raise FastUnavailable("fastokens, ten times as fast, is not installed (pip install fastokens)") from None
        folder = Path(spec.folder)
        try:
            if spec.format == "kimi":
                self._tokenizer = fastokens.Tokenizer.from_tiktoken(
                    str(folder / "tiktoken.model"), pattern=KIMI_PATTERN, special_tokens=dict(spec.special_tokens)
                )
                self._pieces = kimi_pieces
            elif (folder / "tokenizer.json").is_file():
                self._tokenizer = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json"))
                self._tokenizer.no_truncation()
                self._pieces = lambda text: (text,)
            else:
                raise FastUnavailable("fastokens needs a tokenizer.json or a tiktoken.model")
        except (ValueError, RuntimeError, OSError, NotImplementedError) as error:
            raise FastUnavailable(f"fastokens cannot load it ({str(error).splitlines()[0][:200]})") from None
        self.reference = reference
        self.name = f"fastokens {metadata.version('fastokens')}"
        self._seen = 0

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens, lengths = self._encode_unchecked(texts)
        first = -self._seen % CHECK_ONE_IN
        self._seen += len(texts)
        ends = np.cumsum(lengths)
        for i in range(first, len(texts), CHECK_ONE_IN):
            self._compare(texts[i], tokens[ends[i] - lengths[i] : ends[i]])
        return tokens, lengths

    def check(self, text: str) -> None:
        """Raise EncoderMismatch if this text's ids are not the reference's."""
        self._compare(text, self._encode_unchecked([text])[0])

    def _encode_unchecked(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces: list[str] = []
        first_pieces = np.zeros(len(texts) + 1, np.int64)
        for i, text in enumerate(texts):
            pieces.extend(self._pieces(text))
            first_pieces[i + 1] = len(pieces)
        ids, offsets = self._tokenizer.encode_batch_flat(pieces, split_special_tokens=True)
        starts = np.frombuffer(offsets, "<u8").astype(np.int64)[first_pieces]
        return np.frombuffer(ids, "<u4").view(np.int32), np.diff(starts)

    def _compare(self, text: str, tokens: np.ndarray) -> None:
        expected, _ = self.reference.encode([text])
        if not np.array_equal(tokens, expected):
            both = min(len(tokens), len(expected))
            different = np.flatnonzero(tokens[:both] != expected[:both])
            at = int(different[0]) if len(different) else both
            near = self.reference.decode(expected[max(0, at - 3) : at + 3])
            raise EncoderMismatch(
                f"on a text of {len(text):,} characters token {at} is {tokens[at : at + 1]} but should be "
                f"{expected[at : at + 1]}, near {near!r}"
            )

    def decode(self, tokens: Sequence[int]) -> str:
        return self.reference.decode(tokens)


def probe_texts(spec: TokenizerSpec) -> list[str]:
    """Texts on which encoders are likely to differ: code points of every class and script in several surroundings, long
    runs, special tokens written as text, the 25,000 and 400,000 character cuts and their neighbours.

    Code points are taken where the general category changes (both sides), one in 64 elsewhere, and one in 4 of those
    that Python's tables leave unassigned in the first two planes, because libraries differ in their version of Unicode.
    Planes 4 to 13 hold nothing and are sampled thinly.
    """
    points, before = [], ""
    for point in (
        *range(0x40000),
        *range(0x40000, 0xE0000, 4096),
        *range(0xE0000, 0xE0200),
        *range(0xF0000, 0x110000, 4096),
    ):
        category = unicodedata.category(chr(point))
        if category != before:
            points += [chr(point - 1), chr(point)] if before and before != "Cs" and category != "Cs" else [chr(point)]
        elif point % (4 if category == "Cn" and point < 0x20000 else 64) == 0 or point >= 0x40000:
            points.append(chr(point))
        before = category
    points = [c for c in points if unicodedata.category(c) != "Cs"]
    texts = []
    for at in range(0, len(points), 500):
        part = points[at : at + 500]
        texts.append("".join(part))
        texts.append("".join(f"a{c}b {c}{c}1{c}\n" for c in part))
        texts.append("".join(f" {c}A'{c}s 中{c}" for c in part))
    words = "The HTTPServer's iPhone TeX don't WE'LL 12345 3.14 中文字符 Привет café\r\n\t\t  x = y;\n\n\n"
    texts += [words, words * 50, words.upper(), f"{spec.eos_token}a{spec.eos_token} <|im_end|><|im_user|> [BOS]"]
    for filler in ("a", " ", "\n", "\t ", "=", "中", "é", "1", "aB", "\U0001f600", "\u0301", "\r\n"):
        texts += [filler * n for n in (2, 3, 7, 100, 5000)]
    if spec.format == "kimi":
        for run in (KIMI_MAX_RUN_CHARS - 1, KIMI_MAX_RUN_CHARS, KIMI_MAX_RUN_CHARS + 1, 2 * KIMI_MAX_RUN_CHARS + 7):
            texts += ["self " + filler * run + "self words" for filler in ("=", " ", "ab"[:1], "中")]
        texts.append((words * (KIMI_MAX_CHARS // len(words) + 2))[: KIMI_MAX_CHARS + 20])
    return texts


def _flat(parts: list[np.ndarray]) -> np.ndarray:
    """Parts of one 32-bit type one after another, as int32 (ids are far below 2^31, so uint32 is read as it is)."""
    return np.concatenate(parts).view(np.int32) if parts else np.zeros(0, np.int32)
