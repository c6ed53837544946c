"""Claims of the paper's Section 4 and its appendix: preference-model pre-training (PMP). prompting.py says
how a claim is written."""
from claims.findings import at_size, curves, finding, growing, mean, minus, outcome, over_seeds, panel, values
from data.errors import InputError
from data.files import build_once, content_key
from data.toy import synthetic

RIGHT = "held-out comparisons right, %"


def transferred(lab, pre_train=None, *flags):
    """The arm of what is right after finetuning on few comparisons of each set, from the model that
    pre_train(one) makes, or from the language model."""
    return lab.arm(lambda one, name: one.transfer(name, pre_train and pre_train(one), *flags), lab.targets)


def own_accuracy(models):
    """The premise that binarised pre-training has taught the models to tell GOOD from BAD."""
    return finding("binarised pre-training: its own held-out accuracy minus chance", ">",
                   over_seeds([run.figures["accuracy"] - 0.5 for run in models], 100))


def pmp_sample_efficiency(lab):
    """Section 4: preference-model pre-training raises accuracy at 500 comparisons, and the more so the
    larger the model."""
    arms = {"without": lab.by_size(lambda one, name: one.transfer(name), lab.targets),
            "pre-trained": lab.by_size(lambda one, name: one.transfer(name, one.pre_trained()), lab.targets)}
    yield arms
    return growing(values(arms), RIGHT, "pre-trained > without", premises=["pre-trained > chance"])


def pmp_curve(lab):
    """Section 4: pre-training helps where there are 500 comparisons, and less where there are 5,000."""
    if not lab.curve_sets:
        raise InputError("no set has comparisons enough for a curve")

    def curve(pre_train):
        return {n: lab.arm(lambda one, name: one.transfer(name, pre_train(one), n=n), lab.curve_sets)
                for n in lab.amounts}
    arms = {"without": curve(lambda one: None), "pre-trained": curve(lambda one: one.pre_trained())}
    yield arms
    right, few, most = values(arms), lab.finetune_pairs, lab.amounts[-1]
    gains = minus(right["pre-trained"], right["without"])
    findings = {n: finding(f"at {n:,}: pre-trained minus without", ">", mean(gains[n])) for n in lab.amounts}
    more = finding(f"at {few}: more than at {most:,} by", ">", mean(minus(gains[few], gains[most])))
    panel = curves(right, RIGHT, 50, along="comparisons of finetuning", place="{:,}".format)
    return outcome(at_size(right, most), {"": panel}, [findings.pop(few), more], ["pre-trained > chance"],
                   beside=findings.values(), prefix=f"at {most:,}: ")


def pmp_by_source(lab):
    """Section 4: each source of pre-training helps at 500 comparisons, and their Mix is about as good as
    any.

    On the toy world only the Stack Exchange of that world helps. The other two have about a fifth of its
    comparisons each, in the paper's proportions, and ask other things of an answer; as many of them as of the
    first would decide which of the two it is.
    """
    def of(*sources):
        return transferred(lab, lambda one: one.pre_trained(sources=sources))
    arms = {"none": transferred(lab), **{name: of(name) for name in lab.sources}, "Mix": of(*lab.sources)}
    yield arms
    parts = [f"{name} > none" for name in lab.sources] + [f"{name} <= Mix" for name in lab.sources]
    return outcome(values(arms), RIGHT, parts, premises=["Mix > chance"], beside=["Mix > none"])


def binary_pmp_transfers_better(lab):
    """Section 4: binarised pre-training transfers better than ranked.

    On the toy world models hardly learn the binarised task, as the premise shows: to find which of two texts
    goes with a sign is much harder for 0.8M parameters in 300 steps than to rank them, so there is little to
    transfer. Larger models, or many more public comparisons, would decide.
    """
    flags = tuple(flag for flag in lab.pmp_flags if flag != "--binarise")

    def binarised(one):
        return one.pre_trained(pmp_flags=(*flags, "--binarise"))
    arms = {"none": transferred(lab),
            "ranked": transferred(lab, lambda one: one.pre_trained(pmp_flags=flags)),
            "binarised": transferred(lab, binarised)}
    models = lab.arm(binarised)[""]
    yield arms, models
    return outcome(values(arms), RIGHT, ["binarised > ranked"],
                   premises=[own_accuracy(models)], beside=["ranked > none", "binarised > none"])


def lm_loss_helps_pmp(lab):
    """Appendix: the language-model loss on the good side in pre-training improves transfer.

    On the toy world pre-training lasts some 300 steps, and starts from a model of the same kind of text, so
    there is little that a model without this loss could forget. A pre-training many times as long would
    decide; more worlds would only make the interval around 0 smaller.
    """
    arms = {"without LM loss": transferred(lab, lambda one: one.pre_trained("--lm_weight", 0)),
            "with LM loss": transferred(lab, lambda one: one.pre_trained())}
    yield arms
    return outcome(values(arms), RIGHT, ["with LM loss > without LM loss"],
                   premises=["with LM loss > chance"])


