"""Each patch of tests/forks still applies, and does what it is there for; so do smaller changes."""

import copy
import difflib
import functools
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
    "recurrent": 78,
    "action-mask": 30,
    "rnd": 63,
    "muon": 11,
    "gsde": 38,
    "squashed": 25,
    "spo": 5,
    "wandb": 10,
    "export": 20,
    "multi-input": 40,
}


@functools.cache
def fork_folder(name):
    """A folder with a copy of ppo.py that a patch is applied to."""
    folder = fork_folder.root / name
    folder.mkdir(exist_ok=True)
    shutil.copy(ROOT / "ppo.py", folder)
    shutil.copy(ROOT / ".ruff.toml", folder)
    # Without the ceiling, git would look for a repository that the folder may be in.
    environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(fork_folder.root)}
    command = ["git", "apply", TESTS / "forks" / f"{name}.patch"]
    subprocess.run(command, cwd=folder, env=environment, check=True)
    return folder


@pytest.fixture(autouse=True, scope="module")
def root(tmp_path_factory):
    fork_folder.root = tmp_path_factory.mktemp("forks")


def imported(path, name):
    """The module that a file is, under that name."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fork(monkeypatch):
    """Imports a fork; the Learner of `pieces` is then made of that."""

    def load(name):
        module_name = f"fork_{name}".replace("-", "_")
        if module_name not in sys.modules:
            imported(fork_folder(name) / "ppo.py", module_name)
        monkeypatch.setattr(pieces, "ppo", sys.modules[module_name])
        if name == "recurrent":
            monkeypatch.setattr(pieces.Learner, "collect", collect_with_memory)
        return sys.modules[module_name]

    return load


def collect_with_memory(self):
    """The method of a Learner whose agent is recurrent."""
    self.memory = getattr(self, "memory", torch.zeros(self.envs.num_envs, 64))
    rollout, self.obs, self.done, self.memory = pieces.ppo.collect(
        self.agent, self.envs, self.obs, self.done, self.memory, self.args
    )
    return rollout


def trained(module, *flags):
    """The agent that a command line trains."""
    return module.train(module.parse_args([*flags, "--eval-episodes", "20"]))


def small_agent(module, observation_space, action_space, **flags):
    torch.manual_seed(0)
    return module.Agent(observation_space, action_space, module.Args(**flags))


# --- Of all of them -------------------------------------------------------------------------------
def test_no_patch_is_forgotten():
    assert {path.stem for path in (TESTS / "forks").glob("*.patch")} == set(MOST_LINES)


@pytest.mark.parametrize("name", MOST_LINES)
def test_ruff_and_lines(name):
    """They are few enough, those that the table says, and clean."""
    for command in (["check"], ["format", "--check"]):
        words = [sys.executable, "-m", "ruff", *command, "--no-cache", "ppo.py"]
        result = subprocess.run(words, cwd=fork_folder(name), capture_output=True, text=True)
        assert result.returncode == 0, result.stdout
    command = ["git", "apply", "--numstat", TESTS / "forks" / f"{name}.patch"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = int(result.stdout.split()[0])
    table = (TESTS / "forks/README.md").read_text()
    assert lines == int(re.search(rf"^\| \[{name}\].*?\| (\d+) \|", table, re.M)[1])
    assert lines <= MOST_LINES[name]


@pytest.mark.parametrize(
    ("name", "env_id"),
    [
        ("recurrent", "CartPole-v1"),
        ("recurrent", "Pendulum-v1"),
        ("recurrent", "test_images:Square-v0"),
        ("action-mask", "tasks:Masked-v0"),
        ("rnd", "CartPole-v1"),
        ("rnd", "test_images:Square-v0"),
        ("gsde", "Pendulum-v1"),
        ("squashed", "Pendulum-v1"),
        ("spo", "CartPole-v1"),
        ("multi-input", "tasks:Both-v0"),
    ],
)
def test_ratios_are_1_as_long_as_nothing_is_learnt(name, env_id, fork):
    """So old and new probabilities are of the same rows, masks, memories and distributions."""
    module = fork(name)
    flags = {"env_id": env_id, "num_envs": 8, "num_steps": 32, "learning_rate": 0.0}
    args = module.Args(**flags, num_minibatches=4, recompute_advantages=True, update_epochs=3)
    with pieces.learner(args, module.Agent) as one:
        one.collect()  # the next rollout begins within episodes
        rollout = one.collect()
        assert rollout.done.any() or env_id == "Pendulum-v1"
        infos = one.update(rollout, one.estimate(rollout))
    assert len(infos) == 12
    for info in infos:
        assert abs(info["approx_kl"]) < 1e-6
        assert info["clipfrac"] == 0


# --- recurrent ------------------------------------------------------------------------------------
CUE = ("--env-id", "tasks:Cue-v0", "--update-epochs", "4", "--learning-rate", "2e-3")
CUE = (*CUE, "--num-minibatches", "4", "--num-steps", "32", "--total-timesteps", "16_000")


def test_memory_solves_what_needs_one(fork):
    assert trained(fork("recurrent"), *CUE).eval_returns.mean() == 1
    assert abs(trained(ppo, *CUE).eval_returns.mean()) < 0.7


def test_memory_lasts_an_episode_and_its_invalid_row(fork):
    """Values are those of every episode read alone, from its first observation, at all ends."""
    module = fork("recurrent")
    args = module.Args(env_id="probes:Spaces-v0", num_envs=8, num_steps=6, num_minibatches=1)
    with pieces.learner(args, module.Agent) as one:
        rollouts = [one.collect() for _ in range(8)]
        value = torch.cat([one.estimate(rollout).value for rollout in rollouts])
    agent = one.agent
    obs = torch.cat([x.obs[:-1] for x in rollouts])  # (48, 8, 3)
    done = torch.cat([x.done for x in rollouts])
    terminated = torch.cat([x.terminated for x in rollouts])
    assert terminated.any()
    assert (done & ~terminated).any()
    assert done[5:-1:6].any()  # so a rollout began with a row that is not valid
    assert done[4:-1:6].any()  # and one with a new episode
    for env in range(8):
        begins = 0  # the row of the episode's first observation: two after the last of the other
        for t in range(48):
            if t == begins:
                h = torch.zeros(64)
            with torch.no_grad():
                h = agent.gru(obs[t, env].clamp(-10, 10), h)
                expected = agent.critic(h).item()
            assert value[t, env].item() == pytest.approx(expected, abs=1e-4)
            if done[t, env]:
                begins = t + 2


def test_minibatches_are_of_whole_environments(fork):
    module = fork("recurrent")
    args = module.Args(num_envs=5, num_steps=40, num_minibatches=2)
    with pieces.learner(args, module.Agent) as one:
        rollout = one.collect()
        parts = list(module.minibatches(one.estimate(rollout), args))
    assert sorted(part.obs.shape[1] for part in parts) == [2, 3]
    assert sum(len(part.action) for part in parts) == rollout.valid.sum() < 5 * 40
    obs = torch.cat([part.obs for part in parts], dim=1)
    starts = [rollout.obs[0].tolist(), obs[0].tolist()]
    assert sorted(starts[0]) == sorted(starts[1])
    with pytest.raises(module.InputError, match="--num-minibatches must be at most --num-envs"):
        module.check(module.Args(num_envs=3, num_minibatches=4))


# --- action-mask ----------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_only_allowed_actions_are_sent(mode, fork):
    """The environment raises an error at others."""
    flags = ("--env-id", "tasks:Masked-v0", "--num-envs", "4", "--num-minibatches", "4")
    flags = (*flags, "--vectorization-mode", mode, "--run-name", "masked")
    agent = trained(fork("action-mask"), *flags, "--total-timesteps", "20_000")
    assert agent.eval_returns.mean() > 3.5  # of 4; 2 by chance
    entropy = pieces.values("runs/masked", "losses/entropy")
    assert entropy[0] == pytest.approx(math.log(2), abs=0.01)  # two are allowed, not twelve
    assert np.isfinite(entropy).all()


def test_masks_are_those_of_the_observations(fork):
    """The environment shows its mask, too. With several choices there is a row for each."""
    module = fork("action-mask")
    args = module.Args(env_id="tasks:Masked-v0", num_envs=4, num_steps=32)
    with pieces.learner(args, module.Agent) as one:
        for _ in range(2):
            rollout = one.collect()
            assert torch.equal(rollout.obs[..., :12], rollout.obs[..., 12:])
            batch = one.estimate(rollout)
            assert batch.obs[:, 12:].gather(1, batch.action[:, None]).all()
    agent = small_agent(module, spaces.Box(-9, 9, (9,)), spaces.MultiDiscrete([2, 3]))
    obs = torch.cat([torch.randn(500, 3), torch.tensor([[1, 0, 0, 0, 1, 1]]).repeat(500, 1)], 1)
    action = agent.act(obs, agent.head.noise(500))
    assert action.unique(dim=0).tolist() == [[0, 1], [0, 2]]


# --- rnd ------------------------------------------------------------------------------------------
CHAIN = ("--env-id", "tasks:Chain-v0", "--total-timesteps", "100_000", "--num-steps", "128")
CHAIN = (*CHAIN, "--update-epochs", "4")


def test_novelty_leads_to_a_sparse_reward(fork):
    module = fork("rnd")
    assert trained(module, *CHAIN).eval_returns.mean() == 1
    assert trained(module, *CHAIN, "--int-coef", "0").eval_returns.mean() == 0


def test_intrinsic_advantages_by_hand(fork):
    """They go on over the end of an episode; the row that is not valid there is a mere step."""
    module = fork("rnd")
    g, decay = 0.9, 0.9 * 0.8
    args = module.Args(int_gamma=g, gae_lambda=0.8, int_coef=1.0, ext_coef=0.0)
    agent = small_agent(module, spaces.Box(-9, 9, (1,)), spaces.Discrete(2))
    agent.int_reward_scaler.return_stats.std.fill_(2.0)
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
        terminated=torch.tensor([[False], [True], [False], [False]]),
        done=torch.tensor([[False], [True], [False], [False]]),
        valid=torch.tensor([[True], [True], [False], [True]]),
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
    args = module.Args(env_id="tasks:Chain-v0", num_envs=4, num_steps=64, num_minibatches=4)
    with pieces.learner(args, module.Agent) as one:
        agent = one.agent
        target = copy.deepcopy(agent.random_target.state_dict())
        rollout = one.collect()
        with torch.no_grad():
            novelty = agent.novelty(rollout.obs[1:].flatten(0, 1)).view(64, 4)
        assert torch.allclose(rollout.int_reward, novelty * rollout.valid, atol=1e-6)
        for _ in range(20):
            one.update(rollout, one.estimate(rollout))
        with torch.no_grad():
            later = agent.novelty(rollout.obs[1:][rollout.valid]).mean()
            unseen = agent.novelty(torch.eye(16)[8:]).mean()
    assert later < 0.1 * min(novelty.mean(), unseen)
    after = agent.random_target.state_dict()
    assert all(torch.equal(target[name], after[name]) for name in target)
    agent = trained(module, *CHAIN, "--total-timesteps", "2048")  # one iteration
    assert agent.int_reward_scaler.return_stats.count == 2048, "of all rows"
    assert agent.int_reward_scaler.return_stats.std < 1  # it was 1 at first


# --- muon -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("flags", "matrices"),
    [
        ((), {"actor.2.weight", "critic.2.weight"}),  # of the layers between hidden ones
        (("--hidden-sizes", "8"), set()),
        (("--env-id", "test_images:Square-v0"), {"cnn.layers.7.weight"}),
    ],
)
def test_muon_takes_hidden_matrices_and_adam_the_rest(flags, matrices, fork, monkeypatch):
    """Adam has no state of the matrices; Muon's steps are as large as Adam's, and annealed."""
    changes = []
    step = torch.optim.Muon.step

    def recorded(muon):
        (group,) = muon.param_groups
        before = [x.detach().clone() for x in group["params"]]
        step(muon)
        for old, new in zip(before, group["params"], strict=True):
            changes.append((old - new.detach()) / group["lr"])

    monkeypatch.setattr(torch.optim.Muon, "step", recorded)
    agent = trained(fork("muon"), *flags, "--total-timesteps", "1024", "--run-name", "muon")
    names = [name for name, _ in agent.named_parameters()]
    state = ppo.load("runs/muon")["optimizer"]["state"]
    assert {name for i, name in enumerate(names) if i not in state} == matrices
    assert len(changes) >= 8 * len(matrices)
    for change in changes:
        largest = torch.linalg.matrix_norm(change, 2).item()
        assert largest == pytest.approx(0.2 * math.sqrt(max(change.shape)), rel=0.35)


# --- gsde -----------------------------------------------------------------------------------------
PENDULUM = ("--env-id", "Pendulum-v1", "--gamma", "0.9", "--learning-rate", "1e-3")
BOX = spaces.Box(np.float32([-1, -3]), np.float32([1, 5]))


def test_gsde_by_hand(fork):
    module = fork("gsde")
    agent = small_agent(module, spaces.Box(-9, 9, (3,)), BOX, hidden_sizes=(8, 5))
    with torch.no_grad():
        agent.head.log_std.normal_()
        agent.actor[-1].weight.normal_()
    obs = torch.randn(7, 3)
    action = torch.randn(7, 2)
    dist, _ = agent(obs)
    weights = {name: x.detach().numpy().astype(float) for name, x in agent.named_parameters()}
    x = obs.numpy().astype(float)
    for layer in ("actor.0", "actor.2"):
        x = np.tanh(x @ weights[f"{layer}.weight"].T + weights[f"{layer}.bias"])
    mean = x @ weights["actor.4.weight"].T + weights["actor.4.bias"]
    sigma = np.exp(weights["head.log_std"])  # (5, 2)
    variance = np.zeros((7, 2)) + 1e-6
    for b, d, f in np.ndindex(7, 2, 5):
        variance[b, d] += (x[b, f] * sigma[f, d]) ** 2
    density = np.exp(-((action.numpy() - mean) ** 2) / 2 / variance) / np.sqrt(2 * np.pi * variance)
    expected = np.log(density.prod(1))
    assert dist.log_prob(action).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    entropy = 0.5 * np.log(2 * np.pi * np.e * variance).sum(1)
    assert dist.entropy().tolist() == pytest.approx(entropy.tolist(), abs=1e-4)

    # What is sampled has that deviation, and the mean that is the likeliest action.
    samples = agent.act(obs[:1].repeat(50_000, 1), agent.head.noise(1, 50_000)[0])
    assert samples.std(0).tolist() == pytest.approx(np.sqrt(variance[0]).tolist(), rel=0.02)
    assert agent.act(obs).numpy() == pytest.approx(mean, abs=1e-5)


def test_gsde_keeps_its_noise_in_a_rollout_and_in_an_evaluation(fork):
    """The noise, action minus mean, is the same function of features for four steps."""
    module = fork("gsde")
    args = module.Args(env_id="Pendulum-v1", num_envs=2, num_steps=32, hidden_sizes=(16, 2))
    with pieces.learner(args, module.Agent) as one:
        rollout = one.collect()
        agent = one.agent
    with torch.no_grad():
        latent = agent.actor[:-1](agent.features(rollout.obs[:-1]))  # (T, N, F)
        noise = rollout.action - agent.actor[-1](latent)  # (T, N, 1)
    parts = zip(latent.double().split(4), noise.double().split(4), strict=True)
    solutions = []
    for x, y in [(x[:, n], y[:, n]) for x, y in parts for n in range(2)]:
        solutions.append(torch.linalg.lstsq(x, y).solution)
        assert torch.allclose(x @ solutions[-1], y, atol=1e-5)
    assert len({x[0].item() for x in solutions}) == 16, "in each environment its own"

    acted = []

    class Recorder(module.Agent):
        def act(self, obs, noise=None):
            acted.append(noise)
            return super().act(obs, noise)

    args = module.Args(env_id="Pendulum-v1", eval_stochastic=True, eval_episodes=1)
    agent = Recorder(spaces.Box(-9, 9, (3,)), spaces.Box(-2, 2, (1,)), args)
    module.evaluate(agent, args, "runs/a", 0)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(acted)]
    assert same == [t % 4 != 3 for t in range(199)]


def test_gsde_learns_and_leaves_discrete_actions_alone(fork):
    module = fork("gsde")
    flags = ("--total-timesteps", "60_000", "--log-std-init", "0", "--run-name", "a")
    assert trained(module, *PENDULUM, *flags).eval_returns.mean() > -400  # -1,200 at first
    trained(module, "--total-timesteps", "512")


# --- squashed and spo -----------------------------------------------------------------------------
def test_squashed_density(fork):
    """It integrates to 1 over (-1, 1), and the entropy is its integral, too."""
    module = fork("squashed")
    edges = np.linspace(-1, 1, 400_001)
    a = (edges[1:] + edges[:-1]) / 2
    entropies = []
    for mean, log_std in [(0.3, -0.7), (-1.0, -1.0), (0.0, 0.0), (0.5, 0.5)]:
        dist = module.SquashedGaussian(
            torch.tensor([[mean]]).double(), torch.tensor([log_std]).double()
        )
        log_density = dist.log_prob(torch.from_numpy(np.arctanh(a))[:, None]).numpy()
        density = np.exp(log_density)
        width = edges[1] - edges[0]
        assert density.sum() * width == pytest.approx(1, abs=1e-3)
        entropies.append(-(density * log_density).sum() * width)
        assert dist.entropy().item() == pytest.approx(entropies[-1], abs=0.01)
    two = module.SquashedGaussian(torch.tensor([[0.3, -1.0]]), torch.tensor([-0.7, -1.0]))
    assert two.entropy().item() == pytest.approx(sum(entropies[:2]), abs=0.02)
    assert torch.isfinite(two.log_prob(torch.tensor([[40.0, -40.0]]))).all()


def test_squashed_actions_are_not_clipped(fork):
    module = fork("squashed")
    sent = {}
    for name, ppo_or_fork in (("ppo", ppo), ("squashed", module)):
        agent = small_agent(ppo_or_fork, spaces.Box(-9, 9, (3,)), BOX, log_std_init=0.5)
        action = agent.act(torch.randn(1000, 3), agent.head.noise(1000))
        sent[name] = agent.head.to_env(action.numpy())
    at_bound = {name: np.mean((x == BOX.low) | (x == BOX.high)) for name, x in sent.items()}
    assert at_bound["ppo"] > 0.4
    assert at_bound["squashed"] == 0
    expected = np.tanh(action.numpy()) * [1, 4] + [0, 1]
    assert sent["squashed"] == pytest.approx(expected, abs=1e-6)
    with pytest.raises(module.InputError, match="need two bounds each"):
        small_agent(module, spaces.Box(-9, 9, (3,)), spaces.Box(-np.inf, 1, (1,)))
    flags = ("--total-timesteps", "40_000")
    assert trained(module, *PENDULUM, *flags).eval_returns.mean() > -400


def test_spo_by_hand(fork):
    """Where it is best is epsilon away from 1."""
    module = fork("spo")
    ratio = torch.tensor([1.0, 1.3, 0.7, 1.3, 0.5])
    advantage = torch.tensor([2.0, 2.0, 2.0, -1.0, -4.0])
    objective = module.simple_surrogate(ratio, advantage, 0.2)
    # r A - |A| (r - 1)^2 / 0.4
    expected = [2.0, 2.6 - 0.45, 1.4 - 0.45, -1.3 - 0.225, -2.0 - 2.5]
    assert objective.tolist() == pytest.approx(expected, abs=1e-6)
    ratio = torch.linspace(0, 2, 2001)
    for advantage, best in ((3.0, 1.2), (-3.0, 0.8)):
        objective = module.simple_surrogate(ratio, torch.tensor(advantage), 0.2)
        assert ratio[objective.argmax()].item() == pytest.approx(best, abs=1e-3)
    assert trained(module, "--total-timesteps", "40_000").eval_returns.mean() > 450


# --- wandb ----------------------------------------------------------------------------------------
def test_wandb(tmp_path):
    """Two runs of a process have a file each, named as the run, with its flags and scalars."""
    pytest.importorskip("wandb")
    program = """import ppo
