"""Ids are the tokenizer's own: Kimi's rules against their slow form, special tokens never parsed, refusals by message."""

import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizer_samples import EOS, real_texts, save_kimi_tokenizer, save_transformers_tokenizer

import encoders
from config import UserError

HARD_TEXTS = (
    "TeX InOut ErrorHandler HTTPServer iPhone",
    "中文字符 and 漢字かなカナ mixed English语言模型",
    "Привет мир, ÉCOLE naïve, Ελληνικά, עברית, العربية, ไทย, 한국어",
    "x12345678 3.14159 ١٢٣٤ ⅷ ²³",
    "don't WE'LL they're I'M it'S",
    "a  b\t\tc \r\n\r\n  d\n\n\n   ",
    f"text that says {EOS} and <|im_end|> and [BOS] and <|reserved_token_700|>",
    "👩‍👩‍👧‍👦 é\u0301 \u200b\ufeff\u3000 \x00\x01",
    "!" * 700 + " " * 700 + "\n" * 700,
)


@pytest.fixture(scope="module")
def kimi(tmp_path_factory) -> Path:
    return save_kimi_tokenizer(tmp_path_factory.mktemp("kimi"))


@pytest.fixture(scope="module")
def fast(tmp_path_factory) -> Path:
    return save_transformers_tokenizer(tmp_path_factory.mktemp("fast"))


def split_ids(tokens: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths)[:-1])]


def plain_kimi_ids(folder: Path, text: str) -> list[int]:
    """The published wrapper's way, written out: slow pieces, tiktoken's own encode, special tokens as text."""
    import tiktoken

    ranks = encoders.read_tiktoken_ranks(folder / "tiktoken.model")
    names = {f"<|reserved_token_{i}|>": i for i in range(len(ranks), len(ranks) + 256)}
    encoding = tiktoken.Encoding("plain", pat_str=encoders.KIMI_PATTERN, mergeable_ranks=ranks, special_tokens=names)
    return [i for piece in encoders.kimi_pieces_reference(text) for i in encoding.encode(piece, disallowed_special=())]


def test_kimi_ids_are_the_published_wrappers(kimi):
    texts = [*HARD_TEXTS, *real_texts(20), "word " * 100_000, " " * 60_000 + "x" * 60_000, "ab" * 13_000]
    encoder = encoders.load_encoder(encoders.find_tokenizer(str(kimi)))
    tokens, lengths = encoder.encode(texts)
    assert tokens.dtype == np.int32
    for text, ids in zip(texts, split_ids(tokens, lengths), strict=True):
        assert ids == plain_kimi_ids(kimi, text), text[:60]
        assert encoder.decode(ids) == text


def test_cutting_of_long_texts_changes_ids(kimi):
    """Else the tests above would pass without the wrapper's cuts."""
    import tiktoken

    ranks = encoders.read_tiktoken_ranks(kimi / "tiktoken.model")
    encoding = tiktoken.Encoding(
        "uncut", pat_str=encoders.KIMI_PATTERN, mergeable_ranks=ranks, special_tokens={"\0S": 1 << 20}
    )
    text = "=" * 24_999 + "self" * 10
    encoder = encoders.load_encoder(encoders.find_tokenizer(str(kimi)))
    assert encoder.encode([text])[0].tolist() != encoding.encode_ordinary(text)


def test_kimi_pieces_equal_the_reference():
    generator = random.Random(1)
    lengths = (1, 3, 12_499, 12_500, 24_999, 25_000, 25_001, 37_501, 50_000, 50_001, 75_003)
    for _ in range(25):
        text = ""
        while len(text) < generator.choice((10, 30_000, 399_999, 400_001, 450_000)):
            filler = generator.choice(("a", " ", "\n", "\u3000", "中", "\x1c", "word and "))
            text += filler * generator.choice(lengths)
            text = text[:900_000]
        assert list(encoders.kimi_pieces(text)) == list(encoders.kimi_pieces_reference(text))
    assert list(encoders.kimi_pieces("")) == list(encoders.kimi_pieces_reference("")) == []


