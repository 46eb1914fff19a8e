"""Random damage to every file that a start of the trainer reads: a sentence, or a run that is provably the same.

    python benchmarks/fault_mutations.py --work WORK --seed 1 --count 200 --kinds deepspeed_json manifest

WORK holds what `fault_campaign.py` prepares: tokens/, model.json, and run/, the output folder of a finished run. For each
kind of file, `--count` mutations are drawn from (seed, kind, number): a key deleted, doubled, misspelt, of another type,
negative, huge or NaN; the file truncated, with random bytes, empty, in another encoding. With each the trainer's own main
runs in this process up to where it would start the process group; its last call, `train`, is replaced by a look at the
arguments. One JSON line per mutation goes to stdout: what was done, what was seen, and one of

    refused    a UserError (exit code 2) whose text names the file or the key
    equal      everything that decides the run compares equal to the undamaged start
    shown      the run differs, in values that a start writes to resolved_config.json or to its log (a learning rate is one)
    traceback, unnamed, silent, slow    not as promised
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import yaml  # noqa: E402

from config import FIELDS, UserError  # noqa: E402

KINDS = (
    "training_yaml deepspeed_json accelerate_yaml model_json manifest trainer_state trainer_state_fitted files_json latest"
).split()
AS_PROMISED = ("refused", "equal", "shown")
LONGEST_S = 20


# ---------------------------------------------------------------------------- the files


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of file: where it lies and what the trainer is started with."""

    kind: str
    path: Path
    resume: str | None = None
    fit: bool = False  # after the change, make files.json's size and checksum match

    @property
    def is_yaml(self) -> bool:
        return self.path.suffix == ".yaml"


def write_inputs(work: Path, options: list[str]) -> None:
    """The options as a YAML, and copies of the two files of other tools, so that damage stays in `work`."""
    values = dict(zip([word[2:] for word in options[::2]], options[1::2], strict=True))
    values = {key: yaml.safe_load(value) for key, value in values.items()}
    (work / "deepspeed.json").write_text((ROOT / "demo/deepspeed.json").read_text())
    launch = (ROOT / "demo/accelerate.yaml").read_text().replace("demo/deepspeed.json", str(work / "deepspeed.json"))
    (work / "accelerate.yaml").write_text(launch + "num_processes: 2\n")
    values |= {"deepspeed": str(work / "deepspeed.json"), "accelerate_config": str(work / "accelerate.yaml")}
    values |= {"curriculum": str(values["curriculum"]), "seed": 1234, "bf16": True, "engine": "tiled"}
    (work / "config.yaml").write_text(yaml.safe_dump(values, sort_keys=False))


def targets(work: Path) -> dict[str, Target]:
    newest = max(
        (work / "run").glob("checkpoint-step*"), key=lambda path: int(path.name.removeprefix("checkpoint-step"))
    )
    named = str(newest)
    state = newest / "trainer_state.json"
    found = (
        Target("training_yaml", work / "config.yaml"),
        Target("deepspeed_json", work / "deepspeed.json"),
        Target("accelerate_yaml", work / "accelerate.yaml"),
        Target("model_json", work / "model.json"),
        Target("manifest", work / "tokens" / "manifest.json"),
        Target("trainer_state", state, named),
        Target("trainer_state_fitted", state, named, fit=True),
        Target("files_json", newest / "files.json", named),
        Target("latest", work / "run" / "latest", "latest"),
    )
    return {target.kind: target for target in found}


# ---------------------------------------------------------------------------- mutations


