"""Images: which observations are some, how they are stored, and what is learnt from them."""

import gymnasium as gym
import numpy as np
import pieces
import pytest
import torch
from gymnasium import spaces

import ppo


def pixels(*shape, dtype=np.uint8):
    return spaces.Box(0, 255, shape, dtype)


class Square(gym.Env):
    """A bright square in one of four corners of a noisy image, to be named; 8 steps an episode."""

    observation_space = pixels(2, 36, 36)
    action_space = spaces.Discrete(4)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observe(), {}

    def observe(self):
        self.corner = int(self.np_random.integers(4))
        image = self.np_random.integers(100, size=(2, 36, 36), dtype=np.uint8)
        row, column = divmod(self.corner, 2)
        image[:, 18 * row : 18 * row + 18, 18 * column : 18 * column + 18] += 150
        return image

    def step(self, action):
        self.t += 1
        reward = float(action == self.corner)
        return self.observe(), reward, False, self.t == 8, {}


gym.register("Square-v0", Square, disable_env_checker=True)
SMALL = {"env_id": "Square-v0", "num_envs": 4, "num_steps": 16, "num_minibatches": 2}
SMALL |= {"update_epochs": 2, "norm_obs": False, "eval_episodes": 0}


def made(space):
    """The single observation space of environments that show this."""
    args = ppo.Args(env_id="Spaces-v0", env_kwargs={"observation_space": space})
    return ppo.make_envs(args, 2).single_observation_space


@pytest.mark.parametrize(
    ("shape", "channels"),
    [((36, 36), 1), ((84, 84, 3), 3), ((4, 84, 84), 4), ((36, 50, 1), 1), ((40, 40, 40), 40)],
)
def test_images_get_a_convolutional_network(shape, channels):
    space = made(pixels(*shape))
    assert space.shape == shape
    agent = ppo.Agent(space, spaces.Discrete(5), ppo.Args())
    convolutions = [x for x in agent.modules() if isinstance(x, torch.nn.Conv2d)]
    sizes = [(x.in_channels, x.out_channels, x.kernel_size[0], x.stride[0]) for x in convolutions]
    assert sizes == [(channels, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1)]
    images = torch.randint(256, (7, *shape), dtype=torch.uint8)
    dist, value = agent(images)
    assert dist.logp.shape == (7, 5)
    assert value.shape == (7,)
    assert agent.obs_stats is None, "images are not scaled by statistics, whatever the flag says"
    assert torch.equal(ppo.as_batch(images[3].numpy(), space), images[3:4])


FLOATS = pixels(84, 84, 3, dtype=np.float32)


@pytest.mark.parametrize("space", [pixels(35, 84), pixels(84, 35, 3), FLOATS, pixels(1000)])
def test_what_is_no_image_is_a_vector(space):
    assert made(space).shape == (int(np.prod(space.shape)),)


def test_where_the_channels_are_does_not_matter():
    """(H, W, C) and (C, H, W), with the same weights, are the same image; so is (H, W) with one."""
    images = torch.randint(256, (5, 40, 50, 3), dtype=torch.uint8)
    for last, first in [(images, images.movedim(-1, 1)), (images[..., :1], images[..., 0])]:
        features = []
        for x in (last, first):
            torch.manual_seed(0)
            features.append(ppo.NatureCNN(tuple(x.shape[1:]))(x))
        assert features[0].shape == (5, 512)
        torch.testing.assert_close(*features)


def test_pixels_are_scaled_to_one():
    """The first layer sees 255 as 1, and gives the sums of its weights."""
    cnn = ppo.NatureCNN((36, 36))
    first = next(x for x in cnn.modules() if isinstance(x, torch.nn.Conv2d))
    seen = []
    first.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    cnn(torch.full((1, 36, 36), 255, dtype=torch.uint8))
    torch.testing.assert_close(seen[0][0, :, 0, 0], first.weight.sum((1, 2, 3)))


def test_images_are_stored_as_bytes():
    args = ppo.Args(**SMALL)
    with pieces.learner(args) as learner:
        rollout = learner.collect()
    assert rollout.obs.dtype == torch.uint8
    assert rollout.obs.untyped_storage().nbytes() == 17 * 4 * 2 * 36 * 36
    batch = learner.estimate(rollout)
    assert batch.obs.dtype == torch.uint8
    ppo.backward(learner.agent, batch, args)
    gradients = [x.grad for x in learner.agent.parameters()]
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    infos = learner.update(rollout, batch)
    assert infos[0]["approx_kl"] == pytest.approx(0, abs=1e-6), "the ratio is 1"


@pytest.mark.parametrize(
    ("shape", "at_hand", "device"),
    [((36, 36), True, "cuda:0"), ((36, 36), False, "cpu"), ((36,), True, "cpu")],
)
def test_images_go_to_cuda_and_vectors_do_not(shape, at_hand, device, monkeypatch):
    """And the number of threads is torch's own for convolutions, one for small layers."""
    threads = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: at_hand)
    assert ppo.set_up(ppo.Args(), ppo.is_image(pixels(*shape))) == device
    assert threads == ([1] if len(shape) == 1 else [])


def test_it_finds_the_bright_square():
    """Nearly always, after 60 updates; 2 of 8 is chance."""
    flags = {"num_envs": 8, "num_steps": 32, "total_timesteps": 60 * 256, "learning_rate": 1e-3}
    ppo.train(ppo.Args(**{**SMALL, **flags}, run_name="a"))
    assert np.mean(ppo.load("runs/a")["returns"]) > 7
