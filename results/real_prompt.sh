#!/usr/bin/env bash
# Plain, prompted and distilled: a 5.6M-parameter language model on the published sets; appends to results/real_prompt.jsonl.
#
#   python train_lm.py --data DATA/text --tokenizer bpe:8192 --size 5m --ctx 512 --steps 1500 --out out/lm-real     (first)
#   results/real_prompt.sh DATA
#
# The prompt is our own (data/prompts/hhh.txt), cut to 300 tokens, as the model's context is 512.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1
python=.venv/bin/python
[ -f out/real/dialogue.jsonl ] || $python -m data.prepare stackexchange --dialogue --raw "$data"/stackexchange/*/Posts.xml* --out out/real/dialogue.jsonl
[ -f out/real/distilled/meta.json ] || $python distill.py --init out/lm-real --prompt hhh --prompt_tokens 300 --data "$data"/text/squality_stories.jsonl.xz \
    --dialogue out/real/dialogue.jsonl --sequences 2048 --out out/real/distilled --resume
measure() {  # name, model, flags
    local name=$1 model=$2; shift 2
    for set in hhh:hhh_alignment truthfulqa:truthfulqa/TruthfulQA.csv lambada:lambada/lambada_test.jsonl; do
        $python evaluate.py "${set%%:*}" --model "$model" --data "$data/${set#*:}" "$@" | tail -n 1 | sed "s/^{/{\"arm\": \"$name\", /" >> results/real_prompt.jsonl
    done
}
measure plain out/lm-real
measure prompted out/lm-real --prompt hhh --prompt_tokens 300
measure distilled out/real/distilled
