"""Every claim of the paper is one command: it runs the scripts that it needs, compares, draws, and reports.

  python lab.py toy                                       all claims on the embedded toy world, on a CPU
  python lab.py toy prompt-helps ranked-beats-imitation   some of them
  python lab.py small --data DIR core                     the first five on published sets, hours on a CPU
  python lab.py own --data mine.jsonl --lm out/lm         four claims on comparisons of your own
  python lab.py gpu --data DIR --sizes 13m 197m           larger models on a GPU
  python lab.py toy --dry_run                             lists what would be run

Runs are kept under OUT/runs by their flags, data and code: finished ones are reused, interrupted ones go on.
Each verdict is printed as soon as its runs are done: *holds*, *does not hold* or *cannot tell*, from 95 %
intervals over test groups and seeds. The report is OUT/SCALE/report.html and report.md; beside it,
runs.jsonl has the command, the seconds and the figures of every run. The exit code is 1 if a claim's runs
failed.

Claims:
"""
import argparse
import itertools
import shlex
import sys
from pathlib import Path

import torch
from tqdm import tqdm

import plan
from claims import paper, preferences, pretraining, prompting
from claims.figures import picture
from claims.published import BINARY, RANKED, Gpu, Small
from claims.report import summary, write_report
from claims.runs import ROOT, Run, cores, execute, needed
from claims.scales import Own, Toy
from data.errors import InputError, Parser, run_main
from data.files import write_file
from model import SIZES

CLAIMS = {claim.__name__.replace("_", "-"): claim for claim in (
    prompting.prompt_helps, prompting.distilled_equals_prompted, preferences.ranked_beats_imitation,
    preferences.binary_equals_imitation, pretraining.pmp_sample_efficiency,  # the core
    preferences.calibration, prompting.alignment_tax, prompting.code_tax, prompting.prior_not_finetuning,
    pretraining.pmp_curve, pretraining.pmp_by_source, pretraining.binary_pmp_transfers_better,
    pretraining.lm_loss_helps_pmp, pretraining.end_of_context_helps, pretraining.human_vs_model_pairs,
    preferences.accuracy_at_k, preferences.ensembles, prompting.toxicity_falls, prompting.elo_ranks,
    prompting.truthfulqa_needs_mutual_information, preferences.scaling, pretraining.synthetic_transfer)}
CORE = list(CLAIMS)[:5]
SCALES = {"toy": Toy, "small": Small, "own": Own, "gpu": Gpu, "paper": None}


def statement(name):
    """What a claim says: the first paragraph of its docstring, on one line."""
    return paragraphs(name)[0]


def explanation(name):
    """Why a claim does not hold, or cannot be told, on the toy world: the rest of its docstring."""
    return " ".join(paragraphs(name)[1:])


def paragraphs(name):
    """The paragraphs of a claim's docstring, each on one line."""
    return [" ".join(paragraph.split()) for paragraph in CLAIMS[name].__doc__.split("\n\n")]


