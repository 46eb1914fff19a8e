"""A dead process's lock must not stop the next start, a living one's must stay; CPU Adam resumes to the bit."""

import subprocess
import sys

import pytest
import torch

import compiled_ops

HOLD = """
import os, sys
os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)
print("holds", flush=True)
sys.stdin.read()
"""


def test_only_a_dead_processs_lock_is_removed(tmp_path, capsys):
    lock = tmp_path / "lock"
    words = [sys.executable, "-c", HOLD, str(lock)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        with compiled_ops.loading(tmp_path):
            assert lock.exists() and not capsys.readouterr().err
        process.kill()
    assert lock.exists()
    with compiled_ops.loading(tmp_path):
        assert not lock.exists()
    assert "was left by a process that was killed" in capsys.readouterr().err


def adam_steps(gradients, wrap, *, resume_after):
    """Weights after the steps, with a new optimizer that takes over the moments after `resume_after` of them."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    weight = torch.nn.Parameter(torch.linspace(-1, 1, gradients.shape[1]))
    optimizer = wrap(DeepSpeedCPUAdam([weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1))
    for step, gradient in enumerate(gradients):
        if step == resume_after:
            state = optimizer.state_dict()
            optimizer = wrap(DeepSpeedCPUAdam([weight], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1))
            optimizer.load_state_dict(state)
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("resume_after", [1, 2, 6, 9, 13])
def test_cpu_adam_resumes_to_the_bit(resume_after):
    gradients = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0))
    whole = adam_steps(gradients, compiled_ops.exact, resume_after=None)
    assert torch.equal(adam_steps(gradients, compiled_ops.exact, resume_after=resume_after), whole)
    # the same optimizer, up to the rounding of beta^step
    torch.testing.assert_close(adam_steps(gradients, lambda optimizer: optimizer, resume_after=None), whole)
