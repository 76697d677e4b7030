"""The playground without a browser: fields, servers, snippets, and what its server gives away."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import redirect_stdout
from math import isclose
from pathlib import Path
from urllib.parse import quote, urljoin

import pytest

import triward.cli
from tests.client.helpers import png
from tests.commands import BIN, Command, has_ended
from tests.fakeserver import FakeServer, Fault
from triward import InvalidRequest, RewardClient, ServerUnavailable, Tls, TriwardError

pytest.importorskip("gradio")

from triward_tools import cli_playground
from triward_tools.playground.asking import CountingClient, Reply, Servers
from triward_tools.playground.bars import Bar, bars, preferred, refused
from triward_tools.playground.form import MOST, Draft, Form, _preview, draft
from triward_tools.playground.score import (
    RUNS,
    in_order,
    odds,
    ranking,
    recalled,
    summary,
    with_run,
)
from triward_tools.playground.snippets import Exchange, as_curl, as_json, as_python

TEXTS = ("It's 86.", 'He said "no" \\ `x` $(y) é', "86\n\nis the most\n")


@pytest.fixture
def servers(client):
    asked = Servers(client)
    yield asked
    asked.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "a chart's.png"
    path.write_bytes(png())
    return path


def asked(reply=None, media=None, url="localhost:8001", model="reward"):
    texts = TEXTS
    return Exchange(Draft("Which is it?", texts, media), reply or REPLY, url, model)


REPLY = Reply((1.5, -0.25, 1.5), (30, 33, 31), 12.5, prompt_tokens=22)


class TestFields:
    @pytest.mark.parametrize("count", [0, 1, MOST + 1])
    def test_too_few_and_too_many_responses(self, count):
        with pytest.raises(InvalidRequest) as caught:
            draft(None, "Why?", ["So."] * count)
        assert str(caught.value) == f"responses: the playground takes 2 to 16, got {count}"

    @pytest.mark.parametrize("count", [2, MOST])
    def test_as_many_as_may_be(self, count):
        assert len(draft(None, "Why?", ["So."] * count).responses) == count

    def test_a_row_without_text(self):
        with pytest.raises(InvalidRequest, match=r"^response 2: is empty; write it, or remove"):
            draft(None, "Why?", ["So.", " \n"])

    def test_no_prompt(self):
        with pytest.raises(InvalidRequest, match=r"^prompt: is empty$"):
            draft(None, "  ", ["a", "b"])

    def test_texts_are_sent_as_they_are_written(self):
        kept = draft(None, " Why? \n", [" a ", "b\n"])
        assert (kept.prompt, kept.responses) == (" Why? \n", (" a ", "b\n"))

    @pytest.mark.parametrize(
        ("name", "kind"),
        [("a.png", "image"), ("a.MP4", "video"), ("a.webm", "video"), ("a", "image")],
    )
    def test_a_files_name_says_what_it_is(self, name, kind):
        part, text = Draft("Why?", ("a", "b"), Path("/tmp", name)).messages()[0]["content"]
        assert part == {"type": kind, kind: f"/tmp/{name}"}
        assert text == {"type": "text", "text": "Why?"}

    def test_hidden_rows_are_not_sent(self):
        assert Form.read(None, "Why?", 2, "a", "b", "of a row that is gone").responses == ("a", "b")

    def test_what_is_filled_in_is_read_again(self):
        before = draft("/tmp/a.png", "Why?", ["a", "b", "c"])
        media, prompt, count, *rows = Form.fill(before)
        assert Form.read(media, prompt, count, *(row["value"] for row in rows)) == before
        assert [row["visible"] for row in rows] == [True] * 3 + [False] * (MOST - 3)

    @pytest.mark.parametrize("name", ["a b.png", "a.mp4"])
    def test_a_preview_is_below_the_pages_own_address(self, name):
        source = re.search('src="(.*?)"', _preview(f"/t/{name}")["value"])[1]
        assert (
            urljoin("http://h/below/", source) == f"http://h/below/gradio_api/file=/t/{quote(name)}"
        )


class TestServers:
    def test_scores_are_the_clients_with_tokens_and_time(self, servers, client):
        messages = [{"role": "user", "content": "Why?"}]
        reply = servers.ask(messages, TEXTS, count_prompt=True)
        assert list(reply.scores) == client.score_responses(messages, TEXTS)
        assert reply.ranking == client.rank(messages, TEXTS)
        lengths = [len(text.encode()) for text in TEXTS]
        assert [count - reply.prompt_tokens for count in reply.tokens] == lengths
        assert reply.milliseconds > 0

    def test_the_prompt_is_counted_by_an_empty_response(self, servers, server):
        servers.ask([{"role": "user", "content": "Why?"}], ["a"], count_prompt=True)
        assert server.scored == {"a": 1, "": 1}
        servers.ask([{"role": "user", "content": "Why?"}], ["a"])
        assert server.scored == {"a": 2, "": 1}

    def test_scores_stand_where_the_prompt_is_not_counted(self, servers, server):
        server.fault = lambda call: Fault.INVALID_ARGUMENT if call.responses == [b""] else None
        reply = servers.ask([{"role": "user", "content": "Why?"}], ["a", "bc"], count_prompt=True)
        assert reply.scores == (1.0, 2.0) and reply.prompt_tokens is None
        assert reply.prompt_error == "call 1 was to fail"
        assert reply.prompt_error in summary(Draft("Why?", ("a", "bc")), reply)

    @pytest.mark.parametrize("fault", [Fault.NAN, Fault.WRONG_COUNT, Fault.INTERNAL])
    def test_a_failure_is_the_clients_sentence_and_no_score(self, servers, server, client, fault):
        server.fault = lambda call: fault
        messages = [{"role": "user", "content": "Why?"}]
        with pytest.raises(TriwardError) as ours:
            servers.ask(messages, ["a", "b"])
        with pytest.raises(TriwardError) as theirs:
            client.score_responses(messages, ["a", "b"])
        numbers = r"call \d+"
        assert re.sub(numbers, "", str(ours.value)) == re.sub(numbers, "", str(theirs.value))
        assert type(ours.value) is type(theirs.value)

    def test_a_dead_server(self):
        with RewardClient("127.0.0.1:9") as client:
            dead = Servers(client)
            with pytest.raises(ServerUnavailable, match=r"^nothing listens on 127.0.0.1:9; "):
                dead.ask([{"role": "user", "content": "Why?"}], ["a", "b"])
            dead.close()

    def test_an_authority_whose_file_is_gone(self, server):
        with RewardClient(server.url, tls=Tls("/nowhere.pem")) as client:
            encrypted = Servers(client)
            with pytest.raises(InvalidRequest, match=r"^/nowhere.pem: No such file or directory$"):
                encrypted.ask([{"role": "user", "content": "Why?"}], ["a", "b"])
            encrypted.close()

    def test_only_servers_of_the_command_line_are_asked(self, servers, server):
        with pytest.raises(InvalidRequest, match=r"^server: must be one of .*, got 'other:1'$"):
            servers.ask([{"role": "user", "content": "Why?"}], ["a"], url="other:1")

    def test_each_is_asked_alone_and_by_the_models_name(self, server):
        with FakeServer() as other, RewardClient([server.url, other.url], timeout=20) as client:
            several = Servers(client)
            for _ in range(3):
                several.ask([{"role": "user", "content": "Why?"}], ["a"], url=other.url, model="m")
            several.close()
            assert (server.calls, other.calls) == (0, 3)

    def test_clients_do_not_grow_in_number_with_the_models_named(self, servers, monkeypatch):
        closed, close = [], CountingClient.close
        monkeypatch.setattr(
            CountingClient, "close", lambda self: (closed.append(self.model), close(self))
        )
        for model in ("", "a", "b", "a", ""):
            servers.ask([{"role": "user", "content": "Why?"}], ["a"], model=model)
        assert closed == ["a", "b", "a"]
        servers.close()
        assert closed[3:] == [servers.model]

    def test_headers_are_sent(self, server):
        seen = []
        server.fault = lambda call: seen.append(call.headers.get("authorization"))
        with RewardClient(server.url, headers={"authorization": "Bearer key"}) as client:
            keyed = Servers(client)
            keyed.ask([{"role": "user", "content": "Why?"}], ["a"])
            keyed.close()
        assert seen == ["Bearer key"]


class TestResults:
    @pytest.mark.parametrize("margin", [0.0, 0.5, 3.0, 50.0, 1000.0])
    def test_bradley_terry(self, margin):
        chance = preferred(margin)
        assert 0.5 <= chance <= 1
        assert isclose(chance + preferred(-margin), 1)
        if margin < 30:
            assert isclose(chance / (1 - chance), 2.718281828459045**margin)

    def test_odds_are_said(self):
        assert odds(1.0, 3) == "+1.0000 over 3: preferred with 73.1 %, odds 2.72 to 1"
        assert odds(700.0, 3).endswith("odds 1.0e+304 to 1")
        assert odds(1000.0, 3).endswith("odds > 1.0e+304 to 1")

    def test_equal_scores_keep_their_order(self):
        html = ranking(asked().draft, REPLY)
        assert re.findall("<b>(.*?)</b>", html) == ["1", "3", "2"]
        assert "+0.0000 over 3: preferred with 50.0 %, odds 1.00 to 1" in html

    def test_the_order_given_has_tokens(self):
        html = in_order(asked().draft, REPLY)
        assert re.findall("<b>(.*?)</b>", html) == ["1", "2", "3"]
        assert re.findall("<small>(.*?)</small>", html)[1] == "33 tokens, 11 of its text"

    def test_bars_begin_at_zero_on_one_scale(self):
        html = bars("t", [Bar("1", "a", 3.0), Bar("2", "b", -1.0), Bar("3", "c", 0.0)])
        drawn = re.findall('class="(bar.*?)" x="(.*?)" width="(.*?)"', html)
        assert drawn[0] == ("bar", "25.000", "75.000")
        assert drawn[1] == ("bar below", "0.000", "25.000")
        assert drawn[2] == ("bar", "25.000", "0.000")
        assert re.findall('class="zero" x="(.*?)"', html) == ["25.000"] * 3

    @pytest.mark.parametrize(("score", "said"), [(-1.0, True), (0.0, False), (1.0, False)])
    def test_where_the_longest_bar_is_the_worst_it_is_said(self, score, said):
        html = bars("t", [Bar("1", "a", score), Bar("2", "b", -3.0)])
        assert ("All scores are negative: the longest bar is the lowest." in html) is said

    def test_all_scores_zero(self):
        html = bars("t", [Bar("1", "a", 0.0), Bar("2", "b", 0.0)])
        assert re.findall('class="bar" x="(.*?)" width="(.*?)"', html) == [("0.000", "0.000")] * 2

    def test_texts_are_no_html(self):
        evil = "<img src=x onerror=alert(1)>"
        assert "<img" not in bars(evil, [Bar(evil, evil, 1.0, evil)]) + refused(evil)

    def test_the_prompts_tokens_are_said(self):
        draft_ = Draft("Why?", TEXTS, Path("a.png"))
        assert summary(draft_, REPLY) == (
            "3 responses in 12.5 ms. The prompt with its image, computed once for all, and the end "
            "of a turn, which each response has, are 22 tokens; one by one they would be 94 tokens."
        )

    def test_the_last_runs_are_kept_with_their_numbers(self):
        runs = []
        for number in range(1, RUNS + 4):
            runs = with_run(runs, asked(url=str(number)))
        assert [(number, run.url) for number, run in runs] == [
            (number, str(number)) for number in range(4, RUNS + 4)
        ]


class TestSnippets:
    def test_the_json_is_a_line_to_score(self, image, server, tmp_path, capsys, monkeypatch):
        value = json.loads(as_json(asked(media=image)))
        assert value["scores"] == list(REPLY.scores)
        assert value["ranking"] == [0, 2, 1]
        assert [margin["margin"] for margin in value["margins"]] == [0.0, 1.75]
        monkeypatch.chdir(tmp_path)
        line = {key: value[key] for key in ("messages", "responses")}
        Path("in.jsonl").write_text(json.dumps(line), encoding="utf-8")
        options = ["--url", server.url, "--input", "in.jsonl", "--output", "out.jsonl"]
        assert triward.cli.main(["score", *options]) == 0
        scored = json.loads(Path("out.jsonl").read_text(encoding="utf-8"))
        assert scored["scores"] == [float(len(text.encode())) for text in TEXTS]

    def test_the_program_runs(self, image, server, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        names = {}
        program = as_python(asked(media=image, url=server.url, model="m"))
        with redirect_stdout(io.StringIO()):
            exec(program, names)
        assert names["scores"] == [float(len(text.encode())) for text in TEXTS]

    def test_keys_are_not_shown(self):
        program = as_python(asked(), Tls("ca.pem"), ["authorization"])
        assert "headers={'authorization': '...'}" in program
        assert "tls=Tls(ca='ca.pem'" in program
        compile(program, "program", "exec")

    def test_the_program_keeps_the_order_of_equal_scores(self, server, capsys):
        texts = ("bb", "cc", "aa", "ddd")
        exec(as_python(Exchange(Draft("Why?", texts), REPLY, server.url, "m")), {})
        assert capsys.readouterr().out.split()[1::2] == ["ddd", "bb", "cc", "aa"]

    def test_the_curl_names_headers_and_encryption(self, image):
        tls = Tls("/my ca.pem", "me.pem", "me.key")
        options = "-H 'x-key: ...' --cacert '/my ca.pem' --cert me.pem --key me.key"
        for media in (None, image):
            command = as_curl(asked(media=media), "https://h:8000", tls, ["x-key"])
            assert f"{options} https://h:8000/v2/models/reward/infer" in command
        with RewardClient("h:8001", tls=tls, headers={"x-key": "secret"}) as client:
            assert Servers(client).http_of("h:8001") == "https://h:8000"
            assert Servers(client, ["http://h:1"]).http_of("h:8001") == "http://h:1"
            texts = "".join(map(str, recalled(Servers(client), asked(url="h:8001"))))
        assert options in texts and "secret" not in texts

    @pytest.mark.parametrize("shell", ["sh", "bash"])
    @pytest.mark.parametrize("with_media", [False, True])
    def test_the_curl_sends_the_request(self, shell, with_media, image, tmp_path):
        """With a `curl` that keeps what it is given; tests/served has the real one."""
        fake = tmp_path / "curl"
        fake.write_text('#!/bin/sh\ncat > body\nprintf "%s\\n" "$@" > arguments\n')
        fake.chmod(0o755)
        command = as_curl(asked(media=image if with_media else None), "http://h:8000")
        path = f"{tmp_path}:{os.environ['PATH']}"
        subprocess.run([shell, "-c", command], cwd=tmp_path, env={"PATH": path}, check=True)
        arguments = (tmp_path / "arguments").read_text().splitlines()
        assert arguments[-1] == "http://h:8000/v2/models/reward/infer"
        body = (tmp_path / "body").read_bytes()
        size = len(body)
        if with_media:
            size = int(re.search(r"Content-Length: (\d+)", "\n".join(arguments))[1])
            data = png()
            assert body[size:] == len(data).to_bytes(4, "little") + data
        inputs = {tensor["name"]: tensor for tensor in json.loads(body[:size])["inputs"]}
        assert inputs["responses"]["data"] == list(TEXTS)
        assert json.loads(inputs["messages"]["data"][0])[0]["role"] == "user"
        assert inputs["media"]["shape"] == [1, int(with_media)]


class TestCommand:
    def run(self, *options):
        return triward.cli.main(["playground", *options])

    @pytest.fixture(autouse=True)
    def known(self, monkeypatch):
        """Also where the tools were installed before they had this command."""
        add = triward.cli._add_tools

        def adding(commands, server):
            add(commands, server)
            commands._name_parser_map.pop("playground", None)
            cli_playground.add_playground(commands, server)

        monkeypatch.setattr(triward.cli, "_add_tools", adding)

    def test_without_gradio_it_says_how_to_install_it(self, monkeypatch, capsys):
        monkeypatch.setattr(cli_playground, "find_spec", lambda name: None)
        with pytest.raises(SystemExit) as caught:
            self.run()
        assert caught.value.code == 2
        err = capsys.readouterr().err
        assert "needs gradio; in a checkout of Triward: pip install './tools[playground]'" in err

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--http-url", "http://a", "--http-url", "http://b"], "--http-url: 2 for 1 --url"),
            (["--images", "/nowhere"], "--images: /nowhere is no folder"),
            (["--port", "65536"], "must be at most 65535, got 65536"),
        ],
    )
    def test_options_that_cannot_be_used(self, options, said, capsys):
        with pytest.raises(SystemExit) as caught:
            self.run(*options)
        assert caught.value.code == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_files(number, server, tmp_path):
    """The page's files are below a folder of its own, are all that it gives away, and go."""
    (tmp_path / "secret.png").write_bytes(png())
    here = tmp_path / "temporary"
    here.mkdir()
    elsewhere = socket.create_server(("127.0.0.1", 0))  # where requests to other hosts would go
    elsewhere.setblocking(False)
    proxy = f"http://127.0.0.1:{elsewhere.getsockname()[1]}"
    environment = {"TMPDIR": str(here), "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy}
    command = Command(BIN / "triward", "playground", "--url", server.url, **environment)
    try:
        address = command.wait_for(r"^playground at (http://127\.0\.0\.1:\d+)$")[1]
        page = urllib.request.urlopen(address, timeout=30).read().decode()
        assert "Triward playground" in page
        (folder,) = here.iterdir()
        assert folder.name.startswith("triward-playground-")
        for path in (tmp_path / "secret.png", Path(cli_playground.__file__), "/etc/passwd"):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{address}/gradio_api/file={path}", timeout=30)
            assert caught.value.code == 403
        for path in ("/docs", "/openapi.json", "/redoc"):
            assert status(address + path) == 404
        other_name = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
        assert status(other_name) == 400
        family = command.family()
        command.process.send_signal(number)
        assert command.wait() == 0, command.output
        assert command.output.count("\n") == 1, command.output
        assert list(here.iterdir()) == []
        assert all(has_ended(process) for process in family)
        with pytest.raises(BlockingIOError):
            elsewhere.accept()
    finally:
        elsewhere.close()
        command.kill()


def status(url):
    try:
        return urllib.request.urlopen(url, timeout=30).status
    except urllib.error.HTTPError as error:
        return error.code


def test_the_command_loads_the_page_only_when_it_runs():
    code = "import sys, triward_tools.cli_playground; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert {"gradio", "uvicorn", "numpy"} & set(loaded) == set()
