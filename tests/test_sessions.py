"""Claims about sessions: what a prompt is made of, compaction, forgetting, and a new start."""
import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import unittest
from unittest import mock

import macrogpt as m
from support import ROOT, Folder, entries_with, run_inside

BUDGET = 300
SIGKILL = hasattr(signal, "SIGKILL")


def spoken(*pairs, verdict=0, stage=m.KEPT):
    """Return messages, owner and self in turn; None leaves one out."""
    texts = [text for pair in pairs for text in pair]
    return [m.Message(i, 1, ("owner", "self")[i % 2], text, float(i), verdict, stage)
            for i, text in enumerate(texts) if text is not None]


def passage(*lines):
    return m.Document(lines, True)


def entry(text, number=1):
    return m.Entry(number, "chat", number, text, 0.0, True, True, False, False)


class Prompts(unittest.TestCase):
    """With byte tokens, so that a token is a character."""

    def shown(self, summary=(), entries=(), turns=(), text="now?", budget=BUDGET):
        tokenizer = m.EvolvingTokenizer()
        ids = m.whole_prompt_ids(tokenizer, summary, entries, turns, text, budget)
        self.assertLessEqual(len(ids), budget)
        self.assertEqual(ids[0], m.END_OF_TEXT)
        return "".join("|" if i == m.END_OF_TEXT else tokenizer.decode([i]) for i in ids)

    def test_an_entry_is_a_document_and_the_summary_begins_the_exchange_as_in_training(self):
        shown = self.shown(spoken(("I live in Tartu.", None), ("Is it far?", "No.")),
                           [entry("H: Hello.\nA: Hi.\n"), entry("The ferry is late.\n")],
                           [("owner", "hm"), ("self", "Yes?")])
        self.assertEqual(shown, "|The ferry is late.\n|H: Hello.\nA: Hi.\n|H: I live in Tartu.\n"
                                "H: Is it far?\nA: No.\nH: hm\nA: Yes?\nH: now?\nA:")

    def test_without_summary_and_entries_it_is_the_newest_turns_alone(self):
        turns = [("owner", f"number {i}") for i in range(60)]
        tokenizer = m.EvolvingTokenizer()
        for budget in (8, 40, 200):
            self.assertEqual(m.whole_prompt_ids(tokenizer, [], [], turns, "now?", budget),
                             m.prompt_ids(tokenizer, turns, "now?", budget))

    def test_the_newest_exchange_goes_in_before_everything_else(self):
        summary, entries = spoken(("I am old.", None)), [entry("The ferry is late.\n")]
        turns = [("owner", "older"), ("self", "older too"), ("owner", "x" * 60), ("self", "y" * 60)]
        for budget in range(140, 260, 5):
            shown = self.shown(summary, entries, turns, budget=budget)
            self.assertIn(f"H: {'x' * 60}\nA: {'y' * 60}\nH: now?\nA:", shown)
        self.assertIn("I am old.", shown)
        self.assertIn("ferry", shown)

    def test_summary_and_entries_go_in_before_older_turns(self):
        turns = [("owner" if i % 2 == 0 else "self", f"{i} " + "z" * 20) for i in range(40)]
        shown = self.shown(spoken(("I am old.", None)), [entry("The ferry is late.\n")], turns)
        self.assertIn("I am old.", shown)
        self.assertIn("The ferry is late.", shown)
        self.assertIn(f"{turns[-3][1]}\n", shown)
        self.assertNotIn(f"{turns[0][1]}\n", shown)

    def test_summary_and_entries_are_each_sure_of_a_share_and_take_what_the_other_leaves(self):
        summary = spoken(*((f"My fact {i:2} is this.", None) for i in range(20)))
        entries = [entry(f"The entry {i:2} is this.\n", i) for i in range(20)]
        both = self.shown(summary, entries)
        one, other = self.shown(summary), self.shown(entries=entries)
        for shown, word, least in ((both, "fact", 3), (both, "entry", 3), (one, "fact", 7),
                                   (other, "entry", 7)):
            self.assertGreaterEqual(shown.count(word), least)
        self.assertIn("fact 19", both, "of a summary the newest")
        self.assertIn("entry  0", both, "of entries the best")

    def test_an_entry_that_fits_twice_comes_once(self):
        self.assertEqual(self.shown(entries=[entry("Tea.\n"), entry("Tea.\n")]).count("Tea"), 1)

    def test_the_budget_is_never_exceeded_and_counted_in_real_tokens(self):
        rng = random.Random(5)
        tokenizer = m.EvolvingTokenizer()
        tokenizer.learn_merges(["the heron sleeps by the mill and the crane does not"] * 9, 40)
        words = ["heron", "ü", "你好", "\N{GRINNING FACE}", "the mill", "\n", "", "A:", "H: x"]

        def some(most):
            return " ".join(rng.choices(words, k=rng.randint(0, most)))
        for _ in range(300):
            budget = rng.randint(8, 120)
            ids = m.whole_prompt_ids(
                tokenizer, spoken(*((some(9), rng.choice([None, some(9)])) for _ in range(4))),
                [entry(some(9) + "\n") for _ in range(3)],
                [(rng.choice(("owner", "self")), some(6)) for _ in range(rng.randint(0, 8))],
                some(rng.choice((3, 60))), budget)
            self.assertLessEqual(len(ids), budget)
            self.assertEqual(ids[0], m.END_OF_TEXT)


