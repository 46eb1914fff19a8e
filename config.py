"""Every option of the toolkit, typed, strict and in one place.

    defaults (the dataclass below)  <  YAML (--config)  <  command line

`TrainConfig` is frozen. An unknown key is an error that names the nearest known one; all problems of a run are
collected and raised once, as one `UserError` whose text is meant for the person at the shell. Nothing here changes
a value: what was given is used as it is or refused.

One owner per number: this file's options (YAML and command line) own the training numbers, the DeepSpeed JSON owns
ZeRO stage, buckets and offload, the Accelerate YAML owns process count and launcher. `cross_check` compares them.

Imports the standard library, yaml and config_files.py (what the other tools' files may hold) only, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import dataclasses
import difflib
import itertools
import json
import math
import os
import re
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import config_files

DEFAULT_CURRICULUM = "0:1048576,2500:1310720,5000:1572864,7500:1835008,10000:2097152"
HUB_MODEL = "moonshotai/Kimi-Linear-48B-A3B-Base"
# Options that decide what is computed: a resumed run must have the same, or name the change in allow_changed
MATHEMATICS = (
    "curriculum learning_rate warmup_steps lr_scheduler_type num_train_steps weight_decay adam_beta1 adam_beta2 "
    "adam_epsilon max_grad_norm seed bf16 trainable document_mask spike_factor loss_spike_factor"
).split()
# What a checkpoint knows under another name than an option's: the sequences of a step (batch x accumulation x processes,
# per stage), the data, and what the DeepSpeed JSON decides
ALLOWABLE = (*MATHEMATICS, "sequences_per_step", "data_dir", "grad_accum_dtype", "bf16_optimizer_states")
REPEATABLE = ("data_dir", "allow_changed")  # may be given several times, or as a list in YAML


class UserError(Exception):
    """A mistake the user can mend: the text names the key, the value, the rule and a fix. Scripts exit with 2."""


@dataclass(frozen=True)
class Stage:
    """One stage of the length curriculum: from `start_step` on, sequences of `seq_length` tokens."""

    start_step: int
    seq_length: int


def parse_curriculum(text: str) -> tuple[Stage, ...]:
    """`"0:1048576,2500:1310720"` -> stages. Steps must start at 0 and increase; lengths must be positive.

    Lengths may also fall (a user may want to cool down on short sequences), steps may not.
    """
    stages = []
    for part in str(text).split(","):
        try:
            step, length = (int(number.replace("_", "")) for number in part.strip().split(":"))
        except ValueError:
            raise UserError(
                f"curriculum: {part.strip()!r} is not STEP:TOKENS; write it as {DEFAULT_CURRICULUM!r}"
            ) from None
        stages.append(Stage(step, length))
    if stages[0].start_step != 0:
        raise UserError(f"curriculum: the first stage starts at step {stages[0].start_step}; it must start at step 0")
    for before, after in itertools.pairwise(stages):
        if after.start_step <= before.start_step:
            raise UserError(
                f"curriculum: steps must increase, but step {after.start_step} comes after step {before.start_step}"
            )
    for stage in stages:
        if stage.seq_length < 2:
            raise UserError(f"curriculum: step {stage.start_step} has {stage.seq_length} tokens; at least 2 are needed")
    return tuple(stages)


def option(default, help, *, choices=None):
    """A field of TrainConfig with its help text and, where it applies, its allowed values."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    # --- what is trained, on what, to where
    data_dir: str = option(
        "./data/tokenized_2m",
        "folder of token shards written by tokenize_dataset.py; several with weights: "
        "--data_dir a@0.6 --data_dir b@0.4 (or a@0.6,b@0.4)",
    )
    output_dir: str = option("./checkpoints/kimi-2m", "where checkpoints, metrics.jsonl and the log go")
    model_name_or_path: str = option(HUB_MODEL, "Hub name or local folder of the checkpoint to continue from")
    model_config: str | None = option(None, "JSON of a Kimi-Linear config: start from random weights instead")
    deepspeed: str | None = option(
        None, "DeepSpeed JSON (ZeRO stage, buckets, offload); must be the one Accelerate uses"
    )
    accelerate_config: str | None = option(
        None, "the Accelerate YAML of the launch, read for its process count (cross-check, planning)"
    )
    # --- schedule
    curriculum: str = option(DEFAULT_CURRICULUM, "length curriculum as STEP:TOKENS,STEP:TOKENS,...")
    num_train_steps: int = option(30000, "optimizer steps in all")
    per_device_train_batch_size: int = option(1, "sequences per GPU and micro-step")
    gradient_accumulation_steps: int = option(256, "micro-steps per optimizer step")
    tokens_per_step: int | None = option(
        None, "hold tokens per optimizer step at this number in every stage by changing the accumulation"
    )
    learning_rate: float = option(1e-5, "peak learning rate")
    warmup_steps: int = option(1000, "optimizer steps of linear warmup")
    lr_scheduler_type: str = option("cosine", "after warmup", choices=("constant", "linear", "cosine"))
    weight_decay: float = option(0.1, "AdamW weight decay, on matrices only (norms, gates and biases have none)")
    adam_beta1: float = option(0.9, "AdamW beta1")
    adam_beta2: float = option(0.95, "AdamW beta2")
    adam_epsilon: float = option(1e-8, "AdamW epsilon")
    max_grad_norm: float = option(1.0, "clip gradients to this global norm; 0 means no clipping")
    spike_factor: float = option(
        10.0,
        "drop a step on all ranks, before the update, whose gradient norm is more than this many times the median of the "
        "last 64 accepted ones (after 16); 0: off. Clipping tames the usual two- to fivefold; tenfold is damaged data",
    )
    loss_spike_factor: float = option(
        2.0,
        "the same for the loss; a trained model's loss varies by some ten percent between sequences of this length, twice "
        "the median is text that it knows nothing of; 0: off",
    )
    seed: int = option(1234, "order of the data and random initialisation")
    # --- precision, memory, kernels
    bf16: bool = option(True, "bfloat16 weights and activations with fp32 master weights; --no-bf16 means fp32")
    gradient_checkpointing: bool = option(
        True, "recompute activations in backward (the tiled engine always does; this is for --engine reference)"
    )
    engine: str = option(
        "tiled",
        "tiled: exact tiling of every layer (long_sequence.py); reference: transformers' own forward",
        choices=("tiled", "reference"),
    )
    segment_tokens: int | None = option(None, "tokens per KDA segment of the tiled engine; default: planned")
    heads_per_group: int | None = option(None, "attention heads per MLA group of the tiled engine; default: planned")
    token_tile: int | None = option(None, "tokens per MoE, MLP and loss tile of the tiled engine; default: planned")
    offload: str = option(
        "auto",
        "where the tiled engine keeps layer boundaries between forward and backward",
        choices=("auto", "host", "gpu"),
    )
    attention_outputs: str = option(
        "auto",
        "keep (output, log-sum-exp) of every MLA layer for backward, or recompute the quadratic attention",
        choices=("auto", "keep", "recompute"),
    )
    attention_backend: str = option(
        "auto", "kernel of full attention", choices=("auto", "flash4", "cudnn", "flash", "reference")
    )
    document_mask: bool = option(False, "reset KDA state and convolution and stop attention at document borders")
    trainable: str = option("all", "which parameters are trained", choices=("all", "no_experts", "attention"))
    gpu_memory_gib: float | None = option(None, "use at most this much memory of each GPU; default: what the card has")
    host_memory_gib: float | None = option(None, "plan with this much host memory; default: what the machine has")
    force: bool = option(False, "start although the planner says that the run cannot fit")
    # --- logging and checkpoints
    logging_steps: int = option(1, "print a progress line every N steps (metrics.jsonl gets every step)")
    save_steps: int = option(500, "checkpoint every N steps; the last step is always saved")
    save_total_limit: int = option(3, "keep the newest N checkpoints; 0 keeps all")
    resume_from_checkpoint: str | None = option(None, "a checkpoint folder, or 'latest' for the newest in output_dir")
    allow_changed: str | None = option(
        None,
        "resume although this option differs from the checkpoint's (repeatable or a,b,c); 'data_dir' for another data set, "
        "'sequences_per_step' for another batch, accumulation or number of sequences",
    )
    replay_step: int | None = option(
        None,
        "with --resume_from_checkpoint: run forward and backward of this step (counted from 0) alone, print losses, "
        "gradients and where its data lies, update and save nothing",
    )
    background_save: bool = option(
        True, "write a checkpoint while the next step computes; --no-background_save waits for it"
    )
    hang_timeout_minutes: float = option(
        0.0,
        "end the run on all ranks (exit code 4) when a training phase takes longer than this; 0: derived from the "
        "planner's step time (10x and 10 minutes; half an hour where no speed is known)",
    )
    stop_after_steps: int | None = option(None, "checkpoint and exit once this many steps of the schedule are done")
    wandb_project: str | None = option(None, "log to this W&B project")
    wandb_run_name: str | None = option(None, "name of the W&B run")
    wandb_mode: str = option("online", "W&B mode", choices=("online", "offline", "disabled"))
    gpu_hour_usd: float | None = option(None, "price of one GPU hour, for the cost in the plan")
    dry_run: bool = option(False, "print the resolved plan and exit")

    @property
    def stages(self) -> tuple[Stage, ...]:
        return parse_curriculum(self.curriculum)

    @property
    def allowed_changes(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in (self.allow_changed or "").split(",") if name.strip())


