"""Files that grow (report/follow.py) and the page that follows them (report/watch.py), without a browser."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf import UserError
from minirlhf.tools.report import follow, watch

ROOT = Path(__file__).resolve().parents[1]


def metric(step: int, **more) -> str:
    row = {
        "step": step,
        "objective/kl": step / 10,
        "objective/scores": step / 20,
        "val/response_length": 12.0,
    }
    return json.dumps(row | more) + "\n"


def sample(step: int, response: str = "fine", **more) -> str:
    return json.dumps({"step": step, "prompt": "It is", "response": response, "score": 0.5} | more) + "\n"


def add(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "a", encoding="utf-8") as stream:
        stream.write(text)


def test_half_a_line_is_waited_for_and_nothing_is_read_twice(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rows = follow.metrics_of(file)
    assert rows.update().rows == []
    add(file, metric(1) + metric(2)[:20])
    assert [row["step"] for row in rows.update().rows] == [1]
    offset = rows.lines.offset
    add(file, metric(2)[20:-1])
    assert [row["step"] for row in rows.update().rows] == [1] and rows.lines.offset == offset
    add(file, "\n" + metric(3))
    assert [row["step"] for row in rows.update().rows] == [1, 2, 3] and rows.generation == 0
    assert rows.lines.new() == (False, [])


def test_a_file_that_was_replaced_is_read_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    add(file, metric(1) + metric(2))
    rows = follow.metrics_of(file).update()
    (tmp_path / "new").write_text(metric(1))  # a resumed run drops the lines behind its checkpoint
    os.replace(tmp_path / "new", file)
    assert [row["step"] for row in rows.update().rows] == [1] and rows.generation == 1
    longer = metric(5) + metric(6) + metric(7) + metric(8)  # another run, longer than what was read
    file.write_text(longer)
    assert [row["step"] for row in rows.update().rows] == [5, 6, 7, 8] and rows.generation == 2
    file.unlink()
    assert rows.update().rows == [] and rows.generation == 3


@given(st.lists(st.integers(1, 300), max_size=12), st.integers(1, 40))
@settings(deadline=None, max_examples=60)
def test_however_it_is_cut_what_is_kept_is_the_same(tmp_path_factory, cuts, rows):
    file = tmp_path_factory.mktemp("rows") / "samples.jsonl"
    text = "".join(sample(1 + i // 4, f"é€{i}") for i in range(rows)).encode()
    followed = follow.samples_of(file)
    for start, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(text)], strict=True):
        with open(file, "ab") as stream:
            stream.write(text[start : max(start, end)])
        followed.update()
    assert [row["response"] for row in followed.rows] == [f"é€{i}" for i in range(rows)]


def test_many_rows_are_thinned_evenly_and_counted(tmp_path):
    file = tmp_path / "samples.jsonl"
    add(file, "".join(sample(step, f"text {i} " + "x" * 150) for step in range(1, 201) for i in range(64)))
    rows = follow.samples_of(file).update()
    kept = len(rows.rows)
    assert rows.size <= follow.MAX_SAMPLES and rows.left == 200 * 64 - kept and kept > 4000
    by_step = {step: sum(row["step"] == step for row in rows.rows) for step in range(1, 201)}
    assert len({*by_step.values()}) == 1  # an equal share of each
    generation = rows.generation
    add(file, sample(201))
    assert rows.update().rows[-1]["step"] == 201 and rows.generation == generation


def test_validations_outlast_the_steps_between(tmp_path):
    file = tmp_path / "metrics.jsonl"
    rare = {500: {"val/bits_per_byte": 2.5}, 3001: {"val/bits_per_byte": 1.5}}
    add(file, "".join(metric(step, **rare.get(step, {})) for step in range(1, 5001)))
    rows = follow.metrics_of(file).update().rows
    assert len(rows) <= follow.MAX_ROWS
    assert [row["step"] for row in rows if "val/bits_per_byte" in row] == [500, 3001]


@pytest.mark.parametrize("line, message", [
    ('{"step": 1, "prompt": "a", "response": 3}', "response: expected text, found 3"),
    ('{"step": 1, "prompt": "a", "response": "b", "score": "x"}', "score: expected a number, found 'x'"),
    ('{"prompt": "a", "response": "b"}', "step: expected a number, found None"), ("{", "not JSON"),
])  # fmt: skip
def test_a_damaged_line_of_samples_is_one_line_or_left_out_while_live(tmp_path, line, message):
    file = tmp_path / "samples.jsonl"
    add(file, sample(1) + line + "\n" + sample(2))
    with pytest.raises(UserError) as refused:
        follow.samples_of(file).update()
    assert str(refused.value).startswith(f"{file}:2: ") and message in str(refused.value)
    rows = follow.samples_of(file, strict=False).update()
    assert [row["step"] for row in rows.rows] == [1, 2] and rows.damages == 1 and message in rows.damaged


def test_a_page_is_sent_what_it_lacks(tmp_path):
    watched = watch.Watched(tmp_path)
    assert watched.data("")["said"].startswith(f"Waiting for {tmp_path} to begin")
    add(tmp_path / "ppo/metrics.jsonl", metric(1) + metric(2))
    first = watched.data("ppo=0.0&samples=0.0")
    assert first["said"] == "Live: PPO, iteration 2."
    part = first["parts"]["ppo"]
    assert not part["again"] and part["total"] == 2 and [row["step"] for row in part["rows"]] == [1, 2]
    assert part["rows"][0] == {"step": 1, "kl": 0.1, "score": 0.05, "mean_length": 12.0}
    add(tmp_path / "ppo/metrics.jsonl", metric(3))
    add(tmp_path / "ppo/samples.jsonl", sample(3))
    second = watched.data("ppo=0.2&samples=0.0")["parts"]
    assert [row["step"] for row in second["ppo"]["rows"]] == [3] and len(second["samples"]["rows"]) == 1
    assert watched.data("ppo=0.3")["parts"]["ppo"]["rows"] == []
    for odd in ("ppo=1.2", "ppo=0.99", "ppo=x", "ppo=0.-1", "ppo=0." + "9" * 5000, "ppo=0.²", ""):
        part = watched.data(odd)["parts"]["ppo"]
        assert part["again"] and len(part["rows"]) == 3, odd


@pytest.fixture
def served(tmp_path):
    """(watched, port) of a server in this process."""
    watched = watch.Watched(tmp_path / "demo")
    server = watch.Server((watch.HOST, 0), watch.handler_of(watched))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield watched, server.server_port
    server.shutdown()
    server.server_close()


def ask(port: int, path: str = "/", method: str = "GET", host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers={} if host is None else {"Host": host})
    response = connection.getresponse()
    response.text = response.read().decode()
    return response


def test_the_server_answers_get_for_its_page_and_data_alone(served):
    watched, port = served
    add(watched.run / "ppo/metrics.jsonl", metric(1))
    page = ask(port)
    assert page.status == 200 and "Live: PPO, iteration 1." in page.text
    policy = page.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    assert json.loads(ask(port, "/data").text)["parts"]["ppo"]["total"] == 1
    for path in ("/x", "/../README.md", "/ppo/metrics.jsonl", "/page?"):
        assert ask(port, path).status == 404, path
    for method in ("POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS"):
        assert ask(port, method=method).status == 405, method
    assert ask(port, method="BREW").status == 501
    for host in ("evil.example", f"evil.example:{port}", "10.0.0.1", "127.0.0.1.evil.example", "[::2]", ""):
        assert ask(port, host=host).status == 400, host
        assert ask(port, "/data", host=host).status == 400, host
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", "localhost", f"[::1]:{port}"):
        assert ask(port, host=host).status == 200, host


def test_damaged_results_do_not_end_the_watch(served):
    watched, port = served
    add(watched.run / "ppo/metrics.jsonl", "x\n" + metric(2))
    add(watched.run / "results.json", "{")
    page = ask(port)
    assert page.status == 200 and "results.json: not JSON" in page.text
    assert "1 damaged line is left out, the first: " in page.text


def start(*words) -> tuple[subprocess.Popen, str]:
    """The command and the first line that it printed."""
    command = [sys.executable, "-m", "minirlhf.report", *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return process, process.stdout.readline()


def test_a_run_that_is_not_there_is_waited_for_and_ctrl_c_is_one_line(tmp_path):
    run = tmp_path / "later"
    process, line = start(run, "--watch", "--port", 0)
    try:
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/   \(Ctrl-C stops\)  Waiting for .*\n", line)
        port = int(found[1])
        assert "Waiting for" in ask(port).text and not run.exists()
        taken, _ = start(run, "--watch", "--port", port)
        assert taken.wait(60) == 2
        assert f"error: cannot listen on 127.0.0.1:{port}" in taken.stderr.read()
        add(run / "ppo/metrics.jsonl", metric(1))
        assert "Live: PPO, iteration 1." in ask(port, "/data").text
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == "interrupted\n" and process.stdout.read() == ""
    finally:
        process.kill()
    assert sorted(p.name for p in run.iterdir()) == ["ppo"]  # nothing was written


@pytest.mark.parametrize("words, message", [
    ("a b --watch", "--watch takes one run"), ("a b --track wandb", "--track takes one run"),
    ("a --port 80", "--port has no effect without --watch"), ("a --watch --out x", "--watch writes nothing"),
    ("a --watch --port 70000", "--port: must be at least 0 and at most 65535"),
    ("a a", "a run is named twice"), ("a b", "a/ppo/metrics.jsonl: missing or empty"),
])  # fmt: skip
def test_what_contradicts_is_refused(run, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert run("minirlhf.report", *words.split()) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not any(tmp_path.iterdir())


def test_several_runs_on_one_page(run, tmp_path, capsys):
    for name in ("one", "two"):
        add(tmp_path / name / "ppo/metrics.jsonl", metric(1) + metric(2))
    add(tmp_path / "three/metrics.jsonl", metric(1))  # a stage's own folder
    assert run("minirlhf.report", tmp_path / "one", tmp_path / "two", tmp_path / "three") == 0
    assert capsys.readouterr().out == f"written to {tmp_path}/comparison.html\n"
    html = (tmp_path / "comparison.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    assert [one["name"] for one in data["runs"]] == ["one", "two", "three"]
    assert [len(one["metrics"]["ppo"]) for one in data["runs"]] == [2, 2, 1]
