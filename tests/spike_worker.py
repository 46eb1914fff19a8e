"""The trainer with one rank's gradients made a thousand times too large at step 17 (counted from 0), its loss left as it is."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_continual_2m
from config import run_main

original = train_continual_2m.train_step


class Steep:
    """The engine, whose backward on rank 1 gets a loss a thousand times too large."""

    def __init__(self, engine):
        self.engine = engine

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, **inputs):
        return self.engine(**inputs)

    def backward(self, loss, **options):
        self.engine.backward(loss * (1000.0 if os.environ["RANK"] == "1" else 1.0), **options)


def train_step(engine, fp32, loader, step_plan, *rest):
    return original(Steep(engine) if step_plan.step == 17 else engine, fp32, loader, step_plan, *rest)


train_continual_2m.train_step = train_step
run_main(train_continual_2m.main)