FIELDS = {f.name: f for f in dataclasses.fields(TrainConfig)}
_TYPES = typing.get_type_hints(TrainConfig)


def _plain_type(name: str) -> tuple[type, bool]:
    """The scalar type of a field and whether None is allowed."""
    hint = _TYPES[name]
    if isinstance(hint, types.UnionType):
        return next(t for t in typing.get_args(hint) if t is not type(None)), True
    return hint, False


def _coerce(name: str, value, source: str, problems: list[str]):
    """`value` as the field's type. YAML reads 1e-5 as a string, so numbers in strings are accepted; bools are not."""
    kind, optional = _plain_type(name)
    if name in REPEATABLE and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = ",".join(value)
    if value is None and optional:
        return None
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise ValueError
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise ValueError
        if kind is int:
            if isinstance(value, float):
                raise ValueError
            number = int(str(value).replace("_", ""))
            if abs(number) > 2**63 - 1:  # what torch and numpy hold
                raise ValueError
            return number
        if kind is float and not math.isfinite(float(value)):
            raise ValueError
        if kind is str and not str(value).isprintable():
            raise ValueError
        return kind(value)
    except (ValueError, OverflowError):
        problems.append(
            f"{source}: {name}: {value!r} is not {'a' if kind.__name__[0] != 'i' else 'an'} {kind.__name__}"
        )
        return None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Continual pretraining of Kimi-Linear from 1M to 2M tokens of context.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML with any of the options below; the command line wins over it")
    for name, f in FIELDS.items():
        kind, _ = _plain_type(name)
        spec: dict = {"default": argparse.SUPPRESS, "dest": name}
        # '%' is argparse's own formatting character
        spec["help"] = f"{f.metadata['help']} (default: {f.default})".replace("%", "%%")
        if name in REPEATABLE:
            parser.add_argument(f"--{name}", metavar="STR", action="append", **spec)
        elif kind is bool:
            parser.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **spec)
        else:
            parser.add_argument(f"--{name}", metavar=kind.__name__.upper(), **spec)
    return parser


