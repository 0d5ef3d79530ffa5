"""What machines do to the scripts: streams that are gone, signals, odd environments."""

import errno
import fcntl
import getpass
import os
import pwd
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

import train
from utils import errors
from utils.files import locked
from utils.training import ranks

# a script in small: it imports no torch, and starts in a moment
SCRIPT = """
import sys, time
from utils.errors import run

def main():
    print("ready", flush=True)
    print("bar", file=sys.stderr, flush=True)
    if "wait" in sys.argv:
        time.sleep(60)
    open(sys.argv[1], "w").write("done")

run(main, needs_stdout=False)
"""

INTERRUPTED_IMPORT = """
import runpy, sys
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "numpy":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupt())
sys.path.insert(0, ".")
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

LEFT_BEHIND = {"RANK": "1", "WORLD_SIZE": "4"}
NONSENSE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize(
    "streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "| true"]
)
def test_a_training_goes_on_where_nobody_can_read_what_it_prints(tmp_path, streams):
    command = f"'{sys.executable}' -c '{SCRIPT}' {tmp_path}/out {streams}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (tmp_path / "out").read_text() == "done"
    assert "Traceback" not in done.stderr


def test_a_cluster_ends_a_job_as_ctrl_c_does(tmp_path):
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "out"), "wait"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted; files already written are complete"
    assert "Traceback" not in stderr


@pytest.mark.parametrize("script", ["train.py", "infer.py"])
def test_ctrl_c_during_imports_is_one_line(script):
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.strip() == "interrupted"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, number):
    def no_lock(*_):
        raise OSError(number, "no lock")

    monkeypatch.setattr(fcntl, "flock", no_lock)
    with locked(tmp_path):
        (tmp_path / "file").touch()
    assert "cannot be locked" in capsys.readouterr().err
    assert (tmp_path / "file").exists()


@pytest.mark.parametrize("names", [LEFT_BEHIND, {"RANK": "0"}, {"LOCAL_RANK": "x"}])
def test_what_another_program_left_in_the_environment_starts_no_ranks(monkeypatch, names):
    for name in ranks.TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with ranks.started() as here:
        assert (here.rank, here.world_size) == (0, 1)


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("MASTER_PORT", "port")])
def test_nonsense_in_torchruns_variables_is_one_line(monkeypatch, error_line, name, value):
    for key, there in {**NONSENSE, "MASTER_PORT": "29501", name: value}.items():
        monkeypatch.setenv(key, there)
    line = error_line(train.main, ["--m", "vanilla_cnn", "--dataset", "digits"])
    assert "the ranks did not meet" in line
    assert "unset RANK" in line
    assert not ranks.active()


def test_a_user_without_a_name_gets_one(monkeypatch):
    """torch's compiler asks for it when the first optimizer is made."""

    def nobody(*_):
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        # set first, so that what is set below is undone
        monkeypatch.setenv(name, "x")
        monkeypatch.delenv(name)
    errors.run(lambda: None)
    assert getpass.getuser() == str(os.getuid())


PLOT_OF_A_RECORD = """
from pathlib import Path
import sys
from utils.plot import plot
from utils.records import Record, Row
row = Row("pytorch", "FP32", accuracy_pct=90.0).timed(1, 1.0, 2.0)
machine = {"gpu": None, "cpu": "x"}
plot(Path(sys.argv[1]), Record("m", "cifar", "digits", 0, {}, None, machine, [row]))
"""

PLOT_OF_A_STUDY = """
from pathlib import Path
import sys
from benchmarks import tables
rows = []
for backend, precision in (
    ("pytorch", "FP32"),
    ("pytorch", "FAKE-QUANT-QAT"),
    ("pytorch", "FAKE-QUANT-PTC"),
    ("tensorrt", "FP16"),
    ("tensorrt", "INT8-QAT"),
):
    row = {"backend": backend, "precision": precision, "batch_size": 1, "latency_ms": {"p50": 1}}
    rows.append({**row, "delta_pct": 0})
tables.load = lambda _: {"resnet18, cifar stem": [{"rows": rows}]}
path = Path(sys.argv[1])
tables.PLOT = path.name
tables.plot(path.parent)
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [PLOT_OF_A_RECORD, PLOT_OF_A_STUDY], ids=["record", "study"])
def test_a_notebooks_plotting_back_end_is_not_used(tmp_path, code):
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    path = tmp_path / "plot.png"
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, env=environment, check=True)
    assert path.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENOSPC])
def test_what_the_system_refuses_is_one_line_with_the_file(code, error_line):
    def main(_):
        raise OSError(code, os.strerror(code), "/some/file")

    line = error_line(main, [])
    assert "/some/file" in line
    assert os.strerror(code) in line
    assert "damaged" not in line


def test_an_error_of_the_program_itself_keeps_its_traceback():
    assert errors.mendable(ValueError("a bug")) is None
    assert errors.mendable(OSError(errno.EBADF, "a bug")) is None


@pytest.mark.parametrize("name", ["my_layers", "tests", "torch.none", None])
def test_only_what_the_requirements_list_is_a_package_to_install(name):
    assert "pip install pillow" in errors.mendable(ModuleNotFoundError(name="PIL"))
    # another project's own module, whose name is anybody's on PyPI
    own = errors.mendable(ModuleNotFoundError(name=name))
    assert f"there is no Python module {name}" in own
    assert "pip" not in own
