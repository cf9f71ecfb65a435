"""Claims about MEMORY: what the one file keeps, refuses, finds, forgets and survives."""
import concurrent.futures
import contextlib
import functools
import os
import random
import shutil
import sqlite3
import stat
import unittest
from pathlib import Path
from unittest import mock

import macrogpt as m
from support import ROOT, Folder, entries_with, passage

with contextlib.closing(m.Memory(":memory:")) as _memory:
    HAS_FTS = _memory.has_fts
ODD_TEXTS = [
    "", " ", '"', '""', "'", "''", "AND", "OR", "NOT", "NEAR", "a AND b", "a OR", "NEAR(a b)",
    "NEAR/3", "*", "^", ":", "(", ")", "-", "-a", "a-b", "text:a", "{a b}", "a + b", "a*", "^a",
    '"a', 'a"b', "(a", "a)", "%", "_", "\\", "\\%", "a\0b", "\0", "\N{GRINNING FACE}",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}", "e\u0301", "\u4f60\u597d", "مرحبا", "\ufeff",
    "x" * 5000, "; DROP TABLE entries; --", "\x1b[2J", "\r\n", "\t", "\u2028",
]


def key_of(text):
    return passage(text).key


def texts(entries):
    return [entry.text.strip() for entry in entries]


def connections_failing(error, fails):
    """Let each statement that fails(sql) raise an error of SQLite with this text."""
    class Connection(sqlite3.Connection):
        def execute(self, sql, *values):
            if fails(sql):
                raise sqlite3.OperationalError(error)
            return super().execute(sql, *values)
    return mock.patch.object(sqlite3, "connect",
                             functools.partial(sqlite3.connect, factory=Connection))


class MemoryCase(Folder):
    now = 1000.0

    def setUp(self):
        super().setUp()
        self.pair = Path(self.db), Path(self.db + "-journal")

    def open(self, path=None):
        return self.kept(path, clock=lambda: self.now)

    def report(self):
        """Return the memory as a report opens it."""
        return contextlib.closing(m.Memory(self.db, writable=False))

    def snapshot(self):
        """Return the bytes of the file and of a commit that was broken off."""
        return [path.read_bytes() for path in self.pair if path.exists()]

    def aside(self, *statements):
        """Run statements on the closed file with sqlite3 alone; return the last one's rows."""
        with contextlib.closing(sqlite3.connect(self.db)) as db, db:
            db.create_function("crc32", -1, m._crc32)
            return [db.execute(sql).fetchall() for sql in statements][-1]

    def half_a_commit(self):
        """Leave the file as a kill in the middle of a commit does; return the bytes."""
        with contextlib.closing(m._connect(self.db)) as db:
            db.execute("PRAGMA cache_size = 1")
            db.execute("BEGIN IMMEDIATE")
            db.execute("CREATE TABLE half (data)")
            db.executemany("INSERT INTO half VALUES (?)", [("x" * 4000,)] * 100)
            torn = self.snapshot()
            db.execute("ROLLBACK")
        for path, data in zip(self.pair, torn):
            path.write_bytes(data)
        return torn

    def flip(self, sign):
        """Change a bit of the last byte of the last place where the file holds a sign."""
        raw = bytearray(self.content(self.db))
        raw[raw.rindex(sign) + len(sign) - 1] ^= 1
        self.write(self.db, bytes(raw))

    def refuse(self, path, *signs, **options):
        """Assert that opening path is refused in one line that holds every sign, and closed."""
        made, connect = [], m._connection

        def connection(*args, **options):
            made.append(connect(*args, **options))
            return made[-1]
        with mock.patch.object(m, "_connection", connection):
            self.refused(m.StoreError, lambda: m.Memory(path, **options), path, ";", *signs)
        for db in made:
            with self.assertRaises(sqlite3.ProgrammingError):
                db.execute("SELECT 1")


