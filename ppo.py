# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization (PPO) for Gymnasium environments, in one file.

    python ppo.py --env-id CartPole-v1       # half a million steps, about a minute
    python ppo.py --env-id HalfCheetah-v5    # continuous actions have defaults of their own
    python ppo.py --env-id ALE/Breakout-v5   # so have images: ten million steps, a GPU helps
    python ppo.py --resume runs/name         # go on with a run, also with other flags
    python ppo.py --evaluate runs/name       # play with what it has learnt
    torchrun --nproc-per-node 2 ppo.py --env-id CartPole-v1   # one training, two processes

Sizes: T steps of a rollout (num_steps), N environments of this process, B any batch, M a minibatch,
D dimensions of a Box action, C choices of a MultiDiscrete one. *obs is the shape of an observation.

An episode is done when it is terminated (it has no future) or truncated (a time limit cuts it).
Environments reset as in Gymnasium's NEXT_STEP mode: the step after the last one of an episode
ignores its action and returns the next episode's first observation, with reward 0. Such a row is
not valid: it is never trained on. So V(obs[t + 1]) is the bootstrap where row t was truncated.

    t   obs[t]             action     obs[t + 1]         done    valid
    5   s_5                a_5        s_6, the last      True    True
    6   s_6, the last      ignored    s_0 of the next    False   False
    7   s_0 of the next    a_0        s_1                False   True

[PPO]      Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
[GAE]      Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438
[KL]       Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
[Details]  Huang et al. 2022, The 37 Implementation Details of PPO, ICLR Blog Track
"""

import atexit
import functools
import itertools
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics, RecordVideo
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

# --- 1. Arguments ---------------------------------------------------------------------------------
JsonObject = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass
class Args:
    """The flags; the comment beside or above a field is its help. PRESETS change the defaults."""

    # Run
    exp_name: str = "ppo"  # name of the experiment, a part of the names of runs
    run_name: str | None = None  # new folder in runs/ (None: env_id__exp_name__seed__time)
    seed: int = 1  # seed of networks, actions, minibatches and environments
    torch_deterministic: bool = True  # on CUDA, use only cuDNN's deterministic kernels
    device: str = "auto"  # cpu, cuda, cuda:1, mps; auto: cuda for images if there is one, else cpu
    resume: str | None = None  # folder of a run to go on with; flags that are given replace its own
    checkpoint_interval: int | None = None  # iterations between checkpoints (None: run / 100)
    evaluate: str | None = None  # folder of a run, or its .pt file, to evaluate without training
    eval_episodes: int = 10  # episodes of an evaluation, at most 10,000 steps each (0: none)
    eval_stochastic: bool = False  # sample the actions of an evaluation (off: take the likeliest)
    capture_video: bool = False  # film the evaluation, at most 2,000 frames of each episode
    # Environment
    env_id: str = "CartPole-v1"  # Gymnasium id; module:Env-v0 imports the module first
    env_kwargs: JsonObject = field(default_factory=dict)  # arguments for env_id, as '{"size": 5}'
    num_envs: int = 16  # environments that are stepped side by side, divided among processes
    # sync: in this process; async: a process each; vector_entry_point: its own vector version
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] = "sync"
    stagger_episodes: bool = True  # cut first episodes short, at random points (arXiv:2511.21011)
    # Rollout
    total_timesteps: int = 500_000  # steps of all environments together, resetting ones included
    num_steps: int = 128  # T, steps of each environment in a rollout
    gamma: float = 0.995  # discount factor (0: immediate rewards only)
    anneal_gamma: bool = False  # halve 1 - gamma, linearly over half of the run (arXiv:1512.02011)
    gae_lambda: float = 0.98  # lambda of GAE (0: one-step TD errors; 1: Monte Carlo returns)
    # Update
    learning_rate: float = 5e-4  # step size of the optimizer
    anneal_lr: bool = True  # let the learning rate fall linearly over the run (off: constant)
    num_minibatches: int = 16  # minibatches of an epoch; each is a step of the optimizer
    update_epochs: int = 10  # K, passes over each rollout
    norm_adv: bool = True  # scale advantages of a minibatch to mean 0, deviation 1 (off: raw)
    max_grad_norm: float = 0.5  # clip the gradient to this global 2-norm [Details] #11 (inf: off)
    target_kl: float | None = None  # stop an update once approximate KL exceeds this (None: off)
    recompute_advantages: bool = False  # recompute values and advantages every epoch (off: once)
    compile: bool = False  # compile loss and gradient: slower to start, then faster
    # Loss
    clip_coef: float = 0.2  # epsilon; the ratio is clipped to [1 - epsilon, 1 + epsilon]
    clip_vloss: bool = True  # clip V to within epsilon of its old value in the loss, too
    ent_coef: float = 0.01  # c2, weight of the entropy bonus (0: off)
    anneal_ent_coef: bool = False  # let ent_coef fall linearly to 0 over the run (off: constant)
    vf_coef: float = 0.5  # c1, weight of the value loss (0: off)
    # Network and scaling
    hidden_sizes: tuple[int, ...] = (64, 64)  # units of hidden layers (not for images), as 256 256
    activation: Literal["tanh", "relu"] = "tanh"  # nonlinearity of hidden layers
    log_std_init: float = 0.0  # log sigma that a Gaussian policy starts with (Box actions)
    norm_obs: bool = True  # scale vectors by running mean and deviation, clip at 10 (off: raw)
    norm_reward: bool = True  # divide rewards by the spread of returns, clip at 10 (off: raw)
    clip_reward: bool = False  # learn from the sign of rewards alone, before they are divided


# What replaces the defaults of Args. tests/benchmarks/README.md says how numbers were found.
PRESETS = {
    "discrete": {},
    "continuous": {
        "total_timesteps": 1_000_000,
        "num_envs": 64,
        "num_steps": 32,
        "gamma": 0.99,
        "anneal_gamma": True,
        "gae_lambda": 0.9,
        "learning_rate": 3e-4,
        "num_minibatches": 32,
        "norm_adv": False,
        "target_kl": 0.05,
        "recompute_advantages": True,
        "ent_coef": 0.001,
        "anneal_ent_coef": True,
        "vf_coef": 0.25,
        "log_std_init": -1.0,
    },
    "image": {  # OpenAI baselines' for Atari
        "total_timesteps": 10_000_000,
        "num_envs": 8,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "learning_rate": 2.5e-4,
        "num_minibatches": 4,
        "update_epochs": 4,
        "clip_coef": 0.1,
        "log_std_init": -1.0,  # for Box actions, as in the preset for them
        "norm_obs": False,
    },
}


# --- 2. Networks ----------------------------------------------------------------------------------
def moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Number (), mean (...) and variance (...) of the rows x (B, ...) of all processes."""
    count = all_sum(x.new_tensor(len(x)))  # over the processes of torchrun
    mean = all_sum(x.sum(0)) / count
    variance = all_sum((x - mean).square().sum(0)) / count
    return count, mean, variance