class Summaries(unittest.TestCase):
    def setUp(self):
        self.memory = m.Memory(":memory:")
        self.addCleanup(self.memory.close)
        for i in range(40):
            self.memory.add_entry("corpus", passage(f"so it is what you do and that is {i}"))

    def summed(self, *pairs, chars=30, verdict=0):
        parts = m.summary_of(self.memory, m.exchanges_of(spoken(*pairs, verdict=verdict)), chars)
        return [[x.text for x in part] for part in parts]

    def test_rare_words_tell_more_than_common_ones(self):
        talk = [("so that is what it is", "Yes."), ("The ferryman hid a ruby", "I see."),
                ("and what you do is so", "Yes.")]
        for order in itertools.permutations(talk):
            self.assertEqual(self.summed(*order), [["The ferryman hid a ruby"]])

    def test_what_the_owner_states_tells_more_than_what_is_asked_and_answered(self):
        self.assertEqual(self.summed(("A heron nests here.", "Oh."), ("Any ruby hid?", "Zinc!")),
                         [["A heron nests here."]])

    def test_a_question_stays_with_its_answer_and_means_nothing_without_one(self):
        asked = ("Where is the heron?", "At the mill.")
        self.assertEqual(self.summed(asked, chars=60), [list(asked)])
        self.assertEqual(self.summed(asked, chars=60, verdict=-1), [])
        self.assertEqual(self.summed(("Where is the heron?", m.UNKNOWN_REPLY), chars=60), [])
        self.assertEqual(self.summed(("Where is the heron?", None), chars=60), [])

    def test_a_long_fact_is_not_crowded_out_by_short_talk(self):
        fact = "The ferryman hid a ruby by the mill in Ghent"
        self.assertEqual(self.summed(("hm well", "Oh."), (fact, "Oh."), chars=50), [[fact]])

    def test_what_is_hardly_a_word_tells_nothing_unless_its_letters_are_words(self):
        self.assertEqual(self.summed(("hm", "Yes."), ("ok.", "Yes.")), [])
        self.assertEqual(self.summed(("我住塔林", "Yes.")), [["我住塔林"]])

    def test_of_two_that_tell_alike_the_newer_is_kept(self):
        self.assertEqual(self.summed(("The ruby is in Ghent", "Oh."), ("The ruby is in Delft", "Oh.")),
                         [["The ruby is in Delft"]])

    def test_the_same_said_again_is_summed_up_once(self):
        self.assertEqual(len(self.summed(*[("The heron hid a ruby.", "Oh.")] * 9, chars=500)), 1)

    def test_no_score_is_too_low_where_there_is_room(self):
        self.assertEqual(self.summed(("so it is", "Yes.")), [["so it is"]])
        self.memory.remove_entries("corpus", self.memory.entry_keys("corpus"))
        self.assertEqual(self.summed(("so it is", "Yes.")), [["so it is"]])

    def test_a_statement_longer_than_the_summary_is_cut_and_kept(self):
        told = "The heron hid a ruby by the mill " * 40
        for chars in (8, 30, 100):
            self.assertEqual(self.summed((told, "Oh."), chars=chars), [[told]])
            part = m.exchange_text(spoken((told, None)), chars)
            self.assertLessEqual(len(part), chars + len("H: \n"))

    def test_it_never_grows_beyond_its_room(self):
        rng = random.Random(2)
        pairs = [(" ".join(rng.choices(["ruby", "heron", "mill", "Ghent", "zinc", "so"], k=6))
                  + f" {i}" + rng.choice("?."), f"answer {i}") for i in range(250)]
        for chars in (16, 48, 200):
            parts = m.summary_of(self.memory, m.exchanges_of(spoken(*pairs)), chars)
            self.assertTrue(parts)
            self.assertLessEqual(sum(len(m.exchange_text(p, chars)) for p in parts), chars + 8)


