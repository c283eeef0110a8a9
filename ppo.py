# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization (PPO) in one file, for Gymnasium environments with vector observations.

    python ppo.py --env-id CartPole-v1                                     # half a million steps, a minute
    python ppo.py --env-id Pendulum-v1                                     # continuous actions
    python ppo.py --env-id my_package:MyEnv-v0 --env-kwargs '{"size": 5}'  # an environment of your own
    python ppo.py --help                                                   # every flag in a sentence
    tensorboard --logdir runs

Sections: 1 arguments, 2 environments, 3 agent, 4 algorithm, 5 training loop, 6 plumbing, 7 main.

Sizes: T steps of a rollout (num_steps), N environments (num_envs), B any batch, M a minibatch, D dimensions
of a Box action, C choices of a MultiDiscrete one. *obs in a shape is the shape of one observation.

Ends of episodes follow Gymnasium's NEXT_STEP autoreset: the step after an episode's last one ignores the
action and returns the next episode's first observation, with reward 0. So obs[t + 1] is always where row t
led, even if its episode ended there, and V(obs[t + 1]) is its bootstrap. The row after an end, in which the
environment was only reset, is not `valid` and never used for training.

[PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
[GAE]  Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438
[Dual] Ye et al. 2020, Mastering Complex Control in MOBA Games with Deep RL, arXiv:1912.09729
[KL]   Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
[37]   Huang et al. 2022, The 37 Implementation Details of PPO, ICLR Blog Track, numbered through: core 1-13,
       Atari 14-22, continuous actions 23-31, LSTM 32-36, MultiDiscrete 37
"""

import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import textwrap
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from operator import index
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from torch.utils.tensorboard import SummaryWriter

# --- 1. Arguments ------------------------------------------------------------------------------------------

ACTIVATIONS = {"tanh": nn.Tanh, "relu": nn.ReLU}
JsonObject = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass
class Args:
    """Train a PPO agent. Numbers may be written 1_000_000. None switches an optional value off."""

    exp_name: str = "ppo"  # name of the experiment, used in made-up run names
    run_name: str | None = None  # new folder in runs/ (None: made up as env_id__exp_name__seed__time)
    seed: int = 1  # seed of the networks, the sampled actions, the minibatches and the environments
    torch_deterministic: bool = True  # on CUDA, use only deterministic kernels of cuDNN (off: any)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...; auto is the CPU, faster for small networks

    env_id: str = "CartPole-v1"  # Gymnasium's id; module:Env-v0 imports the module first
    env_kwargs: JsonObject = field(default_factory=dict)  # the environment's arguments, as '{"size": 5}'
    num_envs: int = 4  # N, environments that are stepped side by side
    # sync: all in this process; async: a process for each; vector_entry_point: the environment's own
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] = "sync"

    total_timesteps: int = 500_000  # steps of all environments together, rounded up to whole rollouts
    learning_rate: float = 2.5e-4  # alpha, the step size of Adam
    anneal_lr: bool = True  # let the learning rate fall linearly to 0 over the run (off: constant)
    num_steps: int = 128  # T, steps of each environment in a rollout
    gamma: float = 0.99  # gamma, the discount factor (0: immediate reward only)
    gae_lambda: float = 0.95  # lambda of GAE (0: one-step TD errors; 1: Monte Carlo returns)
    num_minibatches: int = 4  # minibatches that an epoch splits the rollout into
    update_epochs: int = 4  # K, passes over each rollout
    norm_adv: bool = True  # scale the advantages A of a minibatch to mean 0, deviation 1 (off: raw)
    clip_coef: float = 0.2  # epsilon; the probability ratio is clipped to [1 - epsilon, 1 + epsilon]
    anneal_clip: bool = False  # let epsilon fall linearly to 0 over the run (off: constant)
    clip_vloss: bool = True  # clip the change of the value function by epsilon too (off: plain squared error)
    dual_clip: float | None = None  # c > 1; the surrogate is at least c A where A < 0 (None: off)
    ent_coef: float = 0.01  # c2, weight of the entropy bonus (0: off)
    vf_coef: float = 0.5  # c1, weight of the value loss (0: off)
    max_grad_norm: float | None = 0.5  # clip the gradient to this global 2-norm (None: off)
    target_kl: float | None = None  # end the update before a step whose approximate KL exceeds it (None: off)
    recompute_advantages: bool = False  # value the rollout before every epoch (off: before the first only)

    hidden_sizes: tuple[int, ...] = (64, 64)  # units of each hidden layer, in policy and value function alike
    activation: Literal["tanh", "relu"] = "tanh"  # nonlinearity of the hidden layers
    log_std_init: float = 0.0  # log sigma that a Gaussian policy starts with (Box actions)
    norm_obs: bool = True  # scale observations by running mean and deviation, clip to +-10 (off: raw)
    norm_reward: bool = True  # divide rewards by the return's running deviation, clip to +-10 (off: raw)

    @property
    def num_iterations(self) -> int:
        return math.ceil(self.total_timesteps / (self.num_envs * self.num_steps))


class InputError(ValueError):
    """What the user asked for cannot be done; the message says why."""


RANGES = {  # valid values; every comparison with nan is False, so nan is refused everywhere
    "num_envs num_steps num_minibatches update_epochs": ("a whole number from 1", lambda x: index(x) >= 1),
    "total_timesteps": ("a whole number from 1", lambda x: index(x) >= 1),
    "hidden_sizes": ("whole numbers from 1", lambda x: all(index(units) >= 1 for units in x)),
    "seed": ("a whole number from 0", lambda x: index(x) >= 0),
    "learning_rate ent_coef vf_coef": ("finite and at least 0", lambda x: 0 <= x < math.inf),
    "gamma gae_lambda": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "clip_coef": ("finite and above 0", lambda x: 0 < x < math.inf),
    "max_grad_norm target_kl": ("finite and above 0, or None", lambda x: x is None or 0 < x < math.inf),
    "dual_clip": ("finite and above 1, or None", lambda x: x is None or 1 < x < math.inf),
    "log_std_init": ("from -20 to 2", lambda x: -20 <= x <= 2),
    "activation": ("tanh or relu", lambda x: x in ACTIVATIONS),
    "env_kwargs": ("a JSON object, such as '{\"size\": 5}'", lambda x: isinstance(x, dict)),
}


def check(args: Args) -> None:
    """Raise InputError for a flag out of its range, or a rollout that is too small for its minibatches."""
    for names, (requirement, holds) in RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            with suppress(TypeError):  # as raised for a value of another kind
                if holds(value):
                    continue
            raise InputError(f"--{name.replace('_', '-')} must be {requirement}, not {value!r}.")
    if args.num_envs * (args.num_steps // 2) < 2 * args.num_minibatches:
        raise InputError(
            f"{args.num_envs} x {args.num_steps} rows, half of which may be resets, are too few for "
            f"{args.num_minibatches} minibatches of two rows or more: raise --num-steps or --num-envs."
        )


# --- 2. Environments ---------------------------------------------------------------------------------------


def make_envs(args: Args) -> gym.vector.VectorEnv:
    """Make the vector environment of a run, with observations flattened to vectors where necessary.

    A step's info has the raw return "r" and length "l" of the episodes that ended in it under "raw_episode",
    and in which environments these were under "_raw_episode". Raises InputError if it cannot be made.
    """
    try:
        envs = gym.make_vec(args.env_id, args.num_envs, args.vectorization_mode, **args.env_kwargs)
    except Exception as error:
        # With arguments given, any exception may be the environment's way of refusing them.
        refusals = gym.error.Error | ImportError | TypeError | ValueError
        if not (args.env_kwargs or isinstance(error, refusals)):
            raise
        hint = ""
        if isinstance(error, ModuleNotFoundError) and (name := (error.__cause__ or error).name):
            hint = f" Try `pip install {name.split('.')[0]}`."
        elif isinstance(error, gym.error.NamespaceNotFound) and args.env_id.startswith("ALE/"):
            hint = f" Try `pip install ale-py` and --env-id ale_py:{args.env_id}."
        raise InputError(f"Cannot make {args.env_id}: {type(error).__name__}: {error}{hint}") from error
    mode, space = envs.metadata.get("autoreset_mode"), envs.single_observation_space
    if mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise InputError(f"{args.env_id} has autoreset mode {mode}, but only NEXT_STEP is supported.")
    if not is_flattenable(space):
        supported = "Box, Discrete, MultiDiscrete, MultiBinary, and Dict and Tuple of these"
        raise InputError(f"Observation space {space} is not supported; these are: {supported}.")
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3):
        warnings.warn(f"images {space.shape} are flattened: there is no convolutional network", stacklevel=2)
    # The usual key, "episode", may be taken by the environment's own records.
    envs = gym.wrappers.vector.RecordEpisodeStatistics(envs, stats_key="raw_episode")
    is_vector = isinstance(space, spaces.Box) and len(space.shape) == 1
    return envs if is_vector else gym.wrappers.vector.FlattenObservation(envs)


def is_flattenable(space: spaces.Space) -> bool:
    """Whether the space is one that is supported, and is flattened to vectors of a fixed length."""
    if isinstance(space, spaces.Dict | spaces.Tuple):
        return all(map(is_flattenable, space.values() if isinstance(space, spaces.Dict) else space))
    return isinstance(space, spaces.Box | spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary)


# --- 3. Agent ----------------------------------------------------------------------------------------------


class RunningStats(nn.Module):
    """Mean and standard deviation of all rows given to `update`, by component; 0 and 1 before the first."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))  # not the variance, which float32 might not hold
        self.register_buffer("count", torch.tensor(0))

    def update(self, x: Tensor) -> None:
        """Merge the rows x (B, *shape) with those before [Chan et al. 1983], in double precision."""
        x, mean, std = x.cpu().double(), self.mean.cpu().double(), self.std.cpu().double()
        weight = len(x) / (len(x) + self.count.item())  # of the new rows among all
        delta = x.mean(0) - mean
        var = (1 - weight) * (std**2 + weight * delta**2) + weight * x.var(0, correction=0)
        self.mean.copy_(mean + weight * delta)
        self.std.copy_(var.sqrt())
        self.count += len(x)

    def scale(self, x: Tensor) -> Tensor:
        """x (B, *shape) in standard deviations, clipped to +-10; a constant is not blown up without bound."""
        return (x / self.std.clamp(min=1e-4)).clamp(-10, 10)


def mlp(sizes: list[int], activation: type[nn.Module], gain: float) -> nn.Sequential:
    """A multilayer perceptron; orthogonal weights, by sqrt 2 inside and `gain` at the output [37] #2."""
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [activation(), nn.Linear(inputs, outputs)]
        nn.init.orthogonal_(layers[-1].weight, math.sqrt(2))
        nn.init.zeros_(layers[-1].bias)
    nn.init.orthogonal_(layers[-1].weight, gain)
    return nn.Sequential(*layers[1:])


class Agent(nn.Module):
    """Policy pi(a|s) and value function V(s): two networks that share the scaling of obs alone [37] #13.

    Takes the single spaces of `make_envs`. `dist, value = agent(obs)` maps raw observations (B, *obs) to an
    action distribution, whose log_prob and entropy are (B,), and values (B,), in units of scaled rewards.
    Actions (B, *action_shape) are indices from 0 or unbounded reals, as sampled and as stored; `to_env`
    converts them to the action space. Raises InputError for an action space that is not supported.
    """

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Space, args: Args):
        super().__init__()
        self.action_space, self.action_dtype, self.action_shape = action_space, np.int64, ()
        self.log_std = None
        self.register_buffer("padding", None, persistent=False)
        if isinstance(action_space, spaces.Discrete):
            num_outputs = int(action_space.n)
        elif isinstance(action_space, spaces.MultiDiscrete | spaces.MultiBinary):
            # C choices; a bit is a choice of two. Each has as many logits as the largest has options, and the
            # padding added to those in excess makes their probability 0.
            options = np.ravel(getattr(action_space, "nvec", np.full(action_space.shape, 2)))
            missing = np.arange(options.max()) >= options[:, None]
            self.padding = torch.where(torch.from_numpy(missing), -1e9, 0.0)  # (C, options)
            num_outputs, self.action_shape = missing.size, options.shape
        elif isinstance(action_space, spaces.Box) and np.issubdtype(action_space.dtype, np.floating):
            num_outputs = math.prod(action_space.shape)
            self.action_shape, self.action_dtype = (num_outputs,), np.float32
            self.log_std = nn.Parameter(torch.full((num_outputs,), float(args.log_std_init)))  # [37] #24
            # [-1, 1] is mapped to [low, high] where both are real bounds; other dimensions are not mapped.
            low, high = action_space.low.astype(np.float64), action_space.high.astype(np.float64)
            bounded = (low >= -1e6) & (high <= 1e6)
            low, high = np.where(bounded, low, -1), np.where(bounded, high, 1)
            self.scale, self.shift = (high - low) / 2, (high + low) / 2
        else:
            supported = "Discrete, MultiDiscrete, MultiBinary and Box of floats"
            raise InputError(f"Action space {action_space} is not supported; these are: {supported}.")
        inputs, activation = math.prod(observation_space.shape), ACTIVATIONS[args.activation]
        self.actor = mlp([inputs, *args.hidden_sizes, num_outputs], activation, gain=0.01)
        self.critic = mlp([inputs, *args.hidden_sizes, 1], activation, gain=1.0)
        # Buffers, and so saved with the weights; only `train` updates them.
        self.obs_stats = RunningStats(observation_space.shape) if args.norm_obs else None
        self.return_stats = RunningStats(()) if args.norm_reward else None

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations as the networks see them [37] #28-29."""
        return obs if self.obs_stats is None else self.obs_stats.scale(obs - self.obs_stats.mean)

    def output(self, features: Tensor) -> Tensor:
        """The policy network's output: logits (B, options) or (B, C, options), or means (B, D)."""
        output = self.actor(features)
        return output if self.padding is None else output.view(-1, *self.padding.shape) + self.padding

    def forward(self, obs: Tensor) -> tuple[Distribution, Tensor]:
        features = self.normalize(obs)
        output, value = self.output(features), self.critic(features).squeeze(-1)
        if self.log_std is not None:
            dist = Normal(output, self.log_std.exp(), validate_args=False)  # [37] #23
        else:
            dist = Categorical(logits=output, validate_args=False)
        # The dimensions of a Box and the choices of a MultiDiscrete are independent [37] #25, #37.
        return Independent(dist, len(self.action_shape), validate_args=False), value

    def act(self, obs: Tensor) -> Tensor:
        """Sample actions (B, *action_shape) for raw observations (B, *obs), with the policy alone."""
        output = self.output(self.normalize(obs))
        if self.log_std is not None:
            return output + self.log_std.exp() * torch.randn_like(output)
        # Gumbel-max: the argmax of logits + Gumbel noise is a sample; minus log of Exp(1) noise is Gumbel.
        # For small batches it is several times faster than Categorical.sample().
        return (output - torch.empty_like(output).exponential_().log()).argmax(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Convert sampled actions (B, *action_shape) to elements (B, *space.shape) of the action space."""
        space = self.action_space
        action = action.reshape(-1, *space.shape)
        if self.log_std is None:
            return (action + getattr(space, "start", 0)).astype(space.dtype, copy=False)
        return (action * self.scale + self.shift).astype(space.dtype).clip(space.low, space.high)  # [37] #27

    def scalars(self) -> dict[str, float]:
        """Scalars of the agent itself for TensorBoard."""
        return {} if self.log_std is None else {"charts/action_std": self.log_std.exp().mean().item()}


# --- 4. Algorithm ------------------------------------------------------------------------------------------


class Rollout(NamedTuple):
    """T steps of N environments, in arrays that are filled anew in every iteration."""

    obs: np.ndarray | Tensor  # (T + 1, N, *obs), raw; row t led from obs[t] to obs[t + 1]
    action: np.ndarray | Tensor  # (T, N, *action_shape), as sampled
    reward: np.ndarray | Tensor  # (T, N), raw
    discounted: np.ndarray | Tensor  # (T, N), discounted sum of the episode's rewards up to this row
    terminated: np.ndarray | Tensor  # (T, N), the episode ended in a state that has no future
    done: np.ndarray | Tensor  # (T, N), the episode ended, terminated or truncated
    valid: np.ndarray | Tensor  # (T, N), the action was carried out: this row did not reset the environment


class Minibatch(NamedTuple):
    """Rows to train on, with advantages that are normalised already."""

    obs: Tensor  # (M, *obs)
    action: Tensor  # (M, *action_shape)
    logprob: Tensor  # (M,), log pi_old(a|s), by the policy that acted
    value: Tensor  # (M,), V_old(s), the centre of the value clip
    advantage: Tensor  # (M,)
    ret: Tensor  # (M,), the target of V(s)


def gae(
    reward: Tensor, value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, for both kinds of episode ends.

    A terminated row has no value to come; a truncated one has that of its own final observation; neither gets
    an advantage from the next episode. Rows that are not valid come out meaningless, and affect no others.

    Takes reward, terminated and done (T, N) and value (T + 1, N). Returns the advantage and the return (the
    TD(lambda) target of the value function), both (T, N).
    """
    delta = reward + gamma * value[1:] * ~terminated - value[:-1]  # [PPO] eq. 12
    decay = gamma * gae_lambda * (~done).to(delta.dtype)
    advantage, future = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage[t] = future = delta[t] + decay[t] * future  # [PPO] eq. 11, [GAE] eq. 16
    return advantage, advantage + value[:-1]


def ppo_loss(agent: nn.Module, minibatch: Minibatch, args: Args, clip_coef: float) -> tuple[Tensor, dict]:
    """The objective of PPO [PPO] eq. 9, negated: clipped surrogate, value loss and entropy bonus.

    Returns the scalar loss, and detached scalars for logging.
    """
    dist, value = agent(minibatch.obs)
    logratio = dist.log_prob(minibatch.action) - minibatch.logprob
    ratio = logratio.exp()  # (M,), pi(a|s) / pi_old(a|s); 1 on the first minibatch of an iteration

    # Clipped surrogate: nothing is gained by moving the ratio away from 1 by more than epsilon [PPO] eq. 7.
    advantage = minibatch.advantage
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)
    if args.dual_clip is not None:  # nor is there a loss without bound where A < 0 [Dual] eq. 5
        surrogate = torch.where(advantage < 0, surrogate.max(args.dual_clip * advantage), surrogate)
    policy_loss = -surrogate.mean()

    # Value loss: with clipping, the larger of the errors of V and of V within epsilon of V_old [37] #9.
    error = (value - minibatch.ret).square()  # (M,)
    if args.clip_vloss:
        clipped = minibatch.value + (value - minibatch.value).clamp(-clip_coef, clip_coef)
        error = torch.max(error, (clipped - minibatch.ret).square())
    value_loss = 0.5 * error.mean()

    entropy = dist.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    info = {
        "policy_loss": policy_loss,
        "value_loss": value_loss,
        "entropy": entropy,
        "old_approx_kl": -logratio.mean(),  # [KL] k1
        "approx_kl": (ratio - 1 - logratio).mean(),  # [KL] k3
        "clipfrac": ((ratio - 1).abs() > clip_coef).float().mean(),
    }
    return loss, {name: x.detach() for name, x in info.items()}


