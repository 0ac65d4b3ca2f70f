"""What every program shares: how it ends, what a run must not lose, processes, locks and memory."""

import argparse
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import (
    ENVIRONMENT,
    ROOT,
    TINY,
    WITH_TINY_NANO,
    command_line,
    refusal,
    rows,
    run,
    run_ranks,
    start,
    train,
)

import dit
import files
import train_repa
from files import UserError, number

ENDLESS = "--model nano/2 --batch-size 16 --log-every 99999 --sample-every 0 --steps 9999999".split()


# --- how a program ends


def ended(error, **args):
    """The exit message of a program in which `error` is raised."""
    with pytest.raises(SystemExit) as end, files.program("folder/train_x.py", argparse.Namespace(**args)):
        raise error
    return end.value.code


def test_what_a_user_can_repair_is_one_line(tmp_path):
    assert ended(UserError("--data x: is empty")) == "train_x.py: --data x: is empty"
    missing = FileNotFoundError(2, "No such file or directory", str(tmp_path / "a" / "b"))
    assert ended(missing, out=str(tmp_path)) == f"train_x.py: {tmp_path}/a/b: No such file or directory"
    assert "interrupted" in ended(KeyboardInterrupt())


@pytest.mark.parametrize(
    "error",
    [
        ValueError("not enough values to unpack (expected 3, got 2)"),
        TypeError("unsupported operand"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        FileNotFoundError(2, "No such file or directory", "a forker's own file"),
        OSError("without a file"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)) as end, files.program("train_x.py", argparse.Namespace(out="runs/x")):
        raise error
    assert end.value is error


def test_a_bug_in_a_fork_keeps_its_traceback(cache, tmp_path, monkeypatch, tiny_nano):
    """The classic slip in Objective.__init__ shows its file and line."""

    def forked(self, model, args, meta):
        a, b, c = model.pos_embed.shape[1:]

    monkeypatch.setattr(train_repa.Objective, "__init__", forked)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        train(cache, tmp_path / "run")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: not enough memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
    ],
    ids=["cpu", "cuda", "python"],
)
def test_out_of_memory_names_the_flag_to_lower(error):
    assert "--micro-batch" in ended(error, micro_batch=None)
    assert "--batch-size" in ended(error, batch_size=64)


@pytest.mark.parametrize("flag", ["--init", "--data", "--out", "--model"])
@pytest.mark.parametrize("value", [[""], [" "], ["="]], ids=["empty", "blank", "equals"])
def test_an_empty_value_is_refused_beside_its_flag(cache, tmp_path, flag, value):
    """As from a variable that is not set."""
    words = [flag + "="] if value == ["="] else [flag, *value]
    message = refusal(cache, tmp_path / "run", *words)
    assert flag in message and "empty" in message and not list(tmp_path.iterdir())


def test_numbers():
    assert number(float, 0, below=1)("0.5") == 0.5
    for text, limits in {"1": dict(below=1), "0": dict(above=0), "nan": {}, "inf": {}, "x": {}}.items():
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            number(float, **limits)(text)
    for flag in ("--ema 1", "--lr 1e39", "--beta2 1"):
        with pytest.raises(SystemExit, match=flag.split()[0]):
            train_repa.parse_args(flag.split())


# --- streams that close


def start_process(script, *options, first=WITH_TINY_NANO, processes=1, **pipes):
    command = command_line(script, *options, processes=processes, first=first)
    environment = os.environ | ENVIRONMENT
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes)


def wait_for(path, process):
    until = time.monotonic() + 60
    while not Path(path).exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)


def start_signalled(log, *arguments):
    """A run that catches signals and prints to a file, as a child of the fork server starts it."""
    os.setsid()
    for descriptor in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    torch.set_num_threads(1)
    dit.SIZES["nano"] = TINY
    files.catch_signals()
    start("train_repa", *arguments)


class Run:
    """A run of train_repa in a process of its own."""

    def __init__(self, processes, cache, out, *options):
        self.log = out.parent / "printed.txt"
        arguments = (self.log, cache, out, *ENDLESS, *options)
        self.process = processes.Process(target=start_signalled, args=arguments)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def end(self):
        """Its exit code, and what it printed."""
        self.process.join(60)
        self.process.kill()
        return self.process.exitcode, self.log.read_text()


def saved_step(out):
    return torch.load(out / "last.pt", weights_only=True)["step"]


