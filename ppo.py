# SPDX-License-Identifier: MIT
"""Proximal Policy Optimization (PPO) in one file, for Gymnasium environments with vector observations.

    python ppo.py --env-id CartPole-v1                                     # half a million steps, a minute
    python ppo.py --env-id my_package:MyEnv-v0 --env-kwargs '{"size": 5}'  # an environment of your own
    python ppo.py --resume runs/name                                       # go on with a run that was stopped

Sizes: T steps of a rollout (num_steps), N environments (num_envs), B any batch, M a minibatch, D dimensions
of a Box action, C choices of a MultiDiscrete one. *obs in a shape is the shape of one observation.
Episodes end as in Gymnasium's NEXT_STEP autoreset: the step after an episode's last ignores the action and
returns the next episode's first observation, with reward 0. So obs[t + 1] is always where row t led, and
V(obs[t + 1]) its bootstrap; the row after an end only resets, is not `valid`, and is never trained on.
[PPO]  Schulman et al. 2017, Proximal Policy Optimization Algorithms, arXiv:1707.06347
[GAE]  Schulman et al. 2016, High-Dimensional Continuous Control Using GAE, arXiv:1506.02438
[KL]   Schulman 2020, Approximating KL Divergence, http://joschu.net/blog/kl-approx.html
[37]   Huang et al. 2022, The 37 Implementation Details of PPO, ICLR Blog Track, numbered in its order
"""

import errno
import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
import zipfile
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from gymnasium import spaces
from gymnasium.wrappers.vector import FlattenObservation, RecordEpisodeStatistics, RecordVideo
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

# --- 1. Arguments ------------------------------------------------------------------------------------------
JsonObject = Annotated[dict, tyro.conf.arg(constructor=json.loads, metavar="JSON")]


@dataclass
class Args:
    """Train a PPO agent. Numbers may be written 1_000_000; None is off; defaults depend on --env-id."""

    exp_name: str = "ppo"  # name of the experiment, used in made-up run names
    run_name: str | None = None  # new folder in runs/ (None: made up as env_id__exp_name__seed__time)
    seed: int = 1  # seed of the networks, the sampled actions, the minibatches and the environments
    torch_deterministic: bool = True  # on CUDA, use only deterministic kernels of cuDNN (off: any)
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps, ...; auto is the CPU, faster for small networks
    env_id: str = "CartPole-v1"  # Gymnasium's id; module:Env-v0 imports the module first
    env_kwargs: JsonObject = field(default_factory=dict)  # the environment's arguments, as '{"size": 5}'
    preset: Literal["auto", "none", "continuous"] = "none"  # set of defaults (auto, if not given: by env)
    num_envs: int = 4  # N, environments that are stepped side by side
    # sync: one process; async: one each, pays from 0.3 ms a step; vector_entry_point: native, from 10 envs
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] = "sync"
    total_timesteps: int = 500_000  # steps of all environments together, in whole rollouts; annealed to here
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
    resume: str | None = None  # run folder to go on in; bitwise, unless total, interval or device change
    # iterations between checkpoints, where all episodes are cut (0: at the end only; None: >= 10,000 steps)
    checkpoint_interval: int | None = None
    evaluate: str | None = None  # folder of a run, or a .pt file of one, to evaluate without training
    eval_episodes: int = 10  # episodes of the evaluation, also after a training (0: none, by --evaluate 10)
    eval_stochastic: bool = False  # sample the actions of the evaluation (off: take the likeliest)
    capture_video: bool = False  # film the evaluation, into videos/ of the run, 2,000 frames of an episode


PRESETS = {"continuous": {  # what replaces the defaults above, found by measurement: see the README
    "total_timesteps": 1_000_000, "num_envs": 64, "num_steps": 32, "num_minibatches": 32, "update_epochs": 10,
    "learning_rate": 3e-4, "ent_coef": 0.0, "vf_coef": 0.25, "log_std_init": -1.0, "norm_adv": False,
    "recompute_advantages": True, "target_kl": 0.05}}  # fmt: skip


def preset(env_id: str, env_kwargs: dict | None = None, name: str = "auto", mode: str = "sync") -> dict:
    """The arguments of Args that a preset sets; auto makes the environment to see its actions."""
    if name == "auto" and isinstance(env_kwargs or {}, dict):  # what is no dict, check refuses
        args = Args(env_id=env_id, env_kwargs=env_kwargs or {}, num_envs=1, vectorization_mode=mode)
        with closing_envs(make_envs(args)) as envs:
            name = "continuous" if isinstance(envs.single_action_space, spaces.Box) else "none"
    return PRESETS.get(name, {}) | {"preset": name}


class InputError(ValueError):
    """What the user asked for cannot be done; the message says why."""


