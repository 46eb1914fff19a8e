"""Shards that Megatron reads; a stream that serves every token once; a loader that is a function of its arguments."""

import dataclasses
import json
import random

import numpy as np
import pytest

from config import Stage, UserError, parse_curriculum
from data_loader import (
    Manifest,
    Schedule,
    ShardReader,
    ShardWriter,
    TokenStream,
    WindowLoader,
    epoch_order,
    index_bytes,
    open_dataset,
    read_index,
    sequence_tokens,
)

FIVE_STAGES = parse_curriculum("0:64,3:80,5:96,8:112,9:128")
EOS = 7


def write_dataset(folder, shard_tokens, *, tokens=None, seed=0):
    """A finished folder whose shards hold `shard_tokens[i]` tokens; by default every token of it is a number of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(seed)
    stream = np.arange(sum(shard_tokens), dtype="<i4") if tokens is None else tokens
    shards, at, documents = [], 0, 0
    for number, count in enumerate(shard_tokens):
        lengths, left = [], count
        while left:
            lengths.append(min(left, generator.randint(1, 40)))
            left -= lengths[-1]
        with ShardWriter(folder, f"shard_{number:05d}") as writer:
            writer.add(stream[at : at + count], np.array(lengths))
            shards.append(writer.close())
        at, documents = at + count, documents + len(lengths)
    manifest = Manifest(
        tokenizer_name="test",
        tokenizer_hash="0" * 64,
        vocab_size=1 << 20,
        eos_token="[EOS]",
        eos_token_id=EOS,
        max_seq_length=128,
        total_tokens=at,
        documents=documents,
        shards=tuple(shards),
    )
    (folder / "manifest.json").write_bytes(manifest.to_json())
    return open_dataset(str(folder))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "tokens", (1000, 37, 4096, 1, 311, 2500))


def schedule(*, world_size=2, batch=1, accumulation=4, steps=12, stages=FIVE_STAGES, tokens_per_step=None):
    return Schedule(
        stages=stages,
        num_train_steps=steps,
        world_size=world_size,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        tokens_per_step=tokens_per_step,
    )


def all_rows(dataset, plan, *, seed=3, steps=None, prefetch=False):
    """Every row that all ranks read, by step, in sequence order: [(step, rows [sequences, seq_length])]."""
    loaders = [WindowLoader(dataset, plan, seed=seed, rank=rank, prefetch=prefetch) for rank in range(plan.world_size)]
    for step in steps or range(plan.num_train_steps):
        micro_steps = range(plan.step(step).accumulation_steps)
        yield step, np.concatenate([loader.micro_batch(step, m) for m in micro_steps for loader in loaders])
    for loader in loaders:
        loader.close()


# ---------------------------------------------------------------------------- shards


def test_shard_round_trip(tmp_path):
    documents = [np.arange(n, dtype="<i4") + 5 for n in (1, 3, 1000, 7)]
    with ShardWriter(tmp_path, "s") as writer:
        writer.add(np.concatenate(documents[:2]), np.array([1, 3]))
        writer.add(np.concatenate(documents[2:]), np.array([1000, 7]))
        info = writer.close()
    assert (info.tokens, info.documents, info.bin_bytes) == (1011, 4, 4044)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s.bin", "s.idx"]
    with ShardReader(tmp_path, "s") as reader:
        for index, document in enumerate(documents):
            np.testing.assert_array_equal(reader.document(index), document)


def test_shard_that_fails_half_way_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, "s") as writer:
        writer.add(np.ones(5, "<i4"), np.array([5]))
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_megatron_reads_every_document(dataset):
    megatron = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="pip install --no-deps megatron-core==0.16.1"
    )
    assert megatron.DType.code_from_dtype(np.int32) == 4
    for shard in dataset.manifest.shards:
        theirs = megatron.IndexedDataset(str(dataset.folder / shard.name))
        assert len(theirs) == shard.documents and theirs.index.dtype == np.int32
        np.testing.assert_array_equal(theirs.document_indices, np.arange(shard.documents + 1))
        with ShardReader(dataset.folder, shard.name) as ours:
            np.testing.assert_array_equal(theirs.sequence_lengths, ours.lengths)
            for index in range(shard.documents):
                np.testing.assert_array_equal(theirs[index], ours.document(index))


def test_index_is_what_megatrons_own_builder_writes(tmp_path):
    megatron = pytest.importorskip(
        "megatron.core.datasets.indexed_dataset", reason="pip install --no-deps megatron-core==0.16.1"
    )
    torch = pytest.importorskip("torch")
    generator = random.Random(5)
    lengths = [generator.randint(1, 300) for _ in range(200)]
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    for length in lengths:
        builder.add_item(torch.zeros(length, dtype=torch.int32))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    assert (tmp_path / "theirs.idx").read_bytes() == index_bytes(np.array(lengths))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:20], "too short"),
        (lambda b: b"X" + b[1:], "not a Megatron index"),
        (lambda b: b[:-1], "do not hold 3 sequences"),
        (lambda b: b[:34] + b"\x05" + b[35:], "do not agree"),
        (lambda b: b[:-1] + b"\x01", "do not agree"),
    ],
)
def test_damaged_index_is_refused(tmp_path, damage, message):
    (tmp_path / "s.idx").write_bytes(damage(index_bytes(np.array([2, 3, 4]))))
    with pytest.raises(UserError, match=message):
        read_index(tmp_path / "s.idx")


# ---------------------------------------------------------------------------- opening


def test_opening_refuses_what_is_not_a_finished_folder(tmp_path):
    with pytest.raises(UserError, match=r"data_dir: the folder .*none does not exist; make it with"):
        open_dataset(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has no manifest\.json, so it is not a folder of token shards"):
        open_dataset(str(tmp_path))
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"was not finished; run the same .* command again"):
        open_dataset(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format_version": 1}')
    with pytest.raises(UserError, match=r"manifest\.json: 'tokenizer_name' is missing; tokenize again"):
        open_dataset(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match=r"format_version is 99; this toolkit reads 1"):
        open_dataset(str(tmp_path))


def test_opening_refuses_shards_of_another_size(tmp_path):
    write_dataset(tmp_path / "d", (100, 50))
    with open(tmp_path / "d" / "shard_00001.bin", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"shard_00001\.bin has 201 bytes but manifest\.json says 200"):
        open_dataset(str(tmp_path / "d"))
    (tmp_path / "d" / "shard_00001.bin").unlink()
    with pytest.raises(UserError, match=r"shard_00001\.bin is missing"):
        open_dataset(str(tmp_path / "d"))


def test_a_manifest_that_contradicts_itself_is_refused(tmp_path):
    manifest = write_dataset(tmp_path / "d", (100, 50)).manifest
    file = tmp_path / "d" / "manifest.json"
    good = json.loads(file.read_text())
    first = good["shards"][0]
    for change, message in (
        ({"total_tokens": 149}, "it says 149 tokens, its shards have 150"),
        ({"documents": manifest.documents + 1}, "its shards have"),
        ({"vocab_size": "97"}, "vocab_size is '97', not a int"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"eos_token_id": -1}, "eos_token_id is -1, not an id of"),
        ({"eos_tokn_id": 1}, "unknown key 'eos_tokn_id'; did you mean 'eos_token_id'"),
        ({"shards": [first, first]}, "two shards have the same name"),
        (
            {"shards": [{**first, "name": "../shard_00000"}]},
            "'../shard_00000' is not the name of a shard in this folder",
        ),
        ({"shards": [{**first, "bin_sha256": "no"}]}, "bin_sha256 is no SHA-256"),
        ({"shards": ["shard_00000"]}, "shards.0. is a str, not a JSON object"),
    ):
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(UserError, match=message) as caught:
            open_dataset(str(tmp_path / "d"))
        assert str(file) in str(caught.value)
    for text in (b'{"documents": 1, "documents": 2}', b'{"documents": NaN}', b"\xff\xfe{}", b"[]", b"", b"[" * 100_000):
        file.write_bytes(text)
        with pytest.raises(UserError, match=r"manifest\.json: (not valid JSON|expected a JSON object)"):
            open_dataset(str(tmp_path / "d"))


@pytest.mark.parametrize("damage", ["one byte", "another shard of the same size"])
def test_a_changed_shard_of_the_same_size_is_named_before_its_tokens_are_used(tmp_path, damage):
    dataset = write_dataset(tmp_path / "d", (1000, 1000))
    plan = schedule(stages=(Stage(0, 64),), steps=4)
    order = [dataset.manifest.shards[i].name for i in epoch_order(2, seed=3, epoch=0)]
    second = tmp_path / "d" / f"{order[1]}.bin"
    with WindowLoader(dataset, plan, seed=3, rank=0) as loader:
        whole = [loader.micro_batch(step, micro_step) for step in range(4) for micro_step in range(4)]
    if damage == "one byte":
        content = bytearray(second.read_bytes())
        content[-1] ^= 1
        second.write_bytes(content)
    else:
        second.write_bytes((tmp_path / "d" / f"{order[0]}.bin").read_bytes())
    served, steps = [], [(step, micro_step) for step in range(4) for micro_step in range(4)]
    loader = WindowLoader(open_dataset(str(tmp_path / "d")), plan, seed=3, rank=0)
    with (
        loader,
        pytest.raises(UserError, match=rf"{order[1]}\.bin has the right size but its SHA-256 is not the one in"),
    ):
        for step in steps:
            served.append(loader.micro_batch(*step))
    # every row before the damaged shard was served and is right
    assert len(served) > 2
    for row, right in zip(served, whole, strict=False):
        np.testing.assert_array_equal(row, right)


def test_manifest_hash_is_of_the_content(tmp_path):
    one, same = write_dataset(tmp_path / "a", (100, 50)), write_dataset(tmp_path / "b", (100, 50))
    other = write_dataset(tmp_path / "c", (100, 51))
    assert one.manifest_hash == same.manifest_hash != other.manifest_hash
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.manifest.vocab_size = 5
    assert Manifest.from_json(one.manifest.to_json(), tmp_path) == one.manifest


# ---------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("tokens_per_step", [None, 500, 1])
def test_schedule_is_the_sum_of_its_steps(tokens_per_step):
    plan = schedule(tokens_per_step=tokens_per_step, batch=3, steps=15)
    start = 0
    for step in range(15):
        now = plan.step(step)
        assert now.step == step and now.start_token == start
        assert now.seq_length == [s.seq_length for s in FIVE_STAGES if s.start_step <= step][-1]
        assert now.seq_length == FIVE_STAGES[now.stage_index].seq_length
        assert now.sequences == now.accumulation_steps * 2 * 3 and now.tokens == now.sequences * now.seq_length
        start += now.tokens
    assert plan.total_tokens == start
    for outside in (-1, 15):
        with pytest.raises(ValueError, match="outside the schedule of 15 steps"):
            plan.step(outside)


def test_tokens_per_step_changes_the_accumulation():
    plan = schedule(tokens_per_step=2560)
    assert [plan.step(stage.start_step).accumulation_steps for stage in FIVE_STAGES] == [20, 16, 13, 11, 10]
    assert schedule(tokens_per_step=1).step(0).accumulation_steps == 1


def test_schedule_that_ends_before_its_last_stages(dataset):
    plan = schedule(steps=4)
    assert plan.total_tokens == 8 * (3 * 64 + 80)
    assert plan.describe(dataset).count("never reached") == 3


def test_description_says_tokens_and_epochs(dataset):
    text = schedule().describe(dataset)
    need = 8 * (3 * 64 + 2 * 80 + 3 * 96 + 112 + 3 * 128)
    assert "stage 4: steps 9-11: 128 tokens x 8 sequences (4 micro-steps x 2 ranks x 1)" in text
    assert f"{need / dataset.total_tokens:.2f} epochs of this data set" in text
    assert f"the schedule needs {need / 1000:.2f}K tokens" in text
    assert "none yet; the schedule needs" in schedule().describe(None)
    assert "WARNING" not in text and "WARNING" in schedule(steps=90).describe(dataset)


# ---------------------------------------------------------------------------- stream and loader


def test_epochs_are_orders_of_all_shards():
    orders = [epoch_order(50, seed=1, epoch=e) for e in range(5)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 5
    assert epoch_order(50, seed=2, epoch=0) != orders[0] == epoch_order(50, seed=1, epoch=0)
    # the order is part of a run's identity: a change here would make old checkpoints resume on other data
    assert epoch_order(6, seed=1234, epoch=0) == [5, 1, 0, 2, 3, 4]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_token_of_an_epoch_is_served_once_through_all_stages(tmp_path, world_size):
    plan = schedule(world_size=world_size, accumulation=8 // world_size)
    # shards of odd sizes that together are exactly what the schedule needs: one epoch, cut by nothing
    sizes = [1, 63, 777, 2048, 129]
    dataset = write_dataset(tmp_path / "d", (*sizes, plan.total_tokens - sum(sizes)))
    served = [rows.ravel() for _, rows in all_rows(dataset, plan)]
    assert {rows.shape[1] for _, rows in all_rows(dataset, plan)} == {64, 80, 96, 112, 128}
    np.testing.assert_array_equal(np.sort(np.concatenate(served)), np.arange(dataset.total_tokens))


def test_order_survives_a_change_of_world_size(dataset):
    runs = [
        {step: rows.tolist() for step, rows in all_rows(dataset, schedule(world_size=w, batch=b, accumulation=a))}
        for w, b, a in ((1, 1, 8), (2, 1, 4), (4, 1, 2), (2, 2, 2), (8, 1, 1))
    ]
    assert all(run == runs[0] for run in runs)


def test_loader_equals_the_slow_reference_over_several_epochs(dataset):
    plan = schedule(steps=30, batch=2)
    assert plan.total_tokens > 3 * dataset.total_tokens
    for step, rows in all_rows(dataset, plan, steps=(0, 2, 3, 8, 17, 29), prefetch=True):
        now = plan.step(step)
        for j, row in enumerate(rows):
            expected = sequence_tokens(dataset, 3, now.start_token + j * now.seq_length, now.seq_length)
            np.testing.assert_array_equal(row, expected)


def test_a_micro_batch_depends_on_its_arguments_alone(dataset):
    """A fresh loader at any step, asked in any order, with and without prefetch, serves what a long run would."""
    plan = schedule(batch=2)
    calls = [(step, m) for step in range(12) for m in range(4)]
    with WindowLoader(dataset, plan, seed=3, rank=1) as loader:
        in_order = {call: loader.micro_batch(*call) for call in calls}
    random.Random(0).shuffle(calls)
    with (
        WindowLoader(dataset, plan, seed=3, rank=1) as jumping,
        WindowLoader(dataset, plan, seed=3, rank=1, prefetch=False) as plain,
    ):
        for call in calls:
            batch = jumping.micro_batch(*call)
            assert batch.dtype == np.int64 and batch.shape == (2, plan.step(call[0]).seq_length)
            np.testing.assert_array_equal(batch, in_order[call])
            np.testing.assert_array_equal(plain.micro_batch(*call), in_order[call])
    with WindowLoader(dataset, plan, seed=4, rank=1) as other:
        assert not np.array_equal(other.micro_batch(0, 0), in_order[0, 0])


def test_the_first_batch_can_be_read_before_it_is_asked_for(dataset):
    plan = schedule(batch=2)
    with (
        WindowLoader(dataset, plan, seed=3, rank=1) as early,
        WindowLoader(dataset, plan, seed=3, rank=1, prefetch=False) as plain,
    ):
        early.begin(5)
        read = early._pending[1].result()
        assert early.micro_batch(5, 0) is read
        np.testing.assert_array_equal(read, plain.micro_batch(5, 0))
        early.begin(5)  # and another one is asked for
        np.testing.assert_array_equal(early.micro_batch(7, 1), plain.micro_batch(7, 1))
        early.begin(plan.num_train_steps)  # a run that is done
        plain.begin(5)


def test_batches_that_are_still_held_are_never_written_again(dataset):
    """Arrays are given out again only when nobody holds them or anything made from them."""
    plan = schedule(steps=30, stages=(Stage(0, 64),))
    with WindowLoader(dataset, plan, seed=3, rank=0) as loader:
        held = [loader.micro_batch(step, 0)[:, 1:5] for step in range(10)]
        copies = [view.copy() for view in held]
        addresses = {loader.micro_batch(step, 1).ctypes.data for step in range(10, 30)}
        for view, copy in zip(held, copies, strict=True):
            np.testing.assert_array_equal(view, copy)
    assert len(addresses) <= 3  # those that were let go serve again
    torch = pytest.importorskip("torch")
    with WindowLoader(dataset, plan, seed=3, rank=0) as loader:
        tensors = [torch.from_numpy(loader.micro_batch(step, 0)) for step in range(10)]
        for step, tensor in enumerate(tensors):
            np.testing.assert_array_equal(
                tensor.numpy()[0], sequence_tokens(dataset, 3, plan.step(step).start_token, 64)
            )


def test_a_window_may_be_longer_than_shards_and_epochs(tmp_path):
    dataset = write_dataset(tmp_path / "d", (100, 3, 50))
    stream = TokenStream(dataset, seed=9)
    window = np.empty(1000, "<i4")
    stream.read_into(window, 140)
    np.testing.assert_array_equal(window, sequence_tokens(dataset, 9, 140, 1000))


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    dataset = write_dataset(tmp_path / "d", [5] * 40)
    monkeypatch.setattr(dataset, "MAX_OPEN_SHARDS", 3)
    window = np.empty(400, "<i4")
    TokenStream(dataset, seed=1).read_into(window, 0)
    np.testing.assert_array_equal(window, sequence_tokens(dataset, 1, 0, 400))
    assert len(dataset._readers) == 3


def test_bad_micro_step_and_lost_data_are_errors(tmp_path):
    dataset = write_dataset(tmp_path / "d", (2000, 1000))
    plan = schedule(stages=(Stage(0, 64),), steps=4)
    with WindowLoader(dataset, plan, seed=3, rank=0) as loader:
        with pytest.raises(ValueError, match="micro-step 4 is outside step 0's 4"):
            loader.micro_batch(0, 4)
        loader.micro_batch(0, 0)
        for name in ("shard_00000.bin", "shard_00001.bin"):
            with open(tmp_path / "d" / name, "r+b") as file:
                file.truncate(8)
        with pytest.raises(
            UserError, match=r"shard_0000\d\.bin(: ends before byte \d+; run --verify| has the right size but)"
        ):
            for micro_step in (1, 2, 3):  # the first may have been read ahead
                loader.micro_batch(0, micro_step)


def test_data_smaller_than_a_sequence_is_refused(tmp_path):
    dataset = write_dataset(tmp_path / "d", (40, 23))
    with pytest.raises(UserError, match=r"holds 63 tokens, less than one sequence of the first stage \(64\)"):
        WindowLoader(dataset, schedule(), seed=0, rank=0)


# ---------------------------------------------------------------------------- several folders with weights


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixture")
    stream = np.arange(20_000, dtype="<i4")
    write_dataset(folder / "a", (3000, 1201), tokens=stream[:4201])
    write_dataset(folder / "b", (999, 2000), tokens=stream[5000:7999])
    write_dataset(folder / "c", (1500,), tokens=stream[9000:10_500])
    return open_dataset(f"{folder / 'a'}@6, {folder / 'b'}@3,{folder / 'c'}@1")


def test_mixture_keeps_the_weights_and_serves_each_part_in_order(mixture):
    plan = schedule(steps=40, stages=parse_curriculum("0:16,10:20,20:24,30:28"), accumulation=8)
    borders = {0: (0, 4201), 1: (5000, 7999), 2: (9000, 10_500)}
    served = {part: [] for part in borders}
    number = 0
    for _, rows in all_rows(mixture, plan):
        for row in rows:
            (part,) = [p for p, (low, high) in borders.items() if low <= row.min() and row.max() < high]
            assert part == mixture.owner(number)
            assert len(np.concatenate([[], *served[part]])) == plan.tokens_of_part(mixture, part, number)
            served[part].append(row)
            number += 1
    shares = [len(served[part]) / number for part in borders]
    assert number == 40 * 16 and np.abs(np.array(shares) - [0.6, 0.3, 0.1]).max() < 0.03
    for part, rows in served.items():
        tokens = np.concatenate(rows)
        np.testing.assert_array_equal(tokens, sequence_tokens(mixture.parts[part], 3, 0, len(tokens)))


def test_every_block_of_a_mixture_holds_the_shares_exactly(mixture):
    owners = [mixture.owner(n) for n in range(2 * mixture.BLOCK)]
    for block in (owners[: mixture.BLOCK], owners[mixture.BLOCK :]):
        assert [block.count(part) for part in range(3)] == [600, 300, 100]
    for part in range(3):
        assert [mixture.served_before(part, n) for n in (0, 1, 777, 1000, 1999)] == [
            owners[:n].count(part) for n in (0, 1, 777, 1000, 1999)
        ]


def test_order_of_a_mixture_survives_a_change_of_world_size(mixture):
    stages = parse_curriculum("0:64,3:80,5:96")
    runs = [
        {
            step: rows.tolist()
            for step, rows in all_rows(mixture, schedule(world_size=w, batch=b, accumulation=a, stages=stages))
        }
        for w, b, a in ((1, 1, 8), (2, 2, 2), (4, 1, 2))
    ]
    assert runs[0] == runs[1] == runs[2]


def test_mixture_describes_each_part_and_refuses_unlike_ones(mixture, tmp_path):
    text = schedule().describe(mixture)
    assert "60.0 % of the sequences from" in text and text.count("epochs of this data set") == 3
    assert mixture.manifest.total_tokens == mixture.total_tokens == 4201 + 2999 + 1500
    a, b = (str(part.folder) for part in mixture.parts[:2])
    assert open_dataset(f"{a}@1,{b}@1").manifest_hash != open_dataset(f"{a}@1,{b}@2").manifest_hash
    for words in (f"{a}@0,{b}@1", f"{a}@x,{b}@1", f"{a},{b}@1", f"@1,{b}@1", f"{a}@inf,{b}@1"):
        with pytest.raises(UserError, match=r"is not FOLDER@WEIGHT with a weight above 0"):
            open_dataset(words)
    other = write_dataset(tmp_path / "other", (500,))
    manifest = dataclasses.replace(other.manifest, tokenizer_hash="1" * 64)
    (tmp_path / "other" / "manifest.json").write_bytes(manifest.to_json())
    with pytest.raises(
        UserError, match="cannot be mixed: tokenizer_hash is 0+ and 1+; tokenize them with one tokenizer"
    ):
        open_dataset(f"{a}@1,{tmp_path / 'other'}@1")


def test_manifest_is_plain_json(dataset):
    values = json.loads((dataset.folder / "manifest.json").read_text())
    assert values["total_tokens"] == dataset.total_tokens == sum(s["tokens"] for s in values["shards"])
