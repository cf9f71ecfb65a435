"""The organism: what is due and done, what survives, and what is learned while it speaks.

Most children here are made of the same parts as a real one, but work in the loop that waits for
their frames; where a process matters, it is one.
"""
import asyncio
import concurrent.futures
import dataclasses
import io
import os
import re
import signal
import sqlite3
import subprocess
import threading
import time
from unittest import mock

import macrogpt as m
from support import CORPUS, Folder, engine_in_use, set_words

TINY = ("n_layer=1", "n_embd=8", "n_head=1", "block_size=24", "warmup_steps=12", "eval_steps=4",
        "micro_steps=3", "batch_size=2", "delta_rank=2", "burst_passes=1", "mix_passes=1",
        "eval_chars=300", "min_merge_chars=1000000", "tick_seconds=0.05", "commit_seconds=0.1",
        "unlearn_seconds=0", "max_gen_tokens=8")
LONG = ("warmup_steps=100000", "warmup_epochs=100000", "patience=100000")
ASKED, KNOWN = "Where does the heron sleep?", "The heron sleeps beside the mill pond."
QUARTZ = "The quartz lamp stands in the window."
SECRET = "Quartz wolves hum zigzag jokes."


class ChildHere:
    """Stands for the trainer's process: its steps are done where the parent waits for frames."""

    def __init__(self, home):
        self.stdin = self.stdout = self
        self.home, self.buffer, self.dead, self.resting = home, bytearray(), False, False
        self.frames = []  # (what the parent wants, bytes)
        self.child = m.TrainerChild(None, None, engine_in_use())
        self.child._send = self.send
        self.send("ready", notices=[], engine="python")

    def send(self, kind, **message):
        self.buffer += m.pack_frame({"kind": kind, **message})

    def write(self, frame):
        message = m.read_frame(io.BytesIO(frame))
        what = message.pop("do")
        self.frames.append((what, len(frame)))
        self.resting = what == "rest"
        if what == "stop":
            with mock.patch.object(os, "_exit"):
                self.child._leave()
            self.dead = True
        elif what not in ("rest", "go on"):
            getattr(self.child, "on_" + what)(**message)

    async def readexactly(self, count):
        while len(self.buffer) < count:
            if self.dead:
                raise asyncio.IncompleteReadError(b"", count)
            job = self.child.job or self.child.birth
            self.home.held = job is not None and self.home.hold(self.child)
            if job is None or self.resting or self.home.held:
                await asyncio.sleep(0.002)
            else:
                self.child._advance(job)
                await asyncio.sleep(0)
        found = bytes(self.buffer[:count])
        del self.buffer[:count]
        return found

    def kill(self):
        self.dead = True
        self.buffer.clear()

    close = terminate = lambda self: None

    async def wait(self):
        return -9


class Reader(Folder):
    """A test-case mixin: a folder with a corpus, and tiny organisms that live in it."""

    def organism(self, *more):
        config = m.Config().replace([*TINY, f"corpus_path={self.corpus}", f"db_path={self.db}",
                                     *more])
        being = m.Organism(config, self.kept(config.db_path), engine_in_use())
        self.addCleanup(being.sleep)
        return being

    def begun(self):
        """Return one in the midst of a long birth."""
        being = self.organism(*LONG)
        being.awake()
        being.learn_now()
        self.until(lambda: being.growth.step > 2)
        return being


class Home(Reader):
    """A test-case mixin: organisms whose children work within them."""

    def setUp(self):
        super().setUp()
        self.children, self.hold, self.held = [], lambda child: False, False

        async def create(*args, **options):
            self.children.append(ChildHere(self))
            return self.children[-1]
        self.patch(asyncio, "create_subprocess_exec", create)

    def grown(self, *more):
        being = self.organism(*more)
        being.awake()
        self.learn(being)
        return being

    def learn(self, being):
        ends = time.monotonic() + 30.0
        being.learn_now()
        being.wait_trained(lambda: self.assertLess(time.monotonic(), ends))

    def held_in(self, hold):
        self.hold = hold
        self.until(lambda: self.held)

    def held_in_rebirth(self, steps, idle=False):
        """Hold it once the next generation has come so far, with nothing else to do if idle."""
        self.held_in(lambda child: child.birth is not None and child.birth.done_steps >= steps
                     and not (idle and child.job))

    def release(self):
        self.hold = lambda child: False

    def append(self, text):
        with open(self.corpus, "a", encoding="utf-8") as file:
            file.write("\n" + text + "\n")

    def rewrite(self, text):
        self.write("other.txt", text)
        os.replace(self.path("other.txt"), self.corpus)

    def say(self, being, text):
        return "".join(being.reply(text))

    def events(self, being, *kinds):
        return [e["event"] for e in being.memory.life(1000) if not kinds or e["event"] in kinds]

    def unread(self, being):
        return being.memory.entries("layer IS NULL AND training AND NOT held_out")

    def quartz(self, being):
        """Return what a delta has learned of the quartz."""
        return being.memory.entries("text LIKE '%quartz%' AND layer = 1")


