"""Images: which observations are some, how they are stored, and what is learnt from them."""

import dataclasses

import gymnasium as gym
import numpy as np
import pieces
import pytest
import torch
from gymnasium import spaces
from test_checkpoints import EnoughError, failing_after

import ppo


def pixels(*shape, dtype=np.uint8):
    return spaces.Box(0, 255, shape, dtype)


class Square(gym.Env):
    """A bright square in one of four corners of a noisy image, to be named; 8 steps an episode."""

    action_space = spaces.Discrete(4)

    def __init__(self, shape=(36, 36), shuffled=False, render_mode=None):
        self.observation_space = pixels(*shape)
        self.shuffled = shuffled
        self.render_mode = render_mode

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        self.corner = int(self.np_random.integers(4))
        image = self.np_random.integers(100, size=(36, 36), dtype=np.uint8)
        row, column = divmod(self.corner, 2)
        image[18 * row : 18 * row + 18, 18 * column : 18 * column + 18] += 150
        if self.shuffled:
            image = self.np_random.permutation(image.ravel()).reshape(36, 36)
        shape = self.observation_space.shape
        if len(shape) == 2:
            return image
        axis = int(np.argmin(shape))
        return np.repeat(np.expand_dims(image, axis), shape[axis], axis)

    def step(self, action):
        self.t += 1
        reward = float(action == self.corner)
        return self.observe(), reward, False, self.t == 8, {}

    def render(self):
        return np.zeros((64, 64, 3), np.uint8)


class Seen(gym.Env):
    """Has the observation space that it is given, and always shows nothing."""

    def __init__(self, observation_space, action_space=None):
        self.observation_space = observation_space
        self.action_space = action_space or spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


gym.register("Square-v0", Square, disable_env_checker=True)
gym.register("Seen-v0", Seen, disable_env_checker=True)
SMALL = {
    "env_id": "Square-v0",
    "num_envs": 4,
    "num_steps": 16,
    "num_minibatches": 2,
    "update_epochs": 2,
    "eval_episodes": 0,
    "norm_obs": False,
    "run_name": "a",
}


def made(space):
    """The single observation space of environments that show this."""
    args = ppo.Args(env_id="Seen-v0", env_kwargs={"observation_space": space}, num_envs=2)
    with ppo.closing_envs(ppo.make_envs(args)) as envs:
        return envs.single_observation_space


@pytest.mark.parametrize(
    ("shape", "channels"),
    [
        ((36, 36), 1),
        ((84, 84, 3), 3),
        ((4, 84, 84), 4),
        ((40, 3, 50), 3),
        ((36, 50, 1), 1),
        ((40, 40, 40), 40),
    ],
)
def test_images_get_a_convolutional_network(shape, channels):
    space = made(pixels(*shape))
    assert space.shape == shape
    agent = ppo.Agent(space, spaces.Discrete(5), ppo.Args())
    convolutions = [x for x in agent.modules() if isinstance(x, torch.nn.Conv2d)]
    sizes = [(x.in_channels, x.out_channels, x.kernel_size[0], x.stride[0]) for x in convolutions]
    assert sizes == [(channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)]
    dist, value = agent(torch.randint(256, (7, *shape), dtype=torch.uint8))
    assert dist.logp.shape == (7, 5)
    assert value.shape == (7,)
    linear = [x for x in agent.modules() if isinstance(x, torch.nn.Linear)]
    assert {x.in_features for x in linear} > {512}, "of policy and value function"
    assert agent.obs_stats is None, "images are not scaled by statistics, whatever the flag says"


@pytest.mark.parametrize(
    "space",
    [
        pixels(35, 84),
        pixels(84, 35, 3),
        pixels(4, 5, 3),
        pixels(84, 84, 3, dtype=np.float32),
        pixels(2, 2, 2, 2),
        pixels(1000),
    ],
)
def test_what_is_no_image_is_a_vector(space):
    assert made(space).shape == (int(np.prod(space.shape)),)


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (pixels(4, 84, 84, 3), "GrayscaleObservation"),
        (spaces.Dict({"eye": pixels(84, 84, 3), "speed": spaces.Box(0, 1)}), "FilterObservation"),
        (spaces.Tuple([pixels(84, 84), spaces.Discrete(3)]), "FilterObservation"),
        (spaces.Dict({"robot": spaces.Dict({"eye": pixels(84, 84)})}), "FilterObservation"),
    ],
)
def test_what_wrappers_help(space, part):
    with pytest.raises(ppo.InputError, match=part):
        made(space)


def test_where_the_channels_are_does_not_matter():
    """(H, W, C) and (C, H, W), with the same weights, are the same image."""
    images = torch.randint(256, (5, 40, 50, 3), dtype=torch.uint8)
    torch.manual_seed(0)
    last = ppo.NatureCNN((40, 50, 3))
    torch.manual_seed(0)
    first = ppo.NatureCNN((3, 40, 50))
    features = last(images)
    assert features.shape == (5, 512)
    torch.testing.assert_close(first(images.movedim(-1, 1)), features)


