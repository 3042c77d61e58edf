"""`lab deploy --folder` and `--local`: a container's folder, and its server with no home and no network."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
import yaml

from lab.azureml import snapshot
from lab.deploy import command, local, server
from lab.deploy import folder as context
from lab.deploy.command import deploy
from stages.answers.generation import OnnxModel
from stages.core.errors import UserError
from stages.text.chats import generation_prompt_ids
from support.processes import HANGS, wait_until
from support.project import ROOT
from support.tiny_models import laid_out

QUESTION = [{"role": "user", "content": "what is the capital of France?"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model as a version is laid out: onnx/ and onnx_adapter/. Nobody may write to it."""
    folder = laid_out(tmp_path_factory.mktemp("container"))
    for file in [*folder.rglob("*"), folder]:
        file.chmod(file.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("written") / "server"
    assert context.write(folder)
    return folder


@pytest.fixture(scope="module")
def packages(tmp_path_factory, written) -> Path:
    """What the image's pip would install: the packages of requirements.txt and no others."""
    site = tmp_path_factory.mktemp("site")
    for line in (written / "requirements.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        found = distribution(name)
        assert found.version == version
        tops = {file.parts[0] for file in found.files if ".." not in file.parts}
        for top in tops - {"__pycache__"}:
            with contextlib.suppress(FileExistsError):
                (site / top).symlink_to(found.locate_file(top))
    return site


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def test_two_writes_are_the_same_to_the_byte(written, tmp_path):
    assert context.write(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(written)
    assert not context.write(tmp_path / "again")


def test_its_list_is_what_sha256sum_checks(written):
    done = subprocess.run(["sha256sum", "-c", "--quiet", context.LIST], cwd=written)
    assert done.returncode == 0
    assert len((written / context.LIST).read_text().splitlines()) == len(bytes_of(written)) - 1


def test_it_knows_no_secret_no_machine_and_no_azure(monkeypatch, tmp_path):
    monkeypatch.setenv("LAB_API_KEY", "a-key-of-this-shell")
    monkeypatch.setenv("AZURE_CLIENT_SECRET", "a-secret-of-this-shell")
    context.write(tmp_path / "server")
    places = [str(ROOT), str(Path.home()), sys.prefix, str(tmp_path), socket.gethostname()]
    for name, data in bytes_of(tmp_path / "server").items():
        text = data.decode()
        for word in ("of-this-shell", *(place for place in places if len(place) > 4)):
            assert word not in text, (name, word)
        assert "import azure" not in text, name
        assert not re.search(r"\bfrom azure\b", text), name


def test_the_image_is_pinned_slim_and_of_nobody(written):
    lines = (written / "Dockerfile").read_text().splitlines()
    base = {line.split()[1] for line in lines if line.startswith("FROM ")}
    assert base == {
        line.split()[1]
        for line in snapshot.DOCKERFILE.read_text().splitlines()
        if line.startswith("FROM ")
    }
    assert "USER 10001:10001" in lines
    pins = (written / "requirements.txt").read_text().splitlines()
    locked = {
        line.split()[0]
        for lock in context.LOCKS
        for line in (ROOT / "requirements" / lock).read_text().splitlines()
        if "==" in line
    }
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    assert {*pins} <= locked
    names = {pin.partition("==")[0] for pin in pins}
    assert {"fastapi", "uvicorn", "onnxruntime-genai", "tokenizers"} <= names
    assert not names & {"torch", "transformers", "dvc", "azure-ai-ml", "olive-ai"}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_the_image_compiles_the_operator_as_it_says(written, tmp_path):
    text = (written / "Dockerfile").read_text().replace("\\\n", "")
    (command,) = [line[4:] for line in text.splitlines() if "gcc -O3" in line]
    source = written / "app/stages/lora_op/add_lora.c"
    command = command.replace("/build/add_lora.c", str(source)).replace("/build", str(tmp_path))
    subprocess.run(["sh", "-c", command], check=True)
    named = (written / "Dockerfile").read_text().split("LORA_OP_LIBRARY=")[1].split()[0]
    # the runtime finds it by the name that is in it
    assert Path(named).name.encode() in (tmp_path / Path(named).name).read_bytes()


def test_compose_publishes_on_loopback_mounts_read_only_and_needs_a_key(written):
    one = yaml.safe_load((written / "compose.yaml").read_text())["services"]["server"]
    assert one["ports"] == ["127.0.0.1:8000:8000"]
    assert one["volumes"][0].endswith(":/model:ro")
    assert ":?" in one["environment"]["LAB_API_KEY"]
    assert one["read_only"]
    assert one["cap_drop"] == ["ALL"]


def test_its_readme_names_every_variable_that_the_server_reads(written):
    read = set(re.findall(r"LAB_[A-Z_]+", (written / "app/lab/deploy/server.py").read_text()))
    assert {*re.findall(r"LAB_[A-Z_]+", (written / "README.md").read_text())} == read


@pytest.mark.parametrize("foreign", ["notes.txt", "README.md"])
def test_somebody_elses_files_and_edited_ones_are_not_replaced(foreign, tmp_path):
    context.write(tmp_path)
    (tmp_path / foreign).write_text("mine")
    with pytest.raises(UserError, match=rf"not replaced, as {foreign}"):
        context.write(tmp_path)
    assert (tmp_path / foreign).read_text() == "mine"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/mine").write_text("mine")
    with pytest.raises(UserError, match="not replaced"):
        context.write(tmp_path)
    with pytest.raises(UserError, match="not replaced"):
        context.write(tmp_path / "sub/mine")


def test_ours_of_an_earlier_state_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(context, "NOT_NEEDED", set())
    context.write(tmp_path / "server")
    monkeypatch.undo()
    assert context.write(tmp_path / "server")
    assert context.read(tmp_path / "server") == context.contents()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def serving(command: list[str], log: Path, port: int, **options):
    """Run a command until it is ready; end it with SIGTERM, after which its exit code has to be 0."""
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:

            def ready() -> bool:
                assert process.poll() is None, log.read_text()
                with contextlib.suppress(httpx.TransportError):
                    return client.get("/readyz").status_code == 200
                return False

            wait_until(ready)
            yield client
            process.terminate()
            assert process.wait(HANGS) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def expected(model: Path, adapter: bool) -> str:
    """Return what `lab chat` says to the question."""
    from lab.models.light_tokenizer import LightTokenizer

    files = {"adapter": model / server.ADAPTER} if adapter else {}
    onnx = OnnxModel(model / "onnx", files)
    tokenizer = LightTokenizer(model / "onnx")
    prompt = generation_prompt_ids(tokenizer, QUESTION)
    made = onnx.generate(prompt, 8, "adapter" if adapter else None)
    return tokenizer.decode([token for token in made if token not in onnx.ends])


def alone() -> list[str]:
    """Return the words before a command that take the network away; loopback has to be brought up for it."""
    with contextlib.suppress(OSError):
        if subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode == 0:
            return ["unshare", "-rn"]
    return []


ASK = """
import json, sys, urllib.request as u
key, port, body = sys.argv[1:]
ask = u.Request(f"http://127.0.0.1:{port}/v1/chat/completions", body.encode(), {
    "Authorization": f"Bearer {key}", "Content-Type": "application/json"})
print(u.urlopen(ask, timeout=60).read().decode())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["travel", None])
def test_its_server_answers_with_its_own_packages_no_home_and_no_environment(
    name, written, packages, model, tmp_path
):
    """What the Dockerfile sets up, less the network that Docker makes: these packages, files, variables."""
    port, before = free_port(), bytes_of(model)
    environment = {
        "PATH": "/nowhere",
        "HOME": "/nonexistent",
        "PYTHONPATH": str(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "LAB_MODEL": str(model),
        "LAB_HOST": "127.0.0.1",
        "LAB_PORT": str(port),
        "LAB_API_KEY": "opens",
        "LAB_ADAPTER": "travel",
        "HTTPS_PROXY": "http://127.0.0.1:1",  # whatever it asked for would fail
        "HTTP_PROXY": "http://127.0.0.1:1",
    }
    command = [sys.executable, "-S", "-m", "lab.deploy.server"]  # -S: no site-packages
    with serving(command, tmp_path / "log", port, cwd=written / "app", env=environment) as client:
        assert client.post("/v1/chat/completions", json={}).status_code == 401
        client.headers["Authorization"] = "Bearer opens"
        models = [each["id"] for each in client.get("/v1/models").json()["data"]]
        body = {"model": name or models[0], "messages": QUESTION, "max_tokens": 8}
        said = client.post("/v1/chat/completions", json=body, timeout=60).json()
        assert said["choices"][0]["message"]["content"] == expected(model, adapter=name is not None)
        assert models[1:] == ["travel"]
    assert bytes_of(model) == before
    assert context.read(written) == bytes_of(written), "it wrote into its folder"
    assert not Path("/nonexistent").exists()


@pytest.mark.slow
@pytest.mark.skipif(not alone(), reason="the network cannot be taken away here")
def test_its_server_needs_no_network(written, packages, model, tmp_path):
    """In a network namespace that has loopback and nothing else."""
    body = json.dumps({"model": "adapter", "messages": QUESTION, "max_tokens": 8})
    script = f"""
        ip link set lo up 2>/dev/null || {sys.executable} -c '{UP}'
        {sys.executable} -S -m lab.deploy.server & server=$!
        for i in $(seq 600); do {sys.executable} -c 'import sys, urllib.request as u
u.urlopen("http://127.0.0.1:8000/readyz")' 2>/dev/null && break; sleep 0.1; done
        {sys.executable} -c "$ASK" opens 8000 "$BODY"; kill $server; wait $server; echo "exit $?"
    """
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/bin",
        "HOME": "/nonexistent",
        "PYTHONPATH": str(packages),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "LAB_MODEL": str(model),
        "LAB_HOST": "0.0.0.0",
        "LAB_API_KEY": "opens",
        "ASK": ASK,
        "BODY": body,
    }
    done = subprocess.run(
        [*alone(), "bash", "-c", script],
        cwd=written / "app",
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    answer = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    content = json.loads(answer)["choices"][0]["message"]["content"]
    assert content == expected(model, adapter=True)
    assert done.stdout.splitlines()[-1] == "exit 0", done.stderr


# SIOCSIFFLAGS, where there is no `ip`: an interface that is up and running
UP = (
    "import fcntl, socket, struct; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); "
    'fcntl.ioctl(s, 0x8914, struct.pack("16sh", b"lo", 0x41))'
)


def refused(tmp_path, **environment) -> str:
    """Return the one line with which the server does not start."""
    done = subprocess.run(
        [sys.executable, "-m", "lab.deploy.server"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    return line


def test_what_an_operator_forgot_is_one_line(tmp_path, model):
    assert "server: LAB_MODEL /model holds no ONNX model" in refused(tmp_path)
    there = {"LAB_MODEL": str(model)}
    assert "set --api-key or LAB_API_KEY" in refused(tmp_path, LAB_HOST="0.0.0.0", **there)
    assert "LAB_PORT is 'many'" in refused(tmp_path, LAB_PORT="many", **there)
    assert "LAB_SLOTS is '0'" in refused(tmp_path, LAB_SLOTS="0", **there)


def test_a_model_may_lie_deeper_in_its_mount_and_only_once(tmp_path):
    deep = tmp_path / "travel/3/4f2a/onnx"
    deep.mkdir(parents=True)
    (deep / server.CONFIG).touch()
    assert server.find_model(tmp_path) == deep
    (tmp_path / "food/1/77aa/onnx").mkdir(parents=True)
    (tmp_path / "food/1/77aa/onnx" / server.CONFIG).touch()
    with pytest.raises(UserError, match="several models"):
        server.find_model(tmp_path)


@pytest.mark.slow
def test_local_runs_the_folders_server_and_passes_sigterm_on(model, tmp_path):
    port = free_port()
    words = ["deploy", "--local", "--model", str(model), "--port", str(port)]
    environment = {
        "PATH": str(tmp_path),  # no docker on it
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "lab.cli", *words]
    with serving(command, tmp_path / "log", port, cwd=tmp_path, env=environment) as client:
        assert [each["id"] for each in client.get("/v1/models").json()["data"]][1:] == ["adapter"]
    assert "No Docker here" in (tmp_path / "log").read_text()
    assert [each.name for each in tmp_path.iterdir()] == ["log"]


def test_a_port_that_is_taken_is_told_before_anything_is_built(model, monkeypatch):
    monkeypatch.setattr(local, "docker_runs", lambda: pytest.fail("asked too early"))
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(UserError, match=r"cannot listen on .*, port"),
    ):
        deploy(local=True, files=model, port=taken.getsockname()[1])


def test_a_model_that_is_not_here_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no ONNX model: --model, or run `dvc repro`"):
        deploy(local=True, files=tmp_path, port=free_port())


def test_docker_gets_the_key_by_name_and_the_model_read_only(model, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(local, "docker_runs", lambda: True)
    monkeypatch.setattr(local, "follow", lambda command, *_: ran.append(command) or 0)
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(subprocess, "run", lambda command: ran.append(command) or done)
    monkeypatch.delenv("LAB_API_KEY", raising=False)
    with pytest.raises(UserError, match="needs a key: export LAB_API_KEY"):
        local.run(tmp_path, model, free_port())
    monkeypatch.setenv("LAB_API_KEY", "never in a command")
    assert local.run(tmp_path, model, free_port()) == 0
    build, run = ran
    assert build[:2] == ["docker", "build"]
    assert not any("never" in word for word in run)
    assert run[run.index("--env") + 1] == "LAB_API_KEY"
    assert f"{model.resolve()}:/model:ro" in run
    assert {"--read-only", "--cap-drop=ALL"} <= {*run}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({}, "which model"),
        ({"status": True}, "which model"),
        ({"status": True, "delete": True}, "--status and --delete"),
        ({"rollback": True, "folder": Path("x")}, "--rollback and --folder"),
        ({"model": "travel:2", "local": True}, "lab download travel:2 brings it"),
    ],
)
def test_words_that_do_not_go_together_are_refused(words, said):
    with pytest.raises(UserError, match=said):
        deploy(**words)


def test_without_azures_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs azure-ai-ml: `make setup`.*--local do without"):
        deploy("ft-for-travel")


def test_the_folders_hash_follows_its_content():
    files = context.contents()
    other = files | {context.LIST: files[context.LIST] + b"more"}
    assert context.digest(files) == hashlib.sha256(files[context.LIST]).hexdigest()
    assert context.digest(files) != context.digest(other)
