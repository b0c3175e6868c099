"""What starts moejax on machines that are not here: linted, parsed and run dry."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TPU_VM = [str(ROOT / "launch/tpu_vm.sh"), "--tpu=pod", "--zone=us-east5-a"]
SCRIPTS = ("launch/tpu_vm.sh", "launch/slurm.sbatch", "launch/environment", "launch/quickstart")


def tool(name: str) -> str:
    """A linter of the extra [dev], which stands beside this Python."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    assert found, f"{name} is missing: pip install -e .[dev]"
    return found


def run(*command, **environment):
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment, cwd=ROOT
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script):
    done = run(tool("shellcheck"), script)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["tpu", "cuda"])
def test_hadolint_finds_nothing_and_what_is_copied_exists(name):
    file = f"launch/Dockerfile.{name}"
    done = run(tool("hadolint"), "--no-color", file)
    assert done.returncode == 0, done.stdout
    text = (ROOT / file).read_text().splitlines()
    lines = [line.split()[1:-1] for line in text if line.startswith("COPY")]
    assert lines and all((ROOT / source).exists() for sources in lines for source in sources)


# The fields of JobSet v1alpha2 and of the Kubernetes kinds inside it that a manifest here may use,
# and which of them must be there.
POD = {"restartPolicy", "hostNetwork", "dnsPolicy", "terminationGracePeriodSeconds"}
POD |= {"nodeSelector", "containers!", "volumes", "securityContext"}
SCHEMA = {
    "": {"apiVersion!", "kind!", "metadata!", "spec!"},
    "metadata": {"name!", "annotations", "labels"},
    "spec": {"failurePolicy", "replicatedJobs!", "network", "successPolicy", "suspend"},
    "spec.failurePolicy": {"maxRestarts", "rules"},
    "spec.replicatedJobs": {"name!", "replicas", "template!"},
    "spec.replicatedJobs.template": {"metadata", "spec!"},
    "spec.replicatedJobs.template.spec": {
        "parallelism",
        "completions",
        "completionMode",
        "backoffLimit",
        "template!",
    },
    "spec.replicatedJobs.template.spec.template": {"metadata", "spec!"},
    "spec.replicatedJobs.template.spec.template.spec": POD,
    "spec.replicatedJobs.template.spec.template.spec.securityContext": {
        "fsGroup",
        "fsGroupChangePolicy",
    },
    "spec.replicatedJobs.template.spec.template.spec.containers": {
        "name!",
        "image!",
        "args",
        "command",
        "env",
        "ports",
        "resources",
        "volumeMounts",
    },
    "spec.replicatedJobs.template.spec.template.spec.volumes": {"name!", "persistentVolumeClaim"},
}


def check(value, path=""):
    if isinstance(value, list):
        for one in value:
            check(one, path)
    elif isinstance(value, dict) and path in SCHEMA:
        known = {key.rstrip("!") for key in SCHEMA[path]}
        needed = {key.rstrip("!") for key in SCHEMA[path] if key.endswith("!")}
        assert set(value) <= known, (path, set(value) - known)
        assert needed <= set(value), (path, needed - set(value))
        for key, inner in value.items():
            check(inner, f"{path}.{key}".lstrip("."))