def end_of_context_helps(lab):
    """Section 4: an end-of-context token, where the reward is read, improves preference models.

    On the toy world every answer ends with a full stop, which says almost as plainly that it is over, so the
    gain is small against the differences between worlds. Some seventy worlds would decide.
    """
    arms = {"last token": transferred(lab, lambda one: one.pre_trained("--no_eoc"), "--no_eoc"),
            "<eoc>": transferred(lab, lambda one: one.pre_trained())}
    yield arms
    return outcome(values(arms), RIGHT, ["<eoc> > last token"],
                   premises=["<eoc> > chance"])


def human_vs_model_pairs(lab):
    """Section 4: pre-training on human against model-written text transfers better than human against
    human.

    On the toy world neither kind of pairs is seen to help: there are 2,000 of each, as the model is asked
    only so many questions, where 7,000 of the human ones do help (pmp-by-source). As many of both would
    decide.
    """
    contexts, pairs = lab.model_written
    flags = (*lab.pmp_flags, "--pairs", pairs, "--pairs_per_group", 1)

    def model_written(one):
        source = one.data("stackexchange")
        imitation = one.train_pm(one.lm(), "--objective", "imitation", "--data", source, "--pairs", contexts,
                                 held_out=0.05, comparisons=contexts)
        return one.run(
            "-m data.prepare human-vs-model", "--raw", source, "--model", imitation, "--contexts", contexts,
            "--max_new", one.max_new, "--seed", one.seed,
            seconds=one.sampling_seconds(contexts, 1, one.max_new))

    def on_model_written(one):
        return one.train_pm(one.lm(), "--data", model_written(one), "--lm_weight", 1, *flags, held_out=0.05,
                            comparisons=2 * pairs)

    def on_human_written(one):
        return one.pre_trained(pmp_flags=flags, sources=["stackexchange"])
    arms = {"none": transferred(lab), "human-human": transferred(lab, on_human_written),
            "human-model": transferred(lab, on_model_written)}
    yield arms
    right = values(arms)
    better = max(("human-human", "human-model"), key=lambda name: mean(right[name]).effect)
    return outcome(right, RIGHT, ["human-model > human-human"],
                   premises=[f"{better} > none"])


def synthetic_transfer(lab):
    """Appendix: on synthetic data a ranking learned in pre-training has to be unlearned where the order
    changes; a binarised one less.

    Here what pre-training has taught about the texts is of use even where the order changes: 200 pairs are
    enough to turn it round, and a model that starts afresh is not ahead. Fewer pairs of finetuning would show
    whether there is a time at which the old order is in the way.
    """
    common = ("--ctx", 64, "--dtype", "fp32", "--lm_weight", 0, "--held_out", 0.02)
    fresh = ("--size", "test", "--tokenizer", "bytes")

    def data(one, name):
        folder = f"synthetic-{one.seed}-{content_key([synthetic.__file__])}"
        return build_once(folder, lambda folder: synthetic.write(folder, one.seed)) / f"{name}.jsonl"

    def pre_trained(one, *flags):
        return one.run("train_pm.py", *fresh, "--stage", "pmp", "--data", data(one, "pmp"), "--batch", 64,
                       "--lr", 0.003, "--seed", one.seed, *common, *flags, seconds=12)

    def transfer(one, order, *init):
        model = one.run("train_pm.py", *init, "--data", data(one, f"finetune-{order}"), "--lr", 0.0003,
                        "--epochs", 4, "--seed", one.seed, *common, seconds=3)
        return one.evaluate("pm", model, "--data", data(one, f"test-{order}"), "--dtype", "fp32")

    def binarised(one):
        return pre_trained(one, "--binarise")
    lab, orders = lab.changed(seeds=lab.many_seeds), ("same", "shuffled", "reversed")
    arms = {"none": lab.arm(lambda one, order: transfer(one, order, *fresh), orders),
            "ranked": lab.arm(lambda one, order: transfer(one, order, "--init", pre_trained(one)), orders),
            "binarised": lab.arm(lambda one, order: transfer(one, order, "--init", binarised(one)), orders)}
    models = lab.arm(binarised)[""]
    yield arms, models
    right = values(arms)
    by_order = {f"{order}: {name}": {"": seeds} for name in right for order, seeds in right[name].items()}
    changed = ("reversed", "shuffled")
    return outcome(
        by_order, {"": panel(right, "right after 200 pairs, %", 50)},
        [f"{order}: {better} > {order}: ranked" for better in ("none", "binarised") for order in changed],
        premises=[own_accuracy(models)], beside=["same: binarised > same: ranked"])