class Life(Home):
    def test_one_new_line_is_learned_at_once_and_sends_the_child_that_line_alone(self):
        being = self.grown()
        del self.children[-1].frames[:]
        self.append(QUARTZ)
        self.until(lambda: self.quartz(being))
        sent = self.children[-1].frames
        self.assertEqual([what for what, _ in sent], ["text", "learn"])
        self.assertLess(sum(size for _, size in sent), 1000)
        self.assertEqual(len(self.children), 1)
        self.until(lambda: any("learned 1 new line" in notice for notice in being.notices))
        before, now = map(float, re.findall(r"[\d.]+(?= →| bits)", being.notices[-1]))
        self.assertLess(now, before, "bits per character of that line")

    def test_lines_that_a_rename_took_leave_the_memory_and_a_vanished_corpus_takes_nothing(self):
        being = self.grown()
        self.rewrite(CORPUS.replace("The ferry leaves at seven.", "A cat lies on the wall."))
        self.until(lambda: being.memory.entries("text LIKE '%cat lies%'"))
        self.assertFalse(being.memory.entries("text LIKE '%ferry leaves%'"))
        count = being.memory.entry_count()
        os.unlink(self.corpus)
        time.sleep(0.12)
        self.assertEqual(being.memory.entry_count(), count)
        self.assertFalse(os.path.exists(self.corpus))

    def test_a_memory_that_was_locked_for_a_while_is_learned_into_again(self):
        being = self.grown()
        self.patch(m, "LISTEN_SECONDS", 0.1)
        locked = sqlite3.connect(self.db, isolation_level=None)
        self.addCleanup(locked.close)
        being.memory._db.execute("PRAGMA busy_timeout = 50")
        locked.execute("BEGIN EXCLUSIVE")
        self.append(QUARTZ)
        self.until(lambda: any("locked" in notice for notice in being.notices))
        locked.execute("ROLLBACK")
        self.until(lambda: self.quartz(being))

    def test_what_is_said_adds_up_until_it_is_enough_and_is_never_dropped(self):
        being = self.grown("min_new_chars_to_train=60")
        step = being.growth.step
        self.say(being, "The lamp is old.")
        time.sleep(0.12)
        self.assertEqual(being.growth.step, step)
        self.assertEqual(being.memory.unread_chars(), (0, len("The lamp is old.\n")))
        self.say(being, "It stands in the window beside the garden door.")
        self.until(lambda: being.memory.unread_chars() == (0, 0))
        self.say(being, "It is old.")
        self.learn(being)  # waiting learns what is there, however little
        self.assertEqual(being.memory.unread_chars(), (0, 0))

    def test_one_who_talks_on_and_on_does_not_keep_it_from_learning(self):
        being = self.grown("micro_steps=40", "min_new_chars_to_train=1")
        self.append(QUARTZ)
        some = (f"I like the number {i} and the letter after it." for i in range(10 ** 6))
        self.until(lambda: self.say(being, next(some)) and self.quartz(being))

    def test_only_one_of_two_organisms_trains_one_memory(self):
        one, two = self.grown(), self.organism()
        two.trainer._owner = m.socket.gethostname() + ":1"
        self.assertTrue(two.trainer.barred())
        self.hold = lambda child: True
        self.append(QUARTZ)
        two.awake()
        self.until(lambda: any("another macrogpt" in notice for notice in two.notices))
        self.assertEqual(len(self.children), 1)
        one.sleep()
        self.assertTrue(two.memory.take_lease(two.trainer._owner, 10.0, lambda owner: True))

    def test_held_out_documents_are_probes_for_life_and_never_trained_on(self):
        def some(what):
            return "".join(f"\nThe {what} {i} stands alone.\n" for i in range(60))
        self.rewrite(some("number"))
        being = self.grown("held_out_share=0.2")
        held = {e.key for e in being.memory.entries("held_out")}
        self.assertTrue(4 <= len(held) <= 25, len(held))
        child = self.children[-1].child.learner
        self.assertEqual({t.key for t in child._trained()} & held, set())
        self.append(some("day"))
        self.until(lambda: not self.unread(being) and len(being.growth.probes) == 2)
        [later] = set(being.growth.probes) - {"0"}
        self.assertEqual({t.key for t in child.texts.values() if t.probe == "0"}, held)
        self.assertTrue(all("The day" in t.text for t in child.texts.values() if t.probe == later))

    def test_compiled_kernels_are_taken_up_between_two_replies(self):
        being, fast = self.organism(), mock.Mock(is_fast=True)
        being.speaker.engine = slow = m.interpreted_engine()
        with mock.patch.object(m, "choose_engine", return_value=fast):
            pieces = being.reply(ASKED)
            next(pieces, "")
            being.trainer._on_ready(notices=[], engine="native")
            self.assertIs(being.speaker._kept[1].model.engine, slow)
            "".join(pieces)
        self.assertIs(being.speaker.engine, fast)

    def test_talking_compacting_and_renewing_at_once_do_not_wait_for_each_other_for_ever(self):
        being = self.grown("block_size=32", "trust_bpc=100", "boldness=9")
        ends, count = time.monotonic() + 0.4, iter(range(10 ** 6))

        def again(work):
            while time.monotonic() < ends:
                work()
        others = [threading.Thread(target=again, args=(work,), daemon=True) for work in (
            lambda: being.speaker.renew(1000), being.compact,
            lambda: being.trainer._commit_growth(being.growth),
            lambda: self.say(being, f"The number {next(count)} is old."))]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(max(0.0, ends + 20.0 - time.monotonic()))
        stuck = [thread for thread in others if thread.is_alive()]
        if stuck:
            being.memory._lock = threading.RLock()  # lest its closing wait as well
        self.assertEqual(stuck, [])
        self.assertGreater(next(count), 2)


