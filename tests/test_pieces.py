"""Token ids become text one at a time as the tokenizer's own decoder makes it of all of them."""

import doctest
import random

import pytest
from conftest import library_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models

from weights import pieces as module
from weights.tokenizer import Tokenizer as ModelTokenizer
from weights.vocabulary import read_tokens

BYTES = {f"<0x{i:02X}>": 10 + i for i in range(256)}
WORDS = {"<unk>": 0, "the": 1, "cat</w>": 2, "##ing": 3, "▁dog": 4, "_sat": 5, ".": 6, " ": 7,
         "▁": 8, "n't": 9, **BYTES}
SPACES, FIRST = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)


def test_docstrings():
    assert doctest.testmod(module).failed == 0


def write(folder, decoder, vocabulary=WORDS, added=("<end>",)) -> ModelTokenizer:
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    if decoder is not None:
        model.decoder = decoder
    model.add_special_tokens([*added])
    model.save(str(folder / "tokenizer.json"))
    return ModelTokenizer(folder)


@pytest.mark.parametrize("decoder", [
    None, decoders.WordPiece(), decoders.WordPiece("##", False), decoders.BPEDecoder(),
    decoders.Metaspace(), decoders.Metaspace("_", "never"), decoders.Metaspace("_", "first"),
    decoders.Fuse(), SPACES, decoders.Sequence([SPACES, decoders.Fuse(), FIRST]),
    decoders.Sequence([decoders.Replace(Regex("[_▁]"), " "), decoders.Fuse()]),
    decoders.Sequence([SPACES, decoders.Fuse()]),
], ids=repr)
def test_pieces_add_up_to_what_the_decoder_makes(tmp_path, decoder):
    tokenizer, choose = write(tmp_path, decoder), random.Random(0)
    for n in (1, 2, 5, 60):
        ids = [choose.randrange(10) for _ in range(n)] + [1]
        text = library_tokenizer(tmp_path).decode(ids, skip_special_tokens=False)
        assert "".join(tokenizer.pieces(ids)) == text


@pytest.mark.parametrize("rest", [[], [FIRST]])
def test_a_character_of_several_bytes_comes_whole(tmp_path, rest):
    steps = [SPACES, decoders.ByteFallback(), decoders.Fuse(), *rest]
    others = [*steps[:3], decoders.Strip("_", 1, 0), *rest]  # through a window of ids
    ids = [1, *(BYTES[f"<0x{byte:02X}>"] for byte in "é日本🙂".encode()), 4]
    for decoder in (decoders.Sequence(steps), decoders.Sequence(others)):
        tokenizer = write(tmp_path, decoder)
        pieces = tokenizer.pieces(ids)
        assert "".join(pieces) == "theé日本🙂 dog" and "\ufffd" not in "".join(pieces)
        assert pieces == ["the", "", "é", "", "", "日", "", "", "本", "", "", "", "🙂", " dog"]
        wrong = tokenizer.pieces([1, BYTES["<0xE6>"], 4, BYTES["<0xFF>"], *ids])
        assert "".join(wrong).replace("\ufffd", "") in ("the dogtheé日本🙂 dog",)


def test_bytes_that_are_never_whole_take_no_more_time_for_each(tmp_path):
    steps = [SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip("_", 1, 0)]
    write(tmp_path, decoders.Sequence(steps))
    lengths, tokens = [], read_tokens(str(tmp_path))
    decode = tokens.decode
    tokens.decode = lambda ids: lengths.append(len(ids)) or decode(ids)
    for ids in ([BYTES["<0xFF>"]] * 300, [10**6] * 300):  # the latter are no tokens
        tokens.pieces(ids)
        assert max(lengths) <= 2 * module.WINDOW


@pytest.mark.parametrize("decoder, first, later", [
    (decoders.Metaspace(), "dog", " dog"), (None, "▁dog", " ▁dog"),
    (decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), FIRST]), "dog", " dog"),
])
def test_an_answer_has_no_space_before_its_first_word_unless_it_goes_on(tmp_path, decoder, first,
                                                                        later):
    tokenizer = write(tmp_path, decoder)
    assert tokenizer.detokenizer()(4) == first
    assert tokenizer.detokenizer([1])(4) == later
    end = tokenizer.tokens.id_of("<end>")
    assert tokenizer.pieces([4, 4, end, 4]) == [first, later, "\n\n", first]


def test_byte_level_tokens_may_be_text_that_is_not_in_the_alphabet(tmp_path):
    tokenizer = write(tmp_path, decoders.ByteLevel(), {"<unk>": 0, "Ġa": 1, "a b": 2, "日": 3},
                      [AddedToken("<é>", special=False)])
    assert tokenizer.pieces([1, 2, 3, 0]) == [" a", "a b", "日", "<unk>"]


@pytest.mark.parametrize("decoder", [decoders.CTC(), decoders.Strip(" ", 1, 1), decoders.Sequence(
    [decoders.Fuse(), decoders.Strip("\n", 0, 2)])], ids=repr)
def test_a_decoder_that_changes_the_end_of_a_text_is_refused(tmp_path, decoder):
    with pytest.raises(ValueError, match="cannot write one token after another") as error:
        write(tmp_path, decoder)
    assert "\n" not in str(error.value)


def test_a_decoder_that_fails_is_one_line(tmp_path):
    tokenizer = write(tmp_path, None)
    with pytest.raises(ValueError, match="the model's tokenizer failed: "):
        tokenizer.pieces([-7])


def test_sentencepiece_strips_the_space_that_it_adds_alone(llama2_folder):
    tokenizer = ModelTokenizer(llama2_folder)
    for text in ("It was late.", "  It was", "It  was "):
        ids = tokenizer.encode(text, add_bos=False)
        assert "".join(tokenizer.pieces(ids)) == library_tokenizer(llama2_folder).decode(ids)
    after_bos, after_a_word = tokenizer.detokenizer([1]), tokenizer.detokenizer(ids)
    assert "".join(map(after_bos, ids)) == "It was"
    assert "".join(map(after_a_word, ids)) == " It was"