class Talk(unittest.TestCase):
    """An organism in memory alone, whose replies are made up."""

    def setUp(self):
        self.now = 1000.0
        self.memory = m.Memory(":memory:", lambda: self.now)
        self.addCleanup(self.memory.close)
        self.being = self.organism()
        self.session = self.memory.session_id("main")

    def organism(self, session="main"):
        being = m.Organism(m.Config(), self.memory, m.interpreted_engine(), session)
        being._answer = lambda text, *rest: iter([f"Well, {len(text)}."])
        return being

    def say(self, *texts):
        for text in texts:
            self.now += 60.0
            "".join(self.being.reply(text))

    def summary(self):
        return [message.text for message in self.being.summary()]

    def in_prompt(self):
        return [message.text for message in self.memory.prompt_messages(self.session)]

    def test_a_session_that_outgrows_its_window_is_compacted_by_itself_and_every_word_stays(self):
        told = [f"The number {i} boat is called {i * 7919 % 1000}." for i in range(250)]
        room = self.being.prompt_budget() // m.SHARE * m.CHARS_A_TOKEN + 8
        for i, text in enumerate(told):
            self.say(text)
            self.assertLessEqual(len(self.in_prompt()), 8)
            parts = m.summary_texts(self.being.summary(), self.being.prompt_budget())
            self.assertLessEqual(len("".join(parts)), room)
            self.assertEqual(i > 0, bool(parts))
        said = self.memory.newest_messages(self.session, 1000)
        self.assertEqual([text for role, text in said if role == "owner"], told)
        self.assertEqual(len(said), 500)
        self.assertEqual([e.text.strip() for e in self.memory.entries()], told)

    def test_the_newest_exchange_is_never_summed_up(self):
        for _ in range(5):
            self.say("x" * 3000)
            self.assertEqual(self.in_prompt()[-2:], ["x" * 3000, "Well, 3000."])
        self.being.compact(self.session)
        self.assertEqual(self.in_prompt()[-2:], ["x" * 3000, "Well, 3000."])

    def test_it_can_be_compacted_again_and_again(self):
        for i in range(6):
            self.say(f"The {i} heron eats.", f"The {i} crane sleeps.", f"The {i} owl sings.")
            self.being.compact(self.session)
            self.assertEqual(self.in_prompt()[-2:], [f"The {i} owl sings.", "Well, 16."])
            self.assertTrue(self.summary())
        before = self.in_prompt()
        for _ in range(3):
            self.assertEqual(self.being.compact(self.session), 0)
            self.assertEqual(self.in_prompt(), before)

    def test_an_empty_session_can_be_compacted(self):
        self.assertEqual((self.being.compact(self.session), self.in_prompt()), (0, []))

    def test_what_no_crash_let_become_an_entry_is_one_before_it_is_summed_up_every_time(self):
        for i in range(6):
            self.memory.add_message(self.session, "owner", f"The {i} heron eats {i * i} frogs.")
            self.say("hm", "well")
            self.assertTrue(self.memory.entries("e.text = ?", f"The {i} heron eats {i * i} frogs.\n"))
            self.memory.add_message(self.session, "owner", f"The {i} crane has a ruby.")
            self.being.compact(self.session)
            self.assertTrue(self.memory.entries("e.text = ?", f"The {i} crane has a ruby.\n"))

    def test_what_a_crash_left_in_another_session_is_known_at_the_next_word(self):
        self.memory.add_message(self.memory.session_id("old"), "owner", "The heron hid a ruby.")
        self.say("hm")
        self.assertEqual(len(entries_with(self.memory, ["ruby"])), 1)

    def test_facts_come_first_and_where_they_cannot_be_kept_nothing_is_summed_up(self):
        self.say("The heron eats.", "The crane sleeps.")
        self.memory.add_message(self.session, "owner", "The owl hid a ruby.")
        self.memory.add_message(self.session, "self", "Oh.")
        before, summary = self.in_prompt(), self.summary()
        with mock.patch.object(self.memory, "add_entry", side_effect=m.StoreError("full")):
            with self.assertRaises(m.StoreError):
                self.being.compact(self.session)
        self.assertEqual(self.in_prompt(), before)
        self.assertEqual(self.summary(), summary)
        self.assertEqual(len(self.memory.heard_messages()), 2)

    def test_compaction_dates_no_old_fact_anew(self):
        self.say("The ferry leaves at seven.", "The ferry leaves at nine.")
        before = [(e.text, e.told_at) for e in self.memory.entries()]
        for _ in range(5):
            self.say("The ferry leaves at nine, really.")
            self.being.compact(self.session)
        self.assertEqual([(e.text, e.told_at) for e in self.memory.entries()][:2], before)

    def test_what_a_crash_left_is_dated_when_it_was_said(self):
        self.memory.add_message(self.session, "owner", "The ferry leaves at seven.")
        self.now += 500.0
        self.say("The ferry leaves at nine.")
        old, new = self.memory.entries()
        self.assertEqual((old.told_at, new.told_at), (1000.0, 1560.0))

    def test_what_a_crash_left_makes_no_fact_older_that_was_told_again_since(self):
        self.memory.add_message(self.session, "owner", "The ferry leaves at nine.")
        self.memory.add_entry("chat", passage("The ferry leaves at nine."), told_at=5000.0)
        self.say("hm")
        self.assertEqual(self.memory.entries(limit=1)[0].told_at, 5000.0)

    def test_old_turns_are_never_met_as_new_ones(self):
        met = []
        self.being._answer = lambda text, turns, rng: met.append(turns) or iter(["Yes."])
        for i in range(40):
            summary = set(self.summary())
            self.say(f"The heron number {i} eats.")
            if i % 7 == 0:
                self.being.compact(self.session)
            turns = [text for _, text in met[-1] if text != "Yes."]
            self.assertEqual(turns, sorted(set(turns), key=lambda t: int(t.split()[3])))
            self.assertFalse(set(turns) & summary)
            if i:
                self.assertEqual(turns[-1], f"The heron number {i - 1} eats.")
        self.assertEqual(self.memory.entry_count(), 40)

    def test_a_prompt_is_made_of_the_summary_what_fits_and_the_newest_turns(self):
        self.say("The heron hid a ruby.", "so it is", "The crane sleeps.", "Well?")
        self.being.compact(self.session)
        self.memory.add_entry("chat", passage("Otters swim."))
        seen = []
        with mock.patch.object(m, "spoken", lambda model, tokenizer, ids, *rest:
                               seen.append(tokenizer.decode(ids)) or iter(["Oh."])):
            self.being.config = m.Config().replace(["block_size=400"])
            "".join(self.being._model_pieces(
                "hm", [("owner", "Well?"), ("self", "Well, 5.")],
                self.memory.entries("e.text = 'Otters swim.\n'"), random.Random(1)))
        self.assertTrue(seen[0].endswith("H: Well?\nA: Well, 5.\nH: hm\nA:"), seen)
        self.assertIn("Otters swim.\n", seen[0])
        self.assertIn("\nH: ", seen[0])
        self.assertIn("heron hid a ruby.\n", seen[0])

    def test_a_single_word_and_a_long_question_still_find_what_was_summed_up(self):
        self.say("The heron hid a ruby.", *(f"Small talk number {i}." for i in range(30)))
        for asked in ("ruby", "Could you perhaps tell whether any emerald or ruby lies about?"):
            self.assertIn("The heron hid a ruby.\n", [e.text for e in m.search(self.memory, asked)])

    def test_a_new_session_starts_clean_and_still_knows_everything(self):
        self.say("The heron hid a ruby.", "hm", "well", "so")
        before = self.memory.counts()
        self.being.session = "talk 1"
        session = self.memory.session_id("talk 1")
        self.assertEqual((self.summary(), self.memory.prompt_messages(session)), ([], []))
        self.assertTrue(m.search(self.memory, "ruby"))
        self.assertEqual(self.memory.counts(), {**before, "sessions": 2})
        self.say("Otters swim.")
        self.being.session = "main"
        self.assertIn("The heron hid a ruby.", self.in_prompt())
        self.assertNotIn("Otters swim.", self.in_prompt())

    def forget(self, text):
        self.assertIn("forgotten", m.forget(self.memory, text))

    def test_what_is_forgotten_is_gone_from_summaries_and_turns_and_never_comes_back(self):
        self.say("The heron hid a ruby.", "hm", "The crane eats.", "The heron's ruby is red, isn't it?")
        self.being.compact(self.session)
        self.assertIn("The heron hid a ruby.", self.summary())
        self.forget("The heron hid a ruby.")
        for i in range(12):
            self.assertNotIn("ruby", " ".join(self.in_prompt()))
            self.assertFalse(self.memory.entries("e.text = 'The heron hid a ruby.\n'"))
            self.say(f"so {i}")
            self.being.compact(self.session)
        self.assertTrue(self.in_prompt())

    def test_a_reply_that_repeats_what_is_forgotten_is_no_part_of_any_prompt(self):
        self.say("The crane eats.")
        for text in ("My cat is called Biscuit.", "What is my cat called?"):
            self.being._answer = lambda *_: iter(["Your cat is called Biscuit, I think."])
            self.say(text)
        self.forget("My cat is called Biscuit.")
        self.assertEqual(self.in_prompt(), ["The crane eats."])
        self.assertEqual(len(self.memory.newest_messages(self.session, 99)), 5)

    def test_an_approved_reply_and_the_same_words_taught_do_not_bring_it_back(self):
        self.being._answer = lambda *_: iter(["Your cat is called Biscuit, I think."])
        self.say("My cat is called Biscuit.", "What is my cat called?")
        self.being.judge(True)
        self.being._answer = lambda *_: iter(["Your dog is called Rex."])
        self.say("What is my dog called?")
        self.being.judge(True)
        self.being.teach("My cat is called Biscuit.")
        first = self.memory.entries("e.source = 'chat'", limit=1)[0]
        self.forget(str(first.id))
        self.assertEqual([e.text for e in m.search(self.memory, "Biscuit")], [])
        self.assertEqual(len(m.search(self.memory, "Rex")), 1)

    def test_what_is_forgotten_before_a_crash_is_mended_stays_forgotten(self):
        self.say("The heron hid a ruby.")
        self.memory.add_message(self.session, "owner", "The heron hid a ruby.")
        self.forget("The heron hid a ruby.")
        self.say("hm")
        self.being.compact(self.session)
        self.assertFalse(m.search(self.memory, "ruby"))

    def test_a_message_that_was_forgotten_by_an_older_version_stays_so(self):
        with contextlib.closing(sqlite3.connect(":memory:")) as db:
            db.executescript(m.MIGRATIONS[0])
            db.execute("INSERT INTO sessions VALUES (1, 'main', 0)")
            db.execute("INSERT INTO messages VALUES (1, 1, 'owner', 'The heron hid a ruby.', 0, 0)")
            for script in m.MIGRATIONS[1:]:
                db.executescript(script)
            db.execute("PRAGMA user_version = %d" % len(m.MIGRATIONS))
            db.commit()
            with mock.patch.object(m, "_connect", lambda path: db):
                self.memory = m.Memory(":memory:")
            db.isolation_level = None
            self.being = self.organism()
            self.say("hm")
            self.assertEqual(self.memory.entry_count(), 1)
            self.assertIn("The heron hid a ruby.", self.in_prompt())


