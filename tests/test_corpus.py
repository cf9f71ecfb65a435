"""Claims about section 1, CORPUS: every file is survived, and what is the same stays the same."""
from __future__ import annotations

import codecs
import hashlib
import os
import random
import tempfile
import tracemalloc
import unicodedata
import unittest
from pathlib import Path
from typing import List
from unittest import mock

import macrogpt

# Computed once when the rule was made; a change here would leak exam questions into training.
KNOWN_HELD_OUT = (15, 31, 40, 42, 45)


def made_up_lines(rng: random.Random, count: int) -> List[str]:
    """Return count distinct plain lines."""
    words = ["cat", "dog", "sun", "rain", "sleeps", "runs", "under", "over", "the", "old"]
    return [f"{' '.join(rng.choices(words, k=5))} {number}" for number in range(count)]


def lines_in(corpus: macrogpt.Corpus) -> List[str]:
    """Return the lines of all documents."""
    return [line for document in corpus.documents for line in document.lines]


class CorpusCase(unittest.TestCase):
    """A test with a directory of its own."""

    def setUp(self) -> None:
        """Make the directory; it goes when the test ends."""
        holder = tempfile.TemporaryDirectory()
        self.addCleanup(holder.cleanup)
        self.folder = Path(holder.name)
        self.path = self.folder / "nonames.txt"

    def read(self, raw: bytes, **options: int) -> macrogpt.Corpus:
        """Write raw to the file and read it as a corpus."""
        self.path.write_bytes(raw)
        return macrogpt.read_corpus(self.path, **options)

    def refusal(self, path: object) -> str:
        """Return the one line with which both readers refuse path."""
        messages = set()
        for reader in (macrogpt.read_corpus, macrogpt.read_text):
            with self.assertRaises(macrogpt.CorpusError) as caught:
                reader(path)
            messages.add(str(caught.exception))
        self.assertEqual(len(messages), 1)
        message = messages.pop()
        self.assertNotIn("\n", message)
        self.assertIsNone(macrogpt.file_stamp(path))
        return message


class LineTest(unittest.TestCase):
    """Bytes to characters to clean lines."""

    def test_a_byte_that_is_not_utf8_is_read_as_its_cp1252_letter(self) -> None:
        self.assertEqual(macrogpt.decode_line(b"caf\xe9 \x80 caf\xc3\xa9"), "café € café")
        self.assertEqual(macrogpt.decode_line(b"\x93quoted\x94 \xe2\x82"), "“quoted” â‚")

    def test_every_single_byte_decodes_as_cp1252_or_else_latin1(self) -> None:
        for byte in range(256):
            raw = bytes([byte])
            try:
                letter = raw.decode("ascii" if byte < 128 else "cp1252")
            except UnicodeDecodeError:
                letter = raw.decode("latin-1")
            self.assertEqual(macrogpt.decode_line(raw), letter)

    def test_a_clean_line_has_no_controls_and_is_nfc(self) -> None:
        self.assertEqual(macrogpt.clean_line(" \ufeffa\x00b\tc\x1b[0m  d\r\n", 99), "ab c[0m  d")
        self.assertEqual(macrogpt.clean_line("cafe\u0301", 99), "caf\u00e9")

    def test_cleaning_any_string_is_bounded_and_idempotent(self) -> None:
        rng = random.Random(1)
        alphabet = "ab .!\t\0\x1b\u0301\u00a0\u2028\ufeff\ud800\udce9é。\U0001f600"
        for _ in range(2000):
            text = "".join(rng.choices(alphabet, k=rng.randrange(40)))
            line = macrogpt.clean_line(text, 12)
            self.assertLessEqual(len(line), 12)
            self.assertEqual(line, line.strip())
            self.assertEqual(line, unicodedata.normalize("NFC", line))
            self.assertFalse({unicodedata.category(letter) for letter in line} & {"Cc", "Cs"})
            self.assertEqual(macrogpt.clean_line(line, 12), line)

    def test_a_line_is_cut_after_a_sentence_or_a_word_or_where_it_must(self) -> None:
        self.assertEqual(macrogpt.clean_line("One two. Three four", 12), "One two.")
        self.assertEqual(macrogpt.clean_line("One two three four", 13), "One two three")
        self.assertEqual(macrogpt.clean_line("One two three four", 12), "One two")
        self.assertEqual(macrogpt.clean_line("abcdefghij", 4), "abcd")

    def test_splitting_keeps_every_letter_of_a_long_line_in_order(self) -> None:
        rng = random.Random(2)
        for _ in range(300):
            text = "".join(rng.choices("abc   .!", k=rng.randrange(600))).strip()
            pieces = macrogpt.split_long_line(text, 20)
            self.assertTrue(all(0 < len(piece) <= 20 for piece in pieces))
            self.assertEqual("".join("".join(pieces).split()), "".join(text.split()))
        self.assertEqual(macrogpt.split_long_line("It was. So it is. And so on.", 20),
                         ["It was. So it is.", "And so on."])

    def test_a_line_without_end_becomes_a_bounded_number_of_pieces(self) -> None:
        pieces = macrogpt.split_long_line("x" * 1_000_000, 240)
        self.assertEqual(pieces, ["x" * 240] * macrogpt.MAX_LINE_PIECES)