def test_ctrl_c_while_tee_dies_first(cache, tmp_path):
    """`python train_repa.py 2>&1 | tee log`: the reader of both streams is gone before the handler runs."""
    out = tmp_path / "run"
    options = ["--data", cache, "--out", out, *ENDLESS, "--save-every", 20, "--log-every", 1]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = start_process("train_repa.py", *options, **pipes)
    wait_for(out / "last.pt", process)
    process.stdout.close()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) != 0
    step = saved_step(out)
    assert step >= 20 and rows(out)[-1]["step"] == step, "rows of every step, and the last one is saved"


@pytest.mark.parametrize("redirection", [">&- 2>&-"])
def test_a_closed_stream_does_not_shorten_a_run(cache, tmp_path, redirection):
    out = tmp_path / "run"
    options = ["--data", cache, "--out", out, "--model", "nano/2", "--batch-size", 16, "--steps", 30]
    options += ["--log-every", 1, "--sample-every", 0]
    line = command_line("train_repa.py", *options, first=WITH_TINY_NANO)
    quoted = " ".join(f"'{word}'" for word in line).replace("dit.SIZES['nano']", 'dit.SIZES["nano"]')
    quoted = quoted.replace("run_name='__main__'", 'run_name="__main__"')
    shell = f"set -o pipefail; {quoted} {redirection}"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert saved_step(out) == 30 and rows(out)[-1]["step"] == 30


# --- signals, dead loader processes, full disks


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_lost_terminal_and_slurms_warning_save(cache, tmp_path, processes, number):
    out = tmp_path / "run"
    process = Run(processes, cache, out, "--save-every", 20)
    wait_for(out / "last.pt", process)
    os.kill(process.pid, number)
    code, printed = process.end()
    assert code == 1 and "Traceback" not in printed
    assert f"interrupted at step {saved_step(out)}" in printed


def test_sigterm_to_every_process_of_a_job_saves(cache, tmp_path):
    """As scancel and systemd send it: the loader processes must live until the last step."""
    out = tmp_path / "run"
    options = ["--data", cache, "--out", out, *ENDLESS, "--save-every", 20, "--workers", 2]
    process = start_process("train_repa.py", *options, stderr=subprocess.PIPE, text=True)
    wait_for(out / "last.pt", process)
    for child in children(process.pid):
        os.kill(child, signal.SIGTERM)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert f"interrupted at step {saved_step(out)}" in errors and "Traceback" not in errors


def children(pid):
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert len(listed) >= 2
    return [int(child) for child in listed]


def test_a_loader_process_that_is_killed(cache, tmp_path):
    """By the kernel, say, when memory is short: the run saves its whole state and ends in one line."""
    out = tmp_path / "run"
    options = ["--data", cache, "--out", out, *ENDLESS, "--save-every", 10**6, "--log-every", 20]
    process = start_process("train_repa.py", *options, "--workers", 2, stderr=subprocess.PIPE, text=True)
    wait_for(out / "log.jsonl", process)
    while len(rows(out)) < 2:
        time.sleep(0.05)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0 and "Traceback" not in errors
    assert "--workers" in errors.splitlines()[-1] and saved_step(out) >= 40


class Tens:
    def __len__(self):
        return 1000

    def __getitem__(self, i):
        return torch.tensor(10 * i)


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), EOFError("end"), RuntimeError("worker")])
def test_an_error_while_a_loader_process_is_dead_is_its_death(error):
    """It may leave a tensor half sent. With all processes alive, the same error is a bug."""
    before = multiprocessing.active_children()
    for is_dead in (True, False):
        loader = files.read_ahead(Tens(), 1, batch_size=None)
        assert next(loader).item() == 0
        (child,) = [child for child in multiprocessing.active_children() if child not in before]
        if is_dead:
            os.kill(child.pid, signal.SIGKILL)
        expected = (files.UserError, "--workers") if is_dead else (type(error), str(error))
        with pytest.raises(expected[0], match=expected[1]):
            loader.throw(error)


def test_the_first_command_after_kill_9_goes_on(cache, tmp_path):
    """The lock ends with its owner: orphaned loader processes do not hold it."""
    out = tmp_path / "run"
    options = ["--data", cache, "--out", out, *ENDLESS, "--save-every", 20, "--workers", 2]
    process = start_process("train_repa.py", *options, stderr=subprocess.DEVNULL)
    wait_for(out / "last.pt", process)
    orphans = children(process.pid)
    process.kill()
    process.wait()
    assert any(Path(f"/proc/{orphan}").exists() for orphan in orphans), "some are still there"
    step = saved_step(out)
    again = ["--steps", step + 1, "--workers", 0]
    done = run("train_repa.py", *options, *again, first=WITH_TINY_NANO, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert saved_step(out) == step + 1


SLOW = """
import time, train_repa
forward = train_repa.Objective.forward
def slow(self, **inputs): time.sleep(0.7); return forward(self, **inputs)
train_repa.Objective.forward = slow
train_repa.files.catch_signals(); train_repa.main()
"""


def test_two_ranks_notice_a_signal_at_the_next_step(cache, tmp_path):
    """torchrun kills after 30 s, so that slow steps must not be counted."""
    out = tmp_path / "run"
    program = tmp_path / "slow.py"
    program.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r}); {WITH_TINY_NANO}\n{SLOW}")
    options = ["--data", cache, "--out", out, *ENDLESS, "--save-every", 1]
    process = start_process(program, *options, processes=2, first=None, stderr=subprocess.PIPE, text=True)
    wait_for(out / "last.pt", process)
    before = saved_step(out)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert saved_step(out) <= before + 3, "the two agree on it every step, not every ten"
    assert f"interrupted at step {saved_step(out)}" in errors