class Failing(Home):
    def test_an_unexpected_exception_of_trainer_or_watcher_ends_every_wait_and_it_speaks_on(self):
        for where, name in (("trainer", "_send_text"), ("watcher", "take_in")):
            self.db = self.path(f"{name}.db")
            being = self.begun()
            with mock.patch.object(getattr(being, where), name,
                                   side_effect=RuntimeError("a wire is loose")):
                self.append(QUARTZ)
                with self.assertRaisesRegex(m.TrainerError, "RuntimeError: a wire is loose"):
                    being.wait_trained()
            with self.assertRaisesRegex(m.TrainerError, "a wire"):
                being.wait_rest()
            self.assertIs(being.trainer.phase, m.Phase.FAILED)
            self.assertTrue(any("a wire" in notice for notice in being.notices))
            self.assertEqual(self.say(being, ASKED), KNOWN)

    def test_several_deaths_without_a_step_between_are_the_end_and_are_told(self):
        self.assertEqual(m.MOST_DEATHS, 5)
        self.hold = lambda child: self.children[-1].kill() or True
        being = self.organism()
        being.awake()
        being.learn_now()
        with self.assertRaisesRegex(m.TrainerError, "stopped 5 times"):
            being.wait_trained(being.trainer.ring)
        self.assertEqual(len(self.children), 5)
        self.assertEqual(self.events(being)[-1], "failed")

    def test_a_child_that_says_why_it_failed_is_quoted(self):
        being = self.begun()
        self.children[-1].send("failed", error="MemoryError: no room")
        self.until(lambda: any("no room" in notice for notice in being.notices))


