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
    11 EXPERTS     what learns beside the GPT, and the mixture that weighs the voices
    12 MEMORY      one SQLite file that is the whole being
    13 RECALL      a question and what was told: the statements that answer it
    14 VOICE       how memory and model speak together
    15 LEARNING    a generation and its text; one stretch of steps; the child that trains
    16 ORGANISM    the one owner of changing state; the trainer's supervisor
    17 INTERFACE   commands, terminal, reports

Letters in shapes: B batch, T time (rows), C channels, H heads, D head width, V vocabulary, R rank.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import codecs
import collections
import contextlib
import dataclasses
import functools
import hashlib
import heapq
import importlib
import inspect
import io
import itertools
import json
import math
import os
import platform
import queue
import random
import re
import shutil
import signal
import socket
import sqlite3
import stat
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unicodedata
import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field
from itertools import accumulate, repeat
from math import dist, exp, isfinite, log, sqrt
from operator import add, attrgetter, itemgetter, mul
from typing import (AbstractSet, Any, BinaryIO, Callable, Container, DefaultDict, Deque, Dict,
                    FrozenSet, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set,
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


class CorpusError(MacroGPTError):
    """A text file cannot be read."""


class StoreError(MacroGPTError):
    """The memory file cannot be opened, read or written."""


class EngineError(MacroGPTError):
    """The engine asked for is not to be had on this machine."""


class TrainerError(MacroGPTError):
    """The trainer process cannot do its work."""


def _setting(default: Any, doc: str, low: float = -math.inf, high: float = math.inf) -> Any:
    """Return a dataclass field with its meaning and its closed range."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


@dataclass(frozen=True)
class Config:
    """Every setting of the organism; `--set FIELD=VALUE` reaches each.  Raises ConfigError."""

    # files
    corpus_path: str = _setting("nonames.txt", "the owner's text file; only ever read")
    db_path: str = _setting("memory.sqlite3", "the one file that holds the organism")
    max_corpus_lines: int = _setting(40_000, "lines kept of the corpus", 1, 10_000_000)
    max_line_chars: int = _setting(240, "characters kept of one line", 16, 100_000)
    held_out_share: float = _setting(0.1, "share of documents never trained on", 0.0, 0.5)
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
    # of 0 to 1,536, 768 measured best on our corpus, 384 to 768 on a larger one, at equal compute
    max_merges: int = _setting(768, "merges the tokenizer may learn", 0, 100_000)
    min_pair_count: int = _setting(4, "a pair seen less often is not merged", 2)
    min_merge_chars: int = _setting(2000, "smaller corpora stay bytes", 0)
    # with 32 merges old text is within 0.3 % after 25 steps, with 64 within 0.8 % after 100
    growth_merges: int = _setting(32, "merges of one growth; 0: it never grows", 0, 10_000)
    growth_chars: int = _setting(10_000, "new characters after which it may grow", 1)
    growth_need: float = _setting(0.9, "it grows where a token holds fewer characters than this "
                                  "share of what it holds elsewhere", 0.0)
    growth_bound: float = _setting(0.01, "most that any text may cost more in new merges", 0.0, 1.0)
    shadow_share: float = _setting(0.5, "share of batches in new merges while they ripen", 0.0, 1.0)
    life_merges: int = _setting(8192, "merges that the tokenizer may learn in its life", 0, 100_000)
    # training
    # two bounds far out: it is the held-out loss that ends a warm-up, where any text is held out
    warmup_steps: int = _setting(20_000, "most steps of the first training of the base", 1)
    warmup_epochs: float = _setting(40.0, "most times the first training reads its text", 0.1,
                                    1e6)
    rate_epochs: float = _setting(5.0, "epochs after which a warm-up's rate is at a half", 0.1)
    cooling: float = _setting(0.4, "steps in which a warm-up's rate falls, as a share of those "
                                   "before", 0.01, 10.0)
    micro_steps: int = _setting(32, "steps of the smallest burst after that", 1)
    batch_size: int = _setting(4, "windows in a full batch B", 1, 4096)
    small_batch_tokens: int = _setting(100_000, "tokens trained with half batches first", 0)
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
    patience: int = _setting(4, "evaluations without a gain before a warm-up's rate falls", 1)
    eval_steps: int = _setting(50, "steps between held-out evaluations", 1)
    eval_chars: int = _setting(6000, "held-out characters in one evaluation", 100)
    # a line added to the corpus is always learned at once; this is for what is said in the chat
    min_new_chars_to_train: int = _setting(240, "characters said before a burst starts", 1)
    # adapters
    # in five unlike texts 32 came within 5 % of full fine-tuning, 16 within 10, 8 within 11
    delta_rank: int = _setting(32, "rank R of a delta", 1, 1024)
    max_delta_modules: int = _setting(32, "deltas kept before the oldest is folded in", 1, 1000)
    delta_seal_chars: int = _setting(20_000, "new characters a delta takes before it is sealed", 1)
    delta_shift: float = _setting(0.01, "how much better another layer must read new text for the "
                                        "active delta to be sealed", 0.0)
    gate_bound: float = _setting(0.01, "share by which a burst may worsen a probe set", 0.0)
    gate_tries: int = _setting(2, "gentler tries of a burst before it is rolled back", 0, 100)
    dream_seconds: float = _setting(0.0, "seconds of idleness on mains power after which known "
                                         "text is rehearsed, again and again; 0 is never", 0.0)
    # unlearning
    unlearn_seconds: float = _setting(10.0, "quiet after the owner forgot something, before the "
                                            "layers that learned it are rebuilt", 0.0, 1e6)
    unlearn_corrected_chars: int = _setting(2000, "characters of lines that were only corrected, "
                                                  "from which layers are rebuilt for them", 0)
    # organism
    auto_grow: int = _setting(0, "1: the model grows by itself when its text outgrows it", 0, 1)
    threads: int = _setting(0, "threads of compiled kernels; 0 is one less than there are cores", 0,
                            256)
    commit_seconds: float = _setting(20.0, "seconds between commits of the trainer", 0.1)
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
    # a learner's words are readable from about 2.3; who is grown may speak up to half as much again
    trust_bpc: float = _setting(2.3, "held-out bits per character from which the model speaks", 0.0)
    # counts: 3 beat 2 by 0.03 bits per character on a million characters, 4 gained nothing
    ngram_order: int = _setting(3, "ids that the counts look back", 1, 8)
    ngram_counts: int = _setting(800_000, "most counts kept, at 100 to 200 bytes each", 1000)
    ngram_chars: int = _setting(2_000_000, "newest characters that are counted", 0)
    mix: int = _setting(1, "1: model and counts speak together; 0: the model by itself", 0, 1)
    mix_passes: int = _setting(2, "readings of held-out text that fit the voice's weights", 0, 100)
    # bench
    bench_vocab: int = _setting(512, "vocabulary of the benchmark's model", 2, 1_000_000)
    bench_chars: int = _setting(100_000, "characters of a text of the stream of forgetting", 1000)
    bench_tokens: int = _setting(100_000, "tokens trained on for each", 1)
    bench_shifts: int = _setting(30, "shifts of the second stream; 0 leaves it out", 0, 10_000)
    bench_shift_chars: int = _setting(20_000, "characters of a shift", 1000)
    bench_shift_tokens: int = _setting(20_000, "tokens trained on for each shift", 1)
    bench_test_chars: int = _setting(4000, "characters of each that are for the exam", 100)
    bench_seconds: float = _setting(4.0, "seconds for each measurement", 0.1, 3600.0)

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check_setting(f, getattr(self, f.name))
        pairs = 2 * self.n_head
        if self.n_embd % pairs:
            raise ConfigError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head} and "
                              f"leave an even width for RoPE's pairs; try n_embd="
                              f"{self.n_embd + pairs - self.n_embd % pairs}")
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
    if not (low <= value <= high and abs(value) < math.inf):
        raise ConfigError(f"{f.name}={value!r} is out of range: expected {_range_text(low, high)} "
                          f"({f.metadata['doc']}); the default is {f.default!r}")


def _range_text(low: float, high: float) -> str:
    if high == math.inf:
        return f"a number from {low:g} up"
    return f"a number from {low:g} to {high:g}"


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
# its text, never by its place. So an edit shows as a few keys come and a few gone, the sample of
# a file too big to keep hardly moves, and what is held out for the exam is held out for ever.

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
# What no clean line holds: controls (save the line feed), line separators, BOMs, lone surrogates.
_ODD = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ud800-\udfff]")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)\]]*(?=\s)|[。！？]")


def _mend(text: str) -> str:
    """Return text with the stray bytes in it as letters."""
    if text.isascii():
        return text
    return _STRAY.sub(lambda stray: _STRAY_LETTERS[ord(stray[0]) - 0xDC80], text)


def tidied(text: str) -> str:
    """Return text mended and without controls: spaces for those that are space; line feeds stay."""
    return _ODD.sub(lambda odd: " " if odd[0].isspace() else "", _mend(text))


def _break_at(text: str, max_chars: int) -> int:
    """Return the best place, 1 to max_chars, to end a piece of text (or its length if it fits)."""
    if len(text) <= max_chars:
        return len(text)
    ends = (match.end() for match in _SENTENCE_END.finditer(text, max_chars // 2, max_chars + 1))
    sentence = max((end for end in ends if end <= max_chars), default=0)
    if sentence:
        return sentence
    space = text.rfind(" ", 1, max_chars + 1)
    return space if space > 0 else max_chars


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

    A piece ends with a sentence if one ends in its second half, or else with a word, or else
    where it must; what is left after the last piece is dropped.
    """
    pieces: List[str] = []
    start = 0
    while start < len(text) and len(pieces) < MAX_LINE_PIECES:
        window = text[start:start + max_chars + 1]
        end = _break_at(window, max_chars)
        pieces.append(window[:end].strip())
        start += end
    return [piece for piece in pieces if piece]


def _hash64(text: str, use: bytes = b"") -> int:
    """Return the 64-bit signed BLAKE2b hash of text, the same on every machine (RFC 7693)."""
    raw = text.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(raw, digest_size=8, person=use).digest()
    return int.from_bytes(digest, "big", signed=True)


def line_key(line: str) -> int:
    """Return the stable 64-bit signed hash of a line; it fits an SQLite INTEGER."""
    return _hash64(line)


@dataclasses.dataclass(frozen=True)
class Document:
    """An exchange or a passage: clean lines that belong together.

    closed says that the document ends here; it is False when it was cut from a longer run of
    lines that goes on in the next document.
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

    @functools.cached_property
    def key(self) -> int:
        """The stable 64-bit signed hash of the text; whether it is closed does not count."""
        return _hash64(self.text)

    def turns(self) -> List[Tuple[str, str]]:
        """Return the (speaker, words) of an exchange; ValueError for a passage."""
        if not self.is_exchange:
            raise ValueError("only an exchange has turns, and this document is a passage")
        return [(line[0], line[2:].strip()) for line in self.lines]


def _is_spoken(line: str) -> Optional[bool]:
    """Return True for an `H:` or `A:` line, False for a plain line, None for a blank one."""
    return line[:2] in MARKERS if line else None


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
    if len(head) <= WHOLE_LINES:
        yield Document(tuple(head), closed=True)
        return
    chunk: List[str] = []
    for line in itertools.chain(head, run):
        begins = len(chunk) >= WHOLE_LINES or zlib.crc32(line.encode()) % CHUNK_ODDS == 0
        if line.startswith("A:"):
            begins = len(chunk) >= LONGEST_EXCHANGE_LINES
        if begins and chunk:
            yield Document(tuple(chunk), closed=False)
            chunk = []
        chunk.append(line)
    yield Document(tuple(chunk), closed=True)


def documents_of(lines: Iterable[str]) -> Iterator[Document]:
    """Yield the documents that clean lines form, in order; "" is a blank line.

    A document is a run of spoken lines (with their markers normalised to "H: words") or a run of
    plain lines. Runs of more than WHOLE_LINES lines are cut where their content says.
    """
    for spoken, run in itertools.groupby(lines, _is_spoken):
        if spoken is not None:
            yield from _cut_run(map(_space_marker, run) if spoken else run)


def is_held_out(document: Document, share: float = 0.1) -> bool:
    """Return whether the document is in the held-out share, which is within 0 to 1.

    The hash of its first line decides, blind to case and spacing: the same question is on the
    same side in every exchange, on every machine, for ever.
    """
    folded = unicodedata.normalize("NFC", document.lines[0].casefold())
    return _hash64(" ".join(folded.split()), b"held-out") + 2 ** 63 < share * 2 ** 64


@dataclasses.dataclass(frozen=True)
class FileStamp:
    """What changes when a file does; saving by rename changes the inode."""
    mtime_ns: int
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
    total_bytes: int
    kept_all: bool
    stamp: Optional[FileStamp]
    notices: Tuple[str, ...]


def _refusal(path: AnyPath, found: str, remedy: str) -> CorpusError:
    """Return the error that says on one line what is wrong with path."""
    return CorpusError(f"{os.fspath(path)!r}: found {found}, expected a text file; {remedy}")


def _regular_status(path: AnyPath, opened: Optional[int] = None) -> os.stat_result:
    """Return the status of the regular file at path, or already opened; CorpusError if none."""
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
    return status


def _stamp_of(status: os.stat_result) -> FileStamp:
    """Return the part of a file status that tells versions apart."""
    return FileStamp(status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev)


def file_stamp(path: AnyPath) -> Optional[FileStamp]:
    """Return the stamp of the regular file at path, or None when there is no such file."""
    try:
        return _stamp_of(_regular_status(path))
    except CorpusError:
        return None


@contextlib.contextmanager
def _reading(path: AnyPath) -> Iterator[io.TextIOWrapper]:
    """Give the file at path as text with "\\n" newlines, in the encoding that its BOM names.

    Decoding never fails. Raises CorpusError for whatever fails in opening or in the body's reads.
    """
    _regular_status(path)
    try:
        with open(path, "rb", opener=_open_at_once) as raw:
            _regular_status(path, raw.fileno())  # something else may have come in its place
            if raw.peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                encoding, errors = "utf-16", "replace"
            else:
                encoding, errors = "utf-8-sig", "surrogateescape"
            with io.TextIOWrapper(raw, encoding, errors) as handle:
                yield handle
    except OSError as failure:
        raise _refusal(path, failure.strerror or str(failure),
                       "check its permissions and its disk") from failure


def _open_at_once(path: str, flags: int) -> int:
    """Open without waiting: a pipe put in the file's place meanwhile must not hang us."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


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
            if line.isascii() and len(line) < max_chars:
                tally["lines"] += line != ""
                yield line
            else:
                pieces = _pieces(line[:most_chars], max_chars)
                tally["lines"] += len(pieces)
                tally["long"] += len(line) > max_chars
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


class _Reservoir:
    """The documents to keep: the newest, and of the older ones those with the smallest hashes.

    Precisely: the newest documents that fit in half of max_lines (at least one), then as many of
    the others, by rising key, as fit in what remains. Chance has no part in it, so an edit moves
    the choice by a document or so. Never holds much more than 2.5 * max_lines lines.
    """

    def __init__(self, max_lines: int) -> None:
        """Start empty."""
        self.max_lines = max_lines
        # Documents by key, both in file order: they leave the one and enter the other in turn.
        self.newest: collections.OrderedDict[int, Document] = collections.OrderedDict()
        self.newest_lines = 0
        self.sample: Dict[int, Document] = {}
        self.sample_lines = 0
        self.key_limit = 2 ** 63  # no older document with a key from here on will ever fit

    def add(self, document: Document) -> None:
        """Take the next document of the file; an equal one before it gives way."""
        key, size = document.key, len(document.lines)
        if self.newest.pop(key, None):
            self.newest_lines -= size
        elif self.sample.pop(key, None):
            self.sample_lines -= size
        self.newest[key] = document
        self.newest_lines += size
        while self.newest_lines > self.max_lines // 2 and len(self.newest) > 1:
            self._age()

    def _age(self) -> None:
        """Move the oldest of the newest documents to the sample, or out."""
        key, document = self.newest.popitem(last=False)
        self.newest_lines -= len(document.lines)
        if key < self.key_limit:
            self.sample[key] = document
            self.sample_lines += len(document.lines)
            if self.sample_lines > 2 * self.max_lines:
                self._shrink_sample(self.max_lines)

    def _shrink_sample(self, room: int) -> None:
        """Keep the smallest keys whose documents fit in room lines."""
        ranked = sorted(self.sample)
        sizes = itertools.accumulate(len(self.sample[key].lines) for key in ranked)
        fitting = sum(size <= room for size in sizes)
        if fitting < len(ranked):
            self.key_limit = ranked[fitting]
        for key in ranked[fitting:]:
            self.sample_lines -= len(self.sample.pop(key).lines)

    def documents(self) -> Tuple[Tuple[Document, ...], bool]:
        """Return the documents kept, in file order, and whether they are all."""
        self._shrink_sample(self.max_lines - self.newest_lines)
        return (*self.sample.values(), *self.newest.values()), self.key_limit == 2 ** 63


def _notices(tally: collections.Counter[str], encoding: str,
             max_line_chars: int) -> Tuple[str, ...]:
    """Return a sentence for each thing counted in tally that the owner should know."""
    stray = ("bytes that are not UTF-8, read as cp1252" if encoding == "utf-8-sig"
             else "characters that are not UTF-16, kept as \ufffd")
    sentences = {
        "stray": f"{stray}: {tally['stray']}",
        "long": f"lines longer than {max_line_chars} characters, split or cut: {tally['long']}",
        "kept": f"kept {tally['kept']} of {tally['lines']} lines: the newest and a stable sample"}
    return tuple(sentence for name, sentence in sentences.items() if tally[name])


def read_corpus(path: AnyPath, max_lines: int = 8000, max_line_chars: int = 240,
                should_stop: Callable[[], bool] = lambda: False) -> Corpus:
    """Return the documents of the text file at path, at most max_lines lines (or the last one).

    When it has more, half the room is for its newest documents and half for a stable sample of
    the older ones. Raises CorpusError if there is no readable regular file, or when should_stop
    says to break off. Streams in bounded
    memory: 200 MB of 40-character lines took 8 s (28 s if each is a document of its own) and 4 MB
    (11 MB) on one slow core.
    """
    if max_lines < 1 or max_line_chars < 4:
        raise ValueError("max_lines must be at least 1 and max_line_chars at least 4")
    tally: collections.Counter[str] = collections.Counter()
    reservoir = _Reservoir(max_lines)
    with _reading(path) as handle:
        # Taken before the first byte, so that a change while we read shows at the next look.
        stamp = _stamp_of(_regular_status(path, handle.fileno()))
        for document in documents_of(_clean_lines(handle, max_line_chars, tally)):
            if should_stop():
                raise CorpusError(f"{os.fspath(path)!r}: reading was broken off; start again")
            reservoir.add(document)
        total_bytes = handle.buffer.tell()
    documents, kept_all = reservoir.documents()
    if not kept_all:
        tally["kept"] = sum(len(document.lines) for document in documents)
    return Corpus(documents, tally["lines"], total_bytes, kept_all, stamp,
                  _notices(tally, handle.encoding, max_line_chars))


def lines_still_in(path: AnyPath, lines: AbstractSet[str], max_line_chars: int) -> Set[str]:
    """Return which of the clean lines stand in the text file at path.  Raises CorpusError."""
    with _reading(path) as handle:
        found = _clean_lines(handle, max_line_chars, collections.Counter())
        return {line for document in documents_of(found) for line in document.lines
                if line in lines}


def corrected_lines(lost: Sequence[str], fresh: Sequence[str]) -> Set[str]:
    """Return the lost lines that stand among the fresh ones in a form four fifths alike.

    Of more than MOST_CORRECTIONS, all count as lost: a text was replaced, and comparing is slow.
    """
    if max(len(lost), len(fresh)) > MOST_CORRECTIONS:
        return set()
    import difflib  # only an edit pays for this import
    return {line for line in lost if difflib.get_close_matches(line, fresh, 1, 0.8)}


MOST_CORRECTIONS = 100


def read_text(path: AnyPath) -> str:
    """Return the whole file decoded as for read_corpus, with "\\n" newlines and no NULs.

    Nothing else is changed or cut. Raises CorpusError if there is no readable regular file.
    """
    with _reading(path) as handle:
        return _mend(handle.read()).replace("\0", "")


def changes(old_keys: AbstractSet[int], corpus: Corpus) -> Tuple[List[Document], Set[int]]:
    """Return the documents whose keys are new, in file order, and the old keys now gone.

    If not corpus.kept_all, a key that is gone may only have left the sample.
    """
    added = [document for document in corpus.documents if document.key not in old_keys]
    return added, set(old_keys) - {document.key for document in corpus.documents}


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

SPECIAL_NAMES = ("<|endoftext|>",)  # how the special ids are shown; text never encodes to them
END_OF_TEXT = 0
FIRST_BYTE = len(SPECIAL_NAMES)
FIRST_MERGE = FIRST_BYTE + 256
TOKENIZER_FORMAT = "macrogpt-tokenizer"
TOKENIZER_FORMAT_VERSION = 1
CACHED_PRE_TOKENS = 1 << 15
CACHED_PRE_TOKEN_CHARS = 64  # longer ones seldom repeat and would make the cache's size unbounded

# The pattern of GPT-2, spelled for ASCII. Under re.ASCII `\s` leaves out \x1c..\x1f, as it must.
PRE_TOKEN = re.compile(
    r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", re.ASCII)
SURROGATE_BYTES = re.compile(rb"(\xed[\xa0-\xbf][\x80-\xbf])")


def pre_tokens(text: str) -> List[str]:
    """Return the pieces that merges never cross; joined, they are `text` again.

    The cut is that of GPT-2 (Radford et al. 2019): contractions, then letters, numbers and other
    signs, each with at most one space before, then white space. A character that this Python's
    `unicodedata` does not know yet counts as a sign; a newer Unicode may call it a letter.
    """
    if text.isascii():
        return PRE_TOKEN.findall(text)
    stand_ins = {ord(char): _ascii_stand_in(char) for char in set(text)}
    shadow = text.translate(stand_ins)  # as long as the text, so spans carry over
    return [text[match.start():match.end()] for match in PRE_TOKEN.finditer(shadow)]


def _ascii_stand_in(char: str) -> str:
    """Return an ASCII character that PRE_TOKEN treats as it should treat `char`."""
    if char.isascii():
        return char
    if char.isspace():  # beyond ASCII this is exactly Unicode's White_Space
        return "\t"  # not " ", which may open a word
    # Neither "a" nor "!" can take part in a contraction such as 's, which is ASCII alone.
    return {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")


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


class _Utf8Decoder(codecs.BufferedIncrementalDecoder):
    """Incremental UTF-8 that keeps encoded surrogates and shows other malformed bytes as U+FFFD.

    The byte 0xED never continues a character, so cutting before an encoded surrogate cuts no
    character in two, and both rules can hold in one stream.
    """

    def _buffer_decode(self, data: bytes, errors: str, final: bool) -> Tuple[str, int]:
        *settled, tail = SURROGATE_BYTES.split(data)  # every second piece is one surrogate
        texts = [piece.decode("utf-8", "surrogatepass" if index % 2 else "replace")
                 for index, piece in enumerate(settled)]
        tail_text, used = codecs.utf_8_decode(tail, "replace", final)
        return "".join(texts) + tail_text, len(data) - len(tail) + used


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
        new_id = self.vocab_size
        left, right = pair
        if not (FIRST_BYTE <= left < new_id and FIRST_BYTE <= right < new_id):
            raise ValueError(f"merge {self.version} joins ids {pair}; "
                             f"expected two ids from {FIRST_BYTE} to {new_id - 1}")
        spelling = self._joined_bytes(pair)
        if spelling in self._spelled:
            raise ValueError(f"merge {self.version} spells {spelling!r}; expected a new spelling")
        self._merges.append(pair)
        self._id_of_pair[pair] = new_id
        self._bytes_of_id.append(spelling)
        self._spelled.add(spelling)
        self._cache.clear()

    def _joined_bytes(self, pair: Pair) -> bytes:
        return self._bytes_of_id[pair[0]] + self._bytes_of_id[pair[1]]

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
        """The number of merges, which is the `merge_limit` that repeats today's encodings."""
        return len(self._merges)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes an id stands for, none for a special; ValueError if out of range."""
        if not 0 <= token_id < len(self._bytes_of_id):
            raise ValueError(f"token id {token_id} is outside the vocabulary; "
                             f"expected 0 to {self.vocab_size - 1}")
        return self._bytes_of_id[token_id]

    def encode(self, text: str, merge_limit: Optional[int] = None) -> List[int]:
        """Return the ids of `text` under the first `merge_limit` merges (None: all of them).

        Any str has an encoding, lone surrogates included, and no text encodes to a special id.
        Fills the cache. Raises ValueError unless 0 <= merge_limit <= version.
        Measured on 1 MB of English manuals, 1,024 merges, Python 3.11: 0.13 s warm, 0.25 s cold.
        """
        limit = self.version if merge_limit is None else merge_limit
        if not 0 <= limit <= self.version:
            raise ValueError(f"merge_limit is {limit}; expected 0 to {self.version}")
        cache = self._cache if limit == self.version else {}
        ids: List[int] = []
        for piece in pre_tokens(text):
            piece_ids = cache.get(piece)
            if piece_ids is None:
                piece_ids = self._encode_piece(piece, limit)
                if len(cache) >= CACHED_PRE_TOKENS:
                    cache.clear()
                if len(piece) <= CACHED_PRE_TOKEN_CHARS:
                    cache[piece] = piece_ids
            ids += piece_ids
        return ids

    def _encode_piece(self, piece: str, limit: int) -> List[int]:
        """Merge one pre-token's bytes, lowest rank first, in passes over the whole piece.

        One pass may join all of a pair's places: what it makes can only take part in later ranks.
        Time grows with the piece's length times the number of different merges that apply.
        """
        ids = [FIRST_BYTE + byte for byte in piece.encode("utf-8", "surrogatepass")]
        none = FIRST_MERGE + limit
        while len(ids) > 1:
            first = min(self._id_of_pair.get(pair, none) for pair in zip(ids, ids[1:]))
            if first >= none:
                break
            ids = _replace_pair(ids, self._merges[first - FIRST_MERGE], first)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`: decode(encode(text)) == text for every str.

        Specials give no text. Bytes that are not UTF-8 give U+FFFD, except that an encoded
        surrogate gives that surrogate. Raises ValueError for an id out of range.
        """
        return _Utf8Decoder().decode(b"".join(map(self.token_bytes, ids)), final=True)

    def learn_merges(self, texts: Iterable[str], count: int, min_pair_count: int = 2) -> int:
        """Append up to `count` merges learned from `texts`; return how many were appended.

        Each is the commonest pair of neighbouring ids within pre-tokens (overlaps count: "aaa"
        has two) under all merges so far; of equally common pairs, the one with the lowest ids.
        A pair that spells a token already known is passed over. Stops early when no pair occurs
        `min_pair_count` times. The order of `texts` has no effect.
        Raises ValueError for a single str in place of `texts`, count < 0 or min_pair_count < 1.
        Measured on 50 KB of English manuals, 400 merges, Python 3.11: 0.06 s.
        """
        if isinstance(texts, str):
            raise ValueError("texts is one str; expected several texts, such as [text]")
        if count < 0 or min_pair_count < 1:
            raise ValueError(f"count is {count} and min_pair_count {min_pair_count}; "
                             "expected count >= 0 and min_pair_count >= 1")
        weights: Counter[str] = Counter()
        for text in texts:
            weights.update(pre_tokens(text))
        tally = _PairTally((self._encode_piece(piece, self.version), weight)
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
        """Return the stored form: JSON that names its format and version and lists the merges."""
        document = {"format": TOKENIZER_FORMAT, "format_version": TOKENIZER_FORMAT_VERSION,
                    "merges": self._merges}
        return json.dumps(document, separators=(",", ":")).encode("ascii")

    @classmethod
    def unpack(cls, blob: bytes) -> EvolvingTokenizer:
        """Return the tokenizer that `pack` stored; ValueError says what is wrong with a bad blob.

        Measured with 1,024 merges, Python 3.11: 0.9 ms.
        """
        try:
            document = json.loads(blob)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tokenizer blob is not JSON ({error}); "
                             f"expected {TOKENIZER_FORMAT}") from error
        fields = document if isinstance(document, dict) else {}
        found = [fields.get("format"), fields.get("format_version")]
        expected = [TOKENIZER_FORMAT, TOKENIZER_FORMAT_VERSION]
        if found != expected:
            raise ValueError(f"tokenizer blob has format and version {found}; expected {expected}")
        merges = fields.get("merges")
        if not isinstance(merges, list):
            raise ValueError(f"tokenizer blob has merges {merges!r:.60}; expected a list of pairs")
        for pair in merges:
            if not (isinstance(pair, list) and [type(part) for part in pair] == [int, int]):
                raise ValueError(f"tokenizer blob has merge {pair!r:.60}; expected two integers")
        return cls(map(tuple, merges))


class StreamDecoder:
    """Turns ids into text one at a time and never shows half a character.

    What `feed` and the last `flush` return, joined, equals `decode` of the same ids, whatever
    the ids: both follow one error rule. A special gives no text and leaves a begun character open.
    """

    def __init__(self, tokenizer: EvolvingTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = _Utf8Decoder()

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

    __hash__ = tuple.__hash__


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


def put_part(part: F32, n: int, out: F32, at: int, keep: int) -> None:
    """Set n numbers of out, from out[at] on, to those of part, or add them if keep."""
    for i in range(n):
        out[at + i] = part[i] + (out[at + i] if keep > 0 else 0.0)


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
        put_part(part, n, out, at, keep)


BLOCK_ROWS, BLOCK_VECTORS = 6, 2  # what 16 vector registers hold; 32 of them hold 8 by 3


def multiply(a: F32, b: F32, out: F32, rows: int, inner: int, cols: int, a_row: int, a_step: int,
             b_step: int, b_col: int, keep: int) -> None:
    """Set out[r, c], or add to it if keep, Σ a[r, k]·b[k, c] over k, in blocks held in registers.

    a[r, k] stands at r·a_row + k·a_step, b[k, c] at k·b_step + c·b_col; out is (rows, cols). A
    panel of a block's columns and 256 steps of b lies packed in the first cache while all rows
    pass.
    """
    panel = [0.0] * (2048 * BLOCK_VECTORS)
    line = [splat8(0.0)] * BLOCK_VECTORS
    wide = 8 * BLOCK_VECTORS
    for k0 in range(0, inner, 256):
        depth = min(inner - k0, 256)
        for j0 in range(0, cols, wide):
            width = min(cols - j0, wide)
            for k in range(depth):
                for j in range(width):
                    panel[k * wide + j] = b[(k0 + k) * b_step + (j0 + j) * b_col]
                for j in range(width, wide):
                    panel[k * wide + j] = 0.0
            for i0 in range(0, rows - BLOCK_ROWS + 1, BLOCK_ROWS):
                sums = [splat8(0.0)] * (BLOCK_ROWS * BLOCK_VECTORS)
                for k in range(depth):
                    for v in range(BLOCK_VECTORS):
                        line[v] = load8(panel, k * wide + 8 * v)
                    at = i0 * a_row + (k0 + k) * a_step
                    for i in range(BLOCK_ROWS):
                        x = a[at + i * a_row]
                        for v in range(BLOCK_VECTORS):
                            sums[i * BLOCK_VECTORS + v] = sums[i * BLOCK_VECTORS + v] + x * line[v]
                for i in range(BLOCK_ROWS):
                    for v in range(BLOCK_VECTORS):
                        put8(sums[i * BLOCK_VECTORS + v], out, (i0 + i) * cols + j0 + 8 * v,
                             width - 8 * v, keep + k0)
            for i in range(rows - rows % BLOCK_ROWS, rows):
                rest = [splat8(0.0)] * BLOCK_VECTORS
                for k in range(depth):
                    x = a[i * a_row + (k0 + k) * a_step]
                    for v in range(BLOCK_VECTORS):
                        rest[v] = rest[v] + x * load8(panel, k * wide + 8 * v)
                for v in range(BLOCK_VECTORS):
                    put8(rest[v], out, i * cols + j0 + 8 * v, width - 8 * v, keep + k0)


def matmul_nt(x: F32, w: F32, out: F32, rows: int, inner: int, cols: int) -> None:
    """Set out (rows, cols) = x (rows, inner) · wᵀ, w being (cols, inner)."""
    for r in range(rows):
        for c in range(cols):
            total = 0.0
            for k in range(inner):
                total += x[r * inner + k] * w[c * inner + k]
            out[r * cols + c] = total


def matmul_nn(g: F32, w: F32, dx: F32, rows: int, inner: int, cols: int) -> None:
    """Add to dx (rows, cols) the product g (rows, inner) · w (inner, cols)."""
    for r in range(rows):
        for c in range(cols):
            total = 0.0
            for k in range(inner):
                total += g[r * inner + k] * w[k * cols + c]
            dx[r * cols + c] += total


def matmul_tn(g: F32, x: F32, dw: F32, rows: int, inner: int, cols: int) -> None:
    """Add to dw (rows, cols) the product gᵀ · x, g being (inner, rows) and x (inner, cols)."""
    for r in range(rows):
        for c in range(cols):
            total = 0.0
            for k in range(inner):
                total += g[k * rows + r] * x[k * cols + c]
            dw[r * cols + c] += total


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


def attention_forward(qkv: F32, out: F32, lse: F32, starts: I32, segments: int, heads: int,
                      width: int) -> None:
    """Set out (T, H·D) to causal attention inside each segment; lse (T, H) to log Σ exp(scores).

    qkv (T, 3·H·D) holds queries, keys and values side by side; segment s is rows
    starts[s] to starts[s+1]. Scores are q·k/√D.  Source: FlashAttention, arXiv:2205.14135.
    """
    dim = heads * width
    scale = 1.0 / sqrt(width)
    for s in range(segments):
        for h in range(heads):
            for i in range(starts[s], starts[s + 1]):
                q = i * 3 * dim + h * width
                top = -1e30
                total = 0.0
                for c in range(width):
                    out[i * dim + h * width + c] = 0.0
                for j in range(starts[s], i + 1):
                    k = j * 3 * dim + dim + h * width
                    score = 0.0
                    for c in range(width):
                        score += qkv[q + c] * qkv[k + c]
                    score *= scale
                    if score > top:
                        shrink = exp(top - score)
                        total *= shrink
                        for c in range(width):
                            out[i * dim + h * width + c] *= shrink
                        top = score
                    weight = exp(score - top)
                    total += weight
                    for c in range(width):
                        out[i * dim + h * width + c] += weight * qkv[k + dim + c]
                for c in range(width):
                    out[i * dim + h * width + c] /= total
                lse[i * heads + h] = top + log(total)


def attention_backward(g: F32, qkv: F32, out: F32, lse: F32, dqkv: F32, starts: I32,
                       segments: int, heads: int, width: int) -> None:
    """Add to dqkv the gradient of attention_forward; the weights are computed again from lse."""
    dim = heads * width
    scale = 1.0 / sqrt(width)
    for s in range(segments):
        for h in range(heads):
            for i in range(starts[s], starts[s + 1]):
                q = i * 3 * dim + h * width
                o = i * dim + h * width
                common = 0.0
                for c in range(width):
                    common += g[o + c] * out[o + c]
                for j in range(starts[s], i + 1):
                    k = j * 3 * dim + dim + h * width
                    score = 0.0
                    grad = 0.0
                    for c in range(width):
                        score += qkv[q + c] * qkv[k + c]
                        grad += g[o + c] * qkv[k + dim + c]
                    weight = exp(score * scale - lse[i * heads + h])
                    grad = weight * (grad - common) * scale
                    for c in range(width):
                        dqkv[q + c] += grad * qkv[k + c]
                        dqkv[k + c] += grad * qkv[q + c]
                        dqkv[k + dim + c] += weight * g[o + c]


def clear(x: F32, at: int, n: int) -> None:
    """Set n numbers of x, from x[at] on, to zero."""
    for i in range(at, at + n):
        x[i] = 0.0


def copy_block(x: F32, at: int, step: int, rows: int, width: int, out: F32, to: int, row_step: int,
               col_step: int) -> None:
    """Set out[to + r·row_step + c·col_step] to x[at + r·step + c] for rows by width numbers."""
    for r in range(rows):
        for c in range(width):
            out[to + r * row_step + c * col_step] = x[at + r * step + c]


TILE = 8  # queries that attention looks at together; keys come in sixteens


def tile_product(x: F32, left: int, left_step: int, right: int, step: int, depth: int, n: int,
                 to: int) -> None:
    """Set a tile's rows at `to` to the products of its rows at `left` with `depth` rows at `right`.

    Rows of the left are left_step apart, those of the right and of the result, n numbers, step.
    """
    for j in range(0, n, 8):
        sums = [splat8(0.0)] * TILE
        for k in range(depth):
            row = load8(x, right + k * step + j)
            for i in range(TILE):
                sums[i] = sums[i] + x[left + i * left_step + k] * row
        for i in range(TILE):
            store8(x, to + i * step + j, sums[i])


def tile_spread(x: F32, weights: int, stride: int, rows: int, wide: int, n: int, to: int) -> None:
    """Add to each of n rows at `to` a tile's rows at `rows`, by its weights."""
    for c in range(0, wide, 8):
        part = [splat8(0.0)] * TILE
        for i in range(TILE):
            part[i] = load8(x, rows + i * wide + c)
        for j in range(n):
            total = load8(x, to + j * wide + c)
            for i in range(TILE):
                total = total + x[weights + i * stride + j] * part[i]
            store8(x, to + j * wide + c, total)


def softmax_row(x: F32, at: int, n: int, blocks: int, scale: float) -> float:
    """Make n scores at x[at] weights that sum to 1; return the log of Σ exp(scale·score).

    The rest of so many blocks of 16 numbers becomes 0: whole blocks leave no loop a remainder.
    """
    for j in range(at + n, at + 16 * blocks):
        x[j] = -1e30
    top = -1e30
    for j in range(16 * blocks):
        top = max(top, x[at + j])
    total = 0.0
    for j in range(16 * blocks):
        weight = exp((x[at + j] - top) * scale)
        x[at + j] = weight
        total += weight
    share = 1.0 / total
    for j in range(16 * blocks):
        x[at + j] *= share
    return top * scale + log(total)


def softmax(x: F32, n: int) -> float:
    """Make n logits probabilities; return the log of the sum of their exponentials."""
    top = x[0]
    for i in range(n):
        top = max(top, x[i])
    total = 0.0
    for i in range(n):
        x[i] = exp(x[i] - top)
        total += x[i]
    for i in range(n):
        x[i] /= total
    return top + log(total)


def slopes_row(x: F32, weights: int, slopes: int, n: int, blocks: int, scale: float, total: float,
               common: float) -> None:
    """Make n scores weights again, from their log-sum, and n passed gradients those of scores.

    The rest of so many blocks of 16 numbers of both becomes 0.
    """
    for j in range(n, 16 * blocks):
        x[weights + j] = -1e30
        x[slopes + j] = 0.0
    for j in range(16 * blocks):
        weight = exp(x[weights + j] * scale - total)
        x[weights + j] = weight
        x[slopes + j] = weight * (x[slopes + j] - common) * scale


def add_rows(x: F32, at: int, wide: int, rows: int, width: int, out: F32, to: int,
             step: int) -> None:
    """Add rows of x, `wide` apart, to rows of out, `step` apart."""
    for r in range(rows):
        for c in range(width):
            out[to + r * step + c] += x[at + r * wide + c]


def attention_forward_tiled(qkv: F32, out: F32, lse: F32, starts: I32, segments: int, heads: int,
                            width: int, x: F32) -> None:
    """Do what attention_forward does, a tile of queries at a time.

    x is room for one head: keys as columns, values as rows an even eight apart, some queries, their
    weights, their results.  A segment of n rows needs (n + 16)·(5·width + 80) numbers.
    """
    dim = heads * width
    wide = (width + 7) // 8 * 8
    scale = 1.0 / sqrt(width)
    for s in range(segments):
        size = starts[s + 1] - starts[s]
        stride = (size + 15) // 16 * 16
        values = width * stride
        queries = values + size * wide
        weights = queries + TILE * wide
        mixed = weights + TILE * stride
        for h in range(heads):
            at = starts[s] * 3 * dim + h * width
            copy_block(qkv, at + dim, 3 * dim, size, width, x, 0, 1, stride)
            copy_block(qkv, at + 2 * dim, 3 * dim, size, width, x, values, wide, 1)
            for first in range(0, size, TILE):
                rows = min(size - first, TILE)
                blocks = (first + rows + 15) // 16
                copy_block(qkv, at + first * 3 * dim, 3 * dim, rows, width, x, queries, wide, 1)
                tile_product(x, queries, wide, 0, stride, width, first + rows, weights)
                for i in range(rows):
                    r = starts[s] + first + i
                    lse[r * heads + h] = softmax_row(x, weights + i * stride, first + i + 1, blocks,
                                                     scale)
                tile_product(x, weights, stride, values, wide, first + rows, wide, mixed)
                o = (starts[s] + first) * dim + h * width
                copy_block(x, mixed, wide, rows, width, out, o, dim, 1)


def attention_backward_tiled(g: F32, qkv: F32, out: F32, lse: F32, dqkv: F32, starts: I32,
                             segments: int, heads: int, width: int, x: F32) -> None:
    """Do what attention_backward does, a tile of queries at a time; x as before."""
    dim = heads * width
    wide = (width + 7) // 8 * 8
    scale = 1.0 / sqrt(width)
    for s in range(segments):
        size = starts[s + 1] - starts[s]
        stride = (size + 15) // 16 * 16
        values = width * stride
        keys = 2 * values
        dkeys = keys + size * wide
        dvalues = dkeys + size * wide
        queries = dvalues + size * wide
        grads = queries + TILE * wide
        weights = grads + TILE * wide
        slopes = weights + TILE * stride
        mixed = slopes + TILE * stride
        for h in range(heads):
            at = starts[s] * 3 * dim + h * width
            copy_block(qkv, at + dim, 3 * dim, size, width, x, 0, 1, stride)
            copy_block(qkv, at + 2 * dim, 3 * dim, size, width, x, values, 1, stride)
            copy_block(qkv, at + dim, 3 * dim, size, width, x, keys, wide, 1)
            clear(x, dkeys, 2 * size * wide)
            for first in range(0, size, TILE):
                rows = min(size - first, TILE)
                blocks = (first + rows + 15) // 16
                o = (starts[s] + first) * dim + h * width
                copy_block(qkv, at + first * 3 * dim, 3 * dim, rows, width, x, queries, wide, 1)
                copy_block(g, o, dim, rows, width, x, grads, wide, 1)
                tile_product(x, queries, wide, 0, stride, width, first + rows, weights)
                tile_product(x, grads, wide, values, stride, width, first + rows, slopes)
                for i in range(rows):
                    common = 0.0
                    for c in range(width):
                        common += g[o + i * dim + c] * out[o + i * dim + c]
                    slopes_row(x, weights + i * stride, slopes + i * stride, first + i + 1, blocks,
                               scale, lse[(starts[s] + first + i) * heads + h], common)
                clear(x, weights + rows * stride, (TILE - rows) * stride)
                clear(x, slopes + rows * stride, (TILE - rows) * stride)
                tile_product(x, slopes, stride, keys, wide, first + rows, wide, mixed)
                tile_spread(x, slopes, stride, queries, wide, first + rows, dkeys)
                tile_spread(x, weights, stride, grads, wide, first + rows, dvalues)
                add_rows(x, mixed, wide, rows, width, dqkv, at + first * 3 * dim, 3 * dim)
            add_rows(x, dkeys, wide, size, width, dqkv, at + dim, 3 * dim)
            add_rows(x, dvalues, wide, size, width, dqkv, at + 2 * dim, 3 * dim)


def attention_cached(q: F32, at: int, keys: F32, values: F32, out: F32, to: int, length: int,
                     block: int, heads: int, width: int, x: F32, spare: int) -> None:
    """Set H·D numbers of out, from out[to] on, to the attention of one query over a cache.

    The query's H·D numbers begin at q[at]; keys and values are (H·D, block), of which `length`
    slots are filled. x has room for block + 16 numbers from x[spare] on.
    """
    scale = 1.0 / sqrt(width)
    blocks = (length + 15) // 16
    for h in range(heads):
        clear(x, spare, length)
        for c in range(h * width, (h + 1) * width):
            for j in range(length):
                x[spare + j] += q[at + c] * keys[c * block + j]
        softmax_row(x, spare, length, blocks, scale)
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


def penalise(x: F32, n: int, history: I32, recent: int, penalty: float, presence: float,
             frequency: float) -> None:
    """Lower those of n logits whose ids are in history; x[n:2·n] is room to count them."""
    clear(x, n, n)
    for i in range(recent):
        x[n + history[i]] += 1.0
    for i in range(recent):
        t = history[i]
        if x[n + t] > 0.0:
            cost = x[n + t] * frequency + presence
            x[t] = (x[t] / penalty if x[t] > 0.0 else x[t] * penalty) - cost
            x[n + t] = 0.0


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


def typical_part(x: F32, at: int, ids: int, count: int, share: float, to: int) -> int:
    """Keep, of count falling logits and their ids, those of typical surprise; return how many.

    x[to] and on has room for 2·count numbers.
    """
    total = softened(x, at, count, to)
    entropy = 0.0
    for j in range(count):
        x[to + count + j] = log(total) + x[at] - x[at + j]
        entropy += x[to + j] / total * x[to + count + j]
    for j in range(count):
        x[to + count + j] = abs(x[to + count + j] - entropy)
    mass = 0.0
    while mass < share * total:
        best = 0
        for j in range(count):
            if x[to + count + j] < x[to + count + best]:
                best = j
        mass += x[to + best] if x[to + count + best] < 1e30 else total
        x[to + count + best] = 2e30
    kept = 0
    for j in range(count):
        if x[to + count + j] > 1e30:
            x[at + kept] = x[at + j]
            x[ids + kept] = x[ids + j]
            kept += 1
    return kept


def sample_token(logits: F32, n: int, history: I32, recent: int, x: F32, penalty: float,
                 presence: float, frequency: float, past: I32, size: int, multiplier: float,
                 log_base: float, allowed: int, most: float, top_k: int, typical: float,
                 top_p: float, min_p: float, temperature: float, chance: float) -> int:
    """Return the id that the usual chain of samplers draws at chance, from 0 to below 1.

    The chain: penalties for the recent ids, DRY, top-k, typical, top-p, min-p, temperature, as the
    filters of section 9 define them.  x has room for 2·n + 4·top_k + 4 numbers.
    """
    count = min(top_k, n)
    for i in range(n):
        x[i] = logits[i]
    penalise(x, n, history, recent, penalty, presence, frequency)
    if multiplier > 0.0:
        penalise_repeats(x, n, past, size, multiplier, log_base, allowed, most)
    largest(x, n, count, 2 * n)
    at = 2 * n + 1
    ids = at + count + 1
    room = ids + count
    if typical < 1.0:
        count = typical_part(x, at, ids, count, typical, room)
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
        for c in range(vocab):
            if logits[r * vocab + c] > top:
                top = logits[r * vocab + c]
        total = 0.0
        for c in range(vocab):
            total += exp(logits[r * vocab + c] - top)
        lse[r] = top + log(total)
        losses[r] = 0.0
        if targets[r] >= 0:
            losses[r] = lse[r] - logits[r * vocab + targets[r]]


def cross_entropy_backward(logits: F32, targets: I32, lse: F32, dlogits: F32, rows: int,
                           vocab: int, scale: float) -> None:
    """Add to dlogits scale·(softmax − one-hot) for every row whose target is not −1."""
    for r in range(rows):
        if targets[r] >= 0:
            for c in range(vocab):
                dlogits[r * vocab + c] += scale * exp(logits[r * vocab + c] - lse[r])
            dlogits[r * vocab + targets[r]] -= scale


def adamw_step(w: F32, g: F32, m: F32, v: F32, first: int, n: int, rate: float, beta1: float,
               beta2: float, eps: float, decay: float, fix1: float, fix2: float,
               clip: float) -> None:
    """Move w[first:n] one AdamW step down clip·g; fix1, fix2 = 1/(1−βᵗ) undo the moments' bias.

    Source: Decoupled Weight Decay Regularization, arXiv:1711.05101, algorithm 2.
    """
    for i in range(first, n):
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
    exponential, sigmoid, multiply_adds, put_part, put8, multiply, matmul_nt, matmul_nn,
    matmul_tn, add_scaled, dot, gather_rows, scatter_rows, rmsnorm_forward, rmsnorm_backward,
    rope_turn, attention_forward, attention_backward, clear, copy_block, tile_product,
    tile_spread, softmax_row, softmax, slopes_row, add_rows, attention_forward_tiled,
    attention_backward_tiled, attention_cached, row_product, normed_row, decode_block,
    decode_head, penalise, penalise_repeats, largest, softened, typical_part, sample_token,
    swiglu_forward, swiglu_backward, dropout_apply, cross_entropy_forward,
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


class Engine:
    """A table of kernels, reached as attributes, and the buffers they run on.

    typecode is "f" in life; "d" (interpreted only) lets tests difference to full precision.
    `recording` tells the autograd whether to build graphs, `fused` the model to decode a token by
    one kernel a block.
    """

    def __init__(self, name: str, kernels: Dict[str, Callable[..., Any]], typecode: str = "f",
                 pack: Callable[..., Any] = lambda data, rows, dim: data,
                 cache: Optional[Callable[..., Any]] = None) -> None:
        self.name, self.typecode, self.recording = name, typecode, True
        self.pack, self.cache, self.fused = pack, cache or FlatCache, cache is None
        self._zero, self.threads = array(typecode, [0.0]), 1
        own = dir(type(self))
        vars(self).update((name, kernel) for name, kernel in kernels.items() if name not in own)

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


class PackedRows(NamedTuple):
    """Rows as tuples, each beside ½|row|², ready for math.dist."""

    rows: List[Tuple[float, ...]]
    halves: List[float]


class FixedPoint:
    """Numbers counted in a unit, a power of two, by which their norm is less than 2**bits.

    A double of about 1.5·2**52 units shows the count of units in its low bits.
    """

    def __init__(self, data: array, bits: int) -> None:
        """Count the numbers; if one is not finite, the unit and all that comes of it is NaN."""
        parts = [data[at:at + 1024] for at in range(0, len(data), 1024)]
        norm = math.hypot(*[dist(part, (0.0,) * len(part)) for part in parts])
        self.unit = math.ldexp(1.0, math.frexp(norm)[1] - bits) if isfinite(norm) else math.nan
        self.zero, self.counts = COUNTING * self.unit, array("d")
        for part in parts:
            self.counts.fromlist([x + self.zero for x in part])
        _little_endian(self.counts)

    def scalars(self, part: slice) -> array:
        """Return the counts of some numbers as ints; they must be below 2**31."""
        return _little_endian(array("i", self.counts[part].tobytes()))[::2]


COUNTING = 1.5 * 2.0 ** 52


def _little_endian(numbers: array) -> array:
    """Swap the bytes of numbers between this machine's order and the little-endian one."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


class Lanes:
    """Vectors side by side: the k-th numbers of all are one big int, 64 bits a number.

    A vector times all of them is one multiplication and one addition of big ints for each of its
    numbers: 3.4 ns a multiply-add, beside 7 by math.dist.
    """

    def __init__(self, fixed: FixedPoint, parts: Iterable[slice], size: int) -> None:
        """Take the numbers in parts, `size` each, as the first, second, … ones of the vectors."""
        ones = ((1 << 64 * size) - 1) // ((1 << 64) - 1)
        zeros = int.from_bytes(struct.pack("<d", fixed.zero), "little") * ones
        self.places = [int.from_bytes(fixed.counts[part].tobytes(), "little") - zeros
                       for part in parts]
        self.size, self.unit, self.start = size, fixed.unit, ones << 63
        self.low, self.exponents = ones * ((1 << 52) - 1), ones * (0x433 << 52)

    def times(self, scalars: Sequence[int], unit: float) -> List[float]:
        """Return the products of all vectors with one of scalars, counted in a unit."""
        total = sum(map(mul, self.places, scalars), self.start)
        doubles = total >> 12 & self.low | self.exponents  # of 2**52 and the upper bits of a lane
        sums = _little_endian(array("d", doubles.to_bytes(8 * self.size, "little")))
        zero, unit = COUNTING, self.unit * unit * 4096.0
        return [(x - zero) * unit for x in sums]


class Numbers:
    """A buffer, and its numbers in fixed point, made when first asked for.

    Lanes hold 33 bits and scalars 29, so that no sum of products, which is at most the product of
    both norms, leaves its lane of 64 bits.
    """

    def __init__(self, data: array) -> None:
        self.data = data

    @functools.cached_property
    def fine(self) -> FixedPoint:
        """The numbers as lanes hold them."""
        return FixedPoint(self.data, 33)

    @functools.cached_property
    def coarse(self) -> FixedPoint:
        """The numbers as scalars hold them."""
        return FixedPoint(self.data, 29)


class Vectors:
    """The rows of a matrix, or its columns, in the forms that products like."""

    def __init__(self, numbers: Numbers, count: int, size: int, far: int, near: int) -> None:
        """Take `count` vectors, `far` apart, of `size` numbers, `near` apart."""
        self.numbers, self.shape = numbers, (count, size, far, near)
        self.parts = [slice(i * far, i * far + size * near, near) for i in range(count)]

    @functools.cached_property
    def tuples(self) -> PackedRows:
        """The vectors as tuples."""
        return pack_tuples([tuple(self.numbers.data[part]) for part in self.parts])

    @functools.cached_property
    def lanes(self) -> Lanes:
        """The vectors as lanes."""
        count, size, far, near = self.shape
        across = [slice(k * near, k * near + count * far, far) for k in range(size)]
        return Lanes(self.numbers.fine, across, count)

    def times(self, others: "Vectors") -> Iterator[List[float]]:
        """Yield, for each of the others, its products with all of these."""
        if self.numbers.data.typecode == "d":  # asks for more than fixed point has
            return dots(others.tuples, self.tuples)
        fixed = others.numbers.coarse
        return (self.lanes.times(fixed.scalars(part), fixed.unit) for part in others.parts)


class PackedMatrix:
    """A matrix (rows, dim) as the products of the interpreted engine like it."""

    def __init__(self, data: array, rows: int, dim: int) -> None:
        self.numbers, self.shape = Numbers(data), (rows, dim)

    @functools.cached_property
    def rows(self) -> Vectors:
        """The rows."""
        rows, dim = self.shape
        return Vectors(self.numbers, rows, dim, dim, 1)

    @functools.cached_property
    def columns(self) -> Vectors:
        """The columns."""
        rows, dim = self.shape
        return Vectors(self.numbers, dim, rows, 1, dim)


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
    """What FlatCache is, in the form that math.dist likes: keys as tuples, values as columns.

    Beside them stand half their squared norms, kept up to date with every write.
    """

    def __init__(self, engine: Engine, block: int, heads: int, width: int) -> None:
        self.block, self.heads, self.width, self.origin = block, heads, width, (0.0,) * width
        self.keys: List[List[Tuple[float, ...]]] = [[] for _ in range(heads)]
        self.halves: List[List[float]] = [[] for _ in range(heads)]
        self.columns: List[Tuple[float, ...]] = [()] * (heads * width)
        self.column_halves = [0.0] * (heads * width)

    def write(self, slot: int, keys: array, values: array) -> None:
        """Store one token's keys and values, H·D numbers each, in place of what was in the slot."""
        for h in range(self.heads):
            key = tuple(keys[h * self.width:(h + 1) * self.width])
            length = dist(key, self.origin)
            self.keys[h][slot:slot + 1] = [key]
            self.halves[h][slot:slot + 1] = [0.5 * length * length]
        if slot < len(self.columns[0]):
            self.column_halves = [half - 0.5 * column[slot] * column[slot]
                                  for half, column in zip(self.column_halves, self.columns)]
            self.columns = [column[:slot] + (value,) + column[slot + 1:]
                            for column, value in zip(self.columns, values)]
        else:
            self.columns = [column + (value,) for column, value in zip(self.columns, values)]
        self.column_halves = [half + 0.5 * value * value
                              for half, value in zip(self.column_halves, values)]
        if slot + 1 == self.block:  # summed anew once a round, so that no rounding piles up
            self.column_halves = pack_tuples(self.columns).halves

    def attend(self, q: array, length: int, out: array) -> None:
        """Set out (H·D) to the attention of the query over every slot written."""
        width, scale = self.width, 1.0 / sqrt(self.width)
        for h in range(self.heads):
            query, part = tuple(q[h * width:(h + 1) * width]), slice(h * width, (h + 1) * width)
            near = zip(self.halves[h], map(dist, repeat(query), self.keys[h]))
            scores = [k - 0.5 * d * d for k, d in near]  # less ½|q|², which no softmax sees
            top = max(scores)
            weights = tuple([exp((s - top) * scale) for s in scores])
            total, half = sum(weights), 0.5 * sum(map(mul, weights, weights))
            moved = zip(self.column_halves[part], map(dist, repeat(weights), self.columns[part]))
            out[part] = array(out.typecode, [(half + v - 0.5 * d * d) / total for v, d in moved])


Matrix = Union[array, PackedMatrix]


def rows_of(data: Sequence[float], dim: int) -> List[Tuple[float, ...]]:
    """Return the rows of a flat buffer as tuples of length dim."""
    return list(zip(*[iter(data)] * dim))


def pack_tuples(rows: List[Tuple[float, ...]]) -> PackedRows:
    """Return tuples beside half their squared norms."""
    if not rows:
        return PackedRows([], [])
    origin = (0.0,) * len(rows[0])
    return PackedRows(rows, [0.5 * d * d for d in map(dist, rows, repeat(origin))])


def dots(a: PackedRows, b: PackedRows) -> Iterator[List[float]]:
    """Yield, for each row of a, its dot products with every row of b."""
    for row, half in zip(*a):
        yield [half + h - 0.5 * d * d for h, d in zip(b.halves, map(dist, repeat(row), b.rows))]


def _packed(x: Union[array, PackedMatrix], rows: int, dim: int) -> PackedMatrix:
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
    for r, row in enumerate(w.rows.times(x.rows)):
        out[r * cols:(r + 1) * cols] = array(out.typecode, row)


def lane_matmul_nn(g: Matrix, w: Matrix, dx: array, rows: int, inner: int, cols: int) -> None:
    """Do what matmul_nn does."""
    g, w = _packed(g, rows, inner), _packed(w, inner, cols)
    _add_columns(dx, g.rows.times(w.columns), cols)


def lane_matmul_tn(g: Matrix, x: Matrix, dw: array, rows: int, inner: int, cols: int) -> None:
    """Do what matmul_tn does."""
    g, x = _packed(g, inner, rows), _packed(x, inner, cols)
    _add_columns(dw, g.columns.times(x.columns), cols)


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


def map_gather_rows(table: array, ids: Sequence[int], out: array, rows: int, dim: int) -> None:
    """Do what gather_rows does."""
    for r, i in enumerate(ids):
        out[r * dim:(r + 1) * dim] = table[i * dim:(i + 1) * dim]


def map_rmsnorm_forward(x: array, out: array, inverse: array, rows: int, dim: int,
                        eps: float) -> None:
    """Do what rmsnorm_forward does."""
    origin = (0.0,) * dim
    for r, row in enumerate(rows_of(x, dim)):
        length = dist(row, origin)
        inverse[r] = factor = 1.0 / sqrt(length * length / dim + eps)
        out[r * dim:(r + 1) * dim] = array(out.typecode, [factor * x for x in row])


def map_rmsnorm_backward(g: array, out: array, inverse: array, dx: array, rows: int,
                         dim: int) -> None:
    """Do what rmsnorm_backward does."""
    for r, (slopes, normed) in enumerate(zip(rows_of(g, dim), rows_of(out, dim))):
        mean, factor = sum(map(mul, slopes, normed)) / dim, inverse[r]
        part = slice(r * dim, (r + 1) * dim)
        dx[part] = array(dx.typecode, [d + factor * (a - b * mean)
                                       for d, a, b in zip(dx[part], slopes, normed)])


def map_rope_turn(x: array, table: array, out: array, rows: int, dim: int, turned: int,
                  width: int, sign: float) -> None:
    """Do what rope_turn does."""
    heads = turned // width
    for r in range(rows):
        at, end = r * dim, r * dim + turned
        cosines = table[r * width:(r + 1) * width:2] * heads
        sines = [sign * s for s in table[r * width + 1:(r + 1) * width:2]] * heads
        pairs = list(zip(x[at:end:2], x[at + 1:end:2], cosines, sines))
        out[at:end:2] = array(out.typecode, [
            o + a * c - b * s for o, (a, b, c, s) in zip(out[at:end:2], pairs)])
        out[at + 1:end:2] = array(out.typecode, [
            o + a * s + b * c for o, (a, b, c, s) in zip(out[at + 1:end:2], pairs)])
        rest = slice(end, at + dim)
        out[rest] = array(out.typecode, map(add, out[rest], x[rest]))


def _sigmoids(gates: Iterable[float]) -> List[float]:
    return [1.0 / (1.0 + exp(-x)) if x > -700.0 else 0.0 for x in gates]


def map_swiglu_forward(x: array, out: array, rows: int, dim: int) -> None:
    """Do what swiglu_forward does."""
    for r in range(rows):
        at = 2 * r * dim
        gated = zip(x[at:at + dim], x[at + dim:at + 2 * dim])
        out[r * dim:(r + 1) * dim] = array(out.typecode, [
            z * up / (1.0 + exp(-z)) if z > -700.0 else 0.0 * up for z, up in gated])


def map_swiglu_backward(g: array, x: array, dx: array, rows: int, dim: int) -> None:
    """Do what swiglu_backward does."""
    for r in range(rows):
        at = 2 * r * dim
        gate, up = slice(at, at + dim), slice(at + dim, at + 2 * dim)
        slopes, gates = g[r * dim:(r + 1) * dim], x[gate]
        opened = _sigmoids(gates)
        dx[gate] = array(dx.typecode, [
            d + a * u * s * (1.0 + z * (1.0 - s))
            for d, a, u, s, z in zip(dx[gate], slopes, x[up], opened, gates)])
        dx[up] = array(dx.typecode, [
            d + a * z * s for d, a, z, s in zip(dx[up], slopes, gates, opened)])


def dist_attention_forward(qkv: array, out: array, lse: array, starts: Sequence[int],
                           segments: int, heads: int, width: int) -> None:
    """Do what attention_forward does, one head of one segment at a time."""
    dim, scale = heads * width, 1.0 / sqrt(width)
    for first, last in _filled(starts):
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
            _set_head_rows(out, _causal_mix(weights, v), first, dim, h * width, width)


def dist_attention_backward(g: array, qkv: array, out: array, lse: array, dqkv: array,
                            starts: Sequence[int], segments: int, heads: int,
                            width: int) -> None:
    """Do what attention_backward does, one head of one segment at a time."""
    dim, scale = heads * width, 1.0 / sqrt(width)
    for first, last in _filled(starts):
        for h in range(heads):
            at = h * width
            q, k, v = (_head_rows(qkv, first, last, 3 * dim, part * dim + at, width)
                       for part in range(3))
            dy = _head_rows(g, first, last, dim, at, width)
            common = map(sum, (map(mul, a, b) for a, b in
                               zip(dy, _head_rows(out, first, last, dim, at, width))))
            weights, slopes = [], []
            for i, (scores, row, c) in enumerate(zip(_causal_dots(q, k), _causal_dots(dy, v),
                                                     common)):
                total = lse[(first + i) * heads + h]
                weights.append([exp(s * scale - total) for s in scores])
                slopes.append([w * (d - c) * scale for w, d in zip(weights[-1], row)])
            falls, spread = _turned(slopes), _turned(weights)
            for part, moved in ((0, _causal_mix(slopes, k)),
                                (1, reversed(list(_causal_mix(falls, q[::-1])))),
                                (2, reversed(list(_causal_mix(spread, dy[::-1]))))):
                _add_head_rows(dqkv, moved, first, 3 * dim, part * dim + at, width)


def _filled(starts: Sequence[int]) -> List[Tuple[int, int]]:
    """Return the first and last row of every segment that has rows."""
    return [(first, last) for first, last in zip(starts, starts[1:]) if first < last]


def _head_rows(data: array, first: int, last: int, stride: int, at: int,
               width: int) -> List[Tuple[float, ...]]:
    """Return rows first to last of one head, which begins `at` numbers into each row."""
    return [tuple(data[r * stride + at:r * stride + at + width]) for r in range(first, last)]


def _set_head_rows(out: array, rows: Iterable[List[float]], first: int, stride: int, at: int,
                   width: int) -> None:
    for r, row in enumerate(rows, first):
        out[r * stride + at:r * stride + at + width] = array(out.typecode, row)


def _add_head_rows(out: array, rows: Iterable[List[float]], first: int, stride: int, at: int,
                   width: int) -> None:
    for r, row in enumerate(rows, first):
        part = slice(r * stride + at, r * stride + at + width)
        out[part] = array(out.typecode, map(add, out[part], row))


def _causal_dots(a: List[Tuple[float, ...]], b: List[Tuple[float, ...]]) -> Iterator[List[float]]:
    """Yield for each row of a its products with the rows of b up to its own."""
    left, right = pack_tuples(a), pack_tuples(b)
    for i, (row, half) in enumerate(zip(*left), 1):
        near = zip(right.halves[:i], map(dist, repeat(row), right.rows))
        yield [half + h - 0.5 * d * d for h, d in near]


def _causal_mix(triangle: List[Sequence[float]], rows: List[Tuple[float, ...]]
                ) -> Iterator[List[float]]:
    """Yield for each row of a lower triangle the rows mixed by it.

    So many rows at a time are filled up with zeros to one length, less than half of the square.
    """
    columns = list(zip(*rows))
    for first in range(0, len(rows), MIXED_AT_ONCE):
        some = triangle[first:first + MIXED_AT_ONCE]
        length = len(some[-1])
        filled = [(*row, *(0.0,) * (length - len(row))) for row in some]
        yield from dots(pack_tuples(filled), pack_tuples([c[:length] for c in columns]))


MIXED_AT_ONCE = 16


def _turned(triangle: List[List[float]]) -> List[Tuple[float, ...]]:
    """Return the columns of a lower triangle, last first and each from below: a lower triangle."""
    size = len(triangle)
    columns = zip(*[row + [0.0] * (size - len(row)) for row in reversed(triangle)])
    return [column[:size - j] for j, column in enumerate(columns)][::-1]


def _log_sum_exp(scores: Sequence[float]) -> float:
    top = max(scores)
    return top + log(sum([exp(s - top) for s in scores]))


def map_cross_entropy_forward(logits: array, targets: Sequence[int], lse: array, losses: array,
                              rows: int, vocab: int) -> None:
    """Do what cross_entropy_forward does."""
    for r, target in enumerate(targets):
        row = logits[r * vocab:(r + 1) * vocab]
        lse[r] = total = _log_sum_exp(row)
        losses[r] = total - row[target] if target >= 0 else 0.0


def map_cross_entropy_backward(logits: array, targets: Sequence[int], lse: array, dlogits: array,
                               rows: int, vocab: int, scale: float) -> None:
    """Do what cross_entropy_backward does."""
    for r, target in enumerate(targets):
        if target >= 0:
            part, total = slice(r * vocab, (r + 1) * vocab), lse[r]
            slopes = [d + scale * exp(x - total) for d, x in zip(dlogits[part], logits[part])]
            slopes[target] -= scale
            dlogits[part] = array(dlogits.typecode, slopes)


def map_adamw_step(w: array, g: array, m: array, v: array, first: int, n: int, rate: float,
                   beta1: float, beta2: float, eps: float, decay: float, fix1: float, fix2: float,
                   clip: float) -> None:
    """Do what adamw_step does, in three list comprehensions (0.25 µs a number, loops 0.7)."""
    slopes = g[first:n]
    keep1, keep2 = (1.0 - beta1) * clip, (1.0 - beta2) * clip * clip
    firsts = [beta1 * a + keep1 * x for a, x in zip(m[first:n], slopes)]
    seconds = [beta2 * a + keep2 * x * x for a, x in zip(v[first:n], slopes)]
    step, left = rate * fix1, 1.0 - rate * decay
    w[first:n] = array(w.typecode, [
        left * x - step * a / (sqrt(b * fix2) + eps)
        for x, a, b in zip(w[first:n], firsts, seconds)])
    m[first:n], v[first:n] = array(m.typecode, firsts), array(v.typecode, seconds)


TWINS: Tuple[Tuple[str, Callable[..., Any]], ...] = (
    ("matmul_nt", lane_matmul_nt), ("matmul_nn", lane_matmul_nn), ("matmul_tn", lane_matmul_tn),
    ("add_scaled", map_add_scaled), ("dot", map_dot), ("softmax", map_softmax),
    ("gather_rows", map_gather_rows),
    ("rmsnorm_forward", map_rmsnorm_forward), ("rmsnorm_backward", map_rmsnorm_backward),
    ("rope_turn", map_rope_turn), ("swiglu_forward", map_swiglu_forward),
    ("swiglu_backward", map_swiglu_backward), ("attention_forward", dist_attention_forward),
    ("attention_backward", dist_attention_backward),
    ("cross_entropy_forward", map_cross_entropy_forward),
    ("cross_entropy_backward", map_cross_entropy_backward), ("adamw_step", map_adamw_step))


def reference_engine(typecode: str = "f") -> Engine:
    """Return an engine that runs every kernel exactly as it is written."""
    return Engine("reference", {kernel.__name__: kernel for kernel in KERNELS}, typecode)


def interpreted_engine(typecode: str = "f") -> Engine:
    """Return the engine that needs nothing but Python: kernels, with their fast twins."""
    table = {kernel.__name__: kernel for kernel in KERNELS}
    table.update(TWINS)
    return Engine("python", table, typecode, PackedMatrix, TupleCache)


# The compiled engine: a walk over the syntax tree of each kernel writes C, the system's compiler
# makes a library of it, a child process compares every kernel in it with its Python, and only then
# gets the library its name in the cache. The key is the whole program, the compiler, the processor.

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
    "splat8": ("((v8){{0}} + {0})", "Vector8", "float")}
C_OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.FloorDiv: "/",
               ast.Mod: "%", ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==",
               ast.NotEq: "!=", ast.BitXor: "^", ast.RShift: ">>"}
UNROLLED = 16  # a loop over a constant range up to this is written out


class CKernel:
    """A kernel as C.  What is outside the subset raises EngineError with the line and the reason.

    Every name keeps one kind from its first assignment on; expressions come as (code, kind).
    A kernel may call those above it.
    """

    def __init__(self, tree: ast.FunctionDef, above: Optional[Dict[str, "CKernel"]] = None,
                 constants: Optional[Dict[str, int]] = None) -> None:
        self.name, self._above, self._constants = tree.name, above or {}, dict(constants or {})
        given = tree.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.defaults:
            self._refuse(tree, "parameters other than plain ones")
        self.kinds = {arg.arg: self._named(arg.annotation) for arg in given.args}
        self.given = tuple(self.kinds.values())
        self._locals: Dict[str, str] = {}
        self.result = getattr(tree.returns, "id", "void")
        if not tree.returns or self.result not in ("void", "int", "float"):
            self._refuse(tree, "a result other than None, int and float")
        body = self._block(tree.body)
        heads = ", ".join(f"{C_TYPES[kind]} {name}" for name, kind in zip(self.kinds, self.given))
        inner = "static inline " if "Vector8" in self.given else ""  # no caller from outside
        self.code = (f"{inner}{C_TYPES.get(self.result, self.result)} {self.name}({heads}) {{\n"
                     + "".join(self._locals.values()) + body + "}\n")

    def _named(self, node: Any) -> str:
        if not isinstance(node, ast.Name) or node.id not in C_TYPES:
            self._refuse(node, "a parameter needs a type of the subset: " + ", ".join(C_TYPES))
        return node.id

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
        value = node.value
        if isinstance(value, ast.Constant):  # the docstring
            return ""
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "store8":
            self._count(value, 3)
            where, at, vector = (self._code(arg, kind) for arg, kind in zip(
                value.args, ("F32", "int", "Vector8")))
            return f"*(v8 *)({where} + {at}) = {vector};\n"
        if isinstance(value, ast.Call):
            return f"{self._code(value)};\n"
        return self._refuse(node, "an expression without effect")

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
        code, kind = self._number(value.left.elts[0])
        name = self._declare(target, kind, size)
        if size > UNROLLED:
            return f"for (int i = 0; i < {size}; i++) {name}[i] = {code};\n"
        return "".join(f"{name}[{i}] = {code};\n" for i in range(size))

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

    def _count(self, node: Any, count: int) -> None:
        if len(node.args) != count or node.keywords:
            self._refuse(node, f"a call of {node.func.id} with other than {count} arguments")

    def _of_Call(self, node: Any) -> Tuple[str, str]:
        name = getattr(node.func, "id", "")
        codes = [self._code(arg) for arg in node.args]
        if name in self._above:
            self._count(node, len(self._above[name].given))
            for arg, kind in zip(node.args, self._above[name].given):
                self._code(arg, kind, "int" if kind == "float" else kind)
            return f"{name}({', '.join(codes)})", self._above[name].result
        if name not in C_CALLS:
            self._refuse(node, f"a call of {name or 'something'}")
        form, kind, *given = C_CALLS[name]
        self._count(node, len(given))
        for arg, kinds in zip(node.args, given):
            self._code(arg, *kinds.split())
        return form.format(*codes), kind or min(self._number(arg)[1] for arg in node.args)


def c_source(kernels: Sequence[Callable[..., Any]], registers: int = 16) -> str:
    """Return the C of the kernels, for a processor with so many vector registers.

    Raises EngineError, also where there is no source to read.
    """
    try:
        trees = [ast.parse(inspect.getsource(kernel)).body[0] for kernel in kernels]
    except (OSError, SyntaxError) as error:
        raise EngineError(f"the kernels' source cannot be read ({error}); keep macrogpt.py whole")
    source, above = C_PRELUDE, {}
    rows, vectors = (8, 3) if registers >= 32 else (BLOCK_ROWS, BLOCK_VECTORS)
    blocks = {"BLOCK_ROWS": rows, "BLOCK_VECTORS": vectors, "TILE": TILE}
    for tree in trees:
        above[tree.name] = CKernel(tree, above, blocks)  # type: ignore[arg-type]
        source += above[tree.name].code
    return source


C_FLAGS = ("-O3", "-ffast-math", "-fPIC", "-std=gnu99", "-w", "-fno-semantic-interposition")
C_TUNING = ("-march=native", "-mcpu=native")  # which of them a compiler knows, it must be asked
KEPT_LIBRARIES = 8
COMPILE_SECONDS = 60.0
ANSWER_SECONDS = 5.0
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
    with tempfile.TemporaryDirectory(dir=folder) as place:
        source, thing, library = (os.path.join(place, name) for name in ("k.c", "k.o", "k.so"))
        with open(source, "w", encoding="utf-8") as file:
            file.write(c_source(KERNELS, 32 if "avx512vl" in _cpu_features() else 16))
        # two steps: fast-math at the link would change the arithmetic of the whole process
        _run([*compiler, *C_FLAGS, *_tuning(compiler), "-c", source, "-o", thing], COMPILE_SECONDS)
        _run([*compiler, "-shared", thing, "-o", library, "-lm"], COMPILE_SECONDS)
        _run([sys.executable, "-c", CHECK_CODE, os.path.abspath(__file__), library],
             COMPILE_SECONDS)  # a crash in there only costs that process
        final = os.path.join(folder, _library_name(compiler))
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


def _drop_old_libraries(folder: str) -> None:
    """Remove the libraries of earlier programs, but for the newest."""
    paths = [os.path.join(folder, name) for name in os.listdir(folder)
             if name.startswith("kernels-")]
    with contextlib.suppress(OSError):  # another process may do the same
        for path in sorted(paths, key=os.path.getmtime)[:-KEPT_LIBRARIES]:
            os.unlink(path)


CHECK_CODE = """
import importlib, os, sys
folder, name = os.path.split(sys.argv[1])
sys.path.insert(0, folder)
importlib.import_module(os.path.splitext(name)[0]).check_library(sys.argv[2])
"""


def load_kernels(path: str) -> Dict[str, Callable[..., Any]]:
    """Return the kernels of a compiled library, to be called like those in Python."""
    import ctypes
    with contextlib.suppress(AttributeError, OSError):  # glibc: freed buffers stay ours, so that
        for option in (-1, -3):  # a step finds its memory without a page fault (1.2 times faster)
            ctypes.CDLL(None).mallopt(option, 1 << 30)
    library, kinds = ctypes.CDLL(path), {"int": ctypes.c_long, "float": ctypes.c_float}
    table = {}
    for kernel in KERNELS:
        *given, result = kernel.__annotations__.values()
        if "Vector8" in given:  # for other kernels only
            continue
        function = getattr(library, kernel.__name__)
        function.argtypes = [kinds.get(kind, ctypes.c_void_p) for kind in given]
        function.restype = kinds.get(result)
        table[kernel.__name__] = _by_address(function, given)
    return table


def _by_address(function: Any, kinds: Sequence[str]) -> Callable[..., Any]:
    """Return a function that takes buffers where the compiled one takes addresses."""
    def call(*args: Any) -> Any:
        held = [array("i", arg) if kind == "I32" and type(arg) is not array else arg
                for kind, arg in zip(kinds, args)]
        return function(*[arg.buffer_info()[0] if type(arg) is array else arg for arg in held])
    return call


def sample_calls(rng: random.Random) -> Iterator[Tuple[str, List[Any]]]:
    """Yield a small call of every kernel that can be called from outside, with numbers of rng."""
    def some(n: int) -> array:
        return array("f", [rng.gauss(0.0, 1.0) for _ in range(n)])

    yield from _product_calls(some)
    yield from _attention_calls(some)
    yield from _decoding_calls(some)
    yield from _learning_calls(some)


def _product_calls(some: Callable[[int], array]) -> Iterator[Tuple[str, List[Any]]]:
    rows, dim, width = 7, 24, 8
    yield "multiply", [some(9 * 260), some(260 * 29), some(9 * 29), 9, 260, 29, 260, 1, 1, 260, 0]
    yield "multiply", [some(9 * 13), some(9 * 17), some(13 * 17), 13, 9, 17, 1, 13, 17, 1, 1]
    for name in ("matmul_nt", "matmul_nn", "matmul_tn"):
        yield name, [some(rows * 9), some(9 * dim), some(rows * dim), rows, 9, dim]
    yield "multiply_adds", [some(96), 5, 0.25]
    yield "exponential", [-3.7]
    yield "sigmoid", [-0.4]
    yield "add_scaled", [some(dim), some(dim), dim, 0.7]
    yield "dot", [some(dim), some(dim), dim]
    yield "clear", [some(dim), 2, 9]
    yield "put_part", [some(16), 11, some(40), 3, 0]
    yield "put_part", [some(16), 11, some(40), 3, 1]
    yield "copy_block", [some(60), 3, 11, 5, 6, some(60), 2, 8, 1]
    yield "copy_block", [some(60), 3, 11, 5, 6, some(60), 2, 1, 8]
    yield "add_rows", [some(60), 1, 9, 5, 6, some(60), 3, 11]
    yield "gather_rows", [some(4 * dim), array("i", [3, 0, 3]), some(3 * dim), 3, dim]
    yield "scatter_rows", [some(3 * dim), array("i", [3, 0, 3]), some(4 * dim), 3, dim]
    yield "rmsnorm_forward", [some(rows * dim), some(rows * dim), some(rows), rows, dim, 1e-5]
    yield "rmsnorm_backward", [some(rows * dim), some(rows * dim), some(rows), some(rows * dim),
                               rows, dim]
    yield "rope_turn", [some(rows * dim), some(rows * width), some(rows * dim), rows, dim, 16,
                        width, -1.0]
    yield "swiglu_forward", [some(rows * 2 * dim), some(rows * dim), rows, dim]
    yield "swiglu_backward", [some(rows * dim), some(rows * 2 * dim), some(rows * 2 * dim), rows,
                              dim]


def _attention_calls(some: Callable[[int], array]) -> Iterator[Tuple[str, List[Any]]]:
    rows, dim, heads, width = 11, 24, 3, 8
    qkv, out, lse = some(rows * 3 * dim), some(rows * dim), some(rows * heads)
    shape = [array("i", [0, 2, rows]), 2, heads, width]
    attention_forward(qkv, out, lse, *shape)
    yield "attention_forward", [qkv, some(rows * dim), some(rows * heads), *shape]
    yield "attention_backward", [some(rows * dim), qkv, out, lse, some(rows * 3 * dim), *shape]
    room = [0.0] * ((rows + 16) * (5 * width + 80))
    yield "attention_forward_tiled", [qkv, some(rows * dim), some(rows * heads), *shape,
                                      array("f", room)]
    yield "attention_backward_tiled", [some(rows * dim), qkv, out, lse, some(rows * 3 * dim),
                                       *shape, array("f", room)]
    yield "tile_product", [some(320), 1, 8, 70, 16, 6, 11, 180]
    yield "tile_product", [some(350), 1, 16, 130, 8, 11, 8, 230]
    yield "tile_spread", [some(400), 1, 16, 130, 8, 11, 200]
    yield "softmax_row", [some(40), 3, 19, 2, 0.5]
    yield "softmax", [some(40), 37]
    yield "slopes_row", [some(40), 0, 20, 11, 1, 0.5, 1.5, 0.2]


def _decoding_calls(some: Callable[[int], array]) -> Iterator[Tuple[str, List[Any]]]:
    dim, heads, width = 24, 3, 8
    cache = [some(10 * dim), some(10 * dim)]
    yield "attention_cached", [some(dim), 0, *cache, some(dim), 0, 6, 10, heads, width, some(26), 0]
    yield "row_product", [some(7 * dim), some(40), 3, some(9), 2, 7, dim]
    yield "normed_row", [some(dim), some(dim), dim, 0.7, 1e-5]
    yield "decode_head", [some(dim), some(9 * dim), some(9), some(dim), dim, 9, 0.7, 1e-5]
    yield "decode_block", [some(dim), some(3 * dim * dim), some(dim * dim), some(2 * 32 * dim),
                           some(dim * 32), some(width), *cache, some(5 * dim + 3 * 32 + 26), dim,
                           heads, 32, 6, 7, 10, 1e-5]
    past = array("i", [5, 3, 7, 3, 39, 5, 3, 7, 3])
    dry = 0.8, 0.5, 2, 9.0
    yield "penalise", [some(80), 40, past, 9, 1.3, 0.2, 0.1]
    yield "penalise_repeats", [array("f", [*some(40), *([0.0] * 40)]), 40, past, 9, *dry]
    yield "largest", [some(60), 40, 7, 40]
    falling = array("f", sorted(some(12), reverse=True))
    yield "softened", [array("f", [*falling, *some(12)]), 0, 10, 12]
    yield "typical_part", [array("f", [*falling, *range(12), *some(24)]), 0, 12, 12, 0.6, 24]
    yield "sample_token", [some(40), 40, past, 9, some(200), 1.3, 0.2, 0.1, past, 9, *dry, 12, 0.9,
                           0.9, 0.02, 0.8, 0.6]


def _learning_calls(some: Callable[[int], array]) -> Iterator[Tuple[str, List[Any]]]:
    dim, logits, targets = 24, some(3 * 24), array("i", [5, -1, 23])
    yield "dropout_apply", [some(dim), some(dim), dim, 0.3, 12345]
    lse, losses = some(3), some(3)
    cross_entropy_forward(logits, targets, lse, losses, 3, dim)
    yield "cross_entropy_forward", [logits, targets, some(3), some(3), 3, dim]
    yield "cross_entropy_backward", [logits, targets, lse, some(3 * dim), 3, dim, 0.5]
    moments = [array("f", map(abs, some(dim))) for _ in range(2)]
    yield "adamw_step", [some(dim), some(dim), *moments, 2, dim, 0.01, 0.9, 0.99, 1e-8, 0.1, 1.5,
                         2.5, 0.8]


def check_library(path: str) -> None:
    """Compare every compiled kernel with its Python.  Raises EngineError when they differ."""
    compiled, plain = load_kernels(path), {kernel.__name__: kernel for kernel in KERNELS}
    for name, args in sample_calls(random.Random(1)):
        other = [array(arg.typecode, arg) if isinstance(arg, array) else arg for arg in args]
        results = [compiled[name](*args)], [plain[name](*other)]
        for mine, theirs in zip([*args, array("f", [results[0][0] or 0.0])],
                                [*other, array("f", [results[1][0] or 0.0])]):
            if isinstance(mine, array) and not all(
                    abs(a - b) <= 1e-4 * (1.0 + abs(b)) for a, b in zip(mine, theirs)):
                raise EngineError(f"the compiled {name} does not do what its Python does; "
                                  f"try another compiler with CC")


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
        if path and os.path.exists(path):
            with contextlib.suppress(OSError, AttributeError):  # what cannot be loaded is made anew
                return NativeEngine(load_kernels(path))
        if not build:
            raise EngineError("the kernels have not been compiled yet; train once")
        if folder:
            return NativeEngine(load_kernels(_compile_unless_it_hangs(
                compiler, folder, path + ".hung", patient, clock)))
        with tempfile.TemporaryDirectory() as place:  # what is loaded needs no file any more
            return NativeEngine(load_kernels(_compile(compiler, place)))
    except (OSError, ImportError, AttributeError) as error:
        raise EngineError(f"the compiled kernels cannot be used ({error}); "
                          f"set CC to another compiler") from None


ELEMENT_WORK = 10  # multiply-adds that a number costs where rows are normed, turned or gated
PARALLEL_WORK = 4_000_000  # multiply-adds from which a second thread is worth its waking (50 µs)


class NativeEngine(Engine):
    """The engine of a table of compiled kernels; products and attention are done in tiles.

    Kernels run without the interpreter's lock, so `threads` of them may work side by side. Each
    computes rows or segments of its own, so that the result does not depend on their number.
    """

    def __init__(self, compiled: Dict[str, Callable[..., Any]]) -> None:
        super().__init__("native", compiled)
        self.compiled, self.threads = compiled, 1

    @functools.cached_property
    def _pool(self) -> Any:
        from concurrent.futures import ThreadPoolExecutor
        return ThreadPoolExecutor(max(1, self.threads - 1))

    def _share(self, count: int, step: int, work: Callable[[int, int], Any], size: int) -> None:
        """Do work(first, last) on all of range(count), in pieces that are multiples of step."""
        piece = -(-count // (step * self.threads)) * step
        if self.threads == 1 or size < PARALLEL_WORK or piece >= count:
            work(0, count)
            return
        others = [self._pool.submit(work, first, min(first + piece, count))
                  for first in range(piece, count, piece)]
        work(0, piece)
        for other in others:
            other.result()

    def _product(self, a: array, b: array, out: array, rows: int, inner: int, cols: int,
                 *steps: int) -> None:
        at, to = a.buffer_info()[0], out.buffer_info()[0]

        def some_rows(first: int, last: int) -> None:
            self.compiled["multiply"](at + 4 * first * steps[0], b, to + 4 * first * cols,
                                      last - first, inner, cols, *steps)
        self._share(rows, 24, some_rows, rows * inner * cols)

    def matmul_nt(self, x: array, w: array, out: array, rows: int, inner: int, cols: int) -> None:
        """Do what the kernel of this name does."""
        if rows == 1:
            self.compiled["matmul_nt"](x, w, out, rows, inner, cols)
        else:
            self._product(x, w, out, rows, inner, cols, inner, 1, 1, inner, 0)

    def matmul_nn(self, g: array, w: array, dx: array, rows: int, inner: int, cols: int) -> None:
        """Do what the kernel of this name does."""
        self._product(g, w, dx, rows, inner, cols, inner, 1, cols, 1, 1)

    def matmul_tn(self, g: array, x: array, dw: array, rows: int, inner: int, cols: int) -> None:
        """Do what the kernel of this name does."""
        self._product(g, x, dw, rows, inner, cols, 1, rows, cols, 1, 1)

    def _by_rows(self, name: str, buffers: Sequence[array], rows: int, dim: int,
                 *rest: Any) -> None:
        """Run a kernel that treats each of so many rows by itself."""
        steps = [buffer.itemsize * (len(buffer) // rows if rows else 0) for buffer in buffers]

        def some_rows(first: int, last: int) -> None:
            self.compiled[name](*[buffer.buffer_info()[0] + first * step
                                  for buffer, step in zip(buffers, steps)],
                                last - first, dim, *rest)
        self._share(rows, 1, some_rows, ELEMENT_WORK * rows * dim)

    def rope_turn(self, x: array, table: array, out: array, rows: int, *rest: Any) -> None:
        """Do what the kernel of this name does."""
        self._by_rows("rope_turn", (x, table, out), rows, *rest)

    def rmsnorm_forward(self, x: array, out: array, inverse: array, rows: int, *rest: Any) -> None:
        """Do what the kernel of this name does."""
        self._by_rows("rmsnorm_forward", (x, out, inverse), rows, *rest)

    def rmsnorm_backward(self, g: array, out: array, inverse: array, dx: array,
                         *shape: int) -> None:
        """Do what the kernel of this name does."""
        self._by_rows("rmsnorm_backward", (g, out, inverse, dx), *shape)

    def swiglu_forward(self, x: array, out: array, *shape: int) -> None:
        """Do what the kernel of this name does."""
        self._by_rows("swiglu_forward", (x, out), *shape)

    def swiglu_backward(self, g: array, x: array, dx: array, *shape: int) -> None:
        """Do what the kernel of this name does."""
        self._by_rows("swiglu_backward", (g, x, dx), *shape)

    def attention_forward(self, *args: Any) -> None:
        """Do what the kernel of this name does."""
        self._attend("attention_forward_tiled", *args)

    def attention_backward(self, *args: Any) -> None:
        """Do what the kernel of this name does."""
        self._attend("attention_backward_tiled", *args)

    def _attend(self, name: str, *args: Any) -> None:
        *buffers, starts, segments, heads, width = args
        starts = array("i", starts)
        longest = max([last - first for first, last in zip(starts, starts[1:])], default=0)

        def some_segments(first: int, last: int) -> None:
            room = self._zero * ((longest + 16) * (5 * width + 80))
            self.compiled[name](*buffers, starts[first:last + 1], last - first, heads, width, room)
        self._share(segments, 1, some_segments, longest * longest * segments * heads * width)


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
# A Value knows its parents and how to push its gradient to them. ScalarValue is one number;
# VectorValue is a stack of vectors over one flat buffer. `backward` walks the graph once, without
# recursion, and takes it apart behind itself: what has flowed back need not be remembered.


class Value:
    """A node of the graph: parents, a gradient, and a way to push that gradient on."""

    __slots__ = ("grad", "parents", "push", "needs_grad", "__weakref__")

    def __init__(self, needs_grad: bool = False) -> None:
        self.grad: Any = None
        self.parents: Tuple["Value", ...] = ()
        self.push: Optional[Callable[[Any], None]] = None
        self.needs_grad = needs_grad

    def connect(self, parents: Sequence["Value"], push: Callable[[Any], None]) -> None:
        """Record where this value came from; push(grad) must not hold the value itself."""
        self.parents = tuple(p for p in parents if p.needs_grad)
        self.needs_grad = bool(self.parents)
        self.push = push if self.needs_grad else None

    def release(self) -> None:
        """Forget the parents, so that the graph can die."""
        self.parents, self.push = (), None


class ScalarValue(Value):
    """One float that can be added, multiplied, raised, and differentiated."""

    __slots__ = ("data",)

    def __init__(self, data: float, needs_grad: bool = True) -> None:
        super().__init__(needs_grad)
        self.data, self.grad = float(data), 0.0

    def _join(self, data: float, *slopes: Tuple["ScalarValue", float]) -> "ScalarValue":
        """Return a value whose gradient reaches each parent times its slope."""
        def push(grad: float) -> None:
            for parent, slope in slopes:
                parent.grad += slope * grad
        result = ScalarValue(data)
        result.connect([parent for parent, _ in slopes], push)
        return result

    def __add__(self, other: Union["ScalarValue", float]) -> "ScalarValue":
        other = _scalar(other)
        return self._join(self.data + other.data, (self, 1.0), (other, 1.0))

    def __mul__(self, other: Union["ScalarValue", float]) -> "ScalarValue":
        other = _scalar(other)
        return self._join(self.data * other.data, (self, other.data), (other, self.data))

    def __pow__(self, power: float) -> "ScalarValue":
        return self._join(self.data ** power, (self, power * self.data ** (power - 1.0)))

    def exp(self) -> "ScalarValue":
        """Return e to this value."""
        result = exp(self.data)
        return self._join(result, (self, result))

    def log(self) -> "ScalarValue":
        """Return the natural logarithm.  Raises ValueError at 0 and below."""
        return self._join(log(self.data), (self, 1.0 / self.data))

    def __neg__(self) -> "ScalarValue":
        return self * -1.0

    def __sub__(self, other: Union["ScalarValue", float]) -> "ScalarValue":
        return self + _scalar(other) * -1.0

    def __truediv__(self, other: Union["ScalarValue", float]) -> "ScalarValue":
        return self * _scalar(other) ** -1.0

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: float) -> "ScalarValue":
        return _scalar(other) - self

    def __rtruediv__(self, other: float) -> "ScalarValue":
        return _scalar(other) / self

    def __repr__(self) -> str:
        return f"ScalarValue({self.data:g})"


def _scalar(x: Union[ScalarValue, float]) -> ScalarValue:
    return x if isinstance(x, ScalarValue) else ScalarValue(x, needs_grad=False)


class VectorValue(Value):
    """A stack of vectors, shape (rows, dim), over one flat row-major buffer of an engine."""

    __slots__ = ("engine", "rows", "dim", "data")

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
        """Return a copy of row i."""
        if not 0 <= i < self.rows:
            raise ValueError(f"row {i} of {self.rows} rows")
        return self.data[i * self.dim:(i + 1) * self.dim]

    def connect(self, parents: Sequence[Value], push: Callable[[Any], None]) -> None:
        """Record the parents, unless the engine is in a no_grad block."""
        if self.engine.recording:
            super().connect(parents, push)

    def grad_buffer(self) -> array:
        """Return the gradient, zeros at first; the caller adds to it."""
        if self.grad is None:
            self.grad = self.engine.buffer(self.rows * self.dim)
        return self.grad

    def add_grad(self, g: array, scale: float = 1.0) -> None:
        """Add scale·g to the gradient."""
        if self.grad is None and scale == 1.0:
            self.grad = g[:]
        else:
            self.engine.add_scaled(g, self.grad_buffer(), len(g), scale)

    def release(self) -> None:
        """Forget the parents and the gradient, which has been pushed on."""
        super().release()
        self.grad = None


def backward(root: ScalarValue) -> None:
    """Add d root/d leaf to the grad of every leaf below root, and take the graph apart."""
    root.grad = 1.0
    for node in _in_order(root):
        if node.push is not None:
            if node.grad is not None:
                node.push(node.grad)
            node.release()


def _in_order(root: Value) -> List[Value]:
    """Return the graph's nodes, each before its parents.  Iterative: depth costs no stack."""
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
            stack.extend((parent, False) for parent in node.parents)
    order.reverse()
    return order


# ──────────────────────────────────────────────────────────────────────────────────────
# 6 · LAYERS — forward and backward, side by side   uses: 4 5
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Each operation computes its result through the engine and leaves behind a `push` that sends the
# gradient to its inputs. Parameters are values too: leaves that carry their own optimizer state,
# so that a matrix that grows by a row grows everywhere at once.


class MatrixParam(VectorValue):
    """A trainable matrix (rows, dim) with the AdamW moments m and v that belong to it.

    Rows below `frozen_rows` are never changed by the optimizer. `decays` tells whether weight
    decay applies, `pace` multiplies the rate. Rows only append, so a row means the same token for
    ever.
    """

    __slots__ = ("name", "m", "v", "steps", "frozen_rows", "decays", "pace", "changes", "_packed")

    def __init__(self, engine: Engine, name: str, rows: int, dim: int,
                 data: Optional[array] = None, decays: bool = True) -> None:
        super().__init__(engine, rows, dim, data, needs_grad=True)
        self.name, self.decays, self.frozen_rows, self.pace = name, decays, 0, 1.0
        self.m, self.v, self.steps = engine.buffer(rows * dim), engine.buffer(rows * dim), 0
        self.changes = 0  # how often the numbers were written to
        self._packed: Any = None

    @classmethod
    def normal(cls, engine: Engine, name: str, rows: int, dim: int, sigma: float,
               rng: random.Random, decays: bool = True) -> "MatrixParam":
        """Return a matrix of normal numbers with standard deviation sigma."""
        data = engine.buffer_of([rng.gauss(0.0, sigma) for _ in range(rows * dim)])
        return cls(engine, name, rows, dim, data, decays)

    def packed(self) -> Any:
        """Return the data as the engine's matmul_nt likes it, kept until the data changes."""
        if self._packed is None:
            self._packed = self.engine.pack(self.data, self.rows, self.dim)
        return self._packed

    def changed(self) -> None:
        """Tell the matrix that its numbers were written to."""
        self._packed, self.changes = None, self.changes + 1

    def freeze(self, frozen: bool = True) -> None:
        """Keep all present rows from training (or let them train again)."""
        self.frozen_rows = self.rows if frozen else 0
        self.needs_grad = not frozen

    def load(self, data: array) -> None:
        """Replace the numbers.  Raises ValueError when their count is another."""
        if len(data) != self.rows * self.dim:
            raise ValueError(f"{self.name} has shape ({self.rows}, {self.dim}); "
                             f"found {len(data)} numbers")
        self.data = data
        self.changed()

    def rest(self) -> None:
        """Let the optimizer begin anew with this matrix."""
        self.m, self.v = (self.engine.buffer(self.rows * self.dim) for _ in range(2))
        self.steps = 0

    def append_rows(self, numbers: Sequence[float]) -> None:
        """Append rows; moments start at 0, and the new rows train even when the old are frozen."""
        count, rest = divmod(len(numbers), self.dim)
        if rest:
            raise ValueError(f"{self.name} has rows of {self.dim} numbers; found {len(numbers)}")
        blank = self.engine.buffer(len(numbers))
        self.data = self.data + self.engine.buffer_of(numbers)
        self.m, self.v, self.grad = self.m + blank, self.v + blank, None
        self.rows += count
        self.needs_grad = self.frozen_rows < self.rows
        self.changed()

    def narrowed(self, rows: int) -> "MatrixParam":
        """Return a copy of the first rows."""
        return MatrixParam(self.engine, self.name, rows, self.dim, self.data[:rows * self.dim],
                           self.decays)

    def release(self) -> None:
        """Keep the gradient: a parameter is where it is needed."""


def embed(ids: Sequence[int], table: MatrixParam) -> VectorValue:
    """Return the rows of table (V, C) named by ids (T,): (T, C).  Raises ValueError."""
    wanted = array("i", ids)
    if wanted and not 0 <= min(wanted) <= max(wanted) < table.rows:
        raise ValueError(f"ids from {min(wanted)} to {max(wanted)} for {table.rows} rows")
    engine, rows, dim = table.engine, len(wanted), table.dim
    out = VectorValue(engine, rows, dim)
    engine.gather_rows(table.data, wanted, out.data, rows, dim)
    out.connect([table], lambda g: engine.scatter_rows(
        g, wanted, table.grad_buffer(), rows, dim))
    return out


def linear(x: VectorValue, w: MatrixParam) -> VectorValue:
    """Return x (T, C_in) · wᵀ, w (C_out, C_in): (T, C_out).  Raises ValueError on a mismatch."""
    if x.dim != w.dim:
        raise ValueError(f"{w.name} takes vectors of {w.dim}; found {x.dim}")
    engine, rows, inner, cols = x.engine, x.rows, x.dim, w.rows
    out, packed = VectorValue(engine, rows, cols), engine.pack(x.data, rows, inner)
    engine.matmul_nt(packed, w.packed(), out.data, rows, inner, cols)

    def push(g: array) -> None:
        g = engine.pack(g, rows, cols)
        if x.needs_grad:
            engine.matmul_nn(g, w.packed(), x.grad_buffer(), rows, cols, inner)
        if w.needs_grad:
            engine.matmul_tn(g, packed, w.grad_buffer(), cols, rows, inner)
    out.connect([x, w], push)
    return out


def mixed(x: VectorValue, w: MatrixParam) -> VectorValue:
    """Return x (T, R) · w, w (R, C): rows of w mixed in x's proportions (T, C)."""
    if x.dim != w.rows:
        raise ValueError(f"{w.name} mixes {w.rows} rows; found {x.dim} proportions")
    engine, rows, inner, cols = x.engine, x.rows, x.dim, w.dim
    out = VectorValue(engine, rows, cols)
    engine.matmul_nn(x.data, w.data, out.data, rows, inner, cols)

    def push(g: array) -> None:
        if x.needs_grad:
            back = engine.buffer(rows * inner)
            engine.matmul_nt(g, w.packed(), back, rows, cols, inner)
            x.add_grad(back)
        if w.needs_grad:
            engine.matmul_tn(x.data, g, w.grad_buffer(), inner, rows, cols)
    out.connect([x, w], push)
    return out


def added(x: VectorValue, y: VectorValue, scale: float = 1.0) -> VectorValue:
    """Return x + scale·y, all of shape (T, C)."""
    if (x.rows, x.dim) != (y.rows, y.dim):
        raise ValueError(f"shapes ({x.rows}, {x.dim}) and ({y.rows}, {y.dim}) differ")
    engine, n = x.engine, x.rows * x.dim
    out = VectorValue(engine, x.rows, x.dim, x.data[:])
    engine.add_scaled(y.data, out.data, n, scale)

    def push(g: array) -> None:
        if x.needs_grad:
            x.add_grad(g)
        if y.needs_grad:
            y.add_grad(g, scale)
    out.connect([x, y], push)
    return out


def beside(x: VectorValue, y: VectorValue) -> VectorValue:
    """Return (T, A + B): each row of x (T, A) followed by that of y (T, B).  Raises ValueError."""
    if x.rows != y.rows:
        raise ValueError(f"{x.rows} rows cannot stand beside {y.rows}")
    rows, left, right = x.rows, x.dim, y.dim
    wide, out = left + right, VectorValue(x.engine, rows, left + right)
    for t in range(rows):
        out.data[t * wide:t * wide + left] = x.data[t * left:(t + 1) * left]
        out.data[t * wide + left:(t + 1) * wide] = y.data[t * right:(t + 1) * right]

    def push(g: array) -> None:
        for value, dim, at in ((x, left, 0), (y, right, left)):
            if value.needs_grad:
                part = g[:0]
                for start in range(at, rows * wide, wide):
                    part.extend(g[start:start + dim])
                value.add_grad(part)
    out.connect([x, y], push)
    return out


def with_rows(x: VectorValue, places: Sequence[int], y: VectorValue) -> VectorValue:
    """Return x (T, C) with the rows at `places` replaced by those of y, in order."""
    if x.dim != y.dim or len(places) != y.rows:
        raise ValueError(f"{len(places)} rows of {x.dim} are not ({y.rows}, {y.dim})")
    dim, out = x.dim, VectorValue(x.engine, x.rows, x.dim, x.data[:])
    for i, t in enumerate(places):
        out.data[t * dim:(t + 1) * dim] = y.row(i)

    def push(g: array) -> None:
        if y.needs_grad:
            part = g[:0]
            for t in places:
                part.extend(g[t * dim:(t + 1) * dim])
            y.add_grad(part)
        if x.needs_grad:
            rest, nothing = g[:], x.engine.buffer(dim)
            for t in places:
                rest[t * dim:(t + 1) * dim] = nothing
            x.add_grad(rest)
    out.connect([x, y], push)
    return out


def scaled(x: VectorValue, s: MatrixParam) -> VectorValue:
    """Return x times the one number in s (1, 1)."""
    engine, n, factor = x.engine, x.rows * x.dim, s.data[0]
    out = VectorValue(engine, x.rows, x.dim)
    engine.add_scaled(x.data, out.data, n, factor)

    def push(g: array) -> None:
        if x.needs_grad:
            engine.add_scaled(g, x.grad_buffer(), n, factor)
        if s.needs_grad:
            s.grad_buffer()[0] += engine.dot(g, x.data, n)
    out.connect([x, s], push)
    return out


def rmsnorm(x: VectorValue, eps: float = 1e-5) -> VectorValue:
    """Return each row of x (T, C) divided by its root mean square.  Source: arXiv:1910.07467."""
    engine, rows, dim = x.engine, x.rows, x.dim
    out, inverse = VectorValue(engine, rows, dim), engine.buffer(rows)
    engine.rmsnorm_forward(x.data, out.data, inverse, rows, dim, eps)
    data = out.data
    out.connect([x], lambda g: engine.rmsnorm_backward(
        g, data, inverse, x.grad_buffer(), rows, dim))
    return out


def rope_angles(first_pos: int, rows: int, head_dim: int, base: float = 10_000.0) -> List[float]:
    """Return cos and sin of (first_pos+t)·base**(−i/D) for each row t and pair i, interleaved.

    Source: RoFormer, arXiv:2104.09864, §3.2.  Raises ValueError if head_dim is odd.
    """
    if head_dim % 2:
        raise ValueError(f"RoPE turns pairs; found heads of odd width {head_dim}")
    rates = [base ** (-i / head_dim) for i in range(0, head_dim, 2)]
    return [turn(pos * rate) for pos in range(first_pos, first_pos + rows) for rate in rates
            for turn in (math.cos, math.sin)]


def rope_rotate(x: VectorValue, first_pos: int, head_dim: int,
                base: float = 10_000.0) -> VectorValue:
    """Return x (T, C) with each head's pair (i, i+1) of row t turned by (first_pos+t)·base**(−i/D).

    Scores of turned queries and keys depend only on their distance.
    Raises ValueError if head_dim is odd.  Source: RoFormer, arXiv:2104.09864, §3.2.
    """
    angles = x.engine.buffer_of(rope_angles(first_pos, x.rows, head_dim, base))
    return rope_turned(x, angles, head_dim, x.dim)


def rope_turned(x: VectorValue, angles: array, head_dim: int, turned: int) -> VectorValue:
    """Return x (T, C) with its first `turned` channels turned by angles (T, D) of rope_angles.

    So queries and keys turn while the values beside them stay.  Raises ValueError.
    """
    engine, rows, dim = x.engine, x.rows, x.dim
    if turned > dim or turned % head_dim or len(angles) != rows * head_dim:
        raise ValueError(f"{turned} channels and {len(angles)} angles do not fit {rows} rows of "
                         f"heads of width {head_dim}")
    out = VectorValue(engine, rows, dim)
    engine.rope_turn(x.data, angles, out.data, rows, dim, turned, head_dim, 1.0)
    out.connect([x], lambda g: engine.rope_turn(
        g, angles, x.grad_buffer(), rows, dim, turned, head_dim, -1.0))
    return out


def causal_attention(qkv: VectorValue, starts: Sequence[int], n_head: int) -> VectorValue:
    """Return (T, C): each row attends to itself and the earlier rows of its own segment.

    qkv (T, 3C) holds queries, keys, values side by side; starts (S+1,) are the segments' first
    rows and the end.  Source: arXiv:1706.03762, with the memory plan of arXiv:2205.14135.
    """
    engine, rows, dim = qkv.engine, qkv.rows, qkv.dim // 3
    if qkv.dim != 3 * dim or dim % n_head:
        raise ValueError(f"{qkv.dim} channels are not 3 times {n_head} heads")
    bounds, width = array("i", starts), dim // n_head
    if list(bounds) != sorted(bounds) or bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(f"segments must rise from 0 to {rows}; found {list(starts)}")
    out, lse = VectorValue(engine, rows, dim), engine.buffer(rows * n_head)
    shape = (bounds, len(bounds) - 1, n_head, width)
    engine.attention_forward(qkv.data, out.data, lse, *shape)
    data = out.data
    out.connect([qkv], lambda g: engine.attention_backward(
        g, qkv.data, data, lse, qkv.grad_buffer(), *shape))
    return out


def swiglu(x: VectorValue) -> VectorValue:
    """Return silu(gate)·up (T, F) for x (T, 2F) = gates beside ups.  Source: arXiv:2002.05202."""
    engine, rows, dim = x.engine, x.rows, x.dim // 2
    if x.dim % 2:
        raise ValueError(f"{x.dim} channels cannot be halved into gates and ups")
    out = VectorValue(engine, rows, dim)
    engine.swiglu_forward(x.data, out.data, rows, dim)
    out.connect([x], lambda g: engine.swiglu_backward(g, x.data, x.grad_buffer(), rows, dim))
    return out


def dropout(x: VectorValue, rate: float, seed: int) -> VectorValue:
    """Return x with a share `rate` of its numbers zeroed, the rest scaled so the mean stays."""
    if rate == 0.0:
        return x
    engine, n = x.engine, x.rows * x.dim
    out = VectorValue(engine, x.rows, x.dim)
    engine.dropout_apply(x.data, out.data, n, rate, seed)
    out.connect([x], lambda g: engine.dropout_apply(g, x.grad_buffer(), n, rate, seed))
    return out


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
    loss = ScalarValue(sum(losses) / count, needs_grad=False)
    if engine.recording:
        loss.connect([logits], lambda g: engine.cross_entropy_backward(
            logits.data, wanted, lse, logits.grad_buffer(), rows, vocab, g / count))
    return loss, losses


def unlikelihood(logits: VectorValue, targets: Sequence[int]) -> ScalarValue:
    """Return the mean of −ln(1 − p(target)) over the rows with a target: what was not wanted.

    logits (T, V), targets (T,); a target of −1 has no loss. A row's slope is that of its cross
    entropy times −p/(1 − p), so only what the model is likely to say is pushed away.
    Source: Welleck et al., arXiv:1908.04319, §4.
    """
    _, losses = cross_entropy(logits, targets)
    engine, rows, vocab = logits.engine, logits.rows, logits.dim
    count = max(1, rows - list(targets).count(-1))
    chances = [min(MOST_UNWANTED, exp(-nats)) if target >= 0 else 0.0
               for nats, target in zip(losses, targets)]
    loss = ScalarValue(sum(-log(1.0 - p) for p in chances) / count, needs_grad=False)

    def _backward(g: float) -> None:
        grad, wanted = logits.grad_buffer(), array("i", targets)
        lse, slopes = engine.buffer(rows), engine.buffer(rows * vocab)
        engine.cross_entropy_forward(logits.data, wanted, lse, engine.buffer(rows), rows, vocab)
        engine.cross_entropy_backward(logits.data, wanted, lse, slopes, rows, vocab, -g / count)
        for start, p in zip(range(0, rows * vocab, vocab), chances):
            row = grad[start:start + vocab]
            engine.add_scaled(slopes[start:start + vocab], row, vocab, p / (1.0 - p))
            grad[start:start + vocab] = row
    if engine.recording:
        loss.connect([logits], _backward)
    return loss


MOST_UNWANTED = 0.95  # a chance above this pulls no harder, or one token outweighs a batch


class DeltaAdapter:
    """A low-rank change x·(scale·B·A)ᵀ beside a frozen matrix, of no effect when born.

    A (R, C_in) starts normal, B (C_out, R) at zero.  Source: LoRA, arXiv:2106.09685.
    """

    def __init__(self, engine: Engine, name: str, base: MatrixParam, rank: int,
                 rng: random.Random, scale: float = 1.0) -> None:
        self.scale = scale
        self.a = MatrixParam.normal(engine, name + ".a", rank, base.dim, base.dim ** -0.5, rng)
        self.b = MatrixParam(engine, name + ".b", base.rows, rank)

    def rename(self, name: str) -> None:
        """Give both matrices another name."""
        self.a.name, self.b.name = name + ".a", name + ".b"

    def __call__(self, x: VectorValue, y: VectorValue) -> VectorValue:
        """Return y (T, C_out), the frozen matrix's output for x (T, C_in), with the change."""
        return added(y, linear(linear(x, self.a), self.b), self.scale)

    def embed(self, ids: Sequence[int], x: VectorValue) -> VectorValue:
        """Return x (T, C_in), rows `ids` of the frozen matrix, with the change of those rows."""
        return added(x, mixed(embed(ids, self.b), self.a), self.scale)

    def append_rows(self, count: int) -> None:
        """Grow the output by rows without effect, as the base matrix grows."""
        self.b.append_rows([0.0] * (count * self.b.dim))

    def narrowed(self, rows: int) -> "DeltaAdapter":
        """Return an adapter that changes the first rows of the output, and has no others."""
        less = DeltaAdapter.__new__(DeltaAdapter)
        vars(less).update(vars(self), b=self.b.narrowed(rows))
        return less

    def fold_into(self, base: MatrixParam, share: float = 1.0) -> None:
        """Add a share of scale·B·A to base, which, whole, makes the delta itself superfluous."""
        engine, change = base.engine, base.engine.buffer(base.rows * base.dim)
        engine.matmul_nn(self.b.data, self.a.data, change, base.rows, self.a.rows, base.dim)
        engine.add_scaled(change, base.data, len(change), share * self.scale)
        base.changed()


# ──────────────────────────────────────────────────────────────────────────────────────
# 7 · MODEL — ids in, logits out; it knows no text   uses: 0 4 5 6
# ──────────────────────────────────────────────────────────────────────────────────────
#
# The exact Llama form: RMSNorm before attention and before SwiGLU, RoPE on queries and keys, one
# embedding for input and output, no biases. The base learns first; what comes later is appended as
# low-rank deltas beside it, so that nothing once learned is written over. Without a router all
# deltas add up; with one each text is spoken by the base and at most one delta, folded into whole
# matrices: so the newest layer cannot disturb the oldest, and a choice costs no multiplication. New
# words sprout: their rows stand apart, outside the softmax, until they are as good as the spelling
# they shorten.


LAYER_CHANNELS = 36  # channels for each layer: the default model's proportions


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

    def grown_to(self, wanted: "Shape") -> "Shape":
        """Return the shape of the wanted size whose model can say just what one of this can.

        RoPE's base rises so that the pairs of a wider head turn as fast as before, and RMSNorm's
        epsilon falls as its mean is taken over more channels. Raises ConfigError.
        """
        for name in ("n_layer", "n_embd", "n_head", "n_ff", "block_size"):
            old, new = getattr(self, name), getattr(wanted, name)
            if new < old:
                raise ConfigError(f"{name}={new} is less than the {old} that this organism has, "
                                  f"and it only grows; leave it so, or begin another with --db")
        if wanted.head_dim < self.head_dim:
            raise ConfigError(f"n_head={wanted.n_head} would make the heads narrower than the "
                              f"{self.head_dim} channels that they have; set n_embd="
                              f"{wanted.n_head * self.head_dim} too, or begin another with --db")
        for name in ("rope_base", "norm_eps"):
            old, new = getattr(self, name), getattr(wanted, name)
            if old != new:
                raise ConfigError(f"{name}={new} would change what this organism, which has {old}, "
                                  f"has learned; leave it so, or begin another with --db")
        return dataclasses.replace(
            wanted, rope_base=self.rope_base ** (wanted.head_dim / self.head_dim),
            norm_eps=self.norm_eps * self.n_embd / wanted.n_embd)

    def next_size(self) -> "Shape":
        """Return a shape of a layer more, or half as many heads more, as its proportions ask."""
        if self.n_layer * LAYER_CHANNELS <= self.n_embd:
            return dataclasses.replace(self, n_layer=self.n_layer + 1)
        heads = self.n_head + max(1, self.n_head // 2)
        return dataclasses.replace(self, n_head=heads, n_embd=heads * self.head_dim,
                                   n_ff=-(-self.n_ff * heads // self.n_head // 8) * 8)


class KVCache:
    """Keys (already rotated) and values of the newest block_size tokens, for every layer.

    Position p lives in slot p % block, so the newest token overwrites the oldest and a token costs
    the same however long the text has become.
    """

    def __init__(self, engine: Engine, shape: Shape) -> None:
        self.shape, self.position = shape, 0
        self.layers = [engine.cache(engine, shape.block_size, shape.n_head, shape.head_dim)
                       for _ in range(shape.n_layer)]
        self.room = engine.buffer(5 * shape.n_embd + 3 * shape.n_ff + shape.block_size + 16)

    def write(self, layer: int, qkv: VectorValue) -> None:
        """Store the keys and values of qkv's rows from the present position on."""
        dim = self.shape.n_embd
        for row in range(qkv.rows):
            at = row * 3 * dim + dim
            self.layers[layer].write((self.position + row) % self.shape.block_size,
                                     qkv.data[at:at + dim], qkv.data[at + dim:at + 2 * dim])

    def attend(self, layer: int, qkv: VectorValue) -> VectorValue:
        """Return the attention (1, C) of one new row over all that is cached, itself included."""
        self.write(layer, qkv)
        out = VectorValue(qkv.engine, 1, self.shape.n_embd)
        length = min(self.position + 1, self.shape.block_size)
        self.layers[layer].attend(qkv.data[:self.shape.n_embd], length, out.data)
        return out


Delta = Dict[str, DeltaAdapter]
EMBEDDING_SIGMA = 0.05
KEPT_NUMBERS = 8_000_000  # in models with one delta folded in; to fold one takes a millisecond
# Rows that sprout take this many nats off their logits at birth, which measured 0.9 % in place of
# 4.9 % on old text, and learn this much faster than a delta, which measured 1.0 % in place of 1.3 %
# after 50 steps, with 64 merges.
QUIET_NATS = 3.0
SPROUT_PACE = 4.0
MATRIX_GAIN = 0.2  # of 1/√fan_in; 0.2 measured 0.1 bits per character better than 1 in short runs


class GPT:
    """A small Llama with appended deltas: ids to logits."""

    def __init__(self, shape: Shape, vocab_size: int, engine: Engine,
                 rng: Optional[random.Random]) -> None:
        """Draw every matrix from rng, or leave them at zero, to be loaded, when there is none."""
        self.shape, self.engine = shape, engine
        self.params: Dict[str, MatrixParam] = {}
        self.deltas: List[Delta] = []
        self.sprout: Optional[MatrixParam] = None  # rows of ids that come after the embedding's
        self.sprouting = False
        self.lacks: List[List[Tuple[float, Delta]]] = []  # shares of the base a delta never knew
        self.router: Optional[Callable[[Sequence[int]], Optional[int]]] = None
        self._speakers: Dict[Optional[int], Tuple[Any, "GPT"]] = {}
        self.place = 0  # which of the speakers this is: 0 the base, k + 1 delta k
        self._angles: Tuple[Tuple[int, int], array] = (0, 0), engine.buffer(0)
        self._folded: Tuple[Any, Dict[str, MatrixParam]] = None, {}
        dim, calm = shape.n_embd, (2 * shape.n_layer) ** -0.5
        wide, narrow = MATRIX_GAIN * dim ** -0.5, MATRIX_GAIN * shape.n_ff ** -0.5
        self._create("embedding", vocab_size, dim, EMBEDDING_SIGMA, rng, decays=False)
        for i in range(shape.n_layer):
            self._create(f"{i}.qkv", 3 * dim, dim, wide, rng)
            self._create(f"{i}.out", dim, dim, calm * wide, rng)
            self._create(f"{i}.gate_up", 2 * shape.n_ff, dim, wide, rng)
            self._create(f"{i}.down", dim, shape.n_ff, calm * narrow, rng)
        self._create("scale", 1, 1, 0.0, rng, decays=False)
        self.params["scale"].data[0] = 1.0

    def _create(self, name: str, rows: int, dim: int, sigma: float,
                rng: Optional[random.Random], decays: bool = True) -> None:
        self.params[name] = (
            MatrixParam.normal(self.engine, name, rows, dim, sigma, rng, decays) if rng
            else MatrixParam(self.engine, name, rows, dim, decays=decays))

    @property
    def vocab_size(self) -> int:
        """The number of ids it may say: the rows of the embedding, and sprouts while they count."""
        sprouts = self.sprout.rows if self.sprout is not None and self.sprouting else 0
        return self.params["embedding"].rows + sprouts

    @property
    def n_base(self) -> int:
        """The count of numbers in the base."""
        return sum(p.rows * p.dim for p in self.params.values())

    @property
    def n_params(self) -> int:
        """The count of numbers in the base and its deltas."""
        matrices = [*self.params.values(), *self.delta_params()]
        return sum(p.rows * p.dim for p in matrices)

    def delta_params(self) -> Iterator[MatrixParam]:
        """Yield every matrix of every delta."""
        for delta in self.deltas:
            for adapter in delta.values():
                yield adapter.a
                yield adapter.b

    def trainable(self) -> List[MatrixParam]:
        """Return the parameters that learn at present."""
        sprouts = [] if self.sprout is None else [self.sprout]
        return [p for p in (*self.params.values(), *self.delta_params(), *sprouts) if p.needs_grad]

    def _project(self, name: str, x: VectorValue) -> VectorValue:
        """Return x through the named matrix and what the deltas add to it."""
        y = linear(x, self.params[name])
        for delta in self.deltas:
            y = delta[name](x, y)
        return y

    def _embed(self, ids: Sequence[int]) -> VectorValue:
        """Return the embeddings (T, C) of ids; deltas of the tied matrix count here as well."""
        if self.sprout is None or not self.sprouting:
            return self._embed_known(ids)
        old = self.params["embedding"].rows
        places = [t for t, token in enumerate(ids) if token >= old]
        x = self._embed_known([token if token < old else 0 for token in ids])
        return with_rows(x, places, embed([ids[t] - old for t in places], self.sprout))

    def _embed_known(self, ids: Sequence[int]) -> VectorValue:
        """Return the embeddings (T, C) of ids that are no sprouts."""
        x = embed(ids, self.params["embedding"])
        for delta in self.deltas:
            x = delta["embedding"].embed(ids, x)
        return x

    def _blocks(self, x: VectorValue, first_pos: int,
                attend: Callable[[int, VectorValue], VectorValue],
                drop: Callable[[VectorValue], VectorValue] = lambda x: x) -> VectorValue:
        """Return x (T, C) after every block; attend(layer, qkv) mixes the rows."""
        shape, width = self.shape, self.shape.head_dim
        angles = self._angles_of(first_pos, x.rows)
        for i in range(shape.n_layer):
            qkv = self._project(f"{i}.qkv", rmsnorm(x, shape.norm_eps))
            qkv = rope_turned(qkv, angles, width, turned=2 * shape.n_embd)
            x = added(x, drop(self._project(f"{i}.out", attend(i, qkv))))
            gates = self._project(f"{i}.gate_up", rmsnorm(x, shape.norm_eps))
            x = added(x, drop(self._project(f"{i}.down", swiglu(gates))))
        return x

    def _angles_of(self, first_pos: int, rows: int) -> array:
        """Return the rotary angles of some rows; a window's, from where it begins, are kept."""
        shape = self.shape
        at, width = first_pos % shape.block_size, shape.head_dim
        begin, room = first_pos - at, max(shape.block_size, at + rows)
        if self._angles[0] != (begin, room):
            self._angles = (begin, room), self.engine.buffer_of(rope_angles(
                begin, room, width, shape.rope_base))
        return self._angles[1][at * width:(at + rows) * width]

    def _head(self, x: VectorValue) -> VectorValue:
        """Return logits (T, V) for the last block's output (T, C)."""
        x = self._normed(x)
        y = self._project("embedding", x)
        return y if self.sprout is None or not self.sprouting else beside(y, linear(x, self.sprout))

    def _normed(self, x: VectorValue) -> VectorValue:
        """Return what the head reads of the last block's output."""
        return scaled(rmsnorm(x, self.shape.norm_eps), self.params["scale"])

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
        """
        inputs, targets, starts = _stacked(windows)
        return cross_entropy(self.logits(inputs, starts, drop_rate, rng), targets)[0]

    def aversion(self, ids: Sequence[int], first: int) -> ScalarValue:
        """Return the unlikelihood of ids[first:] behind those before them, in nats a token."""
        inputs, targets = list(ids[:-1]), list(ids[1:])
        return unlikelihood(self.logits(inputs), [-1] * (first - 1) + targets[first - 1:])

    def new_cache(self) -> KVCache:
        """Return an empty cache of this model's shape."""
        return KVCache(self.engine, self.shape)

    def feed(self, cache: KVCache, ids: Sequence[int]) -> array:
        """Read new ids into the cache; return the logits (V,) for what comes next.

        Of more than block_size ids only the newest are read.  Raises ValueError for none.
        """
        if not ids:
            raise ValueError("a model must be fed at least one id")
        with self.engine.no_grad():
            newest = ids[-self.shape.block_size:]
            if self.engine.fused and (cache.position or len(newest) == 1):
                return self._decode(cache, newest)
            runs = [newest] if cache.position == 0 else [[i] for i in newest]
            for run in runs:
                x = self._read(cache, run)
            last = VectorValue(self.engine, 1, x.dim, x.row(x.rows - 1))
            return self._head(last).data

    def _read(self, cache: KVCache, ids: Sequence[int]) -> VectorValue:
        """Return the last block's output for ids, which join the cache."""
        def attend(layer: int, qkv: VectorValue) -> VectorValue:
            if qkv.rows == 1:
                return cache.attend(layer, qkv)
            cache.write(layer, qkv)
            return causal_attention(qkv, (0, qkv.rows), self.shape.n_head)
        x = self._blocks(self._embed(ids), cache.position, attend)
        cache.position += len(ids)
        return x

    def _decode(self, cache: KVCache, ids: Sequence[int]) -> array:
        """Return the logits (V,) after ids, which join the cache one by one, a kernel a block."""
        shape, engine, matrices = self.shape, self.engine, self.folded()
        table, dim, block = matrices["embedding"], shape.n_embd, shape.block_size
        weights = [[matrices[f"{i}.{name}"].data for name in ("qkv", "out", "gate_up", "down")]
                   for i in range(shape.n_layer)]
        for token in ids:
            if not 0 <= token < table.rows:
                raise ValueError(f"id {token} for {table.rows} rows")
            x, place = table.row(token), cache.position
            angles = self._angles_of(place, 1)
            for layer, four in zip(cache.layers, weights):
                engine.decode_block(x, *four, angles, layer.keys, layer.values, cache.room, dim,
                                    shape.n_head, shape.n_ff, place % block,
                                    min(place + 1, block), block, shape.norm_eps)
            cache.position += 1
        logits = engine.buffer(table.rows)
        engine.decode_head(x, table.data, logits, cache.room, dim, table.rows,
                           matrices["scale"].data[0], shape.norm_eps)
        return logits

    def folded(self) -> Dict[str, MatrixParam]:
        """Return the matrices with every delta folded in, made anew when one of them changes."""
        if not self.deltas:
            return self.params
        state = len(self.deltas), _changes(self.params.values(), self.deltas)
        if self._folded[0] != state:
            self._folded = state, self._merged([(1.0, delta) for delta in self.deltas])
        return self._folded[1]

    def _merged(self, parts: Sequence[Tuple[float, Delta]]) -> Dict[str, MatrixParam]:
        """Return copies of the base's matrices with shares of deltas added."""
        whole = {name: MatrixParam(self.engine, name, p.rows, p.dim, p.data[:])
                 for name, p in self.params.items()}
        for share, delta in parts:
            for name, adapter in delta.items():
                adapter.fold_into(whole[name], share)
        return whole

    def speaker(self, ids: Sequence[int]) -> "GPT":
        """Return the model as it speaks after ids: itself, or what its router chooses for them."""
        return self.speaker_at(self.place_after(ids))

    @property
    def routed(self) -> bool:
        """Whether there is a choice of who speaks."""
        return self.router is not None and bool(self.deltas)

    def place_after(self, ids: Sequence[int]) -> int:
        """Return who speaks after ids: 0 for the base, or all together, and k + 1 for delta k."""
        chosen = self.router(ids) if self.router is not None and self.deltas else None
        return 0 if chosen is None else chosen + 1

    def speaker_at(self, place: int) -> "GPT":
        """Return the speaker at a place of place_after."""
        return self.with_delta(place - 1 if place else None) if self.routed else self

    def with_delta(self, index: Optional[int]) -> "GPT":
        """Return a model of the base with one delta alone in its matrices, or with none.

        It is kept until one of them changes; to make it costs about as much as a token of text.
        """
        delta = [] if index is None else [(1.0, self.deltas[index])]
        lacks = [] if index is None else self.lacks[index]
        state = self.sprouting, _changes(self.params.values(),
                                         [part for _, part in (*delta, *lacks)])
        kept = self._speakers.get(index)
        if kept is None or kept[0] != state:
            params = self._merged([*delta, *((-share, part) for share, part in lacks)]) \
                if delta else self.params
            self._speakers.pop(index, None)
            if len(self._speakers) * self.n_base >= KEPT_NUMBERS:
                del self._speakers[next(iter(self._speakers))]
            kept = self._speakers[index] = state, self._like(params, [])
            kept[1].place = 0 if index is None else index + 1
        return kept[1]

    def copied(self) -> "GPT":
        """Return a model whose base may change without this one's."""
        other = self._like(self._merged([]), list(self.deltas))
        other.lacks = [list(lacking) for lacking in self.lacks]
        return other

    def learner(self) -> "GPT":
        """Return the model that trains: the base with the newest delta beside it."""
        return self._like(self.params, self.deltas[-1:]) if len(self.deltas) > 1 else self

    def _like(self, params: Dict[str, MatrixParam], deltas: List[Delta]) -> "GPT":
        """Return a model of this shape with other parts, which it shares."""
        other = GPT.__new__(GPT)
        vars(other).update(vars(self), params=params, deltas=deltas, lacks=[[] for _ in deltas],
                           router=None, _speakers={}, _folded=(None, {}))
        return other

    def append_delta(self, rank: int, rng: random.Random) -> None:
        """Freeze everything and append a new delta, of no effect yet, that trains."""
        self.freeze()
        index = len(self.deltas)
        self.lacks.append([])
        self.deltas.append({name: DeltaAdapter(self.engine, f"delta{index}.{name}", base, rank, rng)
                            for name, base in self.params.items() if name != "scale"})

    def freeze(self, frozen: bool = True) -> None:
        """Keep the base and every delta from training; freeze(False) lets the base train."""
        for param in self.params.values():
            param.freeze(frozen)
        for param in self.delta_params():
            param.freeze()

    def fold_oldest_delta(self, share: float = 1.0) -> None:
        """Add a share of the oldest delta to the base; whole, the sum of all stays as it was.

        What each other delta says with the base alone stays as well: it lacks that share from now
        on. But for rounding, only who spoke with the base, or with the oldest, speaks otherwise.
        """
        oldest = self.deltas.pop(0)
        self.lacks.pop(0)
        for name, adapter in oldest.items():
            adapter.fold_into(self.params[name], share)
        for lacking in self.lacks:
            lacking.append((share, oldest))
        self._speakers.clear()
        for index, delta in enumerate(self.deltas):  # named as when they are loaded
            for name, adapter in delta.items():
                adapter.rename(f"delta{index}.{name}")

    def without_delta(self, index: int) -> "GPT":
        """Return a model of the same weights that lacks one delta."""
        return self._like(self.params, self.deltas[:index] + self.deltas[index + 1:])

    def narrowed(self, rows: int) -> "GPT":
        """Return a model of the same weights for which later ids than the first do not exist."""
        def fewer(delta: Delta) -> Delta:
            return {**delta, "embedding": delta["embedding"].narrowed(rows)}
        table = self.params["embedding"].narrowed(rows)
        less = self._like({**self.params, "embedding": table}, list(map(fewer, self.deltas)))
        less.router, less.sprout, less.sprouting = self.router, None, False
        less.lacks = [[(share, fewer(delta)) for share, delta in lacking]
                      for lacking in self.lacks]
        return less

    def draw_embedding(self, rng: random.Random) -> None:
        """Draw every row of the embedding anew."""
        table = self.params["embedding"]
        table.load(self.engine.buffer_of(
            [rng.gauss(0.0, EMBEDDING_SIGMA) for _ in range(table.rows * table.dim)]))

    @contextlib.contextmanager
    def sprouted(self) -> Iterator[None]:
        """Within this the sprouts are ids like all others; without it they do not exist."""
        self.sprouting = True
        try:
            yield
        finally:
            self.sprouting = False

    def grow_sprout(self, merges: Sequence[Tuple[int, int]], sample: Sequence[int]) -> None:
        """Let a row sprout for each merge of two ids: the mean of its parts, but quiet.

        Quiet rows have a few nats taken off their logits, along the mean of what the head reads of
        sample ids; learning then raises them where they belong. Nothing changes until `sprouted`.
        """
        table = (self.params if self.routed else self.folded())["embedding"]
        rows = [table.row(i) for i in range(table.rows)]
        for left, right in merges:
            rows.append(self.engine.buffer_of(
                [(a + b) / 2 for a, b in zip(rows[left], rows[right])]))
        quiet = self._quiet_step(sample)
        numbers = [a - b for row in rows[table.rows:] for a, b in zip(row, quiet)]
        self.load_sprout(self.engine.buffer_of(numbers))

    def load_sprout(self, data: array) -> None:
        """Let rows (n, C) stand as sprouts, to be trained."""
        dim = self.shape.n_embd
        self.sprout = MatrixParam(self.engine, "sprout", len(data) // dim, dim, data, decays=False)
        self.sprout.pace = SPROUT_PACE

    def _quiet_step(self, sample: Sequence[int]) -> List[float]:
        """Return the step (C,) that costs a row QUIET_NATS of its logit on average, or fewer."""
        dim, ids = self.shape.n_embd, list(sample) or [0]
        bounds = [*range(0, len(ids), self.shape.block_size), len(ids)]
        with self.engine.no_grad():
            x = self._normed(self._blocks(self._embed(ids), 0, lambda _, qkv: causal_attention(
                qkv, bounds, self.shape.n_head)))
        mean = [sum(x.data[i::dim]) / max(1, x.rows) for i in range(dim)]
        least = 0.1 * dim * self.params["scale"].data[0] ** 2  # where there is no common direction
        return [QUIET_NATS * part / max(least, sum(a * a for a in mean)) for part in mean]

    def adopt_sprout(self) -> None:
        """Make the sprouts rows of the embedding; what `sprouted` models say, this one now says."""
        assert self.sprout is not None
        table, rows = self.params["embedding"], self.sprout.rows
        frozen = not table.needs_grad
        table.append_rows(self.sprout.data)
        table.freeze(frozen)
        self._lengthen(rows)
        self.sprout = None

    def grow_vocabulary(self, merges: Sequence[Tuple[int, int]]) -> None:
        """Append a row for each merge of two ids: the mean of its parts.  Old logits stay."""
        table = self.params["embedding"]
        for left, right in merges:
            table.append_rows([(a + b) / 2 for a, b in zip(table.row(left), table.row(right))])
        self._lengthen(len(merges))

    def _lengthen(self, count: int) -> None:
        """Let every delta, folded ones included, go with rows that the embedding has gained."""
        folded = {id(delta): delta for lacking in self.lacks for _, delta in lacking}
        for delta in (*self.deltas, *folded.values()):
            adapter = delta["embedding"]
            frozen = not adapter.b.needs_grad
            adapter.append_rows(count)
            adapter.b.freeze(frozen)
        self._speakers.clear()


def _changes(params: Iterable[MatrixParam], deltas: Iterable[Delta]) -> int:
    """Return a number that grows whenever one of the matrices changes."""
    adapters = (adapter for delta in deltas for adapter in delta.values())
    return sum(p.changes for p in params) + sum(a.a.changes + a.b.changes for a in adapters)


Places = List[Tuple[int, float]]


def _as_they_are(count: int, factor: float = 1.0) -> Places:
    return [(i, factor) for i in range(count)]


def _places(old: Shape, new: Shape, kind: str, rows: int) -> Tuple[Places, Places]:
    """Return where a matrix's rows and columns go in a larger one, and by what to multiply them.

    The sum of squares over more channels is divided by more, so what RMSNorm gives is larger by
    √(C'/C), and what reads it is made smaller; attention divides by √D', so queries are larger.
    """
    less = sqrt(old.n_embd / new.n_embd)
    residual, read = _as_they_are(old.n_embd), _as_they_are(old.n_embd, less)
    heads = [(head * new.head_dim + i, 1.0)
             for head in range(old.n_head) for i in range(old.head_dim)]
    sharper = (sqrt(new.head_dim / old.head_dim), 1.0, 1.0)
    return {
        "embedding": (_as_they_are(rows), residual),
        "scale": (_as_they_are(1, less), _as_they_are(1)),
        "qkv": ([(part * new.n_embd + i, sharper[part]) for part in range(3) for i, _ in heads],
                read),
        "out": (residual, heads),
        "gate_up": ([(part * new.n_ff + i, 1.0) for part in range(2) for i in range(old.n_ff)],
                    read),
        "down": (residual, _as_they_are(old.n_ff))}[kind]


def _place(old: MatrixParam, new: MatrixParam, rows: Places, cols: Places) -> None:
    """Write the numbers of old into new at their places."""
    for row, (to_row, by_row) in enumerate(rows):
        for number, (to_col, by_col) in zip(old.row(row), cols):
            new.data[to_row * new.dim + to_col] = number * by_row * by_col
    new.changed()


def _hush(matrix: MatrixParam, rows: int) -> None:
    """Set the first rows of a matrix to zero."""
    matrix.data[:rows * matrix.dim] = matrix.engine.buffer(rows * matrix.dim)
    matrix.changed()


def enlarged(model: GPT, wanted: Shape, rng: random.Random) -> GPT:
    """Return a model of the wanted size that says what this one says, deltas included.

    New layers, heads and SwiGLU units are read by nobody yet, nobody writes to new channels: the
    columns and rows that would are zero, while those before them are drawn, so that both can learn.
    Raises ConfigError.  Source: Net2Net, arXiv:1511.05641, with zeros in place of split copies,
    which any size allows.
    """
    old, new = model.shape, model.shape.grown_to(wanted)
    larger = GPT(new, model.vocab_size, model.engine, rng)
    places = {name: _places(old, new, name.rpartition(".")[2], p.rows)
              for name, p in model.params.items()}
    for name, param in larger.params.items():
        if name.endswith((".out", ".down")) or name in ("embedding", "scale"):
            _hush(param, param.rows)
        elif name.endswith(".qkv") and name in places:
            _hush(param, new.n_embd)  # new queries; keys and values are drawn
        if name in places:
            _place(model.params[name], param, *places[name])
    for delta in model.deltas:
        larger.append_delta(next(iter(delta.values())).a.rows, rng)
        for name, adapter in delta.items():  # of what is new, it has adapters without effect
            wider, (rows, cols) = larger.deltas[-1][name], places[name]
            wider.scale = adapter.scale
            _hush(wider.a, wider.a.rows)
            _place(adapter.a, wider.a, _as_they_are(adapter.a.rows), cols)
            _place(adapter.b, wider.b, rows, _as_they_are(adapter.a.rows))
    return larger


def _stacked(windows: Sequence[Sequence[int]]) -> Tuple[List[int], List[int], List[int]]:
    """Return inputs, targets and segment starts of windows set one after the other."""
    inputs: List[int] = []
    targets: List[int] = []
    starts = [0]
    for window in windows:
        if len(window) < 2:
            raise ValueError(f"a window needs at least 2 ids; found {len(window)}")
        inputs.extend(window[:-1])
        targets.extend(window[1:])
        starts.append(len(inputs))
    return inputs, targets, starts


# ──────────────────────────────────────────────────────────────────────────────────────
# 8 · OPTIMIZER — every matrix keeps its own momentum   uses: 0 6
# ──────────────────────────────────────────────────────────────────────────────────────
#
# AdamW with the gradient clipped by its global norm. Moments and step counts live in the
# parameters, so a matrix that grows or arrives later is served like the others.


@dataclass(frozen=True)
class AdamW:
    """The optimizer's settings; its state is in the parameters.  Source: arXiv:1711.05101."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float

    @classmethod
    def of(cls, config: Config) -> "AdamW":
        """Return the optimizer a Config asks for."""
        return cls(config.beta1, config.beta2, config.eps_adam, config.weight_decay,
                   config.grad_clip)

    def step(self, params: Sequence[MatrixParam], rate: float) -> float:
        """Move every param down its gradient and drop the gradients; return the global norm.

        A norm that is not finite moves nothing: check it with math.isfinite.
        """
        norm = gradient_norm(params)
        if math.isfinite(norm):
            clip = min(1.0, self.clip / norm) if norm > 0.0 else 1.0
            for param in params:
                if param.grad is not None:
                    self._move(param, rate, clip)
        for param in params:
            param.grad = None
        return norm

    def _move(self, param: MatrixParam, rate: float, clip: float) -> None:
        param.steps += 1
        decay = self.weight_decay if param.decays else 0.0
        param.engine.adamw_step(
            param.data, param.grad, param.m, param.v, param.frozen_rows * param.dim,
            param.rows * param.dim, rate * param.pace, self.beta1, self.beta2, self.eps, decay,
            1.0 / (1.0 - self.beta1 ** param.steps), 1.0 / (1.0 - self.beta2 ** param.steps), clip)
        param.changed()


def gradient_norm(params: Sequence[MatrixParam]) -> float:
    """Return the Euclidean norm of all gradients together."""
    total = 0.0
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
# 9 · SAMPLING — the model proposes, a seeded die decides   uses: 4
# ──────────────────────────────────────────────────────────────────────────────────────
# A model ends in one logit per token id; a reply needs one id. Between the two stands a chain of
# small filters, each a pure function from candidates to candidates. Candidates are (logit, id)
# pairs from the most to the least likely, equal logits by lower id: nearly every filter is then a
# cut of a sorted list, and the first pair is always the best. No filter ever empties the list.
# Penalties move only the pairs they touch, so the one full sort per token is the first one.
# Measured with 64 repeated ids in the history (Python 3.11, one slow core), default chain and
# draw: 0.19 ms for 512 logits, 0.42 ms for 1,300.

Candidates = List[Tuple[float, int]]

NO_IDS: FrozenSet[int] = frozenset()
# Every known sampler, in the order llama.cpp runs them.
DEFAULT_SAMPLERS = (
    "penalties", "dry", "top_n_sigma", "top_k", "typical_p", "top_p", "min_p", "xtc", "temperature"
)
GREEDY_BELOW_TEMPERATURE = 1e-6  # a float32 logit divided by less could overflow to infinity
MAX_DRY_LOG_PENALTY = 80.0  # e**80 bans as surely as infinity does, and stays a finite number


def candidates_of(logits: Sequence[float], banned: Container[int] = NO_IDS) -> Candidates:
    """Return the (logit, id) pairs of `logits`, most likely first, equal logits by lower id.

    The ids in `banned` and those whose logit is NaN or -inf are dropped. A logit of +inf means
    certainty: only ids at +inf then stay, as equals with logit 0. Raises ValueError if none stays.
    """
    if len(logits) and not banned and math.isfinite(sum(logits)):
        return sorted(zip(logits, range(len(logits))), key=itemgetter(0), reverse=True)
    floor = -math.inf  # a NaN is not above it either
    pairs = [(x, token) for token, x in enumerate(logits) if x > floor and token not in banned]
    if not pairs:
        raise ValueError(f"no id can be drawn: all {len(logits)} logits are banned, NaN or -inf")
    pairs.sort(key=itemgetter(0), reverse=True)  # stable: equal logits stay in order of id
    if pairs[0][0] == math.inf:
        return [(0.0, token) for logit, token in pairs if logit == math.inf]
    return pairs


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


def keep_top_p(c: Candidates, p: float, min_keep: int = 1) -> Candidates:
    """Return the nucleus: the fewest most likely candidates whose probability reaches `p`.

    The one that crosses `p` stays, and so do the first `min_keep`; p >= 1 is off.
    Source: Holtzman et al., arXiv:1904.09751.
    """
    if p >= 1.0:
        return c
    crossing = bisect_left(list(accumulate(probabilities(c))), p)
    return c[:max(crossing + 1, min_keep)]


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


def exclude_top_choices(
    c: Candidates, probability: float, threshold: float, rng: random.Random
) -> Candidates:
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


def penalise_repetition(
    c: Candidates, history: Sequence[int], penalty: float, last_n: int,
    presence: float = 0.0, frequency: float = 0.0,
) -> Candidates:
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


def _repeat_lengths(ids: Sequence[int], breakers: FrozenSet[int]) -> Dict[int, int]:
    """Return, for each id that once followed the ids' present ending, the longest such ending."""
    backward = list(ids)[::-1]
    if backward.count(backward[0] if backward else None) <= 1:  # mostly so, and quick to see
        return {}
    unbroken = next((at for at, t in enumerate(backward) if t in breakers), len(backward))
    longest: Dict[int, int] = {}
    matches = _prefix_matches(backward)
    for at in range(1, len(backward)):
        follower, length = backward[at - 1], min(matches[at], unbroken)
        if length > longest.get(follower, 0) and follower not in breakers:
            longest[follower] = length
    return longest


def penalise_dry(
    c: Candidates, history: Sequence[int], multiplier: float, base: float, allowed_length: int,
    last_n: int, breakers: FrozenSet[int] = NO_IDS,
) -> Candidates:
    """Return `c` with every id that would prolong a verbatim repetition made less likely.

    If the last m ids of `history` stood earlier in its last `last_n` (negative: in all of it) and
    an id came next, the longest such m >= allowed_length costs that id multiplier *
    base**(m - allowed_length). Matches never cross an id in `breakers`, and breakers go unpunished.
    multiplier 0 is off. Source: p-e-w's DRY ("don't repeat yourself") sampler.
    """
    if multiplier == 0.0:
        return c
    most = MAX_DRY_LOG_PENALTY / math.log(base) if base > 1.0 else math.inf
    penalties = {
        token: multiplier * base ** min(length - allowed_length, most)
        for token, length in _repeat_lengths(_recent(history, last_n), breakers).items()
        if length >= allowed_length
    }
    if not penalties:
        return c
    return _relogit(c, {t: logit - penalties[t] for logit, t in c if t in penalties})


@dataclass(frozen=True)
class SamplerSettings:
    """The parameters of the chain and its order; raises ValueError for what cannot be run."""

    temperature: float = 0.85
    top_k: int = 40
    top_p: float = 0.92
    min_p: float = 0.06
    typical_p: float = 0.95
    repeat_penalty: float = 1.1
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_last_n: int = -1
    top_n_sigma: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    samplers: Tuple[str, ...] = DEFAULT_SAMPLERS

    def __post_init__(self) -> None:
        unknown = ", ".join(name for name in self.samplers if name not in DEFAULT_SAMPLERS)
        if unknown:
            known = ", ".join(DEFAULT_SAMPLERS)
            raise ValueError(f"unknown sampler: {unknown}; the known ones are {known}")
        if not (self.temperature >= 0.0 and self.repeat_penalty > 0.0 and self.dry_base > 0.0):
            raise ValueError(
                f"temperature {self.temperature} must be at least 0, repeat_penalty "
                f"{self.repeat_penalty} and dry_base {self.dry_base} above 0"
            )


def _within_reach(c: Candidates, history: Sequence[int], s: SamplerSettings) -> Candidates:
    """Return `c` without what top-k must drop, whatever the penalties before it do.

    They only lower, and only ids in the history: a cut here spares them most of the vocabulary.
    """
    lowering = (s.repeat_penalty >= 1.0 and min(s.presence_penalty, s.frequency_penalty,
                                                s.dry_multiplier) >= 0.0)
    if s.top_k > 0 and lowering and s.top_n_sigma <= 0.0 and s.samplers == DEFAULT_SAMPLERS:
        return c[:s.top_k + len(set(history))]
    return c


def apply_samplers(
    c: Candidates, history: Sequence[int], settings: SamplerSettings, rng: random.Random,
    breakers: FrozenSet[int] = NO_IDS,
) -> Candidates:
    """Return what the chain of `settings.samplers`, run in that order, leaves of `c`."""
    s = settings
    steps: Dict[str, Callable[[Candidates], Candidates]] = {
        "penalties": lambda c: penalise_repetition(
            c, history, s.repeat_penalty, s.repeat_last_n, s.presence_penalty, s.frequency_penalty
        ),
        "dry": lambda c: penalise_dry(
            c, history, s.dry_multiplier, s.dry_base, s.dry_allowed_length, s.dry_last_n, breakers
        ),
        "top_n_sigma": lambda c: keep_top_n_sigma(c, s.top_n_sigma),
        "top_k": lambda c: keep_top_k(c, s.top_k),
        "typical_p": lambda c: keep_typical(c, s.typical_p),
        "top_p": lambda c: keep_top_p(c, s.top_p),
        "min_p": lambda c: keep_min_p(c, s.min_p),
        "xtc": lambda c: exclude_top_choices(c, s.xtc_probability, s.xtc_threshold, rng),
        "temperature": lambda c: temper(c, s.temperature),
    }
    c = _within_reach(c, history, s)
    for name in s.samplers:
        c = steps[name](c)
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


def fast_draw(engine: Engine, settings: SamplerSettings
              ) -> Optional[Callable[[array, array, random.Random], Optional[int]]]:
    """Return a function of logits, history and rng that draws as the chain does, or None.

    One kernel does it where the engine has compiled ones and the chain is the usual one; for
    logits that are not finite the function itself returns None.
    """
    s = settings
    if (s.samplers != DEFAULT_SAMPLERS or s.top_k <= 0 or s.dry_multiplier < 0.0
            or s.dry_base <= 1.0 or s.top_n_sigma > 0.0 or s.xtc_probability > 0.0
            or s.temperature < GREEDY_BELOW_TEMPERATURE or engine.name != "native"):
        return None
    log_base = math.log(s.dry_base)
    repeats = s.repeat_penalty, s.presence_penalty, s.frequency_penalty
    dry = s.dry_multiplier, log_base, s.dry_allowed_length, MAX_DRY_LOG_PENALTY / log_base
    cuts = s.top_k, s.typical_p, s.top_p if s.top_p < 1.0 else 2.0, s.min_p, s.temperature
    room = engine.buffer(0)

    def drawn(logits: array, history: array, rng: random.Random) -> Optional[int]:
        nonlocal room
        n, recent = len(logits), _recent(history, s.repeat_last_n)
        past = _recent(history, s.dry_last_n)
        if not math.isfinite(engine.dot(logits, logits, n)):
            return None
        if len(room) != 2 * n + 4 * s.top_k + 4:
            room = engine.buffer(2 * n + 4 * s.top_k + 4)
        return engine.sample_token(logits, n, recent, len(recent), room, *repeats, past, len(past),
                                   *dry, *cuts, rng.random())
    return drawn


def generate_ids(
    next_logits: Callable[[Sequence[int]], Sequence[float]], prompt_ids: Sequence[int],
    settings: SamplerSettings, rng: random.Random, max_tokens: int,
    end_ids: FrozenSet[int] = NO_IDS, min_tokens: int = 0,
    banned: FrozenSet[int] = NO_IDS, breakers: FrozenSet[int] = NO_IDS,
    engine: Optional[Engine] = None,
) -> Iterator[int]:
    """Return an iterator over the reply's ids: at most `max_tokens`, stopping before an end id.

    `next_logits(ids)` takes the ids that are new to it (first the whole prompt, then one at a time,
    each id once; the last id of a reply is never fed) and returns the next position's logits.
    No id of `banned` is drawn, none of `end_ids` before `min_tokens` ids were yielded. Penalties
    look at prompt and reply together. With an engine its kernel draws, where it can.
    Raises ValueError at once if the prompt is empty.
    """
    if not prompt_ids:
        raise ValueError("the prompt has no ids; give at least one to start from")
    fast = fast_draw(engine, settings) if engine and not breakers else None

    def drawn(logits: Any, history: array, barred: FrozenSet[int]) -> int:
        token = fast(logits, history, rng) if fast and not barred else None
        if token is None:
            c = candidates_of(logits, barred)
            token = draw(apply_samplers(c, history, settings, rng, breakers), rng)
        return token

    def reply() -> Iterator[int]:
        history = array("i", prompt_ids)
        fresh = list(prompt_ids)
        for yielded in range(max_tokens):
            token = drawn(next_logits(fresh), history,
                          banned | end_ids if yielded < min_tokens else banned)
            if token in end_ids:
                return
            yield token
            history.append(token)
            fresh = [token]

    return reply()


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, not all."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(stop[:length])), 0)


class StopText:
    """A gate for streamed text that closes at the first stop string, wherever the pieces break.

    The first stop is the one completed first (of several completed by the same character, the
    longest). Raises ValueError for an empty stop string, which would stop everything.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop text is empty; give at least one character")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def feed(self, piece: str) -> Tuple[str, bool]:
        """Return the text that is safe to show now, and whether a stop was reached.

        Only what could still become the beginning of a stop is held back; the stop itself and all
        that follows is dropped.
        """
        if self._stopped:
            return "", True
        text = self._held + piece
        starts = [(text.find(stop), stop) for stop in self._stops]
        ends = [(start + len(stop), start) for start, stop in starts if start >= 0]
        if ends:
            self._held, self._stopped = "", True
            return text[:min(ends)[1]], True
        safe_chars = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe_chars:]
        return text[:safe_chars], False

    def flush(self) -> str:
        """Return the text still held back, once no more pieces will come."""
        text, self._held = self._held, ""
        return text


# ──────────────────────────────────────────────────────────────────────────────────────
# 10 · TRAINING — one step, one window, one honest number   uses: 2 5 6 7 8
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
    ids = [END_OF_TEXT]
    parts = text.split("\n\n")
    for i, part in enumerate(parts):
        ids += document_ids(tokenizer, part + "\n" if i + 1 < len(parts) else part)
    return ids


class TextPool:
    """What the trainer may train on: a stream of everything, and a stream of what is new.

    Each epoch cuts a stream into windows side by side, at a random shift, and deals them in random
    order: measured 0.04 bits per character better than windows at random places.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.stream = array("i", [END_OF_TEXT])
        self.fresh = array("i", [END_OF_TEXT])
        self._deals: Dict[bool, List[int]] = {True: [], False: []}

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
        return [self._window(fresh, rng) for fresh in kinds] if len(self.stream) > 1 else []

    def _window(self, fresh: bool, rng: random.Random) -> List[int]:
        stream, deal = self.fresh if fresh else self.stream, self._deals[fresh]
        if not deal:  # the first window begins before the text, so that its edges count in full
            first = -rng.randrange(min(self.block_size, len(stream) - 1))
            deal.extend(range(first, len(stream) - 1, self.block_size))
            rng.shuffle(deal)
        start = deal.pop()
        return list(stream[max(0, start):start + self.block_size + 1])


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

    Place 0 is the base, place k + 1 delta k. A layer's score is the sum of ln p of the text's
    trigrams, of those that any layer knows, less its margin: the base speaks unless a delta is
    clearly better.
    Sources: naive Bayes; N-gram-based text categorization, Cavnar and Trenkle, SDAIR 1994.
    """

    def __init__(self, tokenizer: EvolvingTokenizer,
                 counts: Iterable[Dict[bytes, int]] = ()) -> None:
        self.tokenizer = tokenizer
        self.counts: List[Counter[bytes]] = [Counter(c) for c in counts] or [Counter()]
        self.margins = [0.0, *[ROUTE_MARGIN] * (len(self.counts) - 1)]
        self._tables: List[Optional[Tuple[Dict[bytes, float], float]]] = [None] * len(self.counts)
        self._rows: Dict[bytes, bytes] = {}  # of each trigram, what all tables say

    def append(self) -> None:
        """Make a place for one delta more, which knows no text yet."""
        self.counts.append(Counter())
        self.margins.append(ROUTE_MARGIN)
        self._tables.append(None)

    def fold_oldest(self, share: float = 1.0) -> None:
        """Count the oldest delta's text as the base's, or as nobody's if the base got no share."""
        self.counts[:2] = [self.counts[0] + self.counts[1] if share else self.counts[0]]
        del self.margins[1]
        self._tables[:2] = [None]

    def learn(self, place: int, texts: Iterable[str]) -> None:
        """Count the trigrams of texts as those of a place."""
        counts = self.counts[place].copy()
        for text in texts:
            raw = text.encode("utf-8", "surrogatepass")
            counts.update(raw[i:i + 3] for i in range(len(raw) - 2))
        if len(counts) > ROUTE_TRIGRAMS:
            counts = Counter(dict(counts.most_common(ROUTE_TRIGRAMS)))
        self.counts[place], self._tables[place] = counts, None

    def refine(self, place: int) -> None:
        """Give a place the text of the base, for which it speaks from now on."""
        self.counts[place] += self.counts[0]
        self.counts[0], self._tables = Counter(), [None] * len(self.counts)

    def copied(self) -> "Router":
        """Return a router that may change without this one."""
        other = Router(self.tokenizer, self.counts)
        other.margins = list(self.margins)
        return other

    def restore(self, past: "Router") -> None:
        """Be again what copied() kept."""
        self.counts, self.margins = list(past.counts), list(past.margins)
        self._tables = [None] * len(self.counts)

    def _table(self, place: int) -> Tuple[Dict[bytes, float], float]:
        """Return ln p of the trigrams that a place knows, and of any other."""
        counts = self.counts[place]
        whole = sum(counts.values()) + ROUTE_CALM
        return ({tri: log((count + ROUTE_UNSEEN) / whole) for tri, count in counts.items()},
                log(ROUTE_UNSEEN / whole))

    def scores(self, raw: bytes) -> List[float]:
        """Return how well each place fits the bytes, in nats; without a text nothing fits."""
        if None in self._tables:
            self._tables = [table or self._table(place)
                            for place, table in enumerate(self._tables)]
            self._rows.clear()
        if len(self._rows) >= ROUTE_TRIGRAMS:
            self._rows.clear()
        rows, tables, count = self._rows, self._tables, len(self.counts)
        trigrams = [raw[i:i + 3] for i in range(len(raw) - 2)]
        for tri in trigrams:
            if tri not in rows:  # filled as texts need it: a row for each trigram would be slow
                row = [table[0].get(tri, table[1]) for table in tables if table]
                heard = any(tri in table[0] for table in tables if table)
                rows[tri] = array("f", row).tobytes() if heard else b""
        found = array("f", b"".join([rows.get(tri, b"") for tri in trigrams]))
        return [sum(found[place::count]) - margin if known or not place else -math.inf
                for place, (margin, known) in enumerate(zip(self.margins, self.counts))]

    def choose(self, raw: bytes) -> Optional[int]:
        """Return the index of the delta that the bytes call for, or None for the base."""
        base, *deltas = self.scores(raw)
        best = max(deltas, default=-math.inf)
        return deltas.index(best) if best > base else None

    def __call__(self, ids: Sequence[int]) -> Optional[int]:
        """Return what the newest bytes of ids choose."""
        newest = b"".join(map(self.tokenizer.token_bytes, ids[-ROUTE_IDS:]))
        return self.choose(newest[-ROUTE_BYTES:])


class Replay:
    """Windows of what is known already, dealt evenly over sources and over time.

    The text of each source is cut into bands from oldest to newest; each band deals its windows
    in random order, and the bands take turns, so that what is old or rare is not drowned.
    """

    def __init__(self, documents: Iterable[Tuple[str, Sequence[int]]], block_size: int) -> None:
        self.block_size = block_size
        self._streams: DefaultDict[str, array] = defaultdict(lambda: array("i", [END_OF_TEXT]))
        for source, ids in documents:
            self._streams[source].extend(ids)
        self._bands: List[Tuple[array, int, int]] = []
        for stream in self._streams.values():
            windows = max(1, (len(stream) - 2) // block_size + 1)
            bands = min(REPLAY_BANDS, windows)
            edges = [windows * i // bands for i in range(bands + 1)]
            self._bands += [(stream, a, b) for a, b in zip(edges, edges[1:]) if len(stream) > 1]
        self._turns: List[int] = []
        self._decks: Dict[int, List[int]] = {}

    def window(self, rng: random.Random) -> List[int]:
        """Return the next window of 2 to block_size+1 ids, or none where nothing is known."""
        if not self._bands:
            return []
        if not self._turns:
            self._turns = list(range(len(self._bands)))
            rng.shuffle(self._turns)
        turn = self._turns.pop()
        stream, low, high = self._bands[turn]
        deck = self._decks.setdefault(turn, [])
        if not deck:
            deck.extend(range(low, high))
            rng.shuffle(deck)
        start = deck.pop() * self.block_size
        return list(stream[start:start + self.block_size + 1])


REPLAY_BANDS = 8  # from oldest to newest


Unwanted = Tuple[Sequence[int], int]  # ids, and the place of the first that is not to be said


class StepReport(NamedTuple):
    """What one training step did."""

    loss: float
    tokens: int
    norm: float
    applied: bool


def train_step(model: GPT, optimizer: AdamW, windows: Sequence[Sequence[int]], rate: float,
               drop_rate: float, rng: random.Random,
               guard: Optional[contextlib.AbstractContextManager] = None,
               unwanted: Sequence[Unwanted] = ()) -> StepReport:
    """Run forward, backward and update on one batch; the update alone happens inside `guard`.

    What is unwanted is pushed away in the same step. A loss or gradient that is not finite changes
    no weight and is reported as not applied.
    """
    params = model.trainable()
    for param in params:
        param.grad = None
    loss = model.loss(windows, drop_rate, rng)
    tokens = sum(len(window) - 1 for window in windows)
    if not math.isfinite(loss.data):
        return StepReport(loss.data, tokens, math.inf, False)
    backward(loss)
    for ids, first in unwanted:
        backward(model.aversion(ids, first))
    with guard or contextlib.nullcontext():
        norm = optimizer.step(params, rate)
    return StepReport(loss.data, tokens, norm, math.isfinite(norm))


def reading_plan(count: int, block: int, stride: int,
                 first: int = 0) -> Iterator[Tuple[int, int, int]]:
    """Yield (start, scored, end): windows of at most block that score every place from 0 once.

    All but the first places of a window are scored from at least block − stride before them. With
    `first` the first window is read twice: to so many places, and then whole, for the rest.
    """
    if count < 1:
        return
    first = first if first < min(block, count) else 0
    if first:
        yield 0, 0, first
    for start in (0, *range(stride, max(stride, count - block + stride), stride)):
        yield start, start + block - stride if start else first, min(start + block, count)


def scored_nats(model: GPT, ids: Sequence[int], stride: int, batch: int = 4) -> Iterator[float]:
    """Yield the nats of the ids after the first, some windows at a time; their sum is the loss.

    Windows of block_size ids overlap so that every id but the first few is predicted from at least
    block_size − stride ids before it; each id is scored once, by whom the ids before it choose.
    """
    first = ROUTE_FIRST if model.routed else 0
    plan = list(reading_plan(len(ids) - 1, model.shape.block_size, stride, first))
    places = {part: model.place_after(ids[max(0, part[1] - ROUTE_IDS):part[1] + 1])
              for part in plan}
    plan.sort(key=places.__getitem__)  # windows of one speaker are read side by side
    for place, parts in itertools.groupby(plan, places.__getitem__):
        run = list(parts)
        for at in range(0, len(run), batch):
            yield _nats_of(model.speaker_at(place), ids, run[at:at + batch])


def _nats_of(model: GPT, ids: Sequence[int], parts: Sequence[Tuple[int, int, int]]) -> float:
    """Return the nats of some windows of a plan, read side by side."""
    inputs: List[int] = []
    targets: List[int] = []
    bounds = [0]
    for start, scored, end in parts:
        inputs += ids[start:end]
        targets += [-1] * (scored - start) + list(ids[scored + 1:end + 1])
        bounds.append(len(inputs))
    with model.engine.no_grad():
        return sum(cross_entropy(model.logits(inputs, bounds), targets)[1])


def predicted_rows(model: GPT, ids: Sequence[int], stride: int,
                   heard: Callable[[int], None] = lambda place: None) -> Iterator[array]:
    """Yield the logits (V,) for each of ids[1:], in windows that overlap as in scored_nats.

    Before each window `heard` is told who speaks: 0 for the base, k + 1 for delta k.
    """
    first = ROUTE_FIRST if model.routed else 0
    plan = reading_plan(len(ids) - 1, model.shape.block_size, stride, first)
    for start, scored, end in plan:
        voice = model.speaker(ids[max(0, scored - ROUTE_IDS):scored + 1])
        vocab = voice.vocab_size
        heard(voice.place)
        with voice.engine.no_grad():
            logits = voice.logits(list(ids[start:end]))
        for row in range(scored - start, end - start):
            yield logits.data[row * vocab:(row + 1) * vocab]


def bits_per_character(model: GPT, ids: Sequence[int], characters: int, stride: int) -> float:
    """Return total bits of ids[1:] over `characters`; NaN when there is nothing to score."""
    if len(ids) < 2 or not characters:
        return math.nan
    return sum(scored_nats(model, ids, stride)) / math.log(2.0) / characters


# ──────────────────────────────────────────────────────────────────────────────────────
# 11 · EXPERTS — three who guess, and one who weighs them   uses: 4
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Beside the GPT two others expect what comes next: counts of all that was read, which learn a text
# in one reading, and a copyist of the entries at hand. A mixture weighs the three for every token,
# by how well each knows the place.

class Expectation(NamedTuple):
    """What counts expect next: ln p(i) is special[i] or, for any other id, base[i] + shift.

    Without a base it is shift alone. reach is the length of the longest context that was known,
    one less than the shortest counted when none was; seen is how much was counted in it.
    """

    reach: int
    seen: int
    base: Optional[array]
    shift: float
    special: Dict[int, float]

    def log_p(self, token: int) -> float:
        """Return the natural logarithm of an id's probability."""
        if token in self.special:
            return self.special[token]
        return self.shift + (self.base[token] if self.base is not None else 0.0)


# Zipf's law, n(c) ~ 1/(c·(c + 1)): what counts of counts are like where there are few as yet.
TALLY_PRIOR = (30.0, 10.0, 5.0, 3.0)
MANY = 5  # counts from here on need not be told apart
ROW_AGE = 64
ROW_NUMBERS = 4_000_000  # numbers in all cached rows; a row has one for every id


NGRAM_FORMAT = "macrogpt-ngrams 1"


def _read_table(rest: Iterator[int], k: int, once: int, often: int) -> Dict[Tuple[int, ...], Any]:
    """Return the contexts of k ids, of which so many have one and several followers."""
    def keys(count: int) -> List[Tuple[int, ...]]:
        ids = itertools.islice(rest, k * count)
        return list(zip(*[ids] * k)) if k else [()] * count
    table: Dict[Tuple[int, ...], Any] = dict(zip(keys(once), itertools.islice(rest, once)))
    names, sizes = keys(often), list(itertools.islice(rest, often))
    tokens = itertools.islice(list(itertools.islice(rest, sum(sizes))), None)
    counts = itertools.islice(rest, sum(sizes))
    for name, size in zip(names, sizes):
        table[name] = dict(zip(itertools.islice(tokens, size), itertools.islice(counts, size)))
    return table


class NgramMemory:
    """Counts of the ids that followed each context of `lowest` to `order` ids: one reading learns.

    An id is counted in the longest context, and in shorter ones only while it is new to the longer
    ("update exclusion"), so that shorter contexts count in how many surroundings an id was met.
    Probabilities are interpolated, p ← p·ΣD/n + (c − D)/n from the shortest context up, with three
    discounts for each order from counts of counts.  An id seen once in a context stands there as
    itself, any other context holds a table: that halves the memory.
    Sources: modified Kneser-Ney, Chen and Goodman, TR-10-98, Harvard 1998; update exclusion:
    Moffat, "Implementing the PPM data compression scheme", 1990.
    Measured on 900 KB of plays, order 3: 0.7 µs a character, after 0.2 for the tokenizer.
    """

    def __init__(self, order: int = 3, max_counts: int = 800_000, lowest: int = 0) -> None:
        self.order, self.max_counts, self.lowest = order, max_counts, lowest
        self.tables: List[Dict[Tuple[int, ...], Any]] = [{} for _ in range(order + 1)]
        self.tally = [[0] * (MANY + 1) for _ in range(order + 1)]  # [k][c]: counts of c
        self.size = 0
        self._rows: Dict[Tuple[int, ...], array] = {}
        self._floor: List[float] = []  # p of every id after anything, when size was:
        self._floor_size = 0
        self._offs: Dict[int, Tuple[float, ...]] = {}
        self._lock = threading.Lock()  # one thread may count while another speaks

    def learn(self, ids: Sequence[int], context: Sequence[int] = ()) -> None:
        """Count each of ids after what stands before it, in context for the first of them."""
        with self._lock:
            row = (*context[-self.order:], *ids)
            self._count(row, len(ids))
            self._offs.clear()
            for token in row:
                self._rows.pop((token,), None)
            if self.size * ROW_AGE > self._floor_size * (ROW_AGE + 1):
                self._rows.clear()
            if self.size > self.max_counts:
                self._shrink(self.max_counts * 3 // 4)

    def _count(self, row: Tuple[int, ...], fresh: int) -> None:
        """Count the last so many ids of a row."""
        for at in range(len(row) - fresh, len(row)):
            token = row[at]
            for k in range(min(self.order, at), self.lowest - 1, -1):
                table, key, tally = self.tables[k], row[at - k:at], self.tally[k]
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
        for once in (True, False):
            for k in range(self.order, max(1, self.lowest) - 1, -1):
                for key, found in list(self.tables[k].items()):
                    if self.size <= goal:
                        return
                    if not once or type(found) is int:
                        self._drop(k, key)

    def _drop(self, k: int, key: Tuple[int, ...]) -> None:
        found = self.tables[k].pop(key)
        counts = found.values() if type(found) is dict else (1,)
        self.size -= len(counts)
        for count in counts:
            self.tally[k][min(count, MANY)] -= 1

    def pack(self) -> bytes:
        """Return the stored form: a line of JSON, then int32 numbers, all compressed.

        For each order the contexts followed by one id, met once: their ids, what followed; then
        the others: their ids, how many followers each has, the followers, their counts.
        """
        with self._lock:
            return self._pack()

    def _pack(self) -> bytes:
        numbers, sizes = array("i"), []
        for table in self.tables:
            once = {key: found for key, found in table.items() if type(found) is int}
            often = {key: found for key, found in table.items() if type(found) is not int}
            before, chain = len(numbers), itertools.chain.from_iterable
            for part in (chain(once), once.values(), chain(often), map(len, often.values()),
                         chain(often.values()), chain(f.values() for f in often.values())):
                numbers.extend(part)
            sizes.append([len(once), len(often), len(numbers) - before])
        if sys.byteorder == "big":
            numbers.byteswap()
        head = {"format": NGRAM_FORMAT, "lowest": self.lowest, "size": self.size,
                "tally": self.tally, "sizes": sizes}
        return zlib.compress(json.dumps(head).encode() + b"\n" + numbers.tobytes(), 1)

    @classmethod
    def unpack(cls, blob: bytes, max_counts: int = 800_000) -> "NgramMemory":
        """Return the counts that pack stored.  Raises ValueError when it is not such a blob.

        Measured with 505,000 counts: 0.2 s, to count them anew takes 1 s.
        """
        try:
            head, _, body = zlib.decompress(blob).partition(b"\n")
            fields, numbers = json.loads(head), array("i")
            if fields["format"] != NGRAM_FORMAT:
                raise ValueError(f"expected {NGRAM_FORMAT}, found {fields['format']}")
            numbers.frombytes(body)
            if sys.byteorder == "big":
                numbers.byteswap()
            memory = cls(len(fields["sizes"]) - 1, max_counts, fields["lowest"])
            memory.tally, memory.size = fields["tally"], fields["size"]
            shared = list(range(max(numbers, default=0) + 1))  # one object a number: half the size
            rest = map(shared.__getitem__, numbers)
            for k, (once, often, _) in enumerate(fields["sizes"]):
                memory.tables[k] = _read_table(rest, k, once, often)
            if sum(size for _, _, size in fields["sizes"]) != len(numbers):
                raise ValueError("its length does not fit")
        except (zlib.error, KeyError, TypeError, IndexError) as error:
            raise ValueError(f"these are no stored counts ({error})") from error
        return memory

    def discounts(self, k: int) -> Tuple[float, float, float, float]:
        """Return what is taken off counts of 0, 1, 2, and 3 or more in contexts of k ids."""
        n1, n2, n3, n4 = map(add, self.tally[k][1:MANY], TALLY_PRIOR)
        y = n1 / (n1 + 2.0 * n2)
        return (0.0, max(0.05, 1.0 - 2.0 * y * n2 / n1), max(0.05, 2.0 - 3.0 * y * n3 / n2),
                max(0.05, 3.0 - 4.0 * y * n4 / n3))

    def _level(self, k: int, found: Any) -> Tuple[float, Dict[int, float], int]:
        """Return the share left to shorter contexts, each follower's own part, and all counts."""
        counts = found if type(found) is dict else {found: 1}
        off, total = self._offs.get(k), sum(counts.values())
        if off is None:
            off = self._offs[k] = self.discounts(k)
        parts = {token: (count - off[count if count < 3 else 3]) / total
                 for token, count in counts.items()}
        return 1.0 - sum(parts.values()), parts, total

    def _row(self, key: Tuple[int, ...], vocab: int) -> array:
        """Return ln p of every id after a context of at most one id.

        A row is kept until its own counts change; the floor of all rows, ln p after anything, may
        be older by one part in ROW_AGE, for a row takes longer than all else in expecting an id.
        """
        row = self._rows.get(key)
        if row is None or len(row) != vocab:
            if key:
                self._row((), vocab)
            chances = self._floor if key else [1.0 / vocab] * vocab
            found = self.tables[len(key)].get(key)
            if found is not None:
                left, parts, _ = self._level(len(key), found)
                chances = [chance * left for chance in chances]
                for token, part in parts.items():
                    chances[token] += part
            if (len(self._rows) + 1) * vocab > ROW_NUMBERS:
                self._rows.clear()
            if not key:
                self._floor, self._floor_size = chances, self.size
            row = self._rows[key] = array("f", map(log, chances))
        return row

    def expect(self, history: Tuple[int, ...], vocab: int) -> Expectation:
        """Return what follows history, of all ids below vocab; their probabilities sum to 1."""
        with self._lock:
            return self._expect(history, vocab)

    def _expect(self, history: Tuple[int, ...], vocab: int) -> Expectation:
        length, scale = len(history), 1.0
        reach, seen, base, first = self.lowest - 1, 0, None, self.lowest
        if not self.lowest:
            known = bool(history) and history[-1:] in self.tables[1]
            key = history[-1:] if known else ()
            base, reach, first = self._row(key, vocab), len(key), len(key) + 1
            found = self.tables[reach].get(key, {})
            seen = sum(found.values()) if type(found) is dict else 1
        special: Dict[int, float] = {}
        for k in range(first, min(self.order, length) + 1):
            found = self.tables[k].get(history[length - k:])
            if found is None or (k > 1 and not self.lowest and reach == 0):
                break
            left, parts, seen = self._level(k, found)
            scale, reach = scale * left, k
            special = {token: chance * left for token, chance in special.items()}
            for token, part in parts.items():
                if token not in special:
                    special[token] = scale * (exp(base[token]) if base is not None else 1 / vocab)
                special[token] += part
        shift = log(scale) - (0.0 if base is not None else log(vocab))
        return Expectation(reach, seen, base, shift,
                           {token: log(chance) for token, chance in special.items()})


# One voice of three. The model, the counts and a copyist over the entries at hand each expect a
# next id; ln p of the mixture is the weighted sum of theirs, made to sum to 1. The weights depend
# on how far back the counts and the copyist know the context, and were learned on held-out text.

EXPERTS = ("model", "pairs", "phrases", "copy")  # pairs: counts after one id; phrases: after all
COPY_ORDER = 5       # ids that the copyist looks back; what stands longer is found all the same
COPY_COUNTS = 200_000
SEEN_BANDS = 4       # contexts met once to 3 times, to 15, to 63, and more often
SAID_ORDER = 8       # ids before each token said that are kept to find its source
# Where learning begins; a voice that was never fitted speaks with these.
FIRST_WEIGHTS = (0.45, 0.0, 0.4, 0.1)
MIX_RATE = 0.02
CALM_SLOPES = 10.0   # keeps the first steps, with few slopes summed, small


class Mixer:
    """The weights of the experts in every situation, learned online by gradient descent.

    A situation chooses one row of weights by what the counts know, one by what the copyist knows,
    and one by the layer that speaks, which makes the voice of one kind of text independent of
    what is fitted for others; the three are added. The loss, −ln p, is convex in them, and its
    slope is, for each expert, what it gives the id that came less what it gives on average.
    Sources: products of experts, Hinton, Neural Computation 14 (2002); weight sets chosen by
    context and learned online, Mahoney, "Adaptive weighing of context models for lossless data
    compression", CS-2005-16; step sizes by the slopes so far (AdaGrad), Duchi et al., JMLR 12
    (2011).
    """

    def __init__(self, order: int) -> None:
        self.order = order
        count, self.copy_rows = len(EXPERTS), 1 + (order + 1) * SEEN_BANDS
        rows = self.copy_rows + COPY_ORDER + 2
        self.weights = array("d", FIRST_WEIGHTS) * self.copy_rows
        self.weights.extend([0.0] * (count * (rows - self.copy_rows)))
        self.squares = array("d", [0.0]) * (count * rows)

    def situation(self, counts: Expectation, copy: Expectation,
                  place: int = 0) -> Tuple[int, int, int]:
        """Return where the three rows of weights begin; place is 0 for the base, k + 1 for delta k.
        """
        band = min(SEEN_BANDS - 1, (counts.seen.bit_length() - 1) // 2)
        known = 1 + counts.reach * SEEN_BANDS + band if counts.seen else 0
        count, own = len(EXPERTS), len(EXPERTS) * (self.copy_rows + COPY_ORDER + 1 + place)
        for numbers in (self.weights, self.squares):
            numbers.extend([0.0] * (own + count - len(numbers)))
        return count * known, count * (self.copy_rows + max(0, copy.reach)), own

    def chosen(self, situation: Sequence[int]) -> List[float]:
        """Return the weights of the experts in a situation."""
        a, b, c = situation
        weights, count = self.weights, len(EXPERTS)
        return list(map(add, map(add, weights[a:a + count], weights[b:b + count]),
                        weights[c:c + count]))

    def fold_oldest(self) -> None:
        """Drop what belongs to the oldest delta, whose text is the base's from now on."""
        start = len(EXPERTS) * (self.copy_rows + COPY_ORDER + 2)
        for numbers in (self.weights, self.squares):
            del numbers[start:start + len(EXPERTS)]

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
        half, least = len(numbers) // 2, len(EXPERTS) * (self.copy_rows + COPY_ORDER + 1)
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
                 copy: Optional[NgramMemory] = None, eager: float = 0.0) -> None:
        self.engine, self.counts, self.mixer, self.eager = engine, counts, mixer, eager
        self.copy = copy if copy is not None else copyist()
        self.own_place: Optional[int] = None  # the one layer whose own weights alone may move
        self.place, self.situation, self.weights = 0, (0, 0, 0), [0.0] * len(EXPERTS)
        self.logits = self.blend = self.chances = engine.buffer(0)
        self.heard = self.copied = Expectation(-1, 0, None, 0.0, {})
        self._more: Dict[int, float] = {}

    def mix(self, logits: array, history: Tuple[int, ...]) -> array:
        """Return the mixture's ln p (V,), less a constant, after history; logits are the model's.

        The array is the caller's until the next call.
        """
        add_scaled, vocab = self.engine.add_scaled, len(logits)
        counts = self.heard = self.counts.expect(history[-self.counts.order:], vocab)
        copied = self.copied = self.copy.expect(history[-self.copy.order:], vocab)
        self.situation = self.mixer.situation(counts, copied, self.place)
        self.weights = self.mixer.chosen(self.situation)
        self.weights[-1] += self.eager
        model, pairs, phrases, copy = self.weights
        blend, base, shift = self.engine.buffer(vocab), counts.base, counts.shift
        assert base is not None
        add_scaled(logits, blend, vocab, model)
        add_scaled(base, blend, vocab, pairs + phrases)
        self._more = {i: x - base[i] - shift for i, x in counts.special.items()}
        for i, more in self._more.items():
            blend[i] += phrases * more
        for i, x in copied.special.items():
            blend[i] += copy * (x - copied.shift)
        self.logits, self.blend, self.chances = logits, blend, blend[:0]
        return blend

    def _settle(self) -> float:
        """Turn a copy of the blend into chances that sum to 1; return the log of their sum."""
        self.chances = self.blend[:]
        return self.engine.softmax(self.chances, len(self.chances))

    def nats(self, token: int) -> float:
        """Return −ln p of the id that came."""
        return self._settle() - self.blend[token]

    def slopes(self, token: int) -> List[float]:
        """Return what each expert's ln p gives the id, less what it gives on average.

        The average is over the mixture's own chances, so constants of an expert do not count.
        """
        if not self.chances:
            self._settle()
        chances, vocab, dot = self.chances, len(self.chances), self.engine.dot
        base, special, copied = self.heard.base, self._more, self.copied
        pairs = base[token] - dot(chances, base, vocab)
        more = special.get(token, 0.0) - sum(chances[i] * x for i, x in special.items())
        near = {i: x - copied.shift for i, x in copied.special.items()}
        return [self.logits[token] - dot(chances, self.logits, vocab), pairs, pairs + more,
                near.get(token, 0.0) - sum(chances[i] * x for i, x in near.items())]

    def shares(self, token: int) -> List[float]:
        """Return how many nats each expert, by its weight, raised the id over its likeliest rival.

        They add up to ln p of the id less ln p of the most likely other one.
        """
        others = self.blend[:]
        others[token] = -math.inf
        rival = others.index(max(others))
        base, copied, less = self.heard.base, self.copied.special, self.copied.shift
        assert base is not None
        pairs = base[token] - base[rival]
        phrases = pairs + self._more.get(token, 0.0) - self._more.get(rival, 0.0)
        copy = copied.get(token, less) - copied.get(rival, less)
        raised = (self.logits[token] - self.logits[rival], pairs, phrases, copy)
        return list(map(mul, self.weights, raised))

    def learn(self, token: int) -> None:
        """Move the weights, which were in use here, towards the id that came."""
        if self.own_place is None:
            self.mixer.move(self.situation, self.slopes(token))
        elif self.own_place == self.place:
            self.mixer.move(self.situation[2:], self.slopes(token))


def copyist(texts: Iterable[Sequence[int]] = ()) -> NgramMemory:
    """Return counts of the texts that expect what followed the longest match of the context.

    It knows nothing where not even one id fits: copying needs a place to copy from.
    """
    copy = NgramMemory(COPY_ORDER, COPY_COUNTS, lowest=1)
    for ids in texts:
        copy.learn(ids)
    return copy


# ──────────────────────────────────────────────────────────────────────────────────────
# 12 · MEMORY — one file; copy it and you copied the being   uses: 0 1
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Everything that must outlive the process is in one SQLite file with a rollback journal: what was
# said, what was read, what was learned. A commit is one transaction, a blob carries its checksum,
# and a sealed layer is a row that the database itself refuses to rewrite.

# Whoever takes an entry out, and however: a count tells of it, and no stored counts keep its words.
ENTRIES_TAKEN = """
    CREATE TRIGGER IF NOT EXISTS taken_from_entries AFTER DELETE ON entries BEGIN
        INSERT INTO settings(name, value) VALUES ('entries_taken', '1')
        ON CONFLICT(name) DO UPDATE SET value = CAST(value AS INTEGER) + 1;
        DELETE FROM layers WHERE name = 'ngrams'; END;
"""

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
        words TEXT NOT NULL,
        session_id INTEGER REFERENCES sessions(id), told_at REAL NOT NULL,
        closed INTEGER NOT NULL DEFAULT 1, recall INTEGER NOT NULL DEFAULT 1,
        held_out INTEGER NOT NULL DEFAULT 0, learned INTEGER NOT NULL DEFAULT 0,
        UNIQUE (source, key));
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
    CREATE TRIGGER told_and_taken AFTER DELETE ON entries
        WHEN old.source != 'corpus' AND old.trained IS NOT NULL BEGIN
        INSERT INTO unlearning(key, trained, chars, corrected)
        VALUES (old.key, old.trained, length(old.text), 0)
        ON CONFLICT(key) DO UPDATE SET trained = min(trained, excluded.trained); END;
    """,
)

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
"""


MAX_LIKE_FORMS = 900  # SQLite takes expressions of up to 1,000 levels
MAX_QUERY_STEMS = 64  # a longer text is searched for by its first words
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # each a word
WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")
HYPHENED = re.compile(r"\b\w{1,2}-\w+")  # Wi-Fi is found as wifi too
TOLD = ("chat", "taught")
TOLD_MARK = "_told_"  # a word of every statement of the owner, found fast among millions of others


def folded_words(text: str) -> List[str]:
    """Return the words of a text, its runs of letters and digits, without case and accents."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return WORDS.findall("".join(c for c in folded if not unicodedata.combining(c)))


class Layer(NamedTuple):
    """A named blob of weights or state, and a JSON-able description of its shape."""

    manifest: Any
    data: bytes
    sealed: bool = False


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
    learned: bool


class Message(NamedTuple):
    """Something said in a session, by "owner" or "self"; stage says how far it has come."""

    id: int
    session_id: int
    role: str
    text: str
    said_at: float
    verdict: int
    stage: int


ENTRY_COLUMNS = ("e.id, e.source, e.key, e.text, e.told_at, e.closed, e.recall, e.held_out, "
                 "e.learned")


class Memory:
    """The organism's file.  Safe to use from several threads; every method raises StoreError."""

    def __init__(self, path: str, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = path, clock
        self._lock = threading.RLock()
        self._depth = 0
        try:
            _create_private(path)
            self._db = _connect(path)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(_store_trouble(path, error)) from error
        try:
            with self.transaction():
                self._migrate()
        except BaseException:
            self.close()
            raise

    def _migrate(self) -> None:
        """Bring the file to the newest schema; each migration runs once, in order."""
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if version > len(MIGRATIONS):
            raise StoreError(f"{self.path} is of version {version}, this program knows versions up "
                             f"to {len(MIGRATIONS)}; use a newer macrogpt.py or another --db")
        for number in range(version, len(MIGRATIONS)):
            for statement in _statements(MIGRATIONS[number]):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {number + 1}")
        self._db.execute(ENTRIES_TAKEN)
        self.has_fts = self._prepare_full_text()

    def _prepare_full_text(self) -> bool:
        """Create or refill the full-text index; False where SQLite has no FTS5.

        Without FTS5 the triggers go, lest they fail; where it is back, their absence says that the
        index must be built anew.
        """
        try:
            kept = self._db.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'entries_added'").fetchone()
            if not kept:
                for statement in _statements(FULL_TEXT):
                    self._db.execute(statement)
                self._db.execute("INSERT INTO entries_fts(entries_fts) VALUES ('rebuild')")
            self._db.execute("SELECT 1 FROM entries_fts LIMIT 1").fetchone()
            return True
        except sqlite3.OperationalError as error:
            if "fts5" not in str(error):
                raise
            for trigger in ("entries_added", "entries_removed", "entries_changed"):
                self._db.execute(f"DROP TRIGGER IF EXISTS {trigger}")
            return False

    def close(self) -> None:
        """Close the file; nothing is pending, for every change was its own transaction."""
        with self._lock:
            self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Make everything inside one commit, or nothing of it.  May be nested."""
        with self._lock:
            outermost, self._depth = self._depth == 0, self._depth + 1
            try:
                if outermost:
                    self._revive()
                    self._db.execute("BEGIN IMMEDIATE")
                yield
                if outermost:
                    self._db.execute("COMMIT")
            except BaseException as error:
                if outermost and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                if isinstance(error, sqlite3.Error):
                    raise StoreError(_store_trouble(self.path, error)) from error
                raise
            finally:
                self._depth -= 1

    def _revive(self) -> None:
        """Write the file anew from the open connection when somebody has removed it."""
        if self.path != ":memory:" and not os.path.exists(self.path):
            _create_private(self.path)
            anew = _connect(self.path)
            self._db.backup(anew)
            self._db.close()
            self._db = anew

    def _rows(self, sql: str, *values: Any) -> List[Any]:
        """Run one statement and return its rows."""
        with self._lock:
            try:
                return self._db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                raise StoreError(_store_trouble(self.path, error)) from error

    def _one(self, sql: str, *values: Any) -> Any:
        """Return the first column of the first row, or None."""
        rows = self._rows(sql, *values)
        return rows[0][0] if rows else None

    # sessions and messages

    def session_id(self, name: str) -> int:
        """Return the id of the session of that name, which is made when it is new."""
        with self.transaction():
            self._rows("INSERT OR IGNORE INTO sessions(name, started_at) VALUES (?, ?)",
                       name, self.clock())
            return self._one("SELECT id FROM sessions WHERE name = ?", name)

    def sessions(self) -> List[Dict[str, Any]]:
        """Return every session with its name, start, last word and count of messages."""
        rows = self._rows("""
            SELECT s.name, s.started_at, max(m.said_at), count(m.id) FROM sessions s
            LEFT JOIN messages m ON m.session_id = s.id GROUP BY s.id ORDER BY s.id""")
        return [dict(zip(("name", "started_at", "last_at", "messages"), row)) for row in rows]

    def add_message(self, session_id: int, role: str, text: str) -> int:
        """Store one message and return its id."""
        with self.transaction():
            self._rows("INSERT INTO messages(session_id, role, text, said_at) VALUES (?, ?, ?, ?)",
                       session_id, role, text, self.clock())
            return self._one("SELECT last_insert_rowid()")

    def newest_messages(self, session_id: int, count: int) -> List[Tuple[str, str]]:
        """Return the newest (role, text) pairs of a session, oldest first."""
        rows = self._rows("SELECT role, text FROM messages WHERE session_id = ? "
                          "ORDER BY id DESC LIMIT ?", session_id, count)
        return rows[::-1]

    def _messages(self, where: str, *values: Any) -> List[Message]:
        return [Message(*row) for row in self._rows(
            f"SELECT id, session_id, role, text, said_at, verdict, stage FROM messages "
            f"WHERE {where} ORDER BY id", *values)]

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
        with self.transaction():
            for i in ids:
                self._rows("UPDATE messages SET stage = ? WHERE id = ? AND stage < ?",
                           stage, i, stage)

    def message_texts(self, ids: Sequence[int]) -> List[str]:
        """Return the texts of messages by id."""
        return [self._one("SELECT text FROM messages WHERE id = ?", i) or "" for i in ids]

    def judge(self, message_id: int, verdict: int) -> None:
        """Approve (1) or reject (−1) a message."""
        with self.transaction():
            self._rows("UPDATE messages SET verdict = ? WHERE id = ?", verdict, message_id)

    def rejected_exchanges(self, count: int) -> List[Tuple[str, str]]:
        """Return the newest replies that were rejected, each with what it answered, oldest first.
        """
        rows = self._rows("""
            SELECT (SELECT text FROM messages WHERE session_id = m.session_id AND id < m.id
                    AND role = 'owner' ORDER BY id DESC LIMIT 1), text
            FROM messages AS m WHERE verdict < 0 ORDER BY id DESC LIMIT ?""", count)
        return [(asked, answer) for asked, answer in rows if asked is not None][::-1]

    # entries

    def add_entry(self, source: str, document: Document, session_id: Optional[int] = None,
                  recall: bool = True, held_out: bool = False,
                  told_at: Optional[float] = None) -> None:
        """Store a document, told now or at told_at; one told again only becomes recent."""
        mark = [TOLD_MARK] if recall and source in TOLD else []
        joined = folded_words(" ".join(HYPHENED.findall(document.text)).replace("-", ""))
        with self.transaction():
            self._rows("""
                INSERT INTO entries(source, key, text, words, session_id, told_at, closed, recall,
                                    held_out)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
                ON CONFLICT(source, key) DO UPDATE SET told_at = max(told_at, excluded.told_at)""",
                       source, document.key, document.text,
                       " ".join(["", *folded_words(document.text), *joined, *mark]), session_id,
                       self.clock() if told_at is None else told_at,
                       int(document.closed), int(recall), int(held_out))

    def remove_entries(self, source: str, keys: Iterable[int]) -> None:
        """Remove documents of one source by key."""
        with self.transaction():
            for key in keys:
                self._rows("DELETE FROM entries WHERE source = ? AND key = ?", source, key)

    def entries_taken(self) -> int:
        """Return how many entries were ever removed; while it stays, ids only rise."""
        return int(self.setting("entries_taken", 0))

    def forget_entry(self, entry_id: int) -> None:
        """Remove one entry, and the message that it came from, for ever."""
        with self.transaction():
            found = self._rows("SELECT source, text FROM entries WHERE id = ?", entry_id)
            for source, text in found:
                if source != "corpus":
                    self._rows("DELETE FROM messages WHERE role = 'owner' "
                               "AND trim(text) = trim(?, ?)", text, " \n")
            self._rows("DELETE FROM entries WHERE id = ?", entry_id)

    def entry_keys(self, source: str) -> Set[int]:
        """Return the keys of every document of one source."""
        return {row[0] for row in self._rows("SELECT key FROM entries WHERE source = ?", source)}

    def entries(self, where: str = "1", *values: Any, limit: int = -1) -> List[Entry]:
        """Return entries in the order in which they came, filtered by an SQL condition on e."""
        rows = self._rows(f"SELECT {ENTRY_COLUMNS} FROM entries e WHERE {where} "
                          f"ORDER BY e.id LIMIT {int(limit)}", *values)
        return [_entry(row) for row in rows]

    def mark_learned(self, keys: Iterable[int], layer: int = 0) -> None:
        """Note that the documents of these keys have been learned, by the layer of that number."""
        with self.transaction():
            for key in keys:
                self._rows("UPDATE entries SET learned = ? WHERE key = ?", layer + 1, key)

    # which layer read what: number 0 is the base, number n + 1 the delta n

    def mark_trained(self, layer: int) -> None:
        """Note that the layer of that number trains from now on, on everything not held out."""
        with self.transaction():
            self._rows("UPDATE entries SET trained = ? WHERE trained IS NULL AND NOT held_out",
                       layer)

    def trained_texts(self, source: str, keys: Iterable[int]) -> List[Tuple[str, int]]:
        """Return the texts of some documents of a source, each with the first layer to read it."""
        found = (self._rows("SELECT text, trained FROM entries WHERE source = ? AND key = ? "
                            "AND trained IS NOT NULL", source, key) for key in keys)
        return [row for rows in found for row in rows]

    def inherit_trained(self, source: str, key: int, layer: int) -> None:
        """Note that a layer has read words of this document before it was a document."""
        with self.transaction():
            self._rows("UPDATE entries SET trained = ? WHERE source = ? AND key = ? "
                       "AND NOT held_out", layer, source, key)

    def want_unlearned(self, key: int, layer: int, chars: int, corrected: bool) -> None:
        """Note words, known by a key, that are gone and that layers from this one on have read."""
        with self.transaction():
            self._rows("""
                INSERT INTO unlearning(key, trained, chars, corrected) VALUES (?, ?, ?, ?)
                ON CONFLICT(key) DO UPDATE SET trained = min(trained, excluded.trained),
                                               corrected = min(corrected, excluded.corrected)""",
                       key, layer, chars, int(corrected))

    def take_back(self, key: int) -> Optional[int]:
        """Note that words are there again; return the first layer that has read them, if any."""
        with self.transaction():
            layer = self._one("SELECT trained FROM unlearning WHERE key = ?", key)
            self._rows("DELETE FROM unlearning WHERE key = ?", key)
            return layer

    def to_unlearn(self) -> List[Tuple[int, int, bool]]:
        """Return (first layer, characters, whether only corrected) of all that is to be unlearned.

        What was told again in the meantime is not among it.
        """
        rows = self._rows("""
            SELECT trained, chars, corrected FROM unlearning u WHERE NOT EXISTS (
                SELECT 1 FROM entries e WHERE e.key = u.key
                AND e.source IN ('corpus', 'chat', 'taught', 'approved'))""")
        return [(trained, chars, bool(corrected)) for trained, chars, corrected in rows]

    def unlearn_from(self, layer: int) -> None:
        """Note that the layers from this one on are gone: what they learned waits to be learned."""
        with self.transaction():
            self._rows("UPDATE entries SET learned = 0 WHERE trained >= ? OR learned > ?",
                       layer, layer)
            self._rows("UPDATE entries SET trained = NULL WHERE trained >= ?", layer)
            self._rows("DELETE FROM unlearning WHERE trained >= ?", layer)

    def copy_layers(self, names: Dict[str, str]) -> None:
        """Store layers under other names as well."""
        with self.transaction():
            for old, new in names.items():
                self._rows("INSERT INTO layers(name, sealed, manifest, checksum, data, saved_at) "
                           "SELECT ?, sealed, manifest, checksum, data, saved_at FROM layers "
                           "WHERE name = ?", new, old)

    def unlearned_chars(self) -> Tuple[int, int]:
        """Return how many characters wait to be learned: of the corpus, and of all else."""
        rows = dict(self._rows("""
            SELECT source = 'corpus', sum(length(text)) FROM entries
            WHERE learned = 0 AND NOT held_out GROUP BY 1"""))
        return rows.get(1, 0), rows.get(0, 0)

    def hold_out(self, keys: Iterable[int], epoch: int) -> None:
        """Keep documents, known by the keys of their first lines, from training for ever."""
        with self.transaction():
            for key in keys:
                self._rows("INSERT OR IGNORE INTO probes(key, epoch) VALUES (?, ?)", key, epoch)

    def probe_keys(self) -> Set[int]:
        """Return the keys of the first lines of all that is held out."""
        return {row[0] for row in self._rows("SELECT key FROM probes")}

    def probe_epochs(self) -> Dict[int, int]:
        """Return when each held-out document, by the key of its first line, became one."""
        return dict(self._rows("SELECT key, epoch FROM probes"))

    def first_of_newest(self, chars: int) -> int:
        """Return the id from which on entries may be counted: those hold at most chars in all."""
        if (self._one("SELECT sum(length(text)) FROM entries WHERE NOT held_out") or 0) <= chars:
            return 0
        total, first = 0, 0
        for first, size in self._rows("SELECT id, length(text) FROM entries WHERE NOT held_out "
                                      "ORDER BY id DESC"):
            total += size
            if total > chars:
                return first + 1
        return first

    def about_count(self) -> int:
        """Return about how many entries there are, at once however many they be."""
        return self._one("SELECT max(id) FROM entries") or 0

    def ids_holding(self, groups: Sequence[Sequence[str]], limit: int) -> List[int]:
        """Return the newest ids of entries that hold a form of each of the groups.

        A form is a word or several in a row; with * at its end it is only how the last one begins.
        """
        groups = [[f.replace("\0", "") for f in group if f.strip("*\0 ")] for group in groups]
        if not groups or not all(groups):
            return []
        if self.has_fts:
            query = " AND ".join("(" + " OR ".join(map(_fts_form, g)) + ")" for g in groups)
            rows = self._rows("SELECT rowid FROM entries_fts WHERE entries_fts MATCH ? "
                              "ORDER BY rowid DESC LIMIT ?", query, limit)
        else:
            most = MAX_LIKE_FORMS // len(groups)
            groups = [group[:most] for group in groups]
            like = "words || ' ' LIKE ? ESCAPE '\\'"
            each = " AND ".join("(" + " OR ".join([like] * len(g)) + ")" for g in groups)
            rows = self._rows(f"SELECT id FROM entries WHERE {each} ORDER BY id DESC LIMIT ?",
                              *(_like_form(f) for g in groups for f in g), limit)
        return [row[0] for row in rows]

    def entries_of(self, ids: Sequence[int]) -> List[Entry]:
        """Return the entries of these ids that may be recalled, in the order of the ids."""
        found = {entry.id: entry for entry in self.entries(
            f"e.id IN ({','.join('?' * len(ids))}) AND e.recall", *ids)}
        return [found[i] for i in ids if i in found]

    def words_among(self, words: Sequence[str]) -> List[str]:
        """Return which of the words occur in the memory; none where there is no full-text index."""
        if not self.has_fts:
            return []
        found: List[str] = []
        for at in range(0, len(words), 500):
            part = words[at:at + 500]
            marks = ",".join("?" * len(part))
            found += [row[0] for row in self._rows(
                f"SELECT term FROM entries_words WHERE term IN ({marks})", *part)]
        return found

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
                         f"% {_like(stem)}%")

    # layers, settings, progress, life

    def save_layers(self, layers: Dict[str, Layer]) -> None:
        """Store layers under their names.  A sealed layer that is there already stays."""
        with self.transaction():
            for name, layer in layers.items():
                if self._one("SELECT sealed FROM layers WHERE name = ?", name):
                    continue
                self._rows("""
                    INSERT INTO layers(name, sealed, manifest, checksum, data, saved_at)
                    VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT(name) DO UPDATE SET
                        sealed = excluded.sealed, manifest = excluded.manifest,
                        checksum = excluded.checksum, data = excluded.data,
                        saved_at = excluded.saved_at""",
                           name, int(layer.sealed), json.dumps(layer.manifest),
                           zlib.crc32(layer.data), layer.data, self.clock())

    def manifests(self) -> Dict[str, Any]:
        """Return the manifest of every stored layer, without its data."""
        rows = self._rows("SELECT name, manifest FROM layers")
        return {name: json.loads(manifest) for name, manifest in rows}

    def layers(self) -> Dict[str, Layer]:
        """Return every layer.  Raises StoreError when a checksum does not fit."""
        found = {}
        for name, sealed, manifest, checksum, data in self._rows(
                "SELECT name, sealed, manifest, checksum, data FROM layers ORDER BY rowid"):
            if zlib.crc32(data) != checksum:
                raise StoreError(f"layer {name!r} in {self.path} is damaged: its checksum is "
                                 f"{zlib.crc32(data)}, expected {checksum}; restore the file "
                                 f"from a copy")
            try:
                found[name] = Layer(json.loads(manifest), bytes(data), bool(sealed))
            except ValueError as error:
                raise StoreError(f"layer {name!r} in {self.path} has a damaged manifest ({error}); "
                                 f"restore the file from a copy") from None
        return found

    def remove_layers(self, names: Iterable[str]) -> None:
        """Remove layers that have been folded into others or are no longer needed."""
        with self.transaction():
            for name in names:
                self._rows("DELETE FROM layers WHERE name = ?", name)

    def setting(self, name: str, default: Any = None) -> Any:
        """Return a stored value, or the default."""
        text = self._one("SELECT value FROM settings WHERE name = ?", name)
        return default if text is None else json.loads(text)

    def set_setting(self, name: str, value: Any) -> None:
        """Store a JSON-able value under a name."""
        with self.transaction():
            self._rows("INSERT OR REPLACE INTO settings(name, value) VALUES (?, ?)",
                       name, json.dumps(value))

    def settings(self, prefix: str) -> Dict[str, Any]:
        """Return the stored values whose names begin with prefix, without it."""
        rows = self._rows("SELECT name, value FROM settings WHERE substr(name, 1, ?) = ?",
                          len(prefix), prefix)
        return {name[len(prefix):]: json.loads(value) for name, value in rows}

    def add_progress(self, step: int, tokens: int, loss: Optional[float],
                     held_out_bpc: Optional[float]) -> None:
        """Note how well it does at a step of its life."""
        with self.transaction():
            self._rows("INSERT INTO progress(at, step, tokens, loss, held_out_bpc) "
                       "VALUES (?, ?, ?, ?, ?)", self.clock(), step, tokens, loss, held_out_bpc)

    def progress(self, count: int = 1000) -> List[Dict[str, Any]]:
        """Return the newest notes of add_progress, oldest first."""
        rows = self._rows("SELECT at, step, tokens, loss, held_out_bpc FROM progress "
                          "ORDER BY id DESC LIMIT ?", count)
        return [dict(zip(("at", "step", "tokens", "loss", "held_out_bpc"), row))
                for row in rows[::-1]]

    def log(self, event: str, **detail: Any) -> None:
        """Write one event into the life log."""
        with self.transaction():
            self._rows("INSERT INTO life(at, event, detail) VALUES (?, ?, ?)",
                       self.clock(), event, json.dumps(detail))

    def life(self, count: int = 100) -> List[Dict[str, Any]]:
        """Return the newest events of the life log, oldest first."""
        rows = self._rows("SELECT at, event, detail FROM life ORDER BY id DESC LIMIT ?", count)
        return [{"at": at, "event": event, **json.loads(detail)}
                for at, event, detail in rows[::-1]]

    def counts(self) -> Dict[str, int]:
        """Return how many messages, sessions, entries and learned entries there are."""
        return {"messages": self._one("SELECT count(*) FROM messages"),
                "sessions": self._one("SELECT count(*) FROM sessions"),
                "entries": self.entry_count(),
                "told": self._one("SELECT count(*) FROM entries WHERE source != 'corpus'"),
                "learned": self._one("SELECT count(*) FROM entries WHERE learned"),
                "held_out": self._one("SELECT count(*) FROM entries WHERE held_out")}

    def integrity(self) -> str:
        """Return "ok", or what is wrong with the file."""
        found = self._one("PRAGMA integrity_check")
        if found == "ok":
            self.layers()
        return found

    # the lease: one trainer for one file

    def take_lease(self, owner: str, seconds: float, alive: Callable[[str], bool]) -> bool:
        """Return True, and hold the trainer's place, unless a living holder has it."""
        with self.transaction():
            held = self.setting("lease", {"owner": owner, "until": 0})
            if held["owner"] != owner and held["until"] > self.clock() and alive(held["owner"]):
                return False
            self.set_setting("lease", {"owner": owner, "until": self.clock() + seconds})
            return True

    def drop_lease(self, owner: str) -> None:
        """Give the trainer's place back if it is ours."""
        with self.transaction():
            if self.setting("lease", {}).get("owner") == owner:
                self._rows("DELETE FROM settings WHERE name = 'lease'")


def _connect(path: str) -> sqlite3.Connection:
    """Return a connection for all threads, with explicit transactions that reach the disk."""
    db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
    try:
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA synchronous = FULL")
    except BaseException:
        db.close()
        raise
    return db


def _create_private(path: str) -> None:
    """Create the file, readable by its owner alone, unless it is there."""
    if path != ":memory:" and not os.path.exists(path):
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))


def _statements(script: str) -> Iterator[str]:
    """Yield the statements of a script; a trigger's body is one statement with its head."""
    pending = ""
    for line in script.splitlines(keepends=True):
        pending += line
        if sqlite3.complete_statement(pending):
            yield pending
            pending = ""


def _like(text: str) -> str:
    """Return text with LIKE's wildcards escaped."""
    return re.sub(r"([\\%_])", r"\\\1", text)


def _fts_form(form: str) -> str:
    """Return a form, quoted so that nothing in it can be a sign of FTS5's own."""
    star = "*" if form.endswith("*") else ""
    return '"' + form.rstrip("*").replace('"', '""') + '"' + star


def _like_form(form: str) -> str:
    """Return the LIKE pattern of a form in words that have a space before each."""
    return f"% {_like(form[:-1])}%" if form.endswith("*") else f"% {_like(form)} %"


def _entry(row: Sequence[Any]) -> Entry:
    return Entry(*row[:5], *map(bool, row[5:]))


def _store_trouble(path: str, error: Exception) -> str:
    """Return one line that says what is wrong with the file and what to do."""
    remedies = (("not a database", "it is some other file: choose another --db"),
                ("malformed", "it is damaged: restore it from a copy, or choose another --db"),
                ("No such file", "check that its folder exists, or use --db"),
                ("unable to open", "check that its folder exists and may be written, or use --db"),
                ("readonly", "make it and its folder writable, or use --db"),
                ("read-only", "make it and its folder writable, or use --db"),
                ("Is a directory", "that is a folder: name a file with --db"),
                ("disk is full", "free some space and try again"),
                ("disk I/O", "check the disk and its free space"),
                ("locked", "another program holds it: close that and try again"))
    found = str(error)
    for sign, remedy in remedies:
        if sign.lower() in found.lower():
            return f"the memory file {path} cannot be used ({found}); {remedy}"
    return f"the memory file {path} cannot be used ({found}); run `doctor`, or choose another --db"


# ──────────────────────────────────────────────────────────────────────────────────────
# 13 · RECALL — what it was told, it can say   uses: 1 12
# ──────────────────────────────────────────────────────────────────────────────────────
#
# A question is taken apart (analyzed): about what, about whose, and which slot is to be filled, a
# name, a place, a time. Entries that hold its rarest words are gathered, their sentences taken
# apart in the same way, and each is scored: does it hold every telling word, or one that names the
# same relation; is it about the same owner; has it something new to fill the slot with? Only what
# passes all three is said, turned round (my cat, your cat). What nobody told, nobody can know.
#

UNKNOWN_REPLY = "I do not know that yet. Tell me, and I will keep it."
UNKNOWN_REPLIES = (UNKNOWN_REPLY, "That is something I was never told.",
                   "I have nothing about that in my memory.", "I cannot say; nobody told me.")
KEPT_REPLY = "I will keep that."
KEPT_REPLIES = (KEPT_REPLY, "I have it now.", "That is in my memory now.",
                "I have read it, thank you.")
STEM_CHARS = 5
WEAK_SCORE = 0.45
SURE_SCORE = 0.65
FACT_SHARE = 0.95       # of recall_score is enough for a fact
STORY_SHARE = 1.6       # of it is wanted of a line in a passage, which may be a mere story
NEAR_SCORE = 0.035      # facts that fit equally well up to this are told apart by their time
NEWS_SCORE = 0.35       # that is enough where a statement says that something has changed
FEWEST_ENTRIES = 2000.0  # as if: in a small memory a word is rare by chance
MOST_HELD = 100         # entries that one word brings, newest first
TOLD_PRIOR = 1.5        # what the owner said is looked at before what was read
MOST_ENTRIES = 30       # of those with most of the words, so many are read
MOST_TO_SCAN = 100_000  # entries, up to which words in a row are looked for (in 3 ms)
MOST_UNITS = 40         # sentences that are looked at closely
MAX_ASKED_CHARS = 500   # a longer text is understood by its beginning
MAX_QUERY_TERMS = 8     # a longer question is searched for by its rarest words
WORD_OR_SIGN = re.compile(rf"[{UNSPACED}]|"
                          r"\b\w{1,2}-\w+|\w+-in-law(?:['’]s)?|\w+(?:['’]\w+)*['’]?|[.!?…;,:]")

# Facts about English: its closed classes, and everyday relations that have several names. Words of
# other languages are told apart by how common they are in the memory, and by nothing else.
FUNCTION_WORDS = frozenset("""
    a an the this that these those some any no not every each all both other another such
    same own often i me my mine myself we us our ours you your yours yourself he him his she
    her hers it its they them their theirs who whom whose which what where when why how
    whatever one ones something am is are was were be been being have has had having do does
    did doing done will would shall should can could may might must cannot ought let of in
    on at to from for with by about as into onto over under off up down out through since
    until till than then and or but nor if whether so because while there here again also
    too just only very really quite rather please now still ever never always already yet
    maybe perhaps actually exactly right ok okay yes well hey hi hello oh anything
    everything anybody somebody anyone someone ago wrong matter thing things more most much
    many lot lots kind sort type currently today moment bit best better""".split())
IDLE_VERBS = frozenset("be have do get got go went put keep find come came happen".split())
LIGHT_WORDS = frozenset("""be have get got go put keep find use take make give come happen mean
    tell say know remember remind forget need long way try look able usual usually originally
    another big high little dear own new good whole nice lovely part ask man person guy
    folk""".split())
PLAIN_WORDS = FUNCTION_WORDS | LIGHT_WORDS
OWNERS_WORDS = frozenset("i me my mine myself we us our ours ourselves".split())
OWN_SELF_WORDS = frozenset("you your yours yourself".split())
DETERMINERS = frozenset("""my our your his her its their the a an this that these those some any
    each every no mine two three four five six seven eight nine ten""".split())
ASKING_WORDS = frozenset("who whom whose which what where when why how".split())
AUXILIARIES = frozenset("""am is are was were do does did can could will would have has had should
    shall may might must""".split())
PREPOSITIONS = frozenset("""in on at under behind near beside below above inside outside between
    opposite by next to from into onto over along through off across around with""".split())
ABBREVIATED = re.compile(r"(?:\b(?:mr|mrs|ms|dr|st|prof|no|vs|approx|e\.g|i\.e|a\.m|p\.m)|\b\w)\.$",
                         re.I)

# The words of one relation say the same of the same thing. Behind = they say it so well that the
# newer of two such statements takes the place of the older.
RELATIONS = """
= name call nickname | = live home house reside address flat apartment dwell lodge move | = born
birth birthday birthdate birthplace | = old age year turn | = tyre tire | = job work profession
occupation employ employer career workplace | work workplace office | job become | like love
favourite enjoy prefer fond adore fan | hate dislike loathe detest stand | marry marriage wed
anniversary | mother mum mummy mama | father dad daddy papa | grandmother grandma granny nan |
grandfather grandpa grandad granddad | child kid | boss manager supervisor chief superior | doctor
physician gp | couch sofa settee | bike bicycle cycle | car drive automobile vehicle auto | phone
telephone mobile number call ring cell tel | fridge refrigerator | movie film cinema | trash
garbage rubbish bin | floor storey level | parcel package packet | recycle recycling | buy purchase
get from | leave depart departure go start set | leave park put place store hide keep lay lie stay
| arrive arrival come land | come visit arrive pick collect appear | begin start opening | end
finish close over stop | close shut | code password pin combination passcode passphrase | open
unlock | study learn student university college school | study subject degree major | learn lesson
class course | member belong membership | teach teacher | eat food meal dish diet | cook make dish
bake recipe | drink beverage take | allergy allergic | ill sick disease illness | fear afraid scare
frighten terrify phobia | hobby enjoy pastime | cost price pay expensive charge | earn salary
income wage | weigh weight heavy kilo | tall height high centimetre centimeter foot metre | long
length last duration | far distance kilometre mile away | big size large | meet appointment see |
appointment go see visit | travel trip holiday vacation journey go | trip outing excursion | flight
plane fly | speak language | wear size | lose missing | write author writer book novelist | play
instrument | sing song choir | give present gift | grow plant | sleep bed | wake alarm | dream want
wish | plan intend want | topic theme subject about | team club | blood group type | pill medicine
medication drug | company firm business | friend mate buddy pal | neighbour neighbor | mail post |
mail email | horoscope zodiac star | turn birthday | origin from born come native nationality |
origin buy | city town place | nationality country from citizen origin | borrow lend loan owe debt
| repair fix mend service maintain | collect empty | collect collection gather | celebrate birthday
| hurt break injure injury | fly travel trip | own belong | home country | treat eat food like |
bus coach | cellar basement | garden yard | university uni college campus | surgery operation
operate surgeon | smoke cigarette tobacco | fee charge cost price pay membership | pill tablet
medicine medication | vegetarian veggie | raise keep | caretaker janitor | digit figure number code
combination | rehearse rehearsal practise practice | due deadline submit expire | expire valid run
out | hire rent rental lease | landlord landlady | hurt ache pain sore | shirt jersey kit | laundry
washing wash | guest visitor | exam test | lecture lecturer professor | student pupil | pupil
classmate schoolmate | retire pension | resign quit stop | lad boy | lady woman | guy man | grow
raise childhood upbringing | wedding marry married | honeymoon wed | spare extra | shade colour |
mad angry | fragrance smell scent | scar injury wound | glasses spectacle optician | lens contact |
power electricity electric | light lamp bulb | tap faucet | sweet candy | biscuit cookie | soup
broth | rug carpet | curtain blind | cupboard closet wardrobe cabinet | drawer chest | shelf
bookcase | box crate carton | bag purse handbag backpack rucksack | wallet purse | lorry truck |
lift elevator | pavement sidewalk | shop store | bakery baker bread | butcher meat | chemist
pharmacy drugstore | plumber plumbing | choir sing singer | band music musician | game match |
coach trainer | gym workout | race marathon | jog run | swim swimmer | climb climber | ski skiing
skier | hen chicken | rabbit bunny | dog puppy | cat kitten | horse pony | novel book story | song
tune melody | picture photo painting portrait image | film movie picture | joke funny | language
tongue | quarrel argue argument fight | promise swear | win victory | prize award | owner belong
possess | repeat again | rash allergic allergy | dizzy sick | dusk sunset | kit equipment | rule
law | salary pay | save saving | heir will | buyer sell buy purchase | handle care charge | run
charge manage lead head | lead leader head chair | founder found establish open | guard watch |
theft steal thief rob | burn fire | flood overflow | leak drip | jam stuck block | crack break |
tear rip | cut trim | build construct builder | design designer architect | invent inventor | name
title | depth deep | width wide breadth broad | length long | death die | strength strong | warmth
warm | choice choose | growth grow | loss lose | sale sell | belief believe | arrival arrive |
departure leave | flight fly | thought think | proof prove | speech speak | trade job | mum parent
""".split("|")

# Kinds of things that questions ask for by name, and what is of that kind.
KINDS_TEXT = """
colour color: red orange yellow green blue purple violet pink brown black white grey gray gold
    silver beige turquoise blond blonde dark light
pet animal: bee cat dog hamster rabbit parrot horse pony canary turtle tortoise goldfish fish mouse
    snake lizard bird budgie gerbil ferret kitten puppy hen chicken cow goat sheep donkey
sibling: brother sister
weekend: saturday sunday
saturday sunday: weekend
son: boy
boy: son
daughter: girl
girl: daughter
open unlock: code password pin combination key passcode
money cost price pay: euro dollar franc pound cent penny crown
child kid: son daughter
spouse partner: husband wife marry
wife husband: marry
relative family: mother father brother sister aunt uncle cousin niece nephew son daughter
    grandmother grandfather grandma grandpa wife husband child
parent: mother father mum dad mom
instrument: piano guitar violin cello flute trumpet drum drums clarinet saxophone oboe harp viola
    accordion organ trombone bass ukulele banjo recorder keyboard bassoon horn
sport: football soccer tennis basketball volleyball hockey golf rugby cricket badminton swimming
    running climbing judo karate boxing rowing sailing cycling skiing handball squash fencing yoga
drink beverage: tea coffee water milk juice wine beer cola lemonade cocoa chocolate whisky gin
bird: parrot budgie canary chicken hen duck goose pigeon sparrow owl cockatoo
fruit: apple pear banana orange cherry plum grape strawberry raspberry melon peach apricot mango
vegetable: carrot potato tomato onion cabbage spinach pea bean leek cucumber pumpkin broccoli
food dish meal: pizza pasta rice soup bread cheese lasagne curry salad cake sushi stew risotto
    noodle egg meat fish potato pancake porridge burger sandwich dumpling spaghetti paella
language: english german french italian spanish portuguese dutch danish swedish norwegian finnish
    estonian russian polish czech greek turkish arabic hebrew chinese japanese korean hindi latin
    hungarian romanian ukrainian
vehicle: car bike bicycle bus train tram van truck lorry motorbike scooter motorcycle
limb: arm leg hand foot knee elbow shoulder hip ankle wrist finger toe eye ear tooth
season: spring summer autumn winter fall
flower: rose tulip daisy lily sunflower orchid daffodil violet
tree: oak apple birch pine cherry fir maple willow
""".strip().replace("\n    ", " ").splitlines()

# Forms that no ending explains, and what is written in short.
IRREGULAR = dict(pair.split("=") for pair in """
    children=child men=man women=woman feet=foot teeth=tooth mice=mouse people=person wives=wife
    knives=knife lives=live leaves=leave went=go gone=go got=get gotten=get gave=give given=give
    took=take taken=take came=come saw=see seen=see met=meet taught=teach wrote=write
    written=write ate=eat eaten=eat drank=drink drunk=drink drove=drive driven=drive flew=fly
    flown=fly spoke=speak spoken=speak kept=keep broke=break broken=break lost=lose sold=sell
    paid=pay grew=grow grown=grow slept=sleep sang=sing sung=sing swam=swim ran=run won=win
    found=find built=build chose=choose chosen=choose wore=wear worn=wear rode=ride ridden=ride
    hid=hide hidden=hide hung=hang knew=know known=know sent=send thought=think stole=steal
    stolen=steal woke=wake fell=fall fallen=fall held=hold told=tell said=say became=become
    began=begin begun=begin brought=bring caught=catch drew=draw drawn=draw felt=feel fought=fight
    lent=lend laid=lay rang=ring rung=ring spent=spend stood=stand swept=sweep threw=throw
    thrown=throw bought=buy left=leave made=make did=do done=do had=have has=have learnt=learn
    burnt=burn dreamt=dream led=lead fed=feed died=die dies=die lied=lie tied=tie dealt=deal
    meant=mean dug=dig froze=freeze frozen=freeze lit=light shot=shoot rose=rise risen=rise
    shook=shake shaken=shake struck=strike swore=swear sworn=swear tore=tear torn=tear bent=bend
    spilt=spill stuck=stick knelt=kneel crept=creep sank=sink sunk=sink shone=shine fled=flee
    wound=wind proven=prove bound=bind bred=breed spoilt=spoil bore=bear blew=blow blown=blow
    shown=show sewn=sew mown=mow swollen=swell forgave=forgive forgiven=forgive lying=lie
    dying=die evening=evening morning=morning ceiling=ceiling training=practice building=building
    oldest=old eldest=old elder=old older=old bitten=bite forgot=forget forgotten=forget
    tv=television fav=favourite fave=favourite bday=birthday xmas=christmas appt=appointment
    christmas=christmas favorite=favourite color=colour mom=mum mommy=mum owns=possess
    owned=possess""".split())

# Words that ask for nothing more where a place or a time is asked for already.
IDLE_WORDS = {"place": "leave left park put place store hide hidden lay lie lies located kept keep "
                       "stay find",
              "time": "start begin schedule due back away"}

# What fills a slot.  A word that asks for one of these need not be in the statement itself.
SLOT_WORDS = {
    "name": "name nickname called call",
    "time": "time day date year month hour weekday",
    "place": "place location spot whereabouts address street road destination",
    "region": "city town country village",
    "amount": "number amount count sum quantity",
    "colour": "colour color", "age": "age", "person": "person man woman guy whom",
}
SLOT_IMPLIED = {"birthday": "time", "birthdate": "time", "anniversary": "time",
                "birthplace": "place", "hometown": "place", "workplace": "place",
                "height": "amount", "weight": "amount", "salary": "amount", "price": "amount",
                "fee": "amount", "fare": "amount"}
LEADING = PREPOSITIONS | {"many", "much", "for", "of", "about"}
ADJECTIVES = frozenset("""best own old new big small little first last next favourite favorite
    former current only good other whole full exact""".split())
SPANS_OF_TIME = frozenset("day morning evening night week month year time moment".split())
UNITS = frozenset("""second minute hour day week month year metre meter kilometre kilometer mile
    centimetre centimeter foot inch page cm km m h min""".split())
MEASURES = UNITS | frozenset("""degree percent litre liter gram kilo kilogram ton tonne pound stone
    foot yard acre hectare bar volt watt kg""".split())
GOALS = frozenset("""work school bed church town university college hospital sea room platform
    floor level""".split())
PLACES = frozenset("""here home abroad upstairs downstairs outside inside street road avenue lane
    square town city village country cellar attic kitchen""".split())
TIMES = frozenset("""january february march april may june july august september october november
    december monday tuesday wednesday thursday friday saturday sunday mon tue wed thu fri sat sun
    oclock clock pm noon midnight midday morning evening night afternoon tomorrow tonight
    yesterday today week weekend month year day hour minute second spring summer autumn winter
    christmas easter daily weekly monthly yearly always never every before after when since until
    birthday whitsun dawn dusk lunch breakfast dinner century decade sunrise sunset jan feb mar apr
    jun jul aug sep sept oct nov dec""".split())
NUMBERS = frozenset("""zero one two three four five six seven eight nine ten eleven twelve thirteen
    fourteen fifteen sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy
    eighty ninety hundred thousand million half dozen single couple no once twice first second
    third fourth fifth both none""".split())
PEOPLE = frozenset("""man woman boy girl person people friend boss teacher doctor dentist lawyer
    neighbour neighbor colleague mother father brother sister son daughter wife husband uncle aunt
    cousin niece nephew grandmother grandfather grandma grandpa mum dad mom child parents partner
    girlfriend boyfriend nurse plumber electrician everybody nobody""".split())
NEGATIONS = frozenset("not no never nobody nothing none neither without cannot".split())


class Reply(NamedTuple):
    """What was said and where it came from: "memory", "model" or "nothing"."""

    text: str
    source: str
    entry: Optional[Entry] = None
    score: float = 0.0


class Recall(NamedTuple):
    """An entry that fits, what would be said from it, and how well it fits (0 to 1)."""

    score: float
    entry: Entry
    answer: str


class Token(NamedTuple):
    """A word as it stands, folded, without its endings, and every relation that it may name."""

    text: str
    word: str
    base: str
    senses: FrozenSet[str]


class Term(NamedTuple):
    """A word that the question is about: how telling it is, and how it is owned ("my", "the")."""

    token: Token
    weight: float
    vital: bool
    owner: str
    known: bool
    sought: bool = False
    aside: str = ""


class Asked(NamedTuple):
    """A question taken apart: what it is about, what is to fill the gap, and about whom."""

    tokens: List[Token]
    terms: List[Term]
    slot: str
    slot_at: int
    person: str
    bare: bool
    closed: bool


# words


@functools.lru_cache(maxsize=1 << 15)
def base_of(word: str) -> str:
    """Return a folded word without the commonest English endings: cities → city."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("sses", "xes", "ches", "shes")) or (
            len(word) > 5 and word.endswith("oes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    if len(word) > 4 and word.endswith("ied"):
        return word[:-3] + "y"
    for ending in ("ing", "ed"):
        stump = word[:-len(ending)]
        if word.endswith(ending) and not word.endswith("eed") and len(stump) > 1 and (
                re.search("[aeiouy]", stump)):
            if len(stump) > 2 and stump[-1] == stump[-2] and stump[-1] not in "lsz":
                return stump[:-1]
            short = re.fullmatch("[^aeiou]*[aeiouy][^aeiouwxy]", stump)
            mute = bool(_MUTE_E.search(stump))
            return stump + "e" if short or mute else stump
    return word


# manag(e)d, decid(e)d, donat(e)d, and not paint|ed, avoid|ed, treat|ed
_MUTE_E = re.compile("(?:[vc]|dg|iz|ur|[^s]s|[^aeiou](?:at|ut|id|in|ir|ar)|..ang|.ag)$")


def _relations(lines: Iterable[str]) -> Dict[str, FrozenSet[str]]:
    """Return the relations that each base may name, each by a sign that is no word."""
    table: DefaultDict[str, Set[str]] = defaultdict(set)
    for number, line in enumerate(lines):
        sign = "=" if "=" in line else "#"
        for word in line.replace("=", " ").split():
            table[base_of(word)].add(f"{sign}{number}")
    return {base: frozenset(signs) for base, signs in table.items()}


def _kinds(lines: Iterable[str]) -> Dict[str, FrozenSet[str]]:
    """Return the members of each kind."""
    table: Dict[str, FrozenSet[str]] = {}
    for line in lines:
        names, _, members = line.partition(":")
        for name in map(base_of, names.split()):
            table[name] = table.get(name, frozenset()) | frozenset(map(base_of, members.split()))
    return table


def _slots(table: Dict[str, str]) -> Dict[str, str]:
    return {base_of(word): slot for slot, words in table.items() for word in words.split()}


SENSES = _relations(RELATIONS)
KINDS = _kinds(KINDS_TEXT)
SLOT_OF = _slots(SLOT_WORDS)
COST_SENSE = SENSES["cost"]
NAME_SENSE = max(SENSES["name"])


@functools.lru_cache(maxsize=1 << 15)
def _senses(word: str) -> FrozenSet[str]:
    base = base_of(word)
    return SENSES.get(base, frozenset()) | SENSES.get(word, frozenset()) | {base}


@functools.lru_cache(maxsize=1 << 14)
def _token(text: str, word: str) -> Token:
    return Token(text, word, base_of(word), _senses(word))


def _unfolded(text: str) -> str:
    """Return one word without case and accents."""
    return text.casefold() if text.isascii() else "".join(folded_words(text)) or text.casefold()


def tokens_of(text: str) -> List[Token]:
    """Return the words of a sentence, contractions in full and each possessive 's by itself."""
    tokens = []
    for found in WORD_OR_SIGN.findall(text.replace("’", "'")):
        if not found[0].isalnum() and found[0] != "_":
            continue
        found = found.replace("-", "")
        stump, mark, tail = found.partition("'")
        word, tail = _unfolded(stump), tail.casefold()
        if word in RUN_TOGETHER and not mark:
            tokens += [_token(part, part) for part in RUN_TOGETHER[word].split()]
            continue
        if tail == "t" and word.endswith("n") and word != "n":  # don't, can't, won't
            word = {"can": "can", "won": "will", "shan": "shall"}.get(word, word[:-1])
            tokens += [_token(word, word), _token("not", "not")]
            continue
        tokens.append(_token(stump, word))
        full = CONTRACTED.get(tail)
        if tail == "s" and word in TAKES_IS:
            full = "is"
        if full:
            tokens.append(_token(full, full))
        elif mark and (tail == "s" or (not tail and word.endswith("s"))):
            tokens.append(_token("'s", "'s"))
    return tokens


CONTRACTED = {"m": "am", "re": "are", "ve": "have", "ll": "will", "d": "would"}
TAKES_IS = frozenset("it he she that there here who what where when how why this which".split())
RUN_TOGETHER = {
    "whats": "what is", "wheres": "where is", "whos": "who is", "hows": "how is",
    "whens": "when is", "im": "i am", "ive": "i have", "dont": "do not", "doesnt": "does not",
    "didnt": "did not", "isnt": "is not", "arent": "are not", "cant": "can not",
    "wont": "will not", "thats": "that is", "theres": "there is", "wasnt": "was not",
    "teh": "the", "u": "you", "ur": "your", "wher": "where", "waht": "what", "wat": "what"}


def _same_root(a: str, b: str) -> bool:
    """Return whether two bases differ by an ending alone: allergy, allergic; bake, bakery."""
    if a[:4] != b[:4] or len(a) < 4:
        return False
    shared = len(os.path.commonprefix([a, b]))
    shorter, longer = sorted((a, b), key=len)
    if shared == len(shorter) == 4:
        return longer[4:] in ENDINGS
    if shared == len(shorter) >= 6 and not longer.endswith("inlaw"):
        return True  # physio, physiotherapy
    strange = a not in KNOWN_WORDS and b not in KNOWN_WORDS and len(longer) - shared <= 3
    return shared >= 5 and shared >= 0.55 * len(longer) and (
        strange or {a[shared:], b[shared:]} <= ENDINGS)


ENDINGS = frozenset(("", *"""e y er or r ry ery ing ed ly ist al ic ics ies ion ian an ish ment ness
    ity able ful ous ant ance ent ence ive ate ation age hood ship""".split()))


def _misspelt(a: str, b: str) -> bool:
    """Return whether one slip of the finger leads from a to b; short words are left alone."""
    if min(len(a), len(b)) < 3 or abs(len(a) - len(b)) > 1 or a == b:
        return False
    if min(len(a), len(b)) == 3:
        return sorted(a) == sorted(b)
    at = len(os.path.commonprefix([a, b]))
    if len(a) == len(b):
        swapped = a[:at] + a[at + 1:at + 2] + a[at] + a[at + 2:]
        return swapped == b or (len(a) >= 6 and a[at + 1:] == b[at + 1:])
    shorter, longer = sorted((a, b), key=len)
    return longer[:at] + longer[at + 1:] == shorter


def agreement(asked: Token, told: Token, known: bool = True) -> float:
    """Return how surely two words mean the same: 1 the same word, less a relation's other name.

    A word that is known is never taken for a misspelling.
    """
    if asked.word == told.word:
        return 1.0
    if asked.base == told.base:  # the meeting is not quite where we meet
        return 1.0 if asked.word.endswith("ing") == told.word.endswith("ing") else 0.94
    shared = asked.senses & told.senses
    if shared:
        return 1.0 if max(shared).startswith("=") else 0.9
    if asked.base in (told.base + "er", told.base + "r", told.base + told.base[-1:] + "er"):
        return 0.9 if told.word != told.base else 0.0  # who painted is the painter; but
        # the gardener is not the garden
    if told.base in KINDS.get(asked.base, ()):
        return 0.8
    if _same_root(asked.base, told.base):
        return 0.9
    return 0.85 if not known and _misspelt(asked.word, told.word) else 0.0


# what is asked


_AGAIN = r"(?:please|just|still|maybe|kindly|happen to|even|also|quickly|ever|again|by any chance)"
_POLITE = re.compile(
    r"(?:hey|hi|hello|oh|ok|okay|well|so|and|but|um+|uh+|h+m+|please|now|then|by the way|btw|say|"
    r"listen|sorry|excuse me|quick question|also|again|just|no|yes|yeah|actually|wait)\b"
    r"[\s,.!:;…]*", re.I)
_FRAME = re.compile(
    r"(?:(?:(?:can|could|would|will) (?:you|u) {a}*"
    r"(?:tell|remind|help|remember|recall|say|give|show)"
    r"(?: me)?(?: remember)?"
    r"|do (?:you|u) {a}*(?:know|remember|recall|have any idea)|(?:you|u) (?:know|remember)"
    r"|(?:please )?(?:tell|remind) me|let me know|any idea|remember"
    r"|(?:i )?{a}*(?:forgot|forget|don'?t know|do not know|can'?t remember|cannot remember|"
    r"don'?t remember|do not remember|can'?t recall|wonder|was wondering|am wondering|"
    r"need to know|want to know|would like to know)|i'?d (?:like|love) to know"
    r"|(?:have|did) i {a}*(?:tell|told|mention|mentioned|say|said)(?: to)?(?: you)?"
    r"|what (?:did|have) i {a}*(?:tell|told|say|said)(?: to)?(?: you)?"
    r"|what (?:else )?do (?:you|u) (?:know|remember)|may i ask|what about|how about)"
    r"(?:[\s,:]+(?:again|of|about|that|if|whether|once more|anything|something|everything))*"
    r"(?:[\s,:]+|$))"
    .replace("{a}", r"(?:" + _AGAIN + r" )"), re.I)
_ASKS = re.compile(
    r"(?:(?:in|on|at|under|from|to|for|with|by|since|until|till|of|about|into|around) "
    r"(?:what|when|who|where|how|which|whose|whom)|which|whose|whom"
    r"|(?:what|who|how|why|where|when)s|(?:what|who|how|why|where|when)'s"
    r"|(?:where|when|why|who|what|how) (?:is|are|was|were|do|does|did|can|could|will|would|"
    r"should|am|have|has|had|shall|may|might|must|else|again|on earth|exactly)"
    r"|name (?:the|my|our|one)|what (?!an? |i |we |he |she |they |you )\w+|who \w+"
    r"|how (?:many|much|old|long|far|tall|big|often|heavy|high|late|early|large|wide|deep|fast)"
    r"|(?:do|does|did|is|are|was|were|am|can|could|will|would|has|had|should|shall|may|isn't|"
    r"aren't|don't|doesn't|didn't) (?:i|my|you|your|we|our|he|she|it|they|there|this|that|his|her|"
    r"their|u|any)"
    r"|(?:is|are|was|were|does|did|has|can|will) (?:the|[A-Z]\w+)"
    r"|have (?:i|you|we|they))\b", re.I)
_INDIRECT = re.compile(
    r"(?:what|which|who|whose|whom|where|when|why|how|if|whether|my|our|the|about|of|in|on|at)\b",
    re.I)
_ASKS_LATER = re.compile(
    r"[,;] (?:so |and |but )?(?:what|when|where|how) "
    r"(?:is|are|was|were|do|does|did|can|could|should|must) (?:\w+ )*\w+[\s?]*$", re.I)
_EXCLAIMS = re.compile(
    r"(?:what an?|how (?:nice|lovely|sad|good|great|funny|cool|beautiful))\b", re.I)


_WORK = re.compile(r"^(what (?:do|does|did) .*?)\bdo(?: for (?:a living|work|money)| as (?:a )?"
                   r"(?:job|work))?\W*$", re.I)
_FROM = re.compile(r"^((?:where|(?:from )?(?:what|which) (?:country|city|town|place))\b.*?)"
                   r"(?: come)? from\W*$", re.I)
_LIVING = re.compile(r"\b(?:do|does|did) (?:for (?:a living|work)|as (?:a )?(?:job|work))\b|"
                     r"\bearn (?:a|my|his|her|their|the) living\b", re.I)
_INTO_LIFE = re.compile(r"\bc[oa]me into (?:the|this) world\b", re.I)
_CLEFT = re.compile(r"^(what|who|where|when|(?:what|which) \w+) (?:is|was) it,? "
                    r"(?!like\b|about\b|called\b)(?:that |which |who )?(?=\S+ \S)", re.I)
_PLACE_NAME = re.compile(r"^(?:(?:what|which) (?:is|was) )?the names? of the \w+ "
                         r"(where|who|whom|which|that)\b", re.I)
_INSERTED = re.compile(
    r"(?<=\w)[,;.]? (?:any idea|any clue|do you (?:still )?(?:know|remember|recall)|"
    r"can you tell me|what (?:is|was) (?:it|that)(?=\W*$))[, ]*"
    r"(what|who|where|when|which|how|\b|$)", re.I)
_WHO_AM_I = re.compile(r"^who(?:'?m| am) i\W*$", re.I)


def unframed(text: str) -> Tuple[str, bool]:
    """Return a text without its opening courtesies, and whether those asked for something.

    "Hey, do you remember where I live" asks where I live.
    """
    framed = False
    first, _, others = text.partition(" ")
    text = " ".join(filter(None, (RUN_TOGETHER.get(first.casefold(), first), others)))
    while text:
        match = _POLITE.match(text)
        if not match:
            match = _FRAME.match(text)
            rest = text[match.end():] if match else ""
            if match and "about" not in match[0].casefold() and not (
                    _INDIRECT.match(rest) or re.match(r"(?:\w+ ){0,2}[\w']+(?:'s\b|s' )", rest)):
                match = None
            framed = framed or bool(match)
        if not match or match.end() == 0:
            text = _WORK.sub(r"\1 have as job", text)  # What does she do?
            text = _INTO_LIFE.sub("born", _LIVING.sub("has as job", text))
            text = _FROM.sub(r"\1 origin", text)
            text = _CLEFT.sub(r"\1 ", _PLACE_NAME.sub(r"\1", _INSERTED.sub(r" \1", text)))
            return _WHO_AM_I.sub("what is my name", text), framed
        text = text[match.end():]
    return text, framed


def is_question(text: str) -> bool:
    """Return whether the text asks rather than tells, as far as its mark shows."""
    return text.rstrip(" \"')").endswith(("?", "？", "؟"))


def asks(text: str) -> bool:
    """Return whether the text asks: by its mark, or by the way in which it begins."""
    if is_question(text):
        return True
    text = text[:MAX_ASKED_CHARS]
    if _EXCLAIMS.match(text):
        return False
    if _CLEFT.match(text):
        return True
    rest, framed = unframed(text)
    if framed:
        statement = re.match(r"(?:please )?(?:i )?(?:just )?(?:forgot|forget|remember)\b", text,
                             re.I)
        return not statement or bool(re.match(r"(?:wh|how|if)", rest, re.I)) or bool(
            re.search(r"\b(?:what|where|who|when)(?: \w+)* (?:it|is|was|again)\W*$", text, re.I))
    if _ASKS.match(rest):
        return not _is_clause(rest)
    if _ASKS_LATER.search(rest):
        return True
    needs = re.match(r"(?:i need|i forgot|i'?ve forgotten|i have forgotten) (.*)", rest, re.I)
    rest = needs[1] if needs else rest
    return _only_names(tokens_of(rest))


def _only_names(tokens: Sequence[Token]) -> bool:
    """Return whether a text only names what it wants: code of the alarm; my cat's name."""
    words = [t.word for t in tokens if t.word != "please"]
    if not 2 <= len(words) <= 9 or set(words) & AUXILIARIES:
        return False
    bases = [base_of(word) for word in words]
    of = any(base in WANTED and after in ("of", "for") for base, after in zip(bases[:3], words[1:]))
    return of or bases[-1] in WANTED and (
        words[0] in ("my", "our", "the", *WANTED) or tokens[-1].word == "please")


WANTED = frozenset("""name birthday age address number code password pin colour size date time
    title key price""".split())


def _is_clause(text: str) -> bool:
    """Return whether "who" or "what" opens a part of a statement: "Who dares wins." """
    return text.rstrip().endswith(("!", "."))  and bool(
        re.match(r"(?:who|what) (?!is|are|was|were|do|does|did|has|have|can|will)", text, re.I))


def owner_at(tokens: Sequence[Token], at: int, adjoining: bool = False) -> str:
    """Return to whom the noun at a place belongs: "my", "your", another noun, "the", or "".

    my cat → my; my sister's cat → sister; the cat of my sister → sister. Where it has to be
    adjoining, only the commonest adjectives may stand between.
    """
    if at + 1 < len(tokens) and tokens[at + 1].word == "of":
        for token in tokens[at + 2:at + 5]:
            if token.word not in DETERMINERS and token.word not in FUNCTION_WORDS:
                return token.base
    for back in range(at - 1, max(-1, at - 5), -1):
        word = tokens[back].word
        if word == "'s":
            return tokens[back - 1].base if back else ""
        if word in DETERMINERS:
            return {"our": "my", "mine": "my"}.get(word, word)
        if word not in ADJECTIVES and (word in FUNCTION_WORDS or word in PREPOSITIONS or adjoining):
            return ""
    return ""


def _noun_owner(tokens: Sequence[Token], at: int) -> str:
    """Return the owner of a noun that stands by itself or behind another: my phone number → my."""
    owner = owner_at(tokens, at, adjoining=True)
    if not owner and at and _is_relation(tokens[at - 1]):
        return owner_at(tokens, at - 1, adjoining=True)
    return owner


def _slot(tokens: Sequence[Token]) -> Tuple[str, int]:
    """Return what is to fill the gap of a question, and the place of the word that asks for it."""
    words = [t.word for t in tokens]
    heads = [t.base in SLOT_OF and not (i + 1 < len(tokens) and tokens[i + 1].base in SLOT_OF)
             and not (i and t.base == "address" and words[i - 1] in OWNERS_WORDS - {"my", "our"})
             for i, t in enumerate(tokens)]  # of a street number the number is asked for
    for i, token in enumerate(tokens[1:], 1):
        if words[i - 1] in ("what", "which"):
            if heads[i]:
                return SLOT_OF[token.base], i
            if token.base in SITES or token.base in PEOPLE - {"child", "parents"}:
                return "place" if token.base in SITES else "person", -1
    named = [i for i, t in enumerate(tokens) if SLOT_OF.get(t.base) == "name"
             and not {"when", "where", "why"} & set(words[:i])]
    if named:
        return "name", named[0]
    for i, word in enumerate(words):
        after = words[i + 1] if i + 1 < len(words) else ""
        if word == "where":
            return "place", i
        if word == "when" and not ASKING_WORDS & set(words[:i]):
            return "time", i
        if word == "how" and (after in ("often", "late", "early") or after == "long"
                              and (LASTING | {"open", "ago"}) & set(words)):
            return "time", i + 1
        if word in ("who", "whom", "whose"):
            return "person", i
        if word == "why":
            return "reason", i
        if word == "how" and after == "old":
            return "age", i + 1
        if word == "how" and after == "long":
            return "span", i + 1
        if word == "how" and after == "many" and "old" in words:
            return "age", words.index("old")
        if word == "how" and after in ("many", "much", "far"):
            return ("number" if after == "many" else "amount"), i + 1
        if word == "how" and after in MEASURED:
            return "measure", i + 1
    for i, token in enumerate(tokens):
        if heads[i] and SLOT_OF[token.base] != "name" and (
                not i or words[i - 1] not in ("favourite", "these", "those", "one", "some", "old")):
            return SLOT_OF[token.base], i
    return next((SLOT_IMPLIED[t.base] for i, t in enumerate(tokens) if t.base in SLOT_IMPLIED
                 and not {"for", "on", "at"} & set(words[max(0, i - 2):i])), ""), -1


MEASURED = frozenset("tall heavy high big wide deep thick hot cold warm fast strong".split())
SITES = frozenset("""room shop store hospital building hall school hotel restaurant island office
    station drawer cupboard shelf floor street island harbour""".split())
LASTING = frozenset("valid will can may still keep".split())  # How long is it open? Till six


def _known_words() -> FrozenSet[str]:
    """Return every base that the tables hold."""
    return frozenset().union(SENSES, KINDS, *KINDS.values(), PEOPLE, TIMES, PLACES, NUMBERS)


KNOWN_WORDS = _known_words()


def analyzed(text: str) -> Asked:
    """Return a question taken apart."""
    rest, framed = unframed(text)
    rest = rest or text
    tokens = tokens_of(rest)
    words = {t.word for t in tokens}
    if words & ENDING:  # it is open until it closes
        tokens = [t._replace(senses=t.senses | _senses("close")) if t.base == "open" else t
                  for t in tokens]
    slot, slot_at = _slot(tokens)
    closed = not words & ASKING_WORDS and not framed and bool(tokens) and (
        tokens[0].word in AUXILIARIES)
    terms = _terms(tokens, slot, slot_at)
    mine = bool({"my", "our"} & words) and not closed  # How do you call my cat?
    person = ("self" if words & OWN_SELF_WORDS and not mine else
              "owner" if words & OWNERS_WORDS else "")
    bare = person == "owner" and all(_is_relation(t.token) or not t.vital or (
        t.owner in ("", "a", "an", "any", "some") and not t.token.text[:1].isupper())
        for t in terms)
    return Asked(tokens, terms, slot, slot_at, person, bare, closed)


RELATION_NAMES = frozenset("""name birthday age job work profession home address phone number height
    weight favourite favorite color colour size hobby team language nationality allergy
    salary shoe blood type group workplace""".split())


def _is_relation(token: Token) -> bool:
    """Return whether a noun names an attribute of its owner rather than a thing of its own."""
    return token.base in RELATION_NAMES


def _tells(token: Token, at: int, slot_at: int) -> bool:
    """Return whether a word of a question says what it is about."""
    return (at != slot_at and token.word not in FUNCTION_WORDS and token.word != "'s"
            and token.base not in LIGHT_WORDS and token.word not in LIGHT_WORDS
            and token.word not in PREPOSITIONS)


def _terms(tokens: Sequence[Token], slot: str, slot_at: int) -> List[Term]:
    """Return the telling words of a question; where there are none, those that hardly tell."""
    idle = IDLE_WORDS.get(slot, "").split()
    telling = [i for i, t in enumerate(tokens) if _tells(t, i, slot_at)
               and (not slot or SLOT_OF.get(t.base) != slot or owner_at(tokens, i) == "my")]
    chosen = [i for i in telling if tokens[i].base not in idle] or telling
    if slot in ("", "person") and all(
            owner_at(tokens, i, True) or tokens[i - 1].word in ("what", "which") for i in chosen):
        sought = any(tokens[i - 1].word in ("what", "which") for i in chosen if i)
        chosen += [i for i, t in enumerate(tokens) if not owner_at(tokens, i, True) and (
            t.base in LIGHT_WORDS - IDLE_VERBS
            or t.word == "have" and not sought and tokens[0].word == "what")]
    if not chosen:
        chosen = [i for i, t in enumerate(tokens) if t.word not in FUNCTION_WORDS
                  and t.word != "'s" or (i == slot_at and t.base in SENSES)
                  or (i and t.word in ("up", "off", "out", "down"))]
    return [_term(tokens, i) for i in chosen[:MAX_QUERY_TERMS]]


def _term(tokens: Sequence[Token], at: int) -> Term:
    token, owner = tokens[at], owner_at(tokens, at, adjoining=True)
    before = tokens[at - 1].word if at else ""
    after = tokens[at + 1].word if at + 1 < len(tokens) else ""
    led = before in LEADING and (before != "to" or token.text[:1].isupper())  # to eat is no goal
    vital = token.base not in SPANS_OF_TIME and (bool(owner) or after == "'s" or led or (
        token.text[:1].isupper() and at > 0) or (
        # Where is the spare battery? Behind "is" all that follows "the" names the thing
        len(tokens) > 1 and at > 2 and (BE & {t.word for t in tokens[1:3]}
                                        or at + 2 == len(tokens) and tokens[-1].word in BE)
        and bool(owner_at(tokens, at)) and token.word not in IRREGULAR
        and not token.word.endswith(("ing", "ed"))))
    vital = vital or token.word in PARTICLES or token.word.isdigit() or before in HAVING
    sought = before in ("what", "which") or (before == "of" and at > 2)
    return Term(token, 1.5 if vital else 1.0, vital, owner, True, sought and not owner,
                _aside(tokens, at) if vital and owner not in ("my", "your") else "")


def _aside(tokens: Sequence[Token], at: int) -> str:
    """Return the preposition of a phrase that may be left out: for my form, on the platform."""
    before = [t.word for t in tokens[max(0, at - 3):at] if t.word in ADJUNCTS]
    return before[-1] if before and not tokens[at].text[:1].isupper() else ""


HAVING = frozenset("have has had".split())
PARTICLES = frozenset("up off out down".split())
ENDING = frozenset("until till long late not".split())
ADJUNCTS = frozenset("in on at for as during".split())
BE = frozenset("is are was were".split())


@functools.lru_cache(maxsize=1 << 12)
def _forms(token: Token) -> List[str]:
    """Return how a word and the other names of its relations are looked for, its own form first."""
    mates = [base for base, senses in SENSES.items() if senses & token.senses]
    members = [form for base in KINDS.get(token.base, ()) for form in (base, base + "s")]
    return list(dict.fromkeys(itertools.chain(
        *map(_endings, [token.base, *mates]), members)))


@functools.lru_cache(maxsize=1 << 12)
def _endings(base: str) -> Tuple[str, ...]:
    """Return what to look for to find a word with any of its endings."""
    irregular = [word for word, its_base in IRREGULAR.items() if its_base == base]
    if len(base) > 4 or (len(base) == 4 and base[-1] not in "ye"):
        stump = base[:-1] if base[-1] in "ye" else base  # studied
        return (stump[:STEM_CHARS] + "*", *irregular)
    if not base.isascii() or len(base) < 2:
        return (base,)
    stump = base[:-1] if base[-1] in "ye" else base + base[-1]
    endings = {"y": ["ies", "ied"], "e": ["ing"]}.get(base[-1], ["ing", "ed"])
    own = ("", "s", "d", "r") if base[-1] == "e" else ("", "s", "ed", "ing")
    return (*(base + ending for ending in own), *(stump + ending for ending in endings), *irregular)


# candidates


class Unit(NamedTuple):
    """A sentence of the memory that might answer: where it stands and what would be said."""

    entry: Entry
    text: str
    tokens: List[Token]


OFTEN_LEFT_OUT = "aeiouhrtns"
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
VOWELS = "aeiouy"


def _beside(rows: Sequence[str]) -> Dict[str, str]:
    """Return, for each key, those hit in its place by mistake, and vowels taken for one another."""
    return {key: row[max(0, i - 1):i] + row[i + 1:i + 2] + (VOWELS if key in VOWELS else "")
            for row in rows for i, key in enumerate(row)}


BESIDE = _beside(KEYS)


def _spellings(memory: Memory, token: Token) -> List[str]:
    """Return words of the memory that one slip of the finger may have made of this one."""
    word = token.word
    if not 3 <= len(word) <= 20 or not word.isascii() or token.base in KNOWN_WORDS:
        return []
    swaps = range(len(word) - 1)
    near = {word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in swaps}
    if len(word) > 3:
        reach = range(1, min(len(word), STEM_CHARS + 1))  # words are found by how they begin
        near |= {word[:i] + word[i + 1:] for i in reach}
        near |= {word[:i] + c + word[i:] for i in reach for c in OFTEN_LEFT_OUT + word[i - 1]}
        near |= {word[:i] + c + word[i + 1:] for i in reach if len(word) > 5
                 for c in BESIDE.get(word[i], "")}
    return memory.words_among(sorted(near))


def gathered(memory: Memory, asked: Asked) -> Tuple[Asked, List[Entry]]:
    """Return the question with its words weighed by how rare they are, and what may answer it.

    Those entries come first that hold most of what is telling. A word that is in very many brings
    what the owner said, the newest, and those where another of the words stands with it.
    """
    if not asked.terms:
        return asked, _of_common_words(memory, asked)
    total, terms = max(FEWEST_ENTRIES, memory.about_count() + 1.0), []
    mass: DefaultDict[int, float] = defaultdict(float)
    forms = [_forms(term.token) for term in asked.terms]
    told: Set[int] = set()
    for at, term in enumerate(asked.terms):
        ids, own = _held(memory, forms, at, _endings(term.token.base), asked.bare)
        known = bool(ids)
        if not ids:
            slips = _spellings(memory, term.token)
            ids, own = _held(memory, [slips], 0, slips, False) if slips else (ids, own)
        rare = log(1.0 + total / (len(ids) + 0.5)) / log(1.0 + 2.0 * total)
        if not ids and not term.vital:
            rare = 0.6  # a word that was never heard tells little, unless it names what is meant
        terms.append(term._replace(weight=term.weight * max(rare, 0.4),
                                   known=known or term.token.base in KNOWN_WORDS))
        told |= own
        for i in ids:
            mass[i] += terms[-1].weight
    usual = max((term.weight for term in terms), default=1.0)
    for i in _ids_of_i_am(memory, asked):
        mass[i] = max(mass[i], usual)
    for i in told & mass.keys():
        mass[i] *= TOLD_PRIOR
    least = 0.45 * max(mass.values(), default=0.0)
    best = sorted((i for i in mass if mass[i] >= least), key=lambda i: (mass[i], i))
    return asked._replace(terms=terms), memory.entries_of(best[:-MOST_ENTRIES - 1:-1])


def said_so(memory: Memory, text: str, asking: bool) -> List[Entry]:
    """Return exchanges in which somebody says just these words, or holds them in a row, or says
    just the first or last of them ("I have to go" for "I have to go now").

    Common words have so many entries that the newest of them need not be those.
    """
    words = folded_words(text[:MAX_ASKED_CHARS])
    if not 0 < len(words) <= MAX_QUERY_TERMS:
        return []
    said = " ".join(words)
    ids = memory.ids_holding([[f"h {said} a"]], MOST_ENTRIES)
    if not ids and memory.about_count() < MOST_TO_SCAN:
        ids = memory.ids_holding([["h " + said], [said + " a"]], MOST_ENTRIES)
        ends = {" ".join(part) for size in range(2, len(words))
                for part in (words[:size], words[-size:])}
        if ends and not ids and not asking:  # a question is understood in other ways
            ids = memory.ids_holding([[f"h {end} a" for end in sorted(ends)]], MOST_ENTRIES)
    return memory.entries_of(ids)


def _of_common_words(memory: Memory, asked: Asked) -> List[Entry]:
    """Return the newest entries for a text of words that are everywhere, like "How are you?"."""
    words = [t.word for t in asked.tokens[:MAX_QUERY_TERMS] if t.word != "'s"]
    ids = memory.ids_holding([[word] for word in words], MOST_HELD)
    return memory.entries_of(ids or memory.ids_holding([words], MOST_HELD))


def _held(memory: Memory, forms: Sequence[Sequence[str]], at: int, own: Sequence[str],
          bare: bool) -> Tuple[Set[int], Set[int]]:
    """Return the ids of entries with a form of one word, and those of them that the owner told."""
    ids = memory.ids_holding([forms[at]], MOST_HELD)
    if len(ids) < MOST_ENTRIES:
        return set(ids), set()
    told = memory.ids_holding([forms[at], [TOLD_MARK]], MOST_HELD)
    if len(ids) < MOST_HELD:
        return set(ids), set(told)
    told += memory.ids_holding([own, [TOLD_MARK]], MOST_HELD)
    others = [form for i, more in enumerate(forms) if i != at for form in more]
    others = others or (["i", "my", "we", "our"] if bare else [])
    if len(told) >= MOST_HELD:
        told += memory.ids_holding([forms[at], others, [TOLD_MARK]], MOST_HELD)
    ids += memory.ids_holding([own], MOST_HELD)
    return {*ids, *told, *memory.ids_holding([forms[at], others], MOST_HELD)}, set(told)


def _ids_of_i_am(memory: Memory, asked: Asked) -> List[int]:
    """Return the ids of what says "I am ...", where that may tell a name, an age or a job."""
    if asked.bare and asked.slot in ("name", "age"):
        return memory.ids_holding([["i am", "i m"], [TOLD_MARK]], MOST_HELD)
    if asked.bare and any(term.token.base in CLASSES for term in asked.terms):
        return memory.ids_holding([["i am a", "i m a", "i am an", "i m an", "be a", "be an"]],
                                  MOST_HELD)
    return []


def sentences_of(text: str) -> List[str]:
    """Return the sentences of one line; an abbreviation's full stop ends none."""
    pieces: List[str] = []
    for piece in _BREAKS.split(text.strip()):
        if pieces and ABBREVIATED.search(pieces[-1]):
            pieces[-1] += " " + piece
        elif piece:
            pieces.append(piece)
    return pieces


_BREAKS = re.compile(r"(?<=[.!?…;])[\"')\]]*\s+|(?<=[。！？])")
_CLAUSES = re.compile(
    r",? (?:and|but) (?=(?:my|our|I|i|we)\b(?! (?:both|all)\b))|, (?=(?:my|our) )")
_HAS_VERB = re.compile(r"\b(?:is|are|was|were|am|has|have|had|do|does|did|can|will)\b|'s |'m |"
                       r"^\W*(?:I|i|we|We) \w+ \w+", re.I)
_ANAPHORS = re.compile(r"(?:and |but )?(?:he|she|it|they|his|her|its|their)\b", re.I)


def statements_of(line: str) -> List[str]:
    """Return what a line states, sentence by sentence and clause by clause; not what it asks.

    A sentence that opens with "he" or "its" stays with the one before it, which says whose.
    """
    told: List[str] = []
    for sentence in sentences_of(line):
        if asks(sentence):
            continue
        if told and _ANAPHORS.match(sentence):
            told[-1] += " " + sentence
            continue
        start = 0
        for cut in _CLAUSES.finditer(sentence):
            if _HAS_VERB.search(sentence[start:cut.start()]) and _HAS_VERB.search(
                    sentence[cut.end():]):
                told.append(sentence[start:cut.start()])
                start = cut.end()
        told.append(sentence[start:])
    return told


def _lines_to_match(entry: Entry) -> Iterator[str]:
    """Yield the lines of an entry that may state something; of an exchange that is none."""
    document = Document(tuple(entry.text.splitlines()), entry.closed)
    if entry.source in TOLD or not document.is_exchange:
        if entry.source in TOLD:
            yield from document.lines
        elif not _SELF_TALK.search(entry.text):  # there the "I" is the program
            yield from (line for line in document.lines if not _speaks_to_you(line))


def _speaks_to_you(line: str) -> bool:
    """Return whether an "I" speaks to a "you", so that it is no owner who tells of himself."""
    words = {word.casefold() for word in WORDS.findall(line)}
    return bool(words & OWN_SELF_WORDS and words & OWNERS_WORDS)


_SELF_TALK = re.compile(r"\bI am (?:a|an|the) (?:\w+ )?(?:program|machine|robot|mind)\b", re.I)


def units_of(entries: Iterable[Entry], asked: Asked) -> List[Unit]:
    """Return the sentences of the entries that share a telling word with the question."""
    needles = {form.rstrip("*")[:4] for term in asked.terms for form in _forms(term.token)}
    units: List[Unit] = []
    for entry in entries:
        for line in _lines_to_match(entry):
            folded = _unfolded(line) if line.isascii() else " ".join(folded_words(line))
            if len(entry.text) < 200 or any(needle in folded for needle in needles):
                units += [Unit(entry, text, tokens_of(text)) for text in statements_of(line)]
        if len(units) >= MOST_UNITS:
            break
    return units


# how well a statement fills the gap


def _matches(asked: Asked, tokens: Sequence[Token]) -> List[Tuple[float, int]]:
    """Return, for each term, how well the statement's best word agrees with it, and its place."""
    return [max([(agreement(term.token, token, term.known), -i) for i, token in enumerate(tokens)]
                + [(0.86, -i) for i in _classed_at(term.token, tokens)],
                default=(0.0, 0)) for term in asked.terms]


def _classed_at(asked: Token, tokens: Sequence[Token]) -> List[int]:
    """Return where a statement says "is a ...", which names a job, or the breed of an animal."""
    if asked.base not in CLASSES:
        return []
    words = [t.word for t in tokens]
    return [i for i in range(len(tokens) - 2) if words[i + 1] in ("a", "an") and (
        words[i] in ("am", "is", "are", "was", "be") and tokens[i + 2].base not in NO_CALLINGS
        or words[i] == "for" and words[i + 2] == "living")]  # I tune pianos for a living


NO_CALLINGS = frozenset("""member fan vegetarian vegan twin child baby man woman boy girl friend
    smoker lover person bit lot good bad big small great very""".split())
CLASSES = frozenset("""job work profession occupation career breed race species brand
    model""".split())


def unit_score(asked: Asked, unit: Unit) -> float:
    """Return how well a sentence answers a question, 0 to 1."""
    tokens = unit.tokens
    best = [(grade, -place) for grade, place in _matches(asked, tokens)]
    if not any(grade for grade, _ in best) or not (
            _defines(asked, tokens, best) and _lies_so(asked, tokens, best)):
        return 0.0
    classed = [at for term, (grade, at) in zip(asked.terms, best) if at in _classed_at(
        term.token, tokens)]
    if classed and any(term.vital and grade and at > classed[0]
                       for term, (grade, at) in zip(asked.terms, best)):
        return 0.0  # it says of another what that is
    asked = _without_asides(asked, tokens, best)
    if _of_another(asked, tokens) or _only_name(tokens) and asked.slot not in (
            "name", "person") and not all(grade for grade, _ in best):
        return 0.0  # how she is called is not what she likes to eat
    score = _covered(asked, best) * (0.4 if _opposed(asked, tokens) else 1.0)
    score *= _person_factor(asked, unit, best)
    for term, (grade, at) in zip(asked.terms, best):
        if grade:
            score *= _owner_factor(term, unit, at, asked)
            if term.sought and owner_at(tokens, at, True) in ("the", "my", "this") and not any(
                    t.word in AUXILIARIES for t in tokens[at + 1:at + 3]) and not any(
                    _capital(tokens, i) for i in range(1, len(tokens)) if i != at):
                score *= 0.6  # "I parked the car" does not say which
    if not asked.slot and _is_story(unit.entry) and sum(1 for grade, _ in best if grade) < 2:
        score *= 0.6  # one word in common is small talk
    return score if asked.closed else score * _slot_factor(asked, tokens, best)


def _of_another(asked: Asked, tokens: Sequence[Token]) -> bool:
    """Return whether the question is about another one than the statement."""
    others = {"other", "another", "second"}
    return "other" in {t.word for t in asked.tokens} and not others & {t.word for t in tokens}


def _only_name(tokens: Sequence[Token]) -> bool:
    """Return whether a statement says of something how it is called, and nothing else."""
    return any(NAME_SENSE in t.senses for t in tokens) and not any(
        t.word in PREPOSITIONS for t in tokens) and len(tokens) < 8


def _is_story(entry: Entry) -> bool:
    """Return whether an entry is a passage whose lines lean on one another, unlike a list."""
    return entry.source not in TOLD and not is_exchange(entry) and _leans(entry.text)


@functools.lru_cache(maxsize=1 << 10)
def _leans(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) > 1 and sum(
        bool(LEANING & set(folded_words(line))) for line in lines) > 0.3 * len(lines)


LEANING = frozenset("he she it they him them his her its their then but and so".split())


def _lies_so(asked: Asked, tokens: Sequence[Token], best: Sequence[Tuple[float, int]]) -> bool:
    """Return whether "What is in the parcel?" is answered with what is in it."""
    if asked.tokens[-1].word == "about":
        return any(t.word == "about" for t in tokens)
    words = [t.word for t in asked.tokens[:3]]
    if len(words) < 3 or words[0] != "what" or words[1] not in AUXILIARIES or (
            words[2] not in ("in", "on", "under", "behind", "inside")):
        return True
    return any(grade and (words[2] in [t.word for t in tokens[max(0, at - 4):at]] or {
        t.base for t in tokens[at + 1:at + 3]} & {"hold", "contain"}) for grade, at in best)


def _defines(asked: Asked, tokens: Sequence[Token], best: Sequence[Tuple[float, int]]) -> bool:
    """Return whether a statement may answer "What is love?": it must be about nothing else."""
    if asked.tokens[-1].word == "like" and not asked.person:  # What is the weather like?
        return any(grade and at == 1 and tokens[0].word in DETERMINERS for grade, at in best)
    if asked.person or asked.closed or [t for t in asked.terms if t.vital and t.owner not in (
            "", "a", "an")] or [t.base for t in asked.tokens[:1]] != ["what"] or (
            asked.tokens[1:] and asked.tokens[1].word not in AUXILIARIES):
        return True
    if len(asked.tokens) > 2 + sum(t.word in ("a", "an") for t in asked.tokens) + len(asked.terms):
        return True
    first = next((i for i, t in enumerate(tokens) if t.word not in FUNCTION_WORDS), -1)
    if any(grade and at and tokens[at].text[:1].isupper() for grade, at in best):
        return True  # What is Biscuit?
    return any(grade == 1.0 and at == first and owner_at(tokens, at) not in ("my", "your")
               for grade, at in best)


OPPOSITES = dict(pair.split("=") for pair in """open=close begin=end start=end begin=finish
    start=finish arrive=leave next=last home=away morning=evening morning=night
    new=old left=right before=after first=last north=south east=west""".split())


def _opposed(asked: Asked, tokens: Sequence[Token]) -> bool:
    """Return whether a statement has the opposite of what is asked: it opens, but when not?"""
    mine, theirs = {t.base for t in asked.tokens}, {t.base for t in tokens}
    if asked.closed or mine & LASTING or {"until", "long"} & mine or mine & NEGATIONS:
        return False
    if any(t.base == "favourite" and not any(agreement(word, its) for word in asked.tokens)
           for t, its in zip(tokens, tokens[1:])):
        return True  # of films, and not of colours
    if any(t.sought and _has_rival(t.token, mine, theirs) for t in asked.terms):
        return True  # an arm is no leg
    pairs = [*OPPOSITES.items(), *((b, a) for a, b in OPPOSITES.items())]
    return any(a in mine and b in theirs and not (b in mine or a in theirs) for a, b in pairs)


def _has_rival(sought: Token, asked: Set[str], told: Set[str]) -> bool:
    """Return whether a statement names another thing of the kind than that which is sought."""
    return not any(sought.senses & _senses(base) for base in told) and any(
        sought.base in kin and kin & (told - asked)
        for kin in (frozenset(KINDS), *KINDS.values()))


def _without_asides(asked: Asked, tokens: Sequence[Token],
                    best: Sequence[Tuple[float, int]]) -> Asked:
    """Return the question with asides that a statement may lack: it says no other such thing.

    Where it tells of the password at the cabin, the one at the library is another.
    """
    if not any(grade and t.vital and not t.aside for t, (grade, _) in zip(asked.terms, best)):
        return asked
    words = {t.word for t in tokens}
    return asked._replace(terms=[
        term._replace(vital=False) if term.aside and not grade and term.aside not in words
        else term for term, (grade, _) in zip(asked.terms, best)])


def _covered(asked: Asked, best: Sequence[Tuple[float, int]]) -> float:
    """Return the share of what is telling in the question that the statement holds."""
    graded = _without_titles(asked, best)
    held = [term for term, grade in graded if grade]
    missing = [term for term, grade in graded if not grade]
    loose = _is_loose(asked, held, missing)
    thing = any(t.vital and not t.token.text[:1].isupper() and t.token.base not in PEOPLE
                for t in held)
    whole = sum(t.weight for t in held) + sum(t.weight * (
        0.2 if thing and not t.vital and t.token.base in OPEN_VERBS else
        _gap(t, held, loose)) for t in missing)
    score = sum(term.weight * grade for term, grade in graded) / whole
    missing = [t for t in missing if t.vital or not (thing and t.token.base in OPEN_VERBS)]
    if any(t.vital for t in missing):  # when did the builders redo the kitchen?
        anchored = sum(t.weight for t in held if t.vital) >= sum(
            t.weight for t in missing if t.vital)
        return (0.8 if anchored and asked.slot in SURE_SLOTS - {"person"} else 0.5) * score
    if any(sense.startswith("=") for t in missing if not t.aside for sense in t.token.senses):
        score *= 0.7  # who is not said to be born has no birthplace
    if missing and all(t.vital for t in held):  # the thing is there, what is asked of it is not
        return (0.9 if loose else 0.75 if thing else 0.65) * score
    return score


def _without_titles(asked: Asked, best: Sequence[Tuple[float, int]]) -> List[Tuple[Term, float]]:
    """Return the terms with their grades; our neighbour Mrs Gray is Mrs Gray."""
    names = {t.token for t, (grade, _) in zip(asked.terms, best)
             if grade and t.token.text[:1].isupper()}
    led = {a for a, b in zip(asked.tokens, asked.tokens[1:]) if b in names}
    return [(t, grade) for t, (grade, _) in zip(asked.terms, best)
            if grade or not (t.token in led and t.token.base in PEOPLE)]


def _is_loose(asked: Asked, held: Sequence[Term], missing: Sequence[Term]) -> bool:
    """Return whether what is missing may be another word for what fills a slot of its own."""
    held_at = {asked.tokens.index(term.token) for term in held}
    return asked.slot in SURE_SLOTS and not any(
        term.vital or term.token.base in KINDS or not term.token.senses.isdisjoint(TELLING)
        or asked.tokens.index(term.token) + 1 in held_at for term in missing)


def _gap(term: Term, held: Sequence[Term], loose: bool) -> float:
    """Return how much a word that is missing counts, as a share of its weight."""
    if term.vital:
        return 1.0
    if term.sought and (len(held) > 1 or any(t.vital for t in held)):
        return 0.25  # which herb it is need not be said to be one
    return 0.5 if loose or len(held) > 1 and not _is_relative(term.token) else 1.0


SURE_SLOTS = frozenset("place time number amount measure span person colour".split())

# What one does with a thing of any kind: that a statement lacks them says little.
OPEN_VERBS = frozenset("""eat drink like love wear take use make sleep fit offer serve feed
    give""".split())
# What tells one fact about a thing or a person from another: that a statement lacks it says much.
TELLING = frozenset().union(*(_senses(word) for word in """name live born age job open close begin
    end leave arrive buy sell borrow lend die marry study work cost weigh phone""".split()))


def _is_relative(token: Token) -> bool:
    """Return whether a word names a relation or a kind, so that its absence tells."""
    return len(token.senses) > 1 or token.base in KINDS


def _person_factor(asked: Asked, unit: Unit, best: Sequence[Tuple[float, int]]) -> float:
    """Return 1 when the statement is about whom the question is about, or else less."""
    words = {token.word for token in unit.tokens}
    if asked.closed and asked.tokens[1:] and asked.tokens[1].word in PRONOUNS or (
            [t.word for t in asked.tokens[-2:]] == ["not", "it"]):
        return 0.3  # Is it far? Time flies, doesn't it?
    if asked.tokens[0].word in ASKING_WORDS and [t.word for t in asked.tokens[2:3]] in (
            ["it"], ["this"]) and not {t.base for t in asked.tokens[3:4]} & SPANS_OF_TIME:
        return 0.3  # How does this work?
    if asked.closed and asked.tokens[0].word in OFFERS and asked.tokens[0].word not in words:
        return 0.3  # Shall we go? asks for no fact
    if asked.person == "self":
        if not words & OWN_SELF_WORDS:
            return 0.8 if _means_anyone(asked, unit, best) else 0.3
        read = 0.7 if asked.tokens[0].word in ASKING_WORDS else 0.3
        return 1.0 if unit.entry.source in TOLD else read
    advice = {t.word for t in asked.tokens} & (ADVICE if asked.person else OPINION)
    if advice and not advice & words:
        named = any(grade and t.vital for t, (grade, _) in zip(asked.terms, best))
        wondering = {t.word for t in asked.tokens[:-1]} & ASKING_WORDS
        told = unit.entry.source in TOLD and advice <= ADVICE
        return 0.5 if not (named and wondering and (told or asked.person or asked.slot)) else (
            0.95 if told else 0.8)
    if asked.bare and asked.slot == "name" and not [
            t for t in asked.terms if t.token != asked.tokens[asked.slot_at]]:
        return 1.0 if _names_the_owner(unit.tokens) else 0.3
    return _bare_factor(asked, unit, best) if asked.bare else 1.0


def _means_anyone(asked: Asked, unit: Unit, best: Sequence[Tuple[float, int]]) -> bool:
    """Return whether "you" is whoever it may be: How long are you on the ferry?"""
    things = [grade for t, (grade, _) in zip(asked.terms, best)
              if t.vital and t.owner not in ("your", "a", "an")]
    return bool(things) and all(things) and not (
        asked.closed or _is_story(unit.entry) or {t.base for t in asked.tokens} & MINDED)


def _bare_factor(asked: Asked, unit: Unit, best: Sequence[Tuple[float, int]]) -> float:
    """Return 1 when what a statement says is said of its own "I", or else less."""
    tokens = unit.tokens
    if any(grade and at and tokens[at].text[:1].isupper() for grade, at in best):
        return 1.0  # the question names somebody, and that is who it is about
    first = tokens if unit.entry.source in TOLD else tokens[:3]
    subjects = {"i", "me", "we", "us", "mine", "myself"} & {t.word for t in first}
    related = [_noun_owner(tokens, at) for grade, at in best if grade]
    if asked.slot_at >= 0 and (asked.slot == "name" or not asked.terms):
        related += [owner_at(tokens, i, True) for i, t in enumerate(tokens)
                    if asked.tokens[asked.slot_at].senses & t.senses]
    if "my" in related:
        return 1.0
    things = [t for t in asked.terms if not _is_relative(t.token)]
    if not subjects and things and all(grade for grade, _ in best) and (
            asked.slot == "place" or asked.slot and all(
                _noun_owner(tokens, at) in ("the", "this") for _, at in best)
            or not _is_story(unit.entry)):
        return 0.75  # where do I find a thing, where is it
    if not subjects or _says_third(asked, tokens, best):
        return 0.3
    held = {at for grade, at in best if grade}
    others = [t for i, t in enumerate(tokens) if i not in held and not _is_relation(t)
              and t.word not in ADJECTIVES and owner_at(tokens, i, True) == "my"]
    return 0.95 if others else 1.0  # my wife and I met


MINDED = frozenset("like love think feel know want remember see dream hear believe".split())
ADVICE = frozenset("should shall could would might".split())
PRONOUNS = frozenset("it this that he she they".split())
OPINION = ADVICE | {"best", "better", "worst"}
OFFERS = frozenset("can could may might shall should will would must".split())


def _names_the_owner(tokens: Sequence[Token]) -> bool:
    """Return whether a statement says how its "I" is called."""
    for i, token in enumerate(tokens):
        if NAME_SENSE in token.senses and (
                owner_at(tokens, i, True) == "my" or (i > 1 and tokens[i - 2].word == "i")
                or (i + 1 < len(tokens) and tokens[i + 1].word == "me")):
            return True
        if token.word == "am" and i + 1 < len(tokens) and _capital(tokens, i + 1):
            return True
    return False


def _says_third(asked: Asked, tokens: Sequence[Token], best: Sequence[Tuple[float, int]]) -> bool:
    """Return whether the verb that the owner's "I" asks for belongs to somebody else."""
    for term, (grade, at) in zip(asked.terms, best):
        if grade and not term.vital and at and tokens[at].word.endswith("s") \
                and tokens[at].word != term.token.word and tokens[at].base != tokens[at].word \
                and tokens[at - 1].word in ("he", "she", "it", "who", "that", "which"):
            return True
    return False


def _only_describes(asked: Asked, term: Term, tokens: Sequence[Token], at: int) -> bool:
    """Return whether a word says only whose, or where, the thing is that a statement is about."""
    if any(t.vital and t is not term and max(agreement(t.token, told) for told in tokens)
           for t in asked.terms):
        return False  # the question names the thing as well
    after, before = tokens[at + 1:at + 3], tokens[max(0, at - 3):at]
    heads = []
    if len(after) == 2 and after[0].word == "'s":
        heads.append(after[1])  # my cat's vet is no cat
    if len(before) == 3 and before[1].word == "of" and before[2].word in DETERMINERS and (
            before[0].word not in FUNCTION_WORDS):
        heads.append(before[0])  # neither is the vet of my cat
    if any(SLOT_OF.get(head.base) is None and not any(
            agreement(t, head) for t in (*asked.tokens, *(t.token for t in asked.terms)))
           for head in heads):
        return True
    # the sofa is not where the cat is: the cat is on it
    return asked.slot == "place" and term.vital and len(before) > 1 and (
        before[-1].word in DETERMINERS and before[-2].word in PREPOSITIONS
        and before[-2].word != "to" and before[0].word != "now")  # from now on our choir


def _owner_factor(term: Term, unit: Unit, at: int, asked: Asked) -> float:
    """Return 1 when a thing belongs to whom the question says, or else less."""
    tokens = unit.tokens
    owner = owner_at(tokens, at, adjoining=tokens[at].base != term.token.base)
    asked_bases = {t.base for t in asked.tokens}
    if _only_describes(asked, term, tokens, at):
        return 0.3
    if not term.vital or term.owner not in ("my", "your"):
        if owner and owner not in DETERMINERS and owner not in asked_bases and term.vital:
            return 0.9
        vague = term.owner == "the" and owner in ("a", "an", "no", "any", "each", "every") and (
            unit.entry.source not in TOLD)
        return 0.6 if vague else 1.0
    if owner == term.owner:
        return 1.0
    if owner in ("my", "your"):
        return 0.3
    if owner == "the" and tokens[at].base != term.token.base:
        return 0.5  # the number 14 bus is no number of mine
    if owner and owner not in DETERMINERS:
        return 1.0 if owner in asked_bases else 0.3
    if owner in ("his", "her", "their", "its"):
        return 0.6
    words = {token.word for token in tokens}
    if tokens[0].word in ("my", "our") and not any(
            agreement(t.token, told) for t in asked.terms for told in tokens[1:4]):
        return 0.4  # my manager's holiday is not mine
    if unit.entry.source in TOLD:
        return 0.95 if words & {"i", "we"} else 0.88
    if at + 1 < len(tokens) and tokens[at + 1].text[:1].isupper() and (
            tokens[at + 1].base in asked_bases):
        return 1.0  # my uncle Henry is uncle Henry
    if sum(max(agreement(t.token, told) for told in tokens) > 0.0 for t in asked.terms) > 1:
        return 0.75
    ours = "our" in {t.word for t in asked.tokens}
    if owner == "the" and not _is_story(unit.entry) and (
            ours or asked.slot in SELDOM and _fills(asked, tokens, {at})):
        return 0.9 if ours else 0.75
    own = not owner and tokens[0].word in ("i", "we") and tokens[at].base not in KINDS
    return 0.95 if own or words & {"i", "we"} and "have" in {t.base for t in tokens} else 0.3


SELDOM = frozenset("time number amount measure name age colour region".split())  # in mere stories


def _fills(asked: Asked, tokens: Sequence[Token], used: Set[int]) -> bool:
    """Return whether a statement holds, beside what is used, something of the kind asked for."""
    costs = asked.slot == "amount" and any(COST_SENSE & t.senses for t in asked.tokens)
    return any(SLOT_FILLERS[asked.slot](tokens, i, used) for i in range(len(tokens))
               if (i not in used or tokens[i].word in PREPOSITIONS) and not (
                   costs and {t.base for t in tokens[i + 1:i + 2]} & UNITS))


def _counts(asked: Asked, tokens: Sequence[Token], best: Sequence[Tuple[float, int]]) -> bool:
    """Return whether a statement counts what "How many ..." asks for, and nothing else."""
    if asked.slot_at < 1 or asked.tokens[asked.slot_at].word != "many":
        return True
    counted = asked.tokens[asked.slot_at + 1:asked.slot_at + 3]
    at = next((at for term, (grade, at) in zip(asked.terms, best)
               if grade and term.token in counted), -1)
    things = {i for i, t in enumerate(tokens) if any(agreement(c, t) for c in counted)} | {at}
    near = [i for end in things for i in range(max(0, end - 3), end)] or range(len(tokens))
    measured = {t.base for t in counted} & UNITS
    return any(_is_number(tokens, i, things) and (
        i + 1 in things or tokens[i - 1].word not in ("at", "as")) and (
            measured or not {t.base for t in tokens[i + 1:i + 2]} & UNITS) for i in near)


def _slot_factor(asked: Asked, tokens: Sequence[Token], best: Sequence[Tuple[float, int]]) -> float:
    """Return 1 when the statement holds something new of the kind that is asked for."""
    if not asked.slot or any(t.sought and grade for t, (grade, _) in zip(asked.terms, best)):
        return 1.0
    used = {at for grade, at in best if grade}
    new = [i for i, t in enumerate(tokens) if i not in used]
    if _fills(asked, tokens, used):
        return 1.0 if _counts(asked, tokens, best) else 0.4
    literal = asked.tokens[max(0, asked.slot_at)]
    named = asked.slot_at >= 0 and asked.slot != "name" and literal.word not in ASKING_WORDS and (
        literal.word not in ("old", "many", "much", "called"))
    return 1.0 if named and any(agreement(literal, tokens[i]) for i in new) else 0.4


_CLOCK = re.compile(r"\d(?:st|nd|rd|th|h|am|pm)$")


def _is_time(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    token, before = tokens[at], tokens[at - 1].word if at else ""
    if token.base in TIMES or token.word in TIMES or _CLOCK.search(token.word):
        return True
    if token.word in ORDINALS:  # the first of every month, on the fifth
        after = tokens[at + 1].word if at + 1 < len(tokens) else "of"
        return after == "of" and (at + 1 < len(tokens) or before == "the")
    number = token.word in NUMBERS or token.word.isdigit()
    return number and (before in ("at", "in", "on", "by", "from", "until", "till", "since", "past",
                                  "around", "before", "after", "is", "to", "half") or (
        len(token.word) == 4 and token.word[:2] in ("19", "20")))


VAGUE = frozenset("both no none single once".split())
ORDINALS = frozenset("first second third fourth fifth sixth seventh eighth ninth tenth".split())


_YEAR = re.compile("(?:1[0-9]|20)[0-9][0-9]")


def _is_number(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    word, before = tokens[at].word, tokens[at - 1].word if at else ""
    if _YEAR.fullmatch(word) and (before in TIMES or before in (
            "in", "since", "of", "from", "until", "by", "before")) or (
                word == "one" and before in ("the", "this", "that", "which")):
        return False
    return word in NUMBERS or any(c.isdigit() for c in word) or word in ("a", "an") and (
        at + 1 in used)


def _is_age(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    if _YEAR.fullmatch(tokens[at].word) and tokens[at - 1].word == "in":
        return bool({t.base for t in tokens[:at]} & {"build", "make", "found", "born", "open"})
    if not _is_number(tokens, at, set()):
        return False
    near = {t.base for t in tokens[max(0, at - 2):at + 4]}
    following = tokens[at + 1].base if at + 1 < len(tokens) else "now"
    return bool(near & {"old", "age", "turn"}) or (
        tokens[at - 1].word in ("is", "am", "are", "was", "were", "already", "just")
        and following in ("year", "month", "week", "now", "today", "and"))


KEEPING = frozenset("keep leave put store park live stay".split())


def _is_place(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    token = tokens[at]
    if token.base in PLACES or token.word in PLACES:
        return True
    before = tokens[at - 1].base if at else ""
    if before == "work" and token.word == "for" or before == "visit" and _capital(tokens, at):
        return True
    if token.word == "by" and _capital(tokens, min(at + 1, len(tokens) - 1)):
        return False
    if token.word in PREPOSITIONS and (token.word != "with" or not at or (
            {tokens[at - 1].word} & AUXILIARIES or KEEPING & {t.base for t in tokens[:at]})):
        for i in range(at + 1, min(at + 6, len(tokens))):
            t = tokens[i]
            if token.word == "to" and i == at + 1 and not (
                    t.word in DETERMINERS or _capital(tokens, i) or t.base in GOALS):
                return False  # wanted to stay
            if t.word in DETERMINERS and t.word not in NUMBERS or t.word in PREPOSITIONS or (
                    t.word in ORDINALS or t.word in ("end", "beginning", "middle", "of")):
                continue
            if t.word in FUNCTION_WORDS or tokens[i - 1].word == "this":
                return False
            timely = t.base in TIMES or t.word in NUMBERS or any(c.isdigit() for c in t.word)
            return i not in used and not timely or (timely and i + 1 < len(tokens)
                                                    and _capital(tokens, i + 1))
    return False


def _capital(tokens: Sequence[Token], at: int) -> bool:
    """Return whether a word is written as a name; in a text all small, any telling word is one."""
    token = tokens[at]
    if token.text[:1].isupper() and token.base not in TIMES:
        return token.word != "i" and token.word not in FUNCTION_WORDS and (
            at > 0 or token.base not in KNOWN_WORDS)
    if not token.word.isalpha() or token.base in TIMES:
        return False
    small = not any(t.text[:1].isupper() for t in tokens)
    return small and token.word not in FUNCTION_WORDS and token.base not in KNOWN_WORDS


def _is_person(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    before = tokens[at - 1] if at else None
    named = _capital(tokens, at) and not {"a", "an"} & {t.word for t in tokens[max(0, at - 2):at]}
    if named:  # neither in Verona nor The Seagull
        return before is None or before.word not in ("in", "near") and before.text != "The"
    if at not in used and _is_agent(tokens, at):
        return True
    beside = at + 1 in used and _capital(tokens, at + 1)  # my cousin Bettina is just Bettina
    return not beside and (tokens[at].base in PEOPLE or tokens[at].base in KINDS["pet"])


def _is_agent(tokens: Sequence[Token], at: int) -> bool:
    """Return whether a word says by whom, or from whom: paid for by the lottery."""
    token, before = tokens[at], tokens[at - 1].word if at else ""
    if token.base in TIMES or token.word in DETERMINERS or _is_number(tokens, at, set()):
        return False
    if at > 1 and before in DETERMINERS:
        return tokens[at - 2].word in ("by", "from", "with")
    return before == "by" and not token.word.endswith("ing")  # founded by miners


def _is_colour(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    return tokens[at].base in KINDS["colour"] or tokens[at].base in ("colour", "color")


def _is_name(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    """Return whether a word says what something is called, or is a name beside what it names."""
    if tokens[at].word in ("called", "named", "name", "nickname", "nicknamed", "call"):
        return True
    if not _capital(tokens, at):
        return False
    if at + 1 in used and _capital(tokens, at + 1):
        return True  # the Castle Pool
    said = at - 1 if tokens[at - 1].word in AUXILIARIES else at - 2
    if at > 1 and tokens[said].word in ("is", "are", "was", "were") and any(
            i < said for i in used):
        return True  # my teacher at school was Mr. Brown
    for back in range(at - 1, max(-1, at - 5), -1):
        if back in used or tokens[back].word == "i":
            return True
        if tokens[back].word in PREPOSITIONS - {"by", "with"} or (
                tokens[back].word not in FUNCTION_WORDS and not _capital(tokens, back)):
            break
    ahead = [t.word for t in tokens[at + 1:at + 4]]
    return len(ahead) == 3 and ahead[0] in ("is", "are", "was") and any(
        i in used for i in range(at + 2, min(at + 5, len(tokens))))


def _is_amount(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    hour = tokens[at - 1].word == "at" or at > 1 and tokens[at - 2].word == "at"
    after = tokens[at + 1].base if at + 1 < len(tokens) else "oclock"
    return _is_number(tokens, at, set()) and tokens[at].word not in ORDINALS | VAGUE and not (
        hour and (after in TIMES or after in FUNCTION_WORDS or after.isdigit()))


def _is_measure(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    """Return whether a number is one of metres or degrees, or ends the statement."""
    after = tokens[at + 1] if at + 1 < len(tokens) else None
    return _is_amount(tokens, at, used) and (after is None or after.base in MEASURES or (
        _is_number(tokens, at + 1, set()) and after.word not in ("a", "an")))


def _is_span(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    units = {t.base for t in tokens[at + 1:at + 3]} & UNITS
    return _is_number(tokens, at, set()) and bool(units) or (
        tokens[at].word in ("since", "until", "till"))


def _is_reason(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    return tokens[at].word in ("because", "since", "so", "for", "to")


def _is_region(tokens: Sequence[Token], at: int, used: Set[int]) -> bool:
    return _capital(tokens, at) and tokens[at].base not in TIMES


SLOT_FILLERS = {"region": _is_region, "time": _is_time, "place": _is_place,
                "number": _is_number, "amount": _is_amount, "measure": _is_measure, "age": _is_age,
                "colour": _is_colour, "person": _is_person, "name": _is_name, "span": _is_span,
                "reason": _is_reason}


# what is said


_TURNS = {"i": "you", "we": "you", "me": "you", "us": "you", "my": "your", "our": "your",
          "mine": "yours", "ours": "yours", "myself": "yourself", "ourselves": "yourselves",
          "i'm": "you are", "i've": "you have", "i'll": "you will", "i'd": "you would",
          "im": "you are", "ive": "you have", "am": "are",
          "we're": "you are", "we've": "you have", "we'll": "you will", "we'd": "you would",
          "your": "my", "yours": "mine", "yourself": "myself", "you're": "I am",
          "you've": "I have", "you'll": "I will", "you'd": "I would"}
_LEADS = re.compile(
    r"(?:(?:no|nope|yes|ok|okay|sorry|so|well|wait|hi|hello|hey|oh|please|right|correction|"
    r"good (?:morning|evening|day|afternoon))[ \w]{0,8}[,.!:;…-]+|(?:actually|by the way|btw|also|"
    r"fyi|for your information)[,:]?|(?:please |just |and |but )*(?:remember|note|keep in mind|"
    r"don'?t forget|do not forget|know|you should know|i want you to know|let me tell you|"
    r"i (?:wanted|want|have) to tell you|did you know|i (?:already )?told you)"
    r"(?: this)?(?: that\b|[:,])|(?:please )?remember(?= (?:my|the|i|our)\b)|and|but)\s+", re.I)


def turned(text: str) -> str:
    """Return what one said of oneself as it is said to one: my cat → your cat, I am → you are.

    What speaks of nobody present stays as it is.
    """
    pieces = re.findall(r"\w+(?:['’]\w+)*|[^\w]+", text)
    said: List[str] = []
    for at, piece in enumerate(pieces):
        word = piece.casefold().replace("’", "'")
        opens = not said or bool(re.search(r"[.!?…:]\s*$", pieces[at - 1]))
        before = [p.casefold() for p in pieces[max(0, at - 6):at] if p[0].isalnum()]
        new = _TURNS.get(word, piece)
        if word in ("im", "ive") and not opens and before and before[-1] not in CLAUSES:
            new = piece  # German for in the, not a slip for I'm
        if word == "mine" and before and before[-1] not in OF_WHOM:
            new = piece  # a salt mine
        if word == "you":
            new = "I" if _leads_a_verb(pieces, at, opens) else "me"
        elif word in ("was", "wasn't") and _speaks(before, "i"):
            new = word.replace("was", "were")
        elif word in ("are", "were", "aren't", "weren't") and _speaks(before, "you"):
            new = {"are": "am", "were": "was", "aren't": "am not", "weren't": "wasn't"}[word]
        said.append(new[:1].upper() + new[1:] if opens and new != piece else new)
    return "".join(said)


CLAUSES = frozenset("and but or so because since that when while if as though think guess".split())
OF_WHOM = frozenset("is are was were not of than like with to and be as from".split())


def _speaks(before: Sequence[str], who: str) -> bool:
    """Return whether the nearest pronoun before a verb is who."""
    for word in reversed(before[-3:]):
        if word == who:
            return True
        if word in ("it", "he", "she", "that", "who", "which", "they", "and", "is", "was"):
            return False
    return False


def _leads_a_verb(pieces: Sequence[str], at: int, opens: bool) -> bool:
    """Return whether "you" stands where "I" would, and not where "me" would."""
    following = pieces[at + 2].casefold() if at + 2 < len(pieces) else ""
    before = pieces[at - 2].casefold() if at > 1 else ""
    return bool(following) and pieces[at + 1].isspace() and (
        opens or following in AUXILIARIES or before in ("that", "and", "but", "if", "when", "what",
                                                        "where", "because", "whether"))


def said_back(unit: Unit) -> str:
    """Return a statement as an answer: without opening words, turned round, with a full stop."""
    text = unit.text.strip()
    while True:
        lead = _LEADS.match(text)
        if not lead or lead.end() == len(text):
            break
        text = text[lead.end():]
    written = unit.entry.source not in TOLD and not OWNERS_WORDS & {t.word for t in unit.tokens}
    text = (text if written else turned(text)).rstrip(" ,;:")  # whoever "you" is in a file
    text = text[:1].upper() + text[1:]
    return text if text.endswith((".", "!", "?", "…", "。", "\"")) else text + "."


def _told_fits(asked: Asked, found: Sequence[Entry]) -> Iterator[Recall]:
    """Yield what statements of the memory answer to a question."""
    for unit in units_of(found, asked):
        score = unit_score(asked, unit)
        if score < (0.1 if asked.closed else 0.3):
            continue
        answer = said_back(unit)
        if asked.closed:
            score, verdict = _verdict(asked, unit, score)
            answer = verdict + answer
        if unit.entry.source not in TOLD:
            score *= 0.98
        yield Recall(min(1.0, score), unit.entry, answer)


def _verdict(asked: Asked, unit: Unit, score: float) -> Tuple[float, str]:
    """Return the score of a statement for a question of yes or no, and the word to begin with."""
    best = [(grade, -place) for grade, place in _matches(asked, unit.tokens)]
    missing = [t for t, (grade, _) in zip(asked.terms, best) if not grade]
    held = [t for t, (grade, _) in zip(asked.terms, best) if grade]
    denied = bool({t.word for t in unit.tokens} & NEGATIONS) != bool(
        {t.word for t in asked.tokens} & NEGATIONS)
    if not missing:
        return score, "No. " if denied else "Yes. "
    single = asked.slot == "name" or any(SENSES.get(t.token.base, frozenset()) & SINGLE
                                         for t in held)
    topics = [t for t in held if t.vital]
    if single and topics and not any(t.vital and t.owner for t in missing):
        factor = _person_factor(asked, unit, best)
        for term, (grade, at) in zip(asked.terms, best):
            factor *= _owner_factor(term, unit, at, asked) if grade else 1.0
        filled = asked.slot != "name" or _slot_factor(asked, unit.tokens, best) == 1.0
        return (0.8 * factor if filled else 0.0), "No. "
    return score, ""


SINGLE = frozenset().union(*(SENSES[word] for word in ("live", "born", "age", "job")))


def _exchange_fits(asked: Asked, text: str, asking: bool, factual: bool,
                   found: Sequence[Entry]) -> Iterator[Recall]:
    """Yield the answers of the exchanges whose question is like the text."""
    weights = {t.word[:STEM_CHARS]: _plain_weight(t) for t in asked.tokens}
    weights.update((term.token.word[:STEM_CHARS], 2.0 * term.weight) for term in asked.terms)
    for entry in found:
        document = Document(tuple(entry.text.splitlines()), entry.closed)
        if entry.source in TOLD or not document.is_exchange:
            continue
        turns = document.turns()
        for place, ((asker, words), (teller, answer)) in enumerate(zip(turns, turns[1:])):
            if (asker, teller) != ("H", "A") or not answer:
                continue
            opens = not place or asking and _stands_alone(words)
            if asking and not opens and asked.person == "owner":
                continue  # further on, an exchange speaks of what was said in it before
            score = _exchange_score(asked, words, asking, weights)
            if folded_words(words) != folded_words(text):
                score = min(score, 0.98)  # the very words come first
            if not opens:
                score *= 0.6  # what is said further on hangs on what was said before
            if factual and score < 0.9:
                score *= 0.6
            if asking and opens and asks(words):
                score = max(score, _answer_score(asked, entry, words, answer))
            yield Recall(min(1.0, score), entry, answer)


def _stands_alone(words: str) -> bool:
    """Return whether a question needs nothing that was said before it, as in a list of them."""
    tokens = tokens_of(words)
    return is_question(words) and not LEANING & {t.word for t in tokens} and any(
        t.word in ("the", "my", "our") or t.text[:1].isupper() and i for i, t in enumerate(tokens))


def _plain_weight(token: Token) -> float:
    if token.word in ASKING_WORDS:
        return 1.0
    return 0.5 if token.word in FUNCTION_WORDS or token.base in LIGHT_WORDS else 1.5


def _exchange_score(asked: Asked, words: str, asking: bool, weights: Dict[str, float]) -> float:
    """Return how alike the text and the first line of an exchange are, 0 to 1."""
    told = tokens_of(unframed(words)[0] or words)
    stems = {t.word[:STEM_CHARS] for t in told}
    weights = {**{t.word[:STEM_CHARS]: _plain_weight(t) for t in told}, **weights}
    score = _likeness({t.word[:STEM_CHARS] for t in asked.tokens}, stems, weights)
    if not asking:
        return score
    said = {t.word for t in told}
    person = "self" if said & OWN_SELF_WORDS else "owner" if said & OWNERS_WORDS else ""
    best = [(grade, -place) for grade, place in _matches(asked, told)]
    if asked.terms and any(_tells(t, i, -1) for i, t in enumerate(told)):
        score = max(score, _mutual(asked, told, best))
    if not asks(words) or asked.closed != (not said & ASKING_WORDS):
        score *= 0.6 if asked.person == "owner" or asked.closed else 0.8
    if person != asked.person and "" not in (person, asked.person):
        score *= 0.5
    if any(t.vital and (not grade or t.owner == "my" != owner_at(told, at))
           for t, (grade, at) in zip(asked.terms, best)):
        score *= 0.5
    if any(not grade and _is_relative(t.token) for t, (grade, _) in zip(asked.terms, best)):
        score *= 0.75  # when it opens is not when it closes
    return score * (0.6 if asked.slot and _slot(told)[0] != asked.slot else 1.0)


def _mutual(asked: Asked, told: Sequence[Token], best: Sequence[Tuple[float, int]]) -> float:
    """Return how far two questions hold each other's telling words, 0 to 1."""
    slot_at = _slot(told)[1]
    theirs = [t for i, t in enumerate(told) if _tells(t, i, slot_at)]
    if not theirs:
        return 0.0
    back = sum(max(agreement(t, mine) for mine in asked.tokens) for t in theirs) / len(theirs)
    return min(_covered(asked, best), back)


def _answer_score(asked: Asked, entry: Entry, words: str, answer: str) -> float:
    """Return how well the answer of an exchange answers a question, alone or with its own.

    "Who is the head cook?" and "Bernard." say together who that is.
    """
    theirs = {t.word for t in tokens_of(words)}
    if asked.closed:
        return 0.0
    units = []
    if asked.person != "self" and not theirs & OWN_SELF_WORDS:
        told = [_token("price", "price") if t.word == "much" else t
                for t in tokens_of(unframed(words)[0] or words) if t.word not in ASKING_WORDS]
        units.append(Unit(entry, answer, told + tokens_of(turned(answer))))
    if asked.person != "owner" or re.search(r"\byour\b|^You\b", answer):
        units += [Unit(entry, text, tokens_of(turned(text))) for text in statements_of(answer)
                  if not (asked.person == "owner"
                          and OWNERS_WORDS & {t.word for t in tokens_of(text)})]
    return max((0.97 * unit_score(asked, unit) for unit in units), default=0.0)


def recall(memory: Memory, text: str, rng: random.Random) -> List[Recall]:
    """Return what fits the text, best first; equal ones in an order that rng decides.

    Of statements that fit equally well the newest comes first: it may replace the others.
    """
    asking = asks(text)
    text = _question_in(text) if asking else text[:MAX_ASKED_CHARS]
    asked = analyzed(text)
    about_nothing = not asked.bare and asked.slot_at >= 0 and all(
        t.token == asked.tokens[asked.slot_at] for t in asked.terms)
    if not asked.tokens:
        return []
    asked, found = gathered(memory, asked)
    alike = list({entry.id: entry for entry in (*said_so(memory, text, asking), *found)}.values())
    fits = list(_exchange_fits(asked, text, asking, not asking and states_a_fact(text), alike))
    told = list(_told_fits(asked, found)) if asking and not about_nothing else []
    fits.sort(key=lambda fit: (-round(fit.score, 2), rng.random()))
    said = [fit.score for fit in told if fit.entry.source in TOLD]
    top = max((fit.score for fit in told), default=0.0)
    if asked.person == "owner" and max(said, default=0.0) >= SURE_SCORE:
        top = max(said)  # of the owner the owner knows best
    near = [fit for fit in told if fit.score > top - (
        NEWS_SCORE if _CHANGES.search(fit.entry.text) else NEAR_SCORE)
            and (fit.score <= top or fit.entry.source in TOLD)]
    near.sort(key=lambda fit: (fit.entry.source not in TOLD, -fit.entry.told_at, -fit.entry.id,
                               -fit.score))
    rest = [fit for fit in told if fit not in near]
    sure = asked.person == "owner" and top >= SURE_SCORE
    if near and fits and fits[0].score > top + NEAR_SCORE * (near[0].entry.source in TOLD) and (
            not sure or near[0].entry.source not in TOLD):
        return sorted([*fits, *near, *rest], key=lambda fit: -round(fit.score, 2))
    near = [near[0]._replace(score=top), *near[1:]] if near else []
    return near + sorted([*rest, *fits], key=lambda fit: -round(fit.score, 2))


_CHANGES = re.compile(r"\b(?:now|new|no longer|any ?more|instead|renamed|changed|moved|switched|"
                      r"replaced|these days)\b", re.I)


def _question_in(text: str) -> str:
    """Return the last sentence of a text that asks, or all of it."""
    asking = [s for line in text.splitlines() for s in sentences_of(line[-MAX_ASKED_CHARS:])
              if asks(s)]
    return asking[-1] if asking else text[:MAX_ASKED_CHARS]


def states_a_fact(text: str) -> bool:
    """Return whether a text tells something to be kept, rather than how one feels or fares."""
    if _LEADS.match(text) and re.match(r"(?:please )?(?:remember|note|don't forget)", text, re.I):
        return True
    corrects = bool(_CORRECTS.match(text))
    for statement in statements_of(text[:MAX_ASKED_CHARS]):
        tokens = tokens_of(statement)
        words = [t.word for t in tokens]
        if "my" in words or "our" in words:
            return True
        telling = [i for i, t in enumerate(tokens) if _tells(t, i, -1)]
        filled = {i for i in range(1, len(tokens)) if _is_value(tokens, i)}
        others = [i for i in telling if i not in filled]
        if filled and not set(words) & OWN_SELF_WORDS and (
                corrects or others or {"i", "we"} & set(words)):
            return True
    return False


def completed(text: str, turns: Sequence[Tuple[str, str]]) -> Optional[str]:
    """Return a correction that leaves out what it is about as a whole sentence, or None.

    "No, it is Friday" after "The meeting is on Monday" says that the meeting is Friday; "No, at
    ten" after "The ferry leaves at nine" that the ferry leaves at ten.
    """
    found = _CORRECTS.match(text)
    if not found or asks(text):
        return None
    rest = text[found.end():].rstrip(" .!")
    pronoun = _BY_PRONOUN.match(rest)
    for role, words in reversed(turns[-3:]):
        said = [s for line in words.splitlines() for s in statements_of(line)]
        before = (said[-1] if role == "owner" else turned(said[-1])).rstrip(" .!") if said else ""
        about = re.match(r"(.{2,80}?) (is|are|was|were)\b(?: (?!not\b).*)$", before)
        if pronoun and about and not _ANAPHORS.match(before):
            return f"{about[1]} {about[2]} {rest[pronoun.end():]}."
        opening = re.match(r"(at|on|in|to|from|with|for|by|under) ", rest)
        place = before.rfind(f" {opening[1]} ") if opening else -1
        if place > 0:
            return f"{before[:place]} {rest}."
    return None


_CORRECTS = re.compile(r"(?:no|nope|actually|sorry|wait|correction|i mean)"
                       r"(?:[,.!:; ]+(?:sorry|wait|i mean|actually)\b)*[,.!:; ]+", re.I)
_BY_PRONOUN = re.compile(r"(?:it|he|she|they|that)(?:'s| is| was| are| were)(?: now)? ", re.I)


def _is_value(tokens: Sequence[Token], at: int) -> bool:
    """Return whether a word is a name, a number, a place or a time, other than this very day."""
    token = tokens[at]
    return (token.text[:1].isupper() and _capital(tokens, at)
            or _is_number(tokens, at, set()) and token.word not in ("a", "an", "no", "one")
            or _is_place(tokens, at, set()) and token.word not in PASSING_TIMES
            or _is_time(tokens, at, set()) and token.base not in PASSING_TIMES)


PASSING_TIMES = frozenset("""here home outside inside day night morning evening
    afternoon today tonight week time now always never ever every before after when since until
    again""".split())


def asks_for_a_fact(text: str) -> bool:
    """Return whether a text asks for something that only who was told it can know."""
    if not asks(text):
        return False
    text = text[:MAX_ASKED_CHARS]
    tokens = tokens_of(unframed(text)[0] or text)
    words = {t.word for t in tokens}
    if not tokens or words & OWN_SELF_WORDS or words & ADVICE or tokens[0].word in OFFERS:
        return False
    named = any(_capital(tokens, i) and t.text[:1].isupper() for i, t in enumerate(tokens) if i)
    about = "the" in words and any(_tells(t, i, -1) for i, t in enumerate(tokens))
    return bool(words & OWNERS_WORDS or "'s" in words or about or named)


def names_something(text: str) -> bool:
    """Return whether a text states a fact with a name or a number in it, to be kept to the letter.
    """
    return states_a_fact(text) and bool(_NAME_OR_NUMBER.search(text))


_NAME_OR_NUMBER = re.compile(r"\d|\b(?:named?|called)\b|[^\W_][,;:]? (?!I\b)[A-Z]")


def holds_statements(text: str) -> bool:
    """Return whether a text tells anything that a question may ask for later."""
    return len(text) > MAX_ASKED_CHARS or any(map(statements_of, text.splitlines()))


def is_exchange(entry: Entry) -> bool:
    """Return whether an entry is an exchange of the corpus, or an approved one."""
    return entry.source not in TOLD and entry.text.startswith(MARKERS)


def search(memory: Memory, text: str, count: int = 20) -> List[Entry]:
    """Return the entries that hold most of what is telling in the text, best and newest first."""
    stems = list(dict.fromkeys(stems_of(text)))[:MAX_QUERY_STEMS]
    total = memory.about_count() + 1.0
    stems = [stem for stem in stems if stem not in FUNCTION_WORDS] or stems
    held = {stem: memory.ids_holding([[stem + "*"]], 2 * MOST_HELD) for stem in stems}
    mass: DefaultDict[int, float] = defaultdict(float)
    for stem in sorted(stems, key=lambda s: (len(held[s]), s)):
        ids = held[stem]
        if len(ids) == 2 * MOST_HELD and mass:  # those of a common word that hold a rarer one too
            rarer = [s + "*" for s in stems if len(held[s]) < len(ids)]
            ids = ids + memory.ids_holding([[stem + "*"], rarer], 2 * MOST_HELD)
        for i in set(ids):
            mass[i] += log(1.0 + total / (len(ids) + 0.5))
    best = sorted(mass, key=lambda i: (-round(mass[i], 6), -i))
    return memory.entries_of(best[:count])


def rejection(question: str, answer: str) -> str:
    """Return the sign under which an answer to a question is kept as rejected; it tells neither."""
    question = question[:MAX_ASKED_CHARS]
    asked = " ".join(t.word for t in tokens_of(unframed(question)[0] or question))
    return f"{line_key(asked):x}:{line_key(' '.join(folded_words(answer))):x}"


def recollection(memory: Memory, text: str, rng: random.Random, least: float,
                 rejected: Container[str] = ()) -> Tuple[Optional[Recall], List[Recall]]:
    """Return what memory answers by itself to a text, or None; and all that fits at all.

    What the owner has rejected as an answer to the same question is passed over.
    """
    fits = [fit for fit in recall(memory, text, rng)
            if rejection(text, fit.answer) not in rejected]
    if fits and not is_exchange(fits[0].entry):
        least *= STORY_SHARE if _is_story(fits[0].entry) else FACT_SHARE
    return (fits[0] if fits and fits[0].score >= least else None), fits


def silence(memory: Memory, text: str, rejected: Container[str] = (),
            said: Container[str] = ()) -> str:
    """Return what to say when there is nothing to say: that it is kept, or that it is not known.

    It is not said in words that were just said, nor in those that were rejected. Who has read
    another language than English asks back what is not known, and says what is new of the rest.
    """
    asked = asks(text) or (not states_a_fact(text) and len(stems_of(text)) < 3)
    ways: Sequence[str] = UNKNOWN_REPLIES if asked else KEPT_REPLIES
    if not speaks_english(memory):
        ways = [text.strip() if asked else heard_of(memory, text)]
    ways = [words for words in ways if rejection(text, words) not in rejected]
    fresh = [words for words in ways if words not in said]
    return (fresh or ways or [UNKNOWN_REPLY])[0]


def speaks_english(memory: Memory) -> bool:
    """Return whether one entry in twenty has a very common English word, or there are few."""
    enough = min(MOST_HELD, memory.about_count() // 20)
    common = ("the", "you", "this", "what", "and")
    return len(memory.ids_holding([common], max(1, enough))) >= enough


def heard_of(memory: Memory, text: str) -> str:
    """Return the last word of a text that no entry holds, or the text: what was heard, at least."""
    words = [] if re.search(f"[{UNSPACED}]", text) else WORDS.findall(text[:MAX_ASKED_CHARS])
    new = [w for w in words if not memory.ids_holding([[" ".join(folded_words(w))]], 1)]
    return f"{new[-1][:1].upper()}{new[-1][1:]}." if new else text.strip()


def stems_of(text: str) -> List[str]:
    """Return the first five letters, folded, of each word: of each run of letters or digits."""
    return [word[:STEM_CHARS] for word in folded_words(text)]


def stem_weights(memory: Memory, stems: Iterable[str]) -> Dict[str, float]:
    """Return how telling each stem is: the logarithm of how rare it is in the memory."""
    total = memory.entry_count()
    return {s: log(1.0 + (total + 1.0) / (memory.stem_count(s) + 0.5)) for s in set(stems)}


def _mass(stems: Iterable[str], weights: Dict[str, float]) -> float:
    return sum(weights[s] for s in stems)


def _shared(a: Set[str], b: Set[str]) -> Set[str]:
    """Return the stems of a that are in b, or begin one of b's, or are begun by one."""
    near = {s for s in a - b if len(s) >= 4 and any(
        t.startswith(s) or (len(t) >= 4 and s.startswith(t)) for t in b)}
    return (a & b) | near


def _likeness(a: Set[str], b: Set[str], weights: Dict[str, float]) -> float:
    """Return the weighted Dice coefficient of two sets of stems, 0 to 1."""
    whole = _mass(a, weights) + _mass(b, weights)
    both = _mass(_shared(a, b), weights) + _mass(_shared(b, a), weights)
    return both / whole if whole else 0.0


FADE = 16.0  # exchanges after which what was said counts half


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
    """Return what of an exchange belongs in a summary: a statement, or a question answered.

    What is no longer than a stem ("ok", "hm") states nothing; in bytes, for a script of words of
    one letter may say a lot in five.
    """
    first = exchange[0]
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
    its owner could know it, and what is older counts less. No score is too low to be taken while
    there is room; only what adds no word at all is left out.
    """
    parts = [part for part in map(_tellable, exchanges) if part]
    stems = [set(stems_of(" ".join(m.text for m in part))) for part in parts]
    weights = stem_weights(memory, set().union(*stems))
    sizes = [len(exchange_text(part, max_chars)) for part in parts]
    worth = [(3 - len(part)) / (1.0 + age / FADE)
             for age, part in zip(range(len(parts) - 1, -1, -1), parts)]
    chosen: Set[int] = set()
    told: Set[str] = set()
    room = max_chars + 2 * len("H: \n")  # so that one part, cut to max_chars, is never too long
    while True:
        gains = [(worth[i] * _mass(stems[i] - told, weights) / sqrt(sizes[i]), i)
                 for i in range(len(parts)) if i not in chosen and sizes[i] <= room]
        gain, best = max(gains, default=(0.0, 0))
        if not gain:
            return [parts[i] for i in sorted(chosen)]
        chosen.add(best)
        told |= stems[best]
        room -= sizes[best]


def forget_told(memory: Memory, entry: Entry) -> None:
    """Remove what was told, and approved replies that tell it, and what may repeat it in a prompt.

    What that is nobody can know for sure, so every exchange leaves the prompts that shares a
    telling word with it; its messages stay stored, save the owner's own that said just this.
    """
    with memory.transaction():
        weights = stem_weights(memory, stems_of(entry.text))
        telling = {s for s, w in weights.items() if 2.0 * w >= max(weights.values())}
        said = sorted(memory.prompt_messages(), key=lambda m: m.session_id)
        for exchange in exchanges_of(said):
            if telling.intersection(stems_of(" ".join(m.text for m in exchange))):
                memory.advance_messages([m.id for m in exchange], ARCHIVED)
        for kin in memory.entries("e.source != 'corpus' AND (e.text = ? OR e.source = 'approved')",
                                  entry.text):
            if kin.text == entry.text or telling and telling <= set(stems_of(kin.text)):
                memory.forget_entry(kin.id)


# ──────────────────────────────────────────────────────────────────────────────────────
# 14 · VOICE — it says what it knows, or that it does not know   uses: 0 1 2 7 9 11 12 13
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


def sampler_settings(config: Config) -> SamplerSettings:
    """Return the sampling part of a Config.  Raises ConfigError for an unknown sampler."""
    own = {f.name for f in dataclasses.fields(SamplerSettings)} - {"samplers"}
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in own}
    names = tuple(name.strip() for name in config.samplers.split(",") if name.strip())
    try:
        return SamplerSettings(samplers=names, **values)
    except ValueError as error:
        raise ConfigError(f"samplers={config.samplers!r}: {error}") from None


class Said(NamedTuple):
    """One token of a reply: the ids before it, itself, and each expert's share in nats."""

    before: Tuple[int, ...]
    token: int
    shares: Tuple[float, ...]


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
        given: Dict[int, List[Any]] = {}
        for said in self.tokens:
            source = self._source(said) if said.shares[-1] > 0.0 else None
            if source is not None:
                kept = given.setdefault(source.id, [source, 0, 0.0])
                kept[1], kept[2] = kept[1] + 1, kept[2] + said.shares[-1]
        return sorted(((e, n, nats) for e, n, nats in given.values()), key=lambda x: -x[2])

    def _source(self, said: Said) -> Optional[Entry]:
        """Return the source that holds the longest end of what stood before, and the token."""
        best, length = None, 0
        for entry, ids in self.sources:
            for at, token in enumerate(ids):
                if token == said.token:
                    match = _common_end(ids[:at], said.before)
                    if match > length:
                        best, length = entry, match
        return best

    def delta_shares(self) -> List[float]:
        """Return how many nats a token each delta layer raised the reply by.

        Measured by leaving it out: ln p of the reply's tokens as spoken less without it.
        """
        deltas, ids = self.model.deltas, self.prompt + [said.token for said in self.tokens]
        ids, count = ids[-self.model.shape.block_size:], len(self.tokens)
        if not (deltas and count and len(ids) > 1):
            return []
        if self.model.router is not None:  # one of them spoke, or none
            chosen = self.model.router(self.prompt)
            alone, spoke = (_reply_nats(self.model.with_delta(i), ids, count)
                            for i in (None, chosen))
            return [(alone - spoke) / count * (i == chosen) for i in range(len(deltas))]
        whole, lost = _reply_nats(self.model, ids, count), []
        for i in range(len(deltas)):
            less = _reply_nats(self.model.without_delta(i), ids, count)
            lost.append((less - whole) / count)
        return lost


def _common_end(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the longest common end."""
    pairs = zip(reversed(a), reversed(b))
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _reply_nats(model: GPT, ids: Sequence[int], count: int) -> float:
    """Return −ln p, by the model alone, of the last count of ids."""
    return sum(nats for nats, _ in reply_nats(model, ids[:-count], ids[-count:]))


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


def next_logits_of(model: GPT,
                   mixture: Optional[Mixture] = None) -> Callable[[Sequence[int]], Sequence[float]]:
    """Return the function that generate_ids asks: of the mixture, or of the model alone."""
    cache, history = model.new_cache(), deque(maxlen=SAID_ORDER)
    voices: List[GPT] = []

    def next_logits(new: Sequence[int]) -> Sequence[float]:
        if not voices:  # what was said so far calls for a layer, which speaks to the end
            voices.append(model.speaker(new))
            if mixture is not None:
                mixture.place = voices[0].place
        logits = voices[0].feed(cache, new)
        if mixture is None:
            return logits
        history.extend(new)
        return mixture.mix(logits, tuple(history))
    return next_logits


def spoken(model: GPT, tokenizer: EvolvingTokenizer, ids: Sequence[int], config: Config,
           rng: random.Random, stops: Sequence[str] = ("\n",), mixture: Optional[Mixture] = None,
           trace: Optional[List[Said]] = None) -> Iterator[str]:
    """Yield the voice's continuation of ids, piece by piece, up to a stop or the end of text.

    Without a mixture the model speaks alone; with one, what moved each token goes into trace.
    """
    decoder, gate = StreamDecoder(tokenizer), StopText(stops)
    history = list(ids)
    stream = generate_ids(next_logits_of(model, mixture), ids, sampler_settings(config), rng,
                          config.max_gen_tokens, frozenset([END_OF_TEXT]), min_tokens=1,
                          engine=model.engine)
    for token in stream:
        if mixture is not None and trace is not None:
            trace.append(Said(tuple(history[-SAID_ORDER:]), token, tuple(mixture.shares(token))))
            history.append(token)
        piece, stopped = gate.feed(tidied(decoder.feed(token)))
        if piece:
            yield piece
        if stopped:
            return
    yield from filter(None, (gate.feed(decoder.flush())[0], gate.flush()))


# A voice this small loses its thread within a sentence or two. So it drafts a reply several times,
# with the exchanges that fit at hand to copy from, and says the draft, or the first sentences of
# one, that is worth most: fluent, owed to what was asked, about the same things, and finished. What
# exchanges answer is weighed beside them, also with a question to close it that another one asks.


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


def _content(text: str, chars: Optional[int] = STEM_CHARS) -> Set[str]:
    return {word[:chars] for word in folded_words(text)
            if word not in PLAIN_WORDS and base_of(word) not in PLAIN_WORDS}


def beginnings(text: str) -> List[str]:
    """Return a text's first sentence, its first two, and so on; an open end is left out."""
    ends = [match.end() for match in _REPLY_END.finditer(text)]
    return [text[:end] for end in ends if not ABBREVIATED.search(text[:end])] or [text]


_REPLY_END = re.compile(r"[.!?…][\"')»”’]*(?=\s|$)|[。！？]")


def told_of(answer: str) -> str:
    """Return an answer without the question that closes it."""
    last = sentences_of(answer)[-1:]
    return answer[:answer.rindex(last[0])].rstrip() if last and is_question(last[0]) else answer


def asked_back(memory: Memory, text: str, fits: Iterable[Recall]) -> List[Recall]:
    """Return questions that exchanges ask back and that may close another answer, best first.

    They close what fits the text, or are themselves about the same; and point at nothing that only
    their own exchange knows. Whether it is as the text says is not asked.
    """
    own = _content(text, None)
    found = {fit.answer[len(told_of(fit.answer)):].strip(): fit for fit in fits}
    for entry in filter(is_exchange, search(memory, text, NEAR_ENTRIES)):
        said = [line[len(MARKERS[1]):] for line in entry.text.splitlines()
                if line.startswith(MARKERS[1])]
        for words in itertools.chain.from_iterable(map(sentences_of, said)):
            found.setdefault(words, Recall(0.0, entry, words))
    stems = {words: _content(words, None) for words in found if is_question(words)
             and QUESTION_OPENINGS & set(folded_words(words)[:1])
             and not POINTING_BACK & set(folded_words(words))}
    weights = stem_weights(memory, own.union(*stems.values()))
    backs = []
    for words, held in stems.items():
        if found[words].score or not held <= own or ASKING_WORDS & set(folded_words(words)):
            both = _mass(_shared(own, held), weights)
            whole = max(_mass(own, weights), _mass(held, weights))
            score = max(found[words].score, both / whole if whole else 0.0)
            backs.append(found[words]._replace(answer=words, score=score))
    return sorted((back for back in backs if back.score >= LEAST_BACK), key=lambda b: -b.score)


def grafted(memory: Memory, text: str, fits: Sequence[Recall], alone: bool) -> Iterator[Recall]:
    """Yield what fits a text with another question to close it; or that alone, if it may stand so.
    """
    backs = asked_back(memory, text, fits)[:MOST_BACK]
    heads = [fit for fit in fits if told_of(fit.answer) and fit.score >= LEAST_BACK]
    for fit, back in itertools.product(heads, backs):
        if back.answer not in fit.answer:
            told = told_of(fit.answer)
            space = "" if told.endswith(("。", "！")) else " "
            yield Recall((fit.score + back.score) / 2.0, fit.entry, f"{told}{space}{back.answer}")
    for back in backs if alone and not heads else []:
        yield back._replace(score=back.score / 2.0)


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


def form_of(text: str, known: Callable[[str], bool]) -> float:
    """Return what is wrong with the form of a reply: unfinished, in circles, in no known words."""
    words = folded_words(text)
    threes = list(zip(words, words[1:], words[2:]))
    strange = sum(not known(word) for word in words) / max(1, len(words))
    ended = bool(_REPLY_END.search(text[-2:]))
    return 4.0 * strange + 2.0 * (not ended) + 3.0 * (len(set(threes)) < len(threes))


def borrowed_stems(text: str, entries: Iterable[Entry]) -> Set[str]:
    """Return the stems of what others said in exchanges, and who said the text did not."""
    heard = [line[len(MARKERS[0]):] for entry in entries for line in entry.text.splitlines()
             if line.startswith(MARKERS[0])]
    return set().union(*map(_content, heard)) - _content(text)


# What counts beside fluency, in nats a token; found by reading replies to 200 prompts.
MUTUAL = 0.5         # that it is owed to what was said
WORST = 0.2          # its greatest surprise
TOPIC = 1.0          # words that go with what was said
BORROWED = 0.4       # words that somebody else had said
SAID_AGAIN = 2.0     # that it was said a moment ago
FITTING = 1.0        # where an exchange answers in its own words: how well it fits
LEAST_FIT = 0.2      # exchanges that fit less are not looked at
EAGER = 0.9          # weight that the copyist has in a draft, beside what fits a text best
DRAFTS = 10          # replies that are drafted
MOST_FITS = 6        # answers of exchanges that are weighed beside them
NOVEL = 1.0          # that no exchange says all of it
LEAST_BACK = 0.4     # a question fits less than this: it is not asked back
MOST_BACK = 2        # questions that are tried behind each answer
NEAR_ENTRIES = 60    # entries that are searched for them
POINTING_BACK = frozenset(
    "he him his she her hers it its they them their theirs that there other another both".split())
QUESTION_OPENINGS = ASKING_WORDS | AUXILIARIES


# ──────────────────────────────────────────────────────────────────────────────────────
# 15 · LEARNING — the one thing here that changes by itself   uses: 0 1 2 4 6 7 8 10 11 12 14
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Two processes. The parent talks, watches the corpus file, and is the one writer of the memory.
# The child computes: it is given state and text through a pipe, trains, and sends back weights.
# If the child dies the parent starts it again from the last commit; if the parent dies, the child
# sees its pipe close and goes. Learned weights are swapped in between two replies.

FRAME_HEAD = struct.Struct("<II")


def pack_frame(message: Dict[str, Any], blobs: Dict[str, bytes]) -> bytes:
    """Return one message and its blobs as bytes: lengths, JSON, blobs."""
    head = json.dumps({**message, "blobs": [[name, len(b)] for name, b in blobs.items()]}).encode()
    body = b"".join(blobs.values())
    return FRAME_HEAD.pack(len(head), len(body)) + head + body


def unpack_frame(head: bytes, body: bytes) -> Tuple[Dict[str, Any], Dict[str, bytes]]:
    """Return the message and the blobs of a frame's two parts."""
    message = json.loads(head)
    blobs, at = {}, 0
    for name, size in message.pop("blobs"):
        blobs[name], at = body[at:at + size], at + size
    return message, blobs


def read_frame(stream: BinaryIO) -> Optional[Tuple[Dict[str, Any], Dict[str, bytes]]]:
    """Return the next frame of a blocking stream, or None at its end."""
    lengths = stream.read(FRAME_HEAD.size)
    if len(lengths) < FRAME_HEAD.size:
        return None
    head, body = FRAME_HEAD.unpack(lengths)
    parts = stream.read(head), stream.read(body)
    return unpack_frame(*parts) if len(parts[1]) == body else None


@dataclass
class Growth:
    """How far the organism has come; kept beside its weights."""

    phase: str = "newborn"            # newborn, warmup, grown
    step: int = 0                     # steps of its whole life
    tokens: int = 0                   # tokens trained on in its whole life
    warmup_step: int = 0              # steps of the present warm-up
    warmup_chars: int = 0             # size of the text it warmed up on
    delta_serial: int = 0             # deltas ever begun
    delta_chars: int = 0              # new characters the active delta has taken
    bpc: Optional[float] = None       # held-out bits per character, last seen
    best_bpc: Optional[float] = None  # and the best of this warm-up
    lowest_bpc: Optional[float] = None  # and the lowest before its rate falls
    stale: int = 0                    # evaluations since that
    cooling_step: int = 0             # step of the warm-up from which its rate falls; 0: not yet
    merges: int = 0                   # merges in use, which is the tokenizer's version
    native: int = -1                  # merges that the base was trained in; −1 is not known
    older: List[int] = field(default_factory=list)  # merges in use before each growth since then
    ripening: int = 0                 # merges that are not in use yet
    ripeness: Optional[float] = None  # what the worst text lost when they were last tried, a share
    unripe: int = 0                   # how often they were tried in vain
    unmerged_chars: int = 0           # new characters since the last look for merges
    enlarged: bool = False            # the model has grown, and has not yet warmed up with that
    train_bpc: Optional[float] = None  # bits per character on the text of the last warm-up
    probes: Dict[str, float] = field(default_factory=dict)  # each probe's bits, last seen
    best_probes: Dict[str, float] = field(default_factory=dict)  # and its best


def delta_is_full(growth: Growth, config: Config) -> bool:
    """Return whether the active delta is to be sealed before the next burst."""
    return growth.delta_chars >= config.delta_seal_chars


def float_bytes(data: array) -> bytes:
    """Return a float buffer as little-endian bytes."""
    if sys.byteorder == "little":
        return data.tobytes()
    turned = data[:]
    turned.byteswap()
    return turned.tobytes()


def floats_of(blob: bytes) -> array:
    """Return little-endian float32 bytes as a buffer."""
    data = array("f")
    data.frombytes(blob)
    if sys.byteorder == "big":
        data.byteswap()
    return data


def pack_params(params: Sequence[MatrixParam]) -> Layer:
    """Return matrices as one layer whose manifest names their shapes, in order."""
    manifest = [[p.name, p.rows, p.dim] for p in params]
    return Layer(manifest, b"".join(float_bytes(p.data) for p in params))


def load_params(params: Sequence[MatrixParam], layer: Layer, vocabulary: int = 0) -> None:
    """Load the matrices of a layer.  Raises StoreError when it was made for another shape.

    A matrix with a row for each word of the vocabulary may have gained some since: those are zero.
    """
    numbers, at = floats_of(layer.data), 0
    stored = [[rows, dim] for _, rows, dim in layer.manifest]
    if len(stored) != len(params) or not all(
            dim == p.dim and (rows == p.rows or rows < p.rows == vocabulary)
            for p, (rows, dim) in zip(params, stored)):
        raise StoreError(f"stored weights have the shapes {layer.manifest}, this model has "
                         f"{[[p.name, p.rows, p.dim] for p in params]}; use the settings it was "
                         f"made with, or another --db")
    for param, (rows, dim) in zip(params, stored):
        size, born = rows * dim, array("f", bytes(4 * (param.rows - rows) * dim))
        param.load(numbers[at:at + size] + born)
        at += size


def pack_moments(params: Sequence[MatrixParam]) -> Layer:
    """Return the optimizer's state of the matrices as one layer."""
    manifest = [[p.name, p.rows, p.dim, p.steps] for p in params]
    return Layer(manifest, b"".join(float_bytes(p.m) + float_bytes(p.v) for p in params))


def load_moments(params: Sequence[MatrixParam], layer: Layer) -> None:
    """Load what fits of the optimizer's state; a matrix that it does not know starts at zero."""
    numbers, at = floats_of(layer.data), 0
    by_name = {p.name: p for p in params}
    for name, rows, dim, steps in layer.manifest:
        size, param = rows * dim, by_name.get(name)
        if param is not None and (param.rows, param.dim) == (rows, dim):
            param.m, param.v = numbers[at:at + size], numbers[at + size:at + 2 * size]
            param.steps = steps
        at += 2 * size


def delta_names(layers: Iterable[str]) -> List[str]:
    """Return the names of the deltas among layers, oldest first."""
    return sorted((n for n in layers if n.startswith("delta")), key=lambda n: int(n[5:]))


def build_model(config: Config, layers: Dict[str, Layer], engine: Engine,
                prefer_best: bool = False) -> Tuple[EvolvingTokenizer, GPT]:
    """Return the tokenizer and the model that the layers describe, or newborn ones.

    Raises StoreError when the layers were made for another shape of model.
    """
    tokenizer = EvolvingTokenizer()
    if "tokenizer" in layers:
        tokenizer = EvolvingTokenizer.unpack(layers["tokenizer"].data)
    rng = random.Random(config.seed)
    base = layers.get("best" if prefer_best and "best" in layers else "base")
    model = GPT(Shape.of(config), tokenizer.vocab_size, engine, None if base else rng)
    if base is not None:
        load_params(list(model.params.values()), base)
    for name in delta_names(layers):
        _append_stored(model, layers[name], rng)
    for layer in (layer for name, layer in layers.items() if name.startswith("fold")):
        at, share, manifest = (layer.manifest[key] for key in ("at", "share", "matrices"))
        _append_stored(model, layer._replace(manifest=manifest), rng)
        model.lacks.pop()
        folded = model.deltas.pop()
        for living, lacking in zip(delta_names(layers), model.lacks):
            if int(living[5:]) < at:
                lacking.append((share, folded))
    if "router" in layers:
        model.router = load_router(tokenizer, layers["router"], len(model.deltas))
    return tokenizer, model


def _append_stored(model: GPT, layer: Layer, rng: random.Random) -> None:
    """Append the delta that a layer holds."""
    model.append_delta(layer.manifest[0][1], rng)
    load_params(_matrices(model.deltas[-1]), layer, model.vocab_size)


def pack_router(router: Router) -> Layer:
    """Return a router's counts as one layer: for each place its trigrams and how often each."""
    parts = [[b"".join(c).decode("latin-1"), list(c.values())] for c in router.counts]
    sizes = [len(c) for c in router.counts]
    return Layer({"trigrams": sizes, "margins": router.margins},
                 zlib.compress(json.dumps(parts).encode(), 1))


def load_router(tokenizer: EvolvingTokenizer, layer: Layer, deltas: int) -> Router:
    """Return the router that was stored, with a place for the base and for each delta."""
    counts = []
    for joined, often in json.loads(zlib.decompress(layer.data)):
        raw = joined.encode("latin-1")
        counts.append({raw[3 * i:3 * i + 3]: n for i, n in enumerate(often)})
    router = Router(tokenizer, (counts + [{}] * (deltas + 1))[:deltas + 1])
    kept = layer.manifest["margins"][:deltas + 1]
    router.margins[:len(kept)] = kept
    return router


OLD = "old."  # begins the names of layers that speak while others are rebuilt


def spoken_layers(layers: Dict[str, Layer]) -> Dict[str, Layer]:
    """Return the layers that are to speak: the old ones, while others are rebuilt."""
    old = {name[len(OLD):]: layer for name, layer in layers.items() if name.startswith(OLD)}
    return old or layers


def _matrices(delta: Delta) -> List[MatrixParam]:
    return [matrix for adapter in delta.values() for matrix in (adapter.a, adapter.b)]


class Sprout:
    """New merges that ripen beside the vocabulary in use, and the text encoded with them.

    Their rows are the model's sprouts; all that is said or stored elsewhere does without them.
    """

    def __init__(self, tokenizer: EvolvingTokenizer, block_size: int) -> None:
        self.tokenizer, self.pool = tokenizer, TextPool(block_size)
        self.replay = Replay((), block_size)
        self.ids: Dict[int, List[int]] = {}

    def pack(self, rows: MatrixParam) -> Layer:
        """Return the new merges and their rows as a layer."""
        return Layer({"merges": self.tokenizer.merges[-rows.rows:]}, float_bytes(rows.data))

    @classmethod
    def stored(cls, layers: Dict[str, Layer], tokenizer: EvolvingTokenizer,
               model: GPT) -> Optional["Sprout"]:
        """Return what pack stored among the layers, its rows in the model; None if nothing was."""
        if "sprout" not in layers:
            return None
        layer = layers["sprout"]
        model.load_sprout(floats_of(layer.data))
        merges = [*tokenizer.merges, *map(tuple, layer.manifest["merges"])]
        return cls(EvolvingTokenizer(merges), model.shape.block_size)


def spread_texts(text: str, count: int, chars: int) -> List[str]:
    """Return up to `count` pieces, spread evenly over the text, its end among them; `chars` in all.

    None is shorter than 200 characters, unless the text is.
    """
    count = max(1, min(count, chars // 200, len(text) // 200))
    size = max(1, min(chars, len(text)) // count)
    last = len(text) - size
    starts = [last * i // (count - 1) for i in range(count)] if count > 1 else [last]
    return [text[start:start + size] for start in starts if text]


def enlarged_layers(config: Config, wanted: Shape, layers: Dict[str, Layer],
                    engine: Engine) -> Tuple[Shape, Dict[str, Layer]]:
    """Return the shape and the weights of a model of the wanted size that says just the same.

    Raises ConfigError when that cannot be.
    """
    folds = [name for name in layers if name.startswith("fold")]
    named = {n: layer for n, layer in layers.items() if n not in ("router", *folds)}
    last = max([int(n[5:]) for n in delta_names(layers)], default=0)
    for place, name in enumerate(folds, last + 1):  # folded deltas widen as the others do
        named[f"delta{place}"] = layers[name]._replace(manifest=layers[name].manifest["matrices"])
    _, model = build_model(config, named, engine, prefer_best=True)
    larger = enlarged(model, wanted, random.Random(config.seed))
    grown = {"base": pack_params(list(larger.params.values()))}
    for name, delta in zip([*delta_names(layers), *folds], larger.deltas):
        grown[name] = pack_params(_matrices(delta))._replace(sealed=layers[name].sealed)
        if name in folds:
            told = {**layers[name].manifest, "matrices": grown[name].manifest}
            grown[name] = grown[name]._replace(manifest=told)
    return larger.shape, grown


def to_warm_up(growth: Growth) -> Growth:
    """Return how far it has come with a model that was just enlarged: a warm-up is due."""
    if growth.phase == "grown":
        return dataclasses.replace(growth, enlarged=True)
    return dataclasses.replace(growth, warmup_step=0, best_bpc=None, lowest_bpc=None, stale=0,
                               cooling_step=0)


def has_outgrown(growth: Growth, n_params: int) -> bool:
    """Return whether a text left more unexplained than the weights that learned it can hold.

    A weight holds about two bits (arXiv:2404.05405). Where the held-out text is much harder than
    the text itself, the model has room enough to learn by heart, and more would not help.
    """
    if growth.train_bpc is None or growth.bpc is None or growth.phase != "grown":
        return False
    return (growth.train_bpc * growth.warmup_chars > BITS_A_WEIGHT * n_params
            and growth.train_bpc > HARD_SHARE * growth.bpc)


PATIENT_SHARE = 0.75  # of a reading without a gain; 1.0 took a third longer for 0.7 %
LEAST_GAIN = 0.002  # bits per character; evaluations vary by more from step to step
RISING_OF = 1000    # steps of which rate_warmup is the share in which a warm-up's rate rises
BITS_A_WEIGHT = 2.0
HARD_SHARE = 0.9  # of the held-out text's bits per character


def pack_mixer(mixer: Mixer, probes: Sequence[str] = ()) -> Layer:
    """Return a mixer's weights as a layer whose manifest names what they belong to."""
    numbers = array("f", mixer.numbers())
    return Layer({"experts": EXPERTS, "order": mixer.order, "probes": list(probes)},
                 float_bytes(numbers))


def load_mixer(config: Config, layers: Dict[str, Layer]) -> Mixer:
    """Return the mixer that was fitted, or a fresh one where none fits these settings."""
    mixer = Mixer(config.ngram_order)
    if "mixer" in layers and layers["mixer"].manifest["order"] == mixer.order:
        mixer.load(floats_of(layers["mixer"].data))
    return mixer


def count_documents(counts: NgramMemory, documents: Iterable[Sequence[int]],
                    before: Sequence[int] = (END_OF_TEXT,)) -> List[int]:
    """Let counts learn documents, each after the end of the last; return the end of them all."""
    end = list(before)
    for ids in documents:
        counts.learn(ids, end)
        end = [*end, *ids][-counts.order:]
    return end


def read_through(model: GPT, ids: Sequence[int], still: Mixture, live: Mixture,
                 fit: bool = False) -> Iterator[Tuple[float, float, float, float]]:
    """Yield nats for each of ids[1:]: of the model, the counts, the voice, and one that learns.

    The one that learns, live, moves its weights and copies from what was read. With fit the other,
    still, moves its weights as well; they may share a mixer.
    """
    def heard(place: int) -> None:
        still.place = live.place = place
    softmax, vocab = model.engine.softmax, model.vocab_size
    rows = predicted_rows(model, ids, model.shape.block_size // 2, heard)
    for at, logits in enumerate(rows, 1):
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


def voice_nats(model: GPT, ids: Sequence[int], mixture: Mixture) -> float:
    """Return the nats of ids[1:] by the whole voice, which learns nothing."""
    def heard(place: int) -> None:
        mixture.place = place
    total = 0.0
    rows = predicted_rows(model, ids, model.shape.block_size // 2, heard)
    for at, logits in enumerate(rows, 1):
        mixture.mix(logits, tuple(ids[max(0, at - SAID_ORDER):at]))
        total += mixture.nats(ids[at])
    return total


def probe_texts(held: Iterable[Entry], epochs: Dict[int, int]) -> Dict[str, str]:
    """Return what is held out, by the step of its life at which that began."""
    texts: DefaultDict[str, List[str]] = defaultdict(list)
    for entry in held:
        first = entry.text.split("\n", 1)[0]
        texts[str(epochs.get(line_key(first.casefold()), 0))].append(entry.text)
    return {name: "\n".join(parts) for name, parts in texts.items()}


def note_probes(memory: Memory, step: int, losses: Dict[str, float]) -> None:
    """Note the loss of each probe set at a step; a long life is thinned, its ends stay."""
    curves = memory.setting("probes", {})
    for name, bpc in losses.items():
        curve = curves.setdefault(name, [])
        if not curve or curve[-1] != [step, bpc]:
            curve.append([step, bpc])
        if len(curve) > PROBE_POINTS:
            curves[name] = curve[:1] + curve[2:-1:2] + curve[-1:]
    memory.set_setting("probes", curves)


PROBE_POINTS = 200  # of each probe set's life that are kept


class EntryCounts:
    """The entries of a memory, counted in the ids of its tokenizer.

    They are counted anew whenever something was taken out of the memory or the tokenizer has grown,
    so the counts never know more than the entries do, and what was forgotten is forgotten here as
    well. Many are kept in the memory, as a layer, for a quicker start.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.counts = NgramMemory()
        self._form: List[Any] = []
        self._last_id, self._end, self._unkept_chars = 0, [END_OF_TEXT], 0

    def follow(self, memory: Memory, tokenizer: EvolvingTokenizer, config: Config,
               should_stop: Callable[[], bool] = lambda: False) -> NgramMemory:
        """Return the counts of the entries as they are now; held-out ones are never counted.

        Told to stop in the middle, it returns what it has and begins anew the next time.
        """
        with self.lock:
            form = [memory.entries_taken(), tokenizer.version, config.ngram_order,
                    config.ngram_counts, config.ngram_chars]
            if form != self._form:
                self._begin(memory, form, config)
            fresh = memory.entries("e.id > ? AND NOT e.held_out", self._last_id)
            for entry in fresh:
                if should_stop():
                    self._form = []
                    return self.counts
                ids = document_ids(tokenizer, entry.text, entry.closed)
                self._end = count_documents(self.counts, [ids], self._end)
                self._last_id = entry.id
                self._unkept_chars += len(entry.text)
            return self.counts

    def _begin(self, memory: Memory, form: List[Any], config: Config) -> None:
        """Take up the counts that are kept, if they are of this form, or begin at nothing."""
        self._form, self._unkept_chars = form, 0
        layer = memory.layers().get("ngrams")
        if layer is not None and layer.manifest["form"] == form:
            with contextlib.suppress(ValueError):
                self.counts = NgramMemory.unpack(layer.data, config.ngram_counts)
                self._last_id, self._end = layer.manifest["last_id"], layer.manifest["end"]
                return
        self.counts = NgramMemory(config.ngram_order, config.ngram_counts)
        self._last_id = memory.first_of_newest(config.ngram_chars) - 1
        self._end = [END_OF_TEXT]

    def take_over(self, other: "EntryCounts") -> None:
        """Become what another has counted."""
        with self.lock:
            self.counts, self._form, self._last_id = other.counts, other._form, other._last_id
            self._end, self._unkept_chars = other._end, other._unkept_chars

    def keep(self, memory: Memory) -> None:
        """Store the counts when it would take a while to count anew what is not stored yet."""
        with self.lock:
            if self._unkept_chars < KEPT_COUNT_CHARS or not self._form:
                return
            manifest = {"form": self._form, "last_id": self._last_id, "end": self._end}
            layer = Layer(manifest, self.counts.pack())
            with memory.transaction():
                if memory.entries_taken() == self._form[0]:
                    memory.save_layers({"ngrams": layer})
            self._unkept_chars = 0


class Tongue(NamedTuple):
    """One way to write text: merges, a model that knows no others, and the counts of their ids."""

    tokenizer: EvolvingTokenizer
    model: GPT
    counts: NgramMemory


def older_tongues(tokenizer: EvolvingTokenizer, model: GPT, versions: Iterable[int],
                  counted: Callable[[EvolvingTokenizer], NgramMemory]) -> Iterator[Tongue]:
    """Yield the ways to write text in fewer merges: what was said in them before a growth."""
    for version in versions:
        if 0 <= version < tokenizer.version:
            less = EvolvingTokenizer(tokenizer.merges[:version])
            yield Tongue(less, model.narrowed(FIRST_MERGE + version), counted(less))


KEPT_COUNT_CHARS = 100_000    # characters whose counts are worth storing: a tenth of a second
INTERPRETED_MIX_CHARS = 2000  # held-out characters that fit the voice where kernels are slow
INTERPRETED_DRAFTS = 3        # replies that are drafted where kernels are slow
COPIED_ENTRIES = 6            # entries that a reply may copy from
COPIED_IDS = 150              # ids of each, from its beginning
PROBE_CHARS = 600      # of one probe set at least are read
FRESH_IDS = 400        # of what is new tell whether it is still being learned
SHIFT_IDS = 400        # of what is new tell whether it is of another kind
PARENTS = 3            # deltas that a new one may begin as a copy of, by likeness of text
SHIFT_LEAST_IDS = 48   # and fewer tell nothing
SHIFT_SHARE = 20       # part of its full size from which a delta may be sealed by a shift
FOLD_SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)
OWN_REPLAY = 0.5       # share of replayed windows that the active delta itself speaks for
OWN_TRIES = 6
WARM_SHADOWS = 0.85    # share of a warm-up's batches in the merges that ripen through it
SAMPLED_WINDOWS = 8    # windows of which new rows learn what all text has in common
SHORTEST_WARMUP = 100  # steps; of a page of text more than warmup_epochs says
RIPENING = 4           # a burst with merges to ripen has at least so many times micro_steps
WITHERING = 3          # vain tries of new merges; waiting longer, they fit old layers less and less
TRIED_TEXTS = 16       # texts on which merges are tried before they come into use
TRIED_CHARS = 12_000   # characters of them in all


class Student:
    """The child's side of learning: a model, the text, and the job at hand.  Talks to no one.

    `guard` is held while weights move, so that another thread may take a snapshot at any time.
    """

    def __init__(self, config: Config, growth: Growth, layers: Dict[str, Layer],
                 engine: Engine) -> None:
        self.config, self.growth, self.engine = config, growth, engine
        engine.threads = config.threads or max(1, (os.cpu_count() or 2) - 1)
        self.optimizer, self.rng = AdamW.of(config), random.Random(f"{config.seed}:{growth.step}")
        self.tokenizer, self.model = build_model(config, layers, engine)
        self.delta_names = delta_names(layers)
        self.router = self.model.router = self.model.router or Router(
            self.tokenizer, [{} for _ in range(1 + len(self.delta_names))])
        self.sprout = Sprout.stored(layers, self.tokenizer, self.model)
        if self.sprout is not None:  # ids only append: it knows all that the other knows
            self.router.tokenizer = self.sprout.tokenizer
        self.folds = {name: layer for name, layer in layers.items() if name.startswith("fold")}
        self.probes: Dict[str, Tuple[List[int], int]] = {}
        self.replay = Replay((), config.block_size)
        self.notes: List[Dict[str, Any]] = []  # what the life log is to tell
        self.best = layers.get("best")
        self.guard = threading.RLock()
        self.pool = TextPool(config.block_size)
        self.held_out: List[int] = []
        self.held_out_chars = 0
        self.fresh_chars = self.fresh_steps = 0
        self._ids: Dict[int, List[int]] = {}
        self._documents: List[List[Any]] = []
        self.dirty: Set[str] = set()
        self.rejected: List[Tuple[str, str]] = []
        self._held_whole = self._held_text = self._mix_text = ""
        self._probe_texts: Dict[str, str] = {}
        self._sources: Dict[int, str] = {}
        self.mixer = layers.get("mixer")
        self.mixed = set(self.mixer.manifest.get("probes", ())) if self.mixer else set()
        self.mix_due = self.mixer is None
        if "optimizer" in layers:
            load_moments(self._all_params(), layers["optimizer"])
        while self.delta_names and "router" not in layers:  # of a time when all of them spoke
            self._fold_oldest(1.0)

    def _all_params(self) -> List[MatrixParam]:
        sprouts = [] if self.model.sprout is None else [self.model.sprout]
        return [*self.model.params.values(), *self.model.delta_params(), *sprouts]

    def take_text(self, documents: List[List[Any]], held_out: str,
                  probes: Optional[Dict[str, str]] = None) -> None:
        """Replace what may be trained on: [key, text, closed, fresh] each; and the held-out text.

        Once grown up, fresh is what the caller says; before, what was not there a moment ago. A
        fifth part may name a document's source. probes are parts of the held-out text by name.
        """
        known = self._ids.keys()
        self.rng = random.Random(f"{self.config.seed}:{self.growth.step}")  # as after a restart
        if self.growth.phase != "grown":
            documents = [[key, text, closed, bool(known) and key not in known, *rest]
                         for key, text, closed, _, *rest in documents]
        self._sources = {key: rest[0] for key, _, _, _, *rest in documents if rest}
        documents = [document[:4] for document in documents]
        self._documents, self._held_text = documents, held_out[:self.config.eval_chars]
        slow = self.engine.name == "python"
        self._mix_text = held_out[:INTERPRETED_MIX_CHARS if slow else self.config.held_out_chars]
        self._held_whole = held_out
        self._probe_texts = {name: text for name, text in (probes or {}).items() if text}
        self.mix_due |= bool(self.mixed) and not self.mixed >= self._probe_texts.keys()
        self.fresh_chars = sum(len(text) for _, text, _, fresh in documents if fresh)
        self.fresh_steps = self.config.micro_steps if self.fresh_chars else 0
        newborn = self.growth.phase == "newborn"
        begins = self._begins_warmup(sum(len(text) for _, text, _, _ in documents))
        if begins:
            self._begin_warmup()
        if self.growth.phase == "grown" and not any(self.router.counts):
            self.router.learn(0, (text for _, text, _, fresh in documents if not fresh))
        self._encode()
        if begins and self.growth.enlarged:  # it ends no worse than it begins
            self.note_warmup()
        if begins and not newborn:
            self._sprout(self._documents, self.config.max_merges)

    def _begins_warmup(self, chars: int) -> bool:
        """Return whether there is so much more text now that the base should learn again."""
        outgrown = 2 * self.growth.warmup_chars + self.config.min_merge_chars
        return self.growth.phase == "newborn" or (
            self.growth.phase == "grown" and (chars >= outgrown or self.growth.enlarged))

    def _begin_warmup(self) -> None:
        """Unfreeze the base, deltas folded into it; a newborn learns its merges first."""
        while self.delta_names:  # all text is learned again: an average is where that begins
            self._fold_oldest(1.0 / len(self.delta_names))
        self.folds.clear()
        texts = [text for _, text, _, _ in self._documents]
        if self.growth.phase == "newborn":
            self._learn_merges(texts)
        self.model.freeze(False)
        for param in self.model.params.values():
            param.rest()
        self._ids, self.best = {}, None
        self.growth = dataclasses.replace(
            self.growth, phase="warmup", warmup_step=0, warmup_chars=sum(map(len, texts)),
            best_bpc=None, lowest_bpc=None, stale=0, cooling_step=0, unmerged_chars=0,
            delta_chars=0)

    def _learn_merges(self, texts: List[str]) -> None:
        """Let a newborn's tokenizer learn from the texts, when they are enough to tell words."""
        tokenizer, known = EvolvingTokenizer(self.tokenizer.merges), self.tokenizer.version
        room = self.config.max_merges - known
        if sum(map(len, texts)) < self.config.min_merge_chars or room <= 0:
            return
        tokenizer.learn_merges(texts, room, self.config.min_pair_count)
        with self.guard:  # a snapshot has the vocabulary and the rows for it, or neither
            self.tokenizer = self.router.tokenizer = tokenizer
            self.model.grow_vocabulary(tokenizer.merges[known:])
            self.model.draw_embedding(self.rng)  # rows without a past need no inheritance
            self.dirty.add("base")

    def take_rejected(self, exchanges: Iterable[Sequence[str]]) -> None:
        """Take what was asked and what is not to be answered; bursts push the model away from it.
        """
        self.rejected = [(asked, answer) for asked, answer in exchanges if answer]

    def _unwanted(self) -> List[Unwanted]:
        """Return one rejected reply, at random, as ids that fit the window; in a burst alone."""
        if not self.rejected or self.growth.phase != "grown":
            return []
        asked, answer = self.rng.choice(self.rejected)
        block, encode = self.config.block_size, self.tokenizer.encode
        prompt = prompt_ids(self.tokenizer, [], asked, max(2, block // 2))
        return [((prompt + encode(f" {answer}\n"))[:block + 1], len(prompt))]

    def _encode(self) -> None:
        """Lay out the streams; documents that were here before are not encoded again."""
        self._ids, self.pool = self._laid_out(self.tokenizer, self._ids)
        self.replay = self._replay_of(self._ids)
        if self.sprout is not None:
            self.sprout.ids, self.sprout.pool = self._laid_out(self.sprout.tokenizer,
                                                               self.sprout.ids)
            self.sprout.replay = self._replay_of(self.sprout.ids)
        slow = self.engine.name == "python"
        room = INTERPRETED_MIX_CHARS if slow else self.config.eval_chars
        chars = max(PROBE_CHARS, room // max(1, len(self._probe_texts)))
        self.probes = {name: (text_ids(self.tokenizer, text[:chars]), len(text[:chars]))
                       for name, text in self._probe_texts.items()}
        self.held_out_chars = len(self._held_text)
        self.held_out = text_ids(self.tokenizer, self._held_text) if self._held_text else []

    def _replay_of(self, ids: Dict[int, List[int]]) -> Replay:
        return Replay(((self._sources.get(key, ""), ids[key])
                       for key, _, _, fresh in self._documents if not fresh),
                      self.config.block_size)

    def _laid_out(self, tokenizer: EvolvingTokenizer,
                  known: Dict[int, List[int]]) -> Tuple[Dict[int, List[int]], TextPool]:
        """Return the documents' ids by key, those known as they are, and the streams of them."""
        found, pool = {}, TextPool(self.config.block_size)
        for key, text, closed, fresh in self._documents:
            ids = found[key] = known.get(key) or document_ids(tokenizer, text, closed)
            pool.add(ids, fresh)
        return found, pool

    # the vocabulary, which grows without a jump: new merges sprout unheard, ripen on shadow copies
    # of what is trained on, and come into use when no text at hand is worse off with them

    def _sprout_if_due(self) -> None:
        """Let merges sprout where much new text is badly compressed by those in use."""
        config, growth, documents = self.config, self.growth, self._documents
        growth.unmerged_chars += self.fresh_chars
        if self.sprout is not None or growth.unmerged_chars < config.growth_chars:
            return
        at, chars = len(documents), 0
        while at and chars < growth.unmerged_chars:  # the newest stand last
            at, chars = at - 1, chars + len(documents[at - 1][1])
        growth.unmerged_chars = 0
        elsewhere = self._chars_a_token(documents[:at] or documents)
        if self._chars_a_token(documents[at:]) < config.growth_need * elsewhere:
            self._sprout(documents[at:], config.life_merges)

    def _chars_a_token(self, documents: List[List[Any]]) -> float:
        """Return how many characters a token of the documents holds on average."""
        chars = sum(len(text) for _, text, _, _ in documents)
        return chars / max(1, sum(len(self._ids[key]) for key, _, _, _ in documents))

    def _sprout(self, documents: List[List[Any]], most: int) -> None:
        """Learn merges from documents; their rows begin to ripen.  `most` bounds all merges."""
        known, texts = self.tokenizer.version, [text for _, text, _, _ in documents]
        room = min(most, self.config.life_merges) - known
        if self.growth.phase == "grown":
            room = min(room, self.config.growth_merges)
        if room <= 0 or self.sprout is not None or (
                sum(map(len, texts)) < self.config.min_merge_chars):
            return
        tokenizer = EvolvingTokenizer(self.tokenizer.merges)
        if tokenizer.learn_merges(texts, room, self.config.min_pair_count):
            with self.guard:
                sample = self.pool.stream[:SAMPLED_WINDOWS * self.config.block_size]
                self.model.grow_sprout(tokenizer.merges[known:], sample)
                self.sprout = Sprout(tokenizer, self.config.block_size)
                self.router.tokenizer = tokenizer
                self.growth.ripening, self.growth.ripeness = tokenizer.version - known, None
                self.growth.unripe = 0
                self.dirty.add("sprout")
            self._encode()

    @contextlib.contextmanager
    def _encoding(self) -> Iterator[Tuple[TextPool, Replay]]:
        """Choose how the next batch is encoded: as all that is said, or as a shadow copy."""
        sprout, share = self.sprout, self.config.shadow_share
        if self.growth.phase == "warmup":  # the base learns as well, and mostly for what is to come
            share = max(share, WARM_SHADOWS)
        if sprout is None or self.rng.random() >= share:
            yield self.pool, self.replay
        else:
            with self.model.sprouted():
                yield sprout.pool, sprout.replay

    def ripen(self) -> None:
        """Bring the new merges into use, if they are ripe; after some vain tries they wither."""
        if self.sprout is None or self.best is not None:
            return
        if self._is_ripe(self.sprout):
            self._adopt(self.sprout)
            return
        self.growth.unripe += 1
        if self.growth.unripe >= WITHERING:
            with self.guard:
                self.sprout = self.model.sprout = None
                self.router.tokenizer, self.growth.ripening = self.tokenizer, 0
                self.dirty.discard("sprout")
            self.notes.append({"kind": "merges withered", "worst": self.growth.ripeness})

    def _is_ripe(self, sprout: Sprout) -> bool:
        """Return whether no text at hand costs model or voice too much more with the new merges.

        As always a text is written in the merges of the base where that costs the model less. In
        the new merges alone all texts together must not cost too much more either. The model is
        tried on what it has read and on held-out text, the voice, whose counts know by heart what
        it has read, on held-out text alone; both are spread over its whole life.
        """
        chars = INTERPRETED_MIX_CHARS if self.engine.name == "python" else TRIED_CHARS
        held = spread_texts(self._held_whole, TRIED_TEXTS, chars)
        texts = held + spread_texts("".join(d[1] for d in self._documents), TRIED_TEXTS, chars)
        plain, old, new = self._tried(sprout, texts)
        worst = max([sum(new) / sum(old) - 1.0 if texts else 0.0,
                     *(min(p, n) / min(p, o) - 1.0 for p, o, n in zip(plain, old, new))])
        if worst <= self.config.growth_bound and self.mixer is not None and self.config.mix:
            voices = zip(*self._tried(sprout, held, voice=True))
            for i, (as_plain, as_old, as_new) in enumerate(voices):
                before = as_plain if plain[i] < old[i] else as_old
                after = as_plain if plain[i] < new[i] else as_new
                worst = max(worst, after / before - 1.0)
        self.growth.ripeness = worst
        return worst <= self.config.growth_bound

    def tongues(self) -> Iterator[Tongue]:
        """Yield the ways it can write a text: with all merges, and with those of times before."""
        yield Tongue(self.tokenizer, self.model, self.counted(self.tokenizer))
        yield from older_tongues(self.tokenizer, self.model,
                                 sorted({self.growth.native, *self.growth.older}), self.counted)

    def _tried(self, sprout: Sprout, texts: Sequence[str],
               voice: bool = False) -> List[List[float]]:
        """Return the nats of texts in the merges of the base, in those in use, and in the new."""
        native = self.growth.native if self.growth.native >= 0 else self.tokenizer.version
        tried = [self._costs(EvolvingTokenizer(self.tokenizer.merges[:native]),
                             self.model.narrowed(FIRST_MERGE + native), texts, voice),
                 self._costs(self.tokenizer, self.model, texts, voice)]
        with self.model.sprouted():
            return [*tried, self._costs(sprout.tokenizer, self.model, texts, voice)]

    def _costs(self, tokenizer: EvolvingTokenizer, model: GPT, texts: Sequence[str],
               voice: bool) -> List[float]:
        """Return the nats of each text by a model alone, or by the whole voice."""
        encoded = [text_ids(tokenizer, text) for text in texts]
        if not voice:
            return [sum(scored_nats(model, ids, self.config.block_size // 2)) for ids in encoded]
        assert self.mixer is not None
        mixer = load_mixer(self.config, {"mixer": self.mixer})
        mixture = Mixture(self.engine, self.counted(tokenizer), mixer)
        return [voice_nats(model, ids, mixture) for ids in encoded]

    def counted(self, tokenizer: EvolvingTokenizer) -> NgramMemory:
        """Return counts of the documents in the ids of a tokenizer."""
        counts = NgramMemory(self.config.ngram_order, self.config.ngram_counts)
        count_documents(counts, (document_ids(tokenizer, text, closed)
                                 for _, text, closed, _ in self._documents))
        return counts

    def _adopt(self, sprout: Sprout) -> None:
        """Bring merges into use: they become the tokenizer's, their rows the embedding's."""
        with self.guard:  # a snapshot has both, or neither
            self.model.adopt_sprout()
            self.growth.older = [*self.growth.older, self.tokenizer.version]
            self.tokenizer, self.sprout = sprout.tokenizer, None
            self._ids, self.pool = sprout.ids, sprout.pool
            self.growth.ripening = 0
            self.dirty.update({"base", *self.delta_names[-1:]})
        self._encode()
        self.evaluate()

    def keys(self, fresh_only: bool) -> List[int]:
        """Return the keys of the documents at hand, or of the fresh ones among them."""
        return [key for key, _, _, fresh in self._documents if fresh or not fresh_only]

    def known_chars(self) -> int:
        """Return the size of the text that is not new."""
        return sum(len(text) for _, text, _, fresh in self._documents if not fresh)

    def batch(self) -> int:
        """Return how many windows a step takes at this age."""
        full = self.config.batch_size
        return max(1, full // 2) if self.growth.tokens < self.config.small_batch_tokens else full

    def steps_of(self, epochs: float) -> float:
        """Return in how many steps of a warm-up the present text is read so many times."""
        tokens = epochs * len(self.pool.stream)
        first = min(tokens, self.config.small_batch_tokens)
        full = self.config.batch_size * self.config.block_size
        return first / (full / 2) + (tokens - first) / full

    def warmup_steps(self) -> int:
        """Return the most steps of a warm-up on the present text: some epochs, at most so many."""
        steps = round(self.steps_of(self.config.warmup_epochs))
        return min(self.config.warmup_steps, max(SHORTEST_WARMUP, steps))

    def begin_burst(self) -> None:
        """Make sure that an unsealed delta is there to learn what is new."""
        self._sprout_if_due()
        if not self.delta_names or self.fresh_chars and (
                delta_is_full(self.growth, self.config) or self._sealed_by_shift()):
            self.begin_delta()
        else:
            self.model.freeze()
            for matrix in _matrices(self.model.deltas[-1]):
                matrix.freeze(False)

    def _sealed_by_shift(self) -> bool:
        """Return whether what is new is none of the active delta's business.

        The loss shows it: another layer, the base or whom the text itself calls for, reads the
        new text better. A delta that has hardly learned anything takes whatever comes.
        """
        sample = self.pool.fresh[1:1 + SHIFT_IDS]
        least = self.config.delta_seal_chars / SHIFT_SHARE
        if len(sample) < SHIFT_LEAST_IDS or self.growth.delta_chars < least:
            return False
        active, called = len(self.delta_names) - 1, self.router(sample)
        others = min(self._nats(place, sample) for place in {None, called} - {active})
        return others * (1.0 + self.config.delta_shift) < self._nats(active, sample)

    def _nats(self, place: Optional[int], ids: Sequence[int]) -> float:
        """Return the loss of ids when one delta, or the base alone, reads them."""
        return sum(scored_nats(self.model.with_delta(place), ids, self.config.block_size))

    def begin_delta(self) -> None:
        """Seal the active delta and append the next, folding the oldest where that is one more.

        It begins as a copy of the layer that reads the new text best, or at no effect.
        """
        if len(self.delta_names) >= self.config.max_delta_modules:
            self._fold_oldest()
        parent = self._parent()
        with self.guard:
            self.model.append_delta(self.config.delta_rank, self.rng)
            if parent is not None:
                load_params(_matrices(self.model.deltas[-1]),
                            pack_params(_matrices(self.model.deltas[parent])))
            self.router.append()
            self.dirty.update((*self.delta_names[-1:], "router"))
            self.delta_names.append(f"delta{self.growth.delta_serial}")
            self.growth.delta_serial, self.growth.delta_chars = self.growth.delta_serial + 1, 0

    def _parent(self) -> Optional[int]:
        """Return the delta to begin with, of those that the new text resembles, or None."""
        sample, model = self.pool.fresh[1:1 + SHIFT_IDS], self.model
        if len(sample) < SHIFT_LEAST_IDS:
            return None
        newest = b"".join(map(self.tokenizer.token_bytes, sample))
        likely = heapq.nlargest(PARENTS, enumerate(self.router.scores(newest)[1:]),
                                key=itemgetter(1))
        heirs = [place for place, _ in likely if not model.lacks[place] and
                 model.deltas[place]["embedding"].a.rows == self.config.delta_rank]
        return min([None, *heirs], key=lambda place: self._nats(place, sample))

    def _fold_oldest(self, share: Optional[float] = None) -> None:
        """Fold the oldest delta into the base, which speaks for its text as far as it got a share.

        All other deltas speak as before, for what they never knew is kept and taken off again.
        How much is folded is measured on the probes: what serves the base's text and the delta's.
        """
        name, delta = self.delta_names[0], self.model.deltas[0]
        chosen, harm = self._fold_share() if share is None else (share, None)
        with self.guard:
            self.model.fold_oldest_delta(chosen)
            self.router.fold_oldest(chosen)
            if self.mixer is not None:
                mixer = load_mixer(self.config, {"mixer": self.mixer})
                mixer.fold_oldest()
                self.mixer = pack_mixer(mixer, sorted(self.mixed))
            self.delta_names.pop(0)
            kept = pack_params(_matrices(delta))
            told = {"at": self.growth.delta_serial, "share": chosen, "matrices": kept.manifest}
            self.folds[name.replace("delta", "fold")] = Layer(told, kept.data, sealed=True)
            oldest = min((int(n[5:]) for n in self.delta_names), default=self.growth.delta_serial)
            self.folds = {n: fold for n, fold in self.folds.items() if fold.manifest["at"] > oldest}
            self.dirty.update(("base", "router", *self.folds))
        self.notes.append({"kind": "folded", "layer": name, "share": chosen, "harm": harm})

    def _fold_share(self) -> Tuple[float, float]:
        """Return the share of the oldest delta that harms the probes least, and by how much then.

        Harm is the mean rise of the probes' losses over the best of their lives, as a share; so
        the base is not worn away by one fold after the other. Without probes all is folded.
        """
        best = self.growth.best_probes

        def harm(share: float) -> float:
            model, router = self.model.copied(), self.router.copied()
            model.fold_oldest_delta(share)
            router.fold_oldest(share)
            model.router = router
            rises = [bpc / best.get(name, bpc) - 1.0
                     for name, bpc in self.probe_losses(model).items()]
            return sum(rises) / max(1, len(rises))
        costs = {share: harm(share) for share in (FOLD_SHARES if self.probes else FOLD_SHARES[:1])}
        chosen = min(costs, key=costs.__getitem__)
        return chosen, costs[chosen]

    def probe_losses(self, model: Optional[GPT] = None) -> Dict[str, float]:
        """Return the bits per character of every probe set."""
        return {name: bits_per_character(model or self.model, ids, chars, self.config.block_size)
                for name, (ids, chars) in self.probes.items()}

    def fresh_nats(self) -> float:
        """Return the loss, in nats an id, of a part of what is new, read by who learns it."""
        ids = self.pool.fresh[:FRESH_IDS]
        whole = sum(scored_nats(self.model.learner(), ids, self.config.block_size))
        return whole / max(1, len(ids) - 1)

    def replayed(self, replay: Replay) -> List[int]:
        """Return a window of what is known; every second one of what the active delta speaks for.

        The former keep it harmless where it is called by mistake, the latter rehearse it.
        """
        active = len(self.delta_names) - 1
        window = replay.window(self.rng)
        if self.rng.random() < OWN_REPLAY:
            for _ in range(OWN_TRIES):
                if self.router(window) == active:
                    break
                window = replay.window(self.rng)
        return window

    def settle_route(self) -> None:
        """Let the router know what the active delta has learned."""
        texts = [text for _, text, _, fresh in self._documents if fresh]
        self.dirty.add("router")
        if texts:
            self.router.learn(len(self.delta_names), texts)
        elif not self.router.counts[-1]:  # nothing was new: it learned more of what the base knows
            self.router.refine(len(self.delta_names))

    def step(self, rate: float, fresh_count: int) -> StepReport:
        """Train on one batch and count it."""
        grown, count = self.growth.phase == "grown", self.batch()
        with self._encoding() as (pool, replay):
            if grown:
                fresh_count *= len(pool.fresh) > 1
                windows = pool.windows(fresh_count, fresh_count, self.rng)
                windows += [self.replayed(replay) for _ in range(count - fresh_count)]
            else:
                windows = pool.windows(count, fresh_count, self.rng)
            windows = [window for window in windows if len(window) > 1] or pool.windows(
                1, 1, self.rng)
            report = train_step(self.model.learner(), self.optimizer, windows, rate,
                                self.config.dropout, self.rng, self.guard, self._unwanted())
        if self.sprout is not None:
            self.dirty.add("sprout")
        self.growth.step += 1
        self.growth.tokens += report.tokens
        self.dirty.add(self.delta_names[-1] if grown else "base")
        return report

    def evaluate(self) -> Optional[float]:
        """Return held-out bits per character, or None where nothing is held out."""
        bpc = bits_per_character(self.model, self.held_out, self.held_out_chars,
                                 self.config.block_size)
        self.growth.bpc = None if math.isnan(bpc) else bpc
        return self.growth.bpc

    def train_bpc(self) -> Optional[float]:
        """Return bits per character on a sample of the text that it trains on."""
        texts = [text for _, text, _, _ in self._documents]
        random.Random(self.config.seed).shuffle(texts)
        sample = "\n".join(texts)[:self.config.eval_chars]
        bpc = bits_per_character(self.model, text_ids(self.tokenizer, sample), len(sample),
                                 self.config.block_size)
        return None if math.isnan(bpc) else bpc

    def note_warmup(self, may_cool: bool = True) -> None:
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
        """Let the rate fall from now on, from the best weights seen.

        What an enlarged model knew suffers from high rates, and only the last ones mend that: it
        goes on from where it is.
        """
        growth = self.growth
        growth.cooling_step = growth.warmup_step
        if self.best is not None and not growth.enlarged:
            with self.guard:
                load_params(list(self.model.params.values()), self.best)
            growth.bpc = growth.best_bpc

    def cooling_steps(self) -> int:
        """Return how many steps the rate takes to fall, once the held-out loss has told it to."""
        before = self.growth.cooling_step - self.growth.stale * self.config.eval_steps
        return max(1, round(self.config.cooling * before))

    def end_warmup(self) -> None:
        """Settle on the best weights seen, and freeze the base."""
        growth = self.growth
        if self.best is not None and growth.best_bpc is not None and (
                growth.bpc is None or growth.best_bpc < growth.bpc):
            with self.guard:
                load_params(list(self.model.params.values()), self.best)
            growth.bpc = growth.best_bpc
        growth.phase, self.best, growth.train_bpc = "grown", None, self.train_bpc()
        growth.enlarged = False
        self.mix_due = True
        self.mixed.clear()
        with self.guard:
            self.router.restore(Router(self.tokenizer))
            self.router.learn(0, (text for _, text, _, _ in self._documents))
        growth.probes = self.probe_losses()
        growth.best_probes = dict(growth.probes)
        self.dirty.update(("base", "router"))
        self.model.freeze()

    def fit_voice(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Fit the weights of the voice's experts on held-out text; return whether that was done.

        It is read twice side by side: with nothing to copy from, and copying from what was read.
        Once fitted, only the newest delta's own weights move, on probe sets which are new; the
        voice of all other text stays. Broken off, or without such text, it changes nothing.
        """
        config, again, text = self.config, bool(self.mixed), self._text_to_mix()
        if not text or not config.mix_passes:
            return False
        ids = text_ids(self.tokenizer, text)
        counts = NgramMemory(config.ngram_order, config.ngram_counts)
        count_documents(counts, self._ids.values())
        known = {"mixer": self.mixer} if again and self.mixer is not None else {}
        mixer = load_mixer(config, known)
        for _ in range(config.mix_passes):
            still, live = (Mixture(self.engine, counts, mixer) for _ in range(2))
            if again:
                still.own_place = live.own_place = len(self.delta_names)
            for _ in read_through(self.model, ids, still, live, fit=True):
                if should_stop():
                    return False
        with self.guard:
            self.mixed.update(self._probe_texts)
            self.mixer, self.mix_due = pack_mixer(mixer, sorted(self.mixed)), False
            self.dirty.add("mixer")
        return True

    def _text_to_mix(self) -> str:
        """Return held-out text for the voice's weights: of probe sets that they do not know yet."""
        slow = self.engine.name == "python"
        room = INTERPRETED_MIX_CHARS if slow else self.config.held_out_chars
        texts = [text for name, text in self._probe_texts.items() if name not in self.mixed]
        share = room // max(1, len(texts))
        return "\n".join(text[:share] for text in texts) if self._probe_texts else self._mix_text

    def snapshot(self) -> Tuple[Growth, Dict[str, Layer]]:
        """Return all that changed since the last snapshot and must be committed."""
        with self.guard:
            layers = {"optimizer": pack_moments(self.model.trainable())}
            if "base" in self.dirty:
                layers["tokenizer"] = Layer(None, self.tokenizer.pack())
                layers["base"] = pack_params(list(self.model.params.values()))
            if "sprout" in self.dirty and self.sprout is not None and self.model.sprout is not None:
                layers["sprout"] = self.sprout.pack(self.model.sprout)
            if self.best is not None:
                layers["best"] = self.best
            if self.mixer is not None:
                layers["mixer"] = self.mixer
            for name, delta in zip(self.delta_names, self.model.deltas):
                if name in self.dirty:
                    sealed = name != self.delta_names[-1]
                    layers[name] = pack_params(_matrices(delta))._replace(sealed=sealed)
            layers.update((name, fold) for name, fold in self.folds.items() if name in self.dirty)
            if "router" in self.dirty:
                layers["router"] = pack_router(self.router)
            self.dirty.clear()
            return dataclasses.replace(self.growth, merges=self.tokenizer.version), layers

    def layer_names(self) -> List[str]:
        """Return the names of the layers that are part of it now."""
        kept = {"sprout": self.sprout, "best": self.best, "mixer": self.mixer,
                "router": self.growth.phase == "grown"}
        return ["tokenizer", "base", "optimizer", *self.delta_names, *self.folds] + [
            name for name, layer in kept.items() if layer]


class Gate:
    """Stands before a commit: no probe set may come out of a burst worse than its bound.

    It keeps the state from before the burst, and brings it back.
    """

    def __init__(self, student: Student) -> None:
        self.student, self.tries, self.settled = student, 0, False
        self.keep()

    def keep(self) -> None:
        """Take the present state as the one to come back to."""
        self.now = self.student.probe_losses()
        self._keep()

    def _keep(self) -> None:
        student, self.before = self.student, self.now
        self.matrices = _matrices(student.model.deltas[-1])
        self.weights, self.moments = pack_params(self.matrices), pack_moments(self.matrices)
        self.routes = student.router.copied()

    def worse(self) -> Dict[str, Tuple[float, float]]:
        """Return the probe sets beyond their bounds, with their loss before and now.

        The bound is a share above the best of its life, or what it was before, if that is more.
        """
        student, best = self.student, self.student.growth.best_probes
        self.now, bound = student.probe_losses(), 1.0 + student.config.gate_bound
        return {name: (self.before[name], bpc) for name, bpc in self.now.items()
                if bpc > max(self.before[name], best.get(name, self.before[name]) * bound)}

    def harm(self) -> Dict[str, Tuple[float, float]]:
        """Return what is worse even when the active delta is called less readily."""
        student = self.student
        worse = self.worse()
        for margin in SHY_MARGINS if worse else ():
            student.router.margins[-1] = margin
            shy = self.worse()
            if not shy:
                student.notes.append({"kind": "gate", "then": "called less readily",
                                      "probes": sorted(worse), "margin": margin})
                return {}
        return worse

    def commit(self) -> None:
        """Take the state that was tried last as good, and remember each probe set's best loss."""
        growth, best = self.student.growth, self.student.growth.best_probes
        self.settled = True
        self._keep()
        growth.probes = self.before
        growth.best_probes = {name: min(bpc, best.get(name, bpc))
                              for name, bpc in self.before.items()}

    def restore(self) -> None:
        """Bring back the state from before."""
        student = self.student
        with student.guard:
            load_params(self.matrices, self.weights)
            load_moments(self.matrices, self.moments)
            student.router.restore(self.routes)


class Job:
    """One stretch of learning: what is left of the warm-up, or a burst; with its own schedule."""

    def __init__(self, student: Student, steps: Optional[int], seconds: Optional[float],
                 clock: Callable[[], float]) -> None:
        self.student, self.seconds, self.clock, self.began = student, seconds, clock, clock()
        self.explicit, self.counted, self.done_steps = bool(steps or seconds), bool(steps), 0
        self.warming = student.growth.phase == "warmup"
        whole, growth = student.warmup_steps(), student.growth
        left = max(1, whole - growth.warmup_step)
        self.replay, self.calm = student.config.replay_share, 1.0
        self.lap_steps, self.lap_nats = 1, math.inf
        self.gate: Optional[Gate] = None
        if not self.warming:
            student.begin_burst()
            self.gate = Gate(student)
            # a delta that knows nothing yet has nothing to forget, and no text is its own
            known, fresh = growth.delta_chars, student.fresh_chars
            self.replay *= known / (known + fresh) if known + fresh else 1.0
        due = left if self.warming else self._burst_steps()
        self.steps = steps or (10 ** 9 if seconds else due)
        if self.warming and self.counted:  # so many steps, whatever the held-out loss says
            growth.cooling_step = 0
        done = growth.warmup_step / whole
        self.behind = done if self.warming and done < 1.0 else 0.0
        self.rising = max(1.0, student.config.rate_warmup * min(whole, RISING_OF))
        self.sinking = max(1.0, student.steps_of(student.config.rate_epochs))

    def _burst_steps(self) -> int:
        """Return enough steps to read what is new burst_passes times, and at least micro_steps."""
        student, config = self.student, self.student.config
        per_step = student.batch() * (1.0 - self.replay) or 1.0
        self.lap_steps = max(config.micro_steps // 4, 1, math.ceil(
            len(student.pool.fresh) / (per_step * config.block_size)))
        most = BURST_STEPS * config.micro_steps
        least = config.micro_steps * (RIPENING if student.sprout is not None else 1)
        return max(least, min(round(config.burst_passes * self.lap_steps), most))

    def fresh_count(self) -> int:
        """Return how many windows of a batch are of new text; in a warm-up only for a while."""
        student = self.student
        if self.warming and student.fresh_steps <= 0:
            return 0
        exact = student.batch() * (1.0 - self.replay)
        if self.warming:
            return max(1, round(exact))
        return int(exact) + (student.rng.random() < exact % 1.0)

    def spent(self) -> float:
        """Return how much of this job is behind, 0 to 1."""
        by_clock = (self.clock() - self.began) / self.seconds if self.seconds else 0.0
        return min(1.0, max(self.done_steps / self.steps, by_clock))

    def share(self) -> float:
        """Return how much of what it may last is behind, 0 to 1."""
        return self.behind + (1.0 - self.behind) * self.spent()

    def rate(self) -> float:
        """Return the learning rate of the next step.

        That of a warm-up rises, and sinks as 1/(1+t) while the held-out loss falls; then it falls
        to 0, as it does at the end of what it may last. So the end need not be known before.
        Measured on our corpus: held-out 1.525 bits per character after 11 epochs; 1.536 after 16
        and 1.526 after 20 where the rate stayed at its peak; 1.526 after 12 along a line to 0.
        Source: Hägele et al., "Scaling laws and compute-optimal training beyond fixed training
        durations", arXiv:2405.18392.
        """
        config, growth = self.student.config, self.student.growth
        if not self.warming:
            return scheduled_rate(config.delta_rate * self.calm, self.share(),
                                  config.rate_warmup, config.schedule)
        left = min(1.0, (1.0 - self.share()) * (1.0 + 1.0 / config.cooling), 1.0 - self.cooled())
        rate = scheduled_rate(config.learning_rate, 1.0 - left, 0.0, config.schedule)
        sunk = min(growth.warmup_step, growth.cooling_step or growth.warmup_step) / self.sinking
        return rate * min(1.0, (growth.warmup_step + 1) / self.rising) / (1.0 + sunk)

    def cooled(self) -> float:
        """Return how much of a fall of the rate that the held-out loss began is behind, 0 to 1."""
        growth = self.student.growth
        if not (self.warming and growth.cooling_step):
            return 0.0
        return min(1.0, (growth.warmup_step - growth.cooling_step) / self.student.cooling_steps())

    def advance(self) -> StepReport:
        """Do one step."""
        report = self.student.step(self.rate(), self.fresh_count())
        self.done_steps += 1
        self.student.fresh_steps -= 1
        self.student.growth.warmup_step += self.warming
        return report

    def finished(self) -> bool:
        """Return whether the job is through; the loss may end it before its schedule does.

        In a warm-up that is the held-out loss; in a burst the new text's own.
        """
        if self.warming and self.done_steps % self.student.config.eval_steps == 0:
            self.student.note_warmup(may_cool=not self.counted)
        if self.spent() >= 1.0 or self.given_up() or self.cooled() >= 1.0:
            return True
        if self.warming or self.explicit:
            return False
        due = self.done_steps % self.lap_steps == 0
        return due and self._stopped_falling() and (
            self.done_steps >= self.student.config.micro_steps)

    def _stopped_falling(self) -> bool:
        """Return whether another reading of what is new has not lowered its loss."""
        nats, before = self.student.fresh_nats(), self.lap_nats
        self.lap_nats = nats
        return nats > before * (1.0 - LAP_GAIN)

    def passes(self) -> bool:
        """Return whether what was learned may be committed; if not, it is as it was before.

        A burst that fails is to be tried again more gently, or, if that failed too, is given up.
        """
        if self.gate is None:
            return True
        if not self.gate.settled:
            self.student.settle_route()
        worse = self.gate.harm()
        if not worse:
            self.gate.commit()
            return True
        self.gate.restore()
        self._be_gentler(worse)
        return False

    def _be_gentler(self, worse: Dict[str, Tuple[float, float]]) -> None:
        """Choose what is tried next: a layer of its own, then more replay at a lower rate."""
        student, gate = self.student, self.gate
        assert gate is not None
        if student.growth.delta_chars and not gate.settled:
            student.begin_delta()
            gate.keep()
            self.replay, then = 0.0, "a layer of its own"
        else:
            gate.tries += 1
            self.replay, self.calm = (1.0 + self.replay) / 2.0, self.calm / 2.0
            then = "rolled back" if self.given_up() else "more replay at a lower rate"
        name, (before, now) = max(worse.items(), key=lambda item: item[1][1] / item[1][0])
        student.notes.append({"kind": "gate", "probe": name, "before": before, "now": now,
                              "then": then})

    def given_up(self) -> bool:
        """Return whether the burst was tried often enough."""
        return self.gate is not None and self.gate.tries > self.student.config.gate_tries

    def again(self) -> None:
        """Begin the burst anew, as it is now tuned."""
        self.done_steps, self.began, self.lap_nats = 0, self.clock(), math.inf

    def close(self) -> List[int]:
        """Settle what was learned; return the keys of the documents that count as learned."""
        student, growth = self.student, self.student.growth
        if not self.warming:
            student.evaluate()
            if not self.given_up():  # without new text it learned what all else is about
                growth.delta_chars += student.fresh_chars or student.known_chars()
            student.ripen()
            return student.keys(fresh_only=True)
        student.note_warmup(may_cool=not self.counted)
        if (not self.explicit or self.cooled() >= 1.0
                or growth.warmup_step >= student.warmup_steps()):
            student.end_warmup()
            growth.native, growth.older = student.tokenizer.version, []
            student.ripen()
            growth.native = student.tokenizer.version
            return student.keys(fresh_only=False)
        return []


LAP_GAIN = 0.003    # by which a reading must lower the loss of what is new
BURST_STEPS = 32    # times micro_steps, the longest burst
REST_SECONDS = 20.0   # the longest that a trainer rests for one reply


class TrainerChild:
    """The child process: reads frames, works on one job at a time, writes frames.

    A thread reads the pipe, so that a request to rest or to stop is served while a step is being
    computed, and so that the process goes the moment its parent is gone.
    """

    def __init__(self, source: BinaryIO, sink: BinaryIO, engine: Engine,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.source, self.sink, self.engine, self.clock = source, sink, engine, clock
        # of a kind that one thread may fill while the other is halted anywhere
        self.inbox: "queue.SimpleQueue[Tuple[Dict[str, Any], Dict[str, bytes]]]" = (
            queue.SimpleQueue())
        self.going = threading.Event()
        self.going.set()
        self.writing = threading.Lock()
        self.student: Optional[Student] = None
        self.job: Optional[Job] = None
        self.saved_at = self.told_at = clock()
        self.job_tokens = 0

    def run(self) -> None:
        """Serve until the parent says stop or goes away."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            try:
                message, blobs = self.inbox.get(block=self.job is None)
                getattr(self, "on_" + message.pop("do"))(blobs=blobs, **message)
            except queue.Empty:
                self._advance()

    def _read(self) -> None:
        while True:
            frame = read_frame(self.source)
            if frame is None:
                os._exit(0)
            order = frame[0]["do"]
            if order == "rest":
                self.going.clear()
                signal.raise_signal(signal.SIGINT)  # which runs `rest` in the thread that computes
                continue
            self.going.set()
            if order == "stop":
                self._leave()
            elif order != "go on":
                self.inbox.put(frame)

    def rest(self, *_: Any) -> None:
        """Halt where it is, between two kernels or in the midst of one that is interpreted.

        It goes on with the next frame, or by itself after a while, and nothing it computes changes.
        """
        self.going.wait(REST_SECONDS)

    def _leave(self) -> None:
        """Send what is not yet saved and go, in the middle of whatever is being computed."""
        if self.student is not None:
            with self.student.guard:
                if self.student.dirty:
                    if self.job is not None and self.job.gate is not None:
                        self.job.gate.restore()  # unproven
                    self._snapshot([])
        os._exit(0)

    def _send(self, kind: str, blobs: Optional[Dict[str, bytes]] = None, **message: Any) -> None:
        with self.writing:
            self.sink.write(pack_frame({"kind": kind, **message}, blobs or {}))
            self.sink.flush()

    def on_start(self, config: Dict[str, Any], growth: Dict[str, Any],
                 layers: Dict[str, List[Any]], blobs: Dict[str, bytes]) -> None:
        """Come to life with the state that the parent stored."""
        given = {name: Layer(manifest, blobs[name], sealed)
                 for name, (manifest, sealed) in layers.items()}
        self.student = Student(Config(**config), Growth(**growth), given, self.engine)

    def on_text(self, documents: List[List[Any]], held_out: str, blobs: Dict[str, bytes],
                probes: Optional[Dict[str, str]] = None) -> None:
        """Take the text as it is now."""
        assert self.student is not None
        if self.job is not None and self.job.gate is not None:  # it is not known to do no harm
            self.job.gate.restore()
            self.job = None
        self.student.take_text(documents, held_out, probes)
        fresh = [document for document in documents if document[3]]
        self._send("reading", documents=len(documents), fresh=len(fresh),
                   phase=self.student.growth.phase, vocab=self.student.tokenizer.vocab_size)

    def on_rejected(self, exchanges: List[List[str]], blobs: Dict[str, bytes]) -> None:
        """Take the replies that the owner did not want."""
        assert self.student is not None
        self.student.take_rejected(exchanges)

    def on_learn(self, steps: Optional[int], seconds: Optional[float],
                 blobs: Dict[str, bytes]) -> None:
        """Begin a job, unless a warm-up is under way, which takes new text in its stride."""
        assert self.student is not None
        if self.job is None or not self.job.warming:
            self.job = Job(self.student, steps, seconds, self.clock)
            self.began, self.job_tokens = self.clock(), 0

    def _advance(self) -> None:
        """Do one step of the job, and say and save what is due."""
        job = self.job
        assert job is not None
        report = job.advance()
        self.job_tokens += report.tokens
        if not report.applied:
            self._send("trouble", step=job.student.growth.step, loss=str(report.loss))
        if job.finished():
            passed = job.passes()
            self._tell_notes()
            if not passed and not job.given_up():
                job.again()
                return
            self.job = None
            learned = job.close()
            self._report(job, report)
            self._snapshot(learned)
            if job.student.mix_due and job.student.fit_voice(lambda: not self.inbox.empty()):
                self._snapshot([])
            self._send("done")
        elif (job.gate is None or job.explicit) and (
                self.clock() - self.saved_at > job.student.config.commit_seconds):
            # a burst is committed whole: a trial at the gate by the clock would be chance
            self.saved_at = self.clock()
            if job.passes():
                self._snapshot([])
            self._tell_notes()
        if self.clock() - self.told_at > 0.2:
            self._report(job, report)

    def _tell_notes(self) -> None:
        assert self.student is not None
        while self.student.notes:
            self._send("note", note=self.student.notes.pop(0))

    def _report(self, job: Job, report: StepReport) -> None:
        growth = job.student.growth
        self.told_at = self.clock()
        self._send("progress", phase=growth.phase, step=growth.step, tokens=growth.tokens,
                   share=job.share(), loss=report.loss if report.applied else None,
                   bpc=growth.bpc, job_step=job.done_steps,
                   tokens_per_s=self.job_tokens / max(1e-9, self.clock() - self.began))

    def _snapshot(self, learned: List[int]) -> None:
        student = self.student
        assert student is not None
        growth, layers = student.snapshot()
        self.saved_at = self.clock()
        self._send("snapshot", {name: layer.data for name, layer in layers.items()},
                   growth=dataclasses.asdict(growth), learned=learned, names=student.layer_names(),
                   layers={n: [layer.manifest, layer.sealed] for n, layer in layers.items()})


def trainer_main() -> int:
    """Be the trainer: frames on stdin and stdout, until the parent goes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(AttributeError, OSError):
        os.nice(10)
    notices: List[str] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # it may have to leave while compiling
    engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, notices.append)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    child = TrainerChild(sys.stdin.buffer, sys.stdout.buffer, engine)
    signal.signal(signal.SIGINT, child.rest)
    try:
        child._send("ready", notices=notices)
        child.run()
    except BrokenPipeError:
        pass
    except Exception as error:
        if os.environ.get("MACROGPT_DEBUG"):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            child._send("failed", error=f"{type(error).__name__}: {error}")
    os._exit(1)


# ──────────────────────────────────────────────────────────────────────────────────────
# 16 · ORGANISM — what lives between two replies   uses: 0 1 2 4 7 10 11 12 13 14 15
# ──────────────────────────────────────────────────────────────────────────────────────
#
# The parent talks, watches the corpus file, and is the one writer of the memory.

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
# imported, not run: Python keeps the compiled module, which spares 20 MB and 0.1 s at every start
CHILD_CODE = """
import importlib, os, sys
folder, name = os.path.split(sys.argv[1])
sys.path.insert(0, folder)
sys.exit(importlib.import_module(os.path.splitext(name)[0]).trainer_main())
"""
BIG_ADDITION = 50
MOST_REJECTED = 50  # replies from which bursts push the model away, the newest
FRESH_EXCHANGES = 3  # in which it does not say twice that it knows nothing
LATE_MESSAGES = 24   # in which it would rather not say the same twice
NO_ORDER = (("force", False), ("steps", None), ("seconds", None))
LEASE_SECONDS = 120.0
LISTEN_SECONDS = 3.0  # how often one that may not train asks whether it now may


class Organism:
    """Memory, voice and trainer together; the only owner of state that changes.

    The caller's thread speaks with `reply`; `awake` starts a second thread in which an event loop
    watches the corpus and supervises the trainer.
    """

    def __init__(self, config: Config, memory: Memory, engine: Engine, session: str = "main",
                 seeded: bool = False) -> None:
        self.config, self.memory, self.engine = config, memory, engine
        self.session, self.seeded, self.replies = session, seeded, 0
        self.last: Optional[Reply] = None
        self.last_ids: Tuple[int, int] = (0, 0)
        self.trace: Optional[Trace] = None
        self._near: Optional[List[Entry]] = None  # what recall found for the text at hand
        self._fits: List[Recall] = []
        self._said: Set[str] = set()  # replies of late
        self._entry_counts, self._mixer = EntryCounts(), Mixer(config.ngram_order)
        self._native_counts = EntryCounts()
        self._native: Optional[Tuple[GPT, EvolvingTokenizer, GPT]] = None
        self.changed = threading.Condition()
        self.growth = Growth(**memory.setting("growth", {}))
        self.progress: Dict[str, Any] = {}
        self.notices: Deque[str] = deque(maxlen=20)
        self.stopping = self.at_work = self.failed = self.barred = False
        self.read_once = threading.Event()
        self._reading = threading.RLock()  # held while the corpus is taken in
        self._order = dict(NO_ORDER)
        self.only_orders, self._rested_at = False, memory.clock()
        self._voice: Optional[Tuple[EvolvingTokenizer, GPT]] = None
        self._voice_old = True
        self._stamp: Optional[FileStamp] = None
        self._thread: Optional[threading.Thread] = None
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._child: Any = None  # the trainer's process
        self._text_version, self._child_text_version, self._child_ready = 1, 0, False
        self.in_step = False  # whether each event waits for what the one before has to teach
        self._to_unlearn: List[Tuple[int, int, bool]] = []
        self._unlearn_since = 0.0
        self._owner = f"{socket.gethostname()}:{os.getpid()}"

    # the corpus

    def prepare_corpus(self) -> None:
        """Write a small first corpus where the default one is missing.  Raises CorpusError."""
        path = self.config.corpus_path
        if os.path.lexists(path):
            return
        if path != Config.corpus_path:
            raise CorpusError(f"the corpus {path} does not exist; name a text file with --corpus")
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(FIRST_CORPUS)
        except OSError as error:
            raise CorpusError(
                f"the corpus {path} is missing and cannot be written ({error.strerror}); make the "
                f"folder writable or use --corpus") from None
        self.notices.append(f"{path} was missing: a small first one is there now")

    def take_in_corpus(self) -> bool:
        """Read the corpus, remember what is new and gone, and return whether anything was.

        A file that is as it was when it was last taken in is not read again.
        """
        with self._reading:
            return self._take_in_corpus()

    def _take_in_corpus(self) -> bool:
        config, memory = self.config, self.memory
        self._stamp = file_stamp(config.corpus_path)
        seen = [os.path.abspath(config.corpus_path), config.max_corpus_lines, config.max_line_chars,
                *(dataclasses.astuple(self._stamp) if self._stamp else ())]
        if self._stamp is not None and memory.setting("corpus") == seen:
            return False
        corpus = read_corpus(config.corpus_path, config.max_corpus_lines, config.max_line_chars,
                             lambda: self.stopping)
        added, gone = changes(memory.entry_keys("corpus"), corpus)
        self.notices.extend(corpus.notices if added else ())
        with memory.transaction():
            held = self._hold_out(added)
            read = self._lose_lines(added, gone, corpus)
            memory.remove_entries("corpus", gone)
            for document in added:
                memory.add_entry("corpus", document, held_out=document.key in held)
            self._inherit(added, read)
            memory.set_setting("corpus", seen)
            if added or gone:
                memory.log("corpus", added=len(added), removed=len(gone))
        self._text_version += bool(added or gone)
        return bool(added or gone)

    def _lose_lines(self, added: List[Document], gone: Set[int], corpus: Corpus) -> Dict[str, int]:
        """Note which lines that layers have read are lost; return all lines of what is gone.

        Each with the first layer that has read it. A line that went to another document, or that
        a sample of a large file left out, is not lost.
        """
        read: Dict[str, int] = {}
        for text, layer in self.memory.trained_texts("corpus", gone):
            for line in text.splitlines():
                read[line] = min(layer, read.get(line, layer))
        lost = read.keys() - {line for d in corpus.documents for line in d.lines}
        if lost and not corpus.kept_all:
            lost -= lines_still_in(self.config.corpus_path, lost, self.config.max_line_chars)
        fresh = [line for d in added for line in d.lines if line not in read]
        corrected = corrected_lines(sorted(lost), fresh)
        for line in lost:
            self.memory.want_unlearned(line_key(line), read[line], len(line), line in corrected)
        return read

    def _inherit(self, added: List[Document], read: Dict[str, int]) -> None:
        """Let documents know which layers have read lines of theirs already."""
        if not (read or self.memory.to_unlearn()):
            return
        for document in added:
            again = [self.memory.take_back(line_key(line)) for line in document.lines]
            known = [read.get(line) for line in document.lines]
            layers = [layer for layer in (*again, *known) if layer is not None]
            if layers:
                self.memory.inherit_trained("corpus", document.key, min(layers))

    def _hold_out(self, added: List[Document]) -> Set[int]:
        """Return the keys among the added that are never trained on.

        Only a birth or a big addition gives up a share of its documents: a few lines that the
        owner writes are all meant to be learned. What is held out is known by its first line, so
        that it stays so when the rest of it is edited.
        """
        memory, share = self.memory, self.config.held_out_share
        known = memory.probe_keys()
        if not known or len(added) >= BIG_ADDITION:
            size = sum(len(d.text) for d in added)
            share = min(share, self.config.held_out_chars / max(1, size))
            chosen = [d for d in added if is_held_out(d, share)]
            if len(chosen) < len(added):
                fresh = {line_key(d.lines[0].casefold()) for d in chosen}
                memory.hold_out(fresh, self.growth.step)
                known |= fresh
        return {d.key for d in added if line_key(d.lines[0].casefold()) in known}

    # speaking

    def voice(self) -> Tuple[EvolvingTokenizer, GPT]:
        """Return tokenizer and model as last committed; between two replies they may change."""
        with self._entry_counts.lock:
            if self._voice is None or (self._voice_old and not self._must_recount()):
                self._voice_old, layers = False, spoken_layers(self.memory.layers())
                self._voice = build_model(self.config, layers, self.engine,
                                          prefer_best=self._speaking_growth().phase == "warmup")
                self._mixer = load_mixer(self.config, layers)
            return self._voice

    def counts(self, should_stop: Callable[[], bool] = lambda: False) -> NgramMemory:
        """Return the counts of all entries, in the ids of the voice's tokenizer."""
        with self._entry_counts.lock:
            tokenizer, _ = self.voice()
            return self._entry_counts.follow(self.memory, tokenizer, self.config, should_stop)

    def _must_recount(self) -> bool:
        """Return whether new merges came into use and the entries are still to be counted in them.

        Until that is done, in the background, it speaks as before: model, counts and tokenizer
        change in one moment.
        """
        return (self._voice is not None and self._thread is not None and self._thread.is_alive()
                and bool(self.config.mix) and self.trusts_model()
                and 0 < self._speaking_growth().merges != self._voice[0].version)

    def tongues(self) -> Iterator[Tongue]:
        """Yield the ways it can write a text: with all merges, with those of its base, and since.

        Each says what it said before the last growth, so whatever a text is written in before one,
        after it there is nothing worse.
        """
        with self._entry_counts.lock:
            yield from self._first_tongues()
            (tokenizer, model), growth = self.voice(), self._speaking_growth()
            yield from older_tongues(
                tokenizer, model, sorted({*growth.older} - {growth.native}),
                lambda less: EntryCounts().follow(self.memory, less, self.config))

    def _first_tongues(self, patient: bool = True) -> Iterator[Tongue]:
        """Yield the two that replies are written in: with all merges, and with those of its base.

        The second costs less for a text unlike all that was read. Without patience it is left out
        until its counts are made, which the background does.
        """
        with self._entry_counts.lock:
            (tokenizer, model), native = self.voice(), self._speaking_growth().native
            yield Tongue(tokenizer, model, self.counts())
            if 0 <= native < tokenizer.version and (patient or self._native_counts.counts.size):
                if self._native is None or self._native[0] is not model:
                    self._native = (model, EvolvingTokenizer(tokenizer.merges[:native]),
                                    model.narrowed(FIRST_MERGE + native))
                _, less, narrow = self._native
                yield Tongue(less, narrow, self._native_counts.follow(
                    self.memory, less, self.config))

    def tongue_for(self, text: str) -> Tongue:
        """Return the way to write a text, of those at hand, in which it costs the model least."""
        def cost(way: Tongue) -> float:
            ids = text_ids(way.tokenizer, text)
            return sum(scored_nats(way.model, ids, way.model.shape.block_size // 2))
        if not self.config.mix:
            return Tongue(*self.voice(), NgramMemory())
        ways = list(self._first_tongues(patient=False))
        return min(ways, key=cost) if len(ways) > 1 else ways[0]

    def _count_ahead(self) -> None:
        """Count what is new in the entries before a reply asks for it, and keep that."""
        if self._must_recount():
            stored, ahead = self.memory.layers()["tokenizer"], EntryCounts()
            ahead.follow(self.memory, EvolvingTokenizer.unpack(stored.data), self.config,
                         lambda: self.stopping)
            if self.stopping:
                return
            with self._entry_counts.lock:
                self._entry_counts.take_over(ahead)
                self._voice = None
        self.counts(lambda: self.stopping)
        self._entry_counts.keep(self.memory)
        if 0 <= self.growth.native < self.voice()[0].version:
            less = EvolvingTokenizer(self.voice()[0].merges[:self.growth.native])
            self._native_counts.follow(self.memory, less, self.config, lambda: self.stopping)

    def mixer(self) -> Mixer:
        """Return the weights of the voice's experts, as they were fitted."""
        self.voice()
        if self._mixer.order != self.config.ngram_order:
            self._mixer = load_mixer(self.config, spoken_layers(self.memory.layers()))
        return self._mixer

    def mixture(self, texts: Iterable[Sequence[int]] = (), counts: Optional[NgramMemory] = None,
                eager: float = 0.0) -> Optional[Mixture]:
        """Return the whole voice, which may copy from texts; None if the model is to be alone."""
        if not self.config.mix:
            return None
        return Mixture(self.engine, self.counts() if counts is None else counts, self.mixer(),
                       copyist(texts), eager)

    def _refresh(self) -> None:
        """Notice weights and sizes that were committed to the memory from elsewhere."""
        stored = Growth(**self.memory.setting("growth", {}))
        shape = self.memory.setting("shape", {})
        if stored != self.growth or shape and shape != dataclasses.asdict(Shape.of(self.config)):
            with self.changed:
                self.config = dataclasses.replace(self.config, **shape)
                self.growth, self._voice_old = stored, True

    def _speaking_growth(self) -> Growth:
        """Return how far the weights have come that speak: while others are rebuilt, the old."""
        old = self.memory.setting("old_growth")
        return Growth(**old) if old else self.growth

    def trusts_model(self) -> bool:
        """Return whether the model has learned enough to speak for itself."""
        growth = self._speaking_growth()
        best = growth.bpc if growth.best_bpc is None else growth.best_bpc
        enough = self.config.trust_bpc * (1.5 if growth.phase == "grown" else 1.0)
        return growth.phase != "newborn" and best is not None and best <= enough

    def _rng(self) -> random.Random:
        count = self.replies if self.seeded else self.memory.counts()["messages"]
        self.replies += 1
        return random.Random(f"{self.config.seed}:{count}")

    def reply(self, text: str) -> Iterator[str]:
        """Yield the reply to what the owner said, piece by piece; both are remembered.

        What was said is stored before the first piece; a reply that is broken off is stored as far
        as it came.
        """
        with self._hush():
            yield from self._turn(text)

    def _turn(self, text: str) -> Iterator[str]:
        memory, rng = self.memory, self._rng()
        self._refresh()
        session = memory.session_id(self.session)
        self._take_in()
        turns = [(m.role, m.text) for m in memory.prompt_messages(session) if m.stage < SUMMED]
        said = memory.add_message(session, "owner", text)
        pieces: List[str] = []
        try:
            for piece in self._answer(text, turns, rng):
                pieces.append(piece)
                yield piece
        finally:
            answer = "".join(pieces).strip()
            self.last_ids = (said, memory.add_message(session, "self", answer))
            self.last = (self.last or Reply("", "nothing"))._replace(text=answer)
            self._after_turn(session)
            whole = completed(text, turns)
            if whole:
                self._remember(whole, "chat", session)

    def _answer(self, text: str, turns: Sequence[Tuple[str, str]],
                rng: random.Random) -> Iterator[str]:
        """Yield the answer's pieces and note in self.last where they come from."""
        rejected = self.memory.setting("rejected", [])
        said = {words for _, words in turns[-2 * FRESH_EXCHANGES:]}
        of_late = self.memory.newest_messages(self.memory.session_id(self.session), LATE_MESSAGES)
        self._said = {words for role, words in (*turns, *of_late) if role == "self"}
        sure, fits = recollection(self.memory, text, rng, self.config.recall_score, rejected)
        self._fits, self._near = fits, [fit.entry for fit in fits if fit.score > 0.0]
        factual = asks_for_a_fact(text) or names_something(text)
        if sure and not (is_exchange(sure.entry) and not factual and self.trusts_model()):
            yield from self._recalled(sure)
            return
        if factual:  # what nobody told, nobody can know
            self.last = Reply("", "nothing")
            yield silence(self.memory, text, rejected, said)
            return
        spoken_any = False
        if self.trusts_model():
            self.last = Reply("", "model")
            fitting = [fit.entry for fit in fits if fit.score >= WEAK_SCORE]
            for piece in self._model_pieces(text, turns, fitting, rng, rejected, sure):
                spoken_any = True
                yield piece
        if not spoken_any and fits and fits[0].score >= WEAK_SCORE and is_exchange(fits[0].entry):
            yield from self._recalled(fits[0])
        elif not spoken_any:
            self.last = Reply("", "nothing")
            yield silence(self.memory, text, rejected, said)

    def _recalled(self, fit: Recall) -> Iterator[str]:
        self.last = Reply("", "memory", fit.entry, fit.score)
        yield from re.findall(r"\S+\s*", fit.answer)

    def _model_pieces(self, text: str, turns: Sequence[Tuple[str, str]], fitting: Sequence[Entry],
                      rng: random.Random, rejected: Container[str] = (),
                      sure: Optional[Recall] = None) -> Iterator[str]:
        """Yield the best of some drafts, and note what moved it; nothing if none is worth it."""
        drafts = [draft for draft in self._drafts(text, turns, fitting, rng, sure)
                  if draft.text and rejection(text, draft.text) not in rejected]
        best = max(drafts, key=attrgetter("worth"), default=None)
        if best is None or best.worth < 0.0 and not sure:
            return
        if best.fit is not None:
            self.trace, self.last = None, Reply("", "memory", best.fit.entry, best.fit.score)
        elif self.trace:
            self.trace.tokens = list(best.tokens)
        yield from re.findall(r"\S+\s*", best.text)

    def _drafts(self, text: str, turns: Sequence[Tuple[str, str]], fitting: Sequence[Entry],
                rng: random.Random, sure: Optional[Recall] = None) -> Iterator[Draft]:
        """Yield what could be said to a text: words of exchanges; the voice's, if none is sure."""
        tokenizer, model, counts = self.tongue_for(f"H: {text}\nA:")
        ids = whole_prompt_ids(tokenizer, self.summary(), fitting, turns, text,
                               self.prompt_budget())
        judge = self._judge_of(text, ids, tokenizer, model.speaker(ids))
        if self.config.mix:
            yield from self._from_exchanges(text, judge, sure)
        if sure:
            return
        sources = self._sources(text, tokenizer)
        mixture = self.mixture((words for _, words in sources), counts, EAGER)
        self.trace = Trace(model, tokenizer, ids, sources) if mixture else None
        for _ in range(DRAFTS if self.engine.name == "native" else INTERPRETED_DRAFTS):
            said: List[Said] = []
            words = "".join(spoken(model, tokenizer, ids, self.config, rng, ("\n",), mixture, said))
            for part, worth in judge(words.strip()):
                yield Draft(part, worth, said)

    def _from_exchanges(self, text: str, judge: Callable[[str], Iterable[Tuple[str, float]]],
                        sure: Optional[Recall]) -> Iterator[Draft]:
        """Yield answers of exchanges, beginnings of them, and those with another question behind.

        One that is sure to fit is not cut short, and has only its equals beside it; but all that
        fit are, where it was said of late. A judge that has no time to read prefers nothing new.
        """
        least, native = LEAST_FIT, self.engine.name == "native"
        if sure:
            least = WEAK_SCORE if self._was_said(sure.answer) else sure.score - NEAR_SCORE
        fits = [fit for fit in self._fits if is_exchange(fit.entry) and fit.score >= least]
        for fit in fits[:MOST_FITS]:
            for part, worth in judge(fit.answer):
                if not sure or part == fit.answer:
                    yield Draft(part, worth + FITTING * fit.score, (), fit)
        for fit in grafted(self.memory, text, fits[:MOST_FITS], not (sure or asks(text))):
            *_, (part, worth) = judge(fit.answer)
            yield Draft(part, worth + NOVEL * native + FITTING * fit.score, (), fit)

    def _was_said(self, reply: str) -> bool:
        """Return whether a reply was said of late, but for what it asks back."""
        return any(words.startswith(told_of(reply) or reply) for words in self._said)

    def _judge_of(self, text: str, ids: Sequence[int], tokenizer: EvolvingTokenizer, model: GPT
                  ) -> Callable[[str], Iterator[Tuple[str, float]]]:
        """Return the function that tells what the beginnings of a reply to the text are worth.

        What is worth less than 0 is better left unsaid.
        """
        memory, bare = self.memory, [END_OF_TEXT, *tokenizer.encode("A:")]
        topic = topic_of(memory, text, search(memory, text))
        borrowed = borrowed_stems(text, self._near or ())
        may_lack = self._may_lack(text, tokenizer)
        asked = set(folded_words(text))
        compiled = model.engine.name == "native"  # else there is no time to read it all again
        seen: Dict[str, bool] = {}

        def known(word: str) -> bool:
            if word not in seen:
                seen[word] = word in asked or bool(memory.ids_holding([[word]], 1))
            return seen[word]

        def worths(reply: str) -> Iterator[Tuple[str, float]]:
            parts = beginnings(reply)
            flows = [0.0] * len(parts)
            if compiled:
                flows = flows_of(model, ids, bare, tokenizer.encode(f" {reply}\n"),
                                 [len(tokenizer.encode(f" {part}")) for part in parts])
            for part, flow in zip(parts, flows):
                stems = _content(part)
                close = log(1.0 + sum(topic.get(stem, 0.0) for stem in stems - borrowed))
                yield part, (may_lack + flow + TOPIC * close - BORROWED * len(stems & borrowed)
                             - form_of(part, known)
                             - SAID_AGAIN * (self._was_said(part) + (part in self._said)))
        return worths

    def _may_lack(self, said: str, tokenizer: EvolvingTokenizer) -> float:
        """Return what a draft may lack and still be said, in nats a token, as boldness has it."""
        texts = [entry.text for entry in self._near or ()] or [said]
        bpc, ids = self._speaking_growth().bpc, sum(len(tokenizer.encode(text)) for text in texts)
        if not ids or bpc is None or not self.config.mix:
            return math.inf
        return self.config.boldness * bpc * log(2.0) * sum(map(len, texts)) / ids

    def _sources(self, text: str,
                 tokenizer: EvolvingTokenizer) -> List[Tuple[Entry, List[int]]]:
        """Return the entries that a reply to the text may copy from, and their ids."""
        if not self.config.mix:
            return []
        near = search(self.memory, text, COPIED_ENTRIES) if self._near is None else self._near
        found = list({entry.id: entry for entry in near}.values())[:COPIED_ENTRIES]
        return [(e, document_ids(tokenizer, e.text)[:COPIED_IDS]) for e in found]

    def prompt_budget(self) -> int:
        """Return the most tokens of a prompt; the rest of the window is for the reply."""
        return max(8, self.config.block_size * 3 // 4)

    def summary(self) -> List[Message]:
        """Return the messages that stand for the old turns of the session."""
        said = self.memory.prompt_messages(self.memory.session_id(self.session))
        return [m for m in said if m.stage == SUMMED]

    def _take_in(self) -> None:
        """Make entries of what the owner said, also of what a crash left lying, as of then."""
        with self.memory.transaction():
            heard = self.memory.heard_messages()
            for m in heard:
                if m.role == "owner":
                    self._remember(m.text, "chat", m.session_id, holds_statements(m.text),
                                   m.said_at)
            self.memory.advance_messages([m.id for m in heard], KEPT)

    def _after_turn(self, session: int) -> None:
        """Take in what was said; compact the session when its turns outgrow their shares."""
        tokenizer = self.voice()[0] if self.trusts_model() else EvolvingTokenizer()
        room = self.prompt_budget() * (SHARE - 1) // SHARE
        with self.memory.transaction():
            self._take_in()
            exchanges = exchanges_of(m for m in self.memory.prompt_messages(session)
                                     if m.stage < SUMMED)
            if turns_to_keep(tokenizer, exchanges, room) < len(exchanges):
                self.compact(session, turns_to_keep(tokenizer, exchanges, room // 2))

    def compact(self, session: int, keep: int = 1) -> int:
        """Put all but the newest exchanges into the summary; return how many turns that were.

        One transaction, in which the facts come first: what is not an entry is not summed up. The
        messages themselves stay as they are.
        """
        memory = self.memory
        with memory.transaction():
            self._take_in()
            said = memory.prompt_messages(session)
            turns = exchanges_of(m for m in said if m.stage < SUMMED)
            old = turns[:max(0, len(turns) - keep)]
            before = exchanges_of(m for m in said if m.stage == SUMMED)
            room = self.prompt_budget() // SHARE * CHARS_A_TOKEN
            parts = summary_of(memory, before + old, room)
            chosen = {m.id for part in parts for m in part}
            leaving = {m.id for exchange in before + old for m in exchange}
            memory.advance_messages(chosen, SUMMED)
            memory.advance_messages(leaving - chosen, ARCHIVED)
        return sum(map(len, old))

    def _remember(self, text: str, source: str, session: Optional[int],
                  recall: bool = True, told_at: Optional[float] = None) -> None:
        lines = [piece for line in text.splitlines()
                 for piece in split_long_line(line, self.config.max_line_chars)]
        if lines:
            self.memory.add_entry(source, Document(tuple(lines), True), session, recall,
                                  told_at=told_at)
            # a burst begins anew with new text: were talk to do that, it might never end
            if source != "chat" or not self.at_work or self.growth.phase != "grown":
                self._text_version += 1
                self._rouse()

    def teach(self, text: str) -> None:
        """Remember a sentence as a fact, and learn it soon."""
        self._remember(text, "taught", self.memory.session_id(self.session))

    def judge(self, good: bool) -> bool:
        """Approve or reject the last reply; an approved one becomes text to learn from."""
        said, answered = self.last_ids
        if not answered or self.last is None:
            return False
        asked, answer = self.memory.message_texts((said, answered))
        sign = rejection(asked, answer)
        rejected = [other for other in self.memory.setting("rejected", []) if other != sign]
        with self.memory.transaction():
            self.memory.judge(answered, 1 if good else -1)
            self.memory.set_setting("rejected", rejected if good else [*rejected, sign])
            if not good:
                self.memory.remove_entries("approved", [self._exchange(asked, answer).key])
        if good:
            self.memory.add_entry("approved", self._exchange(asked, answer))
            self._text_version += 1
            self._rouse()
        return True

    def _exchange(self, asked: str, answer: str) -> Document:
        limit = self.config.max_line_chars
        lines = tuple(clean_line(f"{marker}: {' '.join(words.split())}", limit)
                      for marker, words in (("H", asked), ("A", answer)))
        return Document(lines, True)

    # growing

    def grow(self, wanted: Shape) -> None:
        """Enlarge the model to the wanted size; it says just the same, and is to warm up again.

        Raises ConfigError when that cannot be, TrainerError while another process trains it.
        """
        memory = self.memory
        if not memory.take_lease(self._owner, LEASE_SECONDS, holder_alive):
            raise TrainerError("another macrogpt trains this memory; leave that one first")
        if memory.setting("old_growth"):
            raise TrainerError("the model is being rebuilt without what was forgotten, and cannot "
                               "grow meanwhile; run `train` with the size it has, then grow it")
        with memory.transaction():
            shape, grown = enlarged_layers(self.config, wanted, memory.layers(), self.engine)
            differences = what_grew(Shape.of(self.config), shape)
            memory.remove_layers({"best", "optimizer", "sprout", *grown})
            memory.save_layers(grown)
            memory.set_setting("shape", dataclasses.asdict(shape))
            memory.set_setting("growth", dataclasses.asdict(to_warm_up(
                Growth(**memory.setting("growth", {})))))
            memory.set_setting("next_shape", None)
            memory.log("grew", **differences)
        if self._thread is None:
            memory.drop_lease(self._owner)
        self._refresh()
        self._tell("the model has grown: " + ", ".join(
            f"{name} {old:g} → {new:g}" for name, (old, new) in differences.items()))

    def _propose_growth(self) -> None:
        """Note in the life log, after a warm-up, that the text is too much for the model."""
        size = sum(rows * dim for _, rows, dim in self.memory.manifests()["base"])
        if has_outgrown(self.growth, size):
            shape = Shape.of(self.config)
            larger = what_grew(shape, shape.next_size())
            self.memory.set_setting("next_shape", dataclasses.asdict(shape.next_size()))
            self.memory.log("outgrown", train_bpc=self.growth.train_bpc, bpc=self.growth.bpc,
                            chars=self.growth.warmup_chars, parameters=size, proposed=larger)

    def _next_shape(self) -> Optional[Shape]:
        """Return the size to which the model is to grow by itself, if it is."""
        proposed = self.memory.setting("next_shape") if self.config.auto_grow else None
        return Shape(**proposed) if proposed and not self.memory.setting("old_growth") else None

    # unlearning

    def _layer_number(self) -> int:
        """Return the number of the first layer that may train on text sent now, as for Memory."""
        deltas = delta_names(self.memory.manifests())
        if self.growth.phase != "grown":
            return 0
        if not deltas or delta_is_full(self.growth, self.config):
            return self.growth.delta_serial + 1
        return int(deltas[-1][5:]) + 1

    def _first_to_unlearn(self) -> Optional[int]:
        """Return the number of the first layer to be rebuilt, when it is time for that.

        Corrected lines are collected, lest every slip of the pen cost a warm-up; whatever else is
        gone waits only for some quiet, and for none where somebody waits for it.
        """
        rows, config = self.memory.to_unlearn(), self.config
        patient = sum(chars for _, chars, corrected in rows if corrected)
        if patient < max(1, config.unlearn_corrected_chars):
            rows = [row for row in rows if not row[2]]
        if rows != self._to_unlearn:
            self._to_unlearn, self._unlearn_since = rows, time.monotonic()
        quiet = time.monotonic() - self._unlearn_since >= config.unlearn_seconds
        hurry = self.in_step or self._order["force"]
        return min(layer for layer, _, _ in rows) if rows and (quiet or hurry) else None

    def _unlearn(self, first: int) -> None:
        """Take away the layers from this number on, in one transaction; what is left is learned.

        A delta is gone at once. Of the base, the old one speaks until another has grown up.
        """
        memory = self.memory
        with memory.transaction():
            texts, growth = memory.to_unlearn(), Growth(**memory.setting("growth", {}))
            names = memory.manifests()
            deltas, name = delta_names(names), f"delta{first - 1}"
            if first > growth.delta_serial:  # it was never begun
                memory.unlearn_from(first)
                return
            if name in deltas:
                rebuilt = deltas[deltas.index(name):]
                memory.remove_layers({"optimizer", "sprout", *rebuilt})
                self._forget_routes(len(deltas) - len(rebuilt))
                growth.delta_chars = self.config.delta_seal_chars  # those before are sealed
                growth.delta_serial += 1  # and whoever speaks elsewhere notices
            else:
                rebuilt, first = ["base", *deltas], 0
                self._set_aside(names, growth)
                growth = Growth(step=growth.step, tokens=growth.tokens,
                                delta_serial=growth.delta_serial)
            memory.unlearn_from(first)
            memory.set_setting("growth", dataclasses.asdict(growth))
            done = {"layers": rebuilt, "texts": len(texts), "chars": sum(row[1] for row in texts)}
            memory.set_setting("unlearning", done)
            memory.log("unlearning", **done)
        self._refresh()
        self._end_unlearning()

    def _forget_routes(self, deltas: int) -> None:
        """Let the router know the first deltas alone, and nothing of the text of those after."""
        routes = self.memory.layers().get("router")
        if routes is not None:
            kept = load_router(EvolvingTokenizer(), routes, deltas)
            self.memory.save_layers({"router": pack_router(kept)})

    def _set_aside(self, names: Iterable[str], growth: Growth) -> None:
        """Keep the layers as the old ones that speak, if there is text for others to learn."""
        memory = self.memory
        weights = {n for n in names if n not in ("tokenizer", "ngrams") and not n.startswith(OLD)}
        aside = any(name.startswith(OLD) for name in names)
        if not aside and "base" in weights and memory.entries("NOT held_out", limit=1):
            kept = sorted(weights - {"optimizer"} | {"tokenizer"})
            memory.copy_layers({name: OLD + name for name in kept})
            memory.set_setting("old_growth", dataclasses.asdict(growth))
        memory.remove_layers(weights)

    def _end_unlearning(self) -> None:
        """Say in the life log that nothing is left of what was to be unlearned."""
        memory = self.memory
        done, left = memory.setting("unlearning"), memory.entries("NOT held_out", limit=1)
        if done and not (any(memory.unlearned_chars()) or left and self.growth.phase != "grown"):
            with memory.transaction():
                memory.set_setting("unlearning", None)
                memory.log("unlearned", **done)

    # learning

    def awake(self) -> None:
        """Start the thread that watches and learns, unless it runs."""
        if self._thread is not None:
            return
        self.stopping = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True)
        self._thread.start()

    def sleep(self) -> None:
        """Commit what the trainer has and end the thread."""
        self.stopping = True
        self._rouse()
        if self._thread is not None:
            self._thread.join(15.0)
            self._thread = None
        with contextlib.suppress(StoreError):  # what is not kept is counted anew at the next start
            self._entry_counts.keep(self.memory)

    def learn_now(self, steps: Optional[int] = None, seconds: Optional[float] = None) -> None:
        """Learn everything there is, now, however little; or train for so many steps or seconds."""
        self._order = {"force": True, "steps": steps, "seconds": seconds}
        self._rouse()

    def wait_trained(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Return when nothing is left to learn.  Raises TrainerError when that cannot be."""
        self.learn_now()
        self.wait_order(on_tick)

    def wait_order(self, on_tick: Callable[[], None] = lambda: None) -> None:
        """Return when the order of learn_now is done.  Raises TrainerError when it cannot be."""
        while True:
            with self.changed:
                if self.failed:
                    raise TrainerError("; ".join(self.notices) or
                                       "the trainer failed again and again; see --debug")
                if self.read_once.is_set() and not self.at_work and not self._order["force"]:
                    return
                self.changed.wait(0.1)
            on_tick()

    def wait_rest(self) -> None:
        """Return when all that is due has been learned: then what comes next finds it at rest.

        So a life depends on the order of its events and not on when they came.
        """
        self.in_step = True
        with contextlib.suppress(CorpusError):  # the watcher tells of it
            self.take_in_corpus()
        self._rouse()
        while self._thread is not None and not (self.failed or self.barred):
            with self.changed:
                # in this order: what is operated on is to be learned again, and then is at work
                if not self._operation_due() and self._plan() is None and not self.at_work:
                    return
                self.changed.wait(0.1)

    def _rouse(self) -> None:
        """Wake the background thread, from any thread."""
        self._call_there(lambda: self._bell.set())

    def _call_there(self, call: Callable[[], None]) -> None:
        """Have something called by the background thread, if it runs; from any thread."""
        loop = self._loop
        if loop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call)

    @contextlib.contextmanager
    def _hush(self) -> Iterator[None]:
        """Let the trainer rest meanwhile: who speaks has the machine to himself."""
        child = self._child if self.at_work else None

        def tell(what: str) -> None:
            if child is not None and child is self._child:
                self._send(child, {"do": what}, {})
        self._call_there(lambda: tell("rest"))
        try:
            yield
        finally:
            self._call_there(lambda: tell("go on"))

    async def _live(self) -> None:
        """Run the watcher and the trainer's supervisor until told to stop."""
        self._loop, self._bell = asyncio.get_running_loop(), asyncio.Event()
        self._bell.set()  # an order may have been given before there was a bell
        watcher = asyncio.ensure_future(self._watch_corpus())
        try:
            await self.background_trainer()
        except MacroGPTError as error:
            self._tell(f"learning has ended: {error}")
            with self.changed:
                self.failed = True
                self.changed.notify_all()
        finally:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher
            self._loop = None

    async def _watch_corpus(self) -> None:
        """Take in the corpus whenever its file has changed and has come to rest."""
        before: Optional[FileStamp] = None
        while not self.stopping:
            stamp = file_stamp(self.config.corpus_path)
            changed = stamp is not None and stamp != self._stamp
            if changed and (stamp == before or not self.read_once.is_set()):
                try:
                    await asyncio.to_thread(self.take_in_corpus)
                except MacroGPTError as error:
                    self._tell(str(error))
                    if isinstance(error, StoreError):  # the file is to be read again
                        self._stamp = None
                changed = False
                self._bell.set()
            before = stamp
            self.read_once.set()
            await asyncio.sleep(0.1 if changed else self.config.tick_seconds)
            with contextlib.suppress(MacroGPTError):
                if self._operation_due():
                    self._bell.set()
                if self.trusts_model() and self.config.mix:  # so that no reply has to wait for it
                    await asyncio.to_thread(self._count_ahead)

    def _tell(self, notice: str) -> None:
        """Keep a notice for the owner's next prompt, once."""
        if notice not in self.notices:
            self.notices.append(notice)

    def _plan(self) -> Optional[Dict[str, Any]]:
        """Return the job that is due: None, or the steps and seconds to learn for."""
        order, memory = self._order, self.memory
        job = {"steps": order["steps"], "seconds": order["seconds"]}
        if self.only_orders and not order["force"]:
            return None
        if not memory.entries("NOT held_out", limit=1):
            return None
        growing = self.growth.phase != "grown" or self.growth.enlarged
        if growing or order["steps"] or order["seconds"]:
            return job
        corpus, said = memory.unlearned_chars()
        soon = order["force"] or self.memory.setting("unlearning")
        if corpus or said >= self.config.min_new_chars_to_train or (said and soon):
            return job
        return self._dream()

    def _dream(self) -> Optional[Dict[str, Any]]:
        """Return a short job of replay when nothing has happened for long enough, or None."""
        idle, now = self.config.dream_seconds, self.memory.clock()
        if not idle or self.only_orders or self.at_work or now - self._rested_at < idle:
            return None
        return {"steps": self.config.micro_steps, "seconds": None} if on_mains() else None

    async def background_trainer(self) -> None:
        """Start the trainer when there is something to learn; restart it when it dies."""
        failures = 0
        while not self.stopping:
            await self._rest(LISTEN_SECONDS if self.barred else
                             (self.config.dream_seconds or None) if self.read_once.is_set()
                             else 0.05)
            if not self.read_once.is_set():  # an order given before the first reading stands
                continue
            step = self.growth.step
            try:
                if self._may_learn():
                    self._operate()
                    await self._raise_child()
                    self._bell.set()
            except (TrainerError, StoreError, OSError, asyncio.IncompleteReadError) as error:
                failures = failures + 1 if self.growth.step == step else 1
                self._mourn(error, failures)
                await self._rest(min(60.0, 0.5 * 2 ** failures))
                self._bell.set()
        with contextlib.suppress(StoreError):
            self.memory.drop_lease(self._owner)

    def _may_learn(self) -> bool:
        """Return whether there is something to learn, and the lease to learn it is ours."""
        self._refresh()
        order = self._order
        due = self._plan() is not None or self._operation_due()
        self.barred = due and not self.memory.take_lease(
            self._owner, LEASE_SECONDS, holder_alive)
        if self.barred:
            self._tell("another macrogpt trains this memory; here it only listens")
        if self.barred or not due:
            self._settle(order)
        return due and not self.barred

    def _operation_due(self) -> bool:
        """Return whether the stored layers are to be changed while no trainer works on them."""
        return self._first_to_unlearn() is not None or self._next_shape() is not None

    def _operate(self) -> None:
        """Change the stored layers as is due."""
        first = self._first_to_unlearn()
        if first is not None:
            self._unlearn(first)
        shape = self._next_shape()
        if shape is not None:
            self.grow(shape)

    async def _rest(self, seconds: Optional[float]) -> None:
        """Sleep until the bell rings, and at most so many seconds."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._bell.wait(), seconds)
        self._bell.clear()

    def _settle(self, order: Dict[str, Any]) -> None:
        """Note that nothing is left to do; an order given since then stands."""
        with self.changed:
            self.at_work = False
            if self._order is order:
                self._order = dict(NO_ORDER)
            self.changed.notify_all()

    def _mourn(self, error: Exception, failures: int) -> None:
        """Tell and log that the trainer died; after five deaths in a row, call it hopeless."""
        self._tell(f"the trainer stopped ({error}); it starts again from the last commit")
        with contextlib.suppress(StoreError):
            self.memory.log("trainer died", error=str(error))
        with self.changed:
            self.failed = failures >= 5
            self.changed.notify_all()

    async def _raise_child(self) -> None:
        """Start a trainer and work with it until it is told to stop.  Raises when it dies."""
        debug = None if os.environ.get("MACROGPT_DEBUG") else asyncio.subprocess.DEVNULL
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CHILD_CODE, os.path.abspath(__file__),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=debug,
            start_new_session=os.name == "posix")
        self._child = child
        listener = asyncio.ensure_future(self._listen(child))
        self._child_text_version, self._child_ready = 0, False
        layers = self.memory.layers()
        layers = {n: layer for n, layer in layers.items()  # the trainer counts for itself
                  if n != "ngrams" and not n.startswith(OLD)}
        try:
            self._send(child, {"do": "start", "config": dataclasses.asdict(self.config),
                               "growth": dataclasses.asdict(self.growth),
                               "layers": {n: [l.manifest, l.sealed] for n, l in layers.items()}},
                       {name: layer.data for name, layer in layers.items()})
            while not (self.stopping or self._operation_due()):
                self._instruct(child)
                bell = asyncio.ensure_future(self._bell.wait())
                pause = min(LEASE_SECONDS / 2, self.config.dream_seconds or math.inf)
                await asyncio.wait({bell, listener}, timeout=pause,
                                   return_when=asyncio.FIRST_COMPLETED)
                bell.cancel()
                self._bell.clear()
                self.memory.take_lease(self._owner, LEASE_SECONDS, holder_alive)
                if listener.done():
                    listener.result()
                    raise TrainerError(f"its process ended with code {await child.wait()}")
        finally:
            await self._dismiss(child, listener)

    def _send(self, child: Any, message: Dict[str, Any], blobs: Dict[str, bytes]) -> None:
        child.stdin.write(pack_frame(message, blobs))

    def _instruct(self, child: Any) -> None:
        """Give the child the newest text and the job that is due, when either is new."""
        order, job = self._order, self._plan()
        ordered = order["steps"] or order["seconds"]
        if job is None:
            self._settle(order)
        elif self._child_text_version != self._text_version or (ordered and not self.at_work):
            self._child_text_version = self._text_version
            entries = self.memory.entries("1")
            documents = [[e.key, e.text, e.closed, not e.learned, e.source]
                         for e in entries if not e.held_out]
            held = [e for e in entries if e.held_out]
            rejected = self.memory.rejected_exchanges(MOST_REJECTED)
            if rejected:
                self._send(child, {"do": "rejected", "exchanges": rejected}, {})
            self.memory.mark_trained(self._layer_number())
            self._send(child, {"do": "text", "documents": documents,
                               "held_out": "\n".join(e.text for e in held),
                               "probes": probe_texts(held, self.memory.probe_epochs())}, {})
            self._send(child, {"do": "learn", **job}, {})
            self.at_work = True

    async def _listen(self, child: Any) -> None:
        """Take in every frame of the child until its pipe closes."""
        while True:
            try:
                lengths = await child.stdout.readexactly(FRAME_HEAD.size)
            except asyncio.IncompleteReadError:
                return
            head, body = FRAME_HEAD.unpack(lengths)
            message, blobs = unpack_frame(await child.stdout.readexactly(head),
                                          await child.stdout.readexactly(body))
            getattr(self, "_on_" + message.pop("kind"))(blobs, **message)

    def _on_reading(self, blobs: Dict[str, bytes], **message: Any) -> None:
        self.memory.log("learning", **message)

    def _on_progress(self, blobs: Dict[str, bytes], **message: Any) -> None:
        with self.changed:
            self.progress = message
            self.changed.notify_all()

    def _on_trouble(self, blobs: Dict[str, bytes], **message: Any) -> None:
        self._tell(f"step {message['step']} gave a loss of {message['loss']} and was skipped; "
                   f"a lower learning_rate may help")
        self.memory.log("step skipped", **message)

    def _on_ready(self, blobs: Dict[str, bytes], notices: List[str]) -> None:
        self._child_ready = True
        for notice in notices:
            self._tell(notice)

    def _on_failed(self, blobs: Dict[str, bytes], error: str) -> None:
        raise TrainerError(error)

    def _on_snapshot(self, blobs: Dict[str, bytes], growth: Dict[str, Any], learned: List[int],
                     names: List[str], layers: Dict[str, List[Any]]) -> None:
        """Commit a generation of weights, with all that belongs to it, in one transaction."""
        memory = self.memory
        given = {n: Layer(manifest, blobs[n], sealed) for n, (manifest, sealed) in layers.items()}
        with memory.transaction():
            memory.save_layers(given)
            memory.remove_layers(self._superfluous(names, growth["phase"] == "grown"))
            memory.set_setting("growth", growth)
            memory.set_setting("shape", dataclasses.asdict(Shape.of(self.config)))
            deltas = delta_names(names)
            memory.mark_learned(learned, int(deltas[-1][5:]) + 1 if deltas else 0)
            note_probes(memory, growth["step"], growth["probes"])
            memory.add_progress(growth["step"], growth["tokens"], self.progress.get("loss"),
                                growth["bpc"])
            if growth["phase"] != self.growth.phase:
                memory.log("phase", phase=growth["phase"], step=growth["step"], bpc=growth["bpc"])
            if growth["ripening"] > self.growth.ripening:
                memory.log("merges sprout", count=growth["ripening"])
            if growth["ripeness"] is not None and growth["merges"] > self.growth.merges:
                memory.log("vocabulary grew", merges=growth["merges"], worst=growth["ripeness"])
        warm = growth["train_bpc"] != self.growth.train_bpc  # a warm-up has ended
        with self.changed:
            self.growth, self._voice_old = Growth(**growth), True
            self.changed.notify_all()
        if warm:
            self._propose_growth()

    def _superfluous(self, names: List[str], grown: bool) -> Set[str]:
        """Return the stored layers that nobody needs beside those named; grown up, the old go."""
        others = set(self.memory.manifests()) - {*names, "ngrams"}
        if grown:
            self.memory.set_setting("old_growth", None)
            return others
        return {name for name in others if not name.startswith(OLD)}

    def _on_note(self, blobs: Dict[str, bytes], note: Dict[str, Any]) -> None:
        self.memory.log(note.pop("kind"), **note)

    def _on_done(self, blobs: Dict[str, bytes]) -> None:
        self.memory.log("learned", step=self.growth.step, bpc=self.growth.bpc)
        self._end_unlearning()
        if self._order["steps"] or self._order["seconds"]:
            self._order = dict(NO_ORDER)
        self._rested_at = self.memory.clock()
        with self.changed:
            self.at_work = False
            self.changed.notify_all()
        self._child_text_version = 0
        self._bell.set()

    async def _dismiss(self, child: Any, listener: "asyncio.Future[None]") -> None:
        """Ask the child for what it has not yet sent, take it in, and see it go."""
        self._child = None
        with contextlib.suppress(OSError, RuntimeError):
            if not self._child_ready:  # it is still compiling, and has learned nothing
                child.terminate()
            self._send(child, {"do": "stop"}, {})
            child.stdin.close()
        with contextlib.suppress(asyncio.TimeoutError, MacroGPTError):
            await asyncio.wait_for(asyncio.shield(listener), 10.0)
        try:
            await asyncio.wait_for(child.wait(), 2.0)
        except asyncio.TimeoutError:  # a kill reaps the process, which its watcher should do
            child.kill()
            await child.wait()
        with self.changed:
            self.at_work = False
            self.changed.notify_all()


def what_grew(old: Shape, new: Shape) -> Dict[str, Tuple[float, float]]:
    """Return what differs between two shapes, as it was and as it is."""
    was, now = dataclasses.asdict(old), dataclasses.asdict(new)
    return {name: (was[name], now[name]) for name in was if was[name] != now[name]}


def on_mains(folder: str = "/sys/class/power_supply") -> bool:
    """Return whether the machine is on mains power, as far as it says: True if it has no plug."""
    plugs = []
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError), open(os.path.join(folder, name, "online")) as file:
                plugs.append(file.read().strip() == "1")
    return any(plugs) or not plugs


def holder_alive(owner: str) -> bool:
    """Return whether the process "host:pid" may still be alive."""
    host, _, pid = owner.rpartition(":")
    if host != socket.gethostname() or os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


# ──────────────────────────────────────────────────────────────────────────────────────
# 17 · INTERFACE — it alone speaks to a terminal   uses: 0 1 2 4 7 8 9 10 11 12 13 14 15 16
# ──────────────────────────────────────────────────────────────────────────────────────
#
# Replies and reports go to stdout; everything else goes to stderr. A table of commands, each a
# function of an App; an owner's mistake is one line and an exit code.

BANNER = "macrogpt {version} — {engine} engine, {params} parameters, {phase}. /help for commands."
HINT_LEAVE = "Ctrl+C again, Ctrl+D or /exit leaves."
REPL_HELP: Tuple[Tuple[str, str], ...] = (
    ("/help", "this list"), ("/stats", "how large, how old, how good it is"),
    ("/memory TEXT", "search the memory"), ("/why", "where the last reply came from"),
    ("/good, /bad", "approve or reject the last reply"), ("/teach TEXT", "remember a sentence"),
    ("/forget TEXT", "forget what was told, by id or words"),
    ("/session [NAME]", "show or change the session"), ("/sessions", "list the sessions"),
    ("/new", "begin a new session"), ("/compact", "put the session's old turns into its summary"),
    ("/set FIELD VALUE", "change a setting"), ("/show [FIELD]", "show the settings"),
    ("/train", "learn now what is still to be learned"), ("/sleep", "stop learning until /train"),
    ("/save", "say that everything is saved"), ("/exit", "leave"))


class Terminal:
    """The two streams, and what the terminal behind them can do."""

    def __init__(self, out: TextIO, err: TextIO, color: str = "auto", quiet: bool = False) -> None:
        self.out, self.err, self.quiet, self._status = out, err, quiet, ""
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        lively = err.isatty() and not plain
        self.colored = color == "always" or (color == "auto" and lively)

    def say(self, text: str, end: str = "\n") -> None:
        """Write to stdout at once."""
        self.out.write(text + end)
        self.out.flush()

    def note(self, text: str) -> None:
        """Write a notice to stderr, unless quiet."""
        if not self.quiet:
            self.err.write(self.dim(text) + "\n")
            self.err.flush()

    def dim(self, text: str) -> str:
        """Return the text, dimmed where colors are shown."""
        return f"\033[2m{text}\033[0m" if self.colored else text

    def status(self, text: str) -> None:
        """Show a line that the next one replaces; only where a terminal can."""
        if not self.quiet and self.err.isatty() and text != self._status:
            width = shutil.get_terminal_size().columns - 1
            self._status = text
            self.err.write("\r" + text[:width].ljust(width))
            self.err.flush()

    def end_status(self) -> None:
        """End the line of status, if there is one."""
        if self._status:
            self._status = ""
            self.err.write("\n")
            self.err.flush()


ENDING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP")
                       if hasattr(signal, name))


class Terminated(BaseException):
    """The process was asked to end by a signal."""


def _raise_terminated(number: int, frame: Any) -> None:
    raise Terminated(number)


GROWING_COMMANDS = ("chat", "ask", "train")


class App:
    """One run of the program: its options, its terminal, and the organism once it is needed."""

    def __init__(self, options: argparse.Namespace, config: Config, terminal: Terminal) -> None:
        self.options, self.config, self.terminal = options, config, terminal
        self._organism: Optional[Organism] = None
        self._memory: Optional[Memory] = None

    def memory(self) -> Memory:
        """Return the store, opened at its first use."""
        if self._memory is None:
            self._memory = Memory(self.config.db_path)
        return self._memory

    def organism(self) -> Organism:
        """Return the organism, brought to life at its first use."""
        if self._organism is None:
            memory = self.memory()
            self.config = stored_config(memory, self.options.assignments)
            engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""))
            born = dataclasses.replace(self.config, **memory.setting("shape", {}))
            self._organism = Organism(born, memory, engine, self.options.session,
                                      self.options.seed is not None)
            grow_as_asked(self._organism, Shape.of(self.config),
                          self.options.command in GROWING_COMMANDS)
            self.config = self._organism.config
        return self._organism

    def close(self) -> None:
        """Put everything to rest; what was learned and said is committed."""
        if self._organism is not None:
            self._organism.sleep()
        if self._memory is not None:
            self._memory.close()

    def report(self, facts: Dict[str, Any], lines: Iterable[str]) -> None:
        """Say the facts as one JSON object, or the lines for people."""
        if self.options.json:
            self.terminal.say(json.dumps(facts, ensure_ascii=False))
        else:
            for line in lines:
                self.terminal.say(line)

    def notices(self) -> None:
        """Show what the background wanted to tell."""
        organism = self._organism
        while organism is not None and organism.notices:
            self.terminal.note(organism.notices.popleft())


def stored_config(memory: Memory, assignments: Sequence[str]) -> Config:
    """Return the defaults, changed by the organism's shape, by what /set stored, by assignments."""
    shape = memory.setting("shape", {})
    if shape and shape["n_ff"] == usual_ff_width(shape["n_embd"]):
        shape["n_ff"] = 0  # it goes on following n_embd
    kept = {**shape, **memory.settings("config.")}
    return Config().replace([*(f"{name}={value}" for name, value in kept.items()), *assignments])


def grow_as_asked(organism: Organism, wanted: Shape, may_grow: bool) -> None:
    """Let the organism grow to the size that the settings ask for.  Raises ConfigError."""
    now = Shape.of(organism.config)
    if wanted == now:
        return
    now.grown_to(wanted)
    name = next(n for n, value in dataclasses.asdict(now).items() if getattr(wanted, n) != value)
    if not may_grow:
        raise ConfigError(f"{name}={getattr(wanted, name)}, but the organism in "
                          f"{organism.config.db_path} has {name}={getattr(now, name)}; it grows "
                          f"with chat, ask or train, or begin another with --db")
    organism.grow(wanted)


def wake(app: App) -> Organism:
    """Return the organism with its corpus read and, unless forbidden, its trainer started."""
    organism = app.organism()
    organism.prepare_corpus()
    if app.options.no_train:
        organism.take_in_corpus()
        organism.read_once.set()
    else:
        organism.awake()
        organism.read_once.wait(0.5)  # a huge corpus is read on beside the first replies
    if app.options.wait_trained and not app.options.no_train:
        bar = ProgressBar(app.terminal)
        organism.wait_trained(lambda: bar.show(organism.progress))
        app.terminal.end_status()
    return organism


class ProgressBar:
    """A line with share, step, loss, held-out bits per character, tokens/s and time left."""

    def __init__(self, terminal: Terminal, clock: Callable[[], float] = time.monotonic) -> None:
        self.terminal, self.clock = terminal, clock
        self.began: Optional[Tuple[float, float]] = None

    def show(self, progress: Dict[str, Any]) -> None:
        """Show what the trainer last said."""
        if progress:
            self.terminal.status(self.line(progress))

    def line(self, p: Dict[str, Any], cells: int = 12) -> str:
        """Return the bar for a progress message of the trainer."""
        filled = int(p["share"] * cells)
        loss, bpc = ("–" if p[name] is None else f"{p[name]:.3f}" for name in ("loss", "bpc"))
        return (f"{p['phase']} {'█' * filled}{'·' * (cells - filled)} {p['share']:4.0%}  step "
                f"{p['step']}  loss {loss}  held-out {bpc}  {p['tokens_per_s']:.0f} tokens/s"
                f"{self._time_left(p['share'])}")

    def _time_left(self, share: float) -> str:
        now = self.clock()
        if self.began is None or share < self.began[1]:
            self.began = (now, share)
        gained = share - self.began[1]
        return f"  {duration((now - self.began[0]) / gained * (1 - share))} left" if gained else ""


def duration(seconds: float) -> str:
    """Return seconds as people say them: 42 s, 5 min 03 s, 2 h 05 min."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole // 60 % 60:02} min"


# commands

LONGEST_MESSAGE = 1_000_000  # characters; what goes on beyond is cut


def command_chat(app: App, words: List[str]) -> int:
    """Talk: a prompt in a terminal, one line for one line in a pipe."""
    if words:
        raise UsageError(f"chat takes no words, found {words[0]!r}; use: ask {' '.join(words)}")
    if sys.stdin is None or not sys.stdin.isatty():
        return _chat_piped(app)
    return _chat_terminal(app)


def _chat_piped(app: App) -> int:
    """Answer each line of stdin with exactly one line; a command gives one line or none."""
    wake(app)
    code = 0
    settled = app.organism().wait_rest if app.options.wait_trained else lambda: None
    for raw in iter(sys.stdin.buffer.readline, b"") if sys.stdin else ():
        line = clean_line(decode_line(raw), LONGEST_MESSAGE)
        try:
            settled()  # edits made before these words come before them
            if line.startswith("/"):
                said = " ".join(" ".join(repl_command(app, line)).split())
                settled()
                if said:
                    app.terminal.say(said)
            else:
                said = " ".join("".join(app.organism().reply(line)).split())
                settled()
                app.terminal.say(said)
            app.notices()
        except EOFError:
            break
        except MacroGPTError as error:  # only words that could not be kept spoil the end
            code = max(code, int(isinstance(error, StoreError)))
            _tell_error(app.terminal, error)
            app.terminal.say("")
    return code


def _chat_terminal(app: App) -> int:
    """Read, reply, and stream, until the owner leaves."""
    prepare_readline(app)
    organism = wake(app)
    phase = {"grown": "grown up", "warmup": "still in its warm-up"}.get(
        organism.growth.phase, "newborn")
    app.terminal.note(BANNER.format(version=__version__, engine=organism.engine.name,
                                    params=f"{model_size(organism)[0]:,}", phase=phase))
    interrupted = False
    while True:
        app.notices()
        try:
            line = read_block("you> ")
            interrupted = False
        except EOFError:
            app.terminal.err.write("\n")
            return 0
        except KeyboardInterrupt:
            app.terminal.err.write("\n")
            if interrupted:
                return 130
            interrupted = True
            app.terminal.note(HINT_LEAVE)
            continue
        try:
            if line.startswith("/"):
                for text in repl_command(app, line):
                    app.terminal.say(text)
            elif line:
                _stream_reply(app, line)
        except EOFError:
            return 0
        except MacroGPTError as error:
            _tell_error(app.terminal, error)


def _stream_reply(app: App, line: str) -> None:
    """Show the reply as it comes; Ctrl+C stops it, and what was said so far is kept."""
    pieces = app.organism().reply(line)
    try:
        app.terminal.say(app.terminal.dim("  »") + " ", end="")
        for piece in pieces:
            app.terminal.say(piece, end="")
    except KeyboardInterrupt:
        app.terminal.say(" …", end="")
    finally:
        pieces.close()  # type: ignore[attr-defined]
        app.terminal.say("")


def read_block(prompt: str) -> str:
    """Return one line from the terminal, or the several between two lines of three quotes."""
    line = input(prompt)
    if line.strip() != '"""':
        return tidied(line).strip()
    lines = []
    while True:
        line = input("...> ")
        if line.strip() == '"""':
            return "\n".join(lines).strip()
        lines.append(tidied(line))


def prepare_readline(app: App) -> None:
    """Give the prompt arrow keys and a private history, where the library is there."""
    try:
        import atexit
        import readline
    except ImportError:
        return
    path = os.path.expanduser("~/.macrogpt_history")
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        os.chmod(path, 0o600)
        readline.read_history_file(path)
    except OSError:
        app.terminal.note(f"the history file {path} cannot be used; this chat keeps none")
        return
    readline.set_history_length(1000)
    atexit.register(_write_history, readline, path)


def _write_history(readline: Any, path: str) -> None:
    with contextlib.suppress(OSError):
        readline.write_history_file(path)


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
    """Return the lines that a slash command says.  Raises EOFError to leave."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    action = REPL_COMMANDS.get(name)
    if action is None:
        hint = _nearest_hint(name, list(REPL_COMMANDS))
        return [f"there is no command /{name}; {hint}".replace("known are", "there are")]
    return action(app, rest)


def _repl_help(app: App, rest: str) -> List[str]:
    return [f"{name:18} {text}" for name, text in REPL_HELP]


def _repl_exit(app: App, rest: str) -> List[str]:
    raise EOFError


def _repl_stats(app: App, rest: str) -> List[str]:
    return stats_lines(stats_facts(app))


def _repl_memory(app: App, rest: str) -> List[str]:
    if not rest:
        return ["what shall I look for? /memory TEXT"]
    return [_entry_line(entry) for entry in search(app.memory(), rest, 10)] or [
        f"the memory holds nothing about {rest!r}"]


def _entry_line(entry: Entry) -> str:
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.told_at))
    return f"{entry.id:6}  {entry.source:8} {when}  {' / '.join(entry.text.splitlines())}"


def _repl_why(app: App, rest: str) -> List[str]:
    last = app.organism().last
    if last is None:
        return ["nothing has been said yet"]
    if last.source == "memory" and last.entry is not None:
        return [f"it came from memory, match {last.score:.2f}:", _entry_line(last.entry)]
    if last.source == "model":
        return why_lines(app.organism().trace, app.organism().growth.step)
    return ["nothing in the memory fitted, and the model has not learned enough to try"]


def why_lines(trace: Optional[Trace], step: int) -> List[str]:
    """Return what moved a reply: the experts' shares, token by token, the entries, the deltas."""
    if trace is None or not trace.tokens:
        return [f"the model said it by itself, at step {step}"]
    shares = ", ".join(f"{name} {share:.0%}" for name, share in trace.expert_shares().items())
    lines = [f"the voice said it, at step {step}: {shares}; by token, in nats over its likeliest "
             f"rival:",
             " ".join(_why_token(trace, said) for said in trace.tokens)]
    lines += [f"{count} tokens, {nats:.1f} nats copied from: {_entry_line(entry)}"
              for entry, count, nats in trace.entry_shares()]
    deltas = trace.delta_shares()
    if deltas:
        lines.append("delta layers, nats a token: " + ", ".join(
            f"{i} {nats:+.2f}" for i, nats in enumerate(deltas)))
    return lines


def _why_token(trace: Trace, said: Said) -> str:
    """Return a token with the experts that moved it by a tenth of a nat or more."""
    text = json.dumps(trace.tokenizer.decode([said.token]), ensure_ascii=False)
    moved = [f"{name}{nats:+.1f}" for name, nats in zip(EXPERTS, said.shares) if abs(nats) >= 0.1]
    return f"{text}({' '.join(moved)})"


def _repl_judge(good: bool) -> Callable[[App, str], List[str]]:
    def act(app: App, rest: str) -> List[str]:
        if not app.organism().judge(good):
            return ["there is no reply yet to judge"]
        return ["kept as a good reply; it will be learned" if good else "noted as a bad reply"]
    return act


def _repl_teach(app: App, rest: str) -> List[str]:
    if not rest:
        return ["what shall I learn? /teach TEXT"]
    app.organism().teach(rest)
    return ["I will remember that."]


def _repl_forget(app: App, rest: str) -> List[str]:
    return [forget(app.memory(), rest)]


def forget(memory: Memory, wish: str) -> str:
    """Forget one entry by its id or its exact words; return a sentence about what was done."""
    if not wish:
        raise UsageError("what shall be forgotten? name an id from `memory search`, or the words")
    told = "e.source != 'corpus' AND "
    number = int(wish) if re.fullmatch("[0-9]{1,18}", wish) else None
    found = [] if number is None else memory.entries(told + "e.id = ?", number)
    found = found or memory.entries(told + "rtrim(e.text, char(10)) = ? COLLATE NOCASE", wish)
    if not found:
        if number is not None and memory.entries("e.id = ?", number):
            return f"entry {wish} stands in the corpus; take its lines out of that file"
        return f"nothing that was told is {wish!r}; look for its id with memory search"
    for entry in found:
        forget_told(memory, entry)
    return f"forgotten: {' / '.join(found[0].text.splitlines())}"


def _repl_session(app: App, rest: str) -> List[str]:
    organism = app.organism()
    if rest:
        organism.session = check_session(rest)
        organism.memory.session_id(rest)
    return [f"session {organism.session}"]


def check_session(name: str) -> str:
    """Return a session's name.  Raises UsageError for one that cannot be shown in a line."""
    if not name.strip() or len(name) > 80 or not name.isprintable():
        raise UsageError(f"{name[:80]!r} cannot name a session; use 1 to 80 printable characters")
    return name


def _repl_sessions(app: App, rest: str) -> List[str]:
    return session_lines(app.memory().sessions())


def session_lines(sessions: List[Dict[str, Any]]) -> List[str]:
    """Return a line for each session."""
    return [f"{s['name']:20} {s['messages']:6} messages, since "
            f"{time.strftime('%Y-%m-%d %H:%M', time.localtime(s['started_at']))}"
            for s in sessions] or ["there is no session yet"]


def _repl_new(app: App, rest: str) -> List[str]:
    known = {s["name"] for s in app.memory().sessions()}
    name = next(f"talk {n}" for n in range(1, len(known) + 2) if f"talk {n}" not in known)
    return _repl_session(app, name)


def _repl_compact(app: App, rest: str) -> List[str]:
    organism = app.organism()
    count = organism.compact(organism.memory.session_id(organism.session))
    lines = "".join(summary_texts(organism.summary(), organism.prompt_budget())).splitlines()
    done = f"{count} turns were summed up, and stay in the memory" if count else (
        "no turns but the newest are left to sum up")
    return [f"{done}; the session's summary is {'now:' if lines else 'empty'}", *lines]


def _repl_set(app: App, rest: str) -> List[str]:
    name, _, value = rest.replace("=", " ", 1).partition(" ")
    if not value.strip():
        return ["use /set FIELD VALUE, for example /set temperature 0.7"]
    organism = app.organism()
    config = organism.config.replace([f"{name}={value.strip()}"])
    sampler_settings(config)
    if Shape.of(config) != Shape.of(organism.config):
        return [f"a model grows when it starts: leave, and begin with --set {name}={value.strip()}"]
    if name.endswith("_path"):
        return [f"{name} cannot change in a living organism; begin another with --db"]
    organism.config = app.config = config
    organism.memory.set_setting(f"config.{name}", getattr(config, name))
    return [f"{name} = {getattr(config, name)!r}, kept"]


def _repl_show(app: App, rest: str) -> List[str]:
    config = app.organism().config
    chosen = [f for f in dataclasses.fields(Config) if rest in ("", f.name)]
    if not chosen:
        raise ConfigError(f"there is no setting {rest!r}; "
                          f"{_nearest_hint(rest, [f.name for f in dataclasses.fields(Config)])}")
    return [f"{f.name:24} {getattr(config, f.name)!r:24} {f.metadata['doc']}" for f in chosen]


def _repl_train(app: App, rest: str) -> List[str]:
    organism = app.organism()
    if app.options.no_train:
        return ["this chat was started with --no-train"]
    organism.awake()
    organism.learn_now()
    return ["learning what is there; go on talking"]


def _repl_sleep(app: App, rest: str) -> List[str]:
    app.organism().sleep()
    return ["the trainer sleeps, everything is committed; /train wakes it"]


def _repl_save(app: App, rest: str) -> List[str]:
    return ["every word is saved as it is said; learned weights are saved every "
            f"{app.config.commit_seconds:g} s and when you leave"]


REPL_COMMANDS: Dict[str, Callable[[App, str], List[str]]] = {
    "help": _repl_help, "stats": _repl_stats, "memory": _repl_memory, "why": _repl_why,
    "good": _repl_judge(True), "bad": _repl_judge(False), "teach": _repl_teach,
    "forget": _repl_forget, "session": _repl_session, "sessions": _repl_sessions,
    "new": _repl_new, "compact": _repl_compact, "set": _repl_set, "show": _repl_show,
    "train": _repl_train, "sleep": _repl_sleep, "save": _repl_save, "exit": _repl_exit,
    "quit": _repl_exit}


def command_ask(app: App, words: List[str]) -> int:
    """Say one reply and leave."""
    text = clean_line(" ".join(words), LONGEST_MESSAGE)
    if not text:
        raise UsageError('ask needs something to answer; for example: ask "Who are you?"')
    organism = app.organism()
    if app.options.wait_trained:
        wake(app)
    else:
        organism.prepare_corpus()
        organism.take_in_corpus()
    for piece in organism.reply(text):
        app.terminal.say(piece.replace("\n", " "), end="")
    app.terminal.say("")
    if app.options.wait_trained:
        organism.wait_rest()
    app.notices()
    return 0


def command_train(app: App, words: List[str]) -> int:
    """Train in the foreground until all is learned, or for so many steps or seconds."""
    if words:
        raise UsageError(f"train takes no words, found {words[0]!r}; use --steps N or --seconds S")
    if app.options.no_train:
        raise UsageError("train and --no-train contradict each other; leave one out")
    organism, bar = app.organism(), ProgressBar(app.terminal)
    organism.prepare_corpus()
    before = dataclasses.replace(organism.growth)
    organism.only_orders = True
    organism.learn_now(app.options.steps, app.options.seconds)
    organism.awake()
    try:
        organism.wait_order(lambda: bar.show(organism.progress))
    finally:
        app.terminal.end_status()
        organism.sleep()
        app.terminal.note(f"committed at step {organism.growth.step}")
        app.notices()
    if organism.barred:
        raise TrainerError("another macrogpt trains this memory; leave that one first")
    return _report_training(app, organism, before)


def _report_training(app: App, organism: Organism, before: Growth) -> int:
    growth = organism.growth
    facts = {**dataclasses.asdict(growth), "steps_now": growth.step - before.step,
             "tokens_now": growth.tokens - before.tokens}
    bpc = "" if growth.bpc is None else f", held-out {growth.bpc:.3f} bits per character"
    app.report(facts, [f"{facts['steps_now']} steps, {facts['tokens_now']} tokens; now at step "
                       f"{growth.step}, {growth.phase}{bpc}"])
    return 0


def command_generate(app: App, words: List[str]) -> int:
    """Stream free text after a prompt."""
    organism = app.organism()
    tokenizer, model = organism.voice()
    if organism.growth.phase == "newborn":
        app.terminal.note("nothing has been learned yet, so this is noise; run `train` first")
    ids = [END_OF_TEXT] + tokenizer.encode(" ".join(words))
    app.terminal.say(" ".join(words), end="")
    decoder, mixture = StreamDecoder(tokenizer), organism.mixture()
    stream = generate_ids(next_logits_of(model, mixture), ids, sampler_settings(app.config),
                          random.Random(app.config.seed),
                          app.options.tokens or app.config.max_gen_tokens, engine=model.engine)
    for token in stream:
        piece = "\n" if token == END_OF_TEXT else tidied(decoder.feed(token))
        app.terminal.say(piece, end="")
    app.terminal.say(decoder.flush())
    return 0


def command_memory(app: App, words: List[str]) -> int:
    """Search, list or forget in the long-term memory."""
    action, rest = (words[0], " ".join(words[1:])) if words else ("", "")
    memory = app.memory()
    if action == "search" and rest:
        entries = search(memory, rest)
    elif action == "list" and not rest:
        entries = memory.entries("e.source != 'corpus'")
    elif action == "forget" and rest:
        done = forget(memory, rest)
        app.report({"said": done}, [done])
        return 0 if done.startswith("forgotten") else 1
    else:
        raise UsageError("memory takes one of: search TEXT, list, forget TEXT-or-ID")
    app.report({"entries": [entry._asdict() for entry in entries]},
               [_entry_line(entry) for entry in entries] or ["nothing found"])
    return 0


def command_sessions(app: App, words: List[str]) -> int:
    """List the sessions."""
    sessions = app.memory().sessions()
    app.report({"sessions": sessions}, session_lines(sessions))
    return 0


def stats_facts(app: App) -> Dict[str, Any]:
    """Return everything that can be counted about the organism."""
    organism, memory = app.organism(), app.memory()
    growth, names = organism.growth, memory.manifests()
    parameters, vocabulary = model_size(organism)
    return {
        "version": __version__, "engine": organism.engine.name, "parameters": parameters,
        "vocabulary": vocabulary,
        "shape": dataclasses.asdict(Shape.of(app.config)),
        "layers": {"base": "base" in names, "deltas": len(delta_names(names)),
                   "max_deltas": app.config.max_delta_modules},
        **dataclasses.asdict(growth), "memory": memory.counts(),
        "file_bytes": memory.file_bytes(),
        "waiting_chars": dict(zip(("corpus", "said"), memory.unlearned_chars())),
        "progress": memory.progress(), "probe_curves": memory.setting("probes", {}),
        "life": memory.life(20)}


def stats_lines(facts: Dict[str, Any]) -> List[str]:
    """Return the facts as lines for people, with a small plot of the held-out loss over life."""
    memory, shape = facts["memory"], facts["shape"]
    bpc = "not measured yet" if facts["bpc"] is None else f"{facts['bpc']:.3f} bits per character"
    lines = [
        f"model      {facts['parameters']:,} parameters, {shape['n_layer']} layers of "
        f"{shape['n_embd']} channels, vocabulary {facts['vocabulary']}"
        f"{' (%d more ripen)' % facts['ripening'] if facts['ripening'] else ''}, "
        f"{facts['layers']['deltas']} deltas",
        f"learning   {facts['phase']}, step {facts['step']}, {facts['tokens']:,} tokens, "
        f"held-out {bpc}",
        f"memory     {memory['messages']} messages in {memory['sessions']} sessions, "
        f"{memory['entries']} entries ({memory['told']} told, {memory['learned']} learned, "
        f"{memory['held_out']} held out), {facts['file_bytes']:,} bytes",
        f"waiting    {facts['waiting_chars']['corpus']} characters of the corpus, "
        f"{facts['waiting_chars']['said']} of what was said",
        f"engine     {facts['engine']}, macrogpt {facts['version']}, "
        f"Python {sys.version.split()[0]}"]
    curve = [p["held_out_bpc"] for p in facts["progress"] if p["held_out_bpc"] is not None]
    if len(curve) > 1:
        lines.append(f"held-out   {sparkline(curve)}  {curve[0]:.2f} → {curve[-1]:.2f}")
    for name, points in facts["probe_curves"].items():
        losses = [bpc for _, bpc in points]
        lines.append(f"probe {name:>6}  {sparkline(losses)}  {losses[0]:.2f} → {losses[-1]:.2f}")
    return lines


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """Return the values as a row of small bars, thinned to width."""
    count = min(width, len(values))
    thinned = [values[i * len(values) // count] for i in range(count)]
    low, high = min(thinned), max(thinned)
    return "".join("▁▂▃▄▅▆▇█"[int((v - low) / (high - low or 1) * 7.999)] for v in thinned)


def command_stats(app: App, words: List[str]) -> int:
    """Say how large, how old and how good it is."""
    facts = stats_facts(app)
    app.report(facts, stats_lines(facts))
    return 0


def _reading_nats(app: App, organism: Organism, way: Tongue, text: str) -> List[Any]:
    """Return the nats of a text by model, counts, voice and learning voice, and its tokens."""
    ids, learning = text_ids(way.tokenizer, text), Mixer(app.config.ngram_order)
    learning.load(organism.mixer().numbers())
    still, live = (Mixture(organism.engine, way.counts, mixer)
                   for mixer in (organism.mixer(), learning))
    totals = [0.0] * 4
    for i, nats in enumerate(read_through(way.model, ids, still, live)):
        totals = list(map(add, totals, nats))
        if i % 500 == 0:
            app.terminal.status(f"{i / len(ids):4.0%} of {len(ids)} tokens")
    return [*totals, len(ids) - 1]


def command_eval(app: App, words: List[str]) -> int:
    """Measure the model on a text file, in bits per character; learn nothing."""
    if len(words) != 1:
        raise UsageError(f"eval takes one file, found {len(words)}; for example: eval held.txt")
    text = read_text(words[0])
    if not text:
        raise CorpusError(f"{words[0]} is empty: there is nothing to predict; name a text file")
    organism = app.organism()
    found = [_reading_nats(app, organism, way, text) for way in organism.tongues()]
    totals, count = [min(nats) for nats in zip(*found)][:4], found[0][4]
    app.terminal.end_status()
    names = ("gpt_bpc", "ngram_bpc", "voice_bpc", "voice_adaptive_bpc")
    bpc = {name: nats / math.log(2.0) / len(text) for name, nats in zip(names, totals)}
    facts = {"characters": len(text), "tokens": count, **bpc}
    app.report(facts, [
        f"{len(text)} characters, {count} tokens: {bpc['gpt_bpc']:.4f} bits per character "
        f"by the model alone, {bpc['ngram_bpc']:.4f} by the counts alone, "
        f"{bpc['voice_bpc']:.4f} by the whole voice, {bpc['voice_adaptive_bpc']:.4f} when it "
        f"learns while it reads"])
    return 0


def command_doctor(app: App, words: List[str]) -> int:
    """Examine engine, compiler, SQLite, files and store; exit 1 when something is wrong."""
    checks = list(doctor_checks(app))
    healthy = all(ok for _, ok, _ in checks)
    app.report({"healthy": healthy, "checks": [
        {"name": name, "ok": ok, "found": found} for name, ok, found in checks]},
        [f"{'ok ' if ok else 'BAD'} {name:14} {found}" for name, ok, found in checks])
    return 0 if healthy else 1


def doctor_checks(app: App) -> Iterator[Tuple[str, bool, str]]:
    """Yield (name, whether it is well, what was found)."""
    yield "python", sys.version_info >= (3, 9), sys.version.split()[0]
    try:
        notices: List[str] = []
        engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, notices.append)
        yield "engine", True, " · ".join([engine.name, *notices])
    except MacroGPTError as error:
        yield "engine", False, str(error)
    compiler = find_compiler()
    yield "compiler", True, " ".join(compiler or ["none: kernels are interpreted"])
    for module, use in (("readline", "arrow keys and history"), ("ctypes", "compiled kernels")):
        try:
            importlib.import_module(module)
            yield module, True, "there"
        except ImportError:
            yield module, True, f"missing: no {use}"
    corpus = app.config.corpus_path
    try:
        facts = read_corpus(corpus, app.config.max_corpus_lines, app.config.max_line_chars)
        size = f"{facts.total_lines} lines, {len(facts.documents)} documents"
        yield "corpus", True, f"{corpus}: {size}"
    except CorpusError as error:
        yield "corpus", not os.path.lexists(corpus) and corpus == Config.corpus_path, str(error)
    yield from _store_checks(app)


def _store_checks(app: App) -> Iterator[Tuple[str, bool, str]]:
    path = app.config.db_path
    if not os.path.exists(path):
        yield "store", True, f"{path} is not there yet; the first chat makes it"
        return
    try:
        memory = app.memory()
        found = memory.integrity()
        yield "store", found == "ok", f"{path}: integrity {found}"
        yield "full text", True, f"SQLite {sqlite3.sqlite_version}, " + (
            "FTS5" if memory.has_fts else "no FTS5: searches are slower")
    except StoreError as error:
        yield "store", False, str(error)
        return
    mode = stat.S_IMODE(os.stat(path).st_mode)
    private = os.name != "posix" or not mode & 0o077
    yield "privacy", private, f"mode {mode:04o}" + (
        "" if private else f": others can read it; run chmod 600 {path}")


def command_bench(app: App, words: List[str]) -> int:
    """Measure this machine: training, generation, start-up, first reply, memory search."""
    if app.options.forgetting:
        return bench_forgetting(app, words)
    if words:
        raise UsageError(f"bench takes no words, found {words[0]!r}; sizes are set with --set")
    config, best = app.config, choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True,
                                             app.terminal.note)
    engines = [best] if best.name == "python" else [best, interpreted_engine()]
    app.terminal.note("measuring; leave the machine alone for a while")
    peak = bench_peak(best)
    facts = {"config": dataclasses.asdict(config), "peak_gflops": peak,
             "engines": {engine.name: bench_engine(config, engine, peak) for engine in engines},
             "multiply_add_ns": {"sum_map_mul": bench_sum_map_mul()},
             **bench_process(config), **bench_search(config)}
    app.report(facts, bench_lines(facts))
    return 0


def _timed(work: Callable[[], Any], seconds: float, least: int = 3) -> List[float]:
    """Return the times of repeated calls, for about so many seconds, after one unmeasured call."""
    work()
    times: List[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < least:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return times


INTERPRETED_STEP = 100_000_000  # weights times tokens that take some seconds interpreted


def bench_peak(engine: Engine) -> Optional[float]:
    """Return the GFLOP/s of one core at independent multiply-adds; None for interpreted kernels."""
    if engine.name == "python":
        return None
    out, rounds = engine.buffer(96), 100_000
    return 192e-9 * rounds / min(_timed(lambda: engine.multiply_adds(out, rounds, 0.5), 0.3))


def bench_engine(config: Config, engine: Engine, peak: Optional[float]) -> Dict[str, Any]:
    """Return the speeds of one engine; floating-point operations are 6 a weight and token."""
    rng = random.Random(config.seed)
    model = GPT(Shape.of(config), config.bench_vocab, engine, rng)
    block, batch, optimizer = config.block_size, config.batch_size, AdamW.of(config)
    weights = sum(p.rows * p.dim for p in model.params.values())
    engine.threads = 1 if engine.name == "python" else config.threads or 1
    if engine.name == "python":  # a large model would take it minutes a step: fewer tokens then
        block = min(block, max(1, INTERPRETED_STEP // weights))
        batch = min(batch, max(1, INTERPRETED_STEP // weights // block))
    windows = [[rng.randrange(config.bench_vocab) for _ in range(block + 1)]
               for _ in range(batch)]
    train = _timed(lambda: train_step(model, optimizer, windows, 0.001, 0.0, rng),
                   config.bench_seconds)
    made = _timed(lambda: _bench_generate(model, config, block), config.bench_seconds)
    few = max(1, block // 2)
    half = _timed(lambda: _bench_generate(model, config, few), config.bench_seconds / 2)
    exchange = [window[:71] for window in windows]
    talk = _timed(lambda: train_step(model, optimizer, exchange, 0.001, 0.0, rng),
                  config.bench_seconds / 2)
    tokens = batch * block
    gflops = 6e-9 * weights * tokens / min(train)
    return {"train_tokens_per_s": tokens / min(train),
            "train_tokens_per_s_median": tokens / statistics.median(train),
            "train_exchanges_tokens_per_s": len(exchange) * 70 / min(talk) if block >= 70 else None,
            "generate_tokens_per_s": block / min(made),
            "generate_tokens_per_s_median": block / statistics.median(made),
            "generate_half_window_tokens_per_s": few / min(half),
            "gflops": gflops, "threads": engine.threads,
            "share_of_peak": peak and gflops / (peak * engine.threads)}


def _bench_generate(model: GPT, config: Config, count: int) -> None:
    """Generate count tokens from an empty cache with the default chain of samplers."""
    cache = model.new_cache()
    for _ in generate_ids(lambda new: model.feed(cache, new), [1], sampler_settings(config),
                          random.Random(0), count, engine=model.engine):
        pass


def bench_sum_map_mul() -> float:
    """Return nanoseconds of a multiply-add by sum(map(mul, a, b)): the measure of this Python."""
    a, b = [random.Random(i).random() for i in range(2000)], [0.5] * 2000
    return min(_timed(lambda: sum(map(mul, a, b)), 0.2)) / 2000 * 1e9


def bench_process(config: Config) -> Dict[str, Any]:
    """Return the seconds of an empty chat, and from the start of a newborn to its first reply."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = os.path.abspath(config.corpus_path)
        if not os.path.exists(corpus):
            corpus = os.path.join(folder, "first.txt")
            with open(corpus, "w", encoding="utf-8") as file:
                file.write(FIRST_CORPUS)
        firsts, starts = [], []
        for i in range(3):
            command = [sys.executable, os.path.abspath(__file__), "--corpus", corpus, "--db",
                       os.path.join(folder, f"{i}.sqlite3")]
            begun = time.perf_counter()
            subprocess.run(command + ["--no-train"], stdin=subprocess.DEVNULL, check=True,
                           capture_output=True)
            starts.append(time.perf_counter() - begun)
            os.unlink(command[-1])
            begun = time.perf_counter()
            with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.DEVNULL) as chat:
                assert chat.stdin is not None and chat.stdout is not None
                chat.stdin.write(b"Hello.\n")
                chat.stdin.flush()
                chat.stdout.readline()
                firsts.append(time.perf_counter() - begun)
                chat.stdin.close()
    return {"startup_s": min(starts), "first_reply_s": min(firsts)}


def bench_search(config: Config) -> Dict[str, Any]:
    """Return milliseconds of a search among 10,000 made-up entries."""
    rng, words = random.Random(0), ["w" + str(i) for i in range(3000)]
    memory = Memory(":memory:")
    with memory.transaction():
        for _ in range(10_000):
            line = " ".join(rng.choices(words, k=8))
            memory.add_entry("corpus", Document((line,), True))
    asked = " ".join(words[:6])
    times = _timed(lambda: recall(memory, asked, rng), 0.5)
    memory.close()
    return {"search_10000_ms": statistics.median(times) * 1e3}


def bench_lines(facts: Dict[str, Any]) -> List[str]:
    """Return the measurements as a table."""
    rows = [("engine", "training tokens/s", "median", "generated tokens/s", "median", "GFLOP/s",
             "of peak")]
    speeds = ("train_tokens_per_s", "train_tokens_per_s_median", "generate_tokens_per_s",
              "generate_tokens_per_s_median")
    for name, e in facts["engines"].items():
        share = "" if e["share_of_peak"] is None else f"{e['share_of_peak']:.0%}"
        rows.append((name, *(f"{e[speed]:.0f}" for speed in speeds), f"{e['gflops']:.2f}", share))
    lines = ["  ".join(f"{cell:>18}" for cell in row) for row in rows]
    for name, e in facts["engines"].items():
        if e["train_exchanges_tokens_per_s"]:
            lines.append(f"{name}: exchanges of 70 tokens {e['train_exchanges_tokens_per_s']:.0f} "
                         f"tokens/s; generation over half a window "
                         f"{e['generate_half_window_tokens_per_s']:.0f} tokens/s")
    pace = facts["multiply_add_ns"]["sum_map_mul"]
    lines.append(f"sum(map(mul, a, b)) {pace:.1f} ns a multiply-add")
    lines.append(f"an empty chat {facts['startup_s']:.2f} s, first reply of a newborn "
                 f"{facts['first_reply_s']:.2f} s, search among 10,000 entries "
                 f"{facts['search_10000_ms']:.1f} ms")
    return lines


# Forgetting in public: texts that every Python carries, learned one after the other.

SOURCES = (argparse, ast, heapq, inspect, statistics, tempfile)
DOCUMENTED = (asyncio.base_events, codecs, collections, contextlib, dataclasses, functools, json,
              random, shutil, socket, subprocess, threading, traceback)
STYLES: Tuple[Tuple[str, Callable[[str], str]], ...] = (
    ("", lambda text: text), ("upper", str.upper),
    ("rot13", lambda text: codecs.encode(text, "rot13")),
    ("backwards", lambda text: "\n".join(" ".join(line.split(" ")[::-1])
                                         for line in text.split("\n"))),
    ("no vowels", lambda text: re.sub("[aeiou]", "", text)),
    ("spelled", lambda text: "-".join(text)))
METHODS = ("full", "shared", "ours")  # full fine-tuning, one delta for all, and as we live


class Lesson(NamedTuple):
    """A text of a stream: what is learned, what guards it, and what it is examined on."""

    name: str
    text: str
    probe: str
    test: str


def stock_texts(corpus: str) -> Dict[str, str]:
    """Return unlike texts that any installation of Python has, and the corpus, by name."""
    names = [unicodedata.name(chr(i), "").title() for i in range(0x2FFF)]
    random.Random(0).shuffle(names)
    found = {"names": "\n".join(filter(None, names)),
             "source": "\n".join(map(inspect.getsource, SOURCES)), "license": _license_text()}
    if os.path.exists(corpus):
        found["corpus"] = read_text(corpus)
    found["docstrings"] = "\n\n".join(filter(None, (
        inspect.getdoc(thing) for module in DOCUMENTED for _, thing in inspect.getmembers(module)
        if getattr(thing, "__module__", module.__name__) == module.__name__)))
    return found


def _license_text() -> str:
    """Return the licenses that lie about: of Python, of this program; or what a Zen master says."""
    folder = os.path.dirname(os.__file__)
    paths = [os.path.join(where, name) for where in (folder, os.path.dirname(folder))
             for name in ("LICENSE.txt", "LICENSE")]
    paths.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "LICENSE"))
    return "\n".join(read_text(path) for path in paths if os.path.exists(path)) or repr(copyright)


def lesson(name: str, text: str, test_chars: int) -> Lesson:
    """Return a text as a lesson: its end is for the exam, what stands before that is the probe."""
    test = min(test_chars, len(text) // 5)
    probe = max(1, test // 2)
    return Lesson(name, text[:-test - probe], text[-test - probe:-test], text[-test:])


def shifts_of(texts: Dict[str, str], count: int, chars: int) -> Dict[str, str]:
    """Return slices of the texts in turn, each round in another style."""
    found: Dict[str, str] = {}
    for i in range(count):
        name, turn = list(texts)[i % len(texts)], i // len(texts)
        style, change = STYLES[turn % len(STYLES)]
        text = texts[name]
        at = (turn + 5) * chars % max(1, len(text) - chars + 1)
        found[f"{name} {turn} {style}".strip()] = change(text[at:at + chars])[:chars]
    return found


def bench_forgetting(app: App, words: List[str]) -> int:
    """Learn two streams of texts by each method and say what is left of the early ones."""
    config, terminal = app.config, app.terminal
    engine = choose_engine(os.environ.get("MACROGPT_ENGINE", ""), True, terminal.note)
    texts = {os.path.basename(path): read_text(path) for path in words}
    for name, text in stock_texts(config.corpus_path).items():
        if len(texts) < max(len(words), UNLIKE_TEXTS):
            texts.setdefault(name, text)
    short = [name for name, text in texts.items() if len(text) < SHORTEST_LESSON]
    if short:
        raise CorpusError(f"{short[0]} has {len(texts[short[0]])} characters; a text to be learned "
                          f"needs {SHORTEST_LESSON}")
    whole = {name: text[:config.bench_chars] for name, text in texts.items()}
    shifts = {**dict(list(whole.items())[:1]),
              **shifts_of(texts, config.bench_shifts, config.bench_shift_chars)}
    streams = {f"{len(whole)} unlike texts": (whole, config.bench_tokens),
               f"{len(shifts) - 1} shifts": (shifts, config.bench_shift_tokens)}
    facts = {name: forgetting(config, engine, stream, tokens, terminal.status)
             for name, (stream, tokens) in streams.items() if len(stream) > 1}
    terminal.end_status()
    app.report({"config": dataclasses.asdict(config), "engine": engine.name, "streams": facts},
               [line for name, stream in facts.items() for line in forgetting_lines(name, stream)])
    return 0


def forgetting_lines(name: str, stream: Dict[str, Any]) -> List[str]:
    """Return what was measured on a stream as a table."""
    lines = [f"{name}: bits per character right after learning → in the end",
             "  ".join(f"{cell:>15}" for cell in ("", *(f"{method} {who}" for method in METHODS
                                                       for who in ("alone", "voice"))))]
    for text in stream[METHODS[0]]["texts"]:
        cells = []
        for method in METHODS:
            told = stream[method]["texts"][text]
            cells += [f"{a:.3f} → {b:.3f}" for a, b in zip(told["after"], told["end"])]
        lines.append("  ".join(f"{cell:>15}" for cell in (text[:15], *cells)))
    for fact, said in (("forgetting", "forgotten, mean"), ("worst", "forgotten, most"),
                       ("learned", "new, over full")):
        cells = [f"{share:+.1%}" for method in METHODS for share in stream[method][fact]]
        lines.append("  ".join(f"{cell:>15}" for cell in (said, *cells)))
    return lines


UNLIKE_TEXTS = 5
SHORTEST_LESSON = 1000  # characters


class Pupil:
    """One way to learn a stream of lessons, from the same warmed-up base as the others."""

    def __init__(self, method: str, config: Config, growth: Growth, layers: Dict[str, Layer],
                 engine: Engine) -> None:
        self.method, self.config, self.engine = method, config, engine
        # the base is not to grow up a second time, however much text there comes to be
        growth = dataclasses.replace(growth, warmup_chars=10 ** 12)
        self.student = Student(config, growth, layers, engine)
        self.lessons: List[Lesson] = []
        self.ways: List[Tongue] = []
        if method == "shared":
            self.student.model.append_delta(config.delta_rank, random.Random(config.seed))
        if method != "ours":
            self.student.model.router = None

    def learn(self, new: Lesson, tokens: int) -> None:
        """Learn a lesson on about so many tokens; the counts and the voice's weights learn too."""
        student, config = self.student, self.config
        known = bool(self.lessons)
        self.lessons.append(new)
        documents = [[(i, j), part + "\n", True, one is new and known, one.name]
                     for i, one in enumerate(self.lessons)
                     for j, part in enumerate(one.text.split("\n\n"))]
        student.take_text(documents, new.probe, {one.name: one.probe for one in self.lessons})
        if known:
            batch = student.batch() if self.method == "ours" else config.batch_size
            steps = max(1, tokens // (batch * config.block_size))
            (self._burst if self.method == "ours" else self._tune)(steps)
        if self.method != "ours":  # one voice for all texts is fitted on all of them
            student.mixed.clear()
        student.fit_voice()
        self.ways = list(student.tongues())

    def _burst(self, steps: int) -> None:
        """Learn as the trainer does, gate and all."""
        job = Job(self.student, steps, None, time.monotonic)
        while True:
            job.advance()
            if job.finished():
                if job.passes() or job.given_up():
                    job.close()
                    return
                job.again()

    def _tune(self, steps: int) -> None:
        """Train what may be trained on the new text alone."""
        student, config = self.student, self.config
        student.model.freeze(self.method == "shared")
        for matrix in student.model.delta_params():
            matrix.freeze(False)
        peak = config.delta_rate if self.method == "shared" else config.learning_rate
        batch = config.batch_size
        for i in range(steps):
            windows = [w for w in student.pool.windows(batch, batch, student.rng) if len(w) > 1]
            train_step(student.model, student.optimizer, windows,
                       scheduled_rate(peak, i / steps, config.rate_warmup, config.schedule),
                       config.dropout, student.rng)

    def examined(self, one: Lesson) -> Tuple[float, float]:
        """Return the bits per character on a lesson's exam, of the model alone and of the voice.

        As eval does, each writes the text in whatever costs it least.
        """
        alone, mixed = zip(*(self._examined_in(way, one) for way in self.ways))
        return min(alone), min(mixed)

    def _examined_in(self, way: Tongue, one: Lesson) -> Tuple[float, float]:
        model, ids = way.model, text_ids(way.tokenizer, one.test)
        layers = {} if self.student.mixer is None else {"mixer": self.student.mixer}
        voice = Mixture(self.engine, way.counts, load_mixer(self.config, layers))
        alone = mixed = 0.0
        rows = predicted_rows(model, ids, model.shape.block_size // 2,
                              lambda place: setattr(voice, "place", place))
        for at, logits in enumerate(rows, 1):
            alone += self.engine.softmax(logits[:], len(logits)) - logits[ids[at]]
            voice.mix(logits, tuple(ids[max(0, at - SAID_ORDER):at]))
            mixed += voice.nats(ids[at])
        bits = math.log(2.0) * len(one.test)
        return alone / bits, mixed / bits


def forgetting(config: Config, engine: Engine, texts: Dict[str, str], tokens: int,
               tell: Callable[[str], None]) -> Dict[str, Any]:
    """Return what each method knows of each text right after learning it and in the end.

    The first text warms up the base, on bench_tokens; each other one is learned on `tokens`.
    """
    lessons = [lesson(name, text, config.bench_test_chars) for name, text in texts.items()]
    first = Pupil("warm-up", config, Growth(), {}, engine)
    first.student.take_text([[0, lessons[0].text, True, False]], lessons[0].probe,
                            {lessons[0].name: lessons[0].probe})
    job = Job(first.student, None, None, time.monotonic)
    job.steps = max(1, config.bench_tokens // (first.student.batch() * config.block_size))
    job.advance()
    while not job.finished():
        job.advance()
    job.close()
    growth, layers = first.student.snapshot()
    facts = {}
    for method in METHODS:
        pupil = Pupil(method, config, growth, layers, engine)
        after = {}
        for one in lessons:
            tell(f"{method}: {one.name}")
            pupil.learn(one, tokens)
            after[one.name] = pupil.examined(one)
        end = {one.name: pupil.examined(one) for one in lessons}
        facts[method] = {"texts": {name: {"after": after[name], "end": end[name]} for name in end},
                         "deltas": len(pupil.student.model.deltas), "notes": pupil.student.notes}
        facts[method].update(_forgotten(after, end))
    for method in METHODS:
        facts[method]["learned"] = [
            statistics.mean(facts[method]["texts"][name]["after"][i]
                            / facts["full"]["texts"][name]["after"][i]
                            for name in list(texts)[1:]) - 1.0 for i in range(2)]
    return facts


def _forgotten(after: Dict[str, Tuple[float, float]],
               end: Dict[str, Tuple[float, float]]) -> Dict[str, List[float]]:
    """Return mean and largest rise over the earlier texts, of the model alone and of the voice."""
    rises = [[end[name][i] / after[name][i] - 1.0 for name in list(end)[:-1]] for i in range(2)]
    return {"forgetting": [statistics.mean(r) for r in rises], "worst": [max(r) for r in rises]}


def command_later(app: App, words: List[str]) -> int:
    """Say that a command is not there yet."""
    raise MacroGPTError(f"{app.options.command} is not there yet; see the README for what is")


COMMANDS: Dict[str, Tuple[Callable[[App, List[str]], int], FrozenSet[str], str]] = {
    "chat": (command_chat, frozenset(), "talk (the default)"),
    "ask": (command_ask, frozenset(), "TEXT: one reply on stdout"),
    "train": (command_train, frozenset({"steps", "seconds"}),
              "[--steps N] [--seconds S]: train in the foreground"),
    "generate": (command_generate, frozenset({"tokens"}), "[PROMPT] [--tokens N]: free text"),
    "memory": (command_memory, frozenset(), "search TEXT | list | forget TEXT-or-ID"),
    "sessions": (command_sessions, frozenset(), "list the sessions"),
    "stats": (command_stats, frozenset(), "how large, how old, how good it is"),
    "eval": (command_eval, frozenset(), "FILE: bits per character on a text"),
    "bench": (command_bench, frozenset({"forgetting"}),
              "the speed of this machine; --forgetting [FILE...]: what learning costs the old"),
    "doctor": (command_doctor, frozenset(), "what is well and what is not"),
    "export": (command_later, frozenset({"format"}), "DIR --format FORMAT: not there yet"),
    "import": (command_later, frozenset(), "DIR: not there yet")}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose complaint is one line."""

    def error(self, message: str) -> Any:
        """Raise UsageError with the message."""
        raise UsageError(f"{message}; see --help")


def option_parser() -> argparse.ArgumentParser:
    """Return the parser of everything that may stand on the command line."""
    width = max(map(len, COMMANDS)) + 2
    table = "\n".join(f"  {name:{width}}{text}" for name, (_, _, text) in COMMANDS.items())
    parser = OneLineParser(
        prog="macrogpt", description="a small living mind in one file",
        epilog="commands:\n" + table, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", nargs="?", default="chat", help="see below; chat by default")
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--db", metavar="PATH", help="the memory file (default memory.sqlite3)")
    add("--corpus", metavar="PATH", help="the text file to learn from (default nonames.txt)")
    add("--session", metavar="NAME", default="main", help="pick or make a session")
    add("--set", metavar="FIELD=VALUE", action="append", default=[], help="change a setting")
    add("--seed", metavar="N", help="make what is random repeatable")
    add("--no-train", action="store_true", help="never start the trainer")
    add("--wait-trained", action="store_true",
        help="learn what is there before the first reply, and what is due before the next one")
    add("--json", action="store_true", help="machine-readable reports")
    add("--quiet", action="store_true", help="no banner, no notices")
    add("--debug", action="store_true", help="show tracebacks")
    add("--color", choices=("auto", "always", "never"), default="auto")
    add("--steps", type=int, metavar="N", help="train: so many steps")
    add("--seconds", type=float, metavar="S", help="train: so many seconds")
    add("--tokens", type=int, metavar="N", help="generate: so many tokens")
    add("--forgetting", action="store_const", const=True,
        help="bench: what is forgotten while other texts are learned, texts of your own first")
    add("--format", metavar="FORMAT", help="export: the format to write")
    add("--version", action="version", version=f"macrogpt {__version__}")
    return parser


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the options, checked against the command.  Raises UsageError or ConfigError."""
    options = option_parser().parse_intermixed_args(argv)
    if options.command not in COMMANDS:
        raise UsageError(f"there is no command {options.command!r}; "
                         f"{_nearest_hint(options.command, list(COMMANDS))}")
    taken = COMMANDS[options.command][1]
    for name in ("steps", "seconds", "tokens", "format", "forgetting"):
        value = getattr(options, name)
        if value is not None and name not in taken:
            raise UsageError(f"{options.command} takes no --{name}; see --help")
        if isinstance(value, (int, float)) and not 0 < value < math.inf:
            raise UsageError(f"--{name} {value} is not above 0; give a positive number")
    check_session(options.session)
    assignments = list(options.set)
    for name, value in (("db_path", options.db), ("corpus_path", options.corpus),
                        ("seed", options.seed)):
        if value is not None:
            assignments.append(f"{name}={value}")
    options.assignments = assignments
    return options


def _tell_error(terminal: Terminal, error: BaseException) -> int:
    """Write one line about an error to stderr; return its exit code."""
    line = " ".join(str(error).split()) or type(error).__name__
    terminal.err.write(f"macrogpt: {line}\n")
    terminal.err.flush()
    return getattr(error, "exit_code", 1)


def run(argv: Sequence[str], terminal: Terminal) -> int:
    """Run one command and return its exit code."""
    options = parse_options(argv)
    terminal = Terminal(terminal.out, terminal.err, options.color, options.quiet)
    if options.debug:
        os.environ["MACROGPT_DEBUG"] = "1"
    app = App(options, Config().replace(options.assignments), terminal)
    sampler_settings(app.config)
    try:
        names_files = options.command in ("eval", "export", "import")
        words = options.words if names_files else [tidied(word) for word in options.words]
        return COMMANDS[options.command][0](app, words)
    finally:
        for number in ENDING_SIGNALS:  # the last commit is not to be interrupted
            signal.signal(number, signal.SIG_IGN)
        app.close()


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
        if not isinstance(error, MacroGPTError):
            error = MacroGPTError(f"something unexpected happened ({type(error).__name__}: "
                                  f"{error}); run again with --debug and report what it shows")
        return _tell_error(terminal, error)


if __name__ == "__main__":
    sys.exit(main())
