"""What is asked of the cluster is checked at once."""

from __future__ import annotations

import re

import pytest

from hpc_oialr.errors import ConfigError, UnknownNameError
from hpc_oialr.launch import Request
from hpc_oialr.launch.slurm import seconds_of


def test_defaults():
    request = Request()
    assert (request.processes, request.gpus, request.time_s, request.seeds) == (1, 0, 3600, None)


@pytest.mark.parametrize(
    ("parameters", "processes"),
    [
        ({"nodes": 2}, 2),
        ({"nodes": 2, "gpus_per_node": 4}, 8),
        ({"nodes": 2, "gpus_per_node": "a100:4"}, 8),
        ({"nodes": 2, "gpus_per_node": 4, "tasks_per_node": 1}, 2),
    ],
)
def test_one_process_a_gpu_if_not_said(parameters, processes):
    assert Request(**parameters).processes == processes


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"nodes": 0}, "nodes is 0; must be a whole number, at least 1."),
        ({"nodes": "2"}, "nodes is '2'; must be a whole number"),
        ({"tasks_per_node": True}, "tasks_per_node is True; must be a whole number"),
        ({"max_requeues": -1}, "max_requeues is -1; must be a whole number, at least 0."),
        (
            {"gpus_per_node": "four"},
            "gpus_per_node is 'four'; must be a number of GPUs, or TYPE:NUMBER. E.g. a100:4.",
        ),
        (
            {"time": "4 hours"},
            "time is '4 hours'; must be minutes, minutes:seconds, hours:minutes:seconds, days-hours",
        ),
        ({"time": 60}, "time is 60; must be minutes"),
        (
            {"time": "2", "signal_s": 120},
            "time is '2'; must be longer than signal_s, the 120 s before the end",
        ),
        ({"partition": "a\n#SBATCH -w x"}, "must be one line of text: Slurm reads a header line by line"),
        ({"visible_gpus": (1,)}, "visible_gpus is (1,); is for the executor 'local': Slurm chooses the GPUs of a job."),
        ({"account": ""}, "account is ''; must be one line of text"),
        ({"folder": "a\nb"}, "folder is 'a\\nb'; must be one line of text"),
        ({"folder": "50%"}, "folder is '50%'; must hold neither % nor \\: Slurm reads them as patterns"),
        (
            {"setup": "module load x"},
            "setup is 'module load x'; must be a list of shell commands. Put it in brackets.",
        ),
        ({"array": {"seeds": []}}, "array is {'seeds': []}; must be different whole numbers, none below 0."),
        ({"array": {"seeds": [1, 1]}}, "must be different whole numbers"),
        (
            {"executor": "local", "nodes": 2},
            "nodes is 2; must be 1 with the executor 'local', which works on this",
        ),
        ({"executor": "local", "site": "x"}, "site is 'x'; must be left out with the executor 'local'"),
        (
            {"executor": "debug", "tasks_per_node": 2},
            "tasks_per_node is 2; must be 1 with the executor 'debug'",
        ),
    ],
)
def test_what_cannot_be(parameters, text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        Request(**parameters)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"array": {"seed": [1]}}, "unknown array 'seed'; valid: seeds."),
        ({"executor": "pbs"}, "unknown executor 'pbs'; valid: debug, local, slurm."),
        ({"node": 3}, "unknown parameter of submit 'node'; valid: account=None, array=None, constraint=None"),
    ],
)
def test_unknown_names(parameters, text):
    with pytest.raises(UnknownNameError, match=re.escape(text)) as caught:
        Request.of(**parameters)
    if "node" in parameters:
        assert "time='01:00:00'" in str(caught.value)
        assert str(caught.value).endswith("Did you mean 'nodes'?")


@pytest.mark.parametrize("text", ["", "1-", "1:2:3:4", "-5", "1:", "1 2", "٣", "one"])
def test_no_time(text):
    assert seconds_of(text) is None
