# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization (PPO) for Gymnasium's environments, in one file.

    python ppo.py --env-id CartPole-v1       # half a million steps, about a minute
    python ppo.py --env-id HalfCheetah-v5    # continuous actions have defaults of their own
    python ppo.py --env-id CarRacing-v3      # and so have images, with a convolutional network
    python ppo.py --env-id ALE/Breakout-v5   # Atari games, as DQN and its successors play them
    python ppo.py --env-id my_package:MyEnv-v0 --env-kwargs '{"size": 5}'
    python ppo.py --resume runs/name         # continue a stopped run
    python ppo.py --evaluate runs/name       # see what it has learnt
    torchrun --nproc-per-node 2 ppo.py --env-id CartPole-v1   # the same, divided among processes

Part I is PPO: 1 arguments, 2 environments, 3 networks, 4 the algorithm's formulas, 5 its phases and
the training loop. Part II is plumbing: 6 processes, 7 arguments checked and parsed, 8 environments
and random generators, 9 the folder of a run, 10 loading and evaluation, 11 main. Part I uses of it:

    InputError        the request is invalid
    explained         turns what an environment's constructor refuses into an InputError
    check_spaces      refuses environments that cannot be trained on
    is_atari, Atari   whether it is a game of ale-py; their vector environment
    is_image          whether observations are images
    drop_infos        keeps infos of environments from being collected
    undisturbed       undoes what environments do to the process
    close             closes environments, and warns if they cannot be
    check             refuses arguments out of range, or that differ from a resumed run's
    connect           connects the processes that torchrun has started, RANK of WORLD_SIZE each
    broadcast         gives the state of the first process's agent to all
    all_sum, moments  sum over processes; number, mean and variance of the rows of all
    average_gradients makes gradients and logged scalars those of the joined minibatch
    set_up, reseed    find the device and set torch's threads; seed the process's generators
    closing_envs      closes the environments at the end, even after an error
    load, restore     read a checkpoint; give agent and optimizers what it holds
    merged            adds to what is given in Python what a resumed run was started with
    restart           resets environments and generators
    check_finite      raises if there is a nan or an infinity
    check_optimizers  raises if a parameter of the agent is in no optimizer
    compiled          compiles a function, for --compile
    Run               the folder of the run, its checkpoints, TensorBoard's log, the console
    play              plays the episodes of an evaluation

Sizes: T steps of a rollout (num_steps), N environments (num_envs) of a process, B any batch, M a
minibatch, D dimensions of a Box action, C choices of a MultiDiscrete one. *obs is the shape of an
observation.

Episodes end as in Gymnasium's NEXT_STEP autoreset: after the last step of an episode, the next one
ignores its action and returns the first observation of a new episode, with reward 0. Such a row is
not valid, and never trained on. So obs[t + 1] is always where row t led, also at a time limit.

    t   obs[t]            action    obs[t + 1]        done    valid
    5   s_5               a_5       s_6, the last     True    True
    6   s_6, the last     ignored   s_0 of the next   False   False
    7   s_0 of the next   a_0       s_1               False   True

(A recurrent fork clears its state after such a row: its value still belongs to the old episode.)

[PPO]      Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
[GAE]      Schulman et al. 2016, High-Dimensional Continuous Control Using Generalized
           Advantage Estimation, arXiv:1506.02438
[KL]       Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
[Details]  Huang et al. 2022, The 37 Implementation Details of PPO, ICLR Blog Track: 1-13
           core, 14-22 Atari, 23-31 continuous actions, 32-36 LSTM, 37 MultiDiscrete
"""

import atexit
import functools
import io
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import traceback
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import chdir, closing, contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from importlib import import_module
from types import UnionType
from typing import Annotated, Literal, NamedTuple, get_args, get_origin

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv, VectorWrapper
from gymnasium.wrappers.vector import FlattenObservation, RecordVideo
from torch import Generator, Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

# --- 1. Arguments ---------------------------------------------------------------------------------
JsonObject = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


# tyro makes a flag of each field; the comment beside or above it is the flag's help.
@dataclass
class Args:
    """Train a PPO agent. Numbers may be written 1_000_000. Some defaults depend on --env-id.

    The flags are in this order: run, files, environment, rollout, update, loss, network. With
    --env-id X --help shows the defaults for X.
    """

    # Run
    exp_name: str = "ppo"  # name of the experiment, used in made-up run names
    run_name: str | None = None  # new folder in runs/ (None: env_id__exp_name__seed__time)
    seed: int = 1  # seed of networks, actions, minibatches and environments
    torch_deterministic: bool = True  # on CUDA, use cuDNN's deterministic kernels only (off: any)
    # cpu, cuda, cuda:1, mps, ...; auto: for images cuda where there is one, else cpu, which is
    # faster for small networks
    device: str = "auto"

    # Files
    resume: str | None = None  # folder of a run to continue, with the flags it was started with
    # iterations between regular checkpoints (None: a hundredth of the run); others are written
    # after ten minutes and when the run is stopped
    checkpoint_interval: int | None = None
    # let a resumed run be the unbroken one bit for bit: every checkpoint resets all environments,
    # none is written out of turn, and by default each environment has 10,000 steps between two
    exact_resume: bool = False
    evaluate: str | None = None  # folder of a run, or its .pt file, to evaluate without training
    eval_episodes: int = 10  # episodes of an evaluation, also after training (0: none then)
    eval_stochastic: bool = False  # sample the actions of an evaluation (off: take the likeliest)
    capture_video: bool = False  # film the evaluation, at most 2,000 frames of each episode

    # Environment
    env_id: str = "CartPole-v1"  # Gymnasium id; module:Env-v0 imports the module first
    env_kwargs: JsonObject = field(default_factory=dict)  # its arguments, e.g. '{"size": 5}'
    # set of defaults: none (those of Args), discrete, continuous (for Box actions), image, or auto,
    # which picks one by the spaces, and is what the command line does unless told otherwise
    preset: Literal["auto", "none", "discrete", "continuous", "image"] = "none"
    num_envs: int = 4  # environments that are stepped side by side, divided among processes
    # sync: in this process; async: a process each; vector_entry_point: their own vector version
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] = "sync"
    # start first episodes, which then do not count, with a random part of their time limit elapsed:
    # else environments that only the limit ends are all at one point of it (arXiv 2511.21011)
    stagger_episodes: bool = True

    # Rollout
    total_timesteps: int = 500_000  # steps of all environments together, in whole rollouts
    num_steps: int = 128  # T, steps of each environment in a rollout
    gamma: float = 0.99  # the discount factor (0: immediate rewards only)
    gae_lambda: float = 0.95  # lambda of GAE (0: one-step TD errors; 1: Monte Carlo returns)

    # Update
    learning_rate: float = 2.5e-4  # step size of the optimizer
    anneal_lr: bool = True  # let the learning rate fall linearly over the run (off: constant)
    num_minibatches: int = 4  # minibatches that an epoch splits the rollout into
    update_epochs: int = 4  # K, passes over each rollout
    norm_adv: bool = True  # scale advantages of a minibatch to mean 0, deviation 1 (off: raw)
    max_grad_norm: float | None = 0.5  # clip the gradient to this global 2-norm (None: off)
    target_kl: float | None = None  # stop an update once approximate KL exceeds this (None: off)
    recompute_advantages: bool = False  # recompute values and advantages every epoch (off: once)
    # compile loss and gradient, which takes some ten seconds at the start and then more than halves
    # their time; on the CPU it needs a C++ compiler
    compile: bool = False

    # Loss
    clip_coef: float = 0.2  # epsilon; the ratio is clipped to [1 - epsilon, 1 + epsilon]
    anneal_clip: bool = False  # let epsilon fall linearly over the run (off: constant)
    clip_vloss: bool = True  # also clip the change of the value function to epsilon (off: do not)
    # bound the loss of bad actions: where A < 0 the surrogate is at least c A, c > 1 (None: off)
    dual_clip: float | None = None
    ent_coef: float = 0.01  # c2, weight of the entropy bonus (0: off)
    vf_coef: float = 0.5  # c1, weight of the value loss (0: off)

    # Network and scaling
    # units of each hidden layer, policy and value alike (images have a network of their own)
    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: Literal["tanh", "relu"] = "tanh"  # nonlinearity of the hidden layers
    log_std_init: float = 0.0  # log sigma that a Gaussian policy starts with (Box actions)
    norm_obs: bool = True  # scale vectors by running mean and deviation, clip at 10 (off: raw)
    norm_reward: bool = True  # divide rewards by the deviation of returns, clip at 10 (off: raw)
    clip_reward: bool = False  # learn from the sign of rewards alone, before they are divided

    @property
    def batch_size(self) -> int:
        """T * N, the rows of a rollout."""
        return self.num_steps * self.num_envs

    @property
    def num_iterations(self) -> int:
        """The rollouts of a run, each followed by an update."""
        return math.ceil(self.total_timesteps / self.batch_size)


# What the presets put in place of these defaults.
PRESETS = {
    "none": {},
    "discrete": {  # this one and the next were found by measurement, see the README
        "num_envs": 8,
        "num_steps": 64,
        "gamma": 0.995,
        "gae_lambda": 0.98,
        "learning_rate": 5e-4,
        "update_epochs": 10,
    },
    "continuous": {
        "total_timesteps": 1_000_000,
        "num_envs": 64,
        "num_steps": 32,
        "gae_lambda": 0.9,
        "learning_rate": 3e-4,
        "num_minibatches": 32,
        "update_epochs": 10,
        "norm_adv": False,
        "target_kl": 0.05,
        "recompute_advantages": True,
        "ent_coef": 0.0,
        "vf_coef": 0.25,
        "log_std_init": -1.0,
    },
    "image": {  # OpenAI baselines' for Atari
        "total_timesteps": 10_000_000,
        "num_envs": 8,
        "clip_coef": 0.1,
        "log_std_init": -1.0,  # for Box actions, as in the preset for them
        "norm_obs": False,
    },
}


# --- 2. Environments ------------------------------------------------------------------------------
def make_envs(args: Args, render_mode: str | None = None) -> VectorEnv:
    """Make the N environments of a run as one vector environment, of vectors or images.

    Raises InputError if it cannot be made, or cannot be trained on.
    """
    kwargs = dict(args.env_kwargs)
    if render_mode is not None:
        kwargs["render_mode"] = render_mode
    if is_atari(args.env_id):
        envs = Atari(args, kwargs)
    else:
        with undisturbed(), explained(args.env_id, kwargs):
            envs = gym.make_vec(args.env_id, args.num_envs, args.vectorization_mode, **kwargs)
    drop_infos(envs)
    try:
        check_spaces(args.env_id, envs)
    except InputError:
        close(envs)
        raise
    space = envs.single_observation_space
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    return envs if is_vector or is_image(space) else FlattenObservation(envs)


# --- 3. Networks ----------------------------------------------------------------------------------
class RunningStats(nn.Module):
    """Mean and standard deviation, by component, of all rows seen; 0 and 1 before the first."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))  # (*shape) float32
        self.register_buffer("std", torch.ones(shape))  # (*shape); a variance might overflow
        self.register_buffer("count", torch.tensor(0))  # () int64

    def update(self, x: Tensor) -> None:
        """Merge the rows x (B, *shape) with those before (Chan, Golub, LeVeque 1983)."""
        count, x_mean, x_var = moments(x)
        mean = self.mean.cpu().double()
        std = self.std.cpu().double()
        weight = count / (count + self.count.item())  # of the new rows among all
        delta = x_mean - mean
        within = (1 - weight) * std.square() + weight * x_var
        between = weight * (1 - weight) * delta.square()
        self.mean.copy_(mean + weight * delta)
        self.std.copy_((within + between).sqrt().clamp(min=1e-4))  # never divide by almost 0
        self.count += count


ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}


