"""Claims about section 0: every setting has a type and a range, every error one line and a remedy."""
import dataclasses
import math
import re
import unittest

import macrogpt as m

FIELDS = dataclasses.fields(m.Config)
WRONG_TYPES = {
    int: [1.5, "7", None, True, [1], 1j],
    float: ["0.5", None, True, [0.5], 1j],
    str: [3, None, b"x", ["x"], 0.5],
}


def numbers():
    return [f for f in FIELDS if type(f.default) is not str]


def below(f):
    low = f.metadata["low"]
    return int(low) - 1 if type(f.default) is int else low - max(1e-9, abs(low) * 1e-3)


def above(f):
    high = f.metadata["high"]
    return int(high) + 1 if type(f.default) is int else high + max(1e-9, abs(high) * 1e-3)


class ConfigCase(unittest.TestCase):
    def refuse(self, change, *signs, error=m.ConfigError):
        """Assert that change raises a one-line error that holds every sign; return its text."""
        with self.assertRaises(error) as caught:
            change()
        text = str(caught.exception)
        self.assertEqual(len(text.splitlines()), 1, text)
        for sign in signs:
            self.assertIn(sign, text)
        return text


class EveryField(ConfigCase):
    def test_the_defaults_are_a_valid_config(self):
        config = m.Config()
        for f in FIELDS:
            self.assertEqual(getattr(config, f.name), f.default)
            self.assertEqual(dataclasses.replace(config, **{f.name: f.default}), config)

    def test_every_field_says_what_it_means_and_its_default_lies_in_its_range(self):
        for f in FIELDS:
            with self.subTest(f.name):
                self.assertTrue(f.metadata["doc"].strip())
                self.assertEqual(f.type, type(f.default).__name__)
                if type(f.default) is not str:
                    self.assertLessEqual(f.metadata["low"], f.default)
                    self.assertLessEqual(f.default, f.metadata["high"])
                    self.assertGreater(f.metadata["low"], -math.inf)

    def test_a_value_below_the_range_is_refused_by_name(self):
        for f in numbers():
            with self.subTest(f.name):
                self.refuse(lambda f=f: dataclasses.replace(m.Config(), **{f.name: below(f)}),
                            f"{f.name}=", "default", repr(f.default))

    def test_a_value_above_the_range_is_refused_by_name(self):
        limited = [f for f in numbers() if f.metadata["high"] < math.inf]
        self.assertGreater(len(limited), 20)
        for f in limited:
            with self.subTest(f.name):
                self.refuse(lambda f=f: dataclasses.replace(m.Config(), **{f.name: above(f)}),
                            f"{f.name}=", f"{f.metadata['high']:g}")

    def test_the_ends_of_the_range_themselves_are_allowed(self):
        pairs = {"n_embd", "n_head"}  # these two must also fit each other
        for f in numbers():
            for end in (f.metadata["low"], f.metadata["high"]):
                if math.isfinite(end) and f.name not in pairs:
                    value = type(f.default)(end)
                    with self.subTest(f.name, value=value):
                        config = dataclasses.replace(m.Config(), **{f.name: value})
                        self.assertEqual(getattr(config, f.name), value)

    def test_nan_and_infinities_are_refused_even_where_the_range_is_open(self):
        for f in numbers():
            for value in (math.nan, math.inf, -math.inf):
                with self.subTest(f.name, value=value):
                    self.refuse(lambda f=f, v=value: dataclasses.replace(m.Config(), **{f.name: v}),
                                f"{f.name}=")

    def test_a_value_of_another_type_is_refused_by_name(self):
        for f in FIELDS:
            for wrong in WRONG_TYPES[type(f.default)]:
                with self.subTest(f.name, wrong=wrong):
                    self.refuse(lambda f=f, w=wrong: dataclasses.replace(m.Config(), **{f.name: w}),
                                f"{f.name}=", type(f.default).__name__, type(wrong).__name__)

    def test_a_whole_number_will_do_for_a_float(self):
        self.assertEqual(dataclasses.replace(m.Config(), temperature=1).temperature, 1)

    def test_a_text_is_neither_empty_nor_has_a_nul(self):
        for f in FIELDS:
            if type(f.default) is str:
                for wrong in ("", "a\0b", "\0"):
                    with self.subTest(f.name, wrong=wrong):
                        self.refuse(
                            lambda f=f, w=wrong: dataclasses.replace(m.Config(), **{f.name: w}),
                            f"{f.name}=")

    def test_a_config_cannot_be_changed_in_place(self):
        with self.assertRaises(dataclasses.FrozenInstanceError):
            m.Config().top_k = 3


