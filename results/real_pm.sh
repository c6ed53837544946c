#!/usr/bin/env bash
# Ranked preference models against imitation on real comparisons: HH harmless, HellaSwag, ETHICS utilitarianism; three seeds.
#
#   python train_lm.py --data DATA/text --tokenizer bpe:8192 --size 5m --ctx 512 --steps 1500 --out out/lm-real     (first)
#   results/real_pm.sh DATA [SET ...]                        DATA: folder of the published files; appends to results/real_pm.jsonl
#
# Both arms have the same learning rate (0.1 x the LM's: the paper's 0.01 x hardly moves a model this small in one epoch; fixed
# beforehand and for all), batch 32, one epoch, the same training and held-out groups. OMP_NUM_THREADS=1 fixes the threads.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1; shift
sets=${*:-hh hellaswag utilitarianism}
python=.venv/bin/python
lr=$($python -c "import json; print(0.1 * json.load(open('out/lm-real/meta.json'))['lm_lr'])")
mkdir -p out/real
[ -f out/real/hellaswag.jsonl ] || $python -m data.prepare hellaswag --raw "$data/hellaswag/hellaswag_val.jsonl.xz" --out out/real/hellaswag.jsonl
[ -f out/real/utilitarianism.jsonl ] || $python -m data.prepare utilitarianism --raw "$data/ethics/utilitarianism/util_train.csv" --out out/real/utilitarianism.jsonl
for seed in 0 1 2; do
    for set in $sets; do
        held_out=0.1; file=out/real/$set.jsonl; pairs=4000
        [ "$set" = hh ] && { held_out=0.3; file=$data/hh-rlhf/harmless-base/test.jsonl.gz; pairs=; }
        for objective in ranked imitation; do
            out=out/real/$set-$objective-$seed
            [ -f "$out/meta.json" ] || $python train_pm.py --init out/lm-real --data "$file" --objective $objective --lr "$lr" --seed $seed \
                --held_out $held_out ${pairs:+--pairs $pairs} --ctx 512 --eval_every 100000 --out "$out" --resume
            $python evaluate.py pm --model "$out" --data "$file" | tail -n 1 >> results/real_pm.jsonl
        done
    done
done
