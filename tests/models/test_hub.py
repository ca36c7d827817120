"""Models and datasets by name: a server in this file speaks what huggingface_hub asks of the hub.  No network is used."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

pytestmark = pytest.mark.models
huggingface_hub = pytest.importorskip("huggingface_hub")
pytest.importorskip("huggingface_hub.constants")

import torch  # noqa: E402
from safetensors.torch import load_file, save  # noqa: E402

from minirlhf import UserError, checkpoint, data  # noqa: E402
from minirlhf.interop import convert, hub  # noqa: E402
from minirlhf.model import GPT, GPTConfig  # noqa: E402
from minirlhf.support import sources  # noqa: E402
from minirlhf.tokenizer import Tokenizer  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
ROWS = "".join(json.dumps({"prompt": f"Film {i}:", "completion": f" it is {i}"}) + "\n" for i in range(9))


class Hub(ThreadingHTTPServer):
    """Repositories in memory: {("models" or "datasets", name): {commit: {path: bytes}}}, branches, and what was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories, self.branches, self.refuse, self.gated, self.asked = {}, {}, {}, set(), []
        threading.Thread(target=self.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def put(self, kind, name, files, branch="main"):
        content = {path: text.encode() if isinstance(text, str) else text for path, text in files.items()}
        commit = hashlib.sha1(repr(sorted(content.items())).encode()).hexdigest()
        self.repositories.setdefault((kind, name), {})[commit] = content
        self.branches[kind, name, branch] = commit
        return commit

    def downloaded(self):
        return sorted({path for method, path in self.asked if method == "GET" and "/resolve/" in path})


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path).strip("/")
        self.server.asked.append((self.command, path))
        words = path.split("/")
        api = words[0] == "api"
        words = words[1:] if api else words
        kind = words.pop(0) if words[0] in ("models", "datasets") else "models"
        name, rest = "/".join(words[:2]), words[2:]
        if (kind, name) in self.server.refuse:
            status, code = self.server.refuse[kind, name]
            return self.answer(status, **({"X_Error_Code": code} if code else {}))
        commits = self.server.repositories.get((kind, name))
        if commits is None:
            return self.answer(401 if api else 404, X_Error_Code="RepoNotFound")
        revision = rest[1] if len(rest) > 1 else "main"
        commit = self.server.branches.get((kind, name, revision), revision)
        if commit not in commits:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = commits[commit]
        if api and rest[:1] in ([], ["revision"]):
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": file} for file in files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        if api:
            tree = [{"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for file, content in files.items()]  # fmt: skip
            return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
        if name in self.server.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        content = files.get("/".join(rest[2:]))
        if content is None:
            return self.answer(404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(content).hexdigest()
        self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The hub, and an empty cache."""
    served = Hub()
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", served.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.chdir(tmp_path)
    yield served
    served.shutdown()
    served.server_close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The files of a tiny Qwen3, in two shards, and others that are no business of ours."""
    home = tmp_path_factory.mktemp("made")
    tokenizer = Tokenizer.train(["the film is good, the film is bad"], 280)
    config = GPTConfig(280, 48, 2, 4, 32, n_kv_head=2, head_dim=12, qk_norm=True, norm="rms", positions="rotary",
                       mlp="swiglu", bias=False)  # fmt: skip
    torch.manual_seed(1)
    model = GPT(config)
    about = checkpoint.describe("import", config, convert.Import("random"), 1, True, tokenizer)
    checkpoint.save(home / "ours", 1, model.state_dict(), about, tokenizer)
    convert.export_model(home / "ours", home / "hf", backbone=False)
    found = {file.name: file.read_bytes() for file in (home / "hf").iterdir()}
    weights = load_file(home / "hf" / "model.safetensors")
    del found["model.safetensors"]
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(where.values()):
        found[file] = save({name: t for name, t in weights.items() if where[name] == file})
    found["model.safetensors.index.json"] = json.dumps({"weight_map": where}).encode()
    found |= {"README.md": b"# A model", "pytorch_model.bin": b"\x80\x04.", "consolidated.safetensors": b"x" * 99,
              "original/params.json": b"{}", "generation_config.json": b"{}", "onnx/model.onnx": b"x"}  # fmt: skip
    return found, model


def one_line(refused, *parts):
    message = str(refused.value)
    assert "\n" not in message and message.isprintable() and len(message) < 500, message
    for part in parts:
        assert part in message, message


# ---------------------------------------------------------------- models


def test_a_model_by_its_name(server, files, tmp_path):
    found, model = files
    commit = server.put("models", "Org/Tiny-3", found)
    said = convert.import_model("Org/Tiny-3", tmp_path / "ours")
    assert f"the hub, Org/Tiny-3 at commit {commit[:12]}" in said
    state = checkpoint.load_state(tmp_path / "ours")
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    wanted = ["config.json", "generation_config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
              "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
    assert server.downloaded() == [f"Org/Tiny-3/resolve/{commit}/{name}" for name in wanted]
    source = checkpoint.load_config(tmp_path / "ours")["source"]
    assert (source["name"], source["revision"]) == ("Org/Tiny-3", commit)
    assert source["sha256"] == {name: hashlib.sha256(found[name]).hexdigest() for name in wanted}

    server.asked.clear()  # what is in the cache is not fetched again
    convert.import_model("hub:Org/Tiny-3", tmp_path / "again")
    assert not server.downloaded()


def test_nothing_is_fetched_for_a_folder_that_is_taken(server, files, tmp_path):
    server.put("models", "org/tiny", files[0])
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="ours: exists already"):
        convert.import_model("org/tiny", tmp_path / "ours")
    assert not server.asked


def test_a_full_disk_is_one_line(server, files, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    server.put("models", "org/tiny", files[0])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(UserError) as refused:
        convert.import_model("org/tiny", tmp_path / "none")
    one_line(refused, "org/tiny: the cache cannot be written", "No space left on device", "set HF_HOME")


def test_a_revision(server, files, tmp_path):
    found, _ = files
    old = server.put("models", "org/tiny", found, "v1")
    new = server.put("models", "org/tiny", found | {"README.md": b"changed"})
    assert old != new
    for name, commit in ("org/tiny@v1", old), ("org/tiny", new), (f"org/tiny@{old}", old):
        convert.import_model(name, tmp_path / name.replace("/", " "))
        assert checkpoint.load_config(tmp_path / name.replace("/", " "))["source"]["revision"] == commit
    with pytest.raises(UserError) as refused:
        convert.import_model("org/tiny@v2", tmp_path / "none")
    one_line(refused, "org/tiny@v2: has no revision v2: name a branch, a tag or a commit of http")


def test_a_local_folder_of_that_name_comes_first(server, files, tmp_path):
    found, _ = files
    server.put("models", "org/tiny", {"config.json": b"{}"})
    folder = tmp_path / "org" / "tiny"
    folder.mkdir(parents=True)
    for name, content in found.items():
        if "/" not in name:
            (folder / name).write_bytes(content)
    assert "from the local folder org/tiny" in convert.import_model("org/tiny", tmp_path / "ours")
    assert not server.asked
    with pytest.raises(UserError, match="hub:org/tiny: holds no model.safetensors"):
        convert.import_model("hub:org/tiny", tmp_path / "none")


def without(found, *names):
    return {name: content for name, content in found.items() if name not in names}


def test_what_is_refused(server, files, tmp_path):
    found, _ = files
    shards = [name for name in found if name.startswith("model")]
    gguf = {"README.md": b"", "tiny.Q4_K_M.gguf": b"GGUF"}
    index = json.dumps({"weight_map": {"a": "pytorch_model.bin"}})
    star = json.dumps({"weight_map": {"a": "*"}})
    for name, content, *parts in [
        ("org/pickles", without(found, *shards), "pytorch_model.bin is a pickle", "save_pretrained"),
        ("org/nothing", without(found, *shards, "pytorch_model.bin"), "holds no model.safetensors: name another"),
        ("org/gguf", gguf, "holds no config.json", "`hf download org/gguf tiny.Q4_K_M.gguf`"),
        ("org/shard", without(found, "model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors is in its index"),
        ("org/index", found | {"model.safetensors.index.json": index}, "pytorch_model.bin is in its index, but is no"),
        ("org/star", found | {"model.safetensors.index.json": star}, "* is in its index, but is no safetensors file"),
    ]:  # fmt: skip
        server.put("models", name, content)
        server.asked.clear()
        with pytest.raises(UserError) as refused:
            convert.import_model(name, tmp_path / "none")
        one_line(refused, name, *parts)
        assert not any(path.endswith((".bin", ".onnx")) for path in server.downloaded())
        assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("answer, parts", [
    ((401, "RepoNotFound"), ["no such folder here, and no such model on the hub, or a private one", "hf auth login"]),
    ((404, "RepoNotFound"), ["no such model on the hub"]),
    ((403, "GatedRepo"), ["is gated: ask for access at http", "/org/tiny, then log in with `hf auth login`, or set HF_TOKEN"]),
    ((401, "GatedRepo"), ["is gated: ask for access"]),
    ((403, None), ["the hub refuses access (403): log in"]),
    ((500, None), ["the hub answers 500: try again later"]),
])  # fmt: skip
def test_errors_of_the_hub_are_one_line(server, tmp_path, monkeypatch, answer, parts):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.refuse["models", "org/tiny"] = server.refuse["datasets", "org/tiny"] = answer
    with pytest.raises(UserError) as refused:
        convert.import_model("org/tiny", tmp_path / "none")
    one_line(refused, "org/tiny: ", *parts)
    with pytest.raises(UserError) as refused:
        data.load("hub:org/tiny:train")
    one_line(
        refused,
        "org/tiny: ",
        parts[-1].replace("model", "dataset").replace("/org/tiny,", "/datasets/org/tiny,"),
    )
    assert not (tmp_path / "none").exists()


def test_a_gated_model_shows_what_it_holds_but_gives_none_of_it(server, files, tmp_path):
    """As the hub does: anybody may list the files."""
    server.put("models", "org/tiny", files[0])
    server.gated.add("org/tiny")
    with pytest.raises(UserError) as refused:
        convert.import_model("org/tiny", tmp_path / "none")
    one_line(refused, "org/tiny: is gated: ask for access at http", "hf auth login", "HF_TOKEN")


def test_a_cache_that_cannot_be_written_is_one_line(server, files, tmp_path, monkeypatch):
    server.put("models", "org/tiny", files[0])
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as refused:
        convert.import_model("org/tiny", tmp_path / "none")
    one_line(refused, "org/tiny: ", "cannot be written", "set HF_HOME")


def test_without_a_network_the_cache_is_taken(server, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    commit = server.put("models", "org/tiny", files[0])
    server.put("datasets", "org/rows", {"train.jsonl": ROWS, "test.jsonl": ROWS})
    convert.import_model("org/tiny", tmp_path / "ours")
    assert len(data.load("hub:org/rows").records) == 9
    server.refuse["models", "org/tiny"] = (500, None)  # the hub is down
    convert.import_model("org/tiny", tmp_path / "down")
    assert f"commit {commit[:12]} in the cache is used" in capsys.readouterr().out

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.asked.clear()
    convert.import_model("org/tiny", tmp_path / "offline")
    assert checkpoint.load_config(tmp_path / "offline")["source"]["revision"] == commit
    assert len(data.load("hub:org/rows:train").records) == 9 and not server.asked
    assert "in the cache is used" not in capsys.readouterr().out  # that is what was asked for
    for act in (
        lambda: convert.import_model("org/other", tmp_path / "none"),
        lambda: convert.import_model("org/tiny@v1", tmp_path / "none"),
        lambda: data.load("hub:org/other"),
    ):
        with pytest.raises(UserError) as refused:
            act()
        one_line(refused, "not, or not all of it, in the cache, and HF_HUB_OFFLINE is set: unset it")
    with pytest.raises(UserError, match="has no split test: .*: train$"):  # it was never fetched
        data.load("hub:org/rows:test")


def test_no_network_at_all(server, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError) as refused:
        convert.import_model("org/tiny", tmp_path / "none")
    one_line(refused, "org/tiny: no such folder here, and the hub cannot be reached (", "go online once")


def test_without_the_package_a_line_says_what_to_install(server, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    for act in lambda: convert.import_model("org/tiny", tmp_path / "none"), lambda: data.load("hub:org/rows"):
        with pytest.raises(UserError) as refused:
            act()
        one_line(refused, "pip install 'minirlhf[hub]'")


@pytest.mark.parametrize(
    "name", ["/abs/folder", "./folder", "../x/y", "~/models/llama", "a/b/c", "x", "a b/c", "a/b@", "a/é"]
)
def test_paths_are_no_names(server, tmp_path, name):
    with pytest.raises(UserError, match="no such file or folder: give a Hugging Face folder"):
        convert.import_model(name, tmp_path / "none")
    assert not server.asked


def test_the_command_with_the_variables_of_huggingface_hub(server, files, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, as its own commands have them."""
    server.put("models", "org/tiny", files[0])
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "minirlhf.checkpoint", "import", "org/tiny"]
    for out, more in ("first", {}), ("offline", {"HF_HUB_OFFLINE": "1"}):
        done = subprocess.run([*command, str(tmp_path / out)], cwd=ROOT, env=os.environ | settings | more, text=True,
                              capture_output=True)  # fmt: skip
        assert done.returncode == 0, done.stderr[-800:]
        assert "from the hub, org/tiny at commit" in done.stdout
    assert (tmp_path / "home/hub/models--org--tiny/refs/main").exists()
    done = subprocess.run([*command[:-1], "org/none", str(tmp_path / "none")], cwd=ROOT, env=os.environ | settings, text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 2 and "org/none: no such folder here, and no such model" in done.stderr
    assert "Traceback" not in done.stderr


# ---------------------------------------------------------------- datasets


def test_a_split_of_a_dataset(server, tmp_path):
    half = ROWS.splitlines(keepends=True)
    content = {"data/train-00000-of-00002.jsonl": "".join(half[:5]), "data/train-00001-of-00002.jsonl": "".join(half[5:]),
               "data/test-00000-of-00001.jsonl": half[0], "README.md": "# rows", "script.py": "boom"}  # fmt: skip
    commit = server.put("datasets", "org/rows", content)
    found = data.load("hub:org/rows")
    assert [r.prompt for r in found.records] == [f"Film {i}:" for i in range(9)]
    assert found.sources == [
        f"hub:org/rows@{commit}:{name} sha256 {hashlib.sha256(content[name].encode()).hexdigest()}"
        for name in sorted(content) if name.startswith("data/train")
    ]  # fmt: skip
    assert found.sha256 == hashlib.sha256(ROWS.encode()).hexdigest() and found.name == "hub:org/rows"
    assert len(server.downloaded()) == 2
    assert len(data.load("hub:org/rows:test").records) == 1
    assert len(data.load(f"hub:org/rows@{commit}:test").records) == 1
    with pytest.raises(UserError) as refused:
        data.load("hub:org/rows:validation")
    one_line(refused, "hub:org/rows:validation: has no split validation: name one", "test, train")
    for name in "hub:rows", "hub:a/b/c", "hub:a/b:", "hub:a/b@:x", "hub:", "hub:a/b:x y":
        with pytest.raises(UserError, match="expected hub:org/name"):
            data.load(name)


def test_a_bad_row_is_named_with_its_file(server):
    server.put("datasets", "org/rows", {"train.jsonl": ROWS + "{\n"})
    with pytest.raises(UserError, match=r"train.jsonl:10: "):
        data.load("hub:org/rows")


TRAIN = ("default", "train")
LAYOUTS = {
    ("data/train-00000-of-00001.parquet",): (None, {TRAIN}),
    ("data/train-00000-of-00001-0123456789abcdef.parquet", "data/test-00000-of-00001-0123456789abcdef.parquet"): (
        None, {TRAIN, ("default", "test")}),
    ("train.jsonl", "test.jsonl"): ("train", {TRAIN, ("default", "test")}),
    ("default/train/0000.parquet", "default/train/0001.parquet"): (None, {TRAIN}),
    ("data/train/part-0.parquet", "data/train/part-1.parquet"): ("train", {TRAIN}),
    ("main/train-00000-of-00001.parquet", "socratic/train-00000-of-00001.parquet"): (
        "socratic/train", {("main", "train"), ("socratic", "train")}),
    ("helpful-base/train.jsonl.gz", "helpful-base/test.jsonl.gz"): (
        "helpful-base/train", {("helpful-base", "train"), ("helpful-base", "test")}),
    ("data/train_prefs-00000-of-00003.parquet",): (None, {("default", "train_prefs")}),
    ("my_rows.json",): (None, {("default", "my_rows")}),
    ("data/en/train.jsonl",): ("en/train", {("en", "train")}),
}  # fmt: skip


@pytest.mark.parametrize("names", LAYOUTS)
def test_usual_layouts(names):
    wanted, keys = LAYOUTS[names]
    plain = [name.removesuffix(".gz").rpartition(".")[0] for name in names]
    assert {hub.split_of(name) for name in plain} == keys
    more = ["README.md", "dataset_infos.json", ".gitattributes", ".hidden/train.jsonl", "rows.py", "x.csv"]
    chosen = hub.choose([*reversed(names), *more], wanted)
    split = (wanted or "train" if len(keys) > 1 else "").rpartition("/")
    assert chosen == [n for n in names if (split[0] or "") in n and split[2] in n.rpartition("data/")[2]]


def test_splits_that_are_not_clear_are_listed():
    two = ["main/train.jsonl", "main/test.jsonl", "socratic/train.jsonl"]
    for wanted in None, "train":
        with pytest.raises(
            UserError, match="has several configs or splits: .*main/test, main/train, socratic/train$"
        ):
            hub.choose(two, wanted)
    assert hub.choose(two, "test") == ["main/test.jsonl"]
    assert hub.choose(["train.jsonl", "train.parquet"], "train") == ["train.parquet"]
    with pytest.raises(UserError, match="has several configs or splits: .*: a, b$"):
        hub.choose(["a.jsonl", "b.jsonl"], None)
    with pytest.raises(UserError, match="has no split main/x"):
        hub.choose(two, "main/x")
    with pytest.raises(UserError, match="holds no .parquet.*@refs/convert/parquet"):
        hub.choose(["rows.csv", "config.json"], None)
    with pytest.raises(UserError, match=r"s10, .*\.\.\.$"):
        hub.choose([f"s{i}.jsonl" for i in range(50)], None)


def test_a_local_source_is_read_without_the_hub(server, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text(ROWS)
    monkeypatch.setattr(sources.importlib, "import_module", lambda name: pytest.fail(name))
    assert data.load(tmp_path / "rows.jsonl").sources == [str(tmp_path / "rows.jsonl")]
