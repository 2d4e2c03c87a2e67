"""`python -m moe bench`: how far the expert layer is from dense products of the same FLOPs on this machine."""

import argparse
import os

# Must be set before torch is loaded: large pages make fresh memory several times cheaper on Linux, for every row of the table alike.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch

from moe.bench import Shape, bench
from triton_kernels.grouped_mlp import choose_backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moe", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("bench", help="time forward + backward of the expert layer")
    defaults = Shape()
    for name in ("tokens", "d_model", "n_experts", "d_expert", "k"):
        command.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    command.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    command.add_argument("--weight-dtype", default="float32", choices=["float32", "bfloat16"], help="dtype of the stored weights")
    command.add_argument("--skew", type=float, default=1.0, help="load of the busiest expert over the mean")
    command.add_argument("--threads", type=int, default=None)
    command.add_argument("--repeats", type=int, default=5)
    command.add_argument("--backends", nargs="+", default=["cpu", "reference", "grouped_mm", "indexed loop"])
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    shape = Shape(tokens=options.tokens, d_model=options.d_model, n_experts=options.n_experts, d_expert=options.d_expert, k=options.k)
    print("backend chosen by auto: {} ({})".format(*choose_backend(torch.empty(0), torch.empty(1, shape.d_expert, shape.d_model))))
    for dtype in options.dtype:
        weight_dtype = options.weight_dtype if dtype == "bfloat16" else "float32"
        table = bench(shape, dtype=dtype, weight_dtype=weight_dtype, skew=options.skew, backends=options.backends, repeats=options.repeats)
        print(table)


if __name__ == "__main__":
    main()
