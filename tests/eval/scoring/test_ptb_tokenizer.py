import pytest

from eval.scoring.ptb_tokenizer import tokenize_caption


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A man can't ride; he won't.", "a man ca n't ride he wo n't"),
        ("They're gone, it's Bob's dog, I'd say.", "they 're gone it 's bob 's dog i 'd say"),
        ("it\u2019s a dog\u2019s “ball”", "it 's a dog 's ball"),
        ("I cannot do it, gonna try", "i can not do it gon na try"),
        ("\"Quoted\" and 'single' - here -- there — end", "quoted and single here there end"),
        ("(left) [square] {curly}", "-lrb- left -rrb- -lsb- square -rsb- -lcb- curly -rcb-"),
        ("wow!!! really?? yes! what?!", "wow !!! really ?? yes what ?!"),
        ("salt & pepper, 50%, $5, #1", "salt & pepper 50 % $ 5 # 1"),
        ("black&white AT&T", "black & white at&t"),
        ("two-story X-ray and/or he/she", "two-story x-ray and/or he/she"),
        ("a dog 😀 and❤️ a cat", "a dog and ❤ a cat"),
        ("Mr. Smith on Main St. at 5:30 p.m. sat.", "mr. smith on main st. at 5:30 p.m. sat"),
        ("John F. Kennedy in the U.S.A.", "john f. kennedy in the u.s.a."),
        ("the letter a. The next", "the letter a the next"),
        ("no. 5 and no.", "no. 5 and no"),
        ("1,000 dogs, 3.5 miles, 12:30pm 20's", "1,000 dogs 3.5 miles 12:30 pm 20 's"),
        ("O'Brien's rock'n'roll o'clock", "o'brien 's rock 'n' roll o'clock"),
        ("£5 €6 7¢ ½", "# 5 $ 6 7 cents 1/2"),
        ("CAFÉ naïve 東京", "café naïve 東京"),
        ("a www.example.com sign...", "a www.example.com sign"),
        ("end.Start of,line", "end.start of line"),
    ],
)
def test_tokens_are_those_of_the_java_program(caption: str, tokens: str) -> None:
    assert tokenize_caption(caption) == tokens.split()


@pytest.mark.parametrize("separator", ["\r", "\n", "\x0b", "\x0c", "\u2028", "\u00a0", "\t", "  "])
def test_white_space_of_any_kind_parts_words_and_nothing_else(separator: str) -> None:
    caption = f"{separator}a dog{separator}runs{separator}"
    assert tokenize_caption(caption) == ["a", "dog", "runs"]


@pytest.mark.parametrize("caption", ["", " \n", ".", "'\"", "😀", "- -- —"])
def test_a_caption_without_words_has_no_tokens(caption: str) -> None:
    assert tokenize_caption(caption) == []


def test_a_whole_number_and_its_fraction_are_one_token() -> None:
    assert tokenize_caption("3 1/2 cups") == ["3\u00a01/2", "cups"]


@pytest.mark.parametrize("unit", ["a", ".", "a.", "a-", "'", "1,", "<a ", "(12", "a/", "!"])
def test_long_monotone_text_is_no_trap(unit: str) -> None:
    assert isinstance(tokenize_caption(unit * 3000), list)
