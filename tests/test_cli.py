"""The command line, mostly as a user meets it: in a process of its own."""

import json
import os
import pathlib
import subprocess
import sys
import types

import pytest
import torch

import tandem_attn
from tandem_attn import cli
from tandem_attn.bench import UserError


def command(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """`python -m tandem_attn` with these arguments."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        [sys.executable, "-m", "tandem_attn", *arguments], capture_output=True, text=True, env=environment
    )


def test_bench_forward_end_to_end(tmp_path):
    path = tmp_path / "out.json"
    options = ("--group", "smoke", "--repeats", "2", "--idle-ms", "0", "--json", str(path))
    done = command("bench", "forward", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    document = json.loads(path.read_text())
    assert len(document["cases"]) == 6
    assert document["environment"]["command"] == "tandem-attn bench forward " + " ".join(options)
    for record in document["cases"]:
        assert record["results"]["tandem"]["tflops"] > 0
        assert record["id"] in done.stdout
    assert "geometric mean" in done.stdout


@pytest.fixture
def no_torch(tmp_path):
    """A folder for PYTHONPATH in which torch is broken: commands that need none are quick, too."""
    broken = tmp_path / "torch"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object')\n")
    return {"PYTHONPATH": str(tmp_path)}


def test_version_and_help_need_no_torch(no_torch):
    done = command("--version", **no_torch)
    assert (done.returncode, done.stdout) == (0, f"tandem-attn {tandem_attn.__version__}\n")
    done = command("--help", **no_torch)
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("demo", "bench", "doctor"))


def test_a_broken_torch_is_one_line_and_not_a_traceback(no_torch):
    done = command("bench", "forward", **no_torch)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "torch cannot be imported (ImportError: libcudart.so.13" in line
    assert "doctor" in line


MISTAKES = {
    "dance": "dance",
    "bench dance": "dance",
    "bench forward --group nope": "--group is 'nope'; supported: grid",
    "bench forward --case nope": "smoke-d64-full",
    "bench forward --providers tandem,nope": "'nope'; supported: tandem, sdpa-cudnn",
    "bench forward --providers fa3": "fa3: ",
    "bench forward --repeats 0": "at least 1",
    "bench forward --repeats many": "many",
    "bench forward --idle-ms -1": "at least 0",
    "bench forward --json /no/such/folder/x.json": "no folder /no/such/folder",
    "bench overhead --rounds 0": "--rounds",
    "doctor --yaml": "--yaml",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_one_line_and_exit_2(words, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    try:
        status = cli.main(words.split())
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("tandem-attn")
    assert MISTAKES[words] in line


@pytest.mark.parametrize("words", [[], ["bench"]])
def test_without_a_command_there_is_help(words, capsys):
    assert cli.main(words) == 2
    printed = capsys.readouterr().out
    assert printed.startswith("usage: tandem-attn")
    assert ("overhead" if words else "doctor") in printed


def test_the_demo_is_imported_when_asked_for(monkeypatch, capsys):
    """A stand-in: the real one has tests of its own."""
    demo = types.ModuleType("tandem_attn.demo")
    demo.add_arguments = lambda parser: parser.add_argument("--steps", type=int)
    demo.run = lambda args: args.steps
    monkeypatch.setitem(sys.modules, "tandem_attn.demo", demo)
    assert cli.main(["demo", "--steps", "7"]) == 7

    def complains(args):
        raise UserError("too many\nsteps")

    demo.run = complains
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "tandem-attn: too many steps\n"


def test_defects_are_not_dressed_up_as_mistakes(monkeypatch):
    from tandem_attn import doctor

    def broken(args):
        raise ValueError("a defect of ours")

    monkeypatch.setattr(doctor, "run", broken)
    with pytest.raises(ValueError, match="defect"):
        cli.main(["doctor"])


def test_interruption_and_closed_pipes_are_quiet(monkeypatch, capfd):
    from tandem_attn import doctor

    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "run", interrupted)
    assert cli.main(["doctor"]) == 130
    assert "Traceback" not in capfd.readouterr().err


def test_installed_command_is_this_one():
    project = pathlib.Path(__file__).parents[1] / "pyproject.toml"
    assert 'tandem-attn = "tandem_attn.cli:main"' in project.read_text()
