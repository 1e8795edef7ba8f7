#!/usr/bin/env bash
# Set-up and the one-device runs of the Ascend ModelZoo:
#
#   bash run_1p.sh                                              demo corpus, tiny model: some two minutes
#   bash run_1p.sh full --data_path=DIR [train.py flags]        pretrain; the same command again continues
#   bash run_1p.sh full --raw_dir=DIR [flags]                   the same, from wiki.{train,valid,test}.raw in DIR
#   bash run_1p.sh performance --data_path=DIR [flags]          5,000 updates from the start, for the throughput
#   bash run_1p.sh eval --data_path=DIR --checkpoint_path=FILE  validation in float32 on the CPU
#   bash run_1p.sh test [pytest arguments]                      the tests
#
# full and performance take the npu_1p preset (--config_name base for fairseq's lengths); --checkpoint_path=FILE there
# starts from that file's weights. Everything lands in output/$ASCEND_DEVICE_ID (default 0). --raw_dir binarizes first,
# if that has not been done, into --data_path (default: a folder there): with the BPE of DIR's encoder.json, vocab.bpe
# and dict.txt as fairseq's recipe does, or where DIR holds none of these, with a BPE that it trains on the text.
set -euo pipefail
start=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
here=$PWD

mode=full
if [ $# -eq 0 ]; then
    mode=demo
elif [[ $1 != -* ]]; then
    mode=$1
    shift
fi
case $mode in
demo | full | performance | eval | test) ;;
*)
    echo "run_1p.sh: no mode '$mode'; one of full, performance, eval, test" >&2
    exit 2
    ;;
esac

