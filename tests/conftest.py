"""Shared by the tests: a small cache, and small runs of the training scripts in this and other processes."""

import gc
import importlib
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)  # the networks of the tests are too small for more

import dit  # noqa: E402
import extract_features  # noqa: E402
import train_repa  # noqa: E402

METHODS = ("repa", "diversedit", "sddit", "meanflow", "dit")
SCRIPTS = {name: importlib.import_module(f"train_{name}") for name in METHODS}
gc.freeze()  # the processes that fork from this one need not look through, and so copy, what is imported
SMALL = "--model nano/2 --steps 6 --batch-size 16 --lr 1e-3 --ema 0.9 --workers 0".split()
SMALL += "--log-every 1 --save-every 3 --sample-every 0".split()
EXTRACT = "--image-size 8 --patch 2 --vae none --encoder hog --batch-size 16 --workers 0".split()
TINY = (2, 32, 2)  # blocks, width, heads


# --- `pytest` without arguments runs half of the tests in a second process


def pytest_configure(config):
    config.half = os.environ.get("HALF_OF_THE_TESTS")
    config.other_half = None
    if config.half or config.invocation_params.args:
        return
    config.half = "0"
    config.other_half = subprocess.Popen(
        [sys.executable, "-m", "pytest", "--quiet"],
        cwd=config.rootpath,
        env=os.environ | {"HALF_OF_THE_TESTS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def pytest_collection_modifyitems(config, items):
    if config.half:
        config.hook.pytest_deselected(items=items[1 - int(config.half) :: 2])
        items[:] = items[int(config.half) :: 2]


def pytest_sessionfinish(session):
    if session.config.other_half:
        session.config.other_output = session.config.other_half.communicate()[0]
        if session.config.other_half.returncode:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    if config.other_half:
        terminalreporter.section("the other half of the tests")
        terminalreporter.write_line(config.other_output)


# --- runs in this process


@pytest.fixture
def tiny_nano(monkeypatch):
    monkeypatch.setitem(dit.SIZES, "nano", TINY)


def start(script, cache, out, *options):
    """A small run of the script of this name, without pictures unless --sample-every is among the options."""
    arguments = ["--data", cache, "--out", out, *SMALL, *options]
    importlib.import_module(script).main([str(argument) for argument in arguments])


def train(cache, out, *options, script=train_repa):
    """A small run (see start). Returns its checkpoint."""
    start(script.__name__, cache, out, *options)
    return torch.load(out / "last.pt", weights_only=True)


def refusal(cache, out, *options, script=train_repa):
    """The message, one line, with which a run of the script is refused."""
    with pytest.raises(SystemExit) as error:
        train(cache, out, *options, script=script)
    message = error.value.code
    assert isinstance(message, str) and "\n" not in message and message.startswith(Path(script.__file__).name)
    return message


def rows(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def difference(a, b):
    """Largest difference between the weights, averages, heads and optimiser states of two checkpoints."""
    worst = 0.0
    for part in ("model", "ema", "heads"):
        assert a[part].keys() == b[part].keys()
        worst = max([worst] + [(a[part][name] - b[part][name]).abs().max().item() for name in a[part]])
    assert a["opt"]["state"].keys() == b["opt"]["state"].keys()
    for i, state in a["opt"]["state"].items():
        worst = max(worst, *[(state[name] - b["opt"]["state"][i][name]).abs().max().item() for name in state])
    return worst


def objective_for(script, cache, *options):
    """The Objective of a script as its `main` builds it for the cache, with seed 0."""
    arguments = ["--data", cache, "--out", "nowhere", "--model", "nano/2", "--batch-size", 16, *options]
    args = script.parse_args([str(argument) for argument in arguments])
    features, config, _, _ = script.prepare(args, 1)
    torch.manual_seed(0)
    return script.Objective(dit.build(config), args, features.meta)


def randomize(module, std=0.1):
    """Fill all trained parameters, so that no part of the network is silent because it starts at zero."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=std)
    return module


# --- runs in other processes

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
WITH = "import runpy, sys; sys.argv.pop(0); {}; runpy.run_path(sys.argv[0], run_name='__main__')"
WITH_TINY_NANO = f"import dit; dit.SIZES['nano'] = {TINY}"


def command_line(*command, processes=1, first=None):
    """The command that starts a script after the statements `first`, by torchrun if `processes` > 1."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    if first:
        launcher += (["--no-python", sys.executable] if processes > 1 else []) + ["-c", WITH.format(first)]
    return [*launcher, *map(str, command)]


def run(*command, processes=1, check=True, first=None, **environment):
    """Run a script of the repository as a user would (see command_line). Returns the ended process."""
    line, env = command_line(*command, processes=processes, first=first), os.environ | ENVIRONMENT
    env |= environment
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="session")
def processes():
    """A multiprocessing context whose processes have the training scripts imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["conftest", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}).items():
            patch.setenv(name, value)
        yield context


def exit_code(processes, function, *arguments):
    """Of a process of its own that calls function(*arguments)."""
    process = processes.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    process.kill()
    return process.exitcode


def become_rank(rank, world, port, function, arguments):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dit.SIZES["nano"] = TINY
    function(*arguments)


def run_ranks(processes, function, *arguments, world=2):
    """function(*arguments) in processes that find each other as under torchrun, with the tiny nano."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    each = [(rank, world, port, function, arguments) for rank in range(world)]
    started = [processes.Process(target=become_rank, args=args) for args in each]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in started] == world * [0]


# --- data


@pytest.fixture(scope="session")
def small_npz(tmp_path_factory):
    """96 images of 8 x 12 pixels in three classes, as an ADM .npz."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "images.npz"
    np.savez(path, arr_0=rng.integers(0, 256, (96, 8, 12, 3), dtype=np.uint8), arr_1=np.arange(96) % 3)
    return path


@pytest.fixture(scope="session")
def cache(small_npz, tmp_path_factory):
    """A cache of the small images: 8 x 8 pixels, HOG targets for patch 2, two views."""
    return extract(small_npz, tmp_path_factory.mktemp("cache") / "features", "--flip")


def extract(source, out, *options):
    """A cache at `out`, 8 x 8 pixels with HOG targets unless the options say otherwise. Returns `out`."""
    arguments = ["--data", source, "--out", out, *EXTRACT, *options]
    extract_features.main([str(argument) for argument in arguments])
    return out
