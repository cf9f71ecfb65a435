"""Claims about section 1, CORPUS: every file is survived, and what is the same stays the same."""
import codecs
import itertools
import os
import random
import tracemalloc
import unicodedata
import unittest
from pathlib import Path
from unittest import mock

import macrogpt as m
from support import Folder

# Computed once when the rule was made; a change here would leak exam questions into training.
KNOWN_HELD_OUT = (15, 31, 40, 42, 45)


def made_up_lines(rng, count):
    """Return count distinct plain lines."""
    words = ["cat", "dog", "sun", "rain", "sleeps", "runs", "under", "over", "the", "old"]
    return [f"{' '.join(rng.choices(words, k=5))} {number}" for number in range(count)]


def lines_in(documents):
    return [line for document in documents for line in document.lines]


def single(line):
    return m.Document((line,), True)


class CorpusCase(Folder):
    def setUp(self):
        super().setUp()
        self.file = Path(self.path("read.txt"))

    def read(self, raw, **options):
        """Write raw to the file and read it as a corpus."""
        self.file.write_bytes(raw)
        return m.read_corpus(self.file, **options)

    def refuse(self, path, sign=""):
        """Assert that both readers refuse path in the same one line, which holds the sign."""
        one, other = (self.refused(m.CorpusError, lambda read=read: read(path), sign)
                      for read in (m.read_corpus, m.read_text))
        self.assertEqual(one, other)


