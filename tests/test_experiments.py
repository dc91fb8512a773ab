"What a notebook can't hold about experiments: killed kernels and runners, other kernels installed, changed bytes"
import json
import os
import signal
import subprocess
import sys
import time

import nbformat
import pytest

from phoenix.experiments import ExperimentError, find_notebook, parse_assignments, read_parameters, run_experiment
from phoenix.records import read_json, verify_run

PARAMETERS = "n:int = 3 # how many\nlr:float = 0.1 # step\npair:tuple[int,int] = (1, 2) # two numbers"


def notebook(folder, *cells, parameters="", name="demo", **metadata):
    "An experiment of a few cells"
    cell = nbformat.v4.new_code_cell
    cells = ([cell(parameters, metadata={"tags": ["parameters"]})] if parameters else []) + [cell(c) for c in cells]
    path = folder/f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), path)
    return path


def only_run(folder): return next((folder/"runs").iterdir())


def execute(folder, nb, parameters=None, **kw):
    return run_experiment(nb, parameters, folder/"runs", show="nothing", **kw)


RECORD = "from phoenix.experiments import current_run\ncurrent_run().record(n=n, lr=lr, pair=list(pair), kind=type(pair).__name__)"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "One sealed run, with its source"
    folder = tmp_path_factory.mktemp("done")
    (folder/"real.yaml").write_text("n: 7\nlr: 1e-2\n")
    nb = notebook(folder, RECORD, "import sys; print(sys.executable)", parameters=PARAMETERS)
    before = (nb.read_bytes(), nb.stat().st_mtime_ns)
    path = execute(folder, nb, read_parameters(["lr=0.5", "pair=[3, 4]"], folder/"real.yaml"))
    assert (nb.read_bytes(), nb.stat().st_mtime_ns) == before, "the source is never written"
    return path


def test_parameters_reach_the_notebook_with_their_types(done):
    "The file beats the defaults, the command line beats the file"
    assert read_json(done/"metrics.json") == {"n": 7, "lr": .5, "pair": [3, 4], "kind": "tuple"}
    assert read_json(done/"parameters.json") == {"n": 7, "lr": .5, "pair": [3, 4]}


def test_the_run_folder_is_complete_and_sealed(done):
    verdict = verify_run(done)
    assert verdict.ok and verdict.evidence
    assert {p.name for p in done.iterdir()} == {"notebook.ipynb", "seal.json"} | {
        f"{n}.json" for n in ("run", "metrics", "parameters", "provenance", "stamps", "inputs")}
    assert set(read_json(done/"inputs.json")) == {"notebook"}
    executed = nbformat.read(done/"notebook.ipynb", as_version=4)
    assert executed.cells[1].metadata.tags == ["injected-parameters"]
    assert sys.executable in executed.cells[-1].outputs[0].text
    assert executed.metadata.papermill.input_path == "demo.ipynb", "no path of this machine"
    assert read_json(done/"run.json")["cell"] == read_json(done/"run.json")["cells"] == 4


def test_one_changed_byte_breaks_the_seal(done, tmp_path):
    import shutil
    copy = shutil.copytree(done, tmp_path/"copy")
    data = bytearray((copy/"notebook.ipynb").read_bytes())
    data[len(data)//2] ^= 1
    (copy/"notebook.ipynb").write_bytes(data)
    assert verify_run(copy).reasons == ["notebook.ipynb was changed after the seal"]
    assert verify_run(done).ok


@pytest.mark.parametrize("given, why", [
    ({"m": 1}, "did you mean 'n'|must be one of"), ({"lrr": 1}, "did you mean 'lr'"), ({"n": "3"}, "'n' must be int"),
    ({"n": 3.5}, "'n' must be int"), ({"n": True}, "'n' must be int"), ({"lr": None}, "'lr' must be float"),
    ({"pair": [1, 2, 3]}, "'pair' must be tuple"), (parse_assignments(["n=three"]), "'n' must be int")])
def test_wrong_parameters_start_nothing(tmp_path, given, why):
    nb = notebook(tmp_path, RECORD, parameters=PARAMETERS)
    with pytest.raises(ExperimentError, match=why):
        execute(tmp_path, nb, given)
    assert not (tmp_path/"runs").exists()


def test_an_experiment_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path/"nbs/experiments").mkdir(parents=True)
    (tmp_path/"deep/er").mkdir(parents=True)
    nb = notebook(tmp_path/"nbs/experiments", "1", name="07_latency_of_all")
    monkeypatch.chdir(tmp_path/"deep/er")
    for name in ("07_latency_of_all", "latency_of_all", "07"):
        assert find_notebook(name).resolve() == nb
    with pytest.raises(ExperimentError, match="did you mean '07_latency_of_all'"):
        find_notebook("07_latency_of_al")


