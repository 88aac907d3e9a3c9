"""The command line prints generate's output."""

from __future__ import annotations

import torch

from autodist_fx.cli.generation.prompts import split_answers


class Words:
    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(f"w{i}" for i in ids if i > 2)


def test_split_answers_decoder_only_and_encoder_decoder() -> None:
    inputs = {"input_ids": torch.tensor([[0, 5], [6, 7]]), "attention_mask": torch.tensor([[0, 1], [1, 1]])}
    output = torch.tensor([[0, 5, 8, 2, 0], [6, 7, 9, 10, 11]])
    after, alone = (split_answers(Words(), ["a", "b"], inputs, output, [2], after_prompt=x) for x in (True, False))
    assert [answer.token_ids for answer in after] == [[8, 2], [9, 10, 11]]
    assert [answer.token_ids for answer in alone] == [[5, 8, 2], [7, 9, 10, 11]]
    assert [answer.text for answer in alone] == ["w5 w8", "w7 w9 w10 w11"]
    assert [answer.prompt_tokens for answer in after] == [1, 2]
