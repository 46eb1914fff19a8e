"""What a folder of token shards holds, as a length-extension run needs to know it: a table, JSON and a picture.

    python tokenize_dataset.py --output_dir ./data/tokenized_2m --statistics stats.png     # also writes stats.json

Long windows teach long range only if documents are long: how many tokens lie in long documents, and how many documents
one 2M window holds, say what a run can learn. Everything comes from the manifest; no shard is read.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from data_loader import Manifest

WINDOW = 1 << 21
SHOWN_SOURCES = 15


def human_length(tokens: int) -> str:
    """1024 -> '1K', 1048576 -> '1M': binary units, as sequence lengths are spoken of."""
    return f"{tokens >> 20}M" if tokens >= 1 << 20 else f"{tokens >> 10}K"


def class_names(borders: list[int]) -> list[str]:
    names = [human_length(border) for border in borders]
    return [f"under {names[0]}", *(f"{a} to {b}" for a, b in itertools.pairwise(names)), f"{names[-1]} and more"]


def statistics(manifest: Manifest) -> dict:
    """The figures as plain values; shares are of all tokens, lengths count EOS."""
    stats = manifest.statistics
    borders = stats["length_classes"]
    shares = {
        human_length(border): sum(stats["class_tokens"][place + 1 :]) / manifest.total_tokens
        for place, border in enumerate(borders)
    }
    return {
        "tokens": manifest.total_tokens,
        "documents": manifest.documents,
        "shards": len(manifest.shards),
        "rows": stats["rows"],
        "dropped": stats["dropped"],
        "replaced": stats["replaced"],
        "text_bytes_per_token": stats["text_bytes"] / manifest.total_tokens,
        "longest": stats["longest"],
        "classes": class_names(borders),
        "class_documents": stats["class_documents"],
        "class_tokens": stats["class_tokens"],
        "share_of_tokens_in_documents_of_at_least": {name: shares[name] for name in ("64K", "256K", "1M")},
        "documents_per_2m_window": WINDOW * manifest.documents / manifest.total_tokens,
        "full_sequences": {
            length: manifest.total_tokens // length for length in sorted({1 << 20, WINDOW, manifest.max_seq_length})
        },
        "sources": stats["sources"],
        "order": manifest.statistics["pack"],
    }


def table(manifest: Manifest) -> str:
    """The figures for a terminal."""
    s = statistics(manifest)
    lines = [
        f"tokens     {s['tokens']:,} in {s['documents']:,} documents and {s['shards']} shards "
        f"({s['text_bytes_per_token']:.2f} bytes of text per token)",
        f"dropped    {s['dropped']:,} of {s['rows']:,} rows (null, empty or only white space)",
        f"replaced   {s['replaced']:,} documents had invalid characters, now U+FFFD",
        f"longest    {s['longest']:,} tokens",
        "length histogram (tokens with EOS)    documents             tokens   share of tokens",
    ]
    for name, documents, tokens in zip(s["classes"], s["class_documents"], s["class_tokens"], strict=True):
        lines.append(f"  {name:<20}{documents:>24,}{tokens:>20,}{100 * tokens / s['tokens']:>16.1f} %")
    for name, share in s["share_of_tokens_in_documents_of_at_least"].items():
        lines.append(f"share of tokens in documents of at least {name}: {100 * share:.1f} %")
    lines.append(
        f"documents in one window of 2M tokens, on average: {s['documents_per_2m_window']:,.1f} ({s['order']} order)"
    )
    for length, count in s["full_sequences"].items():
        lines.append(f"full sequences of {length:,} tokens: {count:,}")
    sources = s["sources"]
    if sources:
        lines.append(
            f"by source ({sources['column']}), {sources['count']:,} in all          documents             tokens"
        )
        for name, documents, tokens in sources["largest"][:SHOWN_SOURCES]:
            lines.append(f"  {name[:30]:<32}{documents:>12,}{tokens:>20,}")
    return "\n".join(lines)


def draw(manifest: Manifest, path: Path) -> None:
    """The picture: tokens and documents by length class, and the share of tokens in documents at least so long."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    s = statistics(manifest)
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
    places = range(len(s["classes"]))
    left.bar([p - 0.2 for p in places], [100 * t / s["tokens"] for t in s["class_tokens"]], 0.4, label="tokens")
    left.bar(
        [p + 0.2 for p in places], [100 * d / s["documents"] for d in s["class_documents"]], 0.4, label="documents"
    )
    left.set_xticks(list(places), s["classes"], rotation=30, ha="right")
    left.set_ylabel("share, %")
    left.set_title(f"{s['tokens']:,} tokens in {s['documents']:,} documents, by length")
    left.legend()
    borders = manifest.statistics["length_classes"]
    shares = [100 * sum(s["class_tokens"][place + 1 :]) / s["tokens"] for place in range(len(borders))]
    right.plot(range(len(borders)), shares, marker="o")
    right.set_xticks(range(len(borders)), [human_length(border) for border in borders])
    right.set_ylim(0, 100)
    right.set_ylabel("share of tokens, %")
    right.set_xlabel("in documents of at least ... tokens")
    right.set_title(f"one 2M window holds {s['documents_per_2m_window']:,.1f} documents on average")
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write_report(manifest: Manifest, picture: Path) -> Path:
    """Write the picture and, beside it, the figures as JSON; returns the JSON's path. Raises OSError."""
    draw(manifest, picture)
    target = picture.with_suffix(".json")
    target.write_text(json.dumps(statistics(manifest), indent=1) + "\n")
    return target
