"""Make a CLIP smaller and faster: score its heads and neurons, remove half, save, reload, check.

    python examples/prune_clip.py                      # the CLIP and the pictures that are part of the package
    python examples/prune_clip.py MODEL DATA.jsonl     # yours: a folder or a hub id of a CLIP or SigLIP, and pairs

A line of DATA.jsonl is {"image": "a.jpg", "text": "a caption", "split": "calibration"}, paths relative to the file.
Without "split" all lines are used for both scoring and testing; with it, "calibration" and "test".
"""

from __future__ import annotations

import argparse
import math

from transformers import AutoModel, AutoProcessor

import vlprune_ext as vp

NUMBERS = ("recall@1", "params", "flops", "latency_ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="clip-digits")
    parser.add_argument("data", nargs="?", default="digits")
    parser.add_argument("--limit", type=int, default=64, help="pairs to score on; more are better and slower")
    parser.add_argument("--test-limit", type=int, default=200, help="pairs to test on")
    parser.add_argument("--keep", type=float, default=0.5, help="share of the heads and neurons")
    parser.add_argument("--steps", type=int, default=3, help="rounds of scoring and removing")
    parser.add_argument("--out", default="pruned/clip", help="folder for the pruned model")
    args = parser.parse_args()

    folder = vp.zoo.path(args.model) if args.model in vp.zoo.names() else args.model
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    calibration = vp.load_data(args.data, "calibration", model=model, processor=processor, limit=args.limit)
    test = vp.load_data(args.data, "test", model=model, processor=processor, limit=args.test_limit)

    method = vp.MoPE(keep_heads=args.keep, keep_neurons=args.keep, steps=args.steps)
    result = vp.prune(model, calibration, method, evaluation=test)  # changes the model in place
    for name in NUMBERS:
        print(f"{name:10s} {result.before[name]:16,.3f} -> {result.after[name]:16,.3f}")

    result.save(args.out, processor=processor)
    again = vp.evaluate(vp.load_pruned(args.out), test)
    same = math.isclose(again["recall@1"], result.after["recall@1"], abs_tol=1e-6)
    print(f"saved in {args.out}; loaded again, recall@1 is {'the same' if same else again['recall@1']}")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