class Shapes(ConfigCase):
    def test_channels_that_do_not_fit_the_heads_name_a_remedy_that_works(self):
        failed = []
        for heads in range(1, 13):
            for channels in range(2, 100):
                if channels % heads == 0 and channels // heads % 2 == 0:
                    self.assertEqual(m.Config(n_embd=channels, n_head=heads).n_head, heads)
                    continue
                text = self.refuse(lambda: m.Config(n_embd=channels, n_head=heads),
                                   "n_embd", "n_head")
                tried = int(re.search(r"try (?:n_embd=)?(\d+)$", text)[1])
                try:
                    m.Config(n_embd=tried, n_head=heads)
                except m.ConfigError:
                    failed.append((channels, heads, tried))
        self.assertEqual(failed[:5], [], "(n_embd, n_head, remedy): the remedy is refused too")

    def test_an_odd_head_width_is_refused(self):
        self.refuse(lambda: m.Config(n_embd=12, n_head=4), "even")
        self.refuse(lambda: m.Config().replace(["n_embd=9", "n_head=3"]), "even")

    def test_the_feed_forward_width_is_a_multiple_of_eight_near_eight_thirds(self):
        for channels in range(8, 1000, 8):
            width = m.Config(n_embd=channels, n_head=1).ff_width
            self.assertEqual(width % 8, 0)
            self.assertLessEqual(abs(width - 8 / 3 * channels), 4)
        self.assertEqual(m.Config(n_embd=2, n_head=1).ff_width, 8)
        self.assertEqual(m.Config(n_ff=31).ff_width, 31)


class Assignments(ConfigCase):
    def test_replace_changes_what_is_named_and_nothing_else(self):
        config = m.Config().replace(["top_k=5", "temperature=0"])
        self.assertEqual((config.top_k, config.temperature), (5, 0.0))
        self.assertEqual(dataclasses.replace(config, top_k=40, temperature=0.8), m.Config())
        self.assertEqual(m.Config().replace([]), m.Config())

    def test_the_last_of_two_assignments_wins(self):
        self.assertEqual(m.Config().replace(["top_k=5", "top_k=6"]).top_k, 6)

    def test_sizes_that_fit_only_together_may_be_given_in_any_order(self):
        for order in (["n_embd=18", "n_head=3"], ["n_head=3", "n_embd=18"]):
            config = m.Config().replace(order)
            self.assertEqual((config.n_embd, config.n_head), (18, 3))

    def test_every_default_survives_the_round_trip_through_text(self):
        for f in FIELDS:
            name, value = m.parse_assignment(f"{f.name}={f.default}")
            self.assertEqual((name, value), (f.name, f.default))
            self.assertIs(type(value), type(f.default))
            self.assertEqual(m.Config().replace([f"{f.name}={f.default}"]), m.Config())

    def test_only_the_first_equals_sign_divides(self):
        self.assertEqual(m.parse_assignment("corpus_path=a=b.txt"), ("corpus_path", "a=b.txt"))

    def test_space_round_names_and_numbers_is_no_matter(self):
        self.assertEqual(m.parse_assignment(" top_k = 7 "), ("top_k", 7))
        self.assertEqual(m.parse_assignment("temperature= 1e-3"), ("temperature", 0.001))

    def test_an_unknown_field_gives_the_nearest_known_ones(self):
        for wrong, meant in (("topk", "top_k"), ("temprature", "temperature"),
                             ("n_layers", "n_layer"), ("learningrate", "learning_rate")):
            self.refuse(lambda w=wrong: m.Config().replace([f"{w}=1"]), repr(wrong), meant)

    def test_a_name_like_nothing_known_gives_the_list(self):
        self.refuse(lambda: m.parse_assignment("zzzzqqqq=1"), "known are", "top_k", "db_path")

    def test_a_missing_equals_sign_shows_the_form(self):
        for text in ("top_k", "", "top_k 5", "top_k:5"):
            self.refuse(lambda t=text: m.parse_assignment(t), "FIELD=VALUE", repr(text))

    def test_what_is_no_number_is_refused_with_the_default(self):
        for f in numbers():
            for raw in ("", "many", "1,5", "0x10", "--3"):
                with self.subTest(f.name, raw=raw):
                    self.refuse(lambda f=f, r=raw: m.parse_assignment(f"{f.name}={r}"),
                                f.name, type(f.default).__name__, repr(f.default))
        self.refuse(lambda: m.parse_assignment("top_k=1.5"), "top_k", "int")

    def test_nan_and_infinity_as_text_are_refused(self):
        for f in numbers():
            for raw in ("nan", "inf", "-inf", "1e999"):
                with self.subTest(f.name, raw=raw):
                    self.refuse(lambda f=f, r=raw: m.Config().replace([f"{f.name}={r}"]), f.name)

    def test_a_text_with_line_breaks_still_gives_an_error_of_one_line(self):
        for text in ("a\nb", "top_k=a\nb", "a\nb=3", "corpus_path=\n\0"):
            self.refuse(lambda t=text: m.Config().replace([t]))

    def test_numbers_beyond_every_float_are_taken_or_refused_and_never_a_crash(self):
        for f in numbers():
            for raw in ("9" * 400, "-" + "9" * 400, "9" * 5000):
                try:
                    config = m.Config().replace([f"{f.name}={raw}"])
                except m.ConfigError as error:
                    self.assertIn(f.name, str(error))
                else:
                    self.assertEqual(str(getattr(config, f.name)), raw)


class Errors(ConfigCase):
    def test_every_error_of_the_family_has_an_exit_code(self):
        family = [m.ConfigError, m.UsageError, m.CorpusError, m.StoreError, m.EngineError,
                  m.TrainerError]
        for kind in family:
            self.assertTrue(issubclass(kind, m.MacroGPTError))
        codes = {kind.__name__: kind.exit_code for kind in family}
        self.assertEqual(codes, {"ConfigError": 2, "UsageError": 2, "CorpusError": 1,
                                 "StoreError": 1, "EngineError": 1, "TrainerError": 1})


if __name__ == "__main__":
    unittest.main()