def test_the_jobset_manifest_has_the_fields_of_its_apis_and_its_numbers_agree():
    found = yaml.safe_load((ROOT / "launch/gke_jobset.yaml").read_text())
    check(found)
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = found["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    per_host = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == chips // per_host
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert job["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    user = re.search(r"^USER (\d+)$", (ROOT / "launch/Dockerfile.tpu").read_text(), re.MULTILINE)
    assert user and pod["securityContext"]["fsGroup"] == int(user[1])
    config = next(arg for arg in container["args"] if arg.startswith("--config="))
    assert (ROOT / config.removeprefix("--config=")).is_file()


def test_the_manifest_check_can_fail():
    with pytest.raises(AssertionError, match="replicaz"):
        check({"name": "a", "template": {}, "replicaz": 1}, "spec.replicatedJobs")
    with pytest.raises(AssertionError, match="image"):
        check([{"name": "a"}], "spec.replicatedJobs.template.spec.template.spec.containers")


def test_tpu_vm_prints_what_it_would_run():
    done = run(*TPU_VM, "--dry_run", "run", "--config=a.py", "--workdir=/mnt/b/it's mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("gcloud compute tpus tpu-vm ssh pod --zone=us-east5-a")
    assert "--multihost=auto" in done.stdout and "--worker=all" in done.stdout
    told = run(TPU_VM[0], "--help").stdout
    assert told.endswith("never run on\na TPU VM.\n") and "://" not in told


def test_what_tpu_vm_sends_survives_the_shell_of_the_worker(tmp_path):
    """A stand-in for gcloud runs the command as a worker would; its python prints its arguments."""
    (tmp_path / "moejax/.venv/bin").mkdir(parents=True)
    python = tmp_path / "moejax/.venv/bin/python"
    python.write_text('#!/bin/sh\nfor one in "$@"; do echo "[$one]"; done\n')
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(
        '#!/bin/bash\nfor one in "$@"; do case $one in --command=*) '
        f'cd {tmp_path}; exec bash -c "${{one#*=}}" ;; esac; done\n'
    )
    python.chmod(0o755)
    gcloud.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = run(*TPU_VM, "run", "--config=a.py", "--workdir=/mnt/b/it's $HOME", PATH=path)
    wanted = ["-m", "launch.train", "--multihost=auto", "--config=a.py"]
    wanted += ["--workdir=/mnt/b/it's $HOME"]
    assert done.stdout.splitlines() == [f"[{one}]" for one in wanted], done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--config=a.py"], "--tpu is missing"),
        (["--tpu=a", "--zone=b"], "usage:"),
        (["--tpu=a", "--zone=b", "dance"], "unknown action dance"),
        (["--tpu=a", "--zone=b", "run"], "takes the flags"),
        (["--tpus=a"], "unknown flag --tpus=a"),
    ],
)
def test_tpu_vm_refuses_in_one_line(arguments, said):
    done = run(TPU_VM[0], *arguments)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_slurm_prints_what_it_would_run_and_refuses_other_folders(tmp_path):
    script = str(ROOT / "launch/slurm.sbatch")
    settings = {"MOEJAX_DRY_RUN": "1", "MOEJAX_PYTHON": "python3", "SLURM_SUBMIT_DIR": str(ROOT)}
    done = run("bash", script, "--config=a.py", "--workdir=/x y", **settings)
    assert done.returncode == 0, done.stderr
    assert "python3 -m launch.train --multihost=auto --config=a.py --workdir=/x\\ y" in done.stdout
    done = run("bash", script, "--config=a.py", **settings | {"SLURM_SUBMIT_DIR": str(tmp_path)})
    assert done.returncode == 2 and "root of the moejax checkout" in done.stderr
    done = run("bash", script, **settings)
    assert done.returncode == 2 and "usage" in done.stderr


@pytest.mark.parametrize("code, queued", [(75, "requeue 17\n"), (0, ""), (1, "")])
def test_slurm_queues_again_what_has_saved_also_when_the_signal_reaches_the_script(
    tmp_path, code, queued
):
    """Stand-ins for Slurm: the script gets the signal while the run is ending."""
    srun, scontrol, asked = tmp_path / "srun", tmp_path / "scontrol", tmp_path / "asked"
    script = "case $(cat /proc/$PPID/comm) in bash) kill -TERM $PPID ;; esac"
    srun.write_text(f"#!/bin/sh\n{script}\nsleep 0.2\nexit {code}\n")
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {asked}\n')
    for file in (srun, scontrol):
        file.chmod(0o755)
    asked.touch()
    settings = {"MOEJAX_PYTHON": "python3", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "17"}
    settings["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    done = run("bash", str(ROOT / "launch/slurm.sbatch"), "--config=a.py", **settings)
    assert done.returncode == code, done.stderr
    assert asked.read_text() == queued
    lines = (ROOT / "launch/slurm.sbatch").read_text().splitlines()
    # To the steps, not the shell alone (that would be B:TERM); Slurm may be a minute off.
    (signal,) = [line for line in lines if line.startswith("#SBATCH --signal=")]
    assert signal == "#SBATCH --signal=TERM@300" and "#SBATCH --requeue" in lines
