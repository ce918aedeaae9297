"""The page's server: who may ask, which files are given out, what is taken, and the queue."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import uvicorn
from page_for_tests import Open, served, started
from PIL import Image
from recipes_for_tests import call, write_clip, write_voice

from s2v_flow import api
from s2v_flow.api import Options
from s2v_flow.errors import MissingError
from s2v_flow.files.lock import is_held
from s2v_flow.views.ui.app import serve
from s2v_flow.views.ui.jobs import Queue

CAP = 1 << 16
RECIPE = """\
s2vflow: 1
params: {crf: 20}
nodes:
  clip: {kind: load_video, file: clip.mp4}
  video: {kind: save_video, frames: $clip, file: out/clip.mp4, crf: $params.crf}
profiles:
  small: {params: {crf: 40}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a recipe that needs no models and has run; it is the current one."""
    folder = tmp_path_factory.mktemp("page")
    write_clip(folder / "clip.mp4", 4)
    (folder / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "portrait.png").write_bytes(b"no picture, but a name that is shown")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("S2VFLOW_DEFAULTS", "")
        api.run("recipe.yaml", cache_dir=folder / "cache")
        yield folder


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[Open]:
    with served(Options(cache_dir=folder / "cache"), ("--cache-dir", "cache"), max_upload_bytes=CAP) as found:
        yield found


def test_the_address_is_one_line_on_stdout_and_opens_the_page(tmp_path: Path) -> None:
    """With the token in it, on 127.0.0.1; the cookie that the first opening sets is enough from then on."""
    with started(tmp_path) as (opened, program):
        assert opened.address.startswith("http://127.0.0.1:")
        assert len(opened.token) >= 32
        status, headers, text = opened.ask(f"/?token={opened.token}", headers={})
        assert (status, b"<h1>s2vflow</h1>" in text) == (200, True)
        cookie, *rules = headers["set-cookie"].split("; ")
        assert {"HttpOnly", "SameSite=Strict"} <= set(rules)
        assert opened.ask("/page.js", headers={"Cookie": cookie})[0] == 200
        assert opened.state() == {"jobs": [], "live": None, "log": [], "is_whole": True}
    assert program.returncode == 130
    assert program.stdout is not None
    assert program.stdout.closed


def test_every_answer_forbids_what_the_page_does_not_need(page: Open) -> None:
    """Also a refusal: scripts and styles from here only, no frames, no guessing of types, no referrer."""
    for given in (None, {}):
        _, headers, _ = page.ask("/", headers=given)
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1"}, 403),
        ({"Host": "localhost:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "https://127.0.0.1:PORT"}, 403),
        ({"Authorization": ""}, 401),
        ({"Authorization": "Basic dTpw"}, 401),
        ({"Authorization": "Bearer wrong"}, 403),
        ({"Authorization": "", "Cookie": "s2vflow_PORT=wrong"}, 403),
        ({"Host": "localhost:PORT"}, 200),
        ({"Origin": "http://127.0.0.1:PORT"}, 200),
    ],
    ids=str,
)
def test_another_host_or_origin_and_a_missing_or_wrong_token_are_refused(
    headers: dict[str, str], expected: int, page: Open
) -> None:
    """On every address: the page, its calls, files, and what does not exist."""
    given = {"Authorization": f"Bearer {page.token}"} | {
        name: value.replace("PORT", str(page.port)) for name, value in headers.items()
    }
    for path in ("/", "/page.js", "/api/recipes", "/files/work/portrait.png"):
        assert page.ask(path, headers=given)[0] == expected, path
    if expected != 200:
        assert page.ask("/nothing", headers=given)[0] == expected
        assert page.ask("/api/jobs", {"source": "recipe.yaml"}, headers=given)[0] == expected
    assert page.state()["jobs"] == []


def test_a_wrong_token_in_the_address_sets_no_cookie(page: Open) -> None:
    status, headers, _ = page.ask("/?token=wrong", headers={})
    assert (status, "set-cookie" in headers) == (403, False)
    assert page.ask(f"/api/recipes?token={page.token}", headers={})[0] == 401, "only the page's own address takes it"


def test_only_shown_files_below_the_roots_are_given_out(page: Open, folder: Path, tmp_path: Path) -> None:
    """Not by .. in any spelling, not by an absolute path, not by links, not hidden ones, not other kinds."""
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"secret")
    (folder / "link.png").symlink_to(secret)
    (folder / "far").symlink_to(tmp_path)
    (folder / ".hidden.png").write_bytes(b"hidden")
    up = os.path.relpath(secret, folder)
    assert page.ask("/files/work/portrait.png")[0] == 200
    for path in (
        *(f"/files/work/{up}", f"/files/work/{up.replace('..', '%2e%2e')}", f"/files/work/{up.replace('/', '%2f')}"),
        *(
            f"/files/work/{quote(str(secret))}",
            "/files/work/link.png",
            "/files/work/far/secret.png",
            "/files/work/.hidden.png",
        ),
        *("/files/work/recipe.yaml", "/files/work/ui/queue.json", "/files/work/portrait.png%00", "/files/work/"),
        *("/files/etc/portrait.png", "/files/runs/../digests.json", "/files/work/nothing.png"),
        f"/files/work/{'n' * 300}.png",
    ):
        status, _, text = page.ask(path)
        assert 400 <= status < 500, path
        assert b"secret" not in text.replace(b"secret.png", b""), path
    for source in (up, str(secret), "far/x.yaml", "/etc/passwd", "../recipe.yaml"):
        assert page.ask("/api/form", {"source": source})[0] in (403, 404), source


def test_uploads_have_a_limit_and_leave_nothing_behind(page: Open, folder: Path) -> None:
    """By what they say of themselves, before a byte is read; else by what comes."""
    allowed = {"Authorization": f"Bearer {page.token}"}
    huge = {**allowed, "Content-Length": str(1 << 50)}
    assert page.ask("/api/uploads/huge.png", b"", "PUT", huge)[0] == 413
    pieces = iter([b"x" * CAP] * 2)
    assert page.ask("/api/uploads/huge.png", pieces, "PUT", allowed)[0] == 413
    assert page.ask("/api/plan", b" " * (2 << 20), "POST")[0] == 413
    assert page.ask("/api/plan", b"[" * 9000, "POST")[0] == 422
    assert page.ask("/api/uploads/run.sh", b"x", "PUT")[0] == 422
    assert list(folder.glob("ui/inputs/*")) == []


def test_uploads_never_write_over_a_file(page: Open, folder: Path) -> None:
    """Another content gets a number, the same one its file; a name is a name, not a path."""
    one, two, three = (b"P6 1 1 255\n" + bytes([grey] * 3) for grey in (1, 2, 3))
    voice = write_voice(folder / "voice.wav", 0.01).read_bytes()
    sent = [("me.png", one), ("me.png", two), ("me.png", one), ("..%2f..%2fme.PNG", three), ("é :.wav", voice)]
    paths = [
        page.json(f"/api/uploads/{name.replace(' ', '%20').replace('é', '%C3%A9')}", body, "PUT")["path"]
        for name, body in sent
    ]
    inputs = "ui/inputs/"
    assert paths == [f"{inputs}{name}" for name in ("me.png", "me.2.png", "me.png", "me.3.png", "é.wav")]
    assert [Path(path).read_bytes() for path in paths] == [content for _, content in sent]


def test_uploads_are_read_as_what_their_name_says(page: Open, folder: Path) -> None:
    """By content: another file under such a name is refused with the reason, and nothing stays."""
    picture, film = b"P6 1 1 255\n\0\0\0", (folder / "clip.mp4").read_bytes()
    voice = write_voice(folder / "voice.wav", 0.05).read_bytes()
    before = set(folder.glob("ui/inputs/*"))
    for name, content, reason in (
        *((f"text.{suffix}", b"some text, no portrait", "text.") for suffix in ("png", "wav", "mp4", "opus")),
        *((f"none.{suffix}", b"", "is empty") for suffix in ("jpg", "mp3", "mkv")),
        *(("a.png", voice, "not an image"), ("a.png", film, "not an image"), ("a.png", b"\x89PNG\r\n\x1a\n", "image")),
        *(("a.wav", picture, "not a recording"), ("a.mp4", picture, "not a recording")),
        *(
            ("a.wav", voice[:-9], "cut short"),
            ("a.mp4", film[: len(film) // 2], "a.mp4: "),
            ("a.wav", film, "no sound"),
        ),
    ):
        status, _, text = page.ask(f"/api/uploads/{name}", content, "PUT")
        told = json.loads(text)
        assert (status, reason in told["error"], bool(told["fix"])) == (422, True, True), (name, told)
        assert ".s2vflow-" not in told["error"]
    assert set(folder.glob("ui/inputs/*")) == before
    for name, content in (("a.jpg", picture), ("b.mp4", film), ("c.mp4", voice), ("d.mp3", voice)):
        assert page.ask(f"/api/uploads/{name}", content, "PUT")[0] == 201


def test_a_form_has_a_field_for_every_value_with_its_bounds(page: Open, folder: Path) -> None:
    """From the schema; a new recipe is sized for the portrait that is given."""
    form = page.json("/api/form", {"source": "recipe.yaml", "profiles": ["small"]})
    fields = {field["path"]: field for field in form["fields"]}
    crf, preset, file = fields["params.crf"], fields["nodes.video.preset"], fields["nodes.clip.file"]
    assert form["profiles"] == ["small"]
    assert [crf[name] for name in ("type", "min", "max", "value")] == ["integer", "0", "51", "40"]
    assert "medium" in preset["choices"]
    assert (file["file"], file["at"]) == ("video", "clip.mp4")
    assert "nodes.video.frames" not in fields, "links are no settings"
    Image.new("RGB", (200, 100)).save(folder / "wide.png")
    fresh = page.json("/api/form", {"source": "start:lightning", "values": {"params.image": "wide.png"}})
    sizes = {field["path"]: field["value"] for field in fresh["fields"]}
    assert (sizes["params.width"], sizes["params.height"]) == ("896", "448")
    places = {field["path"]: field["at"] for field in fresh["fields"] if "file" in field}
    assert places == {"params.image": "wide.png", "params.audio": ""}, "what is not there is not asked for"


def test_a_name_that_is_no_utf_8_is_a_name(page: Open, folder: Path) -> None:
    """The list of recipes has it, and it may be asked for; and a name that no file can have is refused."""
    named = folder / os.fsdecode(b"caf\xe9.yaml")
    named.write_text(RECIPE, encoding="utf-8")
    assert named.name in {item["source"] for item in page.json("/api/recipes")["recipes"]}
    assert page.json("/api/form", {"source": named.name})["profiles"] == ["small"]
    named.unlink()
    for source in ("\ud800\0.yaml", "\ud800.yaml"):
        assert page.ask("/api/form", {"source": source})[0] in (403, 404)


def test_an_address_that_no_call_has_is_refused(page: Open) -> None:
    """Also numbers of more digits than Python reads."""
    for path in (f"/api/jobs/{'9' * 5000}/stop", f"/api/runs/last/videos/{'9' * 5000}"):
        status, _, text = page.ask(path, None, "POST" if "jobs" in path else "GET")
        assert (status, bool(json.loads(text)["error"])) == (414, True)


def test_a_wrong_value_is_told_where_it_is_and_nothing_is_written(page: Open, folder: Path) -> None:
    for values in ({"params.crf": "many"}, {"nodes.video.fsp": "4"}):
        status, _, text = page.ask("/api/jobs", {"source": "recipe.yaml", "values": values})
        assert (status, next(iter(values)) in json.loads(text)["error"]) == (422, True)
    status, _, text = page.ask("/api/jobs", {"source": "recipe.yaml", "values": {"nodes.clip.file": "no.mp4"}})
    assert (status, b"no.mp4" in text) == (404, True)
    for body in (b"{", b"[]", b"{}", b'{"source": "recipe.yaml", "values": 3}'):
        assert page.ask("/api/plan", body, "POST")[0] == 422
    assert list(folder.glob("ui/*.yaml")) == []


@pytest.mark.slow
def test_what_runs_is_a_recipe_in_the_folder_and_its_video_is_in_the_gallery(page: Open, folder: Path) -> None:
    """The plan shows it; the command runs it outside, too; asked for again, it is the same file."""
    wish = {"source": "recipe.yaml", "values": {"params.crf": "30"}, "name": "mine"}
    planned = page.json("/api/plan", wish)
    job = page.json("/api/jobs", wish)
    assert (job["recipe"], job["command"]) == ("ui/mine.yaml", planned["command"])
    assert Path("ui/mine.yaml").read_text() == planned["recipe"]
    assert "crf: 30" in planned["recipe"]
    assert page.json("/api/plan", wish)["path"] == "ui/mine.yaml"
    other = {**wish, "values": {"params.crf": "31"}}
    assert page.json("/api/plan", other)["path"] == "ui/mine.2.yaml"
    done = page.state()["jobs"][0]
    while done["status"] in ("waiting", "running"):
        time.sleep(0.1)
        done = page.state()["jobs"][0]
    assert done["status"] == "finished", (done, page.state()["log"])
    assert Path("ui/out/mine.mp4").is_file()
    found = page.json("/api/runs?search=mine.mp4")
    assert (found["found"], found["runs"][0]["id"]) == (1, done["run"])
    (video,) = found["runs"][0]["videos"]
    token = {"Authorization": f"Bearer {page.token}"}
    status, headers, part = page.ask(video, headers={**token, "Range": "bytes=4-7"})
    assert (status, headers["content-type"], part) == (206, "video/mp4", b"ftyp")
    assert page.json("/api/runs?search=nowhere")["runs"] == []
    first = page.json("/api/runs")["runs"][-1]["id"]
    compared = page.json(f"/api/compare?a={first}&b={done['run']}")
    assert "params.crf" in {item["name"] for item in compared["differences"]}
    for path in (f"/api/runs/{first}/videos/9", "/api/compare?a=last&b=last"):
        assert page.ask(path)[0] == 404, path
    assert page.json(f"/api/jobs/{done['id']}/remove", {})["jobs"] == []


def test_a_queue_survives_its_program(tmp_path: Path) -> None:
    """What waited waits, what ran goes on first, what was stopped stays stopped; a damaged file is not thrown away."""
    path = tmp_path / "queue.json"
    first = Queue(path)
    for name in ("a", "b", "c", "d"):
        first.add(Path(f"ui/{name}.yaml"), {})
    first.jobs[0].status = "running"
    first.change(2, "stop")
    again = Queue(path)
    assert [job.status for job in again.jobs] == ["waiting", "stopped", "waiting", "waiting"]
    again.change(2, "resume")
    assert [job.id for job in Queue(path).jobs] == [2, 1, 3, 4], "what goes on is before what waits"
    assert [item.name for item in tmp_path.iterdir()] == ["queue.json"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(MissingError, match="is no queue"):
        Queue(path)
    assert path.exists()


def test_a_queue_with_a_value_that_no_job_has_is_not_begun(tmp_path: Path) -> None:
    """Nor one of a later version, nor a folder in its place: later on, the page would end in the middle of its work."""
    path = tmp_path / "queue.json"
    Queue(path).add(Path("ui/a.yaml"), {})
    sound = json.loads(path.read_bytes())
    (job,) = sound["jobs"]
    wrong = {"id": (None, "x", 0, 1.5, 10**400), "status": ([], {}, "gone"), "seconds": (float("nan"), "x")}
    wrong |= dict.fromkeys(("recipe", "command", "run", "error"), (None, 3, [], {}))
    jobs = [[{**job, name: value}] for name, values in wrong.items() for value in values]
    jobs += [[{key: job[key] for key in job if key != name}] for name in ("id", "recipe", "command")]
    files = [json.dumps({**sound, "jobs": some}) for some in (*jobs, {"a": job}, [None], None)]
    for text in (*files, json.dumps({**sound, "queue": 2}), "", "[]", "[" * 100_000):
        path.write_text(text)
        with pytest.raises(MissingError, match="is no queue, or of another version"):
            Queue(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(MissingError, match="is no queue: Is a directory"):
        Queue(path)


def test_a_page_has_its_folder_before_it_reads_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that start at once, the second goes on with no queue that the first is changing."""
    monkeypatch.chdir(tmp_path)
    Path("ui").mkdir()
    os.mkfifo("ui/queue.json")  # reading it waits
    asked: queue.Queue[uvicorn.Server] = queue.Queue()
    given = {"is_ready": lambda address: None, "on_server": asked.put}
    thread = threading.Thread(target=serve, args=(Options(cache_dir=tmp_path), (), 0), kwargs=given)
    thread.start()
    with open("ui/queue.json", "wb") as reading:
        is_taken = is_held(Path("ui/.lock"))
        reading.write(b'{"queue": 1, "jobs": []}')
    asked.get(timeout=30).should_exit = True
    thread.join()
    assert is_taken


@pytest.mark.slow
def test_what_else_a_run_prints_does_not_end_the_queue(folder: Path, tmp_path: Path) -> None:
    """A kind of another package, say, lines that are JSON and no events."""
    (tmp_path / "sitecustomize.py").write_text("print('3', '{}', '[1]', 'null', sep='\\n')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        made = Queue(tmp_path / "queue.json", ("--cache-dir", "cache"))
        job = made.add(Path("recipe.yaml"), {})

        async def work() -> None:
            working = asyncio.create_task(made.work())
            while job.status in ("waiting", "running") and not working.done():
                await asyncio.sleep(0.05)
            working.cancel()

        asyncio.run(work())
    assert job.status == "finished", made.log


def test_one_page_serves_a_folder_and_a_port(page: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = call("ui", "--no-browser")
    assert (code, "another s2vflow ui serves this folder" in err) == (2, True)
    monkeypatch.chdir(tmp_path)
    code, _, err = call("ui", "--no-browser", "--port", page.port)
    assert (code, f"port {page.port}: Address already in use" in err) == (2, True)


def test_without_its_packages_the_command_that_installs_them_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "s2v_flow.views.ui.app", raising=False)
    code, out, err = call("ui")
    assert (code, out) == (2, "")
    assert "-m pip install 's2vflow[ui]'" in err
