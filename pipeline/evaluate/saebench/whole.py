"""Runs evaluations of sae-bench whole, in a process of their own: RAVEL, unlearning and automated interpretability.

They read and write files beside the working directory, and load models by themselves. None of them runs without access to
the network, so that tests see only how they fail.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.saebench.suite import running
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.study.saebench_section import SAEBENCH, sae_bench_config

OUT = "out"


def ravel(on: Bench) -> dict[str, Any]:
    """The content of `ravel.json`."""
    return _run("ravel", on)


def unlearning(on: Bench) -> dict[str, Any]:
    """The content of `unlearning.json`."""
    return _run("unlearning", on)


def autointerp(on: Bench) -> dict[str, Any]:
    """The content of `autointerp.json`."""
    return _run("autointerp", on)


def _run(name: str, on: Bench) -> dict[str, Any]:
    with running(name, on) as suite, suite.exported() as sae, suite.scratch() as scratch:
        settings = on.layer.experiment.saebench.of(name) | {"model_name": Path(on.layer.experiment.model.name).name}
        settings.setdefault("llm_dtype", on.layer.experiment.model.dtype)
        settings.setdefault("llm_batch_size", on.layer.experiment.store.forward_batch)
        asked = json.dumps({"name": name, "sae": str(sae.resolve()), "device": str(suite.device), "settings": settings})
        here = str(Path(__file__).parents[3])  # of this package: the process starts elsewhere
        paths = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
        ended = subprocess.run(  # noqa: S603 - this module, by the same interpreter
            [sys.executable, "-m", __name__],
            input=asked,
            cwd=scratch,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        written = sorted((scratch / OUT).glob("*.json"))
        if ended.returncode or not written:
            last = (ended.stderr.strip().splitlines() or ["it wrote no result"])[-1]
            raise RuntimeError(last)
        return json.loads(written[0].read_text(encoding="utf-8"))


def main() -> None:
    """In the process of its own: load the SAE, and let sae-bench do the rest."""
    asked = json.load(sys.stdin)
    name, device = asked["name"], asked["device"]
    with importing_sae_bench():
        import sae_lens

        module: Any = import_module(f"sae_bench.evals.{name}.main")
        config = sae_bench_config(name, **asked["settings"])
        sae: Any = cast("Any", sae_lens.SAE).load_from_disk(asked["sae"], device=device)
        key = SAEBENCH[name].key
        keys = {"api_key": os.environ[key]} if key else {}
        module.run_eval(config, [(name, sae)], device, output_path=OUT, **keys)


if __name__ == "__main__":
    main()