def test_a_full_log_disk_loses_nothing(cache, tmp_path, tiny_nano, monkeypatch):
    """The row cannot be written: the state of that step is saved, and the line names the file."""
    written, write = [], files.TrainingLog.write

    def full(self, row):
        if row["step"] == 5:
            self.path = Path("/dev/full")
        write(self, row)
        written.append(row["step"])

    monkeypatch.setattr(files.TrainingLog, "write", full)
    with pytest.raises(SystemExit, match="/dev/full.*No space left"):
        train(cache, tmp_path / "run", "--steps", 50, "--save-every", 40)
    assert written == [1, 2, 3, 4, 5] and saved_step(tmp_path / "run") == 5


# --- checkpoints


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_of_another_precision_is_converted(cache, tmp_path, tiny_nano, dtype):
    checkpoint = train(cache, tmp_path / "run")
    for part in ("model", "ema", "heads"):
        for name, value in checkpoint[part].items():
            checkpoint[part][name] = value.to(dtype)
    torch.save(checkpoint, tmp_path / "run" / "last.pt")
    model, _ = files.load_model(tmp_path / "run")
    assert all(value.dtype == torch.float32 for value in model.state_dict().values())
    resumed = train(cache, tmp_path / "run", "--steps", 8)
    assert resumed["step"] == 8 and resumed["ema"]["pos_embed"].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:for .* copying from a non-meta parameter")
def test_a_restored_run_shares_nothing_with_its_file(cache, tmp_path, tiny_nano, monkeypatch):
    """Neither memory nor, on another device, the device of the file."""
    train(cache, tmp_path / "run")
    seen, restore = {}, files.restore

    def spy(checkpoint, objective, ema, optimizer):
        mapped = {value.untyped_storage().data_ptr() for value in tensors(checkpoint)}
        before = {name: value.data_ptr() for name, value in ema.state_dict().items()}
        restore(checkpoint, objective, ema, optimizer)
        ours = [*objective.state_dict().values(), *ema.state_dict().values()]
        ours += tensors(optimizer.state_dict())
        seen["shared"] = [x for x in ours if x.untyped_storage().data_ptr() in mapped]
        seen["moved"] = before != {name: x.data_ptr() for name, x in ema.state_dict().items()}
        on_meta = dit.build(checkpoint["config"]).to("meta")
        on_meta.load_state_dict(checkpoint["ema"])
        seen["device"] = on_meta.pos_embed.device.type

    monkeypatch.setattr(files, "restore", spy)
    train(cache, tmp_path / "run", "--steps", 8)
    assert seen == {"shared": [], "moved": False, "device": "meta"}


