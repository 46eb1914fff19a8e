#!/usr/bin/env bash
# The whole pipeline at 1/1024 scale on this machine: text -> shards -> verify -> train (ZeRO-3) -> stop -> resume -> picture.
# Run it through 'make demo', which makes the environment first.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
processes=$($python -c 'import torch; print(torch.cuda.device_count() or 2)')
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
rm -rf demo/out

say() { printf '\n\033[1m[%4d s] %s\033[0m\n' "$SECONDS" "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }
train() {
  run .venv/bin/accelerate launch --config_file demo/accelerate.yaml --num_processes "$processes" \
    train_continual_2m.py --config demo/config.yaml "$@"
}

say "1/6 real text from this machine, and a tokenizer trained on it"
run $python demo/prepare_text.py demo/out
say "2/6 tokenize it into shards"
run $python tokenize_dataset.py --dataset_name demo/out/text.parquet --text_column text --tokenizer demo/out/tokenizer \
  --output_dir demo/out/tokens --max_seq_length 2048 --num_workers 2
say "3/6 verify the shards"
run $python tokenize_dataset.py --output_dir demo/out/tokens --verify
say "4/6 train through the curriculum, ZeRO-3 with offload on $processes processes; stops half-way"
train --stop_after_steps 55
say "5/6 resume from the checkpoint and finish"
train --resume_from_checkpoint latest
say "6/6 draw the run"
run $python demo/plot_run.py demo/out/run
$python - <<'PY'
import json
steps = {r["step"]: r for r in map(json.loads, open("demo/out/run/metrics.jsonl"))}
losses = [steps[step]["loss"] for step in sorted(steps)]
first, last = losses[0], sum(losses[-10:]) / 10
assert len(losses) == 110 and last < 0.75 * first, f"the loss did not fall well below its start: {first} -> {last}"
PY
cat <<TEXT

Everything lies in demo/out:
  text.parquet, tokenizer/     the text and the tokenizer trained on it
  tokens/                      shards in Megatron's format, manifest.json
  run/log.txt                  the run's log: versions, hardware, plan, one line a step
  run/metrics.jsonl, run/wandb every step as JSON; the same as an offline W&B run
  run/checkpoint-step*         checkpoints, 'latest' names the newest
  run/run.png                  loss, sequence length, tokens/s and memory over steps
TEXT
say "demo done"