class Processes(Folder, unittest.TestCase):
    def chat(self, *lines, session="main"):
        done = run_inside("--no-train", "--session", session, cwd=self.folder,
                          stdin="".join(line + "\n" for line in lines).encode())
        self.assertEqual(done.returncode, 0, done.stderr)
        said = done.stdout.decode().splitlines()
        self.assertEqual(len(said), len(lines))
        return said

    def messages(self):
        done = run_inside("sessions", "--json", cwd=self.folder)
        return {s["name"]: s["messages"] for s in json.loads(done.stdout)["sessions"]}

    def test_compact_says_what_it_did_and_can_be_said_again_in_any_session(self):
        outer, self.folder = self.folder, self.path("deep", "inner")
        os.makedirs(self.folder)
        for session in ("main", "../../x"):
            said = self.chat("/compact", "The ferryman's parrot is called Zephyrine.",
                             "Copper pots are heavy.", "/compact", "/compact", session=session)
            self.assertIn("empty", said[0])
            self.assertIn("H: The ferryman's", said[3])
            self.assertIn("no turns", said[4])
            again = self.chat("/compact", session=session)
            self.assertEqual(again[0].partition(";")[2], said[4].partition(";")[2])
        self.assertEqual(self.messages(), {"main": 4, "../../x": 4})
        files = {name for _, _, names in os.walk(outer) for name in names}
        self.assertEqual(files, {"nonames.txt", "memory.sqlite3"})

    def test_told_compacted_and_left_behind_by_new_it_still_answers_until_it_is_forgotten(self):
        fact = "The ferryman's parrot is called Zephyrine."
        self.chat(fact, *(f"Small talk number {i}." for i in range(9)), "/compact", "/new")
        said = self.chat("What is the ferryman's parrot called?", session="talk 1")
        self.assertIn("Zephyrine", said[0])
        self.assertIn("forgotten", self.chat(f"/forget {fact}", session="talk 1")[0])
        for session in ("main", "talk 1"):
            said = self.chat("What is the ferryman's parrot called?", "hm", "/compact", "/compact",
                             session=session)
            self.assertNotIn("Zephyrine", " ".join(said))

    KILLED = textwrap.dedent("""
        import sys, time
        sys.path.insert(0, sys.argv[1])
        import macrogpt as m
        memory = m.Memory(sys.argv[2])
        being = m.Organism(m.Config(), memory, m.interpreted_engine())
        session = memory.session_id("main")
        being._answer = lambda *_: iter(["Oh."])
        being._after_turn = lambda session: None
        for i in range(16):
            "".join(being.reply(f"The heron number {i} hid a ruby."))
        memory.add_message(session, "owner", "The crane left in a crash.")
        advance = memory.advance_messages
        def slow(ids, stage):
            advance(ids, stage)
            if stage == int(sys.argv[3]):
                print("now", flush=True)
                time.sleep(60)
        memory.advance_messages = slow
        being.compact(session)
        print("done", flush=True)
        time.sleep(60)
        """)

    def killed_at(self, stage):
        """Kill a compaction once messages came to a stage; return stages, and texts of entries."""
        self.db = self.path(f"{stage}.db")
        with subprocess.Popen([sys.executable, "-c", self.KILLED, ROOT, self.db, str(stage)],
                              stdout=subprocess.PIPE) as process:
            self.assertIn(process.stdout.readline().strip(), (b"now", b"done"))
            process.kill()
        memory = m.Memory(self.db)
        self.addCleanup(memory.close)
        self.assertEqual(memory.integrity(), "ok")
        stages = [row[0] for row in memory._rows("SELECT stage FROM messages ORDER BY id")]
        self.assertEqual(len(stages), 33)
        return stages, len(entries_with(memory, ["crane"]))

    @unittest.skipUnless(SIGKILL, "there is no SIGKILL here")
    def test_after_a_kill_in_the_middle_the_session_is_as_before_or_compacted_never_half(self):
        before = [m.KEPT] * 30 + [m.HEARD] * 3
        for stage in (m.KEPT, m.SUMMED, m.ARCHIVED):
            stages, found = self.killed_at(stage)
            self.assertEqual((stages, found), (before, 0), stage)
        stages, found = self.killed_at(-1)
        self.assertEqual(found, 1)
        self.assertLessEqual(set(stages[:-1]), {m.SUMMED, m.ARCHIVED})
        self.assertEqual(stages[-1], m.KEPT)

    @unittest.skipUnless(SIGKILL, "there is no SIGKILL here")
    def test_a_chat_killed_again_and_again_loses_no_answered_word_and_meets_none_twice(self):
        told = []
        for i in range(4):
            process = self.start_here("--no-train", "--db", self.db, bufsize=0)
            for j in range(4):
                told.append(f"The number {4 * i + j} boat is called {7919 * (4 * i + j) % 1000}.")
                process.stdin.write(told[-1].encode() + b"\n")
                self.assertTrue(process.stdout.readline())
            process.kill()
            process.wait()
        self.chat("hm")
        with contextlib.closing(m.Memory(self.db)) as memory:
            said = memory.newest_messages(memory.session_id("main"), 99)
            self.assertEqual([text for role, text in said if role == "owner"], [*told, "hm"])
            self.assertLessEqual(len(memory.prompt_messages(1)), 8)
            self.assertEqual([e.text.strip() for e in memory.entries("e.source = 'chat'")],
                             [*told, "hm"])


if __name__ == "__main__":
    unittest.main()
