"""Claims about the tokenizer: lossless, append-only, equal to its slow twins and to GPT-2."""

from __future__ import annotations

import json
import random
import unicodedata
import unittest
from collections import Counter
from typing import Callable, Dict, List, Sequence, Tuple

import macrogpt

WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
                  "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")  # Unicode's PropList
TRICKY = list(" \t\n\r\v\f\x00\x1c\x1d\x1e\x1f\x85\xa0\u2003\u3000'’stredvmlaAzZ09_-!.é٣Ⅷ①ñ中"
              "\u0301\u200d\u200b\u180e\ufeff😀\ud800\udbff\udc00\udfff\U0010ffff")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def random_text(rng: random.Random, chars: int) -> str:
    """Half from characters that matter to the rules, half from all of Unicode."""
    return "".join(rng.choice(TRICKY) if rng.random() < 0.5 else chr(rng.randrange(0x110000))
                   for _ in range(chars))


def wordy_text(rng: random.Random, words: int) -> str:
    """Words over few letters, the shorter the commoner, so that merges abound and often tie."""
    return " ".join("".join(rng.choice("aabcé") for _ in range(rng.randint(1, 7)))
                    for _ in range(words))


def grown_tokenizer(seed: int = 3, merges: int = 120) -> macrogpt.EvolvingTokenizer:
    tokenizer = macrogpt.EvolvingTokenizer()
    rng = random.Random(seed)
    tokenizer.learn_merges([wordy_text(rng, 400), random_text(rng, 400), "don't 'll 😀😀"], merges)
    return tokenizer


def naive_kind(char: str) -> str:
    category = unicodedata.category(char)[0]
    return "white" if char in WHITE_SPACE else category if category in "LN" else "sign"


def naive_pre_tokens(text: str) -> List[str]:
    """GPT-2's alternatives tried in order at each place, with no regular expression."""
    def run(start: int, kind: str) -> int:
        while start < len(text) and naive_kind(text[start]) == kind:
            start += 1
        return start

    pieces, start = [], 0
    while start < len(text):
        ends = [start + len(short) for short in CONTRACTIONS if text.startswith(short, start)]
        body = start + (text[start] == " ")
        ends += [run(body, kind) for kind in ("L", "N", "sign") if run(body, kind) > body]
        if not ends:  # white space: its last character is left to the word after it
            end = run(start, "white")
            ends = [end if end == len(text) or end == start + 1 else end - 1]
        pieces.append(text[start:ends[0]])
        start = ends[0]
    return pieces


def naive_encode(text: str, merges: Sequence[Tuple[int, int]]) -> List[int]:
    """Join one pair at a time: of lowest rank, then leftmost."""
    ids: List[int] = []
    for piece in naive_pre_tokens(text):
        word = [1 + byte for byte in piece.encode("utf-8", "surrogatepass")]
        while True:
            ranked = [(merges.index(pair), place) for place, pair in enumerate(zip(word, word[1:]))
                      if pair in merges]
            if not ranked:
                break
            rank, place = min(ranked)
            word[place:place + 2] = [257 + rank]
        ids += word
    return ids


def naive_learn(texts: Sequence[str], merges: List[Tuple[int, int]], count: int, least: int,
                spell: Callable[[int], bytes]) -> None:
    """Encode and count everything afresh for each merge; append to `merges`."""
    spellings: Dict[int, bytes] = {token_id: spell(token_id) for token_id in range(257)}
    for rank, (left, right) in enumerate(merges):
        spellings[257 + rank] = spellings[left] + spellings[right]
    pieces = Counter(piece for text in texts for piece in naive_pre_tokens(text))
    for _ in range(count):
        counts: Counter = Counter()
        for piece, weight in pieces.items():
            ids = naive_encode(piece, merges)
            for pair in zip(ids, ids[1:]):
                counts[pair] += weight
        offers = [(-number, pair) for pair, number in counts.items() if number >= least
                  and spellings[pair[0]] + spellings[pair[1]] not in spellings.values()]
        if not offers:
            return
        pair = min(offers)[1]
        spellings[257 + len(merges)] = spellings[pair[0]] + spellings[pair[1]]
        merges.append(pair)


