"""Claims about SERVE: the API, the door, the bounds; and what others have made speaks with it."""
import asyncio
import concurrent.futures
import contextlib
import http.client
import importlib.util
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
import unittest
from unittest import mock

import macrogpt as m
from support import PATIENCE_SECONDS, TINY, Folder

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEADERS = {"Content-Type": "application/json"}


def said(*texts, **more):
    """Return a request: what owner and program said in turn."""
    return {"model": "macrogpt", **more, "messages": [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]}


def posted(port, body, path=CHAT):
    """Return the bytes of a request that posts a body."""
    return (b"POST %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (path.encode(), port, len(body), body))


class Serving(Folder):
    """A test case with servers in processes of their own, and ways to ask them."""

    def serve(self, *args, train=False):
        """Start a server at any free port, and return its process and the port."""
        process = self.start_here("serve", "--port", "0", *args, *["--no-train"] * (not train))
        line = process.stderr.readline().decode()
        found = re.fullmatch(r"serving at http://127\.0\.0\.1:(\d+)/\n", line)
        self.assertTrue(found, line + ("" if found else process.stderr.read().decode()))
        return process, int(found[1])

    def ask(self, port, path, body=None, headers=(), method=None):
        """Return the status and the JSON, or the events, of one answer."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, 20)) as talk:
            raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            talk.request(method or ("GET" if body is None else "POST"), path, raw,
                         {**(HEADERS if body is not None else {}), **dict(headers)})
            answer = talk.getresponse()
            words = answer.read().decode()
        if answer.headers["Content-Type"] == "text/event-stream":
            return answer.status, [event[len("data: "):] for event in words.split("\n\n")[:-1]]
        return answer.status, json.loads(words) if path != "/" else words

    def reply(self, port, *texts, headers=(), **more):
        """Return the reply to the last of texts, the others before it."""
        status, answer = self.ask(port, CHAT, said(*texts, **more), headers)
        self.assertEqual(status, 200, answer)
        return answer["choices"][0]["message"]["content"]

    def raw(self, port, sent, seconds=10.0):
        """Send bytes and return all that comes back until the other end hangs up."""
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), seconds)) as talk:
            with contextlib.suppress(OSError):
                talk.sendall(sent)
            got = b""
            with contextlib.suppress(ConnectionError):
                for part in iter(lambda: talk.recv(65_536), b""):
                    got += part
        return got

    def end(self, process, number=signal.SIGINT):
        """End a server by a signal; return its code and what else it said."""
        process.send_signal(number)
        _, told = process.communicate(timeout=PATIENCE_SECONDS)
        return process.returncode, told.decode()


class Api(Serving):
    """One server for all that can be asked of it."""

    @classmethod
    def setUpClass(cls):
        cls.place = Serving()
        cls.place.setUp()
        cls.process, cls.port = cls.place.serve()

    @classmethod
    def tearDownClass(cls):
        code, told = cls.place.end(cls.process)
        cls.place.doCleanups()
        assert (code, told) == (130, ""), (code, told)

    def setUp(self):
        self.folder, self.db = self.place.folder, self.place.db

    def refused(self, status, body, path=CHAT, param=None, **headers):
        """Assert that a request is refused in the API's form, and return its message."""
        found, answer = self.ask(self.port, path, body, headers)
        self.assertEqual((found, set(answer)), (status, {"error"}), answer)
        self.assertEqual(set(answer["error"]), {"message", "type", "param", "code"})
        if param is not None:
            self.assertEqual(answer["error"]["param"], param)
        return answer["error"]["message"]

    def test_a_reply_is_what_a_chat_says_with_its_reason_and_its_usage(self):
        status, answer = self.ask(self.port, CHAT, said("Who are you?"))
        self.assertEqual((status, answer["object"], answer["model"]),
                         (200, "chat.completion", "macrogpt"))
        self.assertEqual(answer["choices"], [
            {"index": 0, "finish_reason": "stop", "logprobs": None, "message": {
                "role": "assistant", "content": "I am a small lantern in a big house."}}])
        self.assertEqual(answer["macrogpt"]["source"], "exchange")
        self.assertIn("H: Who are you?", answer["macrogpt"]["entries"][0])
        self.assertEqual(answer["usage"], {
            "prompt_tokens": 12, "completion_tokens": 36, "total_tokens": 48})

    def test_a_stream_has_the_role_the_words_the_end_the_usage_and_done_in_this_order(self):
        asked = said("Who are you?", stream=True, stream_options={"include_usage": True})
        status, (*events, done) = self.ask(self.port, CHAT, asked)
        first, *words, last, usage = map(json.loads, events)
        self.assertEqual((status, done), (200, "[DONE]"))
        self.assertEqual(first["choices"][0]["delta"], {"role": "assistant", "content": ""})
        self.assertGreater(len(words), 5)
        self.assertEqual("".join(part["choices"][0]["delta"]["content"] for part in words),
                         "I am a small lantern in a big house.")
        self.assertEqual({part["choices"][0]["finish_reason"] for part in (first, *words)}, {None})
        self.assertEqual(last["choices"][0]["finish_reason"], "stop")
        self.assertEqual((last["macrogpt"]["source"], usage["choices"]), ("exchange", []))
        self.assertEqual(usage["usage"]["completion_tokens"], 36)
        self.assertEqual(len({part["id"] for part in (first, *words, last, usage)}), 1)
        self.assertEqual({part["object"] for part in (first, *words, last)},
                         {"chat.completion.chunk"})
        _, events = self.ask(self.port, CHAT, said("Who are you?", stream=True))
        self.assertNotIn('"usage"', "".join(events))

    def test_what_is_told_in_the_request_is_answered_from_it(self):
        self.assertEqual(self.reply(self.port, "My dog is called Rex.", "Good.",
                                    "What is my dog called?"), "Your dog is called Rex.")
        system = {"role": "system", "content": "My cat is called Mia."}
        asked = {"messages": [system, {"role": "user", "content": [
            {"type": "text", "text": "What is"}, {"type": "text", "text": "my cat called?"}]}]}
        status, answer = self.ask(self.port, CHAT, asked)
        self.assertEqual(answer["choices"][0]["message"]["content"], "Your cat is called Mia.")
        self.assertEqual(answer["macrogpt"]["entries"], ["My cat is called Mia."])

    def test_nothing_of_a_request_is_stored_and_the_next_one_knows_nothing_of_it(self):
        tables = ("sessions", "messages", "entries", "settings")
        before = [self.stored(f"SELECT * FROM {table}") for table in tables]
        headers = {"X-Session": "work"}
        self.assertEqual(self.reply(self.port, "My boat is called Ada.", headers=headers),
                         m.NOT_KEPT)
        self.assertNotIn("Ada", self.reply(self.port, "What is my boat called?", headers=headers))
        self.assertNotIn("Ada", self.reply(self.port, "What is my boat called?", user="me"))
        self.assertIn("forget nothing", self.reply(self.port, "Forget my boat."))
        self.assertEqual([self.stored(f"SELECT * FROM {table}") for table in tables], before)
        self.assertTrue(before[0] or before[2], "there is something to look at")

    def test_no_reply_promises_to_keep_what_is_not_kept(self):
        promises = (m.UNKNOWN_REPLY, *m.KEPT_REPLIES, "Ich merke es mir.", "Lo guardo.")
        for text in ("My boat is called Ada.", "Mein Hund heißt Rex.", "Mi perro se llama Rex.",
                     "What is on the packing list?", "What are my plans for tomorrow?",
                     "What did I tell you today?", "Where is my passport?",
                     "We walked to the lake and back, and it rained all the way."):
            reply = self.reply(self.port, text)
            self.assertFalse([words for words in promises if words in reply], (text, reply))

    def test_a_text_stops_at_a_stop_text_at_the_last_token_and_is_the_same_for_one_seed(self):
        texts = []
        for _ in range(2):
            status, answer = self.ask(self.port, TEXT, {"prompt": "The ", "seed": 7,
                                                        "max_tokens": 30, "temperature": 1.5})
            self.assertEqual((status, answer["object"], answer["choices"][0]["finish_reason"],
                              answer["usage"]["completion_tokens"] <= 30),
                             (200, "text_completion", "length", True))
            texts.append(answer["choices"][0]["text"])
        self.assertEqual(*texts)
        status, answer = self.ask(self.port, CHAT, said("Who are you?", stop=["house", "lan"]))
        self.assertEqual(answer["choices"][0]["message"]["content"], "I am a small ")
        for name in ("max_tokens", "max_completion_tokens"):
            status, answer = self.ask(self.port, CHAT, said("Who are you?", **{name: 4}))
            choice = answer["choices"][0]
            self.assertEqual((choice["message"]["content"], choice["finish_reason"]),
                             ("I am", "length"))

    def test_a_request_that_asks_for_what_is_not_there_is_told_so_by_name(self):
        for field, *values in (
                ("temperature", 3, "hot", True), ("top_p", -1), ("max_tokens", 0, 1.5),
                ("seed", "x"), ("stop", ["a"] * 5, 3, [""]), ("stream", 1), ("stream_options", 1),
                ("n", 2), ("logprobs", True), ("user", 3), ("tools", [{}]),
                ("response_format", {"type": "json_object"}),
                ("messages", {}, [], said("Hi.", "Hello.")["messages"])):
            for value in values:
                self.refused(400, {**said("Hi."), field: value}, param=field)
        self.refused(404, said("Hi.", model="gpt-9"), param="model")
        picture = [{"type": "image_url", "image_url": {"url": "x"}}]
        for role, content in (("wizard", "x"), ("user", picture)):
            self.refused(400, {"messages": [{"role": role, "content": content}]},
                         param="messages[0]")
        for prompt in (None, 3, ["a", "b"], [1, 2]):
            self.refused(400, {"prompt": prompt}, TEXT, "prompt")
        for body in (b"", b"{", b"\xff", b"3", b"[" * 100_000, b'"\\ud800"'):
            self.refused(400, body)
        self.assertIn("not there", self.refused(404, {"input": "x"}, "/v1/embeddings"))

    def test_a_request_that_is_not_the_owners_is_refused_before_it_is_read(self):
        hosts = (f"evil.example:{self.port}", "127.0.0.1", f"127.0.0.1.evil.example:{self.port}",
                 f"localhost:{self.port + 1}", "")
        for host in hosts:
            self.refused(421, said("Hi."), Host=host)
        for host in (f"localhost:{self.port}", f"LOCALHOST:{self.port}", f"[::1]:{self.port}"):
            self.assertEqual(self.ask(self.port, "/v1/models", headers={"Host": host})[0], 200)
        for origin in ("http://evil.example", "null", "https://127.0.0.1:%d" % self.port,
                       "http://127.0.0.1"):
            self.refused(403, said("Hi."), Origin=origin)
        own = {"Origin": f"http://127.0.0.1:{self.port}"}
        self.assertEqual(self.ask(self.port, CHAT, said("Who are you?"), own)[0], 200)
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            self.refused(415, said("Hi."), **{"Content-Type": kind})

    def test_one_model_is_listed_and_paths_and_methods_that_are_not_there_are_refused(self):
        status, models = self.ask(self.port, "/v1/models?limit=5")
        self.assertEqual((status, models["object"], [each["id"] for each in models["data"]]),
                         (200, "list", ["macrogpt"]))
        for path in ("/v1", "/v1/models/", "/etc/passwd", "/../macrogpt.py", "/%2e%2e/"):
            self.assertEqual(self.ask(self.port, path)[0], 404)
        for method, path in (("PUT", CHAT), ("GET", CHAT), ("OPTIONS", CHAT), ("DELETE", "/"),
                             ("POST", "/v1/models")):
            self.assertEqual(self.ask(self.port, path, {}, method=method)[0], 405)

    def test_bytes_that_can_be_read_in_two_ways_are_not_read(self):
        host = b"Host: 127.0.0.1:%d\r\n" % self.port
        post = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Type: application/json\r\n" + host
        for status, sent in (
                (400, b"\x16\x03\x01\x02\x00\x01\r\n\r\n"), (400, b"GET / HTTP/2.0\r\n\r\n"),
                (400, b"GET  / HTTP/1.1\r\n" + host + b"\r\n"),
                (400, b"GET http://127.0.0.1/ HTTP/1.1\r\n" + host + b"\r\n"),
                (400, b"GET / HTTP/1.1\r\n" + host * 2 + b"\r\n"),
                (400, b"GET / HTTP/1.1\r\n" + host + b" folded: yes\r\n\r\n"),
                (400, b"GET / HTTP/1.1\r\n" + host + b"a: b\nc: d\r\n\r\n"),
                (411, post + b"Content-Length: -1\r\n\r\n"),
                (400, post + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} "),
                (411, post + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}"),
                (400, post + b"\r\n"), (413, post + b"Content-Length: 262145\r\n\r\n"),
                (413, post + b"Content-Length: 99999999999999\r\n\r\n"),
                (431, b"GET / HTTP/1.1\r\nX: " + b"x" * 20_000 + b"\r\n\r\n"),
                (421, b"GET / HTTP/1.1\r\n\r\n"), (421, b"GET / HTTP/1.0\r\n\r\n")):
            got = self.raw(self.port, sent)
            self.assertTrue(got.startswith(b"HTTP/1.1 %d " % status), (sent[:80], got[:80]))
            self.assertIn(b'{"error": {', got)

    def test_a_connection_serves_one_request_and_what_follows_it_is_not_looked_at(self):
        one = b"GET /status HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % self.port
        for sent in (one, one * 3, one + b"x" * 200_000, one.replace(b"1.1\r", b"1.0\r")):
            got = self.raw(self.port, sent)
            self.assertEqual(re.findall(rb"HTTP/1.1 (\d+)", got), [b"200"])
            self.assertIn(b"Connection: close", got)

    def test_many_requests_at_once_are_all_answered_each_with_its_own(self):
        def ask(number):
            return self.reply(self.port, f"My number is {number}.", "Yes.", "What is my number?")
        with concurrent.futures.ThreadPoolExecutor(60) as pool:
            self.assertEqual(list(pool.map(ask, range(100, 160))),
                             [f"Your number is {number}." for number in range(100, 160)])

    def test_who_hangs_up_is_no_longer_spoken_for(self):
        sent = posted(self.port, b'{"prompt": "The ", "max_tokens": 4000}', TEXT)
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", self.port), 10) as talk:
                talk.sendall(sent)
                time.sleep(0.02)
        begun = time.monotonic()
        self.reply(self.port, "Who are you?")
        self.assertLess(time.monotonic() - begun, 1.5)

    def test_the_page_needs_nothing_from_elsewhere_and_runs_only_what_stands_in_it(self):
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, 20)) as talk:
            talk.request("GET", "/")
            answer = talk.getresponse()
            page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
        self.assertRegex(policy, r"\Adefault-src 'none'; script-src 'sha256-\S+'; style-src 'sha")
        self.assertNotIn("unsafe", policy)
        self.assertNotRegex(page, r"https?:|innerHTML|src=|@import|url\(| on\w+=")
        status, now = self.ask(self.port, "/status")
        self.assertEqual((now["phase"], now["age"], now["learns"]), ("asleep", "newborn", False))


