"""Small real tokenizers and real text for the data tests: nothing is downloaded."""

import base64
import functools
import json
import random
import sysconfig
from pathlib import Path

EOS = "[EOS]"


@functools.cache
def real_texts(count: int = 300) -> tuple[str, ...]:
    """Sources of the Python installation, short and long, in a fixed order, none empty."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    texts = [text for text in texts if text.strip()]
    random.Random(0).shuffle(texts)
    return tuple(texts[:count])


def _trained(vocab_size: int, pattern: str | None = None):
    """A byte-level BPE of `tokenizers` trained on real text."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    if pattern is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    # often enough that whole words become tokens: a wrong word pattern then shows in the ids
    extra = ["TeX InOut ErrorHandler 中文字符 语言模型 Привет мир x1234567 don't WE'LL\r\n\r\n  \t"] * 5000
    tokenizer.train_from_iterator([text[:20_000] for text in real_texts(60)] + extra, trainer)
    return tokenizer


def save_transformers_tokenizer(folder: Path, vocab_size: int = 600) -> Path:
    """A folder with tokenizer.json as transformers saves it, EOS set."""
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=_trained(vocab_size), eos_token=EOS).save_pretrained(folder)
    return folder


def save_kimi_tokenizer(folder: Path, vocab_size: int = 1000) -> Path:
    """A folder in Kimi's format (tiktoken.model, tokenizer_config.json) with ranks from a small trained BPE."""
    state = json.loads(_trained(vocab_size, r"\S+|\s+").to_str())
    byte_of = _byte_level_alphabet()
    tokens = [bytes([b]) for b in range(256)]
    for merge in state["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        token = bytes(byte_of[c] for c in left + right)
        if token not in tokens:
            tokens.append(token)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_text("".join(lines))
    named = {
        str(len(tokens) + i): {"content": name, "special": True} for i, name in enumerate(("[BOS]", EOS, "<|im_end|>"))
    }
    config = {
        "added_tokens_decoder": named,
        "bos_token": "[BOS]",
        "eos_token": EOS,
        "tokenizer_class": "TikTokenTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte -> the byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}
