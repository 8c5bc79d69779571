"""Checks the files beside it by the tools' own schemas and parsers; nothing is launched.

Needs `pip install skypilot xpk kubernetes-validate pyyaml`, in an environment of its own.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false
import argparse
import os
import subprocess
import tempfile
from pathlib import Path

import kubernetes_validate
import sky
import yaml
from xpk.parser.core import set_parser

HERE = Path(__file__).parent
KUBERNETES = "1.31"


def skypilot() -> None:
    """The task, with what a user must tell it."""
    text = (HERE / "skypilot.yaml").read_text()
    task = sky.Task.from_yaml_config(yaml.safe_load(text), env_overrides=[("FLAXZOO", "x"), ("NFS", "host:/runs")])
    assert task.num_nodes == 2


def kubernetes() -> None:
    """The claim, and the job that the JobSet repeats."""
    claim, jobset = yaml.safe_load_all((HERE / "gke_jobset.yaml").read_text())
    kubernetes_validate.validate(claim, KUBERNETES, strict=True)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            "spec": replicated["template"]["spec"],
        }
        kubernetes_validate.validate(job, KUBERNETES, strict=True)


def xpk() -> None:
    """What xpk.sh calls xpk with, read by xpk's parser."""
    with tempfile.TemporaryDirectory() as folder:
        stand_in = Path(folder) / "xpk"
        stand_in.write_text('#!/bin/sh\nprintf "%s\\0" "$@"\n')
        stand_in.chmod(0o755)
        told = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "IMAGE": "i", "PATH": f"{folder}:{os.environ['PATH']}"}
        command = [HERE / "xpk.sh", "my-run", "v5litepod-16", "shakespeare", "--prompt", "It was"]
        shown = subprocess.run(command, env=told, check=True, capture_output=True, text=True).stdout
    parser = argparse.ArgumentParser()
    set_parser(parser)
    parsed = parser.parse_args(shown.split("\0")[:-1])
    assert parsed.command.split()[:4] == ["exec", "zoo", "train", "shakespeare"]


if __name__ == "__main__":
    for check in (skypilot, kubernetes, xpk):
        check()
        print(check.__name__, "ok")
