"""The direction-aware contrastive SAE study: extract once, train every arm, evaluate, compare.

Start at `pipeline.plan` (what a study consists of) or `pipeline.cli` (what a user can do with it).
"""

import os
from importlib.metadata import PackageNotFoundError, version

# torch's OpenMP threads wait for each other in a long busy loop by default. Beside another process on the same two cores,
# that made training the demo model twenty times slower (520 against 11,000 tokens a second); alone, a short loop costs
# little (20,000 instead of 23,000). OpenMP reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# numpy's and scipy's threads (OpenBLAS) likewise, for 2 to the power of this many clock cycles: a logistic regression makes
# thousands of products of some microseconds, and on two busy cores each waited milliseconds for a thread that had no core
# (12 seconds instead of 0.3 for twelve regressions). The numbers stay the same. OpenBLAS reads this when numpy loads it.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
# A tokenizer that was used before a fork (any subprocess) otherwise prints a warning about its own threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    __version__ = version("direction-aware-sae")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"