class TheFile(MemoryCase):
    @unittest.skipUnless(os.name == "posix", "modes are a thing of POSIX")
    def test_a_new_file_is_its_owners_alone_an_old_one_keeps_its_mode_and_must_be_writable(self):
        self.addCleanup(os.umask, os.umask(0))
        for mode, later in ((0o600, 0o640), (0o640, 0o400)):
            self.open().close()
            self.assertEqual(stat.S_IMODE(os.stat(self.db).st_mode), mode)
            os.chmod(self.db, later)
        if os.geteuid():  # root may write everything
            self.refuse(self.db)

    def test_everything_is_there_again_after_reopening_and_after_somebody_removed_the_file(self):
        memory, keys = self.open(), (5, 0, -1, 2 ** 63 - 1, -2 ** 63)
        session = memory.session_id("main")
        memory.add_message(session, "owner", "hello")
        memory.add_entry("chat", passage("the ferry leaves at seven"), session)
        memory.save_layers({"base": m.Layer([["w", 1, 2]], b"\0\1\2\3")})
        memory.set_setting("growth", {"step": 7})
        for epoch in (3, 4):  # of which the first stays for ever
            memory.hold_out(keys, epoch)
        for self.now in (3.0, 4.0, 5.0):
            memory.log("event", number=self.now, words=["ä", None])
            memory.add_progress(int(self.now), 20, None, 2.5)
        self.assertEqual(memory.life(2), [{"at": now, "event": "event", "number": now,
                                           "words": ["ä", None]} for now in (4.0, 5.0)])
        self.assertEqual(memory.progress(2), [{"at": now, "step": now, "tokens": 20, "loss": None,
                                               "held_out_bpc": 2.5} for now in (4.0, 5.0)])

        def everything(memory):
            return [memory.counts(), memory.sessions(), memory.newest_messages(session, 9),
                    memory.entries(), memory.layers(), memory.setting("growth"),
                    memory.probe_epochs(), memory.life(), memory.progress()]
        before = everything(memory)
        memory.close()
        again = self.open()
        self.assertEqual(everything(again), before)
        self.assertEqual((again.session_id("main"), list(again.faults())), (session, []))
        self.assertEqual(again.probe_epochs(), dict.fromkeys(keys, 3))
        os.unlink(self.db)
        again.set_setting("a", 1)  # the next change writes it all anew
        again.close()
        self.assertEqual(everything(self.open()), before)

    def test_a_folder_removed_while_we_run_is_told_and_one_made_again_is_written_anew(self):
        os.mkdir(self.path("folder"))
        memory = self.open(self.path("folder", "memory.sqlite3"))
        memory.set_setting("a", 1)
        shutil.rmtree(self.path("folder"))
        with self.assertRaisesRegex(m.StoreError, "check that its folder exists"):
            memory.set_setting("a", 2)
        self.assertEqual(memory.setting("a"), 1)
        os.mkdir(self.path("folder"))
        memory.set_setting("b", 3)
        self.assertEqual(self.open(memory.path).settings(""), {"a": 1, "b": 3})

    def test_a_path_with_odd_characters_is_a_path(self):
        for name in ("a b?mode=memory.db", "ü%20#.db", "-x", "file:y.db"):
            self.open(self.path(name)).close()
            self.assertTrue(os.path.getsize(self.path(name)))

    def test_what_is_not_ours_or_of_the_future_is_refused_and_left_alone_with_its_half_commit(self):
        def broken_off():
            self.aside("CREATE TABLE users (id)")
            self.half_a_commit()
        newest, theirs, given = len(m.MIGRATIONS), "another program's file", functools.partial
        ours = f"PRAGMA application_id = {m.APPLICATION_ID}"
        for make, *signs in (
                (given(self.write, "memory.sqlite3", "Dear reader, " * 100), "not a database"),
                (given(self.aside, ours, f"PRAGMA user_version = {newest + 1}"),
                 f"version {newest + 1}", f"to {newest};"),
                *((given(self.aside, sql, "PRAGMA journal_mode = WAL"), theirs)
                  for sql in ("PRAGMA application_id = 42", "CREATE VIEW mine AS SELECT 1",
                              "PRAGMA user_version = 3", "CREATE TABLE users (id)")),
                (broken_off, theirs)):
            make()
            before = self.snapshot()
            for writable in (True, False):
                self.refuse(self.db, *signs, writable=writable)
            self.assertEqual(self.snapshot(), before)
            os.unlink(self.db)
        for path in (self.folder, self.path("nowhere", "memory.sqlite3")):
            self.refuse(path)
        self.assertFalse(os.path.exists(self.path("nowhere")))

    def test_a_file_of_any_older_version_is_only_read_or_brought_up_to_the_same_schema(self):
        schema = "SELECT type, name, sql FROM sqlite_master ORDER BY name"
        self.open().close()
        newest = self.aside(schema)
        for version in range(1, len(m.MIGRATIONS)):
            os.unlink(self.db)
            self.aside(*m._statements("".join(m.MIGRATIONS[:version])),
                       f"PRAGMA user_version = {version}")
            before = self.snapshot()
            with self.report() as report:
                self.assertEqual((report.counts()["messages"], list(report.faults())), (0, []))
            self.assertEqual(self.snapshot(), before)
            self.open().close()
            self.assertEqual(self.aside(schema), newest)
            self.assertEqual(self.aside("PRAGMA user_version"), [(len(m.MIGRATIONS),)])
        with self.report() as report, self.assertRaises(m.StoreError):
            report.set_setting("mine", 1)

    def test_a_migration_that_fails_leaves_the_file_as_it_was(self):
        self.aside(*m._statements(m.MIGRATIONS[0]), "PRAGMA user_version = 1",
                   "ALTER TABLE entries ADD COLUMN layer")  # as the fourth one will, too
        before = self.snapshot()
        self.refuse(self.db, "duplicate column")
        self.assertEqual(self.snapshot(), before)