class DocumentTest(unittest.TestCase):
    """Lines to documents."""

    def test_documents_end_at_blank_lines_and_changes_of_kind(self) -> None:
        lines = ["", "H: hi", "A:hello", "H: more?", "A:   no", "", "", "One.", "Two.", "H: bye",
                 "h: plain", "A: alone"]
        documents = list(macrogpt.documents_of(lines))
        self.assertEqual([document.lines for document in documents], [
            ("H: hi", "A: hello", "H: more?", "A: no"), ("One.", "Two."), ("H: bye",),
            ("h: plain",), ("A: alone",)])
        self.assertTrue(all(document.closed for document in documents))
        self.assertEqual([document.is_exchange for document in documents],
                         [True, False, True, False, True])
        self.assertEqual(documents[0].turns(),
                         [("H", "hi"), ("A", "hello"), ("H", "more?"), ("A", "no")])
        with self.assertRaises(ValueError):
            documents[1].turns()

    def test_keys_are_known_answers_that_fit_sqlite(self) -> None:
        document = macrogpt.Document(("One.", "Two."), True)
        self.assertEqual(document.text, "One.\nTwo.\n")
        digest = hashlib.blake2b(b"One.\nTwo.\n", digest_size=8).hexdigest()
        self.assertEqual(document.key % 2 ** 64, int(digest, 16))
        self.assertEqual(document.key, macrogpt.Document(("One.", "Two."), False).key)
        self.assertEqual(macrogpt.line_key("hello"), -6361636117772159875)
        keys = [macrogpt.line_key(str(number)) for number in range(200)]
        self.assertTrue(all(-2 ** 63 <= key < 2 ** 63 for key in keys))
        self.assertLess(min(keys), 0)

    def test_a_long_passage_is_cut_without_losing_a_line(self) -> None:
        lines = made_up_lines(random.Random(3), 2000)
        documents = list(macrogpt.documents_of(lines))
        self.assertEqual([line for document in documents for line in document.lines], lines)
        self.assertLessEqual(max(len(document.lines) for document in documents),
                             macrogpt.WHOLE_LINES)
        self.assertEqual([document.closed for document in documents],
                         [False] * (len(documents) - 1) + [True])
        self.assertEqual(len(list(macrogpt.documents_of(lines[:macrogpt.WHOLE_LINES]))), 1)

    def test_an_inserted_line_changes_only_the_chunk_around_it(self) -> None:
        rng = random.Random(4)
        lines = made_up_lines(rng, 1000)
        before = {document.key for document in macrogpt.documents_of(lines)}
        changed = []
        for trial in range(40):
            place = rng.randrange(len(lines) + 1)
            edited = lines[:place] + [f"inserted {trial}"] + lines[place:]
            after = {document.key for document in macrogpt.documents_of(edited)}
            changed.append(max(len(before - after), len(after - before)))
        # A chunk as long as allowed passes the change on to the next, ever less probably.
        self.assertLessEqual(max(changed), 8)
        self.assertLessEqual(sum(changed) / len(changed), 2.5)

    def test_a_long_exchange_is_never_cut_before_an_answer(self) -> None:
        lines = [line for number in range(400)
                 for line in (f"H: question {number}", f"A: answer {number}")]
        documents = list(macrogpt.documents_of(lines))
        self.assertGreater(len(documents), 20)
        self.assertTrue(all(document.turns()[0][0] == "H" for document in documents))
        self.assertEqual([line for document in documents for line in document.lines], lines)
        answers = list(macrogpt.documents_of(f"A: {number}" for number in range(1000)))
        self.assertLessEqual(max(len(document.lines) for document in answers),
                             macrogpt.LONGEST_EXCHANGE_LINES)

    def test_held_out_is_about_the_share_and_blind_to_case_and_spacing(self) -> None:
        lines = made_up_lines(random.Random(5), 5000)
        for share, low, high in ((0.0, 0, 0), (0.1, 430, 570), (0.5, 2390, 2610),
                                 (1.0, 5000, 5000)):
            held_out = sum(macrogpt.is_held_out(macrogpt.Document((line,), True), share)
                           for line in lines)
            self.assertTrue(low <= held_out <= high, (share, held_out))
        for line in lines[:300]:
            plain = macrogpt.Document((f"H: {line} é",), True)
            other = macrogpt.Document((f"H:  {line.upper()}  E\u0301", "A: words"), False)
            self.assertEqual(macrogpt.is_held_out(plain), macrogpt.is_held_out(other))

    def test_held_out_documents_are_the_same_for_ever(self) -> None:
        held_out = [number for number in range(60) if macrogpt.is_held_out(
            macrogpt.Document((f"H: What is {number}?",), True))]
        self.assertEqual(tuple(held_out), KNOWN_HELD_OUT)