class NothingIsReset(Home):
    """What the owner does meanwhile neither begins the birth anew nor takes back a step."""

    def watched(self, being):
        """Let it learn to the end; fail if it ever was newborn again or went back a step."""
        self.release()
        seen = [being.growth]
        being.learn_now()
        self.until(lambda: seen.append(being.growth) or being.trainer.order is None)
        being.wait_trained()
        order = ("newborn", "warmup", "grown")
        for passed in ([growth.step for growth in seen], [order.index(g.phase) for g in seen]):
            self.assertEqual(passed, sorted(passed))
        self.assertEqual(being.growth.phase, "grown")
        return being.growth

    def in_birth(self, *more):
        """Return a newborn that is held in the midst of its birth, after a commit."""
        being = self.organism("warmup_steps=40", *more)
        self.say(being, SECRET)
        self.say(being, ASKED)
        being.awake()
        self.held_in(lambda child: child.job.done_steps >= 20)
        return being

    def test_a_reply_is_trained_on_once_it_is_approved_and_no_more_when_that_is_taken_back(self):
        being = self.in_birth()
        self.assertFalse(being.memory.entries("source = 'approved'"))
        self.assertTrue(being.judge(True))
        [approved] = being.memory.entries("source = 'approved'")
        self.assertTrue(approved.text.startswith(f"H: {ASKED}\nA: I do not know that"))
        self.until(lambda: any(t.source == "approved" for t in
                               self.children[-1].child.learner.texts.values()))
        self.assertTrue(being.judge(False))
        self.assertFalse(being.memory.entries("source = 'approved'"))
        self.assertGreaterEqual(self.watched(being).step, 40)

    def test_a_told_line_that_is_forgotten_during_the_birth_is_unlearned_by_the_next(self):
        being = self.in_birth()
        self.assertIn("forgotten", m.forget(being.memory, SECRET))
        self.assertEqual(self.watched(being).generation, 2)
        self.assertEqual(self.events(being, "rebirth", "unlearned"), ["rebirth", "unlearned"])
        self.assertEqual(being.memory.to_unlearn(), [])
        trained = [t.text for t in self.children[-1].child.learner.texts.values()]
        self.assertFalse([text for text in trained if SECRET in text])

    # large enough for its loss to be waited over
    MANY = CORPUS + "".join(f"\nThe stone {i} lies on the path.\n" for i in range(60))

    def test_a_corpus_that_is_empty_for_a_while_or_another_for_a_while(self):
        self.rewrite(self.MANY)
        other = self.write("some.txt", "A far and other land.\n\nIt has its own rivers.\n")
        being = self.in_birth("loss_seconds=60")
        for path, text in ((self.corpus, ""), (other, None), (self.corpus, self.MANY)):
            if text is not None:
                self.rewrite(text)
            being.config = dataclasses.replace(being.config, corpus_path=path)
            if text == "":  # it has looked
                self.until(lambda: any("lacks most of the lines" in n for n in being.notices))
            time.sleep(0.12)
        self.assertEqual(self.watched(being).step, 40)
        self.assertEqual(self.events(being, "corpus", "rebirth", "unlearned"), ["corpus"])

    def test_a_corpus_emptied_and_restored_teaches_nothing_anew_nor_does_a_line_that_moved(self):
        self.rewrite(self.MANY)
        being = self.grown("loss_seconds=0", "unlearn_seconds=60")
        being.sleep()
        layers = {e.key: e.layer for e in being.memory.entries()}
        for text, count in ((CORPUS[-60:], 2), (self.MANY, len(layers)),
                            (self.MANY.replace("seven.\n", "seven.\n\n"), len(layers) + 1)):
            self.rewrite(text)
            being.take_in_corpus()
            self.assertLessEqual(abs(being.memory.entry_count() - count), 1)
            if count == len(layers):
                self.assertEqual({e.key: e.layer for e in being.memory.entries()}, layers)
        self.assertEqual((being.memory.to_unlearn(), self.unread(being)), ([], []))
        self.assertIsNone(being.trainer.due())


