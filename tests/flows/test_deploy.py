"""The folder deploy/: templates are what Prefect and Kubernetes take, scripts what bash and Slurm take."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from uuid import uuid4

import jsonschema
import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate

from orchestration.process import interpreter

ROOT = Path(__file__).parents[2]
TEMPLATE = json.loads((ROOT / "deploy" / "kubernetes.json").read_text(encoding="utf-8"))
SCRIPTS = sorted((ROOT / "deploy").glob("*.sh"))


def test_the_template_uses_the_variables_that_it_declares() -> None:
    properties = TEMPLATE["variables"]["properties"]
    assert set(re.findall(r"{{ (\w+) }}", json.dumps(TEMPLATE["job_configuration"]))) == set(properties)
    jsonschema.Draft202012Validator.check_schema(TEMPLATE["variables"])
    defaults = {name: one["default"] for name, one in properties.items() if "default" in one}
    jsonschema.validate(defaults, TEMPLATE["variables"])


@pytest.mark.usefixtures("temporary_server")
def test_a_server_makes_a_work_pool_of_the_template() -> None:
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name="cluster", type="kubernetes", base_job_template=TEMPLATE))
        assert client.read_work_pool("cluster").base_job_template == TEMPLATE


def declared(job_variables: dict[str, Any]) -> Any:
    """The job that a Kubernetes worker would start for a run, of the template and a deployment's variables."""
    worker = pytest.importorskip("prefect_kubernetes.worker", reason="prefect-kubernetes is not installed")
    from prefect.client.schemas.objects import FlowRun

    configuration = asyncio.run(
        worker.KubernetesWorkerJobConfiguration.from_template_and_values(TEMPLATE, job_variables | {"image": "dasae:1"})
    )
    configuration.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="ablation gemma"))
    return configuration.job_manifest


def unknown(value: Any, kind: str, models: Any, place: str) -> list[str]:
    """Fields that Kubernetes' published schema, by which its client was generated, does not have or has of another type."""
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        return [fault for number, one in enumerate(value) for fault in unknown(one, inner[1], models, f"{place}[{number}]")]
    if inner := re.fullmatch(r"dict\(str, (.*)\)|dict\[str, (.*)\]", kind):
        return [
            fault for name, one in value.items() for fault in unknown(one, inner[1] or inner[2], models, f"{place}.{name}")
        ]
    if model := getattr(models, kind, None):
        names = {json_name: name for name, json_name in model.attribute_map.items()}
        known = {name: one for name, one in value.items() if name in names}
        faults = [f"{place}.{name}" for name in value.keys() - known.keys()]
        for name, one in known.items():
            faults += unknown(one, model.openapi_types[names[name]], models, f"{place}.{name}")
        return faults
    types = {"str": str | int, "int": int, "bool": bool, "object": object}  # a quantity is "64Gi" or 1
    return [] if isinstance(value, types[kind]) else [f"{place}: {value!r} is no {kind}"]