RANGES = {  # valid values beside None, where a flag's type has it; nan > 0 is False, as is an empty range
    "seed eval_episodes checkpoint_interval": ("whole, from 0", lambda x: range(x + 1)),
    "device": ("auto or a device at hand", lambda x: x == "auto" or torch.zeros(1, device=x).tolist()),
    "num_envs num_steps num_minibatches update_epochs total_timesteps": ("whole, from 1", range),
    "hidden_sizes": ("whole numbers from 1", lambda x: all(range(units) for units in x)),
    "learning_rate ent_coef vf_coef": ("finite and at least 0", lambda x: 0 <= x < math.inf),
    "gamma gae_lambda": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "clip_coef max_grad_norm target_kl": ("finite and above 0", lambda x: 0 < x < math.inf),
    "dual_clip": ("finite and above 1", lambda x: 1 < x < math.inf),
    "log_std_init": ("from -20 to 2", lambda x: -20 <= x <= 2),
    "resume": ("the folder of a run", os.path.isdir),
    "evaluate": ("a path", lambda x: x != ""),
    "activation": ("tanh or relu", lambda x: x in ("tanh", "relu")),
    "env_kwargs": ("a JSON object, such as '{\"size\": 5}'", lambda x: isinstance(x, dict)),
}
CHANGEABLE = "total_timesteps checkpoint_interval device eval_episodes eval_stochastic capture_video"


def check(args: Args) -> None:
    """Raise InputError for what cannot be done, before anything is written."""
    for names, (requirement, holds) in RANGES.items():
        for name in names.split():
            value = getattr(args, name)
            with suppress(Exception):  # what cannot even be compared does not hold
                if (value is None and isinstance(None, Args.__annotations__[name])) or holds(value):
                    continue
            raise InputError(f"--{name.replace('_', '-')} must be {requirement}, not {value!r}.")
    if args.num_envs * (args.num_steps // 2) < 2 * args.num_minibatches:
        raise InputError("Too few --num-steps for two rows in each of --num-minibatches, if half are resets.")
    if path := args.resume or args.evaluate:  # a saved run keeps its flags, but for those that are CHANGEABLE
        mode = "resume" if args.resume else "evaluate"
        old, new = plain(load(path)["args"]), plain(replace(args, **{mode: None}))
        flags = [f"--{x.replace('_', '-')}" for x in old if x not in CHANGEABLE.split() and new[x] != old[x]]
        if flags:
            raise InputError(f"{', '.join(flags)} cannot be given with --{mode} {path}: it keeps its own.")
    if args.capture_video:  # a missing renderer shows now, not after the training
        args = replace(args, num_envs=1)
        with TemporaryDirectory() as tmp, closing(make_envs(args, video_folder=f"{tmp}/videos")) as envs:
            envs.reset()


# --- 2. Environments ---------------------------------------------------------------------------------------
def make_envs(args: Args, **video: str) -> gym.vector.VectorEnv:
    """Make the vector environment of a run, with observations flattened to vectors where necessary.
    Its `return_queue` and `length_queue` have the raw returns and lengths of episodes. With video, arguments
    of RecordVideo such as `video_folder`, episodes are filmed. Raises InputError if it cannot be made.
    """
    kwargs = args.env_kwargs | ({"render_mode": "rgb_array"} if video else {})
    try:
        module = "ale_py:" if args.env_id.startswith("ALE/") else ""  # which registers them
        envs = gym.make_vec(module + args.env_id, args.num_envs, args.vectorization_mode, **kwargs)
        if video:
            envs = RecordVideo(envs, episode_trigger=lambda _: True, video_length=2000, **video)
    except (gym.error.Error, ImportError, TypeError, ValueError, KeyError, AssertionError) as error:
        missing = [x.name for x in (error, error.__cause__) if isinstance(x, ModuleNotFoundError) and x.name]
        hint = f" (try `pip install {missing[0].split('.')[0]}`)" if missing else ""
        raise InputError(f"Cannot make {args.env_id}: {type(error).__name__}: {error}{hint}") from error
    mode, space = envs.metadata.get("autoreset_mode"), envs.single_observation_space
    if mode != gym.vector.AutoresetMode.NEXT_STEP:
        raise InputError(f"{args.env_id} has autoreset mode {mode}, but only NEXT_STEP is supported.")
    if isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) in (2, 3):
        gym.logger.warn(f"images {space.shape} are flattened: there is no convolutional network")
    if not space.is_np_flattenable or "Text(" in str(space) or "OneOf(" in str(space):
        raise InputError(f"Observation space {space} is not supported, or a part of it is not.")
    if not (isinstance(space, spaces.Box) and len(space.shape) == 1):
        envs = FlattenObservation(envs)
    # It keeps as many episodes as can end in an iteration; the usual key, "episode", may be in use already.
    return RecordEpisodeStatistics(envs, max(100, int(args.num_envs * args.num_steps)), "raw_episode")