class Rebirth(Home):
    """Another generation grows up beside the one that speaks and learns."""

    EAGER = ("rebirth_chars=60", "rebirth_share=0.1", "rebirth_bound=9", "gate_bound=9")
    MANY = "".join(f"\nThe kite of day {day} flies above the quay.\n" for day in range(4))

    def test_it_is_due_when_there_are_many_deltas(self):
        being = self.grown("rebirth_chars=60", "rebirth_share=99", "max_delta_modules=2",
                           "delta_seal_chars=1", *self.EAGER[2:])
        for text in (QUARTZ, "Moss turns green in the long rain."):
            self.assertIsNone(being.trainer.due())
            self.append(text)
            self.until(lambda: being.memory.entries("layer IS NOT NULL AND text LIKE ?",
                                                    f"%{text}%"))  # once reborn, it is 0
        self.learn(being)
        [event] = [e for e in being.memory.life() if e["event"] == "generation"]
        self.assertEqual((event["why"], being.growth.generation), ("deltas", 2))
        self.assertEqual(m.delta_names(being.memory.manifests()), [])

    def ask(self, being, *settings):
        """Ask for another size, as the interface does."""
        wanted = m.Shape.of(being.config.replace(settings))
        being.memory.set_setting("wanted_shape", dataclasses.asdict(wanted))
        being.trainer.ring()

    def test_asked_for_another_size_it_is_adopted_whole_while_the_old_one_speaks_and_learns(self):
        being = self.grown("warmup_steps=30", "rebirth_bound=9")
        old = being.growth
        self.ask(being, "n_embd=16")
        self.held_in_rebirth(10, idle=True)
        self.assertEqual(self.say(being, ASKED), KNOWN)
        self.append(QUARTZ)
        self.until(lambda: self.quartz(being))
        self.assertEqual((being.growth.generation, being.config.n_embd), (1, 8))
        self.assertEqual(len(being.mind().model.deltas), 1)
        self.children[-1].child.birth.learner._begin_cooling()
        self.append("The otter waits.")  # too late for the next, which gets a delta for it
        self.until(lambda: being.memory.entries("text LIKE '%otter%'") and not self.unread(being))
        self.release()
        self.until(lambda: being.growth.generation == 2)
        self.learn(being)
        self.assertEqual(being.config.n_embd, 16)
        self.assertGreater(being.growth.step, old.step + 10)
        self.assertFalse(being.memory.layers(m.NEXT))
        self.assertIsNone(being.trainer.due())
        self.assertEqual(m.delta_names(being.memory.manifests()), ["delta1"])
        self.assertEqual({e.text: e.layer for e in being.memory.entries("layer > 0")},
                         {"The otter waits.\n": 1})
        self.until(lambda: being.mind().model.shape.n_embd == 16)
        self.assertIn("generation 2 has taken over", " ".join(being.notices))
        being.sleep()
        self.assertEqual(self.grown("warmup_steps=30").config.n_embd, 16)

    def test_one_whose_reason_has_gone_is_dropped_and_nothing_of_it_is_left(self):
        being = self.grown("warmup_steps=60")
        for begin, end in ((lambda: self.ask(being, "n_embd=16"),
                            lambda: self.ask(being, "n_embd=8")),
                           (lambda: self.rewrite(CORPUS.replace("The ferry leaves at seven.", "")),
                            lambda: self.rewrite(CORPUS))):
            begin()
            self.held_in_rebirth(5)
            end()
            self.until(lambda: being.memory.setting("rebirth") is None
                       and self.children[-1].child.birth is None)
            self.release()
            self.learn(being)
            self.assertEqual((being.growth.generation, being.config.n_embd), (1, 8))
            self.assertFalse(being.memory.layers(m.NEXT) or self.unread(being))
        self.assertEqual(being.memory.to_unlearn(), [])

    def test_a_generation_that_reads_worse_is_given_up_told_and_not_tried_again_at_once(self):
        being = self.grown(*self.EAGER[:2], "rebirth_bound=0", "gate_bound=9",
                           "held_out_share=0.3")
        self.patch(m, "fit_to_live", lambda new, old: {"probe": "0", "before": 1.0, "now": 2.0})
        self.append(self.MANY)
        self.until(lambda: "rebirth given up" in self.events(being))
        self.append(QUARTZ[:30])
        self.until(lambda: being.memory.entries("text LIKE '%quartz%' AND layer"))
        self.learn(being)
        self.assertEqual(self.events(being, "rebirth", "rebirth given up"),
                         ["rebirth", "rebirth given up"])
        self.assertEqual(being.growth.generation, 1)
        self.assertTrue(any("it is given up" in notice for notice in being.notices))
        self.assertFalse(being.memory.layers(m.NEXT))
        self.append(self.MANY.replace("kite", "swallow"))  # as much again
        self.until(lambda: self.events(being).count("rebirth") == 2)


