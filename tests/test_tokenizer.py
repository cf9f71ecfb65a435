"""Claims about the tokenizer: lossless, append-only, equal to its slow twins."""
import functools
import json
import random
import unicodedata
import unittest
from collections import Counter

import macrogpt as m

WHITE_SPACE = set("\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007"
                  "\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000")  # Unicode's PropList
TRICKY = list(" \t\n\r\v\f\x00\x1c\x1d\x1e\x1f\x85\xa0\u2003\u3000'’stredvmlaAzZ09_-!.é٣Ⅷ①ñ中"
              "\u0301\u200d\u200b\u180e\ufeff😀\ud800\udbff\udc00\udfff\U0010ffff")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


def random_text(rng, chars):
    """Half from characters that matter to the rules, half from all of Unicode."""
    return "".join(rng.choice(TRICKY) if rng.random() < 0.5 else chr(rng.randrange(0x110000))
                   for _ in range(chars))


def wordy_text(rng, words):
    """Words over few letters, the shorter the commoner, so that merges abound and often tie."""
    return " ".join("".join(rng.choice("aabcé") for _ in range(rng.randint(1, 7)))
                    for _ in range(words))


def grown_tokenizer():
    tokenizer, rng = m.EvolvingTokenizer(), random.Random(3)
    tokenizer.learn_merges([wordy_text(rng, 400), random_text(rng, 400), "don't 'll 😀😀"], 120)
    return tokenizer


@functools.lru_cache(None)
def naive_kind(char):
    if char in WHITE_SPACE:
        return "white"
    return {"L": "L", "M": "L", "N": "N"}.get(unicodedata.category(char)[0], "sign")


def naive_pre_tokens(text):
    """GPT-2's alternatives tried in order at each place, with no regular expression."""
    def run(start, kind):
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


def naive_encode(text, merges):
    """Join one pair at a time: of lowest rank, then leftmost."""
    ids, ranks = [], {pair: rank for rank, pair in enumerate(merges)}
    for piece in naive_pre_tokens(text):
        word = [1 + byte for byte in piece.encode("utf-8", "replace")]
        while True:
            ranked = [(ranks[pair], place) for place, pair in enumerate(zip(word, word[1:]))
                      if pair in ranks]
            if not ranked:
                break
            rank, place = min(ranked)
            word[place:place + 2] = [257 + rank]
        ids += word
    return ids


def naive_learn(texts, merges, count, least):
    """Encode and count everything afresh for each merge; append to `merges`."""
    spelt = [b"", *(bytes([byte]) for byte in range(256))]
    for left, right in merges:
        spelt.append(spelt[left] + spelt[right])
    pieces = Counter(piece for text in texts for piece in naive_pre_tokens(text))
    for _ in range(count):
        counts = Counter()
        for piece, weight in pieces.items():
            ids = naive_encode(piece, merges)
            for pair in zip(ids, ids[1:]):
                counts[pair] += weight
        offers = [(-number, pair) for pair, number in counts.items()
                  if number >= least and spelt[pair[0]] + spelt[pair[1]] not in spelt]
        if not offers:
            return
        pair = min(offers)[1]
        spelt.append(spelt[pair[0]] + spelt[pair[1]])
        merges.append(pair)