def test_pixels_are_scaled_to_one():
    """The first layer sees 255 as 1: twice as bright is twice as much, but for its bias of 0."""
    torch.manual_seed(0)
    cnn = ppo.NatureCNN((36, 36))
    image = torch.full((1, 36, 36), 255, dtype=torch.uint8)
    weight = next(x for x in cnn.modules() if isinstance(x, torch.nn.Conv2d)).weight
    seen = []
    next(x for x in cnn.modules() if isinstance(x, torch.nn.Conv2d)).register_forward_hook(
        lambda _module, _inputs, output: seen.append(output)
    )
    cnn(image)
    torch.testing.assert_close(seen[0][0, :, 0, 0], weight.sum((1, 2, 3)))


def test_images_are_stored_as_bytes():
    args = ppo.Args(**{name: x for name, x in SMALL.items() if name != "run_name"})
    with pieces.learner(args) as learner:
        rollout = learner.collect()
        assert rollout.obs.dtype == torch.uint8
        assert rollout.obs.untyped_storage().nbytes() == 17 * 4 * 36 * 36
        batch = learner.estimate(rollout)
        assert batch.obs.dtype == torch.uint8
        loss, _ = ppo.ppo_loss(learner.agent, batch, args, 0.2)
        loss.backward()
        gradients = [x.grad for x in learner.agent.parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert all(gradient.abs().max() > 0 for gradient in gradients)
        infos = learner.update(rollout, batch)
        assert infos[0]["approx_kl"] == pytest.approx(0, abs=1e-6), "the ratio is 1"


def test_the_preset(command):
    """baselines' for Atari: it applies to images, shows in the help, and gives way to flags."""
    preset = ppo.preset("Square-v0")
    assert preset["preset"] == "image"
    args = ppo.Args(**preset)
    assert (args.num_envs, args.num_steps, args.num_minibatches) == (8, 128, 4)
    assert (args.update_epochs, args.clip_coef, args.ent_coef) == (4, 0.1, 0.01)
    assert (args.learning_rate, args.anneal_lr, args.norm_obs) == (2.5e-4, True, False)
    assert args.log_std_init == ppo.PRESETS["continuous"]["log_std_init"], "for Box actions"
    assert args.total_timesteps == 10_000_000
    args = ppo.parse_args(["--env-id=test_images:Square-v0", "--clip-coef=0.3"])
    assert (args.preset, args.clip_coef, args.num_envs) == ("image", 0.3, 8)
    text = command("--env-id=test_images:Square-v0", "--help").stdout
    assert "10000000" in text
    box = spaces.Box(-1, 1, (2,), np.float32)
    kwargs = {"observation_space": pixels(36, 36), "action_space": box}
    assert ppo.preset("Seen-v0", kwargs)["preset"] == "image", "whatever the actions"


@pytest.mark.parametrize(
    ("shape", "at_hand", "device"),
    [((36, 36), True, "cuda"), ((36, 36), False, "cpu"), ((36,), True, "cpu")],
)
def test_images_go_to_cuda_and_vectors_do_not(shape, at_hand, device, monkeypatch):
    """And the number of threads is torch's own for convolutions, one for small layers."""
    threads = []
    zeros = torch.zeros
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: at_hand)
    monkeypatch.setattr(torch, "zeros", lambda *shape, device: zeros(*shape))
    assert ppo.set_up(ppo.Args(), pixels(*shape)).type == device
    assert threads == ([1] if len(shape) == 1 else [])


def test_a_run_is_resumed_evaluated_and_filmed(command):
    flags = {**SMALL, "exact_resume": True, "checkpoint_interval": 2}
    args = ppo.Args(**flags, total_timesteps=4 * 64)
    ppo.train(dataclasses.replace(args, run_name="b"))
    with pytest.raises(EnoughError):
        ppo.train(args, agent_class=failing_after(3 * 16))
    assert ppo.load("runs/a")["iteration"] == 2
    agent = ppo.train(dataclasses.replace(args, resume="runs/a")).cpu()
    a, b = (ppo.load(f"runs/{name}")["agent"] for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    loaded = ppo.load_agent("runs/a")
    images = torch.randint(256, (3, 36, 36), dtype=torch.uint8)
    assert torch.equal(loaded.act(images, greedy=True), agent.act(images, greedy=True))
    result = command("--evaluate=runs/a", "--eval-episodes=2", "--capture-video")
    assert result.returncode == 0, result.stderr
    assert "(2 episodes, greedy)" in result.stdout


@pytest.mark.parametrize("shape", [(36, 36), (36, 36, 3), (2, 36, 36)])
def test_it_finds_the_bright_square(shape):
    """Nearly always, after 60 updates; 2 of 8 is chance."""
    assert returns_of(shape, shuffled=False) > 7


def test_it_finds_nothing_where_the_pixels_are_shuffled():
    assert returns_of((36, 36), shuffled=True) < 3


def returns_of(shape, shuffled):
    """The mean return of the last 100 training episodes."""
    flags = {**SMALL, "num_envs": 8, "num_steps": 32, "learning_rate": 1e-3}
    kwargs = {"shape": shape, "shuffled": shuffled}
    ppo.train(ppo.Args(**flags, env_kwargs=kwargs, total_timesteps=60 * 256))
    return np.mean(ppo.load("runs/a")["returns"])
