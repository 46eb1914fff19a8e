"""The trainer with a NaN put into one rank's embedding output at chosen steps: every rank must skip those steps."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_continual_2m
from config import run_main

POISONED = {1, 3, 4, 5, 6, 7}  # steps counted from 0
original = train_continual_2m.train_step


class Poisoned:
    """The engine, whose loss is NaN on rank 1 in the last micro-step of a poisoned step."""

    def __init__(self, engine, calls_left: int):
        self.engine, self.calls_left = engine, calls_left

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, **inputs):
        output = self.engine(**inputs)
        self.calls_left -= 1
        if self.calls_left == 0 and os.environ["RANK"] == "1":
            output.loss = output.loss * float("nan")
        return output


def train_step(engine, fp32, loader, step_plan, *rest):
    if step_plan.step in POISONED:
        engine = Poisoned(engine, step_plan.accumulation_steps)
    return original(engine, fp32, loader, step_plan, *rest)


train_continual_2m.train_step = train_step
run_main(train_continual_2m.main)
