"""--compile: blocks alone are compiled, one graph for each kind of call, and nothing of a run changes."""

import functools
import shutil

import pytest
import torch
import torch._dynamo
from conftest import METHODS, SCRIPTS, difference, refusal, rows, run_ranks, start, train
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import dit
import train_sddit

# SD-DiT: student, teacher, decoder; MeanFlow: with and without a gradient
GRAPHS = {"sddit": 3, "meanflow": 2}
pytestmark = pytest.mark.usefixtures("tiny_nano")


@pytest.fixture
def graphs(monkeypatch):
    """Counts the graphs; aot_eager traces forward and backward as inductor does, without compiling C++."""
    return trace_only(monkeypatch)


def trace_only(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    backend = CompileCounterWithBackend("aot_eager")
    compile_module = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(dit.DiTBlock, "compile", compile_module)
    return backend


@pytest.mark.parametrize("name", METHODS)
def test_compiled_run_is_the_eager_run(cache, tmp_path, graphs, name):
    """One graph each and no break, over steps, micro-batches and pictures; losses and checkpoint are kept."""
    options, script = ["--steps", 3, "--sample-every", 6, "--micro-batch", 8], SCRIPTS[name]
    eager = train(cache, tmp_path / "eager", *options, "--no-compile", script=script)
    assert graphs.frame_count == 0
    compiled = train(cache, tmp_path / "compiled", *options, "--compile", script=script)
    assert graphs.frame_count == GRAPHS.get(name, 1) and not counters["graph_break"]
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
    assert difference(eager, compiled) < 1e-6  # the names too: none starts with _orig_mod


def start_compiled(name, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        graphs = trace_only(patch)
        start(f"train_{name}", *arguments)
    assert graphs.frame_count == GRAPHS[name] and not counters["graph_break"]


def test_two_ranks_compiled(cache, tmp_path, processes):
    """DistributedDataParallel neither cuts the blocks of SD-DiT into more graphs nor changes a loss."""
    eager = train(cache, tmp_path / "eager", "--steps", 3, "--seed", 1, script=train_sddit)
    arguments = ["sddit", cache, tmp_path / "ranks", "--steps", 3, "--seed", 1, "--compile"]
    run_ranks(processes, start_compiled, *arguments)
    compiled = torch.load(tmp_path / "ranks" / "last.pt", weights_only=True)
    assert difference(eager, compiled) < 1e-5
    for a, b in zip(rows(tmp_path / "eager"), rows(tmp_path / "ranks"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)


def test_no_compiler_on_the_machine(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not shutil.which("c++")
    assert "--no-compile" in refusal(cache, tmp_path / "run", "--compile")
    assert not (tmp_path / "run").exists()
