"""Several processes: the same model as one at the same global batch, on every rank, and what happens when one dies."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from jobs import PLAIN, PRUNE, TUNE, run, same

import finetune_dense
import main_full_global_latency
from runtime.elastic import Heartbeat
from runtime.errors import RunFailed
from runtime.processes import BACKENDS, init_distributed

ROOT = Path(__file__).parent.parent
EXACT = ["--drop-path", "0", "--no-repeated-aug"]  # with those, the ranks see together what one process sees


def environment(**more):
    return os.environ | more


def launcher(ranks, *options):
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *options]


def launch(command, flags, code=0):
    done = subprocess.run([*command, *map(str, flags)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == code, done.stderr[-3000:]
    return done


def start_ranks(script, flags, ranks=2, own_group=False):
    """One process a rank without a launcher, as SLURM or MPI start them."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, script, *map(str, flags)],
            cwd=ROOT,
            text=True,
            start_new_session=own_group,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(
                RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=port
            ),
        )
        for r in range(ranks)
    ]


def wait_for(found, seconds=120):
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def distance(a, b):
    """Relative difference over the whole vector."""
    first, second = (torch.cat([t.flatten().double() for t in ts]) for ts in (a, b))
    return ((first - second).norm() / second.norm()).item()


@pytest.fixture
def prune(runs):
    return [
        *PRUNE,
        *EXACT,
        "--initial-checkpoint",
        runs["dense"] / "ft_checkpoint.pth",
        "--latency_look_up_table",
        runs["table"],
        "--prune_per_iter",
        "16",
        "--interval_prune",
        "6",
        "--epochs",
        "1",
    ]


@pytest.fixture
def long_run(runs, tmp_path):
    """Finetuning that would take minutes, and where its checkpoint is written after every update."""
    shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", tmp_path)
    flags = [
        *TUNE,
        "--finetune",
        tmp_path,
        "--epochs",
        "200",
        "--batch-size",
        "32",
        "--recovery-interval",
        "1",
        "--no-repeated-aug",
    ]
    return flags, lambda: list(tmp_path.glob("ft_dense_*/ft_checkpoint.pth"))


def test_two_ranks_equal_one_at_the_same_global_batch(prune, tmp_path):
    """22 updates with three events, the target far off: exit code 1, and a checkpoint to compare."""
    shared = [*prune, "--batch-size", 32, "--output_dir", tmp_path / "2"]
    launch([*launcher(2), "main_full_global_latency.py"], shared, code=1)
    accumulated = [*prune, "--batch-size", 16, "--grad-accum-steps", 4, "--output_dir", tmp_path / "acc"]
    for flags in ([*prune, "--output_dir", tmp_path / "1"], accumulated):
        with pytest.raises(RunFailed, match="not reached"):
            run(main_full_global_latency, *flags)
    one, two, acc = (
        torch.load(next((tmp_path / n).glob("*/checkpoint.pth")), weights_only=True) for n in ("1", "2", "acc")
    )
    assert one["step"] == two["step"] == acc["step"] == 22 and one["pruner"]["events"] == 3
    for other in (two, acc):
        assert same(one["masks"], other["masks"])
        assert distance(other["model"].values(), one["model"].values()) <= 1e-5
        for name in ("accumulated", "average"):
            assert distance([other["pruner"]["saliency"][name]], [one["pruner"]["saliency"][name]]) <= 1e-5


def test_distributed_evaluation_counts_every_sample_once(runs, capfd):
    flags = ["--eval", "--finetune", runs["tuned"] / "ft_checkpoint.pth", *PLAIN]
    run(finetune_dense, *flags)
    alone = capfd.readouterr().out.strip().splitlines()[-1]
    published = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", "--use_env"]
    shared = launch([*published, "finetune_dense.py"], [*flags, "--dist-eval"]).stdout.strip().splitlines()[-1]
    assert "360 images" in alone and alone.split("loss")[0] == shared.split("loss")[0]


