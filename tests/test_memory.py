"""Claims about MEMORY: what the one file keeps, refuses, finds, forgets and survives."""
import functools
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import unittest
from unittest import mock

import macrogpt as m
from support import ROOT, Folder, entries_with

HAS_FTS = m.Memory(":memory:").has_fts
ODD_TEXTS = [
    "", " ", '"', '""', "'", "''", "AND", "OR", "NOT", "NEAR", "a AND b", "a OR", "NEAR(a b)",
    "NEAR/3", "*", "^", ":", "(", ")", "-", "-a", "a-b", "text:a", "{a b}", "a + b", "a*", "^a",
    '"a', 'a"b', "(a", "a)", "%", "_", "\\", "\\%", "a\0b", "\0", "\N{GRINNING FACE}",
    "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}", "e\u0301", "\u4f60\u597d", "\u0645\u0631\u062d\u0628\u0627",
    "\ufeff", "x" * 5000, "; DROP TABLE entries; --", "\x1b[2J", "\r\n", "\t", "\u2028",
]


def passage(*lines):
    return m.Document(lines, True)


class Clock:
    """A clock that stands still until it is told otherwise."""

    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


class MemoryCase(Folder, unittest.TestCase):
    def setUp(self):
        super().setUp()
        self.clock = Clock()

    def open(self, path=None):
        memory = m.Memory(path or self.db, self.clock)
        self.addCleanup(memory.close)
        return memory

    def aside(self, *statements):
        """Run statements on the closed file with sqlite3 alone; return the last one's rows."""
        db = sqlite3.connect(self.db)
        try:
            for sql, *values in statements:
                rows = db.execute(sql, values).fetchall()
            db.commit()
            return rows
        finally:
            db.close()

    def refuse(self, path, *signs):
        """Assert that opening path raises a one-line StoreError that holds every sign."""
        with self.assertRaises(m.StoreError) as caught:
            m.Memory(path).close()
        text = str(caught.exception)
        self.assertEqual(len(text.splitlines()), 1, text)
        for sign in (path, *signs):
            self.assertIn(sign, text)
        self.assertIn(";", text, "found, and what to do")


class TheFile(MemoryCase):
    @unittest.skipUnless(os.name == "posix", "modes are a thing of POSIX")
    def test_a_new_file_is_its_owners_alone_whatever_the_umask(self):
        before = os.umask(0)
        try:
            self.open()
        finally:
            os.umask(before)
        self.assertEqual(stat.S_IMODE(os.stat(self.db).st_mode), 0o600)

    @unittest.skipUnless(os.name == "posix", "modes are a thing of POSIX")
    def test_the_mode_of_a_file_that_is_there_is_left_as_its_owner_made_it(self):
        self.open().close()
        os.chmod(self.db, 0o640)
        self.open()
        self.assertEqual(stat.S_IMODE(os.stat(self.db).st_mode), 0o640)

    def test_everything_is_there_again_after_reopening(self):
        memory = self.open()
        session = memory.session_id("main")
        memory.add_message(session, "owner", "hello")
        memory.add_message(session, "self", "and hello to you")
        memory.add_entry("chat", passage("the ferry leaves at seven"), session)
        memory.save_layers({"base": m.Layer([["w", 1, 2]], b"\0\1\2\3")})
        memory.set_setting("growth", {"step": 7})
        memory.hold_out([5, -6], 3)
        memory.log("born", where="here")
        memory.add_progress(1, 20, 3.5, None)
        before = [memory.counts(), memory.sessions(), memory.newest_messages(session, 9),
                  memory.entries(), memory.layers(), memory.setting("growth"),
                  memory.probe_keys(), memory.life(), memory.progress()]
        memory.close()
        again = self.open()
        self.assertEqual(before, [
            again.counts(), again.sessions(), again.newest_messages(session, 9), again.entries(),
            again.layers(), again.setting("growth"), again.probe_keys(), again.life(),
            again.progress()])
        self.assertEqual(again.session_id("main"), session)

    def test_a_path_with_odd_characters_is_a_path(self):
        for name in ("a b?mode=memory.db", "ü%20#.db", "-x", "file:y.db"):
            path = self.path(name)
            m.Memory(path).close()
            self.assertTrue(os.path.getsize(path))

    def test_integrity_of_a_sound_file_is_ok(self):
        memory = self.open()
        memory.add_entry("chat", passage("one"))
        self.assertEqual(memory.integrity(), "ok")

    def test_another_kind_of_file_is_refused_and_left_alone(self):
        path = self.write("letter.txt", "Dear reader, this is no database.\n" * 100)
        self.refuse(path, "not a database")
        with open(path, encoding="utf-8") as file:
            self.assertEqual(file.read(), "Dear reader, this is no database.\n" * 100)

    def test_a_folder_is_refused(self):
        self.refuse(self.folder)

    def test_a_missing_folder_is_refused_and_not_made(self):
        self.refuse(self.path("nowhere", "memory.sqlite3"))
        self.assertFalse(os.path.exists(self.path("nowhere")))

    def test_a_refused_file_is_closed_again(self):
        self.open().close()
        self.aside((f"PRAGMA user_version = {len(m.MIGRATIONS) + 1}",))
        made, connect = [], sqlite3.connect

        def noted(*args, **options):
            made.append(connect(*args, **options))
            return made[-1]
        for path in (self.db, self.write("letter.txt", "no database " * 99)):
            with mock.patch.object(sqlite3, "connect", noted), self.assertRaises(m.StoreError):
                m.Memory(path)
        try:
            for db in made:
                with self.assertRaises(sqlite3.ProgrammingError):
                    db.execute("SELECT 1")
        finally:
            for db in made:
                db.close()

    @unittest.skipIf(os.name != "posix" or os.geteuid() == 0, "root may write everything")
    def test_a_file_that_cannot_be_written_is_refused(self):
        self.open().close()
        os.chmod(self.db, 0o400)
        self.refuse(self.db)

    def test_a_cut_off_file_is_refused(self):
        self.open().close()
        with open(self.db, "r+b") as file:
            file.truncate(5000)
        with self.assertRaises(m.StoreError):
            memory = m.Memory(self.db)
            self.addCleanup(memory.close)
            if memory.integrity() != "ok":
                raise m.StoreError("seen by integrity()")


