"""autodist_fx through its public API."""

from torch import Tensor


class OursContender:
    """The compiled model; `generate` is called as transformers' own is."""

    def __init__(self, model: object) -> None:
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits

    def decode(self, input_ids: Tensor, attention_mask: Tensor, new_tokens: int) -> Tensor:
        return self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )


def build(path: str) -> OursContender:
    """Each rank reads its own slices and compiles its own program."""
    import autodist_fx as adx

    return OursContender(adx.from_pretrained(path, tp=2, pp=1))