def orthogonal(layer: nn.Module, gain: float) -> nn.Module:
    """The layer with orthogonal weights, scaled by `gain`, and biases of 0 [Details] #2."""
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def mlp(sizes: list[int], activation: type[nn.Module], gain: float) -> nn.Sequential:
    """A multilayer perceptron with these numbers of units; `gain` scales the last layer."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes[:-1]):
        layers.append(orthogonal(nn.Linear(inputs, outputs), math.sqrt(2)))
        layers.append(activation())
    layers.append(orthogonal(nn.Linear(sizes[-2], sizes[-1]), gain))
    return nn.Sequential(*layers)


class NatureCNN(nn.Module):
    """Features (B, 512) of images (B, *shape) uint8 (Mnih et al. 2015, doi:10.1038/nature14236)."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        # The channels are the smallest of three dimensions, the last on a tie; (H, W) get one.
        self.axis = 2 - int(np.argmin(shape[::-1])) if len(shape) == 3 else 2
        gain = math.sqrt(2)
        image = self.prepared(torch.zeros(1, *shape))  # (1, channels, H, W)
        self.layers = nn.Sequential(
            orthogonal(nn.Conv2d(image.shape[1], 32, kernel_size=8, stride=4), gain),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, kernel_size=4, stride=2), gain),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, kernel_size=3, stride=1), gain),
            nn.ReLU(),
            nn.Flatten(),
        )
        num_features = self.layers(image).shape[1]
        self.layers.append(orthogonal(nn.Linear(num_features, 512), gain))
        self.layers.append(nn.ReLU())
        self.to(memory_format=torch.channels_last)  # faster than the order of torch

    def prepared(self, image: Tensor) -> Tensor:
        """Images (B, *shape), from 0 to 255, as (B, channels, H, W) from 0 to 1."""
        if image.dim() == 3:  # without channels
            image = image.unsqueeze(-1)
        image = image.movedim(1 + self.axis, 1)
        return image.contiguous(memory_format=torch.channels_last) / 255  # [Details] #22

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(self.prepared(image))


class Categorical(NamedTuple):
    """One choice (Discrete) or C independent ones [Details] #37 among options, in B states.

    Actions are (B,) or (B, C), log-probabilities and entropies, in nats, (B,) in both cases.
    """

    logp: Tensor  # (B, options) or (B, C, options), log-probabilities; -1e9 for absent options

    def mode(self) -> Tensor:
        return self.logp.argmax(-1)

    def sample(self, generator: Generator | None = None) -> Tensor:
        # Gumbel-max: -log of exponential noise is Gumbel noise. Much faster than torch.multinomial.
        exponential = torch.empty_like(self.logp).exponential_(generator=generator)
        return (self.logp - exponential.log()).argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        chosen = self.logp.gather(-1, action.unsqueeze(-1))  # (B, 1) or (B, C, 1)
        return chosen.flatten(1).sum(1)

    def entropy(self) -> Tensor:
        return -(self.logp.exp() * self.logp).flatten(1).sum(1)


class Gaussian(NamedTuple):
    """Independent normal distributions in B states, one for each dimension [Details] #23, #25.

    Actions are (B, D), log-probabilities and entropies, in nats, (B,).
    """

    mean: Tensor  # (B, D)
    log_std: Tensor  # (D,), the same in all states [Details] #24

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: Generator | None = None) -> Tensor:
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) / self.log_std.exp()
        return -0.5 * z.square().sum(-1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self) -> Tensor:
        entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)
        return entropy.expand(len(self.mean))


LOG_STD_RANGE = (-20, 2)


class Agent(nn.Module):
    """Policy pi(a|s) and value function V(s), with the scaling of observations and rewards.

    Takes the single spaces of `make_envs`. `dist, value = agent(obs)` maps raw observations
    (B, *obs) to a distribution over actions and to values (B,), in units of scaled rewards. Actions
    (B, *action_shape) are indices from 0 or unbounded reals; `to_env` maps them to action_space.
    Raises InputError for an action space that is not supported.
    """

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Space, args: Args):
        super().__init__()
        num_outputs = self.set_action_space(action_space, args.log_std_init)
        self.observation_space = observation_space
        self.obs_dtype = np.float32
        self.cnn = None  # for images, a torso that policy and value function share [Details] #21
        sizes = [*observation_space.shape, *args.hidden_sizes]
        if is_image(observation_space):
            self.obs_dtype = np.uint8
            self.cnn = NatureCNN(observation_space.shape)
            sizes = [512]
        activation = ACTIVATIONS[args.activation]
        self.actor = mlp([*sizes, num_outputs], activation, gain=0.01)
        self.critic = mlp([*sizes, 1], activation, gain=1.0)  # separate networks [Details] #13, #26
        norm_obs = args.norm_obs and self.cnn is None
        self.obs_stats = RunningStats(observation_space.shape) if norm_obs else None
        self.return_stats = RunningStats(()) if args.norm_reward else None

    def set_action_space(self, space: spaces.Space, log_std_init: float) -> int:
        """Set what depends on the action space, and return how many outputs the policy needs."""
        self.action_space = space
        self.action_shape = ()
        self.action_dtype = np.int64
        self.log_std = None  # (D,), if the policy is Gaussian
        absent = None  # (C, options), if there are several choices; True where an option is none
        if isinstance(space, spaces.Discrete):
            num_outputs = int(space.n)
        elif isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
            # Every choice gets as many outputs as the one with most options.
            is_bits = isinstance(space, spaces.MultiBinary)
            options = np.full(space.shape, 2) if is_bits else space.nvec
            options = options.ravel()  # (C,)
            self.action_shape = options.shape
            absent = torch.from_numpy(np.arange(options.max()) >= options[:, None])
            num_outputs = absent.numel()
        elif isinstance(space, spaces.Box) and space.dtype.kind == "f":
            num_outputs = math.prod(space.shape)
            self.action_shape = (num_outputs,)
            self.action_dtype = np.float32
            self.log_std = nn.Parameter(torch.full((num_outputs,), float(log_std_init)))
            # Dimensions with two real bounds are mapped from [-1, 1]. Others are only moved, from 0
            # to the nearest bound if 0 is out of bounds: there nothing could be learnt.
            low = space.low.astype(np.float64)
            high = space.high.astype(np.float64)
            bounded = (low >= -1e6) & (high <= 1e6)
            nearest = np.clip(0, low, high)
            low = np.where(bounded, low, nearest - 1)
            high = np.where(bounded, high, nearest + 1)
            self.scale = (high - low) / 2  # (*space.shape)
            self.shift = (high + low) / 2  # (*space.shape)
        else:
            supported = "Discrete, MultiDiscrete, MultiBinary and Box of floats are"
            raise InputError(f"Actions {space} are not supported; {supported}.")
        self.register_buffer("absent", absent, persistent=False)
        return num_outputs

    def features(self, obs: Tensor) -> Tensor:
        """What both networks see of raw obs (B, *obs): scaled and clipped ones [Details] #28-29.

        Of images it is what the convolutional network makes of them, (B, 512).
        """
        if self.cnn is not None:
            return self.cnn(obs)
        x = obs.float()  # those of some environments are float64
        if self.obs_stats is not None:
            x = ((x - self.obs_stats.mean) / self.obs_stats.std).clamp(-10, 10)
        return x

    @property
    def reward_scale(self) -> Tensor | float:
        """What rewards are divided by: the deviation of the discounted return [Details] #30.

        Or a fifth of its root mean square, if that is more: else rewards with a large offset would
        all be clipped to the same number where returns hardly differ, as those of single steps.
        """
        stats = self.return_stats
        if stats is None:
            return 1.0
        return torch.maximum(stats.std, torch.hypot(stats.std, stats.mean) / 5)

    def scale_reward(self, reward: Tensor) -> Tensor:
        """Rewards of any shape, divided by their scale and clipped [Details] #31."""
        if self.return_stats is None:
            return reward
        return (reward / self.reward_scale).clamp(-10, 10)

    def policy(self, features: Tensor) -> Categorical | Gaussian:
        """The distribution pi(.|s), for both acting and learning."""
        output = self.actor(features)  # (B, num_outputs)
        if self.log_std is not None:  # a Box
            return Gaussian(output, self.log_std)
        if self.absent is not None:  # several choices; -inf would make the entropy nan
            output = output.view(-1, *self.absent.shape).masked_fill(self.absent, -1e9)
        return Categorical(output.log_softmax(-1))

    def forward(self, obs: Tensor) -> tuple[Categorical | Gaussian, Tensor]:
        features = self.features(obs)
        value = self.critic(features).squeeze(-1)  # (B,)
        return self.policy(features), value

    def act(self, obs: Tensor, greedy: bool = False, generator: Generator | None = None) -> Tensor:
        """Sample actions (B, *action_shape) for raw obs (B, *obs); greedy takes the likeliest."""
        dist = self.policy(self.features(obs))
        action = dist.mode() if greedy else dist.sample(generator)
        return action.detach()

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Convert actions (B, *action_shape) to elements (B, *space.shape) of the action space."""
        space = self.action_space
        action = action.reshape(-1, *space.shape)
        if isinstance(space, spaces.Box):
            mapped = action * self.scale + self.shift
            return mapped.astype(space.dtype).clip(space.low, space.high)  # [Details] #27
        return (action + getattr(space, "start", 0)).astype(space.dtype, copy=False)

    @torch.no_grad()
    def constrain(self) -> None:
        """Keep log sigma where numbers mean something, after a step of the optimizer."""
        if self.log_std is not None:
            self.log_std.clamp_(*LOG_STD_RANGE)

    def scalars(self) -> dict[str, float]:
        """Scalars of the agent itself to log."""
        if self.log_std is None:
            return {}
        return {"action_std": self.log_std.exp().mean().item()}


# --- 4. Algorithm ---------------------------------------------------------------------------------
class EnvState(NamedTuple):
    """Where N environments stand between two rollouts."""

    obs: np.ndarray  # (N, *obs), raw, to act on next
    done: np.ndarray  # (N,) bool, the last row ended an episode
    ended: np.ndarray  # (N,) bool, so it did, but not by a lost life, after which a game goes on
    discounted_return: np.ndarray  # (N,) float64, as in Rollout, of the last row
    episode_return: np.ndarray  # (N,) float64, sum of the episode's rewards so far
    episode_length: np.ndarray  # (N,) float64, its steps so far
    staggered: np.ndarray  # (N,) bool, the episode began with steps elapsed, and does not count


class Rollout(NamedTuple):
    """T steps of N environments. Row t leads from obs[t] to obs[t + 1]."""

    obs: Tensor  # (T + 1, N, *obs), raw, float32, or uint8 if they are images
    action: Tensor  # (T, N, *action_shape) int64 or float32, as sampled
    reward: Tensor  # (T, N) float32, raw, or their signs if args.clip_reward
    terminated: Tensor  # (T, N) bool, the episode ended in a state that has no future
    done: Tensor  # (T, N) bool, the episode ended, terminated or truncated
    valid: Tensor  # (T, N) bool, the action was carried out: the row before ended no episode
    discounted_return: Tensor  # (T, N) float32, reward plus gamma times that of the row before
    episode_return: np.ndarray  # (E,) float64, raw, of the E episodes that ended here and count
    episode_length: np.ndarray  # (E,) float64, their steps


class Minibatch(NamedTuple):
    """M valid rows to train on: some of a rollout's, or all of them before they are split."""

    obs: Tensor  # (M, *obs) float32 or uint8, raw
    action: Tensor  # (M, *action_shape) int64 or float32
    logprob: Tensor  # (M,) float32, log pi_old(a|s)
    value: Tensor  # (M,) float32, V(s) when advantages were computed, the centre of its clip
    advantage: Tensor  # (M,) float32; `update` normalises it if args.norm_adv
    target: Tensor  # (M,) float32, what V(s) is regressed to


