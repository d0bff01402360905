#!/usr/bin/env python3
"""What quantising costs in quality: perplexity of a model in bf16 (torch) and in its packed forms (native), one text.

usage: bench_perplexity.py [--model ID] [--before bf16|fp32] [--text FILE] [--store DIR] [--most RATIO]

The text is services/generator/src/generator/measure_text.txt unless another is given. Speeds are of this moment, one
stream, without service and scheduler: make bench-engine measures those. Ends with 1 where a ratio exceeds --most.
"""

import argparse
import sys
from pathlib import Path

from devstack import measures, settings, topology
from devstack.cli.output import print_table
from devstack.home import Home
from modelstore import Manifest
from modelstore.formats import formats_of, size_bytes_of


def main() -> int:
    """Prints a table for each packed form; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=topology.LLM)
    parser.add_argument("--before", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--store", type=Path, default=Home(settings.load().home).models)
    parser.add_argument("--most", type=float, default=1.03)
    given = parser.parse_args()
    manifest = Manifest.load(given.store / given.model)
    before = measures.measure(manifest.root, "torch", given.before, given.text)
    before["size_bytes"] = size_bytes_of(manifest, "bf16")
    is_good = True
    for form in formats_of(manifest)[1:]:
        after = measures.measure(manifest.root, "native", form, given.text)
        after["size_bytes"] = size_bytes_of(manifest, form)
        print_table((given.model, f"{given.before} (torch)", f"{form} (native)", ""), measures.rows(before, after))
        ratio = after["perplexity"] / before["perplexity"]
        is_good &= ratio <= given.most
        print(
            f"perplexity over {after['tokens']} tokens of {after['text']}: {ratio:.4f}x, at most {given.most} wanted\n"
        )
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