for name in ("one", "two", "none"):
    track = name != "none"
    ppo.train(ppo.Args(run_name=name, total_timesteps=2048, eval_episodes=1, track=track))
"""
    folder = str(fork_folder("wandb"))
    environment = {**os.environ, "PYTHONPATH": folder, "WANDB_MODE": "offline"}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    files = {path.name: path for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert set(files) == {"run-one.wandb", "run-two.wandb"}
    for name, other in (("one", b"runs/two"), ("two", b"runs/one")):
        content = files[f"run-{name}.wandb"].read_bytes()
        assert content.count(b"losses/policy_loss") >= 4  # iterations
        for word in (b"charts/episodic_return", b"eval/episodic_return", b"hidden_sizes"):
            assert word in content
        assert other not in content


# --- export ---------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "flags",
    [
        ("--env-id", "Pendulum-v1"),
        ("--env-id", "probes:Copy-v0", "--env-kwargs", '{"kind": "multidiscrete"}'),
        ("--env-id", "probes:Copy-v0", "--env-kwargs", '{"kind": "discrete"}'),
        ("--env-id", "test_images:Square-v0"),
    ],
    ids=["box", "multidiscrete", "discrete", "images"],
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
    with module.closing(module.make_envs(module.load("runs/exported")["args"], 1)) as envs:
        space = envs.single_observation_space
    space.seed(0)
    for size in (1, 2, 50):
        obs = np.stack([space.sample() for _ in range(size)]).astype(agent.obs_dtype)
        expected = agent.head.to_env(agent.act(torch.from_numpy(obs)).numpy())
        (action,) = session.run(None, {"obs": obs})
        assert action.shape == expected.shape
        assert action == pytest.approx(expected, abs=1e-5)
    if isinstance(agent.head.space, spaces.Box):
        assert np.any(abs(expected) == agent.head.space.high)  # so something was clipped


# --- Resumed runs ---------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["recurrent", "rnd", "muon"])
def test_a_resumed_run_begins_with_all_that_was_saved(name, fork):
    """So it is deterministic; with nothing left to do it ends with the same agent and optimizer."""
    module = fork(name)
    flags = {"num_steps": 32, "eval_episodes": 0}
    module.train(module.Args(**flags, run_name="a", total_timesteps=512))
    for run_name, steps in (("b", 512), ("c", 1024), ("d", 1024)):
        longer = {"total_timesteps": steps, "run_name": run_name, "resume": "runs/a"}
        module.train(module.Args(**flags, **longer))
    a, b, c, d = [tensors(module.load(f"runs/{name}")) for name in "abcd"]
    for first, second in ((a, b), (c, d)):
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(a, c, strict=True))


def tensors(x):
    """All tensors in nested dicts and lists, in their order."""
    if isinstance(x, torch.Tensor):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


# --- multi-input ----------------------------------------------------------------------------------
def test_an_image_and_a_vector_are_understood_together(fork):
    flags = ("--env-id", "tasks:Both-v0", "--num-envs", "16", "--learning-rate", "1e-3")
    agent = trained(fork("multi-input"), *flags, "--total-timesteps", "10_000")
    assert agent.eval_returns.mean() == 1  # to know one of them alone is worth 0.5


# --- Smaller changes ------------------------------------------------------------------------------
README = (TESTS / "forks/README.md").read_text()
CHANGES = dict(re.findall(r"^\*\*(.+?)\*\*[^`]+```diff\n(.+?)```", README, re.M | re.S))
LIMITS = {  # lines and places at most
    "AdamW": (1, 1),
    "LayerNorm": (1, 1),
    "A shared torso": (5, 2),
    "A clip range that falls": (2, 1),
    "Muon": (6, 2),
    "A new logged scalar": (1, 1),
    "An info of each step": (5, 4),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_small_change_is_a_small_diff(name, tmp_path):
    """It trains, and the weights are others, but where something is only logged or stored."""
    code = (ROOT / "ppo.py").read_text()
    before = code.splitlines()
    for place in CHANGES[name].split("@@\n"):
        lines = place.splitlines(keepends=True)
        old, new = ["".join(x[1:] for x in lines if x[0] in kind) for kind in (" -", " +")]
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    matcher = difflib.SequenceMatcher(None, before, code.splitlines(), autojunk=False)
    added = sum(op[4] - op[3] for op in matcher.get_opcodes() if op[0] != "equal")
    most_lines, most_places = LIMITS[name]
    assert added <= most_lines
    assert len(list(matcher.get_grouped_opcodes(3))) <= most_places  # as in a diff

    (tmp_path / "changed.py").write_text(code)
    flags = ["--total-timesteps=4096", "--eval-episodes=0"]
    if name == "An info of each step":
        flags += ["--env-id=test_forks:Costly-v0"]
    weights = []
    for run_name, module in (("a", ppo), ("b", imported(tmp_path / "changed.py", "changed"))):
        agent = module.train(module.parse_args([*flags, "--run-name", run_name]))
        weights.append(agent.actor[-1].weight)
    is_only_kept = name in ("A new logged scalar", "An info of each step")
    assert torch.equal(*weights) == is_only_kept
    if name == "A new logged scalar":
        assert min(pieces.values("runs/b", "losses/largest_ratio")) >= 1
    if name == "An info of each step":
        args = module.parse_args(flags)
        with module.open_envs(args) as envs:
            rollout, *_ = module.collect(agent, envs, *module.reset(envs, args, 0), args)
        assert torch.equal(rollout.cost, (2 * rollout.reward).where(rollout.valid, 7))


class Costly(tasks.Cue):
    """A step costs twice its reward, a reset 7."""

    def reset(self, **kwargs):
        return super().reset(**kwargs)[0], {"cost": 7.0}

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {"cost": 2 * result[1]}


gym.register("Costly-v0", Costly, disable_env_checker=True)
