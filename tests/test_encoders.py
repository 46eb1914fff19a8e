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
