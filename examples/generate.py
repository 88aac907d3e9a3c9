"""Generate text with a model that is split over the processes that torchrun starts.

    torchrun --nproc-per-node 2 examples/generate.py Qwen/Qwen2.5-0.5B-Instruct --tp 2 --prompt "The capital is"

Every rank runs this whole file. Each reads only its own slices of the weights.
"""

import argparse

from transformers import AutoTokenizer, TextStreamer

import autodist_fx as adx


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a directory, or an id on the hub")
    parser.add_argument("--tp", type=int, default=1, help="ranks that share each weight")
    parser.add_argument("--pp", type=int, default=1, help="pipeline stages")
    parser.add_argument("--prompt", default="The capital of France is")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    args = parser.parse_args()

    model = adx.from_pretrained(args.model, tp=args.tp, pp=args.pp)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokens = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)

    # All ranks call generate alike; one of them prints.
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if model.rank == 0 else None
    output = model.generate(**tokens, max_new_tokens=args.max_new_tokens, do_sample=False, streamer=streamer)

    # The same tokens are there on every rank.
    made = output[0, tokens.input_ids.shape[1] :].tolist()
    print(f"rank {model.rank} of {args.tp * args.pp}: {len(made)} tokens {made}", flush=True)


if __name__ == "__main__":
    main()
