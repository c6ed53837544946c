"""TRL's RewardTrainer on the same model and the same tokens, in a process of its own."""
import functools
import importlib.util
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from formats.hf_folder import make_config
from speed.race import clock, own_peak, trim_heap

TRL_BATCHES = (4, 8, 16)  # pairs


def trl_candidates(config, dtype, pairs):
    """{name: candidate} for `race`, where TRL is installed: its RewardTrainer on a model of this shape and on
    the same tokens, with several batches, as smaller ones pad less and larger ones take fewer steps."""
    if not importlib.util.find_spec("trl"):
        return {}
    tokenizer = pairs.row_format.tokenizer
    common = (make_config(config, tokenizer), tokenizer.eot, tokenizer.eoc, pairs.row_format.ctx,
              pairs.device.type, dtype == torch.bfloat16)

    def work(batch, r):
        ids = [sequence.tolist() for sequence in pairs.sequences(r)]
        examples = [{"chosen_ids": best, "rejected_ids": worst} for best, worst in zip(ids[::2], ids[1::2])]
        examples = examples[:pairs.batch // batch * batch]
        trim_heap()
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                return process.submit(train_with_trl, examples, batch, *common).result()
            except BrokenProcessPool:
                raise MemoryError("TRL's process was killed") from None
    batches = sorted({min(n, pairs.batch) for n in (*TRL_BATCHES, pairs.batch)})
    return {f"TRL RewardTrainer, batch {n}": (pairs.batch // n * n, functools.partial(work, n))
            for n in batches}


def train_with_trl(examples, batch, shape, eot, eoc, ctx, device_type, bf16):
    """(seconds, GiB at most, with the weights) of TRL's steps through the examples, with its own settings, but
    without checkpointing of activations, logs and files, which only take time.

    It has a process of its own, as some of its memory stays taken when it has run out of it. The system then
    kills this process first.
    """
    import datasets
    import tokenizers
    import transformers
    import trl
    oom_score = Path("/proc/self/oom_score_adj")
    if oom_score.exists():
        oom_score.write_text("1000")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eot>": eot, "<eoc>": eoc}, "<eot>"))
    words = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<eot>", eos_token="<eoc>")
    device, times = torch.device(device_type), []  # when each step ended

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(clock(device))

    before = own_peak()
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.RewardConfig(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=1 + len(examples) // batch,
            max_length=ctx, bf16=bf16, use_cpu=device_type == "cpu", gradient_checkpointing=False,
            logging_strategy="no", train_sampling_strategy="sequential", save_strategy="no", report_to="none",
            disable_tqdm=True)
        with device:
            model = transformers.AutoModelForSequenceClassification.from_config(
                transformers.AutoConfig.for_model(**shape))
        dataset = datasets.Dataset.from_list(examples[:batch] + examples)  # the first step only warms up
        reward_trainer = trl.RewardTrainer(
            model, settings, train_dataset=dataset, processing_class=words, callbacks=[Clock()])
        reward_trainer.remove_callback(transformers.PrinterCallback)
        reward_trainer.train()
    if device_type == "cuda":
        return times[-1] - times[0], torch.cuda.max_memory_allocated() / 2**30
    return times[-1] - times[0], (own_peak() - before) / 2**20
