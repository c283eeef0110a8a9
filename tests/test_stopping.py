"""Runs that are stopped by signals, and worker processes that outlive signals, or fail."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import failing
import probes
import pytest
from test_checkpoints import SMALL_FLAGS, saved
from test_cli import PPO, TESTS, curves, env_flags

SAYS = "\nppo.py: stopping; a second signal ends it at once\n"
ENDLESS = [*SMALL_FLAGS, "--total-timesteps=100_000_000", "--checkpoint-interval=2"]


@pytest.fixture
def start(tmp_path):
    """ppo.py as a process of its own, in a group of its own, of which nothing stays behind."""
    processes = []

    def start(*flags, program=PPO):
        process = subprocess.Popen(
            [sys.executable, str(program), *flags],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(TESTS)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        if group_is_alive(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def group_is_alive(process):
    """Whether there is the process, not yet waited for, or another one of its group."""
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.02)


def end_of(process):
    """Exit code and output of it, and whether all of its group have ended."""
    out, err = process.communicate(timeout=120)
    deadline = time.monotonic() + 30  # for the system to bury them
    while group_is_alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not group_is_alive(process), "a process has outlived the run"
    return process.returncode, out, err


# --- The first signal -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGINT, 20),
        (signal.SIGTERM, 20),
        (signal.SIGUSR1, 20),
        (signal.SIGINT, "reset"),
        (signal.SIGTERM, "constructor"),
    ],
)
def test_a_signal_stops_and_saves(number, where, command, monkeypatch):
    """The iteration under way ends: step 20 of an environment is in the third of 16 rows.

    Environments that swallow every exception, as this one does, cannot prevent it.
    """
    monkeypatch.setattr(failing.Stopping, "sent", False)
    flags = env_flags("failing:Stopping-v0", number=number, where=where)
    result = command(*flags, *SMALL_FLAGS, "--total-timesteps=384", "--eval-episodes=5")
    assert result.returncode == 128 + number
    step = 96 if where == 20 else 0
    assert saved()["global_step"] == step
    lines = result.stdout.splitlines()
    assert lines[-2:] == [f"saved runs/a at step {step}", "python ppo.py --resume runs/a"]
    command("--resume=runs/a", "--env-id=Match-v0", "--env-kwargs={}", "--eval-episodes=0")
    assert [x for x, _ in curves()["losses/updates"]] == list(range(32, 385, 32))


def test_a_signal_stops_an_evaluation(command, monkeypatch):
    """At once, though an episode goes on, and without returns, which would be those of a part."""
    assert command(*SMALL_FLAGS, "--total-timesteps=64", "--env-id=Match-v0").returncode == 0
    monkeypatch.setattr(failing.Stopping, "sent", False)
    steps = []
    never_ends = probes.Forever.step
    step = lambda *args: steps.append(args) or never_ends(*args)  # noqa: E731
    monkeypatch.setattr(probes.Match, "step", step)
    flags = env_flags("failing:Stopping-v0", number=signal.SIGTERM, where=3)
    result = command("--evaluate=runs/a", *flags, "--eval-episodes=5")
    assert result.returncode == 128 + signal.SIGTERM
    assert result.stdout.splitlines() == ["evaluating 5 episodes ..."]
    assert len(steps) == 3
    assert "eval/episodic_return" not in curves()
    # What a signal has left behind does not last: this is another run, in the same process.
    assert command("--evaluate=runs/a", "--eval-episodes=1").returncode == 0


# --- The second one -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("mode", "after", "first"),
    [("sync", 40, signal.SIGINT), ("async", 20, signal.SIGINT), ("sync", 32, signal.SIGTERM)],
)
def test_a_second_signal_ends_the_process_at_once(mode, after, first, start, tmp_path):
    """Though a step of the environment swallows every exception, and never returns."""
    flags = env_flags("failing:Stuck-v0", mode, after=after)
    # The training has 32 steps, as every other row resets.
    total = "--total-timesteps=" + ("64" if after == 32 else "384")
    process = start(*SMALL_FLAGS, total, *flags, "--eval-episodes=3", "--checkpoint-interval=1")
    wait_until((tmp_path / "stuck").exists, process)
    os.killpg(process.pid, first)
    assert process.stderr.readline() + process.stderr.readline() == SAYS
    time.sleep(1)  # as a person does; two signals at once may be taken for one
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    code, out, err = end_of(process)
    assert (code, err) == (-signal.SIGINT, "")
    assert saved()["global_step"] == 64, "what was saved before"
    assert ("evaluating" in out) == (after == 32)


# --- Worker processes -----------------------------------------------------------------------------
SPAWN = """
import multiprocessing, sys
sys.path.insert(0, {folder!r})
import ppo

if __name__ == "__main__":
    multiprocessing.set_start_method({method!r})
    ppo.main()
"""


@pytest.mark.parametrize(("method", "number"), [("fork", 15), ("forkserver", 2)])  # TERM, INT
def test_a_signal_to_the_group_reaches_workers_too(method, number, start, tmp_path):
    """They outlive it, however they were started, until the run has stopped and saved."""
    program = tmp_path / "program.py"
    program.write_text(SPAWN.format(folder=str(PPO.parent), method=method))
    process = start(*ENDLESS, "--vectorization-mode=async", program=program)
    wait_until((tmp_path / "runs/a/checkpoint.pt").exists, process)
    os.killpg(process.pid, number)
    code, out, err = end_of(process)
    assert (code, err) == (128 + number, SAYS)
    step = saved()["global_step"]
    assert out.splitlines()[-2:] == [
        f"saved runs/a at step {step:,}",
        f"python {program} --resume runs/a",
    ]
    assert curves()["losses/updates"][-1][0] == step


@pytest.mark.parametrize(("what", "kind"), [("RuntimeError", RuntimeError), ("death", Exception)])
def test_workers_that_fail_end_the_run(what, kind, command):
    """Where one raises, and where one dies while others are busy. Nobody stays behind, though the
    exception, and what it holds, may live on, as in a notebook.
    """
    before = multiprocessing.active_children()
    flags = env_flags("failing:Failing-v0", "async", what=what, where=12)
    with pytest.raises(kind) as end:
        command(*SMALL_FLAGS, "--checkpoint-interval=1", *flags, "--total-timesteps=384")
    assert set(multiprocessing.active_children()) <= set(before)
    assert isinstance(end.value, (RuntimeError, EOFError, ConnectionError))
    assert saved()["global_step"] == 32