class PreTokenClaims(unittest.TestCase):
    def test_pre_tokens_give_the_known_answers(self) -> None:
        for text, pieces in [
            ("", []),
            ("Hello, world!", ["Hello", ",", " world", "!"]),
            ("it's we'll they've I'd", ["it", "'s", " we", "'ll", " they", "'ve", " I", "'d"]),
            ("IT'S 'street", ["IT", "'", "S", " '", "street"]),
            ("'street", ["'s", "treet"]),
            ("it’s", ["it", "’", "s"]),
            ("a  b\n\n c", ["a", " ", " b", "\n\n", " c"]),
            ("a\n\nb", ["a", "\n", "\n", "b"]),
            ("tail   ", ["tail", "   "]),
            ("x86 in 2024", ["x", "86", " in", " 2024"]),
            ("a\xa0b\u3000\u3000c", ["a", "\xa0", "b", "\u3000", "\u3000", "c"]),
            ("a\x1c\x1fb", ["a", "\x1c\x1f", "b"]),
            ("e\u0301", ["e", "\u0301"]),
            ("Ωμέγα Ⅷ①٣ 中文。", ["Ωμέγα", " Ⅷ①٣", " 中文", "。"]),
            ("snake_case", ["snake", "_", "case"]),
            (" 😀\ud800", [" 😀\ud800"]),
        ]:
            with self.subTest(text=text):
                self.assertEqual(macrogpt.pre_tokens(text), pieces)

    def test_pre_tokens_equal_the_naive_scan_and_join_to_the_text(self) -> None:
        rng = random.Random(11)
        texts = [random_text(rng, rng.randrange(40)) for _ in range(600)]
        texts += ["".join(rng.choice(" 't'sre\nl0!\x1f") for _ in range(20)) for _ in range(300)]
        for text in texts:
            self.assertEqual(macrogpt.pre_tokens(text), naive_pre_tokens(text))
            self.assertEqual("".join(macrogpt.pre_tokens(text)), text)

    def test_every_character_is_of_its_unicode_kind(self) -> None:
        chars = [chr(code) for code in range(0, 0x110000, 7)] + sorted(WHITE_SPACE)
        for char in chars:
            text, pieces = {"L": (f"a{char}a", [f"a{char}a"]),
                            "N": (f"1{char}1", [f"1{char}1"]),
                            "sign": (f"!{char}!", [f"!{char}!"]),
                            "white": (f"\t{char}\t", [f"\t{char}\t"])}[naive_kind(char)]
            self.assertEqual(macrogpt.pre_tokens(text), pieces, ascii(char))

    def test_pre_tokens_equal_those_of_the_regex_package(self) -> None:
        try:
            import regex
        except ImportError:
            self.skipTest("needs the package `regex`, which knows \\p{L}; it is not installed")
        pattern = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
                                r"|\s+(?!\S)|\s+")
        rng = random.Random(12)
        for _ in range(2000):  # without the characters this Python's Unicode has yet to assign
            text = "".join(char for char in random_text(rng, 40)
                           if unicodedata.category(char) != "Cn")
            self.assertEqual(macrogpt.pre_tokens(text), pattern.findall(text))


