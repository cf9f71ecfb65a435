"""What learning costs the old: texts are learned one after the other, by two methods.

    python tests/bench_forgetting.py [TEXT...] [--json] [--shifts N] [--set FIELD=VALUE] ...

Two streams: unlike texts, your own first and then some that every Python carries; and shifts,
slices of them in ever new styles. Each is learned by full fine-tuning, and as macrogpt does in
life; shown are bits per character on held-out text, right after learning and in the end.
"""
import argparse
import codecs
import dataclasses
import importlib
import inspect
import json
import math
import os
import random
import re
import statistics
import sys
import time
import unicodedata
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import macrogpt as m  # noqa: E402

SOURCES = "argparse ast heapq inspect statistics tempfile".split()
STYLES = (("", lambda text: text), ("upper", str.upper),
          ("rot13", lambda text: codecs.encode(text, "rot13")),
          ("backwards", lambda text: "\n".join(" ".join(line.split(" ")[::-1])
                                               for line in text.split("\n"))),
          ("no vowels", lambda text: re.sub("[aeiou]", "", text)),
          ("spelled", lambda text: "-".join(text)))
METHODS = ("full", "ours")  # full fine-tuning, and as we live
UNLIKE_TEXTS = 5
SHORTEST_LESSON = 1000  # characters