def parse_args():
    described = __doc__ + "\n".join(f"  {name:<38}{statement(name)}" for name in CLAIMS)
    parser = Parser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("scale", choices=SCALES,
        help="toy: the embedded world, 0.1M and 0.8M parameters, a CPU; small: published sets, 0.8M and 5M, "
        "hours on a CPU; own: comparisons of your own and a model to start from; gpu: published sets, 13M to "
        "810M, a GPU; paper: print the commands for 13M to 52B with GPUs, memory and days, and run nothing")
    add("claims", nargs="*", metavar="CLAIM",
        help="claims to test, or core for the first five (default: all)")
    add("--out", default="out/lab", help="folder of runs and reports (default: %(default)s)")
    add("--seeds", type=plan.positive(int),
        help="how many seeds, 0 and up, every run has (default: 6 for toy, where each is a world of its own, "
        "3 for the others)")
    add("--sizes", nargs="+", choices=SIZES, metavar="SIZE",
        help="model sizes, the main one last, as model.py names them (default: the scale's)")
    add("--data", metavar="PATH",
        help="for small and gpu: folder of the published files; for own: a file of comparisons")
    add("--lm", "--init", metavar="MODEL",
        help="for small, own and gpu: a language model to start from: a checkpoint, a Hugging Face folder or a "
        ".gguf file (default, but not for own: one of each size, trained on DIR/text)")
    add("--public", nargs="+", default=[], metavar="FILE",
        help="for own: public comparisons to pre-train on, which pmp-curve needs")
    add("--sets", nargs="+", choices=RANKED + BINARY, metavar="SET",
        help=f"for small and gpu: the sets to finetune on, of {', '.join(RANKED + BINARY)} (default: all)")
    add("--pairs", type=plan.positive(int),
        help="comparisons that preference models and imitations learn from, without those of pre-training "
        "(default: 500 for small, all for the others)")
    add("--jobs", type=plan.positive(int),
        help="runs at a time (default: one for each GPU, or for each core, but then at least 3)")
    add("--launch", default="", metavar="COMMAND",
        help='how to start a script, such as "torchrun --nproc_per_node 8", or a template such as '
        '"srun --gpus 1 {command}"')
    add("--dry_run", action="store_true", help="list the runs with their estimated time, and run nothing")
    args = parser.parse_intermixed_args()
    args.given = [word for word in sys.argv[1:] if word not in (args.scale, *args.claims)]
    if args.scale != "paper":
        args.many_seeds = args.seeds or 20  # of a claim whose runs take seconds
        scale = SCALES[args.scale]
        for name in ("lm", "data", "sets"):
            if scale is Toy and getattr(args, name):
                raise InputError(f"toy trains its own models in its own worlds; --{name} is for the other "
                                 "scales")
        args.sets = args.sets or RANKED + BINARY
        args.seeds = args.seeds or scale.default_seeds
        args.sizes = args.sizes or list(scale.default_sizes)
        there = scale.claims_tested or [name for name in CLAIMS if name not in scale.claims_left_out]
        wanted = [name for claim in args.claims or there for name in (CORE if claim == "core" else [claim])]
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise InputError(f"no claim {unknown[0]!r} at this scale; there are {', '.join(there)}, and core "
                             "for the first five")
        args.claims = list(dict.fromkeys(wanted))
    return args


def main():
    args = parse_args()
    if args.scale == "paper":
        return paper.print_plan()
    lab = SCALES[args.scale](args)
    claims, runs, results = {name: CLAIMS[name](lab) for name in args.claims}, {}, {}
    for name, claim in claims.items():
        try:
            runs[name] = needed(all_runs(next(claim)))
        except InputError as error:  # what it needs is not there; the other claims go on
            results[name] = str(error)
    everything, gpus = needed(itertools.chain(*runs.values())), torch.cuda.device_count()
    todo = [run for run in everything if not run.done]
    jobs = args.jobs or (1 if args.launch else gpus or max(3, cores()))  # 3: the seeds' models end together
    minutes = sum(run.seconds for run in todo) / (min(jobs, cores()) if not gpus else jobs) / 60
    print(f"{len(everything)} runs, {len(todo)} of them still to do, {jobs} at a time: about {minutes:.0f} "
          "minutes", flush=True)
    for name, why in results.items():
        print(f"{name} cannot be tested: {why}")
    if args.dry_run:
        for run in everything:
            print(f"  {'done' if run.done else f'{run.seconds:3.0f} s'}  python {shlex.join(run.command())}")
        return

    def tell_verdicts(failed):
        """Print the verdicts of the claims whose runs have all ended."""
        for name in runs:
            bad = [failed[run.key] for run in runs[name] if run.key in failed]
            if name not in results and (bad or all(run.done for run in runs[name])):
                why = explanation(name) if args.scale == "toy" else ""
                results[name] = bad[0] if bad else concluded(claims[name], why)
                tqdm.write(summary(name, results[name]))
                sys.stdout.flush()
    tell_verdicts({})
    execute(everything, jobs, args.launch, gpus, after_each=tell_verdicts)
    folder = Path(args.out) / args.scale
    records = [(run.folder / "done.json").read_text() + "\n" for run in everything if run.done]
    write_file(folder / "runs.jsonl", "".join(records).replace(f"{ROOT}/", ""))
    write_report(folder, args, {name: (statement(name), results[name]) for name in claims})
    if any(isinstance(result, str) for result in results.values()):
        sys.exit(1)


def all_runs(nest):
    """The runs in nested lists, tuples and dicts."""
    if isinstance(nest, Run):
        yield nest
    else:
        for part in nest.values() if isinstance(nest, dict) else nest:
            yield from all_runs(part)


def concluded(claim, explanation=""):
    """The Outcome of a claim whose runs are done, with its picture; or why there is none, which must not
    cost the other claims theirs."""
    try:
        next(claim)
    except StopIteration as done:
        outcome = done.value
    except (InputError, KeyError, ValueError, IndexError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    outcome.png, outcome.explanation = picture(outcome), explanation
    return outcome


if __name__ == "__main__":
    run_main(main)