def running_sums(x: np.ndarray, valid: np.ndarray, factor: float, last: np.ndarray) -> np.ndarray:
    """Sums (T, N) of x (T, N) over the episode so far; every step multiplies the sum by `factor`.

    `last` (N,) are the sums of the row before the first. A row that is not valid starts new ones,
    with its own x.
    """
    sums = np.empty(x.shape)
    keep = factor * valid
    for t in range(len(x)):
        last = keep[t] * last + x[t]
        sums[t] = last
    return sums


def gae(
    reward: Tensor, value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, for both kinds of episode ends.

    After a termination the next value is 0; after a truncation it is that of the final observation.
    No advantage flows back across the end of an episode. Rows that are not valid come out
    meaningless, but reach no other row, because the row before each of them is done.

    Takes (T, N), but value (T + 1, N). Returns advantages and targets of V, both (T, N).
    """
    delta = reward + gamma * (value[1:] * ~terminated) - value[:-1]  # (T, N), [PPO] eq. 12
    decay = gamma * gae_lambda * (~done).to(delta.dtype)  # (T, N)
    deltas = delta.unbind()  # T rows (N,), faster to index than a tensor
    decays = decay.unbind()
    advantages = list(deltas)  # right already for the last row
    for t in reversed(range(len(deltas) - 1)):  # [PPO] eq. 11 and [GAE] eq. 16, as a recursion
        advantages[t] = deltas[t] + decays[t] * advantages[t + 1]
    advantage = torch.stack(advantages)
    return advantage, advantage + value[:-1]


def clipped_surrogate(ratio: Tensor, advantage: Tensor, epsilon: float) -> Tensor:
    """The surrogate objective (M,): no incentive to move ratios beyond 1 +- epsilon [PPO] eq. 7."""
    return torch.min(ratio * advantage, ratio.clamp(1 - epsilon, 1 + epsilon) * advantage)


def clipped_error(value: Tensor, old_value: Tensor, target: Tensor, epsilon: float) -> Tensor:
    """The larger squared error (M,), of V or of V clipped around V_old [Details] #9."""
    clipped = value.clamp(old_value - epsilon, old_value + epsilon)  # (M,)
    return torch.max((value - target).square(), (clipped - target).square())


def ppo_loss(
    agent: Agent, minibatch: Minibatch, args: Args, epsilon: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """The scalar loss, which is the objective [PPO] eq. 9 negated, and detached scalars to log.

    `epsilon` is the current clipping parameter: args.clip_coef, or less if it is annealed.
    """
    dist, value = agent(minibatch.obs)
    logratio = dist.log_prob(minibatch.action) - minibatch.logprob  # (M,)
    ratio = logratio.exp()  # (M,), pi(a|s) / pi_old(a|s); 1 at the first step, up to rounding

    advantage = minibatch.advantage
    surrogate = clipped_surrogate(ratio, advantage, epsilon)
    if args.dual_clip is not None:  # bounds the loss where A < 0, arXiv:1912.09729 eq. 5
        bounded = torch.max(surrogate, args.dual_clip * advantage)
        surrogate = torch.where(advantage < 0, bounded, surrogate)
    policy_loss = -surrogate.mean()

    if args.clip_vloss:
        error = clipped_error(value, minibatch.value, minibatch.target, epsilon)
    else:
        error = (value - minibatch.target).square()
    value_loss = 0.5 * error.mean()  # the half is OpenAI baselines', not the paper's

    entropy = dist.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    info = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),  # [KL] k1
        "approx_kl": (ratio - 1 - logratio).mean(),  # [KL] k3
        "clipfrac": ((ratio - 1).abs() > epsilon).float().mean(),
    }
    return loss, {name: x.detach() for name, x in info.items()}


