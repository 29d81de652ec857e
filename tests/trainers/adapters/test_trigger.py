import pytest
from open_clip.tokenizer import bytes_to_unicode
from transformers import CLIPTokenizer

from trainers.adapters.trigger import add_trigger, expand_trigger, tokenize
from trainers.errors import DataError

START, END, PAD, TRIGGER = 90, 91, 92, 99


def expand(words, count=2, length=10):
    return expand_trigger([START, *words, END], TRIGGER, count, length=length, pad=PAD)


def test_the_class_word_is_repeated_and_the_trigger_word_is_gone():
    row = expand([1, 2, TRIGGER, 3])
    assert row.ids == (START, 1, 2, 2, 3, END, PAD, PAD, PAD, PAD)
    assert row.mask == (False, False, True, True, *[False] * 6)


@pytest.mark.parametrize("count", [1, 2, 6])
def test_it_stands_once_for_every_identity_token(count):
    row = expand([1, 2, TRIGGER, 3], count)
    assert sum(row.mask) == count
    assert {token for token, marked in zip(row.ids, row.mask, strict=True) if marked} == {2}


def test_one_copy_is_the_prompt_without_the_trigger_word():
    assert expand([1, 2, TRIGGER, 3], 1).ids == (START, 1, 2, 3, END, PAD, PAD, PAD, PAD, PAD)


def test_what_does_not_fit_is_cut_and_the_end_token_stays():
    row = expand([1, TRIGGER, *range(2, 40)], 3)
    assert row.ids == (START, 1, 1, 1, 2, 3, 4, 5, 6, END)
    assert sum(row.mask) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([1, 2], "0 trigger words"),
        ([1, TRIGGER, 2, TRIGGER], "2 trigger words"),
        ([TRIGGER, 1], "no class word"),
        ([1, 2, 3, 4, 5, 6, 7, 8, TRIGGER], "too far back"),
    ],
)
def test_a_prompt_that_names_nobody_or_two_is_an_error(words, message):
    with pytest.raises(ValueError, match=message):
        expand(words)


def test_the_last_place_that_fits_fits():
    assert expand([1, 2, 3, 4, 5, 6, 7, TRIGGER]).mask == (*[False] * 7, True, True, False)


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's, of single bytes."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    plain = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=32)
    return add_trigger(plain, "img")


def test_a_tokenizer_with_the_trigger_word_reads_prompts(tokenizer):
    row = tokenize(tokenizer, "a man img in red", "img", 2)
    plain = tokenizer("a man in red").input_ids
    at = plain.index(tokenizer.convert_tokens_to_ids("n</w>"))
    assert list(row.ids[: len(plain) + 1]) == [*plain[:at], plain[at], plain[at], *plain[at + 1 :]]
    assert len(row.ids) == tokenizer.model_max_length


def test_punctuation_may_follow_and_longer_words_are_not_the_trigger(tokenizer):
    assert sum(tokenize(tokenizer, "a man img, in red", "img", 2).mask) == 2
    with pytest.raises(DataError, match="'a man imgs': 0 trigger words"):
        tokenize(tokenizer, "a man imgs", "img", 2)


def test_the_error_names_the_prompt_and_the_word(tokenizer):
    with pytest.raises(DataError, match=r"'a man': 0 trigger words.*the trigger word is 'img'"):
        tokenize(tokenizer, "a man", "img", 2)
