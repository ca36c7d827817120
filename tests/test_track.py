"""What a tracker is told: every metric, samples, results and the report; and the two programs that there are."""

import json
import sys
from types import SimpleNamespace

import pytest

from minirlhf.support import track

SMALL = ["--preset", "smoke", "--precision", "fp32"]


class Told:
    """A tracker that remembers."""

    made: list["Told"] = []

    def __init__(self, out, settings, goes_on):
        self.out, self.settings, self.goes_on = out, settings, goes_on
        self.steps, self.tables, self.results, self.reports = {}, {}, None, []
        Told.made.append(self)

    def scalars(self, step, values):
        self.steps[step] = values

    def table(self, step, name, rows):
        self.tables[step, name] = rows

    def report(self, html, png):
        self.reports.append((html, png))

    def finish(self, results):
        self.results = results


@pytest.fixture
def told(monkeypatch):
    Told.made = []
    monkeypatch.setitem(track.TRACKERS, "tensorboard", Told)
    return Told.made


def test_a_run_and_its_report_tell_everything(run, smoke, metrics, told, tmp_path):
    init = ["--init", smoke / "sft", "--reward-model", smoke / "rm", "--save-samples", 1, "--iterations", 2]
    options = [*SMALL, *init, "--track", "tensorboard", "--out", tmp_path / "run" / "ppo"]
    assert run("train_ppo", *options, stop_at=1) == 130
    assert run("train_ppo", *options, "--resume") == 0
    first, second = told
    assert not first.goes_on and second.goes_on
    config = json.loads((tmp_path / "run" / "ppo" / "config.json").read_text())
    assert first.settings["lr"] == config["training"]["lr"]
    lines = {line["step"]: line for line in metrics(tmp_path / "run" / "ppo")}
    for tracker, step in ((first, 1), (second, 2)):
        assert list(tracker.steps) == [step]
        assert {k: v for k, v in tracker.steps[step].items() if not k.startswith("time/")} | {
            "step": step
        } == lines[step]
        rows = tracker.tables[step, "samples"]
        assert {"prompt", "response", "score", "kl"} <= rows[0].keys() and len(rows) == 16
    assert first.results is None and "seconds" in second.results

    pytest.importorskip("matplotlib")
    (tmp_path / "run" / "sft").symlink_to(smoke / "sft")
    (tmp_path / "run" / "rm").symlink_to(smoke / "rm")
    (tmp_path / "run" / "results.json").write_text((smoke / "results.json").read_text())
    assert run("minirlhf.report", tmp_path / "run", "--track", "tensorboard") == 0
    html, png = told[-1].reports[0]
    assert html == (tmp_path / "run" / "report.html").read_text() and png[1:4] == b"PNG"


def test_a_run_tracks_nothing_by_default(run, smoke, told, tmp_path):
    options = [*SMALL, "--init", smoke / "sft", "--epochs", 1, "--samples", 0, "--out", tmp_path / "sft"]
    assert run("train_sft", *options) == 0 and not told


@pytest.mark.parametrize("name, package", [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line(run, smoke, capsys, monkeypatch, name, package, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    options = [*SMALL, "--init", smoke / "sft", "--samples", 0, "--out", tmp_path / "sft", "--track", name]
    assert run("train_sft", *options) == 2
    assert f"--track {name} needs a package: pip install" in capsys.readouterr().err


def test_wandb_goes_on_in_the_same_run(monkeypatch, tmp_path):
    """A stand-in for the package: what is asked of it."""
    begun, logged = [], []
    fake = SimpleNamespace(
        Error=type("Error", (Exception,), {}),
        Settings=lambda **options: options,
        Table=lambda columns, data: (columns, data),
        Html=lambda html, inject: html,
    )
    finished = SimpleNamespace(
        log=lambda values, step=None: logged.append((step, values)), finish=lambda: None, summary={}
    )
    fake.init = lambda **options: begun.append(options) or finished
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for goes_on in (False, True, False):
        tracker = track.start("wandb", tmp_path, {"lr": 1.0}, goes_on)
    ids = [options["id"] for options in begun]
    assert ids[0] == ids[1] != ids[2] and begun[0]["config"] == {"lr": 1.0}
    tracker.scalars(3, {"loss": 1.0})
    tracker.table(3, "samples", [{"prompt": "a", "score": 1.0}, {"prompt": "b", "score": 2.0}])
    tracker.finish({"seconds": 1.0})
    assert logged[0] == (3, {"loss": 1.0})
    assert logged[1] == (3, {"samples": (["prompt", "score"], [["a", 1.0], ["b", 2.0]])})
    assert finished.summary == {"seconds": 1.0}


def test_wandb_without_an_account_is_one_line(monkeypatch, tmp_path):
    error = type("Error", (Exception,), {})

    def init(**options):
        raise error("api_key not configured (no-tty)")

    fake = SimpleNamespace(Error=error, Settings=lambda **options: options, init=init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(track.UserError, match="not configured.*wandb login.*WANDB_MODE=offline"):
        track.start("wandb", tmp_path, {}, False)


def test_tensorboard_reads_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = track.start("tensorboard", tmp_path, {}, False)
    tracker.scalars(2, {"loss": 0.5})
    tracker.table(2, "samples", [{"prompt": "a|b\nc", "score": 1.0}])
    tracker.finish({"test": {"r": 0.5}})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 0.5)]
    text = events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "a\\|b" in text and text.count("\n") == 2
    assert json.dumps(events.Tags()["tensors"]).count("results")
