"""Claims about GRADUATION: the forms that leave, what is refused, and what engines read."""
import importlib
import json
import math
import os
import random
import shutil
import struct
import tempfile
import unittest
from array import array
from unittest import mock

import macrogpt as m
from support import Folder, engine_in_use
from test_model import SHAPE, lively, stir

MERGES = ((m.FIRST_BYTE + ord("a"), m.FIRST_BYTE + ord("b")), (257, m.FIRST_BYTE + ord("c")),
          (m.FIRST_BYTE + ord(" "), m.FIRST_BYTE + ord("t")), (259, m.FIRST_BYTE + ord("h")))
TEXTS = ("Hello there, abc!", "it's 12 o'clock\n\n\tand 3½  ", "नमस्ते दुनिया", "ภาษาไทย",
         "مَرْحَبًا", "👩‍👩‍👧 \u2028\u3000x", "\x00\x1c\x1f\x85\xa0\x7f",
         "  if x:\r\n    return 'abc' # the")


def package(name):
    """Return a package, or skip the test where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        return importlib.import_module(name)
    except ImportError:
        raise unittest.SkipTest(f"the package {name} is not installed") from None


def being(deltas=0, routed=True, shape=SHAPE):
    """Return a small generation with some deltas, ready to leave."""
    tokenizer = m.EvolvingTokenizer(MERGES)
    model = lively(m.interpreted_engine("f"), shape=shape, vocab=tokenizer.vocab_size)
    for number in range(deltas):
        model.append_delta(3, random.Random(number))
        stir(model, number)
    model.router = m.Router(tokenizer, [{b"abc": 5 - n} for n in range(deltas + 1)]) if (
        routed) else None
    config = m.Config(n_layer=2, n_embd=8, n_head=2, n_ff=12, block_size=8)
    return m.Leaving(config, tokenizer, model, m.Growth(phase="grown"), ["it was born"])


def based_on(folder, engine):
    """Return a model whose base is what a folder holds."""
    model = m.GPT(SHAPE, 261, engine, None)
    m.load_params(list(model.params.values()), m.returned_base(folder, SHAPE, 261))
    return model


def header_of(path):
    """Return the header of a file of safetensors."""
    with open(path, "rb") as file:
        return json.loads(file.read(int.from_bytes(file.read(8), "little")))


def packed(header, numbers=b"", length=None):
    """Return the bytes of a file of safetensors."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + numbers


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


