"""Real text for the demo, found on this machine: the Python installation's sources and documentation.

    python demo/prepare_text.py demo/out        # writes demo/out/text.parquet and demo/out/tokenizer/

One row per file in a seeded random order, shortest a line, longest some hundred thousand characters: short and long
documents as in a real corpus. Files that are mostly tables of numbers are left out: a stretch of them would draw a jump
into the loss. The tokenizer is a byte-level BPE of 4,096 ids trained on that text and saved in transformers' format.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LIMIT_BYTES = 24_000_000
TRAIN_BYTES = 6_000_000
VOCABULARY = 4096


def find_texts() -> list[dict]:
    """Files of the standard library and then of the installed packages, up to LIMIT_BYTES, shuffled."""
    rows, size = [], 0
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix not in (".py", ".txt", ".rst", ".md") or not path.is_file():
                continue
            if folder == sysconfig.get_path("stdlib") and "site-packages" in path.parts:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if sum(map(str.isalpha, text[:20_000])) < 0.5 * len(text[:20_000]):
                continue
            rows.append({"text": text, "source": path.name})
            size += len(text)
            if size > LIMIT_BYTES:
                break
    random.Random(0).shuffle(rows)
    return rows


def train_tokenizer(rows: list[dict], folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["[PAD]", "[BOS]", "[EOS]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample, size = [], 0
    for row in rows[:: max(1, len(rows) // 600)]:
        sample.append(row["text"])
        size += len(row["text"])
        if size > TRAIN_BYTES:
            break
    tokenizer.train_from_iterator(sample, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    ).save_pretrained(folder)


def main() -> None:
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    rows = find_texts()
    pq.write_table(pa.Table.from_pylist(rows), out / "text.parquet", row_group_size=500)
    train_tokenizer(rows, out / "tokenizer")
    size = sum(len(row["text"]) for row in rows)
    print(f"{len(rows)} files, {size / 1e6:.1f} MB of text -> {out / 'text.parquet'}, {out / 'tokenizer'}")


if __name__ == "__main__":
    main()