class AStoreOfVersion3(MemoryCase):
    """A life of the former program: a grown base, deltas, folds, sprouts, things to unlearn."""

    SAME = ("SELECT id, source, key, text, words, session_id, told_at, closed, recall, held_out "
            "FROM entries ORDER BY id", "SELECT at, event FROM life",
            "SELECT id, session_id, role, text, said_at, verdict, stage FROM messages",
            "SELECT * FROM sessions ORDER BY id", "SELECT * FROM probes ORDER BY key",
            "SELECT at, step, tokens, loss, held_out_bpc FROM progress",
            "SELECT * FROM settings WHERE name LIKE 'config.%' OR name IN ('shape', 'rejected')",
            "SELECT name, data FROM layers WHERE name IN ('base', 'tokenizer')")
    REBUILDING = (  # what a kill left of a base that was being rebuilt without a forgotten text
        "INSERT INTO layers SELECT 'old.' || name, sealed, manifest, checksum, data, saved_at "
        "FROM layers WHERE name != 'optimizer'", "DELETE FROM layers WHERE name NOT LIKE 'old.%'",
        *(f"INSERT INTO layers VALUES ('{name}', 0, '[]', 0, '', 0)"
          for name in ("base", "best", "tokenizer", "optimizer")),
        "UPDATE settings SET value = (SELECT value FROM settings WHERE name = 'growth') "
        "WHERE name = 'old_growth'",
        """UPDATE settings SET value = '{"phase": "warmup", "step": 3579}' WHERE name = 'growth'""",
        "INSERT INTO settings VALUES ('unlearning', '{}')",
        "DELETE FROM unlearning", "UPDATE entries SET learned = 0, trained = NULL")

    def setUp(self):
        super().setUp()
        with contextlib.closing(sqlite3.connect(self.db)) as db:
            db.executescript(Path(ROOT, "tests", "old_store.sql").read_text(encoding="utf-8"))

    def test_what_it_holds_is_carried_over_and_what_its_deltas_knew_waits_or_is_unlearned(self):
        before = list(map(self.aside, self.SAME))
        read = self.aside("SELECT id, 0 FROM entries WHERE learned = 1")
        memory = self.open()
        self.assertTrue(all(before) and read)
        self.assertEqual(list(map(self.aside, self.SAME)), before)
        self.assertEqual({(e.id, e.layer) for e in memory.entries("layer IS NOT NULL")}, {*read})
        self.assertFalse(set(memory.layers()) - {"base", "tokenizer", "optimizer"})
        self.assertEqual(list(memory.faults()), [])
        growth = m.Growth.of(memory.setting("growth"))
        self.assertEqual((growth.phase, growth.step, growth.generation), ("grown", 528, 1))
        corpus = memory.entries("source = 'corpus' AND layer = 0")[0]
        self.assertEqual(memory.trained_texts("corpus", [corpus.key]), [(corpus.text, 0)])
        self.assertEqual(memory.to_unlearn(), [(0, 58)], "delta5 was folded, delta7 is gone")
        memory.remove_entries("chat", [key_of("My cat is called Biscuit.")])  # once of delta0
        self.assertEqual(sorted(memory.to_unlearn()), [(0, 26), (0, 58)])

    def test_a_base_that_was_being_rebuilt_is_the_old_one_again_and_to_be_born_anew(self):
        self.aside(*self.REBUILDING)
        old = self.aside("SELECT data FROM layers WHERE name = 'old.base'")
        memory = self.open()
        self.assertEqual([(memory.layers()["base"].data,)], old)
        self.assertFalse({n for n in memory.manifests() if n.startswith("old.")} | (
            {"best", "delta7", "fold5"} & set(memory.manifests())))
        self.assertEqual(m.Growth.of(memory.setting("growth")).step, 528)
        self.assertEqual(memory.to_unlearn(), [(0, 1)])

    def test_it_opens_answers_and_learns_again_what_its_deltas_knew(self):
        said = self.good("ask", "What is my cat called?", "--no-train")
        self.assertEqual(said, "Your cat is called Biscuit.\n")
        memory = self.open()
        self.assertGreater(sum(memory.unread_chars()), 0)
        self.good("train", "--set", "unlearn_seconds=0")
        self.assertEqual((memory.unread_chars(), memory.to_unlearn()), ((0, 0), []))
        self.assertEqual(m.Growth.of(memory.setting("growth")).generation, 2,
                         "what was pending had been read by the base")