@torch.no_grad()
def logprob_and_value(agent: Agent, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Log pi(a|s) (T, N) and V(s) (T + 1, N) of a rollout, in chunks, so that memory is bounded."""
    logprobs = []
    values = []
    rows = 8_000_000 // rollout.obs[0, 0].numel()  # of a chunk; some 280 of Atari's images
    rows = min(max(rows, 1), 1024)
    obs_chunks = rollout.obs[:-1].flatten(0, 1).split(rows)  # of (T * N, *obs)
    action_chunks = rollout.action.flatten(0, 1).split(rows)  # of (T * N, *action_shape)
    for obs, action in zip(obs_chunks, action_chunks, strict=True):
        dist, value = agent(obs)
        logprobs.append(dist.log_prob(action))
        values.append(value)
    _, last_value = agent(rollout.obs[-1])
    values.append(last_value)
    N = rollout.done.shape[1]
    return torch.cat(logprobs).view(-1, N), torch.cat(values).view(-1, N)


def estimate_advantages(agent: Agent, rollout: Rollout, args: Args) -> Minibatch:
    """The valid rows of a rollout with their advantages, and log pi(a|s) and V(s) by this agent.

    Between a rollout and its update that is pi_old. With --recompute-advantages `update` calls it
    again, and keeps the log-probabilities of pi_old.
    """
    logprob, value = logprob_and_value(agent, rollout)  # (T, N), (T + 1, N)
    reward = agent.scale_reward(rollout.reward)  # (T, N)
    advantage, target = gae(
        reward, value, rollout.terminated, rollout.done, args.gamma, args.gae_lambda
    )
    valid = rollout.valid
    return Minibatch(
        obs=rollout.obs[:-1][valid],
        action=rollout.action[valid],
        logprob=logprob[valid],
        value=value[:-1][valid],
        advantage=advantage[valid],
        target=target[valid],
    )


def minibatches(batch: Minibatch, count: int, generator: Generator) -> Iterator[Minibatch]:
    """Shuffle the rows of a batch and deal them into `count` nearly equal parts [Details] #6."""
    rows = torch.randperm(len(batch.obs), generator=generator, device=generator.device)
    shuffled = [x[rows].tensor_split(count) for x in batch]  # of each field, `count` parts
    for parts in zip(*shuffled, strict=True):
        yield Minibatch._make(parts)


def normalized(parts: list[Minibatch]) -> list[Minibatch]:
    """Minibatches with advantages scaled to mean 0 and deviation 1, each its own [Details] #7."""
    advantages = [part.advantage for part in parts]
    sums = torch.stack([x.sum() for x in advantages])  # (num_minibatches,)
    counts = sums.new_tensor([len(x) for x in advantages])
    sums, counts = all_sum(torch.stack([sums, counts]))
    centred = [x - mean for x, mean in zip(advantages, sums / counts, strict=True)]
    squares = all_sum(torch.stack([x.square().sum() for x in centred]))
    stds = (squares / (counts - 1)).sqrt() + 1e-8
    scaled = [x / std for x, std in zip(centred, stds, strict=True)]
    return [part._replace(advantage=x) for part, x in zip(parts, scaled, strict=True)]


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients to a global 2-norm of at most max_norm, and return their norm [Details] #11.

    As nn.utils.clip_grad_norm_, but on one vector, which is faster for small networks.
    """
    gradients = [x.grad for x in parameters if x.grad is not None]
    norm = torch.cat([x.flatten() for x in gradients]).norm()
    scale = (max_norm / norm).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(scale)
    return norm


def explained_variance(value: Tensor, target: Tensor) -> Tensor:
    """The share of the targets' variance that values explain: 1 at best, not finite without any."""
    _, _, variance = moments(torch.stack([target - value, target], dim=1))  # (2,)
    return 1 - variance[0] / variance[1]


# --- 5. Training ----------------------------------------------------------------------------------
def collect(
    agent: Agent, envs: VectorEnv, state: EnvState, args: Args, generator: Generator
) -> tuple[Rollout, EnvState]:
    """Act for T steps in N environments, from where the last rollout ended [Details] #1.

    The generator must be on the agent's device. The loop only acts: the policy does not change
    during a rollout, so values and log-probabilities are computed afterwards, in batches.
    """
    T = args.num_steps
    N = envs.num_envs
    device = generator.device
    obs = np.empty((T + 1, *state.obs.shape), agent.obs_dtype)  # (T + 1, N, *obs)
    action = np.empty((T, N, *agent.action_shape), agent.action_dtype)
    reward = np.empty((T, N), np.float32)
    terminated = np.empty((T, N), bool)
    truncated = np.empty((T, N), bool)
    life_lost = np.zeros((T, N), bool)
    obs[0] = state.obs
    with undisturbed():  # by environments
        for t in range(T):
            with torch.inference_mode():  # as no_grad, but faster
                obs_tensor = torch.from_numpy(obs[t]).to(device)
                action[t] = agent.act(obs_tensor, generator=generator).cpu().numpy()
            env_action = agent.to_env(action[t])
            obs[t + 1], reward[t], terminated[t], truncated[t], info = envs.step(env_action)
            if "life_lost" in info:
                life_lost[t] = info["life_lost"]
    check_finite(obs=obs, action=action, reward=reward)

    # Episodes to learn from, of which a lost life is the end, too.
    done = terminated | truncated  # (T, N)
    valid = ~np.concatenate([state.done[None], done[:-1]])  # (T, N)
    learnt = np.sign(reward) if args.clip_reward else reward  # (T, N)
    discounted_return = running_sums(learnt, valid, args.gamma, state.discounted_return)  # (T, N)

    # Episodes to report, with raw rewards, those of rows that are not valid included.
    ended = done & ~life_lost  # (T, N)
    goes_on = ~np.concatenate([state.ended[None], ended[:-1]])  # (T, N)
    episode_return = running_sums(reward, goes_on, 1.0, state.episode_return)  # (T, N)
    episode_length = running_sums(goes_on, goes_on, 1.0, state.episode_length)  # (T, N)
    # (T, N), an episode ended that counts; the first of a staggered environment does not.
    counts = ended & ~(state.staggered & (ended.cumsum(0) == 1))
    rollout = Rollout(
        obs=torch.from_numpy(obs).to(device),
        action=torch.from_numpy(action).to(device),
        reward=torch.from_numpy(learnt).to(device),
        terminated=torch.from_numpy(terminated).to(device),
        done=torch.from_numpy(done).to(device),
        valid=torch.from_numpy(valid).to(device),
        discounted_return=torch.from_numpy(discounted_return).float().to(device),
        episode_return=episode_return[counts],
        episode_length=episode_length[counts],
    )
    next_state = EnvState(
        obs=obs[-1],
        done=done[-1],
        ended=ended[-1],
        discounted_return=discounted_return[-1],
        episode_return=episode_return[-1],
        episode_length=episode_length[-1],
        staggered=state.staggered & ~ended.any(0),
    )
    return rollout, next_state


def backward(agent: Agent, minibatch: Minibatch, args: Args, epsilon: float) -> dict[str, Tensor]:
    """Give the parameters the gradient of the loss, and return its scalars; see `compiled`."""
    loss, info = ppo_loss(agent, minibatch, args, epsilon)
    loss.backward()
    return info


def update(
    agent: Agent,
    optimizers: list[Optimizer],
    rollout: Rollout,
    batch: Minibatch,
    args: Args,
    epsilon: float,
    generator: Generator,
) -> list[dict[str, Tensor]]:
    """K epochs of minibatch steps over the batch of a rollout [PPO] alg. 1.

    Stops before a step if the policy has moved further than args.target_kl. Returns the scalars of
    every step taken. Raises RuntimeError if a parameter is in no optimizer.
    """
    check_optimizers(agent, optimizers)  # a fork may have replaced a parameter since they were made
    parameters = list(agent.parameters())
    max_norm = args.max_grad_norm or math.inf
    differentiate = compiled(backward) if args.compile else backward
    infos = []
    for epoch in range(args.update_epochs):
        if epoch > 0 and args.recompute_advantages:
            recomputed = estimate_advantages(agent, rollout, args)
            batch = recomputed._replace(logprob=batch.logprob)  # the same rows; pi_old stays
        parts = list(minibatches(batch, args.num_minibatches, generator))
        if args.norm_adv:
            parts = normalized(parts)
        for minibatch in parts:
            for optimizer in optimizers:
                optimizer.zero_grad()
            info = differentiate(agent, minibatch, args, epsilon)
            info = average_gradients(parameters, info, len(minibatch.advantage))
            # Asked only now, as the KL divergence of all processes comes with their gradients.
            if args.target_kl is not None and info["approx_kl"] > args.target_kl:
                return infos
            info["grad_norm"] = clip_gradients(parameters, max_norm)
            for optimizer in optimizers:
                optimizer.step()
            agent.constrain()
            infos.append(info)
    return infos


def anneal(optimizers: list[Optimizer], remaining: float) -> None:
    """Let learning rates fall linearly from those the optimizers were made with [Details] #4."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            initial_lr = group.setdefault("initial_lr", group["lr"])  # checkpoints keep it
            group["lr"] = initial_lr * remaining


def train(args: Args, agent_class: type[Agent] = Agent, checkpoint: dict | None = None) -> Agent:
    """Train an agent, write its run to a folder in runs/, evaluate it, and return it.

    `checkpoint` is that of args.resume, if it is loaded already. Seeds the process's generators and
    sets torch's threads. Raises InputError, a ValueError, before anything is written, and
    NonFiniteError, a FloatingPointError, at a nan or an infinity.
    """
    if args.resume is not None and checkpoint is None:
        checkpoint = load(args.resume)
        args = merged(args, checkpoint["args"])
    check(args, checkpoint)
    home = os.getcwd()  # environments may go elsewhere
    reseed(args)  # constructors of environments may draw from the process's generators
    own_args = replace(args, num_envs=args.num_envs // WORLD_SIZE)  # of this process
    connect(args)
    with closing_envs(make_envs(own_args)) as envs:
        device = set_up(args, envs.single_observation_space)
        generator = Generator(device)  # for actions and minibatches; environments cannot reach it
        reseed(args)  # so that the networks are the same whatever was drawn
        agent = agent_class(envs.single_observation_space, envs.single_action_space, args)
        agent.to(device)
        agent.eval_returns = np.zeros(0)  # of the evaluation at the end
        # A list, so that a fork may have several; together they must hold all parameters.
        optimizers = [  # eps: [Details] #3; fused: one kernel for all parameters, which is faster
            torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
        ]
        first_iteration = restore(checkpoint, agent, optimizers)
        broadcast(agent)
        if first_iteration >= args.num_iterations:
            print(f"{args.resume} is complete. A larger --total-timesteps trains it further.")
            return agent
        state = restart(envs, args, first_iteration, generator)
        with Run(args, home, envs, agent, optimizers, checkpoint) as run:
            for iteration in range(first_iteration, args.num_iterations):
                remaining = 1 - iteration / args.num_iterations  # from 1 towards 0
                epsilon = args.clip_coef * (remaining if args.anneal_clip else 1)
                if args.anneal_lr:
                    anneal(optimizers, remaining)

                # Algorithm 1 of [PPO], with running statistics.
                rollout, state = collect(agent, envs, state, args, generator)
                run.lap("rollout")
                if agent.return_stats is not None:  # this rollout's rewards are scaled by it, too
                    agent.return_stats.update(rollout.discounted_return[rollout.valid])

                batch = estimate_advantages(agent, rollout, args)
                run.lap("advantage")
                infos = update(agent, optimizers, rollout, batch, args, epsilon, generator)
                run.lap("update")
                if agent.obs_stats is not None:  # only now, as this changes the policy
                    agent.obs_stats.update(rollout.obs[:-1][rollout.valid])

                run.log(iteration + 1, rollout, state, batch, infos)
                run.save(iteration + 1)
                if args.exact_resume and run.checkpoint_is_due(iteration + 1):
                    # A resumed run starts from reset environments, so this one does so too.
                    state = restart(envs, args, iteration + 1, generator)
    if args.eval_episodes > 0:
        agent.eval_returns = play(agent, args, run.folder, run.saved_step)
        run.log_evaluation(agent.eval_returns)
    return agent


# === Part II: plumbing; nothing below is PPO ======================================================
# --- 6. Processes ---------------------------------------------------------------------------------
# torchrun sets these. Without it there is one process, and what is said of all is true of it.
RANK = int(os.environ.get("RANK", "0"))  # number of this process; 0 writes and speaks for all
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))  # its number on this machine
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # number of processes


class ProcessError(RuntimeError):
    """Another process has ended before its time; why is said by itself."""


def connect(args: Args) -> None:
    """Connect all processes until they end; once one has failed, torchrun ends the others.

    Raises InputError if they were started with different arguments.
    """
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        # Optimizers import this, and imported later it would keep the group from being destroyed.
        import_module("torch._dynamo")
        # By default there would be nccl alone where there is a GPU, also for tensors on the CPU.
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        distributed.init_process_group(backends)
        atexit.register(distributed.destroy_process_group)
    flags = str(replace(args, env_kwargs={}))  # without objects, of which each has its own
    if len(set(all_gather(np.array([flags])))) > 1:
        raise InputError("The flags of the processes differ; start all of them with the same.")


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all processes, in place. Raises ProcessError if one of them is lost."""
    if WORLD_SIZE > 1:
        work = distributed.all_reduce(x, async_op=True)
        while x.device.type == "cpu" and not work.is_completed():
            os.sched_yield()  # a thread that sleeps until then is woken late, and hears no signal
        try:
            work.wait()
        except RuntimeError as error:
            raise ProcessError(f"Process {RANK} has lost another one, which failed.") from error
    return x


def all_gather(x: np.ndarray) -> np.ndarray:
    """x (..., n) of all processes, whose n may differ, joined along the last axis."""
    if WORLD_SIZE == 1:
        return x
    parts = [None] * WORLD_SIZE
    distributed.all_gather_object(parts, x)
    return np.concatenate(parts, axis=-1)


def broadcast(agent: nn.Module) -> None:
    """Give the parameters and buffers of the first process's agent to the agents of all."""
    if WORLD_SIZE > 1:
        for x in agent.state_dict().values():
            distributed.broadcast(x, src=0)


def moments(x: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number, mean and variance (in float64, by column) of the rows x (B, ...) of all processes."""
    rows = x.cpu().double()  # mps has no float64
    sums = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0)])
    count, total, squares = all_sum(sums)
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0)
    return int(count.flatten()[0]), mean, variance


def average_gradients(
    parameters: list[nn.Parameter], info: dict[str, Tensor], rows: int
) -> dict[str, Tensor]:
    """Make gradients those of the joined minibatch of all processes, and return such an info.

    Those of a process are means over its own rows, and are weighted by the number of these.
    """
    if WORLD_SIZE == 1:
        return info
    parameters = [x for x in parameters if x.requires_grad]
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in parameters]
    scalars = torch.stack(list(info.values()))
    parts = [*gradients, scalars, scalars.new_ones(1)]
    total = all_sum(rows * torch.cat([x.flatten() for x in parts]))
    means = total / total[-1]  # the 1 has become the number of rows of all processes
    *gradients, scalars, _ = means.split([x.numel() for x in parts])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return dict(zip(info, scalars, strict=True))


# --- 7. Arguments, checked and parsed -------------------------------------------------------------
class InputError(ValueError):
    """The request is invalid; the message says why."""


ATARI = {  # what --env-id ALE/... has beside the preset for images
    "vectorization_mode": "vector_entry_point",
    "clip_reward": True,  # [Details] #19
    "norm_reward": False,
}
EVALUATION = ("device", "eval_episodes", "eval_stochastic", "capture_video")
# What may differ from a saved run's when it is resumed or evaluated.
CHANGEABLE = ("total_timesteps", "checkpoint_interval", "compile", *EVALUATION)


def preset(
    env_id: str, env_kwargs: dict | None = None, name: str = "auto", mode: str = "sync"
) -> dict:
    """The arguments that a preset sets; `auto` makes an environment and goes by its spaces."""
    atari = ATARI if is_atari(env_id) else {}
    if name == "auto":
        mode = atari.get("vectorization_mode", mode)
        args = Args(env_id=env_id, env_kwargs=env_kwargs or {}, num_envs=1, vectorization_mode=mode)
        check(replace(args, num_envs=WORLD_SIZE, num_minibatches=1))
        with chdir("."), closing_envs(make_envs(args)) as envs:  # it may go elsewhere
            continuous = isinstance(envs.single_action_space, spaces.Box)
            image = is_image(envs.single_observation_space)
        name = "continuous" if continuous else "discrete"
        if image:
            name = "image"
    return {"preset": name, **PRESETS[name], **atari}


def parse_args(argv: list[str] | None = None) -> Args:
    """What a command line asks for, such as ["--env-id", "Pendulum-v1"], its preset included."""
    args, _ = parse(argv)
    return args


def parse(argv: list[str] | None) -> tuple[Args, dict | None]:
    """The arguments, and the checkpoint of the run that they name, if they do.

    Two passes: the first finds the environment or the checkpoint, which decides on the defaults.
    The second parses with these defaults, so that --help shows them.
    """
    argv = translated(sys.argv[1:] if argv is None else argv)
    auto = Args(preset="auto")
    first, unknown = tyro.cli(
        Args, args=argv, default=auto, return_unknown_args=True, add_help=False
    )
    path = first.evaluate if first.resume is None else first.resume
    mode = first.vectorization_mode
    checkpoint = None
    try:
        if path is None:
            defaults = Args(**preset(first.env_id, first.env_kwargs, first.preset, mode))
        else:
            checkpoint = load(path)
            defaults = checkpoint["args"]
    except Exception as error:
        if "--help" not in unknown and "-h" not in unknown:
            raise
        print(f"{error} These are the defaults of --preset none:\n")
        defaults = Args()
    args = tyro.cli(Args, args=argv, default=defaults)
    if args.preset == "auto":  # the user wrote --preset auto
        args.preset = defaults.preset
    return args, checkpoint


ELSEWHERE = {  # flags of CleanRL that are not here, and what does it
    "--gym-id": "it is --env-id here",
    "--cuda": "it is --device cpu, cuda or auto here",
    "--track": "TensorBoard logs every run; for Weights & Biases see the README",
    "--wandb-project-name": "for Weights & Biases see the README",
    "--wandb-entity": "for Weights & Biases see the README",
    "--save-model": "every run is saved, in its folder in runs/",
    "--upload-model": "every run is saved, in its folder in runs/",
    "--hf-entity": "every run is saved, in its folder in runs/",
}


def translated(argv: list[str]) -> list[str]:
    """A command line with --no-flag for "--flag False", --flag for "--flag True", 1000 for 1e3.

    Raises InputError for a flag of CleanRL that something else does here.
    """
    kinds = {flag(x.name): x.type for x in fields(Args)}
    words = []
    for word in argv:
        name, _, value = word.partition("=")
        name = name.replace("_", "-")
        if name in ELSEWHERE and name not in kinds:
            raise InputError(f"There is no {name}: {ELSEWHERE[name]}.")
        is_convertible = kinds.get(name) in (bool, int, int | None)
        words += [name, value] if value and is_convertible else [word]
    result = []
    for word in words:
        before = result[-1].replace("_", "-") if result else ""
        kind = kinds.get(before)
        if kind is bool and word in ("True", "true"):
            continue
        if kind is bool and word in ("False", "false"):
            result[-1] = before.replace("--", "--no-", 1)
        elif kind in (int, int | None) and re.fullmatch(r"[\d.]+[eE]\d+", word):
            result.append(f"{float(word):.0f}")
        else:
            result.append(word)
    return result


def merged(args: Args, saved: Args) -> Args:
    """What a Python program asks for: the saved arguments, and those that are not the defaults."""
    defaults = vars(Args())
    given = {name: x for name, x in vars(args).items() if x != defaults[name]}
    return replace(saved, **given)


def flag(name: str) -> str:
    """An argument as it is written on the command line."""
    return "--" + name.replace("_", "-")


def check_types(args: Args) -> None:
    """Raise InputError for an argument of a wrong type, which only Python can give."""
    for x in fields(Args):
        value = getattr(args, x.name)
        kind = x.type | int if x.type in (float, float | None) else x.type
        if isinstance(kind, type | UnionType) and not isinstance(value, kind):
            name = kind.__name__ if isinstance(kind, type) else kind
            raise InputError(f"{flag(x.name)} must be of type {name}, not {value!r}.")
        options = get_args(x.type)
        if get_origin(x.type) is Literal and value not in options:
            raise InputError(f"{flag(x.name)} must be {' or '.join(options)}, not {value!r}.")
    sizes = args.hidden_sizes
    if not isinstance(sizes, tuple | list) or not all(isinstance(x, int) for x in sizes):
        raise InputError(f"--hidden-sizes must be whole numbers, (64, 64), not {sizes!r}.")


def check(args: Args, checkpoint: dict | None = None) -> None:
    """Raise InputError for arguments out of range, or not those of the saved run."""

    def require(name: str, holds: bool, requirement: str) -> None:
        if not holds:
            raise InputError(f"{flag(name)} must be {requirement}, not {getattr(args, name)!r}.")

    check_types(args)
    for name in ("num_envs", "num_steps", "num_minibatches", "update_epochs", "total_timesteps"):
        require(name, getattr(args, name) >= 1, "at least 1")
    for name in ("seed", "eval_episodes"):
        require(name, getattr(args, name) >= 0, "at least 0")
    for name in ("learning_rate", "ent_coef", "vf_coef"):
        require(name, 0 <= getattr(args, name) < math.inf, "finite and at least 0")
    for name in ("gamma", "gae_lambda"):
        require(name, 0 <= getattr(args, name) <= 1, "from 0 to 1")
    for name in ("clip_coef", "max_grad_norm", "target_kl"):
        x = getattr(args, name)
        require(name, x is None or 0 < x < math.inf, "finite and above 0")
    c = args.dual_clip
    require("dual_clip", c is None or 1 < c < math.inf, "finite and above 1")
    interval = args.checkpoint_interval
    require("checkpoint_interval", interval is None or interval >= 1, "at least 1")
    low, high = LOG_STD_RANGE
    require("log_std_init", low <= args.log_std_init <= high, f"from {low} to {high}")
    require("hidden_sizes", min(args.hidden_sizes, default=1) >= 1, "at least 1 each")
    require("preset", args.preset in PRESETS, " or ".join(PRESETS))
    require("env_kwargs", isinstance(args.env_kwargs, dict), "a JSON object: '{\"size\": 5}'")
    is_old = "NoFrameskip" in args.env_id
    require("env_id", not is_old, "ALE/Breakout-v5, or another name of that kind, for a game")
    native = args.vectorization_mode == "vector_entry_point" or not is_atari(args.env_id)
    require("vectorization_mode", native, "vector_entry_point for ALE/ games")
    require("resume", args.resume is None or os.path.isdir(args.resume), "the folder of a run")
    divisible = args.num_envs % WORLD_SIZE == 0
    require("num_envs", divisible, f"a multiple of the {WORLD_SIZE} processes")
    rows = args.num_envs // WORLD_SIZE * (args.num_steps // 2)  # the others may be resets
    if rows < 2 * args.num_minibatches:  # the deviation of a single row is no number
        raise InputError(
            f"--num-minibatches {args.num_minibatches} needs two rows in each, and of "
            f"{args.batch_size // WORLD_SIZE} steps only {rows} are sure: raise --num-envs or "
            f"--num-steps."
        )
    if checkpoint is not None:
        check_unchanged(args, checkpoint)


def check_unchanged(args: Args, checkpoint: dict) -> None:
    """Raise InputError for arguments that are not those of the saved run."""
    mode = "evaluate" if args.resume is None else "resume"
    given = plain(replace(args, **{mode: None}))
    saved = plain(checkpoint["args"])
    changed = [flag(x) for x in saved if x not in CHANGEABLE and given[x] != saved[x]]
    if args.exact_resume and mode == "resume" and given["compile"] != saved["compile"]:
        changed.append("--compile")  # it rounds otherwise
    if changed:
        path = getattr(args, mode)
        names = ", ".join(changed)
        raise InputError(f"{names} cannot be given with --{mode} {path}: it keeps its own.")
    processes = checkpoint.get("world_size", 1)
    if mode == "resume" and processes != WORLD_SIZE:
        way = command("resume", args.resume, processes)
        raise InputError(f"{args.resume} needs as many processes as it had, {processes}: {way}")


def plain(args: Args) -> dict:
    """The arguments in types of JSON; other objects become strings."""
    return json.loads(json.dumps(vars(args), default=str))


# --- 8. Environments and random generators --------------------------------------------------------
UNSUPPORTED = "are not supported, or a part of them is not; README says how to wrap an environment"


@contextmanager
def explained(env_id: str, kwargs: dict) -> Iterator[None]:
    """Turn what Gymnasium or the constructor of an environment refuses into an InputError."""
    try:
        yield
    except (gym.error.Error, ImportError, TypeError, ValueError, KeyError, AssertionError) as error:
        if isinstance(error.__cause__, gym.error.CustomSpaceError):  # in shared memory
            raise InputError(f"Observations of {env_id} {UNSUPPORTED}.") from error
        if not kwargs and not isinstance(error, gym.error.Error | ImportError):
            raise  # no argument was given that could be refused, so it is a bug
        asked = f"{env_id} with {kwargs}" if kwargs else env_id
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ImportError) and "ale_py" in str(error):
            reason += "; pip install ale-py"
        raise InputError(f"Cannot make {asked}: {reason}{place(error)}") from error


def place(error: Exception) -> str:
    """The line of an environment in which an error was raised, or that called what raised it."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    ours = [i for i, frame in enumerate(frames) if is_gymnasiums(frame.filename)]
    theirs = frames[ours[-1] + 1 :] if ours else []
    if not theirs:
        return ""
    return f" ({theirs[0].filename}, line {theirs[0].lineno}: {theirs[0].line})"


def is_gymnasiums(file: str) -> bool:
    """Whether it is a file of Gymnasium's."""
    return file.startswith(os.path.dirname(gym.__file__))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Undo what environments do to the process: to torch's modes, and to numpy's errors.

    That it ends the process is an error, and to what cannot be stored of a step a hint is added.
    """
    has_grad = torch.is_grad_enabled()
    dtype = torch.get_default_dtype()
    try:
        with np.errstate():
            yield
    except SystemExit as error:
        if error.code in (None, 0):
            raise RuntimeError("An environment has ended the process.") from error
        raise
    except (TypeError, ValueError) as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        if frame.name == "collect" or (frame.name == "step" and is_gymnasiums(frame.filename)):
            error.add_note(
                "An environment may have returned something else than it should. A reward is one "
                "number; if it is a vector, a wrapper has to sum it, as mo-gymnasium's "
                "LinearReward does."
            )
        raise
    finally:
        torch.set_grad_enabled(has_grad)
        torch.set_default_dtype(dtype)


def warn(message: str) -> None:
    """Say once, for all processes, what may be wrong."""
    if RANK == 0:
        show_line("", is_due=False)
        print(f"ppo.py: warning: {message}", file=sys.stderr, flush=True)


def is_atari(env_id: str) -> bool:
    """Whether it is a game of ale-py."""
    return env_id.removeprefix("ale_py:").startswith("ALE/")


class Atari(VectorWrapper):
    """ALE's vector environment, which preprocesses as [Details] #14-20, and here ends with a life.

    A lost life is a termination, info["life_lost"] says where; the game goes on with FIRE, if it
    has it, in place of the next action. That row is not valid, as after other ends.
    """

    def __init__(self, args: Args, kwargs: dict):
        if "render_mode" in kwargs:
            raise InputError(f"{args.env_id} cannot be filmed: its vector version shows nothing.")
        for name in ("continuous", "episodic_life", "life_loss_info", "reward_clipping"):
            if kwargs.get(name):
                raise InputError(f"{args.env_id} cannot be played with {name}; leave it out.")
        kwargs = {
            "repeat_action_probability": 0.0,  # the version registered has sticky actions
            "reward_clipping": False,  # so that returns are the scores
            **kwargs,
        }
        env_id = "ale_py:" + args.env_id.removeprefix("ale_py:")  # to import it registers the games
        with explained(args.env_id, args.env_kwargs):
            envs = gym.make_vec(env_id, args.num_envs, args.vectorization_mode, **kwargs)
        super().__init__(envs)
        names = [action.name for action in envs.unwrapped.ale.get_action_set()]
        self.restart_action = names.index("FIRE") if "FIRE" in names else 0

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple:
        obs, info = self.env.reset(seed=seed, options=options)
        self.lives = info["lives"]
        self.lost = np.zeros(self.num_envs, bool)
        return obs, info

    def step(self, action: np.ndarray) -> tuple:
        action = np.where(self.lost, self.restart_action, action)
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.lost = (info["lives"] < self.lives) & ~terminated & ~truncated
        self.lives = info["lives"]
        info["life_lost"] = self.lost
        return obs, reward, terminated | self.lost, truncated, info


KEPT_INFOS = ()  # names of those that a fork needs in `collect`, as "action_mask"


def drop_infos(envs: VectorEnv) -> None:
    """Let the infos of environments fall away, but for KEPT_INFOS.

    Gymnasium's collection is slow where they are large, and fails where they are unlike each other.
    """
    if not isinstance(envs.unwrapped, SyncVectorEnv | AsyncVectorEnv):
        return
    add_info = envs.unwrapped._add_info

    def add_kept(vector_infos: dict, env_info: dict, env_num: int) -> dict:
        for name in KEPT_INFOS:
            vector_infos = add_info(vector_infos, {name: env_info[name]}, env_num)
        return vector_infos

    envs.unwrapped._add_info = add_kept


def check_spaces(env_id: str, envs: VectorEnv) -> None:
    """Raise InputError for environments that cannot be trained on."""
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise InputError(f"{env_id} has autoreset mode {mode}, but only NEXT_STEP is supported.")
    space = envs.single_observation_space
    numeric = spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary
    if not all(isinstance(leaf, numeric) for leaf in leaves(space)):
        raise InputError(f"Observations {space} {UNSUPPORTED}.")
    is_stack = isinstance(space, spaces.Box) and len(space.shape) > 3 and space.dtype == np.uint8
    if is_stack and sorted(space.shape)[-2] >= 36:
        wrappers = "GrayscaleObservation before FrameStackObservation, or ReshapeObservation"
        raise InputError(f"Images {space.shape} have more than three dimensions; use {wrappers}.")
    if not is_image(space) and any(is_image(leaf) for leaf in leaves(space)):
        reason = "hold an image; use FilterObservation, or a wrapper that returns it alone"
        raise InputError(f"Observations {space} {reason}.")


def leaves(space: spaces.Space) -> list[spaces.Space]:
    """The spaces that a Dict or a Tuple holds, or the space itself."""
    if not isinstance(space, spaces.Dict | spaces.Tuple):
        return [space]
    parts = space.values() if isinstance(space, spaces.Dict) else space
    return [leaf for part in parts for leaf in leaves(part)]


def is_image(space: spaces.Space) -> bool:
    """Whether observations are images: uint8, (H, W) or with channels, large enough for the CNN."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) in (2, 3) and sorted(space.shape)[-2] >= 36


@contextmanager
def closing_envs(envs: VectorEnv) -> Iterator[VectorEnv]:
    """Close the environments at the end; after a failure, without waiting for what may be dead."""
    try:
        yield envs
    except BaseException:
        workers = getattr(envs.unwrapped, "processes", ())
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join(0.5)  # for it to close its environment
            worker.kill()
        if workers:
            envs.unwrapped.closed = True  # else Gymnasium would wait for their answers
        close(envs.unwrapped)  # without the wrappers, of which one may be filming
        raise
    close(envs)


def close(envs: VectorEnv) -> None:
    """Close environments; if that fails, it costs nobody the result."""
    try:
        with undisturbed():
            envs.close()
    except Exception as error:
        warn(f"closing the environments failed: {type(error).__name__}: {error}")


def set_up(args: Args, observation_space: spaces.Space) -> torch.device:
    """Set torch's threads and cuDNN, and return the device to train on.

    Raises InputError if it is not at hand, or cannot do what --compile or --capture-video ask for.
    """
    convolutions = is_image(observation_space)
    name = args.device
    if name == "auto":
        name = "cuda" if convolutions and torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK}"  # one for each process on a machine
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError) as error:  # the latter is that of a torch without CUDA
        reason = f"There is no device {name} here; choose another --device"
        if WORLD_SIZE > 1:
            reason += ", or no more processes than there are GPUs"
        raise InputError(f"{reason}.") from error
    device = torch.device(name)
    if device.type == "cpu" and not convolutions and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # faster than more for layers as small as these
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.compile:
        check_compiler(device)
    if args.capture_video and args.eval_episodes > 0:
        check_film(args)
    return device