class Lesson(NamedTuple):
    """A text of a stream: what is learned, what guards it, and what it is examined on."""

    name: str
    text: str
    probe: str
    test: str

    @classmethod
    def of(cls, name, text, test_chars):
        """Return a text as a lesson: its end for the exam, before that the probe."""
        test = min(test_chars, len(text) // 5)
        learned = len(text) - test - max(1, test // 2)
        return cls(name, text[:learned], text[learned:-test], text[-test:])

    def rows(self, first, unread):
        """Return the documents and the probe as a learner takes them, numbered from `first`."""
        texts = [(part + "\n", unread, "") for part in self.text.split("\n\n")]
        return [[number, number, text, True, new, self.name, probe] for number, (text, new, probe)
                in enumerate([*texts, (self.probe, False, self.name)], first)]


def stock_texts(corpus):
    """Return unlike texts that any installation of Python has, and the corpus, by name."""
    names = [unicodedata.name(chr(i), "").title() for i in range(0x2FFF)]
    random.Random(0).shuffle(names)
    folder = os.path.dirname(os.__file__)
    licenses = [os.path.join(where, name) for where in (folder, os.path.dirname(folder), ROOT)
                for name in ("LICENSE.txt", "LICENSE")]
    return {"names": "\n".join(filter(None, names)),
            "source": "\n".join(inspect.getsource(importlib.import_module(x)) for x in SOURCES),
            "license": "\n".join(m.read_text(path) for path in licenses if os.path.exists(path)),
            **({"corpus": m.read_text(corpus)} if os.path.exists(corpus) else {})}


def shifts_of(texts, count, chars):
    """Return slices of the texts in turn, each round in another style."""
    found = {}
    for i in range(count):
        name, turn = list(texts)[i % len(texts)], i // len(texts)
        style, change = STYLES[turn % len(STYLES)]
        text = texts[name]
        at = (turn + 5) * chars % max(1, len(text) - chars + 1)
        found[f"{name} {turn} {style}".strip()] = change(text[at:at + chars])[:chars]
    return found


class Pupil:
    """One way to learn a stream of lessons; all that knows of macrogpt's learning is here."""

    def __init__(self, method, config, engine, state):
        self.method, self.config, self.engine = method, config, engine
        growth, layers = state
        self.learner = m.Learner(config, dataclasses.replace(growth), layers, engine)
        self.counts = m.NgramMemory(config.ngram_order, config.ngram_counts)
        if method != "ours":
            self.learner.model.router = None

    @staticmethod
    def warmed_up(config, engine, first, tokens):
        """Return the state that all methods begin with: a base born on the first lesson."""
        learner = m.Learner(config, m.Growth(), {}, engine)
        learner.take_text((), first.rows(0, unread=True))
        job = m.Job(learner, None, None, time.monotonic)
        job.steps = max(1, tokens // (config.batch_size * config.block_size))
        while not (job.done_steps and job.finished()):
            job.advance()
        job.close()
        return learner.snapshot()

    def learn(self, new, tokens):
        """Learn a lesson on about so many tokens; the counts and the voice's weights learn too."""
        learner, config, known = self.learner, self.config, bool(self.learner.texts)
        rows = new.rows(len(learner.texts), unread=known)
        learner.take_text((), rows)
        for row in rows:
            if not row[-1]:
                self.counts.read(m.document_ids(learner.tokenizer, row[2]))
        steps = max(1, tokens // (config.batch_size * config.block_size)) if known else 0
        if self.method != "ours":
            self._tune(steps)
        elif known:  # as the trainer does, gate and all
            job = m.Job(learner, steps, None, time.monotonic)
            while not (job.finished() and (job.harm() is None or job.given_up)):
                job.advance()
            job.close()

    def _tune(self, steps):
        """Train the whole model on the new text alone."""
        learner, config = self.learner, self.config
        learner.model.freeze(False)
        batch = config.batch_size
        for i in range(steps):
            windows = [w for w in learner.pool.windows(batch, batch, learner.rng) if len(w) > 1]
            m.train_step(learner.model, config, windows,
                         m.scheduled_rate(config.learning_rate, i / steps, config.rate_warmup,
                                            config.schedule),
                         config.dropout, learner.rng)
        learner.mark_read([text.key for text in learner.unread()])
        learner.mixer = None  # one voice for all texts is fitted on all of them
        learner.fit_voice()

    def examined(self, one):
        """Return the bits per character on a lesson's exam, of the model alone and of the voice."""
        model, ids = self.learner.model, m.text_ids(self.learner.tokenizer, one.test)
        still, live = (m.Mixture(self.engine, self.counts,
                                 m.load_mixer(self.config, self.learner.mixer)) for _ in range(2))
        alone, _, mixed, _ = map(sum, zip(*m.read_through(model, ids, still, live)))
        bits = math.log(2.0) * len(one.test)
        return alone / bits, mixed / bits


def forgetting(config, engine, lessons, base_tokens, tokens, tell):
    """Return what each method knows of each lesson right after learning it and in the end.

    The first lesson warms up the base, on base_tokens; each other one is learned on `tokens`. All
    shares are of the model alone and of the voice.
    """
    state = Pupil.warmed_up(config, engine, lessons[0], base_tokens)
    facts = {}
    for method in METHODS:
        pupil, texts = Pupil(method, config, engine, state), {}
        for one in lessons:
            tell(f"{method}: {one.name}")
            pupil.learn(one, tokens)
            texts[one.name] = {"after": pupil.examined(one)}
        for one in lessons:
            texts[one.name]["end"] = pupil.examined(one)
        rises = [[text["end"][i] / text["after"][i] - 1.0 for text in list(texts.values())[:-1]]
                 for i in range(2)]
        full = facts["full"]["texts"] if facts else texts
        facts[method] = {
            "texts": texts, "deltas": len(pupil.learner.model.deltas),
            "forgetting": list(map(statistics.mean, rises)), "worst": list(map(max, rises)),
            "learned": [statistics.mean(texts[one.name]["after"][i] / full[one.name]["after"][i]
                                        for one in lessons[1:]) - 1.0 for i in range(2)]}
    return facts


def table(name, stream):
    """Return what was measured on a stream as lines of a table."""
    rows = [["", *(f"{method} {who}" for method in METHODS for who in ("alone", "voice"))]]
    for text in stream[METHODS[0]]["texts"]:
        told = [stream[method]["texts"][text] for method in METHODS]
        rows.append([text[:15], *(f"{a:.3f} → {b:.3f}" for one in told
                                  for a, b in zip(one["after"], one["end"]))])
    for fact, said in (("forgetting", "forgotten, mean"), ("worst", "forgotten, most"),
                       ("learned", "new, over full")):
        rows.append([said, *(f"{share:+.1%}" for method in METHODS
                             for share in stream[method][fact])])
    return [f"{name}: bits per character right after learning → in the end",
            *("  ".join(f"{cell:>15}" for cell in row) for row in rows)]


def options_of(argv):
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="files that are learned first")
    parser.add_argument("--json", action="store_true", help="print one object")
    parser.add_argument("--corpus", default=m.Config.corpus_path, help="one of the stock texts")
    parser.add_argument("--set", metavar="FIELD=VALUE", action="append", default=[],
                        help="change a setting of macrogpt")
    for name, default, doc in (
            ("chars", 100_000, "characters of a text of the first stream"),
            ("tokens", 100_000, "tokens trained on for each, and for the base"),
            ("shifts", 30, "shifts of the second stream; 0 leaves it out"),
            ("shift-chars", 20_000, "characters of a shift"),
            ("shift-tokens", 20_000, "tokens trained on for each shift"),
            ("test-chars", 4000, "characters of each that are for the exam")):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=doc)
    return parser.parse_args(argv)


def streams_of(options):
    """Return (texts, tokens for each) by the name of a stream.  Raises CorpusError."""
    texts = {os.path.basename(path): m.read_text(path) for path in options.texts}
    for name, text in stock_texts(options.corpus).items():
        if len(texts) < max(len(options.texts), UNLIKE_TEXTS):
            texts.setdefault(name, text)
    for name, text in texts.items():
        if len(text) < SHORTEST_LESSON:
            raise m.CorpusError(f"{name} has {len(text)} characters; a text to be learned needs "
                                f"{SHORTEST_LESSON}")
    whole = {name: text[:options.chars] for name, text in texts.items()}
    shifts = {**dict(list(whole.items())[:1]),
              **shifts_of(texts, options.shifts, options.shift_chars)}
    return {f"{len(whole)} unlike texts": (whole, options.tokens),
            f"{len(shifts) - 1} shifts": (shifts, options.shift_tokens)}


def main(argv=None):
    """Measure and print; return the exit code."""
    def tell(text):
        print(text, file=sys.stderr)
    options, facts = options_of(argv), {}
    try:  # every probe counts, however many there are
        config = m.Config().replace(["held_out_chars=1000000", *options.set])
        engine = m.choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, tell)
        for name, (texts, tokens) in streams_of(options).items():
            if len(texts) > 1:
                lessons = [Lesson.of(*item, options.test_chars) for item in texts.items()]
                facts[name] = forgetting(config, engine, lessons, options.tokens, tokens, tell)
    except m.MacroGPTError as error:
        tell(f"bench_forgetting: {error}")
        return error.exit_code
    whole = {"config": dataclasses.asdict(config), "options": vars(options), "engine": engine.name,
             "streams": facts}
    told = [line for item in facts.items() for line in table(*item)]
    print(json.dumps(whole, ensure_ascii=False) if options.json else "\n".join(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