def test_killed_kernel(tmp_path):
    "Papermill marks the cell completed; the run folder knows better"
    nb = notebook(tmp_path, "1 + 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "2 + 2")
    with pytest.raises(ExperimentError, match="killed in cell 2 of 3") as e:
        execute(tmp_path, nb)
    assert e.value.run == only_run(tmp_path)
    verdict = verify_run(e.value.run)
    assert (verdict.ok, verdict.state, verdict.reasons) == (False, "killed", ["killed in cell 2 of 3"])
    assert not (e.value.run/"seal.json").exists()


RUNNER = "import sys; from phoenix.experiments import run_experiment; run_experiment(sys.argv[1], None, sys.argv[2], show='nothing')"
SLEEP = "import os, pathlib, time\npathlib.Path(os.environ['MARK']).write_text(str(os.getpid()))\ntime.sleep(120)"


def gone(pid, seconds):
    "Whether a process ends within some seconds"
    import psutil
    try: psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess: return True
    except psutil.TimeoutExpired: return False
    return True


def start_sleeper(folder):
    "A runner in a fresh process whose notebook sleeps in cell 2, and the process of its kernel"
    nb, mark = notebook(folder, "1", SLEEP, "2"), folder/"mark"
    runner = subprocess.Popen(  # a suite started in the background of a shell passes an ignored SIGINT on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), args=[sys.executable, "-c", RUNNER, nb, folder/"runs"], env={**os.environ, "MARK": str(mark)},
                              stderr=subprocess.PIPE, text=True, start_new_session=True)
    for _ in range(600):
        if mark.exists() and mark.read_text(): return runner, int(mark.read_text())
        assert runner.poll() is None, runner.stderr.read()
        time.sleep(.1)
    runner.kill()
    raise AssertionError("the notebook never reached its second cell")


def test_killed_runner(tmp_path):
    runner, kernel = start_sleeper(tmp_path)
    run = only_run(tmp_path)
    assert verify_run(run).reasons == ["not sealed: running in cell 2 of 3"]
    runner.kill()
    runner.communicate()
    assert verify_run(run).reasons == ["killed in cell 2 of 3"]
    assert gone(kernel, 15), "the kernel outlives its runner"


def test_interrupted_runner(tmp_path):
    runner, kernel = start_sleeper(tmp_path)
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=60)
    verdict = verify_run(only_run(tmp_path))
    assert verdict.state == "failed" and "in cell 2 of 3: KeyboardInterrupt" in verdict.reasons[0]
    assert runner.returncode != 0 and gone(kernel, 15)


def test_failing_cell(tmp_path):
    nb = notebook(tmp_path, "n = 1", "raise ValueError('no \\x1b[1mimages')", "2 + 2")
    with pytest.raises(ExperimentError, match="failed in cell 2 of 3: ValueError: no .*images"):
        execute(tmp_path, nb)
    state = read_json(only_run(tmp_path)/"run.json")
    assert state["state"] == "failed" and state["reason"].startswith("ValueError")


def test_a_seal_from_inside_the_notebook_is_refused(tmp_path):
    nb = notebook(tmp_path, "from phoenix.experiments import current_run\ncurrent_run().seal()", "1")
    with pytest.raises(ExperimentError, match="process that started it"):
        execute(tmp_path, nb)
    assert not (only_run(tmp_path)/"seal.json").exists()


def test_same_interpreter_whatever_kernels_are_installed(tmp_path, monkeypatch):
    "A broken kernel of the usual name, a notebook that asks for an unknown one"
    spec = tmp_path/"jupyter/kernels/python3"
    spec.mkdir(parents=True)
    (spec/"kernel.json").write_text(json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    nb = notebook(tmp_path, "import sys\nfrom phoenix.experiments import current_run\ncurrent_run().record(exe=sys.executable)",
                  kernelspec={"name": "nobody", "display_name": "x", "language": "python"})
    assert read_json(execute(tmp_path, nb)/"metrics.json") == {"exe": sys.executable}


@pytest.mark.parametrize("given, heard", [({}, {"GOMP_SPINCOUNT": "1000"}), ({"OMP_WAIT_POLICY": "active"},)*2])
def test_waiting_threads_spin_briefly_unless_told(tmp_path, monkeypatch, given, heard):
    "Set before the kernel starts, for OpenMP reads it once"
    names = "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"
    for n in names: monkeypatch.delenv(n, raising=False)
    for n, v in given.items(): monkeypatch.setenv(n, v)
    nb = notebook(tmp_path, "import os\nfrom phoenix.experiments import current_run\n"
                            f"current_run().record(rule={{n: os.environ[n] for n in {names} if n in os.environ}})")
    assert read_json(execute(tmp_path, nb)/"metrics.json") == {"rule": heard}


def test_the_bar_is_on_stderr(tmp_path, capfd):
    run_experiment(notebook(tmp_path, "print('hello')"), None, tmp_path/"runs", show="output")
    out, err = capfd.readouterr()
    assert "1/1" in err and "hello" in err and not out


def test_by_hand_the_notebook_has_a_run_of_its_own(tmp_path):
    code = ("from phoenix.experiments import current_run\na = current_run(); assert a == current_run(); a.record(x=1)\n"
            "space = {}; exec('from phoenix.experiments import current_run; b = current_run()', space); assert space['b'] != a")
    env = {k: v for k, v in os.environ.items() if k != "PHOENIX_RUN"} | {"PHOENIX_RUNS_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path/"temp").iterdir())) == 2
