"""Each patch of tests/forks still applies, and does what it is there for."""

import copy
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pieces
import pytest
import tasks
import torch
from gymnasium import spaces

import ppo

pytestmark = pytest.mark.upstream

TESTS = Path(__file__).parent
ROOT = TESTS.parent
MOST_LINES = {  # added or changed
    "recurrent": 80,
    "action-mask": 30,
    "rnd": 70,
    "muon": 12,
    "gsde": 50,
    "squashed": 25,
    "spo": 8,
    "wandb": 10,
    "export": 20,
}


@pytest.fixture(scope="session")
def fork_folder(tmp_path_factory):
    """Makes a folder with a copy of ppo.py that a patch is applied to, once for each patch."""
    root = tmp_path_factory.mktemp("forks")

    def make(name):
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            shutil.copy(ROOT / "ppo.py", folder)
            shutil.copy(ROOT / ".ruff.toml", folder)
            # Without the ceiling, git would look for a repository that the folder may be in.
            environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root)}
            command = ["git", "apply", TESTS / "forks" / f"{name}.patch"]
            subprocess.run(command, cwd=folder, env=environment, check=True)
        return folder

    return make


@pytest.fixture
def fork(fork_folder, monkeypatch):
    """Imports a fork; the Learner of `pieces` is then made of that."""

    def load(name):
        module_name = f"fork_{name}".replace("-", "_")
        if module_name not in sys.modules:
            path = fork_folder(name) / "ppo.py"
            spec = importlib.util.spec_from_file_location(module_name, path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[module_name] = module
            spec.loader.exec_module(module)
        monkeypatch.setattr(pieces, "ppo", sys.modules[module_name])
        return sys.modules[module_name]

    return load


def run_in(folder, *words, **environment):
    command = [sys.executable, *map(str, words)]
    variables = {**os.environ, "PYTHONPATH": str(TESTS), **environment}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)


def trained(module, *flags, **options):
    """The agent that a command line trains."""
    return module.train(module.parse_args([*flags, "--eval-episodes", "20"]), **options)


def small_agent(module, observation_space, action_space, **flags):
    torch.manual_seed(0)
    return module.Agent(observation_space, action_space, module.Args(**flags))


# --- Of all of them -------------------------------------------------------------------------------
def test_no_patch_is_forgotten():
    assert {path.stem for path in (TESTS / "forks").glob("*.patch")} == set(MOST_LINES)


@pytest.mark.parametrize("name", MOST_LINES)
def test_ruff(name, fork_folder):
    for command in (["check"], ["format", "--check"]):
        result = run_in(fork_folder(name), "-m", "ruff", *command, "--no-cache", "ppo.py")
        assert result.returncode == 0, result.stdout


def table(file, name):
    """The number of lines that a table says of a fork."""
    (row,) = re.findall(rf"^\| \[?`?{name}\b.*$", (ROOT / file).read_text(), re.M)
    return int(re.search(r"\| (\d+) \|", row).group(1))


@pytest.mark.parametrize("name", MOST_LINES)
def test_lines(name):
    """They are few enough, and those that the tables say."""
    patch = TESTS / "forks" / f"{name}.patch"
    command = ["git", "apply", "--numstat", patch]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = int(result.stdout.split()[0])
    assert lines <= MOST_LINES[name]
    assert table("tests/forks/README.md", name) == lines
    assert table("README.md", name) == lines


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("recurrent", "CartPole-v1"),
        ("recurrent", "Pendulum-v1"),
        ("recurrent", "test_images:Square-v0"),
        ("action-mask", "tasks:Masked-v0"),
        ("rnd", "CartPole-v1"),
        ("gsde", "Pendulum-v1"),
        ("squashed", "Pendulum-v1"),
        ("spo", "CartPole-v1"),
    ],
)
def test_ratios_are_1_as_long_as_nothing_is_learnt(name, env_id, fork):
    """So old and new probabilities are of the same rows, masks, memories and distributions."""
    module = fork(name)
    flags = {"env_id": env_id, "num_envs": 8, "num_steps": 32, "learning_rate": 0.0}
    args = module.Args(**flags, recompute_advantages=True)
    with pieces.learner(args, module.Agent) as learner:
        learner.collect()  # the next rollout begins within episodes
        rollout = learner.collect()
        assert rollout.done.any() or env_id == "Pendulum-v1"
        infos = learner.update(rollout, learner.estimate(rollout))
    assert len(infos) == 16
    for info in infos:
        assert abs(info["approx_kl"]) < 1e-6
        assert info["clipfrac"] == 0