class RunningStats(nn.Module):
    """Mean and standard deviation, by component, of all rows seen; 0 and 1 before the first."""

    def __init__(self, shape: tuple[int, ...], min_std: float = 1e-4):
        super().__init__()
        self.min_std = min_std  # the least that std becomes
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))  # the variance might overflow float32
        self.register_buffer("count", torch.tensor(0))

    def update(self, x: Tensor) -> None:
        """Merge the rows x (B, *shape) with those before (Chan, Golub, LeVeque 1983)."""
        count, x_mean, x_var = moments(x.cpu().double())  # on the CPU, as mps has no float64
        weight = count / (count + self.count.cpu())  # of the new rows among all
        delta = x_mean - self.mean.cpu()
        variance = self.std.cpu().double().square()
        within = (1 - weight) * variance + weight * x_var
        between = weight * (1 - weight) * delta.square()
        self.mean += (weight * delta).to(self.mean)
        std = (within + between).sqrt()
        self.std.copy_(std.clamp(min=self.min_std))
        self.count += int(count)

    def normalize(self, x: Tensor) -> Tensor:
        """Scale and clip rows x (B, *shape) [Details] #28-29."""
        return ((x - self.mean) / self.std).clamp(-10, 10)


class RewardScaler(nn.Module):
    """Divides rewards by the running deviation of the discounted return [Details] #30-31."""

    def __init__(self, gamma: float):
        super().__init__()
        self.gamma = gamma
        self.return_stats = RunningStats(())
        self.discounted_return = 0.0  # later (N,), of the last row; a resumed run begins at 0

    def update(self, reward: Tensor, valid: Tensor) -> None:
        """Count a rollout's rewards (T, N). A row that is not valid begins a new return, of 0."""
        valid = valid.cpu()
        discount = (self.gamma * valid).numpy()  # (T, N), faster in numpy here
        returns = np.empty_like(discount)
        last = self.discounted_return  # (N,)
        for t, x in enumerate((reward.cpu() * valid).numpy()):
            last = discount[t] * last + x
            returns[t] = last
        self.discounted_return = last
        self.return_stats.update(torch.from_numpy(returns)[valid])

    @property
    def scale(self) -> Tensor:
        """Deviation, but at least a fifth of the root mean square (ours, for constant rewards)."""
        stats = self.return_stats
        root_mean_square = torch.hypot(stats.std, stats.mean)
        return torch.maximum(stats.std, root_mean_square / 5)

    def normalize(self, reward: Tensor) -> Tensor:
        return (reward / self.scale).clamp(-10, 10)


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
        self.channels_first = len(shape) == 3 and shape[0] < shape[2]  # they are the smallest side
        num_channels = min(shape) if len(shape) == 3 else 1
        gain = math.sqrt(2)
        self.layers = nn.Sequential(
            orthogonal(nn.Conv2d(num_channels, 32, 8, stride=4), gain),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2), gain),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1), gain),
            nn.ReLU(),
            nn.Flatten(),
        )
        num_features = self(torch.zeros(1, *shape)).shape[1]  # of the layers so far
        self.layers.append(orthogonal(nn.Linear(num_features, 512), gain))
        self.layers.append(nn.ReLU())
        self.to(memory_format=torch.channels_last)  # faster than torch's default order

    def forward(self, image: Tensor) -> Tensor:
        if image.dim() == 3:
            image = image.unsqueeze(1)
        elif not self.channels_first:
            image = image.movedim(-1, 1)
        image = image.contiguous(memory_format=torch.channels_last)  # (B, channels, H, W)
        return self.layers(image / 255)  # [Details] #22


class Categorical(NamedTuple):
    """One choice, or C independent ones [Details] #37, in B states. Actions are (B,) or (B, C)."""

    logp: Tensor  # (B, options) or (B, C, options), log-probabilities

    def mode(self) -> Tensor:
        return self.logp.argmax(-1)

    def sample(self, noise: Tensor) -> Tensor:  # noise has the shape of logp
        return (self.logp + noise).argmax(-1)  # the Gumbel-max trick: a sample

    def log_prob(self, action: Tensor) -> Tensor:  # (B,), in nats
        chosen = self.logp.gather(-1, action.unsqueeze(-1))  # (B, 1) or (B, C, 1)
        return chosen.flatten(1).sum(1)

    def entropy(self) -> Tensor:  # (B,)
        return -(self.logp.exp() * self.logp).flatten(1).sum(1)


class CategoricalHead(nn.Module):
    """Distribution, noise and actions of Discrete, MultiDiscrete and MultiBinary spaces."""

    def __init__(self, space: spaces.Space, args: Args):
        super().__init__()
        self.space = space
        if isinstance(space, spaces.Discrete):
            num_options = np.array(space.n)  # (), one choice
        elif isinstance(space, spaces.MultiDiscrete):
            num_options = space.nvec.ravel()  # (C,)
        else:
            num_options = np.full(math.prod(space.shape), 2)  # (C,)
        # (options,) or (C, options): every choice has as many outputs as the one with most options.
        option = np.arange(num_options.max())
        absent = torch.from_numpy(option >= num_options[..., None])
        self.output_shape = absent.shape
        self.num_outputs = absent.numel()
        self.register_buffer("absent", absent if absent.any() else None, persistent=False)

    def distribution(self, output: Tensor) -> Categorical:
        logits = output.view(-1, *self.output_shape)
        if self.absent is not None:
            logits = logits.masked_fill(self.absent, -1e9)  # -inf would make the entropy nan
        return Categorical(logits.log_softmax(-1))

    def noise(self, *shape: int) -> Tensor:
        return -torch.empty(*shape, *self.output_shape).exponential_().log()  # Gumbel, as logp

    def to_env(self, action: np.ndarray) -> np.ndarray:
        index = action.reshape(-1, *self.space.shape)  # (N, ...), from 0
        start = getattr(self.space, "start", 0)
        return (index + start).astype(self.space.dtype)


class Gaussian(NamedTuple):
    """D independent normal distributions [Details] #23, #25 in B states. Actions are (B, D)."""

    mean: Tensor  # (B, D)
    log_std: Tensor  # (D,), the same in all states [Details] #24

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, noise: Tensor) -> Tensor:  # noise has the shape of mean
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, action: Tensor) -> Tensor:
        z = (action - self.mean) / self.log_std.exp()  # (B, D)
        logprob = -0.5 * z.square() - self.log_std - 0.5 * math.log(2 * math.pi)  # (B, D)
        return logprob.sum(-1)

    def entropy(self) -> Tensor:
        entropy = self.log_std + 0.5 * math.log(2 * math.pi * math.e)  # (D,)
        return entropy.sum().expand(len(self.mean))