def check_compiler(device: torch.device) -> None:
    """Raise InputError if nothing can be compiled for the device."""
    if RANK == 0:
        print("trying to compile ...", flush=True)
    try:
        torch._dynamo.reset()  # else what earlier runs compiled would count against torch's limit
        torch.compile(torch.square)(torch.zeros(1, device=device))
    except (RuntimeError, OSError) as error:
        lines = str(error).splitlines() or [repr(error)]
        causes = [line.strip() for line in lines if "error:" in line]  # in a compiler's output
        reason = (causes or lines)[0]
        raise InputError(
            f"--compile: nothing can be compiled here; torch says: {reason}"
        ) from error


@functools.cache
def compiled(function: Callable) -> Callable:
    """The function, compiled when it is called first, for tensors of any size.

    Floats among its arguments become tensors, as it is compiled anew for each value of a float.
    """
    torch._dynamo.config.trace_autograd_ops = True  # else backward() could not be compiled
    torch._dynamo.config.specialize_float = True  # else changes of a float could go unseen
    compiled_function = torch.compile(function, dynamic=True)

    def call(*arguments: object) -> object:
        tensors = [torch.tensor(x) if isinstance(x, float) else x for x in arguments]
        result = compiled_function(*tensors)
        if EXIT_CODES:  # an exception that a signal raises in torch's guards is lost
            sys.exit(EXIT_CODES[0])
        return result

    return call


