from __future__ import annotations

import pytest

from eve.parallel.launcher import first_host, read_environment

SRUN = {
    "SLURM_JOB_ID": "4711001",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "32",
    "SLURM_JOB_NODELIST": "no-such-host-[017-018,020]",
}


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login", "login"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[007-009,012],login", "gpu007"),
        ("gpu[3,5]", "gpu3"),
        ("rack1-[2,4]-gpu[1-8].cluster,other", "rack1-2-gpu1.cluster"),
    ],
)
def test_first_host_of_slurms_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_a_task_of_srun() -> None:
    environment = dict(SRUN)
    read_environment(environment)
    added = {name: environment[name] for name in environment.keys() - SRUN.keys()}
    assert added == {
        "RANK": "9",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "32",
        "MASTER_ADDR": "no-such-host-017",
        "MASTER_PORT": "21001",
    }


def test_a_step_with_fewer_tasks_than_its_job() -> None:
    environment = SRUN | {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "no-such-host-020"}
    read_environment(environment)
    assert (environment["WORLD_SIZE"], environment["MASTER_ADDR"]) == ("8", "no-such-host-020")


@pytest.mark.parametrize(
    "environment",
    [
        {},
        # The script of a job, which is to start a launcher.
        {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"},
        # deepspeed or torchrun, started by srun once on each node.
        SRUN | {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "no-such-host", "MASTER_PORT": "1"},
    ],
)
def test_no_task_of_srun_is_left_as_it_is(environment: dict[str, str]) -> None:
    before = dict(environment)
    read_environment(environment)
    assert environment == before