@pytest.mark.usefixtures("temporary_server")
def test_a_worker_makes_a_job_of_it_that_kubernetes_knows() -> None:
    (pool,) = {json.dumps(one["work_pool"]["job_variables"]) for one in deployments()}
    job = declared(json.loads(pool) | {"command": "python -m orchestration.process"})
    models = pytest.importorskip("kubernetes_asyncio.client.models")
    assert unknown(job, "V1Job", models, "job") == []
    assert unknown(job | {"spec": {"backofLimit": 0}}, "V1Job", models, "job") == ["job.spec.backofLimit"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["args"] == ["python", "-m", "orchestration.process"]
    assert {"name": "DO_NOT_TRACK", "value": "1"} in container["env"]
    assert container["envFrom"] == [{"secretRef": {"name": "dasae"}}]


def deployments() -> list[dict[str, Any]]:
    return yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_slurm_takes_the_scripts(script: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if not shutil.which("sbatch"):
        pytest.skip("sbatch is not installed (Debian: apt-get install slurm-client)")
    cluster = ["ClusterName=x", "SlurmctldHost=x(127.0.0.1)", "SlurmctldPort=1", "MessageTimeout=1", "GresTypes=gpu"]
    plugins = ["SelectType=select/cons_tres", "AuthType=auth/none", "CredType=cred/none"]
    (tmp_path / "slurm.conf").write_text("\n".join([*cluster, *plugins, ""]))

    def refusal(text: str) -> str:
        (tmp_path / "script").write_text(text)
        command = ["sbatch", "--test-only", str(tmp_path / "script")]
        environment = os.environ | {"SLURM_CONF": str(tmp_path / "slurm.conf")}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stderr

    text = script.read_text()
    assert "unrecognized option" in refusal(text.replace("--gpus-per-task", "--gpus-per-tusk"))
    assert "Invalid --time" in refusal(re.sub("--time=.*", "--time=soon", text))
    # It reads the options first, and then fails for want of a cluster.
    assert refusal(text) == "allocation failure: Unable to contact slurm controller (connect failure)\n"


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """A folder with an activated nothing, and a Slurm that tells what it is asked and ends as STATUS says."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "activate").touch()
    for name, end in (("srun", 'exit "$STATUS"'), ("scontrol", "")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\n{end}\n')
        program.chmod(0o755)
    return tmp_path


def submitted(cluster: Path, script: str, *arguments: str, status: int) -> tuple[int, list[str]]:
    """Exit code of a script, and what it asked of Slurm."""
    environment = {
        "PATH": f"{cluster}:{os.environ['PATH']}",
        "STATUS": str(status),
        "SLURM_JOB_ID": "7",
        "TMPDIR": "/scratch",
    }
    command = ["bash", str(ROOT / "deploy" / script), *arguments]
    done = subprocess.run(command, cwd=cluster, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.splitlines()


def test_a_study_that_slurm_stops_is_queued_again(cluster: Path) -> None:
    study = "srun dasae ablate gemma --workspace /data/w s"
    arguments = ("gemma", "--workspace", "/data/w s")
    assert submitted(cluster, "slurm-study.sh", *arguments, status=143) == (143, [study, "scontrol requeue 7"])
    for status in (0, 1, 2):
        assert submitted(cluster, "slurm-study.sh", *arguments, status=status) == (status, [study])


def test_slurm_starts_dask_s_workers(cluster: Path) -> None:
    code, (asked,) = submitted(cluster, "slurm-workers.sh", "tcp://login:8786", status=0)
    assert code == 0
    assert "dask worker tcp://login:8786 --nthreads 1 --memory-limit 0 --local-directory /scratch" in asked
    assert submitted(cluster, "slurm-workers.sh", status=0)[0] != 0


def test_an_image_gets_what_it_needs_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*"
    named = {line.removeprefix("!") for line in patterns if line.startswith("!")}
    assert all((ROOT / name).exists() for name in named)
    for needed in ("pipeline", "orchestration", "flows.py", "pyproject.toml", "README.md", "LICENSE", "experiments"):
        assert needed in named
    for secret in (".env", ".git", "workspace", ".venv", ".prefect"):
        assert not any(fnmatch(secret, name) for name in named)


def test_the_dockerfile_names_no_host_but_public_ones() -> None:
    text = (ROOT / "deploy" / "Dockerfile").read_text()
    assert set(re.findall(r"https://([a-z.]+)", text)) <= {"download.pytorch.org"}
    assert re.findall(r"ARG BASE=(\S+)", text) == ["docker.io/library/python:3.11-slim-bookworm"]
    assert "USER dasae" in text


def test_a_run_is_started_by_the_python_that_deploys_and_leads_its_own_session(tmp_path: Path) -> None:
    assert interpreter() == {"python": sys.executable}
    (pool,) = {one["work_pool"]["job_variables"]["command"] for one in deployments()}
    command = pool.replace("{{ interpreter.python }}", sys.executable).split()
    (tmp_path / "prefect").mkdir()  # instead of Prefect's
    (tmp_path / "prefect" / "__init__.py").touch()
    (tmp_path / "prefect" / "engine.py").write_text("import os\nprint(__name__, os.getsid(0) == os.getpid())\n")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    for own_session in (False, True):
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, start_new_session=own_session
        )
        assert done.stdout == "__main__ True\n"


def test_a_worker_of_this_folder_looks_for_runs_every_second() -> None:
    asked = "from prefect.settings import get_current_settings; print(get_current_settings().worker.query_seconds)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run([sys.executable, "-c", asked], cwd=ROOT, env=kept, capture_output=True, text=True, check=True)
    assert done.stdout == "1.0\n"
