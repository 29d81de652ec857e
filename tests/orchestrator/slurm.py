"""A real Slurm cluster of two nodes on this machine, without accounting, in a folder of its own."""

import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel", "srun")
NODES = ("a", "b")

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={ports[0]}
SlurmctldParameters=preempt_send_user_signal
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
KillWait=3
MinJobAge=5
NodeName=a NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[1]} CPUs=2 RealMemory=1000 State=UNKNOWN
NodeName=b NodeAddr=127.0.0.1 NodeHostname={host} Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=a,b Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=a,b MaxTime=INFINITE State=UP PriorityTier=2
"""


@contextmanager
def running_cluster() -> Generator[Path]:
    """Start munge and Slurm and name them by the environment; skip where they are not installed."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=_path()) is None]
    if missing or os.getuid() != 0:
        pytest.skip(f"needs root and {', '.join(missing) or 'Slurm'}: apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm"))
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(host=socket.gethostname(), folder=folder, ports=_free_ports(3)))
    munge = {"socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log", "seed-file": "munge.seed"}
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PATH", _path())
            patch.setenv("SLURM_CONF", str(config))
            _call(
                "munged", "--force", f"--key-file={key}", *(f"--{key}={folder / file}" for key, file in munge.items())
            )
            _call("slurmctld", "-f", str(config))
            for node in NODES:
                _call("slurmd", "-f", str(config), "-N", node)
            _wait_until_idle(folder)
            yield folder
    finally:
        _end(folder)
        shutil.rmtree(folder)


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _call(*words: str) -> str:
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return done.stdout


def _wait_until_idle(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while _call("sinfo", "--noheader", "--Node", "--format=%t", "--partition=main").split() != ["idle", "idle"]:
        assert time.monotonic() < deadline, [log.read_text()[-2000:] for log in folder.glob("*.log")]
        time.sleep(0.2)


def _end(folder: Path) -> None:
    """Daemons first end their jobs, then themselves; what names the folder on its command line is ours."""
    processes = [p for p in psutil.process_iter() if _is_of(p, folder)]
    for process in processes:
        process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=10)
    for process in alive:
        process.kill()


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.name().startswith(("munge", "slurm")) and any(str(folder) in word for word in process.cmdline())
    except psutil.Error:
        return False