def read_text(path: str, option: str = "") -> str:
    """The text of a UTF-8 file. Raises UserError with the file's name, and the option's that named it."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        key = f"{option}: " if option else ""
        raise UserError(f"{key}{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8 text; save the file as UTF-8") from None


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, which would let the last of two equal keys win without a word."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is there twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def read_yaml(path: str, option: str = "") -> dict:
    """The mapping in a YAML file, read with the safe loader. Raises UserError with the file's name."""
    text = read_text(path, option)
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # the last three: what no scalar can be
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict) or not values:
        found = "nothing" if not values else f"a {type(values).__name__}"
        raise UserError(f"{path}: expected 'key: value' lines, found {found}")
    return values


def parse_json(content: str | bytes, path: str | Path) -> dict:
    """The object in a JSON text. Raises UserError, naming `path`, also for a key given twice and for NaN and Infinity,
    which Python's own parser lets through."""

    def unique(pairs):
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} is there twice")
        return values

    def no_constant(word):
        raise ValueError(f"{word} is not a number")

    def finite(text):
        if not math.isfinite(float(text)):
            no_constant(text)
        return float(text)

    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        values = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(values).__name__}")
    return values


def read_json(path: str, option: str = "") -> dict:
    """The object in a JSON file. Raises UserError with the file's name."""
    return parse_json(read_text(path, option), path)