class Storing(MemoryCase):
    def test_what_raises_inside_leaves_no_trace_and_what_is_nested_commits_with_the_outermost(self):
        memory, seen = self.open(), "SELECT count(*) FROM settings"
        for error in (KeyError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), None):
            with self.assertRaises(type(error) if error else m.StoreError):
                with memory.transaction():
                    memory.set_setting("a", 1)
                    memory.add_message(memory.session_id("s"), "owner", "hello")
                    memory.add_entry("chat", passage("gone"))
                    memory.save_layers({"base": m.Layer(None, b"x")})
                    with memory.transaction():
                        memory.set_setting("inner", 1)
                    if error:
                        raise error
                    memory.add_message(12345, "owner", "to nowhere")
            self.assertEqual((memory.settings(""), memory.layers()), ({}, {}))
            self.assertEqual(set(memory.counts().values()), {0})
            self.assertEqual(entries_with(memory, ["gone"]), [])
        with memory.transaction():
            memory.set_setting("a", 1)
            with memory.transaction():
                memory.set_setting("b", 2)
            self.assertEqual(self.aside(seen), [(0,)])
        self.assertEqual(self.aside(seen), [(2,)])

    def test_where_a_rollback_fails_too_what_comes_next_is_committed_all_the_same(self):
        failing = []

        def fails(sql):
            return sql in failing and not failing.remove(sql)
        with connections_failing("disk I/O error", fails):
            memory = self.open()
        failing += ["COMMIT", "ROLLBACK"]
        with self.assertRaises(m.StoreError):
            memory.set_setting("lost", 1)
        self.assertEqual(failing, [])
        os.unlink(self.db)  # and the file is gone, too
        memory.set_setting("kept", 2)
        self.assertEqual(self.aside("SELECT name FROM settings"), [("kept",)])

    def test_what_a_signal_raises_while_a_row_is_added_is_raised(self):
        memory = self.open()
        session = memory.session_id("s")
        with mock.patch.object(m, "_crc32", side_effect=KeyboardInterrupt):
            with self.assertRaises(KeyboardInterrupt):
                memory.add_message(session, "owner", "hello")
        memory.add_message(session, "owner", "hello again")
        self.assertEqual(memory.newest_messages(session, 9), [("owner", "hello again")])

    def test_threads_that_write_at_once_lose_nothing(self):
        memory = self.open()
        session = memory.session_id("s")

        def write(role):
            for i in range(40):
                with memory.transaction():
                    memory.add_message(session, role, f"{role} {i}")
                    memory.add_entry(role, passage(f"{role} says {i}"), session)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(write, ("owner", "self")))
        said = memory.newest_messages(session, 1000)
        self.assertEqual(sorted(said, key=lambda each: each[0]),
                         [(role, f"{role} {i}") for role in ("owner", "self") for i in range(40)])
        self.assertEqual((memory.entry_count(), list(memory.faults())), (80, []))

    def test_what_a_kill_broke_off_is_taken_back_by_report_and_chat_and_by_a_rescue_in_a_copy(self):
        self.open().set_setting("kept", 1)
        new, torn = self.path("new.sqlite3"), self.half_a_commit()
        m.rescue(self.db, new)
        self.assertEqual(self.snapshot(), torn)
        for path, writable in ((new, True), (self.db, False), (self.db, True)):
            self.half_a_commit()
            memory = self.kept(path, writable=writable)
            self.assertEqual((memory.settings(""), list(memory.faults())), ({"kept": 1}, []))

    def test_any_text_comes_back_with_its_verdict_and_its_stage_only_goes_forward(self):
        memory = self.open()
        here, there = memory.session_id("here"), memory.session_id("there")
        ids = [memory.add_message(here, "self", text) for text in ODD_TEXTS]
        ids.append(memory.add_message(there, "owner", "x"))
        memory.judge(ids[1], 1)
        memory.judge(ids[2], -1)
        self.assertEqual(memory.message_texts(ids), [*ODD_TEXTS, "x"])
        self.assertEqual([x.verdict for x in memory.prompt_messages(here)],
                         [0, 1, -1] + [0] * (len(ids) - 4))
        memory.advance_messages(ids[:2], m.SUMMED)
        memory.advance_messages(ids, m.KEPT)
        self.assertEqual([x.stage for x in memory.prompt_messages()],
                         [m.SUMMED, m.SUMMED] + [m.KEPT] * (len(ids) - 2))
        memory.advance_messages(ids[:1], m.ARCHIVED)
        self.assertEqual([x.id for x in memory.prompt_messages(here)], ids[1:-1])
        self.assertEqual(memory.heard_messages(), [])

    def test_a_document_told_again_only_becomes_recent_and_another_source_is_another_entry(self):
        memory = self.open()
        for text in ("one", "two"):
            memory.add_entry("chat", passage(text))
        memory.mark_read([key_of("one")], 3)
        self.now = 2000.0
        memory.add_entry("chat", passage("one"), held_out=True, training=False)
        self.assertEqual([(e.text, e.told_at, e.layer, e.held_out) for e in memory.entries()],
                         [("one\n", 2000.0, 3, False), ("two\n", 1000.0, None, False)])
        self.assertEqual(len(memory.training_index()), 2)
        self.assertEqual(len(entries_with(memory, ["one"])), 1)
        memory.add_entry("corpus", passage("one"))
        self.assertEqual(memory.entry_keys("corpus"), {key_of("one")})
        memory.remove_entries("chat", [key_of("one"), 12345])
        self.assertEqual([(e.source, e.text) for e in memory.entries()],
                         [("chat", "two\n"), ("corpus", "one\n")])

    def test_what_waits_is_counted_by_its_source_without_what_is_never_trained_on(self):
        memory = self.open()
        memory.add_entry("corpus", passage("two herons"), training=False)
        memory.mark_trained(0)
        self.assertEqual((memory.has_text(), memory.training_index(), memory.unread_chars()),
                         (False, [], (0, 0)))
        self.assertEqual(memory.trained_texts("corpus", memory.entry_keys("corpus")), [])
        self.assertEqual(len(entries_with(memory, ["heron"])), 1, "it is recalled for all that")
        memory.add_entry("corpus", passage("a heron"), held_out=True)
        memory.add_message(memory.session_id("main"), "owner", "hello")
        for source, text in (("corpus", "1234"), ("chat", "12"), ("taught", "1")):
            memory.add_entry(source, passage(text))
        self.assertEqual(memory.unread_chars(), (5, 5))
        memory.mark_read([key_of("1234"), key_of("12")], 0)
        self.assertEqual(memory.unread_chars(), (0, 2))
        self.assertEqual(memory.counts(), {"messages": 1, "sessions": 1, "entries": 5, "told": 2,
                                           "learned": 2, "held_out": 1})

    def test_settings_hold_any_json_value_and_are_listed_by_a_literal_prefix(self):
        memory = self.open()
        for value in (0, None, "", "ü\n\0", [1, 2.5], {"a": {"b": [None, True]}}, 10 ** 30):
            memory.set_setting("x", value)
            self.assertEqual(memory.setting("x", "default"), value)
        self.assertEqual((memory.setting("y", "default"), memory.setting("y")), ("default", None))
        for name in ("config.a", "configXc", "Config.d", "config.", "%_"):
            memory.set_setting(name, name)
        self.assertEqual(memory.settings("config."), {"a": "config.a", "": "config."})
        self.assertEqual(memory.settings("%"), {"_": "%_"})

    def test_the_trainer_is_one_at_a_time_until_it_expires_is_dead_or_gives_way(self):
        def take(owner, alive=lambda held: True):
            return self.open().take_lease(owner, 60.0, alive)
        self.assertTrue(take("a"))
        for later, owner, taken in ((59, "b", False), (0, "a", True), (59, "b", False),
                                    (2, "b", True), (0, "a", False)):
            self.now += later
            self.assertEqual(take(owner), taken, (later, owner))
        asked = []
        self.assertTrue(take("c", asked.append), "the dead give way at once")
        self.assertEqual(asked, ["b"])
        for holder, taken in (("a", False), ("c", True)):
            self.open().drop_lease(holder)
            self.assertEqual(take("d"), taken, holder)