class Door(Serving):
    """Who may come in, and how it ends."""

    def test_only_who_has_the_token_is_answered_and_the_page_alone_is_open(self):
        process, port = self.serve("--token", "s3cret")
        for given in (None, "s3cret", "Bearer s3cre", "Bearer s3crett", "Basic s3cret",
                      "Bearer caf\u00e9"):
            headers = {} if given is None else {"Authorization": given.encode("latin-1")}
            for path, body in (("/v1/models", None), ("/status", None), (CHAT, said("Hi."))):
                status, answer = self.ask(port, path, body, headers)
                self.assertEqual((status, answer["error"]["code"]), (401, "invalid_api_key"))
        self.assertIn("<title>", self.ask(port, "/")[1])
        self.assertEqual(self.ask(port, "/v1/models", headers={
            "Authorization": "Bearer s3cret"})[0], 200)
        self.assertEqual(self.end(process, signal.SIGTERM), (128 + signal.SIGTERM, ""))

    def test_with_learn_a_session_is_a_chat_of_its_own_and_without_one_words_are_kept_all_the_same(self):
        process, port = self.serve("--learn")
        self.reply(port, "My boat is called Ada.", headers={"X-Session": "work"})
        self.reply(port, "My locker number is 4411.", user="home")
        self.reply(port, "My horse is called Lotte.")
        self.assertEqual(self.reply(port, "What is my boat called?"), "Your boat is called Ada.")
        self.assertIn("Lotte", self.reply(port, "What is my horse called?", user="home"))
        self.assertEqual(self.reply(port, "Forget my locker number.", user="home"),
                         'I have forgotten it: "My locker number is 4411."')
        self.assertEqual(self.end(process), (130, ""))
        memory = self.kept(writable=False)
        said_in = {each["name"]: [message.text for message in memory.messages_of(each["name"])
                                  if message.role == "owner"] for each in memory.sessions()}
        self.assertEqual(said_in["work"], ["My boat is called Ada."])
        self.assertIn("What is my horse called?", said_in["home"])
        self.assertEqual(set(said_in), {"work", "home", "requests"})
        self.assertIsNone(memory.setting("session"))  # the next chat goes on where it was

    def test_what_requests_of_no_session_say_leans_on_nothing_and_is_read_by_no_other(self):
        process, port = self.serve("--learn")
        for words in ("My niece is Wanda.", "She sails."):
            self.reply(port, words)
        self.assertEqual(self.end(process), (130, ""))
        process, port = self.serve("--learn")  # nor after a restart
        self.reply(port, "She has a dog.")
        self.assertEqual(self.end(process), (130, ""))
        told = self.kept(writable=False).told()
        self.assertEqual([entry.about for entry in told], ["", "", ""])
        wanted = m.wanted_of({**said("Hi."), "user": m.UNNAMED}, True)
        self.assertEqual(wanted.session, "", "whoever asks for its name")

    def test_it_learns_beside_and_what_was_learned_is_committed_when_it_ends(self):
        process, port = self.serve("--set", "warmup_steps=1000000", "--set", "commit_seconds=0.1",
                                   train=True)
        self.until(lambda: self.ask(port, "/status")[1]["step"])
        self.assertEqual(self.end(process)[0], 130)
        self.assertGreater(self.setting("growth")["step"], 0)

    def unserved(self, code, *args, signs=()):
        """Assert that it does not start, and says why in one line."""
        watch = threading.Timer(PATIENCE_SECONDS, signal.raise_signal, [signal.SIGINT])
        watch.start()  # what does start would serve for ever
        self.mistake(code, "serve", *args, "--no-train", *TINY, signs=signs)
        watch.cancel()

    def test_what_cannot_be_served_is_one_line_and_a_code(self):
        for host in ("0.0.0.0", "::", "", "192.168.1.7", "example.org", "127.evil.example"):
            self.unserved(2, "--host", host, signs=["--token"])
        for port in ("-1", "65536", "http", ""):
            self.unserved(2, f"--port={port}", signs=["port"])
        for token in ("", "two words", "caf\u00e9"):
            self.unserved(2, "--token", token, signs=["--token"])
        self.unserved(1, "--host", "203.0.113.9", "--token", "t", signs=["203.0.113.9"])
        self.unserved(1, "--host", "\u00e9" * 70, "--token", "t")
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
            self.unserved(1, "--port", str(taken.getsockname()[1]), signs=["choose another --port"])


