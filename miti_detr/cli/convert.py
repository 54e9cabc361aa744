"""``miti-detr convert``: converts weights from one format to another."""

import argparse


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its arguments."""
    parser = subparsers.add_parser(
        "convert",
        help="convert weights from and to DETR, its Detectron2 wrapper and Hugging Face",
        description="Converts weights. The format of IN is recognised by its keys.",
    )
    parser.add_argument("input", metavar="IN", help="file with weights, or Hugging Face folder")
    parser.add_argument("output", metavar="OUT", help="file to write, or folder with --to hf")
    parser.add_argument("--to", required=True, choices=("ours", "detr", "d2-wrapper", "hf"))
    parser.add_argument(
        "--num-classes",
        type=int,
        metavar="K",
        help="classes of OUT; default: 80 for COCO (91 ids with --to detr), else as in IN",
    )
    parser.add_argument(
        "--residual",
        choices=("none", "before_norm", "after_norm"),
        help="layer residual the weights were trained with, if IN does not record it",
    )
    parser.add_argument(
        "--trust",
        action="store_true",
        help="read a file even if it can run code; only if you trust its source",
    )
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    from miti_detr.checkpoint.export import convert_file

    lines = convert_file(
        args.input,
        args.output,
        args.to,
        num_classes=args.num_classes,
        residual=args.residual,
        trust=args.trust,
    )
    print("\n".join(lines))
    return 0