def tensors(value):
    """All tensors in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [x for each in value for x in tensors(each)] if isinstance(value, list) else []


@pytest.mark.parametrize("use", ["resume", "init"])
def test_a_flipped_bit_is_found(cache, tmp_path, tiny_nano, use):
    """In the middle of the weights, where torch.load looks at no checksum."""
    train(cache, tmp_path / "run")
    path = tmp_path / "run" / "last.pt"
    damage(path)
    torch.load(path, weights_only=True)
    options = ["--init", path] if use == "init" else []
    out = tmp_path / ("other" if use == "init" else "run")
    message = refusal(cache, out, *options)
    assert str(path) in message and "checksum" in message


def damage(path):
    """Flip one bit in the largest record of a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        with archive.open(largest) as record:
            start = record._orig_compress_start
    content = bytearray(path.read_bytes())
    content[start + largest.file_size // 2] ^= 1
    path.write_bytes(content)


def test_an_edited_script_is_named(cache, tmp_path, tiny_nano, capsys, monkeypatch):
    """An edited loss would otherwise continue the old weights in silence."""
    train(cache, tmp_path / "run")
    edited = tmp_path / "train_repa.py"
    edited.write_text((ROOT / "train_repa.py").read_text() + "# edited\n")
    monkeypatch.setattr(train_repa, "__file__", str(edited))
    capsys.readouterr()
    train(cache, tmp_path / "run", "--steps", 7)
    assert "the code of train_repa.py changed since step 6" in capsys.readouterr().out
    train(cache, tmp_path / "run", "--steps", 8)
    assert "changed" not in capsys.readouterr().out


def test_pictures_of_averages_that_hold_their_start(cache, tmp_path, tiny_nano, capsys):
    """0.9 ** 6 = 53 %: the last line says so, and what to do."""
    train(cache, tmp_path / "run", "--sample-every", 100)
    said = capsys.readouterr().out.splitlines()[-1]
    assert "samples-" in said and "53%" in said and "--weights model" in said
    train(cache, tmp_path / "long", "--sample-every", 100, "--ema", 0.5)
    assert "--weights" not in capsys.readouterr().out.splitlines()[-1]


# --- processes


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "", "WORLD_SIZE": "2"},
        {"RANK": "one", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "x"},
    ],
    ids=str,
)
def test_variables_of_torchrun_that_make_no_sense(cache, tmp_path, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        if name not in variables:
            monkeypatch.delenv(name, raising=False)
    message = refusal(cache, tmp_path / "run")
    assert "torchrun" in message and not (tmp_path / "run").exists()
    assert all(f"{name}={value}" in message for name, value in variables.items())


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_process_prints(rank, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # to be restored
    monkeypatch.setattr(dist, "rendezvous", lambda *_, **__: iter([(None, rank, 2)]))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: None)
    for name, value in {"RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert files.launch()[:2] == (rank, 2)
    print("said")
    assert capsys.readouterr().out == ("said\n" if rank == 0 else "")


def test_no_partner_is_one_line(monkeypatch):
    """The wait for the others is bounded; here they never come."""
    variables = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29871}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(files, "RENDEZVOUS", files.timedelta(seconds=1))
    with pytest.raises(UserError, match="WORLD_SIZE=2.*MASTER_ADDR"):
        files.launch()
    assert not dist.is_initialized()


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 3}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="LOCAL_RANK=3.* 2 GPUs.*--nproc_per_node"):
        files.launch()


def start_counting(folder, cache_is_there):
    """A run of --digits in a process; the group must be made once, by the program."""
    os.chdir(folder)
    made, make = [], dist.init_process_group
    dist.init_process_group = lambda *a, **k: made.append(1) or make(*a, **k)
    train_repa.main("--digits --steps 2 --batch-size 16 --sample-every 0".split())
    assert made == [1] and not dist.is_initialized()


def test_two_processes_start_on_the_digits_in_a_fresh_folder(tmp_path, processes):
    """Extraction and training share one process group."""
    run_ranks(processes, start_counting, tmp_path, False)
    assert saved_step(tmp_path / "runs" / "repa-digits") == 2


def different_steps(out):
    rank = int(os.environ["RANK"])
    start("train_repa", out / "cache", out / f"disk{rank}", "--steps", 20)


def test_nodes_without_a_common_disk_are_noticed(cache, tmp_path, processes, tiny_nano):
    """Rank 0 finds a checkpoint of step 6 and rank 1 none: both end with a line."""
    (tmp_path / "cache").symlink_to(cache)
    train(cache, tmp_path / "disk0")
    with pytest.raises(AssertionError, match=r"\[1, 1\]"):
        run_ranks(processes, different_steps, tmp_path)
    assert saved_step(tmp_path / "disk0") == 6


def test_memory_is_checked_before_anything_is_built(monkeypatch):
    """One image of XL/2 in fp32 needs 13.5 GB of parameters alone, as 20 bytes each."""
    args = argparse.Namespace(precision="fp32", compile=False, batch_size=1)
    config = dict(arch="DiT", input_size=32, in_channels=4, num_classes=1000, **dit.parse_model("XL/2"))
    monkeypatch.setattr(os, "sysconf", lambda name: 2**30 // 4096 if name == "SC_PHYS_PAGES" else 4096)
    with pytest.raises(UserError, match="1 images.* 14 GB.* 1 GB.*--micro-batch.*--model"):
        files.check_memory(config, 1, args)
    monkeypatch.setattr(os, "sysconf", lambda name: 2**40 // 4096 if name == "SC_PHYS_PAGES" else 4096)
    files.check_memory(config, 1, args)


def test_json_of_a_run_is_plain(cache, tmp_path, tiny_nano):
    train(cache, tmp_path / "run", "--steps", 1)
    (first,) = json.loads((tmp_path / "run" / "run.json").read_text())
    assert first["step"] == 0 and first["processes"] == 1 and first["args"]["batch_size"] == 16
