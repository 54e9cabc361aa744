"""``miti-detr bench``: time and memory of inference and training steps of a model."""

import argparse
import os

from .arguments import natural_int, positive_int

BUSY = 0.25  # number of cores used by other work above which times are unreliable


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "bench",
        help="measure time, memory and size of a model",
        description="Measures inference and training steps of a model on random images. Do not run "
        "anything else at the same time.",
        epilog="KEY VALUE pairs at the end override the config, such as MODEL.DEVICE cpu.",
    )
    add = parser.add_argument
    add("--config-file", metavar="C", help="YAML file; default: the config in the checkpoint")
    add("--weights", metavar="W", default="", help="checkpoint; default: random weights")
    add("--batch", type=positive_int, default=2, help="images per step (default 2)")
    add("--size", type=_size, default="512x672", metavar="HxW", help="in pixels (default 512x672)")
    add("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    add("--objects", type=natural_int, default=20, help="objects per image (default 20)")
    add("--repeats", type=positive_int, default=7, help="measured steps (default 7)")
    add("--memory", action="store_true", help="print what a training step needs by part instead")
    add("--threads", type=positive_int, default=os.cpu_count(), help="default: all cores")
    parser.set_defaults(func=run, overrides=[])


def run(args: argparse.Namespace) -> int:
    """Measure the model and print a table."""
    import torch

    from miti_detr.bench.machine import describe_machine
    from miti_detr.bench.memory import measure_memory, memory_table
    from miti_detr.bench.steps import bench_model, build_bench_model, steps_table
    from miti_detr.engine import prepare_cpu, setup_config
    from miti_detr.engine.predictor import load_config

    if not args.config_file and not args.weights:
        raise ValueError("no model was named. Add --config-file or --weights")
    if args.weights:
        cfg = load_config(args.config_file, weights=args.weights, overrides=args.overrides)
    else:
        cfg = setup_config(args.config_file, args.overrides)
    torch.set_num_threads(args.threads)
    if cfg.MODEL.DEVICE == "cpu":
        prepare_cpu()
    machine = describe_machine()
    print(
        f"{machine['gpu'] or machine['processor']}, {args.threads} threads, torch "
        f"{machine['versions']['torch']}, {args.precision}"
    )
    if machine["busy_cores_before"] > BUSY:
        print(f"Other work uses {machine['busy_cores_before']:.1f} cores. Times are unreliable.")
    height, width = args.size
    settings = {"batch": args.batch, "size": args.size, "objects": args.objects}
    model = build_bench_model(cfg, args.weights, **settings)
    print(f"{args.batch} images of {height}x{width} per step")
    if args.memory:
        print(memory_table(measure_memory(model, args.precision), cfg.MODEL.DEVICE))
        return 0
    result = bench_model(model, precision=args.precision, repeats=args.repeats)
    print(steps_table(result, args.batch))
    return 0


def _size(text: str) -> tuple[int, int]:
    """Parse a size such as ``512x672``, for argparse."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is not height x width, such as 512x672")
    return int(height), int(width)