def unknown_key(name: str, known, source: str) -> str:
    """The sentence for a misspelt key, with the nearest known one."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"{source}: unknown key {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def load_config(argv: list[str] | None = None) -> TrainConfig:
    """Defaults < YAML < command line. Raises one UserError with every problem found."""
    parser = build_parser()
    arguments, extra = parser.parse_known_args(argv)
    problems: list[str] = []
    for word in extra:
        if word.startswith("--"):
            problems.append(unknown_key(word[2:].split("=")[0], [*FIELDS, "config"], "command line"))
        else:
            problems.append(f"command line: {word!r} belongs to no option")
    values: dict = {}
    if arguments.config:
        for name, value in read_yaml(arguments.config).items():
            if name not in FIELDS:
                problems.append(unknown_key(str(name), FIELDS, arguments.config))
            else:
                values[name] = _coerce(name, value, arguments.config, problems)
    for name, value in vars(arguments).items():
        if name != "config":
            values[name] = _coerce(name, value, "command line", problems)
    if problems:
        raise UserError("\n".join(problems))
    config = TrainConfig(**values)
    problems += check(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def check(config: TrainConfig) -> list[str]:
    """Every rule a value alone or two values together must keep; one sentence per broken rule."""
    problems = []
    for name, f in FIELDS.items():
        value, choices = getattr(config, name), f.metadata["choices"]
        if choices and value not in choices:
            problems.append(f"{name}: {value!r} is not one of {', '.join(choices)}")
    try:
        parse_curriculum(config.curriculum)
    except UserError as error:
        problems.append(str(error))
    positive = (
        "num_train_steps per_device_train_batch_size gradient_accumulation_steps tokens_per_step logging_steps "
        "save_steps segment_tokens heads_per_group token_tile gpu_memory_gib host_memory_gib stop_after_steps"
    )
    for name in positive.split():
        value = getattr(config, name)
        if value is not None and value <= 0:
            problems.append(f"{name}: {value} must be greater than 0")
    for name in (
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
        "save_total_limit",
        "adam_epsilon",
        "hang_timeout_minutes",
        "spike_factor",
        "loss_spike_factor",
    ):
        if getattr(config, name) < 0:
            problems.append(f"{name}: {getattr(config, name)} must not be negative")
    if config.document_mask and config.engine == "reference":
        problems.append("document_mask: needs --engine tiled; the reference forward has no document borders")
    for name in config.allowed_changes:
        if name not in ALLOWABLE:
            problems.append(unknown_key(name, ALLOWABLE, "allow_changed"))
    if config.replay_step is not None:
        if not config.resume_from_checkpoint:
            problems.append("replay_step: needs --resume_from_checkpoint, whose weights the step is run on")
        if not 0 <= config.replay_step < config.num_train_steps:
            problems.append(
                f"replay_step: {config.replay_step} must be in [0, num_train_steps={config.num_train_steps})"
            )
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(config, name) < 1:
            problems.append(f"{name}: {getattr(config, name)} must be in [0, 1)")
    return problems


# ---------------------------------------------------------------------------- numbers that live in several files


def cross_check(config: TrainConfig, *, world_size: int | None, environ=os.environ) -> list[str]:
    """Disagreements between this config, the DeepSpeed JSON, the Accelerate YAML and the launch; one sentence each.

    `world_size` is the number of launched processes, or None when nothing was launched (--dry_run, planning).
    """
    problems: list[str] = []
    launched_json = environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    deepspeed_json = config.deepspeed or launched_json
    accelerate_yaml = read_yaml(config.accelerate_config, "accelerate_config") if config.accelerate_config else {}
    deepspeed = read_json(deepspeed_json, "deepspeed") if deepspeed_json else {}
    if config.accelerate_config:
        problems += config_files.accelerate_problems(accelerate_yaml, config.accelerate_config)
    if deepspeed_json:
        problems += config_files.deepspeed_problems(deepspeed, deepspeed_json)
    model_json = config.model_config or os.path.join(config.model_name_or_path, "config.json")
    if config.model_config or os.path.isfile(model_json):
        model = read_json(model_json, "model_config")
        problems += config_files.model_problems(model, model_json, unknown=bool(config.model_config))
    if problems:
        return problems  # what follows compares values of the right types
    yaml_json = (accelerate_yaml.get("deepspeed_config") or {}).get("deepspeed_config_file")
    for source, other in (("the launched Accelerate YAML", launched_json), (config.accelerate_config, yaml_json)):
        if config.deepspeed and other and Path(other).resolve() != Path(config.deepspeed).resolve():
            problems.append(
                f"deepspeed: --deepspeed names {config.deepspeed!r} but {source} names {other!r} "
                "(deepspeed_config_file); make them the same file"
            )
    processes = world_size
    yaml_processes = accelerate_yaml.get("num_processes")
    if processes is None:
        processes = yaml_processes
    elif yaml_processes is not None and yaml_processes != processes:
        problems.append(
            f"num_processes: {config.accelerate_config} says {yaml_processes} but {processes} processes were launched; "
            "launch with that file or mend it"
        )
    yaml_accumulation = (accelerate_yaml.get("deepspeed_config") or {}).get("gradient_accumulation_steps")
    if yaml_accumulation not in (None, "auto", config.gradient_accumulation_steps):
        problems.append(
            f"gradient_accumulation_steps: {config.accelerate_config} says {yaml_accumulation} but the training config "
            f"says {config.gradient_accumulation_steps}; the training config owns it, take it out of the other"
        )
    if deepspeed_json:
        problems += check_deepspeed_json(config, deepspeed, processes, deepspeed_json)
    return problems


def check_deepspeed_json(config: TrainConfig, ds: dict, processes: int | None, source: str) -> list[str]:
    """The DeepSpeed JSON may say 'auto' or nothing where the training config owns the number; else it must agree."""
    problems = []
    zero = ds.get("zero_optimization") or {}
    offload = [
        k for k in ("offload_optimizer", "offload_param") if (zero.get(k) or {}).get("device") not in (None, "none")
    ]
    if zero.get("stage") != 3:
        asked = f" and {' and '.join(offload)} needs it" if offload else ""
        problems.append(
            f"{source}: zero_optimization.stage is {zero.get('stage')!r}; this trainer needs stage 3"
            f"{asked} (49 B parameters do not fit one GPU)"
        )
    owned = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "gradient_clipping": config.max_grad_norm,
    }
    if processes:
        owned["train_batch_size"] = config.per_device_train_batch_size * config.gradient_accumulation_steps * processes
    for key, ours in owned.items():
        theirs = ds.get(key, "auto")
        if theirs != "auto" and theirs != ours:
            problems.append(
                f'{key}: {source} says {theirs} but the training config gives {ours}; write "auto" in {source}'
            )
    bf16 = (ds.get("bf16") or {}).get("enabled", "auto")
    if bf16 not in ("auto", config.bf16):
        problems.append(f"bf16: {source} says {bf16} but the training config says {config.bf16}")
    if (ds.get("fp16") or {}).get("enabled") is True:
        problems.append(f"fp16: {source} enables fp16; Kimi-Linear was trained in bf16, use --bf16")
    for section in ("optimizer", "scheduler"):
        if section in ds:
            problems.append(
                f"{section}: {source} has a section {section!r}; the training config owns it, remove the section"
            )
    return problems


def world_size_of(config: TrainConfig, environ=os.environ) -> int | None:
    """Processes of this launch (WORLD_SIZE), None when nothing was launched."""
    return int(environ["WORLD_SIZE"]) if "WORLD_SIZE" in environ else None


SECRET_NAME = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS)$|PASSWORD|SECRET", re.I)


def mask_secrets(text: str, environ=os.environ) -> str:
    """`text` with every value of an environment variable that is named like a secret (WANDB_API_KEY, HF_TOKEN, *_SECRET, ...)
    replaced by its name. Values under 8 characters are no secrets (1, true, none) and would tear holes into words."""
    for name, value in environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name) and value in text:
            text = text.replace(value, f"<{name}>")
    return text


def run_main(main) -> None:
    """Run a script's main and end the process with its exit code: a UserError becomes its sentence on stderr and code 2,
    nothing else is hidden.

    Before the process group exists every rank makes the same mistake and rank 0 speaks; later a rank may be alone with it.
    """
    exit_code = [1]  # an uncaught exception's
    atexit.register(_leave, exit_code)
    try:
        exit_code[0] = main() or 0
    except UserError as error:
        exit_code[0] = 2
        rank, torch = int(os.environ.get("RANK", 0)), sys.modules.get("torch")
        started = torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
        if rank == 0 or started:
            label = f"error: rank {rank}: " if rank else "error: "
            text = "\n".join(label + line for line in str(error).splitlines())
            print(mask_secrets(text), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        exit_code[0] = 130
    except SystemExit as end:
        exit_code[0] = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    sys.exit(exit_code[0])


def _leave(exit_code: list[int]) -> None:
    """End a rank (only they load DeepSpeed) before the interpreter takes itself down, after every later exit handler.

    A gloo thread that drops the last reference to a tensor waits for the interpreter's lock. Python ends such a thread
    inside a C++ destructor, and the process with it: "terminate called without an active exception", SIGABRT after a run
    that was complete (torch 2.13 on Python 3.11; destroy_process_group does not prevent it).
    """
    if "deepspeed" not in sys.modules:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe has no reader to lose
            stream.flush()
    os._exit(exit_code[0])