def test_transformers_alone_gives_other_ids_on_kimis_folder(kimi):
    """The trap that the kimi format exists for: if this ever fails, transformers has learned Kimi's pattern."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(str(kimi))("TeX InOut", add_special_tokens=False)["input_ids"]
    ours = encoders.load_encoder(encoders.find_tokenizer(str(kimi))).encode(["TeX InOut"])[0].tolist()
    assert ours != theirs


def test_transformers_ids_are_the_tokenizers_own(fast):
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(fast / "tokenizer.json"))
    backend.encode_special_tokens = True
    texts = [*HARD_TEXTS, *real_texts(20)]
    encoder = encoders.load_encoder(encoders.find_tokenizer(str(fast)))
    tokens, lengths = encoder.encode(texts)
    for text, ids in zip(texts, split_ids(tokens, lengths), strict=True):
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert encoder.decode(ids) == text


@pytest.mark.parametrize("which", ["kimi", "fast"])
def test_special_tokens_in_text_stay_text(which, request):
    spec = encoders.find_tokenizer(str(request.getfixturevalue(which)))
    tokens, _ = encoders.load_encoder(spec).encode([f"a{EOS}b", EOS])
    assert spec.eos_token == EOS and spec.eos_token_id < spec.vocab_size
    assert spec.eos_token_id not in tokens


def test_no_texts_and_empty_texts(kimi, fast):
    for folder in (kimi, fast):
        encoder = encoders.load_encoder(encoders.find_tokenizer(str(folder)))
        for texts in ([], ["", ""]):
            tokens, lengths = encoder.encode(texts)
            assert len(tokens) == 0 and lengths.tolist() == [0] * len(texts)


def test_vocabulary_and_named_specials_of_kimi(kimi):
    spec = encoders.find_tokenizer(str(kimi), eos_token="<|im_end|>")
    ranks = len((kimi / "tiktoken.model").read_text().splitlines())
    assert (spec.vocab_size, spec.eos_token_id) == (ranks + 256, ranks + 2)
    reserved = encoders.find_tokenizer(str(kimi), eos_token=f"<|reserved_token_{ranks + 255}|>")
    assert reserved.eos_token_id == ranks + 255


def test_hash_is_of_what_decides_ids(kimi, fast, tmp_path):
    for folder, file in ((kimi, "tiktoken.model"), (fast, "tokenizer.json")):
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        (copy / "chat_template.jinja").write_text("{{ messages }}")
        (copy / "model.safetensors").write_bytes(b"weights")
        assert encoders.tokenizer_hash(str(copy)) == encoders.tokenizer_hash(str(folder))
        content = (copy / file).read_text()
        changed = (
            content.replace("aGU= ", "aGV= ")
            if file == "tiktoken.model"
            else content.replace('"ByteLevel"', '"Bytelevel"')
        )
        assert changed != content
        (copy / file).write_text(changed)
        assert encoders.tokenizer_hash(str(copy)) != encoders.tokenizer_hash(str(folder))


def edited_kimi(kimi: Path, folder: Path, **config) -> str:
    shutil.copytree(kimi, folder)
    values = json.loads((kimi / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return str(folder)


def test_refusals(kimi, fast, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer: the folder .*nowhere does not exist; give a folder"):
        encoders.find_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"is a folder without tokenizer files; expected one of tiktoken\.model"):
        encoders.find_tokenizer(str(tmp_path / "empty"))
    for folder in (kimi, fast):
        with pytest.raises(UserError, match=r"eos_token: '<end>' is not a special token of .*; it has .*'\[EOS\]'"):
            encoders.find_tokenizer(str(folder), eos_token="<end>")
    with pytest.raises(UserError, match=r"names no eos_token.*give --eos_token TOKEN, one of .*'\[EOS\]'"):
        encoders.find_tokenizer(edited_kimi(kimi, tmp_path / "no_eos", eos_token=None))
    with pytest.raises(UserError, match=r"names token 5 \('x'\).*special tokens are \d+ to \d+"):
        encoders.find_tokenizer(edited_kimi(kimi, tmp_path / "outside", added_tokens_decoder={"5": {"content": "x"}}))
    other = edited_kimi(kimi, tmp_path / "other_pattern")
    Path(other, "tokenization_x.py").write_text("pat_str = r'\\p{L}+|\\p{N}+'")
    with pytest.raises(UserError, match=r"tokenization_x\.py has a word pattern that is not Kimi's"):
        encoders.find_tokenizer(other)
    damaged = edited_kimi(kimi, tmp_path / "damaged")
    with open(Path(damaged, "tiktoken.model"), "a") as file:
        file.write("no rank here at all\n")
    with pytest.raises(UserError, match=r"tiktoken\.model, line \d+: .* is not 'BASE64 RANK'"):
        encoders.find_tokenizer(damaged)


def test_unreachable_hub_tokenizer_says_how_to_give_a_local_one():
    code = (
        "import encoders, config\n"
        "try: encoders.find_tokenizer('nobody/no-such-model')\n"
        "except config.UserError as error: print(error)"
    )
    root = Path(encoders.__file__).parent
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"HF_HUB_OFFLINE": "1", "PATH": ""}, capture_output=True, text=True
    )
    assert "'nobody/no-such-model' is no local folder and could not be fetched" in answer.stdout, answer.stderr
    assert "give --tokenizer FOLDER" in answer.stdout


# ---------------------------------------------------------------------------- the fast encoder


@pytest.mark.parametrize("which", ["kimi", "fast"])
def test_fast_encoder_gives_the_references_ids(which, request):
    pytest.importorskip("fastokens", reason="the fast encoder is optional: pip install fastokens==0.3.5")
    spec = encoders.find_tokenizer(str(request.getfixturevalue(which)))
    encoder, why = encoders.choose_encoder(spec, "fast")
    assert isinstance(encoder, encoders.FastEncoder) and why.startswith("fastokens ") and "one document in 100" in why
    texts = [*HARD_TEXTS, *real_texts(40), "word " * 100_000, " " * 60_000 + "x" * 30_000, "", "\n"]
    tokens, lengths = encoder.encode(texts)
    expected, expected_lengths = encoder.reference.encode(texts)
    np.testing.assert_array_equal(tokens, expected)
    np.testing.assert_array_equal(lengths, expected_lengths)
    assert tokens.dtype == np.int32 and encoder.decode(tokens[: lengths[0]]) == texts[0]


def test_fast_encoder_on_every_code_point(kimi):
    pytest.importorskip("fastokens", reason="the fast encoder is optional: pip install fastokens==0.3.5")
    encoder, _ = encoders.choose_encoder(encoders.find_tokenizer(str(kimi)), "fast")
    points = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for at in range(0, len(points), 20_000):
        encoder.check("".join(f"a{c} {c}" for c in points[at : at + 20_000]))


def test_probe_covers_classes_runs_and_cuts(kimi):
    import unicodedata

    texts = encoders.probe_texts(encoders.find_tokenizer(str(kimi)))
    joined = set("".join(texts))
    assert {unicodedata.category(c) for c in joined} == {unicodedata.category(chr(p)) for p in range(0x110000)} - {"Cs"}
    assert max(map(len, texts)) > 400_000 and any(EOS in text for text in texts)
    assert any("=" * 25_001 in text for text in texts) and any(" " * 25_001 in text for text in texts)


class WrongOn:
    """A stand-in for a fast library that is wrong on texts with one word: what `FastEncoder` must notice."""

    def __init__(self, tokenizer, word):
        self.tokenizer, self.word = tokenizer, word

    def encode_batch_flat(self, pieces, **options):
        pieces = [piece.replace(self.word, "x") for piece in pieces]
        return self.tokenizer.encode_batch_flat(pieces, **options)


def test_a_wrong_fast_encoder_is_noticed_on_a_sample_of_texts(kimi):
    pytest.importorskip("fastokens", reason="the fast encoder is optional: pip install fastokens==0.3.5")
    spec = encoders.find_tokenizer(str(kimi))
    encoder = encoders.FastEncoder(spec, encoders.load_encoder(spec))
    encoder._tokenizer = WrongOn(encoder._tokenizer, "Goodbye")
    checked = []
    encoder._compare, compare = lambda text, tokens: (checked.append(text), compare(text, tokens)), encoder._compare
    for size in (7, 93, 1, 150, 300):
        encoder.encode([f"text {i}" for i in range(size)])
    assert len(checked) == 6  # of 551, one in 100 from the first on, whatever the batches
    with pytest.raises(encoders.EncoderMismatch, match=r"token 0 is \[\d+\] but should be \[\d+\], near"):
        encoder.encode(["Goodbye"] * 100)


def test_choice_of_encoder_falls_back_with_a_reason(kimi, monkeypatch):
    spec = encoders.find_tokenizer(str(kimi))
    encoder, why = encoders.choose_encoder(spec, "reference")
    assert isinstance(encoder, encoders.KimiTiktokenEncoder) and why.startswith("tiktoken with Kimi's word pattern")
    monkeypatch.setitem(sys.modules, "fastokens", None)  # as if it were not installed
    encoder, why = encoders.choose_encoder(spec, "auto")
    assert isinstance(encoder, encoders.KimiTiktokenEncoder) and "fastokens, ten times as fast, is not installed" in why
    with pytest.raises(UserError, match=r"encoder: fast was asked for, but fastokens, .* is not installed"):
        encoders.choose_encoder(spec, "fast")


def test_an_inexact_fast_encoder_is_not_chosen(kimi, monkeypatch):
    pytest.importorskip("fastokens", reason="the fast encoder is optional: pip install fastokens==0.3.5")
    spec = encoders.find_tokenizer(str(kimi))
    reference = encoders.load_encoder(spec)
    monkeypatch.setattr(encoders, "load_encoder", lambda spec: reference)
    monkeypatch.setattr(encoders, "KIMI_PATTERN", encoders.KIMI_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}+"))
    encoder, why = encoders.choose_encoder(spec, "auto")
    assert encoder is reference and "WARNING: fastokens is not exact here" in why
    with pytest.raises(UserError, match="it is not exact here"):
        encoders.choose_encoder(spec, "fast")


def test_realistic_vocabulary(tmp_path):
    spec = importlib.util.find_spec("dashscope")
    file = Path(spec.origin).parent / "resources" / "qwen.tiktoken" if spec else None
    if not file or not file.is_file():
        pytest.skip(
            "no qwen.tiktoken: pip install --no-deps dashscope==2.0.2 for the test on a 151,643-rank vocabulary"
        )
    shutil.copy(file, tmp_path / "tiktoken.model")
    named = {"151643": {"content": "[BOS]"}, "151644": {"content": EOS}}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": {"content": EOS}, "added_tokens_decoder": named})
    )
    spec = encoders.find_tokenizer(str(tmp_path))
    assert (spec.vocab_size, spec.eos_token_id) == (151_899, 151_644)
    encoder = encoders.load_encoder(spec)
    tokens, lengths = encoder.encode(HARD_TEXTS)
    for text, ids in zip(HARD_TEXTS, split_ids(tokens, lengths), strict=True):
        assert ids == plain_kimi_ids(tmp_path, text)
