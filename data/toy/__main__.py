"""Write the toy world's files into a folder, to look at them. What they hold is said in
data/toy/__init__.py (world), sources.py (raw files of public sources) and synthetic.py (rankings of
letters)."""
import argparse
from pathlib import Path

from data.errors import Parser, run_main
from data.toy import sources, synthetic, write_world

WRITERS = {"world": write_world, "sources": sources.write_sources, "synthetic": synthetic.write}


def main():
    parser = Parser(prog="python -m data.toy", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="?", choices=WRITERS, default="world",
                        help="which files to write (default: world)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the files to")
    parser.add_argument("--seed", type=int, default=0, help="which world (default: 0)")
    args = parser.parse_args()
    WRITERS[args.files](args.out, args.seed)
    for path in sorted(path for path in args.out.rglob("*") if path.is_file()):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


run_main(main)
