"""The layout that the README promises: who may import whom, what --help costs, what the shipped files say."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = {path.stem: path for path in ROOT.glob("*.py")}
ENTRIES = ("train_continual_2m", "tokenize_dataset", "memory_utils", "checkpointing")


def imports_of(path: Path) -> set[str]:
    """The project's own modules that a file imports, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & set(MODULES)


def test_imports_form_no_cycle():
    graph = {name: imports_of(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name, above):
        assert name not in above, f"import cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in graph[name]:
                visit(other, [*above, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_the_base_imports_nothing_of_ours():
    assert imports_of(MODULES["config_files"]) == set()
    assert imports_of(MODULES["config"]) == {"config_files"}
    assert imports_of(MODULES["run_log"]) <= {"config"}


def test_no_raw_result_names_a_path_of_the_machine_it_was_made_on():
    files = sorted((ROOT / "benchmarks/results").iterdir())
    assert files
    for path in files:
        found = re.search(r"(?:(?<![\w.])|(?<=\\[nt]))/(home|opt|root|tmp|work)/\S{0,60}", path.read_text())
        assert found is None, f"{path.name}: {found[0]}"


def test_the_flash_attn_4_that_is_installed_is_the_one_that_is_accepted():
    from kernels import FLASH4_PIN

    assert f"flash-attn-4[cu13]=={FLASH4_PIN}\n" in (ROOT / "requirements-hopper.txt").read_text()


def test_the_readme_says_what_each_file_is():
    text = (ROOT / "README.md").read_text()
    assert not [name for name in MODULES if f"`{name}.py`" not in text]


def test_every_raw_result_has_the_command_that_makes_it():
    results = ROOT / "benchmarks/results"
    text = (results / "README.md").read_text()
    named = set(re.findall(r"`(\w+\.(?:jsonl?|txt))`", text))
    assert named == {path.name for path in results.iterdir()} - {"README.md"}


def test_nothing_imports_the_trainer():
    assert not [name for name, path in MODULES.items() if "train_continual_2m" in imports_of(path)]


def test_only_kimi_model_names_the_models_modules():
    for name, path in MODULES.items():
        if name != "kimi_model":
            assert "modeling_kimi_linear" not in path.read_text(), f"{name}.py names transformers' Kimi-Linear modules"


@pytest.mark.parametrize("script", ENTRIES)
def test_help_imports_no_torch(script):
    """What makes --help answer at once; measured: 0.15 s a script on 2 cores."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}.py', '--help']\n"
        "try:\n"
        f"    runpy.run_path('{script}.py', run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'deepspeed', 'accelerate', 'pyarrow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def dry_run(*options):
    return subprocess.run(
        [sys.executable, "train_continual_2m.py", *options, "--dry_run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(("hardware", "accumulation"), [("h100", 256), ("l20", 512)])
def test_the_contract_command_lines_parse(hardware, accumulation):
    done = dry_run(
        *("--data_dir", "./data/tokenized_2m", "--output_dir", f"./checkpoints/kimi-2m-{hardware}"),
        *("--deepspeed", f"deepspeed_config_{hardware}.json", "--num_train_steps", "30000"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", str(accumulation)),
        *("--learning_rate", "1e-5", "--warmup_steps", "1000", "--gradient_checkpointing", "--bf16"),
        *("--wandb_project", "kimi-linear-2m", "--accelerate_config", f"accelerate_config_{hardware}.yaml"),
        *("--resume_from_checkpoint", f"./checkpoints/kimi-2m-{hardware}/checkpoint-step5000"),
    )
    assert done.returncode == 0, done.stderr
    assert f"gradient_accumulation_steps: {accumulation}" in done.stdout
    for length in (1048576, 1310720, 1572864, 1835008, 2097152):
        assert f"{length:,} tokens" in done.stdout


@pytest.mark.parametrize("config", [*sorted(p.name for p in ROOT.glob("config_*.yaml")), "demo/config.yaml"])
def test_every_shipped_config_loads_through_the_real_command_line(config):
    done = dry_run("--config", config)
    assert done.returncode == 0, done.stderr
    assert "resolved options" in done.stdout


def test_readme_commands_name_files_and_options_that_exist():
    """Every file, script and --option in the README's shell blocks is there."""
    from config import FIELDS

    text = (ROOT / "README.md").read_text()
    blocks = "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, flags=re.S)).replace("\\\n", " ")
    for file in set(re.findall(r"[\w/]+\.(?:py|json|yaml)\b", blocks)):
        assert (ROOT / file).exists() or file.startswith("data/"), f"README names {file}, which is not there"
    for line in blocks.splitlines():
        if "train_continual_2m.py" in line:
            options = re.findall(r"--(\w+)", line.split("train_continual_2m.py")[1])
            assert set(options) <= {*FIELDS, "config"}, line
