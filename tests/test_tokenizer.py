import doctest
import json
import shutil

import pytest
import sentencepiece

from weights import tokenizer as module
from weights.tokenizer import Tokenizer

TEXT = "It was late. Mr. Fox slept, dreaming of 3.14 geese! Where had they gone? " * 6


def test_docstrings():
    assert doctest.testmod(module).failed == 0


def test_default_tokenizer_makes_the_reference_s_ids(default_folder, reference):
    tokenizer = Tokenizer(default_folder)
    for case in reference["tokenizer"]:
        ids = tokenizer.encode(case["text"], add_bos=False)
        assert ids == case["ids"]
        if "<|" not in case["text"]:
            assert "".join(tokenizer.pieces(ids)) == case["text"]


def test_default_template_renders_like_the_reference(default_folder, reference):
    expected = reference["chat_template"]
    (message,) = expected["messages"]
    assert Tokenizer(default_folder).render_chat(message["content"]) == expected["rendered"]


def test_pieces_are_whole_characters_and_special_tokens_end_paragraphs(default_folder):
    tokenizer = Tokenizer(default_folder)
    ids = tokenizer.encode("<|im_start|>👩‍👧 naïve<|im_end|>", add_bos=False)
    pieces = tokenizer.pieces(ids)
    assert pieces[0] == pieces[-1] == "\n\n"
    assert "".join(pieces[1:-1]) == "👩‍👧 naïve"
    assert "" in pieces and "\ufffd" not in "".join(pieces)


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory):
    """A tokenizer as Llama 2 has it: sentencepiece with byte fallback, BOS, a chat template."""
    folder = tmp_path_factory.mktemp("llama2")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split(".")), model_prefix=str(folder / "tokenizer"),
        vocab_size=300, model_type="bpe", byte_fallback=True, character_coverage=1.0,
        hard_vocab_limit=False, minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "bos_token": {"content": "<s>"}, "eos_token": "</s>",
        "chat_template": "{{ bos_token }}[INST] {{ messages[0]['content'] }} [/INST]",
    }))
    return folder


def test_sentencepiece_tokenizers_add_bos_and_fall_back_to_bytes(llama2_folder):
    tokenizer = Tokenizer(llama2_folder)
    ids = tokenizer.prompt_ids("Mr. Fox 🙂", raw=True)
    assert ids[0] == 1 and 1 not in ids[1:]
    assert "".join(tokenizer.pieces(ids[1:])) == " Mr. Fox 🙂"
    assert tokenizer.pieces(ids).count("") == 3  # the first three bytes of the face
    assert tokenizer.stop_tokens() == {2}


def test_sentencepiece_finds_the_control_tokens_of_the_template(llama2_folder):
    tokenizer = Tokenizer(llama2_folder)
    ids = tokenizer.prompt_ids("Mr. Fox", raw=False)
    assert ids[0] == 1 and 1 not in ids[1:]
    assert "".join(tokenizer.pieces(ids)).replace("\n", "") == " [INST] Mr. Fox [/INST]"


def test_tokens_added_beside_a_sentencepiece_model_are_known(llama2_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama2_folder / "tokenizer.model").read_bytes())
    size = len(Tokenizer(tmp_path).tokens.model)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    tokenizer = Tokenizer(tmp_path)
    ids = tokenizer.encode("late<|im_end|>", add_bos=False)
    assert ids[-1] == size and tokenizer.pieces(ids)[-1] == "\n\n"
    assert tokenizer.pieces([size + 5]) == [""]  # a row of a padded embedding


def test_templates_by_name_in_a_file_or_absent(llama2_folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes((llama2_folder / "tokenizer.model").read_bytes())
    settings = tmp_path / "tokenizer_config.json"
    assert Tokenizer(tmp_path).chat_template is None
    settings.write_text(json.dumps({"chat_template": [{"name": "rag", "template": "no"},
                                                      {"name": "default", "template": "yes"}]}))
    assert Tokenizer(tmp_path).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    with pytest.raises(ValueError, match="chat template failed: no system turn"):
        Tokenizer(tmp_path).render_chat("hello")


def test_a_truncation_saved_with_the_tokenizer_is_not_applied(tiny_folder):
    tokenizer = Tokenizer(tiny_folder).tokens.model
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tiny_folder / "tokenizer.json"))
    assert len(Tokenizer(tiny_folder).encode("twelve bytes", add_bos=True)) == 12


def test_templates_see_tools_and_absent_tokens_as_transformers_shows_them(tiny_folder):
    settings = {"bos_token": None, "chat_template": "{{ bos_token }}{% if tools is not none %}T"
                "{% endif %}{{ 'é<' | tojson(ensure_ascii=False) }}"}
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert Tokenizer(tiny_folder).render_chat("hello") == '"é<"'


def test_the_next_turn_follows_an_answer(default_folder):
    tokenizer = Tokenizer(default_folder)
    turns = "Who slept?", "A fox.", "Where?"
    parts = tokenizer.prompt_ids(turns[0]), tokenizer.encode(turns[1], add_bos=False)
    assert sum(parts, []) + tokenizer.turn_ids(turns[2]) == tokenizer.encode(
        tokenizer.render_chat(*turns), add_bos=False)


def test_without_a_template_there_is_no_next_turn(tiny_folder):
    with pytest.raises(ValueError, match="has no chat template"):
        Tokenizer(tiny_folder).turn_ids("Where?")
    (tiny_folder / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    with pytest.raises(ValueError, match="leaves out its answers"):
        Tokenizer(tiny_folder).turn_ids("Where?")


@pytest.mark.parametrize("added", ['{"<x>": "5"}', '{"<x>": -1}', '{"<x>": true}', '[]',
                                   '{"<x>": [1]}'])
def test_tokens_added_beside_a_sentencepiece_model_need_numbers(llama2_folder, tmp_path, added):
    folder = shutil.copytree(llama2_folder, tmp_path / "folder")
    (folder / "added_tokens.json").write_text(added)
    with pytest.raises(ValueError, match="added_tokens.json"):
        Tokenizer(folder)