@torch.no_grad()
def logprob_and_value(agent: Agent, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log pi(a|s) (T, N) and V(s) (T + 1, N), by obs (T + 1, N, *obs) and action (T, N, *action_shape).

    One batched pass after the rollout is cheaper than doing this while acting, and gives the same, as the
    weights do not change during a rollout. Chunks bound its memory.
    """
    (T, N), logprobs, values = action.shape[:2], [], []
    for o, a in zip(obs[:-1].flatten(0, 1).split(4096), action.flatten(0, 1).split(4096), strict=True):
        dist, value = agent(o)
        logprobs.append(dist.log_prob(a))
        values.append(value)
    values.append(agent(obs[-1])[1])
    return torch.cat(logprobs).view(T, N), torch.cat(values).view(T + 1, N)


# --- 5. Training loop --------------------------------------------------------------------------------------


def train(args: Args) -> Agent:
    """Train an agent, log to runs/<run>/, and return the agent.

    Seeds random, numpy and torch, and sets cuDNN's determinism and (on the CPU) torch's number of threads, in
    the whole process. Raises InputError, a ValueError, before anything is written if it cannot be done, and
    NonFiniteError if an observation, action, reward, loss or gradient is nan or infinite.
    """
    check(args)
    device, env_seed = set_up(args)
    T, N = args.num_steps, args.num_envs
    with ExitStack() as stack:
        envs = stack.enter_context(closing_envs(make_envs(args)))
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
        parameters = list(agent.parameters())
        max_norm = math.inf if args.max_grad_norm is None else args.max_grad_norm
        optimizer = torch.optim.Adam(parameters, lr=args.learning_rate, eps=1e-5, fused=True)  # [37] #3
        rollout = Rollout(
            np.zeros((T + 1, N, *envs.single_observation_space.shape), np.float32),
            np.zeros((T, N, *agent.action_shape), agent.action_dtype),
            *np.zeros((2, T, N), np.float32),  # reward, discounted
            *np.zeros((3, T, N), bool),  # terminated, done, valid
        )
        rollout.obs[T], _ = envs.reset(seed=env_seed)
        discounted, done = np.zeros(N), np.zeros(N, bool)  # of the row before
        log = stack.enter_context(closing(Logger(args, envs, agent, device)))

        for iteration in range(args.num_iterations):
            # Anneal linearly: 1 in the first iteration, 1 / num_iterations in the last [37] #4.
            remaining = 1 - iteration / args.num_iterations
            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
            learning_rate = args.learning_rate * (remaining if args.anneal_lr else 1)
            optimizer.param_groups[0]["lr"] = learning_rate

            # Rollout: act for T steps, from where the last rollout ended [37] #1.
            rollout.obs[0] = rollout.obs[T]
            with torch.inference_mode(), stop_at_nonfinite(rollout):
                for t in range(T):
                    action = agent.act(torch.from_numpy(rollout.obs[t]).to(device)).cpu().numpy()
                    rollout.action[t], rollout.valid[t] = action, ~done
                    obs, reward, terminated, truncated, info = envs.step(agent.to_env(action))
                    rollout.obs[t + 1], rollout.reward[t], rollout.terminated[t] = obs, reward, terminated
                    rollout.discounted[t] = discounted = args.gamma * discounted * ~done + reward
                    rollout.done[t] = done = terminated | truncated
                    log.count_episodes(info)
            data = Rollout(*(torch.from_numpy(x).to(device) for x in rollout))

            # Advantages (T, N), from rewards divided by the running deviation of the return [37] #30-31.
            reward = data.reward
            if agent.return_stats is not None:
                agent.return_stats.update(data.discounted[data.valid])
                reward = agent.return_stats.scale(reward)
            logprob, value = logprob_and_value(agent, data.obs, data.action)
            gae_args = (data.terminated, data.done, args.gamma, args.gae_lambda)
            advantage, ret = gae(reward, value, *gae_args)
            unexplained = advantage[data.valid].var() / ret[data.valid].var()  # the advantage is ret - value

            # Update: K passes over the valid rows, each in minibatches that are shuffled anew [37] #6.
            infos, stop = [], False
            rows = data.valid.flatten().nonzero().squeeze(1)  # (number of valid rows,), of T * N
            for epoch in range(args.update_epochs):
                if epoch > 0 and args.recompute_advantages:
                    _, value = logprob_and_value(agent, data.obs, data.action)
                    advantage, ret = gae(reward, value, *gae_args)
                order = rows[torch.randperm(len(rows), device=device)]
                columns = (data.obs[:-1], data.action, logprob, value[:-1], advantage, ret)
                shuffled = [x.flatten(0, 1)[order] for x in columns]  # indexed once an epoch, then only split
                for part in zip(*(x.tensor_split(args.num_minibatches) for x in shuffled), strict=True):
                    minibatch = Minibatch(*part)
                    if args.norm_adv:  # [37] #7
                        adv = minibatch.advantage
                        minibatch = minibatch._replace(advantage=(adv - adv.mean()) / (adv.std() + 1e-8))
                    loss, info = ppo_loss(agent, minibatch, args, clip_coef)
                    # KL stop: the policy has moved too far already, so this step is not taken.
                    stop = args.target_kl is not None and info["approx_kl"].item() > args.target_kl
                    if stop:
                        break
                    optimizer.zero_grad()
                    loss.backward()
                    info["grad_norm"] = nn.utils.clip_grad_norm_(parameters, max_norm)  # [37] #11
                    optimizer.step()
                    infos.append(info)
                if stop:
                    break

            # Not before: old and new log-probabilities would be of differently scaled observations.
            if agent.obs_stats is not None:
                agent.obs_stats.update(data.obs[:-1][data.valid])

            scalars = {f"losses/{name}": mean for name, mean in average(infos).items()} | agent.scalars()
            scalars["losses/explained_variance"] = 1 - unexplained.item()
            log.iteration(iteration, scalars | {"charts/learning_rate": learning_rate})
    return agent


# --- 6. Plumbing: nothing below is PPO ---------------------------------------------------------------------


class NonFiniteError(ArithmeticError):
    """Training stopped at a nan or an infinity, which would have spread to all weights."""


def set_up(args: Args) -> tuple[torch.device, int]:
    """Set up device, threads and seeds of the process; return the device and the first environment's seed.

    The other environments' seeds count up from it and stay below 2**31, the most that native ones accept.
    """
    try:
        device = torch.device("cpu" if args.device == "auto" else args.device)
        torch.zeros(1, device=device).item()
    except Exception as error:
        reason = textwrap.shorten(str(error), 90)
        raise InputError(f"--device {args.device} cannot be used: {reason}") from error
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # faster than more for layers as small as these
    torch.backends.cudnn.deterministic = args.torch_deterministic
    env_seed, seed = map(int, np.random.SeedSequence(args.seed).generate_state(2))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (some environments draw from the global generator)
    torch.manual_seed(seed)
    return device, env_seed % (2**31 - args.num_envs)


@contextmanager
def closing_envs(envs: gym.vector.VectorEnv) -> Iterator[gym.vector.VectorEnv]:
    """Close the environments at the end; after a failure, without waiting for workers, which may be dead."""
    try:
        yield envs
    except BaseException:
        for worker in getattr(envs.unwrapped, "processes", ()):
            worker.terminate()
            envs.unwrapped.closed = True  # or Gymnasium would wait for an answer
        envs.close()
        raise
    envs.close()


@contextmanager
def stop_at_nonfinite(rollout: Rollout) -> Iterator[None]:
    """Raise NonFiniteError if the block leaves a nan or infinity in the rollout, even where it raises."""
    failure, culprits = None, []
    try:
        yield
    except Exception as error:
        failure = error
    for i, name in enumerate(names := ("obs", "action", "reward")):  # the order in which they come about
        bad_rows = np.argwhere(~np.isfinite(getattr(rollout, name)))[:, :2].tolist()
        culprits += [(t, i, n) for t, n in bad_rows]
    if culprits:
        t, i, n = min(culprits)
        culprit = f"{names[i]} of environment {n} is {getattr(rollout, names[i])[t, n]}"
        raise NonFiniteError(culprit + f", upon which came {failure!r}" * bool(failure)) from failure
    if failure:
        raise failure


def average(infos: list[dict[str, Tensor]]) -> dict[str, float]:
    """Mean of each scalar over the minibatches of an update; NonFiniteError names the first without one."""
    if not infos:
        return {}
    names, table = list(infos[0]), torch.stack([torch.stack(list(info.values())) for info in infos])
    culprits = (~table.isfinite()).nonzero().tolist()
    if culprits:
        minibatch, i = culprits[0]
        raise NonFiniteError(f"{names[i]} is {table[minibatch, i]} in minibatch {minibatch} of an update")
    return dict(zip(names, table.mean(0).tolist(), strict=True))


def make_run_folder(args: Args) -> str:
    """Create a new folder in runs/, named with letters, digits, `_`, `-` and `.` only; return its path."""
    while True:
        name = args.run_name or f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}"
        path = os.path.join("runs", re.sub(r"[^\w.-]+", "-", name).strip("-.") or "run")
        try:
            os.makedirs(path)
            return path
        except OSError as error:
            if args.run_name or not isinstance(error, FileExistsError):
                raise InputError(f"Cannot create {path}: {error.strerror}; set --run-name.") from error
        time.sleep(1)  # another run has started in this second


class Logger:
    """Reports a run to TensorBoard and on the console."""

    def __init__(self, args: Args, envs: gym.vector.VectorEnv, agent: Agent, device: torch.device):
        self.args, self.path = args, make_run_folder(args)
        self.writer = SummaryWriter(self.path)
        flags = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + flags)
        self.ended = []  # (return, length) of the episodes that ended in this iteration
        self.recent = deque(maxlen=100)  # and of the last hundred
        self.line = "0 steps"
        print(f"run: {self.path}")
        print(f"environments: {args.num_envs} x {args.env_id}, {args.vectorization_mode}")
        print(f"observations: {textwrap.shorten(str(envs.single_observation_space), 90)}")
        print(f"actions: {textwrap.shorten(str(envs.single_action_space), 90)}")
        print(f"agent: {sum(x.numel() for x in agent.parameters()):,} parameters on {device}", flush=True)
        self.start = time.perf_counter()  # start-up does not count in the speed

    def count_episodes(self, info: dict) -> None:
        """Record the episodes that ended in a step."""
        if "_raw_episode" in info:
            ended, statistics = info["_raw_episode"], info["raw_episode"]
            self.ended += zip(statistics["r"][ended].tolist(), statistics["l"][ended].tolist(), strict=True)

    def iteration(self, iteration: int, scalars: dict[str, float]) -> None:
        """Log an iteration's scalars, episodes and speed, and show the progress."""
        count, total = iteration + 1, self.args.num_iterations
        step = count * self.args.num_envs * self.args.num_steps
        seconds = time.perf_counter() - self.start
        scalars = scalars | {"charts/SPS": step / seconds}
        if self.ended:
            returns, lengths = np.array(self.ended).T
            scalars |= {"charts/episodes": len(returns), "charts/episodic_length": lengths.mean()}
            for suffix, statistic in ("", np.mean), ("_min", np.min), ("_max", np.max):
                scalars["charts/episodic_return" + suffix] = statistic(returns)
            self.recent += self.ended
            self.ended = []
        for tag, value in scalars.items():
            if math.isfinite(value):  # explained variance is not, where all returns are the same
                self.writer.add_scalar(tag, value, step)

        # One line that updates itself on a terminal, 32 lines in a file.
        elapsed, left = (timedelta(seconds=round(x)) for x in (seconds, seconds / count * (total - count)))
        progress, speed = f"{step:,} steps ({count / total:.0%})", f", {step / seconds:,.0f} steps/s"
        if self.recent:
            speed += ", return {:.1f}, length {:.1f}".format(*np.mean(self.recent, axis=0))
        self.line = f"{progress} in {elapsed}{speed}"
        line = f"{progress}, {left} left{speed}"
        if sys.stdout.isatty():
            width = shutil.get_terminal_size().columns - 1
            print("\r" + line[:width].ljust(width), end="", flush=True)
        elif count * 32 // total > iteration * 32 // total:
            print(line, flush=True)

    def close(self) -> None:
        """Say where the run ended, be it complete or not, and flush TensorBoard."""
        over = f" over the last {len(self.recent)} episodes" if self.recent else ""
        print(f"\nend: {self.line}{over}\ncurves: tensorboard --logdir {self.path}", flush=True)
        self.writer.close()


# --- 7. Main -----------------------------------------------------------------------------------------------


def main() -> None:
    """Train as the command line says. Exit code 2: bad input; 1: stopped at a nan or infinity."""
    try:
        train(tyro.cli(Args))
    except (InputError, NonFiniteError, gym.error.DependencyNotInstalled) as error:
        print(f"ppo.py: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, NonFiniteError) else 2)


if __name__ == "__main__":
    main()