def places(tree, path=()):
    """Every (path, value) of a tree of dicts and lists, without the root."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key), value
        yield from places(value, (*path, key))


def parent_of(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def mutate(content: bytes, *, is_yaml: bool, draw: random.Random) -> tuple[bytes, str]:
    """(changed content, what was done). The structure is changed where there is one, else the bytes."""
    load, dump = (yaml.safe_load, _yaml_text) if is_yaml else (json.loads, _json_text)
    try:
        tree = load(content)
    except ValueError:
        tree = None
    on_bytes = ("truncated", "random bytes", "empty", "encoding")
    on_tree = ("deleted", "type", "negative", "huge", "nan", "unknown", "doubled") if isinstance(tree, dict) else ()
    # keys are where mistakes are made: two thirds of the mutations
    how = draw.choice(on_tree * 4 + on_bytes * 3)
    if how in on_bytes:
        return _mutate_bytes(content, how, draw)
    every = [(path, value) for path, value in places(tree) if how != "unknown" or isinstance(path[-1], str)]
    # one number of the spike rule's history, changed together with its checksum, is a forgery that nobody can tell
    every = [(path, value) for path, value in every if not (str(path[0]).startswith("recent_") and len(path) > 1)]
    if how in ("negative", "huge", "nan"):
        every = [(p, v) for p, v in every if type(v) in (int, float)] or every
    path, value = draw.choice(every)
    name = ".".join(map(str, path))
    parent = parent_of(tree, path)
    if how == "deleted":
        del parent[path[-1]]
        return dump(tree), f"{name} deleted"
    if how == "doubled":
        return _doubled(tree, path, value, draw, is_yaml), f"{name} twice, the second with another value"
    if how == "unknown":
        wrong = _misspelt(path[-1], draw)
        parent[wrong] = value
        if draw.random() < 0.5:
            del parent[path[-1]]
        return dump(tree), f"{name} misspelt as {wrong}"
    if how == "type":
        choices = [v for v in ("text", 7, 2.5, True, None, [1], {"a": 1}) if type(v) is not type(value)]
        new = draw.choice(choices)
    elif how == "negative":
        new = -abs(value) - 1 if type(value) in (int, float) else -1
    elif how == "huge":
        new = draw.choice([2**31, 10**12, 2**63, 10**30, 1e300])
    else:
        new = draw.choice([float("nan"), float("inf"), -float("inf")])
    parent[path[-1]] = new
    return dump(tree), f"{name} is {new!r} for {value!r:.40}"


def _yaml_text(tree) -> bytes:
    return yaml.safe_dump(tree, sort_keys=False).encode()


def _json_text(tree) -> bytes:
    return json.dumps(tree, indent=1).encode()


def _mutate_bytes(content: bytes, how: str, draw: random.Random) -> tuple[bytes, str]:
    if how == "truncated":
        end = draw.randrange(max(1, len(content)))
        return content[:end], f"truncated to {end} of {len(content)} bytes"
    if how == "random bytes":
        changed = bytearray(content or b"\0")
        at, count = draw.randrange(len(changed)), draw.randint(1, 12)
        changed[at : at + count] = draw.randbytes(count)
        return bytes(changed), f"{count} random bytes at {at}"
    if how == "empty":
        return draw.choice([b"", b"\n", b"  ", b"{}", b"[]", b"null"]), "empty"
    name = draw.choice(["utf-16", "utf-32", "utf-8-sig", "cp500"])
    return content.decode("utf-8", "replace").encode(name, "replace"), f"in {name}"


def _misspelt(name: str, draw: random.Random) -> str:
    at = draw.randrange(len(name))
    changed = draw.choice([name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name + "s", name.upper()])
    return changed if changed != name else name + "_"


def _doubled(tree, path, value, draw: random.Random, is_yaml: bool) -> bytes:
    """The key a second time in the same mapping, with another value; written out by hand, since no dict can hold it."""
    depth = next(i for i in range(len(path), 0, -1) if isinstance(path[i - 1], str))
    parent, key = parent_of(tree, path[:depth]), path[depth - 1]
    other = draw.choice([0, 1, "other", None, [], {}])
    parent["\1"] = other
    if is_yaml:
        return _yaml_text(tree).replace(b'"\\x01"', str(key).encode())
    return _json_text(tree).replace(b'"\\u0001"', json.dumps(key).encode())


# ---------------------------------------------------------------------------- what a start would do


class Start:
    """The trainer's main up to the process group, as the values that decide the run."""

    def __init__(self):
        import train_continual_2m

        self.trainer = train_continual_2m
        self.signature = inspect.signature(train_continual_2m.train)
        train_continual_2m.train = self._remember
        os.environ |= {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}

    def _remember(self, *arguments, **named) -> int:
        self.bound = self.signature.bind(*arguments, **named).arguments
        return 0

    def values(self, options: list[str]) -> dict:
        """Sections of the run's values. Raises what main raises."""
        self.bound = None
        old, sys.argv = sys.argv, ["train_continual_2m.py", *options]
        try:
            with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
                self.trainer.main()
                self.said = said.getvalue()
                return self._sections(self.bound) if self.bound else {"options": {"dry_run": True}}
        finally:
            sys.argv = old

    def _sections(self, bound: dict) -> dict:
        from deepspeed.runtime.config import DeepSpeedConfig

        config, dataset, schedule = bound["config"], bound["dataset"], bound["schedule"]
        deepspeed = self.trainer.resolve_deepspeed(bound["deepspeed_json"], config)
        DeepSpeedConfig(json.loads(json.dumps(deepspeed)))  # DeepSpeed itself must take what we let through
        resume = bound["resume"]
        return {
            "options": dataclasses.asdict(config),
            "deepspeed": deepspeed,
            "model": json.loads(json.dumps(bound["model_config"].to_dict(), default=str)),
            "tokens": self._tokens(dataset, schedule, config),
            "vocabulary": [dataset.manifest.vocab_size, dataset.manifest.eos_token_id],
            "manifest_hash": dataset.manifest_hash,
            "resume": resume and [str(resume[0]), dataclasses.asdict(resume[1])],
        }

    def _tokens(self, dataset, schedule, config) -> str:
        """SHA-256 of what both ranks would read in the first twelve steps and the last."""
        import data_loader

        digest = hashlib.sha256()
        steps = sorted({*range(min(12, schedule.num_train_steps)), schedule.num_train_steps - 1})
        for rank in range(2):
            with data_loader.WindowLoader(dataset, schedule, seed=config.seed, rank=rank, prefetch=False) as loader:
                for step in steps:
                    digest.update(loader.micro_batch(step, 0).tobytes())
        return digest.hexdigest()


