"""An environment that sends a signal to the process of its run: `--env-id stopping:Stopping-v0`."""

import multiprocessing
import os

import gymnasium as gym
import probes


class Stopping(probes.Match):
    """Sends it in the constructor, in a reset, or in a step of its own that the argument numbers.

    With `worker` only workers do, to the process that started them.
    """

    def __init__(self, number, where, worker=False):
        self.number = number
        self.where = where
        run = multiprocessing.parent_process() if worker else multiprocessing.current_process()
        self.pid = None if run is None else run.pid
        self.count = 0
        self.send_if("constructor")

    def send_if(self, where):
        if where == self.where and self.pid is not None:
            os.kill(self.pid, self.number)

    def reset(self, *, seed=None, options=None):
        self.send_if("reset")
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.count += 1
        self.send_if(self.count)
        return super().step(action)


gym.register("Stopping-v0", Stopping, disable_env_checker=True)
