"""Make a LLaVA sparse and let it see fewer visual tokens: prune weights, save, reload, check, then prune tokens.

    python examples/prune_llava.py                     # the LLaVA and the questions that are part of the package
    python examples/prune_llava.py MODEL DATA.jsonl    # yours: a folder or a hub id, and questions with answers

A line of DATA.jsonl is {"image": "a.jpg", "text": "USER: <image>\\nWhat is it? ASSISTANT: a cat"}, in the words of the
model's prompt, with its own image token. What comes behind the token is what the model is judged by: put the question
in front of it to have the answer alone. An optional "split" on every line is "calibration" or "test".
"""

from __future__ import annotations

import argparse
import math

from transformers import AutoModelForImageTextToText, AutoProcessor

import vlprune_ext as vp


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="llava-digits")
    parser.add_argument("data", nargs="?", default="digits-questions")
    parser.add_argument("--limit", type=int, default=32, help="questions to calibrate on; more are better and slower")
    parser.add_argument("--test-limit", type=int, default=100, help="questions to test on")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of the weights that become zero")
    parser.add_argument("--keep", type=float, default=0.25, help="share of the visual tokens, from block 2 on")
    parser.add_argument("--out", default="pruned/llava", help="folder for the pruned model")
    args = parser.parse_args()

    folder = vp.zoo.path(args.model) if args.model in vp.zoo.names() else args.model
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    calibration = vp.load_data(args.data, "calibration", model=model, processor=processor, limit=args.limit)
    test = vp.load_data(args.data, "test", model=model, processor=processor, limit=args.test_limit)
    metric = "exact_match" if args.data == "digits-questions" else "lm_loss"

    method = vp.ECoFLaP(sparsity=args.sparsity, estimator="first-order")  # needs gradients; the default does not
    result = vp.prune(model, calibration, method, evaluation=test, metric=metric)  # changes the model in place
    for name in (metric, "nonzero", "flops"):
        print(f"{name:11s} {result.before[name]:16,.3f} -> {result.after[name]:16,.3f}")

    result.save(args.out, processor=processor)
    model = vp.load_pruned(args.out)
    again = vp.evaluate(model, test, metric)[metric]
    same = math.isclose(again, result.after[metric], rel_tol=1e-4)
    print(f"saved in {args.out}; loaded again, {metric} is {'the same' if same else again}")
    if not same:
        raise SystemExit(1)

    with vp.prune_tokens(model, vp.FastV(layer=2, keep=args.keep)) as pruning:  # as it was on exit
        fewer, cost = vp.evaluate(model, test, metric)[metric], vp.measure(model, test, metric)
    print(f"with {pruning.share():.0%} of the visual tokens a block: {metric} {fewer:,.3f}, flops {cost['flops']:,}")


if __name__ == "__main__":
    main()