@undisturbed()
def check_film(args: Args) -> None:
    """Raise InputError if episodes of the environment cannot be filmed."""
    one = replace(args, num_envs=1)
    with chdir("."), closing_envs(make_envs(one, "rgb_array")) as envs:
        if envs.render_mode != "rgb_array":
            raise InputError(f"{args.env_id} cannot be filmed: it has no render_mode rgb_array.")
        envs.reset(seed=0)
        frames = envs.render()  # what this lacks, Gymnasium says
        shape = None if frames is None or frames[0] is None else np.shape(frames[0])
        if shape is None or len(shape) != 3 or shape[2] != 3:
            expected = "an RGB image (height, width, 3)"
            raise InputError(f"{args.env_id} cannot be filmed: it renders {shape}, not {expected}.")
    try:
        import_module("moviepy")
    except ImportError as error:
        raise InputError(f"Cannot film: {error}; pip install moviepy.") from error


def reseed(args: Args, *key: int) -> tuple[int, int]:
    """Seed the process's generators, from which environments may draw, by args.seed and key.

    Returns the seed of the first environment, to count up from, and that of the run's generator.
    """
    sequence = np.random.SeedSequence(args.seed, spawn_key=key)
    seed, env_seed, run_seed = sequence.generate_state(3).tolist()
    seed = (seed + RANK) % 2**32
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    env_seed = env_seed % 2**30  # native vector environments accept less than 2**31
    return env_seed + RANK * (args.num_envs // WORLD_SIZE), run_seed + RANK


@undisturbed()
def restart(envs: VectorEnv, args: Args, iteration: int, generator: Generator) -> EnvState:
    """Reset environments and generators, by seeds that follow from args.seed and iteration.

    Done where a run starts or is resumed, as no state of environments or generators is saved, and
    with --exact-resume at every checkpoint, so that resumed and unbroken runs go on alike, bit for
    bit. Unfinished episodes are dropped: they are not marked as done, and do not count.
    """
    env_seed, run_seed = reseed(args, iteration)
    generator.manual_seed(run_seed)
    obs, _ = envs.reset(seed=env_seed)
    staggered = np.zeros(envs.num_envs, bool)
    if args.stagger_episodes:
        staggered = stagger(envs, run_seed)
    zeros = np.zeros(envs.num_envs)
    return EnvState(
        obs=obs,
        done=np.zeros(envs.num_envs, bool),
        ended=np.zeros(envs.num_envs, bool),
        discounted_return=zeros,
        episode_return=zeros,
        episode_length=zeros,
        staggered=staggered,
    )


def stagger(envs: VectorEnv, seed: int) -> np.ndarray:
    """Let a random part of the time limit of each environment's episode be elapsed already.

    Returns (N,) bool, where it is. Environments without a TimeLimit, and those that have a vector
    version of their own, are left as they are.
    """
    vector = envs.unwrapped
    untouched = np.zeros(vector.num_envs, bool)
    if not isinstance(vector, SyncVectorEnv | AsyncVectorEnv):
        return untouched
    # To ask an asynchronous environment for what it lacks would end its process, and others may
    # have attributes of that name; but the string of an environment names all its wrappers.
    if not all("TimeLimit<" in text for text in vector.call("__str__")):
        return untouched
    limits = vector.get_attr("_max_episode_steps")
    elapsed = np.random.default_rng(seed).integers(limits)  # (N,), from 0 to the limit - 1
    vector.set_attr("_elapsed_steps", elapsed.tolist())
    return elapsed > 0


def warn_of_first(agent: nn.Module, rollout: Rollout) -> None:
    """Warn of what will learn nothing, as far as the first iteration shows it."""
    obs = rollout.obs
    if obs.dtype == torch.float32:
        rows = obs.flatten(0, 1).flatten(1).cpu().double()  # (T * N + N, dimensions)
        mean = rows.mean(0)
        gap = torch.from_numpy(np.spacing(mean.abs().float().numpy()))  # to the next in float32
        for index in (gap > rows.std(0) / 10).logical_and(mean.abs() > 1e6).nonzero().flatten():
            warn(
                f"observation {index} is about {short(mean[index])}, where float32 knows steps of "
                f"{short(gap[index])} only: subtract an offset from it, in a wrapper."
            )
    unused = [name for name, x in agent.named_parameters() if x.requires_grad and x.grad is None]
    if unused:
        warn(f"the loss does not depend on {', '.join(unused)} of the agent, which learn nothing.")


class NonFiniteError(FloatingPointError):
    """Nothing can be learnt from a nan or an infinity; the message says where it was."""


def check_finite(**arrays: np.ndarray) -> None:
    """Raise NonFiniteError if there is a nan or an infinity; the first along axis 0 is named.

    All processes do so if one has to, as none may be left waiting.
    """
    found = []
    for name, x in arrays.items():
        finite = np.isfinite(x)
        if not finite.all():
            index = np.argwhere(~finite)[0].tolist()
            where = f" in process {RANK}" if WORLD_SIZE > 1 else ""
            message = f"{name}{index} is {x[tuple(index)]}{where}"
            found.append((index[0], len(found), message))
    if all_sum(torch.tensor(len(found))) > 0:
        messages = [min(found)[-1]] if found else []
        raise NonFiniteError(all_gather(np.array(messages, str))[0])


def check_optimizers(agent: nn.Module, optimizers: list[Optimizer]) -> None:
    """Raise RuntimeError for a parameter that no optimizer has: it would never learn."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    known = {id(x) for group in groups for x in group["params"]}
    for name, parameter in agent.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            raise RuntimeError(f"No optimizer knows the agent's parameter {name}.")


# --- 9. The folder of a run -----------------------------------------------------------------------
class Run:
    """The folder of a run, with its checkpoints and TensorBoard's log, and what the console shows.

    Checkpoints are written at regular moments, after every ten minutes, and when a run is stopped:
    a copy in memory of the last whole iteration. With --exact-resume there are only the regular
    ones. Raises InputError if the folder cannot be made.
    """

    def __init__(
        self,
        args: Args,
        home: str,
        envs: VectorEnv,
        agent: Agent,
        optimizers: list[Optimizer],
        checkpoint: dict | None,
    ):
        self.args = replace(args, resume=None)
        self.agent = agent
        self.optimizers = optimizers
        self.interval = args.checkpoint_interval
        if self.interval is None:
            fewest = math.ceil(10_000 / args.num_steps) if args.exact_resume else 1
            self.interval = max(self.args.num_iterations // 100, fewest)
        start = checkpoint or {"iteration": 0, "returns": [], "lengths": [], "best": -math.inf}
        self.returns = deque(start["returns"], maxlen=100)  # raw, of the last episodes that ended
        self.lengths = deque(start["lengths"], maxlen=100)
        self.best = start["best"]
        self.first_step = start["iteration"] * self.args.batch_size
        self.saved_step = self.first_step
        self.path = args.resume
        self.seconds = {}  # of the phases of the iteration
        self.start_time = time.perf_counter()  # so that the start-up does not count
        self.lap_time = self.start_time
        if RANK > 0:  # the first process writes and speaks for all
            self.folder = home
            return
        if self.path is None:
            self.path = make_folder(args, home)
        self.folder = os.path.join(home, self.path)
        purge_step = self.first_step + 1 if args.resume else None
        self.writer = SummaryWriter(self.folder, purge_step=purge_step)
        self.spaces = [plain_space(agent.observation_space), plain_space(agent.action_space)]
        self.log_flags()
        self.keep(start["iteration"])
        self.write()  # also of a resumed run, as its arguments may have changed
        self.show_header(envs)
        self.progress = f"{self.first_step:,} steps"
        self.speed_step = self.first_step  # steps/s are counted from here
        self.speed_time = self.start_time

    def __enter__(self) -> "Run":
        return self

    def show_header(self, envs: VectorEnv) -> None:
        """Say what is trained on what."""
        args = self.args
        parameters = list(self.agent.parameters())
        size = sum(parameter.numel() for parameter in parameters)
        print(f"run: {self.path}, from step {self.first_step:,}, preset {args.preset}")
        env_id = args.env_id
        if ":" in env_id and isinstance(envs.spec.entry_point, str):
            env_id += f", which is {envs.spec.entry_point}"  # of Gymnasium, if the module has none
        print(f"environments: {args.num_envs} x {env_id}, {args.vectorization_mode}")
        print(f"spaces: {envs.single_observation_space.shape} -> {envs.single_action_space!s:.80}")
        print(f"agent: {size:,} parameters on {parameters[0].device}, processes: {WORLD_SIZE}")
        num_inputs = math.prod(envs.single_observation_space.shape)
        if num_inputs > 5000 and not is_image(envs.single_observation_space):
            warn(f"the network has {num_inputs:,} inputs; README says how to wrap an environment.")
        rows = args.batch_size // args.num_minibatches
        minibatches = f"{args.num_minibatches} minibatches of {rows} rows"
        print(f"update: {args.update_epochs} epochs of {minibatches}")
        show_line(f"first rollout, of {args.batch_size:,} steps ...", is_due=True)

    def log_flags(self) -> None:
        """Write the flags, as a text and for TensorBoard's table of hyperparameters."""
        flags = vars(self.args)
        rows = "".join(f"|{name}|{value}|\n" for name, value in flags.items())
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + rows, self.first_step)
        plain_flags = {
            name: x if isinstance(x, bool | int | float | str) else str(x)
            for name, x in flags.items()
        }
        metrics = {"charts/episodic_return": 0, "eval/episodic_return": 0}
        for summary in hparams(plain_flags, metrics):
            self.writer.file_writer.add_summary(summary)

    def log_evaluation(self, returns: np.ndarray) -> None:
        """Log the mean return of the evaluation after a training, and close the log."""
        if RANK == 0:
            self.writer.add_scalar("eval/episodic_return", returns.mean(), self.saved_step)
            self.writer.close()

    def lap(self, phase: str) -> None:
        """The phase ends here, which began with the end of the one before.

        On a GPU it may still be at work, and is waited for in the next one.
        """
        now = time.perf_counter()
        self.seconds[phase] = now - self.lap_time
        self.lap_time = now

    def log(
        self, iteration: int, rollout: Rollout, state: EnvState, batch: Minibatch, infos: list[dict]
    ) -> None:
        """Log the episodes, the mean losses and other scalars of an iteration, counted from 1.

        Raises NonFiniteError if a loss, a gradient, a weight or a statistic is not finite.
        """
        names = infos[0] if infos else ()  # there are none where the KL stop came at once
        losses = {name: torch.stack([info[name] for info in infos]).cpu().numpy() for name in names}
        check_finite(**losses)
        weights = self.agent.state_dict()
        check_finite(**{name: x.flatten().cpu().numpy() for name, x in weights.items()})
        explained = explained_variance(batch.value, batch.target).item()
        returns, lengths = all_gather(np.stack([rollout.episode_return, rollout.episode_length]))
        if RANK > 0:
            return
        step = iteration * self.args.batch_size
        now = time.perf_counter()
        speed = (step - self.speed_step) / (now - self.speed_time)
        scalars = {f"losses/{name}": x.mean() for name, x in losses.items()}
        scalars |= {f"charts/{name}": x for name, x in self.agent.scalars().items()}
        scalars |= {f"charts/seconds_{phase}": x for phase, x in self.seconds.items()}
        scalars["losses/explained_variance"] = explained
        scalars["losses/updates"] = len(infos)
        scalars["charts/learning_rate"] = self.optimizers[0].param_groups[0]["lr"]
        scalars["charts/SPS"] = speed
        self.returns.extend(returns.tolist())
        self.lengths.extend(lengths.tolist())
        if len(returns) > 0:
            scalars["charts/episodes"] = len(returns)
            scalars["charts/episodic_length"] = lengths.mean()
            scalars["charts/episodic_return"] = returns.mean()
            scalars["charts/episodic_return_min"] = returns.min()
            scalars["charts/episodic_return_max"] = returns.max()
        for tag, value in scalars.items():
            if math.isfinite(value):  # explained variance is not if all targets are equal
                self.writer.add_scalar(tag, value, step)
        if self.args.compile and step == self.first_step + self.args.batch_size:
            print(f"compiled: the first update took {self.seconds['update']:.1f} s", flush=True)
            self.speed_step = step
            self.speed_time = now
        if step == self.first_step + self.args.batch_size:
            warn_of_first(self.agent, rollout)
        longest = state.episode_length.max()
        if iteration == self.args.num_iterations // 10 and not self.returns and longest >= 1000:
            warn("no episode has ended in a tenth of the run; README says how to wrap a TimeLimit.")
        self.show(iteration, speed, longest)

    def show(self, iteration: int, speed: float, longest: float) -> None:
        """Show the progress: on a terminal one line that updates itself, else 32 lines a run.

        `longest` are the steps so far of the longest episode under way.
        """
        total = self.args.num_iterations
        step = iteration * self.args.batch_size
        if self.returns:
            means = f"return {short(np.mean(self.returns))}, length {short(np.mean(self.lengths))}"
        else:
            means = f"no return yet, an episode is at {longest:,.0f} steps"
        done = f"{step:,} steps ({iteration / total:.0%})"
        news = f"{speed:,.0f} steps/s, {means}"
        seconds_left = round((total - iteration) * self.args.batch_size / speed)
        self.progress = f"{done}, {news}"
        is_due = iteration * 32 // total > (iteration - 1) * 32 // total
        show_line(f"{done}, {timedelta(seconds=seconds_left)} left, {news}", is_due)

    def checkpoint_is_due(self, iteration: int) -> bool:
        """Whether this is a regular moment to write a checkpoint, and to choose the best one."""
        return iteration % self.interval == 0 or iteration == self.args.num_iterations

    def keep(self, iteration: int) -> None:
        """Copy to memory what a checkpoint holds; it is best.pt too if these returns are the best.

        Only those at regular moments are compared, as the others depend on the clock.
        """
        names = ["checkpoint.pt"]
        mean = float(np.mean(self.returns)) if len(self.returns) == 100 else -math.inf
        if mean > self.best and self.checkpoint_is_due(iteration):
            self.best = mean
            names = ["best.pt", "checkpoint.pt"]
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        self.kept = {
            "iteration": iteration,
            "global_step": iteration * self.args.batch_size,
            "returns": list(self.returns),
            "lengths": list(self.lengths),
            "best": self.best,
            "world_size": WORLD_SIZE,
            "spaces": self.spaces,
            "agent": cloned(self.agent.state_dict()),
            "optimizers": cloned(optimizers),
        }
        self.unsaved = names

    def save(self, iteration: int) -> None:
        """Keep an iteration in memory, and write it to the folder if it is time to."""
        if RANK > 0:
            return
        self.keep(iteration)
        is_late = not self.args.exact_resume and time.monotonic() > self.saved_time + 600
        if is_late or self.checkpoint_is_due(iteration):
            self.write()
        self.lap_time = time.perf_counter()

    def write(self) -> None:
        """Write what is kept in memory to files, which are never half-written."""
        self.writer.flush()  # a resumed run logs only what comes after the checkpoint
        buffer = io.BytesIO()
        torch.save({"format": 4, "args": plain(self.args), **self.kept}, buffer)
        for name in self.unsaved:
            path = os.path.join(self.folder, name)
            with open(path + ".tmp", "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)  # atomic
        self.unsaved = []
        self.saved_step = self.kept["global_step"]
        self.saved_time = time.monotonic()

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        """Save what is not saved, say where the run ended and how to go on, and close the log."""
        if RANK > 0:
            return
        may_save = not self.args.exact_resume and not isinstance(error, NonFiniteError)
        try:
            if self.unsaved and may_save:
                self.write()
        finally:
            seconds = round(time.perf_counter() - self.start_time)
            print(f"\nend: {self.progress}, after {timedelta(seconds=seconds)}")
            step = self.saved_step
            way = "evaluate" if step >= self.args.total_timesteps else "resume"
            print(f"{way} from step {step:,}: {command(way, self.path, WORLD_SIZE)}", flush=True)
            if error is None and self.args.eval_episodes > 0:
                self.writer.flush()  # the evaluation follows
            else:
                self.writer.close()


def command(way: str, path: str, processes: int) -> str:
    """The command line that evaluates or resumes a run; without a script only its folder."""
    if not hasattr(sys.modules["__main__"], "__file__"):  # as in a notebook
        return path
    is_alone = way == "evaluate" or processes == 1
    program = "python" if is_alone else f"torchrun --nproc-per-node {processes}"
    return f"{program} {shlex.quote(sys.argv[0])} --{way} {shlex.quote(path)}"


def short(x: float) -> str:
    """A number with four significant digits, or all of those before the point."""
    return f"{x:,.0f}" if 1000 <= abs(x) < 1e9 else f"{x:.4g}"


def show_line(line: str, is_due: bool) -> None:
    """Show a line on a terminal in place of the one before, elsewhere print it if it is due."""
    is_terminal = getattr(sys.stdout, "isatty", bool)
    if is_terminal():
        width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be overwritten
        print("\r\x1b[K" + line[:width], end="", flush=True)
    elif is_due:
        print(line, flush=True)


def cloned(x: object) -> object:
    """As copy.deepcopy, of nested dicts and lists with tensors, but faster."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, dict):
        return {key: cloned(value) for key, value in x.items()}
    if isinstance(x, list):
        return [cloned(value) for value in x]
    return x


def make_folder(args: Args, home: str) -> str:
    """Make the folder of a new run in runs/ of the folder `home`, and return runs/name.

    Raises InputError if it cannot be made.
    """
    milliseconds = time.time_ns() // 10**6
    name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{milliseconds}"
    safe = "".join(c if c.isalnum() or c in "_-." else "-" for c in name).strip(".-")
    path = os.path.join("runs", safe or "run")
    try:
        os.makedirs(os.path.join(home, path))
    except OSError as error:
        raise InputError(f"Cannot make folder {path}: {error.strerror}; set --run-name.") from error
    return path


# --- 10. Loading and evaluation -------------------------------------------------------------------
def load(path: str) -> dict:
    """The checkpoint in a run's folder, or a .pt file; its "args" are Args, its "path" the file's.

    Its "spaces" are those of the agent, of observations and of actions. Runs no code from the file.
    Raises InputError if it is not a valid checkpoint.
    """
    file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    try:
        with zipfile.ZipFile(file) as archive:
            if archive.testzip() is not None:  # torch itself checks no checksums
                raise ValueError("it is damaged")
        checkpoint = dict(torch.load(file, map_location="cpu", weights_only=True))
        if checkpoint["format"] != 4:
            raise ValueError(f"its format is {checkpoint['format']}, not 4")
        args = Args(**checkpoint["args"])
        args.hidden_sizes = tuple(args.hidden_sizes)  # a list in JSON
        agent_spaces = [space_of(x) for x in checkpoint["spaces"]]
    except Exception as error:
        raise unusable(file, error) from error
    return {**checkpoint, "args": args, "spaces": agent_spaces, "path": file}


def unusable(file: str, error: Exception) -> InputError:
    """What to say of a checkpoint that cannot be used."""
    reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")  # its first sentence
    return InputError(f"Cannot use {file}: {type(error).__name__}: {reason}.")


def restore(checkpoint: dict | None, agent: nn.Module, optimizers: list[Optimizer]) -> int:
    """Give agent and optimizers what a checkpoint holds, if any, and return its iteration.

    Raises InputError if it does not fit them.
    """
    if checkpoint is None:
        return 0
    try:
        agent.load_state_dict(checkpoint["agent"])
        states = checkpoint["optimizers"] if optimizers else []
        for optimizer, state in zip(optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        return checkpoint["iteration"]
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise unusable(checkpoint["path"], error) from error


def make_agent(checkpoint: dict, agent_class: type[Agent]) -> Agent:
    """The agent of a checkpoint, on the CPU; no environment is made."""
    agent = agent_class(*checkpoint["spaces"], checkpoint["args"])
    restore(checkpoint, agent, optimizers=[])
    return agent


SPACE_ARGUMENTS = {  # what their constructors take
    "Box": ("low", "high"),
    "Discrete": ("n", "start"),
    "MultiDiscrete": ("nvec", "start"),
    "MultiBinary": ("n",),
}


def plain_space(space: spaces.Space) -> dict:
    """A space that an agent has, as what a checkpoint may hold: strings and tensors."""
    (kind,) = [x for x in SPACE_ARGUMENTS if isinstance(space, getattr(spaces, x))]
    arguments = {name: torch.as_tensor(getattr(space, name)) for name in SPACE_ARGUMENTS[kind]}
    return {"kind": kind, "dtype": str(space.dtype), **arguments}


def space_of(plain: dict) -> spaces.Space:
    """The space that `plain_space` has made plain."""
    kind = plain["kind"]
    arguments = {}
    for name in SPACE_ARGUMENTS[kind]:
        x = plain[name]
        arguments[name] = x.numpy() if x.dim() > 0 or kind == "Box" else x.item()
    if kind != "MultiBinary":  # which has int8 always
        arguments["dtype"] = np.dtype(plain["dtype"])
    return getattr(spaces, kind)(**arguments)


def load_agent(path: str, agent_class: type[Agent] = Agent) -> Agent:
    """The trained agent of a run's folder or of a .pt file, on the CPU. Raises InputError."""
    return make_agent(load(path), agent_class)


def as_batch(obs: object, space: spaces.Space) -> Tensor:
    """One observation of an environment, of its space, as the batch (1, *obs) of an agent."""
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    if not (is_vector or is_image(space)):
        obs = spaces.flatten(space, obs)
    dtype = np.uint8 if is_image(space) else np.float32
    return torch.from_numpy(np.asarray(obs, dtype)[None])


def evaluate(
    path: str, args: Args, agent_class: type[Agent] = Agent, checkpoint: dict | None = None
) -> np.ndarray:
    """Play episodes with the agent saved at path, a run's folder or a .pt file; see `play`.

    `checkpoint` is what is there, if it is loaded already. Raises InputError.
    """
    if checkpoint is None:
        checkpoint = load(path)
        asked = {name: getattr(args, name) for name in EVALUATION}
        args = replace(merged(args, checkpoint["args"]), **asked)
    path = os.fspath(path)
    args = replace(args, evaluate=path, eval_episodes=args.eval_episodes or 10, compile=False)
    check(args, checkpoint)
    folder = os.path.abspath(path)
    folder = folder if os.path.isdir(folder) else os.path.dirname(folder)
    step = checkpoint["global_step"]
    agent = make_agent(checkpoint, agent_class)
    agent.to(set_up(args, agent.observation_space))
    returns = play(agent, args, folder, step)
    if not os.access(folder, os.W_OK):
        warn(f"this evaluation is not in TensorBoard, as {folder} cannot be written.")
    elif RANK == 0:
        with closing(SummaryWriter(folder)) as writer:
            writer.add_scalar("eval/episodic_return", returns.mean(), step)
    return returns


@undisturbed()
def play(agent: Agent, args: Args, folder: str, step: int) -> np.ndarray:
    """Play args.eval_episodes episodes, each with a seed of its own, and return their raw returns.

    Prints their statistics, and films to the folder. An episode is cut after its share of the steps
    that were trained, or after 1,000 (10,000 if the time limit is such) if that is more. The first
    process plays alone.
    """
    if RANK > 0:
        return np.zeros(0)
    env_seed, run_seed = reseed(args)
    device = next(agent.parameters()).device
    generator = Generator(device).manual_seed(run_seed)
    agent_spaces = agent.observation_space, agent.action_space
    envs = make_envs(replace(args, num_envs=1), "rgb_array" if args.capture_video else None)
    if (envs.single_observation_space, envs.single_action_space) != agent_spaces:
        close(envs)
        raise InputError(f"The spaces of {args.env_id} are not those that the agent has.")
    if args.capture_video:
        envs = RecordVideo(
            envs,
            os.path.join(folder, "videos"),
            episode_trigger=lambda episode: True,
            video_length=2000,
            name_prefix=f"step-{step}",
        )
    returns = np.zeros(args.eval_episodes)
    time_limit = getattr(envs.spec, "max_episode_steps", None) or 0
    limit = max(step // args.eval_episodes, min(time_limit, 10_000), 1000)
    num_cut = 0
    shown_time = time.monotonic()
    with closing_envs(envs):
        for episode in range(args.eval_episodes):
            obs, info = envs.reset(seed=env_seed + episode)
            for t in range(limit):  # an agent may balance for ever
                with torch.inference_mode():
                    obs_tensor = torch.from_numpy(np.asarray(obs, agent.obs_dtype)).to(device)
                    action = agent.act(obs_tensor, not args.eval_stochastic, generator)
                action = agent.to_env(action.cpu().numpy())
                obs, reward, terminated, truncated, info = envs.step(action)
                returns[episode] += np.sum(reward)  # of one environment
                if np.any([terminated, truncated]) and not info.get("life_lost", False):
                    break
                if time.monotonic() > shown_time + 1:
                    shown_time = time.monotonic()
                    show_line(f"eval: episode {episode + 1}, step {t + 1:,}", is_due=False)
            else:
                num_cut += 1
    statistics = f"mean {short(returns.mean())} std {short(returns.std())}"
    extremes = f"min {short(returns.min())} max {short(returns.max())}"
    way = "stochastic" if args.eval_stochastic else "greedy"
    cut = f", {num_cut} of them cut after {limit:,} steps" if num_cut > 0 else ""
    show_line("", is_due=False)
    print(f"eval: {statistics} {extremes} ({len(returns)} episodes, {way}{cut})", flush=True)
    return returns


# --- 11. Main -------------------------------------------------------------------------------------
SIGNALS = [  # that end a run; Windows has no SIGHUP
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
EXIT_CODES: list[int] = []  # that of the signal that ends the run, if one has come


def ignore(_signum: int, _frame: object) -> None:
    """Do nothing. (With SIG_IGN Python would complain of a second signal that has come already.)"""


def leave(signum: int, _frame: object) -> None:
    """End the process by raising SystemExit, so that context managers clean up, undisturbed."""
    for number in SIGNALS:
        if signal.getsignal(number) == leave:
            signal.signal(number, ignore)
    EXIT_CODES.append(128 + signum)
    sys.exit(128 + signum)


def main(agent_class: type[Agent] = Agent) -> None:
    """Do what the command line says. Exit code 2: bad input; 1: a failure; 128 + n: signal n."""
    EXIT_CODES.clear()
    for number in SIGNALS:
        is_ignored = signal.getsignal(number) == signal.SIG_IGN  # as nohup does with SIGHUP
        if not is_ignored or number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, leave)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the name of a run may be in any script
    sys.path.append(os.getcwd())  # for module:Env-v0
    try:
        args, checkpoint = parse(sys.argv[1:])
        if args.evaluate is not None and args.resume is None:
            evaluate(args.evaluate, args, agent_class, checkpoint)
        else:
            train(args, agent_class, checkpoint)
    except (InputError, gym.error.DependencyNotInstalled) as error:
        print(f"ppo.py: {error}", file=sys.stderr)
        sys.exit(2)
    except (NonFiniteError, ProcessError) as error:
        print(f"ppo.py: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:  # nobody reads what is printed, as after `| head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(128 + signal.SIGPIPE)
        raise


if __name__ == "__main__":
    main()
