"""How a dialogue is written down, and what SFT learns of it."""

from __future__ import annotations

from tasks.core.rows import Demonstration
from tasks.rl.environments import final_user_turn, first_prompt, tokenise_dialogue, user_turn


class Signs:
    """A tokenizer whose tokens are signs; a text begins with token 2 unless it is said to be a piece."""

    eos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> Signs:
        self.input_ids = [2] * add_special_tokens + [ord(sign) for sign in text]
        return self


def test_roles_stand_on_lines_of_their_own() -> None:
    text = first_prompt("Hello.") + " Who?" + user_turn("Ann.") + " Ann?" + final_user_turn("Yes.")
    assert text == "User: Hello.\nBot: Who?\nUser: Ann.\nBot: Ann?\nUser: Yes."


def test_the_bots_turns_count_with_an_end_token_each_and_the_users_do_not() -> None:
    row = Demonstration(
        id="d", prompt=first_prompt("Hi."), response=" Who?\nUser: Ann.\nBot: Ann?\nUser: Yes.\nBot: Bye."
    )
    result = tokenise_dialogue(row, Signs())
    ids, mask = result["input_ids"], result["completion_mask"]
    written = "".join("<end>" if token == 1 else "" if token == 2 else chr(token) for token in ids)
    assert written == "User: Hi.\nBot: Who?<end>\nUser: Ann.\nBot: Ann?<end>\nUser: Yes.\nBot: Bye.<end>"
    own = "".join("|" if token == 1 else chr(token) for token, counts in zip(ids, mask, strict=True) if counts)
    assert own == " Who?| Ann?| Bye.|"
    assert ids.count(2) == 1, "only the prompt begins a text"


def test_a_response_without_a_user_is_one_turn() -> None:
    result = tokenise_dialogue(Demonstration(id="d", prompt="ab", response=" 42"), Signs())
    assert result["completion_mask"] == [0, 0, 0, 1, 1, 1, 1]