class GaussianHead(nn.Module):
    """Distribution, noise and actions of Box spaces.

    Actions -1 and 1 are mapped to the bounds of a dimension whose bounds are within a million, and
    others are only shifted, so that 0 is allowed. Then all are clipped.
    """

    def __init__(self, space: spaces.Box, args: Args):
        super().__init__()
        self.space = space
        self.num_outputs = math.prod(space.shape)
        log_std = torch.full((self.num_outputs,), float(args.log_std_init))
        self.log_std = nn.Parameter(log_std)
        low = space.low.astype(np.float64)
        high = space.high.astype(np.float64)
        bounded = (low >= -1e6) & (high <= 1e6)
        self.scale = np.where(bounded, (high - low) / 2, 1)  # float64, of the space's shape
        self.shift = np.where(bounded, low + self.scale, np.clip(0, low, high))

    def distribution(self, output: Tensor) -> Gaussian:
        return Gaussian(output, self.log_std.clamp(-20, 2))  # lest exp overflow

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, self.num_outputs)  # as mean, on the CPU

    def to_env(self, action: np.ndarray) -> np.ndarray:
        space = self.space
        mapped = action.reshape(-1, *space.shape) * self.scale + self.shift
        return mapped.clip(space.low, space.high).astype(space.dtype)  # [Details] #27