class GraduationCase(Folder):
    """A folder, and what leaves into it."""

    def exported(self, form, who=None):
        m.export_weights(self.path(form), form, who or being(2))
        return self.path(form)

    def refusal(self, call, *signs):
        self.refused(m.GraduationError, call, *signs)

    def weights(self, tensors, name="model"):
        """Write tensors into a new folder, and return its path."""
        folder = tempfile.mkdtemp(dir=self.folder)
        m.write_safetensors(os.path.join(folder, f"{name}.safetensors"), tensors)
        return folder

    def adapter(self, tensors, **config):
        """Write an adapter into a new folder, and return its path."""
        folder = self.weights(tensors, "adapter_model")
        self.write(os.path.join(folder, "adapter_config.json"), json.dumps(
            {"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}))
        return folder


class Safetensors(GraduationCase):
    def test_the_bytes_of_a_tiny_file_are_these(self):
        m.write_safetensors(self.path("x"), {"a": m.Tensor((1, 2), array("f", [1.0, -2.0]))})
        head = (b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[1,2],'
                b'"data_offsets":[0,8]}}')
        head += b" " * (-len(head) % 8)
        self.assertEqual(self.content("x"), struct.pack("<Q", len(head)) + head
                         + struct.pack("<2f", 1.0, -2.0))

    def test_halves_and_bfloats_are_read_as_what_they_are(self):
        values = [1.0, -2.5, 0.15625]
        for dtype, raw in (("F16", struct.pack("<3e", *values)),
                           ("BF16", b"".join(struct.pack("<f", x)[2:] for x in values))):
            path = self.write("x", packed({"a": entry([3], 0, 6, dtype)}, raw))
            self.assertEqual([*m.read_safetensors(path, {"a": (3,)})["a"].data], values)

    def test_a_file_that_lies_is_refused_and_says_in_one_line_why(self):
        four, nan = bytes(16), struct.pack("<4f", 0, 0, 0, math.nan)
        for content, *signs in (
                (b"", "JSON"),
                (packed(b"{}", length=1 << 62), "a header of 4,611", "100,000,000"),
                (packed(b"{}", length=200_000_000), "a header of 200,000,000"),
                (packed(b"{}  ", length=4000)[:9], "JSON"),
                (packed(b"no json"), "JSON"),
                (packed(b"[1]"), "JSON"),
                (packed(b"[" * 20_000), "JSON"),
                (packed({"a": 7}), "a file of safetensors"),
                (packed({"a": {"data_offsets": [0, 16]}}, four), "a file of safetensors"),
                (packed({"a": entry([4], 0, "16")}, four), "[0, '16']", "[0, 16]"),
                (packed({"a": entry([-4], 0, 16)}, four), "[-4]", "[4]"),
                (packed({"a": entry([4], 0, 16, "I64")}, four), "I64", "F32 or F16 or BF16"),
                (packed({"a": entry([4], 0, 16, "F64")}, four), "F64", "float32"),
                (packed({"a": entry([1 << 59] * 99_999, 0, 16)}, four), "[4]"),
                (packed({"a": entry([4], 0, 20)}, four), "[0, 20]", "[0, 16] for the shape [4]"),
                (packed({"a": entry([4], 0, 16)}, four[:9]), "9 bytes", "cut short"),
                (packed({"a": entry([4], 0, 16)}, four + b"x"), "behind the last"),
                (packed(b'{"a": %s, "a": %s}' % (
                    (json.dumps(entry([4], 0, 16)).encode(),
                     json.dumps(entry([4], 16, 32)).encode())), four * 2), "hole"),
                (packed({"a": entry([4], 0, 16), "b": entry([2], 12, 20)}, four), "overlap"),
                (packed({"a": entry([4], 4, 20)}, four + four), "hole"),
                (packed({"a": entry([4], 0, 16), "c": entry([0], 16, 16)}, four),
                 ", c: ", "unknown"),
                (packed({"c": entry([4], 0, 16)}, four), "no a"),
                (packed({"a": entry([2, 2], 0, 16)}, four), "[2, 2]", "[4]"),
                (packed({"a": entry([4], 0, 16)}, nan), "none or huge")):
            path = self.write("x.safetensors", content)
            with self.subTest(signs=signs):
                self.refusal(lambda: m.read_safetensors(path, {"a": (4,), "b": (2,)}, ["a"]),
                             "x.safetensors", "expected", *signs)


class Llama(GraduationCase):
    def test_queries_and_keys_are_ordered_by_halves_of_each_head_for_transformers_alone(self):
        orders = {part.name: list(part.order) for gguf in (False, True)
                  for part in m.parts_of(SHAPE, 20, gguf)}
        for name, order in (("model.layers.1.self_attn.q_proj", [0, 2, 1, 3, 4, 6, 5, 7]),
                            ("model.layers.0.self_attn.k_proj", [8, 10, 9, 11, 12, 14, 13, 15]),
                            ("model.layers.0.self_attn.v_proj", list(range(16, 24))),
                            ("model.layers.0.mlp.up_proj", list(range(12, 24))),
                            ("blk.0.attn_k", list(range(8, 16)))):
            self.assertEqual(orders[name], order)

    def test_what_speaks_for_most_of_the_text_is_folded_in_or_all_without_a_router(self):
        who, engine = being(2), m.interpreted_engine("f")
        self.assertEqual(m.main_layer(who.model), 0)
        who.model.router.counts[2].update({b"abc": 90})
        self.assertEqual(m.main_layer(who.model), 2)
        for model, other in ((who.model, who.model.with_layer(2)), (being(2, False).model,) * 2):
            with engine.no_grad():
                one, whole = m.as_one(model).logits([5, 6, 7]), other.logits([5, 6, 7])
            self.assert_near(one.data, whole.data, 1e-4)

    def test_the_table_is_tied_but_has_a_copy_where_adapters_change_it(self):
        hf, peft = self.exported("hf"), self.exported("peft")
        for folder, tied in ((hf, True), (os.path.join(peft, "base"), False)):
            config = m.read_json(os.path.join(folder, "config.json"))
            header = header_of(os.path.join(folder, "model.safetensors"))
            self.assertEqual((config["tie_word_embeddings"], "lm_head.weight" in header),
                             (tied, not tied))
            self.assertEqual(config["architectures"], ["LlamaForCausalLM"])

    def test_norms_have_gains_of_one_and_the_last_one_the_scale_of_the_head(self):
        for gguf, last in ((False, "model.norm.weight"), (True, "output_norm.weight")):
            gains = {name: set(t.data) for name, t in m.llama_tensors(being().model, gguf).items()
                     if len(t.shape) == 1}
            self.assertEqual(gains.pop(last), {array("f", [1.7])[0]})
            self.assertEqual(set().union(*gains.values()), {1.0})
            self.assertEqual(len(gains), 4)

    def test_weights_come_back_with_trained_gains_in_them_and_a_last_one_must_be_one_number(self):
        who = being()
        tensors = m.llama_tensors(who.model)
        tensors["model.layers.1.input_layernorm.weight"] = m.Tensor(
            (8,), array("f", [2.0, *[1.0] * 7]))
        other = based_on(self.weights(tensors), who.model.engine)
        wanted = {name: [*param.data] for name, param in who.model.params.items()}
        wanted["1.qkv"][::8] = [2 * x for x in wanted["1.qkv"][::8]]
        self.assertEqual({name: [*param.data] for name, param in other.params.items()}, wanted)
        for name, tensor, *signs in (
                ("model.norm.weight", m.Tensor((8,), array("f", range(8))), "requires_grad_"),
                ("lm_head.weight", m.Tensor((261, 8), array("f", bytes(261 * 32))), "one table")):
            folder = self.weights({**m.llama_tensors(who.model), name: tensor})
            self.refusal(lambda: m.returned_base(folder, SHAPE, 261), *signs)

    def test_a_folder_appears_whole_and_none_is_overwritten_and_it_holds_its_life(self):
        folder = self.exported("hf")
        self.assertEqual(sorted(os.listdir(folder)), [
            "README.md", "config.json", "generation_config.json", "model.safetensors",
            "tokenizer.json", "tokenizer_config.json"])
        self.assertIn("- it was born", m.read_text(self.path("hf", "README.md")))
        self.refusal(lambda: self.exported("hf"), "name a new folder")
        with mock.patch.object(m, "write_gguf", side_effect=OSError(28, "disk is full")):
            self.refusal(lambda: self.exported("gguf"), "disk is full")
        self.assertEqual(set(os.listdir(self.folder)), {"nonames.txt", "hf"})


class Tokens(GraduationCase):
    def test_ids_stand_where_they_stand_here_and_merges_are_pairs_of_names(self):
        made = m.tokenizer_json(being().tokenizer)
        vocab = made["model"]["vocab"]
        self.assertEqual([*vocab.values()], list(range(261)))
        self.assertEqual((vocab["<|endoftext|>"], vocab["a"], vocab["Ġ"], vocab["Ċ"], vocab["abc"],
                          vocab["Ġth"]), (0, 98, 33, 11, 258, 260))
        self.assertEqual(made["model"]["merges"], ["a b", "ab c", "Ġ t", "Ġt h"])
        self.assertEqual(made["added_tokens"][0]["id"], 0)

    def test_merges_may_stand_behind_ours_and_nothing_else_may_differ(self):
        live = being().tokenizer

        def returned(change):
            made = m.tokenizer_json(live)
            change(made["model"])
            self.write("tokenizer.json", json.dumps(made))
            return m.returned_tokenizer(self.folder, live)

        def more(model):
            model["merges"].append(["abc", "Ġ"])
            model["vocab"]["abcĠ"] = 261
        self.assertEqual(returned(lambda model: None).merges, MERGES)
        self.assertEqual(returned(more).merges, (*MERGES, (258, 33)))
        for change, *signs in (
                (lambda model: model["merges"].reverse(), "another vocabulary", "export anew"),
                (lambda model: model["merges"].pop(), "first merges are not ours"),
                (lambda model: model["vocab"].update({"<pad>": 261}), "add no tokens"),
                (lambda model: model["vocab"].update({"abc": 9}), "another vocabulary"),
                (lambda model: model["merges"].append("q"), "another vocabulary"),
                (lambda model: model.clear(), "another vocabulary")):
            with self.subTest(signs=signs):
                self.refusal(lambda: returned(change), *signs)

    def test_the_package_tokenizers_gives_the_same_ids_and_text(self):
        tokenizers, who = package("tokenizers"), being()
        theirs = tokenizers.Tokenizer.from_str(json.dumps(m.tokenizer_json(who.tokenizer)))
        for text in TEXTS:
            ids = theirs.encode(text, add_special_tokens=False).ids
            self.assertEqual(ids, who.tokenizer.encode(text), text)
            self.assertEqual(theirs.decode(ids), text)
            self.assertEqual(theirs.encode(text).ids[0], m.END_OF_TEXT)

    def test_the_template_of_chats_makes_the_prompt_that_a_reply_is_made_of_here(self):
        jinja2, who = package("jinja2"), being()
        render = jinja2.Template(m.CHAT_TEMPLATE).render
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"},
                 {"role": "user", "content": "abc?"}]
        said = render(messages=turns, bos_token="", eos_token="$", add_generation_prompt=True)
        self.assertEqual([0, *who.tokenizer.encode(said)], m.prompt_ids(
            who.tokenizer, [("owner", "Hi"), ("self", "Ho")], "abc?", 96))
        self.assertEqual(render(messages=turns[:2], bos_token="^", eos_token="$"), "^H: Hi\nA: Ho$")


def gguf_parts(path):
    """Return the keys and values, the tensors, and the numbers of a GGUF file, read anew."""
    def take(form):
        values = struct.unpack("<" + form, file.read(struct.calcsize("<" + form)))
        return values[0] if len(values) == 1 else values

    def value(kind):
        if kind == 9:
            inner, count = take("IQ")
            return [take("i") if inner == 5 else value(inner) for _ in range(count)]
        return file.read(take("Q")).decode() if kind == 8 else take({4: "I", 6: "f", 7: "?"}[kind])
    with open(path, "rb") as file:
        magic, version, count, keys = take("4sIQQ")
        assert (magic, version) == (b"GGUF", 3)
        about = {value(8): value(take("I")) for _ in range(keys)}
        tensors = {value(8): ([take("Q") for _ in range(take("I"))], take("I"), take("Q"))
                   for _ in range(count)}
        file.read(-file.tell() % 32)
        return about, tensors, file.read()


class Gguf(GraduationCase):
    def test_numbers_stand_at_multiples_of_32_and_end_the_file(self):
        self.exported("gguf")
        self.assertEqual(sorted(os.listdir(self.path("gguf"))), [
            "README.md", "base.gguf", "delta-1.gguf", "delta-2.gguf", "model-f16.gguf",
            "model-q8_0.gguf", "model.gguf"])
        for name in ("model.gguf", "model-f16.gguf", "base.gguf", "delta-2.gguf"):
            about, tensors, data = gguf_parts(self.path("gguf", name))
            at = 0
            for sizes, kind, offset in tensors.values():
                self.assertEqual(offset, at)
                at += math.prod(sizes) * (2 if kind == 1 else 4)
                at += -at % 32
            self.assertEqual(len(data), at)
            self.assertEqual(about["general.alignment"], 32)

    def test_a_model_says_its_sizes_and_its_tokens_and_an_adapter_its_scale(self):
        self.exported("gguf")
        about, tensors, data = gguf_parts(self.path("gguf", "model.gguf"))
        self.assertEqual((about["general.architecture"], about["llama.block_count"],
                          about["llama.rope.dimension_count"]), ("llama", 2, 4))
        self.assertEqual((about["tokenizer.ggml.model"], about["tokenizer.ggml.pre"]),
                         ("gpt2", "gpt-2"))
        self.assertEqual(about["tokenizer.ggml.tokens"][:2] + about["tokenizer.ggml.merges"],
                         ["<|endoftext|>", "Ā", "a b", "ab c", "Ġ t", "Ġt h"])
        self.assertEqual(about["tokenizer.ggml.token_type"][:2], [3, 1])
        self.assertEqual(tensors["token_embd.weight"][0], [8, 261])
        at = tensors["blk.0.attn_q.weight"][2]  # as it is: neighbours are turned there, too
        self.assertEqual(struct.unpack_from("<64f", data, at),
                         tuple(being().model.params["0.qkv"].data[:64]))
        about, tensors, _ = gguf_parts(self.path("gguf", "delta-1.gguf"))
        self.assertEqual((about["adapter.type"], about["adapter.lora.alpha"]), ("lora", 3.0))
        self.assertEqual((tensors["token_embd.weight.lora_a"][0],
                          tensors["output.weight.lora_a"][0]), ([3, 261], [8, 3]))

    def test_blocks_of_32_have_one_scale_and_rows_of_none_are_halves(self):
        data = array("f", [math.sin(i) for i in range(64)])
        kind, raw = m.gguf_numbers(m.Tensor((1, 64), data), m.GGUF_Q8_0)
        self.assertEqual((kind, len(raw)), (8, 2 * 34))
        for block in range(2):
            scale, *steps = struct.unpack_from("<e32b", raw, 34 * block)
            for x, step in zip(data[32 * block:], steps):
                self.assertLess(abs(x - scale * step), 0.006)
        self.assertEqual(m.gguf_numbers(m.Tensor((2, 32), array("f", bytes(256))), 8)[1], bytes(68))
        self.assertEqual(m.gguf_numbers(m.Tensor((2, 8), data[:16]), m.GGUF_Q8_0)[0], 1)
        self.assertEqual(m.gguf_numbers(m.Tensor((8,), data[:8]), m.GGUF_Q8_0)[0], 0)


class Adapters(GraduationCase):
    def returned(self, folder, who):
        """Return the logits of a being whose one delta is what a folder holds."""
        layer = m.returned_delta(folder, who.model)
        model = m.GPT(SHAPE, 261, who.model.engine, None, who.model.params)
        model.append_delta(layer.manifest[0][1], random.Random(1))
        m.load_params(m.delta_matrices(model.deltas[0]), layer)
        return self.logits(model)

    def logits(self, model):
        with model.engine.no_grad():
            return model.logits([98, 99, 258, 5]).data

    def test_each_delta_comes_back_as_it_left_and_all_stand_in_one_where_they_add_up(self):
        who = being(2)
        folder = self.exported("peft", who)
        self.assertEqual(sorted(os.listdir(folder)), ["README.md", "base", "delta-1", "delta-2"])
        for number in (1, 2):
            self.assert_near(self.returned(os.path.join(folder, f"delta-{number}"), who),
                             self.logits(who.model.with_layer(number)), 1e-4)
        who.model.router = None
        m.export_weights(self.path("added"), "peft", who)
        config = m.read_json(self.path("added", "all", "adapter_config.json"))
        self.assertEqual((config["r"], config["lora_alpha"]), (6, 6))
        self.assert_near(self.returned(self.path("added", "all"), who), self.logits(who.model),
                         1e-4)

    def test_names_and_shapes_are_those_of_peft_and_the_fused_matrix_is_cut(self):
        self.exported("peft")
        header = header_of(self.path("peft", "delta-1", "adapter_model.safetensors"))
        root = "base_model.model.model.layers.1.self_attn."
        for name, shape in ((root + "q_proj.lora_A.weight", [3, 8]),
                            (root + "v_proj.lora_B.weight", [8, 3]),
                            ("base_model.model.model.embed_tokens.lora_embedding_A", [3, 261]),
                            ("base_model.model.lm_head.lora_B.weight", [261, 3])):
            self.assertEqual(header[name]["shape"], shape)
        self.assertNotIn("qkv", json.dumps(header))

    def test_an_adapter_of_some_matrices_with_ranks_of_their_own_means_the_same_here(self):
        who, rng, tensors = being(), random.Random(4), {}
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj"):
            rows = 12 if "up" in name else 8
            for end, shape in (("A", (2, 8)), ("B", (rows, 2))):
                tensors[f"base_model.model.model.layers.0.{name}.lora_{end}.weight"] = m.Tensor(
                    shape, array("f", [rng.gauss(0, 1) for _ in range(math.prod(shape))]))
        folder = self.adapter(tensors, lora_alpha=3)
        found = m.returned_delta(folder, who.model)
        self.assertEqual(found.manifest[0], ["delta1.embedding.a", 6, 8])
        whole = m.llama_tensors(who.model)
        for name in [n for n in tensors if ".lora_A" in n]:
            a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
            target = whole[name[len("base_model.model."):-len(".lora_A.weight")] + ".weight"]
            for i in range(b.shape[0]):
                for j in range(8):
                    target.data[8 * i + j] += 1.5 * sum(b.data[2 * i + k] * a.data[8 * k + j]
                                                        for k in range(2))
        other = based_on(self.weights(whole), who.model.engine)
        self.assert_near(self.returned(folder, who), self.logits(other), 1e-4)

    def test_what_is_no_plain_adapter_of_ours_is_refused(self):
        who, root = being(), "base_model.model.model.layers.0.mlp.up_proj.lora_"
        a, b = m.Tensor((2, 8), array("f", [1] * 16)), m.Tensor((12, 2), array("f", [1] * 24))
        whole, head = {root + "A.weight": a, root + "B.weight": b}, "base_model.model.lm_head.lora_"
        long = m.Tensor((261, 2), array("f", [1] * 522))
        for tensors, config, *signs in (
                (whole, {"peft_type": "IA3"}, "IA3"), (whole, {"use_dora": True}, "use_dora"),
                (whole, {"bias": "all"}, "bias"), (whole, {"use_rslora": True}, "use_rslora"),
                (whole, {"rank_pattern": {"x": 1}}, "rank_pattern"), (whole, {"r": True}, "r True"),
                (whole, {"lora_alpha": math.inf}, "lora_alpha inf"),
                (whole, {"r": 4}, "shape [2, 8]", "[4, 8]"), ({}, {}, "nothing"),
                ({root + "A.weight": a}, {}, "half of the pair"),
                ({root + "B.weight": b}, {}, "half of the pair"),
                ({"x": a}, {}, ", x: ", "unknown"),
                ({head + "A.weight": a, head + "B.weight": long}, {}, "one table")):
            folder = self.adapter(tensors, **config)
            with self.subTest(signs=signs):
                self.refusal(lambda: m.returned_delta(folder, who.model), *signs)


class Engines(GraduationCase):
    """What other programs make of what is exported; each test skips where its program is not."""

    IDS = [0, 98, 99, 258, 33, 101, 260, 7]

    def near(self, theirs, model):
        with model.engine.no_grad():
            self.assert_near(theirs, model.logits(self.IDS).data, 1e-3)

    def in_torch(self, folder, delta=None):
        torch, transformers = package("torch"), package("transformers")
        torch.set_num_threads(1)
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if delta is not None:
            model = package("peft").PeftModel.from_pretrained(model, delta).eval()
        with torch.no_grad():
            return model(torch.tensor([self.IDS])).logits[0].flatten().tolist()

    def test_transformers_reads_the_same_logits(self):
        who = being(2)
        self.near(self.in_torch(self.exported("hf", who)), who.model.with_layer(0))

    def test_peft_reads_the_same_logits_with_each_delta(self):
        who = being(2)
        folder = self.exported("peft", who)
        for number in (1, 2):
            theirs = self.in_torch(os.path.join(folder, "base"),
                                   os.path.join(folder, f"delta-{number}"))
            self.near(theirs, who.model.with_layer(number))

    def test_llama_cpp_reads_the_same_logits_also_with_each_delta(self):
        llama_cpp, who = package("llama_cpp"), being(2)
        folder = self.exported("gguf", who)
        for name, lora, model in (("model.gguf", None, m.as_one(who.model)),
                                  ("base.gguf", "delta-1.gguf", who.model.with_layer(1)),
                                  ("base.gguf", "delta-2.gguf", who.model.with_layer(2))):
            theirs = llama_cpp.Llama(
                os.path.join(folder, name), n_ctx=32, n_threads=1, logits_all=True, verbose=False,
                type_k=0, type_v=0, lora_path=lora and os.path.join(folder, lora))
            theirs.eval(self.IDS)
            self.near(theirs.scores[:len(self.IDS)].flatten().tolist(), model)
            self.assertEqual(theirs.tokenize(b" the abc", add_bos=True), [0, 260, 102, 33, 258])

    def test_the_package_gguf_reads_every_tensor(self):
        gguf = package("gguf")
        reader = gguf.GGUFReader(os.path.join(self.exported("gguf"), "model.gguf"))
        self.assertEqual(len(reader.tensors), len(m.llama_tensors(being().model)))


class Returning(GraduationCase):
    @classmethod
    def setUpClass(cls):
        cls.first = Folder()
        cls.first.setUp()
        cls.addClassCleanup(cls.first.doCleanups)
        cls.first.good("train")
        cls.first.good("export", "hf", "--format", "hf")

    def setUp(self):
        super().setUp()
        shutil.copytree(self.first.folder, self.folder, dirs_exist_ok=True)

    def test_weights_of_the_hf_form_come_back_as_a_new_generation_that_has_read_the_same(self):
        before = self.kept(writable=False).layer("base").data
        self.assertIn("generation 2", self.good("import", self.path("hf")))
        memory = self.kept(writable=False)
        growth = m.Growth.of(memory.setting("growth"))
        self.assertEqual((growth.generation, growth.phase), (2, "grown"))
        self.assertEqual(memory.layer("base").data, before)
        self.assertEqual(memory.unread_chars(), (0, 0))
        self.assertEqual(memory.life()[-1]["event"], "import")
        self.assertIsNone(memory.setting("rebirth"))
        self.good("--no-train", "ask", "Who are you?")
        self.good("train")

    def test_an_adapter_comes_back_as_a_delta_unless_it_does_harm(self):
        config = m.Config(n_layer=1, n_embd=16, n_head=2, block_size=24)
        model = m.Leaving.of(self.kept(writable=False), config, engine_in_use(), []).model
        model.append_delta(2, random.Random(1))
        folder = self.adapter(m.lora_tensors(model, model.deltas))
        with mock.patch.object(m.Gate, "worse", return_value={"0": (2.0, 3.25)}):
            self.mistake(1, "import", folder, signs=("probe 0", "3.250", "2.000"))
        self.assertEqual(m.delta_names(self.kept(writable=False).manifests()), [])
        self.assertIn("delta 1", self.good("import", folder))
        memory = self.kept(writable=False)
        self.assertEqual(m.delta_names(memory.manifests()), ["delta1"])
        self.assertEqual(m.Growth.of(memory.setting("growth")).generation, 1)
        self.good("--no-train", "ask", "Who are you?")

    def test_what_reads_a_probe_worse_or_not_at_all_or_comes_too_late_changes_nothing(self):
        def state():
            memory = self.kept(writable=False)
            return (memory.layer("base").data, memory.setting("rebirth"),
                    {**memory.setting("growth"), "step": 0})
        new_generation, before = m.new_generation, state()

        def overtaken(live, folder, memory):
            memory.set_setting("growth", {**memory.setting("growth"), "step": 99})
            return new_generation(live, folder, memory)
        worse = {"probe": "0", "before": 2.5, "now": 3.25}
        for changes, *signs in (
                ({"fit_to_live": lambda *_: worse}, "probe 0", "3.250", "2.500"),
                ({"fit_to_live": lambda *_: None, "bits_per_character": lambda *_: math.nan},
                 "probe 0", "inf"),
                ({"new_generation": overtaken}, "meanwhile")):
            with mock.patch.multiple(m, **changes):
                self.mistake(1, "import", self.path("hf"), signs=signs)
            self.assertEqual(state(), before)

    def test_a_pickle_is_never_opened_and_no_other_thing_and_nothing_before_it_is_grown(self):
        new = ("--db", self.path("new.sqlite3"))
        self.mistake(1, "import", self.path("hf"), *new, signs=("run `train`",))
        for name in ("model.bin", "x.pt", "x.pth", "x.ckpt"):
            self.mistake(1, "import", self.write(name, b"\x80\x04."), signs=("never opened",))
        os.rename(self.path("hf", "model.safetensors"), self.path("hf", "pytorch_model.bin"))
        self.mistake(1, "import", self.path("hf"), signs=("hf/model.safetensors", "never opened"))
        config = m.read_json(self.path("hf", "config.json"))
        for name, value in (("hidden_size", 32), ("num_key_value_heads", 1), ("rms_norm_eps", 1e-6),
                            ("model_type", "mistral"), ("rope_parameters", {"rope_theta": 5.0})):
            self.write("hf/config.json", json.dumps({**config, name: value}))
            self.mistake(1, "import", self.path("hf"),
                         signs=("rope_theta" if "rope" in name else name, "expected"))


class Words(GraduationCase):
    def heard(self, text):
        return m.words_of(self.write("words", text))

    def test_markdown_that_was_exported_is_read_back_with_its_days_and_its_lines(self):
        day = 1_700_000_000.0
        with_talk = self.kept(clock=lambda: day)
        session = with_talk.session_id("boats")
        with_talk.add_message(session, "owner", "My boat is Plover.\n- It leaks.\n# Truly.")
        with_talk.add_message(session, "self", "you: said")
        with_talk.add_entry("taught", m.Document(("The kiln is hot / red.", "It glows."), True))
        with_talk.add_entry("chat", m.Document(("My boat is Plover.",), True))
        heard = self.heard("\n".join(m.as_markdown(with_talk)))
        self.assertEqual([(h.talk, h.role, h.text) for h in heard], [
            (None, "owner", "The kiln is hot / red.\nIt glows."),
            ("boats", "owner", "My boat is Plover.\n- It leaks.\n# Truly."),
            ("boats", "self", "you: said")])
        self.assertLess(max(abs(h.at - day) for h in heard), 86_400)
        self.assertLess(abs(heard[1].at - day), 61)

    def test_talks_and_single_messages_of_jsonl_are_read_with_contents_in_parts(self):
        one = {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "image"}]}
        rows = [{"messages": [{"role": "system", "content": "be kind"}, one]}, one,
                {"role": "assistant", "content": None}, {"role": "assistant", "content": "Ho"}]
        heard = self.heard("\n\n".join(map(json.dumps, rows)) + "\n")
        self.assertEqual([(h.role, h.text) for h in heard],
                         [("owner", "Hi"), ("owner", "Hi"), ("self", "Ho")])
        for line in ("7", "[]", '{"role": "pirate", "content": "x"}', '{"messages": 3}', "x"):
            with self.assertRaises(m.UsageError) as caught:
                self.heard('{"role": "user", "content": "x"}\n' + line)
            self.assertIn("line 2", str(caught.exception))

    def test_what_is_exported_is_said_and_both_forms_are_read_back_by_the_program(self):
        self.good("--no-train", "ask", "My boat is called Plover.")
        for form, *more in (("jsonl", "--mine"), ("markdown",)):
            done = self.run_here("export", form, "--format", form, *more)
            self.assertIn(b"holds what you said, word for word", done.stderr)
            there = ("--db", self.path(form + ".sqlite3"))
            self.assertIn("2 messages", self.good("import", form, *there))
            self.assertEqual(self.good("--no-train", "ask", "What is my boat called?", *there),
                             "Your boat is called Plover.\n")
        rows = [json.loads(line) for line in self.content("jsonl").splitlines()]
        self.assertEqual([[turn["role"] for turn in row["messages"]] for row in rows],
                         [["user", "assistant"]])
        self.good("export", "all.jsonl", "--format", "jsonl")
        self.assertGreater(len(self.content("all.jsonl").splitlines()), 1, "with the corpus")
        self.assertRegex(self.content("markdown").decode("utf-8"),
                         r"## my boat\n\n- \d{4}-\d\d-\d\d  My boat is called Plover\.\n")
        self.mistake(2, "export", "markdown", "--format", "markdown", signs=("name a new file",))
        self.mistake(2, "export", self.path("x"), "--format", "hf", "--mine")