def each_way(test):
    """Run a test of a filled memory by LIKE alone, and by FTS5 where there is one."""
    def both(self):
        for fts in sorted({False, HAS_FTS}):
            with self.subTest(fts=fts):
                test(self, self.filled(fts))
    return both


class Searching(MemoryCase):
    LINES = ("the heron sleeps beside the mill", "a heron and a crane", "copper turns green",
             "Zürich lies on a lake", "trains run on time", "the train was late", "MILL wheels",
             "a hundred % sure", "under_score and back\\slash", "Москва на реке",
             "η θάλασσα βαθιά", "مرحبا بكم", "नमस्ते दुनिया", "你好 世界", "한국어 공부",
             "Straße Fuß", "tiếng Việt")

    def filled(self, fts):
        memory = self.open(self.path(f"{fts}.db"))
        memory.has_fts = fts
        for line in self.LINES:
            memory.add_entry("corpus", passage(line))
        return memory

    @each_way
    def test_a_word_is_found_by_its_beginning_whatever_its_case_and_accents(self, memory):
        for stem, count in (("heron", 2), ("hero", 2), ("mill", 2), ("train", 2), ("trains", 1),
                            ("coppe", 1), ("walru", 0), ("zuric", 1), ("under_", 1), ("%", 0),
                            ("h_ron", 0), ("un%score", 0), ("\\", 0)):
            found = len(entries_with(memory, [stem]))
            self.assertEqual((found, memory.stem_count(stem)), (count, count), stem)
        stems = ["heron", "mill", "coppe"]  # any will do, and each entry comes once
        self.assertEqual(sorted(texts(entries_with(memory, stems))),
                         sorted(self.LINES[i] for i in (0, 1, 2, 6)))
        self.assertEqual(len(entries_with(memory, stems, 2)), 2)
        self.assertEqual(entries_with(memory, []), [])
        memory.add_entry("chat", passage("is the heron at home?"), recall=False)
        self.assertEqual(len(entries_with(memory, ["heron"])), 2, "it is not to be recalled")

    @each_way
    def test_an_index_brought_together_is_of_one_part_and_finds_the_same(self, memory):
        def found():
            return [memory.ids_holding([[stem]], 9) for stem in ("hero*", "mill", "train*", "你")]
        before, pauses = found(), []
        memory.merge_index(lambda: pauses.append(1))
        self.assertEqual(found(), before)
        if memory.has_fts:
            (parts,), = memory._rows("SELECT count(DISTINCT segid) FROM entries_fts_idx")
            self.assertEqual((parts, len(pauses) > 0), (1, True))

    @each_way
    def test_entry_and_message_that_are_forgotten_go_and_do_not_come_back(self, memory):
        session = memory.session_id("main")
        for text in ("tea", "tea please"):
            memory.add_message(session, "owner", text)
            memory.add_message(session, "self", "I see.")
            memory.add_entry("chat", passage(text), session)
        (tea,) = memory.entries("e.text = ?", "tea\n")
        taken = memory.entries_taken()
        memory.forget_entry(tea.id)
        memory.forget_entry(99999)  # which is not there
        self.assertEqual(memory.entries_taken(), taken + 1)
        again = self.open(self.path(f"{memory.has_fts}.db"))
        for memory in (memory, again):
            self.assertEqual(texts(entries_with(memory, ["tea"])), ["tea please"])
            self.assertEqual(texts(memory.entries("e.source = 'chat'")), ["tea please"])
            self.assertEqual(memory.newest_messages(session, 99), [
                ("self", "I see."), ("owner", "tea please"), ("self", "I see.")])

    def test_every_word_of_any_script_is_found_and_both_ways_find_the_same(self):
        plain, full = self.filled(False), self.filled(HAS_FTS)
        for line, stem in ((line, stem) for line in self.LINES for stem in m.stems_of(line)):
            found, same = (set(texts(entries_with(memory, [stem]))) for memory in (plain, full))
            self.assertIn(line, found & same, stem)
            if stem.isascii() and len(stem) > 2:
                self.assertEqual(found, same, stem)

    @each_way
    def test_no_typed_text_is_ever_a_syntax_error_nor_too_long(self, memory):
        rng = random.Random(5)
        signs = [text for text in ODD_TEXTS if len(text) < 5] + ["heron", " ", "/", ",", "\n"]
        typed = ODD_TEXTS + ["".join(rng.choices(signs, k=rng.randint(1, 12))) for _ in range(60)]
        for text in typed:
            for stems in ([text], m.stems_of(text), text.split(" ")):
                self.assertLessEqual(len(entries_with(memory, stems)), len(self.LINES))
            self.assertGreaterEqual(memory.stem_count(text), 0)
            self.assertIsInstance(m.recall(memory, text, rng), list)
        self.assertEqual(memory.entry_count(), len(self.LINES))
        long = sorted({*("w%d" % rng.randrange(10 ** 6) for _ in range(3000)), "heron"})
        self.assertEqual(len(entries_with(memory, long)), 2)

    @unittest.skipUnless(HAS_FTS, "this SQLite has no FTS5")
    def test_a_memory_lives_without_fts5_and_is_indexed_anew_where_it_is_back(self):
        def of_the_index(sql):
            return "entries_fts" in sql and "sqlite_master" not in sql
        for made_with in (True, False):
            path = self.path(f"{made_with}.db")
            if made_with:
                self.filled(True).close()
            with connections_failing("no such module: fts5", of_the_index):
                memory = self.open(path) if made_with else self.filled(False)
            self.assertFalse(memory.has_fts)
            memory.add_entry("corpus", passage("the quince ripens"))
            memory.remove_entries("corpus", [key_of(self.LINES[0])])
            self.assertEqual(len(entries_with(memory, ["heron", "quinc"])), 2)
            memory.close()
            again = self.open(path)
            self.assertTrue(again.has_fts)
            self.assertEqual(set(texts(entries_with(again, ["heron", "quinc"]))),
                             {"the quince ripens", self.LINES[1]})
            again.add_entry("corpus", passage("a quince tart"))
            self.assertEqual(len(entries_with(again, ["quinc"])), 2)