# A relative path is one of the caller's folder. Several, joined by ':', are taken one by one.
absolute() {
    local part parts out=()
    IFS=: read -ra parts <<<"$1"
    for part in "${parts[@]}"; do
        [[ $part == /* ]] || part=$start/$part
        out+=("$part")
    done
    (IFS=: && echo "${out[*]}")
}

data_path="" raw_dir="" checkpoint_path="" save_dir="" flags=()
while [ $# -gt 0 ]; do
    case $1 in
    --data_path=*) data_path=${1#*=} ;;
    --raw_dir=*) raw_dir=${1#*=} ;;
    --checkpoint_path=*) checkpoint_path=${1#*=} ;;
    --save_dir=*) save_dir=${1#*=} ;;
    --data_path | --raw_dir | --checkpoint_path | --save_dir)
        [ $# -gt 1 ] || { echo "run_1p.sh: $1 needs a value" >&2; exit 2; }
        printf -v "${1#--}" %s "$2"
        shift
        ;;
    -h | --help)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$here/run_1p.sh"
        exit
        ;;
    *) flags+=("$1") ;;
    esac
    shift
done
[ -z "$data_path" ] || data_path=$(absolute "$data_path")
[ -z "$raw_dir" ] || raw_dir=$(absolute "$raw_dir")
[ -z "$checkpoint_path" ] || checkpoint_path=$(absolute "$checkpoint_path")
[ -z "$save_dir" ] || save_dir=$(absolute "$save_dir")
if [[ $mode =~ ^(full|performance|eval)$ && -z $data_path$raw_dir ]]; then
    echo "run_1p.sh: --data_path=DIR is missing: the folder with dict.txt, train.bin and train.idx;" \
        "or --raw_dir=DIR: that with wiki.train.raw" >&2
    exit 2
fi

# ---- the Python that runs it
requirements=requirements.txt
if compgen -G "/dev/davinci[0-9]*" >/dev/null; then
    requirements=requirements-npu.txt
    for env in "${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit}/set_env.sh" \
        "${ASCEND_TOOLKIT_HOME:-/usr/local/Ascend/ascend-toolkit}/../set_env.sh"; do
        if [ -f "$env" ]; then
            set +u # CANN's script reads variables that may be unset
            # shellcheck disable=SC1090
            source "$env"
            set -u
            break
        fi
    done
fi
needed="torch, numpy, tqdm"
[ $requirements = requirements.txt ] || needed="$needed, torch_npu"
python=python3
if ! TORCH_DEVICE_BACKEND_AUTOLOAD=0 $python -c "import $needed" 2>/dev/null; then
    [ -x .venv/bin/python ] || $python -m venv .venv || {
        echo "run_1p.sh: $python cannot make a virtual environment (on Debian: install python3-venv)" >&2
        exit 1
    }
    python=$here/.venv/bin/python
    if ! TORCH_DEVICE_BACKEND_AUTOLOAD=0 $python -c "import $needed" 2>/dev/null; then
        echo "installing $requirements into .venv ..."
        $python -m pip install --quiet --disable-pip-version-check -r $requirements
    fi
fi

need() { # a package, and what needs it
    $python -c "import $1" 2>/dev/null || $python -m pip install --quiet --disable-pip-version-check "$1" || {
        echo "run_1p.sh: $2 needs the package $1: $python -m pip install $1" >&2
        exit 1
    }
}

if [ $mode = test ]; then
    need pytest "the mode test"
    # the tests' tensors are small: on a busy machine threads would mostly wait for each other
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} exec "$python" -m pytest -q ${flags[@]+"${flags[@]}"}
fi

device_id=${ASCEND_DEVICE_ID:-0}
output=output/$device_id
log=$output/train_$device_id.log
mkdir -p "$output"

if [[ -n $raw_dir && $mode =~ ^(full|performance|eval)$ ]]; then
    data_path=${data_path:-$output/$(basename "$raw_dir")-bin}
    how=() texts=()
    for file in encoder.json vocab.bpe dict.txt; do
        [ ! -e "$raw_dir/$file" ] || how+=("--${file/[.]/_}" "$raw_dir/$file")
    done
    case ${#how[@]} in
    0) how=(--bpe train) ;;
    6) how=(--bpe gpt2 "${how[@]/#--dict_txt/--dict}") ;;
    *)
        echo "run_1p.sh: $raw_dir holds only a part of encoder.json, vocab.bpe, dict.txt; add the rest or remove it" >&2
        exit 2
        ;;
    esac
    for split in train valid test; do
        [[ $split = test && ! -e $raw_dir/wiki.test.raw ]] || texts+=("--$split" "$raw_dir/wiki.$split.raw")
    done
    need tokenizers "--raw_dir"
    "$python" preprocess.py "${texts[@]}" --dest "$data_path" "${how[@]}"
fi

if [ $mode = eval ]; then
    exec "$python" eval.py --device cpu --amp off --data_path "$data_path" \
        --ckpt "${checkpoint_path:-$output/full/checkpoint_best.pt}" ${flags[@]+"${flags[@]}"}
fi

# ---- train, log, report
save_dir=${save_dir:-$output/$mode}
preset=npu_1p extra=()
case $mode in
demo)
    preset=tiny data_path=$output/demo-bin extra=(--no_resume --overwrite)
    "$python" data.py --make_demo "$data_path"
    ;;
performance)
    extra=(--no_resume --overwrite --max_update 5000 --save_interval 0 --validate_interval 0)
    ;;
esac
[ -z "$checkpoint_path" ] || extra+=(--init_from "$checkpoint_path")

begin=$(date +%s)
: >"$log"
"$python" train.py --config_name $preset --data_path "$data_path" --save_dir "$save_dir" \
    ${extra[@]+"${extra[@]}"} ${flags[@]+"${flags[@]}"} >>"$log" 2>&1 &
train=$!
tail -n +1 -s 0.2 -f --pid=$train "$log" &
# A terminal's Ctrl-C reaches train.py by itself; what is sent to this script alone is passed on. The loop is for wait,
# which returns at every signal.
trap : INT
trap 'kill -TERM $train' TERM
trap 'kill -USR1 $train' USR1
code=0
wait $train || code=$?
while kill -0 $train 2>/dev/null; do
    code=0
    wait $train || code=$?
done
wait
trap - INT TERM USR1
[ $code -eq 0 ] || exit $code
duration=$(($(date +%s) - begin))

if [ $mode = demo ]; then
    echo
    echo "---- the trained model against the same model before training"
    "$python" eval.py --ckpt "$save_dir/checkpoint_best.pt" --data_path "$data_path" --untrained | tee -a "$log"
fi
echo
"$python" - "$save_dir" "$output" "$device_id" "$duration" "$log" <<'REPORT' | tee -a "$log"
import json, re, statistics, sys
from importlib.metadata import version
from pathlib import Path

save_dir, output, device_id, duration, log = sys.argv[1:]
rows = [json.loads(line) for line in (Path(save_dir) / "train.jsonl").read_text().splitlines()]
train = [row for row in rows if "loss" in row]
valid = [row for row in rows if "valid_loss" in row]
timed = train[1:] or train  # the first interval holds the start-up
ups, fps = (statistics.median(row[key] for row in timed) for key in ("ups", "fps"))
best = f"{valid[-1]['valid_best_loss']:.4f}" if valid else "-"
amp, kind = re.findall(r"^\d+ x (\w+) .*, amp (\w+) \|", Path(log).read_text(), re.M)[-1][::-1]

name, output = "data2vec_for_PyTorch_1p", Path(output)
(output / f"train_{name}_loss.txt").write_text("".join(f"{row['loss']}\n" for row in train))
(output / f"{name}.log").write_text(
    f"Network = data2vec_for_PyTorch\nRankSize = 1\nDeviceType = {kind}\nCaseName = {name}\n"
    f"ActualUPS = {ups}\nActualFPS = {fps}\nE2ETrainingTime = {duration}\n"
)
# The first three are the ModelZoo's own lines; its images/sec is updates per second.
print(f"Final Performance images/sec : {ups:.4f}")
print(f"Final Valid Best Loss: {best}")
print(f"E2E Training Duration sec : {duration}")
print(f"UPS (updates/s) : {ups:.4f}")
print(f"FPS (blocks/s) : {fps:.2f}")
print(f"Loss, first and last logged : {train[0]['loss']:.4f} -> {train[-1]['loss']:.4f}")
print()
print("| Name | wer | FPS | Epochs | AMP_Type | Torch_Version | Valid_Loss |")
print("| --- | --- | --- | --- | --- | --- | --- |")
print(f"| 1p-{kind} | - | {fps:.2f} | {train[-1]['epoch']} | {amp} | {version('torch')} | {best} |")
REPORT