class EncodingClaims(unittest.TestCase):
    def test_ids_are_the_special_then_the_bytes_then_the_merges(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer([(105, 106), (257, 34)])
        self.assertEqual(macrogpt.END_OF_TEXT, 0)
        self.assertEqual(tokenizer.token_bytes(0), b"")
        self.assertEqual([tokenizer.token_bytes(1 + byte) for byte in range(256)],
                         [bytes([byte]) for byte in range(256)])
        self.assertEqual((tokenizer.token_bytes(257), tokenizer.token_bytes(258)), (b"hi", b"hi!"))
        self.assertEqual((tokenizer.vocab_size, tokenizer.version), (259, 2))

    def test_decoding_an_encoding_gives_every_text_back(self) -> None:
        rng = random.Random(1)
        texts = ["", "\x00", "\ud83d\ude00", "\ude00\ud83d", "\ud800", "e\u0301\u200d", "👩‍👩‍👧‍👦🇫🇷",
                 "\ufffd\ufffe\uffff\U0010ffff", "<|endoftext|>"]
        texts += [random_text(rng, rng.randrange(60)) for _ in range(500)]
        for tokenizer in (macrogpt.EvolvingTokenizer(), grown_tokenizer()):
            for text in texts:
                self.assertEqual(tokenizer.decode(tokenizer.encode(text)), text)

    def test_the_empty_text_has_no_ids(self) -> None:
        self.assertEqual(grown_tokenizer().encode(""), [])
        self.assertEqual(grown_tokenizer().decode([]), "")

    def test_encoding_equals_the_naive_twin_warm_and_cold(self) -> None:
        tokenizer, rng = grown_tokenizer(), random.Random(2)
        merges = list(tokenizer.merges)
        for _ in range(60):
            text = wordy_text(rng, 8) + random_text(rng, 10) + "a" * rng.randrange(9)
            expected = naive_encode(text, merges)
            self.assertEqual(tokenizer.encode(text), expected)
            self.assertEqual(tokenizer.encode(text), expected)

    def test_ranks_rule_over_places(self) -> None:
        # a=98 b=99 c=100. "abc": (b,c) came first, so it wins although (a,b) stands to the left.
        tokenizer = macrogpt.EvolvingTokenizer([(99, 100), (98, 99), (98, 98), (259, 98)])
        self.assertEqual(tokenizer.encode("abc"), [98, 257])
        self.assertEqual(tokenizer.encode("ab"), [258])
        self.assertEqual(tokenizer.encode("aaa"), [260])
        self.assertEqual(tokenizer.encode("aaaa"), [259, 259])

    def test_the_literal_name_of_the_special_is_ordinary_text(self) -> None:
        ids = grown_tokenizer().encode("a<|endoftext|>b")
        self.assertNotIn(macrogpt.END_OF_TEXT, ids)
        self.assertEqual(grown_tokenizer().decode(ids), "a<|endoftext|>b")

    def test_an_old_version_encodes_as_it_did_then(self) -> None:
        tokenizer, rng = macrogpt.EvolvingTokenizer(), random.Random(4)
        texts = [wordy_text(rng, 30) for _ in range(4)]
        history = []
        for text in texts:
            tokenizer.learn_merges([text], 15)
            history.append((tokenizer.version, [tokenizer.encode(each) for each in texts]))
        self.assertEqual(len({version for version, _ in history}), 4)
        for version, encodings in history:
            self.assertEqual([tokenizer.encode(each, version) for each in texts], encodings)
        self.assertEqual(tokenizer.encode("abc", 0), [98, 99, 100])

    def test_more_pieces_than_the_cache_holds_encode_the_same(self) -> None:
        tokenizer = grown_tokenizer(merges=20)
        text = " ".join(str(number) for number in range(macrogpt.CACHED_PRE_TOKENS + 50))
        first = tokenizer.encode(text)
        self.assertEqual(tokenizer.encode(text), first)
        self.assertEqual(tokenizer.decode(first), text)

    def test_encodings_equal_those_of_the_tokenizers_package(self) -> None:
        try:
            from tokenizers import Tokenizer, models, pre_tokenizers
        except ImportError:
            self.skipTest("needs the package `tokenizers` as an oracle; it is not installed")
        tokenizer, rng = grown_tokenizer(), random.Random(5)
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes shown as themselves
        others = [byte for byte in range(256) if byte not in plain]
        glyphs = {**{byte: chr(byte) for byte in plain},
                  **{byte: chr(256 + place) for place, byte in enumerate(others)}}
        names = ["<|endoftext|>"] + ["".join(glyphs[byte] for byte in tokenizer.token_bytes(each))
                                     for each in range(1, tokenizer.vocab_size)]
        oracle = Tokenizer(models.BPE(vocab={name: place for place, name in enumerate(names)},
                                      merges=[(names[a], names[b]) for a, b in tokenizer.merges]))
        oracle.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        for _ in range(1000):
            text = wordy_text(rng, 6) + "".join(char for char in random_text(rng, 20)
                                                if unicodedata.category(char) not in ("Cn", "Cs"))
            self.assertEqual(tokenizer.encode(text), oracle.encode(text).ids)

    def test_a_merge_limit_out_of_range_is_an_error(self) -> None:
        tokenizer = grown_tokenizer(merges=5)
        for limit in (-1, 6):
            with self.assertRaisesRegex(ValueError, f"{limit}; expected 0 to 5"):
                tokenizer.encode("a", limit)


class LearningClaims(unittest.TestCase):
    def test_merges_worked_out_by_hand(self) -> None:
        # "abab", " abab", " ab": ab occurs 5 times. With X = ab, XX and " X" then tie at 2, and
        # " X" has the lower ids. After it every pair stands alone.
        tokenizer = macrogpt.EvolvingTokenizer()
        self.assertEqual(tokenizer.learn_merges(["abab abab ab"], 10), 2)
        self.assertEqual(tokenizer.merges, ((98, 99), (33, 257)))

    def test_learning_equals_the_naive_twin(self) -> None:
        rng = random.Random(6)
        for least, old in ((2, []), (1, [(98, 99), (257, 98)]), (4, [(98, 98), (257, 257)])):
            texts = [wordy_text(rng, 12), "aaaaaaa aaaa'll 😀😀 ", random_text(rng, 12)]
            tokenizer, twin = macrogpt.EvolvingTokenizer(old), list(old)
            learned = tokenizer.learn_merges(iter(texts), 40, least)
            naive_learn(texts, twin, 40, least, tokenizer.token_bytes)
            self.assertEqual(list(tokenizer.merges), twin)
            self.assertEqual(learned, len(twin) - len(old))
            self.assertGreater(learned, 0)

    def test_learning_only_appends(self) -> None:
        tokenizer, rng = macrogpt.EvolvingTokenizer(), random.Random(7)
        for _ in range(5):
            merges = tokenizer.merges
            spellings = [tokenizer.token_bytes(each) for each in range(tokenizer.vocab_size)]
            learned = tokenizer.learn_merges([wordy_text(rng, 40)], 12)
            self.assertGreater(learned, 0)
            self.assertEqual(tokenizer.version, len(merges) + learned)
            self.assertEqual(tokenizer.merges[:len(merges)], merges)
            self.assertEqual([tokenizer.token_bytes(each) for each in range(len(spellings))],
                             spellings)

    def test_learning_in_two_steps_equals_learning_at_once(self) -> None:
        texts = [wordy_text(random.Random(8), 100)]
        once, twice = macrogpt.EvolvingTokenizer(), macrogpt.EvolvingTokenizer()
        once.learn_merges(texts, 50)
        twice.learn_merges(texts, 20)
        twice.encode(texts[0])
        twice.learn_merges(texts, 30)
        self.assertEqual(once.merges, twice.merges)
        self.assertEqual(once.encode(texts[0]), twice.encode(texts[0]))

    def test_ten_growths_in_a_row_leave_every_text_and_every_old_encoding_as_they_were(self):
        rng, tokenizer, kept = random.Random(3), macrogpt.EvolvingTokenizer(), []
        texts = ["ünï 你好 \ud800 a\tb\n\n  c", "", "0 12  345 ''s 'll"]
        for growth in range(10):
            word = "".join(rng.choices("abcdefghijklm \n", k=12))
            texts.append(" ".join([word] * 8))
            self.assertGreater(tokenizer.learn_merges(texts[-1:], 8, 2), 0)
            kept.append((tokenizer.version, [tokenizer.encode(text) for text in texts]))
        self.assertEqual(sorted({version for version, _ in kept}), [v for v, _ in kept])
        for version, encodings in kept:
            for text, ids in zip(texts, encodings):
                self.assertEqual(tokenizer.encode(text, version), ids)
                self.assertEqual(tokenizer.decode(ids), text)

    def test_the_order_of_texts_has_no_effect(self) -> None:
        texts = [wordy_text(random.Random(seed), 20) for seed in range(6)]
        forth, back = macrogpt.EvolvingTokenizer(), macrogpt.EvolvingTokenizer()
        forth.learn_merges(texts, 40)
        back.learn_merges(texts[::-1], 40)
        self.assertEqual(forth.merges, back.merges)

    def test_no_merge_crosses_a_pre_token_boundary(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer()
        self.assertEqual(tokenizer.learn_merges(["a1" * 50, "a" "!" * 50], 1, 50), 0)
        tokenizer.learn_merges(["to be or not to be, to be!" * 9], 500, 1)
        for token_id in range(257, tokenizer.vocab_size):
            text = tokenizer.token_bytes(token_id).decode()
            self.assertEqual(macrogpt.pre_tokens(text), [text])

    def test_no_two_ids_spell_the_same_bytes(self) -> None:
        # bc, ab, ab+c: "abc" encodes to a,bc, which spell id 259: passed over.
        tokenizer = macrogpt.EvolvingTokenizer([(99, 100), (98, 99), (258, 100)])
        self.assertEqual(tokenizer.learn_merges(["abc abc"], 9, 1), 2)
        self.assertEqual(tokenizer.merges[3:], ((33, 98), (260, 257)))
        with self.assertRaisesRegex(ValueError, "spells b'ab'; expected a new"):
            macrogpt.EvolvingTokenizer([(98, 99), (98, 99)])

    def test_senseless_learning_requests_are_errors(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer()
        for texts, count, least in (("one text", 1, 2), (["a"], -1, 2), (["a"], 1, 0)):
            with self.assertRaisesRegex(ValueError, "expected"):
                tokenizer.learn_merges(texts, count, least)
        self.assertEqual(tokenizer.learn_merges(["aa aa"], 0), 0)
        self.assertEqual(tokenizer.learn_merges([], 5), 0)


class DecodingClaims(unittest.TestCase):
    def test_broken_bytes_decode_to_replacement_characters(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer()
        for data, text in [(b"\xff", "\ufffd"), (b"a\x80b", "a\ufffdb"), (b"\xe2\x82", "\ufffd"),
                           (b"\xe2\x82!", "\ufffd!"), (b"\xed\xa0\x80", "\ud800"),
                           (b"\xf0\x9f\xed\xa0\x80", "\ufffd\ud800"),
                           (b"\xed\xa0", "\ufffd\ufffd"), (b"\xc0\xaf", "\ufffd\ufffd")]:
            self.assertEqual(tokenizer.decode([1 + byte for byte in data]), text, data)

    def test_the_special_decodes_to_nothing(self) -> None:
        self.assertEqual(macrogpt.EvolvingTokenizer().decode([0, 98, 0, 0, 99, 0]), "ab")

    def test_an_id_out_of_range_is_an_error(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer()
        stream = macrogpt.StreamDecoder(tokenizer)
        for token_id in (-1, 257):
            for call in (tokenizer.token_bytes, stream.feed,
                         lambda each: tokenizer.decode([98, each])):
                with self.assertRaisesRegex(ValueError, f"{token_id} .*expected 0 to 256"):
                    call(token_id)

    def test_the_stream_equals_decode_for_any_ids(self) -> None:
        tokenizer, rng = grown_tokenizer(), random.Random(9)
        lively_bytes = b"a\xed\xa0\x80\xbf\xb0\x9f\xf0\xf4\xe2\xc3\xff\x8f"
        lively = [macrogpt.END_OF_TEXT] + [1 + byte for byte in lively_bytes]
        stream = macrogpt.StreamDecoder(tokenizer)  # one for all: flush leaves it as new
        for round_number in range(1500):
            choices = lively if round_number % 2 else range(tokenizer.vocab_size)
            ids = [rng.choice(choices) for _ in range(rng.randrange(14))]
            text = "".join([stream.feed(token_id) for token_id in ids] + [stream.flush()])
            self.assertEqual(text, tokenizer.decode(ids), ids)

    def test_the_stream_never_shows_half_a_character(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer()
        for text in ("aé€😀\ud800中\x00", "👩‍👧 e\u0301"):
            stream = macrogpt.StreamDecoder(tokenizer)
            shown = [stream.feed(token_id) for token_id in tokenizer.encode(text)]
            self.assertEqual([part for part in shown if part], list(text))
            self.assertEqual(stream.flush(), "")
        shown = [stream.feed(token_id) for token_id in tokenizer.encode("😀")[:3]]
        self.assertEqual(shown + [stream.flush(), stream.flush()], ["", "", "", "\ufffd", ""])


class StorageClaims(unittest.TestCase):
    def test_unpacking_a_pack_gives_the_same_tokenizer(self) -> None:
        text = wordy_text(random.Random(10), 50)
        for tokenizer in (macrogpt.EvolvingTokenizer(), grown_tokenizer()):
            copy = macrogpt.EvolvingTokenizer.unpack(tokenizer.pack())
            self.assertEqual(copy.merges, tokenizer.merges)
            self.assertEqual(copy.pack(), tokenizer.pack())
            self.assertEqual(copy.encode(text), tokenizer.encode(text))
            self.assertEqual(copy.learn_merges([text], 5), tokenizer.learn_merges([text], 5))
            self.assertEqual(copy.merges, tokenizer.merges)

    def test_the_pack_names_its_format_version(self) -> None:
        document = json.loads(macrogpt.EvolvingTokenizer([(98, 99)]).pack())
        self.assertEqual(document, {"format": "macrogpt-tokenizer", "format_version": 1,
                                    "merges": [[98, 99]]})

    def test_bad_blobs_are_errors_that_say_what_was_expected(self) -> None:
        good = json.loads(macrogpt.EvolvingTokenizer([(98, 99)]).pack())
        bad_merges = [None, {}, 5, [5], [[98]], [[98, 99, 100]], [[98, "99"]], [[98, True]],
                      [[98.0, 99]], [[0, 98]], [[98, 257]], [[-1, 98]], [[98, 99], [98, 99]]]
        blobs = [b"", b"\xff\xfe\x00", b"[" * 100_000, b"[]", b"{}", b"null", b'"text"',
                 json.dumps({**good, "format": "other"}).encode(),
                 json.dumps({**good, "format_version": 2}).encode()]
        blobs += [json.dumps({**good, "merges": merges}).encode() for merges in bad_merges]
        for blob in blobs:
            with self.subTest(blob=blob[:80]):
                with self.assertRaisesRegex(ValueError, "expected"):
                    macrogpt.EvolvingTokenizer.unpack(blob)

    def test_a_merge_list_cannot_be_changed_from_outside(self) -> None:
        tokenizer = macrogpt.EvolvingTokenizer([(98, 99)])
        self.assertIsInstance(tokenizer.merges, tuple)
        with self.assertRaises(AttributeError):
            tokenizer.merges = ()
        ids = tokenizer.encode("ab")
        ids.append(7)
        self.assertEqual(tokenizer.encode("ab"), [257])


if __name__ == "__main__":
    unittest.main()