class Layers(MemoryCase):
    def test_layers_come_back_whole_and_the_newest_wins_unless_it_is_sealed(self):
        memory = self.open()
        given = {"base": m.Layer([["w", 2, 3]], bytes(range(256)) * 10),
                 "delta1": m.Layer({"a": None}, b"", True), "tokenizer": m.Layer(None, b"\0")}
        memory.save_layers(given)
        self.assertEqual(memory.layers(), given)
        self.assertEqual(memory.manifests(), {n: layer.manifest for n, layer in given.items()})
        self.assertEqual(set(memory.layers(without=("base",))), {"delta1", "tokenizer"})
        new = m.Layer([], b"new")
        memory.save_layers({"base": new, "delta1": new})
        self.assertEqual(memory.layers(), {**given, "base": new})
        for change in ("data = x'00'", "sealed = 0", "manifest = '[]'"):
            with self.assertRaisesRegex(sqlite3.Error, "sealed"):
                self.aside(f"UPDATE layers SET {change} WHERE name = 'delta1'")
        memory.remove_layers(["base", "delta1", "never there"])
        self.assertEqual(set(memory.layers()), {"tokenizer"})

    def test_what_is_damaged_is_named_and_left_out_and_what_it_had_read_is_to_be_read_again(self):
        needle = b"needle" * 50
        for name, lost, damage, what in (
                ("base", 2, self.flip, needle), ("delta1", 1, self.flip, needle),
                ("router", 1, self.flip, needle),  # nobody knows any more what its delta reads
                (m.NEXT + "base", 0, self.flip, needle),
                ("base", 2, self.aside, "UPDATE layers SET manifest = '{' WHERE name = 'base'")):
            memory = self.open()
            layers = {n: m.Layer(None, n.encode()) for n in ("base", "tokenizer", "delta1")}
            memory.save_layers({**layers, name: m.Layer(None, b"needle" * 20_000)})
            memory.set_setting("growth", {"phase": "grown"})
            for at, text in enumerate(("read by the base", "read by the delta")):
                memory.add_entry("corpus", passage(text))
                memory.mark_read([passage(text).key], at)
            memory.close()
            damage(what)
            memory = self.open()
            self.assertIn(repr(name), " ".join(memory.faults()))
            self.assertNotIn(name, memory.layers())
            memory.give_up_damaged()
            self.assertEqual(list(memory.faults()), [])
            self.assertEqual(len(memory.entries("e.layer IS NULL")), lost)
            memory.close()
            os.unlink(self.db)

    def test_every_text_row_column_setting_and_the_index_are_examined_and_the_index_is_mended(self):
        for sign, damage in (
                ("1 of the messages", "UPDATE messages SET role = 'self'"),
                ("1 of the entries", "UPDATE entries SET checksum = 7"),
                ("missing or damaged: progress", "DROP TABLE progress"),
                ("'growth' is damaged", "INSERT INTO settings VALUES ('growth', '{broken')"),
                ("index is damaged", "UPDATE entries_fts_data SET block = x'00' WHERE id > 10"),
                ("", "DELETE FROM entries_fts_data"), ("", "DROP TABLE entries_fts"),
                ("1 of the messages", b"ownerMy"), ("1 of the life", b'"removed": 0'),
                ("1 of the progress", m.struct.pack(">d", 2.5)), ("'mixer'", b'"order": 3'),
                ("damaged: sealed_layers_stay", b"BEGIN SELECT RAISE")):
            memory = self.open()
            memory.add_message(memory.session_id("main"), "owner", "My cat is Biscuit.")
            memory.add_entry("chat", passage("My cat is Biscuit."))
            memory.add_progress(3, 4, 2.5, 1.5)
            memory.log("corpus", added=3, removed=0)
            memory.save_layers({"mixer": m.Layer({"order": 3}, b"1")})
            memory.close()
            (self.flip if isinstance(damage, bytes) else self.aside)(damage)
            before = self.snapshot()
            with self.report() as report:
                self.assertIn(sign, " ".join(report.faults()))
            self.assertEqual(self.snapshot(), before, "a report mends nothing")
            memory = self.open()
            found = " ".join(memory.faults())
            self.assertIn(sign, found)
            self.assertEqual(bool(sign), bool(found))
            self.assertEqual(memory.setting("growth", {}), {})
            self.assertEqual(len(memory.ids_holding([["biscuit"]], 5)), 1)
            memory.close()
            os.unlink(self.db)

    def test_all_that_can_be_read_of_a_damaged_file_is_rescued_into_a_new_one(self):
        memory = self.open()
        for number in range(400):
            memory.add_message(memory.session_id("main"), "owner", f"My pearl {number} is white.")
        memory.add_entry("chat", passage("My cat is Biscuit."))
        memory.save_layers({"base": m.Layer(None, b"1"), "tokenizer": m.Layer(None, b"2")})
        memory.close()
        raw = bytearray(self.content(self.db))
        page = raw.index(b"My pearl 200 is") // 4096 * 4096  # of messages, amid the file
        raw[page:page + 4096] = b"\xff" * 4096
        self.write(self.db, bytes(raw))
        rows = m.rescue(self.db, self.path("new.sqlite3"))
        self.assertEqual((rows["entries"], rows["layers"]), (1, 2))
        self.assertTrue(250 < rows["messages"] < 400, rows)
        memory = self.open(self.path("new.sqlite3"))
        self.assertEqual(list(memory.faults()), [])
        self.assertEqual(len(memory.ids_holding([["biscuit"]], 5)), 1)
        with self.assertRaisesRegex(m.StoreError, "there already"):
            m.rescue(self.db, self.path("new.sqlite3"))
        self.write(self.path("short.sqlite3"), bytes(raw[:-4096]))
        rescued = m.rescue(self.path("short.sqlite3"), self.path("whole.sqlite3"))
        self.assertGreater(rescued["messages"], 200, "of a file that was cut short")
        kept, again = m.renew_damaged(self.db)
        self.assertEqual((again, self.content(kept)), (rows, raw), "it was left as it is")
        self.assertEqual(list(self.open().faults()), [], "what can be read, in its place")