class Bounds(Serving):
    """With bounds so small that they can be waited for; the server is within this process."""

    def serve_within(self, **limits):
        """Serve with such limits until the test ends; return the port."""
        memory = m.Memory(":memory:")
        organism = m.Organism(m.Config().replace(TINY[1::2]), memory, m.reference_engine())
        told, started = [], threading.Event()
        server = m.Server(organism, None, False, lambda line: (told.append(line), started.set()))
        for limit in limits.items():
            self.patch(m, *limit)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve("127.0.0.1", 0)))
        thread.start()
        self.addCleanup(memory.close)
        self.addCleanup(thread.join)
        self.addCleanup(setattr, server, "ended", 0)
        started.wait(PATIENCE_SECONDS)
        return int(told[0].rsplit(":", 1)[1].strip("/"))

    def test_who_is_slow_is_hung_up_on(self):
        port = self.serve_within(CLIENT_SECONDS=0.1)
        whole = b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n\r\n" % port
        for sent, status in ((b"", 408), (b"GET / HT", 408), (posted(port, b"{")[:-1], 408),
                             (whole, 200)):
            begun = time.monotonic()
            self.assertEqual(self.raw(port, sent)[:12], b"HTTP/1.1 %d" % status)
            self.assertLess(time.monotonic() - begun, 2.0)

    def test_beyond_so_many_connections_one_is_told_to_come_again(self):
        port = self.serve_within(MOST_CONNECTIONS=3)
        with contextlib.ExitStack() as idle:
            for _ in range(3):
                idle.enter_context(socket.create_connection(("127.0.0.1", port), 5))
            got = self.raw(port, b"GET / HTTP/1.1\r\n\r\n")
            self.assertTrue(got.startswith(b"HTTP/1.1 503"), got)
            self.assertIn(b"Retry-After: 1", got)
        time.sleep(0.1)
        self.assertEqual(self.ask(port, "/v1/models")[0], 200)

    def test_answers_are_made_one_at_a_time(self):
        port, speaking, most = self.serve_within(), [], []

        def make(answer):
            speaking.append(answer)
            most.append(len(speaking))
            time.sleep(0.01)
            speaking.remove(answer)
        with mock.patch.object(m.Answer, "make", make):
            for _ in range(3):
                with concurrent.futures.ThreadPoolExecutor(5) as pool:
                    asked = [pool.submit(self.ask, port, CHAT, said("Hi.")) for _ in range(5)]
                self.assertEqual({each.result()[0] for each in asked}, {200})
        self.assertEqual(most, [1] * 15)

    def test_what_goes_wrong_within_is_told_in_the_form_of_the_api(self):
        port = self.serve_within()
        for error, status in ((m.StoreError("it is full"), 503), (KeyError("x"), 500),
                              (RecursionError(), 500), (MemoryError(), 500)):
            with mock.patch.object(m.Answer, "make", side_effect=error):
                found, answer = self.ask(port, CHAT, said("Hi.", stream=True))
            self.assertEqual((found, answer["error"]["type"]), (status, "server_error"))
        self.assertEqual(self.ask(port, CHAT, said("Hi."))[0], 200)

    def test_hostile_bytes_of_every_kind_leave_it_well(self):
        port, rng = self.serve_within(CLIENT_SECONDS=0.1), random.Random(5)
        for _ in range(60):
            broken = bytearray(posted(port, json.dumps(said("Hi.")).encode()))
            for _ in range(rng.randint(1, 4)):
                at, new = rng.randrange(len(broken)), rng.choices(range(256), k=rng.randint(0, 3))
                broken[at:at + rng.randint(0, 3)] = bytes(new)
            self.assertRegex(self.raw(port, bytes(broken)), rb"\A(HTTP/1\.1 (200|4\d\d) |\Z)")
        self.assertEqual(self.ask(port, CHAT, said("Hi."))[0], 200)