class Migrations(MemoryCase):
    def test_an_empty_file_becomes_the_newest_version(self):
        self.write("memory.sqlite3", b"")
        self.open().close()
        self.assertEqual(self.aside(("PRAGMA user_version",)), [(len(m.MIGRATIONS),)])

    def test_a_file_of_every_older_version_is_brought_up_and_has_the_same_schema(self):
        self.open().close()
        newest = self.aside(("SELECT type, name, sql FROM sqlite_master ORDER BY name",))
        for version in range(len(m.MIGRATIONS)):
            os.unlink(self.db)
            db = sqlite3.connect(self.db)
            for script in m.MIGRATIONS[:version]:
                db.executescript(script)
            db.execute(f"PRAGMA user_version = {version}")
            db.commit()
            db.close()
            self.open().close()
            self.assertEqual(
                newest, self.aside(("SELECT type, name, sql FROM sqlite_master ORDER BY name",)))

    def test_of_what_an_older_version_learned_the_base_is_taken_to_have_read_all(self):
        with open(self.db, "wb"):
            pass
        for script in m.MIGRATIONS[:2]:
            db = sqlite3.connect(self.db)
            db.executescript(script)
            db.close()
        self.aside(("PRAGMA user_version = 2",),
                   ("INSERT INTO entries VALUES (1, 'chat', 5, 'a ruby', '', NULL, 0, 1, 1, 0, 1)",),
                   ("INSERT INTO entries VALUES (2, 'chat', 6, 'an amber', '', NULL, 0, 1, 1, 1, 0)",),
                   ("INSERT INTO layers VALUES ('base', 0, '[]', 0, '', 0)",))
        memory = self.open()
        memory.remove_entries("chat", [5, 6])
        self.assertEqual(memory.to_unlearn(), [(0, 6, False)])

    def test_a_file_from_the_future_is_refused_and_not_touched(self):
        self.open().close()
        self.aside((f"PRAGMA user_version = {len(m.MIGRATIONS) + 1}",))
        with open(self.db, "rb") as file:
            before = file.read()
        self.refuse(self.db, f"version {len(m.MIGRATIONS) + 1}", str(len(m.MIGRATIONS)))
        with open(self.db, "rb") as file:
            self.assertEqual(file.read(), before)

    def test_a_migration_that_fails_leaves_the_version_before_it(self):
        self.write("memory.sqlite3", b"")
        self.aside(("CREATE TABLE layers (mine)",), ("INSERT INTO layers VALUES (1)",))
        with self.assertRaises(m.StoreError):
            m.Memory(self.db)
        self.assertEqual(self.aside(("PRAGMA user_version",)), [(0,)])
        self.assertEqual(self.aside(("SELECT name FROM sqlite_master",)), [("layers",)])

    @unittest.skipUnless(HAS_FTS, "this SQLite has no FTS5")
    def test_a_file_without_an_index_gets_one_that_knows_its_old_entries(self):
        memory = self.open()
        memory.add_entry("chat", passage("a walrus on the pier"))
        memory.close()
        self.aside(*((f"DROP TRIGGER {name}",)
                     for name in ("entries_added", "entries_removed", "entries_changed")),
                   ("DROP TABLE entries_words",), ("DROP TABLE entries_fts",))
        self.assertEqual([e.text for e in entries_with(self.open(), ["walru"])],
                         ["a walrus on the pier\n"])