class Agent(nn.Module):
    """Policy pi(a|s) and value function V(s), with the scaling of observations and rewards.

    `dist, value = agent(obs)` maps raw observations (B, *obs) to a distribution over actions and to
    values (B,), in units of scaled rewards.
    """

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Space, args: Args):
        super().__init__()
        head_class = GaussianHead if isinstance(action_space, spaces.Box) else CategoricalHead
        self.head = head_class(action_space, args)
        has_images = is_image(observation_space)  # uint8, at least 36 x 36
        shape = observation_space.shape
        self.obs_dtype = np.uint8 if has_images else np.float32
        # Integers are mostly one-hot: a rare one, with its small deviation, would get too large.
        min_std = 0.2 if np.issubdtype(observation_space.dtype, np.integer) else 1e-4
        self.obs_stats = RunningStats(shape, min_std) if args.norm_obs and not has_images else None
        self.cnn = NatureCNN(shape) if has_images else None  # of both networks [Details] #21
        sizes = [512] if has_images else [*shape, *args.hidden_sizes]
        activation = {"tanh": nn.Tanh, "relu": nn.ReLU}[args.activation]
        self.actor = mlp([*sizes, self.head.num_outputs], activation, gain=0.01)
        self.critic = mlp([*sizes, 1], activation, gain=1.0)  # separate networks [Details] #13, #26
        self.reward_scaler = RewardScaler(args.gamma) if args.norm_reward else None

    def features(self, obs: Tensor) -> Tensor:
        """What both networks see of raw obs (B, *obs): (B, F)."""
        if self.cnn is not None:
            return self.cnn(obs)
        return obs if self.obs_stats is None else self.obs_stats.normalize(obs)

    def policy(self, features: Tensor) -> Categorical | Gaussian:
        """The distribution pi(.|s), for both acting and learning."""
        return self.head.distribution(self.actor(features))

    def forward(self, obs: Tensor) -> tuple[Categorical | Gaussian, Tensor]:
        features = self.features(obs)
        value = self.critic(features).squeeze(-1)  # (B,)
        return self.policy(features), value

    def act(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Actions for raw obs (B, *obs): sampled by `head.noise(B)`, or the likeliest."""
        dist = self.policy(self.features(obs))
        action = dist.mode() if noise is None else dist.sample(noise)
        return action.detach()


# --- 3. Algorithm ---------------------------------------------------------------------------------
class Rollout(NamedTuple):
    """T steps of N environments. Row t leads from obs[t] to obs[t + 1]."""

    obs: Tensor  # (T + 1, N, *obs), raw, float32, or uint8 if they are images
    action: Tensor  # (T, N), (T, N, C) int64 or (T, N, D) float32, as sampled
    reward: Tensor  # (T, N) float32, raw, or their signs if args.clip_reward
    terminated: Tensor  # (T, N) bool, the episode ended in a state that has no future
    done: Tensor  # (T, N) bool, the episode ended, terminated or truncated
    valid: Tensor  # (T, N) bool, the action was carried out: the row before ended no episode


class Batch(NamedTuple):
    """M valid rows to train on: all those of a rollout, or a minibatch of them."""

    obs: Tensor  # (M, *obs) float32 or uint8, raw
    action: Tensor  # (M,), (M, C) int64 or (M, D) float32
    logprob: Tensor  # (M,) float32, log pi_old(a|s)
    value: Tensor  # (M,) float32, V(s) when advantages were computed, which clip_vloss clips around
    advantage: Tensor  # (M,) float32
    target: Tensor  # (M,) float32, what V(s) is regressed to


def gae(
    reward: Tensor, value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, for both kinds of episode ends.

    After a termination the next value is 0; after a truncation it is that of the final observation.
    No advantage flows back across an end, so that rows that are not valid, which are meaningless,
    reach no others. Takes (T, N), but value (T + 1, N). Returns advantages and targets, (T, N).
    """
    delta = reward + gamma * (value[1:] * ~terminated) - value[:-1]  # (T, N), [PPO] eq. 12
    decay = gamma * gae_lambda * (~done).to(delta.dtype)  # (T, N)
    deltas = delta.unbind()  # T rows (N,), faster to index than a tensor
    decays = decay.unbind()
    advantages = list(deltas)  # of the last row it is delta alone
    for t in reversed(range(len(deltas) - 1)):  # [PPO] eq. 11 and [GAE] eq. 16, as a recursion
        advantages[t] = deltas[t] + decays[t] * advantages[t + 1]
    advantage = torch.stack(advantages)
    return advantage, advantage + value[:-1]


def clipped_surrogate(ratio: Tensor, advantage: Tensor, epsilon: Tensor) -> Tensor:
    """The surrogate objective (M,): no incentive to move ratios beyond 1 +- epsilon [PPO] eq. 7."""
    clipped = ratio.clamp(1 - epsilon, 1 + epsilon)  # (M,)
    return torch.min(ratio * advantage, clipped * advantage)


def clipped_error(value: Tensor, old_value: Tensor, target: Tensor, epsilon: Tensor) -> Tensor:
    """The larger squared error (M,), of V or of V clipped around V_old [Details] #9."""
    clipped = value.clamp(old_value - epsilon, old_value + epsilon)  # (M,)
    error = (value - target).square()
    return torch.max(error, (clipped - target).square())


def ppo_loss(agent: Agent, batch: Batch, args: Args) -> tuple[Tensor, dict]:
    """The scalar loss, which is the objective [PPO] eq. 9 negated, and detached scalars to log."""
    dist, value = agent(batch.obs)
    logratio = dist.log_prob(batch.action) - batch.logprob  # (M,)
    ratio = logratio.exp()  # (M,), pi(a|s) / pi_old(a|s); 1 at the first step, up to rounding
    epsilon = args.clip_coef * ratio.new_ones(())  # (), as --compile keeps a float's first value

    surrogate = clipped_surrogate(ratio, batch.advantage, epsilon)  # (M,)
    policy_loss = -surrogate.mean()
    if args.clip_vloss:
        error = clipped_error(value, batch.value, batch.target, epsilon)
    else:
        error = (value - batch.target).square()
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
def estimate_advantages(agent: Agent, rollout: Rollout, args: Args) -> Batch:
    """The valid rows of a rollout with their advantages, and log pi(a|s) and V(s) by this agent."""
    T, N = rollout.reward.shape
    dist, value = agent(rollout.obs[:-1].flatten(0, 1))  # of T * N rows
    logprob = dist.log_prob(rollout.action.flatten(0, 1)).view(T, N)
    _, last_value = agent(rollout.obs[-1])  # (N,)
    value = torch.cat([value, last_value]).view(T + 1, N)  # time first
    reward = rollout.reward
    if agent.reward_scaler is not None:
        reward = agent.reward_scaler.normalize(reward)
    advantage, target = gae(
        reward, value, rollout.terminated, rollout.done, args.gamma, args.gae_lambda
    )
    valid = rollout.valid
    return Batch(
        obs=rollout.obs[:-1][valid],
        action=rollout.action[valid],
        logprob=logprob[valid],
        value=value[:-1][valid],
        advantage=advantage[valid],
        target=target[valid],
    )


def normalize(advantage: Tensor) -> Tensor:
    """Advantages (M,) with mean 0 and sample deviation 1 [Details] #7."""
    count, mean, variance = moments(advantage)
    std = (variance * count / (count - 1)).sqrt()
    return (advantage - mean) / (std + 1e-8)


def minibatches(batch: Batch, args: Args) -> Iterator[Batch]:
    """Shuffle the rows of a batch and deal them into nearly equal parts [Details] #6."""
    rows = torch.randperm(len(batch.obs), device=batch.obs.device)
    shuffled = [x[rows].tensor_split(args.num_minibatches) for x in batch]
    for parts in zip(*shuffled, strict=True):
        minibatch = Batch(*parts)
        if args.norm_adv:
            minibatch = minibatch._replace(advantage=normalize(minibatch.advantage))
        yield minibatch


# --- 4. Training ----------------------------------------------------------------------------------
def collect(
    agent: Agent, envs: VectorEnv, obs: np.ndarray, done: np.ndarray, args: Args
) -> tuple[Rollout, np.ndarray, np.ndarray]:
    """Act for T steps in N environments, from where the last rollout ended [Details] #1.

    Takes obs (N, *obs) to act on and done (N,) of the rows before, and returns the next ones. The
    loop only acts: values and log-probabilities are computed afterwards, all at once.
    """
    T = args.num_steps
    N = envs.num_envs
    device = next(agent.parameters()).device
    all_obs = np.empty((T + 1, *obs.shape), agent.obs_dtype)
    reward = np.empty((T, N), np.float32)
    terminated = np.empty((T, N), bool)
    truncated = np.empty((T, N), bool)
    noise = agent.head.noise(T, N).to(device).unbind()  # of all T steps at once: faster
    actions = []  # T of (N,), (N, C) or (N, D)
    all_obs[0] = obs
    for t in range(T):
        with torch.inference_mode():  # as no_grad, but faster
            action = agent.act(torch.from_numpy(all_obs[t]).to(device), noise[t])
        actions.append(action)
        env_action = agent.head.to_env(action.cpu().numpy())  # (N, ...), as the space has it
        all_obs[t + 1], reward[t], terminated[t], truncated[t], _ = envs.step(env_action)
    all_done = np.concatenate([done[None], terminated | truncated])  # (T + 1, N)
    if args.clip_reward:
        reward = np.sign(reward)  # [Details] #19
    rollout = Rollout(
        obs=torch.from_numpy(all_obs).to(device),
        action=torch.stack(actions),
        reward=torch.from_numpy(reward).to(device),
        terminated=torch.from_numpy(terminated).to(device),
        done=torch.from_numpy(all_done[1:]).to(device),
        valid=torch.from_numpy(~all_done[:-1]).to(device),
    )
    return rollout, all_obs[-1], all_done[-1]


def backward(agent: Agent, batch: Batch, args: Args) -> dict:
    """Compute the gradient of the loss, and return the scalars to log. --compile compiles this."""
    loss, info = ppo_loss(agent, batch, args)
    loss.backward()
    return info


def update(agent: Agent, optimizer: Optimizer, rollout: Rollout, batch: Batch, args: Args) -> list:
    """K epochs of minibatch steps over the batch of a rollout; returns the scalars of each."""
    parameters = list(agent.parameters())
    differentiate = compiled(backward, dynamic=True) if args.compile else backward
    infos = []
    for epoch in range(args.update_epochs):
        if epoch > 0 and args.recompute_advantages:
            recomputed = estimate_advantages(agent, rollout, args)
            batch = recomputed._replace(logprob=batch.logprob)  # new, but for pi_old
        for minibatch in minibatches(batch, args):
            optimizer.zero_grad()
            info = differentiate(agent, minibatch, args)
            average_gradients(parameters, info, len(minibatch.obs))  # of several processes
            if args.target_kl is not None and info["approx_kl"] > args.target_kl:
                return infos  # without this step
            info["grad_norm"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
            optimizer.step()
            infos.append(info)
    return infos


def train(args: Args, agent_class: type[Agent] = Agent, callback: Callable | None = None) -> Agent:
    """Train an agent as [PPO] alg. 1, and return it, with its run's `folder` and `eval_returns`.

    `callback(run)` is called after each iteration. True, from all processes, ends the training.
    """
    with open_envs(args) as envs:
        device = set_up(args, is_image(envs.single_observation_space))
        agent = agent_class(envs.single_observation_space, envs.single_action_space, args)
        agent.to(device)
        # eps: [Details] #3; fused: one kernel for all parameters, which is faster
        optimizer = torch.optim.Adam(agent.parameters(), args.learning_rate, eps=1e-5, fused=True)
        run = Run(args, envs, agent, optimizer)  # loads the checkpoint of args.resume
        obs, done = reset(envs, args, run.step)
        while run.step < args.total_timesteps and not run.stopped():
            remaining = 1 - run.step / args.total_timesteps  # from 1 towards 0
            for group in optimizer.param_groups:  # [Details] #4
                group["lr"] = args.learning_rate * (remaining if args.anneal_lr else 1)
            gamma = 1 - (1 - args.gamma) * (max(remaining, 0.5) if args.anneal_gamma else 1)
            ent_coef = args.ent_coef * (remaining if args.anneal_ent_coef else 1)
            annealed = replace(args, gamma=gamma, ent_coef=ent_coef)

            rollout, obs, done = collect(agent, envs, obs, done, args)
            if agent.reward_scaler is not None:  # this rollout's rewards are scaled by it, too
                agent.reward_scaler.update(rollout.reward, rollout.valid)
            batch = estimate_advantages(agent, rollout, annealed)
            infos = update(agent, optimizer, rollout, batch, annealed)
            if agent.obs_stats is not None:  # last, as it changes pi; the first rollout is unscaled
                agent.obs_stats.update(rollout.obs[:-1][rollout.valid])

            run.log(rollout, batch, infos)  # counts run.step on, too
            run.save()
            if callback is not None and callback(run):
                break
        run.close()
    agent.folder = run.folder
    agent.eval_returns = evaluate(agent, args, run.folder, run.step)
    return agent


# === Part II: plumbing; nothing below is PPO ======================================================
# --- 5. Command line ------------------------------------------------------------------------------
class InputError(ValueError):
    """The request is invalid; the message says why."""


@dataclass
class CommandLine(Args):
    """Train an agent with PPO. The defaults are those of the --env-id or run that is given."""

    # a set of defaults, over which any flag given wins; auto chooses by the environment's spaces
    preset: Literal["auto", "discrete", "continuous", "image"] = "auto"


ATARI = {  # what games have beside the preset for images
    "vectorization_mode": "vector_entry_point",
    "clip_reward": True,  # [Details] #19
    "norm_reward": False,
}
RANGES = {  # the least and the most; None is not checked
    "seed eval_episodes learning_rate max_grad_norm": (0, math.inf),
    "target_kl clip_coef ent_coef vf_coef": (0, math.inf),
    "num_envs total_timesteps num_steps num_minibatches hidden_sizes": (1, math.inf),
    "update_epochs checkpoint_interval": (1, math.inf),
    "gamma gae_lambda": (0, 1),
    "log_std_init": (-20, 2),
}


def check(args: Args) -> None:
    """Raise InputError for arguments that are out of range."""
    for names, (low, high) in RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            values = [] if value is None else np.ravel(value)
            if not all(low <= x <= high for x in values):
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise InputError(f"--{name.replace('_', '-')} must be {limits}, not {value}.")
    if args.num_envs % WORLD_SIZE != 0:
        raise InputError(f"--num-envs must be a multiple of the {WORLD_SIZE} processes.")
    if is_atari(args.env_id) and args.vectorization_mode != "vector_entry_point":
        raise InputError("--vectorization-mode must be vector_entry_point for ALE/ games.")
    rows = args.num_envs // WORLD_SIZE * (args.num_steps // 2)
    if rows < 2 * args.num_minibatches:  # the deviation of a single row is no number
        raise InputError(f"--num-minibatches need two rows each; only {rows} are sure to be valid.")


def choose_preset(args: Args) -> str:
    """The name of the preset for an environment. One is made, to see its spaces."""
    with closing(make_envs(args, 1)) as envs:
        if is_image(envs.single_observation_space):
            return "image"
        is_box = isinstance(envs.single_action_space, spaces.Box)
        return "continuous" if is_box else "discrete"


def parse_args(argv: list[str] | None = None) -> Args:
    """What a command line asks for, such as ["--env-id", "Pendulum-v1"], its preset included."""
    # The first pass finds what decides on the defaults, the second parses and helps with them.
    first, _ = tyro.cli(CommandLine, args=argv, return_unknown_args=True, add_help=False)
    if not isinstance(first.env_kwargs, dict):
        raise InputError('--env-kwargs must be an object in JSON, such as {"size": 5}.')
    name = first.preset
    path = first.evaluate or first.resume
    if path is not None:
        saved = load(path)["args"]
        defaults = vars(saved) | PRESETS.get(name, {})
    else:
        game = ATARI if is_atari(first.env_id) else {}
        if name == "auto":
            name = choose_preset(replace(first, **game))
        defaults = PRESETS[name] | game
    command = tyro.cli(CommandLine, args=argv, default=CommandLine(preset=name, **defaults))
    flags = vars(command)
    del flags["preset"]
    args = Args(**flags)
    check(args)
    return args


# --- 6. Environments ------------------------------------------------------------------------------
def is_atari(env_id: str) -> bool:
    """Whether it is a game of ale-py."""
    return env_id.removeprefix("ale_py:").startswith("ALE/")


def is_image(space: spaces.Space) -> bool:
    """Whether observations are images: uint8, (H, W) or with channels, large enough for the CNN."""
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    sides = sorted(space.shape)
    return len(sides) in (2, 3) and sides[-2] >= 36


def make_envs(args: Args, num_envs: int, video: str | None = None) -> RecordEpisodeStatistics:
    """Make environments that step together, and whose observations are vectors or images."""
    envs = make_vector_env(args, num_envs, video)
    space = envs.single_observation_space
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    if not is_vector and not is_image(space):
        envs = FlattenObservation(envs)
    if is_atari(args.env_id):
        return Atari(envs)
    return RecordEpisodeStatistics(envs)


def make_vector_env(args: Args, num_envs: int, video: str | None) -> VectorEnv:
    """Like gym.make_vec; films to files whose paths begin with `video`. Raises InputError."""
    env_id = args.env_id
    options = {"vectorization_mode": args.vectorization_mode, **args.env_kwargs}
    if is_atari(env_id):
        env_id = "ale_py:" + env_id.removeprefix("ale_py:")  # to import it registers the games
        options = Atari.options(options, video is not None)
    elif video is not None:
        options["render_mode"] = "rgb_array"
    if args.vectorization_mode == "async":
        options["wrappers"] = [shielded]
    if args.vectorization_mode != "vector_entry_point":
        options["vector_kwargs"] = {"copy": False}  # of observations, as `collect` copies them
    try:
        envs = gym.make_vec(env_id, num_envs, **options)
    except (gym.error.Error, ImportError) as error:
        raise InputError(f"Cannot make {env_id}: {error}") from error
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        if video is None and not args.env_kwargs:
            raise  # nothing was asked for that could be refused
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"Cannot make {env_id} as it is asked for: {reason}") from error
    check_env(env_id, envs, video is not None)
    if not is_atari(env_id):  # Infos are left out, as they take time; a fork may need them.
        envs.unwrapped._add_info = lambda infos, *_: infos
    if video is None:
        return envs
    folder, prefix = os.path.split(video)
    return RecordVideo(
        envs, folder, episode_trigger=lambda _: True, video_length=2000, name_prefix=prefix
    )


def shielded(env: gym.Env) -> gym.Env:
    """Let a worker process outlive the first signal, too: terminals and Slurm send it to all."""
    if multiprocessing.parent_process() is not None:
        for number in SIGNALS:
            signal.signal(number, request_stop)
    return env


class Atari(RecordEpisodeStatistics):
    """Keeps statistics of whole games; to the agent, lost lives are ends too [Details] #16-17."""

    def __init__(self, envs: VectorEnv):
        super().__init__(envs)
        self.is_native = not isinstance(envs.unwrapped, SyncVectorEnv)
        with closing(gym.make(envs.spec.id)) as env:
            names = env.unwrapped.get_action_meanings()
        self.restart_action = names.index("FIRE") if "FIRE" in names else 0

    @staticmethod
    def options(options: dict, filmed: bool) -> dict:
        """What gym.make_vec is given, to play as in [Details] #14, #15, #18 and #20."""
        # ALE's own vector version cannot be filmed; Gymnasium's wrappers show the same.
        options = {"repeat_action_probability": 0.0, **options}
        if not filmed:
            return {"reward_clipping": False, **options}
        frame_skip = options.pop("frameskip", 4)
        prepare = functools.partial(gym.wrappers.AtariPreprocessing, frame_skip=frame_skip)
        stack = functools.partial(gym.wrappers.FrameStackObservation, stack_size=4)
        film = {"vectorization_mode": "sync", "render_mode": "rgb_array", "frameskip": 1}
        return {**options, **film, "wrappers": [prepare, stack]}

    def reset(self, **kwargs) -> tuple:
        obs, info = super().reset(**kwargs)
        self.lives = info["lives"]
        self.restarts = np.full(self.num_envs, not self.is_native)  # native ones begin with FIRE
        return obs, info

    def step(self, action: np.ndarray) -> tuple:
        action = np.where(self.restarts, self.restart_action, action)
        obs, reward, terminated, truncated, info = super().step(action)
        # After a lost life, too, the next row is not valid: it only goes on by FIRE.
        self.restarts = (info["lives"] < self.lives) & ~terminated & ~truncated
        self.lives = info["lives"]
        return obs, reward, terminated | self.restarts, truncated, info


def check_env(env_id: str, envs: VectorEnv, filmed: bool) -> None:
    """Raise InputError for environments that cannot be trained on, or not filmed if they are."""
    if filmed and envs.render_mode not in envs.metadata.get("render_modes", []):
        raise InputError(f"{env_id} cannot be filmed: it has no render mode rgb_array.")
    mode = envs.metadata.get("autoreset_mode")
    if mode != AutoresetMode.NEXT_STEP:
        raise InputError(f"{env_id} has autoreset mode {mode}, but only NEXT_STEP is supported.")
    space = envs.single_action_space
    supported = spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary | spaces.Box
    is_integer_box = isinstance(space, spaces.Box) and space.dtype.kind != "f"
    if is_integer_box or not isinstance(space, supported):
        names = "Discrete, MultiDiscrete, MultiBinary and Box of floats"
        raise InputError(f"{env_id} has actions {space}; supported are {names}.")
    space = envs.single_observation_space
    parts = space if isinstance(space, spaces.Dict) else {"observation": space}
    for name, part in parts.items():
        if part is not space and is_image(part):
            patch = "tests/forks/multi-input.patch takes both, TransformObservation the image"
            raise InputError(f"{env_id}: {name} is an image within a Dict: {patch}.")
        flat = None
        with suppress(NotImplementedError):  # of a space that the environment has made itself
            flat = spaces.flatten_space(part)
        if not isinstance(flat, spaces.Box):
            raise InputError(f"{env_id}: {name} is a {type(part).__name__}; wrap it as an array.")


def reset(envs: VectorEnv, args: Args, step: int) -> tuple:
    """Seed the generators by args.seed and the step, reset, and return obs (N, *obs), done (N,)."""
    env_seed = seed_generators(args.seed, step) + RANK * envs.num_envs
    obs, _ = envs.reset(seed=env_seed)
    registered = envs.spec.max_episode_steps
    limit = args.env_kwargs.get("max_episode_steps", registered) or 0  # of TimeLimit; -1, 0: none
    is_native = args.vectorization_mode == "vector_entry_point"
    if args.stagger_episodes and limit > 0 and not is_native:
        elapsed = np.random.default_rng(env_seed).integers(limit, size=envs.num_envs)
        envs.unwrapped.set_attr("_elapsed_steps", elapsed.tolist())
    return obs, np.zeros(envs.num_envs, bool)


@contextmanager
def open_envs(args: Args) -> Iterator[RecordEpisodeStatistics]:
    """Check the arguments, and make the environments of this process; close them at the end."""
    check(args)
    seed_generators(args.seed)
    if RANK == 0:
        print(f"making {args.num_envs} x {args.env_id} ...", flush=True)
    envs = make_envs(args, args.num_envs // WORLD_SIZE)
    try:
        yield envs
    except BaseException:
        if isinstance(envs.unwrapped, AsyncVectorEnv):
            for process in envs.unwrapped.processes:
                process.kill()  # it may hang
            envs.unwrapped.close(terminate=True)
        raise
    envs.close()


# --- 7. Signals, processes, device, seeds ---------------------------------------------------------
STOP = []  # the number of the signal that is to end the run, if one has come
SIGNALS = {signal.SIGINT, signal.SIGTERM}
if hasattr(signal, "SIGUSR1"):  # not on Windows; Slurm can send it before it ends a job
    SIGNALS.add(signal.SIGUSR1)


def request_stop(signum: int, _) -> None:
    """Ask the run to end after this iteration; a second signal ends the process at once."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    STOP.append(signum)
    if multiprocessing.parent_process() is None:
        os.write(2, b"\nppo.py: stopping; a second signal ends it at once\n")  # print() is not safe


WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))  # number of processes, set by torchrun
RANK = int(os.environ.get("RANK", "0")) if WORLD_SIZE > 1 else 0  # process 0 writes and speaks


def seed_generators(seed: int, *key: int) -> int:
    """Seed the generators of this process by seed and key; return a seed for environments."""
    sequence = np.random.SeedSequence(seed, spawn_key=key)
    seed, env_seed = sequence.generate_state(2).tolist()
    random.seed(seed + RANK)
    np.random.seed((seed + RANK) % 2**32)  # noqa: NPY002
    torch.manual_seed(seed + RANK)
    return env_seed % 2**30  # native vector environments accept less than 2**31


def set_up(args: Args, images: bool) -> str:
    """Connect the processes, set torch's threads and cuDNN, try to film, and return the device."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and images else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"  # torchrun's number on this machine
    if name == "cpu" and not images and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # faster than more for layers as small as these
    torch.backends.cudnn.deterministic = args.torch_deterministic
    if args.compile or WORLD_SIZE > 1:
        torch._dynamo.config.trace_autograd_ops = True  # for `backward`; set before they connect
    if WORLD_SIZE > 1 and not distributed.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"  # nccl: CUDA only
        distributed.init_process_group(backends)
        atexit.register(distributed.destroy_process_group)
    if args.capture_video and RANK == 0:
        with tempfile.TemporaryDirectory() as folder:  # to say now what cannot be filmed
            envs = make_envs(args, 1, os.path.join(folder, "videos", "film"))
            envs.reset()  # films a frame
            envs.close()
    return name


def all_sum(x: Tensor) -> Tensor:
    """Sum x over all processes, in place."""
    if WORLD_SIZE > 1:
        distributed.all_reduce(x)
    return x


def average_gradients(parameters: list[Tensor], info: dict, rows: int) -> None:
    """Replace gradients and scalars, means over `rows`, by those over the rows of all processes."""
    if WORLD_SIZE == 1:
        return
    gradients = [x.grad for x in parameters if x.grad is not None]
    one = torch.ones_like(info["entropy"])  # becomes the number of all rows
    tensors = [*gradients, *info.values(), one]
    total = all_sum(rows * nn.utils.parameters_to_vector(tensors))
    nn.utils.vector_to_parameters(total / total[-1], tensors)


compiled = functools.cache(torch.compile)  # for `update`: a function is compiled only once


# --- 8. Run ---------------------------------------------------------------------------------------
class NonFiniteError(FloatingPointError):
    """Nothing can be learnt from a nan or an infinity; the message says where it was."""


class Run:
    """The folder of a run, its checkpoints and TensorBoard log, and what the console shows."""

    def __init__(self, args: Args, envs: VectorEnv, agent: Agent, optimizer: Optimizer):
        self.args = replace(args, resume=None)
        self.envs = envs
        self.agent = agent
        self.optimizer = optimizer
        self.batch_size = args.num_steps * args.num_envs
        self.interval = args.total_timesteps / 100  # steps between regular checkpoints
        if args.checkpoint_interval is not None:
            self.interval = args.checkpoint_interval * self.batch_size
        self.step = 0  # of all environments together
        self.best = -math.inf
        self.folder = None
        if args.resume is not None:
            saved = load(args.resume)
            with naming(saved["file"]):
                agent.load_state_dict(saved["agent"])
                optimizer.load_state_dict(saved["optimizer"])
                self.step = saved["global_step"]
                if args.env_id == saved["args"].env_id:
                    self.best = saved["best"]
                    envs.return_queue.extend(saved["returns"])
                    envs.length_queue.extend(saved["lengths"])
            if args.run_name == saved["args"].run_name:
                self.folder = saved["folder"]
        if WORLD_SIZE > 1:
            for x in agent.state_dict().values():
                distributed.broadcast(x, src=0)
        self.saved_time = time.monotonic()
        self.times = deque([time.monotonic()], maxlen=10)  # at the ends of the last iterations
        if RANK == 0:
            self.open()

    def open(self) -> None:
        """Make the folder, begin TensorBoard's log with the flags, and say what is trained."""
        args = self.args
        if self.folder is None:
            milliseconds = time.time_ns() // 10**6
            name = f"{args.env_id}__{args.exp_name}__{args.seed}__{milliseconds}"
            name = args.run_name or name.replace(":", "-")
            self.folder = os.path.join("runs", name.replace("/", "-"))
            if os.path.exists(self.folder):
                hint = f"--resume {self.folder} goes on with it, another --run-name begins anew"
                raise InputError(f"{self.folder} exists: {hint}.")
        self.writer = SummaryWriter(self.folder, purge_step=self.step + 1)
        flags = vars(args).items()
        rows = "".join(f"|{name}|{value}|\n" for name, value in flags)
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + rows, self.step)
        plain = {name: value for name, value in flags if isinstance(value, int | float | str)}
        for summary in hparams(plain, {"charts/episodic_return": 0, "eval/episodic_return": 0}):
            self.writer.file_writer.add_summary(summary)  # TensorBoard's table of all runs
        parameters = list(self.agent.parameters())
        size = sum(x.numel() for x in parameters)
        print(f"{self.folder}: {size:,} parameters on {parameters[0].device}", flush=True)

    def stopped(self) -> bool:
        """Whether a signal has told any process to stop."""
        return all_sum(torch.tensor(len(STOP))).item() > 0

    def log(self, rollout: Rollout, batch: Batch, infos: list) -> None:
        """Count an iteration, and log it. Raises NonFiniteError at a nan or an infinity."""
        self.step += self.batch_size
        names = infos[0] if infos else []  # there are none if the KL stop came at once
        losses = {}
        for name in names:
            steps = [info[name] for info in infos]
            losses[name] = torch.stack(steps).mean()
        for name, x in {"obs": rollout.obs, "reward": rollout.reward, **losses}.items():
            is_finite = x.isfinite()
            if not is_finite.all():
                index = is_finite.logical_not().nonzero()[0].tolist()
                raise NonFiniteError(f"{name}{index or ''} is {x[tuple(index)].item()}.")
        residual = batch.target - batch.value
        columns = torch.stack([residual, batch.target], dim=1)  # (M, 2)
        _, _, variance = moments(columns)  # before the return, as it sums over processes
        if RANK > 0:
            return
        self.times.append(time.monotonic())
        seconds = self.times[-1] - self.times[0]
        speed = (len(self.times) - 1) * self.batch_size / seconds
        scalars = {f"losses/{name}": x.item() for name, x in losses.items()}
        explained_variance = 1 - variance[0] / variance[1]
        scalars["losses/explained_variance"] = explained_variance.item()
        scalars["losses/updates"] = len(infos)
        scalars["charts/learning_rate"] = self.optimizer.param_groups[0]["lr"]
        scalars["charts/SPS"] = speed
        if isinstance(self.agent.head, GaussianHead):
            scalars["charts/action_std"] = self.agent.head.log_std.exp().mean().item()
        if self.envs.return_queue:  # means of the last 100 episodes
            scalars["charts/episodic_return"] = np.mean(self.envs.return_queue)
            scalars["charts/episodic_length"] = np.mean(self.envs.length_queue)
        values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
        self.writer.file_writer.add_summary(Summary(value=values), self.step)  # all at once: faster
        self.show(speed)

    def crosses(self, interval: float) -> bool:
        """Whether the last iteration has reached a multiple of so many steps."""
        return self.step // interval > (self.step - self.batch_size) // interval

    def show(self, speed: float) -> None:
        """Show the progress: on a terminal one line that updates itself, else 32 lines a run."""
        total = self.args.total_timesteps
        seconds = max(total - self.step, 0) / speed
        left = timedelta(seconds=round(seconds))
        share = min(self.step / total, 1)
        line = f"{left} left, {self.step:,} steps ({share:.0%}), {speed:,.0f} steps/s"
        if self.envs.return_queue:
            line += f", return {np.mean(self.envs.return_queue):.5g}"
            line += f", length {np.mean(self.envs.length_queue):.5g}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1  # a wrapped line cannot be overwritten
            print("\r\x1b[K" + line[:width], end="", flush=True)
        elif self.crosses(total / 32):
            print(line, flush=True)

    def save(self) -> None:
        """Write checkpoints that are due: regular ones, and one after ten minutes without."""
        if RANK > 0:
            return
        is_regular = self.crosses(self.interval) or self.step >= self.args.total_timesteps
        returns = self.envs.return_queue
        num_whole = self.envs.episode_count - self.envs.num_envs  # each one's first may be cut
        if is_regular and num_whole >= 100 and np.mean(returns) > self.best:
            self.best = float(np.mean(returns))
            self.write("best.pt")
        if is_regular or time.monotonic() > self.saved_time + 600:
            self.write("checkpoint.pt")

    def write(self, name: str) -> None:
        """Write a checkpoint to a file, which is never half-written."""
        self.writer.flush()  # a resumed run logs only what comes after the checkpoint
        env_kwargs = json.loads(json.dumps(self.args.env_kwargs, default=str))  # objects as strings
        checkpoint = {
            "args": vars(self.args) | {"env_kwargs": env_kwargs},
            "global_step": self.step,
            "returns": [float(x) for x in self.envs.return_queue],
            "lengths": [int(x) for x in self.envs.length_queue],
            "best": self.best,
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        path = os.path.join(self.folder, name)
        with open(path + ".tmp", "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".tmp", path)  # atomic
        self.saved_time = time.monotonic()

    def close(self) -> None:
        """Write the last checkpoint, and end the log."""
        if RANK > 0:
            return
        self.write("checkpoint.pt")
        self.writer.close()
        print(f"\nsaved {self.folder} at step {self.step:,}")


def load(path: str) -> dict:
    """The checkpoint of a run's folder or .pt file, "args" being Args, with "folder" and "file"."""
    file = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    with naming(file):
        if zipfile.ZipFile(file).testzip() is not None:  # torch does not look at checksums
            raise ValueError("the file is damaged")
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)  # runs no code
        checkpoint["args"] = Args(**checkpoint["args"])
    checkpoint["file"] = file
    checkpoint["folder"] = os.path.dirname(file) or "."
    return checkpoint


@contextmanager
def naming(file: str) -> Iterator[None]:
    """Raise InputError, which names the file, if a checkpoint cannot be used."""
    try:
        yield
    except Exception as error:
        words = str(error).split()
        sentence = " ".join(words).partition(". ")[0]  # the first of several
        raise InputError(f"Cannot use {file}: {type(error).__name__}: {sentence}") from error


def make_agent(args: Args, checkpoint: dict, agent_class: type[Agent]) -> Agent:
    """The agent of a checkpoint, on the CPU; an environment is made, for its spaces."""
    with closing(make_envs(args, 1)) as envs:
        agent = agent_class(envs.single_observation_space, envs.single_action_space, args)
    with naming(checkpoint["file"]):
        agent.load_state_dict(checkpoint["agent"])
    return agent


def load_agent(path: str, agent_class: type[Agent] = Agent) -> Agent:
    """The trained agent of a run's folder or of a .pt file, on the CPU. Raises InputError."""
    checkpoint = load(path)
    return make_agent(checkpoint["args"], checkpoint, agent_class)


# --- 9. Evaluation --------------------------------------------------------------------------------
def as_batch(obs: object, space: spaces.Space) -> Tensor:
    """One observation of an environment, of its space, as the batch (1, *obs) of an agent."""
    if is_image(space):
        return torch.from_numpy(obs[None])
    return torch.from_numpy(spaces.flatten(space, obs)[None]).float()


def evaluate(agent: Agent, args: Args, folder: str, step: int) -> np.ndarray:
    """Play args.eval_episodes episodes, and log and return their raw returns (none if stopped)."""
    if RANK > 0 or args.eval_episodes == 0 or STOP:
        return np.zeros(0)
    print(f"evaluating {args.eval_episodes} episodes ...", flush=True)
    env_seed = seed_generators(args.seed)
    device = next(agent.parameters()).device
    returns = np.zeros(args.eval_episodes)
    video = None
    if args.capture_video:
        video = os.path.join(folder, "videos", f"step-{step}")
    with closing(make_envs(args, 1, video)) as envs:
        for episode in range(args.eval_episodes):
            obs, _ = envs.reset(seed=env_seed + episode)
            num_ended = envs.episode_count
            for _ in range(10_000):  # an agent may balance for ever
                batch = torch.from_numpy(obs.astype(agent.obs_dtype)).to(device)
                noise = agent.head.noise(1).to(device) if args.eval_stochastic else None
                action = agent.act(batch, noise)
                env_action = agent.head.to_env(action.cpu().numpy())
                obs = envs.step(env_action)[0]
                if envs.episode_count > num_ended or STOP:
                    break
            if STOP:
                return np.zeros(0)
            returns[episode] = envs.episode_returns[0]
    statistics = f"mean {returns.mean():.5g} std {returns.std():.5g}"
    extremes = f"min {returns.min():.5g} max {returns.max():.5g}"
    way = "stochastic" if args.eval_stochastic else "greedy"
    print(f"eval: {statistics} {extremes} ({len(returns)} episodes, {way})", flush=True)
    with closing(SummaryWriter(folder)) as writer:
        writer.add_scalar("eval/episodic_return", returns.mean(), step)
    return returns


# --- 10. Main -------------------------------------------------------------------------------------
def main(agent_class: type[Agent] = Agent) -> None:
    """Do what the command line says. Exit code 2: bad input; 1: a failure; 128 + n: signal n."""
    STOP.clear()
    for number in SIGNALS:
        signal.signal(number, request_stop)
    sys.path.append(os.getcwd())  # for module:Env-v0
    try:
        args = parse_args()
        if args.evaluate is not None:
            checkpoint = load(args.evaluate)
            agent = make_agent(args, checkpoint, agent_class)
            agent.to(set_up(args, agent.cnn is not None))
            evaluate(agent, args, checkpoint["folder"], checkpoint["global_step"])
        else:
            agent = train(args, agent_class)
            if RANK == 0:
                way = "--resume" if STOP else "--evaluate"
                print(f"python {sys.argv[0]} {way} {agent.folder}", flush=True)
    except (InputError, NonFiniteError, gym.error.DependencyNotInstalled) as error:
        print(f"ppo.py: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)
    if STOP:
        sys.exit(128 + STOP[0])


if __name__ == "__main__":
    main()