class LinesAndDocuments(unittest.TestCase):
    def test_a_clean_line_has_no_controls_is_nfc_bounded_and_clean_again(self):
        rng = random.Random(1)
        self.assertEqual(m.clean_line(" \ufeffe\u0301\0b\tc\x1b[0m  d\r\n", 99), "éb c[0m  d")
        alphabet = "ab .!\t\0\x1b\u0301\u00a0\u2028\ufeff\ud800\udce9é。\U0001f600"
        for _ in range(500):
            line = m.clean_line("".join(rng.choices(alphabet, k=rng.randrange(40))), 12)
            self.assertLessEqual(len(line), 12)
            self.assertEqual(line, unicodedata.normalize("NFC", line.strip()))
            self.assertFalse({unicodedata.category(letter) for letter in line} & {"Cc", "Cs"})
            self.assertEqual(m.clean_line(line, 12), line)

    def test_a_long_line_is_cut_after_a_sentence_or_a_word_and_splitting_keeps_every_letter(self):
        for text, room, kept in (("One two. Three four", 12, "One two."), ("abcdefghij", 4, "abcd"),
                                 ("One two three four", 13, "One two three"),
                                 ("One two three four", 12, "One two")):
            self.assertEqual(m.clean_line(text, room), kept)
        self.assertEqual(m.split_long_line("It was. So it is. And so on.", 20),
                         ["It was. So it is.", "And so on."])
        rng = random.Random(2)
        for _ in range(100):
            text = "".join(rng.choices("abc   .!", k=rng.randrange(600))).strip()
            pieces = m.split_long_line(text, 20)
            self.assertTrue(all(0 < len(piece) <= 20 for piece in pieces))
            self.assertEqual("".join("".join(pieces).split()), "".join(text.split()))
        self.assertEqual(m.split_long_line("x" * 1_000_000, 240), ["x" * 240] * m.MAX_LINE_PIECES)

    def test_what_is_told_anywhere_becomes_the_same_clean_lines(self):
        for text, lines in (("Cafe\u0301 \x07Lina\r\n\nthe last", ["Caf\u00e9 Lina", "the last"]),
                            ("no end " * 9, [("no end " * n).strip() for n in (5, 4)]),
                            (" \n\0", [])):
            self.assertEqual(m.clean_pieces(text.splitlines(), 36), lines)

    def test_documents_end_at_blank_lines_and_changes_of_kind_and_have_the_known_keys(self):
        lines = ["", "H: hi", "A:hello", "H: more?", "A:   no", "", "", "One.", "Two.", "H: bye",
                 "h: plain", "A: alone"]
        documents = list(m.documents_of(lines))
        self.assertEqual([document.lines for document in documents], [
            ("H: hi", "A: hello", "H: more?", "A: no"), ("One.", "Two."), ("H: bye",),
            ("h: plain",), ("A: alone",)])
        self.assertEqual([d.is_exchange for d in documents if d.closed], [1, 0, 1, 0, 1])
        self.assertEqual([d.turns() for d in documents[:2]], [
            [("H", "hi"), ("A", "hello"), ("H", "more?"), ("A", "no")], []])
        for document in (documents[1], m.Document(("One.", "Two."), False)):
            self.assertEqual((document.text, document.key), ("One.\nTwo.\n", 5513507204856353206))
        self.assertEqual(m.line_key("hello"), -6361636117772159875)

    def test_an_inserted_line_changes_only_the_chunk_around_it(self):
        rng, changed = random.Random(4), []
        lines = made_up_lines(rng, 1000)
        before = {document.key for document in m.documents_of(lines)}
        for place in rng.choices(range(len(lines) + 1), k=40):
            after = {document.key for document in m.documents_of(
                lines[:place] + [f"inserted at {place}"] + lines[place:])}
            changed.append(max(len(before - after), len(after - before)))
        # A chunk as long as allowed passes the change on to the next, ever less probably.
        self.assertLessEqual(max(changed), 8)
        self.assertLessEqual(sum(changed) / len(changed), 2.5)

    def test_what_is_long_is_cut_without_losing_a_line_and_never_before_an_answer(self):
        lines = made_up_lines(random.Random(3), 2000)
        documents = list(m.documents_of(lines))
        self.assertEqual(lines_in(documents), lines)
        self.assertLessEqual(max(len(d.lines) for d in documents), m.WHOLE_LINES)
        self.assertEqual([d.closed for d in documents], [False] * (len(documents) - 1) + [True])
        self.assertEqual(len(list(m.documents_of(lines[:m.WHOLE_LINES]))), 1)
        lines = [f"{speaker}: line {number}" for number in range(400) for speaker in "HA"]
        documents = list(m.documents_of(lines))
        self.assertGreater(len(documents), 20)
        self.assertEqual({document.turns()[0][0] for document in documents}, {"H"})
        self.assertEqual(lines_in(documents), lines)
        answers = m.documents_of(f"A: {number}" for number in range(1000))
        self.assertLessEqual(max(len(d.lines) for d in answers), m.LONGEST_EXCHANGE_LINES)

    def test_held_out_is_about_the_share_blind_to_case_and_spacing_and_the_same_for_ever(self):
        lines = made_up_lines(random.Random(5), 5000)
        for share, low, high in ((0.0, 0, 0), (0.1, 430, 570), (0.5, 2390, 2610),
                                 (1.0, 5000, 5000)):
            held_out = sum(m.is_held_out(single(line), share) for line in lines)
            self.assertTrue(low <= held_out <= high, (share, held_out))
        for line in lines[:300]:
            other = m.Document((f"H:  {line.upper()}  E\u0301", "A: words"), False)
            self.assertEqual(m.is_held_out(single(f"H: {line} é")), m.is_held_out(other))
        self.assertEqual(KNOWN_HELD_OUT, tuple(
            number for number in range(60) if m.is_held_out(single(f"H: What is {number}?"))))

    def test_of_a_large_text_so_many_characters_are_held_out_and_never_all(self):
        documents = list(map(single, made_up_lines(random.Random(6), 900)))
        chars = {document.first_key: len(document.text) for document in documents}
        for most, low, high in ((1000, 400, 1900), (10 ** 6, 1500, 4000)):
            held = m.to_hold_out(documents, 0.1, most)
            self.assertTrue(low <= sum(map(chars.get, held)) <= high, most)
        self.assertEqual(m.to_hold_out(documents, 1.0, 10 ** 6), set())
        edited = m.Document((documents[0].lines[0].upper(), "and more"), True)
        self.assertEqual(edited.first_key, documents[0].first_key)

    def test_the_share_is_the_newest_half_and_then_the_smallest_keys_or_all_that_fits(self):
        rng = random.Random(8)
        lines = iter(made_up_lines(rng, 1000))
        documents = [m.Document(tuple(itertools.islice(lines, rng.randrange(1, 6))), True)
                     for _ in range(200)]
        sizes = {document.key: len(document.text) for document in documents}
        newest_first = [document.key for document in reversed(documents)]

        def fitting(keys, room):
            totals = itertools.accumulate(map(sizes.get, keys))
            return [key for key, total in zip(keys, totals) if total <= room]

        self.assertEqual(m.training_share([], 0), set())
        for max_chars in (0, 30, 500, 3000, sum(sizes.values()) - 1, sum(sizes.values())):
            kept = {newest_first[0]}  # whatever its size
            kept.update(fitting(newest_first[1:], max_chars // 2 - sizes[newest_first[0]]))
            kept.update(fitting(sorted(sizes.keys() - kept), max_chars - sum(map(sizes.get, kept))))
            self.assertEqual(m.training_share(documents, max_chars), kept)

    def test_an_edit_hardly_moves_the_share(self):
        *documents, inserted = map(single, made_up_lines(random.Random(10), 3001))
        before = m.training_share(documents, 10_000)
        for place in (0, 1500, 2900, 3000):
            after = m.training_share(documents[:place] + [inserted] + documents[place:], 10_000)
            self.assertLessEqual(max(len(after - before), len(before - after)), 2)
        self.assertIn(inserted.key, after)


class Reading(CorpusCase):
    def test_newlines_of_every_system_byte_order_marks_stray_bytes_and_nuls_are_read(self):
        odd = "characters that are not UTF-16, kept as \ufffd: 1"
        for raw, documents, text, *notices in (
                (b"1.\r\n\r\nH: a\r\nA: b", ["1.", "H: a|A: b"], "1.\n\nH: a\nA: b"),
                (b"1.\r\rH: a\rA: b", ["1.", "H: a|A: b"], "1.\n\nH: a\nA: b"),
                (codecs.BOM_UTF8 + "é 😀\r\nok\r\n".encode(), ["é 😀|ok"], "é 😀\nok\n"),
                ("\ufeffé 😀\r\nok".encode("utf-16-le"), ["é 😀|ok"], "é 😀\nok"),
                ("\ufeffé 😀\r\nok".encode("utf-16-be"), ["é 😀|ok"], "é 😀\nok"),
                (codecs.BOM_UTF16_LE + b"1\0\n\0\x00\xd8t", ["1|\ufffd"], "1\n\ufffd", odd),
                (b"caf\xe9\nna\xc3\xafve \x96 fa\xe7ade\n", ["café|naïve – façade"],
                 "café\nnaïve – façade\n", "bytes that are not UTF-8, read as cp1252: 3"),
                (b"\x93a\x94 \xe2\x82 \x81.", ["“a” â‚ ."], "“a” â‚ \x81.",
                 "bytes that are not UTF-8, read as cp1252: 5"),
                (b"a\0b\tc\x1b\n\0\n\x0cd\n", ["ab c", "d"], "ab\tc\x1b\n\n\x0cd\n"),
                (b"", [], ""), (b"\n\n  \n", [], "\n\n  \n"), (codecs.BOM_UTF8, [], ""),
                (codecs.BOM_UTF16_LE, [], ""), (b"\0\0", [], "")):
            corpus = self.read(raw)
            lines = [document.lines for document in corpus.documents]
            self.assertEqual(["|".join(each) for each in lines], documents)
            self.assertEqual(m.read_text(self.file), text)
            self.assertEqual((corpus.notices, corpus.total_lines, corpus.kept_all),
                             (tuple(notices), sum(map(len, lines)), True))

    def test_long_lines_are_split_when_plain_and_cut_when_spoken(self):
        corpus = self.read(b"H:" + b"why " * 20 + b"\nA: " + b"so " * 20 + b"\n\n" + b"word " * 20,
                           max_line_chars=40)
        exchange, passage = corpus.documents
        self.assertEqual(exchange.lines, (("H: " + "why " * 9).strip(), "A:" + " so" * 12))
        self.assertEqual(" ".join(passage.lines), ("word " * 20).strip())
        self.assertEqual(corpus.total_lines, 2 + len(passage.lines))
        self.assertEqual(corpus.notices, ("lines longer than 40 characters, split or cut: 3",))

    def test_a_line_of_ten_megabytes_is_read_in_little_memory(self):
        numbers = b"".join(b"%07d " % number for number in range(10_000))
        self.file.write_bytes(b"first\n" + numbers * 125 + b"\nlast\n")
        tracemalloc.start()
        lines = lines_in(m.read_corpus(self.file).documents)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertLess(peak_bytes, 4_000_000)
        self.assertEqual((lines[0], lines[-1], len(lines)),
                         ("first", "last", m.MAX_LINE_PIECES + 2))

    def test_reading_by_the_block_equals_that_by_the_line_and_keeps_the_newest_once(self):
        rng = random.Random(6)
        pieces = ["word ", "é", "e\u0301", "\n", "\r\n", "\n\n", "H: ", "A:", "\t", "\0", "😀"]
        raw = b"\n".join(["".join(rng.choices(pieces, k=40_000)).encode(),
                          bytes(rng.choices(b"a\xe9\x80\xc3 \n", k=4000)),
                          *rng.choices((b"\n1\n", b"\n2\n", b"\n5\n"), k=20), b"\n3\n4\n"])
        lines = [m.clean_line(m.decode_line(line), 10 ** 6)
                 for line in raw.replace(b"\r\n", b"\n").split(b"\n")]
        documents = list(m.documents_of(lines))
        last_places = {document.key: place for place, document in enumerate(documents)}
        once = tuple(documents[place] for place in sorted(last_places.values()))
        sizes = list(itertools.accumulate(len(document.lines) for document in reversed(once)))
        total = sum(map(bool, lines))
        for most in (1, 2, 3, 4, 6, 200, sizes[-1] - 1, sizes[-1]):
            corpus, count = self.read(raw, max_lines=most, max_line_chars=10 ** 6), 1
            while count < len(once) and sizes[count] <= most:
                count += 1
            self.assertEqual(corpus.documents, once[-count:])
            self.assertEqual((corpus.total_lines, corpus.kept_all), (total, most == sizes[-1]))
            self.assertEqual(f"kept the newest {sizes[count - 1]} of {total} lines"
                             in corpus.notices, most < sizes[-1])

    def test_random_bytes_never_fail_and_always_read_the_same(self):
        rng = random.Random(7)
        alphabet = list(range(256)) + list(b"\n\r \0HA:abc\xef\xbb\xbf\xff\xfe") * 20
        boms = (b"", b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        for _ in range(100):
            raw = rng.choice(boms) + bytes(rng.choices(alphabet, k=rng.randrange(600)))
            corpus = self.read(raw, max_lines=20, max_line_chars=10)
            self.assertEqual(corpus, m.read_corpus(self.file, 20, 10))
            for line in lines_in(corpus.documents):
                self.assertTrue(0 < len(line) <= 10)
                line.encode("utf-8")
            m.read_text(self.file).encode("utf-8")
            self.assertEqual(self.file.read_bytes(), raw)

    def test_what_is_no_file_or_cannot_be_read_is_refused_in_one_line(self):
        self.file.write_bytes(b"text\n")
        for path, sign in ((self.path("missing.txt"), "nothing"), (self.folder, "directory"),
                           ("a\0b", ""), (self.file / "below", "")):
            self.refuse(path, sign)
            self.assertIsNone(m.file_stamp(path))
        with self.assertRaisesRegex(m.CorpusError, "broken off"):
            m.read_corpus(self.file, should_stop=lambda: True)
        for failure in (PermissionError(13, "Permission denied"), OSError(5, "I/O error")):
            with mock.patch("os.open", side_effect=failure):
                self.refuse(self.file, failure.strerror)

    @unittest.skipUnless(os.name == "posix", "FIFOs and links are things of POSIX")
    def test_a_fifo_a_device_and_a_loop_of_links_are_refused_without_waiting(self):
        regular, fifo, loop, other, link = map(Path, map(self.path, "rfabl"))
        os.mkfifo(fifo)
        loop.symlink_to(other)
        other.symlink_to(loop)
        link.symlink_to(self.file)
        for path, sign in ((fifo, "pipe"), (os.devnull, "device"), (loop, ""), (link, "nothing")):
            self.refuse(path, sign)
            self.assertIsNone(m.file_stamp(path))
        corpus = self.read(b"text\n")
        self.assertEqual(m.read_corpus(link), corpus)
        regular.write_bytes(b"text\n")
        for reader in (m.read_corpus, m.read_text):
            looks = iter([os.stat(regular)])  # a pipe takes the file's place after the first look
            with mock.patch("os.stat", lambda target: next(looks, None) or os.fstat(target)):
                with self.assertRaises(m.CorpusError):
                    reader(fifo)

    @unittest.skipUnless(os.name == "posix", "an open file cannot be removed on this system")
    def test_a_file_that_vanishes_or_shrinks_meanwhile_gives_what_was_read(self):
        raw = b"".join(b"line %d\n\n" % number for number in range(15_000))
        real_open = os.open
        for spoil in (lambda: self.file.unlink(), lambda: os.truncate(self.file, 10_001)):
            def open_and_spoil(*arguments):
                descriptor = real_open(*arguments)
                spoil()
                return descriptor
            self.file.write_bytes(raw)
            with mock.patch("os.open", open_and_spoil):
                corpus = m.read_corpus(self.file)
            self.assertEqual(lines_in(corpus.documents)[:2], ["line 0", "line 1"])
            self.assertEqual(corpus.total_lines, len(corpus.documents))

    def test_the_stamp_notices_saving_by_rename_with_the_same_size_and_time(self):
        corpus, stamp = self.read(b"text\n"), m.file_stamp(self.file)
        self.assertEqual((corpus.stamp, stamp.size), (stamp, 5))
        copy = Path(self.path("copy"))
        copy.write_bytes(b"test\n")
        os.utime(copy, ns=(stamp.mtime_ns, stamp.mtime_ns))
        os.replace(copy, self.file)
        self.assertNotEqual(m.file_stamp(self.file), stamp)

    def test_changes_are_the_documents_that_differ(self):
        old, new = map(self.read, (b"one\ntwo\n\nthree\n\nfour", b"four\n\none\nfive\n\nthree"))
        added, removed = m.changes({document.key for document in old.documents}, new)
        self.assertEqual((lines_in(added), removed), (["one", "five"], {old.documents[0].key}))