class Browser:
    """A headless Chromium, spoken to through a pair of pipes: JSON, with a zero byte behind it."""

    def __init__(self, folder):
        (ours, its), (out, from_it) = os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            [shutil.which("chromium"), "--headless=new", "--no-sandbox", "--disable-gpu",
             "--disable-background-networking", "--no-first-run", f"--user-data-dir={folder}",
             "--remote-debugging-pipe"],
            preexec_fn=lambda: (os.dup2(ours, 3), os.dup2(from_it, 4)), pass_fds=(3, 4),
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(ours)
        os.close(from_it)
        self.to, self.back, self.number, self.session = os.fdopen(its, "wb"), out, 0, {}
        self.rest = b""
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        found = self.do("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": found["sessionId"]}

    def do(self, method, **params):
        """Have something done, and return its result."""
        self.number += 1
        self.to.write(json.dumps({"id": self.number, "method": method, "params": params,
                                  **self.session}).encode() + b"\0")
        self.to.flush()
        told = {}
        while told.get("id") != self.number:
            while b"\0" not in self.rest:
                ready = select.select([self.back], [], [], PATIENCE_SECONDS)[0]
                part = os.read(self.back, 1 << 20) if ready else b""
                if not part:
                    raise TimeoutError(method)
                self.rest += part
            raw, _, self.rest = self.rest.partition(b"\0")
            told = json.loads(raw)
        return told["result"]

    def see(self, script):
        """Return the value of a script in the page."""
        return self.do("Runtime.evaluate", expression=script)["result"].get("value")

    def type(self, text):
        """Type into what has the focus, and press Enter."""
        self.do("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key="Enter", text="\r",
                    windowsVirtualKeyCode=13)

    def end(self):
        """End it, in such a way that nothing of it still writes into its folder."""
        self.session = {}
        try:
            self.do("Browser.close")
            self.process.wait(PATIENCE_SECONDS)
        finally:
            with self.process:
                self.process.kill()
        self.to.close()
        os.close(self.back)