class Tokenizer(unittest.TestCase):
    def test_pre_tokens_give_the_known_answers_equal_the_naive_scan_and_join_to_the_text(self):
        rng = random.Random(11)
        for pieces in (
                [], ["Hello", ",", " world", "!"], ["a", " ", " b", "\n\n", " c"],
                ["it", "'s", " we", "'ll", " they", "'ve", " I", "'d"], ["it", "’", "s"],
                ["IT", "'", "S", " '", "street"], ["'s", "treet"], ["a", "\n", "\n", "b"],
                ["tail", "   "], ["x", "86", " in", " 2024"], ["e\u0301", " x"],
                ["a", "\xa0", "b", "\u3000", "\u3000", "c"], ["a", "\x1c\x1f", "b"],
                ["Ωμέγα", " Ⅷ①٣", " 中文", "。"], ["snake", "_", "case"], [" 😀\ud800"],
                # a word with vowel signs and tone marks is one piece
                ["मेरी", " बेटी", " का", " नाम", " मीरा", " है", "!"], ["ลูกสาวของฉันชื่อมาลี"],
                ["السَّلَامُ", " عَلَيْكُمْ"], ["வணக்கம்"], ["שָׁלוֹם"], ["u\u0308ber"]):
            self.assertEqual(m.pre_tokens("".join(pieces)), pieces)
        texts = [random_text(rng, rng.randrange(40)) for _ in range(300)]
        texts += ["".join(rng.choice(" 't'sre\nl0!\x1f") for _ in range(20)) for _ in range(300)]
        texts += [f"a{char}a1{char}1!{char}!\t{char}\t {char}" for char in
                  (*map(chr, range(0, 0x110000, 499)), *WHITE_SPACE)]
        for text in texts:
            self.assertEqual(m.pre_tokens(text), naive_pre_tokens(text), ascii(text))
            self.assertEqual("".join(m.pre_tokens(text)), text)

    def test_ids_are_the_special_then_the_bytes_then_the_merges(self):
        tokenizer = m.EvolvingTokenizer([(105, 106), (257, 34)])
        self.assertEqual(m.END_OF_TEXT, 0)
        self.assertEqual([tokenizer.token_bytes(token_id) for token_id in range(259)],
                         [b"", *(bytes([byte]) for byte in range(256)), b"hi", b"hi!"])
        self.assertEqual((tokenizer.vocab_size, tokenizer.version), (259, 2))

    def test_decoding_gives_every_text_back_and_encoding_equals_the_naive_twin_warm_and_cold(self):
        grown, rng = grown_tokenizer(), random.Random(1)
        texts = ["", "\0", "e\u0301\u200d", "👩‍👩‍👧‍👦🇫🇷", "\ufffd\ufffe\uffff", "<|endoftext|>"]
        texts += [wordy_text(rng, 4) + random_text(rng, rng.randrange(40)) + "a" * rng.randrange(9)
                  for _ in range(100)]
        for tokenizer in (m.EvolvingTokenizer(), grown):
            for text in texts:
                valid = text.encode("utf-8", "replace").decode()  # a "?" for each lone surrogate
                cold = tokenizer.encode(valid)
                self.assertEqual(tokenizer.decode(cold), valid)
                self.assertEqual(cold, naive_encode(valid, tokenizer.merges))
                self.assertNotIn(m.END_OF_TEXT, cold)
                cold.append(7)  # the caller's own list
                for again in (text, valid):
                    self.assertEqual(tokenizer.encode(again), cold[:-1])
        numbers = " ".join(map(str, range(m.CACHED_PRE_TOKENS + 50)))  # too many to be kept
        self.assertEqual([grown.decode(grown.encode(numbers)) for _ in "12"], [numbers, numbers])

    def test_broken_bytes_are_replacement_characters_and_an_id_out_of_range_is_an_error(self):
        tokenizer = m.EvolvingTokenizer()
        self.assertEqual(tokenizer.decode([0, 98, 0, 0, 99, 0]), "ab")
        for data, text in [(b"\xff", "\ufffd"), (b"a\x80b", "a\ufffdb"), (b"\xe2\x82", "\ufffd"),
                           (b"\xe2\x82!", "\ufffd!"), (b"\xed\xa0\x80", "\ufffd" * 3),
                           (b"\xc0\xaf", "\ufffd\ufffd")]:
            self.assertEqual(tokenizer.decode([1 + byte for byte in data]), text, data)
        for token_id in (-1, 257):
            for call in (tokenizer.token_bytes, m.StreamDecoder(tokenizer).feed,
                         lambda each: tokenizer.decode([98, each])):
                with self.assertRaisesRegex(ValueError, f"{token_id} .*expected 0 to 256"):
                    call(token_id)

    def test_the_stream_equals_decode_for_any_ids_and_never_shows_half_a_character(self):
        tokenizer, rng = grown_tokenizer(), random.Random(9)
        lively = [0, *(1 + byte for byte in b"a\xed\xa0\x80\xbf\xb0\x9f\xf0\xf4\xe2\xc3\xff\x8f")]
        stream = m.StreamDecoder(tokenizer)  # one for all: flush leaves it as new
        for round_number in range(1500):
            choices = lively if round_number % 2 else range(tokenizer.vocab_size)
            ids = [rng.choice(choices) for _ in range(rng.randrange(14))]
            text = "".join([stream.feed(token_id) for token_id in ids] + [stream.flush()])
            self.assertEqual(text, tokenizer.decode(ids), ids)
        tokenizer = m.EvolvingTokenizer()
        stream = m.StreamDecoder(tokenizer)
        for text in ("aé€😀中\x00", "👩‍👧 e\u0301"):
            shown = [stream.feed(token_id) for token_id in tokenizer.encode(text)]
            self.assertEqual([part for part in shown if part], list(text))
            self.assertEqual(stream.flush(), "")
        shown = [stream.feed(token_id) for token_id in tokenizer.encode("😀")[:3]]
        self.assertEqual(shown + [stream.flush(), stream.flush()], ["", "", "", "\ufffd", ""])

    def test_learning_by_hand_and_by_the_naive_twin_in_any_order_and_in_steps_is_the_same(self):
        # "abab", " abab", " ab": ab occurs 5 times. With X = ab, XX and " X" then tie at 2, and
        # " X" has the lower ids. After it every pair stands alone.
        tokenizer, rng = m.EvolvingTokenizer(), random.Random(6)
        self.assertEqual(tokenizer.learn_merges(["abab abab ab"], 10), 2)
        self.assertEqual(tokenizer.merges, ((98, 99), (33, 257)))
        for least, old in ((2, []), (1, [(98, 99), (257, 98)]), (4, [(98, 98), (257, 257)])):
            texts = [wordy_text(rng, 12), "aaaaaaa aaaa'll 😀😀 ", random_text(rng, 12)]
            tokenizer, twin = m.EvolvingTokenizer(old), list(old)
            naive_learn(texts, twin, 40, least)
            learned = tokenizer.learn_merges(iter(texts), 15, least)
            learned += tokenizer.learn_merges(reversed(texts), 25, least)
            self.assertEqual((list(tokenizer.merges), learned), (twin, len(twin) - len(old)))
            self.assertGreater(learned, 0)

    def test_ten_growths_only_append_and_leave_every_old_encoding_as_it_was(self):
        rng, tokenizer, kept = random.Random(3), m.EvolvingTokenizer(), []
        texts = ["ünï 你好 a\tb\n\n  c", "", "0 12  345 ''s 'll"]
        for _ in range(10):
            texts.append(" ".join(["".join(rng.choices("abcdefghijklm \n", k=12))] * 8))
            self.assertGreater(tokenizer.learn_merges(texts[-1:], 8, 2), 0)
            then = m.EvolvingTokenizer(tokenizer.merges)
            kept.append((then, [tokenizer.encode(text) for text in texts]))
        for then, encodings in kept:
            self.assertEqual(tokenizer.merges[:then.version], then.merges)
            for text, ids in zip(texts, encodings):
                self.assertEqual(then.encode(text), ids)
                self.assertEqual(tokenizer.decode(ids), text)

    def test_no_merge_crosses_a_pre_token_boundary_and_no_two_ids_spell_the_same_bytes(self):
        tokenizer = m.EvolvingTokenizer()
        self.assertEqual(tokenizer.learn_merges(["a1" * 50, "a" "!" * 50], 1, 50), 0)
        tokenizer.learn_merges(["to be or not to be, to be!" * 9], 500, 1)
        spelt = [tokenizer.token_bytes(i).decode() for i in range(257, tokenizer.vocab_size)]
        self.assertEqual([m.pre_tokens(text) for text in spelt], [[text] for text in spelt])
        # bc, ab, ab+c: "abc" encodes to a,bc, which spell id 259: passed over.
        tokenizer = m.EvolvingTokenizer([(99, 100), (98, 99), (258, 100)])
        self.assertEqual(tokenizer.learn_merges(["abc abc"], 9, 1), 2)
        self.assertEqual(tokenizer.merges[3:], ((33, 98), (260, 257)))
        with self.assertRaisesRegex(ValueError, "spells b'ab'; expected a new"):
            m.EvolvingTokenizer([(98, 99), (98, 99)])

    def test_unpacking_a_pack_or_the_older_form_gives_the_same_tokenizer(self):
        text = wordy_text(random.Random(10), 50)
        for tokenizer in (m.EvolvingTokenizer(), grown_tokenizer()):
            packed = tokenizer.pack()
            self.assertEqual(tuple(map(tuple, json.loads(packed))), tokenizer.merges)
            older = (b'{"format":"macrogpt-tokenizer","format_version":1,"merges":%b}' % packed)
            for copy in map(m.EvolvingTokenizer.unpack, (packed, older)):
                self.assertEqual((copy.merges, copy.pack()), (tokenizer.merges, packed))
            self.assertEqual(*((one.learn_merges([text], 5), one.merges, one.encode(text))
                               for one in (copy, tokenizer)))

    def test_what_makes_no_tokenizer_is_an_error_of_one_line(self):
        for blob in (b"", b"\xff\xfe\x00", b"[" * 100_000, b"{}", b"null", b'"text"', b"5", b"[5]",
                     b'{"merges": 5}', b"[[98]]", b"[[98, 99, 100]]", b'[[98, "99"]]', b"\n\n",
                     b"[[98.0, 99]]", b"[[0, 98]]", b"[[98, 257]]", b"[[-1, 98]]",
                     b"[[98, 99], [98, 99]]"):
            with self.subTest(blob[:80]), self.assertRaisesRegex(
                    ValueError, "^stored tokenizer: found .*expected.*$"):
                m.EvolvingTokenizer.unpack(blob)