class Unlearning(Home):
    """What is forgotten leaves the weights that were trained on it."""

    STRONG = ("held_out_share=0", "delta_seal_chars=20", "delta_rank=4", "dropout=0",
              "micro_steps=20", "delta_rate=0.03", "learning_rate=0.03", "warmup_steps=100",
              "patience=1000", "rate_epochs=1000000", "cooling=10")

    def nats(self, being):
        """Return the loss of the secret by whichever layer knows it best."""
        being.speaker.renew()
        mind = being.mind()
        ids = [m.END_OF_TEXT] + mind.tokenizer.encode(SECRET)
        return min(sum(m.scored_nats(mind.model.with_layer(number), ids, 24))
                   for number in range(len(mind.model.deltas) + 1))

    def taught(self, being, *lines):
        for line in lines:
            being.teach(line)
            self.learn(being)

    def test_a_delta_that_read_what_is_forgotten_goes_and_those_before_it_stay(self):
        being = self.grown(*self.STRONG)
        self.taught(being, "The kettle sings at noon.")
        before = self.nats(being)
        self.taught(being, SECRET)
        learned = self.nats(being)
        self.assertLess(learned, 0.75 * before)
        self.taught(being, "Moss turns green in rain.")
        kept = being.memory.layers()
        self.assertEqual(m.delta_names(kept), ["delta1", "delta2", "delta3"])
        m.forget(being.memory, SECRET)
        self.until(lambda: "unlearned" in self.events(being))
        self.learn(being)
        layers = being.memory.layers()
        self.assertEqual(m.delta_names(layers), ["delta1", "delta2"])
        self.assertEqual((layers["base"], layers["delta1"]), (kept["base"], kept["delta1"]))
        # what another sentence taught of all sentences stays
        self.assertGreater(self.nats(being), (learned + before) / 2.0)
        self.assertEqual((self.unread(being), being.growth.generation), ([], 1))

    def test_a_line_taken_out_of_the_corpus_is_unlearned_by_a_new_base_while_the_old_speaks(self):
        self.append(SECRET)
        being = self.grown(*self.STRONG, "rebirth_bound=0")  # which does not bind it
        old, learned = being.growth, self.nats(being)
        self.rewrite(CORPUS)
        self.held_in_rebirth(50)
        self.assertEqual(self.nats(being), learned)
        self.release()
        self.until(lambda: being.growth.generation == 2)
        self.assertGreater(self.nats(being), 1.2 * learned)
        self.assertEqual(being.memory.to_unlearn(), [])
        self.assertEqual(self.events(being, "rebirth", "unlearned"), ["rebirth", "unlearned"])
        # it is to the bit the base of one that has never met the secret
        twin = m.Learner(being.config, m.Growth(2, step=old.step, tokens=old.tokens), {},
                         engine_in_use())
        twin.take_text((), [[e.id, e.key, e.text, e.closed, True, e.source, ""]
                            for e in being.memory.entries()])
        job = m.Job(twin, None, None, lambda: 0.0)
        while not job.finished():
            job.advance()
        job.close()
        self.assertEqual(m.pack_params(list(twin.model.params.values())).data,
                         being.memory.layers()["base"].data)

    def test_what_is_told_again_in_time_is_not_unlearned(self):
        being = self.grown("unlearn_seconds=1000")
        self.taught(being, SECRET)
        for again in (True, False):
            m.forget(being.memory, SECRET)
            self.assertEqual(being.memory.to_unlearn(), [(1, len(SECRET) + 1)])
            if again:
                being.teach(SECRET)
                self.assertEqual(being.memory.to_unlearn(), [])

    def test_when_nothing_is_left_to_learn_nothing_of_the_old_is_left(self):
        being = self.grown("loss_seconds=0")
        step = being.growth.step
        self.rewrite("\n")
        being.wait_rest()
        self.assertEqual((being.memory.manifests(), being.growth.phase), ({}, "newborn"))
        self.assertEqual(being.growth.step, step)