# What a start writes down: resolved_config.json holds these, the log's header the manifest's hash
SHOWN = {"options", "deepspeed", "model", "manifest_hash"}
# Facts of the past that a checkpoint's state records and nothing computes with; log and model card repeat them
RECORDED = {"versions", "model", "tokenizer", "skipped_total", "tokens_seen", "stage"}


def judge(before: dict, after: dict, said: str, target: Target) -> tuple[str, str]:
    """(outcome, the sections that differ) of a start that was not refused; `said`: what it printed."""
    differs = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    if not differs:
        return "equal", ""
    if after["options"].get("dry_run"):
        return "shown", "dry_run"
    if differs == {"resume"} and target.fit:
        old, new = before["resume"][1], after["resume"][1]
        fields = {name for name in old if old[name] != new.get(name)}
        if fields == {"options"}:
            gone = old["options"].keys() - new["options"].keys()
            return ("shown" if all(f"{name}: " in said for name in gone) else "silent"), f"options: {sorted(gone)}"
        return ("shown" if fields <= RECORDED else "silent"), f"state: {', '.join(sorted(fields))}"
    consequences = {"tokens"} if differs & {"options"} else set()  # another seed reads other tokens
    if target.kind == "manifest":
        # tokens must not differ, and a vocabulary that does is in the manifest whose hash the log states
        return ("shown" if differs <= {"manifest_hash", "vocabulary"} else "silent"), ", ".join(sorted(differs))
    return ("shown" if differs <= SHOWN | consequences else "silent"), ", ".join(sorted(differs))


def names_it(text: str, target: Target, done: str) -> bool:
    """Whether a refusal names the file, the key that was changed or, where bytes of a training YAML were, any option."""
    keys = [part for part in done.split(" ")[0].split(".") if not part.isdigit()]
    if target.kind == "training_yaml":
        keys += [f"{name}:" for name in FIELDS]
    return target.path.name in text or target.path.parent.name in text or any(len(k) > 2 and k in text for k in keys)


def fit_checksums(path: Path) -> None:
    """Make the checkpoint's files.json say what the changed file is."""
    from hashed_files import chunks_sha256

    listing = path.parent / "files.json"
    records = json.loads(listing.read_text())
    records[path.name] |= {"bytes": path.stat().st_size, "chunks_sha256": chunks_sha256(path)}
    listing.write_text(json.dumps(records, indent=1))


def try_one(start: Start, target: Target, options: list[str], before: dict, content: bytes, done: str) -> dict:
    """Start with `content` in the file's place; puts the file back."""
    listing = target.path.parent / "files.json"
    kept = {path: path.read_bytes() for path in (target.path, listing) if path.exists()}
    target.path.write_bytes(content)
    if target.fit:
        fit_checksums(target.path)
    begun = time.perf_counter()
    signal.alarm(LONGEST_S)
    try:
        after = start.values(options)
        outcome, seen = judge(before, after, start.said, target)
    except UserError as error:
        outcome, seen = "refused" if names_it(str(error), target, done) else "unnamed", str(error)
    except TimeoutError:
        outcome, seen = "slow", f"more than {LONGEST_S} s"
    except SystemExit as error:
        outcome, seen = "traceback", f"SystemExit {error}"
    except Exception as error:  # that is what is looked for
        import traceback

        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "site-packages" not in f.filename][-1]
        seen = f"{type(error).__name__}: {error} ({ours.name} in {Path(ours.filename).name}, at {last.name})"
        outcome = "traceback"
    finally:
        signal.alarm(0)
        for path, old in kept.items():
            path.write_bytes(old)
    return {"outcome": outcome, "seen": seen[:600], "ms": round(1000 * (time.perf_counter() - begun))}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"  # a damaged name must not wait for a network
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    start = Start()
    for kind in arguments.kinds:
        target = targets(arguments.work)[kind]
        options = ["--config", str(arguments.work / "config.yaml")]
        if target.resume:
            options += ["--resume_from_checkpoint", target.resume]
        before = start.values(options)
        if start.values(options) != before:
            raise RuntimeError("two undamaged starts differ, so nothing could be compared")
        content = target.path.read_bytes()
        for number in range(arguments.count):
            draw = random.Random(f"{arguments.seed}/{kind}/{number}")
            changed, done = mutate(content, is_yaml=target.is_yaml, draw=draw)
            record = {"fault": f"mutation of {kind}", "number": number, "done": done}
            record |= try_one(start, target, options, before, changed, done)
            if record["outcome"] == "shown":
                record["content"] = changed.decode("utf-8", "replace")
            print(json.dumps(record), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
