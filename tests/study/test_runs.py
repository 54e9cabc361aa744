"""The processes of a study, with short stand-ins for the trainings."""

import dataclasses
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from miti_detr.study import runs as runs_module
from miti_detr.study.plan import Arm, StudyRun
from miti_detr.study.runs import iterations_done, run_study, study_lock
from tests.study.made_runs import write_lines

Popen = subprocess.Popen[bytes]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[StudyRun]:
    monkeypatch.setattr(runs_module, "_POLL", 0.02)
    arm = Arm("a", "a.yaml")
    return [StudyRun(arm, seed, tmp_path / f"seed_{seed}", (), 100) for seed in range(4)]


def stand_in(code: str, started: list[Popen]) -> object:
    """Return a replacement of ``_start``; the code gets the folder of the run as argument."""

    def start(run: StudyRun, threads: int) -> Popen:
        run.path.mkdir(exist_ok=True)
        with (run.path / "console.txt").open("wb") as console:
            command = [sys.executable, "-S", "-c", code, str(run.path)]
            started.append(subprocess.Popen(command, stdout=console, stderr=console))
        return started[-1]

    return start


FINISH = "import sys, time; time.sleep(.2); open(sys.argv[1] + '/finished.json', 'w').write('{}')"


def test_all_are_done_and_no_more_than_asked_for_at_a_time(
    runs: list[StudyRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Popen] = []
    monkeypatch.setattr(runs_module, "_start", stand_in(FINISH, started))
    runs[2].path.mkdir()
    (runs[2].path / "finished.json").write_text("{}")
    seen: list[list[str]] = []
    assert run_study(runs, jobs=2, watch=lambda done, running: seen.append(running)) == []
    assert len(started) == 3  # one had finished before
    assert max(map(len, seen)) == 2
    assert {iterations_done(run) for run in runs} == {100}


def test_a_failed_run_is_named_and_the_others_go_on(
    runs: list[StudyRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"import sys\nif 'seed_1' in sys.argv[1]: sys.exit('error: no room')\n{FINISH}"
    monkeypatch.setattr(runs_module, "_start", stand_in(code, []))
    (failure,) = run_study(runs, jobs=4, watch=lambda done, running: None)
    assert failure.startswith("a/seed_1 ended with status 1: error: no room (see ")


def test_a_run_starts_after_the_one_whose_weights_it_takes(
    runs: list[StudyRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seed 0 waits for seed 3 and leaves nothing; seed 1, which waits for it, is not trained."""
    weights = [run.path / "model_final.pth" for run in runs]
    runs[0] = dataclasses.replace(runs[0], starts=(weights[3],))
    runs[1] = dataclasses.replace(runs[1], starts=(weights[0],))
    leave = f"if 'seed_0' not in sys.argv[1]: open(sys.argv[1] + '/model_final.pth', 'w')\n{FINISH}"
    started: list[Popen] = []
    monkeypatch.setattr(runs_module, "_start", stand_in(f"import sys\n{leave}", started))
    (failure,) = run_study(runs, jobs=1, watch=lambda done, running: None)
    assert [str(process.args[-1])[-1] for process in started] == ["2", "3", "0"]
    assert failure == f"a/seed_1 has nothing to start from: there is no {weights[0]}"


def test_ctrl_c_ends_the_processes(runs: list[StudyRun], monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Popen] = []
    monkeypatch.setattr(runs_module, "_start", stand_in("import time; time.sleep(60)", started))

    def interrupt(done: object, running: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_study(runs, jobs=2, watch=interrupt)
    assert [process.returncode for process in started] == [-15, -15]


def test_progress_is_read_from_the_metrics(runs: list[StudyRun]) -> None:
    assert iterations_done(runs[0]) == 0
    path = runs[0].path / "metrics.json"
    write_lines(path, [{"iteration": 19}, {"iteration": 39, "long": "x" * 10}])
    assert iterations_done(runs[0]) == 40
    with path.open("a") as file:
        file.write('{"iteration": 5')  # an incomplete line
    assert iterations_done(runs[0]) == 0
    write_lines(path, [{"iteration": 100}])  # from the evaluation after the last step
    assert iterations_done(runs[0]) == 100


def test_one_study_at_a_time(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with study_lock(tmp_path):
                found.append("in")
        except ValueError as error:
            found.append(str(error))

    with study_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    (message,) = found
    assert message.startswith(f"another comparison is running in {tmp_path}. Wait")
    second()
    assert found[1] == "in"