# --- recurrent ------------------------------------------------------------------------------------
CUE = ("--env-id", "tasks:Cue-v0", "--num-envs", "8", "--num-steps", "64")
CUE = (*CUE, "--total-timesteps", "30_000")


def test_memory_solves_what_needs_one(fork):
    assert trained(fork("recurrent"), *CUE).eval_returns.mean() == 1


def test_without_memory_it_is_guessed():
    assert abs(trained(ppo, *CUE).eval_returns.mean()) < 0.7


def gru(x, h, weights):
    """A step of a gated recurrent unit, as torch's documentation writes it."""
    inputs = weights["gru.weight_ih"] @ x + weights["gru.bias_ih"]
    hidden = weights["gru.weight_hh"] @ h + weights["gru.bias_hh"]
    r_in, z_in, n_in = np.split(inputs, 3)
    r_hidden, z_hidden, n_hidden = np.split(hidden, 3)
    r = 1 / (1 + np.exp(-r_in - r_hidden))
    z = 1 / (1 + np.exp(-z_in - z_hidden))
    n = np.tanh(n_in + r * n_hidden)
    return (1 - z) * n + z * h


def test_memory_lasts_an_episode_and_its_invalid_row(fork):
    """Values are those of every episode read alone, from its first observation, at all ends."""
    module = fork("recurrent")
    args = module.Args(env_id="probes:Spaces-v0", num_envs=8, num_steps=6, num_minibatches=1)
    rollouts = []
    memories = []
    with pieces.learner(args, module.Agent) as learner:
        for _ in range(8):
            rollouts.append(learner.collect())
            memories.append(learner.state.memory)
        agent = learner.agent
    values = [module.logprob_and_value(agent, rollout)[1] for rollout in rollouts]
    for before, after in itertools.pairwise(values):
        assert torch.allclose(before[-1], after[0], atol=1e-5)
    obs = torch.cat([x.obs[:-1] for x in rollouts]).numpy()  # (48, 8, 3)
    value = torch.cat([x[:-1] for x in values])
    done = torch.cat([x.done for x in rollouts])
    terminated = torch.cat([x.terminated for x in rollouts])
    assert terminated.any()
    assert (done & ~terminated).any()
    assert done[5:-1:6].any()  # so a rollout began with a row that is not valid
    assert done[4:-1:6].any()  # and one with a new episode
    weights = {name: x.numpy().astype(float) for name, x in agent.state_dict().items()}
    for env in range(8):
        begins = 0  # the row of the episode's first observation: two after the last of the other
        h = np.zeros(64)
        for t in range(48):
            h = gru(obs[t, env].clip(-10, 10), 0 * h if t == begins else h, weights)
            expected = agent.critic(torch.tensor(h).float()).item()
            assert value[t, env].item() == pytest.approx(expected, abs=1e-4)
            if t % 6 == 5:
                carried = memories[t // 6][env].numpy()
                assert carried == pytest.approx(0 * h if begins == t + 1 else h, abs=1e-4)
            if done[t, env]:
                begins = t + 2


def test_a_minibatch_needs_an_environment(fork):
    module = fork("recurrent")
    with pytest.raises(module.InputError, match="--num-minibatches must be at most 3, an env"):
        module.check(module.Args(num_envs=3, num_minibatches=4))


def test_memory_ends_with_a_life(fork, monkeypatch):
    """In an evaluation as in training: after the row that follows, in which FIRE is pressed."""
    module = fork("recurrent")

    class Game(gym.vector.VectorWrapper):
        def step(self, action):
            *step, info = self.env.step(action)
            self.t += 1
            info["life_lost"] = np.array([self.t == 3])
            return (*step[:2], step[2] | info["life_lost"], step[3], info)

        def reset(self, **kwargs):
            self.t = 0
            return self.env.reset(**kwargs)

    class Recorder(module.Agent):
        def act(self, obs, memory, *args):
            memories.append(memory.clone())
            return super().act(obs, memory, *args)

    make_envs = module.make_envs
    monkeypatch.setattr(module, "make_envs", lambda *args: Game(make_envs(*args)))
    memories = []
    args = module.Args(env_id="tasks:Cue-v0", eval_episodes=1)
    agent = small_agent(module, tasks.Cue.observation_space, tasks.Cue.action_space)
    agent.__class__ = Recorder
    module.play(agent, args, ".", 0)
    cleared = [not memory.any() for memory in memories]
    assert cleared == [True, False, False, False, True, False]  # obs 3 is that of the lost life


def test_minibatches_hold_environments_in_time_order(fork):
    module = fork("recurrent")
    args = module.Args(num_envs=5, num_steps=40, num_minibatches=2)
    with pieces.learner(args, module.Agent) as learner:
        rollout = learner.collect()
        batch = learner.estimate(rollout)
        parts = list(module.minibatches(batch, 2, learner.generator))
    assert sorted(part.obs.shape[1] for part in parts) == [2, 3]
    assert sum(len(part.action) for part in parts) == rollout.valid.sum() < 5 * 40
    for part in parts:
        numbers = torch.full(part.valid.shape, -1)
        numbers[part.valid] = torch.arange(len(part.action))  # where the row of (t, b) is
        for b in range(part.obs.shape[1]):
            (n,) = [n for n in range(5) if torch.equal(part.obs[:, b], rollout.obs[:-1, n])]
            valid = rollout.valid[:, n]
            assert torch.equal(part.valid[:, b], valid)
            assert torch.equal(part.action[numbers[valid, b]], rollout.action[valid, n])
            assert torch.equal(part.target[numbers[valid, b]], batch.target[valid, n])


# --- action-mask ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_only_allowed_actions_are_sent(mode, fork):
    """The environment raises an error at others."""
    flags = ("--env-id", "tasks:Masked-v0", "--num-envs", "8", "--num-steps", "64")
    flags = (*flags, "--vectorization-mode", mode, "--run-name", "masked")
    agent = trained(fork("action-mask"), *flags, "--total-timesteps", "20_000")
    assert agent.eval_returns.mean() > 3.5  # of 4; 2 by chance
    entropy = pieces.values("runs/masked", "losses/entropy")
    assert entropy[0] == pytest.approx(math.log(2), abs=0.01)  # two are allowed, not twelve
    assert np.isfinite(entropy).all()


def test_without_masks_others_are_sent():
    with pytest.raises(AssertionError, match="not allowed"):
        trained(ppo, "--env-id", "tasks:Masked-v0", "--total-timesteps", "1000")


def test_masks_are_those_of_the_observations(fork):
    module = fork("action-mask")
    args = module.Args(env_id="tasks:Masked-v0", num_envs=4, num_steps=32)
    with pieces.learner(args, module.Agent) as learner:
        for _ in range(2):
            rollout = learner.collect()
            assert torch.equal(rollout.obs.bool(), rollout.mask)  # the environment shows it, too
            batch = learner.estimate(rollout)
            assert torch.equal(batch.obs.bool(), batch.mask)
            assert batch.mask.gather(1, batch.action[:, None]).all()


def test_masks_of_several_choices(fork):
    """A row for each choice, as long as the longest one."""
    agent = small_agent(fork("action-mask"), spaces.Box(-9, 9, (3,)), spaces.MultiDiscrete([2, 3]))
    mask = torch.tensor([[1, 0, 0], [0, 1, 1]]).bool().flatten().repeat(500, 1)
    action = agent.act(torch.randn(500, 3), mask, generator=torch.Generator().manual_seed(0))
    assert action.unique(dim=0).tolist() == [[0, 1], [0, 2]]


# --- rnd ------------------------------------------------------------------------------------------
CHAIN = ("--env-id", "tasks:Chain-v0", "--num-envs", "8", "--total-timesteps", "100_000")


def test_novelty_leads_to_a_sparse_reward(fork):
    assert trained(fork("rnd"), *CHAIN).eval_returns.mean() == 1


@pytest.mark.parametrize("name", ["ppo", "rnd"])
def test_without_novelty_it_is_not_found(name, fork):
    module, flags = (ppo, ()) if name == "ppo" else (fork("rnd"), ("--int-coef", "0"))
    assert trained(module, *CHAIN, *flags).eval_returns.mean() == 0


def test_intrinsic_advantages_by_hand(fork):
    """They go on over the end of an episode; the row that is not valid there is a mere step."""
    module = fork("rnd")
    g, decay = 0.9, 0.9 * 0.8
    args = module.Args(int_gamma=g, gae_lambda=0.8, int_coef=1.0, ext_coef=0.0)
    agent = small_agent(module, spaces.Box(-9, 9, (1,)), spaces.Discrete(2))
    agent.int_return_stats.std.fill_(2.0)
    with torch.no_grad():
        for x in agent.critic.parameters():
            x.normal_()
    obs = torch.tensor([1.0, 2.0, -3.0, 0.5, 4.0]).view(5, 1, 1)  # row 1 ends an episode
    column = torch.zeros(4, 1)
    rollout = module.Rollout(
        obs=obs,
        action=column.long(),
        reward=column,
        int_reward=torch.tensor([[0.2], [0.4], [0.0], [0.8]]),
        int_return=column,
        terminated=torch.tensor([[False], [True], [False], [False]]),
        done=torch.tensor([[False], [True], [False], [False]]),
        valid=torch.tensor([[True], [True], [False], [True]]),
        discounted_return=column,
        episode_return=np.zeros(0),
        episode_length=np.zeros(0),
    )
    batch = module.estimate_advantages(agent, rollout, args)
    v = agent(obs.flatten(0, 1))[1][:, 1].tolist()
    d3 = 0.4 + g * v[4] - v[3]
    d1 = 0.2 + g * (g * v[3]) - v[1]
    d0 = 0.1 + g * v[1] - v[0]
    a1 = d1 + decay**2 * d3
    expected = [d0 + decay * a1, a1, d3]
    assert batch.advantage.tolist() == pytest.approx(expected, abs=1e-5)
    targets = [expected[0] + v[0], expected[1] + v[1], expected[2] + v[3]]
    assert batch.target[:, 1].tolist() == pytest.approx(targets, abs=1e-5)
    assert batch.next_obs.flatten().tolist() == [2, -3, 4]

    # Where the last row ends an episode, what was before it stands for what follows.
    done = rollout.done.clone()
    done[3] = True
    batch = module.estimate_advantages(agent, rollout._replace(done=done), args)
    assert batch.advantage[2].item() == pytest.approx(0.4 + g * v[3] - v[3], abs=1e-5)


def test_novelty_is_of_what_actions_led_to_and_wears_off(fork):
    module = fork("rnd")
    args = module.Args(env_id="tasks:Chain-v0", num_envs=4, num_steps=64)
    with pieces.learner(args, module.Agent) as learner:
        target = copy.deepcopy(learner.agent.random_target.state_dict())
        rollout = learner.collect()
        with torch.no_grad():
            novelty = learner.agent.novelty(rollout.obs[1:].flatten(0, 1)).view(64, 4)
        assert torch.allclose(rollout.int_reward, novelty * rollout.valid, atol=1e-6)
        for _ in range(20):
            learner.update(rollout, learner.estimate(rollout))
        with torch.no_grad():
            later = learner.agent.novelty(rollout.obs[1:][rollout.valid]).mean()
            unseen = learner.agent.novelty(torch.eye(16)[8:]).mean()
    assert later < 0.1 * novelty.mean()
    assert later < 0.1 * unseen
    after = learner.agent.random_target.state_dict()
    assert all(torch.equal(target[name], after[name]) for name in target)


def test_intrinsic_statistics_by_hand(fork):
    """The deviation of the discounted sum of all intrinsic rewards so far, whatever ended."""
    module = fork("rnd")
    args = module.Args(env_id="tasks:Chain-v0", num_envs=4, num_steps=64, int_gamma=0.8)
    with pieces.learner(args, module.Agent) as learner:
        rollouts = [learner.collect() for _ in range(3)]
    rewards = torch.cat([rollout.int_reward for rollout in rollouts]).numpy().astype(float)
    returns = torch.cat([rollout.int_return for rollout in rollouts]).numpy()
    for t in (0, 1, 70, 191):
        expected = sum(0.8**k * rewards[t - k] for k in range(t + 1))
        assert returns[t] == pytest.approx(expected, rel=1e-4)
    agent = trained(module, *CHAIN, "--total-timesteps", "1024")  # one iteration
    assert agent.int_return_stats.count == 1024
    assert agent.int_return_stats.std < 1  # it was 1 at first


def test_novelty_of_images(fork):
    module = fork("rnd")
    space = spaces.Box(0, 255, (40, 40, 3), np.uint8)
    agent = small_agent(module, space, spaces.Discrete(2))
    obs = torch.randint(256, (5, 40, 40, 3), dtype=torch.uint8)
    assert agent.novelty(obs).shape == (5,)
    assert agent(obs)[1].shape == (5, 2)


# --- muon -----------------------------------------------------------------------------------------
def test_muon(fork):
    flags = ("--total-timesteps", "40_000", "--learning-rate", "1e-3", "--run-name", "muon")
    assert trained(fork("muon"), *flags).eval_returns.mean() > 450
    _, muon = torch.load("runs/muon/checkpoint.pt")["optimizers"]
    shapes = [state["momentum_buffer"].shape for state in muon["state"].values()]
    assert shapes == [(64, 64), (64, 64)]  # one of the policy, one of the value function


def test_muon_of_images(fork):
    flags = ("--env-id", "test_images:Square-v0", "--num-steps", "16", "--run-name", "images")
    trained(fork("muon"), *flags, "--total-timesteps", "128")
    _, muon = torch.load("runs/images/checkpoint.pt")["optimizers"]
    shapes = [state["momentum_buffer"].shape for state in muon["state"].values()]
    assert shapes == [(512, 64)]  # of the convolutional network, the last of its layers


def test_muon_where_there_is_no_hidden_matrix(fork):
    trained(fork("muon"), "--hidden-sizes", "8", "--total-timesteps", "512")


# --- gsde -----------------------------------------------------------------------------------------
PENDULUM = ("--env-id", "Pendulum-v1", "--gamma", "0.9", "--learning-rate", "1e-3")
BOX = spaces.Box(np.float32([-1, -3]), np.float32([1, 5]))


def exploring_agent(module, **flags):
    agent = small_agent(module, spaces.Box(-9, 9, (3,)), BOX, hidden_sizes=(8, 5), **flags)
    with torch.no_grad():
        agent.log_std.normal_()
        agent.actor[-1].weight.normal_()
    return agent


def test_gsde_by_hand(fork):
    agent = exploring_agent(fork("gsde"))
    obs = torch.randn(7, 3)
    action = torch.randn(7, 2)
    dist = agent.policy(agent.features(obs))
    weights = {name: x.detach().numpy().astype(float) for name, x in agent.named_parameters()}
    x = obs.numpy().astype(float)
    for layer in ("actor.0", "actor.2"):
        x = np.tanh(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    mean = x @ weights["actor.4.weight"].T + weights["actor.4.bias"]
    sigma = np.exp(weights["log_std"])  # (5, 2)
    variance = np.zeros((7, 2)) + 1e-6
    for b, d, f in np.ndindex(7, 2, 5):
        variance[b, d] += (x[b, f] * sigma[f, d]) ** 2
    density = np.exp(-((action.numpy() - mean) ** 2) / 2 / variance) / np.sqrt(2 * np.pi * variance)
    expected = np.log(density.prod(1))
    assert dist.log_prob(action).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    entropy = 0.5 * np.log(2 * np.pi * np.e * variance).sum(1)
    assert dist.entropy().tolist() == pytest.approx(entropy.tolist(), abs=1e-4)

    # What is sampled has that deviation, and the mean that is the likeliest action.
    many = obs[:1].repeat(50_000, 1)
    samples = agent.act(many, generator=torch.Generator().manual_seed(0))
    assert samples.std(0).tolist() == pytest.approx(np.sqrt(variance[0]).tolist(), rel=0.02)
    assert agent.act(obs, greedy=True).numpy() == pytest.approx(mean, abs=1e-5)
    where_all_are_1 = np.sqrt((sigma**2).sum(0)).mean()
    assert agent.scalars()["action_std"] == pytest.approx(where_all_are_1, rel=1e-4)


def test_gsde_keeps_its_noise(fork):
    """For as many steps as asked for, and in each environment its own."""
    agent = exploring_agent(fork("gsde"), sde_sample_freq=3)
    obs = torch.ones(4, 3)
    generator = torch.Generator().manual_seed(0)
    actions = [agent.act(obs, generator=generator, step=step) for step in range(7)]
    same = [torch.equal(a, b) for a, b in itertools.pairwise(actions)]
    assert same == [True, True, False, True, True, False]
    assert len(actions[0].unique(dim=0)) == 4


def test_gsde_in_a_rollout(fork):
    """The noise there, action minus mean, is the same function of features for four steps."""
    module = fork("gsde")
    args = module.Args(env_id="Pendulum-v1", num_envs=2, num_steps=32, hidden_sizes=(16, 2))
    with pieces.learner(args, module.Agent) as learner:
        rollout = learner.collect()
        agent = learner.agent
    with torch.no_grad():
        latent = agent.actor[:-1](agent.features(rollout.obs[:-1]))  # (T, N, F)
        noise = rollout.action - agent.actor[-1](latent)  # (T, N, 1)
    for start in range(0, 32, 4):
        for n in range(2):
            features = latent[start : start + 4, n].double()
            kept = torch.linalg.lstsq(features, noise[start : start + 4, n].double()).solution
            assert torch.allclose(features @ kept, noise[start : start + 4, n].double(), atol=1e-5)


def test_gsde_keeps_its_noise_in_an_evaluation(fork):
    module = fork("gsde")
    actions = []

    class Recorder(module.Agent):
        def act(self, obs, *args):
            actions.append(super().act(obs, *args).item())
            return torch.tensor([[actions[-1]]])

    kwargs = {"observation_space": spaces.Box(1, 1, (1,)), "real": True}  # always 1
    args = module.Args(env_id="probes:Spaces-v0", env_kwargs=kwargs, eval_stochastic=True)
    agent = small_agent(module, kwargs["observation_space"], spaces.Box(-1, 1, (1,)))
    agent.__class__ = Recorder
    lengths = module.play(agent, args, ".", 0)  # a reward of 1 for each step
    assert lengths.max() > 8
    begins = 0
    for length in lengths.astype(int):
        episode = actions[begins : begins + length]
        assert len(set(episode)) == math.ceil(length / 4)
        assert all(len(set(episode[t : t + 4])) == 1 for t in range(0, length, 4))
        begins += length


def test_gsde_learns(fork):
    agent = trained(fork("gsde"), *PENDULUM, "--total-timesteps", "60_000", "--log-std-init", "0")
    assert agent.eval_returns.mean() > -400  # -1,200 at first


def test_gsde_leaves_discrete_actions_alone(fork):
    trained(fork("gsde"), "--total-timesteps", "512")


# --- squashed -------------------------------------------------------------------------------------
def test_squashed_density(fork):
    """It integrates to 1 over (-1, 1), and the entropy is its integral, too."""
    module = fork("squashed")
    edges = np.linspace(-1, 1, 400_001)
    a = (edges[1:] + edges[:-1]) / 2
    for mean, log_std in [(0.3, -0.7), (-1.0, -1.0), (0.0, 0.0), (0.5, 0.5)]:
        dist = module.SquashedGaussian(
            torch.tensor([[mean]]).double(), torch.tensor([log_std]).double()
        )
        log_density = dist.log_prob(torch.from_numpy(np.arctanh(a))[:, None]).numpy()
        density = np.exp(log_density)
        width = edges[1] - edges[0]
        assert density.sum() * width == pytest.approx(1, abs=1e-3)
        entropy = -(density * log_density).sum() * width
        assert dist.entropy().item() == pytest.approx(entropy, abs=0.01)
    two = module.SquashedGaussian(torch.tensor([[0.3, -1.0]]), torch.tensor([-0.7, -1.0]))
    one = [
        module.SquashedGaussian(torch.tensor([[mean]]), torch.tensor([log_std]))
        for mean, log_std in [(0.3, -0.7), (-1.0, -1.0)]
    ]
    assert two.entropy().item() == pytest.approx(sum(x.entropy().item() for x in one), abs=1e-5)
    assert torch.isfinite(two.log_prob(torch.tensor([[40.0, -40.0]]))).all()


def test_squashed_actions_are_not_clipped(fork):
    module = fork("squashed")
    sent = {}
    for name, ppo_or_fork in (("ppo", ppo), ("squashed", module)):
        agent = small_agent(ppo_or_fork, spaces.Box(-9, 9, (3,)), BOX, log_std_init=0.5)
        action = agent.act(torch.randn(1000, 3), generator=torch.Generator().manual_seed(0))
        sent[name] = agent.to_env(action.numpy())
    at_bound = {name: np.mean((x == BOX.low) | (x == BOX.high)) for name, x in sent.items()}
    assert at_bound["ppo"] > 0.4
    assert at_bound["squashed"] == 0
    most = agent.policy(torch.randn(1000, 3)).entropy().max()
    assert most < 2 * math.log(2)  # that of a uniform distribution over (-1, 1) twice
    expected = np.tanh(action.numpy()) * [1, 4] + [0, 1]
    assert sent["squashed"] == pytest.approx(expected, abs=1e-6)


def test_squashed_needs_bounds(fork):
    module = fork("squashed")
    with pytest.raises(module.InputError, match="need two bounds each"):
        small_agent(module, spaces.Box(-9, 9, (3,)), spaces.Box(-np.inf, 1, (1,)))


def test_squashed_learns(fork):
    agent = trained(fork("squashed"), *PENDULUM, "--total-timesteps", "40_000")
    assert agent.eval_returns.mean() > -400


# --- spo ------------------------------------------------------------------------------------------
def test_spo_by_hand(fork):
    ratio = torch.tensor([1.0, 1.3, 0.7, 1.3, 0.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -1.0, -4.0])
    objective = fork("spo").simple_surrogate(ratio, advantage, 0.2)
    # r A - |A| (r - 1)^2 / 0.4
    expected = [2.0, 2.6 - 0.45, 1.4 - 0.45, -1.3 - 0.225, -2.0 - 2.5]
    assert objective.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("advantage", "best"), [(3.0, 1.2), (-3.0, 0.8)])
def test_spo_is_best_at_epsilon(advantage, best, fork):
    ratio = torch.linspace(0, 2, 2001)
    objective = fork("spo").simple_surrogate(ratio, torch.tensor(advantage), 0.2)
    assert ratio[objective.argmax()].item() == pytest.approx(best, abs=1e-3)


def test_spo_learns(fork):
    assert trained(fork("spo"), "--total-timesteps", "40_000").eval_returns.mean() > 450


# --- wandb ----------------------------------------------------------------------------------------
def test_wandb(fork_folder, tmp_path):
    """The file of an offline run, named as the run, has its flags and its scalars."""
    pytest.importorskip("wandb")
    words = (fork_folder("wandb") / "ppo.py", "--run-name", "mine", "--total-timesteps", "2048")
    result = run_in(tmp_path, *words, WANDB_MODE="offline", WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "wandb").exists()  # only if it is asked for
    shutil.rmtree(tmp_path / "runs")
    result = run_in(tmp_path, *words, "--track", WANDB_MODE="offline", WANDB_SILENT="true")
    assert result.returncode == 0, result.stderr
    (file,) = tmp_path.glob("wandb/offline-run-*/run-mine.wandb")
    content = file.read_bytes()
    assert content.count(b"losses/policy_loss") >= 4  # iterations
    for word in (b"charts/episodic_return", b"eval/episodic_return", b"hidden_sizes"):
        assert word in content

    # Trained one after the other in one process, two runs have a file each.
    program = """import ppo
for name in ("one", "two"):
    ppo.train(ppo.Args(run_name=name, total_timesteps=512, eval_episodes=0, track=True))
"""
    environment = {"PYTHONPATH": str(fork_folder("wandb")), "WANDB_MODE": "offline"}
    result = run_in(tmp_path, "-c", program, **environment)
    assert result.returncode == 0, result.stderr
    files = {path.name: path for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert set(files) == {"run-mine.wandb", "run-one.wandb", "run-two.wandb"}
    for name, other in (("one", b"runs/two"), ("two", b"runs/one")):
        content = files[f"run-{name}.wandb"].read_bytes()
        assert b"losses/policy_loss" in content
        assert other not in content


def test_wandb_without_a_key(fork_folder, tmp_path):
    pytest.importorskip("wandb")
    words = (fork_folder("wandb") / "ppo.py", "--track", "--total-timesteps", "512")
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    result = run_in(tmp_path, *words, **environment)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("ppo.py: ")
    assert not (tmp_path / "runs").exists()


# --- export ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        ("--env-id", "CartPole-v1"),
        ("--env-id", "Pendulum-v1"),
        ("--env-id", "probes:Copy-v0", "--env-kwargs", '{"kind": "multidiscrete"}'),
        ("--env-id", "probes:Copy-v0", "--env-kwargs", '{"kind": "discrete"}'),
        ("--env-id", "probes:Copy-v0", "--env-kwargs", '{"kind": "box"}'),
        ("--env-id", "test_images:Square-v0"),
    ],
    ids=lambda flags: "-".join(flags[1::2]).partition(":")[2] or flags[1],
)
def test_onnx(flags, fork):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    module = fork("export")
    flags = (*flags, "--total-timesteps", "2048", "--target-kl", "None", "--learning-rate", "0.1")
    trained(module, *flags, "--run-name", "exported")
    module.export("runs/exported", "policy.onnx")
    session = onnxruntime.InferenceSession("policy.onnx")
    agent = module.load_agent("runs/exported")
    space = agent.observation_space
    space.seed(0)
    for size in (1, 2, 50):
        obs = np.stack([space.sample() for _ in range(size)]).astype(agent.obs_dtype)
        expected = agent.to_env(agent.act(torch.from_numpy(obs), greedy=True).numpy())
        (action,) = session.run(None, {"obs": obs})
        assert action.shape == expected.shape
        assert action == pytest.approx(expected, abs=1e-5)
    if isinstance(agent.action_space, spaces.Box):
        assert np.any(expected == agent.action_space.high)  # so something was clipped