class ReadingTest(CorpusCase):
    """Files as people have them."""

    def test_newlines_of_every_system_mean_the_same(self) -> None:
        expected = self.read(b"One.\nTwo.\n\nH: a\nA: b\n").documents
        for newline in (b"\r\n", b"\r"):
            raw = newline.join([b"One.", b"Two.", b"", b"H: a", b"A: b"])
            self.assertEqual(self.read(raw).documents, expected)
            self.assertEqual(macrogpt.read_text(self.path), "One.\nTwo.\n\nH: a\nA: b")

    def test_byte_order_marks_are_obeyed_and_dropped(self) -> None:
        text = "H: é 😀\r\nA: ok\r\n"
        for bom, encoding in ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF16_LE, "utf-16-le"),
                              (codecs.BOM_UTF16_BE, "utf-16-be")):
            corpus = self.read(bom + text.encode(encoding))
            self.assertEqual(lines_in(corpus), ["H: é 😀", "A: ok"])
            self.assertEqual(corpus.notices, ())
            self.assertEqual(macrogpt.read_text(self.path), "H: é 😀\nA: ok\n")

    def test_half_a_utf16_character_is_survived(self) -> None:
        corpus = self.read(codecs.BOM_UTF16_LE + "one\n".encode("utf-16-le") + b"\x00\xd8t")
        self.assertEqual(lines_in(corpus)[0], "one")
        self.assertEqual(len(corpus.notices), 1)

    def test_bytes_that_are_not_utf8_are_kept_and_told(self) -> None:
        corpus = self.read(b"caf\xe9\nna\xc3\xafve \x96 fa\xe7ade\n")
        self.assertEqual(lines_in(corpus), ["café", "naïve – façade"])
        self.assertEqual(len(corpus.notices), 1)
        self.assertIn("cp1252: 3", corpus.notices[0])
        self.assertEqual(macrogpt.read_text(self.path), "café\nnaïve – façade\n")

    def test_nul_and_control_bytes_are_dropped(self) -> None:
        corpus = self.read(b"a\0b\tc\x1b\n\0\n\x0cd\n")
        self.assertEqual([document.lines for document in corpus.documents], [("ab c",), ("d",)])
        self.assertEqual(macrogpt.read_text(self.path), "ab\tc\x1b\n\n\x0cd\n")

    def test_an_empty_file_is_an_empty_corpus(self) -> None:
        for raw in (b"", b"\n\n  \n", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"\0\0"):
            corpus = self.read(raw)
            self.assertEqual((corpus.documents, corpus.total_lines, corpus.total_bytes),
                             ((), 0, len(raw)))
            self.assertTrue(corpus.kept_all)

    def test_long_lines_are_split_when_plain_and_cut_when_spoken(self) -> None:
        corpus = self.read(b"H:" + b"why " * 20 + b"\nA: " + b"so " * 20 + b"\n\n" + b"word " * 20,
                           max_line_chars=40)
        exchange, passage = corpus.documents
        self.assertEqual(exchange.lines, (("H: " + "why " * 9).strip(), "A:" + " so" * 12))
        self.assertEqual(" ".join(passage.lines), ("word " * 20).strip())
        self.assertEqual(corpus.total_lines, 2 + len(passage.lines))
        self.assertEqual(corpus.notices, ("lines longer than 40 characters, split or cut: 3",))

    def test_a_line_of_ten_megabytes_is_read_in_little_memory(self) -> None:
        self.path.write_bytes(b"first\n" + b"".join(
            b"%07d " % number for number in range(1_250_000)) + b"\nlast\n")
        tracemalloc.start()
        corpus = macrogpt.read_corpus(self.path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        self.assertLess(peak_bytes, 4_000_000)
        lines = lines_in(corpus)
        self.assertEqual((lines[0], lines[-1], len(lines)),
                         ("first", "last", macrogpt.MAX_LINE_PIECES + 2))
        self.assertEqual(corpus.total_bytes, 10_000_012)

    def test_reading_by_the_block_equals_cleaning_line_by_line(self) -> None:
        rng = random.Random(6)
        pieces = ["word ", "é", "e\u0301", "\n", "\r\n", "\n\n", "H: ", "A:", "\t", "\0", "😀"]
        text = "".join(rng.choices(pieces, k=40_000))
        raw = text.encode() + b"\n" + bytes(rng.choices(b"a\xe9\x80\xc3 \n", k=4000))
        lines = [macrogpt.clean_line(macrogpt.decode_line(line), 10 ** 6)
                 for line in raw.replace(b"\r\n", b"\n").split(b"\n")]
        documents = list(macrogpt.documents_of(lines))
        last_places = {document.key: place for place, document in enumerate(documents)}
        corpus = self.read(raw, max_lines=10 ** 6, max_line_chars=10 ** 6)
        self.assertEqual(corpus.documents,
                         tuple(documents[place] for place in sorted(last_places.values())))

    def test_random_bytes_never_fail_and_always_read_the_same(self) -> None:
        rng = random.Random(7)
        alphabet = list(range(256)) + list(b"\n\r \0HA:abc\xef\xbb\xbf\xff\xfe") * 20
        boms = (b"", b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        for _ in range(300):
            raw = rng.choice(boms) + bytes(rng.choices(alphabet, k=rng.randrange(600)))
            corpus = self.read(raw, max_lines=20, max_line_chars=10)
            self.assertEqual(corpus, macrogpt.read_corpus(self.path, 20, 10))
            self.assertEqual(corpus.total_bytes, len(raw))
            for line in lines_in(corpus):
                self.assertTrue(0 < len(line) <= 10)
                line.encode("utf-8")
            macrogpt.read_text(self.path).encode("utf-8")
            self.assertEqual(self.path.read_bytes(), raw)

    def test_what_is_not_a_file_is_refused_in_one_line(self) -> None:
        self.assertIn("nothing", self.refusal(self.folder / "missing.txt"))
        self.assertIn("directory", self.refusal(self.folder))
        self.refusal("a\0b")
        self.path.write_bytes(b"text\n")
        self.refusal(self.path / "below")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no FIFOs")
    def test_a_fifo_or_a_device_is_refused_without_waiting(self) -> None:
        os.mkfifo(self.path)
        self.assertIn("pipe", self.refusal(self.path))
        self.assertIn("device", self.refusal(os.devnull))
        regular = self.folder / "regular.txt"
        regular.write_bytes(b"text\n")
        status, looks = os.stat(regular), []

        def stat_that_is_late(target: object) -> os.stat_result:
            looks.append(target)
            return status if len(looks) == 1 else os.fstat(target)

        for reader in (macrogpt.read_corpus, macrogpt.read_text):
            looks.clear()
            with mock.patch("os.stat", stat_that_is_late):
                with self.assertRaises(macrogpt.CorpusError):
                    reader(self.path)

    @unittest.skipUnless(os.name == "posix", "links need special rights on this system")
    def test_a_loop_of_links_is_refused_and_a_link_is_followed(self) -> None:
        loop, other, link = (self.folder / name for name in ("loop", "other", "link"))
        loop.symlink_to(other)
        other.symlink_to(loop)
        self.refusal(loop)
        link.symlink_to(self.path)
        self.assertIn("nothing", self.refusal(link))
        corpus = self.read(b"text\n")
        self.assertEqual(macrogpt.read_corpus(link), corpus)

    @unittest.skipUnless(hasattr(os, "geteuid") and os.geteuid() != 0,
                         "permissions bind neither root nor this system's owner of the file")
    def test_a_file_that_may_not_be_read_is_refused(self) -> None:
        self.path.write_bytes(b"secret\n")
        self.path.chmod(0)
        for reader in (macrogpt.read_corpus, macrogpt.read_text):
            with self.assertRaisesRegex(macrogpt.CorpusError, "permission"):
                reader(self.path)

    def test_a_failing_disk_or_a_denied_opening_is_a_corpus_error(self) -> None:
        self.path.write_bytes(b"text\n")
        for failure in (PermissionError(13, "Permission denied"), OSError(5, "I/O error")):
            with mock.patch("os.open", side_effect=failure):
                with self.assertRaisesRegex(macrogpt.CorpusError, failure.strerror):
                    macrogpt.read_corpus(self.path)

    @unittest.skipUnless(os.name == "posix", "an open file cannot be removed on this system")
    def test_a_file_that_vanishes_or_shrinks_meanwhile_gives_what_was_read(self) -> None:
        raw = b"".join(b"line %d\n\n" % number for number in range(50_000))
        real_open = os.open
        for spoil in (lambda: self.path.unlink(), lambda: os.truncate(self.path, 10_001)):
            def open_and_spoil(*arguments: object) -> int:
                descriptor = real_open(*arguments)
                spoil()
                return descriptor

            self.path.write_bytes(raw)
            with mock.patch("os.open", open_and_spoil):
                corpus = macrogpt.read_corpus(self.path, max_lines=10 ** 6)
            self.assertIn(corpus.total_bytes, (len(raw), 10_001))
            self.assertEqual(lines_in(corpus)[:2], ["line 0", "line 1"])
            self.assertEqual(corpus.total_lines, len(corpus.documents))

    def test_the_stamp_notices_writing_and_saving_by_rename(self) -> None:
        corpus = self.read(b"text\n")
        stamp = macrogpt.file_stamp(self.path)
        self.assertEqual(corpus.stamp, stamp)
        self.assertEqual(stamp.size, 5)
        copy = self.folder / "copy"
        copy.write_bytes(b"test\n")
        os.utime(copy, ns=(stamp.mtime_ns, stamp.mtime_ns))
        os.replace(copy, self.path)
        self.assertNotEqual(macrogpt.file_stamp(self.path), stamp)
        self.assertEqual(macrogpt.file_stamp(self.path).mtime_ns, stamp.mtime_ns)


class ReservoirTest(CorpusCase):
    """Files too big to keep, repeats, and what changed."""

    def write_documents(self, documents: List[List[str]], max_lines: int) -> macrogpt.Corpus:
        """Write the documents with a blank line after each and read them."""
        return self.read("\n".join("\n".join(lines) + "\n" for lines in documents).encode(),
                         max_lines=max_lines)

    def test_the_reservoir_is_the_newest_and_then_the_smallest_hashes(self) -> None:
        rng = random.Random(8)
        for max_lines in (1, 7, 40, 200):
            sizes = [rng.randrange(1, 6) for _ in range(400)]
            lines = iter(made_up_lines(rng, sum(sizes)))
            documents = [[next(lines) for _ in range(size)] for size in sizes]
            corpus = self.write_documents(documents, max_lines)
            whole = [macrogpt.Document(tuple(lines), True) for lines in documents]
            first, newest_lines = len(whole) - 1, sizes[-1]
            kept = {first}
            while newest_lines + sizes[first - 1] <= max_lines // 2:
                first -= 1
                newest_lines += sizes[first]
                kept.add(first)
            room = max_lines - newest_lines
            for place in sorted(range(first), key=lambda place: whole[place].key):
                room -= sizes[place]
                if room < 0:
                    break
                kept.add(place)
            self.assertEqual(corpus.documents, tuple(whole[place] for place in sorted(kept)))
            self.assertEqual((corpus.kept_all, corpus.total_lines), (False, sum(sizes)))
            self.assertIn(f"of {sum(sizes)} lines", corpus.notices[0])

    def test_what_fits_is_kept_whole_however_often_it_is_repeated(self) -> None:
        lines = made_up_lines(random.Random(9), 100)
        for copies in (1, 2, 7):
            corpus = self.write_documents([[line] for line in lines] * copies, max_lines=100)
            self.assertEqual(lines_in(corpus), lines)
            self.assertEqual((corpus.kept_all, corpus.notices), (True, ()))
            self.assertEqual(corpus.total_lines, 100 * copies)

    def test_a_repeated_document_is_kept_at_its_last_place(self) -> None:
        corpus = self.write_documents([["one"], ["two"], ["one"], ["three"]], max_lines=100)
        self.assertEqual(lines_in(corpus), ["two", "one", "three"])
        lines = made_up_lines(random.Random(11), 99)
        corpus = self.write_documents([["same"]] * 500 + [[line] for line in lines], 100)
        self.assertEqual((lines_in(corpus), corpus.kept_all), (["same"] + lines, True))

    def test_an_edit_hardly_moves_the_sample(self) -> None:
        rng = random.Random(10)
        documents = [[line] for line in made_up_lines(rng, 3000)]
        before = self.write_documents(documents, 400)
        keys = {document.key for document in before.documents}
        for place in (0, 1500, 2900, 3000):
            edited = documents[:place] + [["an inserted line"]] + documents[place:]
            added, removed = macrogpt.changes(keys, self.write_documents(edited, 400))
            self.assertLessEqual(len(added), 2)
            self.assertLessEqual(len(removed), 2)
        self.assertEqual(added[-1].lines, ("an inserted line",))

    def test_changes_are_the_documents_that_differ(self) -> None:
        old = self.write_documents([["one", "two"], ["three"], ["four"]], 100)
        new = self.write_documents([["four"], ["one", "five"], ["three"]], 100)
        added, removed = macrogpt.changes({document.key for document in old.documents}, new)
        self.assertEqual([document.lines for document in added], [("one", "five")])
        self.assertEqual(removed, {old.documents[0].key})

    def test_budgets_too_small_to_mean_anything_are_an_error(self) -> None:
        self.path.write_bytes(b"text\n")
        with self.assertRaises(ValueError):
            macrogpt.read_corpus(self.path, max_lines=0)
        with self.assertRaises(ValueError):
            macrogpt.read_corpus(self.path, max_line_chars=3)


class Losses(unittest.TestCase):
    def test_a_corrected_line_is_told_from_one_that_is_gone(self):
        lost = ["The hern sleeps on one leg.", "My lamp is made of quartz."]
        fresh = ["The heron sleeps on one leg.", "Ferries leave at seven."]
        self.assertEqual(macrogpt.corrected_lines(lost, fresh), {lost[0]})
        self.assertEqual(macrogpt.corrected_lines(lost, []), set())

    def test_of_a_text_that_was_replaced_every_line_is_gone(self):
        lost = [f"Line number {i} of the old text." for i in range(macrogpt.MOST_CORRECTIONS + 1)]
        self.assertEqual(macrogpt.corrected_lines(lost, [line + "." for line in lost]), set())

    def test_lines_are_found_in_a_file_as_they_are_read_from_it(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "c.txt")
            with open(path, "w", encoding="utf-8") as file:
                file.write("  one line \n\ntwo\tlines\nthree\n")
            wanted = {"one line", "two lines", "four"}
            self.assertEqual(macrogpt.lines_still_in(path, wanted, 240), {"one line", "two lines"})


if __name__ == "__main__":
    unittest.main()