class ReadersAndGenerations(MemoryCase):
    def setUp(self):
        super().setUp()
        self.memory = self.open()

    def tell(self, text, *layers, source="chat", **marks):
        """Make an entry that the layers begin to train on and then have read."""
        self.memory.add_entry(source, passage(text), **marks)
        for layer in layers:
            self.memory.mark_trained(layer)
            self.memory.mark_read([key_of(text)], layer)

    def forget(self, *texts, owed):
        """Forget what was said in a chat; assert which layers have how much to unlearn then."""
        self.memory.remove_entries("chat", map(key_of, texts))
        self.assertEqual(sorted(self.memory.to_unlearn()), owed)

    def readers(self):
        return {e.text.strip(): e.layer for e in self.memory.entries()}

    def begin(self):
        """Begin the next generation, which grows up beside the one that speaks."""
        self.memory.save_layers({n: m.Layer(None, n.encode()) for n in ("base", "router")})
        self.memory.save_layers({"delta1": m.Layer(None, b"sealed", True)})
        self.memory.begin_rebirth({"why": "text"})
        self.memory.save_layers({m.NEXT + "base": m.Layer(None, b"young")})

    def test_an_entry_names_the_last_layer_that_read_it_and_the_first_must_unlearn_it(self):
        self.tell("an agate")
        self.tell("an opal", held_out=True)
        self.memory.mark_trained(2)  # which began to train and never read through
        self.memory.mark_trained(3)
        self.tell("a pearl")
        self.tell("a ruby", 0)
        for source in ("chat", "corpus"):
            self.tell("a beryl", 4, source=source)
        self.tell("an amber", 3, 5)
        self.tell("a quartz")
        self.assertEqual(self.readers(), {"an agate": None, "an opal": None, "a pearl": None,
                                          "a ruby": 0, "a beryl": 4, "an amber": 5,
                                          "a quartz": None})
        # held out, new, and still in the corpus
        self.forget("an opal", "a quartz", "a beryl", owed=[])
        self.forget("a ruby", "an amber", "an agate", owed=[(0, 7), (2, 9), (3, 9)])

    def test_without_some_layers_what_they_read_waits_and_what_others_read_does_not(self):
        for layer, text in enumerate(("a ruby", "an amber", "a quartz", "an opal")):
            self.tell(text, layer)
        self.tell("a pearl", 1, 2)
        self.forget("an opal", "a ruby", owed=[(0, 7), (3, 8)])
        self.memory.unlearn_from(2)
        self.assertEqual(self.readers(), {"an amber": 1, "a quartz": None, "a pearl": None})
        self.forget("a quartz", "a pearl", owed=[(0, 7), (1, 8)])

    def test_the_next_ones_layers_are_its_own_until_it_has_the_formers_place_and_readings(self):
        self.tell("a ruby", 0)
        self.tell("an amber", 1)
        self.begin()
        young = {"base": m.Layer(None, b"young")}
        self.assertEqual(set(self.memory.layers()), {"base", "router", "delta1"})
        self.assertEqual(self.memory.layers(m.NEXT), young)
        self.assertEqual(set(self.memory.manifests()), {"base", "router", "delta1"})
        self.tell("a pearl", 2)
        self.memory.adopt([key_of("a ruby"), key_of("an amber")])
        self.assertEqual((self.memory.layers(), self.memory.layers(m.NEXT)), (young, {}))
        self.assertIsNone(self.memory.setting("rebirth"))
        self.assertEqual(self.readers(), {"a ruby": 0, "an amber": 0, "a pearl": None})

    def test_what_is_forgotten_meanwhile_the_next_one_is_to_unlearn_or_goes_with_it(self):
        for adopted in (False, True):
            self.tell("an amber", 1)
            self.begin()
            self.tell("a pearl")
            self.assertEqual(self.memory.trained_texts("chat", [key_of("a pearl")]),
                             [("a pearl\n", m.NOBODY)])
            self.forget("an amber", "a pearl", owed=[(1, 9)])  # the present one has read amber
            if adopted:
                self.memory.unlearn_from(1)
                self.assertEqual(self.memory.to_unlearn(), [])
                self.memory.adopt([])
                self.assertEqual(sorted(self.memory.to_unlearn()), [(0, 8), (0, 9)])
                continue
            self.memory.drop_rebirth()
            self.assertEqual(self.memory.to_unlearn(), [(1, 9)])
            self.assertEqual(self.memory.layers(m.NEXT), {})
            self.assertIsNone(self.memory.setting("rebirth"))
            self.memory.unlearn_from(1)

    def test_what_was_gone_before_the_next_one_began_is_unlearned_unless_it_came_back(self):
        for again in (False, True):
            self.tell("a ruby", 0)
            self.forget("a ruby", owed=[(0, 7)])
            self.memory.want_unlearned(m.line_key("a quartz"), 0, 8)
            self.begin()
            self.assertEqual(sorted(self.memory.to_unlearn()), [(0, 7), (0, 8)])
            if again:  # and went again, while the next one grew up
                self.tell("a ruby")
                self.forget("a ruby", owed=[(0, 7), (0, 8)])
                self.memory.want_unlearned(m.line_key("a quartz"), m.NOBODY, 8)
            self.memory.adopt([])
            self.assertEqual(sorted(self.memory.to_unlearn()), [(0, 7), (0, 8)] * again)

    def test_what_no_generation_trains_on_or_was_restored_in_time_none_has_to_unlearn(self):
        self.begin()
        for text, marks in (("an opal", {"held_out": True}), ("a quartz", {"training": False})):
            self.tell(text, source="corpus", **marks)
            self.assertEqual(self.memory.trained_texts("corpus", [key_of(text)]), [])
        self.memory.want_unlearned(m.line_key("a ruby"), m.NOBODY, 6)
        self.assertEqual(self.memory.take_back(m.line_key("a ruby")), m.NOBODY)
        self.memory.adopt([])
        self.assertEqual(self.memory.to_unlearn(), [])