# --- Killed runs ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["recurrent", "rnd", "muon"])
def test_a_killed_run_resumes(name, fork_folder, tmp_path):
    """With --exact-resume it ends with the weights and optimizers of one that was never stopped."""
    folder = fork_folder(name)
    (folder / "tests").mkdir(exist_ok=True)
    shutil.copy(TESTS / "driver.py", folder / "tests")  # it runs the ppo.py in the folder above
    driver = folder / "tests" / "driver.py"
    flags = [
        "--preset=none",
        "--exact-resume",
        "--checkpoint-interval",
        "2",
        "--total-timesteps",
        "4096",
    ]
    flags += ["--eval-episodes", "0", "--run-name"]
    unbroken = run_in(tmp_path, driver, "never", *flags, "unbroken")
    assert unbroken.returncode == 0, unbroken.stderr
    assert run_in(tmp_path, driver, "step:700", *flags, "killed").returncode == -9
    assert run_in(tmp_path, driver, "never", "--resume", "runs/killed").returncode == 0
    first, second = [torch.load(f"runs/{run}/checkpoint.pt") for run in ("unbroken", "killed")]
    assert first["iteration"] == second["iteration"] == 8
    pairs = zip(tensors(first), tensors(second), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def tensors(x):
    """All tensors in nested dicts and lists, in their order."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]
