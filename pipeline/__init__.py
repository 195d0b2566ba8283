"""The direction-aware contrastive SAE study: extract once, train every arm, evaluate, compare.

Start at `pipeline.plan` (what a study consists of) or `pipeline.cli` (what a user can do with it).
"""

import os
from importlib.metadata import PackageNotFoundError, version

# torch's OpenMP threads wait for each other in a busy loop by default. On a machine with any other load, that made the demo
# model's training ten times slower (521 against 5,000 tokens a second beside a second process, two cores), and waiting
# asleep costs nothing on an idle one. OpenMP reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A tokenizer that was used before a fork (any subprocess) otherwise prints a warning about its own threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    __version__ = version("direction-aware-sae")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"
