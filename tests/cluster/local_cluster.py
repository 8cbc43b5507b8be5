"""A real SLURM cluster on one Linux machine, for tests: munged, slurmctld, and a slurmd for each "node".

A node is a process tree in its own namespaces (pid, mount, uts, net): it has its own host name, address, ports and
process ids, a scratch file system that no other node sees, and a network that reaches only the other nodes. Killing the
tree's root simulates a power failure. Needs root and Debian's slurm-wlm, munge and iproute2.
"""

import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from waiting import wait_until

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "unshare", "nsenter")
# A cluster's bridge and network, by its number: 198.18.0.0/15 is reserved for network tests (RFC 2544).
MOST_CLUSTERS = 64
NETWORK = "198.19"
CONTROLLER_HOST = 254
SECONDS_TO_START = 60
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"

CONFIGURATION = """\
ClusterName=test{number}
SlurmctldHost=localhost({controller})
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until the credentials of its earlier start have expired: 120 s by default
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=10
TCPTimeout=2
KillWait=30
MinJobAge=86400
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# Process 1 of a node. It reports once its namespaces exist, waits for its network, and outlives its slurmd, as the jobs
# on a node do; bash reaps the orphans of jobs.
NODE = """
hostname "$1"; mount --bind "$2/hosts" /etc/hosts; mount -t tmpfs -o size=256m tmpfs "$2/scratch"; ip link set lo up
echo ready; read -r go
exec </dev/null >>"$2/log/$1.out" 2>&1
slurmd -D -N "$1" -f "$2/slurm.conf" &
while :; do sleep 3600 & wait $!; done
"""


def why_not() -> str | None:
    """Return the reason why a cluster cannot start here; None if it can."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root, for namespaces"
    missing = [program for program in PROGRAMS if shutil.which(program, path=SBIN) is None]
    if missing:
        return f"{', '.join(missing)} missing: apt-get install slurm-wlm munge iproute2"
    tried = subprocess.run(["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"namespaces are forbidden here: {tried.stderr.decode().strip()}"


class LocalCluster:
    """Nodes node1 … nodeN, used as a context manager; leaving it ends every process of the cluster.

    Args:
        folder: for state and logs, a short absolute path (it holds a socket).
        num_nodes: how many nodes.
        num_cpus, num_gpus: the numbers that each node claims to have; the GPUs are empty device files.
    """

    def __init__(self, folder: Path, num_nodes: int = 2, num_cpus: int = 8, num_gpus: int = 2):
        self.folder, self.num_nodes, self.num_cpus, self.num_gpus = folder, num_nodes, num_cpus, num_gpus
        self.number: int | None = None
        self.daemons: dict[str, subprocess.Popen] = {}
        self.nodes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "LocalCluster":
        try:
            for name in ("state", "spool", "munge", "log", "dev", "scratch"):
                (self.folder / name).mkdir(parents=True, mode=0o755)
            self._make_bridge()
            self._configure()
            self._start_munge()
            self.start_controller()
            for name in self.names:
                self.boot(name)
            wait_until(lambda: self.num_usable() == self.num_nodes, "the nodes are usable", SECONDS_TO_START, pause=0.2)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        for name in list(self.nodes):
            self.crash(name)
        for daemon in self.daemons.values():
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        if self.number is not None:
            subprocess.run(["ip", "link", "delete", self.bridge], env=self.environment, capture_output=True)

    # --- parts ---

    @property
    def names(self) -> list[str]:
        return [f"node{number}" for number in range(1, self.num_nodes + 1)]

    @property
    def bridge(self) -> str:
        return f"ztbridge{self.number}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment in which sbatch, srun and scontrol talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": SBIN}

    def _address(self, host: int) -> str:
        return f"{NETWORK}.{self.number}.{host}"

    def _make_bridge(self) -> None:
        """Take the first number whose bridge is free, because several test runs may have clusters at once."""
        for number in range(MOST_CLUSTERS):
            self.number = number
            made = subprocess.run(
                ["ip", "link", "add", self.bridge, "type", "bridge"], env=self.environment, capture_output=True
            )
            if made.returncode == 0:
                self._call("ip", "address", "add", f"{self._address(CONTROLLER_HOST)}/24", "dev", self.bridge)
                self._call("ip", "link", "set", self.bridge, "up")
                return
        self.number = None
        raise RuntimeError(f"no bridge could be made: {made.stderr.decode().strip()}")

    def _configure(self) -> None:
        folder, names = self.folder, self.names
        # torch looks up an address in its IPv6 form: without the second kind of line it would ask a DNS server
        addresses = [(self._address(number), name) for number, name in enumerate(names, start=1)]
        hosts = [f"{form}{address} {name}" for form in ("", "::ffff:") for address, name in addresses]
        (folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *hosts]) + "\n")
        nodes = [
            f"NodeName={name} NodeHostname={name} NodeAddr={self._address(number)} "
            f"Port={20000 + 100 * self.number + number} Sockets=1 CoresPerSocket={self.num_cpus} ThreadsPerCore=1 "
            f"RealMemory=16000{f' Gres=gpu:{self.num_gpus}' if self.num_gpus else ''} State=UNKNOWN\n"
            for number, name in enumerate(names, start=1)
        ]
        text = CONFIGURATION.format(
            number=self.number, folder=folder, controller=self._address(CONTROLLER_HOST), port=19000 + self.number
        )
        (folder / "slurm.conf").write_text(text + "".join(nodes))
        # slurmd loads a cgroup plugin even if nothing uses it; version 1's starts without cgroups
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        gres = "AutoDetect=off\n"
        if self.num_gpus:  # GPUs without a device file register as none
            for gpu in range(self.num_gpus):
                self._call("mknod", "-m", "666", str(folder / "dev" / f"gpu{gpu}"), "c", "1", "3")
            files = f"{folder}/dev/gpu[0-{self.num_gpus - 1}]"
            gres += f"NodeName=node[1-{self.num_nodes}] Name=gpu File={files}\n"
        (folder / "gres.conf").write_text(gres)

    def _start_munge(self) -> None:
        folder = self.folder / "munge"
        key = folder / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        # --force: a parent of the folder may be writable by others
        self._start_daemon(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/socket"),
            *(f"--pid-file={folder}/pid", f"--log-file={folder}/log", f"--seed-file={folder}/seed"),
        )
        wait_until((folder / "socket").exists, "munged listens", SECONDS_TO_START)

    def _start_daemon(self, program: str, *arguments: str) -> None:
        with (self.folder / "log" / f"{program}.out").open("a") as log:
            self.daemons[program] = subprocess.Popen(
                [program, *arguments], env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def _call(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        given = {**(environment or {}), **self.environment}
        ended = subprocess.run(command, env=given, cwd=cwd, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"{' '.join(command)}: {ended.stdout.strip()} {ended.stderr.strip()}")
        return ended.stdout

    # --- starts and failures ---

    def start_controller(self) -> None:
        """Start slurmctld; it continues with the jobs it knew."""
        self._start_daemon("slurmctld", "-D", "-f", str(self.folder / "slurm.conf"))

    def kill_controller(self) -> None:
        """Send SIGKILL to slurmctld."""
        controller = self.daemons.pop("slurmctld")
        controller.kill()
        controller.wait()

    def boot(self, name: str) -> None:
        """Start a node that is not up."""
        namespaces = ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"]
        node = subprocess.Popen(
            [*namespaces, "bash", "-c", NODE, "node", name, str(self.folder)],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.nodes[name] = node
        (self.folder / "spool" / name).mkdir(exist_ok=True)
        if node.stdout.readline() != "ready\n":
            raise RuntimeError(f"{name} did not come up")
        host = int(name.removeprefix("node"))
        inside = ["nsenter", f"--net=/proc/{node.pid}/ns/net", "ip"]
        link = f"zt{self.number}n{host}"  # it disappears with the node's namespace, a moment after the node
        subprocess.run(["ip", "link", "delete", link], env=self.environment, capture_output=True)
        self._call("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        self._call("ip", "link", "set", link, "master", self.bridge, "up")
        self._call(*inside, "address", "add", f"{self._address(host)}/24", "dev", "eth0")
        self._call(*inside, "link", "set", "eth0", "up")  # there is no default route: reaching outside fails at once
        node.stdin.write("go\n")
        node.stdin.close()

    def crash(self, name: str) -> None:
        """Kill every process of the node, as a power failure does."""
        node = self.nodes.pop(name)
        node.send_signal(signal.SIGKILL)
        node.wait()
        node.stdout.close()

    def processes(self, name: str, words: str) -> list[int]:
        """Return this machine's ids of a node's processes whose command line contains `words`."""
        namespace = os.readlink(f"/proc/{self.nodes[name].pid}/ns/net")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if words in command and os.readlink(folder / "ns" / "net") == namespace:
                    found.append(int(folder.name))
            except OSError:  # it has ended
                continue
        return sorted(found)

    def no_route_count(self, name: str) -> int:
        """Return how often a process on the node has tried to reach an address outside the cluster."""
        lines = Path(f"/proc/{self.nodes[name].pid}/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Ip:"))
        return int(values[names.index("OutNoRoutes")])

    # --- jobs ---

    def call(self, *command: str, cwd: Path | None = None, environment: Mapping[str, str] | None = None) -> str:
        """Run a command in a folder, with more environment variables; return its output."""
        return self._call(*command, cwd=cwd, environment=environment)

    def num_usable(self) -> int:
        """Return how many nodes can take jobs."""
        found = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--states=idle,mixed,allocated", "--format=%N"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return len(set(found.stdout.split()))

    def job(self, number: int | str) -> dict[str, str]:
        """Return the fields of `scontrol show job`, such as JobState; {} while the controller does not answer."""
        shown = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", str(number)],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return dict(word.split("=", 1) for word in shown.stdout.split() if "=" in word)

    def wait_for(self, number: int | str, *states: str, seconds: float = 180) -> dict[str, str]:
        """Wait until a job is in one of the states; by default until it has ended in any way."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        wait_until(lambda: self.job(number).get("JobState") in wanted, f"job {number} is {wanted}", seconds, pause=0.2)
        return self.job(number)