# --- 3. Agent ----------------------------------------------------------------------------------------------
class RunningStats(nn.Module):
    """Mean and standard deviation of all rows given to `update`, by component; 0 and 1 before the first."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("std", torch.ones(shape))  # not the variance, which float32 might not hold
        self.register_buffer("count", torch.tensor(0))

    def update(self, x: Tensor) -> None:
        """Merge the rows x (B, *shape) with those before, in double precision (Chan, Golub, LeVeque 1983)."""
        x, mean, std = x.cpu().double(), self.mean.cpu().double(), self.std.cpu().double()
        weight = len(x) / (len(x) + self.count.item())  # of the new rows among all
        delta = x.mean(0) - mean
        var = (1 - weight) * (std**2 + weight * delta**2) + weight * x.var(0, correction=0)
        self.mean.copy_(mean + weight * delta)
        self.std.copy_(var.sqrt().clamp(min=1e-4))  # a constant is not to be blown up without bound
        self.count += len(x)


class Tanh(nn.Module):
    """tanh; of many elements as 2 sigmoid(2x) - 1, where that saves more time than it costs (on CPUs)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.numel() < 50_000 else (2 * x).sigmoid_().mul(2).sub_(1)


def mlp(sizes: list[int], activation: type[nn.Module], gain: float) -> nn.Sequential:
    """A multilayer perceptron; orthogonal weights, by sqrt 2 inside and `gain` at the output [37] #2."""
    layers = [nn.Linear(sizes[i], sizes[i + 1]) for i in range(len(sizes) - 1)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain if layer is layers[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*[module for layer in layers for module in (layer, activation())][:-1])


class Policy(NamedTuple):
    """pi(.|s) of B states: independent normals [37] #23, #25, or, without log_std, categoricals [37] #37."""

    output: Tensor  # means (B, D), or log-probabilities of the options, (B, options) or (B, C, options)
    log_std: Tensor | None  # (D,), the same in all states

    def log_prob(self, action: Tensor) -> Tensor:
        if self.log_std is None:
            return self.output.gather(-1, action.unsqueeze(-1)).flatten(1).sum(1)  # (B,)
        z = (action - self.output) / self.log_std.exp()  # (B, D)
        return -0.5 * z.square().sum(1) - (self.log_std + 0.5 * math.log(2 * math.pi)).sum()  # (B,)

    def entropy(self) -> Tensor:
        if self.log_std is None:
            return -(self.output.exp() * self.output).flatten(1).sum(1)  # (B,)
        return (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum().expand(len(self.output))  # (B,)


class Agent(nn.Module):
    """Policy pi(a|s) and value function V(s): two networks that share the scaling of obs alone [37] #13.
    `dist, value = agent(obs)` maps raw observations (B, *obs) to a Policy and values (B,) of scaled rewards.
    Actions (B, *action_shape) are indices from 0 or unbounded reals, which `to_env` converts to the space's.
    """

    def __init__(self, observation_space: spaces.Box, action_space: spaces.Space, args: Args):
        super().__init__()
        self.action_space, self.action_dtype, self.action_shape = action_space, np.int64, ()
        self.log_std = missing = None
        if isinstance(action_space, spaces.Discrete):
            num_outputs = int(action_space.n)
        elif isinstance(action_space, spaces.MultiDiscrete | spaces.MultiBinary):
            options = np.ravel(getattr(action_space, "nvec", np.full(action_space.shape, 2)))  # (C,)
            missing = np.arange(options.max()) >= options[:, None]  # (C, options), True where there is none
            num_outputs, self.action_shape = missing.size, options.shape
        elif isinstance(action_space, spaces.Box) and np.issubdtype(action_space.dtype, np.floating):
            num_outputs = math.prod(action_space.shape)
            self.action_shape, self.action_dtype = (num_outputs,), np.float32
            self.log_std = nn.Parameter(torch.full((num_outputs,), float(args.log_std_init)))  # [37] #24
            # [-1, 1] is mapped to [low, high] where both are real bounds; other dimensions are not mapped.
            bounds = np.stack([action_space.low, action_space.high], -1).astype(np.float64)  # (*shape, 2)
            bounds = np.where((abs(bounds) <= 1e6).all(-1, keepdims=True), bounds, (-1, 1))
            self.scale, self.shift = np.diff(bounds)[..., 0] / 2, bounds.mean(-1)
        else:
            raise InputError(f"Actions {action_space} are not supported (Discrete, Multi..., float Box are).")
        activation = Tanh if args.activation == "tanh" else nn.ReLU
        self.actor = mlp([*observation_space.shape, *args.hidden_sizes, num_outputs], activation, gain=0.01)
        self.critic = mlp([*observation_space.shape, *args.hidden_sizes, 1], activation, gain=1.0)
        if missing is not None:  # a bias rules out the options that a choice lacks; no gradient reaches it
            self.actor[-1].bias.data[missing.ravel()] = -1e9
            self.actor.append(nn.Unflatten(1, missing.shape))
        self.obs_stats = RunningStats(observation_space.shape) if args.norm_obs else None
        self.return_stats = RunningStats(()) if args.norm_reward else None

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations as the networks see them [37] #28-29."""
        stats = self.obs_stats
        return obs if stats is None else ((obs - stats.mean) / stats.std).clamp(-10, 10)

    def forward(self, obs: Tensor) -> tuple[Policy, Tensor]:
        features = self.normalize(obs)
        output, value = self.actor(features), self.critic(features).squeeze(-1)
        return Policy(output.log_softmax(-1) if self.log_std is None else output, self.log_std), value

    @torch.no_grad()
    def act(self, obs: Tensor, greedy: bool = False) -> Tensor:
        """Sample actions (B, *action_shape) for raw observations (B, *obs); greedy takes the likeliest."""
        output = self.actor(self.normalize(obs))
        if self.log_std is not None:
            return output if greedy else output + self.log_std.exp() * torch.randn_like(output)
        # Gumbel-max, where -log of Exp(1) noise is Gumbel: several times faster than drawing from softmax.
        return (output if greedy else output - torch.empty_like(output).exponential_().log()).argmax(-1)

    def to_env(self, action: np.ndarray) -> np.ndarray:
        """Convert sampled actions (B, *action_shape) to elements (B, *space.shape) of the action space."""
        space, action = self.action_space, action.reshape(-1, *self.action_space.shape)
        if self.log_std is None:
            return (action + getattr(space, "start", 0)).astype(space.dtype, copy=False)
        return (action * self.scale + self.shift).astype(space.dtype).clip(space.low, space.high)  # [37] #27

    def scalars(self) -> dict[str, float]:
        """Scalars of the agent itself for TensorBoard."""
        return {} if self.log_std is None else {"charts/action_std": self.log_std.exp().mean().item()}


# --- 4. Algorithm ------------------------------------------------------------------------------------------
class Minibatch(NamedTuple):
    """Rows to train on, with advantages as the loss is to use them."""

    obs: Tensor  # (M, *obs)
    action: Tensor  # (M, *action_shape)
    logprob: Tensor  # (M,), log pi_old(a|s), by the policy that acted
    value: Tensor  # (M,), V_old(s) of when advantages were computed, the centre of the value clip
    advantage: Tensor  # (M,)
    ret: Tensor  # (M,), the target of V(s)


def gae(reward: Tensor, value: Tensor, terminated: Tensor, done: Tensor, gamma: float, gae_lambda: float):
    """Generalised advantage estimation, for both kinds of episode ends.
    A terminated row has no value to come; a truncated one has that of its own final observation; neither gets
    an advantage from the next episode. Rows that are not valid come out meaningless, and affect no others.
    Takes (T, N), but value (T + 1, N); returns the advantage and the return, the target of V, both (T, N).
    """
    delta = reward + gamma * value[1:] * ~terminated - value[:-1]  # [PPO] eq. 12
    decay = gamma * gae_lambda * (~done).to(delta.dtype)
    advantage, future = torch.empty_like(delta), torch.zeros_like(delta[0])
    for t in reversed(range(len(delta))):
        advantage[t] = future = delta[t] + decay[t] * future  # [PPO] eq. 11, [GAE] eq. 16
    return advantage, advantage + value[:-1]


def ppo_loss(agent: nn.Module, minibatch: Minibatch, args: Args, clip_coef: float) -> tuple[Tensor, dict]:
    """The scalar loss, which is the objective [PPO] eq. 9 negated, and detached scalars for logging."""
    dist, value = agent(minibatch.obs)
    logratio = dist.log_prob(minibatch.action) - minibatch.logprob
    ratio = logratio.exp()  # (M,), pi(a|s) / pi_old(a|s); 1, but for rounding, on the first minibatch
    # Clipped surrogate: nothing is gained by moving the ratio away from 1 by more than epsilon [PPO] eq. 7.
    advantage = minibatch.advantage
    surrogate = torch.min(ratio * advantage, ratio.clamp(1 - clip_coef, 1 + clip_coef) * advantage)
    if args.dual_clip is not None:  # nor lost without bound where A < 0, arXiv:1912.09729 eq. 5
        surrogate = torch.where(advantage < 0, surrogate.max(args.dual_clip * advantage), surrogate)
    policy_loss = -surrogate.mean()
    # Value loss: with clipping, the larger of the errors of V and of V within epsilon of V_old [37] #9.
    error = (value - minibatch.ret).square()  # (M,)
    if args.clip_vloss:
        clipped = value.clamp(minibatch.value - clip_coef, minibatch.value + clip_coef)
        error = torch.max(error, (clipped - minibatch.ret).square())
    value_loss = 0.5 * error.mean()
    entropy = dist.entropy().mean()
    loss = policy_loss + args.vf_coef * value_loss - args.ent_coef * entropy
    info = {"policy_loss": policy_loss, "value_loss": value_loss, "entropy": entropy}
    info |= {"old_approx_kl": -logratio.mean(), "approx_kl": (ratio - 1 - logratio).mean()}  # [KL] k1, k3
    info |= {"clipfrac": ((ratio - 1).abs() > clip_coef).float().mean()}
    return loss, {name: x.detach() for name, x in info.items()}


@torch.no_grad()
def logprob_and_value(agent: Agent, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Log pi(a|s) (T, N) and V(s) (T + 1, N) of obs (T + 1, N, *obs) and action, in chunks for the memory."""
    action = torch.cat([action, action[-1:]])  # V is wanted of the last obs too, log pi is not
    chunks = zip(obs.flatten(0, 1).split(4096), action.flatten(0, 1).split(4096), strict=True)
    outputs = [(dist.log_prob(a), value) for o, a in chunks for dist, value in [agent(o)]]
    logprob, value = (torch.cat(x).view(len(obs), -1) for x in zip(*outputs, strict=True))
    return logprob[:-1], value


class Adam(nn.Module):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) on one vector (P,), of which the parameters become views."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.vector = nn.utils.parameters_to_vector(parameters).detach()
        nn.utils.vector_to_parameters(self.vector, parameters)  # makes views
        self.register_buffer("moments", self.vector.new_zeros(2, len(self.vector)))  # first and second
        self.register_buffer("count", torch.tensor(0))  # stays on the CPU, where reading it does not wait

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Move the parameters against the gradient (P,), by algorithm 1 in the faster order of section 2."""
        (mean, square), t = self.moments, self.count.add_(1).item()
        mean.lerp_(gradient, 1 - 0.9)
        square.lerp_(gradient.square(), 1 - 0.999)
        root = math.sqrt(1 - 0.999**t)  # of the bias correction of square; epsilon is 1e-5 [37] #3
        self.vector.addcdiv_(mean, square.sqrt() + 1e-5 * root, value=-learning_rate * root / (1 - 0.9**t))


# --- 5. Training loop --------------------------------------------------------------------------------------
def train(args: Args) -> Agent:
    """Train an agent, write to runs/<run>/, evaluate and return it; sets all seeds and torch's threads.
    Raises InputError (a ValueError) or DependencyNotInstalled before writing; FloatingPointError at a nan.
    """
    check(args)
    device = torch.device("cpu" if args.device == "auto" else args.device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # faster than more for layers as small as these
    torch.backends.cudnn.deterministic = args.torch_deterministic
    env_seed = reseed(args)
    T, N = args.num_steps, args.num_envs
    num_iterations = math.ceil(args.total_timesteps / (T * N))  # never fewer steps than asked for
    with closing_envs(make_envs(args)) as envs, ExitStack() as stack:
        agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
        parameters = [x for x in agent.parameters() if x.requires_grad]
        optimizer = Adam(parameters)  # torch.optim's is slower on small networks, and imports a compiler
        rollout = SimpleNamespace(  # row t led from obs[t] to obs[t + 1]; filled anew in every iteration
            obs=np.zeros((T + 1, N, *envs.single_observation_space.shape), np.float32),  # raw
            action=np.zeros((T, N, *agent.action_shape), agent.action_dtype),  # as sampled
            reward=np.zeros((T, N), np.float32),  # raw
            discounted=np.zeros((T, N), np.float32),  # discounted sum of the episode's rewards so far
            terminated=np.zeros((T, N), bool),  # the episode ended in a state that has no future
            done=np.zeros((T, N), bool),  # the episode ended, terminated or truncated
            valid=np.zeros((T, N), bool),  # the action was carried out: this row was no reset
        )
        start = load(args.resume, agent=agent, optimizer=optimizer) if args.resume else {"iteration": 0}
        if start["iteration"] >= num_iterations:
            print(f"{args.resume} is complete. A larger --total-timesteps trains it further.")
            return agent
        envs.reset(seed=env_seed)  # what fails here fails before anything is written
        run = stack.enter_context(closing(Run(args, envs, agent, optimizer, start)))
        default = max(num_iterations // 100, math.ceil(10_000 / T))  # 10,000 steps between cuts, or more
        interval = default if args.checkpoint_interval is None else args.checkpoint_interval
        for iteration in range(start["iteration"], num_iterations):
            # A resumed run begins here, and an unbroken one begins anew, so that both go on alike: the states
            # of environments and generators need no saving. Running episodes are cut, not marked as ended.
            if iteration == start["iteration"] or (interval and iteration % interval == 0):
                if interval:
                    run.save(iteration)
                rollout.obs[T], _ = envs.reset(seed=reseed(args, iteration))
                discounted, done = np.zeros(N), np.zeros(N, bool)  # of the row before

            # Anneal linearly: 1 in the first iteration, 1 / num_iterations in the last [37] #4.
            remaining = 1 - iteration / num_iterations
            clip_coef = args.clip_coef * (remaining if args.anneal_clip else 1)
            learning_rate = float(args.learning_rate) * (remaining if args.anneal_lr else 1)

            # Rollout: act for T steps, from where the last rollout ended [37] #1.
            rollout.obs[0] = rollout.obs[T]
            try:
                for t in range(T):
                    action = agent.act(torch.from_numpy(rollout.obs[t]).to(device)).cpu().numpy()
                    rollout.action[t], rollout.valid[t] = action, ~done
                    obs, reward, terminated, truncated, _ = envs.step(agent.to_env(action))
                    rollout.obs[t + 1], rollout.reward[t], rollout.terminated[t] = obs, reward, terminated
                    rollout.discounted[t] = discounted = args.gamma * discounted * ~done + reward
                    rollout.done[t] = done = terminated | truncated
            finally:
                check_finite({"obs": rollout.obs, "action": rollout.action, "reward": rollout.reward})
            data = SimpleNamespace(**{k: torch.from_numpy(x).to(device) for k, x in vars(rollout).items()})

            # Advantages (T, N), from rewards divided by the running deviation of the return [37] #30-31.
            reward = data.reward
            if agent.return_stats is not None:
                agent.return_stats.update(data.discounted[data.valid])
                reward = (reward / agent.return_stats.std).clamp(-10, 10)
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
                parts = (x.flatten(0, 1)[order].tensor_split(args.num_minibatches) for x in columns)
                for minibatch in map(Minibatch, *parts):
                    if args.norm_adv:  # [37] #7
                        adv = minibatch.advantage
                        minibatch = minibatch._replace(advantage=(adv - adv.mean()) / (adv.std() + 1e-8))
                    loss, info = ppo_loss(agent, minibatch, args, clip_coef)
                    # KL stop: the policy has moved too far already, so this step is not taken.
                    stop = args.target_kl is not None and info["approx_kl"].item() > args.target_kl
                    if stop:
                        break
                    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
                    gradient = torch.cat([x.flatten() for x in gradients])  # (P,), of all parameters
                    info["grad_norm"] = norm = gradient.norm()
                    gradient *= ((args.max_grad_norm or math.inf) / norm).clamp(max=1)  # [37] #11
                    optimizer.step(gradient, learning_rate)
                    infos.append(info)
                if stop:
                    break
            if agent.obs_stats is not None:  # not before, as that would change the log-probabilities
                agent.obs_stats.update(data.obs[:-1][data.valid])
            losses = {name: torch.stack([x[name] for x in infos]).cpu().numpy() for name in dict(*infos[:1])}
            check_finite(losses)  # there are none, if the KL stop came before the first step
            scalars = {f"losses/{name}": x.mean() for name, x in losses.items()} | agent.scalars()
            scalars["losses/explained_variance"] = 1 - unexplained.item()
            run.log(iteration + 1, num_iterations, scalars | {"charts/learning_rate": learning_rate})
        run.save(num_iterations)
    if args.eval_episodes:
        evaluate(run.path, args)
    return agent


# --- 6. Plumbing: nothing below is PPO ---------------------------------------------------------------------
def reseed(args: Args, *key: int) -> int:
    """Seed all generators by args.seed and key; return the first environment's seed, to count up from."""
    env_seed, seed = map(int, np.random.SeedSequence(args.seed, spawn_key=key).generate_state(2))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (some environments draw from the global generator)
    torch.manual_seed(seed)
    return env_seed % 2**30  # native vector environments accept less than 2**31


@contextmanager
def closing_envs(envs: gym.vector.VectorEnv):
    """Close the environments at the end; after a failure, without waiting for workers, which may be dead."""
    try:
        yield envs
        envs.close()
    finally:  # which does nothing after a success
        for worker in getattr(envs.unwrapped, "processes", ()):
            envs.unwrapped.closed = True  # or Gymnasium would wait for an answer
            worker.terminate()
            worker.join(0.5)  # for it to close its environment
            worker.kill()
        envs.unwrapped.close()  # without the wrappers, of which one may be filming


def check_finite(columns: dict[str, np.ndarray]) -> None:
    """Raise FloatingPointError for the first nan or infinity along axis 0, and say what is being raised."""
    first = {name: bad.tolist() for name, x in columns.items() for bad in np.argwhere(~np.isfinite(x))[:1]}
    if first:
        name = min(first, key=lambda name: first[name][0])  # of equals, the one that columns has first
        found, failure = f"{name}{first[name]} is {columns[name][tuple(first[name])]}", sys.exc_info()[1]
        raise FloatingPointError(found + (f", upon which came {failure!r}" if failure else ""))


class Run:
    """The folder of a run, with its checkpoints and TensorBoard's log, and what the console shows."""

    def __init__(self, args: Args, envs: gym.vector.VectorEnv, agent: Agent, optimizer: Adam, start: dict):
        self.args, self.agent, self.optimizer = replace(args, resume=None), agent, optimizer
        self.batch_size = int(args.num_envs * args.num_steps)
        self.first_step, self.best = start.get("global_step", 0), start.get("best", -math.inf)
        made_up = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
        name = "".join(c if c.isalnum() or c in "_-." else "-" for c in args.run_name or made_up)
        self.path = args.resume or os.path.join("runs", name.strip(".-") or "run")
        try:
            os.makedirs(self.path, exist_ok=bool(args.resume))
        except OSError as error:
            raise InputError(f"Cannot make folder {self.path}: {error.strerror}; set --run-name.") from error
        self.writer = SummaryWriter(self.path, purge_step=self.first_step + 1 if args.resume else None)
        flags = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
        self.writer.add_text("hyperparameters", "|flag|value|\n|-|-|\n" + flags, self.first_step)
        print(f"run: {self.path}, from step {self.first_step:,}, preset {args.preset}")
        print(f"environments: {args.num_envs} x {args.env_id}, {args.vectorization_mode}")
        print(f"spaces: {envs.single_observation_space.shape} -> {envs.single_action_space!s:.80}")
        print(f"agent: {len(optimizer.vector):,} parameters on {optimizer.vector.device}", flush=True)
        while not isinstance(envs, RecordEpisodeStatistics):  # where other wrappers are above it
            envs = envs.env
        self.record, self.queues = envs, (envs.return_queue, envs.length_queue)
        for queue, recent in zip(self.queues, start.get("recent", ([], [])), strict=True):
            queue.extend(recent)
        self.line, self.start = f"{self.first_step:,} steps", time.perf_counter()  # leaves start-up out

    def log(self, count: int, total: int, scalars: dict[str, float]) -> None:
        """Log the scalars, episodes and speed of iteration `count` of `total`, and show the progress."""
        step, seconds = count * self.batch_size, time.perf_counter() - self.start
        scalars["charts/SPS"] = speed = (step - self.first_step) / seconds
        returns, lengths = (np.array(queue) for queue in self.queues)
        new, self.record.episode_count = self.record.episode_count, 0
        if new:
            scalars |= {"charts/episodes": new, "charts/episodic_length": lengths[-new:].mean()}
            for suffix, statistic in ("", np.mean), ("_min", np.min), ("_max", np.max):
                scalars["charts/episodic_return" + suffix] = statistic(returns[-new:])
        for tag, value in scalars.items():
            if math.isfinite(value):  # explained variance is not, where all returns are the same
                self.writer.add_scalar(tag, value, step)
        left = timedelta(seconds=round((total - count) * self.batch_size / speed))
        self.line = f"{step:,} steps ({count / total:.0%}), {speed:,.0f} steps/s"
        if len(returns):
            self.line += f", return {returns[-100:].mean():.1f}, length {lengths[-100:].mean():.1f}"
        if sys.stdout.isatty():  # one line that updates itself; in a file, 32 lines
            width = (os.get_terminal_size().columns or 80) - 1
            print(f"\r{f'{self.line}, {left} left':{width}.{width}}", end="", flush=True)
        elif count * 32 // total > (count - 1) * 32 // total:
            print(f"{self.line}, {left} left", flush=True)

    def save(self, iteration: int) -> None:
        """Write checkpoint.pt, and before it best.pt if the last 100 episodes are the best so far."""
        self.writer.flush()  # a resumed run logs only what comes after the checkpoint
        recent = [np.array(queue)[-100:].tolist() for queue in self.queues]
        mean = sum(recent[0]) / 100 if len(recent[0]) == 100 else -math.inf
        names = ["best.pt", "checkpoint.pt"] if mean > self.best else ["checkpoint.pt"]
        self.best, step = max(mean, self.best), iteration * self.batch_size
        where = {"iteration": iteration, "global_step": step, "recent": recent, "best": self.best}
        state = {"agent": self.agent.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({"format": 2, "args": plain(self.args)} | where | state, buffer := io.BytesIO())
        for path in (os.path.join(self.path, name) for name in names):
            with open(path + ".tmp", "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".tmp", path)  # whenever the power fails, path is whole, the old or the new

    def close(self) -> None:
        """Say where the run has ended and how to go on from there, and flush TensorBoard."""
        print(f"\nend: {self.line}, after {timedelta(seconds=round(time.perf_counter() - self.start))}")
        if os.path.exists(os.path.join(self.path, "checkpoint.pt")):
            step = load(self.path)["global_step"]  # a signal may have come before save returned
            way = "evaluate" if step >= self.args.total_timesteps else "resume"
            print(f"{way} from step {step:,}: python ppo.py --{way} {self.path}", flush=True)
        self.writer.close()


def plain(args: Args) -> dict:
    """The flags in types of JSON: numpy's values as numbers and lists, other objects by their names."""
    return json.loads(json.dumps(vars(args), default=lambda x: getattr(x, "tolist", x.__str__)()))


def load(path: str, **parts: nn.Module) -> dict:
    """Read the checkpoint at path, a run's folder or a .pt file; restore the parts agent and optimizer."""
    path = os.path.join(path, "checkpoint.pt") if os.path.isdir(path) else path
    try:
        if zipfile.ZipFile(path).testzip():  # torch itself checks no checksums
            raise ValueError("it is damaged")
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))  # executes nothing
        if checkpoint["format"] != 2:
            raise ValueError(f"its format is {checkpoint['format']}, not 2")
        hidden_sizes = tuple(checkpoint["args"].pop("hidden_sizes"))  # a list in the file
        checkpoint["args"] = Args(**checkpoint["args"], hidden_sizes=hidden_sizes)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
    except Exception as error:
        reason = " ".join(str(error).split()).split(". ")[0]  # its first sentence
        raise InputError(f"Cannot use {path}: {type(error).__name__}: {reason}.") from error
    return checkpoint


def load_agent(path: str) -> Agent:
    """The trained agent of a run's folder, or of a .pt file, on the CPU. Raises InputError, a ValueError."""
    args = load(path)["args"]
    with closing_envs(make_envs(replace(args, num_envs=1))) as envs:
        agent = Agent(envs.single_observation_space, envs.single_action_space, args)
    load(path, agent=agent)
    return agent


def evaluate(path: str, args: Args) -> None:
    """Run args.eval_episodes episodes of the agent saved at path, seeded; log and print their raw returns."""
    check(replace(args, device="auto"))  # it runs on the CPU
    step, env_seed, returns = load(path)["global_step"], reseed(args), np.zeros(args.eval_episodes or 10)
    folder = path if os.path.isdir(path) else os.path.dirname(path) or "."
    video = {"video_folder": f"{folder}/videos", "name_prefix": f"step-{step}"} if args.capture_video else {}
    with closing_envs(make_envs(replace(args, num_envs=1), **video)) as envs:
        agent = Agent(envs.single_observation_space, envs.single_action_space, args)
        load(path, agent=agent)
        for episode in range(len(returns)):
            obs, _ = envs.reset(seed=env_seed + episode)
            for _ in range(100_000):  # an agent may balance for ever
                action = agent.act(torch.as_tensor(obs, dtype=torch.float32), not args.eval_stochastic)
                obs, reward, terminated, truncated, _ = envs.step(agent.to_env(action.numpy()))
                returns[episode] += reward.item()
                if terminated or truncated:
                    break
    mean, std, low, high = returns.mean(), returns.std(), returns.min(), returns.max()
    how = f"{len(returns)} episodes, {'stochastic' if args.eval_stochastic else 'greedy'}"
    print(f"eval: mean {mean:.1f} std {std:.1f} min {low:.1f} max {high:.1f} ({how})", flush=True)
    with closing(SummaryWriter(folder)) as writer:
        writer.add_scalar("eval/episodic_return", mean, step)


# --- 7. Main -----------------------------------------------------------------------------------------------
def main() -> None:
    """Do what the command line says. Exit code 2: bad input; 1: the run cannot go on; 128 + n: signal n."""

    def leave(signum: int, _frame: object) -> None:
        # Once more after a while, as Python swallows what is raised in a __del__.
        threading.Thread(target=lambda: (time.sleep(0.2), signal.raise_signal(signum)), daemon=True).start()
        if not isinstance(sys.exc_info()[1], SystemExit):  # else the end is under way
            sys.exit(128 + signum)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, leave)
    # What fails in TensorBoard's thread is raised here too, and needs no traceback of its own.
    threading.excepthook = lambda x: isinstance(x.exc_value, OSError) or threading.__excepthook__(x)
    try:
        args, _ = tyro.cli(Args, default=Args(preset="auto"), return_unknown_args=True, add_help=False)
        flags = args.env_id, args.env_kwargs, args.preset, args.vectorization_mode
        default = load(path)["args"] if (path := args.resume or args.evaluate) else Args(**preset(*flags))
        args = tyro.cli(Args, default=default)  # again, as the first pass decided on the defaults
        args.preset = default.preset if args.preset == "auto" else args.preset  # what auto came to
        evaluate(args.evaluate, args) if args.evaluate else train(args)
    except (InputError, gym.error.DependencyNotInstalled, FloatingPointError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise  # not a full disk, but some fault of the environment
        print(f"ppo.py: {error}", file=sys.stderr)
        sys.exit(1 if isinstance(error, FloatingPointError | OSError) else 2)
    finally:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)  # nothing disturbs the end of the interpreter


if __name__ == "__main__":
    main()