def test_gpus_reduce_tensors_of_either_device():
    """Some sums are kept on the CPU; NCCL alone has no backend for them."""
    chosen = torch.distributed.BackendConfig(torch.distributed.Backend(BACKENDS["cuda"])).get_device_backend_map()
    assert {device: str(backend) for device, backend in chosen.items()} == dict(cpu="gloo", cuda="nccl")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in dict(WORLD_SIZE="4", LOCAL_WORLD_SIZE="4", RANK="0", LOCAL_RANK="0").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--nproc_per_node is 4 but this machine has 2 GPUs"):
        init_distributed("cuda", 60)


@pytest.mark.parametrize(
    "gone, how, line",
    [
        (1, signal.SIGKILL, r"error: rank 1 has not answered for \d+ s"),
        pytest.param(1, signal.SIGSTOP, r"error: rank 1 has not answered for \d+ s", marks=pytest.mark.slow),
        pytest.param(
            0,
            signal.SIGSTOP,
            r"error: (rank 1: )?rank 0, or the launcher, has not answered for \d+ s",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_rank_that_dies_or_hangs_ends_the_others_by_name(long_run, gone, how, line):
    flags, written = long_run
    ranks = start_ranks("finetune_dense.py", [*flags, "--dist-timeout", "8"])
    try:
        wait_for(written)
        ranks[gone].send_signal(how)
        begun, other = time.monotonic(), ranks[1 - gone]
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 1 and time.monotonic() - begun < 40
        assert re.search(line, errors), errors[-2000:]
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_a_rank_that_fails_tells_the_others_why(runs, tmp_path):
    """The second rank runs out of its images."""
    script = tmp_path / "job.py"
    script.write_text(
        "import sys, argparse; sys.path.insert(0, '.')\n"
        "import torch.distributed as dist, torch\n"
        "from runtime import errors, processes, ranks, script\n"
        "def main(args):\n"
        "    processes.init_distributed('cpu', 20)\n"
        "    ranks.check_identical('masks', b'the same')\n"
        "    if ranks.rank() == 1: raise errors.RunFailed('cannot read image x.png')\n"
        "    dist.all_reduce(torch.zeros(1))\n"
        "script.run_script(main, None)\n"
    )
    first, second = start_ranks(str(script), [])
    errors = [p.communicate(timeout=60)[1] for p in (first, second)]
    assert "error: rank 1 failed: cannot read image x.png" in errors[0] and first.returncode == 1
    assert "error: rank 1: cannot read image x.png" in errors[1] and second.returncode == 1


def test_a_rank_with_other_masks_is_named(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        "import sys; sys.path.insert(0, '.')\n"
        "from runtime import processes, ranks, script\n"
        "def main(args):\n"
        "    processes.init_distributed('cpu', 20)\n"
        "    ranks.check_identical('pruning event 3: saliency or masks', b'ab'[: 1 + ranks.rank() // 2])\n"
        "script.run_script(main, None)\n"
    )
    ranks = start_ranks(str(script), [], ranks=3)
    errors = [p.communicate(timeout=60)[1] for p in ranks]
    assert all(p.returncode == 1 for p in ranks)
    assert "pruning event 3: saliency or masks of rank 2 differ from rank 0's" in errors[0]
    assert not any("error:" in text for text in errors[1:])  # it is said once


def test_the_heartbeat_knows_failed_from_silent():
    heart = Heartbeat.__new__(Heartbeat)
    heart.rank, now = 0, time.monotonic()
    heart._heard = {0: ("5", now - 99), 1: ("done", now - 99), 2: ("failed: no disk", now), 3: ("7", now - 20)}
    assert heart._named(heart._silent(30)) == "rank 2 failed: no disk"
    assert heart._named(heart._silent(10)) == "rank 2 failed: no disk; rank 3 has not answered for 20 s"


def test_a_process_whose_launcher_was_killed_ends(tmp_path):
    """torchrun's workers are in sessions of their own: nothing else would stop them, and the folder stays theirs."""
    host = (
        "import time, torch.distributed as dist\n"
        "store = dist.TCPStore('localhost', 0, is_master=True, wait_for_workers=False)\n"
        "print(store.port, flush=True); time.sleep(60)\n"
    )
    worker = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "import torch.distributed as dist\n"
        "from runtime.elastic import Heartbeat\n"
        "store = dist.TCPStore('localhost', int(sys.argv[1]), is_master=False, wait_for_workers=False)\n"
        "Heartbeat(store, 0, 1, timeout=600, interval=0.2).begin()\n"
        "print('beating', flush=True); time.sleep(60)\n"
    )
    pipes = dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", host], **pipes) as launcher:
        port = launcher.stdout.readline().strip()
        with subprocess.Popen([sys.executable, "-c", worker, port], **pipes) as process:
            assert process.stdout.readline() == "beating\n"
            launcher.kill()
            assert process.wait(timeout=20) == 1
            assert "error: rank 0, or the launcher, has gone away" in process.stderr.read()


@pytest.mark.slow
def test_sigterm_to_the_whole_group_with_workers_and_a_slow_disk(long_run, tmp_path):
    """As launchers send it: to data workers, too; and the other rank waits while the checkpoint is written."""
    flags, written = long_run
    job = tmp_path / "job.py"
    job.write_text(
        "import sys, time; sys.path.insert(0, '.')\n"
        "import finetune_dense\nfrom files import checkpoint\nfrom runtime import script\n"
        "save = checkpoint.save\n"
        "def slow(path, **state):\n"
        "    if '--slow' in sys.argv: time.sleep(6)\n"
        "    save(path, **state)\n"
        "checkpoint.save = slow\n"
        "flags = [f for f in sys.argv[1:] if f != '--slow']\n"
        "script.run_script(finetune_dense.main, finetune_dense.get_args_parser().parse_args(flags))\n"
    )
    ranks = start_ranks(str(job), [*flags, "--num_workers", "2", "--recovery-interval", "0", "--slow"], own_group=True)
    try:
        wait_for(lambda: list(tmp_path.glob("ft_dense_*/args.json")))
        time.sleep(15)  # into the first epochs
        for process in ranks:
            os.killpg(process.pid, signal.SIGTERM)
        for process in ranks:
            process.communicate(timeout=90)
        assert [p.returncode for p in ranks] == [143, 143]
        assert torch.load(written()[0], weights_only=True)["step"] > 0
    finally:
        for process in ranks:
            process.kill()


@pytest.mark.slow
def test_sigterm_stops_all_ranks_and_one_process_goes_on(long_run):
    flags, written = long_run
    ranks = start_ranks("finetune_dense.py", flags)
    wait_for(written)
    ranks[1].send_signal(signal.SIGTERM)  # one is enough
    for process in ranks:
        process.communicate(timeout=60)
        assert process.returncode == 143
    step = torch.load(written()[0], weights_only=True)["step"]
    command = [sys.executable, "finetune_dense.py", *flags, "--batch-size", "64", "--num_workers", "1", "--resume"]
    alone = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment())
    wait_for(lambda: torch.load(written()[0], weights_only=True)["step"] > step)
    alone.send_signal(signal.SIGTERM)
    assert alone.wait(60) == 143


@pytest.mark.slow
def test_a_restart_by_torchrun_continues_to_the_same_end(runs, tmp_path):
    folders = []
    for name in ("whole", "broken"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copy(runs["pruned"] / "pruned_checkpoint.pth", folder)
        folders.append(folder)
    flags = [*TUNE, "--epochs", "4", "--batch-size", "32", "--recovery-interval", "2"]
    launch([*launcher(2), "finetune_dense.py"], [*flags, "--finetune", folders[0]])
    command = [*launcher(2, "--max-restarts=2"), "finetune_dense.py", *flags, "--finetune", folders[1]]
    process = subprocess.Popen([*map(str, command)], cwd=ROOT, env=environment(), stderr=subprocess.DEVNULL)
    wait_for(lambda: list(folders[1].glob("ft_dense_*/ft_checkpoint.pth")))
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert process.wait(180) == 0
    whole, broken = (torch.load(next(f.glob("ft_dense_*/ft_checkpoint.pth")), weights_only=True) for f in folders)
    for key in ("model", "model_ema", "optimizer", "epoch", "step"):
        assert same(whole[key], broken[key]), key
