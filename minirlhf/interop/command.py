"""The command `python -m minirlhf.checkpoint import|export`: real models in and out."""

from pathlib import Path

from minirlhf.interop import adapters, convert
from minirlhf.support.cli import Parser, run_script


def main() -> None:
    parser = Parser("python -m minirlhf.checkpoint", description="Real models in and out.")
    commands = parser.add_subparsers(dest="command", required=True)
    importing = commands.add_parser(
        "import", help="a Hugging Face folder, a model on the hub or a .gguf file becomes a checkpoint"
    )
    importing.add_argument(
        "source",
        help="folder, .gguf file, org/name[@revision] on the Hugging Face hub (extra hub), smollm2 or minilm "
        "(inside the packages of those extras)",
    )
    importing.add_argument("out", type=Path, help="the checkpoint's folder, which must not exist")
    exporting = commands.add_parser("export", help="a checkpoint becomes a folder that transformers loads")
    exporting.add_argument("source", type=Path, metavar="checkpoint", help="a run's folder or a step's")
    exporting.add_argument("out", type=Path, help="the folder to write, which must not exist")
    exporting.add_argument(
        "--backbone", action="store_true", help="of a reward model, export the model under its head"
    )
    exporting.add_argument(
        "--adapters", action="store_true", help="write the adapters alone, as the peft library stores them"
    )
    args = parser.parse_args()
    if args.command == "import":
        print(f"{args.out}: {convert.import_model(args.source, args.out)}")
    elif args.adapters:
        print(f"{args.out}: {adapters.export(args.source, args.out)}")
    else:
        print(f"{args.out}: loads as {convert.export_model(args.source, args.out, args.backbone)}")


if __name__ == "__main__":
    run_script(main)
