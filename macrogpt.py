#!/usr/bin/env python3
"""macrogpt: one file, no packages, a small living mind.

A tiny GPT that trains in the background while its owner talks with it, learns what the owner
writes into `nonames.txt` and says in the chat, and keeps every word and weight in one SQLite file.

    python macrogpt.py                      chat
    python macrogpt.py ask "Who are you?"   one reply
    python macrogpt.py --help               everything else

Map (text flows round a ring; the code reads from top to bottom):

     0 CONFIG      every setting with its unit and range, every error with its remedy
     1 CORPUS      the owner's file, read as it is: lines, exchanges, what changed
     2 TOKENIZER   text to ids and back, byte-level BPE that only appends
     3 KERNELS     every hot loop, once, as plain typed functions over flat buffers
     4 ENGINE      runs the kernels, with faster twins where plain loops are slow
     5 AUTOGRAD    values that remember where they came from
     6 LAYERS      the operations of a transformer, forward beside backward
     7 MODEL       ids to logits: a Llama-shaped GPT with appended low-rank deltas
     8 OPTIMIZER   AdamW whose moments live in the parameters they move
     9 SAMPLING    from logits to one id: a chain of filters
    10 TRAINING    windows, steps, and bits per character
    11 EXPERTS     `NgramMemory`, the copyist, the `Mixture`; `Sayings`, vectors of sentences
    12 MEMORY      `Memory`: one SQLite file that is the whole being
    13 RECALL      what answers a question: statements, people, days, lists; what was said like it
    14 VOICE       `Mind` and `Turn`: prompt, drafts, the best of them; the `Speaker` says it
    15 LEARNING    `Learner`, a generation and its text; `Job`, a stretch of steps; the child
    16 ORGANISM    `Watcher` (file to entries), `Trainer` (the child's supervisor), `Organism`
    17 GRADUATION  out of the file and back: safetensors, PEFT, GGUF, JSONL, Markdown
    18 SERVE       the API that chat front ends speak, and a page
    19 INTERFACE   commands, terminal, reports

A generation is a tokenizer, a base and the deltas appended to it. What is unread is learned by the
newest layer, which is sealed when it is full; what is forgotten takes its layers along; and a base
changes in one way only: a new generation is born beside the old one, which speaks until then.

Letters in shapes: B batch, T time (rows), C channels, H heads, D head width, V vocabulary, R rank.
"""

from __future__ import annotations

import os
import signal
import sys

if __name__ == "__main__":  # what happens before `main` is ready to see to it
    if sys.version_info < (3, 9):
        sys.exit(f"macrogpt: Python {sys.version.split()[0]} is too old; use 3.9 or later")
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    _given = getattr(sys, "orig_argv", [])  # of Python 3.10 and later, with its own options
    _own = _given[1:_given.index(sys.argv[0])] if sys.argv[0] in _given else ["-m"]
    if (os.name == "posix" and "-m" not in _own and os.path.basename(__file__).count(".") == 1
            and not sys.dont_write_bytecode
            and os.access(os.path.dirname(os.path.abspath(__file__)), os.W_OK)):
        # Python keeps the syntax tree of a script while it runs, 40 MB, and not that of a module,
        # which need not be compiled again, either. An interrupt that comes meanwhile waits until
        # it is seen to. Of the packages that are installed here none is used, nor looked for.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.execv(sys.executable, [sys.executable, *_own, "-S", "-c", """if True:
            import os, signal, sys
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            import importlib
            folder, name = os.path.split(sys.argv.pop(1))
            sys.path.insert(0, folder)
            sys.exit(importlib.import_module(name[:-3]).main())
            """, os.path.abspath(__file__), *sys.argv[1:]])

import argparse
import ast
import asyncio
import base64
import codecs
import collections
import contextlib
import dataclasses
import datetime
import enum
import errno
import functools
import hashlib
import heapq
import hmac
import html
import inspect
import io
import itertools
import json
import marshal
import math
import platform
import queue
import random
import re
import select
import shutil
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import tempfile
import threading
import time
import traceback
import unicodedata
import urllib.parse
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import accumulate, repeat
from math import dist, exp, isfinite, log, sqrt
from operator import add, attrgetter, itemgetter, mul
from typing import (AbstractSet, Any, BinaryIO, Callable, Container, DefaultDict, Deque, Dict,
                    Iterable, Iterator, List, Match, NamedTuple, Optional, Pattern, Sequence, Set,
                    TextIO, Tuple, Union)

__version__ = "0.1.0"

# ──────────────────────────────────────────────────────────────────────────────────────
# 0 · CONFIG — every number has a name, a unit and a reason   uses:
# ──────────────────────────────────────────────────────────────────────────────────────
#
# One frozen dataclass holds every setting. Each field states its range in its own declaration,
# so that a wrong value is refused before anything starts, with the remedy in the same line.


class MacroGPTError(Exception):
    """Something the owner can mend; its text says what was found, what was expected, what to do."""

    exit_code = 1


class ConfigError(MacroGPTError):
    """A setting is unknown, of the wrong type or out of range."""

    exit_code = 2


class UsageError(MacroGPTError):
    """A command was called with words that it does not take."""

    exit_code = 2


def as_told(error: BaseException) -> MacroGPTError:
    """Return any error as one that an owner can read, with what to do."""
    if isinstance(error, MacroGPTError):
        return error
    if isinstance(error, MemoryError) or "start new thread" in str(error):
        return MacroGPTError("there is not enough memory; close other programs, choose a smaller "
                             "model with --set n_embd=72, or talk with --no-train")
    return MacroGPTError(f"something unexpected happened ({type(error).__name__}: {error}); run "
                         "again with --debug and report what it shows")


class CorpusError(MacroGPTError):
    """A text file cannot be read."""


class StoreError(MacroGPTError):
    """The memory file cannot be opened, read or written."""


class StoreLocked(StoreError):
    """Another program holds the memory file, for a while perhaps."""


class StoreDamaged(StoreError):
    """What stands in the memory file, or in its index, makes no sense."""


class EngineError(MacroGPTError):
    """The engine asked for is not to be had on this machine."""


class TrainerError(MacroGPTError):
    """The trainer process cannot do its work."""


class GraduationError(MacroGPTError):
    """What should leave cannot, or what comes back does not fit."""


MOST = 1e9  # of any number that has no bound of its own: what is beyond would overflow somewhere
MOST_WEIGHTS = 100_000_000  # of a model: with AdamW's moments 1.2 GB


def _setting(default: Any, doc: str, low: float = -MOST, high: float = MOST) -> Any:
    """Return a dataclass field with its meaning and its closed range."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """Every setting of the organism; `--set FIELD=VALUE` reaches each.  Raises ConfigError."""

    # files
    corpus_path: str = _setting("nonames.txt", "the owner's text file; only ever read")
    db_path: str = _setting("memory.sqlite3", "the one file that holds the organism")
    max_corpus_lines: int = _setting(1_000_000, "newest lines kept of the corpus", 1, 10_000_000)
    max_line_chars: int = _setting(500, "characters kept of one line", 16, 100_000)
    held_out_share: float = _setting(0.1, "share of documents never trained on", 0.0, 0.5)
    train_chars: int = _setting(4_000_000, "characters of the corpus that are trained on; recall "
                                           "knows all of it", 1000)
    loss_seconds: float = _setting(30.0, "seconds that a corpus which lost most of its lines is "
                                         "given to be saved whole", 0.0, 1e6)
    # enough to fit the voice's weights; what lies beside the counts costs more than it tells
    held_out_chars: int = _setting(40_000, "most characters held out of one text", 1)
    # model
    n_layer: int = _setting(2, "transformer blocks", 1, 64)
    n_embd: int = _setting(72, "channels C", 2, 8192)
    n_head: int = _setting(4, "attention heads H", 1, 128)
    n_ff: int = _setting(0, "SwiGLU width; 0 means 8/3·C, a multiple of 8", 0, 32768)
    block_size: int = _setting(96, "window T in tokens", 8, 8192)
    rope_base: float = _setting(10_000.0, "RoPE's base", 2.0)
    norm_eps: float = _setting(1e-5, "RMSNorm's epsilon", 1e-12, 1e-1)
    # 0 and 0.1 measured alike at 80,000 tokens of our corpus, 0.2 worse; longer runs want more
    dropout: float = _setting(0.1, "share of channels dropped while training", 0.0, 0.9)
    # tokenizer
    # our corpus of 1.7 MB, held out, after a minute: 768 1.485, 1,536 1.436 bits per character; of
    # a seventh of it 768 were best of 0 to 1,536
    max_merges: int = _setting(1536, "merges the tokenizer may learn", 0, 100_000)
    min_pair_count: int = _setting(4, "a pair seen less often is not merged", 2)
    min_merge_chars: int = _setting(2000, "smaller corpora stay bytes", 0)
    life_merges: int = _setting(3072, "merges that all generations may learn together", 0, 100_000)
    # training
    # a minute of two cores; before that the held-out loss ends a birth, where any text is held out
    warmup_steps: int = _setting(4500, "most steps of the birth of a base", 1)
    warmup_epochs: float = _setting(40.0, "most times a birth reads its text", 0.1, 1e6)
    rate_epochs: float = _setting(5.0, "epochs after which a birth's rate is at a half", 0.1)
    cooling: float = _setting(0.4, "steps in which a birth's rate falls, as a share of those "
                                   "before", 0.01, 10.0)
    micro_steps: int = _setting(32, "steps of the smallest burst after that", 1)
    batch_size: int = _setting(4, "windows in a full batch B", 1, 4096)
    # planned was 0.01; 0.005 measured better, and 0.7, 0.99 than the betas 0.8, 0.95 or 0.9, 0.99
    learning_rate: float = _setting(0.005, "AdamW's peak rate", 1e-7, 1.0)
    delta_rate: float = _setting(0.01, "peak rate of a burst into a delta", 1e-7, 1.0)
    beta1: float = _setting(0.7, "AdamW's first decay", 0.0, 0.9999)
    beta2: float = _setting(0.99, "AdamW's second decay", 0.0, 0.99999)
    eps_adam: float = _setting(1e-8, "AdamW's epsilon", 1e-16, 1.0)
    weight_decay: float = _setting(0.0, "decoupled decay of matrices", 0.0, 1.0)
    grad_clip: float = _setting(1.0, "largest global norm of a gradient", 1e-6)
    rate_warmup: float = _setting(0.05, "share of a schedule spent rising", 0.0, 1.0)
    schedule: str = _setting("linear", "how the rate falls after that: linear or cosine")
    replay_share: float = _setting(0.5, "share of a burst's windows that repeat old text, where "
                                        "the active delta has much of it", 0.0, 1.0)
    burst_passes: float = _setting(6.0, "most times a burst reads what is new", 0.1, 1e6)
    patience: int = _setting(4, "evaluations without a gain before a birth's rate falls", 1)
    eval_steps: int = _setting(50, "steps between held-out evaluations", 1)
    eval_chars: int = _setting(6000, "held-out characters in one evaluation", 100)
    # a line added to the corpus is always learned at once; this is for what is said in the chat
    min_new_chars_to_train: int = _setting(240, "characters said before a burst starts", 1)
    # adapters
    # in five unlike texts 32 came within 5 % of full fine-tuning, 16 within 10, 8 within 11
    delta_rank: int = _setting(32, "rank R of a delta", 1, 1024)
    max_delta_modules: int = _setting(32, "deltas from which on a new base is born", 1, 1000)
    # born on all of it, a base reads 1.0 to 1.3 times better what deltas have read
    rebirth_share: float = _setting(0.1, "text that deltas have read, as a share of what the base "
                                         "has, from which on a new base is born", 0.001)
    rebirth_chars: int = _setting(20_000, "and at least so many characters of it", 1)
    rebirth_bound: float = _setting(0.04, "share by which a new base may read a probe worse", 0.0)
    delta_seal_chars: int = _setting(20_000, "new characters a delta takes before it is sealed", 1)
    delta_shift: float = _setting(0.01, "how much better another layer must read new text for the "
                                        "active delta to be sealed", 0.0)
    gate_bound: float = _setting(0.01, "share by which a burst may worsen a probe set", 0.0)
    # unlearning
    unlearn_seconds: float = _setting(10.0, "quiet after the owner forgot something, before the "
                                            "layers that learned it are rebuilt", 0.0, 1e6)
    # organism
    threads: int = _setting(0, "threads of compiled kernels; 0 is one less than there are cores", 0,
                            256)
    commit_seconds: float = _setting(5.0, "seconds between commits of the trainer", 0.1)
    tick_seconds: float = _setting(0.5, "seconds between looks at the corpus file", 0.05, 60.0)
    seed: int = _setting(1, "the seed of everything random", 0)
    # sampling
    temperature: float = _setting(0.8, "0 is greedy", 0.0, 100.0)
    top_k: int = _setting(40, "0 is off", 0)
    top_p: float = _setting(0.92, "1 is off", 0.0, 1.0)
    min_p: float = _setting(0.1, "0 is off", 0.0, 1.0)
    typical_p: float = _setting(1.0, "1 is off", 0.0, 1.0)
    top_n_sigma: float = _setting(0.0, "0 is off", 0.0)
    xtc_probability: float = _setting(0.0, "0 is off", 0.0, 1.0)
    xtc_threshold: float = _setting(0.1, "least likelihood XTC looks at", 0.0, 1.0)
    # a good reply takes up words of the prompt; loops are for DRY, and no draft with one is said
    repeat_penalty: float = _setting(1.0, "1 is off", 0.01, 10.0)
    repeat_last_n: int = _setting(64, "tokens the penalties look back", 0)
    presence_penalty: float = _setting(0.0, "0 is off", -10.0, 10.0)
    frequency_penalty: float = _setting(0.0, "0 is off", -10.0, 10.0)
    dry_multiplier: float = _setting(0.8, "0 is off", 0.0, 100.0)
    dry_base: float = _setting(1.75, "growth of DRY's penalty a token", 1.0, 10.0)
    dry_allowed_length: int = _setting(4, "repeats up to this length are free", 1)
    dry_last_n: int = _setting(256, "tokens DRY looks back; -1 is all of them", -1)
    samplers: str = _setting(
        "penalties,dry,top_n_sigma,top_k,typical_p,top_p,min_p,xtc,temperature",
        "order of the chain, separated by commas")
    boldness: float = _setting(0.93, "nats a token that a reply may lack, as a share of what "
                                     "held-out text costs; it keeps to itself what lacks more", 0.0)
    max_gen_tokens: int = _setting(180, "longest reply in tokens", 1, 100_000)
    # voice
    recall_score: float = _setting(0.55, "match from which memory answers by itself", 0.0, 1.0)
    due: int = _setting(1, "whether a chat begins with what was told for the day (0 or 1)", 0, 1)
    # a learner's words are readable from about 2.3; who is grown may speak up to half as much again
    trust_bpc: float = _setting(2.3, "held-out bits per character from which the model speaks", 0.0)
    # counts: 3 beat 2 by 0.03 bits per character on a million characters, 4 gained nothing
    ngram_order: int = _setting(3, "ids that the counts look back", 1, 8)
    ngram_counts: int = _setting(800_000, "most counts kept, at 100 to 200 bytes each", 1000)
    ngram_chars: int = _setting(1_000_000, "newest characters that are counted", 0)
    mix: int = _setting(1, "1: model and counts speak together; 0: the model by itself", 0, 1)
    mix_passes: int = _setting(2, "readings of held-out text that fit the voice's weights", 0, 100)
    # bench
    bench_vocab: int = _setting(512, "vocabulary of the benchmark's model", 2, 1_000_000)
    bench_seconds: float = _setting(4.0, "seconds for each measurement", 0.1, 3600.0)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_setting(f, getattr(self, f.name))
        pairs = 2 * self.n_head
        if self.n_embd % pairs:
            raise ConfigError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head} and "
                              f"leave an even width for RoPE's pairs; try n_embd="
                              f"{self.n_embd + pairs - self.n_embd % pairs}")
        weights = self.n_layer * self.n_embd * (4 * self.n_embd + 3 * self.ff_width)
        if weights > MOST_WEIGHTS:
            raise ConfigError(f"n_layer={self.n_layer} and n_embd={self.n_embd} make {weights:,} "
                              f"weights, more than the {MOST_WEIGHTS:,} there may be; try less")
        if self.schedule not in ("linear", "cosine"):
            raise ConfigError(f"schedule={self.schedule!r} is not known; use linear or cosine")

    @property
    def ff_width(self) -> int:
        """The SwiGLU width: n_ff, or 8/3·C rounded to a multiple of 8."""
        return self.n_ff or usual_ff_width(self.n_embd)

    def replace(self, assignments: Iterable[str]) -> "Config":
        """Return a Config changed by "FIELD=VALUE" texts.  Raises ConfigError."""
        values = dict(parse_assignment(text) for text in assignments)
        return dataclasses.replace(self, **values)


def usual_ff_width(n_embd: int) -> int:
    """Return 8/3 of the channels, rounded to a multiple of 8."""
    return max(8, round(n_embd / 3) * 8)


def _check_setting(f: "dataclasses.Field[Any]", value: Any) -> None:
    """Raise ConfigError unless value has the field's type and lies in its range."""
    expected = type(f.default)
    if expected is float and type(value) is int:
        value = float(value)
    if type(value) is not expected:
        raise ConfigError(f"{f.name}={value!r} is of type {type(value).__name__}, expected "
                          f"{expected.__name__}; the default is {f.default!r}")
    if expected is str:
        if not value or "\0" in value:
            raise ConfigError(f"{f.name}={value!r} is empty or has a NUL; "
                              f"the default is {f.default!r}")
        return
    low, high = f.metadata["low"], f.metadata["high"]
    if not low <= value <= high:
        raise ConfigError(f"{f.name}={value!r} is out of range: expected a number from {low:g} to "
                          f"{high:g} ({f.metadata['doc']}); the default is {f.default!r}")


def parse_assignment(text: str) -> Tuple[str, Any]:
    """Return ("top_k", 40) for "top_k=40", converted to the field's type.  Raises ConfigError."""
    name, equals, raw = text.partition("=")
    name = name.strip()
    known = {f.name: f for f in dataclasses.fields(Config)}
    if not equals:
        raise ConfigError(f"found {text!r}, expected FIELD=VALUE; for example top_k=40")
    if name not in known:
        raise ConfigError(f"there is no setting {name!r}; {_nearest_hint(name, list(known))}")
    expected = type(known[name].default)
    try:
        return name, expected(raw.strip() if expected is not str else raw)
    except ValueError:
        raise ConfigError(f"{name}={raw!r} is no {expected.__name__}; "
                          f"the default is {known[name].default!r}") from None


def _nearest_hint(word: str, known: Sequence[str]) -> str:
    """Return a sentence with the known words most like the one found."""
    import difflib  # only a mistake pays for this import
    near = difflib.get_close_matches(word, known, 3, 0.5)
    return f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(sorted(known))}"


# ──────────────────────────────────────────────────────────────────────────────────────
# 1 · CORPUS — the owner's words, read and never written   uses: 0
# ──────────────────────────────────────────────────────────────────────────────────────
# A corpus is a file that people edit by hand: one sentence a line, `H:` and `A:` lines in a row
# for an exchange, a blank line between documents. Whatever bytes it holds, reading ends, in
# bounded memory, with as many of its words as can be had. Bytes become characters block by block,
# characters become clean lines, lines become documents, and a document is known by the hash of
# its text, never by its place. So an edit shows as a few keys come and a few gone, the share of
# a text too large to train on whole hardly moves, and what is held out is held out for ever.

BLOCK_CHARS = 1 << 16        # read at a time; 1 << 14 took as long, 1 << 18 a fifth longer
MAX_LINE_PIECES = 64         # the most lines that one overlong line may become
WHOLE_LINES = 16             # a run of lines up to this long is always one document
LONGEST_EXCHANGE_LINES = 64  # where even an answer may be parted from its question
CHUNK_ODDS = 8               # in a longer run one line in so many begins a new document
MARKERS = ("H:", "A:")
AnyPath = Union[str, os.PathLike]

# A byte b that is not UTF-8 is decoded to chr(0xDC00 + b), the lone surrogate of PEP 383, which no
# valid text contains; _mend gives it its cp1252 letter, or Latin-1's where cp1252 has a hole.
_STRAY = re.compile(r"[\udc80-\udcff]")
_STRAY_LETTERS = "".join(
    chr(byte) if letter == "\ufffd" else letter
    for byte, letter in enumerate(bytes(range(128, 256)).decode("cp1252", "replace"), 128))
# What no clean line holds: controls (save the line feed), line separators, BOMs, lone surrogates,
# and what turns the direction of writing round or cannot be seen.
_ODD = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                  r"\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]+")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s)|[。！？]")


def _mend(text: str) -> str:
    """Return text with the stray bytes in it as letters."""
    if text.isascii():
        return text
    return _STRAY.sub(lambda stray: _STRAY_LETTERS[ord(stray[0]) - 0xDC80], text)


def tidied(text: str) -> str:
    """Return text mended and without controls: spaces for those that are space; line feeds stay."""
    return _ODD.sub(lambda odd: " " * sum(map(str.isspace, odd[0])), _mend(text))


def _break_at(text: str, max_chars: int) -> int:
    """Return where to end a piece: with a sentence in its second half, a word, or at max_chars."""
    if len(text) <= max_chars:
        return len(text)
    ends = (match.end() for match in _SENTENCE_END.finditer(text, max_chars // 2, max_chars + 1))
    sentence = max((end for end in ends if end <= max_chars), default=0)
    return sentence or max(0, text.rfind(" ", 1, max_chars + 1)) or max_chars


def decode_line(raw: bytes) -> str:
    """Return raw as UTF-8 text, each byte that is not UTF-8 as its cp1252 or Latin-1 letter."""
    return _mend(raw.decode("utf-8", "surrogateescape"))


def clean_line(text: str, max_chars: int) -> str:
    """Return text as one NFC line: no controls, no outer white space, at most max_chars long.

    Tabs and line breaks become spaces; a longer line is cut at the end of a sentence or a word
    where there is one. Any string is accepted, lone surrogates included. Idempotent.
    """
    line = unicodedata.normalize("NFC", tidied(text).replace("\n", " ").strip())
    return line[:_break_at(line, max_chars)].rstrip()


def split_long_line(text: str, max_chars: int) -> List[str]:
    """Return a clean line as pieces of 1 to max_chars characters, MAX_LINE_PIECES of them at most.

    A piece ends where _break_at says; what is left after the last piece is dropped.
    """
    pieces: List[str] = []
    start = 0
    while start < len(text) and len(pieces) < MAX_LINE_PIECES:
        window = text[start:start + max_chars + 1]
        end = _break_at(window, max_chars)
        pieces.append(window[:end].strip())
        start += end
    return [piece for piece in pieces if piece]


def clean_pieces(lines: Iterable[str], max_chars: int) -> List[str]:
    """Return lines clean, as pieces of at most max_chars characters each."""
    return [piece for line in lines for piece in split_long_line(
        clean_line(line, MAX_LINE_PIECES * max_chars), max_chars)]


def line_key(line: str, use: bytes = b"") -> int:
    """Return the 64-bit signed BLAKE2b hash of a line (RFC 7693), the same on every machine.

    It fits an SQLite INTEGER; each use has hashes of its own.
    """
    raw = line.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(raw, digest_size=8, person=use).digest()
    return int.from_bytes(digest, "big", signed=True)


# A line of word knowledge: = ~ or ! and words, or the name of a kind and its members.
WORD_LINE = re.compile(r"^(?:[=~!] ?\w|[^\W\dA-Z][\w. ]{0,40}: *[^\W\dA-Z][^.!?,A-Z\n]*$)", re.M)


@dataclasses.dataclass(frozen=True)
class Document:
    """An exchange or a passage: clean lines that belong together.

    closed is False where it was cut from a run of lines that goes on in the next document.
    """
    lines: Tuple[str, ...]
    closed: bool

    @property
    def text(self) -> str:
        """The lines as they stand in a file, each with its line feed."""
        return "\n".join(self.lines) + "\n"

    @property
    def is_exchange(self) -> bool:
        """Whether all lines are spoken by `H:` or `A:`."""
        return all(line.startswith(MARKERS) for line in self.lines)

    @property
    def is_dictionary(self) -> bool:
        """Whether all lines are word knowledge, which is looked up and not learned."""
        return self.text[0] in "=~!" and all(map(WORD_LINE.match, self.lines))

    @functools.cached_property
    def key(self) -> int:
        """The stable 64-bit signed hash of the text; whether it is closed does not count."""
        return line_key(self.text)

    @property
    def first_key(self) -> int:
        """The hash of its first line, blind to case: by that it is held out, or not, for ever."""
        return line_key(self.lines[0].casefold())

    def turns(self) -> List[Tuple[str, str]]:
        """Return the (speaker, words) of an exchange; a passage has none."""
        spoken = self.lines if self.is_exchange else ()
        return [(line[0], line[2:].strip()) for line in spoken]


def _space_marker(line: str) -> str:
    """Return a spoken line with one space between its marker and its words."""
    return (line[:2] + " " + line[2:].lstrip()).rstrip()


def _cut_run(run: Iterator[str]) -> Iterator[Document]:
    """Yield a run of lines of one kind as one document, or as chunks when it is long.

    Chunks are content-defined (Muthitacharoen et al. 2001): a line begins one if its own hash says
    so, hence an inserted line changes only the chunk around it. An answer begins a chunk only in
    a run without questions. CRC-32 suffices here and costs a third of a BLAKE2b hash.
    """
    head = list(itertools.islice(run, WHOLE_LINES + 1))
    is_long, chunk = len(head) > WHOLE_LINES, []  # type: bool, List[str]
    for line in itertools.chain(head, run):
        if is_long and chunk:
            begins = len(chunk) >= WHOLE_LINES or zlib.crc32(line.encode()) % CHUNK_ODDS == 0
            if line.startswith("A:"):
                begins = len(chunk) >= LONGEST_EXCHANGE_LINES
            if begins:
                yield Document(tuple(chunk), closed=False)
                chunk = []
        chunk.append(line)
    yield Document(tuple(chunk), closed=True)


def documents_of(lines: Iterable[str]) -> Iterator[Document]:
    """Yield the documents that clean lines form, in order; "" is a blank line.

    A document is a run of spoken lines (with their markers normalised to "H: words"), of word
    knowledge that begins with a sign, or of plain lines. Runs of more than WHOLE_LINES lines are
    cut where their content says.
    """
    kind: Optional[str] = None

    def kind_of(line: str) -> Optional[str]:
        nonlocal kind
        known = line and WORD_LINE.match(line) and (line[0] in "=~!" or kind == "known")
        kind = "known" if known else "spoken" if line[:2] in MARKERS else "plain" if line else None
        return kind
    for each, run in itertools.groupby(lines, kind_of):
        if each:
            yield from _cut_run(map(_space_marker, run) if each == "spoken" else run)


def is_held_out(document: Document, share: float = 0.1) -> bool:
    """Return whether the document is in the held-out share, which is within 0 to 1.

    The hash of its first line decides, blind to case and spacing: the same question is on the
    same side in every exchange, on every machine, for ever.
    """
    folded = unicodedata.normalize("NFC", document.lines[0].casefold())
    return line_key(" ".join(folded.split()), b"held-out") + 2 ** 63 < share * 2 ** 64


def to_hold_out(documents: Sequence[Document], share: float, most_chars: int) -> Set[int]:
    """Return the first_key of each document to be held out: a share, of about so many characters.

    There is none where all would be.
    """
    size = sum(len(document.text) for document in documents)
    share = min(share, most_chars / max(1, size))
    chosen = [document for document in documents if is_held_out(document, share)]
    return {d.first_key for d in chosen} if len(chosen) < len(documents) else set()


@dataclasses.dataclass(frozen=True)
class FileStamp:
    """What changes when a file does; saving by rename changes the inode."""
    mtime_ns: int
    ctime_ns: int  # an edit that keeps size and time changes this
    size: int
    inode: int
    device: int


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What was read of a text file: documents in file order, each text once, at its last place.

    total_lines counts the lines that hold text, an overlong one by its pieces; kept_all is False
    when documents were left out for want of room; notices are sentences for the owner.
    """
    documents: Tuple[Document, ...]
    total_lines: int
    kept_all: bool
    stamp: Optional[FileStamp]
    notices: Tuple[str, ...]


def _refusal(path: AnyPath, found: str, remedy: str) -> CorpusError:
    """Return the error that says on one line what is wrong with path."""
    return CorpusError(f"{os.fspath(path)!r}: found {found}, expected a text file; {remedy}")


def _stamp_of(path: AnyPath, opened: Optional[int] = None) -> FileStamp:
    """Return the stamp of the regular file at path, or already opened; CorpusError if none."""
    try:
        status = os.stat(path if opened is None else opened)
    except FileNotFoundError as failure:
        raise _refusal(path, "nothing", "create it or correct the path") from failure
    except (OSError, ValueError) as failure:  # ValueError: a NUL or a surrogate in the name
        raise _refusal(path, str(getattr(failure, "strerror", failure)),
                       "correct the path or its permissions") from failure
    if stat.S_ISDIR(status.st_mode):
        raise _refusal(path, "a directory", "name a file in it")
    if not stat.S_ISREG(status.st_mode):
        raise _refusal(path, "a pipe, socket or device", "copy what it gives into a file")
    return FileStamp(status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino,
                     status.st_dev)


def file_stamp(path: AnyPath) -> Optional[FileStamp]:
    """Return the stamp of the regular file at path, or None when there is no such file."""
    try:
        return _stamp_of(path)
    except CorpusError:
        return None


@contextlib.contextmanager
def _reading(path: AnyPath) -> Iterator[Tuple[io.TextIOWrapper, FileStamp]]:
    """Give the file at path as text with "\\n" newlines, in the encoding that its BOM names.

    With it comes its stamp of before the first byte: a change while we read shows at the next look.
    Decoding never fails. Raises CorpusError for whatever fails in opening or in the body's reads.
    """
    _stamp_of(path)
    try:
        # Opened without waiting: a pipe put in the file's place meanwhile must not hang us.
        at_once = getattr(os, "O_NONBLOCK", 0)
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as raw:
            stamp = _stamp_of(path, raw.fileno())  # something else may have come in its place
            if raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                encoding, errors = "utf-16", "replace"
            else:
                encoding, errors = "utf-8-sig", "surrogateescape"
            with io.TextIOWrapper(raw, encoding, errors) as handle:
                yield handle, stamp
    except OSError as failure:
        raise _refusal(path, failure.strerror or str(failure),
                       "check its permissions and its disk") from failure


def _clean_lines(handle: io.TextIOWrapper, max_chars: int,
                 tally: collections.Counter[str]) -> Iterator[str]:
    """Yield the file's lines clean and at most max_chars long, "" for blank; count in tally.

    Equal to clean_line and split_long_line on every line, but tidied by the block.
    """
    most_chars = MAX_LINE_PIECES * max_chars
    stray = _STRAY if handle.encoding == "utf-8-sig" else re.compile("\ufffd")
    carry, block = "", "start"
    while block:
        block = handle.read(BLOCK_CHARS)
        if not block.isascii():
            tally["stray"] += len(stray.findall(block))
        *lines, carry = (carry + tidied(block)).split("\n")
        # The part of an overlong line beyond most_chars is never used, so it is not carried on.
        carry = carry.lstrip()[:most_chars]
        for line in map(str.strip, lines if block else [carry]):
            pieces = [line]
            if not (line.isascii() and len(line) < max_chars):
                pieces = _pieces(line[:most_chars], max_chars)
                tally["long"] += len(line) > max_chars
            tally["lines"] += len(pieces) if line else 0
            yield from pieces


def _pieces(line: str, max_chars: int) -> List[str]:
    """Return a tidied line as clean ones: a plain line split, a spoken one cut.

    A cut keeps the exchange an exchange; pieces of a turn would be turns that nobody took.
    """
    pieces = [line]
    if line[:2] not in MARKERS:
        pieces = split_long_line(unicodedata.normalize("NFC", line), max_chars)
    return [clean_line(_space_marker(piece), max_chars) if piece[:2] in MARKERS else piece
            for piece in pieces]


def _notices(tally: collections.Counter[str], encoding: str,
             max_line_chars: int) -> Tuple[str, ...]:
    """Return a sentence for each thing counted in tally that the owner should know."""
    stray = ("bytes that are not UTF-8, read as cp1252" if encoding == "utf-8-sig"
             else "characters that are not UTF-16, kept as \ufffd")
    sentences = {
        "stray": f"{stray}: {tally['stray']}",
        "long": f"lines longer than {max_line_chars} characters, split or cut: {tally['long']}",
        "kept": f"kept the newest {tally['kept']} of {tally['lines']} lines"}
    return tuple(sentence for name, sentence in sentences.items() if tally[name])


def read_corpus(path: AnyPath, max_lines: int = Config.max_corpus_lines,
                max_line_chars: int = Config.max_line_chars,
                should_stop: Callable[[], bool] = lambda: False) -> Corpus:
    """Return the documents of the text file at path; of more than max_lines lines, the last ones.

    The last document is always kept. Raises CorpusError if there is no readable regular file, or
    when should_stop says to break off. Streams: memory is bounded by what is kept.
    """
    tally: collections.Counter[str] = collections.Counter()
    kept: collections.OrderedDict[int, Document] = collections.OrderedDict()
    kept_lines, kept_all = 0, True
    with _reading(path) as (handle, stamp):
        for document in documents_of(_clean_lines(handle, max_line_chars, tally)):
            if should_stop():
                raise CorpusError(f"{os.fspath(path)!r}: reading was broken off; start again")
            if kept.pop(document.key, None) is None:
                kept_lines += len(document.lines)
            kept[document.key] = document
            while kept_lines > max_lines and len(kept) > 1:
                kept_lines -= len(kept.popitem(last=False)[1].lines)
                kept_all = False
    tally["kept"] = 0 if kept_all else kept_lines
    return Corpus(tuple(kept.values()), tally["lines"], kept_all, stamp,
                  _notices(tally, handle.encoding, max_line_chars))


def read_text(path: AnyPath) -> str:
    """Return the whole file decoded as for read_corpus, with "\\n" newlines and no NULs.

    Nothing else is changed or cut. Raises CorpusError if there is no readable regular file.
    """
    with _reading(path) as (handle, _):
        return _mend(handle.read()).replace("\0", "")


def changes(old_keys: AbstractSet[int], corpus: Corpus) -> Tuple[List[Document], Set[int]]:
    """Return the documents whose keys are new, in file order, and the old keys now gone."""
    added = [document for document in corpus.documents if document.key not in old_keys]
    return added, set(old_keys) - {document.key for document in corpus.documents}


def training_share(documents: Iterable[Document], max_chars: int) -> Set[int]:
    """Return the keys of the documents to train on: all of them if max_chars hold their texts.

    Otherwise the newest, which are the last, that fit in half of max_chars (at least one), and
    of the others those with the smallest keys until it is full. Chance has no part in it, so an
    edit moves the choice by a document or so.
    """
    chars = {d.key: len(d.text) for d in documents if not d.is_dictionary}
    newest, filled = list(reversed(chars)), list(accumulate(reversed(chars.values())))
    if not newest or filled[-1] <= max_chars:
        return set(newest)
    count = max(1, bisect_right(filled, max_chars // 2))
    others = sorted(newest[count:])
    room = max_chars - filled[count - 1]
    fitting = bisect_right(list(accumulate(chars[key] for key in others)), room)
    return {*newest[:count], *others[:fitting]}


UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"  # Thai, Lao, Burmese, Khmer
            "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff")  # each sign a word
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
HYPHENED = re.compile(r"\b\w{1,2}-\w+")  # Wi-Fi is found as wifi too


def folded_words(text: str) -> List[str]:
    """Return the words of a text, its runs of letters and digits, without case and accents."""
    if text.isascii():  # as most lines are, and this is ten times as fast
        return WORDS.findall(text.lower())
    folded = unicodedata.normalize("NFKD", text.casefold())
    return WORDS.findall("".join(c for c in folded if not unicodedata.combining(c)))


FIRST_CORPUS = """\
H: Hello.
A: Hello. I am new here. Tell me something.

H: Who are you?
A: I am a small program on your own machine. I learn from what you say.

H: How do you learn?
A: I read your file, and I listen to you. Then I train a little.

H: What do you know?
A: Not much yet. I know what is in your file, and what you told me.

H: Are you alive?
A: I am a program. I change when you talk to me, and I keep what I learn.

H: Thank you.
A: I thank you. Good words help me grow.

H: Good night.
A: Good night. I will keep your words.

This file is yours. Write in it, one sentence a line.
What you write here, I learn.
"""


# ──────────────────────────────────────────────────────────────────────────────────────
# 2 · TOKENIZER — rows only append, so id 7 means the same text for ever   uses:
# ──────────────────────────────────────────────────────────────────────────────────────
# Byte-level byte-pair encoding that grows while it is in use. Text is cut into pre-tokens
# (words, numbers, runs of signs or of space), each pre-token becomes its UTF-8 bytes, and
# learned merges then join neighbouring ids. The ids stand in one row that is never edited:
#
#     0: <|endoftext|>  |  1..256: the single bytes  |  257..: merges, oldest first
#
# A merge's id is also its rank, so a new merge ranks after every old one. Hence the first n
# merges by themselves are exactly the tokenizer of version n: an encoding made long ago can
# be made again, and a model's embedding rows keep their meaning while new rows are added.

Pair = Tuple[int, int]

END_OF_TEXT = 0  # shown as <|endoftext|>; no text encodes to it
FIRST_BYTE = 1
FIRST_MERGE = FIRST_BYTE + 256
CACHED_PRE_TOKENS = 1 << 15
CACHED_PRE_TOKEN_CHARS = 64  # longer ones seldom repeat and would make the cache's size unbounded

# The pattern of GPT-2, spelled for ASCII. Under re.ASCII `\s` leaves out \x1c..\x1f, as it must.
PRE_TOKEN = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)


def pre_tokens(text: str) -> List[str]:
    """Return the pieces that merges never cross; joined, they are `text` again.

    The cut is that of GPT-2 (Radford et al. 2019): contractions, then letters, numbers and other
    signs, each with at most one space before, then white space. But marks count as letters, so
    that a word of Hindi, Thai or pointed Arabic is one piece. A character that this Python's
    `unicodedata` does not know yet counts as a sign; a newer Unicode may call it a letter.
    """
    if text.isascii():
        return PRE_TOKEN.findall(text)
    # Each character becomes an ASCII one of its kind, so spans carry over. Neither "a" nor "!" can
    # take part in a contraction such as 's; "\t", unlike " ", does not open a word.
    kinds = {"L": "a", "M": "a", "N": "0"}
    shadow = text.translate({
        ord(char): "\t" if char.isspace() else kinds.get(unicodedata.category(char)[0], "!")
        for char in set(text) if not char.isascii()})
    return [text[match.start():match.end()] for match in PRE_TOKEN.finditer(shadow)]


def _replace_pair(ids: Sequence[int], pair: Pair, new_id: int) -> List[int]:
    """Return `ids` with every `pair`, taken from the left without overlap, become `new_id`."""
    left, right = pair
    merged: List[int] = []
    for token_id in ids:
        if token_id == right and merged and merged[-1] == left:
            merged[-1] = new_id  # never equals `left`, so a joined id is not joined again
        else:
            merged.append(token_id)
    return merged


class _PairTally:
    """Counts of neighbouring ids over weighted words, kept true while pairs are merged.

    The heap is lazy: an entry may claim too much, never too little, because a merge can only
    raise the counts of pairs that hold the id it made, and those are pushed when it is made.
    """

    def __init__(self, weighted_words: Iterable[Tuple[Sequence[int], int]]) -> None:
        self._words = list(weighted_words)
        self._counts: Counter[Pair] = Counter()
        self._places: DefaultDict[Pair, Set[int]] = defaultdict(set)  # may hold past places too
        for place in range(len(self._words)):
            self._add_pairs(place)
        self._heap = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._heap)

    def _add_pairs(self, place: int) -> None:
        word, weight = self._words[place]
        for pair in zip(word, word[1:]):
            self._counts[pair] += weight
            self._places[pair].add(place)

    def pop_commonest(self, min_count: int) -> Optional[Pair]:
        """Remove and return the commonest pair, of equals the lowest; None below `min_count`."""
        while self._heap and -self._heap[0][0] >= min_count:
            negative_count, pair = heapq.heappop(self._heap)
            count = self._counts[pair]
            if count == -negative_count:
                return pair
            heapq.heappush(self._heap, (-count, pair))
        return None

    def merge(self, pair: Pair, new_id: int) -> None:
        """Join `pair` wherever it stands and bring all counts up to date."""
        grown: Set[Pair] = set()
        for place in self._places.pop(pair):
            old_word, weight = self._words[place]
            for old_pair in zip(old_word, old_word[1:]):
                self._counts[old_pair] -= weight
            word = _replace_pair(old_word, pair, new_id)
            self._words[place] = word, weight
            self._add_pairs(place)
            grown.update(joint for joint in zip(word, word[1:]) if new_id in joint)
        for joint in grown:
            heapq.heappush(self._heap, (-self._counts[joint], joint))


class EvolvingTokenizer:
    """A byte-level BPE vocabulary to which merges are only ever appended.

    No two ids spell the same bytes; `merges` are pairs of ids, and merge k makes id 257 + k.
    Raises ValueError for a merge that names a special or later id, or spells a known token.
    Sources: Sennrich et al. 2016, arXiv:1508.07909; Radford et al. 2019 (bytes as the alphabet).
    """

    def __init__(self, merges: Iterable[Pair] = ()) -> None:
        self._merges: List[Pair] = []
        self._id_of_pair: Dict[Pair, int] = {}
        self._bytes_of_id = [b""] * FIRST_BYTE + [bytes([byte]) for byte in range(256)]
        self._spelled: Set[bytes] = set(self._bytes_of_id)
        self._cache: Dict[str, List[int]] = {}  # pre-token -> ids at the present version
        for pair in merges:
            self._append_merge(pair)

    def _append_merge(self, pair: Pair) -> None:
        spelling = self._joined_bytes(pair)
        if spelling in self._spelled:  # with a special, which has no bytes, nothing new is spelled
            raise ValueError(f"merge {self.version} spells {spelling!r}; expected a new spelling")
        self._merges.append(pair)
        self._id_of_pair[pair] = self.vocab_size
        self._bytes_of_id.append(spelling)
        self._spelled.add(spelling)
        self._cache.clear()

    def _joined_bytes(self, pair: Pair) -> bytes:
        return b"".join(map(self.token_bytes, pair))

    @property
    def vocab_size(self) -> int:
        """The number of ids: specials, bytes and merges."""
        return len(self._bytes_of_id)

    @property
    def merges(self) -> Tuple[Pair, ...]:
        """The pairs of ids that were merged, oldest first."""
        return tuple(self._merges)

    @property
    def version(self) -> int:
        """The number of merges; so many first merges alone make today's tokenizer again."""
        return len(self._merges)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes an id stands for, none for a special; ValueError if out of range."""
        if not 0 <= token_id < len(self._bytes_of_id):
            raise ValueError(f"token id {token_id} is outside the vocabulary; "
                             f"expected 0 to {self.vocab_size - 1}")
        return self._bytes_of_id[token_id]

    def encode(self, text: str) -> List[int]:
        """Return the ids of `text`, none of them special; a lone surrogate is taken as a "?".

        Measured on 1 MB of English manuals, 1,024 merges, Python 3.11: 0.13 s with the cache
        warm, 0.25 s cold.
        """
        ids: List[int] = []
        for piece in pre_tokens(text):
            ids += self._cache.get(piece) or self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str) -> List[int]:
        """Merge one pre-token's bytes, lowest rank first, in passes over it; fill the cache.

        One pass may join all of a pair's places: what it makes can only take part in later ranks.
        Time grows with the piece's length times the number of different merges that apply.
        """
        ids = [FIRST_BYTE + byte for byte in piece.encode("utf-8", "replace")]
        none = self.vocab_size
        while len(ids) > 1:
            first = min(self._id_of_pair.get(pair, none) for pair in zip(ids, ids[1:]))
            if first == none:
                break
            ids = _replace_pair(ids, self._merges[first - FIRST_MERGE], first)
        if len(self._cache) >= CACHED_PRE_TOKENS:
            self._cache.clear()
        if len(piece) <= CACHED_PRE_TOKEN_CHARS:
            self._cache[piece] = ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: decode(encode(text)) == text unless it has lone surrogates.

        Specials give no text, and bytes that are not UTF-8 give U+FFFD. Raises ValueError for an
        id out of range.
        """
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", "replace")

    def learn_merges(self, texts: Iterable[str], count: int, min_pair_count: int = 2) -> int:
        """Append up to `count` merges learned from `texts`; return how many were appended.

        Each is the commonest pair of neighbouring ids within pre-tokens (overlaps count: "aaa"
        has two) under all merges so far; of equals, the one with the lowest ids. A pair that
        spells a known token is passed over. Stops when none occurs `min_pair_count` times.
        Measured on 50 KB of English manuals, 400 merges, Python 3.11: 0.06 s.
        """
        weights: Counter[str] = Counter()
        for text in texts:
            weights.update(pre_tokens(text))
        tally = _PairTally((self._encode_piece(piece), weight)
                           for piece, weight in weights.items())
        goal = self.version + count
        while self.version < goal:
            pair = tally.pop_commonest(min_pair_count)
            if pair is None:
                break
            if self._joined_bytes(pair) not in self._spelled:
                tally.merge(pair, self.vocab_size)
                self._append_merge(pair)
        return self.version - (goal - count)

    def pack(self) -> bytes:
        """Return the stored form: the merges as a JSON list of pairs."""
        return json.dumps(self._merges, separators=(",", ":")).encode("ascii")

    @classmethod
    def unpack(cls, blob: bytes) -> EvolvingTokenizer:
        """Return the tokenizer that `pack` stored; the first stores had the list in an object.

        Whether a blob is as it was written is for its checksum to say. Raises ValueError for what
        makes no tokenizer.
        """
        try:
            stored = json.loads(blob)
            return cls((left, right) for left, right in
                       (stored["merges"] if isinstance(stored, dict) else stored))
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise ValueError(f"stored tokenizer: found {blob[:40]!r} ({error}); "
                             "expected a JSON list of merges") from error


class StreamDecoder:
    """Turns ids into text one at a time and never shows half a character.

    What `feed` and the last `flush` return, joined, equals `decode` of the same ids, whatever
    the ids: both follow one error rule. A special gives no text and leaves a begun character open.
    """

    def __init__(self, tokenizer: EvolvingTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """Take one id; return the text it completed. Raises ValueError for an id out of range."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """End the stream; return U+FFFD for a character cut short, and be ready for a new one."""
        return self._decoder.decode(b"", final=True)


# ──────────────────────────────────────────────────────────────────────────────────────
# 3 · KERNELS — the loops, and nothing but the loops   uses:
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Each kernel is a plain function in a small typed subset of Python: buffers that are flat arrays
# of floats (F32) or ints (I32), int and float scalars, `for … in range`, `if`, arithmetic and
# exp/log/sqrt. Run as they stand they are the reference that every faster form must agree with.
# Buffers are row-major; "adds" means +=, so that gradients of shared values sum by themselves.
# Lists of a fixed length are local arrays; a Vector8 is eight floats that move as one, and loops
# over a small constant range are unrolled, so that a block of a product can stay in registers.

F32 = array
I32 = array


class Vector8(tuple):
    """Eight floats, added and scaled together: one register of a compiled kernel."""

    def __add__(self, other: Any) -> "Vector8":
        return Vector8(map(add, self, other))

    def __rmul__(self, factor: float) -> "Vector8":
        return Vector8(factor * number for number in self)


def two_to(k: float) -> float:
    """Return 2 to a whole number from −127 to 127; 0 for −127."""
    return 2.0 ** k if k > -127.0 else 0.0


def exponential(x: float) -> float:
    """Return e**x, with a relative error below 4e-7 in float32; 0 below −87.4, e**88 above 88.

    x = k·ln 2 + r, with |r| below 0.35 for a polynomial: compiled kernels take it for exp, since
    it has no branch that would keep a loop from running on whole vectors.
    """
    x = min(max(x, -88.0), 88.0)
    k = round(x * 1.44269504)
    r = x - k * 0.693147182
    tail = 0.5 + r * (0.16666667 + r * (0.041666665 + r * (0.0083334519 + r * 0.0013888888)))
    return (1.0 + r * (1.0 + r * tail)) * two_to(k)


def sigmoid(x: float) -> float:
    """Return 1/(1 + e**−x), which no x makes overflow."""
    small = exp(-abs(x))
    return 1.0 / (1.0 + small) if x >= 0.0 else small / (1.0 + small)


def load8(x: Sequence[float], at: int) -> Vector8:
    """Return the eight numbers from x[at] on."""
    return Vector8(x[at:at + 8])


def store8(x: Any, at: int, vector: Vector8) -> None:
    """Put eight numbers into x from x[at] on."""
    for i, number in enumerate(vector):
        x[at + i] = number


def splat8(number: float) -> Vector8:
    """Return a number eight times."""
    return Vector8((number,) * 8)


def put8(vector: Vector8, out: F32, at: int, n: int, keep: int) -> None:
    """Set n numbers of out, at most eight, from out[at] on, to the vector's; add them if keep."""
    part = [0.0] * 8
    if n >= 8:
        if keep > 0:
            store8(out, at, load8(out, at) + vector)
        else:
            store8(out, at, vector)
    else:
        store8(part, 0, vector)
        for i in range(n):
            out[at + i] = part[i] + (out[at + i] if keep > 0 else 0.0)


UNSET = 0.0  # for an array that is written before it is read: compiled, it costs no filling
BLOCK_ROWS, BLOCK_VECTORS = 6, 2  # what 16 vector registers hold; 32 of them hold 8 by 3


def pack_panel(b: F32, at: int, step: int, col: int, depth: int, width: int, panel: F32) -> None:
    """Set panel's rows to b's, of which `width` numbers are taken and the rest of a block is 0."""
    wide = 8 * BLOCK_VECTORS
    for k in range(depth):
        for j in range(width):
            panel[k * wide + j] = b[at + k * step + j * col]
        for j in range(width, wide):
            panel[k * wide + j] = 0.0


def multiply_block(a: F32, at: int, a_row: int, a_step: int, panel: F32, depth: int, out: F32,
                   to: int, out_row: int, width: int, keep: int) -> None:
    """Set a block of out, or add to it if keep, to rows of a times a panel."""
    sums = [splat8(0.0)] * (BLOCK_ROWS * BLOCK_VECTORS)
    line = [splat8(0.0)] * BLOCK_VECTORS
    for k in range(depth):
        for v in range(BLOCK_VECTORS):
            line[v] = load8(panel, 8 * (k * BLOCK_VECTORS + v))
        for i in range(BLOCK_ROWS):
            x = a[at + i * a_row + k * a_step]
            for v in range(BLOCK_VECTORS):
                sums[i * BLOCK_VECTORS + v] = sums[i * BLOCK_VECTORS + v] + x * line[v]
    for i in range(BLOCK_ROWS):
        for v in range(BLOCK_VECTORS):
            put8(sums[i * BLOCK_VECTORS + v], out, to + i * out_row + 8 * v, width - 8 * v, keep)


def multiply(a: F32, a_at: int, a_row: int, a_step: int, b: F32, b_at: int, b_step: int,
             b_col: int, out: F32, out_at: int, out_row: int, rows: int, inner: int, cols: int,
             keep: int) -> None:
    """Set out[r, c], or add to it if keep, Σ a[r, k]·b[k, c] over k, in blocks held in registers.

    a[r, k] stands at a_at + r·a_row + k·a_step, b[k, c] at b_at + k·b_step + c·b_col, out[r, c] at
    out_at + r·out_row + c. A panel of a block's columns and 256 steps of b lies packed in the first
    cache while all rows pass. (Training: 52,700 tokens/s with it, 4,100 by `product`.)
    """
    panel = [UNSET] * (2048 * BLOCK_VECTORS)
    for k0 in range(0, inner, 256):
        depth = min(inner - k0, 256)
        for j0 in range(0, cols, 8 * BLOCK_VECTORS):
            width = min(cols - j0, 8 * BLOCK_VECTORS)
            pack_panel(b, b_at + k0 * b_step + j0 * b_col, b_step, b_col, depth, width, panel)
            at = a_at + k0 * a_step
            to = out_at + j0
            for i0 in range(0, rows - BLOCK_ROWS + 1, BLOCK_ROWS):
                multiply_block(a, at + i0 * a_row, a_row, a_step, panel, depth, out,
                               to + i0 * out_row, out_row, width, keep + k0)
            for i in range(rows - rows % BLOCK_ROWS, rows):
                sums = [splat8(0.0)] * BLOCK_VECTORS
                for k in range(depth):
                    x = a[at + i * a_row + k * a_step]
                    for v in range(BLOCK_VECTORS):
                        sums[v] = sums[v] + x * load8(panel, 8 * (k * BLOCK_VECTORS + v))
                for v in range(BLOCK_VECTORS):
                    put8(sums[v], out, to + i * out_row + 8 * v, width - 8 * v, keep + k0)


def product(a: F32, a_at: int, a_row: int, a_step: int, b: F32, b_at: int, b_step: int,
            b_col: int, out: F32, out_at: int, out_row: int, rows: int, inner: int, cols: int,
            keep: int) -> None:
    """Do what multiply does, in no order but the plainest."""
    for r in range(rows):
        for c in range(cols):
            total = out[out_at + r * out_row + c] if keep > 0 else 0.0
            for k in range(inner):
                total += a[a_at + r * a_row + k * a_step] * b[b_at + k * b_step + c * b_col]
            out[out_at + r * out_row + c] = total


def add_scaled(x: F32, out: F32, n: int, scale: float) -> None:
    """Add scale·x to out; both hold n numbers."""
    for i in range(n):
        out[i] += scale * x[i]


def dot(x: F32, y: F32, n: int) -> float:
    """Return Σ x·y over n numbers."""
    total = 0.0
    for i in range(n):
        total += x[i] * y[i]
    return total


def gather_rows(table: F32, ids: I32, out: F32, rows: int, dim: int) -> None:
    """Set row r of out (rows, dim) to row ids[r] of table."""
    for r in range(rows):
        for c in range(dim):
            out[r * dim + c] = table[ids[r] * dim + c]


def scatter_rows(g: F32, ids: I32, dtable: F32, rows: int, dim: int) -> None:
    """Add row r of g (rows, dim) to row ids[r] of dtable."""
    for r in range(rows):
        for c in range(dim):
            dtable[ids[r] * dim + c] += g[r * dim + c]


def rmsnorm_forward(x: F32, out: F32, inverse: F32, rows: int, dim: int, eps: float) -> None:
    """Set each row of out (rows, dim) to x·inverse with inverse = 1/√(mean(x²) + eps)."""
    for r in range(rows):
        total = 0.0
        for c in range(dim):
            total += x[r * dim + c] * x[r * dim + c]
        inverse[r] = 1.0 / sqrt(total / dim + eps)
        for c in range(dim):
            out[r * dim + c] = x[r * dim + c] * inverse[r]


def rmsnorm_backward(g: F32, out: F32, inverse: F32, dx: F32, rows: int, dim: int) -> None:
    """Add to dx the gradient inverse·(g − out·mean(g·out))."""
    for r in range(rows):
        total = 0.0
        for c in range(dim):
            total += g[r * dim + c] * out[r * dim + c]
        mean = total / dim
        for c in range(dim):
            i = r * dim + c
            dx[i] += inverse[r] * (g[i] - out[i] * mean)


def rope_turn(x: F32, table: F32, out: F32, rows: int, dim: int, turned: int, width: int,
              sign: float) -> None:
    """Add to out (rows, dim) x with its first `turned` channels turned, the others as they are.

    table (rows, width) holds cos and sin of each pair of a head; sign −1 turns back.
    """
    for r in range(rows):
        for head in range(0, turned, width):
            for c in range(0, width, 2):
                i = r * dim + head + c
                cosine = table[r * width + c]
                sine = sign * table[r * width + c + 1]
                out[i] += x[i] * cosine - x[i + 1] * sine
                out[i + 1] += x[i] * sine + x[i + 1] * cosine
        for c in range(turned, dim):
            out[r * dim + c] += x[r * dim + c]


def softmax_row(x: F32, at: int, n: int, room: int, scale: float) -> float:
    """Make n scores at x[at] weights that sum to 1; return the log of Σ exp(scale·score).

    The rest of so much room becomes 0: a room of whole sixteens leaves no loop a remainder.
    """
    for j in range(at + n, at + room):
        x[j] = -1e30
    top = -1e30
    for j in range(room):
        top = max(top, x[at + j])
    total = 0.0
    for j in range(room):
        weight = exp((x[at + j] - top) * scale)
        x[at + j] = weight
        total += weight
    share = 1.0 / total
    for j in range(room):
        x[at + j] *= share
    return top * scale + log(total)


def softmax(x: F32, n: int) -> float:
    """Make n logits probabilities; return the log of the sum of their exponentials."""
    return softmax_row(x, 0, n, n, 1.0)


QUERIES = 24  # queries that attention looks at together, as many as blocks of either size fill


def weigh_keys(x: F32, keys: int, queries: int, past: int, scale: float, lse: F32, at: int,
               step: int) -> None:
    """Make scores x (keys, QUERIES) weights of each query, of which the first sees past + 1 keys.

    Sets lse, from lse[at] on, to log Σ exp(scale·score) of each query.
    """
    top = [-1e30] * QUERIES
    total = [0.0] * QUERIES
    for k in range(keys):
        for i in range(min(k - past, queries)):
            x[k * QUERIES + i] = -1e30
        for i in range(queries):
            top[i] = max(top[i], x[k * QUERIES + i])
    for k in range(keys):
        for i in range(queries):
            weight = exp((x[k * QUERIES + i] - top[i]) * scale)
            x[k * QUERIES + i] = weight
            total[i] += weight
    for i in range(queries):
        lse[at + i * step] = top[i] * scale + log(total[i])
        total[i] = 1.0 / total[i]
    for k in range(keys):
        for i in range(queries):
            x[k * QUERIES + i] *= total[i]


def weigh_back(x: F32, slopes: int, keys: int, queries: int, past: int, scale: float, lse: F32,
               at: int, step: int) -> None:
    """Make scores weights again, by lse, and the gradients of weights at `slopes` those of scores.

    Shapes are those of weigh_keys.
    """
    total = [0.0] * QUERIES
    common = [0.0] * QUERIES
    for i in range(queries):
        total[i] = lse[at + i * step]
    for k in range(keys):
        for i in range(min(k - past, queries)):
            x[k * QUERIES + i] = -1e30
        for i in range(queries):
            weight = exp(x[k * QUERIES + i] * scale - total[i])
            x[k * QUERIES + i] = weight
            common[i] += weight * x[slopes + k * QUERIES + i]
    for k in range(keys):
        for i in range(queries):
            slope = x[slopes + k * QUERIES + i] - common[i]
            x[slopes + k * QUERIES + i] = x[k * QUERIES + i] * slope * scale


def attention_forward(qkv: F32, out: F32, lse: F32, starts: I32, segments: int, heads: int,
                      width: int, x: F32) -> None:
    """Set out (T, H·D) to causal attention inside each segment; lse (T, H) to log Σ exp(scores).

    qkv (T, 3·H·D) holds queries, keys and values side by side; segment s is rows starts[s] to
    starts[s+1]. Scores are q·k/√D; x has room for QUERIES of them for each row of a segment.
    Source: FlashAttention, arXiv:2205.14135.
    """
    dim = heads * width
    wide = 3 * dim
    scale = 1.0 / sqrt(width)
    for s in range(segments):
        for h in range(heads):
            k = starts[s] * wide + dim + h * width
            for first in range(starts[s], starts[s + 1], QUERIES):
                rows = min(starts[s + 1] - first, QUERIES)
                past = first - starts[s]
                keys = past + rows
                q = first * wide + h * width
                multiply(qkv, k, wide, 1, qkv, q, 1, wide, x, 0, QUERIES, keys, width, rows, 0)
                weigh_keys(x, keys, rows, past, scale, lse, first * heads + h, heads)
                multiply(x, 0, 1, QUERIES, qkv, k + dim, wide, 1, out, first * dim + h * width, dim,
                         rows, keys, width, 0)


def attention_backward(g: F32, qkv: F32, lse: F32, dqkv: F32, starts: I32, segments: int,
                       heads: int, width: int, x: F32) -> None:
    """Add to dqkv the gradient of attention_forward; the weights are computed again from lse.

    x has room for QUERIES scores and as many slopes for each row of a segment.
    """
    dim = heads * width
    wide = 3 * dim
    scale = 1.0 / sqrt(width)
    for s in range(segments):
        b = QUERIES * (starts[s + 1] - starts[s])
        for h in range(heads):
            k = starts[s] * wide + dim + h * width
            for first in range(starts[s], starts[s + 1], QUERIES):
                rows = min(starts[s + 1] - first, QUERIES)
                past = first - starts[s]
                keys = past + rows
                q = first * wide + h * width
                o = first * dim + h * width
                multiply(qkv, k, wide, 1, qkv, q, 1, wide, x, 0, QUERIES, keys, width, rows, 0)
                multiply(qkv, k + dim, wide, 1, g, o, 1, dim, x, b, QUERIES, keys, width, rows, 0)
                weigh_back(x, b, keys, rows, past, scale, lse, first * heads + h, heads)
                multiply(x, b, 1, QUERIES, qkv, k, wide, 1, dqkv, q, wide, rows, keys, width, 1)
                multiply(x, b, QUERIES, 1, qkv, q, wide, 1, dqkv, k, wide, keys, rows, width, 1)
                multiply(x, 0, QUERIES, 1, g, o, dim, 1, dqkv, k + dim, wide, keys, rows, width, 1)


def attention_cached(q: F32, at: int, keys: F32, values: F32, out: F32, to: int, length: int,
                     block: int, heads: int, width: int, x: F32, spare: int) -> None:
    """Set H·D numbers of out, from out[to] on, to the attention of one query over a cache.

    The query's H·D numbers begin at q[at]; keys and values are (H·D, block), of which `length`
    slots are filled. x has room for block + 16 numbers from x[spare] on.
    """
    scale = 1.0 / sqrt(width)
    for h in range(heads):
        for j in range(length):
            x[spare + j] = 0.0
        for c in range(h * width, (h + 1) * width):
            for j in range(length):
                x[spare + j] += q[at + c] * keys[c * block + j]
        softmax_row(x, spare, length, (length + 15) // 16 * 16, scale)
        for c in range(h * width, (h + 1) * width):
            total = 0.0
            for j in range(length):
                total += x[spare + j] * values[c * block + j]
            out[to + c] = total


def row_product(w: F32, x: F32, at: int, out: F32, to: int, rows: int, inner: int) -> None:
    """Set out, from out[to] on, to w (rows, inner) times the numbers of x from x[at] on."""
    for r in range(rows):
        total = 0.0
        for k in range(inner):
            total += w[r * inner + k] * x[at + k]
        out[to + r] = total


def normed_row(x: F32, out: F32, dim: int, factor: float, eps: float) -> None:
    """Set out to dim numbers of x over their root mean square, times a factor."""
    total = 0.0
    for c in range(dim):
        total += x[c] * x[c]
    scale = factor / sqrt(total / dim + eps)
    for c in range(dim):
        out[c] = x[c] * scale


def decode_block(x: F32, qkv: F32, mix: F32, gates: F32, down: F32, angles: F32, keys: F32,
                 values: F32, room: F32, dim: int, heads: int, hidden: int, slot: int, length: int,
                 block: int, eps: float) -> None:
    """Pass one token's residual x (C) through a block of the model, all but its caches' logic.

    Weights are (3·C, C), (C, C), (2·F, C), (C, F); keys and values (C, block) take the token in
    at `slot`, and `length` slots are then filled; room has 5·C + 3·F + block + 16 numbers.
    """
    width = dim // heads
    normed_row(x, room, dim, 1.0, eps)
    row_product(qkv, room, 0, room, dim, 3 * dim, dim)
    for first in range(dim, 3 * dim, width):
        for c in range(0, width, 2):
            even = room[first + c]
            odd = room[first + c + 1]
            room[first + c] = even * angles[c] - odd * angles[c + 1]
            room[first + c + 1] = even * angles[c + 1] + odd * angles[c]
    for c in range(dim):
        keys[c * block + slot] = room[2 * dim + c]
        values[c * block + slot] = room[3 * dim + c]
    attention_cached(room, dim, keys, values, room, 0, length, block, heads, width, room, 4 * dim)
    row_product(mix, room, 0, room, dim, dim, dim)
    for c in range(dim):
        x[c] += room[dim + c]
    normed_row(x, room, dim, 1.0, eps)
    row_product(gates, room, 0, room, dim, 2 * hidden, dim)
    up = dim + hidden
    for c in range(hidden):
        gate = room[dim + c]
        room[dim + c] = gate * sigmoid(gate) * room[up + c]
    row_product(down, room, dim, room, up, dim, hidden)
    for c in range(dim):
        x[c] += room[up + c]


def decode_head(x: F32, table: F32, logits: F32, room: F32, dim: int, vocab: int, gain: float,
                eps: float) -> None:
    """Set logits (V) to the products of a token's normed residual x (C) with table (V, C)."""
    normed_row(x, room, dim, gain, eps)
    row_product(table, room, 0, logits, 0, vocab, dim)


def penalise_repeats(x: F32, n: int, past: I32, size: int, multiplier: float, log_base: float,
                     allowed: int, most: float) -> None:
    """Lower, of n logits, those that would prolong a repetition in past by more than allowed.

    After m ids that stood earlier too, what followed there costs multiplier·base**(m − allowed),
    in which the power is at most `most`; x[n:2·n] is room, all zero, and is left so.
    """
    for i in range(1, size):
        m = 0
        while past[i - 1 - m] == past[size - 1 - m] if m < i else 0 > 1:
            m += 1
        x[n + past[i]] = max(x[n + past[i]], m + 0.0)
    for i in range(1, size):
        t = past[i]
        if x[n + t] >= max(allowed, 1):
            x[t] -= multiplier * exp(log_base * min(x[n + t] - allowed, most))
        x[n + t] = 0.0


def largest(x: F32, n: int, count: int, to: int) -> None:
    """Set x[to + 1] and on to the count largest of n numbers, falling; after them their indices.

    Of equal numbers the first comes first. The indices begin at x[to + count + 2].
    """
    ids = to + count + 1
    for j in range(count + 1):
        x[to + j] = -3e38
    x[to] = 3e38
    for i in range(n):
        if x[i] > x[to + count]:
            j = count
            while x[to + j - 1] < x[i]:
                x[to + j] = x[to + j - 1]
                x[ids + j] = x[ids + j - 1]
                j -= 1
            x[to + j] = x[i]
            x[ids + j] = i


def softened(x: F32, at: int, count: int, to: int) -> float:
    """Set x[to] and on to the exponentials of count falling logits less the first; return Σ."""
    total = 0.0
    for j in range(count):
        x[to + j] = exp(x[at + j] - x[at])
        total += x[to + j]
    return total


def sample_token(logits: F32, n: int, x: F32, past: I32, size: int, multiplier: float,
                 log_base: float, allowed: int, most: float, top_k: int, top_p: float,
                 min_p: float, temperature: float, chance: float) -> int:
    """Return the id that the usual chain of samplers draws at chance, from 0 to below 1.

    The chain: DRY, top-k, top-p, min-p, temperature, as the filters of section 9 define them.
    x has room for 2·n + 3·top_k + 4 numbers.
    """
    count = min(top_k, n)
    for i in range(n):
        x[i] = logits[i]
        x[n + i] = 0.0
    if multiplier > 0.0:
        penalise_repeats(x, n, past, size, multiplier, log_base, allowed, most)
    largest(x, n, count, 2 * n)
    at = 2 * n + 1
    ids = at + count + 1
    room = ids + count
    total = softened(x, at, count, room)
    mass = 0.0
    kept = 0
    for j in range(count):
        if mass < top_p * total:
            if x[room + j] >= min_p:
                kept = j + 1
        mass += x[room + j]
    for j in range(kept):
        x[at + j] /= temperature
    total = chance * softened(x, at, kept, room)
    best = 0
    mass = x[room]
    while mass <= total:
        best += 1
        mass += x[room + best] if best < kept else 3e38
    return int(x[ids + min(best, kept - 1)])


def swiglu_forward(x: F32, out: F32, rows: int, dim: int) -> None:
    """Set out (rows, dim) to silu(gate)·up; x (rows, 2·dim) holds gates, then ups."""
    for r in range(rows):
        for c in range(dim):
            gate = x[r * 2 * dim + c]
            out[r * dim + c] = gate * sigmoid(gate) * x[r * 2 * dim + dim + c]


def swiglu_backward(g: F32, x: F32, dx: F32, rows: int, dim: int) -> None:
    """Add to dx (rows, 2·dim) the gradient of swiglu_forward."""
    for r in range(rows):
        for c in range(dim):
            i = r * 2 * dim + c
            gate = x[i]
            opened = sigmoid(gate)
            grad = g[r * dim + c]
            dx[i] += grad * x[i + dim] * opened * (1.0 + gate * (1.0 - opened))
            dx[i + dim] += grad * gate * opened


def dropout_apply(x: F32, out: F32, n: int, rate: float, seed: int) -> None:
    """Add to out x with a share `rate` of its numbers dropped and the others scaled up.

    The mask is a function of seed and place, so the backward pass is the same call, and no number
    waits for the one before it: each place is hashed by two multiplications modulo 2**32.
    """
    scale = 1.0 / (1.0 - rate)
    least = rate * 4294967296.0
    for i in range(n):
        state = (i * 1640531527 + seed) % 4294967296
        state = (state ^ state >> 15) * 747796405 % 4294967296
        state = (state ^ state >> 13) * 1181783497 % 4294967296
        out[i] += x[i] * scale if state ^ state >> 16 >= least else 0.0


def cross_entropy_forward(logits: F32, targets: I32, lse: F32, losses: F32, rows: int,
                          vocab: int) -> None:
    """Set losses[r] = −ln p(targets[r]) in nats (0 where the target is −1), lse[r] = ln Σ exp."""
    for r in range(rows):
        top = logits[r * vocab]
        for c in range(vocab):  # a call of max takes half as long again where this is interpreted
            if logits[r * vocab + c] > top:
                top = logits[r * vocab + c]
        total = 0.0
        for c in range(vocab):
            total += exp(logits[r * vocab + c] - top)
        lse[r] = top + log(total)
        losses[r] = lse[r] - logits[r * vocab + targets[r]] if targets[r] >= 0 else 0.0


def cross_entropy_backward(logits: F32, targets: I32, lse: F32, dlogits: F32, rows: int,
                           vocab: int, scale: float) -> None:
    """Add to dlogits scale·(softmax − one-hot) for every row whose target is not −1."""
    for r in range(rows):
        if targets[r] >= 0:
            for c in range(vocab):
                dlogits[r * vocab + c] += scale * exp(logits[r * vocab + c] - lse[r])
            dlogits[r * vocab + targets[r]] -= scale


def adamw_step(w: F32, g: F32, m: F32, v: F32, n: int, rate: float, beta1: float, beta2: float,
               eps: float, decay: float, fix1: float, fix2: float, clip: float) -> None:
    """Move w[:n] one AdamW step down clip·g; fix1, fix2 = 1/(1−βᵗ) undo the moments' bias.

    Source: Decoupled Weight Decay Regularization, arXiv:1711.05101, algorithm 2.
    """
    for i in range(n):
        grad = g[i] * clip
        m[i] = beta1 * m[i] + (1.0 - beta1) * grad
        v[i] = beta2 * v[i] + (1.0 - beta2) * grad * grad
        w[i] -= rate * (m[i] * fix1 / (sqrt(v[i] * fix2) + eps) + decay * w[i])


def multiply_adds(out: F32, n: int, factor: float) -> None:
    """Do n times 96 independent multiply-adds on out (96,), and nothing else: a core's peak."""
    sums = [splat8(0.0)] * 12
    one = splat8(1.0)
    for i in range(12):
        sums[i] = load8(out, 8 * i)
    for k in range(n):
        for i in range(12):
            sums[i] = one + factor * sums[i]
    for i in range(12):
        store8(out, 8 * i, sums[i])


KERNELS: Tuple[Callable[..., Any], ...] = (
    exponential, sigmoid, multiply_adds, put8, pack_panel, multiply_block, multiply, add_scaled,
    dot, gather_rows, scatter_rows, rmsnorm_forward, rmsnorm_backward, rope_turn, softmax_row,
    softmax, weigh_keys, weigh_back, attention_forward, attention_backward, attention_cached,
    row_product, normed_row, decode_block, decode_head, penalise_repeats, largest, softened,
    sample_token, swiglu_forward, swiglu_backward, dropout_apply, cross_entropy_forward,
    cross_entropy_backward, adamw_step)


# ──────────────────────────────────────────────────────────────────────────────────────
# 4 · ENGINE — the same sums, by the fastest road there is   uses: 0 3
# ──────────────────────────────────────────────────────────────────────────────────────
#
# An Engine is a table of kernels and the kind of buffer they work on. The compiled one has the
# same kernels, translated to C from the source above; it stands at the end of this section. The
# interpreted one, for machines without a compiler, replaces the kernels that dominate by twins in
# idiomatic Python. Two tricks stand in for the dot product that the standard library lacks before
# 3.12. math.dist runs in C over two tuples, and
#     a·b = ½|a|² + ½|b|² − ½|a − b|²
# in double precision, so that what cancels is far below float32's own rounding. And a big int holds
# many numbers in fixed point, all of which one multiplication multiplies. Measured a multiply-add:
# plain loops 90 ns, sum(map(mul, a, b)) 25 ns, math.dist 6 to 10 ns, big ints 3.5 ns.


PARALLEL_WORK = 4_000_000  # multiply-adds from which a second thread is worth its waking (50 µs)


class Engine:
    """A table of kernels, reached as attributes, the buffers they run on, and what is made of them.

    typecode is "f" in life; "d" (interpreted only) lets tests difference to full precision.
    `recording` tells the autograd whether to build graphs, `fused` the model to decode a token by
    one kernel a block, `is_fast` whether kernels are compiled. What the table holds by the name of
    a method is taken in its place. `threads` of compiled kernels may work side by side, for they
    run without the interpreter's lock; each computes rows or segments of its own, so that the
    result does not depend on their number.
    """

    is_fast = False

    def __init__(self, name: str, kernels: Dict[str, Callable[..., Any]], typecode: str = "f",
                 pack: Callable[..., Any] = lambda data, rows, dim: data,
                 cache: Optional[Callable[..., Any]] = None) -> None:
        self.name, self.typecode, self.recording, self.threads = name, typecode, True, 1
        self.pack, self.cache, self.fused = pack, cache or FlatCache, cache is None
        self._zero = array(typecode, [0.0])
        vars(self).update(kernels)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"engine has no kernel {name!r}")

    def buffer(self, n: int) -> array:
        """Return n zeros."""
        return self._zero * n

    def buffer_of(self, numbers: Iterable[float]) -> array:
        """Return a buffer that holds the numbers."""
        return array(self.typecode, numbers)

    @contextlib.contextmanager
    def no_grad(self) -> Iterator[None]:
        """Run a block in which no operation records a graph."""
        before, self.recording = self.recording, False
        try:
            yield
        finally:
            self.recording = before

    def matmul_nt(self, x: array, w: array, out: array, rows: int, inner: int, cols: int) -> None:
        """Set out (rows, cols) = x (rows, inner) · wᵀ, w being (cols, inner)."""
        if rows == 1:
            self.row_product(w, x, 0, out, 0, cols, inner)
        else:
            self._product(x, inner, 1, w, 1, inner, out, rows, inner, cols, 0)

    def matmul_nn(self, g: array, w: array, dx: array, rows: int, inner: int, cols: int) -> None:
        """Add to dx (rows, cols) the product g (rows, inner) · w (inner, cols)."""
        self._product(g, inner, 1, w, cols, 1, dx, rows, inner, cols, 1)

    def matmul_tn(self, g: array, x: array, dw: array, rows: int, inner: int, cols: int) -> None:
        """Add to dw (rows, cols) the product gᵀ · x, g being (inner, rows) and x (inner, cols)."""
        self._product(g, 1, rows, x, cols, 1, dw, rows, inner, cols, 1)

    def _product(self, a: array, a_row: int, a_step: int, b: array, b_step: int, b_col: int,
                 out: array, rows: int, inner: int, cols: int, keep: int) -> None:
        def some_rows(first: int, last: int) -> None:
            self.multiply(a, first * a_row, a_row, a_step, b, 0, b_step, b_col, out, first * cols,
                          cols, last - first, inner, cols, keep)
        self.share(rows, 24, some_rows, rows * inner * cols)

    def attend(self, kernel: str, buffers: Sequence[array], starts: array, heads: int,
               width: int) -> None:
        """Run the attention kernel of that name on segments from starts[s] to starts[s+1]."""
        longest = max([last - first for first, last in zip(starts, starts[1:])], default=0)
        segments = len(starts) - 1

        def some_segments(first: int, last: int) -> None:
            getattr(self, kernel)(*buffers, starts[first:last + 1], last - first, heads, width,
                                  self.buffer(2 * QUERIES * longest))
        self.share(segments, 1, some_segments, longest * longest * segments * heads * width)

    @functools.cached_property
    def _pool(self) -> Any:
        from concurrent.futures import ThreadPoolExecutor
        return ThreadPoolExecutor(max(1, self.threads - 1))

    def share(self, count: int, step: int, work: Callable[[int, int], Any], size: int) -> None:
        """Do work(first, last) on all of range(count), in pieces that are multiples of step.

        size is about how many multiply-adds that is.
        """
        piece = -(-count // (step * self.threads)) * step
        if self.threads == 1 or size < PARALLEL_WORK or piece >= count:
            work(0, count)
            return
        others = [self._pool.submit(work, first, min(first + piece, count))
                  for first in range(piece, count, piece)]
        work(0, piece)
        for other in others:
            other.result()


COUNTING = 1.5 * 2.0 ** 52  # a double of about so many units shows in its low bits how many


class FixedPoint:
    """Numbers counted in a unit, a power of two, by which their norm is less than 2**bits."""

    def __init__(self, data: array, bits: int) -> None:
        """Count the numbers; if one is not finite, the unit and all that comes of it is NaN."""
        parts = [data[at:at + 1024] for at in range(0, len(data), 1024)]
        norm = math.hypot(*[dist(part, (0.0,) * len(part)) for part in parts])
        self.unit = math.ldexp(1.0, math.frexp(norm)[1] - bits) if isfinite(norm) else math.nan
        self.zero, self.counts = COUNTING * self.unit, array("d")
        for part in parts:
            self.counts.fromlist([x + self.zero for x in part])
        little_endian(self.counts)

    def part(self, place: slice) -> array:
        """Return the counts of some numbers as ints; they must be below 2**31."""
        return little_endian(array("i", self.counts[place].tobytes()))[::2]


def little_endian(numbers: array) -> array:
    """Swap the bytes of numbers between this machine's order and the little-endian one."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


class PackedMatrix:
    """A matrix (rows, dim) in the forms that interpreted products like, each made when asked for.

    Its rows, or its columns, lie side by side: the k-th numbers of all are one big int, with a lane
    of 64 bits for each. All of them times a vector is one multiplication and one addition of big
    ints for each of its numbers: 3.4 ns a multiply-add, beside 7 by math.dist. Lanes hold 33 bits
    and the vector's numbers 29, so that no sum of products, which is at most the product of both
    norms, leaves its lane.
    """

    def __init__(self, data: array, rows: int, dim: int) -> None:
        self.data, self.shape = data, (rows, dim)
        self._lanes: Dict[bool, Tuple[List[int], int, int, int]] = {}

    @functools.cached_property
    def _scalars(self) -> FixedPoint:
        return FixedPoint(self.data, 29)

    @functools.cached_property
    def _fine(self) -> FixedPoint:
        return FixedPoint(self.data, 33)

    def _parts(self, columns: bool) -> List[slice]:
        """Return where the rows are in the buffer, or the columns."""
        rows, dim = self.shape
        if columns:
            return [slice(c, rows * dim, dim) for c in range(dim)]
        return [slice(r * dim, (r + 1) * dim) for r in range(rows)]

    def _laid_out(self, columns: bool) -> Tuple[List[int], int, int, int]:
        """Return lanes of rows (columns), where sums start, and masks that make them doubles."""
        ones = ((1 << 64 * self.shape[columns]) - 1) // ((1 << 64) - 1)
        zeros = int.from_bytes(struct.pack("<d", self._fine.zero), "little") * ones
        places = [int.from_bytes(self._fine.counts[part].tobytes(), "little") - zeros
                  for part in self._parts(not columns)]
        return places, ones << 63, ones * ((1 << 52) - 1), ones * (0x433 << 52)

    def times(self, columns: bool, other: "PackedMatrix", across: bool) -> Iterator[List[float]]:
        """Yield each row of the other matrix (column, if across) times all rows (columns)."""
        if columns not in self._lanes:
            self._lanes[columns] = self._laid_out(columns)
        places, start, low, exponents = self._lanes[columns]
        zero, unit = COUNTING, self._fine.unit * other._scalars.unit * 4096.0
        for part in other._parts(across):
            total = sum(map(mul, places, other._scalars.part(part)), start)
            doubles = total >> 12 & low | exponents  # of 2**52 and the upper bits of a lane
            sums = array("d", doubles.to_bytes(8 * self.shape[columns], "little"))
            yield [(x - zero) * unit for x in little_endian(sums)]


class FlatCache:
    """Keys and values of one layer in flat buffers (H·D, block): a column is a slot."""

    def __init__(self, engine: Engine, block: int, heads: int, width: int) -> None:
        self.engine, self.shape = engine, (block, heads, width)
        self.keys, self.values = (engine.buffer(block * heads * width) for _ in range(2))

    def write(self, slot: int, keys: array, values: array) -> None:
        """Store one token's keys and values, H·D numbers each, in place of what was in the slot."""
        block = self.shape[0]
        self.keys[slot::block], self.values[slot::block] = keys, values

    def attend(self, q: array, length: int, out: array) -> None:
        """Set out (H·D) to the attention of the query over the first `length` slots."""
        room = self.engine.buffer(self.shape[0] + 16)
        self.engine.attention_cached(q, 0, self.keys, self.values, out, 0, length, *self.shape,
                                     room, 0)


class TupleCache:
    """What FlatCache is, in the form that math.dist likes: keys as tuples, values as columns."""

    def __init__(self, engine: Engine, block: int, heads: int, width: int) -> None:
        self.width = width
        self.keys = [pack_tuples([]) for _ in range(heads)]
        self.columns: List[Tuple[float, ...]] = [()] * (heads * width)

    def write(self, slot: int, keys: array, values: array) -> None:
        """Store one token's keys and values, H·D numbers each, in place of what was in the slot."""
        for (rows, halves), row in zip(self.keys, rows_of(keys, self.width)):
            rows[slot:slot + 1], halves[slot:slot + 1] = pack_tuples([row])
        self.columns = [column[:slot] + (value,) + column[slot + 1:]
                        for column, value in zip(self.columns, values)]

    def attend(self, q: array, length: int, out: array) -> None:
        """Set out (H·D) to the attention of the query over every slot written."""
        width, scale = self.width, 1.0 / sqrt(self.width)
        for h, query in enumerate(rows_of(q, width)):
            scores = next(dots(pack_tuples([query]), self.keys[h]))
            top = max(scores)
            weights = [exp((s - top) * scale) for s in scores]
            total, part = sum(weights), slice(h * width, (h + 1) * width)
            shares = pack_tuples([tuple([weight / total for weight in weights])])
            out[part] = array(out.typecode, next(dots(shares, pack_tuples(self.columns[part]))))


Matrix = Union[array, PackedMatrix]
PackedRows = Tuple[List[Tuple[float, ...]], List[float]]  # for math.dist: rows, and of each ½|row|²


def rows_of(data: Sequence[float], dim: int) -> List[Tuple[float, ...]]:
    """Return the rows of a flat buffer as tuples of length dim."""
    return list(zip(*[iter(data)] * dim))


def pack_tuples(rows: List[Tuple[float, ...]]) -> PackedRows:
    """Return tuples of one length beside half their squared norms."""
    origin = (0.0,) * len(rows[0]) if rows else ()
    return rows, [0.5 * d * d for d in map(dist, rows, repeat(origin))]


def dots(a: PackedRows, b: PackedRows) -> Iterator[List[float]]:
    """Yield, for each row of a, its dot products with every row of b."""
    rows, halves = b
    for row, half in zip(*a):
        yield [half + h - 0.5 * d * d for h, d in zip(halves, map(dist, repeat(row), rows))]


def _packed(x: Matrix, rows: int, dim: int) -> PackedMatrix:
    return x if isinstance(x, PackedMatrix) else PackedMatrix(x, rows, dim)


def _add_columns(out: array, columns: Iterable[List[float]], dim: int) -> None:
    """Add columns of numbers to the columns of out, which often holds nothing yet."""
    blank = out.tobytes() == bytes(len(out) * out.itemsize)
    for c, column in enumerate(columns):
        out[c::dim] = array(out.typecode,
                            column if blank else list(map(add, out[c::dim], column)))


def lane_matmul_nt(x: Matrix, w: Matrix, out: array, rows: int, inner: int, cols: int) -> None:
    """Do what matmul_nt does; factors may come packed, here and below."""
    x, w = _packed(x, rows, inner), _packed(w, cols, inner)
    for r, row in enumerate(w.times(False, x, False)):
        out[r * cols:(r + 1) * cols] = array(out.typecode, row)


def lane_matmul_nn(g: Matrix, w: Matrix, dx: array, rows: int, inner: int, cols: int) -> None:
    """Do what matmul_nn does."""
    g, w = _packed(g, rows, inner), _packed(w, inner, cols)
    _add_columns(dx, g.times(False, w, True), cols)


def lane_matmul_tn(g: Matrix, x: Matrix, dw: array, rows: int, inner: int, cols: int) -> None:
    """Do what matmul_tn does."""
    g, x = _packed(g, inner, rows), _packed(x, inner, cols)
    _add_columns(dw, g.times(True, x, True), cols)


def map_add_scaled(x: array, out: array, n: int, scale: float) -> None:
    """Do what add_scaled does."""
    scaled = x if scale == 1.0 else [scale * a for a in x]
    out[:n] = array(out.typecode, list(map(add, out[:n], scaled)))


def map_dot(x: array, y: array, n: int) -> float:
    """Do what dot does."""
    return sum(map(mul, x[:n], y[:n]))


def map_softmax(x: array, n: int) -> float:
    """Do what softmax does."""
    row = x[:n]
    top = max(row, default=-1e30)
    weights = [exp(number - top) for number in row]
    total = sum(weights)
    x[:n] = array(x.typecode, [weight / total for weight in weights])
    return top + log(total)


def dist_attention_forward(qkv: array, out: array, lse: array, starts: Sequence[int],
                           segments: int, heads: int, width: int, room: array) -> None:
    """Do what attention_forward does, one head of one segment at a time, and without the room."""
    dim, scale = heads * width, 1.0 / sqrt(width)
    for first, last in zip(starts, starts[1:]):
        for h in range(heads):
            q, k, v = (_head_rows(qkv, first, last, 3 * dim, part * dim + h * width, width)
                       for part in range(3))
            weights = []
            for i, scores in enumerate(_causal_dots(q, k)):
                top = max(scores)
                powers = [exp((s - top) * scale) for s in scores]
                total = sum(powers)
                lse[(first + i) * heads + h] = top * scale + log(total)
                weights.append([p / total for p in powers])
            for r, row in enumerate(_mixed(_square(weights), v), first):
                at = r * dim + h * width
                out[at:at + width] = array(out.typecode, row)


def dist_attention_backward(g: array, qkv: array, lse: array, dqkv: array,
                            starts: Sequence[int], segments: int, heads: int, width: int,
                            room: array) -> None:
    """Do what attention_backward does, one head of one segment at a time."""
    dim, scale = heads * width, 1.0 / sqrt(width)
    for first, last in zip(starts, starts[1:]):
        for h in range(heads):
            at = h * width
            q, k, v = (_head_rows(qkv, first, last, 3 * dim, part * dim + at, width)
                       for part in range(3))
            dy = _head_rows(g, first, last, dim, at, width)
            weights, slopes = [], []
            for i, (scores, row) in enumerate(zip(_causal_dots(q, k), _causal_dots(dy, v))):
                total = lse[(first + i) * heads + h]
                weights.append([exp(s * scale - total) for s in scores])
                common = sum(map(mul, weights[-1], row))
                slopes.append([w * (d - common) * scale for w, d in zip(weights[-1], row)])
            falls, shares = _square(slopes), _square(weights)
            for part, moved in ((0, _mixed(falls, k)), (1, _mixed(zip(*falls), q)),
                                (2, _mixed(zip(*shares), dy))):
                for r, row in enumerate(moved, first):
                    place = slice((3 * r + part) * dim + at, (3 * r + part) * dim + at + width)
                    dqkv[place] = array(dqkv.typecode, map(add, dqkv[place], row))


def _head_rows(data: array, first: int, last: int, stride: int, at: int,
               width: int) -> List[Tuple[float, ...]]:
    """Return rows first to last of one head, which begins `at` numbers into each row."""
    return [tuple(data[r * stride + at:r * stride + at + width]) for r in range(first, last)]


def _causal_dots(a: List[Tuple[float, ...]], b: List[Tuple[float, ...]]) -> Iterator[List[float]]:
    """Yield for each row of a its products with the rows of b up to its own."""
    rows, halves = pack_tuples(b)
    for i, (row, half) in enumerate(zip(*pack_tuples(a)), 1):
        near = zip(halves[:i], map(dist, repeat(row), rows))
        yield [half + h - 0.5 * d * d for h, d in near]


def _square(triangle: List[List[float]]) -> List[Tuple[float, ...]]:
    """Return the rows of a lower triangle filled up with zeros."""
    return [(*row, *(0.0,) * (len(triangle) - len(row))) for row in triangle]


def _mixed(shares: Iterable[Tuple[float, ...]], rows: List[Tuple[float, ...]]
           ) -> Iterator[List[float]]:
    """Yield for each row of shares the rows mixed by it."""
    return dots(pack_tuples(list(shares)), pack_tuples(list(zip(*rows))))


LANE_TWINS = {"matmul_nt": lane_matmul_nt, "matmul_nn": lane_matmul_nn, "matmul_tn": lane_matmul_tn}
TWINS = {"add_scaled": map_add_scaled, "dot": map_dot, "softmax": map_softmax,
         "attention_forward": dist_attention_forward, "attention_backward": dist_attention_backward}


PLAIN = {**{kernel.__name__: kernel for kernel in KERNELS}, "multiply": product}


def reference_engine(typecode: str = "f") -> Engine:
    """Return an engine that runs every kernel as it is written, and products plainly."""
    return Engine("reference", PLAIN, typecode)


def interpreted_engine(typecode: str = "f") -> Engine:
    """Return the engine that needs nothing but Python: kernels, with their fast twins.

    Doubles ask for more than the fixed point of lanes has, and do without them.
    """
    table = {**PLAIN, **TWINS}
    if typecode == "d":
        return Engine("python", table, typecode, cache=TupleCache)
    return Engine("python", {**table, **LANE_TWINS}, typecode, PackedMatrix, TupleCache)


# The compiled engine: a walk over the syntax tree of each kernel writes C, the system's compiler
# makes a library of it, a child process takes a tiny model through a step by it and by its Python,
# and only where both come to the same gets the library its name in the cache. The key is the whole
# program, the compiler, the processor.

C_TYPES = {"F32": "float *restrict", "I32": "const int *restrict", "int": "long", "float": "float",
           "Vector8": "v8"}
C_PRELUDE = """#include <math.h>
typedef float v8 __attribute__((vector_size(32), aligned(4), may_alias));
"""
C_NUMBERS = ("int", "float", "Vector8")
C_CALLS = {  # of a function: its C, the kind of its result ("" is that of its arguments), theirs
    "exp": ("exponential({0})", "float", "int float"), "log": ("logf({0})", "float", "int float"),
    "sqrt": ("sqrtf({0})", "float", "int float"), "abs": ("fabsf({0})", "float", "float"),
    "round": ("rintf({0})", "float", "float"), "int": ("((long){0})", "int", "int float"),
    "min": ("({0} < {1} ? {0} : {1})", "", "int float", "int float"),
    "max": ("({0} > {1} ? {0} : {1})", "", "int float", "int float"),
    "two_to": ("((union {{int i; float f;}}){{((int){0} + 127) << 23}}).f", "float", "float"),
    "load8": ("(*(v8 *)({0} + {1}))", "Vector8", "F32", "int"),
    "store8": ("*(v8 *)({0} + {1}) = {2}", "void", "F32", "int", "Vector8"),
    "splat8": ("((v8){{0}} + {0})", "Vector8", "float")}
C_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "/",
               ast.Mod: "%", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==",
               ast.NotEq: "!=", ast.BitXor: "^", ast.RShift: ">>"}
UNROLLED = 16  # a loop over a constant range up to this is written out


class CKernel:
    """A kernel as C.  What is outside the subset raises EngineError with the line and the reason.

    Every name keeps one kind from its first assignment on; expressions come as (code, kind).
    `calls` has what a kernel may call, in the form of C_CALLS; `call` is its own entry there.
    """

    def __init__(self, tree: ast.FunctionDef, calls: Dict[str, Tuple[str, ...]] = C_CALLS,
                 constants: Optional[Dict[str, int]] = None) -> None:
        self.name, self._calls, self._constants = tree.name, calls, dict(constants or {})
        takes = tree.args
        if takes.vararg or takes.kwarg or takes.kwonlyargs or takes.defaults:
            self._refuse(tree, "parameters other than plain ones")
        self.kinds = {arg.arg: getattr(arg.annotation, "id", "") for arg in takes.args}
        given = tuple(self.kinds.values())
        if not set(given) <= set(C_TYPES):
            self._refuse(tree, "a parameter needs a type of the subset: " + ", ".join(C_TYPES))
        self._locals: Dict[str, str] = {}
        self.result = getattr(tree.returns, "id", "void")
        if not tree.returns or self.result not in ("void", "int", "float"):
            self._refuse(tree, "a result other than None, int and float")
        body = self._block(tree.body)
        heads = ", ".join(f"{C_TYPES[kind]} {name}" for name, kind in zip(self.kinds, given))
        inner = "static " if "Vector8" in given else ""  # no caller from outside
        if self.result == "void":  # inlined, loops lose their registers: attention took 1.1 times
            inner += "__attribute__((noinline)) "
        self.code = (f"{inner}{C_TYPES.get(self.result, self.result)} {self.name}({heads}) {{\n"
                     + "".join(self._locals.values()) + body + "}\n")
        places = ", ".join(f"{{{i}}}" for i in range(len(given)))
        self.call = (f"{self.name}({places})", self.result,
                     *("int float" if kind == "float" else kind for kind in given))

    def _refuse(self, node: Any, reason: str) -> Any:
        raise EngineError(f"kernel {self.name}, line {getattr(node, 'lineno', 1)}: {reason}; "
                          f"it is outside the subset that can be compiled")

    def _visit(self, prefix: str, node: Any) -> Any:
        method = getattr(self, prefix + type(node).__name__, None)
        return method(node) if method else self._refuse(node, type(node).__name__)

    def _block(self, body: List[Any]) -> str:
        return "".join(self._visit("_do_", node) for node in body)

    def _value(self, node: Any) -> Tuple[str, str]:
        return self._visit("_of_", node)

    def _code(self, node: Any, *kinds: str) -> str:
        """Return the code of an expression, which must be of one of the kinds if any are given."""
        code, kind = self._value(node)
        if kinds and kind not in kinds:
            self._refuse(node, f"{ast.unparse(node)} is of kind {kind}, not {' or '.join(kinds)}")
        return code

    def _number(self, node: Any) -> Tuple[str, str]:
        code, kind = self._value(node)
        return (code, kind) if kind in C_NUMBERS else self._refuse(node, f"a number of kind {kind}")

    def _constant(self, node: Any) -> int:
        """Return the value of a constant, or of a product of two; 0 for what varies."""
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            return self._constant(node.left) * self._constant(node.right)
        value = self._constants.get(getattr(node, "id", ""), getattr(node, "value", 0))
        return value if type(value) is int else 0

    def _declare(self, node: Any, kind: str, size: int = 0) -> str:
        """Give a name its kind, which it keeps; return the name."""
        if not isinstance(node, ast.Name) or node.id in self._constants:
            self._refuse(node, "what is set here must be a name of its own")
        wanted = kind if not size else "F32" if kind == "float" else f"{kind}[]"
        line = f"{C_TYPES[kind]} {node.id}{f'[{size}]' if size else ''};\n"
        if node.id not in self.kinds:
            self.kinds[node.id], self._locals[node.id] = wanted, line
        elif size and self._locals.get(node.id) != line:
            self._refuse(node, f"{node.id} cannot become another array")
        elif self.kinds[node.id] != wanted and (self.kinds[node.id], wanted) != ("float", "int"):
            self._refuse(node, f"{node.id}, of kind {self.kinds[node.id]}, cannot become {wanted}")
        return node.id

    # statements

    def _do_Expr(self, node: Any) -> str:
        is_docstring = isinstance(node.value, ast.Constant)
        return "" if is_docstring else f"{self._code(node.value)};\n"

    def _do_Return(self, node: Any) -> str:
        if self.result == "void" or node.value is None:
            self._refuse(node, "a result where none is declared, or none where one is")
        return f"return {self._code(node.value, 'int', self.result)};\n"

    def _do_Assign(self, node: Any) -> str:
        target, value = node.targets[0], node.value
        if len(node.targets) > 1:
            self._refuse(node, "more than one target")
        if isinstance(value, ast.BinOp) and isinstance(value.left, ast.List):
            return self._new_array(node, target, value)
        code, kind = self._number(value)
        if isinstance(target, ast.Subscript):
            place, slot = self._value(target)
            if slot not in (kind, "float" if kind == "int" else kind):
                self._refuse(node, f"a place of kind {slot} for a value of kind {kind}")
            return f"{place} = {code};\n"
        return f"{self._declare(target, kind)} = {code};\n"

    def _new_array(self, node: Any, target: Any, value: Any) -> str:
        size = self._constant(value.right)
        if len(value.left.elts) != 1 or size < 1 or not isinstance(value.op, ast.Mult):
            self._refuse(node, "an array other than one number times a constant size")
        if getattr(value.left.elts[0], "id", "") == "UNSET":
            self._declare(target, "float", size)
            return ""
        code, kind = self._number(value.left.elts[0])
        name = self._declare(target, kind, size)
        return f"for (int i = 0; i < {size}; i++) {name}[i] = {code};\n"

    def _do_AugAssign(self, node: Any) -> str:
        code, kind = self._number(node.value)
        place, slot = self._number(node.target)
        if type(node.op) not in (ast.Add, ast.Sub, ast.Mult, ast.Div) or (
                slot == "int" and (kind != "int" or isinstance(node.op, ast.Div))):
            self._refuse(node, f"{type(node.op).__name__} of kind {kind} in place of {slot}")
        return f"{place} {C_OPERATORS[type(node.op)]}= {code};\n"

    def _do_If(self, node: Any) -> str:
        rest = f"else {{\n{self._block(node.orelse)}}}\n" if node.orelse else ""
        return f"if ({self._code(node.test, 'int')}) {{\n{self._block(node.body)}}}\n{rest}"

    def _do_While(self, node: Any) -> str:
        if node.orelse:
            self._refuse(node, "else after a loop")
        return f"while ({self._code(node.test, 'int')}) {{\n{self._block(node.body)}}}\n"

    def _do_For(self, node: Any) -> str:
        bounds = getattr(node.iter, "args", [])
        if (getattr(getattr(node.iter, "func", None), "id", "") != "range" or node.orelse
                or not 1 <= len(bounds) <= 3 or isinstance(bounds[-1], ast.UnaryOp)):
            self._refuse(node, "a loop other than one that rises over a range")
        count = self._constant(bounds[0]) if len(bounds) == 1 else 0
        if 0 < count <= UNROLLED:
            return self._written_out(node, count)
        name = self._declare(node.target, "int")
        codes = [self._code(bound, "int") for bound in bounds]
        first, last, step = (["0"] + codes + ["1"] if len(codes) == 1 else codes + ["1"])[:3]
        return (f"for ({name} = {first}; {name} < {last}; {name} += {step}) {{\n"
                f"{self._block(node.body)}}}\n")

    def _written_out(self, node: Any, count: int) -> str:
        name, written = getattr(node.target, "id", ""), ""
        if not name or name in self.kinds or name in self._constants:
            self._refuse(node, "a loop that is written out needs a variable of its own")
        for self._constants[name] in range(count):
            written += self._block(node.body)
        del self._constants[name]
        return written

    # expressions

    def _of_Constant(self, node: Any) -> Tuple[str, str]:
        if type(node.value) is int and abs(node.value) < 1 << 63:
            return str(node.value), "int"
        if type(node.value) is float and abs(node.value) < 3.4e38:
            return f"{node.value!r}f", "float"
        return self._refuse(node, f"the constant {node.value!r}")

    def _of_Name(self, node: Any) -> Tuple[str, str]:
        if node.id in self._constants:
            return str(self._constants[node.id]), "int"
        return node.id, self.kinds.get(node.id) or self._refuse(node, f"unknown name {node.id}")

    def _of_BinOp(self, node: Any) -> Tuple[str, str]:
        (left, kind), (right, other) = self._number(node.left), self._number(node.right)
        sign = C_OPERATORS.get(type(node.op)) or self._refuse(node, type(node.op).__name__)
        whole = isinstance(node.op, (ast.FloorDiv, ast.Mod, ast.BitXor, ast.RShift))
        if whole and ((kind, other) != ("int", "int") or "(-" in (left[:2], right[:2])):
            self._refuse(node, f"{type(node.op).__name__} of other than whole numbers from 0 up")
        kinds = {kind, other, "float" if isinstance(node.op, ast.Div) else "int"}
        cast = "(float)" if isinstance(node.op, ast.Div) and kind == "int" else ""
        joint = next(kind for kind in ("Vector8", "float", "int") if kind in kinds)
        return f"({cast}{left} {sign} {right})", joint

    def _of_UnaryOp(self, node: Any) -> Tuple[str, str]:
        if not isinstance(node.op, ast.USub):
            self._refuse(node, type(node.op).__name__)
        code, kind = self._number(node.operand)
        return f"(-{code})", kind

    def _of_Compare(self, node: Any) -> Tuple[str, str]:
        if len(node.ops) > 1 or type(node.ops[0]) not in C_OPERATORS:
            self._refuse(node, "a comparison of more than two numbers")
        sign = C_OPERATORS[type(node.ops[0])]
        left, right = (self._code(side, "int", "float")
                       for side in (node.left, node.comparators[0]))
        return f"({left} {sign} {right})", "int"

    def _of_IfExp(self, node: Any) -> Tuple[str, str]:
        (yes, kind), (no, other) = self._number(node.body), self._number(node.orelse)
        joint = kind if kind == other else "float"
        return f"({self._code(node.test, 'int')} ? {yes} : {no})", joint

    def _of_Subscript(self, node: Any) -> Tuple[str, str]:
        name, kind = self._value(node.value)
        inside = {"F32": "float", "I32": "int"}.get(kind, kind[:-2] if kind[-2:] == "[]" else "")
        if not inside or isinstance(node.slice, ast.UnaryOp):
            self._refuse(node, f"{ast.unparse(node)}, which is no place of an array")
        return f"{name}[{self._code(node.slice, 'int')}]", inside

    def _of_Call(self, node: Any) -> Tuple[str, str]:
        name = getattr(node.func, "id", "")
        if name not in self._calls:
            self._refuse(node, f"a call of {name or 'something'}")
        form, kind, *given = self._calls[name]
        if len(node.args) != len(given) or node.keywords:
            self._refuse(node, f"a call of {name} with other than {len(given)} arguments")
        values = [self._value(arg) for arg in node.args]
        for arg, kinds in zip(node.args, given):
            self._code(arg, *kinds.split())
        return form.format(*[code for code, _ in values]), kind or min(kind for _, kind in values)


def c_source(kernels: Sequence[Callable[..., Any]], registers: int = 16) -> str:
    """Return the C of the kernels, for a processor with so many vector registers.

    Raises EngineError, also where there is no source to read.
    """
    try:
        trees = [ast.parse(inspect.getsource(kernel)).body[0] for kernel in kernels]
    except (OSError, SyntaxError) as error:
        raise EngineError(f"the kernels' source cannot be read ({error}); keep macrogpt.py whole")
    source, calls = C_PRELUDE, dict(C_CALLS)
    rows, vectors = (8, 3) if registers >= 32 else (BLOCK_ROWS, BLOCK_VECTORS)
    blocks = {"BLOCK_ROWS": rows, "BLOCK_VECTORS": vectors, "QUERIES": QUERIES}
    for tree in trees:
        kernel = CKernel(tree, calls, blocks)  # type: ignore[arg-type]
        calls[tree.name], source = kernel.call, source + kernel.code
    return source


C_FLAGS = ("-O3", "-ffast-math", "-fPIC", "-std=gnu99", "-w", "-fno-semantic-interposition")
C_TUNING = ("-march=native", "-mcpu=native")  # which of them a compiler knows, it must be asked
KEPT_LIBRARIES = 8
COMPILE_SECONDS = 60.0
ANSWER_SECONDS = 30.0  # a machine at work may need twenty
HANG_SECONDS = 3600.0  # for so long a compiler that did not answer is not asked again


class CompilerHangs(EngineError):
    """A compiler did not answer in time."""


def _run(command: Sequence[str], seconds: float) -> None:
    """Run a command to its end; EngineError when it fails or is not there, or else hangs."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True,
                              timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        raise CompilerHangs(f"{command[0]} did not answer in {seconds:g} seconds; "
                            f"set CC to a C compiler that does") from None
    except (OSError, subprocess.SubprocessError) as error:
        raise EngineError(f"{command[0]} cannot be used ({error}); "
                          f"set CC to a C compiler") from None
    if done.returncode:
        said = (done.stderr or done.stdout).decode("utf-8", "replace").strip().splitlines()
        raise EngineError(f"{command[0]} failed with code {done.returncode}"
                          f"{': ' + said[-1] if said else ''}; set CC to a C compiler that works")


def find_compiler() -> Optional[List[str]]:
    """Return the command of the C compiler: $CC, else cc, gcc or clang; None where there is none.

    $CC may be a path, or a command with options.
    """
    if os.name != "posix":  # elsewhere a C long is no Python int of 64 bits
        return None
    wish = os.environ.get("CC", "")
    words = [wish] if shutil.which(wish) else wish.split()
    commands = [words] if words else [["cc"], ["gcc"], ["clang"]]
    if sys.platform == "darwin":  # without its tools, cc there opens a dialog
        try:
            _run(["xcode-select", "-p"], ANSWER_SECONDS)
        except EngineError:
            return None
    found = ([shutil.which(command), *options] for command, *options in commands)
    return next((command for command in found if command[0]), None)


def _tuning(compiler: Sequence[str]) -> List[str]:
    """Return the option that makes the compiler use all of this processor, if it knows one."""
    asked = ["-E", "-x", "c", os.devnull]
    _run([*compiler, *asked], ANSWER_SECONDS)  # what does not work at all is seen here
    for option in C_TUNING:
        with contextlib.suppress(EngineError):
            _run([*compiler, option, *asked], ANSWER_SECONDS)
            return [option]
    return []


def _cpu_features() -> str:
    """Return what tells apart processors that the same machine code may not suit."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            return "".join(sorted({line for line in file if line.startswith(
                ("flags", "Features", "model name"))}))
    except OSError:
        return platform.processor()


def _library_name(compiler: Sequence[str]) -> str:
    """Return a name that changes with program, compiler, flags and processor.

    A compiler of another version is another file: to ask it would cost every start some time.
    """
    status = os.stat(compiler[0])
    with open(os.path.abspath(__file__), "rb") as file:
        digest = hashlib.sha256(file.read())
    facts = (C_FLAGS, C_TUNING, os.path.realpath(compiler[0]), list(compiler[1:]), status.st_size,
             status.st_mtime_ns, platform.machine(), _cpu_features())
    digest.update(repr(facts).encode())
    return f"kernels-{digest.hexdigest()[:32]}.so"


def cache_folder() -> Optional[str]:
    """Return the folder for compiled kernels, ours alone; None where there can be none."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "macrogpt")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        status = os.lstat(folder)
    except OSError:
        return None
    ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
    return folder if stat.S_ISDIR(status.st_mode) and ours and os.access(folder, os.W_OK) else None


def _compile(compiler: Sequence[str], folder: str) -> str:
    """Return the path, in folder, of a new library that has passed its check."""
    with tempfile.TemporaryDirectory(prefix="compile-", dir=folder) as place:
        source, thing, library = (os.path.join(place, name) for name in ("k.c", "k.o", "k.so"))
        with open(source, "w", encoding="utf-8") as file:
            file.write(c_source(KERNELS, 32 if "avx512vl" in _cpu_features() else 16))
        # two steps: fast-math at the link would change the arithmetic of the whole process
        _run([*compiler, *C_FLAGS, *_tuning(compiler), "-c", source, "-o", thing], COMPILE_SECONDS)
        _run([*compiler, "-shared", thing, "-o", library, "-lm"], COMPILE_SECONDS)
        # A crash in there only costs that process. The check takes a model: see section 10.
        _run([sys.executable, "-c", CALL_CODE, os.path.abspath(__file__), "check_library", library],
             COMPILE_SECONDS)
        final = os.path.join(folder, _library_name(compiler))
        with open(library, "rb") as made, open(library + ".sum", "w", encoding="ascii") as file:
            file.write(hashlib.sha256(made.read()).hexdigest())
        for path in (library, library + ".sum"):
            os.chmod(path, 0o600)
        os.replace(library + ".sum", final + ".sum")
        os.replace(library, final)
    _drop_old_libraries(folder)
    return final


def _compile_unless_it_hangs(compiler: Sequence[str], folder: str, note: str, patient: bool,
                             clock: Callable[[], float]) -> str:
    """Do what _compile does, and leave a note where the compiler does not answer."""
    with contextlib.suppress(FileNotFoundError):
        if not patient and 0.0 <= clock() - os.path.getmtime(note) < HANG_SECONDS:
            raise CompilerHangs(f"{compiler[0]} did not answer when it was tried last; it is tried "
                                f"again an hour after that, or with MACROGPT_ENGINE=native")
    try:
        return _compile(compiler, folder)
    except CompilerHangs:
        with open(note, "w", encoding="utf-8"):
            pass
        raise


def _is_whole(library: str) -> bool:
    """Return whether a compiled library is ours and as it was made: a hole in one is deadly."""
    with contextlib.suppress(OSError):
        status = os.stat(library)
        with open(library, "rb") as made, open(library + ".sum", encoding="ascii") as file:
            return status.st_uid == os.geteuid() and not status.st_mode & 0o022 and (
                hashlib.sha256(made.read()).hexdigest() == file.read())
    return False


def _drop_old_libraries(folder: str) -> None:
    """Remove the libraries of earlier programs, but for the newest, and what a kill left behind."""
    with contextlib.suppress(OSError):  # another process may do the same
        paths = sorted((os.path.join(folder, name) for name in os.listdir(folder)),
                       key=os.path.getmtime)
        libraries = [path for path in paths if path.endswith(".so")]
        for path in (path + end for path in libraries[:-KEPT_LIBRARIES] for end in (".sum", "")):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        for path in paths:
            if "compile-" in path and time.time() - os.path.getmtime(path) > 10 * COMPILE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


# How a child process calls a function of this file, which it imports and does not run: Python keeps
# the compiled module, which spares 20 MB and 0.1 s at every start.
CALL_CODE = """
import importlib, os, sys
folder, name = os.path.split(sys.argv[1])
sys.path.insert(0, folder)
module = importlib.import_module(os.path.splitext(name)[0])
sys.exit(getattr(module, sys.argv[2])(*sys.argv[3:]))
"""


def keep_freed_memory(keep: bool) -> None:
    """Have glibc keep what is freed, or give back what is large.

    Kept, a training step finds its memory without a page fault: 1.2 times as fast. Given back, a
    chat whose trainer is another process stays small: 151 MB against 198 after 60 messages. What
    lies free between what is in use is given back at once: 12 MB after 27 bursts.
    """
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes
        for option, value in ((-1, 1 << 30), (-3, 1 << 30)) if keep else (
                (-1, 1 << 18), (-3, 1 << 18), (-8, 1)):  # trim, mmap, arenas; see mallopt(3)
            ctypes.CDLL(None).mallopt(option, value)
        if not keep:
            ctypes.CDLL(None).malloc_trim(0)


def load_kernels(path: str) -> Dict[str, Callable[..., Any]]:
    """Return the kernels of a compiled library, to be called like those in Python."""
    import ctypes
    library, kinds = ctypes.CDLL(path), {"int": ctypes.c_long, "float": ctypes.c_float}
    table = {}
    for kernel in KERNELS:
        *given, result = kernel.__annotations__.values()
        if "Vector8" in given:  # for other kernels only
            continue
        function = getattr(library, kernel.__name__)
        function.argtypes = [kinds.get(kind, ctypes.c_void_p) for kind in given]
        function.restype = kinds.get(result)
        table[kernel.__name__] = _by_address(function)
    return table


def _by_address(function: Any) -> Callable[..., Any]:
    """Return a function that takes buffers where the compiled one takes addresses."""
    def call(*args: Any) -> Any:
        return function(*[arg.buffer_info()[0] if type(arg) is array else arg for arg in args])
    return call


def native_engine(build: bool = True, patient: bool = True,
                  clock: Callable[[], float] = time.time) -> Engine:
    """Return the engine of compiled kernels.  Raises EngineError when there can be none.

    Without build only a library that was compiled and checked before will do. Who is not patient
    does not wait again for a compiler that has just kept somebody waiting in vain.
    """
    compiler = find_compiler()
    if compiler is None:
        raise EngineError("no C compiler was found; install one, or set CC")
    folder = cache_folder()
    try:
        path = os.path.join(folder, _library_name(compiler)) if folder else ""
        if path and _is_whole(path):
            with contextlib.suppress(OSError, AttributeError):  # what cannot be loaded is made anew
                return NativeEngine(load_kernels(path))
        if not build:
            raise EngineError("the kernels have not been compiled yet; train once")
        if folder:
            try:
                return NativeEngine(load_kernels(_compile_unless_it_hangs(
                    compiler, folder, path + ".hung", patient, clock)))
            except (EngineError, OSError) as error:
                if "map segment" not in str(error):  # as where it is mounted noexec
                    raise
        with tempfile.TemporaryDirectory() as place:  # what is loaded needs no file any more
            return NativeEngine(load_kernels(_compile(compiler, place)))
    except (OSError, ImportError, AttributeError) as error:
        raise EngineError(f"the compiled kernels cannot be used ({error}); set CC to another "
                          f"compiler, or TMPDIR to a folder that is not mounted noexec") from None


ELEMENT_WORK = 10  # multiply-adds that a number costs where rows are normed, turned or gated
BY_ROWS = {"rmsnorm_forward": 3, "rmsnorm_backward": 4, "rope_turn": 3, "swiglu_forward": 2,
           "swiglu_backward": 3}  # kernels that treat each row by itself, and how many buffers


class NativeEngine(Engine):
    """The engine of a table of compiled kernels."""

    is_fast = True

    def __init__(self, compiled: Dict[str, Callable[..., Any]]) -> None:
        super().__init__("native", compiled)
        self.compiled = compiled
        for name, buffers in BY_ROWS.items():
            setattr(self, name, functools.partial(self._by_rows, compiled[name], buffers))

    def _by_rows(self, kernel: Callable[..., Any], count: int, *args: Any) -> None:
        """Share out the rows of a kernel's call: count buffers, rows, channels and the rest."""
        buffers, rows, dim, rest = args[:count], args[count], args[count + 1], args[count + 2:]
        steps = [4 * (len(buffer) // rows if rows else 0) for buffer in buffers]

        def some_rows(first: int, last: int) -> None:
            kernel(*[buffer.buffer_info()[0] + first * step
                     for buffer, step in zip(buffers, steps)], last - first, dim, *rest)
        self.share(rows, 1, some_rows, ELEMENT_WORK * rows * dim)


def choose_engine(wish: str, build: bool = False,
                  tell: Callable[[str], None] = lambda notice: None) -> Engine:
    """Return the engine that `MACROGPT_ENGINE` asks for: auto, native or python.

    auto takes compiled kernels where they are there already or, if `build`, can be made.
    """
    if wish not in ("auto", "native", "python", ""):
        raise ConfigError(f"MACROGPT_ENGINE={wish!r} is not known; use auto, native or python")
    if wish == "python":
        return interpreted_engine()
    try:
        return native_engine(build or wish == "native", patient=wish == "native")
    except EngineError as error:
        if wish == "native":
            raise EngineError(f"MACROGPT_ENGINE=native: {error}; or use auto or python") from None
        if build and find_compiler():
            tell(f"kernels stay interpreted: {error}")
        return interpreted_engine()


# ──────────────────────────────────────────────────────────────────────────────────────
# 5 · AUTOGRAD — vectors, not scalar confetti   uses: 4
# ──────────────────────────────────────────────────────────────────────────────────────
#
# A Value knows the values it came from and how each of them learns from its gradient. ScalarValue
# is one number; VectorValue is a stack of vectors over one flat buffer. `backward` walks the graph
# once, without recursion, and takes it apart behind itself: what has flowed back need not be
# remembered.


class Value:
    """A node of the graph: a gradient, and the values it came from, each with how it learns."""

    __slots__ = ("grad", "sources", "needs_grad", "__weakref__")

    def __init__(self, needs_grad: bool = False) -> None:
        self.grad: Any = None
        self.sources: Tuple["Source", ...] = ()
        self.needs_grad = needs_grad

    def of(self, *sources: "Source") -> Any:
        """Record where this value came from, and return it.

        A source is (value, learn): learn(grad) adds to that value's gradient what this one's grad
        tells it, and is never called for a value that needs none. It must not hold this value: a
        graph without cycles dies by itself.
        """
        self.sources = tuple([source for source in sources if source[0].needs_grad])
        self.needs_grad = bool(self.sources)
        return self


Source = Tuple[Value, Callable[[Any], None]]


class ScalarValue(Value):
    """One float that can be added, multiplied, exponentiated, and differentiated.

    >>> x = ScalarValue(3.0); backward(x * x + 2.0 * x); x.grad
    8.0
    """

    __slots__ = ("data",)

    def __init__(self, data: float, needs_grad: bool = True) -> None:
        super().__init__(needs_grad)
        self.data = float(data)

    def _at_slope(self, slope: float) -> Source:
        """Return this value as the source of one that changes `slope` times as much."""
        def learn(grad: float) -> None:
            self.grad = (self.grad or 0.0) + slope * grad
        return self, learn

    def __add__(self, other: Union["ScalarValue", float]) -> "ScalarValue":
        other = _scalar(other)
        return ScalarValue(self.data + other.data).of(self._at_slope(1.0), other._at_slope(1.0))

    def __mul__(self, other: Union["ScalarValue", float]) -> "ScalarValue":
        other = _scalar(other)
        return ScalarValue(self.data * other.data).of(
            self._at_slope(other.data), other._at_slope(self.data))

    def exp(self) -> "ScalarValue":
        """Return e to this value, which is its own slope."""
        result = exp(self.data)
        return ScalarValue(result).of(self._at_slope(result))

    __radd__, __rmul__ = __add__, __mul__

    def __repr__(self) -> str:
        return f"ScalarValue({self.data:g})"


def _scalar(x: Union[ScalarValue, float]) -> ScalarValue:
    return x if isinstance(x, ScalarValue) else ScalarValue(x, needs_grad=False)


class VectorValue(Value):
    """A stack of vectors, shape (rows, dim), over one flat row-major buffer of an engine."""

    __slots__ = ("engine", "rows", "dim", "data")
    name = "a value"

    def __init__(self, engine: Engine, rows: int, dim: int, data: Optional[array] = None,
                 needs_grad: bool = False) -> None:
        super().__init__(needs_grad)
        if data is not None and len(data) != rows * dim:
            raise ValueError(f"a buffer of {len(data)} numbers is not of shape ({rows}, {dim})")
        self.engine, self.rows, self.dim = engine, rows, dim
        self.data = engine.buffer(rows * dim) if data is None else data

    def __repr__(self) -> str:
        return f"VectorValue(rows={self.rows}, dim={self.dim})"

    def row(self, i: int) -> array:
        """Return a copy of row i.  Raises ValueError when there is none."""
        if not 0 <= i < self.rows:
            raise ValueError(f"row {i} of {self.rows} rows")
        return self.data[i * self.dim:(i + 1) * self.dim]

    def of(self, *sources: Source) -> Any:
        """Record where this value came from, unless inside no_grad, and return it."""
        return super().of(*sources) if self.engine.recording else self

    def packed(self) -> Any:
        """Return the data as the engine's matmul_nt likes it."""
        return self.engine.pack(self.data, self.rows, self.dim)

    def grad_buffer(self) -> array:
        """Return the gradient, zeros at first; the caller adds to it."""
        if self.grad is None:
            self.grad = self.engine.buffer(self.rows * self.dim)
        return self.grad

    def add_grad(self, g: array) -> None:
        """Add g to the gradient."""
        if self.grad is None:
            self.grad = g[:]
        else:
            self.engine.add_scaled(g, self.grad, len(g), 1.0)


def backward(root: ScalarValue) -> None:
    """Add d root/d leaf to the grad of every leaf below root, and take the graph apart."""
    root.grad = 1.0
    for node in _in_order(root):
        for _, learn in node.sources if node.grad is not None else ():
            learn(node.grad)
        if node.sources:  # what has been passed on may go; a leaf keeps its gradient
            node.sources, node.grad = (), None


def _in_order(root: Value) -> List[Value]:
    """Return the graph's nodes, each before its sources.  Iterative: depth costs no stack."""
    order: List[Value] = []
    seen: Set[int] = set()
    stack: List[Tuple[Value, bool]] = [(root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend([(value, False) for value, _ in node.sources])
    order.reverse()
    return order


# ──────────────────────────────────────────────────────────────────────────────────────
# 6 · LAYERS — forward and backward, side by side   uses: 4 5
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Every operation has one shape: it computes its result through the engine, and returns it as a
# value `of` its inputs, each beside the way it learns. Whether an input learns at all is asked in
# one place, above. Parameters are values too: leaves that carry their own optimizer state.


class MatrixParam(VectorValue):
    """A trainable matrix (rows, dim) with the AdamW moments m and v that belong to it.

    `decays` tells whether weight decay applies, `changes` how often its numbers were written to.
    """

    def __init__(self, engine: Engine, name: str, rows: int, dim: int,
                 data: Optional[array] = None, decays: bool = True) -> None:
        super().__init__(engine, rows, dim, data, needs_grad=True)
        self.name, self.decays, self.changes = name, decays, 0
        self.steps, self._packed = 0, None  # type: int, Any

    @classmethod
    def normal(cls, engine: Engine, name: str, rows: int, dim: int, sigma: float,
               rng: Optional[random.Random], decays: bool = True) -> "MatrixParam":
        """Return normal numbers with standard deviation sigma; zeros, to be loaded, without rng."""
        data = rng and engine.buffer_of([rng.gauss(0.0, sigma) for _ in range(rows * dim)])
        return cls(engine, name, rows, dim, data, decays)

    @functools.cached_property
    def moments(self) -> Tuple[array, array]:
        """m and v, made when they are first asked for: what only speaks has none."""
        return self.engine.buffer(len(self.data)), self.engine.buffer(len(self.data))

    def packed(self) -> Any:
        """Return the data as the engine's matmul_nt likes it, kept until the data changes."""
        if self._packed is None:
            self._packed = super().packed()
        return self._packed

    def changed(self) -> None:
        """Tell the matrix that its numbers were written to."""
        self._packed, self.changes = None, self.changes + 1

    def load(self, data: array) -> None:
        """Replace the numbers.  Raises ValueError when their count is another."""
        if len(data) != self.rows * self.dim:
            raise ValueError(f"{self.name} has shape ({self.rows}, {self.dim}); "
                             f"found {len(data)} numbers")
        self.data = data
        self.changed()


def embed(ids: Sequence[int], table: MatrixParam) -> VectorValue:
    """Return the rows of table (V, C) named by ids (T,): (T, C).  Raises ValueError."""
    wanted = array("i", ids)
    if wanted and not 0 <= min(wanted) <= max(wanted) < table.rows:
        raise ValueError(f"ids from {min(wanted)} to {max(wanted)} for {table.rows} rows")
    engine, rows, dim = table.engine, len(wanted), table.dim
    out = VectorValue(engine, rows, dim)
    engine.gather_rows(table.data, wanted, out.data, rows, dim)
    return out.of((table, lambda g: engine.scatter_rows(
        g, wanted, table.grad_buffer(), rows, dim)))


def pooled(x: VectorValue, owners: Sequence[int], rows: int) -> VectorValue:
    """Return the sums (rows, C) of those rows of x (T, C) that have one owner each, below rows."""
    engine, wanted, dim = x.engine, array("i", owners), x.dim
    out = VectorValue(engine, rows, dim)
    engine.scatter_rows(x.data, wanted, out.data, len(wanted), dim)

    def x_learns(g: array) -> None:
        back = engine.buffer(len(wanted) * dim)
        engine.gather_rows(g, wanted, back, len(wanted), dim)
        x.add_grad(back)
    return out.of((x, x_learns))


def linear(x: VectorValue, w: VectorValue) -> VectorValue:
    """Return x (T, C_in) · wᵀ, w (C_out, C_in): (T, C_out).  Raises ValueError on a mismatch."""
    if x.dim != w.dim:
        raise ValueError(f"{w.name} takes vectors of {w.dim}; found {x.dim}")
    engine, rows, inner, cols = x.engine, x.rows, x.dim, w.rows
    # packed once for both ways; to pack the gradient for each input anew costs nothing measurable
    out, packed = VectorValue(engine, rows, cols), engine.pack(x.data, rows, inner)
    engine.matmul_nt(packed, w.packed(), out.data, rows, inner, cols)
    return out.of(
        (x, lambda g: engine.matmul_nn(g, w.packed(), x.grad_buffer(), rows, cols, inner)),
        (w, lambda g: engine.matmul_tn(g, packed, w.grad_buffer(), cols, rows, inner)))


def mixed(x: VectorValue, w: MatrixParam) -> VectorValue:
    """Return x (T, R) · w, w (R, C): rows of w mixed in x's proportions.  Raises ValueError."""
    if x.dim != w.rows:
        raise ValueError(f"{w.name} mixes {w.rows} rows; found {x.dim} proportions")
    engine, rows, inner, cols = x.engine, x.rows, x.dim, w.dim
    out = VectorValue(engine, rows, cols)
    engine.matmul_nn(x.data, w.data, out.data, rows, inner, cols)

    def x_learns(g: array) -> None:  # of the products, matmul_nt alone does not add but sets
        back = engine.buffer(rows * inner)
        engine.matmul_nt(g, w.packed(), back, rows, cols, inner)
        x.add_grad(back)
    return out.of((x, x_learns), (w, lambda g: engine.matmul_tn(
        x.data, g, w.grad_buffer(), inner, rows, cols)))


def added(x: VectorValue, y: VectorValue) -> VectorValue:
    """Return x + y, all of shape (T, C).  Raises ValueError on a mismatch."""
    if (x.rows, x.dim) != (y.rows, y.dim):
        raise ValueError(f"shapes ({x.rows}, {x.dim}) and ({y.rows}, {y.dim}) differ")
    out = VectorValue(x.engine, x.rows, x.dim, x.data[:])
    x.engine.add_scaled(y.data, out.data, x.rows * x.dim, 1.0)
    return out.of((x, x.add_grad), (y, y.add_grad))


def scaled(x: VectorValue, s: VectorValue) -> VectorValue:
    """Return x times the one number in s (1, 1)."""
    engine, n, factor = x.engine, x.rows * x.dim, s.data[0]
    out = VectorValue(engine, x.rows, x.dim)
    engine.add_scaled(x.data, out.data, n, factor)

    def s_learns(g: array) -> None:
        s.grad_buffer()[0] += engine.dot(g, x.data, n)
    return out.of((x, lambda g: engine.add_scaled(g, x.grad_buffer(), n, factor)), (s, s_learns))


def rmsnorm(x: VectorValue, eps: float = 1e-5) -> VectorValue:
    """Return each row of x (T, C) divided by its root mean square.  Source: arXiv:1910.07467."""
    engine, rows, dim = x.engine, x.rows, x.dim
    out, inverse = VectorValue(engine, rows, dim), engine.buffer(rows)
    engine.rmsnorm_forward(x.data, out.data, inverse, rows, dim, eps)
    data = out.data  # held by itself: who holds out from within makes a cycle
    return out.of((x, lambda g: engine.rmsnorm_backward(
        g, data, inverse, x.grad_buffer(), rows, dim)))


def rope_angles(first_pos: int, rows: int, head_dim: int, base: float = 10_000.0) -> List[float]:
    """Return cos and sin of (first_pos+t)·base**(−i/D) for each row t and pair i, interleaved.

    Source: RoFormer, arXiv:2104.09864, §3.2.  Raises ValueError if head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs; found heads of odd width {head_dim}")
    rates = [base ** (-i / head_dim) for i in range(0, head_dim, 2)]
    return [turn(pos * rate) for pos in range(first_pos, first_pos + rows) for rate in rates
            for turn in (math.cos, math.sin)]


def rope_turned(x: VectorValue, angles: array, head_dim: int, turned: int) -> VectorValue:
    """Return x (T, C) with its first `turned` channels turned by angles (T, D) of rope_angles.

    So queries and keys turn while the values beside them stay, and the scores of turned queries
    and keys depend only on their distance.  Raises ValueError.
    """
    engine, rows, dim = x.engine, x.rows, x.dim
    if turned > dim or turned % head_dim or len(angles) != rows * head_dim:
        raise ValueError(f"{turned} channels and {len(angles)} angles do not fit {rows} rows of "
                         f"heads of width {head_dim}")
    out = VectorValue(engine, rows, dim)
    # the way back is the same turn in the other direction
    engine.rope_turn(x.data, angles, out.data, rows, dim, turned, head_dim, 1.0)
    return out.of((x, lambda g: engine.rope_turn(
        g, angles, x.grad_buffer(), rows, dim, turned, head_dim, -1.0)))


def causal_attention(qkv: VectorValue, starts: Sequence[int], n_head: int) -> VectorValue:
    """Return (T, C): each row attends to itself and the earlier rows of its own segment.

    qkv (T, 3C) holds queries, keys, values side by side; starts (S+1,) are the segments' first
    rows and the end.  Raises ValueError.  Source: arXiv:1706.03762, with the memory plan of
    arXiv:2205.14135.
    """
    engine, rows, dim = qkv.engine, qkv.rows, qkv.dim // 3
    if qkv.dim != 3 * dim or dim % n_head:
        raise ValueError(f"{qkv.dim} channels are not 3 times {n_head} heads")
    bounds, width = array("i", starts), dim // n_head
    if list(bounds) != sorted(bounds) or bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"segments must rise from 0 to {rows}; found {list(starts)}")
    # lse, ln Σ exp of each row's scores, is enough to make the weights anew on the way back
    out, lse = VectorValue(engine, rows, dim), engine.buffer(rows * n_head)
    shape = bounds, n_head, width
    engine.attend("attention_forward", (qkv.data, out.data, lse), *shape)
    return out.of((qkv, lambda g: engine.attend(
        "attention_backward", (g, qkv.data, lse, qkv.grad_buffer()), *shape)))


def swiglu(x: VectorValue) -> VectorValue:
    """Return silu(gate)·up (T, F) for x (T, 2F) = gates beside ups.

    Raises ValueError when x cannot be halved.  Source: arXiv:2002.05202.
    """
    engine, rows, dim = x.engine, x.rows, x.dim // 2
    if x.dim % 2:
        raise ValueError(f"{x.dim} channels cannot be halved into gates and ups")
    out = VectorValue(engine, rows, dim)
    engine.swiglu_forward(x.data, out.data, rows, dim)
    return out.of((x, lambda g: engine.swiglu_backward(g, x.data, x.grad_buffer(), rows, dim)))


def dropout(x: VectorValue, rate: float, seed: int) -> VectorValue:
    """Return x with a share `rate` of its numbers zeroed, the rest scaled so the mean stays.

    The seed alone decides which; so nothing need be kept for the way back.
    """
    if rate == 0.0:
        return x
    engine, n = x.engine, x.rows * x.dim
    out = VectorValue(engine, x.rows, x.dim)
    engine.dropout_apply(x.data, out.data, n, rate, seed)
    return out.of((x, lambda g: engine.dropout_apply(g, x.grad_buffer(), n, rate, seed)))


def cross_entropy(logits: VectorValue, targets: Sequence[int]) -> Tuple[ScalarValue, array]:
    """Return the mean loss in nats over the rows with a target, and every row's own loss.

    logits (T, V), targets (T,); a target of −1 has no loss.  Raises ValueError.
    """
    engine, rows, vocab, wanted = logits.engine, logits.rows, logits.dim, array("i", targets)
    if len(wanted) != rows or (rows and not -1 <= min(wanted) <= max(wanted) < vocab):
        raise ValueError(f"{rows} rows of {vocab} logits need as many targets from -1 to "
                         f"{vocab - 1}; found {len(wanted)}")
    lse, losses = engine.buffer(rows), engine.buffer(rows)
    engine.cross_entropy_forward(logits.data, wanted, lse, losses, rows, vocab)
    count = max(1, rows - wanted.count(-1))
    loss = ScalarValue(sum(losses) / count).of((logits, lambda g: engine.cross_entropy_backward(
        logits.data, wanted, lse, logits.grad_buffer(), rows, vocab, g / count)))
    return loss, losses


class DeltaAdapter:
    """A low-rank change x·(B·A)ᵀ beside a frozen matrix, of no effect when born.

    A (R, C_in) starts normal, B (C_out, R) at zero.  Source: LoRA, arXiv:2106.09685.
    """

    def __init__(self, engine: Engine, name: str, base: MatrixParam, rank: int,
                 rng: Optional[random.Random]) -> None:
        self.a = MatrixParam.normal(engine, name + ".a", rank, base.dim, base.dim ** -0.5, rng)
        self.b = MatrixParam(engine, name + ".b", base.rows, rank)

    def __call__(self, x: VectorValue, y: VectorValue) -> VectorValue:
        """Return y (T, C_out), the frozen matrix's output for x (T, C_in), with the change."""
        return added(y, linear(linear(x, self.a), self.b))

    def embed(self, ids: Sequence[int], x: VectorValue) -> VectorValue:
        """Return x (T, C_in), rows `ids` of the frozen matrix, with the change of those rows."""
        return added(x, mixed(embed(ids, self.b), self.a))

    def fold_into(self, matrix: MatrixParam) -> None:
        """Add B·A to a matrix (C_out, C_in), which then does alone what both did."""
        engine, change = matrix.engine, matrix.engine.buffer(matrix.rows * matrix.dim)
        engine.matmul_nn(self.b.data, self.a.data, change, matrix.rows, self.a.rows, matrix.dim)
        engine.add_scaled(change, matrix.data, len(change), 1.0)
        matrix.changed()


# ──────────────────────────────────────────────────────────────────────────────────────
# 7 · MODEL — ids in, logits out; it knows no text   uses: 0 4 5 6
# ──────────────────────────────────────────────────────────────────────────────────────
#
# The exact Llama form: RMSNorm before attention and before SwiGLU, RoPE on queries and keys, one
# embedding for input and output, no biases. The base learns first; what comes later is appended as
# low-rank deltas beside it, so that nothing once learned is written over. Layers are numbered
# alike everywhere: 0 is the base, k is deltas[k-1]. With a router each text is spoken by the base
# and at most one delta, folded into whole matrices: so the newest layer cannot disturb the oldest,
# and a choice costs no multiplication. Without one all deltas add up; so a delta learns.


@dataclass(frozen=True)
class Shape:
    """What makes two sets of weights interchangeable."""

    n_layer: int
    n_embd: int
    n_head: int
    n_ff: int
    block_size: int
    rope_base: float
    norm_eps: float

    @classmethod
    def of(cls, config: Config) -> "Shape":
        """Return the shape a Config asks for."""
        return cls(config.n_layer, config.n_embd, config.n_head, config.ff_width,
                   config.block_size, config.rope_base, config.norm_eps)

    @property
    def head_dim(self) -> int:
        """The width D of a head."""
        return self.n_embd // self.n_head


class KVCache:
    """Keys (already rotated) and values of the newest block_size tokens, for every block.

    Position p lives in slot p % block_size, so the newest token overwrites the oldest and a token
    costs the same however long the text has become.
    """

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self.shape, self.position = shape, 0
        self.blocks = [engine.cache(engine, shape.block_size, shape.n_head, shape.head_dim)
                       for _ in range(shape.n_layer)]
        # what decode_block works in, kept so that a token allocates nothing
        self.room = engine.buffer(5 * shape.n_embd + 3 * shape.n_ff + shape.block_size + 16)

    def attend(self, block: int, qkv: VectorValue) -> VectorValue:
        """Return the attention (T, C) of new rows, whose keys and values join the cache.

        A single one attends to all that is cached, several, which come first, to each other.
        """
        kept, dim, size = self.blocks[block], self.shape.n_embd, self.shape.block_size
        for row in range(qkv.rows):
            at = row * 3 * dim + dim
            kept.write((self.position + row) % size, qkv.data[at:at + dim],
                       qkv.data[at + dim:at + 2 * dim])
        if qkv.rows > 1:
            return causal_attention(qkv, (0, qkv.rows), self.shape.n_head)
        out = VectorValue(qkv.engine, 1, dim)
        kept.attend(qkv.data[:dim], min(self.position + 1, size), out.data)
        return out


class Angles:
    """The rotary angles of the window read last; models of one shape share them."""

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self.engine, self.shape = engine, shape
        self._kept = 0, engine.buffer(0)

    def __call__(self, first_pos: int, rows: int) -> array:
        """Return the angles (rows, D) of the positions from first_pos on."""
        width, block = self.shape.head_dim, self.shape.block_size
        at, (begin, angles) = first_pos % block, self._kept
        if begin != first_pos - at or len(angles) < (at + rows) * width:
            begin = first_pos - at
            angles = self.engine.buffer_of(rope_angles(
                begin, max(block, at + rows), width, self.shape.rope_base))
            self._kept = begin, angles
        return angles[at * width:(at + rows) * width]


Delta = Dict[str, DeltaAdapter]
EMBEDDING_SIGMA = 0.05
MATRIX_GAIN = 0.2  # of 1/√fan_in; 0.2 measured 0.1 bits per character better than 1 in short runs
KEPT_NUMBERS = 1_000_000  # in models with one delta folded in; to fold one takes a millisecond


def delta_matrices(delta: Delta) -> List[MatrixParam]:
    """Return the matrices of a delta: A, then B, of each adapter in order."""
    return [matrix for adapter in delta.values() for matrix in (adapter.a, adapter.b)]


def _newborn(shape: Shape, vocab_size: int, engine: Engine,
             rng: Optional[random.Random]) -> Dict[str, MatrixParam]:
    """Return the matrices of a base, drawn from rng or, without one, zeros."""
    dim, calm = shape.n_embd, (2 * shape.n_layer) ** -0.5  # so that all blocks add up to one step
    wide, narrow = MATRIX_GAIN * dim ** -0.5, MATRIX_GAIN * shape.n_ff ** -0.5
    forms = {"embedding": (vocab_size, dim, EMBEDDING_SIGMA)}
    for i in range(shape.n_layer):
        forms[f"{i}.qkv"] = 3 * dim, dim, wide
        forms[f"{i}.out"] = dim, dim, calm * wide
        forms[f"{i}.gate_up"] = 2 * shape.n_ff, dim, wide
        forms[f"{i}.down"] = dim, shape.n_ff, calm * narrow
    forms["scale"] = 1, 1, 0.0
    params = {name: MatrixParam.normal(engine, name, rows, cols, sigma, rng,
                                       decays=name not in ("embedding", "scale"))
              for name, (rows, cols, sigma) in forms.items()}
    params["scale"].data[0] = 1.0
    return params


class GPT:
    """A small Llama with appended deltas: ids to logits."""

    def __init__(self, shape: Shape, vocab_size: int, engine: Engine,
                 rng: Optional[random.Random],
                 params: Optional[Dict[str, MatrixParam]] = None) -> None:
        """Draw every matrix from rng, or leave them at zero, or share those of another model."""
        self.shape, self.engine = shape, engine
        self.params = params or _newborn(shape, vocab_size, engine, rng)
        self.deltas: List[Delta] = []
        self.router: Optional[Callable[[Sequence[int]], int]] = None
        self.layer = 0  # which one speaks here, in a model that with_layer made
        self._angles = Angles(engine, shape)
        self._speakers: Dict[int, Tuple[Tuple[Delta, int], "GPT"]] = {}

    def _sharing(self, params: Dict[str, MatrixParam], deltas: List[Delta]) -> "GPT":
        """Return a model of this shape, without a router, that consists of given parts."""
        other = GPT(self.shape, self.vocab_size, self.engine, None, params)
        other.deltas, other._angles = deltas, self._angles
        return other

    @property
    def vocab_size(self) -> int:
        """The number of ids it may say: the rows of the embedding."""
        return self.params["embedding"].rows

    @property
    def n_base(self) -> int:
        """The count of numbers in the base."""
        return sum(p.rows * p.dim for p in self.params.values())

    def delta_params(self) -> Iterator[MatrixParam]:
        """Yield every matrix of every delta."""
        return itertools.chain.from_iterable(map(delta_matrices, self.deltas))

    def trainable(self) -> List[MatrixParam]:
        """Return the parameters that learn at present."""
        return [p for p in (*self.params.values(), *self.delta_params()) if p.needs_grad]

    def freeze(self, frozen: bool = True) -> None:
        """Keep the base and every delta from training; freeze(False) lets the base train."""
        for param in self.params.values():
            param.needs_grad = not frozen
        for param in self.delta_params():
            param.needs_grad = False

    def append_delta(self, rank: int, rng: Optional[random.Random]) -> None:
        """Freeze everything and append a new delta, of no effect yet, that trains."""
        self.freeze()
        number = len(self.deltas) + 1  # the base is layer 0
        self.deltas.append({
            name: DeltaAdapter(self.engine, f"delta{number}.{name}", base, rank, rng)
            for name, base in self.params.items() if name != "scale"})

    def learner(self) -> "GPT":
        """Return the model that trains: the base with the newest delta beside it."""
        return self._sharing(self.params, self.deltas[-1:])

    def _project(self, name: str, x: VectorValue) -> VectorValue:
        """Return x through the named matrix and what the deltas add to it."""
        y = linear(x, self.params[name])
        for delta in self.deltas:
            y = delta[name](x, y)
        return y

    def _embed(self, ids: Sequence[int]) -> VectorValue:
        """Return the embeddings (T, C) of ids; deltas of the tied matrix count here as well."""
        x = embed(ids, self.params["embedding"])
        for delta in self.deltas:
            x = delta["embedding"].embed(ids, x)
        return x

    def _blocks(self, x: VectorValue, first_pos: int,
                attend: Callable[[int, VectorValue], VectorValue],
                drop: Callable[[VectorValue], VectorValue] = lambda x: x) -> VectorValue:
        """Return x (T, C) after every block; attend(block, qkv) mixes the rows."""
        shape, angles = self.shape, self._angles(first_pos, x.rows)
        for i in range(shape.n_layer):
            qkv = self._project(f"{i}.qkv", rmsnorm(x, shape.norm_eps))
            qkv = rope_turned(qkv, angles, shape.head_dim, turned=2 * shape.n_embd)
            x = added(x, drop(self._project(f"{i}.out", attend(i, qkv))))
            gates = self._project(f"{i}.gate_up", rmsnorm(x, shape.norm_eps))
            x = added(x, drop(self._project(f"{i}.down", swiglu(gates))))
        return x

    def _head(self, x: VectorValue) -> VectorValue:
        """Return logits (T, V) for the last block's output (T, C)."""
        x = scaled(rmsnorm(x, self.shape.norm_eps), self.params["scale"])
        return self._project("embedding", x)

    def logits(self, ids: Sequence[int], starts: Optional[Sequence[int]] = None,
               drop_rate: float = 0.0, rng: Optional[random.Random] = None) -> VectorValue:
        """Return logits (T, V) for ids (T,), whose segments begin at starts (S+1,).

        Positions need not begin anew in each segment: RoPE sees only distances. Raises ValueError.
        """
        def drop(x: VectorValue) -> VectorValue:
            return dropout(x, drop_rate, rng.getrandbits(32)) if drop_rate and rng else x
        bounds = starts if starts is not None else (0, len(ids))
        x = drop(self._embed(ids))
        return self._head(self._blocks(
            x, 0, lambda _, qkv: causal_attention(qkv, bounds, self.shape.n_head), drop))

    def newest_logits(self, ids: Sequence[int], rows: int) -> VectorValue:
        """Return the logits (rows, V) behind each of the newest ids; no gradients are kept."""
        with self.engine.no_grad():
            x = self._blocks(self._embed(ids), 0, lambda _, qkv: causal_attention(
                qkv, (0, qkv.rows), self.shape.n_head))
            return self._head(VectorValue(self.engine, rows, x.dim, x.data[-rows * x.dim:]))

    def loss(self, windows: Sequence[Sequence[int]], drop_rate: float = 0.0,
             rng: Optional[random.Random] = None) -> ScalarValue:
        """Return the mean loss in nats of predicting each window's ids from those before them.

        The windows, of any lengths from 2 up, stand in one graph one after the other: no padding.
        Raises ValueError for a shorter one.
        """
        inputs, targets, starts = stacked(windows)
        return cross_entropy(self.logits(inputs, starts, drop_rate, rng), targets)[0]

    def new_cache(self) -> KVCache:
        """Return an empty cache of this model's shape."""
        return KVCache(self.engine, self.shape)

    def feed(self, cache: KVCache, ids: Sequence[int]) -> array:
        """Read new ids into the cache; return the logits (V,) for what comes next.

        Of more than block_size ids only the newest are read.  Raises ValueError for none.
        """
        if not ids:
            raise ValueError("a model must be fed at least one id")
        newest = ids[-self.shape.block_size:]
        # the kernel that does a whole block knows no deltas beside it; who speaks has them folded
        if (cache.position or len(newest) == 1) and self.engine.fused and not self.deltas:
            return self._decode(cache, newest)
        with self.engine.no_grad():
            # only an empty cache is read into side by side: later rows attend to what is cached
            for run in ([newest] if cache.position == 0 else [[i] for i in newest]):
                x = self._blocks(self._embed(run), cache.position, cache.attend)
                cache.position += len(run)
            return self._head(VectorValue(self.engine, 1, x.dim, x.row(x.rows - 1))).data

    def _decode(self, cache: KVCache, ids: Sequence[int]) -> array:
        """Return the logits (V,) after ids, which join the cache one by one, a kernel a block."""
        shape, engine, matrices = self.shape, self.engine, self.params
        table, dim, window = matrices["embedding"], shape.n_embd, shape.block_size
        weights = [[matrices[f"{i}.{name}"].data for name in ("qkv", "out", "gate_up", "down")]
                   for i in range(shape.n_layer)]
        for token in ids:
            x, position = table.row(token), cache.position
            angles = self._angles(position, 1)
            for kept, four in zip(cache.blocks, weights):
                engine.decode_block(x, *four, angles, kept.keys, kept.values, cache.room, dim,
                                    shape.n_head, shape.n_ff, position % window,
                                    min(position + 1, window), window, shape.norm_eps)
            cache.position += 1
        logits = engine.buffer(table.rows)
        engine.decode_head(x, table.data, logits, cache.room, dim, table.rows,
                           matrices["scale"].data[0], shape.norm_eps)
        return logits

    @property
    def routed(self) -> bool:
        """Whether there is a choice of who speaks."""
        return self.router is not None and bool(self.deltas)

    def layer_after(self, ids: Sequence[int]) -> int:
        """Return the layer that speaks after ids, or 0 where there is no choice."""
        return self.router(ids) if self.router is not None and self.deltas else 0

    def speaker(self, ids: Sequence[int]) -> "GPT":
        """Return the model as it speaks after ids: itself, or the layer its router chooses."""
        return self.with_layer(self.layer_after(ids)) if self.routed else self

    def with_layer(self, number: int) -> "GPT":
        """Return the model that speaks for a layer: the base alone, or with one delta folded in.

        It is kept until one of them changes, or others need the room.  Raises ValueError.
        """
        if not 0 <= number <= len(self.deltas):
            raise ValueError(f"layer {number} of {len(self.deltas)} deltas and the base")
        delta = self.deltas[number - 1] if number else {}
        # a number may pass to another delta, so the state holds the delta itself beside the count
        state = delta, sum(p.changes for p in (*self.params.values(), *delta_matrices(delta)))
        kept = self._speakers.pop(number, None)
        if kept is None or kept[0] != state:
            kept = state, self._sharing(self._merged(delta) if number else self.params, [])
            kept[1].layer = number
        # an old one makes room before the new one enters, which stays whatever its size
        while self._speakers and (len(self._speakers) + 1) * self.n_base > KEPT_NUMBERS:
            del self._speakers[next(iter(self._speakers))]  # the least recently asked for
        self._speakers[number] = kept
        return kept[1]

    def _merged(self, delta: Delta) -> Dict[str, MatrixParam]:
        """Return copies of the base's matrices with a delta folded into them."""
        whole = {name: MatrixParam(self.engine, name, p.rows, p.dim, p.data[:])
                 for name, p in self.params.items()}
        for name, adapter in delta.items():
            adapter.fold_into(whole[name])
        return whole


def stacked(windows: Sequence[Sequence[int]]) -> Tuple[List[int], List[int], List[int]]:
    """Return inputs, targets and segment starts of windows set one after the other."""
    inputs, targets, starts = [], [], [0]  # type: List[int], List[int], List[int]
    for window in windows:
        if len(window) < 2:
            raise ValueError(f"a window needs at least 2 ids; found {len(window)}")
        inputs.extend(window[:-1])
        targets.extend(window[1:])
        starts.append(len(inputs))
    return inputs, targets, starts


class Layer(NamedTuple):
    """A named blob of weights or state, and a JSON-able description of its shape."""

    manifest: Any
    data: bytes
    sealed: bool = False


# A layer's state as bytes. Matrices and moments go through one codec: little-endian float32, and a
# manifest that names each part and its shape.


def float_bytes(data: array) -> bytes:
    """Return a float buffer as little-endian bytes."""
    return little_endian(data[:]).tobytes()


def floats_of(blob: bytes) -> array:
    """Return little-endian float32 bytes as a buffer."""
    return little_endian(array("f", blob))


def pack_params(params: Sequence[MatrixParam]) -> Layer:
    """Return matrices as one layer whose manifest names their shapes, in order."""
    return Layer([[p.name, p.rows, p.dim] for p in params],
                 b"".join(float_bytes(p.data) for p in params))


def fill(params: Iterable[MatrixParam], numbers: array) -> array:
    """Load matrices from numbers, one after the other; return the numbers that are left."""
    at = 0
    for param in params:
        size = param.rows * param.dim
        param.load(numbers[at:at + size])
        at += size
    return numbers[at:]


def load_params(params: Sequence[MatrixParam], layer: Layer) -> None:
    """Load the matrices of a layer.  Raises StoreError when it was made for another shape."""
    if [[rows, dim] for _, rows, dim in layer.manifest] != [[p.rows, p.dim] for p in params]:
        raise StoreError(f"stored weights have the shapes {layer.manifest}, this model has "
                         f"{[[p.name, p.rows, p.dim] for p in params]}; use the settings it was "
                         f"made with, or another --db")
    fill(params, floats_of(layer.data))


def pack_moments(params: Sequence[MatrixParam]) -> Layer:
    """Return the optimizer's state of the matrices as one layer."""
    return Layer([[p.name, p.rows, p.dim, p.steps] for p in params],
                 b"".join(float_bytes(moment) for p in params for moment in p.moments))


def load_moments(params: Sequence[MatrixParam], layer: Layer) -> None:
    """Load what fits of the optimizer's state; a matrix that it does not know starts at zero."""
    numbers, at = floats_of(layer.data), 0
    by_name = {p.name: p for p in params}
    for name, rows, dim, steps in layer.manifest:
        size, param = rows * dim, by_name.get(name)
        if param is not None and (param.rows, param.dim) == (rows, dim):
            param.moments = numbers[at:at + size], numbers[at + size:at + 2 * size]
            param.steps = steps
        at += 2 * size


# ──────────────────────────────────────────────────────────────────────────────────────
# 8 · OPTIMIZER — every matrix keeps its own momentum   uses: 0 6
# ──────────────────────────────────────────────────────────────────────────────────────
#
# AdamW with the gradient clipped by its global norm. Moments and step counts live in the
# parameters, so a matrix that arrives later is served like the others.


def descend(params: Sequence[MatrixParam], rate: float, config: Config) -> float:
    """Move every param down its gradient and drop the gradients; return the global norm.

    A norm that is not finite moves nothing: check it with math.isfinite.  Source: AdamW,
    arXiv:1711.05101.
    """
    norm, betas = gradient_norm(params), (config.beta1, config.beta2)
    clip = config.grad_clip / max(norm, config.grad_clip)
    for param in params:
        if param.grad is not None and math.isfinite(norm):
            param.steps += 1
            fixes = [1.0 / (1.0 - beta ** param.steps) for beta in betas]
            decay = config.weight_decay if param.decays else 0.0
            param.engine.adamw_step(param.data, param.grad, *param.moments, len(param.data), rate,
                                    *betas, config.eps_adam, decay, *fixes, clip)
            param.changed()
        param.grad = None
    return norm


def gradient_norm(params: Sequence[MatrixParam]) -> float:
    """Return the Euclidean norm of all gradients together, infinite where one is not finite."""
    total = 0.0  # added one by one: sum() rounds otherwise from Python 3.12 on
    for p in params:
        if p.grad is not None:
            total += p.engine.dot(p.grad, p.grad, p.rows * p.dim)
    return sqrt(total) if math.isfinite(total) else math.inf


def scheduled_rate(peak: float, done: float, warmup: float, shape: str = "linear") -> float:
    """Return the learning rate when a share `done` (0 to 1) of the schedule is behind us.

    It rises linearly over the first `warmup` share and then falls to 0 along a line or a cosine.
    """
    if done < warmup:
        return peak * max(done / warmup, 0.01)
    left = max(0.0, min(1.0, (1.0 - done) / max(1.0 - warmup, 1e-9)))
    return peak * (left if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * left))


# ──────────────────────────────────────────────────────────────────────────────────────
# 9 · SAMPLING — the model proposes, a seeded die decides   uses: 0 4
# ──────────────────────────────────────────────────────────────────────────────────────
# A model ends in one logit per token id; a reply needs one id. Between the two stands a chain of
# small filters, each a pure function from candidates to candidates. Candidates are (logit, id)
# pairs from the most to the least likely, equal logits by lower id: nearly every filter is then a
# cut of a sorted list, and the first pair is always the best. No filter ever empties the list.
# Penalties move only the pairs they touch, so the one full sort per token is the first one.
# Measured (Python 3.11), interpreted: the default chain and draw take 0.06 ms for 512 logits and
# 0.14 ms for 1,300; 0.17 and 0.44 ms where penalties move 64 ids.

Candidates = List[Tuple[float, int]]

GREEDY_BELOW_TEMPERATURE = 1e-6  # a float32 logit divided by less could overflow to infinity
MAX_DRY_LOG_PENALTY = 80.0  # e**80 bans as surely as infinity does, and stays a finite number
LEAST_SHARE = 1e-9  # with a share of nothing a kernel would keep nothing; with this, the best


def candidates_of(logits: Sequence[float]) -> Candidates:
    """Return the (logit, id) pairs of `logits`, most likely first, equal logits by lower id.

    An id whose logit is NaN or -inf is dropped. A logit of +inf means certainty: only ids at +inf
    then stay, as equals with logit 0. Raises ValueError if none stays.
    """
    pairs: Iterable[Tuple[float, int]] = zip(logits, range(len(logits)))
    finite = len(logits) > 0 and math.isfinite(sum(logits))
    if not finite:
        pairs = [pair for pair in pairs if pair[0] > -math.inf]  # a NaN is not above it either
        if not pairs:
            raise ValueError(f"no id can be drawn: all {len(logits)} logits are NaN or -inf")
    c = sorted(pairs, key=itemgetter(0), reverse=True)  # stable: equal logits stay in order of id
    if c[0][0] == math.inf:
        return [(0.0, token) for logit, token in c if logit == math.inf]
    return c


def probabilities(c: Candidates) -> List[float]:
    """Return the softmax of the candidates' logits, in their order."""
    top = c[0][0]
    weights = [math.exp(logit - top) for logit, _ in c]
    total = sum(weights)
    return [weight / total for weight in weights]


def temper(c: Candidates, temperature: float) -> Candidates:
    """Return the logits divided by `temperature`; at 0 (below 1e-6) only the most likely stays."""
    if temperature < GREEDY_BELOW_TEMPERATURE:
        return c[:1]
    return [(logit / temperature, token) for logit, token in c]


def keep_top_k(c: Candidates, k: int) -> Candidates:
    """Return the `k` most likely; k <= 0 is off. Source: Fan et al., arXiv:1805.04833."""
    return c[:k] if k > 0 else c


def keep_top_p(c: Candidates, p: float) -> Candidates:
    """Return the nucleus: the fewest most likely candidates whose probability reaches `p`.

    The one that crosses `p` stays; p >= 1 is off. Source: Holtzman et al., arXiv:1904.09751.
    """
    if p >= 1.0:
        return c
    return c[:bisect_left(list(accumulate(probabilities(c))), p) + 1]


def keep_min_p(c: Candidates, min_p: float) -> Candidates:
    """Return the candidates at least `min_p` times as probable as the best; min_p <= 0 is off.

    In logits: logit >= max + ln(min_p). Source: Nguyen et al., arXiv:2407.01082.
    """
    if min_p <= 0.0:
        return c
    floor = c[0][0] + math.log(min(min_p, 1.0))
    return [pair for pair in c if pair[0] >= floor]


def keep_typical(c: Candidates, typical_p: float) -> Candidates:
    """Return the candidates whose surprise -ln p lies closest to the entropy H.

    They are taken by rising |-ln p - H| until their mass reaches `typical_p`, the crossing one
    included, and handed back in logit order; typical_p >= 1 is off.
    Source: Meister et al., "Locally Typical Sampling", arXiv:2202.00666.
    """
    if typical_p >= 1.0:
        return c
    chances = probabilities(c)
    # From the logits, not as ln(p): a probability may underflow to 0, its surprise stays finite.
    zero = c[0][0] - math.log(chances[0])
    surprises = [zero - logit for logit, _ in c]
    entropy = sum(chance * surprise for chance, surprise in zip(chances, surprises))
    distances = [abs(surprise - entropy) for surprise in surprises]
    order = sorted(range(len(c)), key=distances.__getitem__)
    crossing = bisect_left(list(accumulate(chances[rank] for rank in order)), typical_p)
    return [c[rank] for rank in sorted(order[:crossing + 1])]


def keep_top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Return the candidates within `n` standard deviations of the best logit; n <= 0 is off.

    The deviation is that of the population of all logits given. Source: arXiv:2411.07641.
    """
    if n <= 0.0:
        return c
    mean = sum(logit for logit, _ in c) / len(c)
    sigma = math.sqrt(sum((logit - mean) ** 2 for logit, _ in c) / len(c))
    return [pair for pair in c if pair[0] >= c[0][0] - n * sigma]


def exclude_top_choices(c: Candidates, probability: float, threshold: float,
                        rng: random.Random) -> Candidates:
    """Return `c`, with chance `probability` without its top choices but the last of them (XTC).

    Top choices have at least `threshold` probability. One rng.random() is used, unless
    probability <= 0, which is off. Source: p-e-w's XTC sampler, as llama.cpp defines it.
    """
    if probability <= 0.0 or rng.random() >= probability:
        return c
    top_choices = sum(chance >= threshold for chance in probabilities(c))
    return c[max(top_choices - 1, 0):]


def _recent(history: Sequence[int], last_n: int) -> Sequence[int]:
    """Return the last `last_n` ids of `history`: all of them if negative, none if 0."""
    return history[-last_n:] if last_n > 0 else history[:0] if last_n == 0 else history


def _relogit(c: Candidates, changed: Dict[int, float]) -> Candidates:
    """Return `c` with the logit of every id in `changed` replaced, in order again."""
    if not changed:
        return c
    by_id = sorted([(changed.get(token, logit), token) for logit, token in c], key=itemgetter(1))
    return sorted(by_id, key=itemgetter(0), reverse=True)  # stable: equal logits by lower id


def penalise_repetition(c: Candidates, history: Sequence[int], penalty: float, last_n: int,
                        presence: float = 0.0, frequency: float = 0.0) -> Candidates:
    """Return `c` with the ids among the last `last_n` of `history` made less likely, each once.

    A positive logit is divided by `penalty` (> 0), any other multiplied; then count * frequency +
    presence is subtracted. Off: penalty 1 with both others 0, or last_n 0; a negative last_n means
    the whole history. Source: CTRL, Keskar et al., arXiv:1909.05858, with llama.cpp's two signs.
    """
    counts = Counter(_recent(history, last_n))
    if not counts or (penalty, presence, frequency) == (1.0, 0.0, 0.0):
        return c
    changed = {}
    for logit, token in c:
        if token in counts:
            scaled = logit / penalty if logit > 0.0 else logit * penalty
            changed[token] = scaled - (counts[token] * frequency + presence)
    return _relogit(c, changed)


def _prefix_matches(ids: Sequence[int]) -> List[int]:
    """Return, for each place of `ids`, how many ids from there on equal its beginning, in O(n).

    This is the Z-function. Place 0 gets 0. Source: Gusfield, Algorithms on Strings, 1997.
    """
    lengths = [0] * len(ids)
    left = right = 0  # ids[left:right] is the match found so far that reaches furthest
    for at in range(1, len(ids)):
        length = min(lengths[at - left], right - at) if at < right else 0
        while at + length < len(ids) and ids[length] == ids[at + length]:
            length += 1
        lengths[at] = length
        if at + length > right:
            left, right = at, at + length
    return lengths


def penalise_dry(c: Candidates, history: Sequence[int], multiplier: float, base: float,
                 allowed_length: int, last_n: int) -> Candidates:
    """Return `c` with every id that would prolong a verbatim repetition made less likely.

    If the last m ids of `history` stood earlier in its last `last_n` (negative: in all of it) and
    an id came next, the longest such m >= allowed_length (>= 1) costs that id multiplier *
    base**(m - allowed_length). multiplier 0 is off.
    Source: p-e-w's DRY ("don't repeat yourself") sampler.
    """
    recent = _recent(history, last_n)
    if multiplier == 0.0 or len(recent) < 2 or recent[-1] not in recent[:-1]:
        return c  # mostly so, and quick to see
    backward = recent[::-1]
    longest: Dict[int, int] = {}
    for follower, length in zip(backward, _prefix_matches(backward)[1:]):
        longest[follower] = max(length, longest.get(follower, 0))
    most = MAX_DRY_LOG_PENALTY / math.log(base) if base > 1.0 else math.inf
    penalties = {token: multiplier * base ** min(length - allowed_length, most)
                 for token, length in longest.items() if length >= allowed_length}
    return _relogit(c, {t: logit - penalties[t] for logit, t in c if t in penalties})


# What a chain may be made of: each takes candidates, the ids so far, the settings and the die.
SAMPLERS: Dict[str, Callable[[Candidates, Sequence[int], Config, random.Random], Candidates]] = {
    "penalties": lambda c, past, s, rng: penalise_repetition(
        c, past, s.repeat_penalty, s.repeat_last_n, s.presence_penalty, s.frequency_penalty),
    "dry": lambda c, past, s, rng: penalise_dry(
        c, past, s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_last_n),
    "top_n_sigma": lambda c, past, s, rng: keep_top_n_sigma(c, s.top_n_sigma),
    "top_k": lambda c, past, s, rng: keep_top_k(c, s.top_k),
    "typical_p": lambda c, past, s, rng: keep_typical(c, s.typical_p),
    "top_p": lambda c, past, s, rng: keep_top_p(c, s.top_p),
    "min_p": lambda c, past, s, rng: keep_min_p(c, s.min_p),
    "xtc": lambda c, past, s, rng: exclude_top_choices(
        c, s.xtc_probability, s.xtc_threshold, rng),
    "temperature": lambda c, past, s, rng: temper(c, s.temperature),
}


def chain_of(config: Config) -> Tuple[str, ...]:
    """Return the names of the samplers in the owner's order.  Raises ConfigError for others."""
    chain = tuple(name.strip() for name in config.samplers.split(",") if name.strip())
    unknown = ", ".join(name for name in chain if name not in SAMPLERS)
    if unknown:
        raise ConfigError(f"samplers={config.samplers!r}: unknown sampler: {unknown}; "
                          f"the known ones are {', '.join(SAMPLERS)}")
    return chain


def apply_samplers(c: Candidates, history: Sequence[int], config: Config,
                   rng: random.Random) -> Candidates:
    """Return what the chain of `config.samplers`, run in that order, leaves of `c`."""
    for name in chain_of(config):
        c = SAMPLERS[name](c, history, config, rng)
    return c


def draw(c: Candidates, rng: random.Random) -> int:
    """Return one id drawn by its probability, using exactly one rng.random().

    A single candidate uses one too: the n-th token of a reply then always meets the n-th number of
    the seed, whichever filters were on before it.
    """
    top = c[0][0]
    heights = list(accumulate(math.exp(logit - top) for logit, _ in c))
    # random() <= 1 - 2**-53, so even the rounded product stays below the total: always a hit.
    return c[bisect_right(heights, rng.random() * heights[-1])][1]


def fast_draw(logits: array, history: array, config: Config, rng: random.Random,
              engine: Engine) -> Optional[int]:
    """Return the id that the chain would draw, by one kernel; None where only the chain can.

    The kernel knows the usual chain, compiled, and finite logits. Where there is None, rng has
    not been asked.
    """
    s, n = config, len(logits)
    if (not engine.is_fast or s.samplers != Config.samplers or s.top_k <= 0 or s.dry_base <= 1.0
            or s.top_n_sigma > 0.0 or s.xtc_probability > 0.0 or s.typical_p < 1.0
            or s.temperature < GREEDY_BELOW_TEMPERATURE
            or (s.repeat_penalty, s.presence_penalty, s.frequency_penalty) != (1.0, 0.0, 0.0)
            or not math.isfinite(engine.dot(logits, logits, n))):
        return None
    past = _recent(history, s.dry_last_n)
    # Cut to what can matter: an owner's number of any size must fit a kernel's integer.
    top_k, allowed = min(s.top_k, n), min(s.dry_allowed_length, len(past) + 1)
    log_base, room = math.log(s.dry_base), engine.buffer(2 * n + 3 * top_k + 4)
    return engine.sample_token(
        logits, n, room, past, len(past), s.dry_multiplier, log_base, allowed,
        MAX_DRY_LOG_PENALTY / log_base, top_k,
        max(s.top_p, LEAST_SHARE) if s.top_p < 1.0 else 2.0, s.min_p, s.temperature, rng.random())


def draw_token(logits: Sequence[float], history: array, config: Config, rng: random.Random,
               engine: Optional[Engine] = None) -> int:
    """Return one id drawn from `logits` by the owner's chain; the kernel draws where it can.

    Penalties look at `history`, the ids of prompt and reply. Uses one rng.random(), and one for
    XTC where it is on. Raises ValueError where no id can be drawn.
    """
    token = fast_draw(logits, history, config, rng, engine) if engine else None
    if token is None:
        token = draw(apply_samplers(candidates_of(logits), history, config, rng), rng)
    return token


# ──────────────────────────────────────────────────────────────────────────────────────
# 10 · TRAINING — one step, one window, one honest number   uses: 0 2 4 5 6 7 8
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Documents become one stream of ids, with an end-of-text where a blank line stood; windows are cut
# from it anywhere. Progress has one currency, bits per character, which no tokenizer can inflate.


def document_ids(tokenizer: EvolvingTokenizer, text: str, closed: bool = True) -> List[int]:
    """Return a document's ids, with END_OF_TEXT for the blank line that closes it."""
    return tokenizer.encode(text) + [END_OF_TEXT] * closed


def text_ids(tokenizer: EvolvingTokenizer, text: str) -> List[int]:
    """Return a whole file's text as the stream the model knows, without loss.

    It begins with END_OF_TEXT as context; each later one but the last stands for the second line
    end of a blank line, and the last for the end of the file.
    """
    *parts, last = text.split("\n\n")
    ids = [END_OF_TEXT]
    for part in (*(part + "\n" for part in parts), last):
        ids += document_ids(tokenizer, part)
    return ids


class Deck:
    """Windows of a stream, dealt in random order, and all of them before one comes again.

    They begin at places, or, with none, lie side by side at a shift that is new each time round:
    measured 0.04 bits per character better than windows at random places.
    """

    def __init__(self, stream: array, block_size: int, places: Sequence[int] = ()) -> None:
        self.stream, self.block_size, self.places = stream, block_size, places
        self._left: List[int] = []

    def deal(self, rng: random.Random) -> List[int]:
        """Return the next window, of 2 to block_size+1 ids; the stream has two or more."""
        if not self._left:
            block, last = self.block_size, len(self.stream) - 1
            # the first window may begin before the text, so that its edges count in full
            self._left += self.places or range(-rng.randrange(min(block, last)), last, block)
            rng.shuffle(self._left)
        start = self._left.pop()
        return list(self.stream[max(0, start):start + self.block_size + 1])


class TextPool:
    """What the trainer may train on: a stream of everything, and a stream of what is new."""

    def __init__(self, block_size: int) -> None:
        self.stream, self.fresh = array("i", [END_OF_TEXT]), array("i", [END_OF_TEXT])
        self._decks = Deck(self.stream, block_size), Deck(self.fresh, block_size)

    def add(self, ids: Sequence[int], fresh: bool = False) -> None:
        """Append a document's ids; a fresh one is in both streams."""
        self.stream.extend(ids)
        if fresh:
            self.fresh.extend(ids)

    def windows(self, count: int, fresh_count: int, rng: random.Random) -> List[List[int]]:
        """Return `count` windows of 2 to block_size+1 ids, `fresh_count` of them of new text.

        There are none where there is no text, and no fresh ones where nothing is new.
        """
        if len(self.fresh) < 2:
            fresh_count = 0
        kinds = [True] * fresh_count + [False] * (count - fresh_count)
        return [self._decks[fresh].deal(rng) for fresh in kinds] if len(self.stream) > 1 else []


# Which layer speaks for a text is read off the text itself, in a few dictionary look-ups.

ROUTE_BYTES = 160    # newest bytes of a text that choose
ROUTE_IDS = 96       # and the most ids they may be spread over
ROUTE_FIRST = 24     # ids that the base reads of a text before anybody is chosen
ROUTE_MARGIN = 4.0   # nats by which a delta must fit better than the base
SHY_MARGINS = (16.0, 64.0)  # and by which one must that was called where it does harm
ROUTE_UNSEEN = 0.1   # how often a trigram that a layer never met counts as met
ROUTE_CALM = 1000.0  # and how many all of those are: a small text is not sure of itself
ROUTE_TRIGRAMS = 30_000  # kept for one layer


class Router:
    """Counts of byte trigrams in what each layer has learned: they choose the layer for a text.

    Layer 0 is the base, layer k delta k. A layer's score is the sum of ln p of the text's trigrams,
    of those that any layer knows, less the margin of a delta: the base speaks unless one is clearly
    better.
    Sources: naive Bayes; N-gram-based text categorization, Cavnar and Trenkle, SDAIR 1994.
    """

    def __init__(self, tokenizer: EvolvingTokenizer, counts: Iterable[Dict[bytes, int]] = (),
                 margins: Sequence[float] = ()) -> None:
        self.tokenizer = tokenizer
        self.counts: List[Counter[bytes]] = [Counter(c) for c in counts] or [Counter()]
        self.margins = list(margins) or [0.0, *[ROUTE_MARGIN] * (len(self.counts) - 1)]
        self._tables: List[Tuple[Dict[bytes, float], float]] = []  # of counts, until these change
        self._rows: Dict[bytes, bytes] = {}  # of each trigram, what all tables say

    def append(self) -> None:
        """Make room for one delta more, which knows no text yet."""
        self.counts.append(Counter())
        self.margins.append(ROUTE_MARGIN)
        self._tables.clear()

    def truncate(self, count: int) -> None:
        """Keep the first `count` layers, the base among them; what the others knew is nobody's."""
        del self.counts[count:], self.margins[count:]
        self._tables.clear()

    def learn(self, layer: int, texts: Iterable[str]) -> None:
        """Count the trigrams of texts as those of a layer."""
        counts = self.counts[layer].copy()
        for text in texts:
            raw = text.encode("utf-8", "surrogatepass")
            counts.update(raw[i:i + 3] for i in range(len(raw) - 2))
        if len(counts) > ROUTE_TRIGRAMS:
            counts = Counter(dict(counts.most_common(ROUTE_TRIGRAMS)))
        self.counts[layer] = counts
        self._tables.clear()

    def refine(self, layer: int, old: int = 0) -> None:
        """Give a layer the text of the base, or of another, for which it speaks from now on."""
        self.counts[layer], self.counts[old] = self.counts[layer] + self.counts[old], Counter()
        self._tables.clear()

    def copied(self) -> "Router":
        """Return a router that may change without this one."""
        return Router(self.tokenizer, self.counts, self.margins)

    def restore(self, past: "Router") -> None:
        """Be again what copied() kept."""
        self.counts, self.margins = list(past.counts), list(past.margins)
        self._tables.clear()

    @staticmethod
    def _table(counts: Dict[bytes, int]) -> Tuple[Dict[bytes, float], float]:
        """Return ln p of the trigrams that a layer knows, and of any other."""
        whole = sum(counts.values()) + ROUTE_CALM
        return ({tri: log((count + ROUTE_UNSEEN) / whole) for tri, count in counts.items()},
                log(ROUTE_UNSEEN / whole))

    def scores(self, raw: bytes) -> List[float]:
        """Return how well each layer fits the bytes, in nats; without a text nothing fits."""
        if not self._tables or len(self._rows) >= ROUTE_TRIGRAMS:
            self._rows.clear()
        self._tables = self._tables or [self._table(counts) for counts in self.counts]
        rows, tables, count = self._rows, self._tables, len(self.counts)
        trigrams = [raw[i:i + 3] for i in range(len(raw) - 2)]
        for tri in trigrams:
            if tri not in rows:  # filled as texts need it: a row for each trigram would be slow
                row = [table.get(tri, other) for table, other in tables]
                heard = any(tri in table for table, _ in tables)
                rows[tri] = array("f", row).tobytes() if heard else b""
        found = array("f", b"".join([rows.get(tri, b"") for tri in trigrams]))
        return [sum(found[layer::count]) - margin if known or not layer else -math.inf
                for layer, (known, margin) in enumerate(zip(self.counts, self.margins))]

    def choose(self, raw: bytes) -> int:
        """Return the layer that the bytes call for: of equals the oldest."""
        scores = self.scores(raw)
        return scores.index(max(scores))

    def __call__(self, ids: Sequence[int]) -> int:
        """Return the layer that the newest bytes of ids call for."""
        newest = b"".join(map(self.tokenizer.token_bytes, ids[-ROUTE_IDS:]))
        return self.choose(newest[-ROUTE_BYTES:])


class Replay:
    """Windows of what is known already, dealt evenly over sources and over time.

    The text of each source is cut into bands from oldest to newest; each band deals its windows
    in random order, and the bands take turns, so that what is old or rare is not drowned.
    """

    def __init__(self, documents: Iterable[Tuple[str, Sequence[int]]], block_size: int) -> None:
        streams: DefaultDict[str, array] = defaultdict(lambda: array("i", [END_OF_TEXT]))
        for source, ids in documents:
            streams[source].extend(ids)
        self._bands: List[Deck] = []
        for stream in streams.values():
            places = range(0, len(stream) - 1, block_size)
            bands = min(REPLAY_BANDS, len(places))
            edges = [*(len(places) * i // bands for i in range(bands)), len(places)]
            self._bands += [Deck(stream, block_size, places[a:b])
                            for a, b in zip(edges, edges[1:])]
        self._turns: List[Deck] = []

    def window(self, rng: random.Random) -> List[int]:
        """Return the next window of 2 to block_size+1 ids, or none where nothing is known."""
        if not self._bands:
            return []
        if not self._turns:
            self._turns = self._bands[:]
            rng.shuffle(self._turns)
        return self._turns.pop().deal(rng)


REPLAY_BANDS = 8  # from oldest to newest


class StepReport(NamedTuple):
    """What one training step did."""

    loss: float
    tokens: int
    norm: float
    applied: bool


def train_step(model: GPT, config: Config, windows: Sequence[Sequence[int]], rate: float,
               drop_rate: float, rng: random.Random,
               guard: Optional[contextlib.AbstractContextManager] = None) -> StepReport:
    """Run forward, backward and update on one batch; the update alone happens inside `guard`.

    A loss or gradient that is not finite changes no weight and is reported as not applied.
    """
    params = model.trainable()
    for param in params:
        param.grad = None
    loss = model.loss(windows, drop_rate, rng)
    tokens = sum(len(window) - 1 for window in windows)
    if not math.isfinite(loss.data):
        return StepReport(loss.data, tokens, math.inf, False)
    backward(loss)
    with guard or contextlib.nullcontext():
        norm = descend(params, rate, config)
    return StepReport(loss.data, tokens, norm, math.isfinite(norm))


Reading = Tuple[int, int, int, int]  # a layer, where it begins to read and to be scored, the end


def reading_plan(model: GPT, ids: Sequence[int], stride: int) -> Iterator[Reading]:
    """Yield windows of at most block_size that score each of ids[1:] once.

    All but the first few are predicted from at least block_size − stride ids before them, by the
    layer which those choose. Where there is a choice, the first window is read twice: as far as
    the base reads, and then whole, for the rest.
    """
    count, block = len(ids) - 1, model.shape.block_size
    first = ROUTE_FIRST if model.routed and ROUTE_FIRST < min(block, count) else 0
    starts = range(0, max(1, count - block + stride), stride)
    windows = [(at, at + block - stride if at else first, min(at + block, count)) for at in starts]
    if first:
        windows.insert(0, (0, 0, first))
    for start, scored, end in windows if count > 0 else ():
        layer = model.layer_after(ids[max(0, scored - ROUTE_IDS):scored + 1])
        yield layer, start, scored, end


def scored_nats(model: GPT, ids: Sequence[int], stride: int, batch: int = 4) -> Iterator[float]:
    """Yield the nats of ids[1:], some windows at a time; their sum is the loss."""
    plan = sorted(reading_plan(model, ids, stride), key=itemgetter(0))
    for layer, parts in itertools.groupby(plan, itemgetter(0)):
        run, voice = list(parts), model.with_layer(layer) if model.routed else model
        for at in range(0, len(run), batch):
            yield _nats_of(voice, ids, run[at:at + batch])


def _nats_of(model: GPT, ids: Sequence[int], parts: Sequence[Reading]) -> float:
    """Return the nats of some windows of one layer, read side by side."""
    inputs, targets, bounds = stacked([ids[start:end + 1] for _, start, _, end in parts])
    for begin, (_, start, scored, _) in zip(bounds, parts):
        targets[begin:begin + scored - start] = [-1] * (scored - start)
    with model.engine.no_grad():
        return sum(cross_entropy(model.logits(inputs, bounds), targets)[1])


def predicted_rows(model: GPT, ids: Sequence[int], stride: int) -> Iterator[Tuple[int, array]]:
    """Yield for each of ids[1:] the layer that speaks and its logits (V,)."""
    for layer, start, scored, end in reading_plan(model, ids, stride):
        voice = model.with_layer(layer) if model.routed else model
        with voice.engine.no_grad():
            logits = voice.logits(ids[start:end])
        for row in range(scored - start, end - start):
            yield layer, logits.row(row)


def bits_per_character(model: GPT, ids: Sequence[int], characters: int, stride: int) -> float:
    """Return total bits of ids[1:] over `characters`; NaN when there is nothing to score."""
    if len(ids) < 2 or not characters:
        return math.nan
    return sum(scored_nats(model, ids, stride)) / math.log(2.0) / characters


def pack_router(router: Router) -> Layer:
    """Return a router's counts as one layer: for each layer its trigrams and how often each."""
    parts = [[b"".join(c).decode("latin-1"), list(c.values())] for c in router.counts]
    return Layer(router.margins, zlib.compress(json.dumps(parts).encode(), 1))


def load_router(tokenizer: EvolvingTokenizer, layer: Layer) -> Router:
    """Return the router that was stored."""
    counts = []
    for joined, often in json.loads(zlib.decompress(layer.data)):
        raw = joined.encode("latin-1")
        counts.append({raw[3 * i:3 * i + 3]: n for i, n in enumerate(often)})
    return Router(tokenizer, counts, layer.manifest)


def trial(engine: Engine) -> List[array]:
    """Return all that comes of a tiny model's step and of the tokens that it then says.

    Every kernel is reached, and in products every kind of block and of rest.
    """
    rng, model = random.Random(1), GPT(Shape(1, 20, 2, 13, 40, 10_000.0, 1e-5), 270, engine, None)

    def some(n: int) -> array:
        return engine.buffer_of([rng.gauss(0.0, 0.3) for _ in range(n)])
    for param in model.trainable():  # livelier than at birth: what is wrong must show
        param.load(some(len(param.data)))
    windows = [[3, 9, 7], [*range(0, 232, 8), 7]]
    made = [engine.buffer_of([_nats_of(model, windows[1], [(0, 0, 3, 29)])])]  # some have no target
    train_step(model, Config(eps_adam=1e-3), windows, 0.1, 0.2, rng)
    made += [numbers for param in model.trainable() for numbers in (param.data, *param.moments)]
    cache, past = model.new_cache(), array("i", [5, 3, 7, 3, 39, 5, 3, 7, 3])
    made += [model.feed(cache, past[:-1]), model.feed(cache, past[-1:])]
    drawn, rounds = engine.buffer(13), engine.buffer(96)
    for i in range(12):
        drawn[i] = engine.sample_token(some(40), 40, some(200), past, len(past), 0.8, 0.5, 2, 3.0,
                                       12, 0.9, 0.02, 0.8, (i + 0.5) / 12)
    drawn[12] = engine.softmax(made[-1], model.vocab_size)
    engine.multiply_adds(rounds, 3, 0.5)
    return [*made, drawn, rounds]


def check_library(path: str) -> None:
    """Try compiled kernels beside their Python.  Raises EngineError when they differ."""
    for mine, plain in zip(trial(NativeEngine(load_kernels(path))), trial(reference_engine())):
        bound = 1e-4 * max(map(abs, plain))
        if not all(abs(a - b) <= bound for a, b in zip(mine, plain)):
            raise EngineError("compiled kernels do not compute what their Python does; "
                              "try another compiler with CC")


# ──────────────────────────────────────────────────────────────────────────────────────
# 11 · EXPERTS — three who guess, and one who weighs them   uses: 0 1 2 4 5 6 7 8 9 10
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Beside the GPT two others expect what comes next: counts of all that was read, which learn a text
# in one reading, and a copyist of the entries at hand. ln p of the mixture is the weighted sum of
# theirs, made to sum to 1; the weights depend on how well each knows the place, and were learned on
# held-out text. What is drawn from it is spoken here.


class Expectation(NamedTuple):
    """What counts expect next: ln p(i) is special[i] or, for any other id, base[i] + shift.

    Where base is empty it is shift alone. reach is the length of the longest context that was
    known, one less than the shortest counted when none was; seen is how much was counted in it.
    """

    reach: int
    seen: int
    base: array
    shift: float
    special: Dict[int, float]

    def log_p(self, token: int) -> float:
        """Return the natural logarithm of an id's probability."""
        if token in self.special:
            return self.special[token]
        return self.shift + (self.base[token] if self.base else 0.0)


# Zipf's law, n(c) ~ 1/(c·(c + 1)): what counts of counts are like where there are few as yet.
TALLY_PRIOR = (30.0, 10.0, 5.0, 3.0)
MANY = 5  # counts from here on need not be told apart
ROW_AGE = 64
ROW_NUMBERS = 700_000    # numbers in all cached rows; a row has one for every id
ID_BYTES = array("I").itemsize


def context_key(ids: Sequence[int]) -> bytes:
    """Return the ids of a context as the key under which its counts stand."""
    return array("I", ids).tobytes()


def followers(found: Any) -> Dict[int, int]:
    """Return the counts of a context, which stands for its one follower met once as that alone."""
    return found if type(found) is dict else {found: 1}


class NgramMemory:
    """Counts of the ids that followed each context of `lowest` to `order` ids: one reading learns.

    An id is counted in the longest context, and in shorter ones only while it is new to the longer
    ("update exclusion"), so that shorter contexts count in how many surroundings an id was met.
    Probabilities are interpolated, p ← p·ΣD/n + (c − D)/n from the shortest context up, with three
    discounts for each order from counts of counts.  An id seen once in a context stands there as
    itself, any other context holds a table: that halves the memory. A context is the bytes of its
    ids, which take three fifths of what a tuple takes.
    Sources: modified Kneser-Ney, Chen and Goodman, TR-10-98, Harvard 1998; update exclusion:
    Moffat, "Implementing the PPM data compression scheme", 1990.
    Measured on 900 KB of plays, order 3: 0.7 µs a character, after 0.2 for the tokenizer.
    """

    def __init__(self, order: int = 3, max_counts: int = 800_000, lowest: int = 0) -> None:
        self.order, self.max_counts, self.lowest = order, max_counts, lowest
        self.tables: List[Dict[bytes, Any]] = [{} for _ in range(order + 1)]
        self.tally = [[0] * (MANY + 1) for _ in range(order + 1)]  # [k][c]: counts of c
        self.size = 0
        self.end: Tuple[int, ...] = (END_OF_TEXT,)  # of all that was read
        self._rows: Dict[bytes, array] = {}
        self._floor: List[float] = []  # p of every id after anything, when size was:
        self._floor_size = 0
        self._lock = threading.Lock()  # one thread may count while another speaks

    def learn(self, ids: Sequence[int], context: Sequence[int] = ()) -> None:
        """Count each of ids after what stands before it, in context for the first of them."""
        with self._lock:
            row = (*context[-self.order:], *ids)
            self._count(row, len(ids))
            for token in row if self._rows else ():
                self._rows.pop(context_key((token,)), None)
            if self.size * ROW_AGE > self._floor_size * (ROW_AGE + 1):
                self._rows.clear()
            if self.size > self.max_counts:
                self._shrink(self.max_counts * 3 // 4)

    def read(self, ids: Sequence[int]) -> None:
        """Count a document after the end of the one that was read before it."""
        self.learn(ids, self.end)
        self.end = (*self.end, *ids)[-self.order:]

    def _count(self, row: Tuple[int, ...], fresh: int) -> None:
        """Count the last so many ids of a row."""
        raw = context_key(row)
        for at in range(len(row) - fresh, len(row)):
            token, end = row[at], at * ID_BYTES
            for k in range(min(self.order, at), self.lowest - 1, -1):
                table, key, tally = self.tables[k], raw[end - k * ID_BYTES:end], self.tally[k]
                found = table.get(key)
                if type(found) is dict:
                    count = found.get(token, 0)
                    found[token] = count + 1
                elif found == token:
                    count, table[key] = 1, {token: 2}
                else:
                    count, table[key] = 0, token if found is None else {found: 1, token: 1}
                if count < MANY:
                    tally[count] -= 1
                    tally[count + 1] += 1
                if count:
                    break
                self.size += 1

    def _shrink(self, goal: int) -> None:
        """Drop contexts, the longest and oldest first, those met once before all others."""
        for once, k in itertools.product((True, False), range(self.order, 0, -1)):
            for key, found in list(self.tables[k].items()):
                if self.size <= goal:
                    return
                if not once or type(found) is int:
                    del self.tables[k][key]
                    self.size -= len(followers(found))
                    for count in followers(found).values():
                        self.tally[k][min(count, MANY)] -= 1

    def discounts(self, k: int) -> Tuple[float, float, float, float]:
        """Return what is taken off counts of 0, 1, 2, and 3 or more in contexts of k ids."""
        n1, n2, n3, n4 = map(add, self.tally[k][1:MANY], TALLY_PRIOR)
        y = n1 / (n1 + 2.0 * n2)
        return (0.0, max(0.05, 1.0 - 2.0 * y * n2 / n1), max(0.05, 2.0 - 3.0 * y * n3 / n2),
                max(0.05, 3.0 - 4.0 * y * n4 / n3))

    def _level(self, k: int, found: Any) -> Tuple[float, Dict[int, float], int]:
        """Return the share left to shorter contexts, each follower's own part, and all counts."""
        counts, off = followers(found), self.discounts(k)
        total = sum(counts.values())
        parts = {token: (count - off[count if count < 3 else 3]) / total
                 for token, count in counts.items()}
        return 1.0 - sum(parts.values()), parts, total

    def _row(self, key: bytes, vocab: int) -> array:
        """Return ln p of every id after a context of at most one id.

        A row is kept until its own counts change; the floor of all rows, ln p after anything, may
        be older by one part in ROW_AGE, for a row takes longer than all else in expecting an id.
        """
        if len(self._rows.get(key, ())) != vocab:
            if key:
                self._row(b"", vocab)
            chances = self._floor if key else [1.0 / vocab] * vocab
            size = len(key) // ID_BYTES
            found = self.tables[size].get(key)
            if found is not None:
                left, parts, _ = self._level(size, found)
                chances = [chance * left for chance in chances]
                for token, part in parts.items():
                    chances[token] += part
            if (len(self._rows) + 1) * vocab > ROW_NUMBERS:
                self._rows.clear()
            if not key:
                self._floor, self._floor_size = chances, self.size
            self._rows[key] = array("f", map(log, chances))
        return self._rows[key]

    def expect(self, history: Tuple[int, ...], vocab: int) -> Expectation:
        """Return what follows history, of all ids below vocab; their probabilities sum to 1."""
        raw, scale = context_key(history), 1.0
        reach, seen, base = self.lowest - 1, 0, array("f")
        special: Dict[int, float] = {}
        with self._lock:
            if not self.lowest:  # what follows one id, or any, stands ready as a row
                key = raw[-ID_BYTES:] if raw[-ID_BYTES:] in self.tables[1] else b""
                reach, base = len(key) // ID_BYTES, self._row(key, vocab)
                seen = sum(followers(self.tables[reach].get(key, {})).values())
            for k in range(reach + 1, min(self.order, len(history)) + 1):
                found = self.tables[k].get(raw[len(raw) - k * ID_BYTES:])
                if found is None:
                    break
                left, parts, seen = self._level(k, found)
                scale, reach = scale * left, k
                special = {token: chance * left for token, chance in special.items()}
                for token, part in parts.items():
                    if token not in special:
                        special[token] = scale * (exp(base[token]) if base else 1 / vocab)
                    special[token] += part
        shift = log(scale) - (0.0 if base else log(vocab))
        return Expectation(reach, seen, base, shift,
                           {token: log(chance) for token, chance in special.items()})


EXPERTS = ("model", "pairs", "phrases", "copy")  # pairs: counts after one id; phrases: after all
COPY_ORDER = 5       # ids that the copyist looks back; what stands longer is found all the same
COPY_COUNTS = 200_000
SEEN_BANDS = 4       # contexts met once to 3 times, to 15, to 63, and more often
SAID_ORDER = 8       # ids before each token said that are kept to find its source
# Where learning begins; a voice that was never fitted speaks with these.
FIRST_WEIGHTS = (0.45, 0.0, 0.4, 0.1)
MIX_RATE = 0.02
CALM_SLOPES = 10.0   # keeps the first steps, with few slopes summed, small
# How much better, in nats, the counts than the model expected what came of late. On three unlike
# texts learned by one base, the worst lost 3.4 % of its voice without these rows, 2.1 % with them.
LEADS = (-0.3, -0.1, 0.1, 0.3)
LEAD_RATE = 0.03     # the weight of the newest id in that


class Mixer:
    """The weights of the experts in every situation, learned online by gradient descent.

    A situation chooses one row of weights by what the counts know, one by what the copyist knows,
    one by who was the better prophet of late, and one by the layer that speaks, so that what is
    fitted for one kind of text leaves others alone; they are added. The loss, −ln p, is convex in
    them, and its slope is, for each expert, what it gives the id that came less what it gives on
    average.
    Sources: products of experts, Hinton, Neural Computation 14 (2002); weight sets chosen by
    context and learned online, Mahoney, "Adaptive weighing of context models for lossless data
    compression", CS-2005-16; step sizes by the slopes so far (AdaGrad), Duchi et al., JMLR 12
    (2011).
    """

    def __init__(self, order: int) -> None:
        self.order = order
        count, self.copy_rows = len(EXPERTS), 1 + (order + 1) * SEEN_BANDS
        self.shared_rows = self.copy_rows + COPY_ORDER + 1 + len(LEADS) + 1
        self.squares = array("d", [0.0]) * (count * (self.shared_rows + 1))
        self.weights = array("d", FIRST_WEIGHTS) * self.copy_rows
        self.weights += self.squares[len(self.weights):]

    def situation(self, counts: Expectation, copy: Expectation, lead: float = 0.0,
                  layer: int = 0) -> Tuple[int, ...]:
        """Return where the rows of weights begin; the last belongs to the layer that speaks."""
        band = min(SEEN_BANDS - 1, (counts.seen.bit_length() - 1) // 2)
        known = 1 + counts.reach * SEEN_BANDS + band if counts.seen else 0
        copied = self.copy_rows + max(0, copy.reach)
        ahead = self.copy_rows + COPY_ORDER + 1 + bisect_left(LEADS, lead)
        own, count = self.shared_rows + layer, len(EXPERTS)
        for numbers in (self.weights, self.squares):
            numbers.extend([0.0] * (count * (own + 1) - len(numbers)))
        return count * known, count * copied, count * ahead, count * own

    def chosen(self, situation: Sequence[int]) -> List[float]:
        """Return the weights of the experts in a situation."""
        rows = [self.weights[start:start + len(EXPERTS)] for start in situation]
        return list(map(sum, zip(*rows)))

    def move(self, situation: Sequence[int], slopes: Sequence[float]) -> None:
        """Move the weights of a situation one step along the slopes of ln p."""
        for start in situation:
            for at, slope in enumerate(slopes, start):
                self.squares[at] += slope * slope
                self.weights[at] += MIX_RATE * slope / sqrt(self.squares[at] + CALM_SLOPES)

    def numbers(self) -> List[float]:
        """Return all that it has learned, to be stored."""
        return [*self.weights, *self.squares]

    def load(self, numbers: Sequence[float]) -> bool:
        """Take what numbers() gave; return False, and change nothing, if it does not fit."""
        half, least = len(numbers) // 2, len(EXPERTS) * self.shared_rows
        if (half < least or len(numbers) % (2 * len(EXPERTS))
                or not all(map(math.isfinite, numbers))):
            return False
        self.weights, self.squares = array("d", numbers[:half]), array("d", numbers[half:])
        return True


class Mixture:
    """The voice at one place in a text: what each expert expects next, and all of them together.

    mix() reads a place; nats(), slopes() and shares() then tell of it, learn() moves the weights.
    """

    def __init__(self, engine: Engine, counts: NgramMemory, mixer: Mixer,
                 texts: Iterable[Sequence[int]] = (), eager: float = 0.0) -> None:
        self.engine, self.counts, self.mixer, self.eager = engine, counts, mixer, eager
        # no counts after nothing: to copy one needs a place to copy from
        self.copy = NgramMemory(COPY_ORDER, COPY_COUNTS, lowest=1)
        for ids in texts:
            self.copy.learn(ids)
        self.own_layer: Optional[int] = None  # the one layer whose own weights alone may move
        self.layer, self.lead, self.weights = 0, 0.0, [0.0] * len(EXPERTS)
        self.situation: Tuple[int, ...] = ()
        self.logits = self.blend = self.chances = engine.buffer(0)
        self.heard = Expectation(-1, 0, engine.buffer(0), 0.0, {})
        # what phrases give the few ids that they know beyond what pairs do, and the copyist its own
        self._few: Tuple[Dict[int, float], Dict[int, float]] = {}, {}

    def mix(self, logits: array, history: Tuple[int, ...]) -> array:
        """Return the mixture's ln p (V,), less a constant, after history; logits are the model's.

        The array is the caller's until the next call.
        """
        add_scaled, vocab = self.engine.add_scaled, len(logits)
        self._look_back(history)
        counts, copied = self.counts.expect(history, vocab), self.copy.expect(history, vocab)
        self.situation = self.mixer.situation(counts, copied, self.lead, self.layer)
        self.weights = self.mixer.chosen(self.situation)
        self.weights[-1] += self.eager
        model, pairs, phrases, copy = self.weights
        blend, base = self.engine.buffer(vocab), counts.base
        add_scaled(logits, blend, vocab, model)
        add_scaled(base, blend, vocab, pairs + phrases)
        self._few = ({i: x - base[i] - counts.shift for i, x in counts.special.items()},
                     {i: x - copied.shift for i, x in copied.special.items()})
        for weight, few in zip((phrases, copy), self._few):
            for i, x in few.items():
                blend[i] += weight * x
        self.logits, self.blend, self.heard = logits, blend, counts
        return blend

    def begin(self, layer: int) -> None:
        """Begin a text that this layer reads: nothing has come yet."""
        self.layer, self.lead, self.logits = layer, 0.0, self.logits[:0]

    def _look_back(self, history: Tuple[int, ...]) -> None:
        """Note who expected better what came after the place that was mixed last."""
        if history and self.logits:
            whole = self.engine.softmax(self.logits[:], len(self.logits))
            ahead = self.heard.log_p(history[-1]) + whole - self.logits[history[-1]]
            self.lead += LEAD_RATE * (ahead - self.lead)

    def nats(self, token: int) -> float:
        """Return −ln p of the id that came."""
        self.chances = self.blend[:]
        return self.engine.softmax(self.chances, len(self.chances)) - self.blend[token]

    def _given(self, token: int) -> List[float]:
        """Return the parts of an id's ln p by the experts: phrases give what they add to pairs."""
        return [self.logits[token], self.heard.base[token],
                *(few.get(token, 0.0) for few in self._few)]

    def _raised(self, token: int, less: Iterable[float]) -> List[float]:
        """Return what each expert gives the id beyond those parts of another, or on average."""
        model, pairs, more, copy = (x - y for x, y in zip(self._given(token), less))
        return [model, pairs, pairs + more, copy]

    def slopes(self, token: int) -> List[float]:
        """Return what each expert's ln p gives the id, less what it gives on average.

        The average is over the mixture's own chances, so constants of an expert do not count.
        """
        chances, dot = self.chances, self.engine.dot
        return self._raised(token, [
            *(dot(chances, row, len(chances)) for row in (self.logits, self.heard.base)),
            *(sum(chances[i] * x for i, x in few.items()) for few in self._few)])

    def shares(self, token: int) -> List[float]:
        """Return how many nats each expert, by its weight, raised the id over its likeliest rival.

        They add up to ln p of the id less ln p of the most likely other one.
        """
        others = self.blend[:]
        others[token] = -math.inf
        rival = others.index(max(others))
        return list(map(mul, self.weights, self._raised(token, self._given(rival))))

    def learn(self, token: int) -> None:
        """Move the weights towards the id that came, of which nats() was asked before."""
        if self.own_layer is None:
            self.mixer.move(self.situation, self.slopes(token))
        elif self.own_layer == self.layer:
            self.mixer.move(self.situation[-1:], self.slopes(token))


def read_through(model: GPT, ids: Sequence[int], still: Mixture, live: Mixture,
                 fit: bool = False) -> Iterator[Tuple[float, float, float, float]]:
    """Yield nats for each of ids[1:]: of the model, the counts, the voice, and one that learns.

    The one that learns, live, moves its weights and copies from what was read. With fit the other,
    still, moves its weights as well; they may share a mixer.
    """
    softmax, vocab = model.engine.softmax, model.vocab_size
    rows = predicted_rows(model, ids, model.shape.block_size // 2)
    for at, (layer, logits) in enumerate(rows, 1):
        still.layer = live.layer = layer
        history, token = tuple(ids[max(0, at - SAID_ORDER):at]), ids[at]
        alone = softmax(logits[:], vocab) - logits[token]
        still.mix(logits, history)
        nats, counted = still.nats(token), -still.heard.log_p(token)
        if fit:
            still.learn(token)
        live.mix(logits, history)
        learning = live.nats(token)
        live.learn(token)
        live.copy.learn((token,), history)
        yield alone, counted, nats, learning


def pack_mixer(mixer: Mixer, probes: Iterable[str] = ()) -> Layer:
    """Return a mixer's weights as a layer whose manifest names the probes that fitted them."""
    return Layer({"experts": EXPERTS, "order": mixer.order, "probes": sorted(probes)},
                 float_bytes(array("f", mixer.numbers())))


def load_mixer(config: Config, layer: Optional[Layer]) -> Mixer:
    """Return the mixer that was fitted, or a fresh one where none fits these settings."""
    mixer = Mixer(config.ngram_order)
    if layer is not None and layer.manifest["order"] == mixer.order:
        mixer.load(floats_of(layer.data))
    return mixer


class Said(NamedTuple):
    """One token of a reply: the ids before it, itself, and each expert's share in nats."""

    before: Tuple[int, ...]
    token: int
    shares: Tuple[float, ...]


def spoken(model: GPT, tokenizer: EvolvingTokenizer, ids: Sequence[int], config: Config,
           rng: random.Random, mixture: Optional[Mixture] = None,
           trace: Optional[List[Said]] = None, free_tokens: int = 0) -> Iterator[str]:
    """Yield the voice's continuation of ids, piece by piece, up to the end of its line or text.

    With free_tokens it goes on through both for so many tokens. Without a mixture the model
    speaks alone; with one, what moved each token goes into trace.
    """
    # What was said so far calls for a layer, which speaks to the end.
    speaker, cache, decoder = model.speaker(ids), model.new_cache(), StreamDecoder(tokenizer)
    if mixture is not None:
        mixture.begin(speaker.layer)
    history, fresh = array("i", ids), list(ids)
    for said in range(free_tokens or config.max_gen_tokens):
        logits, before = speaker.feed(cache, fresh), tuple(history[-SAID_ORDER:])
        if mixture is not None:
            logits = mixture.mix(logits, before)
        if not (said or free_tokens):
            logits[END_OF_TEXT] = -math.inf  # whoever is asked says something
        token = draw_token(logits, history, config, rng, model.engine)
        if token == END_OF_TEXT:
            text = decoder.flush() + "\n"
        else:
            text = tidied(decoder.feed(token))
            if mixture is not None and trace is not None:
                trace.append(Said(before, token, tuple(mixture.shares(token))))
        shown, ended, _ = (text, "", "") if free_tokens else text.partition("\n")
        if shown:
            yield shown
        if ended:
            return
        history.append(token)
        fresh = [token]
    yield from filter(None, [decoder.flush()])


def reply_nats(model: GPT, before: Sequence[int], said: Sequence[int],
               stop: int = END_OF_TEXT) -> List[Tuple[float, float]]:
    """Return −ln p, by the model alone, of each id said after others, and of a stop in its place.

    They are as many as the window has.
    """
    ids = [*before, *said][-model.shape.block_size:]
    newest = ids[-len(said):] if len(said) < len(ids) else ids[1:]
    logits, nats = model.newest_logits(ids[:-1], len(newest)), []
    for row, token in enumerate(newest):
        scores = logits.row(row)
        whole = model.engine.softmax(scores[:], model.vocab_size)
        nats.append((whole - scores[token], whole - scores[stop]))
    return nats


def flows_of(model: GPT, prompt: Sequence[int], bare: Sequence[int], said: Sequence[int],
             ends: Sequence[int]) -> List[float]:
    """Return how well ids follow a prompt up to each end, where the last of them would be said.

    In nats a token: fluent, owed to the prompt, nowhere broken. What would be said to anything
    counts less (maximum mutual information, Li et al., arXiv:1510.03055), and so does what holds
    one surprise, however smooth the rest.
    """
    said = said[:model.shape.block_size - 1]
    asked, alone = (reply_nats(model, before, said, said[-1]) for before in (prompt, bare))
    flows = []
    for end in (min(end, len(said) - 1) for end in ends):
        nats, apart = ([*(own for own, _ in row[:end]), row[end][1]] for row in (asked, alone))
        worst = max(map(add, nats, nats[1:]), default=0.0) / 2.0
        mean = sum(nats) / len(nats)
        flows.append(MUTUAL * (sum(apart) / len(apart) - mean) - mean - WORST * worst)
    return flows


MUTUAL = 0.5  # in how ids flow: that they are owed to the prompt
WORST = 0.2   # their greatest surprise


# A generation is one tokenizer, one base, the deltas appended to it, their router and mixture; its
# growth says how far it has come.

@dataclass
class Growth:
    """How far a generation has come; kept beside its layers."""

    generation: int = 1
    phase: str = "newborn"            # newborn, warmup (while its base learns), grown
    step: int = 0                     # steps of the whole life
    tokens: int = 0                   # tokens trained on in the whole life
    first_token: int = 0              # of those, how many before this generation
    warmup_step: int = 0              # steps of its birth
    warmup_chars: int = 0             # size of the text that its base has read
    warmup_seconds: float = 0.0       # how long its birth took
    newest_id: int = 0                # newest entry that the birth takes; 0: whatever comes
    later_chars: int = 0              # characters that its deltas have read
    delta_chars: int = 0              # new characters the active delta has taken
    bpc: Optional[float] = None       # held-out bits per character, last seen
    best_bpc: Optional[float] = None  # and the best of its birth
    lowest_bpc: Optional[float] = None  # and the lowest before its rate falls
    stale: int = 0                    # evaluations since that
    cooling_step: int = 0             # step of the birth from which its rate falls; 0: not yet
    probes: Dict[str, float] = field(default_factory=dict)  # each probe's bits, last seen
    best_probes: Dict[str, float] = field(default_factory=dict)  # and its best

    @classmethod
    def of(cls, stored: Dict[str, Any]) -> "Growth":
        """Return what was stored, also by a version that knew other fields."""
        known = dataclasses.asdict(cls())
        kind = {name: (type(value) if isinstance(value, (dict, str)) else (int, float, type(None)))
                for name, value in known.items()}
        return cls(**{name: value for name, value in stored.items()
                      if name in known and isinstance(value, kind[name])})

    def heir(self, generation: int) -> "Growth":
        """Return how far the next generation has come when it begins."""
        return Growth(generation, step=self.step, tokens=self.tokens, first_token=self.tokens,
                      warmup_chars=self.warmup_chars)

    def take_probes(self, losses: Dict[str, float], before: "Growth") -> None:
        """Take each probe's bits, and remember the best that was ever seen, also before."""
        self.probes, self.best_probes = losses, {
            name: min(bpc, before.best_probes.get(name, bpc)) for name, bpc in losses.items()}

    def delta_is_full(self, config: Config) -> bool:
        """Return whether the active delta is to be sealed before the next burst."""
        return self.delta_chars >= config.delta_seal_chars


def delta_names(layers: Iterable[str]) -> List[str]:
    """Return the names of the deltas among layers, oldest first: delta 1 is layer 1, and so on.

    Each is learned on those before it, so that behind a gap there are none.
    """
    names = (f"delta{number}" for number in itertools.count(1))
    return list(itertools.takewhile({*layers}.__contains__, names))


def build_model(config: Config, layers: Dict[str, Layer], engine: Engine,
                prefer_best: bool = False) -> Tuple[EvolvingTokenizer, GPT]:
    """Return the tokenizer and the model that the layers describe, or newborn ones.

    Raises StoreError when the layers were made for another shape of model.
    """
    tokenizer = (EvolvingTokenizer.unpack(layers["tokenizer"].data) if "tokenizer" in layers
                 else EvolvingTokenizer())
    base = layers.get("best" if prefer_best and "best" in layers else "base")
    model = GPT(Shape.of(config), tokenizer.vocab_size, engine, None)  # a birth draws its own
    if base is not None:
        load_params(list(model.params.values()), base)
    for name in delta_names(layers):
        model.append_delta(layers[name].manifest[0][1], None)
        load_params(delta_matrices(model.deltas[-1]), layers[name])
    if "router" in layers:
        model.router = load_router(tokenizer, layers["router"])
    return tokenizer, model


# sentence vectors: what is said lies near what wants a like answer


EAR_FEATURES = 8192   # buckets of hashed words, pairs of words, and four letters in a row
EAR_DIM = 64
EAR_LEAST = 64        # sayings, below which there is nothing to learn from
EAR_EPOCHS = 12       # with compiled kernels: 18,000 sayings in 7 s; one without
EAR_BATCH = 256       # exchanges; each answer is to be told from those of all the others
EAR_RATE = 4e-3
EAR_SHARPNESS = 12.0  # of the cosines, before the softmax
EAR_DROP = 0.2        # share of the features of a saying that is not shown


def features_of(text: str) -> array:
    """Return the features of a text: its words, pairs of them, four letters in a row, hashed."""
    words = folded_words(text)
    parts = [*words, *map(" ".join, zip(words, words[1:]))]
    parts += [f"<{word}>"[i:i + 4] for word in words for i in range(len(word) - 1)]
    return array("i", [zlib.crc32(part.encode()) % EAR_FEATURES for part in parts] or [0])


class Ear:
    """Sentence vectors, learned by telling the answers of exchanges from one another.

    A text is the sum of its features' vectors, then one linear map for what is said and another
    for answers, of length 1. Source: contrast within a batch, CPC, arXiv:1807.03748.
    """

    def __init__(self, engine: Engine, rng: Optional[random.Random]) -> None:
        self.engine, calm = engine, EAR_DIM ** -0.5
        forms = (("ear", EAR_FEATURES, 0.1), ("ear.said", EAR_DIM, calm),
                 ("ear.answered", EAR_DIM, calm))
        self.params = [MatrixParam.normal(engine, name, rows, EAR_DIM, sigma, rng)
                       for name, rows, sigma in forms]

    def _number(self, x: float) -> VectorValue:
        return VectorValue(self.engine, 1, 1, self.engine.buffer_of([x]))

    def _vectors(self, texts: Sequence[Sequence[int]], use: int) -> VectorValue:
        ids = array("i", itertools.chain.from_iterable(texts))
        owners = array("i", [at for at, features in enumerate(texts) for _ in features])
        return rmsnorm(linear(pooled(embed(ids, self.params[0]), owners, len(texts)),
                              self.params[use]))

    def learn(self, pairs: Sequence[Tuple[str, str]], config: Config, rng: random.Random) -> None:
        """Read (saying, answer) pairs several times."""
        known = [(features_of(said), features_of(answer)) for said, answer in pairs]
        epochs = EAR_EPOCHS if self.engine.is_fast else 1
        steps = epochs * (-(-len(known) // EAR_BATCH))
        sharpness = self._number(EAR_SHARPNESS / EAR_DIM)
        for step in range(steps):
            batch = rng.sample(known, min(EAR_BATCH, len(known)))
            said = self._vectors([[f for f in features if rng.random() >= EAR_DROP] or features
                                  for features, _ in batch], 1)
            answered = self._vectors([features for _, features in batch], 2)
            pair = (said, answered) if step % 2 else (answered, said)
            loss, _ = cross_entropy(scaled(linear(*pair), sharpness), range(len(batch)))
            backward(loss)
            descend(self.params, scheduled_rate(EAR_RATE, step / steps, 0.1), config)

    def heard(self, texts: Sequence[str]) -> array:
        """Return the vectors (T, EAR_DIM) of what is said, of length 1, one after another."""
        out, unit = self.engine.buffer(0), self._number(EAR_DIM ** -0.5)
        for at in range(0, len(texts), EAR_BATCH):
            part = list(map(features_of, texts[at:at + EAR_BATCH]))
            out.extend(scaled(self._vectors(part, 1), unit).data)
        return out


def sayings_of(text: str) -> List[Tuple[int, str, str]]:
    """Return (place, saying, answer) of each saying in an exchange; none for a passage."""
    turns = Document(tuple(text.splitlines()), True).turns()
    return [(place, said, answer) for place, ((asker, said), (teller, answer))
            in enumerate(zip(turns, turns[1:])) if (asker, teller) == ("H", "A") and answer]


def learned_ear(engine: Engine, texts: Sequence[Tuple[int, str]], config: Config,
                rng: random.Random) -> Optional[Layer]:
    """Return sentence vectors learned from (key, text) documents, with those of all sayings."""
    found = [(key, *said) for key, text in texts for said in sayings_of(text)]
    if len(found) < EAR_LEAST:
        return None
    ear = Ear(engine, rng)
    ear.learn([(said, answer) for _, _, said, answer in found], config, rng)
    vectors = ear.heard([said for _, _, said, _ in found])
    places = array("q", itertools.chain.from_iterable((key, place) for key, place, _, _ in found))
    numbers = b"".join(float_bytes(param.data) for param in ear.params) + float_bytes(vectors)
    return Layer({"sayings": len(found)}, numbers + places.tobytes())


class Sayings:
    """All that was said to it in exchanges, as sentence vectors: it finds what is like a text."""

    def __init__(self, engine: Engine, layer: Layer, mark: Any = None) -> None:
        count, self.engine, self.mark = layer.manifest["sayings"], engine, mark
        self.ear, self.places = Ear(engine, None), array("q", layer.data[-16 * count:])
        self.vectors = fill(self.ear.params, floats_of(layer.data[:-16 * count]))

    def like(self, text: str, count: int = 30) -> List[Tuple[float, int, int]]:
        """Return (cosine, key of the document, place in it) of the sayings most like a text."""
        rows = len(self.places) // 2
        out = self.engine.buffer(rows)
        self.engine.row_product(self.vectors, self.ear.heard([text]), 0, out, 0, rows, EAR_DIM)
        best = heapq.nlargest(count, range(rows), key=out.__getitem__)
        return [(out[i], self.places[2 * i], self.places[2 * i + 1]) for i in best]


# ──────────────────────────────────────────────────────────────────────────────────────
# 12 · MEMORY — one file; copy it and you copied the being   uses: 0 1 7 11
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Everything that must outlive the process is in one SQLite file with a rollback journal: what was
# said, what was read, what was learned. A commit is one transaction, a blob carries its checksum,
# and a sealed layer is a row that the database itself refuses to rewrite.

MIGRATIONS: Tuple[str, ...] = (
    # 1: the first life
    """
    CREATE TABLE sessions (
        id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, started_at REAL NOT NULL);
    CREATE TABLE messages (
        id INTEGER PRIMARY KEY, session_id INTEGER NOT NULL REFERENCES sessions(id),
        role TEXT NOT NULL CHECK (role IN ('owner', 'self')), text TEXT NOT NULL,
        said_at REAL NOT NULL, verdict INTEGER NOT NULL DEFAULT 0);
    CREATE INDEX messages_of_session ON messages(session_id, id);
    CREATE TABLE entries (
        id INTEGER PRIMARY KEY, source TEXT NOT NULL, key INTEGER NOT NULL, text TEXT NOT NULL,
        words TEXT NOT NULL, session_id INTEGER REFERENCES sessions(id), told_at REAL NOT NULL,
        closed INTEGER NOT NULL DEFAULT 1, recall INTEGER NOT NULL DEFAULT 1, held_out INTEGER
        NOT NULL DEFAULT 0, learned INTEGER NOT NULL DEFAULT 0, UNIQUE (source, key));
    CREATE INDEX entries_unlearned ON entries(learned) WHERE learned = 0;
    CREATE TABLE probes (key INTEGER PRIMARY KEY, epoch INTEGER NOT NULL);
    CREATE TABLE layers (
        name TEXT PRIMARY KEY, sealed INTEGER NOT NULL DEFAULT 0, manifest TEXT NOT NULL,
        checksum INTEGER NOT NULL, data BLOB NOT NULL, saved_at REAL NOT NULL);
    CREATE TRIGGER sealed_layers_stay BEFORE UPDATE ON layers WHEN old.sealed
        BEGIN SELECT RAISE(ABORT, 'a sealed layer is never rewritten'); END;
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    CREATE TABLE progress (
        id INTEGER PRIMARY KEY, at REAL NOT NULL, step INTEGER NOT NULL, tokens INTEGER NOT NULL,
        loss REAL, held_out_bpc REAL);
    CREATE TABLE life (
        id INTEGER PRIMARY KEY, at REAL NOT NULL, event TEXT NOT NULL, detail TEXT NOT NULL);
    """,
    # 2: how far a message has come; what was said before this counts as taken in, lest what was
    # forgotten come back
    """
    ALTER TABLE messages ADD COLUMN stage INTEGER NOT NULL DEFAULT 0;
    UPDATE messages SET stage = 1;
    CREATE INDEX messages_heard ON messages(id) WHERE stage = 0;
    CREATE INDEX messages_of_prompt ON messages(session_id, id) WHERE stage < 3;
    """,
    # 3: which layer first read an entry (0 the base, n+1 delta n), and what layers are to unlearn
    """
    ALTER TABLE entries ADD COLUMN trained INTEGER;
    UPDATE entries SET trained = 0 WHERE NOT held_out AND EXISTS (SELECT 1 FROM layers);
    CREATE TABLE unlearning (
        key INTEGER PRIMARY KEY, trained INTEGER NOT NULL, chars INTEGER NOT NULL,
        corrected INTEGER NOT NULL);
    """,
    # 4: layers are numbered by their place, 0 the base; generations. `layer` is the last one that
    # read an entry, `trained` the first that read words of it. The base is carried over, with what
    # was folded into it; what its deltas knew is learned again, a base being rebuilt is reborn. A
    # trigger of 3 that is replaced here is no longer made there.
    """
    ALTER TABLE entries ADD COLUMN layer INTEGER;
    ALTER TABLE entries ADD COLUMN training INTEGER NOT NULL DEFAULT 1;
    UPDATE entries SET layer = 0 WHERE learned = 1;
    UPDATE entries SET trained = 0 WHERE trained <= (SELECT
        coalesce(min(CAST(substr(name, 6) AS INTEGER)), 1 << 30) FROM layers
        WHERE name LIKE 'delta%');
    UPDATE entries SET trained = NULL WHERE trained > 0;
    UPDATE unlearning SET trained = 0 WHERE trained <= (SELECT
        coalesce(min(CAST(substr(name, 6) AS INTEGER)), 1 << 30) FROM layers
        WHERE name LIKE 'delta%');
    DELETE FROM unlearning WHERE trained > 0;
    DROP INDEX entries_unlearned;
    CREATE INDEX entries_unread ON entries(source)
        WHERE layer IS NULL AND training AND NOT held_out;
    CREATE INDEX entries_training ON entries(id, key, layer, held_out) WHERE training;
    INSERT OR REPLACE INTO unlearning(key, trained, chars, corrected)
        SELECT 0, 0, 1, 0 FROM layers WHERE name = 'old.base';
    DELETE FROM layers WHERE name NOT LIKE 'old.%' AND EXISTS
        (SELECT 1 FROM layers WHERE name = 'old.base');
    UPDATE settings SET value = (SELECT value FROM settings WHERE name = 'old_growth')
        WHERE name = 'growth' AND EXISTS (SELECT 1 FROM layers WHERE name = 'old.base');
    DELETE FROM layers WHERE name LIKE '%delta%' OR name LIKE '%fold%' OR name LIKE '%router'
        OR name LIKE '%mixer' OR name LIKE '%sprout' OR name LIKE '%ngrams';
    UPDATE layers SET name = substr(name, 5) WHERE name LIKE 'old.%';
    DELETE FROM settings WHERE name IN ('next_shape', 'unlearning', 'old_growth');
    ALTER TABLE unlearning ADD COLUMN unborn INTEGER NOT NULL DEFAULT 0;
    DROP TRIGGER IF EXISTS told_and_taken;
    CREATE TRIGGER told_and_taken AFTER DELETE ON entries
        WHEN old.source != 'corpus' AND (old.trained IS NOT NULL OR EXISTS
            (SELECT 1 FROM settings WHERE name = 'rebirth')) BEGIN
        INSERT INTO unlearning(key, trained, chars, corrected, unborn)
        VALUES (old.key, coalesce(old.trained, 1 << 30), length(old.text), 0,
                EXISTS (SELECT 1 FROM settings WHERE name = 'rebirth'))
        ON CONFLICT(key) DO UPDATE SET trained = min(trained, excluded.trained),
                                       unborn = max(unborn, excluded.unborn); END;
    DROP TRIGGER IF EXISTS taken_from_entries;
    CREATE TRIGGER taken_from_entries AFTER DELETE ON entries BEGIN
        INSERT INTO settings(name, value) VALUES ('entries_taken', '1')
        ON CONFLICT(name) DO UPDATE SET value = CAST(value AS INTEGER) + 1; END;
    """,
    # 5: the statement that one leans on ("She teaches."), the day on which it was told, as days go
    # there, and the days that it names
    """
    ALTER TABLE entries ADD COLUMN about TEXT NOT NULL DEFAULT '';
    ALTER TABLE entries ADD COLUMN days TEXT NOT NULL DEFAULT '';
    CREATE INDEX entries_told ON entries(told_at) WHERE source IN ('chat', 'taught');
    """,
    # 6: every text carries a checksum, as every layer does
    """
    ALTER TABLE messages ADD COLUMN checksum INTEGER;
    ALTER TABLE entries ADD COLUMN checksum INTEGER;
    UPDATE messages SET checksum = crc32(CAST(text AS BLOB));
    UPDATE entries SET checksum = crc32(CAST(text || words AS BLOB));
    """,
    # 7: a checksum is of all that never changes in a row
    """
    ALTER TABLE progress ADD COLUMN checksum INTEGER;
    ALTER TABLE life ADD COLUMN checksum INTEGER;
    UPDATE progress SET checksum = crc32(at, step, tokens, loss, held_out_bpc);
    UPDATE life SET checksum = crc32(at, event, detail);
    UPDATE messages SET checksum = crc32(CAST(text AS BLOB), role, said_at)
        WHERE checksum = crc32(CAST(text AS BLOB));
    DROP TRIGGER sealed_layers_stay;
    UPDATE layers SET checksum = crc32(data, manifest) WHERE checksum = crc32(data);
    CREATE TRIGGER sealed_layers_stay BEFORE UPDATE ON layers WHEN old.sealed
        BEGIN SELECT RAISE(ABORT, 'a sealed layer is never rewritten'); END;
    """,
)

# What a store must have: the columns of its tables, and its triggers and indexes as they are made.
# The full-text index has its own look, and may not be there.
PARTS = """
    SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c
        WHERE t.type = 'table' AND t.name NOT LIKE 'entries_%'
    UNION ALL SELECT name, sql FROM sqlite_master
        WHERE type != 'table' AND sql NOT LIKE '%entries_fts%'
"""

# What the checksum of a row is of; a layer's is looked at where it is asked which are lost.
SUMMED_UP = {"messages": "text role said_at", "entries": "text words",
             "progress": "at step tokens loss held_out_bpc", "life": "at event detail"}

# The stages of a message: stored; its facts are entries; a line of the session's summary; out of
# the prompt for good. It only goes forward, and its words are copied nowhere: what is forgotten is
# gone from the summary, and a turn that was summed up is not met a second time.
HEARD, KEPT, SUMMED, ARCHIVED = range(4)

FULL_TEXT = """
    CREATE VIRTUAL TABLE IF NOT EXISTS entries_fts USING fts5(
        words, content='entries', content_rowid='id',
        tokenize="unicode61 remove_diacritics 0 tokenchars '_'");
    CREATE VIRTUAL TABLE IF NOT EXISTS entries_words USING fts5vocab('entries_fts', 'row');
    CREATE TRIGGER IF NOT EXISTS entries_added AFTER INSERT ON entries BEGIN
        INSERT INTO entries_fts(rowid, words) VALUES (new.id, new.words); END;
    CREATE TRIGGER IF NOT EXISTS entries_removed AFTER DELETE ON entries BEGIN
        INSERT INTO entries_fts(entries_fts, rowid, words)
        VALUES ('delete', old.id, old.words); END;
    CREATE TRIGGER IF NOT EXISTS entries_changed AFTER UPDATE OF words ON entries BEGIN
        INSERT INTO entries_fts(entries_fts, rowid, words) VALUES ('delete', old.id, old.words);
        INSERT INTO entries_fts(rowid, words) VALUES (new.id, new.words); END;
    INSERT INTO entries_fts(entries_fts, rank) VALUES ('automerge', 2);
"""
NO_FULL_TEXT = """
    DROP TRIGGER IF EXISTS entries_added;
    DROP TRIGGER IF EXISTS entries_removed;
    DROP TRIGGER IF EXISTS entries_changed;
    DROP TABLE IF EXISTS entries_words;
    DROP TABLE IF EXISTS entries_fts;
"""


SQL_ERRORS = (sqlite3.Error, UnicodeDecodeError)  # a damaged schema breaks even its complaint
MAX_LIKE_FORMS = 900  # SQLite takes expressions of up to 1,000 levels
MERGED_PAGES = 200    # of the full-text index at a time: 20 ms
TOLD = ("chat", "taught")
GREETING_CHARS = 12  # of a first message that is no title
WORDS_MARK = "_words_"  # a word of every entry with lines of word knowledge
TOLD_MARK = "_told_"  # a word of every statement of the owner, found fast among millions of others


class Entry(NamedTuple):
    """Something read or told: one document of the long-term memory."""

    id: int
    source: str
    key: int
    text: str
    told_at: float
    closed: bool
    recall: bool
    held_out: bool
    layer: Optional[int]
    about: str = ""  # the statement that it leans on
    days: str = ""   # "2026-05-03 2026-05-04..2026-05-04": when it was told, and what days it names


class Message(NamedTuple):
    """Something said in a session, by "owner" or "self"; stage says how far it has come."""

    id: int
    session_id: int
    role: str
    text: str
    said_at: float
    verdict: int
    stage: int


APPLICATION_ID = 0x4D475054  # "MGPT": whose file this is
NEXT = "next."   # begins the names of the layers of a generation that is not born yet
NAMED = "typeof(name) = 'text'"  # of a layer; any other name is damaged
NOBODY = 1 << 30  # the number of a layer that there never is
LISTED = "SELECT value FROM json_each(?)"  # a variable that is a list, however long


class Memory:
    """The organism's file.  Safe to use from several threads; every method raises StoreError.

    What is only to be read is neither made nor changed; an older version of it is read in a copy.
    """

    def __init__(self, path: str, clock: Callable[[], float] = time.time, *,
                 writable: bool = True) -> None:
        self.path, self.clock, self.writable = path, clock, writable
        self._lock = threading.RLock()
        self._depth = 0  # of transactions; SQLite may hold one whose rollback has failed
        with _told(path, OSError):
            _judge_file(path)
            self._db = _connect(path) if writable else _connect_to_read(path)
            try:
                with self.transaction() if writable else contextlib.nullcontext():
                    self._migrate()
            except BaseException:
                self.close()
                raise

    def _migrate(self) -> None:
        """Bring the file to the newest schema; each migration runs once, in order."""
        version = self._one("PRAGMA user_version")
        if version > len(MIGRATIONS):
            raise StoreError(f"{self.path} is of version {version}, this program knows versions up "
                             f"to {len(MIGRATIONS)}; use a newer macrogpt.py or another --db")
        for number in range(version, len(MIGRATIONS)):
            for statement in _statements(MIGRATIONS[number]):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {number + 1}")
        if self._one("PRAGMA application_id") != APPLICATION_ID:
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        self.has_fts = self._prepare_full_text()

    def _prepare_full_text(self) -> bool:
        """Create the full-text index where it is missing; False where SQLite has no FTS5.

        There the triggers go, lest they fail; where they are missing, the index is built anew.
        """
        try:
            if not self._index_answers():
                self.build_index()
            return True
        except StoreError as error:
            if not self.writable:  # a report mends nothing, and searches as without an index
                return False
            if "fts5" not in str(error):
                raise
            for statement in list(_statements(NO_FULL_TEXT))[:3]:
                self._rows(statement)
            return False

    def _index_answers(self) -> bool:
        """Return whether the full-text index and its triggers are there and can be opened."""
        try:
            self._rows("SELECT 1 FROM entries_fts LIMIT 1")
        except StoreError as error:
            if "fts5" in str(error):  # there is no such module
                raise
            return False
        return bool(self._rows("SELECT 1 FROM sqlite_master WHERE name = 'entries_added'"))

    def build_index(self) -> None:
        """Build the full-text index anew: all that is in it stands in the entries."""
        with self.transaction():
            with contextlib.suppress(StoreError):  # what is damaged cannot be dropped
                self._rows("INSERT OR REPLACE INTO entries_fts_data VALUES "
                           "(1, x''), (10, x'00000000000000')")
            for statement in _statements(NO_FULL_TEXT + FULL_TEXT):
                self._rows(statement)
            self._rows("INSERT INTO entries_fts(entries_fts) VALUES ('rebuild')")

    def merge_index(self, between: Callable[[], Any] = lambda: None) -> None:
        """Make one part of the full-text index's many, some pages at a time.

        A word is looked for in each part: in twenty, a search takes six times as long as in one.
        The one part holds no word of what was removed.
        """
        pages, changed = -MERGED_PAGES, 2
        while self.has_fts and changed > 1:  # a merge that finds nothing to do changes one row
            with self.transaction():
                before = self._db.total_changes
                self._rows("INSERT INTO entries_fts(entries_fts, rank) VALUES ('merge', ?)", pages)
                changed, pages = self._db.total_changes - before, MERGED_PAGES
            between()

    def mending(self, work: Callable[[], Any]) -> Any:
        """Return what work does; where it meets a damaged index, that is built anew first."""
        try:
            return work()
        except StoreDamaged:
            with self._lock:
                if self._depth:  # whoever began the transaction comes back, and begins again
                    raise
                self.build_index()
            return work()

    def close(self) -> None:
        """Close the file; nothing is pending, for every change was its own transaction."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything inside one commit, or nothing of it.  May be nested."""
        with self._lock, _told(self.path):
            outermost, self._depth = self._depth == 0, self._depth + 1
            try:
                if outermost:
                    if self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                    self._revive()
                    self._db.execute("BEGIN IMMEDIATE")
                yield
                if outermost:
                    self._db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(*SQL_ERRORS):  # what went wrong first is what is told
                    if outermost and self._db.in_transaction:
                        self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def _revive(self) -> None:
        """Write the file anew from the open connection when somebody has removed it."""
        if self.path != ":memory:" and not os.path.exists(self.path):
            with _told(self.path, OSError):
                anew = _connect(self.path)
            self._db.backup(anew)
            self._db.close()
            self._db = anew

    def _rows(self, sql: str, *values: Any) -> List[Any]:
        """Run one statement and return its rows."""
        with self._lock, _told(self.path):
            return self._db.execute(sql, values).fetchall()

    def _one(self, sql: str, *values: Any) -> Any:
        """Return the first column of the first row, or None."""
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    def _write(self, sql: str, *values: Any) -> int:
        """Run one statement that changes something; return the id of the row that it added."""
        with self.transaction():
            return self._db.execute(sql, values).lastrowid or 0

    def _add(self, table: str, if_there: str = "", **row: Any) -> int:
        """Add a row, with the checksum of what never changes in it; return its id."""
        # not by SQLite, which drops what a signal raises within a function that it calls
        row["checksum"] = _crc32(*(row[name] for name in SUMMED_UP[table].split()))
        return self._write(f"INSERT INTO {table}({', '.join(row)}) VALUES "
                           f"({', '.join('?' * len(row))}) {if_there}", *row.values())

    # sessions and messages

    def session_id(self, name: str) -> int:
        """Return the id of the session of that name, which is made when it is new."""
        with self.transaction():
            self._rows("INSERT OR IGNORE INTO sessions(name, started_at) VALUES (?, ?)",
                       name, self.clock())
            return self._one("SELECT id FROM sessions WHERE name = ?", name)

    def sessions(self) -> List[Dict[str, Any]]:
        """Return every session with its name, start, last word, count of messages and title.

        The title is the first that its owner said, or the first that is more than a greeting.
        """
        keys = ("name", "started_at", "last_at", "messages", "title")
        title = ("SELECT CAST(text AS TEXT) FROM messages WHERE session_id = s.id AND role = "
                 f"'owner' ORDER BY length(text) <= {GREETING_CHARS}, id LIMIT 1")
        return [dict(zip(keys, row)) for row in self._rows(
            f"SELECT s.name, s.started_at, max(m.said_at), count(m.id), ({title}) FROM sessions s "
            "LEFT JOIN messages m ON m.session_id = s.id GROUP BY s.id ORDER BY s.id")]

    def session_names(self) -> List[str]:
        """Return the names of the sessions, in the order in which they began."""
        return [name for name, in self._rows("SELECT name FROM sessions ORDER BY id")]

    def messages_of(self, session: str) -> List[Message]:
        """Return all that was said in a session, by its name."""
        return self._messages("session_id = (SELECT id FROM sessions WHERE name = ?)", session)

    def last_session(self) -> str:
        """Return the name of the session that was talked in last, or "main" where it is gone."""
        return self.name_of_session(self.setting("session", 0)) or "main"

    def name_of_session(self, session_id: int) -> str:
        """Return the name of a session; "" where it is gone."""
        return self._one("SELECT name FROM sessions WHERE id = ?", session_id) or ""

    def rename_session(self, old: str, new: str) -> None:
        """Give a session another name."""
        self._write("UPDATE sessions SET name = ? WHERE name = ?", new, old)

    def delete_session(self, name: str) -> None:
        """Remove a session with its messages; what was told there stays."""
        with self.transaction():
            number = self._one("SELECT id FROM sessions WHERE name = ?", name)
            self._rows("UPDATE entries SET session_id = NULL WHERE session_id = ?", number)
            self._rows("DELETE FROM messages WHERE session_id = ?", number)
            self._rows("DELETE FROM sessions WHERE id = ?", number)

    def add_message(self, session_id: int, role: str, text: str,
                    said_at: Optional[float] = None) -> int:
        """Store one message, said now or at said_at, and return its id."""
        return self._add("messages", session_id=session_id, role=role, text=text,
                         said_at=self.clock() if said_at is None else said_at)

    def newest_messages(self, session_id: int, count: int) -> List[Tuple[str, str]]:
        """Return the newest (role, text) pairs of a session, oldest first."""
        rows = self._rows("SELECT role, text FROM messages WHERE session_id = ? "
                          "ORDER BY id DESC LIMIT ?", session_id, count)
        return rows[::-1]

    def _fields(self, kind: Any, rest: str, *values: Any) -> List[Any]:
        """Return the fields of a kind of rows; a damaged text is read as far as it can be."""
        fields = ", ".join(kind._fields).replace("text", "CAST(text AS TEXT)")
        return self._rows(f"SELECT {fields} FROM {rest}", *values)

    def _messages(self, where: str, *values: Any) -> List[Message]:
        return [Message(*row) for row in self._fields(
            Message, f"messages WHERE {where} ORDER BY id", *values)]

    def heard_messages(self) -> List[Message]:
        """Return the messages, of any session, whose facts may not be entries yet."""
        return self._messages("stage = 0")

    def prompt_messages(self, session_id: Optional[int] = None) -> List[Message]:
        """Return what the prompt of a session, or of any, is made of: its summary and its turns."""
        if session_id is None:
            return self._messages("stage < 3")
        return self._messages("session_id = ? AND stage < 3", session_id)

    def advance_messages(self, ids: Iterable[int], stage: int) -> None:
        """Bring messages to a stage; those beyond it stay where they are."""
        self._write(f"UPDATE messages SET stage = ? WHERE stage < ? AND id IN ({LISTED})",
                    stage, stage, json.dumps([*ids]))

    def message_texts(self, ids: Sequence[int]) -> List[str]:
        """Return the texts of messages by id."""
        return [self._one("SELECT text FROM messages WHERE id = ?", i) or "" for i in ids]

    def messages_like(self, words: Sequence[str]) -> List[Message]:
        """Return the messages of any session that hold one of the words, however it goes on."""
        found = {m.id: m for word in words for m in self._messages("instr(lower(text), ?)", word)}
        return list(found.values())

    def remove_messages(self, ids: Iterable[int]) -> None:
        """Remove messages for ever, each of the owner's with the reply to it."""
        with self.transaction():
            for i in ids:
                self._rows("""DELETE FROM messages WHERE id = ? OR role = 'self' AND id = (
                    SELECT min(reply.id) FROM messages reply JOIN messages said ON said.id = ?
                    AND said.role = 'owner' AND reply.session_id = said.session_id
                    AND reply.id > said.id)""", i, i)

    def judge(self, message_id: int, verdict: int) -> None:
        """Approve (1) or reject (−1) a message."""
        self._write("UPDATE messages SET verdict = ? WHERE id = ?", verdict, message_id)

    # entries

    def add_entry(self, source: str, document: Document, session_id: Optional[int] = None,
                  recall: bool = True, held_out: bool = False,
                  told_at: Optional[float] = None, training: bool = True, about: str = "",
                  days: str = "") -> None:
        """Store a document, told now or at told_at; one told again only becomes recent.

        Without training it can be recalled, and no layer reads it. It is found by the words of what
        it is about, too.
        """
        self._add("entries", """
            ON CONFLICT(source, key) DO UPDATE SET told_at = max(told_at, excluded.told_at),
                words = excluded.words, about = excluded.about, days = excluded.days,
                checksum = excluded.checksum""",
                  source=source, key=document.key, text=document.text,
                  words=index_words(source, document, recall, about), session_id=session_id,
                  told_at=self.clock() if told_at is None else told_at, closed=document.closed,
                  recall=recall, held_out=held_out, training=training, about=about, days=days)

    def stand_alone(self, entry: Entry) -> None:
        """Let an entry lean on nothing any more."""
        document = Document(tuple(entry.text.splitlines()), entry.closed)
        words = index_words(entry.source, document, entry.recall)
        self._write("UPDATE entries SET about = '', words = ?, checksum = ? WHERE id = ?",
                    words, _crc32(entry.text + words), entry.id)

    def remove_entries(self, source: str, keys: Iterable[int]) -> None:
        """Remove documents of one source by key."""
        self._write(f"DELETE FROM entries WHERE source = ? AND key IN ({LISTED})",
                    source, json.dumps([*keys]))

    def withdraw(self, source: str, key: int) -> None:
        """Remove a document from what is learned; layers that have read it may keep it."""
        with self.transaction():
            self.remove_entries(source, [key])
            self._rows("DELETE FROM unlearning WHERE key = ?", key)

    def entries_taken(self) -> int:
        """Return how many entries were ever removed; while it stays, ids only rise."""
        return int(self.setting("entries_taken", 0))

    def forget_entry(self, entry_id: int) -> None:
        """Remove one entry, and the message that it came from, for ever."""
        with self.transaction():
            self._rows("""
                DELETE FROM messages WHERE role = 'owner' AND trim(text) = (
                    SELECT trim(text, ' ' || char(10)) FROM entries
                    WHERE id = ? AND source != 'corpus')""", entry_id)
            self._rows("DELETE FROM entries WHERE id = ?", entry_id)

    def entry_keys(self, source: str) -> Set[int]:
        """Return the keys of every document of one source."""
        return {row[0] for row in self._rows("SELECT key FROM entries WHERE source = ?", source)}

    def entries(self, where: str = "1", *values: Any, limit: int = -1) -> List[Entry]:
        """Return entries in the order in which they came, filtered by an SQL condition on e."""
        rows = self._fields(Entry, f"entries e WHERE {where} ORDER BY id LIMIT {int(limit)}",
                            *values)
        return [Entry(*row[:5], *map(bool, row[5:8]), *row[8:]) for row in rows]

    def by_keys(self, keys: Sequence[int]) -> List[Entry]:
        """Return the entries of the corpus, and approved ones, that have these keys."""
        return self.entries("e.source IN ('corpus', 'approved') AND e.recall AND e.key IN "
                            f"({LISTED})", json.dumps(keys))

    def told(self, where: str = "1", *values: Any) -> List[Entry]:
        """Return what the owner told, oldest first, filtered by an SQL condition on e."""
        return self.entries(f"e.source IN ('chat', 'taught') AND e.recall AND {where}", *values)

    def last_told(self, count: int, session_id: Optional[int] = None) -> List[Entry]:
        """Return what was told last, oldest first: in a session, or in all of them for None."""
        return self.entries("""e.id IN (SELECT id FROM entries WHERE ?2 IN (session_id, 0)
                            AND recall AND likely(source IN ('chat', 'taught'))
                            ORDER BY told_at DESC, id DESC LIMIT ?1)""", count, session_id or 0)

    # which layer read what: 0 is the base, k the k-th delta

    def has_text(self) -> bool:
        """Return whether there is anything to train on."""
        return bool(self._rows("SELECT 1 FROM entries WHERE training AND NOT held_out LIMIT 1"))

    def training_index(self) -> List[Tuple[int, int]]:
        """Return (id, key) of all that a learner has to do with, in the order in which it came."""
        return self._rows("SELECT id, key FROM entries WHERE training ORDER BY id")

    def mark_read(self, keys: Iterable[int], layer: int) -> None:
        """Note that a layer has read the documents of these keys."""
        self._write("UPDATE entries SET layer = ?, trained = min(?, coalesce(trained, ?)) WHERE "
                    f"source IN ('corpus', 'chat', 'taught', 'approved') AND key IN ({LISTED})",
                    layer, layer, layer, json.dumps([*keys]))

    def mark_trained(self, layer: int) -> None:
        """Note that a layer trains from now on, on everything that is not held out."""
        self._write("UPDATE entries SET trained = ? WHERE trained IS NULL AND training "
                    "AND NOT held_out AND layer IS NULL", layer)

    def trained_texts(self, source: str, keys: Iterable[int]) -> List[Tuple[str, int]]:
        """Return the texts of some documents of a source, each with the first layer to read it.

        What no layer has read counts as NOBODY's, if a generation not born yet may have read it.
        """
        return self._rows(f"""
            SELECT text, coalesce(trained, {NOBODY}) FROM entries
            WHERE source = ? AND key IN ({LISTED}) AND (trained IS NOT NULL OR training
                AND NOT held_out AND EXISTS (SELECT 1 FROM settings WHERE name = 'rebirth'))""",
                          source, json.dumps([*keys]))

    def inherit(self, source: str, key: int, layer: int, whole: bool) -> None:
        """Note that a layer has read words of this document, or all, before it was a document."""
        self._write("UPDATE entries SET trained = ?, layer = ? WHERE source = ? AND key = ?",
                    layer, layer if whole else None, source, key)

    def want_unlearned(self, key: int, layer: int, chars: int) -> None:
        """Note words, known by a key, that are gone and that layers from this one on have read."""
        self._write("""
            INSERT INTO unlearning(key, trained, chars, corrected, unborn)
            VALUES (?, ?, ?, 0, EXISTS (SELECT 1 FROM settings WHERE name = 'rebirth'))
            ON CONFLICT(key) DO UPDATE SET trained = min(trained, excluded.trained),
                                           unborn = max(unborn, excluded.unborn)""",
                    key, layer, chars)

    def take_back(self, key: int) -> Optional[int]:
        """Note that words are there again; return the first layer that has read them, if any."""
        with self.transaction():
            layer = self._one("SELECT trained FROM unlearning WHERE key = ?", key)
            self._rows("DELETE FROM unlearning WHERE key = ?", key)
            return layer

    def to_unlearn(self) -> List[Tuple[int, int]]:
        """Return (first layer, characters) of all that is to be unlearned, not told again since."""
        return self._rows("""
            SELECT trained, chars FROM unlearning u WHERE trained < ? AND NOT EXISTS (
                SELECT 1 FROM entries e WHERE e.key = u.key
                AND e.source IN ('corpus', 'chat', 'taught', 'approved'))""", NOBODY)

    def unlearn_from(self, layer: int) -> None:
        """Take away the layers from this one on: what they read waits to be read again."""
        with self.transaction():
            self._rows("UPDATE entries SET layer = NULL WHERE layer >= ?", layer)
            self._rows("UPDATE entries SET trained = NULL WHERE trained >= ?", layer)
            self._rows("DELETE FROM unlearning WHERE trained >= ? AND NOT unborn", layer)
            self._rows("UPDATE unlearning SET trained = ? WHERE trained >= ?", NOBODY, layer)

    def unread_chars(self) -> Tuple[int, int]:
        """Return how many characters wait to be read: of the corpus, and of all else."""
        rows = dict(self._rows("""
            SELECT source = 'corpus', sum(length(text)) FROM entries
            WHERE layer IS NULL AND training AND NOT held_out GROUP BY 1"""))
        return rows.get(1, 0), rows.get(0, 0)

    # the generation that is not born yet

    def begin_rebirth(self, plan: Dict[str, Any]) -> None:
        """Make room for the next generation, which will not read what is gone already."""
        with self.transaction():
            self.drop_rebirth()
            self.set_setting("rebirth", plan)

    def drop_rebirth(self) -> None:
        """Give up the next generation, if there is one."""
        with self.transaction():
            self._rows("DELETE FROM settings WHERE name = 'rebirth'")
            self._rows("DELETE FROM layers WHERE name LIKE ?", NEXT + "%")
            self._rows("DELETE FROM unlearning WHERE trained >= ?", NOBODY)
            self._rows("UPDATE unlearning SET unborn = 0")

    def adopt(self, read: Iterable[int]) -> None:
        """Put the next generation, whose base has read these keys, in the place of the present."""
        with self.transaction():
            self._rows("DELETE FROM layers WHERE name NOT LIKE ?", NEXT + "%")
            self._rows("UPDATE layers SET name = substr(name, ?)", len(NEXT) + 1)
            self._rows("UPDATE entries SET layer = NULL, trained = NULL WHERE trained IS NOT NULL")
            self.mark_read(read, 0)
            self._rows("DELETE FROM unlearning WHERE NOT unborn")
            self._rows("UPDATE unlearning SET trained = 0, unborn = 0")
            self._rows("DELETE FROM settings WHERE name = 'rebirth'")

    def hold_out(self, keys: Iterable[int], epoch: int) -> None:
        """Keep documents, known by the keys of their first lines, from training for ever."""
        self._write("INSERT OR IGNORE INTO probes(key, epoch) SELECT value, ? FROM json_each(?)",
                    epoch, json.dumps([*keys]))

    def probe_epochs(self) -> Dict[int, int]:
        """Return when each held-out document, by the key of its first line, became one."""
        return dict(self._rows("SELECT key, epoch FROM probes"))

    def first_of_newest(self, chars: int) -> int:
        """Return the id from which on entries may be counted: those hold at most chars in all."""
        total, first = 0, 0 if chars >= 8 else self.about_count() + 1
        for first, size in self._rows("SELECT id, length(text) FROM entries WHERE training "
                                      "AND NOT held_out ORDER BY id DESC LIMIT ?", chars // 8):
            total += size
            if total > chars:
                return first + 1
        return first

    def about_count(self, table: str = "entries") -> int:
        """Return about how many entries there are, or messages, at once however many they be."""
        return self._one(f"SELECT max(id) FROM {table}") or 0

    def ids_holding(self, groups: Sequence[Sequence[str]], limit: int) -> List[int]:
        """Return the newest ids of entries that hold a form of each of the groups.

        A form is a word or several in a row; with * at its end it is only how the last one begins.
        """
        groups = [[f.replace("\0", "") for f in group if f.strip("*\0 ")] for group in groups]
        if not groups or not all(groups):
            return []
        if self.has_fts:
            table, where = "entries_fts", "entries_fts MATCH ?"
            values = [" AND ".join(f"({' OR '.join(map(_fts_form, g))})" for g in groups)]
        else:
            most, like = MAX_LIKE_FORMS // len(groups), "words || ' ' LIKE ? ESCAPE '\\'"
            values = [_like_form(form) for group in groups for form in group[:most]]
            table, where = "entries", " AND ".join(
                f"({' OR '.join([like] * len(group[:most]))})" for group in groups)
        sql = f"SELECT rowid FROM {table} WHERE {where} ORDER BY rowid DESC LIMIT ?"
        return [row[0] for row in self.mending(lambda: self._rows(sql, *values, limit))]

    def entries_of(self, ids: Sequence[int]) -> List[Entry]:
        """Return the entries of these ids that may be recalled, in the order of the ids."""
        found = {entry.id: entry for entry in self.entries_by_id(ids) if entry.recall}
        return [found[i] for i in ids if i in found]

    def entries_by_id(self, ids: Sequence[int]) -> Iterator[Entry]:
        """Yield the entries of these ids, in their order, some hundreds at a time."""
        for at in range(0, len(ids), 500):
            yield from self.entries(f"id IN ({LISTED})", json.dumps(ids[at:at + 500]))

    def today(self) -> datetime.date:
        """Return the day that its clock shows."""
        return datetime.date.fromtimestamp(self.clock())

    def file_bytes(self) -> int:
        """Return the size of the file."""
        return self._one("PRAGMA page_count") * self._one("PRAGMA page_size")

    def entry_count(self) -> int:
        """Return how many entries there are."""
        return self._one("SELECT count(*) FROM entries")

    def stem_count(self, stem: str) -> int:
        """Return in about how many entries a word begins with the stem."""
        if self.has_fts:
            return self._one("SELECT coalesce(sum(doc), 0) FROM entries_words "
                             "WHERE term >= ? AND term < ?", stem, stem + "\U0010ffff")
        return self._one("SELECT count(*) FROM entries WHERE words LIKE ? ESCAPE '\\'",
                         _like_form(stem + "*"))

    # layers, settings, progress, life

    def save_layers(self, layers: Dict[str, Layer]) -> None:
        """Store layers under their names.  A sealed layer that is there already stays."""
        with self.transaction():
            for name, layer in layers.items():
                manifest = json.dumps(layer.manifest)
                self._rows("""
                    INSERT INTO layers(name, sealed, manifest, checksum, data, saved_at)
                    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT(name) DO UPDATE SET
                        sealed = excluded.sealed, manifest = excluded.manifest,
                        data = excluded.data, checksum = excluded.checksum,
                        saved_at = excluded.saved_at WHERE NOT layers.sealed""",
                           name, layer.sealed, manifest, _crc32(layer.data, manifest), layer.data,
                           self.clock())

    def manifests(self) -> Dict[str, Any]:
        """Return the manifests of the present generation's layers; what is damaged is left out."""
        found = {name: _decoded(manifest, "") for name, manifest in self._rows(
            f"SELECT name, manifest FROM layers WHERE {NAMED} ORDER BY rowid")}
        return {name: manifest for name, manifest in found.items()
                if manifest != "" and not name.startswith(NEXT)}

    def layers(self, prefix: str = "", without: Sequence[str] = ()) -> Dict[str, Layer]:
        """Return the sound layers of the present generation, or with NEXT of the next, by name."""
        return self._layers(prefix, f"name {'LIKE' if prefix else 'NOT LIKE'} ? AND name NOT IN "
                                    f"({LISTED})", NEXT + "%", json.dumps(without))

    def layer(self, name: str) -> Optional[Layer]:
        """Return one layer, if it is there."""
        return self._layers("", "name = ?", name).get(name)

    def checksum(self, name: str) -> Optional[int]:
        """Return what tells one state of a layer from another, without reading it."""
        return self._one("SELECT checksum FROM layers WHERE name = ?", name)

    def _layers(self, prefix: str, where: str, *values: Any) -> Dict[str, Layer]:
        found = {}
        for name, sealed, manifest, checksum, data in self._rows(
                "SELECT substr(name, ?), sealed, manifest, checksum, data FROM layers "
                f"WHERE {NAMED} AND {where} ORDER BY rowid", len(prefix) + 1, *values):
            if isinstance(data, bytes) and _crc32(data, manifest) == checksum:
                with contextlib.suppress(ValueError):
                    found[name] = Layer(json.loads(manifest), data, bool(sealed))
        return found

    def lost_layers(self) -> Tuple[Optional[int], List[str]]:
        """Return the first layer that must be learned again, 0 the base, and the names that go.

        A layer goes when it is damaged or gone, and with it what is built on it.
        """
        spoiled = f"{NAMED} AND (checksum IS NOT crc32(data, manifest) OR NOT json_valid(manifest))"
        names, bad = ([name for name, in self._rows(f"SELECT name FROM layers WHERE {which}")]
                      for which in (NAMED, spoiled))
        left = {*names} - {*bad}
        born = self.setting("growth", {}).get("phase", "newborn") != "newborn"
        if born and not {"base", "tokenizer"} <= left:
            return 0, list(dict.fromkeys(["base", *names]))
        sound = 0 if "router" in bad else len(delta_names(left))  # it knew which text each reads
        read = self._one("SELECT max(layer) FROM entries WHERE typeof(layer) = 'integer'") or 0
        lost = [f"delta{number}" for number in range(sound + 1, read + 1)]
        lost += [name for name in names if name[:5] == "delta" and int(name[5:]) > sound]
        return sound + 1 if lost else None, list(dict.fromkeys([*bad, *lost]))

    def give_up_damaged(self) -> List[str]:
        """Remove damaged layers and what is built on them, which is then to be read again."""
        with self.transaction():
            first, names = self.lost_layers()
            if first is not None:
                self.unlearn_from(first)
            if first == 0:
                self._rows("DELETE FROM settings WHERE name = 'growth'")
            self.remove_layers(names)
            return names

    def remove_layers(self, names: Iterable[str]) -> None:
        """Remove layers that are no longer needed."""
        with self.transaction():  # one by one: a damaged name may hold what JSON cannot
            for name in names:
                self._rows("DELETE FROM layers WHERE name = ?", name)

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a stored value, or the default."""
        return _decoded(self._one("SELECT value FROM settings WHERE name = ?", name), default)

    def set_setting(self, name: str, value: Any) -> None:
        """Store a JSON-able value under a name."""
        self._write("INSERT OR REPLACE INTO settings(name, value) VALUES (?, ?)",
                    name, json.dumps(value))

    def settings(self, prefix: str) -> Dict[str, Any]:
        """Return the stored values whose names begin with prefix, without it."""
        rows = self._rows("SELECT name, value FROM settings WHERE substr(name, 1, ?) = ?",
                          len(prefix), prefix)
        return {name[len(prefix):]: _decoded(value) for name, value in rows}

    def add_progress(self, step: int, tokens: int, loss: Optional[float],
                     held_out_bpc: Optional[float]) -> None:
        """Note how well it does at a step of its life."""
        self._add("progress", at=self.clock(), step=step, tokens=tokens, loss=loss,
                  held_out_bpc=held_out_bpc)

    def progress(self, count: int = 1000) -> List[Dict[str, Any]]:
        """Return the newest notes of add_progress, oldest first."""
        keys = ("at", "step", "tokens", "loss", "held_out_bpc")
        rows = self._rows(f"SELECT {', '.join(keys)} FROM progress ORDER BY id DESC LIMIT ?", count)
        return [dict(zip(keys, row)) for row in rows[::-1]]

    def log(self, event: str, **detail: Any) -> None:
        """Write one event into the life log."""
        self._add("life", at=self.clock(), event=event, detail=json.dumps(detail))

    def life(self, count: int = 100) -> List[Dict[str, Any]]:
        """Return the newest events of the life log, oldest first."""
        rows = self._rows("SELECT at, event, detail FROM life ORDER BY id DESC LIMIT ?", count)
        return [{"at": at, "event": event, **_decoded(detail, {})}
                for at, event, detail in rows[::-1]]

    def counts(self) -> Dict[str, int]:
        """Return how many messages, sessions, entries and learned entries there are."""
        tables = {"messages": "messages", "sessions": "sessions", "entries": "entries",
                  "told": "entries WHERE source != 'corpus' AND recall",
                  "learned": "entries WHERE layer IS NOT NULL",
                  "held_out": "entries WHERE held_out"}
        return {name: self._one(f"SELECT count(*) FROM {rows}") for name, rows in tables.items()}

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the file, each in one line; nothing where all is well."""
        found = self._one("PRAGMA integrity_check")
        if found != "ok":
            yield found
        with contextlib.closing(Memory(":memory:")) as newest:
            lost = sorted({*newest._rows(PARTS)} - {*self._rows(PARTS)})
        if lost:
            yield f"these parts are missing or damaged: {', '.join(name for name, _ in lost[:5])}"
            return
        for table in (*SUMMED_UP, "layers", "sessions", "settings", "probes", "unlearning"):
            rows = self._rows(f"SELECT rowid FROM {table} WHERE {self._unfit(table)}")
            if rows:
                yield f"{len(rows)} of the {table} are damaged, the first has the id {rows[0][0]}"
        for name in self.lost_layers()[1]:
            yield f"layer {name!r} cannot be used; it is learned again"
        for name, in self._rows("SELECT name FROM settings WHERE NOT json_valid(value)"):
            yield f"the setting {name!r} is damaged and counts as not set"
        yield from self._index_faults()

    def _unfit(self, table: str) -> str:
        """Return, in SQL, whether a row is damaged: by its checksum or by the types of columns."""
        summed = [f"CAST({name} AS BLOB)" if name in ("text", "words") else name  # as it is
                  for name in SUMMED_UP.get(table, "").split()]
        unfit = [f"checksum IS NOT crc32({', '.join(summed)})"] if summed else []
        for _, name, kind, needed, _, key in self._rows(f"PRAGMA table_info({table})"):
            kinds = f"'{kind.lower()}'" if needed or key else f"'{kind.lower()}', 'null'"
            unfit += [f"typeof({name}) NOT IN ({kinds})"] * bool(kind)
        return " OR ".join(unfit)

    def _index_faults(self) -> Iterator[str]:
        """Yield what is wrong with the full-text index, which only a copy of it can be asked."""
        with contextlib.closing(sqlite3.connect("")) as copy:  # in a file, if it is large
            self._db.backup(copy)
            try:
                copy.execute("INSERT INTO entries_fts(entries_fts, rank) "
                             "VALUES ('integrity-check', 1)")
            except SQL_ERRORS as error:
                if "fts5" not in str(error):  # which is not there
                    yield f"the full-text index is damaged ({error}); a chat builds it anew"

    # the lease: one trainer for one file

    def leased(self, owner: str, alive: Callable[[str], bool]) -> bool:
        """Return whether a living holder other than owner has the trainer's place."""
        held = self.setting("lease", {"owner": owner, "until": 0})
        return held["owner"] != owner and held["until"] > self.clock() and alive(held["owner"])

    def take_lease(self, owner: str, seconds: float, alive: Callable[[str], bool]) -> bool:
        """Return True, and hold the trainer's place, unless a living holder has it."""
        with self.transaction():
            if self.leased(owner, alive):
                return False
            self.set_setting("lease", {"owner": owner, "until": self.clock() + seconds})
            return True

    def drop_lease(self, owner: str) -> None:
        """Give the trainer's place back if it is ours."""
        with self.transaction():
            if self.setting("lease", {}).get("owner") == owner:
                self._rows("DELETE FROM settings WHERE name = 'lease'")


def rescue(path: str, new: str) -> Dict[str, int]:
    """Copy all that can be read of a damaged store into a new one; return the rows of each table.

    The damaged file stays as it is: a half commit is taken back in a copy of it. Raises
    StoreError where there is something already, or nothing can be read.
    """
    if os.path.lexists(new):
        raise StoreError(f"{new} is there already; name a file that is not")
    with _told(path, OSError), tempfile.TemporaryDirectory() as folder, \
            contextlib.closing(_connect_to_read(_whole_copy(path, folder))) as old, \
            contextlib.closing(Memory(new)) as memory:
        memory._rows("PRAGMA foreign_keys = OFF")  # a talk outlives the name of its session
        with memory.transaction():
            rows = {table: _rescue_table(old, memory._db, table) for table in (
                "sessions", "messages", "entries", "settings", "layers", "probes", "unlearning",
                "progress", "life")}
            memory._rows("INSERT OR IGNORE INTO sessions(id, name, started_at) SELECT DISTINCT "
                         "session_id, 'rescued ' || session_id, 0 FROM messages")
            for table in ("progress", "life"):
                memory._rows(f"DELETE FROM {table} WHERE {memory._unfit(table)}")
            memory.give_up_damaged()
            return rows


def renew_damaged(path: str) -> Tuple[str, Dict[str, int]]:
    """Put a store of what can be read of a damaged one in its place.

    Return where the damaged one is kept, and the rows of each table.  Raises StoreError where
    the file is not ours, or no word in it can be read: then nothing is changed.
    """
    with _told(path, OSError):
        _judge_file(path)
        kept = next(name for n in itertools.count(1)
                    if not os.path.lexists(name := f"{path}.damaged-{n}"))
        with tempfile.TemporaryDirectory(dir=os.path.dirname(os.path.abspath(path))) as folder:
            new = os.path.join(folder, "new.sqlite3")
            rows = rescue(path, new)
            if not rows["messages"] + rows["entries"]:
                raise StoreDamaged(f"no word in the memory file {path} can be read; restore it "
                                   "from a copy, or choose another --db")
            for end in ("", "-journal"):  # at any instant a whole store stands in one of the places
                if os.path.exists(path + end):
                    shutil.copy2(path + end, kept + end)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + "-journal")  # or it would be played into the new one
            os.replace(new, path)
        return kept, rows


def _whole_copy(path: str, folder: str) -> str:
    """Return the path of a copy in which a half commit is taken back, and which is as long as its
    first page says; of the file, where it needs neither."""
    with open(path, "rb") as file:
        head = file.read(32)
    size, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    whole = pages * (65_536 if size == 1 else size)
    ends = [end for end in ("", "-journal") if os.path.exists(path + end)]
    if len(ends) < 2 and whole <= os.path.getsize(path):
        return path
    copy = os.path.join(folder, "damaged.sqlite3")
    for end in ends:
        shutil.copyfile(path + end, copy + end)
    if len(ends) > 1:
        _take_back(copy)
    if os.path.getsize(copy) < whole <= 2 * os.path.getsize(copy):
        os.truncate(copy, whole)  # of a file that was cut short SQLite reads nothing
    return copy


def _rescue_table(old: sqlite3.Connection, new: sqlite3.Connection, table: str) -> int:
    """Copy the rows of a table that can be read and fit; return how many."""
    count = 0
    with contextlib.suppress(*SQL_ERRORS):
        names = [{row[1] for row in db.execute(f"PRAGMA table_info({table})")}
                 for db in (old, new)]
        common = sorted(names[0] & names[1])
        parts = deque([(1, old.execute(f"SELECT max(rowid) FROM {table}").fetchone()[0] or 0)])
        while parts:
            first, last = parts.popleft()
            try:
                rows = old.execute(f"SELECT {', '.join(common)} FROM {table} WHERE rowid BETWEEN "
                                   "? AND ?", (first, last)).fetchall()
            except SQL_ERRORS:  # one of them cannot be read: look for it
                half = (first + last) // 2
                parts.extend([(first, half), (half + 1, last)] if first < last else [])
                continue
            for row in rows:
                with contextlib.suppress(*SQL_ERRORS):
                    count += new.execute(
                        f"INSERT OR IGNORE INTO {table}({', '.join(common)}) "
                        f"VALUES ({', '.join('?' * len(common))})", row).rowcount
    return count


def index_words(source: str, document: Document, recall: bool, about: str = "") -> str:
    """Return the words under which an entry is found, and its marks, a space before each."""
    mark = [TOLD_MARK] * (recall and source in TOLD) + [WORDS_MARK] * (
        source == "corpus" and bool(WORD_LINE.search(document.text)))
    joined = folded_words(" ".join(HYPHENED.findall(document.text)).replace("-", ""))
    words = [] if document.is_dictionary else [
        *folded_words(document.text), *joined, *folded_words(about)]
    return " ".join(["", *words, *mark])


def minute_of(at: float) -> str:
    """Return a time of the memory as people read it: 2026-05-03 18:04, by the clock on the wall."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))


def in_one_line(text: str) -> str:
    """Return the lines of an entry or a message as one."""
    return " / ".join(text.splitlines())


def session_name(text: str) -> str:
    """Return the name of a session, made of words from elsewhere; "" where they have no sign."""
    return clean_line("".join(c if c.isprintable() else " " for c in text), 80)


def _decoded(text: Any, default: Any = None) -> Any:
    """Return a stored value, or the default where there is none, or none of its kind."""
    with contextlib.suppress(TypeError, ValueError):
        value = json.loads(text)
        if not isinstance(default, (dict, list, int)) or type(value) is type(default):
            return value
    return default


def _judge_file(path: str) -> None:
    """Raise StoreError for a file that is not ours, by its first page alone: nothing is opened."""
    if not os.path.isfile(path) or not os.path.getsize(path):
        return
    with open(path, "rb") as file:
        head = file.read(100)
    if head[:16] != b"SQLite format 3\0":
        raise sqlite3.DatabaseError("file is not a database")
    version, sign = struct.unpack(">60xI4xI28x", head.ljust(100, b"\0"))
    if version and sign == APPLICATION_ID:
        return
    with contextlib.closing(_connect_to_read(path, "immutable=1")) as db:
        tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master")]
    if sign or not {"messages", "entries", "layers", "settings"} <= {*tables}:  # as ours always had
        raise StoreError(f"{path} is another program's file, with the table "
                         f"{min(tables, default='none')!r}; choose another --db")


def _take_back(path: str) -> None:
    """Let SQLite take back a commit that a kill left half done, as whoever comes first must."""
    with contextlib.suppress(OSError, *SQL_ERRORS), open(path + "-journal", "rb") as journal:
        if journal.read(1):
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("SELECT count(*) FROM sqlite_master").fetchone()


def _connect_to_read(path: str, how: str = "mode=ro", tries: int = 20) -> sqlite3.Connection:
    """Return a connection that changes nothing; to a copy, where there is more to do than read.

    A half commit is taken back first, once whoever was killed in it is gone.
    """
    if path == ":memory:":
        return _connect(path)
    db = _connection(f"file:{urllib.parse.quote(os.path.abspath(path))}?{how}", uri=True)
    try:
        version = db.execute("PRAGMA user_version").fetchone()[0]
    except sqlite3.OperationalError:
        db.close()
        if "immutable" in how or not tries:
            raise
        if not os.path.exists(path + "-journal"):  # left in WAL mode, where nobody may write
            return _connect_to_read(path, "immutable=1")
        _take_back(path)
        time.sleep(0.1 * (tries < 20))
        return _connect_to_read(path, how, tries - 1)
    if how == "mode=ro" and 0 < version < len(MIGRATIONS):
        with contextlib.closing(db):
            copy = _connect(":memory:")
            db.backup(copy)
            return copy
    return db


SECONDS_LOCKED = 30.0  # that it waits for another program which holds the file


def _crc32(*values: Any) -> int:
    """Return the checksum of fields of a row; a whole number counts as the REAL it is stored as."""
    total = 0
    for value in values:
        text = float(value) if isinstance(value, (int, float)) else "" if value is None else value
        total = zlib.crc32(text if isinstance(text, bytes) else
                           str(text).encode("utf-8", "replace"), total)
    return total


def _connection(name: str, uri: bool = False) -> sqlite3.Connection:
    """Return one for all threads that reads damaged texts as far as it can, and knows checksums."""
    db = sqlite3.connect(name, timeout=SECONDS_LOCKED, isolation_level=None,
                         check_same_thread=False, uri=uri)
    db.text_factory = functools.partial(str, encoding="utf-8", errors="replace")
    db.create_function("crc32", -1, _crc32)
    return db


def _connect(path: str) -> sqlite3.Connection:
    """Return a connection with explicit transactions that reach the disk."""
    if path != ":memory:" and not os.path.exists(path):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))  # for its owner alone to read
    db = _connection(path)
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA secure_delete = ON")  # what is forgotten leaves the file's pages too
    except BaseException:
        db.close()
        raise
    return db


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; a trigger's body is one statement with its head."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def _fts_form(form: str) -> str:
    """Return a form, quoted so that nothing in it can be a sign of FTS5's own."""
    star = "*" if form.endswith("*") else ""
    return '"' + form.rstrip("*").replace('"', '""') + '"' + star


def _like_form(form: str) -> str:
    """Return the LIKE pattern of a form in words that have a space before each."""
    escaped = re.sub(r"([\\%_])", r"\\\1", form)
    return f"% {escaped[:-1]}%" if form.endswith("*") else f"% {escaped} %"


STORE_TROUBLES: Tuple[Tuple[str, type, str], ...] = (  # signs of it, and what to do
    ("json_", StoreError, "its SQLite was built without JSON: use another Python"),
    ("not a database", StoreDamaged, "it is some other file: choose another --db"),
    ("malformed", StoreDamaged, "it is damaged: restore it from a copy, or choose another --db"),
    (r"no such (table|column)|vtable constructor|sql logic error"
     r"|\(constraint failed",  # of the index
     StoreDamaged, "run `doctor`, or choose another --db"),
    ("no such file", StoreError, "check that its folder exists, or use --db"),
    ("unable to open", StoreError, "check that its folder exists and may be written, or use --db"),
    ("read-?only", StoreError, "make it and its folder writable, or use --db"),
    ("is a directory", StoreError, "that is a folder: name a file with --db"),
    ("disk is full|no space left", StoreError, "free some space and try again"),
    ("disk i/o", StoreError, "check the disk and its free space"),
    ("locked", StoreLocked, "another program holds it: close that and try again"),
    ("", StoreError, "run `doctor`, or choose another --db"))


@contextlib.contextmanager
def _told(path: str, *others: type) -> Iterator[None]:
    """Raise StoreError for what SQLite raises within, and for others: what is wrong, what to do."""
    try:
        yield
    except (*SQL_ERRORS, *others) as error:
        text = f"({error})".lower()
        kind, remedy = next((kind, remedy) for signs, kind, remedy in STORE_TROUBLES
                            if re.search(signs, text))
        raise kind(f"the memory file {path} cannot be used ({error}); {remedy}") from error


# ──────────────────────────────────────────────────────────────────────────────────────
# 13 · RECALL — what it was told, it can say   uses: 1 11 12
# ──────────────────────────────────────────────────────────────────────────────────────
#
# A question is taken apart: which of its words are telling, whose things they name, what is to fill
# the gap. Statements that hold such words are gathered and taken apart in the same way, and a judge
# of a few general signals says how likely each one answers. The best is said, turned round (my cat,
# your cat), where that is likely enough; it is quoted where it is merely near; else nothing is
# said. All that is known of words is in WORD_TABLE, all that was fitted in JUDGE. No rule is about
# one sentence, and what holds for one language only is data.

UNKNOWN_REPLY = "I do not know that yet. Tell me, and I will keep it."
UNKNOWN_REPLIES = (UNKNOWN_REPLY, "That is something I was never told.",
                   "I have nothing about that in my memory.", "I cannot say; nobody told me.")
KEPT_REPLY = "I will keep that."
KEPT_REPLIES = (KEPT_REPLY, "I have it now.", "That is in my memory now.",
                "I have read it, thank you.")
NOT_KEPT = "I have read it; nothing that is said here is kept."
MOST_ECHOED = 13        # words, from which a clause is not said back
STEM_CHARS = 5
LEAST_SCORE = 0.1       # one that fits less is never said
WEAK_SCORE = 0.45       # an exchange that fits so well is like what was said
NEAR_SCORE = 0.01       # exchanges that fit equally well up to this are equals
FEWEST_ENTRIES = 2000   # as if: in a small memory a word is rare by chance
MOST_HELD = 100         # entries that one word brings, newest first
MOST_TOLD = 20          # entries of the owner's that are looked at for a question
MOST_READ = 10          # and of what was read
MOST_PARTS = 8          # of a message that are heard one by one, beside all of it
WHOLE = 0.4             # of a saying's fit hangs on how much of the message it is like
MOST_LISTED = 12        # statements that are said one after another
MOST_UNITS = 40         # sentences that are looked at closely
MOST_TO_SCAN = 100_000  # entries, up to which words in a row are looked for (in 3 ms)
MOST_FORMS = 60         # under which one word is looked for
MAX_ASKED_CHARS = 500   # a longer text is understood by its beginning
MAX_QUERY_TERMS = 8     # a longer question is searched for by its first words
FADE = 16.0             # exchanges after which what was said counts half

# Weights of the judge and the score from which a statement is quoted; the one from which it is
# said is the owner's recall_score. Fitted by tests/fit_recall.py, which says on what.
JUDGE = {
    "quote": 0.046, "bias": -3.41, "tale": -2.71, "asked at length": 1.09, "mass": 0.29,
    "rare": 1.41, "two": 1.11, "whole": 3.18, "thing lost": -0.54, "name lost": -1.18,
    "new": -1.81, "kind": 0.22, "empty": -1.12, "empty whole": -2.10, "half whole": -1.56,
    "yours": -0.55, "owner": 0.35, "other's": -0.32, "rival": -0.67}

# What is known of words, one format for all. A line begins with = where its words name the same
# thing, with ~ where they are near, with ! where forms follow their base; or with names of a kind
# and a colon. A comma or | divides groups, a space at the beginning goes on with the line before.
# Names with a language behind a dot are the closed classes of it, a group without a name is of the
# next of en, de, es, fr: _ joins phrases, / pairs. Of what may be asked for (asks.…) the first that
# a question names counts. Lines of this format in the owner's corpus add.
WORD_TABLE = """
= 2 two, 3 three, 4 four, 5 five, 6 six, 7 seven, 8 eight, 9 nine, 10 ten, 11 eleven, 12 twelve, 13
 thirteen, 14 fourteen, 15 fifteen, 16 sixteen, 17 seventeen, 18 eighteen, 19 nineteen, 20 twenty
= name call nickname heißen llamar llamo nombre appeler nom, né naissance, live home house reside
 address flat apartment dwell lodge move, wohnen wohne adresse, arbeiten beruf job, vivir vivo vive
 dirección, habiter habite adresse, born birth birthday birthdate birthplace, geboren geburtstag,
 nacer nací nació cumpleaños, old age year turn, alt alter jahre, edad años, âge ans, job work
 profession occupation employ employer career workplace, trabajar profesión, travailler travail
 métier profession, tyre tire, allergie allergisch, alergia alérgico alérgica, allergie allergique,
 coche carro, passwort kennwort
~ like love favourite enjoy prefer fond adore fan treat, hate dislike loathe detest stand, marry
 marriage wed wedding anniversary honeymoon, mögen mag lieben liebe gern, gustar gusta encanta,
 aimer aime préférer préfère, mutter mama, vater papa, madre mamá, padre papá, mère maman, mother
 mum mummy mama parent, father dad daddy papa, grandmother grandma granny nan, grandfather grandpa
 grandad granddad, child kid, lad boy, boss manager supervisor chief superior, doctor physician gp,
 couch sofa settee, bike bicycle cycle, phone telephone mobile number call ring cell tel, telefon
 nummer handy, teléfono número, téléphone numéro, car drive automobile vehicle auto, work workplace
 office, job become trade, fridge refrigerator, movie film cinema picture, trash garbage rubbish
 bin, floor storey level, parcel package packet, recycle recycling, buy purchase get from origin,
 leave depart departure go start set, leave park put place store hide keep lay lie stay sit stand,
 arrive arrival come land, come visit arrive pick collect appear, begin start opening, end finish
 close over stop, fahren fährt abfahrt abfahren, salir sale salida, partir part départ, legen
 liegen liegt steht, close shut, code password pin combination passcode passphrase, open unlock
 opening, study learn student university college school uni campus, study subject degree major,
 learn lesson class course, member belong membership, teach teacher, eat food meal dish diet, cook
 make dish bake recipe, drink beverage take, allergy allergic rash, ill sick disease illness dizzy,
 fear afraid scare frighten terrify phobia, hobby enjoy pastime, cost price pay expensive charge
 fee, kosten kostet preis, costar cuesta precio, coûter coûte prix, earn salary income wage pay,
 weight heavy kilo, tall height high centimetre centimeter foot metre, long length last duration
 take, far distance kilometre mile away, big size large, meet appointment see, appointment go see
 visit, travel trip holiday vacation journey go fly, trip outing excursion, flight plane fly, speak
 language tongue, wear size, lose missing, write author writer book novelist, play instrument, sing
 song choir singer, give present gift, grow plant, sleep bed, wake alarm, dream want wish, plan
 intend want, topic theme subject about, team club, blood group type, pill tablet medicine
 medication drug, company firm business, friend mate buddy pal, neighbour neighbor, mail post, mail
 email, horoscope zodiac star, turn birthday celebrate, origin from born come native nationality,
 city town place, nationality country from citizen origin, borrow lend loan owe debt, repair fix
 mend service maintain, collect empty, collect collection gather, hurt break injure injury wound,
 own belong possess owner, home country, bus coach, cellar basement, garden yard, surgery operation
 operate surgeon, smoke cigarette tobacco, vegetarian veggie, raise keep, caretaker janitor, digit
 figure number code combination, rehearse rehearsal practise practice, due deadline submit expire,
 expire valid run out, hire rent rental lease, landlord landlady, hurt ache pain sore, shirt jersey
 kit, laundry washing wash, guest visitor, exam test, lecture lecturer professor, student pupil
 classmate, retire pension, resign quit stop, lady woman, guy man, grow raise childhood upbringing,
 spare extra, shade colour paint, mad angry, fragrance smell scent, glasses spectacle optician,
 power electricity electric, light lamp bulb, tap faucet, sweet candy, biscuit cookie, soup broth,
 rug carpet, curtain blind, cupboard closet wardrobe cabinet, shelf bookcase, box crate carton, bag
 purse handbag backpack rucksack, wallet purse, lorry truck, lift elevator, pavement sidewalk, shop
 store, bakery baker bread, butcher meat, chemist pharmacy drugstore, plumber plumbing, band music
 musician, game match, coach trainer, gym workout, race marathon, jog run, swim swimmer, ski skiing
 skier, hen chicken, rabbit bunny, dog puppy, cat kitten, horse pony, novel book story, song tune
 melody, photo painting portrait image picture, joke funny, quarrel argue argument fight, promise
 swear, win victory, prize award, dusk sunset, kit equipment, rule law, save saving, buyer sell buy
 purchase, handle care charge, run charge manage lead head, lead leader head chair, founder found
 establish open, theft steal thief rob, burn fire, flood overflow, leak drip, jam stuck block,
 crack break, tear rip, cut trim, build construct builder, design designer architect, invent
 inventor, depth deep, width wide breadth broad, death die, strength strong, warmth warm, choice
 choose, growth grow, loss lose, sale sell, belief believe, thought think, proof prove, speech
 speak, soak steep, glue paste, supper dinner, holiday vacation leave
! centimetre cm, kilo kg kilogram, kilometre km, tall taller tallest, short shorter shortest, heavy
 heavier heaviest, big bigger biggest, long longer longest, high higher highest, wide wider widest,
 deep deeper deepest, fast faster fastest, cheap cheaper cheapest, small smaller smallest, large
 larger largest, young younger youngest, child children, man men, woman women, foot feet, tooth
 teeth, mouse mice, person people, wife wives, knife knives, live lives, leave leaves left leaving,
 go went gone goes, get got gotten, give gave given, take took taken, come came, see saw seen, meet
 met, teach taught, write wrote written, eat ate eaten, drink drank drunk, drive drove driven, fly
 flew flown flies, speak spoke spoken, keep kept, break broke broken, lose lost, sell sold, pay
 paid, grow grew grown, sleep slept, sing sang sung, swim swam, run ran running, win won, find
 found, build built, choose chose chosen, wear wore worn, ride rode ridden, hide hid hidden, hang
 hung, know knew known, send sent, think thought, steal stole stolen, wake woke, fall fell fallen,
 hold held, tell told, say said, become became, begin began begun, bring brought, catch caught,
 draw drew drawn, feel felt, fight fought, lend lent, lay laid, ring rang rung, spend spent, stand
 stood, sweep swept, throw threw thrown, buy bought, make made, do did done does doing, have had
 has, learn learnt, burn burnt, dream dreamt, lead led, feed fed, die died dies dying, lie lied
 lying lies, tie tied, deal dealt, mean meant, dig dug, freeze froze frozen, light lit, shoot shot,
 rise rose risen, shake shook shaken, strike struck, swear swore sworn, tear tore torn, bend bent,
 spill spilt, stick stuck, shine shone, wind wound, bind bound, breed bred, spoil spoilt, bear
 bore, blow blew blown, show shown, forgive forgave forgiven, old oldest eldest elder older, bite
 bitten, forget forgot forgotten, television tv, favourite fav fave favorite, birthday bday,
 christmas xmas, appointment appt, colour color, mum mom mommy, possess owns owned, programme
 program, dish dishes, heißen heißt heiße hieß, fahren fährt fuhr, sein ist war, mögen mag magst,
 essen isst gegessen, vivir vive vivo vives, nacer nació nací naciste, llamar llama llamo llamas,
 trabajar trabaja trabajo trabajas, costar cuesta cuestan, dormir duerme duermo, salir sale, avoir
 ai as a, naître né née, appeler appelle appelles, vivre vis vit, tengo tiene tienes
colour color farbe couleur: red orange yellow green blue purple violet pink brown black white grey
 gray gold silver beige turquoise blonde dark light mint teal rot gelb grün blau lila rosa braun
 schwarz weiß grau dunkelgrün hellblau rojo amarillo verde azul morado negro blanco gris rouge
 jaune vert bleu noir blanc, pet animal haustier tier mascota: bee cat dog hamster rabbit parrot
 horse pony canary turtle tortoise goldfish fish mouse snake lizard bird budgie gerbil ferret
 kitten puppy hen chicken cow goat sheep donkey ewe, sibling: brother sister, sibling hermano:
 hermano hermana, hija: hija hijo, weekend: saturday sunday, saturday sunday: weekend, son: boy,
 daughter: girl, girl: daughter, boy: son, child kid: son daughter, open unlock: code password pin
 combination key passcode, money cost price pay: euro dollar franc pound cent penny crown quid buck
 grand, spouse partner: husband wife marry, wife husband: marry, relative family: mother father
 brother sister aunt uncle cousin niece nephew son daughter grandmother grandfather grandma grandpa
 wife husband child, parent: mother father mum dad mom, instrument: piano guitar violin cello flute
 trumpet drum clarinet saxophone oboe harp viola accordion organ trombone bass ukulele banjo
 recorder keyboard bassoon horn, sport: football soccer tennis basketball volleyball hockey golf
 rugby cricket badminton swimming running climbing judo karate boxing rowing sailing cycling skiing
 handball squash fencing yoga, drink beverage: tea coffee water milk juice wine beer cola lemonade
 cocoa chocolate whisky gin, bird: parrot budgie canary chicken hen duck goose pigeon sparrow owl,
 fruit: apple pear banana orange cherry plum grape strawberry raspberry melon peach apricot mango,
 vegetable: carrot potato tomato onion cabbage spinach pea bean leek cucumber pumpkin broccoli,
 food dish meal: pizza pasta rice soup bread cheese lasagne curry salad cake sushi stew risotto
 noodle egg meat fish potato pancake porridge burger sandwich dumpling spaghetti paella, language:
 english german french italian spanish portuguese dutch danish swedish norwegian finnish russian
 polish czech greek turkish arabic hebrew chinese japanese korean hindi latin hungarian ukrainian,
 vehicle: car bike bicycle bus train tram van truck lorry motorbike scooter, limb: arm leg hand
 foot knee elbow shoulder hip ankle wrist finger toe eye ear tooth, season: spring summer autumn
 winter fall, flower: rose tulip daisy lily sunflower orchid daffodil, tree: oak apple birch pine
 cherry fir maple willow, time: quarterly fortnightly nightly hourly after afternoon always april
 august autumn before birthday breakfast century christmas clock daily dawn day december dinner
 dusk easter evening every february friday hour january july june lunch march may midday midnight
 minute monday month monthly morning never night noon november oclock october saturday second
 september since spring summer sunday sunrise sunset thursday today tomorrow tonight tuesday until
 wednesday week weekend weekly when winter year yearly yesterday uhr montag dienstag mittwoch
 donnerstag freitag samstag sonntag januar februar märz mai juni juli oktober dezember morgen abend
 mittag täglich jahr lunes martes miércoles jueves viernes sábado domingo enero febrero marzo abril
 mayo junio julio agosto septiembre octubre noviembre diciembre mañana tarde noche lundi mardi
 mercredi jeudi vendredi samedi dimanche janvier février mars avril juin juillet août septembre
 octobre novembre décembre heure matin soir midi, unit: second minute hour day week month year
 metre meter kilometre mile centimetre foot inch page degree percent litre gram kilo ton pound acre
 jahr tag stunde woche año día hora semana an jour heure semaine, place: abroad attic avenue cellar
 city country downstairs here home inside kitchen lane outside road square street town upstairs
 village, person: aunt boss boy boyfriend brother child colleague cousin dad daughter dentist
 doctor electrician everybody father friend girl girlfriend grandfather grandma grandmother grandpa
 husband lawyer man mom mother mum neighbour nephew niece nobody nurse parents partner people
 person plumber sister son teacher uncle wife woman mutter vater bruder schwester freund nachbarin
 madre padre hermano hermana amigo mère père frère sœur ami, number: couple dozen eight eighteen
 eighty eleven fifteen fifty five forty four fourteen half hundred million nine nineteen ninety
 once one seven seventeen seventy six sixteen sixty ten thirteen thirty thousand three twelve
 twenty twice two zero first third fourth fifth ein eins zwei drei vier fünf sechs sieben acht neun
 zehn elf zwölf uno dos tres cuatro cinco seis siete ocho nueve diez doce deux trois quatre cinq
 sept huit neuf dix onze douze, since: since until till til seit bis desde hasta depuis, reason:
 because since so for to weil denn um porque para parce pour, aged: age edad old turn alt ans años,
 work: job employ profession teach drive study, opposite: like/hate love/hate dislike/like
 open/close left/right hot/cold on/off in/out first/last next/last old/new before/after
 arrive/leave start/end begin/end begin/finish morning/evening north/south east/west big/small
 up/down full/empty buy/sell married/single home/away front/back
own me.en: my our mine ours, mein meine meinen meinem meiner meines unser unsere unserem, mi mis
 nuestro nuestra, mon ma mes notre nos, subject me.en: i we, ich wir, yo nosotros, je j nous, which
 question.en: what which, welche welcher welches welchen welchem was, qué cuál cuáles, quel quelle
 quels quelles, indefinite det.en: a an some, ein eine einen, un una, un une, prep function.en: at
 by from in into off on onto over through to under with for of about until till til since during
 after against among beneath beyond despite throughout toward towards underneath upon via per, in
 im an am auf aus bei mit nach von vom zu zum zur für über unter vor, en de a con por para sobre,
 de à au en dans avec pour sur sous par chez, opening function.en: hi hey hello oh ok okay well so
 and but please now then btw also just yes right again, und aber bitte, y pero sí, et mais, lost
 frame.en: forgot forgotten wonder wondering idea clue, vergessen, olvidé, advice aux.en: should
 shall could would, idle frame.en: forget give know remember remind say tell, tells function.de:
 dass, que, function.en: ago all already always another anybody anyone anything apart aside as be
 because been certainly definitely either else especially even everyone except few further hardly
 herself himself however indeed itself least mainly mostly neither normally ourselves otherwise
 particularly probably recently several simply somehow sometimes somewhere soon themselves
 therefore upon usually various wherever whenever being best better bit both currently doing done
 down ever everything exactly having here hers him kind let lot lots many matter maybe might more
 most much often one ones only or other ought out perhaps quite rather really same somebody someone
 something sort still such than theirs them thing things today too type up very whatever while
 wrong yet hm moment left, oder sich euch unseren unserer ihren ihrem seinen seinem wurde werden
 hatte können um auch noch schon sehr da wenn so als denn mal viel viele gegen jetzt man seit bis
 alle, unos unas o él ella se era estás fue ni muy ya también lo le esta este eso ese como más, ou
 on se était été aux c cette ces y très plus aussi d qu, me.en: me us myself, mich mir uns, me nos
 soy estoy tengo, me m moi, you.en: you your yours yourself, du dich dir dein deine deinen deinem
 deiner, tú te tu tus eres, tu te t toi ton ta tes vous votre vos, other.en: his her their its,
 sein seine ihr ihre, su sus, son sa ses, det.en: the this that these those any no each every, der
 die das den dem des einem einer eines, el la los las del al, le la les des l du, prep.en: above
 across along around behind below beside between inside near next opposite outside, hinter neben
 zwischen, bajo debajo detrás junto, derrière, not.en: not no never nobody nothing none neither nor
 without cannot, nicht kein keine keinen nie nichts, no nunca nada nadie, pas jamais rien ne n,
 aux.en: am is are was were do does did can will have has had may must, bin bist ist sind war waren
 habe hast hat haben kann kannst wird muss darf, es está son están soy estoy eres tengo tiene hay
 ha he puede, est es sont suis ai as a ont peut, question.en: who whom whose where when why how,
 wer wem wen wessen wo wann warum wieso wie wohin woher wogegen womit, quién quiénes dónde cuándo
 cómo cuánto cuánta cuántos cuántas, qui que quoi où quand comment combien pourquoi, pronoun.en:
 there it he she they this, es er sie das, pronoun.fr: il elle ce, leans.en: he she it they him
 them his her its their then but and so, idle.en: able ask be big think come dear find folk get go
 good got guy happen have high keep little long look lovely make man mean need new nice originally
 own part person put take try use usual usually way whole, machen gehen kommen, hacer, faire
calls_me.en: i_am i'm im call_me, ich_bin nenn_mich, soy llámame, je_suis appelle_moi, courtesy.en:
 please, bitte, por_favor, s'il_te_plaît, of.en: of, von vom, de del, de du d, sorry.de: Das tut
 mir leid, Lo siento, Je suis désolé, pleased.de: Das freut mich, Me alegro, Cela me fait plaisir,
 waves_off.en: never_mind too_bad no_idea okay ok oh ah thanks thank_you whatever anyway i_see pity
 shame hm, egal schade keine_ahnung danke ach_so, no_importa da_igual gracias vale, tant_pis merci
 peu_importe, asks.name.en: name names named called nickname, name heißt heiße heißen, llama llamo
 llaman nombre, appelle appelles nom, asks.job.en: job profession occupation breed brand
 for_a_living for_work as_what do_$, als_was von_beruf beruf, en_qué_trabaja en_qué_trabajo
 de_qué_trabaja profesión, quel_métier métier profession, asks.reason.en: why how_come, warum
 wieso, por_qué, pourquoi, asks.age.en: how_old age, wie_alt, qué_edad cuántos_años edad, quel_âge,
 asks.span.en: how_long since_when until_when till_when til_when how_many_years how_many_months
 how_many_weeks how_many_days how_many_hours how_many_minutes since_which, wie_lange seit_wann
 bis_wann, cuánto_tiempo desde_cuándo, combien_de_temps depuis_quand, asks.time.en: how_often when
 what_time which_time what_day which_day what_date which_date what_month which_month what_hour
 which_weekday what_day_of_the_week which_day_of_the_week birthday date_of time_of, wann wie_oft
 wie_viel_uhr welchem_tag welchen_tag geburtstag, cuándo qué_hora qué_día qué_fecha cumpleaños,
 quand quelle_heure quel_jour quelle_date anniversaire, asks.year.en: what_year which_year,
 welchem_jahr, qué_año, quelle_année, asks.number.en: how_many, wie_viele, cuántos cuántas,
 combien_de, asks.amount.en: how_much how_far cost costs price fee, wie_viel wie_weit kostet,
 cuánto cuánta cuesta, combien coûte, asks.measure.en: how_tall how_heavy how_high how_big how_wide
 how_deep how_thick how_hot how_cold how_fast how_strong how_large what_temperature, wie_groß
 wie_schwer wie_hoch wie_tief, asks.place.en: where address what_city which_city what_town
 which_town what_country which_country which_street which_room which_shop which_village what_place
 which_place which_building, wo wohin woher welcher_stadt adresse, dónde qué_ciudad dirección, où
 quelle_ville adresse, asks.person.en: who whom whose, wer wem wen wessen, quién quiénes, qui
unreal.en: promised promises dreamed dreamt dream thinking_of learning says going_to meant_to
 supposed_to tried_to forgot except apart_from other_than not_sure unsure think thinks thought
 guess suppose supposedly apparently believe seems said_that says_that heard_that used_to stopped
 quit almost nearly doubt if unless would wanted wants want hope hopes plan will shall might may
 maybe perhaps wish never former, früher fast wenn würde möchte werde vielleicht bezweifle, solía
 casi si quería quizás, presque si voulais, changed.en: now new no_longer anymore instead renamed
 changed moved altered shifted swapped postponed rescheduled switched replaced these_days, jetzt
 nun neu neue, ahora nuevo, maintenant nouveau, opening.en: don't_forget_that dont_forget_that
 do_not_forget_that don't_forget dont_forget remember_that um uh kindly lets let's by_the_way
 actually listen sorry excuse_me quick_question no nope yeah wait you_know_what guess_what fyi
 correction i_mean good_morning good_evening thanks say for_your_information anyway, hallo hi also
 ja nein übrigens sag, hola oye por_favor, bonjour salut oui non est_ce_que dis, frame.en: told
 recall said show mention mentioned mind note, weißt weiß sagen sag erinnere erinnerst, sabes dime
 recuerdas recuérdame, sais dis rappelle, lost.fr: oublié, tells.en: that, tells.fr: que,
 whether.en: if whether, ob, si, si, wanted.en: name birthday age address number code password pin
 colour color size date time price, name nummer passwort adresse, nombre número contraseña, nom
 numéro, advice.en: might, soll sollte, debo, dois, forget.en: forget, vergiss, olvida, oublie,
 yes.en: Yes, Ja, Sí, Oui, no.en: No, Nein, No, Non, said.de: Du hast mir gesagt, Me dijiste, Tu
 m'as dit, unknown.de: Das weiß ich noch nicht, Eso no lo sé todavía, Je ne le sais pas encore,
 kept.de: Ich merke es mir, Lo guardo, Je le retiens
day.en: today/0 tonight/0 this_morning/0 this_afternoon/0 this_evening/0 tomorrow/1 yesterday/-1
 last_night/-1 the_day_after_tomorrow/2 the_day_before_yesterday/-2, heute/0 morgen/1 gestern/-1
 übermorgen/2 vorgestern/-2, hoy/0 mañana/1 ayer/-1 anteayer/-2, aujourd'hui/0 demain/1 hier/-1,
 weekday.en: monday/0 tuesday/1 wednesday/2 thursday/3 friday/4 saturday/5 sunday/6, montag/0
 dienstag/1 mittwoch/2 donnerstag/3 freitag/4 samstag/5 sonntag/6, lunes/0 martes/1 miércoles/2
 jueves/3 viernes/4 sábado/5 domingo/6, lundi/0 mardi/1 mercredi/2 jeudi/3 vendredi/4 samedi/5
 dimanche/6, month.en: january/1 february/2 march/3 april/4 may/5 june/6 july/7 august/8
 september/9 october/10 november/11 december/12 jan/1 feb/2 mar/3 apr/4 jun/6 jul/7 aug/8 sep/9
 sept/9 oct/10 nov/11 dec/12, januar/1 februar/2 märz/3 april/4 mai/5 juni/6 juli/7 august/8
 september/9 oktober/10 november/11 dezember/12, enero/1 febrero/2 marzo/3 abril/4 mayo/5 junio/6
 julio/7 agosto/8 septiembre/9 octubre/10 noviembre/11 diciembre/12, janvier/1 février/2 mars/3
 avril/4 mai/5 juin/6 juillet/7 août/8 septembre/9 octobre/10 novembre/11 décembre/12, span.en:
 days/d day/d weeks/w week/w months/m month/m years/y year/y, tagen/d tage/d tag/d wochen/w woche/w
 monaten/m monate/m monat/m jahren/y jahre/y jahr/y, días/d día/d semanas/w semana/w meses/m mes/m
 años/y año/y, jours/d jour/d semaines/w semaine/w mois/m années/y année/y ans/y an/y, count.en:
 a/1 an/1 one/1 two/2 three/3 four/4 five/5 six/6 seven/7 eight/8 nine/9 ten/10 eleven/11 twelve/12
 a_couple_of/2 half_a_dozen/6 twenty/20 thirty/30 hundred/100, eine/1 einem/1 einer/1 ein/1 zwei/2
 drei/3 vier/4 fünf/5 sechs/6 sieben/7 acht/8 neun/9 zehn/10, una/1 un/1 dos/2 tres/3 cuatro/4
 cinco/5 seis/6 siete/7 ocho/8 nueve/9 diez/10, une/1 un/1 deux/2 trois/3 quatre/4 cinq/5 six/6
 sept/7 huit/8 neuf/9 dix/10, nth.en: first/1 second/2 third/3 fourth/4 fifth/5 sixth/6 seventh/7
 eighth/8 ninth/9 tenth/10 eleventh/11 twelfth/12 twentieth/20 thirtieth/30, side.en: last/-1
 past/-1 previous/-1 next/1 coming/1 this/0, letzten/-1 letzte/-1 vorige/-1 nächsten/1 nächste/1
 kommenden/1 diesen/0 diese/0, pasado/-1 pasada/-1 próximo/1 próxima/1 este/0 esta/0, dernier/-1
 dernière/-1 prochain/1 prochaine/1 cette/0 ce/0, past.en: am/was is/was are/were has/had have/had
 do/did does/did will/would can/could leaves/left leave/left comes/came come/came begins/began
 starts/started goes/went go/went gets/got get/got takes/took i'm/I_was we're/we_were it's/it_was
 he's/he_was she's/she_was they're/they_were, bin/war ist/war sind/waren habe/hatte hat/hatte
 haben/hatten, soy/era es/era son/eran está/estaba tengo/tenía tiene/tenía, suis/étais est/était
 sont/étaient ai/avais a/avait
refers.en: he she it they him them his her its their, er ihn ihm sein seine seinem seinen, él ella,
 il elle ils elles, stands.en: one ones, differs.en: other, andere anderen anderer anderes, otro
 otra, autre, former.en: before old former formerly previous previously originally at_first used_to
 in_the_past before_that, früher vorher alte alten altes, antes antiguo antigua, avant ancien
 ancienne, ended.en: any_more anymore no_longer gave given returned brought_back repaired fixed
 healed recovered sold away quit cancelled lost threw got_rid stopped broke died, nicht_mehr
 kein_mehr verkauft gekündigt, ya_no vendí vendimos, ne_plus vendu, corrects.en: no nope actually
 sorry wait correction i_mean i_meant rather oops wrong mistyped misspelt out_of_date put_it_off
 mistake i_am_mistaken i'm_mistaken i_was_wrong my_mistake, nein doch ich_meine, no perdón
 quiero_decir, non pardon je_veux_dire, goes_on.en: and what_about how_about, und was_ist_mit, y,
 et, says.en: say said saying tell told telling mention mentioned, sagte gesagt erzählt, dije dicho
 contado, dit raconté, lately.en: just last, gerade zuletzt, última último, dernier dernière,
 about.en: know_about tell_me_about know_of tell_me_all_about remember_about say_about
 tell_me_everything_about tell_me_everything_you_know_about tell_me_all_you_know_about
 tell_me_what_you_know_about know_everything_about, über, sobre, sur, todo.en: todo to_do
 have_to_do left_to_do, list.en: list lists, liste, lista, liste, puts.en: put add write note
 include, setz setze schreib, pon añade apunta, mets ajoute, clears.en: clear empty wipe, leere,
 vacía, vide, strikes.en: cross strike take remove delete tick drop scratch, streich streiche,
 quita tacha, enlève raye, done.en: done bought packed finished paid sent booked got ordered,
 erledigt gekauft, hecho comprado, fait acheté, more.en: heaviest oldest biggest largest tallest
 longest highest widest deepest fastest dearest most latest heavier older bigger larger taller
 longer higher wider deeper faster dearer more later, schwerer älter größer länger teurer, less.en:
 lightest youngest smallest shortest lowest narrowest cheapest slowest least fewest earliest
 lighter younger smaller shorter lower narrower cheaper slower less fewer earlier, leichter jünger
 kleiner kürzer billiger, sums.en: together altogether total, zusammen insgesamt, juntos juntas
 total, ensemble total, corrects.en: scrap_that scratch_that, reckons.en: calculate compute sum
 makes equal equals much reckon result, request.en: write help make recommend suggest explain
 translate sing play draw find set send look compose invent advise tell give say teach show read
 describe entertain cheer choose pick correct, wants.en: need want like love, given.en: story poem
 joke riddle recipe name idea tip tips advice help excuse game limerick twister speech verse song
 letter, duty.en: have_to has_to need_to got_to must remind_me_to let_me_forget_to forget_to, muss,
 tengo_que debo, dois, birth.en: born birthday, geboren, nacido nací nació, né née, added.en: more
 another extra, weitere, otro otra más, encore autre
ago.en: ago, vor, hace, il_y_a, ahead.en: in within, in, en dentro_de, dans, reckon.en: plus/+
 and_add/+ added_to/+ minus/- less/- take_away/- times/* multiplied_by/* divided_by// over//
 percent_of/%, plus/+ minus/- mal/* geteilt_durch// prozent_von/%, más/+ menos/- por/* entre//
 dividido_por//, plus/+ moins/- fois/* divisé_par//, until.en: since until till til from by, seit
 bis ab, desde hasta, depuis dès, joins.en: and but so because since while when though although
 until unless, und aber denn weil als während obwohl, y pero porque cuando mientras aunque, et mais
 car parce quand pendant, is.en: am is are was were, bin bist ist sind war waren, es está son están
 soy eres era, es est sont suis était, agenda.en: happen happened happening plan plans planned
 going scheduled, dated.en: on in, am im, el en, le en
sad.en: died dies dying dead death funeral buried grief cancer hospital surgery diagnosed ill sick
 hurt hurts pain crying cry cried lonely alone scared afraid worried anxious sad depressed miss
 misses divorce divorced fired failed lost stolen awful terrible worst horrible empty guilty
 ashamed exhausted stressed nightmare accident crash headache angry furious shouted dumped rejected
 cheated upset hate panic homesick bullied betrayed evicted sacked grieving widow widower dementia
 stroke miscarriage suicidal abused hopeless, traurig gestorben tot krank einsam angst verloren
 müde wütend, triste murió muerto enfermo enferma miedo perdí cansado cansada, triste mort morte
 malade peur perdu fatigué fatiguée, glad.en: happy glad won engaged pregnant promoted promotion
 wonderful lovely excited proud celebrate celebrated congratulations yay benign joy scored hired
 accepted prize cured remission recovered sober laughed danced dancing sang amazing brilliant
 fantastic awesome hooray graduated succeeded pleased delighted thrilled grateful relieved adopted
 praised, glücklich froh gewonnen bestanden schwanger verliebt, feliz contento contenta gané
 embarazada, heureux heureuse content contente gagné enceinte
short.en: 'm/am 're/are 've/have 'll/will 'd/would whats/what_is wheres/where_is whos/who_is
 hows/how_is whens/when_is shes/she_is hes/he_is theyre/they_are im/i_am ive/i_have dont/do_not
 doesnt/does_not didnt/did_not isnt/is_not arent/are_not cant/can_not can't/can_not won't/will_not
 wont/will_not thats/that_is theres/there_is wasnt/was_not teh/the u/you ur/your wher/where
 waht/what wat/what, short.fr: j'/je l'/le d'/de qu'/que c'/ce m'/me s'/se n'/ne t'/te, ending.en:
 ies/i ied/i y/i ss/ss us/us is/is ing ed es s e, en er es em et te ten st n e s t, os/o as/a es s,
 es ées ée és er ez ent e s é, silent.en: ing/e ed/e es/e e/e, turn.en: i/you we/you me/you us/you
 my/your our/your mine/yours ours/yours myself/yourself ourselves/yourselves i'm/you_are
 i've/you_have i'll/you_will i'd/you_would im/you_are ive/you_have am/are we're/you_are
 we've/you_have we'll/you_will we'd/you_would your/my yours/mine yourself/myself you're/I_am
 you've/I_have you'll/I_will you'd/I_would, mein/dein meine/deine meinen/deinen meinem/deinem
 meiner/deiner meines/deines unser/euer bin/bist habe/hast ich/du mich/dich mir/dir, mi/tu mis/tus
 soy/eres estoy/estás tengo/tienes vivo/vives trabajo/trabajas nací/naciste me/te llamo/llamas
 yo/tú nuestro/vuestro nuestra/vuestra, mon/ton ma/ta mes/tes suis/es ai/as je/tu j'ai/tu_as me/te
 m'appelle/t'appelles notre/votre nos/vos
holds.en: with, mit, con, avec, asks.code.en: code pin number combination passcode password, code
 nummer passwort kennwort pin, código número contraseña, code numéro mot_de_passe
"""


class Reply(NamedTuple):
    """What was said and where it came from: "memory", "quote", "exchange", "voice", "tool", or
    "nothing"."""

    text: str
    source: str
    entry: Optional[Entry] = None
    score: float = 0.0
    entries: Tuple[Entry, ...] = ()


class Recall(NamedTuple):
    """An entry that fits, what would be said from it, how well it fits (0 to 1), and its words."""

    score: float
    entry: Entry
    answer: str
    told: str = ""
    others: Tuple[Entry, ...] = ()
    quote: str = ""


# words


class Word(NamedTuple):
    """A word as it stands, without case, without accents and ending, and its closed classes."""

    text: str
    word: str
    stem: str
    classes: AbstractSet[str]


class Lexicon:
    """What is known of words: relations, kinds, odd forms, and the closed classes by language."""

    def __init__(self, table: str) -> None:
        self.odd: Dict[str, str] = {}
        self.forms_of: Dict[str, List[str]] = defaultdict(list)
        self.mates: Dict[str, List[str]] = defaultdict(list)  # of a relation or a kind
        self.senses: Dict[str, Set[str]] = defaultdict(set)
        self.kinds: Dict[str, Set[str]] = defaultdict(set)
        self.rivals: Dict[str, List[Set[str]]] = defaultdict(list)  # opposites, others of a kind
        self.closed: Dict[str, Dict[str, Set[str]]] = defaultdict(lambda: defaultdict(set))
        self.phrases: Dict[Tuple[str, str], Dict[str, List[Tuple[str, ...]]]] = defaultdict(
            lambda: defaultdict(list))  # of a kind and a language, by their first words
        self.pairs: Dict[Tuple[str, str], Dict[str, str]] = defaultdict(dict)
        groups = list(_word_groups(table))
        for name, words in groups:
            kind, _, language = name.partition(".")
            if name == "!":
                self.odd.update(dict.fromkeys(words[1:], words[0]))
                self.forms_of[words[0]] += words[1:]
            elif kind in _PAIRED:
                self.pairs[kind, language].update(
                    word.replace("_", " ").partition("/")[::2] for word in words)
        self.endings = {language: re.compile(f"(.{{3,}}?)({'|'.join(map(re.escape, pairs))})")
                        for (kind, language), pairs in self.pairs.items() if kind == "ending"}
        for number, (name, words) in enumerate(groups):
            self._take(f"{name}{number}", name, words)
        self.months = {month for kind, language in [*self.pairs] if kind == "month"
                       for month in self.pairs[kind, language]}
        self.dates = functools.lru_cache(None)(functools.partial(_date_forms, self))
        self.dated = functools.lru_cache(1 << 10)(
            lambda text: bool(days_in(self, text, datetime.date(2000, 1, 1))))
        joints = "|".join(sorted({word for words in self.closed.values() for word in words
                                  if words[word] >= {"joins", "opening"}}))  # and, but, mais
        self.joints = re.compile(rf",(?: (?:{joints}))? | (?:{joints}) ", re.I)
        self.loose = self.stems(("time", "place", "unit", "number", "work", "since", "reason"))
        self.known = {*self.senses, *self.kinds}.union(*self.kinds.values())
        self.spoken = self._languages()
        for pair in self.pairs["opposite", ""].items():
            for one, other in (pair, pair[::-1]):
                self.rivals[self.stem(one, "en")].append({self.stem(other, "en")})
        for name in self.kinds.keys() - self.loose:
            for stem in self.kinds[name]:
                self.rivals[stem].append(self.kinds[name])
        self.opened = functools.lru_cache(1 << 9)(functools.partial(opened, self))
        self.line = functools.lru_cache(1 << 8)(functools.partial(Line, self))

    def _languages(self) -> Dict[str, List[str]]:
        """Return the languages that words speak for, twice where one is a function word alone."""
        spoken: Dict[str, List[str]] = defaultdict(list)
        for language in self.endings:
            closed, short = self.closed[language], self.pairs["short", language]
            for word in {w for w in closed if not closed[w] <= _PAIRED}.union(short):
                sure = word in short or "function" in closed[word] and word not in self.known
                spoken[word].extend([language] * (1 + sure))
        return spoken

    def _take(self, sign: str, name: str, words: Sequence[str]) -> None:
        kinds, dot, language = name.rpartition(".")
        if name in "=~":
            self.mates[sign].extend(words)
            for stem in self.stems(words):
                self.senses[stem].add(sign)
        elif dot:
            for word, kind in itertools.product(words, kinds.split()):
                self.closed[language][word] |= {kind, "function"} if kind in _FUNCTIONS else {kind}
                phrase = tuple(word.split("_"))
                self.phrases[kind, language][phrase[0]].append(phrase)
        elif name != "!":
            for stem in self.stems(name.split()) | set(name.split()):
                self.kinds[stem] |= self.stems(words)
                self.mates["kind " + stem].extend(words)

    def stems(self, words: Iterable[str]) -> Set[str]:
        """Return the stems of words of any language."""
        return {self.stem(word, language) for word in words for language in self.endings}

    def stem(self, word: str, language: str) -> str:
        """Return a word without accents and the commonest endings of its language."""
        word, back = _unmarked(self.odd.get(word, word)), ""
        ended = self.endings[language].fullmatch(word) if language in self.endings else None
        if ended:  # by the longest ending that leaves three letters
            word = ended[1] + self.pairs["ending", language][ended[2]]
            back = self.pairs["silent", language].get(ended[2], "")
        if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz":
            return word[:-1]  # stopp(ed)
        return word + back if back and _SHORT.fullmatch(word) else word

    @functools.lru_cache(1 << 12)
    def word(self, text: str, language: str) -> Word:
        """Return a word of a language with what is known of it."""
        word, closed = text.casefold(), self.closed[language]
        classes = closed.get(word) or (  # going and gone are as idle as go
            closed.get(self.odd.get(word, word), _NONE) & {"idle"})
        return Word(text, word, self.stem(word, language), frozenset(classes))

    def are_rivals(self, one: Word, other: Word, of_kind: bool = True) -> bool:
        """Return whether two words are opposites or, if that counts, of one kind."""
        return any(other.stem in rivals for rivals in self.rivals.get(one.stem, ())
                   if of_kind or len(rivals) == 1)

    @functools.lru_cache(1 << 12)
    def nearness(self, asked: Word, told: Word) -> int:
        """Return how two words are near: 4 the same, 3 one relation, 2 of the kind, 1 alike, 0."""
        a, b = asked.stem, told.stem
        if asked.word == told.word:
            return 4
        if "former" in asked.classes & told.classes:
            return 3
        if a == b:  # as it does for who types no accents
            return 4
        if self.senses.get(a, _NONE) & self.senses.get(b, _NONE):
            return 3
        if b in self.kinds.get(a, ()):
            return 2
        if not _NUMBERED.isdisjoint(a + b):  # room 12 is not room 14
            return 0
        same, (short, long) = len(os.path.commonprefix([a, b])), sorted((len(a), len(b)))
        alike = same >= STEM_CHARS and long - same < 4 or 4 <= same == short and (
            long - same < 3 or short > STEM_CHARS)
        return int(not (a in self.known and b in self.known) and (
            alike or a not in self.known and _one_slip(a, b)))

    @functools.lru_cache(1 << 8)
    def forms(self, word: Word) -> List[str]:
        """Return how a word is looked for, its own form first, then mates and members."""
        signs = [*sorted(self.senses.get(word.stem, ())), "kind " + word.stem]
        found = [form for text in (word.word, word.stem, *(
            mate for sign in signs for mate in self.mates.get(sign, ())))
            for form in self.endings_of(text)]
        return list(dict.fromkeys(found))[:MOST_FORMS]

    def endings_of(self, text: str) -> List[str]:
        """Return how a word alone is looked for, without mates and members."""
        plain = " ".join(folded_words(text))
        odd = self.forms_of.get(self.odd.get(text, text), [])
        if " " in plain or not _NUMBERED.isdisjoint(plain):
            return [plain]
        if len(plain) > 4 or not plain.isascii():
            return [(plain[:-1] if plain[-1:] in "yei" else plain)[:STEM_CHARS] + "*", *odd]
        ends = ("", "s", "e", "es", "d", "ed", "ing", "y", plain[-1:] + "ing", plain[-1:] + "ed")
        hoping = [plain[:-1] + "ing"] * plain.endswith("e")
        return [*(plain + end for end in ends), *hoping, *odd]

    def phrase_at(self, words: Sequence[str], at: int, kind: str, language: str) -> int:
        """Return how many words from a place on are a phrase of a kind; 0 if none is."""
        begun = self.phrases[kind, language].get(words[at], ()) if at < len(words) else ()
        return max((len(phrase) for phrase in begun
                    if tuple(words[at:at + len(phrase)]) == phrase), default=0)

    def past(self, language: str) -> AbstractSet[str]:
        """Return the words that say of a sentence that it tells of what was."""
        return frozenset(self.pairs["past", language].values())

    def language_of(self, words: Sequence[str]) -> str:
        """Return the language that has most of the words in its closed classes: l'ami, it's."""
        heads = [w.partition("'")[0] + "'" for w in words if "'" in w]
        counts = Counter(itertools.chain.from_iterable(
            self.spoken.get(w, ()) for w in (*words, *heads) if len(w) > 1))  # 20 l/min
        if len(words) < 2 or max(counts.values(), default=0) < 2:
            counts.clear()  # a hat is English, and so is a bin, as long as nothing else speaks
        return max(self.endings, key=counts.__getitem__)


_NONE: AbstractSet[str] = frozenset()
_NO_WORD = Word("", "", "", _NONE)
_NEXT_LANGUAGE = {".en": ".de", ".de": ".es", ".es": ".fr"}
_NUMBERED = frozenset("0123456789")  # what holds one of these has no other forms
# A syllable that doubles its last letter before an ending: hop is in hopping, and hope in hoping.
_SHORT = re.compile("[^aeiouy]*[aeiou][^aeiouywxsz]")
_PAIRED = frozenset("ending silent turn short opposite day weekday month span count nth side past "
                    "reckon".split())
_FUNCTIONS = frozenset("det aux question me you own other not whether pronoun subject".split())


def _word_groups(table: str) -> Iterator[Tuple[str, List[str]]]:
    """Yield (sign or name, words) of each group; a line that begins with a space goes on."""
    for line in re.sub(r"\n +", " ", table).splitlines():
        sign = name = line[:1] if line[:1] in "=~!" else ""
        for group in re.split("[,|]", line[len(sign):]):
            if ":" in group:
                name, _, group = group.partition(":")
            elif not sign:
                name = name[:-3] + _NEXT_LANGUAGE.get(name[-3:], name[-3:])
            if group.split():  # an owner's line may hold only its sign
                yield name.strip(), group.split()


@functools.lru_cache(maxsize=4)
def lexicon(more: str = "") -> Lexicon:
    """Return what is known of words, with more lines of the same format."""
    return Lexicon(WORD_TABLE + more)


def lexicon_of(memory: Memory) -> Lexicon:
    """Return what is known of words, with the lines of word knowledge in the owner's corpus."""
    ids = memory.ids_holding([[WORDS_MARK]], 4 * MOST_HELD)
    return lexicon("".join(line + "\n" for entry in memory.entries_of(ids[::-1])
                           for line in entry.text.splitlines() if WORD_LINE.match(line)))


@functools.lru_cache(maxsize=1 << 12)
def _unmarked(text: str) -> str:
    """Return a casefolded text without accents; the vowel signs of other scripts are letters."""
    return text if text.isascii() else "".join(
        c for c in unicodedata.normalize("NFKD", text) if not "\u0300" <= c <= "\u036f")


def _one_slip(a: str, b: str) -> bool:
    """Return whether one slip of the finger leads from a to b."""
    at = len(os.path.commonprefix([a, b]))
    swapped = a[at + 1:at + 2] + a[at:at + 1] + a[at + 2:]
    return min(len(a), len(b)) > 3 and at > 0 and (
        b[at:] in (a[at + 1:], swapped) or b[at + 1:] in (a[at:], a[at + 1:]))


# A letter may carry marks; a sign of a script that leaves no spaces is a word.
_LETTER = (rf"(?:[^\W{UNSPACED}]|[\u0300-\u036f\u0591-\u05c7\u0610-\u061a\u064b-\u065f\u0670"
           r"\u06d6-\u06ed\u0900-\u0963\u0966-\u0dff\u200c\u200d])")
_WORD = re.compile(rf"[{UNSPACED}]|\d+[.,]\d+(?![\w.,:])|{_LETTER}+(?:['’]{_LETTER}+)*['’]?")
_STOP_SIGNS = ",;:.!?…–—"
_WORD_OR_STOP = re.compile(rf"{_WORD.pattern}|[{_STOP_SIGNS}](?=\s)")
_MARKER = re.compile(r"^[HA]:\s*")
_PERSONAL = frozenset(("me", "own", "subject", "you"))


def _words_in(lex: Lexicon, text: str) -> Tuple[List[Tuple[int, int]], List[str], str]:
    """Return where the words of a text stand, the words in small letters, and their language."""
    spans = [match.span() for match in _WORD.finditer(text)]
    words = [text[a:b].casefold().replace("’", "'") for a, b in spans]
    return spans, words, lex.language_of(words)


class Line:
    """A sentence taken apart: its words, whose they are, and which are names."""

    def __init__(self, lex: Lexicon, text: str, speaker: str = "") -> None:
        found = _WORD_OR_STOP.findall(text.replace("’", "'").replace("-in-law", "inlaw"))
        self.text, self.speaker = text, speaker
        self.language = lex.language_of([word.casefold() for word in found
                                         if word not in _STOP_SIGNS])
        self.words: List[Word] = []
        self.stops = {0}  # words before which the text stops, as at a comma
        if speaker:
            self.words = [lex.word(part, "") for part in _WORD.findall(speaker)]
        for piece in found:
            if piece in _STOP_SIGNS:
                self.stops.add(len(self.words))
                continue
            words = [lex.word(part, self.language) for part in self.parts_of(lex, piece)]
            if piece == "A" and len(self.words) not in self.stops:
                words = [words[0]._replace(classes=_NONE)]  # shaft A
            if speaker:  # whose "I" is not the owner's
                words = [word._replace(classes=word.classes - _PERSONAL) for word in words]
            self.words += words
        self.telling = [i for i in range(len(self.words)) if self._tells(i)]
        self.owners = [self._owner(i) for i in range(len(self.words))]
        self.caps = [word.text[:1].isupper() and "function" not in word.classes and (  # names
            i not in self.stops or word.stem not in lex.known) and (
            word.stem not in lex.kinds["time"])
            and not (word.text.isupper() and len(word.text) > STEM_CHARS)  # nor what is shouted
            for i, word in enumerate(self.words)]
        self.has: AbstractSet[str] = frozenset().union(*(word.classes for word in self.words))

    def parts_of(self, lex: Lexicon, piece: str) -> List[str]:
        """Return a piece between spaces as words: it's → it is, j'ai → je ai, Ann's → Ann 's."""
        short = lex.pairs["short", self.language]
        head, mark, tail = piece.partition("'")
        before, after = head.casefold() + "'", "'" + tail.casefold()
        if not mark or piece.casefold() in short:
            return short.get(piece.casefold(), piece).split()
        if after in short:
            return [head, short[after]]
        if before in short:
            return [short[before], *self.parts_of(lex, tail)]
        if tail == "t":
            return [head[:-1], "not"]
        if tail in ("", "s"):
            known = lex.closed[self.language].get(head.casefold(), _NONE)
            return [head, "is" if known & {"function", "wanted"} else "'s"]  # the code's 4711
        return [head + tail]

    def _owner(self, at: int) -> str:
        """Return whose the word at a place is: "my", "your", "other", a noun's stem, "the", ""."""
        for back in range(at - 1, max(-1, at - 4), -1):
            word = self.words[back]
            if word.word == "'s":
                return self.words[back - 1].stem
            for kind, name in (("own", "my"), ("you", "your"), ("other", "other"), ("det", "the")):
                if kind in word.classes:
                    return name
            if word.classes & {"prep", "aux", "function"}:
                return ""
        return ""

    def _tells(self, at: int) -> bool:
        """Return whether a word says what it is about; my right shoe has a right that does."""
        word, after = self.words[at], self.words[at + 1:at + 2]
        if word.word == "'s" or "function" not in word.classes:
            return word.word != "'s"
        return at > 0 and len(after) > 0 and word.classes <= {"function", "opening"} and bool(
            self.words[at - 1].classes & {"det", "own"}) and "function" not in after[0].classes

    def has_phrase(self, lex: Lexicon, kind: str) -> Set[str]:
        """Return the first words of the phrases of a kind that it holds."""
        words = [word.word for word in self.words]
        return {word for i, word in enumerate(words)
                if lex.phrase_at(words, i, kind, self.language)}


# when


class When(NamedTuple):
    """Days that a text names, the first and the last, where it does, and in which form."""

    first: datetime.date
    last: datetime.date
    start: int
    end: int
    form: str


# Ways to name days. A word in capitals stands for the words that the table has under that name, and
# a group is called as the pairs that tell its value.
_DATE_FORMS = (
    ("date", r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<nth>\d\d)"),
    ("date", r"(?:the )?(?P<nth>\d{1,2}|NTH)(?:st|nd|rd|th|\.)?(?: of| de)? (?P<month>MONTH)"
             r"(?:,? (?:de )?(?P<year>\d{4}))?"),
    ("date", r"(?P<month>MONTH) (?:the )?(?P<nth>\d{1,2})(?:st|nd|rd|th)?(?![\d:])"
             r"(?:,? (?P<year>\d{4}))?"),
    ("month", r"(?:DATED|UNTIL) (?P<month>MONTH)(?: (?P<year>\d{4}))?"),
    ("year", r"(?:DATED|UNTIL) (?P<year>\d{4})"),
    ("nth", r"DATED the (?P<nth>NTH|\d{1,2}(?:st|nd|rd|th))"
            r"(?: of (?P<side>SIDE) month|(?! of))"),
    ("ago", r"AGO (?P<count>COUNT|\d{1,3}) (?P<span>SPAN)"),
    ("ago", r"(?P<count>COUNT|\d{1,3}) (?P<span>SPAN) AGO"),
    ("ahead", r"AHEAD (?:exactly |about )?(?P<count>COUNT|\d{1,3}) (?P<span>SPAN)"),
    ("side", r"(?:DATED )?(?P<side>SIDE) (?:(?P<span>SPAN)|(?P<weekday>WEEKDAY)|(?P<month>MONTH))"),
    ("side", r"(?P<span>SPAN) (?P<side>SIDE)"),
    ("day", r"(?P<day>DAY)"),
    ("weekday", r"(?:DATED )?(?P<weekday>WEEKDAY)"))
_SEEN_FROM_TODAY = frozenset(("nth", "ago", "ahead", "side", "day", "weekday", "month"))


def _date_forms(lex: Lexicon, language: str) -> List[Tuple[str, Pattern[str]]]:
    """Return the ways to name days in a language, compiled."""
    def words(match: Match[str]) -> str:
        kind = match[0].lower()
        known = lex.pairs.get((kind, language)) or {
            " ".join(p) for ps in lex.phrases[kind, language].values() for p in ps}
        longest_first = sorted(map(re.escape, known), key=lambda word: (-len(word), word))
        return f"(?:{'|'.join(longest_first) or '(?!)'})"
    return [(name, re.compile(rf"(?<!\w){re.sub('[A-Z]{3,}', words, form)}(?!\w)", re.I))
            for name, form in _DATE_FORMS]


def days_in(lex: Lexicon, text: str, today: datetime.date) -> List[When]:
    """Return the days that a text names, as seen from a day, in the order in which it does."""
    _, words, language = _words_in(lex, text)
    found: List[When] = []
    past = {*lex.pairs["past", language].values()}
    passed = any(word in past or language == "en" and word.endswith("ed") for word in words)
    for name, form in lex.dates(language):
        for match in form.finditer(text):
            with contextlib.suppress(ValueError, OverflowError):  # there is no 31 June
                before = text[:match.start()]  # it was moved to Wednesday
                ahead = before.endswith(" to ") and " from " not in before
                days = _days(lex, language, name, match, today, passed and not ahead)
                beside = re.match(rf" (?:{_WORD.pattern})", text[match.end():])
                floor = name == "nth" and beside and (  # the fourth floor is no day
                    "function" not in lex.word(beside[0].strip(), language).classes)
                if 1 < days[0].year < 9000 and not floor and not any(
                        w.start < match.end() and match.start() < w.end for w in found):
                    found.append(When(*days, *match.span(), name))
    return sorted(found, key=attrgetter("start"))


def _days(lex: Lexicon, language: str, form: str, match: Match[str], today: datetime.date,
          passed: bool) -> Tuple[datetime.date, datetime.date]:
    """Return the first and the last day of what words that name days mean."""
    values = {kind: lex.pairs[kind, language].get(text.casefold(), text.rstrip("sthndr"))
              for kind, text in match.groupdict().items() if text}
    span = values.pop("span", "")
    known = {kind: int(value) for kind, value in values.items()}
    side, month, year, nth = (known.get(kind) for kind in ("side", "month", "year", "nth"))
    if form == "date":
        years = [year] if year else range(today.year - 1, today.year + 2)
        day = min((datetime.date(each, month, nth) for each in years),
                  key=lambda date: abs(date - today))
    elif form == "nth":
        day = _stretch("m", side or 0, today)[0].replace(day=nth)
        if side is None and day < today and not passed:
            day = _stretch("m", 1, today)[0].replace(day=nth)
    elif form in ("ago", "ahead"):
        count = -known["count"] if form == "ago" else known["count"]
        if span in "my":
            return _stretch(span, count, today)
        day = today + datetime.timedelta(count * (7 if span == "w" else 1))
    elif span:
        return _stretch(span, side, today)
    elif month:
        if side:  # another one than this
            year = today.year + side * (side * (month - today.month) <= 0)
        elif side is None and not year:
            year = today.year - (month > today.month if passed else -(month < today.month))
        return _stretch("m", 0, datetime.date(year or today.year, month, 1))
    elif year:
        return _stretch("y", 0, datetime.date(year, 1, 1))
    elif form == "day":
        day = today + datetime.timedelta(known["day"])
    else:
        day = _weekday(today, known["weekday"], passed if side is None else side < 0)
    return day, day


def _weekday(today: datetime.date, weekday: int, passed: bool) -> datetime.date:
    """Return the last such day of the week before today, or the next one after it."""
    ahead = (weekday - today.weekday() - 1) % 7 + 1
    return today + datetime.timedelta(ahead - passed * (7 if ahead < 7 else 14))


def _stretch(unit: str, count: int, today: datetime.date) -> Tuple[datetime.date, datetime.date]:
    """Return the first and last day of the day, week, month or year that is so many away."""
    if unit in "dw":
        size, begun = (7, today.weekday()) if unit == "w" else (1, 0)
        first = today + datetime.timedelta(count * size - begun)
        return first, first + datetime.timedelta(size - 1)
    size, begun = (12, 0) if unit == "y" else (1, today.month - 1)
    months = 12 * today.year + begun + count * size
    first, end = (datetime.date(month // 12, month % 12 + 1, 1) for month in (
        months, months + size))
    return first, end - datetime.timedelta(1)


def named_days(lex: Lexicon, language: str, first: datetime.date, last: datetime.date,
               today: datetime.date) -> str:
    """Return how days are called today: tomorrow, on 9 May, in March 2025, in the week of 4 May."""
    on, into = [*lex.phrases["dated", language]][:2] or ("on", "in")  # an owner's language
    away = str((first - today).days)
    near = [word for word, days in lex.pairs["day", language].items() if days == away]
    if first == last and near and away in ("-1", "0", "1"):
        return near[0]
    month = next(word for word, value in lex.pairs["month", language].items()
                 if value == str(first.month))
    month = month if language in ("es", "fr") else month.capitalize()
    year = f" {first.year}" if first.year != today.year else ""
    day = f"{first.day}{'.' * (language == 'de')} {month}{year}"
    if first == last:
        return f"{on} {day}"
    if (first, last) == _stretch("y", 0, first):
        return f"{into} {first.year}"
    whole = (first, last) == _stretch("m", 0, first)
    return f"{into} {month}{year}" if whole else f"{into} the week of {day}"


def as_of(lex: Lexicon, text: str, told: datetime.date, today: datetime.date) -> str:
    """Return a statement of one day as it is said on another: "tomorrow" is then "on 9 May"."""
    days, (_, _, language) = days_in(lex, text, told), _words_in(lex, text)
    over = bool(days) and all(w.last < today for w in days) and any(w.last >= told for w in days)
    until = lex.phrases["until", language]
    for when in reversed(days):
        before, named = text[:when.start], text[when.start:when.end]
        lasting = told == today and (  # what was said today may be said so today
            when.form in ("day", "weekday", "nth") or 0 < (when.last - when.first).days < 7)
        if lasting or when.form not in _SEEN_FROM_TODAY or named.split()[0].casefold() in until:
            continue  # since March stays
        name = named_days(lex, language, when.first, when.last, today)
        if not until.keys().isdisjoint(before.casefold().split()[-1:]):
            name = name.partition(" ")[2] or name  # until the week of 4 May
        elif before.casefold().split()[-1:] in (["on"], ["of"]):  # as of this month
            name = name.partition(" ")[2] or name
        text = before + (name if before else name[:1].upper() + name[1:]) + text[when.end:]
    if over:  # what was to come has been
        past = lex.pairs["past", language]
        verbs = "|".join(map(re.escape, past)) or "(?!)"
        text = re.sub(rf"(?<![\w'])(?:{verbs})(?![\w'])", lambda verb: past[verb[0].casefold()],
                      text, count=1, flags=re.I)
    return text


# what is asked


class Asked(NamedTuple):
    """A question taken apart: what it asks for, and which of its words are telling."""

    line: Line
    slot: str                     # what is to fill its gap: "time", "place", …; or ""
    asking: AbstractSet[int]      # the words that say so
    kind: str                     # the stem of a kind of which something is asked for, or ""
    polar: bool                   # it asks for a yes or no
    terms: Tuple[int, ...]        # its telling words
    vital: AbstractSet[int]       # those of them that name a thing or a person
    weights: Dict[int, float]
    names: Dict[int, AbstractSet[str]] = {}  # stems of what else a thing or a person is called


def opened(lex: Lexicon, text: str) -> Tuple[str, str]:
    """Return a text without its opening courtesies, and whether they "ask", "tell", or neither."""
    text = _MARKER.sub("", text[:MAX_ASKED_CHARS])
    spans, words, language = _words_in(lex, text)
    at, size = 0, lex.phrase_at(words, 0, "opening", language)
    while size and at + size < len(words) and not _denies_thing(
            lex, text, spans, words, at, language):
        at += size
        size = lex.phrase_at(words, at, "opening", language)
    classes = [lex.closed[language].get(word, _NONE) for word in words]
    for i in range(at, min(at + 8, len(words))):
        if "frame" in classes[i]:
            rest, mode = _after_frame(classes, at, i)
            if mode:
                return text[spans[rest][0]:], mode
        elif classes[i] & {"question", "own"} or not classes[i]:  # grandpa forgot who I was
            break
    return text[spans[at][0]:] if at else text, ""


def _denies_thing(lex: Lexicon, text: str, spans: Sequence[Tuple[int, int]], words: Sequence[str],
                  at: int, language: str) -> bool:
    """Return whether a "no" is said of a thing, and opens or corrects nothing: no choir today.

    Nor does the one of "no. of bolts".
    """
    one, after = (lex.word(word, language).classes for word in [*words[at:at + 2], "", ""][:2])
    between = text[spans[at][1]:spans[at + 1][0]] if at + 1 < len(words) else ""
    return "not" in one and (between == " " and not after or (
        between == ". " and text[spans[at + 1][0]].islower()))


def _after_frame(classes: Sequence[AbstractSet[str]], at: int, frame: int) -> Tuple[int, str]:
    """Return where what follows "do you know" begins, and whether it is asked for or told."""
    opens = {"question", "own", "det", "tells", "whether", "subject"}
    rest = frame + 1
    while rest < len(classes) and classes[rest] and not classes[rest] & opens:
        rest += 1
    if rest >= len(classes) or "tells" in classes[rest]:
        return rest + 1, "tell" if rest + 1 < len(classes) else ""
    before = _NONE.union(*classes[at:frame])
    lost = "lost" in classes[frame]
    if "aux" in classes[at] and "me" in classes[at + 1] or not lost and (
            "subject" in before and not before & {"not", "advice", "aux"}):
        return 0, ""  # should I tell him; I know where it is
    if classes[rest] & {"question", "whether"}:
        return rest, "ask"
    if "not" in before and not lost:
        return 0, ""  # I never said I was rich
    wanted = not lost or any("wanted" in c for c in classes[rest:])
    if "indefinite" in classes[rest] or not classes[rest] or not wanted:
        return 0, ""  # tell me a joke; I forgot my umbrella
    return rest, "tell" if any("aux" in c for c in classes[rest + 1:]) else "ask"


def is_question(text: str) -> bool:
    """Return whether the text asks rather than tells, as far as its mark shows."""
    return text.rstrip(" \"')").endswith(("?", "？", "؟", "՞", "፧"))


def asks(text: str, lex: Optional[Lexicon] = None) -> bool:
    """Return whether the text asks: by its mark, or by the way in which it begins."""
    lex = lex or lexicon()
    rest, mode = lex.opened(text)
    if mode or is_question(text):
        return mode != "tell"
    line, stops = lex.line(rest), text.rstrip().endswith((".", "!"))
    if lex.phrase_at([w.casefold() for w in _WORD.findall(text[:80])], 0, "about", line.language):
        return True  # tell me about Ines.
    classes = [word.classes for word in line.words]
    if len(classes) < 2 or text.rstrip().endswith("!"):
        return False
    led = "prep" in classes[0] and "question" in classes[1]
    first, after = classes[led], _NONE.union(*classes[led + 1:led + 2])
    if "question" in first:  # and opens no clause: when I was young, who dares wins.
        return "aux" in after or not stops and not after & {"me", "you", "det", "other"}
    if "aux" in first:
        named = after & {"me", "you", "det", "other", "pronoun"} and "indefinite" not in after
        return not stops and (bool(named) or line.caps[1])
    wanted = [i for i, c in enumerate(classes) if "wanted" in c]
    return bool(wanted) and not stops and not line.has & {"aux", "subject"} and (
        wanted[-1] == len(classes) - 1 or wanted[0] == 0) and not re.search(r"[\d:]", rest) and (
            bool(first & {"own", "det", "wanted"}) or len(classes) < 3)  # the alarm code


def wishes(lex: Lexicon, text: str) -> bool:
    """Return whether a text bids that something be done, or wants what words can give.

    Write me a poem; could you help me? I need a name for my boat; any tips for a beginner?
    """
    words = lex.line(text[:MAX_ASKED_CHARS]).words[:8]
    lead = list(itertools.takewhile(lambda word: "request" not in word.classes, words[:6]))
    if len(lead) < len(words[:6]) and (
            all(word.classes & {"idle", "opening"} for word in lead)
            or any("you" in word.classes for word in lead)
            and all(lex.odd.get(word.word, word.word) != "do" for word in lead)):
        return True
    given = next((i for i, word in enumerate(words) if "given" in word.classes), 0)
    some = next((i for i in range(given) if "indefinite" in words[i].classes), -1)
    return some == 0 or any(word.classes & {"wants", "you"} for word in words[:max(some, 0)])


def analyzed(lex: Lexicon, text: str) -> Asked:
    """Return a question taken apart."""
    line = lex.line(lex.opened(text)[0].strip() or text)
    words = [*(word.word for word in line.words), "$"]
    asks_first = next((i for i, word in enumerate(line.words) if "question" in word.classes), -1)
    slot, at = next((  # a later "who" goes with what stands before it
        (kind[5:], set(range(i, i + lex.phrase_at(words, i, kind, language))))
        for kind, language in lex.phrases if kind.startswith("asks.") and language == line.language
        for i, word in enumerate(line.words) if lex.phrase_at(words, i, kind, language) and (
            i <= asks_first or "question" not in word.classes)), ("", set()))
    which = next((i for i, word in enumerate(line.words) if "which" in word.classes), len(words))
    beside = itertools.takewhile(  # what does the holiday cost: it asks for no kind of holiday
        lambda w: lex.odd.get(w.word, w.word) != "do", line.words[which + 1:which + 4])
    ahead = [w.stem for w, after in zip(beside, [*words[which + 2:], ""])
             if "function" not in w.classes and after != "'s"]  # nor my wife's name
    kind = ahead[0] if ahead and ahead[0] in lex.kinds and ahead[0] not in lex.loose and (
        slot != "name") else ""  # what is my wife called
    polar = bool(line.words) and "question" not in line.has and (
        "aux" in line.words[0].classes
        or is_question(text) and not slot and not line.has.isdisjoint({"subject", "me"}))
    content = ([i for i in line.telling if (polar or "idle" not in line.words[i].classes)
                and not (i in at and len(at) > 1)] or line.telling)[:MAX_QUERY_TERMS]
    vital = {i for i in content if i not in at and (  # it names a thing or a person
        line.caps[i] and i > 0 or line.owners[i])}
    return Asked(line, "person" if kind in lex.kinds["person"] else slot,
                 at | {i for i in content if kind and line.words[i].stem == kind},
                 kind, polar, tuple(content), vital, {})


# what tells


class Unit(NamedTuple):
    """A sentence of the memory that might answer: where it stands and what it says."""

    entry: Entry
    line: Line
    when: str = ""
    text: str = ""   # what was told
    about: str = ""  # what that leans on, which stands before it in the line


ABBREVIATED = re.compile(r"(?:\b(?:mr|mrs|ms|dr|st|prof|ing|rev|jr|sr|no|vs|approx|e\.g|i\.e|a\.m|"
                         r"p\.m)|(?<!['’])\b[^\W\d])\.$", re.I)
_BREAKS = re.compile(r"(?<=[.!?…;])[\"')\]]*\s+|(?<=[。！？।॥؟۔။។።])")
_STOPS = re.compile(r"[,;:–—]\s+|\s[-–—]+\s")
_LOG_LINE = re.compile(r"([\[(]?\d[\w./:, -]{4,30}?[\])]?(?: -)? )?"
                       r"([^\W\d_][\w.'’-]*(?: [^\W\d_a-z][\w.'’-]*){0,2}): (\S.*)")
_LOG_KEYS = (("date", "time", "timestamp", "at"), ("name", "from", "sender", "author", "user",
             "speaker"), ("text", "content", "message", "body", "words"))


def sentences_of(text: str) -> List[str]:
    """Return the sentences of one line; the full stop of an abbreviation, or of 9. Mai, ends none.
    """
    pieces: List[str] = []
    for piece in _BREAKS.split(text.strip()):
        if pieces and (ABBREVIATED.search(pieces[-1]) or re.search(r"\b\d\d?\.$", pieces[-1]) and (
                re.split(r"\W", piece)[0].casefold() in lexicon().months)):
            pieces[-1] += " " + piece
        elif piece:
            pieces.append(piece)
    return pieces


def heard_in(lex: Lexicon, text: str) -> List[str]:
    """Return the sentences of a text, then their clauses of three words or more.

    A clause ends at a comma or the like, and before a word that joins another subject to it.
    """
    sentences, clauses = sentences_of(text), []  # type: List[str], List[str]
    for piece in (piece for sentence in sentences for piece in _STOPS.split(sentence)):
        (spans, words, language), start = _words_in(lex, piece), 0
        for i, (begin, end) in enumerate(spans):
            classes = lex.word(words[i], language).classes
            if "joins" in classes and (i or "question" not in classes) and (
                    _has_subject(lex, piece[end:])):
                clauses.append(piece[start:begin])
                start = end
        clauses.append(piece[start:])
    return list(dict.fromkeys([*sentences, *(part.strip() for part in clauses
                                             if len(_WORD.findall(part)) > 2)]))


def _has_subject(lex: Lexicon, text: str) -> bool:
    """Return whether a text begins as a clause of its own does: I, my cat, the rain, today she."""
    return any(word.stem in lex.kinds["time"] or word.classes & {"subject", "own", "refers", "det"}
               for word in lex.line(text).words[:1])


_NEUTER = ("it", "its", "es")  # stands for no person


def leans(lex: Lexicon, line: Line) -> bool:
    """Return whether a sentence needs the one before it: she teaches; the red one; in the barn."""
    for at, word in enumerate(line.words):
        if "refers" in word.classes or "stands" in word.classes and at - 1 in line.telling and (
                lex.kinds["number"].isdisjoint(line.words[at - 1][1:3])):  # thirty-one is a number
            return True
        named = line.caps[at] or line.owners[at] or at == 0 and {*line.telling[:2]} == {0, 1}
        if at in line.telling and named and word.stem not in lex.kinds["time"]:
            it = next((j for j, w in enumerate(line.words) if j > at and w.word in _NEUTER), 0)
            things = [j for j in line.telling if at < j < it
                      and line.words[j - 1].classes & {"det", "own"}]
            person = line.caps[at] or word.stem in lex.kinds["person"]
            if it and person and not things:
                return True  # the Hills left, and I changed it
            return "stands" in _NONE.union(*(w.classes for w in line.words[at + 1:at + 2]))
    return bool(line.words) and "prep" in line.words[0].classes and len(line.words) < 7 and (
        not line.has & {"aux", "subject"})


def statements_of(text: str, lex: Optional[Lexicon] = None) -> List[str]:
    """Return what a line states, sentence by sentence and clause by clause; not what it asks."""
    lex = lex or lexicon()
    return [part for sentence in sentences_of(_MARKER.sub("", text))
            if not asks(sentence, lex) and not _wish(lex, sentence)
            for part in _clauses(lex, sentence) if len(part.strip(" .…!-—\"'")) > 1]


def _verbal(lex: Lexicon, word: Word) -> bool:
    """Return whether a word has the form of an English verb, as some nouns have: hates, sang."""
    odd = word.word in lex.odd and not word.classes & {"more", "less"}
    return odd or word.word[3:].endswith(("ed", "ing", "s"))


def _clauses(lex: Lexicon, sentence: str) -> List[str]:
    """Return the clauses of a sentence that have a subject and a verb of their own."""
    start, found = 0, []
    for cut in lex.joints.finditer(sentence):
        one, other = lex.line(sentence[start:cut.start()]), lex.line(sentence[cut.end():])
        named = any(other.caps[:1]) or any(
            word.classes & {"own", "refers"} for word in other.words[:1])
        end = min((at for at in other.stops if at), default=len(other.words))
        verb = any(i and not other.caps[i] and ("aux" in word.classes or i in other.telling and (
            not other.owners[i] or i > 1 and _verbal(lex, word)))
                   for i, word in enumerate(other.words[:end]))  # Farah, Ines and Kwabena have none
        whole = "aux" in one.has or any(not one.caps[i] and not one.owners[i] for i in one.telling)
        if named and whole and len(one.telling) > 1 and len(other.telling) > 1 and verb:
            found.append(sentence[start:cut.start()])
            start = cut.end()
    return [*found, sentence[start:]]


def told_about(lex: Lexicon, last: Entry, text: str) -> str:
    """Return the statement that a text leans on, which was told last; "" if it leans on none."""
    first = statements_of(text, lex)[:1]
    if not first or not leans(lex, lex.line(lex.opened(first[0])[0])):
        return ""
    told = clean_line(last.text, MAX_ASKED_CHARS)
    return _gathering(last.about, told) if last.about else _stopped(told)


def answer_to(lex: Lexicon, talk: Sequence[Tuple[str, str]], text: str) -> str:
    """Return the question that a text answers, asked just before it and not known then; or "".

    Where is my passport? I do not know that yet. Tell me, and I will keep it. In the blue drawer.
    """
    at = next((k for k in range(len(talk) - 1, 1, -1) if talk[k] == ("owner", text)), 0)
    if not at or not is_unknown(lex, talk[at - 1][1]) or not is_question(talk[at - 2][1]):
        return ""
    line, question = lex.line(text[:MAX_ASKED_CHARS]), talk[at - 2][1]
    bare = leans(lex, line) or len(line.words) < 6 and not line.has & {"aux", "subject"} and (
        not any(_verbal(lex, word) for word in line.words[1:])) and ":" not in text
    return question if bare and not line.has_phrase(lex, "waves_off") and not asks(text, lex) and (
        asks_for_a_fact(question)) else ""


def is_unknown(lex: Lexicon, reply: str) -> bool:
    """Return whether a reply says only that something is not known."""
    return reply in UNKNOWN_REPLIES or any(
        reply == " ".join(lex.phrases["unknown", language]) + "." for language in lex.endings)


def _stopped(text: str) -> str:
    """Return a text with a full stop, if it ends in a letter or a digit."""
    return text + "." * text[-1:].isalnum()


def _gathering(about: str, text: str) -> str:
    """Return what a next statement leans on: this one too, while it is not long."""
    short = len(about) + len(text) < MAX_ASKED_CHARS
    return f"{about} {_stopped(text)}" if short else about


def named_in(lex: Lexicon, lines: Sequence[str], today: datetime.date) -> str:
    """Return a day, and the days that lines told on it name, as an entry keeps them."""
    return " ".join([today.isoformat(), *(f"{when.first}..{when.last}" for line in lines
                                          for when in days_in(lex, line, today))])


def logged(line: str) -> Optional[List[str]]:
    """Return [date, name, words] of a line of a chat log, plain or JSON; None if it is none."""
    if line.startswith("{"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            found = [next((str(row[key]) for key in keys if key in row), "") for keys in _LOG_KEYS]
            return found if found[1] and found[2] else None
    match = _LOG_LINE.match(line)
    return [(match[1] or "").strip("[]() -"), *match.groups()[1:]] if match and (
        match[2] not in ("H", "A")) else None


def _leans_on(lex: Lexicon, about: str, text: str) -> bool:
    """Return whether a statement needs what it stands behind, as the answer to a question does."""
    return bool(about) and (is_question(about) or leans(lex, lex.line(text)))


def _units_of(lex: Lexicon, entry: Entry, needles: Iterable[str] = ("",)) -> Iterator[Unit]:
    """Yield what an entry states, line by line; exchanges of the corpus are manner, not facts."""
    lines, told = entry.text.splitlines(), entry.source in TOLD
    if not told and all(line.startswith(MARKERS) for line in lines):
        return
    logs = [logged(line) for line in lines]
    chat = sum(map(bool, logs)) > 1 or not told and not entry.closed
    heard = ""
    for text, log in zip(lines, logs):
        if not told and WORD_LINE.match(text) and text[0] in "=~!":
            continue
        folded = _unmarked(text.casefold())
        if log and (chat or log[0]):
            parts = sentences_of(log[2])
            said = " ".join(part for part in parts if not asks(part, lex))
            if said and any(needle in folded or needle in heard.casefold() for needle in needles):
                line = lex.line(f"{heard} {said}".strip(), log[1])
                yield Unit(entry, line, log[0], log[2], heard)
            heard = " ".join(part for part in parts[-1:] if is_question(part))  # is answered next
        elif len(lines) < 3 or any(needle in folded for needle in needles):
            about = entry.about
            for statement in statements_of(text, lex):
                rest = (lex.opened(statement)[0] if told else statement).strip()
                if _leans_on(lex, about, rest):
                    yield Unit(entry, lex.line(f"{about} {rest}"), text=rest, about=about)
                    about = _gathering(about, rest)
                else:
                    about = _stopped(rest)
                    yield Unit(entry, lex.line(rest), text=rest)


def _beside(lex: Lexicon, units: Iterable[Unit]) -> Iterator[Unit]:
    """Yield the statements of an entry, and the owner's also with the one before them in it.

    What is told in one breath belongs together: the clock strikes thirteen; the rack is bent.
    """
    before = ""
    for unit in units:
        yield unit
        if before and not unit.about and unit.entry.source in TOLD:
            yield Unit(unit.entry, lex.line(f"{before} {unit.text}"), text=unit.text, about=before)
        before = _stopped(unit.text)


def _only_beside(lex: Lexicon, unit: Unit) -> bool:
    """Return whether a statement needs nothing of what stands before it."""
    return bool(unit.about) and not _leans_on(lex, unit.about, unit.text)


# who is who


def _names_beside(lex: Lexicon, line: Line, at: int) -> List[Word]:
    """Return the names that a sentence gives to what it names at a place: my cousin is Ines."""
    glue, words = {"aux", "det", "asks.name", "other"}, line.words
    glue |= {"refers"} if line.owners[at] else {"prep"}  # the boat: she is Nora; married to Ines
    after = at + 1
    while after < len(words) and not line.caps[after] and (
            words[after].classes & glue or words[after].stem in lex.kinds["person"]):
        after += 1
    before = at - 2 - (words[at - 1].word == "'s") if line.owners[at] else -1  # Ines is my cousin
    found = list(range(after, after + 4))
    if before > 0 and "aux" in words[before].classes:
        found += range(before - 1, max(-1, before - 4), -1)
    run = [i for n, i in enumerate(found) if i < len(words) and line.caps[i] and (
        n in (0, 4) or line.caps[found[n - 1]])]
    return [words[i] for i in run if not ABBREVIATED.match(words[i].word + ".")]


def _called(lex: Lexicon, memory: Memory, asked: Asked) -> Dict[int, AbstractSet[str]]:
    """Return how the things and persons of a question are called, or whose they are, as told."""
    names: Dict[int, AbstractSet[str]] = {}
    for i in sorted(asked.vital):
        word, owner, found = asked.line.words[i], asked.line.owners[i], set()
        owners = {owner}.union(*(names[k] for k in names if asked.line.words[k].stem == owner))
        ids = memory.ids_holding([lex.forms(word), [TOLD_MARK]], MOST_TOLD)
        lines = (unit.line for entry in memory.entries_of(ids) for unit in _units_of(lex, entry))
        for line, at in ((line, at) for line in lines for at in line.telling):
            one, called = line.words[at], {w.stem for w in _names_beside(lex, line, at)}
            if asked.line.caps[i] and line.owners[at] and word.stem in called:
                found.add(one.stem)
            elif lex.nearness(word, one) > 1 and "asks.name" not in one.classes and (
                    line.owners[at] == owner if owner == "my" else
                    owners & {w.stem for w in line.words}
                    or owner in ("the", "") and not asked.line.caps[i]):
                found |= called
        names[i] = frozenset(found - {word.stem})
    return names


# how well a statement answers


def _filled(lex: Lexicon, asked: Asked, line: Line, near: Dict[int, int], at: Dict[int, int],
            used: AbstractSet[int], before: int) -> int:
    """Return how surely a statement fills a question's gap, 0 to 2, with what it has beside it."""
    there = len(used) < len(line.telling) and any(near[i] > 2 + (  # the very word, and more
        asked.slot == "code" or asked.line.words[i].stem == asked.kind)
        for i in asked.asking & near.keys())
    filled = 2 if there else _filling(lex, asked, line, used, before)
    if "asks.name" not in line.has and any(_asks_my_name(asked, i) for i in asked.terms):
        return min(filled, 1)  # I am Irish
    if asked.slot != "name" or not asked.vital:
        return filled
    things = [i for i in asked.vital if not asked.line.caps[i] and not (
        "asks.name" in asked.line.words[i].classes)] or asked.vital
    return min(filled, 2 * any(  # it is to be the name of what is asked about
        _names_beside(lex, line, at[i]) or _is_named(line, at[i], before)
        for i in things if near[i] > 1 and _owner_fit(asked, line, i, at[i]) >= 0))


def _is_named(line: Line, at: int, before: int) -> bool:
    """Return whether a word that names follows what a sentence, or the one before it, begins with.

    The goat in the field is called Bo; we have new people upstairs, they are called the Mills.
    """
    words, start = line.words, before if at >= before else 0
    named = any("asks.name" in word.classes for word in words[at + 1:])
    while at > start and (at - 1 in line.telling or words[at - 1].word == "'s"):
        at -= 1  # to where what is named begins
    return named and all("idle" in words[i].classes for i in line.telling if start <= i < at)


def _filling(lex: Lexicon, asked: Asked, line: Line, used: Container[int], before: int) -> int:
    """Return 2 where something new surely is of the type that is asked for, 1 for perhaps, or 0.

    It is not among the words before the statement itself, which it leans on.
    """
    if any(word.stem in lex.kinds.get(asked.kind, ()) for word in line.words[before:]):
        return 2
    if asked.kind and not asked.slot:
        return 0
    if _began(lex, asked, line):
        return 2
    test = {"time": _when, "year": _when, "place": _where, **dict.fromkeys(
        ("number", "amount", "measure", "age", "span"), _counted)}.get(asked.slot, _named)
    padded = [_NO_WORD, _NO_WORD, *line.words, _NO_WORD]
    return max((test(lex, asked.slot, line, used, at, *padded[at:at + 4])
                for at, word in enumerate(line.words)
                if at >= before and (at not in used or "prep" in word.classes)), default=0)


def _began(lex: Lexicon, asked: Asked, line: Line) -> bool:
    """Return whether a statement says since when something is, where it is asked how long."""
    if asked.slot == "age":  # a birthday has no year
        told = "birth" in line.has and re.search(r"\d{4}", line.text)
    else:
        told = asked.slot == "span" and (asked.line.has_phrase(lex, "ago")
                                         or line.has_phrase(lex, "ago")
                                         or line.has_phrase(lex, "until"))
    return bool(told) and lex.dated(line.text)


def _is_number(lex: Lexicon, word: Word) -> bool:
    return any(c.isdigit() for c in word.word) or not lex.kinds["number"].isdisjoint(word[1:3])


def _counted(lex: Lexicon, slot: str, line: Line, used: Container[int], at: int,
             first: Word, before: Word, word: Word, after: Word) -> int:
    """Return how surely a word is a count, an amount, a size, an age, a span of time."""
    if not _is_number(lex, word):
        return 2 * (slot == "span" and word.stem in lex.kinds["since"])
    if _is_number(lex, after) or re.fullmatch(r"\d+(?:st|nd|rd|th)", word.word):
        return 0  # forty-eight: the last word decides; the 28th is a day
    unit = after.stem in lex.kinds["unit"]
    ends = after is _NO_WORD or "changed" in after.classes  # he is eight now
    timely = after.stem in lex.kinds["time"] or "at" in (before.word, first.word)  # at 14:00
    aged = any(w.stem in lex.kinds["aged"] for w in line.words[max(0, at - 2):at + 4])
    told = "aux" in before.classes and (unit or ends)
    counts = any(i in used for i in range(at + 1, at + 4))  # a count stands before its things,
    labels = not counts and not ends and (at - 1 in used or at - 2 in used)  # room 12 is a name
    other = not counts and at + 1 in line.telling
    return {"number": 2 if counts else 0 if labels or other else 1 + any(
                i in used for i in range(at - 2, at)),
            "amount": 2 - (timely or "subject" in first.classes or at + 1 in used and not unit),
            "measure": 1 + (ends or unit and not timely), "span": 2 if unit else int(not timely),
            "age": 2 if aged or told else int("prep" in before.classes)}[slot]


def _when(lex: Lexicon, slot: str, line: Line, used: Container[int], at: int,
          first: Word, before: Word, word: Word, after: Word) -> int:
    """Return how surely a word is a time."""
    if slot == "year":
        return 2 * bool(re.fullmatch(r"[12]\d{3}", word.word)) or int(_is_number(lex, word))
    if word.stem in lex.kinds["time"]:  # after lunch, and not: after that
        return 2 * ("prep" not in word.classes or "function" not in after.classes)
    return _is_number(lex, word) * (1 + ("prep" in before.classes))


def _where(lex: Lexicon, slot: str, line: Line, used: Container[int], at: int,
           first: Word, before: Word, word: Word, after: Word) -> int:
    """Return how surely a word, or what a preposition leads to, is a place."""
    if word.stem in lex.kinds["place"]:
        return 2
    if "prep" not in word.classes or word.word == "with":
        return int(line.caps[at] and at > 0 and "prep" not in before.classes)
    j = next((j for j in range(at + 1, min(at + 5, len(line.words))) if not line.words[j].classes
              & {"det", "own", "prep", "other", "you", "function"}), at)  # in the left pocket
    nth = lex.pairs["nth", line.language]
    if line.words[j].word in nth and j + 1 in line.telling:
        j += 1  # under the fourth pot; on the fourth of May is a day
    ahead = line.words[j]
    label = j + 1 < len(line.words) and (line.caps[j + 1] or _is_number(lex, line.words[j + 1]))
    led = word.word not in ("to", "of", "about", "by", "for", "during") or line.caps[j] or (
        word.word in ("to", "by") and ("det" in line.words[j - 1].classes or label))  # to bay 4
    timely = ahead.stem in lex.kinds["time"] or ahead.word in nth
    return 2 * (j > at and j not in used and led and not timely and not _is_number(lex, ahead))


def _named(lex: Lexicon, slot: str, line: Line, used: Container[int], at: int,
           first: Word, before: Word, word: Word, after: Word) -> int:
    """Return how surely a word is a person, a name, a trade, a reason, or anything at all."""
    telling = at in line.telling
    unknown = line.text.islower() and telling and word.stem not in lex.known
    if slot == "person":
        if line.caps[at]:
            lead = first if "det" in before.classes else before
            return 1 if lead.word in ("in", "at", "near", "from", "to") else 2
        led = before.classes & {"own"} or before.word in ("by", "from", "with", "von", "por", "par")
        return int(word.stem in lex.kinds["person"] or bool(led) and telling or unknown)
    if slot == "name":  # where no word says that it is one, which would fill the gap by itself
        if not line.caps[at]:
            return int(unknown)
        beside = at - 1 in used or at + 1 in used or at > 0 and line.caps[at - 1]
        aux = "aux" in before.classes or "aux" in after.classes
        return 2 if beside or aux else int("prep" not in before.classes)
    if slot == "reason":
        leads = "prep" in word.classes and line.caps[at + 1:at + 2] == [True]  # moved to Bergen
        return 2 * (word.stem in lex.kinds["reason"] and not leads)
    if slot == "code":  # 4711; or a word, where a password is told
        digits = any(c.isdigit() for c in word.word)
        return 2 * digits or int(telling and "asks.code" in line.has)
    return int(telling or _is_number(lex, word))


class Judged(NamedTuple):
    """A statement, how likely it answers, how near it has each term of the question, and where."""

    score: float
    unit: Unit
    near: Dict[int, int]
    at: Dict[int, int]
    filled: int
    verdict: str
    own: bool = True   # it has one of them itself, not only what it leans on
    news: bool = True  # it says more than what is asked, without which it answers nothing


def signals(lex: Lexicon, asked: Asked, unit: Unit) -> Tuple[Dict[str, float], Judged]:
    """Return what there is to say about a question and a statement, by name, for the judge."""
    line, q = unit.line, asked.line
    near, at = _matched(lex, asked, line)
    renamed = _renamed(asked, line, near, at) if asked.slot != "name" else set()
    before = len(lex.line(unit.about, line.speaker).words) if unit.about else 0
    used = {at[i] for i in near if near[i] > 2 * (i in asked.asking)}
    bare = bool(renamed) and not asked.polar and _only_names(lex, asked, line, used)
    filled = 0 if bare else _filled(lex, asked, line, near, at, used, before)
    terms = [i for i in asked.terms if near[i] and (near[i] > 2 or not filled)
             or i not in asked.asking and "former" not in q.words[i].classes]  # need not be there
    lost = [i for i in terms if not near[i]]
    vital = [i for i in terms if i in asked.vital]
    owned = [1 if i in renamed else _owner_fit(asked, line, i, at[i]) for i in vital if near[i]]
    verdict = "" if _only_beside(lex, unit) else _verdict(
        lex, asked, line, near, at, lost, min(owned, default=0), filled, before)
    if verdict == "yes" and unit.about and lex.line(unit.text).has_phrase(lex, "changed") or (
            unit.entry.source not in TOLD and any(0 < near[i] < 4 for i in near)):
        verdict = ""  # it has been moved since; what was read must say it in these words
    if verdict:  # what stands in a missing word's place answers as well
        terms, lost = [i for i in terms if near[i]], []
    whole = bool(used) and not lost
    own = any(near[i] and at[i] >= before for i in near)
    typed = bool(asked.slot or asked.kind or bare) and not asked.polar
    new = sum(j not in used and "idle" not in line.words[j].classes for j in line.telling)
    found = {
        "bias": True,
        "tale": unit.entry.source not in TOLD and not line.speaker and _leaning(unit.entry.text),
        # of a short question every word must be there; a long one tells much that need not be
        "asked at length": log(1.0 + len(q.words)),
        "mass": sum(asked.weights[i] for i in terms if near[i]),
        "rare": max((asked.weights[i] for i in terms if near[i] > 2), default=0.0),
        "two": len(used) > 1, "whole": whole, "thing lost": not set(vital).isdisjoint(lost),
        "name lost": any(i and q.caps[i] or q.words[i].word[:1] in _NUMBERED for i in lost),
        "new": min(3, new) / 3.0, "kind": bool(asked.kind),
        "empty": typed and not filled, "empty whole": typed and not filled and whole,
        "half whole": typed and filled == 1 and whole,
        "yours": "you" in q.has and not q.has & {"me"},
        "owner": max(owned, default=0) > 0,
        "other's": min(owned, default=0) < 0,
        "rival": any(_has_rival(lex, q.words[i], line) for i in lost)}
    return {name: float(value) for name, value in found.items()}, Judged(
        0.0, unit, near, at, filled, verdict, own, bool(new or asked.polar))


def _matched(lex: Lexicon, asked: Asked, line: Line) -> Tuple[Dict[int, int], Dict[int, int]]:
    """Return how near a statement comes to each term of a question, and where."""
    near: Dict[int, int] = {}
    at: Dict[int, int] = {}
    words = asked.line.words
    same = {line.words[j].stem for j in line.telling} & {words[i].stem for i in asked.terms}
    for i in asked.terms:
        grade, j = max(((lex.nearness(words[i], line.words[j]), -j) for j in line.telling
                        if (words[i].stem in same or line.words[j].stem not in same)
                        and not _names_another(asked, line, i, j)),
                       default=(0, 0))  # what another word is, this one is not as well
        near[i], at[i] = grade, -j
        called = _calls_me(lex, line) if not grade and _asks_my_name(asked, i) else -1
        if called >= 0:
            near[i], at[i] = 4, called
    met = {at[i] for i in near if near[i] > 1}
    near.update((i, 0) for i in asked.terms if near[i] and (
        not _of_what(lex, asked.line, i) and met.isdisjoint(_of_what(lex, line, at[i]) or met)))
    return near, at


def _of_what(lex: Lexicon, line: Line, at: int) -> Set[int]:
    """Return the words that name a thing of what a word names: Ralf's wife; the wife of Ralf."""
    words, after = line.words, at + 1
    while line.caps[after:after + 1] == [True]:
        after += 1  # my son Ralf's wife
    if [word.word for word in words[after:after + 1]] == ["'s"]:
        return set(itertools.takewhile(lambda k: k in line.telling and (  # at the baker's today
            words[k].stem not in lex.kinds["time"]) and (
                k == after + 1 or not _verbal(lex, words[k])), range(after + 1, len(words))))
    before = at - 1 - (at > 1 and bool(words[at - 1].classes & {"det", "own"}))
    person = line.caps[at] or words[at].stem in lex.kinds["person"]  # no cup of tea
    return {before - 1} & {*line.telling} if person and before > 0 and (
        "of" in words[before].classes and not _is_number(lex, words[before - 1])) else set()


def _asks_my_name(asked: Asked, i: int) -> bool:
    """Return whether a word of a question is the name in "my name"."""
    words = asked.line.words
    return "asks.name" in words[i].classes and i > 0 and "own" in words[i - 1].classes


def _names_another(asked: Asked, line: Line, i: int, j: int) -> bool:
    """Return whether a word that names does so for another than is asked: my cat is called Tom."""
    if _asks_my_name(asked, i):
        return line.owners[j] != "my" and not any(
            word.classes & {"subject", "me"} for word in line.words[max(0, j - 3):j + 2])
    return i > 0 and "asks.name" in asked.line.words[i].classes and line.owners[j] == "my" and (
        asked.line.words[i - 1].word == "'s")  # my name, for my wife's


def _calls_me(lex: Lexicon, line: Line) -> int:
    """Return where a statement says no more than who one is: I am Tom, call me Tom; or -1."""
    words = [word.word for word in line.words]
    for i in range(len(words)):
        size = lex.phrase_at(words, i, "calls_me", line.language)
        named = sum(1 for _ in itertools.takewhile(bool, line.caps[i + size:])) if size else 0
        end = i + size + named
        if named and line.words[i + size].stem not in lex.known and (
                end == len(words) or end in line.stops or "joins" in line.words[end].classes):
            return i
    return -1


def _only_names(lex: Lexicon, asked: Asked, line: Line, used: Container[int]) -> bool:
    """Return whether a statement says only who is who, which is not what is asked."""
    return asked.slot not in ("person", "name") and all(
        line.caps[j] or j in used or line.words[j].stem in lex.kinds["person"]
        for j in line.telling)


def _renamed(asked: Asked, line: Line, near: Dict[int, int], at: Dict[int, int]) -> Set[int]:
    """Note where a statement calls what is asked about by another name; return those words."""
    found, words = set(), asked.line.words
    for i, names in asked.names.items():
        j = next((j for j in line.telling if line.words[j].stem in names and (
            line.caps[j] or not asked.line.caps[i] or line.owners[j] == "my")), -1)
        if near.get(i, 4) < 4 and j >= 0:
            both = {i, *(k for k in near if not near[k] and words[k].stem == asked.line.owners[i])}
            near.update(dict.fromkeys(both, 4))
            at.update(dict.fromkeys(both, j))
            found |= both
    return found


@functools.lru_cache(maxsize=1 << 10)
def _leaning(text: str) -> float:
    """Return the share of a passage's lines that lean on others, as a tale's do, a list's not."""
    lex, lines = lexicon(), text.splitlines()
    return sum("leans" in lex.line(line).has for line in lines) / len(lines)


def _verdict(lex: Lexicon, asked: Asked, line: Line, near: Dict[int, int], at: Dict[int, int],
             missing: Sequence[int], owned: int, filled: int, before: int) -> str:
    """Return "yes" or "no" where a statement says so to a question that asks for it, or "".

    It does not where it is of another, where who did it to whom is another way round, or where it
    only was, will be, may be or almost was so.
    """
    q, met = asked.line, [i for i in near if i not in missing]
    if not asked.polar or owned < 0 or not met or "you" in q.has and not q.has & {"me", "own"}:
        return ""
    if not missing and _is_over(lex, q, line, {at[i] for i in met}):
        return "no"
    denied = _denies(line, before, max(at[i] for i in met)) != ("not" in q.has)
    if (line.has_phrase(lex, "unreal") - q.has_phrase(lex, "unreal")
            or _role_clash(asked, line, near, at) or _only_was(lex, q, line)
            or "subject" in q.has and "subject" not in line.has
            or any(_parted(lex, line, *pair)
                   for pair in itertools.permutations([at[i] for i in met], 2))
            or min(asked.vital, default=-1) in missing):  # of my mother, asked of my father
        return ""
    last = q.words[-1]  # is the fan off?
    if "prep" in last.classes and _has_rival(lex, last, line, (), False) and (
            last.word not in {word.word for word in line.words}):
        return "" if denied or missing else "no"
    sure = all(near[i] > 3 or line.words[at[i]].stem in lex.kinds.get(q.words[i].stem, ())
               for i in met)  # a house is near to living, and is not the same
    # A white door is not green, but whoever likes coffee may like tea as well.
    excludes = "is" in q.words[0].classes and not any(w.word.endswith("ing") for w in q.words)
    about = () if "subject" in line.has else line.telling[:1]
    taken = {*(at[i] for i in met), *about}  # my sister is no other child
    if sure and all(_has_rival(lex, q.words[i], line, taken, excludes) for i in missing):
        return "yes" if denied == bool(missing) else "no"
    single = any(sign[0] == "=" for i in near if near[i] > 2
                 for sign in lex.senses.get(q.words[i].stem, ()))  # one has one name, one home
    named = all(q.caps[i] for i in missing) and (filled == 2 if asked.slot else any(line.caps[1:]))
    return "no" if missing and single and named and not denied else ""


def _parted(lex: Lexicon, line: Line, one: int, other: int) -> bool:
    """Return whether two words of a statement, in this order, are said of different things.

    Between them stands another of the first one's kind (of "a brother, Karl, and a sister, Eva",
    Eva is no brother), or another's half begins (Helga gave me a book and Inge a scarf). Of what is
    merely listed, all is meant: meat, fish and eggs.
    """
    words, between = line.words, range(one + 1, other)
    apart = line.caps[other] or any("subject" in words[at].classes for at in between)
    if any(lex.are_rivals(words[one], words[at]) and (apart or "det" in words[at - 1].classes)
           for at in between if at in line.telling):
        return True
    names = [at for at, named in enumerate(line.caps) if named]
    return any(a <= one < b <= other and (b in line.stops or "joins" in words[b - 1].classes)
               and any(a < k < b and not line.caps[k] for k in line.telling)
               for a, b in itertools.combinations(names, 2))


def _denies(line: Line, before: int, last: int) -> bool:
    """Return whether a denial stands in the clause of a word: she is vegan and eats no eggs.

    A clause begins at a word that joins, at a subject behind a stop, and where a denial follows a
    telling word.
    """
    begins = [at for at, word in enumerate(line.words) if at == before or "joins" in word.classes
              or at in line.stops and word.classes & {"subject", "own", "refers"}
              or "not" in word.classes and at - 1 in line.telling]
    first = max((at for at in begins if at <= last), default=0)
    end = min((at for at in begins if at > last), default=len(line.words))
    return any("not" in word.classes for word in line.words[first:end])


def _is_over(lex: Lexicon, asked: Line, line: Line, met: AbstractSet[int]) -> bool:
    """Return whether what is asked for as it is now was given up, sold or stopped.

    Of me it tells where it says I, or nobody: sold the boat; not where my brother sold his. To whom
    something was given is not over.
    """
    words = [word.word for word in line.words]
    end = next((at for at in range(len(words)) if at not in met
                and lex.phrase_at(words, at, "ended", line.language)), -1)
    if end < 0 or not lex.past(asked.language).isdisjoint(word.word for word in asked.words):
        return False
    others = [at for at in line.telling if at < end and at not in met]
    given = [at for at in met if at > end and (
        line.caps[at] or line.words[at].stem in lex.kinds["person"])]
    return not given and ("subject" not in asked.has or "subject" in line.has or not others)


def _only_was(lex: Lexicon, asked: Line, line: Line) -> bool:
    """Return whether something was so, where it is asked whether it is."""
    past = lex.past(asked.language)
    return "is" in asked.words[0].classes and past.isdisjoint(w.word for w in asked.words) and (
        any("is" in w.classes and w.word in past for w in line.words))


def _has_rival(lex: Lexicon, asked: Word, line: Line, taken: Container[int] = (),
               of_kind: bool = True) -> bool:
    """Return whether a statement has, beside what is taken, the opposite of a word or, if of_kind,
    another of its kind."""
    return any(lex.are_rivals(asked, word, of_kind) for i, word in enumerate(line.words)
               if i not in taken)


def _role_clash(asked: Asked, line: Line, near: Dict[int, int], at: Dict[int, int]) -> bool:
    """Return whether who does a thing and whom it is done to have changed places."""
    names = [i for i in asked.vital if near[i] and asked.line.caps[i]]
    deeds = [i for i in asked.terms if near[i] and i not in asked.vital]
    return any((a < b) != (at[a] < at[b]) for a, b in itertools.combinations(names, 2)) or any(
        (name < deed) != (at[name] < at[deed]) for name in names for deed in deeds
               if not (at[deed] and "aux" in line.words[at[deed] - 1].classes))  # was done


def _owner_fit(asked: Asked, line: Line, i: int, at: int) -> int:
    """Return 1 where a thing is said to be whose it is asked to be, −1 where another's, or 0."""
    mine, theirs = asked.line.owners[i], line.owners[at]
    if line.speaker and asked.line.caps[i]:  # what somebody says is said of himself
        return 1 if line.words[at].text in line.speaker else -1
    if mine == theirs and not line.speaker:
        return int(mine not in ("", "the"))
    return -int(mine in ("my", "your") and (bool(line.speaker) or theirs not in ("", "the")))


def weighed(found: Dict[str, float], weights: Dict[str, float]) -> float:
    """Return how likely a statement answers, 0 to 1, from what there is to say about it."""
    return 1.0 / (1.0 + exp(-sum(weights.get(name, 0.0) * x for name, x in found.items())))


# candidates


def gathered(lex: Lexicon, memory: Memory, asked: Asked) -> Tuple[Asked, List[Entry]]:
    """Return the question with its words weighed by how rare they are, and what may answer it."""
    total, words = max(FEWEST_ENTRIES, memory.about_count() + 1), asked.line.words
    forms = {i: lex.forms(words[i]) for i in asked.terms}
    mass: DefaultDict[int, float] = defaultdict(float)
    weights, told = {}, set()  # type: Dict[int, float], Set[int]
    very: Counter[int] = Counter()
    for i in asked.terms:
        ids, own = _held(memory, forms[i], [f for j in asked.terms if j != i for f in forms[j]])
        if len(ids) > MOST_TOLD:  # among so many, the owner's with the very word come first
            exact = memory.ids_holding([lex.endings_of(words[i].word), [TOLD_MARK]], MOST_HELD)
            very.update(exact)
            ids.update(exact)
        rare = log(1.0 + total / (len(ids) + 0.5)) / log(1.0 + 2.0 * total)
        idle = "idle" in words[i].classes or not ids and i not in asked.vital
        weights[i] = rare * rare / (1 + idle)  # halved where it hardly tells, or nobody said it
        told |= own
        for entry in ids:
            mass[entry] += weights[i]
    names = _called(lex, memory, asked)
    for i in (i for i in asked.terms if _asks_my_name(asked, i)):  # as which nobody may call it
        begun = lex.phrases["calls_me", asked.line.language].values()
        said = [" ".join(phrase) for phrases in begun for phrase in phrases]
        for entry in memory.ids_holding([said, [TOLD_MARK]], MOST_HELD):
            mass[entry] = max(mass[entry], weights[i])
    for i, also in names.items():
        for entry in memory.ids_holding([[f"{stem}*" for stem in sorted(also)], [TOLD_MARK]],
                                        MOST_HELD):
            mass[entry] += weights[i]
    if "me" in asked.line.has and all(i in asked.asking or "idle" in words[i].classes
                                      for i in asked.terms):  # Who am I?
        for entry in memory.ids_holding([[TOLD_MARK]], MOST_TOLD):
            mass[entry] += 0.0
    best = memory.entries_of(sorted(
        mass, key=lambda i: (-mass[i] - (i in told), -very[i], -i))[:MOST_HELD])
    return asked._replace(weights=weights, names=names), [
        *[entry for entry in best if entry.source in TOLD][:MOST_TOLD],
        *[entry for entry in best if entry.source not in TOLD][:MOST_READ]]


def _held(memory: Memory, forms: Sequence[str], others: Sequence[str]) -> Tuple[Set[int], Set[int]]:
    """Return the ids of entries with one of the forms, and the owner's of them if they are many."""
    ids = memory.ids_holding([forms], MOST_HELD)
    if len(ids) < MOST_HELD:
        return set(ids), set()
    told = {*memory.ids_holding([forms, [TOLD_MARK]], MOST_HELD)}
    if len(told) == MOST_HELD:
        told.update(memory.ids_holding([forms, others or forms, [TOLD_MARK]], MOST_HELD))
    return {*ids, *told, *memory.ids_holding([forms, others or forms], MOST_HELD)}, told


def judged(lex: Lexicon, asked: Asked, entries: Iterable[Entry]) -> List[Judged]:
    """Return the statements of entries with their scores, best first."""
    needles = {_unmarked(form.rstrip("*"))[:4] for i in asked.terms
               for form in lex.forms(asked.line.words[i])}
    bare = all(i in asked.asking for i in asked.terms)
    units = (unit for entry in entries for unit in _beside(lex, _units_of(lex, entry, needles)))
    found = [signals(lex, asked, unit) for unit in itertools.islice(units, MOST_UNITS)
             if unit.line.telling]  # hello there tells nothing
    best: Dict[Tuple[int, str], Judged] = {}  # by itself, or with what stands before it
    for each in sorted((each._replace(score=each.news * weighed(values, JUDGE))
                        for values, each in found if bare or any(each.near.values())),
                       key=lambda each: (-each.score, -sum(each.near.values()))):
        best.setdefault((each.unit.entry.id, each.unit.text), each)
    return list(best.values())


def _mends(lex: Lexicon, unit: Unit) -> bool:
    """Return whether a statement says that what it leans on is so no longer."""
    said = next((part for part in sentences_of(unit.entry.text) if unit.text in part), unit.text)
    line = lex.line(said if unit.entry.source in TOLD else unit.text)  # with its "no, I meant"
    denied = bool(line.words) and "not" in line.words[0].classes and not _corrected(lex, said)
    return any(line.has_phrase(lex, kind) for kind in ("ended", "changed")) or bool(
        line.has_phrase(lex, "corrects")) and not denied  # no parking here


def newest_first(lex: Lexicon, asked: Asked, found: List[Judged], least: float) -> List[Judged]:
    """Return statements with the newest of those first that may have taken the best one's place.

    Asked for what was before, the one before the newest is first.
    """
    if not found or found[0].unit.entry.source not in TOLD:
        return found
    top, plain = found[0], [word.word for word in asked.line.words]
    former = any(lex.phrase_at(plain, i, "former", asked.line.language)  # but not: how old
                 for i in range(len(plain)) if i not in asked.asking)
    needed = _needed(lex, asked, top)
    fits = [top, *(each for each in found[1:] if each.unit.entry.source in TOLD
                   and _takes_place(lex, asked, top, needed, each, least))]
    fits.sort(key=lambda each: (each.unit.entry.told_at, each.unit.entry.id,
                                each.unit.entry.text.find(each.unit.text)), reverse=True)
    best = fits[min(former, len(fits) - 1)]
    if best is top and not former and not (
            asked.polar and _mends(lex, top.unit)):  # what it ended says yes no more
        return found
    return [best._replace(score=max(top.score, best.score)),
            *(each for each in found if each not in fits)]


def _other_than(lex: Lexicon, word: Word, words: Sequence[Word]) -> bool:
    """Return whether a word is near to none of some words."""
    return not any(lex.nearness(each, word) > 2 for each in words)


def _needed(lex: Lexicon, asked: Asked, top: Judged) -> List[int]:
    """Return the words of a question that what takes the best statement's place must have, too."""
    words, met = asked.line.words, [i for i in top.near if top.near[i] > 2]
    return [i for i in met if i not in asked.asking and not words[i].classes & {"changed", "idle"}
            and not (asked.polar and (_is_number(lex, words[i])
                                      or words[i].stem in lex.kinds["time"]))] or met


def _takes_place(lex: Lexicon, asked: Asked, top: Judged, needed: Sequence[int], each: Judged,
                 least: float) -> bool:
    """Return whether a statement is as much to the point as the best one, should it be newer.

    It tells, as surely, of the same things as the question; where it says that something changed,
    it need not be as sure, and may leave out a word that is no name, but not the last. Where
    several may answer, only what is of the same person takes a place.
    """
    line, words = each.unit.line, asked.line.words
    lost = [i for i in needed if each.near[i] < 3]
    if len(lost) > 1 and not asked.polar:
        return False
    mends = _mends(lex, each.unit) if each.unit.entry is not top.unit.entry else (
        lex.line(each.unit.text).has_phrase(lex, "changed"))
    was = words[0].word in lex.past(asked.line.language)
    if asked.polar and "is" in words[0].classes and not was and (
            mends or lex.dated(top.unit.line.text)) and _replaces(lex, line, top.unit.line):
        return True  # it says the same of another day
    over = line.has_phrase(lex, "ended")
    head = each.at[needed[-1]] if needed else 0
    named = head - 1 in line.telling and _other_than(lex, line.words[head - 1], words)
    if len(lost) > bool((mends or over) and not named and lost[-1:] != needed[-1:]) or any(
            asked.line.caps[i] or _is_number(lex, words[i]) for i in lost):
        return False
    told = [j for j in line.telling if line.words[j].stem not in lex.kinds["time"]]
    over = over and each.own and len(told) <= len(needed) + 1 and (
        asked.slot == "time" or asked.slot == "place" and "subject" in line.has)
    if over or mends and each.filled >= min(top.filled, 1):
        return True  # the meeting was cancelled
    if "not" in line.has and "not" not in top.unit.line.has:
        return False  # no choir this week
    same = not _wants_all(asked) or _subject(line) == _subject(top.unit.line)
    return same and each.own and not _only_beside(lex, each.unit) and each.score >= least and (
        each.filled >= top.filled) and all(each.near[i] >= top.near[i] for i in needed)


def _subject(line: Line) -> str:
    """Return the stem of the first thing or person that a statement names."""
    return next((line.words[i].stem for i in line.telling if line.caps[i] or (
        line.owners[i] and "idle" not in line.words[i].classes)), "")


# what is said


def turned(text: str) -> str:
    """Return what one said of oneself as it is said to one: my cat → your cat, I am → you are."""
    lex, pieces = lexicon(), re.findall(r"\w+(?:['’]\w+)*|[^\w]+", text)
    language = lex.language_of([piece.casefold() for piece in pieces])
    pairs, said = lex.pairs["turn", language], []  # type: Dict[str, str], List[str]
    for at, piece in enumerate(pieces):
        word = piece.casefold().replace("’", "'")
        opens = not said or bool(re.search(r"[.!?…:]\s*$", pieces[at - 1]))
        new = pairs.get(word, piece)
        if language == "en" and word in _TURNED_BY_OTHERS:
            before = [p.casefold() for p in pieces[max(0, at - 6):at] if p[0].isalnum()]
            ahead = pieces[at + 2].casefold() if pieces[at + 1:at + 2] == [" "] else ""
            new = _turned_by_others(lex, word, "" if opens or not before else before[-1],
                                   before, ahead, new)
        said.append(new[:1].upper() + new[1:] if opens and new != piece else new)
    return "".join(said)


_TURNED_BY_OTHERS = frozenset("you im ive mine was wasn't are were aren't weren't".split())


def _turned_by_others(lex: Lexicon, word: str, last: str, before: Sequence[str], ahead: str,
                      new: str) -> str:
    """Return an English word turned round as its neighbours will have it: "you" is I or me."""
    opens = last in ("", *"and but or so because that when if what where whether".split())
    if word == "you":
        leads = opens or "aux" in lex.word(ahead, "en").classes
        return "I" if ahead and leads else "me"
    if word in ("im", "ive"):  # German for in the, not a slip for I'm
        return new if opens else word
    if word == "mine":  # that mine is mine
        return new if last in ("is", "are", "was", "were", "of", "than", "like", "with") else word
    speaker = next((w for w in before[:-4:-1] if w in (
        "i", "you", "it", "he", "she", "that", "who", "they", "and", "is", "was")), "")
    return {"i was": "were", "i wasn't": "weren't", "you are": "am", "you were": "was",
            "you aren't": "am not", "you weren't": "wasn't"}.get(f"{speaker} {word}", word)


def said_back(lex: Lexicon, unit: Unit, today: Optional[datetime.date] = None) -> str:
    """Return a statement as an answer: turned round where that can be done, and as of today.

    What it leans on is said before it, save where it corrects that.
    """
    line, entry = unit.line, unit.entry
    if line.speaker:
        return _said_in_log(lex, unit)
    text = unit.text.strip() if unit.about and _mends(lex, unit) else line.text.strip()
    if unit.about[-1:] in ".!?…" and text == f"{unit.about} {unit.text}":
        text = f"{unit.about} {unit.text[:1].upper()}{unit.text[1:]}"
    if today and entry.source in TOLD:
        text = as_of(lex, text, told_day(entry), today)
    ours = entry.source in TOLD or line.has & {"me", "own"}  # whoever "you" is in a file
    pairs, words = lex.pairs["turn", line.language], [word.word for word in line.words]
    if ours and line.language != "en" and any("subject" in word.classes and not {
            *words[max(0, i - 1):i], *words[i + 1:i + 2]} & pairs.keys()
            for i, word in enumerate(line.words)):  # a verb would have to be turned as well
        return f'{" ".join(lex.phrases["said", line.language])}: "{text}"'
    text = text.rstrip(" ,;:?")
    ended = text[:1].upper() + text[1:] + ("" if text[-1:] in '.!…。।"' else ".")
    return turned(ended) if ours else ended


def told_day(entry: Entry) -> datetime.date:
    """Return the day on which something was told, as days went where that was."""
    return datetime.date.fromisoformat(entry.days[:10]) if entry.days else (
        datetime.date.fromtimestamp(entry.told_at))


def _said_in_log(lex: Lexicon, unit: Unit) -> str:
    """Return what somebody wrote in a log, with the day that he means by "yesterday"."""
    line, today = unit.line, datetime.date.fromtimestamp(unit.entry.told_at)
    written = days_in(lex, unit.when, today)
    meant = [named_days(lex, "en", w.first, w.last, datetime.date(1, 6, 1)) for w in days_in(
        lex, unit.text, written[0].first) if w.form in _SEEN_FROM_TODAY] if written else []
    when = f" ({unit.when})" if unit.when else ""
    return f'{line.speaker}{when}: "{unit.text.strip()}"' + (
        f" ({', '.join(meant)})" if meant else "")


# tools


def reckoned(lex: Lexicon, text: str) -> Optional[str]:
    """Return what the sum in a text comes to, exactly, or None if there is none: 17 plus 4."""
    languages = dict.fromkeys((lex.line(text[:MAX_ASKED_CHARS]).language, "en"))
    plain = re.sub(r"(?<=\d),(?=\d{3})", "", text[:MAX_ASKED_CHARS].casefold())
    plain = re.sub(r"(?<=\d)( ?%) \w+ (?=\d)", r"\1", plain)  # 17% of 340
    for kind, language in itertools.product(("reckon", "count"), languages):
        for word, sign in sorted(lex.pairs[kind, language].items(), key=lambda p: -len(p[0])):
            if kind == "reckon" or len(word) > 2:
                plain = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", sign, plain)
    number = r"\d{1,15}(?:\.\d{1,15})?"
    found = re.search(rf"{number}(?:\s*[-+*/%x×÷]\s*{number}){{1,20}}", plain)
    if not found:
        return None
    rest = lex.line(plain[:found.start()] + plain[found.end():])
    if any(not rest.words[i].classes & {"idle", "frame", "reckons"} for i in rest.telling):
        return None  # room 3-4
    terms: List[Fraction] = []
    for sign, digits in re.findall(rf"([-+*/%x×÷]?)\s*({number})", found[0]):
        value = Fraction(digits)
        if sign in "+-":  # or none, before the first
            terms.append(-value if sign == "-" else value)
        elif sign not in "/÷":
            terms[-1] *= value / (100 if sign == "%" else 1)
        elif value:
            terms[-1] /= value
        else:
            return None
    total = sum(terms, Fraction(0))
    return f"{float(total):.10g}" if total.denominator > 1 else str(total)


# What may stand in braces in an A: line, and what it says there; None where it has nothing to say.
TOOLS: Dict[str, Callable[[Lexicon, Memory, str], Optional[str]]] = {
    "time": lambda lex, memory, text: f"{_now(memory):%H:%M}",
    "date": lambda lex, memory, text: f"{_now(memory).day} {_now(memory):%B %Y}",
    "weekday": lambda lex, memory, text: f"{_now(memory):%A}",
    "reckon": lambda lex, memory, text: reckoned(lex, text),
    "facts": lambda lex, memory, text: str(len(memory.told()))}


def _now(memory: Memory) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(memory.clock())


def filled_in(lex: Lexicon, memory: Memory, answer: str, text: str) -> Optional[str]:
    """Return an answer to a text with its {tools} filled, or None if one has nothing to say."""
    for name in re.findall(r"\{(\w+)\}", answer):
        said = TOOLS[name](lex, memory, text) if name in TOOLS else None
        if said is None:
            return None
        answer = answer.replace(f"{{{name}}}", said)
    return answer


def _exchange_fits(lex: Lexicon, memory: Memory, asked: Asked, text: str,
                   found: Iterable[Entry], near: Dict[Tuple[int, int], float],
                   share: float) -> Iterator[Recall]:
    """Yield the answers of the corpus's exchanges, by how like their question is to the text.

    near has the cosines of the sayings most like it, by the keys of exchanges and the places there;
    where it has any, it counts as much as the words that are shared. share is for how much of a
    message the text stands.
    """
    line, folded = lex.line(text), folded_words(text)
    felt, begun = feeling_of(line), {word[:STEM_CHARS - 1] for word in folded}
    telling = {asked.line.words[i].stem: asked.weights[i] for i in asked.terms}
    for entry in filter(is_exchange, found):
        for place, words, answer in sayings_of(entry.text):
            said_then, cosine = folded_words(words), near.get((entry.key, place), 0.0)
            same = said_then == folded
            if not same and not cosine and begun.isdisjoint(
                    word[:STEM_CHARS - 1] for word in said_then):
                continue  # it shares no word, and most need not be taken apart
            saying = lex.line(words)
            score = 1.0 if same else min(0.98, _likeness(lex, line, saying, telling))
            score = share * (score if same or not near else (score + cosine) / 2.0)
            if score < LEAST_SCORE:
                continue
            answer, strange = fitted_answer(lex, text, words, answer)
            if felt and -felt in (feeling_of(saying), feeling_of(lex.line(answer))):
                strange += 1.0  # glad of what is sad
            strange += 0.5 * (("not" in saying.has) != ("not" in line.has))  # no thanks
            said = filled_in(lex, memory, answer, text)
            if said is not None:  # what is said further on hangs on what was said before
                yield Recall(score / (1.0 + (place > 0) + strange), entry, said,
                             answer if said != answer else "")


def fitted_answer(lex: Lexicon, text: str, saying: str, answer: str) -> Tuple[str, float]:
    """Return an answer to a saying as one to a text, and the share of its words that do not fit it.

    Where saying and text differ in one word that the answer repeats, the new word goes in: "I am
    sorry about your fish" is said of the parrot, too.
    """
    old, new, line = lex.line(saying), lex.line(text), lex.line(answer)
    ours, theirs = ({each.words[i].stem for i in each.telling} for each in (new, old))
    strange = [i for i in line.telling if line.words[i].stem in theirs - ours]
    if strange and len(old.words) == len(new.words):
        places = [i for i, (a, b) in enumerate(zip(old.words, new.words)) if a.stem != b.stem]
        if len(places) == 1 and all(line.words[i].word == old.words[places[0]].word
                                    for i in strange):
            word = new.words[places[0]].text
            return re.sub(rf"\b{re.escape(old.words[places[0]].word)}\b", lambda m: (
                word[:1].upper() + word[1:] if m[0][0].isupper() else word), answer,
                flags=re.I), 0.0
    named = any(line.caps[i] or _is_number(lex, line.words[i]) for i in strange)
    return answer, 1.0 if named else len(strange) / max(1, len(line.telling))


def _likeness(lex: Lexicon, a: Line, b: Line, telling: Dict[str, float]) -> float:
    """Return the weighted Dice coefficient of two sentences, halved where they speak of others."""
    mine, theirs = ({word.stem: word for word in line.words} for line in (a, b))
    weights = {stem: (2.0 if "question" in word.classes else 1.0)
               if word.classes & {"function", "idle"} else
               1.0 + 8.0 * telling[stem] if stem in mine and stem in telling else 2.0
               for stem, word in {**theirs, **mine}.items()}
    ours, others = ([word for word in side.values() if not word.classes & {"function", "idle"}]
                    for side in (mine, theirs))
    near = [(word.stem, other.stem) for word, other in itertools.product(ours, others)
            if word.stem not in theirs and lex.nearness(word, other) > 2]
    both = mine.keys() & theirs.keys()
    shared = both.union(stem for stem, _ in near)
    back = both.union(stem for _, stem in near)
    whole = sum(weights[stem] for stem in (*mine, *theirs))
    alike = sum(weights[stem] for stem in (*shared, *back)) / (whole or 1.0)
    people = [line.has & {"me", "you"} for line in (a, b)]
    return alike / 2.0 if all(people) and not people[0] & people[1] else alike


def _just_said(memory: Memory, words: Sequence[str]) -> List[int]:
    """Return the ids of exchanges in which somebody says just these words."""
    return memory.ids_holding([[f"h {' '.join(words)} a"]], MOST_TOLD)


def said_so(memory: Memory, text: str, asking: bool) -> List[Entry]:
    """Return exchanges in which somebody says just these words, or else holds them in a row, or
    says just the first or last of them; of common words the newest need not be those.
    """
    words = folded_words(text[:MAX_ASKED_CHARS])
    if not 0 < len(words) <= MAX_QUERY_TERMS:
        return []
    said, ids = " ".join(words), _just_said(memory, words)
    if not ids and memory.about_count() < MOST_TO_SCAN:
        ids = memory.ids_holding([["h " + said], [said + " a"]], MOST_TOLD)
        ends = {f"h {' '.join(part)} a" for size in range(2, len(words))
                for part in (words[:size], words[-size:])}
        if ends and not ids and not asking:  # a question is understood in other ways
            ids = memory.ids_holding([sorted(ends)], MOST_TOLD)
    return memory.entries_of(ids) or memory.entries_of([
        *memory.ids_holding([["h " + word for word in words]], MOST_TOLD),
        *memory.ids_holding([[word] for word in words], MOST_TOLD)])


def _question_in(lex: Lexicon, text: str) -> str:
    """Return the last sentence of a text that asks, to the end of what asks in it, or all of it.

    All of it, too, where that sentence names nothing: the boiler is cold, whom do I call?
    """
    asking = [s for line in text.splitlines() for s in sentences_of(line[-MAX_ASKED_CHARS:])
              if asks(s, lex)]
    said = asking[-1] if asking else ""
    if not is_question(said):  # why is the sky blue, my son wants to know
        clauses = [part for part in heard_in(lex, said) if asks(part, lex)] or [said]
        said = said[:said.find(clauses[-1]) + len(clauses[-1])]
    line = lex.line(said)
    names = any("idle" not in line.words[i].classes for i in line.telling)
    return said if names else text[:MAX_ASKED_CHARS]


# what a question leaves to the talk before it


def in_context(lex: Lexicon, text: str, turns: Sequence[Tuple[str, str]], depth: int = 3) -> str:
    """Return a question with what it leaves to the talk before it: And her brother?"""
    text = _MARKER.sub("", text)
    asked = [k for k, (role, _) in enumerate(turns) if role == "owner"]
    line, rest = lex.line(lex.opened(text)[0].strip() or text), _going_on(lex, text)
    leaning = next((i for i, word in enumerate(line.words) if "refers" in word.classes), -1)
    named = [i for i in line.telling if i < leaning and (line.caps[i] or line.owners[i])]
    if not asked or not depth or len(text) > MAX_ASKED_CHARS or named or not (
            rest or leaning >= 0 and asks(text, lex)):
        return text
    k, said = asked[-1], rest or text
    before = in_context(lex, turns[k][1], turns[:k], depth - 1)
    reply = turns[k + 1][1] if k + 1 < len(turns) else ""
    pronoun = line.words[leaning].word
    topic = _topic(lex, before, reply, pronoun) if leaning >= 0 else ""
    at = next((m for m in _WORD.finditer(said) if m[0].casefold() == pronoun), None)
    if topic and at:
        owns = "other" in line.words[leaning].classes and leaning + 1 in line.telling
        said = said[:at.start()] + topic + "'s" * owns + said[at.end():]
    return (_asked_again(lex, before, said) or text) if rest else said


def _going_on(lex: Lexicon, text: str) -> str:
    """Return of what else a text asks the last question: the rest of "and on Sunday?"; or ""."""
    spans, words, language = _words_in(lex, text[:MAX_ASKED_CHARS])
    size = lex.phrase_at(words, 0, "goes_on", language)
    rest = text[spans[size][0]:].strip(" ?") if 0 < size < len(words) else ""
    clause = bool(rest) and lex.line(rest).has & {"aux", "question", "subject"}
    return rest if (size > 1 or is_question(text)) and not clause else ""


def _asked_again(lex: Lexicon, before: str, said: str) -> str:
    """Return a question asked again of another thing, or of another time or place; or ""."""
    lead = lex.line(said).words[0]
    if not asks(before, lex):
        return ""
    if "prep" in lead.classes:
        same = re.search(rf"(?i)\b{re.escape(lead.word)}\b", before)
        return f"{before[:same.start() if same else None].rstrip(' ?')} {said}?"
    first, words = _topic(lex, before, "", ""), lex.line(said).words
    if first and "stands" in words[-1].classes:  # the black one; the other one may be any
        kept = [word.text for word in words[:-1] if "differs" not in word.classes]
        said = " ".join([*kept, first.split()[-1]])
    return before.replace(first, said, 1) if first else ""


def _topic(lex: Lexicon, question: str, reply: str, pronoun: str) -> str:
    """Return what a talk is about, as a question or its answer names it: Ines; my cousin; or "".

    A thing comes before a person for what is no person; a name in the answer comes first where a
    person or a name was asked for.
    """
    found: List[Tuple[bool, str]] = []
    asked = analyzed(lex, question)
    for text in (reply, question) if asked.slot in ("person", "name") else (question, reply):
        line = lex.line(turned(text) if text is reply else text)
        for head, name in things_named(lex, line):
            at = line.words.index(head)
            said = text is reply and name.casefold() in question.casefold()
            if not said and (line.caps[at] or line.owners[at] != "your"):
                found.append((bool(line.caps[at] or head.stem in lex.kinds["person"]), name))
    thing = pronoun in _NEUTER
    return next((name for person, name in found if person != thing),
                found[0][1] if found else "")


def feeling_of(line: Line) -> int:
    """Return the sign of what a sentence feels: −1 for sad, 1 for glad, 0 for neither or both."""
    felt = sum(("glad" in word.classes) - ("sad" in word.classes)
               for i, word in enumerate(line.words)  # but not what one is not
               if not any("not" in w.classes and w.word != "never"
                          for w in line.words[max(0, i - 3):i]))
    return (felt > 0) - (felt < 0)


def things_named(lex: Lexicon, line: Line) -> Iterator[Tuple[Word, str]]:
    """Yield (head, words) of what a sentence names by a name, or as whose or which it is: the wasp.

    A run of telling words is one thing, as far as no verb breaks it: my driving test; my boss took.
    """
    words, telling = line.words, {*line.telling}
    joined = {i for i, word in enumerate(words) if i in telling or word.word == "'s"}
    asking = bool(words) and bool(words[0].classes & {"question", "aux"})
    for start in (i for i in line.telling if i - 1 not in joined):
        end, led = start, start > 0 and bool(words[start - 1].classes & {"det", "own", "other"})
        verbs = ("ed", "ing", "s") if start <= led else ("ed", "ing")  # my knee clicks
        while end + 1 in joined and (line.caps[end + 1] or words[end + 1].word == "'s" or not (
                words[end + 1].word in lex.odd or words[end + 1].word[3:].endswith(verbs))):
            end += 1
        placed = start > 1 and "prep" in words[start - 2].classes  # on my shopping list
        if asking and end == len(words) - 1 and not line.caps[end] and not placed:
            end = max(start, end - 1)  # does the oracle wear; is my old bike safe
        end -= words[end].word == "'s"
        if not led:  # called Olga; Olga pays
            start = next((i for i in range(start, end) if line.caps[i]), end)
            end = next((i for i in range(start, end) if not line.caps[i + 1]), end)
        if led or line.caps[end] and end > 0:
            said = " ".join(word.text for word in words[start:end + 1]).replace(" 's", "'s")
            lead = words[start - 1].word if led else ""
            own = led and "own" in words[start - 1].classes
            yield words[end], f"{lead if own else 'the'} {said}" if led else said


# what is asked of the memory as a whole


def looked_up(lex: Lexicon, memory: Memory, text: str) -> Optional[Reply]:
    """Return the answer to a question about all that was told: of a day, on a list, about Ines."""
    asking = asks(text, lex)
    if not asking and not ("list" in lex.line(text).has and wishes(lex, text)):
        return None  # but read me the list
    asked = analyzed(lex, _question_in(lex, text))
    for look in (_told_then, _planned, _listed, _all_about, _compared, _counted_up):
        found = look(lex, memory, asked, lex.line(text))
        if found is not None:
            said = found[0] or _all_said(lex, found[1], memory.today())
            entries = tuple({unit.entry.id: unit.entry for unit in found[1]}.values())
            return Reply(said.strip(), "memory", entries[0], 1.0, entries) if entries else (
                Reply(UNKNOWN_REPLY, "nothing") if asking else None)
    return None


def _all_said(lex: Lexicon, units: Iterable[Unit], today: datetime.date) -> str:
    """Return statements as answers, one after another, each once."""
    return " ".join(dict.fromkeys(said_back(lex, unit, today) for unit in units))


# Words of its own, or "" for what the statements say, and the statements; None where not asked.
Looked = Optional[Tuple[str, List[Unit]]]
_TELLING = {"subject", "says"}  # a question that holds both is about what the owner told


def _what_holds(lex: Lexicon, entries: Iterable[Entry]) -> List[Unit]:
    """Return the statements of entries, without those whose place a later one has taken."""
    return _holding(lex, [unit for entry in entries for unit in _units_of(lex, entry, ("",))])


def _holding(lex: Lexicon, units: Sequence[Unit]) -> List[Unit]:
    """Return statements, oldest first, without those whose place a later one has taken."""
    return [unit for k, unit in enumerate(units) if not any(
        _replaces(lex, later.line, unit.line) for later in units[k + 1:])]


def _free_of(lex: Lexicon, asked: Asked, *classes: str) -> bool:
    """Return whether a question names nothing but days, and words of these classes."""
    free = {"idle", "says", "frame", "former", "agenda", *classes}
    return not any(word.stem not in lex.kinds["time"] | lex.kinds["unit"]
                   and not _is_number(lex, word) and not word.classes & free
                   and word.word not in lex.pairs["side", asked.line.language]
                   for i, word in enumerate(asked.line.words) if i in asked.line.telling)


def _told_then(lex: Lexicon, memory: Memory, asked: Asked, raw: Line) -> Looked:
    """What was told last or on some days, or when: What did I just say? And yesterday?"""
    if not asked.line.has >= _TELLING:
        return None
    today = memory.today()
    days = days_in(lex, asked.line.text, today)
    if not days and "lately" in asked.line.has and _free_of(lex, asked, "lately"):
        last = memory.told("e.told_at = (SELECT max(told_at) FROM entries WHERE recall AND "
                           "source IN ('chat', 'taught'))")[-1:]
        return "", [unit for entry in last for unit in _units_of(lex, entry, ("",))]
    if days and _free_of(lex, asked):
        first = datetime.datetime.combine(days[0].first, datetime.time()).timestamp() - 86_400.0
        last = datetime.datetime.combine(days[0].last, datetime.time()).timestamp() + 172_800.0
        told = memory.told("e.told_at BETWEEN ? AND ?", first, last)
        return "", _what_holds(lex, [e for e in told if days[0].first <= told_day(e) <= days[0].last
                                     ])[-MOST_LISTED:]
    if asked.slot == "time":
        found = [each for each in _about(lex, memory, asked) if each.entry.source in TOLD][-1:]
        return (f"You told me {_when_told(lex, found[0], today)}: "
                f"{said_back(lex, found[0], today)}" if found else "", found)
    return None


def _when_told(lex: Lexicon, unit: Unit, today: datetime.date) -> str:
    day = told_day(unit.entry)
    return named_days(lex, "en", day, day, today)


def _planned(lex: Lexicon, memory: Memory, asked: Asked, raw: Line) -> Looked:
    """What was said to be on some days: What did I do on 7 May? What are my plans for tomorrow?"""
    days = days_in(lex, asked.line.text, memory.today())
    has = asked.line.has
    if not days or has & {"you", "advice", "says"} or asked.slot in ("time", "number") or (
            asked.polar and "subject" not in has or not _free_of(lex, asked)):
        return None
    first, last = str(days[0].first), str(days[0].last)
    then = (entry for entry in memory.told("e.days LIKE '% %'") if any(
        part[:10] <= last and first <= part[12:] for part in entry.days.split()[1:]))
    return "", _what_holds(lex, then)[-MOST_LISTED:]


def _listed(lex: Lexicon, memory: Memory, asked: Asked, raw: Line) -> Looked:
    """What is on a list: What's on the packing list?"""
    words = asked.line.words
    at = next((i for i, word in enumerate(words) if "list" in word.classes), -1)
    to_do = bool(raw.has_phrase(lex, "todo"))
    if at < 0 and not to_do or asked.slot not in ("", "number", "job", "person"):
        return None
    name = {words[i].stem for i in asked.line.telling if not to_do and (
        i > at or at - 4 < i < at and (asked.line.owners[i] or i == at - 1))}
    items, used = _list_items(lex, memory, name, "todo" if to_do else "list")
    if not used:
        return None if to_do else ("", [])
    if asked.polar:
        here = any(words[i].stem in {lex.line(item).words[k].stem for k in lex.line(item).telling}
                   for item in items for i in asked.terms if i != at)
        return f"{'Yes' if here else 'No'}. On it: {_enumerated(items)}.", used
    counted = asked.slot == "number" or raw.has_phrase(lex, "asks.number")
    said = f"{len(items)}: " * bool(counted) + _enumerated(items)
    return f"{said[:1].upper()}{said[1:]}.", used


def _enumerated(items: Sequence[str]) -> str:
    """Return items as one writes them: a, b and c."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else
                        items or ["nothing"])


_ITEM_ENDS = re.compile(r"[,;]| (?:and|und|y|et) ")


def _list_items(lex: Lexicon, memory: Memory, name: AbstractSet[str], kind: str
                ) -> Tuple[List[str], List[Unit]]:
    """Return what is on a list by now, and the statements that put it there or took it off.

    "Packing list: tent and stove" begins one, "put a torch on it" and "cross the stove off" change
    the one named or the one spoken of last, and what is "done" is off it.
    """
    items: List[str] = []
    used: List[Unit] = []
    ours, last = False, None  # whether the list is spoken of; what was told before
    for entry in memory.last_told(MOST_TO_SCAN):
        for text in entry.text.splitlines():
            unit = Unit(entry, lex.line(lex.opened(text)[0]), text=text)
            act, words, ours = _list_act(lex, unit, name, kind, ours, used[-1:] == [last])
            said = [part.strip() for part in _ITEM_ENDS.split(words.strip(" .!"))
                    if part.strip() and not lex.line(part).has & {"courtesy"}]
            last = unit
            if act == "begins":
                items, used = said, [unit]
            elif act == "adds":
                items, used = [*items, *said], [*used, unit]
            elif act == "strikes" and used:
                gone = {word.stem for word in unit.line.words if "function" not in word.classes}
                kept = [item for item in items
                        if gone.isdisjoint(word.stem for word in lex.line(item).words)]
                used, items = [*used, *[unit] * (kept != items)], kept
    return items, used


def _list_act(lex: Lexicon, unit: Unit, name: AbstractSet[str], kind: str, ours: bool,
              goes_on: bool) -> Tuple[str, str, bool]:
    """Return what a statement does to a list ("begins", "adds", "strikes" or ""), the words for its
    items, and whether the list is spoken of from then on; goes_on is whether it was just before."""
    line, (head, colon, rest) = unit.line, unit.text.partition(":")
    told = lex.opened(unit.text)[1] == "tell"  # I must tell you that it leaks
    duty = _duty(lex, unit.text) if kind == "todo" and not told else ""
    if duty:
        return "adds", duty, True
    listed = bool(line.has_phrase(lex, kind)) or bool(  # shopping: milk, eggs
        colon and "," in rest and name and name <= {word.stem for word in lex.line(head).words})
    if listed:  # another's name may stand before it: the guest list; or none: the list
        named = bool(line.has_phrase(lex, "todo")) or any(
            "list" in line.words[i + 1].classes for i in line.telling if i + 1 < len(line.words))
        ours = name <= {word.stem for word in line.words} or ours and not named
    emptied = line.has & {"strikes", "clears"} and not line.has & {"refers", "not"} and all(
        line.words[i].stem in name or line.words[i].classes & {"strikes", "clears", "list", "idle"}
        for i in line.telling)  # clear the shopping list
    if emptied and ours and listed:
        return "begins", "", ours
    if colon and ours and listed:
        return "adds" if kind == "todo" else "begins", rest, ours
    holds = [i for i, word in enumerate(line.words) if "holds" in word.classes]
    if holds and ours and listed and wishes(lex, unit.text):  # make a list with a tent and a rope
        return "begins", line.text[_spans(lex, line)[holds[0]][1]:], ours
    fragment = len(line.words) < len(lex.line(unit.text).words) and len(line.words) < MOST_ECHOED
    more = goes_on and fragment and not line.has & {"aux", "subject"}  # and tape
    puts = bool(line.words) and "puts" in line.words[0].classes or listed and "aux" in line.has
    if ours and (puts or more) and "strikes" not in line.has:
        return "adds", _object(lex, line), ours
    over = kind == "todo" and (  # the kettle's descaled
        "aux" in line.has or any(word.word == "'s" for word in line.words))
    clauses = [lex.line(part).has for part in _STOPS.split(line.text)]  # she can't, strike her off
    strikes = any("not" not in has and (over or "done" in has or ours and "strikes" in has)
                  for has in clauses)
    return "strikes" if strikes else "", "", ours


def _duty(lex: Lexicon, text: str) -> str:
    """Return what a text says is to be done: call the roofer, of "I have to call the roofer"."""
    spans, words, language = _words_in(lex, text)
    sizes = [lex.phrase_at(words, i, "duty", language) for i in range(len(words))]
    end = next((i + size for i, size in enumerate(sizes) if size), len(words))
    return text[spans[end][0]:] if end < len(spans) else ""


def _object(lex: Lexicon, line: Line) -> str:
    """Return what is put somewhere: a torch, of "put a torch on it"."""
    start, spans = int("puts" in line.words[0].classes), _spans(lex, line)
    end = next((i for i, word in enumerate(line.words) if i and word.classes & {"prep", "aux"}),
               len(line.words))
    return line.text[spans[start][0]:spans[end - 1][1]] if start < end <= len(spans) else ""


def _about(lex: Lexicon, memory: Memory, asked: Asked) -> List[Unit]:
    """Return the statements that hold all that a question names, oldest first."""
    asked, entries = gathered(lex, memory, asked)
    skip = {"idle", "says", "frame", "about", "list", "sums"}
    terms = [i for i in asked.terms if not asked.line.words[i].classes & skip and (
        i not in asked.asking)]
    found = [each.unit for each in judged(lex, asked, entries)
             if terms and all(each.near[i] > 3 for i in terms)
             and not _only_beside(lex, each.unit) and (
                 each.unit.entry.source in TOLD or each.unit.line.speaker
                 or not ("own" in asked.line.has or _leaning(each.unit.entry.text)))]
    return sorted(found, key=lambda unit: (unit.entry.told_at, unit.entry.id))


def _all_about(lex: Lexicon, memory: Memory, asked: Asked, raw: Line) -> Looked:
    """All that holds of a person or a thing, the newest first: What do you know about Ines?"""
    line = asked.line
    myself = asked.slot == "person" and "subject" in line.has and (  # who am I?
        "is" in _NONE.union(*(word.classes for word in line.words[1:2]))) and all(
        "idle" in line.words[i].classes or i in asked.asking for i in asked.terms)
    if not raw.has_phrase(lex, "about") and not line.has >= _TELLING and not myself:
        return None
    if myself or "me" in line.words[-1].classes:
        told = [unit for unit in _what_holds(lex, memory.last_told(MOST_HELD))
                if unit.line.has & {"me", "own", "subject"}]
        return "", told[::-1][:MOST_LISTED]
    units = _holding(lex, _about(lex, memory, asked))[::-1][:MOST_LISTED]
    if not units and not any(line.caps[1:]) and "own" not in line.has:
        return None  # tell me about the moon
    return _one_by_one(lex, units, memory.today()), units


def about(memory: Memory, text: str) -> Reply:
    """Return all that holds of what a text names, said shortly, and the entries that say so."""
    lex, today = lexicon_of(memory), memory.today()
    units = _holding(lex, _about(lex, memory, analyzed(lex, text)))[::-1][:MOST_LISTED]
    if not units:
        return Reply(UNKNOWN_REPLY, "nothing")
    entries = tuple({unit.entry.id: unit.entry for unit in units}.values())
    return Reply(_one_by_one(lex, units, today), "memory", entries[0], 1.0, entries)


def due(memory: Memory) -> str:
    """Return what was told of today on a day before, in one line; "" if nothing was."""
    lex, today = lexicon_of(memory), memory.today()
    told = [entry for entry in memory.told("instr(substr(e.days, 11), ?)", today.isoformat())
            if told_day(entry) < today]
    said = [f"{said_back(lex, unit, today)} You told me {_when_told(lex, unit, today)}."
            for unit in _what_holds(lex, told)[-3:]]
    return f"Today: {' '.join(said)}" if said else ""


def _one_by_one(lex: Lexicon, units: Sequence[Unit], today: datetime.date) -> str:
    """Return statements as one text, what some lean on before them and once only."""
    held: Dict[str, List[Unit]] = {}
    for unit in units:
        held.setdefault(unit.about or _stopped(unit.text), []).insert(0, unit)
    said = []
    for kin in held.values():
        first = next((u for u in kin if not u.about), kin[0])
        said.append(said_back(lex, first, today))
        said += [said_back(lex, unit._replace(line=lex.line(unit.text), about=""), today)
                 for unit in kin if unit is not first]
    return " ".join(dict.fromkeys(said))


def _values(lex: Lexicon, words: Iterable[Word], language: str) -> Iterator[float]:
    """Yield the numbers among words, in digits or not; "a" is none."""
    counts = lex.pairs["count", language]
    for text in (word.word for word in words):
        if re.fullmatch(r"\d+(?:[.,]\d+)?", text):
            yield float(text.replace(",", "."))
        elif len(text) > 2 and text in counts:
            yield float(counts[text])


def _compared(lex: Lexicon, memory: Memory, asked: Asked, raw: Line) -> Looked:
    """What told numbers come to: which of two things is more, by how much, or both together."""
    more, less, sums = (kind in asked.line.has for kind in ("more", "less", "sums"))
    if not (more or less or sums):
        return None
    names = [said for _, said in things_named(lex, asked.line)]
    names = names if len(names) > 1 else _told_of(lex, memory, asked)
    found = [each for each in (_figure_of(lex, memory, name) for name in names) if each]
    found = found if len(found) > 1 or sums else _figures_of_all(lex, memory, asked)
    values = [value for value, _, _ in found]
    measures = {next((word.stem for word in unit.line.words if word.stem in lex.kinds["unit"]), "")
                for _, unit, _ in found}
    if len(measures) > 1:
        return None  # metres and centimetres
    if len(found) < 2 or len({*values}) < 2 and not sums:
        return None
    if sums or asked.slot not in ("", "person"):  # how much longer
        lead = f"{sum(values) if sums else max(values) - min(values):g}: "
    else:
        name = turned((max if more else min)(found, key=itemgetter(0))[2])
        lead = f"{name[:1].upper()}{name[1:]}. "
    units = [unit for _, unit, _ in found]
    return lead + _one_by_one(lex, units, memory.today()), units


def _told_of(lex: Lexicon, memory: Memory, asked: Asked) -> List[str]:
    """Return the names of told things that a question names by one word: which suitcase?"""
    for noun in (asked.line.words[i] for i in asked.terms if not asked.line.words[i].classes):
        heads = (pair for unit in _about(lex, memory, analyzed(lex, noun.text))
                 for pair in things_named(lex, lex.line(unit.text)))
        names = [*dict.fromkeys(said for head, said in heads if lex.nearness(noun, head) == 4)]
        if len(names) > 1:
            return names
    return []


def _figures_of_all(lex: Lexicon, memory: Memory, asked: Asked) -> List[Tuple[float, Unit, str]]:
    """Return the newest number of each who is told of with what is asked: who is the tallest?"""
    found: Dict[str, Tuple[float, Unit, str]] = {}
    asked, entries = gathered(lex, memory, asked)
    terms = [i for i in asked.terms if not asked.line.words[i].classes & {"more", "less"}]
    units = (each.unit for each in judged(lex, asked, entries) if all(
        each.near[i] for i in terms or asked.terms))  # the tallest, or the fewest hours
    for unit in sorted(units, key=lambda unit: (unit.entry.told_at, unit.entry.id)):
        line = lex.line(unit.text)
        at = next((at for at, named in enumerate(line.caps) if named), len(line.words))
        capital = " ".join(word.text for word in line.words[at:at + 2] if (
            word is line.words[at] or _is_number(lex, word)))  # lathe 2
        name = capital or next((said for _, said in things_named(lex, line)), "") or (
            "I" if "subject" in line.has else "")
        value = _figure_in(lex, line)
        if name and value is not None:
            found[name] = (value, unit, name)
    return list(found.values())


def _figure_in(lex: Lexicon, line: Line) -> Optional[float]:
    """Return the number that a sentence tells; None if it has none.

    It is one with a unit rather than another, and rather in digits; lathe 1 is a name.
    """
    def rank(at: int) -> Tuple[bool, bool, bool]:
        after = [word.stem in lex.kinds["unit"] for word in line.words[at + 1:at + 2]]
        label = at - 1 in line.telling and not (
            _is_number(lex, line.words[at - 1]) or _verbal(lex, line.words[at - 1]))
        return after != [True], label, not line.words[at].word[:1].isdigit()
    best = sorted(range(len(line.words)), key=rank)
    return next(_values(lex, [line.words[at] for at in best], line.language), None)


def _figure_of(lex: Lexicon, memory: Memory, name: str) -> Optional[Tuple[float, Unit, str]]:
    """Return the number told last of a thing, the statement, and the thing; None where none was."""
    found = _about(lex, memory, analyzed(lex, name)) or _about(
        lex, memory, analyzed(lex, name.rpartition(" ")[0] or name))  # what the chest weighs
    figures = ((_figure_in(lex, unit.line), unit) for unit in reversed(found))
    return next(((value, unit, name) for value, unit in figures if value is not None), None)


def _counted_up(lex: Lexicon, memory: Memory, asked: Asked, raw: Line) -> Looked:
    """How many there are, over several statements: six chairs, two more; a cousin and another."""
    things = [asked.line.words[i] for i in asked.line.telling if i not in asked.asking]
    if asked.slot not in ("number", "amount") or "you" in asked.line.has or not things:
        return None
    total, counted, names = 0.0, [], {}  # type: float, List[Unit], Dict[str, Unit]
    for unit in _about(lex, memory, asked):
        line, here = lex.line(unit.text), 0
        for j in (j for j in line.telling if (
                line.words[j].stem in lex.kinds["unit"] | lex.kinds["money"]
                if asked.slot == "amount" else lex.nearness(things[0], line.words[j]) == 4)):
            names.update((w.text, unit) for w in _names_beside(lex, line, j))
            before = _values(lex, line.words[max(0, j - 3):j], line.language)
            here += next((value for value in [*before][::-1] if (
                value % 1.0 == 0.0 or asked.slot == "amount")), 0)
        if here and unit.entry.source in TOLD:
            added = "added" in line.has or "sums" in asked.line.has
            ended = bool(line.has_phrase(lex, "ended"))
            total = total + here if added else total - here if ended else here
            counted = [*counted, unit] if added or ended else [unit]
    if len(names) > max(1, total) and asked.slot == "number":
        return f"{len(names)} that I know of: {_enumerated([*names])}.", [*names.values()]
    if len(counted) > 1:
        return f"{total:g}: {_all_said(lex, counted, memory.today())}", counted
    return None


Like = Callable[[str], List[Tuple[float, int, int]]]  # of a text: cosine, key, place of sayings


def _heard(lex: Lexicon, memory: Memory, asked: Asked, text: str, entries: Iterable[Entry],
           like: Optional[Like]) -> Iterator[Recall]:
    """Yield the exchanges that fit a text, or a clause of it; of what asks, a clause that asks.

    Those of entries may fit all of it; without sentence vectors, what clauses say word for word.
    """
    asking = asks(text, lex)
    wants = asking or wishes(lex, text)
    for part in dict.fromkeys([text, *heard_in(lex, text)][:MOST_PARTS]):
        if part != text and wants and not (asks(part, lex) or wishes(lex, part)):
            continue
        near = {(key, place): cosine for cosine, key, place in like(part)} if like else {}
        found = [*memory.by_keys([key for key, _ in near])]
        found += said_so(memory, part, asking) if part == text or not like else []
        found += entries if part == text else []
        share = len(folded_words(part)) / max(1, len(folded_words(text)))
        yield from _exchange_fits(lex, memory, asked, part, {e.id: e for e in found}.values(),
                                  near, 1.0 - WHOLE + WHOLE * share)


# What is asked for by these is told surely from all else: no number, no reason, no answer.
_STRICT = frozenset("reason age number amount measure span year code".split())


def recall(memory: Memory, text: str, rng: random.Random, least: float = 0.5,
           like: Optional[Like] = None, lex: Optional[Lexicon] = None) -> List[Recall]:
    """Return what fits the text, best first; equal exchanges in an order that rng decides."""
    lex, text = lex or lexicon_of(memory), _MARKER.sub("", text)
    asking = asks(text, lex)
    text = _question_in(lex, text) if asking else text[:MAX_ASKED_CHARS]
    asked = analyzed(lex, text)
    if not asked.line.words:
        return []
    asked, entries = gathered(lex, memory, asked)
    fits = list(_heard(lex, memory, asked, text, entries, like))
    fits.sort(key=lambda fit: (-round(fit.score, 2), rng.random()))
    best: Dict[Tuple[int, str], Recall] = {}
    for fit in fits:  # one may fit several clauses
        best.setdefault((fit.entry.id, fit.answer), fit)
    fits = list(best.values())
    if not asking:
        return fits
    said, today = [], memory.today()
    found = newest_first(lex, asked, judged(lex, asked, entries), least)
    names = [asked.line.words[i].text for i in asked.vital if asked.line.caps[i]]
    compares = any(word.classes & {"more", "less"} and i + 1 not in asked.line.telling
                   and word.word not in ("most", "least", "latest")
                   for i, word in enumerate(asked.line.words))  # my older brother is one person
    for each in found:
        line, unit, answer = each.unit.line, each.unit, said_back(lex, each.unit, today)
        spoken = lex.phrases.get((each.verdict, asked.line.language), [each.verdict.capitalize()])
        lead = f'{" ".join(spoken)}. ' if each.verdict else ""  # Yes, Ja, …
        unsure = asked.polar and not each.verdict or each.filled < 2 and any(
            _asks_my_name(asked, i) for i in asked.terms) or (  # is quoted at most: I am Irish
            asked.slot in _STRICT and not each.filled or compares
            or asked.slot == "person" and _role_clash(asked, line, each.near, each.at)
            or line.speaker and (asked.line.has & {"subject", "own"} or names and not any(
                name in line.speaker for name in names)))
        said.append(Recall(
            min(each.score, least / 2.0) if unsure else each.score, unit.entry,
            lead + answer, unit.text, (), answer if line.speaker else f'"{unit.text}"'))
    if found and found[0].score >= least:
        said[0] = _with_others(lex, asked, found, said, least, today)
    return sorted([*said[:1], *fits, *said[1:]], key=lambda fit: -round(fit.score, 2))


def _with_others(lex: Lexicon, asked: Asked, found: Sequence[Judged], said: Sequence[Recall],
                 least: float, today: datetime.date) -> Recall:
    """Return the best answer with those that answer beside it, and with what is to be reckoned."""
    top, best = found[0], said[0]
    if top.unit.entry.source in TOLD and _began(lex, asked, top.unit.line):
        text, day = top.unit.line.text, told_day(top.unit.entry)
        at = max((text.casefold().find(asked.line.words[i].word) for i in asked.terms), default=-1)
        days = sorted(days_in(lex, text, day), key=lambda when: (when.start < at, when.start))
        return best._replace(answer=f"{best.answer} That is {_length(days[0].first, today)}.") if (
            days and days[0].first < today) else best
    if asked.slot == "time" and not top.filled and top.unit.entry.source in TOLD:
        return best._replace(
            answer=f"{best.answer} You told me {_when_told(lex, top.unit, today)}.")
    if not _wants_all(asked) or _mends(lex, top.unit):
        return best  # now it is Marta alone
    beside = [fit for each, fit in zip(found[1:], said[1:]) if fit.score >= least
              and each.filled == top.filled and fit.entry.source in TOLD
              and all(each.near[i] > 2 for i in top.near if top.near[i] > 2)
              and not _replaces(lex, top.unit.line, each.unit.line)
              and (asked.slot != "person" or _subject(each.unit.line) != _subject(top.unit.line))]
    answers = dict.fromkeys([best.answer, *(fit.answer for fit in beside)])
    return best._replace(answer=" ".join(answers), others=tuple(fit.entry for fit in beside))


def _wants_all(asked: Asked) -> bool:
    """Return whether several statements may answer side by side: Who plays chess? Which sports?"""
    return not asked.polar and (asked.slot == "person" or bool(asked.kind) and not (
        asked.vital - asked.asking))


def _replaces(lex: Lexicon, new: Line, old: Line) -> bool:
    """Return whether one statement has another's place: all the same but for its value."""
    ours, theirs = ([line.words[i].stem for i in line.telling] for line in (new, old))
    lost = [j for j in old.telling if old.words[j].stem not in ours]
    got = [i for i in new.telling if new.words[i].stem not in theirs]
    return bool(lost) and len(lost) < 3 and len(ours) > len(got) and any(
        _same_sort(lex, new, i, old, j) for i in got for j in lost) and (
            _subject(new) == _subject(old))


def _length(first: datetime.date, last: datetime.date) -> str:
    """Return the time between two days in the largest unit that suits it."""
    days = (last - first).days
    for size, unit in ((365, "year"), (30, "month"), (7, "week"), (1, "day")):
        count = days // size
        if count > 1 and (size != 7 or days % 7 == 0 or days > 27):
            return f"{count} {unit}s"
    return f"{days} day" + "s" * (days != 1)


def _sum(lex: Lexicon, memory: Memory, text: str) -> Optional[Reply]:
    """Return the answer to a sum, in the words of an exchange that has a place for it."""
    if not asks(text, lex) or reckoned(lex, text) is None:
        return None
    answers = [answer for entry in memory.entries_of(memory.ids_holding([["reckon"]], MOST_TOLD))
               for _, _, answer in sayings_of(entry.text) if "{reckon}" in answer
               and lex.line(answer).language == lex.line(text).language]
    said = filled_in(lex, memory, min(answers, key=len, default="{reckon}."), text)
    return Reply(said or "", "tool")


def recollection(memory: Memory, text: str, rng: random.Random, least: float,
                 rejected: Container[str] = (), turns: Sequence[Tuple[str, str]] = (),
                 like: Optional[Like] = None) -> Tuple[Optional[Reply], List[Recall]]:
    """Return what memory replies by itself to a text, or None; and all that fits it."""
    known, meant, again = lexicon_of(memory), in_context(lexicon(), text, turns), False
    if meant != text and not any("{" in entry.text for entry in memory.entries_of(
            _just_said(memory, folded_words(text)))):
        again, text = "differs" in known.line(text).has, meant  # but not what time is it
    whole = _sum(known, memory, text) or looked_up(known, memory, text)
    if whole and rejection(text, whole.text) not in rejected:
        return whole, []
    fits = [fit for fit in recall(memory, text, rng, least, like, known)
            if not rejected or rejection(text, fit.answer) not in rejected]
    told = [fit for fit in fits if not is_exchange(fit.entry)]
    if again:  # the other one: not what was just said, if there is more
        told = [fit for fit in told if fit.answer not in turns[-1][1]] or told
    said = [fit for fit in fits if is_exchange(fit.entry)]
    best, alike = (fits[0].score if fits else 0.0 for fits in (told, said))
    factual = asks_for_a_fact(text)
    if told and best >= least and (  # a tale that was read is no answer to talk
            factual or best >= alike and (told[0].entry.source in TOLD or not said)):
        return Reply(told[0].answer, "memory", told[0].entry, best,
                     (told[0].entry, *told[0].others)), fits
    likely = least + (1.0 - least) / 10.0
    sure = least if not (factual or names_something(text)) else 1.0 if not like else (
        2.0 + least) / 3.0 if factual else likely
    exchange = Reply(said[0].answer, "tool" if said[0].told else "exchange", said[0].entry,
                     alike) if said and alike >= least else None
    if exchange and alike >= sure:
        return exchange, fits
    quote = _quotation(known, text, told[:2], factual)
    if quote and rejection(text, quote.text) not in rejected:
        return quote, fits
    # what asks for advice is no question about the owner
    advises = exchange and like and alike >= likely and "own" not in known.line(text).has
    return exchange if advises and not quote else None, fits


def answered_by(lines: Iterable[str], source: str, text: str, rng: random.Random, least: float,
                turns: Sequence[Tuple[str, str]] = (),
                clock: Callable[[], float] = time.time) -> Optional[Reply]:
    """Return what lines that are known for this once answer or have near to a text, or None."""
    with contextlib.closing(Memory(":memory:", clock)) as memory:
        with memory.transaction():
            for line in lines:
                memory.add_entry(source, Document((line,), True))
        found, _ = recollection(memory, text, rng, least, (), turns)
    return found if found and found.source in ("memory", "quote") else None


def _quotation(lex: Lexicon, text: str, told: Sequence[Recall], factual: bool) -> Optional[Reply]:
    """Return what was told near to what a text asks, word for word, or None."""
    mine, asked = {"own", "me"}, analyzed(lex, text).line.has

    def quotable(fit: Recall) -> bool:
        """Whether it may be quoted: what was told, or what was read and is as much the owner's."""
        if fit.entry.source in TOLD:
            return factual or "you" not in asked  # which puts it to the program itself
        return factual and not (mine & asked and not mine & lex.line(fit.told).has)
    near = list({fit.told: fit for fit in told
                 if fit.score >= JUDGE["quote"] and quotable(fit)}.values())
    lines = [lex.line(fit.told) for fit in near]
    if len(near) > 1 and near[0].entry.told_at > near[1].entry.told_at and (
            _replaces(lex, *lines) or lines[0].has_phrase(lex, "changed")):
        near = near[:1]
    if not near:
        return None
    spans = [(at, at + len(fit.told)) for fit in near for at in [near[0].entry.text.find(fit.told)]]
    if len(spans) > 1 and near[0].entry == near[1].entry and min(spans)[0] >= 0:
        whole = near[0].entry.text[min(spans)[0]:max(spans)[1]]  # two clauses, as they were told
        near = [near[0]._replace(quote=f'"{" ".join(whole.split())}"')]
    lead = "you told me" if near[0].entry.source in TOLD else "I have read"
    return Reply(f"I am not sure, but {lead}: {' and '.join(fit.quote for fit in near)}", "quote",
                 near[0].entry, near[0].score, tuple(fit.entry for fit in near))


def mended(lex: Lexicon, recent: Sequence[Entry], text: str) -> Optional[str]:
    """Return a statement told of late as a correction has it, or None: at nine; no, at ten.

    What the correction names takes the place of what it denies, or of the last thing of its sort in
    what was told last.
    """
    found = (_mended(lex, entry.text.strip(), text, entry is recent[-1])
             for entry in reversed(recent))
    return next(filter(None, found), None)


def settled(lex: Lexicon, text: str) -> str:
    """Return a text with what it corrects itself put right: at nine. No, at ten."""
    said, *rest = sentences_of(text) or [text]
    for sentence in rest:
        mends = _corrected(lex, sentence) and _mended(lex, said, sentence, True)
        said = mends or f"{said} {sentence}"
    return said


def _mended(lex: Lexicon, before: str, text: str, last: bool) -> Optional[str]:
    rest = _corrected(lex, text)
    text = next((rest[rest.find(part):] for part in sentences_of(rest)
                 if "not" in lex.line(part).has), rest or lex.opened(text)[0])
    new, old = lex.line(text), lex.line(before)
    says_i = any("subject" in word.classes and not (i and "det" in new.words[i - 1].classes)
                 for i, word in enumerate(new.words))  # an i is a letter
    whole = ": " in text or "aux" in new.has and len(new.telling) > 2 or any(
        "aux" in word.classes and i - 1 in new.telling  # no, the saw is in bay 5
        for i, word in enumerate(new.words))
    if not before or asks(text, lex) or says_i or "own" in new.has or whole and not (
            "not" in new.has) or not (rest or "not" in new.has):
        return None
    words, denied = new.words, [i for i, word in enumerate(new.words) if "not" in word.classes]
    gone = [j for i in denied for j, word in enumerate(old.words) if j in old.telling and any(
        word.stem == w.stem for w in words[i + 1:i + 4])]
    known = {word.stem for word in old.words}  # Hattie isn't, of Hattie: nothing new takes a place
    fresh = [i for i in new.telling if words[i].stem not in known]
    said = [i for i in fresh if gone and i > denied[0] and "aux" in words[i - 1].classes
            and "refers" in words[i - 2].classes]  # not Ida, it is Eva
    fresh = said or [i for i in fresh if not gone or i < denied[-1]] or fresh  # Eva, not Ida
    if denied and not gone or not fresh or len(fresh) > 4 or not (gone or last):
        return None
    i = fresh[0]
    at = gone[:1] or sorted((j for j in old.telling if _same_sort(lex, new, i, old, j)),
                            key=lambda j: (-_in_common(lex, new, i, old, j), -j))[:1]
    lead = [j for j, word in enumerate(old.words) if "prep" in word.classes and i and
            word.word == words[0].word]
    if not at and (lead or "refers" in new.has or "det" in words[0].classes):
        start = lead[-1] + 1 if lead else next((j + 1 for j, word in enumerate(old.words)
                                                if j and "aux" in word.classes), 0)
        at = [j for j in old.telling if j >= start > 0][:1]
    spans, places = _spans(lex, new), _spans(lex, old)
    if not (at and spans and places):
        return None
    first, last = _joined(before, places, at[0], -1), _joined(before, places, at[0], 1)
    end = i = _joined(text, spans, i, -1)
    while end + 1 in fresh or end + 2 in fresh and _is_number(lex, words[end + 2]):
        end += 1
    return before[:places[first][0]] + text[spans[i][0]:spans[end][1]] + before[places[last][1]:]


def _spans(lex: Lexicon, line: Line) -> List[Tuple[int, int]]:
    """Return where the words of a line stand in its text, the two of "it's" at one place."""
    spans = [match.span() for match in _WORD.finditer(line.text)
             for _ in line.parts_of(lex, match[0].replace("’", "'"))]
    return spans if len(spans) == len(line.words) else []


def _joined(text: str, spans: Sequence[Tuple[int, int]], at: int, step: int) -> int:
    """Return the last word, one way on from a place, that signs join to it: 40, of 9:40."""
    while 0 <= at + step < len(spans):
        left, right = sorted((at, at + step))
        if text[spans[left][1]:spans[right][0]] not in (":", ".", "-"):
            break
        at += step
    return at


def _in_common(lex: Lexicon, new: Line, i: int, old: Line, j: int) -> int:
    """Return how much two words have in common: both numbers, of one sort, the same neighbours."""
    one, other = new.words[i], old.words[j]
    beside = sum(a.stem == b.stem or a.word.isdigit() and b.word.isdigit()
                 for step in (-1, 1) if min(i, j) + step >= 0
                 for a, b in zip(new.words[i + step:][:1], old.words[j + step:]))
    digits = one.word[:1].isdigit() and other.word[:1].isdigit()
    return 2 * beside + digits + sum({one.word, other.word} <= pairs.keys()
                                     for pairs in lex.pairs.values())


def _corrected(lex: Lexicon, text: str) -> str:
    """Return what follows the words with which a correction begins; "" where none do."""
    spans, words, language = _words_in(lex, text[:MAX_ASKED_CHARS])
    at, begun, size = 0, False, 1
    while size and at < len(words):
        sizes = [lex.phrase_at(words, at, kind, language) for kind in ("corrects", "opening")]
        if _denies_thing(lex, text, spans, words, at, language):
            break
        at, begun, size = at + max(sizes), begun or sizes[0] > 0, max(sizes)
    return text[spans[at][0]:] if begun and at < len(spans) else ""


def _same_sort(lex: Lexicon, one: Line, i: int, other: Line, j: int) -> bool:
    """Return whether two words are of one sort: numbers or times, names, or of one kind."""
    a, b = one.words[i], other.words[j]
    timely = [_is_number(lex, w) or w.word in lex.pairs["nth", line.language]
              or w.stem in lex.kinds["time"] for line, w in ((one, a), (other, b))]
    return a.stem != b.stem and (all(timely) or not any(timely) and (
        one.caps[i] and other.caps[j] or lex.are_rivals(a, b)))


def asks_for_a_fact(text: str) -> bool:
    """Return whether a text asks for something that only who was told it can know."""
    lex = lexicon()
    if not asks(text, lex):
        return False
    asked = analyzed(lex, _question_in(lex, text))
    line = asked.line
    if line.has & {"you", "advice"} or _is_general(asked) and not asked.polar:
        return False
    named = any(line.caps[1:]) or any(one.word in ("'s", "the") and not (
        other.classes & {"function", "idle"}) for one, other in zip(line.words, line.words[1:]))
    return bool(line.has & {"me", "own"} or named and line.telling)


def asks_of_itself(text: str) -> bool:
    """Return whether a text asks for a fact about things and persons of which it has told before.
    """
    lex = lexicon()
    question = _question_in(lex, text) if asks_for_a_fact(text) else ""
    if question in ("", text[:MAX_ASKED_CHARS]):
        return False
    asked, told = analyzed(lex, question), statements_of(text, lex)
    stems = {word.stem for part in told for word in lex.line(part).words}
    return bool(asked.vital) and all(asked.line.words[i].stem in stems for i in asked.vital)


def names_something(text: str) -> bool:
    """Return whether a text states a fact with a name or a number in it, to be kept exactly.

    How one feels or fares is none.
    """
    lex, said = lexicon(), text[:MAX_ASKED_CHARS]
    whole, lines = lex.line(said), [lex.line(part) for part in statements_of(said, lex)]
    if whole.words and whole.words[0].classes & {"puts", "strikes"} and whole.has & {
            "list", "refers"} or "list" in whole.has and ":" in text:
        return True  # of a list
    states = lex.opened(text)[1] == "tell" or any(
        "own" in line.has or "you" not in line.has
        and (any(line.caps[1:]) or any(_is_number(lex, word) for word in line.words))
        and (len(line.telling) > 1 or "me" in line.has) for line in lines)
    return states and bool(
        re.search(r"\d|\b(?:named?|called)\b|[^\W_][,;:]? (?!I\b)[A-Z](?![A-Z]{3})", text))


def holds_statements(text: str) -> bool:
    """Return whether a text tells anything that a question may ask for later."""
    return len(text) > MAX_ASKED_CHARS or any(map(statements_of, text.splitlines()))


def is_exchange(entry: Entry) -> bool:
    """Return whether an entry is an exchange of the corpus, or an approved one."""
    return entry.source not in TOLD and entry.text.startswith(MARKERS)


def is_plain(word: str) -> bool:
    """Return whether a folded word hardly tells what a text is about."""
    lex = lexicon()
    return any(classes & {"function", "idle"} for language in lex.closed for form in (
        word, lex.odd.get(word, word)) for classes in [lex.closed[language].get(form, _NONE)])


def search(memory: Memory, text: str, count: int = 20) -> List[Entry]:
    """Return the entries that hold most of what is telling in the text, best and newest first."""
    lex = lexicon_of(memory)
    return gathered(lex, memory, analyzed(lex, text))[1][:count]


def rejection(question: str, answer: str) -> str:
    """Return the sign under which an answer to a question is kept as rejected; it tells neither."""
    lex = lexicon()
    asked = " ".join(word.word for word in lex.line(lex.opened(question)[0]).words)
    return f"{line_key(asked):x}:{line_key(' '.join(folded_words(answer))):x}"


# What is said when there is nothing to say. Most were rated by eye, from 0 to 3, behind some thirty
# messages of their kind, and those that others were better than are gone.
SILENCE = {
    "wordless": ("I find no word in that. What is on your mind?",
                 "I read letters only, and there are none. Tell me in words?"),
    "unknown": UNKNOWN_REPLIES, "kept": KEPT_REPLIES,
    "cannot": ("I am too small for that one, sorry. Shall we talk about it instead?",
               "I have too few words for that, sorry. Tell me more about it, and I read it well.",
               "I would make a poor job of that. How would you begin?"),
    "guess": ("A good question, and too big for me. What made you ask?",
              "I do not know enough for that, sorry. What is your guess?",
              "That is more than I know. What do you think yourself?"),
    "self": ("Of myself I know little: I am one small program, and I learn from what you write.",
             "That I cannot tell, I am only words and numbers. What would you like it to be?",
             "I never looked so far into myself. Why do you ask?"),
    "worry": ("I wish I knew. Whom do you trust with such a question?",
              "I cannot know that from in here, and I am sorry that it weighs on you. Who near "
              "you could help?"),
    "sad": ("I am sorry. Do you want to tell me more about it?",
            "I am sorry to read that. How are you now?",
            "That is hard. Tell me more, I have time."),
    "glad": ("That is good to read. Tell me more, I have time.",
             "I am glad with you. I would like to know how it goes on."),
    "heard": ("Thank you for telling me. Tell me more, I have time.",
              "No small thing. How do you feel about it?", "I would like to know how it goes on.",
              "And you, how are you in the middle of it?")}


def way_of(text: str) -> str:
    """Return in which of its ways silence answers a text, by what the text wants or tells."""
    lex, parts = lexicon(), sentences_of(text[:MAX_ASKED_CHARS])
    line, factual = lex.line(text[:MAX_ASKED_CHARS]), asks_for_a_fact(text)
    if not line.words:
        return "wordless"
    if any(wishes(lex, part) for part in parts) and (not factual or "given" in line.has):
        return "cannot"
    asked = [analyzed(lex, part) for part in parts if asks(part, lex)]
    if asked and feeling_of(line) < 0 and asked[-1].line.has & {"me", "own"}:
        return "worry"
    if factual and not (asked and _is_general(asked[-1])):  # it may ask as a whole alone
        return "unknown"
    if asked:
        begins = [word.classes for word in asked[-1].line.words[:2]]  # are you, do you
        return "self" if len(begins) > 1 and "aux" in begins[0] and "you" in begins[1] else "guess"
    if parts and all(_is_plain_fact(lex, part) for part in parts):
        return "kept"
    return {-1: "sad", 0: "heard", 1: "glad"}[feeling_of(line)]


def _is_general(asked: Asked) -> bool:
    """Return whether a question is about how things are or what to do, and not what was told."""
    first = _NONE.union(*(word.classes for word in asked.line.words[:1]))
    if "question" in first and not (asked.slot or "which" in first):
        return True  # how do I, how could one
    return "own" not in asked.line.has and (asked.slot == "reason" or asked.polar)


def _is_plain_fact(lex: Lexicon, sentence: str) -> bool:
    """Return whether a sentence states one fact to be kept, rather than what one fares or fared.

    Of 300 facts and 375 stories written by others this takes 48 and 1 of a hundred for facts.
    """
    line = lex.line(sentence)
    if len(line.words) < 4 or len(heard_in(lex, sentence)) > 2 or feeling_of(line) or (
            "joins" in line.has or "!" in sentence):
        return False
    return names_something(sentence) or _stands_alone(lex, line) and not (
        line.has & {"lately", "not"}) and not any(
            word.word in lex.odd and "aux" not in word.classes
            or len(word.word) > 4 and word.word.endswith("ed") for word in line.words)


def echo_of(lex: Lexicon, text: str) -> str:
    """Return the clause with which a text begins, turned round, or "" if it cannot be said back.

    To say it back shows that it was read. It must have a subject that leads and a verb, for half a
    sentence turned round is no sentence.
    """
    text = lex.opened(text)[0].strip()[:MAX_ASKED_CHARS]  # without its "no," or "by the way"
    said = next((part for part in heard_in(lex, text)[::-1] if text.startswith(part)), "").strip(
        " .!?…,'")
    line = lex.line(said)
    if not 1 < len(line.words) < MOST_ECHOED or len(line.telling) < 2 or '"' in said or not (
            _stands_alone(lex, line)) or asks(said, lex) or wishes(lex, said):
        return ""
    said = said.lower() if said.isupper() else said
    return f"{turned(said[:1].upper() + said[1:])}."


def _stands_alone(lex: Lexicon, line: Line) -> bool:
    """Return whether an English clause has its subject in front and its verb within."""
    first, last = line.words[0], line.words[-1]
    if line.language != "en" or last.classes & {"aux", "prep", "det", "joins", "own"}:
        return False
    verb = next((i for i, word in enumerate(line.words) if i and ("aux" in word.classes or not (
        line.caps[i]) and _verbal(lex, word))), 0)
    return bool(first.classes & {"subject", "refers"} or verb and (
        first.classes & {"own", "det", "pronoun"} or line.caps[0] and all(line.caps[:verb])))


def silence(text: str, rejected: Container[str] = (), said: Iterable[str] = (),
            keeps: bool = True, way: str = "") -> str:
    """Return what to say when there is nothing to say: that it is kept, or that it is not known.

    A fact is said back before it, to show that it was understood. It does not end as what was just
    said, nor is it what was rejected, nor a promise where nothing is kept. The way is found in the
    text where it is not given.
    """
    lex, way = lexicon(), way or way_of(text)
    language, asking = lex.line(text[:MAX_ASKED_CHARS]).language, asks(text)
    said_so = "unknown" if asking else {"sad": "sorry", "glad": "pleased"}.get(way, "kept")
    own = " ".join(lex.phrases[said_so, language])
    found: Sequence[str] = (f"{own}.",) if own else SILENCE[way]
    if not keeps:
        found = [words for words in found if words not in (UNKNOWN_REPLY, *KEPT_REPLIES)
                 and (asking or not own)] or [NOT_KEPT]
    lead = echo_of(lex, text) if way == "kept" and keeps and not own else ""  # no parrot of stories
    ways = {words: f"{lead} {words}".strip() for words in found}
    kept = [words for words in ways if rejection(text, ways[words]) not in rejected]
    fresh = [words for words in kept if not any(reply.endswith(words) for reply in said)]
    return ways[(fresh or kept)[0]] if kept else UNKNOWN_REPLY if keeps else NOT_KEPT


# forgetting


def _wish(lex: Lexicon, text: str) -> str:
    """Return what a sentence wishes to be forgotten, or ""."""
    rest = lex.opened(text)[0] if not asks(text, lex) else text
    _, words, language = _words_in(lex, rest)
    if len(words) < 2 or "forget" not in lex.closed[language].get(words[0], ()) or (
            lex.closed[language].get(words[1], _NONE) & {"question", "tells", "not"}
            and not lex.line(rest).has & {"me", "own"}):
        return ""
    return rest[len(words[0]):].strip(" .!")


def wish_to_forget(text: str) -> str:
    """Return what a text wishes to be forgotten: my locker number, what I said about Ann; or ""."""
    return _wish(lexicon(), _MARKER.sub("", text)) if len(text) < MAX_ASKED_CHARS else ""


def _plainly(text: str) -> str:
    """Return a statement's words alone, so that case and final stop do not count."""
    return " ".join(word.casefold() for word in _WORD.findall(_MARKER.sub("", text)))


def meant_by(memory: Memory, wish: str) -> List[Entry]:
    """Return what was told that a wish to forget means: by its very words, or by the ranking.

    One entry stands for all that have the same words; it holds all things that the wish names.
    """
    lex = lexicon_of(memory)
    asked, entries = gathered(lex, memory, analyzed(lex, wish))
    words = " ".join(folded_words(wish))  # in a row
    exact = [entry for entry in memory.entries_of(memory.ids_holding(
        [[words], [TOLD_MARK]], MOST_HELD)) if _plainly(entry.text) == _plainly(wish)]
    if exact:
        return exact[:1]
    terms = [i for i in asked.terms if "frame" not in asked.line.words[i].classes]
    found: Dict[str, Tuple[float, Entry]] = {}
    for each in judged(lex, asked, [entry for entry in entries if entry.source in TOLD]):
        held = sum(asked.weights[i] for i in terms if each.near[i] > 2)
        lost = [i for i in terms if not each.near[i] and (i in asked.vital or len(terms) == 1)]
        key = _plainly(each.unit.entry.text)
        if held and not lost and held > found.get(key, (0.0,))[0]:
            found[key] = held, each.unit.entry
    best = max((held for held, _ in found.values()), default=0.0)
    return [entry for held, entry in found.values() if held == best]


def forget_told(memory: Memory, entry: Entry) -> Set[str]:
    """Remove what was told, its copies, and what may repeat it; return the words that went with it.

    Every exchange leaves the prompts that shares a telling word with it; its messages stay stored,
    save those that said just this, or hold a word that nothing else holds.
    """
    lex, words = lexicon(), _plainly(entry.text)
    back = {words, *(_plainly(said_back(lex, Unit(entry, lex.line(part))))
                     for line in entry.text.splitlines() for part in statements_of(line))}
    with memory.transaction():
        weights = stem_weights(memory, stems_of(entry.text))
        telling = {s for s, w in weights.items() if 2.0 * w >= max(weights.values())}
        said = sorted(memory.prompt_messages(), key=lambda m: m.session_id)
        for exchange in exchanges_of(said):
            if telling.intersection(stems_of(" ".join(m.text for m in exchange))):
                memory.advance_messages([m.id for m in exchange], ARCHIVED)
        plain = [w for w in words.split() if w.isascii() and len(w) >= STEM_CHARS] or [""]
        memory.remove_messages(m.id for m in memory.messages_like(plain) if any(
            part and f" {part} " in f" {_plainly(m.text)} " for part in back) and (
                m.role == "self" or _plainly(m.text) == words))
        for kin in memory.entries("e.source != 'corpus' AND (e.source = 'approved' OR "
                                  "length(e.text) BETWEEN ? AND ?)",
                                  len(entry.text) - 3, len(entry.text) + 3):
            if _plainly(kin.text) == words or kin.source == "approved" and telling and (
                    telling <= set(stems_of(kin.text))):
                memory.forget_entry(kin.id)
        for kin in memory.told("e.about != ''"):
            if f" {words} " in f" {_plainly(kin.about)} ":
                memory.stand_alone(kin)
        return forget_traces(memory, [entry.text])


def forget_traces(memory: Memory, texts: Iterable[str]) -> Set[str]:
    """Remove messages with words of forgotten texts that no statement holds; return those words."""
    lex = lexicon()
    words = {word for text in texts for word in folded_words(text) if len(word) > 2 and not (
        is_plain(word) or lex.stem(word, lex.language_of([word])) in lex.known)}
    gone = {word for word in words if all(
        entry.source == "approved" for entry in memory.entries_of(
            memory.ids_holding([[word]], MOST_HELD)))}
    with memory.transaction():
        for word in gone:
            memory.remove_messages(m.id for m in memory.messages_like(
                [word if word.isascii() else ""]) if word in folded_words(m.text))
            for entry in memory.entries_by_id(memory.ids_holding([[word]], MOST_HELD)):
                memory.forget_entry(entry.id)  # a question, perhaps
        if memory.about_count() < MOST_TO_SCAN:  # of a million it would take long within a reply
            memory.merge_index()  # the index lets go of the words
    return gone


# compaction


def stems_of(text: str) -> List[str]:
    """Return the first five letters, folded, of each word: of each run of letters or digits."""
    return [word[:STEM_CHARS] for word in folded_words(text)]


def stem_weights(memory: Memory, stems: Iterable[str]) -> Dict[str, float]:
    """Return how telling each stem is: the logarithm of how rare it is in the memory."""
    total = memory.entry_count()
    return {s: log(1.0 + (total + 1.0) / (memory.stem_count(s) + 0.5)) for s in set(stems)}


def exchanges_of(messages: Iterable[Message]) -> List[List[Message]]:
    """Return messages as exchanges: what the owner said, and what was said to that."""
    found: List[List[Message]] = []
    for message in messages:
        if message.role == "owner" or not found:
            found.append([])
        found[-1].append(message)
    return found


def exchange_text(exchange: Sequence[Message], max_chars: int) -> str:
    """Return an exchange as the lines that a model is trained on, words of max_chars in all."""
    limit = max_chars // len(exchange)
    return "".join(f"{'H' if m.role == 'owner' else 'A'}: {clean_line(m.text, limit)}\n"
                   for m in exchange)


def _tellable(exchange: List[Message]) -> List[Message]:
    """Return what of an exchange belongs in a summary: a statement, or a question answered."""
    first = exchange[0]  # "ok" states nothing; in bytes, for five signs of a script may say a lot
    if first.role != "owner" or len(first.text.strip().encode()) <= STEM_CHARS:
        return []
    if not is_question(first.text):
        return [first]
    answers = [m for m in exchange[1:2] if m.verdict >= 0 and m.text not in ("", *UNKNOWN_REPLIES)]
    return [first, *answers] if answers else []


def summary_of(memory: Memory, exchanges: Sequence[List[Message]],
               max_chars: int) -> List[List[Message]]:
    """Return the parts of exchanges, given oldest first, that tell most in max_chars, in order.

    Taken one after another is what brings most new weight of rare words for the root of its
    length: by the length itself, "hm" would beat every fact. A statement counts twice, for only
    its owner could know it, and what is older counts less.
    """
    parts = [part for part in map(_tellable, exchanges) if part]
    stems = [set(stems_of(" ".join(m.text for m in part))) for part in parts]
    weights = stem_weights(memory, set().union(*stems))
    sizes = [len(exchange_text(part, max_chars)) for part in parts]
    worth = [(3 - len(part)) / (1.0 + (len(parts) - 1 - i) / FADE) for i, part in enumerate(parts)]
    chosen, told = set(), set()  # type: Set[int], Set[str]
    room = max_chars + 2 * len("H: \n")  # so that one part, cut to max_chars, is never too long
    while True:
        gains = [(worth[i] * sum(weights[s] for s in stems[i] - told) / sqrt(sizes[i]), i)
                 for i in range(len(parts)) if i not in chosen and sizes[i] <= room]
        gain, best = max(gains, default=(0.0, 0))
        if not gain:
            return [parts[i] for i in sorted(chosen)]
        chosen.add(best)
        told |= stems[best]
        room -= sizes[best]


# ──────────────────────────────────────────────────────────────────────────────────────
# 14 · VOICE — it says what it knows, or that it does not   uses: 0 1 2 4 7 10 11 12 13
# ──────────────────────────────────────────────────────────────────────────────────────
#
# A reply comes from one of three places, and says from which: what was told and answers the
# question; the model, once it has learned enough; or, before that, the exchange that fits best.
# The model does not speak by itself: it drafts with the mixture, and the best draft is said.

def prompt_ids(tokenizer: EvolvingTokenizer, turns: Sequence[Tuple[str, str]], text: str,
               budget: int) -> List[int]:
    """Return the ids of the newest turns and the text, ready for the answer; at most `budget`.

    The newest turns are the first in; of a text that is too long by itself its end is kept.
    """
    ids = tokenizer.encode(f"H: {text}\nA:")
    for role, words in reversed(turns):
        marker = "H" if role == "owner" else "A"
        earlier = tokenizer.encode(f"{marker}: {words}\n")
        if 1 + len(earlier) + len(ids) > budget:
            break
        ids = earlier + ids
    return [END_OF_TEXT] + ids[max(0, len(ids) - budget + 1):]


SHARE = 3  # the summary, and the entries that fit, have one part in so many of the prompt each
CHARS_A_TOKEN = 3  # about: our corpus has 2.7 once its merges are learned
LONGEST_TOKEN = 64  # characters; what has more than these for each token is too long, uncounted


def summary_texts(summary: Iterable[Message], budget: int) -> List[str]:
    """Return a summary's parts as the prompt of so many tokens shows them, oldest first."""
    return [exchange_text(part, budget // SHARE * CHARS_A_TOKEN) for part in exchanges_of(summary)]


def _fitting(pieces: Iterable[List[int]], room: int) -> List[int]:
    """Return those pieces that fit into room, the first ones first in, the first one last."""
    ids: List[int] = []
    for piece in pieces:
        if len(ids) + len(piece) <= room:
            ids = piece + ids
    return ids


def whole_prompt_ids(tokenizer: EvolvingTokenizer, summary: Sequence[Message],
                     entries: Sequence[Entry], turns: Sequence[Tuple[str, str]], text: str,
                     budget: int) -> List[int]:
    """Return ids of entries, a summary, turns and the text, ready for the answer; within budget.

    The text goes in first, then the newest exchange, then summary and entries, newest and best
    first, each sure of its share and welcome to what the other leaves, then older turns. All of it
    has the form of the text that is trained on: an entry is a document of its own, and the summary
    begins the exchange.
    """
    start, *newest = prompt_ids(tokenizer, turns[-2:], text, budget)
    share, room = budget // SHARE, budget - 1 - len(newest)
    texts = dict.fromkeys(entry.text for entry in entries)
    documents = [tokenizer.encode(document) + [END_OF_TEXT] for document in texts]
    parts = list(map(tokenizer.encode, reversed(summary_texts(summary, budget))))
    gist = _fitting(parts, min(share, room))
    known = _fitting(documents, min(2 * share, room) - len(gist))
    gist = _fitting(parts, min(2 * share, room) - len(known))
    talk = prompt_ids(tokenizer, turns, text, budget - len(known) - len(gist))
    return [start, *known, *gist, *talk[1:]]


def turns_to_keep(tokenizer: EvolvingTokenizer, exchanges: Sequence[List[Message]],
                  room: int) -> int:
    """Return how many of the newest exchanges fit into room tokens; the newest one always does."""
    sizes = accumulate(len(tokenizer.encode(exchange_text(exchange, LONGEST_TOKEN * room)))
                       for exchange in reversed(exchanges))
    return max(1, sum(1 for _ in itertools.takewhile(lambda size: size <= room, sizes)))


@dataclass
class Trace:
    """What moved one reply: the ids it began from, its sources, its tokens, and the model."""

    model: GPT
    tokenizer: EvolvingTokenizer
    prompt: List[int]
    sources: List[Tuple[Entry, List[int]]] = field(default_factory=list)
    tokens: List[Said] = field(default_factory=list)

    def expert_shares(self) -> Dict[str, float]:
        """Return the part of each expert in all that was raised, 0 to 1; they sum to 1."""
        raised = [sum(max(0.0, said.shares[i]) for said in self.tokens)
                  for i in range(len(EXPERTS))]
        whole = sum(raised) or 1.0
        return {name: nats / whole for name, nats in zip(EXPERTS, raised)}

    def entry_shares(self) -> List[Tuple[Entry, int, float]]:
        """Return the entries copied from, with how many tokens and nats they gave, most first."""
        given: DefaultDict[Entry, List[float]] = defaultdict(list)
        for said in (said for said in self.tokens if said.shares[-1] > 0.0):
            matches = [(_common_end(ids[:at], said.before), entry) for entry, ids in self.sources
                       for at, token in enumerate(ids) if token == said.token]
            length, source = max(matches, key=itemgetter(0), default=(0, None))
            if length:  # it holds the longest end of what stood before
                given[source].append(said.shares[-1])
        return sorted(((e, len(nats), sum(nats)) for e, nats in given.items()), key=lambda x: -x[2])

    def delta_shares(self) -> List[float]:
        """Return how many nats a token each delta layer raised the reply by.

        Measured by leaving it out: ln p of the reply's tokens as spoken less without it.
        """
        ids, count = [*self.prompt, *(said.token for said in self.tokens)], len(self.tokens)
        ids = ids[-self.model.shape.block_size:]
        if not (self.model.routed and count and len(ids) > 1):
            return []
        chosen = self.model.layer_after(self.prompt)  # it alone spoke, or the base
        alone, spoke = (_reply_nats(self.model.with_layer(layer), ids, count)
                        for layer in (0, chosen))
        return [(alone - spoke) / count * (layer == chosen)
                for layer, _ in enumerate(self.model.deltas, 1)]


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common end."""
    pairs = zip(reversed(a), reversed(b))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _reply_nats(model: GPT, ids: Sequence[int], count: int) -> float:
    """Return −ln p, by the model alone, of the last count of ids."""
    return sum(nats for nats, _ in reply_nats(model, ids[:-count], ids[-count:]))


# A voice this small loses its thread within a sentence or two. So it drafts a reply several times,
# with the exchanges that fit at hand to copy from, and says the draft, or the first sentences of
# one, that is worth most: fluent, owed to what was asked, about the same things, and finished. What
# exchanges answer is weighed beside them.


class Draft(NamedTuple):
    """A reply before it is said: its words, what it is worth, and its tokens or its exchange."""

    text: str
    worth: float
    tokens: Sequence[Said] = ()
    fit: Optional[Recall] = None


def topic_of(memory: Memory, text: str, near: Sequence[Entry]) -> Dict[str, float]:
    """Return how much each stem goes with a text: its own, and what stands in entries like it.

    Source: relevance models, Lavrenko and Croft, SIGIR 2001.
    """
    own, share = _content(text), 1.0 / max(1, len(near))
    held = Counter(stem for entry in near for stem in _content(entry.text))
    weights = stem_weights(memory, own | set(held))
    return {stem: weights[stem] * max(float(stem in own), share * held[stem]) for stem in weights}


def _content(text: str) -> Set[str]:
    """Return the stems of what tells in a text."""
    return {word[:STEM_CHARS] for word in folded_words(text) if not is_plain(word)}


def beginnings(text: str) -> List[str]:
    """Return a text's first sentence, its first two, and so on; an open end is left out."""
    ends = [match.end() for match in _REPLY_END.finditer(text)]
    return [text[:end] for end in ends if end == len(text) or not (
        ABBREVIATED.search(text[:end]))] or [text]  # "yes or no." ends a reply


_REPLY_END = re.compile(r"[.!?…][\"')»”’]*(?=\s|$)|[。！？]")


def form_of(text: str, known: Callable[[str], bool]) -> float:
    """Return what is wrong with the form of a reply: unfinished, in circles, in no known words."""
    words = folded_words(text)
    threes = list(zip(words, words[1:], words[2:]))
    strange = sum(not known(word) for word in words) / max(1, len(words))
    ended = bool(_REPLY_END.search(text[-2:]))
    return 4.0 * strange + 2.0 * (not ended) + 3.0 * (len(set(threes)) < len(threes))


# What counts beside fluency, in nats a token; found by reading replies to 200 prompts.
TOPIC = 1.0          # words that go with what was said
BORROWED = 0.4       # words that somebody else had said
SAID_AGAIN = 4.0     # that it was said a moment ago
FITTING = 1.0        # where an exchange answers in its own words: how well it fits
LEAST_FIT = 0.35     # exchanges that fit less are not looked at
EAGER = 0.9          # weight that the copyist has in a draft, beside what fits a text best
DRAFTS = 10          # replies that are drafted
MOST_FITS = 6        # answers of exchanges that are weighed beside them
FRESH_EXCHANGES = 3   # in which it does not say twice that it knows nothing
LATE_MESSAGES = 24    # in which it would rather not say the same twice
INTERPRETED_DRAFTS = 3  # replies that are drafted where kernels are slow
COPIED_ENTRIES = 6    # entries that a reply may copy from
COPIED_IDS = 150      # ids of each, from its beginning


def summarise(memory: Memory, session: int, budget: int, keep: int = 1) -> int:
    """Sum up all but the newest exchanges of a session; return how many turns those were."""
    with memory.transaction():
        said = memory.prompt_messages(session)
        turns = exchanges_of(m for m in said if m.stage < SUMMED)
        old = turns[:max(0, len(turns) - keep)]
        before = exchanges_of(m for m in said if m.stage == SUMMED)
        parts = summary_of(memory, before + old, budget // SHARE * CHARS_A_TOKEN)
        chosen = {m.id for part in parts for m in part}
        leaving = {m.id for exchange in before + old for m in exchange}
        memory.advance_messages(chosen, SUMMED)
        memory.advance_messages(leaving - chosen, ARCHIVED)
    return sum(map(len, old))


class EntryCounts:
    """The entries of a memory, counted in the ids of one tokenizer; held-out ones never are."""

    def __init__(self, memory: Memory, tokenizer: EvolvingTokenizer, config: Config) -> None:
        self.memory, self.tokenizer = memory, tokenizer
        self.counts = NgramMemory(config.ngram_order, config.ngram_counts)
        self._state = self._state_of(tokenizer, config)
        self._last_id = memory.first_of_newest(config.ngram_chars) - 1

    def _state_of(self, tokenizer: EvolvingTokenizer, config: Config) -> Tuple[int, ...]:
        return (tokenizer.version, config.ngram_order, config.ngram_counts, config.ngram_chars,
                self.memory.entries_taken())

    def fits(self, tokenizer: EvolvingTokenizer, config: Config) -> bool:
        """Return whether it still counts as is asked, and knows nothing that was forgotten."""
        return self._state == self._state_of(tokenizer, config)

    def catch_up(self, most_chars: float = math.inf) -> bool:
        """Count about so many characters of new entries; return whether that is all."""
        while most_chars > 0.0:
            fresh = self.memory.entries("e.id > ? AND e.training AND NOT e.held_out",
                                        self._last_id, limit=200)
            if not fresh:
                return True
            for entry in fresh:
                self.counts.read(document_ids(self.tokenizer, entry.text, entry.closed))
                self._last_id, most_chars = entry.id, most_chars - len(entry.text)
        return False


class Mind(NamedTuple):
    """What speaks: one state of a generation, and the counts of all that was read."""

    config: Config
    tokenizer: EvolvingTokenizer
    model: GPT
    counts: NgramMemory
    mixer: Mixer
    bpc: Optional[float]
    trusted: bool
    sayings: Optional[Sayings] = None

    def mixture(self, texts: Iterable[Sequence[int]] = (), eager: float = 0.0) -> Optional[Mixture]:
        """Return the whole voice, which may copy from texts; None if the model is to be alone."""
        if not self.config.mix:
            return None
        return Mixture(self.model.engine, self.counts, self.mixer, texts, eager)

    @property
    def prompt_budget(self) -> int:
        """The most tokens of a prompt; the rest of the window is for the reply."""
        return max(8, self.config.block_size * 3 // 4)


MOST_GIVEN = 200  # lines told here and now that facts are looked for in, the newest


class Turn:
    """One turn of a talk: what was said, what the memory has to it, what is replied, and why."""

    keeps = True  # what is said; else it is not to be promised
    given: Sequence[str] = ()  # what was told before, and stands in no memory

    def __init__(self, memory: Memory, mind: Mind, text: str, session: int,
                 rng: random.Random) -> None:
        self.memory, self.mind, self.text, self.rng = memory, mind, text, rng
        prompt = memory.prompt_messages(session)
        self.summary = [m for m in prompt if m.stage == SUMMED]
        self.turns = [(m.role, m.text) for m in prompt if m.stage < SUMMED]
        self.rejected: List[str] = memory.setting("rejected", [])
        self.talk = memory.newest_messages(session, LATE_MESSAGES)
        self.said = {words for role, words in (*self.turns, *self.talk) if role == "self"}
        self.fits: List[Recall] = []
        self.forgotten: Set[str] = set()  # words that went with what was to be forgotten
        self.reply, self.trace = Reply("", "nothing"), None  # type: Reply, Optional[Trace]
        self.seconds = 0.0  # that the reply took

    def answer(self) -> Iterator[str]:
        """Yield the reply's pieces; `reply` and `trace` then tell where they come from."""
        yield from re.findall(r"\S+\s*", self._answered())

    def _answered(self) -> str:
        """Return the reply: what was told here and now comes before all that memory has."""
        here = self._found_here()
        said = "" if here and here.source == "memory" else self._recalled()
        return self._replied(here) if here and (
            not said or self.given and self.reply.source == "nothing") else said

    def _found_here(self) -> Optional[Reply]:
        """Return what was told before a question answers; it is a memory for this one reply."""
        given = (*self.given, *[self.text] * asks_of_itself(self.text))
        told = [line for text in given if holds_statements(text)
                for line in text.splitlines()[-MOST_GIVEN:]]
        lines = clean_pieces(told, self.mind.config.max_line_chars)
        return answered_by(lines[-MOST_GIVEN:], "chat", self.text, self.rng,
                           self.mind.config.recall_score, self.talk, self.memory.clock
                           ) if lines else None

    def _recalled(self) -> str:
        """Return the reply: what memory is sure of, the best draft, or that nothing is known."""
        text, mind, wish = self.text, self.mind, wish_to_forget(self.text)
        if wish:
            return self._replied(Reply(self._forgotten(wish), "tool"))
        sure, self.fits = recollection(self.memory, text, self.rng, mind.config.recall_score,
                                       self.rejected, self.talk,
                                       mind.sayings.like if mind.sayings else None)
        factual = asks_for_a_fact(text) or names_something(text)
        if sure and sure.source == "exchange" and not mind.config.mix and mind.trusted:
            sure = None  # the model is to speak alone
        if sure and sure.source == "nothing":
            return self._silence("unknown")
        if sure and (sure.source != "exchange" or factual or not mind.trusted):
            return self._replied(sure)
        drafts = mind.trusted and not factual and (sure or not (mind.sayings and mind.config.mix))
        best = self._best_draft(sure) if drafts else None
        return best.text if best else self._silence()

    def _silence(self, way: str = "") -> str:
        """Return what is said where nothing is known, in other words than of late."""
        newest = {words for _, words in self.turns[-2 * FRESH_EXCHANGES:]}
        if answer_to(lexicon(), (*self.talk, ("owner", self.text)), self.text):
            way = "kept"
        return silence(self.text, self.rejected, newest, self.keeps, way)

    def _forgotten(self, wish: str) -> str:
        """Forget the one statement that a wish means, or say which it may be."""
        found = meant_by(self.memory, wish)
        if len(found) == 1:
            self.forgotten = forget_told(self.memory, found[0])
            return f'{FORGOTTEN}: "{clean_line(found[0].text, MAX_ASKED_CHARS)}"'
        told = " or ".join(f'"{clean_line(entry.text, MAX_ASKED_CHARS)}"' for entry in found[:3])
        return f"Which one am I to forget, {told}?" if told else UNKNOWN_REPLY

    def _replied(self, reply: Reply) -> str:
        self.reply = reply
        return reply.text

    def _near(self) -> List[Entry]:
        """Return the entries that recall found for the text."""
        return [fit.entry for fit in self.fits if fit.score > 0.0]

    def _best_draft(self, sure: Optional[Reply]) -> Optional[Draft]:
        """Return the best of some drafts, and note what moved it; None if none is worth it."""
        drafts = [draft for draft in self._drafts(sure)
                  if draft.text and rejection(self.text, draft.text) not in self.rejected]
        best = max(drafts, key=attrgetter("worth"), default=None)
        if best is None or best.worth < 0.0 and not sure:
            return None
        if best.fit is not None:
            self.trace, self.reply = None, Reply("", "exchange", best.fit.entry, best.fit.score)
        else:
            self.reply = Reply("", "voice")
            if self.trace:
                self.trace.tokens = list(best.tokens)
        return best

    def _drafts(self, sure: Optional[Reply]) -> Iterator[Draft]:
        """Yield what could be said to a text: words of exchanges; the voice's, if none is sure."""
        config, tokenizer, model = self.mind.config, self.mind.tokenizer, self.mind.model
        fitting = [fit.entry for fit in self.fits if fit.score >= WEAK_SCORE]
        ids = whole_prompt_ids(tokenizer, self.summary, fitting, self.turns, self.text,
                               self.mind.prompt_budget)
        judge = self._judge(ids)
        if config.mix:
            yield from self._from_exchanges(judge, sure)
        if sure:
            return
        sources = [(entry, document_ids(tokenizer, entry.text)[:COPIED_IDS]) for entry in
                   {e.id: e for e in self._near()}.values()][:COPIED_ENTRIES * config.mix]
        mixture = self.mind.mixture((ids for _, ids in sources), EAGER)
        self.trace = Trace(model, tokenizer, ids, sources) if mixture else None
        for _ in range(DRAFTS if model.engine.is_fast else INTERPRETED_DRAFTS):
            said: List[Said] = []
            words = "".join(spoken(model, tokenizer, ids, config, self.rng, mixture, said))
            for part, worth in judge(words.strip()) if "{" not in words else ():
                yield Draft(part, worth, said)

    def _from_exchanges(self, judge: Callable[[str], Iterable[Tuple[str, float]]],
                        sure: Optional[Reply]) -> Iterator[Draft]:
        """Yield answers of exchanges, and beginnings of them.

        One that is sure to fit is not cut short, and has only its equals beside it; but all that
        fit are, where it was said of late.
        """
        least = LEAST_FIT
        if sure:
            least = WEAK_SCORE if sure.text in self.said else sure.score - NEAR_SCORE
        fits = [fit for fit in self.fits if is_exchange(fit.entry) and fit.score >= least]
        for fit in fits[:MOST_FITS]:
            for part, worth in judge(fit.answer):
                if not sure or part == fit.answer:
                    yield Draft(part, worth + FITTING * fit.score, (), fit)

    def _judge(self, ids: Sequence[int]) -> Callable[[str], Iterator[Tuple[str, float]]]:
        """Return the function that tells what the beginnings of a reply to the text are worth.

        What is worth less than 0 is better left unsaid.
        """
        memory, encode, model = self.memory, self.mind.tokenizer.encode, self.mind.model
        speaker, bare = model.speaker(ids), [END_OF_TEXT, *encode("A:")]
        topic = topic_of(memory, self.text, search(memory, self.text))
        heard = [line[len(MARKERS[0]):] for entry in self._near()
                 for line in entry.text.splitlines() if line.startswith(MARKERS[0])]
        borrowed = set().union(*map(_content, heard)) - _content(self.text)
        asked, may_lack = set(folded_words(self.text)), self._may_lack()
        known = functools.lru_cache(None)(
            lambda word: word in asked or bool(memory.ids_holding([[word]], 1)))

        def worths(reply: str) -> Iterator[Tuple[str, float]]:
            parts = beginnings(reply)
            flows = [0.0] * len(parts)
            if model.engine.is_fast:  # else there is no time to read it all again
                flows = flows_of(speaker, ids, bare, encode(f" {reply}\n"),
                                 [len(encode(f" {part}")) for part in parts])
            for part, flow in zip(parts, flows):
                stems = _content(part)
                close = log(1.0 + sum(topic.get(stem, 0.0) for stem in stems - borrowed))
                yield part, (may_lack + flow + TOPIC * close - BORROWED * len(stems & borrowed)
                             - form_of(part, known)
                             - SAID_AGAIN * (part in self.said))
        return worths

    def _may_lack(self) -> float:
        """Return what a draft may lack and still be said, in nats a token, as boldness has it."""
        texts = [entry.text for entry in self._near()] or [self.text]
        ids = sum(len(self.mind.tokenizer.encode(text)) for text in texts)
        if not ids or self.mind.bpc is None or not self.mind.config.mix:
            return math.inf
        bits = self.mind.config.boldness * self.mind.bpc
        return bits * log(2.0) * sum(map(len, texts)) / ids


FORGOTTEN = "I have forgotten it"
AT_ONCE_CHARS = 100_000  # are counted within a reply, in 0.1 s; more is left to the background
Ready = Tuple[Any, Mind, EntryCounts]  # of which state of the memory, the mind, what it counts


class Speaker:
    """Says one reply at a time, with the newest mind that there is time for.

    Its lock comes before the store's: nobody asks for a mind in the midst of a transaction.
    """

    def __init__(self, config: Callable[[], Config], memory: Memory, engine: Engine,
                 seeded: bool) -> None:
        self.config, self.memory, self.engine = config, memory, engine
        self.seeded, self.replies = seeded, 0
        self.turn: Optional[Turn] = None
        self.said_ids = (0, 0)   # the messages of that turn
        self.background = False  # whether somebody calls `renew` between replies
        self._lock = threading.Lock()  # held while a mind is made
        self._kept: Optional[Ready] = None  # what speaks
        self._next: Optional[Ready] = None  # what is to speak next

    def mind(self, counted: bool = False) -> Mind:
        """Return what speaks now; what takes long is left to the background, where there is one."""
        self.renew(AT_ONCE_CHARS if self.background else math.inf, counted)
        assert self._kept is not None
        return self._kept[1]

    def renew(self, most_chars: float = math.inf, counted: bool = False) -> bool:
        """Go on to the mind that the memory now holds; return whether that is done.

        No more than so many characters are counted at once, and none for a mind that is not trusted
        to draft, unless that is asked for. A new mind speaks when its counts are complete; only the
        first of all speaks before.
        """
        with self._lock:
            config, kept = self.config(), self._kept
            state = self.memory.setting("commits", 0), self.engine, config
            now = self._made(state, self._next or kept)
            wanted = config.mix and (counted or now[1].trusted)
            done = not wanted or now[2].catch_up(most_chars)
            self._kept, self._next = (now, None) if done or kept is None else (kept, now)
            if done and now is not kept:  # what the last mind had lies between what this one has
                keep_freed_memory(False)
            return done

    def _made(self, state: Any, last: Optional[Ready]) -> Ready:
        """Return a mind of the stored layers, and its counts; the last one as far as it fits."""
        config, memory = state[2], self.memory
        if last is not None and last[0] == state and last[2].fits(last[1].tokenizer, config):
            return last
        growth = Growth.of(memory.setting("growth", {}))
        layers = memory.layers(without=("optimizer", "ear"))
        try:
            tokenizer, model = build_model(config, layers, self.engine, growth.phase == "warmup")
            mixer = load_mixer(config, layers.get("mixer"))
        except (StoreError, KeyError, TypeError, ValueError, struct.error):
            layers = {}  # damaged: what was told can be said all the same
            tokenizer, model = build_model(config, layers, self.engine)
            mixer = load_mixer(config, None)
        counted = last[2] if last is not None and last[2].fits(tokenizer, config) else (
            EntryCounts(memory, tokenizer, config))
        best = growth.bpc if growth.best_bpc is None else growth.best_bpc
        enough = config.trust_bpc * (1.5 if growth.phase == "grown" else 1.0)
        trusted = growth.phase != "newborn" and "base" in layers and (
            best is not None and best <= enough)
        mind = Mind(config, tokenizer, model, counted.counts, mixer, growth.bpc, trusted,
                    self._heard(last))
        return state, mind, counted

    def _heard(self, last: Optional[Ready]) -> Optional[Sayings]:
        """Return the stored sentence vectors: the last mind's, unless others have come."""
        mark = self.memory.checksum("ear"), self.engine
        if last is not None and last[1].sayings and last[1].sayings.mark == mark:
            return last[1].sayings
        layer = self.memory.layer("ear")
        return Sayings(self.engine, layer, mark) if layer else None

    def reply(self, text: str, session: int, make: Callable[..., Turn] = Turn) -> Iterator[str]:
        """Yield the reply to what the owner said, piece by piece; both are remembered.

        What was said is stored before the first piece; a reply that is broken off is stored as far
        as it came. make makes the turn.
        """
        begun, memory, mind = time.perf_counter(), self.memory, self.mind()
        count = self.replies if self.seeded else memory.about_count("messages")
        self.replies += 1
        turn = make(memory, mind, text, session, random.Random(f"{mind.config.seed}:{count}"))
        said = memory.add_message(session, "owner", text)
        pieces: List[str] = []
        try:
            for piece in turn.answer():
                pieces.append(piece)
                yield piece
        finally:
            answer = "".join(pieces).strip()
            if answer.startswith(FORGOTTEN):  # what that was is stored nowhere
                answer = FORGOTTEN
            self.said_ids = (said, memory.add_message(session, "self", answer))
            turn.reply, self.turn = turn.reply._replace(text=answer), turn
            turn.seconds = time.perf_counter() - begun


# ──────────────────────────────────────────────────────────────────────────────────────
# 15 · LEARNING — a generation, its text, and one stretch of steps   uses: 0 2 4 7 8 10 11 12
# ──────────────────────────────────────────────────────────────────────────────────────
#
# All that trains is here, and it runs in a child process: it is given layers and text through a
# pipe, and gives back layers. A Learner is one generation with its text. Its base learns first, in
# a birth; what comes later goes into deltas, in bursts, and a gate stands before each commit. What
# a base has read stays in it, so whoever must unlearn, or wants another size, is born anew: another
# one grows up beside the first. A child grows up; its teacher goes on talking meanwhile.

FRAME_HEAD = struct.Struct("<Q")


def pack_frame(message: Dict[str, Any]) -> bytes:
    """Return one message of plain values as its length and its bytes; both ends are one Python."""
    body = marshal.dumps(message)
    return FRAME_HEAD.pack(len(body)) + body


def read_frame(stream: BinaryIO) -> Optional[Dict[str, Any]]:
    """Return the next message of a blocking stream, or None at its end."""
    head = stream.read(FRAME_HEAD.size)
    size = FRAME_HEAD.unpack(head)[0] if len(head) == FRAME_HEAD.size else 0
    body = stream.read(size)
    return marshal.loads(body) if size and len(body) == size else None


class Text(NamedTuple):
    """One entry as a learner knows it; probe names the exam that it is held out for, or is ""."""

    id: int
    key: int
    text: str
    closed: bool
    unread: bool
    source: str
    probe: str


PATIENT_SHARE = 0.75   # of a reading without a gain; 1.0 took a third longer for 0.7 %
LEAST_GAIN = 0.002     # bits per character; evaluations vary by more from step to step
RISING_OF = 1000       # steps of which rate_warmup is the share in which a birth's rate rises
INTERPRETED_MIX_CHARS = 2000  # held-out characters that fit the voice where kernels are slow
PROBE_POINTS = 200     # of each probe's life that are kept
PROBE_CHARS = 4000     # a probe is the first documents of what is held out, up to so many
FRESH_IDS = 400        # of what is new tell whether it is still being learned
SHIFT_IDS = 400        # of what is new tell whether it is of another kind
SHIFT_LEAST_IDS = 48   # and fewer tell nothing
SHIFT_SHARE = 20       # part of its full size from which a delta may be sealed by a shift
SHORTEST_BIRTH = 100   # steps; of a page of text more than warmup_epochs says


class Learner:
    """One generation and its text: what a Job trains.  Talks to no one.

    `guard` is held while weights move, so that another thread may take a snapshot at any time.
    """

    def __init__(self, config: Config, growth: Growth, layers: Dict[str, Layer],
                 engine: Engine) -> None:
        self.config, self.growth, self.engine = config, growth, engine
        engine.threads = config.threads or max(1, (os.cpu_count() or 2) - 1)
        self.rng = self._rng_of_now()
        self.tokenizer, self.model = build_model(config, layers, engine)
        self.router = self.model.router = self.model.router or Router(self.tokenizer)
        self.best, self.mixer = layers.get("best"), layers.get("mixer")
        self.ear: Optional[Layer] = None       # sentence vectors that were learned just now
        self.texts: Dict[int, Text] = {}
        self.dirty: Set[str] = set()           # layers that changed since the last snapshot
        self.guard = threading.RLock()
        self._ids: Dict[int, List[int]] = {}
        if "optimizer" in layers:
            load_moments([*self.model.params.values(), *self.model.delta_params()],
                         layers["optimizer"])
        self._lay_out()

    def _rng_of_now(self) -> random.Random:
        """Return the chance that belongs to this step of this life, restarted or not."""
        return random.Random(f"{self.config.seed}:{self.growth.generation}:{self.growth.step}")

    # text

    def take_text(self, gone: Iterable[int], added: Iterable[Sequence[Any]]) -> None:
        """Take texts out by key and others in, each the fields of a Text in order of their ids."""
        before = self._probe_texts()
        for key in gone:
            self.texts.pop(key, None)
        self.texts.update((text.key, text) for text in (Text(*fields) for fields in added))
        for name, text in self._probe_texts().items():  # a probe that changed is another probe
            if before.get(name, text) != text:
                self.growth.probes.pop(name, None)
                self.growth.best_probes.pop(name, None)
        self.rng = self._rng_of_now()
        if self.growth.phase == "newborn":
            self._begin_birth()
        self._lay_out()

    def _trained(self) -> List[Text]:
        """Return the texts that may be trained on; a birth that ends takes no more of them."""
        last = self.growth.newest_id if self.growth.phase == "warmup" else 0
        return [t for t in self.texts.values() if not t.probe and (not last or t.id <= last)]

    def _probe_texts(self) -> Dict[str, str]:
        """Return each probe's text, whole documents, by its name."""
        found: DefaultDict[str, str] = defaultdict(str)
        for text in self.texts.values():
            if text.probe and len(found[text.probe]) < PROBE_CHARS:
                found[text.probe] += text.text + "\n"
        return dict(found)

    def _lay_out(self) -> None:
        """Lay out the streams; texts that were here before are not encoded again."""
        trained, encode = self._trained(), functools.partial(document_ids, self.tokenizer)
        self._ids = {t.key: self._ids.get(t.key) or encode(t.text, t.closed) for t in trained}
        self.pool = TextPool(self.config.block_size)
        for text in trained:
            self.pool.add(self._ids[text.key], text.unread)
        self.replay = Replay(((t.source, self._ids[t.key]) for t in trained if not t.unread),
                             self.config.block_size)
        self.probes = {name: (text_ids(self.tokenizer, text), len(text))
                       for name, text in self._probe_texts().items()}
        held = "\n".join(t.text for t in self.texts.values() if t.probe)
        self.held_text = held[:self.config.held_out_chars]
        shown = held[:self.config.eval_chars]
        self.held_out = (text_ids(self.tokenizer, shown) if shown else [], len(shown))
        if self.growth.phase == "grown" and not any(self.router.counts):
            self.router.learn(0, (t.text for t in trained if not t.unread))

    def unread(self) -> List[Text]:
        """Return the texts that no layer has read."""
        return [text for text in self._trained() if text.unread]

    def chars(self, unread: bool) -> int:
        """Return the size of the text that no layer has read, or of all other."""
        return sum(len(t.text) for t in self._trained() if t.unread == unread)

    def mark_read(self, keys: Iterable[int]) -> None:
        """Note that texts have been read: the next burst is not about them."""
        for key in keys:
            if key in self.texts:
                self.texts[key] = self.texts[key]._replace(unread=False)
        self._lay_out()

    # birth: the base learns all text, in merges learned from it

    def _begin_birth(self) -> None:
        """Learn merges, which follow those known, and draw a base for them."""
        texts, tokenizer = [text.text for text in self._trained()], self.tokenizer
        chars = sum(map(len, texts))
        if chars >= self.config.min_merge_chars:
            tokenizer = EvolvingTokenizer(tokenizer.merges)
            tokenizer.learn_merges(texts, self._new_merges(chars), self.config.min_pair_count)
        with self.guard:
            self.tokenizer, self._ids, self.best, self.mixer = tokenizer, {}, None, None
            self.model = GPT(Shape.of(self.config), tokenizer.vocab_size, self.engine, self.rng)
            self.router = self.model.router = Router(tokenizer)
            self.growth = dataclasses.replace(self.growth, phase="warmup", warmup_chars=chars,
                                              first_token=self.growth.tokens)
            self.dirty.add("base")

    def learn_ear(self) -> None:
        """Learn sentence vectors from the exchanges, before the first step of a birth."""
        texts = [(text.key, text.text) for text in self._trained()]
        self.ear = learned_ear(self.engine, texts, self.config, self._rng_of_now())

    def _new_merges(self, chars: int) -> int:
        """Return how many merges to learn: at first max_merges, later in step with the text."""
        config, known, before = self.config, self.tokenizer.version, self.growth.warmup_chars
        more = config.max_merges * max(0.0, min(0.5, chars / max(1, before) - 1.0))
        return max(0, min(max(config.max_merges - known, round(more)), config.life_merges - known))

    def steps_of(self, epochs: float) -> float:
        """Return in how many steps of a birth the present text is read so many times."""
        return epochs * len(self.pool.stream) / (self.config.batch_size * self.config.block_size)

    def birth_steps(self) -> int:
        """Return the most steps of a birth on the present text: some epochs, at most so many."""
        steps = round(self.steps_of(self.config.warmup_epochs))
        return min(self.config.warmup_steps, max(SHORTEST_BIRTH, steps))

    def note_birth(self, may_cool: bool = True) -> None:
        """Evaluate; remember the best weights; see whether the loss has stopped falling.

        It has when neither so many evaluations nor most of a reading of the text brought a gain.
        """
        growth, bpc = self.growth, self.evaluate()
        if bpc is None:
            return
        if growth.best_bpc is None or bpc < growth.best_bpc:
            growth.best_bpc = bpc
            self.best = pack_params(list(self.model.params.values()))
        if not (may_cool and growth.warmup_step) or growth.cooling_step:
            return
        if growth.lowest_bpc is None or bpc < growth.lowest_bpc - LEAST_GAIN:
            growth.lowest_bpc, growth.stale = bpc, 0
        else:
            growth.stale += 1
            if growth.stale >= max(self.config.patience,
                                   self.steps_of(PATIENT_SHARE) / self.config.eval_steps):
                self._begin_cooling()

    def _begin_cooling(self) -> None:
        """Let the rate fall from now on, from the best weights; what comes later is for a delta."""
        self.growth.cooling_step = self.growth.warmup_step
        self.growth.newest_id = max((t.id for t in self._trained()), default=0)
        self._be_best()

    def _be_best(self) -> None:
        """Go back to the best weights of the birth, unless these are."""
        growth = self.growth
        if self.best is not None and growth.best_bpc is not None and (
                growth.bpc is None or growth.best_bpc < growth.bpc):
            with self.guard:
                load_params(list(self.model.params.values()), self.best)
                self.dirty.add("base")
            growth.bpc = growth.best_bpc

    def cooling_steps(self) -> int:
        """Return how many steps the rate takes to fall, once the held-out loss has told it to."""
        before = self.growth.cooling_step - self.growth.stale * self.config.eval_steps
        return max(1, round(self.config.cooling * before))

    def end_birth(self, seconds: float) -> List[int]:
        """Settle on the best weights seen and fit the voice; return the keys of what was read."""
        self._be_best()
        read = self._trained()
        self.router.restore(Router(self.tokenizer))
        self.router.learn(0, (text.text for text in read))
        losses = self.probe_losses()
        self.mixer = None
        self.fit_voice()
        with self.guard:
            self.best = None
            self.model.freeze()
            self.growth = dataclasses.replace(
                self.growth, phase="grown", warmup_seconds=seconds, newest_id=0, probes=losses,
                best_probes=dict(losses))
            self.dirty.update(("base", "router"))
        self.mark_read(text.key for text in read)
        return [text.key for text in read]

    # bursts: the newest delta learns what is new

    def begin_burst(self) -> None:
        """Make sure that an unsealed delta is there to learn what is new."""
        if not self.model.deltas or self.unread() and (
                self.growth.delta_is_full(self.config) or self._sealed_by_shift()):
            self.begin_delta()
        else:
            self.model.freeze()
            for matrix in delta_matrices(self.model.deltas[-1]):
                matrix.needs_grad = True

    def _sealed_by_shift(self) -> bool:
        """Return whether what is new is none of the active delta's business.

        The loss shows it: another layer, the base or whom the text itself calls for, reads the
        new text better. A delta that has hardly learned anything takes whatever comes.
        """
        sample = self.pool.fresh[1:1 + SHIFT_IDS]
        least = self.config.delta_seal_chars / SHIFT_SHARE
        if len(sample) < SHIFT_LEAST_IDS or self.growth.delta_chars < least:
            return False
        active = len(self.model.deltas)
        others = min(self._nats(layer, sample) for layer in {0, self.router(sample)} - {active})
        return others * (1.0 + self.config.delta_shift) < self._nats(active, sample)

    def _nats(self, layer: int, ids: Sequence[int]) -> float:
        """Return the loss of ids when one layer alone reads them."""
        return sum(scored_nats(self.model.with_layer(layer), ids, self.config.block_size))

    def begin_delta(self) -> None:
        """Seal the active delta and append the next.

        It begins as a copy of the layer that reads the new text best, or at no effect.
        """
        parent = self._parent()
        with self.guard:
            self.model.append_delta(self.config.delta_rank, self.rng)
            if parent:
                load_params(delta_matrices(self.model.deltas[-1]),
                            pack_params(delta_matrices(self.model.deltas[parent - 1])))
            self.router.append()
            self.growth.delta_chars = 0
            self.dirty.update(("router", f"delta{len(self.model.deltas) - 1}"))

    def _parent(self) -> int:
        """Return the layer to begin with: of the base and deltas of this rank, the best reader."""
        sample, rank = self.pool.fresh[1:1 + SHIFT_IDS], self.config.delta_rank
        if len(sample) < SHIFT_LEAST_IDS:
            return 0
        heirs = [layer for layer, delta in enumerate(self.model.deltas, 1)
                 if delta["embedding"].a.rows == rank]
        return min([0, *heirs], key=lambda layer: self._nats(layer, sample))

    def settle_route(self) -> None:
        """Let the router know what the active delta is to learn."""
        texts, active = [text.text for text in self.unread()], len(self.model.deltas)
        self.dirty.add("router")
        if texts:
            self.router.learn(active, texts)
        elif not self.router.counts[-1]:  # nothing was new: it learned more of what the base knows
            self.router.refine(active)

    def fresh_bpc(self) -> float:
        """Return the bits per character of a part of what is new, read by who learns it."""
        ids = self.pool.fresh[:FRESH_IDS]
        whole = sum(scored_nats(self.model.learner(), ids, self.config.block_size))
        return whole / math.log(2.0) / max(1, len(self.tokenizer.decode(ids)))

    # both

    def step(self, rate: float, fresh_count: int) -> StepReport:
        """Train on one batch, in a burst with so many windows of what is new, and count it."""
        grown, count = self.growth.phase == "grown", self.config.batch_size
        fresh = fresh_count * (grown and len(self.pool.fresh) > 1)
        drawn = fresh if grown else count
        windows = self.pool.windows(drawn, fresh, self.rng)
        windows += [self.replay.window(self.rng) for _ in range(count - drawn)]
        windows = [window for window in windows if len(window) > 1] or self.pool.windows(
            1, 1, self.rng)
        report = train_step(self.model.learner(), self.config, windows, rate,
                            self.config.dropout, self.rng, self.guard)
        self.growth.step += 1
        self.growth.tokens += report.tokens
        self.dirty.add(f"delta{len(self.model.deltas)}" if grown else "base")
        return report

    def evaluate(self) -> Optional[float]:
        """Return held-out bits per character, or None where nothing is held out."""
        bpc = bits_per_character(self.model, *self.held_out, self.config.block_size)
        self.growth.bpc = None if math.isnan(bpc) else bpc
        return self.growth.bpc

    def probe_losses(self) -> Dict[str, float]:
        """Return the bits per character of every probe, each read whole; no number is the worst."""
        losses = {name: bits_per_character(self.model, ids, chars, self.config.block_size)
                  for name, (ids, chars) in self.probes.items()}
        return {name: bpc if isfinite(bpc) else math.inf for name, bpc in losses.items()}

    def fit_voice(self) -> None:
        """Fit the weights of the voice's experts on held-out text that they do not know yet.

        It is read twice side by side: with nothing to copy from, and copying from what was read.
        Once fitted, only the newest delta's own weights move, on probes which are new; the voice
        of all other text stays. Nothing breaks it off, so that the same life has the same voice.
        """
        config, again = self.config, self.mixer is not None
        known = set(self.mixer.manifest["probes"]) if self.mixer is not None else set()
        text = self.held_text if not again else "\n".join(
            text for name, text in self._probe_texts().items() if name not in known)
        if not text or not config.mix_passes:
            return
        room = len(text) if self.engine.is_fast else INTERPRETED_MIX_CHARS
        ids = text_ids(self.tokenizer, text[:room])
        counts = NgramMemory(config.ngram_order, config.ngram_counts)
        for document in self._ids.values():
            counts.read(document)
        mixer = load_mixer(config, self.mixer)
        for _ in range(config.mix_passes):
            still, live = (Mixture(self.engine, counts, mixer) for _ in range(2))
            if again:
                still.own_layer = live.own_layer = len(self.model.deltas)
            collections.deque(read_through(self.model, ids, still, live, fit=True), maxlen=0)
        with self.guard:
            self.mixer = pack_mixer(mixer, {*known, *self.probes})
            self.dirty.add("mixer")

    def snapshot(self) -> Tuple[Growth, Dict[str, Layer]]:
        """Return all that changed since the last snapshot and must be committed."""
        with self.guard:
            layers = {"optimizer": pack_moments(self.model.trainable())}
            if "base" in self.dirty:
                layers["tokenizer"] = Layer(None, self.tokenizer.pack())
                layers["base"] = pack_params(list(self.model.params.values()))
            if self.best is not None:
                layers["best"] = self.best
            if self.mixer is not None and "mixer" in self.dirty:
                layers["mixer"] = self.mixer
            if self.ear is not None:
                layers["ear"], self.ear = self.ear, None
            if "router" in self.dirty:
                layers["router"] = pack_router(self.router)
            for number, delta in enumerate(self.model.deltas, 1):
                if f"delta{number}" in self.dirty:
                    sealed = number < len(self.model.deltas)
                    layers[f"delta{number}"] = pack_params(delta_matrices(delta))._replace(
                        sealed=sealed)
            self.dirty.clear()
            return dataclasses.replace(self.growth), layers


class Gate:
    """Stands before a commit: no probe may come out of a burst worse than its bound.

    It keeps the state from before the burst, and brings it back.
    """

    def __init__(self, learner: Learner) -> None:
        self.learner, self.before = learner, learner.probe_losses()
        self.keep()

    def keep(self) -> None:
        """Take the present state as the one to come back to."""
        self.matrices = delta_matrices(self.learner.model.deltas[-1])
        self.weights, self.moments = pack_params(self.matrices), pack_moments(self.matrices)
        self.routes = self.learner.router.copied()

    def worse(self) -> Dict[str, Tuple[float, float]]:
        """Return the probes that are worse even if the newest layer is called less readily.

        Layers do not add up: one that knew nothing before does harm only where it is called.
        """
        margins = self.learner.router.margins
        for margin in (margins[-1], *SHY_MARGINS):
            margins[-1] = max(margins[-1], margin)
            worse = self._beyond()
            if not worse:
                break
        return worse

    def _beyond(self) -> Dict[str, Tuple[float, float]]:
        """Return the probes beyond their bounds, with their loss before and now.

        The bound is a share above the best of its life, or what it was before, if that is more.
        """
        learner, best = self.learner, self.learner.growth.best_probes
        self.now, bound = learner.probe_losses(), 1.0 + learner.config.gate_bound
        return {name: (self.before[name], bpc) for name, bpc in self.now.items()
                if bpc > max(self.before[name], best.get(name, self.before[name]) * bound)}

    def commit(self) -> None:
        """Take the state that was tried last as good, and remember each probe's best loss."""
        growth = self.learner.growth
        self.keep()
        self.before = self.now
        growth.take_probes(self.now, growth)

    def restore(self) -> None:
        """Bring back the state from before."""
        with self.learner.guard:
            load_params(self.matrices, self.weights)
            load_moments(self.matrices, self.moments)
            self.learner.router.restore(self.routes)


LAP_GAIN = 0.003      # by which a reading must lower the loss of what is new
BURST_STEPS = 32      # times micro_steps, the longest burst
REST_SECONDS = 20.0   # the longest that a trainer rests for one reply


class Job:
    """One stretch of learning: what is left of a birth, or a burst; with its own schedule."""

    def __init__(self, learner: Learner, steps: Optional[int], seconds: Optional[float],
                 clock: Callable[[], float]) -> None:
        self.learner, self.seconds, self.clock, self.began = learner, seconds, clock, clock()
        self.explicit, self.counted, self.done_steps = bool(steps or seconds), bool(steps), 0
        config, growth = learner.config, learner.growth
        self.birth, self.given_up, self.own_layer = growth.phase == "warmup", False, False
        self.fresh_share, self.lap_steps, self.lap_bpc = 1.0, 1, math.inf
        self.gate: Optional[Gate] = None
        self.met_bpc = self.left_bpc = 0.0  # of what is new, before and after
        if self.birth:
            whole = learner.birth_steps()
            due, done = max(1, whole - growth.warmup_step), growth.warmup_step / whole
            if self.counted:  # so many steps, whatever the held-out loss says
                growth.cooling_step = growth.newest_id = 0
        else:
            due, done = self._begin_burst(), 1.0
        self.steps = steps or (10 ** 9 if seconds else due)
        self.behind = done if done < 1.0 else 0.0
        self.rising = max(1.0, config.rate_warmup * min(learner.birth_steps(), RISING_OF))
        self.sinking = max(1.0, learner.steps_of(config.rate_epochs))

    def _begin_burst(self) -> int:
        """Return enough steps to read what is new burst_passes times, and at least micro_steps."""
        learner, config = self.learner, self.learner.config
        learner.begin_burst()
        self.gate = Gate(learner)
        learner.settle_route()
        self.met_bpc = learner.fresh_bpc()
        # a delta that knows nothing yet has nothing to forget, and no text is its own
        known, fresh = learner.growth.delta_chars, learner.chars(unread=True)
        self.fresh_share = 1.0 - config.replay_share * known / max(1, known + fresh)
        per_step = config.batch_size * self.fresh_share or 1.0
        self.lap_steps = max(config.micro_steps // 4, 1, math.ceil(
            len(learner.pool.fresh) / (per_step * config.block_size)))
        most = BURST_STEPS * config.micro_steps
        return max(config.micro_steps, min(round(config.burst_passes * self.lap_steps), most))

    def spent(self) -> float:
        """Return how much of this job is behind, 0 to 1."""
        by_clock = (self.clock() - self.began) / self.seconds if self.seconds else 0.0
        return min(1.0, max(self.done_steps / self.steps, by_clock))

    def share(self) -> float:
        """Return how much of what it may last is behind, 0 to 1."""
        return self.behind + (1.0 - self.behind) * self.spent()

    def rate(self) -> float:
        """Return the learning rate of the next step.

        That of a birth rises, and sinks as 1/(1+t) while the held-out loss falls; then it falls
        to 0, as it does at the end of what it may last. So the end need not be known before.
        Measured on our corpus: held-out 1.525 bits per character after 11 epochs; 1.536 after 16
        and 1.526 after 20 where the rate stayed at its peak; 1.526 after 12 along a line to 0.
        Source: Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
        durations", arXiv:2405.18392.
        """
        config, growth = self.learner.config, self.learner.growth
        if not self.birth:
            return scheduled_rate(config.delta_rate, self.share(), config.rate_warmup,
                                  config.schedule)
        left = min(1.0, (1.0 - self.share()) * (1.0 + 1.0 / config.cooling), 1.0 - self.cooled())
        rate = scheduled_rate(config.learning_rate, 1.0 - left, 0.0, config.schedule)
        sunk = min(growth.warmup_step, growth.cooling_step or growth.warmup_step) / self.sinking
        return rate * min(1.0, (growth.warmup_step + 1) / self.rising) / (1.0 + sunk)

    def cooled(self) -> float:
        """Return how much of a fall of the rate that the held-out loss began is behind, 0 to 1."""
        growth = self.learner.growth
        if not (self.birth and growth.cooling_step):
            return 0.0
        return min(1.0, (growth.warmup_step - growth.cooling_step) / self.learner.cooling_steps())

    def advance(self) -> StepReport:
        """Do one step; in a burst, fresh_share of its windows are of what is new."""
        exact = 0.0 if self.birth else self.learner.config.batch_size * self.fresh_share
        more = exact % 1.0 > 0.0 and self.learner.rng.random() < exact % 1.0
        report = self.learner.step(self.rate(), int(exact) + more)
        self.done_steps += 1
        if self.birth:
            self.learner.growth.warmup_step += 1
            if self.done_steps % self.learner.config.eval_steps == 0:
                self.learner.note_birth(may_cool=not self.counted)
        return report

    def finished(self) -> bool:
        """Return whether the job is through; the loss may end it before its schedule does.

        In a birth that is the held-out loss; in a burst the new text's own.
        """
        if self.spent() >= 1.0 or self.cooled() >= 1.0:
            return True
        if self.birth or self.explicit or self.done_steps % self.lap_steps:
            return False
        before, self.lap_bpc = self.lap_bpc, self.learner.fresh_bpc()
        return (self.lap_bpc > before * (1.0 - LAP_GAIN)
                and self.done_steps >= self.learner.config.micro_steps)

    def harm(self) -> Optional[Dict[str, Any]]:
        """Return None if what was learned may be committed, or the worst harm, which is undone.

        A burst that does harm is tried once more in a layer of its own, and then given up.
        """
        gate, learner = self.gate, self.learner
        if gate is None:
            return None
        worse = gate.worse()
        if not worse:
            gate.commit()
            return None
        gate.restore()
        self.own_layer, self.given_up = True, self.own_layer or not learner.growth.delta_chars
        if not self.given_up:
            learner.begin_delta()
            gate.keep()
            learner.settle_route()
            self.fresh_share, self.done_steps, self.lap_bpc = 1.0, 0, math.inf
            self.began = self.clock()
        name, (before, now) = max(worse.items(), key=lambda item: item[1][1] / item[1][0])
        return {"probe": name, "before": before, "now": now,
                "then": "rolled back" if self.given_up else "a layer of its own"}

    def close(self) -> List[int]:
        """Settle what was learned; return the keys of the documents that count as read."""
        learner, growth = self.learner, self.learner.growth
        if not self.birth:
            learner.evaluate()
            fresh = learner.chars(unread=True)
            self.left_bpc = learner.fresh_bpc()
            if not self.given_up:  # without new text it learned what all else is about
                growth.delta_chars += fresh or learner.chars(unread=False)
                growth.later_chars += fresh
            read = [text.key for text in learner.unread()]
            if learner.mixer is None or learner.probes.keys() - learner.mixer.manifest["probes"]:
                learner.fit_voice()
            learner.mark_read(read)
            return read
        learner.note_birth(may_cool=not self.counted)
        if (not self.explicit or self.cooled() >= 1.0
                or growth.warmup_step >= learner.birth_steps()):
            return learner.end_birth(growth.warmup_seconds + self.clock() - self.began)
        return []


def fit_to_live(new: Learner, old: Learner) -> Optional[Dict[str, Any]]:
    """Return None if a new generation reads every probe well enough, or where it does worst.

    Well enough is within rebirth_bound of the best that was ever read, lest many generations lose
    a little each.
    """
    bound, best = 1.0 + old.config.rebirth_bound, old.growth.best_probes
    before, now = old.probe_losses(), new.growth.probes
    shares = {name: now[name] / min(bpc, best.get(name, bpc))
              for name, bpc in before.items() if name in now}
    worst = max(shares, key=shares.__getitem__, default="")
    if not worst or shares[worst] <= bound:
        return None
    return {"probe": worst, "before": before[worst], "now": now[worst]}


def note_probes(memory: Memory, step: int, losses: Dict[str, float]) -> None:
    """Note the loss of each probe at a step; a long life is thinned, its ends stay."""
    curves = memory.setting("probes", {})
    for name, bpc in losses.items():
        curve = curves.setdefault(name, [])
        if not curve or curve[-1] != [step, bpc]:
            curve.append([step, bpc])
        if len(curve) > PROBE_POINTS:
            curves[name] = curve[:1] + curve[2:-1:2] + curve[-1:]
    memory.set_setting("probes", curves)


class TrainerChild:
    """The child process: reads frames, works on one job at a time, writes frames.

    A thread reads the pipe, so that a request to rest or to stop is served while a step is being
    computed, and so that the process goes the moment its parent is gone. What is new comes first:
    a burst of the living generation goes before the birth of the next.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO, engine: Engine,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.source, self.sink, self.engine, self.clock = source, sink, engine, clock
        # of a kind that one thread may fill while the other is halted anywhere
        self.inbox: "queue.SimpleQueue[Dict[str, Any]]" = queue.SimpleQueue()
        self.going, self.writing = threading.Event(), threading.Lock()
        self.going.set()
        self.learner: Optional[Learner] = None
        self.job: Optional[Job] = None
        self.birth: Optional[Job] = None  # of the generation that grows up beside it
        self.unlearns = False             # whether that takes over however well it reads
        self.saved_at = self.told_at = clock()
        self.pace = (0, 0.0)              # tokens of the job at hand, and when it began

    def run(self) -> None:
        """Serve until the parent says stop or goes away."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            job = self.job or self.birth
            try:
                message = self.inbox.get(block=job is None)
            except queue.Empty:
                assert job is not None
                self._advance(job)
            else:
                getattr(self, "on_" + message.pop("do"))(**message)

    def _read(self) -> None:
        while True:
            message = read_frame(self.source)
            if message is None:
                os._exit(0)
            order = message["do"]
            if order == "rest":
                self.going.clear()
                signal.raise_signal(signal.SIGINT)  # which runs `rest` in the thread that computes
                continue
            self.going.set()
            if order == "stop":
                self._leave()
            elif order != "go on":
                self.inbox.put(message)

    def rest(self, *_: Any) -> None:
        """Halt where it is, between two kernels or in the midst of one that is interpreted.

        It goes on with the next frame, or by itself after a while, and nothing it computes changes.
        """
        self.going.wait(REST_SECONDS)

    def _leave(self) -> None:
        """Send what is not yet saved and go, in the middle of whatever is being computed."""
        for learner in self._learners():
            with learner.guard:
                if learner.growth.phase == "warmup" and learner.dirty:  # a burst is unproven
                    self._snapshot(learner)
        with self.writing:  # what is being sent is sent to its end
            os._exit(0)

    def _send(self, kind: str, **message: Any) -> None:
        with self.writing:
            self.sink.write(pack_frame({"kind": kind, **message}))
            self.sink.flush()

    def _tell(self, event: str, notice: str = "", **detail: Any) -> None:
        """Have an event written into the life log, and told to the owner if there is a notice."""
        self._send("log", event=event, notice=notice, detail=detail)

    def _learners(self) -> List[Learner]:
        """Return the living generation, and the one that grows up beside it, if they are there."""
        birth = self.birth  # which the other thread may end meanwhile
        return [*filter(None, (self.learner, birth and birth.learner))]

    def _raised(self, config: Dict[str, Any], growth: Dict[str, Any],
                layers: Dict[str, Sequence[Any]]) -> Learner:
        given = {name: Layer(*fields) for name, fields in layers.items()}
        return Learner(Config(**config), Growth.of(growth), given, self.engine)

    def on_start(self, **state: Any) -> None:
        """Come to life with the state that the parent stored."""
        self.learner = self._raised(**state)

    def on_rebirth(self, unlearns: bool, **state: Any) -> None:
        """Let another generation grow up on the same text, from wherever it had come."""
        assert self.learner is not None
        unborn = self._raised(**state)
        unborn.take_text((), self.learner.texts.values())
        self.unlearns, self.birth = unlearns, Job(unborn, None, None, self.clock)
        self.pace = 0, self.clock()

    def on_text(self, gone: List[int], added: List[Sequence[Any]]) -> None:
        """Take what changed in the text; a burst begins anew with it, a birth takes it in."""
        if self.job is not None and self.job.gate is not None:
            self.job.gate.restore()
            self.job = None
        for learner in self._learners():
            learner.take_text(gone, added)

    def on_learn(self, steps: Optional[int], seconds: Optional[float]) -> None:
        """Begin a job, unless a birth is under way, which takes new text in its stride."""
        learner = self.learner
        assert learner is not None
        if self.job is None or not self.job.birth or steps or seconds:
            self.job, self.pace = Job(learner, steps, seconds, self.clock), (0, self.clock())
            count, born = len(learner.texts), learner.growth.phase == "grown"
            notice = "" if born else f"I read {count} documents, and answer meanwhile"
            self._tell("learning", notice, documents=count, fresh=len(learner.unread()),
                       phase=learner.growth.phase, vocab=learner.tokenizer.vocab_size)

    def on_drop(self) -> None:
        """Give up the generation that is not born yet."""
        self.birth = None

    def _advance(self, job: Job) -> None:
        """Do one step of a job, and say and save what is due."""
        if job.birth and not job.learner.growth.warmup_step:
            self._snapshot(job.learner)  # the merges took seconds, and a kill may be near
            job.learner.learn_ear()
        report = job.advance()
        self.pace = self.pace[0] + report.tokens, self.pace[1]
        if not report.applied:
            self._tell("step skipped", f"a step with a loss of {report.loss} was skipped; a lower "
                       "learning_rate may help", loss=str(report.loss))
        if job.finished():
            self._end(job, report)
        elif ((job.birth or job.explicit)  # a burst's trial by the clock at the gate were chance
              and self.clock() - self.saved_at > job.learner.config.commit_seconds
              and self._passes(job)):
            self._snapshot(job.learner)
        if self.clock() - self.told_at > 0.2:
            self._report(job, report)

    def _passes(self, job: Job) -> bool:
        """Return whether what a job has learned may be committed; tell of what may not."""
        margins = job.learner.router.margins
        before, harm = margins[-1], job.harm()
        if harm:
            self._tell("gate", **harm)
        elif job.learner.router.margins[-1] > before:
            self._tell("shy", layer=len(job.learner.model.deltas))
        return harm is None

    def _end(self, job: Job, report: StepReport) -> None:
        """Settle a job that is through, unless it is to be tried again."""
        if not self._passes(job) and not job.given_up:
            return
        read = job.close()
        self._report(job, report)
        if job is self.birth:
            self.birth = None
            self._end_rebirth(job.learner, read)
        else:
            self.job = None
            self._snapshot(job.learner, read)
            self._send("done", before=job.met_bpc, now=job.left_bpc)

    def _end_rebirth(self, new: Learner, read: List[int]) -> None:
        """Let the new generation take over, if it reads no probe too much worse."""
        old = self.learner
        assert old is not None
        worst = None if self.unlearns else fit_to_live(new, old)
        if worst is None:
            new.growth.take_probes(new.growth.probes, old.growth)
            for key in set(new.texts) - set(read):
                new.texts[key] = new.texts[key]._replace(unread=not new.texts[key].probe)
            new.mark_read(())
            self.learner = new
            self._snapshot(new, read, adopted=True)
        else:
            self._send("given_up", **worst)

    def _report(self, job: Job, report: StepReport) -> None:
        growth, self.told_at = job.learner.growth, self.clock()
        tokens, began = self.pace
        self._send("progress", phase="rebirth" if job is self.birth else growth.phase,
                   step=growth.step, share=job.share(), bpc=growth.bpc,
                   loss=report.loss if report.applied else None,
                   tokens_per_s=tokens / max(1e-9, self.clock() - began))

    def _snapshot(self, learner: Learner, read: Sequence[int] = (), adopted: bool = False) -> None:
        growth, layers = learner.snapshot()
        self.saved_at = self.clock()
        self._send("snapshot", growth=dataclasses.asdict(growth), read=list(read), adopted=adopted,
                   layers={name: tuple(layer) for name, layer in layers.items()})


def _leave_with_parent(ready: threading.Event) -> None:
    """End this process and its compiler when the parent is gone, until the pipe itself is read."""
    if hasattr(select, "poll") and os.getpgrp() == os.getpid():
        poll = select.poll()
        poll.register(sys.stdin.fileno(), 0)
        while not ready.is_set():
            if poll.poll(200):
                os.killpg(os.getpid(), signal.SIGKILL)


def trainer_main() -> int:
    """Be the trainer: frames on stdin and stdout, until the parent goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    keep_freed_memory(True)
    notices: List[str] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # it may have to leave while compiling
    ready = threading.Event()
    threading.Thread(target=_leave_with_parent, args=(ready,), daemon=True).start()
    engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, notices.append)
    ready.set()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = TrainerChild(sys.stdin.buffer, sys.stdout.buffer, engine)
    signal.signal(signal.SIGINT, child.rest)
    try:
        child._send("ready", notices=notices, engine=engine.name)
        child.run()
    except BrokenPipeError:
        pass
    except Exception as error:
        if os.environ.get("MACROGPT_DEBUG"):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            child._send("failed", error=f"{type(error).__name__}: {error}")
    os._exit(1)


async def start_child() -> Any:
    """Return the process of a new trainer, which speaks in frames on its pipes."""
    debug = None if os.environ.get("MACROGPT_DEBUG") else asyncio.subprocess.DEVNULL
    path = os.path.abspath(globals().get("__file__", "<stdin>"))
    if not os.path.isfile(path):
        raise EngineError("it can learn only from a file of its own: run python macrogpt.py")
    return await asyncio.create_subprocess_exec(
        sys.executable, "-c", CALL_CODE, path, "trainer_main",
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=debug,
        start_new_session=os.name == "posix")


def holder_alive(owner: str) -> bool:
    """Return whether the process "host:pid" may still be alive."""
    host, _, pid = owner.rpartition(":")
    if host != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)
    except OSError as error:  # it is there where it belongs to somebody else
        return not isinstance(error, ProcessLookupError)
    return True


# ──────────────────────────────────────────────────────────────────────────────────────
# 16 · ORGANISM — what lives between two replies   uses: 0 1 2 4 7 10 11 12 13 14 15
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Parts, each of one job, and what joins them. The Watcher makes entries of the corpus file, the
# Trainer raises a child process and commits what it learns, the Speaker (of VOICE) says one reply
# at a time. They share the store and one Condition, nothing else. The owner's thread speaks; a
# second one, in an event loop, watches and learns: the heart beats while the mouth is talking.
#
# A life in four verbs. LEARN: unread entries → the active delta, or the base of a newborn. SEAL: a
# delta is full, or another layer reads the new text better → the next begins. UNLEARN: what a delta
# has read is forgotten → the layers from that one on go, their other text is unread again. REBIRTH:
# the base must unlearn, a larger size is asked for, much was read by deltas → a new generation
# grows up beside the old one and takes over in one transaction.

BIG_ADDITION = 50     # documents at once, a share of which is held out
BATCH_ENTRIES = 200   # of a large corpus are stored at a time: a reply waits for no more than that
SMALL_LOSS = 20       # documents that may go without anybody's asking whether the file is whole
LEASE_SECONDS = 120.0
LISTEN_SECONDS = 3.0  # how often one that may not train asks whether it now may
MOST_DEATHS = 5       # of a trainer without a step between them
BARRED = "another macrogpt trains this memory; leave that one first"


def first_corpus() -> str:
    """Return the corpus that comes with the program, or a small one where it was left behind."""
    beside = os.path.dirname(os.path.abspath(globals().get("__file__", "")))
    for folder in (beside, os.path.join(sys.prefix, "share", "macrogpt")):
        path = os.path.join(folder, Config.corpus_path)
        if os.path.isfile(path):
            return read_text(path)
    return FIRST_CORPUS


class Watcher:
    """Makes entries of what stands in the corpus file, and takes out what is gone from it."""

    def __init__(self, config: Callable[[], Config], memory: Memory, tell: Callable[[str], None],
                 yield_to_reply: Callable[[], Any]) -> None:
        self.config, self.memory, self.tell = config, memory, tell
        self.yield_to_reply = yield_to_reply
        # of the file as it was taken in here: the store knows what any process took in last, and
        # two with a corpus each would take turns in forgetting each other's
        self.stamp: Optional[FileStamp] = None
        self.read_once = threading.Event()
        self._reading = threading.Lock()  # held while the corpus is taken in

    def prepare(self) -> None:
        """Write a small first corpus where the default one is missing.  Raises CorpusError."""
        path = self.config().corpus_path
        if os.path.lexists(path):
            return
        if path != Config.corpus_path:
            raise CorpusError(f"the corpus {path} does not exist; name a text file with --corpus")
        text = first_corpus()
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise CorpusError(f"{path} is missing and cannot be written ({error.strerror}); make "
                              "the folder writable or use --corpus") from None
        self.tell(f"{path} was missing: a first one is there now, of {text.count(chr(10)):,} lines")

    def take_in(self, patient: bool = True,
                should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Read the corpus, remember what is new and gone, and return whether anything was.

        A file that is as it was when it was last taken in is not read again. One that has lost most
        of its lines may be just being saved, or another for once: it is given loss_seconds then.
        """
        with self._reading:
            config, memory = self.config(), self.memory
            asked = (config.corpus_path, config.max_corpus_lines, config.max_line_chars)
            stamp, path = file_stamp(config.corpus_path), os.path.abspath(config.corpus_path)
            seen = [path, *asked[1:], *(dataclasses.astuple(stamp) if stamp else ())]
            if stamp is not None and memory.setting("corpus") == seen:
                self.stamp = stamp
                return False
            corpus = read_corpus(*asked, lambda: bool(self.yield_to_reply() and should_stop()))
            known = memory.entry_keys("corpus")
            added, gone = changes(known, corpus)
            lossy = patient and len(gone) > max(SMALL_LOSS, len(known) // 2)
            if self._is_early(lossy, path, config):
                return False
            self.stamp = stamp
            for notice in corpus.notices if added else ():
                self.tell(notice)
            self._store(corpus, added, gone, should_stop)
            if not should_stop():
                memory.set_setting("corpus", seen)
            return bool(added or gone)

    def _is_early(self, lossy: bool, path: str, config: Config) -> bool:
        """Return whether most of the lines have gone so lately that they may come again."""
        memory, now = self.memory, self.memory.clock()
        known, since = memory.setting("lossy") or ("", now)
        if lossy and known != path:
            since = now
            self.tell(f"{path} lacks most of the lines that I know; if it stays so for "
                      f"{config.loss_seconds:g} s, I forget them")
        if lossy or known:
            memory.set_setting("lossy", [path, since] if lossy else None)
        return lossy and now - since < config.loss_seconds

    def _store(self, corpus: Corpus, added: List[Document], gone: Set[int],
               should_stop: Callable[[], bool]) -> None:
        """Take documents out and in; many at once in several transactions, for a reply's sake."""
        memory, share = self.memory, training_share(corpus.documents, self.config().train_chars)
        with memory.transaction():
            held = self._hold_out([document for document in added if document.key in share])
            read = self._lose_lines(gone, corpus)
            lost = [entry.text for entry in memory.by_keys(sorted(gone)[:BATCH_ENTRIES])]
            memory.remove_entries("corpus", gone)
            if added or gone:
                memory.log("corpus", added=len(added), removed=len(gone))
            self._add(added[:BATCH_ENTRIES], held, share, read)
        for at in range(BATCH_ENTRIES, len(added), BATCH_ENTRIES):
            if should_stop():
                return
            self.yield_to_reply()
            self._add(added[at:at + BATCH_ENTRIES], held, share, read)
        if 0 < len(gone) < BATCH_ENTRIES:  # what the owner has taken out by hand
            forget_traces(memory, lost)
        if len(added) > BATCH_ENTRIES:
            with contextlib.suppress(StoreError):  # it makes a search fast, and nothing else
                memory.merge_index(self.yield_to_reply)

    def _add(self, documents: Sequence[Document], held: Set[int], share: Set[int],
             read: Dict[str, int]) -> None:
        """Store documents, which know whether layers have read lines of theirs already."""
        with self.memory.transaction():
            again = bool(read or self.memory.to_unlearn())
            for document in documents:
                self.memory.add_entry("corpus", document, held_out=document.key in held,
                                      training=document.key in share)
                if not again:
                    continue
                layers = [read.get(line, self.memory.take_back(line_key(line)))
                          for line in document.lines]
                known = [layer for layer in layers if layer is not None and layer < NOBODY]
                if known:
                    self.memory.inherit("corpus", document.key, min(known),
                                        whole=len(known) == len(layers))

    def _lose_lines(self, gone: Set[int], corpus: Corpus) -> Dict[str, int]:
        """Note which lines that layers have read are lost; return all lines of what is gone.

        Each with the first layer that has read it; one that another document holds is not lost.
        """
        read: Dict[str, int] = {}
        for text, layer in self.memory.trained_texts("corpus", gone):
            for line in text.splitlines():
                read[line] = min(layer, read.get(line, layer))
        if read and corpus.kept_all:  # or it may only have been pushed out of a file too large
            for line in read.keys() - {line for d in corpus.documents for line in d.lines}:
                self.memory.want_unlearned(line_key(line), read[line], len(line))
        return read

    def _hold_out(self, added: List[Document]) -> Set[int]:
        """Return the keys among the added that are never trained on.

        Only a birth or a big addition gives up a share of its documents: a few lines that the owner
        writes are all to be learned. It is known by its first line, so an edit does not undo it.
        """
        memory, config = self.memory, self.config()
        known = set(memory.probe_epochs())
        if not known or len(added) >= BIG_ADDITION:
            fresh = to_hold_out(added, config.held_out_share, config.held_out_chars)
            memory.hold_out(fresh, Growth.of(memory.setting("growth", {})).step)
            known |= fresh
        return {document.key for document in added if document.first_key in known}


class Phase(enum.Enum):
    """What the trainer does."""

    ASLEEP = "asleep"      # nothing is to be learned; a child may wait for more
    RAISING = "raising"    # a child starts, and takes layers and text
    LEARNING = "learning"  # it is at work
    FAILED = "failed"      # it cannot work, which was told


# Every step from a phase to another, the method that makes it, and when it does.
TRANSITIONS: Dict[Tuple[Phase, Phase], str] = {
    (Phase.ASLEEP, Phase.RAISING): "_work_with_child",      # work is due, the lease is held
    (Phase.LEARNING, Phase.RAISING): "_work_with_child",    # it died
    (Phase.RAISING, Phase.LEARNING): "_instruct",           # it has layers and text
    (Phase.ASLEEP, Phase.LEARNING): "_instruct",            # more is due, and it waits
    (Phase.RAISING, Phase.ASLEEP): "_settle",               # told to sleep, or to operate
    (Phase.LEARNING, Phase.ASLEEP): "_settle",              # all is read, or told to sleep
    **{(phase, Phase.FAILED): "_fail" for phase in Phase},  # five deaths, or an error not ours
    (Phase.FAILED, Phase.ASLEEP): "background_trainer",     # it is woken again
}


def texts_to_learn(memory: Memory, ids: Sequence[int]) -> List[List[Any]]:
    """Return the fields of the Texts that a learner makes of entries."""
    epochs, found = memory.probe_epochs(), []
    for e in memory.entries_by_id(ids):
        first = line_key(e.text.split("\n", 1)[0].casefold())
        probe = str(epochs.get(first, 0)) if e.held_out else ""
        found.append([e.id, e.key, e.text, e.closed, e.layer is None, e.source, probe])
    return found


WHY_REBORN = {"unlearning": "the base has read what is forgotten",
              "size": "another size is asked for", "text": "much was read since the last birth",
              "deltas": "there are many deltas"}


class Trainer:
    """Supervises the child that computes: what is due, what it is sent, what it gives back.

    It alone changes layers in the store, and only while it holds the lease.
    """

    def __init__(self, config: Callable[[], Config], memory: Memory, tell: Callable[[str], None],
                 on_engine: Callable[[], None]) -> None:
        self.config, self.memory, self.tell = config, memory, tell
        self.changed = threading.Condition()  # what whoever waits for it is waiting on
        self.on_engine = on_engine        # called when the child has compiled kernels
        self.phase, self.why_failed = Phase.ASLEEP, ""
        self.growth = Growth.of(memory.setting("growth", {}))
        # what the owner asked for: steps, or seconds, or with neither to learn all there is
        self.order: Optional[Tuple[Optional[int], Optional[float]]] = None
        self.only_orders = False          # it learns when asked to, and at no other time
        self.in_step = False              # each event waits for what the one before has to teach
        self.stopping, self.silent = threading.Event(), threading.Event()
        self.silent.set()                 # cleared while a reply is made
        self.progress: Dict[str, Any] = {}
        self._child: Any = None
        self._child_learns = self._child_raises = False  # a burst or first birth; a rebirth
        self._sent: Dict[int, int] = {}   # id and key of what the child knows
        self._text_changed, self._unread_lines = True, 0
        self._forgotten: Tuple[Any, float] = ([], 0.0)  # what is to be unlearned, and since when
        self._owner = f"{socket.gethostname()}:{os.getpid()}"
        self._loop: Optional[asyncio.AbstractEventLoop] = None

    # phases

    def _enter(self, phase: Phase) -> None:
        """Go over to a phase, and let those who wait look again."""
        with self.changed:
            assert phase is self.phase or (self.phase, phase) in TRANSITIONS, (self.phase, phase)
            self.phase = phase
            self.changed.notify_all()

    def _settle(self, order: Any) -> None:
        """Note that nothing is left to do; an order given since then stands."""
        if order is not None and self.order is order:
            self.order = None
        if self.phase is not Phase.FAILED:
            self._enter(Phase.ASLEEP)

    def _fail(self, why: str) -> None:
        """Give up, and say why; whoever waits is told."""
        self.why_failed = why
        self._enter(Phase.FAILED)
        self.tell(f"learning has ended: {why}")
        with contextlib.suppress(StoreError, MemoryError):
            self.memory.log("failed", error=why)

    # what is due

    def due(self) -> Optional[str]:
        """Return what is to be done next: "unlearn", "learn", "rebirth", or None."""
        order, memory, growth = self.order, self.memory, self.growth
        first = self._first_to_unlearn()
        if self.only_orders and order is None:
            return None
        if not memory.has_text():
            return "unlearn" if first == 0 and growth.phase != "newborn" else None
        if first:
            return "unlearn"
        if growth.phase != "grown" or order and any(order):
            return "learn"
        corpus, said = memory.unread_chars()
        eager = order or self.in_step or memory.setting("relearn")
        if corpus or said >= (1 if eager else self.config().min_new_chars_to_train):
            return "learn"
        return "rebirth" if memory.setting("rebirth") or self._why_reborn() else None

    def _first_to_unlearn(self) -> Optional[int]:
        """Return the number of the first layer that must unlearn, when it is time for that.

        The owner is given some quiet to go on forgetting, and none where somebody waits for it.
        """
        rows = self.memory.to_unlearn()
        if rows != self._forgotten[0]:
            self._forgotten = rows, time.monotonic()
        quiet = time.monotonic() - self._forgotten[1] >= self.config().unlearn_seconds
        return min(rows)[0] if rows and (quiet or self.in_step or self.order) else None

    def _why_reborn(self) -> Optional[str]:
        """Return why a new generation is due, or None."""
        growth, config, memory = self.growth, self.config(), self.memory
        if self._first_to_unlearn() == 0:
            return "unlearning"
        wanted = memory.setting("wanted_shape")
        if wanted not in (None, memory.setting("shape"), memory.setting("refused_shape")):
            return "size"
        later = growth.later_chars - memory.setting("tried_chars", 0)
        if later >= max(config.rebirth_chars, config.rebirth_share * growth.warmup_chars):
            return "text"
        many = len(delta_names(memory.manifests())) >= config.max_delta_modules
        return "deltas" if many and later >= config.rebirth_chars else None

    # operations on the stored layers

    def _unlearn(self) -> None:
        """Take away the layers from the first that must unlearn on, in one transaction."""
        memory, first = self.memory, self._first_to_unlearn()
        assert first is not None
        with memory.transaction():
            texts, names = memory.to_unlearn(), memory.manifests()
            gone = delta_names(names)[max(0, first - 1):]
            if first == 0:  # there is no text that another base could be born from
                gone = sorted(names)
                memory.drop_rebirth()
            memory.unlearn_from(first)
            memory.remove_layers({*gone, "optimizer"})
            growth = self.growth if first else self.growth.heir(self.growth.generation + 1)
            routes = memory.layer("router") if gone else None
            if routes is not None:
                router = load_router(EvolvingTokenizer(), routes)
                router.truncate(first)
                memory.save_layers({"router": pack_router(router)})
            growth.delta_chars = self.config().delta_seal_chars  # those before are sealed
            self._commit_growth(growth)
            memory.set_setting("relearn", True)
            if gone:
                memory.log("unlearned", layers=gone, texts=len(texts),
                           chars=sum(chars for _, chars in texts))

    def _commit_growth(self, growth: Growth) -> None:
        """Store how far it has come; whoever speaks notices that there is something new."""
        self.memory.set_setting("growth", dataclasses.asdict(growth))
        self.memory.set_setting("commits", self.memory.setting("commits", 0) + 1)
        self.growth = growth

    def _begin_rebirth(self, why: str) -> None:
        """Make room for a new generation, whose merges follow those of the present one."""
        memory, old = self.memory, self.growth
        wanted, refused = memory.setting("wanted_shape"), memory.setting("refused_shape")
        shape = wanted if wanted not in (None, refused) else dataclasses.asdict(
            Shape.of(self.config()))
        number = max(old.generation, memory.setting("generations", 0)) + 1  # given up ones, too
        growth = old.heir(number)
        with memory.transaction():
            memory.set_setting("generations", number)
            memory.begin_rebirth({"why": why, "growth": dataclasses.asdict(growth), "shape": shape})
            merges = memory.layer("tokenizer")
            memory.save_layers({NEXT + "tokenizer": merges} if merges else {})
            memory.log("rebirth", why=why, generation=growth.generation)
        self.tell(f"{WHY_REBORN[why]}: generation {growth.generation} grows up beside this one, "
                  f"which took {old.warmup_seconds:.0f} s")

    # the life of the background

    async def background_trainer(self, may_begin: threading.Event) -> None:
        """Do what is due until told to stop; a trainer that dies is started again, some times."""
        self._loop, self._bell = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(lambda loop, context: None)  # of pipes to the dead, 3.9
        await asyncio.to_thread(may_begin.wait)
        deaths, pause, told = 0, 0.0, False
        self._enter(Phase.ASLEEP)
        while not self.stopping.is_set() and self.phase is not Phase.FAILED:
            step = self._steps()
            try:
                if not told and self.barred():
                    told = True
                    self.tell("another macrogpt trains this memory; here it only listens")
                pause = await self._turn_to_work()
            except (TrainerError, StoreError, OSError, MemoryError,
                    asyncio.IncompleteReadError) as error:
                passing = isinstance(error, StoreLocked)
                deaths = 0 if passing else deaths + 1 if self._steps() == step else 1
                pause = min(60.0, 0.5 * 2 ** deaths)
                if not passing:
                    self._note_death(error, deaths)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._bell.wait(), pause)
            self._bell.clear()
        with contextlib.suppress(StoreError):
            self.memory.drop_lease(self._owner)

    def _note_death(self, error: BaseException, deaths: int) -> None:
        """Tell of a death, and give up after many in a row, or where another start cannot help."""
        self.tell(f"the trainer stopped ({error}); it starts again from the last commit")
        with contextlib.suppress(StoreError):
            self.memory.log("trainer died", error=str(error))
        if deaths >= MOST_DEATHS or isinstance(error, StoreDamaged):
            often = f"{deaths} times" if deaths > 1 else "for good"
            self._fail(f"the trainer stopped {often} ({error}); see --debug")

    def _steps(self) -> Any:
        """Return how far both generations have come, as far as that can be read."""
        with contextlib.suppress(StoreError):
            return self.growth.step, self.memory.setting("rebirth", {}).get("growth")
        return None

    async def _turn_to_work(self) -> float:
        """Do what is due; return in how many seconds to look again, if no bell rings."""
        order, self.growth = self.order, Growth.of(self.memory.setting("growth", {}))
        due = self.due()
        if due is None:
            self._settle(order)
            return 60.0
        if not self.memory.take_lease(self._owner, LEASE_SECONDS, holder_alive):
            self._settle(order)
            return LISTEN_SECONDS
        if due == "unlearn":
            self._unlearn()
        else:
            await self._work_with_child()
        return 0.0

    def barred(self) -> bool:
        """Return whether another living process trains this memory."""
        return self.memory.leased(self._owner, holder_alive)

    def ring(self) -> None:
        """Wake the background, from any thread."""
        self._there(lambda: self._bell.set())

    def text_changed(self, at_once: bool = True) -> None:
        """Note that there is other text; talk alone does not break off a burst."""
        if at_once or not self._child_learns or self.growth.phase != "grown":
            self._text_changed = True
            self.ring()

    def _there(self, call: Callable[[], None]) -> None:
        """Have something called by the background thread, if it runs; from any thread."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(call)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let child and watcher rest meanwhile: who speaks has the machine to himself."""
        child = self._child if self.phase is Phase.LEARNING else None
        self.silent.clear()
        self._there(lambda: child is self._child and child and self._send(child, "rest"))
        try:
            yield
        finally:
            self._there(lambda: child is self._child and child and self._send(child, "go on"))
            self.silent.set()

    # the child

    async def _work_with_child(self) -> None:
        """Start a trainer and work with it until it is told to stop.  Raises when it dies."""
        self._enter(Phase.RAISING)
        child = await start_child()
        self._child, self._child_ready = child, False
        self._sent, self._text_changed = {}, True
        self._child_learns = self._child_raises = False
        listener = asyncio.ensure_future(self._listen(child))
        try:
            damaged = self.memory.give_up_damaged()
            if damaged:
                self.growth = Growth.of(self.memory.setting("growth", {}))
                self.memory.log("damaged", layers=damaged)
                self.tell(f"damaged, and learned again: {', '.join(damaged)}")
            self._send(child, "start", **self._state("", self.config(), self.growth))
            while not (self.stopping.is_set() or self.due() == "unlearn"):
                self._instruct(child)
                bell = asyncio.ensure_future(self._bell.wait())
                await asyncio.wait({bell, listener}, timeout=LEASE_SECONDS / 2,
                                   return_when=asyncio.FIRST_COMPLETED)
                bell.cancel()
                self._bell.clear()
                self.memory.take_lease(self._owner, LEASE_SECONDS, holder_alive)
                if listener.done():
                    listener.result()
                    raise TrainerError(f"its process ended with code {await child.wait()}")
        finally:
            await self._dismiss(child, listener)
        self._settle(self.order if self.stopping.is_set() else None)

    def _send(self, child: Any, what: str, **message: Any) -> None:
        child.stdin.write(pack_frame({"do": what, **message}))

    def _state(self, prefix: str, config: Config, growth: Growth) -> Dict[str, Any]:
        """Return a generation as it is stored, to be raised."""
        return {"config": dataclasses.asdict(config), "growth": dataclasses.asdict(growth),
                "layers": {n: tuple(layer) for n, layer in self.memory.layers(
                    prefix, without=(prefix + "ear",)).items()}}

    def _instruct(self, child: Any) -> None:
        """Give the child what changed in the text, and the job that is due, when it is new."""
        order, due = self.order, self.due()
        if due is None:
            self._settle(order)
            return
        changed = self._text_changed and self._send_text(child)
        if due == "learn" and (changed or not self._child_learns):
            steps, seconds = order or (None, None)
            self._send(child, "learn", steps=steps, seconds=seconds)
            self._child_learns = True
        if due == "rebirth" or self.memory.setting("rebirth"):
            self._raise_next(child)
        self._enter(Phase.LEARNING)

    def _raise_next(self, child: Any) -> None:
        """Have the next generation raised, unless the reason for it has gone."""
        memory, plan = self.memory, self.memory.setting("rebirth")
        holds = {"unlearning": any(layer == 0 for layer, _ in memory.to_unlearn()),
                 "size": plan and memory.setting("wanted_shape") == plan["shape"]}
        if plan and not holds.get(plan["why"], True):
            memory.drop_rebirth()
            self._send(child, "drop")
            plan, self._child_raises = None, False
        why = self._why_reborn()
        if plan is None and why and not self._child_learns:
            self._begin_rebirth(why)
            plan = memory.setting("rebirth")
        if plan and not self._child_raises:
            self._child_raises = True
            self._send_text(child)  # or it would read what went unseen, by another process
            config = dataclasses.replace(self.config(), **plan["shape"])
            self._send(child, "rebirth", unlearns=plan["why"] == "unlearning",
                       **self._state(NEXT, config, Growth.of(plan["growth"])))

    def _send_text(self, child: Any) -> bool:
        """Send what came to the text and what went from it; return whether anything did."""
        memory, self._text_changed = self.memory, False
        growth, deltas = self.growth, len(delta_names(memory.manifests()))
        full = growth.phase == "grown" and (not deltas or growth.delta_is_full(self.config()))
        memory.mark_trained(0 if growth.phase != "grown" else deltas + full)
        now = dict(memory.training_index())
        gone = {key for i, key in self._sent.items() if i not in now} - set(now.values())
        added = texts_to_learn(memory, [i for i in now if i not in self._sent])
        self._sent = now
        self._unread_lines = sum(f[2].count("\n") for f in added if f[4] and not f[6])
        if gone or added:
            self._send(child, "text", gone=sorted(gone), added=added)
        return bool(gone or added)

    async def _listen(self, child: Any) -> None:
        """Take in every frame of the child until its pipe closes."""
        read = child.stdout.readexactly
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                message = marshal.loads(await read(*FRAME_HEAD.unpack(await read(FRAME_HEAD.size))))
                getattr(self, "_on_" + message.pop("kind"))(**message)

    def _on_ready(self, notices: List[str], engine: str) -> None:
        self._child_ready = True
        for notice in notices:
            self.tell(notice)
        if engine == "native":
            self.on_engine()

    def _on_log(self, event: str, notice: str, detail: Dict[str, Any]) -> None:
        self.memory.log(event, **detail)
        if notice:
            self.tell(notice)

    def _on_progress(self, **message: Any) -> None:
        self.progress = message

    def _on_failed(self, error: str) -> None:
        raise TrainerError(error)

    def _on_given_up(self, **worst: Any) -> None:
        """Drop a generation that would read a probe too much worse, and tell."""
        with self.memory.transaction():
            plan = self.memory.setting("rebirth")
            if plan is None:  # it was dropped in the meantime
                return
            self.memory.set_setting("tried_chars", self.growth.later_chars)
            self.memory.set_setting("refused_shape", plan["shape"])
            self.memory.drop_rebirth()
            self.memory.log("rebirth given up", **worst)
        self.tell(f"the new generation would read probe {worst['probe']} at {worst['now']:.2f} "
                  f"bits per character where this one has {worst['before']:.2f}; it is given up")
        self._child_raises = False
        self._bell.set()

    def _on_snapshot(self, growth: Dict[str, Any], read: List[int], adopted: bool,
                     layers: Dict[str, Sequence[Any]]) -> None:
        """Commit a state of a generation, with all that belongs to it, in one transaction."""
        memory, grown = self.memory, Growth.of(growth)
        old, ahead = self.growth, grown.generation > self.growth.generation
        with memory.transaction():
            plan = memory.setting("rebirth")
            if ahead and (plan is None or plan["growth"]["generation"] != grown.generation):
                return  # it was given up in the meantime
            memory.save_layers({NEXT * ahead + n: Layer(*fields) for n, fields in layers.items()})
            if grown.phase == "grown":
                memory.remove_layers([NEXT * ahead + "best"])
            if ahead and not adopted:
                memory.set_setting("rebirth", {**plan, "growth": growth})
                return
            memory.add_progress(grown.step, grown.tokens, self.progress.get("loss"), grown.bpc)
            if adopted:
                self._adopt(plan, grown, read)
            else:
                memory.set_setting("shape", dataclasses.asdict(Shape.of(self.config())))
                memory.mark_read(read, len(delta_names(memory.manifests())))
            note_probes(memory, grown.step, grown.probes)
            if (grown.phase, grown.generation) != (old.phase, old.generation):
                memory.log("phase", phase=grown.phase, step=grown.step, bpc=grown.bpc,
                           generation=grown.generation)
            self._commit_growth(grown)
        bpc = "" if grown.bpc is None else f", {grown.bpc:.2f} bits per character"
        if adopted:
            self.tell(f"generation {grown.generation} has taken over{bpc}")
        elif grown.phase == "grown" != old.phase:
            self.tell(f"grown up after {grown.step:,} steps{bpc}")
            self._unread_lines = 0

    def _adopt(self, plan: Dict[str, Any], grown: Growth, read: List[int]) -> None:
        """Let the next generation take over, and note what it has unlearned."""
        memory, texts = self.memory, self.memory.to_unlearn()
        memory.adopt(read)
        memory.set_setting("shape", plan["shape"])
        memory.set_setting("tried_chars", 0)
        memory.log("generation", generation=grown.generation, why=plan["why"], bpc=grown.bpc)
        if plan["why"] == "unlearning":
            memory.log("unlearned", layers=["base"], texts=len(texts),
                       chars=sum(chars for _, chars in texts))
        self._child_raises, self._text_changed = False, True
        self.ring()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the lease meanwhile.  Raises TrainerError where another process trains."""
        if not self.memory.take_lease(self._owner, LEASE_SECONDS, holder_alive):
            raise TrainerError(BARRED)
        self.growth = Growth.of(self.memory.setting("growth", {}))
        try:
            yield
        finally:
            self.memory.drop_lease(self._owner)

    def take_over(self, learner: Learner, read: List[int]) -> None:
        """Commit a generation or a delta from elsewhere as if a child had sent it; see `holding`.

        What it has seen there nobody knows: any text that is forgotten later, it must unlearn.
        """
        memory, (growth, layers) = self.memory, learner.snapshot()
        grown, ahead = dataclasses.asdict(growth), growth.generation > self.growth.generation
        with memory.transaction():
            if (not memory.take_lease(self._owner, LEASE_SECONDS, holder_alive)
                    or Growth.of(memory.setting("growth", {})) != self.growth):
                raise TrainerError("another macrogpt has trained this memory meanwhile; try again")
            if ahead:
                memory.set_setting("generations", growth.generation)
                memory.begin_rebirth({"why": "import", "growth": grown,
                                      "shape": dataclasses.asdict(learner.model.shape)})
            self._on_snapshot(grown, read, ahead, {n: tuple(x) for n, x in layers.items()})
            memory.mark_trained(len(learner.model.deltas))
            memory.log("import", layer=len(learner.model.deltas), generation=growth.generation)

    def _on_done(self, before: float, now: float) -> None:
        lines, self._unread_lines = self._unread_lines, 0
        self.memory.log("learned", step=self.growth.step, bpc=self.growth.bpc, lines=lines)
        self.memory.set_setting("relearn", None)
        if lines and self.growth.phase == "grown":
            bits = f" · {before:.2f} → {now:.2f} bits per character" * bool(before)
            self.tell(f"learned {lines} new line{'s' * (lines > 1)}{bits}")
        if self.order and any(self.order):
            self.order = None
        self._child_learns, self._text_changed = False, True
        self._bell.set()

    async def _dismiss(self, child: Any, listener: "asyncio.Future[None]") -> None:
        """Ask the child for what it has not yet sent, take it in, and see it go."""
        self._child = None
        with contextlib.suppress(OSError, RuntimeError, MemoryError):
            if not self._child_ready:  # it is still compiling, and has learned nothing
                child.terminate()
            self._send(child, "stop")
            child.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError, MacroGPTError):
            await asyncio.wait_for(asyncio.shield(listener), 10.0)
        try:
            await asyncio.wait_for(child.wait(), 2.0)
        except asyncio.TimeoutError:  # a kill reaps the process, which its watcher should do
            child.kill()
            await child.wait()
        self._child_learns = False


def stored_shape(memory: Memory) -> Dict[str, Any]:
    """Return the size of the generation that the store holds, or nothing where none is known."""
    shape, names = memory.setting("shape", {}), [f.name for f in dataclasses.fields(Shape)]
    whole = all(type(shape.get(name)) in (int, float) for name in names)
    return {name: shape[name] for name in names} if whole else {}


UNNAMED = "requests"  # the session of all who name none: no message in it leans on another


class Organism:
    """Watcher, trainer and speaker of one memory: what an owner talks with."""

    def __init__(self, config: Config, memory: Memory, engine: Engine, session: str = "main",
                 seeded: bool = False) -> None:
        self.memory, self.session = memory, session
        self.notices: Deque[str] = deque(maxlen=20)
        self._settings = config
        self.trainer = Trainer(lambda: self.config, memory, self._tell, self._take_up_engine)
        self.watcher = Watcher(lambda: self.config, memory, self._tell,
                               lambda: self.trainer.silent.wait(REST_SECONDS) or True)
        self.speaker = Speaker(lambda: self.config, memory, engine, seeded)
        self._thread: Optional[threading.Thread] = None
        self._seen: Optional[FileStamp] = None  # of the corpus, when it was last looked at

    def _tell(self, notice: str) -> None:
        """Keep a notice for the owner's next prompt, once."""
        if notice not in self.notices:
            self.notices.append(notice)

    @property
    def config(self) -> Config:
        """The settings, with the shape of the generation that speaks."""
        shape = stored_shape(self.memory)
        if any(getattr(self._settings, name) != value for name, value in shape.items()):
            self._settings = dataclasses.replace(self._settings, **shape)
        return self._settings

    @config.setter
    def config(self, config: Config) -> None:
        """Go by other settings from now on."""
        self._settings = config

    @property
    def growth(self) -> Growth:
        """How far the generation that speaks has come."""
        return Growth.of(self.memory.setting("growth", {}))

    def _take_up_engine(self) -> None:
        """Speak with the kernels that the trainer has compiled, from the next reply on."""
        if not self.speaker.engine.is_fast:
            engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""))
            if engine.is_fast:
                self.speaker.engine = engine
                self._tell("the compiled kernels are ready, and in use from now on")

    # speaking

    def mind(self) -> Mind:
        """Return what speaks now, with its counts; what takes long comes in the background."""
        return self.speaker.mind(counted=True)

    def session_id(self) -> int:
        """Return the id of the session that is talked in, made at its first use."""
        session = self.memory.session_id(self.session)
        if self.memory.setting("session", 0) != session:
            self.memory.set_setting("session", session)  # where the next chat goes on
        return session

    def reply(self, text: str, session: Optional[int] = None,
              make: Callable[..., Turn] = Turn) -> Iterator[str]:
        """Yield the reply to what the owner said, piece by piece; both are remembered.

        It is said in the session that is talked in, or in another, whose turns are made otherwise.
        """
        with self.trainer.paused():
            session = self.session_id() if session is None else session
            self.take_in_messages()
            try:
                yield from self.speaker.reply(text, session, make)
            finally:
                self.memory.mending(lambda: self._settle_turn(session))

    def take_in_messages(self) -> None:
        """Make entries of what the owner said, also of what a crash left lying, as of then."""
        with self.memory.transaction():
            heard = self.memory.heard_messages()
            for m in heard:
                if m.role == "owner":
                    self._remember(m.text, "chat", m.session_id, m.said_at,
                                   recall=holds_statements(m.text))
            self.memory.advance_messages([m.id for m in heard], KEPT)

    def _settle_turn(self, session: int) -> None:
        """Take in what was said; compact the session when its turns outgrow their shares."""
        mind = self.speaker.turn.mind if self.speaker.turn else self.speaker.mind()
        tokenizer = mind.tokenizer if mind.trusted else EvolvingTokenizer()
        room = mind.prompt_budget * (SHARE - 1) // SHARE
        with self.memory.transaction():
            self.take_in_messages()
            exchanges = exchanges_of(m for m in self.memory.prompt_messages(session)
                                     if m.stage < SUMMED)
            if turns_to_keep(tokenizer, exchanges, room) < len(exchanges):
                summarise(self.memory, session, mind.prompt_budget,
                          turns_to_keep(tokenizer, exchanges, room // 2))

    def compact(self) -> Tuple[int, str]:
        """Sum up all turns of the session but the newest; return how many, and the summary."""
        budget, session = self.speaker.mind().prompt_budget, self.session_id()
        with self.memory.transaction():
            self.take_in_messages()  # what is not an entry is not summed up
            count = summarise(self.memory, session, budget)
            summary = [m for m in self.memory.prompt_messages(session) if m.stage == SUMMED]
        return count, "".join(summary_texts(summary, budget))

    # what is told

    def _remember(self, text: str, source: str, session: int, told_at: Optional[float],
                  recall: bool = True) -> None:
        """Make an entry, with what it leans on and the days it names; mend what it corrects."""
        memory, lex = self.memory, lexicon()
        lines = clean_pieces(text.splitlines(), self._settings.max_line_chars)
        if not lines:
            return
        alone = not recall or memory.name_of_session(session) == UNNAMED
        recent = [] if alone else memory.last_told(5, session)
        day = datetime.date.fromtimestamp(memory.clock() if told_at is None else told_at)
        about = "" if alone else answer_to(lex, memory.newest_messages(session, 4), text)
        about = about or (told_about(lex, recent[-1], lines[0]) if recent else "")
        whole = mended(lex, recent, lines[0]) if recent and len(lines) == 1 else None
        if whole:
            lines, about = [whole], ""
        lines = [settled(lex, line) for line in lines]
        memory.add_entry(source, Document(tuple(lines), True), session, recall, told_at=told_at,
                         about=about, days=named_in(lex, lines, day) if recall else "")
        self.trainer.text_changed(at_once=source != "chat")

    def teach(self, text: str, told_at: Optional[float] = None) -> None:
        """Remember a sentence as a fact, told now or at told_at, and learn it soon."""
        self._remember(text, "taught", self.session_id(), told_at)

    def judge(self, good: bool) -> bool:
        """Approve or reject the last reply; an approved one becomes text to learn from.

        One that was approved and then rejected is text no more, and is not said again; it is no
        secret, and so no layer has to unlearn it.
        """
        said, answered = self.speaker.said_ids
        if not answered:
            return False
        asked, answer = self.memory.message_texts((said, answered))
        exchange = Document(tuple(
            clean_line(" ".join(line.split()), self._settings.max_line_chars)
            for line in (f"H: {asked}", f"A: {answer}")), True)
        sign = rejection(asked, answer)
        rejected = [other for other in self.memory.setting("rejected", []) if other != sign]
        with self.memory.transaction():
            self.memory.judge(answered, 1 if good else -1)
            self.memory.set_setting("rejected", rejected if good else [*rejected, sign])
            if good:
                self.memory.add_entry("approved", exchange)
            else:
                self.memory.withdraw("approved", exchange.key)
        self.trainer.text_changed()
        return True

    def ask_for_shape(self, wanted: Shape) -> None:
        """Have a generation of another size born.  Raises ConfigError for a smaller one."""
        now = Shape.of(self.config)
        for name in ("n_layer", "n_embd", "n_head", "n_ff", "block_size"):
            size, old = getattr(wanted, name), getattr(now, name)
            if size < old:
                raise ConfigError(f"{name}={size} is less than the {old} that this organism has, "
                                  f"and it only grows; leave it so, or begin another with --db")
        self.memory.set_setting("wanted_shape", dataclasses.asdict(wanted))
        self.trainer.ring()

    # living

    def awake(self) -> None:
        """Start the thread that watches and learns, unless it runs."""
        if self._thread is None:
            self.trainer.stopping.clear()
            self.speaker.background = True
            thread = threading.Thread(target=self._live_on, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:
                raise as_told(error) from None
            self._thread = thread

    def _live_on(self) -> None:
        """Be the thread of the background; whatever ends it, whoever waits is told."""
        try:
            asyncio.run(self._live())
        except Exception as error:  # no thread can be started, perhaps
            if self.trainer.phase is not Phase.FAILED:
                self.trainer._fail(str(as_told(error)))

    async def _live(self) -> None:
        """Watch the corpus and renew the mind, the trainer beside them, until told to stop.

        Whatever else ends it is told, and ends every wait.
        """
        trainer, stopping = self.trainer, self.trainer.stopping
        training = asyncio.ensure_future(trainer.background_trainer(self.watcher.read_once))
        try:
            while not (stopping.is_set() or training.done()):
                pause = LISTEN_SECONDS
                try:
                    pause = 0.1 if await self._look() else self.config.tick_seconds
                    while not (stopping.is_set() or await asyncio.to_thread(
                            self.speaker.renew, AT_ONCE_CHARS)):
                        await asyncio.to_thread(self.watcher.yield_to_reply)
                    if trainer.phase is Phase.ASLEEP and trainer.due():
                        trainer.ring()
                except (StoreError, MemoryError) as error:  # the words are in the file
                    self._tell(str(as_told(error)))
                await asyncio.to_thread(stopping.wait, pause)
            if training.done():
                training.result()
        except Exception as error:
            if os.environ.get("MACROGPT_DEBUG"):
                traceback.print_exc()
            trainer._fail(str(as_told(error)))
        finally:
            stopping.set()
            self.watcher.read_once.set()
            trainer.ring()
            await asyncio.wait({training})
            training.exception()  # it has been told

    async def _look(self) -> bool:
        """Take in the corpus if its file has changed and come to rest; return whether it moves."""
        watcher, stamp = self.watcher, file_stamp(self.config.corpus_path)
        changed = stamp is not None and stamp != watcher.stamp
        moving = changed and stamp != self._seen and watcher.read_once.is_set()
        self._seen = stamp
        try:
            if changed and not moving and await asyncio.to_thread(
                    watcher.take_in, self._patient(), self.trainer.stopping.is_set):
                self.trainer.text_changed()
        except MacroGPTError as error:
            self._tell(str(error))
        watcher.read_once.set()
        return moving

    def take_in_corpus(self) -> bool:
        """Read the corpus now; return whether anything in it was new or gone."""
        return self.watcher.take_in(self._patient())

    def _patient(self) -> bool:
        """Return whether nobody waits for what stands in the corpus now."""
        return not (self.trainer.in_step or self.trainer.only_orders)

    def sleep(self) -> None:
        """Commit what the trainer has and end the thread."""
        self.trainer.stopping.set()
        self.trainer.ring()
        if self._thread is not None:
            self._thread.join(15.0)
            self._thread, self.speaker.background = None, False

    def learn_now(self, steps: Optional[int] = None, seconds: Optional[float] = None) -> None:
        """Learn everything there is, now, however little; or train for so many steps or seconds."""
        self.trainer.order = (steps, seconds)
        self.trainer.ring()

    def wait(self, done: Callable[[], bool], on_tick: Callable[[], None] = lambda: None) -> None:
        """Return when something is done.  Raises TrainerError when it cannot be any more."""
        while True:
            with self.trainer.changed:
                if self.trainer.phase is Phase.FAILED:
                    raise TrainerError(self.trainer.why_failed)
                if done() or self._thread is None:
                    return
                self.trainer.changed.wait(0.1)
            on_tick()

    def wait_trained(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Return when the order of learn_now is done, or all that is due."""
        self.wait(lambda: self.trainer.order is None, on_tick)

    def wait_rest(self) -> None:
        """Return when all that is due has been learned: then what comes next finds it at rest.

        So a life depends on the order of its events and not on when they came.
        """
        trainer = self.trainer
        trainer.in_step = True
        with contextlib.suppress(CorpusError):  # the watcher tells of it
            if self.take_in_corpus():
                trainer.text_changed()
        trainer.ring()
        self.wait(lambda: trainer.phase is Phase.ASLEEP and (
            trainer.due() is None or trainer.barred()))
        self.speaker.renew()


# ──────────────────────────────────────────────────────────────────────────────────────
# 17 · GRADUATION — out of the file and back   uses: 0 1 2 4 7 11 12 13 15 16
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Whoever outgrows one file on one machine moves: weights and tokenizer in the forms that
# transformers, peft and llama.cpp read, words in those that fine-tuning tools and people read. What
# was trained elsewhere comes back through the gate of a birth or of a burst. Nothing that is read
# here can run anything: a pickle is never opened.

WEIGHT_FORMATS, WORD_FORMATS = ("hf", "peft", "gguf"), ("jsonl", "markdown")
WEIGHT_FILES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".safetensors", ".gguf")
SAVE_ANEW = "save it whole with save_pretrained, as safetensors: a pickle is never opened"


def refused(where: str, found: Any, expected: Any, remedy: str = SAVE_ANEW) -> GraduationError:
    """Return the error that says on one line what cannot be taken in."""
    return GraduationError(f"{where}: found {str(found)[:200]}, expected {str(expected)[:200]}; "
                           f"{remedy}")


class Tensor(NamedTuple):
    """Numbers in float32 and their shape, the innermost dimension last."""

    shape: Tuple[int, ...]
    data: array

    @classmethod
    def of(cls, rows: Sequence[array]) -> "Tensor":
        """Return the matrix of these rows."""
        return cls((len(rows), len(rows[0])), array("f", b"".join(rows)))

    def rows(self, order: Iterable[int]) -> "Tensor":
        """Return the matrix of its rows in this order."""
        dim = self.shape[1]
        return Tensor.of([self.data[i * dim:(i + 1) * dim] for i in order])

    def flipped(self) -> "Tensor":
        """Return the transposed matrix."""
        return Tensor.of([self.data[column::self.shape[1]] for column in range(self.shape[1])])


Tensors = Dict[str, Tensor]


class Part(NamedTuple):
    """A matrix of a Llama, and which rows of a matrix of ours it has, in its order."""

    ours: str
    name: str
    order: Sequence[int]


# A matrix of ours, which part of its rows, and the name of that in transformers and in GGUF.
LLAMA_NAMES = (
    ("qkv", 0, "self_attn.q_proj", "attn_q"), ("qkv", 1, "self_attn.k_proj", "attn_k"),
    ("qkv", 2, "self_attn.v_proj", "attn_v"), ("out", 0, "self_attn.o_proj", "attn_output"),
    ("gate_up", 0, "mlp.gate_proj", "ffn_gate"), ("gate_up", 1, "mlp.up_proj", "ffn_up"),
    ("down", 0, "mlp.down_proj", "ffn_down"))
TABLE, HEAD = ("model.embed_tokens", "token_embd"), ("lm_head", "output")


def parts_of(shape: Shape, vocab: int, gguf: bool = False) -> List[Part]:
    """Return the matrices of a Llama, the table first; the last is the same table as a head.

    transformers turns the halves of a head by RoPE where we and llama.cpp turn neighbours: it wants
    rows 0, 2, 4, … of each head of queries and keys, and then 1, 3, 5, …
    """
    c, f, d = shape.n_embd, shape.n_ff, shape.head_dim
    halves = [head + i for head in range(0, c, d) for i in (*range(0, d, 2), *range(1, d, 2))]
    table, blocks = Part("embedding", TABLE[gguf], range(vocab)), []
    for i in range(shape.n_layer):
        for ours, nth, *names in LLAMA_NAMES:
            count = f if ours == "gate_up" else c
            rows = halves if (ours, nth) in (("qkv", 0), ("qkv", 1)) and not gguf else range(count)
            blocks.append(Part(f"{i}.{ours}", f"{'blk' if gguf else 'model.layers'}.{i}."
                               + names[gguf], [nth * count + row for row in rows]))
    return [table, *blocks, table._replace(name=HEAD[gguf])]


def norms_of(shape: Shape, gguf: bool = False) -> Dict[str, str]:
    """Return the name of each norm there by the matrix of ours that reads what it gives."""
    names = ("blk.{}.attn_norm", "blk.{}.ffn_norm", "output_norm") if gguf else (
        "model.layers.{}.input_layernorm", "model.layers.{}.post_attention_layernorm", "model.norm")
    found = {f"{i}.{ours}": name.format(i) for i in range(shape.n_layer)
             for ours, name in zip(("qkv", "gate_up"), names)}
    return {**found, "scale": names[2]}


def main_layer(model: GPT) -> int:
    """Return the layer that the router calls for most of the text; the newest without a router."""
    sizes = [sum(counts.values()) for counts in getattr(model.router, "counts", ())]
    return sizes.index(max(sizes)) if sizes else len(model.deltas)


def as_one(model: GPT) -> GPT:
    """Return one model without deltas, which reads most of the text as the whole being does.

    Each delta was trained beside the base alone, for text of its own: measured on three probes of
    1.79, 0.37 and 0.67 bits per character, both deltas at once read 6.3, 3.9 and 2.3, the newest
    alone 3.8, 5.6 and 0.2. So one is folded in; only without a router do all add up.
    """
    if model.router:
        return model.with_layer(main_layer(model))
    whole = GPT(model.shape, model.vocab_size, model.engine, None, model.params)
    for delta in model.deltas:
        whole.deltas = [delta]
        whole = whole.with_layer(1)
    return whole


def llama_tensors(model: GPT, gguf: bool = False, tied: bool = True) -> Tensors:
    """Return the base as the tensors of a Llama; a head that is not tied is a copy of the table."""
    found = {}
    for part in parts_of(model.shape, model.vocab_size, gguf)[:-1 if tied else None]:
        param = model.params[part.ours]
        found[part.name + ".weight"] = Tensor((param.rows, param.dim), param.data).rows(part.order)
    for ours, name in norms_of(model.shape, gguf).items():
        gain = model.params["scale"].data[0] if ours == "scale" else 1.0
        found[name + ".weight"] = Tensor((model.shape.n_embd,), array("f", [gain])
                                         * model.shape.n_embd)
    return found


LORA_ENDS = ((".lora_A.weight", ".lora_B.weight"), (".weight.lora_a", ".weight.lora_b"))
EMBEDDING_ENDS = (".lora_embedding_A", ".lora_embedding_B")


def lora_names(part: Part, gguf: bool = False) -> List[str]:
    """Return what A and B of a part are called in an adapter."""
    embeds = part.name == TABLE[0]
    return [("" if gguf else "base_model.model.") + part.name + end
            for end in (EMBEDDING_ENDS if embeds else LORA_ENDS[gguf])]


def lora_tensors(model: GPT, deltas: Sequence[Delta], gguf: bool = False) -> Tensors:
    """Return deltas, their ranks in a row, as one LoRA whose scale is 1.

    The table changes as an embedding, where A and B are flipped, and as a head.
    """
    found: Tensors = {}
    for part in parts_of(model.shape, model.vocab_size, gguf):
        ranks = [(delta[part.ours], i) for delta in deltas for i in range(delta[part.ours].a.rows)]
        a = Tensor.of([adapter.a.row(i) for adapter, i in ranks])
        b = Tensor.of([adapter.b.data[i::adapter.b.dim] for adapter, i in ranks])  # columns of B
        pair = a, b.flipped().rows(part.order)
        if part.name in TABLE:
            pair = (pair[1], a.flipped()) if gguf else (b, a.flipped())
        found.update(zip(lora_names(part, gguf), pair))
    return found


# safetensors: the length of a JSON header, the header, and numbers side by side

MAX_HEADER_BYTES = 100_000_000
MOST_WEIGHT = 1e4  # so that no product of what is read overflows
NUMBER_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


def write_safetensors(path: str, tensors: Tensors) -> None:
    """Write tensors into a new file; the header is filled up, so that numbers begin at eights."""
    header: Dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (shape, data) in tensors.items():
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * len(data)]}
        at += 4 * len(data)
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "xb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.writelines(float_bytes(tensor.data) for tensor in tensors.values())


def regular_file(path: str) -> BinaryIO:
    """Return a regular file to read from.  Raises OSError."""
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file in a folder")
    return open(path, "rb")


def read_json(where: str, raw: Optional[bytes] = None) -> Dict[str, Any]:
    """Return the object of JSON in a file, or in some bytes of one.  Raises GraduationError."""
    try:
        if raw is None:
            with regular_file(where) as file:
                raw = file.read(MAX_HEADER_BYTES)
        value = json.loads(raw)
        if isinstance(value, dict):
            return value
        raise ValueError(f"a {type(value).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise refused(where, error, "an object of JSON") from None


def read_safetensors(path: str, shapes: Dict[str, Tuple[int, ...]],
                     needed: Iterable[str] = ()) -> Tensors:
    """Return the tensors of a file, which may have these names and shapes, and must have some.

    The header is not believed: numbers must stand side by side from its end to that of the file,
    as many as the shapes ask for.  Raises GraduationError.
    """
    try:
        with regular_file(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MAX_HEADER_BYTES:
                raise refused(path, f"a header of {size:,} bytes", f"at most {MAX_HEADER_BYTES:,}")
            header = read_json(path, file.read(size))
            header.pop("__metadata__", None)
            lacking = next((name for name in needed if name not in header), None)
            if lacking:
                raise refused(path, f"no {lacking}", "every part of the exported form")
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
            found = {name: _read_tensor(file, f"{path}, {name}", 8 + size, shapes.get(name), entry)
                     for name, entry in entries}
            if file.read(1):
                raise refused(path, "bytes behind the last tensor", "none")
            return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise refused(path, error, "a file of safetensors") from None


def _read_tensor(file: BinaryIO, where: str, start: int, shape: Optional[Tuple[int, ...]],
                 entry: Dict[str, Any]) -> Tensor:
    """Return in float32 the tensor that comes next in a file whose numbers begin at start.

    Raises GraduationError where it is another, or a number cannot be a weight.
    """
    if shape is None or entry["shape"] != [*shape]:
        raise refused(where, f"the shape {entry['shape']}", [*shape] if shape else
                      "none: the name is unknown", "train the exported model as it is")
    kind, at = entry["dtype"], file.tell() - start
    if kind not in NUMBER_BYTES:
        raise refused(where, kind, " or ".join(NUMBER_BYTES), "save it in float32")
    end = at + math.prod(shape) * NUMBER_BYTES[kind]
    if entry["data_offsets"] != [at, end]:
        raise refused(where, f"bytes {entry['data_offsets']}", f"{[at, end]} for the shape "
                      f"{[*shape]}: no hole, no overlap")
    raw = file.read(end - at)
    if len(raw) < end - at:
        raise refused(where, f"{len(raw)} bytes", f"{end - at}", "it is cut short: copy it anew")
    if kind == "BF16":  # the upper half of a float32
        wide = bytearray(2 * len(raw))
        wide[2::4], wide[3::4] = raw[::2], raw[1::2]
        raw = bytes(wide)
    data = floats_of(raw) if kind != "F16" else array(
        "f", struct.unpack(f"<{len(raw) // 2}e", raw))
    if not all(-MOST_WEIGHT < x < MOST_WEIGHT for x in data):  # nor is any NaN
        raise refused(where, "a number that is none or huge", f"numbers within {MOST_WEIGHT:,.0f}",
                      "the training went astray: take a state from before")
    return Tensor(shape, data)


# the tokenizer as GPT-2's kind spells it, and talk as our text has it

END_MARK = "<|endoftext|>"
LINE_END = FIRST_BYTE + 10  # which ends a reply, as the end of the text does
# Our pre-tokens in the notation of Oniguruma; tests compare the ids.
SPLIT = r"'(?:[stmd]|re|ve|ll)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}H: {{ m['content'] | trim }}"
    "{% elif m['role'] == 'assistant' %}A: {{ m['content'] | trim }}"
    "{% else %}{{ m['content'] | trim }}{{ eos_token }}{% endif %}"
    "{% if m['role'] in ('user', 'assistant') and (not loop.last or add_generation_prompt) %}"
    "{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}A:{% else %}{{ eos_token }}{% endif %}")


def bpe_names(tokenizer: EvolvingTokenizer) -> Tuple[List[str], List[str]]:
    """Return the ids' names, in which each byte is a visible sign, and the merges as two names."""
    plain, others = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
    signs = [chr(byte if byte in plain else next(others)) for byte in range(256)]
    names = [END_MARK] + ["".join(signs[byte] for byte in tokenizer.token_bytes(token))
                          for token in range(FIRST_BYTE, tokenizer.vocab_size)]
    return names, [f"{names[left]} {names[right]}" for left, right in tokenizer.merges]


def tokenizer_json(tokenizer: EvolvingTokenizer) -> Dict[str, Any]:
    """Return what the package tokenizers reads: a text begins with the end of the one before."""
    names, merges = bpe_names(tokenizer)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    first = {"SpecialToken": {"id": END_MARK, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0", "decoder": level,
        "added_tokens": [{"id": END_OF_TEXT, "content": END_MARK, "special": True, **plain}],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": {"type": "TemplateProcessing", "single": [first, a],
                           "pair": [first, a, b], "special_tokens": {END_MARK: {
                               "id": END_MARK, "ids": [END_OF_TEXT], "tokens": [END_MARK]}}},
        "model": {"type": "BPE", "merges": merges,
                  "vocab": {name: i for i, name in enumerate(names)}}}


def llama_config(shape: Shape, vocab: int, tied: bool = True) -> Dict[str, Any]:
    """Return the configuration of LlamaForCausalLM."""
    return {
        "model_type": "llama", "hidden_act": "silu", "hidden_size": shape.n_embd,
        "intermediate_size": shape.n_ff, "num_hidden_layers": shape.n_layer,
        "num_attention_heads": shape.n_head, "num_key_value_heads": shape.n_head,
        "head_dim": shape.head_dim, "rms_norm_eps": shape.norm_eps, "rope_theta": shape.rope_base,
        "vocab_size": vocab, "attention_bias": False, "mlp_bias": False, "attention_dropout": 0.0,
        "architectures": ["LlamaForCausalLM"], "max_position_embeddings": shape.block_size,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": tied, "bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT,
        "torch_dtype": "float32"}


# GGUF: keys and values, a list of tensors, and their numbers at multiples of 32 bytes

GGUF_F32, GGUF_F16, GGUF_Q8_0 = 0, 1, 8
GGUF_FILES = {"model.gguf": (GGUF_F32, 0), "model-f16.gguf": (GGUF_F16, 1),
              "model-q8_0.gguf": (GGUF_Q8_0, 7)}  # with the number of the kind of file
ALIGNMENT, BLOCK = 32, 32  # bytes; numbers of q8_0 that share a scale


def gguf_string(text: str) -> bytes:
    """Return a string as its length and its bytes."""
    return struct.pack("<Q", len(text.encode())) + text.encode()


def gguf_value(value: Any) -> bytes:
    """Return the number of a value's kind and the value; a list holds int32 or strings."""
    if isinstance(value, list):
        kind, form = (5, struct.Struct("<i").pack) if value and type(value[0]) is int else (
            8, gguf_string)
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(form, value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + gguf_string(value)
    kind, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack("<I" + form, kind, value)


def gguf_numbers(tensor: Tensor, kind: int) -> Tuple[int, bytes]:
    """Return the kind in which a tensor is stored, and its numbers: a gain stays float32.

    What has rows of no whole blocks is float16 in place of q8_0.
    """
    data = tensor.data
    if kind == GGUF_F32 or len(tensor.shape) == 1:
        return GGUF_F32, float_bytes(data)
    if kind == GGUF_F16 or tensor.shape[-1] % BLOCK:
        return GGUF_F16, struct.pack(f"<{len(data)}e", *data)
    blocks = []
    for part in (data[at:at + BLOCK] for at in range(0, len(data), BLOCK)):
        step = max(max(part), -min(part)) / 127.0
        blocks.append(struct.pack(f"<e{BLOCK}b", step, *(
            round(x / step) if step else 0 for x in part)))
    return GGUF_Q8_0, b"".join(blocks)


def write_gguf(path: str, about: Dict[str, Any], tensors: Tensors, kind: int = GGUF_F32) -> None:
    """Write a new GGUF file, version 3; dimensions stand there innermost first."""
    about = {"general.architecture": "llama", "general.alignment": ALIGNMENT, **about}
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(about))
    head += b"".join([gguf_string(key) + gguf_value(value) for key, value in about.items()])
    body = bytearray()
    for name, tensor in tensors.items():
        (stored, raw), dims = gguf_numbers(tensor, kind), len(tensor.shape)
        head += gguf_string(name) + struct.pack(f"<I{dims}QIQ", dims, *tensor.shape[::-1], stored,
                                                len(body))
        body += raw + bytes(-len(raw) % ALIGNMENT)
    with open(path, "xb") as file:
        file.write(head + bytes(-len(head) % ALIGNMENT))
        file.write(body)


# leaving

CARD = """# A macrogpt that left home

Generation {generation} after {step:,} steps and {tokens:,} tokens, {bpc}: a Llama of {n_layer}
layers, {n_embd} channels, {n_head} heads, a window of {block_size} tokens, {vocab:,} ids.

**It has read its owner's words and may say them. Share it as you would a diary.**

- Folded into what is one model here: {folded}. At home a router picks one delta for each text. They
  were trained apart and are not to be added up; the forms peft and gguf hold them all.
- It knows talk in lines that begin with `H:` and `A:`, after one end-of-text; a reply is a line.
- Marks (of Hindi, Thai, Arabic) are letters to it; llama.cpp may cut such words otherwise.
- To bring it back after training: `python macrogpt.py import FOLDER`. Leave the last norm alone
  (`model.model.norm.requires_grad_(False)`), which at home is one number, and vocabulary and sizes.
  An adapter must leave `embed_tokens` and `lm_head` alone, or change both alike.

## Its life

"""


class Leaving(NamedTuple):
    """What is exported: a generation, how it speaks, how far it has come, its life in words."""

    config: Config
    tokenizer: EvolvingTokenizer
    model: GPT
    growth: Growth
    life: Sequence[str]

    @classmethod
    def of(cls, memory: Memory, config: Config, engine: Engine, life: Sequence[str]) -> "Leaving":
        """Return the generation that a store holds.  Raises GraduationError for a newborn."""
        growth = Growth.of(memory.setting("growth", {}))
        layers = memory.layers(without=("optimizer", "ear", "mixer"))
        if growth.phase == "newborn" or not {"base", "tokenizer"} <= layers.keys():
            raise GraduationError("nothing has been learned yet that could be exported; run "
                                  "`train` first")
        return cls(config, *build_model(config, layers, engine, growth.phase == "warmup"), growth,
                   life)

    def card(self) -> str:
        """Return what is said of a model to whoever opens its folder."""
        growth, layer = self.growth, main_layer(self.model)
        folded = f"delta {layer}, for most of its text" if self.model.router else "all deltas"
        bpc = "not measured" if growth.bpc is None else f"{growth.bpc:.3f} bits per character"
        return CARD.format(**{
            **dataclasses.asdict(growth), **dataclasses.asdict(self.model.shape), "bpc": bpc,
            "folded": folded if layer else "no delta", "vocab": self.model.vocab_size}) + "".join(
                f"- {line}\n" for line in self.life)

    def write_hf(self, folder: str, tied: bool = True) -> None:
        """Write one model into a folder, as transformers reads it."""
        config, model = self.config, as_one(self.model)
        for name, value in {
                "config.json": {**llama_config(model.shape, model.vocab_size, tied),
                                "macrogpt_layer": main_layer(self.model)},
                "tokenizer.json": tokenizer_json(self.tokenizer),
                "tokenizer_config.json": {
                    **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_MARK),
                    "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True,
                    "clean_up_tokenization_spaces": False, "chat_template": CHAT_TEMPLATE,
                    "model_max_length": model.shape.block_size},
                "generation_config.json": {
                    "bos_token_id": END_OF_TEXT, "eos_token_id": [END_OF_TEXT, LINE_END],
                    "pad_token_id": END_OF_TEXT, "do_sample": config.temperature > 0,
                    "temperature": config.temperature or 1.0, "top_k": config.top_k,
                    "top_p": config.top_p, "max_new_tokens": config.max_gen_tokens}}.items():
            write_new(os.path.join(folder, name), [json.dumps(value, indent=1)])
        write_safetensors(os.path.join(folder, "model.safetensors"),
                          llama_tensors(model, tied=tied))

    def write_peft(self, folder: str) -> None:
        """Write the base, and each delta as an adapter of it; all as one where they add up.

        A delta changes the table both as embedding and as head, so the base's head is not tied.
        """
        model, parts = self.model, parts_of(self.model.shape, 1)
        adapters = {f"delta-{n}": [delta] for n, delta in enumerate(model.deltas, 1)}
        if model.router is None and len(model.deltas) > 1:
            adapters["all"] = model.deltas
        os.mkdir(os.path.join(folder, "base"))
        self._replace(model=model.with_layer(0)).write_hf(os.path.join(folder, "base"), tied=False)
        for name, deltas in adapters.items():
            os.mkdir(os.path.join(folder, name))
            rank = sum(delta["embedding"].a.rows for delta in deltas)
            write_new(os.path.join(folder, name, "adapter_config.json"), [json.dumps({
                "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank,
                "base_model_name_or_path": "../base", "bias": "none", "fan_in_fan_out": False,
                "inference_mode": True, "lora_dropout": 0.0, "target_modules": sorted(
                    {part.name.rpartition(".")[2] for part in parts})})])
            write_safetensors(os.path.join(folder, name, "adapter_model.safetensors"),
                              lora_tensors(model, deltas))

    def gguf_about(self) -> Dict[str, Any]:
        """Return the keys and values that llama.cpp asks of a model with its tokenizer."""
        shape, (names, merges) = self.model.shape, bpe_names(self.tokenizer)
        llama = {"context_length": shape.block_size, "embedding_length": shape.n_embd,
                 "block_count": shape.n_layer, "feed_forward_length": shape.n_ff,
                 "attention.head_count": shape.n_head, "attention.head_count_kv": shape.n_head,
                 "attention.layer_norm_rms_epsilon": shape.norm_eps, "vocab_size": len(names),
                 "rope.freq_base": shape.rope_base, "rope.dimension_count": shape.head_dim}
        ggml = {"model": "gpt2", "pre": "gpt-2", "tokens": names,
                "token_type": [3] + [1] * (len(names) - 1),  # one control, the rest normal
                "merges": merges, "bos_token_id": END_OF_TEXT,
                "eos_token_id": END_OF_TEXT, "eot_token_id": LINE_END,
                "padding_token_id": END_OF_TEXT, "add_bos_token": True, "add_space_prefix": False}
        return {"general.type": "model", "general.name": "macrogpt", "general.file_type": 0,
                **{f"llama.{key}": value for key, value in llama.items()},
                **{f"tokenizer.ggml.{key}": value for key, value in ggml.items()},
                "tokenizer.chat_template": CHAT_TEMPLATE}

    def write_gguf(self, folder: str) -> None:
        """Write what is folded into one in three precisions; the base and each delta beside it.

        A LoRA there flips the table for an embedding, so its base must have a head of its own.
        """
        whole, about = llama_tensors(as_one(self.model), gguf=True), self.gguf_about()
        for name, (kind, file_type) in GGUF_FILES.items():
            write_gguf(os.path.join(folder, name), {**about, "general.file_type": file_type}, whole,
                       kind)
        if self.model.deltas:
            write_gguf(os.path.join(folder, "base.gguf"), about,
                       llama_tensors(self.model, gguf=True, tied=False))
        for number, delta in enumerate(self.model.deltas, 1):
            write_gguf(os.path.join(folder, f"delta-{number}.gguf"), {
                "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha":
                float(delta["embedding"].a.rows)}, lora_tensors(self.model, [delta], gguf=True))


def write_new(path: str, lines: Iterable[str]) -> None:
    """Write lines into a file that is not there yet.  Raises UsageError."""
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError as error:
        raise UsageError(f"{path} cannot be written ({error.strerror}); name a new file") from None


def export_weights(folder: str, form: str, who: Leaving) -> None:
    """Write a generation into a new folder, once it is whole.  Raises GraduationError."""
    folder = os.path.abspath(folder)
    if os.path.lexists(folder):
        raise GraduationError(f"{folder} is there already; name a new folder")
    try:
        with tempfile.TemporaryDirectory(dir=os.path.dirname(folder)) as near:
            made = os.path.join(near, "made")
            os.mkdir(made, 0o700)
            getattr(who, f"write_{form}")(made)
            write_new(os.path.join(made, "README.md"), [who.card()])
            os.rename(made, folder)
    except (OSError, UsageError) as error:
        raise GraduationError(f"{folder} cannot be written ({error}); free some space or name "
                              "another folder") from None


# and back: nothing of it is believed, and all of it goes through the gate


def returned_tokenizer(folder: str, live: EvolvingTokenizer) -> EvolvingTokenizer:
    """Return a folder's tokenizer: ours, perhaps with merges behind.  Raises GraduationError."""
    path = os.path.join(folder, "tokenizer.json")
    try:
        model = read_json(path)["model"]
        ids, merges = model["vocab"], [m.split(" ") if isinstance(m, str) else m
                                       for m in model["merges"]]
        tokenizer = EvolvingTokenizer((ids[left], ids[right]) for left, right in merges)
        if tokenizer.merges[:len(live.merges)] != live.merges:
            raise ValueError("its first merges are not ours")
        if ids != {name: i for i, name in enumerate(bpe_names(tokenizer)[0])}:
            raise ValueError("ids that no merge makes")
        return tokenizer
    except (ValueError, TypeError, LookupError) as error:
        raise refused(path, f"another vocabulary ({error})", "bytes, then merges in order, as "
                      "exported", "export anew, add no tokens, and keep tokenizer.json") from None


def returned_config(folder: str, shape: Shape) -> Dict[str, Any]:
    """Return the config.json of a Llama of our shape.  Raises GraduationError for another."""
    path = os.path.join(folder, "config.json")
    config = read_json(path)
    rope = config.get("rope_parameters")
    found = {**config, **(rope if isinstance(rope, dict) else {})}
    for name, value in list(llama_config(shape, 0).items())[:10]:  # what the weights are read by
        if found.get(name) != value:
            raise refused(f"{path}, {name}", repr(found.get(name)), repr(value),
                          "sizes stay as they were exported; it grows at home, by --set")
    return config


def returned_base(folder: str, shape: Shape, vocab: int) -> Layer:
    """Return the base that a folder of the hf form holds.  Raises GraduationError.

    A norm's gains go into the matrices that read it. The last one is a single number at home, for
    the table is tied, and so must be a head that was saved beside it.
    """
    path = os.path.join(folder, "model.safetensors")
    base = GPT(shape, vocab, reference_engine(), None)
    shapes = {name: tensor.shape for name, tensor in llama_tensors(base, tied=False).items()}
    found = read_safetensors(path, shapes, shapes.keys() - {"lm_head.weight"})
    gains = {ours: found[f"{name}.weight"].data for ours, name in norms_of(shape).items()}
    if found.get("lm_head.weight") not in (None, found["model.embed_tokens.weight"]):
        raise refused(path, "a head that is not the embedding", "one table for both",
                      "train with tie_word_embeddings")
    if len(set(gains["scale"])) > 1:
        raise refused(f"{path}, model.norm.weight", "gains that differ", "one number for all",
                      "train with model.model.norm.requires_grad_(False)")
    for part in parts_of(shape, vocab)[:-1]:
        (_, dim), theirs = found[f"{part.name}.weight"]
        for i, row in enumerate(part.order):
            base.params[part.ours].data[row * dim:(row + 1) * dim] = array("f", map(
                mul, theirs[i * dim:(i + 1) * dim], gains.get(part.ours) or repeat(1.0)))
    base.params["scale"].data[0] = gains["scale"][0]
    return pack_params(list(base.params.values()))


PLAIN_LORA = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False,
              "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}


def returned_scale(path: str) -> Tuple[int, float]:
    """Return rank and scale of the plain LoRA that a file describes.  Raises GraduationError."""
    config = read_json(path)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    for name, value in PLAIN_LORA.items():
        if config.get(name) not in (None, value):
            raise refused(path, f"{name} {config[name]!r}", repr(value), "train a plain LoRA")
    if type(rank) is not int or not 0 < rank <= 256 or (
            type(alpha) not in (int, float) or not abs(alpha) < 1e6):
        raise refused(path, f"r {rank!r}, lora_alpha {alpha!r}", "numbers, r from 1 to 256",
                      "train a plain LoRA")
    return rank, alpha / rank


def returned_delta(folder: str, model: GPT) -> Layer:
    """Return the delta that an adapter makes.  Raises GraduationError.

    Parts of one matrix, of which there are up to three, have their ranks one after the other
    there, and every matrix of a delta has the same rank: where a part lacks, its B stays zero.
    """
    rank, scale = returned_scale(os.path.join(folder, "adapter_config.json"))
    path = os.path.join(folder, "adapter_model.safetensors")
    made = GPT(model.shape, model.vocab_size, reference_engine(), None)
    for ranks in (3 * rank, rank):  # what comes of it, and what is expected there
        made.append_delta(ranks, None)
    shapes = {name: tensor.shape for name, tensor in lora_tensors(made, made.deltas[1:]).items()}
    found, pairs = read_safetensors(path, shapes), {}
    for part in parts_of(model.shape, model.vocab_size):
        a, b = map(found.get, lora_names(part))
        if (a is None) != (b is None):
            raise refused(path, f"half of the pair of {part.name}", "A and B")
        if not a or not b:
            continue
        a, b = pairs[part.name] = (b.flipped(), a.flipped()) if part.name == TABLE[0] else (a, b)
        adapter, column = made.deltas[0][part.ours], part.order[0] // len(part.order) * rank
        adapter.a.data[column * a.shape[1]:(column + rank) * a.shape[1]] = a.data
        for i, row in enumerate(part.order):
            at = row * 3 * rank + column
            adapter.b.data[at:at + rank] = array(
                "f", [scale * x for x in b.data[i * rank:(i + 1) * rank]])
    if not pairs:
        raise refused(path, "an adapter of nothing", "pairs of lora_A and lora_B")
    if pairs.get(TABLE[0]) != pairs.get(HEAD[0]):
        raise refused(path, "a head that learned other things than the embedding",
                      "one table for both", "leave embed_tokens and lm_head out of target_modules")
    return pack_params(delta_matrices(made.deltas[0]))


def not_better(folder: str, probe: str, before: float, now: float) -> GraduationError:
    """Return the error that says where weights from elsewhere read worse."""
    return refused(f"{folder}, probe {probe}", f"{now:.3f} bits per character",
                   f"about {before:.3f} as now", "train it on what is known here as well")


def new_generation(live: Learner, folder: str, memory: Memory) -> Learner:
    """Return the generation whose base a folder holds.  Raises GraduationError if it is refused.

    It has read what the layers had that were one when it left; other text waits for it.
    """
    shape, number = live.model.shape, max(live.growth.generation, memory.setting("generations", 0))
    config, tokenizer = returned_config(folder, shape), returned_tokenizer(folder, live.tokenizer)
    base = returned_base(folder, shape, tokenizer.vocab_size)
    new = Learner(live.config, dataclasses.replace(live.growth.heir(number + 1), phase="warmup"),
        {"tokenizer": Layer(None, tokenizer.pack()), "base": base}, live.engine)
    layer = config.get("macrogpt_layer")
    read = {e.key for e in memory.entries("e.layer IN (0, ?)", layer if layer in range(
        len(live.model.deltas) + 1) else 0)}
    new.take_text((), [t for t in live.texts.values() if t.probe or t.key in read])
    new.ear = memory.layer("ear")
    new.end_birth(live.growth.warmup_seconds)
    new.evaluate()
    worst = fit_to_live(new, live)
    if worst:
        raise not_better(folder, **worst)
    new.growth.take_probes(new.growth.probes, live.growth)
    return new


def append_returned(live: Learner, folder: str) -> None:
    """Append the delta that an adapter makes; it speaks for what the first layer with text did.

    Raises GraduationError if it does harm, as a burst is refused; the store knows nothing of it.
    """
    layer, number = returned_delta(folder, live.model), len(live.model.deltas) + 1
    live.model.append_delta(layer.manifest[0][1], live.rng)
    load_params(delta_matrices(live.model.deltas[-1]), layer)
    live.router.append()
    gate = Gate(live)
    live.router.refine(number, next((i for i, c in enumerate(live.router.counts) if c), 0))
    for name, losses in gate.worse().items():
        raise not_better(folder, name, *losses)
    gate.commit()
    live.growth.delta_chars = live.config.delta_seal_chars  # what comes next has its own
    live.dirty.update((f"delta{number - 1}", f"delta{number}", "router"))  # the last is sealed
    live.evaluate()


def import_weights(organism: Organism, folder: str) -> Learner:
    """Take in weights that were trained elsewhere; return them as a generation or a delta of ours.

    Nothing changes unless all of it fits, and it reads no probe worse.  Raises GraduationError, or
    TrainerError where another process trains.
    """
    memory, about = organism.memory, os.path.join(folder, "adapter_config.json")
    adapts = os.path.isfile(about)
    # before all that takes long
    read_json(about if adapts else os.path.join(folder, "config.json"))
    with organism.trainer.holding():
        if organism.growth.phase != "grown" or memory.lost_layers()[1]:
            raise GraduationError("what lives here is not grown up, or damaged, so nothing can "
                                  "take its place; run `train` first")
        learner, read = Learner(organism.config, organism.growth, memory.layers(without=("ear",)),
                                organism.speaker.engine), []
        learner.take_text((), texts_to_learn(memory, [i for i, _ in memory.training_index()]))
        if adapts:
            append_returned(learner, folder)
        else:
            learner = new_generation(learner, folder, memory)
            read = [text.key for text in learner.texts.values() if not text.probe]
        for name, bpc in learner.growth.probes.items():
            if not isfinite(bpc):
                raise not_better(folder, name, organism.growth.probes.get(name, bpc), bpc)
        organism.trainer.take_over(learner, read)
    return learner


# words

TOLD_TITLE, TALK_TITLE = "# What it was told", "# The talk "
SPEAKERS = {"owner": "you", "self": "macrogpt"}
ROLES = {"user": "owner", "assistant": "self", "system": "", "developer": "", "tool": ""}


def chat_records(memory: Memory, mine: bool) -> Iterator[Dict[str, Any]]:
    """Yield talks, and unless mine exchanges of the corpus, as fine-tuning tools read them."""
    talks = ([(m.role, m.text) for m in memory.messages_of(session["name"])]
             for session in memory.sessions())
    exchanges = (Document(tuple(entry.text.splitlines()), True).turns()
                 for entry in memory.entries("e.source = 'corpus'"))
    for turns in talks if mine else itertools.chain(talks, exchanges):
        if turns:
            yield {"messages": [{"role": "user" if who in ("owner", "H") else "assistant",
                                 "content": words} for who, words in turns]}


def as_markdown(memory: Memory) -> Iterator[str]:
    """Yield the lines of what it was told, by subject and day, and of every talk, for people.

    Later lines of a text are moved in, so that all can be read back.
    """
    lex, told = lexicon_of(memory), defaultdict(list)  # type: Lexicon, DefaultDict[str, List[str]]
    for entry in memory.told():
        named = things_named(lex, lex.line(entry.about or entry.text))
        subject = next((name for _, name in named), "all else")
        told[subject].append(f"- {told_day(entry)}  " + entry.text.strip().replace("\n", "\n  "))
    yield TOLD_TITLE
    for subject, lines in told.items():
        yield f"\n## {subject}\n"
        yield from lines
    for session in memory.sessions():
        yield f"\n{TALK_TITLE}{session['name']}\n"
        for m in memory.messages_of(session["name"]):
            yield f"- {minute_of(m.said_at)}  {SPEAKERS[m.role]}: " + m.text.replace("\n", "\n  ")


class Heard(NamedTuple):
    """What was said or told elsewhere: in a talk, or in none; by "owner" or "self"; when."""

    talk: Optional[str]
    role: str
    text: str
    at: Optional[float]


def words_of(path: str) -> List[Heard]:
    """Return the words of a file: JSONL of talks or of messages, or Markdown as export writes it.

    Raises UsageError for a line that is neither.
    """
    text, heard = read_text(path), []
    if text.startswith(TOLD_TITLE):
        return _words_of_markdown(text)
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {"messages": []}
            for turn in row["messages"] if "messages" in row else [row]:
                said = turn["content"]
                if not isinstance(said, str):  # in parts, or nothing where a tool was called
                    said = "\n".join(part["text"] for part in said or () if "text" in part)
                heard.append(Heard("", ROLES[turn["role"]], tidied(said), None))
        except (ValueError, LookupError, TypeError, RecursionError):
            raise UsageError(f"line {number} of {path} is no talk; expected an object like "
                             '{"messages": [{"role": "user", "content": "Hi!"}]}, or one message; '
                             "plain sentences go into nonames.txt") from None
    return [said for said in heard if said.role and said.text.strip()]


def _words_of_markdown(text: str) -> List[Heard]:
    """Return what was told, unless it was said in a talk as well, and then every talk."""
    heard: List[Heard] = []
    talk = None
    for item in re.findall(r"(?m)^(?:- .*(?:\n  .*)*|#.*)", text):
        words = tidied(item[2:].replace("\n  ", "\n"))
        turn = re.fullmatch(r"(\d{4}-\d\d-\d\d \d\d:\d\d)  (you|macrogpt): (?s:(.*))", words)
        told = re.fullmatch(r"(\d{4}-\d\d-\d\d)  (?s:(.*))", words)
        if item.startswith(TALK_TITLE):
            talk = item[len(TALK_TITLE):].strip()
        elif told and talk is None:
            heard.append(Heard(None, "owner", told[2], _moment(told[1])))
        elif turn and talk is not None:
            role = "owner" if turn[2] == SPEAKERS["owner"] else "self"
            heard.append(Heard(talk, role, turn[3], _moment(turn[1])))
    spoken = {line.strip() for m in heard if m.talk is not None
              for line in (m.text, *m.text.split("\n"))}
    return [m for m in heard if m.talk is not None or m.text.strip() not in spoken]


def _moment(text: str) -> Optional[float]:
    """Return the time that "2026-05-03 12:00" names here, or None for what names none."""
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.datetime.fromisoformat(text).timestamp()
    return None


# ──────────────────────────────────────────────────────────────────────────────────────
# 18 · SERVE — a door for other programs, and a page   uses: 0 1 2 11 12 13 14 16 17
# ──────────────────────────────────────────────────────────────────────────────────────
#
# The API of OpenAI, which chat front ends speak, on a small and strict HTTP/1.1 of our own. An
# event loop reads and writes; answers are made one at a time on another thread, by the organism
# that also chats. A request brings its own talk along: unless the owner lets it learn, nothing of
# it is stored, and the next one knows nothing of it.
#
# What a browser is told to send is not what its owner wants: a page from elsewhere may send
# requests here, and a name of its own may lead here (DNS rebinding). So Host and Origin must be
# ours, and what is asked must be JSON.

MODEL_NAME, NO_SESSION = "macrogpt", 0
MOST_HEAD_BYTES, MOST_BODY_BYTES = 16_384, 1 << 18
MOST_CONNECTIONS = 256   # each of which asks once
CLIENT_SECONDS = 10.0    # for a head, for a body, for taking what is sent
MOST_FREE_TOKENS = 4096  # of one completion
LOOPBACK = re.compile(r"localhost|::1|127\.\d{1,3}\.\d{1,3}\.\d{1,3}")
ROUTES = {"/": "GET", "/status": "GET", "/v1/models": "GET", "/v1/completions": "POST",
          "/v1/chat/completions": "POST"}
_REQUEST_LINE = re.compile(r"([A-Z]{1,20}) (/[!-~]*) HTTP/1\.[01]")
_HEADER_LINE = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")


class Refused(MacroGPTError):
    """A request that is not served: its status, which field is meant, a code for programs."""

    def __init__(self, status: int, message: str, param: Optional[str] = None,
                 code: Optional[str] = None, **headers: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {k.replace("_", "-"): v for k, v in headers.items()}
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


def parse_head(raw: bytes) -> Dict[str, str]:
    """Return the headers of a request, among them :method and :path.  Raises Refused.

    What can be read in two ways, by us and by whatever stands before us, is not read at all.
    """
    first, *lines = raw[:-4].decode("latin-1").split("\r\n")
    begun, found = _REQUEST_LINE.fullmatch(first), list(map(_HEADER_LINE.fullmatch, lines))
    headers = {each[1].lower(): each[2].rstrip() for each in found if each}
    if not begun or len(headers) < len(lines):
        raise Refused(400, "this is no request of HTTP/1.1, or a header stands twice in it")
    return {":method": begun[1], ":path": begun[2].partition("?")[0], **headers}


def check_door(host: str, token: Optional[str]) -> None:
    """Raise UsageError where whoever is in the network could come in."""
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise UsageError("--token takes ASCII letters, digits and signs, without spaces")
    if not LOOPBACK.fullmatch(host) and not token:
        raise UsageError(f"--host {host or repr(host)} can be reached from other machines; add "
                         "--token with a secret that all are asked for, or leave --host out")


# What a request asks for. A field of the API that is not there is refused if it asks for anything;
# one that nobody knows is passed over, as front ends send many.

FIELDS: Dict[str, Tuple[type, float, float]] = {  # of the API: what they are, from where to where
    "temperature": (float, 0, 2), "top_p": (float, 0, 1), "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2), "seed": (int, -2 ** 63, 2 ** 63), "model": (str, 0, MOST),
    "max_tokens": (int, 1, 100_000), "max_completion_tokens": (int, 1, 100_000),
    "stream": (bool, 0, 1), "stream_options": (dict, 0, MOST), "include_usage": (bool, 0, 1),
    "messages": (list, 1, MOST), "user": (str, 0, MOST),
    # and what is not there, with the one value that asks for nothing
    "n": (int, 1, 1), "best_of": (int, 1, 1), "logprobs": (bool, 0, 0), "echo": (bool, 0, 0),
    "tools": (list, 0, 0), "functions": (list, 0, 0), "suffix": (str, 0, 0), "audio": (dict, 0, 0),
    "response_format": (dict, 0, 0)}


class Wanted(NamedTuple):
    """What a request asks for: a reply to a text after some turns, or how a text goes on."""

    chat: bool
    text: str
    turns: Tuple[Tuple[str, str], ...]  # (role, text), "" for the system's
    session: str
    given: Dict[str, Any]  # fields of the API, checked

    def tuned(self, config: Config) -> Config:
        """Return settings with those that the request names."""
        return dataclasses.replace(config, **{name: float(self.given[name]) for name, row in
                                              FIELDS.items() if row[0] is float
                                              and name in self.given})


def checked_fields(asked: Any) -> Dict[str, Any]:
    """Return the fields that are there, each of the right type and range.  Raises Refused."""
    if not isinstance(asked, dict):
        raise Refused(400, "send a JSON object")
    given = {name: value for name, value in asked.items() if value is not None}
    for name in given.keys() & FIELDS.keys():
        (kind, low, high), value = FIELDS[name], given[name]
        right = type(value) in ((int, float) if kind is float else (kind,))
        if not right or not low <= (len(value) if hasattr(value, "__len__") else value) <= high:
            bounds = f"from {low:g} to {high:g}" if high < MOST else f"{low:g} or more"
            raise Refused(400, f"{name} must be of type {kind.__name__}, {bounds}", name)
    return given


def turns_in(messages: List[Any]) -> List[Tuple[str, str]]:
    """Return the (role, text) pairs of messages, the last of them the owner's.  Raises Refused."""
    turns = []
    for number, message in enumerate(messages):
        try:
            content = message.get("content") or ""
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            turns.append((ROLES[message["role"]], tidied("\n".join(texts)).strip()))
        except (AttributeError, LookupError, TypeError):
            raise Refused(400, f"a message has a role, one of {', '.join(ROLES)}, and as content "
                          "a string, or parts of type text", f"messages[{number}]") from None
    if not turns or turns[-1][0] != "owner" or not turns[-1][1]:
        raise Refused(400, "the last message must be the user's, and hold words", "messages")
    return turns


def wanted_of(asked: Any, chat: bool, session: str = "") -> Wanted:
    """Return what a JSON body asks for.  Raises Refused."""
    given = checked_fields(asked)
    checked_fields(given.get("stream_options", {}))
    if given.get("model", MODEL_NAME) != MODEL_NAME:
        raise Refused(404, f"the one model here is {MODEL_NAME}", "model", "model_not_found")
    stops, prompt = given.get("stop", []), given.get("prompt")
    given["stop"] = stops = [stops] if isinstance(stops, str) else stops
    if not isinstance(stops, list) or len(stops) > 4 or not all(
            isinstance(stop, str) and stop for stop in stops):
        raise Refused(400, "stop is a text, or a list of one to four", "stop")
    prompt = prompt[0] if isinstance(prompt, list) and len(prompt) == 1 else prompt
    if not chat and not isinstance(prompt, str):
        raise Refused(400, "prompt must be one text", "prompt")
    *turns, (_, text) = turns_in(given.get("messages", [])) if chat else [("", tidied(prompt))]
    name = session_name(session or given.get("user", ""))
    return Wanted(chat, text, tuple(turns), "" if name == UNNAMED else name, given)


class Visit(Turn):
    """A turn of a request: with its settings, and its own talk before it where it has no session.
    """

    def __init__(self, wanted: Wanted, rng: random.Random, memory: Memory, mind: Mind, text: str,
                 session: int, *_: Any) -> None:
        mind = mind._replace(config=wanted.tuned(mind.config))
        super().__init__(memory, mind, text, session, rng)
        self.keeps = session != NO_SESSION
        if not (self.keeps and wanted.session):
            self.given = [words for role, words in wanted.turns if role != "self"]
            self.turns = self.talk = [turn for turn in wanted.turns if turn[0]]
            self.summary = []  # of other talks
            self.said = {words for role, words in self.turns if role == "self"}

    def _forgotten(self, wish: str) -> str:
        """Forget nothing for those from whom nothing is learned."""
        return super()._forgotten(wish) if self.keeps else NOT_FORGOTTEN


NOT_FORGOTTEN = "I forget nothing here, where nothing is learned; tell me in a chat."


class Answer:
    """One answer, made on the thread that speaks: its text, how it ended, and why it came.

    A reply is weighed as a whole before its first word is said; so all the pieces of a stream are
    there when it begins.
    """

    def __init__(self, organism: Organism, wanted: Wanted, learns: bool, number: int) -> None:
        self.organism, self.wanted, self.gone = organism, wanted, threading.Event()
        self.learns, self.turn = learns, None  # type: bool, Any
        self.rng = random.Random(wanted.given.get("seed", f"{organism.config.seed}:{number}"))
        self.text, self.finish, self.usage = "", "stop", {}  # type: str, str, Dict[str, int]

    def make(self) -> None:
        """Make the text, up to a stop text or the last token wanted, or while somebody waits."""
        wanted, given = self.wanted, self.wanted.given
        most = given.get("max_completion_tokens", given.get("max_tokens"))
        mind = self.organism.speaker.mind() if wanted.chat else self.organism.mind()
        self.finish = "stop" if wanted.chat else "length"
        with contextlib.closing(self._pieces(mind, most or 16)) as pieces:
            for piece in pieces:
                self.text += piece
                found = [at for at in map(self.text.find, given["stop"]) if at >= 0]
                if found or self.gone.is_set():
                    self.text, self.finish = self.text[:min(found, default=None)], "stop"
                    break
        encode = mind.tokenizer.encode
        said, asked = encode(self.text), (*(words for _, words in wanted.turns), wanted.text)
        if most and len(said) > most:
            said, self.finish = said[:most], "length"
            self.text = mind.tokenizer.decode(said).rstrip("\ufffd")
        count = sum(len(encode(words)) for words in asked)
        self.usage = {"prompt_tokens": count, "completion_tokens": len(said),
                      "total_tokens": count + len(said)}

    def _pieces(self, mind: Mind, most: int) -> Iterator[str]:
        """Yield free text, or a reply, which is remembered only where it is learned from."""
        organism, wanted = self.organism, self.wanted

        def turn(*about: Any) -> Turn:
            self.turn = Visit(wanted, self.rng, *about)
            return self.turn
        if self.learns and wanted.chat:
            session = organism.memory.session_id(wanted.session or UNNAMED)
            yield from organism.reply(wanted.text, session, turn)
            return
        with organism.trainer.paused():
            if wanted.chat:
                yield from turn(organism.memory, mind, wanted.text, NO_SESSION).answer()
                return
            config = wanted.tuned(mind.config)
            ids = [END_OF_TEXT, *mind.tokenizer.encode(wanted.text)][-config.block_size:]
            yield from spoken(mind.model, mind.tokenizer, ids, config, self.rng, mind.mixture(),
                              free_tokens=min(most, MOST_FREE_TOKENS))

    def sent(self) -> Tuple[Any, Dict[str, str]]:
        """Return the body and the headers of the response: an object of the API, or a stream.

        Beside what the API asks for it says whence a reply comes, and what statements it rests on.
        """
        chat, streams = self.wanted.chat, self.wanted.given.get("stream", False)
        kind = "chat.completion" + ".chunk" * streams if chat else "text_completion"
        always = {"id": "cmpl-" + os.urandom(12).hex(), "model": MODEL_NAME, "object": kind,
                  "created": int(self.organism.memory.clock())}
        reply = self.turn.reply if self.turn else Reply("", "voice")
        found = reply.entries or ((reply.entry,) if reply.entry else ())
        why = {"macrogpt": {"source": reply.source, "score": round(reply.score, 4),
                            "entries": [in_one_line(each.text) for each in found]}}
        usage = {"usage": self.usage}

        def part(text: str, ends: bool = False, **more: str) -> Dict[str, Any]:
            said = {"delta" if streams else "message": {**more, "content": text}} if chat else {
                "text": text}
            return {**always, "choices": [{**said, "index": 0, "logprobs": None,
                                           "finish_reason": self.finish if ends else None}]}
        if not streams:
            return {**part(self.text, True, role="assistant"), **why, **usage}, {}
        parts = [part("", role="assistant"),
                 *map(part, re.findall(r"\s*\S+\s*|\s+", self.text)), {**part("", True), **why}]
        if self.wanted.given.get("stream_options", {}).get("include_usage"):
            parts.append({**always, "choices": [], **usage})
        events = [f"data: {each}\n\n" for each in (*map(json.dumps, parts), "[DONE]")]
        return "".join(events).encode("ascii"), {"Content-Type": "text/event-stream"}


# The page: nothing in it comes from elsewhere, and what it shows is text, whatever stands in it.

CHAT_STYLE = """
:root { color-scheme: light dark; scroll-padding-bottom: 9rem }
body { font: 17px/1.5 system-ui, sans-serif; max-width: 44rem; min-height: 100dvh; margin: 0 auto;
  padding: 0 1rem; box-sizing: border-box; display: flex; flex-direction: column }
h1 { font-size: 1.2rem; margin: .8rem 0 0 } main { flex: 1; overflow-wrap: anywhere }
#log > div { margin: .7rem 0; white-space: pre-wrap } #log b { display: block }
b, details, #state { font-size: .85rem; margin: 0 }
.user { border-left: 3px solid #2a7ae2; padding-left: .7rem } .error { color: #d33 }
form { position: sticky; bottom: 0; background: Canvas; padding: .6rem 0; display: flex; gap: .5rem;
  flex-wrap: wrap; align-items: end; border-top: 1px solid #8886 }
label { flex: 1 1 14rem } #door { flex-basis: 100% }
textarea, input { display: block; width: 100%; box-sizing: border-box }
textarea, input, button { font: inherit; padding: .4rem }
"""

CHAT_SCRIPT = """
const byId = id => document.getElementById(id), log = byId("log"), text = byId("text");
const session = "page " + Date.now().toString(36), messages = [];
const add = (parent, kind, textContent, className = "") => parent.appendChild(
  Object.assign(document.createElement(kind), {textContent, className}));
async function ask(path, options) {
  const answer = await fetch(path, {...options, headers: {"Content-Type": "application/json",
    "X-Session": session, "Authorization": "Bearer " + sessionStorage.getItem("token")}});
  const shut = answer.status == 401, appears = shut && byId("door").hidden;
  byId("door").hidden = !shut;
  if (appears) byId("token").focus();
  if (!answer.ok) throw Error((await answer.json()).error.message);
  return answer;
}
function tellWhy(item, why) {
  const box = add(item, "details", "");
  const match = why.score ? ", match " + Math.round(why.score * 100) + " %" : "";
  add(box, "summary", "Why: " + why.source + match);
  add(box, "div", why.entries.map(entry => "“" + entry + "”").join("\\n")
    || "No statement moved it.");
}
async function send(words) {
  const mine = add(log, "div", "", "user"), item = add(log, "div", "");
  add(mine, "b", "You");
  add(mine, "span", words);
  add(item, "b", "macrogpt");
  const span = add(item, "span", "");
  messages.push({role: "user", content: words});
  try {
    const answer = await ask("/v1/chat/completions", {method: "POST",
      body: JSON.stringify({messages: messages.slice(-40)})});
    const reply = await answer.json();
    span.textContent = reply.choices[0].message.content;
    tellWhy(item, reply.macrogpt);
  } catch (error) { add(item, "span", error.message, "error"); }
  messages.push({role: "assistant", content: span.textContent});
  item.scrollIntoView({block: "end"});
}
async function look() {
  try {
    const now = await (await ask("/status")).json();
    const share = now.phase == "learning" ? " " + Math.round(now.share * 100) + " %" : "";
    byId("state").textContent = [now.phase + share, "generation " + now.generation,
      "step " + now.step,
      now.bpc === null ? now.age : now.bpc.toFixed(2) + " bits per character",
      now.learns ? "it learns from this page" : "nothing said here is kept"].join(" · ");
  } catch (error) { byId("state").textContent = error.message; }
  setTimeout(look, 2000);
}
byId("form").addEventListener("submit", async event => {
  event.preventDefault();
  if (!text.value.trim() || log.ariaBusy == "true") return;
  const words = text.value;
  text.value = "";
  text.focus();
  log.ariaBusy = "true";
  await send(words);
  log.ariaBusy = "false";
});
text.addEventListener("keydown", event => {
  if (event.key != "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("form").requestSubmit();
});
byId("token").addEventListener("change", event =>
  sessionStorage.setItem("token", event.target.value));
look();
"""

CHAT_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>macrogpt</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>""" + CHAT_STYLE + """</style></head>
<body><header><h1>macrogpt</h1><p id="state">…</p></header><main>
<div id="log" role="log" aria-live="polite" aria-label="The talk"></div></main><form id="form">
<label id="door" hidden>Token<input id="token" type="password" autocomplete="off"></label>
<label>What you say<textarea id="text" rows="2" autofocus></textarea>
</label><button>Send</button></form><script>""" + CHAT_SCRIPT + """</script></body></html>
"""


CHAT_HEADERS = {  # by which a browser runs nothing but what stands in the page
    "Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": (
        "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'").format(*(
            base64.b64encode(hashlib.sha256(part.encode()).digest()).decode("ascii")
            for part in (CHAT_SCRIPT, CHAT_STYLE)))}


def response(status: int, body: Any, headers: Dict[str, str]) -> bytes:
    """Return a response as bytes; its body is JSON unless it is bytes."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode("ascii")
    headers = {"Content-Type": "application/json", **headers, "Content-Length": str(len(raw)),
               "Connection": "close", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
               "X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
    lines = [f"HTTP/1.1 {status} {'OK' if status == 200 else 'Refused'}",
             *(f"{name}: {value}" for name, value in headers.items()), "\r\n"]
    return "\r\n".join(lines).encode("latin-1") + raw


class Server:
    """Serves one organism to many clients, until `ended` is set, to the number of a signal."""

    def __init__(self, organism: Organism, token: Optional[str], learns: bool,
                 tell: Callable[[str], None]) -> None:
        self.organism, self.token, self.learns, self.tell = organism, token, learns, tell
        self.ended: Optional[int] = None
        self._open: Set[Any] = set()  # tasks, one a connection
        self._numbers = itertools.count()

    async def serve(self, host: str, port: int) -> int:
        """Serve until it is ended; return by which signal.  Raises MacroGPTError."""
        self.host, self._mouth = host, asyncio.Lock()
        try:
            server = await asyncio.start_server(self._connected, host, port, backlog=256,
                                                limit=MOST_HEAD_BYTES)
        except (OSError, ValueError) as error:
            raise MacroGPTError(f"nothing can be served at {host} port {port} ({error}); choose "
                                "another --port, or an address of this machine") from None
        for name, at, *_ in (each.getsockname() for each in server.sockets):
            self.tell(f"serving at http://{f'[{name}]' if ':' in name else name}:{at}/")
        while self.ended is None:
            while self.organism.notices:
                self.tell(self.organism.notices.popleft())
            await asyncio.sleep(0.1)
        server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        return self.ended

    async def _connected(self, reader: Any, writer: Any) -> None:
        """Serve the one request of a connection."""
        task = asyncio.current_task()
        self._open.add(task)
        writer.transport.set_write_buffer_limits(0)  # so that what is drained has been sent
        try:
            writer.write(response(*await self._served(reader, writer)))
            await asyncio.wait_for(writer.drain(), CLIENT_SECONDS)
            writer.write_eof()
            for _ in range(16):  # what it still sends would reset the connection
                if not await asyncio.wait_for(reader.read(65_536), 0.5):
                    break
        except (OSError, EOFError, asyncio.TimeoutError, asyncio.CancelledError):
            writer.transport.abort()  # it hung up, or takes nothing, or all ends
        finally:
            self._open.discard(task)
            writer.close()

    async def _served(self, reader: Any, writer: Any) -> Tuple[int, Any, Dict[str, str]]:
        """Return what answers a request: a status, a body, headers of its own."""
        try:
            if len(self._open) > MOST_CONNECTIONS:
                raise Refused(503, "there are too many connections", Retry_After="1")
            headers = parse_head(await self._in_time(reader.readuntil(b"\r\n\r\n")))
            size = self._admitted(headers, writer.get_extra_info("sockname"))
            body = await self._in_time(reader.readexactly(size))
            return (200, *await self._answer(headers, body, reader))
        except (OSError, EOFError):
            raise
        except Exception as error:
            if os.environ.get("MACROGPT_DEBUG") and not isinstance(error, Refused):
                traceback.print_exc()
            refusal = error if isinstance(error, Refused) else Refused(
                503 if isinstance(error, StoreError) else 500, str(as_told(error)))
            return refusal.status, refusal.body, refusal.headers

    async def _in_time(self, reading: Any) -> bytes:
        """Return what is read.  Raises Refused where it does not come, or not to an end."""
        try:
            return bytes(await asyncio.wait_for(reading, CLIENT_SECONDS))
        except asyncio.TimeoutError:
            raise Refused(408, f"it did not come within {CLIENT_SECONDS:g} s") from None
        except asyncio.LimitOverrunError:
            raise Refused(431, f"a head has at most {MOST_HEAD_BYTES:,} bytes") from None

    def _admitted(self, headers: Dict[str, str], at: Any) -> int:
        """Return the bytes that follow the head of a request of the owner's.  Raises Refused."""
        get, method, path = headers.get, headers[":method"], headers[":path"]
        own = {f"[{name}]" if ":" in name else name.lower()
               for name in ("localhost", "127.0.0.1", "::1", self.host, at[0])}
        if get("host", "").lower() not in {f"{name}:{at[1]}" for name in own} | (
                own if at[1] == 80 else set()):
            raise Refused(421, "the Host header names another place than this server")
        if get("origin") not in (None, f"http://{get('host')}"):
            raise Refused(403, "a page from elsewhere may not ask here")
        if path not in ROUTES:
            raise Refused(404, f"{path[:80]} is not there", code="not_found")
        if method != ROUTES[path]:
            raise Refused(405, f"{path} takes {ROUTES[path]}", Allow=ROUTES[path])
        given = get("authorization", "").encode("latin-1")
        if self.token and path != "/" and not hmac.compare_digest(
                given, f"Bearer {self.token}".encode("ascii")):
            raise Refused(401, "the token is missing or wrong", code="invalid_api_key",
                          WWW_Authenticate="Bearer")
        kind, size = get("content-type", "").partition(";")[0], get("content-length", "0")
        if method == "POST" and kind.strip().lower() != "application/json":
            raise Refused(415, "send JSON, as application/json")
        if "transfer-encoding" in headers or not re.fullmatch("[0-9]{1,18}", size):
            raise Refused(411, "send the body in one piece, with a Content-Length")
        if int(size) > MOST_BODY_BYTES:
            raise Refused(413, f"a body has at most {MOST_BODY_BYTES:,} bytes")
        return int(size)

    async def _answer(self, headers: Dict[str, str], body: bytes,
                      reader: Any) -> Tuple[Any, Dict[str, str]]:
        """Return what is at a path: its body, and headers of its own."""
        path, trainer = headers[":path"], self.organism.trainer
        if path == "/":
            return CHAT_PAGE.encode(), CHAT_HEADERS
        if path == "/v1/models":
            return {"object": "list", "data": [{"id": MODEL_NAME, "object": "model", "created": 0,
                                                "owned_by": "its owner"}]}, {}
        if path == "/status":
            growth = await asyncio.to_thread(lambda: self.organism.growth)  # the store may be busy
            return {"phase": trainer.phase.value, "age": growth.phase, "step": growth.step,
                    "generation": growth.generation, "bpc": growth.bpc, "learns": self.learns,
                    "share": trainer.progress.get("share")}, {}
        session = headers.get("x-session", "").encode("latin-1").decode("utf-8", "replace")
        try:
            wanted = wanted_of(json.loads(body), "chat" in path, session)
        except (ValueError, RecursionError):
            raise Refused(400, "the body is no JSON") from None
        return await self._replied(wanted, reader)

    async def _replied(self, wanted: Wanted, reader: Any) -> Tuple[Any, Dict[str, str]]:
        """Return an answer, made when its turn comes; whoever hangs up ends it."""
        answer = Answer(self.organism, wanted, self.learns, next(self._numbers))

        async def made() -> None:
            async with self._mouth:
                if not answer.gone.is_set():
                    await asyncio.to_thread(answer.make)
        work = asyncio.ensure_future(made())
        try:
            while not (await asyncio.wait({work}, timeout=0.1))[0]:
                if reader.at_eof():
                    raise EOFError
        finally:
            answer.gone.set()
        work.result()
        return answer.sent()


# ──────────────────────────────────────────────────────────────────────────────────────
# 19 · INTERFACE — it alone speaks to a terminal   uses: 0 1 2 4 7 9 10 11 12 13 14 16 17 18
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Replies and reports go to stdout; everything else goes to stderr. A table of commands, each a
# function of an App; an owner's mistake is one line and an exit code.


def width_of(text: str) -> int:
    """Return how many columns a text takes: signs of East Asia take two, marks none."""
    return sum(0 if unicodedata.combining(sign) or unicodedata.category(sign) in ("Mn", "Me", "Cf")
               else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def folded(line: str, columns: int, at: int = 0) -> str:
    """Return a line broken at words where it would pass the last column, it beginning at one."""
    if not columns or at + width_of(line) <= columns:
        return line
    parts, indent = re.findall(r"\s*\S+|\s+", line), min(4, columns // 4)
    for number, part in enumerate(parts):
        if at and at + width_of(part) > columns:
            part = "\n" + " " * indent + part.lstrip()
            at, parts[number] = 0, part
        at += width_of(part.strip("\n"))
    return "".join(parts)


def terminal_size() -> Tuple[int, int]:
    """Return columns and lines of the terminal; 80 and 24, as later Pythons say, if it has none."""
    columns, lines = shutil.get_terminal_size()
    return columns or 80, lines or 24


STATUS_SECONDS = 10.0  # between two lines of status
PLOTTED = str.maketrans("▁▂▃▄▅▆▇█·→–—»…", "_.,-=+*#.>---.")  # where a locale knows no other signs


class Terminal:
    """The two streams, and what the terminal behind them can do."""

    def __init__(self, out: TextIO, err: TextIO, color: str = "auto", quiet: bool = False,
                 folds: bool = True) -> None:
        self.out, self.err, self.quiet, self._status = out, err, quiet, ""
        self.folds = folds  # lines at words; JSON is one line however long
        self._at = 0  # the column of stdout in which the next sign comes
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self.colored = color == "always" or (color == "auto" and err.isatty() and not plain)
        # a line that changes is read out again and again where a screen is not seen but heard
        self.redraws = err.isatty() and not plain and not os.environ.get("ACCESSIBLE")
        self._next_status = -math.inf  # when a line of status may come where none is redrawn

    def say(self, text: str, end: str = "\n", faint: bool = False) -> None:
        """Write to stdout at once, in a terminal broken at words."""
        clean = self.fitted(text, self.out, self._at)
        print(self.dim(clean) if faint else clean, end=end, file=self.out, flush=True)
        _, newline, last = (clean + end).rpartition("\n")
        self._at = width_of(last) + (0 if newline else self._at)

    def drawn(self, text: str) -> str:
        """Return a text without what would steer a terminal, its plots as the locale asks."""
        names = (os.environ.get(name) for name in ("LC_ALL", "LC_CTYPE", "LANG"))
        encoding = next(filter(None, names), "utf").lower()
        clean = tidied(text)
        return clean if "utf" in encoding else clean.translate(PLOTTED)

    def fitted(self, text: str, stream: TextIO, at: int = 0) -> str:
        """Return a text as the terminal behind a stream can show it, beginning in a column."""
        first, *others = self.drawn(text).split("\n")
        columns = terminal_size()[0] if self.folds and stream.isatty() else 0
        return "\n".join([folded(first, columns, at), *(folded(line, columns) for line in others)])

    def note(self, text: str) -> None:
        """Write a notice to stderr, unless quiet."""
        if not self.quiet:
            self._tell(self.dim(self.fitted(text, self.err)))

    def _tell(self, text: str, end: str = "\n") -> None:
        with contextlib.suppress(OSError):  # a full disk behind stderr spoils no reply
            print(text, end=end, file=self.err, flush=True)

    def dim(self, text: str) -> str:
        """Return the text, dimmed where colors are shown."""
        return f"\033[2m{text}\033[0m" if self.colored else text

    def page(self, lines: Iterable[str]) -> None:
        """Say the lines; what a terminal cannot hold at once goes through the owner's pager."""
        text = self.fitted("\n".join(lines), self.out)
        if self.folds and self.out.isatty() and text.count("\n") + 2 > terminal_size()[1]:
            import pydoc  # 30 ms that no other start should pay
            pydoc.pager(text)
        elif text:
            self.say(text)

    def status(self, text: str, above: bool = False) -> None:
        """Show a line that the next one replaces, here or above the prompt.

        Where a terminal cannot redraw, or should not, it is a line every ten seconds.
        """
        if self.quiet or not self.err.isatty() or text == self._status:
            return
        shown = self.drawn(text)[:terminal_size()[0] - 1]
        if self.redraws:  # save the cursor, go up a row; clear to the end; back again
            start, end = ("\0337\033[A\r", "\033[K\0338") if above else ("\r", "\033[K")
            self._tell(start + self.dim(shown) + end, "")
            self._status = text
        elif time.monotonic() > self._next_status:
            self._tell(shown)
            self._next_status = time.monotonic() + STATUS_SECONDS

    def clear_line(self) -> None:
        """Take away what stands in the row of the cursor."""
        self._tell("\r\033[K", "")

    def prompt(self, typed: str) -> None:
        """Show the prompt again, with what was typed behind it."""
        self.out.write(PROMPT + typed)
        self.out.flush()

    def end_status(self) -> None:
        """End the line of status, if there is one."""
        if self._status:
            self._status = ""
            self._tell("")

    def tell_error(self, error: BaseException) -> int:
        """Write one line about an error to stderr; return its exit code."""
        line = " ".join(tidied(str(error)).split()) or type(error).__name__
        self._tell(f"macrogpt: {line}")
        return getattr(error, "exit_code", 1)


ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                       if hasattr(signal, name))


class Terminated(BaseException):
    """The process was asked to end by a signal."""


def _raise_terminated(number: int, frame: Any) -> None:
    raise Terminated(number)


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 5 min 03 s, 2 h 05 min."""
    minutes, rest = divmod(int(seconds), 60)
    return (f"{rest} s" if not minutes else f"{minutes} min {rest:02} s" if minutes < 60 else
            f"{minutes // 60} h {minutes % 60:02} min")


AGES = {"newborn": "newborn", "warmup": "being born", "grown": "grown up"}
STRETCHES = {**AGES, "grown": "learning", "rebirth": "being born anew"}  # of learning


class App:
    """One run of the program: its options, its terminal, and the organism once it is needed."""

    def __init__(self, options: argparse.Namespace, config: Config, terminal: Terminal) -> None:
        self.options, self.config, self.terminal = options, config, terminal
        self._organism: Optional[Organism] = None
        self._memory: Optional[Memory] = None
        self.kept = ""  # where a damaged store is, in whose place another stands
        self._began = (0.0, 1.0, 1.0)  # when a stretch began, at which share, and its last share
        self.on_list: Callable[[], None] = lambda: None  # called before completions are shown

    def memory(self) -> Memory:
        """Return the store, opened at its first use; a report makes none: it is of a newborn."""
        if self._memory is None:
            path, command = self.config.db_path, COMMANDS[self.options.command]
            empty = not os.path.exists(path) or os.path.isfile(path) and not os.path.getsize(path)
            if command.reports and empty and os.path.isdir(os.path.dirname(os.path.abspath(path))):
                path = ":memory:"
            self._memory = Memory(path, writable=not command.reports or not {
                *command.changes}.isdisjoint(self.options.words[:1]))
        return self._memory

    def organism(self) -> Organism:
        """Return the organism, brought to life at its first use."""
        if self._organism is None:
            memory = self.memory()
            self.config = stored_config(memory, self.options.assignments, self.terminal.note)
            engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""))
            keep_freed_memory(False)
            wanted = Shape.of(self.config)
            shape = stored_shape(memory)
            self.config = dataclasses.replace(self.config, **shape)
            last = memory.last_session() if self.options.command == "chat" else "main"
            self._organism = Organism(self.config, memory, engine, self.options.session or last,
                                      self.options.seed is not None)
            if shape and wanted != Shape(**shape):
                self._ask_for(wanted)
        return self._organism

    def in_sound_store(self, work: Callable[[], Any]) -> Any:
        """Return what work does; where the store is damaged, with what of it can be read."""
        try:
            return work()
        except StoreDamaged:
            if self.kept or COMMANDS[self.options.command].reports:
                raise
            self._renew_store()
            return work()

    def _renew_store(self) -> None:
        """Go on in a store of what can be read; the damaged one is kept beside it."""
        awake = self._organism is not None and self._organism.speaker.background
        with contextlib.suppress(StoreError):
            self.close()
        path, self._organism, self._memory = self.config.db_path, None, None
        self.kept, rows = renew_damaged(path)
        self.terminal.note(f"{path} was damaged: what can be read ({rows['messages']} messages, "
                           f"{rows['entries']} entries) is in it now; as it was it is {self.kept}")
        if awake:
            wake(self)

    def _ask_for(self, wanted: Shape) -> None:
        """Have a generation of another size born, with the commands that learn."""
        organism, now = self.organism(), dataclasses.asdict(Shape.of(self.config))
        name, size = next((n, v) for n, v in dataclasses.asdict(wanted).items() if now[n] != v)
        if self.options.command not in ("chat", "ask", "train"):
            raise ConfigError(f"{name}={size}, but the organism in {self.config.db_path} has "
                              f"{name}={now[name]}; it is born anew in another size with chat, ask "
                              f"or train, or begin another with --db")
        organism.ask_for_shape(wanted)

    def close(self) -> None:
        """Put everything to rest; what was learned and said is committed."""
        try:
            if self._organism is not None:
                self._organism.sleep()
        finally:
            if self._memory is not None:
                self._memory.close()

    def report(self, facts: Dict[str, Any], lines: Iterable[str]) -> None:
        """Say the facts as one JSON object, or the lines for people."""
        if self._memory is not None and self._memory.path != self.config.db_path:
            self.terminal.note(f"there is no memory in {self.config.db_path} yet: this would be a "
                               "newborn's")
        self.terminal.page([json.dumps(facts, ensure_ascii=False)] if self.options.json else lines)

    def notices(self) -> None:
        """Show what the background wanted to tell."""
        organism = self._organism  # there is none where a damaged store could not be renewed
        while organism is not None and organism.notices:
            self.terminal.note(organism.notices.popleft())

    def show_progress(self, above: bool = False) -> None:
        """Show what is learned, how far, held-out bits per character, pace and time left."""
        p = self._organism.trainer.progress if self._organism else {}
        if not p:
            return
        now, share, (began, first, last) = time.monotonic(), p["share"], self._began
        if share < last:  # a new stretch of work
            began, first = now, share
        self._began = (began, first, share)
        gained, took = share - first, now - began
        left = f"  {duration(took / gained * (1 - share))} left" if gained else ""
        left = "  measuring what it learned" if share > 0.99 else left
        bits = "" if p["bpc"] is None else f"  {p['bpc']:.3f} bits/char"
        self.terminal.status(
            f"{STRETCHES[p['phase']]} {'█' * int(share * 12):·<12} {share:4.0%}  "
            f"step {p['step']}{bits}  {p['tokens_per_s']:.0f} tokens/s{left}", above)


def stored_config(memory: Memory, assignments: Sequence[str],
                  tell: Callable[[str], None]) -> Config:
    """Return the defaults, changed by what /set stored, by the organism's shape, by assignments.

    What was stored and cannot be used is told, and left out.
    """
    shape = stored_shape(memory)
    if shape and shape["n_ff"] == usual_ff_width(shape["n_embd"]):
        shape["n_ff"] = 0  # it goes on following n_embd
    config = Config()
    kept = {name: v for name, v in memory.settings("config.").items() if v is not None}
    for name, value in {**kept, **shape}.items():
        try:
            config = config.replace([f"{name}={value}"])
        except ConfigError as error:  # of another version, or damaged
            tell(f"a kept setting is left out: {error} (/set {name} default forgets it)")
    return config.replace(assignments)


def wake(app: App, learns: bool = True) -> Organism:
    """Return the organism with its corpus read and, unless forbidden, its trainer started."""
    organism = app.organism()
    organism.watcher.prepare()
    if app.options.no_train or not learns:
        organism.take_in_corpus()
        return organism
    organism.awake()
    organism.watcher.read_once.wait(0.3)  # a huge corpus is read beside the first replies
    if app.options.wait_trained:
        organism.learn_now()
        organism.wait_trained(app.show_progress)
        app.terminal.end_status()
    return organism


LEARNING = (Phase.RAISING, Phase.LEARNING)


def bind_key(key: str, what: str) -> None:
    """Let a key do something in the line that is typed, where readline is there."""
    readline = sys.modules.get("readline")
    if readline is not None and "libedit" not in (readline.__doc__ or ""):
        readline.parse_and_bind(f'"\\{key}": {what}')


def typed_line() -> str:
    """Return what stands behind the prompt, or stood there when Ctrl+C came."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


def is_typing() -> bool:
    """Return whether a line is being typed; what is not typed in is taken in as whole lines."""
    import termios
    try:
        return not termios.tcgetattr(sys.stdin)[3] & termios.ICANON
    except termios.error:  # the terminal is gone
        return False


class LearningLine:
    """The line above the prompt that says how far learning has come, true also while one types."""

    def __init__(self, app: App) -> None:
        self.app, self.organism = app, app.organism()
        # of the terminal in which it stands; 0 at a prompt without it, None where no prompt is
        self._width: Optional[int] = None
        if "readline" not in sys.modules or not hasattr(signal, "SIGTSTP"):
            return
        signal.signal(signal.SIGTSTP, self.pause)
        if app.terminal.redraws:
            with contextlib.suppress(RuntimeError):  # no thread: the line stays as it was
                threading.Thread(target=self._follow, daemon=True).start()

    def place(self) -> None:
        """Show notices, and the line if something is being learned, before a prompt comes below."""
        self.organism = self.app._organism or self.organism  # it is another in a renewed store
        self.app.notices()
        self._width = 0
        if self.organism.trainer.phase in LEARNING:
            if self.organism.trainer.progress:
                self.app.show_progress()
            else:
                self.app.terminal.status("getting ready to learn")
            self.app.terminal.end_status()
            self._width = terminal_size()[0]
            bind_key("C-l", "redraw-current-line")  # a cleared screen has no row above the prompt

    def leave(self) -> None:
        """Let the line be: what stands below it now is no prompt of one row."""
        self._width = None
        bind_key("C-l", "clear-screen")

    def _follow(self) -> None:
        """Keep the line true; begin one when learning does; in the end it is what came of it."""
        terminal = self.app.terminal
        while True:
            changed = self.organism.trainer.changed
            with changed:
                changed.wait(1.0)
            trainer, notices, typed = self.organism.trainer, self.organism.notices, typed_line()
            learns = trainer.phase in LEARNING
            width = self._width
            if width is None or not is_typing():
                continue
            if not width:
                if not typed and (learns or notices):
                    terminal.clear_line()
                    self.place()
                    terminal.prompt("")
            elif (width != terminal_size()[0] or "\n" in typed
                  or width_of(PROMPT + typed) >= width):
                continue  # it is not one row above the cursor
            elif learns:
                self.app.show_progress(above=True)
            elif notices:
                terminal.status(notices.popleft(), above=True)
                self._width = 0

    def pause(self, *_: Any) -> None:
        """Stop, as Ctrl+Z asks; then bring back the terminal, the prompt, and what was typed."""
        import termios
        modes, typing = termios.tcgetattr(sys.stdin), is_typing()
        self.leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)  # which stops none whom nobody could resume
        signal.raise_signal(signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self.pause)
        if typing:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, modes)
            self.app.terminal.prompt(typed_line())


# The chat: in a terminal a prompt and a streamed reply, in a pipe one line for one line.

LONGEST_MESSAGE = 1_000_000  # characters; what goes on beyond is cut


def command_chat(app: App, words: List[str]) -> int:
    """Talk: a prompt in a terminal, one line for one line in a pipe."""
    return (_chat_terminal if sys.stdin and sys.stdin.isatty() else _chat_piped)(app)


def _piped_line(stream: BinaryIO) -> str:
    """Return the next line of a stream, or what a message can hold of it.  Raises EOFError."""
    most = 4 * LONGEST_MESSAGE
    raw = rest = stream.readline(most)
    if not raw:
        raise EOFError
    while len(rest) == most and not rest.endswith(b"\n"):
        rest = stream.readline(most)
    return clean_line(decode_line(raw), LONGEST_MESSAGE)


def _chat_piped(app: App) -> int:
    """Answer each line of stdin with exactly one line; a command gives one line or none."""
    wake(app)
    tell_due(app)
    code, stream = 0, sys.stdin.buffer if sys.stdin else io.BytesIO()
    while True:
        try:
            command, line = read_message(lambda prompt: _piped_line(stream))
            said = app.in_sound_store(lambda: _whole_answer(app, command, line))
            if said or not command:
                app.terminal.say(" ".join(said.split()))
            app.notices()
        except EOFError:
            break
        except MacroGPTError as error:  # only words that could not be kept spoil the end
            code = max(code, int(isinstance(error, StoreError)))
            app.terminal.tell_error(error)
            app.terminal.say("")
    learns_no_more = app.options.wait_trained and app._organism is not None and (
        app._organism.trainer.phase is Phase.FAILED)
    return max(code, int(learns_no_more))


def _whole_answer(app: App, command: bool, line: str) -> str:
    """Return what a command or a reply says; where asked, all is learned before it and after."""
    def settled() -> None:
        with contextlib.suppress(TrainerError):  # that it learns no more was told; it speaks on
            if app.options.wait_trained:
                app.organism().wait_rest()
    settled()  # edits made before these words come before them
    said = " ".join(repl_command(app, line)) if command else _whole_reply(app, line)
    settled()
    return said


def tell_due(app: App) -> None:
    """Say what was told for today, if the owner wants that."""
    said = due(app.memory()) if app.config.due else ""
    if said:
        app.terminal.note(said)


def _chat_terminal(app: App) -> int:
    """Read, reply, and stream, until the owner leaves."""
    keep = prepare_readline(app)
    wake(app)
    app.terminal.note(banner(app))
    tell_due(app)
    learning, interrupted = LearningLine(app), -math.inf
    app.on_list = learning.leave

    def next_line(prompt: str) -> str:
        if prompt != PROMPT:  # within a block the row above holds what was typed
            learning.leave()
        return input(prompt)
    while True:
        learning.place()
        try:
            command, line = read_message(next_line)
        except EOFError:
            app.terminal.err.write("\n")
            return 0
        except KeyboardInterrupt:
            app.terminal.err.write("\n")
            if time.monotonic() - interrupted < 2.0 and not typed_line():
                return 130
            interrupted = time.monotonic()
            app.terminal.note("Ctrl+C again, Ctrl+D or /exit leaves.")
            continue
        finally:
            learning.leave()
        interrupted = -math.inf
        keep()
        try:
            if command:
                app.terminal.page(repl_command(app, line))
            elif line.casefold() in ("exit", "quit"):
                app.terminal.note(f"/{line.casefold()} or Ctrl+D leaves")
            elif line:
                app.in_sound_store(lambda: _stream_reply(app, line))
        except EOFError:
            return 0
        except MacroGPTError as error:
            app.terminal.tell_error(error)


def banner(app: App) -> str:
    """Return what a chat begins with: who it is, how old, what it knows, and what it does."""
    organism, memory = app.organism(), app.memory()
    talks = {session["name"]: session for session in memory.sessions()}
    began = min((talk["started_at"] for talk in talks.values()), default=time.time())
    days, told = int((time.time() - began) / 86400), memory.counts()["told"]
    goes_on = talks.get(organism.session, {}).get("messages")
    parts = [AGES[organism.growth.phase], counted(days, "day") + " old" if days else "born today",
             counted(told, "statement") + " told",
             f"{'going on in' if goes_on else 'in'} session {organism.session}",
             f"{model_size(organism)[0]:,} parameters",
             f"{organism.speaker.engine.name} engine", *["--no-train"] * app.options.no_train]
    return f"macrogpt {__version__} — {' · '.join(parts)}. /help for commands."


def counted(number: int, thing: str) -> str:
    """Return how many of a thing there are: 1 day, 2 days."""
    return f"{number:,} {thing}{'s' * (number != 1)}"


def _whole_reply(app: App, line: str) -> str:
    """Return the reply to a line, or with --json an object that says where it came from as well."""
    said = "".join(app.organism().reply(line))
    turn = app.organism().speaker.turn
    return reply_object(said, turn.reply, turn.seconds) if app.options.json and turn else said


def reply_object(said: str, reply: Reply, seconds: float) -> str:
    """Return what was said as a JSON object, with where it came from."""
    found = reply.entries or ((reply.entry,) if reply.entry else ())
    return json.dumps({
        "reply": " ".join(said.split()), "source": reply.source,
        "entries": [{"id": entry.id, "text": in_one_line(entry.text)} for entry in found],
        "score": round(reply.score, 4), "seconds": round(seconds, 4)}, ensure_ascii=False)


def _stream_reply(app: App, line: str) -> None:
    """Show the reply as it comes; Ctrl+C stops it, and what was said so far is kept."""
    pieces = app.organism().reply(line)
    try:
        app.terminal.say("  »", " ", faint=True)
        for piece in pieces:
            app.terminal.say(piece, end="")
    except KeyboardInterrupt:
        app.terminal.say(" …", end="")
    finally:
        pieces.close()  # type: ignore[attr-defined]
        app.terminal.say("")
        turn = app.organism().speaker.turn
        if turn and turn.forgotten:
            forget_typed(turn.forgotten)


PROMPT, QUOTES = "you> ", '"""'


def read_message(next_line: Callable[[str], str]) -> Tuple[bool, str]:
    """Return whether the next message is a command, and its words, without the slash.

    What stands between three quotes and three quotes is one message and never a command, nor is
    what begins with two slashes: //tmp is full says /tmp is full.
    next_line takes a prompt, and raises EOFError.
    """
    line = tidied(next_line(PROMPT).strip())
    if line.startswith("/"):
        return not line.startswith("//"), line[1:]
    if not line.startswith(QUOTES):
        return False, line
    text, rest = "", line[len(QUOTES):]
    try:
        while not rest.endswith(QUOTES):
            text += f"{rest}\n" if len(text) < LONGEST_MESSAGE else ""
            rest = tidied(next_line("...> ").rstrip())
        text += rest[:-len(QUOTES)]
    except EOFError:
        if not agreed("\nsay what stands there so far?"):
            return False, ""
    return False, text.strip()


def agreed(question: str) -> bool:
    """Return whether the owner says yes; where nobody can be asked, what was wished is done."""
    return not (sys.stdin and sys.stdin.isatty()) or input(
        f"{question} [y/N] ").strip().lower() in ("y", "yes")


HISTORY = "~/.macrogpt_history"


def forget_typed(words: AbstractSet[str]) -> None:
    """Take the lines with any of the words out of what was typed, here and in the history file.

    The file is filtered as it is: other chats write there, too, and this one may keep none.
    """
    def stays(line: str) -> bool:
        return not line.startswith("/forget") and words.isdisjoint(folded_words(line))
    readline, path = sys.modules.get("readline"), os.path.expanduser(HISTORY)
    if readline is not None:
        for at in range(readline.get_current_history_length(), 0, -1):
            if not stays(readline.get_history_item(at) or ""):
                readline.remove_history_item(at - 1)
    if os.path.isfile(path):
        with contextlib.suppress(OSError), open(path, "r+", encoding="utf-8",
                                                errors="surrogateescape") as file:
            kept = [line for line in file if stays(line)]
            file.seek(0)
            file.writelines(kept)
            file.truncate()


def prepare_readline(app: App) -> Callable[[], None]:
    """Give the prompt arrow keys, completion and a private history; return what keeps a line."""
    try:
        import readline
    except ImportError:
        return lambda: None
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else
                            "tab: complete")
    if os.environ.get("TERM") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")  # what is pasted is one message
    readline.set_completer_delims(" ")
    readline.set_completer(lambda text, number: next(itertools.islice(
        completions(app, readline.get_line_buffer(), text), number, None), None))
    path = os.path.expanduser(HISTORY)
    if os.environ.get("MACROGPT_NOHISTORY"):
        return lambda: None
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        if not os.path.isfile(path):  # reading a FIFO would never end
            raise OSError
        os.chmod(path, 0o600)
        readline.set_history_length(1000)
        readline.read_history_file(path)
        readline.write_history_file(path)
    except OSError:
        app.terminal.note(f"the history file {path} cannot be used; this chat keeps none")
        return lambda: None

    def keep() -> None:
        with contextlib.suppress(OSError, AttributeError):
            readline.append_history_file(1, path)  # other chats write there, too
    return keep


def completions(app: App, line: str, text: str) -> Iterator[str]:
    """Yield what the last word may become: a command, a setting, a session, a file."""
    app.on_list()
    command, space, _ = line.lstrip().partition(" ")
    names: List[str] = []
    if not space:
        names = [f"/{name} " for name in sorted(REPL_COMMANDS)] if text.startswith("/") else []
    elif command in ("/set", "/show"):
        names = [f.name for f in dataclasses.fields(Config)]
    elif command in ("/session", "/new"):
        names = app.memory().session_names()
    elif command == "/save":
        folder = os.path.dirname(text)
        with contextlib.suppress(OSError):
            names = [os.path.join(folder, name) for name in sorted(os.listdir(folder or "."))]
    return (name for name in names if name.startswith(text))


def model_size(organism: Organism) -> Tuple[int, int]:
    """Return the counts of parameters and of vocabulary, of the model to be born if need be."""
    manifests, shape = organism.memory.manifests(), Shape.of(organism.config)
    if "base" in manifests:
        parts = [manifests[name] for name in ("base", *delta_names(manifests))]
        return (sum(rows * dim for part in parts for _, rows, dim in part),
                next(rows for name, rows, _ in manifests["base"] if name == "embedding"))
    dim, hidden = shape.n_embd, shape.n_ff
    return FIRST_MERGE * dim + shape.n_layer * (4 * dim * dim + 3 * dim * hidden) + 1, FIRST_MERGE


def repl_command(app: App, line: str) -> List[str]:
    """Return the lines that a command says, given without its slash.  Raises EOFError to leave."""
    name, _, rest = line.partition(" ")
    if name not in REPL_COMMANDS:
        hint = _nearest_hint(name, list(REPL_COMMANDS))
        return [f"there is no command /{name}; {hint}".replace("known are", "there are")]
    action, words, _ = REPL_COMMANDS[name]
    if not rest.strip() and words[:1] not in ("", "["):
        return [f"it needs words: /{name} {words}"]
    return action(app, rest.strip())


def _repl_help(app: App, rest: str) -> List[str]:
    return [f"{f'/{name} {words}':18} {text}"
            for name, (_, words, text) in REPL_COMMANDS.items() if text]


def _repl_exit(app: App, rest: str) -> List[str]:
    raise EOFError


SHORT_CHARS, MOST_SHOWN, MOST_FOUND = 160, 10, 100  # of an entry in a list; entries
TOLD_ENTRIES = "e.source != 'corpus' AND e.recall"


def _repl_memory(app: App, rest: str) -> List[str]:
    memory = app.memory()
    found = search(memory, rest, MOST_FOUND) if rest else memory.entries(TOLD_ENTRIES)[::-1]
    found.sort(key=lambda entry: entry.source == "corpus")
    lines = [clean_line(_entry_line(entry), SHORT_CHARS) for entry in found[:MOST_SHOWN]]
    if len(found) > MOST_SHOWN:
        lines.append(f"and {len(found) - MOST_SHOWN} more; /memory TEXT looks for some")
    return lines or [f"the memory holds nothing about {rest!r}" if rest else
                     "nothing has been told yet"]


def _repl_again(app: App, rest: str) -> List[str]:
    turn = app.organism().speaker.turn
    if turn is None:
        return ["nothing has been said yet"]
    said = "".join(app.organism().reply(turn.text))
    same = said == turn.reply.text
    return [said, *["there is no other: that is what I was told"] * same]


def transcript(memory: Memory, session: str) -> List[str]:
    """Return the lines of a session: who said what, and when."""
    return [f"{minute_of(m.said_at)}  {'you' if m.role == 'owner' else 'macrogpt'}: "
            f"{in_one_line(m.text)}"
            for m in memory.messages_of(session)]


def _repl_save(app: App, rest: str) -> List[str]:
    """Say that everything is saved, or write the session's words into a new file."""
    if not rest:
        return ["every word is saved as it is said; learned weights are saved every "
                f"{app.config.commit_seconds:g} s and when you leave; /save FILE writes the talk"]
    lines = transcript(app.memory(), app.organism().session)
    write_new(rest, lines)
    return [f"{len(lines)} messages are in {rest}"]


def _entry_line(entry: Entry) -> str:
    days = " ".join(part.partition("..")[0] for part in entry.days.split()[1:])
    return (f"{entry.id:6}  {entry.source:8} {minute_of(entry.told_at)}  {in_one_line(entry.text)}"
            + f" (of {days})" * bool(days) + f" (after: {entry.about})" * bool(entry.about))


def _repl_why(app: App, rest: str) -> List[str]:
    turn = app.organism().speaker.turn
    if turn is None:
        return ["nothing has been said yet"]
    last = turn.reply
    if last.entry is not None:
        where = "an exchange" if last.source == "exchange" else "memory"
        return [f"it came from {where} in {turn.seconds:.2f} s, match {last.score:.2f}:",
                *map(_entry_line, last.entries or (last.entry,))]
    if last.source == "voice":
        return why_lines(turn.trace, app.organism().growth.step)
    return [f"nothing in the memory answers it, as {turn.seconds:.2f} s have shown"]


def why_lines(trace: Optional[Trace], step: int) -> List[str]:
    """Return what moved a reply: the experts' shares, token by token, the entries, the deltas."""
    if trace is None or not trace.tokens:
        return [f"the model said it by itself, at step {step}"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in trace.expert_shares().items())
    lines = [f"the voice said it, at step {step}: {shares}; by token, in nats over its likeliest "
             f"rival:"]
    tokens = []
    for said in trace.tokens:  # each with the experts that moved it by a tenth of a nat or more
        text = json.dumps(trace.tokenizer.decode([said.token]), ensure_ascii=False)
        moved = [f"{name}{x:+.1f}" for name, x in zip(EXPERTS, said.shares) if abs(x) >= 0.1]
        tokens.append(f"{text}({' '.join(moved)})")
    lines.append(" ".join(tokens))
    lines += [f"{count} tokens, {nats:.1f} nats copied from: {_entry_line(entry)}"
              for entry, count, nats in trace.entry_shares()]
    deltas = ", ".join(f"{i} {nats:+.2f}" for i, nats in enumerate(trace.delta_shares()))
    return lines + ([f"delta layers, nats a token: {deltas}"] if deltas else [])


def _repl_judge(app: App, good: bool) -> List[str]:
    if not app.organism().judge(good):
        return ["there is no reply yet to judge"]
    return ["kept as a good reply; it will be learned" if good else "noted as a bad reply"]


def _repl_teach(app: App, rest: str) -> List[str]:
    app.organism().teach(rest)
    return ["I will remember that."]


def forget(memory: Memory, wish: str, yes: bool = False) -> str:
    """Forget what an id or words mean, asking first in a terminal; say what was done."""
    number = int(wish) if re.fullmatch("[0-9]{1,18}", wish) else None
    found = [] if number is None else memory.entries("e.source != 'corpus' AND e.id = ?", number)
    found = found or meant_by(memory, wish_to_forget(wish) or wish)
    if not found:
        if number is not None and memory.entries("e.id = ?", number):
            return f"entry {wish} stands in the corpus; take its lines out of that file"
        return f"nothing that was told is {wish!r}; look for its id with memory search"
    if len(found) > 1:
        return "several are meant; forget one by its number: " + "; ".join(
            f"{entry.id} {in_one_line(entry.text)}" for entry in found[:10])
    words = in_one_line(found[0].text)
    if number is None and not yes and not agreed(f"forget {words!r}?"):
        return "it is kept"
    forget_typed(forget_told(memory, found[0]))
    return f"forgotten: {words}"


def _repl_session(app: App, rest: str) -> List[str]:
    present = app.organism().session
    if not rest:
        return [f"session {present}"]
    known = app.memory().session_names()
    name = check_session(meant_session(known, rest))
    if name not in known and not agreed(f"there is no session {name!r}; begin it?"):
        return [f"session {present}; known are {', '.join(known)}"]
    return _enter_session(app, name)


def meant_session(known: Sequence[str], name: str) -> str:
    """Return the one session that a name is the beginning of, or where there is none the name."""
    alike = [each for each in known if each.startswith(name)]
    return alike[0] if name not in known and len(alike) == 1 else name


def _enter_session(app: App, name: str) -> List[str]:
    app.organism().session = name
    app.organism().session_id()
    return [f"session {name}"]


def _repl_forget(app: App, rest: str) -> List[str]:
    said = forget(app.memory(), rest, app.options.yes)
    app.organism().trainer.text_changed()
    return [said]


def check_session(name: str) -> str:
    """Return a session's name.  Raises UsageError for one that cannot be shown in a line."""
    if not name.strip() or len(name) > 80 or not name.isprintable():
        raise UsageError(f"{name[:80]!r} cannot name a session; use 1 to 80 printable characters")
    return name


TITLE_CHARS = 40  # of what a session is about


def session_lines(sessions: List[Dict[str, Any]]) -> List[str]:
    """Return a line for each session."""
    return [f"{s['name']:20} {s['messages']:6} messages since "
            f"{time.strftime('%Y-%m-%d', time.localtime(s['started_at']))}  "
            f"{clean_line(s['title'] or '', TITLE_CHARS)}".rstrip()
            for s in sessions] or ["there is no session yet"]


def _repl_new(app: App, rest: str) -> List[str]:
    known = app.memory().session_names()
    name = check_session(rest) if rest else next(
        f"talk {n}" for n in range(1, len(known) + 2) if f"talk {n}" not in known)
    if name in known:
        return [f"there is a session {name!r} already; /session {name} goes on with it"]
    return _enter_session(app, name)


def _repl_compact(app: App, rest: str) -> List[str]:
    count, summary = app.organism().compact()
    lines = summary.splitlines()
    done = f"{count} turns were summed up, and stay in the memory" if count else (
        "no turns but the newest are left to sum up")
    return [f"{done}; the session's summary is {'now:' if lines else 'empty'}", *lines]


def _repl_set(app: App, rest: str) -> List[str]:
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if not value.strip():
        return ["use /set FIELD VALUE, for example /set temperature 0.7"]
    organism, kept = app.organism(), f"config.{name}"
    if value.strip() == "default" and (
            hasattr(organism.config, name) or organism.memory.setting(kept) is not None):
        organism.memory.set_setting(kept, None)  # one that only another version knows goes, too
        organism.config = app.config = stored_config(
            organism.memory, app.options.assignments, app.terminal.note)
        return [f"{name} is kept no more"]
    config = organism.config.replace([f"{name}={value.strip()}"])
    chain_of(config)
    if Shape.of(config) != Shape.of(organism.config):
        return [f"a model grows when it starts: leave, and begin with --set {name}={value.strip()}"]
    if name.endswith("_path"):
        return [f"{name} cannot change in a living organism; begin another with --db"]
    organism.config = app.config = config
    organism.memory.set_setting(kept, getattr(config, name))
    return [f"{name} = {getattr(config, name)!r}, kept"]


def _repl_show(app: App, rest: str) -> List[str]:
    config, known = app.organism().config, {f.name: f for f in dataclasses.fields(Config)}
    if rest and rest not in known:
        raise ConfigError(f"there is no setting {rest!r}; {_nearest_hint(rest, list(known))}")
    return [f"{f.name:24} {getattr(config, f.name)!r:24} {f.metadata['doc']}"
            for f in ([known[rest]] if rest else known.values())]


def _repl_train(app: App, rest: str) -> List[str]:
    if app.options.no_train:
        return ["this chat was started with --no-train"]
    app.organism().awake()
    app.organism().learn_now()
    return ["learning what is there; go on talking"]


def _repl_sleep(app: App, rest: str) -> List[str]:
    app.organism().sleep()
    return ["the trainer sleeps, everything is committed; /train wakes it"]


# What an event of the life log says; whatever else is in it stands behind.
EVENTS = {"corpus": "{added} documents came into the corpus, {removed} went",
          "learning": "begins to learn {fresh} of {documents} documents",
          "learned": "has read all, {lines} lines of it new, at step {step}, held-out {bpc} "
                     "bits per character",
          "phase": "generation {generation} is {phase} at step {step}",
          "rebirth": "generation {generation} begins to grow up ({why})",
          "generation": "generation {generation} takes over ({why})",
          "import": "layer {layer} of generation {generation} came from elsewhere",
          "rebirth given up": "a new generation is given up: it would read probe {probe} at "
                              "{now} bits per character, where {before} was read",
          "gate": "probe {probe} would have been read at {now} bits per character, where "
                  "{before} was read: {then}",
          "shy": "layer {layer} is called less readily, or it would do harm",
          "unlearned": "forgotten texts are unlearned: {texts}",
          "trainer died": "the trainer died: {error}", "failed": "learning has ended: {error}",
          "step skipped": "a step was skipped; its loss was {loss}"}


def life_line(event: Dict[str, Any]) -> str:
    """Return an event of the life log in words, also one of an older version."""
    rest = {name: "–" if value is None else f"{value:.3f}" if isinstance(value, float) else
            AGES.get(str(value), value) for name, value in event.items()
            if name not in ("at", "event")}
    try:
        said = EVENTS[event["event"]].format(**rest)
    except (KeyError, ValueError, TypeError):
        said = " ".join([event["event"], *(f"{name}={value}" for name, value in rest.items())])
    return f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event['at']))}  {said}"


# What each slash command does, the words it takes, and what /help says of it.
REPL_COMMANDS: Dict[str, Tuple[Callable[[App, str], List[str]], str, str]] = {
    "help": (_repl_help, "", "this list"),
    "stats": (lambda app, rest: stats_lines(stats_facts(app)), "",
              "how large, how old, how good it is"),
    "log": (lambda app, rest: [life_line(event) for event in app.memory().life(20)] or
            ["nothing has happened yet"], "", "what has happened in its life"),
    "memory": (_repl_memory, "[TEXT]", "what was told last, or search the memory"),
    "again": (_repl_again, "", "another reply to what was said last"),
    "about": (lambda app, rest: [about(app.memory(), rest).text], "TEXT",
              "all that was told about it"),
    "why": (_repl_why, "", "where the last reply came from"),
    "good": (lambda app, rest: _repl_judge(app, True), "", "approve the last reply"),
    "bad": (lambda app, rest: _repl_judge(app, False), "", "reject the last reply"),
    "teach": (_repl_teach, "TEXT", "remember a sentence"),
    "forget": (_repl_forget, "TEXT",
               "forget what was told, by id or words"),
    "session": (_repl_session, "[NAME]", "show or change the session"),
    "sessions": (lambda app, rest: session_lines(app.memory().sessions()), "", "list the sessions"),
    "new": (_repl_new, "[NAME]", "begin a new session"),
    "compact": (_repl_compact, "", "put the session's old turns into its summary"),
    "set": (_repl_set, "FIELD VALUE", "change a setting"),
    "show": (_repl_show, "[FIELD]", "show the settings"),
    "train": (_repl_train, "", "learn now what is still to be learned"),
    "sleep": (_repl_sleep, "", "stop learning until /train"),
    "save": (_repl_save, "[FILE]", "write the session's words into a file"),
    "exit": (_repl_exit, "", "leave"),
    "quit": (_repl_exit, "", ""), "bye": (_repl_exit, "", ""), "clear": (_repl_new, "[NAME]", "")}


# The commands. Each says its report or streams its text; one that returns nothing ends with 0.


MOST_PIPED = 10_000_000  # bytes


def found_in_pipe(text: str, config: Config) -> Optional[Reply]:
    """Return what is piped into stdin answers to a question, or None; nothing of it is kept."""
    given = b""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # there may be no stdin at all
        kind = os.fstat(sys.stdin.fileno()).st_mode
        if stat.S_ISREG(kind) or stat.S_ISFIFO(kind) and select.select([sys.stdin], [], [], 0.3)[0]:
            given = sys.stdin.buffer.read(MOST_PIPED)
    if not given:
        return None
    lines = clean_pieces(given.decode("utf-8", "replace").splitlines()[:config.max_corpus_lines],
                         config.max_line_chars)
    found = answered_by(lines, "corpus", text, random.Random(0), config.recall_score)
    return found and found._replace(entry=None, entries=())  # which are of no memory


def command_ask(app: App, words: List[str]) -> None:
    """Say one reply and leave."""
    text = clean_line(" ".join(words), LONGEST_MESSAGE)
    if not text:
        raise UsageError('ask needs something to answer; for example: ask "Who are you?"')
    organism = wake(app, learns=app.options.wait_trained)
    found = found_in_pipe(text, app.config)
    if found is None:
        said = _whole_reply(app, text).replace("\n", " ")
    else:
        said = reply_object(found.text, found, 0.0) if app.options.json else found.text
    app.terminal.say(said)
    if app.options.wait_trained:
        organism.wait_rest()
    app.notices()


def command_train(app: App, words: List[str]) -> None:
    """Train in the foreground until all is learned, or for so many steps or seconds."""
    if app.options.no_train:
        raise UsageError("train and --no-train contradict each other; leave one out")
    organism = app.organism()
    organism.watcher.prepare()
    before = organism.growth
    organism.trainer.only_orders = True
    organism.learn_now(app.options.steps, app.options.seconds)
    organism.awake()
    try:
        organism.wait_trained(app.show_progress)
    finally:
        app.terminal.end_status()
        organism.sleep()
        barred = organism.trainer.barred()
        if not barred:
            app.terminal.note(f"committed at step {organism.growth.step}")
            app.notices()
    if barred:
        raise TrainerError(BARRED)
    growth = organism.growth
    facts = {**dataclasses.asdict(growth), "steps_now": growth.step - before.step,
             "tokens_now": growth.tokens - before.tokens}
    bpc = "" if growth.bpc is None else f", held-out {growth.bpc:.3f} bits per character"
    app.report(facts, [f"{facts['steps_now']} steps, {facts['tokens_now']} tokens; now at step "
                       f"{growth.step}, {growth.phase}{bpc}"])


def command_generate(app: App, words: List[str]) -> None:
    """Stream free text after a prompt."""
    mind, prompt = app.organism().mind(), " ".join(words)
    if app.organism().growth.phase == "newborn":
        app.terminal.note("nothing has been learned yet, so this is noise; run `train` first")
    pieces = spoken(mind.model, mind.tokenizer, [END_OF_TEXT] + mind.tokenizer.encode(prompt),
                    app.config, random.Random(app.config.seed), mind.mixture(),
                    free_tokens=app.options.tokens or app.config.max_gen_tokens)
    if app.options.json:
        app.report({"text": prompt + "".join(pieces)}, ())
        return
    for piece in itertools.chain([prompt], pieces):
        app.terminal.say(piece, end="")
    app.terminal.say("")


def command_memory(app: App, words: List[str]) -> int:
    """Search, list or forget in the long-term memory."""
    action, rest = (words[0], " ".join(words[1:])) if words else ("", "")
    memory = app.memory()
    if action == "search" and rest:
        entries = search(memory, rest, MOST_FOUND)
    elif action == "about" and rest:
        found = about(memory, rest)
        app.report({"reply": found.text, "entries": [e._asdict() for e in found.entries]},
                   [found.text])
        return 0
    elif action == "list" and not rest:
        entries = memory.entries(TOLD_ENTRIES)
    elif action == "forget" and rest:
        done = forget(memory, rest, app.options.yes)
        app.report({"said": done}, [done])
        return 0 if done.startswith("forgotten") else 1
    else:
        raise UsageError("memory takes one of: search TEXT, about TEXT, list, forget TEXT-or-ID")
    app.report({"entries": [{**e._asdict(), "learned": e.layer is not None} for e in entries]},
               [_entry_line(entry) for entry in entries] or ["nothing found"])
    return 0


def command_sessions(app: App, words: List[str]) -> None:
    """List the conversations, show one, give it another name, or delete its messages."""
    memory, action, names = app.memory(), (words or ["list"])[0], words[1:]
    if (action, len(names)) not in (("list", 0), ("show", 1), ("rename", 2), ("delete", 1)):
        raise UsageError("sessions takes one of: list, show NAME, rename OLD NEW, delete NAME; "
                         f"found {' '.join(words)!r}")
    known = memory.session_names()
    if names:
        names[0] = meant_session(known, names[0])
        if names[0] not in known:
            raise UsageError(f"there is no session {names[0]!r}; {_nearest_hint(names[0], known)}")
    if action == "list":
        app.report({"sessions": memory.sessions()}, session_lines(memory.sessions()))
    elif action == "show":
        app.report({"messages": [m._asdict() for m in memory.messages_of(names[0])]},
                   transcript(memory, names[0]))
    elif action == "rename":
        if names[1] in known:
            raise UsageError(f"there is a session {names[1]!r} already; choose another name")
        memory.rename_session(names[0], check_session(names[1]))
        app.report({"renamed": names}, [f"{names[0]} is {names[1]} now"])
    elif not (app.options.yes or agreed(f"delete {names[0]!r}?")):
        app.report({"deleted": []}, ["it is kept"])
    else:
        memory.delete_session(names[0])
        app.report({"deleted": names}, [f"{names[0]} is deleted; what was told there is kept: see "
                                        "memory list and memory forget"])


def stats_facts(app: App) -> Dict[str, Any]:
    """Return everything that can be counted about the organism."""
    organism, memory = app.organism(), app.memory()
    growth, names = organism.growth, memory.manifests()
    parameters, vocabulary = model_size(organism)
    return {
        "version": __version__, "engine": organism.speaker.engine.name, "parameters": parameters,
        "vocabulary": vocabulary, "shape": dataclasses.asdict(Shape.of(app.config)),
        "layers": {"base": "base" in names, "deltas": len(delta_names(names)),
                   "max_deltas": app.config.max_delta_modules},
        "merges": vocabulary - FIRST_MERGE,
        **dataclasses.asdict(growth), "memory": memory.counts(),
        "file_bytes": memory.file_bytes(),
        "waiting_chars": dict(zip(("corpus", "said"), memory.unread_chars())),
        "progress": memory.progress(), "probe_curves": memory.setting("probes", {}),
        "life": memory.life(20)}


def stats_lines(facts: Dict[str, Any]) -> List[str]:
    """Return the facts as lines for people, with a small plot of the held-out loss over life."""
    memory, shape, layers = facts["memory"], facts["shape"], facts["layers"]
    bpc = "not measured yet" if facts["bpc"] is None else f"{facts['bpc']:.3f} bits per character"
    lines = [
        f"model      {facts['parameters']:,} parameters, {shape['n_layer']} layers of "
        f"{shape['n_embd']} channels, vocabulary {facts['vocabulary']}, generation "
        f"{facts['generation']}, {layers['deltas']} deltas",
        f"learning   {AGES[facts['phase']]}, step {facts['step']:,}, {facts['tokens']:,} tokens, "
        f"held-out {bpc}",
        f"memory     {counted(memory['messages'], 'message')} in "
        f"{counted(memory['sessions'], 'session')}, {memory['entries']} entries ({memory['told']} "
        f"told, {memory['learned']} learned, {memory['held_out']} held out), "
        f"{facts['file_bytes']:,} bytes",
        f"to learn   {facts['waiting_chars']['corpus']:,} characters of the corpus, "
        f"{facts['waiting_chars']['said']:,} of what was said",
        f"engine     {facts['engine']}, macrogpt {facts['version']}, Python "
        f"{sys.version.split()[0]}"]
    curve = [p["held_out_bpc"] for p in facts["progress"] if p["held_out_bpc"] is not None]
    if len(curve) > 1:
        lines.append(f"held-out   {sparkline(curve)}  {curve[0]:.2f} → {curve[-1]:.2f}")
    for name, points in facts["probe_curves"].items():
        losses = [bpc for _, bpc in points]
        lines.append(f"probe {name:>6}  {sparkline(losses)}  {losses[0]:.2f} → {losses[-1]:.2f}")
    for name, part, what, whole in (
            ("vocabulary", facts["merges"], "merges of", facts["vocabulary"]),
            ("deltas", layers["deltas"], "of at most", layers["max_deltas"]),
            ("learned", memory["learned"], "entries of", memory["entries"]),
            ("told", memory["told"], "statements of", memory["entries"])):
        bar = "█" * math.ceil(24 * part / max(1, whole))
        lines.append(f"{name:10} {bar:24} {part:,} {what} {whole:,}")
    return lines


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the values as a row of small bars, thinned to width."""
    count = min(width, len(values))
    thinned = [values[i * len(values) // count] for i in range(count)]
    low, high = min(thinned), max(thinned)
    return "".join("▁▂▃▄▅▆▇█"[int((v - low) / (high - low or 1) * 7.999)] for v in thinned)


# A page that needs nothing else: it is read where there is no network, in the light or the dark.
PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>macrogpt</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 44em; margin: 2em auto; padding: 0 1em }}
svg {{ width: 100%; height: auto }} polyline {{ fill: none; stroke: currentColor }}
text {{ font-size: 16px; fill: currentColor }} pre {{ white-space: pre-wrap }}
</style><h1>macrogpt</h1><pre>{facts}</pre>{charts}</html>
"""


def stats_page(facts: Dict[str, Any]) -> str:
    """Return the facts as one page, with the losses over life drawn."""
    curves = {"held-out text": [(p["step"], p["held_out_bpc"]) for p in facts["progress"]
                                if p["held_out_bpc"] is not None],
              **{f"probe {name}": points for name, points in facts["probe_curves"].items()}}
    charts = "".join(f"<h2>{html.escape(name)}</h2>{chart(points)}"
                     for name, points in curves.items() if len(points) > 1)
    return PAGE.format(facts=html.escape("\n".join(stats_lines(facts))), charts=charts)


LEAST_DRAWN = 0.2  # bits per character that a chart spans


def chart(points: Sequence[Tuple[float, float]]) -> str:
    """Return a drawing of bits per character over the steps of a life."""
    steps, losses = zip(*points)
    (left, right), (low, high) = ((min(values), max(values)) for values in (steps, losses))
    high = max(high, low + LEAST_DRAWN)  # what hardly changes looks as if it hardly does
    line = " ".join(f"{50 + 345 * (step - left) / ((right - left) or 1):.1f},"
                    f"{150 - 115 * (loss - low) / (high - low):.1f}" for step, loss in points)
    return (f'<svg viewBox="0 0 400 180" role="img" aria-label="from {losses[0]:.2f} to '
            f'{losses[-1]:.2f} bits per character"><polyline points="{line}"/>'
            f'<text x="0" y="16">bits per character</text>'
            f'<text x="0" y="40">{high:.2f}</text><text x="0" y="154">{low:.2f}</text>'
            f'<text x="50" y="174">step {left:,}</text>'
            f'<text x="395" y="174" text-anchor="end">{right:,}</text></svg>')


def command_serve(app: App, words: List[str]) -> None:
    """Serve programs and the page until a signal ends it; then it ends as chat does."""
    host = "127.0.0.1" if app.options.host is None else app.options.host
    port = "8080" if app.options.port is None else app.options.port
    check_door(host, app.options.token)
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise UsageError(f"--port {port} is no port; give a number from 0 to 65535")
    organism = wake(app)
    server = Server(organism, app.options.token, bool(app.options.learn), app.terminal.note)
    for number in ENDING_SIGNALS:
        signal.signal(number, lambda number, frame: setattr(server, "ended", number))
    number = asyncio.run(server.serve(host, int(port)))
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated(number)


def command_stats(app: App, words: List[str]) -> None:
    """Say how large, how old and how good it is; with --html as a page with charts."""
    facts = stats_facts(app)
    if app.options.html is None:
        app.report(facts, stats_lines(facts))
        return
    write_new(app.options.html, [stats_page(facts)])
    app.report({"html": app.options.html}, [f"drawn in {app.options.html}"])


def command_completion(app: App, words: List[str]) -> None:
    """Print what makes a shell complete commands and options."""
    options = [name for action in option_parser()._actions for name in action.option_strings]
    if words == ["fish"]:
        lines = [f"complete -c macrogpt -n __fish_use_subcommand -a {name} -d '{command.text}'"
                 for name, command in COMMANDS.items()]
        lines += [f"complete -c macrogpt -l {name[2:]}" for name in options if name[:2] == "--"]
    elif words == ["bash"]:
        lines = [f"complete -o default -W '{' '.join([*COMMANDS, *options])}' macrogpt"]
    elif words == ["zsh"]:
        lines = ["#compdef macrogpt", f"_arguments '1:command:({' '.join(COMMANDS)})' "
                 f"'*:word:_alternative \"options:option:({' '.join(options)})\" "
                 "\"files:file:_files\"'"]
    else:
        raise UsageError(f"completion takes bash, zsh or fish, found {' '.join(words)!r}")
    app.report({"script": lines}, lines)


def command_log(app: App, words: List[str]) -> None:
    """Tell its life, one line an event, oldest first."""
    life = app.memory().life(app.options.last or 20)
    app.report({"life": life}, map(life_line, life))


def command_eval(app: App, words: List[str]) -> None:
    """Measure the model on a text file, in bits per character; learn nothing."""
    if len(words) != 1:
        raise UsageError(f"eval takes one file, found {len(words)}; for example: eval held.txt")
    text = read_text(words[0])
    if not text:
        raise CorpusError(f"{words[0]} is empty: there is nothing to predict; name a text file")
    mind = app.organism().mind()
    ids, learning = text_ids(mind.tokenizer, text), Mixer(app.config.ngram_order)
    learning.load(mind.mixer.numbers())
    still, live = (Mixture(mind.model.engine, mind.counts, mixer)
                   for mixer in (mind.mixer, learning))
    totals = [0.0] * 4
    for i, nats in enumerate(read_through(mind.model, ids, still, live)):
        totals = list(map(add, totals, nats))
        if i % 500 == 0:
            app.terminal.status(f"{i / len(ids):4.0%} of {len(ids)} tokens")
    app.terminal.end_status()
    names = ("gpt_bpc", "ngram_bpc", "voice_bpc", "voice_adaptive_bpc")
    bpc = {name: nats / math.log(2.0) / len(text) for name, nats in zip(names, totals)}
    facts = {"characters": len(text), "tokens": len(ids) - 1, **bpc}
    app.report(facts, [
        f"{len(text)} characters, {len(ids) - 1} tokens: {bpc['gpt_bpc']:.4f} bits per character "
        f"by the model alone, {bpc['ngram_bpc']:.4f} by the counts alone, "
        f"{bpc['voice_bpc']:.4f} by the whole voice, {bpc['voice_adaptive_bpc']:.4f} when it "
        f"learns while it reads"])


def command_doctor(app: App, words: List[str]) -> int:
    """Examine engine, compiler, SQLite, files and store; exit 1 when something is wrong."""
    if app.options.rescue is not None:
        rows = rescue(app.config.db_path, app.options.rescue)
        app.report({"rescued": rows}, [f"rescued into {app.options.rescue}: " + ", ".join(
            f"{count} {table}" for table, count in rows.items())])
        return 0
    checks = list(itertools.chain(_machine_checks(app), _store_checks(app)))
    healthy = all(ok for _, ok, _ in checks)
    app.report({"healthy": healthy, "checks": [
        dict(zip(("name", "ok", "found"), check)) for check in checks]},
        [f"{'ok ' if ok else 'BAD'} {name:14} {found}" for name, ok, found in checks])
    return 0 if healthy else 1


def _machine_checks(app: App) -> Iterator[Tuple[str, bool, str]]:
    """Yield the name of a check, whether all is well, and what was found."""
    yield "python", True, sys.version.split()[0]
    try:
        notices: List[str] = []
        engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, notices.append)
        yield "engine", True, " · ".join([engine.name, *notices])
    except MacroGPTError as error:
        yield "engine", False, str(error)
    yield "compiler", True, " ".join(find_compiler() or ["none: kernels are interpreted"])
    path = app.config.corpus_path
    try:
        facts = read_corpus(path, app.config.max_corpus_lines, app.config.max_line_chars)
        found = f"{facts.total_lines} lines, {len(facts.documents)} documents"
        yield "corpus", True, f"{path}: {found}"
    except CorpusError as error:  # the usual one may be missing: it will be written
        yield "corpus", not os.path.lexists(path) and path == Config.corpus_path, str(error)


def _store_checks(app: App) -> Iterator[Tuple[str, bool, str]]:
    path = app.config.db_path
    folder = os.path.dirname(os.path.abspath(path))
    if not os.access(folder, os.W_OK):  # a journal stands beside the file
        yield "folder", False, f"{folder} cannot be written to: nothing said can be kept there"
    if not (os.path.exists(path) and os.path.getsize(path)):
        yield "store", True, f"{path} is not there yet; the first chat makes it"
        return
    try:
        memory = app.memory()
        faults = list(memory.faults())
        stored_config(memory, (), faults.append)
        for fault in faults:
            yield "store", False, fault
        if not faults:
            yield "store", True, f"{path}: integrity ok"
        yield "full text", True, f"SQLite {sqlite3.sqlite_version}, " + (
            "FTS5" if memory.has_fts else "no FTS5: searches are slower")
    except StoreError as error:
        yield "store", False, str(error)
        return
    mode = stat.S_IMODE(os.stat(path).st_mode)
    private = os.name != "posix" or not mode & 0o077
    yield "privacy", private, f"mode {mode:04o}" + (
        "" if private else f": others can read it; run chmod 600 {path}")


# The speed of this machine.

INTERPRETED_STEP = 100_000_000  # weights times tokens that take some seconds interpreted


def command_bench(app: App, words: List[str]) -> None:
    """Measure this machine: training, generation, start-up, first reply, memory search."""
    config, tell = app.config, app.terminal.note
    keep_freed_memory(True)
    best = choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, tell)
    engines = [best] if best.name == "python" else [best, interpreted_engine()]
    tell("measuring for a minute; leave the machine alone")
    out, rounds = best.buffer(96), 100_000
    peak = None if best.name == "python" else 192e-9 * rounds / min(  # GFLOP/s of one core
        _timed(lambda: best.multiply_adds(out, rounds, 0.5), 0.3))
    facts: Dict[str, Any] = {"config": dataclasses.asdict(config), "peak_gflops": peak,
                             "engines": {}}
    for engine in engines:
        app.terminal.status(f"measuring the {engine.name} engine")
        facts["engines"][engine.name] = bench_engine(config, engine, peak)
    app.terminal.status("measuring the start of a chat")
    facts.update(bench_process(config))
    app.terminal.status("measuring the search")
    facts["search_10000_ms"] = bench_search()
    app.terminal.end_status()
    app.report(facts, bench_lines(facts))


def _timed(work: Callable[[], Any], seconds: float) -> List[float]:
    """Return the times of three calls or more, for so many seconds, after one unmeasured call."""
    work()
    times: List[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


def bench_engine(config: Config, engine: Engine, peak: Optional[float]) -> Dict[str, Any]:
    """Return the speeds of one engine; floating-point operations are 6 a weight and token."""
    rng = random.Random(config.seed)
    model = GPT(Shape.of(config), config.bench_vocab, engine, rng)
    block, batch = config.block_size, config.batch_size
    weights = model.n_base
    engine.threads = 1 if engine.name == "python" else config.threads or 1
    if engine.name == "python":  # a large model would take it minutes a step: fewer tokens then
        most = max(1, INTERPRETED_STEP // weights)
        block = min(block, most)
        batch = min(batch, most // block)
    windows = [[rng.randrange(config.bench_vocab) for _ in range(block + 1)]
               for _ in range(batch)]

    def generate() -> None:
        cache, history, chance = model.new_cache(), array("i", [1]), random.Random(0)
        for _ in range(block):
            logits = model.feed(cache, history[-1:])
            history.append(draw_token(logits, history, config, chance, engine))
    train = _timed(lambda: train_step(model, config, windows, 0.001, 0.0, rng),
                   config.bench_seconds)
    made, tokens = _timed(generate, config.bench_seconds), batch * block
    gflops = 6e-9 * weights * tokens / min(train)
    return {"train_tokens_per_s": tokens / min(train),
            "train_tokens_per_s_median": tokens / statistics.median(train),
            "generate_tokens_per_s": block / min(made),
            "generate_tokens_per_s_median": block / statistics.median(made),
            "gflops": gflops, "threads": engine.threads,
            "share_of_peak": peak and gflops / (peak * engine.threads)}


def bench_process(config: Config) -> Dict[str, float]:
    """Return the seconds of an empty chat, and from the start of a newborn to its first reply."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.abspath(config.corpus_path)  # a chat that finds none writes its own
        command = [sys.executable, os.path.abspath(__file__),
                   *(["--corpus", corpus] if os.path.exists(corpus) else [])]

        def until_it_speaks(typed: bytes, *options: str) -> float:
            begun = time.perf_counter()
            with subprocess.Popen([*command, *options], stdin=subprocess.PIPE, cwd=folder,
                                  stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as chat:
                assert chat.stdin is not None and chat.stdout is not None
                chat.stdin.write(typed)
                chat.stdin.close()
                chat.stdout.readline()  # or, where nothing was asked, its end
                seconds = time.perf_counter() - begun
            if chat.returncode:
                raise subprocess.CalledProcessError(chat.returncode, command)
            os.unlink(os.path.join(folder, Config.db_path))
            return seconds
        return {"startup_s": min(until_it_speaks(b"", "--no-train") for _ in range(3)),
                "first_reply_s": min(until_it_speaks(b"Hello.\n") for _ in range(3))}


def bench_search() -> float:
    """Return milliseconds of a search among 10,000 made-up entries."""
    rng, words = random.Random(0), ["w" + str(i) for i in range(3000)]
    memory = Memory(":memory:")
    with memory.transaction():
        for _ in range(10_000):
            memory.add_entry("corpus", Document((" ".join(rng.choices(words, k=8)),), True))
    asked = " ".join(words[:6])
    times = _timed(lambda: recall(memory, asked, rng), 0.5)
    memory.close()
    return statistics.median(times) * 1e3


def bench_lines(facts: Dict[str, Any]) -> List[str]:
    """Return the measurements as a table."""
    rows = [("engine", "training tokens/s", "median", "generated tokens/s", "median", "GFLOP/s",
             "of peak")]
    for name, e in facts["engines"].items():
        share = "" if e["share_of_peak"] is None else f"{e['share_of_peak']:.0%}"
        rows.append((name, *(f"{e[key]:.0f}" for key in (
            "train_tokens_per_s", "train_tokens_per_s_median", "generate_tokens_per_s",
            "generate_tokens_per_s_median")), f"{e['gflops']:.2f}", share))
    return ["  ".join(f"{cell:>18}" for cell in row) for row in rows] + [
        f"an empty chat {facts['startup_s']:.2f} s, first reply of a newborn "
        f"{facts['first_reply_s']:.2f} s, search among 10,000 entries "
        f"{facts['search_10000_ms']:.1f} ms"]


def command_export(app: App, words: List[str]) -> None:
    """Write the weights as a folder that other programs read, or words as JSONL or Markdown."""
    form, memory, mine = app.options.format, app.memory(), bool(app.options.mine)
    if form not in (*WEIGHT_FORMATS, *WORD_FORMATS) or len(words) != 1:
        raise UsageError("export takes a new file or folder, and as --format one of "
                         f"{', '.join((*WEIGHT_FORMATS, *WORD_FORMATS))}; for example: "
                         "export talks.jsonl --format jsonl")
    if mine and form != "jsonl":
        raise UsageError(f"--mine is of --format jsonl; leave it out with {form}")
    if form in WEIGHT_FORMATS:
        organism = app.organism()
        life = [life_line(event) for event in memory.life(1000)]
        export_weights(words[0], form, Leaving.of(memory, organism.config,
                                                  organism.speaker.engine, life))
        app.terminal.note(f"{words[0]} holds what was learned, in the form {form}: your words are "
                          "in it, and it may say them")
        return
    write_new(words[0], as_markdown(memory) if form == "markdown" else (
        json.dumps(row, ensure_ascii=False) for row in chat_records(memory, mine)))
    app.terminal.note(f"{words[0]} holds what you said, word for word")


def command_import(app: App, words: List[str]) -> None:
    """Take in talks, each in a session of its own and heard here, or weights from elsewhere."""
    if len(words) != 1:
        raise UsageError("import takes one file of talks, or a folder of weights; for example: "
                         "import talks.jsonl")
    path, organism, memory = words[0], app.organism(), app.memory()
    if os.path.isdir(path) or path.lower().endswith(WEIGHT_FILES):
        learner = import_weights(organism, path)
        layer, growth = len(learner.model.deltas), learner.growth
        bpc = "" if growth.bpc is None else f"; held-out {growth.bpc:.3f} bits per character"
        app.report({**dataclasses.asdict(growth), "layer": layer}, [
            f"{path} is now " + (f"delta {layer}" if layer else f"generation {growth.generation}")
            + bpc])
        return
    heard, name = words_of(path), f"import {os.path.basename(path)}"
    with memory.transaction():
        for talk, role, text, at in heard:
            if talk is None:
                organism.teach(text, at)
                continue
            session = session_name(f"{name} {talk}".strip())
            memory.add_message(memory.session_id(session), role, text, at)
        organism.take_in_messages()
    count = sum(said.talk is not None for said in heard)
    more = f", and {len(heard) - count} sentences were told" if count < len(heard) else ""
    app.report({"messages": count, "told": len(heard) - count, "session": name},
               [f"{count} messages came into session {name!r}{more}"])


class Command(NamedTuple):
    """A command of the command line: what it does, takes, says of itself, and does to the store."""

    run: Callable[[App, List[str]], Optional[int]]
    words: str
    text: str
    example: str = ""
    options: Tuple[str, ...] = ()    # that are its own
    reports: bool = False            # it only reads, and makes no store
    changes: Tuple[str, ...] = ()    # words after which it does more than read


COMMANDS: Dict[str, Command] = {
    "chat": Command(command_chat, "", "talk (the default)", "--session work"),
    "ask": Command(command_ask, "TEXT", "one reply on stdout",
                   "'where did I park?' < notes.txt"),
    "train": Command(command_train, "", "train in the foreground [--steps N] [--seconds S]",
                     "--seconds 60", ("steps", "seconds")),
    "generate": Command(command_generate, "[PROMPT]", "free text [--tokens N]",
                        "'The sea' --tokens 50", ("tokens",)),
    "memory": Command(command_memory, "search TEXT | about TEXT | list | forget TEXT-or-ID",
                      "what it was told", "search cat", (), True, ("forget",)),
    "sessions": Command(command_sessions, "[list | show NAME | rename OLD NEW | delete NAME]",
                        "the conversations", "show main", (), True, ("rename", "delete")),
    "stats": Command(command_stats, "", "how large, how old, how good it is [--html FILE]",
                     "--html page.html", ("html",), True),
    "log": Command(command_log, "", "its life, one line an event [--last N]", "--last 20",
                   ("last",), True),
    "eval": Command(command_eval, "FILE", "bits per character on a text", "book.txt"),
    "bench": Command(command_bench, "", "the speed of this machine"),
    "doctor": Command(command_doctor, "",
                      "what is well and what is not; --rescue NEW saves what can be read",
                      "--rescue saved.sqlite3", ("rescue",), True),
    "export": Command(command_export, "PATH",
                      "what was learned or said --format hf|peft|gguf|jsonl|markdown [--mine]",
                      "talks.jsonl --format jsonl --mine", ("format", "mine"), True),
    "import": Command(command_import, "PATH", "talks, or a folder of weights, as export makes them",
                      "talks.jsonl"),
    "serve": Command(command_serve, "",
                     "the API that chat front ends speak, and a page [--host H] [--port N]",
                     "--port 8080", ("host", "port", "token", "learn")),
    "completion": Command(command_completion, "bash|zsh|fish",
                          "what makes a shell complete words", "bash")}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> Any:
        """Raise UsageError with the message."""
        raise UsageError(f"{message}; see --help")


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that may stand on the command line."""
    table = "\n".join(f"  {name:11}{command.words}{': ' * bool(command.words)}{command.text}"
                      for name, command in COMMANDS.items())
    parser = OneLineParser(
        prog="macrogpt", description="a small living mind in one file",
        epilog="commands, each with a --help of its own:\n" + table, add_help=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("-h", "--help", action="store_true", help="show this, or what a command takes")
    add("command", nargs="?", help="see below; chat by default")
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--db", metavar="PATH", help="the memory file (default memory.sqlite3)")
    add("--corpus", metavar="PATH", help="the text file to learn from (default nonames.txt)")
    add("--session", metavar="NAME", help="pick or make a session (default the one used last)")
    add("--set", metavar="FIELD=VALUE", action="append", default=[], help="change a setting")
    add("--seed", metavar="N", help="make what is random repeatable")
    add("--no-train", action="store_true", help="never start the trainer")
    add("--wait-trained", action="store_true",
        help="learn what is there before the first reply, and what is due before the next one")
    add("--json", action="store_true", help="machine-readable reports")
    add("--quiet", action="store_true", help="no banner, no notices")
    add("--yes", action="store_true", help="delete and forget without asking")
    add("--debug", action="store_true", help="show tracebacks")
    add("--color", choices=("auto", "always", "never"), default="auto")
    add("--steps", type=int, metavar="N", help="train: so many steps")
    add("--seconds", type=float, metavar="S", help="train: so many seconds")
    add("--tokens", type=int, metavar="N", help="generate: so many tokens")
    add("--last", type=int, metavar="N", help="log: so many events")
    add("--format", metavar="FORMAT", help="export: the format to write")
    add("--mine", action="store_true", default=None, help="export: your talks alone")
    add("--html", metavar="FILE", help="stats: draw them as a page")
    add("--rescue", metavar="NEW", help="doctor: copy all that can be read into a new store")
    add("--host", metavar="ADDRESS", help="serve: where to listen (default 127.0.0.1)")
    add("--port", metavar="N", help="serve: at which port (default 8080; 0 is any that is free)")
    add("--token", metavar="T", help="serve: a secret that is asked of all")
    add("--learn", action="store_true", default=None, help="serve: keep what is said")
    add("--version", action="version", version=f"macrogpt {__version__}")
    return parser


def help_of(name: str) -> str:
    """Return what a command does, takes, and looks like."""
    command = COMMANDS[name]
    given = [f"  {' '.join(action.option_strings)} {action.metavar or ''}  {action.help}"
             for action in option_parser()._actions if action.dest in command.options]
    return "\n".join([f"usage: macrogpt {name} {command.words}".rstrip(), command.text, *given,
                      f"example: macrogpt {name} {command.example}".rstrip(),
                      "macrogpt --help shows the options that every command takes"])


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, checked against the command.  Raises UsageError or ConfigError."""
    options = option_parser().parse_intermixed_args(argv)
    if options.help:
        return options
    options.command = "chat" if options.command is None else options.command
    if options.command not in COMMANDS:
        raise UsageError(f"there is no command {options.command!r}; "
                         f"{_nearest_hint(options.command, list(COMMANDS))}")
    command = COMMANDS[options.command]
    if options.words and not command.words:
        raise UsageError(f"{options.command} takes no words, found {options.words[0]!r}; "
                         f"see --help, or to talk: ask {' '.join(options.words)}")
    for name in (name for each in COMMANDS.values() for name in each.options):
        value = getattr(options, name)
        if value is not None and name not in command.options:
            raise UsageError(f"{options.command} takes no --{name}; see --help")
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value} is not above 0; give a positive number")
    if options.session is not None:
        options.session = check_session(decode_line(os.fsencode(options.session)))
    named = {"db_path": options.db, "corpus_path": options.corpus, "seed": options.seed}
    options.assignments = options.set + [
        f"{name}={value}" for name, value in named.items() if value is not None]
    return options


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Run one command and return its exit code."""
    options = parse_options(argv)
    if options.help:
        terminal.say(help_of(options.command) if options.command in COMMANDS else
                     option_parser().format_help().rstrip())
        return 0
    terminal = Terminal(terminal.out, terminal.err, options.color, options.quiet, not options.json)
    if options.debug:
        os.environ["MACROGPT_DEBUG"] = "1"
    app = App(options, Config().replace(options.assignments), terminal)
    chain_of(app.config)
    try:
        names_files = options.command in ("eval", "export", "import")
        words = options.words if names_files else [
            tidied(decode_line(os.fsencode(word))) for word in options.words]
        return app.in_sound_store(lambda: COMMANDS[options.command].run(app, words)) or 0
    finally:
        for number in ENDING_SIGNALS:  # the last commit is not to be interrupted
            signal.signal(number, signal.SIG_IGN)
        app.close()


@contextlib.contextmanager
def knocking(seconds: float) -> Iterator[None]:
    """Break every wait of the main thread off so often, for as long as the body lasts.

    Python notes a signal and sees to it later. One that comes just before a wait for the next line
    would be noted, and seen to when that line comes, which may be never. A terminal is left alone:
    readline has a use of its own for that signal, and who sits there can press a key again.
    """
    main = threading.current_thread() is threading.main_thread()
    if not hasattr(signal, "setitimer") or not main or sys.stdin and sys.stdin.isatty():
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run macrogpt with the words of a command line; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    out, err = (stream or open(os.devnull, "w", encoding="utf-8")  # either may have been closed
                for stream in (sys.stdout, sys.stderr))
    for stream, errors in ((sys.stdin, "surrogateescape"), (out, "replace"), (err, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors=errors)
    terminal = Terminal(out, err)
    for number in ENDING_SIGNALS[1:]:
        signal.signal(number, _raise_terminated)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with knocking(1.0):
            return run(argv, terminal)
    except KeyboardInterrupt:
        return 130
    except Terminated as error:
        return 128 + int(error.args[0])
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        return 0
    except Exception as error:
        if "--debug" in argv:
            raise
        if isinstance(error, OSError) and error.filename is None and error.errno in (
                errno.ENOSPC, errno.EIO, errno.EFBIG):
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
            error = MacroGPTError(f"what is said cannot be written ({error.strerror}); free some "
                                  "space, or send it elsewhere")
        return terminal.tell_error(as_told(error))


if __name__ == "__main__":
    sys.exit(main())