class FrontEnds(Serving):
    """What others have made speaks with it: skipped where it is not installed."""

    @unittest.skipUnless(importlib.util.find_spec("openai"), "the package openai is not installed")
    def test_the_openai_package_holds_a_streamed_conversation(self):
        import openai
        process, port = self.serve("--token", "t0ken")
        url = f"http://127.0.0.1:{port}/v1"
        with openai.OpenAI(base_url=url, api_key="t0ken", max_retries=0) as client:
            self.assertEqual([model.id for model in client.models.list()], ["macrogpt"])
            talk = []
            for words, expected in (("My dog is called Rex.", m.NOT_KEPT),
                                    ("What is my dog called?", "Your dog is called Rex.")):
                talk.append({"role": "user", "content": words})
                parts = list(client.chat.completions.create(
                    model="macrogpt", messages=talk, stream=True,
                    stream_options={"include_usage": True}))
                reply = "".join(part.choices[0].delta.content for part in parts if part.choices)
                self.assertEqual(reply, expected)
                self.assertGreater(parts[-1].usage.total_tokens, 10)
                talk.append({"role": "assistant", "content": reply})
            with self.assertRaises(openai.NotFoundError):
                client.embeddings.create(model="macrogpt", input="x")
            with self.assertRaises(openai.BadRequestError) as told:
                client.chat.completions.create(model="macrogpt", messages=talk[:1], n=2)
            self.assertEqual(told.exception.param, "n")
        with openai.OpenAI(base_url=url, api_key="other", max_retries=0) as client:
            self.assertRaises(openai.AuthenticationError, client.models.list)
        self.assertEqual(self.end(process), (130, ""))

    @unittest.skipUnless(importlib.util.find_spec("llm"), "the package llm is not installed")
    def test_the_llm_package_holds_a_streamed_conversation(self):
        from llm.default_plugins.openai_models import Chat
        process, port = self.serve()
        chat = Chat("here", key="none", model_name="macrogpt",
                    api_base=f"http://127.0.0.1:{port}/v1").conversation()
        self.assertEqual("".join(chat.prompt("My dog is called Rex.", key="x")), m.NOT_KEPT)
        pieces = list(chat.prompt("What is my dog called?", key="x"))
        self.assertEqual("".join(pieces), "Your dog is called Rex.")
        self.assertGreater(len(pieces), 3)
        self.assertEqual(self.end(process), (130, ""))

    @unittest.skipUnless(shutil.which("chromium"), "there is no chromium")
    def test_a_browser_chats_on_the_page_which_asks_for_the_token_and_tells_why(self):
        process, port = self.serve("--token", "t0ken")
        browser = Browser(self.path("profile"))
        self.addCleanup(browser.end)
        browser.do("Page.navigate", url=f"http://127.0.0.1:{port}/")

        def wait(script):
            self.until(lambda: browser.see(script))
        wait("document.querySelector('#door') && !document.querySelector('#door').hidden")
        self.assertEqual(browser.see("document.activeElement.id"), "token")
        browser.type("t0ken")
        wait("/newborn|generation/.test(document.querySelector('#state').textContent)")
        browser.see("document.querySelector('#text').focus()")
        for words in ("<b>My</b> dog is called Rex.", "My dog is called Rex.",
                      "What is my dog called?"):
            browser.type(words)
            wait("document.querySelector('#log').getAttribute('aria-busy') == 'false' "
                 "&& document.querySelector('#text').value == ''")
        shown = browser.see("document.querySelector('#log').textContent")
        self.assertIn("<b>My</b> dog", shown)
        self.assertIn("Your dog is called Rex.", shown)
        self.assertIn("Why: memory", shown)
        self.assertEqual(browser.see("document.activeElement.id"), "text")
        self.assertEqual(browser.see("document.querySelectorAll('#log > div').length"), 6)
        self.assertEqual(self.end(process), (130, ""))