class Transactions(MemoryCase):
    def test_what_raises_inside_leaves_no_trace(self):
        memory = self.open()
        for error in (KeyError("x"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
            with self.assertRaises(type(error)):
                with memory.transaction():
                    memory.set_setting("a", 1)
                    memory.add_message(memory.session_id("s"), "owner", "hello")
                    memory.add_entry("chat", passage("gone"))
                    memory.save_layers({"base": m.Layer(None, b"x")})
                    raise error
            self.assertIsNone(memory.setting("a"))
            self.assertEqual(set(memory.counts().values()), {0})
            self.assertEqual(memory.layers(), {})
            self.assertEqual(entries_with(memory, ["gone"]), [])
        memory.set_setting("a", 2)
        self.assertEqual(memory.setting("a"), 2)

    def test_nested_transactions_commit_with_the_outermost(self):
        memory = self.open()
        with memory.transaction():
            memory.set_setting("a", 1)
            with memory.transaction():
                memory.set_setting("b", 2)
            other = sqlite3.connect(self.db)
            seen = other.execute("SELECT count(*) FROM settings").fetchone()
            other.close()
            self.assertEqual(seen, (0,))
        memory.close()
        self.assertEqual(self.open().settings(""), {"a": 1, "b": 2})

    def test_an_error_after_an_inner_transaction_takes_that_one_back_too(self):
        memory = self.open()
        with self.assertRaises(ValueError):
            with memory.transaction():
                with memory.transaction():
                    memory.set_setting("inner", 1)
                raise ValueError
        self.assertEqual(memory.settings(""), {})

    def test_an_error_of_sqlite_inside_is_a_store_error_and_rolls_back(self):
        memory = self.open()
        with self.assertRaises(m.StoreError):
            with memory.transaction():
                memory.set_setting("a", 1)
                memory.add_message(12345, "owner", "to a session that is not there")
        self.assertIsNone(memory.setting("a"))

    def test_a_role_that_nobody_has_is_refused(self):
        memory = self.open()
        with self.assertRaises(m.StoreError):
            memory.add_message(memory.session_id("s"), "ghost", "boo")

    def test_a_file_held_by_another_says_so_and_nothing_is_half_done(self):
        connect = sqlite3.connect

        def impatient(path, **options):  # waiting the usual seconds would prove no more
            return connect(path, **{**options, "timeout": 0.01})
        with mock.patch.object(sqlite3, "connect", impatient):
            memory = self.open()
        other = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        with self.assertRaises(m.StoreError) as caught:
            memory.set_setting("a", 1)
        self.assertIn("locked", str(caught.exception))
        other.execute("ROLLBACK")
        memory.set_setting("a", 2)
        self.assertEqual(memory.setting("a"), 2)

    def test_threads_that_write_at_once_lose_nothing(self):
        memory = self.open()
        session, errors = memory.session_id("s"), []

        def write(role):
            try:
                for i in range(40):
                    with memory.transaction():
                        memory.add_message(session, role, f"{role} {i}")
                        memory.add_entry(role, passage(f"{role} says {i}"), session)
            except Exception as error:  # a thread's errors are shown by the main one
                errors.append(error)
        threads = [threading.Thread(target=write, args=(role,)) for role in ("owner", "self")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual(errors, [])
        said = memory.newest_messages(session, 1000)
        for role in ("owner", "self"):
            self.assertEqual([text for who, text in said if who == role],
                             [f"{role} {i}" for i in range(40)])
        self.assertEqual(memory.entry_count(), 80)
        self.assertEqual(memory.integrity(), "ok")

    @unittest.skipUnless(hasattr(signal, "SIGKILL"), "there is no SIGKILL here")
    def test_a_kill_in_the_middle_of_a_transaction_loses_that_one_alone(self):
        script = textwrap.dedent("""
            import sys, time
            sys.path.insert(0, sys.argv[1])
            import macrogpt as m
            memory = m.Memory(sys.argv[2])
            memory.set_setting("kept", 1)
            with memory.transaction():
                memory.set_setting("lost", 1)
                memory.save_layers({"base": m.Layer(None, b"x" * 3_000_000)})
                for i in range(200):
                    memory.add_entry("chat", m.Document((f"lost {i}",), True))
                print("now", flush=True)
                time.sleep(60)
            """)
        with subprocess.Popen([sys.executable, "-c", script, ROOT, self.db],
                              stdout=subprocess.PIPE) as process:
            self.assertEqual(process.stdout.readline().strip(), b"now")
            process.kill()
        memory = self.open()
        self.assertEqual(memory.settings(""), {"kept": 1})
        self.assertEqual((memory.entry_count(), memory.layers()), (0, {}))
        self.assertEqual(entries_with(memory, ["lost"]), [])
        self.assertEqual(memory.integrity(), "ok")


class Conversations(MemoryCase):
    def test_a_session_is_made_once_and_keeps_its_id(self):
        memory = self.open()
        first, other = memory.session_id("main"), memory.session_id("../../x")
        self.assertNotEqual(first, other)
        self.assertEqual((memory.session_id("main"), memory.session_id("../../x")), (first, other))
        self.assertEqual([s["name"] for s in memory.sessions()], ["main", "../../x"])

    def test_sessions_tell_their_start_last_word_and_count(self):
        memory = self.open()
        session = memory.session_id("main")
        self.assertEqual(memory.sessions(), [
            {"name": "main", "started_at": 1000.0, "last_at": None, "messages": 0}])
        self.clock.now = 1005.0
        memory.add_message(session, "owner", "hello")
        memory.add_message(session, "self", "hello")
        memory.session_id("other")
        self.assertEqual(memory.sessions()[0], {
            "name": "main", "started_at": 1000.0, "last_at": 1005.0, "messages": 2})

    def test_the_newest_messages_come_oldest_first_and_of_one_session_alone(self):
        memory = self.open()
        here, there = memory.session_id("here"), memory.session_id("there")
        for i in range(5):
            memory.add_message(here, "owner", f"h{i}")
            memory.add_message(there, "self", f"t{i}")
        self.assertEqual(memory.newest_messages(here, 2), [("owner", "h3"), ("owner", "h4")])
        self.assertEqual(len(memory.newest_messages(there, 99)), 5)
        self.assertEqual(memory.newest_messages(there, 0), [])

    def test_messages_come_back_by_id_and_any_text_round_trips(self):
        memory = self.open()
        session = memory.session_id("main")
        ids = [memory.add_message(session, "owner", text) for text in ODD_TEXTS]
        self.assertEqual(len(set(ids)), len(ODD_TEXTS))
        self.assertEqual(memory.message_texts(ids), ODD_TEXTS)

    def test_a_verdict_belongs_to_its_message(self):
        memory = self.open()
        session = memory.session_id("main")
        first, second = (memory.add_message(session, "self", t) for t in "ab")
        memory.judge(first, 1)
        memory.judge(second, -1)
        memory.close()
        self.assertEqual(self.aside(("SELECT text, verdict FROM messages ORDER BY id",)),
                         [("a", 1), ("b", -1)])


class Entries(MemoryCase):
    def test_a_document_told_again_only_becomes_recent(self):
        memory = self.open()
        memory.add_entry("chat", passage("one"))
        memory.add_entry("chat", passage("two"))
        memory.mark_learned([passage("one").key])
        self.clock.now = 2000.0
        memory.add_entry("chat", passage("one"))
        first, second = memory.entries()
        self.assertEqual((first.text, first.told_at, first.learned), ("one\n", 2000.0, True))
        self.assertEqual((second.text, second.told_at, second.learned), ("two\n", 1000.0, False))
        self.assertEqual(len(entries_with(memory, ["one"])), 1)

    def test_the_same_words_from_two_sources_are_two_entries(self):
        memory = self.open()
        for source in ("corpus", "chat", "corpus"):
            memory.add_entry(source, passage("same"))
        self.assertEqual([e.source for e in memory.entries()], ["corpus", "chat"])
        self.assertEqual(memory.entry_keys("corpus"), {passage("same").key})
        memory.remove_entries("corpus", [passage("same").key, 12345])
        self.assertEqual([e.source for e in memory.entries()], ["chat"])

    def test_an_entry_keeps_every_mark_that_it_was_given(self):
        memory = self.open()
        open_ended = m.Document(("H: hi", "A: ho"), False)
        memory.add_entry("corpus", open_ended, recall=False, held_out=True)
        (entry,) = memory.entries()
        self.assertEqual(entry, m.Entry(entry.id, "corpus", open_ended.key, "H: hi\nA: ho\n",
                                        1000.0, False, False, True, False))

    def test_entries_come_in_order_filtered_and_limited(self):
        memory = self.open()
        for i in range(6):
            memory.add_entry("chat" if i % 2 else "taught", passage(str(i)))
        self.assertEqual([e.text for e in memory.entries(limit=2)], ["0\n", "1\n"])
        self.assertEqual([e.text for e in memory.entries("e.source = ?", "chat", limit=2)],
                         ["1\n", "3\n"])

    def test_characters_that_wait_are_counted_by_where_they_come_from(self):
        memory = self.open()
        self.assertEqual(memory.unlearned_chars(), (0, 0))
        memory.add_entry("corpus", passage("1234"))
        memory.add_entry("chat", passage("12"))
        memory.add_entry("taught", passage("1"))
        memory.add_entry("corpus", passage("never counted"), held_out=True)
        self.assertEqual(memory.unlearned_chars(), (5, 5))
        memory.mark_learned([passage("1234").key, passage("12").key])
        self.assertEqual(memory.unlearned_chars(), (0, 2))

    def test_held_out_keys_stay_for_ever_whatever_their_size(self):
        memory = self.open()
        keys = {0, -1, 2 ** 63 - 1, -2 ** 63}
        memory.hold_out(keys, 1)
        memory.hold_out(keys, 2)
        memory.hold_out([], 3)
        memory.close()
        self.assertEqual(self.open().probe_keys(), keys)

    def test_counts_count(self):
        memory = self.open()
        session = memory.session_id("main")
        memory.add_message(session, "owner", "hello")
        memory.add_entry("corpus", passage("a"), held_out=True)
        memory.add_entry("chat", passage("b"))
        memory.add_entry("taught", passage("c"))
        memory.mark_learned([passage("b").key])
        self.assertEqual(memory.counts(), {"messages": 1, "sessions": 1, "entries": 3, "told": 2,
                                           "learned": 1, "held_out": 1})


class Forgetting(MemoryCase):
    def told(self, memory, text):
        """Say a text as the chat does: the message and the entry."""
        session = memory.session_id("main")
        memory.add_message(session, "owner", text)
        memory.add_message(session, "self", "I see.")
        memory.add_entry("chat", passage(text), session)
        return memory.entries("e.source = 'chat'")[-1].id

    def owner_texts(self, memory):
        messages = memory.newest_messages(memory.session_id("main"), 99)
        return [text for role, text in messages if role == "owner"]

    def test_entry_and_message_go_and_do_not_come_back(self):
        for fts in {False, HAS_FTS}:
            with self.subTest(fts=fts):
                memory = self.open(self.path(f"{fts}.db"))
                memory.has_fts = fts
                secret = self.told(memory, "my secret word is xyzzy")
                self.told(memory, "the weather is fine")
                memory.forget_entry(secret)
                self.assertEqual(entries_with(memory, ["xyzzy"]), [])
                self.assertEqual(self.owner_texts(memory), ["the weather is fine"])
                memory.close()
                again = self.open(self.path(f"{fts}.db"))
                self.assertEqual([e.text for e in again.entries()], ["the weather is fine\n"])
                self.assertEqual(entries_with(again, ["xyzzy", "secre"]), [])
                self.assertEqual(self.owner_texts(again), ["the weather is fine"])

    def test_only_the_owners_message_with_exactly_these_words_goes(self):
        memory = self.open()
        entry = self.told(memory, "tea")
        self.told(memory, "tea please")
        memory.forget_entry(entry)
        self.assertEqual(self.owner_texts(memory), ["tea please"])
        self.assertEqual(memory.counts()["messages"], 3)

    def test_forgetting_what_is_not_there_changes_nothing(self):
        memory = self.open()
        self.told(memory, "tea")
        before = memory.counts()
        memory.forget_entry(99999)
        self.assertEqual(memory.counts(), before)


def each_way(test):
    """Run a test of a filled memory by LIKE alone, and by FTS5 where there is one."""
    @functools.wraps(test)
    def both(self):
        for fts in sorted({False, HAS_FTS}):
            with self.subTest(fts=fts):
                test(self, self.filled(fts))
    return both


class Searching(MemoryCase):
    LINES = ("the heron sleeps beside the mill", "a heron and a crane", "copper turns green",
             "Zürich lies on a lake", "trains run on time", "the train was late", "MILL wheels",
             "a hundred % sure", "under_score and back\\slash")

    def filled(self, fts):
        memory = self.open(self.path(f"{fts}.db"))
        memory.has_fts = fts
        for line in self.LINES:
            memory.add_entry("corpus", passage(line))
        return memory

    @each_way
    def test_a_word_is_found_by_its_beginning_whatever_its_case(self, memory):
        for stem, count in (("heron", 2), ("hero", 2), ("mill", 2), ("train", 2),
                            ("trains", 1), ("coppe", 1), ("walru", 0)):
            found = entries_with(memory, [stem])
            self.assertEqual(len(found), count, stem)
            self.assertTrue(all(stem in e.text.lower() for e in found))

    @each_way
    def test_any_of_several_stems_will_do_and_an_entry_comes_once(self, memory):
        found = {e.text.strip() for e in entries_with(memory, ["heron", "mill", "coppe"])}
        self.assertEqual(found, {self.LINES[i] for i in (0, 1, 2, 6)})
        self.assertEqual(len(entries_with(memory, ["heron", "mill", "coppe"])), 4)

    @each_way
    def test_the_limit_limits(self, memory):
        self.assertEqual(len(entries_with(memory, ["heron", "mill", "coppe"], 2)), 2)

    @each_way
    def test_no_stem_finds_nothing(self, memory):
        self.assertEqual(entries_with(memory, []), [])

    @each_way
    def test_what_shall_not_be_recalled_is_no_candidate(self, memory):
        memory.add_entry("chat", passage("is the heron at home?"), recall=False)
        self.assertEqual(len(entries_with(memory, ["heron"])), 2)

    @unittest.skipUnless(HAS_FTS, "this SQLite has no FTS5")
    def test_both_ways_find_the_same_for_simple_words(self):
        plain, full = self.filled(False), self.filled(True)
        words = {s for line in self.LINES for s in m.stems_of(line) if s.isascii() and len(s) > 2}
        self.assertGreater(len(words), 15)
        for word in sorted(words):
            self.assertEqual({e.text for e in entries_with(plain, [word])},
                             {e.text for e in entries_with(full, [word])}, word)
            self.assertEqual(plain.stem_count(word), full.stem_count(word), word)

    @each_way
    def test_a_stem_is_counted_by_the_entries_that_hold_it(self, memory):
        self.assertEqual([memory.stem_count(s) for s in ("heron", "coppe", "walru")], [2, 1, 0])

    @each_way
    def test_no_typed_text_is_ever_a_syntax_error(self, memory):
        rng = random.Random(5)
        signs = ["AND", "OR", "NOT", "NEAR", "(", ")", '"', "'", "*", "^", ":", "-", "+", "{", "}",
                 "\0", "%", "_", "\\", "a", "heron", " ", "\N{GRINNING FACE}", "\u0301", "text",
                 "/", ",", ";", "\n"]
        typed = ODD_TEXTS + ["".join(rng.choices(signs, k=rng.randint(1, 12))) for _ in range(200)]
        for text in typed:
            for stems in ([text], m.stems_of(text), text.split(" ")):
                found = entries_with(memory, stems)
                self.assertTrue(all(isinstance(e, m.Entry) for e in found))
            self.assertGreaterEqual(memory.stem_count(text), 0)
            self.assertIsInstance(m.recall(memory, text, rng), list)
        self.assertEqual(memory.entry_count(), len(self.LINES))

    @each_way
    def test_a_very_long_text_is_searched_for_too(self, memory):
        rng = random.Random(6)
        words = ["w%d" % rng.randrange(10 ** 6) for _ in range(3000)]
        found = entries_with(memory, sorted({*words, "heron"}))
        self.assertEqual(len(found), 2)

    @unittest.skipUnless(HAS_FTS, "this SQLite has no FTS5")
    def test_a_memory_made_with_fts5_lives_without_it_and_is_indexed_anew_where_it_is_back(self):
        class Without(sqlite3.Connection):
            def execute(self, sql, *values):
                if "entries_fts" in sql and "sqlite_master" not in sql:
                    raise sqlite3.OperationalError("no such module: fts5")
                return super().execute(sql, *values)
        connect = sqlite3.connect
        self.filled(True).close()
        with mock.patch.object(sqlite3, "connect", functools.partial(connect, factory=Without)):
            memory = self.open(self.path("True.db"))
        self.assertFalse(memory.has_fts)
        self.assertEqual(self.triggers(memory), set())
        memory.add_entry("corpus", passage("the quince ripens"))
        memory.remove_entries("corpus", [passage(self.LINES[0]).key])
        self.assertEqual(len(entries_with(memory, ["heron", "quinc"])), 2)
        memory.close()
        again = self.open(self.path("True.db"))
        self.assertTrue(again.has_fts)
        self.assertEqual(len(self.triggers(again)), 3)
        self.assertEqual({e.text for e in entries_with(again, ["heron", "quinc"])},
                         {"the quince ripens\n", self.LINES[1] + "\n"})

    @staticmethod
    def triggers(memory):
        rows = memory._rows("SELECT name FROM sqlite_master WHERE type = 'trigger'")
        return {name for name, in rows if name.startswith("entries_")}

    def test_the_wildcards_of_like_are_only_letters(self):
        memory = self.filled(False)
        self.assertEqual([e.text for e in entries_with(memory, ["under_"])],
                         ["under_score and back\\slash\n"])
        for pattern in ("%", "h_ron", "un%score", "\\"):
            self.assertEqual(entries_with(memory, [pattern]), [], pattern)
            self.assertEqual(memory.stem_count(pattern), 0, pattern)

    @each_way
    def test_accents_do_not_matter(self, memory):
        stem = m.stems_of("zurich")[0]
        self.assertEqual([e.text for e in entries_with(memory, [stem])],
                         ["Zürich lies on a lake\n"])

    @each_way
    def test_words_of_other_scripts_are_found_by_their_own_stems(self, memory):
        lost = []
        for line in ("Москва на реке", "какой майор", "η θάλασσα βαθιά", "مرحبا بكم", "नमस्ते दुनिया",
                     "你好 世界", "한국어 공부", "Straße Fuß", "tiếng Việt"):
            memory.add_entry("corpus", passage(line))
            lost += [f"{stem} of {line}" for stem in m.stems_of(line)
                     if line + "\n" not in [e.text for e in entries_with(memory, [stem])]]
        self.assertEqual(lost, [])


class Layers(MemoryCase):
    def test_layers_come_back_whole_and_the_newest_wins(self):
        memory = self.open()
        given = {"base": m.Layer([["w", 2, 3]], bytes(range(256)) * 10),
                 "delta0": m.Layer({"a": None}, b"", True), "tokenizer": m.Layer(None, b"\0")}
        memory.save_layers(given)
        self.assertEqual(memory.layers(), given)
        self.assertEqual(memory.manifests(), {n: layer.manifest for n, layer in given.items()})
        memory.save_layers({"base": m.Layer([], b"new")})
        self.assertEqual(memory.layers()["base"], m.Layer([], b"new", False))
        memory.remove_layers(["base", "delta0", "never there"])
        self.assertEqual(set(memory.layers()), {"tokenizer"})

    def test_a_sealed_layer_is_never_rewritten(self):
        memory = self.open()
        memory.save_layers({"delta0": m.Layer([1], b"first", True)})
        memory.save_layers({"delta0": m.Layer([2], b"second"), "delta1": m.Layer([3], b"x")})
        self.assertEqual(memory.layers()["delta0"], m.Layer([1], b"first", True))
        self.assertIn("delta1", memory.layers())

    def test_the_database_itself_refuses_to_rewrite_a_sealed_layer(self):
        memory = self.open()
        memory.save_layers({"delta0": m.Layer([1], b"first", True)})
        memory.close()
        for change in ("data = x'00'", "sealed = 0", "manifest = '[]'"):
            with self.assertRaisesRegex(sqlite3.Error, "sealed"):
                self.aside((f"UPDATE layers SET {change}",))

    def test_a_flipped_byte_is_noticed_by_name(self):
        memory = self.open()
        memory.save_layers({"base": m.Layer(None, b"\0" * 100), "other": m.Layer(None, b"fine")})
        memory.close()
        self.aside(("UPDATE layers SET data = ? WHERE name = 'base'", b"\0" * 50 + b"\1" + b"\0" * 49))
        memory = self.open()
        for look in (memory.layers, memory.integrity):
            with self.assertRaisesRegex(m.StoreError, "'base'.*damaged"):
                look()

    def test_a_flipped_byte_in_the_file_is_noticed(self):
        memory = self.open()
        memory.save_layers({"base": m.Layer(None, b"needle" * 20_000)})
        memory.close()
        with open(self.db, "r+b") as file:
            at = file.read().rindex(b"needle" * 50)
            file.seek(at)
            file.write(b"N")
        with self.assertRaises(m.StoreError):
            self.open().layers()

    def test_a_broken_manifest_is_a_store_error(self):
        memory = self.open()
        memory.save_layers({"base": m.Layer(None, b"abc")})
        memory.close()
        self.aside(("UPDATE layers SET manifest = '{broken'",))
        with self.assertRaises(m.StoreError):
            self.open().layers()


class Lease(MemoryCase):
    def test_one_holder_at_a_time_until_it_expires(self):
        memory = self.open()

        def take(owner, alive=True):
            return memory.take_lease(owner, 60.0, lambda held: alive)
        self.assertTrue(take("a"))
        self.assertFalse(take("b"))
        self.clock.now += 59.0
        self.assertFalse(take("b"))
        self.assertTrue(take("a"), "the holder may renew")
        self.clock.now += 59.0
        self.assertFalse(take("b"), "renewed, it counts from then")
        self.clock.now += 2.0
        self.assertTrue(take("b"), "expired, it is free")
        self.assertFalse(take("a"))

    def test_a_dead_holder_gives_way_at_once(self):
        memory, asked = self.open(), []
        memory.take_lease("dead", 60.0, lambda owner: True)
        self.assertTrue(memory.take_lease("b", 60.0, lambda owner: asked.append(owner)))
        self.assertEqual(asked, ["dead"])

    def test_only_the_holder_drops_it(self):
        memory = self.open()
        memory.drop_lease("nobody")
        memory.take_lease("a", 60.0, lambda owner: True)
        memory.drop_lease("b")
        self.assertFalse(memory.take_lease("b", 60.0, lambda owner: True))
        memory.drop_lease("a")
        self.assertTrue(memory.take_lease("b", 60.0, lambda owner: True))

    def test_it_outlives_the_process_in_the_file(self):
        self.open().take_lease("a", 60.0, lambda owner: True)
        self.assertFalse(self.open().take_lease("b", 60.0, lambda owner: True))


class Notes(MemoryCase):
    def test_settings_hold_any_json_value_and_the_last_one_wins(self):
        memory = self.open()
        for value in (0, None, "", "ü\n\0", [1, 2.5], {"a": {"b": [None, True]}}, 10 ** 30):
            memory.set_setting("x", value)
            self.assertEqual(memory.setting("x", "default"), value)
        self.assertEqual(memory.setting("y", "default"), "default")
        self.assertIsNone(memory.setting("y"))

    def test_settings_are_listed_by_a_literal_prefix(self):
        memory = self.open()
        for name in ("config.a", "config.b", "configXc", "other", "Config.d", "config."):
            memory.set_setting(name, name)
        self.assertEqual(memory.settings("config."),
                         {"a": "config.a", "b": "config.b", "": "config."})
        memory.set_setting("%_", 1)
        self.assertEqual(memory.settings("%"), {"_": 1})

    def test_progress_keeps_the_newest_oldest_first(self):
        memory = self.open()
        for step in range(5):
            self.clock.now = float(step)
            memory.add_progress(step, 10 * step, None if step == 4 else 3.0, 2.5)
        self.assertEqual([p["step"] for p in memory.progress()], [0, 1, 2, 3, 4])
        self.assertEqual(memory.progress(1), [
            {"at": 4.0, "step": 4, "tokens": 40, "loss": None, "held_out_bpc": 2.5}])

    def test_life_keeps_the_newest_events_with_their_details(self):
        memory = self.open()
        for i in range(3):
            memory.log("event", number=i, words=["ä", None])
        self.assertEqual(memory.life(2), [
            {"at": 1000.0, "event": "event", "number": i, "words": ["ä", None]} for i in (1, 2)])


class Readers(MemoryCase):
    """Which layer has read what, and what layers are to unlearn."""

    def setUp(self):
        super().setUp()
        self.memory = self.open()

    def tell(self, text, layer=None, source="chat", held_out=False):
        self.memory.add_entry(source, passage(text), held_out=held_out)
        if layer is not None:
            self.memory.mark_trained(layer)

    def test_an_entry_knows_the_first_layer_that_read_it(self):
        self.tell("a ruby", 0)
        self.tell("an amber", 3)
        self.memory.mark_trained(5)
        for text in ("a ruby", "an amber"):
            self.memory.remove_entries("chat", [passage(text).key])
        self.assertEqual(sorted(self.memory.to_unlearn()), [(0, 7, False), (3, 9, False)])

    def test_what_no_layer_has_read_is_not_to_be_unlearned(self):
        self.tell("a ruby")
        self.tell("an amber", 1, held_out=True)
        self.memory.remove_entries("chat", [passage("an amber").key])
        self.tell("a quartz")
        self.memory.remove_entries("chat", [passage("a quartz").key])
        self.assertEqual(self.memory.to_unlearn(), [])

    def test_what_is_known_from_elsewhere_is_not_to_be_unlearned(self):
        self.tell("a ruby", 2)
        self.tell("a ruby", 2, source="corpus")
        self.memory.remove_entries("chat", [passage("a ruby").key])
        self.assertEqual(self.memory.to_unlearn(), [])

    def test_without_some_layers_what_they_learned_waits_and_what_others_learned_does_not(self):
        for layer, text in enumerate(("a ruby", "an amber", "a quartz", "an opal")):
            self.tell(text, layer)
            self.memory.mark_learned([passage(text).key], layer)
        self.tell("a pearl", 1)  # read by one layer and learned by a later one
        self.memory.mark_learned([passage("a pearl").key], 2)
        self.memory.remove_entries("chat", [passage("an opal").key])
        self.memory.unlearn_from(2)
        self.assertEqual([e.text for e in self.memory.entries("NOT learned")],
                         ["a quartz\n", "a pearl\n"])
        self.assertEqual(self.memory.to_unlearn(), [])

    def test_a_copied_layer_is_sealed_like_the_first(self):
        layer = m.Layer([1], b"weights", True)
        self.memory.save_layers({"delta0": layer})
        self.memory.copy_layers({"delta0": "old.delta0"})
        self.assertEqual(self.memory.layers(), {"delta0": layer, "old.delta0": layer})


if __name__ == "__main__":
    unittest.main()
