"""ppo.py with these flags, until the mean of the last 100 training episodes is the first argument.

python with_ppo.py 475 --env-id CartPole-v1
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[3]))
import ppo

target = float(sys.argv.pop(1))
save = ppo.Run.save


def save_until_reached(run, iteration):
    save(run, iteration)
    if len(run.returns) == 100 and np.mean(run.returns) >= target:
        print(f"reached at step {iteration * run.args.batch_size}")
        sys.exit(0)


ppo.Run.save = save_until_reached
ppo.main()