class Processes(Reader):
    """The program as its owner runs it; what is killed is a process of its own."""

    TINY = set_words(*TINY)

    def kill_when(self, condition, *settings):
        """Start to train in a process, and kill it once a condition holds."""
        process = self.start_here("train", *set_words(*settings))
        self.until(condition)
        process.kill()
        process.wait()

    def test_killed_in_its_birth_or_while_the_next_generation_grows_up_it_goes_on(self):
        self.kill_when(lambda: self.setting("growth").get("step", 0) > 2, *LONG)
        step = self.setting("growth")["step"]
        self.assertGreater(self.report("train")["step"], step)
        step = self.setting("growth")["step"]
        self.kill_when(lambda: self.setting("rebirth").get("growth", {}).get("warmup_step", 0) > 5,
                       *LONG, "n_embd=16")
        came = self.setting("rebirth")["growth"]["warmup_step"]
        self.assertEqual(self.setting("growth")["step"], step)
        self.assertEqual(self.setting("shape")["n_embd"], 8)
        self.good("train", *set_words("n_embd=16", f"warmup_steps={came + 20}",
                                      "warmup_epochs=9999", "rebirth_bound=9"))
        growth = self.setting("growth")
        self.assertEqual((growth["generation"], growth["warmup_step"]), (2, came + 20))
        self.assertEqual(list(self.kept(writable=False).faults()), [])

    def test_a_real_child_that_is_killed_is_started_again_and_one_that_rests_goes_on(self):
        being = self.begun()
        pieces = being.reply(ASKED)
        next(pieces)
        time.sleep(0.3)  # what was on its way arrives
        step = being.growth.step
        time.sleep(0.3)
        self.assertEqual(being.growth.step, step)
        "".join(pieces)
        self.until(lambda: being.growth.step > step + 2)
        child, step = being.trainer._child.pid, being.growth.step
        os.kill(child, signal.SIGKILL)
        self.until(lambda: any(e["event"] == "trainer died" for e in being.memory.life()))
        self.until(lambda: being.trainer.ring() or being.growth.step > step + 2)
        self.assertNotEqual(being.trainer._child.pid, child)
        self.assertTrue(any("starts again" in notice for notice in being.notices))

    def test_a_life_lived_twice_gives_the_same_bits_with_a_restart_in_between_or_without(self):
        many = " ".join(f"On day {day} the kite flies above the quay." for day in range(20))
        said = ["My lamp is made of quartz.", "/teach The kettle sings at noon.",
                "I live beside the old mill.", "edit The rain is warm.",
                "The heron sleeps on one leg.", "/forget The kettle sings at noon.",
                "edit " + many, "Thank you."]
        lives = (("whole", [said], "1"), ("parts", [said[:3], said[3:]], "2"))
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            paths = list(pool.map(lambda life: self.life(*life), lives))
        memories = list(map(self.kept, paths))
        for memory in memories:
            self.assertGreater(memory.setting("growth")["generation"], 1)
        whole, parts = (memory.layers() for memory in memories)
        self.assertEqual(sorted(whole), sorted(parts))
        self.assertLess({"mixer", "delta1", "router"}, set(whole))
        for name, layer in whole.items():
            self.assertEqual(layer, parts[name], name)

    def life(self, name, parts, hash_seed):
        """Live a life, started anew for each part of the talk; return its memory's path."""
        settings = set_words(
            "threads=1", "max_merges=20", "burst_passes=6", "mix_passes=2", "rebirth_bound=9",
            "min_new_chars_to_train=1", "min_merge_chars=300", "delta_seal_chars=60",
            "held_out_share=0.3", "dropout=0.1", "rebirth_chars=600")
        folder, text = self.path(name), CORPUS
        os.mkdir(folder)
        corpus = self.write(os.path.join(name, "nonames.txt"), text)
        for part in parts:
            chat = self.start_here("--wait-trained", *settings, cwd=folder,
                                   stderr=subprocess.DEVNULL, env={"PYTHONHASHSEED": hash_seed})
            for words in part:
                if words.startswith("edit "):
                    text += "\n" + words[5:] + "\n"
                    os.replace(self.write(os.path.join(name, "new.txt"), text), corpus)
                else:
                    self.assertTrue(self.answer(chat, words.encode()))
            chat.communicate(timeout=90.0)
            self.assertEqual(chat.returncode, 0)
        return os.path.join(folder, "memory.sqlite3")
